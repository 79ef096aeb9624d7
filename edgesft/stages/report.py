"""The report of a run: one self-contained HTML page, plots drawn by matplotlib and embedded as SVG."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesft import __version__
from edgesft.core import console
from edgesft.core.artifact import Artifact

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
        low, high = verdict["interval"]
        line += f", sparse / dense export {verdict['ratio']:.3f} [{low:.3f}, {high:.3f}]"
        line += f" over {verdict['pairs']} pairs"
    return line


def html(summary: Mapping[str, Any], made: Mapping[str, Artifact]) -> str:
    """The page. summary: of the run; made: step name -> artefact, for the curves and the raw samples."""
    from jinja2 import Environment, StrictUndefined

    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    plots = [
        ("Training loss", _loss_curve(made), "Mean of the two perturbed losses (or the loss) of each step."),
        ("Quality against latency", _quality_latency(summary), "Up and to the left is better."),
        ("Latency distribution", _latencies(made), "Time per output token of each exported artefact."),
    ]
    return template.render(
        title=f"{summary['recipe']}: {summary['model']} on {summary['data']}",
        version=__version__,
        columns=COLUMNS,
        rows=rows(summary),
        verdict=summary["verdict"],
        notes=summary["notes"],
        plots=[(name, svg, text) for name, svg, text in plots if svg],
        seconds=summary["seconds"],
        details=json.dumps(
            {name: dict(a.metrics) for name, a in made.items() if a.manifest}, indent=2, default=str
        ),
    )


def _svg(figure: "Figure") -> str:
    from matplotlib import pyplot

    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _axes(xlabel: str, ylabel: str) -> tuple["Figure", Any]:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _loss_curve(made: Mapping[str, Artifact]) -> str | None:
    if "tuned-delta" not in made:
        return None
    log = made["tuned-delta"].path / "metrics.jsonl"
    if not log.is_file():
        return None
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    dev = [(r["step"], r["dev_loss"]) for r in records if r.get("dev_loss") is not None]
    if not steps:
        return None
    figure, axes = _axes("step", "loss")
    axes.plot(*zip(*steps, strict=True), linewidth=0.8, alpha=0.5, label="step")
    width = max(1, len(steps) // 20)
    mean = [sum(loss for _, loss in steps[i : i + width]) / width for i in range(len(steps) - width + 1)]
    axes.plot([s for s, _ in steps[width - 1 :]], mean, linewidth=1.8, label=f"mean of {width}")
    if dev:
        axes.plot(*zip(*dev, strict=True), "o-", label="dev")
    axes.legend(frameon=False)
    return _svg(figure)


def _quality_latency(summary: Mapping[str, Any]) -> str | None:
    points = [v for v in summary["variants"] if v["accuracy"] is not None and v["tpot_ms_p50"] is not None]
    if not points:
        return None
    figure, axes = _axes("time per output token, p50 (ms)", "accuracy (%)")
    for index, point in enumerate(points):
        low, high = point["accuracy_interval"] or (point["accuracy"], point["accuracy"])
        center = 100 * point["accuracy"]
        axes.errorbar(
            point["tpot_ms_p50"],
            center,
            yerr=[[max(0.0, center - 100 * low)], [max(0.0, 100 * high - center)]],
            fmt="o",
            capsize=3,
            color=f"C{index}",
            label=f"{point['stage']} ({point['runtime']})",
        )
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    return _svg(figure)


def _latencies(made: Mapping[str, Artifact]) -> str | None:
    samples: dict[str, list[float]] = {}
    for name, found in made.items():
        file = found.path / "profile.json"
        if found.kind == "profile" and "export" in name and file.is_file():
            samples[name.removeprefix("profile-")] = step_times(json.loads(file.read_text(encoding="utf-8")))
    samples = {name: times for name, times in samples.items() if times}
    if not samples:
        return None
    figure, axes = _axes("time per output token (ms)", "share of tokens at most this slow")
    for name, times in samples.items():
        ordered = sorted(times)
        axes.step(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], label=name)
    slowest = max(sorted(t)[int(0.995 * (len(t) - 1))] for t in samples.values())
    axes.set_xlim(0, slowest * 1.1)
    axes.legend(frameon=False)
    return _svg(figure)


def step_times(profile: Mapping[str, Any]) -> list[float]:
    """Every decode step of a profile in milliseconds, warm-up left out."""
    found: list[float] = profile["samples"]["tpot_ms"]
    return found
