"""The catalogue: peak rates follow from units, clocks and rates, and agree with the published ones."""

import pytest

from edgesft.core.errors import UsageError
from edgesft.devices.spec import CONFIDENCE, DeviceSpec, catalogue, describe, known

PUBLISHED = [
    (device.id, mode, dtype, sparse, value)
    for device in catalogue()
    for mode, table in [
        (None, device.published),
        *((m, v["published"]) for m, v in device.modes.items() if "published" in v),
    ]
    for dtype, pair in table.items()
    for sparse, value in zip((False, True), pair, strict=True)
    if value
]


@pytest.mark.parametrize(("device", "mode", "dtype", "sparse", "value"), PUBLISHED)
def test_peak_reproduces_the_published_rate(device, mode, dtype, sparse, value):
    assert known(device).peak(dtype, sparse=sparse, mode=mode) == pytest.approx(value, rel=0.02)


def test_published_rates_are_checked_for_every_device_that_has_them():
    without = {d.id for d in catalogue()} - {row[0] for row in PUBLISHED}
    assert without == {"x86-avx2", "x86-avx512"}
    assert len(PUBLISHED) > 60


@pytest.mark.parametrize(
    ("device", "dtype", "sparse", "value"),
    [
        ("agx-orin-64", "int8", True, 170.4),
        ("h100-sxm", "fp16", False, 989.4),
        ("t4", "int8", False, 130.3),
        ("raspberry-pi-5", "int8", False, 0.614),
    ],
)
def test_peak_of_known_devices(device, dtype, sparse, value):
    assert known(device).peak(dtype, sparse=sparse) == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("device", ["t4", "raspberry-pi-5"])
def test_no_sparse_rate_without_sparse_units(device):
    assert known(device).peak("int8", sparse=True) is None


def test_unknown_is_none_not_zero():
    assert known("x86-avx2").peak("fp32") is None
    assert known("h100-sxm").peak("fp4") is None


def test_ids_are_unique_and_every_device_says_where_its_numbers_are_from():
    ids = [d.id for d in catalogue()]
    assert len(ids) == len(set(ids)) == 19
    assert all(d.sources and d.kind in {"gpu", "soc", "cpu"} and d.ops for d in catalogue())
    assert all(d.tensorrt for d in catalogue())


def test_misspelt_device_is_answered_with_the_nearest():
    with pytest.raises(UsageError) as caught:
        known("orin-nao")
    assert "orin-nano" in (caught.value.hint or "")


@pytest.mark.parametrize("device", [d.id for d in catalogue()])
def test_every_figure_has_a_source_and_a_confidence(device):
    spec = known(device)
    figures = spec.figures()
    for figure in figures:
        why = spec.why(figure)
        assert why is not None, figure
        assert why["confidence"] in CONFIDENCE
        assert why["source"]
    told = {name.partition(".")[0] for name in figures} | set(figures)
    assert set(spec.evidence) <= told, "evidence for a figure that is not there"


def test_a_figure_s_own_evidence_goes_before_its_table_s():
    spec = known("rtx-5090")
    assert spec.why("published.fp16")["confidence"] == "published"
    assert spec.why("published.fp16_acc32")["confidence"] == "unverified"


def test_a_figure_without_evidence_is_shown_as_unverified():
    bare = DeviceSpec(id="x", name="x", kind="cpu", units=4)
    row = next(f for f in describe(bare)["figures"] if f["figure"] == "units")
    assert (row["confidence"], row["source"]) == ("unverified", "unknown")


def test_thor_s_two_compute_capabilities_are_told():
    found = describe(known("agx-thor"))
    row = next(f for f in found["figures"] if f["figure"] == "compute_capability")
    assert row["value"] == "11.0"
    assert "10.1 with CUDA 12.8" in row["source"]
