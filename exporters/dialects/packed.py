"""The decoder with packed weights: `PackedLinear` and `PackedEmbedding` of kernels/nm_matmul.

Five nodes a block instead of ten: norm with q, k and v; GroupQueryAttention; the output with the residual;
norm with gate, up and SiLU; down with the residual. Which layer becomes what is decided one by one:

    packed   2:4, stored without its zeros
    tiled    dense, in the same tiles
    dense    MatMulNBits, as in `onnxruntime`

Inputs, outputs and names are those of `onnxruntime`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgesft.exporters import packing
from edgesft.exporters.decoder import Block, Decoder
from edgesft.exporters.dialects.graph import Built, Precision
from edgesft.exporters.dialects.onnxruntime import OPSETS, DecoderGraph, needed, save
from edgesft.exporters.dialects.plain import SIDE_BY_SIDE
from edgesft.exporters.external import DataFile, check_space
from edgesft.exporters.weights import Arrays, FloatArray
from edgesft.kernels.nm_matmul import layout
from edgesft.kernels.nm_matmul.ort_op import DOMAIN, EMBEDDING, LINEAR, attributes

KINDS = ("packed", "tiled", "dense")


@dataclass(frozen=True)
class Layer:
    """A matrix that a choice is asked for. sparse: it is 2:4."""

    name: str
    rows: int
    columns: int
    bits: int
    group: int
    sparse: bool


@dataclass(frozen=True)
class Choice:
    """kind: one of KINDS. seconds: of one call by kind, where they were measured."""

    kind: str
    seconds: Mapping[str, float] = field(default_factory=dict)


Choose = Callable[[Layer], Choice]
Scales = Callable[[str, FloatArray], packing.Stored | None]


def build(
    decoder: Decoder, weights: Arrays, out: Path, precision: Precision, choose: Choose, scales: Scales
) -> tuple[Built, list[dict[str, Any]]]:
    """Write model.onnx and model.onnx.data into `out`; the table says what each layer became.

    Raises ArtifactError for NaN or Inf weights and when the disk is too small.
    """
    check_space(out, needed(decoder, precision))
    with DataFile(out) as data:
        graph = _Packed(decoder, weights, precision, data, choose, scales)
        graph.decoder()
    save(graph, out, OPSETS | {DOMAIN: 1})
    return graph.built, graph.layers


@dataclass(frozen=True)
class _Matrix:
    """A packed matrix in the graph."""

    packed: layout.Packed
    stream: ir.Value
    scales: ir.Value


class _Packed(DecoderGraph):
    def __init__(
        self,
        decoder: Decoder,
        weights: Arrays,
        precision: Precision,
        data: DataFile,
        choose: Choose,
        scales: Scales,
    ) -> None:
        super().__init__(decoder, weights, precision, data)
        self.choose, self.scales = choose, scales
        self.layers: list[dict[str, Any]] = []
        # a norm is computed by the product that reads it: value -> (what is normed, weight)
        self.waiting: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self.table_of_tokens: _Matrix | None = None

    # ------------------------------------------------------------ norms

    def enter(self, stream: ir.Value, name: str, weight: str) -> ir.Value:
        later = ir.Value(name=f"{name}.norm")
        self.waiting[later] = (stream, self.vector(f"{name}.norm.weight", weight))
        return later

    def _normed(self, x: ir.Value) -> ir.Value:
        """x, its norm made a node of its own where it still waits."""
        if x not in self.waiting:
            return x
        stream, weight = self.waiting.pop(x)
        made = ir.node(
            "SimplifiedLayerNormalization",
            [stream, weight],
            {"axis": -1, "epsilon": self.d.eps, "stash_type": 1},
            outputs=[x],
            name=f"{x.name}/SimplifiedLayerNormalization",
        )
        self.nodes.append(made)
        return x

    # ------------------------------------------------------------ choices

    def _arrays(self, name: str, sources: Sequence[str], role: str) -> tuple[list[FloatArray], Choice, Layer]:
        arrays = [self.weights.get(source) for source in sources]
        sparse = role in ("linear", "down") and all(packing.is_sparse(a) for a in arrays)
        group = packing.group_of(self.precision.group, sparse)
        rows, columns = sum(len(a) for a in arrays), arrays[0].shape[1]
        layer = Layer(name, rows, columns, self.precision.bits(role), group, sparse)
        return arrays, self.choose(layer), layer

    def _note(self, layer: Layer, choice: Choice, packed: layout.Packed | None) -> None:
        said: dict[str, Any] = {
            "layer": layer.name,
            "kind": choice.kind,
            "pattern": "2:4" if layer.sparse else "dense",
            "rows": layer.rows,
            "columns": layer.columns,
            "bits": layer.bits,
            "bits_per_weight": round(packed.bits, 3) if packed else _nbits(layer, self.precision.group),
        }
        if choice.seconds:
            said["measured_us"] = {k: round(v * 1e6, 1) for k, v in choice.seconds.items()}
        self.layers.append(said)

    def _matrix(
        self, layer: Layer, choice: Choice, sources: Sequence[str], arrays: list[FloatArray], *, turns: bool
    ) -> _Matrix:
        stored = [self.scales(source, array) for source, array in zip(sources, arrays, strict=True)]
        packed = packing.pack(
            arrays, layer.bits, layer.group, sparse=choice.kind == "packed", interleaved=turns, stored=stored
        )
        stream, scales = f"{layer.name}.stream", f"{layer.name}.packed_scales"
        start = 0
        for turn, (source, array) in enumerate(zip(sources, arrays, strict=True)):
            place: dict[str, Any] = {"tensor": stream, "scales": scales, "rows": [start, start + len(array)]}
            if turns:
                place |= {"turn": turn, "parts": len(arrays)}
            self.built.weights[source] = packing.entry(packed, place)
            self.built.count(layer.bits, array.size)
            start += len(array)
        self._note(layer, choice, packed)
        return _Matrix(packed, self.constant(stream, packed.stream), self.constant(scales, packed.scales))

    # ------------------------------------------------------------ products

    def _product(
        self,
        x: ir.Value,
        matrix: _Matrix,
        bias: ir.Value | None,
        name: str,
        output: str,
        *,
        residual: ir.Value | None = None,
        gate: bool = False,
    ) -> ir.Value:
        norm = None
        if x in self.waiting:
            x, norm = self.waiting[x]
        inputs = [x, matrix.stream, matrix.scales, bias, residual, norm]
        while inputs[-1] is None:
            inputs.pop()
        level = 4 if self.precision.accuracy_level == 4 else 0
        more = {"level": level, "gate": int(gate), "epsilon": self.d.eps if norm is not None else 0.0}
        made = self.op(LINEAR, inputs, output, domain=DOMAIN, **attributes(matrix.packed), **more)[0]
        self.nodes[-1].name = f"{name}/{LINEAR}"
        return made

    def linear(
        self,
        x: ir.Value,
        name: str,
        sources: Sequence[str],
        biases: Sequence[str | None],
        role: str = "linear",
    ) -> ir.Value:
        arrays, choice, layer = self._arrays(name, sources, role)
        if choice.kind == "dense":
            self._note(layer, choice, None)
            return super().linear(self._normed(x), name, sources, biases, role)
        matrix = self._matrix(layer, choice, sources, arrays, turns=False)
        return self._product(x, matrix, self.bias(f"{name}.bias", biases), name, name)

    def join(
        self,
        stream: ir.Value,
        x: ir.Value,
        name: str,
        source: str,
        bias: str | None,
        total: str,
        weight: str,
        role: str = "linear",
    ) -> tuple[ir.Value, ir.Value]:
        arrays, choice, layer = self._arrays(name, [source], role)
        if choice.kind == "dense":
            self._note(layer, choice, None)
            update = super().linear(x, name, [source], [bias], role)
            (made,) = self.op("Add", [update, stream], total)
        else:
            matrix = self._matrix(layer, choice, [source], arrays, turns=False)
            made = self._product(x, matrix, self.bias(f"{name}.bias", [bias]), name, total, residual=stream)
        return self.enter(made, total, weight), made

    def product(self, name: str, b: Block, x: ir.Value) -> ir.Value:
        both, sources = f"{name}.gate_up", [b.gate, b.up]
        arrays, choice, layer = self._arrays(both, sources, "linear")
        if choice.kind == "dense" or layer.rows % SIDE_BY_SIDE or b.gate_bias or b.up_bias:
            return super().product(name, b, x)
        matrix = self._matrix(layer, choice, sources, arrays, turns=True)
        return self._product(x, matrix, None, both, f"{name}.product", gate=True)

    # ------------------------------------------------------------ tables

    def embed(self, ids: ir.Value) -> ir.Value:
        d = self.d
        if d.tied:
            arrays, choice, layer = self._arrays("head", [d.embedding], "head")
            if choice.kind == "dense" and layer.bits == 8:  # the runtime has no table of 4 bits for both
                self._note(layer, choice, None)
                return super().embed(ids)
            choice = Choice("tiled", choice.seconds)
            self.table_of_tokens = table = self._matrix(layer, choice, [d.embedding], arrays, turns=False)
        else:
            # a few rows are read whatever the form: nothing to choose, and before 1.23 ONNX Runtime's own
            # gather has no codes of 8 bits
            array, group = self.weights.get(d.embedding), packing.group_of(self.precision.group, sparse=False)
            bits = self.precision.bits("embedding")
            layer = Layer("embedding", d.vocabulary, d.hidden, bits, group, sparse=False)
            table = self._matrix(layer, Choice("tiled"), [d.embedding], [array], turns=False)
        said = attributes(table.packed)
        return self.op(EMBEDDING, [ids, table.stream, table.scales], "embedding", domain=DOMAIN, **said)[0]

    def head(self, x: ir.Value) -> ir.Value:
        d = self.d
        if d.tied and self.table_of_tokens is None:
            return super().head(self._normed(x))
        bias = self.vector("logits.bias", d.head_bias) if d.head_bias else None
        matrix = self.table_of_tokens
        if matrix is None:
            arrays, choice, layer = self._arrays("head", [d.head], "head")
            if choice.kind == "dense":
                self._note(layer, choice, None)
                return self.matmul(self._normed(x), self.table("head", [d.head], "head"), bias, "logits")
            matrix = self._matrix(layer, choice, [d.head], arrays, turns=False)
        return self._product(x, matrix, bias, "head", "logits")


def _nbits(layer: Layer, group: int) -> float:
    """Bits a weight takes in MatMulNBits: codes, float32 scales, and zeros where it has some."""
    return layer.bits + (32 + (4 if layer.bits == 4 else 0)) / group
