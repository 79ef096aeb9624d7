"""Train only the weights that are small in absolute value, found afresh at every step.

Paper: Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning (2024).
Why: the noise of a zeroth-order step does most harm to the large weights; among the small ones a larger
learning rate stays stable, and fewer directions have to be explored.
How: per tensor the threshold is the `density` quantile of the pretrained |w|, computed once and exactly. The
mask |w| <= threshold is found again from the weights at each step; a weight that an update carries over the
threshold is frozen from then on, so the active fraction falls slowly (it is logged).
Cost: one float a tensor. No mask is stored.
"""

import math
from typing import TYPE_CHECKING

from edgesft.core.method import Method, method
from edgesft.core.params import Density
from edgesft.core.protocols import Signals
from edgesft.core.region import Band, Whole, below, kth_smallest_magnitude

if TYPE_CHECKING:
    from edgesft.core.region import Weight


@method
class SmallMagnitude(Method):
    density: Density = 0.25

    def region(self, name: str, weight: "Weight", signals: Signals, progress: float) -> Band:
        if self.density == 1:
            return Whole()  # a threshold would still freeze what grows beyond it
        k = max(1, round(self.density * math.prod(weight.shape)))
        return below(kth_smallest_magnitude(weight, k))
