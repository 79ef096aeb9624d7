"""What the gate may say, as errors with an exit code each, and its report in words."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgesft.core import artifact
from edgesft.core.errors import ArtifactError, EdgeSFTError

SCHEMA = 1
REPORT = "verdict.json"
SECONDARY = 0.02


class GateVerdict(EdgeSFTError):
    """The gate's answer, when it is not a pass. report: the JSON report."""

    def __init__(self, message: str, report: dict[str, Any], hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.report = report


class Regression(GateVerdict):
    """Head is slower than allowed."""

    exit_code = 10


class Inconclusive(GateVerdict):
    """Neither a regression nor its absence was shown within the pairs allowed."""

    exit_code = 11


class NotComparable(GateVerdict):
    """The two sides are not two versions of one thing, or were not measured under the same conditions."""

    exit_code = 12


class NothingMeasured(GateVerdict):
    """No pair could be measured."""

    exit_code = 13


class DeviceLost(GateVerdict):
    """The device or the measuring process went away; what was measured is kept, the same command goes on."""

    exit_code = 14


def exact(metric: str, values: Mapping[str, float], blocking: bool) -> dict[str, Any]:
    """Line of the report for a quantity without noise: more than 2 % more of it is a difference."""
    ratio = values["head"] / values["base"] if values["base"] else math.inf
    verdict = "fail" if ratio > 1 + SECONDARY else "pass"
    return {"metric": metric, "verdict": verdict, "blocking": blocking, "ratio": ratio, **values}


def read_pairs(file: Path) -> list[dict[str, Any]]:
    """Pairs of an interrupted run, as far as they are whole: a kill may have cut the last line."""
    pairs: list[dict[str, Any]] = []
    if not file.exists():
        return pairs
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            pair = json.loads(line)
        except ValueError:
            break
        if not isinstance(pair, dict) or pair.get("pair") != len(pairs) or "discarded" not in pair:
            break
        pairs.append(pair)
    text = "".join(json.dumps(p) + "\n" for p in pairs)
    artifact.write_bytes(file, text.encode())  # the next line must not be glued to half a line
    return pairs


def load_report(file: Path) -> dict[str, Any]:
    """A report from its file. Raises ArtifactError if it is broken or of another schema."""
    report = artifact.read_json(file)
    if report is None or report.get("schema") != SCHEMA:
        raise ArtifactError(f"`{file}` is not a verdict of schema {SCHEMA}")
    return report


def describe(report: Mapping[str, Any]) -> str:
    """The report in one line."""
    if report["ratio"] is None:
        return f"{report['verdict']}: {report.get('error', 'nothing was measured')}"
    low, high = ("?" if x is None else f"{x:.3f}" for x in report["interval"])
    return (
        f"{report['verdict']}: {report['metric']} of head is {report['ratio']:.3f} times that of base "
        f"(between {low} and {high}, {report['pairs']} pairs, {report['decided_by']} time)"
    )


def judge(report: Mapping[str, Any], inconclusive: str | None = None) -> None:
    """Nothing for a pass; otherwise raise the verdict with its exit code.

    inconclusive: `report` (exit 11), `fail` (10) or `pass`; None takes what the report was asked for.
    """
    verdict, text, whole = report["verdict"], describe(report), dict(report)
    policy = inconclusive or report.get("inconclusive", "report")
    if verdict == "pass" or (verdict == "inconclusive" and policy == "pass"):
        return
    if verdict == "fail":
        extra = [
            e["metric"]
            for e in report["metrics"]
            if "clock" not in e and e["blocking"] and e["verdict"] == "fail"
        ]
        raise Regression(text + (f"; more {' and '.join(extra)} than allowed" if extra else ""), whole)
    if verdict == "inconclusive":
        kind = Regression if policy == "fail" else Inconclusive
        predicted = report["pairs_predicted"]
        hint = f"about {predicted} pairs are needed at this noise: raise `--max-pairs`, or quiet the machine"
        raise kind(text, whole, hint)
    rest: dict[str, type[GateVerdict]] = {
        "not_comparable": NotComparable,
        "nothing_measured": NothingMeasured,
        "device_lost": DeviceLost,
    }
    raise rest[verdict](text, whole)
