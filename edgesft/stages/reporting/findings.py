"""What the records of a report say, check by check: the one reading that every format shares.

A finding never contradicts the verdict that its gate gave: a metric whose own numbers look worse than the
decision, because it does not block or because the other clock decided, is a note.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from edgesft.stages.reporting import Run

Outcome: TypeAlias = Literal["pass", "fail", "inconclusive", "error", "refused", "note"]
Record: TypeAlias = Mapping[str, Any]

# id of the check -> what it is in a few words, and what it means with the next step
CHECKS = {
    "latency": (
        "Latency against the base",
        "The head of a comparison is slower than its base by more than the tolerance, shown by an exact test"
        " on paired processes; or, inconclusive, neither that nor its absence could be shown.",
    ),
    "tail": (
        "Tail latency against the base",
        "A high percentile of the latency of single steps grew. Tails are judged at a margin of their own.",
    ),
    "memory": (
        "Peak memory against the base",
        "The highest resident memory of the measuring process grew by more than is allowed.",
    ),
    "size": ("Size against the base", "The artefact's files take more bytes than is allowed."),
    "budget": (
        "Absolute budget",
        "A quantity is beyond its limit, or its confidence bounds lie on both sides of the limit.",
    ),
    "comparable": (
        "Both sides can be measured and compared",
        "There is no verdict: the sides or the devices differ, nothing could be measured, or the device was"
        " lost. Remove the cause that is named and run the gate again.",
    ),
    "percentile": (
        "Percentile of the latency",
        "A percentile is reported only if the samples support it. The reason names the number that would do.",
    ),
    "steady-state": (
        "Steady state",
        "Latencies still changed after the warm-up cut: medians of such a run depend on its length.",
    ),
    "throttled": (
        "Held back",
        "The machine slowed itself down, or was slowed down, while it was measured.",
    ),
    "profile": ("Remark on a profile", "Something that a reader of the profile ought to know."),
    "calibration": (
        "Calibration of the gate",
        "A gate that is not armed cannot keep its promise on this device at this margin.",
    ),
    "prediction": (
        "Predicted fit",
        "Whether the artefact fits a device, from data sheets: a prediction, not a measurement.",
    ),
}
CHECK_OF = {"peak_memory": "memory", "size": "size"}
UNDECIDED = {
    "not_comparable": "not comparable",
    "nothing_measured": "nothing was measured",
    "device_lost": "the device was lost",
}


@dataclass(frozen=True)
class Finding:
    """One check of one run. check: a key of `CHECKS`; name: unique in its run; value in `unit`.

    refused: a percentile without enough samples. note: to be known, but no reason to stop.
    """

    run: Run
    check: str
    name: str
    outcome: Outcome
    message: str
    value: float | None = None
    unit: str | None = None

    def json(self) -> dict[str, Any]:
        """As a report keeps it."""
        return {
            "run": self.run.name,
            "check": self.check,
            "name": self.name,
            "outcome": self.outcome,
            "message": self.message,
            "value": self.value,
            "unit": self.unit,
        }


def findings(runs: Sequence[Run]) -> list[Finding]:
    """Every check of every run, in the order of the runs."""
    readers = {
        "profile": _profile,
        "verdict": _verdict,
        "calibration": _calibration,
        "prediction": _prediction,
    }
    found = []
    for run in runs:
        if run.kind in readers:
            found += list(readers[run.kind](run))
    return found


def number(value: object) -> str:
    """Four significant digits; a dash for what was not measured."""
    if not isinstance(value, int | float) or value != value:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def span(low: object, high: object) -> str:
    """`[low, high]`, three digits after the point; a question mark for an open end."""
    ends = (f"{x:.3f}" if isinstance(x, int | float) else "?" for x in (low, high))
    return f"[{', '.join(ends)}]"


def statistic(record: Record) -> str:
    """The number of a process that an estimator and a clock give, in words."""
    clock = "wall and cpu" if record["clock"] == "both" else record["clock"]
    return f"{record['estimator']} of the {clock} time"


def deciding(verdict: Record) -> list[Record]:
    """One entry a metric: where two clocks looked at it, the one that decided."""
    chosen: dict[str, Record] = {}
    for entry in verdict["metrics"]:
        kept = chosen.get(entry["metric"])
        if kept is None or entry.get("clock") == verdict.get("decided_by"):
            chosen[entry["metric"]] = entry
    return list(chosen.values())


def _verdict(run: Run) -> Iterator[Finding]:
    record = run.record
    overall = record["verdict"]
    if overall in UNDECIDED:
        text = f"{UNDECIDED[overall]}: {record.get('error') or 'no reason was recorded'}"
        yield Finding(run, "comparable", "gate", "error", text)
    found = [_metric(run, entry) for entry in deciding(record) if entry.get("ratio") is not None]
    found += [_budget(run, budget) for budget in record.get("budgets") or []]
    yield from _in_line(found, record)


def _in_line(found: list[Finding], record: Record) -> list[Finding]:
    """The findings with the gate's decision and its policy for open verdicts applied."""
    overall, policy = record["verdict"], record.get("inconclusive", "report")
    if overall in UNDECIDED:
        return [replace(f, outcome="note") if f.check != "budget" else f for f in found]
    if overall == "pass":
        found = [replace(f, outcome="note") if f.outcome in ("fail", "inconclusive") else f for f in found]
    elif not any(f.outcome == overall for f in found):
        main = next((i for i, f in enumerate(found) if f.name == record.get("metric")), None)
        if main is not None:
            found[main] = replace(found[main], outcome=overall)
    if policy != "report":
        turned: Outcome = "fail" if policy == "fail" else "note"
        found = [replace(f, outcome=turned) if f.outcome == "inconclusive" else f for f in found]
    return found


def _metric(run: Run, entry: Record) -> Finding:
    name = str(entry["metric"])
    check = CHECK_OF.get(name) or ("tail" if name.endswith(("_p95", "_p99")) else "latency")
    text = f"{name} of head is {entry['ratio']:.3f} times that of base"
    if entry.get("interval"):
        text += f" {span(*entry['interval'])}"
    if entry.get("pairs"):
        text += f" over {entry['pairs']} pairs"
    if entry.get("margin") is not None:
        text += f", margin {100 * entry['margin']:.3g} %"
    if entry["verdict"] == "inconclusive" and entry.get("pairs_predicted"):
        text += f"; about {entry['pairs_predicted']} pairs are needed at this noise"
    outcome: Outcome = entry["verdict"] if entry["verdict"] in ("pass", "fail", "inconclusive") else "note"
    if not entry["blocking"] and outcome != "pass":
        outcome, text = "note", text + "; it does not block"
    value, unit = entry.get("head_ms"), "ms"
    if value is None:
        value, unit = entry.get("head"), "bytes" if check in ("memory", "size") else ""
    return Finding(run, check, name, outcome, text, value, unit or None)


def _budget(run: Run, budget: Record) -> Finding:
    name, unit = str(budget["name"]), str(budget["unit"])
    value = budget["value"]
    text = f"{name} was not measured" if value is None else f"{name} is {number(value)} {unit}"
    low, high = budget.get("low"), budget.get("high")
    if low != high:
        text += f" (between {number(low)} and {number(high)})"
    text += (
        f", the budget is at {'least' if budget.get('least') else 'most'} {number(budget['limit'])} {unit}"
    )
    if budget.get("reason"):
        text += f": {budget['reason']}"
    return Finding(run, "budget", f"budget {name}", budget["verdict"], text, budget["value"], unit)


def tables_of(record: Record) -> list[tuple[str, Record]]:
    """(metric, percentiles) of a profile that were measured at all, equal ones once."""
    found: list[tuple[str, Record]] = []
    for name in ("ttft", "tpot", "itl", "request_tpot", "latency"):
        table = record.get(f"{name}_ms")
        if table and table.get("samples", 1) and not (name == "itl" and table == record.get("tpot_ms")):
            found.append((name, table))
    return found


def _profile(run: Run) -> Iterator[Finding]:
    for metric, table in tables_of(run.record):
        reasons = table.get("reasons") or {}
        for p in ("p50", "p90", "p95", "p99"):
            value, name = table.get(p), f"{metric} {p}"
            if value is not None:
                low, high = ((table.get(side) or {}).get(p) for side in ("low", "high"))
                text = f"{name} is {number(value)} ms"
                if low is not None and high is not None:
                    text += f" (between {number(low)} and {number(high)})"
                yield Finding(run, "percentile", name, "pass", text, value, "ms")
            elif p in reasons:
                yield Finding(run, "percentile", name, "refused", f"{name} is not reported: {reasons[p]}")
    if (run.record.get("warmup") or {}).get("steady") is False:
        text = "no steady state: latencies still changed at the end of the warm-up cut"
        yield Finding(run, "steady-state", "steady state", "inconclusive", text)
    why = (run.record.get("throttled") or {}).get("reasons")
    if isinstance(why, list) and why:
        text = "held back while it was measured: " + ", ".join(map(str, why))
        yield Finding(run, "throttled", "throttled", "inconclusive", text)
    for index, note in enumerate(run.record["notes"]):
        if not note.startswith("no steady state"):
            yield Finding(run, "profile", f"note {index + 1}", "note", note)


def _calibration(run: Run) -> Iterator[Finding]:
    record = run.record
    if record["armed"]:
        text = f"armed at a margin of {record['margin_percent']:g} % with the {statistic(record)}"
        yield Finding(run, "calibration", "calibration", "pass", text)
        return
    why = record["why"] or "no reason was recorded"
    text = f"not armed at a margin of {record['margin_percent']:g} %: {why}"
    if record.get("margin_met_percent") is not None:
        text += f"; a margin of {record['margin_met_percent']:g} % would be met"
    yield Finding(run, "calibration", "calibration", "inconclusive", text)


def _prediction(run: Run) -> Iterator[Finding]:
    fit, device = run.record["fit"], run.record["device"]
    outcomes: dict[str, Outcome] = {"fits": "pass", "tight": "inconclusive", "does not fit": "fail"}
    text = f"predicted, not measured: {fit['verdict']} on {device['name']}, context {fit['context']}"
    yield Finding(run, "prediction", "fit", outcomes[fit["verdict"]], text)
