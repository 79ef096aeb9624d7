# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202 - types of the language are not those of Python
"""Triton source of `gpu`: 1-D blocks of entries in row-major order. Imported only where it runs."""

import triton
import triton.language as tl

GAUSSIAN = tl.constexpr(0)
RADEMACHER = tl.constexpr(1)
ROUNDING = tl.constexpr(2)
MASK = tl.constexpr(3)


@triton.jit
def _philox(block, low, high, tensor, domain):
    """Philox4x32-10 of the counter (block low, block high, tensor, domain): four uint32 words."""
    x0 = (block & 0xFFFFFFFF).to(tl.uint32)
    x1 = (block >> 32).to(tl.uint32)
    x2 = tl.zeros_like(x0) + tensor.to(tl.uint32)
    x3 = tl.zeros_like(x0) + domain
    k0 = tl.zeros_like(x0) + low.to(tl.uint32)
    k1 = tl.zeros_like(x0) + high.to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = x0.to(tl.uint64) * 0xD2511F53
        p1 = x2.to(tl.uint64) * 0xCD9E8D57
        y0 = (p1 >> 32).to(tl.uint32) ^ x1 ^ k0
        y2 = (p0 >> 32).to(tl.uint32) ^ x3 ^ k1
        x1 = (p1 & 0xFFFFFFFF).to(tl.uint32)
        x3 = (p0 & 0xFFFFFFFF).to(tl.uint32)
        x0 = y0
        x2 = y2
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return x0, x1, x2, x3


@triton.jit
def _pick(x0, x1, x2, x3, which):
    """Word `which` (0..3) of each entry's block."""
    return tl.where(which < 2, tl.where(which == 0, x0, x1), tl.where(which == 2, x2, x3))


@triton.jit
def _radius(word):
    """sqrt(-2 ln u), u = (top 31 bits of the word + 1/2) / 2^31, in (0, 1]."""
    u = (word >> 1).to(tl.int32).to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -0x800000
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    p = 0.2021377682685852 * f + -0.3244515061378479
    p = p * f + 0.34501659870147705
    p = p * f + -0.39800330996513367
    p = p * f + 0.4993981719017029
    p = p * f + -0.6667011976242065
    p = p * f + 1.0000072717666626
    p = p * f + -1.9999998807907104
    return tl.sqrt(p * f + exponent.to(tl.float32) * -1.6525916635146132e-07)


@triton.jit
def _normal(word, turn, second):
    """The first or the second normal of a pair of words."""
    r = _radius(word)
    x = (turn << 2).to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10
    y = x * x
    sine = -3.5950470191892236e-05 * y + 0.00249000103212893
    sine = ((sine * y + -0.08074543625116348) * y + 0.7853981852531433) * x
    cosine = -0.0003187278634868562 * y + 0.015849683433771133
    cosine = (cosine * y + -0.308424174785614) * y + 0.9999999403953552
    cosine = tl.where((turn & 0x80000000) != 0, -cosine, cosine)
    swap = (turn & 0x40000000) != 0
    wants_sine = swap != second
    return r * tl.where(wants_sine, sine, cosine)


@triton.jit
def _noise(index, low, high, tensor, law: tl.constexpr):
    """z of the entries `index` (int64)."""
    if law == 1:
        x0, x1, x2, x3 = _philox(index // 128, low, high, tensor, RADEMACHER)
        word = _pick(x0, x1, x2, x3, (index % 128) // 32)
        bit = (word >> (index % 32).to(tl.uint32)) & 1
        return 1.0 - 2.0 * bit.to(tl.float32)
    x0, x1, x2, x3 = _philox(index // 4, low, high, tensor, GAUSSIAN)
    which = index % 4
    later = which >= 2
    return _normal(tl.where(later, x2, x0), tl.where(later, x3, x1), (which % 2) == 1)


@triton.jit
def _inside(w, index, tensor, least, most, keep, mask_low, mask_high):
    """Which entries take part."""
    size = tl.abs(w)
    found = (size >= least) & (size <= most)
    if keep < 256:
        x0, x1, x2, x3 = _philox(index // 16, mask_low, mask_high, tensor, MASK)
        word = _pick(x0, x1, x2, x3, (index % 16) // 4)
        byte = (word >> ((index % 4) * 8).to(tl.uint32)) & 255
        found = found & (byte.to(tl.int32) < keep)
    return found


@triton.jit
def _nearest(x, narrow: tl.constexpr):
    """x, or the nearest bfloat16 as float32, ties to even; NaN aside. A conversion may cut instead."""
    if narrow:
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def noise(out, count, start, low, high, tensor, law: tl.constexpr, block: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    tl.store(out + at, _noise(at + start, low, high, tensor, law), mask=at < count)


@triton.jit
def strip(
    source, out, count, start, low, high, tensor, scale, least, most, keep, mask_low, mask_high,
    law: tl.constexpr, bare: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    held = tl.load(source + at, mask=at < count, other=0.0)
    w = held.to(tl.float32)
    inside = _inside(w, at + start, tensor, least, most, keep, mask_low, mask_high)
    moved = scale * _noise(at + start, low, high, tensor, law)
    if bare:
        w = tl.zeros_like(w)
    else:
        moved = w + moved
    narrow: tl.constexpr = out.dtype.element_ty == tl.bfloat16
    tl.store(out + at, _nearest(tl.where(inside, moved, w), narrow).to(out.dtype.element_ty), mask=at < count)


@triton.jit
def sweep(
    weight, active, count, seeds, scales, tensor, shrink, least, most, keep, mask_low, mask_high,
    rounding_low, rounding_high, shifts: tl.constexpr, law: tl.constexpr, stochastic: tl.constexpr,
    shrinks: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    held = tl.load(weight + at, mask=at < count, other=0.0)
    w = held.to(tl.float32)
    inside = _inside(w, at, tensor, least, most, keep, mask_low, mask_high) & (at < count)
    total = tl.zeros_like(w)
    for k in range(shifts):
        low = tl.load(seeds + 2 * k).to(tl.uint32, bitcast=True)
        high = tl.load(seeds + 2 * k + 1).to(tl.uint32, bitcast=True)
        step = tl.load(scales + k) * _noise(at, low, high, tensor, law)
        total = tl.where(k == 0, step, total + step)
    moved = w
    if shrinks:
        moved = moved * shrink
    moved = moved + total
    if stochastic:  # add random bits below the last one kept, and cut
        x0, x1, x2, x3 = _philox(at // 4, rounding_low, rounding_high, tensor, ROUNDING)
        word = _pick(x0, x1, x2, x3, at % 4)
        bits = moved.to(tl.uint32, bitcast=True) + (word >> 16)
        moved = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        moved = _nearest(moved, weight.dtype.element_ty == tl.bfloat16)
    tl.store(weight + at, tl.where(inside, moved, w).to(weight.dtype.element_ty), mask=inside)
    tl.atomic_add(active, tl.sum(inside.to(tl.int32)))
