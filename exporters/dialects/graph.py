"""An ONNX graph under construction with onnx-ir, and the weights of a model in it, quantised or not."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from edgesft.exporters.external import Array, DataFile
from edgesft.exporters.quantize import quantize
from edgesft.exporters.weights import Arrays

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Precision:
    """Bits of every role, decided here and nowhere else.

    The embedding and the head stay at 8 bits when the blocks have 4: together they are one table if tied,
    a wrong code there hurts every token, and the runtime's gather and matrix product share 8-bit codes only.
    So does the down projection if `mixed`: its inputs are products, a few of them far larger than the rest,
    and a tenth more bytes buy back most of what 4 bits cost (docs/design.md).
    head: `int4` cuts the head there too, and with it a tied embedding if it is packed: where 2:4 has made the
    blocks small, an 8-bit head is up to two fifths of what a step reads.
    group: inputs that share a scale. accuracy_level: 4 computes in int8, 0 in float32 (MatMulNBits).
    """

    quantize: str = "none"
    group: int = 32
    accuracy_level: int = 4
    mixed: bool = True
    head: str = "int8"

    def bits(self, role: str) -> int:
        """Bits of a weight; role: `linear`, `down`, `head`, `embedding`, or else for what is never cut."""
        if self.quantize == "none" or role not in ("linear", "down", "head", "embedding"):
            return 32
        cut = {"linear"} | (set() if self.mixed else {"down"}) | ({"head"} if self.head == "int4" else set())
        return 4 if self.quantize == "int4" and role in cut else 8


@dataclass
class Built:
    """weights: where each original tensor went (see `readback`). precision: parameters by bits."""

    weights: dict[str, dict[str, Any]] = field(default_factory=dict)
    precision: dict[str, int] = field(default_factory=dict)

    def count(self, bits: int, size: int) -> None:
        key = f"int{bits}" if bits < 32 else "float32"
        self.precision[key] = self.precision.get(key, 0) + size


@dataclass(frozen=True)
class Table:
    """A quantised matrix of `shape` (N, K) in a graph, see `quantize` for the layout."""

    shape: tuple[int, int]
    bits: int
    codes: ir.Value
    scales: ir.Value
    zeros: ir.Value | None


class Graph:
    """Every method appends nodes and returns the value that they end in."""

    def __init__(self, weights: Arrays, precision: Precision, data: DataFile) -> None:
        self.weights, self.precision, self.data = weights, precision, data
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.initializers: list[ir.Value] = []
        self.built = Built()

    def op(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        outputs: str | Sequence[str],
        *,
        domain: str = "",
        **attributes: Any,  # noqa: ANN401 - whatever the operation takes
    ) -> list[ir.Value]:
        """Append a node; an output named `` is left out."""
        names = [outputs] if isinstance(outputs, str) else outputs
        values = [ir.Value(name=name) for name in names]
        self.nodes.append(
            ir.node(kind, inputs, attributes, domain=domain, outputs=values, name=f"{names[0]}/{kind}")
        )
        return values

    def constant(self, name: str, array: Array) -> ir.Value:
        value = self.data.put(name, array)
        self.initializers.append(value)
        return value

    def integers(self, name: str, *values: int) -> ir.Value:
        return self.constant(name, np.array(values, np.int64))

    def input(self, name: str, kind: ir.DataType, *shape: str | int) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind))
        self.inputs.append(value)
        return value

    def optional(self, name: str, default: Array, *shape: str | int) -> ir.Value:
        """An input with a default: an initializer that is an input too is overridable and is never folded
        away (ONNX IR, section Graphs, from version 4 on)."""
        value = self.constant(name, default)
        value.shape = ir.Shape(shape)
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, *shape: str | int) -> None:
        value.shape, value.type = ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        self.outputs.append(value)

    def place(self, sources: Sequence[str], tensor: str, **more: Any) -> list[Array]:  # noqa: ANN401
        """The arrays of `sources`, which go end to end into the initializer `tensor`; notes where each is."""
        arrays, start = [], 0
        for source in sources:
            array = self.weights.get(source)
            self.built.weights[source] = {"tensor": tensor, "rows": [start, start + len(array)], **more}
            self.built.count(more.get("bits", 32), array.size)
            start += len(array)
            arrays.append(array)
        return arrays

    def vector(self, name: str, *sources: str) -> ir.Value:
        """One-dimensional tensors (norms, biases), end to end; or one matrix as it is."""
        return self.constant(name, np.concatenate(self.place(sources, name)))

    def linear(
        self,
        x: ir.Value,
        name: str,
        sources: Sequence[str],
        biases: Sequence[str | None],
        role: str = "linear",
    ) -> ir.Value:
        """x (..., K) times the transposed matrices `sources` (N_j, K), stacked: (..., sum N_j)."""
        bias = self.bias(f"{name}.bias", biases)
        if self.precision.bits(role) < 32:
            return self.matmul(x, self.table(name, sources, role), bias, name)
        tensor = f"{name}.weight"
        parts = [array.T for array in self.place(sources, tensor, transposed=True)]
        (y,) = self.op("MatMul", [x, self.constant(tensor, np.concatenate(parts, axis=1))], name)
        return y if bias is None else self.op("Add", [y, bias], f"{name}.sum")[0]

    def bias(self, name: str, biases: Sequence[str | None]) -> ir.Value | None:
        """The stacked biases; None if there is none. All of the matrices have one, or none has."""
        present = [b for b in biases if b is not None]
        return self.vector(name, *present) if present else None

    def table(self, name: str, sources: Sequence[str], role: str) -> Table:
        """Matrices (N_j, K) quantised and stacked."""
        bits, group = self.precision.bits(role), self.precision.group
        codes, scales, zeros = f"{name}.codes", f"{name}.scales", f"{name}.zeros"
        inputs = self.weights.shape(sources[0])[1]
        more = {"scales": scales, "bits": bits, "inputs": inputs} | ({"zeros": zeros} if bits == 4 else {})
        made = [quantize(array, bits, group) for array in self.place(sources, codes, **more)]
        stored = [m.zeros for m in made if m.zeros is not None]
        return Table(
            (sum(len(m.codes) for m in made), inputs),
            bits,
            self.constant(codes, np.concatenate([m.codes for m in made])),
            self.constant(scales, np.concatenate([m.scales for m in made])),
            self.constant(zeros, np.concatenate(stored)) if stored else None,
        )

    def matmul(self, x: ir.Value, table: Table, bias: ir.Value | None, name: str) -> ir.Value:
        """x (..., K) times the transposed matrix `table` (N, K): (..., N)."""
        inputs = [x, table.codes, table.scales, table.zeros, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        return self.op(
            "MatMulNBits",
            inputs,
            name,
            domain=MICROSOFT,
            N=table.shape[0],
            K=table.shape[1],
            bits=table.bits,
            block_size=self.precision.group,
            accuracy_level=self.precision.accuracy_level,
        )[0]
