"""The perturbation in plain torch: the specification of the kernel, for any device and any float type.

Noise z(seed, tensor, index) is a function of its three arguments alone, so no order of layers, strips or
threads can change it. Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011) turns
the key `seed` (low word, high word) and the counter (block low word, block high word, tensor, domain) into
four 32-bit words. The domain says what they are for:

    0  gaussian noise, 4 entries a block. Box-Muller turns words 0 and 1 into normals 0 and 1, words 2 and 3
       into 2 and 3:
           u      = (word0 // 2 + 1/2) / 2^31                              in (0, 1], rounded to float32
           angle  = (low 30 bits of word1, signed) * pi / 2^31             in [-pi/4, pi/4)
           (c, s) = (cos(angle), sin(angle)); bit 31 of word1 negates c, bit 30 swaps the two
           (z0, z1) = sqrt(-2 ln u) * (c, s)
    1  rademacher noise, 128 entries a block: bit i % 32 of word i // 32, set for -1, clear for +1
    2  stochastic rounding, a word an entry, 4 entries a block
    3  the share of a mask, a byte an entry, 16 entries a block, little-endian within a word

Low-rank noise of a matrix (out, in) is u v^T / sqrt(rank): u (out, rank) and v (in, rank) are gaussian noise
of the tensors `tensor ^ 0x75` and `tensor ^ 0x76`; the products are summed in float32 from the first on, then
multiplied by 1 / sqrt(rank) rounded to float32.

ln, cos and sin are minimax polynomials evaluated in float32 by additions and multiplications only. All of it
is exact IEEE arithmetic in a fixed order, so the bits are the same in the C++ next to this file and on every
device with float64 (the square root is taken there and rounded: torch's float32 one may be an ulp off).
The largest |z| is sqrt(64 ln 2) = 6.66. Against float64 Box-Muller from the same words the error is at most
1.5e-6 + 6e-8 / r at radius r, and below 1e-6 for all but a few in ten thousand: next to the origin u is close
to 1, where float32 is coarse. No radius lies in (0, 3.4e-4), where one pair in 10^7 should.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from edgesft.core.protocols import Law, Mask, Shift, Update

if TYPE_CHECKING:
    from edgesft.core.quantized import Quantized

GAUSSIAN, RADEMACHER, ROUNDING, MASK = 0, 1, 2, 3  # domains
LEFT, RIGHT = 0x75, 0x76  # what the ids of u and v differ in from that of their tensor

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85


def _constants(text: str) -> list[float]:
    return [float.fromhex(each) for each in text.split()]


# Minimax polynomials of least relative error with float32 coefficients, highest power first.
_LOG = _constants(  # -2 ln(1 + f) / f, f in [sqrt(1/2) - 1, sqrt(2) - 1]
    "0x1.9dfa68p-3 -0x1.4c3d04p-2 0x1.614c08p-2 -0x1.978e2ep-2"
    " 0x1.ff623cp-2 -0x1.5559dcp-1 0x1.00007ap+0 -0x1.fffffep+0"
)
_SIN = _constants("-0x1.2d930cp-15 0x1.465e92p-9 -0x1.4abbbap-4 0x1.921fb6p-1")  # sin(pi/4 x) / x in x^2
_COS = _constants("-0x1.4e35dcp-12 0x1.03ae64p-6 -0x1.3bd38cp-2 0x1.fffffep-1")  # cos(pi/4 x) in x^2
_EXPONENT = float.fromhex("-0x1.62e43p-23")  # -2 ln 2 for an exponent still in its place, 23 bits up


def _multiply(x: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit words; the wrap-around of int64 leaves its bits right."""
    product = x * by
    return (product >> 32) & _WORD, product & _WORD


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words from a counter of four words and a key of two, all int64 in [0, 2^32)."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(x0, _MULTIPLIER_0)
        high1, low1 = _multiply(x2, _MULTIPLIER_1)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return x0, x1, x2, x3


def _polynomial(coefficients: list[float], x: Tensor) -> Tensor:
    value = coefficients[0] * x
    for coefficient in coefficients[1:-1]:
        value.add_(coefficient).mul_(x)
    return value.add_(coefficients[-1])


def _int32(x: Tensor) -> Tensor:
    """Words in [0, 2^32) as the int32 of the same bits."""
    return (x - ((x & 0x80000000) << 1)).to(torch.int32)


def radius(word: Tensor) -> Tensor:
    """sqrt(-2 ln u) of words (int64) as float32."""
    u = (word >> 1).to(torch.int32).to(torch.float32) * 2.0**-31 + 2.0**-32
    bits = u.view(torch.int32)
    exponent = (bits - 0x3F3504F3) & -0x800000  # leaves a mantissa in [sqrt(1/2), sqrt(2))
    f = (bits - exponent).view(torch.float32) - 1.0
    square = _polynomial(_LOG, f) * f + exponent.to(torch.float32) * _EXPONENT
    if square.device.type == "mps":  # has no float64
        return square.sqrt()
    return square.double().sqrt().to(torch.float32)


def normal_pair(word: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals (float32) from two uniform words (int64)."""
    r = radius(word)
    x = _int32((turn << 2) & _WORD).to(torch.float32) * 2.0**-31
    y = x * x
    sine = _polynomial(_SIN, y) * x
    cosine = _polynomial(_COS, y)
    cosine = torch.where((turn & 0x80000000) != 0, -cosine, cosine)
    swap = (turn & 0x40000000) != 0
    return r * torch.where(swap, sine, cosine), r * torch.where(swap, cosine, sine)


def words(
    count: int, *, seed: int, tensor: int, start: int, per_block: int, domain: int, device: torch.device | str
) -> Tensor:
    """The words (blocks, 4), int64, of the blocks that hold the entries start .. start + count - 1."""
    first, last = start // per_block, -(-(start + count) // per_block)
    block = torch.arange(first, last, dtype=torch.int64, device=device)
    zero = torch.zeros_like(block)
    counter = (block & _WORD, (block >> 32) & _WORD, zero + (tensor & _WORD), zero + domain)
    return torch.stack(philox(counter, (seed & _WORD, (seed >> 32) & _WORD)), dim=1)


def gaussian(count: int, *, seed: int, tensor: int, start: int, device: torch.device | str = "cpu") -> Tensor:
    """Entries start .. start + count - 1 of standard normal noise: float32, (count,).

    seed: any int, taken modulo 2^64. tensor: taken modulo 2^32. start: >= 0.
    """
    found = words(
        count, seed=seed, tensor=tensor, start=start, per_block=4, domain=GAUSSIAN, device=device
    ).unbind(1)
    z = torch.stack((*normal_pair(found[0], found[1]), *normal_pair(found[2], found[3])), dim=1)
    return z.view(-1)[start % 4 :][:count]


def rademacher(
    count: int, *, seed: int, tensor: int, start: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Entries start .. start + count - 1 of random signs: float32, (count,)."""
    found = words(
        count, seed=seed, tensor=tensor, start=start, per_block=128, domain=RADEMACHER, device=device
    )
    bit = (found[..., None] >> torch.arange(32, device=device)) & 1
    return (1 - 2 * bit.view(-1)[start % 128 :][:count]).to(torch.float32)


def factors(
    rows: slice, width: int, *, seed: int, tensor: int, rank: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Those rows of u (rows, rank), and v (width, rank); low-rank noise is u v^T / sqrt(rank)."""
    first, count = rows.start * rank, (rows.stop - rows.start) * rank
    u = gaussian(count, seed=seed, tensor=tensor ^ LEFT, start=first, device=device)
    v = gaussian(width * rank, seed=seed, tensor=tensor ^ RIGHT, start=0, device=device)
    return u.view(-1, rank), v.view(width, rank)


def low_rank(
    count: int,
    *,
    seed: int,
    tensor: int,
    start: int,
    width: int,
    rank: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Entries start .. start + count - 1 of low-rank noise of a matrix with `width` columns."""
    if not count:
        return torch.empty(0, device=device)
    rows = slice(start // width, (start + count - 1) // width + 1)
    u, v = factors(rows, width, seed=seed, tensor=tensor, rank=rank, device=device)
    z = u[:, :1] * v[:, 0]
    for r in range(1, rank):
        z = z + u[:, r : r + 1] * v[:, r]
    z = z * torch.tensor(1 / math.sqrt(rank), dtype=torch.float32).item()
    return z.view(-1)[start - rows.start * width :][:count]


def noise(
    count: int,
    *,
    seed: int,
    tensor: int,
    start: int,
    device: torch.device | str = "cpu",
    law: Law = "gaussian",
    rank: int = 0,
    width: int = 1,
) -> Tensor:
    """z(seed, tensor, start + i) for 0 <= i < count: float32, (count,). rank, width: of low-rank noise."""
    if law == "low-rank":
        return low_rank(count, seed=seed, tensor=tensor, start=start, width=width, rank=rank, device=device)
    draw = gaussian if law == "gaussian" else rademacher
    return draw(count, seed=seed, tensor=tensor, start=start, device=device)


def random_words(count: int, *, seed: int, tensor: int, start: int, device: torch.device | str) -> Tensor:
    """32 random bits an entry for stochastic rounding: int64 in [0, 2^32), (count,)."""
    found = words(count, seed=seed, tensor=tensor, start=start, per_block=4, domain=ROUNDING, device=device)
    return found.view(-1)[start % 4 :][:count]


def chosen(count: int, *, mask: Mask, tensor: int, start: int, device: torch.device | str) -> Tensor:
    """Which entries are in the random share of a mask: bool, (count,)."""
    found = words(count, seed=mask.seed, tensor=tensor, start=start, per_block=16, domain=MASK, device=device)
    byte = (found[..., None] >> torch.tensor([0, 8, 16, 24], device=device)) & 0xFF
    share: Tensor = byte.view(-1)[start % 16 :][:count] < mask.keep
    return share


def inside(weight: Tensor, *, mask: Mask, tensor: int, start: int) -> Tensor:
    """Which entries of a float32 or float64 weight are in the mask: bool; a NaN never is."""
    low, high = torch.tensor([mask.low, mask.high], dtype=weight.dtype).tolist()
    size = weight.abs()
    found: Tensor = (size >= low) & (size <= high)
    if mask.keep < 256:
        share = chosen(weight.numel(), mask=mask, tensor=tensor, start=start, device=weight.device)
        found &= share.view(weight.shape)
    return found


def _term(shift: Shift, weight: Tensor, *, tensor: int, start: int, scale: float | None = None) -> Tensor:
    """scale * z in the type of `weight`, whose first entry has the index `start`: one rounding."""
    z = noise(
        weight.numel(),
        seed=shift.seed,
        tensor=tensor,
        start=start,
        device=weight.device,
        law=shift.law,
        rank=shift.rank,
        width=weight.shape[-1] if weight.dim() else 1,
    )
    factor = torch.tensor(shift.scale if scale is None else scale, dtype=weight.dtype).item()
    return z.view(weight.shape).to(weight.dtype) * factor


def strip(
    weight: Tensor, shift: Shift | None, out: Tensor, *, tensor: int, mask: Mask, start: int, bare: bool
) -> None:
    """out = weight + scale * z in the mask, else weight; bare: scale * z in the mask, else 0.

    weight: float32 or float64, entry i has index start + i; out: any float type, rounded to once at the end.
    """
    if shift is None:
        out.copy_(torch.zeros_like(weight) if bare else weight)
        return
    moved = _term(shift, weight, tensor=tensor, start=start)
    rest = torch.zeros_like(weight) if bare else weight
    active = inside(weight, mask=mask, tensor=tensor, start=start)
    out.copy_(torch.where(active, moved if bare else weight + moved, rest))


def moved(weight: Tensor, update: Update, *, tensor: int, start: int) -> Tensor:
    """A float32 or float64 weight after an update, wherever the mask is, not yet rounded to its own type."""
    if update.shrink != 1:
        weight = weight * torch.tensor(update.shrink, dtype=weight.dtype).item()
    total: Tensor | None = None
    for shift in update.shifts:
        term = _term(shift, weight, tensor=tensor, start=start)
        total = term if total is None else total + term
    return weight if total is None else weight + total


def to_bfloat16(values: Tensor, random: Tensor) -> Tensor:
    """float32 rounded up or down at random, with the mean kept: the upper 16 bits of `random` decide."""
    raised = (values.view(torch.int32).to(torch.int64) & _WORD) + (random.view(values.shape) >> 16)
    found = (_int32(raised & _WORD) & -0x10000).view(torch.float32).to(torch.bfloat16)
    return torch.where(values.isfinite(), found, values.to(torch.bfloat16))


def to_codes(values: Tensor, scale: Tensor, bits: int, random: Tensor | None) -> Tensor:
    """The codes (float32) of values at a scale each: to nearest, or at random with the mean kept.

    The upper 24 bits of `random` decide. Codes are clamped to the range of the symmetric format.
    """
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    t = values / scale
    if random is None:
        return t.round().clamp(low, high)
    below = t.floor()
    u = (random.view(values.shape) >> 8).to(torch.float32) * 2.0**-24
    return (below + (u < t - below).to(torch.float32)).clamp(low, high)


def descend(weight: Tensor, update: Update, *, tensor: int, mask: Mask, start: int) -> int:
    """`Update` in place on a part of a float tensor that begins at index `start`; the entries in the mask."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    active = inside(wide, mask=mask, tensor=tensor, start=start)
    after = moved(wide, update, tensor=tensor, start=start)
    if update.rounding is not None and weight.dtype is torch.bfloat16:
        random = random_words(
            weight.numel(), seed=update.rounding, tensor=tensor, start=start, device=weight.device
        )
        after = to_bfloat16(after, random)
    weight.copy_(torch.where(active, after.to(weight.dtype), weight))
    return int(active.sum())


def descend_codes(weight: "Quantized", update: Update, rows: slice, *, tensor: int, mask: Mask) -> int:
    """`Update` in place on some rows of a quantised weight; returns the entries in the mask.

    Scales stay. Where one is 0, or the new weight is not a number, the code stays.
    """
    width = weight.shape[1]
    before, start = weight.dequantize(rows), rows.start * width
    active = inside(before, mask=mask, tensor=tensor, start=start)
    after = moved(before, update, tensor=tensor, start=start)
    scale = weight.scales[rows].to(torch.float32).repeat_interleave(weight.group, dim=1)[:, :width]
    random = None
    if update.rounding is not None:
        random = random_words(
            before.numel(), seed=update.rounding, tensor=tensor, start=start, device=before.device
        )
    found = to_codes(after, scale, weight.bits, random)
    codes = unpacked(weight.codes[rows], weight.bits, width)
    put = active & (scale != 0) & ~found.isnan()
    codes = torch.where(put, found.nan_to_num().to(torch.int8), codes)
    weight.codes[rows] = packed(codes, weight.bits)
    return int(active.sum())


def unpacked(codes: Tensor, bits: int, width: int) -> Tensor:
    """Codes (rows, width) as int8, from storage."""
    if bits == 8:
        return codes
    pairs = torch.stack((codes & 15, codes >> 4), dim=2).view(codes.shape[0], -1)
    return pairs[:, :width].to(torch.int8) - 8


def packed(codes: Tensor, bits: int) -> Tensor:
    """The storage of codes (rows, width); the half byte behind an odd row is that of 0."""
    if bits == 8:
        return codes
    nibbles = (codes + 8).to(torch.uint8)
    if nibbles.shape[1] % 2:
        nibbles = torch.cat((nibbles, torch.full_like(nibbles[:, :1], 8)), dim=1)
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4


def slices(rows: int, width: int, entries: int) -> Sequence[slice]:
    """Consecutive rows of a matrix, about `entries` a slice."""
    step = max(1, entries // max(1, width))
    return [slice(at, min(rows, at + step)) for at in range(0, rows, step)]
