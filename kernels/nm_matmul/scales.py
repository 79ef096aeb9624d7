"""Whole codes for weights: one symmetric scale for each row and group of columns, found by search.

A weight is code * scale. There is no zero point, so that what was pruned stays exactly 0; a scale may be
negative, for int4 has one code more on the negative side.
"""

import numpy as np
import numpy.typing as npt

from edgesft.kernels.nm_matmul.layout import LIMITS, Codes, Floats, Halves, groups

_SHRINK = (1.0, 0.94, 0.88, 0.82, 0.76)  # of the range that a group's codes are spread over
_ENTRIES = 1 << 17  # searched at a time, so that temporaries stay in the cache
_LARGEST = 2.0**15  # scale: half of what fp16 ends at, for a fitted one may be larger than the range asks
_VALUES = {4: "int4", 8: "int8"}


def search_scales(weight: Floats, bits: int, group: int, importance: Floats | None = None) -> Halves:
    """Scales (rows, groups) of weight (rows, columns): those of the least squared error among some.

    A group's largest entries are often not worth the resolution that they cost the others: the range is
    shrunk a little, with either sign, the scale fitted to the codes by least squares and rounded to fp16.
    importance (columns,): of a column's error, 1 where it is None. group: columns, 0 for whole rows.
    Raises ValueError for weights that are not finite, and for scales beyond fp16.
    """
    rows, columns = weight.shape
    if not np.isfinite(weight).all():
        raise ValueError("a weight is not finite")
    if np.abs(weight).max(initial=0) > LIMITS[_VALUES[bits]][1] * _LARGEST:
        raise ValueError("a scale is beyond the range of fp16")
    span, count = group or columns, groups(columns, group)
    width = span * count
    found = np.empty((rows, count), np.float16)
    share = np.zeros(width, np.float32)
    share[:columns] = 1 if importance is None else importance
    step = max(1, _ENTRIES // width)
    for start in range(0, rows, step):
        part = weight[start : start + step]
        padded = np.zeros((len(part), width), np.float32)
        padded[:, :columns] = part
        best = _search(padded.reshape(len(part), count, span), _VALUES[bits], share.reshape(count, span))
        found[start : start + step] = best
    return found


def _search(w: Floats, value: str, share: Floats) -> Halves:  # w: (rows, groups, span)
    low, high = LIMITS[value]
    at = np.abs(w).argmax(-1)[..., None]
    extreme = np.take_along_axis(w, at, -1)  # with its sign
    best = np.zeros(extreme.shape, np.float16)
    least = np.full(extreme.shape, np.inf, np.float32)
    shrinks = _SHRINK if value == "int4" else _SHRINK[:1]
    ends = (low, high) if value == "int4" else (high,)
    for shrink in shrinks:
        for end in ends:
            scale = extreme * np.float32(shrink / end)
            for fit in (True, False) if shrink == 1.0 else (True,):
                tried = (_fitted(w, scale, low, high, share) if fit else scale).astype(np.float16)
                wide = tried.astype(np.float32)
                q = _steps(w, wide, low, high)
                error = (np.square(q * wide - w) * share).sum(-1, keepdims=True)
                better = error < least
                np.copyto(least, error, where=better)
                np.copyto(best, tried, where=better)
    return best[..., 0]


def _fitted(w: Floats, scale: Floats, low: int, high: int, share: Floats) -> Floats:
    """<w, q> / <q, q>, the scale of least squared error for the codes that `scale` gives."""
    q = _steps(w, scale, low, high)
    square = (q * q * share).sum(-1, keepdims=True)
    product = (w * q * share).sum(-1, keepdims=True)
    fitted: Floats = np.divide(product, square, out=scale.copy(), where=square > 0)
    return fitted


def _steps(w: Floats, scale: Floats, low: int, high: int) -> Floats:
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=np.abs(scale) > 1e-30)
    q: Floats = np.rint(w * inverse)
    return np.clip(q, low, high, out=q)


def codes(weight: Floats, scales: Halves, bits: int, group: int) -> Codes:
    """The nearest codes (rows, columns) of weight (rows, columns) at scales (rows, groups)."""
    low, high = LIMITS[_VALUES[bits]]
    found = np.empty(weight.shape, np.int8)
    step = max(1, _ENTRIES // weight.shape[1])
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        found[part] = _steps(weight[part], _wide(scales[part], group, weight.shape[1]), low, high)
    return found


def values(found: Codes, scales: Halves, group: int) -> Floats:
    """code * scale, (rows, columns)."""
    return found.astype(np.float32) * _wide(scales, group, found.shape[1])


def _wide(scales: Halves, group: int, columns: int) -> npt.NDArray[np.float32]:
    return np.repeat(scales.astype(np.float32), group or columns, axis=1)[:, :columns]
