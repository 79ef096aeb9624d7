"""A folder of the shape of Llama-3.2-1B with random 2:4 weights: llama_1b.py OUT."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from edgesft.core import models, nm

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 8192,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def main(out: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    key = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.02

    weights = {
        "model.embed_tokens.weight": drawn(CONFIG["vocab_size"], hidden).bfloat16(),
        "model.norm.weight": torch.ones(hidden).bfloat16(),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        for part, shape in shapes.items():
            weight = drawn(*shape)
            weights[f"{name}.{part}.weight"] = (weight * nm.keep_groups(weight.abs(), 2, 4)).bfloat16()
        for part in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{name}.{part}.weight"] = torch.ones(hidden).bfloat16()
    out.mkdir(parents=True)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(CONFIG, indent=1))
    models.copy_files(models.resolve("demo:smollm2-135m").path, out)  # a tokenizer, of a smaller vocabulary
    (out / "config.json").write_text(json.dumps(CONFIG, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
