"""Laws of every method of the axis `delta`."""

import pytest
import torch
from torch import nn

from edgesft.core import catalog
from edgesft.core.region import Whole, below, kth_smallest_magnitude

torch.set_num_threads(1)
# Those that move quantised weights themselves have no float weight to begin at, so other laws hold for them.
NAMES = [n for n in catalog.names("delta") if not getattr(catalog.load("delta", n), "needs_quantized", False)]


@pytest.fixture
def layer():
    torch.manual_seed(5)
    return nn.Linear(24, 16).requires_grad_(False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def quarter(weight):
    return below(kth_smallest_magnitude(weight, weight.numel() // 4))


def start(delta, layer, region, seed=0):
    if hasattr(delta, "output"):
        return delta.init_output(layer, generator(seed))
    return delta.init(layer.weight, region, generator(seed))


def adapted(delta, layer, region, theta, x):
    if hasattr(delta, "output"):
        return delta.output(x, layer(x), theta)
    return nn.functional.linear(x, delta.effective(layer.weight, region, theta, 1.0), layer.bias)


@pytest.mark.parametrize("name", NAMES)
def test_begins_at_the_base(name, layer):
    delta, x = catalog.build("delta", {"use": name}), torch.randn(5, 24)
    for region in (Whole(), quarter(layer.weight)):
        theta = start(delta, layer, region)
        assert torch.equal(adapted(delta, layer, region, theta, x), layer(x))


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bytes(name, layer):
    delta = catalog.build("delta", {"use": name})
    first, second = (start(delta, layer, Whole(), seed=4) for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", NAMES)
def test_every_value_of_theta_learns_and_the_base_does_not(name, layer):
    delta, x = catalog.build("delta", {"use": name}), torch.randn(64, 24)
    region = quarter(layer.weight)
    theta = {k: (v + 0.1).requires_grad_(True) for k, v in start(delta, layer, region).items()}
    before = layer.weight.clone()
    adapted(delta, layer, region, theta, x).square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).all()) for p in theta.values())
    assert torch.equal(layer.weight, before)
    assert layer.weight.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_folded_equals_adapted(name, layer):
    delta, x = catalog.build("delta", {"use": name}), torch.randn(7, 24)
    region = quarter(layer.weight)
    theta = {k: v + 0.05 * torch.randn_like(v) for k, v in start(delta, layer, region).items()}
    expected = adapted(delta, layer, region, theta, x)
    if hasattr(delta, "fold"):
        weight, bias = delta.fold(layer.weight, layer.bias, theta)
    else:
        weight, bias = delta.effective(layer.weight, region, theta, 1.0), layer.bias
    assert not torch.equal(weight, layer.weight)
    torch.testing.assert_close(nn.functional.linear(x, weight, bias), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in NAMES if not hasattr(catalog.load("delta", n), "output")])
def test_weight_deltas_respect_their_region(name, layer):
    delta, region = catalog.build("delta", {"use": name}), quarter(layer.weight)
    theta = {k: v + 1 for k, v in start(delta, layer, region).items()}
    changed = delta.effective(layer.weight, region, theta, 1.0) != layer.weight
    assert torch.equal(changed, region.mask(layer.weight))
