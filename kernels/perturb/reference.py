"""The perturbation in plain torch: the specification of the kernel, for any device and any float type.

Noise z(seed, tensor, index) is a function of its three arguments alone, so no order of layers, strips or
threads can change it. Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011) turns
the key `seed` (low word, high word) and the counter (index // 4 low word, high word, tensor, 0) into four
32-bit words; Box-Muller turns words 0 and 1 into normals 0 and 1 of the block, words 2 and 3 into 2 and 3:

    u      = (word0 // 2 + 1/2) / 2^31                              in (0, 1], rounded to float32
    angle  = (low 30 bits of word1, signed) * pi / 2^31             in [-pi/4, pi/4)
    (c, s) = (cos(angle), sin(angle)); bit 31 of word1 negates c, bit 30 swaps the two
    (z0, z1) = sqrt(-2 ln u) * (c, s)

ln, cos and sin are minimax polynomials evaluated in float32 by additions and multiplications only. All of it
is exact IEEE arithmetic in a fixed order, so the bits are the same in the C++ next to this file and on every
device with float64 (the square root is taken there and rounded: torch's float32 one may be an ulp off).
The largest |z| is sqrt(64 ln 2) = 6.66. Against float64 Box-Muller from the same words the error is at most
1.5e-6 + 6e-8 / r at radius r, and below 1e-6 for all but a few in ten thousand: next to the origin u is close
to 1, where float32 is coarse. No radius lies in (0, 3.4e-4), where one pair in 10^7 should.
"""

import torch
from torch import Tensor

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


def noise(count: int, *, seed: int, tensor: int, start: int, device: torch.device | str = "cpu") -> Tensor:
    """z(seed, tensor, start + i) for 0 <= i < count: float32, (count,).

    seed: any int, taken modulo 2^64. tensor: taken modulo 2^32. start: >= 0.
    """
    first, last = start // 4, (start + count + 3) // 4
    block = torch.arange(first, last, dtype=torch.int64, device=device)
    zero = torch.zeros_like(block)
    counter = (block & _WORD, (block >> 32) & _WORD, zero + (tensor & _WORD), zero)
    words = philox(counter, (seed & _WORD, (seed >> 32) & _WORD))
    z = torch.stack(
        (*normal_pair(words[0], words[1]), *normal_pair(words[2], words[3])), dim=1
    )  # (blocks, 4)
    return z.view(-1)[start - 4 * first :][:count]


def perturb(
    source: Tensor, out: Tensor, *, seed: int, tensor: int, start: int, scale: float, low: float, high: float
) -> int:
    """out = source + scale * z where low <= |source| <= high, else source; returns how many entries move.

    source, out: one shape, may be the same tensor; entry i in row-major order has the noise of start + i.
    Scale, thresholds and arithmetic are float32 (float64 for float64 weights): one multiplication, one
    addition, then one rounding to the type of `out`. A NaN is in no range.
    """
    wide = torch.promote_types(source.dtype, torch.float32)
    scale, low, high = torch.tensor([scale, low, high], dtype=wide).tolist()
    weight = source.to(wide)
    size = weight.abs()
    mask = (size >= low) & (size <= high)
    z = noise(source.numel(), seed=seed, tensor=tensor, start=start, device=source.device)
    moved = weight + z.view(source.shape).to(wide) * scale
    out.copy_(torch.where(mask, moved.to(out.dtype), source))
    return int(mask.sum())
