"""Continue a prompt with a model folder or an exported one. Writes nothing, so it is a plain function."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesft.core import artifact, models
from edgesft.core.catalog import runtime
from edgesft.core.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from edgesft.core.protocols import Runnable


def generate(
    path: Path, prompt: str, max_new_tokens: int = 64, threads: int = 0, chat: bool = False
) -> dict[str, Any]:
    """The greedy continuation of `prompt` and how fast it came.

    path: a model folder, or one of kind `onnx`. chat: put the prompt into the model's chat template.
    Returns text, tokens, ttft_ms, decode_tokens_per_second (None if one token came), prompt_tokens,
    new_tokens and stop (`eos` or `length`). Raises UsageError for an empty prompt, one that exceeds the
    context, or a chat with a model that has no template; ArtifactError for a folder that cannot be run.
    """
    if not prompt:
        raise UsageError("the prompt is empty")
    kind = _kind(path)
    tokenizer = models.tokenizer(path)
    if chat:
        text = tokenizer.chat([{"role": "user", "content": prompt}])
        if text is None:
            raise UsageError(f"`{path}` has no chat template", "leave out `--chat`")
        ids = tokenizer.encode(text, special=False)  # the template writes its special tokens itself
    else:
        ids = tokenizer.encode(prompt)
    made = runtime("exporters.runtime").generate(
        _open(path, kind, threads), ids, max_new_tokens, tokenizer.eos_ids
    )
    kept = made.tokens[:-1] if made.stop == "eos" else made.tokens
    return {
        "text": tokenizer.decode(list(kept)),
        "tokens": list(made.tokens),
        "ttft_ms": made.ttft_s * 1e3,
        "decode_tokens_per_second": made.tokens_per_second,
        "prompt_tokens": len(ids),
        "new_tokens": len(made.tokens),
        "stop": made.stop,
    }


def _kind(path: Path) -> str:
    """`onnx` or `model`, by the manifest of a folder; one without a manifest is a model."""
    if not path.exists():
        raise ArtifactError(f"`{path}` does not exist")
    manifest = artifact.read_manifest(path)
    kind = "model" if manifest is None else str(manifest.get("kind"))
    if kind not in ("onnx", "model"):
        raise ArtifactError(f"`{path}` is of kind `{kind}`, expected `model` or `onnx`")
    return kind


def _open(path: Path, kind: str, threads: int) -> "Runnable":
    runnable: Runnable
    if kind == "onnx":
        runnable = runtime("exporters.runtime").load(path, threads=threads)
    else:
        from edgesft.core.torch_runtime import TorchRunnable

        runnable = TorchRunnable(path, threads)
    return runnable
