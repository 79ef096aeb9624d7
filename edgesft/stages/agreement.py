"""The measurements behind `verify`: how far an export is from torch, and from the model it was made of.

`reference`: torch. `got`: the export. Logits are (N, vocabulary) of N positions; of encoders, hidden states.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgesft.core import models
from edgesft.core.errors import ArtifactError

if TYPE_CHECKING:
    from pathlib import Path

    from edgesft.core.protocols import Runnable
    from edgesft.core.torch_runtime import TorchRunnable

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


def finite(value: float) -> float | None:
    """A number for JSON: None where it is NaN or infinite, which every judgement takes for a failure."""
    return float(value) if np.isfinite(value) else None


def _same(reference: FloatArray, got: FloatArray) -> None:
    if reference.shape != got.shape:
        raise ArtifactError(f"the export gives {list(got.shape)} numbers, the model {list(reference.shape)}")


@dataclass
class Errors:
    """Worst errors over positions.

    max_abs: largest difference. max_rel: largest over positions of max |difference| / max |reference|.
    top1: positions whose most probable entry is the same; agreed / positions.
    """

    max_abs: float = 0.0
    max_rel: float = 0.0
    agreed: int = 0
    positions: int = 0

    def add(self, reference: FloatArray, got: FloatArray) -> None:
        """Both (N, width)."""
        _same(reference, got)
        difference = np.abs(got - reference).max(-1)  # (N,)
        scale = np.maximum(np.abs(reference).max(-1), 1e-30)
        # np.maximum keeps NaN, max() might drop it
        self.max_abs = float(np.maximum(self.max_abs, difference.max()))
        self.max_rel = float(np.maximum(self.max_rel, (difference / scale).max()))
        self.agreed += int((reference.argmax(-1) == got.argmax(-1)).sum())
        self.positions += len(reference)

    def report(self, *, top1: bool = True) -> dict[str, Any]:
        made: dict[str, Any] = {"max_abs": finite(self.max_abs), "max_rel": finite(self.max_rel)}
        if top1:
            made["top1_agreement"] = self.agreed / self.positions if self.positions else None
        return made | {"positions": self.positions}


def each(model: "Runnable", ids: IntArray) -> FloatArray:
    """Logits (S, vocabulary) after every token of one sequence (S,)."""
    return model.logits(ids[None], np.ones((1, len(ids)), np.int64), np.arange(len(ids)))


def padded(rows: Sequence[IntArray]) -> tuple[IntArray, IntArray, IntArray]:
    """(ids, mask, positions): rows of unlike length as one batch (B, S) padded on the right, and the flat
    positions (N,) of the real tokens."""
    longest = max(len(r) for r in rows)
    ids = np.zeros((len(rows), longest), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask, np.flatnonzero(mask)


def prefill(got: "Runnable", rows: Sequence[IntArray], expected: Sequence[FloatArray]) -> Errors:
    """Every row by itself."""
    errors = Errors()
    for row, reference in zip(rows, expected, strict=True):
        errors.add(reference, each(got, row))
    return errors


def spread(rows: Sequence[IntArray]) -> list[int]:
    """Which rows to take where all would be too slow: the longest, the shortest and one between."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return list(dict.fromkeys((order[-1], order[0], order[len(order) // 2])))


def batch(got: "Runnable", rows: Sequence[IntArray], expected: Sequence[FloatArray]) -> Errors:
    """Up to three rows of unlike length at once; padding must change nothing."""
    errors = Errors()
    chosen = spread(rows)
    errors.add(np.concatenate([expected[i] for i in chosen]), got.logits(*padded([rows[i] for i in chosen])))
    return errors


def decode(
    got: "Runnable", rows: Sequence[IntArray], expected: Sequence[FloatArray], steps: int
) -> Iterator[tuple[IntArray, FloatArray, FloatArray]]:
    """(tokens, reference, got): up to three rows fed as a prompt, then token by token through the KV cache.

    The last `steps` tokens at most, and half the row, come one by one. The reference is a model without a
    cache: a cache that is wrong cannot agree with itself.
    """
    for i in spread(rows):
        row = rows[i]
        head = max(1, len(row) // 2, len(row) - steps)
        state = got.start(len(row))
        made = [state.prefill(row[:head]), *(state.step(int(t)) for t in row[head:])]
        yield row[head - 1 :], expected[i][head - 1 :], np.stack(made)


@dataclass
class Greedy:
    """Greedy tokens of both, the reference's fed to both so that one miss does not hide the next.

    ties: misses where the reference holds the export's token for as good within the tolerance.
    """

    tokens: int = 0
    misses: int = 0
    ties: int = 0
    first: dict[str, Any] | None = None

    def report(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "equal": self.misses == 0,
            "mismatches": self.misses,
            "ties": self.ties,
            "first_mismatch": self.first,
        }


@dataclass(frozen=True)
class Continuation:
    """What a model says after a prompt: tokens (T,), each the most probable of its logits (T, vocabulary)."""

    prompt: int
    row: IntArray
    tokens: IntArray
    logits: FloatArray


def continued(model: "Runnable", rows: Sequence[IntArray], count: int) -> list[Continuation]:
    """`count` greedy tokens after up to three of the rows."""
    made = []
    for i in spread(rows):
        state = model.start(len(rows[i]) + count)
        logits = [state.prefill(rows[i])]
        while len(logits) < count:
            logits.append(state.step(int(logits[-1].argmax())))
        table = np.stack(logits)
        made.append(Continuation(i, rows[i], table.argmax(-1), table))
    return made


def follow(got: "Runnable", what: Continuation, *, step: bool) -> FloatArray:
    """Logits (T, vocabulary) of another model that is fed the same tokens.

    step: through its KV cache, one by one; otherwise all at once, for arithmetic too slow to repeat.
    """
    row, tokens = what.row, what.tokens[:-1]
    if not step:
        return each(got, np.concatenate([row, tokens]))[len(row) - 1 :]
    state = got.start(len(row) + len(tokens))
    return np.stack([state.prefill(row), *(state.step(int(t)) for t in tokens)])


def greedy(said: Sequence[Continuation], got: "Runnable", tolerance: float, *, step: bool) -> Greedy:
    """Compare greedy tokens. tolerance: of a logit, relative to the largest; two tokens are a tie where the
    reference's own margin is below what two errors of that size make."""
    found = Greedy()
    for what in said:
        theirs = follow(got, what, step=step)
        for index, (a, b) in enumerate(zip(what.logits, theirs, strict=True)):
            token, other = int(a.argmax()), int(b.argmax())
            found.tokens += 1
            if token == other and bool(np.isfinite(b).all()):
                continue
            margin = float(a[token] - a[other])
            if margin <= 2 * tolerance * float(np.abs(a).max()) and bool(np.isfinite(b).all()):
                found.ties += 1
                continue
            found.misses += 1
            place = {"prompt": what.prompt, "index": index, "expected": token, "got": other}
            found.first = found.first or place | {"margin": finite(margin)}
    return found


@dataclass
class Drift:
    """How far the shipped artefact is from the unquantised model, over the prompts' positions."""

    agreed: int = 0
    positions: int = 0
    divergence: float = 0.0  # sum of KL(reference || got), nats
    losses: list[float] = field(default_factory=lambda: [0.0, 0.0])  # of reference, got: sum, nats
    predicted: int = 0

    def add(self, row: IntArray, reference: FloatArray, got: FloatArray) -> None:
        """row (S,); both (S, vocabulary)."""
        _same(reference, got)
        p, q = _log_softmax(reference), _log_softmax(got)
        self.agreed += int((reference.argmax(-1) == got.argmax(-1)).sum())
        self.positions += len(row)
        self.divergence += float((np.exp(p) * (p - q)).sum())
        at = np.arange(len(row) - 1)
        for i, table in enumerate((p, q)):
            self.losses[i] -= float(table[at, row[1:]].sum())
        self.predicted += len(at)

    def report(self) -> dict[str, Any]:
        ours, theirs = (np.exp(loss / max(1, self.predicted)) for loss in self.losses)
        return self.short() | {
            "perplexity": {"model": finite(ours), "exported": finite(theirs)},
            "perplexity_ratio": finite(theirs / ours),
        }

    def short(self) -> dict[str, Any]:
        """Without perplexities, which need whole texts."""
        return {
            "top1_agreement": self.agreed / max(1, self.positions),
            "mean_kl": finite(self.divergence / max(1, self.positions)),
            "positions": self.positions,
        }


def drift(rows: Sequence[IntArray], reference: Sequence[FloatArray], got: Sequence[FloatArray]) -> Drift:
    """Over all rows."""
    found = Drift()
    for row, a, b in zip(rows, reference, got, strict=True):
        found.add(row, a, b)
    return found


def _log_softmax(x: FloatArray) -> npt.NDArray[np.float64]:
    shifted = x.astype(np.float64) - x.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


# -- torch -----------------------------------------------------------------------------------------


def replace(model: "TorchRunnable", name: str, array: FloatArray) -> None:
    """Let torch compute with another weight. name: as in the model's files.

    Raises ArtifactError for one that the model lacks."""
    import torch

    state: dict[str, torch.Tensor] = model.model.state_dict(keep_vars=True)
    prefix = f"{getattr(model.model, 'base_model_prefix', '')}."
    found = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in state), None)
    if found is None or tuple(state[found].shape) != array.shape:
        raise ArtifactError(f"the export holds a tensor `{name}` {list(array.shape)} that the model lacks")
    with torch.no_grad():
        state[found].copy_(torch.from_numpy(np.ascontiguousarray(array)))


def hidden(model: "TorchRunnable", ids: IntArray) -> list[FloatArray]:
    """(S, hidden) after each block for one sequence (S,)."""
    seen: list[FloatArray] = []

    def record(_: Any, args: Any, output: Any) -> None:  # noqa: ANN401
        tensor = output[0] if isinstance(output, tuple) else output
        seen.append(tensor.float().numpy().reshape(-1, tensor.shape[-1]).copy())

    hooks = [block.register_forward_hook(record) for _, block in models.blocks(model.model)]
    try:
        each(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def layers(names: Sequence[str], reference: Sequence[FloatArray], got: Sequence[FloatArray]) -> list[float]:
    """|got - reference| / |reference| after each block, the worst position, Euclidean over channels."""
    worst = []
    for ours, theirs in zip(reference, got, strict=False):
        _same(ours, theirs)
        size = np.maximum(np.linalg.norm(ours, axis=-1), 1e-30)
        worst.append(float((np.linalg.norm(theirs - ours, axis=-1) / size).max()))
    return worst[: len(names)]


# -- prompts ---------------------------------------------------------------------------------------

PROMPTS = (
    "The capital of France is",
    "Water boils at a hundred degrees Celsius, and it freezes at",
    "A short story about a lighthouse keeper: every evening, before the sun went down, the old man climbed "
    "the stairs and lit the lamp, so that the ships in the bay could find their way home. One night",
    "Question: If a train leaves at nine and takes three hours, when does it arrive?\nAnswer:",
    "def add(a, b):\n    return",
    "The film was slow and far too long, but the ending",
)


def rows(path: "Path", prompts: Sequence[str] | None, vocabulary: int, context: int) -> list[IntArray]:
    """Token ids of the prompts, and one prompt of a single token.

    Without a tokenizer, and with no prompts asked for, fixed pseudo-random ids do. No row is longer than
    half the context (0: unknown), so that there is room to generate.
    """
    if prompts is None and not (path / "tokenizer.json").is_file():
        rng = np.random.default_rng(0)
        found = [rng.integers(0, vocabulary, size) for size in (24, 7, 12, 16)]
    else:
        tokenizer = models.tokenizer(path)
        texts = PROMPTS if prompts is None else prompts
        found = [np.array(tokenizer.encode(text), np.int64) for text in texts]
    longest = max(1, context // 2) if context else 512
    found = [r[:longest] for r in found if len(r)]
    if not found:
        raise ArtifactError("there is no prompt with a token in it, expected at least one")
    if int(max(r.max() for r in found)) >= vocabulary:
        raise ArtifactError(f"the tokenizer of `{path}` gives ids beyond the model's {vocabulary}")
    return [*found, found[0][:1]]
