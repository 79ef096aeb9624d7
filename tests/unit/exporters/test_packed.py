"""Exports with packed layers compute what torch computes with the weights that they hold."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from edgesft.core.errors import ArtifactError, DeviceError
from edgesft.exporters import measure, packing
from edgesft.exporters import onnx as exporter
from edgesft.exporters import operators as operators_of
from edgesft.exporters.costs import Call, cost
from edgesft.exporters.description import PLAIN
from edgesft.exporters.dialects.graph import Precision
from edgesft.exporters.dialects.packed import Layer
from edgesft.exporters.probe import Probe, weights
from edgesft.exporters.readback import dequantized
from edgesft.exporters.runtime import OnnxRunnable, generate
from edgesft.kernels.nm_matmul import layout, library

from .sparse_models import FAMILIES, by_turns, exported

pytestmark = pytest.mark.skipif(library.load() is None, reason="no compiled kernels on this machine")


def torch_logits(model: Path, ids: np.ndarray, out: Path) -> np.ndarray:
    module = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        state = module.state_dict()
        for name, array in dequantized(out):
            state[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))
        return module(torch.from_numpy(ids)).logits.numpy()


def operators(out: Path) -> list[str]:
    return [n.op_type for n in onnx.load(str(out / "model.onnx"), load_external_data=False).graph.node]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_logits_equal_torch_with_those_weights(tmp_path, family, quantize):
    model, out = exported(tmp_path, family, precision=Precision(quantize, 32, 0))
    ids = np.random.default_rng(0).integers(0, 96, (1, 14))
    runnable = OnnxRunnable(out, threads=1)
    expected = torch_logits(model, ids, out)[0]
    got = runnable.logits(ids, np.ones_like(ids), np.arange(14))
    np.testing.assert_allclose(got, expected, atol=1e-4)
    state = runnable.start(20)  # and a token at a time
    state.prefill(ids[0, :9])
    for position in range(9, 14):
        np.testing.assert_allclose(state.step(int(ids[0, position])), expected[position], atol=1e-4)


def test_a_block_has_five_nodes(tmp_path):
    _, out = exported(tmp_path)
    found = operators(out)
    assert found.count("PackedLinear") == 2 * 4 + 1
    assert found.count("GroupQueryAttention") == 2
    assert found.count("PackedEmbedding") == 1
    assert not {"MatMulNBits", "SkipSimplifiedLayerNormalization", "QuickGelu", "Split"} & set(found)
    rows = json.loads((out / "export.json").read_text())["packed"]
    assert [r["kind"] for r in rows].count("packed") == 8
    assert [r["kind"] for r in rows if r["layer"] == "head"] == ["tiled"]
    bits = {r["layer"]: r["bits_per_weight"] for r in rows}
    assert bits["layers.0.qkv"] == 3.25  # a scale for 64 columns, of which 32 are kept
    assert 5.25 <= bits["layers.0.down"] < 5.4  # 8 bits, as in every mixed export


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_has_four_bits_where_asked(tmp_path, family):
    model, out = exported(tmp_path, family, precision=Precision("int4", 32, 0, head="int4"))
    (head,) = [r for r in json.loads((out / "export.json").read_text())["packed"] if r["layer"] == "head"]
    assert (head["kind"], head["bits"]) == ("tiled", 4)
    ids = np.random.default_rng(0).integers(0, 96, (1, 14))
    got = OnnxRunnable(out, threads=1).logits(ids, np.ones_like(ids), np.arange(14))
    np.testing.assert_allclose(got, torch_logits(model, ids, out)[0], atol=1e-4)


def test_every_weight_can_be_read_back_and_checked(tmp_path):
    model, out = exported(tmp_path, "llama-odd")
    original = load_file(model / "model.safetensors")
    back = dict(dequantized(out))
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        w = tensor.numpy()
        assert (back[name][w == 0] == 0).all()
        bound = 0.12 if w.ndim == 2 else 0
        assert np.linalg.norm(back[name] - w) <= bound * np.linalg.norm(w), name
    for held in weights(out):
        assert np.array_equal(held.array, back[held.name])
        if held.scales is not None:
            assert held.scales.shape == (len(held.array), -(-held.array.shape[1] // held.group))


def test_a_layer_that_is_not_two_of_four_is_tiled(tmp_path):
    model, out = exported(tmp_path, dense="layers.1.mlp.up_proj")
    rows = json.loads((out / "export.json").read_text())["packed"]
    kinds = {r["layer"]: (r["kind"], r["pattern"]) for r in rows}
    assert kinds["layers.1.gate_up"] == ("tiled", "dense")
    assert kinds["layers.0.gate_up"] == ("packed", "2:4")
    ids = np.random.default_rng(0).integers(0, 96, (1, 9))
    got = OnnxRunnable(out, threads=1).logits(ids, np.ones_like(ids), np.arange(9))
    np.testing.assert_allclose(got, torch_logits(model, ids, out)[0], atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "llama-odd", "qwen3"])
def test_any_mixture_computes_the_same(tmp_path, family, monkeypatch):
    """Packed, tiled and MatMulNBits by turns: norms, sums and the gate are fused or not, layer by layer."""
    monkeypatch.setattr(exporter, "_always", by_turns())
    model, out = exported(tmp_path, family)
    assert {"PackedLinear", "MatMulNBits"} <= set(operators(out))
    ids = np.random.default_rng(0).integers(0, 96, (1, 11))
    got = OnnxRunnable(out, threads=1).logits(ids, np.ones_like(ids), np.arange(11))
    np.testing.assert_allclose(got, torch_logits(model, ids, out)[0], atol=1e-4)


def test_auto_measures_and_writes_down_what_it_saw(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "COLD_BYTES", 1 << 16)
    _, out = exported(tmp_path, sparse="auto")
    rows = json.loads((out / "export.json").read_text())["packed"]
    for row in rows:
        seconds = row["measured_us"]
        assert seconds[row["kind"]] == min(seconds.values())
        assert set(seconds) == (
            {"packed", "tiled", "dense"} if row["pattern"] == "2:4" else {"tiled", "dense"}
        )
    assert len(rows) == 9


def test_auto_leaves_a_dense_model_alone(tmp_path):
    _, out = exported(tmp_path, dense="proj", sparse="auto")
    assert "packed" not in json.loads((out / "export.json").read_text())
    assert "PackedLinear" not in operators(out)


def test_never_writes_the_runtime_s_own_operations(tmp_path):
    _, out = exported(tmp_path, sparse="never")
    assert "PackedLinear" not in operators(out)


def test_auto_without_the_library_is_dense(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(library, "state", lambda: (False, "no C++ compiler"))
    _, out = exported(tmp_path, sparse="auto")
    assert "PackedLinear" not in operators(out)
    assert "no C++ compiler" in capsys.readouterr().err


def test_a_device_without_the_library_is_told(tmp_path, monkeypatch):
    _, out = exported(tmp_path)
    (out / PLAIN).unlink()  # as in exports of old
    monkeypatch.setenv("EDGESFT_NATIVE", "0")
    with pytest.raises(DeviceError, match="packed weights need the compiled kernels") as caught:
        OnnxRunnable(out, threads=1)
    assert "g++" in (caught.value.hint or "")


def test_arithmetic_in_int8_stays_close(tmp_path):
    _, out = exported(tmp_path, precision=Precision("int4", 32, 4))
    ids = np.random.default_rng(0).integers(0, 96, (1, 14))
    feeds = (ids, np.ones_like(ids), np.arange(14))
    fast = OnnxRunnable(out, threads=1).logits(*feeds)
    exact = Probe(out, threads=1)
    np.testing.assert_allclose(fast, exact.logits(*feeds), atol=0.1)
    assert np.abs(fast - exact.logits(*feeds)).max() > 0  # or the probe were no more exact
    assert len(exact.hidden(ids[0])) == 2
    assert len(generate(OnnxRunnable(out, threads=2), [1, 2, 3], 5).tokens) == 5


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("version", 2, "packed weights of format 2, this EdgeSFT reads 1"),
        ("rows", 4096, "a stream of"),
        ("value", "int3", "expected one of"),
        ("group", None, "is broken"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path, key, value, words):
    _, out = exported(tmp_path)
    about = json.loads((out / "export.json").read_text())
    entry = about["weights"]["model.layers.0.self_attn.q_proj.weight"]["packed"]
    entry[key] = value
    (out / "export.json").write_text(json.dumps(about))
    with pytest.raises(ArtifactError, match=words):
        dict(dequantized(out))


def external(out, name):
    """The mapped bytes of an initializer in the data file."""
    model = onnx.load(str(out / "model.onnx"), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    place = {e.key: e.value for e in tensor.external_data}
    return np.memmap(out / "model.onnx.data", np.uint8, "r+", int(place["offset"]), (int(place["length"]),))


@pytest.mark.parametrize(
    ("name", "at", "value", "words"),
    [
        ("layers.0.qkv.stream", slice(0, 2), 0, "two places of a group"),  # the same one twice
        ("layers.1.down.packed_scales", slice(0, 2), 0xFF, "not finite"),
    ],
)
def test_data_that_were_altered_are_refused(tmp_path, name, at, value, words):
    """By their hashes where an artefact is loaded; and by the operation itself wherever it is loaded."""
    _, out = exported(tmp_path)
    data = external(out, name)
    data[at] = value
    data.flush()
    with pytest.raises(ArtifactError, match=words):
        OnnxRunnable(out, threads=1)
    with pytest.raises(ArtifactError, match=words if "places" in words else "is broken"):
        dict(dequantized(out))


def test_data_that_are_cut_off_are_refused(tmp_path):
    _, out = exported(tmp_path)
    file = out / "model.onnx.data"
    with file.open("r+b") as data:
        data.truncate(file.stat().st_size - 5000)
    for read in (lambda: OnnxRunnable(out, threads=1), lambda: dict(dequantized(out))):
        with pytest.raises(ArtifactError, match=r"has [\d]+ bytes, tensor `.*` of `model.onnx` needs"):
            read()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("version", 2, "this library reads format 1 and the model has 2"),
        ("rows", 112, "another size"),
        ("columns", 96, "another size"),
        ("group", 32, "another number"),
        ("value", 1, "another size"),
    ],
)
def test_a_graph_that_does_not_fit_its_data_is_refused(tmp_path, name, value, words):
    _, out = exported(tmp_path)
    model = onnx.load(str(out / "model.onnx"), load_external_data=False)
    node = next(n for n in model.graph.node if n.name == "layers.0.qkv/PackedLinear")
    next(a for a in node.attribute if a.name == name).i = value
    (out / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=words):
        OnnxRunnable(out, threads=1)


def test_rows_by_turns_come_apart_again():
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((48, 8)).astype(np.float32) for _ in range(2)]
    joined = packing.join(parts, interleaved=True)
    for turn, part in enumerate(parts):
        about = {"rows": [0, 48], "turn": turn, "parts": 2}
        assert np.array_equal(packing.rows_of(joined, about), part)


def test_scales_that_come_with_the_weights_are_kept():
    rng = np.random.default_rng(0)
    scales = (rng.random((32, 2)) * 0.1 + 0.05).astype(np.float16)
    codes = rng.integers(-8, 8, (32, 128)).astype(np.int8)
    codes.reshape(32, -1, 4)[:, :, :2] = 0
    weight = codes * np.repeat(scales.astype(np.float32), 64, 1)
    packed = packing.pack([weight], 4, 32, sparse=True, interleaved=False, stored=[(4, 64, scales)])
    assert packed.group == 64
    assert np.array_equal(layout.scales_of(packed), scales)
    assert np.array_equal(layout.dense(packed), weight)


def test_a_measurement_tells_forms_apart():
    layer = Layer("x", 256, 256, 4, 32, True)
    seconds = measure.measure(layer, ("packed", "tiled", "dense"), 32, 1)
    assert all(0 < s < 1 for s in seconds.values())
    assert len(set(seconds.values())) == 3


def test_inspect_says_what_became_of_the_layers(tmp_path, monkeypatch):
    from edgesft.stages import inspection, layers

    monkeypatch.setattr(measure, "COLD_BYTES", 1 << 16)
    _, out = exported(tmp_path, sparse="auto")
    found = inspection._layers(out)
    assert (found["graph"], found["without the kernels"]) == ("model.onnx", "model.plain.onnx")
    assert set(found["layers"]) >= {"all", "head", "layers.*.qkv", "layers.*.down"}
    for name, line in found["layers"].items():
        assert "bits a weight" in line
        assert name == "all" or " us" in line
    (tmp_path / "empty").mkdir()
    assert inspection._layers(tmp_path / "empty") == {}
    rows = json.loads((out / "export.json").read_text())["packed"]
    summed = layers.read(out)
    assert sum(row["count"] for row in summed["rows"]) == len(rows) == 9
    assert sum(row["weights"] for row in summed["rows"]) == sum(r["rows"] * r["columns"] for r in rows)
    assert summed["packed"] + summed["tiled"] + summed["dense"] == 9
    bits = sum(r["rows"] * r["columns"] * r["bits_per_weight"] for r in rows)
    assert summed["bits_per_weight"] == pytest.approx(
        bits / sum(r["rows"] * r["columns"] for r in rows), abs=1e-3
    )


def test_what_a_node_moves_is_counted_from_its_bytes(tmp_path):
    _, out = exported(tmp_path)  # hidden 64, vocabulary 96
    graph = operators_of.read_graph(out)
    entries = json.loads((out / "export.json").read_text())["weights"]
    sizes = {
        t.name: t for t in onnx.load(str(out / "model.onnx"), load_external_data=False).graph.initializer
    }

    def held(name):
        parts = (("tensor", 1), ("scales", 2))
        return sum(int(np.prod(sizes[entries[name][key]].dims)) * size for key, size in parts)

    float_ = operators_of.Tensor
    node = graph.nodes["layers.0.down/PackedLinear"]
    inputs, outputs = (float_("float", (1, 3, 96)),), (float_("float", (1, 3, 64)),)
    found = cost(Call("PackedLinear", node, inputs, outputs))
    assert found.bytes == held("model.layers.0.mlp.down_proj.weight") + 4 * 3 * (96 + 64)
    assert found.flops == 2 * 3 * 96 * 64
    node = graph.nodes["layers.0.qkv/PackedLinear"]  # its norm is a weight of it too
    inputs, outputs = (float_("float", (1, 1, 64)),), (float_("float", (1, 1, 128)),)
    found = cost(Call("PackedLinear", node, inputs, outputs))
    assert found.bytes == held("model.layers.0.self_attn.q_proj.weight") + 4 * (64 + 64 + 128)
    node = graph.nodes["embedding/PackedEmbedding"]
    ids, rows = float_("int64", (1, 5)), float_("float", (1, 5, 64))
    found = cost(Call("PackedEmbedding", node, (ids,), (rows,)))
    assert found.bytes == 4 * 5 * 64 + 5 * 64  # a byte a code; five of 96 rows
    whole = {e["tensor"]: held(name) for name, e in entries.items() if "packed" in e}
    norms = 4 * 64 * 5
    rest = graph.weight_bytes - sum(whole.values()) - norms
    assert 0 <= rest < 10_000  # tables of the rotary embedding, small integers
    assert graph.parameters == sum(
        r["rows"] * r["columns"] for r in json.loads((out / "export.json").read_text())["packed"]
    )


def test_the_plain_graph_is_counted_as_it_is_held(tmp_path, monkeypatch):
    from edgesft.exporters import custom

    _, out = exported(tmp_path)
    packed = operators_of.read_graph(out)
    for bits in (9, 32):
        monkeypatch.setattr(custom, "plain_bits", lambda bits=bits: bits)
        graph = operators_of.read_graph(out, PLAIN)
        assert graph.parameters == packed.parameters
        assert graph.cache_bytes == packed.cache_bytes
        assert graph.weight_bytes == pytest.approx(graph.parameters * bits / 8, rel=0.2)


def test_an_embedding_of_its_own_is_tiled(tmp_path):
    """ONNX Runtime 1.22 has no gather of its own for codes of 8 bits."""
    _, out = exported(tmp_path, "llama-biased")
    found = operators(out)
    assert "PackedEmbedding" in found
    assert not {"GatherBlockQuantized", "MatMulNBits"} & set(found)
    rows = json.loads((out / "export.json").read_text())["packed"]
    kinds = {r["layer"]: (r["kind"], r["bits"]) for r in rows}
    assert kinds["embedding"] == kinds["head"] == ("tiled", 8)
