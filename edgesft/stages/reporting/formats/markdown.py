"""Markdown for a comment on a pull request, or a step summary: verdict, one table, the rest folded.

The first line is a hidden marker by which a bot finds its comment and updates it. Every name that comes out
of a file is escaped, so that it cannot link, mention, or break the table.
"""

import re
from collections.abc import Sequence

from edgesft import __version__
from edgesft.stages.reporting import Run, tables
from edgesft.stages.reporting.findings import UNDECIDED, Finding, findings
from edgesft.stages.reporting.tables import Table

FILE = "summary.md"
MARKER = "<!-- edgesft-report -->"
# an underscore within a word means nothing, the rest does; a bare address would become a link
SPECIAL = re.compile(
    r"[\\`*{}\[\]<>#|~@&$!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=[A-Za-z]):(?=//)|(?<=[Ww]{3})\."
)
WORDS = {
    "pass": "PASS",
    "fail": "FAIL",
    "inconclusive": "INCONCLUSIVE",
    **{k: v.upper() for k, v in UNDECIDED.items()},
}


def escape(text: str) -> str:
    """Text that markdown shows as it is, in one line: every character with a meaning as an entity."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return SPECIAL.sub(lambda m: f"&#{ord(m[0])};", line)


def render(runs: Sequence[Run]) -> str:
    """The comment."""
    found = findings(runs)
    verdicts = [r for r in runs if r.kind == "verdict"]
    profiles = [r for r in runs if r.kind == "profile"]
    parts = [MARKER, f"## EdgeSFT: {_headline(runs, found)}"]
    parts += [_sentence(r, found) for r in verdicts]
    rest: list[Table] = []
    if verdicts:
        parts.append(_table(_judged(verdicts)))
        rest = [tables.profiles(profiles)] if profiles else []
    elif profiles:
        parts.append(_table(tables.profiles(profiles)))
    open_ends = [f for f in found if f.outcome in ("error", "fail", "inconclusive") and f.run not in verdicts]
    parts += [f"- {WORDS.get(f.outcome, 'ERROR')}: {escape(f'{f.run.name}: {f.message}')}" for f in open_ends]
    for run in verdicts:
        rest += [_named(t, run) for t in (tables.procedure(run), tables.metrics(run), tables.looks(run))]
    groups = {k: [r for r in runs if r.kind == k] for k in ("calibration", "evaluation")}
    rest += [tables.calibration(groups["calibration"])] if groups["calibration"] else []
    rest += [tables.evaluations(groups["evaluation"])] if groups["evaluation"] else []
    rest += [t for r in runs if r.kind == "prediction" for t in (tables.prediction(r), tables.modes(r))]
    rest += [tables.operators(r) for r in profiles if r.record.get("operators")]
    rest.append(tables.environment(runs))
    parts += [_folded(t) for t in rest if t.rows]
    parts.append(f"<sub>EdgeSFT {escape(__version__)}</sub>")
    return "\n\n".join(parts) + "\n"


def _headline(runs: Sequence[Run], found: Sequence[Finding]) -> str:
    verdicts = [r.record["verdict"] for r in runs if r.kind == "verdict"]
    if not verdicts:
        count = len(runs)
        return f"{count} {'record' if count == 1 else 'records'}"
    if len(verdicts) == 1:
        return WORDS[verdicts[0]]
    return ", ".join(f"{verdicts.count(v)} {WORDS[v]}" for v in WORDS if v in verdicts)


def _sentence(run: Run, found: Sequence[Finding]) -> str:
    """The verdict of one run in a line: its failures if there are any, else the metric that decided."""
    own = [f for f in found if f.run is run]
    chosen = [f for f in own if f.outcome in ("fail", "error")] or [
        f for f in own if f.outcome == "inconclusive"
    ]
    chosen = chosen or [f for f in own if f.name == run.record.get("metric")] or own[:1]
    text = "; ".join(f.message for f in chosen) or "nothing was checked"
    return f"**{WORDS[run.record['verdict']]}** {escape(run.name)}: {escape(text)}"


def _judged(verdicts: Sequence[Run]) -> Table:
    """Metrics and budgets of all gates in one table."""
    rows = []
    for run in verdicts:
        for row in tables.metrics(run, every_clock=False).rows:
            name, base, head, ratio, interval, margin, _, verdict, blocks = row
            shown = verdict if blocks == "yes" or verdict == "PASS" else f"{verdict} (does not block)"
            rows.append([run.name, name, base, head, f"{ratio} {interval}".replace(" -", ""), margin, shown])
        for row in tables.budgets(run).rows:
            name, value, bounds, limit, verdict, reason = row
            shown = verdict if reason == "-" else f"{verdict}: {reason}"
            rows.append(
                [run.name, f"budget {name}", "", f"{value} {bounds}".replace(" -", ""), "", limit, shown]
            )
    columns = ("run", "metric", "base", "head", "head / base", "margin or limit", "verdict")
    if len(verdicts) == 1:
        return Table("", columns[1:], [r[1:] for r in rows])
    return Table("", columns, rows)


def _named(table: Table, run: Run) -> Table:
    return Table(f"{table.title} of {run.name}", table.columns, table.rows, table.note)


def _table(table: Table) -> str:
    lines = [
        "| " + " | ".join(escape(c) or " " for c in table.columns) + " |",
        "|" + "|".join([" :--- ", *[" ---: "] * (len(table.columns) - 1)]) + "|",
        *("| " + " | ".join(escape(c) or " " for c in row) + " |" for row in table.rows),
    ]
    return "\n".join(lines) + (f"\n\n{escape(table.note)}" if table.note else "")


def _folded(table: Table) -> str:
    return f"<details><summary>{escape(table.title)}</summary>\n\n{_table(table)}\n\n</details>"
