"""compress:wanda: what its paper promises, on inputs made for it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from edgesft.core.signals import Statistics
from edgesft.methods.compress.magnitude import Magnitude
from edgesft.methods.compress.wanda import Wanda

torch.set_num_threads(1)


def of(inputs: Tensor) -> Any:  # (tokens, in)
    return SimpleNamespace(input_sq=lambda name: inputs.square().mean(0))


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def inputs() -> Tensor:
    rng = torch.Generator().manual_seed(2)
    return torch.randn(200, 64, generator=rng) * torch.logspace(-2, 2, 64)


def test_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    inputs = torch.tensor([[10.0, 1.0, 1.0, 1.0]])  # scores 10, 2, 3, 4
    assert torch.equal(Wanda().compress("w", weight, of(inputs)), torch.tensor([[1.0, 0, 0, 4.0]]))


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_equal_inputs_give_the_magnitude_mask(weight: Tensor, pattern: str) -> None:
    new = Wanda(pattern=pattern).compress("w", weight, of(torch.full((5, 64), 0.37)))
    assert torch.equal(new, Magnitude(pattern=pattern).compress("w", weight, Statistics()))


@pytest.mark.parametrize("scale", [1e-4, 3.0, 1e5])
def test_rescaling_all_inputs_changes_nothing(weight: Tensor, inputs: Tensor, scale: float) -> None:
    once = Wanda().compress("w", weight, of(inputs))
    assert torch.equal(Wanda().compress("w", weight, of(inputs * scale)), once)
    assert not torch.equal(once, Magnitude().compress("w", weight, Statistics()))


def test_kept_weights_are_untouched(weight: Tensor, inputs: Tensor) -> None:
    new = Wanda().compress("w", weight, of(inputs))
    assert torch.equal(new[new != 0], weight[new != 0])


def test_unstructured_compares_within_each_row(weight: Tensor, inputs: Tensor) -> None:
    scaled = weight * torch.logspace(-3, 3, 24).unsqueeze(1)
    new = Wanda(pattern=None, density=0.3).compress("w", scaled, of(inputs))
    assert ((new != 0).sum(1) == 64 - int(64 * 0.7)).all()


def test_a_silent_input_goes_first(weight: Tensor, inputs: Tensor) -> None:
    inputs[:, 7] = 0
    assert (Wanda().compress("w", weight * 1e-3 + 1, of(inputs))[:, 7] == 0).all()
