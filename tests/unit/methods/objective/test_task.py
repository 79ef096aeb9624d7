import pytest
import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from edgesft.core.data.batches import Batch
from edgesft.core.errors import UsageError
from edgesft.methods.objective import task
from edgesft.methods.objective.task import Task

torch.set_num_threads(1)
IDS = torch.tensor([[3, 5, 7, 9, 2, 0], [4, 4, 8, 1, 6, 11], [3, 5, 9, 0, 0, 0], [2, 2, 2, 2, 0, 0]])
MASK = (IDS > 0).long()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=12,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def log_probabilities(model):
    return model(input_ids=IDS, attention_mask=MASK).logits.double().log_softmax(-1)


def lm_batch(weights=None):
    rows, column = torch.tensor([0, 0, 1, 2]), torch.tensor([1, 2, 3, 1])
    weights = torch.full((4,), 0.25) if weights is None else weights
    return Batch("lm", IDS, MASK, rows * 6 + column, IDS[rows, column + 1], weights, rows)


@pytest.mark.parametrize("chunk", [task.CHUNK_BYTES, 48])  # all at once, one position at a time
def test_lm_is_weighted_next_token_cross_entropy(model, log_probabilities, chunk, monkeypatch):
    monkeypatch.setattr(task, "CHUNK_BYTES", chunk)
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1])
    picked = [log_probabilities[r, c, IDS[r, c + 1]] for r, c in [(0, 1), (0, 2), (1, 3), (2, 1)]]
    expected = -sum(w * p for w, p in zip(weights.double(), picked, strict=True))
    torch.testing.assert_close(Task().loss(model, lm_batch(weights)), expected, rtol=1e-5, atol=1e-6)


def test_labels_compete_with_each_other_only(model, log_probabilities):
    choices, gold = torch.tensor([5, 9]), torch.tensor([1, 0, 0, 1])
    ends = MASK.sum(1) - 1
    batch = Batch(
        "labels", IDS, MASK, torch.arange(4) * 6 + ends, choices[gold], torch.full((4,), 0.25),
        torch.arange(4), choices=choices, gold=gold,
    )  # fmt: skip
    scores = log_probabilities[torch.arange(4), ends][:, choices]
    expected = functional.cross_entropy(scores, gold)
    torch.testing.assert_close(Task().loss(model, batch), expected, rtol=1e-5, atol=1e-6)
    loss, right = Task().assess(model, batch)
    assert right == int((scores.argmax(1) == gold).sum())
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_candidates_are_scored_by_their_mean_log_probability(model, log_probabilities):
    rows, column = torch.tensor([0, 0, 1, 2, 3, 3]), torch.tensor([1, 2, 3, 1, 0, 1])
    batch = Batch(
        "candidates", IDS, MASK, rows * 6 + column, IDS[rows, column + 1], torch.full((6,), 1 / 6), rows,
        example=torch.tensor([0, 0, 1, 1]), gold=torch.tensor([1, 0]),
    )  # fmt: skip
    p = log_probabilities[rows, column, IDS[rows, column + 1]]
    scores = torch.stack([(p[0] + p[1]) / 2, p[2], p[3], (p[4] + p[5]) / 2]).view(2, 2)
    torch.testing.assert_close(Task().scores(model, batch), scores, rtol=1e-5, atol=1e-6)
    expected = functional.cross_entropy(scores, batch.gold)
    torch.testing.assert_close(Task().loss(model, batch), expected, rtol=1e-5, atol=1e-6)


def test_logits_of_the_whole_vocabulary_are_not_made_for_labels(model, monkeypatch):
    rows_used = []
    real = functional.linear

    def spy(x, weight, bias=None):
        rows_used.append(weight.shape)
        return real(x, weight, bias)

    monkeypatch.setattr(functional, "linear", spy)
    choices = torch.tensor([5, 9])
    batch = Batch(
        "labels", IDS, MASK, torch.arange(4) * 6, choices[[0, 0, 1, 1]], torch.full((4,), 0.25),
        torch.arange(4), choices=choices, gold=torch.tensor([0, 0, 1, 1]),
    )  # fmt: skip
    Task().loss(model, batch)
    assert rows_used[-1] == (2, 16)
    assert (12, 16) not in rows_used


def test_free_text_has_no_answers(model):
    with pytest.raises(UsageError, match="no answers"):
        Task().scores(model, lm_batch())
    assert Task().assess(model, lm_batch())[1] is None


@pytest.mark.parametrize("chunk", [task.CHUNK_BYTES, 48])
def test_copies_share_a_pass_and_the_logits_stay_in_chunks(model, chunk, monkeypatch):
    monkeypatch.setattr(task, "CHUNK_BYTES", chunk)
    passes, rows = [], []
    handles = [
        model.model.register_forward_pre_hook(
            lambda _, args, kw: passes.append(kw["input_ids"].shape), with_kwargs=True
        ),
        model.lm_head.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0])),
    ]
    found = Task().losses(model, lm_batch(), 3)
    for handle in handles:
        handle.remove()
    assert passes == [(12, 6)]
    assert sum(rows) == 3 * 4
    assert max(rows) == (1 if chunk == 48 else 12)
    torch.testing.assert_close(found, Task().loss(model, lm_batch()).expand(3), rtol=1e-6, atol=1e-6)
