"""A decoder description in ONNX Runtime's own operations, built with onnx-ir and written as it is built.

Ten nodes a block: SkipSimplifiedLayerNormalization, one MatMul(NBits) for q, k and v, GroupQueryAttention
(rotary positions, KV cache and window inside), one for the output, the norm again, one for gate and up,
Split, QuickGelu(alpha=1) = SiLU, Mul, one for down.

Inputs: input_ids (B, S), attention_mask (B, P + S) with ones first (right padding), past_key_values.{i}.key
and .value (B, kv_heads, P, head_dim). With S > 1 and B > 1, P is 0. Past and present may be one buffer of
more than P + S rows. `logit_positions` (N,) are flat indices b * S + t; it has a default, the last one, so a
caller who does not know it gets the next token's logits. Outputs: logits (N, vocabulary), present.{i}.key
and .value. The values `hidden.{i}` are the residual stream after block i: (B, S, hidden), in the last block
(N, hidden), for there everything after attention is computed at the chosen positions only.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgesft import __version__
from edgesft.core import console
from edgesft.exporters.decoder import Block, Decoder
from edgesft.exporters.description import MODEL
from edgesft.exporters.dialects.graph import MICROSOFT, Built, Graph, Precision
from edgesft.exporters.external import ALIGN, DataFile, check_space
from edgesft.exporters.quantize import blocks
from edgesft.exporters.weights import Arrays

OPSETS = {"": 21, MICROSOFT: 1}
IR_VERSION = 10
POSITIONS = "logit_positions"


def build(decoder: Decoder, weights: Arrays, out: Path, precision: Precision) -> Built:
    """Write model.onnx and model.onnx.data into `out`.

    Raises ArtifactError for NaN or Inf weights and when the disk is too small.
    """
    check_space(out, needed(decoder, precision))
    with DataFile(out) as data:
        graph = DecoderGraph(decoder, weights, precision, data)
        graph.decoder()
    save(graph, out, OPSETS)
    return graph.built


def save(graph: "DecoderGraph", out: Path, opsets: dict[str, int]) -> None:
    """Write model.onnx of a graph that is whole."""
    model = ir.Model(
        ir.Graph(
            graph.inputs,
            graph.outputs,
            nodes=graph.nodes,
            initializers=graph.initializers,
            opset_imports=opsets,
            name=graph.d.family,
        ),
        ir_version=IR_VERSION,
        producer_name="edgesft",
        producer_version=__version__,
    )
    ir.save(model, out / MODEL)


def needed(decoder: Decoder, precision: Precision) -> int:
    """Bytes that the export takes on disk, rounded up by a few pages a tensor."""
    d = decoder
    linear = d.hidden * (d.q_width * 2 + d.kv_width * 2 + 2 * d.intermediate)
    per_weight = {32: 4.0, 8: 1 + 4 / precision.group, 4: 0.5 + 4.5 / precision.group}
    total = d.layers * linear * per_weight[precision.bits("linear")]
    total += d.layers * d.hidden * d.intermediate * per_weight[precision.bits("down")]
    tables = 1 if d.tied else 2
    total += tables * d.vocabulary * d.hidden * per_weight[precision.bits("head")]
    total += d.context * d.head_dim * 4
    return int(total) + (12 * d.layers + 8) * ALIGN + (1 << 20)


class DecoderGraph(Graph):
    """A decoder graph under construction."""

    def __init__(self, decoder: Decoder, weights: Arrays, precision: Precision, data: DataFile) -> None:
        super().__init__(weights, precision, data)
        self.d = decoder

    def decoder(self) -> None:
        """The whole model."""
        d = self.d
        ids = self.input("input_ids", ir.DataType.INT64, "batch", "sequence")
        mask = self.input("attention_mask", ir.DataType.INT64, "batch", "total")
        past = []
        for i in range(d.layers):
            shape = ("batch", d.kv_heads, "past", d.head_dim)
            past.append(
                [self.input(f"past_key_values.{i}.{n}", ir.DataType.FLOAT, *shape) for n in ("key", "value")]
            )
        positions = self.positions()
        self.lengths(mask)
        self.rotary()
        stream = self.embed(ids)
        normed = self.enter(stream, "hidden.first", d.blocks[0].attention_norm)
        present = []
        with console.progress("export", d.layers) as bar:
            for i, block in enumerate(d.blocks):
                last = i + 1 == d.layers
                after = d.final_norm if last else d.blocks[i + 1].attention_norm
                attended, cache = self.attention(i, block, normed, past[i])
                if last:  # from here on at the chosen positions only
                    attended = self.pick(attended, positions, d.q_width, "attended")
                    stream = self.pick(stream, positions, d.hidden, "stream")
                normed, stream = self.join(
                    stream,
                    attended,
                    f"layers.{i}.o",
                    block.o,
                    block.o_bias,
                    f"hidden.{i}.attention",
                    block.mlp_norm,
                )
                product = self.product(f"layers.{i}", block, normed)
                normed, stream = self.join(
                    stream,
                    product,
                    f"layers.{i}.down",
                    block.down,
                    block.down_bias,
                    f"hidden.{i}",
                    after,
                    "down",
                )
                present.append(cache)
                bar.advance()
        self.output(self.head(normed), "positions", d.vocabulary)
        for cache in present:
            for value in cache:
                self.output(value, "batch", d.kv_heads, "present", d.head_dim)

    def positions(self) -> ir.Value:
        """The last of the flat positions, unless the caller says others."""
        return self.optional(POSITIONS, np.array([-1], np.int64), "positions")

    def lengths(self, mask: ir.Value) -> None:
        """What GroupQueryAttention asks for: tokens of each row less one, and of the longest row."""
        (total,) = self.op("ReduceSum", [mask, self.integers("axis.one", 1)], "mask.sum", keepdims=0)
        (less,) = self.op("Sub", [total, self.integers("one", 1)], "mask.last")
        (self.last,) = self.op("Cast", [less], "seqlens_k", to=ir.DataType.INT32)
        (shape,) = self.op("Shape", [mask], "mask.shape", start=1, end=2)
        (scalar,) = self.op("Squeeze", [shape], "mask.length")
        (self.total,) = self.op("Cast", [scalar], "total_sequence_length", to=ir.DataType.INT32)

    def rotary(self) -> None:
        cosines, sines = self.d.rope.tables(self.d.context)
        self.cosines, self.sines = self.constant("rotary.cos", cosines), self.constant("rotary.sin", sines)

    def embed(self, ids: ir.Value) -> ir.Value:
        """(B, S, hidden). A tied table is kept once, in the layout of the head."""
        d, group = self.d, self.precision.group
        if self.precision.bits("embedding") == 32:
            self.shared = self.vector("embedding.weight", d.embedding)
            return self.op("Gather", [self.shared, ids], "embedding")[0]
        self.tied = table = self.table("embedding", [d.embedding], "embedding")
        # MatMulNBits keeps scales as (V, blocks), the gather wants them in the rank of the codes
        (column,) = self.op("Unsqueeze", [table.scales, self.integers("axis.two", 2)], "embedding.column")
        (rows,) = self.op(
            "GatherBlockQuantized",
            [table.codes, ids, column],
            "embedding.blocks",
            domain=MICROSOFT,
            bits=table.bits,
            block_size=group,
            gather_axis=0,
            quantize_axis=2,
        )
        width = blocks(d.hidden, group) * group
        (flat,) = self.op(
            "Reshape", [rows, self.integers("embedding.shape", 0, 0, width)], "embedding.padded"
        )
        if width == d.hidden:
            return flat
        ends = [self.integers(f"embedding.{n}", v) for n, v in (("start", 0), ("end", d.hidden), ("axis", 2))]
        return self.op("Slice", [flat, *ends], "embedding")[0]

    def head(self, x: ir.Value) -> ir.Value:
        """Logits (N, vocabulary) of x (N, hidden)."""
        d = self.d
        bias = self.vector("logits.bias", d.head_bias) if d.head_bias else None
        if self.precision.bits("head") < 32:
            return self.matmul(
                x, self.tied if d.tied else self.table("head", [d.head], "head"), bias, "logits"
            )
        # Gemm takes the table as the embedding has it, so that a tied one is kept once
        inputs = [x, self.shared if d.tied else self.vector("head.weight", d.head)]
        return self.op("Gemm", [*inputs, bias] if bias else inputs, "logits", transB=1)[0]

    def norm(self, x: ir.Value, name: str, weight: str) -> ir.Value:
        """Root-mean-square norm over the last axis (Zhang and Sennrich, 2019)."""
        scale = self.vector(f"{name}.norm.weight", weight)
        return self.op(
            "SimplifiedLayerNormalization",
            [x, scale],
            f"{name}.norm",
            axis=-1,
            epsilon=self.d.eps,
            stash_type=1,
        )[0]

    def enter(self, stream: ir.Value, name: str, weight: str) -> ir.Value:
        """The stream as the first block reads it."""
        return self.norm(stream, name, weight)

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
        """A projection of x back into the stream: (norm of the new stream, the new stream called `total`)."""
        return self.skip(stream, self.linear(x, name, [source], [bias], role), total, weight)

    def skip(self, stream: ir.Value, update: ir.Value, name: str, weight: str) -> tuple[ir.Value, ir.Value]:
        """(norm of the sum, the sum); the sum is the value called `name`."""
        scale = self.vector(f"{name}.norm.weight", weight)
        normed, _, _, total = self.op(
            "SkipSimplifiedLayerNormalization",
            [update, stream, scale],
            [f"{name}.norm", "", "", name],
            domain=MICROSOFT,
            epsilon=self.d.eps,
        )
        return normed, total

    def attention(
        self, i: int, b: Block, x: ir.Value, past: Sequence[ir.Value]
    ) -> tuple[ir.Value, list[ir.Value]]:
        """(B, S, heads * head_dim) before the output projection, and the new cache."""
        d, name = self.d, f"layers.{i}"
        out, key, value = self.op(
            "GroupQueryAttention",
            [*self.query(name, b, x), *past, self.last, self.total, self.cosines, self.sines],
            [f"{name}.attention", f"present.{i}.key", f"present.{i}.value"],
            domain=MICROSOFT,
            num_heads=d.heads,
            kv_num_heads=d.kv_heads,
            scale=d.head_dim**-0.5,
            do_rotary=1,
            rotary_interleaved=0,
            local_window_size=b.window or -1,
        )
        return out, [key, value]

    def query(self, name: str, b: Block, x: ir.Value) -> list[ir.Value | None]:
        """q, k and v (B, S, heads * head_dim); all of them in the first where no norm comes between."""
        d = self.d
        packed = self.linear(x, f"{name}.qkv", [b.q, b.k, b.v], [b.q_bias, b.k_bias, b.v_bias])
        if not (b.q_norm and b.k_norm):
            return [packed, None, None]
        sizes = self.integers(f"{name}.qkv.sizes", d.q_width, d.kv_width, d.kv_width)
        q, k, v = self.op("Split", [packed, sizes], [f"{name}.{n}" for n in "qkv"], axis=-1)
        return self.normed(name, b, q, k, v)

    def normed(self, name: str, b: Block, q: ir.Value, k: ir.Value, v: ir.Value) -> list[ir.Value | None]:
        """q and k after their norms, where the block has some, and v."""
        if not (b.q_norm and b.k_norm):
            return [q, k, v]
        return [
            self.per_head(q, f"{name}.q", b.q_norm, self.d.heads),
            self.per_head(k, f"{name}.k", b.k_norm, self.d.kv_heads),
            v,
        ]

    def per_head(self, x: ir.Value, name: str, weight: str, heads: int) -> ir.Value:
        """A norm over each head of x (B, S, heads * head_dim), as Qwen3 has it on q and k."""
        dim = self.d.head_dim
        (split,) = self.op("Reshape", [x, self.integers(f"{name}.split", 0, 0, heads, dim)], f"{name}.heads")
        normed = self.norm(split, name, weight)
        return self.op(
            "Reshape", [normed, self.integers(f"{name}.join", 0, 0, heads * dim)], f"{name}.normed"
        )[0]

    def pick(self, x: ir.Value, positions: ir.Value, width: int, name: str) -> ir.Value:
        """Rows (N, width) of x (B, S, width) at flat positions."""
        (flat,) = self.op("Reshape", [x, self.integers(f"{name}.flat", -1, width)], f"{name}.rows")
        return self.op("Gather", [flat, positions], f"{name}.picked", axis=0)[0]

    def product(self, name: str, b: Block, x: ir.Value) -> ir.Value:
        """silu(gate x) * up x, (..., intermediate)."""
        gate, up = self.gate_up(name, b, x)
        (act,) = self.op("QuickGelu", [gate], f"{name}.act", domain=MICROSOFT, alpha=1.0)
        return self.op("Mul", [act, up], f"{name}.product")[0]

    def gate_up(self, name: str, b: Block, x: ir.Value) -> list[ir.Value]:
        both = self.linear(x, f"{name}.gate_up", [b.gate, b.up], [b.gate_bias, b.up_bias])
        return self.op("Split", [both], [f"{name}.gate", f"{name}.up"], axis=-1, num_outputs=2)
