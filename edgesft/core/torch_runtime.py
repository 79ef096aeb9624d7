"""Run a model folder in torch behind `core.protocols.Runnable`: the reference for every export."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgesft.core import models, tokens
from edgesft.core import threads as core_threads
from edgesft.core.errors import UsageError

if TYPE_CHECKING:
    from edgesft.core.protocols import Decoding

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


class TorchRunnable:
    """A Hugging Face folder, weights in float32 on the CPU.

    threads: 0 takes the physical cores; torch has one setting for the whole process, and this sets it.
    Raises ArtifactError for a folder that is missing, broken or refused.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        import torch

        self.path = Path(path)
        self.threads = core_threads.resolve(threads)
        torch.set_num_threads(self.threads)
        self.kind: str = models.kind(self.path)
        self.model = models.load(self.path)
        config: Any = self.model.config
        self.config = config
        self.vocabulary = int(config.vocab_size)
        self.context = int(getattr(config, "max_position_embeddings", 0) or 0)
        self._backbone: Any = models.backbone(self.model)
        self._head: Any = models.head(self.model) if self.kind == "decoder" else None

    def check(self, ids: IntArray, length: int) -> None:
        """Raises UsageError for an empty text, a token outside the vocabulary or too long a text."""
        tokens.check_ids(ids, self.vocabulary)
        tokens.check_length(length, self.context)

    def logits(
        self,
        input_ids: IntArray,  # (B, S)
        attention_mask: IntArray,  # (B, S)
        positions: IntArray,  # (N,)
    ) -> FloatArray:
        """Logits (N, vocabulary), of encoders hidden states (N, hidden), at flat positions b * S + t.

        Rows are padded on the right. The head is computed at those positions only.
        """
        import torch

        self.check(input_ids, input_ids.shape[1])
        with torch.inference_mode():
            mask = torch.from_numpy(np.ascontiguousarray(attention_mask))
            more = {"use_cache": False} if self.kind == "decoder" else {}
            made = self._backbone(
                input_ids=torch.from_numpy(np.ascontiguousarray(input_ids)), attention_mask=mask, **more
            )
            states = made.last_hidden_state  # (B, S, hidden)
            picked = states.reshape(-1, states.shape[-1])[torch.from_numpy(np.asarray(positions, np.int64))]
            return _numpy(picked if self._head is None else self._head(picked))

    def start(self, capacity: int, batch: int = 1) -> "Decoding":
        """A fresh decoding state with room for `capacity` tokens. Raises UsageError beyond the context.

        batch: sequences that are decoded together. From 2 on a prompt is (B, S), all rows of one length, a
        step takes tokens (B,), and both give logits (B, vocabulary).
        """
        if self.kind != "decoder":
            raise UsageError(f"`{self.path}` is an encoder, only a decoder generates text")
        tokens.check_length(capacity, self.context)
        return _Decoding(self, capacity, batch)


class _Decoding:
    """One sequence, or a batch of them, with the KV cache of transformers."""

    def __init__(self, model: TorchRunnable, capacity: int, batch: int = 1) -> None:
        from transformers import DynamicCache

        self._model, self._capacity, self._length, self._batch = model, capacity, 0, batch
        self._cache = DynamicCache(config=model.config)

    def prefill(self, input_ids: IntArray) -> FloatArray:
        """Feed a prompt (S,), in a batch (B, S), or more of it; logits (vocabulary,) after its last token, in
        a batch (B, vocabulary)."""
        import torch

        ids = np.array(input_ids, np.int64, ndmin=2)
        if len(ids) != self._batch:
            raise UsageError(f"{len(ids)} prompts were given to a batch of {self._batch}")
        self._model.check(ids, self._length + ids.shape[1])
        if self._length + ids.shape[1] > self._capacity:
            total = self._length + ids.shape[1]
            raise UsageError(f"{total} tokens are more than the {self._capacity} that there is room for")
        self._length += ids.shape[1]
        with torch.inference_mode():
            made = self._model._backbone(
                input_ids=torch.from_numpy(ids), past_key_values=self._cache, use_cache=True
            )
            logits: FloatArray = _numpy(self._model._head(made.last_hidden_state[:, -1]))
            return logits if self._batch > 1 else logits[0]

    def step(self, token: "int | IntArray") -> FloatArray:
        """Feed one token, in a batch (B,); logits (vocabulary,), in a batch (B, vocabulary), after it."""
        return self.prefill(np.asarray(token).reshape(self._batch, 1))


def _numpy(tensor: Any) -> FloatArray:  # noqa: ANN401
    array: FloatArray = tensor.float().numpy()
    return array
