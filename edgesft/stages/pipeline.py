"""A whole recipe as a chain of stages, each in its own folder of OUT; up-to-date ones are skipped.

The chain is data: a list of `Step`s that name their inputs. A killed run goes on because every step is an
artefact by itself; `run.json` holds what the folder as a whole was asked for.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from edgesft.core import artifact, console
from edgesft.core.artifact import Artifact
from edgesft.core.errors import ArtifactError, UsageError
from edgesft.core.params import validate
from edgesft.core.recipe import Recipe
from edgesft.core.stage import Stage, execute, request
from edgesft.stages import report

RUN = "run.json"
LIGHT = {  # of torch rows
    "prompts": 16,
    "decode_tokens": 6,
    "processes": 1,
    "prefill_seconds": 0.0,
    "contexts": (),
    "idle_seconds": (),
    "operators": False,
    "roofline": False,
    "energy": False,
}
SUMMARY = "summary.json"
REPORT = "report.html"


@dataclass(frozen=True)
class Step:
    """One stage of the chain. inputs: role -> folder name of an earlier step, or `model` / `data`."""

    name: str
    stage: Stage
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class Variant:
    """One row of the final table: a form of the model with the steps that judged it."""

    title: str
    runtime: str
    source: str  # the step (or `model`) that made it
    quality: str  # the evaluation step
    latency: str  # the profile step


@dataclass(frozen=True)
class Plan:
    """Steps in order, the rows they lead to, and a note for everything that the recipe leaves out."""

    steps: Sequence[Step]
    variants: Sequence[Variant]
    notes: Sequence[str] = field(default=())


def plan(recipe: Recipe, *, data_options: Any, threads: int, seed: int | None) -> Plan:  # noqa: ANN401
    """The chain for a recipe. data_options: `core.data.DataOptions`. Raises UsageError for a bad table."""
    from edgesft.stages.evaluate import Evaluate
    from edgesft.stages.export import Export
    from edgesft.stages.gate import Gate
    from edgesft.stages.merge import Merge
    from edgesft.stages.profile import Profile
    from edgesft.stages.sparsify import Sparsify
    from edgesft.stages.tune import Tune
    from edgesft.stages.verify import Verify

    if not recipe.tables:
        raise UsageError(f"the recipe `{recipe.name}` is empty")
    chain = _Chain(recipe, seed, {"threads": threads})
    shared = {"data_options": data_options}
    evaluate = chain.stage(Evaluate, "eval", shared)
    light = chain.stage(Profile, "profile", LIGHT)
    full = chain.stage(Profile, "profile")

    def judge(title: str, made: str, where: str, profile: Stage) -> None:
        suffix = "pretrained" if made == "model" else made
        if "eval" in recipe.tables:
            chain.add(
                f"eval-{suffix}", evaluate, {"exported" if where == "onnx" else "model": made, "data": "data"}
            )
        if "profile" in recipe.tables:
            chain.add(f"profile-{suffix}", profile, {"exported": made})
        chain.variants.append(Variant(title, where, made, f"eval-{suffix}", f"profile-{suffix}"))

    judge("pretrained", "model", "torch", light)
    current, dense = "model", "model"
    if "tune" in recipe.tables:
        tune = Tune.from_recipe(chain.table("tune"), data_options)
        chain.add("tuned-delta", tune, {"model": current, "data": "data"})
        chain.add("tuned", chain.stage(Merge, "merge"), {"model": current, "delta-0": "tuned-delta"})
        current = dense = "tuned"
        judge("tuned", current, "torch", light)
    if "sparsify" in recipe.tables:
        chain.add("sparse", chain.stage(Sparsify, "sparsify", shared), {"model": current, "data": "data"})
        current = "sparse"
        judge("sparse", current, "torch", light)
    if "export" in recipe.tables:
        export = chain.stage(Export, "export")
        for source in dict.fromkeys((dense, current)):
            name = "export-dense" if source == dense and dense != current else "export"
            chain.add(name, export, {"model": source})
            if "verify" in recipe.tables:
                chain.add(
                    f"verify-{name}", chain.stage(Verify, "verify"), {"exported": name, "model": source}
                )
            title = "sparse export" if source == "sparse" else "dense export"
            judge(title, name, "onnx", full)
        if "gate" in recipe.tables:
            if dense == current:
                chain.notes.append(
                    "no gate: without `[sparsify]` there is nothing to compare the export with"
                )
            else:
                chain.add("gate", chain.stage(Gate, "gate"), {"base": "export-dense", "head": "export"})
    return Plan(chain.steps, chain.variants, chain.notes)


class _Chain:
    """Collects steps; builds each stage from the recipe's table, the command line's values filled in."""

    def __init__(self, recipe: Recipe, seed: int | None, common: Mapping[str, Any]) -> None:
        self.recipe, self.seed, self.common = recipe, seed, common
        self.steps: list[Step] = []
        self.variants: list[Variant] = []
        self.notes: list[str] = []

    def add(self, name: str, stage: Stage, inputs: Mapping[str, str]) -> None:
        self.steps.append(Step(name, stage, inputs))

    def table(self, name: str) -> dict[str, Any]:
        """The recipe's table of a stage, the command line's seed in it."""
        return self.recipe.table(name) | ({"seed": self.seed} if self.seed is not None else {})

    def stage(self, kind: Any, table: str, more: Mapping[str, Any] | None = None) -> Any:  # noqa: ANN401
        fields = kind.__dataclass_fields__
        extra = {**self.common, **(more or {})} | ({"seed": self.seed} if self.seed is not None else {})
        values = self.recipe.table(table) | {k: v for k, v in extra.items() if k in fields}
        make = getattr(kind, "from_recipe", None)
        return make(values) if make is not None else validate(kind, values, table)


def run(chain: Plan, inputs: Mapping[str, Artifact], recipe: Recipe, out: Path) -> dict[str, Any]:
    """Run every step that is not up to date, then write the summary and the report.

    Returns the summary; `ran` in it counts the steps that did something (0: everything was up to date).
    Raises ArtifactError if `out` holds something else or another process runs there.
    """
    asked = {
        "recipe": recipe.name,
        "tables": {step.name: step.stage.params() for step in chain.steps},
        "inputs": {role: found.digest for role, found in inputs.items()},
    }
    _claim(out, asked)
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ArtifactError(
            f"another process runs in `{out}`", "wait for it, or choose another `-o`"
        ) from None
    with lock:
        artifact.write_json(out / RUN, asked)
        return _run_steps(chain, inputs, asked, out)


def _run_steps(
    chain: Plan, inputs: Mapping[str, Artifact], asked: Mapping[str, Any], out: Path
) -> dict[str, Any]:
    _check_space(chain, inputs["model"], out)
    made: dict[str, Artifact] = dict(inputs)
    seconds: dict[str, float] = {}
    for number, step in enumerate(chain.steps, start=1):
        begin = time.monotonic()
        needed = {role: made[name] for role, name in step.inputs.items()}
        fresh = artifact.finished(out / step.name, request(step.stage, needed)) is None
        if fresh:
            console.say(f"[{number}/{len(chain.steps)}] {step.name}")
        made[step.name], ran = execute(step.stage, needed, out / step.name)
        if ran:
            seconds[step.name] = round(time.monotonic() - begin, 2)
    previous = artifact.read_json(out / SUMMARY) or {}
    complete = bool(previous) and not seconds and (out / REPORT).is_file()
    if complete:
        return {**previous, "ran": 0}
    times = {**previous.get("seconds", {}), **seconds}
    summary = {
        "schema": 1,
        "request": artifact.digest_json(asked),
        "recipe": asked["recipe"],
        "model": inputs["model"].ref,
        "data": inputs["data"].ref,
        "variants": [_row(variant, made) for variant in chain.variants],
        "verdict": _verdict(made),
        "notes": list(chain.notes),
        "seconds": times,
    }
    artifact.write_bytes(out / REPORT, report.html(summary, made).encode())
    artifact.write_json(out / SUMMARY, summary)
    return {**summary, "ran": len(seconds)}


def _claim(out: Path, asked: Mapping[str, Any]) -> None:
    """Make `out`, or refuse it when it holds anything but this very run."""
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"`{out}` is a file, expected a folder to write into")
    previous = artifact.read_json(out / RUN)
    if previous is None:
        if out.exists() and any(p.name != ".lock" for p in out.iterdir()):
            raise ArtifactError(f"`{out}` holds something that is not a run", "choose another `-o`")
        out.mkdir(parents=True, exist_ok=True)
        return
    why = artifact.first_difference(previous, asked)
    if why:
        raise ArtifactError(f"`{out}` holds another run: {why}", "choose another `-o` or remove it")


def _check_space(chain: Plan, model: Artifact, out: Path) -> None:
    """Refuse early when the disk cannot hold a delta and two copies of the model besides two exports."""
    writers = [s for s in chain.steps if s.stage.gives in ("delta", "model", "onnx")]
    needed = sum(model.bytes for s in writers if not (out / s.name / artifact.MANIFEST).is_file())
    free = shutil.disk_usage(out).free
    if free < needed:
        raise ArtifactError(
            f"`{out}` has {free / 1e9:.1f} GB of free disk, this run may write {needed / 1e9:.1f} GB"
        )


def _row(variant: Variant, made: Mapping[str, Artifact]) -> dict[str, Any]:
    quality = made[variant.quality].metrics if variant.quality in made else {}
    latency = made[variant.latency].metrics if variant.latency in made else {}
    tpot, ttft = latency.get("tpot_ms") or {}, latency.get("ttft_ms") or {}
    return {
        "stage": variant.title,
        "runtime": variant.runtime,
        "accuracy": quality.get("accuracy"),
        "accuracy_interval": (quality.get("intervals") or {}).get("accuracy"),
        "loss": quality.get("loss"),
        "perplexity": quality.get("perplexity"),
        "bytes": made[variant.source].bytes,
        "ttft_ms_p50": ttft.get("p50"),
        "tpot_ms_p50": tpot.get("p50"),
        "tpot_ms_p99": tpot.get("p99"),
        "tokens_per_second": latency.get("tokens_per_second"),
        "peak_memory_bytes": latency.get("peak_memory_bytes"),
    }


def _verdict(made: Mapping[str, Artifact]) -> dict[str, Any] | None:
    return dict(made["gate"].metrics) if "gate" in made else None


def judge(summary: Mapping[str, Any]) -> None:
    """Raise the gate's verdict, if the run has one and it is not a pass."""
    if summary["verdict"] is not None:
        from edgesft.stages import gate

        gate.judge(summary["verdict"], summary["verdict"].get("inconclusive", "report"))


def preview(chain: Plan, inputs: Mapping[str, Artifact], out: Path) -> dict[str, Any]:
    """What `run` would do: a state for every step, and what was left out."""
    states = {
        step.name: "done" if (out / step.name / artifact.MANIFEST).is_file() else "to run"
        for step in chain.steps
    }
    return {
        "out": str(out),
        "inputs": {role: {"ref": a.ref, "bytes": a.bytes} for role, a in inputs.items()},
        "steps": states,
        "notes": list(chain.notes),
    }
