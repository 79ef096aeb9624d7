"""Make the decoder's matrices sparse in one shot: no training, one pass over some text where the method asks.

Blocks are handled in order; the blocks after one see its pruned activations. Embeddings, the head, norms
and biases are copied bit for bit. The result is an ordinary Hugging Face folder.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, InstanceOf

from edgesft.core import catalog, console, stored, threads
from edgesft.core.artifact import Artifact, Workdir
from edgesft.core.data import DataOptions
from edgesft.core.errors import ArtifactError, UsageError
from edgesft.core.method import Method
from edgesft.core.params import Count, Length, Seed, parse_pattern, validate

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from edgesft.core.protocols import Compress
    from edgesft.core.signals import Statistics, Visit
    from edgesft.core.weights import Weights

DEFAULT = "wanda"


@dataclass(frozen=True, kw_only=True)
class Sparsify:
    """model (+ data) -> model whose linear layers keep N of every M inputs.

    samples, length: calibration text, `samples` windows of `length` tokens.
    threads: 0 = physical cores.
    """

    name: ClassVar[str] = "sparsify"
    gives: ClassVar[str] = "model"

    compress: InstanceOf[Method]
    samples: Count = 64
    length: Length = 256
    seed: Seed = 0
    data_options: DataOptions = field(default_factory=DataOptions)
    threads: Annotated[int, Field(ge=0, le=4096)] = 0

    @classmethod
    def from_recipe(cls, table: Mapping[str, Any]) -> "Sparsify":
        """From a `[sparsify]` table: `pattern`, `samples`, `length`, `seed`, `compress = {use = ...}`.

        `pattern` may stand in the table or in `compress`. Raises UsageError.
        """
        values = dict(table)
        compress = dict(values.pop("compress", {"use": DEFAULT}))
        if "pattern" in values:
            pattern = values.pop("pattern")
            if compress.setdefault("pattern", pattern) != pattern:
                raise UsageError(
                    f"`sparsify.pattern` is `{pattern}` and `compress.pattern` is `{compress['pattern']}`",
                    f"name it once: `--pattern {compress['pattern']}`, in a recipe `sparsify.pattern`",
                )
        return validate(cls, {**values, "compress": catalog.build("compress", compress)}, "sparsify")

    @property
    def pattern(self) -> str | None:
        """N:M, or None for a method without one."""
        return getattr(self.compress, "pattern", None) or None

    def params(self) -> dict[str, Any]:
        """Everything that decides the result; how text becomes windows only where text is read."""
        table: dict[str, Any] = {"compress": catalog.describe("compress", self.compress)}
        if self.compress.needs:
            table |= {"samples": self.samples, "length": self.length, "seed": self.seed}
            table |= {"data_options": asdict(self.data_options)}
        return table

    def problems(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """Reasons why it cannot run.

        Raises UsageError when the method reads text and there is none, or too long a piece at a time.
        """
        from edgesft.core import models

        found = inputs["model"]
        if found.kind != "model":
            return [f"`{found.ref}` is of kind `{found.kind}`, expected `model`"]
        stored.require_plain(found, "sparsify")
        if not self.compress.needs:
            return []
        if "data" not in inputs:
            method = catalog.describe("compress", self.compress)["use"]
            raise UsageError(
                f"`compress:{method}` reads calibration text and there is no DATA",
                f"edgesft sparsify {found.ref} demo:boolq --method {method} -o OUT",
            )
        context = models.read_config(found.path).get("max_position_embeddings")
        if isinstance(context, int) and self.length > context:
            raise UsageError(f"`sparsify.length` is {self.length}, the model reads {context} tokens at most")
        return []

    def run(self, inputs: Mapping[str, Artifact], work: Workdir) -> dict[str, Any]:
        """Write the sparse model. Raises ArtifactError for NaN weights, CheckFailed for a broken pattern."""
        from edgesft.core import models

        began = time.monotonic()
        source = inputs["model"].path
        with _threads(self.threads):
            stored = models.tensors(source)
            model = models.load(source)
            chosen, dense = self._targets(models.linears(model), inputs["model"].ref)
            job = _Job(self, stored, _stored_names(model, stored, chosen), work)
            with console.progress("sparsify", len(models.blocks(model))) as bar:
                for visit in self._visits(model, chosen, inputs):
                    job.block(visit)
                    bar.advance(note=job.note())
                    del visit  # or its statistics would live on while the next block's are gathered
            models.save(job.tensors(chosen), source, work.path)
        return {
            "pattern": self.pattern,
            **job.metrics(),
            "dense_layers": dense + job.unreached,
            "calibration_tokens": self.samples * self.length if self.compress.needs else 0,
            "seconds": round(time.monotonic() - began, 2),
        }

    def _targets(
        self, layers: Mapping[str, "nn.Linear"], ref: str
    ) -> tuple[dict[str, "nn.Linear"], list[str]]:
        """Layers to prune, and names of those whose inputs M does not divide: they stay dense."""
        m = parse_pattern(self.pattern)[1] if self.pattern else 1
        chosen = {name: layer for name, layer in layers.items() if layer.in_features % m == 0}
        dense = [name for name in layers if name not in chosen]
        if not chosen:
            raise ArtifactError(f"`{ref}` has no linear layer that `{self.pattern or 'pruning'}` fits")
        if dense:
            console.warn(
                f"{len(dense)} layers stay dense: {m} does not divide their inputs, as in `{dense[0]}`"
            )
        return chosen, dense

    def _visits(
        self, model: "nn.Module", chosen: Mapping[str, "nn.Linear"], inputs: Mapping[str, Artifact]
    ) -> Iterator["Visit"]:
        """Blocks in order, with statistics where the method reads any."""
        import torch

        from edgesft.core import models, signals

        if not self.compress.needs:
            nothing = signals.Statistics()
            return (
                signals.Visit(name, {n: v for n, v in chosen.items() if n.startswith(name + ".")}, nothing)
                for name, _ in models.blocks(model)
            )
        windows = self._windows(inputs)
        precision = getattr(torch, getattr(self.compress, "precision", "float32"))
        return signals.walk(model, windows, self.compress.needs, chosen, precision)

    def _windows(self, inputs: Mapping[str, Artifact]) -> "Tensor":  # (samples, length)
        import torch

        from edgesft.core import data, models

        options = self.data_options
        if options.format == "auto":  # statistics need the texts alone, not what their labels are called
            options = replace(options, format="calibration")
        opened = data.open_data(inputs["data"], options, models.tokenizer(inputs["model"].path))
        windows = opened.windows(split="train", length=self.length, count=self.samples, seed=self.seed)
        return torch.as_tensor(windows)


class _Job:
    """Prunes block after block and keeps the account of it."""

    def __init__(self, stage: Sparsify, stored: "Weights", names: Mapping[str, str], work: Workdir) -> None:
        self.stored, self.names, self.work = stored, names, work
        self.method: Compress = stage.compress  # type: ignore[assignment]  # what the axis `compress` builds
        self.shape = parse_pattern(stage.pattern) if stage.pattern else None
        self.pruned: dict[str, float | None] = {}  # layer -> relative output error, None without text
        self.unreached: list[str] = []
        self.kept = self.total = self.filled = 0

    def block(self, visit: "Visit") -> None:
        """Prune the layers of one block in place."""
        for name, layer in visit.layers.items():
            if self.method.needs and visit.signals.tokens(name) == 0:
                console.warn(f"`{name}` stays dense: the calibration text never reached it")
                self.unreached.append(name)
                continue
            error = self._layer(name, layer, visit.signals)
            self.pruned[name] = error
            self.work.log({"block": visit.name, "layer": name, "relative_output_error": error})

    def _layer(self, name: str, layer: "nn.Linear", signals: "Statistics") -> float | None:
        import torch

        from edgesft.core import models, nm

        with torch.no_grad():
            old = layer.weight.detach().float()
            new = self.method.compress(name, old, signals)
            models.check_finite(self.names[name], new)
            new = new.to(self._dtype(name))
            if self.shape is not None:
                new, filled = nm.fill_groups(new, *self.shape)
                self.filled += filled
            new = new.float()  # what is stored, its rounding included, is what the blocks after it see
            error = None
            if self.method.needs:
                rows = signals.sample(name).float()  # (tokens, in)
                dense = float((rows @ old.T).norm())
                error = float((rows @ (old - new).T).norm()) / dense if dense > 0 else 0.0
            layer.weight.copy_(new)
        return error

    def _dtype(self, name: str) -> "torch.dtype":
        import torch

        found: torch.dtype = getattr(torch, self.stored.dtype(self.names[name]))
        return found

    def tensors(self, layers: Mapping[str, "nn.Linear"]) -> "Mapping[str, Tensor]":
        """The pruned tensors by their names in the files, in the type of the files, the pattern verified."""
        from edgesft.core import nm

        pruned = {}
        for name in self.pruned:
            weight = layers[name].weight.detach().to(self._dtype(name))
            if self.shape is not None:
                nm.check_pattern(self.names[name], weight, *self.shape)
            self.kept += int((weight != 0).sum())
            self.total += weight.numel()
            pruned[self.names[name]] = weight
        return pruned

    def note(self) -> str:
        """What the progress bar says after a block."""
        error = self._mean_error()
        return "" if error is None else f"output error {error:.3f}"

    def _mean_error(self) -> float | None:
        errors = [error for error in self.pruned.values() if error is not None]
        return sum(errors) / len(errors) if errors else None

    def metrics(self) -> dict[str, Any]:
        """density: kept share of the pruned matrices. tiny_entries: see `nm.fill_groups`."""
        return {
            "density": self.kept / self.total if self.total else 1.0,
            "sparse_layers": len(self.pruned),
            "sparse_parameters": self.total,
            "parameters": self.stored.numel,
            "relative_output_error": self._mean_error(),
            "tiny_entries": self.filled,
        }


def _stored_names(model: "nn.Module", stored: "Weights", layers: Mapping[str, "nn.Linear"]) -> dict[str, str]:
    """Layer -> name of its weight in the files: checkpoints name the base model's prefix, or leave it out."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = {}
    for layer in layers:
        name = f"{layer}.weight"
        known = [n for n in (name, prefix + name, name.removeprefix(prefix)) if n in stored]
        if not known:
            raise ArtifactError(f"`{stored.path}` holds no tensor `{name}`")
        found[layer] = known[0]
    return found


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """That many torch threads inside (0: physical cores), the former number after."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads.resolve(count))
    try:
        yield
    finally:
        torch.set_num_threads(before)
