"""Statistics of latencies: percentiles that refuse, warm-up cut, one robust number a process.

Only numpy at import; `scipy.special` where a binomial tail is needed. Nothing here knows what was measured:
arrays in, numbers out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]

REFUSAL = 0.01  # chance, at most, that fewer than two samples lie beyond a percentile that is reported
BATCH = 5  # MSER-5
ESTIMATORS = ("median", "p10", "min")


def binomial_cdf(k: npt.ArrayLike, n: int, p: float) -> Array:
    """P(Binomial(n, p) <= k), elementwise over k; 0 for k < 0."""
    from scipy.special import bdtr

    wanted = np.asarray(k, dtype=np.float64)
    found: Array = np.asarray(bdtr(np.clip(wanted, 0, n), n, p), dtype=np.float64)
    return np.where(wanted < 0, 0.0, found)


@cache
def samples_needed(q: float) -> int:
    """Smallest n at which the quantile q may be reported: P(Binomial(n, tail) <= 1) <= 1 %.

    tail = min(q, 1 - q). 11 for the median, 64 for p90, 662 for p99: below that the percentile rests, more
    often than once in a hundred, on a single sample.
    """
    tail = min(q, 1 - q)
    if not 0 < tail <= 0.5:
        raise ValueError(f"a quantile lies between 0 and 1, got {q}")
    low, high = 1, 2
    while _thin(high, tail):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _thin(middle, tail) else (low, middle)
    return high


def _thin(n: int, tail: float) -> bool:
    return (1 - tail) ** n + n * tail * (1 - tail) ** (n - 1) > REFUSAL


def quantile_bounds(n: int, q: float, level: float = 0.95) -> tuple[int, int] | None:
    """Ranks (1-based) of the order statistics that enclose the quantile q with probability >= `level`.

    Distribution-free: the count of samples below the quantile is Binomial(n, q). None if n is too small.
    Source: David & Nagaraja, Order Statistics, section 7.1.
    """
    side = (1 - level) / 2
    below = binomial_cdf(np.arange(n), n, q)  # P(B <= k), k = 0 .. n - 1
    lower = int(np.searchsorted(below, side, side="right"))  # largest r with P(B <= r - 1) <= side
    enough = np.flatnonzero(1 - below <= side)  # rank s = k + 1 with P(B >= s) <= side
    if lower < 1 or enough.size == 0:
        return None
    return lower, int(enough[0]) + 1


def percentiles(samples: npt.ArrayLike, wanted: Sequence[int] = (50, 90, 99)) -> dict[str, Any]:
    """Percentiles with 95 % bounds, refused where there are too few samples.

    Returns `{"p50": x, ..., "low": {"p50": ...}, "high": {...}, "reasons": {"p99": "needs 662 samples, has
    300"}, "samples": n}`; a refused percentile and its bounds are None. Units are those of `samples`.
    Bounds assume independent samples; latencies of neighbouring tokens are not quite.
    """
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    found: dict[str, Any] = {}
    low: dict[str, float | None] = {}
    high: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    for each in wanted:
        name, q, n = f"p{each}", each / 100, len(ordered)
        found[name] = low[name] = high[name] = None
        if n < samples_needed(q):
            reasons[name] = f"needs {samples_needed(q)} samples, has {n}"
            continue
        found[name] = float(np.quantile(ordered, q))
        ranks = quantile_bounds(n, q)
        if ranks is not None:
            low[name], high[name] = float(ordered[ranks[0] - 1]), float(ordered[ranks[1] - 1])
    return {**found, "low": low, "high": high, "reasons": reasons, "samples": len(ordered)}


def refused(reason: str, wanted: Sequence[int] = (50, 90, 99)) -> dict[str, Any]:
    """The form of `percentiles` when there is nothing to measure at all, for one `reason`."""
    empty: dict[str, Any] = {f"p{p}": None for p in wanted}
    reasons = dict.fromkeys(empty, reason)
    return {**empty, "low": dict(empty), "high": dict(empty), "reasons": reasons, "samples": 0}


@dataclass(frozen=True)
class WarmUp:
    """How many leading samples to drop, and whether a steady state was seen after them."""

    cut: int
    steady: bool


def mser(series: npt.ArrayLike, batch: int = BATCH) -> WarmUp:
    """MSER-5: the truncation that minimises the squared standard error of the remaining mean.

    series: (n,), already logarithms where effects multiply. With means of batches of 5, the cut d minimises
    sum((b - mean)^2) / (m - d)^2 over the first half; an optimum at the last admissible d means that the
    series still changes there: no steady state. Fewer than 4 batches: batches of 1 (plain MSER).
    Source: White, Cobb & Spratt (2000), "A comparison of five steady-state truncation heuristics".
    """
    values = np.asarray(series, dtype=np.float64)
    if len(values) < 4:
        return WarmUp(0, True)
    size = batch if len(values) >= 4 * batch else 1
    m = len(values) // size
    # Batches are laid from the end, so that the odd samples at the start are the first to go.
    means = values[len(values) - m * size :].reshape(m, size).mean(axis=1)
    means = means - means.mean()  # or the squares below cancel
    left = np.arange(m, 0, -1, dtype=np.float64)  # batches kept at each cut
    total = np.cumsum(means[::-1])[::-1]
    square = np.cumsum((means**2)[::-1])[::-1]
    spread = np.maximum(square - total**2 / left, 0.0) / left**2
    limit = m // 2
    best = int(np.argmin(spread[: limit + 1]))
    cut = best * size + (len(values) - m * size if best else 0)
    return WarmUp(cut, best < limit or bool(np.ptp(values) < 1e-12))


def warm_up(repetitions: Sequence[npt.ArrayLike]) -> WarmUp:
    """Warm-up cut of one process that decodes several prompts one after the other.

    repetitions: one array of positive step times a prompt; the same context positions come round again in
    each. A step costs more the longer the context, so the plain series is a saw-tooth in which MSER would
    cut to the phase of a tooth. The growth with the position inside a prompt, fitted on the second half of
    the prompts only (which no cut reaches), is taken off the logarithms first. With fewer than two prompts
    position and time are the same thing, and nothing is taken off: over a few dozen tokens the growth is
    small against any warm-up worth cutting.
    """
    logs = [np.log(np.asarray(r, dtype=np.float64)) for r in repetitions]
    logs = [x for x in logs if x.size]
    if not logs:
        return WarmUp(0, True)
    slope = 0.0
    if len(logs) >= 2:
        late = logs[len(logs) // 2 :]
        slope = _slope(np.concatenate([np.arange(len(x)) for x in late]), np.concatenate(late))
    return mser(np.concatenate([x - slope * np.arange(len(x)) for x in logs]))


def _slope(position: Array | npt.NDArray[np.int64], value: Array) -> float:
    """Robust slope: median of `value` in the last third of positions against the first, over the distance."""
    third = np.quantile(position, [1 / 3, 2 / 3])
    first, last = position <= third[0], position >= third[1]
    distance = float(position[last].mean() - position[first].mean()) if first.any() and last.any() else 0.0
    if distance <= 0:
        return 0.0
    return float((np.median(value[last]) - np.median(value[first])) / distance)


def estimate(samples: npt.ArrayLike, estimator: str) -> float:
    """One robust number for one process: `median`, `p10` or `min` of its samples. Raises ValueError."""
    values = np.asarray(samples, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no samples")
    match estimator:
        case "median":
            return float(np.median(values))
        case "p10":
            return float(np.quantile(values, 0.10))
        case "min":
            return float(values.min())
    raise ValueError(f"`{estimator}` is not one of {', '.join(ESTIMATORS)}")
