"""predict: artefact -> what a device of the catalogue may do with it, before anybody has bought one.

Ranges from the model's shape and the device's figures; nothing is run, and everything says `predicted`.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from edgesft.core import artifact, catalog
from edgesft.core.artifact import Artifact, Workdir
from edgesft.core.errors import ArtifactError, UsageError
from edgesft.core.params import Length

SCHEMA = 1
FILE = "prediction.json"
BITS = {"int4": 4, "int8": 8, "float16": 16, "bfloat16": 16, "float32": 32}
KINDS = ("onnx", "model", "graph", "engine")


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Options of the stage. device: id in the catalogue, or `host`. context: tokens of the cache; 0: 2048, or
    what the model takes. mode: a power mode of the device."""

    name: ClassVar[str] = "predict"
    gives: ClassVar[str] = "prediction"

    device: str
    mode: str | None = None
    prompt_tokens: Length = 128
    context: Annotated[int, Field(ge=0)] = 0

    def params(self) -> dict[str, Any]:
        """Everything that decides the result; this machine's own measurements among it."""
        host = catalog.runtime("devices.host")
        here = {"fingerprint": host.fingerprint()["id"]} if self.device in host.HERE else {}
        return {
            "device": self.device,
            "mode": self.mode,
            "prompt_tokens": self.prompt_tokens,
            "context": self.context,
            **here,
        }

    def problems(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """Reasons why it cannot run."""
        model = inputs["subject"]
        if model.kind not in KINDS:
            return [f"`{model.ref}` is of kind `{model.kind}`, expected an exported folder or a model"]
        return []

    def run(self, inputs: Mapping[str, Artifact], work: Workdir) -> dict[str, Any]:
        """Write prediction.json; its content is the metrics as well."""
        record = predict(inputs["subject"], self.device, self.mode, self.prompt_tokens, self.context or None)
        artifact.write_json(work.path / FILE, record)
        return record


def predict(
    model: Artifact,
    device: str,
    mode: str | None = None,
    prompt_tokens: int = 128,
    context: int | None = None,
) -> dict[str, Any]:
    """What `device` may do with `model`: `devices.predict.predict` with the artefact's identity.

    device: an id of the catalogue, or `host`, which is measured first. Raises UsageError for unknown names
    and for more tokens than the model takes, ArtifactError for a model that cannot be read.
    """
    host, predictor = catalog.runtime("devices.host"), catalog.runtime("devices.predict")
    here = device in host.HERE
    spec = _limited(host) if here else catalog.runtime("devices.spec").known(device)
    seen = shape(model)
    for name, tokens in (("prompt", prompt_tokens), ("context", context or 0)):
        if seen.context is not None and tokens > seen.context:
            raise UsageError(f"a {name} of {tokens} tokens, `{model.ref}` takes {seen.context} at most")
    measured = None
    if here and spec.kind == "cpu":
        measured = catalog.runtime("devices.roofline").measured(host.default_threads())
    found: dict[str, Any] = predictor.predict(
        spec, seen, mode, prompt_tokens=prompt_tokens, context=context, measured=measured
    )
    about = catalog.runtime("devices.client").about(model)
    return {"schema": SCHEMA, **found, "artifact": about, "shape": dict(vars(seen))}


def _limited(host: Any) -> Any:  # noqa: ANN401 - a module and its DeviceSpec
    """This machine with no more memory than its control group gives."""
    spec, limit = host.spec(), host.memory_limit()
    known = [gb for gb in (spec.memory_gb, None if limit is None else limit / 1e9) if gb is not None]
    return dataclasses.replace(spec, memory_gb=min(known) if known else None)


def shape(model: Artifact) -> Any:  # noqa: ANN401 - devices.predict.Shape, which no stage imports
    """What of an artefact decides its speed. Raises ArtifactError when its description is unreadable."""
    make = catalog.runtime("devices.predict").Shape
    pattern = catalog.runtime("devices.client").about(model)["pattern"]
    if model.kind == "onnx":
        return make(**_exported(model), pattern=pattern)
    if model.kind == "model":
        return make(**_folder(model), pattern=pattern)
    return make(
        weight_bytes=model.bytes, streamed_bytes=model.bytes, parameters=None, decoder=False, pattern=pattern
    )


def _exported(model: Artifact) -> dict[str, Any]:
    """From export.json and the manifest of a folder that EdgeSFT exported."""
    about = catalog.runtime("exporters.description").read_description(model.path)
    size = sum(f.stat().st_size for f in model.path.glob("model.onnx*") if f.is_file())
    weights = about.get("quantize") or "float32"
    if weights not in BITS:
        weights = "int8" if "8" in str(weights) else "int4" if "4" in str(weights) else "float32"
    counted = model.metrics.get("parameters")
    total = sum(counted.values()) if isinstance(counted, Mapping) else size * 8 // BITS[weights]
    head = int(about["vocabulary"]) * int(about.get("hidden", 0))
    unread = _untied(about.get("weights", {}))
    decoder = about["kind"] == "decoder"
    return {
        "weight_bytes": size,
        "streamed_bytes": size - unread if unread and unread < size else size,
        "parameters": total - head if unread and head < total else total,
        "head": min(head, total) if decoder else 0,
        "weights": weights,
        "decoder": decoder,
        "context": about.get("context"),
        **{k: int(about.get(k, 0)) for k in ("layers", "hidden", "kv_heads", "head_dim")},
    }


def _untied(weights: Mapping[str, Any]) -> int:
    """Bytes of an input embedding that is not the output layer as well; 0 if they are one, or unknown."""
    inner = next((v for k, v in weights.items() if k.endswith("embed_tokens.weight")), None)
    outer = next((v for k, v in weights.items() if k.endswith("lm_head.weight")), None)
    if not inner or not outer or inner.get("tensor") == outer.get("tensor"):
        return 0
    try:
        rows = int(inner["rows"][1]) - int(inner["rows"][0])
        return rows * int(inner["inputs"]) * int(inner["bits"]) // 8
    except (KeyError, IndexError, TypeError, ValueError):
        return 0


def _folder(model: Artifact) -> dict[str, Any]:
    """From config.json and the tensors' headers of a Hugging Face folder."""
    from edgesft.core.weights import Weights

    loaded = artifact.read_json(model.path / "config.json")
    if loaded is None:
        raise ArtifactError(f"`{model.path}` has no config.json to predict from")
    nested = loaded.get("text_config")
    config: dict[str, Any] = nested if isinstance(nested, dict) else loaded
    tensors = Weights(model.path)
    held: Counter[str] = Counter()
    for name in tensors:
        held[tensors.dtype(name)] += tensors.info(name).end - tensors.info(name).start
    dtype = held.most_common(1)[0][0]
    hidden, heads = (_whole(config, k, model) for k in ("hidden_size", "num_attention_heads"))
    size, head = held.total(), _whole(config, "vocab_size", model) * hidden
    untied = any(name.endswith("lm_head.weight") for name in tensors)
    decoder = any("CausalLM" in str(a) for a in loaded.get("architectures") or [])
    return {
        "weight_bytes": size,
        "streamed_bytes": size - head * BITS.get(dtype, 32) // 8 * untied,
        "parameters": tensors.numel - head * untied,
        "head": head if decoder else 0,
        "weights": dtype if dtype in BITS else "float32",
        "decoder": decoder,
        "layers": _whole(config, "num_hidden_layers", model),
        "hidden": hidden,
        "kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or hidden // heads),
        "kv_bytes": BITS.get(dtype, 32) // 8,
        "context": config.get("max_position_embeddings"),
    }


def _whole(config: Mapping[str, Any], key: str, model: Artifact) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArtifactError(
            f"`{model.path / 'config.json'}` has `{key}` = `{value}`, expected a positive integer"
        )
    return value


def load(made: Artifact) -> dict[str, Any]:
    """The record in an artefact of kind `prediction`. Raises ArtifactError."""
    file = made.path / FILE
    found = artifact.read_json(file)
    if found is None or found.get("schema") != SCHEMA:
        raise ArtifactError(f"`{file}` is not a prediction of schema {SCHEMA}")
    return found


def facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a person reads first."""
    device, fit = record["device"], record["fit"]
    mode = f", mode {device['mode']}" if device["mode"] else ""
    found: dict[str, Any] = {"predicted": f"{device['name']}{mode}: the model was not run"}
    for key in ("ttft_ms", "tpot_ms", "tpot_full_context_ms", "latency_ms", "tokens_per_second"):
        if key in record:
            found[key] = _span(record[key])
    need, left = (_span({k: v / 1e9 for k, v in fit[f"{w}_bytes"].items()}) for w in ("needed", "available"))
    found["memory"] = f"{fit['verdict']}: needs {need} GB of {left} GB, context {fit['context']}"
    sparse = record["sparse24"]
    gain = f"{_span(sparse.get('tpot_ms') or sparse['latency_ms'])} ms: " if sparse["gain"] else ""
    found["2:4"] = gain + sparse["reason"]
    return found | {"assumptions": list(record["assumptions"])}


def tables(record: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """Columns and rows: one table of the power modes, if the device has any."""
    keys = [k for k in ("ttft_ms", "tpot_ms", "latency_ms", "tokens_per_second") if k in record]
    rows = [[mode, *(_span(times[k]) for k in keys)] for mode, times in record["modes"].items()]
    return [(["mode (predicted)", *keys], rows)] if rows else []


def _span(ends: Mapping[str, float | None]) -> str:
    low, high = ("unknown" if ends[k] is None else f"{ends[k]:.3g}" for k in ("low", "high"))
    if "unknown" in (low, high):
        return f"at least {low}" if high == "unknown" else f"at most {high}"
    return f"{low} to {high}"
