"""The records in one document, and the input of github-action-benchmark."""

import json
import math

import jsonschema

from edgesft.core import records
from edgesft.stages.reporting.formats import github_action_benchmark as benchmark
from edgesft.stages.reporting.formats import json as report


def test_the_report_fits_its_schema_and_keeps_the_records(every):
    document = json.loads(report.render(every))
    jsonschema.validate(document, records.json_schema("report"))
    assert [(r["name"], r["kind"]) for r in document["runs"]] == [(r.name, r.kind) for r in every]
    assert document["runs"][0]["record"] == every[0].record
    assert document["runs"][-1]["record"]["tokens_per_second"] is None  # it was not a number
    assert {f["outcome"] for f in document["findings"]} == {"pass", "refused", "note", "inconclusive"}


def test_hostile_text_comes_back(hostile):
    text, runs = hostile
    document = json.loads(report.render(runs))
    assert document["runs"][0]["name"] == text


def entries(runs):
    found = json.loads(benchmark.render(runs))
    for entry in found:
        assert set(entry) <= {"name", "unit", "value", "range", "extra"}
        assert all(isinstance(entry[k], str) for k in entry if k != "value")
        assert math.isfinite(entry["value"])
    names = [e["name"] for e in found]
    assert len(set(names)) == len(names)
    return {e["name"]: e for e in found}


def test_benchmark_entries(every):
    found = entries(every)
    assert found["profile: tpot p99"] == {
        "name": "profile: tpot p99",
        "unit": "ms",
        "value": 16.0,
        "range": "15.68 to 16.32",
        "extra": "700 samples",
    }
    assert "profile: ttft p99" not in found  # refused
    assert "profile: load cold" not in found  # not measured
    assert found["profile: peak memory"]["value"] == 300_000_000
    assert found["verdict: tpot"]["extra"] == "1.001 times the base: pass"


def test_benchmark_leaves_out_what_is_better_larger(run):
    budget = {
        "name": "tokens_per_second",
        "unit": "tokens/s",
        "limit": 68.0,
        "value": 60.0,
        "verdict": "fail",
    }
    found = entries([run("verdict", budgets=[{**budget, "least": True}, {**budget, "name": "load_ms"}])])
    assert "verdict: budget tokens_per_second" not in found
    assert "verdict: budget load_ms" in found


def test_numbers_that_are_not_finite(run):
    found = entries([run("profile", peak_memory_bytes=math.inf, tpot_ms={"p50": math.nan, "samples": 20})])
    assert "profile: peak memory" not in found
