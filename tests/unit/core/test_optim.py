import itertools

import pytest
import torch

from edgesft.core.optim import Adam, Sgd
from edgesft.core.protocols import Shift
from edgesft.core.tuning.directions import Directions
from edgesft.core.tuning.schedule import derive, rate
from edgesft.methods.estimate.backprop import Exact

torch.set_num_threads(1)


def run(ours, reference, steps=20):
    generator = torch.Generator().manual_seed(0)
    theta = {"x": torch.randn(7, generator=generator)}
    parameter = torch.nn.Parameter(theta["x"].clone())
    optimizer = reference([parameter])
    for _ in range(steps):
        g = torch.randn(7, generator=generator)
        ours.step(theta, Exact(0.0, {"x": g}), 0.01)
        parameter.grad = g.clone()
        optimizer.step()
    return theta["x"], parameter.detach()


def test_adam_is_adamw_of_torch():
    found, expected = run(Adam(decay=0.1), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_sgd_is_sgd_of_torch():
    found, expected = run(Sgd(), lambda p: torch.optim.SGD(p, lr=0.01))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_adam_goes_on_from_its_state():
    theta, other = {"x": torch.ones(3)}, {"x": torch.ones(3)}
    g = Exact(0.0, {"x": torch.tensor([1.0, -2.0, 0.5])})
    whole, first, second = Adam(), Adam(), Adam()
    for _ in range(6):
        whole.step(theta, g, 0.1)
    for _ in range(3):
        first.step(other, g, 0.1)
    second.restore(first.state())
    for _ in range(3):
        second.step(other, g, 0.1)
    assert torch.equal(theta["x"], other["x"])


def test_a_lazy_gradient_is_the_sum_of_its_directions():
    params = {"a": torch.zeros(5), "b": torch.zeros(2, 3)}
    both = dict(Directions(0.0, (Shift(1, 2.0), Shift(9, -3.0)), params).items())
    one = dict(Directions(0.0, (Shift(1, 1.0),), params).items())
    nine = dict(Directions(0.0, (Shift(9, 1.0),), params).items())
    for key in params:
        torch.testing.assert_close(both[key], 2 * one[key] - 3 * nine[key])
    assert not torch.equal(one["a"], one["b"].flatten()[:5]), "each tensor has noise of its own"


def test_seeds_depend_on_every_part():
    assert derive(1, 2) == derive(1, 2)
    assert len({derive(1, 2), derive(2, 1), derive(12), derive(1, "2", 0)}) == 4
    assert 0 <= derive("x") < 2**63


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules(schedule):
    rates = [rate(i, 100, 1.0, schedule, 0.1) for i in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert all(b <= a for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == 1.0 if schedule == "constant" else 0 < rates[-1] < 0.05
