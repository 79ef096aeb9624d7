"""Matrices in the tiled layout `nm-packed`: packing, unpacking and checking, in numpy.

docs/format.md describes every byte; nm.h says the same to the compiler. Codes are whole numbers, int4 from -8
to 7 and int8 from -127 to 127; a weight is code * scale * unit.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

VERSION: Final = 1  # of the format
ROWS, COLUMNS = 16, 32  # of a tile
VALUES: Final = ("int4", "int8", "fp16", "bf16")
OFFSETS: Final = {"int4": 8, "int8": 128}  # code 0 as it is stored
LIMITS: Final = {"int4": (-8, 7), "int8": (-127, 127)}
_STRIPS = 1 << 22  # weights packed at a time, so that temporaries stay small

Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.int8]
Halves = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float32]


class NotPacked(ValueError):
    """Data that the layout cannot hold, or that is not in it; the text says what and where."""


@dataclass(frozen=True)
class Packed:
    """A matrix (rows, columns). sparse: 2:4, else dense. value: one of VALUES. group: columns that share a
    scale, a multiple of 32, or 0 for the whole row; stream (bytes,); scales (strips * groups * 16,)."""

    rows: int
    columns: int
    sparse: bool
    value: str
    group: int
    unit: float
    stream: Bytes
    scales: Halves

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


def tile_bytes(sparse: bool, value: str) -> int:
    """Bytes of a tile of 16 x 32 weights."""
    index = 64 if sparse else 0
    planes = 4 if sparse else 8
    return index + planes * {"int4": 32, "int8": 64, "fp16": 128, "bf16": 128}[value]


def sizes(rows: int, columns: int, sparse: bool, value: str, group: int) -> tuple[int, int]:
    """(bytes of the stream, number of scales). Raises NotPacked for what the layout does not have."""
    if value not in VALUES:
        raise NotPacked(f"values are {value!r}, expected one of {', '.join(VALUES)}")
    if rows < 1 or columns < 1:
        raise NotPacked(f"a matrix of {rows} x {columns}")
    if value not in OFFSETS and (not sparse or group):
        raise NotPacked(f"{value} is for 2:4 only and has no groups")
    if group < 0 or group % COLUMNS:
        raise NotPacked(f"groups of {group}, expected a multiple of {COLUMNS}, or 0 for whole rows")
    scales = strips(rows) * groups(columns, group) * ROWS if value in OFFSETS else 0
    return strips(rows) * tiles(columns) * tile_bytes(sparse, value), scales


def pack_codes(
    codes: Codes, scales: Halves, value: str, group: int, *, sparse: bool, unit: float = 1.0
) -> Packed:
    """Codes (rows, columns) and their scales (rows, groups), packed.

    Raises NotPacked for codes out of range, scales that are not finite, and groups of four with more than
    two codes that are not 0.
    """
    rows, columns = codes.shape
    length, _ = sizes(rows, columns, sparse, value, group)
    if value not in OFFSETS:
        raise NotPacked(f"{value} has no codes")
    if scales.shape != (rows, groups(columns, group)):
        raise NotPacked(f"scales of shape {scales.shape}, expected {(rows, groups(columns, group))}")
    if not np.isfinite(scales).all():
        raise NotPacked("a scale is not finite")
    low, high = LIMITS[value]
    if codes.min() < low or codes.max() > high:
        raise NotPacked(f"codes from {codes.min()} to {codes.max()}, {value} has {low} to {high}")
    if sparse:
        check_pattern(codes)
    stream = _in_parts(codes, length, lambda part: _tile_codes(part, value, sparse))
    padded = np.zeros((strips(rows) * ROWS, scales.shape[1]), np.float16)
    padded[:rows] = scales
    laid = padded.reshape(-1, ROWS, scales.shape[1]).transpose(0, 2, 1)
    return Packed(rows, columns, sparse, value, group, unit, stream, np.ascontiguousarray(laid).reshape(-1))


def pack_numbers(bits: npt.NDArray[np.uint16], value: str) -> Packed:
    """2:4 weights (rows, columns) of 16 bits, given as their bits, packed. Raises NotPacked."""
    rows, columns = bits.shape
    length, _ = sizes(rows, columns, True, value, 0)
    if value in OFFSETS:
        raise NotPacked(f"{value} needs codes and scales")
    check_pattern(bits & 0x7FFF)  # -0 is a zero as well
    stream = _in_parts(bits, length, _tile_numbers)
    return Packed(rows, columns, True, value, 0, 1.0, stream, np.zeros(0, np.float16))


def check_pattern(weight: npt.NDArray[Any], n: int = 2, m: int = 4) -> None:
    """Raise NotPacked where a group of m columns has more than n entries that are not 0: how many, where."""
    rows, columns = weight.shape
    whole = columns // m * m
    count = (weight[:, :whole].reshape(rows, -1, m) != 0).sum(-1)
    bad = count > n
    total = int(bad.sum())
    first = np.unravel_index(int(bad.argmax()), bad.shape) if total else None
    if columns > whole:
        rest = (weight[:, whole:] != 0).sum(-1) > n
        if rest.any() and first is None:
            first = (np.intp(rest.argmax()), np.intp(whole // m))
        total += int(rest.sum())
    if first is not None:
        row, column = int(first[0]), int(first[1]) * m
        raise NotPacked(
            f"not {n}:{m}: {total:,} groups have more than {n} weights, the first in row {row}, "
            f"columns {column} to {min(column + m, columns) - 1}"
        )


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


def _choose(weight: npt.NDArray[Any]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    """Of every four columns the places of two that hold all that is not 0, in order, and the entries there.

    weight (rows, columns) -> both (strips, 16, tiles, 4 planes, 4)
    """
    four = weight.reshape(len(weight), -1, 4)
    order = np.argsort(four == 0, axis=-1, kind="stable")[..., :2]
    places = np.sort(order, axis=-1).astype(np.uint8)
    kept = np.take_along_axis(four, places.astype(np.intp), axis=-1)
    shape = (len(weight) // ROWS, ROWS, -1, 4, 4)
    return places.reshape(shape), kept.reshape(shape)


def _index(places: npt.NDArray[np.uint8]) -> Bytes:
    """(strips, 16, tiles, 4, 4) -> index blocks (strips, tiles, 64)."""
    fields = places << (2 * np.arange(4, dtype=np.uint8))[:, None]
    block: Bytes = np.bitwise_or.reduce(fields, axis=3).transpose(0, 2, 1, 3)
    return block.reshape(*block.shape[:2], 64)


def _tile_codes(codes: Codes, value: str, sparse: bool) -> Bytes:
    if sparse:
        places, kept = _choose(codes)
        index = _index(places)
    else:
        kept = codes.reshape(len(codes) // ROWS, ROWS, -1, 8, 4)
    stored = (kept.astype(np.int16) + OFFSETS[value]).astype(np.uint8).transpose(0, 2, 3, 1, 4)
    planes = stored.reshape(*stored.shape[:3], 64)
    if value == "int4":
        planes = planes[:, :, 0::2] | (planes[:, :, 1::2] << np.uint8(4))
    flat = planes.reshape(*planes.shape[:2], -1)
    return np.concatenate([index, flat], axis=-1) if sparse else flat


def _tile_numbers(bits: npt.NDArray[np.uint16]) -> Bytes:
    places, kept = _choose(bits)
    index = _index(places)
    slots = np.ascontiguousarray(kept.transpose(0, 2, 3, 4, 1)).astype("<u2")  # (strips, tiles, 4, 4, 16)
    return np.concatenate([index, slots.reshape(*index.shape[:2], -1).view(np.uint8)], axis=-1)


def _untile(packed: Packed) -> tuple[npt.NDArray[np.uint8] | None, npt.NDArray[Any]]:
    """(places or None, stored values), both (strips, 16, tiles, planes, 4)."""
    height, width = strips(packed.rows), tiles(packed.columns)
    block = packed.stream.reshape(height, width, tile_bytes(packed.sparse, packed.value))
    places: Bytes | None = None
    if packed.sparse:
        index = block[..., :64].reshape(height, width, ROWS, 1, 4)
        fields: Bytes = (index >> (2 * np.arange(4, dtype=np.uint8))[:, None]) & np.uint8(3)
        places = fields.transpose(0, 2, 1, 3, 4)
        block = block[..., 64:]
    if packed.value not in OFFSETS:
        slots = np.ascontiguousarray(block).view("<u2").reshape(height, width, 4, 4, ROWS)
        return places, slots.transpose(0, 4, 1, 2, 3)
    planes = block.reshape(height, width, -1, 64)
    if packed.value == "int4":
        planes = np.stack([planes & 15, planes >> 4], axis=3).reshape(height, width, -1, 64)
    return places, planes.reshape(height, width, -1, ROWS, 4).transpose(0, 3, 1, 2, 4)


def _placed(packed: Packed, places: npt.NDArray[np.uint8] | None, kept: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What `_untile` found, less its fill, as a matrix (rows, columns) with zeros where nothing is kept."""
    height = strips(packed.rows) * ROWS
    if places is None:
        whole = kept.reshape(height, -1)
    else:
        four = np.zeros((height, kept.size // height // 2, 4), kept.dtype)
        pairs = places.reshape(height, -1, 2).astype(np.intp)
        np.put_along_axis(four, pairs, kept.reshape(height, -1, 2), axis=-1)
        whole = four.reshape(height, -1)
    return whole[: packed.rows, : packed.columns]


def codes_of(packed: Packed) -> Codes:
    """The codes (rows, columns), 0 where no weight is kept."""
    places, stored = _untile(packed)
    codes = (stored.astype(np.int16) - OFFSETS[packed.value]).astype(np.int8)
    return np.ascontiguousarray(_placed(packed, places, codes))


def bits_of(packed: Packed) -> npt.NDArray[np.uint16]:
    """The bits (rows, columns) of weights of 16 bits."""
    return np.ascontiguousarray(_placed(packed, *_untile(packed))).astype(np.uint16)


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


def check(packed: Packed) -> None:
    """Raise NotPacked for sizes that do not fit, places out of order and scales that are not finite."""
    length, count = sizes(packed.rows, packed.columns, packed.sparse, packed.value, packed.group)
    if packed.stream.dtype != np.uint8 or packed.stream.shape != (length,):
        raise NotPacked(f"a stream of {packed.stream.size:,} bytes, expected {length:,}")
    if packed.scales.dtype != np.float16 or packed.scales.shape != (count,):
        raise NotPacked(f"{packed.scales.size:,} scales, expected {count:,}")
    if not np.isfinite(packed.scales).all() or not np.isfinite(packed.unit):
        raise NotPacked("a scale is not finite")
    places, _ = _untile(packed)
    if places is not None and (places[..., 0::2] >= places[..., 1::2]).any():
        raise NotPacked("two places of a group of four are not in order")
