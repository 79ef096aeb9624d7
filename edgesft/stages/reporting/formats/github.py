"""Workflow commands of GitHub Actions: an annotation for every finding, printed by the workflow.

fail and no verdict: `::error`; inconclusive: `::warning`; everything else worth knowing: `::notice`. The step
summary, which goes to the file that `GITHUB_STEP_SUMMARY` names, is `summary(runs)`.
"""

from collections.abc import Sequence

from edgesft.stages.reporting import Run
from edgesft.stages.reporting.findings import findings
from edgesft.stages.reporting.formats import markdown

FILE = "github.txt"
COMMANDS = {
    "fail": "error",
    "error": "error",
    "inconclusive": "warning",
    "refused": "notice",
    "note": "notice",
}
SHOWN = 10  # annotations of a kind that GitHub shows for a step; the rest is counted in one line


def render(runs: Sequence[Run]) -> str:
    """One command a line, the worst first."""
    lines: dict[str, list[str]] = {"error": [], "warning": [], "notice": []}
    for finding in findings(runs):
        command = COMMANDS.get(finding.outcome)
        if command:
            title = property_value(f"EdgeSFT {finding.run.name} {finding.name}")
            lines[command].append(f"::{command} title={title}::{message(finding.message)}")
    for run in runs:
        if run.kind == "verdict" and run.record["verdict"] == "pass":
            text = f"{run.name}: the gate passed"
            lines["notice"].insert(0, f"::notice title=EdgeSFT::{message(text)}")
    shown: list[str] = []
    for command, own in lines.items():
        more = len(own) - SHOWN
        shown += own if more <= 0 else own[: SHOWN - 1]
        if more > 0:
            shown.append(f"::{command} title=EdgeSFT::{more + 1} more, see the step summary")
    return "".join(f"{line}\n" for line in shown)


def summary(runs: Sequence[Run]) -> str:
    """Markdown for the step summary."""
    return markdown.render(runs)


def message(text: str) -> str:
    """The text of a command: `%` and the ends of lines would end or change it."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def property_value(text: str) -> str:
    """A property of a command: `:` and `,` would end it."""
    return message(text).replace(":", "%3A").replace(",", "%2C")
