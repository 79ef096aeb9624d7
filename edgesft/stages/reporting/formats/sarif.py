"""SARIF 2.1.0 for code scanning: a rule a check, a result for everything that is not a pass.

error: failed, or no verdict at all; warning: inconclusive; note: a refused percentile, or something worth
knowing. Results point at the record that they came from, by a relative URI.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from edgesft import __version__
from edgesft.stages.reporting import Run
from edgesft.stages.reporting.findings import CHECKS, Finding, findings
from edgesft.stages.reporting.formats.markdown import escape

FILE = "results.sarif"
SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
LEVELS = {"fail": "error", "error": "error", "inconclusive": "warning", "refused": "note", "note": "note"}


def render(runs: Sequence[Run]) -> str:
    """The log: one run of one tool."""
    found = [f for f in findings(runs) if f.outcome in LEVELS]
    rules = list(dict.fromkeys(f.check for f in found))
    document = {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "EdgeSFT",
                        "version": __version__,
                        "semanticVersion": __version__,
                        "rules": [_rule(check) for check in rules],
                    }
                },
                "invocations": [{"executionSuccessful": all(f.outcome != "error" for f in found)}],
                "artifacts": [{"location": {"uri": run.uri}} for run in runs],
                "columnKind": "utf16CodeUnits",
                "results": [_result(f, rules, runs) for f in found],
            }
        ],
    }
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _rule(check: str) -> dict[str, Any]:
    title, text = CHECKS[check]
    return {
        "id": f"edgesft/{check}",
        "name": "".join(word.capitalize() for word in check.split("-")),
        "shortDescription": {"text": title},
        "fullDescription": {"text": text},
        "help": {"text": text},
        "defaultConfiguration": {
            "level": "error" if check in ("latency", "budget", "comparable") else "warning"
        },
    }


def _result(finding: Finding, rules: Sequence[str], runs: Sequence[Run]) -> dict[str, Any]:
    where = {"uri": finding.run.uri, "index": next(i for i, r in enumerate(runs) if r is finding.run)}
    identity = hashlib.sha256(f"{finding.run.name}\0{finding.name}".encode(errors="replace")).hexdigest()
    text = f"{finding.run.name}: {finding.message}"
    return {
        "ruleId": f"edgesft/{finding.check}",
        "ruleIndex": rules.index(finding.check),
        "level": LEVELS[finding.outcome],
        # in a SARIF text, `[a](b)` is a link and `{0}` a placeholder: doubling and a backslash undo both
        "message": {"text": _message(text), "markdown": escape(text)},
        "locations": [{"physicalLocation": {"artifactLocation": where, "region": {"startLine": 1}}}],
        "partialFingerprints": {"edgesftCheck/v1": identity},
    }


def _message(text: str) -> str:
    """Plain text for a SARIF message: brackets may make a link, braces a placeholder (3.11.5, 3.11.6)."""
    for char in "\\[]":
        text = text.replace(char, "\\" + char)
    return text.replace("{", "{{").replace("}", "}}")
