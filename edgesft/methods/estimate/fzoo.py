"""A gradient estimate from one-sided queries, its length set by how much their losses scatter.

Paper: FZOO: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language Models towards Adam-Scale Speed
(2025).
Why: the loss at theta itself serves all directions, so q directions cost q + 1 forwards instead of 2 q; and a
step divided by the scatter of the losses is long where the loss is flat and short where it is steep, as
Adam's steps are, without a number stored.
How: u_i are random signs, l_0 = loss(theta), l_i = loss(theta + eps u_i), sigma is the standard deviation of
l_1..l_q (divisor q - 1). The estimate is the sum of (l_i - l_0) / (q sigma) u_i, which is eps times the
paper's g / sigma: eps cancels to first order and the learning rate is a length. A step moves an entry by
about lr / sqrt(q), however steep the loss is. Equal losses (sigma = 0) give no step.
Cost: q + 1 forwards a step, `together` directions in one pass over the weights; its activations are those of
together + 1 batches. Learning rates are not those of `spsa`: think of the change of a weight, 1e-5 to 1e-4.
"""

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from edgesft.core.method import Method, method
from edgesft.core.protocols import Loss, Shift, Theta
from edgesft.core.tuning.directions import Directions
from edgesft.core.tuning.schedule import derive

TOGETHER = 4  # directions in one pass where the loss prefers it: activations of five batches at most


@method
class Fzoo(Method):
    forward_only: ClassVar[bool] = True  # theta may be the weight itself

    eps: Annotated[float, Field(gt=0, le=1, description="size of the perturbation")] = 1e-3
    samples: Annotated[int, Field(ge=2, le=1024, description="directions a step")] = 8
    together: Annotated[
        int | None,
        Field(ge=1, le=64, description="directions in one pass; none given: by the tokens of the batch"),
    ] = None

    def gradient(self, loss: Loss, params: Theta, seed: int) -> Directions:
        """Its loss is that at theta. Losses that are not finite give shifts that are not."""
        seeds = [derive(seed, sample) for sample in range(self.samples)]
        base, *found = self._losses(loss, [Shift(s, self.eps, "rademacher") for s in seeds])
        scale = self.samples * deviation(found)
        lengths = [(value - base) / scale if scale else 0.0 for value in found]
        steps = (Shift(s, length, "rademacher") for s, length in zip(seeds, lengths, strict=True))
        return Directions(base, tuple(steps), params)

    def _losses(self, loss: Loss, shifts: Sequence[Shift]) -> list[float]:
        """At theta, then at each shift."""
        size = self.together
        if size is None:
            size = TOGETHER if getattr(loss, "prefers_together", False) else 0
        if size == 0:
            return [float(loss(shift)) for shift in (None, *shifts)]
        found = [float(value) for value in loss.together((None, *shifts[:size]))]
        for at in range(size, len(shifts), size):
            found += [float(value) for value in loss.together(shifts[at : at + size])]
        return found


def deviation(values: Sequence[float]) -> float:
    """The standard deviation with divisor n - 1; NaN if a value is not finite. Exactly 0 for equal values."""
    shifted = [value - values[0] for value in values]  # a mean of equal values may be rounded off them
    mean = sum(shifted) / len(shifted)
    return math.sqrt(sum((value - mean) * (value - mean) for value in shifted) / (len(shifted) - 1))
