"""The loss of the task itself, computed only where the data supervise it.

Paper: prompted classification over label words as in LM-BFF (2021) and MeZO (2023).
Why: a prompt with a label word asks the model in the form that it was trained on; without it zeroth-order
tuning hardly moves.
How: label words of one token: cross-entropy over the logits of these words alone, so only their rows of the
output matrix are multiplied. Longer label words or choices: cross-entropy over the mean log-probability of
each candidate. Free text: next-token cross-entropy at the supervised positions, in chunks, so that the logits
of a whole batch never exist.
Cost: nothing beside the forward pass of the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgesft.core import models
from edgesft.core.data.batches import Batch
from edgesft.core.errors import UsageError
from edgesft.core.method import Method, method

if TYPE_CHECKING:
    from torch import Tensor, nn

CHUNK_BYTES = 8 << 20  # of logits together


@method
class Task(Method):
    def loss(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        """Mean loss of a batch, a scalar in float64 (its forward passes stay in the model's type)."""
        return self.losses(model, batch, 1)[0]

    def losses(self, model: nn.Module, batch: Batch, copies: int) -> Tensor:
        """(copies,) float64: the mean loss of each of `copies` equal batches, stacked into one forward pass.

        The model sees copies * B rows, copy after copy; they differ if its layers treat them differently.
        """
        import torch
        from torch.nn import functional

        if batch.kind == "lm":
            weights = batch.weights.double()
            return torch.stack([-(p * weights).sum() for p in _log_probabilities(model, batch, copies)])
        gold = _gold(batch)
        return torch.stack([functional.cross_entropy(s, gold) for s in self._scores(model, batch, copies)])

    def assess(self, model: nn.Module, batch: Batch) -> tuple[float, int | None]:
        """(mean loss, right answers) from one forward pass; None where there is nothing to choose from."""
        from torch.nn import functional

        if batch.kind == "lm":
            return float(self.loss(model, batch)), None
        scores, gold = self.scores(model, batch), _gold(batch)
        loss = functional.cross_entropy(scores, gold)
        return float(loss), int((scores.argmax(1) == gold).sum())

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """(E, C) float64: one score for each answer of each example; the highest is the prediction.

        Raises UsageError for free text, which has no set of answers.
        """
        return self._scores(model, batch, 1)[0]

    def _scores(self, model: nn.Module, batch: Batch, copies: int) -> Tensor:  # (copies, E, C) float64
        import torch

        if batch.kind == "labels" and batch.choices is not None:
            logits = _choice_logits(model, _hidden(model, batch, copies), batch.choices)
            return logits.double().view(copies, -1, logits.shape[1])
        if batch.kind == "candidates" and batch.example is not None:
            found = _log_probabilities(model, batch, copies)
            rows = batch.input_ids.shape[0]
            sums = found.new_zeros(copies, rows).index_add(1, batch.rows, found)
            counts = found.new_zeros(rows).index_add(0, batch.rows, torch.ones_like(found[0]))
            return (sums / counts).view(copies, int(batch.example[-1]) + 1, -1)
        raise UsageError(f"a batch of kind `{batch.kind}` has no answers to choose from")


def _gold(batch: Batch) -> Tensor:
    if batch.gold is None:
        raise UsageError(f"a batch of kind `{batch.kind}` names no right answer")
    return batch.gold


def _hidden(model: nn.Module, batch: Batch, copies: int) -> Tensor:  # (copies * N, hidden)
    import torch

    output = models.backbone(model)(
        input_ids=batch.input_ids.repeat(copies, 1),
        attention_mask=batch.attention_mask.repeat(copies, 1),
        use_cache=False,
    )
    hidden: Tensor = output.last_hidden_state
    starts = torch.arange(copies, device=batch.positions.device) * batch.input_ids.numel()
    return hidden.flatten(0, 1)[(starts[:, None] + batch.positions).flatten()]


def _log_probabilities(model: nn.Module, batch: Batch, copies: int) -> Tensor:  # (copies, N) float64
    """Of each target after its position."""
    import torch

    hidden, head, targets = _hidden(model, batch, copies), models.head(model), batch.targets.repeat(copies)
    rows = max(1, CHUNK_BYTES // (4 * model.get_output_embeddings().weight.shape[0]))  # type: ignore[operator]
    found = []
    for start in range(0, hidden.shape[0], rows):
        logits = head(hidden[start : start + rows]).float()
        chosen = logits.gather(1, targets[start : start + rows, None]).squeeze(1)
        found.append(chosen.double() - logits.logsumexp(1).double())
    return torch.cat(found).view(copies, -1)


def _choice_logits(model: nn.Module, hidden: Tensor, choices: Tensor) -> Tensor:
    """Logits (N, C) of the tokens `choices` (C,) alone."""
    from torch.nn import functional

    head: Any = models.head(model)
    if not hasattr(head, "weight"):  # scaled or capped
        logits: Tensor = head(hidden)
        return logits[:, choices]
    bias = None if head.bias is None else head.bias[choices]
    weight: Tensor = head.weight[choices]  # of a quantised head, these rows in float32
    return functional.linear(hidden, weight.to(hidden.dtype), bias)
