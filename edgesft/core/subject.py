"""What a profile, a calibration and a gate take: an export, a model, a foreign ONNX file, an engine.

Nothing is run here. What a foreign graph refers to is looked up by the exporters, through the catalogue.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from edgesft.core import artifact, catalog, models, weights
from edgesft.core.artifact import Artifact
from edgesft.core.errors import ArtifactError

ENGINES = (".engine", ".plan")
GRAPH = ".onnx"


@dataclass(frozen=True)
class Graph(Artifact):
    """A foreign ONNX file. files: itself first, then the files that hold its external data."""

    files: tuple[Path, ...] = ()

    @property
    def bytes(self) -> int:
        """Size on disk of the file and its external data."""
        return sum(p.stat().st_size for p in self.files)


def resolve(ref: str | Path) -> Artifact:
    """The artefact behind an exported folder, whatever is a model, an `.onnx` file or a TensorRT engine.

    Kinds: `onnx` (written by EdgeSFT), `model`, `graph` (a foreign `.onnx` file, or a folder with exactly one
    and no weights of its own), `engine` (`.engine`, `.plan`). `model.onnx` inside an exported folder stands
    for the folder. Raises ArtifactError for what is missing, broken, unsafe or of another kind.
    """
    path = Path(ref).expanduser()
    if path.is_file():
        if path.suffix == GRAPH:
            return models.resolve(str(path.parent), "onnx") if _exported(path) else _graph(path, str(ref))
        if path.suffix in ENGINES:
            return Artifact(path, "engine", artifact.digest_file(path), str(ref))
    elif path.is_dir():
        single = _only_graph(path)
        if single is not None:
            return _graph(single, str(ref))
    elif path.suffix in (GRAPH, *ENGINES):
        raise ArtifactError(f"`{ref}` does not exist")
    return models.resolve(str(ref), "onnx", "model")


def _exported(path: Path) -> bool:
    """Whether EdgeSFT wrote the folder of this file."""
    try:
        manifest = json.loads((path.parent / artifact.MANIFEST).read_text(encoding="utf-8"))
        return manifest["kind"] == "onnx" and path.name in manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _only_graph(folder: Path) -> Path | None:
    """The one `.onnx` file of a foreign folder without weights for torch, None if it has none.

    Raises ArtifactError for several: nothing says which is meant.
    """
    ours = (artifact.MANIFEST, artifact.PARTIAL, weights.SINGLE, weights.INDEX)
    if any((folder / name).exists() for name in ours):
        return None
    found = sorted(p for p in folder.iterdir() if p.suffix == GRAPH and p.is_file())
    if len(found) > 1:
        names = ", ".join(f"`{p.name}`" for p in found[:5]) + (", ..." if len(found) > 5 else "")
        raise ArtifactError(f"`{folder}` holds {len(found)} graphs: {names}", f"give one, like `{found[0]}`")
    return found[0] if found else None


def _graph(path: Path, ref: str) -> Graph:
    """A foreign graph, everything that it refers to found safe; the digest covers names and contents."""
    files: tuple[Path, ...] = catalog.runtime("exporters.foreign").files(path)
    digests = {p.relative_to(files[0].parent).as_posix(): artifact.digest_file(p) for p in files[1:]}
    digest = artifact.digest_json([artifact.digest_file(files[0]), digests])
    return Graph(files[0], "graph", digest, ref, files=files)
