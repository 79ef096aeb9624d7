"""Threads are physical cores within affinity and control group."""

import pytest

from edgesft.core import threads


@pytest.fixture
def topology(tmp_path, monkeypatch):
    """make(core of each logical processor) -> a machine of that layout."""

    def make(cores):
        for cpu, core in enumerate(cores):
            folder = tmp_path / f"cpu{cpu}" / "topology"
            folder.mkdir(parents=True)
            (folder / "core_id").write_text(str(core))
            (folder / "physical_package_id").write_text("0")
        monkeypatch.setattr(threads, "CPU", tmp_path)

    return make


def test_a_number_is_taken_as_it_is():
    assert threads.resolve(7) == 7


def test_logical_cores_count_once(topology, monkeypatch):
    topology([0, 1, 2, 3, 0, 1, 2, 3])
    monkeypatch.setattr(threads, "cgroup_cpus", lambda: None)
    monkeypatch.setattr(threads, "affinity", lambda: {0, 1, 4, 5})
    assert threads.resolve(0) == 2
    assert threads.physical_cores(set(range(8))) == 4


@pytest.mark.parametrize(("quota", "expected"), [(1.5, 1), (0.2, 1), (2.0, 2), (64.0, 4)])
def test_the_control_group_limits(topology, monkeypatch, quota, expected):
    topology([0, 1, 2, 3])
    monkeypatch.setattr(threads, "affinity", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(threads, "cgroup_cpus", lambda: quota)
    assert threads.resolve(0) == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"}, 0.5),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_limits_of_both_versions_are_read(tmp_path, monkeypatch, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(threads, "cgroup_folders", lambda controller: [tmp_path])
    assert threads.cgroup_cpus() == expected


def test_this_machine_has_an_answer():
    assert 1 <= threads.resolve(0) <= len(threads.affinity())


def test_where_no_topology_can_be_read_the_whole_machine_is_counted(tmp_path, monkeypatch):
    import psutil

    monkeypatch.setattr(threads, "CPU", tmp_path / "absent")
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 3)
    assert threads.physical_cores(set(range(8))) == 3
