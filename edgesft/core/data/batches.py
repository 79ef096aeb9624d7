"""What a model is fed: one padded batch and the places in it whose next token counts.

Everything up to the model is numpy, so that an exported artefact is evaluated without torch;
`ArrayBatch.torch()` gives the same fields as tensors.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float32]
# With more tokens than this in a batch the products are bound by arithmetic, and reading every weight once
# instead of twice saves less than the doubled activations cost. Measured; see docs/design.md.
TOGETHER_TOKENS = 256
BatchKind: TypeAlias = Literal["lm", "labels", "candidates"]


@dataclass(frozen=True)
class Batch:
    """One batch as torch tensors.

    kind "lm": next-token prediction at `positions`.
    kind "labels": every label word is one token, so each row has one position (row order) and the answer is
    one of `choices` there.
    kind "candidates": every example is C consecutive rows, one per candidate; the score of a row is the mean
    log-probability of its targets, and the answer is the row with the best score (MeZO, 2023, section 3).
    """

    kind: BatchKind
    input_ids: "Tensor"  # (B, S) int64, right padded
    attention_mask: "Tensor"  # (B, S) int64, 1 = a token
    positions: "Tensor"  # (N,) int64, flat indices b * S + t whose NEXT token is supervised; ascending
    targets: "Tensor"  # (N,) int64, that next token ("labels", "candidates": of the right/each candidate)
    weights: "Tensor"  # (N,) float32, sum 1: weights of the right completions' tokens in a mean loss
    rows: "Tensor"  # (N,) int64, row of the batch of each position
    choices: "Tensor | None" = None  # "labels": (C,) int64 token ids of the label words
    example: "Tensor | None" = None  # "candidates": (B,) int64 example of each row, 0..E-1
    gold: "Tensor | None" = None  # "labels": (B,); "candidates": (E,); int64 index of the right answer

    def to(self, device: "torch.device | str") -> "Batch":
        """The same batch on another device."""
        moved = {k: v.to(device) for k, v in vars(self).items() if k != "kind" and v is not None}
        return Batch(kind=self.kind, **moved)


@dataclass(frozen=True)
class ArrayBatch:
    """`Batch` as numpy arrays; the fields mean the same.

    indices: number in its split of each example (E,), of each row (B,) for "lm".
    """

    kind: BatchKind
    input_ids: IntArray  # (B, S)
    attention_mask: IntArray  # (B, S)
    positions: IntArray  # (N,)
    targets: IntArray  # (N,)
    weights: FloatArray  # (N,)
    rows: IntArray  # (N,)
    choices: IntArray | None = None  # (C,)
    example: IntArray | None = None  # (B,)
    gold: IntArray | None = None  # (B,) or (E,)
    indices: IntArray | None = None  # (E,) or (B,)

    def torch(self) -> Batch:
        """The same batch as torch tensors that share its memory (numpy 64-bit integers and float32)."""
        import torch

        fields = {k: v for k, v in vars(self).items() if k not in ("kind", "indices") and v is not None}
        return Batch(kind=self.kind, **{k: torch.from_numpy(v) for k, v in fields.items()})

    @property
    def tokens(self) -> int:
        """Real tokens in the batch, padding left out."""
        return int(self.attention_mask.sum())
