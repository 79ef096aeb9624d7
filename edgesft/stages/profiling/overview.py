"""What a person reads of a profile: the facts that matter first, then its tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from edgesft.core import console
from edgesft.stages import layers
from edgesft.stages.profiling.summary import WANTED

Table = tuple[str, list[str], list[list[str]]]  # title, columns, rows
TOP = 5  # operators


def brief(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Percentiles with the bound above each, rates, memory, loads, limits; one fact a key."""
    found: dict[str, Any] = {}
    for name in ("ttft_ms", "tpot_ms", "latency_ms"):
        table = metrics.get(name)
        if table is None or not table.get("samples"):
            continue
        for p in (f"p{w}" for w in WANTED):
            value, high = table[p], table["high"][p]
            known = value is not None and high is not None
            found[f"{name} {p}"] = f"{value:.3g} (at most {high:.3g})" if known else table["reasons"][p]
    for name in ("tokens_per_second", "calls_per_second"):
        if metrics.get(name) is not None:
            found[name] = metrics[name]
    loads = metrics["load_ms"]
    found |= {"load_ms cold": loads["cold"], "load_ms warm": loads["warm"]}
    for each in loads.get("idle_resume", ()):
        found[f"first prompt after {each['seconds']:g} s idle"] = f"{each['ratio']:.2f} x the steady one"
    found |= {
        "peak memory MB": metrics["peak_memory_bytes"] / 1e6,
        "artefact MB": metrics["artifact_bytes"] / 1e6,
        **({"layers": layers.line(metrics["layers"])} if metrics.get("layers") else {}),
        "threads": metrics["threads"],
        "steady state": metrics["warmup"]["steady"],
    }
    return found | _limits(metrics) | _power(metrics)


def _limits(metrics: Mapping[str, Any]) -> dict[str, Any]:
    roofline = metrics.get("roofline")
    if not roofline or not roofline.get("step") or roofline["step"]["achieved"] is None:
        return {}
    step = roofline["step"]
    bound = f", bound by {step['bound']}" if step["bound"] else ""
    return {"share of the device's limit": f"{100 * step['achieved']:.0f} %{bound}"}


def _power(metrics: Mapping[str, Any]) -> dict[str, Any]:
    energy = metrics.get("energy")
    if not energy:
        return {}
    joules = energy["joules_per_token"]
    found: dict[str, Any] = {"energy": energy.get("reason") or energy["source"]}
    if joules is not None:
        found |= {"joules a token": joules, "watts": energy["watts"]}
    reasons = metrics["throttled"]["reasons"]
    return {**found, "held back": ", ".join(reasons)} if reasons else found


def tables(profile: Mapping[str, Any]) -> list[Table]:
    """Operators, contexts and sweeps, as far as the profile has them; cells are text."""
    found = []
    if profile.get("layers"):
        found.append(_layers(profile["layers"]))
    operators = profile.get("operators")
    if operators:
        found.append(_operators(operators))
    for title, key, column in (
        ("By context", "contexts", "prompt_tokens"),
        ("By batch", "batches", "batch"),
        ("By threads", "threads_sweep", "threads"),
    ):
        if profile.get(key):
            found.append(_sweep(title, column, profile[key]))
    return found


def _layers(found: Mapping[str, Any]) -> Table:
    columns = ["layers", "number", "became", "pattern", "values", "bits a weight", "weights"]
    rows = [
        [
            row["layer"],
            str(row["count"]),
            row["kind"],
            row["pattern"],
            f"int{row['bits']}",
            f"{row['bits_per_weight']:g}",
            f"{row['weights']:,}",
        ]
        for row in found["rows"]
    ]
    return f"Layers, {found['bits_per_weight']:.3g} bits a weight", columns, rows


def _operators(operators: Mapping[str, Any]) -> Table:
    columns = ["operator", "nodes", "ms", "share", "GB/s", "GFLOP/s", "of the limit", "bound"]
    rows = [
        [
            f"{g['name'].removesuffix('/' + g['operator'])} ({g['kernel']})",
            str(g["node_count"]),
            console.plain(float(g["ms"])),
            _percent(g["share"]),
            console.plain(g["gbs"]),
            console.plain(g["gflops"]),
            _percent(g["limit_share"]),
            g["bound"] or "-",
        ]
        for g in operators["groups"][:TOP]
    ]
    what = {"decode": "a decode step", "call": "a call"}[operators["phase"]]
    return f"Operators of {what}, {_percent(operators.get('coverage'))} of its time", columns, rows


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _sweep(title: str, column: str, points: Sequence[Mapping[str, Any]]) -> Table:
    shown = [n for n in ("ttft_ms", "tpot_ms", "latency_ms") if any(p.get(n) for p in points)]
    rated = any(p.get("tokens_per_second") for p in points)
    columns = [column, *(f"{name} p50" for name in shown), *(["tokens/s"] if rated else [])]
    rows = [
        [
            str(p[column]),
            *(console.plain((p.get(name) or {}).get("p50")) for name in shown),
            *([console.plain(p.get("tokens_per_second"))] if rated else []),
        ]
        for p in points
    ]
    return title, columns, rows
