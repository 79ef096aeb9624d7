"""The perturbation in C++ for float32 weights in main memory; `reference` says what it computes."""

import functools
from collections.abc import Callable
from ctypes import CDLL, c_float, c_int, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgesft.kernels import native

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
_SEED, _TENSOR = (1 << 64) - 1, (1 << 32) - 1


class Native:
    """Compiled at first use; fits contiguous float32 CPU tensors, if it reproduces the reference's bits."""

    op: ClassVar[str] = "perturb"
    name: ClassVar[str] = "native"

    def fits(self, weight: "Tensor | None" = None) -> bool:
        """Whether it can work on `weight` (None: on any weight)."""
        library = _library()
        if library is None or weight is None:
            return library is not None
        return weight.dtype is library.float32 and weight.is_cpu and weight.is_contiguous()

    def state(self) -> tuple[bool, str]:
        return native.state(SOURCE)

    def noise(self, out: "Tensor", *, seed: int, tensor: int, start: int) -> None:
        """Fill `out` (float32, contiguous, CPU) with z(seed, tensor, start + i)."""
        library = _loaded()
        library.noise(out.data_ptr(), start, out.numel(), seed & _SEED, tensor & _TENSOR, library.threads())

    def perturb(
        self,
        source: "Tensor",
        out: "Tensor",
        *,
        seed: int,
        tensor: int,
        start: int,
        scale: float,
        low: float,
        high: float,
    ) -> int:
        """`reference.perturb` for contiguous float32 CPU tensors."""
        library = _loaded()
        active: int = library.perturb(
            source.data_ptr(),
            out.data_ptr(),
            start,
            source.numel(),
            seed & _SEED,
            tensor & _TENSOR,
            scale,
            low,
            high,
            library.threads(),
        )
        return active


class _Library:
    """The functions of the compiled file, and what else a call needs of torch."""

    def __init__(self, library: CDLL) -> None:
        import torch

        self.float32 = torch.float32
        self.threads: Callable[[], int] = torch.get_num_threads
        self.noise: Any = library.edgesft_noise
        self.noise.argtypes = [c_void_p, c_int64, c_int64, c_uint64, c_uint32, c_int]
        self.noise.restype = None
        self.perturb: Any = library.edgesft_perturb
        self.perturb.argtypes = [
            *(c_void_p, c_void_p, c_int64, c_int64, c_uint64, c_uint32),
            *(c_float, c_float, c_float, c_int),
        ]
        self.perturb.restype = c_int64

    def agrees(self) -> bool:
        """Whether the compiler kept the arithmetic exact (-ffast-math in $CXX, say, breaks it)."""
        import torch

        from edgesft.kernels.perturb import reference

        start, count = (1 << 34) - 700, 2048  # both words of the counter
        seed, tensor = 0x9123456789ABCDEF, 0xFEDCBA98
        found = torch.empty(count)
        self.noise(found.data_ptr(), start, count, seed, tensor, 1)
        expected = reference.noise(count, seed=seed, tensor=tensor, start=start)
        return torch.equal(found.view(torch.int32), expected.view(torch.int32))


def _loaded() -> _Library:
    library = _library()
    if library is None:  # callers ask `fits` first
        raise RuntimeError("the native perturbation is not available")
    return library


@functools.cache
def _library() -> _Library | None:
    loaded = native.load(SOURCE)
    if loaded is None:
        return None
    library = _Library(loaded)
    if not library.agrees():
        native.refuse(SOURCE, "its numbers differ from the reference's")
        return None
    return library
