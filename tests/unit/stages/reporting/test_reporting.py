"""Reports: which folders are taken, what is refused, and that files appear together or not at all."""

import json
import subprocess
import sys

import pytest

from edgesft.core import artifact
from edgesft.core.artifact import Request
from edgesft.core.errors import ArtifactError, UsageError
from edgesft.stages import reporting
from edgesft.stages.reporting import Run, findings

PROFILE = {
    "schema": 2,
    "kind": "decoder",
    "load_ms": {"cold": 1.0, "warm": 1.0},
    "peak_memory_bytes": 1,
    "artifact_bytes": 1,
    "workload": {},
    "notes": [],
    "fingerprint": {"schema": 1, "id": "x", "refuse": {"cores": 4}, "record": {}},
}
SIDE = {"ref": "x", "kind": "onnx", "digest": "x", "bytes": 1}
VERDICT = {
    "schema": 2,
    "verdict": "pass",
    "metric": "tpot",
    "ratio": 1.0,
    "interval": [0.99, 1.01],
    "pairs": 8,
    "decided_by": "cpu",
    "base": SIDE,
    "head": SIDE,
    "fingerprint": PROFILE["fingerprint"],
    "metrics": [],
}


def seal(folder, kind="profile", record=None, file=None):
    with artifact.create(folder, Request(kind, kind, {}, {})) as (work, _):
        name = file or reporting.FILES.get(kind, "some.json")
        artifact.write_json(work.path / name, PROFILE if record is None else record)
    return folder


def test_a_folder_yields_all_that_is_in_it(tmp_path):
    seal(tmp_path / "run" / "profile-b")
    seal(tmp_path / "run" / "profile-a")
    seal(tmp_path / "run" / "gate", "verdict", VERDICT)
    seal(tmp_path / "run" / "tuned", "model")
    seal(tmp_path / "run" / "fleet" / "pi" / "profile-a")
    (tmp_path / "run" / ".partial").mkdir()
    runs = reporting.collect([tmp_path / "run"])
    assert [(r.name, r.kind) for r in runs] == [
        ("pi/profile-a", "profile"),
        ("gate", "verdict"),
        ("run/profile-a", "profile"),
        ("profile-b", "profile"),
    ]
    assert runs[0].record == PROFILE


def test_folders_named_twice_are_one(tmp_path):
    seal(tmp_path / "p")
    assert len(reporting.collect([tmp_path / "p", tmp_path / "p"])) == 1


def test_nothing_to_report_says_what_was_looked_for(tmp_path):
    seal(tmp_path / "tuned", "model")
    with pytest.raises(
        ArtifactError, match=r"looked for artefacts of kind `profile`, `verdict`.*`evaluation`$"
    ):
        reporting.collect([tmp_path])
    with pytest.raises(ArtifactError, match="in no folder"):
        reporting.collect([])
    with pytest.raises(ArtifactError, match="is of kind `model`, expected `profile` or"):
        reporting.collect([tmp_path / "tuned"])
    with pytest.raises(ArtifactError, match="does not exist"):
        reporting.collect([tmp_path / "none"])


def test_what_was_altered_is_refused(tmp_path):
    folder = seal(tmp_path / "p")
    text = (folder / "profile.json").read_text()
    (folder / "profile.json").write_text(text.replace("decoder", "encoder"))
    with pytest.raises(ArtifactError, match="was altered"):
        reporting.collect([tmp_path])


@pytest.mark.parametrize(
    ("schema", "hint"),
    [(1, "make the profile again"), (3, "pip install --upgrade"), (None, "again"), ("2", "again")],
)
def test_another_schema_is_refused(tmp_path, schema, hint):
    seal(tmp_path / "p", record={**PROFILE, "schema": schema})
    with pytest.raises(
        ArtifactError, match=f"a profile of schema {schema}, this EdgeSFT reads schema 2"
    ) as caught:
        reporting.collect([tmp_path / "p"])
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("notes", "text"),
        ("load_ms", None),
        ("fingerprint", {}),
        ("peak_memory_bytes", "1"),
        ("operators", {"rows": 1}),
    ],
)
def test_a_broken_record_is_refused_with_the_field(tmp_path, field, value):
    seal(tmp_path / "p", record={**PROFILE, field: value})
    with pytest.raises(ArtifactError, match=f"profile.json` is not a profile: `{field}"):
        reporting.collect([tmp_path / "p"])


def test_a_record_that_is_missing(tmp_path):
    seal(tmp_path / "p", file="other.json")
    with pytest.raises(ArtifactError, match="without its record"):
        reporting.collect([tmp_path / "p"])


def test_every_format_writes_its_file(tmp_path):
    runs = reporting.collect([seal(tmp_path / "p")])
    names = list(reporting.known())
    assert names == ["github", "github-action-benchmark", "html", "json", "junit", "markdown", "sarif"]
    written = reporting.render(runs, names, tmp_path / "new" / "r")
    assert sorted(p.name for p in written) == sorted(p.name for p in (tmp_path / "new" / "r").iterdir())
    assert len(written) == 7
    again = reporting.render(runs, ["json"], tmp_path / "new" / "r")
    assert json.loads(again[0].read_text())["runs"][0]["name"] == "p"


def test_an_unknown_format_writes_nothing(tmp_path):
    runs = reporting.collect([seal(tmp_path / "p")])
    with pytest.raises(UsageError, match="no report format `junitt`") as caught:
        reporting.render(runs, ["html", "junitt"], tmp_path / "r")
    assert caught.value.hint == "did you mean `junit`?"
    with pytest.raises(UsageError, match="no report format was named"):
        reporting.render(runs, [], tmp_path / "r")
    with pytest.raises(UsageError):
        reporting.render(runs, ["../reporting"], tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    runs = reporting.collect([seal(tmp_path / "p")])
    count = iter(range(10))

    def full(path, data):
        if next(count) == 1:
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr(artifact, "write_bytes", full)
    with pytest.raises(ArtifactError, match="no room left"):
        reporting.render(runs, ["json", "junit"], tmp_path / "r")
    assert not (tmp_path / "r").exists()
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "mine.txt").write_text("kept")
    count = iter(range(10))
    with pytest.raises(ArtifactError, match="no room left"):
        reporting.render(runs, ["json", "junit"], tmp_path / "r")
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["mine.txt"]


def test_a_report_never_goes_into_an_artefact_or_a_file(tmp_path):
    folder = seal(tmp_path / "p")
    runs = reporting.collect([folder])
    with pytest.raises(ArtifactError, match="would alter it"):
        reporting.render(runs, ["json"], folder)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="is a file"):
        reporting.render(runs, ["json"], tmp_path / "file")
    (tmp_path / "r" / "report.json").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="is a folder, expected a file"):
        reporting.render(runs, ["json", "junit"], tmp_path / "r")
    assert not (tmp_path / "r" / "junit.xml").exists()
    assert reporting.collect([folder])


def test_uris_are_relative_and_hold_no_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Run("n", "profile", {}, tmp_path / "a" / "b c").uri == "a/b%20c/profile.json"
    assert Run("n", "profile", {}, tmp_path.parent / "x:y").uri == "x%3Ay/profile.json"
    assert Run("n", "trend", {}, tmp_path).uri == "."


def entry(verdict, clock=None, blocking=True, metric="tpot", **more):
    named = {"clock": clock} if clock else {}
    return {"metric": metric, "verdict": verdict, "blocking": blocking, "ratio": 1.1, **named, **more}


def outcomes(verdict, *entries, **more):
    run = Run("v", "verdict", {**VERDICT, "verdict": verdict, "metrics": list(entries), **more}, None)
    return {f.name: f.outcome for f in findings.findings([run])}


def test_findings_follow_the_verdict():
    cpu, wall = entry("pass", "cpu"), entry("fail", "wall")
    assert outcomes("pass", wall, cpu) == {"tpot": "pass"}
    assert outcomes("fail", entry("fail", "cpu"), entry("pass", "wall")) == {"tpot": "fail"}
    # the clock that decided says one thing and its last look another: the gate's word counts
    assert outcomes("fail", entry("inconclusive", "cpu")) == {"tpot": "fail"}
    memory = entry("fail", metric="peak_memory")
    assert outcomes("fail", cpu, memory) == {"tpot": "pass", "peak_memory": "fail"}
    assert outcomes("pass", cpu, {**memory, "blocking": False}) == {"tpot": "pass", "peak_memory": "note"}
    assert outcomes("inconclusive", entry("inconclusive", "cpu"), inconclusive="pass") == {"tpot": "note"}
    assert outcomes("device_lost", cpu) == {"gate": "error", "tpot": "note"}


def test_a_profile_says_what_a_reader_must_know():
    record = {**PROFILE, "warmup": {"steady": False}, "throttled": {"reasons": ["heat"]}}
    notes = ["no steady state: latencies still changed at the end of the warm-up cut", "busy"]
    found = findings.findings([Run("p", "profile", {**record, "notes": notes}, None)])
    assert [(f.check, f.outcome) for f in found] == [
        ("steady-state", "inconclusive"),
        ("throttled", "inconclusive"),
        ("profile", "note"),
    ]


def test_trend_is_checked():
    record = {"schema": 1, "metric": "tpot", "unit": "ms", "points": [], "changes": []}
    assert reporting.trend(record).kind == "trend"
    with pytest.raises(ArtifactError, match="not a trend: `points`"):
        reporting.trend({**record, "points": None})


def test_looking_is_free():
    code = (
        "import sys; from edgesft.stages import reporting; reporting.known();"
        "from edgesft.stages.reporting import findings, plots, tables;"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'matplotlib', 'jinja2', 'scipy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
