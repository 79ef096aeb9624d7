"""One description of a decoder language model, read from config.json and the names in its safetensors.

Nothing is traced and nothing is loaded: the description says what a block is made of and which tensor
plays which role, and a dialect turns it into a runtime's best operations. Families: Llama (Llama, SmolLM,
Mistral with its sliding window), Qwen2 (biases on q, k, v), Qwen3 (norms on every head of q and k).
What a description cannot say is named by `problems`; such a model takes the traced path.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgesft.core.errors import ArtifactError
from edgesft.core.models import read_config
from edgesft.core.tokens import read_json
from edgesft.exporters.rope import Rope, from_config
from edgesft.exporters.weights import Arrays

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Positions that get a row in the rotary tables. A table of 131,072 rows would be larger than the weights
# of a small model at 4 bits, and no edge device has the KV cache for it.
MAX_CONTEXT = 32_768


@dataclass(frozen=True)
class Block:
    """Names of one block's tensors by role; None where the block has no such tensor.

    window: how many tokens back, itself included, a token looks; 0: all.
    """

    prefix: str
    window: int
    attention_norm: str
    q: str
    k: str
    v: str
    o: str
    q_bias: str | None
    k_bias: str | None
    v_bias: str | None
    o_bias: str | None
    q_norm: str | None
    k_norm: str | None
    mlp_norm: str
    gate: str
    up: str
    down: str
    gate_bias: str | None
    up_bias: str | None
    down_bias: str | None

    def tensors(self) -> list[str]:
        """Every tensor name of the block."""
        return [v for k, v in vars(self).items() if k not in ("prefix", "window") and v is not None]


@dataclass(frozen=True)
class Decoder:
    """A decoder language model: sizes, rotary positions, and tensor names by role.

    context: positions the rotary tables cover. head: the embedding's own name if the two are tied.
    eos: ids that end a text.
    """

    family: str
    architecture: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    context: int
    eps: float
    rope: Rope
    embedding: str
    final_norm: str
    head: str
    head_bias: str | None
    blocks: tuple[Block, ...]
    eos: tuple[int, ...]

    @property
    def tied(self) -> bool:
        return self.head == self.embedding

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim


def problems(folder: Path) -> list[str]:
    """Why this model has no description here; empty if it has one. Raises ArtifactError for a broken one."""
    config = read_config(folder)
    found = _config_problems(config)
    if found:
        return found
    try:
        used = _names(_described(folder, config, Arrays(folder)))
    except _Unknown as error:
        return [str(error)]
    stray = [n for n in Arrays(folder).names() if n not in used and not n.endswith("rotary_emb.inv_freq")]
    return [f"a tensor `{stray[0]}`"] if stray else []


def describe(folder: Path) -> Decoder:
    """The description of a model folder. Raises ArtifactError if it has none or misses a tensor."""
    found = problems(folder)
    if found:
        raise ArtifactError(f"`{folder}` has {found[0]}, which the direct builder does not know")
    return _described(folder, read_config(folder), Arrays(folder))


class _Unknown(Exception):
    """The weights show something that the config does not say."""


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    family = config.get("model_type")
    if family not in FAMILIES:
        return [f"architecture `{family}`"]
    found = []
    names = [str(n) for n in config.get("architectures") or []]
    if names and not any(n.endswith("ForCausalLM") for n in names):
        found.append(f"the task head of `{names[0]}`")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        found.append(f"activation `{config['hidden_act']}`")
    dim = _head_dim(config)
    if dim % 8:
        found.append(f"heads of {dim} channels, not a multiple of 8")
    _, reason = from_config(config, dim)
    if reason:
        found.append(reason)
    return found


def _described(folder: Path, config: Mapping[str, Any], weights: Arrays) -> Decoder:
    heads = _size(config, "num_attention_heads")
    hidden = _size(config, "hidden_size")
    layers = _size(config, "num_hidden_layers")
    dim = _head_dim(config)
    rope, _ = from_config(config, dim)
    assert rope is not None  # _config_problems came first
    embedding = _first(weights, "model.embed_tokens.weight", "embed_tokens.weight")
    root = embedding.removesuffix("embed_tokens.weight")
    windows = _windows(config, layers)
    decoder = Decoder(
        family=str(config["model_type"]),
        architecture=str((config.get("architectures") or ["unknown"])[0]),
        hidden=hidden,
        intermediate=_size(config, "intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=dim,
        vocabulary=weights.shape(embedding)[0],
        context=min(MAX_CONTEXT, int(config.get("max_position_embeddings") or 2048)),
        eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=rope,
        embedding=embedding,
        final_norm=f"{root}norm.weight",
        head=_head(config, weights, embedding, folder),
        head_bias="lm_head.bias" if "lm_head.bias" in weights else None,
        blocks=tuple(_block(weights, f"{root}layers.{i}.", windows[i]) for i in range(layers)),
        eos=_eos(folder, config),
    )
    _check_shapes(decoder, weights)
    return decoder


def _block(weights: Arrays, prefix: str, window: int) -> Block:
    def maybe(name: str) -> str | None:
        return prefix + name if prefix + name in weights else None

    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    return Block(
        prefix=prefix.removesuffix("."),
        window=window,
        attention_norm=prefix + "input_layernorm.weight",
        q=attention + "q_proj.weight",
        k=attention + "k_proj.weight",
        v=attention + "v_proj.weight",
        o=attention + "o_proj.weight",
        q_bias=maybe("self_attn.q_proj.bias"),
        k_bias=maybe("self_attn.k_proj.bias"),
        v_bias=maybe("self_attn.v_proj.bias"),
        o_bias=maybe("self_attn.o_proj.bias"),
        q_norm=maybe("self_attn.q_norm.weight"),
        k_norm=maybe("self_attn.k_norm.weight"),
        mlp_norm=prefix + "post_attention_layernorm.weight",
        gate=mlp + "gate_proj.weight",
        up=mlp + "up_proj.weight",
        down=mlp + "down_proj.weight",
        gate_bias=maybe("mlp.gate_proj.bias"),
        up_bias=maybe("mlp.up_proj.bias"),
        down_bias=maybe("mlp.down_proj.bias"),
    )


def _windows(config: Mapping[str, Any], layers: int) -> list[int]:
    """Window of each layer. Qwen asks for it with `use_sliding_window`; Mistral has it by its size alone."""
    size = config.get("sliding_window")
    if not size or not config.get("use_sliding_window", config["model_type"] == "mistral"):
        return [0] * layers
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        return [int(size) if kind == "sliding_attention" else 0 for kind in kinds]
    first = int(config.get("max_window_layers", 0)) if str(config["model_type"]).startswith("qwen") else 0
    return [int(size) if i >= first else 0 for i in range(layers)]


def _head(config: Mapping[str, Any], weights: Arrays, embedding: str, folder: Path) -> str:
    if "lm_head.weight" in weights:
        copied = config.get("tie_word_embeddings") and np.array_equal(
            weights.get("lm_head.weight"), weights.get(embedding)
        )
        return embedding if copied else "lm_head.weight"
    # The absence of the head says that it is tied: the writers leave a tied copy out.
    if not config.get("tie_word_embeddings", False):  # the default of every family here
        raise ArtifactError(f"`{folder}` has no tensor `lm_head.weight`, and its config ties no embeddings")
    return embedding


def _eos(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end a text: those of generation_config.json if it names any, else those of the config."""
    generation = read_json(folder / "generation_config.json", missing={})
    value = generation.get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    if value is None:
        return ()
    return tuple(int(v) for v in (value if isinstance(value, list) else [value]))


def _check_shapes(decoder: Decoder, weights: Arrays) -> None:
    """Raises ArtifactError for an absent tensor or one whose shape is not what the config says."""
    d = decoder
    expected: dict[str, tuple[int, ...]] = {
        d.embedding: (d.vocabulary, d.hidden),
        d.head: (d.vocabulary, d.hidden),
        d.final_norm: (d.hidden,),
    }
    for block in d.blocks:
        if (block.q_norm is None) != (block.k_norm is None):
            raise _Unknown(f"a norm on only one of q and k in `{block.prefix}`")
        biases = ((block.q_bias, block.k_bias, block.v_bias), (block.gate_bias, block.up_bias))
        if any(None in stacked and any(stacked) for stacked in biases):
            raise _Unknown(f"biases on some of the matrices in `{block.prefix}`, not on all")
        expected |= _block_shapes(d, block)
    if d.head_bias:
        expected[d.head_bias] = (d.vocabulary,)
    for name, shape in expected.items():
        if name not in weights:
            raise ArtifactError(f"`{weights.folder}` has no tensor `{name}`")
        if weights.shape(name) != shape:
            found = list(weights.shape(name))
            raise ArtifactError(f"`{name}` in `{weights.folder}` has shape {found}, expected {list(shape)}")


def _block_shapes(d: Decoder, b: Block) -> dict[str, tuple[int, ...]]:
    shapes: dict[str | None, tuple[int, ...]] = {
        b.attention_norm: (d.hidden,),
        b.mlp_norm: (d.hidden,),
        b.q: (d.q_width, d.hidden),
        b.k: (d.kv_width, d.hidden),
        b.v: (d.kv_width, d.hidden),
        b.o: (d.hidden, d.q_width),
        b.gate: (d.intermediate, d.hidden),
        b.up: (d.intermediate, d.hidden),
        b.down: (d.hidden, d.intermediate),
        b.q_bias: (d.q_width,),
        b.k_bias: (d.kv_width,),
        b.v_bias: (d.kv_width,),
        b.o_bias: (d.hidden,),
        b.q_norm: (d.head_dim,),
        b.k_norm: (d.head_dim,),
        b.gate_bias: (d.intermediate,),
        b.up_bias: (d.intermediate,),
        b.down_bias: (d.hidden,),
    }
    return {name: shape for name, shape in shapes.items() if name is not None}


def _names(decoder: Decoder) -> set[str]:
    names = {decoder.embedding, decoder.head, decoder.final_norm, "lm_head.weight"}  # a tied copy is no stray
    names.update(n for block in decoder.blocks for n in block.tensors())
    return names | ({decoder.head_bias} if decoder.head_bias else set())


def _size(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise ArtifactError(f"`{key}` in config.json is `{value}`, expected a positive integer")
    return value


def _head_dim(config: Mapping[str, Any]) -> int:
    if config.get("head_dim") is not None:
        return _size(config, "head_dim")
    return _size(config, "hidden_size") // _size(config, "num_attention_heads")


def _first(weights: Arrays, *names: str) -> str:
    for name in names:
        if name in weights:
            return name
    raise ArtifactError(f"`{weights.folder}` has no tensor `{names[0]}`")
