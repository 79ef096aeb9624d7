"""Percentiles that refuse, warm-up cut, the exact test, and the error rates of the gate's rule."""

import math

import numpy as np
import pytest
from scipy import signal, stats

from edgesft.core import statistics as s


@pytest.mark.parametrize(("q", "needed"), [(0.5, 11), (0.9, 64), (0.99, 662), (0.01, 662)])
def test_samples_needed_is_the_smallest_number_that_the_rule_allows(q, needed):
    tail = min(q, 1 - q)
    assert s.samples_needed(q) == needed
    assert stats.binom.cdf(1, needed, tail) <= 0.01 < stats.binom.cdf(1, needed - 1, tail)


@pytest.mark.parametrize("q", [0.0, 1.0, 1.5])
def test_samples_needed_refuses_what_is_no_quantile(q):
    with pytest.raises(ValueError, match="quantile"):
        s.samples_needed(q)


def test_percentiles_without_enough_samples_are_refused_with_the_number():
    found = s.percentiles(np.arange(300.0))
    assert found["p50"] == 149.5
    assert found["p90"] == pytest.approx(269.1)
    assert found["p99"] is None
    assert found["low"]["p99"] is None
    assert found["reasons"] == {"p99": "needs 662 samples, has 300"}
    assert s.percentiles(np.arange(662.0))["p99"] is not None


def test_no_samples_at_all_are_refused_too():
    found = s.percentiles([])
    assert [found[p] for p in ("p50", "p90", "p99")] == [None] * 3
    assert found["reasons"]["p50"] == "needs 11 samples, has 0"


@pytest.mark.parametrize("q", [0.5, 0.9, 0.99])
def test_bounds_of_a_percentile_cover_it(q):
    rng = np.random.default_rng(7)
    true = stats.expon.ppf(q)
    n = s.samples_needed(q) * 2
    low, high = s.quantile_bounds(n, q)
    draws = np.sort(rng.exponential(size=(4000, n)), axis=1)
    covered = np.mean((draws[:, low - 1] <= true) & (true <= draws[:, high - 1]))
    assert 0.945 <= covered <= 0.999


def test_bounds_are_refused_for_too_few_samples():
    assert s.quantile_bounds(20, 0.99) is None


def test_warm_up_cut_removes_a_ramp():
    rng = np.random.default_rng(1)
    ramp = 0.6 * np.maximum(0, 1 - np.arange(400) / 50)
    found = s.mser(math.log(8) + ramp + 0.01 * rng.standard_normal(400))
    assert 35 <= found.cut <= 60
    assert found.steady


def test_warm_up_cut_leaves_a_steady_series_alone():
    rng = np.random.default_rng(2)
    cuts = [s.mser(0.02 * rng.standard_normal(448)) for _ in range(200)]
    assert np.mean([c.cut for c in cuts]) < 0.05 * 448
    assert np.mean([c.steady for c in cuts]) > 0.98
    assert s.mser(np.full(64, 2.0)) == s.WarmUp(0, True)


def test_a_series_that_never_settles_is_no_steady_state():
    assert not s.mser(np.linspace(1, 0, 100)).steady


def test_growth_with_the_context_is_not_taken_for_warm_up():
    rng = np.random.default_rng(3)
    one = 8 * (1 + 0.01 * np.arange(32))  # a third slower at the end of every prompt
    flat = [one * np.exp(0.005 * rng.standard_normal(32)) for _ in range(14)]
    assert s.warm_up(flat).cut <= 32
    cold = [flat[0] * 1.5, flat[1] * 1.2, *flat[2:]]
    found = s.warm_up(cold)
    assert 55 <= found.cut <= 100
    assert found.steady


@pytest.mark.parametrize("empty", [[], [[]], [[1.0, 2.0]]])
def test_too_short_a_series_is_not_cut(empty):
    assert s.warm_up(empty) == s.WarmUp(0, True)


@pytest.mark.parametrize("n", [4, 8, 12, 30])
def test_signed_rank_agrees_with_scipy(n):
    rng = np.random.default_rng(n)
    for shift in (-0.5, 0.0, 0.7):
        x = rng.standard_normal(n) + shift
        expected = stats.wilcoxon(x, alternative="greater", method="exact").pvalue
        assert s.signed_rank_p(x) == pytest.approx(expected, rel=1e-9)


def test_ties_and_zeros_count_against_the_alternative():
    assert s.signed_rank_p(np.zeros(8)) == 1.0
    assert s.signed_rank_p(np.ones(8)) == pytest.approx(2**-8)
    # the largest size is shared by a positive and a negative one: the negative one gets the higher rank
    assert s.signed_rank_p([1, 2, 3, 3, -3]) == s.signed_rank_p([1, 2, 3, 4, -5])


def test_signed_rank_never_rejects_too_often_with_ties():
    rng = np.random.default_rng(5)
    p = np.array([s.signed_rank_p(rng.integers(-3, 4, 12)) for _ in range(3000)])
    assert np.mean(p <= 0.05) <= 0.06


def test_hodges_lehmann_is_the_median_of_walsh_averages():
    x = [1.0, 2.0, 6.0]
    assert s.hodges_lehmann(x) == np.median([1, 1.5, 3.5, 2, 4, 6])


@pytest.mark.parametrize("n", [8, 12, 24])
def test_interval_holds_just_the_shifts_that_the_test_does_not_reject(n):
    x = np.random.default_rng(n).standard_normal(n)
    low, high = s.hodges_lehmann_interval(x, 0.05 / 6)
    tiny = 1e-9
    assert s.signed_rank_p(x - (low - tiny)) <= 0.05 / 6 < s.signed_rank_p(x - (low + tiny))
    assert s.signed_rank_p((high + tiny) - x) <= 0.05 / 6 < s.signed_rank_p((high - tiny) - x)


def test_too_few_pairs_have_no_interval():
    assert s.hodges_lehmann_interval([0.1, 0.2, 0.3], 0.01) == (None, None)


@pytest.mark.parametrize(
    ("most", "looks"),
    [
        (48, (8, 12, 16, 24, 32, 48)),
        (24, (8, 12, 16, 24)),
        (20, (8, 12, 16, 20)),
        (8, (8,)),
        (64, (*s.LOOKS, 64)),
    ],
)
def test_looks_end_at_the_most_pairs_and_share_the_errors(most, looks):
    rule = s.Rule(max_pairs=most)
    assert rule.looks == looks
    assert rule.alpha_look == pytest.approx(0.01 / len(looks))
    assert s.Rule(max_pairs=most, metrics=2).beta_look == pytest.approx(0.025 / len(looks))


def test_eight_pairs_can_pass_but_not_fail_unless_they_are_all():
    slow, same = np.full(8, 0.2), np.full(8, 0.0)
    assert s.look(slow, s.Rule()).decision == s.CONTINUE
    assert s.look(np.full(12, 0.2), s.Rule()).decision == s.FAIL
    assert s.look(same, s.Rule()).decision == s.PASS
    assert s.look(slow, s.Rule(max_pairs=8)).decision == s.FAIL


def test_a_slowdown_within_the_tolerance_neither_fails_nor_hides():
    assert s.look(np.full(12, math.log(1.015)), s.Rule()).decision == s.PASS
    assert s.look(np.full(12, math.log(1.03)), s.Rule()).decision == s.FAIL
    noisy = np.random.default_rng(0).standard_normal(48)
    assert s.look(noisy, s.Rule()).decision == s.INCONCLUSIVE


def test_two_measures_agree_before_they_pass_and_either_can_fail():
    rule = s.Rule(metrics=2)
    same, slow = s.look(np.zeros(12), rule), s.look(np.full(12, 0.2), rule)
    rng = np.random.default_rng(0)
    unsure = s.look(0.3 * rng.standard_normal(12), rule)
    leaning = s.look(np.linspace(-0.02, 0.10, 12), rule)
    assert (unsure.decision, leaning.decision) == (s.CONTINUE, s.CONTINUE)
    assert unsure.p_regression > 0.05 >= leaning.p_regression
    assert s.agree(same, unsure, rule) == s.agree(unsure, same, rule) == s.PASS
    assert s.agree(same, slow, rule) == s.agree(slow, same, rule) == s.FAIL
    assert s.agree(same, leaning, rule) == s.agree(unsure, unsure, rule) == s.CONTINUE
    assert s.agree(same, leaning, s.Rule(metrics=2, max_pairs=12)) == s.INCONCLUSIVE


def test_more_noise_needs_more_pairs():
    assert s.pairs_predicted(0.0, 0.05) == 8
    n = s.pairs_predicted(0.05, 0.05)
    assert n == math.ceil(1.5 * (3.98 * 0.05 / math.log(1.05)) ** 2)
    assert s.detectable(0.05, n) <= 0.05 < s.detectable(0.05, n - 1)


def test_noise_is_not_moved_by_an_outlier():
    x = np.random.default_rng(0).standard_normal(999)
    assert s.noise(x) == pytest.approx(1.0, abs=0.1)
    assert s.noise([*x, 1e6]) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("name", "value"), [("median", 5.5), ("p10", 1.9), ("min", 1.0)])
def test_estimators(name, value):
    assert s.estimate(np.arange(1.0, 11.0), name) == pytest.approx(value)


def test_estimators_refuse_nothing_and_unknown_names():
    with pytest.raises(ValueError, match="no samples"):
        s.estimate([], "min")
    with pytest.raises(ValueError, match="mean"):
        s.estimate([1.0], "mean")


# Latency of an iteration: exp(drift over processes + slow regime + process + iteration noise + warm-up)
# times (1 + bursty Pareto spikes). The effect of the session is shared by both sides and cancels.
PROFILES = {
    "quiet": {"drift": (0.004, 0.95), "slow": (0.002, 0.3, 0.05), "process": 0.005, "noise": (0.008, 0.5)}
    | {"spikes": (0.005, 0.2, 2.5, 0.1)},
    "ci": {"drift": (0.03, 0.98), "slow": (0.03, 0.17, 0.10), "process": 0.012, "noise": (0.025, 0.7)}
    | {"spikes": (0.03, 0.4, 1.8, 0.2)},
}


def markov(rng, shape, enter, leave):
    """0/1 series along the last axis that starts in its stationary state."""
    state = rng.random(shape[:-1]) < enter / (enter + leave)
    out = np.empty(shape, dtype=bool)
    for k in range(shape[-1]):
        u = rng.random(shape[:-1])
        state = np.where(state, u > leave, u < enter)
        out[..., k] = state
    return out


def ar(rng, shape, sd, rho):
    x = rng.standard_normal(shape) * sd * math.sqrt(1 - rho**2)
    x[..., 0] /= math.sqrt(1 - rho**2)
    return signal.lfilter([1.0], [1.0, -rho], x, axis=-1)


def simulate(profile, trials, seed, pairs=48, steps=64):
    """Log of one number a process, (trials, pairs, 2): the second is head, in random order of time."""
    p, rng = PROFILES[profile], np.random.default_rng(seed)
    shape = (trials, 2 * pairs)
    level = ar(rng, shape, *p["drift"]) + p["process"] * rng.standard_normal(shape)
    level += p["slow"][2] * markov(rng, shape, *p["slow"][:2])
    x = level[..., None] + ar(rng, (*shape, steps), *p["noise"]) + 0.3 * np.exp(-np.arange(steps) / 3)
    rate, burst, tail, scale = p["spikes"]
    hit = markov(rng, x.shape, rate * burst / (1 - rate), burst)
    x += np.log1p(hit * scale * rng.pareto(tail, x.shape))
    value = np.empty(shape)
    for index in np.ndindex(shape):
        series = x[index]
        value[index] = s.estimate(series[s.mser(series).cut :], "p10")
    ordered = value.reshape(trials, pairs, 2)
    swap = rng.random((trials, pairs)) < 0.5
    return np.where(swap[..., None], ordered[..., ::-1], ordered)


def verdicts(logs, slowdown, rule):
    """Decision and pairs of every trial."""
    d = logs[..., 1] - logs[..., 0] + math.log1p(slowdown)
    out = []
    for row in d:
        looks = (s.look(row[:n], rule) for n in rule.looks)
        out.append(next(found for found in looks if found.decision != s.CONTINUE))
    return out


@pytest.mark.parametrize("profile", ["quiet", "ci"])
def test_gate_rarely_cries_wolf_and_never_sleeps(profile):
    logs = simulate(profile, trials=200, seed=11)
    rule = s.Rule()
    same = [v.decision for v in verdicts(logs, 0.0, rule)]
    slow = [v.decision for v in verdicts(logs, 0.05, rule)]
    assert same.count(s.FAIL) <= 2
    assert same.count(s.PASS) >= 190
    assert slow.count(s.FAIL) >= 190
    assert slow.count(s.PASS) <= 2


def test_pooling_iterations_would_cry_wolf():
    # The negative control: processes repeat, iterations of one process do not.
    rng = np.random.default_rng(4)
    alarms = 0
    for _ in range(200):
        base, head = (
            0.012 * rng.standard_normal((12, 1)) + 0.01 * rng.standard_normal((12, 64)) for _ in "ab"
        )
        alarms += stats.mannwhitneyu(head.ravel(), base.ravel(), alternative="greater").pvalue < 0.01
    assert alarms > 20
