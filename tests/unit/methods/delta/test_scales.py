import pytest
import torch
from torch import nn

from edgesft.core import catalog
from edgesft.core.errors import ArtifactError
from edgesft.core.region import Band, Whole, below
from edgesft.core.tuning import delta_file
from edgesft.core.tuning.tuned import Tuned
from edgesft.kernels import perturb
from edgesft.methods.delta.scales import Scales
from edgesft.methods.estimate.spsa import Spsa

torch.set_num_threads(1)


@pytest.mark.parametrize(("width", "groups"), [(8, 2), (9, 3), (3, 1)])
def test_one_multiplier_a_group_and_the_last_group_may_be_short(width, groups):
    weight = torch.randn(2, width)
    theta = Scales(group=4).init(weight, Whole(), torch.Generator())
    assert theta["scale"].shape == (2, groups)
    theta["scale"] += torch.arange(2 * groups).view(2, groups)
    found = Scales(group=4).effective(weight, Whole(), theta, 1.0)
    for row in range(2):
        for column in range(width):
            expected = weight[row, column] * (1 + row * groups + column // 4)
            assert found[row, column] == expected


def test_only_the_region_is_scaled():
    weight = torch.tensor([[0.1, -2.0, 0.0, 3.0]])
    theta = {"scale": torch.tensor([[2.0, 10.0]])}
    found = Scales(group=2).effective(weight, below(1.0), theta, 1.0)
    assert torch.equal(found, torch.tensor([[0.2, -2.0, 0.0, 3.0]]))


def tuned_of(region, layer):
    scales, model = Scales(group=4), nn.Sequential(layer)
    return Tuned(model, {"0": layer}, {"0": region}, scales, in_place=False, kernel=perturb, seed=0)


@pytest.mark.parametrize("region", [Whole(), Band(0.05, 0.3)], ids=["whole", "band"])
def test_tuned_by_forward_passes_stored_and_merged(region, tmp_path):
    torch.manual_seed(0)
    layer, x, y = nn.Linear(10, 6).requires_grad_(False), torch.randn(64, 10), torch.randn(64, 6)
    base = layer.weight.clone()
    with tuned_of(region, layer) as tuned, torch.no_grad():

        def loss(shift):
            with tuned.shifted(shift):
                return (tuned.model(x) - y).square().mean()

        before = float(loss(None))
        for step in range(300):
            gradient = Spsa(noise="rademacher", eps=1e-2).gradient(loss, tuned.theta, step)
            for name, direction in gradient.items():
                tuned.theta[name].sub_(0.1 * direction)
        assert float(loss(None)) < before - 0.05
        assert torch.equal(layer.weight, base)
        expected = tuned.model(x)
        table = catalog.describe("delta", Scales(group=4))
        delta_file.save(tmp_path, tuned, table)
    merged = delta_file.load(tmp_path).effective("0", base)
    torch.testing.assert_close(nn.functional.linear(x, merged, layer.bias), expected)
    assert torch.equal(merged != base, region.mask(base))


def test_a_stored_shape_that_does_not_fit_is_refused(tmp_path):
    layer = nn.Linear(10, 6).requires_grad_(False)
    with tuned_of(Whole(), layer) as tuned:
        tuned.layers["0"].theta["scale"] = torch.ones(6, 2)
        delta_file.save(tmp_path, tuned, catalog.describe("delta", Scales(group=4)))
    with pytest.raises(ArtifactError, match="does not fit"):
        delta_file.load(tmp_path).effective("0", layer.weight)
