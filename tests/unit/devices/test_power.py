# ruff: noqa: N802 - the names are those of NVML
"""Energy, clocks and throttling from trees of files and a driver that are made up, and from this machine."""

import json
import sys
import time
import types

import pytest

from edgesft.devices import nvml, power
from edgesft.devices.power import Meter


class Clock:
    """A clock that goes only when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def tree(tmp_path):
    """Writes files below a root that stands for `/`."""

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")
        return tmp_path

    return write


def zone(name, microjoules, wide=10**9, folder="intel-rapl:0"):
    home = f"sys/class/powercap/{folder}"
    return {f"{home}/name": name, f"{home}/energy_uj": microjoules, f"{home}/max_energy_range_uj": wide}


def metered(root, *steps, clock=None, seconds=2.0):
    """A meter around steps, each of which writes files; the clock goes on by `seconds` before each."""
    clock = clock or Clock()
    with Meter(root, interval=0, clock=clock) as meter:
        for number, step in enumerate(steps):
            clock.now += seconds
            step()
            if number < len(steps) - 1:
                meter.look()
    return json.loads(json.dumps(meter.result()))


def test_nothing_tells_and_the_reason_says_so(tmp_path):
    found = metered(tmp_path, lambda: None)
    energy = found["energy"]
    assert energy["source"] is None
    assert energy["joules"] is None
    assert all(word in energy["reason"] for word in ("INA3221", "RAPL"))
    assert found["clocks"]["source"] is None
    assert found["clocks"]["reason"]
    assert found["temperature"]["celsius_max"] is None
    assert found["throttled"]["reasons"] == []


def test_rapl_counts_packages_and_memory_but_no_core_twice(tree):
    files = zone("package-0", 1_000_000) | zone("core", 500_000, folder="intel-rapl:0:0")
    files |= zone("dram", 0, folder="intel-rapl:0:1") | zone("psys", 7, folder="intel-rapl:1")
    files |= zone("package-0", 5, folder="intel-rapl-mmio:0")
    root = tree(files)

    def work():
        tree(zone("package-0", 31_000_000) | zone("dram", 4_000_000, folder="intel-rapl:0:1"))
        tree(zone("core", 99_000_000, folder="intel-rapl:0:0") | zone("psys", 10**8, folder="intel-rapl:1"))

    energy = metered(root, work)["energy"]
    assert energy["source"] == "rapl"
    assert energy["joules"] == pytest.approx(34)
    assert energy["watts"] == pytest.approx(17)
    assert energy["seconds"] == 2
    assert energy["domains"] == {"package-0@0": 30, "dram@0:1": 4}


def test_rapl_that_wraps_around_goes_on(tree):
    root = tree(zone("package-0", 900, wide=1000))
    energy = metered(
        root,
        lambda: tree(zone("package-0", 100, wide=1000)),
        lambda: tree(zone("package-0", 950, wide=1000)),
        lambda: tree(zone("package-0", 50, wide=1000)),
    )["energy"]
    assert energy["joules"] == pytest.approx((200 + 850 + 100) / 1e6)


def test_rapl_that_only_root_may_read_says_so(tree):
    files = zone("package-0", 1)
    del files["sys/class/powercap/intel-rapl:0/energy_uj"]
    energy = metered(tree(files), lambda: None)["energy"]
    assert energy["source"] is None
    assert "read by root" in energy["reason"]


def test_rapl_that_is_lost_meanwhile_counts_for_nothing(tree):
    root = tree(zone("package-0", 1))
    energy = metered(root, (root / "sys/class/powercap/intel-rapl:0/energy_uj").unlink)["energy"]
    assert energy["source"] is None
    assert "no longer be read" in energy["reason"]


def rail(name, volts, amperes, channel=1, **alarms):
    home = "sys/class/hwmon/hwmon3"
    files = {f"{home}/name": "ina3221", f"{home}/in{channel}_label": name}
    files |= {f"{home}/in{channel}_input": volts, f"{home}/curr{channel}_input": amperes}
    return files | {f"{home}/curr{channel}_{k}_alarm": v for k, v in alarms.items()}


def test_rails_are_integrated_over_time(tree):
    root = tree(rail("VDD_IN", 5000, 1000) | rail("VDD_SOC", 5000, 200, channel=2))
    found = metered(root, lambda: tree(rail("VDD_IN", 5000, 3000)), lambda: tree(rail("VDD_IN", 5000, 1000)))
    energy = found["energy"]
    assert energy["source"] == "ina3221"
    assert energy["joules"] == pytest.approx(2 * (5 + 15) / 2 + 2 * (15 + 5) / 2)
    assert energy["domains"]["VDD_SOC"] == pytest.approx(4)
    assert energy["watts"] == pytest.approx(10)


def test_a_current_alarm_in_between_is_not_forgotten(tree):
    root = tree(rail("VDD_IN", 5000, 1000, crit=0))
    found = metered(
        root,
        lambda: tree(rail("VDD_IN", 5000, 9000, crit=1)),
        lambda: tree(rail("VDD_IN", 5000, 1000, crit=0)),
    )
    assert found["throttled"]["reasons"] == ["VDD_IN: current crit alarm"]


def test_clocks_are_those_of_the_fastest_core_while_it_runs(tree):
    def clocks(first, second):
        home = "sys/devices/system/cpu"
        return tree(
            {
                f"{home}/cpu0/cpufreq/scaling_cur_freq": first,
                f"{home}/cpu1/cpufreq/scaling_cur_freq": second,
                "sys/class/devfreq/17000000.gpu/cur_freq": 306_000_000,
            }
        )

    root = clocks(800_000, 800_000)
    found = metered(
        root,
        lambda: clocks(3_000_000, 900_000),
        lambda: clocks(900_000, 2_700_000),
        lambda: clocks(800_000, 800_000),
    )["clocks"]
    assert found["source"] == "cpufreq"
    assert (found["mhz_min"], found["mhz_max"], found["mhz_mean"]) == (2700, 3000, 2850)
    assert found["domains"]["17000000.gpu"]["mhz_max"] == 306
    assert found["during"] is True


def test_a_run_without_a_look_tells_that_its_clocks_are_from_the_edges(tree):
    root = tree({"sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": 2_000_000})
    found = metered(root, lambda: None)["clocks"]
    assert (found["mhz_mean"], found["during"]) == (2000, False)


def test_the_hottest_zone_is_reported(tree):
    root = tree(
        {"sys/class/thermal/thermal_zone0/temp": 41000, "sys/class/thermal/thermal_zone1/temp": 52500}
    )
    found = metered(root, lambda: tree({"sys/class/thermal/thermal_zone1/temp": 71500}))
    assert found["temperature"] == {"source": "thermal zones", "celsius_min": 52.5, "celsius_max": 71.5}


PI = "sys/devices/platform/soc/soc:firmware/get_throttled"


@pytest.mark.parametrize(
    ("before", "after", "reasons"),
    [
        ("0", "0", []),
        ("50000", "50000", []),  # long before this run
        ("0", "50000", ["under-voltage", "throttled"]),
        ("0", "50005", ["under-voltage", "throttled"]),
        ("0", "80008", ["the soft temperature limit"]),
    ],
)
def test_a_raspberry_pi_s_firmware_tells_what_happened_meanwhile(tree, before, after, reasons):
    assert metered(tree({PI: before}), lambda: tree({PI: after}))["throttled"]["reasons"] == reasons


def test_throttle_counters_of_the_kernel(tree):
    home = "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count"
    root = tree({home: 3, "sys/class/hwmon/hwmon1/oc1_event_cnt": 1})
    found = metered(root, lambda: tree({home: 5, "sys/class/hwmon/hwmon1/oc1_event_cnt": 3}))["throttled"]
    assert found["reasons"] == ["the processor throttled for heat", "2 over-current events"]
    assert found["counters"]["thermal"] == 2


class Driver(types.ModuleType):
    """pynvml of a machine with one GPU, of which every answer can be set; None: it does not answer."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0
    NVML_PERF_POLICY_POWER, NVML_PERF_POLICY_THERMAL = 0, 1

    class NVMLError(Exception):
        pass

    def __init__(self):
        super().__init__("pynvml")
        self.count, self.energy, self.events, self.violation, self.at = 1, 5_000, 0, 0, 0
        self.asked, self.open = 0, 0

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, _):
        self.asked += 1
        if self.energy is None:
            raise self.NVMLError("Not Supported")
        return self.energy

    def nvmlDeviceGetClockInfo(self, *_):
        return 1755

    def nvmlDeviceGetTemperature(self, *_):
        return 61

    def nvmlDeviceGetCurrentClocksEventReasons(self, _):
        return self.events

    def nvmlDeviceGetViolationStatus(self, _, policy):
        held = self.violation if policy == self.NVML_PERF_POLICY_THERMAL else 0
        return types.SimpleNamespace(violationTime=held, referenceTime=self.at)


@pytest.fixture
def driver(monkeypatch):
    """A made-up driver in the place of pynvml."""
    found = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", found)
    return found


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A meter of a tree that the driver is asked beside, as on the machine itself."""
    monkeypatch.setattr(power, "Path", lambda _: tmp_path)
    return tmp_path


def test_nvml_s_energy_counter_and_closing(driver, here):
    def work():
        driver.energy += 84_000

    found = metered(here, work)
    assert found["energy"]["source"] == "nvml"
    assert found["energy"]["joules"] == pytest.approx(84)
    assert found["energy"]["domains"] == {"gpu0": 84}
    assert any("RAPL" in why for why in found["energy"]["without"])
    assert found["clocks"]["source"] == "nvml"
    assert found["clocks"]["during"] is False
    assert found["temperature"]["celsius_max"] == 61
    assert driver.open == 0


def test_nvml_is_not_asked_in_between(driver, here):
    clock = Clock()
    with Meter(here, interval=0, clock=clock) as meter:
        asked = driver.asked
        for _ in range(5):
            meter.look()
        assert driver.asked == asked


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({}, []),
        ({"events": 0x1}, []),  # idle
        ({"events": 0x20 | 0x4}, ["gpu0: heat (software limit)", "gpu0: the power cap"]),
        ({"violation": 500_000_000, "at": 2_000_000}, ["gpu0: heat"]),
        ({"violation": 10_000_000, "at": 2_000_000}, []),  # half a per cent of the time
    ],
)
def test_nvml_s_reasons_to_slow_down(driver, here, change, reasons):
    found = metered(here, lambda: vars(driver).update(change))
    assert found["throttled"]["reasons"] == reasons


def test_a_gpu_without_a_counter_says_so(driver, here):
    driver.energy = None
    energy = metered(here, lambda: None)["energy"]
    assert energy["source"] is None
    assert "no NVML energy counter" in energy["reason"]


def test_no_driver_and_no_gpu_are_told_apart(driver, monkeypatch):
    driver.count = 0
    assert nvml.connect()[1] == "no NVML: the driver sees no GPU"

    def fail():
        raise driver.NVMLError("Driver Not Loaded")

    driver.nvmlInit = fail
    assert nvml.connect()[1] == "no NVML: Driver Not Loaded"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "not installed" in nvml.connect()[1]


def test_the_thread_looks_at_most_once_a_second_and_ends(tree, monkeypatch):
    root = tree(rail("VDD_IN", 5000, 1000))
    monkeypatch.setattr(power, "LEAST", 0.02)
    with Meter(root, interval=0.001) as meter:
        assert meter._interval == 0.02
        thread = meter._thread
        time.sleep(0.2)
    assert not thread.is_alive()
    energy = meter.result()["energy"]
    assert energy["watts"] == pytest.approx(5, rel=1e-6)
    assert Meter(root, interval=0.001)._interval == 0.02


def test_nothing_to_look_at_starts_no_thread(tmp_path):
    with Meter(tmp_path) as meter:
        assert meter._thread is None


def test_this_machine_answers_something():
    with Meter() as meter:
        pass
    found = json.loads(json.dumps(meter.result()))
    assert (found["energy"]["source"] is None) == (found["energy"]["reason"] is not None)
    assert set(found) == {"energy", "clocks", "temperature", "throttled"}
