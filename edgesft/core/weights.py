"""Safetensors files: read lazily and checked, written one tensor at a time.

The header is parsed and checked here before the library sees it, because the library accepts duplicate
names and names such as `../x`, and needs seconds for a million empty tensors.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesft.core.artifact import safe_name, write_json
from edgesft.core.errors import ArtifactError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 16 << 20  # bytes; 100,000 tensors need about 12 MB
TENSOR_LIMIT = 200_000
SHARD_BYTES = 5 << 30
SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U64": 8, "U32": 4, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "U64": "uint64", "U32": "uint32",
    "U16": "uint16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `dtype` is a safetensors name (`F32`), `start` and `end` are bytes of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Weights:
    """The tensors of a model folder (or of one safetensors file) by name; a tensor is read when asked for.

    Raises ArtifactError when a file is missing, truncated, altered in its header or oversized.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._info: dict[str, TensorInfo] = {}
        self._open: dict[Path, Any] = {}
        self._maps: dict[Path, Any] = {}
        self.files = _files(path)
        for file in self.files:
            for name, info in read_header(file).items():
                if name in self._info:
                    raise ArtifactError(f"`{file}` repeats the tensor `{name}` of `{self._info[name].file}`")
                self._info[name] = info

    def keys(self) -> list[str]:
        """Names in the order of the files."""
        return list(self._info)

    def __iter__(self) -> Iterator[str]:
        return iter(self._info)

    def __len__(self) -> int:
        return len(self._info)

    def __contains__(self, name: object) -> bool:
        return name in self._info

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place without reading the tensor."""
        try:
            return self._info[name]
        except KeyError:
            raise ArtifactError(f"`{self.path}` holds no tensor `{name}`") from None

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def dtype(self, name: str) -> str:
        """Name of the torch dtype: `float32`."""
        return TORCH_NAMES[self.info(name).dtype]

    def get(self, name: str) -> "Tensor":
        """The tensor, memory-mapped where the library can; do not write into it."""
        from safetensors import SafetensorError, safe_open

        info = self.info(name)
        try:
            if info.file not in self._open:
                self._open[info.file] = safe_open(info.file, framework="pt")
            tensor: Tensor = self._open[info.file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"`{info.file}` is not readable: {error}") from None
        return tensor

    __getitem__ = get

    def mapped(self, name: str) -> "npt.NDArray[np.uint8]":
        """The bytes of the tensor where they lie in a private mapping of its file.

        They are read when they are touched; what is written to them never reaches the file.
        """
        import numpy as np

        info = self.info(name)
        if info.file not in self._maps:
            self._maps[info.file] = np.asarray(np.memmap(info.file, np.uint8, "c"))
        found: npt.NDArray[np.uint8] = self._maps[info.file][info.start : info.end]
        return found

    def items(self) -> "Iterator[tuple[str, Tensor]]":
        """(name, tensor), one at a time."""
        for name in self._info:
            yield name, self.get(name)

    @property
    def numel(self) -> int:
        """Number of values in all tensors."""
        return sum(info.numel for info in self._info.values())


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / INDEX
    if not index.is_file():
        return [path / SINGLE]
    try:
        loaded = json.loads(index.read_text(encoding="utf-8"))
        names = sorted({str(v) for v in loaded["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ArtifactError(f"`{index}` is not an index of safetensors files: {error!r}") from None
    return [path / safe_name(name) for name in names]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [k for k, _ in pairs]
        raise ValueError(f"`{next(n for n in names if names.count(n) > 1)}` occurs twice")
    return found


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file, checked against the size of the file. Raises ArtifactError."""
    header, base = _header(file)
    header.pop("__metadata__", None)
    try:
        if len(header) > TENSOR_LIMIT:
            raise ValueError(f"{len(header)} tensors, expected at most {TENSOR_LIMIT}")
        found = {name: _entry(file, name, entry, base) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"`{file}` is no valid safetensors file: {error}") from None
    _check_layout(file, found, base, file.stat().st_size)
    return found


def read_metadata(file: Path) -> dict[str, str]:
    """What a safetensors file says about itself. Raises ArtifactError."""
    found = _header(file)[0].get("__metadata__", {})
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ArtifactError(f"`{file}` is no valid safetensors file: its metadata are not strings")
    return found


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and where its data begin."""
    if not file.is_file():
        raise ArtifactError(f"`{file}` does not exist")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            expected = f"at least {length + 8}" if size >= 8 else "at least 8"
            raise ArtifactError(f"`{file}` is truncated: {size} bytes, expected {expected}")
        if length > HEADER_LIMIT:
            raise ArtifactError(f"`{file}` has a header of {length} bytes, expected at most {HEADER_LIMIT}")
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"`{file}` is no valid safetensors file: {error}") from None
    return header, 8 + length


def _entry(file: Path, name: str, entry: Mapping[str, Any], base: int) -> TensorInfo:
    if not name or name.startswith("/") or ".." in name.split("/") or not name.isprintable():
        raise ValueError(f"a tensor is named `{name!r}`")
    dtype, shape = entry["dtype"], entry["shape"]
    start, end = entry["data_offsets"]
    if dtype not in SIZES:
        raise ValueError(f"the tensor `{name}` has the unknown dtype `{dtype}`")
    if not all(type(v) is int and v >= 0 for v in (*shape, start, end)) or len(shape) > 16:
        raise ValueError(f"the tensor `{name}` has a bad shape or place")
    expected = math.prod(shape) * SIZES[dtype]
    if end - start != expected:
        raise ValueError(f"the tensor `{name}` takes {end - start} bytes, its shape needs {expected}")
    return TensorInfo(file, dtype, tuple(shape), base + start, base + end)


def _check_layout(file: Path, found: Mapping[str, TensorInfo], base: int, size: int) -> None:
    at = base
    for name, info in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != at:
            raise ArtifactError(f"`{file}` has a hole or an overlap before the tensor `{name}`")
        at = info.end
    if at != size:
        kind = "truncated" if size < at else "longer than its header says"
        raise ArtifactError(f"`{file}` is {kind}: {size} bytes, expected {at}")


def check_finite(name: str, tensor: "Tensor") -> None:
    """Raise ArtifactError, naming the tensor and the first index, if a value is NaN or infinite.

    A finite sum proves finite terms and costs one pass at memory speed; only otherwise is the place sought.
    """
    import torch

    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    flat = tensor.detach().reshape(-1)
    step = 1 << 22
    for begin in range(0, flat.numel(), step):
        chunk = flat[begin : begin + step]
        if chunk.element_size() == 1:
            chunk = chunk.float()  # float8 has no sum
        if math.isfinite(float(chunk.sum(dtype=torch.float32))):
            continue
        bad = (~torch.isfinite(chunk)).nonzero()
        if len(bad):
            at = begin + int(bad[0])
            index = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), tensor.shape))
            value = float(flat[at])
            raise ArtifactError(
                f"the tensor `{name}` holds `{value}` at {list(index)}, expected finite values"
            )


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written: safetensors dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]


def dtype_name(dtype: "torch.dtype") -> str:
    """The safetensors name of a torch dtype. Raises ArtifactError if it has none."""
    name = str(dtype).removeprefix("torch.")
    found = {v: k for k, v in TORCH_NAMES.items()}.get(name)
    if found is None:
        raise ArtifactError(f"a tensor of dtype `{name}` cannot be kept in safetensors")
    return found


def write_file(
    path: Path,
    plan: Sequence[Planned],
    get: "Callable[[str], Tensor]",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one safetensors file tensor by tensor: temporary file, fsync, rename; mode by the umask.

    get: called once a name, in an order of its own choosing; dtype and shape must be as planned.
    """
    order = sorted(plan, key=lambda p: -SIZES[p.dtype])  # wide types first keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for each in order:
        header[each.name] = {
            "dtype": each.dtype,
            "shape": list(each.shape),
            "data_offsets": [at, at + each.bytes],
        }
        at += each.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for each in order:
                _write_tensor(file, each, get(each.name))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_tensor(file: Any, planned: Planned, tensor: "Tensor") -> None:  # noqa: ANN401 - a binary stream
    import torch

    if tuple(tensor.shape) != planned.shape or dtype_name(tensor.dtype) != planned.dtype:
        raise ArtifactError(
            f"the tensor `{planned.name}` is {dtype_name(tensor.dtype)} {list(tensor.shape)}, "
            f"expected {planned.dtype} {list(planned.shape)}"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        file.write(flat.view(torch.uint8).numpy().data)  # numpy's tofile forgets why a write failed


def write_folder(
    out: Path,
    plan: Iterable[Planned],
    get: "Callable[[str], Tensor]",
    metadata: Callable[[Sequence[Planned]], Mapping[str, str]] | None = None,
) -> list[Path]:
    """model.safetensors, or shards of at most 5 GB with their index. Returns the files written.

    metadata: what a file says of the tensors in it.
    """
    shards: list[list[Planned]] = [[]]
    room = SHARD_BYTES
    for each in plan:
        if shards[-1] and each.bytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(each)
        room -= each.bytes
    about = [metadata(shard) if metadata else None for shard in shards]
    if len(shards) == 1:
        write_file(out / SINGLE, shards[0], get, about[0])
        return [out / SINGLE]
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard, said in zip(names, shards, about, strict=True):
        write_file(out / name, shard, get, said)
    total = sum(p.bytes for shard in shards for p in shard)
    where = {p.name: name for name, shard in zip(names, shards, strict=True) for p in shard}
    write_json(out / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    return [out / n for n in (*names, INDEX)]
