"""The report of a run: one self-contained HTML page, plots drawn by matplotlib and embedded as SVG."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgesft import __version__
from edgesft.core import artifact, console
from edgesft.core.artifact import Artifact
from edgesft.stages import reporting
from edgesft.stages.gating.verdict import REPORT
from edgesft.stages.reporting import plots
from edgesft.stages.reporting.findings import span

TEMPLATE = Path(__file__).with_name("report.html")


COLUMNS = (
    "stage",
    "runtime",
    "accuracy [95 %]",
    "loss",
    "size MB",
    "TTFT ms",
    "TPOT p50",
    "TPOT p99",
    "tokens/s",
    "peak MB",
)


def rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """The final table, one list of cells a variant, in the order of `COLUMNS`."""
    table = []
    for row in summary["variants"]:
        accuracy, interval = row["accuracy"], row["accuracy_interval"]
        quality = "-" if accuracy is None else f"{100 * accuracy:.1f} %"
        if interval:
            quality += f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"
        memory = row["peak_memory_bytes"]
        table.append(
            [
                row["stage"],
                row["runtime"],
                quality,
                console.plain(row["loss"]),
                f"{row['bytes'] / 1e6:.0f}",
                console.plain(row["ttft_ms_p50"]),
                console.plain(row["tpot_ms_p50"]),
                console.plain(row["tpot_ms_p99"]),
                console.plain(row["tokens_per_second"]),
                "-" if memory is None else f"{memory / 1e6:.0f}",
            ]
        )
    return table


def verdict_line(summary: Mapping[str, Any]) -> str:
    """The verdict in one line."""
    verdict = summary["verdict"]
    if verdict is None:
        return "; ".join(summary["notes"]) or "no gate in this recipe"
    line = f"gate: {verdict['verdict'].upper()}"
    if verdict.get("ratio"):
        bounds = f" {span(*verdict['interval'])}" if verdict.get("interval") else ""
        line += f", sparse / dense export {verdict['ratio']:.3f}{bounds}"
        line += f" over {verdict['pairs']} pairs"
    return line


def html(summary: Mapping[str, Any], made: Mapping[str, Artifact]) -> str:
    """The page. summary: of the run; made: step name -> artefact, for the curves and the raw samples."""
    drawn = [
        ("Training loss", _loss_curve(made), "Mean of the two perturbed losses (or the loss) of each step."),
        ("Quality against latency", _quality_latency(summary), "Up and to the left is better."),
        ("Latency distribution", _latencies(made), "Time per output token of each exported artefact."),
        (
            "Gate",
            _pairs(made),
            "Sparse against dense export, pair by pair; the band is the interval. Up is slower.",
        ),
    ]
    verdict = summary["verdict"]
    return reporting.page(
        TEMPLATE,
        title=f"{summary['recipe']}: {summary['model']} on {summary['data']}",
        version=__version__,
        columns=COLUMNS,
        rows=rows(summary),
        verdict=verdict,
        interval=span(*verdict["interval"]) if verdict and verdict.get("interval") else "",
        notes=summary["notes"],
        plots=[(name, svg, text) for name, svg, text in drawn if svg],
        seconds=summary["seconds"],
        details=json.dumps(
            {name: dict(a.metrics) for name, a in made.items() if a.manifest}, indent=2, default=str
        ),
    )


def _loss_curve(made: Mapping[str, Artifact]) -> str | None:
    if "tuned-delta" not in made:
        return None
    log = made["tuned-delta"].path / "metrics.jsonl"
    if not log.is_file():
        return None
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    dev = [(r["step"], r["dev_loss"]) for r in records if r.get("dev_loss") is not None]
    return plots.losses(steps, dev)


def _quality_latency(summary: Mapping[str, Any]) -> str | None:
    known = [v for v in summary["variants"] if v["accuracy"] is not None and v["tpot_ms_p50"] is not None]
    points = []
    for v in known:
        low, high = v["accuracy_interval"] or (v["accuracy"], v["accuracy"])
        points.append((f"{v['stage']} ({v['runtime']})", v["tpot_ms_p50"], v["accuracy"], low, high))
    return plots.quality(points)


def _latencies(made: Mapping[str, Artifact]) -> str | None:
    samples = {}
    for name, found in made.items():
        file = found.path / "profile.json"
        if found.kind == "profile" and "export" in name and file.is_file():
            samples[name.removeprefix("profile-")] = step_times(json.loads(file.read_text(encoding="utf-8")))
    return plots.distribution(samples, "time per output token")


def _pairs(made: Mapping[str, Artifact]) -> str | None:
    if "gate" not in made or made["gate"].kind != "verdict":
        return None
    return plots.pairs(artifact.read_json(made["gate"].path / REPORT) or {})


def step_times(profile: Mapping[str, Any]) -> list[float]:
    """Every decode step of a profile in milliseconds, warm-up left out."""
    found: list[float] = profile["samples"].get("tpot_ms") or []
    return found
