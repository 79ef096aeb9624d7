"""A GGUF file as an ordinary Hugging Face folder with float32 weights.

transformers marks a model read from GGUF as quantised and refuses to save it although its weights are
plain float32, so the folder is written here. Its BPE tokenizers come out without the splitting rule of
their family (`tokenizer.ggml.pre`), which is put back.
"""

import json
from pathlib import Path
from typing import Any

from edgesft.core.artifact import write_json
from edgesft.core.errors import ArtifactError
from edgesft.core.tokens import read_json
from edgesft.core.weights import Planned, check_finite, write_folder

MAGIC = b"GGUF"
DIGITS_APART = {"smollm", "starcoder", "refact", "command-r"}  # each digit is a token of its own


def convert(source: Path, out: Path) -> None:
    """Write config.json, generation_config.json, the tokenizer's files and model.safetensors into `out`.

    Raises ArtifactError when `source` is no GGUF file, truncated, or of an architecture that transformers
    cannot read.
    """
    check_magic(source)
    pre = _pre(source)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(source.parent), gguf_file=source.name, local_files_only=True, trust_remote_code=False
        )
        model = AutoModelForCausalLM.from_pretrained(
            str(source.parent),
            gguf_file=source.name,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
        )
    except Exception as error:  # whatever the readers of an untrusted file raise
        raise ArtifactError(f"`{source}` cannot be read as GGUF: {_first_line(error)}") from None
    tokenizer.save_pretrained(out)
    _mend_tokenizer(out, pre)
    _write_configs(model, out)
    tied = (
        set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    )
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    for name, tensor in state.items():
        check_finite(name, tensor)
    write_folder(
        out, [Planned(n, "F32", tuple(t.shape)) for n, t in state.items()], lambda n: state[n].float()
    )


def check_magic(source: Path) -> None:
    """Raise ArtifactError unless the file starts as GGUF files do."""
    with source.open("rb") as file:
        if file.read(4) != MAGIC:
            raise ArtifactError(f"`{source}` is not a GGUF file")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _pre(source: Path) -> str | None:
    """Name of the family of pre-tokenizers."""
    import gguf

    try:
        field = gguf.GGUFReader(source).fields.get("tokenizer.ggml.pre")
        return str(field.contents()) if field is not None else None
    except Exception as error:  # the reader indexes into whatever the file claims
        raise ArtifactError(f"`{source}` is damaged: {_first_line(error)}") from None


def _mend_tokenizer(out: Path, pre: str | None) -> None:
    file = out / "tokenizer.json"
    if pre in DIGITS_APART:
        content = json.loads(file.read_text(encoding="utf-8"))
        now = content.get("pre_tokenizer")
        digits = {"type": "Digits", "individual_digits": True}
        if isinstance(now, dict) and now.get("type") == "ByteLevel":
            content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, now]}
            file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    config = read_json(out / "tokenizer_config.json")
    for key in ("is_local", "local_files_only", "gguf_file", "name_or_path"):
        config.pop(key, None)
    write_json(out / "tokenizer_config.json", config)


def _write_configs(model: Any, out: Path) -> None:  # noqa: ANN401 - transformers is untyped
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = "float32"
    write_json(out / "config.json", config)
    ends = {k: config.get(k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(out / "generation_config.json", {k: v for k, v in ends.items() if v is not None})
