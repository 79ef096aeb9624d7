"""The perturbation on a GPU in Triton: strips and update sweeps, every number made in registers.

`reference` says what is computed. Words of Philox, so signs, mask bytes and rounding bits, are those of every
CPU. Normals follow the same polynomials, but a GPU compiler may contract a multiplication and an addition
into one rounding, so their last bits may differ from a CPU's: a trajectory made here with gaussian noise is
replayed to the bit on GPUs of one kind only; made with signs it replays anywhere.
"""

import functools
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgesft.core.protocols import Law, Mask, Shift, Update
from edgesft.kernels.perturb.plain import Reference

if TYPE_CHECKING:
    from torch import Tensor

    from edgesft.core.quantized import Quantized

BLOCK = 1024  # entries a program; whole words of signs (32) and blocks of bytes (16)
LAWS = {"gaussian": 0, "rademacher": 1}
LARGEST = 3.4028234663852886e38  # of float32
_SEED, _TENSOR = (1 << 64) - 1, (1 << 32) - 1


class Triton:
    """Float tensors on a CUDA device, contiguous. EDGESFT_TRITON=interpret runs it on the CPU, for tests."""

    op: ClassVar[str] = "perturb"
    name: ClassVar[str] = "triton"

    def fits(self, weight: "Tensor | Quantized | None" = None, out: "Tensor | None" = None) -> bool:
        if not self.state()[0]:
            return False
        return all(_fit(each) for each in (weight, out) if each is not None)

    def state(self) -> tuple[bool, str]:
        if importlib.util.find_spec("triton") is None:
            return False, "triton is not installed"
        if _interpreted():
            return True, "triton, interpreted on the CPU"
        if "torch" not in sys.modules and not Path("/dev/nvidiactl").exists():
            return False, "no CUDA device"
        if not _cuda():
            return False, "no CUDA device"
        return True, "triton on CUDA"

    def noise(
        self, out: "Tensor", *, seed: int, tensor: int, start: int, law: Law, rank: int, width: int
    ) -> None:
        """Fill `out` (float32, contiguous) with z(seed, tensor, start + i)."""
        if law == "low-rank":
            Reference().noise(out, seed=seed, tensor=tensor, start=start, law=law, rank=rank, width=width)
            return
        count = out.numel()
        _kernels().noise[_grid(count)](
            out, count, start, *_words(seed), tensor & _TENSOR, law=LAWS[law], block=BLOCK
        )

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
        """outs[j] = those rows at shifts[j], rounded once to the type of outs[j]."""
        if any(s is not None and s.law == "low-rank" for s in shifts):
            Reference().strips(weight, rows, shifts, outs, tensor=tensor, mask=mask, bare=bare)
            return
        source: Tensor = weight[rows]
        start, count = rows.start * source.shape[1], source.numel()
        for shift, out in zip(shifts, outs, strict=True):
            if shift is None:
                out.zero_() if bare else out.copy_(source)
                continue
            _kernels().strip[_grid(count)](
                source,
                out,
                count,
                start,
                *_words(shift.seed),
                tensor & _TENSOR,
                shift.scale,
                *_mask(mask),
                law=LAWS[shift.law],
                bare=bare,
                block=BLOCK,
            )

    def replay(
        self, weight: "Tensor | Quantized", updates: Sequence[Update], *, tensor: int, mask: Mask
    ) -> int:
        """Apply the updates in turn, in place; returns the entries in the mask of the last one."""
        if any(s.law == "low-rank" for update in updates for s in update.shifts):
            return Reference().replay(weight, updates, tensor=tensor, mask=mask)
        active = [self._sweep(weight, update, tensor, mask) for update in updates]
        return active[-1] if active else 0

    def _sweep(self, weight: Any, update: Update, tensor: int, mask: Mask) -> int:  # noqa: ANN401 - a Tensor
        import torch

        count, device = weight.numel(), weight.device
        active = torch.zeros(1, dtype=torch.int32, device=device)
        words = [_signed(word) for s in update.shifts for word in _words(s.seed)]
        seeds = torch.tensor(words, dtype=torch.int32, device=device)
        scales = torch.tensor([s.scale for s in update.shifts], dtype=torch.float32, device=device)
        _kernels().sweep[_grid(count)](
            weight,
            active,
            count,
            seeds,
            scales,
            tensor & _TENSOR,
            update.shrink,
            *_mask(mask),
            *_words(update.rounding or 0),
            shifts=len(update.shifts),
            law=LAWS[update.shifts[0].law],
            stochastic=update.rounding is not None and weight.dtype is torch.bfloat16,
            shrinks=update.shrink != 1.0,
            block=BLOCK,
        )
        return int(active)


def _fit(tensor: Any) -> bool:  # noqa: ANN401 - a Tensor or a Quantized
    import torch

    if not isinstance(tensor, torch.Tensor) or not (tensor.is_cuda or _interpreted()):
        return False
    return tensor.dtype in (torch.float32, torch.bfloat16) and tensor.is_contiguous()


def _grid(count: int) -> tuple[int]:
    return (max(1, -(-count // BLOCK)),)


def _mask(mask: Mask) -> tuple[float, float, int, int, int]:
    return (mask.low, min(mask.high, LARGEST), mask.keep, *_words(mask.seed))


def _words(seed: int) -> tuple[int, int]:
    whole = seed & _SEED
    return whole & _TENSOR, whole >> 32


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def _interpreted() -> bool:
    return os.environ.get("EDGESFT_TRITON") == "interpret"


@functools.cache
def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@functools.cache
def _kernels() -> Any:  # noqa: ANN401 - Triton's own types
    if _interpreted():
        os.environ["TRITON_INTERPRET"] = "1"
    from edgesft.kernels.perturb import gpu_kernels

    return gpu_kernels
