"""The gate's report in words, its exit codes, and pairs cut off by a kill."""

import copy
import json

import pytest

from edgesft.core.errors import EdgeSFTError
from edgesft.stages.gating import verdict as verdicts

ENTRY = {
    "metric": "tpot",
    "clock": "cpu",
    "verdict": "pass",
    "blocking": True,
    "margin": 0.05,
    "ratio": 1.002,
    "interval": [0.991, None],
    "base_ms": 8.0,
    "head_ms": 8.016,
}
REPORT = {
    "verdict": "pass",
    "metric": "tpot",
    "ratio": 1.002,
    "interval": [0.991, None],
    "level": 0.98,
    "pairs": 12,
    "noise": 0.013,
    "detectable": 0.025,
    "pairs_predicted": 20,
    "estimator": "p10",
    "clock": "both",
    "decided_by": "cpu",
    "drill_slowdown": 0.0,
    "discarded": [],
    "calibration": None,
    "metrics": [ENTRY, verdicts.exact("size", {"base": 1e6, "head": 1e6}, True, None)],
    "budgets": [],
    "base": {"ref": "base"},
}
BUDGET = {
    "name": "tpot_p50_ms",
    "unit": "ms",
    "limit": 7.0,
    "value": 8.0,
    "low": 7.9,
    "high": 8.1,
    "level": 0.95,
    "verdict": "fail",
}


def made(**changes):
    return {**copy.deepcopy(REPORT), **changes}


def code(report, policy=None):
    try:
        verdicts.judge(report, policy)
    except EdgeSFTError as error:
        return error.exit_code
    return 0


@pytest.mark.parametrize(
    ("verdict", "exit_code"),
    [
        ("pass", 0),
        ("fail", 10),
        ("inconclusive", 11),
        ("not_comparable", 12),
        ("nothing_measured", 13),
        ("device_lost", 14),
    ],
)
def test_every_verdict_has_an_exit_code_of_its_own(verdict, exit_code):
    assert code(made(verdict=verdict)) == exit_code


def test_an_open_verdict_says_how_many_pairs_are_needed():
    with pytest.raises(verdicts.Inconclusive) as caught:
        verdicts.judge(made(verdict="inconclusive"))
    assert "about 20 pairs" in caught.value.hint
    assert code(made(verdict="inconclusive"), "pass") == 0
    assert code(made(verdict="inconclusive"), "fail") == 10


def test_an_error_is_the_sentence():
    report = made(verdict="not_comparable", error="base is a cat", hint="feed it")
    assert verdicts.describe(report) == "not_comparable: base is a cat"
    with pytest.raises(verdicts.NotComparable) as caught:
        verdicts.judge(report)
    assert caught.value.hint == "feed it"


def test_all_that_failed_is_named():
    memory = verdicts.exact("peak_memory", {"base": 1e6, "head": 2e6}, True, 8)
    report = made(verdict="fail", metrics=[{**ENTRY, "verdict": "fail"}, memory], budgets=[BUDGET])
    with pytest.raises(verdicts.Regression, match="also: peak_memory, tpot_p50_ms"):
        verdicts.judge(report)


def test_the_summary_has_a_line_for_everything():
    used = {"made_at": "2026-01-02T03:04:05+00:00", "expires_at": "2026-02-01T03:04:05+00:00"}
    report = made(
        calibration=used,
        budgets=[BUDGET],
        discarded=[{"pair": 3, "why": "the processor throttled for heat"}],
        drill_slowdown=5.0,
        metrics=[{**ENTRY, "faster": True}, REPORT["metrics"][1]],
    )
    text = "\n".join(verdicts.lines(report))
    for word in (
        "1.002",
        "between 0.991 and ?",
        "12 pairs, p10 of each process by wall and processor time",
        "noise 1.3 %",
        "2.5 %",
        "calibrated on 2026-01-02, valid until 2026-02-01",
        "8 -> 8.016 ms, margin 5 %",
        "1 -> 1 MB, margin 2 %",
        "budget tpot_p50_ms: 8 ms, between 7.9 and 8.1, asked for at most 7",
        "1 pair was measured again: the processor throttled for heat",
        "slowed by 5 %",
        "head is faster: tpot",
    ):
        assert word in text, word
    assert "not calibrated" in "\n".join(verdicts.lines(made()))


def test_a_gate_that_decided_by_a_budget_says_which():
    changes = {"ratio": None, "decided_by": "budget", "metric": "tpot_p50_ms", "noise": None}
    broken = made(verdict="fail", budgets=[BUDGET], **changes)
    assert verdicts.describe(broken).startswith("fail: budget tpot_p50_ms: 8 ms")
    kept = made(budgets=[{**BUDGET, "verdict": "pass"}], metrics=[], **changes)
    assert verdicts.describe(kept) == "pass: the budget is kept (12 processes)"
    refused = {**BUDGET, "value": None, "low": None, "high": None, "reason": "p99 needs 662 samples, has 5"}
    opened = made(verdict="inconclusive", budgets=[{**refused, "verdict": "inconclusive"}], **changes)
    assert "needs 662" in verdicts.describe(opened)


def test_a_quantity_without_noise_may_grow_by_2_percent():
    assert verdicts.exact("size", {"base": 100.0, "head": 102.0}, True, None)["verdict"] == "pass"
    assert verdicts.exact("size", {"base": 100.0, "head": 102.1}, True, None)["verdict"] == "fail"
    assert verdicts.exact("size", {"base": 0.0, "head": 1.0}, True, None)["verdict"] == "fail"


def test_pairs_are_read_as_far_as_they_are_whole(tmp_path):
    file = tmp_path / "pairs.jsonl"
    assert verdicts.read_pairs(file) == []
    whole = [{"pair": 0, "discarded": None}, {"pair": 1, "discarded": "heat"}]
    text = "".join(json.dumps(p) + "\n" for p in whole)
    for rest in ('{"pair": 2, "dis', '{"pair": 3, "discarded": null}\n', "[]\n", "\x00"):
        file.write_text(text + rest)
        assert verdicts.read_pairs(file) == whole
        assert file.read_text() == text
