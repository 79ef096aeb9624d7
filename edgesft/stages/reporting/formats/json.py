"""The records themselves in one JSON document of a versioned schema, with what every check said.

Schema: `docs/schemas/report.schema.json`. Numbers that are not finite become null, which JSON can say.
"""

import json
import math
from collections.abc import Mapping, Sequence

from edgesft import __version__
from edgesft.stages.reporting import Run
from edgesft.stages.reporting.findings import findings

FILE = "report.json"
SCHEMA = 1


def render(runs: Sequence[Run]) -> str:
    """The document. The records are whole, raw samples included."""
    document = {
        "schema": SCHEMA,
        "kind": "report",
        "edgesft": __version__,
        "runs": [{"name": r.name, "kind": r.kind, "path": r.uri, "record": finite(r.record)} for r in runs],
        "findings": [finite(f.json()) for f in findings(runs)],
    }
    return json.dumps(document, indent=2, allow_nan=False, default=str) + "\n"


def finite(value: object) -> object:
    """The value with null for every number that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value
