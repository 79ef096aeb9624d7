"""The tables of the reports: records in, cells out; what a cell holds is escaped by the format."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgesft.stages.reporting import Run
from edgesft.stages.reporting.findings import Record, deciding, number, span, statistic, tables_of

PERCENTILES = ("p50", "p90", "p95", "p99")
TITLES = {
    "ttft": "time to first token (TTFT)",
    "tpot": "time per output token (TPOT)",
    "itl": "inter-token latency (ITL)",
    "request_tpot": "mean step of a prompt (request TPOT)",
    "latency": "latency of a call",
}
OPERATORS = 24  # rows shown; the record has them all


@dataclass(frozen=True)
class Table:
    """Cells by rows; the first column names the row. note: below the table. left: the cells are words."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    left: bool = False


def percent(value: object, digits: int = 1) -> str:
    """A share as per cent; a dash for what was not measured."""
    return f"{100 * value:.{digits}f} %" if isinstance(value, int | float) and value == value else "-"


def megabytes(value: object) -> str:
    """Bytes in units of 10^6."""
    return f"{value / 1e6:,.1f} MB" if isinstance(value, int | float) and value == value else "-"


def plain(value: object) -> str:
    """Whatever a free field holds, in one line of at most 200 characters."""
    if value is None or value == [] or value == {}:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value) if isinstance(value, float) else str(value)
    if isinstance(value, list) and all(isinstance(v, str | int | float) for v in value):
        text = ", ".join(map(str, value))
    else:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 200 else text[:197] + "..."


def bounded(table: Record | None, p: str) -> str:
    """A percentile with its bounds, or why it is refused."""
    if not table:
        return "-"
    value = table.get(p)
    if value is None:
        return str((table.get("reasons") or {}).get(p, "-"))
    low, high = ((table.get(side) or {}).get(p) for side in ("low", "high"))
    return (
        number(value) if low is None or high is None else f"{number(value)} [{number(low)}, {number(high)}]"
    )


def sides(record: Record, metric: str, entry: Record) -> tuple[str, str]:
    """Both sides of a metric's entry with their unit."""
    if entry.get("head_ms") is not None:
        return f"{number(entry.get('base_ms'))} ms", f"{number(entry['head_ms'])} ms"
    form = megabytes if metric in ("peak_memory", "size") else number
    return form(entry.get("base")), form(entry.get("head"))


def metrics(run: Run, *, every_clock: bool = True) -> Table:
    """The metrics of a gate, one row a metric and clock."""
    record = run.record
    rows = []
    for entry in record["metrics"] if every_clock else deciding(record):
        low, high = entry.get("interval") or (None, None)
        margin = entry.get("margin")
        rows.append(
            [
                " ".join(str(entry[k]) for k in ("metric", "clock") if entry.get(k)),
                *sides(record, entry["metric"], entry),
                "-" if entry["ratio"] is None else f"{entry['ratio']:.3f}",
                "-" if low is None and high is None else span(low, high),
                "-" if margin is None else f"{100 * margin:.3g} %",
                plain(entry.get("pairs")),
                str(entry["verdict"]).replace("_", " ").upper(),
                "yes" if entry["blocking"] else "no",
            ]
        )
    columns = ("metric", "base", "head", "head / base", "interval", "margin", "pairs", "verdict", "blocks")
    note = "An interval errs with a chance of at most (1 - level) / 2 on each side. " if rows else ""
    if record.get("decided_by") and any(e.get("clock") for e in record["metrics"]):
        note += f"The {record['decided_by']} time decided."
    return Table("Metrics", columns, rows, note.strip())


def budgets(run: Run) -> Table:
    """Absolute limits with value and bounds."""
    rows = []
    for b in run.record.get("budgets") or []:
        known = b.get("low") is not None or b.get("high") is not None
        bounds = f"[{number(b.get('low'))}, {number(b.get('high'))}]" if known else "-"
        unit = str(b["unit"])
        rows.append(
            [
                str(b["name"]),
                "-" if b["value"] is None else f"{number(b['value'])} {unit}",
                bounds,
                f"at {'least' if b.get('least') else 'most'} {number(b['limit'])} {unit}",
                str(b["verdict"]).upper(),
                plain(b.get("reason")),
            ]
        )
    return Table("Budgets", ("budget", "value", "bounds", "limit", "verdict", "reason"), rows)


def looks(run: Run) -> Table:
    """The interim analyses of a gate."""
    rows = [
        [
            str(look["n"]),
            plain(look.get("clock")),
            number(look.get("p_regression")),
            number(look.get("p_noninferior")),
            str(look["decision"]),
        ]
        for look in run.record.get("looks") or []
    ]
    columns = ("pairs", "clock", "p, slower", "p, slower by the margin", "decision")
    return Table("Looks", columns, rows, "Exact signed-rank test, one-sided, after each number of pairs.")


def procedure(run: Run) -> Table:
    """How a gate came to its verdict."""
    r = run.record
    used = r.get("calibration")
    base = r["base"]["ref"] if r["base"] else "budgets only"
    margins, errors = r.get("margins") or {}, r.get("errors") or {}
    facts = {
        "base": base,
        "head": r["head"]["ref"],
        "estimator": plain(r.get("estimator")),
        "clock": plain(r.get("clock")),
        "pairs": f"{r['pairs']}, {len(r.get('discarded') or [])} more discarded",
        "noise of a pair": percent(r.get("noise"), 2),
        "smallest slowdown seen": percent(r.get("detectable"), 2),
        "tolerance": percent(margins.get("tolerance")),
        "margin": percent(margins.get("regression")),
        "risk of a false alarm": percent(errors.get("alpha")),
        "risk of a miss": percent(errors.get("beta")),
        "calibration": "none" if not used else f"of {used['made_at']}, until {used['expires_at']}",
        **{f"workload {k}": plain(v) for k, v in (r.get("workload") or {}).items()},
    }
    if r.get("drill_slowdown"):
        facts["drill"] = f"head was slowed by {r['drill_slowdown']:g} % on purpose"
    return Table("Procedure", ("", "value"), [[k, v] for k, v in facts.items()], left=True)


def profiles(runs: Sequence[Run]) -> Table:
    """Profiles side by side, one column a run."""
    rows = []
    for metric in TITLES:
        tables = [dict(tables_of(r.record)).get(metric) for r in runs]
        for p in PERCENTILES:
            if any(t and p in t for t in tables):
                rows.append(
                    [f"{metric.replace('_', ' ').upper()} {p} (ms)", *(bounded(t, p) for t in tables)]
                )
    one_a_run: dict[str, Callable[[Record], str]] = {
        "tokens / s": lambda r: number(r.get("tokens_per_second")),
        "calls / s": lambda r: number(r.get("calls_per_second")),
        "load, cold (ms)": lambda r: number(r["load_ms"]["cold"]),
        "load, warm (ms)": lambda r: number(r["load_ms"]["warm"]),
        "peak memory": lambda r: megabytes(r["peak_memory_bytes"]),
        "artefact": lambda r: megabytes(r["artifact_bytes"]),
        "steady state": lambda r: plain((r.get("warmup") or {}).get("steady")),
        "roofline reached": lambda r: percent(_step(r).get("achieved")),
        "J / token": lambda r: number((r.get("energy") or {}).get("joules_per_token")),
        "watts": lambda r: number((r.get("energy") or {}).get("watts")),
        "held back": lambda r: plain((r.get("throttled") or {}).get("reasons")),
        "quantised": lambda r: plain(r.get("quantize")),
        "pattern": lambda r: plain(r.get("pattern")),
        "bits a weight": lambda r: plain((r.get("layers") or {}).get("bits_per_weight")),
    }
    for title, cell in one_a_run.items():
        cells = [cell(r.record) for r in runs]
        if any(c != "-" for c in cells):
            rows.append([title, *cells])
    spelled = [t for m, t in TITLES.items() if any(m in dict(tables_of(r.record)) for r in runs)]
    note = f"In brackets: 95 % bounds. Measured: {', '.join(spelled)}." if spelled else ""
    return Table("Side by side", ("", *(r.name for r in runs)), rows, note)


def _step(record: Record) -> Record:
    found: Record = (record.get("roofline") or {}).get("step") or {}
    return found


def resumes(runs: Sequence[Run]) -> Table:
    """The first prompt after a pause."""
    rows = []
    for run in runs:
        for each in run.record["load_ms"].get("idle_resume") or []:
            first = each.get("ttft_ms", each.get("call_ms"))
            cells = (first, each.get("first_step_ms"), each.get("ratio"))
            rows.append([run.name, number(each["seconds"]), *map(number, cells)])
    columns = ("run", "pause (s)", "first prompt (ms)", "first step (ms)", "against steady state")
    return Table("After a pause", columns, rows)


def sweep(runs: Sequence[Run], field: str, by: str, title: str) -> Table:
    """A sweep over batch sizes, threads or prompt lengths."""
    rows = []
    for run in runs:
        for point in run.record.get(field) or []:
            first = point.get("ttft_ms", point.get("latency_ms"))
            cells = (_middle(first), _middle(point.get("tpot_ms")), point.get("tokens_per_second"))
            rows.append([run.name, plain(point.get(by)), *map(number, cells)])
    return Table(title, ("run", by.replace("_", " "), "TTFT or call (ms)", "TPOT (ms)", "tokens / s"), rows)


def _middle(value: object) -> object:
    return value.get("p50") if isinstance(value, Mapping) else value


def layers(run: Run) -> Table:
    """What an export with packed layers made of them."""
    found = run.record.get("layers") or {}
    rows = [
        [
            str(row["layer"]),
            plain(row["count"]),
            str(row["kind"]),
            str(row["pattern"]),
            f"int{row['bits']}",
            plain(row["bits_per_weight"]),
            f"{row['weights']:,}",
        ]
        for row in found.get("rows") or []
    ]
    note = (
        "packed: 2:4, stored without its zeros; tiled: dense, in the same tiles; dense: the runtime's own. "
    )
    if rows:
        note += f"{plain(found['bits_per_weight'])} bits a weight in all, scales included."
    columns = ("layers", "number", "became", "pattern", "values", "bits a weight", "weights")
    return Table(f"Layers of {run.name}", columns, rows, note)


def operators(run: Run) -> Table:
    """The costliest operators of a step: of all layers together where their names tell, else one by one."""
    table = run.record["operators"]
    groups = table.get("groups")
    ordered = sorted(groups or table["rows"], key=lambda r: -r["ms"])
    rows = [
        [
            str(r["name"] if groups else r["operator"]),
            plain(r.get("kernel")),
            *([] if groups else [plain(r.get("layer"))]),
            plain(r.get("node_count")),
            number(r["ms"]),
            percent(r["share"]),
            number(r.get("gbs")),
            number(r.get("gflops")),
            percent(r.get("limit_share"), 0),
            plain(r.get("bound")),
        ]
        for r in ordered[:OPERATORS]
    ]
    rates = ("nodes", "ms a step", "share", "GB/s", "GFLOP/s", "of limit", "bound")
    columns = ("operator", "kernel", *([] if groups else ["layer"]), *rates)
    note = f"By {plain(table['source'])}; {table['phase']}, {number(table['total_ms'])} ms a step in all."
    if len(ordered) > OPERATORS:
        rest = sum(r["share"] or 0 for r in ordered[OPERATORS:])
        note += f" {len(ordered) - OPERATORS} more take {percent(rest)}."
    return Table(f"Operators of {run.name}", columns, rows, note)


def roofline(runs: Sequence[Run]) -> Table:
    """Measured limits, and the decode step against them."""
    rows = []
    for run in runs:
        record = run.record.get("roofline")
        if record:
            step = _step(run.record)
            peaks = ", ".join(f"{k} {number(v)}" for k, v in record["gemm_gflops"].items())
            speeds = (number(record["copy_gbs"]), number(record.get("read_gbs")))
            times = (number(step.get("limit_ms")), number(step.get("measured_ms")))
            reached = (percent(step.get("achieved")), plain(step.get("bound")))
            rows.append([run.name, *speeds, peaks or "-", *times, *reached])
    columns = (
        "run",
        "copy GB/s",
        "read GB/s",
        "GEMM GFLOP/s",
        "limit (ms)",
        "measured (ms)",
        "achieved",
        "bound",
    )
    return Table("Roofline of the decode step", columns, rows)


def environment(runs: Sequence[Run]) -> Table:
    """Fingerprints side by side; fields that must agree for a comparison first, then the rest."""
    known = [r for r in runs if isinstance(r.record.get("fingerprint"), Mapping)]
    rows = []
    for part, mark in (("refuse", ""), ("record", " (for information)")):
        tables: list[Mapping[str, Any]] = [r.record["fingerprint"][part] for r in known]
        for name in dict.fromkeys(k for t in tables for k in t):
            cells = [plain(t.get(name)) for t in tables]
            if any(c != "-" for c in cells):
                rows.append([f"{name}{mark}", *cells])
    return Table("Environment", ("", *(r.name for r in known)), rows, left=True)


def calibration(runs: Sequence[Run]) -> Table:
    """What the gate can promise, one column a calibration."""
    lines: dict[str, list[str]] = {}
    for run in runs:
        r = run.record
        facts = {
            "armed": plain(r["armed"]),
            "in words": plain(r["why"]),
            "metric": str(r["metric"]),
            "estimator": statistic(r),
            "margin": f"{r['margin_percent']:g} %",
            "margin that would be met": _points(r.get("margin_met_percent")),
            "false alarms": f"{percent(r['false_alarm']['rate'], 2)}, at most"
            f" {percent(r['false_alarm'].get('high'), 2)}",
            **{f"finds +{k} %": percent(v) for k, v in r["detection"].items()},
            "passes": percent(r.get("pass_rate")),
            "stays open": percent(r.get("inconclusive")),
            "pairs, mean": number(r.get("pairs_mean")),
            "noise of a pair": percent(r["noise"], 2),
            "smallest slowdown seen": _points(r.get("mde_percent")),
            "level": f"{number(r.get('level_ms'))} ms",
            "processes": str(r["processes"]),
            "artefact": str(r["artifact"]["ref"]),
            "made": str(r["made_at"]),
            "expires": str(r["expires_at"]),
        }
        for key, value in facts.items():
            lines.setdefault(key, ["-"] * len(runs))[runs.index(run)] = value
    rows = [[k, *v] for k, v in lines.items() if any(c != "-" for c in v)]
    return Table("Calibration", ("", *(r.name for r in runs)), rows, left=True)


def _points(value: object) -> str:
    return f"{value:.3g} %" if isinstance(value, int | float) else "-"


def candidates(run: Run) -> Table:
    """Every estimator and clock that a calibration tried."""
    rows = []
    for c in run.record.get("candidates") or []:
        alarm = c.get("false_alarm")
        rate = alarm["rate"] if isinstance(alarm, Mapping) else alarm
        found = ", ".join(f"+{k} %: {percent(v)}" for k, v in (c.get("detection") or {}).items())
        cells = [percent(c["noise"], 2), percent(rate, 2), found or "-", number(c.get("pairs_mean"))]
        rows.append([statistic(c), *cells])
    columns = ("statistic", "noise", "false alarms", "finds", "pairs, mean")
    return Table(f"Candidates of {run.name}", columns, rows)


def evaluations(runs: Sequence[Run]) -> Table:
    """How good each model is, with 95 % intervals."""
    rows = []
    for title, form in (("accuracy", percent), ("loss", number), ("perplexity", number)):
        cells = []
        for run in runs:
            value, bounds = run.record.get(title), (run.record.get("intervals") or {}).get(title)
            ends = bounds if isinstance(bounds, list) and len(bounds) == 2 else None
            cells.append(form(value) + (f" [{form(ends[0])}, {form(ends[1])}]" if ends else ""))
        if any(c != "-" for c in cells):
            rows.append([title, *cells])
    for title in ("examples", "data", "split"):
        rows.append([title, *(plain(r.record.get(title)) for r in runs)])
    return Table("Evaluations", ("", *(r.name for r in runs)), rows, "In brackets: 95 % intervals.")


def prediction(run: Run) -> Table:
    """What a device may do, in words, and what that rests on."""
    from edgesft.stages import predict

    lines = predict.facts(run.record)
    rows = [[k, plain(v)] for k, v in lines.items() if k != "assumptions"]
    rows += [["assumption", plain(v)] for v in run.record["assumptions"]]
    return Table(run.name, ("", "value"), rows, "Predicted from data sheets: nothing was run.", left=True)


def modes(run: Run) -> Table:
    """Predicted times of every power mode."""
    from edgesft.stages import predict

    for columns, rows in predict.tables(run.record):
        return Table(f"Power modes of {run.name}", columns, rows)
    return Table("", (), ())


def trend(run: Run) -> Table:
    """The entries of a series; at a change point, the step from one level to the next."""
    changes = {c["index"]: c.get("ratio") for c in run.record["changes"]}
    rows = []
    for index, point in enumerate(run.record["points"]):
        ratio = changes.get(index)
        step = "" if index not in changes else "change" if ratio is None else f"{100 * (ratio - 1):+.1f} %"
        about = (plain(point.get("added_at")), plain(point.get("label")))
        rows.append([str(point["name"]), *about, number(point["value"]), step])
    unit = plain(run.record["unit"])
    return Table(f"Entries of {run.name}", ("entry", "added", "label", f"value ({unit})", "step"), rows)
