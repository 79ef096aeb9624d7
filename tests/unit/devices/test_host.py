"""This machine: fingerprints that refuse and record, threads within limits, telemetry."""

import copy
import json
import subprocess
import sys

import pytest

from edgesft.core import threads
from edgesft.core.errors import UsageError
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


@pytest.mark.parametrize(
    "broken", [{}, {"schema": 3, "refuse": {}}, {"schema": 2, "refuse": None}, {"schema": 1, "refuse": {}}]
)
def test_a_fingerprint_that_cannot_be_read_is_not_comparable(broken):
    assert host.differences(host.fingerprint(), broken)


@pytest.mark.parametrize("field", sorted(host.clock_lock()))
def test_every_clock_lock_refuses_by_its_name(field):
    ours = host.fingerprint()
    theirs = copy.deepcopy(ours)
    theirs["refuse"]["clock_lock"][field] = "something else"
    assert len(host.differences(ours, theirs)) == 1
    assert f"`clock_lock.{field}`" in host.differences(ours, theirs)[0]


GPU_LINE = "NVIDIA H100 80GB HBM3, 81559, 570.86.15, 9.0, Disabled, 700.00, 1980"


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one H100, as the driver and its library describe it."""
    answers = {host.GPU_QUERY: GPU_LINE, host.CLOCK_QUERY: "1980, 2619"}
    monkeypatch.setattr(host, "_tool", lambda _, query, *__: answers[query.partition("=")[2]])
    monkeypatch.setattr(host.cuda, "multiprocessors", lambda: [132])
    monkeypatch.setattr(host.cuda, "version", lambda: "12.8")
    clear()
    yield
    monkeypatch.undo()
    clear()


def clear():
    for each in (host.gpus, host.application_clocks, host.jetson):
        each.cache_clear()


GPU_FIELDS = (
    *("name", "memory_mib", "driver", "compute_capability", "mig"),
    *("power_limit_w", "max_sm_mhz", "sms", "application_mhz"),
)


@pytest.mark.parametrize("field", GPU_FIELDS)
def test_every_field_of_a_gpu_refuses_by_its_name(gpu, field):
    ours = host.fingerprint()
    theirs = copy.deepcopy(ours)
    theirs["refuse"]["gpus"][0][field] = "something else"
    found = host.differences(ours, theirs)
    assert len(found) == 1
    assert f"`gpus.0.{field}`" in found[0]
    assert host.fingerprint_id(theirs["refuse"]) != ours["id"]


def test_a_gpu_is_known_to_the_multiprocessor(gpu):
    found = host.fingerprint()["refuse"]
    assert set(found["gpus"][0]) == set(GPU_FIELDS)
    assert found["gpus"][0]["sms"] == 132
    assert found["gpus"][0]["driver"] == "570"
    assert found["gpus"][0]["application_mhz"] == "1980, 2619"
    assert found["cuda"] == "12.8"


def test_another_patch_of_the_driver_only_records(gpu, monkeypatch):
    ours = host.fingerprint()
    other = GPU_LINE.replace("570.86.15", "570.99.99")
    monkeypatch.setattr(host, "_tool", lambda _, query, *__: other if "name" in query else "1980, 2619")
    clear()
    theirs = host.fingerprint()
    assert host.differences(ours, theirs) == []
    assert ours["record"]["driver"] != theirs["record"]["driver"]


def test_a_gpu_more_refuses(gpu):
    ours = host.fingerprint()
    theirs = copy.deepcopy(ours)
    theirs["refuse"]["gpus"].append(theirs["refuse"]["gpus"][0])
    assert "`gpus`" in host.differences(ours, theirs)[0]


def board(root, model="", release="", modes=""):
    for path, text in (
        ("proc/device-tree/model", model),
        ("etc/nv_tegra_release", release),
        ("etc/nvpmodel.conf", modes),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty file system in the place of this machine's."""
    monkeypatch.setattr(host, "ROOT", tmp_path)
    clear()
    yield tmp_path
    monkeypatch.undo()
    clear()


def test_unknown_board_degrades_to_unknown(root):
    board(root, "NVIDIA Jetson of tomorrow", "new format")
    found = host.fingerprint()
    for field in ("l4t", "power_mode", "sku"):
        assert found["refuse"][field] == "unknown"
    assert found["refuse"]["board"] == "NVIDIA Jetson of tomorrow"
    assert found["record"]["jetpack"] == "unknown"
    assert host.spec().kind == "cpu"


def test_jetson_release_and_device_are_read(root):
    release = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic"
    board(root, "NVIDIA Jetson AGX Orin Developer Kit", release)
    assert host.jetson()["l4t"] == "36.4.3"
    assert host.spec().id == "agx-orin-64"
    assert host.spec().bandwidth_gbs == 205


def test_a_tensorrt_of_the_system_is_found(root, monkeypatch):
    monkeypatch.setattr(host, "installed", lambda _: None)
    folder = root / "usr/lib/aarch64-linux-gnu"
    folder.mkdir(parents=True)
    (folder / "libnvinfer.so.10.3.0").write_text("")
    assert host.fingerprint()["refuse"]["tensorrt"] == "10.3.0"


def test_default_threads_are_those_of_the_runtimes():
    assert host.default_threads() == threads.resolve(0)


def test_boost_and_a_fixed_clock_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "CPU", tmp_path)
    monkeypatch.setattr(host, "affinity", lambda: {0})
    folder = tmp_path / "cpu0/cpufreq"
    folder.mkdir(parents=True)
    assert host.clock_lock() == {"cpu": None, "boost": None, "gpu": None}
    (folder / "scaling_min_freq").write_text("2400000\n")
    (folder / "scaling_max_freq").write_text("2400000\n")
    (tmp_path / "intel_pstate").mkdir()
    (tmp_path / "intel_pstate/no_turbo").write_text("1\n")
    assert host.clock_lock() == {"cpu": True, "boost": False, "gpu": None}


def test_show_names_source_and_confidence_of_every_figure():
    found = json.loads(json.dumps(host.show("orin-nano")))
    assert {"ghz", "ops.int8", "modes.7w", "published.int8"} <= {f["figure"] for f in found["figures"]}
    assert all(f["confidence"] in ("published", "derived", "unverified") for f in found["figures"])
    assert all(f["source"] not in ("", "unknown") for f in found["figures"])
    assert all(len(row) == len(found["columns"]) for row in found["rows"])


@pytest.mark.parametrize("name", ["host", "this"])
def test_show_of_this_machine_says_what_was_measured(name):
    found = host.show(name)
    units = next(f for f in found["figures"] if f["figure"] == "units")
    assert units["value"] == host.physical_cores()
    assert units["confidence"] == "measured"
    assert all(f["source"] != "unknown" for f in found["figures"])


def test_show_of_an_unknown_device_names_the_nearest():
    with pytest.raises(UsageError) as caught:
        host.show("orin-nao")
    assert "orin-nano" in (caught.value.hint or "")


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


def test_telemetry_reads_the_kernel_s_counters(tmp_path):
    files = {
        "proc/stat": "cpu  100 0 0 800 0 0 0 100 0 0\n",
        "proc/self/cgroup": "0::/job\n",
        "sys/fs/cgroup/job/cpu.stat": "nr_throttled 7\nthrottled_usec 2500000\n",
        "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "3\n",
        "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count": "4\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = host.telemetry(tmp_path)
    assert found["steal"] / found["busy"] == pytest.approx(0.1)
    assert (found["periods"], found["throttled"], found["thermal"]) == (7, 2.5, 7)


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
    for output, count in ((GPU_LINE, 1), ("no devices were found", 0), ("", 0)):
        monkeypatch.setattr(host, "_tool", lambda *_, text=output: text)
        clear()
        try:
            assert len(host.gpus()) == count
            assert len(host.fingerprint()["refuse"]["gpus"]) == count
        finally:
            clear()


def test_looking_imports_nothing_heavy():
    code = (
        "import sys; from edgesft.devices import host; host.overview();"
        "print([m for m in ('torch', 'onnxruntime', 'numpy', 'scipy', 'pynvml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
