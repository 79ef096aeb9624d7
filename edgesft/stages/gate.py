"""gate: two artefacts -> is the second slower than the first, on this device, now?

Paired fresh processes in random order, one robust number a process, the exact signed-rank test on the log
ratios, decided after 8, 12, 16, 24, 32 or 48 pairs. It passes only when a slowdown of the margin is ruled
out, fails only when a slowdown above the tolerance is shown, and says so when it can do neither. Processes,
not iterations, are what repeats: iterations of one process share its luck, and pooling them finds
differences between a program and itself in a third of the runs.

Two clocks decide together. On a machine with four programs to a core, the median wall time of a decode step
differs so much between processes that 45 % of the gates of a program against itself stayed open. By wall
and processor time together 1 % did, 0.5 % were false alarms, and a slowdown of 5 % was found in 99 %. The
wall time is there for what processor time cannot see: waiting.
"""

import dataclasses
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgesft.core import artifact, catalog, console, stage
from edgesft.core.artifact import Artifact, Workdir
from edgesft.core.errors import DeviceError, EdgeSFTError, UsageError
from edgesft.core.params import Count, Length, Seed, validate
from edgesft.stages import profile
from edgesft.stages.profile import Threads
from edgesft.stages.verdict import (
    REPORT,
    SCHEMA,
    DeviceLost,
    GateVerdict,
    NotComparable,
    NothingMeasured,
    exact,
    judge,
    load_report,
    read_pairs,
)

__all__ = ["Gate", "gate", "judge", "load", "resolve"]

TRIES = 3  # processes started before a side counts as unable to run
REDO = 0.20  # share of pairs, at most, that may be measured again
ENCODER_CALLS = 64
TTFT_PROMPTS = 8
Percent = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Options of the stage; base and head are its inputs.

    margin_percent: slowdown that must be ruled out to pass. tolerance_percent: slowdown that never fails.
    alpha, beta: risk of a false alarm, and of passing a slowdown of the margin. max_pairs: when to give up.
    prompt_tokens, decode_tokens, repetitions: what a process runs. estimator: the one number that it gives.
    clock: `wall`; `cpu`, the processor time of the calling thread, which other work on a busy machine hardly
    moves, but which does not see waiting; `both` (see `sequential.agree`).
    inconclusive: what an inconclusive run counts as. check_memory, check_size: fail also for more than 2 %
    more of it. drill_slowdown: per cent by which head is slowed in its runner, to see the gate fire.
    timeout: seconds after which the first process of a side counts as hung.
    """

    name: ClassVar[str] = "gate"
    gives: ClassVar[str] = "verdict"

    metric: Literal["tpot", "ttft"] = "tpot"
    margin_percent: Percent = 5.0
    tolerance_percent: Percent = 2.0
    alpha: Share = 0.01
    beta: Share = 0.05
    max_pairs: Annotated[int, Field(ge=8, le=1000)] = 48
    estimator: Literal["median", "p10", "min"] = "median"
    clock: Literal["both", "wall", "cpu"] = "both"
    prompt_tokens: Length = 64
    decode_tokens: Length = 32
    repetitions: Count = 2
    threads: Threads = 0
    seed: Seed = 0
    inconclusive: Literal["report", "fail", "pass"] = "report"
    check_memory: bool = False
    check_size: bool = False
    drill_slowdown: Annotated[float, Field(ge=0, le=1000)] = 0.0
    timeout: Annotated[float, Field(gt=0)] = 300.0

    def __post_init__(self) -> None:
        if self.tolerance_percent >= self.margin_percent:
            raise UsageError(
                f"`gate.tolerance_percent` is {self.tolerance_percent}, expected less than"
                f" `margin_percent`, which is {self.margin_percent}"
            )

    @classmethod
    def from_recipe(cls, table: Mapping[str, Any]) -> "Gate":
        """From a `[gate]` table. Raises UsageError."""
        return validate(cls, table, "gate")

    def params(self) -> dict[str, Any]:
        """Everything that decides the verdict; how an open verdict is counted does not."""
        values = dataclasses.asdict(self)
        for name in ("inconclusive", "timeout", "threads"):
            del values[name]
        return {**values, "device": profile.device(self.threads)["refuse"]}

    def problems(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """Reasons why it cannot run."""
        tokens = self.prompt_tokens + self.decode_tokens
        return [p for role in ("base", "head") for p in profile.problems(inputs[role], tokens)]

    def run(self, inputs: Mapping[str, Artifact], work: Workdir) -> dict[str, Any]:
        """Measure pairs until there is a verdict; write verdict.json.

        Returns the report without raw samples. Raises NotComparable, NothingMeasured and DeviceLost; pass,
        fail and inconclusive are results (`judge` turns them into an exit code).
        """
        report = _Session(self, inputs, work).run()
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


class _Session:
    """One gate while it runs: its sides, its pairs so far, its report."""

    def __init__(self, options: Gate, inputs: Mapping[str, Artifact], work: Workdir) -> None:
        from edgesft.core import sequential

        self.options, self.inputs = options, inputs
        self.client, self.host = catalog.runtime("devices.client"), catalog.runtime("devices.host")
        self.fingerprint = profile.device(options.threads)
        # The first clock also decides on the warm-up: of the two, processor time is the quieter.
        self.clocks = ("cpu", "wall") if options.clock == "both" else (options.clock,)
        self.decided_by = self.clocks[0]
        self.rule = sequential.Rule(
            margin=options.margin_percent / 100,
            tolerance=options.tolerance_percent / 100,
            alpha=options.alpha,
            beta=options.beta,
            max_pairs=options.max_pairs,
            metrics=len(self.clocks),
        )
        self.file = work.checkpoint / "pairs.jsonl"
        self.pairs = read_pairs(self.file)
        self.looks: list[dict[str, Any]] = []
        self.metric: str = options.metric
        self.workload = {
            "prompt_tokens": options.prompt_tokens,
            "decode_tokens": options.decode_tokens,
            "repetitions": options.repetitions,
        }
        if options.metric == "ttft":
            self._shape(decode_tokens=0, repetitions=max(options.repetitions, TTFT_PROMPTS))
        self.timeout = options.timeout

    def _shape(self, **values: int) -> None:
        self.workload |= values

    def run(self) -> dict[str, Any]:
        """Probe both sides, then pairs and looks until one decides."""
        self._probe()
        with console.progress("gate", self.options.max_pairs, len(self.counted)) as bar:
            while True:
                verdict = self._decide()
                if verdict is not None:
                    return self.report(verdict)
                self._add_pair()
                done = len(self.counted)
                if self.pairs[-1]["discarded"] is None:
                    bar.advance(1, f"ratio {self.pairs[-1]['ratio'][self.clocks[0]]:.3f} in pair {done}")

    @property
    def counted(self) -> list[dict[str, Any]]:
        """Pairs that were not thrown away."""
        return [p for p in self.pairs if p["discarded"] is None]

    def _decide(self) -> str | None:
        """The verdict of the look that is due at this number of pairs, None to go on."""
        from edgesft.core import sequential

        ratios = {c: [math.log(p["ratio"][c]) for p in self.counted] for c in self.clocks}
        self.looks = []
        for n in self.rule.looks:
            if n > len(self.counted):
                return None
            looks = {c: sequential.look(ratios[c][:n], self.rule) for c in self.clocks}
            self.looks += [{"clock": c, **look.json()} for c, look in looks.items()]
            one, *other = looks.values()
            decision = sequential.agree(one, other[0], self.rule) if other else one.decision
            if decision != sequential.CONTINUE:
                same = (c for c, look in looks.items() if look.decision == decision)
                self.decided_by = next(same, self.clocks[0])
                return decision
        return None

    def _probe(self) -> None:
        """Run each side once: caches get warm, and what cannot run or be compared is found out first."""
        kinds = {r: self.inputs[r].kind for r in ("base", "head")}
        if kinds["base"] != kinds["head"]:
            self._refuse(f"base is of kind `{kinds['base']}`, head of kind `{kinds['head']}`")
        probes = {}
        for role in ("base", "head"):
            try:
                probes[role] = self._measure(role, pair=-1)
            except DeviceError as error:
                if self.counted:
                    raise self._lost(error) from None
                report = self.report("nothing_measured", error.message)
                raise NothingMeasured(
                    f"{role} could not be run: {error.message}", report, error.hint
                ) from None
        base, head = probes["base"]["loaded"], probes["head"]["loaded"]
        for name in ("kind", "vocabulary"):
            if base[name] != head[name]:
                self._refuse(f"the {name} of base is `{base[name]}`, that of head `{head[name]}`")
        if base["kind"] != "decoder":
            self.metric = "latency"
            self._shape(decode_tokens=0, repetitions=max(self.options.repetitions, ENCODER_CALLS))
        slowest = max(p["wall_s"] for p in probes.values())
        self.timeout = min(self.timeout, max(60.0, 20 * slowest))

    def _refuse(self, why: str) -> None:
        raise NotComparable(f"base and head cannot be compared: {why}", self.report("not_comparable", why))

    def _lost(self, error: EdgeSFTError) -> DeviceLost:
        report = self.report("device_lost", error.message)
        return DeviceLost(
            f"lost after {len(self.counted)} pairs: {error.message}",
            report,
            "with `-o OUT` the pairs so far are kept, and the same command goes on",
        )

    def _measure(self, role: str, pair: int) -> dict[str, Any]:
        """One process of one side; both sides of a pair get the same prompts.

        Raises WorkerLost at once, other DeviceErrors after the last try.
        """
        asked = self.client.request(
            self.inputs[role],
            threads=self.fingerprint["refuse"]["threads"],
            workload=self.workload,
            seed=[self.options.seed, pair + 1],
            slowdown=self.options.drill_slowdown if role == "head" else 0.0,
            clock=self.clocks[0],
            until_steady=pair >= 0,
        )
        for _ in range(TRIES - 1):
            try:
                found: dict[str, Any] = self.client.measure(asked, self.timeout)
                return found
            except self.client.WorkerFailed as error:
                console.warn(f"{role} failed and is tried again: {error.message}")
        last: dict[str, Any] = self.client.measure(asked, self.timeout)
        return last

    def _add_pair(self) -> None:
        """Measure one pair and append it to the checkpoint."""
        import numpy as np

        number = len(self.pairs)
        first = "base" if np.random.default_rng([self.options.seed, 1, number]).random() < 0.5 else "head"
        record: dict[str, Any] = {"pair": number, "first": first}
        before = self.host.telemetry()
        try:
            for role in (first, "head" if first == "base" else "base"):
                record[role] = self._reduce(self._measure(role, number))
        except DeviceError as error:
            raise self._lost(error) from None
        record["ratio"] = {c: record["head"]["value"][c] / record["base"]["value"][c] for c in self.clocks}
        record["discarded"] = self._reason(record, self.host.held_back(before, self.host.telemetry()))
        self.pairs.append(record)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()

    def _reduce(self, measured: dict[str, Any]) -> dict[str, Any]:
        """One process as the report keeps it: its number, and all samples behind it."""
        from edgesft.core import statistics

        found = {c: self.client.timings(measured["repetitions"], self.metric, c) for c in self.clocks}
        warm = found[self.clocks[0]][1]
        samples = {c: times for c, (times, _) in found.items()}
        return {
            "value": {
                c: statistics.estimate(t[warm.cut :], self.options.estimator) for c, t in samples.items()
            },
            "cut": warm.cut,
            "steady": warm.steady,
            "samples_ms": {c: [round(t, 4) for t in times] for c, times in samples.items()},
            "peak_bytes": measured["done"]["peak_bytes"],
            "load_ms": round(measured["loaded"]["load_ns"] / 1e6, 3),
            "wall_s": measured["wall_s"],
        }

    def _reason(self, record: Mapping[str, Any], telemetry: str | None) -> str | None:
        """Why the pair does not count, which is never its ratio; None also once the cap is reached."""
        unsteady = [r for r in ("base", "head") if not record[r]["steady"]]
        why = telemetry or (f"no steady state in {' and '.join(unsteady)}" if unsteady else None)
        discarded = sum(p["discarded"] is not None for p in self.pairs)
        return why if discarded < REDO * max(len(self.counted), self.rule.looks[0]) else None

    def report(self, verdict: str, error: str | None = None) -> dict[str, Any]:
        """The JSON report of what is known now."""
        entries = {c: self._entry(c, verdict) for c in self.clocks}
        entry = entries[self.decided_by]
        secondary = self._secondary() if self.counted else []
        if verdict in ("pass", "inconclusive") and any(
            e["blocking"] and e["verdict"] == "fail" for e in secondary
        ):
            verdict = "fail"
        options = self.options
        return {
            "schema": SCHEMA,
            "verdict": verdict,
            **({"error": error} if error else {}),
            **{k: entry[k] for k in ("metric", "ratio", "interval", "level", "pairs", "noise", "detectable")},
            "pairs_predicted": entry["pairs_predicted"],
            "estimator": options.estimator,
            "clock": options.clock,
            "decided_by": self.decided_by,
            "looks": self.looks,
            "margins": {"regression": self.rule.margin, "tolerance": self.rule.tolerance},
            "errors": {"alpha": options.alpha, "beta": options.beta, "looks": list(self.rule.looks)},
            "inconclusive": options.inconclusive,
            "drill_slowdown": options.drill_slowdown,
            "discarded": [
                {"pair": p["pair"], "why": p["discarded"]} for p in self.pairs if p["discarded"] is not None
            ],
            "base": profile.about(self.inputs["base"]),
            "head": profile.about(self.inputs["head"]),
            "workload": {**self.workload, "seed": options.seed},
            "fingerprint": self.fingerprint,
            "metrics": [*entries.values(), *secondary],
            "raw": self.pairs,
        }

    def _entry(self, clock: str, verdict: str) -> dict[str, Any]:
        """The latency's line of the report by one clock, at the pairs reached."""
        from edgesft.core import sequential

        own = next((k["decision"] for k in reversed(self.looks) if k["clock"] == clock), verdict)
        own = sequential.INCONCLUSIVE if own == sequential.CONTINUE else own
        entry: dict[str, Any] = {"metric": self.metric, "clock": clock, "verdict": own, "blocking": True}
        entry["pairs"] = 0
        empty = ("ratio", "noise", "detectable", "pairs_predicted", "base_ms", "head_ms")
        entry |= {**dict.fromkeys(empty), "interval": [None, None], "level": 1 - 2 * self.rule.beta_look}
        pairs = self.counted
        if not pairs:
            return entry
        ratios = [math.log(p["ratio"][clock]) for p in pairs]
        low, high = sequential.hodges_lehmann_interval(ratios, self.rule.beta_look)
        spread = sequential.noise(ratios)
        return entry | {
            "pairs": len(pairs),
            "ratio": math.exp(sequential.hodges_lehmann(ratios)),
            "interval": [None if x is None else math.exp(x) for x in (low, high)],
            "noise": spread,
            "detectable": sequential.detectable(spread, len(pairs)),
            "pairs_predicted": sequential.pairs_predicted(spread, self.rule.margin),
            "base_ms": _median([p["base"]["value"][clock] for p in pairs]),
            "head_ms": _median([p["head"]["value"][clock] for p in pairs]),
        }

    def _secondary(self) -> list[dict[str, Any]]:
        """Memory and size: reported always, blocking only where asked."""
        peaks = {r: _median([p[r]["peak_bytes"] for p in self.counted]) for r in ("base", "head")}
        sizes = {r: float(self.inputs[r].bytes) for r in ("base", "head")}
        return [
            exact("peak_memory", peaks, self.options.check_memory),
            exact("size", sizes, self.options.check_size),
        ]


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def resolve(ref: str | Path) -> Artifact:
    """One side of the comparison: an exported folder, or a model. Raises ArtifactError."""
    return profile.resolve(ref)


def gate(
    base: str | Path,
    head: str | Path,
    *,
    out: Path | None = None,
    **options: Any,  # noqa: ANN401 - checked against the fields of `Gate`
) -> dict[str, Any]:
    """Compare two artefacts; the report, whatever the verdict. `judge` turns it into an exit code.

    options: fields of `Gate`. out: keep the verdict there, and resume by pair what a kill left.
    Raises ArtifactError for folders that are missing, broken or of another kind, UsageError for options.
    """
    chosen = Gate.from_recipe(options)
    inputs = {"base": resolve(base), "head": resolve(head)}
    if out is None:
        return chosen.measure(inputs)
    try:
        done, _ = stage.execute(chosen, inputs, out)
    except GateVerdict as verdict:
        return verdict.report
    return {**load(done), "inconclusive": chosen.inconclusive}  # an older run may have been asked otherwise


def load(made: Artifact) -> dict[str, Any]:
    """The whole report in an artefact of kind `verdict`, raw pairs included. Raises ArtifactError."""
    return load_report(made.path / REPORT)
