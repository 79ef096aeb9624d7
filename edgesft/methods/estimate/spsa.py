"""A gradient estimate from two forward passes, at theta + eps z and theta - eps z.

Paper: Spall 1992 (SPSA); Fine-Tuning Language Models with Just Forward Passes (MeZO, 2023).
Why: no activations are kept and nothing is back-propagated, so tuning takes the memory of inference; the loss
may be anything that can be computed.
How: z ~ N(0, I) is described by a seed and made again wherever it is needed, in the forward pass and in the
update; stored weights are never perturbed. g = (loss(+) - loss(-)) / (2 eps), the estimate is g z, the mean
over `samples` directions.
Cost: 2 * samples forwards and 3 * samples generations of the noise a step. Ten to a hundred times as many
steps as back-propagation, and a learning rate that must be small.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field

from edgesft.core.directions import Directions
from edgesft.core.method import Method, method
from edgesft.core.protocols import Loss, Shift, Theta
from edgesft.core.schedule import derive


@method
class Spsa(Method):
    forward_only: ClassVar[bool] = True  # theta may be the weight itself

    eps: Annotated[float, Field(gt=0, le=1, description="size of the perturbation")] = 1e-3
    samples: Annotated[int, Field(ge=1, le=1024, description="directions a step, averaged")] = 1

    def gradient(self, loss: Loss, params: Theta, seed: int) -> Directions:
        shifts, losses = [], []
        with torch.no_grad():
            for sample in range(self.samples):
                direction = derive(seed, sample)
                plus = float(loss(Shift(direction, self.eps)))
                minus = float(loss(Shift(direction, -self.eps)))
                shifts.append(Shift(direction, (plus - minus) / (2 * self.eps) / self.samples))
                losses += [plus, minus]
        return Directions(sum(losses) / len(losses), tuple(shifts), params)
