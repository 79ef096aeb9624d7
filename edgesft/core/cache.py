"""The user's cache folder, and what is made there once: models converted from GGUF files and archives."""

import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock

from edgesft.core import artifact, console
from edgesft.core.artifact import Artifact, Request
from edgesft.core.errors import ArtifactError

ARCHIVE_LIMIT = 8 << 30  # bytes that a zipped model may unfold to
RATIO_LIMIT = 200  # unfolded to zipped size of one member; honest weights stay near 1


def folder() -> Path:
    """`$EDGESFT_CACHE`, else the platform's cache folder."""
    named = os.environ.get("EDGESFT_CACHE")
    if named:
        return Path(named)
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("edgesft"))


def model(source: Path, how: str, make: Callable[[Path], None], ref: str) -> Artifact:
    """The model that `make` writes out of the file `source`; made once for its content.

    how: name and version of the conversion, part of the key. A second process waits for the first; a cached
    folder that was altered is made again.
    """
    digest = artifact.digest_file(source)
    home = folder() / "models"
    out = home / f"{source.stem}-{how}-{digest.removeprefix('sha256:')[:16]}"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f".{out.name}.lock"):
            return _made(source, digest, out, how, make, ref)
    except OSError as error:
        raise ArtifactError(
            f"the cache folder `{home}` cannot be used: {error}", "set EDGESFT_CACHE to a folder with room"
        ) from None


def _made(source: Path, digest: str, out: Path, how: str, make: Callable[[Path], None], ref: str) -> Artifact:
    if (out / artifact.MANIFEST).exists():
        try:
            return artifact.read(out, "model", ref=ref)
        except ArtifactError as error:
            console.warn(f"{error.message}; it is made again")
    shutil.rmtree(out, ignore_errors=True)
    console.say(f"converting `{source.name}` once into `{out}`")
    request = Request("model", how, {}, {"file": digest})
    with artifact.create(out, request) as (work, _):
        make(work.path)
    return artifact.read(out, "model", ref=ref, verify=False)


def unzip(source: Path, out: Path, wanted: Mapping[str, str]) -> None:
    """Extract the members `wanted` (member -> file name) of a zip archive; sizes bounded, no links.

    Raises ArtifactError when a member is missing, too large or broken.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            total = 0
            for member, name in wanted.items():
                info = archive.getinfo(member)
                total += info.file_size
                if total > ARCHIVE_LIMIT or info.file_size > RATIO_LIMIT * max(info.compress_size, 1):
                    raise ArtifactError(f"`{member}` in `{source}` unfolds to {info.file_size} bytes")
                with archive.open(info) as reader, (out / artifact.safe_name(name)).open("wb") as writer:
                    shutil.copyfileobj(reader, writer, 1 << 20)
    except KeyError as error:
        raise ArtifactError(f"`{source}` is incomplete: {error}") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise ArtifactError(f"`{source}` is not a readable archive: {error}") from None
