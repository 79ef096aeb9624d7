"""The operations on torch tensors; the package's docstring says what they are for.

A product of hundreds of rows empties the caches, so that every line of Python after it costs ten times its
usual time: the path of a call is kept short on purpose.
"""

import functools
import math
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from edgesft.core.protocols import Law, Mask, Shift, Update
from edgesft.kernels.dispatch import pick
from edgesft.kernels.perturb import checks

if TYPE_CHECKING:
    from edgesft.core.quantized import Quantized
    from edgesft.kernels.perturb import Perturb

Compute: TypeAlias = Literal["native", "bf16", "int8"]

STRIP = 1 << 20
_LARGEST = 6.67  # above every |z| of gaussian noise
_LEFT, _RIGHT = 0x75, 0x76

_gemm: Any
try:
    from edgesft.kernels.perturb import gemm as _gemm  # type: ignore[attr-defined,no-redef,unused-ignore]
except ImportError:  # the products fused with the noise are an addition
    _gemm = None


class _Buffers(threading.local):
    """Memory for the strips of a call, a type and device, and its views by shape and place."""

    def __init__(self) -> None:
        self.whole: dict[tuple[torch.dtype, torch.device, int], Tensor] = {}
        self.views: dict[tuple[int, int, torch.dtype, torch.device, int], Tensor] = {}


_buffers = _Buffers()


def noise(
    shape: Sequence[int],
    seed: int,
    tensor: int,
    *,
    start: int = 0,
    device: torch.device | str = "cpu",
    law: Law = "gaussian",
    rank: int = 0,
) -> Tensor:
    """z(seed, tensor, start + i), i the row-major index into `shape`: float32, mean 0 and variance 1.

    seed: the step's, modulo 2^64. tensor: the parameter's id (`tensor_id`), modulo 2^32. rank: of low-rank
    noise, which needs a matrix. Raises ValueError for an unknown law, or a shape that does not go with it.
    """
    checks.law(law, rank)
    if law == "low-rank" and len(shape) != 2:
        raise ValueError(f"low-rank noise needs a matrix, the shape is {tuple(shape)}")
    out = torch.empty(tuple(shape), dtype=torch.float32, device=device)
    width = shape[-1] if len(shape) > 1 else 1
    _pick(out).noise(out, seed=seed, tensor=tensor, start=start, law=law, rank=rank, width=max(1, width))
    return out


def perturbed_linear(
    x: Tensor,  # (k n, ..., in)
    weight: "Tensor | Quantized",  # (out, in)
    bias: Tensor | None,  # (out,)
    *,
    shifts: Sequence[Shift | None],
    tensor: int,
    mask: Mask,
    compute: Compute = "native",
) -> Tensor:  # (k n, ..., out)
    """x_j (W + scale_j * m * z_j)^T + b for k = len(shifts) equal groups x_j along the first dimension.

    m: the entries of W in `mask`; None: W itself. W is only read, strip by strip and once for all groups;
    shifts of one seed draw it once. No gradient. W + scale * z is made in float32 (float64 for float64 W) and
    rounded once to the type of x, in which the product is. Low-rank noise is multiplied beside W. compute:
    "bf16" rounds x and the strips to bfloat16; "int8" rounds rows of x and W, and gaussian noise, to 8 bits.
    Per thread, type and device the memory of the largest strips so far is kept for the next call. Thresholds
    and scales are rounded to float32 unless W is float64. Raises ValueError for what does not go together.
    """
    shifts = tuple(shifts)
    _check(x, weight, bias, shifts, mask, compute)
    if torch.is_grad_enabled():
        with torch.no_grad():
            return _perturbed(x, weight, bias, shifts, tensor, mask, compute)
    return _perturbed(x, weight, bias, shifts, tensor, mask, compute)


def _perturbed(
    x: Tensor,
    weight: "Tensor | Quantized",
    bias: Tensor | None,
    shifts: tuple[Shift | None, ...],
    tensor: int,
    mask: Mask,
    compute: Compute,
) -> Tensor:
    if _gemm is not None and _gemm.fits(x, weight, shifts=shifts, mask=mask, compute=compute):
        found: Tensor | None = _gemm.linear(
            x, weight, bias, shifts=shifts, tensor=tensor, mask=mask, compute=compute
        )
        if found is not None:
            return found
    full, beside = _split(shifts)
    if compute == "int8":
        y = _int8(x, weight, bias, full, tensor, mask)
    elif compute == "bf16" and x.dtype is not torch.bfloat16:
        y = _strips(x.to(torch.bfloat16), weight, None, full, tensor, mask).to(x.dtype)
        if bias is not None:
            y += bias
    else:
        y = _strips(x, weight, bias, full, tensor, mask)
    if beside:
        _low_rank_(y, x, shifts, tensor)
    return y


@functools.lru_cache(maxsize=256)
def _split(shifts: tuple[Shift | None, ...]) -> tuple[tuple[Shift | None, ...], bool]:
    """The shifts that need strips of W (all None: one for all groups), and whether others do not."""
    full = tuple(None if s is None or s.law == "low-rank" else s for s in shifts)
    beside = full != shifts
    return ((None,) if not any(full) else full), beside


def _strips(
    x: Tensor,
    weight: "Tensor | Quantized",
    bias: Tensor | None,
    shifts: tuple[Shift | None, ...],
    tensor: int,
    mask: Mask,
) -> Tensor:
    out, width = weight.shape
    ready = isinstance(weight, Tensor) and weight.dtype is x.dtype
    if ready and shifts == (None,):
        return linear(x, cast("Tensor", weight), bias)
    distinct, slots = _distinct(shifts, ready)
    step = _rows(out, width, len(distinct))
    if step >= out and len(shifts) == 1:
        moved = _buffer(out, width, x, 0)
        _pick(weight, moved).strips(weight, slice(0, out), distinct, [moved], tensor=tensor, mask=mask)
        return linear(x, moved, bias)
    groups = len(shifts)
    inputs = x.reshape(groups, x.numel() // max(1, groups * width), width)
    y = x.new_empty(groups, inputs.shape[1], out)
    pieces = list(zip(inputs.unbind(), y.unbind(), slots, strict=True))
    for begin in range(0, out, step):
        rows = slice(begin, min(out, begin + step))
        outs = [_buffer(rows.stop - begin, width, x, slot) for slot in range(len(distinct))]
        if outs:
            _pick(weight, outs[0]).strips(weight, rows, distinct, outs, tensor=tensor, mask=mask)
        for given, found, slot in pieces:
            moved = outs[slot] if slot >= 0 else cast("Tensor", weight)[rows]
            part = found if step >= out else found[:, rows]
            if bias is None:
                torch.mm(given, moved.t(), out=part)
            else:
                torch.addmm(bias[rows], given, moved.t(), out=part)
    return y.view(*x.shape[:-1], out)


@functools.lru_cache(maxsize=256)
def _distinct(
    shifts: tuple[Shift | None, ...], ready: bool
) -> tuple[tuple[Shift | None, ...], tuple[int, ...]]:
    """The strips to make, and which of them each group takes; -1: the weight itself, if it is `ready`."""
    made = [s for s in dict.fromkeys(shifts) if not (ready and s is None)]
    return tuple(made), tuple(-1 if ready and s is None else made.index(s) for s in shifts)


def _low_rank_(y: Tensor, x: Tensor, shifts: tuple[Shift | None, ...], tensor: int) -> None:
    """y_j += scale_j (x_j v) u^T / sqrt(rank), in place, for the groups with low-rank noise."""
    groups, out, width = len(shifts), y.shape[-1], x.shape[-1]
    inputs = x.reshape(groups, x.numel() // max(1, groups * width), width)
    outputs = y.view(groups, inputs.shape[1], out)
    factors: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for group, shift in enumerate(shifts):
        if shift is None or shift.law != "low-rank":
            continue
        seed, rank = shift.seed, shift.rank
        if (seed, rank) not in factors:
            u = noise((out, rank), seed, tensor ^ _LEFT, device=x.device).to(x.dtype)
            v = noise((width, rank), seed, tensor ^ _RIGHT, device=x.device).to(x.dtype)
            factors[seed, rank] = u, v
        u, v = factors[seed, rank]
        outputs[group].addmm_(inputs[group] @ v, u.t(), alpha=shift.scale / math.sqrt(rank))


def _int8(
    x: Tensor,
    weight: "Tensor | Quantized",
    bias: Tensor | None,
    shifts: tuple[Shift | None, ...],
    tensor: int,
    mask: Mask,
) -> Tensor:
    """s_x (s_w (x_q W_q^T) + scale (x_q (m z)^T)): products of 8-bit codes, one scale a row of x and of W."""
    out, width = weight.shape
    groups, n = len(shifts), x.numel() // max(1, len(shifts) * width)
    codes, sizes = _codes(x.reshape(groups * n, width))
    y = torch.empty(groups, n, out, dtype=torch.float32, device=x.device)
    step = _rows(out, width, 2)
    bare = torch.empty(min(step, out), width, dtype=torch.float32, device=x.device)
    for begin in range(0, out, step):
        rows = slice(begin, min(out, begin + step))
        source = weight[rows] if isinstance(weight, Tensor) else weight.dequantize(rows)
        stored, scales = _codes(source)
        part = y[:, :, rows]
        part.copy_((_product(codes, stored) * scales.view(-1)).view(groups, n, rows.stop - begin))
        drawn: dict[Shift, Tensor] = {}
        for group, shift in enumerate(shifts):
            if shift is None:
                continue
            unit = Shift(shift.seed, 1.0, shift.law, shift.rank)
            length = 1.0 if shift.law == "rademacher" else _LARGEST / 127
            if unit not in drawn:
                z = bare[: rows.stop - begin]
                kernel = _pick(weight, z)
                kernel.strips(weight, rows, (unit,), [z], tensor=tensor, mask=mask, bare=True)
                drawn[unit] = (z / length).round_().to(torch.int8)
            noisy = _product(codes[group * n : (group + 1) * n], drawn[unit])
            part[group].add_(noisy, alpha=shift.scale * length)
    y = y.view(groups * n, out).mul_(sizes).view(*x.shape[:-1], out).to(x.dtype)
    return y if bias is None else y.add_(bias)


def _codes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, m) as int8 codes in [-127, 127], and their scales (n, 1) in float32."""
    rows = rows.float()
    if not rows.numel():
        return rows.to(torch.int8), rows.new_zeros(rows.shape[0], 1)
    scales = rows.abs().amax(1, keepdim=True) / 127
    divisors = torch.where(scales > 0, scales, 1)
    return (rows / divisors).round_().nan_to_num_(0).clamp_(-127, 127).to(torch.int8), scales


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of int8 matrices, the exact sums rounded to float32."""
    if not a.numel() or not b.numel():
        return torch.zeros(a.shape[0], b.shape[0], device=a.device)
    if a.is_cpu:
        return torch._int_mm(a, b.t()).float()
    return (a.double() @ b.double().t()).float()


def descend_(
    weight: "Tensor | Quantized",
    *,
    shifts: Sequence[Shift],
    tensor: int,
    mask: Mask,
    shrink: float = 1.0,
    rounding: int | None = None,
) -> int:
    """w <- shrink w + (scale_1 z_1 + scale_2 z_2 + ...) in place, inside the mask of w before; entries in it.

    Every operation is rounded once to float32 (float64 for float64 W); then comes one rounding to the type of
    W: to nearest, or up or down at random with the bits of the seed `rounding`, which bfloat16 and quantised
    weights take and float32 and float64 have no use for. To nearest, a step far below their resolution is
    lost in half types. Entries outside the mask keep their bits. Raises ValueError for what does not go
    together.
    """
    return replay_(weight, (Update(tuple(shifts), shrink, rounding),), tensor=tensor, mask=mask)


def replay_(weight: "Tensor | Quantized", updates: Sequence[Update], *, tensor: int, mask: Mask) -> int:
    """`descend_` by each update in turn, with the same bits, while one strip of W after the other stays in
    cache; returns the entries in the mask of the last. Raises ValueError for what does not go together."""
    if isinstance(weight, Tensor):
        _check_float(weight)
        if weight.dtype is torch.float16 and any(u.rounding is not None for u in updates):
            raise ValueError("stochastic rounding to torch.float16 is not offered")
    checks.rule(mask)
    checks.updates(updates, mask, weight.shape)
    if not updates or not weight.numel():
        return 0
    with torch.no_grad():
        active = _pick(weight).replay(weight, updates, tensor=tensor, mask=mask)
    if isinstance(weight, Tensor) and not weight.is_inference():  # native code writes behind autograd's back
        torch.autograd.graph.increment_version(weight)
    return active


def _pick(weight: "Tensor | Quantized", out: Tensor | None = None) -> "Perturb":
    return cast("Perturb", pick("perturb", weight, out))


def _check(
    x: Tensor,
    weight: "Tensor | Quantized",
    bias: Tensor | None,
    shifts: tuple[Shift | None, ...],
    mask: Mask,
    compute: str,
) -> None:
    if isinstance(weight, Tensor):
        _check_float(weight)
        device = weight.device
    else:
        device = weight.codes.device
    shape = weight.shape
    if len(shape) != 2 or x.dim() == 0 or x.shape[-1] != shape[1]:
        raise ValueError(f"input {tuple(x.shape)} does not fit weight {tuple(shape)}")
    if bias is not None and bias.shape != shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} does not fit weight {tuple(shape)}")
    groups = len(shifts)
    if groups != 1 and (not groups or x.dim() < 2 or x.shape[0] % groups):
        raise ValueError(f"input {tuple(x.shape)} does not fall into {groups} equal groups")
    if not x.dtype.is_floating_point:
        raise ValueError(f"the input is {x.dtype}, expected a float type")
    if x.device != device or (bias is not None and bias.dtype != x.dtype):
        got = "" if bias is None else f", bias {bias.dtype}"
        raise ValueError(f"input is {x.dtype} on {x.device}{got}, weight on {device}")
    if compute not in ("native", "bf16", "int8"):
        raise ValueError(f"compute is `{compute}`, expected native, bf16 or int8")
    checks.rule(mask)
    checks.directions(shifts, mask, 2)


def _check_float(weight: Tensor) -> None:
    if not weight.dtype.is_floating_point:
        raise ValueError(f"the weight is {weight.dtype}, expected a float type")


def _rows(out: int, width: int, copies: int = 1) -> int:
    """Rows of W (out, width) in a strip: about 2^20 entries, at least 256 rows, strips of equal height.

    Every strip makes the matrix product arrange x anew, which many rows repay: with 512 inputs, strips that
    fit the L2 cache (128 rows of 2048) cost 15 % more than these. Heights are multiples of 64, because
    products with odd heights can be several times slower. copies: strips that are made of the same rows.
    """
    strips = max(1, round(out / max(256, STRIP // max(1, width * copies))))
    return -(-out // (64 * strips)) * 64 or 64


def _buffer(rows: int, width: int, like: Tensor, slot: int) -> Tensor:
    """This thread's strip (rows, width) number `slot`, of the type and in the place of `like`; new memory
    faults in."""
    key = rows, width, like.dtype, like.device, slot
    view = _buffers.views.get(key)
    if view is None:
        place = like.dtype, like.device, slot
        whole = _buffers.whole.get(place)
        with torch.inference_mode(False):  # one made inside could not be written outside
            if whole is None or whole.numel() < rows * width:
                _buffers.views.clear()
                whole = torch.empty(rows * width, dtype=like.dtype, device=like.device)
                _buffers.whole[place] = whole
            view = whole[: rows * width].view(rows, width)
        _buffers.views[key] = view
    return view
