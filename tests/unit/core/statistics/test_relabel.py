"""Gates played with processes of one program: pairs of neighbours, fair coins, what is promised."""

import dataclasses
import math

import numpy as np
import pytest

from edgesft.core.statistics import relabel as r
from edgesft.core.statistics import sequential as s

RULE = s.Rule()


def series(noise, seed=0, processes=96, drift=0.0):
    rng = np.random.default_rng(seed)
    return noise * rng.standard_normal(processes) + drift * np.arange(processes)


def values(cpu, wall, processes=96, seed=0):
    """values[option][clock][estimator] with a noise of `cpu` and `wall`, less for p10 and min."""
    rng = np.random.default_rng(seed)
    spread = {"median": 1.0, "p10": 0.7, "min": 0.4}

    def numbers(noise):
        return {e: list(8 * np.exp(noise * k * rng.standard_normal(processes))) for e, k in spread.items()}

    one = {"cpu": numbers(cpu), "wall": numbers(wall)}
    return {"both": one, "wall": {"wall": one["wall"]}, "cpu": {"cpu": one["cpu"]}}


def evaluated(*noises, rule=RULE, trials=2000, **more):
    found = r.candidates(values(*noises, **more))
    return r.evaluate(found, rule, trials, np.random.default_rng(1))


@pytest.mark.parametrize(("processes", "pairs"), [(96, 48), (97, 48), (24, 48), (25, 20), (200, 48), (96, 8)])
def test_pairs_are_neighbours_and_follow_each_other(processes, pairs):
    labels = r.relabel(processes, pairs, 3000, np.random.default_rng(0))
    first = labels.first
    assert first.shape == labels.sign.shape == (3000, pairs)
    assert first.min() >= 0
    assert first.max() + 1 <= processes - 1
    assert (first % 2 == first[:, :1] % 2).all()  # no process is in two pairs that share half of it
    once = first[:, : min(pairs, (processes - 1) // 2)]
    assert all(len(set(row)) == len(row) for row in once)
    assert np.mean(np.diff(first, axis=1) == 2) > 0.7
    assert set(first[:, 0]) == set(range(processes - 1))  # it starts anywhere
    assert labels.sign.mean() == pytest.approx(0, abs=0.05)
    assert set(np.unique(labels.sign)) == {-1, 1}


def test_ratios_are_those_of_the_named_neighbours():
    x = np.array([1.0, 4.0, 2.0, 7.0])
    labels = r.Labels(np.array([[0, 2], [1, 0]]), np.array([[1, -1], [-1, 1]], dtype=np.int8))
    assert labels.ratios(x).tolist() == [[3.0, -5.0], [2.0, 3.0]]


def test_the_same_seed_draws_the_same():
    one, two = (r.relabel(96, 48, 50, np.random.default_rng(3)) for _ in "ab")
    assert (one.first == two.first).all()
    assert (one.sign == two.sign).all()


def test_drift_stays_what_it_is_and_alarms_nobody():
    heat = r.Candidate("min", "wall", (series(0.01, drift=math.log(1.3) / 96),))
    found = r.figures(heat, r.relabel(96, 48, 2000, np.random.default_rng(1)), RULE)
    assert found["false_alarm"]["rate"] <= 0.01
    assert found["detection"]["5"] >= 0.95
    assert found["noise"] == pytest.approx(0.014, abs=0.004)  # of two neighbours, not of the whole


def test_a_quiet_machine_keeps_the_promise_with_the_quietest_number():
    found = evaluated(0.012, 0.01)
    assert found["armed"]
    assert found["estimator"] == "min"
    assert found["clock"] != "cpu"
    assert found["false_alarm"]["rate"] <= 0.001
    assert found["false_alarm"]["high"] <= 0.005
    assert found["detection"]["5"] >= 0.99
    assert found["detection"]["10"] == found["pass_rate"] == 1.0
    assert found["inconclusive"] == 0.0
    assert found["pairs_mean"] < 9 <= found["pairs_mean_slow"]
    assert found["margin_met_percent"] == 3.0
    assert 2.0 < found["mde_percent"] < 5.0
    assert len(found["candidates"]) == 9
    assert "kept" not in found


def test_processor_time_alone_is_taken_only_where_nothing_else_will_do():
    both = evaluated(0.01, 0.012)  # processor time is the quieter, yet it is not alone
    assert (both["armed"], both["clock"] == "cpu") == (True, False)
    table = [
        {"kept": True, "clock": "cpu", "pairs_mean": 8.0, "noise": 0.01},
        {"kept": True, "clock": "wall", "pairs_mean": 30.0, "noise": 0.04},
        {"kept": True, "clock": "both", "pairs_mean": 14.4, "noise": 0.03},
        {"kept": True, "clock": "wall", "pairs_mean": 13.6, "noise": 0.02},
        {"kept": False, "clock": "wall", "pairs_mean": 8.0, "noise": 0.01},
    ]
    assert r.choose(table) == 3
    assert r.choose(table[:1] + table[4:]) == 0
    assert r.choose(table[4:]) is None


def test_a_noisy_machine_is_not_armed_and_learns_which_margin_it_could_keep():
    found = evaluated(0.3, 0.3)
    assert not found["armed"]
    assert found["detection"]["5"] < 0.5
    met = found["margin_met_percent"]
    assert 10 < met < 50
    ways = r.candidates(values(0.3, 0.3))
    one = next(c for c in ways if (c.estimator, c.clock) == (found["estimator"], found["clock"]))
    labels = r.relabel(96, 48, 2000, np.random.default_rng(1))
    for margin, kept in ((met, True), (met - 1, False)):
        wide = dataclasses.replace(RULE, margin=margin / 100)
        assert (r.detection(one, labels, wide, margin / 100) >= 0.95) == kept


def test_no_margin_at_all_is_said_so():
    found = evaluated(2.0, 2.0)
    assert not found["armed"]
    assert found["margin_met_percent"] is None
    assert found["mde_percent"] is None


def test_a_risk_of_false_alarms_beyond_the_promise_is_not_armed():
    one = r.Candidate("min", "wall", (series(0.05),))
    labels = r.relabel(96, 48, 2000, np.random.default_rng(1))
    noted = r.figures(one, labels, RULE)
    assert noted["kept"]
    # the same processes played by a rule that is laxer than what is asked for here
    lax = r.figures(one, labels, s.Rule(alpha=0.6, tolerance=0.0))
    assert lax["false_alarm"]["rate"] > 0.05
    assert lax["false_alarm"]["high"] > lax["false_alarm"]["rate"]


def test_the_smallest_effect_is_found_just_often_enough():
    one = r.Candidate("min", "wall", (series(0.05),))
    labels = r.relabel(96, 48, 2000, np.random.default_rng(1))
    effect = r.mde_percent(one, labels, RULE)
    assert r.detection(one, labels, RULE, effect / 100) >= 0.95
    assert r.detection(one, labels, RULE, effect / 100 - 0.001) < 0.95


@pytest.mark.parametrize(("margin", "expected"), [(0.05, 3.0), (0.025, 2.5)])
def test_the_own_margin_counts_whole_or_not(margin, expected):
    one = r.Candidate("min", "wall", (series(0.0001),))
    labels = r.relabel(96, 48, 500, np.random.default_rng(1))
    assert r.margin_met(one, labels, s.Rule(margin=margin)) == expected
    assert r.margin_met(one, labels, s.Rule(margin=margin, tolerance=0.0, max_pairs=12)) in (expected, 3.0)


def test_a_clock_that_stands_still_is_left_out():
    still = values(0.01, 0.01)
    still["cpu"]["cpu"]["min"] = still["both"]["cpu"]["min"] = [0.0] * 96
    found = [(c.estimator, c.clock) for c in r.candidates(still)]
    assert len(found) == 7
    assert ("min", "wall") in found
    assert ("min", "both") not in found


def test_two_clocks_count_by_the_quieter_one():
    quiet, loud = series(0.01), series(0.2, seed=1)
    assert r.Candidate("min", "both", (quiet, loud)).noise == r.Candidate("min", "cpu", (quiet,)).noise


def test_the_bound_of_a_share_is_that_of_clopper_and_pearson():
    from scipy import stats

    assert r.upper_bound(0, 300) == pytest.approx(1 - 0.05 ** (1 / 300))
    expected = stats.binomtest(7, 100).proportion_ci(0.90, method="exact").high
    assert r.upper_bound(7, 100) == pytest.approx(expected)
    assert r.upper_bound(5, 5) == 1.0


def test_where_nothing_is_kept_the_smallest_margin_is_looked_for_before_processor_time():
    ways = [
        r.Candidate("median", "wall", (series(0.3),)),
        r.Candidate("min", "wall", (series(0.15),)),
        r.Candidate("min", "cpu", (series(0.1),)),
    ]
    labels = r.relabel(96, 48, 500, np.random.default_rng(1))
    assert r.least_bad(ways, labels, RULE) == 1
    assert r.least_bad([ways[0], ways[2]], labels, RULE) == 0
    hopeless = r.Candidate("median", "wall", (series(3.0),))
    assert r.least_bad([hopeless, ways[2]], labels, RULE) == 1
    assert r.least_bad([hopeless, r.Candidate("min", "cpu", (series(3.0),))], labels, RULE) == 0
    met = r.margin_met(ways[1], labels, RULE)
    assert r.margin_met(ways[1], labels, RULE, below=met) is None
    assert r.margin_met(ways[1], labels, RULE, below=met + 1) == met
