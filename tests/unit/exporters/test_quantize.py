"""Block quantisation: exact zeros, exact inverse, the runtime's own arithmetic, and a small error."""

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgesft.exporters.quantize import blocks, dequantize, quantize


def _weights(rows: int, inputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, inputs)).astype(np.float32)


def _two_of_four(w: np.ndarray) -> np.ndarray:
    groups = w.reshape(len(w), -1, 4).copy()
    np.put_along_axis(groups, np.abs(groups).argsort(-1)[..., :2], 0, -1)
    return groups.reshape(w.shape)


def _runtime(w: np.ndarray, bits: int, group: int) -> np.ndarray:
    """The matrix as ONNX Runtime sees it: MatMulNBits of the identity, in float32."""
    q = quantize(w, bits, group)
    names = ["x", "codes", "scales"] + (["zeros"] if q.zeros is not None else [])
    held = [numpy_helper.from_array(q.codes, "codes"), numpy_helper.from_array(q.scales, "scales")]
    if q.zeros is not None:
        held.append(numpy_helper.from_array(q.zeros, "zeros"))
    attributes = {"N": w.shape[0], "K": w.shape[1], "bits": bits, "block_size": group, "accuracy_level": 0}
    node = helper.make_node("MatMulNBits", names, ["y"], domain="com.microsoft", **attributes)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", w.shape[1]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", w.shape[0]])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph([node], "g", [x], [y], held), opset_imports=opsets, ir_version=10
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.eye(w.shape[1], dtype=np.float32)})[0].T


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("inputs", "group"), [(64, 32), (96, 32), (80, 32), (64, 16), (256, 128)])
def test_dequantised_is_what_the_runtime_computes_with(bits: int, inputs: int, group: int) -> None:
    w = _weights(24, inputs)
    ours = dequantize(quantize(w, bits, group), bits, inputs)
    np.testing.assert_allclose(_runtime(w, bits, group), ours, rtol=0, atol=2e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_stay_zeros(bits: int) -> None:
    w = _two_of_four(_weights(32, 128))
    made = dequantize(quantize(w, bits, 32), bits, 128)
    assert (made[w == 0] == 0).all()
    assert (_runtime(w, bits, 32)[w == 0] == 0).all()
    assert ((made.reshape(32, -1, 4) == 0).sum(-1) >= 2).all()


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.085), (8, 0.007)])
def test_error_is_small(bits: int, bound: float) -> None:
    w = _weights(64, 512)
    error = np.linalg.norm(dequantize(quantize(w, bits, 32), bits, 512) - w) / np.linalg.norm(w)
    assert error < bound


def test_the_search_beats_the_plain_range() -> None:
    w = _weights(64, 512)
    cut = w.reshape(-1, 32)
    low, high = cut.min(1, keepdims=True), cut.max(1, keepdims=True)
    scale = (high - low) / 15
    zero = np.rint(-low / scale)
    plain = (np.clip(np.rint(cut / scale) + zero, 0, 15) - zero) * scale
    ours = dequantize(quantize(w, 4, 32), 4, 512)
    assert np.square(ours - w).sum() < 0.95 * np.square(plain - cut).sum()


def test_what_fits_the_codes_is_kept() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (8, 64))
    codes[:, ::32], codes[:, 1::32] = 0, 15
    w = ((codes - 6) * 0.25).astype(np.float32)
    np.testing.assert_allclose(dequantize(quantize(w, 4, 32), 4, 64), w, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 1e-42, 3.0, -3.0, 1e37])
def test_constant_blocks(bits: int, value: float) -> None:
    w = np.full((4, 64), value, np.float32)
    made = dequantize(quantize(w, bits, 32), bits, 64)
    assert np.isfinite(made).all()
    np.testing.assert_allclose(made, w, rtol=0.01, atol=1e-36)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=16, max_size=16),
    st.sampled_from([4, 8]),
)
def test_any_block(values: list[float], bits: int) -> None:
    w = np.array([values], np.float32)
    made = dequantize(quantize(w, bits, 16), bits, 16)
    assert (made[w == 0] == 0).all()
    spread = max(w.max(), 0) - min(w.min(), 0)
    assert np.abs(made - w).max() <= spread * (0.3 if bits == 4 else 0.005) + 1e-30


def test_rows_do_not_depend_on_their_neighbours() -> None:
    w = _weights(5000, 64)
    np.testing.assert_array_equal(quantize(w, 4, 32).codes[4321], quantize(w[4321:4322], 4, 32).codes[0])


def test_sizes() -> None:
    q = quantize(_weights(8, 80), 4, 32)
    assert q.codes.shape == (8, 3, 16)
    assert q.scales.shape == (8, 3)
    assert q.zeros is not None
    assert q.zeros.shape == (8, 2)
    assert blocks(80, 32) == 3
    assert quantize(_weights(8, 80), 8, 32).zeros is None
    with pytest.raises(ValueError, match="bits is 3"):
        quantize(_weights(8, 80), 3, 32)
