"""Put a delta between a model and its linear layers, and describe a zeroth-order shift to all of them.

Two ways, decided by the stage:
* in place: theta is the weight. Under a shift the forward pass makes the perturbed weight strip by strip in
  front of the product; the stored weight changes only in `descend`.
* beside: theta is small and trained next to the frozen weight; a shift makes a shifted copy of theta.

Losses at several shifts can come out of one pass: the batch is stacked, and every group of its rows meets
another shift of the same weights, which are read once.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgesft.core import catalog
from edgesft.core.data.batches import TOGETHER_TOKENS, ArrayBatch
from edgesft.core.protocols import Mask, Objective, Region, Shift, Theta, Update
from edgesft.core.region import Band
from edgesft.core.tuning import lean
from edgesft.core.tuning.schedule import derive

Compute: TypeAlias = Literal["native", "bf16", "int8"]
EVERYTHING = Mask()


class Noise(Protocol):
    """What the perturbation kernels offer; see `edgesft.kernels.perturb`."""

    def tensor_id(self, name: str) -> int: ...

    def noise(
        self,
        shape: tuple[int, ...],
        seed: int,
        tensor: int,
        *,
        device: torch.device,
        law: str,
        rank: int,
    ) -> Tensor: ...

    def perturbed_linear(
        self,
        x: Tensor,
        weight: Any,  # noqa: ANN401 - a Tensor or a Quantized
        bias: Tensor | None,
        *,
        shifts: Sequence[Shift | None],
        tensor: int,
        mask: Mask,
        compute: str,
    ) -> Tensor: ...

    def descend_(
        self,
        weight: Any,  # noqa: ANN401 - a Tensor or a Quantized
        *,
        shifts: Sequence[Shift],
        tensor: int,
        mask: Mask,
        shrink: float,
        rounding: int | None,
    ) -> int: ...

    def replay_(self, weight: Any, updates: Sequence[Update], *, tensor: int, mask: Mask) -> int: ...  # noqa: ANN401


class Setting:
    """Where all layers of one model are now: the shifts of this forward pass and the progress of the run."""

    def __init__(self, compute: Compute) -> None:
        self.shifts: tuple[Shift | None, ...] = (None,)
        self.progress = 0.0
        self.compute = compute


class TunedLinear(nn.Module):
    """A linear layer with its delta. base is never replaced; theta holds plain tensors, not parameters.

    region None: the layer is not trained and only takes part in the precision of the products.
    """

    def __init__(
        self,
        name: str,
        base: nn.Module,
        region: Region | None,
        delta: Any,  # noqa: ANN401 - a WeightDelta or an OutputDelta
        theta: Theta,
        setting: Setting,
        kernel: Noise,
    ) -> None:
        super().__init__()
        self.base = base
        self.name, self.region, self.delta, self.theta = name, region, delta, theta
        self._setting, self._kernel = setting, kernel
        self._beside = hasattr(delta, "output")
        self._tensor = kernel.tensor_id(f"{name}.weight")
        self._mask = region.rule() if isinstance(region, Band) and not theta else EVERYTHING

    @property
    def in_place(self) -> bool:
        return not self.theta

    @property
    def stored(self) -> Any:  # noqa: ANN401 - a Tensor or a Quantized
        """The weight as it lies in memory."""
        return stored(self.base)

    @property
    def weight(self) -> Tensor:
        return floats(self.base)

    @property
    def bias(self) -> Tensor | None:
        found: Tensor | None = self.base.bias  # type: ignore[assignment,unused-ignore]
        return found

    def forward(self, x: Tensor) -> Tensor:  # (groups * n, ..., in) -> (groups * n, ..., out)
        setting = self._setting
        if not self.theta:
            shifts = setting.shifts if self.region is not None else (None,)
            return self._product(x, shifts)
        if setting.shifts == (None,):
            return self._moved(x, None, self._product(x, (None,)) if self._beside else None)
        parts = x.chunk(len(setting.shifts))
        base = self._product(x, (None,)).chunk(len(parts)) if self._beside else [None] * len(parts)
        moved = [self._moved(p, s, y) for p, s, y in zip(parts, setting.shifts, base, strict=True)]
        return moved[0] if len(moved) == 1 else torch.cat(moved)

    def _product(self, x: Tensor, shifts: Sequence[Shift | None]) -> Tensor:
        weight, compute = self.stored, self._setting.compute
        if compute == "native" and all(s is None for s in shifts):
            if isinstance(weight, Tensor):
                return functional.linear(x, weight, self.bias)
            plain: Tensor = self.base(x)  # lets a gradient through
            return plain
        return self._kernel.perturbed_linear(
            x,
            weight,
            self.bias,
            shifts=shifts,
            tensor=self._tensor,
            mask=self._mask,
            compute=compute,
        )

    def _moved(self, x: Tensor, shift: Shift | None, y: Tensor | None) -> Tensor:
        """The output with theta, shifted or not. y: that of the frozen layer, for a delta beside it."""
        theta = self.theta if shift is None else self._shifted(shift)
        if y is not None:
            changed: Tensor = self.delta.output(x, y, theta)
            return changed
        weight = self.delta.effective(self.weight, self.region, theta, self._setting.progress)
        return functional.linear(x, weight.to(x.dtype), self.bias)

    def _shifted(self, shift: Shift) -> Theta:
        def move(name: str, p: Tensor) -> Tensor:
            tensor = self._kernel.tensor_id(f"{self.name}.{name}")
            z = self._kernel.noise(
                tuple(p.shape), shift.seed, tensor, device=p.device, law=shift.law, rank=shift.rank
            )
            return torch.add(p, z.to(p), alpha=shift.scale)

        return {name: move(name, p) for name, p in self.theta.items()}


def stored(base: nn.Module) -> Any:  # noqa: ANN401 - a Tensor or a Quantized
    """The weight of a linear layer as it lies in memory."""
    quantized = getattr(base, "quantized", None)
    return base.weight.data if quantized is None else quantized


def floats(base: nn.Module) -> Tensor:
    """The weight of a linear layer in floating point; made new where it is quantised."""
    held = stored(base)
    found: Tensor = held if isinstance(held, Tensor) else held.dequantize()
    return found


class Tuned:
    """A model whose linear layers `regions` names are tuned. Use as a context: layers are put back at exit.

    layers: every linear layer of the blocks. regions: layer name -> which entries may change. delta: a method
    of the axis `delta`. in_place: theta is the weight itself; every region must be a band.
    base: gives the pretrained weight of a layer by its name, for `restore`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        regions: Mapping[str, Region],
        delta: Any,  # noqa: ANN401 - a WeightDelta or an OutputDelta
        *,
        in_place: bool,
        kernel: Noise,
        seed: int,
        compute: Compute = "native",
        base: Any = None,  # noqa: ANN401 - Callable[[str], Tensor | Quantized]
        prefix: Any = None,  # noqa: ANN401 - core.tuning.prefix.Prefix
        offload: Any = None,  # noqa: ANN401 - core.tuning.offload.Offload
    ) -> None:
        self.model, self.in_place, self._kernel = model, in_place, kernel
        self.setting = Setting(compute)
        self.prefix, self._base, self._offload = prefix, base, offload
        self._stack = ExitStack()
        self.layers: dict[str, TunedLinear] = {}
        self._others: dict[str, TunedLinear] = {}
        if in_place and not all(isinstance(region, Band) for region in regions.values()):
            raise TypeError("weights are tuned in place inside bands of magnitudes only")
        model.requires_grad_(False)
        for name, linear in layers.items():
            region = regions.get(name)
            if region is not None:
                theta = {} if in_place else _initial(delta, linear, region, derive(seed, "theta", name))
                self.layers[name] = TunedLinear(name, linear, region, delta, theta, self.setting, kernel)
            elif compute != "native":
                self._others[name] = TunedLinear(name, linear, None, delta, {}, self.setting, kernel)

    def __enter__(self) -> "Tuned":
        self._stack.enter_context(lean.in_place(self.model))
        for name, layer in (self.layers | self._others).items():
            _replace(self.model, name, layer)
            if self._offload is not None:
                self._offload.attach(name, layer)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for name, layer in (self.layers | self._others).items():
            if self._offload is not None:
                self._offload.detach(layer)
            _replace(self.model, name, layer.base)

    @property
    def theta(self) -> Theta:
        """What is trained beside the weights, by `<layer>.<name>`; in place nothing."""
        return {f"{name}.{key}": p for name, layer in self.layers.items() for key, p in layer.theta.items()}

    @property
    def masks(self) -> dict[str, Mask]:
        return {name: rule(layer.region) for name, layer in self.layers.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {name: _shape(layer.base) for name, layer in self.layers.items()}

    @property
    def entries(self) -> int:
        """Entries of all weights that a delta is put on."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def trainable(self) -> int:
        """How many values may change."""
        if not self.in_place:
            return sum(p.numel() for p in self.theta.values())
        found = 0
        for name, layer in self.layers.items():
            mask = rule(layer.region)
            with self._held(name):
                found += round(mask.keep / 256 * Band(mask.low, mask.high).numel(layer.weight))
        return found

    def typical(self) -> float:
        """The median of |w| over the entries that may change, of a sample of each layer."""
        found = []
        for name, layer in self.layers.items():
            mask = rule(layer.region)
            with self._held(name):
                sample = layer.weight.detach().flatten()[:65_536].abs().float()
            inside = sample[(sample >= mask.low) & (sample <= mask.high)]
            if inside.numel():
                found.append(float(inside.median()))
        return sorted(found)[len(found) // 2] if found else 0.0

    @contextmanager
    def shifted(self, *shifts: Shift | None) -> Iterator[None]:
        """Every forward pass inside runs at theta + scale * z(seed); one equal group of rows for each."""
        before, self.setting.shifts = self.setting.shifts, shifts
        try:
            yield
        finally:
            self.setting.shifts = before

    def loss(self, objective: Objective, batch: Any) -> "TorchLoss":  # noqa: ANN401 - ArrayBatch or Batch
        """The loss on one batch as a function of the shift."""
        return TorchLoss(self, objective, batch)

    def assess(self, batch: ArrayBatch) -> tuple[float, int | None]:
        """(mean task loss, right answers) at the present weights."""
        task: Any = catalog.load("objective", "task")()
        with torch.no_grad(), self.serving(batch):
            found: tuple[float, int | None] = task.assess(self.model, batch.torch())
        return found

    def serving(self, batch: Any) -> AbstractContextManager[Any]:  # noqa: ANN401 - ArrayBatch or Batch
        """The states below the first tuned block out of their cache, where there is one."""
        if self.prefix is None or not isinstance(batch, ArrayBatch):
            return nullcontext()
        serving: AbstractContextManager[Any] = self.prefix.serving(batch)
        return serving

    # ------------------------------------------------------------ in place

    @torch.no_grad()
    def descend(self, update: Update) -> int:
        """w <- shrink w + sum of scale * z inside the masks, which are those of w before."""
        active = 0
        for name, layer in self.layers.items():
            with self._held(name) as weight:
                active += self._kernel.descend_(
                    weight,
                    shifts=update.shifts,
                    tensor=layer._tensor,
                    mask=layer._mask,
                    shrink=update.shrink,
                    rounding=update.rounding,
                )
        return active

    @torch.no_grad()
    def replay(self, updates: Sequence[Update]) -> int:
        """`descend` by each in turn; a strip of a weight takes all of them while it is in the cache."""
        active = 0
        for name, layer in self.layers.items():
            with self._held(name) as weight:
                active += self._kernel.replay_(weight, updates, tensor=layer._tensor, mask=layer._mask)
        return active

    @torch.no_grad()
    def restore(self) -> None:
        """Back to the pretrained weights, read again."""
        for name in self.layers:
            with self._held(name) as weight:
                copy_(weight, self._base(name))

    def digests(self) -> dict[str, bytes]:
        """SHA-256 of each tuned weight as it lies in memory."""
        found = {}
        for name in self.layers:
            with self._held(name) as weight:
                found[name] = digest(weight)
        return found

    def _held(self, name: str) -> AbstractContextManager[Any]:
        """The stored weight of a layer, to be read and written."""
        if self._offload is not None:
            held: AbstractContextManager[Any] = self._offload.weight(name)
            return held
        return nullcontext(self.layers[name].stored)


class TorchLoss:
    """The loss of one batch as a function of the shift; see `core.protocols.Loss`."""

    def __init__(self, tuned: Tuned, objective: Any, batch: Any) -> None:  # noqa: ANN401
        self._tuned, self._objective, self._arrays = tuned, objective, batch
        self._batch = batch.torch() if isinstance(batch, ArrayBatch) else batch

    @property
    def prefers_together(self) -> bool:
        """Whether one stacked pass is expected to beat one pass for each shift."""
        tokens = self._batch.input_ids.numel()
        return self._tuned._offload is not None or tokens <= TOGETHER_TOKENS

    def __call__(self, shift: Shift | None = None) -> Tensor:
        recording = torch.is_grad_enabled() and shift is None
        tuned = self._tuned
        with torch.set_grad_enabled(recording), tuned.serving(self._arrays), tuned.shifted(shift):
            found: Tensor = self._objective.loss(tuned.model, self._batch, None)
        return found

    def together(self, shifts: Sequence[Shift | None]) -> Sequence[float]:
        """The losses at several shifts from one pass over the weights."""
        tuned = self._tuned
        with torch.no_grad(), tuned.serving(self._arrays), tuned.shifted(*shifts):
            losses: Tensor = self._objective.losses(tuned.model, self._batch, len(shifts))
        return [float(value) for value in losses]


def rule(region: Region | None) -> Mask:
    """The mask of a region that is a band of magnitudes."""
    if not isinstance(region, Band):
        raise TypeError(f"{region} is not a band of magnitudes")
    return region.rule()


def digest(weight: Any) -> bytes:  # noqa: ANN401 - a Tensor or a Quantized
    """SHA-256 of the bytes of a weight, of a quantised one of its codes and scales."""
    found = hashlib.sha256()
    for tensor in (weight,) if isinstance(weight, Tensor) else (weight.codes, weight.scales):
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.digest()


def copy_(weight: Any, source: Any) -> None:  # noqa: ANN401 - each a Tensor or a Quantized
    """Overwrite a stored weight by another of its kind."""
    if isinstance(weight, Tensor):
        weight.copy_(source)
        return
    weight.codes.copy_(source.codes)
    weight.scales.copy_(source.scales)


def _shape(base: nn.Module) -> tuple[int, int]:
    return int(base.out_features), int(base.in_features)  # type: ignore[arg-type]


def _initial(delta: Any, base: nn.Module, region: Region, seed: int) -> Theta:  # noqa: ANN401 - any delta
    held = stored(base)
    device = held.device if isinstance(held, Tensor) else held.codes.device
    rng = torch.Generator(device=device).manual_seed(seed)
    theta: Theta = (
        delta.init_output(base, rng) if hasattr(delta, "output") else delta.init(floats(base), region, rng)
    )
    return theta


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
