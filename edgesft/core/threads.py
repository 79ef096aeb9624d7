"""How many threads a runtime gets: the physical cores within affinity and control group.

Logical cores share the units that do the work, and threads that take turns on a core, or that the control
group stops, are slower than none.
"""

import os
from pathlib import Path

CPU = Path("/sys/devices/system/cpu")


def resolve(threads: int) -> int:
    """`threads`, or for 0 as many as are fastest here: at least 1."""
    if threads > 0:
        return threads
    cores, quota = physical_cores(), cgroup_cpus()
    return cores if quota is None else max(1, min(cores, int(quota)))


def affinity() -> set[int]:
    """Logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def physical_cores(cpus: set[int] | None = None) -> int:
    """Distinct physical cores among the logical `cpus` (all that we may use, if None); at least 1."""
    allowed = affinity() if cpus is None else cpus
    cores = set()
    for cpu in allowed:
        topology = CPU / f"cpu{cpu}" / "topology"
        core = _text(topology / "core_id")
        cores.add((_text(topology / "physical_package_id"), core) if core else cpu)
    if not CPU.is_dir():  # not Linux: only the whole machine can be counted
        import psutil

        return max(1, min(len(cores), psutil.cpu_count(logical=False) or len(cores)))
    return max(1, len(cores))


def cgroup_cpus() -> float | None:
    """Processors' worth of time that the control group allows, v2 or v1; None without a limit."""
    limits = []
    for folder in cgroup_folders("cpu"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if not quota:
            quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            limits.append(int(quota) / int(period))
    return min(limits) if limits else None


def cgroup_folders(controller: str, root: Path = Path("/")) -> list[Path]:
    """Folders of this process's control group, the topmost first. root: of the file system."""
    folders = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        hierarchy, controllers, path = [*line.split(":", 2), "", ""][:3]
        if hierarchy == "0":
            home = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            home = root / "sys/fs/cgroup" / controller
        else:
            continue
        parts = [p for p in path.split("/") if p and p != ".."]
        folders += [home.joinpath(*parts[:n]) for n in range(len(parts) + 1)]
    return [f for f in folders if f.is_dir()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""
