"""Read the weights of an exported folder back under their original names.

export.json maps each original tensor to the initializer that holds it: `rows` [a, b) of `tensor`; with
`packed` if that is a packed matrix (see `packing`), whose rows come by turns where `turn` of `parts` says so;
with `bits`, `scales` and perhaps `zeros` if it is quantised, `transposed` if the initializer is (in, out).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgesft.core.artifact import safe_name
from edgesft.core.errors import ArtifactError
from edgesft.exporters import packing
from edgesft.exporters.description import read_description
from edgesft.exporters.mapped import map_weights
from edgesft.exporters.quantize import Quantized, dequantize
from edgesft.exporters.weights import FloatArray
from edgesft.kernels.nm_matmul import layout

_DTYPES: dict[int, Any] = {1: np.dtype("<f4"), 2: np.dtype("u1"), 10: np.dtype("<f2")}  # TensorProto.DataType


def dequantized(exported: Path) -> Iterator[tuple[str, FloatArray]]:
    """(original name, float32 array as the runtime computes with it). Matrices are (out, in).

    Raises ArtifactError if the folder carries no map of its weights or the map does not fit the graph.
    """
    from edgesft.exporters import safety

    description = read_description(exported)
    table = description.get("weights")
    if not isinstance(table, dict) or not table:
        raise ArtifactError(f"`{exported}` has no map of its weights in export.json")
    safety.check(exported)
    initializers = {t.name: t for t in safety.parse(exported).graph.initializer}
    mapped = map_weights(exported, description)  # inputs of the graph, in an export that can be tuned

    def array(name: str) -> Any:  # noqa: ANN401 - uint8 or float32
        if name in mapped:
            return mapped[name]
        if name not in initializers:
            raise ArtifactError(f"`{exported}` has no initializer `{name}`; export.json names it")
        return _array(exported, initializers[name])

    unpacked: dict[str, FloatArray] = {}
    for name, entry in table.items():
        start, stop = entry["rows"]
        held = array(entry["tensor"])
        if "packed" in entry:
            if entry["tensor"] not in unpacked:  # weights side by side share one matrix
                packed = packing.read(entry, held, array(entry["scales"]))
                unpacked = {entry["tensor"]: layout.dense(packed)}
            yield name, packing.rows_of(unpacked[entry["tensor"]], entry)
        elif "bits" in entry:
            scales = array(entry["scales"])
            zeros = array(entry["zeros"])[start:stop] if "zeros" in entry else None
            held = Quantized(held[start:stop], scales[start:stop], zeros)
            yield name, dequantize(held, entry["bits"], entry["inputs"])
        elif entry.get("transposed"):
            yield name, np.ascontiguousarray(held[:, start:stop].T)
        else:
            yield name, np.array(held[start:stop])


def _array(folder: Path, tensor: Any) -> Any:  # noqa: ANN401 - protobuf messages are untyped
    """An initializer, its external data mapped. `safety.check` has found its place safe."""
    dtype, shape = _DTYPES.get(tensor.data_type), tuple(tensor.dims)
    if dtype is None:
        raise ArtifactError(
            f"`{tensor.name}` in `{folder}` has the type {tensor.data_type}, "
            "expected float32, float16 or uint8"
        )
    external = {entry.key: entry.value for entry in tensor.external_data}
    if external:
        file = folder / safe_name(external["location"])
        return np.memmap(file, dtype, "r", int(external.get("offset", 0)), shape)
    return np.frombuffer(tensor.raw_data, dtype).reshape(shape)
