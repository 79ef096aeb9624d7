"""Products with perturbed weights that exist only in cache: the fast path of `perturbed_linear` on x86 CPUs.

gemm.cpp makes noise and perturbed rows (or, of quantised weights, float rows) block by block inside the
product, so W is read once for all groups and each noise is drawn once. Memory beside the arguments, kept for
the next call: x once more in bfloat16 or int8, if that is not float32; 5 MiB a thread at most; and 128 bytes
a thread and row of x (int8: 256) where rows of W are longer than 9,600 entries (int8: 19,200) and sums of
bfloat16 have to wait.

Perturbed weights have the bits of the strips elsewhere in this package; sums are in float32 (int8: exact in
int32) but in another order than torch's, so results differ by a few units of float32 rounding.
"""

import functools
import struct
from collections.abc import Sequence
from ctypes import CDLL, c_char_p, c_float, c_int
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from edgesft.core.protocols import Mask, Shift
from edgesft.kernels import native

if TYPE_CHECKING:
    from edgesft.core.quantized import Quantized

SOURCE = Path(__file__).with_suffix(".cpp")

FLOAT, HALF, BYTE, TILES = 1, 2, 4, 8  # what the library offers, as bits
_TYPES: Final = {torch.float32: 0, torch.bfloat16: 1}
_INT8, _INT4 = 2, 3
_LAWS: Final = {"gaussian": 1, "rademacher": 2}
_SEED, _TENSOR = (1 << 64) - 1, (1 << 32) - 1
_JOB = struct.Struct("@5P5qQIiiiffi")
_GROUP = struct.Struct("@Qfi")
_MANY = 2048  # rows a group
_MANY_READY = 512  # where torch's own bf16 product takes the weight as it is


def kinds() -> int:
    """The products of the compiled library: FLOAT | HALF | BYTE | TILES as far as this CPU has them."""
    library = _library()
    return 0 if library is None else library[1]


def fits(
    x: Tensor,
    weight: "Tensor | Quantized",
    *,
    shifts: Sequence[Shift | None],
    mask: Mask,
    compute: str = "native",
) -> bool:
    """Whether `linear` can do this call and is faster than strips with torch's product."""
    if x.dtype not in _TYPES or not x.is_cpu:
        return False
    kind = _kind(x, compute)
    if not kind & kinds():
        return False
    ready = False
    if isinstance(weight, Tensor):
        if weight.dtype not in _TYPES or not weight.is_cpu or not weight.is_contiguous():
            return False
        ready = _TYPES[weight.dtype] == (kind == HALF)
    elif not (
        weight.codes.is_cpu
        and weight.group % 16 == 0
        and weight.codes.is_contiguous()
        and weight.scales.is_contiguous()
    ):
        return False
    out, width = weight.shape
    numel = x.numel()
    if not (out and width and numel):
        return False
    return _wins(kind, isinstance(weight, Tensor), ready, tuple(shifts), numel // (width * len(shifts)))


@functools.lru_cache(maxsize=1024)
def _wins(kind: int, plain: bool, ready: bool, shifts: tuple[Shift | None, ...], rows: int) -> bool:
    """Whether the shifts can be served, and whether it pays with `rows` rows a group.

    Measured against strips and torch's products (tests/bench/bench_perturbed_gemm.py): int8 and quantised
    weights win at all sizes, float weights up to two thousand rows a group, bf16 products of bf16 weights
    below five hundred; beyond them strips cost little and torch's products are as fast. A weight that is
    `ready`, that is stored in the type of the product, and that nobody perturbs is torch's own case.
    """
    if not all(s is None or s.law in _LAWS for s in shifts):
        return False
    if kind == BYTE:
        return True
    if kind == HALF and ready and rows >= _MANY_READY:
        return False
    return not (ready and not any(shifts)) and (not plain or rows <= _MANY)


def linear(
    x: Tensor,  # (k n, ..., in)
    weight: "Tensor | Quantized",  # (out, in)
    bias: Tensor | None,  # (out,)
    *,
    shifts: Sequence[Shift | None],
    tensor: int,
    mask: Mask,
    compute: str = "native",
) -> Tensor | None:  # (k n, ..., out)
    """x_j (W + scale_j * m * z_j)^T + b for k = len(shifts) groups of rows; ask `fits` first.

    See `perturbed_linear` for the arguments. "native": the product of x's type. "int8": y = s_x (s_w
    (x_q W_q^T) + scale (x_q (m z)_q^T)), one step a row of x and of W (largest |entry| / 127), rademacher
    noise exact, gaussian noise in steps of 6.67 / 127; a row with a number that is not finite gives NaN.
    Returns None when there is no memory for it.
    """
    library = _library()
    if library is None:
        return None
    out, width = weight.shape
    groups = len(shifts)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], out)
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    if isinstance(weight, Tensor):
        kind, data, scales, group = _TYPES[weight.dtype], weight.data_ptr(), 0, 1
    else:
        kind = _INT8 if weight.bits == 8 else _INT4
        data, scales, group = weight.codes.data_ptr(), weight.scales.data_ptr(), weight.group
    low, high, keep, seed = _rule(mask)
    job = _JOB.pack(
        x.data_ptr(),
        data,
        scales,
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // (width * groups),
        width,
        out,
        groups,
        group,
        seed,
        tensor & _TENSOR,
        _TYPES[x.dtype],
        kind,
        keep,
        low,
        high,
        torch.get_num_threads(),
    )
    failed = library[0](job, _groups(tuple(shifts)), _kind(x, compute))
    return None if failed else y


def _kind(x: Tensor, compute: str) -> int:
    if compute == "int8":
        return BYTE
    return HALF if compute == "bf16" or x.dtype is torch.bfloat16 else FLOAT


@functools.lru_cache(maxsize=256)
def _groups(shifts: tuple[Shift | None, ...]) -> bytes:
    """The shifts as the library takes them."""
    return b"".join(
        _GROUP.pack(0, 0.0, 0) if s is None else _GROUP.pack(s.seed & _SEED, _single(s.scale), _LAWS[s.law])
        for s in shifts
    )


@functools.lru_cache(maxsize=1024)
def _rule(mask: Mask) -> tuple[float, float, int, int]:
    """Thresholds in float32, the share and the seed of it."""
    low = 0.0 if mask.low <= 0 else _single(mask.low)
    return low, _single(mask.high), max(0, min(256, mask.keep)), mask.seed & _SEED


def _single(value: float) -> float:
    return c_float(value).value


@functools.cache
def _library() -> tuple[Any, int] | None:
    """The compiled product and what it can do; None where there is none."""
    loaded: CDLL | None = native.load(SOURCE)
    if loaded is None:
        return None
    product: Any = loaded.edgesft_gemm
    product.argtypes = [c_char_p, c_char_p, c_int]
    product.restype = c_int
    found: int = loaded.edgesft_gemm_kinds()
    return (product, found) if found else None
