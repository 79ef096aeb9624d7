"""Laws of every method of the axis `select`."""

import subprocess
import sys

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


def least(name):
    """The smallest density that a method takes."""
    return catalog.fields("select", name)["density"].get("minimum", 0)


@pytest.mark.parametrize("name", WITH_DENSITY)
@pytest.mark.parametrize("density", [0.001, 0.1, 0.25, 0.5, 0.9])
def test_size_is_density(name, density, weight):
    density, slack = max(density, least(name)), 1.0
    if least(name):  # drawn entry by entry, and in steps of that density: five standard deviations
        slack = weight.numel() * least(name) / 2 + 5 * (density * (1 - density) * weight.numel()) ** 0.5
    assert abs(region(name, weight, density=density).numel(weight) - density * weight.numel()) <= slack


@pytest.mark.parametrize("name", NAMES)
def test_an_array_gets_the_region_of_a_tensor(name, weight):
    assert region(name, weight.numpy()) == region(name, weight)


@pytest.mark.parametrize("name", NAMES)
def test_the_rule_is_the_region(name, weight):
    """What the kernels find again by the rule is what the region says."""
    found, host = region(name, weight), catalog.runtime("kernels.perturb.host")
    tensor = catalog.runtime("kernels.perturb").tensor_id("layer.weight")
    inside = host.inside(weight.numpy(), found.rule(), tensor)
    assert torch.equal(torch.from_numpy(inside), found.mask(weight))


@pytest.mark.parametrize("name", NAMES)
def test_choosing_from_arrays_does_not_import_torch(name):
    code = (
        "import sys, numpy\n"
        "from edgesft.core import catalog\n"
        f"chosen = catalog.build('select', {{'use': {name!r}}})\n"
        "weight = numpy.linspace(-1, 1, 60, dtype=numpy.float32).reshape(6, 10)\n"
        "chosen.region('layer', weight, None, 0.0).rule()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


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
