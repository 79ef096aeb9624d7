from dataclasses import replace

import pytest
import torch

from edgesft.core import catalog
from edgesft.core.errors import UsageError
from edgesft.core.protocols import Shift, Update
from edgesft.core.region import Whole
from edgesft.core.signals import Statistics
from edgesft.core.tuning.tuned import Tuned
from edgesft.kernels import perturb
from edgesft.methods.delta.sparse import Sparse
from edgesft.methods.estimate.spsa import Spsa
from edgesft.methods.select.everything import Everything
from edgesft.methods.select.magnitude import Magnitude
from edgesft.methods.select.small_magnitude import SmallMagnitude

torch.set_num_threads(1)
W = torch.tensor([[0.1, -0.2, 0.3, -0.4], [0.5, -0.6, 0.7, -0.8]])


def test_small_are_the_smallest_in_absolute_value():
    found = SmallMagnitude(density=0.25).region("x", W, Statistics(), 0.0)
    assert found.take(W).tolist() == pytest.approx([0.1, -0.2])
    assert (found.low, found.high) == (0.0, pytest.approx(0.2))


def test_large_are_the_largest_in_absolute_value():
    found = Magnitude(density=0.25).region("x", W, Statistics(), 0.0)
    assert found.take(W).tolist() == pytest.approx([0.7, -0.8])


def test_a_weight_that_grows_over_the_threshold_is_frozen_from_then_on():
    found = SmallMagnitude(density=0.5).region("x", W, Statistics(), 0.0)
    moved = W.clone()
    moved[0, 0] = 0.9
    assert found.numel(moved) == found.numel(W) - 1
    assert not bool(found.mask(moved)[0, 0])


def trajectory(select, steps=12):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    layers = {"0": model[0], "2": model[2]}
    regions = {n: select.region(n, m.weight.detach(), Statistics(), 0.0) for n, m in layers.items()}
    x, y = torch.randn(32, 8), torch.randn(32, 1)
    with Tuned(model, layers, regions, Sparse(), in_place=True, kernel=perturb, seed=0) as tuned:

        def loss(shift: Shift | None):
            with tuned.shifted(shift):
                return (tuned.model(x) - y).square().mean()

        for step in range(steps):
            found = Spsa().gradient(loss, tuned.theta, step)
            tuned.descend(Update(tuple(replace(s, scale=-0.05 * s.scale) for s in found.shifts)))
    return torch.cat([m.weight.detach().flatten() for m in layers.values()]), regions


@pytest.mark.parametrize("select", [SmallMagnitude(density=1.0), Magnitude(density=1.0)])
def test_density_one_gives_the_trajectory_of_mezo_bit_for_bit(select):
    dense, _ = trajectory(Everything())
    found, regions = trajectory(select)
    start, _ = trajectory(Everything(), steps=0)
    assert torch.equal(found, dense)
    assert not torch.equal(found, start)
    assert all(isinstance(r, Whole) for r in regions.values())


def test_bad_values_are_refused_by_name():
    with pytest.raises(UsageError, match=r"select:small-magnitude\.density"):
        catalog.build("select", {"use": "small-magnitude", "density": 1.5})
    with pytest.raises(UsageError, match="desnity"):
        catalog.build("select", {"use": "small-magnitude", "desnity": 0.1})
