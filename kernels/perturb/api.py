"""The operations on torch tensors; the package's docstring says what they are for.

A product of hundreds of rows empties the caches, so that every line of Python after it costs ten times its
usual time: the path of a call is kept short on purpose.
"""

import math
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from edgesft.kernels.dispatch import pick

if TYPE_CHECKING:
    from edgesft.kernels.perturb import Perturb


STRIP = 1 << 20


class _Buffers(threading.local):
    """Memory for one strip a type and device, and its views by shape."""

    def __init__(self) -> None:
        self.whole: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self.views: dict[tuple[int, int, torch.dtype, torch.device], Tensor] = {}


_buffers = _Buffers()


def noise(
    shape: Sequence[int], seed: int, tensor: int, *, start: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """z(seed, tensor, start + i), i the row-major index into `shape`: float32 ~ N(0, 1).

    seed: the step's, modulo 2^64. tensor: the parameter's id (`tensor_id`), modulo 2^32.
    """
    out = torch.empty(tuple(shape), dtype=torch.float32, device=device)
    _pick(out).noise(out, seed=seed, tensor=tensor, start=start)
    return out


def perturbed_linear(
    x: Tensor,  # (..., in)
    weight: Tensor,  # (out, in)
    bias: Tensor | None,  # (out,)
    *,
    seed: int,
    tensor: int,
    scale: float,
    low: float,
    high: float,
) -> Tensor:  # (..., out)
    """x (W + scale * m * z(seed, tensor))^T + b with m = low <= |W| <= high; W is only read, no gradient.

    W + scale * z is rounded to the type of W before the product. One buffer per thread, type and device, the
    largest strip so far (see `_rows`), is kept for the next call. The thresholds and the scale are rounded to
    float32 unless W is float64. Raises ValueError for shapes or types that do not go together.
    """
    _check(weight, scale, low, high)
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"input {tuple(x.shape)} does not fit weight {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}")
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(f"input is {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}")
    if torch.is_grad_enabled():
        with torch.no_grad():
            return _linear(x, weight, bias, seed, tensor, scale, low, high)
    return _linear(x, weight, bias, seed, tensor, scale, low, high)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: int,
    tensor: int,
    scale: float,
    low: float,
    high: float,
) -> Tensor:
    kernel = _pick(weight)
    out, width = weight.shape
    step = _rows(out, width)
    if step >= out:
        moved = _buffer(out, width, weight)
        kernel.perturb(weight, moved, seed=seed, tensor=tensor, start=0, scale=scale, low=low, high=high)
        return linear(x, moved, bias)
    inputs = x.reshape(-1, width)  # (n, in)
    y = x.new_empty(inputs.shape[0], out)  # (n, out)
    for begin in range(0, out, step):
        rows = weight[begin : begin + step]
        moved = _buffer(rows.shape[0], width, weight)
        start = begin * width
        kernel.perturb(rows, moved, seed=seed, tensor=tensor, start=start, scale=scale, low=low, high=high)
        part = y[:, begin : begin + step]
        if bias is None:
            torch.mm(inputs, moved.t(), out=part)
        else:
            torch.addmm(bias[begin : begin + step], inputs, moved.t(), out=part)
    return y.view(*x.shape[:-1], out)


def add_noise_(weight: Tensor, *, seed: int, tensor: int, scale: float, low: float, high: float) -> int:
    """W += scale * m * z(seed, tensor) in place, m = low <= |W| <= high before; returns the entries in m.

    Every float32 entry becomes W + scale * z exactly as two rounded operations give it; half types are summed
    in float32 and rounded once, so that a step far below their resolution is lost. Entries outside m keep
    their bits. The thresholds and the scale are rounded to float32 unless W is float64.
    """
    _check(weight, scale, low, high)
    kernel = _pick(weight)
    with torch.no_grad():
        active = kernel.perturb(
            weight, weight, seed=seed, tensor=tensor, start=0, scale=scale, low=low, high=high
        )
    if not weight.is_inference():  # native code writes behind autograd's back
        torch.autograd.graph.increment_version(weight)
    return active


def _pick(weight: Tensor) -> "Perturb":
    return cast("Perturb", pick("perturb", weight))


def _check(weight: Tensor, scale: float, low: float, high: float) -> None:
    if not weight.dtype.is_floating_point:
        raise ValueError(f"the weight is {weight.dtype}, expected a float type")
    if not math.isfinite(scale):
        raise ValueError(f"the scale is {scale}, expected a finite number")
    if math.isnan(low) or math.isnan(high):
        raise ValueError("a magnitude threshold is not a number")


def _rows(out: int, width: int) -> int:
    """Rows of W (out, width) in a strip: about 2^20 entries, at least 256 rows, strips of equal height.

    Every strip makes the matrix product arrange x anew, which many rows repay: with 512 inputs, strips that
    fit the L2 cache (128 rows of 2048) cost 15 % more than these. Heights are multiples of 64, because
    products with odd heights can be several times slower.
    """
    strips = max(1, round(out / max(256, STRIP // max(1, width))))
    return -(-out // (64 * strips)) * 64 or 64


def _buffer(rows: int, width: int, like: Tensor) -> Tensor:
    """This thread's strip (rows, width), of the type and in the place of `like`; new memory faults in."""
    key = rows, width, like.dtype, like.device
    view = _buffers.views.get(key)
    if view is None:
        place = like.dtype, like.device
        whole = _buffers.whole.get(place)
        with torch.inference_mode(False):  # one made inside could not be written outside
            if whole is None or whole.numel() < rows * width:
                _buffers.views.clear()
                whole = torch.empty(rows * width, dtype=like.dtype, device=like.device)
                _buffers.whole[place] = whole
            view = whole[: rows * width].view(rows, width)
        _buffers.views[key] = view
    return view
