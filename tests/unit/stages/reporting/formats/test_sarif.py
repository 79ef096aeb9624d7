"""SARIF: levels, rules, and the form that code scanning expects."""

import json
import os
import re
from pathlib import Path

import jsonschema
import pytest

from edgesft.stages.reporting.findings import CHECKS
from edgesft.stages.reporting.formats import sarif

TEXT = {"type": "object", "required": ["text"], "properties": {"text": {"type": "string", "minLength": 1}}}
FORM = {
    "type": "object",
    "required": ["version", "runs", "$schema"],
    "additionalProperties": False,
    "properties": {
        "$schema": {"type": "string"},
        "version": {"const": "2.1.0"},
        "runs": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["tool", "results"],
                "additionalProperties": False,
                "properties": {
                    "tool": {
                        "type": "object",
                        "properties": {
                            "driver": {
                                "type": "object",
                                "required": ["name", "version", "rules"],
                                "properties": {
                                    "rules": {
                                        "type": "array",
                                        "items": {
                                            "type": "object",
                                            "required": ["id", "shortDescription", "help"],
                                            "properties": {"shortDescription": TEXT, "help": TEXT},
                                        },
                                    }
                                },
                            }
                        },
                    },
                    "columnKind": {"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
                    "invocations": {"type": "array"},
                    "artifacts": {"type": "array"},
                    "results": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["ruleId", "level", "message", "locations"],
                            "additionalProperties": False,
                            "properties": {
                                "ruleId": {"type": "string"},
                                "ruleIndex": {"type": "integer", "minimum": 0},
                                "level": {"enum": ["error", "warning", "note"]},
                                "message": TEXT,
                                "locations": {"type": "array", "minItems": 1},
                                "partialFingerprints": {"type": "object"},
                            },
                        },
                    },
                },
            },
        },
    },
}


def parse(runs):
    """The one run of the log, its form checked."""
    log = json.loads(sarif.render(runs))
    jsonschema.validate(log, FORM)
    public = os.environ.get("EDGESFT_SARIF_SCHEMA")
    if public:
        schema = json.loads(Path(public).read_text(encoding="utf-8"))
        jsonschema.Draft4Validator(schema).validate(log)
    found = log["runs"][0]
    rules = [rule["id"] for rule in found["tool"]["driver"]["rules"]]
    identities = set()
    for result in found["results"]:
        assert rules[result["ruleIndex"]] == result["ruleId"]
        where = result["locations"][0]["physicalLocation"]["artifactLocation"]
        assert found["artifacts"][where["index"]]["location"]["uri"] == where["uri"]
        assert re.fullmatch(r"(?!/)[A-Za-z0-9._~%/-]+", where["uri"])
        identities.add(result["partialFingerprints"]["edgesftCheck/v1"])
    assert len(identities) == len(found["results"])
    return found


@pytest.mark.parametrize(
    ("verdict", "level"),
    [("fail", "error"), ("inconclusive", "warning"), ("pass", None), ("not_comparable", "error")],
)
def test_levels(run, verdict, level):
    found = parse([run("verdict", verdict)])
    levels = {r["ruleId"]: r["level"] for r in found["results"]}
    rule = "edgesft/comparable" if verdict == "not_comparable" else "edgesft/latency"
    assert levels.get(rule) == level
    assert levels["edgesft/memory"] == "note"  # more memory, but it was not asked to block
    assert found["invocations"] == [{"executionSuccessful": verdict != "not_comparable"}]


def test_every_kind_of_run(every):
    found = parse(every)
    assert {r["ruleId"] for r in found["results"]} == {
        "edgesft/percentile",
        "edgesft/memory",
        "edgesft/calibration",
        "edgesft/prediction",  # it is tight
    }


def test_locations_are_relative_to_the_working_directory(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = parse([run("verdict", "fail", name="a b")])
    assert found["artifacts"] == [{"location": {"uri": "out/a%20b/verdict.json"}}]


def test_brackets_and_braces_make_no_links_and_no_placeholders(run):
    text = "see [here](http://e) and {0}"
    found = parse([run("profile", notes=[text])])
    message = next(r["message"]["text"] for r in found["results"] if r["ruleId"] == "edgesft/profile")
    assert message == "profile: see \\[here\\](http://e) and {{0}}"


def test_hostile_text_stays_text(hostile):
    assert parse(hostile[1])["results"]


def test_every_check_has_a_rule():
    assert all(title and text and "\n" not in title for title, text in CHECKS.values())
