"""What the perturbation refuses, whatever the arrays are: ValueError with what was got and expected."""

import functools
import math
from collections.abc import Sequence
from typing import get_args

from edgesft.core.protocols import Law, Mask, Shift, Update


def law(name: Law, rank: int) -> None:
    """An unknown law, or a low rank below 1."""
    if name not in get_args(Law):
        raise ValueError(f"the law is `{name}`, expected one of {', '.join(get_args(Law))}")
    if name == "low-rank" and rank < 1:
        raise ValueError(f"the rank is {rank}, expected at least 1")


@functools.lru_cache(maxsize=1024)
def rule(mask: Mask) -> None:
    """A threshold that is not a number, or a share outside 0 .. 256."""
    if math.isnan(mask.low) or math.isnan(mask.high):
        raise ValueError("a magnitude threshold is not a number")
    if not 0 <= mask.keep <= 256:
        raise ValueError(f"the mask keeps {mask.keep} of 256, expected 0 to 256")


def whole(mask: Mask) -> bool:
    """Whether every number is in the mask."""
    return mask.low <= 0 and mask.high == math.inf and mask.keep >= 256


@functools.lru_cache(maxsize=256)
def directions(shifts: tuple[Shift | None, ...], mask: Mask, dimensions: int) -> None:
    """A scale that is not finite, a law that does not exist or does not go with the mask or the shape."""
    for shift in shifts:
        if shift is None:
            continue
        if not math.isfinite(shift.scale):
            raise ValueError(f"the scale is {shift.scale}, expected a finite number")
        law(shift.law, shift.rank)
        if shift.law == "low-rank" and not whole(mask):
            raise ValueError("low-rank noise has no mask: every entry must take part")
        if shift.law == "low-rank" and dimensions != 2:
            raise ValueError(f"low-rank noise needs a matrix, the weight has {dimensions} dimensions")


def updates(steps: Sequence[Update], mask: Mask, shape: Sequence[int]) -> None:
    """As `directions`, for every update."""
    for step in steps:
        if not math.isfinite(step.shrink):
            raise ValueError(f"the weight is shrunk by {step.shrink}, expected a finite number")
        directions(step.shifts, mask, len(shape))
