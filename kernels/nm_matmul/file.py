"""Packed matrices in safetensors files; docs/format.md says what the tensors and the metadata are called.

A matrix `NAME` is two tensors, `NAME.nm_stream` and `NAME.nm_scales`, and an entry in the metadata of the
file that holds the first. They are read in place: arrays over the mapped file.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np

from edgesft.core.errors import ArtifactError
from edgesft.core.weights import SIZES, Planned, Weights, read_metadata
from edgesft.kernels.nm_matmul import layout
from edgesft.kernels.nm_matmul.layout import DENSE, NotPacked, Packed

KEY: Final = "nm-packed"  # in the metadata of a file
STREAM, SCALES = ".nm_stream", ".nm_scales"
_AGAIN = "edgesft convert MODEL --to nm-packed -o OUT   packs it again"
_UPGRADE = "pip install --upgrade edgesft, or pack the model again"


def describe(packed: Packed, dtype: str) -> dict[str, Any]:
    """What the metadata say of a matrix. dtype: safetensors' name of the type that its weights had."""
    return {
        "rows": packed.rows,
        "columns": packed.columns,
        "pattern": packed.pattern,
        "value": packed.value,
        "group": packed.group,
        "unit": packed.unit,
        "dtype": dtype,
    }


def planned(name: str, packed: Packed) -> list[Planned]:
    """The tensors that stand for a matrix."""
    found = [Planned(name + STREAM, "U8", packed.stream.shape)]
    return found + ([Planned(name + SCALES, "F16", packed.scales.shape)] if packed.scales.size else [])


def metadata(about: Mapping[str, Mapping[str, Any]], tensors: Iterable[str]) -> dict[str, str]:
    """Of a file with these tensors. about: `describe` of each matrix by its name."""
    names = [name.removesuffix(STREAM) for name in tensors if name.endswith(STREAM)]
    matrices = {name: dict(about[name]) for name in names if name in about}
    return {KEY: json.dumps({"version": layout.VERSION, "matrices": matrices})}


class Matrices(Mapping[str, Packed]):
    """The packed matrices of a model folder, or of one file, by name. Each is checked when it is asked for.

    dtypes: safetensors' name of the type that each had. Raises ArtifactError for what docs/format.md has not.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._about: dict[str, Mapping[str, Any]] = {}
        for file in weights.files:
            for name, entry in _described(str(file), read_metadata(file)).items():
                if name in self._about:
                    raise ArtifactError(f"`{file}` describes `{name}` a second time")
                self._about[name] = entry
        for tensor in weights:
            for suffix in (STREAM, SCALES):
                name = tensor.removesuffix(suffix)
                if name != tensor and name not in self._about:
                    raise ArtifactError(f"`{weights.path}` holds `{tensor}`, which nothing describes", _AGAIN)
        for name in self._about:
            if name in weights:
                raise ArtifactError(f"`{weights.path}` holds `{name}` packed and plain", _AGAIN)
        self.dtypes = {name: str(entry.get("dtype", "F32")) for name, entry in self._about.items()}
        for name, dtype in self.dtypes.items():
            if dtype not in SIZES:
                raise ArtifactError(f"`{name}` in `{weights.path}` was of the unknown type `{dtype}`", _AGAIN)

    def __iter__(self) -> Iterator[str]:
        return iter(self._about)

    def __len__(self) -> int:
        return len(self._about)

    def __contains__(self, name: object) -> bool:
        return name in self._about

    def shape(self, name: str) -> tuple[int, int]:
        """(rows, columns) as the file says, which a look at the matrix has yet to bear out."""
        entry = self._about[name]
        try:
            return int(entry["rows"]), int(entry["columns"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._broken(name, repr(error)) from None

    def value(self, name: str) -> str:
        """One of `layout.VALUES`, as the file says."""
        return str(self._about[name].get("value"))

    def nbytes(self, name: str) -> int:
        """Bytes of its tensors."""
        tensors = [name + suffix for suffix in (STREAM, SCALES) if name + suffix in self._weights]
        return sum(
            self._weights.info(tensor).numel * SIZES[self._weights.info(tensor).dtype] for tensor in tensors
        )

    def __getitem__(self, name: str) -> Packed:
        """On the mapped file. Raises ArtifactError, KeyError."""
        entry = self._about[name]
        try:
            rows, columns, group = (_whole(entry, key) for key in ("rows", "columns", "group"))
            pattern, value, unit = entry["pattern"], entry["value"], entry["unit"]
            if not isinstance(unit, int | float) or not math.isfinite(unit):
                raise NotPacked(f"`unit` is {unit!r}, expected a finite number")
            if value not in layout.VALUES:
                raise NotPacked(f"`value` is {value!r}, expected one of {', '.join(layout.VALUES)}")
            stream = self._array(name + STREAM, "U8")
            scales = self._array(name + SCALES, "F16") if value in layout.OFFSETS else np.zeros(0, np.float16)
            if value not in layout.OFFSETS and name + SCALES in self._weights:
                raise NotPacked(f"{value} has no scales, and there are some")
            found = Packed(
                rows, columns, pattern != DENSE, value, group, float(unit), stream, scales, str(pattern)
            )
            layout.check(found)
        except (KeyError, NotPacked) as error:
            raise self._broken(name, error if isinstance(error, NotPacked) else f"no {error}") from None
        return found

    def _array(self, tensor: str, dtype: str) -> "np.typing.NDArray[Any]":
        if tensor not in self._weights:
            raise NotPacked(f"there is no `{tensor}`")
        info = self._weights.info(tensor)
        if info.dtype != dtype or len(info.shape) != 1:
            raise NotPacked(f"`{tensor}` is {info.dtype} {list(info.shape)}, expected a row of {dtype}")
        found = self._weights.mapped(tensor)
        return found if dtype == "U8" else found.view(np.dtype("<f2"))

    def _broken(self, name: str, reason: object) -> ArtifactError:
        return ArtifactError(f"`{name}` in `{self._weights.path}` is no packed matrix: {reason}", _AGAIN)


def _whole(entry: Mapping[str, Any], key: str) -> int:
    value = entry[key]
    if not isinstance(value, int) or isinstance(value, bool):
        raise NotPacked(f"`{key}` is {value!r}, expected a whole number")
    return value


def _described(file: str, said: Mapping[str, str]) -> dict[str, Mapping[str, Any]]:
    """Name -> description of the matrices of one file. Raises ArtifactError for another version."""
    if KEY not in said:
        return {}
    try:
        found = json.loads(said[KEY])
        version, matrices = found["version"], found["matrices"]
        if not all(isinstance(entry, dict) for entry in matrices.values()):
            raise TypeError("a description is no object")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"the metadata `{KEY}` of `{file}` are broken: {error!r}", _AGAIN) from None
    if version != layout.VERSION:
        raise ArtifactError(
            f"`{file}` has packed weights of version {version}, this EdgeSFT reads {layout.VERSION}", _UPGRADE
        )
    return dict(matrices)
