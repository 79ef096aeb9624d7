"""Hidden states below the first tuned block, kept for every example that was seen.

Blocks that are not tuned compute the same for an example at +eps, at -eps and in every epoch. Here they are
skipped: the last of them gives back what was stored, so that only the blocks above it compute. States are
kept by the tokens that they belong to, of real tokens only, in the model's own type.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from edgesft.core import models
from edgesft.core.data.batches import ArrayBatch, IntArray
from edgesft.core.errors import UsageError

Forward: TypeAlias = Callable[..., Any]
TOLERANCE = 1e-4  # relative, of the check in `applies`: rounding of products of another shape, in float32


class Prefix:
    """The states that block `first` of a model is fed with, by token sequence.

    first: number of the first block that is tuned, at least 1. budget_bytes: of states kept; once it is full,
    what was stored first stays. (Each example comes once an epoch: one that is evicted would never be found
    when its turn comes, one that stays is found every time.) The states of the present batch lie beside it.

    A sequence's states are computed from that sequence alone, without padding, so they are the same whatever
    batch it came in and whatever was kept: a resumed run goes on with the same bits.
    hits, misses: sequences found and computed. bytes: kept now.
    Raises UsageError for a model whose blocks cannot be skipped.
    """

    def __init__(self, model: nn.Module, first: int, budget_bytes: int) -> None:
        if reason := self.applies(model, first):
            raise UsageError(
                f"hidden states below block {first} cannot be kept: {reason}", "--set tune.cache_mb=0"
            )
        self._set(model, first, budget_bytes)

    def _set(self, model: nn.Module, first: int, budget_bytes: int) -> None:
        self._model, self._first, self._budget = model, first, budget_bytes
        self._kept: dict[bytes, Tensor] = {}  # digest of the tokens -> (length, hidden)
        self._batch: tuple[list[bytes], Tensor] | None = None  # the present one: keys, states (B, S, hidden)
        self._rest: tuple[None, ...] | None = None  # of a block's output, behind the hidden states
        self.hits = self.misses = self.bytes = 0

    @classmethod
    def applies(cls, model: nn.Module, first: int = 1) -> str | None:
        """Why the blocks below `first` cannot be skipped, or None: outputs are compared on a tiny batch."""
        depth = len(models.blocks(model))
        if not 1 <= first < depth:
            return f"it has {depth} blocks, so the first one tuned must be 1 to {depth - 1}"
        prefix = cls.__new__(cls)
        prefix._set(model, first, 0)
        size = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        ids = np.arange(1, 9, dtype=np.int64).reshape(2, 4) % size
        mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=np.int64)
        real = torch.from_numpy(mask).bool().repeat(2, 1)
        found = []
        try:
            for served in (False, True):
                with torch.no_grad(), ExitStack() as stack:
                    if served:
                        stack.enter_context(prefix.serving_tokens(ids, mask))
                    found.append(_run(model, ids, mask, copies=2)[real].float())
        except (UsageError, RuntimeError, TypeError, KeyError, IndexError) as reason:
            return str(reason)
        expected, got = found
        error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        limit = TOLERANCE if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.05
        return None if error <= limit else f"its outputs differ by {error:.1e} (relative) with kept states"

    @contextmanager
    def serving(self, batch: ArrayBatch) -> Iterator[None]:
        """Inside, the backbone computes the blocks from `first` on only, on this batch or copies of it."""
        with self.serving_tokens(batch.input_ids, batch.attention_mask):
            yield

    @contextmanager
    def serving_tokens(self, input_ids: IntArray, attention_mask: IntArray) -> Iterator[None]:
        """`serving` for right-padded token ids (B, S) and their mask."""
        states = self._states(input_ids, attention_mask)
        rows, width = input_ids.shape
        blocks = [block for _, block in models.blocks(self._model)]

        def give(hidden: Tensor) -> Tensor:
            copies, rest = divmod(hidden.shape[0], rows)
            if rest or hidden.shape[1] != width:
                raise ValueError(
                    f"a batch {tuple(hidden.shape[:2])} inside, expected copies of {rows, width}"
                )
            return states.to(hidden.device).repeat(copies, 1, 1)

        with ExitStack() as stack:
            for block in blocks[: self._first - 1]:
                stack.enter_context(self._skipped(block, lambda hidden: hidden))
            stack.enter_context(self._skipped(blocks[self._first - 1], give))
            yield

    # ------------------------------------------------------------ states

    def _states(self, input_ids: IntArray, attention_mask: IntArray) -> Tensor:  # (B, S, hidden)
        lengths = attention_mask.sum(1)
        tokens = [row[:length] for row, length in zip(input_ids, lengths, strict=True)]
        keys = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in tokens]
        if (
            self._batch is not None
            and self._batch[0] == keys
            and self._batch[1].shape[1] == input_ids.shape[1]
        ):
            self.hits += len(keys)
            return self._batch[1]
        self._batch = None
        found = [self._state(key, row) for key, row in zip(keys, tokens, strict=True)]
        states = found[0].new_zeros(*input_ids.shape, found[0].shape[1])
        for i, state in enumerate(found):
            states[i, : len(state)] = state
        self._batch = (keys, states)
        return states

    def _state(self, key: bytes, tokens: IntArray) -> Tensor:  # (length, hidden)
        if key in self._kept:
            self.hits += 1
            return self._kept[key]
        self.misses += 1
        state = self._compute(tokens)
        if self.bytes + state.nbytes <= self._budget:
            self._kept[key] = state
            self.bytes += state.nbytes
        return state

    @torch.no_grad()
    def _compute(self, tokens: IntArray) -> Tensor:
        """Run the blocks below `first` on one sequence (length,); those above are skipped."""
        blocks = [block for _, block in models.blocks(self._model)]
        last = blocks[self._first - 1]
        original: Forward = last.forward
        caught: list[Tensor] = []

        def catch(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - a block's own signature
            output = original(*args, **kwargs)
            caught.append(self._split(output))
            return output

        with ExitStack() as stack:
            stack.enter_context(_forward(last, catch))
            for block in blocks[self._first :]:
                stack.enter_context(self._skipped(block, lambda hidden: hidden))
            _run(self._model, tokens[None], np.ones_like(tokens)[None])
        return caught[0][0].clone()

    def _split(self, output: Any) -> Tensor:  # noqa: ANN401 - of a block
        """The hidden states out of a block's output, whose form is kept for those that are skipped."""
        hidden, *rest = output if isinstance(output, tuple) else (output,)
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or any(each is not None for each in rest):
            raise UsageError("its blocks hand on more than one tensor of hidden states")
        self._rest = tuple(rest) if isinstance(output, tuple) else None
        return hidden

    def _skipped(self, block: nn.Module, change: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
        """Inside, a block gives `change` of the hidden states that it is fed, in the form of its output."""

        def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - a block's own signature
            hidden = change(args[0] if args else kwargs["hidden_states"])
            return hidden if self._rest is None else (hidden, *self._rest)

        return _forward(block, forward)


def lowest(model: nn.Module, layers: Iterable[str]) -> int:
    """The number of the first block that one of `layers` (names of modules inside the blocks) lies in."""
    names = [name for name, _ in models.blocks(model)]
    return min(
        (i for i, name in enumerate(names) if any(layer.startswith(f"{name}.") for layer in layers)),
        default=len(names),
    )


@contextmanager
def _forward(module: nn.Module, forward: Forward) -> Iterator[None]:
    """Inside, a module computes something else; its attributes and its place in the model stay."""
    before = vars(module).get("forward")  # of a wrapper of its own, as for weights that lie elsewhere
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _run(model: nn.Module, input_ids: IntArray, attention_mask: IntArray, copies: int = 1) -> Tensor:
    """Hidden states (copies * B, S, hidden) above the last block."""
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    ids, mask = (
        torch.from_numpy(np.ascontiguousarray(each))
        .repeat(copies, 1)
        .to("cpu" if device.type == "meta" else device)
        for each in (input_ids, attention_mask)
    )
    output = models.backbone(model)(input_ids=ids, attention_mask=mask, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden
