"""calibrate: one artefact, many processes -> what a gate can promise on this device, and by which number.

Nothing is compared: all processes run the same thing, so that whatever differs is this machine. The number
that a process is reduced to is chosen here, once and without a regression in sight, never in a comparison.
A machine on which the promise cannot be kept is told so, with the margin that it could keep.
"""

import dataclasses
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgesft.core import artifact, calibrations, catalog, console, stage
from edgesft.core.artifact import Artifact, Workdir
from edgesft.core.calibrations import FILE
from edgesft.core.errors import ArtifactError, CheckFailed, DeviceError, UsageError
from edgesft.core.journal import Journal
from edgesft.core.params import Count, Length, Seed, validate
from edgesft.stages import profile
from edgesft.stages.gating.pairs import ABSENT, CLOCKS, REDO, SETTLED, TRIES, enough_calls, resolve
from edgesft.stages.gating.session import PROBE_CALLS, alone, metrics_of
from edgesft.stages.gating.verdict import DeviceLost, NothingMeasured
from edgesft.stages.profile import Threads

__all__ = ["Calibrate", "brief", "calibrate", "judge", "load", "resolve"]

STALE = 86_400.0  # seconds after which an interrupted calibration is not worth going on with
Percent = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class Calibrate:
    """Options of the stage; margins, risks and workload mean what they mean to `gate`.

    processes: how many are run; 96 make 48 pairs, as many as a gate may take. relabelings: gates played with
    them. metric: `auto` is tpot of what generates tokens, latency of anything else. shapes: of the inputs of
    a foreign graph, by name. days: how long the result holds. timeout: seconds after which the first process
    counts as hung.
    """

    name: ClassVar[str] = "calibrate"
    gives: ClassVar[str] = "calibration"

    processes: Annotated[int, Field(ge=24, le=10_000)] = 96
    metric: Literal["auto", "tpot", "ttft", "latency"] = "auto"
    margin_percent: Percent = 5.0
    tolerance_percent: Percent = 2.0
    alpha: Share = 0.01
    beta: Share = 0.05
    max_pairs: Annotated[int, Field(ge=8, le=1000)] = 48
    prompt_tokens: Length = 64
    decode_tokens: Length = 32
    repetitions: Count = 2
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    threads: Threads = 0
    seed: Seed = 0
    relabelings: Annotated[int, Field(ge=1000, le=1_000_000)] = 10_000
    days: Annotated[float, Field(gt=0, le=3650)] = calibrations.DAYS
    timeout: Annotated[float, Field(gt=0)] = 300.0

    def __post_init__(self) -> None:
        if self.tolerance_percent >= self.margin_percent:
            raise UsageError(
                f"`calibrate.tolerance_percent` is {self.tolerance_percent}, expected less than"
                f" `margin_percent`, which is {self.margin_percent}"
            )

    @classmethod
    def from_recipe(cls, table: Mapping[str, Any]) -> "Calibrate":
        """From a `[calibrate]` table. Raises UsageError."""
        return validate(cls, table, "calibrate")

    def params(self) -> dict[str, Any]:
        """Everything that decides the result, the device included."""
        values = dataclasses.asdict(self)
        for name in ("timeout", "threads"):
            del values[name]
        return {**values, "device": profile.device(self.threads)["refuse"]}

    def workload(self, metric: str) -> dict[str, Any]:
        """What a gate by this metric alone asks of a process."""
        return alone(metric, self.prompt_tokens, self.decode_tokens, self.repetitions, self.shapes)

    def problems(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """Reasons why it cannot run."""
        return profile.problems(inputs["artifact"], self.prompt_tokens + self.decode_tokens)

    def run(self, inputs: Mapping[str, Artifact], work: Workdir) -> dict[str, Any]:
        """Measure the processes, play the gates; write calibration.json.

        Returns the record without its samples. A machine that cannot keep the promise is a result too
        (`judge` turns it into an exit code). Raises NothingMeasured, DeviceLost, DeviceError.
        """
        record = calibrations.seal(_Session(self, inputs["artifact"], work).run())
        artifact.write_json(work.path / FILE, record)
        return {k: v for k, v in record.items() if k not in ("samples", "content")}


class _Session:
    """One calibration while it runs: the artefact and its processes so far."""

    def __init__(self, options: Calibrate, model: Artifact, work: Workdir) -> None:
        self.options, self.model, self.work = options, model, work
        self.client, self.host = catalog.runtime("devices.client"), catalog.runtime("devices.host")
        self.fingerprint = profile.device(options.threads)
        self.file = work.checkpoint / "processes.jsonl"
        self.journal = Journal(self.file)
        self.timeout = options.timeout
        self.metric = "tpot" if options.metric == "auto" else options.metric
        self.workload = self.asked = self._workload()

    def _workload(self) -> dict[str, Any]:
        return self.options.workload(self.metric)

    def run(self) -> dict[str, Any]:
        """The record, not sealed yet."""
        try:
            self._probe()
            with console.progress("calibrate", self.options.processes, len(self.counted)) as bar:
                while len(self.counted) < self.options.processes:
                    before = len(self.counted)
                    self._add()
                    bar.advance(len(self.counted) - before)
        finally:
            self.journal.close()
            if not self.journal.records:  # nothing to go on from
                self.file.unlink()
        self._unaltered()
        for process in self.journal.records:
            self.work.log(process)
        return self._record()

    def _unaltered(self) -> None:
        """Raise ArtifactError if the artefact is no longer what it was at the start."""
        model = self.model
        if model.manifest.get("files"):
            artifact.check_files(model.path, model.manifest)
        elif resolve(model.path).digest != model.digest:
            raise ArtifactError(f"`{model.ref}` was altered while it was measured", "calibrate again")

    @property
    def counted(self) -> list[dict[str, Any]]:
        """Processes that were not thrown away."""
        return [p for p in self.journal.records if p["discarded"] is None]

    def _probe(self) -> None:
        """Run once uncounted: caches get warm, and what cannot run is found out first."""
        light = self.model.kind in ("graph", "engine")
        self.asked = {**self.workload, "prefills": PROBE_CALLS if light else 0}
        probe = self._measure(-1)
        generates = probe["loaded"]["kind"] == "decoder"
        if self.options.metric != "auto" and generates != (self.metric != "latency"):
            known = "`tpot` or `ttft`" if generates else "`latency`"
            what = "generates tokens" if generates else "generates no tokens"
            raise UsageError(
                f"`calibrate.metric` is `{self.metric}`, but `{self.model.ref}` {what}: expected {known}"
            )
        if not generates:
            self.metric = "latency"
        self.workload = self.asked = self._workload()
        if not generates:  # a process makes as many calls as it would in a gate
            calls = max(self.workload["repetitions"], enough_calls([probe]))
            self.asked = {**self.workload, "repetitions": calls}
        self.timeout = min(self.timeout, max(60.0, 20 * probe["wall_s"]))

    def _measure(self, number: int) -> dict[str, Any]:
        """One process, asked as a gate asks it; two neighbours get the same prompts, as the sides of a pair.

        Raises DeviceLost at once where the process was killed or hung, NothingMeasured or DeviceLost after
        the last try where it failed.
        """
        asked = self.client.request(
            self.model,
            threads=self.fingerprint["refuse"]["threads"],
            workload=self.asked,
            seed=[self.options.seed, number // 2 + 1],
            slowdown=0.0,
            clock=CLOCKS["both"][0],
            until_steady=number >= 0,
            shapes={k: list(v) for k, v in self.options.shapes.items()} or None,
        )
        for left in reversed(range(TRIES)):
            try:
                found: dict[str, Any] = self.client.measure(asked, self.timeout)
                return found
            except self.client.WorkerFailed as error:
                if not left:
                    raise self._lost(error) from None
                console.warn(f"a process failed and is tried again: {error.message}")
            except DeviceError as error:
                raise self._lost(error) from None
        raise AssertionError("unreachable")

    def _lost(self, error: DeviceError) -> DeviceLost | NothingMeasured:
        done = len(self.counted)
        if not done:
            why = f"`{self.model.ref}` could not be run: {error.message}"
            return NothingMeasured(why, {}, error.hint)
        why = f"lost after {done} of {self.options.processes} processes: {error.message}"
        return DeviceLost(why, {}, "the processes so far are kept, and the same command goes on")

    def _add(self) -> None:
        """Measure one process and append it to the checkpoint."""
        number = len(self.journal.records)
        before = self.host.telemetry()
        process = {"process": number, **self._reduce(self._measure(number))}
        held_back = self.host.held_back(before, self.host.telemetry())
        changed = self.host.differences(self.fingerprint, profile.device(self.options.threads))
        why = changed[0] if changed else held_back
        if why is None and not process["steady"]:
            why = "no steady state"
        thrown = sum(p["discarded"] is not None for p in self.journal.records)
        if thrown >= REDO * self.options.processes:
            if changed:
                raise DeviceError(
                    f"this machine changed during the calibration: {changed[0]}",
                    "fix the power mode, the governor and the limits of the container, then calibrate again",
                )
            why = None
        self.journal.append({**process, "discarded": why})

    def _reduce(self, measured: Mapping[str, Any]) -> dict[str, Any]:
        """One process by every clock and estimator, as a gate with these options would reduce it."""
        from edgesft.core import statistics

        found = {c: self.client.timings(measured["repetitions"], self.metric, c) for c in CLOCKS["both"]}
        first = found[CLOCKS["both"][0]]
        values = {}
        for option, clocks in CLOCKS.items():
            cut = found[clocks[0]][1].cut
            values[option] = {
                c: {e: statistics.estimate(found[c][0][cut:], e) for e in statistics.ESTIMATORS}
                for c in clocks
            }
        return {
            "values": values,
            "steady": first[1].steady or len(first[0]) < SETTLED,
            "samples_ms": {c: [round(t, 4) for t in times] for c, (times, _) in found.items()},
            "wall_s": measured["wall_s"],
        }

    def _record(self) -> dict[str, Any]:
        import numpy as np

        from edgesft.core import statistics
        from edgesft.core.statistics import relabel, sequential

        options, counted = self.options, self.counted
        values = {
            option: {
                c: {e: [p["values"][option][c][e] for p in counted] for e in statistics.ESTIMATORS}
                for c in clocks
            }
            for option, clocks in CLOCKS.items()
        }
        rule = sequential.Rule(
            margin=options.margin_percent / 100,
            tolerance=options.tolerance_percent / 100,
            alpha=options.alpha,
            beta=options.beta,
            max_pairs=options.max_pairs,
        )
        console.say(f"playing {options.relabelings} gates with {len(counted)} processes")
        rng = np.random.default_rng([options.seed, 2])
        ways = [w for w in relabel.candidates(values) if w.clock == "wall" or not _absent(values)]
        if not ways:
            raise DeviceError("nothing was measured: by every clock of this machine a step takes no time")
        found = relabel.evaluate(ways, rule, options.relabelings, rng)
        shown = "cpu" if found["clock"] == "cpu" else "wall"
        discarded = [p for p in self.journal.records if p["discarded"] is not None]
        record: dict[str, Any] = {
            **found,
            "metric": self.metric,
            **{k: getattr(options, k) for k in ("margin_percent", "tolerance_percent", "alpha", "beta")},
            "max_pairs": options.max_pairs,
            "relabelings": options.relabelings,
            "processes": len(counted),
            "level_ms": float(np.median(values[found["clock"]][shown][found["estimator"]])),
            "workload": self.workload,
            "repetitions": self.asked["repetitions"],
            "fingerprint": self.fingerprint,
            "artifact": self.client.about(self.model),
            **calibrations.dates(datetime.now(UTC), options.days),
            "seed": options.seed,
            "discarded": [{"process": p["process"], "why": p["discarded"]} for p in discarded],
            "samples": {"values_ms": values},
        }
        return {**record, "why": reason(record)}


def _absent(values: Mapping[str, Any]) -> bool:
    """Whether the calling thread mostly slept: another processor worked, of which its time says nothing."""
    cpu, wall = (sum(values["both"][c]["median"]) for c in ("cpu", "wall"))
    return bool(cpu < ABSENT * wall)


def reason(record: Mapping[str, Any]) -> str:
    """The result in one sentence: what is promised, or what cannot be and what could."""
    margin = record["margin_percent"]
    found = record["detection"][f"{margin:g}"]
    alarms = record["false_alarm"]["rate"]
    by = f"the {record['estimator']} by {_clock(record['clock'])}"
    if record["armed"]:
        text = (
            f"{by}: {100 * found:.1f} % of slowdowns by {margin:g} % found, {100 * alarms:.2f} % false"
            f" alarms, {record['pairs_mean']:.0f} pairs on average"
        )
        if record["clock"] == "cpu":
            text += "; wall time is too noisy here, and processor time does not see waiting: for a core, a"
            text += " lock, a disk, another thread or a GPU"
        return text
    if alarms > record["alpha"]:
        fault = f"{100 * alarms:.1f} % false alarms, at most {100 * record['alpha']:g} % expected"
    else:
        fault = (
            f"{100 * found:.0f} % of slowdowns by {margin:g} % found within {record['max_pairs']} pairs,"
            f" {100 * (1 - record['beta']):g} % expected"
        )
    met = record["margin_met_percent"]
    could = "no margin up to 50 % can be kept" if met is None else f"a margin of {met:g} % can be kept"
    return f"{by}, the best here, gives {fault}; {could}"


def _clock(clock: str) -> str:
    return {"both": "wall and processor time", "wall": "wall time", "cpu": "processor time"}[clock]


def calibrate(
    ref: str | Path,
    *,
    out: Path | None = None,
    if_needed: bool = False,
    **options: Any,  # noqa: ANN401 - checked against the fields of `Calibrate`
) -> dict[str, Any]:
    """Calibrate this device with an artefact and keep the record in the store, armed or not.

    options: fields of `Calibrate`. out: keep it there too, samples included. if_needed: return what the store
    has, if that answers for a gate of this margin here and now. Either way an interrupted run is gone on with
    by the same command. Raises ArtifactError, UsageError, and what `Calibrate.run` raises.
    """
    chosen = Calibrate.from_recipe(options)
    inputs = {"artifact": resolve(ref)}
    kept = _kept(chosen, inputs["artifact"]) if if_needed else None
    if kept is not None:
        console.say(f"calibrated on {kept['made_at']}, holds until {kept['expires_at']}")
        return kept
    if out is not None:
        record = load(stage.execute(chosen, inputs, out)[0])
        if calibrations.expired(record):
            raise ArtifactError(
                f"`{out}` holds a calibration that expired on {record['expires_at']}",
                "choose another `-o` or remove it",
            )
        calibrations.save(record)
        return record
    request = stage.request(chosen, inputs)
    scratch = _scratch() / request.digest.removeprefix("sha256:")[:16]
    record = load(stage.execute(chosen, inputs, scratch)[0])
    calibrations.save(record)
    shutil.rmtree(scratch, ignore_errors=True)
    return record


def _kept(options: Calibrate, model: Artifact) -> dict[str, Any] | None:
    """The calibration in the store that answers for such a gate on this device, if there is one.

    One that arms nothing answers too, for its own margin: asking again does not quiet the machine.
    """
    metric = metrics_of(model, ("tpot",))[0] if options.metric == "auto" else options.metric
    found = calibrations.find(
        profile.device(options.threads)["id"],
        metric,
        options.workload(metric),
        profile.about(model),
    )
    if found is None or calibrations.expired(found):
        return None
    same = found["margin_percent"] == options.margin_percent and found["max_pairs"] == options.max_pairs
    answers = same or calibrations.refusal(found, options.margin_percent, options.max_pairs) is None
    return found if answers else None


def _scratch() -> Path:
    """Where runs without `-o` are kept until they are done; what was left there long ago is removed."""
    home = calibrations.folder() / ".unfinished"
    for left in home.glob("*"):
        newest = max((p.stat().st_mtime for p in left.rglob("*.jsonl")), default=left.stat().st_mtime)
        if time.time() - newest > STALE:
            shutil.rmtree(left, ignore_errors=True)
    return home


def load(made: Artifact) -> dict[str, Any]:
    """The whole record in an artefact of kind `calibration`. Raises ArtifactError."""
    return calibrations.read(made.path / FILE)


def judge(record: Mapping[str, Any]) -> None:
    """Nothing for a machine that keeps the promise; otherwise CheckFailed with the margin it could keep."""
    if record["armed"]:
        return
    met, ref = record["margin_met_percent"], record["artifact"]["ref"]
    quiet = "quiet the machine and calibrate again"
    hint = quiet if met is None else f"edgesft calibrate {ref} --margin {met:g}, and gate with it; or {quiet}"
    raise CheckFailed(
        f"no gate at {record['margin_percent']:g} % is armed on this machine: {record['why']}", hint
    )


def brief(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a person reads first."""
    found = record["detection"]
    margin = f"{record['margin_percent']:g}"
    rows = {
        f"{c['estimator']}, {_clock(c['clock'])}": f"noise {100 * c['noise']:.2f} %, finds "
        f"{100 * c['detection'][margin]:.1f} %, {c['pairs_mean']:.0f} pairs"
        for c in record["candidates"]
    }
    return {
        "armed": record["armed"],
        "why": record["why"],
        "metric": f"{record['metric']}, {record['level_ms']:.3g} ms",
        "number of a process": f"{record['estimator']} of {_clock(record['clock'])}",
        "noise": f"{100 * record['noise']:.2f} %",
        "false alarms": f"{100 * record['false_alarm']['rate']:.2f} % (at most "
        f"{100 * record['false_alarm']['high']:.2f} %)",
        "found": {f"{effect} % slower": f"{100 * rate:.1f} %" for effect, rate in found.items()},
        "the same passes": f"{100 * record['pass_rate']:.1f} %",
        "pairs": f"{record['pairs_mean']:.0f} on average, {record['pairs_predicted']} predicted",
        "smallest slowdown found": _percent(record["mde_percent"]),
        "smallest margin kept": _percent(record["margin_met_percent"]),
        "candidates": rows,
        "processes": f"{record['processes']}, {len(record['discarded'])} more thrown away",
        "holds until": record["expires_at"],
    }


def _percent(value: float | None) -> str:
    return "none found" if value is None else f"{value:g} %"
