"""The operation in ONNX Runtime: its noise and masks are those of the kernels, its products right."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from edgesft.core.errors import DeviceError
from edgesft.core.protocols import Mask, Shift
from edgesft.kernels import native
from edgesft.kernels.perturb import host, ort_op

ort = pytest.importorskip("onnxruntime")
TENSOR = 0x9ABCDEF0
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


@pytest.fixture(autouse=True)
def _compiler() -> None:
    usable, why = ort_op.state()
    if not usable:
        pytest.skip(why)


def _session(bias: bool = False, threads: int = 1, rank: int = 2) -> Any:
    names = ["x", "w", *ort_op.OPTIONS, *(["bias"] if bias else [])]
    shapes = {"x": ["n", *["t"] * (rank - 2), "in"], "w": ["out", "in"], "bias": ["out"], "shifts": ["k", 3]}
    kinds = {"shifts": INT64, "mask_choice": INT64}
    inputs = [
        helper.make_tensor_value_info(
            n, kinds.get(n, FLOAT), shapes.get(n, ["k"] if n == "shift_scale" else None)
        )
        for n in names
    ]
    node = helper.make_node(ort_op.OP, names, ["y"], domain=ort_op.DOMAIN, tensor=TENSOR, row=1)
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", FLOAT, None)])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(ort_op.DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    ort_op.register(options)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _run(
    session: Any,
    x: np.ndarray,
    w: np.ndarray,
    shifts: Sequence[Shift | None],
    mask: Mask,
    table: np.ndarray | None = None,
    **more: np.ndarray,
) -> np.ndarray:
    rows = [(s.seed, ort_op.LAWS[s.law], s.rank) if s else (0, 0, 0) for s in shifts]
    feeds = {
        "x": x,
        "w": w,
        "shifts": np.array(rows, np.int64) if table is None else table,
        "shift_scale": np.array([s.scale if s else 0 for s in shifts], np.float32),
        "mask_range": np.array([[9, 9], [mask.low, mask.high]], np.float32),
        "mask_choice": np.array([[0, 0], [mask.keep, mask.seed]], np.int64),
        **more,
    }
    (found,) = session.run(None, feeds)
    result: np.ndarray = found
    return result


def _weight(out: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((out, width)).astype(np.float32)


@pytest.mark.parametrize(
    "shift", [Shift(5, 0.25), Shift(6, -0.5, "rademacher"), Shift(7, 0.5, "low-rank", 3)]
)
@pytest.mark.parametrize("mask", [Mask(), Mask(0.1, 0.7), Mask(high=0.9, keep=77, seed=3)])
def test_the_weights_have_the_bits_of_the_update(shift: Shift, mask: Mask) -> None:
    if shift.law == "low-rank" and mask != Mask():
        pytest.skip("a low-rank direction has no mask")
    w = _weight(37, 70)  # a piece of 256 entries ends inside a row
    found = _run(_session(), np.eye(70, dtype=np.float32), w, [shift], mask).T
    moved = w.copy()
    active = host.descend(moved, shifts=[shift], tensor=TENSOR, mask=mask)
    assert 0 < active <= w.size
    assert (active < w.size) == (mask != Mask())
    assert not np.array_equal(moved, w)
    np.testing.assert_array_equal(found, moved)


def test_groups_meet_their_own_weights_and_share_what_is_equal() -> None:
    w, x = _weight(50, 33), _weight(40, 33, 1)
    shifts = [Shift(1, 0.1), Shift(1, -0.1), None, Shift(2, 0.3, "rademacher")]
    mask = Mask(high=0.8)
    found = _run(_session(), x, w, shifts, mask)
    for part, rows, shift in zip(np.split(found, 4), np.split(x, 4), shifts, strict=True):
        alone = _run(_session(), rows, w, [shift], mask)
        np.testing.assert_array_equal(part, alone)
        moved = w.copy()
        if shift:
            host.descend(moved, shifts=[shift], tensor=TENSOR, mask=mask)
        exact = rows.astype(np.float64) @ moved.astype(np.float64).T
        np.testing.assert_allclose(part, exact, atol=2e-5)


@pytest.mark.parametrize(("rows", "out", "width"), [(1, 1, 1), (7, 5, 16), (13, 131, 97), (3, 300, 1100)])
def test_every_size_and_any_number_of_threads(rows: int, out: int, width: int) -> None:
    w, x, bias = _weight(out, width), _weight(rows, width, 1), _weight(1, out, 2)[0]
    one = _run(_session(bias=True), x, w, [None], Mask(), bias=bias)
    two = _run(_session(bias=True, threads=2), x, w, [None], Mask(), bias=bias)
    np.testing.assert_allclose(one, x.astype(np.float64) @ w.T.astype(np.float64) + bias, atol=1e-4)
    np.testing.assert_array_equal(one, two)


def test_the_leading_axes_stay() -> None:
    w, x = _weight(8, 12), _weight(20, 12, 1).reshape(4, 5, 12)
    found = _run(_session(rank=3), x, w, [None, Shift(3, 0.1)], Mask())
    assert found.shape == (4, 5, 8)
    np.testing.assert_allclose(found[:2], x[:2] @ w.T, atol=1e-5)
    assert _run(_session(rank=3), x[:0], w, [None], Mask()).shape == (0, 5, 8)


def test_an_empty_mask_and_a_scale_of_zero_leave_the_weights() -> None:
    w, x = _weight(8, 12), _weight(5, 12, 1)
    plain = _run(_session(), x, w, [None], Mask())
    np.testing.assert_array_equal(_run(_session(), x, w, [Shift(1, 0.5)], Mask(keep=0)), plain)
    assert not np.array_equal(_run(_session(), x, w, [Shift(1, 0.5)], Mask()), plain)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"x": np.zeros((3, 12), np.float32)}, "equal groups"),
        ({"x": np.zeros((4, 11), np.float32)}, "last axis"),
        ({"table": np.zeros((1, 3), np.int64)}, "not \\(groups, 3\\)"),
        ({"table": np.full((2, 3), 2, np.int64) * [[1, 1, 0]]}, "law or rank"),
        ({"mask_range": np.zeros((1, 2), np.float32)}, "mask table"),
        ({"bias": np.zeros(7, np.float32)}, "not \\(out,\\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changed: dict[str, np.ndarray], reason: str) -> None:
    feeds = {"x": np.zeros((4, 12), np.float32), "bias": np.zeros(8, np.float32)} | changed
    with pytest.raises(Exception, match=reason):
        _run(_session(bias=True), feeds.pop("x"), _weight(8, 12), [None, None], Mask(), **feeds)


def test_without_a_compiler_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    ort_op._library.cache_clear()
    monkeypatch.setenv("EDGESFT_NATIVE", "0")
    assert not native.enabled()
    with pytest.raises(DeviceError, match=r"needs a C\+\+ compiler on the device: EDGESFT_NATIVE=0"):
        ort_op.register(ort.SessionOptions())
