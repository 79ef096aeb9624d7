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
CONFIDENCE = ("published", "derived", "unverified")  # or `measured`, for this machine
UNITS = {"units": "multiprocessors or cores", "ghz": "GHz", "memory_gb": "GB", "bandwidth_gbs": "GB/s"}
UNITS |= {"dla_tops": "sparse INT8 TOPS of the DLA"}
COLUMNS = ("figure", "value", "unit", "confidence", "source")
PLAIN = ("compute_capability", *UNITS, "sparse24", "weight_only", "tensorrt")


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """One device of the catalogue, or this machine.

    units: streaming multiprocessors or cores; ghz: highest clock; both None where they differ from machine to
    machine. memory_gb, bandwidth_gbs: total and peak. ops: dense operations a clock and unit by dtype (a
    multiply-add is two); dtypes ending in `_acc32` accumulate in float32. sparse24: whether 2:4 doubles them.
    modes: power mode -> `watts`, `ghz`, `published`... published: dtype -> [dense, sparse] tera-operations a
    second in the maker's tables, sparse 0 where none. evidence: figure, or its table -> `confidence` and
    `source`. status: remarks.
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
    evidence: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """Every figure of this device by dotted name: `ghz`, `ops.int8`, `published.fp16`, `modes.15w`."""
        found = {name: getattr(self, name) for name in PLAIN}
        for table in ("ops", "published", "modes"):
            found |= {f"{table}.{key}": value for key, value in getattr(self, table).items()}
        return {k: v for k, v in found.items() if v is False or v not in (None, "", (), 0.0)}

    def why(self, figure: str) -> Mapping[str, str] | None:
        """`confidence` and `source` of a figure: its own, or those of the table that it stands in."""
        return self.evidence.get(figure) or self.evidence.get(figure.partition(".")[0])

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


def describe(device: DeviceSpec, measured: Mapping[str, tuple[str, str]] | None = None) -> dict[str, Any]:
    """A device for people and files: peaks, modes, and each figure with its source. JSON values only.

    measured: figure -> (confidence, source), for what this machine said of itself.
    """
    rows = []
    for figure, value in device.figures().items():
        why = device.why(figure) or {}
        confidence, source = (measured or {}).get(
            figure, (why.get("confidence", "unverified"), why.get("source", "unknown"))
        )
        unit = UNITS.get(figure) or {
            "ops": "dense operations a clock and unit",
            "published": "dense and 2:4 sparse tera-operations a second",
        }.get(figure.partition(".")[0])
        rows.append(
            {
                "figure": figure,
                "value": list(value) if isinstance(value, tuple) else value,
                "unit": unit,
                "confidence": confidence,
                "source": source,
            }
        )
    return {
        "id": device.id,
        "name": device.name,
        "kind": device.kind,
        "remarks": device.status or None,
        "sources": device.sources,
        "modes": {mode: dict(values) for mode, values in device.modes.items()},
        "peak_tops": {
            dtype: {"dense": device.peak(dtype), "sparse": device.peak(dtype, sparse=True)}
            for dtype in device.ops
        },
        "figures": rows,
        "columns": list(COLUMNS),
        "rows": [[_plain(row[key]) for key in COLUMNS] for row in rows],
    }


def _plain(value: object) -> str:
    """A figure in a table."""
    if isinstance(value, Mapping):
        named = [f"{value[key]:g} {unit}" for key, unit in (("ghz", "GHz"), ("watts", "W")) if key in value]
        return ", ".join(named) or "-"
    if isinstance(value, list):
        return " / ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
