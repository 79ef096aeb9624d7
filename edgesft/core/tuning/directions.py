"""The zeroth-order gradient, which stays a recipe: seeds and scales, without torch until tensors are made."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgesft.core import catalog
from edgesft.core.protocols import Shift, Theta

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Directions:
    """A gradient as a sum of scale * z(seed) over `shifts`; its tensors are made when asked for.

    loss: mean of the losses that were seen. params: what it is the gradient of, by name.
    """

    loss: float
    shifts: tuple[Shift, ...]
    params: Theta

    def items(self) -> "Iterator[tuple[str, Tensor]]":
        import torch

        kernel = catalog.runtime("kernels.perturb")
        for name, p in self.params.items():
            total = torch.zeros_like(p)
            for shift in self.shifts:
                z: Tensor = kernel.noise(
                    tuple(p.shape),
                    shift.seed,
                    kernel.tensor_id(name),
                    device=p.device,
                    law=shift.law,
                    rank=shift.rank,
                )
                total.add_(z.to(p), alpha=shift.scale)
            yield name, total
