"""Look inside an exported model: the residual stream after each block, and the arithmetic without int8.

The file is never altered. Its graph is parsed, changed in memory and handed to ONNX Runtime as bytes; the
external data stays where it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesft.core import threads as core_threads
from edgesft.core.errors import ArtifactError
from edgesft.exporters import custom, packing, safety
from edgesft.exporters.description import read_description
from edgesft.exporters.mapped import Bound, map_weights
from edgesft.exporters.readback import dequantized
from edgesft.exporters.runtime import OnnxRunnable
from edgesft.kernels.nm_matmul import layout
from edgesft.kernels.nm_matmul.ort_op import LINEAR

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

HIDDEN = "hidden."  # `hidden.{i}` is the residual stream after block i, in both builders


class Probe(OnnxRunnable):
    """An exported folder with its quantised products in float32 (level 0) and the blocks' outputs visible.

    Everything else, the handling of the KV cache too, is that of `OnnxRunnable`. chosen: None takes the graph
    that it would take.
    Raises ArtifactError for a folder that is broken or unsafe.
    """

    def __init__(self, path: Path, *, threads: int = 0, chosen: custom.Chosen | None = None) -> None:
        self.path = Path(path)
        self.description = read_description(self.path)
        self.threads = core_threads.resolve(threads)
        self.chosen = chosen or custom.choose(self.path, self.description)
        safety.check(self.path, self.chosen.file)
        model, self.hidden_names = _altered(safety.parse(self.path, self.chosen.file))
        weights = map_weights(self.path, self.description)
        self.session = _open(self.path, model, self.threads, self.chosen)
        if weights:
            self.session = Bound(self.session, weights)
        self.kind = self.description["kind"]
        self.vocabulary = self.description["vocabulary"]
        self.context = int(self.description.get("context") or 0)
        self.eos = tuple(int(i) for i in self.description.get("eos", []))
        self._takes = [i.name for i in self.session.get_inputs()]
        self._takes += [i.name for i in self.session.get_overridable_initializers()]
        self._gives = [o.name for o in self.session.get_outputs()]
        self._check_names()

    def hidden(self, ids: IntArray) -> list[FloatArray]:
        """(S, hidden) after each block for one sequence (S,); empty if the graph names no such values."""
        if not self.hidden_names:
            return []
        feeds: dict[str, Any] = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
        if self.kind == "decoder":
            empty = np.zeros(self.cache_shape(1, 0), np.float32)
            feeds |= {f"past_key_values.{i}.{n}": empty for i in range(self.layers) for n in ("key", "value")}
        if "logit_positions" in self._takes:
            feeds["logit_positions"] = np.arange(len(ids))
        found = self.session.run(self.hidden_names, feeds)
        # the direct builder's last block gives (N, hidden), all others (1, S, hidden)
        return [np.asarray(f, np.float32).reshape(-1, f.shape[-1]) for f in found]


def _altered(model: Any) -> tuple[Any, list[str]]:  # noqa: ANN401 - onnx.ModelProto
    """The graph with exact arithmetic and the hidden values as outputs, and their names in order."""
    import onnx

    known = {value.name for value in model.graph.output}
    names = []
    for node in model.graph.node:
        level = {"MatMulNBits": "accuracy_level", LINEAR: "level"}.get(node.op_type)
        if level is not None:
            kept = [a for a in node.attribute if a.name != level]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute(level, 0)])
        names += [o for o in node.output if o.startswith(HIDDEN) and o.removeprefix(HIDDEN).isdigit()]
    names.sort(key=lambda name: int(name.removeprefix(HIDDEN)))
    for name in names:
        if name not in known:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
            model.graph.output[-1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return model, names


def _open(folder: Path, model: Any, threads: int, chosen: custom.Chosen) -> Any:  # noqa: ANN401 - onnxruntime has no types
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    custom.configure(options, chosen, exact=True)
    try:
        made = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # a class of its own for each status code, of a module without types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ArtifactError(f"ONNX Runtime {ort.__version__} cannot load `{folder}`: {reason}") from None
    custom.loaded(chosen)
    return made


@dataclass(frozen=True)
class Held:
    """One weight of an export under its original name, as the runtime computes with it.

    scales, zeros: (out, blocks) of `group` inputs each, None where the weight is not quantised; zeros are the
    codes that stand for 0. bits: 4, 8 or 32.
    """

    name: str
    array: FloatArray
    scales: FloatArray | None
    zeros: FloatArray | None
    bits: int
    group: int


def weights(folder: Path) -> Iterator[Held]:
    """Every weight; none comes where export.json holds no map of them, as after tracing."""
    import onnx

    description = read_description(folder)
    table: Mapping[str, Any] = description.get("weights") or {}
    if not table:
        return
    safety.check(folder)
    tensors = {t.name: t for t in safety.parse(folder).graph.initializer}
    group = int(description.get("group") or 0)

    def held(name: str, rows: Sequence[int | None] = (0, None)) -> Any:  # noqa: ANN401 - uint8 or float32
        if name not in tensors:
            raise ArtifactError(f"`{folder}` has no initializer `{name}`; export.json names it")
        return onnx.numpy_helper.to_array(tensors[name], str(folder))[rows[0] : rows[1]]

    for name, array in dequantized(folder):
        entry = table[name]
        bits = int(entry.get("bits", 32))
        if "packed" in entry:
            packed = packing.read(entry, held(entry["tensor"]), held(entry["scales"]))
            steps = packing.rows_of(layout.scales_of(packed), entry).astype(np.float32) * packed.unit
            middle = np.full_like(steps, layout.OFFSETS[packed.value])
            yield Held(name, array, steps, middle, bits, packed.group or packed.columns)
            continue
        scales = zeros = None
        if bits < 32:
            scales = held(entry["scales"], entry["rows"])
            zeros = np.full_like(scales, 1 << (bits - 1))
            if "zeros" in entry:  # two to a byte, the lower half first, as MatMulNBits has it
                both = held(entry["zeros"], entry["rows"])
                both = np.stack([both & 15, both >> 4], axis=-1).reshape(len(both), -1)
                zeros = both[:, : scales.shape[1]].astype(np.float32)
        yield Held(name, array, scales, zeros, bits, group)
