"""The plots of the reports: matplotlib figures as inline SVG that take their ink from the page.

Text stays text, so that a page can be searched, read aloud, and shown dark: lines and letters are drawn in
`currentColor`. Every label may come out of a file: none is read as a formula.
"""

import io
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # replaced by `currentColor`
COLOURS = ("#2f7ed8", "#e8762b", "#2a9d5c", "#a05cc5", "#d1495b", "#1c98a6", "#b08a1e", "#7f7f7f")
GOOD, BAD, MIDDLE = "#2a9d5c", "#d1495b", "#b08a1e"
POINTS = 400  # of a curve: more cannot be seen
BARS = 14
VISIBLE = 0.004  # of the longest bar
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "edgesft",  # equal input, equal file
    "text.parse_math": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.unicode_minus": False,
    "font.size": 10.0,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
}


@contextmanager
def _figure(
    xlabel: str, ylabel: str, size: tuple[float, float] = (6.4, 3.6)
) -> Iterator[tuple["Figure", "Axes"]]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(dict(STYLE)):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_prop_cycle(color=COLOURS)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(visible=True)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        yield figure, axes


def _svg(figure: "Figure", description: str) -> str:
    """The figure as an `<svg>` element. description: what a reader who does not see it is told."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a letter that the font for the layout lacks
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)


def label(text: str, most: int = 40) -> str:
    """A name from a file as a label: one line of at most `most` characters, shown even with a leading `_`."""
    line = "".join(c if c.isprintable() else " " for c in text)
    line = line if len(line) <= most else line[: most // 2 - 1] + "..." + line[2 - most // 2 :]
    return " " + line if line.startswith("_") else line


def _thin(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Sorted values and the share of samples up to each, at most `POINTS` of them, the extremes kept."""
    ordered = sorted(values)
    n = len(ordered)
    wanted = (
        sorted({round(i * (n - 1) / max(POINTS - 1, 1)) for i in range(POINTS)}) if n > POINTS else range(n)
    )
    return [ordered[i] for i in wanted], [(i + 1) / n for i in wanted]


def distribution(samples: Mapping[str, Sequence[float]], quantity: str) -> str | None:
    """Empirical distribution of each run's samples in ms. quantity: `time per output token`..."""
    kept = {n: [v for v in s if math.isfinite(v)] for n, s in samples.items()}
    kept = {n: s for n, s in kept.items() if s}
    if not kept:
        return None
    with _figure(f"{quantity} (ms)", "share at most this slow") as (figure, axes):
        for name, values in kept.items():
            axes.step(*_thin(values), where="post", label=label(name))
        # the slowest half per cent may lie far out and would squeeze the rest
        right = max(sorted(s)[math.ceil(0.995 * (len(s) - 1))] for s in kept.values())
        left = min(min(s) for s in kept.values())
        room = 0.05 * (right - left) or 0.05 * right
        axes.set_xlim(max(0.0, left - room), right + room)
        axes.set_ylim(0, 1.02)
        axes.legend(loc="best")
        middles = ", ".join(f"{n} median {sorted(s)[len(s) // 2]:.3g} ms" for n, s in kept.items())
        return _svg(figure, f"Distribution of the {quantity}: {middles}")


def bars(series: Mapping[str, Mapping[str, float]], xlabel: str, what: str) -> str | None:
    """Horizontal bars, one group an item, one bar a run: run -> item -> value. The largest ones are kept."""
    total: dict[str, float] = {}
    for values in series.values():
        for item, value in values.items():
            total[item] = max(total.get(item, 0.0), value if math.isfinite(value) else 0.0)
    items = sorted(total, key=lambda i: -total[i])[:BARS]
    items = [i for i in items if total[i] >= VISIBLE * total[items[0]]]
    if not items or not total[items[0]]:
        return None
    return _bar_groups(
        series, items, xlabel, f"{what}: " + ", ".join(f"{i} {total[i]:.3g}" for i in items[:5])
    )


def _bar_groups(
    series: Mapping[str, Mapping[str, float]], items: Sequence[str], xlabel: str, description: str
) -> str:
    height = 0.8 / len(series)
    tall = 1.0 + 0.27 * len(items) + 0.1 * len(items) * (len(series) - 1)
    with _figure(xlabel, "", (6.4, tall)) as (figure, axes):
        for k, (name, values) in enumerate(series.items()):
            at = [i - 0.4 + (k + 0.5) * height for i in range(len(items))]
            axes.barh(at, [values.get(i, 0.0) for i in items], height * 0.92, label=label(name))
        axes.set_yticks(range(len(items)), [_wrapped(i) for i in items], fontsize=9)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        if len(series) > 1:
            axes.legend(loc="lower right")
        return _svg(figure, description)


def _wrapped(text: str) -> str:
    """A long name in two lines."""
    short = label(text, 60)
    if len(short) <= 34:
        return short
    at = short.rfind(" ", 0, 36)
    at = at if at > 10 else 34
    return f"{short[:at]}\n{short[at:].strip()}"


def layers(series: Mapping[str, Sequence[tuple[str, float]]]) -> str | None:
    """Time of each layer in order: run -> (layer, ms)."""
    kept = {n: list(rows) for n, rows in series.items() if rows}
    if not kept:
        return None
    names = list(dict.fromkeys(name for rows in kept.values() for name, _ in rows))
    with _figure("layer", "ms a step") as (figure, axes):
        width = 0.8 / len(kept)
        for k, (name, rows) in enumerate(kept.items()):
            at = [names.index(n) - 0.4 + (k + 0.5) * width for n, _ in rows]
            axes.bar(at, [v for _, v in rows], width * 0.92, label=label(name))
        every = max(1, math.ceil(len(names) / 16))
        axes.set_xticks(range(0, len(names), every), [label(n)[:12] for n in names[::every]])
        axes.grid(visible=False, axis="x")
        if len(kept) > 1:
            axes.legend()
        return _svg(figure, f"Time of each of {len(names)} layers in milliseconds a step")


def roofline(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Log-log roofline: measured limits as lines, operators as points sized by share, the step as a star.

    record: `roofline` of a profile; the slope is the bandwidth of reading where it is known, else of a copy.
    rows: operators; those with bytes, flops and ms are drawn.
    """
    copy = record.get("read_gbs") or record.get("copy_gbs")
    peaks = {t: p for t, p in record["gemm_gflops"].items() if p and p > 0}
    if not copy or copy <= 0 or not peaks:
        return None
    placed = [(r, _place(r)) for r in rows]
    points = [(str(r["operator"]), at[0], at[1], float(r.get("share") or 0)) for r, at in placed if at]
    step = record.get("step") or {}
    star = _place({**step, "ms": step.get("measured_ms")})
    intensities = [p[1] for p in points] + ([star[0]] if star else []) + [max(peaks.values()) / copy]
    low, high = min(intensities) / 3, max(intensities) * 5
    with _figure("arithmetic intensity (FLOP / byte)", "GFLOP/s", (6.4, 4.6)) as (figure, axes):
        for k, (dtype, peak) in enumerate(sorted(peaks.items(), key=lambda p: -p[1])):
            xs = sorted({low, min(max(low, peak / copy), high), high})
            style = ("-", "--", ":", "-.")[k % 4]
            axes.plot(xs, [min(copy * x, peak) for x in xs], style, color=INK, alpha=0.7)
            axes.annotate(f"{label(dtype)}: {peak:,.0f}", (high, peak), ha="right", va="bottom", fontsize=8)
        axes.annotate(f"{copy:.3g} GB/s", (low * 1.3, copy * low * 1.3), ha="left", va="top", fontsize=8)
        for k, name in enumerate(list(dict.fromkeys(p[0] for p in points))[: len(COLOURS)]):
            own = [p for p in points if p[0] == name]
            sizes = [20 + 400 * p[3] for p in own]
            axes.scatter(
                [p[1] for p in own], [p[2] for p in own], sizes, COLOURS[k], alpha=0.75, label=label(name)
            )
        if star:
            axes.plot(*star, "*", color=BAD, markersize=14, markeredgecolor=INK, label="whole step")
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):  # the usual labels are formulas
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(lambda value, _: "")
        if points or star:
            figure.legend(loc="outside lower center", ncols=2, markerscale=0.5)
        share = f"; the step reaches {100 * step['achieved']:.0f} %" if step.get("achieved") else ""
        return _svg(figure, f"Roofline: {copy:.3g} GB/s and {max(peaks.values()):,.0f} GFLOP/s{share}")


def _place(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """(FLOP per byte, GFLOP/s) of a row with `bytes`, `flops` and `ms`; None if one is missing."""
    size, flops, ms = row.get("bytes"), row.get("flops"), row.get("ms")
    if not size or not flops or not ms or min(size, flops, ms) <= 0:
        return None
    return flops / size, flops / ms / 1e6


def pairs(verdict: Mapping[str, Any]) -> str | None:
    """Ratio of every pair of a gate, with the estimate, its interval, tolerance and margin.

    A pair far away from the others is drawn at the edge with its value, so that it does not squeeze the rest.
    """
    metric, series = pair_ratios(verdict)
    if not series:
        return None
    entry = _entry(verdict, metric)
    margins = verdict.get("margins") or {}
    margin = entry.get("margin", margins.get("regression"))
    lines = (("tolerance", margins.get("tolerance"), MIDDLE), ("margin", margin, BAD))
    known = [(title, 1 + level, colour) for title, level, colour in lines if level is not None]
    bottom, top = _window(series, [1.0, *(level for _, level, _ in known)])
    with _figure("pair", f"{label(metric or 'time')}, head / base") as (figure, axes):
        axes.axhline(1, color=INK, linewidth=0.8)
        for title, level, colour in known:
            axes.axhline(level, color=colour, linestyle="--", linewidth=1.2)
            axes.annotate(title, (1, level), xycoords=("axes fraction", "data"), fontsize=8, color=colour,
                          ha="right", va="bottom")  # fmt: skip
        if entry.get("ratio") is not None:
            axes.axhline(entry["ratio"], color=COLOURS[0], linewidth=1.4, label="estimate")
            low, high = entry.get("interval") or (None, None)
            if low is not None or high is not None:
                ends = (bottom if low is None else low, top if high is None else high)
                axes.axhspan(*ends, color=COLOURS[0], alpha=0.13, linewidth=0, label="interval")
        for k, (clock, found) in enumerate(series.items()):
            colour, mark = COLOURS[(0, 1, 2, 3)[k % 4]], "os^D"[k % 4]
            for counted, suffix, fill in ((True, "", "full"), (False, ", discarded", "none")):
                own = [(n, r) for n, r, ok in found if ok is counted]
                if own:
                    at = [min(max(r, bottom), top) for _, r in own]
                    axes.plot([n for n, _ in own], at, mark, color=colour, fillstyle=fill, clip_on=False,
                              label=f"{label(clock)} time{suffix}")  # fmt: skip
                for n, r in own:
                    if not bottom <= r <= top:
                        edge = top if r > top else bottom
                        axes.annotate(f"{r:.2f}", (n, edge), (6, 0), textcoords="offset points", fontsize=8,
                                      color=colour, va="top" if r > top else "bottom")  # fmt: skip
        axes.set_ylim(bottom, top)
        figure.legend(loc="outside lower center", ncols=3)
        count = sum(ok for *_, ok in next(iter(series.values())))
        return _svg(figure, f"Ratio of head to base in {count} pairs, estimate {entry.get('ratio')}")


def _entry(verdict: Mapping[str, Any], metric: str | None) -> Mapping[str, Any]:
    """The metric's line of the report by the clock that decided, else by its first."""
    own = [e for e in verdict.get("metrics") or [] if e.get("metric") == metric]
    return next((e for e in own if e.get("clock") == verdict.get("decided_by")), own[0] if own else {})


def _window(
    series: Mapping[str, Sequence[tuple[int, float, bool]]], levels: Sequence[float]
) -> tuple[float, float]:
    """Range of ratios to show: the levels, and the pairs within 8 median deviations of their median."""
    values = sorted(r for found in series.values() for _, r, _ in found)
    middle = values[len(values) // 2]
    reach = max(8 * sorted(abs(v - middle) for v in values)[len(values) // 2], 0.01)
    shown = [*levels, *(v for v in values if abs(v - middle) <= reach)]
    room = 0.08 * (max(shown) - min(shown))
    return min(shown) - room, max(shown) + room


def pair_ratios(verdict: Mapping[str, Any]) -> tuple[str | None, dict[str, list[tuple[int, float, bool]]]]:
    """The metric, and clock -> (pair, head / base, whether it counted), from the raw pairs.

    The metric is the one that decided, or the first that was paired where that was a size or a budget.
    """
    metric, found = None, dict[str, list[tuple[int, float, bool]]]()
    for index, pair in enumerate(verdict.get("raw") or []):
        metric, by_clock = _by_clock(verdict, pair.get("ratio"))
        for clock, value in by_clock.items():
            if isinstance(value, int | float) and math.isfinite(value):
                kept = (index, float(value), not pair.get("discarded"))
                found.setdefault(str(clock), []).append(kept)
    return metric, found


def _by_clock(verdict: Mapping[str, Any], table: object) -> tuple[str | None, Mapping[str, Any]]:
    """The metric to draw and its values by clock, out of one pair's `{metric: {clock: x}}`."""
    tables = {str(m): t for m, t in (table if isinstance(table, Mapping) else {}).items()}
    wanted = verdict.get("metric")
    known = [m for m, t in tables.items() if isinstance(t, Mapping)]
    metric = wanted if wanted in known else next(iter(known), None)
    return metric, tables[metric] if metric is not None else {}


def process_levels(verdict: Mapping[str, Any]) -> dict[str, list[float]]:
    """side -> ms of each counted process, by the clock that decided where it is known."""
    found: dict[str, list[float]] = {}
    for pair in verdict.get("raw") or []:
        for side in ("base", "head"):
            _, by_clock = _by_clock(verdict, (pair.get(side) or {}).get("value"))
            level = by_clock.get(str(verdict.get("decided_by")), next(iter(by_clock.values()), None))
            if isinstance(level, int | float) and not pair.get("discarded"):
                found.setdefault(side, []).append(level)
    return found


def contexts(series: Mapping[str, Sequence[tuple[int, float, float | None]]], quantity: str) -> str | None:
    """A latency by the length of the prompt: run -> (tokens, median ms, p90 or None)."""
    kept = {n: sorted(rows) for n, rows in series.items() if rows}
    if not kept:
        return None
    with _figure("prompt (tokens)", f"{quantity} (ms)", (6.4, 3.2)) as (figure, axes):
        for k, (name, rows) in enumerate(kept.items()):
            colour = COLOURS[k % len(COLOURS)]
            axes.plot([r[0] for r in rows], [r[1] for r in rows], "o-", color=colour, label=label(name))
            tail = [(r[0], r[2]) for r in rows if r[2] is not None]
            if tail:
                axes.plot(*zip(*tail, strict=True), "--", color=colour, alpha=0.6, label=f"{label(name)} p90")
        ticks = sorted({r[0] for rows in kept.values() for r in rows})
        if len(ticks) > 1 and min(ticks) > 0:
            axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.legend()
        return _svg(figure, f"{quantity} for prompts of {', '.join(map(str, ticks))} tokens")


def trend(record: Mapping[str, Any]) -> str | None:
    """A metric over a series of entries, its change points marked, its levels drawn between them."""
    points = [(i, p) for i, p in enumerate(record["points"]) if p["value"] is not None]
    if not points:
        return None
    with _figure("", f"{label(str(record['metric']))} ({label(str(record['unit']))})") as (figure, axes):
        xs, ys = [i for i, _ in points], [p["value"] for _, p in points]
        axes.plot(xs, ys, "o-", color=COLOURS[0], linewidth=1, markersize=4)
        bounded = [(i, p["low"], p["high"]) for i, p in points if None not in (p.get("low"), p.get("high"))]
        for i, low, high in bounded:
            axes.plot([i, i], [low, high], color=COLOURS[0], alpha=0.5, linewidth=1)
        edges = [0, *sorted(c["index"] for c in record["changes"]), len(record["points"])]
        for start, end in itertools.pairwise(edges):
            own = sorted(y for x, y in zip(xs, ys, strict=True) if start <= x < end)
            if own:
                axes.plot([start, end - 1], [own[len(own) // 2]] * 2, color=INK, linewidth=1.6, alpha=0.6)
        for change in record["changes"]:
            axes.axvline(change["index"] - 0.5, color=BAD, linestyle="--", linewidth=1.2)
            if change.get("ratio"):
                text = f"{100 * (change['ratio'] - 1):+.1f} %"
                axes.annotate(text, (change["index"] - 0.4, 1), xycoords=("data", "axes fraction"),
                              fontsize=8, color=BAD, va="top")  # fmt: skip
        every = max(1, math.ceil(len(record["points"]) / 10))
        names = [label(str(p["name"]))[:18] for p in record["points"]]
        axes.set_xticks(range(0, len(names), every), names[::every], rotation=30, ha="right")
        changes = len(record["changes"])
        return _svg(figure, f"{record['metric']} over {len(points)} entries, {changes} change points")


def losses(steps: Sequence[tuple[int, float]], dev: Sequence[tuple[int, float]]) -> str | None:
    """Loss of each step with its moving mean, and the dev loss."""
    if not steps:
        return None
    with _figure("step", "loss") as (figure, axes):
        axes.plot(*zip(*steps, strict=True), linewidth=0.8, alpha=0.5, label="step")
        width = max(1, len(steps) // 20)
        mean = [sum(loss for _, loss in steps[i : i + width]) / width for i in range(len(steps) - width + 1)]
        axes.plot([s for s, _ in steps[width - 1 :]], mean, linewidth=1.8, label=f"mean of {width}")
        if dev:
            axes.plot(*zip(*dev, strict=True), "o-", label="dev")
        axes.legend()
        return _svg(figure, f"Training loss over {len(steps)} steps, last mean {mean[-1]:.3g}")


def quality(points: Sequence[tuple[str, float, float, float, float]]) -> str | None:
    """Accuracy against latency: (title, ms, accuracy, low, high), shares of one."""
    if not points:
        return None
    with _figure("time per output token, p50 (ms)", "accuracy (%)") as (figure, axes):
        for k, (title, ms, middle, low, high) in enumerate(points):
            bars = [[max(0.0, 100 * (middle - low))], [max(0.0, 100 * (high - middle))]]
            colour = COLOURS[k % len(COLOURS)]
            axes.errorbar(ms, 100 * middle, yerr=bars, fmt="o", capsize=3, color=colour, label=label(title))
        axes.set_xlim(left=0)
        figure.legend(loc="outside right upper")
        told = ", ".join(f"{title} {100 * middle:.1f} % at {ms:.3g} ms" for title, ms, middle, *_ in points)
        return _svg(figure, f"Accuracy against latency: {told}")
