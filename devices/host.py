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
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from edgesft.core import threads
from edgesft.core.threads import affinity, cgroup_cpus, cgroup_folders, physical_cores
from edgesft.devices import cuda, sysfs
from edgesft.devices.jetson import Jetson
from edgesft.devices.spec import DeviceSpec, catalogue, describe, known
from edgesft.devices.telemetry import held_back as held_back
from edgesft.devices.telemetry import telemetry as telemetry
from edgesft.devices.telemetry import temperature

SCHEMA = 2
UNKNOWN = "unknown"
ROOT = Path("/")
CPU = ROOT / "sys/devices/system/cpu"
# Instruction sets that change which kernels a runtime picks.
ISA = (
    *("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "tensorrt", "torch", "transformers", "onnx", "numpy")
GPU_QUERY = "name,memory.total,driver_version,compute_cap,mig.mode.current,power.limit,clocks.max.sm"
# Asked apart: a driver that does not know one of these answers nothing at all.
CLOCK_QUERY = "clocks.applications.graphics,clocks.applications.memory"
HERE = ("host", "this", "this-machine")


def _text(path: str) -> str:
    return sysfs.text(ROOT / path.lstrip("/"))


def _tool(*command: str) -> str:
    return sysfs.tool(*command) if Path("/") == ROOT else ""


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


def default_threads() -> int:
    """Physical cores within affinity and control group: logical ones share the units that do the work."""
    return threads.resolve(0)


def memory_bytes() -> int | None:
    """Physical memory; None where it cannot be read."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def memory_limit() -> int | None:
    """The control group's memory limit in bytes; None without one."""
    limits = []
    for folder in cgroup_folders("memory", ROOT):
        text = sysfs.text(folder / "memory.max") or sysfs.text(folder / "memory.limit_in_bytes")
        if text.isdigit() and int(text) < 1 << 60:
            limits.append(int(text))
    return min(limits) if limits else None


def governor() -> str:
    """Frequency governor of the first processor we may use."""
    return sysfs.text(_cpufreq() / "scaling_governor") or UNKNOWN


def _cpufreq() -> Path:
    return CPU / f"cpu{min(affinity())}" / "cpufreq"


def clock_lock() -> dict[str, Any]:
    """What holds clocks: `cpu` (least equals greatest), `boost`, `gpu` (`jetson_clocks`); None: not shown."""
    low, high = (sysfs.number(_cpufreq() / f"scaling_{k}_freq") for k in ("min", "max"))
    turbo_off = sysfs.number(CPU / "intel_pstate/no_turbo")
    boost = sysfs.number(CPU / "cpufreq/boost")
    return {
        "cpu": None if low is None or high is None else low == high,
        "boost": bool(boost) if boost is not None else None if turbo_off is None else not turbo_off,
        "gpu": jetson().get("clocks_locked"),
    }


@cache
def gpus() -> tuple[dict[str, str], ...]:
    """NVIDIA GPUs as `nvidia-smi` sees them; empty where there is no driver."""
    names = GPU_QUERY.split(",")
    lines = _tool("nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader,nounits").splitlines()
    rows = [[cell.strip() for cell in line.split(",")] for line in lines]
    return tuple(dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names))


@cache
def application_clocks() -> tuple[str, ...]:
    """Clocks that each GPU is set to, `graphics, memory` in MHz, where the driver says so."""
    lines = _tool("nvidia-smi", f"--query-gpu={CLOCK_QUERY}", "--format=csv,noheader,nounits").splitlines()
    return tuple(line.strip() for line in lines if re.fullmatch(r"\s*\d+\s*,\s*\d+\s*", line))


@cache
def jetson() -> dict[str, Any]:
    """Module, releases, power mode and clock lock of a Jetson; empty elsewhere."""
    return Jetson(ROOT).about()


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
        "clock_lock": clock_lock(),
        "board": board.get("board") or _text("/proc/device-tree/model") or None,
        "sku": board.get("sku"),
        "l4t": board.get("l4t"),
        "power_mode": board.get("power_mode"),
        "gpus": _gpu_identities(),
        "cuda": cuda.version(),
        "onnxruntime": installed("onnxruntime") or installed("onnxruntime-gpu"),
        "tensorrt": installed("tensorrt") or _tensorrt_library(),
        **more,
    }
    record = {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": installed("torch"),
        "numpy": installed("numpy"),
        "jetpack": board.get("jetpack"),
        "driver": [g["driver_version"] for g in gpus()],
        "bogomips": _cpuinfo().get("bogomips", UNKNOWN),
        "mhz": _cpuinfo().get("cpu mhz", UNKNOWN),
        "celsius": temperature(ROOT),
        "load": _load(),
    }
    refuse = json.loads(json.dumps(refuse))  # tuples and lists would otherwise differ after a file
    return {"schema": SCHEMA, "id": fingerprint_id(refuse), "refuse": refuse, "record": record}


def _gpu_identities() -> list[dict[str, Any]]:
    """What of each GPU decides its speed. `sms` is None where the CUDA driver does not count them."""
    rows, units, clocks = gpus(), cuda.multiprocessors(), application_clocks()
    return [
        {
            "name": g["name"],
            "memory_mib": g["memory.total"],
            "driver": g["driver_version"].split(".")[0],
            "compute_capability": g["compute_cap"],
            "mig": g["mig.mode.current"],
            "power_limit_w": g["power.limit"],
            "max_sm_mhz": g["clocks.max.sm"],
            "sms": units[i] if len(units) == len(rows) else None,
            "application_mhz": clocks[i] if len(clocks) == len(rows) else None,
        }
        for i, g in enumerate(rows)
    ]


def _tensorrt_library() -> str | None:
    """Version of a TensorRT that came with the system, from the name of its library."""
    for folder in ("usr/lib/aarch64-linux-gnu", "usr/lib/x86_64-linux-gnu"):
        for file in sorted((ROOT / folder).glob("libnvinfer.so.*.*.*")):
            return file.name.partition(".so.")[2]
    return None


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
    return [
        f"`{name}` is `{there}` there and `{here}` here"
        for name, here, there in _unequal(ours["refuse"], theirs["refuse"])
    ]


def _unequal(ours: object, theirs: object, name: str = "") -> Iterator[tuple[str, object, object]]:
    """Dotted names of the values that differ, and both values; a missing one is None."""
    inside = f"{name}." if name else ""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in sorted(ours.keys() | theirs.keys()):
            yield from _unequal(ours.get(key), theirs.get(key), f"{inside}{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs) and name == "gpus":
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from _unequal(one, other, f"{inside}{index}")
    elif ours != theirs:
        yield name, ours, theirs


def _load() -> list[float]:
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else []


def spec() -> DeviceSpec:
    """This machine's processor as a device: the catalogue's rates with its own cores, clock and memory."""
    flags = set(isa())
    board = _text("/proc/device-tree/model")
    if jetson().get("device"):
        return known(jetson()["device"])
    hits = [
        (len(m), d) for d in catalogue() for m in d.match if d.kind != "gpu" and m.lower() in board.lower()
    ]
    if board and hits:
        return max(hits, key=lambda hit: hit[0])[1]
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
    khz = sysfs.number(_cpufreq() / "cpuinfo_max_freq")
    if khz is not None:
        return khz / 1e6
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


def show(name: str) -> dict[str, Any]:
    """A device of the catalogue, or `host` for this machine: every figure with its source and confidence.

    Raises UsageError for any other name.
    """
    if name not in HERE:
        return describe(known(name))
    here = spec()
    return describe(
        here,
        {
            "name": ("measured", "the kernel of this machine"),
            "units": ("measured", "physical cores that this process may use"),
            "ghz": ("measured", "cpufreq, or the name of the processor"),
            "memory_gb": ("measured", "the kernel of this machine"),
        }
        if here.id not in {d.id for d in catalogue() if d.kind != "cpu" or d.units}
        else {},
    )
