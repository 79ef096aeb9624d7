"""This machine: what it is, what of that decides latencies, how many threads to use, what held it back.

Everything comes from files of the kernel; tools (`nvidia-smi`, `nvpmodel`) are run only where they exist, and
nothing heavy is imported. What cannot be found out is `unknown`, which is a legal value everywhere.
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgesft.devices.spec import DeviceSpec, catalogue, known

SCHEMA = 1
UNKNOWN = "unknown"
CPU = Path("/sys/devices/system/cpu")
# Instruction sets that change which kernels a runtime picks.
ISA = (
    *("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "torch", "transformers", "onnx", "numpy")
GPU_QUERY = "name,memory.total,driver_version,compute_cap,mig.mode.current,power.limit,clocks.max.sm"


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _tool(*command: str, timeout: float = 5.0) -> str:
    """Output of a tool, empty where it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@cache
def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor in /proc/cpuinfo."""
    found: dict[str, str] = {}
    for line in _text("/proc/cpuinfo").split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip().lower(), value.strip())
    return found


def cpu_model() -> str:
    """Marketing name of the processor, or what else identifies it."""
    info = _cpuinfo()
    if "model name" in info:
        numbers = ".".join(info.get(k, "?") for k in ("cpu family", "model", "stepping"))
        return f"{info['model name']} ({numbers})"
    if "cpu part" in info:
        return f"{info.get('cpu implementer', '?')}.{info['cpu part']}"
    return platform.processor() or UNKNOWN


def isa() -> list[str]:
    """Which of the instruction sets that matter are here, sorted."""
    info = _cpuinfo()
    flags = set(info.get("flags", info.get("features", "")).split())
    return sorted(flags & set(ISA))


def affinity() -> set[int]:
    """Logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def physical_cores(cpus: set[int] | None = None) -> int:
    """Distinct physical cores among the logical `cpus` (all that we may use, if None); at least 1."""
    cores = set()
    for cpu in affinity() if cpus is None else cpus:
        topology = CPU / f"cpu{cpu}" / "topology"
        core = _text(topology / "core_id")
        cores.add((_text(topology / "physical_package_id"), core) if core else cpu)
    return max(1, len(cores))


def cgroup_cpus() -> float | None:
    """Processors' worth of time that the control group allows, v2 or v1; None without a limit."""
    limits = []
    for folder in _cgroup_folders("cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            limits.append(int(quota) / int(period))
    return min(limits) if limits else None


def _cgroup_folders(controller: str) -> list[Path]:
    """Folders of this process's control group, the root first, wherever they are mounted."""
    folders = []
    for line in _text("/proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0":
            root = Path("/sys/fs/cgroup")
        elif controller in controllers.split(","):
            root = Path("/sys/fs/cgroup") / controller
        else:
            continue
        parts = [p for p in path.split("/") if p and p != ".."]
        folders += [root.joinpath(*parts[:n]) for n in range(len(parts) + 1)]
    return [f for f in folders if f.is_dir()]


def default_threads() -> int:
    """Physical cores within affinity and control group: logical ones share the units that do the work."""
    quota = cgroup_cpus()
    cores = physical_cores()
    return cores if quota is None else max(1, min(cores, int(quota)))


def memory_bytes() -> int | None:
    """Physical memory; None where it cannot be read."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def memory_limit() -> int | None:
    """The control group's memory limit in bytes; None without one."""
    limits = []
    for folder in _cgroup_folders("memory"):
        text = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
        if text.isdigit() and int(text) < 1 << 60:
            limits.append(int(text))
    return min(limits) if limits else None


def governor() -> str:
    """Frequency governor of the first processor we may use."""
    return _text(CPU / f"cpu{min(affinity())}" / "cpufreq" / "scaling_governor") or UNKNOWN


@cache
def gpus() -> tuple[dict[str, str], ...]:
    """NVIDIA GPUs as `nvidia-smi` sees them; empty where there is no driver."""
    names = GPU_QUERY.split(",")
    lines = _tool("nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits").splitlines()
    rows = [[cell.strip() for cell in line.split(",")] for line in lines]
    return tuple(dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names))


@cache
def jetson() -> dict[str, str]:
    """Board, L4T release and power mode of a Jetson; empty elsewhere."""
    model = _text("/proc/device-tree/model")
    release = _text("/etc/nv_tegra_release")
    if "jetson" not in model.lower() and not release:
        return {}
    match = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", release)
    mode = re.search(r"NV Power Mode:\s*(\S+)", _tool("nvpmodel", "-q"))
    return {
        "board": model or UNKNOWN,
        "l4t": f"{match[1]}.{match[2]}" if match else UNKNOWN,
        "power_mode": mode[1] if mode else UNKNOWN,
    }


def installed(distribution: str) -> str | None:
    """Version of a distribution without importing it; None if it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def fingerprint(**more: object) -> dict[str, Any]:
    """What two measurements must share to be comparable.

    Returns `{"schema", "id": "sha256:...", "refuse": {...}, "record": {...}}`. `refuse`: any difference makes
    them incomparable; the id is the hash of these alone. `record`: kept for the reader; clocks,
    temperatures and patch levels differ from boot to boot on one and the same machine. `more` is added to
    `refuse`: threads, runtime, shapes.
    """
    memory = memory_bytes()
    board = jetson()
    devices = [
        {
            "name": g["name"],
            "memory_mib": g["memory.total"],
            "driver": g["driver_version"].split(".")[0],
            "compute_capability": g["compute_cap"],
            "mig": g["mig.mode.current"],
            "power_limit_w": g["power.limit"],
        }
        for g in gpus()
    ]
    refuse: dict[str, Any] = {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "isa": isa(),
        "cores": physical_cores(),
        "logical": len(affinity()),
        "cgroup_cpus": cgroup_cpus(),
        "memory_gib": None if memory is None else math.ceil(memory / 2**30),
        "governor": governor(),
        "board": board.get("board") or _text("/proc/device-tree/model") or None,
        "l4t": board.get("l4t"),
        "power_mode": board.get("power_mode"),
        "gpus": devices,
        "onnxruntime": installed("onnxruntime") or installed("onnxruntime-gpu"),
        "tensorrt": installed("tensorrt"),
        **more,
    }
    record = {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": installed("torch"),
        "numpy": installed("numpy"),
        "driver": [g["driver_version"] for g in gpus()],
        "bogomips": _cpuinfo().get("bogomips", UNKNOWN),
        "mhz": _cpuinfo().get("cpu mhz", UNKNOWN),
        "celsius": _temperature(),
        "load": _load(),
    }
    refuse = json.loads(json.dumps(refuse))  # tuples and lists would otherwise differ after a file
    return {"schema": SCHEMA, "id": fingerprint_id(refuse), "refuse": refuse, "record": record}


def fingerprint_id(refuse: Mapping[str, Any]) -> str:
    """`sha256:...` of the fields that must agree."""
    text = json.dumps(refuse, sort_keys=True, separators=(",", ":"), default=str)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Why two fingerprints are not comparable, one line a field; empty if they are.

    A fingerprint that is broken or of a newer schema differs.
    """
    for each in (ours, theirs):
        if not isinstance(each.get("refuse"), Mapping) or each.get("schema") != SCHEMA:
            return [f"a fingerprint has schema `{each.get('schema')}`, this EdgeSFT compares schema {SCHEMA}"]
    a, b = ours["refuse"], theirs["refuse"]
    return [
        f"`{name}` is `{b.get(name)}` there and `{a.get(name)}` here"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
    ]


def _load() -> list[float]:
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else []


def _temperature() -> float | None:
    """Hottest thermal zone in degrees Celsius."""
    zones = [_text(z / "temp") for z in Path("/sys/class/thermal").glob("thermal_zone*")]
    hot = [int(t) / 1000 for t in zones if t.lstrip("-").isdigit()]
    return max(hot) if hot else None


def telemetry() -> dict[str, float]:
    """Counters that tell whether something held the machine back between two readings.

    seconds: monotonic clock. steal, busy: processor seconds that the hypervisor took, and all together.
    throttled: seconds that the control group held us back. thermal: throttle events of the processors.
    Read it outside timed sections.
    """
    found = {"seconds": time.monotonic()}
    fields = _text("/proc/stat").split("\n", 1)[0].split()[1:]
    if len(fields) >= 8:
        ticks = os.sysconf("SC_CLK_TCK")
        found["steal"] = int(fields[7]) / ticks
        found["busy"] = sum(int(x) for x in fields[:8]) / ticks
    for folder in _cgroup_folders("cpu"):
        for line in _text(folder / "cpu.stat").splitlines():
            key, _, value = line.partition(" ")
            if key in ("throttled_usec", "throttled_time") and value.isdigit():
                scale = 1e-6 if key == "throttled_usec" else 1e-9
                found["throttled"] = max(found.get("throttled", 0.0), int(value) * scale)
    counters = [_text(p) for p in CPU.glob("cpu[0-9]*/thermal_throttle/*_throttle_count")]
    if counters:
        found["thermal"] = float(sum(int(c) for c in counters if c.isdigit()))
    return found


def held_back(before: Mapping[str, float], after: Mapping[str, float]) -> str | None:
    """Why what ran between two readings is to be measured again, from telemetry alone; None if it is fine."""

    def rise(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    seconds = rise("seconds")
    if rise("thermal") > 0:
        return "the processor throttled for heat"
    if seconds > 0 and rise("throttled") > 0.02 * seconds:
        return f"the control group held it back for {rise('throttled'):.2f} of {seconds:.2f} s"
    if rise("busy") > 0 and rise("steal") > 0.10 * rise("busy"):
        return f"the hypervisor took {100 * rise('steal') / rise('busy'):.0f} % of the processor time"
    return None


def spec() -> DeviceSpec:
    """This machine's processor as a device: the catalogue's rates with its own cores, clock and memory."""
    flags = set(isa())
    board = _text("/proc/device-tree/model")
    for each in catalogue():
        if board and each.kind != "gpu" and any(m.lower() in board.lower() for m in each.match):
            return each
    machine = platform.machine().lower()
    if "avx512f" in flags:
        base = known("x86-avx512")
    elif "avx2" in flags:
        base = known("x86-avx2")
    else:
        base = DeviceSpec(id=f"cpu-{machine}", name=machine, kind="cpu", status="rates unknown")
    absent = {"bf16": "avx512_bf16", "int8_vnni": "avx512_vnni", "int8_amx": "amx_int8"}
    if base.id == "x86-avx2":
        absent = {"int8_vnni": "avx_vnni"}
    ops = {k: v for k, v in base.ops.items() if k not in absent or absent[k] in flags}
    memory = memory_bytes()
    return dataclasses.replace(
        base,
        name=cpu_model(),
        units=physical_cores(),
        ghz=_max_ghz(),
        memory_gb=None if memory is None else round(memory / 1e9, 1),
        ops=ops,
    )


def _max_ghz() -> float | None:
    khz = _text(CPU / "cpu0" / "cpufreq" / "cpuinfo_max_freq")
    if khz.isdigit():
        return int(khz) / 1e6
    named = re.search(r"([\d.]+)\s*GHz", _cpuinfo().get("model name", ""))
    mhz = _cpuinfo().get("cpu mhz", "")
    if named:
        return float(named[1])
    return round(float(mhz) / 1000, 2) if mhz else None


def match(name: str) -> DeviceSpec | None:
    """The device of the catalogue that a driver calls `name`; the longest match wins."""
    hits = [(len(m), each) for each in catalogue() for m in each.match if m.lower() in name.lower()]
    return max(hits, key=lambda hit: hit[0])[1] if hits else None


def status() -> dict[str, Any]:
    """What `edgesft devices` and `edgesft doctor` show of this machine. JSON values only."""
    here = spec()
    return {
        "host": {
            "id": here.id,
            "name": here.name,
            "system": f"{platform.system()} {platform.machine()}",
            "isa": isa(),
            "physical_cores": physical_cores(),
            "logical_cores": len(affinity()),
            "cgroup_cpus": cgroup_cpus(),
            "threads": default_threads(),
            "memory_bytes": memory_bytes(),
            "memory_limit_bytes": memory_limit(),
            "governor": governor(),
            "ghz": here.ghz,
            "peak_tops": {k: here.peak(k) for k in here.ops},
            **({"jetson": jetson()} if jetson() else {}),
        },
        "gpus": [{**g, "id": found.id if (found := match(g["name"])) else None} for g in gpus()],
        "runtimes": {name: installed(name) for name in RUNTIMES},
        "fingerprint": fingerprint(),
        "catalogue": [each.id for each in catalogue()],
    }


def overview() -> dict[str, Any]:
    """`status` with the catalogue as a table: `columns`, `rows`. JSON values only."""
    columns = ("device", "cc", "units", "GHz", "GB", "GB/s", "fp16 T/s", "int8 T/s", "2:4")
    rows = [
        (
            name,
            each.compute_capability or "-",
            _short(each.units),
            _short(each.ghz),
            _short(each.memory_gb),
            _short(each.bandwidth_gbs),
            _short(each.peak("fp16")),
            _short(each.peak("int8_vnni") or each.peak("int8")),
            "yes" if each.sparse24 else "no",
        )
        for name, each in [("this machine", spec()), *((d.id, d) for d in catalogue())]
    ]
    return {**status(), "columns": list(columns), "rows": [list(row) for row in rows]}


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
