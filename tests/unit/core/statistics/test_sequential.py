"""The exact test, the estimate beside it, and the rule that joins them in looks."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from edgesft.core.statistics import sequential as s


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
    assert unsure.p_beyond > s.LEANING >= leaning.p_beyond
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


def one_by_one(rule, *measures):
    """What `look` and `agree` say of a gate, look after look: decision and pairs."""
    for n in rule.looks:
        looks = [s.look(d[:n], rule) for d in measures]
        decision = s.agree(*looks, rule) if len(looks) == 2 else looks[0].decision
        if decision != s.CONTINUE:
            return decision, n
    raise AssertionError("the last look always decides")


def gates(rng, trials, pairs, noise):
    """Log ratios of gates with slowdowns from none to 10 %, some with ties as relabelled processes have."""
    d = noise * rng.standard_normal((trials, pairs)) + rng.choice([0.0, 0.02, 0.05, 0.1], (trials, 1))
    repeated = rng.random(trials) < 0.3
    d[repeated, pairs // 2 :] = -d[repeated, : pairs - pairs // 2]
    d[rng.random(trials) < 0.1] = 0.01
    return np.where(rng.random(d.shape) < 0.02, 0.0, d)


@pytest.mark.parametrize("noise", [0.01, 0.04, 0.15])
@pytest.mark.parametrize("most", [8, 20, 48])
def test_many_gates_at_once_are_decided_as_one_by_one(noise, most):
    rng = np.random.default_rng(most)
    one, other = (gates(rng, 120, most, noise) for _ in "ab")
    for rule, measures in (
        (s.Rule(max_pairs=most), (one,)),
        (s.Rule(max_pairs=most, metrics=2), (one, other)),
    ):
        decisions, pairs = s.decide(measures[0], rule, *measures[1:])
        expected = [one_by_one(rule, *rows) for rows in zip(*measures, strict=True)]
        assert list(zip(decisions.tolist(), pairs.tolist(), strict=True)) == expected


def test_many_gates_see_all_decisions_and_lean_as_one_by_one():
    rng = np.random.default_rng(2)
    rule = s.Rule(metrics=2)
    fine, leaning = 0.005 * rng.standard_normal((50, 48)), 0.015 + 0.04 * rng.standard_normal((50, 48))
    decisions, pairs = s.decide(fine, rule, leaning)
    assert [one_by_one(rule, *rows) for rows in zip(fine, leaning, strict=True)] == list(
        zip(decisions.tolist(), pairs.tolist(), strict=True)
    )
    assert len(set(pairs.tolist())) >= 3  # the second measure held some of them up
    assert s.decide(np.empty((0, 48)), rule)[0].size == 0


def test_p_values_and_estimates_of_many_rows_are_those_of_each():
    d = gates(np.random.default_rng(0), 200, 13, 0.03)
    assert s.signed_rank_ps(d).tolist() == [s.signed_rank_p(row) for row in d]
    assert s.hodges_lehmanns(d).tolist() == [s.hodges_lehmann(row) for row in d]
    long = np.random.default_rng(1).standard_normal((2000, 48))  # several parts
    assert s.hodges_lehmanns(long)[[0, 1999]].tolist() == [s.hodges_lehmann(long[k]) for k in (0, 1999)]


ORDER = {s.PASS: 0, s.CONTINUE: 1, s.INCONCLUSIVE: 1, s.FAIL: 2}
ratios = st.integers(-4000, 4000).map(lambda k: k / 2**14)  # exact in binary, so that shifts make no ties
samples = st.lists(ratios, min_size=8, max_size=48)
shifts = st.integers(0, 2000).map(lambda k: k / 2**14)


@settings(max_examples=200, deadline=None)
@given(samples, shifts)
def test_slower_heads_are_never_judged_better(d, shift):
    d = np.array(d)
    rule = s.Rule(max_pairs=len(d))
    before, after = s.look(d, rule), s.look(d + shift, rule)
    assert ORDER[before.decision] <= ORDER[after.decision]
    assert before.p_regression >= after.p_regression
    assert before.p_noninferior <= after.p_noninferior + 1e-12


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(ratios, ratios), min_size=48, max_size=48), shifts)
def test_slower_heads_are_never_judged_better_by_a_whole_gate_of_two_clocks(pairs, shift):
    one, other = np.array(pairs).T[:, None]
    rule = s.Rule(metrics=2)
    before, _ = s.decide(one, rule, other)
    after, _ = s.decide(one + shift, rule, other + shift)
    assert ORDER[str(before[0])] <= ORDER[str(after[0])]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=10))
def test_p_is_exact_under_sign_flips(sizes):
    # Under the null every flip of signs is as likely: at most a share p of them may give a p as small.
    n = len(sizes)
    signs = 1 - 2 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    p = s.signed_rank_ps(signs * np.array(sizes, dtype=float))
    levels, counts = np.unique(p, return_counts=True)
    reached = np.cumsum(counts) / 2**n
    assert (reached <= levels + 1e-12).all()
    if len(set(sizes)) == n:  # no ties: exact, not only safe
        assert reached == pytest.approx(levels)
