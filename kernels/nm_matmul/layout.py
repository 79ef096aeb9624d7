"""Matrices in the tiled layout `nm-packed`: packing, unpacking and checking, in numpy.

docs/format.md describes every byte; nm.h says the same to the compiler. Codes are whole numbers, int4 from -8
to 7 and int8 from -127 to 127; a weight is code * scale * unit. The kernels stream dense matrices and 2:4; of
other patterns `streamed` makes what they know.
"""

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edgesft.kernels.nm_matmul import patterns
from edgesft.kernels.nm_matmul.patterns import (
    COLUMNS,
    DENSE,
    ROWS,
    TWO_FOUR,
    Bytes,
    NotPacked,
    check_pattern,
)

__all__ = ["COLUMNS", "DENSE", "ROWS", "TWO_FOUR", "Bytes", "NotPacked", "Packed", "check_pattern"]

VERSION: Final = 1  # of the format
VALUES: Final = ("int4", "int8", "fp16", "bf16")
OFFSETS: Final = {"int4": 8, "int8": 128}  # code 0 as it is stored
LIMITS: Final = {"int4": (-8, 7), "int8": (-127, 127)}
_STRIPS = 1 << 22  # weights packed at a time, so that temporaries stay small

Codes = npt.NDArray[np.int8]
Halves = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Packed:
    """A matrix (rows, columns). sparse: without its zeros, else dense. value: one of VALUES. group: columns
    that share a scale, a multiple of 32, or 0 for the whole row; stream (bytes,); scales (strips * groups *
    16,). pattern: `dense` or an N:M of `patterns`; 2:4 where a sparse matrix does not say."""

    rows: int
    columns: int
    sparse: bool
    value: str
    group: int
    unit: float
    stream: Bytes
    scales: Halves
    pattern: str = ""

    def __post_init__(self) -> None:
        if not self.pattern:
            object.__setattr__(self, "pattern", TWO_FOUR if self.sparse else DENSE)

    @property
    def bits(self) -> float:
        """Bits a weight takes, fill and scales included."""
        return 8 * (self.stream.nbytes + self.scales.nbytes) / (self.rows * self.columns)


def tiles(columns: int) -> int:
    """Tiles of a strip."""
    return -(-columns // COLUMNS)


def strips(rows: int) -> int:
    """Strips of a matrix."""
    return -(-rows // ROWS)


def groups(columns: int, group: int) -> int:
    """Scales of a row."""
    return -(-columns // group) if group else 1


def tile_bytes(pattern: str, value: str) -> int:
    """Bytes of a tile of 16 x 32 weights. Raises NotPacked for an unknown pattern."""
    each = {"int4": 8, "int8": 16, "fp16": 32, "bf16": 32}[value]  # of a weight of all rows
    if pattern == DENSE:
        return COLUMNS * each
    found = patterns.find(pattern)
    return ROWS * found.row_bytes + found.kept * each


def sizes(rows: int, columns: int, pattern: str, value: str, group: int) -> tuple[int, int]:
    """(bytes of the stream, number of scales). Raises NotPacked for what the layout does not have."""
    if value not in VALUES:
        raise NotPacked(f"values are {value!r}, expected one of {', '.join(VALUES)}")
    if not (1 <= rows < 1 << 31 and 1 <= columns < 1 << 31):
        raise NotPacked(f"a matrix of {rows} x {columns}")
    if value not in OFFSETS and (pattern == DENSE or group):
        raise NotPacked(f"{value} is for N:M only and has no groups")
    if group < 0 or group % COLUMNS:
        raise NotPacked(f"groups of {group}, expected a multiple of {COLUMNS}, or 0 for whole rows")
    scales = strips(rows) * groups(columns, group) * ROWS if value in OFFSETS else 0
    return strips(rows) * tiles(columns) * tile_bytes(pattern, value), scales


def pack_codes(
    codes: Codes,
    scales: Halves,
    value: str,
    group: int,
    *,
    sparse: bool,
    unit: float = 1.0,
    pattern: str = "",
) -> Packed:
    """Codes (rows, columns) and their scales (rows, groups), packed. pattern: see `Packed`.

    Raises NotPacked for codes out of range, scales that are not finite, and groups of M with more than N
    codes that are not 0.
    """
    rows, columns = codes.shape
    pattern = pattern or (TWO_FOUR if sparse else DENSE)
    length, _ = sizes(rows, columns, pattern, value, group)
    if value not in OFFSETS:
        raise NotPacked(f"{value} has no codes")
    if scales.shape != (rows, groups(columns, group)):
        raise NotPacked(f"scales of shape {scales.shape}, expected {(rows, groups(columns, group))}")
    if not np.isfinite(scales).all():
        raise NotPacked("a scale is not finite")
    low, high = LIMITS[value]
    if codes.min() < low or codes.max() > high:
        raise NotPacked(f"codes from {codes.min()} to {codes.max()}, {value} has {low} to {high}")
    if pattern != DENSE:
        _check_is(codes, pattern)
    stream = _in_parts(codes, length, lambda part: _tile_codes(part, value, pattern))
    padded = np.zeros((strips(rows) * ROWS, scales.shape[1]), np.float16)
    padded[:rows] = scales
    laid = padded.reshape(-1, ROWS, scales.shape[1]).transpose(0, 2, 1)
    flat = np.ascontiguousarray(laid).reshape(-1)
    return Packed(rows, columns, pattern != DENSE, value, group, unit, stream, flat, pattern)


def pack_numbers(bits: npt.NDArray[np.uint16], value: str, pattern: str = TWO_FOUR) -> Packed:
    """N:M weights (rows, columns) of 16 bits, given as their bits, packed. Raises NotPacked."""
    rows, columns = bits.shape
    length, _ = sizes(rows, columns, pattern, value, 0)
    if value in OFFSETS:
        raise NotPacked(f"{value} needs codes and scales")
    _check_is(bits & 0x7FFF, pattern)  # -0 is a zero as well
    stream = _in_parts(bits, length, lambda part: _tile_numbers(part, pattern))
    return Packed(rows, columns, True, value, 0, 1.0, stream, np.zeros(0, np.float16), pattern)


def _check_is(weight: npt.NDArray[Any], pattern: str) -> None:
    found = patterns.find(pattern)
    check_pattern(weight, found.n, found.m)


def _in_parts(weight: npt.NDArray[Any], length: int, tile: Any) -> Bytes:  # noqa: ANN401
    """Strips of `weight`, filled up with zeros, through `tile`, end to end."""
    rows, columns = weight.shape
    width = tiles(columns) * COLUMNS
    step = max(1, _STRIPS // (width * ROWS)) * ROWS
    stream = np.empty(length, np.uint8)
    at = 0
    for start in range(0, rows, step):
        part = weight[start : start + step]
        padded = np.zeros((strips(len(part)) * ROWS, width), weight.dtype)
        padded[: len(part), :columns] = part
        laid = tile(padded)
        stream[at : at + laid.size] = laid.reshape(-1)
        at += laid.size
    return stream


def _places(weight: npt.NDArray[Any], pattern: str) -> tuple[Bytes, npt.NDArray[Any]]:
    """The index (strips, tiles, bytes) of a matrix, and its kept entries (strips, 16, tiles, planes, 4)."""
    found = patterns.find(pattern)
    places, kept = patterns.choose(weight, found)
    shape = (len(weight) // ROWS, ROWS, -1, found.kept // 4, 4)
    if pattern == TWO_FOUR:
        return _index(places.reshape(shape)), kept.reshape(shape)
    index = patterns.encode(places, found).reshape(shape[0], ROWS, -1, found.row_bytes).transpose(0, 2, 1, 3)
    return index.reshape(*index.shape[:2], -1), kept.reshape(shape)


def _index(places: Bytes) -> Bytes:
    """Of 2:4: (strips, 16, tiles, 4, 4) -> index blocks (strips, tiles, 64)."""
    fields = places << (2 * np.arange(4, dtype=np.uint8))[:, None]
    block: Bytes = np.bitwise_or.reduce(fields, axis=3).transpose(0, 2, 1, 3)
    return block.reshape(*block.shape[:2], 64)


def _tile_codes(codes: Codes, value: str, pattern: str) -> Bytes:
    if pattern == DENSE:
        kept: npt.NDArray[Any] = codes.reshape(len(codes) // ROWS, ROWS, -1, 8, 4)
    else:
        index, kept = _places(codes, pattern)
    stored = (kept.astype(np.int16) + OFFSETS[value]).astype(np.uint8).transpose(0, 2, 3, 1, 4)
    planes = stored.reshape(*stored.shape[:3], 64)
    if value == "int4":
        planes = planes[:, :, 0::2] | (planes[:, :, 1::2] << np.uint8(4))
    flat = planes.reshape(*planes.shape[:2], -1)
    return flat if pattern == DENSE else np.concatenate([index, flat], axis=-1)


def _tile_numbers(bits: npt.NDArray[np.uint16], pattern: str) -> Bytes:
    index, kept = _places(bits, pattern)
    slots = np.ascontiguousarray(kept.transpose(0, 2, 3, 4, 1)).astype("<u2")  # (strips, tiles, p, 4, 16)
    return np.concatenate([index, slots.reshape(*index.shape[:2], -1).view(np.uint8)], axis=-1)


def _blocks(packed: Packed) -> tuple[Bytes, Bytes]:
    """Index and values of every tile: (strips, tiles, bytes)."""
    height, width = strips(packed.rows), tiles(packed.columns)
    block = packed.stream.reshape(height, width, tile_bytes(packed.pattern, packed.value))
    at = 0 if packed.pattern == DENSE else ROWS * patterns.find(packed.pattern).row_bytes
    return block[..., :at], block[..., at:]


def _order(packed: Packed, index: Bytes) -> Bytes | None:
    """Places (rows, groups, n) of the filled matrix, None of a dense one. Raises NotPacked."""
    if packed.pattern == DENSE:
        return None
    found, height, width = patterns.find(packed.pattern), *index.shape[:2]
    rows = index.reshape(height, width, ROWS, found.row_bytes).transpose(0, 2, 1, 3)
    if packed.pattern != TWO_FOUR:
        flat = np.ascontiguousarray(rows).reshape(height * ROWS, width, found.row_bytes)
        return patterns.decode(flat, found)
    fields = (rows[..., None, :] >> (2 * np.arange(4, dtype=np.uint8))[:, None]) & np.uint8(3)
    places: Bytes = fields.reshape(height * ROWS, -1, 2)  # (strips, 16, tiles, 4 planes, 4)
    if (places[..., 0] >= places[..., 1]).any():
        raise NotPacked("two places of a group of four are not in order")
    return places


def _kept(packed: Packed, block: Bytes) -> npt.NDArray[Any]:
    """The stored values of every tile (strips, 16, tiles, planes, 4)."""
    height, width = block.shape[:2]
    if packed.value not in OFFSETS:
        slots = np.ascontiguousarray(block).view("<u2").reshape(height, width, -1, 4, ROWS)
        return slots.transpose(0, 4, 1, 2, 3)
    planes = block.reshape(height, width, -1, 64)
    if packed.value == "int4":
        planes = np.stack([planes & 15, planes >> 4], axis=3).reshape(height, width, -1, 64)
    return planes.reshape(height, width, -1, ROWS, 4).transpose(0, 3, 1, 2, 4)


def _placed(packed: Packed, places: Bytes | None, kept: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Kept entries, less their fill, as a matrix (rows, columns) with zeros where nothing is kept."""
    height = strips(packed.rows) * ROWS
    if places is None:
        whole = kept.reshape(height, -1)
    else:
        found = patterns.find(packed.pattern)
        grouped = np.zeros((height, places.shape[1], found.m), kept.dtype)
        values = kept.reshape(height, -1, found.n)
        np.put_along_axis(grouped, places.astype(np.intp), values, axis=-1)
        whole = grouped.reshape(height, -1)
    return whole[: packed.rows, : packed.columns]


def codes_of(packed: Packed) -> Codes:
    """The codes (rows, columns), 0 where no weight is kept. Raises NotPacked for a broken index."""
    index, block = _blocks(packed)
    codes = (_kept(packed, block).astype(np.int16) - OFFSETS[packed.value]).astype(np.int8)
    return np.ascontiguousarray(_placed(packed, _order(packed, index), codes))


def bits_of(packed: Packed) -> npt.NDArray[np.uint16]:
    """The bits (rows, columns) of weights of 16 bits. Raises NotPacked for a broken index."""
    index, block = _blocks(packed)
    found = _placed(packed, _order(packed, index), _kept(packed, block))
    return np.ascontiguousarray(found).astype(np.uint16)


def scales_of(packed: Packed) -> Halves:
    """The scales (rows, groups), without the unit."""
    n = groups(packed.columns, packed.group)
    laid = packed.scales.reshape(-1, n, ROWS).transpose(0, 2, 1).reshape(-1, n)
    return np.ascontiguousarray(laid[: packed.rows])


def dense(packed: Packed) -> Floats:
    """The weights (rows, columns) in float32: code * (scale * unit), or the numbers themselves."""
    if packed.value == "fp16":
        return bits_of(packed).view(np.float16).astype(np.float32)
    if packed.value == "bf16":
        return (bits_of(packed).astype(np.uint32) << np.uint32(16)).view(np.float32)
    span = packed.group or packed.columns
    scales = scales_of(packed).astype(np.float32) * np.float32(packed.unit)
    wide = np.repeat(scales, span, axis=1)[:, : packed.columns]
    found: Floats = codes_of(packed).astype(np.float32) * wide
    return found


def part(packed: Packed, first: int, last: int) -> Packed:
    """Rows of the strips first .. last - 1 as a matrix of their own, on the same memory."""
    stream = packed.stream.reshape(strips(packed.rows), -1)[first:last].reshape(-1)
    scales = packed.scales.reshape(strips(packed.rows), -1)[first:last].reshape(-1)
    rows = min(packed.rows, last * ROWS) - first * ROWS
    return replace(packed, rows=rows, stream=stream, scales=scales)


def streamed(packed: Packed) -> Packed | None:
    """The same matrix as the kernels stream it, 2:4 if it is that too, else dense; itself if it is so.

    None where there is no such form: numbers of 16 bits that are not 2:4. Raises NotPacked.
    """
    if packed.pattern in (TWO_FOUR, DENSE):
        return packed
    coded = packed.value in OFFSETS
    whole: npt.NDArray[Any] = codes_of(packed) if coded else bits_of(packed)
    sparse = TWO_FOUR in patterns.fits(whole if coded else whole & 0x7FFF)
    if coded:
        scales = scales_of(packed)
        return pack_codes(whole, scales, packed.value, packed.group, sparse=sparse, unit=packed.unit)
    return pack_numbers(whole, packed.value) if sparse else None


def check(packed: Packed) -> None:
    """Raise NotPacked for sizes that do not fit, places out of order and scales that are not finite."""
    if packed.sparse != (packed.pattern != DENSE):
        raise NotPacked(f"the pattern is {packed.pattern!r} and `sparse` is {packed.sparse}")
    length, count = sizes(packed.rows, packed.columns, packed.pattern, packed.value, packed.group)
    if packed.stream.dtype != np.uint8 or packed.stream.shape != (length,):
        raise NotPacked(f"a stream of {packed.stream.size:,} bytes, expected {length:,}")
    if packed.scales.dtype != np.float16 or packed.scales.shape != (count,):
        raise NotPacked(f"{packed.scales.size:,} scales, expected {count:,}")
    if not np.isfinite(packed.scales).all() or not np.isfinite(packed.unit):
        raise NotPacked("a scale is not finite")
    _order(packed, _blocks(packed)[0])
