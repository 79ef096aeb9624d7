"""Packed products in torch: `torch.ops.edgesft.packed_linear`, with a fake kernel for torch.compile.

The operation takes stream and scales as tensors, so a graph that holds it says what it computes; the matrix
that the kernels read, on huge pages, is made at the first call with a stream and lives as long as it does.
"""

from collections.abc import MutableMapping
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from edgesft.core.errors import UsageError
from edgesft.kernels import dispatch
from edgesft.kernels.nm_matmul import layout, reference
from edgesft.kernels.nm_matmul.cpu import Weights
from edgesft.kernels.nm_matmul.layout import Packed

NAME: Final = "edgesft::packed_linear"
_made: MutableMapping[Tensor, Weights] = WeakTensorKeyDictionary()  # by the stream


@torch.library.custom_op(NAME, mutates_args=(), device_types="cpu")
def packed_linear(
    x: Tensor,  # (..., columns)
    stream: Tensor,  # (bytes,) uint8
    scales: Tensor,  # (count,) float16
    bias: Tensor | None,  # (rows,)
    rows: int,
    columns: int,
    sparse: bool,
    value: str,
    group: int,
    unit: float,
    level: int,
) -> Tensor:
    """y (..., rows) = x times the transposed packed matrix + bias, in the type of x.

    level: 4 computes with x in int8, 0 as it is; see `reference.linear`. Raises NotPacked for a matrix that
    is none, RuntimeError for x of another width.
    """
    flat = x.detach().reshape(-1, columns).to(torch.float32).contiguous()
    y = torch.empty(len(flat), rows)
    if dispatch.pick("nm_matmul").name == "reference":
        packed = _packed(stream, scales, rows, columns, sparse, value, group, unit)
        held = None if bias is None else bias.detach().float().numpy()
        y = torch.from_numpy(reference.linear(packed, flat.numpy(), bias=held, level=level))
    elif len(flat):
        weights = _made.get(stream)
        if weights is None:
            weights = Weights(_packed(stream, scales, rows, columns, sparse, value, group, unit))
            _made[stream] = weights
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
    sparse: bool,
    value: str,
    group: int,
    unit: float,
    level: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _packed(
    stream: Tensor, scales: Tensor, rows: int, columns: int, sparse: bool, value: str, group: int, unit: float
) -> Packed:
    found = Packed(rows, columns, sparse, value, group, unit, stream.numpy(), scales.numpy())
    layout.check(found)
    return found


class PackedLinear(nn.Module):
    """A linear layer whose weight stays packed. For forward passes only: it has no gradient for x.

    level: see `packed_linear`.
    """

    stream: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, packed: Packed, bias: Tensor | None = None, level: int = 4) -> None:
        super().__init__()
        layout.check(packed)
        self.in_features, self.out_features = packed.columns, packed.rows
        self.register_buffer("stream", torch.from_numpy(np.array(packed.stream)))
        self.register_buffer("scales", torch.from_numpy(np.array(packed.scales)))
        self.register_buffer("bias", bias)
        self.sparse, self.value, self.group = packed.sparse, packed.value, packed.group
        self.unit, self.level = packed.unit, level

    def forward(self, x: Tensor) -> Tensor:  # (..., columns) -> (..., rows)
        if torch.is_grad_enabled() and x.requires_grad:
            raise UsageError(
                "a packed layer has no backward pass", "run it under torch.no_grad(), as `--zo` does"
            )
        made: Tensor = torch.ops.edgesft.packed_linear(
            x,
            self.stream,
            self.scales,
            self.bias,
            self.out_features,
            self.in_features,
            self.sparse,
            self.value,
            self.group,
            self.unit,
            self.level,
        )
        return made

    def extra_repr(self) -> str:
        pattern = "2:4" if self.sparse else "dense"
        return f"{self.in_features}, {self.out_features}, {pattern} {self.value}, group={self.group}"
