"""Change points of a series, and the ratio of two sets, on seeded noise."""

import numpy as np
import pytest

from edgesft.core.statistics import trend


def series(seed, n, noise=0.02, slope=0.0):
    rng = np.random.default_rng([n, seed])
    return 8 * np.exp(noise * rng.standard_normal(n) + slope * np.arange(n))


def test_a_step_of_5_percent_in_2_percent_noise_is_found_where_it_is():
    near = 0
    for seed in range(100):
        values = series(seed, 40)
        values[20:] *= 1.05
        changes = trend.analyse(values).changes
        near += len(changes) == 1 and abs(changes[0][0] - 20) <= 2
        if len(changes) == 1:
            assert changes[0][2] / changes[0][1] == pytest.approx(1.05, abs=0.03)
    assert near >= 85


@pytest.mark.parametrize("n", [6, 12, 40, 200])
def test_noise_alone_shows_nothing(n):
    quiet = [trend.analyse(series(seed, n)) for seed in range(200)]
    assert sum(not t.changes and t.drift is None for t in quiet) >= 190


def test_two_steps_and_a_way_back():
    values = series(0, 60, noise=0.01)
    values[20:40] *= 1.1
    found = trend.analyse(values)
    assert [s.start for s in found.segments] == [0, 20, 40]
    assert found.segments[-1].stop == 60
    assert found.segments[1].level == pytest.approx(8.8, rel=0.01)
    assert found.noise == pytest.approx(0.01, rel=0.5)


def test_a_drift_is_a_drift_and_no_staircase():
    found = [trend.analyse(series(seed, 30, slope=0.01)) for seed in range(100)]
    drifts = [t.drift for t in found if t.drift is not None]
    assert len(drifts) >= 95
    assert np.median(drifts) == pytest.approx(100 * (np.exp(0.29) - 1), rel=0.1)
    assert all(not t.changes for t in found if t.drift is not None)


def test_single_spikes_are_no_change_wherever_they_are():
    quiet = 0
    for seed in range(100):
        values = series(seed, 30)
        values[np.random.default_rng(seed).integers(30, size=2)] *= 1.5
        quiet += not trend.analyse(values).changes
    assert quiet >= 90


def test_a_new_level_is_seen_at_its_third_point_and_seldom_before():
    early = late = 0
    for seed in range(50):
        values = np.r_[series(seed, 20, noise=0.005), 8.8, 8.81, 8.79]
        late += [c[0] for c in trend.analyse(values).changes] == [20]
        early += bool(trend.analyse(values[:-1]).changes)
    assert late >= 45
    assert early <= late / 2


def test_a_flat_series_has_no_changes_and_a_step_in_it_is_one():
    assert trend.analyse([8.0] * 12).changes == []
    assert trend.analyse([8.0] * 6 + [9.0] * 6).changes == [(6, 8.0, 9.0)]


@pytest.mark.parametrize("n", range(6))
def test_too_few_points_say_nothing(n):
    found = trend.analyse([1.0, 1.0, 1.0, 9.0, 9.0][:n])
    assert found.changes == []
    assert (found.noise, found.drift) == (None, None)
    assert len(found.segments) == min(n, 1)


def test_the_null_distribution_of_the_rank_sum_is_exact():
    assert trend._rank_sum(3, 2) * 10 == pytest.approx([1, 1, 2, 2, 2, 1, 1])
    large = trend._rank_sum(48, 48)
    assert large.sum() == pytest.approx(1)
    assert len(large) == 48 * 48 + 1
    assert large == pytest.approx(large[::-1])


def test_the_interval_of_a_ratio_holds_it():
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(400):
        base, now = np.exp(0.03 * rng.standard_normal(6)), 1.1 * np.exp(0.03 * rng.standard_normal(8))
        ratio, low, high = trend.level_ratio(list(base), list(now))
        assert low <= ratio <= high
        held += low <= 1.1 <= high
    assert 0.93 <= held / 400 <= 0.99


def test_an_interval_needs_four_and_four():
    four, three = [1.0, 1.01, 0.99, 1.0], [2.0, 2.01, 1.99]
    assert trend.level_ratio(four, three)[1:] == (None, None)
    assert trend.level_ratio(four, three)[0] == pytest.approx(2.0, rel=0.02)
    ratio, low, high = trend.level_ratio(four, [*three, 2.02])
    assert 1.9 < low < ratio < high < 2.1
    with pytest.raises(ValueError, match="no numbers"):
        trend.level_ratio([], four)
