"""Block quantisation of weight matrices in the layout of ONNX Runtime's MatMulNBits, and its exact inverse.

A row of a matrix (out, in) is cut into blocks of `group` inputs. Each block has one float32 scale; a weight
is (code - zero) * scale. The zero is a whole code, so a weight that is exactly 0 stays exactly 0 and an N:M
pattern survives. With 8 bits zero is 128 and nothing is stored; with 4 bits each block has its own, because
16 codes are too few to waste some on a side where a block has no weights.

With 4 bits the scale is searched: a block's largest entries are often not worth the resolution that they
cost the others, so the range is shrunk a little, the scale fitted to the codes by least squares, and the
best of a few such attempts in squared error kept.

Layout (com.microsoft MatMulNBits, ONNX Runtime 1.32): codes uint8 (out, blocks, group * bits / 8), for 4
bits two to a byte, the lower half first; scales (out, blocks); zeros uint8 (out, ceil(blocks / 2)), packed
like the codes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgesft.exporters.weights import FloatArray

Codes = npt.NDArray[np.uint8]

_SHRINK = (1.0, 0.93, 0.86)  # fractions of a block's range that the 16 codes are spread over
_ENTRIES = 1 << 16  # quantised at a time, so that temporaries stay in the cache
_TINY = np.float32(1e-37)  # the inverse of a smaller scale overflows; such a block is zero for every purpose


@dataclass(frozen=True)
class Quantized:
    """codes (out, blocks, group * bits // 8), scales (out, blocks), zeros (out, ceil(blocks / 2)) or None."""

    codes: Codes
    scales: FloatArray
    zeros: Codes | None


def blocks(inputs: int, group: int) -> int:
    """How many blocks a row of `inputs` weights takes; the last one is filled up with zeros."""
    return -(-inputs // group)


def quantize(weight: FloatArray, bits: int, group: int) -> Quantized:
    """A matrix (out, in) in blocks. bits: 4 or 8. group: a power of two from 16 on."""
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}, expected 4 or 8")
    rows, inputs = weight.shape
    n = blocks(inputs, group)
    codes = np.empty((rows, n, group), np.uint8)
    scales = np.empty((rows, n), np.float32)
    zeros = np.empty((rows, n), np.uint8)
    step = max(1, _ENTRIES // (n * group))
    for start in range(0, rows, step):
        part = weight[start : start + step]
        padded = np.zeros((len(part), n * group), np.float32)
        padded[:, :inputs] = part
        cut = padded.reshape(-1, group)
        q, s, z = _signed8(cut) if bits == 8 else _ranged4(cut)
        codes[start : start + step] = q.reshape(len(part), n, group)
        scales[start : start + step] = s.reshape(len(part), n)
        zeros[start : start + step] = z.reshape(len(part), n)
    if bits == 8:
        return Quantized(codes, scales, None)
    return Quantized(_pack(codes), scales, _pack(zeros))


def _inverse(scale: FloatArray) -> FloatArray:
    found: FloatArray = np.divide(1.0, scale, out=np.zeros_like(scale), where=np.abs(scale) > _TINY)
    return found


def _signed8(w: FloatArray) -> tuple[Codes, FloatArray, Codes]:
    """Codes around 128 of blocks (n, group): the largest entry of a block lies 127 away."""
    scale = np.abs(w).max(1, keepdims=True) / np.float32(127)
    codes = np.rint(w * _inverse(scale)) + np.float32(128)
    return codes.astype(np.uint8), scale, np.full(scale.shape, 128, np.uint8)


def _ranged4(w: FloatArray) -> tuple[Codes, FloatArray, Codes]:
    """Codes 0..15, scales and zeros of blocks (n, group)."""
    unit = np.abs(w).max(1, keepdims=True)
    w = w * _inverse(unit)  # so that no square overflows
    high = np.maximum(w.max(1, keepdims=True), 0)
    low = np.minimum(w.min(1, keepdims=True), 0)
    best_error = np.full_like(high, np.inf)
    best_scale = np.zeros_like(high)
    best_zero = np.zeros_like(high)
    best = np.zeros_like(w)
    for shrink in _SHRINK:
        scale = (high - low) * np.float32(shrink / 15)
        inverse = _inverse(scale)
        zero = np.clip(np.rint(-low * np.float32(shrink) * inverse), 0, 15)
        scale = _fit(w, _steps(w, inverse, zero), scale)
        steps = _steps(w, _inverse(scale), zero)
        error = np.square(steps * scale - w).sum(1, keepdims=True)
        better = error < best_error
        np.copyto(best_error, error, where=better)
        np.copyto(best_scale, scale, where=better)
        np.copyto(best_zero, zero, where=better)
        np.copyto(best, steps, where=better)
    return (best + best_zero).astype(np.uint8), best_scale * unit, best_zero.astype(np.uint8)


def _steps(w: FloatArray, inverse: FloatArray, zero: FloatArray) -> FloatArray:
    """Code less zero of every entry: the nearest whole number of scales within 0 - zero .. 15 - zero."""
    steps = w * inverse
    np.rint(steps, out=steps)
    return np.clip(steps, -zero, 15 - zero, out=steps)


def _fit(w: FloatArray, steps: FloatArray, scale: FloatArray) -> FloatArray:
    """The scale of least squared error for given steps, <w, steps> / <steps, steps>, block by block."""
    square = np.square(steps).sum(1, keepdims=True)
    fitted = np.divide((w * steps).sum(1, keepdims=True), square, out=scale.copy(), where=square > 0)
    return np.where(fitted > 0, fitted, scale)


def _pack(codes: Codes) -> Codes:
    """Two codes a byte along the last axis, the lower half first; an odd one gets a partner of 0."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return codes[..., 0::2] | (codes[..., 1::2] << np.uint8(4))


def _unpack(packed: Codes, count: int) -> Codes:
    """The inverse of `_pack`: `count` codes along the last axis."""
    both = np.stack([packed & 15, packed >> 4], axis=-1)
    return both.reshape(*packed.shape[:-1], -1)[..., :count]


def dequantize(q: Quantized, bits: int, inputs: int) -> FloatArray:
    """The matrix (out, inputs) that the runtime computes with, exactly."""
    rows, n = q.scales.shape
    codes = q.codes if bits == 8 else _unpack(q.codes, q.codes.shape[-1] * 2)
    values = codes.astype(np.float32)
    if q.zeros is None:
        values -= np.float32(1 << (bits - 1))
    else:
        values -= _unpack(q.zeros, n).astype(np.float32)[..., None]
    values *= q.scales[..., None]
    return values.reshape(rows, -1)[:, :inputs]
