"""A decoder whose linear layers can be tuned: each is `edgesft::PerturbedLinear`, its weight an input.

The weights (out, in) lie in the data file and are bound by who runs the graph (`exporters.mapped`), so one
copy serves the products and the updates. Everything else is as in `onnxruntime`. Four more inputs say at
which points the model is run; their defaults are the weights themselves:

    shifts      (groups, 3) int64   seed, law, rank of each group of the batch; see `kernels.perturb.ort_op`
    shift_scale (groups,) float32   its length; 0: no shift
    mask_range  (layers, 2) float32 low and high of each layer's mask, in the order of export.json
    mask_choice (layers, 2) int64   keep and seed of it

The batch holds `groups` equal parts, one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgesft.exporters.decoder import Block, Decoder
from edgesft.exporters.description import DATA
from edgesft.exporters.dialects.graph import Built, Precision
from edgesft.exporters.dialects.onnxruntime import OPSETS, DecoderGraph, needed, save
from edgesft.exporters.external import Array, DataFile, check_space
from edgesft.exporters.weights import Arrays
from edgesft.kernels.perturb import tensor_id
from edgesft.kernels.perturb.ort_op import CHOICE, DOMAIN, OP, OPTIONS, RANGE, SCALE, SHIFTS


@dataclass
class Tunable:
    """built: as of any export. layers: the table for export.json."""

    built: Built
    layers: list[dict[str, Any]] = field(default_factory=list)

    def table(self) -> dict[str, Any]:
        """The entry `tunable` of export.json."""
        return {"file": DATA, "parameters": sum(self.built.precision.values()), "layers": self.layers}


def build(decoder: Decoder, weights: Arrays, out: Path) -> Tunable:
    """Write model.onnx and model.onnx.data into `out`, float32.

    Raises ArtifactError for NaN or Inf weights and when the disk is too small.
    """
    check_space(out, needed(decoder, Precision()))
    with DataFile(out) as data:
        graph = _Tunable(decoder, weights, data)
        graph.decoder()
        graph.masks()
    save(graph, out, OPSETS | {DOMAIN: 1})
    return Tunable(graph.built, graph.layers)


class _Tunable(DecoderGraph):
    def __init__(self, decoder: Decoder, weights: Arrays, data: DataFile) -> None:
        super().__init__(decoder, weights, Precision(), data)
        self.layers: list[dict[str, Any]] = []
        # the tables come last, when it is known how many layers there are
        self.where = [ir.Value(name=name) for name in OPTIONS]

    def masks(self) -> None:
        """The inputs that say where the model is run; the mask of every layer is whole."""
        count = len(self.layers)
        defaults: dict[str, Array] = {
            SHIFTS: np.zeros((1, 3), np.int64),
            SCALE: np.zeros(1, np.float32),
            RANGE: np.tile(np.array([0, np.inf], np.float32), (count, 1)),
            CHOICE: np.tile(np.array([256, 0], np.int64), (count, 1)),
        }
        shapes: dict[str, list[str | int]] = {SHIFTS: ["groups", 3], SCALE: ["groups"]}
        for value, (name, default) in zip(self.where, defaults.items(), strict=True):
            made = self.data.put(name, default)
            value.const_value, value.type = made.const_value, made.type
            value.shape = ir.Shape(shapes.get(name, [count, 2]))
            self.initializers.append(value)
            self.inputs.append(value)

    def linear(
        self,
        x: ir.Value,
        name: str,
        sources: Sequence[str],
        biases: Sequence[str | None],
        role: str = "linear",
    ) -> ir.Value:
        """x (..., in) times the transpose of one weight (out, in), which becomes an input."""
        (source,) = sources
        (array,) = self.place(sources, source)
        tensor = self.data.put(source, array).const_value
        if not isinstance(tensor, ir.ExternalTensor) or tensor.offset is None:
            raise ValueError(f"the weight `{source}` is too small to lie in the data file")
        layer = source.removesuffix(".weight")
        layer = layer if layer.startswith("model.") else f"model.{layer}"  # files of a backbone alone
        number, noise = len(self.layers), tensor_id(f"{layer}.weight")
        self.layers.append(
            {
                "name": layer,
                "input": source,
                "shape": list(array.shape),
                "offset": tensor.offset,
                "tensor": noise,
            }
        )
        weight = self.input(source, ir.DataType.FLOAT, *array.shape)
        bias = self.bias(f"{name}.bias", biases)
        inputs = [x, weight, *self.where, *([] if bias is None else [bias])]
        return self.op(OP, inputs, name, domain=DOMAIN, tensor=noise, row=number)[0]

    def query(self, name: str, b: Block, x: ir.Value) -> list[ir.Value | None]:
        parts = zip("qkv", (b.q, b.k, b.v), (b.q_bias, b.k_bias, b.v_bias), strict=True)
        q, k, v = (self.linear(x, f"{name}.{n}", [source], [bias]) for n, source, bias in parts)
        return self.normed(name, b, q, k, v)

    def gate_up(self, name: str, b: Block, x: ir.Value) -> list[ir.Value]:
        parts = zip(("gate", "up"), (b.gate, b.up), (b.gate_bias, b.up_bias), strict=True)
        return [self.linear(x, f"{name}.{n}", [source], [bias]) for n, source, bias in parts]
