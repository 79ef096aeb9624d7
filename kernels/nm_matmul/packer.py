"""A float matrix -> a packed one: which pattern, which codes, and how much that moves the weights."""

import math
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from edgesft.kernels.nm_matmul import layout, patterns
from edgesft.kernels.nm_matmul.layout import DENSE, OFFSETS, VALUES, Floats, NotPacked, Packed
from edgesft.kernels.nm_matmul.scales import codes, search_scales

_BITS: Final = {"int4": 4, "int8": 8}


def best(weight: Floats, value: str) -> str | None:
    """The pattern that stores a matrix (rows, columns) in the fewest bytes, 2:4 where others are no smaller.

    `dense` if it is in none that is smaller than dense tiles; None if it can be in none at all, as numbers of
    16 bits that no pattern fits.
    """
    dense = [DENSE] if value in OFFSETS else []
    found = dense + sorted(patterns.fits(weight), key=lambda name: name != layout.TWO_FOUR)
    return min(found, key=lambda name: layout.tile_bytes(name, value), default=None)


def pack(weight: Floats, value: str, group: int, pattern: str) -> Packed:
    """A matrix (rows, columns) in `pattern`, rounded to `value`. group: of int4 and int8.

    Raises NotPacked for weights that are not in the pattern, not finite, or beyond what the value holds.
    """
    if value not in VALUES:
        raise NotPacked(f"values are {value!r}, expected one of {', '.join(VALUES)}")
    if not np.isfinite(weight).all():
        raise NotPacked("a weight is not finite")
    if pattern != DENSE:
        shape = patterns.find(pattern)
        patterns.check_pattern(weight, shape.n, shape.m)
    if value not in OFFSETS:
        return layout.pack_numbers(_half(weight) if value == "fp16" else _brain(weight), value, pattern)
    unit = _unit(weight)
    scaled = np.divide(weight, np.float32(unit), dtype=np.float32)
    scales = search_scales(scaled, _BITS[value], group)
    found = codes(scaled, scales, _BITS[value], group)
    return layout.pack_codes(found, scales, value, group, sparse=pattern != DENSE, unit=unit, pattern=pattern)


def regroup(packed: Packed, group: int) -> Packed | None:
    """The same weights with a scale for each `group` columns; None where that takes other codes."""
    if packed.group == group:
        return packed
    if packed.value not in OFFSETS or not group or packed.group % group:
        return None
    span = packed.group or packed.columns
    at = np.arange(layout.groups(packed.columns, group)) * group // span
    laid = packed.scales.reshape(layout.strips(packed.rows), -1, layout.ROWS)[:, at]
    return replace(packed, group=group, scales=np.ascontiguousarray(laid).reshape(-1))


def error(weight: Floats, packed: Packed) -> tuple[float, float]:
    """Sums of squares (of what packing changed, of the weights), some rows at a time."""
    changed = total = 0.0
    step = max(1, (1 << 20) // (packed.columns * layout.ROWS))
    for strip in range(0, layout.strips(packed.rows), step):
        last = min(strip + step, layout.strips(packed.rows))
        rows = weight[strip * layout.ROWS : last * layout.ROWS].astype(np.float64)
        changed += float(np.square(layout.dense(layout.part(packed, strip, last)) - rows).sum())
        total += float(np.square(rows).sum())
    return changed, total


def _unit(weight: Floats) -> float:
    """A power of two that brings scales to the middle of what fp16 holds."""
    most = float(np.abs(weight).max(initial=0.0))
    return 2.0 ** math.frexp(most)[1] if most > 0 else 1.0


def _half(weight: Floats) -> npt.NDArray[np.uint16]:
    with np.errstate(over="ignore"):
        found = weight.astype(np.float16)
    if not np.isfinite(found).all():
        raise NotPacked(f"a weight of {np.abs(weight).max():.3g} is beyond fp16, try bf16")
    return found.view(np.uint16)


def _brain(weight: Floats) -> npt.NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even."""
    bits: npt.NDArray[Any] = np.ascontiguousarray(weight, np.float32).view(np.uint32).astype(np.uint64)
    found: npt.NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    if ((found & 0x7F80) == 0x7F80).any():
        raise NotPacked(f"a weight of {np.abs(weight).max():.3g} is beyond bf16")
    return found
