"""This machine: fingerprints that refuse and record, threads within limits, telemetry."""

import copy
import json
import subprocess
import sys

import pytest

from edgesft.devices import host


def test_status_is_json_and_names_this_machine():
    found = json.loads(json.dumps(host.status()))
    assert found["host"]["threads"] >= 1
    assert found["host"]["memory_bytes"] > 2**28
    assert "h100-sxm" in found["catalogue"]
    assert found["runtimes"]["numpy"]


def test_overview_has_a_row_a_device_and_one_for_this_machine():
    found = host.overview()
    assert found["rows"][0][0] == "this machine"
    assert len(found["rows"]) == len(found["catalogue"]) + 1
    assert all(len(row) == len(found["columns"]) for row in found["rows"])


def test_fingerprint_is_the_same_twice_and_survives_a_file():
    one, two = host.fingerprint(threads=2), host.fingerprint(threads=2)
    assert one["id"] == two["id"]
    assert host.differences(one, json.loads(json.dumps(two))) == []
    assert one["id"] == host.fingerprint_id(json.loads(json.dumps(one["refuse"])))


@pytest.mark.parametrize("field", sorted(host.fingerprint(threads=2)["refuse"]), ids="of-{}".format)
def test_every_refused_field_refuses(field):
    ours = host.fingerprint(threads=2)
    theirs = copy.deepcopy(ours)
    theirs["refuse"][field] = "something else"
    assert host.fingerprint_id(theirs["refuse"]) != ours["id"]
    found = host.differences(ours, theirs)
    assert len(found) == 1
    assert f"`{field}`" in found[0]


@pytest.mark.parametrize("field", sorted(host.fingerprint()["record"]), ids="of-{}".format)
def test_every_recorded_field_only_records(field):
    ours = host.fingerprint()
    theirs = copy.deepcopy(ours)
    theirs["record"][field] = "something else"
    assert host.fingerprint_id(theirs["refuse"]) == ours["id"]
    assert host.differences(ours, theirs) == []


@pytest.mark.parametrize("broken", [{}, {"schema": 2, "refuse": {}}, {"schema": 1, "refuse": None}])
def test_a_fingerprint_that_cannot_be_read_is_not_comparable(broken):
    assert host.differences(host.fingerprint(), broken)


def test_unknown_board_degrades_to_unknown(monkeypatch):
    texts = {"/proc/device-tree/model": "NVIDIA Jetson of tomorrow", "/etc/nv_tegra_release": "new format"}
    monkeypatch.setattr(host, "_text", lambda path: texts.get(str(path), ""))
    host.jetson.cache_clear()
    try:
        found = host.jetson()
        assert found == {"board": "NVIDIA Jetson of tomorrow", "l4t": "unknown", "power_mode": "unknown"}
        assert host.fingerprint()["refuse"]["l4t"] == "unknown"
    finally:
        host.jetson.cache_clear()


def test_jetson_release_is_read(monkeypatch):
    release = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic"
    monkeypatch.setattr(host, "_text", lambda path: release if "tegra" in str(path) else "")
    host.jetson.cache_clear()
    try:
        assert host.jetson()["l4t"] == "36.4.3"
    finally:
        host.jetson.cache_clear()


def topology(tmp_path, cores):
    for cpu, core in enumerate(cores):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "core_id").write_text(str(core))
        (folder / "physical_package_id").write_text("0")


def test_threads_are_physical_cores_within_the_affinity(tmp_path, monkeypatch):
    topology(tmp_path, [0, 1, 2, 3, 0, 1, 2, 3])
    monkeypatch.setattr(host, "CPU", tmp_path)
    monkeypatch.setattr(host, "cgroup_cpus", lambda: None)
    monkeypatch.setattr(host, "affinity", lambda: {0, 1, 4, 5})
    assert host.default_threads() == 2
    assert host.physical_cores(set(range(8))) == 4


@pytest.mark.parametrize(("quota", "threads"), [(1.5, 1), (0.2, 1), (2.0, 2), (64.0, 4)])
def test_threads_stay_within_the_control_group(tmp_path, monkeypatch, quota, threads):
    topology(tmp_path, [0, 1, 2, 3])
    monkeypatch.setattr(host, "CPU", tmp_path)
    monkeypatch.setattr(host, "affinity", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(host, "cgroup_cpus", lambda: quota)
    assert host.default_threads() == threads


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.cfs_quota_us": "200000", "cpu.cfs_period_us": "100000"}, 2.0),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_control_groups_of_both_versions(tmp_path, monkeypatch, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(host, "_cgroup_folders", lambda _: [tmp_path])
    assert host.cgroup_cpus() == expected


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, None),
        ({"thermal": 1.0}, "heat"),
        ({"throttled": 0.5}, "control group"),
        ({"steal": 3.0}, "hypervisor"),
        ({"throttled": 0.1, "steal": 0.5}, None),
    ],
)
def test_only_telemetry_decides_what_was_held_back(change, word):
    before = {"seconds": 0.0, "steal": 0.0, "busy": 0.0, "throttled": 0.0, "thermal": 0.0}
    after = {"seconds": 10.0, "steal": 0.0, "busy": 20.0, "throttled": 0.0, "thermal": 0.0} | change
    found = host.held_back(before, after)
    assert (found is None) == (word is None)
    assert word is None or word in found


def test_telemetry_of_this_machine_goes_forward():
    one, two = host.telemetry(), host.telemetry()
    assert two["seconds"] >= one["seconds"]
    assert all(two[key] >= one[key] for key in one)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA A100-SXM4-80GB", "a100-80-sxm"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Jetson Orin Nano Super", "orin-nano-super"),
    ],
)
def test_a_driver_name_finds_its_device(name, device):
    assert host.match(name).id == device


def test_a_driver_name_of_no_device_finds_none():
    assert host.match("Voodoo 2") is None


def test_gpus_are_parsed_and_a_strange_driver_gives_none(monkeypatch):
    line = "NVIDIA H100 80GB HBM3, 81559, 570.86.15, 9.0, Disabled, 700.00, 1980"
    for output, count in ((line, 1), ("no devices were found", 0), ("", 0)):
        monkeypatch.setattr(host, "_tool", lambda *_, text=output: text)
        host.gpus.cache_clear()
        try:
            assert len(host.gpus()) == count
            if count:
                assert host.fingerprint()["refuse"]["gpus"][0]["driver"] == "570"
        finally:
            host.gpus.cache_clear()


def test_looking_imports_nothing_heavy():
    code = (
        "import sys; from edgesft.devices import host; host.overview();"
        "print([m for m in ('torch', 'onnxruntime', 'numpy', 'scipy', 'pynvml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
