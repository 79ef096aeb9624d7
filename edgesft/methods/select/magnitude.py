"""Train only the weights that are large in absolute value.

Why: the counterpart of `small-magnitude`, to see what the choice of the region is worth; with `backprop` the
common magnitude criterion of sparse fine-tuning.
How: per tensor the threshold is the (1 - `density`) quantile of the pretrained |w|, computed once and
exactly. Tuned in place (`spsa`) the mask |w| >= threshold is found again at each step; with `backprop` it
stays that of the pretrained weights.
Cost: one float a tensor. No mask is stored.
"""

import math
from typing import TYPE_CHECKING

from edgesft.core.method import Method, method
from edgesft.core.params import Density
from edgesft.core.protocols import Signals
from edgesft.core.region import Band, Whole, above, kth_smallest_magnitude

if TYPE_CHECKING:
    from edgesft.core.region import Weight


@method
class Magnitude(Method):
    density: Density = 0.25

    def region(self, name: str, weight: "Weight", signals: Signals, progress: float) -> Band:
        if self.density == 1:
            return Whole()
        k = max(1, round(self.density * math.prod(weight.shape)))
        return above(kth_smallest_magnitude(weight, math.prod(weight.shape) - k + 1))
