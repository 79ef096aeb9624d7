"""profile: an artefact -> latency, throughput, memory, loads, operators and limits on this device.

Measured in fresh processes, with prompts that never repeat. Times are wall time of the monotonic clock: time
to first token from the prompt to its first token, time per token from one token to the next. Percentiles that
the samples do not support are refused, with the number that would do. What is beside the core timing comes
from further processes, and is a note where it cannot be had.
"""

import json
import math
import statistics as plain
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from edgesft.core import artifact, catalog, console
from edgesft.core.artifact import Artifact, Workdir
from edgesft.core.errors import ArtifactError, UsageError
from edgesft.core.params import Count, Length, Seed, validate
from edgesft.stages import layers
from edgesft.stages.profiling import ceiling, sections, summary, trace
from edgesft.stages.profiling.overview import brief, tables
from edgesft.stages.profiling.sections import Bench

__all__ = ["Profile", "about", "brief", "device", "load", "problems", "resolve", "subject", "tables"]

SCHEMA = 2
FILE = "profile.json"
TRACE = "trace.json"
Threads = Annotated[int, Field(ge=0, le=1024, description="threads of the runtime; 0: physical cores")]
Positive = Annotated[int, Field(ge=1, le=65_536)]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Options of the stage. The defaults give every percentile of the time per token.

    prompts: how many a process, each followed by decode_tokens steps. prefill_seconds: time at most for
    further prompts without decoding (calls, of an encoder), so that p90 or p99 of them has its samples too.
    contexts: lengths of prompt to look at besides, those beyond the model's context left out. batches,
    thread_counts: sweeps. idle_seconds: pauses after which the first prompt is timed. operators: times of
    the runtime's operators. roofline: limits of this device. energy: read its power counters. html: write
    report.html. shapes: of inputs, for foreign graphs. timeout: seconds after which a process counts as hung.
    """

    name: ClassVar[str] = "profile"
    gives: ClassVar[str] = "profile"

    prompt_tokens: Length = 128
    decode_tokens: Length = 48
    prompts: Count = 15
    processes: Annotated[int, Field(ge=1, le=1000)] = 2
    prefill_seconds: Annotated[float, Field(ge=0)] = 6.0
    contexts: tuple[Length, ...] = (32, 128, 512)
    batches: tuple[Positive, ...] = ()
    thread_counts: tuple[Annotated[int, Field(ge=1, le=1024)], ...] = ()
    idle_seconds: tuple[Annotated[float, Field(ge=0, le=3600)], ...] = (2.0,)
    operators: bool = True
    roofline: bool = True
    energy: bool = True
    html: bool = False
    shapes: dict[str, tuple[Annotated[int, Field(ge=0)], ...]] = field(default_factory=dict)
    threads: Threads = 0
    seed: Seed = 0
    timeout: Annotated[float, Field(gt=0)] = 600.0

    @classmethod
    def from_recipe(cls, table: Mapping[str, Any]) -> "Profile":
        """From a `[profile]` table. Raises UsageError."""
        return validate(cls, table, "profile")

    def params(self) -> dict[str, Any]:
        """Everything that decides the result; a profile of another device is another profile."""
        values = {**self._workload(), **self._count(), **self._sections()}
        return {**values, "device": device(self.threads)["refuse"]}

    def _workload(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "decode_tokens": self.decode_tokens,
            "prompts": self.prompts,
        }

    def _count(self) -> dict[str, float]:
        return {"processes": self.processes, "prefill_seconds": self.prefill_seconds, "seed": self.seed}

    def _sections(self) -> dict[str, Any]:
        lists = ("contexts", "batches", "thread_counts", "idle_seconds")
        switches = ("operators", "roofline", "energy", "html")
        return {
            **{name: list(getattr(self, name)) for name in lists},
            **{name: getattr(self, name) for name in switches},
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }

    def problems(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """Reasons why it cannot run."""
        model = subject(inputs)
        if self.shapes and model.kind != "graph":
            raise UsageError(f"shapes are for foreign graphs, `{model.ref}` is of kind `{model.kind}`")
        return problems(model, self.prompt_tokens + self.decode_tokens)

    def run(self, inputs: Mapping[str, Artifact], work: Workdir) -> dict[str, Any]:
        """Measure; write profile.json and trace.json. Metrics are the profile without its raw samples."""
        model = subject(inputs)
        fingerprint = device(self.threads)
        bench = Bench(model, fingerprint["refuse"]["threads"], self.seed, self.timeout, work, self.shapes)
        cold, measured, meters = self._measure(bench)
        core, samples = summary.summarise(measured)
        bench.notes = core.pop("notes")
        parts, calls = self._parts(bench, core, samples, measured)
        if meters:
            parts |= summary.power(meters, core["tokens_per_second"])
            reasons = parts["throttled"]["reasons"]
            bench.notes += [f"the machine was held back: {', '.join(reasons)}"] if reasons else []
        idle = parts.pop("idle_resume")
        profile: dict[str, Any] = {
            "schema": SCHEMA,
            **core,
            "load_ms": {**summary.loads(cold, measured), "idle_resume": idle},
            **{k: v for k, v in about(model).items() if k in ("quantize", "pattern", "density")},
            "layers": self._layers(bench),
            "artifact_bytes": model.bytes,
            "threads": bench.threads,
            "workload": {**self._workload(), "processes": self.processes, "seed": self.seed},
            **parts,
            "notes": bench.notes,
            "fingerprint": fingerprint,
            "samples": {**samples, "processes": [summary.raw(m) for m in measured]},
        }
        for note in bench.notes:
            console.warn(note)
        artifact.write_json(work.path / FILE, profile)
        named = [("cold load", cold), *((f"process {i}", m) for i, m in enumerate(measured, start=1))]
        text = json.dumps(trace.timeline(named, calls), separators=(",", ":"))
        artifact.write_bytes(work.path / TRACE, text.encode())
        if self.html:
            _write_html(profile, model, work)
        return {k: v for k, v in profile.items() if k != "samples"}

    def _measure(self, bench: Bench) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
        """The cold load, every timed process, and what the meter read around each of these."""
        measured: list[dict[str, Any]] = []
        meters: list[dict[str, Any]] = []
        with console.progress("profile", self.processes + 1) as bar:
            for index in range(self.processes + 1):
                workload = {
                    "prompt_tokens": self.prompt_tokens,
                    "decode_tokens": self.decode_tokens,
                    "repetitions": self.prompts if index else 0,
                    "prefills": self._prefills(index, measured),
                }
                found, meter = bench.metered(
                    f"process-{index}", index, workload, energy=self.energy and index > 0, cold=index == 0
                )
                measured.append(found)
                meters += [] if meter is None else [meter]
                bar.advance()
        return measured[0], measured[1:], meters

    def _layers(self, bench: Bench) -> dict[str, Any] | None:
        """What became of the layers of an export with packed ones; noted where their kernels are missing."""
        found = layers.read(bench.model.path)
        if found is None:
            return None
        graph = ceiling.place(bench.model)[1]
        if graph != ceiling.GRAPH:
            bench.notes.append(
                f"the packed kernels cannot be had here: `{graph}` was measured, which is slower"
            )
        return {**found, "graph": graph}

    def _prefills(self, index: int, measured: list[dict[str, Any]]) -> int:
        """Prompts without decoding that this process adds, in view of what the first one cost."""
        from edgesft.core.statistics import samples_needed

        if index < 2:
            return 0
        cost = plain.median(r.get("ttft_ns", r.get("call_ns")) for r in measured[1]["repetitions"]) / 1e9
        others = self.processes - 1
        affordable = int(self.prefill_seconds / others / max(cost, 1e-6))
        for q in (0.99, 0.9):
            # A fifth more than the bare number: the warm-up cut takes some away.
            missing = math.ceil(1.2 * samples_needed(q)) - self.processes * self.prompts
            wanted = max(0, math.ceil(missing / others))
            if wanted <= affordable:
                return wanted
        return 0  # too few for a percentile are worth no time

    def _parts(
        self,
        bench: Bench,
        core: Mapping[str, Any],
        samples: Mapping[str, list[float]],
        measured: list[dict[str, Any]],
    ) -> tuple[dict[str, Any], list[Any]]:
        """Everything beside the core timing; and the calls whose operators the trace shows."""
        decoder = summary.decodes(measured)
        steady = summary.centre(samples)
        step_ms = steady["step" if decoder else "first"]
        tables = ("ttft_ms", "tpot_ms", "itl_ms", "request_tpot_ms") if decoder else ("latency_ms",)
        known = {self.prompt_tokens: {name: core[name] for name in tables}}
        paused = sections.idle(bench, self.prompt_tokens, self.idle_seconds) if self.idle_seconds else []
        found: dict[str, Any] = {
            "idle_resume": summary.resumed(paused, steady),
            "contexts": sections.contexts(bench, self._fitting(bench), known),
            "batches": sections.batches(bench, self.prompt_tokens, self.batches),
            "threads_sweep": sections.thread_counts(bench, self.prompt_tokens, self.thread_counts),
            "operators": None,
            "roofline": None,
        }
        traced = None
        if self.operators:
            traced = sections.operators(bench, self.prompt_tokens, self.decode_tokens)
        limits = None
        if self.roofline:
            limits = bench.attempt(
                "roofline", lambda: ceiling.limits(bench.model, bench.threads, bench.notes)
            )
        if limits is not None:
            tokens = 1 if decoder else None if core["kind"] == "graph" else self.prompt_tokens
            cached = self.prompt_tokens + (self.decode_tokens + 1) / 2 if decoder else None
            found["roofline"] = sections.roofline(bench, limits, step_ms, tokens, cached, traced)
        if traced is not None:
            found["operators"] = sections.rated(traced, limits, step_ms, bench.notes)
        return found, [] if traced is None else traced.calls

    def _fitting(self, bench: Bench) -> tuple[int, ...]:
        """The contexts that the model takes. A foreign graph's inputs have the sizes that they have."""
        if bench.model.kind == "graph":
            return ()
        limit = context(bench.model)
        fitting = tuple(c for c in self.contexts if limit is None or c + sections.STEPS <= limit)
        left = sorted(set(self.contexts) - set(fitting))
        if left and self.contexts != Profile.contexts:
            bench.notes.append(f"no context of {left[0]} and more: the model takes {limit} tokens at most")
        return fitting


def resolve(ref: str | Path) -> Artifact:
    """What `edgesft profile` takes: an exported folder, a model, a foreign `.onnx` file, an engine.

    Raises ArtifactError for what is missing, broken or of another kind.
    """
    from edgesft.core import subject

    return subject.resolve(ref)


def load(made: Artifact) -> dict[str, Any]:
    """The whole profile in an artefact of kind `profile`, raw samples included. Raises ArtifactError."""
    file = made.path / FILE
    found = artifact.read_json(file)
    if found is None or found.get("schema") != SCHEMA:
        raise ArtifactError(f"`{file}` is not a profile of schema {SCHEMA}")
    return found


def subject(inputs: Mapping[str, Artifact]) -> Artifact:
    """The artefact that is measured: an exported folder, or a model run by torch."""
    return inputs["exported"] if "exported" in inputs else inputs["model"]


def device(threads: int, **more: object) -> dict[str, Any]:
    """Fingerprint of this device with the resolved number of threads among the fields that must agree."""
    host = catalog.runtime("devices.host")
    found: dict[str, Any] = host.fingerprint(threads=threads or host.default_threads(), **more)
    return found


def about(model: Artifact) -> dict[str, Any]:
    """What made an artefact, in a few fields."""
    found: dict[str, Any] = catalog.runtime("devices.client").about(model)
    return found


def context(model: Artifact) -> int | None:
    """Tokens that a model takes at most; None where its folder does not say. Raises ArtifactError."""
    for name, key in (("export.json", "context"), ("config.json", "max_position_embeddings")):
        found = artifact.read_json(model.path / name)
        if found is not None:
            limit = found.get(key)
            return limit if isinstance(limit, int) and limit > 0 else None
    return None


def problems(model: Artifact, tokens: int) -> list[str]:
    """Reasons why `model` cannot be run. Raises UsageError if `tokens` tokens are more than it can take."""
    client = catalog.runtime("devices.client")
    if model.kind not in client.RUNTIMES:
        return [f"`{model.ref}` is of kind `{model.kind}`, expected an exported folder or a model"]
    try:
        limit = context(model)
    except ArtifactError as error:
        return [error.message]
    if limit is not None and tokens > limit:
        raise UsageError(f"{tokens} tokens asked for, `{model.ref}` takes {limit} at most")
    return []


def _write_html(profile: Mapping[str, Any], model: Artifact, work: Workdir) -> None:
    from edgesft.stages import reporting

    run = reporting.Run(Path(model.ref).name or model.ref, "profile", profile, work.path)
    reporting.render([run], ("html",), work.path)
