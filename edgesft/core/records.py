"""The records that EdgeSFT writes, as types; the published JSON Schemas are made from them.

A field that may be missing is `NotRequired`; one that could not be measured is null. Producers may add
fields: readers ignore what they do not know, and a higher schema number says that a known field changed its
meaning. Field names carry their units: `_ms` milliseconds, `_bytes`, `_gbs` GB/s, `_gflops` GFLOP/s.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypeAlias

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema

# pydantic refuses the TypedDict of `typing` before Python 3.12; for readers of the types they are the same
from typing_extensions import TypedDict

from edgesft.core.errors import ArtifactError

Number: TypeAlias = float | None
Interval: TypeAlias = Annotated[list[float | None], Field(min_length=2, max_length=2)]
Outcome: TypeAlias = Literal["pass", "fail", "inconclusive"]
VerdictName: TypeAlias = Literal[
    "pass", "fail", "inconclusive", "not_comparable", "nothing_measured", "device_lost"
]
DIALECT = "https://json-schema.org/draft/2020-12/schema"


class Fingerprint(TypedDict):
    """The device. refuse: fields that must agree for two records to be compared; record: for information."""

    schema: int
    id: str
    refuse: dict[str, Any]
    record: dict[str, Any]


class Percentiles(TypedDict):
    """Percentiles with 95 % bounds. A refused one is null, and `reasons` says how many samples it needs."""

    p50: Number
    p90: NotRequired[Number]
    p95: NotRequired[Number]
    p99: NotRequired[Number]
    low: NotRequired[dict[str, Number]]
    high: NotRequired[dict[str, Number]]
    reasons: NotRequired[dict[str, str]]
    samples: NotRequired[int]


class IdleResume(TypedDict):
    """The first prompt and step after a pause, and its slowdown against the steady state."""

    seconds: float
    ttft_ms: NotRequired[Number]
    call_ms: NotRequired[Number]
    first_step_ms: NotRequired[Number]
    ratio: NotRequired[Number]
    step_ratio: NotRequired[Number]


class Loads(TypedDict):
    """Load times. cold is null where the page cache could not be emptied."""

    cold: Number
    warm: Number
    evicted: NotRequired[Number]
    reason: NotRequired[str]
    idle_resume: NotRequired[list[IdleResume]]


class ContextPoint(TypedDict):
    """Latencies at one length of the prompt."""

    prompt_tokens: int
    ttft_ms: NotRequired[Percentiles | None]
    tpot_ms: NotRequired[Percentiles | None]
    itl_ms: NotRequired[Percentiles | None]


class SweepPoint(TypedDict):
    """Latencies at one batch size or number of threads."""

    batch: NotRequired[int]
    threads: NotRequired[int]
    ttft_ms: NotRequired[Percentiles | Number]
    latency_ms: NotRequired[Percentiles | Number]
    tpot_ms: NotRequired[Percentiles | Number]
    tokens_per_second: NotRequired[Number]


class OperatorRow(TypedDict):
    """One operator (of one layer): milliseconds a step, share of the step, and what limits it."""

    operator: str
    kernel: NotRequired[str | None]
    layer: NotRequired[int | str | None]
    node_count: NotRequired[int]
    calls: NotRequired[float]
    ms: float
    share: Number
    bytes: NotRequired[Number]
    flops: NotRequired[Number]
    gbs: NotRequired[Number]
    gflops: NotRequired[Number]
    limit_share: NotRequired[Number]
    bound: NotRequired[Literal["memory", "compute"] | None]
    arithmetic: NotRequired[str | None]


class LayerRow(TypedDict):
    """One layer: milliseconds a step."""

    layer: int | str | None
    ms: float
    share: NotRequired[Number]


class TypeRow(TypedDict):
    """All nodes of one operator and kernel together: milliseconds a step."""

    operator: str
    kernel: NotRequired[str | None]
    ms: float
    share: NotRequired[Number]


class GroupRow(OperatorRow):
    """The same operator in every layer together. name: of its nodes, with a star for the layer."""

    name: str


class Operators(TypedDict):
    """Where the time of a step goes, by the runtime's own profiler: rows by layer, groups by name, types."""

    phase: str
    source: str
    steps: NotRequired[int]
    total_ms: Number
    rows: list[OperatorRow]
    groups: NotRequired[list[GroupRow]]
    layers: NotRequired[list[LayerRow]]
    types: NotRequired[list[TypeRow]]
    coverage: NotRequired[Number]
    prefill: NotRequired[dict[str, Any] | None]


class RooflineStep(TypedDict):
    """The whole decode step against the device's limits. achieved: limit / measured."""

    bytes: NotRequired[Number]
    flops: NotRequired[Number]
    limit_ms: NotRequired[Number]
    measured_ms: NotRequired[Number]
    achieved: NotRequired[Number]
    bound: NotRequired[Literal["memory", "compute"] | None]


class Roofline(TypedDict):
    """Measured limits of the device: bandwidth of copying and reading, and matrix products by data type."""

    copy_gbs: Number
    read_gbs: NotRequired[Number]
    gemm_gflops: dict[str, Number]
    source: NotRequired[str | None]
    step: NotRequired[RooflineStep | None]


class Energy(TypedDict):
    """Energy where a counter tells; `reason` says why not."""

    source: str | None
    joules_per_token: NotRequired[Number]
    watts: NotRequired[Number]
    reason: NotRequired[str | None]


class Samples(TypedDict):
    """Samples in ms behind the percentiles, and everything that each process gave."""

    ttft_ms: NotRequired[list[float]]
    tpot_ms: NotRequired[list[float]]
    latency_ms: NotRequired[list[float]]
    processes: NotRequired[list[dict[str, Any]]]


class PackedLayer(TypedDict):
    """Layers that became the same. layer: their names, the number left open; measured_us: by kind, where a
    measurement decided."""

    layer: str
    count: int
    kind: str
    pattern: str
    bits: int
    bits_per_weight: float
    weights: int
    measured_us: NotRequired[dict[str, float]]


class PackedLayers(TypedDict):
    """What an export with packed layers made of them. packed: 2:4 without its zeros; tiled: dense in the same
    tiles; dense: the runtime's own operation. graph: the one that was measured."""

    packed: int
    tiled: int
    dense: int
    bits_per_weight: float
    graph: NotRequired[str]
    rows: list[PackedLayer]


class Profile(TypedDict):
    """Latency, throughput, memory and load time of one artefact on one device (`edgesft profile`).

    itl_ms, and tpot_ms with the same samples: over single gaps between tokens; request_tpot_ms: over the
    means of prompts.
    """

    schema: Literal[2]
    kind: str
    ttft_ms: NotRequired[Percentiles]
    tpot_ms: NotRequired[Percentiles]
    itl_ms: NotRequired[Percentiles]
    request_tpot_ms: NotRequired[Percentiles]
    latency_ms: NotRequired[Percentiles]
    tokens_per_second: NotRequired[Number]
    calls_per_second: NotRequired[Number]
    end_to_end: NotRequired[dict[str, Any] | None]
    load_ms: Loads
    peak_memory_bytes: Number
    memory: NotRequired[dict[str, Any]]
    artifact_bytes: float
    quantize: NotRequired[str | None]
    pattern: NotRequired[str | None]
    density: NotRequired[Number]
    layers: NotRequired[PackedLayers | None]
    threads: NotRequired[int]
    workload: dict[str, Any]
    warmup: NotRequired[dict[str, Any]]
    notes: list[str]
    contexts: NotRequired[list[ContextPoint]]
    batches: NotRequired[list[SweepPoint]]
    threads_sweep: NotRequired[list[SweepPoint]]
    operators: NotRequired[Operators | None]
    roofline: NotRequired[Roofline | None]
    energy: NotRequired[Energy | None]
    clocks: NotRequired[dict[str, Any] | None]
    throttled: NotRequired[dict[str, Any] | None]
    fingerprint: Fingerprint
    samples: NotRequired[Samples]


class Side(TypedDict):
    """One side of a comparison. ref: what the user typed."""

    ref: str
    kind: str
    digest: str
    bytes: float
    quantize: NotRequired[str | None]
    pattern: NotRequired[str | None]
    density: NotRequired[Number]


class Look(TypedDict):
    """One interim analysis: exact p values of a regression and of its absence after n pairs."""

    n: int
    decision: str
    clock: NotRequired[str]
    metric: NotRequired[str]
    p_regression: NotRequired[Number]
    p_beyond: NotRequired[Number]
    p_noninferior: NotRequired[Number]
    hodges_lehmann: NotRequired[Number]


class MetricEntry(TypedDict):
    """One metric of a gate, by one clock where it is a time. ratio: head / base."""

    metric: str
    verdict: Outcome | VerdictName
    blocking: bool
    ratio: Number
    clock: NotRequired[str]
    margin: NotRequired[Number]
    interval: NotRequired[Interval | None]
    level: NotRequired[Number]
    pairs: NotRequired[int]
    noise: NotRequired[Number]
    detectable: NotRequired[Number]
    pairs_predicted: NotRequired[int | None]
    base_ms: NotRequired[Number]
    head_ms: NotRequired[Number]
    base: NotRequired[Number]
    head: NotRequired[Number]
    faster: NotRequired[bool]
    note: NotRequired[str | None]


class BudgetEntry(TypedDict):
    """One absolute limit: value with its confidence bounds against `limit`, in `unit`. least: a minimum."""

    name: str
    unit: str
    limit: float
    value: Number
    low: NotRequired[Number]
    high: NotRequired[Number]
    level: NotRequired[Number]
    verdict: Outcome
    least: NotRequired[bool]
    reason: NotRequired[str | None]


class CalibrationUsed(TypedDict):
    """The calibration that a gate took its estimator and clock from."""

    made_at: str
    expires_at: str
    digest: NotRequired[str | None]
    armed: bool


class Discarded(TypedDict):
    """A pair that did not count; the reason is telemetry or the warm-up, never the ratio."""

    pair: int
    why: str


class Verdict(TypedDict):
    """Whether head is slower than base on one device (`edgesft gate`). Ratios are head / base.

    metric, ratio, interval and the like repeat the entry of `metrics` that decided.
    """

    schema: Literal[2]
    verdict: VerdictName
    error: NotRequired[str | None]
    hint: NotRequired[str | None]
    metric: str | None
    ratio: Number
    interval: Interval | None
    level: NotRequired[Number]
    pairs: int
    noise: NotRequired[Number]
    detectable: NotRequired[Number]
    pairs_predicted: NotRequired[int | None]
    estimator: NotRequired[str | None]
    clock: NotRequired[str | None]
    decided_by: NotRequired[str | None]
    looks: NotRequired[list[Look]]
    margins: NotRequired[dict[str, Number]]
    errors: NotRequired[dict[str, Any]]
    inconclusive: NotRequired[Literal["report", "fail", "pass"]]
    drill_slowdown: NotRequired[float]
    discarded: NotRequired[list[Discarded]]
    base: Side | None
    head: Side
    workload: NotRequired[dict[str, Any]]
    fingerprint: Fingerprint
    calibration: NotRequired[CalibrationUsed | None]
    metrics: list[MetricEntry]
    budgets: NotRequired[list[BudgetEntry]]
    raw: NotRequired[list[dict[str, Any]]]


class FalseAlarm(TypedDict):
    """Share of gates of an artefact against itself that failed, and the upper bound on it."""

    rate: float
    high: NotRequired[Number]


class Candidate(TypedDict):
    """One estimator by one clock, as the calibration saw it."""

    estimator: str
    clock: str
    noise: Number
    false_alarm: NotRequired[FalseAlarm | Number]
    detection: NotRequired[dict[str, Number]]
    pairs_mean: NotRequired[Number]


class Calibration(TypedDict):
    """What a gate can promise on one device for one kind of artefact (`edgesft calibrate`).

    detection: slowdown in per cent -> share of gates that found it. Times are ISO 8601 in UTC.
    """

    schema: Literal[1]
    armed: bool
    why: str | None
    metric: str
    estimator: str
    clock: str
    margin_percent: float
    tolerance_percent: NotRequired[float]
    alpha: NotRequired[float]
    beta: NotRequired[float]
    max_pairs: NotRequired[int]
    false_alarm: FalseAlarm
    detection: dict[str, Number]
    pass_rate: NotRequired[Number]
    inconclusive: NotRequired[Number]
    pairs_mean: NotRequired[Number]
    pairs_predicted: NotRequired[int | None]
    noise: Number
    mde_percent: NotRequired[Number]
    margin_met_percent: NotRequired[Number]
    candidates: NotRequired[list[Candidate]]
    processes: int
    level_ms: NotRequired[Number]
    workload: dict[str, Any]
    fingerprint: Fingerprint
    artifact: Side
    made_at: str
    expires_at: str
    seed: NotRequired[int]
    samples: NotRequired[dict[str, Any]]


class Measured(TypedDict):
    """One metric of a baseline: the median of one number a process, and their range or bounds."""

    value: float
    low: Number
    high: Number
    processes: list[float]
    exact: bool


class Baseline(TypedDict):
    """One entry of a baseline folder: a record without its samples. sha256: over the rest of the entry.

    digest: of the artefact that it was taken from. primary: the metric that it is about.
    """

    schema: Literal[1]
    name: str
    label: str | None
    added_at: str
    sha256: str
    kind: str
    digest: str
    estimator: str
    primary: str
    workload: dict[str, Any]
    metrics: dict[str, Measured]
    record: dict[str, Any]
    fingerprint: Fingerprint


class Range(TypedDict):
    """The ends of a predicted range; null where nothing bounds it."""

    low: Number
    high: Number


class PredictedTimes(TypedDict):
    """Predicted times of one power mode."""

    ttft_ms: NotRequired[Range]
    tpot_ms: NotRequired[Range]
    tpot_full_context_ms: NotRequired[Range]
    latency_ms: NotRequired[Range]
    tokens_per_second: NotRequired[Range]


class PredictedDevice(TypedDict):
    """A device of the catalogue, in one of its power modes."""

    id: str
    name: str
    kind: str
    mode: str | None


class PredictedFit(TypedDict):
    """Whether weights, cache and runtime find room in the device's memory."""

    verdict: Literal["fits", "tight", "does not fit"]
    context: int
    needed_bytes: Range
    available_bytes: Range


class PredictedSparse(PredictedTimes):
    """What 2:4 kernels would bring, or why nothing."""

    gain: bool
    reason: str


class Prediction(PredictedTimes):
    """Latency ranges out of a device's data sheet: predicted, not measured (`edgesft devices show`)."""

    schema: Literal[1]
    predicted: Literal[True]
    device: PredictedDevice
    prompt_tokens: int
    context: int
    fit: PredictedFit
    modes: dict[str, PredictedTimes]
    sparse24: PredictedSparse
    assumptions: list[str]
    artifact: NotRequired[Side]
    shape: NotRequired[dict[str, Any]]


class TrendPoint(TypedDict):
    """One entry of a series."""

    name: str
    value: Number
    added_at: NotRequired[str | None]
    label: NotRequired[str | None]
    low: NotRequired[Number]
    high: NotRequired[Number]


class TrendChange(TypedDict):
    """A change point: the level from point `index` on is `after`; it was `before`."""

    index: int
    before: NotRequired[Number]
    after: NotRequired[Number]
    ratio: NotRequired[Number]


class Trend(TypedDict):
    """A metric over the entries of a baseline folder, with its change points.

    noise: from point to point, as a fraction; drift: per cent over the series where a line explains it best.
    """

    schema: Literal[1]
    name: NotRequired[str]
    metric: str
    unit: str
    points: list[TrendPoint]
    changes: list[TrendChange]
    noise: NotRequired[Number]
    drift: NotRequired[Number]
    left_out: NotRequired[int]


class FindingRecord(TypedDict):
    """One check in a report: what was judged, how it came out, and why."""

    run: str
    check: str
    name: str
    outcome: Literal["pass", "fail", "inconclusive", "error", "refused", "note"]
    message: str
    value: NotRequired[Number]
    unit: NotRequired[str | None]


class ReportRun(TypedDict):
    """One record of a report. path: its file, relative to where the report was asked for."""

    name: str
    kind: str
    path: str
    record: dict[str, Any]


class Report(TypedDict):
    """Several records in one document (`edgesft report --format json`)."""

    schema: Literal[1]
    kind: Literal["report"]
    edgesft: str
    runs: list[ReportRun]
    findings: list[FindingRecord]


RECORDS: dict[str, tuple[Any, int]] = {
    "profile": (Profile, 2),
    "verdict": (Verdict, 2),
    "calibration": (Calibration, 1),
    "baseline": (Baseline, 1),
    "prediction": (Prediction, 1),
    "trend": (Trend, 1),
    "report": (Report, 1),
}


class _Plain(GenerateJsonSchema):
    """Without a title for every field, which repeats its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ANN401 - pydantic's own type is private
        return False


@functools.cache
def _adapter(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(RECORDS[name][0])


def json_schema(name: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a record of `RECORDS`, with `$id`, title and version."""
    made = _adapter(name).json_schema(schema_generator=_Plain)
    version = RECORDS[name][1]
    head = {
        "$schema": DIALECT,
        "$id": f"urn:edgesft:schema:{name}:{version}",
        "title": f"EdgeSFT {name}",
        "version": version,
    }
    return {**head, **{k: v for k, v in made.items() if k != "title"}}


def schema_text(name: str) -> str:
    """The file of the schema, as it is published."""
    return json.dumps(json_schema(name), indent=2) + "\n"


def write_schemas(folder: Path) -> list[Path]:
    """Write `<name>.schema.json` of every record into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name in RECORDS:
        file = folder / f"{name}.schema.json"
        file.write_text(schema_text(name), encoding="utf-8")
        written.append(file)
    return written


def check(name: str, record: Mapping[str, Any], where: Path) -> None:
    """Raise ArtifactError if `record`, read from the file `where`, is not a record `name` of our schema."""
    version, got = RECORDS[name][1], record.get("schema")
    if got != version:
        newer = isinstance(got, int) and got > version
        raise ArtifactError(
            f"`{where}` is a {name} of schema {got}, this EdgeSFT reads schema {version}",
            "pip install --upgrade edgesft" if newer else f"make the {name} again with this version",
        )
    why = problem(name, record)
    if why is not None:
        raise ArtifactError(f"`{where}` is not a {name}: {why}")


def problem(name: str, record: Mapping[str, Any]) -> str | None:
    """The first field of `record` that a record `name` would not have like this; None if it is one."""
    try:
        _adapter(name).validate_python(dict(record), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        return f"`{'.'.join(str(p) for p in first['loc'])}`: {first['msg']}"
    return None
