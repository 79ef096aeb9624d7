"""Matrices of 8- or 4-bit codes with a scale for each group of inputs.

A row of a matrix (out, in) is cut into groups of inputs. Each group has one float16 scale; a weight is
code * scale, in float32. There is no zero point: the code 0 is the weight 0, so exact zeros stay exact and
a pattern of zeros survives. 8 bits: codes -127..127. 4 bits: codes -8..7, two to a byte along the inputs,
the lower half first, stored as code + 8. A scale may be negative: the 4-bit range is longer on one side, and
the sign turns that side to a group's largest entry, which takes a sixth off the error of the matrix.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional

from edgesft.core.errors import ArtifactError, UsageError

Bits = Literal[4, 8]
_ENTRIES = 1 << 16  # weights quantised at a time
_SHRINK = (1.0, 0.93, 0.86)  # fractions of a group's range that the 4-bit codes are spread over
_LARGEST = 65504.0  # of float16


@dataclass(eq=False)
class Quantized:
    """A matrix (out, in) of codes: code * scale of its row and group, in float32.

    codes: int8 (out, in) for 8 bits, uint8 (out, ceil(in / 2)) for 4. scales: float16 (out, ceil(in /
    group)).
    The tensors may be changed in place, and are replaced when a module that holds them is moved.
    """

    codes: Tensor
    scales: Tensor
    bits: Bits
    group: int
    shape: tuple[int, int]

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def dequantize(self, rows: slice | None = None, *, out: Tensor | None = None) -> Tensor:
        """Those rows (all, if None) as float32 (rows, in). out: where to write them."""
        codes, scales = (self.codes, self.scales) if rows is None else (self.codes[rows], self.scales[rows])
        count, width = codes.shape[0], self.shape[1]
        if out is None:
            out = torch.empty(count, width, device=codes.device)
        if self.bits == 8:
            out.copy_(codes)
        else:
            out[:, 0::2] = codes & 15
            out[:, 1::2] = (codes >> 4)[:, : width // 2]
            out.sub_(8)
        full = width // self.group
        whole = full * self.group
        out[:, :whole].view(count, full, self.group).mul_(scales[:, :full, None])
        if whole < width:
            out[:, whole:].mul_(scales[:, -1:])
        return out

    def take(self, rows: Tensor) -> "Quantized":
        """A copy of the rows `rows` (n,) int64."""
        return Quantized(
            self.codes[rows], self.scales[rows], self.bits, self.group, (len(rows), self.shape[1])
        )

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """Those rows as float32 (n, in)."""
        return self.dequantize(rows) if isinstance(rows, slice) else self.take(rows).dequantize()

    def clone(self) -> "Quantized":
        return Quantized(self.codes.clone(), self.scales.clone(), self.bits, self.group, self.shape)

    def move_(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply a module's conversion (`.to`, `.cuda`): places change, types do not."""
        self.codes, self.scales = self.codes.to(fn(self.codes).device), self.scales.to(fn(self.scales).device)


def quantize(weight: Tensor, bits: Bits, group: int = 32) -> Quantized:
    """A float matrix (out, in) as codes with one scale for each `group` inputs.

    8 bits: the scale puts a group's largest entry at 127. 4 bits: at -8, and the range is shrunk a little
    and the scale fitted to the codes by least squares, a few times over; the least squared error is kept.
    Codes are those nearest for the scale as it is rounded to float16.
    Raises UsageError for other bits or an odd group, ArtifactError for NaN, infinite or huge weights.
    """
    found = empty(tuple(weight.shape), bits, group, weight.device)
    step = rows_at_once(weight.shape[1])
    for start in range(0, weight.shape[0], step):
        fill(found, start, weight[start : start + step].detach().float())
    return found


def rows_at_once(width: int) -> int:
    """Rows of this width to read or quantise together: temporaries stay in the cache."""
    return max(1, _ENTRIES // max(1, width))


def empty(shape: tuple[int, ...], bits: int, group: int, device: torch.device | str = "cpu") -> Quantized:
    """Room for a matrix of this shape. Raises UsageError for other bits, an odd group, another shape."""
    if bits not in (4, 8):
        raise UsageError(f"a base of {bits} bits, expected 4 or 8")
    if group < 2 or group % 2:
        raise UsageError(f"a group of {group} inputs, expected an even number from 2 on")
    if len(shape) != 2:
        raise UsageError(f"a weight of shape {list(shape)} cannot be quantised, expected a matrix")
    out, width = shape
    codes = (
        torch.empty(out, width, dtype=torch.int8, device=device)
        if bits == 8
        else torch.empty(out, -(-width // 2), dtype=torch.uint8, device=device)
    )
    scales = torch.empty(out, -(-width // group), dtype=torch.float16, device=device)
    return Quantized(codes, scales, cast("Bits", bits), group, (out, width))


def fill(into: Quantized, start: int, part: Tensor) -> None:
    """Quantise some rows (n, in), float32, into the rows of `into` from `start` on."""
    count, width, groups = part.shape[0], into.shape[1], into.scales.shape[1]
    cut = functional.pad(part, (0, groups * into.group - width)).view(-1, into.group)
    extreme = cut.gather(1, cut.abs().argmax(1, keepdim=True))
    top = float(extreme.abs().max()) if extreme.numel() else 0.0
    if not top <= _LARGEST:
        raise ArtifactError(f"the weight holds `{top}`, expected finite values up to {_LARGEST:.0f}")
    codes, scales = _nearest8(cut, extreme) if into.bits == 8 else _searched4(cut, extreme)
    here = slice(start, start + count)
    into.scales[here] = scales.view(count, groups)
    codes = codes.view(count, -1)[:, :width]
    if into.bits == 8:
        into.codes[here] = codes.to(torch.int8)
        return
    stored = functional.pad(codes.add_(8).to(torch.uint8), (0, width % 2), value=8)  # the partner is a zero
    into.codes[here] = stored[:, 0::2] | (stored[:, 1::2] << 4)


def _codes(cut: Tensor, scale: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """(nearest codes, the float16 scale as float32) of groups (n, group) for scales (n, 1)."""
    scale = scale.half().float()
    inverse = torch.where(scale == 0, 0.0, 1 / scale)  # a group too small for float16 is zero
    return (cut * inverse).round_().clamp_(low, high), scale


def _nearest8(cut: Tensor, extreme: Tensor) -> tuple[Tensor, Tensor]:
    return _codes(cut, extreme.abs() / 127, -127, 127)


def _searched4(cut: Tensor, extreme: Tensor) -> tuple[Tensor, Tensor]:
    best_codes, best_scale = torch.zeros_like(cut), torch.zeros_like(extreme)
    best_error = torch.full_like(extreme, math.inf)
    for shrink in _SHRINK:
        codes, scale = _codes(cut, extreme * (-shrink / 8), -8, 7)
        square = codes.square().sum(1, keepdim=True)
        fitted = torch.where(square > 0, (cut * codes).sum(1, keepdim=True) / square, scale)
        codes, scale = _codes(cut, fitted, -8, 7)
        error = (codes * scale).sub_(cut).square_().sum(1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        torch.where(better, codes, best_codes, out=best_codes)
    return best_codes, best_scale
