"""Weights plus masked Gaussian noise that is never stored: the inner operation of zeroth-order tuning.

`perturbed_linear` is the forward of Sparse MeZO (2024), algorithm "S-MeZO-EI": mask, noise and perturbed
weights exist for one strip of output rows at a time, the stored weight is only read, so both losses of a step
see the same weights and hence the same mask. `add_noise_` is the update with the noise of the same seed.
low = 0 and high = inf is dense MeZO. Importing this module does not import torch.
"""

import functools
import hashlib
import importlib
import math
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from edgesft.core.protocols import Kernel
from edgesft.kernels.perturb.cpu import Native

if TYPE_CHECKING:
    from torch import Tensor

    from edgesft.kernels.perturb.api import add_noise_, noise, perturbed_linear

__all__ = ["add_noise_", "noise", "perturbed_linear", "tensor_id"]


class Perturb(Kernel, Protocol):
    """What an implementation of this operation offers; see `reference` for the meaning of the arguments."""

    def noise(self, out: "Tensor", *, seed: int, tensor: int, start: int) -> None: ...
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
    ) -> int: ...


class Reference:
    """Plain torch: any device, any float type, any strides; tens of times slower than native code."""

    op: ClassVar[str] = "perturb"
    name: ClassVar[str] = "reference"
    strip: ClassVar[int] = 1 << 18  # temporaries are about 100 bytes an element: 25 MiB

    def fits(self, weight: "Tensor | None" = None) -> bool:
        return True

    def state(self) -> tuple[bool, str]:
        return True, "plain torch"

    def noise(self, out: "Tensor", *, seed: int, tensor: int, start: int) -> None:
        from edgesft.kernels.perturb import reference

        flat = out.view(-1)
        for at in range(0, flat.numel(), self.strip):
            part = flat[at : at + self.strip]
            part.copy_(
                reference.noise(part.numel(), seed=seed, tensor=tensor, start=start + at, device=out.device)
            )

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
        from edgesft.kernels.perturb import reference

        if source.dim() == 0:
            source, out = source.view(1), out.view(1)
        width, active = math.prod(source.shape[1:]), 0
        step = max(1, self.strip // max(1, width))
        for begin in range(0, source.shape[0], step):
            end = begin + step
            active += reference.perturb(
                source[begin:end],
                out[begin:end],
                seed=seed,
                tensor=tensor,
                start=start + begin * width,
                scale=scale,
                low=low,
                high=high,
            )
        return active


IMPLEMENTATIONS = (Native(), Reference())


@functools.cache
def tensor_id(name: str) -> int:
    """A stable 32-bit id of a parameter's name. Tied tensors must share one: pass the same name."""
    return int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "little")


def __getattr__(name: str) -> Any:  # noqa: ANN401 - the functions of `api`
    if name in __all__:
        globals()[name] = found = getattr(importlib.import_module(f"{__name__}.api"), name)
        return found
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
