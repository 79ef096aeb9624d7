"""The packed decoder once more, in operators that every runtime has: `model.plain.onnx`.

Its weights are the same bytes of `model.onnx.data`: functions of the domain `edgesft.plain`, which the file
itself brings along, decode `stream` and `scales` (docs/format.md) with standard ONNX operators. A runtime
folds them while it loads the model, up to a code in a byte for every weight, zeros too; what follows is
DequantizeLinear and MatMul, which it folds or fuses as it can. So it takes more memory and time than
`PackedLinear`, and no library.

Everything that is not packed stays as it is in `model.onnx`.
"""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edgesft.exporters.description import MODEL, PLAIN
from edgesft.kernels.nm_matmul import layout
from edgesft.kernels.nm_matmul.ort_op import DOMAIN, EMBEDDING, LINEAR

PLAIN_DOMAIN: Final = "edgesft.plain"
KINDS: Final = {  # (sparse, value) -> the function that decodes it
    (1, "int4"): "Sparse4",
    (1, "int8"): "Sparse8",
    (1, "fp16"): "SparseFp16",
    (1, "bf16"): "SparseBf16",
    (0, "int4"): "Dense4",
    (0, "int8"): "Dense8",
}
SIDE_BY_SIDE: Final = 2 * layout.ROWS  # rows of gate and up together come by turns of so many
ALL: Final = 2**63 - 1  # the end of a cut that leaves nothing out; a runtime knows it for nothing to do

# What decodes gives w^T (columns, rows). Of attributes, `tiles` is [-1, T, 1, bytes of a tile], `groups` is
# [-1, groups of a row, 16], `count` is T, `span` the tiles that share a scale and `shape` [columns, rows],
# or ALL where there is no fill.
# In comments: S strips, T tiles of a strip, p planes, r rows of a tile, s bytes of a row in a plane, g groups
# of four columns, c columns of a group.
_FUNCTIONS: Final = """
# The tiles of 2:4: the places of the weights of each row, (S, T, p, r * s), and the bytes after the index.
Index <tiles> (stream) => (places, values) {
  shape = Constant <value_ints: ints = @tiles> ()
  tile = Reshape (stream, shape)
  start = Constant <value_ints = [0]> ()
  middle = Constant <value_ints = [64]> ()
  end = Constant <value_ints = [65536]> ()
  axis = Constant <value_ints = [3]> ()
  index = Slice (tile, start, middle, axis)
  values = Slice (tile, middle, end, axis)
  shifts = Constant <value = uint8[4, 1] {0, 2, 4, 6}> ()
  moved = BitShift <direction = "RIGHT"> (index, shifts)
  three = Constant <value = uint8 {3}> ()
  places = BitwiseAnd (moved, three)
}

# Bytes (S, T, 1, n * 64) of two codes each -> codes (S, T, n, 2, 64)
Nibbles (bytes) => (codes) {
  blocks = Constant <value_ints = [0, 0, -1, 1, 64]> ()
  block = Reshape (bytes, blocks)
  shifts = Constant <value = uint8[2, 1] {0, 4}> ()
  moved = BitShift <direction = "RIGHT"> (block, shifts)
  mask = Constant <value = uint8 {15}> ()
  codes = BitwiseAnd (moved, mask)
}

# What 2:4 has for each weight that is kept: of the first and the second of a group, both (T, p, g, 1, S, r)
Kept (x) => (first, second) {
  pairs = Constant <value_ints = [0, 0, 4, 16, 2, 2]> ()
  cut = Reshape (x, pairs)
  turned = Transpose <perm = [1, 2, 4, 5, 0, 3]> (cut)
  first, second = Split <axis = 3, num_outputs = 2> (turned)
}

# Values in their places of four columns, `empty` where there is none: (columns, rows)
Placed (places, values, empty) => (w) {
  one, two = edgesft.plain.Kept (values)
  first, second = edgesft.plain.Kept (places)
  columns = Constant <value = uint8[4, 1, 1] {0, 1, 2, 3}> ()
  is_first = Equal (first, columns)
  is_second = Equal (second, columns)
  rest = Where (is_second, two, empty)
  all = Where (is_first, one, rest)
  w = Flatten <axis = 4> (all)
}

# Dense codes (S, T, p, r, c) in any shape -> (columns, rows)
Columns (codes) => (w) {
  planes = Constant <value_ints = [0, 0, 8, 16, 4]> ()
  cut = Reshape (codes, planes)
  turned = Transpose <perm = [1, 2, 4, 0, 3]> (cut)
  w = Flatten <axis = 3> (turned)
}

# Codes with fill -> weights without: (code - offset) * scale * unit
Weights <groups, count, span, unit, shape> (codes, offset, scales) => (w) {
  by_strip = Constant <value_ints: ints = @groups> ()
  laid = Reshape (scales, by_strip)
  turned = Transpose <perm = [1, 0, 2]> (laid)
  of_group = Flatten <axis = 1> (turned)
  wide = Cast <to = 1> (of_group)
  factor = Constant <value_float: float = @unit> ()
  scaled = Mul (wide, factor)
  start = Constant <value_int = 0> ()
  end = Constant <value_int: int = @count> ()
  step = Constant <value_int = 1> ()
  tile = Range (start, end, step)
  each = Constant <value_int: int = @span> ()
  group = Div (tile, each)
  of_tile = Gather <axis = 0> (scaled, group)
  scale = edgesft.plain.Cut <shape: ints = @shape> (of_tile)
  code = edgesft.plain.Cut <shape: ints = @shape> (codes)
  size = Shape (scale)
  zero = Expand (offset, size)
  w = DequantizeLinear <axis = 0, block_size = 32> (code, scale, zero)
}

# Less the fill: at most `shape`
Cut <shape> (x) => (y) {
  starts = Constant <value_ints = [0, 0]> ()
  ends = Constant <value_ints: ints = @shape> ()
  y = Slice (x, starts, ends)
}

Sparse4 <tiles, groups, count, span, unit, shape> (stream, scales) => (w) {
  places, values = edgesft.plain.Index <tiles: ints = @tiles> (stream)
  codes = edgesft.plain.Nibbles (values)
  offset = Constant <value = uint8 {8}> ()
  placed = edgesft.plain.Placed (places, codes, offset)
  w = edgesft.plain.Weights <groups: ints = @groups, count: int = @count, span: int = @span,
    unit: float = @unit, shape: ints = @shape> (placed, offset, scales)
}

Sparse8 <tiles, groups, count, span, unit, shape> (stream, scales) => (w) {
  places, codes = edgesft.plain.Index <tiles: ints = @tiles> (stream)
  offset = Constant <value = uint8 {128}> ()
  placed = edgesft.plain.Placed (places, codes, offset)
  w = edgesft.plain.Weights <groups: ints = @groups, count: int = @count, span: int = @span,
    unit: float = @unit, shape: ints = @shape> (placed, offset, scales)
}

Dense4 <tiles, groups, count, span, unit, shape> (stream, scales) => (w) {
  by_tile = Constant <value_ints: ints = @tiles> ()
  tile = Reshape (stream, by_tile)
  codes = edgesft.plain.Nibbles (tile)
  placed = edgesft.plain.Columns (codes)
  offset = Constant <value = uint8 {8}> ()
  w = edgesft.plain.Weights <groups: ints = @groups, count: int = @count, span: int = @span,
    unit: float = @unit, shape: ints = @shape> (placed, offset, scales)
}

Dense8 <tiles, groups, count, span, unit, shape> (stream, scales) => (w) {
  by_tile = Constant <value_ints: ints = @tiles> ()
  tile = Reshape (stream, by_tile)
  placed = edgesft.plain.Columns (tile)
  offset = Constant <value = uint8 {128}> ()
  w = edgesft.plain.Weights <groups: ints = @groups, count: int = @count, span: int = @span,
    unit: float = @unit, shape: ints = @shape> (placed, offset, scales)
}

SparseFp16 <tiles, shape> (stream) => (w) {
  places, values = edgesft.plain.Index <tiles: ints = @tiles> (stream)
  low, high = edgesft.plain.Halves (values)
  numbers = edgesft.plain.Fp16 (low, high)
  empty = Constant <value_float = 0.0> ()
  placed = edgesft.plain.Placed (places, numbers, empty)
  w = edgesft.plain.Cut <shape: ints = @shape> (placed)
}

SparseBf16 <tiles, shape> (stream) => (w) {
  places, values = edgesft.plain.Index <tiles: ints = @tiles> (stream)
  low, high = edgesft.plain.Halves (values)
  numbers = edgesft.plain.Bf16 (low, high)
  empty = Constant <value_float = 0.0> ()
  placed = edgesft.plain.Placed (places, numbers, empty)
  w = edgesft.plain.Cut <shape: ints = @shape> (placed)
}

# Numbers of two bytes: the lower ones and the higher ones, each (S, T, p, r, s)
Halves (bytes) => (low, high) {
  vectors = Constant <value_ints = [0, 0, 4, 4, 16, 2]> ()
  cut = Reshape (bytes, vectors)
  turned = Transpose <perm = [0, 1, 2, 4, 3, 5]> (cut)
  low_last, high_last = Split <axis = 5, num_outputs = 2> (turned)
  last = Constant <value_ints = [5]> ()
  low_byte = Squeeze (low_last, last)
  high_byte = Squeeze (high_last, last)
  low = Cast <to = 6> (low_byte)
  high = Cast <to = 6> (high_byte)
}

# Two bytes -> a number. The higher one has sign, exponent and the top of the fraction, to which all but the
# smallest exponent add 1024.
Fp16 (low, high) => (w) {
  steps = Constant <value = FP16_STEPS> ()
  fractions = Constant <value = FP16_FRACTIONS> ()
  step = Gather <axis = 0> (steps, high)
  top = Gather <axis = 0> (fractions, high)
  rest = Cast <to = 1> (low)
  fraction = Add (top, rest)
  w = Mul (step, fraction)
}

# The lower byte has the last bit of the exponent and the fraction. Below 2^-125 everything is 0.
Bf16 (low, high) => (w) {
  powers = Constant <value = BF16_POWERS> ()
  fractions = Constant <value = BF16_FRACTIONS> ()
  power = Gather <axis = 0> (powers, high)
  fraction = Gather <axis = 0> (fractions, low)
  w = Mul (power, fraction)
}

# Of what has a part for every strip the parts that hold the rows `ids`, one after the other
Strips <parts> (ids, x) => (picked) {
  line = Constant <value_ints = [-1]> ()
  flat = Reshape (ids, line)
  sixteen = Constant <value_int = 16> ()
  strip = Div (flat, sixteen)
  shape = Constant <value_ints: ints = @parts> ()
  cut = Reshape (x, shape)
  picked = Gather <axis = 0> (cut, strip)
}

# Where those rows are among all of these strips
Places (ids) => (at) {
  line = Constant <value_ints = [-1]> ()
  flat = Reshape (ids, line)
  sixteen = Constant <value_int = 16> ()
  row = Mod (flat, sixteen)
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  end = Size (flat)
  number = Range (zero, end, one)
  start = Mul (number, sixteen)
  at = Add (start, row)
}

# Columns `at` of w, as rows in the shape of `ids`
Rows (w, at, ids) => (y) {
  picked = Gather <axis = 1> (w, at)
  turned = Transpose <perm = [1, 0]> (picked)
  shape = Shape (ids)
  rest = Constant <value_ints = [-1]> ()
  whole = Concat <axis = 0> (shape, rest)
  y = Reshape (turned, whole)
}

# silu(a) * b of columns that are a and b by turns of 16: `turns` is [-1, turns of both, 2, 16]
Gate <turns> (x) => (y) {
  shape = Constant <value_ints: ints = @turns> ()
  cut = Reshape (x, shape)
  gate, up = Split <axis = 2, num_outputs = 2> (cut)
  open = Sigmoid (gate)
  act = Mul (gate, open)
  product = Mul (act, up)
  outer = Shape <end = -1> (x)
  rest = Constant <value_ints = [-1]> ()
  whole = Concat <axis = 0> (outer, rest)
  y = Reshape (product, whole)
}

# x over the root of its mean square, by `weight`
Norm <epsilon> (x, weight) => (y) {
  two = Constant <value_float = 2.0> ()
  square = Pow (x, two)
  last = Constant <value_ints = [-1]> ()
  mean = ReduceMean <keepdims = 1> (square, last)
  least = Constant <value_float: float = @epsilon> ()
  sum = Add (mean, least)
  root = Sqrt (sum)
  unit = Div (x, root)
  y = Mul (unit, weight)
}
"""

# Number of two bytes by its upper one, and by its lower one: Fp16 and Bf16 say what becomes of them.
_TABLES: Final = {
    "FP16_STEPS": [(-1) ** (b >> 7) * 2.0 ** (max(b >> 2 & 31, 1) - 25) for b in range(256)],
    "FP16_FRACTIONS": [float((b & 3) * 256 + 1024 * (b >> 2 & 31 > 0)) for b in range(256)],
    "BF16_POWERS": [(-1) ** (b >> 7) * 2.0 ** (2 * (b & 127) - 127) * (b & 127 > 0) for b in range(256)],
    "BF16_FRACTIONS": [2.0 ** (b >> 7) * (1 + (b & 127) / 128) for b in range(256)],
}


def write(folder: Path) -> None:
    """Write model.plain.onnx beside the model.onnx of `folder`; no weight is read."""
    import onnx

    made = convert(onnx.load(str(folder / MODEL), load_external_data=False))
    (folder / PLAIN).write_bytes(made.SerializeToString())


def convert(model: Any) -> Any:  # noqa: ANN401 - protobuf messages are untyped
    """The onnx.ModelProto without the operations of the domain `edgesft`; its initializers are kept."""
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = _Plain(made)
    del made.graph.node[:]
    for node in model.graph.node:
        if node.domain != DOMAIN:
            made.graph.node.append(node)
        elif node.op_type == LINEAR:
            graph.linear(node)
        elif node.op_type == EMBEDDING:
            graph.embedding(node)
        else:
            raise ValueError(f"`{node.op_type}` has no plain form")
    others = [o for o in made.opset_import if o.domain != DOMAIN]
    del made.opset_import[:]
    made.opset_import.extend([*others, onnx.helper.make_opsetid(PLAIN_DOMAIN, 1)])
    made.functions.extend(_needed(n.op_type for n in made.graph.node if n.domain == PLAIN_DOMAIN))
    return made


class _Plain:
    """Appends to the graph of `model` what stands for a node of ours. Values and nodes are named after it."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401
        self.graph = model.graph

    def op(self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:  # noqa: ANN401
        """Append a node of the standard or, if it is one of ours, a call; its first output."""
        import onnx

        domain = PLAIN_DOMAIN if kind in functions() else ""
        name = f"{outputs[0]}/{kind}"
        self.graph.node.append(
            onnx.helper.make_node(kind, inputs, outputs, name=name, domain=domain, **attributes)
        )
        return outputs[0]

    def decoded(self, about: "_About", stream: str, scales: str, rows: int, name: str) -> str:
        """w^T (columns, rows) as the value `name`."""
        kind = KINDS[about.sparse, about.value]
        ends = ((about.columns, layout.COLUMNS), (rows, layout.ROWS))
        shape = [size if size % unit else ALL for size, unit in ends]
        if about.value not in layout.OFFSETS:
            return self.op(kind, [stream], [name], tiles=about.tiled, shape=shape)
        count = layout.tiles(about.columns)
        return self.op(
            kind,
            [stream, scales],
            [name],
            tiles=about.tiled,
            groups=about.grouped,
            count=count,
            span=about.group // layout.COLUMNS or count,
            unit=about.unit,
            shape=shape,
        )

    def linear(self, node: Any) -> None:  # noqa: ANN401
        import onnx

        about, gate = _About.of(node), _attribute(node, "gate")
        x, stream, scales, bias, residual, norm = [*node.input, "", "", ""][:6]
        name, y = node.name.removesuffix(f"/{LINEAR}"), node.output[0]
        w = self.decoded(about, stream, scales, about.rows, f"{name}.decoded")
        shape = [about.columns, about.rows]  # a reader of the graph sees what a runtime will hold
        self.graph.value_info.append(onnx.helper.make_tensor_value_info(w, onnx.TensorProto.FLOAT, shape))
        if norm:
            x = self.op("Norm", [x, norm], [f"{name}.normed"], epsilon=_attribute(node, "epsilon"))
        steps: list[tuple[str, list[str], dict[str, Any]]] = [("MatMul", [w], {})]
        steps += [("Add", [each], {}) for each in (bias, residual) if each]
        if gate:
            steps.append(("Gate", [], {"turns": [-1, about.rows // SIDE_BY_SIDE, 2, layout.ROWS]}))
        for i, (kind, more, said) in enumerate(steps):
            x = self.op(kind, [x, *more], [y if i + 1 == len(steps) else f"{name}.step.{i}"], **said)

    def embedding(self, node: Any) -> None:  # noqa: ANN401
        """Of the table only the strips with the wanted rows are decoded, in every call."""
        about = _About.of(node)
        ids, stream, scales = node.input
        name, y = node.name.removesuffix(f"/{EMBEDDING}"), node.output[0]
        streams = self.op("Strips", [ids, stream], [f"{name}.streams"], parts=about.tiled)
        if about.value in layout.OFFSETS:
            scales = self.op("Strips", [ids, scales], [f"{name}.scales"], parts=about.grouped)
        w = self.decoded(about, streams, scales, ALL, f"{name}.decoded")
        at = self.op("Places", [ids], [f"{name}.places"])
        self.op("Rows", [w, at, ids], [y])


@dataclass(frozen=True)
class _About:
    """The matrix of a node. tiled, grouped: shapes of stream and scales by strips."""

    rows: int
    columns: int
    sparse: int
    value: str
    group: int
    unit: float

    @classmethod
    def of(cls, node: Any) -> "_About":  # noqa: ANN401
        numbers = {name: _attribute(node, name) for name in ("rows", "columns", "sparse", "group")}
        value = layout.VALUES[_attribute(node, "value")]
        return cls(**numbers, value=value, unit=_attribute(node, "unit"))

    @property
    def tiled(self) -> list[int]:
        pattern = layout.TWO_FOUR if self.sparse else layout.DENSE
        return [-1, layout.tiles(self.columns), 1, layout.tile_bytes(pattern, self.value)]

    @property
    def grouped(self) -> list[int]:
        return [-1, layout.groups(self.columns, self.group), layout.ROWS]


def _attribute(node: Any, name: str) -> Any:  # noqa: ANN401
    import onnx

    return next(onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name)


@functools.cache
def functions() -> dict[str, Any]:
    """The onnx.FunctionProto of every function by its name."""
    import onnx

    head = f'<domain: "{PLAIN_DOMAIN}", opset_import: ["": 21, "{PLAIN_DOMAIN}": 1]>\n'
    text = re.sub("|".join(_TABLES), lambda found: _numbers(_TABLES[found[0]]), _FUNCTIONS)
    parts = re.sub("^#.*\n", "", text, flags=re.MULTILINE).strip().split("\n\n")
    made = [onnx.parser.parse_function(head + part) for part in parts]
    return {each.name: each for each in made}


def _numbers(values: Iterable[float]) -> str:
    found = list(values)
    return f"float[{len(found)}] {{{', '.join(repr(v) for v in found)}}}"


def _needed(kinds: Iterable[str]) -> list[Any]:
    """The functions of these names and those that they call."""
    found: set[str] = set()
    pending = list(kinds)
    while pending:
        kind = pending.pop()
        if kind not in found:
            found.add(kind)
            pending += [n.op_type for n in functions()[kind].node if n.domain == PLAIN_DOMAIN]
    return [each for name, each in functions().items() if name in found]
