"""What is trained, as the loop sees it: weights in place, by a trajectory; or theta beside them, by tensors.

In place a run is its measured steps: they are the journal, they replay it after a kill, and they are the
result. Beside the weights, snapshots of theta and of the optimiser are kept now and then.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from edgesft.core import catalog
from edgesft.core.artifact import Artifact, Workdir
from edgesft.core.protocols import Shift

if TYPE_CHECKING:
    from edgesft.core.protocols import Tunable
    from edgesft.core.tuning.ranks import Ranks
    from edgesft.core.tuning.tuned import Tuned
    from edgesft.stages.tuning.plan import Plan


class Trainee(Protocol):
    """in_place: whether the weights themselves change. params: what the estimate differentiates."""

    in_place: bool

    @property
    def params(self) -> Any: ...  # noqa: ANN401 - Theta
    @property
    def trainable(self) -> int: ...
    @property
    def entries(self) -> int: ...
    def take(self, record: dict[str, Any], gradient: Any) -> None: ...  # noqa: ANN401 - a Gradient
    def digest(self) -> str: ...
    def snapshot(self, step: int) -> None: ...
    def resume(self, steps: Mapping[int, Mapping[str, Any]], kept: Sequence[int]) -> int: ...
    def back(self, steps: Mapping[int, Mapping[str, Any]], kept: Sequence[int]) -> None: ...
    def note_best(self, step: int) -> None: ...
    def save(
        self, folder: Path, steps: Mapping[int, Mapping[str, Any]], kept: Sequence[int], ended: int, best: int
    ) -> None: ...


def shifts_of(record: Mapping[str, Any]) -> tuple[Shift, ...]:
    """The directions of a journal's record with their shares of the projected gradient."""
    return tuple(Shift(seed, scale, law, rank) for seed, scale, law, rank in record["shifts"])


class InPlace:
    """The weights of a model or of an exported artefact, moved by scalars."""

    in_place = True

    def __init__(self, stage: "Plan", tunable: "Tunable", dtype: str, digests: Mapping[str, str]) -> None:
        self._stage, self._tunable, self._dtype, self._inputs = stage, tunable, dtype, digests
        self._before = dict(tunable.digests())
        self._best: tuple[int, dict[str, bytes]] | None = None
        self._reset()

    def _reset(self) -> None:
        from edgesft.core.tuning.scalar_optim import SCALAR

        self._optimizer = SCALAR[self._stage.optimizer](self._stage.weight_decay, self._rounding)

    @property
    def _rounding(self) -> int | None:
        """Seed of stochastic rounding, where the weights are coarser than the steps."""
        return None if self._dtype in ("fp32", "fp64") else self._stage.seed

    @property
    def params(self) -> dict[str, Any]:
        return {}

    @property
    def trainable(self) -> int:
        return self._tunable.trainable

    @property
    def entries(self) -> int:
        return sum(out * width for out, width in self._tunable.shapes.values())

    def take(self, record: dict[str, Any], gradient: Any) -> None:  # noqa: ANN401 - Directions
        record["active"] = self._tunable.descend(self._update(record))

    def _update(self, record: Mapping[str, Any]) -> Any:  # noqa: ANN401 - an Update
        from edgesft.core.tuning.scalar_optim import Measured

        return self._optimizer.update(Measured(record["step"], record["lr"], shifts_of(record)))

    def digest(self) -> str:
        """Of the weights as they are."""
        return hashlib.sha256(b"".join(self._tunable.digests().values())).hexdigest()

    def snapshot(self, step: int) -> None:
        """The journal is the snapshot."""

    def resume(self, steps: Mapping[int, Mapping[str, Any]], kept: Sequence[int]) -> int:
        if kept:
            active = self._tunable.replay([self._update(steps[k]) for k in kept])
            cast("dict[str, Any]", steps[kept[-1]]).setdefault("active", active)  # lost by a kill in between
        return max(steps, default=-1) + 1

    def back(self, steps: Mapping[int, Mapping[str, Any]], kept: Sequence[int]) -> None:
        """To where the kept steps lead: from the pretrained weights, exactly.

        Subtracting the last steps again would not do: sums are rounded, and an entry that a step carried out
        of the mask could not be told from one that had been outside all along.
        """
        self._tunable.restore()
        self._reset()
        self.resume(steps, kept)

    def note_best(self, step: int) -> None:
        self._best = (step, dict(self._tunable.digests()))

    def save(
        self, folder: Path, steps: Mapping[int, Mapping[str, Any]], kept: Sequence[int], ended: int, best: int
    ) -> None:
        from edgesft.core.tuning.scalar_optim import Measured
        from edgesft.core.tuning.trajectory import Settings, Trajectory

        settings = Settings(
            seed=self._stage.seed,
            optimizer=self._stage.optimizer,  # type: ignore[arg-type]
            weight_decay=self._stage.weight_decay,
            rounding=self._rounding,
            dtype=self._dtype,
            about={
                "inputs": dict(self._inputs),
                "estimate": catalog.describe("estimate", self._stage.estimate),
            },
        )
        known = self._best[1] if self._best is not None and self._best[0] == best else None
        Trajectory.of(
            settings,
            [Measured(k, steps[k]["lr"], shifts_of(steps[k])) for k in kept],
            shapes=self._tunable.shapes,
            masks=self._tunable.masks,
            base=self._before,
            final=self._tunable.digests(),
            steps=ended,
            best=best,
            best_digests=known,
        ).save(folder)


class Beside:
    """Tensors beside the frozen weights, with a plain optimiser and snapshots.

    work: None on ranks that only follow; they have the leader's snapshot from it.
    """

    in_place = False

    def __init__(
        self, stage: "Plan", tuned: "Tuned", work: Workdir | None, model: Artifact, ranks: "Ranks | None"
    ) -> None:
        from edgesft.core.optim import OPTIMIZERS

        self._ranks = ranks
        self._stage, self._tuned, self._work, self._model = stage, tuned, work, model
        self._optimizer = OPTIMIZERS[stage.optimizer](stage.weight_decay)

    @property
    def params(self) -> Any:  # noqa: ANN401 - Theta
        return self._tuned.theta

    @property
    def trainable(self) -> int:
        return self._tuned.trainable

    @property
    def entries(self) -> int:
        return self._tuned.entries

    def take(self, record: dict[str, Any], gradient: Any) -> None:  # noqa: ANN401 - a Gradient
        self._optimizer.step(self._tuned.theta, gradient, record["lr"])

    def digest(self) -> str:
        """Of theta as it is."""
        from edgesft.core.tuning.tuned import digest

        return hashlib.sha256(b"".join(digest(p) for p in self._tuned.theta.values())).hexdigest()

    def snapshot(self, step: int) -> None:
        """theta after `step` steps, in a folder that counts once its one file is whole."""
        if self._work is None:
            return
        from edgesft.core.tuning import delta_file
        from edgesft.core.weights import Planned, dtype_name, write_file

        folder = self._work.checkpoint / f"snapshot-{step}"
        folder.mkdir(exist_ok=True)
        state = {f"theta/{k}": v for k, v in self._tuned.theta.items()}
        state |= {f"optimizer/{k}": v for k, v in self._optimizer.state().items()}
        plan = [Planned(k, dtype_name(v.dtype), tuple(v.shape)) for k, v in state.items()]
        write_file(folder / delta_file.FILE, plan, state.__getitem__)
        for old, path in self._snapshots():
            if old != step:
                shutil.rmtree(path)

    def _snapshots(self) -> list[tuple[int, Path]]:
        """(step, folder) of the whole ones, oldest first."""
        from edgesft.core.tuning.delta_file import FILE

        if self._work is None:
            return []
        found = [p for p in self._work.checkpoint.glob("snapshot-*") if (p / FILE).is_file()]
        return sorted((int(p.name.partition("-")[2]), p) for p in found)

    def resume(self, steps: Mapping[int, Mapping[str, Any]], kept: Sequence[int]) -> int:
        """The last snapshot; from there zeroth-order steps are replayed, others are taken again."""
        from edgesft.core.tuning import delta_file
        from edgesft.core.tuning.directions import Directions

        done, data = 0, b""
        if snapshots := self._snapshots():
            done, folder = snapshots[-1]
            data = (folder / delta_file.FILE).read_bytes()
        if self._ranks is not None and self._ranks.world > 1:
            sent = self._ranks.broadcast(done.to_bytes(8, "little") + data if self._ranks.leader else None)
            done, data = int.from_bytes(sent[:8], "little"), sent[8:]
        if done:
            self._restore(data)
        while (record := steps.get(done)) is not None and ("shifts" in record or "skipped" in record):
            if "shifts" in record:
                self.take(dict(record), Directions(record["loss"], shifts_of(record), self._tuned.theta))
            done += 1
        return done

    def _restore(self, data: bytes) -> None:
        from safetensors.torch import load

        state = load(data)
        for name, p in self._tuned.theta.items():
            p.copy_(state[f"theta/{name}"])
        self._optimizer.restore(
            {k.removeprefix("optimizer/"): v for k, v in state.items() if k.startswith("optimizer/")}
        )

    def back(self, steps: Mapping[int, Mapping[str, Any]], kept: Sequence[int]) -> None:
        raise NotImplementedError("only weights in place step back")

    def note_best(self, step: int) -> None:
        """The best theta is not kept: it would be a second copy of it."""

    def save(
        self, folder: Path, steps: Mapping[int, Mapping[str, Any]], kept: Sequence[int], ended: int, best: int
    ) -> None:
        from edgesft.core.tuning import delta_file

        delta_file.save(folder, self._tuned, catalog.describe("delta", self._stage.delta))
