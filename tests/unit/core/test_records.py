"""The published schemas: they match the code, and the checks of records agree with them."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest

from edgesft.core import records
from edgesft.core.errors import ArtifactError

SCHEMAS = Path(__file__).parents[3] / "docs" / "schemas"
TREND = {
    "schema": 1,
    "metric": "tpot",
    "unit": "ms",
    "points": [{"name": "a", "value": 1.0}, {"name": "b", "value": None, "new field": 1}],
    "changes": [{"index": 1, "ratio": 1.1}],
}


def test_the_published_files_match_the_code(tmp_path):
    written = records.write_schemas(tmp_path)
    assert {p.name for p in written} == {p.name for p in SCHEMAS.iterdir()}
    for file in written:
        assert file.read_text() == (SCHEMAS / file.name).read_text(), file.name


@pytest.mark.parametrize("name", records.RECORDS)
def test_schemas_are_valid_and_say_what_they_are(name):
    schema = records.json_schema(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    version = records.RECORDS[name][1]
    assert schema["$id"] == f"urn:edgesft:schema:{name}:{version}"
    assert schema["version"] == version
    assert schema["properties"]["schema"]["const"] == version
    assert "schema" in schema["required"]
    assert schema["description"]
    assert "additionalProperties" not in schema  # producers may add fields


def both(record):
    """Whether the check passes, after asking the published schema, which must agree."""
    fits = jsonschema.Draft202012Validator(records.json_schema("trend")).is_valid(record)
    try:
        records.check("trend", record, Path("trend.json"))
    except ArtifactError:
        assert not fits
        return False
    assert fits
    return True


def test_new_fields_are_allowed():
    assert both({**TREND, "more": {"x": 1}})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["schema"], 2),
        (["schema"], "1"),
        (["unit"], None),
        (["points"], {}),
        (["points", 0, "value"], "1.0"),
        (["points", 0], {"value": 1.0}),
        (["changes", 0, "index"], "1"),
        (["changes"], None),
    ],
)
def test_broken_fields_are_refused_by_both(path, value):
    record = copy.deepcopy(TREND)
    assert both(record)
    at = record
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    assert not both(record)


def test_the_message_names_file_and_field():
    record = json.loads(json.dumps(TREND))
    record["points"][1]["value"] = "x"
    with pytest.raises(ArtifactError, match=r"`a/trend.json` is not a trend: `points.1.value`"):
        records.check("trend", record, Path("a/trend.json"))
