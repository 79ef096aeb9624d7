"""Input of github-action-benchmark, tool `customSmallerIsBetter`: a flat list of numbers with units.

Only quantities of which less is better: latencies, load times, memory, size, energy. Of a gate, the head's.
"""

import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from edgesft.stages.reporting import Run
from edgesft.stages.reporting.findings import deciding, number, tables_of

FILE = "benchmark.json"


def render(runs: Sequence[Run]) -> str:
    """The list."""
    readers = {"profile": _profile, "verdict": _verdict}
    found = [entry for run in runs if run.kind in readers for entry in readers[run.kind](run)]
    return json.dumps([e for e in found if math.isfinite(e["value"])], indent=2) + "\n"


def _entry(run: Run, name: str, unit: str, value: float, spread: str = "", extra: str = "") -> dict[str, Any]:
    entry: dict[str, Any] = {"name": f"{run.name}: {name}", "unit": unit, "value": value}
    return entry | ({"range": spread} if spread else {}) | ({"extra": extra} if extra else {})


def _profile(run: Run) -> Iterator[dict[str, Any]]:
    record = run.record
    for metric, table in tables_of(record):
        for p in ("p50", "p90", "p95", "p99"):
            if table.get(p) is None:
                continue
            low, high = ((table.get(side) or {}).get(p) for side in ("low", "high"))
            spread = "" if low is None or high is None else f"{number(low)} to {number(high)}"
            extra = f"{table['samples']} samples" if "samples" in table else ""
            yield _entry(run, f"{metric} {p}", "ms", table[p], spread, extra)
    energy = record.get("energy") or {}
    others = (
        ("load cold", "ms", record["load_ms"]["cold"]),
        ("load warm", "ms", record["load_ms"]["warm"]),
        ("peak memory", "bytes", record["peak_memory_bytes"]),
        ("size", "bytes", record["artifact_bytes"]),
        ("energy", "J/token", energy.get("joules_per_token")),
    )
    for name, unit, value in others:
        if value is not None:
            yield _entry(run, name, unit, value)


def _verdict(run: Run) -> Iterator[dict[str, Any]]:
    for entry in deciding(run.record):
        name = str(entry["metric"])
        value, unit = entry.get("head_ms"), "ms"
        if value is None:
            value, unit = entry.get("head"), "bytes" if name in ("peak_memory", "size") else "units"
        if value is not None:
            ratio = entry["ratio"]
            extra = "" if ratio is None else f"{ratio:.3f} times the base: {entry['verdict']}"
            yield _entry(run, name, unit, value, extra=extra)
    for budget in run.record.get("budgets") or []:
        if budget["value"] is not None and not budget.get("least"):
            low, high = budget.get("low"), budget.get("high")
            spread = "" if low is None or high is None else f"{number(low)} to {number(high)}"
            extra = f"limit {number(budget['limit'])}: {budget['verdict']}"
            yield _entry(run, f"budget {budget['name']}", str(budget["unit"]), budget["value"], spread, extra)
