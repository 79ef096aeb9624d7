"""Find a learning rate before the run: how the loss changes along directions that the run could take.

For n directions z the projected gradient g is measured on one batch, and the loss at w - lr g z on another,
so that what is seen is not what was fitted. The mean change over the directions is -lr A + lr^2 B: A is the
squared gradient that the directions catch, B the curvature that their noise meets, the trace that bounds
every later step as well. Nothing is written into the weights: each trial is a shift of the forward pass.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgesft.core.protocols import Loss, Shift
from edgesft.core.tuning.schedule import derive

DIRECTIONS = 12
GRID = tuple(10 ** (-7 + k / 2) for k in range(9))  # 1e-7 .. 1e-3


@dataclass(frozen=True)
class Trial:
    """change: mean change of the loss at this rate, nats; error: its standard error."""

    lr: float
    change: float
    error: float


def search(
    losses: Callable[[int], tuple[Loss, Loss]],
    estimate: Callable[[Loss, int], Sequence[Shift]],
    seed: int,
    grid: Sequence[float] = GRID,
    directions: int = DIRECTIONS,
    note: Callable[[], None] = lambda: None,
) -> list[Trial]:
    """Trials over the grid, rates ascending.

    losses: index of a direction -> the losses of two batches of their own. estimate: measures the projected
    gradient of a loss with a seed (`Directions.shifts`). note: called after every direction.
    """
    changes: dict[float, list[float]] = {lr: [] for lr in grid}
    for k in range(directions):
        fitted, seen = losses(k)
        shifts = estimate(fitted, derive(seed, "find-lr", k))
        before = float(seen(Shift(0, 0.0, shifts[0].law, shifts[0].rank)))
        for lr in grid:
            # one direction at a time: the sum over several is what their mean change stands for
            moved = [float(seen(Shift(s.seed, -lr * s.scale, s.law, s.rank))) - before for s in shifts]
            changes[lr].append(sum(moved))
        note()
    return [
        Trial(lr, statistics.fmean(found), statistics.stdev(found) / math.sqrt(len(found)))
        for lr, found in changes.items()
    ]


def best(trials: Sequence[Trial]) -> Trial | None:
    """The rate with the deepest mean fall of the loss; None if the loss falls at none."""
    finite = [t for t in trials if math.isfinite(t.change)]
    found = min(finite, key=lambda t: t.change, default=None)
    return found if found is not None and found.change < 0 else None
