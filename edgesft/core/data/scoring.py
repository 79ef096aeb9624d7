"""The task's loss and its scores out of logits, in numpy: what `objective:task` computes, without torch.

Log-softmax is taken in float64 over the float32 logits of a runtime.
"""

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from edgesft.core.errors import UsageError

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgesft.core.data.batches import ArrayBatch, FloatArray, IntArray

    Doubles: TypeAlias = npt.NDArray[np.float64]

_CHUNK_BYTES = 16 << 20  # of float64 logits together


def log_probabilities(logits: "FloatArray", targets: "IntArray") -> "Doubles":
    """(N,): of each of `targets` (N,) under the softmax of its row of `logits` (N, V)."""
    found = np.empty(len(targets), np.float64)
    step = max(1, _CHUNK_BYTES // (8 * logits.shape[1]))
    for start in range(0, len(targets), step):
        part = logits[start : start + step].astype(np.float64)
        part -= part.max(1, keepdims=True)
        picked = part[np.arange(len(part)), targets[start : start + step]]
        found[start : start + step] = picked - np.log(np.exp(part).sum(1))
    return found


def label_scores(batch: "ArrayBatch", logits: "FloatArray") -> "Doubles":
    """(B, C): the logits (B, V) of the label words alone."""
    if batch.choices is None:
        raise UsageError(f"a batch of kind `{batch.kind}` has no answers to choose from")
    scores: Doubles = logits[:, batch.choices].astype(np.float64)
    return scores


def candidate_scores(batch: "ArrayBatch", found: "Doubles") -> "Doubles":
    """(E, C): the mean log-probability of each candidate; found: (N,) `log_probabilities` of the targets."""
    if batch.example is None:
        raise UsageError(f"a batch of kind `{batch.kind}` has no answers to choose from")
    rows = len(batch.input_ids)
    sums, counts = np.bincount(batch.rows, found, rows), np.bincount(batch.rows, minlength=rows)
    scores: Doubles = (sums / counts).reshape(int(batch.example[-1]) + 1, -1)
    return scores


def text_loss(batch: "ArrayBatch", found: "Doubles") -> float:
    """Weighted mean of the negative log-probabilities (N,)."""
    return -float((found * batch.weights.astype(np.float64)).sum())


def choice_loss(batch: "ArrayBatch", scores: "Doubles") -> tuple[float, int]:
    """(mean cross-entropy, right answers) of scores (E, C); the highest score is the answer."""
    gold: Any = batch.gold
    if gold is None:
        raise UsageError(f"a batch of kind `{batch.kind}` names no right answer")
    shifted = scores - scores.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(scores)), gold]
    return float(losses.mean()), int((scores.argmax(1) == gold).sum())
