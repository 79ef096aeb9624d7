"""Tiny models that are 2:4 in their blocks, and their exports, for the tests of this folder."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from edgesft.exporters import onnx as exporter
from edgesft.exporters.dialects.graph import Precision
from edgesft.exporters.dialects.packed import KINDS, Choice

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": lambda: LlamaConfig(**SIZES, intermediate_size=96, tie_word_embeddings=True),
    "llama-biased": lambda: LlamaConfig(**SIZES, intermediate_size=96, attention_bias=True, mlp_bias=True),
    "llama-odd": lambda: LlamaConfig(**{**SIZES, "hidden_size": 48, "head_dim": 16}, intermediate_size=72),
    "qwen2": lambda: Qwen2Config(**SIZES, intermediate_size=80),
    "qwen3": lambda: Qwen3Config(**SIZES, intermediate_size=96, head_dim=32, tie_word_embeddings=True),
}


def make_sparse(folder: Path, config: PretrainedConfig, dense: str = "none") -> Path:
    """A random model that is 2:4 in its blocks, but for weights with `dense` in their names."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.08 if parameter.dim() > 1 else 0.2) * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, w in tensors.items():
        if "proj" in name and dense not in name and w.ndim == 2:
            groups = w.reshape(w.shape[0], -1, 4)
            groups.scatter_(-1, groups.abs().argsort(-1)[..., :2], 0.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def exported(root: Path, family: str = "llama", dense: str = "none", **options) -> tuple[Path, Path]:
    precision = options.pop("precision", Precision("int4", 32, 0))
    model, out = make_sparse(root / "model", FAMILIES[family](), dense), root / "out"
    out.mkdir()
    exporter.export(model, out, precision, sparse=options.pop("sparse", "always"))
    return model, out


def by_turns():
    """A choice that takes packed, tiled and MatMulNBits by turns."""
    count = iter(range(1000))

    def turns(layer):
        kinds = KINDS if layer.sparse else KINDS[1:]
        return Choice(kinds[next(count) % len(kinds)])

    return turns
