"""Keep the weights whose product with the size of their input is largest; no weight is changed.

Paper: A Simple and Effective Pruning Approach for Large Language Models (Wanda, 2023). The score of
W[i, j] is |W[i, j]| * ||x_j||, compared within a row only: per group of M inputs for N:M, over the whole
row otherwise. Costs one forward pass over the calibration text and one float an input.
"""

from typing import ClassVar

import torch
from torch import Tensor

from edgesft.core import nm
from edgesft.core.method import Method, method
from edgesft.core.params import Density
from edgesft.core.protocols import Signals

SILENT = 1e-12  # of the loudest input: ranks inputs that were never seen below all others, by magnitude


@method
class Wanda(Method):
    """pattern: N:M; without one (`none`) `density` says how much of each row is kept."""

    needs: ClassVar[frozenset[str]] = frozenset({"input_sq"})

    pattern: nm.OptionalPattern = "2:4"
    density: Density = 0.5

    def compress(self, name: str, weight: Tensor, signals: Signals) -> Tensor:  # (out, in) -> (out, in)
        norms = signals.input_sq(name).to(weight.dtype).sqrt()  # (in,)
        loudest = float(norms.max())
        norms = norms / loudest if loudest > 0 else torch.ones_like(norms)
        scores = nm.below_all(weight.abs() * norms.clamp_min(SILENT), weight == 0)
        shape = nm.split_pattern(self.pattern)
        keep = nm.keep_groups(scores, *shape) if shape else nm.keep_rows(scores, self.density)
        return weight.masked_fill(~keep, 0.0)
