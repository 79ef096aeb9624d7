"""What became of the matrices of an export with packed layers: kinds, patterns, bits that a weight takes."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgesft.core import artifact

KINDS = ("packed", "tiled", "dense")
Row = dict[str, Any]


def read(path: Path) -> dict[str, Any] | None:
    """Counts by kind, `bits_per_weight` of all, and `rows`; None for whatever has no packed layers.

    A row stands for all layers that agree but for their number: layer (`layers.*.qkv`), count, kind, pattern,
    bits, bits_per_weight, weights (of all of them), and measured_us by kind where that decided.
    """
    about = artifact.read_json(path / "export.json") if path.is_dir() else None
    found = (about or {}).get("packed") or []
    if not found:
        return None
    groups: dict[tuple[Any, ...], Row] = {}
    for each in found:
        name, times = re.sub(r"\d+", "*", str(each["layer"])), each.get("measured_us") or {}
        said = {key: each[key] for key in ("kind", "pattern", "bits", "bits_per_weight")}
        row = groups.setdefault(
            (name, *said.values(), *times.items()),
            {"layer": name, "count": 0, **said, "weights": 0, **({"measured_us": times} if times else {})},
        )
        row["count"] += 1
        row["weights"] += each["rows"] * each["columns"]
    rows = list(groups.values())
    weights = sum(row["weights"] for row in rows)
    return {
        **{kind: sum(row["count"] for row in rows if row["kind"] == kind) for kind in KINDS},
        "bits_per_weight": round(sum(r["bits_per_weight"] * r["weights"] for r in rows) / weights, 3),
        "rows": rows,
    }


def line(found: Mapping[str, Any]) -> str:
    """`120 packed, 1 tiled, 0 dense: 4.95 bits a weight`."""
    counts = ", ".join(f"{found[kind]} {kind}" for kind in KINDS)
    return f"{counts}: {found['bits_per_weight']:.3g} bits a weight"


def describe(row: Mapping[str, Any]) -> str:
    """`30 packed, 2:4 int4, 3.5 bits a weight`, and how long each kind took where that was measured."""
    text = f"{row['count']} {row['kind']}, {row['pattern']} int{row['bits']}, "
    text += f"{row['bits_per_weight']:g} bits a weight"
    times = row.get("measured_us")
    return text + (f" ({', '.join(f'{kind} {us:g} us' for kind, us in times.items())})" if times else "")
