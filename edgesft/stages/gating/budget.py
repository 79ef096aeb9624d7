"""Absolute budgets: limits on what one artefact may take on this device, each with a confidence bound.

A budget is kept when the upper bound lies within it, broken when the lower bound lies beyond it, and open
otherwise. What repeats is the process: samples of one process share its luck, so a median is bounded over
the medians of processes by order statistics, and a tail by drawing whole processes again.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesft.core import statistics
from edgesft.core.errors import ArtifactError, UsageError, nearest

LATENCIES = ("tpot", "ttft", "itl", "latency")
LEVEL = 0.95
DRAWS = 4000  # of the cluster bootstrap
GRID = 4000  # values between which a quantile is drawn, at most
PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"


@dataclass(frozen=True)
class Budget:
    """One limit. source: what it is measured by; q: the quantile of a latency; least: a minimum."""

    name: str
    limit: float
    unit: str
    source: str
    q: float | None = None
    least: bool = False


def _known() -> dict[str, tuple[str, str, float | None, bool]]:
    """name -> (unit, source, quantile, whether it is a minimum)."""
    found: dict[str, tuple[str, str, float | None, bool]] = {
        f"{m}_p{p}_ms": ("ms", "tpot" if m == "itl" else m, p / 100, False)
        for m in LATENCIES
        for p in (50, 90, 99)
    }
    return found | {
        "load_ms": ("ms", "load", None, False),
        "peak_memory_mb": ("MB", "memory", None, False),
        "size_mb": ("MB", "size", None, False),
        "energy_per_token_mj": ("mJ", "energy", None, False),
        "tokens_per_second": ("tokens/s", "rate", None, True),
    }


KNOWN = _known()


def read(file: Path) -> tuple[dict[str, float], float]:
    """Limits by name, and the confidence level, from the table `[budget]` of a TOML file.

    Raises ArtifactError if it cannot be read, UsageError for broken TOML (with the line) and for names and
    values that are not known.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(f"the budget file `{file}` does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"the budget file `{file}` is not readable: {error}") from None
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"`{file}` is not TOML: {error}") from None  # the error names line and column
    unknown = sorted(document.keys() - {"budget"})
    table = document.get("budget")
    if unknown or not isinstance(table, dict):
        got = f"has `{unknown[0]}`" if unknown else "has no table `[budget]`"
        raise UsageError(f"`{file}` {got}, expected a table `[budget]` and nothing else")
    limits = {k: v for k, v in table.items() if k != "level"}
    if not limits:
        raise UsageError(f"`{file}` has no budget", "known: " + ", ".join(f"`{n}`" for n in KNOWN))
    level = table.get("level", LEVEL)
    parse(limits, str(file))
    check_level(level, str(file))
    return {k: float(v) for k, v in limits.items()}, float(level)


def check_level(level: object, where: str) -> None:
    """Raise UsageError unless a confidence level lies between 0.5 and 1."""
    if isinstance(level, bool) or not isinstance(level, int | float) or not 0.5 <= level < 1:
        raise UsageError(f"`level` of `{where}` is `{level}`, expected a share from 0.5 to below 1")


def parse(limits: Mapping[str, object], where: str) -> list[Budget]:
    """Budgets from limits by name. Raises UsageError with the name, and the nearest known one."""
    found = []
    for name, limit in limits.items():
        if name not in KNOWN:
            raise UsageError(f"`{where}` has a budget on `{name}`, which is not known", nearest(name, KNOWN))
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < float("inf"):
            raise UsageError(f"the budget `{name}` of `{where}` is `{limit}`, expected a number above 0")
        unit, source, q, least = KNOWN[name]
        found.append(Budget(name, float(limit), unit, source, q, least))
    return found


def unmeasurable(budgets: Sequence[Budget], kind: str) -> str | None:
    """Why an artefact of this kind (`decoder`, `encoder`, `graph`) has no such quantity; None if it has."""
    decoder = kind == "decoder"
    for each in budgets:
        if each.source == "latency" and decoder:
            return f"`{each.name}` is of one call of an encoder or a graph; this artefact generates tokens"
        if each.source in ("tpot", "ttft", "rate", "energy") and not decoder:
            return f"`{each.name}` is of generated tokens; this artefact, of kind `{kind}`, generates none"
    return None


def check(
    budget: Budget, processes: Sequence[Mapping[str, Any]], size: float, level: float, looks: int = 1
) -> dict[str, Any]:
    """A budget's line of the report.

    processes: records of processes as the gate keeps them. size: bytes of the artefact. level: confidence of
    the two bounds together, shared by `looks` attempts to decide.
    """
    share = 1 - (1 - level) / looks
    reason: str | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    if budget.source == "size":
        value = low = high = size / 1e6
    elif processes and (budget.q is None or budget.q == 0.5):
        value, low, high = median_bounds([_one(budget, p) for p in processes], share)
        reason = None if low is not None else f"{len(processes)} processes are too few for a bound"
    elif processes and budget.q is not None:
        series = [steady(p, budget.source) for p in processes]
        value, low, high, reason = tail_bounds(series, budget.q, share)
    else:
        reason = "nothing was measured"
    return {
        "name": budget.name,
        "unit": budget.unit,
        "limit": budget.limit,
        "value": value,
        "low": low,
        "high": high,
        "level": level,
        "verdict": _verdict(budget, low, high),
        **({"least": True} if budget.least else {}),
        **({"reason": reason} if reason else {}),
    }


def _verdict(budget: Budget, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return INCONCLUSIVE
    if budget.least:
        return PASS if low >= budget.limit else FAIL if high < budget.limit else INCONCLUSIVE
    return PASS if high <= budget.limit else FAIL if low > budget.limit else INCONCLUSIVE


def steady(process: Mapping[str, Any], source: str) -> list[float]:
    """Wall times in ms of one process after its warm-up."""
    samples: list[float] = process["samples_ms"][source]["wall"]
    return samples[process["cut"][source] :]


def _one(budget: Budget, process: Mapping[str, Any]) -> float:
    """The one number of a process that a budget without a tail is about."""
    match budget.source:
        case "load":
            return float(process["load_ms"])
        case "memory":
            return float(process["peak_bytes"]) / 1e6
        case "rate":
            times = steady(process, "tpot")
            return 1000 * len(times) / sum(times)
        case "energy":
            # Mean power of the whole process: loading is not told apart at one reading a second.
            return float(process["watts"]) * float(np.mean(steady(process, "tpot")))
    return float(np.median(steady(process, budget.source)))


def median_bounds(values: npt.ArrayLike, level: float) -> tuple[float, float | None, float | None]:
    """Median over processes, and order statistics that enclose it at `level`; None where there are too few.

    Distribution-free, see `statistics.quantile_bounds`.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    ranks = statistics.quantile_bounds(len(ordered), 0.5, level)
    middle = float(np.median(ordered))
    if ranks is None:
        return middle, None, None
    return middle, float(ordered[ranks[0] - 1]), float(ordered[ranks[1] - 1])


def tail_bounds(
    series: Sequence[npt.ArrayLike], q: float, level: float
) -> tuple[float | None, float | None, float | None, str | None]:
    """Quantile q of the pooled samples of processes, its bounds at `level`, and why there are none.

    The widest of three: percentiles of a bootstrap that draws whole processes; order statistics of the
    pooled samples, which know that nothing beyond the largest sample was seen; and the quantile of more
    processes like these, see `_further`. With eight processes the first two alone are too low in a fifth of
    the cases. Refused below `statistics.samples_needed`.
    Source: Davison & Hinkley (1997), Bootstrap Methods and their Application, section 3.8.
    """
    arrays = [np.asarray(s, dtype=np.float64) for s in series]
    pooled = np.sort(np.concatenate(arrays))
    needed = statistics.samples_needed(q)
    if len(pooled) < needed:
        return None, None, None, f"p{100 * q:g} needs {needed} samples, has {len(pooled)}"
    ranks = statistics.quantile_bounds(len(pooled), q, level)
    value = float(np.quantile(pooled, q))
    if ranks is None or len(arrays) < 2:
        return value, None, None, f"{len(pooled)} samples of {len(arrays)} processes are too few for a bound"
    side = 100 * (1 - level) / 2
    found = np.percentile([_redrawn(arrays, pooled, q), _further(arrays, q)], [side, 100 - side], axis=1)
    low, high = float(pooled[ranks[0] - 1]), float(pooled[ranks[1] - 1])
    return value, min(low, *found[0].tolist()), max(high, *found[1].tolist()), None


def _further(arrays: Sequence[statistics.Array], q: float) -> statistics.Array:
    """Draws (DRAWS,) of the quantile q over all processes there could be, given the few that were run.

    Logarithms are a normal effect of the process plus the residuals that were seen. Mean and spread of the
    effect are drawn from their fiducial distributions (normal, chi-square), as for a tolerance bound.
    Source: Weerahandi (1993), Generalized confidence intervals.
    """
    from scipy.special import ndtr

    logs = [np.log(a) for a in arrays]
    centres = np.array([np.median(x) for x in logs])
    n = len(centres)
    points = (np.arange(400) + 0.5) / 400
    residuals = np.quantile(np.concatenate([x - c for x, c in zip(logs, centres, strict=True)]), points)
    rng = np.random.default_rng(1)
    spread = max(float(centres.std(ddof=1)), 1e-6)
    spreads = spread * np.sqrt((n - 1) / rng.chisquare(n - 1, DRAWS))
    means = centres.mean() + spreads / np.sqrt(n) * rng.standard_normal(DRAWS)
    # Where residual plus effect has the quantile q depends on the spread alone: bisection on 50 spreads.
    grid = np.geomspace(spreads.min(), spreads.max(), 50)
    low = np.full(len(grid), residuals[0]) - 9 * grid
    high = np.full(len(grid), residuals[-1]) + 9 * grid
    for _ in range(40):
        middle = (low + high) / 2
        share = ndtr((middle[:, None] - residuals[None, :]) / grid[:, None]).mean(axis=1)
        low, high = np.where(share < q, middle, low), np.where(share < q, high, middle)
    found: statistics.Array = np.exp(means + np.interp(spreads, grid, high))
    return found


def _redrawn(arrays: Sequence[statistics.Array], pooled: statistics.Array, q: float) -> statistics.Array:
    """Quantile q of DRAWS samples made of whole processes drawn with replacement, (DRAWS,).

    Found on at most GRID of the sorted samples, the tail taken whole as far as it goes.
    """
    n = len(pooled)
    tail = np.arange(max(0, n - GRID // 2), n)
    rest = np.linspace(0, n - 1, GRID // 2).astype(int)
    grid = pooled[np.unique(np.concatenate([rest, tail]))]
    below = np.stack([np.searchsorted(np.sort(a), grid, side="right") for a in arrays]).astype(np.float64)
    counts = np.array([len(a) for a in arrays], dtype=np.float64)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(arrays), np.full(len(arrays), 1 / len(arrays)), size=DRAWS)
    found = np.empty(DRAWS)
    for start in range(0, DRAWS, 500):
        weights = drawn[start : start + 500].astype(np.float64)
        reached = weights @ below >= q * (weights @ counts)[:, None]
        found[start : start + 500] = grid[reached.argmax(axis=1)]
    return found


def hopeless(entry: Mapping[str, Any], processes: int, most: int) -> bool:
    """Whether `most` processes would still be too few samples for this tail, at the rate of `processes`."""
    words = str(entry.get("reason", "")).split()
    if "needs" not in words or not processes:
        return False
    needed, had = int(words[words.index("needs") + 1]), int(words[-1])
    return had / processes * most < needed
