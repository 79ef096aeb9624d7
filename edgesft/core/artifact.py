"""Every stage reads directories and writes one directory that says what it is.

`manifest.json` is written last and moved into place: it exists only if the rest is whole. Until then the
products lie in `OUT/.partial/`, with the request that they answer, so that a killed run is recognised and
continued. A clean failure leaves nothing; a kill leaves at most `OUT/.partial/`.
"""

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from edgesft import __version__
from edgesft.core.errors import ArtifactError

MANIFEST = "manifest.json"
PARTIAL = ".partial"
SCHEMA = 1


@dataclass(frozen=True)
class Artifact:
    """A directory or a file that a stage reads.

    kind: `model`, `delta`, `onnx`, `profile`, `verdict`, `evaluation`, `data`...
    digest: `sha256:...` over its content; moving it changes nothing.
    manifest: what EdgeSFT wrote about it; empty for a foreign one (a hub folder, a data file).
    ref: what the user typed.
    """

    path: Path
    kind: str
    digest: str
    ref: str
    manifest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.manifest.get("metrics", {})
        return found

    @property
    def bytes(self) -> int:
        """Size on disk of its files, the manifest left out."""
        if self.path.is_file():
            return self.path.stat().st_size
        return sum(p.stat().st_size for p in _files(self.path))


@dataclass(frozen=True)
class Request:
    """What a stage was asked: equal requests are not run twice. Paths and times are no part of it."""

    kind: str
    stage: str
    params: Mapping[str, Any]
    inputs: Mapping[str, str]

    @property
    def digest(self) -> str:
        return digest_json({"stage": self.stage, "params": self.params, "inputs": self.inputs})

    def difference(self, other: Mapping[str, Any]) -> str | None:
        """The first field in which another request differs."""
        ours = {"stage": self.stage, "params": self.params, "inputs": self.inputs}
        return first_difference({k: other.get(k, {}) for k in ours}, ours)


@dataclass
class Workdir:
    """Where a stage writes while it is unfinished. Files in `path` become the artefact; `checkpoint` does
    not. What the stage returns as metrics goes into the manifest."""

    path: Path
    checkpoint: Path
    resumed: bool

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def digest_bytes(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_json(value: object) -> str:
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode())


def digest_file(path: Path) -> str:
    """`sha256:...` of a file's bytes."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def digest_folder(path: Path) -> str:
    """`sha256:...` over names and contents of a folder's files, hidden ones and the manifest left out."""
    return digest_json({p.relative_to(path).as_posix(): digest_file(p) for p in _files(path)})


def _files(path: Path) -> list[Path]:
    return sorted(
        p
        for p in path.rglob("*")
        if p.is_file()
        and p.relative_to(path).as_posix() != MANIFEST
        and not any(part.startswith(".") for part in p.relative_to(path).parts)
    )


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            out |= _flat(item, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = json.loads(json.dumps(item, default=str))
    return out


def first_difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The first field in which two nested mappings differ, in words; None if they are equal."""
    theirs, ours = _flat(there), _flat(here)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            return f"`{key}` is `{theirs.get(key)}` there and `{ours.get(key)}` here"
    return None


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is no file. Raises ArtifactError if it is broken."""
    if not path.is_file():
        return None
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"`{path}` is not readable: {error}") from None
    if not isinstance(loaded, dict):
        raise ArtifactError(f"`{path}` is not a JSON object")
    return loaded


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a directory, or None where there is none. Raises ArtifactError if it is broken."""
    file = path / MANIFEST
    manifest = read_json(file)
    if manifest is None:
        return None
    if not isinstance(manifest.get("files"), dict):
        raise ArtifactError(f"`{file}` is not a manifest of EdgeSFT")
    if manifest.get("schema", SCHEMA) > SCHEMA:
        raise ArtifactError(
            f"`{file}` has schema {manifest['schema']}, this EdgeSFT knows up to {SCHEMA}",
            "pip install --upgrade edgesft",
        )
    return manifest


def check_files(path: Path, manifest: Mapping[str, Any]) -> None:
    """Compare every file of an artefact with its manifest: size first, then hash. Raises ArtifactError."""
    for name, expected in manifest["files"].items():
        file = path / safe_name(name)
        if not file.is_file():
            raise ArtifactError(f"`{file}` is missing; the manifest of `{path}` lists it")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise ArtifactError(f"`{file}` has {size} bytes, its manifest says {expected['bytes']}")
        if digest_file(file) != expected["digest"]:
            raise ArtifactError(f"`{file}` was altered: its SHA-256 is not the one in the manifest")
    unlisted = [n for p in _files(path) if (n := p.relative_to(path).as_posix()) not in manifest["files"]]
    if unlisted:
        raise ArtifactError(f"`{path / unlisted[0]}` is not listed in the manifest of `{path}`")


def safe_name(name: str) -> str:
    """A relative file name out of an untrusted file. Raises ArtifactError if it leaves its folder."""
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise ArtifactError(f"a file name leaves its folder: `{name}`")
    return name


def read(path: Path, *kinds: str, ref: str | None = None, verify: bool = True) -> Artifact:
    """An artefact that EdgeSFT wrote, its hashes checked, of one of `kinds` (any if none is named).

    Raises ArtifactError when it is missing, unfinished, altered or of another kind.
    """
    if not path.exists():
        raise ArtifactError(f"`{path}` does not exist")
    manifest = read_manifest(path) if path.is_dir() else None
    if manifest is None:
        if (path / PARTIAL).exists():
            raise ArtifactError(f"`{path}` is unfinished", "run the command that writes it again")
        raise ArtifactError(f"`{path}` is not an artefact of EdgeSFT: it has no {MANIFEST}")
    if kinds and manifest.get("kind") not in kinds:
        raise ArtifactError(f"`{path}` is of kind `{manifest.get('kind')}`, expected {_either(kinds)}")
    if verify:
        check_files(path, manifest)
    digest = digest_json({k: v["digest"] for k, v in manifest["files"].items()})
    return Artifact(path, manifest["kind"], digest, ref or str(path), manifest)


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(f"`{n}`" for n in names)


def finished(out: Path, request: Request) -> Artifact | None:
    """The artefact at `out` if it answers this very request, None if there is none yet.

    Raises ArtifactError if `out` holds anything else, naming the field that differs.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise ArtifactError(f"`{out}` is a file, expected a folder to write into")
    manifest = read_manifest(out)
    if manifest is not None:
        if manifest.get("request") != request.digest:
            why = request.difference(manifest) or "another request made it"
            raise ArtifactError(f"`{out}` holds another artefact: {why}", "choose another `-o` or remove it")
        return read(out, request.kind)
    partial = _partial_request(out)
    if partial is None and any(out.iterdir()):
        raise ArtifactError(f"`{out}` holds something that is not an artefact", "choose another `-o`")
    if partial is not None and partial.get("request") not in (None, request.digest):
        why = request.difference(partial) or "another request began it"
        raise ArtifactError(f"`{out}` holds an unfinished run: {why}", "choose another `-o` or remove it")
    return None


def _partial_request(out: Path) -> dict[str, Any] | None:
    folder = out / PARTIAL
    if not folder.is_dir():
        return None
    try:
        loaded = json.loads((folder / "request.json").read_text(encoding="utf-8"))
        return loaded if isinstance(loaded, dict) else {}
    except (OSError, ValueError):
        return {}  # killed before the request was whole: nothing in it is worth keeping


@contextmanager
def create(out: Path, request: Request) -> Iterator[tuple[Workdir, dict[str, Any]]]:
    """Write an artefact: yields (workdir, metrics); on a clean exit everything is sealed into `out`.

    On an error nothing is left, unless there is a checkpoint to go on from.
    Raises ArtifactError if another process writes there.
    """
    made = not out.exists()
    partial = out / PARTIAL
    partial.mkdir(parents=True, exist_ok=True)
    lock = FileLock(partial / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = partial / "holder"
        who = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
        raise ArtifactError(
            f"`{out}` is being written by {who}", "wait for it, or choose another `-o`"
        ) from None
    try:
        workdir = _open(out, partial, request)
        metrics: dict[str, Any] = {}
        yield workdir, metrics
        _seal(out, workdir, request, metrics)
    except BaseException as error:
        if not _worth_keeping(partial, error):
            shutil.rmtree(partial, ignore_errors=True)
            if made and out.exists() and not any(out.iterdir()):
                out.rmdir()
        raise
    finally:
        lock.release()
    shutil.rmtree(partial, ignore_errors=True)


def _open(out: Path, partial: Path, request: Request) -> Workdir:
    (partial / "holder").write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
    previous = _partial_request(out) or {}
    checkpoint, products = partial / "checkpoint", partial / "products"
    resumed = previous.get("request") == request.digest and checkpoint.is_dir() and any(checkpoint.iterdir())
    if not resumed:
        shutil.rmtree(checkpoint, ignore_errors=True)
        shutil.rmtree(products, ignore_errors=True)
    if (out / MANIFEST).exists() is False:
        for stray in out.iterdir():  # products that an interrupted seal had already moved
            if stray.name != PARTIAL:
                shutil.rmtree(stray) if stray.is_dir() else stray.unlink()
    checkpoint.mkdir(exist_ok=True)
    products.mkdir(exist_ok=True)
    write_json(partial / "request.json", {"request": request.digest, **dataclasses.asdict(request)})
    return Workdir(products, checkpoint, resumed)


def _worth_keeping(partial: Path, error: BaseException) -> bool:
    """A checkpoint is kept after an interruption or a crash; bad input leaves nothing to go on from."""
    checkpoint = partial / "checkpoint"
    saved = checkpoint.is_dir() and any(checkpoint.iterdir())
    return saved and not isinstance(error, ArtifactError)


def _seal(out: Path, workdir: Workdir, request: Request, metrics: Mapping[str, Any]) -> None:
    files = {}
    umask = os.umask(0)
    os.umask(umask)
    for path in _files(workdir.path):
        path.chmod(0o666 & ~umask)  # safetensors 0.8 leaves 0600
        _sync(path)
        name = path.relative_to(workdir.path).as_posix()
        files[name] = {"digest": digest_file(path), "bytes": path.stat().st_size}
    manifest = {
        "schema": SCHEMA,
        **dataclasses.asdict(request),
        "request": request.digest,
        "files": files,
        "metrics": dict(metrics),
        "made_by": made_by(),
    }
    for path in sorted(workdir.path.iterdir()):
        os.replace(path, out / path.name)
    write_json(out / MANIFEST, manifest)


def made_by() -> dict[str, str]:
    """Versions that took part; of what is already imported only."""
    found = {"edgesft": __version__, "python": platform.python_version(), "machine": platform.machine()}
    for name in ("torch", "transformers", "onnxruntime"):
        module = sys.modules.get(name)
        if module is not None:
            found[name] = str(getattr(module, "__version__", "unknown"))
    return found


def write_json(path: Path, value: object) -> None:
    """Write JSON whole or not at all."""
    write_bytes(path, (json.dumps(value, indent=2, default=str) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: temporary file beside it, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
