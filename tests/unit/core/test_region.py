import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesft.core import region
from edgesft.core.errors import UsageError
from edgesft.core.protocols import Mask
from edgesft.core.region import Flat, Scattered, Whole, above, below, kth_smallest_magnitude

torch.set_num_threads(1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50), st.data()
)
def test_kth_smallest_magnitude_is_the_sorted_one(values, data):
    k = data.draw(st.integers(1, len(values)))
    w = torch.tensor(values)
    assert kth_smallest_magnitude(w, k) == float(w.abs().sort().values[k - 1])
    assert kth_smallest_magnitude(w.numpy(), k) == kth_smallest_magnitude(w, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_kth_smallest_magnitude_of_every_float_type(dtype, monkeypatch):
    monkeypatch.setattr(region, "CHUNK", 100)  # several chunks
    w = torch.randn(37, 41).to(dtype)
    for k in (1, 700, 37 * 41):
        assert kth_smallest_magnitude(w, k) == float(w.abs().flatten().kthvalue(k).values)
        if dtype is not torch.bfloat16:  # which numpy has not
            assert kth_smallest_magnitude(w.numpy(), k) == kth_smallest_magnitude(w, k)


def test_a_view_is_not_its_storage():
    w = torch.arange(12.0).view(3, 4)
    for part in (w.t(), w[:, 1:3]):
        expected = float(part.flatten().sort().values[2])
        assert kth_smallest_magnitude(part, 3) == kth_smallest_magnitude(part.numpy(), 3) == expected


def test_bands_are_closed_at_the_threshold():
    w = torch.tensor([[-2.0, 1.0], [0.5, -1.0]])
    assert below(1.0).mask(w).tolist() == [[False, True], [True, True]]
    assert above(1.0).mask(w).tolist() == [[True, True], [False, True]]


def test_flat_region():
    w = torch.arange(6.0).view(2, 3)
    chosen = Flat(torch.tensor([1, 5]))
    assert chosen.take(w).tolist() == [1.0, 5.0]
    assert chosen.add(w, torch.tensor([10.0, 20.0])).tolist() == [[0.0, 11.0, 2.0], [3.0, 4.0, 25.0]]
    assert chosen.mask(w).sum() == 2


def test_rules():
    assert Whole().rule() == Mask()
    assert below(0.5).rule() == Mask(high=0.5)
    assert above(0.5).rule() == Mask(0.5, math.inf)
    assert Scattered(keep=64, seed=9, tensor="x.weight").rule() == Mask(keep=64, seed=9)


def scattered(keep=64, seed=9, tensor="x.weight", **values):
    return Scattered(keep=keep, seed=seed, tensor=tensor, **values)


def test_a_random_share_is_one_of_position_and_seed_alone():
    w = torch.randn(100, 130)
    mask = scattered().mask(w)
    assert mask.float().mean() == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / w.numel()))
    assert torch.equal(mask, scattered().mask(w.bfloat16() * 3))
    for other in (scattered(seed=10), scattered(tensor="y.weight")):
        assert (mask & other.mask(w)).float().mean() == pytest.approx(1 / 16, abs=0.02)


def test_a_random_share_of_a_band():
    w = torch.randn(100, 130)
    whole, band = scattered().mask(w), below(0.5).mask(w)
    assert torch.equal(scattered(high=0.5).mask(w), whole & band)


def test_a_share_of_an_unnamed_tensor_has_a_rule_only():
    with pytest.raises(UsageError, match="in place only"):
        Scattered(keep=64, seed=9).mask(torch.ones(2, 2))
