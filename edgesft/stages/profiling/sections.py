"""The parts of a profile beside its core timing, each from processes of its own.

A part that this device or artefact cannot give becomes a note; the core timing stands without it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from edgesft.core import artifact, catalog
from edgesft.core.artifact import Artifact, Workdir
from edgesft.core.errors import EdgeSFTError
from edgesft.stages.profiling import ceiling, summary

T = TypeVar("T")

PROMPTS = 12  # of a sweep: the first warms up, eleven are what a median needs
STEPS = 6  # after each
IDLE = (2, 4)  # prompts before the pause, steps after each
TRACED = (3, 12)  # prompts and steps under the runtime's profiler
COVERED = (0.8, 1.2)  # sum of the operators over the step, outside of which a note says so
FIRST = 1000  # sections draw their prompts from other seeds than the timed processes


@dataclass
class Bench:
    """Asks for measurements of one artefact, keeps each answer in the checkpoint, collects notes."""

    model: Artifact
    threads: int
    seed: int
    timeout: float
    work: Workdir
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _asked: int = FIRST

    def ask(self, name: str, index: int, workload: Mapping[str, int], **more: object) -> dict[str, Any]:
        """One process, unless an interrupted run has its answer already. Raises what the worker raises."""
        kept = self.work.checkpoint / f"{name}.json"
        if not kept.exists():
            client = catalog.runtime("devices.client")
            given = {"threads": self.threads, **({"shapes": self.shapes} if self.shapes else {}), **more}
            asked = client.request(self.model, workload=workload, seed=[self.seed, index], **given)
            artifact.write_json(kept, client.measure(asked, self.timeout))
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        return found

    def metered(
        self, name: str, index: int, workload: Mapping[str, int], *, energy: bool, **more: object
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """`ask`, with what the power meter read meanwhile, if it is to read and the run was not interrupted
        between the two."""
        kept = self.work.checkpoint / f"{name}-power.json"
        if energy and not (self.work.checkpoint / f"{name}.json").exists():
            with catalog.runtime("devices.power").Meter() as meter:
                self.ask(name, index, workload, **more)
            artifact.write_json(kept, meter.result())
        return self.ask(name, index, workload, **more), artifact.read_json(kept)

    def extra(self, name: str, workload: Mapping[str, int], **more: object) -> dict[str, Any]:
        """A process of a section, with prompts that no other has."""
        self._asked += 1
        return self.ask(name, self._asked, workload, **more)

    def attempt(self, title: str, make: Callable[[], T]) -> T | None:
        """What `make` gives; None and a note if the device or the artefact cannot give it."""
        try:
            return make()
        except EdgeSFTError as error:
            self.notes.append(f"no {title}: {error.message.splitlines()[0]}")
            return None


def idle(bench: Bench, prompt_tokens: int, seconds: tuple[float, ...]) -> list[Mapping[str, Any]]:
    """The worker's repetitions after each pause."""
    prompts, steps = IDLE
    workload = {"prompt_tokens": prompt_tokens, "decode_tokens": steps, "repetitions": prompts}
    title = "latency after a pause"
    made = bench.attempt(title, lambda: bench.extra("idle", workload, idle_seconds=list(seconds)))
    return [] if made is None else made["idle"]


def contexts(
    bench: Bench, lengths: tuple[int, ...], known: Mapping[int, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Latencies by length of the prompt. known: those that need no measurement of their own."""
    found = []
    for length in sorted(set(lengths)):
        table = known.get(length) or _short(bench, f"context-{length}", f"context of {length}", length)
        if table is not None:
            found.append({"prompt_tokens": length, **table})
    return found


def batches(bench: Bench, prompt_tokens: int, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Latencies and rate by the number of sequences that are decoded at once."""
    found = []
    for size in sorted(set(sizes)):
        table = _short(bench, f"batch-{size}", f"batch of {size}", prompt_tokens, batch=size)
        if table is not None:
            found.append({"batch": size, **table})
    return found


def thread_counts(bench: Bench, prompt_tokens: int, counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Latencies and rate by the number of threads."""
    found = []
    for count in sorted(set(counts)):
        table = _short(bench, f"threads-{count}", f"run with {count} threads", prompt_tokens, threads=count)
        if table is not None:
            found.append({"threads": count, **table})
    return found


def _short(
    bench: Bench, name: str, title: str, prompt_tokens: int, batch: int = 1, **more: object
) -> dict[str, Any] | None:
    """One process of a sweep: percentiles that its few samples carry, and the rate."""
    workload = {"prompt_tokens": prompt_tokens, "decode_tokens": STEPS, "repetitions": PROMPTS}
    if batch > 1:
        workload["batch"] = batch
    made = bench.attempt(title, lambda: bench.extra(name, workload, **more))
    if made is None:
        return None
    steps = [t for r in made["repetitions"][1:] for t in r["step_ns"]]
    rate = batch * len(steps) / sum(steps) * 1e9 if steps else None
    return {**summary.short(made), "tokens_per_second": rate}


@dataclass(frozen=True)
class Traced:
    """What the runtime's own profiler saw: the table of its operators, and calls to show in a trace."""

    table: dict[str, Any]
    calls: list[Any]


def operators(bench: Bench, prompt_tokens: int, decode_tokens: int) -> Traced | None:
    """Where the time goes, from a process that is not timed; None and a note where nothing tells."""
    if bench.model.kind == "model":
        bench.notes.append("no operators: torch runs this model, only ONNX Runtime times its operators")
        return None
    return bench.attempt("operators", lambda: _operators(bench, prompt_tokens, decode_tokens))


def _operators(bench: Bench, prompt_tokens: int, decode_tokens: int) -> Traced:
    reader = catalog.runtime("exporters.operators")
    prompts, steps = TRACED[0], min(decode_tokens, TRACED[1])
    workload = {"prompt_tokens": prompt_tokens, "decode_tokens": steps, "repetitions": prompts}
    raw = bench.work.checkpoint / "runtime-profile.json"
    made = bench.extra("operators", workload, operators=raw)
    runs = reader.read_runs(raw, made["done"]["operators"]["phases"])
    graph = reader.read_graph(*ceiling.place(bench.model))
    phase = "decode" if summary.decodes([made]) else "call"
    main = reader.settled(runs, phase)
    # Step k of 1..n sees the prompt and k tokens; the table is of the middle of them.
    table = reader.table(main, graph, phase, context=prompt_tokens + (steps + 1) / 2)
    calls = [_typical(main)]
    if phase == "decode":
        first = reader.settled(runs, "prefill")
        table["prefill"] = reader.table(first, graph, "prefill", context=prompt_tokens)
        calls.insert(0, _typical(first))
    return Traced(table, calls)


def _typical(runs: list[Any]) -> Any:  # noqa: ANN401 - operators.Run
    """The run of the median duration."""
    return sorted(runs, key=lambda run: run.duration)[len(runs) // 2]


def rated(
    traced: Traced, limits: Mapping[str, Any] | None, step_ms: float, notes: list[str]
) -> dict[str, Any]:
    """The table with rates, shares of the limits, and how much of the timed step it covers."""
    table = ceiling.add_limits(traced.table, limits)
    if "prefill" in table:
        table["prefill"] = ceiling.add_limits(table["prefill"], limits)
    coverage = table["total_ms"] / step_ms
    if not COVERED[0] <= coverage <= COVERED[1]:
        notes.append(
            f"the operators add up to {table['total_ms']:.3g} ms of a step of {step_ms:.3g} ms: "
            "the shares hold, the milliseconds do not"
        )
    return {**table, "coverage": coverage}


def roofline(
    bench: Bench,
    limits: Mapping[str, Any],
    step_ms: float,
    tokens: int | None,
    cached: float | None,
    traced: Traced | None,
) -> dict[str, Any]:
    """The limits, and the whole step against them; see `ceiling.step`."""
    counted = None if traced is None else traced.table["flops"]
    step = bench.attempt(
        "roofline of the whole step",
        lambda: ceiling.step(bench.model, limits, ms=step_ms, tokens=tokens, cached=cached, counted=counted),
    )
    return {**limits, "step": step}
