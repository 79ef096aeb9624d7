"""The contracts: what a method of each axis offers, and what the machine side offers to the stages."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Generator, Tensor, nn

    from edgesft.core.data.batches import ArrayBatch, Batch

    FloatArray: TypeAlias = npt.NDArray[np.float32]
    IntArray: TypeAlias = npt.NDArray[np.int64]

Theta: TypeAlias = "dict[str, Tensor]"  # the trainable tensors of one layer, or of all by `<layer>.<name>`


Law: TypeAlias = Literal["gaussian", "rademacher", "low-rank"]  # how the noise is distributed


@dataclass(frozen=True)
class Shift:
    """A zeroth-order perturbation that is described, never applied: theta + scale * z(seed).

    z is made again wherever it is needed from (seed, tensor id, element index), so no order of layers,
    chunks or threads can change it. scale: +eps or -eps of a loss, or the signed length of a step.
    law: of z; its entries have mean 0 and variance 1. rank: of z = u v^T / sqrt(rank), where law is low-rank.
    """

    seed: int
    scale: float
    law: Law = "gaussian"
    rank: int = 0


@dataclass(frozen=True)
class Mask:
    """Which entries w of a tensor take part: low <= |w| <= high, and of these a random share of keep / 256.

    The share is chosen by counter-based bytes of `seed`, so it is the same whenever it is asked for. A NaN
    takes no part.
    """

    low: float = 0.0
    high: float = math.inf
    keep: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Update:
    """One step on the weights: w <- shrink w + sum of scale * z(seed), inside the mask of w before it.

    shifts: scale is the signed coefficient of each direction. rounding: seed of stochastic rounding into
    weights of low precision; None: to nearest.
    """

    shifts: tuple[Shift, ...]
    shrink: float = 1.0
    rounding: int | None = None


class Loss(Protocol):
    """The loss of one batch at theta (None) or at a shifted theta. Weights are the same before and after."""

    def __call__(self, shift: Shift | None, /) -> "Tensor": ...

    def together(self, shifts: "Sequence[Shift | None]") -> "Sequence[float]":
        """The losses at several points, out of one pass in which every weight is read once."""
        ...


class Tunable(Protocol):
    """A model under zeroth-order tuning in place: loaded in torch, or an exported artefact in its runtime."""

    @property
    def masks(self) -> "Mapping[str, Mask]":
        """Layer name -> which entries of its weight may change."""
        ...

    @property
    def shapes(self) -> "Mapping[str, tuple[int, int]]":
        """Layer name -> (out, in) of its weight."""
        ...

    @property
    def trainable(self) -> int:
        """How many entries may change."""
        ...

    def loss(self, objective: "Objective", batch: "ArrayBatch") -> Loss:
        """The mean loss of one batch as a function of the shift."""
        ...

    def assess(self, batch: "ArrayBatch") -> tuple[float, int | None]:
        """(mean task loss, right answers) at the present weights; None where there are no answers."""
        ...

    def descend(self, update: Update) -> int:
        """Change the weights; returns how many entries were inside the masks."""
        ...

    def replay(self, updates: "Sequence[Update]") -> int:
        """`descend` by each in turn, with the same bits."""
        ...

    def restore(self) -> None:
        """Back to the weights that it was loaded with."""
        ...

    def digests(self) -> "Mapping[str, bytes]":
        """SHA-256 of each tuned weight as it is now, by layer name."""
        ...


class Region(Protocol):
    """Which entries of one tensor may change."""

    def numel(self, w: "Tensor") -> int: ...
    def mask(self, w: "Tensor") -> "Tensor": ...  # bool, the shape of w
    def take(self, w: "Tensor") -> "Tensor": ...  # (numel,)
    def add(self, w: "Tensor", values: "Tensor") -> "Tensor": ...  # differentiable; outside is untouched


class Signals(Protocol):
    """Calibration statistics; only what a method's `needs` names is ever gathered."""

    def input_sq(self, name: str) -> "Tensor": ...  # (in,)
    def hessian(self, name: str) -> "Tensor": ...  # (in, in)
    def grad_sq(self, name: str) -> "Tensor": ...  # (out, in)
    def previous(self, name: str) -> "Tensor": ...  # (out, in), the phase before


class Select(Protocol):
    """1 -- which entries may change."""

    needs: ClassVar[frozenset[str]]

    def region(self, name: str, weight: "Tensor", signals: Signals, progress: float) -> Region | None: ...


class WeightDelta(Protocol):
    """2a -- a change written into the weight."""

    def init(self, weight: "Tensor", region: Region, rng: "Generator") -> Theta: ...
    def effective(self, weight: "Tensor", region: Region, theta: Theta, progress: float) -> "Tensor": ...


class OutputDelta(Protocol):
    """2b -- a change written beside the layer; `fold` where it can also go into the weight."""

    def init_output(self, module: "nn.Linear", rng: "Generator") -> Theta: ...
    def output(self, x: "Tensor", y: "Tensor", theta: Theta) -> "Tensor": ...
    def fold(
        self, weight: "Tensor", bias: "Tensor | None", theta: Theta
    ) -> "tuple[Tensor, Tensor | None]": ...


class Gradient(Protocol):
    """A direction of descent that need never exist whole."""

    @property
    def loss(self) -> float: ...
    def items(self) -> "Iterator[tuple[str, Tensor]]": ...


class Estimate(Protocol):
    """3a -- how the direction of descent is found."""

    def gradient(self, loss: Loss, params: Theta, seed: int) -> Gradient: ...


class Objective(Protocol):
    """3b -- what is minimised."""

    def loss(self, model: "nn.Module", batch: "Batch", reference: "nn.Module | None") -> "Tensor": ...


class Patch(Protocol):
    """4 -- what is skipped while the model runs (tokens: in training; activate: at inference)."""

    def attach(self, model: "nn.Module") -> AbstractContextManager[None]: ...


class Compress(Protocol):
    """5 -- what one weight becomes for the device. weight: (out, in), float32, not modified."""

    needs: ClassVar[frozenset[str]]

    def compress(self, name: str, weight: "Tensor", signals: Signals) -> "Tensor": ...


class Compose(Protocol):
    """6 -- what several deltas become."""

    def compose(self, deltas: "Sequence[Mapping[str, Tensor]]") -> "dict[str, Tensor]": ...


class Runnable(Protocol):
    """A loaded model, ours or exported, behind one small interface (numpy in, numpy out; no torch needed)."""

    vocabulary: int
    kind: str  # "decoder", "encoder", or "graph": any other, which is only called

    def logits(
        self, input_ids: "IntArray", attention_mask: "IntArray", positions: "IntArray"
    ) -> "FloatArray":
        """Logits (N, vocabulary) after each of `positions` (N,), flat indices b * S + t into right-padded
        `input_ids` (B, S). Encoders return hidden states (N, hidden) there."""
        ...

    def start(self, capacity: int, batch: int = 1) -> "Decoding":
        """A fresh decoding state of `batch` sequences with room for `capacity` tokens each."""
        ...


class Decoding(Protocol):
    """One sequence, or several of one length, with their KV cache.

    For B > 1 sequences, prompts are (B, S), tokens (B,) and logits (B, vocabulary).
    """

    def prefill(self, input_ids: "IntArray") -> "FloatArray":
        """Feed a prompt (S,); logits (vocabulary,) after its last token."""
        ...

    def step(self, token: int) -> "FloatArray":
        """Feed one token; logits (vocabulary,) after it."""
        ...


class Exporter(Protocol):
    """Writes a model for a runtime."""

    target: ClassVar[str]  # "onnx", "tensorrt"

    def problems(self, model: Path) -> list[str]: ...
    def export(self, model: Path, out: Path) -> dict[str, Any]: ...


class Kernel(Protocol):
    """One implementation of an operation; `kernels.dispatch` picks the fastest that fits."""

    op: ClassVar[str]

    def fits(self) -> bool: ...
