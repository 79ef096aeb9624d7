"""The description of a decoder says what its folder says, and names what it cannot say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from edgesft.core.errors import ArtifactError
from edgesft.exporters.decoder import MAX_CONTEXT, describe, problems

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
Edit = Callable[[dict[str, torch.Tensor]], None]


def _save(folder: Path, config: PretrainedConfig) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def _edit_weights(folder: Path, edit: Edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return _save(tmp_path / "llama", LlamaConfig(**SIZES, eos_token_id=[1, 2]))


def test_llama(llama: Path) -> None:
    d = describe(llama)
    assert problems(llama) == []
    assert (d.family, d.architecture) == ("llama", "LlamaForCausalLM")
    assert (d.hidden, d.intermediate, d.layers, d.heads, d.kv_heads, d.head_dim) == (32, 48, 2, 4, 2, 8)
    assert (d.vocabulary, d.context, d.eos) == (64, 128, (1, 2))
    assert not d.tied
    assert d.head == "lm_head.weight"
    assert d.blocks[1].q == "model.layers.1.self_attn.q_proj.weight"
    assert d.blocks[1].q_bias is None
    assert d.blocks[1].q_norm is None
    assert d.blocks[1].window == 0


def test_qwen2_has_biases(tmp_path: Path) -> None:
    block = describe(_save(tmp_path, Qwen2Config(**SIZES))).blocks[0]
    assert block.v_bias == "model.layers.0.self_attn.v_proj.bias"
    assert block.o_bias is None


def test_qwen3_has_norms_and_wide_heads(tmp_path: Path) -> None:
    d = describe(_save(tmp_path, Qwen3Config(**SIZES, head_dim=16)))
    assert d.blocks[0].k_norm == "model.layers.0.self_attn.k_norm.weight"
    assert (d.head_dim, d.q_width, d.kv_width) == (16, 64, 32)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (MistralConfig(**SIZES, sliding_window=5), [5, 5]),
        (MistralConfig(**SIZES, sliding_window=None), [0, 0]),
        (Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1), [0, 6]),
        (Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=6), [0, 0]),
    ],
)
def test_windows(tmp_path: Path, config: PretrainedConfig, windows: list[int]) -> None:
    assert [b.window for b in describe(_save(tmp_path, config)).blocks] == windows


def test_windows_of_an_old_config_without_layer_types(tmp_path: Path) -> None:
    config = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1)
    _edit_config(_save(tmp_path, config), layer_types=None)
    assert [b.window for b in describe(tmp_path).blocks] == [0, 6]


def test_tied(tmp_path: Path) -> None:
    d = describe(_save(tmp_path, LlamaConfig(**SIZES, tie_word_embeddings=True)))
    assert d.tied
    assert d.head == d.embedding == "model.embed_tokens.weight"


@pytest.mark.parametrize(("change", "tied"), [(0.0, True), (1.0, False)])
def test_a_tied_head_with_a_copy_of_its_own(tmp_path: Path, change: float, tied: bool) -> None:
    _save(tmp_path, LlamaConfig(**SIZES, tie_word_embeddings=True))

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change

    _edit_weights(tmp_path, edit)
    assert problems(tmp_path) == []
    assert describe(tmp_path).tied is tied


def test_a_long_context_is_cut(llama: Path) -> None:
    _edit_config(llama, max_position_embeddings=131072)
    assert describe(llama).context == MAX_CONTEXT


def test_generation_config_decides_about_the_end(llama: Path) -> None:
    (llama / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert describe(llama).eos == (7,)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"model_type": "gemma"}, "gemma"),
        ({"head_dim": 6}, "6 channels"),
    ],
)
def test_what_is_not_described_is_named(llama: Path, values: dict[str, Any], said: str) -> None:
    _edit_config(llama, **values)
    assert any(said in p for p in problems(llama))
    with pytest.raises(ArtifactError, match="direct builder"):
        describe(llama)


def test_a_tensor_without_a_role_is_named(llama: Path) -> None:
    _edit_weights(llama, lambda t: t.update({"model.layers.0.extra.weight": torch.zeros(3)}))
    assert problems(llama) == ["a tensor `model.layers.0.extra.weight`"]


def test_a_bias_on_one_of_three_is_named(llama: Path) -> None:
    _edit_weights(llama, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}))
    assert "biases" in problems(llama)[0]


def test_other_architectures(tmp_path: Path) -> None:
    gpt2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2)
    assert problems(_save(tmp_path / "a", gpt2)) == ["architecture `gpt2`"]
    LlamaForSequenceClassification(LlamaConfig(**SIZES, pad_token_id=0)).save_pretrained(tmp_path / "b")
    assert "LlamaForSequenceClassification" in problems(tmp_path / "b")[0]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            "no tensor `model.layers.1.mlp.up_proj.weight`",
        ),
        (lambda t: t.pop("lm_head.weight"), "ties no embeddings"),
        (lambda t: t.pop("model.embed_tokens.weight"), "no tensor `model.embed_tokens.weight`"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(5)}),
            r"`model.norm.weight` .* shape \[5\], expected \[32\]",
        ),
    ],
)
def test_broken_folders(llama: Path, edit: Edit, said: str) -> None:
    _edit_weights(llama, edit)
    with pytest.raises(ArtifactError, match=said):
        describe(llama)


def test_a_config_without_sizes(llama: Path) -> None:
    _edit_config(llama, num_hidden_layers=0)
    with pytest.raises(ArtifactError, match=r"`num_hidden_layers` in config\.json is `0`"):
        describe(llama)
