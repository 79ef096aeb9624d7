"""A gradient estimate from two forward passes, at theta + eps z and theta - eps z.

Paper: Spall 1992 (SPSA); Fine-Tuning Language Models with Just Forward Passes (MeZO, 2023); low-rank noise
from Enhancing Zeroth-Order Fine-Tuning for Language Models with Low-Rank Structures (LOZO, 2024).
Why: no activations are kept and nothing is back-propagated, so tuning takes the memory of inference; the loss
may be anything that can be computed.
How: z has mean 0 and covariance I and is described by a seed, made again wherever it is needed, in the
forward pass and in the update; stored weights are never perturbed. g = (loss(+) - loss(-)) / (2 eps), the
estimate is g z, the mean over `samples` directions (MeZO, 2023, definition 2).
Noise: `gaussian` is MeZO's own; `rademacher` draws a sign from one random bit, costs about a seventh of
gaussian's time and gives an estimate of smaller variance; `low-rank` is u v^T / sqrt(rank) of each matrix
and draws rank * (in + out) numbers for in * out entries, but knows no mask: it needs the whole tensor.
Cost: 2 * samples forwards a step. The noise is drawn once for each forward, once for both where `two_sided`
runs them as one pass, and once more in the update. One pass reads each weight once and holds the activations
of two: faster where reading weights takes longer than the arithmetic (short batches, quantised or offloaded
weights), slower and larger else. Ten to a hundred times as many steps as back-propagation, and a learning
rate that must be small.
"""

from typing import Annotated, ClassVar

from pydantic import Field

from edgesft.core.method import Method, method
from edgesft.core.protocols import Law, Loss, Shift, Theta
from edgesft.core.tuning.directions import Directions
from edgesft.core.tuning.schedule import derive


@method
class Spsa(Method):
    forward_only: ClassVar[bool] = True  # theta may be the weight itself

    eps: Annotated[float, Field(gt=0, le=1, description="size of the perturbation")] = 1e-3
    samples: Annotated[int, Field(ge=1, le=1024, description="directions a step, averaged")] = 1
    noise: Annotated[Law, Field(description="law of the perturbation's entries")] = "gaussian"
    rank: Annotated[int, Field(ge=1, le=256, description="rank of each matrix of low-rank noise")] = 2
    two_sided: Annotated[
        bool | None, Field(description="both signs in one pass; none given: where the batch has few tokens")
    ] = None

    @property
    def whole_only(self) -> bool:
        """Whether its noise needs whole tensors, so that no selection inside them is possible."""
        return self.noise == "low-rank"

    def gradient(self, loss: Loss, params: Theta, seed: int) -> Directions:
        """Losses that are not finite give shifts that are not, for the caller to see."""
        together = self.two_sided
        if together is None:
            together = bool(getattr(loss, "prefers_together", False))
        shifts, total = [], 0.0
        for sample in range(self.samples):
            direction = derive(seed, sample)
            sides = self._shift(direction, self.eps), self._shift(direction, -self.eps)
            found = loss.together(sides) if together else [loss(side) for side in sides]
            plus, minus = (float(value) for value in found)
            shifts.append(self._shift(direction, (plus - minus) / (2 * self.eps) / self.samples))
            total += plus + minus
        return Directions(total / (2 * self.samples), tuple(shifts), params)

    def _shift(self, seed: int, scale: float) -> Shift:
        return Shift(seed, scale, self.noise, self.rank if self.noise == "low-rank" else 0)
