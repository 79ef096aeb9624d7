import math

import pytest
import torch
from torch import nn

from edgesft.methods.delta.lora import Lora

torch.set_num_threads(1)


def theta_of(lora, layer):
    return lora.init_output(layer, torch.Generator().manual_seed(0))


def test_shapes_scale_and_start():
    layer = nn.Linear(40, 24)
    theta = theta_of(Lora(rank=8), layer)
    assert theta["A"].shape == (8, 40)
    assert theta["B"].shape == (24, 8)
    assert float(theta["B"].abs().max()) == 0
    assert 0.9 / math.sqrt(40) < float(theta["A"].abs().max()) <= 1 / math.sqrt(40)
    assert Lora(rank=8, alpha=4).scale == 0.5
    assert Lora(rank=16, alpha=4, rslora=True).scale == 1.0


def test_full_rank_fits_any_change():
    """r = min(in, out): B A spans every matrix, so a random target is reached."""
    torch.manual_seed(0)
    layer, lora = nn.Linear(6, 10, bias=False).requires_grad_(False), Lora(rank=6, alpha=6)
    target = torch.randn(10, 6)
    theta = {k: nn.Parameter(v) for k, v in theta_of(lora, layer).items()}
    optimizer = torch.optim.LBFGS(list(theta.values()), max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (lora.fold(layer.weight, None, theta)[0] - target).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(closure().detach()) < 1e-8


def test_dropout_acts_only_while_gradients_are_recorded():
    layer, lora = nn.Linear(50, 5), Lora(rank=4, dropout=0.5)
    theta = theta_of(lora, layer) | {"B": torch.ones(5, 4)}
    x = torch.randn(3, 50)
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(lora.output(x, y, theta), Lora(rank=4).output(x, y, theta))
    assert not torch.equal(lora.output(x, y, theta), lora.output(x, y, theta))


def test_the_bias_is_left_alone():
    layer = nn.Linear(5, 5)
    assert Lora(rank=2).fold(layer.weight, layer.bias, theta_of(Lora(rank=2), layer))[1] is layer.bias


@pytest.mark.parametrize("rank", [1, 64])
def test_ranks_beyond_the_matrix_are_allowed(rank):
    layer, x = nn.Linear(5, 7), torch.randn(2, 5)
    lora = Lora(rank=rank)
    assert torch.equal(lora.output(x, layer(x), theta_of(lora, layer)), layer(x))
