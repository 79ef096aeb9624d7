"""The compiled kernels against the reference, every instruction set of this machine."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesft.kernels.nm_matmul import cpu, layout, library, reference
from edgesft.kernels.nm_matmul.layout import NotPacked

from .packs import KINDS, matrix

pytestmark = pytest.mark.skipif(library.load() is None, reason="no compiled kernels on this machine")
ALL = ("generic", "avx2", "avx512", "neon", "neon_dot")


def everywhere(call):
    """`call` by every instruction set of this machine; they agree bit for bit, and the first is returned."""
    before = cpu.instruction_set()
    try:
        found = [call() for name in ALL if cpu.choose(name)]
    finally:
        cpu.choose(before)
    for other in found[1:]:
        assert np.array_equal(found[0], other, equal_nan=True)
    return found[0]


def close(got, expected, bound=2e-6, size=0.0):
    """size: of the summands, which may all but cancel."""
    assert np.abs(got - expected).max() <= bound * max(float(np.abs(expected).max()), size, 1e-6)


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_products_are_those_of_the_reference(data):
    value, sparse = data.draw(st.sampled_from(KINDS))
    rows, columns = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 200))
    group = data.draw(st.sampled_from([0, 32, 64, 128])) if value in layout.OFFSETS else 0
    m, level = data.draw(st.integers(1, 33)), data.draw(st.sampled_from([0, 4]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    packed = matrix(rng, rows, columns, value, sparse, group)
    weights = cpu.Weights(packed)
    x = rng.standard_normal((m, columns)).astype(np.float32)
    bias = rng.standard_normal(rows).astype(np.float32) if data.draw(st.booleans()) else None
    residual = rng.standard_normal((m, rows)).astype(np.float32) if data.draw(st.booleans()) else None
    got = everywhere(lambda: weights.linear(x, bias=bias, residual=residual, level=level))
    size = float((np.abs(x) @ np.abs(layout.dense(packed)).T).max())
    close(got, reference.linear(packed, x, bias=bias, residual=residual, level=level), size=size)


@pytest.mark.parametrize(("value", "sparse"), KINDS[:4])
def test_whole_numbers_are_exact(value, sparse):
    """Blocks of x whose largest entry is 127 are their own codes; sums below 2^24 are exact in float32."""
    rng = np.random.default_rng(0)
    low, high = layout.LIMITS[value]
    packed = matrix(rng, 50, 96, value, sparse, 32)
    ones = np.ones_like(packed.scales)
    packed = dataclasses.replace(packed, scales=ones, unit=1.0)
    x = rng.integers(-127, 128, (9, 96)).astype(np.float32)
    x[:, ::32] = 127
    expected = x.astype(np.int64) @ layout.codes_of(packed).astype(np.int64).T
    assert np.abs(expected).max() < 2**24
    assert np.array_equal(everywhere(lambda: cpu.Weights(packed).linear(x)), expected)
    edge = dataclasses.replace(packed, stream=packed.stream)  # the extremes together: nothing saturates
    whole = np.where(layout.codes_of(edge) != 0, low, 0).astype(np.int8)
    extreme = layout.pack_codes(whole, layout.scales_of(packed), value, 32, sparse=sparse)
    for sign in (-127.0, 127.0):
        x[:] = sign
        expected = x.astype(np.int64) @ whole.astype(np.int64).T
        assert np.array_equal(everywhere(lambda: cpu.Weights(extreme).linear(x)), expected)
    assert high > 0


@pytest.mark.parametrize("m", [1, 4, 5, 30])
def test_norm_and_gate_are_fused(m):
    rng = np.random.default_rng(m)
    packed = matrix(rng, 96, 100, "int4", True, 32)
    x = rng.standard_normal((m, 100)).astype(np.float32)
    norm = rng.standard_normal(100).astype(np.float32)
    bias = rng.standard_normal(96).astype(np.float32)
    weights = cpu.Weights(packed)
    for level, bound in ((0, 2e-6), (4, 2e-2)):  # a norm one bit off may move a code of x at level 4
        more = {"norm": norm, "epsilon": 1e-5, "bias": bias, "gate": True, "level": level}
        got = everywhere(lambda more=more: weights.linear(x, **more))
        assert got.shape == (m, 48)
        close(got, reference.linear(packed, x, **more), bound)


def test_numbers_that_are_none_stay_none():
    packed = matrix(np.random.default_rng(0), 16, 64, "int4", True, 32)
    x = np.ones((1, 64), np.float32)
    x[0, 40] = np.nan
    assert np.isnan(everywhere(lambda: cpu.Weights(packed).linear(x))).all()
    x[0, 40] = np.inf
    assert not np.isfinite(everywhere(lambda: cpu.Weights(packed).linear(x))).any()
    assert (everywhere(lambda: cpu.Weights(packed).linear(np.zeros((1, 64), np.float32))) == 0).all()


def test_rows_are_those_of_the_matrix():
    rng = np.random.default_rng(0)
    for value, sparse in KINDS:
        packed = matrix(rng, 50, 70, value, sparse, 32 if value in layout.OFFSETS else 0)
        which = np.array([49, 0, 17, 17], np.int64)
        assert np.allclose(cpu.Weights(packed).rows(which), layout.dense(packed)[which], rtol=1e-6, atol=0)
    with pytest.raises(IndexError):
        cpu.Weights(packed).rows(np.array([50]))


def test_threads_change_no_bit():
    rng = np.random.default_rng(0)
    packed = matrix(rng, 640, 320, "int4", True, 64)
    weights = cpu.Weights(packed)
    for m in (1, 7, 40):
        x = rng.standard_normal((m, 320)).astype(np.float32)
        assert np.array_equal(weights.linear(x, threads=2), weights.linear(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: {"stream": p.stream[:-1]}, "stream has another size"),
        (lambda p: {"scales": p.scales[:-16]}, "scales have another number"),
        (lambda p: {"stream": np.zeros_like(p.stream)}, "not in order"),
        (lambda p: {"scales": np.full_like(p.scales, np.inf)}, "scale is not finite"),
        (lambda p: {"rows": p.rows + 16}, "another size"),
        (lambda p: {"unit": float("inf")}, "unit is not finite"),
    ],
)
def test_the_library_itself_refuses_what_is_no_matrix(change, words):
    packed = matrix(np.random.default_rng(0), 32, 64, "int4", True, 32)
    with pytest.raises(NotPacked, match=words):
        cpu.Weights(dataclasses.replace(packed, **change(packed)))


def test_arrays_of_other_shapes_are_refused():
    weights = cpu.Weights(matrix(np.random.default_rng(0), 48, 64, "int4", True, 32))
    x = np.zeros((2, 64), np.float32)
    with pytest.raises(ValueError, match="expected \\(m, 64\\)"):
        weights.linear(x[:, :63])
    with pytest.raises(ValueError, match="bias has the shape"):
        weights.linear(x, bias=np.zeros(47, np.float32))
    with pytest.raises(ValueError, match="multiple of 32 rows"):
        weights.linear(x, gate=True)
    with pytest.raises(ValueError, match="level is 1"):
        weights.linear(x, level=1)
    assert weights.linear(x[:0]).shape == (0, 48)
