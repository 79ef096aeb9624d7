"""Where the time of a call goes, from ONNX Runtime's own profile of it and the graph that it ran.

The runtime writes one span a node (Chrome's trace format, whole microseconds) with the shapes that it saw. It
hides weights that it has packed anew, so weights come from the graph, matched by the node's name. Nodes that
the runtime made itself by fusing others have no counterpart there: of them only what the shapes alone decide
is said, the rest is None. Nothing is scaled to add up to anything.

Source: https://onnxruntime.ai/docs/performance/tune-performance/profiling-tools.html
"""

import json
import math
import re
import statistics
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgesft.core.errors import ArtifactError
from edgesft.exporters import custom, safety
from edgesft.exporters.costs import Call, Node, Tensor, Weight, cost, heavy
from edgesft.exporters.dialects.plain import PLAIN_DOMAIN

SUFFIX = "_kernel_time"  # the runtime appends it to the node's name
LAYER = re.compile(r"(?:^|[./_])(?:layers?|blocks?|h|hidden|stages?)[._/]?(\d+)(?=[./_]|$)", re.IGNORECASE)
# Operations that only give a constant another form: the runtime folds them when it loads the graph.
FORMS = frozenset({"Identity", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Cast", "DequantizeLinear"})
ROWS = frozenset(
    {"Gather", "GatherBlockQuantized", "GroupQueryAttention", "PackedEmbedding"}
)  # read rows of their weights only
PRODUCTS = frozenset(
    {"MatMul", "Gemm", "MatMulNBits", "MatMulInteger", "DynamicQuantizeMatMul", "PackedLinear"}
)
NAMES = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "double": "fp64"}
LEVELS = {0: "fp32", 1: "fp32", 2: "fp16", 3: "bf16", 4: "int8"}  # accuracy_level of MatMulNBits
DETAILS = (("bits", "{} bit"), ("block_size", "blocks of {}"), ("accuracy_level", "accuracy level {}"))


@dataclass(frozen=True)
class Graph:
    """What a graph says about its nodes. nodes: by name, those without a name or with a shared one left out.

    weight_bytes: of all weights that one call reads whole, each counted once. parameters: weights of all
    matrix products, a shared one as often as it is used; None if the weights of some are not in the graph,
    or if there are convolutions, which use each many times. cache_bytes: of the keys and values of one token
    in all layers; None if there is no KV cache, or of unknown size.
    """

    nodes: Mapping[str, Node]
    weight_bytes: int
    parameters: int | None
    cache_bytes: int | None


@dataclass(frozen=True)
class Event:
    """One execution of a node. start, duration, own (without what ran inside of it): microseconds."""

    name: str
    operator: str
    provider: str
    start: int
    duration: int
    own: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Run:
    """One call of the session. phase: `prefill`, `decode` or `call`; start, duration: microseconds.

    repetition: -1 is the warm-up.
    """

    phase: str
    repetition: int
    start: int
    duration: int
    events: tuple[Event, ...] = field(repr=False)


def read_graph(folder: Path, name: str = "model.onnx") -> Graph:
    """The graph in `folder / name`; no weight is read. Raises ArtifactError if it is broken."""
    graph = safety.parse(folder, name).graph
    weights = {t.name: Weight(tuple(t.dims), safety.BITS.get(t.data_type)) for t in graph.initializer}
    origin = {name: name for name in weights}  # value -> the initializer that it is a form of
    decoded = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in graph.value_info}
    found: list[Node] = []
    whole: dict[str, int] = {}
    for made in graph.node:
        if made.op_type == "Constant":
            constants = _constants(made)
            weights |= constants
            origin |= {name: name for name in constants}
            continue
        known = {i: value for i, value in enumerate(made.input) if value in weights}
        if made.domain == PLAIN_DOMAIN and made.output[0] in decoded:  # a runtime folds it into a matrix
            weights[made.output[0]] = Weight(decoded[made.output[0]], custom.plain_bits())
            origin[made.output[0]] = made.output[0]
            continue
        if made.op_type in FORMS and 0 in known:
            weights[made.output[0]] = weights[known[0]]
            origin[made.output[0]] = origin[known[0]]
            continue
        found.append(
            Node(made.name, made.op_type, _attributes(made), {i: weights[v] for i, v in known.items()})
        )
        if made.op_type not in ROWS:
            whole |= {origin[v]: weights[v].bytes or 0 for v in known.values()}
    names = Counter(node.name for node in found)
    unique = {node.name: node for node in found if node.name and names[node.name] == 1}
    return Graph(unique, sum(whole.values()), _parameters(found), _cache_bytes(graph))


def _cache_bytes(graph: Any) -> int | None:  # noqa: ANN401 - onnx.GraphProto
    """From the inputs `past_key_values.*` of shape (batch, heads, length, head)."""
    total = 0
    for value in graph.input:
        if value.name.startswith("past_key_values."):
            tensor = value.type.tensor_type
            sizes = [d.dim_value for d in tensor.shape.dim]
            bits = safety.BITS.get(tensor.elem_type)
            if len(sizes) != 4 or sizes[1] < 1 or sizes[3] < 1 or bits is None:
                return None
            total += sizes[1] * sizes[3] * bits // 8
    return total or None


def _constants(made: Any) -> dict[str, Weight]:  # noqa: ANN401 - onnx.NodeProto
    tensors = [a.t for a in made.attribute if a.name == "value"]
    found = [Weight(tuple(t.dims), safety.BITS.get(t.data_type)) for t in tensors]
    return dict(zip(made.output, found, strict=False))  # a constant of another form has no tensor


def _attributes(made: Any) -> dict[str, float]:  # noqa: ANN401 - onnx.NodeProto
    """Its numbers: AttributeProto types 1 (float) and 2 (integer)."""
    return {a.name: a.i if a.type == 2 else a.f for a in made.attribute if a.type in (1, 2)}


def _parameters(nodes: Sequence[Node]) -> int | None:
    total = 0
    for node in nodes:
        if "Conv" in node.operator:
            return None
        if node.operator == "MatMulNBits":
            total += math.prod(node.number(n) or 0 for n in ("K", "N"))
        elif node.operator == "PackedLinear":
            total += math.prod(node.number(n) or 0 for n in ("rows", "columns"))
        elif node.operator in PRODUCTS and 1 in node.weights:
            total += math.prod(node.weights[1].shape)
        elif node.operator in PRODUCTS and node.operator != "MatMul":
            return None  # MatMul alone has a meaning without weights: attention
    return total


def read_runs(raw: Path, phases: Sequence[Mapping[str, Any]]) -> list[Run]:
    """The calls of a session in its raw profile, in the order of time; those in none of `phases` left out.

    phases: `{phase, repetition, begin_us, end_us}`, on the clock of the profile.
    Raises ArtifactError if `raw` is not a profile of ONNX Runtime, or holds none of them.
    """
    try:
        found = json.loads(raw.read_text(encoding="utf-8"))
        spans = [(int(e["ts"]), int(e["dur"])) for e in found if e["name"] == "model_run"]
        nodes = [_event(e) for e in found if e.get("cat") == "Node" and e["name"].endswith(SUFFIX)]
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ArtifactError(f"`{raw}` is not a profile of ONNX Runtime: {error}") from None
    nodes.sort(key=lambda e: (e.start, -e.duration))
    starts = [e.start for e in nodes]
    runs = []
    for begin, length in sorted(spans):
        middle = begin + length / 2
        of = next((p for p in phases if p["begin_us"] <= middle <= p["end_us"]), None)
        if of is not None:
            events = nodes[bisect_left(starts, begin) : bisect_left(starts, begin + max(length, 1))]
            runs.append(Run(of["phase"], of["repetition"], begin, length, tuple(_nested(events))))
    if not any(run.events for run in runs):
        raise ArtifactError(f"`{raw}` holds {len(spans)} calls and {len(nodes)} nodes, none of what was run")
    return runs


def _event(entry: Mapping[str, Any]) -> Event:
    args, duration = entry["args"], int(entry["dur"])
    return Event(
        name=entry["name"].removesuffix(SUFFIX),
        operator=str(args["op_name"]),
        provider=str(args["provider"]).removesuffix("ExecutionProvider"),
        start=int(entry["ts"]),
        duration=duration,
        own=duration,
        inputs=_tensors(args.get("input_type_shape")),
        outputs=_tensors(args.get("output_type_shape")),
    )


def _tensors(listed: Any) -> tuple[Tensor, ...]:  # noqa: ANN401 - JSON
    return tuple(Tensor(kind, tuple(shape)) for each in listed or [] for kind, shape in each.items())


def _nested(events: Sequence[Event]) -> list[Event]:
    """The same, with the time of inner events (bodies of If, Loop, Scan) taken off the outer ones."""
    inner: dict[int, int] = defaultdict(int)
    stack: list[int] = []
    for index, event in enumerate(events):
        while stack and events[stack[-1]].start + events[stack[-1]].duration <= event.start:
            stack.pop()
        if stack:
            inner[stack[-1]] += event.duration
        if event.duration:
            stack.append(index)
    return [replace(e, own=max(0, e.duration - inner[i])) if i in inner else e for i, e in enumerate(events)]


def settled(runs: Sequence[Run], phase: str) -> list[Run]:
    """The runs of a phase, the warm-up left out."""
    return [run for run in runs if run.phase == phase and run.repetition >= 0]


def table(
    runs: Sequence[Run], graph: Graph | None, phase: str, *, context: float | None = None
) -> dict[str, Any]:
    """Where the time of a run of one phase goes, by the median of each node over `runs`.

    context: tokens in the KV cache, the new ones included, in the middle of `runs`.
    Returns `{phase, source, steps, total_ms, run_ms, rows, groups, layers, types}`: rows are an operator with
    one kernel in one layer; groups the nodes of one name in all layers (`layers.*.qkv`). ms, bytes and flops
    are of one run, calls of all runs; share is of total_ms, the sum over all nodes. flops: of the whole run
    but for additions and the like; None if some heavier operator's are unknown.
    """
    seen = _by_node(runs)
    nodes = [_measured(events, len(runs), graph, context) for events in seen.values()]
    total = sum(n["ms"] for n in nodes)
    rows = _grouped(nodes, ("operator", "kernel", "layer"), total)
    layers = _grouped([n for n in nodes if n["layer"] is not None], ("layer",), total)
    return {
        "phase": phase,
        "source": "the profiler of ONNX Runtime, in a process of its own",
        "steps": len(runs),
        "total_ms": total,
        "flops": _sum([n["flops"] for n in nodes if n["flops"] is not None or heavy(n["operator"])]),
        "run_ms": statistics.median(run.duration for run in runs) / 1e3,
        "rows": rows,
        "groups": _grouped(nodes, ("name", "operator", "kernel"), total),
        "layers": [
            {k: n[k] for k in ("layer", "ms", "share")} for n in sorted(layers, key=lambda n: n["layer"])
        ],
        "types": [
            {k: n[k] for k in ("operator", "kernel", "node_count", "ms", "share")}
            for n in _grouped(nodes, ("operator", "kernel"), total)
        ],
    }


def _by_node(runs: Sequence[Run]) -> dict[tuple[str, str], list[list[Event]]]:
    """(name, operator) -> for each run the executions of that node."""
    found: dict[tuple[str, str], list[list[Event]]] = {}
    for index, run in enumerate(runs):
        for event in run.events:
            each = found.setdefault((event.name, event.operator), [[] for _ in runs])
            each[index].append(event)
    return found


def _measured(
    runs: Sequence[Sequence[Event]], count: int, graph: Graph | None, context: float | None
) -> dict[str, Any]:
    """One node: ms of a run by the median, bytes and flops of a run by the middle one."""
    first = next(run[0] for run in runs if run)
    node = graph.nodes.get(first.name) if graph is not None else None
    if node is not None and node.operator != first.operator:
        node = None  # the runtime put something else in its place and kept the name
    middle = sorted((run for run in runs if run), key=len)[len([r for r in runs if r]) // 2]
    costs = [cost(Call(e.operator, node, e.inputs, e.outputs, context)) for e in middle]
    layer = LAYER.search(first.name)
    return {
        "name": _pattern(first.name, layer),
        "operator": first.operator,
        "kernel": _kernel(first, node),
        "layer": int(layer[1]) if layer else None,
        "arithmetic": _arithmetic(first, node),
        "calls": sum(len(run) for run in runs),
        "ms": statistics.median(sum(e.own for e in run) for run in runs) / 1e3,
        "bytes": _sum([c.bytes for c in costs]),
        "flops": _sum([c.flops for c in costs]),
    }


def _pattern(name: str, layer: re.Match[str] | None) -> str:
    """A node's name with its layer left open: `layers.*.qkv`."""
    return name if layer is None else name[: layer.start(1)] + "*" + name[layer.end(1) :]


def _kernel(event: Event, node: Node | None) -> str:
    """What ran it: provider, operator, and what chooses the code inside: element type, bits, accuracy."""
    details = [] if node is None else [(node.number(name), text) for name, text in DETAILS]
    said = [text.format(value) for value, text in details if value is not None]
    if node is not None and node.operator == "PackedLinear":
        said = [
            "2:4" if node.number("sparse") else "dense",
            ("int4", "int8", "fp16", "bf16")[node.number("value") or 0],
            f"groups of {node.number('group')}",
        ]
    if not said and event.outputs:
        said = [event.outputs[0].type]
    return ", ".join([f"{event.provider} {event.operator}", *said])


def _arithmetic(event: Event, node: Node | None) -> str | None:
    """In what the products of a node are computed: `fp32`, `int8`...; None where nothing tells."""
    if event.operator == "MatMulNBits":
        return None if node is None else LEVELS.get(node.number("accuracy_level") or 0)
    if event.operator == "PackedLinear":
        return None if node is None else "int8" if node.number("level") == 4 else "fp32"
    if "Integer" in event.operator or event.operator.startswith(("QLinear", "DynamicQuantize")):
        return "int8"
    return NAMES.get(event.outputs[0].type) if event.outputs else None


def _grouped(nodes: Sequence[Mapping[str, Any]], keys: Sequence[str], total: float) -> list[dict[str, Any]]:
    """Nodes that agree in `keys`, added up, the most expensive first. An unknown part makes a sum unknown."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for node in nodes:
        groups[tuple(node[k] for k in keys)].append(node)
    made = [
        {
            **dict(zip(keys, key, strict=True)),
            "arithmetic": members[0]["arithmetic"],
            "node_count": len(members),
            "calls": sum(m["calls"] for m in members),
            "ms": (ms := sum(m["ms"] for m in members)),
            "share": ms / total if total else None,
            "bytes": _sum([m["bytes"] for m in members]),
            "flops": _sum([m["flops"] for m in members]),
        }
        for key, members in groups.items()
    ]
    return sorted(made, key=lambda g: -g["ms"])


def _sum(parts: Sequence[int | None]) -> int | None:
    known = [p for p in parts if p is not None]
    return sum(known) if len(known) == len(parts) else None
