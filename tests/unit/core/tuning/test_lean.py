from contextlib import ExitStack

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from edgesft.core import quantized
from edgesft.core.tuning import lean


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
    with lean.in_place(nn.Sequential(block)) as count:
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
    with lean.in_place(block), Peak(7 * 80) as small:
        block(x)
    assert len(small.made) == 2 < len(plain.made)


@torch.no_grad()
def test_quantised_blocks_take_part():
    block = llama()
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(block, name)
        setattr(block, name, quantized.QuantizedLinear(quantized.quantize(linear.weight, 8, 16), linear.bias))
    x = torch.randn(2, 5, 32)
    expected = block(x)
    with lean.in_place(block) as count:
        assert count == 1
        assert torch.equal(block(x), expected)


def test_gradients_are_those_of_the_plain_block():
    block, x = llama(), torch.randn(2, 5, 32, requires_grad=True)
    (expected,) = torch.autograd.grad(block(x).square().sum(), x)
    with lean.in_place(block):
        (found,) = torch.autograd.grad(block(x).square().sum(), x)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_a_block_that_computes_something_else_is_left_alone():
    block, x = Other(), torch.randn(2, 8)
    expected = block(x)
    with lean.in_place(nn.ModuleList([block, llama()])) as count:
        assert count == 1
        assert "forward" not in vars(block)
        assert torch.equal(block(x), expected)


def test_blocks_are_put_back_after_an_error():
    block = llama()
    with pytest.raises(KeyError), lean.in_place(block):
        raise KeyError
    assert "forward" not in vars(block)


@pytest.mark.parametrize(("weight", "x"), [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)])
@torch.no_grad()
def test_a_norm_in_place_gives_the_same_bits(weight, x):
    norm = LlamaRMSNorm(40, eps=1e-5)
    norm.weight.normal_()
    x = (3 * torch.randn(2, 5, 40)).to(x)
    expected, kept = norm(x), x.clone()
    with lean.in_place(norm) as count:
        assert count >= 1
        assert torch.equal(norm(x), expected)
        assert torch.equal(x, kept)
    assert "forward" not in vars(norm)


def test_a_norm_of_another_formula_is_left_alone():
    with lean.in_place(GemmaRMSNorm(8)):  # multiplies by 1 + weight, and calls its epsilon `eps`
        pass
    odd = LlamaRMSNorm(8)
    odd.forward = lambda x: x
    with lean.in_place(odd):
        assert odd(1) == 1
    assert odd(1) == 1


def test_a_class_with_the_names_of_a_norm_that_does_something_else_is_left_alone():
    class Doubled(LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    norm = Doubled(8)
    with lean.in_place(norm):
        assert "forward" not in vars(norm)


def model(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=3, num_key_value_heads=1, **options)
    ).eval()


@torch.no_grad()
def test_a_whole_model_gives_the_same_bits_and_all_its_parts_take_part():
    llm, tokens, plain = model(), torch.randint(64, (2, 9)), modeling_llama.apply_rotary_pos_emb
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    expected = llm(tokens, attention_mask=mask).logits
    with lean.in_place(llm) as count:
        assert count == 2 + (2 * 2 + 1)  # blocks and norms
        assert modeling_llama.apply_rotary_pos_emb is not plain
        assert torch.equal(llm(tokens, attention_mask=mask).logits, expected)
    assert modeling_llama.apply_rotary_pos_emb is plain
    assert torch.equal(llm(tokens, attention_mask=mask).logits, expected)


def test_a_whole_model_has_the_same_gradients():
    llm, tokens = model(), torch.randint(64, (2, 9))

    def gradients():
        llm.zero_grad()
        llm(tokens, labels=tokens).loss.backward()
        return [p.grad.clone() for p in llm.parameters()]

    expected = gradients()
    with lean.in_place(llm):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))


@torch.no_grad()
def test_two_models_of_one_class_may_be_open_at_once():
    one, two, plain = model(), model(), modeling_llama.apply_rotary_pos_emb
    with ExitStack() as second:
        with lean.in_place(one):
            second.enter_context(lean.in_place(two))
        assert modeling_llama.apply_rotary_pos_emb is plain
    assert modeling_llama.apply_rotary_pos_emb is plain


def test_a_rotation_of_pairs_of_neighbours_is_left_alone(monkeypatch):
    def neighbours(q, k, cos, sin, unsqueeze_dim=1):
        def turn(x):
            other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
            return x * cos.unsqueeze(1) + other * sin.unsqueeze(1)

        return turn(q), turn(k)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", neighbours)
    with lean.in_place(model()):
        assert modeling_llama.apply_rotary_pos_emb is neighbours
