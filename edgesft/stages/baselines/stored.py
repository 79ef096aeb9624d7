"""An entry of a baseline: what is kept of a measurement, and its file.

The file is JSON with sorted keys, one value a line; `sha256` is that of the rest. An entry that is not what
it says it is, or of a newer schema, is read as broken, with the reason: the caller decides what that means.
"""

import json
import statistics as plain
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from edgesft.core import artifact, catalog
from edgesft.core.artifact import Artifact
from edgesft.core.errors import ArtifactError
from edgesft.core.records import Measured, problem

SCHEMA = 1
LARGE = 1 << 24  # bytes of an entry, at most
# Smaller is better for all of them. `_cpu`: by processor time.
UNITS = {
    **{f"{m}{t}{c}": "ms" for m in ("tpot", "ttft", "latency") for t in ("", "_p95") for c in ("", "_cpu")},
    **{f"{m}_{p}": "ms" for m in ("tpot", "ttft", "latency") for p in ("p90", "p99")},
    "load_cold": "ms",
    "load_warm": "ms",
    "peak_memory": "bytes",
    "size": "bytes",
    "energy": "J/token",
}
DROPPED = ("samples", "raw", "operators", "looks", "fingerprint", "workload", "schema")


@dataclass(frozen=True)
class Entry:
    """An entry as it was read. broken: why it cannot be used, and then `content` is empty."""

    name: str
    file: Path
    content: Mapping[str, Any] = field(default_factory=dict)
    broken: str | None = None

    @property
    def added_at(self) -> datetime:
        """When it was added; of a whole entry only."""
        return datetime.fromisoformat(self.content["added_at"])


def read(file: Path, name: str) -> Entry:
    """The entry of the series `name` in `file`, broken ones included. Nothing is raised for its content."""
    try:
        return Entry(name, file, _checked(file, name))
    except ArtifactError as error:
        return Entry(name, file, broken=error.message)


def _checked(file: Path, name: str) -> dict[str, Any]:
    try:
        if file.is_symlink() or not file.is_file():
            raise ArtifactError("it is not a plain file")
        if file.stat().st_size > LARGE:
            raise ArtifactError(f"it has {file.stat().st_size} bytes, expected {LARGE} at most")
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise ArtifactError("it is not readable JSON") from None
    schema = found.get("schema") if isinstance(found, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise ArtifactError(f"it is of schema {schema}, this EdgeSFT reads schema {SCHEMA}")
    if not isinstance(found, dict) or schema != SCHEMA:
        raise ArtifactError("it is not an entry of a baseline")
    if digest(found) != found.get("sha256"):
        raise ArtifactError("it was altered: its SHA-256 is not the one in it")
    why = problem("baseline", found)
    if why is not None:
        raise ArtifactError(why)
    try:
        added = datetime.fromisoformat(found["added_at"])
    except ValueError:
        raise ArtifactError(f"`added_at` is `{found['added_at']}`, expected ISO 8601") from None
    if added.tzinfo is None:
        raise ArtifactError(f"`added_at` is `{found['added_at']}`, without a time zone")
    wrong = [m for m, v in found["metrics"].items() if m not in UNITS or not _positive(v)]
    if wrong or found["primary"] not in found["metrics"]:
        raise ArtifactError(f"`metrics.{(wrong or [found['primary']])[0]}` is not a measurement")
    if found["name"] != name:
        raise ArtifactError(f"it belongs to the baseline `{found['name']}`")
    return found


def _positive(measured: Mapping[str, Any]) -> bool:
    return all(0 < v < float("inf") for v in (measured["value"], *measured["processes"]))


def digest(content: Mapping[str, Any]) -> str:
    """`sha256:...` of an entry without that field."""
    return artifact.digest_json({k: v for k, v in content.items() if k != "sha256"})


def write(file: Path, content: Mapping[str, Any]) -> None:
    """Write an entry whole or not at all."""
    pure = json.loads(json.dumps({**content, "schema": SCHEMA}, default=str))
    text = json.dumps({**pure, "sha256": digest(pure)}, indent=1, sort_keys=True)
    artifact.write_bytes(file, (text + "\n").encode())


def content(source: Artifact) -> dict[str, Any]:
    """What an entry keeps of an artefact of kind `profile` or `verdict`; name, label and time come on top.

    Raises ArtifactError if nothing was measured, or if the head was slowed on purpose.
    """
    try:
        kept = _content(source)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ArtifactError(f"`{source.ref}` is not a whole {source.kind}: {error!r}") from None
    if kept["primary"] not in kept["metrics"]:
        raise ArtifactError(f"`{source.ref}` measured nothing")
    return kept


def _content(source: Artifact) -> dict[str, Any]:
    if source.kind == "verdict":
        from edgesft.stages.gating import verdict

        record = verdict.load_report(source.path / verdict.REPORT)
        if record.get("drill_slowdown"):
            raise ArtifactError(f"`{source.ref}` is a drill: its head was slowed on purpose")
        metrics, estimator, primary = _of_verdict(record), str(record["estimator"]), str(record["metric"])
    else:
        from edgesft.stages import profile

        record = profile.load(source)
        metrics, estimator = _of_profile(record), "median"
        primary = "tpot" if "tpot" in metrics else "latency"
    workload = {**record["workload"], "threads": record["fingerprint"]["refuse"].get("threads")}
    return {
        "kind": source.kind,
        "digest": source.digest,
        "estimator": estimator,
        "primary": primary,
        "workload": workload,
        "metrics": {m: metrics[m] for m in UNITS if m in metrics},
        "record": {k: v for k, v in record.items() if k not in DROPPED},
        "fingerprint": record["fingerprint"],
    }


def _measured(processes: Sequence[float | None]) -> Measured | None:
    """One number a process -> their median and range; None without any."""
    found = [float(v) for v in processes if v]
    if not found:
        return None
    return {
        "value": plain.median(found),
        "low": min(found),
        "high": max(found),
        "processes": found,
        "exact": False,
    }


def _single(value: float | None, low: float | None = None, high: float | None = None) -> Measured | None:
    """A number that no process has for itself: nothing bounds its ratio to another one."""
    if not value:
        return None
    return {"value": float(value), "low": low, "high": high, "processes": [], "exact": False}


def _exact(value: float) -> Measured:
    return {"value": float(value), "low": None, "high": None, "processes": [], "exact": True}


def _of_profile(record: Mapping[str, Any]) -> dict[str, Measured]:
    """The metrics of a profile: of every process the median after its warm-up, and tails of all together."""
    timings = catalog.runtime("devices.client").timings
    processes = record["samples"]["processes"]
    found: dict[str, Measured | None] = {}
    for metric in ("tpot", "ttft") if record["kind"] == "decoder" else ("latency",):
        estimates = []
        for each in processes:
            samples, warm = timings([_nanoseconds(r) for r in each["repetitions"]], metric)
            kept = samples[warm.cut :]
            estimates.append(plain.median(kept) if kept else None)
        found[metric] = _measured(estimates)
        table = record[f"{metric}_ms"]
        for tail in ("p90", "p99"):
            bounds = (table[side].get(tail) for side in ("low", "high"))
            found[f"{metric}_{tail}"] = _single(table.get(tail), *bounds)
    loads, energy = record["load_ms"], record.get("energy") or {}
    found |= {
        "load_cold": _single(loads["cold"]),
        "load_warm": _measured([p["load_ms"] for p in processes]),
        "peak_memory": _measured([p["peak_bytes"] for p in processes]),
        "size": _exact(record["artifact_bytes"]),
        "energy": _single(energy.get("joules_per_token")),
    }
    return {name: value for name, value in found.items() if value is not None}


def _nanoseconds(repetition: Mapping[str, Any]) -> dict[str, Any]:
    """A repetition as the worker gave it, out of the milliseconds that a profile keeps."""
    return {
        k.removesuffix("_ms") + "_ns": [x * 1e6 for x in v] if isinstance(v, list) else v * 1e6
        for k, v in repetition.items()
        if k.endswith("_ms")
    }


def _of_verdict(report: Mapping[str, Any]) -> dict[str, Measured]:
    """The metrics of a gate's head, one number a process by the gate's own estimator."""
    heads = [p["head"] for p in report["raw"] if p["discarded"] is None]
    if not heads:
        return {}
    found: dict[str, Measured | None] = {}
    for metric, clocks in heads[0]["value"].items():
        for clock in clocks:
            name = metric if clock == "wall" else f"{metric}_{clock}"
            if name in UNITS:
                found[name] = _measured([h["value"][metric][clock] for h in heads])
        if metric not in found:  # measured by processor time alone
            found[metric] = found.get(f"{metric}_cpu")
    found["load_warm"] = _measured([h.get("load_ms") for h in heads])
    found["peak_memory"] = _measured([h.get("peak_bytes") for h in heads])
    found["size"] = _exact(report["head"]["bytes"])
    return {name: value for name, value in found.items() if value is not None}
