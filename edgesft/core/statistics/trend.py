"""A series of measurements over time: where its level changed, and the ratio of two of its entries.

Change points are for people who look back: on a shared machine with drift they come too often to judge the
change at hand (see `edgesft.core.statistics.sequential` for that). Arrays in, numbers out; all values are
positive and are compared as logarithms, so that a change is a ratio.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgesft.core.statistics import Array

FEWEST = 6  # points below which nothing is said: two segments of the shortest length
SHORTEST = 3  # points of a segment
WINDOW = 7  # points of the running median against which spikes are cut: at the end, less than three points
SPIKE = 3.0  # standard deviations of the noise
QUIET = 1e-3  # noise, as a fraction, below which a series counts as this noisy: smaller changes are no news


@dataclass(frozen=True)
class Segment:
    """Points `start` to `stop` (exclusive) at one level, the median of their values."""

    start: int
    stop: int
    level: float


@dataclass(frozen=True)
class Trend:
    """Segments of a series in order of time.

    noise: standard deviation from point to point, as a fraction; None for a series too short to say.
    drift: change from the first to the last point in per cent where a straight line explains the series
    better than steps do (then there is one segment); else None.
    """

    segments: tuple[Segment, ...]
    noise: float | None
    drift: float | None

    @property
    def changes(self) -> list[tuple[int, float, float]]:
        """(index of the first point at the new level, level before, level after)."""
        pairs = zip(self.segments, self.segments[1:], strict=False)
        return [(after.start, before.level, after.level) for before, after in pairs]


def noise(logs: npt.ArrayLike) -> float:
    """Standard deviation of the noise of a series of logarithms, from its first differences.

    Steps touch few differences and a drift moves all alike, so that the median absolute deviation of the
    differences sees neither. At least `QUIET`.
    """
    differences = np.diff(np.asarray(logs, dtype=np.float64))
    spread = 1.4826 * np.median(np.abs(differences - np.median(differences)))
    return max(float(spread) / math.sqrt(2), QUIET)


def penalty(n: int) -> float:
    """What a change point costs, in squared standard deviations of the noise.

    Chosen by simulation so that independent normal noise shows a change in 1 to 3 % of the series, for
    n from 6 to 200. Short series pay more, for their noise is badly known.
    """
    return 13.0 + 1000.0 / n**2


def analyse(values: npt.ArrayLike) -> Trend:
    """Segments of a series of positive values, by PELT on logarithms with the squared error as cost.

    Spikes of one or two points are cut to `SPIKE` standard deviations from the running median first, so that
    they are hardly ever a change. Fewer than `FEWEST` points are one segment.
    Source: Killick, Fearnhead & Eckley (2012), "Optimal detection of changepoints with a linear cost", by
    the library ruptures.
    """
    series = np.asarray(values, dtype=np.float64)
    n = len(series)
    if n < FEWEST:
        whole = (Segment(0, n, float(np.median(series))),) if n else ()
        return Trend(whole, None, None)
    import ruptures
    from scipy.ndimage import median_filter

    logs = np.log(series)
    spread = noise(logs)
    middle = median_filter(logs, WINDOW, mode="mirror")
    cut = np.clip(logs, middle - SPIKE * spread, middle + SPIKE * spread)
    price = penalty(n) * spread**2
    search = ruptures.KernelCPD(kernel="linear", min_size=SHORTEST).fit(cut.reshape(-1, 1))
    ends = [int(end) for end in search.predict(pen=price)]
    ends = _supported(logs, ends)
    starts = [0, *ends[:-1]]
    drift = None
    if len(ends) > 1:
        steps = sum(_scatter(cut[a:b]) for a, b in zip(starts, ends, strict=True))
        line = np.polyfit(np.arange(n), cut, 1)
        left = float(np.sum((cut - np.polyval(line, np.arange(n))) ** 2))
        if left + price < steps + price * (len(ends) - 1):
            drift = 100 * math.expm1(float(line[0]) * (n - 1))
            starts, ends = [0], [n]
    found = [Segment(a, b, float(np.median(series[a:b]))) for a, b in zip(starts, ends, strict=True)]
    return Trend(tuple(found), spread, drift)


def _supported(logs: Array, ends: list[int]) -> list[int]:
    """Ends of segments, without the changes that rest on fewer than `SHORTEST` points on either side.

    A point counts for a change if it lies past a quarter of the way from the other level: two spikes and a
    neighbour are no third segment.
    """
    kept = list(ends)
    for end in ends[:-1]:
        place = kept.index(end)
        start = kept[place - 1] if place else 0
        sides = logs[start:end], logs[end : kept[place + 1]]
        levels = [float(np.median(side)) for side in sides]
        for side, own, other in zip(sides, levels, reversed(levels), strict=True):
            if np.count_nonzero((side - other) / (own - other or 1.0) > 0.25) < SHORTEST:
                kept.remove(end)
                break
    return kept


def _scatter(values: Array) -> float:
    return float(np.sum((values - values.mean()) ** 2))


def level_ratio(
    base: Sequence[float], now: Sequence[float], level: float = 0.95
) -> tuple[float, float | None, float | None]:
    """Ratio of the levels of two independent sets of positive numbers, and an interval for it.

    The Hodges-Lehmann estimate, the median of all now / base, between the ratios that the exact rank-sum
    test does not reject; None where there are too few numbers for `level` (4 and 4 will do for 95 %).
    Source: Hollander, Wolfe & Chicken, Nonparametric Statistical Methods, section 4.3.
    Raises ValueError for an empty set.
    """
    if not base or not now:
        raise ValueError("no numbers")
    differences = np.sort(np.subtract.outer(np.log(now), np.log(base)).ravel())
    estimate = math.exp(float(np.median(differences)))
    below = np.cumsum(_rank_sum(len(base), len(now)))
    k = int(np.count_nonzero(below <= (1 - level) / 2))  # differences to leave out on each side
    if k < 1:
        return estimate, None, None
    return estimate, math.exp(float(differences[k - 1])), math.exp(float(differences[-k]))


def _rank_sum(m: int, n: int) -> Array:
    """Exact null distribution of the Mann-Whitney statistic: P(U = u), u = 0 .. m n.

    Its generating function is the Gaussian binomial coefficient, the product of (1 - x^(n + i)) / (1 - x^i)
    for i = 1 .. m; counts stay whole numbers of Python, whatever their size.
    """
    counts = [1] + [0] * (m * n)
    for i in range(1, m + 1):
        for u in range(m * n, n + i - 1, -1):
            counts[u] -= counts[u - n - i]
        for u in range(i, m * n + 1):
            counts[u] += counts[u - i]
    total = math.comb(m + n, m)
    return np.asarray([c / total for c in counts], dtype=np.float64)
