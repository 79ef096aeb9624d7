"""The graph for machines without the library computes what the packed one does, from the same bytes."""

import dataclasses
import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgesft.core import models
from edgesft.core.artifact import Artifact
from edgesft.core.errors import ArtifactError
from edgesft.core.stage import execute
from edgesft.exporters import custom, safety
from edgesft.exporters import onnx as exporter
from edgesft.exporters.description import DATA, MODEL, PLAIN
from edgesft.exporters.dialects import plain
from edgesft.exporters.dialects.graph import Precision
from edgesft.exporters.probe import Probe
from edgesft.exporters.runtime import OnnxRunnable, generate
from edgesft.kernels.nm_matmul import layout, library, ort_op, reference
from edgesft.stages.export import Export

from .sparse_models import FAMILIES, by_turns, exported

needs_library = pytest.mark.skipif(library.load() is None, reason="no compiled kernels on this machine")
VALUES = [("int4", True), ("int8", True), ("int4", False), ("int8", False), ("fp16", True), ("bf16", True)]


@pytest.fixture(autouse=True)
def warned_anew():
    custom._warn.cache_clear()


def random(value, sparse, rows, columns, group=0):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    if sparse:
        weight.reshape(rows, -1, 4)[..., 1:3] = 0
        weight.reshape(rows, -1, 4)[::2, :, :2] = 0
    if value == "fp16":
        weight[0, 0] = 3e-7  # below the normal numbers
        return layout.pack_numbers(weight.astype(np.float16).view(np.uint16), value)
    if value == "bf16":
        return layout.pack_numbers((weight.view(np.uint32) >> 16).astype(np.uint16), value)
    low, high = layout.LIMITS[value]
    codes = np.clip(np.round(weight * high / 3), low, high).astype(np.int8)
    scales = rng.standard_normal((rows, layout.groups(columns, group))).astype(np.float16)
    return layout.pack_codes(codes, scales, value, group, sparse=sparse, unit=0.25)


def session(packed, kind="PackedLinear", more=(), **attributes):
    """A node of ours in its plain form, activations in float32."""
    said = ort_op.attributes(packed) | attributes
    names = ["x", "stream", "scales", *(n if n in more else "" for n in ("bias", "residual", "norm"))]
    while names[-1] == "":
        names.pop()
    x = TensorProto.INT64 if kind == "PackedEmbedding" else TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("x", x, ["b", "s"] + ["c"] * (kind == "PackedLinear"))]
    inputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in more]
    node = helper.make_node(kind, names, ["y"], name=f"n/{kind}", domain="edgesft", **said)
    graph = helper.make_graph(
        [node],
        "g",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(getattr(packed, n), n) for n in ("stream", "scales")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("edgesft", 1)]
    made = plain.convert(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    assert "edgesft" not in {n.domain for n in made.graph.node}
    options = ort.SessionOptions()
    options.log_severity_level = 4
    custom.configure(options, custom.Chosen(PLAIN, plain=True), exact=True)
    return ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("value", "sparse"), VALUES)
@pytest.mark.parametrize(("rows", "columns", "group"), [(96, 64, 0), (70, 200, 96), (32, 320, 64)])
def test_every_kind_is_decoded_to_the_bit(value, sparse, rows, columns, group):
    packed = random(value, sparse, rows, columns, group if value in layout.OFFSETS else 0)
    dense = layout.dense(packed)
    (got,) = session(packed, level=0, gate=0, epsilon=0.0).run(
        None, {"x": np.eye(columns, dtype=np.float32)[None]}
    )
    assert np.array_equal(got[0].T, dense)
    ids = np.array([[rows - 1, 0, 17], [16, 15, 0]])
    (got,) = session(packed, "PackedEmbedding").run(None, {"x": ids})
    assert np.array_equal(got, dense[ids])


@pytest.mark.parametrize("gate", [0, 1])
def test_norm_bias_residual_and_gate(gate):
    rng = np.random.default_rng(1)
    packed = random("int4", True, 64, 96, 32)
    x, norm = (rng.standard_normal(s).astype(np.float32) for s in ((2, 3, 96), 96))
    given = {"bias": rng.standard_normal(64).astype(np.float32), "norm": norm}
    flat = dict(given)
    if not gate:
        given["residual"] = rng.standard_normal((2, 3, 64)).astype(np.float32)
        flat["residual"] = given["residual"].reshape(-1, 64)
    made = session(packed, more=tuple(given), level=0, gate=gate, epsilon=1e-5)
    (got,) = made.run(None, {"x": x, **given})
    expected = reference.linear(packed, x.reshape(-1, 96), level=0, gate=bool(gate), epsilon=1e-5, **flat)
    assert got.shape == (2, 3, 32 if gate else 64)
    np.testing.assert_allclose(got.reshape(expected.shape), expected, atol=1e-5 * np.abs(expected).max())


@needs_library
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", ["int4", "int8", "mixed"])
def test_both_graphs_compute_the_same(tmp_path, family, what, monkeypatch):
    """Heads tied and not, biases, norms of q and k; packed, tiled and dense layers."""
    if what == "mixed":
        monkeypatch.setattr(exporter, "_always", by_turns())
    quantize = "int8" if what == "int8" else "int4"
    _, out = exported(tmp_path, family, precision=Precision(quantize, 32, 0))
    ids = np.random.default_rng(0).integers(0, 96, (2, 12))
    ours, theirs = (
        OnnxRunnable(out, threads=1),
        Probe(out, threads=1, chosen=custom.Chosen(PLAIN, plain=True)),
    )
    assert not ours.chosen.plain
    expected = ours.logits(ids, np.ones_like(ids), np.arange(24))
    got = theirs.logits(ids, np.ones_like(ids), np.arange(24))
    np.testing.assert_allclose(got, expected, atol=3e-5 * np.abs(expected).max())
    prompt = [int(i) for i in ids[0]]
    assert generate(theirs, prompt, 24).tokens == generate(ours, prompt, 24).tokens
    for mine, other in zip(Probe(out, threads=1).hidden(ids[0]), theirs.hidden(ids[0]), strict=True):
        np.testing.assert_allclose(other, mine, atol=1e-4)


@needs_library
def test_without_the_library_the_plain_graph_runs(tmp_path, monkeypatch, capsys):
    _, out = exported(tmp_path, precision=Precision("int4", 32, 4))
    ids = np.random.default_rng(0).integers(0, 96, (1, 20))
    expected = OnnxRunnable(out, threads=1).logits(ids, np.ones_like(ids), np.arange(20))
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setenv("EDGESFT_NATIVE", "0")
    runnable = OnnxRunnable(out, threads=1)
    OnnxRunnable(out, threads=1)
    said = capsys.readouterr().err
    assert said.count("packed weights are run without their kernels") == 1
    assert "EDGESFT_NATIVE=0" in said
    assert runnable.chosen == custom.Chosen(PLAIN, (), plain=True)
    got = runnable.logits(ids, np.ones_like(ids), np.arange(20))
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()  # x in int8, by either


@needs_library
def test_the_weights_are_the_bytes_that_are_there_already(tmp_path):
    _, out = exported(tmp_path)
    assert safety.check(out, PLAIN) == {DATA} == safety.check(out)
    both = [onnx.load(str(out / n), load_external_data=False) for n in (MODEL, PLAIN)]
    assert both[0].graph.initializer == both[1].graph.initializer
    assert both[0].graph.input == both[1].graph.input
    assert both[0].graph.output == both[1].graph.output
    onnx.checker.check_model(str(out / PLAIN))  # the runtime's own operators it leaves alone
    assert {n.domain for n in both[1].graph.node} == {"", "com.microsoft", "edgesft.plain"}
    assert "edgesft" not in {o.domain for o in both[1].opset_import}
    assert {"Sparse4", "Sparse8", "Dense8"} < {f.name for f in both[1].functions}
    assert "SparseBf16" not in {f.name for f in both[1].functions}
    assert (out / PLAIN).stat().st_size < 100_000
    assert json.loads((out / "export.json").read_text())["plain"] == PLAIN


@needs_library
def test_the_file_is_part_of_the_artefact(tmp_path):
    from .sparse_models import make_sparse

    found = models.resolve(str(make_sparse(tmp_path / "model", FAMILIES["llama"]())))
    model = Artifact(found.path, found.kind, found.digest, found.ref, {})
    made, _ = execute(Export(quantize="int4", sparse="always"), {"model": model}, tmp_path / "x")
    assert set(made.manifest["files"]) >= {MODEL, DATA, PLAIN}
    assert made.metrics["bytes"] == sum((tmp_path / "x" / n).stat().st_size for n in (MODEL, DATA, PLAIN))
    with (tmp_path / "x" / PLAIN).open("ab") as file:
        file.write(b"\0")
    from edgesft.exporters.runtime import load

    with pytest.raises(ArtifactError, match=r"model\.plain\.onnx"):
        load(tmp_path / "x", threads=1)


@needs_library
def test_a_plain_graph_that_reaches_outside_is_refused(tmp_path, monkeypatch):
    _, out = exported(tmp_path)
    made = onnx.load(str(out / PLAIN), load_external_data=False)
    held = next(t for t in made.graph.initializer if t.external_data)
    next(e for e in held.external_data if e.key == "location").value = "../secret"
    (out / PLAIN).write_bytes(made.SerializeToString())
    monkeypatch.setenv("EDGESFT_NATIVE", "0")
    with pytest.raises(ArtifactError):
        OnnxRunnable(out, threads=1)


def test_other_exports_have_none(tmp_path):
    _, out = exported(tmp_path, sparse="never")
    assert not (out / PLAIN).exists()
    assert custom.choose(out, json.loads((out / "export.json").read_text())) == custom.Chosen(MODEL)


def test_a_node_that_has_no_plain_form_is_named():
    node = helper.make_node("Other", ["x"], ["y"], domain="edgesft")
    graph = helper.make_graph([node], "g", [], [])
    with pytest.raises(ValueError, match="`Other` has no plain form"):
        plain.convert(helper.make_model(graph))


def test_an_older_runtime_folds_to_float32(monkeypatch):
    said = []

    @dataclasses.dataclass
    class Options:
        def add_session_config_entry(self, key, value):
            said.append((key, value))

    for version, exact, expected in (
        ("1.22.1", False, True),
        ("1.25.0", False, False),
        ("2.0.0", False, False),
        ("1.32.0", True, True),
    ):
        said.clear()
        monkeypatch.setattr(ort, "__version__", version)
        custom.configure(Options(), custom.Chosen(PLAIN, plain=True), exact=exact)
        assert (("session.disable_quant_qdq", "1") in said) == expected
        assert custom.plain_bits() == (32 if version == "1.22.1" else 9)
