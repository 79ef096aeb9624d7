"""Which entries of one weight may change: all, a band of magnitudes, a random share, or a list of positions.

A band is two floats and a share a seed, so they are found again wherever they are needed; a list is stored.
Importing this module does not import torch: regions are also chosen for weights that are numpy arrays.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from edgesft.core import catalog
from edgesft.core.errors import UsageError
from edgesft.core.protocols import Mask

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

Weight: TypeAlias = "Tensor | npt.NDArray[Any]"  # (out, in), floating point

CHUNK = 1 << 20  # entries looked at together: 8 MB of temporary integers


@dataclass(frozen=True)
class Band:
    """The entries with low <= |w| <= high, of the tensor as it is when asked."""

    low: float = 0.0
    high: float = math.inf

    def rule(self) -> Mask:
        """The same as the kernels take it, which find it again in each pass."""
        return Mask(self.low, self.high)

    def numel(self, w: "Tensor") -> int:
        return int(self.mask(w).sum())

    def mask(self, w: "Tensor") -> "Tensor":
        magnitude = w.detach().abs()
        return (magnitude >= self.low) & (magnitude <= self.high)

    def take(self, w: "Tensor") -> "Tensor":
        return w[self.mask(w)]

    def add(self, w: "Tensor", values: "Tensor") -> "Tensor":
        """w (any shape) with values (numel,) added to the entries of the region, in row-major order."""
        mask = self.mask(w)
        return w.masked_scatter(mask, w[mask] + values)


@dataclass(frozen=True)
class Whole(Band):
    """Every entry."""

    def numel(self, w: "Tensor") -> int:
        return w.numel()

    def mask(self, w: "Tensor") -> "Tensor":
        import torch

        return torch.ones_like(w, dtype=torch.bool)

    def take(self, w: "Tensor") -> "Tensor":
        return w.flatten()

    def add(self, w: "Tensor", values: "Tensor") -> "Tensor":
        return w + values.view_as(w)


@dataclass(frozen=True, kw_only=True)
class Scattered(Band):
    """A random share keep / 256 of the entries in the band, by counter-based bytes of `seed`.

    tensor: name of the parameter, which with the seed decides the bytes; needed by all but `rule`.
    """

    keep: int
    seed: int
    tensor: str = ""

    def rule(self) -> Mask:
        return Mask(self.low, self.high, self.keep, self.seed)

    def mask(self, w: "Tensor") -> "Tensor":
        """w: the whole tensor, not a part. Raises UsageError where the bytes cannot be drawn."""
        import torch

        kernel = catalog.runtime("kernels.perturb")
        if not self.tensor:
            raise UsageError("a random share of the weights can be tuned in place only", "delta.use=sparse")
        inside = catalog.runtime("kernels.perturb.host").inside
        found = inside(w.detach().float().cpu().numpy(), self.rule(), kernel.tensor_id(self.tensor))
        return torch.from_numpy(found).to(w.device)


def below(high: float) -> Band:
    """The small entries: |w| <= high."""
    return Band(high=high)


def above(low: float) -> Band:
    """The large entries: |w| >= low."""
    return Band(low=low)


@dataclass(frozen=True, eq=False)
class Flat:
    """A fixed list of positions. index: (numel,) int64, ascending positions in the flattened tensor."""

    index: "Tensor"

    def numel(self, w: "Tensor") -> int:
        return self.index.numel()

    def mask(self, w: "Tensor") -> "Tensor":
        import torch

        flat = torch.zeros(w.numel(), dtype=torch.bool, device=w.device)
        flat[self.index] = True
        return flat.view(w.shape)

    def take(self, w: "Tensor") -> "Tensor":
        return w.flatten()[self.index]

    def add(self, w: "Tensor", values: "Tensor") -> "Tensor":
        flat = w.flatten()
        return flat.index_put((self.index,), flat[self.index] + values).view(w.shape)


def kth_smallest_magnitude(w: "Weight", k: int) -> float:
    """The k-th smallest |w|, 1 <= k <= size, exactly, with no copy of the tensor.

    The bits of a non-negative float32 sort as integers do, so two counting passes over 16 bits each find
    the value. float64 (tests only) is sorted. NaN must have been refused before.
    """
    flat = w.reshape(-1) if isinstance(w, np.ndarray) else w.detach().reshape(-1)
    if _part(flat, 0, 0).dtype == np.float64:
        magnitude = np.abs(_part(flat, 0, len(flat)))
        return float(np.partition(magnitude, k - 1)[k - 1])
    high, before = _locate(_counts(bits >> 16 for bits in _bits(flat)), k)
    low, _ = _locate(_counts(bits[bits >> 16 == high] & 0xFFFF for bits in _bits(flat)), k - before)
    return float(np.array([high << 16 | low], dtype=np.uint32).view(np.float32)[0])


def _part(flat: "Weight", start: int, end: int) -> "npt.NDArray[Any]":
    """A part of a flat weight as numpy, float64 as it is and every other type as float32."""
    part = flat[start:end]
    if not isinstance(part, np.ndarray):
        part = part.cpu()
        part = (part if part.element_size() == 8 else part.float()).numpy()
    return part if part.dtype == np.float64 else part.astype(np.float32, copy=False)


def _bits(flat: "Weight") -> "Iterator[npt.NDArray[np.int64]]":
    """Bit patterns of |w| as integers, chunk by chunk."""
    for start in range(0, len(flat), CHUNK):
        chunk = _part(flat, start, start + CHUNK)
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
