"""profile: exported artefact -> latency, throughput, memory and load time on this device.

Measured in fresh processes, with prompts that never repeat. Times are wall time of the monotonic clock: time
to first token from the prompt to its first token, time per token from one token to the next. Percentiles that
the samples do not support are refused, with the number that would do.
"""

import json
import math
import statistics as plain
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field

from edgesft.core import artifact, catalog, console
from edgesft.core.artifact import Artifact, Workdir
from edgesft.core.errors import ArtifactError, DeviceError, UsageError
from edgesft.core.params import Count, Length, Seed, validate

SCHEMA = 1
FILE = "profile.json"
WANTED = (50, 90, 99)
BUSY = 0.8  # share of the time with a core below which a profile says so
Threads = Annotated[int, Field(ge=0, le=1024, description="threads of the runtime; 0: physical cores")]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Options of the stage. The defaults give every percentile of the time per token.

    prompts: how many a process, each followed by decode_tokens steps. prefill_seconds: time at most for
    further prompts without decoding (calls, of an encoder), so that p90 or p99 of them has its samples too.
    timeout: seconds after which a process counts as hung.
    """

    name: ClassVar[str] = "profile"
    gives: ClassVar[str] = "profile"

    prompt_tokens: Length = 128
    decode_tokens: Length = 48
    prompts: Count = 15
    processes: Annotated[int, Field(ge=1, le=1000)] = 2
    prefill_seconds: Annotated[float, Field(ge=0)] = 6.0
    threads: Threads = 0
    seed: Seed = 0
    timeout: Annotated[float, Field(gt=0)] = 600.0

    @classmethod
    def from_recipe(cls, table: Mapping[str, Any]) -> "Profile":
        """From a `[profile]` table. Raises UsageError."""
        return validate(cls, table, "profile")

    def params(self) -> dict[str, Any]:
        """Everything that decides the result; a profile of another device is another profile."""
        return {**self._workload(), **self._count(), "device": device(self.threads)["refuse"]}

    def _workload(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "decode_tokens": self.decode_tokens,
            "prompts": self.prompts,
        }

    def _count(self) -> dict[str, float]:
        return {"processes": self.processes, "prefill_seconds": self.prefill_seconds, "seed": self.seed}

    def problems(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """Reasons why it cannot run."""
        return problems(subject(inputs), self.prompt_tokens + self.decode_tokens)

    def run(self, inputs: Mapping[str, Artifact], work: Workdir) -> dict[str, Any]:
        """Measure; write profile.json. Metrics are the profile without its raw samples."""
        model = subject(inputs)
        fingerprint = device(self.threads)
        cold, measured = self._measure(model, fingerprint["refuse"]["threads"], work)
        summary, steady = summarise(measured)
        profile: dict[str, Any] = {
            "schema": SCHEMA,
            **summary,
            "load_ms": _loads(cold, measured),
            **{k: v for k, v in about(model).items() if k in ("quantize", "pattern", "density")},
            "artifact_bytes": model.bytes,
            "threads": fingerprint["refuse"]["threads"],
            "workload": {**self._workload(), "processes": self.processes, "seed": self.seed},
            "fingerprint": fingerprint,
            "samples": {**steady, "processes": [_raw(m) for m in measured]},
        }
        for note in profile["notes"]:
            console.warn(note)
        artifact.write_json(work.path / FILE, profile)
        return {k: v for k, v in profile.items() if k != "samples"}

    def _measure(
        self, model: Artifact, threads: int, work: Workdir
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The cold load and every process, each kept in the checkpoint as soon as it is done."""
        client = catalog.runtime("devices.client")
        measured: list[dict[str, Any]] = []
        with console.progress("profile", self.processes + 1) as bar:
            for index in range(self.processes + 1):
                kept = work.checkpoint / f"process-{index}.json"
                if not kept.exists():
                    load_only = index == 0
                    workload = {
                        "prompt_tokens": self.prompt_tokens,
                        "decode_tokens": self.decode_tokens,
                        "repetitions": 0 if load_only else self.prompts,
                        "prefills": self._prefills(index, measured),
                    }
                    asked = client.request(
                        model, threads=threads, workload=workload, seed=[self.seed, index], cold=load_only
                    )
                    artifact.write_json(kept, client.measure(asked, self.timeout))
                measured.append(json.loads(kept.read_text(encoding="utf-8")))
                bar.advance()
        return measured[0], measured[1:]

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


def resolve(ref: str | Path) -> Artifact:
    """What `edgesft profile` and `edgesft gate` take: an exported folder, or anything that is a model.

    Raises ArtifactError for what is missing, broken or of another kind.
    """
    from edgesft.core import models

    return models.resolve(str(ref), "onnx", "model")


def load(made: Artifact) -> dict[str, Any]:
    """The whole profile in an artefact of kind `profile`, raw samples included. Raises ArtifactError."""
    file = made.path / FILE
    found = artifact.read_json(file)
    if found is None or found.get("schema") != SCHEMA:
        raise ArtifactError(f"`{file}` is not a profile of schema {SCHEMA}")
    return found


def brief(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a person reads first: percentiles with the bound above each, rates, memory, loads."""
    found: dict[str, Any] = {}
    for name in ("ttft_ms", "tpot_ms", "latency_ms"):
        table = metrics.get(name)
        if table is None or not table.get("samples"):
            continue
        for p in (f"p{w}" for w in WANTED):
            value, high = table[p], table["high"][p]
            known = value is not None and high is not None
            found[f"{name} {p}"] = f"{value:.3g} (at most {high:.3g})" if known else table["reasons"][p]
    if metrics.get("tokens_per_second") is not None:
        found["tokens_per_second"] = metrics["tokens_per_second"]
    return found | {
        "load_ms cold": metrics["load_ms"]["cold"],
        "load_ms warm": metrics["load_ms"]["warm"],
        "peak memory MB": metrics["peak_memory_bytes"] / 1e6,
        "artefact MB": metrics["artifact_bytes"] / 1e6,
        "threads": metrics["threads"],
        "steady state": metrics["warmup"]["steady"],
    }


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


def problems(model: Artifact, tokens: int) -> list[str]:
    """Reasons why `model` cannot be run. Raises UsageError if `tokens` tokens are more than it can take."""
    found = []
    client = catalog.runtime("devices.client")
    if model.kind not in client.RUNTIMES:
        found.append(f"`{model.ref}` is of kind `{model.kind}`, expected an exported folder or a model")
    for name, key in (("export.json", "context"), ("config.json", "max_position_embeddings")):
        file = model.path / name
        if not file.is_file():
            continue
        try:
            limit = json.loads(file.read_text(encoding="utf-8")).get(key)
        except (ValueError, OSError, AttributeError) as error:
            return [*found, f"`{file}` is not readable: {error}"]
        if isinstance(limit, int) and tokens > limit:
            raise UsageError(f"{tokens} tokens asked for, `{model.ref}` takes {limit} at most")
        break
    return found


def summarise(measured: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Percentiles, rates and memory of several processes of one workload; and the samples behind them."""
    from edgesft.core import statistics

    kind = measured[0]["loaded"]["kind"]
    decoder = kind == "decoder"
    notes: list[str] = []
    found: dict[str, Any] = {"kind": kind, "ttft_ms": _refused(), "tpot_ms": _refused()}
    samples: dict[str, list[float]] = {"ttft_ms": [], "tpot_ms": []}
    cuts = {}
    for metric in ("ttft", "tpot") if decoder else ("latency",):
        pooled, cuts[metric] = _pool(measured, metric)
        found[f"{metric}_ms"] = statistics.percentiles(pooled, WANTED)
        samples[f"{metric}_ms"] = [round(t, 4) for t in pooled]
    if decoder:
        found["tokens_per_second"], found["end_to_end"] = _rates(measured, cuts["tpot"], notes)
    else:
        median = found["latency_ms"]["p50"]
        found["calls_per_second"] = None if median is None else 1000 / median
        found["tokens_per_second"] = None
    steady = all(c["steady"] for c in cuts["tpot" if decoder else "latency"])
    if not steady:
        notes.append("no steady state: latencies still changed at the end of the warm-up cut")
    memory = [m["done"] for m in measured]
    return {
        **found,
        "peak_memory_bytes": max(m["peak_bytes"] for m in memory),
        "memory": {
            "peak_bytes": [m["peak_bytes"] for m in memory],
            "peak_above_bytes": [m["peak_above_bytes"] for m in memory],
        },
        "warmup": {"steady": steady, **cuts},
        "notes": notes,
    }, samples


def _pool(measured: list[dict[str, Any]], metric: str) -> tuple[list[float], list[dict[str, Any]]]:
    """Samples of all processes in milliseconds after the warm-up cut of each, and the cuts."""
    timings = catalog.runtime("devices.client").timings
    pooled: list[float] = []
    cuts = []
    for each in measured:
        samples, warm = timings(each["repetitions"], metric)
        pooled += samples[warm.cut :]
        cuts.append({"cut": warm.cut, "samples": len(samples), "steady": warm.steady})
    return pooled, cuts


def _refused() -> dict[str, Any]:
    from edgesft.core import statistics

    return statistics.refused("an encoder generates no tokens", WANTED)


def _rates(
    measured: list[dict[str, Any]], cuts: list[dict[str, Any]], notes: list[str]
) -> tuple[float, dict[str, Any]]:
    """Decode rate after the warm-up, and the rate over the whole of every prompt beside it.

    Tokens are counted by id. A rate made of parts that do not add up to the wall time is noted.
    """
    steady: list[float] = []
    parts = seconds = 0.0
    tokens = 0
    for each, cut in zip(measured, cuts, strict=True):
        decoded = [r for r in each["repetitions"] if r["step_ns"]]
        steps = [t / 1e9 for r in decoded for t in r["step_ns"]]
        steady += steps[cut["cut"] :]
        parts += sum(steps) + sum(r["ttft_ns"] for r in decoded) / 1e9
        seconds += sum(r["wall_ns"] for r in decoded) / 1e9
        tokens += sum(len(r["step_ns"]) + 1 for r in decoded)
    if not steady:
        raise DeviceError("nothing was measured: no decode step was made")
    if seconds > 1.05 * parts:
        notes.append(f"prompts and decode steps add up to {parts:.3f} s of {seconds:.3f} s on the clock")
    ran = sum(t for m in measured for r in m["repetitions"] for t in r["step_cpu_ns"]) / 1e9
    took = sum(t for m in measured for r in m["repetitions"] for t in r["step_ns"]) / 1e9
    if ran < BUSY * took:
        notes.append(
            f"the machine is busy: the decoding thread had a core for {100 * ran / took:.0f} % of the time"
        )
    return len(steady) / sum(steady), {
        "tokens_per_second": tokens / seconds,
        "tokens": tokens,
        "seconds": seconds,
    }


def _loads(cold: dict[str, Any], measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Load times in ms. The cold one counts only if the page cache really let go of the files."""
    evicted = cold["loaded"]["evicted"]
    loads = [m["loaded"]["load_ns"] / 1e6 for m in measured]
    found: dict[str, Any] = {
        "cold": cold["loaded"]["load_ns"] / 1e6,
        "warm": plain.median(loads),
        "evicted": evicted,
    }
    if evicted < 0.9:
        found["cold"] = None
        found["reason"] = f"only {100 * evicted:.0f} % of the files could be dropped from the page cache"
    return found


def _raw(measured: dict[str, Any]) -> dict[str, Any]:
    """One process's samples in milliseconds, to a tenth of a microsecond."""

    def ms(value: int | list[int]) -> Any:  # noqa: ANN401 - a number for a number, a list for a list
        return [round(v / 1e6, 4) for v in value] if isinstance(value, list) else round(value / 1e6, 4)

    return {
        "load_ms": ms(measured["loaded"]["load_ns"]),
        "peak_bytes": measured["done"]["peak_bytes"],
        "wall_s": measured["wall_s"],
        "repetitions": [
            {k.replace("_ns", "_ms"): ms(v) for k, v in r.items() if k.endswith("_ns")}
            for r in measured["repetitions"]
        ],
    }
