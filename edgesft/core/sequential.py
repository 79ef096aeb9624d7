"""The gate's decision: exact signed-rank test on paired log ratios, in a few looks, with an estimate.

Only numpy. Nothing here knows what was measured: arrays of ln(head / base) in, decisions out.
"""

import math
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesft.core.statistics import Array

LOOKS = (8, 12, 16, 24, 32, 48)  # pairs after which the gate decides; the exact test can pass from 8 on
PASS, FAIL, CONTINUE, INCONCLUSIVE = "pass", "fail", "continue", "inconclusive"


@cache
def _signed_rank_tail(n: int) -> tuple[float, ...]:
    """P(W+ >= w) under the exact null, w = 0 .. n (n + 1) / 2: the subset sums of 1..n, counted."""
    counts = np.zeros(n * (n + 1) // 2 + 1)
    counts[0] = 1.0
    for k in range(1, n + 1):
        shifted = counts.copy()
        shifted[k:] += counts[:-k]
        counts = shifted
    return tuple(np.cumsum((counts / counts.sum())[::-1])[::-1])


def signed_rank_p(differences: npt.ArrayLike) -> float:
    """Exact one-sided p of Wilcoxon's signed-rank test for "differences tend to be positive".

    Ties are ranked, and zeros counted, against the alternative, so that p is never too small.
    """
    x = np.asarray(differences, dtype=np.float64)
    order = np.lexsort((x <= 0, np.abs(x)))  # among equal sizes the positive ones get the lower ranks
    ranks = np.empty(len(x), dtype=np.int64)
    ranks[order] = np.arange(1, len(x) + 1)
    return _signed_rank_tail(len(x))[int(ranks[x > 0].sum())]


def walsh(differences: npt.ArrayLike) -> Array:
    """The n (n + 1) / 2 averages of all pairs, each element with itself included, in order."""
    x = np.asarray(differences, dtype=np.float64)
    i, j = np.triu_indices(len(x))
    return np.sort((x[i] + x[j]) / 2)


def hodges_lehmann(differences: npt.ArrayLike) -> float:
    """Median of the Walsh averages: the shift that the signed-rank test believes most."""
    return float(np.median(walsh(differences)))


def hodges_lehmann_interval(differences: npt.ArrayLike, side: float) -> tuple[float | None, float | None]:
    """Interval that errs with probability <= `side` on each side; None where n is too small for one.

    The shifts which the exact signed-rank test at `side` does not reject: Walsh averages of rank k and
    n (n + 1) / 2 + 1 - k, with k - 1 the largest w such that P(W+ <= w) <= side.
    """
    averages = walsh(differences)
    tail = np.asarray(_signed_rank_tail(len(np.asarray(differences))))
    # W+ is symmetric: P(W+ <= w) = P(W+ >= total - w)
    k = int(np.count_nonzero(tail[::-1] <= side))
    if k < 1:
        return None, None
    return float(averages[k - 1]), float(averages[len(averages) - k])


@dataclass(frozen=True)
class Rule:
    """What counts as a regression, and the errors that are allowed.

    margin: slowdown whose absence must be shown to pass. tolerance: slowdown that never fails.
    alpha: probability of a false alarm; beta: of passing a slowdown of `margin`. Both are shared evenly by
    the looks (Bonferroni) and by `metrics`. max_pairs: pairs after which it stays inconclusive.
    """

    margin: float = 0.05
    tolerance: float = 0.02
    alpha: float = 0.01
    beta: float = 0.05
    max_pairs: int = LOOKS[-1]
    metrics: int = 1

    @property
    def looks(self) -> tuple[int, ...]:
        """Numbers of pairs after which a decision is tried; the last is `max_pairs`."""
        within = tuple(n for n in LOOKS if n < self.max_pairs)
        return (*within, self.max_pairs)

    @property
    def alpha_look(self) -> float:
        return self.alpha / len(self.looks) / self.metrics

    @property
    def beta_look(self) -> float:
        return self.beta / len(self.looks) / self.metrics


@dataclass(frozen=True)
class Look:
    """One attempt at a decision. p values of the exact signed-rank test, estimate as log ratio."""

    n: int
    p_regression: float
    p_noninferior: float
    hodges_lehmann: float
    decision: str

    def json(self) -> dict[str, Any]:
        return asdict(self)


def look(differences: npt.ArrayLike, rule: Rule) -> Look:
    """Decide on log ratios ln(head / base): fail, pass or continue.

    Fail: slower at alpha_look and by more than the tolerance. Pass: not slower than the margin at beta_look
    and by less than the tolerance.
    """
    d = np.asarray(differences, dtype=np.float64)
    shift = hodges_lehmann(d)
    regression = signed_rank_p(d)
    noninferior = signed_rank_p(math.log1p(rule.margin) - d)
    if regression <= rule.alpha_look and shift > math.log1p(rule.tolerance):
        decision = FAIL
    elif noninferior <= rule.beta_look and shift < math.log1p(rule.tolerance):
        decision = PASS
    else:
        decision = INCONCLUSIVE if len(d) >= rule.max_pairs else CONTINUE
    return Look(len(d), regression, noninferior, shift, decision)


def agree(first: Look, second: Look, rule: Rule) -> str:
    """One decision on two measures of the same pairs, `rule.metrics` being 2.

    Fails if either does. Passes if either does and the other does not lean towards a regression: what one
    measure cannot see, waiting in processor time, small changes in the wall time of a busy machine, the
    other may.
    """
    if FAIL in (first.decision, second.decision):
        return FAIL
    for one, other in ((first, second), (second, first)):
        if one.decision == PASS and other.p_regression > rule.beta:
            return PASS
    return INCONCLUSIVE if first.n >= rule.max_pairs else CONTINUE


def noise(differences: npt.ArrayLike) -> float:
    """Spread of log ratios as a standard deviation: 1.4826 times the median absolute deviation."""
    x = np.asarray(differences, dtype=np.float64)
    return float(1.4826 * np.median(np.abs(x - np.median(x))))


def pairs_predicted(spread: float, margin: float) -> int:
    """Pairs that a gate of `margin` needs at a noise of `spread`, for 1 % false alarms and 95 % detection.

    The factor 1.5 covers the looks and the tolerance.
    """
    return max(LOOKS[0], math.ceil(1.5 * ((2.33 + 1.65) * spread / math.log1p(margin)) ** 2))


def detectable(spread: float, pairs: int) -> float:
    """Smallest slowdown, as a fraction, that `pairs` pairs find in 95 % at a noise of `spread`."""
    return math.expm1((2.33 + 1.65) * spread * math.sqrt(1.5 / pairs))
