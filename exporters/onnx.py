"""Export a model folder to ONNX: the direct builder where it knows the architecture, tracing elsewhere."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgesft.core import console
from edgesft.core.artifact import write_json
from edgesft.core.errors import ArtifactError
from edgesft.exporters import decoder, measure, packing
from edgesft.exporters.description import DATA, FILE, FORMAT, MODEL, PLAIN
from edgesft.exporters.dialects import packed as packed_dialect
from edgesft.exporters.dialects import plain
from edgesft.exporters.dialects import tunable as tunable_dialect
from edgesft.exporters.dialects.graph import Precision
from edgesft.exporters.dialects.onnxruntime import build
from edgesft.exporters.weights import Arrays
from edgesft.kernels.nm_matmul import library
from edgesft.kernels.perturb import ort_op

TARGET = "onnx"


def problems(model: Path, precision: Precision, tunable: bool = False) -> list[str]:
    """Why `model` cannot be exported that way, asked before anything is written; empty if it can.

    Raises ArtifactError for a broken folder.
    """
    unknown = decoder.problems(model)
    if unknown and (tunable or precision.quantize != "none"):
        option = "--tunable" if tunable else f"--quantize {precision.quantize}"
        return [
            f"`{model}` has {unknown[0]}; `{option}` needs a family among "
            + ", ".join(f"`{f}`" for f in decoder.FAMILIES)
        ]
    return []


def export(
    model: Path, out: Path, precision: Precision, tunable: bool = False, sparse: str = "auto"
) -> dict[str, Any]:
    """Write model.onnx, its data and export.json into `out`; return the metrics of the manifest.

    With packed layers also model.plain.onnx, the same without operations of our own.

    tunable: the weights of the blocks' linear layers become inputs, see `dialects.tunable`; only in float32.
    sparse: `auto` packs the layers for which that is faster here, if the model has 2:4 layers; `always` and
    `never` measure nothing.
    Raises ArtifactError for a model that is broken, holds NaN or Inf, or that nothing here can export.
    """
    found = problems(model, precision, tunable)
    if found:
        raise ArtifactError(found[0])
    unknown = decoder.problems(model)
    if unknown:
        console.say(f"tracing, because the direct builder does not know {unknown[0]}")
        description, by_precision = _traced(model, out)
    else:
        description, by_precision = _direct(model, out, precision, tunable, sparse)
    write_json(out / FILE, description)
    return {
        "bytes": sum((out / name).stat().st_size for name in (MODEL, DATA, PLAIN) if (out / name).exists()),
        "builder": description["builder"],
        "kind": description["kind"],
        "layers": description["layers"],
        "parameters": by_precision,
        "quantize": description["quantize"],
        **({"tunable": len(description["tunable"]["layers"])} if tunable else {}),
        **({"packed": _summary(description["packed"])} if "packed" in description else {}),
    }


def _summary(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many layers became what, and the bits a weight of all takes."""
    weights = sum(row["rows"] * row["columns"] for row in layers)
    bits = sum(row["rows"] * row["columns"] * row["bits_per_weight"] for row in layers)
    counts = {kind: sum(row["kind"] == kind for row in layers) for kind in packed_dialect.KINDS}
    return {**counts, "bits_per_weight": round(bits / weights, 3)}


def _packs(decoder_: decoder.Decoder, weights: Arrays, precision: Precision, sparse: str) -> bool:
    """Whether packed operations are to be written at all."""
    if sparse == "never" or precision.quantize == "none":
        return False
    if sparse == "auto":
        # one look decides whether the question is worth a measurement: pruning covers all blocks or none
        if not packing.is_sparse(weights.get(decoder_.blocks[0].gate)):
            return False
        works, why = library.state()
        if not works:
            console.say(f"2:4 layers are exported dense, for the packed operations cannot be had: {why}")
            return False
    return True


def _always(layer: packed_dialect.Layer) -> packed_dialect.Choice:
    return packed_dialect.Choice("packed" if layer.sparse else "tiled")


def _direct(
    model: Path, out: Path, precision: Precision, tunable: bool, sparse: str
) -> tuple[dict[str, Any], dict[str, int]]:
    d = decoder.describe(model)
    more: dict[str, Any] = {}
    inputs: list[str] = []
    if tunable:
        made = tunable_dialect.build(d, Arrays(model), out)
        built, more = made.built, {"tunable": made.table()}
        inputs = [row["input"] for row in made.layers] + list(ort_op.OPTIONS)
    elif _packs(d, weights := Arrays(model), precision, sparse):
        choose = measure.Fastest(precision.group) if sparse == "auto" else _always
        built, layers = packed_dialect.build(d, weights, out, precision, choose, lambda _name, _array: None)
        plain.write(out)
        more = {"packed": layers, "plain": PLAIN}
    else:
        built = build(d, weights, out, precision)
    pairs = [f"{i}.{part}" for i in range(d.layers) for part in ("key", "value")]
    return {
        "format": FORMAT,
        "kind": "decoder",
        "builder": "direct",
        "shared_kv": True,
        "architecture": d.architecture,
        "layers": d.layers,
        "heads": d.heads,
        "kv_heads": d.kv_heads,
        "head_dim": d.head_dim,
        "vocabulary": d.vocabulary,
        "hidden": d.hidden,
        "context": d.context,
        "quantize": precision.quantize,
        "group": precision.group,
        "accuracy_level": precision.accuracy_level,
        "mixed": precision.mixed,
        "head": precision.head,
        "eos": list(d.eos),
        "inputs": [
            "input_ids",
            "attention_mask",
            *(f"past_key_values.{p}" for p in pairs),
            "logit_positions",
            *inputs,
        ],
        "outputs": ["logits", *(f"present.{p}" for p in pairs)],
        "weights": built.weights,
        **more,
    }, built.precision


def _traced(model: Path, out: Path) -> tuple[dict[str, Any], dict[str, int]]:
    from edgesft.core.models import tensors
    from edgesft.exporters import traced

    description: Mapping[str, Any] = traced.export(model, out)
    return {"format": FORMAT, **json.loads(json.dumps(description))}, {"float32": tensors(model).numel}
