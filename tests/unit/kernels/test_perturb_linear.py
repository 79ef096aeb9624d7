"""`perturbed_linear`: the product with weights that are never written."""

import math
import types

import pytest
import torch
from torch.nn.functional import linear

from edgesft.core.protocols import Mask, Shift
from edgesft.core.quantized.codes import quantize
from edgesft.kernels import dispatch, perturb
from edgesft.kernels.perturb import api

ALL = Mask()
BAND = Mask(0.001, 0.02, keep=200, seed=3)
NATIVE = next(each for each in dispatch.implementations("perturb") if each.name == "native")
PLUS, MINUS = Shift(3, 0.01), Shift(3, -0.01)
SIGNS = Shift(3, 0.01, "rademacher"), Shift(3, -0.01, "rademacher")
RANK = Shift(5, 0.01, "low-rank", 2)


@pytest.fixture(autouse=True)
def _strips(monkeypatch):
    """One thread, and torch's products: those of the other module have tests of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(api, "_gemm", None)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["native", "reference"])
def implementation(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(type(NATIVE), "fits", lambda self, weight=None, out=None: False)
    elif not NATIVE.state()[0]:
        pytest.skip(NATIVE.state()[1])
    return request.param


def weights(*shape, seed=0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def inputs(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def at(weight, shift, mask=ALL, tensor=4):
    """The float32 weight that a group sees."""
    if not isinstance(weight, torch.Tensor):
        weight = weight.dequantize()
    w = weight.float().clone()
    if shift is not None:
        perturb.descend_(w, shifts=[shift], tensor=tensor, mask=mask)
    return w


def expected(x, weight, bias, shifts, mask=ALL):
    if len(shifts) == 1:
        return linear(x, at(weight, shifts[0], mask), bias)
    parts = zip(x.chunk(len(shifts)), shifts, strict=True)
    return torch.cat([linear(part, at(weight, shift, mask), bias) for part, shift in parts])


@pytest.mark.parametrize("strip", [1 << 20, 4096])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0,), (300,)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_one_group_equals_the_dense_product(implementation, monkeypatch, lead, with_bias, strip):
    monkeypatch.setattr(api, "STRIP", strip)
    w, x = weights(600, 16), inputs(*lead, 16)  # a small strip gives two of 320 and 280 rows
    bias = weights(600, seed=2) if with_bias else None
    before = w.clone()
    found = perturb.perturbed_linear(x, w, bias, shifts=[PLUS], tensor=4, mask=BAND)
    assert torch.equal(w.view(torch.int32), before.view(torch.int32))
    assert found.shape == (*lead, 600)
    torch.testing.assert_close(found, expected(x, w, bias, [PLUS], BAND), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strip", [1 << 20, 2048])
@pytest.mark.parametrize(
    "shifts",
    [
        (PLUS, MINUS),
        (None, PLUS),
        (*SIGNS, None, *SIGNS),
        (PLUS, SIGNS[0], PLUS, MINUS, Shift(8, 0.02)),
        (None, None, None),
        (RANK, None),
        (RANK, Shift(5, -0.01, "low-rank", 2), PLUS, None, Shift(6, 0.1, "low-rank", 1)),
    ],
)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_groups_see_their_own_weights(implementation, monkeypatch, kind, shifts, strip):
    monkeypatch.setattr(api, "STRIP", strip)
    mask = ALL if RANK in shifts else BAND
    w = weights(300, 33)
    if kind in ("float32", "bfloat16"):
        w = w.to(getattr(torch, kind))
    else:
        w = quantize(w, int(kind[3:]), group=16)
    x, bias = inputs(2 * len(shifts), 3, 33), weights(300, seed=2)
    found = perturb.perturbed_linear(x, w, bias, shifts=shifts, tensor=4, mask=mask)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected(x, w, bias, shifts, mask), rtol=1e-5, atol=1e-5)


def test_forward_and_update_use_the_same_noise_and_mask(implementation):
    """Identity inputs read the perturbed weights out of the forward."""
    w, mask = weights(300, 24), Mask(0.0, 0.01, keep=150, seed=2)
    for pair in ((PLUS, MINUS), SIGNS):
        both = perturb.perturbed_linear(torch.eye(24).repeat(2, 1), w, None, shifts=pair, tensor=4, mask=mask)
        plus, minus = both[:24].t(), both[24:].t()
        assert torch.equal(plus, at(w, pair[0], mask))
        assert torch.equal(minus, at(w, pair[1], mask))
        assert torch.equal(plus != w, minus != w)


@pytest.mark.parametrize("w_type", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("x_type", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_strips_are_rounded_once_to_the_type_of_x(w_type, x_type):
    w = weights(12, 8, dtype=w_type)
    wide = torch.promote_types(w_type, torch.float32)
    moved = w.to(wide).clone()
    perturb.descend_(moved, shifts=[PLUS], tensor=4, mask=BAND)
    found = perturb.perturbed_linear(
        torch.eye(8, dtype=x_type).repeat(2, 1), w, None, shifts=(PLUS, None), tensor=4, mask=BAND
    )
    assert found.dtype == x_type
    assert torch.equal(found[:8].t(), moved.to(x_type))
    assert torch.equal(found[8:].t(), w.to(wide).to(x_type))


def test_bf16_products_are_near(implementation):
    w, x, bias = weights(300, 64), inputs(8, 64), weights(300, seed=2)
    for stored in (w, w.bfloat16(), quantize(w, 4)):
        exact = expected(x, stored, bias, (PLUS, None), BAND)
        found = perturb.perturbed_linear(
            x, stored, bias, shifts=(PLUS, None), tensor=4, mask=BAND, compute="bf16"
        )
        assert found.dtype == torch.float32
        assert 0 < float((found - exact).norm() / exact.norm()) < 0.01


@pytest.mark.parametrize("shifts", [SIGNS, (PLUS, MINUS, None), (RANK, None), (None,)])
@pytest.mark.parametrize("strip", [1 << 20, 2048])
def test_int8_products_are_near(implementation, monkeypatch, shifts, strip):
    monkeypatch.setattr(api, "STRIP", strip)
    mask = ALL if RANK in shifts else BAND
    w, x, bias = weights(300, 64), inputs(2 * len(shifts), 3, 64), weights(300, seed=2)
    w[7] = 0.0
    x[0, 0] = 0.0
    for stored in (w, w.bfloat16(), quantize(w, 8)):
        exact = expected(x, stored, bias, shifts, mask)
        found = perturb.perturbed_linear(x, stored, bias, shifts=shifts, tensor=4, mask=mask, compute="int8")
        assert 0 < float((found - exact).norm() / exact.norm()) < 0.02
        assert torch.equal(found[0, 0], bias.to(found.dtype))


def test_int8_noise_of_signs_is_exact():
    """With inputs of 8 bits, the difference of two directions is that of the exact product."""
    w = weights(64, 32)
    x = torch.randint(-127, 128, (4, 32), generator=torch.Generator().manual_seed(0)).float()
    x[:, 0] = 127.0
    found = perturb.perturbed_linear(
        x.repeat(2, 1), w, None, shifts=SIGNS, tensor=4, mask=BAND, compute="int8"
    )
    moved = at(torch.zeros_like(w), SIGNS[0], ALL) * (at(w, SIGNS[0], BAND) != w)
    torch.testing.assert_close((found[:4] - found[4:]) / 2, linear(x, moved), rtol=1e-4, atol=1e-5)


def test_int8_of_numbers_that_are_not_finite_is_nan():
    x = inputs(3, 16)
    x[1, 2], x[2, 3] = math.inf, math.nan
    y = perturb.perturbed_linear(
        x, weights(8, 16), None, shifts=[SIGNS[0]], tensor=1, mask=ALL, compute="int8"
    )
    assert y.isnan().tolist() == [[False] * 8, [True] * 8, [True] * 8]
    empty = inputs(0, 16)
    for compute in ("native", "bf16", "int8"):
        y = perturb.perturbed_linear(
            empty, weights(8, 16), None, shifts=SIGNS, tensor=1, mask=ALL, compute=compute
        )
        assert y.shape == (0, 8)


def test_low_rank_noise_leaves_the_weight_alone(monkeypatch):
    """No strip is made: the weight goes to the product as it is."""
    monkeypatch.setattr(
        api, "_pick", lambda weight, out=None: pytest.fail("a strip was made") if out is not None else NATIVE
    )
    if not NATIVE.fits():
        pytest.skip("no native code")
    w, x = weights(20, 10), inputs(4, 10)
    found = perturb.perturbed_linear(x, w, None, shifts=(RANK, None), tensor=4, mask=ALL)
    torch.testing.assert_close(found, expected(x, w, None, (RANK, None)), rtol=1e-5, atol=1e-5)


def test_any_strides():
    w, x = weights(8, 12).t(), inputs(4, 16)[:, ::2]
    found = perturb.perturbed_linear(x, w, None, shifts=[PLUS], tensor=4, mask=ALL)
    torch.testing.assert_close(found, linear(x, w + 0.01 * perturb.noise((12, 8), 3, 4)))
    pair = perturb.perturbed_linear(
        inputs(8, 6).t()[:, :], weights(5, 8), None, shifts=(PLUS, MINUS), tensor=4, mask=ALL
    )
    assert pair.shape == (6, 5)


def test_no_gradient_in_and_out_of_inference_mode():
    w, x = torch.nn.Parameter(weights(12, 8)), torch.randn(4, 8, requires_grad=True)
    api._buffers.whole.clear()
    api._buffers.views.clear()
    with torch.inference_mode():
        inside = perturb.perturbed_linear(x.detach(), w, None, shifts=(PLUS, MINUS), tensor=1, mask=ALL)
    outside = perturb.perturbed_linear(x, w, None, shifts=(PLUS, MINUS), tensor=1, mask=ALL)
    assert not outside.requires_grad
    assert torch.equal(inside, outside)


def test_temporaries_are_a_strip_a_direction(monkeypatch):
    monkeypatch.setattr(api, "STRIP", 1 << 14)
    api._buffers.whole.clear()
    api._buffers.views.clear()
    for out in (2048, 1024):
        perturb.perturbed_linear(
            inputs(6, 64), weights(out, 64), None, shifts=(PLUS, None, PLUS), tensor=1, mask=ALL
        )
    assert sum(buffer.numel() for buffer in api._buffers.whole.values()) == 256 * 64


@pytest.mark.parametrize("copies", [1, 2, 5])
@pytest.mark.parametrize(
    ("out", "width"), [(576, 1536), (2048, 2048), (4096, 11008), (640, 2048), (7, 3), (1, 10**7)]
)
def test_strips_are_even_and_bounded(out, width, copies):
    step = api._rows(out, width, copies)
    heights = [min(out, begin + step) - begin for begin in range(0, out, step)]
    assert sum(heights) == out
    assert len(heights) == 1 or step % 64 == 0
    assert step * width * copies <= max(2 * api.STRIP, 448 * width * copies)
    assert min(heights) >= max(heights) / 2


def test_fused_products_are_asked_first(monkeypatch):
    calls, answer = [], [torch.ones(2, 4), None]

    def product(x, weight, bias, **options):
        calls.append(options)
        return answer.pop(0)

    fits = [True, True, False]
    monkeypatch.setattr(
        api, "_gemm", types.SimpleNamespace(fits=lambda x, w, **o: fits.pop(0), linear=product)
    )
    x, w = inputs(2, 5), weights(4, 5)
    found = [perturb.perturbed_linear(x, w, None, shifts=[PLUS], tensor=4, mask=ALL) for _ in range(3)]
    assert torch.equal(found[0], torch.ones(2, 4))
    for each in found[1:]:
        torch.testing.assert_close(each, expected(x, w, None, [PLUS]))
    assert calls == [{"shifts": (PLUS,), "tensor": 4, "mask": ALL, "compute": "native"}] * 2


@pytest.mark.parametrize(
    ("x", "w", "bias", "options", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), None, {}, "does not fit weight"),
        (torch.zeros(()), torch.zeros(4, 5), None, {}, "does not fit weight"),
        (torch.zeros(2, 5), torch.zeros(5), None, {}, "does not fit weight"),
        (torch.zeros(2, 5), torch.zeros(4, 5), torch.zeros(5), {}, "bias"),
        (torch.zeros(2, 5), torch.zeros(4, 5), torch.zeros(4).half(), {}, r"bias torch\.float16"),
        (torch.zeros(2, 5).int(), torch.zeros(4, 5), None, {}, "expected a float type"),
        (torch.zeros(2, 5).int(), torch.zeros(4, 5).int(), None, {}, "expected a float type"),
        (torch.zeros(3, 5), torch.zeros(4, 5), None, {"shifts": (PLUS, MINUS)}, "2 equal groups"),
        (torch.zeros(5), torch.zeros(4, 5), None, {"shifts": (PLUS, MINUS)}, "2 equal groups"),
        (torch.zeros(2, 5), torch.zeros(4, 5), None, {"shifts": ()}, "0 equal groups"),
        (torch.zeros(2, 5), torch.zeros(4, 5), None, {"compute": "fp4"}, "`fp4`"),
        (torch.zeros(2, 5), torch.zeros(4, 5), None, {"mask": Mask(high=math.nan)}, "not a number"),
        (torch.zeros(2, 5), torch.zeros(4, 5), None, {"shifts": (Shift(1, math.inf),)}, "finite"),
        (torch.zeros(2, 5), torch.zeros(4, 5), None, {"shifts": (RANK,), "mask": BAND}, "no mask"),
    ],
)
def test_what_does_not_go_together_is_refused(x, w, bias, options, message):
    with pytest.raises(ValueError, match=message):
        perturb.perturbed_linear(x, w, bias, **{"shifts": (PLUS,), "tensor": 1, "mask": ALL, **options})
