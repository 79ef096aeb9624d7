"""What one execution of an ONNX node must move and compute at least, from shapes, attributes and weights.

Bytes: inputs, weights and outputs once each, as if every cache missed once and hit afterwards. Flops: two for
each multiplication with its addition. What the shapes do not decide is None, never a guess.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

BITS = {
    "float": 32, "float16": 16, "bfloat16": 16, "double": 64, "int64": 64, "uint64": 64, "int32": 32,
    "uint32": 32, "int16": 16, "uint16": 16, "int8": 8, "uint8": 8, "bool": 8, "int4": 4, "uint4": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """What the runtime saw at an input or output. type: its own name, `float`, `int64`..."""

    type: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int | None:
        bits = BITS.get(self.type)
        return None if bits is None else (self.numel * bits + 7) // 8


@dataclass(frozen=True)
class Weight:
    """An initializer of the graph. bits: of an element; None for a type that has no fixed size."""

    shape: tuple[int, ...]
    bits: int | None

    @property
    def bytes(self) -> int | None:
        return None if self.bits is None else (math.prod(self.shape) * self.bits + 7) // 8


@dataclass(frozen=True)
class Node:
    """A node of the graph. attributes: the numeric ones; weights: by the index of the input."""

    name: str
    operator: str
    attributes: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[int, Weight] = field(default_factory=dict)

    def number(self, name: str) -> int | None:
        value = self.attributes.get(name)
        return None if value is None else int(value)


@dataclass(frozen=True)
class Cost:
    """bytes and flops of one execution; None: unknown."""

    bytes: int | None = None
    flops: int | None = None


@dataclass(frozen=True)
class Call:
    """One execution. node: None if the runtime made it itself. context: tokens in the cache, if known."""

    operator: str
    node: Node | None
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    context: float | None = None

    def weight(self, index: int) -> Weight | None:
        return None if self.node is None else self.node.weights.get(index)

    def number(self, name: str) -> int | None:
        return None if self.node is None else self.node.number(name)


def cost(call: Call) -> Cost:
    """Bytes and flops of one execution of any operator."""
    if call.operator in RULES and call.outputs:
        return RULES[call.operator](call)
    if call.operator in STREAMS:
        return Cost(_total(t.bytes for t in (*call.inputs, *call.outputs)))
    return Cost()


def heavy(operator: str) -> bool:
    """Whether an operator of unknown flops may have many."""
    return operator not in STREAMS and operator not in FREE


def _total(parts: Iterable[int | None]) -> int | None:
    """The sum, unless a part is unknown."""
    total = 0
    for part in parts:
        if part is None:
            return None
        total += part
    return total


def _bits_product(call: Call) -> Cost:
    """MatMulNBits: input 0 (..., K), weights packed, output (..., N)."""
    a, out = call.inputs[0], call.outputs[0]
    width = call.number("K") or a.shape[-1]
    moved = None
    if call.node is not None and 1 in call.node.weights:
        moved = _total([a.bytes, out.bytes, *(w.bytes for w in call.node.weights.values())])
    return Cost(moved, 2 * out.numel * width)


def _packed(call: Call) -> Cost:
    """PackedLinear: input 0 (..., columns), a stream and scales in the graph, output (..., rows or half).

    Zeros that are not stored are not computed with either, but flops count the whole matrix, as for the dense
    forms that it is compared with.
    """
    a, out = call.inputs[0], call.outputs[0]
    rows, columns = call.number("rows"), call.number("columns")
    if call.node is None or rows is None or not columns:
        return Cost()
    moved = _total([a.bytes, out.bytes, *(w.bytes for w in call.node.weights.values())])
    return Cost(moved, 2 * (a.numel // columns) * rows * columns)


def _packed_rows(call: Call) -> Cost:
    """PackedEmbedding: rows of codes become float."""
    out, tiled = call.outputs[0], call.weight(1)
    rows, columns = call.number("rows"), call.number("columns")
    if tiled is None or tiled.bytes is None or not rows or not columns:
        return Cost(None, 2 * out.numel)
    return Cost(_total([out.bytes, tiled.bytes * (out.numel // columns) // rows]), 2 * out.numel)


def _product(call: Call) -> Cost:
    """MatMul and its kin: A (..., M, K), B (K, N) or (..., K, N), output (..., M, N).

    B is missing among the inputs when the runtime has packed it; then it is in the graph, or unknown.
    """
    a, out = call.inputs[0], call.outputs[0]
    if not a.shape:
        return Cost()
    width = a.shape[-1]
    packed = call.weight(1)
    if packed is not None:
        return Cost(_total([a.bytes, packed.bytes, out.bytes]), 2 * out.numel * width)
    if len(call.inputs) < 2:
        # fused nodes may transpose what they are given; without B nothing tells
        return Cost(None, 2 * out.numel * width if call.operator != "FusedMatMul" else None)
    b = call.inputs[1]
    rows = b.shape[-2] if len(b.shape) > 1 else b.numel
    if rows != width:
        return Cost(_total([a.bytes, b.bytes, out.bytes]))
    return Cost(_total([a.bytes, b.bytes, out.bytes]), 2 * out.numel * width)


def _gemm(call: Call) -> Cost:
    """A (M, K) or, transposed, (K, M); B may be packed and missing; C is small."""
    a, out = call.inputs[0], call.outputs[0]
    if len(a.shape) != 2 or len(out.shape) != 2:
        return Cost()
    transposed = call.number("transA")
    if transposed is None:  # left out, or a node that the runtime made
        transposed = int(call.node is None and a.shape[0] != out.shape[0])
    width = a.shape[0] if transposed else a.shape[1]
    packed = call.weight(1)
    found = packed.bytes if packed is not None else None
    if found is None:
        matrices = [t for t in call.inputs[1:] if sorted(t.shape) == sorted((width, out.shape[1]))]
        found = matrices[0].bytes if matrices else None
    return Cost(_total([a.bytes, found, out.bytes]), 2 * out.numel * width)


def _convolution(call: Call) -> Cost:
    """X (B, C, ...), W (M, C / groups, ...), output (B, M, ...): each output sums a whole W[m]."""
    x, out = call.inputs[0], call.outputs[0]
    place = 3 if call.operator == "QLinearConv" else 1
    kept = call.weight(place)
    if kept is not None:
        shape, moved = kept.shape, kept.bytes
    elif len(call.inputs) > place and len(call.inputs[place].shape) == len(x.shape):
        shape, moved = call.inputs[place].shape, call.inputs[place].bytes
    else:
        return Cost()
    each = x.numel if call.operator == "ConvTranspose" else out.numel
    return Cost(_total([x.bytes, moved, out.bytes]), 2 * each * math.prod(shape[1:]))


def _gather(call: Call) -> Cost:
    """As many elements read as written, and the indices; nothing is computed."""
    out = call.outputs[0].bytes
    indices = [t.bytes for t in call.inputs if t.type in ("int64", "int32")][-1:]
    return Cost(_total([out, out, *indices]), 0)


def _gather_quantized(call: Call) -> Cost:
    """GatherBlockQuantized: rows of codes and scales become float. Dequantising is one product an element."""
    out = call.outputs[0]
    bits, block = call.number("bits"), call.number("block_size")
    indices = [t.bytes for t in call.inputs if t.type in ("int64", "int32")][:1]
    if bits is None or block is None:
        return Cost(None, 2 * out.numel)
    read = (out.numel * bits + 7) // 8 + 4 * math.ceil(out.numel / block)
    return Cost(_total([out.bytes, read, *indices]), 2 * out.numel)


def _grouped_attention(call: Call) -> Cost:
    """GroupQueryAttention: scores and their product with V, over `context` tokens of the cache.

    The cache's buffer may be longer than what it holds, so its shape does not tell. Inputs as listed:
    query (or packed), [key, value,] past key (B, kv heads, length, head), past value...
    """
    heads, kv = call.number("num_heads"), call.number("kv_num_heads")
    caches = [t for t in call.inputs if len(t.shape) == 4]
    if heads is None or kv is None or not caches or call.context is None:
        return Cost()
    batch, _, _, size = caches[0].shape
    tokens = call.outputs[0].numel // (batch * heads * size)
    # the first new token sees the cache before it and itself, the last one all
    seen = call.context - (tokens - 1) / 2
    each = (BITS.get(caches[0].type) or 32) / 8
    cache = 2 * batch * kv * size * each * (call.context + tokens)  # read once, the new rows written
    small = [t.bytes for t in call.inputs if len(t.shape) == 3]
    moved = _total([call.outputs[0].bytes, *small])
    flops = round(4 * batch * heads * size * tokens * seen)
    return Cost(None if moved is None else moved + round(cache), flops)


def _fused_attention(call: Call) -> Cost:
    """Attention of com.microsoft without a cache: input (B, S, H), weights (H, 3 H), output (B, S, H)."""
    x, out = call.inputs[0], call.outputs[0]
    if len(x.shape) != 3 or x.shape[:2] != out.shape[:2] or any(len(t.shape) == 5 for t in call.inputs):
        return Cost()
    batch, length, width = x.shape
    projection = 2 * batch * length * width * 3 * out.shape[-1]
    return Cost(None, projection + 4 * batch * length * length * out.shape[-1])


# fmt: off
# They read every input and write every output once; their flops an element differ too much to be counted.
STREAMS = frozenset({
    "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Neg", "Abs", "Exp", "Log", "Tanh", "Sigmoid", "Relu",
    "LeakyRelu", "Clip", "Erf", "Gelu", "FastGelu", "BiasGelu", "QuickGelu", "Elu", "HardSwish",
    "HardSigmoid", "Softmax", "LogSoftmax", "LayerNormalization", "SimplifiedLayerNormalization",
    "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "RMSNormalization", "BatchNormalization",
    "InstanceNormalization", "Split", "Concat", "Transpose", "Cast", "Where", "Equal", "Less", "Greater",
    "And", "Or", "Not", "Min", "Max", "Sum", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear",
    "RotaryEmbedding", "BiasAdd", "AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool", "Pad",
    "Tile", "Sin", "Cos", "ReduceMean", "ReduceSum", "ReduceMax", "ReorderInput", "ReorderOutput",
})
# They only hand on what there is, or so little that it does not matter.
FREE = frozenset({
    "Reshape", "Shape", "Size", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice", "Expand", "Range",
    "ConstantOfShape", "NonZero", "If",
})
# fmt: on

RULES: Mapping[str, Callable[[Call], Cost]] = {
    "MatMulNBits": _bits_product,
    "PackedLinear": _packed,
    "PackedEmbedding": _packed_rows,
    **dict.fromkeys(("MatMul", "FusedMatMul", "MatMulInteger", "MatMulIntegerToFloat"), _product),
    "DynamicQuantizeMatMul": _product,
    **dict.fromkeys(("Gemm", "FusedGemm"), _gemm),
    **dict.fromkeys(("Conv", "FusedConv", "QLinearConv", "ConvInteger", "ConvTranspose"), _convolution),
    "Gather": _gather,
    "GatherBlockQuantized": _gather_quantized,
    "GroupQueryAttention": _grouped_attention,
    "Attention": _fused_attention,
}
