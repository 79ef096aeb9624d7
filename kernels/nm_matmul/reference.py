"""What a packed product is, in numpy; slow, and what every kernel is held against."""

from typing import Any, ClassVar

import numpy as np

from edgesft.kernels.nm_matmul import layout
from edgesft.kernels.nm_matmul.layout import COLUMNS, Floats, Packed


def quantized(x: Floats) -> Floats:
    """x (rows, columns) as the kernels at level 4 see it: int8 in blocks of 32, a scale each."""
    rows, columns = x.shape
    padded = np.zeros((rows, layout.tiles(columns) * COLUMNS), np.float32)
    padded[:, :columns] = x
    block = padded.reshape(rows, -1, COLUMNS)
    most = np.abs(block).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), most, out=np.zeros_like(most), where=most > 1e-30)
    found: Floats = np.rint(block * inverse) * (most / np.float32(127))
    return found.reshape(rows, -1)[:, :columns]


def linear(
    packed: Packed,
    x: Floats,
    *,
    bias: Floats | None = None,
    residual: Floats | None = None,
    norm: Floats | None = None,
    epsilon: float = 0.0,
    gate: bool = False,
    level: int = 4,
) -> Floats:
    """y (m, rows) = x (m, columns) times the transposed matrix + bias + residual, summed in float64.

    norm (columns,): x is divided by its root mean square and multiplied by it before. level: 4 computes with
    x in int8, 0 as it is. gate: rows come by turns of 16, gate and up; y (m, rows / 2) = silu(gate) * up.
    """
    exact = level != 4 or packed.value not in layout.OFFSETS
    return product(
        layout.dense(packed),
        x,
        bias=bias,
        residual=residual,
        norm=norm,
        epsilon=epsilon,
        gate=gate,
        rounded=not exact,
    )


def product(
    weight: Floats,
    x: Floats,
    *,
    bias: Floats | None = None,
    residual: Floats | None = None,
    norm: Floats | None = None,
    epsilon: float = 0.0,
    gate: bool = False,
    rounded: bool = False,
    kind: type[np.floating[Any]] = np.float64,
) -> Floats:
    """`linear` with a matrix of floats (rows, columns). rounded: x in int8. kind: what it is summed in."""
    if norm is not None:
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + np.float32(epsilon)) * norm
    if rounded:
        x = quantized(x)
    y = x.astype(kind) @ weight.T.astype(kind)
    if bias is not None:
        y = y + bias
    if gate:
        turns = y.reshape(len(y), -1, 2, layout.ROWS)
        y = (turns[:, :, 0] / (1 + np.exp(-turns[:, :, 0])) * turns[:, :, 1]).reshape(len(y), -1)
    if residual is not None:
        y = y + residual
    made: Floats = y.astype(np.float32)
    return made


class Reference:
    """The implementation that always fits."""

    op: ClassVar[str] = "nm_matmul"
    name: ClassVar[str] = "reference"

    def fits(self, *_args: object, **_options: object) -> bool:
        return True

    def state(self) -> tuple[bool, str]:
        return True, "numpy, slow"
