import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesft.core import region
from edgesft.core.region import Flat, above, below, kth_smallest_magnitude

torch.set_num_threads(1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50), st.data()
)
def test_kth_smallest_magnitude_is_the_sorted_one(values, data):
    k = data.draw(st.integers(1, len(values)))
    w = torch.tensor(values)
    assert kth_smallest_magnitude(w, k) == float(w.abs().sort().values[k - 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_kth_smallest_magnitude_of_every_float_type(dtype, monkeypatch):
    monkeypatch.setattr(region, "CHUNK", 100)  # several chunks
    w = torch.randn(37, 41).to(dtype)
    for k in (1, 700, 37 * 41):
        assert kth_smallest_magnitude(w, k) == float(w.abs().flatten().kthvalue(k).values)


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
