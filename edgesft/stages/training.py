"""A training run of `tune`, step by step: what is recorded, what is replayed after a kill, what is reported.

A zeroth-order step is its seeds and projected gradients, so the journal alone can replay it; a snapshot now
and then shortens the replay. Other runs go on from their last snapshot. Either way the result is the same,
bit for bit, if torch computes with the same number of threads.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgesft.core import catalog, console
from edgesft.core.artifact import Artifact, Workdir
from edgesft.core.errors import Interrupted, UsageError
from edgesft.core.method import Method

if TYPE_CHECKING:
    from torch import Tensor

    from edgesft.core.data import Batch, Dataset
    from edgesft.core.protocols import Shift
    from edgesft.core.schedule import Schedule
    from edgesft.core.tuned import Tuned

DEV_POSITIONS = 8192  # supervised tokens of a dev batch at most


class Plan(Protocol):
    """What a run needs to know of its stage; see `Tune`."""

    @property
    def delta(self) -> Method: ...
    @property
    def estimate(self) -> Method: ...
    @property
    def objective(self) -> Method: ...
    @property
    def steps(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def optimizer(self) -> str: ...
    @property
    def schedule(self) -> "Schedule": ...
    @property
    def warmup(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def eval_every(self) -> int: ...
    @property
    def dev_limit(self) -> int: ...
    @property
    def snapshot_every(self) -> int: ...


class Run:
    """One training run: what is done step by step, recorded, and replayed after a kill."""

    def __init__(
        self, stage: Plan, tuned: "Tuned", dataset: "Dataset", work: Workdir, model: Artifact
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
        self.peak = peak_rss()  # what comes after is the writing
        self._write()
        return self._metrics()

    def _step(self, step: int) -> float:
        """One step: estimate, record, update. The record is on the disk before theta changes."""
        from edgesft.core.directions import Directions
        from edgesft.core.schedule import derive, rate

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
        for value in (record["loss"], *(scale for _, scale in record.get("shifts", []))):
            if not math.isfinite(value):
                self._refuse(value, record["step"] + 1)

    def _refuse(self, loss: float, step: int) -> None:
        for found in self.work.checkpoint.iterdir():  # nothing in it is worth going on from
            shutil.rmtree(found) if found.is_dir() else found.unlink()
        raise UsageError(
            f"the loss is `{loss}` at step {step}: the run diverged",
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
        if not math.isfinite(loss):
            self._refuse(loss, step)
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
        from edgesft.core.directions import Directions
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
            "peak_rss_bytes": self.peak,
        }


def peak_rss() -> int:
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
            if number == signal.SIGINT:  # a second SIGTERM is what process managers send to a whole group
                raise KeyboardInterrupt
            return
        stop.set()
        console.say("stopping after this step; once more stops at once")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
