"""Counters of the kernel that tell whether something held the machine back."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from edgesft.core.threads import cgroup_folders
from edgesft.devices.sysfs import number, text

ROOT = Path("/")
STEAL = 0.10  # share of the processor time, above which a measurement is made again
QUOTA = 0.02  # share of the time


def telemetry(root: Path = ROOT) -> dict[str, float]:
    """Counters that tell whether something held the machine back between two readings.

    seconds: monotonic clock. steal, busy: processor seconds that the hypervisor took, and all together.
    throttled: seconds that the control group held us back; periods: how often. thermal: throttle events of
    the processors. Read it outside timed sections.
    """
    found = {"seconds": time.monotonic()}
    fields = text(root / "proc/stat").split("\n", 1)[0].split()[1:]
    if len(fields) >= 8:
        ticks = os.sysconf("SC_CLK_TCK")
        found["steal"] = int(fields[7]) / ticks
        found["busy"] = sum(int(x) for x in fields[:8]) / ticks
    for folder in cgroup_folders("cpu", root):
        for line in text(folder / "cpu.stat").splitlines():
            key, _, value = line.partition(" ")
            scale = {"throttled_usec": 1e-6, "throttled_time": 1e-9, "nr_throttled": 1.0}.get(key)
            if scale is not None and value.isdigit():
                name = "periods" if key == "nr_throttled" else "throttled"
                found[name] = max(found.get(name, 0.0), int(value) * scale)
    counters = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/thermal_throttle/*_throttle_count")
    events = [value for value in map(number, counters) if value is not None]
    if events:
        found["thermal"] = float(sum(events))
    return found


def held_back_by(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Everything that held back what ran between two readings enough to measure it again."""

    def rise(name: str) -> float:
        return after[name] - before[name] if name in after and name in before else 0.0

    seconds, found = rise("seconds"), []
    if rise("thermal") > 0:
        found.append("the processor throttled for heat")
    if seconds > 0 and rise("throttled") > QUOTA * seconds:
        found.append(f"the control group held it back for {rise('throttled'):.2f} of {seconds:.2f} s")
    if rise("busy") > 0 and rise("steal") > STEAL * rise("busy"):
        found.append(f"the hypervisor took {100 * rise('steal') / rise('busy'):.0f} % of the processor time")
    return found


def held_back(before: Mapping[str, float], after: Mapping[str, float]) -> str | None:
    """Why what ran between two readings is to be measured again, from telemetry alone; None if it is fine."""
    return next(iter(held_back_by(before, after)), None)


def temperature(root: Path = ROOT) -> float | None:
    """Hottest thermal zone in degrees Celsius; None where there is none."""
    zones = [number(z / "temp") for z in (root / "sys/class/thermal").glob("thermal_zone*")]
    hot = [t / 1000 for t in zones if t is not None]
    return max(hot) if hot else None
