import pytest
import torch

from edgesft.core import catalog
from edgesft.core.errors import UsageError
from edgesft.core.protocols import Mask
from edgesft.core.region import Whole
from edgesft.methods.select.random import Random

torch.set_num_threads(1)
W = torch.zeros(6, 10)


def rule(**values):
    return Random(**values).region("layer", W, None, 0.0).rule()


@pytest.mark.parametrize(
    ("density", "keep"), [(1 / 256, 1), (0.25, 64), (0.2, 51), (0.5, 128), (0.997, 255), (0.9999, 255)]
)
def test_the_share_is_in_256ths(density, keep):
    assert rule(density=density, seed=7) == Mask(keep=keep, seed=7)


def test_density_one_is_the_whole_tensor():
    assert isinstance(Random(density=1.0).region("layer", W, None, 0.0), Whole)


def test_layers_differ_and_seeds_differ():
    weight = torch.randn(64, 64)
    masks = [
        Random(seed=seed).region(name, weight, None, 0.0).mask(weight)
        for seed, name in ((0, "one"), (0, "two"), (1, "one"))
    ]
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("density", [0.001, 0.0, 1.5])
def test_shares_that_cannot_be_kept_are_refused(density):
    with pytest.raises(UsageError, match=r"select:random\.density"):
        catalog.build("select", {"use": "random", "density": density})
