"""How the weights of a model folder are stored, and one way to read them all: plain, nm-packed, compressed.

`nm-packed` is ours (docs/format.md), `compressed-tensors` the 2:4 checkpoints of `core.compressed` and
`core.marlin24`. Both say so in config.json under `quantization_config`, so that a reader that does not know
them refuses them by name.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from edgesft.core import catalog, compressed, marlin24
from edgesft.core.artifact import Artifact
from edgesft.core.errors import ArtifactError
from edgesft.core.tokens import read_json
from edgesft.core.weights import TORCH_NAMES, Weights

if TYPE_CHECKING:
    from torch import Tensor

Form: TypeAlias = Literal["dense", "nm-packed", "compressed-tensors"]
PACKED: Final = "nm-packed"
VERSION: Final = 1  # of nm-packed
CONFIG: Final[Mapping[str, Any]] = {"quant_method": PACKED, "version": VERSION}
KEYS: Final = ("quantization_config", "compression_config", "sparsity_config")  # of config.json


def form(path: Path) -> Form:
    """How the folder `path` stores its weights. Raises ArtifactError for a way that is not read here."""
    return form_of(read_json(path / "config.json"), path)


def form_of(config: Mapping[str, Any], path: Path) -> Form:
    """`form` of a folder whose config.json holds `config`."""
    about = config.get("quantization_config") or config.get("compression_config") or {}
    method = about.get("quant_method") if isinstance(about, Mapping) else about
    if method is None and (not about or "sparsity_config" in about):
        method = compressed.METHOD  # as its first versions wrote it
    if method == PACKED:
        if about.get("version") != VERSION:
            raise ArtifactError(
                f"`{path}` is {PACKED} of version {about.get('version')}, this EdgeSFT reads {VERSION}",
                "pip install --upgrade edgesft, or pack the model again",
            )
        return PACKED
    if method != compressed.METHOD:
        raise ArtifactError(f"`{path}` holds weights quantised by `{method}`, expected plain ones")
    try:
        if _marlin(config) is not None:
            return "compressed-tensors"
        return "dense" if compressed.sparsity(config) is None else "compressed-tensors"
    except ArtifactError as error:
        raise ArtifactError(f"`{path}` cannot be read: {error.message}", error.hint) from None


def _marlin(config: Mapping[str, Any]) -> marlin24.Scheme | None:
    """How a folder in the format `marlin-24` is quantised; None for any other."""
    about = config.get("quantization_config")
    if not isinstance(about, Mapping) or about.get("format") != marlin24.FORMAT:
        return None
    return marlin24.scheme(about)


def require_plain(found: Artifact, stage: str) -> None:
    """Raise ArtifactError unless the weights of a model are plain, as `stage` reads them."""
    if found.kind != "model":
        return
    how = form(found.path)
    if how != "dense":
        raise ArtifactError(
            f"`{found.ref}` holds its weights as {how}, `{stage}` reads plain ones",
            f"edgesft convert {found.ref} --to dense -o OUT",
        )


class Stored:
    """The weights of a folder by the names that a plain folder has, however they are stored.

    packed: the matrices that are, or become, packed ones, by name (`kernels.nm_matmul.file.Matrices`).
    Raises ArtifactError.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.form = path, form(path)
        self.files = Weights(path)
        self.packed: Any = {}
        self.compressed: Any = {}
        self._names = list(self.files)
        if self.form == PACKED:
            file = catalog.runtime("kernels.nm_matmul.file")
            self.packed = file.Matrices(self.files)
            self._names = _whole(self._names, {file.STREAM: "", file.SCALES: None})
        elif (how := _marlin(read_json(path / "config.json"))) is not None:
            self.packed = marlin24.Marlin24(self.files, how)
            first, *others = marlin24.PARTS
            self._names = _whole(self._names, {first: marlin24.WEIGHT, **dict.fromkeys(others)})
        elif self.form != "dense":
            self.compressed = compressed.Compressed(self.files)
            first, *others = compressed.PARTS
            self._names = _whole(self._names, {first: compressed.WEIGHT, **dict.fromkeys(others)})

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self.packed or name in self.compressed or name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        for held in (self.packed, self.compressed):
            if name in held:
                found: tuple[int, ...] = held.shape(name)
                return found
        return self.files.shape(name)

    def dtype(self, name: str) -> str:
        """safetensors' name of the type that `get` gives: int4 and int8 codes need float32 to be exact."""
        if name in self.packed:
            value: str = self.packed.value(name)
            return {"fp16": "F16", "bf16": "BF16"}.get(value, "F32")
        return str(self.compressed.dtype(name)) if name in self.compressed else self.files.info(name).dtype

    def get(self, name: str) -> "Tensor":
        """The tensor in full, as numbers. Do not write into it."""
        import torch

        if name in self.compressed:
            plain: Tensor = self.compressed[name]
            return plain
        if name not in self.packed:
            return self.files.get(name)
        packed = self.packed[name]
        layout = catalog.runtime("kernels.nm_matmul.layout")
        dense: Tensor = torch.from_numpy(layout.dense(packed))
        return dense.to(getattr(torch, TORCH_NAMES[self.dtype(name)]))

    def find(self, name: str, prefix: str) -> str | None:
        """What the folder calls a tensor of a model: one of a bare backbone lacks its prefix."""
        names = (name, name.removeprefix(prefix), prefix + name)
        return next((each for each in names if each in self), None)


def _whole(names: Iterable[str], parts: Mapping[str, str | None]) -> list[str]:
    """Names of whole tensors, in the order of the files. parts: suffix of a part -> that of the tensor, None
    for parts that do not count."""
    found = []
    for name in names:
        part = next((each for each in parts if name.endswith(each)), None)
        if part is None:
            found.append(name)
        elif (suffix := parts[part]) is not None:
            found.append(name.removesuffix(part) + suffix)
    return found
