import pytest
import torch
from torch import nn
from transformers import GemmaConfig, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from edgesft.core import gated, quantized


def llama(**options):
    torch.manual_seed(0)
    return LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=80, **options))


def gelu():
    torch.manual_seed(0)
    return GemmaMLP(GemmaConfig(hidden_size=32, intermediate_size=80))


class Other(nn.Module):
    """The parts of a gated block, put together in another way."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 16), nn.Linear(8, 16)
        self.down_proj, self.act_fn = nn.Linear(16, 8), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class Peak(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the tensors of one size that operations have made."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.made = numel, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.numel() == self.numel:
            self.made.add(found.data_ptr())
        return found


@pytest.mark.parametrize("make", [llama, lambda: llama(hidden_act="relu", mlp_bias=True), gelu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_block_in_place_gives_the_same_bits(make, dtype):
    block = make().to(dtype)
    x = torch.randn(3, 7, 32).to(dtype)
    expected, kept = block(x), x.clone()
    with gated.in_place(nn.Sequential(block)) as count:
        assert count == 1
        assert torch.equal(block(x), expected)
        assert torch.equal(x, kept)
    assert "forward" not in vars(block)
    assert torch.equal(block(x), expected)


@torch.no_grad()
def test_a_block_of_silu_makes_two_tensors_of_its_width_and_not_four():
    block, x = llama(), torch.randn(1, 7, 32)
    with Peak(7 * 80) as plain:
        block(x)
    with gated.in_place(block), Peak(7 * 80) as lean:
        block(x)
    assert len(lean.made) == 2 < len(plain.made)


@torch.no_grad()
def test_quantised_blocks_take_part():
    block = llama()
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(block, name)
        setattr(block, name, quantized.QuantizedLinear(quantized.quantize(linear.weight, 8, 16), linear.bias))
    x = torch.randn(2, 5, 32)
    expected = block(x)
    with gated.in_place(block) as count:
        assert count == 1
        assert torch.equal(block(x), expected)


def test_gradients_are_those_of_the_plain_block():
    block, x = llama(), torch.randn(2, 5, 32, requires_grad=True)
    (expected,) = torch.autograd.grad(block(x).square().sum(), x)
    with gated.in_place(block):
        (found,) = torch.autograd.grad(block(x).square().sum(), x)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_a_block_that_computes_something_else_is_left_alone():
    block, x = Other(), torch.randn(2, 8)
    expected = block(x)
    with gated.in_place(nn.ModuleList([block, llama()])) as count:
        assert count == 1
        assert "forward" not in vars(block)
        assert torch.equal(block(x), expected)


def test_blocks_are_put_back_after_an_error():
    block = llama()
    with pytest.raises(KeyError), gated.in_place(block):
        raise KeyError
    assert "forward" not in vars(block)
