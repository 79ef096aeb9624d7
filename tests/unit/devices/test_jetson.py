"""A Jetson from its files: boards of two releases, one of a release that is not known, and none at all."""

import pytest

from edgesft.devices import jetson
from edgesft.devices.jetson import Jetson, Rail

NANO = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64\n",
    "etc/nvpmodel.conf": (
        "< PARAM TYPE=FILE NAME=CPU_ONLINE >\nCORE_0 /sys/devices/system/cpu/cpu0/online\n"
        "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=1 NAME=25W >\n"
        "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n< PM_CONFIG DEFAULT=1 >\n"
    ),
    "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet\n",
    "proc/meminfo": "MemTotal:        7802652 kB\nMemFree: 1 kB\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "918000000\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
    "sys/class/hwmon/hwmon0/name": "tmp451\n",
    "sys/class/hwmon/hwmon1/name": "ina3221\n",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_IN\n",
    "sys/class/hwmon/hwmon1/in1_input": "5000\n",
    "sys/class/hwmon/hwmon1/curr1_input": "1600\n",
    "sys/class/hwmon/hwmon1/curr1_crit_alarm": "0\n",
    "sys/class/hwmon/hwmon1/curr1_max_alarm": "1\n",
    "sys/class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV\n",
    "sys/class/hwmon/hwmon1/in2_input": "5000\n",
    "sys/class/hwmon/hwmon1/curr2_input": "400\n",
    "sys/class/hwmon/hwmon1/in3_label": "NC\n",
    "sys/class/hwmon/hwmon1/in3_input": "0\n",
    "sys/class/hwmon/hwmon1/curr3_input": "0\n",
    "sys/class/hwmon/hwmon1/in7_label": "sum of shunt voltages\n",
}
THOR = {
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3971-0089+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0",
    "etc/nv_tegra_release": "# R38 (release), REVISION: 2.0, GCID: 1, BOARD: generic\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=120W >\n",
    "sys/class/devfreq/gpu-gpc-0/cur_freq": "1575000000\n",
    "sys/class/devfreq/gpu-gpc-0/min_freq": "1575000000\n",
    "sys/class/devfreq/gpu-gpc-0/max_freq": "1575000000\n",
    "sys/class/hwmon/hwmon2/name": "ina238\n",
    "sys/class/hwmon/hwmon2/power1_input": "43500000\n",
}
FUTURE = {
    "proc/device-tree/model": "NVIDIA Jetson Tomorrow Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p9999-0001\0nvidia,tegra999\0",
    "etc/nv_tegra_release": "# R47 (release), REVISION: 1.2, GCID: 1, BOARD: generic\n",
    "etc/nvpmodel.conf": "[modes]\nfast = 0\n",
    "sys/class/hwmon/hwmon0/name": "ina9000\n",
}


@pytest.fixture
def tree(tmp_path):
    """Writes a board's files and gives the folder that they lie in."""

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


def test_orin_nano_with_jetpack_6(tree):
    found = Jetson(tree(NANO)).about()
    assert found == {
        "board": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        "sku": "p3767-0005",
        "device": "orin-nano-super",
        "l4t": "36.4.3",
        "jetpack": "6.2",
        "power_mode": "MAXN_SUPER",
        "power_modes": ["15W", "25W", "MAXN_SUPER"],
        "clocks_locked": False,
        "unified_memory": True,
    }


def test_orin_nano_s_memory_clocks_and_rails(tree):
    board = Jetson(tree(NANO))
    assert board.memory_bytes == 7802652 * 1024
    assert board.clocks() == {"17000000.gpu": 918.0}
    assert board.rails() == [Rail("VDD_IN", 8.0, ("max",)), Rail("VDD_CPU_GPU_CV", 2.0)]
    assert jetson.total(board.rails()) == (8.0, ["VDD_IN"])


def test_thor_with_jetpack_7(tree):
    board = Jetson(tree(THOR))
    assert board.about() == {
        "board": "NVIDIA Jetson AGX Thor Developer Kit",
        "sku": "p3834-0008",
        "device": "agx-thor",
        "l4t": "38.2.0",
        "jetpack": "7.0",
        "power_mode": "unknown",
        "power_modes": ["MAXN", "120W"],
        "clocks_locked": True,
        "unified_memory": True,
    }
    assert board.rails() == [Rail("VIN", 43.5)]


def test_a_release_of_the_future_is_unknown_and_no_error(tree):
    board = Jetson(tree(FUTURE))
    found = board.about()
    assert found["l4t"] == "47.1.2"
    assert found["sku"] == "p9999-0001"
    assert [found[k] for k in ("jetpack", "power_mode", "device", "clocks_locked")] == [
        "unknown",
        "unknown",
        None,
        None,
    ]
    assert found["power_modes"] == []
    assert board.rails() == []
    assert board.clocks() == {}


@pytest.mark.parametrize("text", ["", "rubbish", "# R36", "\x00\xff", "# R (release), REVISION: x"])
def test_a_broken_release_file_is_unknown(tree, text):
    assert Jetson(tree({**NANO, "etc/nv_tegra_release": text})).l4t == "unknown"


def test_the_release_is_found_in_the_packages_too(tree):
    status = "Package: bash\nVersion: 5.1\n\nPackage: nvidia-l4t-core\nStatus: ok\nVersion: 36.3.0-2024\n\n"
    files = {k: v for k, v in NANO.items() if k != "etc/nv_tegra_release"}
    board = Jetson(tree({**files, "var/lib/dpkg/status": status}))
    assert (board.l4t, board.jetpack) == ("36.3.0", "6.0")


@pytest.mark.parametrize(
    ("l4t", "jetpack"),
    [
        ("35.4.1", "5.1.2"),
        ("36.3.0", "6.0"),
        ("36.4.0", "6.1"),
        ("36.4.3", "6.2"),
        ("36.4.4", "6.2.1"),
        ("36.4.7", "6.2.1"),
        ("36.5.0", "6.2.2"),
        ("38.4.0", "7.1"),
        ("39.2.0", "7.2"),
        ("36.4.9", "unknown"),
        ("36.30.0", "unknown"),
        ("unknown", "unknown"),
    ],
)
def test_jetpack_of_a_release(l4t, jetpack):
    board = Jetson()
    board.__dict__["l4t"] = l4t
    assert board.jetpack == jetpack


def test_the_tool_goes_before_the_file_for_the_power_mode(tree):
    board = Jetson(tree(NANO), tool=lambda *_: "NV Fan Mode:quiet\nNV Power Mode: 15W\n0")
    assert board.power_mode == "15W"


def test_a_plain_orin_nano_is_no_super(tree):
    plain = {**NANO, "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=7W >\n"}
    assert Jetson(tree(plain)).device == "orin-nano"


def test_agx_orin_s_rails_are_added_once():
    names = ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO")
    watts, counted = jetson.total([Rail(name, 2.0) for name in names])
    assert watts == 6.0
    assert "VDDQ_VDD2_1V8AO" not in counted


def test_another_machine_is_no_jetson(tree):
    root = tree({"proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0"})
    assert Jetson(root).about() == {}
    assert Jetson(root / "nothing").about() == {}
