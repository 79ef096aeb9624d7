"""Every weight of an export against the model's own: equal, or rounded to the nearest code of its block."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

HALF_STEP = 0.5 * (1 + 1e-3)  # half a step, and the rounding of float32
MOST_CUT = 0.25  # of a block's range
_ENTRIES = 1 << 20  # checked at a time, so that temporaries stay small


class Held(Protocol):
    """A weight as the export holds it (`exporters.probe`).

    scales, zeros: (out, blocks of `group` inputs), None where the weight is not quantised.
    """

    name: str
    array: FloatArray
    scales: FloatArray | None
    zeros: FloatArray | None
    bits: int
    group: int


@dataclass
class WeightCheck:
    """What was found so far.

    worst: largest error of a weight inside the range of its block's codes, in steps of the code; rounding to
    the nearest leaves at most 1/2. first: the first tensor that departs; reason: how.
    """

    tensors: int = 0
    quantized: int = 0
    worst: float = 0.0
    zeros_kept: bool = True
    first: str | None = None
    reason: str | None = None

    def report(self) -> dict[str, Any] | None:
        """None if the export holds no map of its weights."""
        if not self.tensors and self.first is None:
            return None
        return {
            "tensors": self.tensors,
            "quantized": self.quantized,
            "max_error_in_steps": float(self.worst) if np.isfinite(self.worst) else None,
            "zeros_kept": self.zeros_kept,
            "first_departing": self.first,
            "reason": self.reason,
        }

    def blame(self, name: str, reason: str) -> None:
        """Remember the first."""
        if self.first is None:
            self.first, self.reason = name, reason

    def add(self, weight: FloatArray, held: Held) -> None:
        """weight: the model's own, as the export should hold it."""
        self.tensors += 1
        if weight.shape != held.array.shape:
            self.blame(held.name, f"its shape is {list(held.array.shape)}, expected {list(weight.shape)}")
        elif held.scales is not None and held.zeros is not None:
            self.quantized += 1
            rows = max(1, _ENTRIES // weight.shape[1])
            for start in range(0, len(weight), rows):
                part = slice(start, start + rows)
                self._rows(weight[part], held, part, held.scales[part], held.zeros[part])
        elif not np.array_equal(weight, held.array):
            index = [int(i) for i in np.unravel_index(np.argmax(weight != held.array), weight.shape)]
            self.blame(held.name, f"it is another number at {index}")

    def _rows(
        self, weight: FloatArray, held: Held, part: slice, scales: FloatArray, zeros: FloatArray
    ) -> None:
        def each(blocks: FloatArray) -> FloatArray:
            return np.repeat(blocks, held.group, axis=1)[:, : weight.shape[1]]

        got, last = held.array[part], (1 << held.bits) - 1
        if bool((got[weight == 0] != 0).any()):
            self.zeros_kept = False
            self.blame(held.name, "a weight that was 0 is not any more")
        scale = each(scales)
        step = np.maximum(np.abs(scale), 1e-30)
        error = np.abs(got - weight)
        error[error < 1e-30] = 0
        error /= step
        # A weight beyond the last code is cut off, by as much as the search for a scale judged cheaper than
        # a coarser step for the whole block.
        code = np.rint(got / np.where(scale < 0, -step, step)) + each(zeros)
        outwards = (weight - got) * np.sign(scale)
        cut = ((code >= last) & (outwards > 0)) | ((code <= 0) & (outwards < 0))
        inside = np.where(cut, 0, error)
        self.worst = float(np.maximum(self.worst, inside.max(initial=0)))  # keeps NaN
        if not inside.max(initial=0) <= HALF_STEP:
            row, column = (int(i) for i in np.unravel_index(inside.argmax(), inside.shape))
            off = f"{inside[row, column]:.3g} steps off, expected 1/2"
            self.blame(held.name, f"at [{part.start + row}, {column}] it is {off}")
        if not error.max(initial=0) <= MOST_CUT * (last + 1):
            self.blame(held.name, f"a weight is cut off by {error.max():.3g} steps of {last}")
