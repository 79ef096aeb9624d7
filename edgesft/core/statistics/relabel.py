"""What a gate would say on this machine, played over and over with processes of one and the same program.

Processes that ran one after the other are put into pairs, a coin says which one is called head, and the rule
decides; ten thousand times. What it then fails is a false alarm, since there is nothing to find. A slowdown
is put in by adding its logarithm to every ratio: it is taken to be seen by both clocks alike, and to be the
same in every process. Only numpy, and `scipy.special` for one bound.
"""

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesft.core.statistics import ESTIMATORS, Array, sequential
from edgesft.core.statistics.sequential import Rule

CLOCKS = ("both", "wall", "cpu")
BLOCK = 8  # pairs that stay together when processes are too few for a whole gate
EFFECTS = (3.0, 5.0, 10.0)  # per cent
MARGINS = range(3, 51)  # per cent
COARSE = 2000  # relabelings are enough to compare candidates that all fail
LARGEST = 100.0  # per cent: a slowdown beyond it is not looked for


@dataclass(frozen=True)
class Candidate:
    """A way to make one number of a process. series: its logarithms in the order of time, one array a clock.

    With `both` these are processor time and wall time, in the order in which the gate takes them.
    """

    estimator: str
    clock: str
    series: tuple[Array, ...]

    @property
    def noise(self) -> float:
        """Spread of the log ratio of neighbours; of two clocks the smaller one, since either may decide."""
        return min(sequential.noise(np.diff(x)) for x in self.series)


def candidates(values: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> list[Candidate]:
    """All that can be made of values[clock option][clock][estimator], a number a process, in order of time.

    The option comes first because it decides on the warm-up cut: with `both` that is one for both clocks. A
    clock by which a process took no time (processor time, where another thread or a GPU works) is left out.
    """
    made = []
    for option in CLOCKS:
        for estimator in ESTIMATORS:
            series = [np.asarray(values[option][c][estimator], dtype=np.float64) for c in values[option]]
            if all((x > 0).all() for x in series):
                made.append(Candidate(estimator, option, tuple(np.log(x) for x in series)))
    return made


@dataclass(frozen=True)
class Labels:
    """Relabelings. first: index of the earlier process of each pair, (trials, pairs); sign: -1 where the
    earlier one is head, else 1."""

    first: npt.NDArray[np.int64]
    sign: npt.NDArray[np.int8]

    def ratios(self, series: Array) -> Array:
        """ln(head / base) of every pair of every trial, (trials, pairs)."""
        return (np.diff(series)[self.first] * self.sign).astype(np.float64, copy=False)

    def some(self, trials: int) -> "Labels":
        return Labels(self.first[:trials], self.sign[:trials])


def relabel(processes: int, pairs: int, trials: int, rng: np.random.Generator) -> Labels:
    """Draw relabelings of `processes` >= 3 processes into gates of `pairs` pairs.

    Only neighbours make a pair, so that drift stays what it is. Pairs follow each other in the order of time,
    from a random start and round to the beginning; once all have been used, blocks of 8 neighbouring pairs
    are drawn with replacement.
    """
    parity = rng.integers(0, 2, trials)[:, None]  # which neighbours belong together: 0 and 1, or 1 and 2
    there = (processes - parity) // 2
    once = np.arange(
        min(processes // 2, pairs)
    )  # with an odd parity there may be a pair less: one comes twice
    order = rng.integers(0, there) + once
    blocks = -(-(pairs - len(once)) // BLOCK)
    starts = rng.integers(0, np.repeat(there, blocks, axis=1))
    more = (starts[..., None] + np.arange(BLOCK)).reshape(trials, -1)[:, : pairs - len(once)]
    first = 2 * (np.concatenate([order, more], axis=1) % there) + parity
    sign = 2 * rng.integers(0, 2, first.shape, dtype=np.int8) - 1
    return Labels(first, sign)


def outcomes(
    candidate: Candidate, labels: Labels, rule: Rule, slowdown: float = 0.0
) -> tuple[npt.NDArray[np.str_], npt.NDArray[np.int64]]:
    """Decision and pairs of every relabeled gate with `slowdown`, a fraction, put into head."""
    rule = dataclasses.replace(rule, metrics=len(candidate.series))
    one, *other = (labels.ratios(x) + math.log1p(slowdown) for x in candidate.series)
    return sequential.decide(one, rule, other[0] if other else None)


def detection(candidate: Candidate, labels: Labels, rule: Rule, slowdown: float) -> float:
    """Share of the gates that fail a `slowdown`, a fraction."""
    decisions, _ = outcomes(candidate, labels, rule, slowdown)
    return float(np.mean(decisions == sequential.FAIL))


def upper_bound(hits: int, trials: int, level: float = 0.95) -> float:
    """Upper confidence bound of a share (Clopper and Pearson 1934), one-sided."""
    from scipy.special import betaincinv

    return 1.0 if hits >= trials else float(betaincinv(hits + 1, trials - hits, level))


def figures(candidate: Candidate, labels: Labels, rule: Rule) -> dict[str, Any]:
    """What a gate by this candidate promises: false alarms, detection by per cent, pairs. JSON values.

    The bound of the false alarms is that of the relabelings: other processes may be noisier.
    """
    margin = f"{100 * rule.margin:g}"
    decisions, pairs = outcomes(candidate, labels, rule)
    alarms = int(np.count_nonzero(decisions == sequential.FAIL))
    found = {f"{e:g}": detection(candidate, labels, rule, e / 100) for e in EFFECTS}
    slow, slow_pairs = outcomes(candidate, labels, rule, rule.margin)
    found[margin] = float(np.mean(slow == sequential.FAIL))
    return {
        "estimator": candidate.estimator,
        "clock": candidate.clock,
        "noise": candidate.noise,
        "false_alarm": {"rate": alarms / len(decisions), "high": upper_bound(alarms, len(decisions))},
        "detection": found,
        "pass_rate": float(np.mean(decisions == sequential.PASS)),
        "inconclusive": float(np.mean(decisions == sequential.INCONCLUSIVE)),
        "pairs_mean": float(pairs.mean()),
        "pairs_mean_slow": float(slow_pairs.mean()),
        "pairs_predicted": sequential.pairs_predicted(candidate.noise, rule.margin),
        "kept": alarms <= rule.alpha * len(decisions) and found[margin] >= 1 - rule.beta,
    }


def mde_percent(candidate: Candidate, labels: Labels, rule: Rule) -> float | None:
    """Smallest slowdown in per cent that is failed in 1 - beta of the gates; None above 100 %.

    With the labels given, a larger slowdown is failed wherever a smaller one is, so that halving finds it.
    """
    low, high = 0.0, LARGEST
    if detection(candidate, labels, rule, high / 100) < 1 - rule.beta:
        return None
    while high - low > 0.05:
        middle = (low + high) / 2
        if detection(candidate, labels, rule, middle / 100) >= 1 - rule.beta:
            high = middle
        else:
            low = middle
    return round(high, 2)


def margin_met(candidate: Candidate, labels: Labels, rule: Rule, below: float = math.inf) -> float | None:
    """Smallest margin in whole per cent, 3 to 50 and above the tolerance, whose promise is kept; or None.

    The rule's own margin counts too, whole or not. A wider margin passes more of what is the same and fails
    more of what is that much slower, so that halving finds it. below: look only for smaller ones.
    """
    own = 100 * rule.margin
    tried = sorted({float(m) for m in MARGINS if m > 100 * rule.tolerance} | {own})
    tried = [m for m in tried if m < below]

    def kept(percent: float) -> bool:
        one = rule if percent == own else dataclasses.replace(rule, margin=percent / 100)
        if detection(candidate, labels, one, one.margin) < 1 - rule.beta:
            return False
        decisions, _ = outcomes(candidate, labels, one)
        return float(np.mean(decisions == sequential.FAIL)) <= rule.alpha

    if not tried or not kept(tried[-1]):
        return None
    return tried[bisect.bisect_left(tried[:-1], True, key=kept)]


def choose(table: Sequence[Mapping[str, Any]]) -> int | None:
    """Index of the best of the `figures` that keep the promise, None if none does.

    Processor time alone, which does not see waiting, only where nothing else will do; then the fewest pairs,
    to the whole pair; then the least noise.
    """

    def rank(index: int) -> tuple[bool, int, float]:
        one = table[index]
        return one["clock"] == "cpu", round(one["pairs_mean"]), one["noise"]

    return min((k for k, one in enumerate(table) if one["kept"]), key=rank, default=None)


def least_bad(found: Sequence[Candidate], labels: Labels, rule: Rule) -> int:
    """Where none keeps the promise: index of the candidate that keeps one at the smallest margin.

    Processor time alone, again, only where nothing else keeps one up to 50 %; the least noise decides ties.
    """
    quietest = sorted(range(len(found)), key=lambda k: found[k].noise)
    for alone in (False, True):
        best, least = None, math.inf
        for k in (k for k in quietest if (found[k].clock == "cpu") == alone):
            margin = margin_met(found[k], labels, rule, below=least)
            if margin is not None:
                best, least = k, margin
        if best is not None:
            return best
    return next((k for k in quietest if found[k].clock != "cpu"), quietest[0])


def evaluate(found: Sequence[Candidate], rule: Rule, trials: int, rng: np.random.Generator) -> dict[str, Any]:
    """What to gate with on this machine: the `figures` of the best candidate, and those of all. JSON.

    rule.alpha and rule.beta are the promise: at most that share of false alarms, at most that share of
    slowdowns of the margin that are not failed. One set of relabelings serves all candidates.
    Adds `armed`, `mde_percent`, `margin_met_percent` and `candidates`.
    """
    labels = relabel(len(found[0].series[0]), rule.max_pairs, trials, rng)
    table = [figures(c, labels, rule) for c in found]
    best = choose(table)
    armed = best is not None
    index = least_bad(found, labels.some(COARSE), rule) if best is None else best
    return {
        "armed": armed,
        **{k: v for k, v in table[index].items() if k != "kept"},
        "mde_percent": mde_percent(found[index], labels, rule),
        "margin_met_percent": margin_met(found[index], labels, rule),
        "candidates": table,
    }
