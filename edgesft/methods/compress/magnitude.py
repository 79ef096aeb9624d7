"""Keep the weights that are largest in absolute value.

Paper: folklore; the baseline of Wanda (2023) and SparseGPT (2023).
N:M compares within each group of M inputs of a row; without a pattern the whole matrix is compared.
Costs nothing and reads no data, and loses by far the most: it cannot see that some inputs are
hundreds of times louder than others.
"""

from torch import Tensor

from edgesft.core import nm
from edgesft.core.method import Method, method
from edgesft.core.params import Density
from edgesft.core.protocols import Signals


@method
class Magnitude(Method):
    """pattern: N:M; without one (`none`) `density` says how much is kept."""

    pattern: nm.OptionalPattern = "2:4"
    density: Density = 0.5

    def compress(self, name: str, weight: Tensor, signals: Signals) -> Tensor:  # (out, in) -> (out, in)
        scores = weight.abs()
        shape = nm.split_pattern(self.pattern)
        keep = nm.keep_groups(scores, *shape) if shape else nm.keep_matrix(scores, self.density)
        return weight.masked_fill(~keep, 0.0)
