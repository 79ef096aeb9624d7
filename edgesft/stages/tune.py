"""Train a delta on data: any selection, delta, estimate and objective that fit together."""

import math
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, InstanceOf, WithJsonSchema

from edgesft.core import catalog, stored
from edgesft.core.artifact import Artifact, Workdir
from edgesft.core.data import DataOptions
from edgesft.core.errors import UsageError
from edgesft.core.method import Method
from edgesft.core.params import BatchSize, Count, LearningRate, Seed, Steps, validate
from edgesft.stages.tuning import bases
from edgesft.stages.tuning.run import Run
from edgesft.stages.tuning.trainee import Beside, InPlace, Trainee

if TYPE_CHECKING:
    from edgesft.core.data import Dataset
    from edgesft.core.tuning.offload import Offload
    from edgesft.core.tuning.ranks import Ranks
    from edgesft.core.tuning.tuned import Tuned

AXES = ("select", "delta", "estimate", "objective")
DEFAULTS = {"select": "everything", "delta": "sparse", "estimate": "backprop", "objective": "task"}
Chosen = Annotated[InstanceOf[Method], WithJsonSchema({"type": "object"})]  # built and checked before
Fraction = Annotated[float, Field(ge=0, le=1)]
DTYPES = {"fp32": "float32", "fp64": "float64", "bf16": "bfloat16"}
BITS: Mapping[str, Literal[4, 8]] = {"int8": 8, "int4": 4}
NO_RESULT = ("snapshot_every", "cache_mb", "offload")  # options that do not decide the result
MANTISSA = {"fp32": 23, "fp64": 52, "bf16": 7}  # bits behind the leading one


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
    lr: Annotated[
        LearningRate | Literal["auto"], Field(description="auto: found before the first step (zeroth order)")
    ] = 1e-6
    batch_size: BatchSize = 16
    optimizer: Annotated[
        Literal["sgd", "sign", "adam"],
        Field(
            description="sgd keeps nothing; sign takes steps of one length; adam keeps two numbers a trained "
            "value, and of weights in place none: seeds and scalars"
        ),
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
    patience: Annotated[
        int, Field(ge=0, description="evaluations without a lower dev loss before it stops; 0: never")
    ] = 0
    guard: Annotated[
        bool, Field(description="take steps back and halve the learning rate when the loss leaps")
    ] = True
    base: Annotated[
        Literal["fp32", "bf16", "int8", "int4", "fp64"],
        Field(description="how the weights lie in memory while they are tuned; int8 and int4 in groups"),
    ] = "fp32"
    group: Annotated[Literal[32, 64, 128], Field(description="inputs that share a scale, int8 and int4")] = 32
    compute: Annotated[
        Literal["native", "bf16", "int8"], Field(description="precision of the matrix products")
    ] = "native"
    beside: Annotated[
        bool, Field(description="keep the change beside the weights even where it could go into them")
    ] = False
    offload: Annotated[
        str | None, Field(description="folder for the layers of a model larger than memory")
    ] = None
    last_layers: Annotated[int, Field(ge=0, description="tune this many of the last blocks only; 0: all")] = 0
    cache_mb: Annotated[
        int, Field(ge=0, description="MB for hidden states below the first tuned block; 0: none are kept")
    ] = 512

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
        """Everything that decides the result; `NO_RESULT` names the options that do not."""
        own = {k: v for k, v in vars(self).items() if k not in (*AXES, "data", *NO_RESULT)}
        methods = {axis: catalog.describe(axis, getattr(self, axis)) for axis in AXES}
        own["cached"] = bool(
            self.last_layers and self.cache_mb
        )  # its size does not decide, its being there does
        return own | methods | {"data": {k: _plain(v) for k, v in vars(self.data).items()}}

    def problems(self, inputs: Mapping[str, Artifact]) -> list[str]:
        from edgesft.core import models

        if inputs["model"].kind == "onnx":
            found: list[str] = catalog.runtime("exporters.tunable").problems(inputs["model"].path)
            return found or self._onnx_problems()
        if models.kind(inputs["model"].path) != "decoder":
            return [f"`{inputs['model'].ref}` is an encoder; tune needs a model that predicts the next token"]
        bases.check(self, inputs["model"])
        return []

    def _onnx_problems(self) -> list[str]:
        """What an exported artefact cannot do: it has weights in float32, and forward passes."""
        if not self.in_place:
            return ["an exported artefact is tuned in place by forward passes: `--zo`, delta `sparse`"]
        unfit = {"base": "fp32", "compute": "native", "last_layers": 0}
        return [
            f"`{key}` is `{getattr(self, key)}`, an exported artefact is tuned with `{value}`"
            for key, value in unfit.items()
            if getattr(self, key) != value
        ]

    @property
    def in_place(self) -> bool:
        """Whether theta is the weight itself, if the regions allow it: forward passes only, a fit delta."""
        fit = bool(getattr(self.delta, "in_place", False)) and not _exact(self.estimate)
        return fit and not self.beside

    def run(self, inputs: Mapping[str, Artifact], work: Workdir) -> dict[str, Any]:
        return self.train(inputs, work, None)

    def train(
        self, inputs: Mapping[str, Artifact], work: Workdir | None, ranks: "Ranks | None"
    ) -> dict[str, Any]:
        """The run of this rank; `work` is None where another one writes."""
        self._check_fit()
        model = inputs["model"]
        dataset = _dataset(self, inputs)
        if model.kind == "onnx":
            return self._train_exported(model, dataset, work, ranks)
        with ExitStack() as open_until_written:
            return self._train_model(model, dataset, inputs, work, ranks, open_until_written)

    def _train_model(
        self,
        model: Artifact,
        dataset: "Dataset",
        inputs: Mapping[str, Artifact],
        work: Workdir | None,
        ranks: "Ranks | None",
        stack: ExitStack,
    ) -> dict[str, Any]:
        rank = None if ranks is None or ranks.world == 1 else ranks
        offload = self._offloaded(model, rank)
        loaded = self.load(model) if offload is None else stack.enter_context(offload).model
        total = self._parameters(loaded)
        with self._tuned(loaded, model, offload) as tuned:
            if rank is not None and not tuned.in_place:
                from edgesft.core.tuning import sharding

                sharding.prepare(loaded, rank)
            trainee: Trainee
            if tuned.in_place:
                self._check_eps(tuned)
                trainee = InPlace(self, tuned, self._stored_as, digests=_digests(inputs))
            else:
                trainee = Beside(self, tuned, work, model, ranks)
            metrics = _finish(Run(self, tuned, trainee, dataset, work, ranks))
        return {"parameters": total, "trained_fraction": metrics["trainable_values"] / total, **metrics}

    def _train_exported(
        self,
        model: Artifact,
        dataset: "Dataset",
        work: Workdir | None,
        ranks: "Ranks | None",
    ) -> dict[str, Any]:
        from edgesft.core import threads

        tunable = catalog.runtime("exporters.tunable").OnnxTunable(
            model.path, select=self.select, threads=threads.resolve(0)
        )
        source = model.manifest.get("inputs", {}).get("model", "")  # the model that it was exported from
        trainee = InPlace(self, tunable, "fp32", digests={"model": model.digest, "source": source})
        metrics = _finish(Run(self, tunable, trainee, dataset, work, ranks))
        return {"parameters": tunable.parameters, **metrics}

    def _offloaded(self, model: Artifact, ranks: "Ranks | None") -> "Offload | None":
        """The model with its layers in a folder, where one is named; each rank has its own."""
        if self.offload is None:
            return None
        if not self.in_place or self.base not in DTYPES:
            raise UsageError(
                "`--offload` is for weights in place by forward passes, in fp32 or bf16",
                "leave it out, or tune with `--zo --base fp32`",
            )
        from edgesft.core.tuning import offload

        folder = Path(self.offload)
        if ranks is not None:
            folder /= f"rank-{ranks.rank}"
        return offload.load(model.path, folder, dtype=DTYPES[self.base])

    def load(self, model: Artifact) -> Any:  # noqa: ANN401 - nn.Module
        """The model with its weights as `base` says."""
        from edgesft.core import memory, models

        if self.base in BITS:
            from edgesft.core import quantized

            dtype = "bfloat16" if self.compute == "bf16" else "float32"  # of activations
            return quantized.load(model.path, bits=BITS[self.base], group=self.group, dtype=dtype)
        memory.tighten(4 << 20)  # of the activations of a few hundred tokens only the logits are larger
        loaded = models.load(model.path, dtype=DTYPES[self.base])
        if stored.form(model.path) == stored.PACKED:
            catalog.runtime("kernels.nm_matmul.model").exact(loaded)
        return loaded

    @property
    def _stored_as(self) -> str:
        return f"{self.base}-{self.group}" if self.base in BITS else self.base

    def _tuned(
        self,
        model: Any,  # noqa: ANN401 - nn.Module
        source: Artifact | None = None,
        offload: "Offload | None" = None,
    ) -> "Tuned":
        from edgesft.core import memory, models
        from edgesft.core.tuning.tuned import Tuned, floats

        layers: Mapping[str, Any] = self._layers(model)
        names = {name for name, _ in models.blocks(model)[-self.last_layers :]} if self.last_layers else None
        regions = {}
        for name, layer in layers.items():
            if names is not None and not any(name.startswith(f"{block}.") for block in names):
                continue
            with nullcontext() if offload is None else offload.weight(name):
                region = self.select.region(name, floats(layer).detach(), None, 0.0)  # type: ignore[attr-defined]
            if region is not None:
                regions[name] = region
        if not regions:
            raise UsageError("the selection leaves nothing to train")
        self._check_whole(regions)
        bands = all(hasattr(region, "rule") for region in regions.values())
        memory.trim()  # looking for the regions leaves tens of megabytes on the heap
        return Tuned(
            model,
            layers,
            regions,
            self.delta,
            in_place=self.in_place and bands,
            kernel=catalog.runtime("kernels.perturb"),
            seed=self.seed,
            compute=self.compute,
            base=None if source is None else self._base_of(source),
            prefix=None if offload else self._prefix(model),
            offload=offload,
        )

    def _parameters(self, model: Any) -> int:  # noqa: ANN401 - nn.Module
        if self.base in BITS:
            from edgesft.core import quantized

            return quantized.numel(model)
        found: int = catalog.runtime("kernels.nm_matmul.model").numel(model)
        return found

    def _layers(self, model: Any) -> Mapping[str, Any]:  # noqa: ANN401 - nn.Module
        from edgesft.core import models

        if self.base in BITS:
            from edgesft.core import quantized

            return quantized.layers(model)
        packed: Mapping[str, Any] = catalog.runtime("kernels.nm_matmul.model").layers(model)
        return (
            packed if any(hasattr(layer, "quantized") for layer in packed.values()) else models.linears(model)
        )

    def _base_of(self, source: Artifact) -> Any:  # noqa: ANN401 - layer -> Tensor or Quantized
        """Gives the pretrained weight of a layer as the run holds it."""
        from edgesft.core.tuning import delta_file

        base = delta_file.base_of(source.path)
        if self.base not in BITS:
            return base
        from edgesft.core import quantized

        return lambda layer: quantized.quantize(base(layer), BITS[self.base], self.group)

    def _prefix(self, model: Any) -> Any:  # noqa: ANN401 - nn.Module -> core.tuning.prefix.Prefix
        from edgesft.core import models

        depth = len(models.blocks(model))
        if not self.last_layers or not self.cache_mb or self.last_layers >= depth or not self.in_place:
            return None
        from edgesft.core import console
        from edgesft.core.tuning.prefix import Prefix

        reason = Prefix.applies(model, depth - self.last_layers)
        if reason is not None:
            console.warn(f"hidden states below the tuned blocks are not kept: {reason}")
            return None
        return Prefix(model, depth - self.last_layers, self.cache_mb << 20)

    def _check_fit(self) -> None:
        if self.select.needs:
            raise UsageError(f"the selection needs the signal `{min(self.select.needs)}`, which tune lacks")
        if getattr(self.delta, "needs_quantized", False) and self.base not in BITS:
            raise UsageError(
                f"the delta rounds into the grid of quantised weights, the base is `{self.base}`",
                "--base int8, or delta.use=sparse",
            )
        if self.lr == "auto" and not self.in_place:
            raise UsageError("a learning rate is found for weights in place only", "--set tune.lr=1e-4")
        if self.optimizer == "sign" and not self.in_place:
            raise UsageError("the optimizer `sign` is for weights in place", "--set tune.optimizer=sgd")
        if not _exact(self.estimate) or self.base in ("fp32", "fp64"):
            return
        raise UsageError(
            f"back-propagation needs weights in fp32, the base is `{self.base}`", "--set tune.base=fp32"
        )

    def _check_whole(self, regions: Mapping[str, Any]) -> None:
        from edgesft.core.protocols import Mask

        if not getattr(self.estimate, "whole_only", False):
            return
        if self.in_place and any(r.rule() != Mask() for r in regions.values() if hasattr(r, "rule")):
            raise UsageError(
                "low-rank noise is made for whole matrices, the selection takes a part of them",
                "--set select.use=everything",
            )
        if not self.in_place and not hasattr(self.delta, "output"):
            raise UsageError(
                "low-rank noise is for matrices, the delta's values are a list", "--set delta.use=lora"
            )

    def _check_eps(self, tuned: "Tuned") -> None:
        """Refuse a perturbation that the weights' type rounds away."""
        eps, dtype = getattr(self.estimate, "eps", None), "bf16" if self.compute == "bf16" else self.base
        if eps is None or dtype not in MANTISSA:
            return  # the noise of int8 products is exact, and a quantised weight is perturbed in float32
        step = tuned.typical() * 2.0 ** -MANTISSA[dtype]
        if eps < step:
            raise UsageError(
                f"estimate.eps is {eps:g}; a typical weight of this model in {dtype} moves by steps of "
                f"{step:.2g}, so most of the perturbation would be lost",
                f"`--set estimate.eps={_rounded_up(2 * step):g}` would do",
            )


def _dataset(stage: Tune, inputs: Mapping[str, Artifact]) -> "Dataset":
    from edgesft.core import data as datasets
    from edgesft.core import models

    return datasets.open_data(inputs["data"], stage.data, models.tokenizer(inputs["model"].path))


def _finish(run: Run) -> dict[str, Any]:
    try:
        return run.train()
    finally:
        run.close()


def _digests(inputs: Mapping[str, Artifact]) -> dict[str, str]:
    return {role: each.digest for role, each in inputs.items()}


def _rounded_up(value: float) -> float:
    """To one digit, upwards."""
    unit = 10.0 ** math.floor(math.log10(value))
    return math.ceil(value / unit) * unit


def _exact(estimate: Method) -> bool:
    """Whether the estimate back-propagates, so that theta must be a tensor of its own."""
    return not getattr(estimate, "forward_only", False)


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON
    return dict(value) if isinstance(value, Mapping) else value
