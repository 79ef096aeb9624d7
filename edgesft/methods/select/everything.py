"""Train every entry of every tunable matrix.

Why: the reference that the selective methods are measured against; with the estimate `spsa` it is MeZO
(Fine-Tuning Language Models with Just Forward Passes, 2023).
Cost: nothing is stored for the selection. With `backprop` a value, a gradient and the optimiser's state for
every weight.
"""

from typing import TYPE_CHECKING

from edgesft.core.method import Method, method
from edgesft.core.protocols import Signals
from edgesft.core.region import Whole

if TYPE_CHECKING:
    from edgesft.core.region import Weight


@method
class Everything(Method):
    def region(self, name: str, weight: "Weight", signals: Signals, progress: float) -> Whole:
        return Whole()
