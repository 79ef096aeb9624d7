"""Baselines: what is kept, what is refused, what a comparison may say."""

import json
import multiprocessing
import os
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from edgesft.core import artifact
from edgesft.core.catalog import runtime
from edgesft.core.errors import ArtifactError, EdgeSFTError, UsageError
from edgesft.stages import baseline, profile
from edgesft.stages.baselines import stored
from edgesft.stages.baselines import text as text
from edgesft.stages.gating import verdict
from edgesft.stages.gating.verdict import Inconclusive, NotComparable, Regression

host = runtime("devices.host")


def seal(folder, kind, name, record):
    request = artifact.Request(kind, kind, {"folder": folder.name}, {})
    with artifact.create(folder, request) as (work, _):
        artifact.write_json(work.path / name, record)
    return folder


def percentiles(level):
    known = {"p50": level, "p90": 1.1 * level, "p99": None}
    low, high = ({k: v and v * f for k, v in known.items()} for f in (0.99, 1.01))
    return {**known, "low": low, "high": high, "reasons": {}, "samples": 300}


def device(**fields):
    refuse = {"cpu": "a", "cores": 2, "threads": 1, **fields}
    return {"schema": host.SCHEMA, "id": host.fingerprint_id(refuse), "refuse": refuse, "record": {}}


@pytest.fixture
def profiled(tmp_path):
    """Make a profile: 10 ms a token times `slower`, 1 % between processes."""
    made = []

    def make(slower=1.0, *, processes=5, kind="decoder", seed=0, cpu="a", drop=(), **workload):
        rng = np.random.default_rng([seed, len(made)])
        runs = []
        for _ in range(processes):
            level = 10 * slower * np.exp(0.01 * rng.standard_normal())
            one = {"ttft_ms": 5 * level, "step_ms": [level] * 20, "wall_ms": 25 * level}
            if kind == "encoder":
                one = {"call_ms": level, "step_ms": [], "wall_ms": level}
            runs.append({"load_ms": 100.0, "peak_bytes": 3_000_000, "wall_s": 1.0, "repetitions": [one] * 6})
        tables = ("ttft_ms", "tpot_ms") if kind == "decoder" else ("latency_ms",)
        record = {
            "schema": profile.SCHEMA,
            "kind": kind,
            **{t: percentiles(10 * slower) for t in tables},
            "load_ms": {"cold": 500.0, "warm": 100.0},
            "peak_memory_bytes": 3_000_000,
            "artifact_bytes": 1000,
            "quantize": "int4",
            "workload": {"prompt_tokens": 64, "decode_tokens": 20, **workload},
            "fingerprint": device(cpu=cpu),
            "notes": [],
            "operators": {"rows": [{"operator": "MatMul"}]},
            "energy": {"source": None, "joules_per_token": None},
            "samples": {"processes": runs},
        }
        made.append(1)
        record = {k: v for k, v in record.items() if k not in drop}
        return seal(tmp_path / f"profile-{len(made)}", "profile", profile.FILE, record)

    return make


@pytest.fixture
def gated(tmp_path):
    """Make a verdict of 12 pairs whose head takes 10 ms times `slower`."""
    made = []

    def make(slower=1.0, pairs=12, **changed):
        rng = np.random.default_rng(len(made))
        raw = []
        for pair in range(pairs):
            level = 10 * slower * np.exp(0.01 * rng.standard_normal())
            side = {"value": {"tpot": {"cpu": 0.9 * level, "wall": level}}, "load_ms": 50.0}
            side |= {"peak_bytes": 2_000_000, "samples_ms": {"wall": [level] * 9}}
            bad = None if pair else "the processor throttled for heat"
            raw.append({"pair": pair, "base": side, "head": side, "discarded": bad})
        record = {
            "schema": verdict.SCHEMA,
            "verdict": "pass",
            "metric": "tpot",
            "estimator": "median",
            "drill_slowdown": 0.0,
            "base": {"bytes": 900},
            "head": {"bytes": 1000, "digest": "sha256:x"},
            "workload": {"prompt_tokens": 64, "decode_tokens": 32},
            "fingerprint": device(),
            "raw": raw,
            **changed,
        }
        made.append(1)
        return seal(tmp_path / f"verdict-{len(made)}", "verdict", verdict.REPORT, record)

    return make


@pytest.fixture
def store(tmp_path):
    return tmp_path / "baselines"


def only(store, name="main"):
    (file,) = sorted((store / name).glob("*.json"))
    return file


def test_an_entry_keeps_what_a_comparison_needs_and_no_raw_samples(profiled, store):
    added = baseline.add(store, "main", profiled(), "abc123")
    file = only(store)
    assert (added["added"], added["file"], added["label"]) == (True, file.name, "abc123")
    content = json.loads(file.read_text())
    assert content["schema"] == 1
    assert content["sha256"] == artifact.digest_json({k: v for k, v in content.items() if k != "sha256"})
    assert file.stem.endswith("Z-" + content["digest"].removeprefix("sha256:")[:8])
    assert len(content["metrics"]["tpot"]["processes"]) == 5
    assert content["metrics"]["tpot"]["value"] == pytest.approx(10, rel=0.02)
    assert content["metrics"]["tpot_p90"]["processes"] == []
    assert "tpot_p99" not in content["metrics"]
    assert content["metrics"]["size"] == {
        "value": 1000.0, "low": None, "high": None, "processes": [], "exact": True,
    }  # fmt: skip
    assert not {"samples", "operators", "fingerprint"} & content["record"].keys()
    assert "step_ms" not in file.read_text()
    assert content["workload"]["threads"] == 1
    lines = file.read_text().splitlines()
    assert max(map(len, lines)) < 110
    assert lines == json.dumps(content, indent=1, sort_keys=True).splitlines()


def test_a_verdict_is_kept_as_its_head_without_discarded_pairs(gated, store):
    baseline.add(store, "main", gated())
    content = json.loads(only(store).read_text())
    assert content["primary"] == "tpot"
    assert len(content["metrics"]["tpot"]["processes"]) == 11
    assert content["metrics"]["tpot_cpu"]["value"] == pytest.approx(9, rel=0.02)
    assert content["metrics"]["peak_memory"]["value"] == 2_000_000
    assert "raw" not in content["record"]


def test_an_encoder_is_kept_by_its_latency(profiled, store):
    added = baseline.add(store, "main", profiled(kind="encoder"))
    assert added["metric"] == "latency"
    assert added["value"] == pytest.approx(10, rel=0.02)


def test_the_same_source_is_added_once(profiled, store):
    source = profiled()
    first = baseline.add(store, "main", source, "one")
    again = baseline.add(store, "main", source, "two")
    assert (again["added"], again["file"], again["label"]) == (False, first["file"], "one")
    assert len(list((store / "main").iterdir())) == 1
    assert baseline.add(store, "other", source)["added"]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a\\b", "-x", "a b", "x" * 65, "a\n"])
def test_names_are_plain_words(profiled, store, name):
    with pytest.raises(UsageError, match="cannot name a baseline"):
        baseline.add(store, name, profiled())
    assert not store.exists()


def test_what_measured_nothing_or_was_altered_is_refused(profiled, gated, store, tmp_path):
    for source, words in (
        (gated(pairs=1), "measured nothing"),
        (gated(drill_slowdown=5.0), "a drill"),
        (profiled(drop=("load_ms",)), "not a whole profile"),
        (seal(tmp_path / "m", "model", "x.json", {}), "of kind `model`"),
        (tmp_path / "none", "does not exist"),
    ):
        with pytest.raises(ArtifactError, match=words):
            baseline.add(store, "main", source)
    altered = profiled()
    file = altered / profile.FILE
    file.write_text(file.read_text().replace("1000", "1001", 1))
    with pytest.raises(ArtifactError, match="altered"):
        baseline.add(store, "main", altered)
    assert not store.exists()


def test_another_device_or_workload_does_not_continue_a_series(profiled, store):
    baseline.add(store, "main", profiled())
    for other, words in (
        (profiled(cpu="b"), "`cpu` is `a` there and `b` here"),
        (profiled(prompt_tokens=128), "`prompt_tokens` is `64` there and `128` here"),
    ):
        with pytest.raises(NotComparable, match=words) as caught:
            baseline.add(store, "main", other)
        assert caught.value.exit_code == 12
        assert caught.value.report["verdict"] == "not_comparable"
        with pytest.raises(NotComparable, match=words):
            baseline.diff(store, "main", other)
        assert baseline.add(store, "main", other, restart=True)["added"]
        (store / "main" / baseline.entries(store)[-1]["file"]).unlink()


def test_every_refused_field_of_the_fingerprint_is_named(profiled, store):
    baseline.add(store, "main", profiled())
    content = json.loads(only(store).read_text())
    for field in content["fingerprint"]["refuse"]:
        changed = json.loads(json.dumps(content))
        changed["fingerprint"]["refuse"][field] = "other"
        stored.write(only(store), changed)
        with pytest.raises(NotComparable, match=f"`{field}` is `other` there"):
            baseline.diff(store, "main", profiled())


def test_kinds_are_not_compared_with_each_other(profiled, gated, store):
    baseline.add(store, "main", profiled(decode_tokens=32))
    with pytest.raises(NotComparable, match="`kind` is `profile` there and `verdict` here"):
        baseline.diff(store, "main", gated())


def test_a_flipped_bit_or_a_cut_never_reads_as_something_else(profiled, store):
    baseline.add(store, "main", profiled())
    file = only(store)
    data, whole = file.read_bytes(), stored.read(file, "main").content
    rng = np.random.default_rng(0)
    flips = []
    for _ in range(400):
        place, bit = int(rng.integers(len(data))), int(rng.integers(8))
        flips.append(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
    cuts = [data[: len(data) * percent // 100] for percent in range(100)]
    caught = 0
    for broken in flips + cuts:
        file.write_bytes(broken)
        found = stored.read(file, "main")
        assert found.broken or found.content == whole
        caught += found.broken is not None
    assert caught >= 499


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(schema=2), "of schema 2, this EdgeSFT reads schema 1"),
        (lambda c: c.pop("fingerprint"), "fingerprint"),
        (lambda c: c["metrics"]["tpot"].update(value=-1.0), "metrics.tpot"),
        (lambda c: c["metrics"]["tpot"].update(processes=["x"]), "metrics.tpot.processes.0"),
        (lambda c: c.update(primary="speed"), "metrics.speed"),
        (lambda c: c.update(name="other"), "belongs to the baseline `other`"),
        (lambda c: c.update(added_at="yesterday"), "added_at"),
        (lambda c: c.update(added_at="2026-01-01"), "time zone"),
    ],
)
def test_a_broken_or_newer_entry_is_listed_and_never_compared(profiled, store, change, words):
    source = profiled()
    baseline.add(store, "main", source)
    file = only(store)
    content = json.loads(file.read_text())
    change(content)
    content["sha256"] = stored.digest(content)
    file.write_text(json.dumps(content))
    (listed,) = baseline.entries(store)
    assert words in listed["broken"]
    assert "BROKEN" in text.list_rows([listed])[0][5]
    for call in (
        lambda: baseline.diff(store, "main", source),
        lambda: baseline.show(store, "main", check=True),
        lambda: baseline.add(store, "main", profiled(seed=1)),
    ):
        with pytest.raises(NotComparable) as caught:
            call()
        assert caught.value.exit_code == 12
        assert words in caught.value.message
    assert baseline.trend_record(store, "main")["left_out"] == 1


@pytest.mark.parametrize("junk", [b"", b"[]", b"[" * 100_000, b'"x"', b"\xff", b"{}", b"null"])
def test_junk_is_broken_and_no_crash(profiled, store, junk):
    baseline.add(store, "main", profiled())
    (store / "main" / "9-junk.json").write_bytes(junk)
    assert [bool(e["broken"]) for e in baseline.entries(store)] == [False, True]
    with pytest.raises(NotComparable, match="9-junk"):
        baseline.diff(store, "main", profiled())


def test_links_are_not_followed(profiled, store, tmp_path):
    baseline.add(store, "main", profiled())
    (store / "main" / "9.json").symlink_to(only(store))
    assert baseline.entries(store)[-1]["broken"] == "it is not a plain file"
    (store / "away").symlink_to(tmp_path)
    with pytest.raises(ArtifactError, match="is a link"):
        baseline.prune(store, "away")


def test_a_difference_has_bounds_where_processes_allow_them(profiled, store):
    baseline.add(store, "main", profiled(), "abc")
    record = baseline.diff(store, "main", profiled(1.2))
    rows = {r["metric"]: r for r in record["rows"]}
    assert rows["tpot"]["ratio"] == pytest.approx(1.2, abs=0.02)
    assert 1.15 < rows["tpot"]["low"] < rows["tpot"]["ratio"] < rows["tpot"]["high"] < 1.25
    assert rows["tpot"]["verdict"] == rows["ttft"]["verdict"] == "higher"
    assert (rows["tpot_p90"]["low"], rows["tpot_p90"]["verdict"]) == (None, "no bound")
    assert rows["size"]["verdict"] == "same"
    assert rows["peak_memory"]["verdict"] == "same"
    assert json.loads(json.dumps(record)) == record
    cells = text.diff_rows(record)
    assert all(len(row) == len(text.DIFF_COLUMNS) for row in cells)
    assert "edgesft gate" in text.line(record)
    same = baseline.diff(store, "main", profiled(seed=3))
    assert next(r for r in same["rows"] if r["metric"] == "tpot")["verdict"] == "not shown"


def test_without_a_limit_a_difference_is_no_verdict_with_one_the_lower_bound_decides(profiled, store):
    baseline.add(store, "main", profiled())
    slow = profiled(1.2)
    baseline.judge(baseline.diff(store, "main", slow))
    baseline.judge(baseline.diff(store, "main", slow, fail_over=25))
    baseline.judge(baseline.diff(store, "main", slow, fail_over=10, metric="size"))
    with pytest.raises(Regression, match=r"tpot is 1\.\d+ times") as caught:
        baseline.judge(baseline.diff(store, "main", slow, fail_over=10))
    assert caught.value.exit_code == 10
    few = baseline.diff(store, "main", profiled(1.5, processes=2), fail_over=10)
    with pytest.raises(Inconclusive, match="too few processes") as caught:
        baseline.judge(few)
    assert caught.value.exit_code == 11
    with pytest.raises(NotComparable, match="`latency` is not measured"):
        baseline.diff(store, "main", slow, metric="latency")


def test_an_entry_is_chosen_by_label_or_file(profiled, store):
    first = baseline.add(store, "main", profiled(), "one")
    baseline.add(store, "main", profiled(2.0), "two")
    now = profiled(2.0)
    found = {a: baseline.diff(store, "main", now, against=a) for a in (None, "one", "two", first["file"])}
    assert found[None]["baseline"]["label"] == "two"
    assert found["one"]["baseline"] == found[first["file"]]["baseline"]
    assert found["one"]["rows"][0]["ratio"] == pytest.approx(2, rel=0.05)
    with pytest.raises(UsageError, match="no entry `tow`") as caught:
        baseline.diff(store, "main", now, against="tow")
    assert "two" in caught.value.hint


def test_a_step_shows_in_the_trend(profiled, store):
    for index in range(16):
        baseline.add(store, "main", profiled(1.0 if index < 8 else 1.1), f"c{index}")
    record = baseline.show(store, "main", check=True)
    (change,) = record["trend"]["changes"]
    assert (change["index"], change["label"]) == (8, "c8")
    assert change["percent"] == pytest.approx(10, abs=2)
    assert [p["label"] for p in record["trend"]["points"]] == [f"c{i}" for i in range(16)]
    point = record["trend"]["points"][0]
    assert point["low"] <= point["value"] <= point["high"]
    rows = text.show_rows(record)
    assert [bool(r[4]) for r in rows] == [i == 8 for i in range(16)]
    assert "1 change point" in text.show_line(record)
    assert baseline.trend_record(store, "main") == record["trend"]
    assert baseline.trend_record(store, "main", "size")["changes"] == []
    with pytest.raises(UsageError, match="no metric `tpto`"):
        baseline.show(store, "main", metric="tpto")


def test_a_trend_begins_anew_where_the_device_changed(profiled, store):
    for _ in range(3):
        baseline.add(store, "main", profiled())
    baseline.add(store, "main", profiled(3.0, cpu="b"), restart=True)
    found = baseline.trend_record(store, "main")
    assert (len(found["points"]), found["left_out"], found["changes"]) == (1, 3, [])
    assert "3 left out" in text.show_line({"name": "main", "trend": found})


def test_the_trend_is_what_a_report_takes(profiled, store, tmp_path):
    from edgesft.core import records

    baseline.add(store, "main", profiled())
    records.check("trend", baseline.trend_record(store, "main"), tmp_path)
    records.check("baseline", json.loads(only(store).read_text()), tmp_path)


def test_prune_keeps_the_newest_and_what_is_broken(profiled, store):
    for index in range(6):
        baseline.add(store, "main", profiled(seed=index), f"c{index}")
    files = sorted((store / "main").glob("*.json"))
    files[0].write_text("{")
    planned = baseline.prune(store, "main", keep=2, dry_run=True)
    assert planned == [f"main/{f.name}" for f in files[1:4]]
    assert len(list((store / "main").glob("*.json"))) == 6
    assert baseline.prune(store, keep=2) == planned
    assert sorted((store / "main").glob("*.json")) == [files[0], *files[4:]]
    assert baseline.prune(store, keep=1, older_than_days=1) == []
    content = json.loads(files[4].read_text())
    stored.write(files[4], {**content, "added_at": (datetime.now(UTC) - timedelta(days=2)).isoformat()})
    assert baseline.prune(store, keep=1, older_than_days=1) == [f"main/{files[4].name}"]
    with pytest.raises(UsageError, match="at least 1"):
        baseline.prune(store, keep=0)


def test_what_is_not_there_is_said(profiled, store, tmp_path):
    for call in (baseline.entries, baseline.prune, lambda s: baseline.show(s, "main")):
        with pytest.raises(ArtifactError, match="not a folder of baselines"):
            call(store)
    baseline.add(store, "main", profiled())
    with pytest.raises(UsageError, match="no baseline `mian`") as caught:
        baseline.show(store, "mian")
    assert "main" in caught.value.hint
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        baseline.add(file, "main", profiled())


def _write_one(store, source, index):
    baseline.add(store, "main", source, f"c{index}")


def test_writers_take_turns(profiled, store):
    sources = [profiled(seed=i) for i in range(4)]
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_one, args=(store, s, i)) for i, s in enumerate(sources)]
    for each in writers:
        each.start()
    for each in writers:
        each.join(30)
    assert [w.exitcode for w in writers] == [0] * 4
    assert all(e["broken"] is None for e in baseline.entries(store))
    assert len(baseline.entries(store)) == 4


def test_a_writer_waits_for_the_lock_and_then_says_so(profiled, store, monkeypatch):
    from filelock import FileLock

    baseline.add(store, "main", profiled())
    monkeypatch.setattr(baseline, "WAIT", 0.05)
    with FileLock(store / baseline.LOCK), pytest.raises(ArtifactError, match="locked by another process"):
        baseline.add(store, "main", profiled())


def test_a_killed_writer_leaves_nothing_that_counts(profiled, store, monkeypatch):
    baseline.add(store, "main", profiled())
    left = store / "main" / ".2026.json.1.tmp"
    left.write_text("{")
    assert len(baseline.entries(store)) == 1
    baseline.add(store, "main", profiled())
    assert not left.exists()
    before = sorted(p.name for p in (store / "main").iterdir())

    source = profiled()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EdgeSFTError, match="no room left") as caught:
        baseline.add(store, "main", source)
    assert caught.value.exit_code == 3
    assert sorted(p.name for p in (store / "main").iterdir()) == before
    assert ".lock" in (store / ".gitignore").read_text()
