"""A folder of a Llama model -> GGUF, quantised to Q4_0 by llama.cpp itself: make_gguf.py FOLDER OUT.

Without a tokenizer: the benchmark speaks in tokens. Run by the environment that has llama_cpp.
"""

import json
import os
import sys
from pathlib import Path

import gguf
import llama_cpp as ll
import torch
from safetensors.torch import load_file

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary halves -> neighbours, as llama.cpp has them."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def rope_factors(config: dict, dim: int) -> torch.Tensor | None:
    """The divisors of Llama 3.1's stretched frequencies (Grattafiori et al., 2024), None without them."""
    said = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if said.get("rope_type") != "llama3":
        return None
    theta = config.get("rope_theta") or said["rope_theta"]
    wave = 2 * torch.pi * theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    old = said["original_max_position_embeddings"]
    low, high = old / said["low_freq_factor"], old / said["high_freq_factor"]
    share = (old / wave - said["low_freq_factor"]) / (said["high_freq_factor"] - said["low_freq_factor"])
    middle = 1 / ((1 - share) / said["factor"] + share)
    factors = torch.where(wave > low, torch.full_like(wave, said["factor"]), middle)
    return torch.where(wave < high, torch.ones_like(wave), factors).float()


def main(folder: Path, out: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim") or config["hidden_size"] // heads
    whole = out.with_suffix(".f16")
    writer = gguf.GGUFWriter(whole, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_rope_dimension_count(dim)
    theta = config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("no_vocab")
    factors = rope_factors(config, dim)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    for name, weight in weights.items():
        parts = name.removesuffix(".weight").removeprefix("model.")
        if parts == "embed_tokens":
            target = "token_embd"
        elif parts == "norm":
            target = "output_norm"
        elif parts == "lm_head":
            target = "output"
        else:
            _, layer, rest = parts.split(".", 2)
            target = f"blk.{layer}.{_NAMES[rest]}"
        if target.endswith("attn_q"):
            weight = permuted(weight, heads)
        if target.endswith("attn_k"):
            weight = permuted(weight, kv)
        kind = torch.float32 if weight.ndim == 1 else torch.float16
        writer.add_tensor(f"{target}.weight", weight.to(kind).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    options = ll.llama_model_quantize_default_params()
    options.ftype = ll.LLAMA_FTYPE_MOSTLY_Q4_0
    options.nthread = os.cpu_count() or 1
    if ll.llama_model_quantize(str(whole).encode(), str(out).encode(), options):
        raise SystemExit("llama.cpp cannot quantise the model")
    whole.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
