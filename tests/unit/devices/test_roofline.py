"""The measured roofline: kept by fingerprint, bounded by the data sheet, and really measured once."""

import json
import os

import numpy as np
import pytest

from edgesft.core.errors import DeviceError
from edgesft.devices import roofline
from edgesft.devices.spec import DeviceSpec

RATES = {"copy": 20.0, "read": 11.0, "cached": 60.0, "fp32": 150.0, "int8": 900.0}


@pytest.fixture
def counted(tmp_path, monkeypatch):
    """An empty cache folder, and a list of what was measured instead of measuring."""
    monkeypatch.setenv("EDGESFT_CACHE", str(tmp_path))
    asked = []

    def child(kind, threads, size):
        asked.append((kind, threads, size))
        return {"rate": RATES[kind], "spread": 0.02}

    monkeypatch.setattr(roofline, "_child", child)
    monkeypatch.setattr(roofline, "last_level_cache", lambda: 32 << 20)
    return asked


def test_it_is_measured_once_for_a_number_of_threads(counted, tmp_path):
    one = roofline.measured(1)
    assert roofline.measured(1) == json.loads(json.dumps(one))
    assert [kind for kind, *_ in counted] == ["copy", "read", "fp32", "int8"]
    roofline.measured(2)
    assert len(counted) == 8
    assert {threads for _, threads, _ in counted} == {1, 2}
    assert len(list((tmp_path / "roofline").glob("*.json"))) == 2


def test_the_record(counted):
    found = roofline.measured(1)
    assert (found["copy_gbs"], found["read_gbs"], found["cache_read_gbs"]) == (20.0, 11.0, None)
    assert found["gemm_gflops"] == {"fp32": 150.0, "int8": 900.0}
    assert found["fingerprint_id"].startswith("sha256:")
    assert found["threads"] == 1
    assert "measured" in found["source"]


def test_refresh_measures_anew(counted):
    roofline.measured(1)
    roofline.measured(1, refresh=True)
    assert len(counted) == 8


def test_another_fingerprint_measures_anew(counted, monkeypatch):
    roofline.measured(1)
    monkeypatch.setattr(roofline.host, "governor", lambda: "powersave of another day")
    roofline.measured(1)
    assert len(counted) == 8


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"schema": 99}', '{"schema": 1, "fingerprint_id": "sha256:other"}'],
)
def test_a_broken_record_is_measured_anew(counted, tmp_path, text):
    found = roofline.measured(1)
    file = next((tmp_path / "roofline").glob("*.json"))
    file.write_text(text)
    assert roofline.measured(1)["copy_gbs"] == found["copy_gbs"]
    assert len(counted) == 8
    assert json.loads(file.read_text())["schema"] == roofline.SCHEMA


def test_a_record_without_a_rate_is_measured_anew(counted, tmp_path):
    found = roofline.measured(1)
    file = next((tmp_path / "roofline").glob("*.json"))
    file.write_text(json.dumps({**found, "copy_gbs": 0}))
    assert roofline.measured(1)["copy_gbs"] == 20.0


def test_a_cache_folder_that_cannot_be_made_is_no_obstacle(counted, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGESFT_CACHE", str(tmp_path / "file"))
    assert roofline.measured(1)["copy_gbs"] == 20.0
    assert "cannot be used" in capsys.readouterr().err


def test_a_cache_that_holds_models_has_a_rate_of_its_own(counted, monkeypatch):
    monkeypatch.setattr(roofline, "last_level_cache", lambda: 128 << 20)
    assert roofline.measured(1)["cache_read_gbs"] == 60.0
    assert ("cached", 1, 32 << 20) in counted


def test_no_runtime_no_int8(counted, monkeypatch):
    monkeypatch.setattr(roofline.host, "installed", lambda _: None)
    found = roofline.measured(1)
    assert set(found["gemm_gflops"]) == {"fp32"}
    assert "int8" not in found["source"]


@pytest.mark.parametrize(("bandwidth", "ghz", "words"), [(15.0, 2.0, ["a cache"]), (30.0, 0.5, ["boosts"])])
def test_more_than_the_data_sheet_is_noted(counted, monkeypatch, bandwidth, ghz, words):
    spec = DeviceSpec(
        id="x", name="x", kind="cpu", units=2, ghz=ghz, bandwidth_gbs=bandwidth, ops={"fp32": 64}
    )
    monkeypatch.setattr(roofline.host, "spec", lambda: spec)
    notes = roofline.measured(1)["notes"]
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))


def test_passes_that_differ_are_noted(counted, monkeypatch):
    monkeypatch.setattr(roofline, "_child", lambda kind, *_: {"rate": RATES[kind], "spread": 0.4})
    (note,) = roofline.measured(1)["notes"]
    assert "busy" in note
    assert "`fp32` 40 %" in note


MIB = 1 << 20


@pytest.mark.parametrize(
    ("cached", "available", "size", "notes"),
    [
        (32 * MIB, 64 << 30, 256 * MIB, 0),
        (100 * MIB, 64 << 30, 400 * MIB, 0),
        (480 * MIB, 64 << 30, 1920 * MIB, 0),
        (4096 * MIB, 64 << 30, 2048 * MIB, 1),
        (0, 400 * MIB, 100 * MIB, 0),
        (480 * MIB, 800 * MIB, 200 * MIB, 1),
    ],
)
def test_the_working_set_is_beyond_the_cache_and_within_the_memory(cached, available, size, notes):
    found, said = roofline.working_set(cached, available)
    assert found == size
    assert len(said) == notes


def test_a_machine_without_memory_is_refused():
    with pytest.raises(DeviceError, match="MiB of memory"):
        roofline.working_set(0, 30 * MIB)


def test_the_largest_cache_is_found(tmp_path):
    home = tmp_path / "sys/devices/system/cpu/cpu0/cache"
    for index, size in enumerate(("48K", "2048K", "480M", "rubbish")):
        (home / f"index{index}").mkdir(parents=True)
        (home / f"index{index}/size").write_text(size + "\n")
    assert roofline.last_level_cache(tmp_path) == 480 << 20
    assert roofline.last_level_cache(tmp_path / "nothing") == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_slices_cover_everything_once(threads):
    seen = np.zeros(1000, dtype=int)

    def run(part):
        seen[part] += 1

    roofline._each_slice(threads, seen.size, run)()
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ("kind", "work"), [("_copy", 4e6), ("_read", 4e6), ("_fp32", 2 * 64**3), ("_int8", 2 * 64**3)]
)
def test_the_work_is_what_the_rate_is_made_of(kind, work, monkeypatch):
    monkeypatch.setattr(roofline, "EDGE", 64)
    amount, run = getattr(roofline, kind)(1, 4_000_000)
    assert amount == work
    run()


def test_the_child_s_median_is_a_rate(monkeypatch, capsys):
    ticks = iter(x / 10 for x in range(1000))
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(roofline, "_copy", lambda *_: (3e9, lambda: None))
    roofline.main("copy", 1, 1 << 20)
    found = json.loads(capsys.readouterr().out)
    assert found["rate"] == pytest.approx(30, rel=1e-3)
    assert found["spread"] == pytest.approx(0, abs=1e-3)


def test_a_real_child_measures_and_gets_its_threads():
    found = roofline._child("copy", 1, 32 << 20)
    assert 0.2 < found["rate"] < 2000
    assert found["spread"] >= 0


def test_a_child_that_fails_is_quoted():
    with pytest.raises(DeviceError, match=r"measuring `nonsense` failed with status 1: KeyError"):
        roofline._child("nonsense", 1, 1 << 20)


def test_the_pool_of_the_product_has_the_threads_that_were_asked(monkeypatch):
    seen = {}

    def run(command, env, **_):
        seen[command[3]] = env["OPENBLAS_NUM_THREADS"]
        return type("Done", (), {"stdout": '{"rate": 1, "spread": 0}', "stderr": "", "returncode": 0})

    monkeypatch.setattr(roofline.subprocess, "run", run)
    monkeypatch.setitem(os.environ, "OPENBLAS_NUM_THREADS", "7")
    for kind in roofline.KINDS:
        roofline._child(kind, 3, 1 << 20)
    assert seen == {"copy": "1", "read": "1", "cached": "1", "fp32": "3", "int8": "1"}
