"""`descend_` and `replay_`: native, reference and numpy agree bit for bit, in any order of the work."""

import math
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch

from edgesft.core.protocols import Mask, Shift, Update
from edgesft.core.quantized.codes import quantize
from edgesft.kernels import dispatch, perturb
from edgesft.kernels.perturb import cpu, host, reference

INF = math.inf
NATIVE = next(each for each in dispatch.implementations("perturb") if each.name == "native")
REFERENCE = dispatch.implementations("perturb")[-1]
ALL = Mask()
MASKS = [ALL, Mask(0.005, 0.02), Mask(0.0, 0.03, keep=90, seed=-4), Mask(high=0.0), Mask(keep=0)]
PLUS, SIGN, OTHER = Shift(5, 1e-3), Shift(-6, -2e-3, "rademacher"), Shift(5, 3e-4, "rademacher")
RANK = Shift(9, 1e-3, "low-rank", 3)
UPDATES = [
    Update((PLUS,)),
    Update((SIGN,)),
    Update((PLUS, SIGN, OTHER), 0.99),
    Update((), 0.9),
    Update((SIGN,), 0.999, rounding=17),
    Update((PLUS, OTHER), rounding=-1),
]

needs_compiler = pytest.mark.skipif(not NATIVE.state()[0], reason=NATIVE.state()[1])


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["native", "reference"])
def implementation(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(type(NATIVE), "fits", lambda self, weight=None, out=None: False)
    elif not NATIVE.state()[0]:
        pytest.skip(NATIVE.state()[1])
    return request.param


def bits(x):
    return x.contiguous().view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    )


def same(a, b):
    """Equal bits of tensors or quantised weights."""
    if isinstance(a, torch.Tensor):
        return torch.equal(bits(a), bits(b))
    return torch.equal(a.codes, b.codes) and torch.equal(bits(a.scales), bits(b.scales))


def weights(*shape, seed=0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def special(shape, dtype=torch.float32):
    """Weights with every value that could go wrong."""
    w = weights(*shape, dtype=dtype)
    if w.numel() > 9:
        edge = torch.tensor([0.0, -0.0, math.nan, -math.nan, INF, -INF, 1e-45, -1e-40, 0.01])
        w.view(-1)[:9] = edge.to(dtype)
    return w


def stored(kind, shape):
    """A weight of each type that native code knows."""
    if kind in ("float32", "bfloat16"):
        return special(shape, getattr(torch, kind))
    found = quantize(weights(*shape), int(kind[3:]), group=16)
    found.scales.view(-1)[0] = 0.0
    if found.scales.numel() > 3:
        found.scales.view(-1)[1] = 6e-8  # subnormal: codes run into their limits
        found.scales.view(-1)[2] *= -1
    return found


KINDS = ["float32", "bfloat16", "int8", "int4"]


# --- native, reference and numpy ----------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (70, 53), (5, 1000), (1, 4099)])
@pytest.mark.parametrize("kind", KINDS)
def test_native_updates_as_the_reference(kind, shape, mask):
    updates = UPDATES + [Update((RANK, SIGN))] * (mask == ALL)
    for update in updates:
        found, expected = stored(kind, shape), stored(kind, shape)
        count = NATIVE.replay(found, [update], tensor=6, mask=mask)
        assert count == REFERENCE.replay(expected, [update], tensor=6, mask=mask)
        assert same(found, expected), update


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_replay_is_the_updates_one_by_one(kind, monkeypatch):
    """The weight is larger than a strip, and the mask follows the weights."""
    mask = Mask(0.001, 0.03, keep=200, seed=1)
    found, expected, plain = (stored(kind, (160, 1001)) for _ in range(3))
    count = perturb.replay_(found, UPDATES, tensor=6, mask=mask)
    for update in UPDATES:
        last = perturb.descend_(
            expected,
            shifts=update.shifts,
            tensor=6,
            mask=mask,
            shrink=update.shrink,
            rounding=update.rounding,
        )
    assert count == last
    assert same(found, expected)
    monkeypatch.setattr(type(REFERENCE), "strip", 30_000)
    assert REFERENCE.replay(plain, UPDATES, tensor=6, mask=mask) == count
    assert same(found, plain)
    torch.set_num_threads(2)
    again = stored(kind, (160, 1001))
    assert perturb.replay_(again, UPDATES, tensor=6, mask=mask) == count
    assert same(found, again)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_numpy_updates_as_torch(kind, native, monkeypatch):
    if not native:
        monkeypatch.setattr(cpu, "library", lambda: None)
        monkeypatch.setattr(host, "_STRIP", 1000)
    elif not NATIVE.state()[0]:
        pytest.skip(NATIVE.state()[1])
    for mask in MASKS:
        expected = special((31, 57), getattr(torch, kind))
        array = (
            expected.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            if kind == "bfloat16"
            else expected.numpy()
        )
        array = array.copy()
        updates = UPDATES + [Update((RANK, SIGN))] * (mask == ALL)
        count = REFERENCE.replay(expected, updates, tensor=6, mask=mask)
        assert host.replay(array, updates, tensor=6, mask=mask) == count
        assert torch.equal(
            bits(expected).view(-1), torch.from_numpy(array.view(f"i{array.itemsize}")).view(-1)
        )
    w = np.full(5, 0.5, dtype=np.float32)
    host.descend(w, shifts=[PLUS], tensor=1, mask=ALL)
    assert np.array_equal(w, np.float32(0.5) + np.float32(1e-3) * host.noise(5, seed=5, tensor=1))


@pytest.mark.parametrize(("law", "rank"), [("gaussian", 0), ("rademacher", 0), ("low-rank", 2)])
def test_numpy_noise_is_that_of_torch(law, rank, monkeypatch):
    start = 2**34 - 1000 if rank == 0 else 4001
    options = {"seed": -3, "tensor": 2**32 - 1, "start": start, "law": law, "rank": rank, "width": 37}
    expected = reference.noise(3001, **options).numpy()
    assert np.array_equal(host.noise(3001, **options).view(np.int32), expected.view(np.int32))
    assert np.array_equal(host.formula(3001, **options).view(np.int32), expected.view(np.int32))
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert host.noise(0, **options).shape == (0,)


def test_the_host_works_without_torch():
    code = (
        "import sys, numpy as np; from edgesft.core.protocols import Mask, Shift;"
        "from edgesft.kernels.perturb import host; w = np.zeros(3, dtype=np.float32);"
        "host.descend(w, shifts=[Shift(1, 1.0)], tensor=2, mask=Mask());"
        "print(w.tolist() == host.noise(3, seed=1, tensor=2).tolist(), 'torch' in sys.modules)"
    )
    for env in ({}, {"EDGESFT_NATIVE": "0"}):
        found = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.split() == ["True", "False"]


def test_the_host_refuses_what_it_cannot_change():
    for array, message in (
        (np.zeros(3), "float64"),
        (np.zeros((4, 6), dtype=np.float32)[:, ::2], "contiguous"),
        (np.frombuffer(b"\0\0\0\0", dtype=np.float32), "writable"),
    ):
        with pytest.raises(ValueError, match=message):
            host.descend(array, shifts=[PLUS], tensor=1, mask=ALL)


# --- meaning ------------------------------------------------------------------------------------------------


def test_one_direction_is_one_product_and_one_sum(implementation):
    w = weights(40, 33)
    before = w.clone()
    count = perturb.descend_(w, shifts=[Shift(3, 1e-3)], tensor=4, mask=ALL)
    z = perturb.noise((40, 33), 3, 4)
    assert count == w.numel()
    assert same(w, before + z * torch.tensor(1e-3))


def test_directions_are_summed_in_their_order_and_added_once(implementation):
    w = weights(40, 33)
    before, c = w.clone(), torch.tensor([1e-3, -3e-3, 7e-4])
    shifts = [Shift(3, 1e-3), Shift(4, -3e-3, "rademacher"), Shift(3, 7e-4, "low-rank", 2)]
    perturb.descend_(w, shifts=shifts, tensor=4, mask=ALL, shrink=0.9)
    z = [perturb.noise((40, 33), s.seed, 4, law=s.law, rank=s.rank) for s in shifts]
    assert same(w, before * torch.tensor(0.9) + ((z[0] * c[0] + z[1] * c[1]) + z[2] * c[2]))


def test_what_the_mask_holds_moves(implementation):
    w = special((50, 40))
    before = w.clone()
    mask = Mask(0.004, 0.02, keep=128, seed=7)
    count = perturb.descend_(w, shifts=[Shift(3, 0.5)], tensor=4, mask=mask)
    band = (before.abs() >= torch.tensor(0.004)) & (before.abs() <= torch.tensor(0.02))
    active = band & reference.chosen(2000, mask=mask, tensor=4, start=0, device="cpu").view(50, 40)
    assert count == int(active.sum())
    assert 0.4 < count / int(band.sum()) < 0.6
    assert torch.equal(bits(w)[~active], bits(before)[~active])  # NaN and -0.0 included
    assert torch.all(w[active] != before[active])


def test_thresholds_belong_to_the_range(implementation):
    w = torch.tensor([0.25, -0.25, 0.1, -0.1, 0.0])
    for mask, count in (
        (Mask(0.0, 0.25), 5),
        (Mask(0.25, 0.25), 2),
        (Mask(0.1, 0.2), 2),  # 0.1 rounded to float32
        (Mask(0.3, 0.2), 0),
        (Mask(0.0, 1e300), 5),
    ):
        assert perturb.descend_(w.clone(), shifts=[PLUS], tensor=0, mask=mask) == count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_round_once(dtype):
    w = weights(20, 30, dtype=dtype)
    before = w.clone()
    count = perturb.descend_(w, shifts=[Shift(3, 0.01)], tensor=4, mask=Mask(high=0.02))
    wide = torch.promote_types(dtype, torch.float32)
    z = perturb.noise((20, 30), 3, 4).to(wide)
    moved = (before.to(wide) + z * 0.01).to(dtype)
    mask = before.to(wide).abs() <= 0.02
    assert count == int(mask.sum())
    assert same(w, torch.where(mask, moved, before))


def test_strided_scalar_and_empty(implementation):
    view = weights(6, 8).t()  # (8, 6): index in row-major order of the view, whatever the strides
    before = view.clone()
    perturb.descend_(view, shifts=[Shift(1, 1.0)], tensor=1, mask=ALL)
    assert torch.equal(view, before + perturb.noise((8, 6), 1, 1))
    cube = torch.zeros(3, 5, 7)
    perturb.descend_(cube, shifts=[Shift(1, 1.0)], tensor=1, mask=ALL)
    assert torch.equal(cube, perturb.noise((3, 5, 7), 1, 1))
    scalar = torch.tensor(0.5)
    assert perturb.descend_(scalar, shifts=[Shift(1, 1.0)], tensor=1, mask=ALL) == 1
    assert float(scalar) == 0.5 + float(perturb.noise((1,), 1, 1))
    assert perturb.descend_(torch.empty(0, 3), shifts=[PLUS], tensor=1, mask=ALL) == 0
    assert perturb.replay_(torch.zeros(3), [], tensor=1, mask=ALL) == 0


def test_autograd_is_told():
    w = torch.nn.Parameter(weights(4, 4))
    version = w._version
    perturb.descend_(w, shifts=[PLUS], tensor=1, mask=ALL)
    assert w._version > version
    assert w.requires_grad
    with torch.inference_mode():
        perturb.descend_(weights(4, 4), shifts=[PLUS], tensor=1, mask=ALL)


def test_plus_and_minus_undo_each_other_nearly():
    w = weights(64, 64)
    before = w.clone()
    perturb.replay_(w, [Update((Shift(8, s),)) for s in (1e-3, -2e-3, 1e-3)], tensor=9, mask=ALL)
    assert float((w - before).norm() / before.norm()) < 1e-6


# --- stochastic rounding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
def test_stochastic_rounding_keeps_the_mean(implementation, kind):
    """Steps far below the resolution: to nearest all of them are lost, at random they arrive on average."""
    w = torch.full((64, 64), 0.5)
    w[:, ::16] = 1.0  # of each group, so that codes of the others are inside their range
    w = w.bfloat16() if kind == "bfloat16" else quantize(w, int(kind[3:]), group=16)
    floats = (lambda x: x.float()) if kind == "bfloat16" else (lambda x: x.dequantize())
    before, mask = floats(w).clone(), Mask(0.4, 0.6)
    gap = 2.0**-8 if kind == "bfloat16" else float(w.scales[0, 0].abs())  # just above 1/2
    step, runs = gap / 50, 200
    shift = Shift(3, step, "rademacher")
    assert perturb.descend_(w, shifts=[shift], tensor=4, mask=mask) == 64 * 60
    assert torch.equal(floats(w), before)
    active = before < 0.7
    mean = torch.zeros(64, 64, dtype=torch.float64)
    for run in range(runs):
        moved = w.clone()
        perturb.descend_(moved, shifts=[shift], tensor=4, mask=mask, rounding=run)
        again = w.clone()
        perturb.descend_(again, shifts=[shift], tensor=4, mask=mask, rounding=run)
        assert same(moved, again)
        mean += (floats(moved) - before).double() / runs
    z = perturb.noise((64, 64), 3, 4, law="rademacher").double()
    found = float((mean * z)[active].mean()) / step
    # each entry jumps by a gap with probability 1/50 (bfloat16: half that gap below 1/2)
    assert abs(found - 1) < 5 * math.sqrt(50 / (runs * 64 * 60))
    assert torch.equal(mean[~active], torch.zeros_like(mean[~active]))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_do_not_move_are_not_rounded_away(implementation, kind):
    w, before = stored(kind, (40, 33)), stored(kind, (40, 33))
    zero = Shift(3, 0.0, "rademacher")
    perturb.descend_(w, shifts=[zero], tensor=4, mask=Mask(low=1e-30), rounding=5)
    assert same(w, before)


def test_float16_has_no_stochastic_rounding():
    with pytest.raises(ValueError, match="not offered"):
        perturb.descend_(torch.zeros(3).half(), shifts=[PLUS], tensor=1, mask=ALL, rounding=1)


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shift", "mask", "message"),
    [
        (Shift(1, math.nan), ALL, "expected a finite number"),
        (Shift(1, INF), ALL, "expected a finite number"),
        (PLUS, Mask(low=math.nan), "not a number"),
        (PLUS, Mask(high=math.nan), "not a number"),
        (PLUS, Mask(keep=257), "257 of 256"),
        (Shift(1, 1.0, "cauchy"), ALL, "`cauchy`"),
        (Shift(1, 1.0, "low-rank"), ALL, "rank is 0"),
        (RANK, Mask(high=0.1), "no mask"),
        (RANK, ALL, "needs a matrix"),
    ],
)
def test_wrong_numbers_are_refused(shift, mask, message):
    w = torch.zeros(3)
    with pytest.raises(ValueError, match=message):
        perturb.descend_(w, shifts=[shift], tensor=1, mask=mask)
    with pytest.raises(ValueError, match=message):
        host.descend(w.numpy(), shifts=[shift], tensor=1, mask=mask)


def test_wrong_weights_and_shrinkage_are_refused():
    with pytest.raises(ValueError, match="expected a float type"):
        perturb.descend_(torch.zeros(3).int(), shifts=[PLUS], tensor=1, mask=ALL)
    with pytest.raises(ValueError, match="shrunk by inf"):
        perturb.descend_(torch.zeros(3), shifts=[PLUS], tensor=1, mask=ALL, shrink=INF)
