"""The NVIDIA driver through pynvml (distribution `nvidia-ml-py`), where both are there.

Only what the driver says; a query that this GPU does not answer is left out.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

# Bits of nvmlDeviceGetCurrentClocksEventReasons that slow a GPU down. Source: nvml.h, clocks event reasons.
EVENTS = {
    0x4: "the power cap",
    0x8: "hardware slowdown",
    0x20: "heat (software limit)",
    0x40: "heat (hardware limit)",
    0x80: "the power brake",
}
VIOLATIONS = {"NVML_PERF_POLICY_POWER": "the power cap", "NVML_PERF_POLICY_THERMAL": "heat"}
SHARE = 0.02  # of the time in violation, from which on it is a reason


def connect() -> tuple["Nvml | None", str | None]:
    """The driver, or None and why not."""
    try:
        pynvml = importlib.import_module("pynvml")
    except ImportError:
        return None, "no NVML: pynvml (`nvidia-ml-py`) is not installed"
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        return None, f"no NVML: {error}"
    return (Nvml(pynvml, count), None) if count else (None, "no NVML: the driver sees no GPU")


class Nvml:
    """Every GPU that the driver sees, named `gpu0`, `gpu1`... Close it when done."""

    def __init__(self, library: Any, count: int) -> None:  # noqa: ANN401 - pynvml has no types
        self._library = library
        self._gpus = {f"gpu{i}": library.nvmlDeviceGetHandleByIndex(i) for i in range(count)}

    def _each(self, ask: Callable[[Any], Any]) -> dict[str, Any]:
        """What `ask` finds for every GPU; those that do not answer are left out."""
        found = {}
        for name, handle in self._gpus.items():
            try:
                found[name] = ask(handle)
            except (self._library.NVMLError, AttributeError):  # an older pynvml lacks newer names
                continue
        return found

    def joules(self) -> dict[str, float]:
        """Energy since the driver was loaded."""
        return self._each(lambda gpu: self._library.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000)

    def clocks(self) -> dict[str, float]:
        """Clock of the multiprocessors, MHz."""
        kind = self._library.NVML_CLOCK_SM
        return self._each(lambda gpu: float(self._library.nvmlDeviceGetClockInfo(gpu, kind)))

    def celsius(self) -> list[float]:
        """Temperatures of the dies."""
        kind = self._library.NVML_TEMPERATURE_GPU
        found = self._each(lambda gpu: float(self._library.nvmlDeviceGetTemperature(gpu, kind)))
        return list(found.values())

    def throttle(self) -> dict[str, dict[str, int]]:
        """For each GPU: `events`, the bits now; nanoseconds in violation of each policy; `at`, when (us)."""
        library = self._library
        ask = getattr(library, "nvmlDeviceGetCurrentClocksEventReasons", None)
        ask = ask or library.nvmlDeviceGetCurrentClocksThrottleReasons
        found: dict[str, dict[str, int]] = {
            name: {"events": int(bits)} for name, bits in self._each(ask).items()
        }
        for policy in VIOLATIONS:
            number = getattr(library, policy)

            def violation(gpu: Any, number: int = number) -> Any:  # noqa: ANN401 - pynvml has no types
                return library.nvmlDeviceGetViolationStatus(gpu, number)

            for name, status in self._each(violation).items():
                row = found.setdefault(name, {})
                row[policy], row["at"] = int(status.violationTime), int(status.referenceTime)
        return found

    def close(self) -> None:
        """Let go of the driver."""
        try:
            self._library.nvmlShutdown()
        except self._library.NVMLError:
            return


def reasons(before: Mapping[str, Mapping[str, int]], after: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Why GPUs were slowed down between two readings of `throttle`."""
    found = []
    for name, now in after.items():
        then = before.get(name, {})
        bits = now.get("events", 0) | then.get("events", 0)
        why = {what for bit, what in EVENTS.items() if bits & bit}
        seconds = (now.get("at", 0) - then.get("at", 0)) / 1e6
        for policy, what in VIOLATIONS.items():
            held = (now.get(policy, 0) - then.get(policy, 0)) / 1e9
            if held > SHARE * max(seconds, 0) and held > 0:
                why.add(what)
        found += [f"{name}: {what}" for what in sorted(why)]
    return found
