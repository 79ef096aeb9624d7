"""Optimisers of zeroth-order tuning: from what a step measured to the update of the weights.

A step measures a few scalars, one projected gradient a direction, so whatever an optimiser remembers can be
scalars and seeds as well; no number is kept for a weight. A term of a moving average over past steps is one
more draw of that step's noise in the sweep over the weights, which is why momentum is affordable: the window
of `adam` costs up to 16 draws an update and 16 pairs of numbers of memory, whatever the size of the model.

Only + - * / and sqrt of float64 are used, each rounded once by IEEE 754, so that the same measurements give
the same updates, bit for bit, on every machine.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from edgesft.core.protocols import Shift, Update
from edgesft.core.tuning.schedule import derive


@dataclass(frozen=True)
class Measured:
    """What one step found out. step: 0-based, of the run's schedule; lr: its learning rate.

    shifts: the directions; scale is each one's share of the projected gradient, so that the estimate of the
    gradient is the sum of scale * z(seed).
    """

    step: int
    lr: float
    shifts: tuple[Shift, ...]


class ScalarOptimizer(Protocol):
    """Turns measurements into updates, in the order of the steps.

    `state` is everything that a run needs to go on in the middle: plain JSON values.
    """

    def update(self, measured: Measured) -> Update: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


@dataclass
class Sgd:
    """w <- w - lr g z, averaged over the directions. Remembers nothing.

    decay: decoupled weight decay a unit of learning rate (Loshchilov and Hutter 2017); it touches the entries
    inside the mask. rounding: base seed of stochastic rounding; None: to nearest.
    """

    decay: float = 0.0
    rounding: int | None = None

    def update(self, measured: Measured) -> Update:
        """The update of a step. Steps must come in order."""
        rounding = None if self.rounding is None else derive(self.rounding, "rounding", measured.step)
        return Update(self._steps(measured), 1.0 - measured.lr * self.decay, rounding)

    def _steps(self, measured: Measured) -> tuple[Shift, ...]:
        """The directions with their signed coefficients."""
        return tuple(_scaled(s, -(measured.lr * s.scale)) for s in measured.shifts)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""


@dataclass
class Sign(Sgd):
    """w <- w - lr sign(g) z: the length of a step is the learning rate, however steep the loss is.

    Of several directions each sign counts for its share of one. No momentum (ZO-signSGD, Liu et al. 2019,
    with the sign of the projected gradient in place of that of every entry).
    """

    def _steps(self, measured: Measured) -> tuple[Shift, ...]:
        length = measured.lr / max(1, len(measured.shifts))
        return tuple(_scaled(s, length * ((s.scale < 0) - (s.scale > 0))) for s in measured.shifts)


@dataclass
class Adam(Sgd):
    """Adam (Kingma and Ba 2014) with its state factored into seeds and scalars.

    First moment: the directions of the last steps, at most PAIRS of them (those of the newest step always),
    weighted by (1 - BETA1) BETA1^age with age in steps, over the sum of the weights: Adam's own correction of
    the bias while nothing has left the window, and of the cut-off afterwards.
    Second moment: E z^2 = 1 in each entry, so the expected square of every entry of the estimate is the same
    sum of squared scales: one scalar, its moving average, with Adam's correction of the bias.
    """

    PAIRS: ClassVar[int] = 16
    BETA1: ClassVar[float] = 0.9
    BETA2: ClassVar[float] = 0.99
    EPS: ClassVar[float] = 1e-8

    second: float = 0.0
    remaining: float = 1.0  # BETA2^steps, by repeated multiplication: no library's pow
    window: list[tuple[Shift, ...]] = field(default_factory=list)  # oldest first

    def _steps(self, measured: Measured) -> tuple[Shift, ...]:
        self._remember(measured.shifts)
        total = 0.0
        for shift in measured.shifts:
            total += shift.scale * shift.scale
        self.second = self.BETA2 * self.second + (1.0 - self.BETA2) * total
        self.remaining *= self.BETA2
        root = math.sqrt(self.second / (1.0 - self.remaining)) + self.EPS
        weights = [1.0]
        for _ in self.window[1:]:
            weights.append(weights[-1] * self.BETA1)
        share = 0.0
        for weight in weights:
            share += weight
        factor = measured.lr / (root * share)
        return tuple(
            _scaled(s, -(factor * (weight * s.scale)))
            for weight, shifts in zip(reversed(weights), self.window, strict=True)
            for s in shifts
        )

    def _remember(self, shifts: tuple[Shift, ...]) -> None:
        self.window.append(shifts)
        while len(self.window) > 1 and sum(map(len, self.window)) > self.PAIRS:
            del self.window[0]

    def state(self) -> dict[str, Any]:
        window = [[[s.seed, s.scale, s.law, s.rank] for s in shifts] for shifts in self.window]
        return {"second": self.second, "remaining": self.remaining, "window": window}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.second, self.remaining = float(state["second"]), float(state["remaining"])
        self.window = [tuple(Shift(*shift) for shift in shifts) for shifts in state["window"]]


SCALAR: dict[str, type[Sgd]] = {"sgd": Sgd, "sign": Sign, "adam": Adam}


def updates(optimizer: ScalarOptimizer, measured: Iterable[Measured]) -> list[Update]:
    """The updates of consecutive steps; goes on from the state of the optimiser."""
    return [optimizer.update(each) for each in measured]


def _scaled(shift: Shift, scale: float) -> Shift:
    return Shift(shift.seed, scale, shift.law, shift.rank)
