"""export.json: what an exported folder computes and how it is fed."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesft.core.artifact import safe_name
from edgesft.core.errors import ArtifactError

FILE = "export.json"
MODEL = "model.onnx"
DATA = "model.onnx.data"  # weights beside it
PLAIN = "model.plain.onnx"  # the same weights, in operators that every runtime has, where MODEL has ours
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


@dataclass(frozen=True)
class TunedWeight:
    """A weight (out, in), float32, of an export with `--tunable`, where it lies in the data file.

    input: of the graph. layer: its name in torch. tensor: id of its noise. row: of the mask tables.
    """

    input: str
    layer: str
    shape: tuple[int, int]
    offset: int
    tensor: int
    row: int

    @property
    def bytes(self) -> int:
        return 4 * math.prod(self.shape)


def tuned_weights(description: Mapping[str, Any], folder: Path) -> dict[str, TunedWeight]:
    """The tuned weights by layer, in the order of the graph; empty for an export without them.

    Raises ArtifactError for a table of another shape: a name, a size or an offset is never trusted.
    """
    table = description.get("tunable")
    if table is None:
        return {}
    rows = table.get("layers") if isinstance(table, dict) else None
    if not isinstance(rows, list) or not isinstance(table.get("file"), str):
        raise ArtifactError(f"`{folder / FILE}` has no valid `tunable`")
    if "/" in safe_name(table["file"]):
        raise ArtifactError(f"`{folder / FILE}` has its weights in `{table['file']}`, expected a plain name")
    found = [_tuned_weight(row, number, folder) for number, row in enumerate(rows)]
    if len({w.layer for w in found}) < len(found) or len({w.input for w in found}) < len(found):
        raise ArtifactError(f"`{folder / FILE}` names a tuned layer twice")
    return {weight.layer: weight for weight in found}


def _tuned_weight(row: Any, number: int, folder: Path) -> TunedWeight:  # noqa: ANN401 - JSON
    try:
        shape, texts = row["shape"], (row["input"], row["name"])
        sizes = [*shape, row["offset"], row["tensor"]]
        valid = len(shape) == 2 and all(isinstance(t, str) and t for t in texts)
        valid = valid and all(type(n) is int and 0 <= n < 2**53 for n in sizes) and min(shape) > 0
        valid = valid and row["tensor"] < 2**32 and row["offset"] % 4 == 0
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise ArtifactError(f"`{folder / FILE}` has no valid entry {number} of `tunable.layers`")
    return TunedWeight(texts[0], texts[1], (shape[0], shape[1]), row["offset"], row["tensor"], number)
