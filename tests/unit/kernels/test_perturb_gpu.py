"""The Triton source against the reference: on a GPU, or in Triton's interpreter where it is installed."""

import importlib.util

import pytest
import torch

from edgesft.core.protocols import Mask, Shift, Update
from edgesft.kernels.perturb import Reference
from edgesft.kernels.perturb.gpu import Triton

torch.set_num_threads(1)
SEED, TENSOR = 0x9123456789ABCDEF, 0xFEDCBA98
MASKS = [Mask(), Mask(0.005, 0.02), Mask(keep=100, seed=5)]


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if request.param == "cuda":
        return "cuda"
    if torch.cuda.is_available():
        pytest.skip("Triton interprets or compiles, not both in one process")
    monkeypatch.setenv("EDGESFT_TRITON", "interpret")
    return "cpu"


def weight(device, dtype=torch.float32):
    return (0.02 * torch.randn(7, 301, generator=torch.Generator().manual_seed(0))).to(dtype).to(device)


@pytest.mark.parametrize(("law", "tolerance"), [("gaussian", 2e-6), ("rademacher", 0.0)])
def test_noise(device, law, tolerance):
    found, expected = torch.empty(2000, device=device), torch.empty(2000, device=device)
    for each, out in ((Triton(), found), (Reference(), expected)):
        each.noise(out, seed=SEED, tensor=TENSOR, start=77, law=law, rank=0, width=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strips(device, mask, bare, dtype):
    w, shifts = weight(device, dtype), (Shift(3, 1e-2, "rademacher"), None, Shift(3, -1e-2, "rademacher"))
    made = []
    for each in (Triton(), Reference()):
        outs = [torch.empty(4, 301, dtype=dtype, device=device) for _ in shifts]
        each.strips(w, slice(2, 6), shifts, outs, tensor=TENSOR, mask=mask, bare=bare)
        made.append(outs)
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, None), (torch.bfloat16, 11)])
def test_updates(device, mask, dtype, rounding):
    left, right = weight(device, dtype), weight(device, dtype)
    updates = [
        Update((Shift(k, 1e-3, "rademacher"), Shift(k + 90, -2e-3, "rademacher")), 0.99, rounding)
        for k in range(3)
    ]
    active = [
        each.replay(w, updates, tensor=TENSOR, mask=mask)
        for each, w in ((Triton(), left), (Reference(), right))
    ]
    assert active[0] == active[1] > 0
    # a product and a sum may be contracted into one rounding on a GPU
    atol = 0 if device == "cpu" else 1e-8
    torch.testing.assert_close(left.float(), right.float(), rtol=0, atol=atol)


def test_low_rank_noise_is_left_to_the_reference(device):
    w, shift = weight(device), Shift(3, 1e-2, "low-rank", 2)
    outs = [torch.empty_like(w)]
    Triton().strips(w, slice(0, 7), (shift,), outs, tensor=TENSOR, mask=Mask())
    expected = [torch.empty_like(w)]
    Reference().strips(w, slice(0, 7), (shift,), expected, tensor=TENSOR, mask=Mask())
    assert torch.equal(outs[0], expected[0])
