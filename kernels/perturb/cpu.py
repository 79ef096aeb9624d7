"""The perturbation in C++ for weights in main memory; `reference` says what it computes.

Nothing here imports torch: `Native` works on its tensors by their addresses, `host` on numpy arrays.
"""

import functools
import math
import os
import struct
import sys
from collections.abc import Callable, Sequence
from ctypes import CDLL, c_char_p, c_float, c_int, c_int64, c_uint32, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgesft.core import threads
from edgesft.core.protocols import Law, Mask, Shift, Update
from edgesft.kernels import native

if TYPE_CHECKING:
    from torch import Tensor

    from edgesft.core.quantized import Quantized

SOURCE = Path(__file__).with_suffix(".cpp")
FLOAT32, BFLOAT16, INT8, INT4 = range(4)  # types of a weight in memory
_SEED, _TENSOR = (1 << 64) - 1, (1 << 32) - 1
_LAWS: dict[Law, int] = {"gaussian": 0, "rademacher": 1, "low-rank": 2}
_TERM, _STEP, _RULE, _MATRIX = (struct.Struct(f"@{f}") for f in ("Qfiii", "qqQfi", "ffiIQ", "PPqqii"))
_NO_TERM = _TERM.pack(0, 0.0, -1, 0, 0)


class Native:
    """Compiled at first use; fits contiguous CPU weights in float32, bfloat16 or quantised, if it
    reproduces the reference's bits."""

    op: ClassVar[str] = "perturb"
    name: ClassVar[str] = "native"

    def fits(self, weight: "Tensor | Quantized | None" = None, out: "Tensor | None" = None) -> bool:
        """Whether it can work on `weight` (None: on any weight) and write strips of the type of `out`."""
        lib = library()
        if lib is None or weight is None:
            return lib is not None
        if out is not None and not (out.is_cpu and out.dtype in _torch_types()):
            return False
        codes = getattr(weight, "codes", None)
        if codes is not None:
            return bool(codes.is_cpu and codes.is_contiguous() and weight.scales.is_contiguous())  # type: ignore[union-attr]
        return weight.dtype in _torch_types() and weight.is_cpu and weight.is_contiguous()  # type: ignore[union-attr]

    def state(self) -> tuple[bool, str]:
        return native.state(SOURCE)

    def noise(
        self, out: "Tensor", *, seed: int, tensor: int, start: int, law: Law, rank: int, width: int
    ) -> None:
        """Fill `out` (float32, contiguous, CPU) with z(seed, tensor, start + i)."""
        lib = _loaded()
        shift = Shift(seed, 1.0, law, rank)
        lib.noise(out.data_ptr(), start, out.numel(), width, terms((shift,)), tensor & _TENSOR, lib.threads())

    def strips(
        self,
        weight: "Tensor | Quantized",
        rows: slice,
        shifts: Sequence[Shift | None],
        outs: "Sequence[Tensor]",
        *,
        tensor: int,
        mask: Mask,
        bare: bool = False,
    ) -> None:
        """See `Perturb.strips`; outs are contiguous, on the CPU, all float32 or all bfloat16."""
        lib = _loaded()
        count = len(shifts)
        lib.strips(
            _matrix(weight),
            rows.start,
            rows.stop,
            terms(tuple(shifts)),
            count,
            (c_void_p * count)(*[out.data_ptr() for out in outs]),
            _torch_types()[outs[0].dtype],
            rule(mask, tensor),
            bare,
            lib.threads(),
        )

    def replay(
        self, weight: "Tensor | Quantized", updates: Sequence[Update], *, tensor: int, mask: Mask
    ) -> int:
        return _loaded().steps(_matrix(weight), updates, rule(mask, tensor))


class _Library:
    """The functions of the compiled file."""

    def __init__(self, library: CDLL) -> None:
        self.noise: Any = library.edgesft_noise
        self.noise.argtypes = [c_void_p, c_int64, c_int64, c_int64, c_char_p, c_uint32, c_int]
        self.noise.restype = None
        self.strips: Any = library.edgesft_strips
        self.strips.argtypes = [
            *(c_char_p, c_int64, c_int64, c_char_p, c_int64),
            *(c_void_p, c_int, c_char_p, c_int, c_int),
        ]
        self.strips.restype = None
        self.replay: Any = library.edgesft_replay
        self.replay.argtypes = [c_char_p, c_char_p, c_char_p, c_int64, c_char_p, c_int]
        self.replay.restype = c_int64

    @functools.cached_property
    def threads(self) -> Callable[[], int]:
        """How many threads to use: torch's number if it is loaded at the first call."""
        torch = sys.modules.get("torch")
        if torch is not None:
            found: Callable[[], int] = torch.get_num_threads
            return found
        wanted = os.environ.get("OMP_NUM_THREADS", "")
        count = int(wanted) if wanted.isdecimal() and int(wanted) > 0 else threads.resolve(0)
        return lambda: count

    def steps(self, matrix: bytes, updates: Sequence[Update], rule: bytes) -> int:
        """Apply the updates in turn to a packed matrix; returns the entries in the mask of the last one."""
        packed_terms, packed_steps, first = [], [], 0
        for update in updates:
            rounding = update.rounding
            packed_terms.append(terms(update.shifts))
            packed_steps.append(
                _STEP.pack(
                    first,
                    len(update.shifts),
                    (rounding or 0) & _SEED,
                    single(update.shrink),
                    rounding is not None,
                )
            )
            first += len(update.shifts)
        active: int = self.replay(
            matrix, b"".join(packed_terms), b"".join(packed_steps), len(updates), rule, self.threads()
        )
        return active

    def agrees(self) -> bool:
        """Whether the compiler kept the arithmetic exact (-ffast-math in $CXX, say, breaks it)."""
        import numpy as np

        from edgesft.kernels.perturb.formula import formula

        start, count = (1 << 34) - 700, 2048  # both words of the counter
        seed, tensor = 0x9123456789ABCDEF, 0xFEDCBA98
        laws: tuple[Law, ...] = ("gaussian", "rademacher", "low-rank")
        for law in laws:
            begin, rank = (start, 0) if law != "low-rank" else (100, 3)
            found = np.empty(count, dtype=np.float32)
            term = terms((Shift(seed, 1.0, law, rank),))
            self.noise(found.ctypes.data, begin, count, 70, term, tensor, 1)
            expected = formula(count, seed=seed, tensor=tensor, start=begin, law=law, rank=rank, width=70)
            if not np.array_equal(found.view(np.uint32), expected.view(np.uint32)):
                return False
        return True


def single(value: float) -> float:
    """`value` rounded to float32."""
    return c_float(value).value


@functools.lru_cache(maxsize=256)
def terms(shifts: tuple[Shift | None, ...]) -> bytes:
    """The directions as the library takes them. Raises ValueError for a scale that is not finite."""
    return b"".join(
        _NO_TERM
        if each is None
        else _TERM.pack(each.seed & _SEED, single(each.scale), _LAWS[each.law], each.rank, 0)
        for each in shifts
    )


@functools.lru_cache(maxsize=4096)
def rule(mask: Mask, tensor: int) -> bytes:
    """A mask as the library takes it."""
    low, high = single(mask.low), single(mask.high)
    return _RULE.pack(low, high, max(0, min(256, mask.keep)), tensor & _TENSOR, mask.seed & _SEED)


def matrix(address: int, rows: int, width: int, kind: int, scales: int = 0, group: int = 0) -> bytes:
    """A weight as the library takes it; address, scales: of its memory."""
    return _MATRIX.pack(address, scales, rows, width, kind, group)


def _matrix(weight: "Tensor | Quantized") -> bytes:
    codes = getattr(weight, "codes", None)
    if codes is not None:
        rows, width = weight.shape
        kind = INT8 if weight.bits == 8 else INT4  # type: ignore[union-attr]
        scales: int = weight.scales.data_ptr()  # type: ignore[union-attr]
        return matrix(codes.data_ptr(), rows, width, kind, scales, weight.group)  # type: ignore[union-attr]
    shape = weight.shape if len(weight.shape) > 1 else (1, weight.numel())
    return matrix(
        weight.data_ptr(),  # type: ignore[union-attr]
        shape[0],
        math.prod(shape[1:]),
        _torch_types()[weight.dtype],  # type: ignore[union-attr]
    )


@functools.cache
def _torch_types() -> dict[Any, int]:
    import torch

    return {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


def _loaded() -> _Library:
    lib = library()
    if lib is None:  # callers ask `fits` first
        raise RuntimeError("the native perturbation is not available")
    return lib


@functools.cache
def library() -> _Library | None:
    """The compiled functions, None where there are none or their numbers are not right."""
    loaded = native.load(SOURCE)
    if loaded is None:
        return None
    lib = _Library(loaded)
    if not lib.agrees():
        native.refuse(SOURCE, "its numbers differ from the reference's")
        return None
    return lib
