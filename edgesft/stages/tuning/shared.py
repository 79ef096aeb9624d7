"""The loss of a step as the estimate sees it: timed, and averaged over all ranks where there are several."""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edgesft.core.protocols import Shift

if TYPE_CHECKING:
    from edgesft.core.protocols import Loss


class StepLoss:
    """Wraps the loss of this rank's rows. exchange: this rank's losses -> those of the whole batch; None
    where there is one rank, and where gradients are exchanged instead."""

    def __init__(
        self,
        loss: "Loss | None",
        exchange: Callable[[Sequence[float]], Sequence[float]] | None,
        *,
        prefers_together: bool,
    ) -> None:
        self._loss, self._exchange = loss, exchange
        self.prefers_together = prefers_together  # the same on every rank, whatever rows it has
        self.seconds = 0.0

    @property
    def empty(self) -> bool:
        """Whether this rank has no rows of the batch."""
        return self._loss is None

    def __call__(self, shift: Shift | None, /) -> Any:  # noqa: ANN401 - a Tensor, or a float
        began = time.perf_counter()
        found: Any = 0.0 if self._loss is None else self._loss(shift)
        if self._exchange is not None:
            (found,) = self._exchange([float(found)])
        self.seconds += time.perf_counter() - began
        return found

    def together(self, shifts: Sequence[Shift | None]) -> Sequence[float]:
        began = time.perf_counter()
        found: Sequence[float] = [0.0] * len(shifts) if self._loss is None else self._loss.together(shifts)
        if self._exchange is not None:
            found = self._exchange(found)
        self.seconds += time.perf_counter() - began
        return found
