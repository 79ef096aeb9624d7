"""Percentiles that refuse, warm-up cut, estimators."""

import math

import numpy as np
import pytest
from scipy import stats

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


@pytest.mark.parametrize(("name", "value"), [("median", 5.5), ("p10", 1.9), ("min", 1.0)])
def test_estimators(name, value):
    assert s.estimate(np.arange(1.0, 11.0), name) == pytest.approx(value)


def test_estimators_refuse_nothing_and_unknown_names():
    with pytest.raises(ValueError, match="no samples"):
        s.estimate([], "min")
    with pytest.raises(ValueError, match="mean"):
        s.estimate([1.0], "mean")
