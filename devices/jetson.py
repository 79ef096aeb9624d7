"""All that is special about a Jetson: module, release, power modes, clocks, power rails.

Read from files below a root folder, so that the tree of any board can be looked at; tools are asked only on
the machine itself. A release that is not in the table is `unknown`, never missing and never an error.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from edgesft.devices import sysfs

UNKNOWN = "unknown"
# L4T release -> JetPack. A prefix stands for every release that begins with it; the longest wins.
# Source: the release tables of jetson_stats and jetson-containers, which agree on these.
JETPACK = {
    **{"35.1": "5.0.2", "35.2": "5.1", "35.3": "5.1.1", "35.4": "5.1.2", "35.5": "5.1.3", "35.6": "5.1.4"},
    **{"35": "5", "36.2": "6.0 DP", "36.3": "6.0", "36.4.0": "6.1", "36.4.3": "6.2", "36.4.4": "6.2.1"},
    **{"36.4.7": "6.2.1", "36.5": "6.2.2", "38.2": "7.0", "38.4": "7.1", "39.2": "7.2"},
}
# Module part number -> device of the catalogue. Source: NVIDIA's Jetson Linux developer guide.
MODULES = {
    "p3767-0000": "orin-nx-16",
    "p3767-0001": "orin-nx-8",
    "p3767-0003": "orin-nano",
    "p3767-0005": "orin-nano",
    "p3701-0000": "agx-orin-32",  # the first developer kit held 32 GB
    "p3701-0004": "agx-orin-32",
    "p3701-0005": "agx-orin-64",
    "p3834-0008": "agx-thor",
}
TOTAL_RAILS = ("VDD_IN", "POM_5V_IN", "VIN")  # rails that carry the whole module
MONITORS = ("ina3221", "ina3221x", "ina238")
GPU_NAMES = re.compile(r"gpu|ga10b|gv11b|gp10b|gb10b", re.IGNORECASE)


@dataclass(frozen=True)
class Rail:
    """One measured supply. watts: now; alarms: names of the current limits that it is beyond."""

    name: str
    watts: float
    alarms: tuple[str, ...] = ()


class Jetson:
    """A Jetson as its file system shows it. root: `/`, or a folder that holds such a tree."""

    def __init__(self, root: Path = Path("/"), tool: Callable[..., str] | None = None) -> None:
        self._root = root
        self._tool = tool or (sysfs.tool if root == Path("/") else sysfs.no_tool)

    def _text(self, path: str) -> str:
        return sysfs.text(self._root / path)

    @cached_property
    def present(self) -> bool:
        """Whether this is a Jetson at all."""
        compatible = self._text("proc/device-tree/compatible").lower()
        return bool(
            "jetson" in self._model.lower()
            or "nvidia,tegra" in compatible
            or self._text("etc/nv_tegra_release")
        )

    @cached_property
    def _model(self) -> str:
        return self._text("proc/device-tree/model")

    @cached_property
    def board(self) -> str:
        """Marketing name of the board."""
        return self._model or UNKNOWN

    @cached_property
    def sku(self) -> str:
        """Part number of the module, as `p3767-0005`."""
        for name in ("proc/device-tree/compatible", "proc/device-tree/nvidia,dtsfilename"):
            parts: list[str] = re.findall(r"p\d{4}-\d{4}", self._text(name))
            # Of module and carrier board in one name, the module is the one that is known.
            found = next((p for p in parts if p in MODULES), parts[-1] if parts else None)
            if found:
                return found
        return UNKNOWN

    @cached_property
    def device(self) -> str | None:
        """Id in the catalogue: by module where it is known, a Super by its power modes; None if it is not."""
        found = MODULES.get(self.sku)
        if found == "orin-nano" and any("SUPER" in name.upper() for name in self.modes.values()):
            return "orin-nano-super"
        return found

    @cached_property
    def l4t(self) -> str:
        """Release of the board support package, as `36.4.3`."""
        match = re.search(r"R(\d+).*?REVISION:\s*([\d.]+)", self._text("etc/nv_tegra_release"))
        if match:
            return f"{match[1]}.{match[2].rstrip('.')}"
        core = re.search(
            r"^Package: nvidia-l4t-core\n(?:.+\n)*?Version: ([\d.]+)",
            self._text("var/lib/dpkg/status"),
            re.MULTILINE,
        )
        return core[1] if core else UNKNOWN

    @cached_property
    def jetpack(self) -> str:
        """The JetPack that this L4T belongs to; `unknown` for one that the table does not have."""
        fits = [key for key in JETPACK if f"{self.l4t}.".startswith(f"{key}.")]
        return JETPACK[max(fits, key=len)] if fits else UNKNOWN

    @cached_property
    def modes(self) -> dict[int, str]:
        """Power modes that the board offers, number -> name, from nvpmodel's own table."""
        table = self._text("etc/nvpmodel.conf")
        rows = re.findall(r"^\s*<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+?)\s*>", table, re.MULTILINE)
        return {int(number): name for number, name in rows}

    @cached_property
    def power_mode(self) -> str:
        """Name of the mode that is set: from nvpmodel, else from the file where it keeps it."""
        said = self._tool("nvpmodel", "-q")
        match = re.search(r"NV Power Mode:\s*(\S+)", said)
        if match:
            return match[1]
        kept = re.search(r"pmode:(\d+)", self._text("var/lib/nvpmodel/status"))
        return self.modes.get(int(kept[1]), UNKNOWN) if kept else UNKNOWN

    @cached_property
    def locked(self) -> bool | None:
        """Whether the GPU's clock is held at one value (`jetson_clocks`); None where it is not shown."""
        for folder in self._gpu_folders():
            low, high = sysfs.number(folder / "min_freq"), sysfs.number(folder / "max_freq")
            if low is not None and high is not None:
                return low == high
        return None

    @cached_property
    def memory_bytes(self) -> int | None:
        """Memory that processor and GPU share."""
        match = re.search(r"MemTotal:\s*(\d+) kB", self._text("proc/meminfo"))
        return int(match[1]) * 1024 if match else None

    def _gpu_folders(self) -> list[Path]:
        return gpu_folders(self._root)

    def clocks(self) -> dict[str, float]:
        """Clock of the GPU now, in MHz; empty where it is not shown."""
        return gpu_clocks(self._root)

    def rails(self) -> list[Rail]:
        """What the power monitors measure now."""
        return rails(self._root)

    def about(self) -> dict[str, Any]:
        """Everything that does not change from second to second; empty if this is no Jetson."""
        if not self.present:
            return {}
        return {
            "board": self.board,
            "sku": self.sku,
            "device": self.device,
            "l4t": self.l4t,
            "jetpack": self.jetpack,
            "power_mode": self.power_mode,
            "power_modes": list(self.modes.values()),
            "clocks_locked": self.locked,
            "unified_memory": True,
        }


def gpu_folders(root: Path) -> list[Path]:
    """devfreq folders of GPUs below `root`."""
    return sorted(f for f in (root / "sys/class/devfreq").glob("*") if GPU_NAMES.search(f.name))


def gpu_clocks(root: Path) -> dict[str, float]:
    """Clock of every devfreq GPU domain now, in MHz."""
    found = {f.name: sysfs.number(f / "cur_freq") for f in gpu_folders(root)}
    return {name: hertz / 1e6 for name, hertz in found.items() if hertz is not None}


def rails(root: Path) -> list[Rail]:
    """Every supply that an INA3221 or INA238 below `root` measures, unconnected channels left out.

    INA3221: millivolts times milliamperes of a labelled channel; channel 7 is the sum of the shunts.
    """
    found = []
    for folder in sorted((root / "sys/class/hwmon").glob("hwmon*")):
        name = sysfs.text(folder / "name")
        if name not in MONITORS:
            continue
        whole = sysfs.number(folder / "power1_input")
        if whole is not None:
            found.append(Rail(sysfs.text(folder / "power1_label") or "VIN", whole / 1e6, _alarms(folder, 1)))
            continue
        for channel in (1, 2, 3):
            label = sysfs.text(folder / f"in{channel}_label")
            volts, amperes = (sysfs.number(folder / f"{k}{channel}_input") for k in ("in", "curr"))
            if label and not label.startswith("NC") and volts is not None and amperes is not None:
                found.append(Rail(label, volts * amperes / 1e6, _alarms(folder, channel)))
    return found


def _alarms(folder: Path, channel: int) -> tuple[str, ...]:
    return tuple(
        name for name in ("crit", "max") if sysfs.number(folder / f"curr{channel}_{name}_alarm") == 1
    )


def total(measured: list[Rail]) -> tuple[float, list[str]]:
    """Watts of the whole module and the rails that they are the sum of.

    One rail carries everything on some boards; where none does, all rails but those fed by another add up.
    Source: NVIDIA's Jetson Linux developer guide, power monitors: VDDQ_VDD2_1V8AO hangs on VIN_SYS_5V0.
    """
    whole = [r for r in measured if r.name in TOTAL_RAILS]
    names = {r.name for r in measured}
    counted = whole[:1] or [
        r for r in measured if not (r.name == "VDDQ_VDD2_1V8AO" and "VIN_SYS_5V0" in names)
    ]
    return sum(r.watts for r in counted), [r.name for r in counted]
