"""The fused product: its perturbed weights bit for bit, its sums against float64, and when it is used."""

import functools
import math

import pytest
import torch

from edgesft.core.protocols import Mask, Shift
from edgesft.core.quantized.codes import quantize
from edgesft.kernels import dispatch
from edgesft.kernels.perturb import api, gemm, reference

KINDS = gemm.kinds()
FLOAT = pytest.param("native", marks=pytest.mark.skipif(not KINDS & gemm.FLOAT, reason="no AVX-512"))
HALF = pytest.param("bf16", marks=pytest.mark.skipif(not KINDS & gemm.HALF, reason="no AVX512-BF16 or AMX"))
BYTE = pytest.param("int8", marks=pytest.mark.skipif(not KINDS & gemm.BYTE, reason="no AMX-INT8"))
needs_float, needs_half, needs_byte = (p.marks[0] for p in (FLOAT, HALF, BYTE))

SHAPES = [(1, 1, 1), (5, 7, 3), (48, 64, 96), (37, 100, 130), (130, 576, 200), (33, 1537, 65), (20, 4100, 18)]
PAIR = (Shift(5, 1e-2, "rademacher"), Shift(5, -1e-2, "rademacher"))
GROUPS = [
    (Shift(7, 1e-2),),
    PAIR,
    (Shift(1 << 63, 1e-2), None, Shift(9, 2e-3, "rademacher"), Shift(1 << 63, -3e-3)),
    (None, *PAIR, Shift(5, 1e-2, "rademacher"), Shift(5, 1e-2), None),
]
MASKS = [Mask(), Mask(low=0.01, high=0.06), Mask(keep=100, seed=3), Mask(high=0.05, keep=0)]
TENSOR = 0xFEDCBA98


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(n, width, out, groups, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n + width + out)
    x = torch.randn(groups * n, width, generator=generator)
    weight = torch.randn(out, width, generator=generator) * 0.05
    return x.to(dtype), weight.to(dtype), torch.randn(out, generator=generator).to(dtype)


def noise(shift, shape):
    """z of the reference, float32."""
    return drawn(shift.seed, shift.law, tuple(shape))


@functools.cache
def drawn(seed, law, shape):
    kernel = dispatch.implementations("perturb")[-1]  # plain torch
    z = torch.empty(shape)
    kernel.noise(z, seed=seed, tensor=TENSOR, start=0, law=law, rank=0, width=shape[1])
    return z


def masked(weight, mask):
    """Entries of `weight` (float32) in the mask, by the reference."""
    size = weight.abs()
    found = (size >= mask.low) & (size <= mask.high)
    if mask.keep < 256:
        found &= random_bytes(mask.seed, weight.numel()).view(weight.shape) < mask.keep
    return found


@functools.cache
def random_bytes(seed, count):
    block = torch.arange((count + 15) // 16)
    zero = torch.zeros_like(block)
    words = reference.philox((block, zero, zero + TENSOR, zero + 3), (seed & 0xFFFFFFFF, seed >> 32))
    return torch.stack([(word >> (8 * i)) & 255 for word in words for i in range(4)], 1).view(-1)[:count]


def moved(weight, shift, mask):
    """W + scale * m * z in float32, each operation rounded once."""
    wide = weight.float() if isinstance(weight, torch.Tensor) else weight.dequantize()
    if shift is None:
        return wide
    step = noise(shift, wide.shape) * torch.tensor(shift.scale)
    return torch.where(masked(wide, mask), wide + step, wide)


def expected(x, weight, bias, shifts, mask, rounded=lambda w: w):
    """The product in float64, and the sum of the sizes of its terms, which bounds its rounding error."""
    parts, sizes = [], []
    for rows, shift in zip(x.double().chunk(len(shifts)), shifts, strict=True):
        w = rounded(moved(weight, shift, mask)).double()
        offset = 0 if bias is None else bias.double()
        parts.append(rows @ w.t() + offset)
        sizes.append(rows.abs() @ w.abs().t() + (0 if bias is None else offset.abs()))
    return torch.cat(parts), torch.cat(sizes)


def call(x, weight, bias, shifts, mask=MASKS[0], compute="native"):
    y = gemm.linear(x, weight, bias, shifts=shifts, tensor=TENSOR, mask=mask, compute=compute)
    assert y is not None
    assert y.dtype is x.dtype
    assert y.shape == (*x.shape[:-1], weight.shape[0])
    return y


@needs_float
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shifts", GROUPS)
def test_float_weights_have_the_bits_of_the_reference(shifts, mask):
    """x is the identity: one product with 1, the others with 0, so the sums are the weights."""
    width, out = 83, 37
    _, weight, _ = make(1, width, out, 1)
    weight[3, 4] = 0.0
    x = torch.eye(width).repeat(len(shifts), 1)
    for found, shift in zip(call(x, weight, None, shifts, mask).chunk(len(shifts)), shifts, strict=True):
        assert torch.equal(found.t(), moved(weight, shift, mask))


@needs_float
def test_float_weights_have_the_bits_of_the_reference_in_parts():
    """Inputs beyond one part, at places of the noise that no block starts at."""
    width, out, shifts, mask = 2500, 5, GROUPS[2], MASKS[2]
    _, weight, _ = make(1, width, out, 1)
    x = torch.eye(width).repeat(len(shifts), 1)
    for found, shift in zip(call(x, weight, None, shifts, mask).chunk(len(shifts)), shifts, strict=True):
        assert torch.equal(found.t(), moved(weight, shift, mask))


@needs_half
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_weights_are_rounded_once(dtype):
    width, out, shifts, mask = 70, 45, GROUPS[3], MASKS[1]
    weight = make(1, width, out, 1)[1].to(dtype)
    x = torch.eye(width).repeat(len(shifts), 1)
    for found, shift in zip(
        call(x, weight, None, shifts, mask, "bf16").chunk(len(shifts)), shifts, strict=True
    ):
        assert torch.equal(found.t(), moved(weight, shift, mask).bfloat16().float())


@needs_float
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shifts", GROUPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float_sums(shape, shifts, threads):
    torch.set_num_threads(threads)
    x, weight, bias = make(*shape, len(shifts))
    y, size = expected(x, weight, bias, shifts, MASKS[0])
    error = (call(x, weight, bias, shifts).double() - y).abs()
    assert torch.all(error <= 2**-24 * (math.sqrt(shape[1]) + 8) * size)


@needs_half
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shifts", GROUPS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_sums(dtype, shape, shifts, threads):
    torch.set_num_threads(threads)
    x, weight, bias = make(*shape, len(shifts), dtype)
    y, size = expected(
        x.bfloat16(), weight, bias.float(), shifts, MASKS[0], rounded=lambda w: w.bfloat16().float()
    )
    error = (call(x, weight, bias, shifts, compute="bf16").double() - y).abs()
    last = 2**-8 * y.abs() if dtype is torch.bfloat16 else 0  # y itself is rounded
    assert torch.all(error <= last + 2**-23 * (math.sqrt(shape[1]) + 8) * size)


def codes(rows):
    step = rows.abs().amax(1, keepdim=True) / 127
    return (rows / torch.where(step > 0, step, 1)).double().round(), step.double()


@needs_byte
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("mask", MASKS[:3])
@pytest.mark.parametrize("shifts", GROUPS[1:3])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_sums(shape, shifts, mask, threads):
    """y = s_x (s_w (x_q W_q^T) + c (x_q (m z)_q^T)); a code next to a tie may be one off."""
    torch.set_num_threads(threads)
    x, weight, bias = make(*shape, len(shifts))
    x_codes, x_steps = codes(x)
    w_codes, w_steps = codes(weight)
    inside = masked(weight, mask).double()
    parts = []
    for rows, shift in zip(x_codes.chunk(len(shifts)), shifts, strict=True):
        part = (rows @ w_codes.t()) * w_steps.t()
        if shift is not None:
            length = 1.0 if shift.law == "rademacher" else 6.67 / 127
            z = (noise(shift, weight.shape).double() / length).round() * inside
            part += shift.scale * length * (rows @ z.t())
        parts.append(part)
    y = torch.cat(parts) * x_steps + bias.double()
    error = (call(x, weight, bias, shifts, mask, "int8").double() - y).abs()
    one = (
        x_steps * 127 * (w_steps.t() + 1e-2 * 6.67 / 127) + x_steps * w_steps.t() * 127
    )  # two codes off by one
    assert torch.all(error <= 1e-5 * y.abs().max() + 1.01 * one)
    assert float((error <= 1e-5 * y.abs().max()).double().mean()) > 0.9  # which is rare


@needs_byte
def test_int8_keeps_what_is_not_finite():
    x, weight, _ = make(4, 40, 6, 1)
    x[1, 3], x[2, 5], weight[4, 7] = math.inf, math.nan, math.nan
    y = call(x, weight, None, (None,), compute="int8")
    bad = torch.zeros(4, 6, dtype=torch.bool)
    bad[1:3], bad[:, 4] = True, True
    assert torch.equal(y.isnan(), bad)


@pytest.mark.parametrize("compute", [FLOAT, HALF, BYTE])
def test_zeros_give_zeros(compute):
    shifts = (None, Shift(3, 0.0))
    y = call(torch.zeros(6, 33), torch.zeros(9, 33), None, shifts, compute=compute)
    assert not y.any()


@needs_float
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("width", "group"), [(96, 32), (200, 64), (1601, 16)])
def test_quantised_weights(bits, width, group):
    x, weight, bias = make(21, width, 19, len(PAIR) + 1)
    quantized = quantize(weight, bits, group)
    shifts = (*PAIR, None)
    eye = torch.eye(width).repeat(len(shifts), 1)
    for mask in MASKS[:3]:
        for found, shift in zip(
            call(eye, quantized, None, shifts, mask).chunk(len(shifts)), shifts, strict=True
        ):
            assert torch.equal(found.t(), moved(quantized, shift, mask))
    y, size = expected(x, quantized, bias, shifts, MASKS[0])
    error = (call(x, quantized, bias, shifts).double() - y).abs()
    assert torch.all(error <= 2**-24 * (math.sqrt(width) + 8) * size)


@needs_half
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_in_half(bits):
    x, weight, bias = make(21, 200, 19, 2, torch.bfloat16)
    quantized = quantize(weight.float(), bits, 32)
    y, size = expected(x, quantized, bias, PAIR, MASKS[0], rounded=lambda w: w.bfloat16().float())
    error = (call(x, quantized, bias, PAIR).double() - y).abs()
    assert torch.all(error <= 2**-8 * y.abs() + 2**-22 * math.sqrt(200) * size)


@pytest.mark.parametrize("compute", [FLOAT, HALF, BYTE])
def test_results_do_not_depend_on_threads_groups_or_calls(compute):
    """A row of y is a function of its row of x and of its shift, whatever else is in the call."""
    x, weight, bias = make(100, 700, 300, 2)
    both = call(x, weight, bias, PAIR, compute=compute)
    torch.set_num_threads(2)
    assert torch.equal(call(x, weight, bias, PAIR, compute=compute), both)
    torch.set_num_threads(1)
    assert torch.equal(call(x[100:], weight, bias, PAIR[1:], compute=compute), both[100:])
    assert torch.equal(call(x.view(2, 10, 10, 700), weight, bias, PAIR, compute=compute).view(200, 300), both)


@needs_float
def test_weight_and_input_are_only_read():
    x, weight, bias = make(10, 50, 20, 2)
    before = x.clone(), weight.clone(), bias.clone()
    call(x, weight, bias, PAIR)
    call(x.t().contiguous().t(), weight, bias, PAIR)  # any strides of x
    assert all(torch.equal(a, b) for a, b in zip((x, weight, bias), before, strict=True))


@needs_float
def test_strided_inputs():
    x, weight, bias = make(10, 50, 20, 2)
    assert torch.equal(call(x.t().contiguous().t(), weight, bias, PAIR), call(x, weight, bias, PAIR))


def fits(x, weight, shifts=PAIR, mask=MASKS[0], compute="native"):
    return gemm.fits(x, weight, shifts=shifts, mask=mask, compute=compute)


@needs_float
def test_when_it_is_used():
    x, weight, _ = make(8, 64, 32, 2)
    assert fits(x, weight)
    assert fits(x, weight, (None, PAIR[0]))
    assert fits(x, weight.bfloat16())
    assert fits(x, quantize(weight, 4, 32), (None,))
    assert not fits(x, weight, (None,))  # torch's own product
    assert not fits(x.double(), weight.double())
    assert not fits(x.half(), weight.half())
    assert not fits(x, weight.t().contiguous().t())
    assert not fits(x, weight, (Shift(1, 0.1, "low-rank", 2),))
    assert not fits(x[:0], weight)
    assert not fits(torch.zeros(2 * gemm._MANY + 2, 64), weight)
    assert fits(torch.zeros(2 * gemm._MANY_READY, 64), weight)
    assert not fits(x.to("meta"), weight.to("meta"))


@needs_half
def test_long_batches_go_to_torchs_own_bf16_product():
    weight = torch.zeros(32, 64, dtype=torch.bfloat16)
    assert fits(torch.zeros(2 * gemm._MANY_READY - 2, 64, dtype=torch.bfloat16), weight)
    assert not fits(torch.zeros(2 * gemm._MANY_READY, 64, dtype=torch.bfloat16), weight)


@needs_float
def test_not_without_native_code(monkeypatch):
    gemm._library.cache_clear()
    monkeypatch.setenv("EDGESFT_NATIVE", "0")
    x, weight, bias = make(8, 64, 32, 2)
    try:
        assert gemm.kinds() == 0
        assert not fits(x, weight)
        assert gemm.linear(x, weight, bias, shifts=PAIR, tensor=1, mask=MASKS[0]) is None
    finally:
        gemm._library.cache_clear()


@pytest.mark.parametrize("compute", [FLOAT, HALF, BYTE])
def test_perturbed_linear_goes_through_it(compute, monkeypatch):
    x, weight, bias = make(12, 64, 32, 2)
    arguments = {"shifts": PAIR, "tensor": TENSOR, "mask": MASKS[1], "compute": compute}
    found = api.perturbed_linear(x, weight, bias, **arguments)
    assert torch.equal(found, call(x, weight, bias, PAIR, MASKS[1], compute))
    monkeypatch.setattr(api, "_gemm", None)
    strips = api.perturbed_linear(x, weight, bias, **arguments)
    tolerance = {"native": 1e-5, "bf16": 2e-2, "int8": 2e-2}[compute]  # strips may round y as well
    assert torch.allclose(found, strips, rtol=tolerance, atol=tolerance)
