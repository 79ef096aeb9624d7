"""Calibration statistics of linear layers, gathered block by block and only where a method asks for them.

Only one block's statistics exist at a time. Blocks are visited in order, and what a caller does to the
weights of one block is seen by the blocks after it, as in SparseGPT (2023) and Wanda (2023).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgesft.core import models
from edgesft.core.errors import ArtifactError, UsageError, nearest

GATHERED = frozenset({"input_sq", "hessian"})  # what a forward pass can give
CHUNK_TOKENS = 1024  # tokens a forward call: enough for full-speed matrix products, little memory
SAMPLE = 128  # input rows kept of each layer, to tell what a change of its weight does to its output


class Statistics:
    """`protocols.Signals` of a set of layers. Means over tokens, so that sizes mean something."""

    def __init__(
        self, needs: frozenset[str] = frozenset(), precision: torch.dtype = torch.float32, stride: int = 1
    ) -> None:
        unknown = needs - GATHERED
        if unknown:
            raise UsageError(f"no calibration gives `{min(unknown)}`", nearest(min(unknown), GATHERED))
        self._needs, self._precision, self._stride = needs, precision, max(1, stride)
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._samples: dict[str, list[Tensor]] = {}
        self._tokens: dict[str, int] = {}
        self._last: tuple[Tensor, int, dict[str, Tensor], Tensor] | None = None

    def input_sq(self, name: str) -> Tensor:  # (in,)
        """Mean of x_j^2 over the tokens."""
        return self._sum("input_sq", name) / self._tokens[name]

    def hessian(self, name: str) -> Tensor:  # (in, in)
        """(2 / n) sum over tokens of x x^T."""
        return self._sum("hessian", name) * (2.0 / self._tokens[name])

    def grad_sq(self, name: str) -> Tensor:  # (out, in)
        raise LookupError("calibration for compression gathers no gradients")

    def previous(self, name: str) -> Tensor:  # (out, in)
        raise LookupError("calibration for compression knows no phase before it")

    def tokens(self, name: str) -> int:
        """How many inputs a layer has seen; 0 for one that the model never called."""
        return self._tokens.get(name, 0)

    def sample(self, name: str) -> Tensor:  # (rows, in)
        """Some inputs of a layer, evenly spaced over the calibration text."""
        return torch.cat(self._samples[name])

    def check_finite(self) -> None:
        """Raise ArtifactError, naming the layer, if something that was added up is NaN or infinite."""
        for (_, name), total in self._sums.items():
            if not bool(total.isfinite().all()):
                raise ArtifactError(f"the inputs of `{name}` are not finite on the calibration text")

    def _sum(self, signal: str, name: str) -> Tensor:
        if (signal, name) not in self._sums:
            raise LookupError(
                f"`{signal}` of `{name}` was not gathered: `needs` does not name it, or nothing ran"
            )
        return self._sums[signal, name]

    @contextmanager
    def listen(self, layers: Mapping[str, nn.Linear]) -> Iterator[None]:
        """Add up the inputs of `layers` while the context is open."""

        def hook(name: str) -> Any:  # noqa: ANN401 - torch's own type of a hook
            return lambda _module, args: self._add(name, args[0].detach())

        handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
        try:
            yield
        finally:
            self._last = None
            for handle in handles:
                handle.remove()

    def _add(self, name: str, x: Tensor) -> None:  # (..., in)
        moments, rows = self._moments(x)
        for signal, value in moments.items():
            total = self._sums.get((signal, name))
            self._sums[signal, name] = value.clone() if total is None else total.add_(value)
        self._samples.setdefault(name, []).append(rows)
        self._tokens[name] = self.tokens(name) + x.shape[:-1].numel()

    def _moments(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """What one call adds; q, k and v read the same tensor, whose products are made once for all."""
        if self._last is not None and _same(self._last[0], self._last[1], x):
            return self._last[2], self._last[3]
        flat = x.reshape(-1, x.shape[-1]).to(self._precision)
        moments = {}
        if "input_sq" in self._needs:
            moments["input_sq"] = flat.square().sum(0)
        if "hessian" in self._needs:
            moments["hessian"] = flat.T @ flat
        middle = min(self._stride // 2, len(flat) - 1)  # not the first token of a text: its inputs are freaks
        rows = flat[middle :: self._stride].to(x.dtype, copy=True)
        self._last = (x, x._version, moments, rows)
        return moments, rows


def _same(held: Tensor, version: int, x: Tensor) -> bool:
    """Whether `x` is the unchanged memory of `held`; as that is held, its address cannot be another's."""
    return (
        held.data_ptr() == x.data_ptr()
        and held.shape == x.shape
        and held.stride() == x.stride()
        and held.dtype == x.dtype
        and held._version == version == x._version
    )


@dataclass(frozen=True)
class Visit:
    """One block with its linear layers, by full name, and what they were fed."""

    name: str
    layers: Mapping[str, nn.Linear]
    signals: Statistics


class _Stop(Exception):
    """Ends a forward pass as soon as what it was made for is known."""


@dataclass(frozen=True)
class _Call:
    """What a block is given besides the hidden states: masks, positions, rotations."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def walk(
    model: nn.Module,
    windows: Tensor,  # (count, length) int64, no padding
    needs: frozenset[str],
    layers: Mapping[str, nn.Linear] | None = None,
    precision: torch.dtype = torch.float32,
) -> Iterator[Visit]:
    """Visit the blocks of `model` in order, each with the statistics of its linear layers.

    Weights that the caller changes during a visit are in force for the blocks after it: their inputs come
    from a second pass through the changed block. layers: default `models.linears(model)`.
    Memory: the hidden states (count, length, hidden) and one block's statistics.
    Raises ArtifactError if the activations stop being finite.
    """
    blocks = models.blocks(model)
    wanted = models.linears(model) if layers is None else layers
    parts = torch.split(windows, max(1, CHUNK_TOKENS // windows.shape[1]))
    with torch.no_grad():
        hidden, calls = _embed(model, [block for _, block in blocks], parts)
    for index, (name, block) in enumerate(blocks):
        members = {n: layer for n, layer in wanted.items() if n.startswith(name + ".")}
        signals = Statistics(needs, precision, windows.numel() // SAMPLE)
        last = index + 1 == len(blocks)
        with torch.no_grad(), signals.listen(members):
            for states in hidden:
                _run(block, states, calls[len(states)][index])
        signals.check_finite()
        yield Visit(name, members, signals)
        del signals
        if last:
            return
        with torch.no_grad():
            for i, states in enumerate(hidden):
                hidden[i] = _run(block, states, calls[len(states)][index])


def _run(block: nn.Module, states: Tensor, call: _Call) -> Tensor:
    out = block(states, *call.args, **call.kwargs)
    found = out[0] if isinstance(out, tuple) else out
    assert isinstance(found, Tensor)
    return found


def _embed(
    model: nn.Module, blocks: list[nn.Module], parts: tuple[Tensor, ...]
) -> tuple[list[Tensor], dict[int, list[_Call]]]:
    """Hidden states before the first block, and for each size of a part what every block is called with.

    Masks and positions depend on the shape only (there is no padding), so one full pass per size tells.
    """
    backbone = models.backbone(model)
    hidden: list[Tensor] = []
    calls: dict[int, list[_Call]] = {}

    def spy(index: int, seen: list[_Call], until: int) -> Any:  # noqa: ANN401 - torch's own type of a hook
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            states = args[0] if args else rest.pop("hidden_states")
            if index == 0:
                hidden.append(states.detach())
            if "past_key_values" in rest:
                rest["past_key_values"] = None  # a cache would carry one pass over into the next
            seen.append(_Call(tuple(args[1:]), rest))
            if index == until:
                raise _Stop

        return hook

    for part in parts:
        new = len(part) not in calls
        seen: list[_Call] = []
        until = len(blocks) - 1 if new else 0
        handles = [
            block.register_forward_pre_hook(spy(i, seen, until), with_kwargs=True)
            for i, block in enumerate(blocks[: until + 1])
        ]
        try:
            backbone(input_ids=part, use_cache=False)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        if new:
            calls[len(part)] = seen
    return hidden, calls
