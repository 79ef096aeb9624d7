"""Energy, clocks, temperatures and throttling of this machine while something runs.

Energy comes from the first of: the power monitors of a Jetson module (INA3221, whole module), or the
processors' RAPL counters together with the GPUs' NVML counters. Counters are read at the start and the end;
what has none is looked at once a second at most, in a thread of the measuring parent, never in the process
that is measured. NVML is asked only at the start and the end: asking it can itself cause latency spikes.
Where nothing tells, the source is None and `reason` says why. Energy is that of the whole machine over the
whole time, idle share included.
"""

import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from edgesft.devices import jetson, nvml, sysfs
from edgesft.devices.telemetry import held_back_by, telemetry, temperature

LEAST = 1.0  # seconds between two looks
# Bits of the Raspberry Pi firmware's `get_throttled`; 16 higher: has happened since the boot.
PI = {0: "under-voltage", 1: "the clock is capped", 2: "throttled", 3: "the soft temperature limit"}


class Rapl:
    """Energy counters of the processors under /sys/class/powercap, wrap-around corrected.

    Source: Linux kernel, Documentation/power/powercap. A counter wraps at `max_energy_range_uj`, after a
    quarter of an hour at the soonest; looks are closer together than that.
    """

    source = "rapl"
    polls = True

    def __init__(self, root: Path) -> None:
        home = root / "sys/class/powercap"
        zones = sorted(f for f in home.glob("*:*") if re.fullmatch(r"(intel|amd)-rapl(:\d+)+", f.name))
        # DRAM is a zone of a package but not part of its count; core and uncore are; psys holds packages.
        named = [(f, sysfs.text(f / "name")) for f in zones]
        wanted = [(f, n) for f, n in named if n.startswith("package") or n == "dram"]
        if not any(n.startswith("package") for _, n in wanted):
            wanted = [(f, n) for f, n in named if n == "psys"]
        self._zones = {f"{n}@{f.name.partition(':')[2]}": f for f, n in wanted}
        self.joules: dict[str, float] = {}
        self._last: dict[str, int] = {}
        self.reason: str | None = None
        if not self._zones:
            self.reason = "no RAPL counter under /sys/class/powercap"
        elif any(sysfs.number(f / "energy_uj") is None for f in self._zones.values()):
            self.reason = "the RAPL counters under /sys/class/powercap may only be read by root"

    def sample(self, now: float) -> None:
        """Add what was used since the last look."""
        for name, folder in self._zones.items():
            value = sysfs.number(folder / "energy_uj")
            if value is None:
                self.reason = self.reason or f"`{folder / 'energy_uj'}` could no longer be read"
                continue
            last = self._last.get(name, value)
            wrap = (sysfs.number(folder / "max_energy_range_uj") or 0) if value < last else 0
            self.joules[name] = self.joules.get(name, 0.0) + max(0, value - last + wrap) / 1e6
            self._last[name] = value

    def total(self) -> float:
        return sum(self.joules.values())


class Rails:
    """The power monitors of a Jetson, integrated over time by the trapezium rule."""

    source = "ina3221"
    polls = True

    def __init__(self, root: Path) -> None:
        self._root = root
        self.joules: dict[str, float] = {}
        self._last: tuple[float, dict[str, float]] | None = None
        self._counted: list[str] = []
        self.reason = None if jetson.rails(root) else "no INA3221 power monitor under /sys/class/hwmon"

    def sample(self, now: float) -> None:
        """Add what was used since the last look."""
        found = jetson.rails(self._root)
        if not found:
            self.reason = self.reason or "the power monitor could no longer be read"
            return
        watts = {r.name: r.watts for r in found}
        self._counted = jetson.total(found)[1]
        if self._last is not None:
            before, last = self._last
            for name, now_watts in watts.items():
                mean = (now_watts + last.get(name, now_watts)) / 2
                self.joules[name] = self.joules.get(name, 0.0) + mean * (now - before)
        self._last = (now, watts)

    def total(self) -> float:
        return sum(self.joules.get(name, 0.0) for name in self._counted)


class Gpus:
    """NVML's energy counters, in millijoules since the driver was loaded."""

    source = "nvml"
    polls = False

    def __init__(self, found: nvml.Nvml | None, reason: str | None) -> None:
        self._nvml = found
        self.joules: dict[str, float] = {}
        self._first: dict[str, float] | None = None
        self.reason = reason
        if found is not None and not found.joules():
            self.reason = "the GPU has no NVML energy counter"

    def sample(self, now: float) -> None:
        """The counters now, less those at the first call."""
        values = self._nvml.joules() if self._nvml else {}
        if self._first is None:
            self._first = values
        elif values.keys() < self._first.keys():
            self.reason = "the NVML energy counter could no longer be read"
        self.joules = {k: v - self._first[k] for k, v in values.items() if k in self._first}

    def total(self) -> float:
        return sum(self.joules.values())


class Meter:
    """`with Meter() as meter: ...`, then `meter.result()`.

    root: where the kernel's files lie. interval: seconds between two looks, 1 at least; 0 looks only at the
    start and the end. poll_gpus: look at NVML's clocks and temperatures too each time, for runs of which the
    latency does not count. clock: seconds.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        interval: float = 1.0,
        poll_gpus: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root, self._clock, self._poll_gpus = root, clock, poll_gpus
        self._interval = max(LEAST, interval) if interval > 0 else 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._clocks: dict[str, list[float]] = {}
        self._edges: dict[str, list[float]] = {}  # clocks at the start and the end, when little runs
        self._celsius: list[float] = []
        self._alarms: set[str] = set()
        self._seconds = 0.0

    def __enter__(self) -> "Meter":
        here = self._root == Path("/")
        self._nvml, why = nvml.connect() if here else (None, "the GPUs of another file system are not asked")
        rails = Rails(self._root)
        self._energy: list[Rapl | Rails | Gpus] = [rails]
        if rails.reason:
            self._energy = [rails, Rapl(self._root), Gpus(self._nvml, why)]
        self._before = self._throttle()
        self._began = self.look(edge=True)
        if self._interval and self._worth_polling():
            self._thread = threading.Thread(target=self._poll, name="edgesft-meter", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._seconds = self.look(edge=True) - self._began
        self._after = self._throttle()
        if self._nvml is not None:
            self._nvml.close()

    def _worth_polling(self) -> bool:
        polled = any(e.polls and not e.reason for e in self._energy)
        return polled or bool(self._edges or self._celsius)

    def _poll(self) -> None:
        while not self._stop.wait(self._interval):
            self.look()

    def look(self, *, edge: bool = False) -> float:
        """Read everything once; the time. edge: at the start or the end, where NVML is asked as well."""
        with self._lock:
            now = self._clock()
            for each in self._energy:
                if each.polls or edge:
                    each.sample(now)
            clocks = _cpu_clocks(self._root) | jetson.gpu_clocks(self._root)
            if self._nvml is not None and (edge or self._poll_gpus):
                clocks |= self._nvml.clocks()
                self._celsius += self._nvml.celsius()
            for name, mhz in clocks.items():
                (self._edges if edge else self._clocks).setdefault(name, []).append(mhz)
            hottest = temperature(self._root)
            self._celsius += [] if hottest is None else [hottest]
            self._alarms |= {
                f"{r.name}: current {a} alarm" for r in jetson.rails(self._root) for a in r.alarms
            }
            return now

    def result(self) -> dict[str, Any]:
        """What was seen between `with` and its end. JSON values only.

        energy: source, joules, watts (mean), seconds, joules of each domain, reason where there is no source.
        clocks: source, mhz_min, mhz_max, mhz_mean of the processor (its fastest core at each look) or, where
        that is hidden, of the first GPU; all under `domains`; `during` is false where nothing was read but
        at the start and the end. temperature: hottest sensor. throttled: what held the machine back, and by
        how much each counter rose.
        """
        return {
            "energy": self._energy_result(),
            "clocks": self._clocks_result(),
            "temperature": {
                "source": "thermal zones" if self._celsius else None,
                "celsius_min": min(self._celsius, default=None),
                "celsius_max": max(self._celsius, default=None),
            },
            "throttled": self._throttled_result(),
        }

    def _energy_result(self) -> dict[str, Any]:
        usable = [e for e in self._energy if e.reason is None]
        seconds = round(self._seconds, 3)
        if not usable or seconds <= 0:
            why = "; ".join(e.reason for e in self._energy if e.reason) or "no time passed"
            return {"source": None, "joules": None, "watts": None, "seconds": seconds, "reason": why}
        joules = sum(e.total() for e in usable)
        missing = [e.reason for e in self._energy if e.reason and e not in usable]
        return {
            "source": "+".join(e.source for e in usable),
            "joules": round(joules, 6),
            "watts": round(joules / self._seconds, 6),
            "seconds": seconds,
            "domains": {k: round(v, 6) for e in usable for k, v in e.joules.items()},
            "reason": None,
            "without": missing,
        }

    def _clocks_result(self) -> dict[str, Any]:
        seen = self._edges | self._clocks
        if not seen:
            why = "no cpufreq, devfreq or NVML clock: a virtual machine hides it"
            return {"source": None, "mhz_min": None, "mhz_max": None, "mhz_mean": None, "reason": why}
        domains = {
            name: {
                "mhz_min": round(min(values), 1),
                "mhz_max": round(max(values), 1),
                "mhz_mean": round(sum(values) / len(values), 1),
                "looks": len(values),
                "during": name in self._clocks,
            }
            for name, values in seen.items()
        }
        first = next(iter(domains))
        return {"source": _clock_source(first), **domains[first], "domains": domains, "reason": None}

    def _throttle(self) -> dict[str, Any]:
        found: dict[str, Any] = {"telemetry": telemetry(self._root)}
        found["pi"] = _pi(self._root)
        counters = (self._root / "sys/class/hwmon").glob("hwmon*/oc*_event_cnt")
        found["overcurrent"] = sum(sysfs.number(c) or 0 for c in counters)
        if self._nvml is not None:
            found["gpu"] = self._nvml.throttle()
        return found

    def _throttled_result(self) -> dict[str, Any]:
        a, b = self._before, self._after
        reasons = held_back_by(a["telemetry"], b["telemetry"])
        if b["pi"] is not None:
            since = (b["pi"] & ~(a["pi"] or 0)) >> 16  # has happened, and had not at the first look
            reasons += [what for bit, what in PI.items() if (b["pi"] | since) >> bit & 1]
        if b["overcurrent"] > a["overcurrent"]:
            reasons.append(f"{b['overcurrent'] - a['overcurrent']} over-current events")
        reasons += sorted(self._alarms)
        reasons += nvml.reasons(a.get("gpu", {}), b.get("gpu", {}))
        counters = {
            name: round(b["telemetry"][name] - a["telemetry"][name], 6)
            for name in a["telemetry"]
            if name in b["telemetry"] and name != "seconds"
        }
        return {"reasons": reasons, "counters": counters}


def _clock_source(name: str) -> str:
    return "cpufreq" if name == "cpu" else "nvml" if re.fullmatch(r"gpu\d+", name) else "devfreq"


def _cpu_clocks(root: Path) -> dict[str, float]:
    """The fastest core's clock now, in MHz: idle ones are slow and say nothing."""
    seen = [
        sysfs.number(f) for f in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq")
    ]
    known = [khz for khz in seen if khz]
    return {"cpu": max(known) / 1000} if known else {}


def _pi(root: Path) -> int | None:
    """The Raspberry Pi firmware's throttle bits; None on any other machine."""
    value = sysfs.text(root / "sys/devices/platform/soc/soc:firmware/get_throttled")
    if not value and root == Path("/") and sys.platform == "linux":
        value = sysfs.tool("vcgencmd", "get_throttled").partition("=")[2]
    with suppress(ValueError):
        return int(value, 16)
    return None
