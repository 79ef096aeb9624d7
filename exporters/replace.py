"""Change the weights of an exported artefact in place: the old artefact or the new one, never a mix.

The new artefact is written whole beside the old one, with its own manifest, and the two folders change names
in one step of the file system. Where that step does not exist there are two renames, and what a kill between
them leaves is put right by the next call of `recover`.
"""

import ctypes
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from edgesft.core import artifact
from edgesft.core.artifact import Artifact
from edgesft.core.errors import ArtifactError

_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2  # linux/fs.h; macOS sys/stdio.h


def replace_data(
    path: Path, name: str, write: Callable[[BinaryIO], None], about: Mapping[str, Any]
) -> Artifact:
    """The artefact at `path` with another content of its file `name`.

    write: changes an open copy of the file. about: goes into the manifest as `tuned`.
    Raises ArtifactError where `path` is no finished export, its disk is too small, or it cannot be replaced.
    """
    from edgesft.exporters.external import check_space  # brings in onnx-ir, which a run does not need

    path = path.resolve()
    recover(path)
    old = artifact.read(path, "onnx")
    check_space(path.parent, old.bytes + (1 << 20))
    _sweep(path)
    staged = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        shutil.copytree(path, staged, ignore=shutil.ignore_patterns(artifact.PARTIAL), symlinks=True)
        with (staged / name).open("r+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        artifact.write_json(staged / artifact.MANIFEST, _manifest(staged, name, old, about))
        _exchange(staged, path)
    except OSError as error:
        raise ArtifactError(f"`{path}` cannot be replaced: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return artifact.read(path, "onnx", verify=False)


def _manifest(staged: Path, name: str, old: Artifact, about: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the file's new hash; it answers no request any more, so that none finds it done."""
    file = staged / name
    entry = {"digest": artifact.digest_file(file), "bytes": file.stat().st_size}
    request = artifact.digest_json({"request": old.manifest.get("request"), "data": entry["digest"]})
    files = {**old.manifest["files"], name: entry}
    return {**old.manifest, "request": request, "files": files, "tuned": dict(about)}


def recover(path: Path) -> None:
    """Put back what a kill between two renames left. Nothing happens where `path` exists."""
    kept = _kept(path)
    if not path.exists() and kept.is_dir():
        os.replace(kept, path)


def _kept(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _sweep(path: Path) -> None:
    """Remove what killed processes left beside `path`."""
    for stray in path.parent.glob(f".{path.name}.*.new"):
        number = stray.name.removesuffix(".new").rpartition(".")[2]
        if number.isdigit() and not _alive(int(number)):
            shutil.rmtree(stray, ignore_errors=True)
    shutil.rmtree(_kept(path), ignore_errors=True)


def _alive(process: int) -> bool:
    import psutil

    return process != os.getpid() and bool(psutil.pid_exists(process))


def _exchange(staged: Path, path: Path) -> None:
    """The two folders change names; raises OSError."""
    if _swap(staged, path):
        _sync(path.parent)
        return
    kept = _kept(path)
    os.rename(path, kept)
    try:
        os.rename(staged, path)
    except OSError:
        os.rename(kept, path)
        raise
    _sync(path.parent)
    shutil.rmtree(kept, ignore_errors=True)


def _swap(a: Path, b: Path) -> bool:
    """Exchange two names atomically; False where system or file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(a), os.fsencode(b)
    if hasattr(library, "renameat2"):
        return bool(library.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE) == 0)
    if hasattr(library, "renamex_np"):
        return bool(library.renamex_np(first, second, _RENAME_SWAP) == 0)
    return False


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
