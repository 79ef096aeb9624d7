import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesft.kernels.nm_matmul.scales import codes, search_scales, values

from .packs import prune


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 200),
    st.sampled_from([0, 32, 64]),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_never_worse_than_the_largest_entry_as_the_range(rows, columns, group, sparse, seed):
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(4, (rows, columns)).astype(np.float32)
    weight = prune(weight) if sparse else weight
    for bits, most in ((4, 7), (8, 127)):
        scales = search_scales(weight, bits, group)
        found = codes(weight, scales, bits, group)
        assert np.array_equal(found[weight == 0], np.zeros((weight == 0).sum()))
        error = np.square(values(found, scales, group) - weight).sum()
        span = group or columns
        padded = np.pad(weight, ((0, 0), (0, -columns % span)))
        plain = (np.abs(padded.reshape(rows, -1, span)).max(-1) / most).astype(np.float16)
        by_range = values(codes(weight, plain, bits, group), plain, group)
        assert error <= np.square(by_range - weight).sum() * (1 + 1e-5) + 1e-12


def test_the_search_pays_with_four_bits():
    weight = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    scales = search_scales(weight, 4, 32)
    error = np.linalg.norm(values(codes(weight, scales, 4, 32), scales, 32) - weight) / np.linalg.norm(weight)
    assert error < 0.085  # absmax / 7 leaves 0.097


def test_weights_on_a_grid_find_it():
    rng = np.random.default_rng(1)
    grid = rng.integers(-8, 8, (8, 64)).astype(np.float32)
    grid[:, ::32] = -8
    scales = search_scales(grid * np.float32(0.125), 4, 32)
    assert np.array_equal(values(codes(grid * 0.125, scales, 4, 32), scales, 32), grid * np.float32(0.125))


def test_importance_moves_the_error_elsewhere():
    weight = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
    share = np.ones(64, np.float32)
    share[:8] = 100

    def error(scales):
        return np.square(values(codes(weight, scales, 4, 64), scales, 64) - weight)[:, :8].sum()

    assert error(search_scales(weight, 4, 64, share)) < error(search_scales(weight, 4, 64))


def test_nothing_but_zeros_and_nothing_that_is_no_number():
    assert (search_scales(np.zeros((3, 40), np.float32), 4, 32) == 0).all()
    with pytest.raises(ValueError, match="not finite"):
        search_scales(np.array([[1.0, np.nan]], np.float32), 4, 0)
    with pytest.raises(ValueError, match="range of fp16"):
        search_scales(np.full((1, 32), 1e7, np.float32), 4, 32)
