"""Laws of every method of the axis `select`."""

import pytest
import torch

from edgesft.core import catalog
from edgesft.core.signals import Statistics

torch.set_num_threads(1)
NAMES = [n for n in catalog.names("select") if not catalog.load("select", n).needs]
WITH_DENSITY = [n for n in NAMES if "density" in catalog.fields("select", n)]


@pytest.fixture
def weight():
    return torch.randn(48, 40, generator=torch.Generator().manual_seed(3)) * 0.02


def region(name, weight, **values):
    chosen = catalog.build("select", {"use": name, **values})
    return chosen.region("layer", weight, Statistics(), 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_take_add_and_mask_agree(name, weight):
    found = region(name, weight)
    mask = found.mask(weight)
    assert mask.dtype is torch.bool
    assert mask.shape == weight.shape
    assert found.numel(weight) == int(mask.sum()) == found.take(weight).numel()
    assert torch.equal(found.take(weight), weight[mask])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_outside_the_region_changes(name, weight):
    found = region(name, weight)
    before, mask = weight.clone(), found.mask(weight)
    after = found.add(weight, torch.ones(found.numel(weight)))
    assert torch.equal(weight, before), "add must not write into its argument"
    assert torch.equal(after[~mask], weight[~mask])
    assert torch.equal(after[mask], weight[mask] + 1)


@pytest.mark.parametrize("name", NAMES)
def test_add_is_differentiable_in_the_values(name, weight):
    found = region(name, weight)
    values = torch.zeros(found.numel(weight), requires_grad=True)
    direction = torch.randn_like(weight)
    (found.add(weight, values) * direction).sum().backward()
    assert torch.equal(values.grad, direction[found.mask(weight)])


@pytest.mark.parametrize("name", NAMES)
def test_the_same_twice(name, weight):
    assert torch.equal(region(name, weight).mask(weight), region(name, weight.clone()).mask(weight))


@pytest.mark.parametrize("name", WITH_DENSITY)
@pytest.mark.parametrize("density", [0.001, 0.1, 0.25, 0.5, 0.9])
def test_size_is_density(name, density, weight):
    assert abs(region(name, weight, density=density).numel(weight) - round(density * weight.numel())) <= 1


@pytest.mark.parametrize("name", WITH_DENSITY)
def test_density_one_is_everything_whatever_the_weights_become(name, weight):
    found = region(name, weight, density=1.0)
    everything = region("everything", weight)
    assert torch.equal(found.mask(weight * 100), everything.mask(weight * 100))
    assert torch.equal(found.mask(weight / 100), everything.mask(weight / 100))


@pytest.mark.parametrize("name", WITH_DENSITY)
def test_less_density_is_a_subset(name, weight):
    small, large = (region(name, weight, density=d).mask(weight) for d in (0.1, 0.4))
    assert bool((large | ~small).all())
    assert int(large.sum()) > int(small.sum())
