"""Refuses an ONNX file that reaches outside its folder, before any runtime opens it.

The external data of an ONNX tensor is a file name inside an untrusted file. Readers have followed it out of
the folder again and again: `..` (CVE-2022-25882), its variants (CVE-2024-27318, CVE-2026-27489), hard links
(CVE-2026-34446), symbolic links (CVE-2026-34447), odd keys and sizes (GHSA-538c-55jv-c5g9). ONNX Runtime
still reads through hard links, so nothing here relies on the reader.

Time and memory are bounded: the wire format is walked once to count its fields before anything is parsed,
because two bytes of an empty tensor become some 170 bytes of memory.
"""

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edgesft.core.artifact import safe_name
from edgesft.core.errors import ArtifactError

MAX_BYTES = 2**31 - 1  # of one protobuf message, by its own rules
MAX_FIELDS = 2_000_000  # about 350 MB once parsed; a 100-layer graph has some 300,000
MAX_DEPTH = 100  # the recursion limit of every protobuf reader
KEYS = frozenset({"location", "offset", "length", "checksum"})
EXTERNAL = 1  # TensorProto.DataLocation

# TensorProto.DataType -> bits an element; strings (8) cannot lie in external data
BITS = {
    **dict.fromkeys((22, 21, 23), 4),  # int4, uint4, float4e2m1
    **dict.fromkeys((25, 26), 2),  # uint2, int2
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((7, 11, 13, 14), 64),
    15: 128,
}


@dataclass(frozen=True)
class _Reference:
    """One tensor's external data: bytes [offset, offset + length) of a file."""

    tensor: str
    location: str
    offset: int
    length: int


def check(folder: Path, name: str = "model.onnx") -> frozenset[str]:
    """The names of the external data files of `folder / name`, every reference found safe.

    Safe: a plain relative name of a regular file below `folder` with no link of either kind on the way, only
    known keys and each once, and a byte range that fits the tensor and the file. Initializers, sparse ones,
    attributes, subgraphs and functions are all looked at. Nothing but `folder / name` itself is read.
    Raises ArtifactError otherwise, and for a file that is no ONNX model at all.
    """
    return references(parse(folder, name), folder, name)


def references(model: Any, folder: Path, name: str = "model.onnx") -> frozenset[str]:  # noqa: ANN401
    """`check` for a model that `parse` has read already."""
    sizes: dict[str, int] = {}
    for tensor in _tensors(model):
        reference = _reference(tensor, folder / name)
        if reference is None:
            continue
        if reference.location not in sizes:
            sizes[reference.location] = _size(folder, reference)
        size = sizes[reference.location]
        if reference.offset + reference.length > size:
            raise ArtifactError(
                f"`{folder / reference.location}` has {size} bytes, tensor `{reference.tensor}` of `{name}` "
                f"needs {reference.length} at {reference.offset}"
            )
    return frozenset(sizes)


def parse(folder: Path, name: str = "model.onnx") -> Any:  # noqa: ANN401 - protobuf messages are untyped
    """The `onnx.ModelProto` of `folder / name`, external data not loaded.

    Raises ArtifactError for a missing, linked, oversized or malformed file, and for one without a graph.
    """
    import onnx

    path = folder / safe_name(name)
    data = _read(path)
    try:
        _count(data, onnx.ModelProto.DESCRIPTOR)
        model = onnx.ModelProto.FromString(data)
    except Exception as error:  # DecodeError of a package without types; what else, depends on its version
        raise ArtifactError(f"`{path}` is not a whole ONNX model: {error}") from None
    if not model.HasField("graph"):
        raise ArtifactError(f"`{path}` is not an ONNX model: it holds no graph")
    return model


def _read(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a FIFO must not hang us
    except FileNotFoundError:
        raise ArtifactError(f"`{path}` does not exist") from None
    except OSError as error:
        raise ArtifactError(f"`{path}` cannot be read: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ArtifactError(f"`{path}` is not a regular file")
        if status.st_size > MAX_BYTES:
            raise ArtifactError(f"`{path}` has {status.st_size} bytes, an ONNX file has {MAX_BYTES} at most")
        return file.read(MAX_BYTES + 1)


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = 0
    for i in range(10):
        if at >= end:
            raise ValueError("it ends inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            return value, at
    raise ValueError("a number has more than ten bytes")


def _count(data: bytes, descriptor: Any) -> None:  # noqa: ANN401 - google.protobuf is untyped
    """Walk the wire format without building anything. Raises ValueError past a limit or where it is broken.

    https://protobuf.dev/programming-guides/encoding: a tag is (field << 3 | wire type).
    """
    kinds: dict[str, dict[int, Any]] = {}
    frames = [(len(data), descriptor)]  # open messages, outermost first: where each ends, and what it is
    at = fields = 0
    while frames:
        end, kind = frames[-1]
        if at == end:
            frames.pop()
            continue
        fields += 1
        if fields > MAX_FIELDS:
            raise ValueError(f"it has more than {MAX_FIELDS} fields")
        tag, at = _varint(data, at, end)
        length = 0
        match tag & 7:
            case 0:
                _, at = _varint(data, at, end)
            case 1:
                length = 8
            case 5:
                length = 4
            case 2:
                length, at = _varint(data, at, end)
            case wire:
                raise ValueError(f"a field has the wire type {wire}")
        if at + length > end:
            raise ValueError("it is truncated")
        if kind.full_name not in kinds:
            kinds[kind.full_name] = {f.number: f.message_type for f in kind.fields if f.message_type}
        nested = kinds[kind.full_name].get(tag >> 3)
        if tag & 7 == 2 and nested is not None:
            frames.append((at + length, nested))
            if len(frames) > MAX_DEPTH:
                raise ValueError(f"its messages lie more than {MAX_DEPTH} deep")
        else:
            at += length


def _tensors(model: Any) -> Iterator[Any]:  # noqa: ANN401
    """Every TensorProto anywhere in `model`, whichever field of whichever message holds it."""
    pending = [model]
    while pending:
        message = pending.pop()
        if message.DESCRIPTOR.name == "TensorProto":
            yield message
        for field, value in message.ListFields():
            if field.message_type is not None:
                if hasattr(value, "ListFields"):
                    pending.append(value)
                else:
                    pending.extend(value)


def _reference(tensor: Any, model: Path) -> _Reference | None:  # noqa: ANN401
    """What a tensor refers to, None if it holds its own data. Raises ArtifactError for odd keys or values."""
    if tensor.data_location != EXTERNAL and not tensor.external_data:
        return None
    title = f"tensor `{tensor.name}` of `{model}`"
    keys = [entry.key for entry in tensor.external_data]
    if not all(isinstance(text, str) for e in tensor.external_data for text in (e.key, e.value)):
        raise ArtifactError(f"{title} has external data that is not UTF-8")  # protobuf then gives bytes
    if len(keys) != len(set(keys)):
        raise ArtifactError(f"{title} gives a key of its external data twice")
    odd = next((k for k in keys if k not in KEYS), None)
    if odd is not None:
        raise ArtifactError(f"{title} has the key `{odd}` in its external data, known are {sorted(KEYS)}")
    values = {entry.key: entry.value for entry in tensor.external_data}
    if not values.get("location"):
        raise ArtifactError(f"{title} has external data but no location")
    needed = _bytes(tensor, title)
    length = _number(values, "length", needed, title)
    if length != needed:
        raise ArtifactError(f"{title} takes {length} bytes of external data, its shape needs {needed}")
    return _Reference(tensor.name, values["location"], _number(values, "offset", 0, title), length)


def _number(values: Mapping[str, str], key: str, default: int, title: str) -> int:
    text = values.get(key)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,19}", text) or int(text) >= 2**63:  # int() alone takes "-1", "1_0", " 1"
        raise ArtifactError(f"{title} has the {key} `{text[:40]}`, expected a number of bytes")
    return int(text)


def _bytes(tensor: Any, title: str) -> int:  # noqa: ANN401
    """Bytes that the shape and type of a tensor need."""
    bits = BITS.get(tensor.data_type)
    if bits is None:
        raise ArtifactError(f"{title} has the type {tensor.data_type}, which cannot lie in external data")
    total = 1
    for dimension in tensor.dims:
        if dimension < 0:
            raise ArtifactError(f"{title} has the dimension {dimension}")
        total *= dimension
        if total >= 2**63:
            raise ArtifactError(f"{title} has a shape of more than 2^63 elements")
    return (total * bits + 7) // 8


def _size(folder: Path, reference: _Reference) -> int:
    """Size of a referenced file. Raises ArtifactError unless it is regular, unlinked and in `folder`."""
    parts = PurePosixPath(safe_name(reference.location)).parts
    if not parts:
        raise ArtifactError(f"tensor `{reference.tensor}` lies in `{reference.location}`, which is no file")
    path = folder
    for part in parts:
        path = path / part
        try:
            status = path.lstat()
        except OSError as error:
            raise ArtifactError(
                f"`{path}` cannot be found: {error.strerror}; tensor `{reference.tensor}` lies there"
            ) from None
        if stat.S_ISLNK(status.st_mode):
            raise ArtifactError(
                f"`{path}` is a symbolic link; external data must lie in the folder itself",
                f"cp -rL {folder} COPY",
            )
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"`{path}` is not a regular file; tensor `{reference.tensor}` lies there")
    if status.st_nlink > 1:
        raise ArtifactError(
            f"`{path}` is a hard link: {status.st_nlink} names share it", f"cp {path} {path}.new"
        )
    return status.st_size
