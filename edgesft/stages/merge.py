"""Fold deltas into a model: an ordinary Hugging Face folder that needs nothing of EdgeSFT to load."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgesft.core import stored
from edgesft.core.artifact import Artifact, Workdir
from edgesft.core.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from edgesft.core.console import Bar
    from edgesft.core.tuning.delta_file import Delta, TrajectoryDelta
    from edgesft.core.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Merge:
    """MODEL + DELTA... -> model. Several deltas add up. Works tensor by tensor; trajectories are replayed.

    Raises ArtifactError when a delta names a layer or a shape that the model lacks, or holds NaN, when a
    trajectory started from other weights or its replay gives others than the run had; UsageError for a
    `step` that there is not.
    """

    name: ClassVar[str] = "merge"
    gives: ClassVar[str] = "model"

    dtype: Annotated[
        Literal["source", "float32"], Field(description="type of the merged weights: the model's, or float32")
    ] = "source"
    allow_other_base: Annotated[
        bool, Field(description="merge also a delta that was trained on another model of the same shapes")
    ] = False
    step: Annotated[
        Annotated[int, Field(ge=0)] | Literal["best", "last"],
        Field(description="of a trajectory: how many steps of the run are replayed, or up to its best one"),
    ] = "last"

    def params(self) -> dict[str, Any]:
        return asdict(self)

    def problems(self, inputs: Mapping[str, Artifact]) -> list[str]:
        stored.require_plain(inputs["model"], "merge")
        self._check_step(_deltas(inputs))
        found = []
        for delta in _deltas(inputs):
            base = delta.manifest.get("inputs", {}).get("model")
            same = base is None or base in (inputs["model"].digest, _converted(inputs["model"]))
            if not same and not self.allow_other_base and not _exported(delta, inputs["model"]):
                found.append(
                    f"`{delta.ref}` was trained on another model than `{inputs['model'].ref}`: "
                    f"{base[:19]}..., not {inputs['model'].digest[:19]}..."
                )
        return found

    def run(self, inputs: Mapping[str, Artifact], work: Workdir) -> dict[str, Any]:
        from edgesft.core import console, models
        from edgesft.core.tuning import delta_file

        model = inputs["model"]
        weights = models.tensors(model.path)
        loaded = [
            delta_file.load(delta.path, step=self.step, allow_other_base=self.allow_other_base)
            for delta in _deltas(inputs)
        ]
        merged = _Merged(weights, loaded, keeps_dtype=self.dtype == "source")
        replayed = [delta for delta in loaded if isinstance(delta, delta_file.TrajectoryDelta)]
        if replayed:
            with console.progress("replay", len(merged)) as merged.bar:
                models.save(merged, model.path, work.path, dtype=self.dtype)
        else:
            models.save(merged, model.path, work.path, dtype=self.dtype)
        return {
            "deltas": len(loaded),
            "layers": len(merged.changed),
            "changed_values": merged.changed_values,
            "changed_fraction": merged.changed_values / max(1, weights.numel),
            "lost_to_rounding": merged.lost,
            **_replays(replayed),
        }

    def _check_step(self, deltas: Sequence[Artifact]) -> None:
        """Raise UsageError for a step without a trajectory, or one that a trajectory lacks."""
        from edgesft.core.tuning import trajectory

        if self.step == "last":
            return
        runs = [delta for delta in deltas if (delta.path / trajectory.FILE).is_file()]
        if not runs:
            raise UsageError(f"the step is `{self.step}`, and no delta given is a trajectory that has steps")
        for run in runs:
            trajectory.load(run.path).at(self.step)


class _Merged(Mapping[str, "Tensor"]):
    """The changed weights by their names in the model's files, each made when it is asked for."""

    def __init__(self, weights: "Weights", deltas: "Sequence[Delta]", *, keeps_dtype: bool) -> None:
        from edgesft.core.tuning import delta_file

        self._weights, self._keeps_dtype = weights, keeps_dtype
        self.changed: dict[str, list[tuple[Delta, str]]] = {}
        for delta in deltas:
            for layer in sorted(delta.layers):
                self.changed.setdefault(delta_file.tensor_name(weights, layer), []).append((delta, layer))
        self.changed_values = self.lost = 0
        self.bar: Bar | None = None

    def __len__(self) -> int:
        return len(self.changed)

    def __iter__(self) -> Iterator[str]:
        return iter(self.changed)

    def __contains__(self, name: object) -> bool:
        return name in self.changed  # the inherited one would make the tensor

    def __getitem__(self, name: str) -> "Tensor":
        """The merged tensor, float32: base + sum of the changes, added in float64 where there are several."""
        stored = self._weights.get(name)
        base = stored.float()
        parts = [delta.effective(layer, base) for delta, layer in self.changed[name]]
        merged = parts[0]
        if len(parts) > 1:
            total = base.double()
            for part in parts:
                total += part.double() - base.double()
            merged = total.float()
        if self.bar is not None:
            self.bar.advance()
        self._count(base, merged, merged.to(stored.dtype).float() if self._keeps_dtype else merged)
        return merged

    def _count(self, base: "Tensor", merged: "Tensor", written: "Tensor") -> None:
        wanted = int((merged != base).sum())
        kept = int((written != base).sum())
        self.changed_values += kept
        self.lost += max(0, wanted - kept)


def _converted(model: Artifact) -> str | None:
    """The digest of the model that this one was made of by `convert --to dense`: the same weights."""
    params = model.manifest.get("params", {})
    if model.manifest.get("stage") != "convert" or params.get("to") != "dense":
        return None
    found: str | None = model.manifest.get("inputs", {}).get("model")
    return found


def _exported(delta: Artifact, model: Artifact) -> bool:
    """Whether the delta is a trajectory that was made on an export of this model. Each weight is checked
    when it is replayed."""
    from edgesft.core.tuning import trajectory

    if not (delta.path / trajectory.FILE).is_file():
        return False
    inputs = trajectory.load(delta.path).settings.about.get("inputs", {})
    return isinstance(inputs, dict) and inputs.get("source") == model.digest


def _replays(deltas: "Sequence[TrajectoryDelta]") -> dict[str, Any]:
    """What the replays of trajectories did. verified: every weight has the hash that its run recorded."""
    replays = [delta.replay for delta in deltas]
    if not replays:
        return {}
    return {
        "replayed_steps": sum(replay.steps for replay in replays),
        "replay_seconds": sum(replay.seconds for replay in replays),
        "verified": all(replay.verified for replay in replays),
    }


def _deltas(inputs: Mapping[str, Artifact]) -> list[Artifact]:
    """The deltas in the order in which they were given: roles `delta`, or `delta-0`, `delta-1`, ..."""
    roles = [role for role in inputs if role == "delta" or role.startswith("delta-")]
    return [inputs[role] for role in sorted(roles, key=lambda role: int(role.partition("-")[2] or 0))]
