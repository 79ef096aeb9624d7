"""Seeds and learning rates of a run: pure functions of the step, so that a resumed run goes on exactly."""

import hashlib
import math
from typing import Literal, TypeAlias

Schedule: TypeAlias = Literal["constant", "linear", "cosine"]


def derive(*parts: int | str) -> int:
    """A seed (63 bits) that depends on every part and on nothing else."""
    text = "/".join(str(p) for p in parts).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def rate(step: int, steps: int, lr: float, schedule: Schedule, warmup: float) -> float:
    """The learning rate of `step` (0-based) of `steps`.

    warmup: share of the steps over which it rises linearly; after it, constant, or down to 0 at the end.
    """
    rising = round(warmup * steps)
    if step < rising:
        return lr * (step + 1) / rising
    if schedule == "constant":
        return lr
    left = 1 - (step - rising) / max(1, steps - rising)  # 1 at the first step, above 0 at the last
    return lr * left if schedule == "linear" else lr * (1 - math.cos(math.pi * left)) / 2
