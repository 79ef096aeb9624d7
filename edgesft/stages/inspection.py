"""What an artefact is, what it came from, and whether it is still what its manifest says."""

import re
from pathlib import Path
from typing import Any

from edgesft.core import artifact
from edgesft.core.errors import ArtifactError


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
        **({"layers": layers} if (layers := _packed(path)) else {}),
        "files": found.manifest["files"],
        "made_by": found.manifest["made_by"],
    }


def _packed(path: Path) -> dict[str, str]:
    """What became of the layers of an export with packed weights, one line for all that agree."""
    rows = (artifact.read_json(path / "export.json") or {}).get("packed") or []
    groups: dict[tuple[str, ...], int] = {}
    for row in rows:
        name = re.sub(r"\d+", "*", str(row["layer"]))
        what = f"{row['kind']}, {row['pattern']} int{row['bits']}, {row['bits_per_weight']:g} bits a weight"
        times = row.get("measured_us", {})
        if times:
            what += " (" + ", ".join(f"{kind} {us:g} us" for kind, us in times.items()) + ")"
        groups[name, what] = groups.get((name, what), 0) + 1
    found: dict[str, str] = {}
    for (name, what), count in groups.items():
        line = f"{count} {what}"
        found[name] = f"{found[name]}; {line}" if name in found else line
    return found


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
