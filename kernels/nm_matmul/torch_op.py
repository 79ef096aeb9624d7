"""Packed products in torch: `torch.ops.edgesft.packed_linear`, with a fake kernel for torch.compile.

The operation takes stream and scales as tensors, so a graph that holds it says what it computes; the matrix
that the kernels read, on huge pages, is made at the first call with a stream and lives as long as it does.
Gradients go through to x: some rows of the matrix at a time become floats, and never all of them.
"""

from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from edgesft.kernels import dispatch
from edgesft.kernels.nm_matmul import layout, reference
from edgesft.kernels.nm_matmul.cpu import Weights
from edgesft.kernels.nm_matmul.layout import DENSE, ROWS, Packed

NAME: Final = "edgesft::packed_linear"
GRADIENT: Final = "edgesft::packed_linear_gradient"
_FLOATS: Final = 1 << 19  # of the matrix at a time, where its weights are needed as such
_made: MutableMapping[Tensor, Weights] = WeakTensorKeyDictionary()  # by the stream


@torch.library.custom_op(NAME, mutates_args=(), device_types="cpu")
def packed_linear(
    x: Tensor,  # (..., columns)
    stream: Tensor,  # (bytes,) uint8
    scales: Tensor,  # (count,) float16
    bias: Tensor | None,  # (rows,)
    rows: int,
    columns: int,
    pattern: str,
    value: str,
    group: int,
    unit: float,
    level: int,
) -> Tensor:
    """y (..., rows) = x times the transposed packed matrix + bias, in the type of x.

    level: 4 computes with x in int8, 0 as it is; see `reference.linear`. The gradient for x is that of the
    product with x as it is. Raises NotPacked for a matrix that is none, RuntimeError for x of another width.
    """
    flat = x.detach().reshape(-1, columns).to(torch.float32).contiguous()
    y = torch.empty(len(flat), rows)
    if not _native():
        packed = _packed(stream, scales, rows, columns, pattern, value, group, unit)
        held = None if bias is None else bias.detach().float().numpy()
        y = torch.from_numpy(reference.linear(packed, flat.numpy(), bias=held, level=level))
    elif len(flat):
        weights = _loaded(stream, scales, rows, columns, pattern, value, group, unit)
        held_bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
        at = None if held_bias is None else held_bias.data_ptr()
        threads = torch.get_num_threads()
        weights.call(flat.data_ptr(), y.data_ptr(), len(flat), bias=at, level=level, threads=threads)
    return y.to(x.dtype).reshape(*x.shape[:-1], rows)


@packed_linear.register_fake
def _(
    x: Tensor,
    stream: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    rows: int,
    columns: int,
    pattern: str,
    value: str,
    group: int,
    unit: float,
    level: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op(GRADIENT, mutates_args=(), device_types="cpu")
def packed_linear_gradient(
    outer: Tensor,  # (..., rows)
    stream: Tensor,
    scales: Tensor,
    rows: int,
    columns: int,
    pattern: str,
    value: str,
    group: int,
    unit: float,
) -> Tensor:
    """The gradient (..., columns) for x out of that for y, in its type."""
    flat = outer.detach().reshape(-1, rows).to(torch.float32)
    found = torch.zeros(len(flat), columns)
    for at, weight in _strips(stream, scales, rows, columns, pattern, value, group, unit):
        found.addmm_(flat[:, at : at + len(weight)], weight)
    return found.to(outer.dtype).reshape(*outer.shape[:-1], columns)


@packed_linear_gradient.register_fake
def _(
    outer: Tensor,
    stream: Tensor,
    scales: Tensor,
    rows: int,
    columns: int,
    pattern: str,
    value: str,
    group: int,
    unit: float,
) -> Tensor:
    return outer.new_empty((*outer.shape[:-1], columns))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401 - torch's
    _, stream, scales, _, *said, _ = inputs
    ctx.save_for_backward(stream, scales)
    ctx.said = said


def _backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's
    stream, scales = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    for_x = torch.ops.edgesft.packed_linear_gradient(outer, stream, scales, *ctx.said) if wanted[0] else None
    for_bias = outer.reshape(-1, outer.shape[-1]).sum(0) if wanted[3] else None
    return for_x, None, None, for_bias, *[None] * (len(ctx.said) + 1)


packed_linear.register_autograd(_backward, setup_context=_keep)


def _native() -> bool:
    return dispatch.pick("nm_matmul").name != "reference"


def _loaded(stream: Tensor, scales: Tensor, *said: Any) -> Weights:  # noqa: ANN401 - as `_packed` takes them
    """The matrix in memory of the kernels, made once a stream."""
    weights = _made.get(stream)
    if weights is None:
        _made[stream] = weights = Weights(_packed(stream, scales, *said))
    return weights


def _strips(stream: Tensor, scales: Tensor, *said: Any) -> Iterator[tuple[int, Tensor]]:  # noqa: ANN401
    """(first row, floats (n, columns)) of some rows at a time."""
    packed = _packed(stream, scales, *said, checked=True)
    weights = _loaded(stream, scales, *said) if _native() else None
    step = max(1, _FLOATS // packed.columns // ROWS)
    for strip in range(0, layout.strips(packed.rows), step):
        first, last = strip * ROWS, min((strip + step) * ROWS, packed.rows)
        if weights is None:
            found = layout.dense(layout.part(packed, strip, min(strip + step, layout.strips(packed.rows))))
        else:
            found = weights.rows(np.arange(first, last))
        yield first, torch.from_numpy(found)


def _packed(
    stream: Tensor,
    scales: Tensor,
    rows: int,
    columns: int,
    pattern: str,
    value: str,
    group: int,
    unit: float,
    *,
    checked: bool = False,
) -> Packed:
    found = Packed(
        rows, columns, pattern != DENSE, value, group, unit, stream.numpy(), scales.numpy(), pattern
    )
    if not checked:
        layout.check(found)
    return found


class PackedWeight:
    """The weight of a `PackedLinear`: what a matrix can be asked, and its floats, made when asked for."""

    def __init__(self, layer: "PackedLinear") -> None:
        self._layer = layer
        self.shape = torch.Size((layer.out_features, layer.in_features))

    @property
    def codes(self) -> Tensor:
        return self._layer.stream

    @property
    def scales(self) -> Tensor:
        return self._layer.scales

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations, as far as anyone goes by it."""
        return self._layer.dtype

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def numel(self) -> int:
        return self.shape.numel()

    def dequantize(self) -> Tensor:
        """The weights (rows, columns) as float32."""
        found = torch.empty(self.shape)
        for at, part in _strips(self.codes, self.scales, *self._layer.said):
            found[at : at + len(part)] = part
        return found


class PackedLinear(nn.Module):
    """A linear layer whose weight stays packed, on the memory of `packed` where that may be written to.

    bias: a parameter from here on. level: see `packed_linear`. dtype: of activations. Raises NotPacked.
    """

    stream: Tensor
    scales: Tensor

    def __init__(
        self,
        packed: Packed,
        bias: Tensor | None = None,
        level: int = 4,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        layout.check(packed)
        self.in_features, self.out_features = packed.columns, packed.rows
        self.register_buffer("stream", _tensor(packed.stream))
        self.register_buffer("scales", _tensor(packed.scales))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.pattern, self.value, self.group = packed.pattern, packed.value, packed.group
        self.unit, self.level, self.dtype = packed.unit, level, dtype

    @property
    def said(self) -> tuple[int, int, str, str, int, float]:
        """What the operation is told of the matrix."""
        return self.out_features, self.in_features, self.pattern, self.value, self.group, self.unit

    @property
    def quantized(self) -> PackedWeight:
        """What stands for the weight, by the name that a `QuantizedLinear` gives it."""
        return PackedWeight(self)

    @property
    def weight(self) -> PackedWeight:
        return self.quantized

    def forward(self, x: Tensor) -> Tensor:  # (..., columns) -> (..., rows)
        made: Tensor = torch.ops.edgesft.packed_linear(
            x, self.stream, self.scales, self.bias, *self.said, self.level
        )
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Conversions (`.half()`) are for the bias alone: types of stream and scales are their meaning."""
        held, self._buffers = self._buffers, {}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers = held
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.pattern} {self.value}, group={self.group}"


def _tensor(array: "np.typing.NDArray[Any]") -> Tensor:
    """On the same memory, unless nothing may be written there, which torch cannot say of a tensor."""
    return torch.from_numpy(np.asarray(array) if array.flags.writeable else np.array(array))
