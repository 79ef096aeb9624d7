"""Store the weights of a model in another way: plain, nm-packed (docs/format.md), compressed-tensors.

Linear layers of the blocks are what is converted; embeddings, the head, norms and biases are copied bit for
bit. Every matrix is looked at by itself: what is in no pattern is stored as it is best, and said.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgesft.core import catalog, compressed, console, stored
from edgesft.core.artifact import Artifact, Workdir
from edgesft.core.errors import ArtifactError, UsageError
from edgesft.core.params import Pattern, validate
from edgesft.core.stored import Stored
from edgesft.core.weights import Planned, check_finite, write_folder

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from edgesft.core.console import Bar

CODED = ("int4", "int8")


@dataclass(frozen=True, kw_only=True)
class Convert:
    """MODEL -> model, its weights stored in another way.

    Raises ArtifactError for weights that are broken, not finite or, with `pattern`, not in it; UsageError for
    a pattern that the format lacks.
    """

    name: ClassVar[str] = "convert"
    gives: ClassVar[str] = "model"

    to: Literal["nm-packed", "compressed-tensors", "dense"]
    value: Annotated[Literal["int4", "int8", "fp16", "bf16"], Field(description="of nm-packed weights")] = (
        "int4"
    )
    group: Annotated[
        Literal[32, 64, 128, 256], Field(description="inputs that share a scale, int4 and int8")
    ] = 64
    pattern: Annotated[
        Pattern | None, Field(description="N:M that every matrix must be in; none: found for each")
    ] = None

    @classmethod
    def from_options(cls, values: Mapping[str, Any]) -> "Convert":
        """From the options that were given. Raises UsageError for those that do not go together."""
        made = validate(cls, values, "convert")
        stray = [key for key in ("value", "group") if key in values and made.to != stored.PACKED]
        if stray:
            raise UsageError(f"`--{stray[0]}` is for `--to {stored.PACKED}`, not for `--to {made.to}`")
        if "group" in values and made.value not in CODED:
            raise UsageError(f"`--group` is for int4 and int8, the value is `{made.value}`")
        made._check_pattern()
        return made

    def _check_pattern(self) -> None:
        if self.pattern is None:
            return
        known = {
            stored.PACKED: list(catalog.runtime("kernels.nm_matmul.patterns").PATTERNS),
            "compressed-tensors": ["2:4"],
            "dense": [],
        }[self.to]
        if self.pattern not in known:
            names = ", ".join(f"`{name}`" for name in known) or "no pattern"
            raise UsageError(f"`--pattern` is `{self.pattern}`, `--to {self.to}` has {names}")

    def params(self) -> dict[str, Any]:
        """Every field that decides the result."""
        table: dict[str, Any] = {"to": self.to, "pattern": self.pattern}
        if self.to == stored.PACKED:
            table |= {"value": self.value} | ({"group": self.group} if self.value in CODED else {})
        return table

    def problems(self, inputs: Mapping[str, Artifact]) -> list[str]:
        found = inputs["model"]
        if found.kind != "model":
            return [f"`{found.ref}` is of kind `{found.kind}`, expected `model`"]
        how = stored.form(found.path)
        if how == self.to and how != stored.PACKED:
            return [f"`{found.ref}` is {how} already"]
        return []

    def run(self, inputs: Mapping[str, Artifact], work: Workdir) -> dict[str, Any]:
        began, model = time.monotonic(), inputs["model"]
        source = Stored(model.path)
        job = _JOBS[self.to](self, source, model, work)
        metrics = job.write()
        before = sum(path.stat().st_size for path in source.files.files)
        after = sum(path.stat().st_size for path in work.path.glob("*.safetensors"))
        return {
            **metrics,
            "weight_bytes": after,
            "weight_bytes_before": before,
            "seconds": round(time.monotonic() - began, 2),
        }


class _Job:
    """What all directions share: the folder's tensors, its linear layers, and what is said of them."""

    def __init__(self, stage: Convert, source: Stored, model: Artifact, work: Workdir) -> None:
        from edgesft.core import models, quantized

        self.stage, self.source, self.work, self.ref = stage, source, work, model.ref
        self.out: Path = work.path
        skeleton = quantized.skeleton(model.path, "float32")
        self.prefix = f"{getattr(skeleton, 'base_model_prefix', '') or 'model'}."
        self.layers: dict[str, str] = {}  # name of the weight in the files -> of the layer
        for layer in models.linears(skeleton):
            found = source.find(f"{layer}.weight", self.prefix)
            if found is None:
                raise ArtifactError(f"`{model.ref}` holds no tensor `{layer}.weight`")
            self.layers[found] = layer
        self.linears = _linear_names(skeleton)
        self._promised = _promised(model)
        self._known = set(model.metrics.get("dense_layers") or [])
        self.kept = self.total = 0

    def write(self) -> dict[str, Any]:
        raise NotImplementedError

    def floats(self, name: str) -> "npt.NDArray[np.float32]":
        """A weight as float32 numbers. Raises ArtifactError for NaN and infinite ones."""
        tensor = self.source.get(name).float()
        check_finite(name, tensor)
        array: npt.NDArray[np.float32] = tensor.numpy()
        self.kept += int((array != 0).sum())
        self.total += array.size
        return array

    def note(self, name: str, weight: "npt.NDArray[Any]", pattern: str | None) -> None:
        """Say where a matrix is not in the pattern that was asked for, or that its manifest promises.

        Raises ArtifactError for the former. pattern: the one that it is stored in.
        """
        wanted = self.stage.pattern or self._promised
        if wanted is None or wanted == pattern or self.layers[name] in self._known:
            return
        patterns = catalog.runtime("kernels.nm_matmul.patterns")
        n, m = (int(part) for part in wanted.split(":"))
        try:
            patterns.check_pattern(weight, n, m)
        except patterns.NotPacked as error:
            if self.stage.pattern:
                raise ArtifactError(
                    f"`{name}` is {error}",
                    f"edgesft sparsify {self.ref} --pattern {wanted} -o OUT, or leave out `--pattern`",
                ) from None
            console.warn(f"`{name}` is {error}, though its manifest says {wanted}")

    @property
    def density(self) -> float:
        return self.kept / self.total if self.total else 1.0


class _ToPacked(_Job):
    """Matrices are packed one after another into a file beside the result, which then is written from it."""

    def write(self) -> dict[str, Any]:
        from edgesft.core import models

        file = catalog.runtime("kernels.nm_matmul.file")
        spool = _Spool(self.work.checkpoint / "spool")
        about: dict[str, dict[str, Any]] = {}
        plan: list[Planned] = []
        counts: dict[str, int] = {}
        changed = size = bits = weights = 0.0
        with console.progress("convert", len(self.layers)) as bar:
            for name in self.source:
                packed = self._packed(name, bar) if name in self.layers else None
                if packed is None:
                    plan.append(Planned(name, self.source.dtype(name), self.source.shape(name)))
                    counts["plain"] = counts.get("plain", 0) + (name in self.layers)
                    continue
                if self._error is not None:
                    changed, size = changed + self._error[0], size + self._error[1]
                plan += file.planned(name, packed)
                spool.add(name + file.STREAM, packed.stream)
                spool.add(name + file.SCALES, packed.scales)
                about[name] = file.describe(packed, self._was(name))
                counts[packed.pattern] = counts.get(packed.pattern, 0) + 1
                bits += packed.bits * packed.rows * packed.columns
                weights += packed.rows * packed.columns
        if not about:
            raise ArtifactError(
                f"`{self.ref}` has no N:M matrix, and {self.stage.value} packs no other",
                f"edgesft sparsify {self.ref} -o OUT, or `--value int4`",
            )

        def get(name: str) -> "Tensor":
            return spool.get(name) if name in spool else _finite(self.source, name)

        write_folder(self.out, plan, get, lambda shard: file.metadata(about, [each.name for each in shard]))
        models.copy_about(self.source.path, self.out, dict.fromkeys(stored.KEYS) | _config())
        shown = {name: count for name, count in sorted(counts.items()) if count}
        return {
            "pattern": next(iter(shown)) if len(shown) == 1 and "dense" not in shown else None,
            "density": self.density,
            "matrices": shown,
            "bits_per_weight": round(bits / weights, 4),
            "relative_error": (changed / size) ** 0.5 if size else 0.0,
        }

    def _packed(self, name: str, bar: "Bar") -> Any:  # noqa: ANN401 - layout.Packed
        """The matrix packed, None if it is to stay plain."""
        packer = catalog.runtime("kernels.nm_matmul.packer")
        bar.advance()
        self._error: tuple[float, float] | None = None
        weight, stage = self.floats(name), self.stage
        before: Any = self.source.packed.get(name)
        group = stage.group if stage.value in CODED else 0
        if before is not None:
            before = packer.regroup(before, group) if before.value == stage.value else None
        same = before is not None
        pattern = before.pattern if same and stage.pattern is None else stage.pattern
        pattern = pattern or packer.best(weight, stage.value)
        self.note(name, weight, pattern if pattern != stage.pattern else None)
        if same and before.pattern == pattern:
            return before
        if pattern is None:
            return None
        try:
            packed = packer.pack(weight, stage.value, group, pattern)
        except ValueError as error:
            raise ArtifactError(f"`{name}` cannot be packed: {error}") from None
        self._error = packer.error(weight, packed)
        return packed

    def _was(self, name: str) -> str:
        """safetensors' name of the type that a weight had before it was first packed."""
        if name in self.source.packed:
            return str(self.source.packed.dtypes[name])
        return self.source.dtype(name)


class _ToCompressed(_Job):
    def write(self) -> dict[str, Any]:
        from edgesft.core import models

        plan: list[Planned] = []
        chosen: list[str] = []
        with console.progress("convert", len(self.layers)) as bar:
            for name in self.source:
                dtype, shape = self.source.dtype(name), self.source.shape(name)
                if name in self.layers and self._compressible(name, dtype, shape):
                    chosen.append(name)
                    plan += compressed.planned(name, dtype, (shape[0], shape[1]))
                else:
                    plan.append(Planned(name, dtype, shape))
                if name in self.layers:
                    bar.advance()
        if not chosen:
            raise ArtifactError(
                f"`{self.ref}` has no 2:4 matrix to compress",
                f"edgesft sparsify {self.ref} --pattern 2:4 -o OUT",
            )
        where = {each.name: name for name in chosen for each in compressed.planned(name, "F32", (1, 4))}

        def get(name: str) -> "Tensor":
            if name not in where:
                return _finite(self.source, name)
            base = where[name].removesuffix(compressed.WEIGHT)
            return compressed.compress(self.source.get(where[name]), name[len(base) :])

        write_folder(self.out, plan, get)
        sparse = {self.layers[name] for name in chosen}
        every = sum(math.prod(self.source.shape(name)) for name in self.source)
        entry = compressed.config_entry(
            ["Linear"],
            [name for name in self.linears if name not in sparse],
            (self.total - self.kept) / every,
        )
        models.copy_about(
            self.source.path, self.out, dict.fromkeys(stored.KEYS) | {"quantization_config": entry}
        )
        left = len(self.layers) - len(chosen)
        return {
            "pattern": None if left else "2:4",
            "density": self.density,
            "matrices": {"2:4": len(chosen)} | ({"plain": left} if left else {}),
        }

    def _compressible(self, name: str, dtype: str, shape: Sequence[int]) -> bool:
        weight = self.floats(name)
        reason = compressed.fits(name, dtype, tuple(shape))
        if reason is not None:
            if self.stage.pattern:
                raise ArtifactError(f"`{name}` cannot be stored 2:4: {reason}")
            return False
        fit = "2:4" in catalog.runtime("kernels.nm_matmul.patterns").fits(weight)
        self.note(name, weight, "2:4" if fit else None)
        return fit


class _ToDense(_Job):
    def write(self) -> dict[str, Any]:
        from edgesft.core import models

        plan = [Planned(name, self.source.dtype(name), self.source.shape(name)) for name in self.source]

        def get(name: str) -> "Tensor":
            tensor = _finite(self.source, name)
            if name in self.layers:
                self.kept += int(tensor.count_nonzero())
                self.total += tensor.numel()
            return tensor

        write_folder(self.out, plan, get)
        coded = any(self.source.packed.value(name) in CODED for name in self.source.packed)
        # codes times scales are exact in float32 alone, and a reader must not round them again
        wide = {"dtype": "float32"} if coded else {}
        models.copy_about(self.source.path, self.out, dict.fromkeys(stored.KEYS) | wide)
        return {"pattern": self._promised, "density": self.density, "matrices": {"plain": len(self.layers)}}


_JOBS: Mapping[str, type[_Job]] = {
    "nm-packed": _ToPacked,
    "compressed-tensors": _ToCompressed,
    "dense": _ToDense,
}


class _Spool:
    """Arrays in a file, end to end, so that a model is never in memory twice."""

    def __init__(self, path: Path) -> None:
        self._path, self._at = path, 0
        self._where: dict[str, tuple[int, int, str]] = {}
        path.write_bytes(b"")

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def add(self, name: str, array: "npt.NDArray[Any]") -> None:
        with self._path.open("ab") as file:
            file.write(array.tobytes())
        self._where[name] = (self._at, array.nbytes, array.dtype.str)
        self._at += array.nbytes

    def get(self, name: str) -> "Tensor":
        import numpy as np
        import torch

        at, size, kind = self._where[name]
        with self._path.open("rb") as file:
            file.seek(at)
            return torch.from_numpy(np.frombuffer(bytearray(file.read(size)), kind))


def _finite(source: Stored, name: str) -> "Tensor":
    tensor = source.get(name)
    check_finite(name, tensor)
    return tensor


def _config() -> dict[str, Any]:
    return {"quantization_config": dict(stored.CONFIG)}


def _linear_names(model: Any) -> list[str]:  # noqa: ANN401 - nn.Module
    from torch import nn

    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _promised(model: Artifact) -> str | None:
    """The pattern that the manifest of a model says its matrices are in."""
    found = model.metrics.get("pattern")
    return found if isinstance(found, str) and ":" in found else None
