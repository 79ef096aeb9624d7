"""Train a delta on data: any selection, delta, estimate and objective that fit together.

What a killed run needs to go on bit for bit lies in the checkpoint: a journal of the steps, and a snapshot
now and then. A zeroth-order step is its seeds and projected gradients, so the journal alone can replay it.
"""

import json
import math
import resource
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, InstanceOf, WithJsonSchema

from edgesft.core import catalog, console
from edgesft.core.artifact import Artifact, Workdir
from edgesft.core.data import DataOptions
from edgesft.core.errors import Interrupted, UsageError
from edgesft.core.method import Method
from edgesft.core.params import BatchSize, Count, LearningRate, Seed, Steps, validate

if TYPE_CHECKING:
    from torch import Tensor

    from edgesft.core.data import Batch, Dataset
    from edgesft.core.protocols import Shift
    from edgesft.core.tuned import Tuned

AXES = ("select", "delta", "estimate", "objective")
DEFAULTS = {"select": "everything", "delta": "sparse", "estimate": "backprop", "objective": "task"}
DEV_POSITIONS = 8192  # supervised tokens of a dev batch at most
Chosen = Annotated[InstanceOf[Method], WithJsonSchema({"type": "object"})]  # built and checked before
Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class Tune:
    """MODEL + DATA -> delta.

    Raises ArtifactError (model, data), UsageError (methods that do not fit together, a loss that is not
    finite), Interrupted (stopped by a signal; the checkpoint is kept).
    """

    name: ClassVar[str] = "tune"
    gives: ClassVar[str] = "delta"

    select: Chosen
    delta: Chosen
    estimate: Chosen
    objective: Chosen
    data: DataOptions = field(default_factory=DataOptions)
    steps: Steps = 300
    seed: Seed = 0
    lr: LearningRate = 1e-6
    batch_size: BatchSize = 16
    optimizer: Annotated[
        Literal["sgd", "adam"], Field(description="sgd keeps nothing, adam two numbers a trained value")
    ] = "sgd"
    schedule: Annotated[
        Literal["constant", "linear", "cosine"],
        Field(description="of the learning rate: flat, or down to 0"),
    ] = "constant"
    warmup: Annotated[Fraction, Field(description="share of the steps that the learning rate rises")] = 0.0
    weight_decay: Annotated[Fraction, Field(description="decoupled weight decay")] = 0.0
    eval_every: Annotated[int, Field(ge=0, description="steps between dev evaluations; 0: ends only")] = 0
    dev_limit: Annotated[Count, Field(description="dev examples used at most")] = 128
    snapshot_every: Annotated[Count, Field(description="steps between snapshots to resume from")] = 200

    @classmethod
    def from_recipe(cls, table: Mapping[str, Any], data: DataOptions | None = None) -> "Tune":
        """A stage from a recipe's `[tune]` table: its own values and one table an axis.

        Raises UsageError for unknown keys (with the nearest name), bad values, and an axis that it has not.
        """
        values = dict(table)
        for axis in catalog.AXES:
            if axis in values and axis not in AXES:
                raise UsageError(f"`tune` has no axis `{axis}` yet", "known: " + ", ".join(AXES))
        for axis in AXES:
            chosen = values.get(axis, {"use": DEFAULTS[axis]})
            values[axis] = catalog.build(axis, dict(chosen))
        stage = validate(cls, values | ({} if data is None else {"data": data}), "tune")
        stage._check_fit()
        return stage

    def params(self) -> dict[str, Any]:
        """Everything that decides the result. `snapshot_every` does not, so it is left out."""
        own = {k: v for k, v in vars(self).items() if k not in (*AXES, "data", "snapshot_every")}
        methods = {axis: catalog.describe(axis, getattr(self, axis)) for axis in AXES}
        return own | methods | {"data": {k: _plain(v) for k, v in vars(self.data).items()}}

    def problems(self, inputs: Mapping[str, Artifact]) -> list[str]:
        return []

    @property
    def in_place(self) -> bool:
        """Whether theta is the weight itself: a zeroth-order estimate and a delta that allows it."""
        return bool(getattr(self.delta, "in_place", False)) and not _exact(self.estimate)

    def run(self, inputs: Mapping[str, Artifact], work: Workdir) -> dict[str, Any]:
        from edgesft.core import data as datasets
        from edgesft.core import models

        self._check_fit()
        model = models.load(inputs["model"].path)
        tokenizer = models.tokenizer(inputs["model"].path)
        dataset = datasets.open_data(inputs["data"], self.data, tokenizer)
        total = sum(p.numel() for p in model.parameters())
        with self._tuned(model) as tuned:
            run = _Run(self, tuned, dataset, work, inputs["model"])
            try:
                metrics = run.train()
            finally:
                run.close()
            return {"parameters": total, "trained_fraction": run.trainable / total, **metrics}

    def _tuned(self, model: Any) -> "Tuned":  # noqa: ANN401 - nn.Module, which only torch has
        from edgesft.core import models
        from edgesft.core.tuned import Tuned

        layers = models.linears(model)
        regions = {}
        for name, layer in layers.items():
            region = self.select.region(name, layer.weight.detach(), None, 0.0)  # type: ignore[attr-defined]
            if region is not None:
                regions[name] = region
        if not regions:
            raise UsageError("the selection leaves nothing to train")
        kernel = catalog.runtime("kernels.perturb")
        return Tuned(
            model, layers, regions, self.delta, in_place=self.in_place, kernel=kernel, seed=self.seed
        )

    def _check_fit(self) -> None:
        if self.select.needs:
            raise UsageError(f"the selection needs the signal `{min(self.select.needs)}`, which tune lacks")
        if self.in_place and self.optimizer != "sgd":
            raise UsageError(
                f"the optimizer `{self.optimizer}` keeps two numbers a weight, which in-place zeroth-order "
                "tuning avoids",
                "--set tune.optimizer=sgd, or delta.use=lora",
            )


class _Run:
    """One training run: what is done step by step, recorded, and replayed after a kill."""

    def __init__(
        self, stage: Tune, tuned: "Tuned", dataset: "Dataset", work: Workdir, model: Artifact
    ) -> None:
        from edgesft.core.journal import Journal
        from edgesft.core.optim import OPTIMIZERS

        self.stage, self.tuned, self.dataset, self.work, self.model = stage, tuned, dataset, work, model
        self.trainable = tuned.trainable
        self.optimizer = OPTIMIZERS[stage.optimizer](stage.weight_decay)
        self.journal = Journal(work.checkpoint / "journal.jsonl")
        self.steps: dict[int, dict[str, Any]] = {}  # step -> loss, lr, shifts, active
        self.evals: dict[int, dict[str, Any]] = {}  # steps done -> dev_loss, dev_accuracy
        for record in self.journal.records:
            known = self.evals if "dev_loss" in record else self.steps
            known[record["step"]] = known.get(record["step"], {}) | record
        self.stop = threading.Event()
        self.seconds: list[float] = []
        self.forward_seconds = 0.0

    def close(self) -> None:
        self.journal.close()

    # ------------------------------------------------------------ the loop

    def train(self) -> dict[str, Any]:
        stage = self.stage
        with _signals_set(self.stop):
            done = self._resume()
            with console.progress("tune", stage.steps, done) as bar:
                for step in range(done, stage.steps):
                    self._evaluate(step)
                    self._stop_if_asked(step)
                    loss = self._step(step)
                    bar.advance(1, f"loss {loss:.4f}")
                    if (step + 1) % stage.snapshot_every == 0 and step + 1 < stage.steps:
                        self._snapshot(step + 1)
            self._evaluate(stage.steps)
        self._write()
        return self._metrics()

    def _step(self, step: int) -> float:
        """One step: estimate, record, update. The record is on the disk before theta changes."""
        from edgesft.core.optim import Directions, derive, rate

        stage, began, forward = self.stage, time.perf_counter(), 0.0
        lr = rate(step, stage.steps, stage.lr, stage.schedule, stage.warmup)
        loss = self.tuned.loss(stage.objective, self._batch(step))  # type: ignore[arg-type]

        def timed(shift: "Shift | None") -> "Tensor":
            nonlocal forward
            start = time.perf_counter()
            value = loss(shift)
            forward += time.perf_counter() - start
            return value

        self.tuned.setting.progress = step / stage.steps
        gradient = stage.estimate.gradient(  # type: ignore[attr-defined]
            timed, self.tuned.theta, derive(stage.seed, "step", step)
        )
        record: dict[str, Any] = {"step": step, "loss": gradient.loss, "lr": lr}
        lazy = isinstance(gradient, Directions)
        if lazy:
            record["shifts"] = [[s.seed, s.scale] for s in gradient.shifts]
        self._refuse_divergence(record)
        self.journal.append(record, sync=lazy)
        self.steps[step] = record
        self._update(step, gradient, lr)
        self.seconds.append(time.perf_counter() - began)
        self.forward_seconds += forward
        return float(gradient.loss)

    def _update(self, step: int, gradient: Any, lr: float) -> None:  # noqa: ANN401 - a Gradient
        if not self.tuned.in_place:
            self.optimizer.step(self.tuned.theta, gradient, lr)
            return
        active = {"step": step, "active": self.tuned.descend(gradient, lr, self.stage.weight_decay)}
        if "active" not in self.steps[step]:
            self.journal.append(active, sync=False)
        self.steps[step] |= active

    def _refuse_divergence(self, record: Mapping[str, Any]) -> None:
        values = [record["loss"], *(scale for _, scale in record.get("shifts", []))]
        if all(math.isfinite(v) for v in values):
            return
        for found in self.work.checkpoint.iterdir():  # nothing in it is worth going on from
            shutil.rmtree(found) if found.is_dir() else found.unlink()
        raise UsageError(
            f"the loss is `{record['loss']}` at step {record['step'] + 1}: the run diverged",
            f"lower the learning rate: `--set tune.lr={self.stage.lr / 10:g}`",
        )

    def _stop_if_asked(self, step: int) -> None:
        if self.stop.is_set():
            if step:
                self._snapshot(step)
            raise Interrupted(
                f"stopped after {step} of {self.stage.steps} steps; the checkpoint is saved",
                "the same command goes on from there",
            )

    # ------------------------------------------------------------ data and evaluation

    def _batch(self, step: int) -> "Batch":
        """The batch of a step depends on nothing but the seed and the step."""
        return self.dataset.batch("train", step, self.stage.batch_size, self.stage.seed).torch()

    def _evaluate(self, step: int) -> None:
        every = self.stage.eval_every
        due = step in (0, self.stage.steps) or (every and step % every == 0)
        if not due or step in self.evals:
            return
        loss, accuracy = self._dev(step)
        record = {"step": step, "dev_loss": loss, "dev_accuracy": accuracy}
        self.journal.append(record)
        self.evals[step] = record

    def _dev(self, step: int) -> tuple[float, float | None]:
        """Mean task loss over the dev examples, and accuracy where there are answers to choose from.

        The loss is that of `objective:task` whatever is trained for, so that runs can be compared.
        """
        import torch

        task: Any = catalog.load("objective", "task")()
        loss, correct, count, chosen = 0.0, 0, 0, 0
        for arrays in self.dataset.batches("dev", self.stage.batch_size, self.stage.dev_limit, DEV_POSITIONS):
            self._stop_if_asked(step)
            batch = arrays.torch()
            with torch.no_grad():
                total, hits = task.assess(self.tuned.model, batch)
            answers = len(batch.targets if batch.gold is None else batch.gold)
            loss, count = loss + total * answers, count + answers
            if hits is not None:
                correct, chosen = correct + hits, chosen + answers
        return loss / count, correct / chosen if chosen else None

    # ------------------------------------------------------------ checkpoint

    def _snapshot(self, step: int) -> None:
        """theta after `step` steps, in a folder that counts once its one file is whole."""
        from edgesft.core import delta_file
        from edgesft.core.weights import Planned, dtype_name, write_file

        self.journal.sync()
        folder = self.work.checkpoint / f"snapshot-{step}"
        folder.mkdir(exist_ok=True)
        if self.tuned.in_place:
            delta_file.save(
                folder,
                self.tuned,
                catalog.describe("delta", self.stage.delta),
                delta_file.base_of(self.model.path),
            )
        else:
            state = {f"theta/{k}": v for k, v in self.tuned.theta.items()}
            state |= {f"optimizer/{k}": v for k, v in self.optimizer.state().items()}
            plan = [Planned(k, dtype_name(v.dtype), tuple(v.shape)) for k, v in state.items()]
            write_file(folder / delta_file.FILE, plan, state.__getitem__)
        for old, path in self._snapshots():
            if old != step:
                shutil.rmtree(path)

    def _snapshots(self) -> list[tuple[int, Path]]:
        """(step, folder) of the whole ones, oldest first."""
        from edgesft.core.delta_file import FILE

        found = [p for p in self.work.checkpoint.glob("snapshot-*") if (p / FILE).is_file()]
        return sorted((int(p.name.partition("-")[2]), p) for p in found)

    def _resume(self) -> int:
        """Bring theta to where the last run was; returns how many steps are done."""
        from edgesft.core.optim import Directions
        from edgesft.core.protocols import Shift

        done = 0
        if snapshots := self._snapshots():
            done, folder = snapshots[-1]
            self._restore(folder)
        while (record := self.steps.get(done)) is not None and "shifts" in record:
            shifts = tuple(Shift(seed, scale) for seed, scale in record["shifts"])
            self._update(done, Directions(record["loss"], shifts, self.tuned.theta), record["lr"])
            done += 1
        if done:
            console.say(f"going on after {done} of {self.stage.steps} steps")
        return done

    def _restore(self, folder: Path) -> None:
        from edgesft.core import delta_file
        from edgesft.core.weights import Weights

        if self.tuned.in_place:
            saved, base = delta_file.load(folder), delta_file.base_of(self.model.path)
            for name, layer in self.tuned.layers.items():
                layer.base.weight.data.copy_(saved.effective(name, base(name)))
            return
        state = {name: tensor.clone() for name, tensor in Weights(folder / delta_file.FILE).items()}
        for name, p in self.tuned.theta.items():
            p.copy_(state[f"theta/{name}"])
        self.optimizer.restore(
            {k.removeprefix("optimizer/"): v for k, v in state.items() if k.startswith("optimizer/")}
        )

    # ------------------------------------------------------------ results

    def _write(self) -> None:
        """The delta, and metrics.jsonl: line n is what is known after n steps. Nothing in them depends on
        the clock, so equal runs give equal bytes."""
        self._save(self.work.path)
        lines = []
        for done in range(self.stage.steps + 1):
            line: dict[str, Any] = {"step": done}
            if record := self.steps.get(done - 1):
                line |= {"loss": record["loss"], "lr": record["lr"]}
                if "shifts" in record:
                    line["projected_gradient"] = math.fsum(scale for _, scale in record["shifts"])
                if "active" in record:
                    line["active_fraction"] = record["active"] / self._tunable
            if evaluated := self.evals.get(done):
                line |= {k: evaluated[k] for k in ("dev_loss", "dev_accuracy")}
            lines.append(json.dumps(line) + "\n")
        (self.work.path / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")

    def _save(self, folder: Path) -> None:
        from edgesft.core import delta_file

        table = catalog.describe("delta", self.stage.delta)
        delta_file.save(folder, self.tuned, table, delta_file.base_of(self.model.path))

    @property
    def _tunable(self) -> int:
        return sum(layer.base.weight.numel() for layer in self.tuned.layers.values())

    def _metrics(self) -> dict[str, Any]:
        losses = [self.steps[i]["loss"] for i in range(self.stage.steps)]
        part = max(1, min(20, len(losses) // 5))  # single losses of batches are noise
        first, last = self.evals[0], self.evals[self.stage.steps]
        best = min(self.evals.values(), key=lambda e: (e["dev_loss"], e["step"]))
        active = self.steps[self.stage.steps - 1].get("active")
        spent = sum(self.seconds)
        return {
            "loss_first": statistics.fmean(losses[:part]),
            "loss_last": statistics.fmean(losses[-part:]),
            "dev_loss_before": first["dev_loss"],
            "dev_loss_after": last["dev_loss"],
            "dev_loss_best": best["dev_loss"],
            "dev_best_step": best["step"],
            "dev_accuracy_before": first["dev_accuracy"],
            "dev_accuracy_after": last["dev_accuracy"],
            "steps": self.stage.steps,
            "trainable_values": self.trainable,
            "trained_fraction_of_layers": self.trainable / self._tunable,
            "active_fraction": None if active is None else active / self._tunable,
            "in_place": self.tuned.in_place,
            "seconds_per_step": statistics.median(self.seconds) if self.seconds else None,
            "forward_fraction": self.forward_seconds / spent if spent else None,
            "peak_rss_bytes": _peak_rss(),
        }


def _peak_rss() -> int:
    """Largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def _signals_set(stop: threading.Event) -> Iterator[None]:
    """The first SIGINT or SIGTERM sets `stop`, so that a step ends and a checkpoint is saved; the second
    SIGINT interrupts at once. Only the main thread may listen to signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:  # noqa: ANN401 - a frame
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        console.say("stopping after this step; once more stops at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exact(estimate: Method) -> bool:
    """Whether the estimate back-propagates, so that theta must be a tensor of its own."""
    return not getattr(estimate, "forward_only", False)


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON
    return dict(value) if isinstance(value, Mapping) else value
