"""The tuned weights of an export with `--tunable`: inputs of its graph, bound from a mapping of its data.

The mapping is private: weights are read from the file when they are first needed, and a weight that is
written to becomes memory of this process while the file stays as it is. There is one copy of every weight.
"""

import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgesft.core.errors import ArtifactError
from edgesft.exporters.description import TunedWeight, tuned_weights
from edgesft.exporters.weights import FloatArray


def map_weights(folder: Path, description: Mapping[str, Any]) -> dict[str, FloatArray]:
    """The tuned weights (out, in) by the names of their graph inputs; empty for other exports.

    Raises ArtifactError where the table or the data file is broken, or the file is a link.
    """
    found = tuned_weights(description, folder)
    if not found:
        return {}
    file = folder / description["tunable"]["file"]
    try:
        status = file.lstat()
    except OSError as error:
        raise ArtifactError(f"`{file}` cannot be found: {error.strerror}; export.json names it") from None
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise ArtifactError(
            f"`{file}` is a link or not a regular file; weights must lie in the folder itself"
        )
    return {weight.input: _map(file, status.st_size, weight) for weight in found.values()}


def _map(file: Path, size: int, weight: TunedWeight) -> FloatArray:
    end = weight.offset + weight.bytes
    if end > size:
        raise ArtifactError(f"`{file}` has {size} bytes, the weight of `{weight.layer}` ends at {end}")
    mapped: FloatArray = np.memmap(file, np.dtype("<f4"), "c", weight.offset, weight.shape)
    return mapped


class Bound:
    """An ONNX Runtime session that is given the mapped weights with every call."""

    def __init__(self, session: Any, weights: Mapping[str, FloatArray]) -> None:  # noqa: ANN401
        import onnxruntime as ort

        self._session, self.weights = session, weights
        self._values = {n: ort.OrtValue.ortvalue_from_numpy(array) for n, array in weights.items()}

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Any]) -> list[Any]:
        found: list[Any] = self._session.run(names, {**feeds, **self._values})
        return found

    def run_with_ort_values(self, names: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
        found: list[Any] = self._session.run_with_ort_values(names, {**feeds, **self._values})
        return found

    def io_binding(self) -> Any:  # noqa: ANN401 - onnxruntime.IOBinding, without types
        binding = self._session.io_binding()
        for name, value in self._values.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def run_with_iobinding(self, binding: Any) -> None:  # noqa: ANN401
        self._session.run_with_iobinding(binding)

    def get_inputs(self) -> list[Any]:
        """Those that are left to the caller."""
        return [each for each in self._session.get_inputs() if each.name not in self._values]

    def get_outputs(self) -> list[Any]:
        found: list[Any] = self._session.get_outputs()
        return found

    def get_overridable_initializers(self) -> list[Any]:
        found: list[Any] = self._session.get_overridable_initializers()
        return found

    def get_profiling_start_time_ns(self) -> int:
        return int(self._session.get_profiling_start_time_ns())

    def end_profiling(self) -> str:
        return str(self._session.end_profiling())
