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

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgesft.core import models
from edgesft.core.batches import Batch
from edgesft.core.errors import UsageError
from edgesft.core.method import Method, method

CHUNK_BYTES = 8 << 20  # of logits together


@method
class Task(Method):
    def loss(self, model: nn.Module, batch: Batch, reference: nn.Module | None = None) -> Tensor:
        """Mean loss of a batch, a scalar in float64 (its forward passes stay in the model's type)."""
        if batch.kind == "lm":
            return -(_log_probabilities(model, batch) * batch.weights.double()).sum()
        return functional.cross_entropy(self.scores(model, batch), _gold(batch))

    def assess(self, model: nn.Module, batch: Batch) -> tuple[float, int | None]:
        """(mean loss, right answers) from one forward pass; None where there is nothing to choose from."""
        if batch.kind == "lm":
            return float(self.loss(model, batch)), None
        scores, gold = self.scores(model, batch), _gold(batch)
        loss = functional.cross_entropy(scores, gold)
        return float(loss), int((scores.argmax(1) == gold).sum())

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """(E, C) float64: one score for each answer of each example; the highest is the prediction.

        Raises UsageError for free text, which has no set of answers.
        """
        if batch.kind == "labels" and batch.choices is not None:
            return _choice_logits(model, _hidden(model, batch), batch.choices).double()
        if batch.kind == "candidates" and batch.example is not None:
            found = _log_probabilities(model, batch)
            rows = batch.input_ids.shape[0]
            sums = found.new_zeros(rows).index_add(0, batch.rows, found)
            counts = found.new_zeros(rows).index_add(0, batch.rows, torch.ones_like(found))
            return (sums / counts).view(int(batch.example[-1]) + 1, -1)
        raise UsageError(f"a batch of kind `{batch.kind}` has no answers to choose from")


def _gold(batch: Batch) -> Tensor:
    if batch.gold is None:
        raise UsageError(f"a batch of kind `{batch.kind}` names no right answer")
    return batch.gold


def _hidden(model: nn.Module, batch: Batch) -> Tensor:  # (N, hidden)
    output = models.backbone(model)(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    )
    hidden: Tensor = output.last_hidden_state
    return hidden.flatten(0, 1)[batch.positions]


def _log_probabilities(model: nn.Module, batch: Batch) -> Tensor:  # (N,) float64
    """Of each target after its position."""
    hidden, head = _hidden(model, batch), models.head(model)
    rows = max(1, CHUNK_BYTES // (4 * model.get_output_embeddings().weight.shape[0]))  # type: ignore[operator]
    found = []
    for start in range(0, hidden.shape[0], rows):
        logits = head(hidden[start : start + rows]).float()
        chosen = logits.gather(1, batch.targets[start : start + rows, None]).squeeze(1)
        found.append(chosen.double() - logits.logsumexp(1).double())
    return torch.cat(found)


def _choice_logits(model: nn.Module, hidden: Tensor, choices: Tensor) -> Tensor:
    """Logits (N, C) of the tokens `choices` (C,) alone."""
    head = models.head(model)
    if not isinstance(head, nn.Linear):
        logits: Tensor = head(hidden)
        return logits[:, choices]
    bias = None if head.bias is None else head.bias[choices]
    return functional.linear(hidden, head.weight[choices], bias)
