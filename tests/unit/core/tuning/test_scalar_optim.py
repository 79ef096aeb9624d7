import json
import math

import numpy as np
import pytest

from edgesft.core.protocols import Shift, Update
from edgesft.core.tuning.scalar_optim import SCALAR, Adam, Measured, Sgd, Sign, updates
from edgesft.core.tuning.schedule import derive


def run(count, *, directions=1):
    """Measurements of `count` steps, of both signs and many sizes, that no binary fraction describes."""

    def share(step, i):
        return ((37 * step + 11 * i) % 101 - 50) / 7 * (1e-3, 1.0, 300.0)[step % 3]

    return [
        Measured(
            step,
            1e-3 * (1 + step / 7),
            tuple(Shift(derive(step, i), share(step, i), "rademacher") for i in range(directions)),
        )
        for step in range(count)
    ]


def test_sgd_descends_by_the_rate_times_each_share():
    shifts = (Shift(1, 0.3, "low-rank", 2), Shift(2, -4.0, "low-rank", 2))
    update = Sgd().update(Measured(5, 0.1, shifts))
    assert update == Update((Shift(1, -(0.1 * 0.3), "low-rank", 2), Shift(2, 0.4, "low-rank", 2)))
    assert update.shrink == 1.0
    assert update.rounding is None


def test_sign_steps_are_of_one_length():
    shifts = (Shift(1, 1e-30), Shift(2, -4e9), Shift(3, 0.0), Shift(4, 7.0))
    assert [s.scale for s in Sign().update(Measured(0, 0.5, shifts)).shifts] == [-0.125, 0.125, 0.0, -0.125]


@pytest.mark.parametrize("kind", sorted(SCALAR))
def test_decay_and_rounding_belong_to_every_kind(kind):
    plain, full = SCALAR[kind](), SCALAR[kind](decay=0.1, rounding=9)
    for each in run(3):
        without, update = plain.update(each), full.update(each)
        assert update.shifts == without.shifts
        assert update.shrink == 1.0 - each.lr * 0.1
        assert update.rounding == derive(9, "rounding", each.step)
        assert without.shrink == 1.0


def test_adam_is_textbook_adam_on_each_entry_while_nothing_left_the_window():
    """The first moment against Adam with a number an entry; the second is one scalar for all entries."""
    entries, measured = 5000, run(12)
    first, second = np.zeros(entries), 0.0
    for t, (each, update) in enumerate(zip(measured, updates(Adam(), measured), strict=True), 1):
        (shift,) = each.shifts
        noise = {s.seed: np.random.default_rng(s.seed).choice([-1.0, 1.0], entries) for s in update.shifts}
        first = 0.9 * first + 0.1 * shift.scale * noise[shift.seed]
        second = 0.99 * second + 0.01 * shift.scale**2  # z^2 = 1: exactly every entry's second moment
        expected = -each.lr * first / (1 - 0.9**t) / (math.sqrt(second / (1 - 0.99**t)) + 1e-8)
        found = sum(s.scale * noise[s.seed] for s in update.shifts)
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-14)


def test_adam_keeps_a_bounded_window_whose_weights_sum_to_one():
    optimizer = Adam()
    for step in range(40):
        update = optimizer.update(Measured(step, 1.0, (Shift(step, 2.0),)))
    assert [s.seed for s in update.shifts] == list(range(24, 40)), "oldest first, sixteen of them"
    weights = [-s.scale for s in update.shifts]  # v = 4, so every term is weight * 2 / 2
    assert sum(weights) == pytest.approx(1.0, rel=1e-6)
    assert weights[-1] / weights[-2] == pytest.approx(1 / 0.9)


def test_adam_keeps_whole_steps_and_the_newest_always():
    several = updates(Adam(), run(9, directions=6))
    assert [len(update.shifts) for update in several] == [6, 12, *[12] * 7]
    assert [len(update.shifts) for update in updates(Adam(), run(3, directions=20))] == [20, 20, 20]


def test_adam_with_nothing_to_follow_stands_still():
    assert Adam().update(Measured(0, 0.1, (Shift(1, 0.0),))).shifts[0].scale == 0.0


@pytest.mark.parametrize("kind", sorted(SCALAR))
@pytest.mark.parametrize("cut", [0, 1, 7, 19, 30])
def test_a_state_that_went_through_json_goes_on_exactly(kind, cut):
    measured = run(30, directions=2)
    whole = updates(SCALAR[kind](0.01, 3), measured)
    before, after = SCALAR[kind](0.01, 3), SCALAR[kind](0.01, 3)
    head = updates(before, measured[:cut])
    after.restore(json.loads(json.dumps(before.state())))
    assert head + updates(after, measured[cut:]) == whole


def test_the_numbers_are_what_they_were():
    """Fixed float64 arithmetic: these bits hold on every machine."""
    last = updates(Adam(), run(20))[-1].shifts
    assert [last[0].scale.hex(), last[-1].scale.hex()] == ["0x1.935169dc8b8cbp-25", "-0x1.df8516c5f9f06p-19"]
