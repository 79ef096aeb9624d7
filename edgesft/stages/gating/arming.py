"""Which number of a process a gate decides by, for each metric: from a calibration, or by default.

Chosen before anything is measured, never from the comparison itself.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgesft.core import calibrations, catalog, console
from edgesft.core.artifact import Artifact
from edgesft.core.errors import ArtifactError, UsageError
from edgesft.core.statistics import ESTIMATORS

CLOCKS = ("both", "wall", "cpu")
DEFAULT = ("median", "both")


class Refused(Exception):
    """A calibration says that this gate cannot keep its promise, or is of something else."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


class Options(Protocol):
    """What of the gate's options decides here."""

    @property
    def estimator(self) -> str: ...
    @property
    def clock(self) -> str: ...
    @property
    def calibration(self) -> str: ...
    @property
    def margin_percent(self) -> float: ...
    @property
    def max_pairs(self) -> int: ...


@dataclass(frozen=True)
class Choice:
    """The number of a process that one metric is decided by."""

    metric: str
    estimator: str
    clock: str

    def __str__(self) -> str:
        return f"{self.metric}:{self.estimator}:{self.clock}"


def parse(text: str) -> Choice:
    """A choice from `tpot:p10:cpu`. Raises UsageError."""
    parts = text.split(":")
    if len(parts) != 3 or parts[1] not in ESTIMATORS or parts[2] not in CLOCKS:
        raise UsageError(
            f"`gate.choices` has `{text}`, expected METRIC:ESTIMATOR:CLOCK",
            f"estimators: {', '.join(ESTIMATORS)}; clocks: {', '.join(CLOCKS)}",
        )
    return Choice(*parts)


def choose(
    options: Options,
    workloads: Mapping[str, Mapping[str, Any]],
    subject: Artifact,
    fingerprint: Mapping[str, Any],
    *,
    quiet: bool = False,
) -> tuple[dict[str, Choice], dict[str, Any] | None]:
    """A choice for every metric, and the calibration behind the first one, in short.

    workloads: metric -> what a process runs for it. quiet: say nothing of a calibration that is missing.
    Raises Refused for one that is of something else, broken, or not armed for the margin; ArtifactError for
    a path that does not exist.
    """
    fixed = options.estimator != "auto" or options.clock != "auto"
    plain = (
        DEFAULT[0] if options.estimator == "auto" else options.estimator,
        DEFAULT[1] if options.clock == "auto" else options.clock,
    )
    chosen = {metric: Choice(metric, *plain) for metric in workloads}
    if fixed or options.calibration == "none":
        return chosen, None
    named = None
    if options.calibration != "auto":
        named = _named(Path(options.calibration), workloads, subject, fingerprint)
    used: dict[str, dict[str, Any]] = {}
    about = catalog.runtime("devices.client").about(subject)
    for metric, workload in workloads.items():
        record = named
        if named is None or named["metric"] != metric:
            record = calibrations.find(fingerprint["id"], metric, workload, about)
        if record is None or calibrations.expired(record):
            if not quiet:
                _uncalibrated(metric, subject, record)
            continue
        why = calibrations.refusal(record, options.margin_percent, options.max_pairs)
        if why is not None:
            raise Refused(f"the calibration of `{metric}` does not arm this gate: {why}", _way_out(record))
        used[metric] = record
        chosen[metric] = Choice(metric, record["estimator"], record["clock"])
    return chosen, _short(used, workloads)


def _named(
    path: Path,
    workloads: Mapping[str, Mapping[str, Any]],
    subject: Artifact,
    fingerprint: Mapping[str, Any],
) -> dict[str, Any]:
    """The calibration at `path`, if it speaks for this device, artefact and one of the metrics."""
    if not path.exists():
        raise ArtifactError(f"the calibration `{path}` does not exist", f"edgesft calibrate {subject.ref}")
    try:
        record: dict[str, Any] = calibrations.read(path)
    except ArtifactError as error:
        raise Refused(error.message, error.hint) from None
    differ = catalog.runtime("devices.host").differences(fingerprint, record["fingerprint"])
    if differ:
        raise Refused(f"the calibration `{path}` is of another device: {differ[0]}")
    if record["metric"] not in workloads:
        asked = " and ".join(f"`{m}`" for m in workloads)
        raise Refused(f"the calibration `{path}` is of `{record['metric']}`, the gate of {asked}")
    about = catalog.runtime("devices.client").about(subject)
    for name in calibrations.CLASS:
        if record["artifact"].get(name) != about.get(name):
            raise Refused(
                f"the calibration `{path}` is of another artefact: `{name}` is"
                f" `{record['artifact'].get(name)}` there and `{about.get(name)}` here"
            )
    metric = record["metric"]
    if not calibrations.fits(record, fingerprint["id"], metric, workloads[metric], about):
        raise Refused(
            f"the calibration `{path}` is of another workload: `{record['workload']}` there and"
            f" `{dict(workloads[metric])}` here"
        )
    return record


def _uncalibrated(metric: str, subject: Artifact, record: Mapping[str, Any] | None) -> None:
    if subject.kind in ("graph", "engine") and record is None:
        return  # a foreign artefact is compared without any preparation
    state = "there is no calibration" if record is None else "the calibration has expired"
    console.warn(
        f"{state} of `{metric}` for this device and kind of artefact, error rates are assumed;"
        f" `edgesft calibrate {subject.ref}` measures them"
    )


def _way_out(record: Mapping[str, Any]) -> str:
    met = record["margin_met_percent"]
    options = "quiet the machine and calibrate again, or gate with `--calibration none`"
    return options if met is None else f"`--margin {met:g}`; or {options}"


def _short(used: Mapping[str, Mapping[str, Any]], metrics: Iterable[str]) -> dict[str, Any] | None:
    """What the report says of the calibrations: that of the first metric, and which metrics have one.

    None unless every metric has one: a gate is as sure as its weakest part.
    """
    if not used or any(m not in used for m in metrics):
        return None
    first = next(iter(used.values()))
    return {
        "made_at": first["made_at"],
        "expires_at": min(r["expires_at"] for r in used.values()),
        "digest": first.get("content"),
        "armed": True,
        "metrics": list(used),
    }
