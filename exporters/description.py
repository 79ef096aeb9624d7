"""export.json: what an exported folder computes and how it is fed."""

import json
from pathlib import Path
from typing import Any

from edgesft.core.errors import ArtifactError

FILE = "export.json"
MODEL = "model.onnx"
DATA = "model.onnx.data"  # weights beside it
FORMAT = 1
_KEYS = {"kind": str, "vocabulary": int, "inputs": list, "outputs": list}


def read_description(folder: Path) -> dict[str, Any]:
    """export.json of a folder. Raises ArtifactError if it is missing, broken or of a later format."""
    file = folder / FILE
    if not file.is_file():
        raise ArtifactError(f"`{folder}` has no {FILE}, so it is not an export of EdgeSFT")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ArtifactError(f"`{file}` is not readable: {error}") from None
    if not isinstance(found, dict):
        raise ArtifactError(f"`{file}` is not a JSON object")
    if found.get("format") != FORMAT:
        raise ArtifactError(f"`{file}` has format `{found.get('format')}`, this EdgeSFT reads {FORMAT}")
    for key, kind in _KEYS.items():
        if not isinstance(found.get(key), kind):
            raise ArtifactError(f"`{file}` has no valid `{key}`")
    if found["kind"] not in ("decoder", "encoder"):
        raise ArtifactError(f"`{file}` has the kind `{found['kind']}`, expected `decoder` or `encoder`")
    return found
