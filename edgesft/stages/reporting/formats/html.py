"""One self-contained HTML page: verdicts, tables and plots of several runs side by side.

Nothing is loaded from elsewhere and nothing runs: plots are inline SVG, and a policy in the page forbids the
rest. It follows the reader's light or dark setting, and prints.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgesft import __version__
from edgesft.stages.reporting import Run, page, plots, tables
from edgesft.stages.reporting.findings import UNDECIDED, Finding, findings
from edgesft.stages.reporting.tables import TITLES, Table

FILE = "report.html"
TEMPLATE = Path(__file__).with_name("html.html")
TONES = {
    "PASS": "pass",
    "FAIL": "fail",
    "INCONCLUSIVE": "inconclusive",
    **{v.upper(): "error" for v in UNDECIDED.values()},
    **{k.replace("_", " ").upper(): "error" for k in UNDECIDED},
}
SHOWN = ("fail", "error", "inconclusive", "note")


@dataclass(frozen=True)
class Plot:
    """One figure. svg: markup that needs no escaping."""

    title: str
    svg: Any
    caption: str


@dataclass
class Section:
    """A part of the page: tables, then plots, then tables to unfold."""

    title: str
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    folded: list[Table] = field(default_factory=list)

    def plot(self, title: str, svg: str | None, caption: str) -> None:
        """Add a figure, if there was anything to draw."""
        from markupsafe import Markup

        if svg is not None:
            self.plots.append(Plot(title, Markup(svg), caption))  # matplotlib escapes the labels

    def add(self, *found: Table, folded: bool = False) -> None:
        """Add tables that have rows."""
        (self.folded if folded else self.tables).extend(t for t in found if t.rows)


def render(runs: Sequence[Run]) -> str:
    """The page."""
    found = findings(runs)
    groups = {kind: [r for r in runs if r.kind == kind] for kind in dict.fromkeys(r.kind for r in runs)}
    sections = [s for s in _sections(groups, runs) if s.tables or s.plots or s.folded]
    return page(
        TEMPLATE,
        title=f"EdgeSFT report: {', '.join(r.name for r in runs[:4])}{' and more' if len(runs) > 4 else ''}",
        version=__version__,
        verdicts=[_headline(r, found) for r in groups.get("verdict", [])],
        findings=[_line(f) for f in found if f.outcome in SHOWN and f.run.kind != "verdict"],
        sections=sections,
        tones=TONES,
    )


def _headline(run: Run, found: Sequence[Finding]) -> dict[str, str]:
    verdict = run.record["verdict"]
    word = UNDECIDED.get(verdict, verdict).upper()
    own = [f for f in found if f.run is run]
    chosen = [f for f in own if f.outcome in ("fail", "error")] or [
        f for f in own if f.outcome == "inconclusive"
    ]
    chosen = chosen or [f for f in own if f.name == run.record.get("metric")] or own[:1]
    text = "; ".join(f.message for f in chosen) or "nothing was checked"
    return {"word": word, "tone": TONES.get(word, "error"), "name": run.name, "text": text}


def _line(finding: Finding) -> dict[str, str]:
    tone = {"fail": "fail", "error": "error", "inconclusive": "inconclusive"}.get(finding.outcome, "soft")
    word = finding.outcome.upper() if finding.outcome != "note" else ""
    return {"word": word, "tone": tone, "text": f"{finding.run.name}: {finding.message}"}


def _sections(groups: Mapping[str, Sequence[Run]], runs: Sequence[Run]) -> Iterator[Section]:
    for run in groups.get("verdict", []):
        yield _gate(run)
    if "profile" in groups:
        yield from _profiles(groups["profile"])
    if "calibration" in groups:
        section = Section("Calibration", [tables.calibration(groups["calibration"])])
        section.add(*(tables.candidates(r) for r in groups["calibration"]), folded=True)
        yield section
    if "evaluation" in groups:
        yield Section("Evaluations", [tables.evaluations(groups["evaluation"])])
    if "prediction" in groups:
        section = Section("Predicted, not measured")
        section.add(*(t for r in groups["prediction"] for t in (tables.prediction(r), tables.modes(r))))
        yield section
    if "trend" in groups:
        section = Section("Trend")
        for run in groups["trend"]:
            section.plot(
                run.name, plots.trend(run.record), "Dashed: change points. Lines: the levels between."
            )
            section.add(tables.trend(run), folded=True)
        yield section
    yield Section("Environment", [t for t in [tables.environment(runs)] if t.rows])


def _gate(run: Run) -> Section:
    section = Section(f"Gate: {run.name}")
    section.add(tables.metrics(run), tables.budgets(run))
    caption = "One mark a pair of processes; the band is the interval of the estimate. Up is slower."
    section.plot("Ratio of every pair", plots.pairs(run.record), caption)
    levels = plots.process_levels(run.record)
    quantity = f"{run.record.get('metric')} of a process"
    caption = "One number a process, by the chosen statistic."
    section.plot("Both sides", plots.distribution(levels, quantity), caption)
    section.add(tables.procedure(run), tables.looks(run), folded=True)
    return section


def _profiles(runs: Sequence[Run]) -> Iterator[Section]:
    section = Section("Profiles", [tables.profiles(runs)])
    for metric in ("tpot", "latency", "ttft"):
        samples = {r.name: (r.record.get("samples") or {}).get(f"{metric}_ms") or [] for r in runs}
        title = f"Distribution of the {TITLES[metric]}"
        caption = "Share of samples that took at most this long, the warm-up left out."
        section.plot(title, plots.distribution(samples, TITLES[metric]), caption)
    for metric in ("ttft", "tpot"):
        series = {r.name: list(_lengths(r.record, f"{metric}_ms")) for r in runs}
        caption = "Median, and p90 where the samples support it."
        section.plot(
            f"{metric.upper()} by length of the prompt", plots.contexts(series, metric.upper()), caption
        )
    section.add(
        tables.resumes(runs),
        tables.sweep(runs, "batches", "batch", "Batch sizes"),
        tables.sweep(runs, "threads_sweep", "threads", "Threads"),
    )
    section.add(tables.sweep(runs, "contexts", "prompt_tokens", "Lengths of the prompt"), folded=True)
    yield section
    yield _inside(runs)


def _lengths(record: Mapping[str, Any], name: str) -> Iterator[tuple[int, float, float | None]]:
    for point in record.get("contexts") or []:
        table = point.get(name) or {}
        if table.get("p50") is not None:
            yield point["prompt_tokens"], table["p50"], table.get("p90")


def _inside(runs: Sequence[Run]) -> Section:
    """Where the time of a step goes."""
    section = Section("Inside a step")
    section.add(tables.roofline(runs), *(tables.layers(r) for r in runs))
    known = [r for r in runs if r.record.get("operators")]
    kinds = {r.name: _by_operator(r.record["operators"]) for r in known}
    section.plot(
        "Time by operator", plots.bars(kinds, "ms a step", "Time by operator"), "All layers together."
    )
    stack = {
        r.name: [(str(x["layer"]), x["ms"]) for x in r.record["operators"].get("layers") or []] for r in known
    }
    section.plot("Time by layer", plots.layers(stack), "What belongs to no layer is left out.")
    for run in runs:
        limits = run.record.get("roofline")
        if limits:
            found = run.record.get("operators") or {}
            rows = found.get("groups") or found.get("rows") or []
            title = f"Roofline of {run.name}" if len(runs) > 1 else "Roofline"
            caption = "Lines: limits measured on this device. Marks: operators, larger for a larger share."
            section.plot(title, plots.roofline(limits, rows), caption)
    section.add(*(tables.operators(r) for r in known), folded=True)
    return section


def _by_operator(table: Mapping[str, Any]) -> dict[str, float]:
    """ms a step of each operator and kernel, from the table by type if there is one."""
    found: dict[str, float] = {}
    for row in table.get("types") or table["rows"]:
        operator, kernel = str(row["operator"]), row.get("kernel")
        # a kernel's name often holds the operator's
        name = operator if not kernel else kernel if operator in kernel else f"{operator} ({kernel})"
        found[name] = found.get(name, 0.0) + row["ms"]
    return found
