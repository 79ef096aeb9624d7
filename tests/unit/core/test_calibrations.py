"""The store of calibrations: damage is seen, what fits is found, what is old is not trusted."""

import json
import threading
from datetime import UTC, datetime, timedelta

import pytest

from edgesft.core import calibrations as c
from edgesft.core.errors import ArtifactError

NOW = datetime.now(UTC)
HERE = "sha256:" + "ab" * 32
WORK = {"prompt_tokens": 64, "decode_tokens": 32, "repetitions": 2}
ABOUT = {"kind": "onnx", "quantize": "int4", "pattern": None, "digest": "sha256:one", "ref": "out/x"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    folder = tmp_path / "store"
    monkeypatch.setenv("EDGESFT_CALIBRATIONS", str(folder))
    return folder


def record(**more):
    values = {
        **{"armed": True, "why": "quiet", "metric": "tpot", "estimator": "p10", "clock": "both"},
        **{"margin_percent": 5.0, "tolerance_percent": 2.0, "alpha": 0.01, "beta": 0.05, "max_pairs": 48},
        **{"margin_met_percent": 4.0, "workload": WORK, "artifact": ABOUT, "noise": 0.0123456789},
        "fingerprint": {"schema": 1, "id": HERE, "refuse": {"cpu": "x"}},
        **c.dates(NOW),
    }
    return {**values, **more}


def find(metric="tpot", where=HERE, work=WORK, **about):
    return c.find(where, metric, work, {**ABOUT, **about})


def test_what_is_saved_is_found_and_read_back(home):
    file = c.save(record())
    assert file.parent == home == c.folder()
    found = find()
    assert found == c.read(file)
    assert {**found, "schema": 1} == c.seal(record())
    assert found["noise"] == 0.0123456789
    assert {p.name for p in home.iterdir()} <= {file.name, ".lock"}  # nothing temporary is left


def test_the_folder_is_the_users_unless_named(monkeypatch):
    monkeypatch.delenv("EDGESFT_CALIBRATIONS")
    assert c.folder().parts[-2:] == ("edgesft", "calibrations")


def test_a_folder_that_cannot_be_made_is_said_so(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGESFT_CALIBRATIONS", str(tmp_path / "file" / "store"))
    with pytest.raises(ArtifactError, match="cannot be written"):
        c.save(record())
    assert find() is None


@pytest.mark.parametrize(
    "ask",
    [
        {"metric": "ttft"},
        {"where": "sha256:" + "cd" * 32},
        {"where": HERE[:-1] + "c"},  # another device whose file would have the same name
        {"work": {**WORK, "decode_tokens": 64}},
        {"work": {**WORK, "batch": 4}},
        {"quantize": "none"},
        {"pattern": "2:4"},
        {"kind": "model"},
    ],
)
def test_another_device_metric_workload_or_class_is_not_found(ask):
    c.save(record())
    assert find() is not None
    assert find(**ask) is None


def test_seed_and_what_is_not_asked_for_are_no_part_of_the_workload():
    c.save(record())
    assert find(work={**WORK, "seed": 7, "batch": None, "shapes": {}}) is not None
    assert find(digest="sha256:other", ref="elsewhere") is not None


def test_the_newest_is_found_but_the_very_artefact_comes_first_and_what_expired_last():
    for days, more in ((3, {}), (1, {}), (2, {"digest": "sha256:two"})):
        c.save(record(**c.dates(NOW - timedelta(days=days)), why=f"{days}", artifact={**ABOUT, **more}))
    assert find()["why"] == "1"
    assert find(digest="sha256:two")["why"] == "2"
    assert find(digest="sha256:three")["why"] == "1"
    c.save(record(**c.dates(NOW - timedelta(days=40)), why="old", artifact={**ABOUT, "digest": "sha256:old"}))
    assert find(digest="sha256:old")["why"] == "1"


def test_one_that_is_not_armed_is_found_too():
    c.save(record(**c.dates(NOW - timedelta(days=1))))
    c.save(record(armed=False))
    assert find()["armed"] is False


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "not readable"),
        (lambda text: "", "not readable"),
        (lambda text: "[1]", "not a JSON object"),
        (lambda text: "{}", "not a calibration"),
        (lambda text: text.replace('"margin_met_percent": 4.0', '"margin_met_percent": 3.0'), "SHA-256"),
        (lambda text: text.replace('"armed": true', '"armed": false'), "SHA-256"),
        (lambda text: text.replace('"schema": 1,\n  "content"', '"schema": 2,\n  "content"'), "up to 1"),
        (lambda text: json.dumps({**json.loads(text), "schema": 99}), "schema 99"),
        (lambda text: json.dumps({**json.loads(text), "schema": "1"}), "not a calibration"),
        (lambda text: json.dumps({**json.loads(text), "extra": 1}), "SHA-256"),
    ],
)
def test_damaged_and_newer_files_are_refused_and_passed_over(damage, words, capsys):
    file = c.save(record())
    file.write_text(damage(file.read_text()))
    with pytest.raises(ArtifactError, match=words) as caught:
        c.read(file)
    assert caught.value.exit_code == 3
    assert str(file) in caught.value.message
    assert find() is None
    assert "passed over" in capsys.readouterr().err


def test_every_flipped_bit_is_seen():
    file = c.save(record())
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x01]) + whole[place + 1 :])
        try:
            found = c.read(file)
        except ArtifactError:
            continue
        assert found == json.loads(whole)  # white space


def test_a_record_without_its_fields_is_refused(tmp_path):
    part = record()
    del part["clock"]
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(c.seal(part)))
    with pytest.raises(ArtifactError, match="no `clock`"):
        c.read(tmp_path)  # a folder with a calibration.json stands for it
    with pytest.raises(ArtifactError, match="does not exist"):
        c.read(tmp_path / "nowhere")


def test_two_writers_at_once_do_no_harm(home):
    records = [record(seed=k, **c.dates(NOW - timedelta(minutes=k))) for k in range(12)]
    writers = [threading.Thread(target=c.save, args=(r,)) for r in records for _ in "ab"]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
    assert len([p for p in home.iterdir() if p.name != ".lock"]) == 12
    assert find()["seed"] == 0


def test_it_expires_after_thirty_days_and_not_before():
    made = c.dates(NOW)
    assert not c.expired(made, NOW + timedelta(days=29, hours=23))
    assert c.expired(made, NOW + timedelta(days=30, seconds=1))
    assert c.expired(c.dates(NOW, days=1), NOW + timedelta(days=1, seconds=1))
    assert not c.expired(made)
    assert made["made_at"].endswith("+00:00")


def test_dates_that_cannot_be_true_count_as_expired():
    assert c.expired(c.dates(NOW + timedelta(days=2)), NOW)  # made in the future: a clock was wrong
    assert not c.expired(c.dates(NOW + timedelta(hours=2)), NOW)
    for broken in ({}, {"made_at": "x", "expires_at": "y"}, {"made_at": None, "expires_at": None}):
        assert c.expired(broken, NOW)
    assert c.expired({"made_at": "2026-01-01", "expires_at": "2999-01-01"}, NOW)  # no time zone


@pytest.mark.parametrize(
    ("met", "margin", "pairs", "words"),
    [
        (5.0, 5.0, 48, None),
        (5.0, 10.0, 96, None),
        (4.5, 4.5, 48, None),
        (8.0, 5.0, 48, "5 % is not kept here, one of 8 % would be"),
        (5.0, 5.0, 24, "up to 48 pairs"),
        (None, 50.0, 48, "too noisy for any margin"),
    ],
)
def test_a_gate_relies_only_on_what_was_promised(met, margin, pairs, words):
    found = c.refusal(record(margin_met_percent=met), margin, pairs)
    assert found is None if words is None else words in found
