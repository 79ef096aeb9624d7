"""The perturbation on numpy arrays, without torch: noise, updates and their replay.

Native code where it compiles, else plain numpy with the same bits; `reference` says what is computed.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgesft.core.protocols import Law, Mask, Shift, Update
from edgesft.kernels.perturb import checks, cpu
from edgesft.kernels.perturb.formula import MASK, ROUNDING, formula, words

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgesft.core.protocols import FloatArray


_STRIP = 1 << 16  # entries worked on together


def noise(
    count: int,
    *,
    seed: int,
    tensor: int,
    start: int = 0,
    law: Law = "gaussian",
    rank: int = 0,
    width: int = 1,
) -> "FloatArray":
    """z(seed, tensor, start + i) for 0 <= i < count: float32, (count,). rank, width: of low-rank noise of a
    matrix with `width` columns. Raises ValueError for an unknown law or a rank below 1."""
    checks.law(law, rank)
    library = cpu.library()
    if library is None:
        return formula(count, seed=seed, tensor=tensor, start=start, law=law, rank=rank, width=width)
    out = np.empty(count, dtype=np.float32)
    term = cpu.terms((Shift(seed, 1.0, law, rank),))
    library.noise(out.ctypes.data, start, count, width, term, tensor & 0xFFFFFFFF, library.threads())
    return out


def descend(
    weight: "npt.NDArray[Any]",
    *,
    shifts: Sequence[Shift],
    tensor: int,
    mask: Mask,
    shrink: float = 1.0,
    rounding: int | None = None,
) -> int:
    """w <- shrink w + sum of scale * z in place, inside the mask of w before; returns the entries in it.

    weight: contiguous and writable, float32 or ml_dtypes.bfloat16. rounding: seed of stochastic rounding to
    bfloat16, None: to nearest. Raises ValueError for what does not go together.
    """
    return replay(weight, [Update(tuple(shifts), shrink, rounding)], tensor=tensor, mask=mask)


def replay(weight: "npt.NDArray[Any]", updates: Sequence[Update], *, tensor: int, mask: Mask) -> int:
    """`descend` by each update in turn, with the same bits; returns the entries in the mask of the last."""
    kind = {"float32": cpu.FLOAT32, "bfloat16": cpu.BFLOAT16}.get(weight.dtype.name)
    if kind is None:
        raise ValueError(f"the weight is {weight.dtype}, expected float32 or bfloat16")
    if not (weight.flags.c_contiguous and weight.flags.writeable):
        raise ValueError("the weight is not contiguous and writable")
    checks.rule(mask)
    checks.updates(updates, mask, weight.shape)
    if not updates or not weight.size:
        return 0
    library = cpu.library()
    if library is None:
        return _replay(weight, updates, tensor, mask)
    rows, width = (1, weight.size) if weight.ndim < 2 else (weight.shape[0], math.prod(weight.shape[1:]))
    matrix = cpu.matrix(weight.ctypes.data, rows, width, kind)
    return library.steps(matrix, updates, cpu.rule(mask, tensor))


# --- the same in numpy --------------------------------------------------------------------------------------


def inside(weight: "FloatArray", mask: Mask, tensor: int) -> "npt.NDArray[np.bool_]":
    """Which entries of a weight (out, in) take part; the same shape."""
    return _inside(weight.reshape(-1), mask, tensor, 0).reshape(weight.shape)


def _inside(weight: "FloatArray", mask: Mask, tensor: int, start: int) -> "npt.NDArray[np.bool_]":
    size = np.abs(weight)
    found = (size >= np.float32(cpu.single(mask.low))) & (size <= np.float32(cpu.single(mask.high)))
    if mask.keep < 256:
        drawn = words(weight.size, mask.seed, tensor, start, 16, MASK).astype("<u4")
        found &= drawn.reshape(-1).view(np.uint8)[start % 16 :][: weight.size] < mask.keep
    return found


def _moved(weight: "FloatArray", update: Update, tensor: int, start: int, width: int) -> "FloatArray":
    if update.shrink != 1:
        weight = weight * np.float32(cpu.single(update.shrink))
    total: FloatArray | None = None
    for s in update.shifts:
        z = formula(weight.size, seed=s.seed, tensor=tensor, start=start, law=s.law, rank=s.rank, width=width)
        term = np.float32(cpu.single(s.scale)) * z
        total = term if total is None else total + term
    return weight if total is None else weight + total


def _bfloat16(values: "FloatArray", update: Update, tensor: int, start: int) -> "npt.NDArray[np.uint16]":
    """The bits of values rounded to bfloat16, to nearest or at random."""
    bits = values.view(np.uint32).astype(np.uint64)
    nearest = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    if update.rounding is not None:
        drawn = words(values.size, update.rounding, tensor, start, 4, ROUNDING)
        random = drawn.reshape(-1)[start % 4 :][: values.size] >> np.uint64(16)
        nearest = np.where(np.isfinite(values), (bits + random) >> np.uint64(16), nearest)
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def _replay(weight: "npt.NDArray[Any]", updates: Sequence[Update], tensor: int, mask: Mask) -> int:
    flat, active = weight.reshape(-1), 0
    half = weight.dtype.name == "bfloat16"
    width = weight.shape[-1] if weight.ndim else 1
    for start in range(0, flat.size, _STRIP):
        part, last = flat[start : start + _STRIP], 0
        with np.errstate(over="ignore", invalid="ignore"):
            for update in updates:
                before = part.astype(np.float32)
                taking = _inside(before, mask, tensor, start)
                after = _moved(before, update, tensor, start, width)
                if half:
                    bits = part.view(np.uint16)
                    np.copyto(bits, _bfloat16(after, update, tensor, start), where=taking)
                else:
                    np.copyto(part, after, where=taking)
                last = int(np.count_nonzero(taking))
        active += last
    return active
