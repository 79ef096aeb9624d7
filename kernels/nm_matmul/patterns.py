"""N:M patterns that the layout has, and where in a tile the kept weights of a row lie.

A row of a tile keeps N of every M columns, M a divisor of the 32 columns and N a quarter, a half or three
quarters of it, so that planes of four come in pairs. 2:4, which the kernels stream, has an index of its own
(`layout`); here is that of all others: a string of bits for each row, of places or of a mask, whichever is
shorter.
"""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

ROWS, COLUMNS = 16, 32  # of a tile

Bytes = npt.NDArray[np.uint8]


class NotPacked(ValueError):
    """Data that the layout cannot hold, or that is not in it; the text says what and where."""


@dataclass(frozen=True)
class Pattern:
    """At most n of every m neighbouring columns are not 0."""

    n: int
    m: int

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def kept(self) -> int:
        """Weights that a row of a tile keeps."""
        return COLUMNS * self.n // self.m

    @property
    def bits(self) -> int:
        """Of a place in a group."""
        return self.m.bit_length() - 1

    @property
    def masked(self) -> bool:
        """Whether the index is a mask of m bits a group; else n places of `bits` each."""
        return self.n * self.bits > self.m

    @property
    def row_bytes(self) -> int:
        """Of the index of a row of a tile."""
        return COLUMNS // self.m * (self.m if self.masked else self.n * self.bits) // 8


DENSE: Final = "dense"
TWO_FOUR: Final = "2:4"
PATTERNS: Final = {
    each.name: each for each in (Pattern(m * part // 4, m) for m in (4, 8, 16) for part in (1, 2, 3))
}
NAMES: Final = (DENSE, *PATTERNS)


def find(name: str) -> Pattern:
    """The pattern of that name. Raises NotPacked for one that the layout does not have."""
    try:
        return PATTERNS[name]
    except KeyError:
        known = ", ".join(PATTERNS)
        raise NotPacked(f"the pattern is {name!r}, expected one of {known}, or {DENSE}") from None


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


def fits(weight: npt.NDArray[Any]) -> list[str]:
    """Names of all patterns that the matrix (rows, columns) is in."""
    rows, columns = weight.shape
    most = {4: 0, 8: 0, 16: 0}
    step = max(1, (1 << 22) // max(1, columns))
    for start in range(0, rows, step):
        part = weight[start : start + step] != 0
        count = np.zeros((len(part), -(-columns // 16) * 16), np.uint8)
        count[:, :columns] = part
        count = count.reshape(len(part), -1, 4).sum(-1, dtype=np.uint8)
        for m in most:
            most[m] = max(most[m], int(count.max(initial=0)))
            if m < 16:
                count = count[:, 0::2] + count[:, 1::2]
    return [each.name for each in PATTERNS.values() if most[each.m] <= each.n]


def choose(weight: npt.NDArray[Any], pattern: Pattern) -> tuple[Bytes, npt.NDArray[Any]]:
    """Of every m columns the places of n that hold all that is not 0, in order, and the entries there.

    weight (rows, columns): codes, or bits of 16-bit numbers; columns a multiple of 32 -> both (rows, groups,
    n)
    """
    grouped = weight.reshape(len(weight), -1, pattern.m)
    absent = (grouped == 0).astype(np.uint8)
    if weight.dtype == np.uint16:
        absent += (grouped & 0x7FFF) == 0  # a -0 goes before a 0, and after everything else
    order = np.argsort(absent, axis=-1, kind="stable")[..., : pattern.n]
    places = np.sort(order, axis=-1)
    return places.astype(np.uint8), np.take_along_axis(grouped, places, axis=-1)


def encode(places: Bytes, pattern: Pattern) -> Bytes:
    """Places (rows, groups, n) -> the index (rows, tiles, row_bytes)."""
    rows = len(places)
    if pattern.masked:
        bits = np.zeros((*places.shape[:2], pattern.m), np.uint8)
        np.put_along_axis(bits, places.astype(np.intp), np.uint8(1), axis=-1)
    else:
        bits = places[..., None] >> np.arange(pattern.bits, dtype=np.uint8) & np.uint8(1)
    each: Bytes = np.packbits(bits.reshape(rows, -1, pattern.row_bytes * 8), axis=-1, bitorder="little")
    return each


def decode(index: Bytes, pattern: Pattern) -> Bytes:
    """The index (rows, tiles, row_bytes) -> places (rows, groups, n).

    Raises NotPacked where a group does not name n places in order.
    """
    rows = len(index)
    bits = np.unpackbits(index, axis=-1, bitorder="little")
    if pattern.masked:
        mask = bits.reshape(rows, -1, pattern.m)
        if (mask.sum(-1, dtype=np.uint8) != pattern.n).any():
            raise NotPacked(f"a group of {pattern.m} does not name {pattern.n} places")
        return (np.flatnonzero(mask) % pattern.m).astype(np.uint8).reshape(rows, -1, pattern.n)
    fields = bits.reshape(rows, -1, pattern.n, pattern.bits) << np.arange(pattern.bits, dtype=np.uint8)
    places: Bytes = np.bitwise_or.reduce(fields, axis=-1)
    if (places[..., :-1] >= places[..., 1:]).any():
        raise NotPacked(f"places of a group of {pattern.m} are not in order")
    return places
