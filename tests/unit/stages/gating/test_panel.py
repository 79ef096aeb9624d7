"""Several metrics in one gate: shares of the errors, Holm at the end, and what stays decided."""

import numpy as np
import pytest

from edgesft.core.statistics import sequential
from edgesft.core.statistics.sequential import Rule
from edgesft.stages.gating import budget as budgeting
from edgesft.stages.gating.panel import Panel, Series


def panel(names, clocks=("cpu",), max_pairs=48, margin=0.05, budgets=()):
    series = [Series(n, n, "median", clocks[0], clocks, True, margin) for n in names]
    return Panel(series, Rule(max_pairs=max_pairs), budgeting.parse(dict(budgets), "b"), 0.95, 1e6)


def pairs(logs):
    """logs: metric -> log ratios by one clock."""
    count = len(next(iter(logs.values())))
    return [
        {
            "ratio": {m: {"cpu": float(np.exp(x[k]))} for m, x in logs.items()},
            "base": {"value": {m: {"cpu": 1.0} for m in logs}},
            "head": {"value": {m: {"cpu": 1.0} for m in logs}, "peak_bytes": 1e6 * (k + 1)},
        }
        for k in range(count)
    ]


def run(made, measured):
    """The verdict as pairs come in one by one, and how many it took."""
    for n in range(len(measured) + 1):
        verdict = made.advance(measured[:n])
        if verdict is not None:
            return verdict, n
    return None, len(measured)


def test_holm_is_as_published():
    # Holm (1979): ordered p against level / m, level / (m - 1), ... until the first that is larger.
    assert sequential.holm([0.01, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]
    assert sequential.holm([0.02, 0.03], 0.05) == [True, True]
    assert sequential.holm([0.03, 0.03], 0.05) == [False, False]
    assert sequential.holm([], 0.05) == []


def test_five_metrics_of_the_same_speed_rarely_fail_and_one_that_slows_is_found():
    rng = np.random.default_rng(0)
    names = [f"m{k}" for k in range(5)]
    verdicts = {"same": [], "slow": []}
    for _ in range(60):
        logs = {n: 0.02 * rng.standard_normal(48) for n in names}
        verdicts["same"].append(run(panel(names), pairs(logs))[0])
        logs["m3"] = logs["m3"] + np.log(1.06)
        verdicts["slow"].append(run(panel(names), pairs(logs))[0])
    assert verdicts["same"].count("fail") <= 1
    assert verdicts["same"].count("pass") >= 55
    assert verdicts["slow"].count("fail") >= 57
    assert verdicts["slow"].count("pass") == 0


def test_one_that_has_passed_stays_passed_while_another_is_open():
    rng = np.random.default_rng(1)
    quiet = 0.001 * rng.standard_normal(48)
    quiet[8:] += 0.06  # after its pass
    made = panel(["a", "b"], max_pairs=16)
    verdict, n = run(made, pairs({"a": quiet, "b": 0.3 * rng.standard_normal(48)}))
    assert (verdict, n) == ("inconclusive", 16)
    assert made.states["a"].decision == "pass"


def test_each_metric_and_clock_gets_an_even_share():
    alone, both = panel(["a"]), panel(["a", "b"], clocks=("cpu", "wall"))
    rule = both.rule_of(both.series[0])
    assert rule.alpha_look == pytest.approx(alone.rule_of(alone.series[0]).alpha_look / 4)


def test_holm_decides_at_the_last_look_what_even_shares_leave_open():
    # All 8 differences of `a` far below, `b` with one tiny exception: p = 1/256 and 2/256.
    a, b = np.full(8, -0.3) - np.arange(8) / 100, np.full(8, -0.3) - np.arange(8) / 100
    b[0] = np.log(1.05) + 1e-6
    rule = Rule(beta=0.01, max_pairs=8, metrics=2)
    looks = [sequential.look(x, rule) for x in (a, b)]
    assert [k.decision for k in looks] == ["pass", "inconclusive"]
    assert [k.decision for k in sequential.last_looks(looks, [rule, rule])] == ["pass", "pass"]


def test_budgets_go_on_until_they_are_decided():
    logs = {"a": 0.001 * np.random.default_rng(2).standard_normal(48)}
    made = panel(["a"], budgets={"peak_memory_mb": 10.5})
    measured = pairs(logs)
    assert run(panel(["a"]), measured) == ("pass", 8)
    assert run(made, measured) == ("pass", 8)  # 1 to 8 MB
    made = panel(["a"], budgets={"peak_memory_mb": 7.5}, max_pairs=48)
    verdict, n = run(made, measured)
    assert verdict == "fail"  # the median passes 7.5 MB only later
    assert n > 8
    assert made.kept["peak_memory_mb"]["low"] > 7.5
