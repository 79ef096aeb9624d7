"""Which entries of one weight may change: all, a band of magnitudes, or a fixed list of positions.

A band is two floats, so it can be found again from the weights wherever it is needed; a list is stored.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy.typing as npt

CHUNK = 1 << 20  # entries looked at together: 8 MB of temporary integers


@dataclass(frozen=True)
class Band:
    """The entries with low <= |w| <= high, of the tensor as it is when asked."""

    low: float = 0.0
    high: float = math.inf

    def numel(self, w: Tensor) -> int:
        return int(self.mask(w).sum())

    def mask(self, w: Tensor) -> Tensor:
        magnitude = w.detach().abs()
        return (magnitude >= self.low) & (magnitude <= self.high)

    def take(self, w: Tensor) -> Tensor:
        return w[self.mask(w)]

    def add(self, w: Tensor, values: Tensor) -> Tensor:
        """w (any shape) with values (numel,) added to the entries of the region, in row-major order."""
        mask = self.mask(w)
        return w.masked_scatter(mask, w[mask] + values)


@dataclass(frozen=True)
class Whole(Band):
    """Every entry."""

    def numel(self, w: Tensor) -> int:
        return w.numel()

    def mask(self, w: Tensor) -> Tensor:
        return torch.ones_like(w, dtype=torch.bool)

    def take(self, w: Tensor) -> Tensor:
        return w.flatten()

    def add(self, w: Tensor, values: Tensor) -> Tensor:
        return w + values.view_as(w)


def below(high: float) -> Band:
    """The small entries: |w| <= high."""
    return Band(high=high)


def above(low: float) -> Band:
    """The large entries: |w| >= low."""
    return Band(low=low)


@dataclass(frozen=True, eq=False)
class Flat:
    """A fixed list of positions. index: (numel,) int64, ascending positions in the flattened tensor."""

    index: Tensor

    def numel(self, w: Tensor) -> int:
        return self.index.numel()

    def mask(self, w: Tensor) -> Tensor:
        flat = torch.zeros(w.numel(), dtype=torch.bool, device=w.device)
        flat[self.index] = True
        return flat.view(w.shape)

    def take(self, w: Tensor) -> Tensor:
        return w.flatten()[self.index]

    def add(self, w: Tensor, values: Tensor) -> Tensor:
        flat = w.flatten()
        return flat.index_put((self.index,), flat[self.index] + values).view(w.shape)


def kth_smallest_magnitude(w: Tensor, k: int) -> float:
    """The k-th smallest |w|, 1 <= k <= numel, exactly, with no copy of the tensor.

    The bits of a non-negative float32 sort as integers do, so two counting passes over 16 bits each find
    the value. float64 (tests only) is sorted. NaN must have been refused before.
    """
    if w.dtype is torch.float64:
        return float(w.detach().abs().flatten().kthvalue(k).values)
    flat = w.detach().reshape(-1)
    high, before = _locate(_counts(bits >> 16 for bits in _bits(flat)), k)
    low, _ = _locate(_counts(bits[bits >> 16 == high] & 0xFFFF for bits in _bits(flat)), k - before)
    return float(np.array([high << 16 | low], dtype=np.uint32).view(np.float32)[0])


def _bits(flat: Tensor) -> "Iterator[npt.NDArray[np.int64]]":
    """Bit patterns of |w| as integers, chunk by chunk."""
    for start in range(0, flat.numel(), CHUNK):
        chunk = flat[start : start + CHUNK].float().cpu().numpy()
        yield chunk.view(np.int32).astype(np.int64) & 0x7FFFFFFF


def _counts(parts: "Iterator[npt.NDArray[np.int64]]") -> "npt.NDArray[np.int64]":
    total = np.zeros(1 << 16, dtype=np.int64)
    for part in parts:
        total += np.bincount(part, minlength=1 << 16)
    return total


def _locate(counts: "npt.NDArray[np.int64]", k: int) -> tuple[int, int]:
    """The bin that holds the k-th item, and how many lie in the bins before it."""
    running = np.cumsum(counts)
    found = int(np.searchsorted(running, k))
    return found, int(running[found] - counts[found])
