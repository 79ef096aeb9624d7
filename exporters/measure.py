"""Which form of a layer runs fastest on this machine: small graphs of ONNX Runtime, timed by turns."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from edgesft.core import console
from edgesft.core import threads as core_threads
from edgesft.exporters.dialects.graph import MICROSOFT
from edgesft.exporters.dialects.onnxruntime import IR_VERSION, OPSETS
from edgesft.exporters.dialects.packed import Choice, Layer
from edgesft.exporters.quantize import blocks
from edgesft.kernels.nm_matmul import layout, ort_op

ROUNDS: Final = 9
COLD_BYTES: Final = 64 << 20  # of different weights in a graph: more than caches hold
MOST_COPIES: Final = 256


class Fastest:
    """A `Choose`: for each layer the form whose decode step, one row of x, takes the least time here.

    Layers of one shape are measured once. margin: by how much a packed form has to win, so that noise decides
    for nothing that is as fast.
    """

    def __init__(self, dense_group: int, threads: int = 0) -> None:
        self._dense_group, self._threads = dense_group, core_threads.resolve(threads)
        self._seen: dict[tuple[Any, ...], Choice] = {}

    def __call__(self, layer: Layer) -> Choice:
        key = (layer.rows, layer.columns, layer.bits, layer.group, layer.sparse)
        if key not in self._seen:
            kinds = ("packed", "tiled", "dense") if layer.sparse else ("tiled", "dense")
            seconds = measure(layer, kinds, self._dense_group, self._threads)
            self._seen[key] = Choice(min(kinds, key=seconds.__getitem__), seconds)
            said = ", ".join(f"{kind} {seconds[kind] * 1e6:.0f} us" for kind in kinds)
            console.say(f"{layer.name} ({layer.rows} x {layer.columns}): {said}")
        return self._seen[key]


def measure(layer: Layer, kinds: Sequence[str], dense_group: int, threads: int) -> dict[str, float]:
    """Seconds of one call with one row of x by kind: medians of rounds in which all take turns."""
    contestants = {}
    for kind in kinds:
        made, copies = session(layer, kind, dense_group, threads)
        contestants[kind] = caller(made, layer, copies), copies
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind, (call, copies) in contestants.items():
            began = time.perf_counter()
            call()
            times[kind].append((time.perf_counter() - began) / copies)
    return {kind: statistics.median(found[1:]) for kind, found in times.items()}


def caller(made: Any, layer: Layer, copies: int, rows: int = 1) -> Callable[[], None]:  # noqa: ANN401
    """A call of a `session` with `rows` rows of x and memory for every result bound beforehand.

    Without that the runtime makes and hands over an array for each copy: a microsecond or two that a model
    never pays.
    """
    import onnxruntime as ort

    binding, value = made.io_binding(), ort.OrtValue.ortvalue_from_numpy
    x = np.random.default_rng(0).standard_normal((rows, layer.columns)).astype(np.float32)
    binding.bind_ortvalue_input("x", value(x))
    for copy in range(copies):
        binding.bind_ortvalue_output(f"y.{copy}", value(np.zeros((rows, layer.rows), np.float32)))

    def call() -> None:
        made.run_with_iobinding(binding)

    return call


def session(
    layer: Layer, kind: str, dense_group: int, threads: int, cold_bytes: int = COLD_BYTES
) -> tuple[Any, int]:
    """A session with so many different copies of the layer that caches cannot hold them, and how many.

    kind: `packed`, `tiled` or `dense`. Input x (rows, columns), outputs y.0, y.1... (rows, layer.rows).
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # the others want the cores
    if kind != "dense":
        ort_op.register(options)
    size = layer.rows * layer.columns * layer.bits // 8
    copies = max(1, min(MOST_COPIES, -(-cold_bytes // size)))
    model = _model(layer, kind, dense_group, copies)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]), copies


def _model(layer: Layer, kind: str, dense_group: int, copies: int) -> bytes:
    x = ir.Value(name="x", shape=ir.Shape(["rows", layer.columns]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes: list[ir.Node] = []
    values: list[ir.Value] = []
    outputs: list[ir.Value] = []

    def constant(name: str, array: Any) -> ir.Value:  # noqa: ANN401 - numpy arrays of any type
        tensor = ir.Tensor(array, name=name)
        shape, kind_ = tensor.shape, ir.TensorType(tensor.dtype)
        values.append(ir.Value(name=name, shape=shape, type=kind_, const_value=tensor))
        return values[-1]

    for copy in range(copies):
        if kind == "dense":
            operator, domain = "MatMulNBits", MICROSOFT
            arrays = _dense_arrays(layer, dense_group, copy)
            attributes: dict[str, int | float] = {
                "N": layer.rows,
                "K": layer.columns,
                "bits": layer.bits,
                "block_size": dense_group,
                "accuracy_level": 4,
            }
        else:
            operator, domain = ort_op.LINEAR, ort_op.DOMAIN
            packed = _random(layer.rows, layer.columns, layer.bits, layer.group, kind == "packed")
            arrays = [_different(packed, copy), packed.scales]
            attributes = ort_op.attributes(packed) | {"level": 4, "gate": 0, "epsilon": 0.0}
        inputs = [x, *(constant(f"{i}.{copy}", array) for i, array in enumerate(arrays))]
        y = ir.Value(name=f"y.{copy}", shape=ir.Shape(["rows", layer.rows]), type=x.type)
        nodes.append(ir.node(operator, inputs, attributes, domain=domain, outputs=[y], name=f"n.{copy}"))
        outputs.append(y)
    graph = ir.Graph(
        [x],
        outputs,
        nodes=nodes,
        initializers=values,
        opset_imports=OPSETS | {ort_op.DOMAIN: 1},
        name="measure",
    )
    made: bytes = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    return made


def _dense_arrays(layer: Layer, group: int, seed: int) -> list[Any]:
    """Codes, scales and, with 4 bits, zeros of MatMulNBits."""
    rng, n = np.random.default_rng(seed), blocks(layer.columns, group)
    codes = rng.integers(0, 256, (layer.rows, n, group * layer.bits // 8), np.uint8)
    scales = rng.random((layer.rows, n), np.float32)
    if layer.bits == 8:
        return [codes, scales]
    return [codes, scales, rng.integers(0, 256, (layer.rows, -(-n // 2)), np.uint8)]


@functools.lru_cache(maxsize=2)
def _random(rows: int, columns: int, bits: int, group: int, sparse: bool) -> layout.Packed:
    rng, value = np.random.default_rng(0), f"int{bits}"
    low, high = layout.LIMITS[value]
    codes = rng.integers(low, high + 1, (rows, columns)).astype(np.int8)
    if sparse:
        four = np.arange(columns) % 4
        codes[:, (four == 1) | (four == 2)] = 0
    scales = rng.random((rows, layout.groups(columns, group))).astype(np.float16)
    return layout.pack_codes(codes, scales, value, group, sparse=sparse)


def _different(packed: layout.Packed, copy: int) -> layout.Bytes:
    """The stream with another value in it: the runtime keeps equal weights once."""
    stream = packed.stream.copy()
    stream[-1 - copy % 64] ^= 1 + copy // 64  # a value, never an index
    return stream
