"""Train one multiplier for every `group` consecutive inputs of a row, and no weight.

Paper: the trained scales of Fine-tuning Quantized Neural Networks with Zeroth-order Optimization (QZO, 2025),
without its clipping of the derivative.
Why: a weight quantised in groups is code * scale, so a change of scales fits into the quantised weight as it
is; and zeroth-order estimates suffer less, the fewer numbers they explore.
How: multipliers start at 1; w becomes w * multiplier inside the region, and nothing outside it changes. Zeros
stay zeros, so every pattern of sparsity survives merging.
Cost: out * ceil(in / group) numbers a matrix, each with gradient and optimiser state; the changed weight
exists while its layer is computed. Stored: 4 bytes a multiplier, and the region's positions.
Mind: `group` must be that of the quantised weight if its own scales are to take the change up.
"""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from edgesft.core.method import Method, method
from edgesft.core.protocols import Region, Theta
from edgesft.core.region import Whole

if TYPE_CHECKING:
    from torch import Generator, Tensor


@method
class Scales(Method):
    group: Annotated[int, Field(ge=1, le=65_536, description="inputs that share a multiplier")] = 32

    def init(self, weight: "Tensor", region: Region, rng: "Generator") -> Theta:
        rows, width = weight.shape
        return {"scale": weight.new_ones(rows, -(-width // self.group))}

    def effective(self, weight: "Tensor", region: Region, theta: Theta, progress: float) -> "Tensor":
        import torch

        rows, width = weight.shape
        scale = theta["scale"].view(rows, -(-width // self.group))  # of a file, it may have another shape
        changed = weight * scale.repeat_interleave(self.group, dim=1)[:, :width]
        return changed if isinstance(region, Whole) else torch.where(region.mask(weight), changed, weight)
