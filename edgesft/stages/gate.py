"""gate: two artefacts -> is the second slower than the first, on this device, now?

Paired fresh processes in random order, one robust number a process, the exact signed-rank test on the log
ratios, decided after 8, 12, 16, 24, 32 or 48 pairs. It passes only when a slowdown of the margin is ruled
out, fails only when a slowdown above the tolerance is shown, and says so when it can do neither. Processes,
not iterations, are what repeats: iterations of one process share its luck, and pooling them finds
differences between a program and itself in a third of the runs.

Two clocks decide together unless a calibration says otherwise. On a machine with four programs to a core,
the median wall time of a decode step differs so much between processes that 45 % of the gates of a program
against itself stayed open. By wall and processor time together 1 % did, 0.5 % were false alarms, and a
slowdown of 5 % was found in 99 %. The wall time is there for what processor time cannot see: waiting.

Beside the ratios it checks absolute budgets of head, peak memory and size. Without base only the budgets.
"""

import dataclasses
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgesft.core import artifact, catalog, stage
from edgesft.core.artifact import Artifact, Workdir
from edgesft.core.errors import UsageError
from edgesft.core.params import Count, Length, Seed, validate
from edgesft.stages import profile
from edgesft.stages.gating import arming
from edgesft.stages.gating import budget as budgeting
from edgesft.stages.gating.pairs import resolve as resolve
from edgesft.stages.gating.session import HEADER, Session, metrics_of
from edgesft.stages.gating.verdict import (
    REPORT,
    GateVerdict,
    NotComparable,
    describe,
    judge,
    lines,
    load_report,
)
from edgesft.stages.profile import Threads

__all__ = ["Gate", "describe", "gate", "judge", "lines", "load", "resolve"]

Percent = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Options of the stage; base and head are its inputs, head alone where there are budgets.

    metrics: what decides, by the time per token, to the first token or, of what generates none, by call.
    margin_percent: slowdown that must be ruled out to pass. tolerance_percent: slowdown that never fails.
    alpha, beta: risk of a false alarm, and of passing a slowdown of the margin; shared by the metrics.
    max_pairs: when to give up. prompt_tokens, decode_tokens, repetitions: what a process runs; shapes: of
    the inputs of a foreign graph. only: patterns of the names of metrics and budgets to look at.
    check_tail: the 95th percentile of a process decides too, at tail_margin_percent. check_memory,
    check_size: fail also for more than 2 % more of it. Without any of them it is reported only.
    budgets: limits by name, see `stages.gating.budget`; level: the confidence of their bounds.
    calibration: `auto` for the newest that fits, a file or folder, or `none`. estimator: the one number that
    a process gives. clock: `wall`; `cpu`, the processor time of the calling thread, which other work on a
    busy machine hardly moves, but which does not see waiting; `both` (see `sequential.agree`). Where these
    two are `auto`, the calibration decides, and without one the median by both clocks. choices: what was
    decided, `tpot:p10:cpu`; filled in before anything is measured.
    inconclusive: what an inconclusive run counts as. drill_slowdown: per cent by which head is slowed in its
    runner, to see the gate fire. timeout: seconds after which the first process of a side counts as hung.
    """

    name: ClassVar[str] = "gate"
    gives: ClassVar[str] = "verdict"

    metrics: Annotated[tuple[Literal["tpot", "ttft", "latency"], ...], Field(min_length=1)] = ("tpot",)
    margin_percent: Percent = 5.0
    tolerance_percent: Percent = 2.0
    tail_margin_percent: Percent = 10.0
    alpha: Share = 0.01
    beta: Share = 0.05
    max_pairs: Annotated[int, Field(ge=8, le=1000)] = 48
    estimator: Literal["auto", "median", "p10", "min"] = "auto"
    clock: Literal["auto", "both", "wall", "cpu"] = "auto"
    calibration: str = "auto"
    choices: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    budgets: Mapping[str, float] = field(default_factory=dict)
    level: Annotated[float, Field(ge=0.5, lt=1)] = budgeting.LEVEL
    prompt_tokens: Length = 64
    decode_tokens: Length = 32
    repetitions: Count = 2
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    threads: Threads = 0
    seed: Seed = 0
    inconclusive: Literal["report", "fail", "pass"] = "report"
    check_tail: bool = False
    check_memory: bool = True
    check_size: bool = True
    drill_slowdown: Annotated[float, Field(ge=0, le=1000)] = 0.0
    timeout: Annotated[float, Field(gt=0)] = 300.0

    def __post_init__(self) -> None:
        for name in ("margin_percent", "tail_margin_percent"):
            if self.tolerance_percent >= getattr(self, name):
                raise UsageError(
                    f"`gate.tolerance_percent` is {self.tolerance_percent}, expected less than"
                    f" `{name}`, which is {getattr(self, name)}"
                )
        budgeting.parse(self.budgets, "gate.budgets")
        for each in self.choices:
            arming.parse(each)

    @classmethod
    def from_recipe(cls, table: Mapping[str, Any]) -> "Gate":
        """From a `[gate]` table; `metric` may stand for `metrics`. Raises UsageError."""
        values = dict(table)
        if "metric" in values:
            if "metrics" in values:
                raise UsageError("`gate` has both `metric` and `metrics`, expected one of them")
            values["metrics"] = values.pop("metric")
        if isinstance(values.get("metrics"), str):
            values["metrics"] = (values["metrics"],)
        if isinstance(values.get("metrics"), list | tuple):
            values["metrics"] = tuple(dict.fromkeys(values["metrics"]))
        return validate(cls, values, "gate")

    def params(self) -> dict[str, Any]:
        """Everything that decides the verdict; how an open verdict is counted does not.

        Of the calibration the choices count that came out of it.
        """
        values = dataclasses.asdict(self)
        for name in ("inconclusive", "timeout", "threads", "calibration"):
            del values[name]
        return {**values, "device": profile.device(self.threads)["refuse"]}

    def problems(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """Reasons why it cannot run. Raises UsageError for what it was asked without."""
        if "base" not in inputs:
            self.need_budgets()
        tokens = self.prompt_tokens + self.decode_tokens
        return [
            p for role in ("base", "head") if role in inputs for p in profile.problems(inputs[role], tokens)
        ]

    def need_budgets(self) -> None:
        """Raise UsageError if there is nothing to hold head alone against."""
        if not self.budgets:
            raise UsageError(
                "a gate without base has nothing to compare head with, expected budgets",
                "edgesft gate --budget budget.toml --head HEAD",
            )

    def armed(self, inputs: Mapping[str, Artifact]) -> "Gate":
        """With the choices that the calibration leads to, for a request that says what will decide.

        Raises NotComparable for a calibration that does not fit or does not arm this gate.
        """
        if self.choices or "base" not in inputs:
            return self
        session = Session(self, inputs, None)
        chosen = session.choose(metrics_of(inputs["base"], self.metrics))
        return dataclasses.replace(self, choices=tuple(str(c) for c in chosen.values()))

    def run(self, inputs: Mapping[str, Artifact], work: Workdir) -> dict[str, Any]:
        """Measure pairs until there is a verdict; write verdict.json.

        Returns the report without raw samples. Raises NotComparable, NothingMeasured and DeviceLost; pass,
        fail and inconclusive are results (`judge` turns them into an exit code). Raises ArtifactError if a
        side was altered meanwhile.
        """
        report = Session(self, inputs, work).run()
        artifact.write_json(work.path / REPORT, report)
        for pair in report["raw"]:
            work.log(pair)
        return {k: v for k, v in report.items() if k != "raw"}

    def measure(self, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
        """The report, whatever the verdict, without keeping anything on disk. See `run`."""
        stage.refuse(self, inputs)
        with tempfile.TemporaryDirectory() as folder:
            work = Workdir(Path(folder), Path(folder), False)
            try:
                self.run(inputs, work)
            except GateVerdict as verdict:
                return verdict.report
            return load_report(work.path / REPORT)


def gate(
    base: str | Path | None,
    head: str | Path,
    *,
    out: Path | None = None,
    calibration: str | Path = "auto",
    budget: Path | None = None,
    **options: Any,  # noqa: ANN401 - checked against the fields of `Gate`
) -> dict[str, Any]:
    """Compare two artefacts; the report, whatever the verdict. `judge` turns it into an exit code.

    base: None to check the budgets of head alone. options: fields of `Gate`. out: keep the verdict there,
    and resume by pair what a kill left. budget: a TOML file, see `stages.gating.budget.read`.
    Raises ArtifactError for folders that are missing, broken, altered or of another kind, UsageError for
    options and budgets.
    """
    if budget is not None:
        limits, level = budgeting.read(budget)
        options |= {"budgets": {**options.get("budgets", {}), **limits}, "level": level}
    chosen = Gate.from_recipe({**options, "calibration": str(calibration)})
    if base is None:
        chosen.need_budgets()
    inputs = {"head": resolve(head)} if base is None else {"base": resolve(base), "head": resolve(head)}
    stage.refuse(chosen, inputs)
    try:
        if out is not None:
            _same_device(chosen, inputs, out)
        chosen = chosen.armed(inputs)
        if out is None:
            return chosen.measure(inputs)
        done, _ = stage.execute(chosen, inputs, out)
    except GateVerdict as verdict:
        return verdict.report
    return {**load(done), "inconclusive": chosen.inconclusive}  # an older run may have been asked otherwise


def _same_device(options: Gate, inputs: Mapping[str, Artifact], out: Path) -> None:
    """Raise NotComparable if pairs that another device measured lie at `out`; they are left there."""
    header = artifact.read_json(out / artifact.PARTIAL / "checkpoint" / HEADER)
    if header is None:
        return
    ours = profile.device(options.threads)
    differ = catalog.runtime("devices.host").differences(ours, header.get("fingerprint", {}))
    if differ:
        why = f"the pairs in `{out}` are of another device: {differ[0]}"
        report = Session(options, inputs, None).report("not_comparable", why)
        raise NotComparable(why, report, "choose another `-o`, or go on where it was begun")


def load(made: Artifact) -> dict[str, Any]:
    """The whole report in an artefact of kind `verdict`, raw pairs included. Raises ArtifactError."""
    return load_report(made.path / REPORT)
