"""Train a delta on data: any selection, delta, estimate and objective that fit together."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, InstanceOf, WithJsonSchema

from edgesft.core import catalog
from edgesft.core.artifact import Artifact, Workdir
from edgesft.core.data import DataOptions
from edgesft.core.errors import UsageError
from edgesft.core.method import Method
from edgesft.core.params import BatchSize, Count, LearningRate, Seed, Steps, validate
from edgesft.stages.training import Run

if TYPE_CHECKING:
    from edgesft.core.tuned import Tuned

AXES = ("select", "delta", "estimate", "objective")
DEFAULTS = {"select": "everything", "delta": "sparse", "estimate": "backprop", "objective": "task"}
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
        from edgesft.core import models

        if models.kind(inputs["model"].path) != "decoder":
            return [f"`{inputs['model'].ref}` is an encoder; tune needs a model that predicts the next token"]
        return []

    @property
    def in_place(self) -> bool:
        """Whether theta is the weight itself, if the regions allow it: forward passes only, a fit delta."""
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
            run = Run(self, tuned, dataset, work, inputs["model"])
            try:
                metrics = run.train()
            finally:
                run.close()
            return {"parameters": total, "trained_fraction": run.trainable / total, **metrics}

    def _tuned(self, model: Any) -> "Tuned":  # noqa: ANN401 - nn.Module, which only torch has
        from edgesft.core import models
        from edgesft.core.region import Band
        from edgesft.core.tuned import Tuned

        layers = models.linears(model)
        regions = {}
        for name, layer in layers.items():
            region = self.select.region(name, layer.weight.detach(), None, 0.0)  # type: ignore[attr-defined]
            if region is not None:
                regions[name] = region
        if not regions:
            raise UsageError("the selection leaves nothing to train")
        bands = all(isinstance(region, Band) for region in regions.values())
        return Tuned(
            model,
            layers,
            regions,
            self.delta,
            in_place=self.in_place and bands,
            kernel=catalog.runtime("kernels.perturb"),
            seed=self.seed,
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


def _exact(estimate: Method) -> bool:
    """Whether the estimate back-propagates, so that theta must be a tensor of its own."""
    return not getattr(estimate, "forward_only", False)


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON
    return dict(value) if isinstance(value, Mapping) else value
