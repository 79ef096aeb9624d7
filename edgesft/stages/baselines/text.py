"""Baselines in words and in cells: what `edgesft baseline` prints."""

from collections.abc import Mapping
from typing import Any

from edgesft.core import console

LIST_COLUMNS = ("name", "added", "label", "of", "metric", "value", "file")
SHOW_COLUMNS = ("added", "label", "value", "over processes", "change")
DIFF_COLUMNS = ("metric", "baseline", "now", "ratio [95 %]", "verdict")


def list_rows(found: list[dict[str, Any]]) -> list[list[str]]:
    """What `entries` returned as cells in the order of `LIST_COLUMNS`."""
    rows = []
    for each in found:
        value = "BROKEN: " + each["broken"] if each["broken"] else _quantity(each["value"], each["unit"])
        cells = (
            each["name"],
            each["added_at"],
            each["label"],
            each["kind"],
            each["metric"],
            value,
            each["file"],
        )
        rows.append([console.plain(c) for c in cells])
    return rows


def show_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """The trend of `show` as cells in the order of `SHOW_COLUMNS`; a change stands at its first entry."""
    trend = record["trend"]
    changes = {c["index"]: f"{c['percent']:+.1f} %" for c in trend["changes"]}
    return [
        [
            p["added_at"],
            p["label"] or "-",
            _quantity(p["value"], trend["unit"]),
            "-" if p["low"] is None else f"{console.plain(p['low'])} to {console.plain(p['high'])}",
            changes.get(i, ""),
        ]
        for i, p in enumerate(trend["points"])
    ]


def show_line(record: Mapping[str, Any]) -> str:
    """The trend of `show` in one line."""
    trend = record["trend"]
    count = len(trend["points"])
    text = f"{record['name']}: {trend['metric']} over {count} entries"
    if trend["noise"] is None:
        text += ", too few to tell a change from noise"
    elif trend["drift"] is not None:
        text += f" drifts by {trend['drift']:+.1f} % in all"
    else:
        text += f", {len(trend['changes']) or 'no'} change points at a noise of {100 * trend['noise']:.1f} %"
    return text + (f" ({trend['left_out']} left out)" if trend["left_out"] else "")


def diff_rows(record: Mapping[str, Any]) -> list[list[str]]:
    """What `diff` returned as cells in the order of `DIFF_COLUMNS`."""
    rows = []
    for row in record["rows"]:
        bounds = "" if row["low"] is None else f" [{row['low']:.3f}, {row['high']:.3f}]"
        values = [_quantity(row[k], row["unit"]) for k in ("baseline", "now")]
        rows.append([row["metric"], *values, f"{row['ratio']:.3f}{bounds}", row["verdict"]])
    return rows


def _quantity(value: float | None, unit: str | None) -> str:
    if value is None:
        return "-"
    scaled, shown = (value / 1e6, "MB") if unit == "bytes" else (value, unit)
    return f"{scaled:.4g} {shown}"


def line(record: Mapping[str, Any]) -> str:
    """What `diff` has to say beside its table."""
    of = record["baseline"]["label"] or record["baseline"]["file"]
    return (
        f"compared with `{of}`: bounds know the noise between processes, not the drift of a machine between"
        " two days; use `edgesft gate` for a verdict"
    )
