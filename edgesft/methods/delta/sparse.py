"""Write the change into the weight: one number for each entry of the region.

Paper: the sparse difference vectors of diff pruning and of Lottery Ticket SFT (2020-2022), without a penalty.
Why: merged it costs nothing at inference, it keeps every pattern of zeros that the region respects, and any
selection can be combined with it.
How: with the estimate `spsa` and a region of magnitudes the weight itself is tuned in place, and the steps
that changed it are kept. Otherwise one value an entry is trained beside the frozen weight.
Cost: in place, no number beside the weights. Else 4 bytes an entry of the region, its gradient and optimiser.
Stored: in place, a few bytes a step. Else 4 bytes an entry of the region, and for the positions one bit a
weight or 4 bytes an entry, the smaller.
"""

from typing import TYPE_CHECKING, ClassVar

from edgesft.core.method import Method, method
from edgesft.core.protocols import Region, Theta

if TYPE_CHECKING:
    from torch import Generator, Tensor


@method
class Sparse(Method):
    in_place: ClassVar[bool] = True  # theta may be the weight itself

    def init(self, weight: "Tensor", region: Region, rng: "Generator") -> Theta:
        import torch

        return {"values": torch.zeros(region.numel(weight), dtype=weight.dtype, device=weight.device)}

    def effective(self, weight: "Tensor", region: Region, theta: Theta, progress: float) -> "Tensor":
        return region.add(weight, theta["values"])
