"""What an artefact is, what it came from, and whether it is still what its manifest says."""

from pathlib import Path
from typing import Any

from edgesft.core import artifact
from edgesft.core.errors import ArtifactError
from edgesft.stages import layers

PLAIN = "model.plain.onnx"


def inspect(path: Path) -> dict[str, Any]:
    """Facts about a directory, its hashes checked. Raises ArtifactError for anything missing or altered."""
    if not path.exists():
        raise ArtifactError(f"`{path}` does not exist")
    run = artifact.read_json(path / "run.json") if path.is_dir() else None
    if run is not None:
        steps = list(run["tables"])
        done = [name for name in steps if (path / name / artifact.MANIFEST).is_file()]
        return {
            "kind": "run",
            "recipe": run["recipe"],
            "finished": len(done) == len(steps) and (path / "summary.json").is_file(),
            "steps": {name: name in done for name in steps},
            "inputs": run["inputs"],
        }
    manifest = artifact.read_manifest(path) if path.is_dir() else None
    if manifest is None and path.is_dir() and (path / "config.json").is_file():
        return _foreign(path)
    found = artifact.read(path)
    return {
        "kind": found.kind,
        "digest": found.digest,
        "bytes": found.bytes,
        "stage": found.manifest["stage"],
        "params": found.manifest["params"],
        "inputs": found.manifest["inputs"],
        "metrics": dict(found.metrics),
        **_layers(path),
        "files": found.manifest["files"],
        "made_by": found.manifest["made_by"],
    }


def _layers(path: Path) -> dict[str, Any]:
    """What became of the layers of an export with packed weights, one line for all that agree."""
    found = layers.read(path)
    if found is None:
        return {}
    lines: dict[str, str] = {}
    for row in found["rows"]:
        name, text = row["layer"], layers.describe(row)
        lines[name] = f"{lines[name]}; {text}" if name in lines else text
    graphs = {"graph": "model.onnx"}
    if (path / PLAIN).is_file():
        graphs["without the kernels"] = PLAIN
    return {**graphs, "layers": {"all": layers.line(found), **lines}}


def _foreign(path: Path) -> dict[str, Any]:
    from edgesft.core import models

    model = models.resolve(str(path))
    config = artifact.read_json(path / "config.json") or {}
    return {
        "kind": model.kind,
        "digest": model.digest,
        "bytes": model.bytes,
        "architecture": (config.get("architectures") or [None])[0],
        "made_by": "not EdgeSFT: no manifest, so nothing says whether it was altered",
    }
