"""Checkpoints of compressed-tensors whose weights are stored 2:4, `sparse-24-bitmask`: read and written.

A matrix `X.weight` (rows, columns) is three tensors: `X.compressed` (rows, columns / 2), the kept weights of
every row in order; `X.bitmask` (rows, ceil(columns / 8)) uint8, a bit for each column, the lowest first, two
of every four set; `X.shape` (2, 1) int64. config.json says so under `quantization_config.sparsity_config`.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from edgesft.core.errors import ArtifactError
from edgesft.core.weights import Planned, Weights

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

METHOD: Final = "compressed-tensors"
FORMAT: Final = "sparse-24-bitmask"
WRITTEN_AS: Final = "0.9.4"  # the version whose files ours are like
_READ = f"`{FORMAT}` or `marlin-24`"
PARTS: Final = (".compressed", ".bitmask", ".shape")
TYPES: Final = ("F16", "BF16", "F32")
WEIGHT: Final = ".weight"
_DENSE = "where it was made, save it again without compression: `save_pretrained(OUT, save_compressed=False)`"


def sparsity(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The part of a config.json that describes compressed weights; None if there is none.

    Raises ArtifactError, by the name of the format, for what is not 2:4 of plain numbers.
    """
    about = config.get("quantization_config") or config.get("compression_config") or {}
    if not isinstance(about, Mapping):
        raise ArtifactError(f"`quantization_config` is {about!r}, expected an object")
    found = about.get("sparsity_config") or config.get("sparsity_config")
    form = about.get("format")
    if about.get("config_groups") or about.get("kv_cache_scheme") or form not in (None, "dense", FORMAT):
        raise ArtifactError(
            f"its weights are quantised by `{METHOD}` in the format `{form}`, expected {_READ}", _DENSE
        )
    if not found:
        return None
    if not isinstance(found, Mapping) or found.get("format") not in (FORMAT, "dense", None):
        form = found.get("format") if isinstance(found, Mapping) else found
        raise ArtifactError(f"its weights are in the format `{form}` of `{METHOD}`, expected {_READ}", _DENSE)
    return found if found.get("format") == FORMAT else None


def config_entry(targets: Iterable[str], ignored: Iterable[str], share: float) -> dict[str, Any]:
    """`quantization_config` of a folder. share: of weights that are 0, of all in the model."""
    return {
        "quant_method": METHOD,
        "version": WRITTEN_AS,
        "sparsity_config": {
            "format": FORMAT,
            "global_sparsity": share,
            "ignore": sorted(ignored),
            "registry_requires_subclass": False,
            "sparsity_structure": "2:4",
            "targets": sorted(targets),
        },
    }


class Compressed(Mapping[str, "Tensor"]):
    """The compressed matrices of a folder by the names of their weights, decompressed when asked for.

    Raises ArtifactError for a matrix that lacks a part, or whose parts do not go together.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        found: dict[str, set[str]] = {}
        for name in weights:
            for part in PARTS:
                if name.endswith(part):
                    found.setdefault(name.removesuffix(part), set()).add(part)
        for base, parts in found.items():
            if len(parts) < len(PARTS):
                lacking = min(set(PARTS) - parts)
                raise ArtifactError(f"`{weights.path}` lacks `{base}{lacking}` of a compressed weight")
            if base + WEIGHT in weights:
                raise ArtifactError(f"`{weights.path}` holds `{base}{WEIGHT}` compressed and plain")
        self._bases = {base + WEIGHT: base for base in found}
        self._shapes = {name: self._shape(base) for name, base in self._bases.items()}

    def __iter__(self) -> Any:  # noqa: ANN401 - Iterator[str]
        return iter(self._bases)

    def __len__(self) -> int:
        return len(self._bases)

    def __contains__(self, name: object) -> bool:
        return name in self._bases

    def shape(self, name: str) -> tuple[int, int]:
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """safetensors' name of the type."""
        return self._weights.info(self._bases[name] + ".compressed").dtype

    def _shape(self, base: str) -> tuple[int, int]:
        about = self._weights.info(f"{base}.shape")
        numbers = self._weights.get(f"{base}.shape").flatten().tolist() if about.numel == 2 else []
        if about.dtype not in ("I64", "I32") or len(numbers) != 2 or min(numbers) < 1:
            said = numbers or list(about.shape)
            raise self._broken(base, f"its shape is {said}, expected two positive numbers")
        rows, columns = (int(n) for n in numbers)
        values, mask = (self._weights.info(base + part) for part in PARTS[:2])
        if values.dtype not in TYPES:
            raise self._broken(base, f"its weights are {values.dtype}, expected one of {', '.join(TYPES)}")
        if columns % 4 or values.shape != (rows, columns // 2):
            raise self._broken(base, f"{list(values.shape)} weights are kept of a matrix {rows} x {columns}")
        if mask.dtype != "U8" or mask.shape != (rows, -(-columns // 8)):
            raise self._broken(base, f"its mask is {mask.dtype} {list(mask.shape)}")
        return rows, columns

    def __getitem__(self, name: str) -> "Tensor":
        import torch

        base = self._bases[name]
        rows, columns = self._shapes[name]
        packed = self._weights.get(f"{base}.bitmask").numpy()
        bits = np.unpackbits(packed, axis=-1, bitorder="little")
        if bits[:, columns:].any():
            raise self._broken(base, "its mask has bits beyond the last column")
        mask = bits[:, :columns].reshape(rows, -1, 4)
        wrong = mask.sum(-1, dtype=np.uint8) != 2
        if wrong.any():
            row, group = (int(i) for i in np.unravel_index(wrong.argmax(), wrong.shape))
            where = f"the first in row {row}, columns {4 * group} to {4 * group + 3}"
            raise self._broken(base, f"{int(wrong.sum()):,} groups of four do not keep two weights, {where}")
        values = self._weights.get(f"{base}.compressed")
        found = torch.zeros(rows, columns, dtype=values.dtype)
        found[torch.from_numpy(mask.reshape(rows, columns).astype(bool))] = values.reshape(-1)
        return found

    def _broken(self, base: str, reason: str) -> ArtifactError:
        return ArtifactError(f"`{base}` in `{self._weights.path}` is no compressed weight: {reason}")


def fits(name: str, dtype: str, shape: tuple[int, ...]) -> str | None:
    """Why a weight cannot be compressed whatever its zeros; None if it can."""
    if len(shape) != 2 or not name.endswith(WEIGHT):
        return "it is no matrix of a layer"
    if dtype not in TYPES:
        return f"its type is {dtype}, expected one of {', '.join(TYPES)}"
    return f"4 does not divide its {shape[1]} columns" if shape[1] % 4 else None


def planned(name: str, dtype: str, shape: tuple[int, int]) -> list[Planned]:
    """The tensors that stand for the weight `name`."""
    base, (rows, columns) = name.removesuffix(WEIGHT), shape
    return [
        Planned(f"{base}.compressed", dtype, (rows, columns // 2)),
        Planned(f"{base}.bitmask", "U8", (rows, -(-columns // 8))),
        Planned(f"{base}.shape", "I64", (2, 1)),
    ]


def compress(weight: "Tensor", part: str) -> "Tensor":
    """`.compressed`, `.bitmask` or `.shape` of a weight (rows, columns) that is 2:4.

    A group with fewer than two weights keeps zeros too, those with a sign first, then by their place.
    """
    import torch

    if part == ".shape":
        return torch.tensor(weight.shape).reshape(2, 1)
    mask = _mask(weight)
    if part == ".compressed":
        return weight[torch.from_numpy(mask)].reshape(weight.shape[0], -1)
    return torch.from_numpy(np.packbits(mask, axis=-1, bitorder="little"))


def _mask(weight: "Tensor") -> "npt.NDArray[np.bool_]":
    four = weight.reshape(weight.shape[0], -1, 4)
    absent = (four == 0).numpy().astype(np.uint8)
    absent += absent & ~four.signbit().numpy()
    order = np.argsort(absent, axis=-1, kind="stable")[..., :2]
    mask = np.zeros(four.shape, bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return mask.reshape(tuple(weight.shape))
