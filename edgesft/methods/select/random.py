"""Train a random share of the weights, the same entries throughout.

Paper: the baseline R-MeZO of Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM
Fine-Tuning (2024).
Why: the control of every selection by magnitude: what it gains over this is owed to the choice, the rest to
the smaller number of directions.
How: an entry takes part if its byte of a counter-based random stream of `seed` lies under 256 * `density`.
The share is one of 1/256, 2/256, ... (the nearest to `density`, and the number of entries is random around
it); a larger density of the same seed contains the smaller one. Tuned in place (`spsa`, `fzoo`) the bytes are
drawn again in each pass.
Cost: one random byte an entry and pass. No mask is stored.
"""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from edgesft.core.method import Method, method
from edgesft.core.params import Seed
from edgesft.core.protocols import Signals
from edgesft.core.region import Band, Scattered, Whole

if TYPE_CHECKING:
    from edgesft.core.region import Weight


@method
class Random(Method):
    density: Annotated[
        float, Field(ge=1 / 256, le=1, description="fraction of each tensor that is trained, in 256ths")
    ] = 0.25
    seed: Seed = 0

    def region(self, name: str, weight: "Weight", signals: Signals, progress: float) -> Band:
        if self.density == 1:
            return Whole()
        keep = min(255, max(1, round(256 * self.density)))
        return Scattered(keep=keep, seed=self.seed, tensor=f"{name}.weight")
