"""The operations inside ONNX Runtime."""

import dataclasses

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgesft.core.errors import DeviceError
from edgesft.kernels.nm_matmul import layout, library, ort_op, reference

from .packs import KINDS, matrix

pytestmark = pytest.mark.skipif(library.load() is None, reason="no compiled kernels on this machine")


def model(packed, *, op="PackedLinear", optional=(), change=None, constant=True, **more):
    said = ort_op.attributes(packed)
    if op == "PackedLinear":
        said |= {"level": 4, "gate": 0, "epsilon": 1e-5}
    said |= more | (change or {})
    said = {key: value for key, value in said.items() if value is not None}
    names = ["x", "stream", "scales", *(n if n in optional else "" for n in ("bias", "residual", "norm"))]
    if op == "PackedEmbedding":
        names = names[:3]
    while names[-1] == "":
        names.pop()
    kind = TensorProto.INT64 if op == "PackedEmbedding" else TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info("x", kind, None)]
    inputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in optional]
    held = [
        numpy_helper.from_array(packed.stream, "stream"),
        numpy_helper.from_array(packed.scales, "scales"),
    ]
    if not constant:
        inputs.append(helper.make_tensor_value_info("stream", TensorProto.UINT8, None))
    graph = helper.make_graph(
        [helper.make_node(op, names, ["y"], domain="edgesft", **said)],
        "g",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        held,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("edgesft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session(made, threads=1):
    options = ort_op.register(ort.SessionOptions())
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    data = made.SerializeToString() if isinstance(made, onnx.ModelProto) else made
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def close(got, expected, bound=2e-6):
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= bound * np.abs(expected).max()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("value", "sparse"), KINDS)
def test_a_product_with_everything(value, sparse, threads):
    rng = np.random.default_rng(0)
    packed = matrix(rng, 300, 200, value, sparse, 64 if value in layout.OFFSETS else 0)
    run = session(model(packed, optional=("bias", "residual")), threads)
    bias = rng.standard_normal(300).astype(np.float32)
    for m in (1, 3, 6, 40):
        x = rng.standard_normal((2, m, 200)).astype(np.float32)
        residual = rng.standard_normal((2, m, 300)).astype(np.float32)
        (got,) = run.run(None, {"x": x, "bias": bias, "residual": residual})
        assert got.shape == (2, m, 300)
        flat = {"bias": bias, "residual": residual.reshape(-1, 300)}
        close(got.reshape(-1, 300), reference.linear(packed, x.reshape(-1, 200), **flat))


def test_norm_and_gate_and_exact_activations():
    rng = np.random.default_rng(0)
    packed = matrix(rng, 96, 64, "int4", True, 32)
    norm, x = rng.standard_normal(64).astype(np.float32), rng.standard_normal((3, 64)).astype(np.float32)
    (got,) = session(model(packed, optional=("norm",), level=0, gate=1)).run(None, {"x": x, "norm": norm})
    close(got, reference.linear(packed, x, norm=norm, epsilon=1e-5, level=0, gate=True))


def test_rows_of_a_table():
    packed = matrix(np.random.default_rng(0), 70, 96, "int8", False, 32)
    run = session(model(packed, op="PackedEmbedding"))
    ids = np.array([[69, 0], [3, 3]])
    (got,) = run.run(None, {"x": ids})
    assert np.allclose(got, layout.dense(packed)[ids], rtol=1e-6)
    with pytest.raises(Exception, match="token 70 is not one of 70"):
        run.run(None, {"x": np.array([70])})
    with pytest.raises(Exception, match="token -1 "):
        run.run(None, {"x": np.array([-1])})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "reads format 1 and the model has 2"),
        ({"rows": 49}, "stream has another size"),
        ({"columns": -3}, "rows and columns"),
        ({"group": 31}, "multiple of 32"),
        ({"value": 77}, "unknown kind"),
        ({"sparse": 5}, "unknown pattern"),
        ({"level": 3}, "`level` is not 0 or 4"),
        ({"gate": 1}, "multiple of 32 rows"),
        ({"unit": float("nan")}, "unit is not finite"),
        ({"rows": None}, "rows"),
    ],
)
def test_a_broken_node_is_refused_when_it_is_loaded(change, words):
    packed = matrix(np.random.default_rng(0), 33, 64, "int4", True, 32)
    with pytest.raises(Exception, match=words):
        session(model(packed, change=change))


def test_broken_data_are_refused_when_they_are_loaded():
    packed = matrix(np.random.default_rng(0), 32, 64, "int4", True, 32)
    for change, words in (
        ({"stream": np.zeros_like(packed.stream)}, "not in order"),
        ({"stream": packed.stream[:-7]}, "stream has another size"),
        ({"scales": packed.scales * np.float16(np.inf)}, "not finite"),
    ):
        with pytest.raises(Exception, match=words):
            session(model(dataclasses.replace(packed, **change)))
    with pytest.raises(Exception, match="is not constant"):
        session(model(packed, constant=False))


def test_rows_of_x_that_do_not_fit():
    packed = matrix(np.random.default_rng(0), 32, 64, "int4", True, 32)
    run = session(model(packed, optional=("bias",)))
    with pytest.raises(Exception, match="last axis of `x` is not `columns`"):
        run.run(None, {"x": np.zeros((1, 63), np.float32), "bias": np.zeros(32, np.float32)})
    with pytest.raises(Exception, match="`bias` has another size"):
        run.run(None, {"x": np.zeros((1, 64), np.float32), "bias": np.zeros(31, np.float32)})
    (empty,) = run.run(None, {"x": np.zeros((0, 64), np.float32), "bias": np.zeros(32, np.float32)})
    assert empty.shape == (0, 32)


def test_sessions_come_and_go():
    """Each has its copy of the weights and gives it back."""
    packed = matrix(np.random.default_rng(0), 640, 640, "int4", True, 32)
    x = np.ones((1, 640), np.float32)
    first = session(model(packed))
    (expected,) = first.run(None, {"x": x})
    for _ in range(5):
        again = session(model(packed))
        assert np.array_equal(again.run(None, {"x": x})[0], expected)
        del again
    assert np.array_equal(first.run(None, {"x": x})[0], expected)


def test_an_old_runtime_is_refused(monkeypatch):
    monkeypatch.setattr(ort, "__version__", "1.16.3")
    with pytest.raises(DeviceError, match=r"1\.16\.3 is too old"):
        ort_op.register(ort.SessionOptions())
