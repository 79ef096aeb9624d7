"""Run any ONNX file: a decoder through its KV cache, every other graph on inputs made for it.

Inputs come from names, types and shapes. Sizes that the file leaves open are known by their names (batch,
sequence, past); others have to be given. Whole numbers that select rows of a table stay within the table.
Nothing of the file reaches ONNX Runtime before the places of its external data are found safe. Only the CPU
runs it.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgesft.core import threads as core_threads
from edgesft.core.errors import ArtifactError, DeviceError, EdgeSFTError, UsageError
from edgesft.exporters import safety
from edgesft.exporters.runtime import Growing, open_session

if TYPE_CHECKING:
    from edgesft.core.protocols import Decoding

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

TYPES: dict[str, npt.DTypeLike] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    **{f"tensor({n})": n for n in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
    "tensor(bool)": np.bool_,
}
MAX_BYTES = 2**34  # of one input; more is a mistake in a shape
PAST = re.compile(r"past_key_values\.\d+\.(key|value)")
FILLED = {"input_ids", "attention_mask", "position_ids", "num_logits_to_keep"}  # by `Growing`
# Names that exporters make up for a size without one: of PyTorch, tf2onnx, ONNX Runtime
ANONYMOUS = re.compile(r"|\?|unk_*\d+|s\d+|u\d+|dim_?\d+|.*_dim_\d+|.*(dynamic_axes|axis)_\d+", re.IGNORECASE)
BATCH = re.compile(r".*batch.*|n|b|bs", re.IGNORECASE)
SEQUENCE = re.compile(r".*(seq|tok|total|length|len).*|s|t|l", re.IGNORECASE)
TEXT = re.compile(r"(^|_)(ids|mask|tokens?)(_|$)")
PASSING = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Expand"}
STORED = {"Cast", "Identity", "DequantizeLinear", "QuantizeLinear"}


def files(path: Path) -> tuple[Path, ...]:
    """A graph's file, a link to it followed, and every file of its external data, all found safe.

    Raises ArtifactError for what is missing, broken or reaches outside its folder.
    """
    path = _followed(path)
    return path, *(path.parent / name for name in sorted(safety.check(path.parent, path.name)))


def _followed(path: Path) -> Path:
    """The user named this path himself, so a link there is meant; inside of the folder none is followed."""
    try:
        return Path(path).resolve(strict=True)
    except (OSError, RuntimeError):
        raise ArtifactError(f"`{path}` does not exist") from None


@dataclass(frozen=True)
class Input:
    """An input of a graph. shape: sizes, or names of sizes that are left open (empty where unnamed)."""

    name: str
    dtype: npt.DTypeLike
    shape: tuple[int | str, ...]


class GraphRunnable:
    """A foreign ONNX file. kind: `decoder` if it has a KV cache that can be fed, else `graph`.

    shapes: of inputs, by name, where the file leaves them open and their names do not tell. trace: see
    `runtime.open_session`. vocabulary: rows of the table that token ids select; None if there is none to be
    found. Raises ArtifactError for a file that is broken, unsafe or wants what cannot be made up, UsageError
    for `shapes` that do not fit.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int = 0,
        spin: bool = True,
        shapes: Mapping[str, Sequence[int]] | None = None,
        trace: Path | None = None,
    ) -> None:
        self.path = _followed(path)
        model = safety.parse(self.path.parent, self.path.name)
        safety.references(model, self.path.parent, self.path.name)
        self.bounds = bounds(model)
        del model
        self.threads = core_threads.resolve(threads)
        self.session = open_session(self.path, threads=self.threads, spin=spin, trace=trace)
        self.inputs = [self._input(i) for i in self.session.get_inputs()]
        self._defaults = [i.name for i in self.session.get_overridable_initializers()]
        self._outputs = self.session.get_outputs()
        self.shapes = self._checked(shapes or {})
        self.kind: str = "decoder" if self._decodes() else "graph"
        self.vocabulary: int | None = self._vocabulary()
        if self.kind == "decoder" and self.vocabulary is None:
            raise ArtifactError(f"`{self.path}` does not tell the size of its vocabulary")

    def _input(self, given: Any) -> Input:  # noqa: ANN401 - onnxruntime.NodeArg
        if given.type not in TYPES:
            known = ", ".join(f"`{t}`" for t in TYPES)
            raise ArtifactError(
                f"input `{given.name}` of `{self.path}` has the type `{given.type}`, expected one of {known}"
            )
        shape = tuple(d if isinstance(d, int) and d >= 0 else str(d or "") for d in given.shape or ())
        return Input(given.name, TYPES[given.type], shape)

    def _checked(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
        """`shapes`, each of a known input, of its rank and with its fixed sizes. Raises UsageError."""
        known = {i.name: i for i in self.inputs}
        for name, shape in shapes.items():
            if name not in known:
                listed = ", ".join(f"`{n}`" for n in known) or "none"
                raise UsageError(f"`{self.path}` has no input `{name}`, its inputs are {listed}")
            wanted = known[name].shape
            fits = len(shape) == len(wanted) and all(
                given >= 0 and (isinstance(size, str) or given == size)
                for given, size in zip(shape, wanted, strict=True)
            )
            if not fits:
                raise UsageError(f"shape `{_text(shape)}` of `{name}` does not fit `{_text(wanted)}`")
        return {name: tuple(int(d) for d in shape) for name, shape in shapes.items()}

    # A decoder

    def _decodes(self) -> bool:
        """Whether it has a KV cache under the usual names and nothing else that would have to be known."""
        takes, gives = {i.name for i in self.inputs}, {o.name for o in self._outputs}
        past = {n for n in takes if PAST.fullmatch(n)}
        present = {n.replace("past_key_values.", "present.", 1) for n in past}
        if not past or not present | {"logits"} <= gives or "input_ids" not in takes:
            return False
        if "use_cache_branch" in takes:
            raise ArtifactError(
                f"`{self.path}` holds two decoders in one (`use_cache_branch`), expected one of them alone"
            )
        return takes <= past | FILLED

    def _vocabulary(self) -> int | None:
        found = self.bounds.get("input_ids")
        logits = next((o for o in self._outputs if o.name == "logits"), None)
        if found is None and logits is not None and logits.shape and isinstance(logits.shape[-1], int):
            found = logits.shape[-1] if self.kind == "decoder" else None
        return found

    def start(self, capacity: int, batch: int = 1) -> "Decoding":
        """A fresh decoding state with room for `capacity` tokens, see `OnnxRunnable.start`."""
        if self.kind != "decoder":
            raise UsageError(f"`{self.path}` has no KV cache, only a decoder generates text")
        assert self.vocabulary is not None
        past = {
            i.name: np.zeros(self._shape(i, 0, batch), i.dtype) for i in self.inputs if PAST.fullmatch(i.name)
        }
        state = Growing(
            self.session,
            past,
            self.vocabulary,
            capacity,
            batch,
            takes=[*(i.name for i in self.inputs), *self._defaults],
            dtypes={i.name: i.dtype for i in self.inputs},
        )
        return _Explained(self, state)

    # Every other graph

    def describe(self, sequence: int, batch: int = 1) -> dict[str, dict[str, Any]]:
        """`{name: {"type", "shape"}}` of the inputs that `feeds` makes.

        Raises UsageError like it, and for a batch that no input has room for.
        """
        shapes = [self._shape(i, sequence, batch) for i in self.inputs]
        if batch > 1 and shapes == [self._shape(i, sequence, 1) for i in self.inputs]:
            raise UsageError(f"`{self.path}` has no open batch size, so it cannot take a batch of {batch}")
        return {
            i.name: {"type": np.dtype(i.dtype).name, "shape": list(shape)}
            for i, shape in zip(self.inputs, shapes, strict=True)
        }

    def feeds(self, sequence: int, batch: int, rng: np.random.Generator) -> Feeds:
        """Inputs of one call. sequence, batch: sizes that are left open and named so.

        Raises UsageError for an open size that is neither, with the way to give it.
        """
        return {
            i.name: _values(i, self._shape(i, sequence, batch), self.bounds.get(i.name), rng)
            for i in self.inputs
        }

    def _shape(self, given: Input, sequence: int, batch: int) -> tuple[int, ...]:
        if given.name in self.shapes:
            return self.shapes[given.name]
        shape = []
        for axis, size in enumerate(given.shape):
            found = size if isinstance(size, int) else _open(size, axis, given.name, sequence, batch)
            if found is None:
                raise self._unknown(given, size)
            shape.append(found)
        if math.prod(shape) * np.dtype(given.dtype).itemsize > MAX_BYTES:
            raise UsageError(f"input `{given.name}` of shape `{_text(shape)}` takes over {MAX_BYTES} bytes")
        return tuple(shape)

    def _unknown(self, given: Input, size: int | str) -> UsageError:
        example = ",".join(
            str(d) if isinstance(d, int) else "1" if a == 0 else "224" for a, d in enumerate(given.shape)
        )
        named = f"the size `{size}`" if size else "a size without a name"
        return UsageError(
            f"input `{given.name}` of `{self.path}` has {named} in its shape `{_text(given.shape)}`",
            f"give the shape as `{given.name}=SIZES`, like `{given.name}={example}`",
        )

    def prepare(self, feeds: Feeds) -> Callable[[], object]:
        """A call on these inputs, with nothing left to do but to run the graph; results are let go.

        The call raises UsageError if the graph refuses the shapes, DeviceError if it fails.
        """
        run: Callable[[], object]
        if all(o.type.startswith("tensor(") for o in self._outputs):
            io = self.session.io_binding()
            for name, array in feeds.items():
                io.bind_cpu_input(name, array)
            for output in self._outputs:
                io.bind_output(output.name)
            run = partial(self.session.run_with_iobinding, io)
        else:  # sequences and maps cannot be bound
            run = partial(self.session.run, None, feeds)

        def call() -> None:
            try:
                run()
            except Exception as error:  # a class of its own for each status code, of a module without types
                raise self.failure(error, feeds) from None  # bound arrays must outlive the run

        return call

    def failure(self, error: Exception, feeds: Feeds | None = None) -> EdgeSFTError:
        """What ONNX Runtime said about a call, as an error of ours."""
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        if not feeds:
            return DeviceError(f"ONNX Runtime cannot run `{self.path}`: {reason}")
        shapes = ", ".join(f"`{n}={_text(a.shape)}`" for n, a in feeds.items())
        return UsageError(
            f"ONNX Runtime cannot run `{self.path}` with {shapes}: {reason}", "give other shapes"
        )


class _Explained:
    """A decoding state whose failures say which file failed."""

    def __init__(self, model: GraphRunnable, state: Growing) -> None:
        self._model, self._state = model, state

    def prefill(self, input_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """See `Growing.prefill`."""
        try:
            return self._state.prefill(input_ids)
        except EdgeSFTError:
            raise
        except Exception as error:
            raise self._model.failure(error) from None

    def step(self, token: "int | npt.NDArray[np.int64]") -> npt.NDArray[np.float32]:
        """See `Growing.step`."""
        return self._state.step(token)


def _open(size: str, axis: int, name: str, sequence: int, batch: int) -> int | None:
    """What a size that the file leaves open shall be; None if its name does not tell.

    A sum like `past_sequence_length + sequence_length` is the sum of its parts, and there is no past.
    """
    total = 0
    for part in (p.strip() for p in size.split("+")):
        if part.isdigit():
            total += int(part)
        elif "past" in part.lower():
            continue
        elif BATCH.fullmatch(part) or (axis == 0 and ANONYMOUS.fullmatch(part)):
            total += batch
        elif SEQUENCE.fullmatch(part) or (axis == 1 and ANONYMOUS.fullmatch(part) and TEXT.search(name)):
            total += sequence
        else:
            return None
    return total


def _values(given: Input, shape: tuple[int, ...], bound: int | None, rng: np.random.Generator) -> Array:
    """Values for an input: what its name says, random within `bound` or of unit variance where it does not.

    Whole numbers of unknown meaning are ones, the value that fits the most meanings: flags, counts, lengths.
    """
    dtype, name = np.dtype(given.dtype), given.name.lower()
    if dtype.kind == "b" or "mask" in name:
        return np.ones(shape, dtype)
    if dtype.kind == "f":
        return rng.standard_normal(shape, np.float32).astype(dtype, copy=False)
    if "position" in name:
        counted = np.arange(shape[-1] if shape else 1)
        return np.broadcast_to(counted if bound is None else np.minimum(counted, bound - 1), shape).astype(
            dtype
        )
    if "token_type" in name or "segment" in name:
        return np.zeros(shape, dtype)
    if bound is None:
        if dtype.itemsize == 1:  # pixels, or what was quantised
            info = np.iinfo(dtype)
            return rng.integers(info.min, info.max, shape, dtype, endpoint=True)
        return rng.integers(0, 2, shape, dtype) if TEXT.search(name) else np.ones(shape, dtype)
    return rng.integers(0, min(bound, np.iinfo(dtype).max), shape).astype(dtype)


def bounds(model: Any) -> dict[str, int]:  # noqa: ANN401 - onnx.ModelProto
    """Of every input that selects rows of a table: how many rows the smallest of its tables has."""
    graph = model.graph
    sizes = {t.name: tuple(t.dims) for t in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    carried = {value.name: value.name for value in graph.input}  # value -> the input that it is, reshaped
    found: dict[str, int] = {}
    for node in graph.node:  # in the order of their use, as ONNX demands
        inputs = list(node.input)
        if node.op_type in PASSING and inputs and inputs[0] in carried:
            carried[node.output[0]] = carried[inputs[0]]
        for table, ids, axis in _lookups(node, inputs):
            size = _stored(table, sizes, makers)
            if ids in carried and size is not None and -len(size) <= axis < len(size) and size[axis] > 0:
                name = carried[ids]
                found[name] = min(found.get(name, size[axis]), size[axis])
    return found


def _lookups(node: Any, inputs: list[str]) -> list[tuple[str, str, int]]:  # noqa: ANN401 - onnx.NodeProto
    """(table, indices, axis) of every look-up that a node makes."""
    if node.op_type in ("Gather", "GatherBlockQuantized") and len(inputs) > 1:
        named = {a.name: a.i for a in node.attribute if a.name in ("axis", "gather_axis")}
        return [(inputs[0], inputs[1], next(iter(named.values()), 0))]
    if node.op_type == "EmbedLayerNormalization" and len(inputs) > 4:  # of com.microsoft
        return [(inputs[2], inputs[0], 0), (inputs[4], inputs[1], 0)]
    return []


def _stored(
    name: str, sizes: Mapping[str, tuple[int, ...]], makers: Mapping[str, Any]
) -> tuple[int, ...] | None:
    """Shape of a stored tensor, through what keeps it; None for what is computed."""
    for _ in range(8):
        if name in sizes:
            return sizes[name]
        node = makers.get(name)
        if node is None:
            return None
        if node.op_type == "Constant":
            return next((tuple(a.t.dims) for a in node.attribute if a.name == "value"), None)
        if node.op_type not in STORED or not node.input:
            return None
        name = node.input[0]
    return None


def _text(shape: Sequence[int | str]) -> str:
    return ",".join(str(d) or "?" for d in shape)
