"""What a device can do at best: operations a clock and unit, bandwidth, power modes.

Rates are stored as operations per clock and unit (streaming multiprocessor or core), not as marketing
TOPS, and multiplied by the clock that is actually held: one table then serves every power mode.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from edgesft.core.errors import UsageError, nearest

FOLDER = Path(__file__).resolve().parent / "catalogue"


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """One device of the catalogue, or this machine.

    units: streaming multiprocessors or cores; ghz: highest clock; both None where they differ from machine to
    machine. memory_gb, bandwidth_gbs: total and peak. ops: dense operations a clock and unit by dtype (a
    multiply-add is two); dtypes ending in `_acc32` accumulate in float32. sparse24: whether 2:4 doubles them.
    modes: power mode -> `watts`, `ghz`, `published`... published: dtype -> [dense, sparse] tera-operations a
    second in the maker's tables, sparse 0 where none. status: what of this is derived or unverified.
    """

    id: str
    name: str
    kind: str
    compute_capability: str = ""
    units: int | None = None
    ghz: float | None = None
    memory_gb: float | None = None
    bandwidth_gbs: float | None = None
    ops: Mapping[str, float] = field(default_factory=dict)
    sparse24: bool = False
    weight_only: tuple[str, ...] = ()
    modes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    published: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    dla_tops: float = 0.0
    tensorrt: str = ""
    match: tuple[str, ...] = ()
    sources: str = ""
    status: str = ""

    def peak(self, dtype: str, *, sparse: bool = False, mode: str | None = None) -> float | None:
        """Tera-operations a second at the clock of `mode` (the highest if None); None where unknown.

        sparse: with 2:4 weights, which double the rate where the device has them.
        """
        ghz = self.ghz if mode is None else self.modes[mode].get("ghz", self.ghz)
        rate = self.ops.get(dtype)
        if rate is None or self.units is None or ghz is None or (sparse and not self.sparse24):
            return None
        return float(self.units * ghz * rate * (2 if sparse else 1) / 1000)


def _read(path: Path) -> DeviceSpec:
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    for name in ("weight_only", "match"):
        values[name] = tuple(values.get(name, ()))
    values["published"] = {k: tuple(v) for k, v in values.get("published", {}).items()}
    return DeviceSpec(id=path.stem, **values)


@cache
def catalogue() -> tuple[DeviceSpec, ...]:
    """Every device that is known, by id."""
    return tuple(_read(path) for path in sorted(FOLDER.glob("*.toml")))


def known(device: str) -> DeviceSpec:
    """The device of the catalogue with this id. Raises UsageError with the nearest one."""
    found = {each.id: each for each in catalogue()}
    if device not in found:
        raise UsageError(f"there is no device `{device}`", nearest(device, found))
    return found[device]
