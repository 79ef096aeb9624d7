"""Move quantised weights themselves, from code to code by stochastic rounding: no float weight is ever kept.

Paper: QuZO: Quantized Zeroth-Order Fine-Tuning for Large Language Models (2025).
Why: the tuned model is the quantised model: nothing is merged, nothing is quantised after training, and the
memory of the run is that of quantised inference.
How: a step c z on w = s q, s the scale of its group, would end between two codes. It goes to one of the two,
q' = floor((w + c z) / s + u) with u uniform in [0, 1), so its mean is the float step; rounding to the
nearest would lose every step shorter than s / 2. u is made of counter-based bits of the step's seed, so the
run can be replayed bit for bit. Scales stay as they are.
Cost: two forward passes; no number beside codes and scales.
Mind: a code at the end of its range (127; -8 or 7 with 4 bits) cannot go further. One step moves few codes,
each by a whole s, so that 4 bits are noisy: 8 bits, or small groups, are the better choice where they fit.
"""

from typing import ClassVar

from torch import Generator, Tensor

from edgesft.core.errors import UsageError
from edgesft.core.method import Method, method
from edgesft.core.protocols import Region, Theta
from edgesft.core.quantized.codes import Quantized


@method
class QuantizedUpdate(Method):
    in_place: ClassVar[bool] = True  # theta is the weight itself
    needs_quantized: ClassVar[bool] = True  # which must be quantised

    def init(self, weight: Tensor | Quantized, region: Region, rng: Generator) -> Theta:
        """Nothing beside the weight. Raises UsageError for a float weight."""
        _stored(weight)
        return {}

    def effective(
        self, weight: Tensor | Quantized, region: Region, theta: Theta, progress: float
    ) -> Tensor:  # (out, in)
        """The weight as its codes say. Raises UsageError for a float weight."""
        return _stored(weight).dequantize()


def _stored(weight: Tensor | Quantized) -> Quantized:
    if isinstance(weight, Quantized):
        return weight
    raise UsageError(
        f"`quantized-update` moves the codes of a quantised base, the base is {weight.dtype}",
        "--set tune.base=int8 (or int4) with a zeroth-order estimate; delta.use=sparse tunes float weights",
    )
