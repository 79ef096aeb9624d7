"""What the gate may say, as errors with an exit code each, and its report in words."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgesft.core import artifact
from edgesft.core.errors import ArtifactError, EdgeSFTError

SCHEMA = 2
REPORT = "verdict.json"
SECONDARY = 0.02  # more of a quantity without noise than this is a difference


class GateVerdict(EdgeSFTError):
    """The gate's answer, when it is not a pass. report: the JSON report."""

    def __init__(self, message: str, report: dict[str, Any], hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.report = report


class Regression(GateVerdict):
    """Head is slower than allowed, or larger, or beyond a budget."""

    exit_code = 10


class Inconclusive(GateVerdict):
    """Neither a regression nor its absence was shown within the pairs allowed."""

    exit_code = 11


class NotComparable(GateVerdict):
    """The two sides are not two versions of one thing, or were not measured under the same conditions."""

    exit_code = 12


class NothingMeasured(GateVerdict):
    """No pair could be measured, or what was asked for cannot be measured here."""

    exit_code = 13


class DeviceLost(GateVerdict):
    """The device or the measuring process went away; what was measured is kept, the same command goes on."""

    exit_code = 14


def exact(metric: str, values: Mapping[str, float], blocking: bool, pairs: int | None) -> dict[str, Any]:
    """Line of the report for a quantity without noise: more than 2 % more of it is a difference.

    values: bytes of `base` and `head`. pairs: how many they are the medians of, None for none.
    """
    ratio = values["head"] / values["base"] if values["base"] else math.inf
    verdict = "fail" if ratio > 1 + SECONDARY else "pass"
    counted = {} if pairs is None else {"pairs": pairs}
    note = {} if blocking else {"note": "reported only"}
    return {
        "metric": metric,
        "verdict": verdict,
        "blocking": blocking,
        "margin": SECONDARY,
        "ratio": ratio,
        **counted,
        **values,
        **note,
    }


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
    verdict = report["verdict"]
    if "error" in report:
        return f"{verdict}: {report['error']}"
    budgets = report["budgets"]
    if report["decided_by"] == "budget":
        open_or_broken = [b for b in budgets if b["verdict"] != "pass"]
        if open_or_broken:
            return f"{verdict}: {_budget(open_or_broken[0])}"
        return f"{verdict}: {_all_kept(budgets)} ({report['pairs']} processes)"
    if report["ratio"] is None:
        return f"{verdict}: nothing was measured"
    text = f"{verdict}: {report['metric']} of head is {report['ratio']:.3f} times that of base"
    if report["decided_by"] != "exact":
        low, high = _ends(report["interval"])
        text += f" (between {low} and {high}, {report['pairs']} pairs, {report['decided_by']} time)"
    return text + (f"; {_all_kept(budgets)}" if budgets and verdict == "pass" else "")


def _all_kept(budgets: list[dict[str, Any]]) -> str:
    return "the budget is kept" if len(budgets) == 1 else f"all {len(budgets)} budgets are kept"


def _ends(interval: list[float | None] | None) -> tuple[str, str]:
    low, high = ("?" if x is None else f"{x:.3f}" for x in interval or [None, None])
    return low, high


def _budget(entry: Mapping[str, Any]) -> str:
    """One budget in words."""
    unit = entry["unit"]
    if entry["value"] is None:
        return f"budget {entry['name']} of {entry['limit']:g} {unit}: {entry['reason']}"
    low, high = ("?" if entry[k] is None else f"{entry[k]:.4g}" for k in ("low", "high"))
    text = f"budget {entry['name']}: {entry['value']:.4g} {unit}"
    if entry["low"] != entry["high"]:
        text += f", between {low} and {high}"
    asked = f"at least {entry['limit']:g}" if entry.get("least") else f"at most {entry['limit']:g}"
    return f"{text}, asked for {asked}" + (f"; {entry['reason']}" if entry.get("reason") else "")


def lines(report: Mapping[str, Any]) -> list[str]:
    """The report for a person: what was decided, by what, how sure, and a line for everything looked at."""
    found = [describe(report)]
    if report["pairs"] and report["noise"] is not None:
        found.append(
            f"{report['pairs']} pairs, {report['estimator']} of each process by {_clock(report['clock'])};"
            f" noise {100 * report['noise']:.1f} %, smallest effect seen {100 * report['detectable']:.1f} %"
        )
    if report["base"] is not None and report["pairs"]:
        found.append(_calibration(report))
    found += [_metric(entry) for entry in report["metrics"]]
    found += [f"  {entry['verdict']:12} {_budget(entry)}" for entry in report["budgets"]]
    if report["discarded"]:
        what = "pair was" if len(report["discarded"]) == 1 else "pairs were"
        found.append(f"{len(report['discarded'])} {what} measured again: {report['discarded'][0]['why']}")
    if report["drill_slowdown"]:
        found.append(f"a drill: head was slowed by {report['drill_slowdown']:g} %")
    if any(e.get("faster") for e in report["metrics"]):
        faster = dict.fromkeys(e["metric"] for e in report["metrics"] if e.get("faster"))
        found.append(f"head is faster: {', '.join(faster)}")
    return found


def _clock(name: str | None) -> str:
    clocks = {"both": "wall and processor time", "cpu": "processor time", "wall": "wall time"}
    return clocks.get(name or "", str(name))


def _calibration(report: Mapping[str, Any]) -> str:
    used = report["calibration"]
    if used is None:
        return "not calibrated: its error rates on this machine are assumed"
    return f"calibrated on {used['made_at'][:10]}, valid until {used['expires_at'][:10]}"


def _metric(entry: Mapping[str, Any]) -> str:
    """One metric in a line of the summary."""
    clock = f" ({entry['clock']})" if "clock" in entry else ""
    text = f"  {entry['verdict']:12} {entry['metric'] + clock:18}"
    if entry["ratio"] is None:
        return text + " not measured"
    text += f" {entry['ratio']:.3f}"
    if "clock" in entry:
        low, high = _ends(entry["interval"])
        text += f" [{low}, {high}]  {entry['base_ms']:.4g} -> {entry['head_ms']:.4g} ms"
    else:
        text += f"  {entry['base'] / 1e6:.4g} -> {entry['head'] / 1e6:.4g} MB"
    text += f", margin {100 * entry['margin']:g} %"
    return text + (f" ({entry['note']})" if entry.get("note") else "")


def judge(report: Mapping[str, Any], inconclusive: str | None = None) -> None:
    """Nothing for a pass; otherwise raise the verdict with its exit code.

    inconclusive: `report` (exit 11), `fail` (10) or `pass`; None takes what the report was asked for.
    """
    verdict, text, whole = report["verdict"], describe(report), dict(report)
    policy = inconclusive or report.get("inconclusive", "report")
    if verdict == "pass" or (verdict == "inconclusive" and policy == "pass"):
        return
    if verdict == "fail":
        raise Regression(text + _others(report), whole)
    if verdict == "inconclusive":
        raise (Regression if policy == "fail" else Inconclusive)(text, whole, _more(report))
    rest: dict[str, type[GateVerdict]] = {
        "not_comparable": NotComparable,
        "nothing_measured": NothingMeasured,
        "device_lost": DeviceLost,
    }
    raise rest[verdict](text, whole, report.get("hint"))


def _others(report: Mapping[str, Any]) -> str:
    """What failed beside that which decided."""
    failed = [e["metric"] for e in report["metrics"] if e["blocking"] and e["verdict"] == "fail"]
    failed += [b["name"] for b in report["budgets"] if b["verdict"] == "fail"]
    others = [name for name in dict.fromkeys(failed) if name != report["metric"]]
    return f"; beyond what is allowed also: {', '.join(others)}" if others else ""


def _more(report: Mapping[str, Any]) -> str | None:
    """The hint of an open verdict."""
    predicted = report["pairs_predicted"]
    if predicted is None:
        return "raise `--max-pairs`, or quiet the machine"
    return f"about {predicted} pairs are needed at this noise: raise `--max-pairs`, or quiet the machine"
