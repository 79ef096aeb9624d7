"""What watches a run: losses that are no numbers, losses that leap, and dev losses that no longer fall."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SKIPPED = 3  # steps in a row without a finite loss, after which a run is over
WINDOW = 24  # losses that a leap is measured against
RECENT = 3  # losses that must have leapt together
BACK = 8  # steps that are taken back, more than it takes to notice a leap
FACTOR = 0.5  # of the learning rate after a leap
LEAP = 1.0  # nats above the window's median, at least


def leapt(losses: Sequence[float]) -> bool:
    """Whether the last losses lie far above those before them.

    losses: of the kept steps, in order. The median of the last RECENT must exceed the median of the WINDOW
    before by LEAP, by half of that median, and by six times its median absolute deviation: single hard
    batches do none of that three times running.
    """
    if len(losses) < WINDOW + RECENT:
        return False
    before, now = losses[-WINDOW - RECENT : -RECENT], statistics.median(losses[-RECENT:])
    middle = statistics.median(before)
    spread = 1.4826 * statistics.median(abs(x - middle) for x in before)
    return now - middle > max(LEAP, 0.5 * middle, 6 * spread)


def finite(values: Sequence[float]) -> bool:
    """Whether every number is one."""
    return all(math.isfinite(v) for v in values)


def exhausted(evals: Mapping[int, Mapping[str, float]], patience: int) -> bool:
    """Whether the dev loss has not fallen over the last `patience` evaluations; never with patience 0."""
    if not patience or len(evals) <= patience:
        return False
    ordered = [evals[step]["dev_loss"] for step in sorted(evals)]
    return min(ordered[-patience:]) >= min(ordered[:-patience])


@dataclass
class Skips:
    """Counts steps whose loss was no number. steps: all of them; a run of SKIPPED ends the training."""

    steps: list[int] = field(default_factory=list)

    def add(self, step: int) -> bool:
        """Note one; returns whether the run is over."""
        self.steps.append(step)
        return self.steps[-SKIPPED:] == list(range(step - SKIPPED + 1, step + 1))
