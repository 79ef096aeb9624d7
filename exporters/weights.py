"""The tensors of a Hugging Face model folder as numpy arrays: neither torch nor transformers is imported.

A model is never in memory whole: files are mapped, one tensor is converted to float32 at a time.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesft.core import weights
from edgesft.core.errors import ArtifactError

FloatArray = npt.NDArray[np.float32]

# bfloat16 is the upper half of a float32, so it is read as integers and shifted
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class Arrays:
    """Tensors by name. Raises ArtifactError when a file is missing, truncated or altered in its header."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._weights = weights.Weights(folder)

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def names(self) -> list[str]:
        return self._weights.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(name)

    def get(self, name: str) -> FloatArray:
        """The tensor as float32. Raises ArtifactError if it is absent, not a number, or holds NaN or Inf."""
        info = self._weights.info(name)
        if info.dtype not in _DTYPES:
            kinds = ", ".join(_DTYPES)
            raise ArtifactError(f"`{name}` in `{info.file}` has dtype {info.dtype}, expected one of {kinds}")
        if info.numel == 0:
            return np.empty(info.shape, np.float32)
        raw = np.memmap(info.file, np.uint8, "r", info.start, (info.end - info.start,))
        values: np.ndarray[Any, Any] = raw.view(_DTYPES[info.dtype])
        if info.dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes Inf, which is refused below
            out: FloatArray = np.asarray(values, dtype=np.float32).reshape(info.shape)
        check_finite(name, out, info.file)
        return out


def check_finite(name: str, array: FloatArray, where: Path) -> None:
    """Raises ArtifactError with the tensor's name and the index of the first NaN or Inf."""
    flat = array.reshape(-1)
    step = 1 << 22  # a boolean copy of a whole embedding is not worth its memory
    for start in range(0, flat.size, step):
        bad = ~np.isfinite(flat[start : start + step])
        if bad.any():
            at = start + int(bad.argmax())
            index = [int(i) for i in np.unravel_index(at, array.shape)]
            raise ArtifactError(
                f"`{name}` in `{where}` holds `{flat[at]}` at {index}, expected finite values"
            )
