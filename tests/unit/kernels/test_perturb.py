"""The perturbation: its numbers, its statistics, and native code against the reference, bit for bit."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn.functional import linear

from edgesft.kernels import dispatch, perturb
from edgesft.kernels.perturb import api, reference

INF = math.inf
DENSE = {"low": 0.0, "high": INF}
NATIVE, REFERENCE = dispatch.implementations("perturb")

needs_compiler = pytest.mark.skipif(not NATIVE.state()[0], reason=NATIVE.state()[1])


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bits(x):
    return x.contiguous().view({4: torch.int32, 2: torch.int16, 8: torch.int64}[x.element_size()])


def weights(*shape, seed=0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


# --- the generator ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(  # the known answers published with Philox4x32-10
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = tuple(torch.tensor([int(w, 16)]) for w in counter.split())
    k0, k1 = (int(w, 16) for w in key.split())
    found = reference.philox(words, (k0, k1))
    assert [f"{int(w):08x}" for w in found] == expected.split()


def test_noise_never_changes():
    """Stored trajectories are replayed with these numbers: a change here breaks every one of them."""
    found = reference.noise(6, seed=1, tensor=2, start=0)
    expected = "-0x1.b727cep-2 0x1.20740ep-3 0x1.9fa8fap+0 0x1.a2551p-2 0x1.00c436p-1 -0x1.48b604p-1"
    assert found.tolist() == [float.fromhex(v) for v in expected.split()]


def exact(words, turns):
    """Box-Muller in float64 from the same words; the mapping of the module's docstring."""
    u = ((words >> 1).double() + 0.5) / 2**31
    low = turns & 0x3FFFFFFF
    angle = (low - ((low & 0x20000000) << 1)).double() * (math.pi / 2**31)
    sign = 1.0 - 2.0 * (turns >> 31).double()
    cosine, sine = sign * angle.cos(), angle.sin()
    swap = (turns & 0x40000000) != 0
    r = (-2 * u.log()).sqrt()
    return torch.stack((r * torch.where(swap, sine, cosine), r * torch.where(swap, cosine, sine))), r


def test_accuracy_against_float64():
    generator = torch.Generator().manual_seed(3)
    words, turns = torch.randint(0, 2**32, (2, 1 << 20), generator=generator)
    expected, r = exact(words, turns)
    error = (torch.stack(reference.normal_pair(words, turns)).double() - expected).abs()
    assert float((error > 1e-6).double().mean()) < 1e-3
    assert torch.all(error < 1.5e-6 + 6e-8 / r)
    words >>= torch.randint(0, 32, (1 << 20,), generator=generator)  # the tails
    expected, r = exact(words, turns)
    error = (torch.stack(reference.normal_pair(words, turns)).double() - expected).abs()
    assert float(r.max()) > 6
    assert torch.all(error < 1.5e-6 + 6e-8 / r)


def test_extreme_words_give_finite_normals():
    edge = [0, 1, 2, 3, 0x3FFFFFFF, 0x40000000, 0x7FFFFFFF, 0x80000000, 0xC0000000, 0xFFFFFFFE, 0xFFFFFFFF]
    words, turns = (
        g.reshape(-1) for g in torch.meshgrid(torch.tensor(edge), torch.tensor(edge), indexing="ij")
    )
    for z in reference.normal_pair(words, turns):
        assert torch.isfinite(z).all()
        assert z.abs().max() < 6.67
    assert float(reference.radius(torch.tensor([0]))) == pytest.approx(math.sqrt(64 * math.log(2)), rel=1e-6)
    assert float(reference.radius(torch.tensor([0xFFFFFFFF]))) == 0.0


def test_noise_is_standard_normal():
    n = 1 << 22
    z = perturb.noise((n,), 12345, 678).double().numpy()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs(stats.skew(z)) < 5 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(z)) < 5 * math.sqrt(24 / n)
    for limit in (1, 2, 3, 4, 5):
        expected = 2 * stats.norm.sf(limit)
        found = np.count_nonzero(np.abs(z) > limit) / n
        assert abs(found - expected) < 5 * math.sqrt(expected / n)
    assert stats.kstest(z[: 1 << 18], "norm").pvalue > 1e-4


def correlation(a, b):
    return float(np.corrcoef(a, b)[0, 1])


def test_noise_is_independent():
    n = 1 << 18
    limit = 5 / math.sqrt(n)

    def z(seed=7, tensor=1, start=0):
        return perturb.noise((n,), seed, tensor, start=start).double().numpy()

    base = z()
    others = [z(seed=8), z(seed=7 + 2**32), z(tensor=2), z(tensor=1 + 2**31), z(start=n), z(start=2**34)]
    for other in others:
        assert abs(correlation(base, other)) < limit
        assert abs(correlation(base**2, other**2)) < limit
    for lag in (1, 2, 3, 4, 64, 512):  # within and across the blocks of four
        assert abs(correlation(base[:-lag], base[lag:])) < limit
        assert abs(correlation(base[:-lag] ** 2, base[lag:] ** 2)) < limit


def test_noise_depends_on_the_index_alone():
    whole = perturb.noise((5000,), -9, 3)
    assert torch.equal(bits(whole), bits(perturb.noise((50, 100), -9, 3).view(-1)))
    for start, count in ((1, 1), (3, 2), (510, 5), (1023, 2000), (4999, 1)):
        assert torch.equal(
            bits(whole[start : start + count]), bits(perturb.noise((count,), -9, 3, start=start))
        )
    assert perturb.noise((0,), 1, 1).shape == (0,)
    assert perturb.noise((), 1, 1).shape == ()


def test_seeds_wrap_at_64_bits():
    assert torch.equal(perturb.noise((9,), -1, 5), perturb.noise((9,), 2**64 - 1, 5 + 2**32))
    assert not torch.equal(perturb.noise((9,), -1, 5), perturb.noise((9,), 2**32 - 1, 5))


def test_tensor_id_is_stable():
    assert perturb.tensor_id("model.layers.0.self_attn.q_proj.weight") == 0xFDD6D894
    names = [f"model.layers.{i}.mlp.{p}.weight" for i in range(200) for p in ("up_proj", "down_proj")]
    assert len({perturb.tensor_id(n) for n in names}) == len(names)


# --- native against the reference ---------------------------------------------------------------------------


@needs_compiler
def test_native_is_in_use():
    assert NATIVE.fits()
    assert dispatch.pick("perturb", torch.empty(3)) is NATIVE
    assert dispatch.pick("perturb", torch.empty(3, dtype=torch.bfloat16)) is REFERENCE
    assert dispatch.pick("perturb", torch.empty(4, 3).t()) is REFERENCE


@needs_compiler
@pytest.mark.parametrize("start", [0, 1, 511, 512, 2**34 - 1000, 2**34 + 3, 2**40 + 17])
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_native_noise_has_the_bits_of_the_reference(seed, start):
    found = torch.empty(3001)
    NATIVE.noise(found, seed=seed, tensor=0xFFFFFFFF - start % 7, start=start)
    expected = reference.noise(3001, seed=seed, tensor=0xFFFFFFFF - start % 7, start=start)
    assert torch.equal(bits(found), bits(expected))


@needs_compiler
def test_native_noise_has_the_bits_of_the_reference_at_length():
    n = 1 << 21
    found = torch.empty(n)
    NATIVE.noise(found, seed=99, tensor=4, start=0)
    expected = torch.empty(n)
    REFERENCE.noise(expected, seed=99, tensor=4, start=0)
    assert torch.equal(bits(found), bits(expected))


def special(shape):
    """Weights with every value that could go wrong."""
    w = weights(*shape)
    w.view(-1)[:9] = torch.tensor([0.0, -0.0, math.nan, -math.nan, INF, -INF, 1e-45, -1e-40, 0.01])
    return w


@needs_compiler
@pytest.mark.parametrize("low", [0.0, 0.005, 0.03])
@pytest.mark.parametrize("high", [0.0, 0.01, 0.1, INF])
@pytest.mark.parametrize("shape", [(1,), (17,), (70, 53), (3, 1000)])
def test_native_perturbs_as_the_reference(shape, low, high):
    w = special(shape) if math.prod(shape) > 9 else weights(*shape)
    args = {"seed": 5, "tensor": 6, "start": 1234, "scale": 1e-3, "low": low, "high": high}
    found, expected = torch.empty_like(w), torch.empty_like(w)
    assert NATIVE.perturb(w, found, **args) == REFERENCE.perturb(w, expected, **args)
    assert torch.equal(bits(found), bits(expected))
    assert NATIVE.perturb(w, w, **args) is not None
    assert torch.equal(bits(w), bits(expected))


@needs_compiler
def test_threads_change_nothing():
    w = weights(300, 700)
    one, two = w.clone(), w.clone()
    args = {"seed": 1, "tensor": 2, "scale": 0.1, "low": 0.001, "high": 0.02}
    count = perturb.add_noise_(one, **args)
    torch.set_num_threads(2)
    assert perturb.add_noise_(two, **args) == count
    assert torch.equal(bits(one), bits(two))


@needs_compiler
def test_one_openmp_runtime_in_the_process():
    assert NATIVE.fits()
    try:
        with open("/proc/self/maps", encoding="utf-8") as file:
            mapped = {line.split()[-1] for line in file if "libgomp" in line or "libomp" in line}
    except OSError:
        pytest.skip("no /proc")
    torch_own = {path for path in mapped if "/torch" in path}
    assert not torch_own or mapped == torch_own


# --- add_noise_ ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["native", "reference"])
def implementation(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(type(NATIVE), "fits", lambda self, weight=None: False)
    elif not NATIVE.state()[0]:
        pytest.skip(NATIVE.state()[1])
    return request.param


def test_add_noise_is_one_product_and_one_sum(implementation):
    w = weights(40, 33)
    before = w.clone()
    count = perturb.add_noise_(w, seed=3, tensor=4, scale=1e-3, **DENSE)
    z = perturb.noise((40, 33), 3, 4)
    assert count == w.numel()
    assert torch.equal(bits(w), bits(before + z * torch.tensor(1e-3)))


def test_add_noise_moves_what_the_mask_holds(implementation):
    w = special((50, 40))
    before = w.clone()
    low, high = 0.004, 0.02
    count = perturb.add_noise_(w, seed=3, tensor=4, scale=0.5, low=low, high=high)
    mask = (before.abs() >= torch.tensor(low)) & (before.abs() <= torch.tensor(high))
    assert count == int(mask.sum())
    assert 0 < count < w.numel()
    assert torch.equal(bits(w)[~mask], bits(before)[~mask])  # NaN and -0.0 included
    assert torch.all(w[mask] != before[mask])
    assert not mask.view(-1)[2]  # NaN is not active


def test_thresholds_belong_to_the_range(implementation):
    w = torch.tensor([0.25, -0.25, 0.1, -0.1, 0.0])
    assert perturb.add_noise_(w.clone(), seed=0, tensor=0, scale=1.0, low=0.0, high=0.25) == 5
    assert perturb.add_noise_(w.clone(), seed=0, tensor=0, scale=1.0, low=0.25, high=0.25) == 2
    assert (
        perturb.add_noise_(w.clone(), seed=0, tensor=0, scale=1.0, low=0.1, high=0.2) == 2
    )  # 0.1f is active
    assert perturb.add_noise_(w.clone(), seed=0, tensor=0, scale=1.0, low=0.3, high=0.2) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_add_noise_in_other_types(dtype):
    w = weights(20, 30, dtype=dtype)
    before = w.clone()
    count = perturb.add_noise_(w, seed=3, tensor=4, scale=0.01, low=0.0, high=0.02)
    wide = torch.promote_types(dtype, torch.float32)
    z = perturb.noise((20, 30), 3, 4).to(wide)
    moved = (before.to(wide) + z * 0.01).to(dtype)
    mask = before.to(wide).abs() <= 0.02
    assert count == int(mask.sum())
    assert torch.equal(bits(w), bits(torch.where(mask, moved, before)))


def test_add_noise_to_strided_scalar_and_empty(implementation):
    base = weights(6, 8)
    view = base.t()  # (8, 6): index in row-major order of the view, whatever the strides
    before = view.clone()
    perturb.add_noise_(view, seed=1, tensor=1, scale=1.0, **DENSE)
    assert torch.equal(view, before + perturb.noise((8, 6), 1, 1))
    scalar = torch.tensor(0.5)
    assert perturb.add_noise_(scalar, seed=1, tensor=1, scale=1.0, **DENSE) == 1
    assert float(scalar) == 0.5 + float(perturb.noise((1,), 1, 1))
    assert perturb.add_noise_(torch.empty(0, 3), seed=1, tensor=1, scale=1.0, **DENSE) == 0


def test_add_noise_tells_autograd():
    w = torch.nn.Parameter(weights(4, 4))
    version = w._version
    perturb.add_noise_(w, seed=1, tensor=1, scale=1.0, **DENSE)
    assert w._version > version
    assert w.requires_grad
    with torch.inference_mode():
        perturb.add_noise_(weights(4, 4), seed=1, tensor=1, scale=1.0, **DENSE)


def test_plus_and_minus_undo_each_other_nearly():
    w = weights(64, 64)
    before = w.clone()
    for scale in (1e-3, -2e-3, 1e-3):
        perturb.add_noise_(w, seed=8, tensor=9, scale=scale, **DENSE)
    assert float((w - before).norm() / before.norm()) < 1e-6


# --- perturbed_linear ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strip", [1 << 20, 4096])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0,), (300,)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_perturbed_linear_equals_the_dense_one(implementation, monkeypatch, lead, with_bias, strip):
    monkeypatch.setattr(api, "STRIP", strip)
    w = weights(600, 16)  # a small strip gives two of 320 and 280 rows
    x = torch.randn(*lead, 16, generator=torch.Generator().manual_seed(1))
    bias = weights(600, seed=2) if with_bias else None
    before = w.clone()
    args = {"seed": 3, "tensor": 4, "scale": 0.01, "low": 0.001, "high": 0.02}
    found = perturb.perturbed_linear(x, w, bias, **args)
    assert torch.equal(bits(w), bits(before))
    moved = w.clone()
    perturb.add_noise_(moved, **args)
    expected = linear(x, moved, bias)
    assert found.shape == expected.shape == (*lead, 600)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_forward_and_update_use_the_same_noise_and_mask():
    """Identity inputs read the perturbed weights out of the forward."""
    w = weights(300, 24)
    args = {"seed": 11, "tensor": 12, "scale": 1e-3, "low": 0.0, "high": 0.01}
    plus = perturb.perturbed_linear(torch.eye(24), w, None, **args).t()
    minus = perturb.perturbed_linear(torch.eye(24), w, None, **{**args, "scale": -1e-3}).t()
    moved = w.clone()
    perturb.add_noise_(moved, **args)
    assert torch.equal(plus, moved)
    assert torch.equal(plus != w, minus != w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_perturbed_linear_in_other_types(dtype):
    w = weights(12, 8, dtype=dtype)
    x = torch.randn(5, 8).to(dtype)
    args = {"seed": 3, "tensor": 4, "scale": 0.01, "low": 0.0, "high": 0.02}
    moved = w.clone()
    perturb.add_noise_(moved, **args)
    found = perturb.perturbed_linear(x, w, None, **args)
    assert found.dtype == dtype
    torch.testing.assert_close(found, linear(x, moved))


def test_perturbed_linear_takes_any_strides():
    w = weights(8, 12).t()  # (12, 8)
    x = torch.randn(4, 16)[:, ::2]
    args = {"seed": 3, "tensor": 4, "scale": 0.01, **DENSE}
    found = perturb.perturbed_linear(x, w, None, **args)
    torch.testing.assert_close(found, linear(x, w + 0.01 * perturb.noise((12, 8), 3, 4)))


def test_perturbed_linear_gives_no_gradient_and_works_in_and_out_of_inference_mode():
    w = torch.nn.Parameter(weights(12, 8))
    x = torch.randn(4, 8, requires_grad=True)
    api._buffers.whole.clear()
    api._buffers.views.clear()
    with torch.inference_mode():
        inside = perturb.perturbed_linear(x.detach(), w, None, seed=1, tensor=1, scale=0.1, **DENSE)
    outside = perturb.perturbed_linear(x, w, None, seed=1, tensor=1, scale=0.1, **DENSE)
    assert not outside.requires_grad
    assert torch.equal(inside, outside)


def test_temporaries_are_one_strip(monkeypatch):
    monkeypatch.setattr(api, "STRIP", 1 << 14)
    api._buffers.whole.clear()
    api._buffers.views.clear()
    x, w = torch.randn(3, 64), weights(2048, 64)
    perturb.perturbed_linear(x, w, None, seed=1, tensor=1, scale=0.1, **DENSE)
    perturb.perturbed_linear(x, weights(1024, 64), None, seed=1, tensor=2, scale=0.1, **DENSE)
    assert sum(buffer.numel() for buffer in api._buffers.whole.values()) == 256 * 64


@pytest.mark.parametrize(
    ("out", "width"), [(576, 1536), (2048, 2048), (4096, 11008), (640, 2048), (7, 3), (1, 10**7)]
)
def test_strips_are_even_and_bounded(out, width):
    step = api._rows(out, width)
    heights = [min(out, begin + step) - begin for begin in range(0, out, step)]
    assert sum(heights) == out
    assert len(heights) == 1 or step % 64 == 0
    assert step * width <= max(2 * api.STRIP, 448 * width)
    assert min(heights) >= max(heights) / 2


@pytest.mark.parametrize(
    ("x", "w", "bias", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), None, "does not fit weight"),
        (torch.zeros(()), torch.zeros(4, 5), None, "does not fit weight"),
        (torch.zeros(2, 5), torch.zeros(5), None, "does not fit weight"),
        (torch.zeros(2, 5), torch.zeros(4, 5), torch.zeros(5), "bias"),
        (torch.zeros(2, 5).half(), torch.zeros(4, 5), None, "input is torch.float16"),
        (torch.zeros(2, 5).int(), torch.zeros(4, 5).int(), None, "expected a float type"),
    ],
)
def test_wrong_tensors_are_refused(x, w, bias, message):
    with pytest.raises(ValueError, match=message):
        perturb.perturbed_linear(x, w, bias, seed=1, tensor=1, scale=0.1, **DENSE)


@pytest.mark.parametrize(
    "wrong", [{"scale": math.nan}, {"scale": INF}, {"low": math.nan}, {"high": math.nan}]
)
def test_wrong_numbers_are_refused(wrong):
    args = {"seed": 1, "tensor": 1, "scale": 0.1, **DENSE, **wrong}
    with pytest.raises(ValueError, match=r"expected a finite number|not a number"):
        perturb.add_noise_(torch.zeros(3), **args)
