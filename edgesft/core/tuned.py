"""Put a delta between a model and its linear layers, and describe a zeroth-order shift to all of them.

Two ways, decided by the stage:
* in place: theta is the weight. Under a shift the forward pass adds the noise chunk by chunk to a temporary;
  the stored weight changes only in `descend`.
* beside: theta is small and trained next to the frozen weight; a shift makes a shifted copy of theta.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgesft.core.directions import Directions
from edgesft.core.protocols import Loss, Objective, Region, Shift, Theta
from edgesft.core.region import CHUNK, Band
from edgesft.core.schedule import derive


class Noise(Protocol):
    """What the perturbation kernels offer; see `edgesft.kernels.perturb`."""

    def tensor_id(self, name: str) -> int: ...

    def noise(self, shape: tuple[int, ...], seed: int, tensor: int, *, device: torch.device) -> Tensor: ...

    def perturbed_linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        seed: int,
        tensor: int,
        scale: float,
        low: float,
        high: float,
    ) -> Tensor: ...

    def add_noise_(
        self, weight: Tensor, *, seed: int, tensor: int, scale: float, low: float, high: float
    ) -> int: ...


class Setting:
    """Where all layers of one model are now: the shift of this forward pass and the progress of the run."""

    def __init__(self) -> None:
        self.shift: Shift | None = None
        self.progress = 0.0


class TunedLinear(nn.Module):
    """A linear layer with its delta. base is never replaced; theta holds plain tensors, not parameters."""

    def __init__(
        self,
        name: str,
        base: nn.Linear,
        region: Region,
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

    @property
    def in_place(self) -> bool:
        return not self.theta

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        weight, bias, shift = self.base.weight, self.base.bias, self._setting.shift
        if self.in_place:
            if shift is None:
                return functional.linear(x, weight, bias)
            low, high = band(self.region)
            tensor = self._kernel.tensor_id(f"{self.name}.weight")
            return self._kernel.perturbed_linear(
                x, weight, bias, seed=shift.seed, tensor=tensor, scale=shift.scale, low=low, high=high
            )
        theta = self.theta if shift is None else self._shifted(shift)
        if self._beside:
            changed: Tensor = self.delta.output(x, functional.linear(x, weight, bias), theta)
            return changed
        return functional.linear(
            x, self.delta.effective(weight, self.region, theta, self._setting.progress), bias
        )

    def _shifted(self, shift: Shift) -> Theta:
        def move(name: str, p: Tensor) -> Tensor:
            tensor = self._kernel.tensor_id(f"{self.name}.{name}")
            z = self._kernel.noise(tuple(p.shape), shift.seed, tensor, device=p.device)
            return torch.add(p, z.to(p), alpha=shift.scale)

        return {name: move(name, p) for name, p in self.theta.items()}


def band(region: Region) -> tuple[float, float]:
    """(low, high) of a region that is a band of magnitudes."""
    if not isinstance(region, Band):
        raise TypeError(f"{region} is not a band of magnitudes")
    return region.low, region.high


class Tuned:
    """A model whose linear layers `regions` names are tuned. Use as a context: layers are put back at exit.

    regions: layer name -> which entries may change. delta: a method of the axis `delta`.
    in_place: theta is the weight itself; every region must be a band.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Linear],
        regions: Mapping[str, Region],
        delta: Any,  # noqa: ANN401 - a WeightDelta or an OutputDelta
        *,
        in_place: bool,
        kernel: Noise,
        seed: int,
    ) -> None:
        self.model, self.in_place, self._kernel = model, in_place, kernel
        self.setting = Setting()
        self.layers: dict[str, TunedLinear] = {}
        model.requires_grad_(False)
        for name, region in regions.items():
            base = layers[name]
            theta = {} if in_place else _initial(delta, base, region, derive(seed, "theta", name))
            self.layers[name] = TunedLinear(name, base, region, delta, theta, self.setting, kernel)

    def __enter__(self) -> "Tuned":
        for name, layer in self.layers.items():
            _replace(self.model, name, layer)
        return self

    def __exit__(self, *_: object) -> None:
        for name, layer in self.layers.items():
            _replace(self.model, name, layer.base)

    @property
    def theta(self) -> Theta:
        """What is trained, by `<layer>.<name>`; in place the weights themselves."""
        if self.in_place:
            return {f"{name}.weight": layer.base.weight.data for name, layer in self.layers.items()}
        return {f"{name}.{key}": p for name, layer in self.layers.items() for key, p in layer.theta.items()}

    @property
    def trainable(self) -> int:
        """How many values may change."""
        if self.in_place:
            return sum(layer.region.numel(layer.base.weight) for layer in self.layers.values())
        return sum(p.numel() for p in self.theta.values())

    @contextmanager
    def shifted(self, shift: Shift | None) -> Iterator[None]:
        """Every forward pass inside runs at theta + scale * z(seed)."""
        before, self.setting.shift = self.setting.shift, shift
        try:
            yield
        finally:
            self.setting.shift = before

    def loss(self, objective: Objective, batch: Any) -> Loss:  # noqa: ANN401 - core.batches.Batch
        """The loss on one batch as a function of the shift."""

        def at(shift: Shift | None) -> Tensor:
            with self.shifted(shift):
                return objective.loss(self.model, batch, None)

        return at

    @torch.no_grad()
    def descend(self, gradient: Directions, lr: float, decay: float = 0.0) -> int:
        """In place: w <- w - lr * gradient inside the region, chunk by chunk. Returns the active entries.

        The region is that of the weights before the update, also with several directions. Weight decay
        touches the active entries only, and comes first.
        """
        active = 0
        for name, layer in self.layers.items():
            weight, tensor = layer.base.weight, self._kernel.tensor_id(f"{name}.weight")
            low, high = band(layer.region)
            if decay:
                _shrink_(weight, layer.region, 1 - lr * decay)
            if len(gradient.shifts) == 1:
                shift = gradient.shifts[0]
                active += self._kernel.add_noise_(
                    weight, seed=shift.seed, tensor=tensor, scale=-lr * shift.scale, low=low, high=high
                )
                continue
            total = torch.zeros_like(weight)
            for shift in gradient.shifts:
                z = self._kernel.noise(tuple(weight.shape), shift.seed, tensor, device=weight.device)
                total.add_(z.to(weight), alpha=-lr * shift.scale)
            mask = layer.region.mask(weight)
            weight.add_(total.mul_(mask))
            active += int(mask.sum())
        return active


def _initial(delta: Any, base: nn.Linear, region: Region, seed: int) -> Theta:  # noqa: ANN401 - any delta
    rng = torch.Generator(device=base.weight.device).manual_seed(seed)
    theta: Theta = (
        delta.init_output(base, rng)
        if hasattr(delta, "output")
        else delta.init(base.weight.detach(), region, rng)
    )
    return theta


def _shrink_(weight: Tensor, region: Region, factor: float) -> None:
    rows = max(1, CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part = weight[start : start + rows]
        part.copy_(torch.where(region.mask(part), part * factor, part))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
