"""A training run of `tune`, step by step: what is recorded, what is replayed after a kill, what is reported.

A zeroth-order step is its seeds and projected gradients, so the journal alone can replay it. Whatever happens
in between, the result is the same, bit for bit, if the runtime computes with the same number of threads.
Over several ranks each computes the losses of its own rows; scalars are all that is exchanged.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgesft.core import console
from edgesft.core.artifact import Workdir
from edgesft.core.data.batches import TOGETHER_TOKENS
from edgesft.core.errors import Interrupted, UsageError
from edgesft.stages.tuning import guard
from edgesft.stages.tuning.shared import StepLoss

if TYPE_CHECKING:
    from edgesft.core.data import Dataset
    from edgesft.core.data.batches import ArrayBatch
    from edgesft.core.tuning.ranks import Ranks
    from edgesft.stages.tuning.plan import Plan
    from edgesft.stages.tuning.trainee import Trainee

DEV_POSITIONS = 8192  # supervised tokens of a dev batch at most


class Run:
    """One training run: what is done step by step, recorded, and replayed after a kill.

    tuned: gives losses, `assess` and `setting`. work: None for the ranks that only follow.
    """

    def __init__(
        self,
        stage: "Plan",
        tuned: Any,  # noqa: ANN401 - core.tuning.tuned.Tuned, or another Tunable
        trainee: "Trainee",
        dataset: "Dataset",
        work: Workdir | None,
        ranks: "Ranks | None" = None,
    ) -> None:
        from edgesft.core.journal import Journal

        self.stage, self.tuned, self.trainee, self.dataset = stage, tuned, trainee, dataset
        self.work, self.ranks = work, ranks
        self.journal = None if work is None else Journal(work.checkpoint / "journal.jsonl")
        self.steps: dict[int, dict[str, Any]] = {}  # step -> loss, lr, shifts, active, or skipped
        self.evals: dict[int, dict[str, Any]] = {}  # steps done -> dev_loss, dev_accuracy
        self.backs: list[dict[str, Any]] = []  # leaps: when, and from which step on it was undone
        self.kept: list[int] = []  # steps whose updates the weights hold, in order
        self.skips = guard.Skips()
        for record in self._shared_records():
            self._learn(record)
        self.trainable = trainee.trainable
        self.stop = threading.Event()
        self.seconds: list[float] = []
        self.forward_seconds = 0.0
        self.ended = stage.steps  # earlier if it stops early
        self.found: dict[str, Any] | None = None  # the learning rate, where it was looked for

    def close(self) -> None:
        if self.journal is not None:
            self.journal.close()

    def _shared_records(self) -> Sequence[Mapping[str, Any]]:
        """The journal's records; followers have them from the leader."""
        records = [] if self.journal is None else self.journal.records
        if self.ranks is None or self.ranks.world == 1:
            return list(records)
        data = self.ranks.broadcast(json.dumps(records).encode() if self.ranks.leader else None)
        shared: list[Mapping[str, Any]] = json.loads(data)
        for record in shared:
            if "shifts" in record:
                self.ranks.log.add(record["step"], [record["loss"], *(s[1] for s in record["shifts"])])
        return shared

    def _learn(self, record: Mapping[str, Any]) -> None:
        """Take in what a record says, as it was when it was written."""
        if "lr_found" in record:
            self.found = dict(record)
            return
        step = int(record["step"])
        if "dev_loss" in record:
            self.evals[step] = dict(record)
        elif "back" in record:
            self._undo(dict(record))
        else:
            new = step not in self.steps
            self.steps[step] = self.steps.get(step, {}) | dict(record)
            if new and "skipped" in record:
                self.skips.add(step)
            elif new:
                self.kept.append(step)

    def _record(self, record: Mapping[str, Any], *, sync: bool = True) -> None:
        if self.journal is not None:
            self.journal.append(record, sync=sync)

    @property
    def _speaks(self) -> bool:
        """Whether this process tells the user: alone, or the first of the ranks."""
        return self.ranks is None or self.ranks.leader

    # ------------------------------------------------------------ the loop

    def train(self) -> dict[str, Any]:
        stage = self.stage
        with _signals_set(self.stop):
            done = self._resume()
            if stage.lr == "auto" and self.found is None:
                self._find_lr()
            with console.progress("tune", stage.steps, done, shown=self._speaks) as bar:
                for step in range(done, stage.steps):
                    self._evaluate(step)
                    if guard.exhausted(self.evals, stage.patience):
                        self.ended = step
                        break
                    self._stop_if_asked(step)
                    loss = self._step(step)
                    bar.advance(1, f"loss {loss:.4f}")
                    if (step + 1) % stage.snapshot_every == 0 and step + 1 < stage.steps:
                        self._sync()
                        self.trainee.snapshot(step + 1)
            self._evaluate(self.ended, last=True)
        if self.ranks is not None and self.ranks.world > 1:
            self.ranks.agree(weights=self.trainee.digest())
        self.peak = peak_rss()  # what comes after is the writing
        if self.work is not None:
            self._write()
        return self._metrics()

    def _step(self, step: int) -> float:
        """One step: estimate, record, update. The record is on the disk before theta changes."""
        from edgesft.core.tuning.directions import Directions
        from edgesft.core.tuning.schedule import derive, rate

        stage, began = self.stage, time.perf_counter()
        lr = rate(step, stage.steps, self.lr, stage.schedule, stage.warmup)
        lr *= guard.FACTOR ** len(self.backs)
        loss, share = self._loss(step)
        if hasattr(self.tuned, "setting"):
            self.tuned.setting.progress = step / stage.steps
        gradient = self._gradient(loss, share, derive(stage.seed, "step", step))
        record: dict[str, Any] = {"step": step, "loss": gradient.loss, "lr": lr}
        lazy = isinstance(gradient, Directions)
        if lazy:
            record["shifts"] = [[s.seed, s.scale, s.law, s.rank] for s in gradient.shifts]
        if not guard.finite([record["loss"], *(shift[1] for shift in record.get("shifts", []))]):
            return self._skip(record)
        self._record(record, sync=lazy)
        self.steps[step] = record
        self.kept.append(step)
        if self.ranks is not None:
            self.ranks.log.add(step, [record["loss"], *(shift[1] for shift in record.get("shifts", []))])
        self.trainee.take(record, gradient)
        if "active" in record:
            self._record({"step": step, "active": record["active"]}, sync=False)
        self.seconds.append(time.perf_counter() - began)
        self.forward_seconds += loss.seconds
        if stage.guard and self.trainee.in_place and guard.leapt(self._losses()):
            self._back(step + 1)
        return float(gradient.loss)

    @property
    def lr(self) -> float:
        """The stage's learning rate, or the one that was found for it."""
        if self.found is not None:
            return float(self.found["lr_found"])
        assert not isinstance(self.stage.lr, str)
        return self.stage.lr

    def _find_lr(self) -> None:
        from edgesft.stages.tuning import lr_search

        stage = self.stage
        with console.progress("find a learning rate", lr_search.DIRECTIONS, shown=self._speaks) as bar:
            trials = lr_search.search(
                lambda k: (self._loss(2 * k)[0], self._loss(2 * k + 1)[0]),
                lambda loss, seed: stage.estimate.gradient(loss, {}, seed).shifts,  # type: ignore[attr-defined]
                stage.seed,
                note=lambda: bar.advance(1, ""),
            )
        best = lr_search.best(trials)
        if best is None:
            raise UsageError(
                f"no learning rate from {trials[0].lr:g} to {trials[-1].lr:g} lowers the loss",
                "name one: `--set tune.lr=1e-5`; or a larger batch: `--set tune.batch_size=32`",
            )
        table = [[t.lr, t.change, t.error] for t in trials]
        self.found = {"lr_found": best.lr, "trials": table}
        self._record(self.found)
        console.say(f"learning rate {best.lr:.2g}: the loss changes by {best.change:.2g} a step")

    def _gradient(self, loss: StepLoss, share: float, seed: int) -> Any:  # noqa: ANN401 - a Gradient
        """The estimate's, of the whole batch. Scalars were averaged inside the loss; tensors are here."""
        estimate: Any = self.stage.estimate
        if self._scalars or self.ranks is None or self.ranks.world == 1:
            return estimate.gradient(loss, self.trainee.params, seed)
        from edgesft.core.tuning import sharding

        own = None if loss.empty else estimate.gradient(loss, self.trainee.params, seed)
        return sharding.joined(own, self.trainee.params, self.ranks, share)

    @property
    def _scalars(self) -> bool:
        """Whether the estimate needs losses only."""
        return bool(getattr(self.stage.estimate, "forward_only", False))

    def _loss(self, step: int) -> tuple[StepLoss, float]:
        """The loss of the step's batch, and this rank's share of it."""
        batch = self._batch(step)
        if self.ranks is None or self.ranks.world == 1:
            alone = self.tuned.loss(self.stage.objective, batch)
            return StepLoss(
                alone, None, prefers_together=bool(getattr(alone, "prefers_together", False))
            ), 1.0
        ranks = self.ranks
        own, share = ranks.split(batch)

        def exchange(values: Sequence[float]) -> Sequence[float]:
            return ranks.mean(values, share)

        loss = None if own is None else self.tuned.loss(self.stage.objective, own)
        short = batch.input_ids.size <= ranks.world * TOGETHER_TOKENS
        return StepLoss(loss, exchange if self._scalars else None, prefers_together=short), share

    def _losses(self) -> list[float]:
        return [self.steps[k]["loss"] for k in self.kept]

    def _skip(self, record: Mapping[str, Any]) -> float:
        """Leave the weights as they are after a loss that is no number; too many in a row end the run."""
        step, loss = record["step"], float(record["loss"])
        skipped = {"step": step, "skipped": str(loss), "lr": record["lr"]}
        self._record(skipped)
        self.steps[step] = skipped
        if self.skips.add(step):
            self._refuse(loss, step + 1)
        return loss

    def _back(self, step: int) -> None:
        """Undo the last steps and go on with half of the learning rate: the loss has leapt."""
        first = self.kept[-guard.BACK]
        record = {"step": step, "back": first}
        self._record(record)
        self._undo(record)
        self.trainee.back(self.steps, self.kept)
        console.warn(
            f"the loss leapt before step {step}: steps from {first} on are taken back, "
            f"the learning rate is halved"
        )

    def _undo(self, record: dict[str, Any]) -> None:
        self.backs.append(record)
        self.kept = [k for k in self.kept if k < record["back"]]
        self.evals = {k: v for k, v in self.evals.items() if k <= record["back"]}

    def _refuse(self, loss: float, step: int) -> None:
        if self.work is not None:
            for found in self.work.checkpoint.iterdir():  # nothing in it is worth going on from
                shutil.rmtree(found) if found.is_dir() else found.unlink()
        counted = f", and {len(self.skips.steps)} steps were skipped" if self.skips.steps else ""
        raise UsageError(
            f"the loss is `{loss}` at step {step}{counted}: the run diverged",
            f"lower the learning rate: `--set tune.lr={self.lr / 10:g}`",
        )

    def _stop_if_asked(self, step: int) -> None:
        asked = self.stop.is_set()
        if self.ranks is not None and self.ranks.world > 1:
            if asked:
                self.ranks.ask_to_stop()
            asked = self.ranks.stopping  # as of the last exchange, so that all stop after the same step
        if asked:
            if step:
                self._sync()
                self.trainee.snapshot(step)
            raise Interrupted(
                f"stopped after {step} of {self.stage.steps} steps; the checkpoint is saved",
                "the same command goes on from there",
            )

    def _sync(self) -> None:
        if self.journal is not None:
            self.journal.sync()

    def _resume(self) -> int:
        """Bring the weights to where the last run was; returns how many steps are done."""
        done = self.trainee.resume(self.steps, self.kept)
        for step in [s for s in self.steps if s >= done]:  # not replayable: they will be taken again
            del self.steps[step]
        self.kept = [k for k in self.kept if k < done]
        if done:
            console.say(f"going on after {done} of {self.stage.steps} steps")
        return done

    # ------------------------------------------------------------ data and evaluation

    def _batch(self, step: int) -> "ArrayBatch":
        """The batch of a step depends on nothing but the seed and the step."""
        return self.dataset.batch("train", step, self.stage.batch_size, self.stage.seed)

    def _evaluate(self, step: int, *, last: bool = False) -> None:
        every = self.stage.eval_every
        due = step == 0 or last or (every and step % every == 0)
        if not due or step in self.evals:
            return
        loss, accuracy = self._dev(step)
        if not math.isfinite(loss):
            self._refuse(loss, step)
        record = {"step": step, "dev_loss": loss, "dev_accuracy": accuracy}
        self._record(record)
        self.evals[step] = record
        if self.best == step:
            self.trainee.note_best(step)

    @property
    def best(self) -> int:
        """How many steps were done at the lowest dev loss so far."""
        return min(self.evals, key=lambda s: (self.evals[s]["dev_loss"], s))

    def _dev(self, step: int) -> tuple[float, float | None]:
        """Mean task loss over the dev examples, and accuracy where there are answers to choose from.

        The loss is that of `objective:task` whatever is trained for, so that runs can be compared. Ranks take
        the batches in turn.
        """
        sums = [0.0, 0.0, 0.0, 0.0]  # loss, answers, right ones, answers that could be right
        world, rank = (1, 0) if self.ranks is None else (self.ranks.world, self.ranks.rank)
        batches = self.dataset.batches("dev", self.stage.batch_size, self.stage.dev_limit, DEV_POSITIONS)
        for index, batch in enumerate(batches):
            if world == 1:
                self._stop_if_asked(step)
            if index % world != rank:
                continue
            loss, hits = self.tuned.assess(batch)
            answers = len(batch.targets if batch.gold is None else batch.gold)
            seen = (loss * answers, answers, hits or 0, 0 if hits is None else answers)
            sums = [total + value for total, value in zip(sums, seen, strict=True)]
        if self.ranks is not None and world > 1:
            sums = self.ranks.mean(sums, 1.0)
        loss, count, correct, chosen = sums
        return loss / count, correct / chosen if chosen else None

    # ------------------------------------------------------------ results

    def _write(self) -> None:
        """The delta, and metrics.jsonl: line n is what is known after n steps. Nothing in them depends on
        the clock, so equal runs give equal bytes."""
        assert self.work is not None
        self.trainee.save(self.work.path, self.steps, self.kept, self.ended, self.best)
        lines = []
        for done in range(self.ended + 1):
            line: dict[str, Any] = {"step": done}
            if record := self.steps.get(done - 1):
                line |= {k: record[k] for k in ("loss", "lr", "skipped") if k in record}
                if "shifts" in record:
                    line["projected_gradient"] = math.fsum(shift[1] for shift in record["shifts"])
                if "active" in record:
                    line["active_fraction"] = record["active"] / self.trainee.entries
            if evaluated := self.evals.get(done):
                line |= {k: evaluated[k] for k in ("dev_loss", "dev_accuracy")}
            lines.append(json.dumps(line) + "\n")
        (self.work.path / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")

    def _metrics(self) -> dict[str, Any]:
        losses = self._losses()
        part = max(1, min(20, len(losses) // 5))  # single losses of batches are noise
        first, last, best = self.evals[0], self.evals[self.ended], self.evals[self.best]
        active = self.steps[self.kept[-1]].get("active") if self.kept else None
        spent, entries = sum(self.seconds), self.trainee.entries
        return {
            "loss_first": statistics.fmean(losses[:part]) if losses else None,
            "loss_last": statistics.fmean(losses[-part:]) if losses else None,
            "dev_loss_before": first["dev_loss"],
            "dev_loss_after": last["dev_loss"],
            "dev_loss_best": best["dev_loss"],
            "dev_best_step": best["step"],
            "dev_accuracy_before": first["dev_accuracy"],
            "dev_accuracy_after": last["dev_accuracy"],
            "lr": self.lr,
            "lr_trials": None if self.found is None else self.found["trials"],
            "steps": self.ended,
            "steps_skipped": len(self.skips.steps),
            "steps_taken_back": self.ended - len(self.kept) - len(self.skips.steps),
            "trainable_values": self.trainable,
            "trained_fraction_of_layers": self.trainable / entries,
            "active_fraction": None if active is None else active / entries,
            "in_place": self.trainee.in_place,
            "seconds_per_step": statistics.median(self.seconds) if self.seconds else None,
            "forward_fraction": self.forward_seconds / spent if spent else None,
            "peak_rss_bytes": self.peak,
            "ranks": 1 if self.ranks is None else self.ranks.world,
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
