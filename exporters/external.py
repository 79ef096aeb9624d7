"""The external data of an ONNX file: one file, written tensor by tensor, read back through its offsets."""

import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from edgesft.core.errors import ArtifactError
from edgesft.exporters.description import DATA

ALIGN = 4096  # a page: the runtime maps the file instead of copying it
_INLINE = 256  # smaller tensors stay in the graph, where shape inference can see them

Array = npt.NDArray[Any]


class DataFile:
    """Writes `model.onnx.data` into a folder, front to back; a model is never in memory whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = (folder / DATA).open("wb")
        self._names: set[str] = set()

    def __enter__(self) -> "DataFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def bytes(self) -> int:
        return self._file.tell()

    def put(self, name: str, array: Array) -> ir.Value:
        """An initializer of this name and content; large ones are written to the file at once."""
        if name in self._names:
            raise ValueError(f"two initializers are named {name}")
        self._names.add(name)
        array = np.ascontiguousarray(array)
        tensor: ir.TensorProtocol
        tensor = ir.Tensor(array, name=name) if array.nbytes < _INLINE else self._append(name, array)
        return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)

    def _append(self, name: str, array: Array) -> ir.ExternalTensor:
        self._file.write(b"\0" * (-self._file.tell() % ALIGN))
        offset = self._file.tell()
        self._file.write(array.data)
        return ir.ExternalTensor(
            DATA,
            offset,
            array.nbytes,
            ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=self._folder,
        )


def check_space(folder: Path, needed: int) -> None:
    """Raises ArtifactError if the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ArtifactError(
            f"the export needs {needed / 1e6:,.0f} MB, the disk of `{folder}` has {free / 1e6:,.0f} MB free",
            "free some disk, or choose another `-o` or a smaller `--quantize`",
        )
