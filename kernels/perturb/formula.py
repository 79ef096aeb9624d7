"""The noise in plain numpy: what `reference` says, for machines without torch and without a compiler."""

import math
from typing import TYPE_CHECKING

import numpy as np

from edgesft.core.protocols import Law

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgesft.core.protocols import FloatArray

    Words = npt.NDArray[np.uint64]

_WORD = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_GAUSSIAN, _RADEMACHER, ROUNDING, MASK = range(4)
_LEFT, _RIGHT = 0x75, 0x76


def _constants(text: str) -> "list[np.float32]":
    return [np.float32(float.fromhex(each)) for each in text.split()]


_LOG = _constants(
    "0x1.9dfa68p-3 -0x1.4c3d04p-2 0x1.614c08p-2 -0x1.978e2ep-2"
    " 0x1.ff623cp-2 -0x1.5559dcp-1 0x1.00007ap+0 -0x1.fffffep+0"
)
_SIN = _constants("-0x1.2d930cp-15 0x1.465e92p-9 -0x1.4abbbap-4 0x1.921fb6p-1")
_COS = _constants("-0x1.4e35dcp-12 0x1.03ae64p-6 -0x1.3bd38cp-2 0x1.fffffep-1")
_EXPONENT = np.float32(float.fromhex("-0x1.62e43p-23"))


def words(count: int, seed: int, tensor: int, start: int, per_block: int, domain: int) -> "Words":
    """Words (blocks, 4) of the blocks that hold the entries start .. start + count - 1."""
    block = np.arange(start // per_block, -(-(start + count) // per_block), dtype=np.uint64)
    x0, x1 = block & _WORD, block >> _SHIFT
    x2, x3 = np.full_like(block, tensor & 0xFFFFFFFF), np.full_like(block, domain)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1 = (p1 >> _SHIFT) ^ x1 ^ np.uint64(k0), p1 & _WORD
        x2, x3 = (p0 >> _SHIFT) ^ x3 ^ np.uint64(k1), p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack((x0, x1, x2, x3), axis=1)


def _polynomial(coefficients: "list[np.float32]", x: "FloatArray") -> "FloatArray":
    value = coefficients[0] * x
    for coefficient in coefficients[1:-1]:
        value = (value + coefficient) * x
    return value + coefficients[-1]


def _normal_pair(word: "Words", turn: "Words") -> "tuple[FloatArray, FloatArray]":
    u = (word >> np.uint64(1)).astype(np.float32) * np.float32(2.0**-31) + np.float32(2.0**-32)
    bits = u.view(np.int32)
    exponent = (bits - np.int32(0x3F3504F3)) & np.int32(-0x800000)
    f = (bits - exponent).view(np.float32) - np.float32(1.0)
    r = np.sqrt(_polynomial(_LOG, f) * f + exponent.astype(np.float32) * _EXPONENT)
    low = ((turn << np.uint64(2)) & _WORD).astype(np.uint32).view(np.int32)
    x = low.astype(np.float32) * np.float32(2.0**-31)
    y = x * x
    sine, cosine = _polynomial(_SIN, y) * x, _polynomial(_COS, y)
    cosine = np.where(turn & np.uint64(1 << 31), -cosine, cosine)
    swap = (turn & np.uint64(1 << 30)) != 0
    return r * np.where(swap, sine, cosine), r * np.where(swap, cosine, sine)


def _gaussian(count: int, seed: int, tensor: int, start: int) -> "FloatArray":
    found = words(count, seed, tensor, start, 4, _GAUSSIAN)
    pairs = *_normal_pair(found[:, 0], found[:, 1]), *_normal_pair(found[:, 2], found[:, 3])
    return np.stack(pairs, axis=1).reshape(-1)[start % 4 :][:count]


def formula(
    count: int, *, seed: int, tensor: int, start: int, law: Law, rank: int = 0, width: int = 1
) -> "FloatArray":
    """`noise` in plain numpy."""
    if law == "gaussian" or not count:
        return _gaussian(count, seed, tensor, start)
    if law == "rademacher":
        found = words(count, seed, tensor, start, 128, _RADEMACHER).reshape(-1, 1)
        bits = (found >> np.arange(32, dtype=np.uint64)) & np.uint64(1)
        return (1 - 2 * bits.reshape(-1)[start % 128 :][:count].astype(np.float32)).astype(np.float32)
    first, last = start // width, (start + count - 1) // width + 1
    u = _gaussian((last - first) * rank, seed, tensor ^ _LEFT, first * rank).reshape(-1, rank)
    v = _gaussian(width * rank, seed, tensor ^ _RIGHT, 0).reshape(width, rank)
    z = u[:, :1] * v[:, 0]
    for r in range(1, rank):
        z = z + u[:, r : r + 1] * v[:, r]
    z = z * np.float32(1 / math.sqrt(rank))
    return z.reshape(-1)[start - first * width :][:count]
