"""Laws of every method of the axis `objective`."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edgesft.core import catalog
from edgesft.core.data.batches import Batch

torch.set_num_threads(1)
NAMES = [n for n in catalog.names("objective") if not catalog.load("objective", n).needs]
VOCABULARY = 50


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def batch_of(kind, padding=0):
    """Four rows of 6, 9, 7 and 9 tokens, `padding` more columns on the right."""
    torch.manual_seed(3)
    lengths = [6, 9, 7, 9]
    width = max(lengths) + padding
    ids = torch.zeros(4, width, dtype=torch.int64)
    mask = torch.zeros(4, width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, VOCABULARY, (length,))
        mask[row, :length] = 1
    if kind == "labels":
        rows = torch.arange(4)
        positions = torch.tensor([row * width + length - 1 for row, length in enumerate(lengths)])
        choices, gold = torch.tensor([7, 11, 13]), torch.tensor([0, 2, 1, 1])
        weights = torch.full((4,), 0.25)
        return Batch(kind, ids, mask, positions, choices[gold], weights, rows, choices=choices, gold=gold)
    rows = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3])
    column = torch.tensor([3, 4, 4, 5, 6, 5, 6, 7])
    targets = ids[rows, column + 1]
    extra = {}
    if kind == "candidates":
        extra = {"example": torch.tensor([0, 0, 1, 1]), "gold": torch.tensor([1, 0])}
    weights = torch.full((8,), 1 / 8)
    return Batch(kind, ids, mask, rows * width + column, targets, weights, rows, **extra)


KINDS = ["lm", "labels", "candidates"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_a_finite_scalar_with_a_gradient(name, kind, model):
    objective = catalog.build("objective", {"use": name})
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.requires_grad_(True)
    try:
        loss = objective.loss(model, batch_of(kind), None)
        (gradient,) = torch.autograd.grad(loss, [weight])
    finally:
        weight.requires_grad_(False)
    assert loss.shape == ()
    assert bool(torch.isfinite(loss))
    assert float(gradient.norm()) > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(name, kind, model):
    objective = catalog.build("objective", {"use": name})
    plain = objective.loss(model, batch_of(kind), None)
    padded = objective.loss(model, batch_of(kind, padding=5), None)
    torch.testing.assert_close(plain, padded, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_same_twice(name, kind, model):
    objective = catalog.build("objective", {"use": name})
    assert torch.equal(*(objective.loss(model, batch_of(kind), None) for _ in range(2)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copies", [1, 3])
def test_stacked_copies_have_the_loss_of_one(name, kind, copies, model):
    objective = catalog.build("objective", {"use": name})
    found = objective.losses(model, batch_of(kind), copies)
    assert found.shape == (copies,)
    assert found.dtype is torch.float64
    one = objective.loss(model, batch_of(kind), None)
    torch.testing.assert_close(found, one.expand(copies), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_stacked_one_after_the_other(name, kind, model):
    """A layer that treats the second third of its rows otherwise changes the second loss only."""
    objective, layer = catalog.build("objective", {"use": name}), model.model.layers[0].mlp

    def scale(_, args, out):
        rows = out.shape[0] // 3
        return torch.cat([out[:rows], 3 * out[rows : 2 * rows], out[2 * rows :]])

    plain = objective.loss(model, batch_of(kind), None)
    handle = layer.register_forward_hook(lambda _, args, out: 3 * out)
    moved = objective.loss(model, batch_of(kind), None)
    handle.remove()
    handle = layer.register_forward_hook(scale)
    found = objective.losses(model, batch_of(kind), 3)
    handle.remove()
    assert abs(float(moved - plain)) > 1e-4
    torch.testing.assert_close(found, torch.stack([plain, moved, plain]), rtol=1e-6, atol=1e-6)
