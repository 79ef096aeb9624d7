"""JUnit XML: what is a failure, an error, skipped; and the form that CI servers expect."""

import os
from pathlib import Path

import pytest
from lxml import etree

from edgesft.stages.reporting.formats import junit

SUITE = {"name", "package", "id", "timestamp", "hostname", "tests", "failures", "errors", "skipped", "time"}


def parse(runs):
    """The document, its form checked: order of elements, attributes, and counts that agree."""
    root = etree.fromstring(junit.render(runs).encode())
    assert root.tag == "testsuites"
    assert not root.attrib
    for index, suite in enumerate(root):
        assert suite.tag == "testsuite"
        assert set(suite.attrib) == SUITE
        assert suite.get("id") == str(index)
        tags = [child.tag for child in suite]
        cases = suite.findall("testcase")
        assert tags == ["properties", *["testcase"] * len(cases), "system-out", "system-err"]
        assert len(cases) == int(suite.get("tests"))
        for tag, count in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            assert len(suite.findall(f"testcase/{tag}")) == int(suite.get(count))
        for case in cases:
            assert set(case.attrib) == {"name", "classname", "time"}
            assert float(case.get("time")) >= 0
            assert len(case) <= 1
            for child in case:
                wanted = {"message"} if child.tag == "skipped" else {"message", "type"}
                assert set(child.attrib) == wanted
        assert len({c.get("name") for c in cases}) == len(cases)
    schema = os.environ.get("EDGESFT_JUNIT_XSD")
    if schema:
        etree.XMLSchema(etree.parse(schema)).assertValid(root)
    return root


def states(root):
    """Name of each case -> its state."""
    return {c.get("name"): c[0].tag if len(c) else "pass" for c in root.iter("testcase")}


def test_every_kind_of_run(every):
    root = parse(every)
    assert [s.get("name") for s in root] == ["profile", "verdict", "calibration", "prediction", "another"]
    found = states(root)
    assert found["ttft p99"] == "skipped"
    assert found["tpot p99"] == "pass"
    assert found["calibration"] == "skipped"
    case = next(c for c in root.iter("testcase") if c.get("name") == "tpot p50")
    assert case.get("time") == "0.010000"


@pytest.mark.parametrize(
    ("verdict", "state"), [("pass", "pass"), ("fail", "failure"), ("inconclusive", "skipped")]
)
def test_a_verdict_is_the_state_of_its_metric(run, verdict, state):
    assert states(parse([run("verdict", verdict)]))["tpot"] == state


@pytest.mark.parametrize("verdict", ["not_comparable", "nothing_measured", "device_lost"])
def test_no_verdict_is_an_error(run, verdict):
    root = parse([run("verdict", verdict)])
    assert states(root) == {"gate": "error", "peak_memory": "pass"}
    assert "`cores` is `8` there" in root.find(".//error").get("message")


def test_an_open_verdict_that_counts_as_failed_is_a_failure(run):
    assert states(parse([run("verdict", "inconclusive", inconclusive="fail")]))["tpot"] == "failure"


def test_budgets(run):
    budget = {"name": "tpot_p50_ms", "unit": "ms", "limit": 9.0, "value": 10.0, "low": 9.9, "high": 10.1}
    entries = [
        {**budget, "verdict": "fail"},
        {**budget, "name": "load_ms", "low": 8.0, "verdict": "inconclusive"},
        {**budget, "name": "energy", "value": None, "low": None, "high": None, "verdict": "inconclusive"},
    ]
    empty = {"metrics": [], "base": None, "ratio": None, "interval": None}
    root = parse([run("verdict", "fail", budgets=entries, **empty)])
    found = states(root)
    assert found == {"budget tpot_p50_ms": "failure", "budget load_ms": "skipped", "budget energy": "skipped"}
    text = root.find(".//failure").get("message")
    assert text == "tpot_p50_ms is 10 ms (between 9.9 and 10.1), the budget is at most 9 ms"


def test_hostile_text_stays_text(hostile):
    root = parse(hostile[1])
    assert {e.tag for e in root.iter()} <= {
        *("testsuites", "testsuite", "properties", "property", "testcase", "failure", "error", "skipped"),
        *("system-out", "system-err"),
    }


def test_the_time_is_that_of_the_record(record, seal, tmp_path):
    from edgesft.stages import reporting

    folder = seal(tmp_path / "p", "profile", record("profile"))
    os.utime(Path(folder) / "profile.json", (1_700_000_000, 1_700_000_000))
    root = parse(reporting.collect([folder]))
    assert root[0].get("timestamp") == "2023-11-14T22:13:20"
