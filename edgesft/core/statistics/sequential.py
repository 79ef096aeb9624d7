"""The gate's decision: exact signed-rank test on paired log ratios, in a few looks, with an estimate.

Only numpy. Nothing here knows what was measured: arrays of ln(head / base) in, decisions out.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesft.core.statistics import Array

LOOKS = (8, 12, 16, 24, 32, 48)  # pairs after which the gate decides; the exact test can pass from 8 on
LEANING = 0.2  # p at which a measure counts as leaning towards a slowdown beyond the tolerance
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
    """One attempt at a decision. p values of the exact signed-rank test, estimate as log ratio.

    p_regression: of being slower at all; p_beyond: by more than the tolerance; p_noninferior: by less than
    the margin.
    """

    n: int
    p_regression: float
    p_beyond: float
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
    beyond = signed_rank_p(d - math.log1p(rule.tolerance))
    noninferior = signed_rank_p(math.log1p(rule.margin) - d)
    if regression <= rule.alpha_look and shift > math.log1p(rule.tolerance):
        decision = FAIL
    elif noninferior <= rule.beta_look and shift < math.log1p(rule.tolerance):
        decision = PASS
    else:
        decision = INCONCLUSIVE if len(d) >= rule.max_pairs else CONTINUE
    return Look(len(d), regression, beyond, noninferior, shift, decision)


def agree(first: Look, second: Look, rule: Rule) -> str:
    """One decision on two measures of the same pairs, `rule.metrics` being 2.

    Fails if either does. Passes if either does and the other does not lean towards a slowdown beyond the
    tolerance: what one measure cannot see, waiting in processor time, small changes in the wall time of a
    busy machine, the other may.
    """
    if FAIL in (first.decision, second.decision):
        return FAIL
    for one, other in ((first, second), (second, first)):
        if one.decision == PASS and other.p_beyond > LEANING:
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


def signed_rank_ps(differences: npt.ArrayLike) -> Array:
    """`signed_rank_p` of every row of (trials, n)."""
    x = np.ascontiguousarray(differences, dtype=np.float64)
    n = x.shape[1]
    # Bits of a positive float are in the order of its size. The free sign bit makes room for "not positive"
    # at the end, so that one sort of integers ranks sizes and, among equal ones, the positive ones first.
    keys = np.sort((np.abs(x).view(np.uint64) << np.uint64(1)) | (x <= 0).astype(np.uint64), axis=1)
    positive = (keys & np.uint64(1)) == 0
    found: Array = np.asarray(_signed_rank_tail(n))[positive @ np.arange(1, n + 1)]
    return found


def hodges_lehmanns(differences: npt.ArrayLike) -> Array:
    """`hodges_lehmann` of every row of (trials, n)."""
    x = np.asarray(differences, dtype=np.float64)
    i, j = np.triu_indices(x.shape[1])
    rows = max(1, 2_000_000 // len(i))  # 16 MB of Walsh averages at a time
    parts = [np.median((x[k : k + rows, i] + x[k : k + rows, j]) / 2, axis=1) for k in range(0, len(x), rows)]
    return np.concatenate(parts) if parts else np.empty(0)


def _looks_at(d: Array, rule: Rule) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], Array]:
    """Which rows of (trials, n) `look` fails, which it passes, and p_beyond of each."""
    regression = signed_rank_ps(d)
    slower = regression <= rule.alpha_look
    fine = signed_rank_ps(math.log1p(rule.margin) - d) <= rule.beta_look
    # The estimate is the dear part, and only counts where a p value may decide.
    open_to = np.flatnonzero(slower | fine)
    shift = hodges_lehmanns(d[open_to])
    fails, passes = np.zeros(len(d), dtype=bool), np.zeros(len(d), dtype=bool)
    fails[open_to] = slower[open_to] & (shift > math.log1p(rule.tolerance))
    passes[open_to] = fine[open_to] & (shift < math.log1p(rule.tolerance))
    return fails, passes & ~fails, signed_rank_ps(d - math.log1p(rule.tolerance))


def decide(
    first: npt.ArrayLike, rule: Rule, second: npt.ArrayLike | None = None
) -> tuple[npt.NDArray[np.str_], npt.NDArray[np.int64]]:
    """Decisions (pass, fail, inconclusive) of many whole gates at once, and the pairs that each one took.

    first, second: log ratios of the one or two measures, (trials, at least rule.max_pairs). The same as
    `look`, and `agree` for two, at every row and number of pairs in turn, for as long as they say continue.
    """
    measures = [np.asarray(x, dtype=np.float64) for x in (first, second) if x is not None]
    decisions = np.full(len(measures[0]), INCONCLUSIVE)
    pairs = np.full(len(measures[0]), rule.max_pairs, dtype=np.int64)
    left = np.arange(len(measures[0]))
    for n in rule.looks:
        found = [_looks_at(d[left, :n], rule) for d in measures]
        fails = np.any([f for f, _, _ in found], axis=0)
        passes = found[0][1]
        if len(found) == 2:
            (_, one, p_one), (_, other, p_other) = found
            passes = (one & (p_other > LEANING)) | (other & (p_one > LEANING))
        decisions[left[passes]], decisions[left[fails]] = PASS, FAIL
        pairs[left[passes | fails]] = n
        left = left[~(passes | fails)]
    return decisions, pairs


def holm(p_values: Sequence[float], level: float) -> list[bool]:
    """Which hypotheses Holm's step-down procedure rejects, the chance of any false one being `level`.

    Source: Holm (1979), "A simple sequentially rejective multiple test procedure".
    """
    rejected = [False] * len(p_values)
    for left, index in zip(
        range(len(p_values), 0, -1), sorted(range(len(p_values)), key=lambda i: p_values[i]), strict=True
    ):
        if p_values[index] > level / left:
            break
        rejected[index] = True
    return rejected


def last_looks(looks: Sequence[Look], rules: Sequence[Rule]) -> list[Look]:
    """The last look at several metrics of the same pairs: Holm's procedure instead of Bonferroni's.

    looks: one a metric, by the same clock, in the order of `rules`, which share alpha, beta, looks and
    `metrics`. Only here are all of them finished together; before, each keeps to its even share.
    """
    slower = holm([k.p_regression for k in looks], rules[0].alpha_look * len(looks))
    fine = holm([k.p_noninferior for k in looks], rules[0].beta_look * len(looks))
    found = []
    for each, rule, is_slower, is_fine in zip(looks, rules, slower, fine, strict=True):
        limit = math.log1p(rule.tolerance)
        if is_slower and each.hodges_lehmann > limit:
            decision = FAIL
        else:
            decision = PASS if is_fine and each.hodges_lehmann < limit else INCONCLUSIVE
        found.append(replace(each, decision=decision))
    return found
