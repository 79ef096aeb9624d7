"""Predictions: what they follow from, and measurements of others that must lie within them."""

import dataclasses
import json

import pytest

from edgesft.core.errors import DeviceError, UsageError
from edgesft.devices import predict as predictor
from edgesft.devices.predict import Shape, predict
from edgesft.devices.spec import DeviceSpec, catalogue, known

SMALL = Shape(
    weight_bytes=115_000_000,
    streamed_bytes=115_000_000,
    parameters=134_500_000,
    head=28_300_000,
    weights="int4",
    layers=30,
    hidden=576,
    kv_heads=3,
    head_dim=64,
    context=8192,
)
FIXED = ("x86-avx2", "x86-avx512")  # no clock, cores and memory of their own
NAMED = [d.id for d in catalogue() if d.id not in FIXED]


def decoder(billions, layers, hidden, heads, head_dim=128, untied=0.0):
    """A model of 4 bits and a half a weight; untied: billions that are only looked up."""
    parameters = int((billions - untied) * 1e9)
    return Shape(
        weight_bytes=int(billions * 1e9 * 4.5 / 8),
        streamed_bytes=int(parameters * 4.5 / 8),
        parameters=parameters,
        weights="int4",
        layers=layers,
        hidden=hidden,
        kv_heads=heads,
        head_dim=head_dim,
        kv_bytes=2,
    )


# NVIDIA's published decode rates, tokens a second, of int4 models on an Orin Nano: before and in Super mode.
PUBLISHED = {
    "llama-3.1-8b": (decoder(8.03, 32, 4096, 8, untied=0.525), 14.0, 19.14),
    "llama-3.2-3b": (decoder(3.21, 28, 3072, 8), 27.7, 43.07),
    "qwen2.5-7b": (decoder(7.62, 28, 3584, 4, untied=0.545), 14.2, 21.75),
    "gemma-2-2b": (decoder(2.61, 26, 2304, 4, 256), 21.5, 34.97),
    "gemma-2-9b": (decoder(9.24, 42, 3584, 8, 256), 7.2, 9.21),
    "phi-3.5-mini": (decoder(3.82, 32, 3072, 32, 96, untied=0.099), 24.7, 38.1),
    "smollm2-1.7b": (decoder(1.71, 24, 2048, 32, 64), 41.0, 64.5),
}


@pytest.mark.parametrize("device", ["orin-nano", "orin-nano-super"])
@pytest.mark.parametrize("model", PUBLISHED)
def test_published_rates_lie_within_the_range(model, device):
    shape, before, after = PUBLISHED[model]
    rate = before if device == "orin-nano" else after
    found = predict(known(device), shape)["tokens_per_second"]
    assert found["low"] <= rate <= found["high"]


def test_the_range_is_narrow_enough_to_decide_by():
    for device in ("orin-nano", "orin-nano-super"):
        for shape, *_ in PUBLISHED.values():
            found = predict(known(device), shape)["tpot_ms"]
            assert found["high"] / found["low"] < 3.5


def test_an_h100_s_measured_bandwidth_and_rate_lie_within():
    found = predictor.rates(known("h100-sxm"), SMALL, None)
    assert found.bandwidth[0] < 3.0e12 <= found.bandwidth[1]
    assert found.compute[0] < 798e12 <= found.compute[1]


@pytest.mark.parametrize("device", NAMED)
def test_every_device_is_predicted_for_and_says_so(device):
    found = json.loads(json.dumps(predict(known(device), SMALL)))
    assert found["predicted"] is True
    assert found["assumptions"]
    for key in ("ttft_ms", "tpot_ms", "tpot_full_context_ms"):
        assert 0 < found[key]["low"] < found[key]["high"]
    assert found["tpot_ms"]["low"] <= found["tpot_full_context_ms"]["low"]
    assert set(found["modes"]) == set(known(device).modes)
    assert found["fit"]["verdict"] == "fits"


@pytest.mark.parametrize("device", FIXED)
def test_a_device_without_figures_is_refused_with_a_way_out(device):
    with pytest.raises(UsageError) as caught:
        predict(known(device), SMALL)
    assert "bandwidth" in caught.value.message
    assert "host" in caught.value.hint


def test_the_best_case_is_the_longer_of_the_two_limits():
    spec = DeviceSpec(
        id="x", name="x", kind="gpu", units=10, ghz=1.0, memory_gb=8, bandwidth_gbs=100, ops={"fp16": 1000}
    )
    shape = Shape(weight_bytes=10**9, streamed_bytes=10**9, parameters=5 * 10**8, decoder=True)
    found = predict(spec, shape, prompt_tokens=100, context=101)
    launch = 12 * 0.5e-3
    assert found["tpot_ms"]["low"] == pytest.approx(1000 / 90 + launch, abs=1e-3)  # bytes
    assert found["ttft_ms"]["low"] == pytest.approx(
        1000 * 1e11 / (1e13 * 0.81) + launch, abs=1e-3
    )  # operations
    slow = 1000 / 50 + 1000 * 1e9 / (1e13 * 0.15) + 12 * 5e-3
    assert found["tpot_ms"]["high"] == pytest.approx(slow, abs=1e-3)


def test_a_longer_prompt_costs_more_and_the_head_only_once():
    one, two = (predict(known("orin-nano"), SMALL, prompt_tokens=n)["ttft_ms"]["low"] for n in (512, 1024))
    assert 1.9 < two / one < 2.5
    everywhere = dataclasses.replace(SMALL, head=0)
    assert SMALL.operations(100, 0) == everywhere.operations(100, 0) - 2 * 99 * SMALL.head
    assert SMALL.operations(1, 0) == everywhere.operations(1, 0)


def test_the_cache_of_keys_and_values():
    assert SMALL.cache_bytes(2048) == 2 * 30 * 3 * 64 * 4 * 2048
    assert dataclasses.replace(SMALL, decoder=False).cache_bytes(2048) == 0


def test_a_mode_with_a_clock_of_its_own_is_faster():
    found = predict(known("orin-nx-16"), SMALL)["modes"]
    assert found["super"]["ttft_ms"]["low"] < found["25w"]["ttft_ms"]["low"]


def test_a_mode_of_unknown_clock_widens_the_slow_end_and_says_so():
    all_of_it, saving = (predict(known("orin-nano"), SMALL, mode) for mode in ("15w", "7w"))
    assert saving["tpot_ms"]["low"] == all_of_it["tpot_ms"]["low"]
    assert saving["tpot_ms"]["high"] > 1.5 * all_of_it["tpot_ms"]["high"]
    assert any("clock of mode `7w` is unknown" in text for text in saving["assumptions"])
    assert not any("is unknown" in text for text in all_of_it["assumptions"])


def test_an_unknown_mode_names_the_nearest():
    with pytest.raises(UsageError) as caught:
        predict(known("orin-nano-super"), SMALL, "maxn-super")
    assert "maxn_super" in caught.value.hint


def big(gigabytes):
    return dataclasses.replace(
        SMALL, weight_bytes=int(gigabytes * 1e9), streamed_bytes=int(gigabytes * 1e9), parameters=10**10
    )


@pytest.mark.parametrize(
    ("gigabytes", "verdict"), [(0.1, "fits"), (3.0, "fits"), (5.0, "tight"), (7.5, "does not fit")]
)
def test_whether_it_fits_into_an_orin_nano(gigabytes, verdict):
    found = predict(known("orin-nano"), big(gigabytes))["fit"]
    assert found["verdict"] == verdict
    assert found["unified_memory"] is True
    assert found["available_bytes"]["high"] < 8e9


def test_a_long_context_may_be_what_does_not_fit():
    shape = dataclasses.replace(big(3.0), context=None, kv_heads=32, head_dim=128)
    assert predict(known("orin-nano"), shape)["fit"]["verdict"] != "does not fit"
    assert predict(known("orin-nano"), shape, context=65536)["fit"]["verdict"] == "does not fit"


def test_a_device_of_unknown_memory_is_refused():
    spec = dataclasses.replace(known("orin-nano"), memory_gb=None)
    with pytest.raises(DeviceError, match="memory"):
        predict(spec, SMALL)


@pytest.mark.parametrize(
    ("device", "weights", "dtype"),
    [
        ("orin-nano", "int4", "fp16"),
        ("rtx-4090", "int4", "fp16_acc32"),
        ("h100-sxm", "float32", "fp16"),
        ("raspberry-pi-5", "int4", "int8"),
        ("raspberry-pi-5", "float32", "fp32"),
        ("x86-avx512", "int8", "int8_amx"),
    ],
)
def test_the_type_of_the_products(device, weights, dtype):
    assert predictor.compute_type(known(device), weights) == dtype


PATTERNED = dataclasses.replace(SMALL, pattern="2:4", weights="float16")


def test_sparse_weights_gain_where_there_are_units_for_them():
    found = predict(known("orin-nano"), PATTERNED)
    assert found["sparse24"]["gain"] is True
    assert "TensorRT" in found["sparse24"]["reason"]
    ratio = found["sparse24"]["tpot_ms"]["low"] / found["tpot_ms"]["low"]
    assert 0.5 < ratio < 0.75  # nine sixteenths of the bytes, and the launches


@pytest.mark.parametrize(
    ("device", "change", "word"),
    [
        ("t4", {}, "no 2:4 units"),
        ("orin-nano", {"weights": "int4"}, "4 bits"),
        ("orin-nano", {"pattern": None}, "do not hold"),
        ("orin-nano", {"pattern": "1:4"}, "do not hold"),
    ],
)
def test_sparse_weights_gain_nothing_elsewhere(device, change, word):
    found = predict(known(device), dataclasses.replace(PATTERNED, **change))["sparse24"]
    assert found["gain"] is False
    assert word in found["reason"]


def test_of_a_graph_with_uncounted_operations_only_the_lower_end_is_known():
    graph = Shape(weight_bytes=10**8, streamed_bytes=10**8, parameters=None, decoder=False)
    found = predict(known("orin-nano"), graph)
    assert found["latency_ms"]["low"] > 1
    assert found["latency_ms"]["high"] is None
    assert any("not counted" in text for text in found["assumptions"])
    assert "tpot_ms" not in found


def test_this_machine_s_own_measurement_goes_before_the_catalogue():
    here = DeviceSpec(id="x86-avx512", name="x", kind="cpu", units=2, ghz=2.0, memory_gb=16, ops={"fp32": 64})
    roof = {"copy_gbs": 20.0, "read_gbs": 10.0, "gemm_gflops": {"fp32": 100.0, "int8": 1000.0}}
    found = predictor.rates(here, SMALL, None, measured=roof)
    assert found.bandwidth == (5e9, 21e9)
    assert found.compute == (30e9, 1050e9)
    plain = predictor.rates(here, dataclasses.replace(SMALL, weights="float32"), None, measured=roof)
    assert plain.compute == (30e9, 105e9)
    words = predict(here, SMALL, measured=roof)["assumptions"]
    assert any("this machine measured" in text for text in words)


def test_unverified_figures_are_named():
    words = predict(known("agx-orin-32"), SMALL)["assumptions"]
    assert "the catalogue's `bandwidth_gbs` is unverified" in words
