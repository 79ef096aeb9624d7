import math
import statistics

import pytest
import torch

from edgesft.core.protocols import Shift
from edgesft.methods.estimate.fzoo import Fzoo, deviation

torch.set_num_threads(1)


class Fixed:
    """Losses given beforehand, by the order of the calls. calls: how many points each call asked for."""

    def __init__(self, values, *, prefers_together=False):
        self.values, self.prefers_together = list(values), prefers_together
        self.calls, self.points = [], []

    def __call__(self, shift):
        return self.take([shift])[0]

    def together(self, shifts):
        return self.take(shifts)

    def take(self, shifts):
        self.calls.append(len(shifts))
        self.points += shifts
        found, self.values = self.values[: len(shifts)], self.values[len(shifts) :]
        return found


LOSSES = [2.0, 2.5, 1.0, 2.25, 4.0]  # at theta, then in four directions


def test_lengths_are_differences_over_count_and_deviation():
    found = Fzoo(samples=4).gradient(Fixed(LOSSES), {}, 3)
    sigma = statistics.stdev(LOSSES[1:])
    assert [s.scale for s in found.shifts] == pytest.approx([(x - 2.0) / (4 * sigma) for x in LOSSES[1:]])
    assert found.loss == 2.0
    assert {(s.law, s.rank) for s in found.shifts} == {("rademacher", 0)}
    assert len({s.seed for s in found.shifts}) == 4


def test_one_query_at_theta_and_one_a_direction():
    loss = Fixed(LOSSES)
    found = Fzoo(samples=4, eps=0.25).gradient(loss, {}, 3)
    assert loss.points == [None, *(Shift(s.seed, 0.25, "rademacher") for s in found.shifts)]


@pytest.mark.parametrize(
    ("together", "prefers", "calls"),
    [(None, False, [1] * 5), (None, True, [5]), (2, False, [3, 2]), (3, True, [4, 1]), (8, False, [5])],
)
def test_passes(together, prefers, calls):
    loss = Fixed(LOSSES, prefers_together=prefers)
    found = Fzoo(samples=4, together=together).gradient(loss, {}, 3)
    assert loss.calls == calls
    assert found == Fzoo(samples=4).gradient(Fixed(LOSSES), {}, 3)


def test_the_length_does_not_depend_on_the_slope():
    flat = Fzoo(samples=4).gradient(Fixed([1 + (x - 2) / 1000 for x in LOSSES]), {}, 3)
    steep = Fzoo(samples=4).gradient(Fixed(LOSSES), {}, 3)
    assert [s.scale for s in flat.shifts] == pytest.approx([s.scale for s in steep.shifts], rel=1e-9)


@pytest.mark.parametrize("value", [0.1, 2.3, 1e-30])
def test_equal_losses_give_no_step(value):
    found = Fzoo(samples=3).gradient(Fixed([0.5, value, value, value]), {}, 3)
    assert [s.scale for s in found.shifts] == [0.0] * 3


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 4])
def test_losses_that_are_not_finite_are_seen(value, place):
    losses = LOSSES.copy()
    losses[place] = value
    found = Fzoo(samples=4).gradient(Fixed(losses), {}, 3)
    assert not all(math.isfinite(x) for x in (found.loss, *(s.scale for s in found.shifts)))


def test_deviation():
    assert deviation([1.0, 2.0, 4.0]) == pytest.approx(statistics.stdev([1.0, 2.0, 4.0]))
    assert math.isnan(deviation([1.0, math.inf]))
    assert deviation([1e200, -1e200]) == math.inf
