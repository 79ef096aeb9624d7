import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from edgesft.core import models
from edgesft.core.data.batches import ArrayBatch
from edgesft.core.errors import UsageError
from edgesft.core.tuning.prefix import Prefix, lowest

torch.set_num_threads(1)
DEPTH, HIDDEN = 4, 32
SHAPE = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
LENGTHS = (7, 3, 9)


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return llama()


def batch_of(lengths=LENGTHS, seed=0, padding=0):
    rng, width = np.random.default_rng(seed), max(lengths) + padding
    ids = np.full((len(lengths), width), 5, dtype=np.int64)  # padded with a token that also occurs
    mask = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = rng.integers(1, 64, length)
        mask[row, :length] = 1
    none = np.zeros(0, dtype=np.int64)
    return ArrayBatch("lm", ids, mask, none, none, none.astype(np.float32), none)


def hidden(model, batch, copies=1):
    """Hidden states of the real tokens, copy after copy."""
    ids, mask = (torch.from_numpy(x).repeat(copies, 1) for x in (batch.input_ids, batch.attention_mask))
    with torch.no_grad():
        found = models.backbone(model)(input_ids=ids, attention_mask=mask, use_cache=False)
    return found.last_hidden_state[mask.bool()]


class Counter:
    """How many rows the feed-forward part of each block has computed."""

    def __init__(self, model):
        self.rows = [0] * DEPTH
        for i, (_, block) in enumerate(models.blocks(model)):
            block.mlp.register_forward_pre_hook(lambda _, args, i=i: self.add(i, args[0].shape[0]))

    def add(self, i, rows):
        self.rows[i] += rows


@pytest.mark.parametrize("first", [1, 2, DEPTH - 1])
@pytest.mark.parametrize("copies", [1, 3])
def test_equals_the_plain_forward(first, copies, model):
    prefix, batch = Prefix(model, first, 1 << 20), batch_of()
    expected = hidden(model, batch, copies)
    for _ in range(2):  # computed, then kept
        with prefix.serving(batch):
            found = hidden(model, batch, copies)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(hidden(model, batch, copies), expected), "the model is as before"
    assert not any("forward" in vars(block) for _, block in models.blocks(model))


def test_padding_is_rebuilt_for_any_width(model):
    prefix, wide = Prefix(model, 2, 1 << 20), batch_of(padding=4)
    with prefix.serving(batch_of()):
        hidden(model, batch_of())
    assert prefix.misses == len(LENGTHS)
    with prefix.serving(wide):
        found = hidden(model, wide)
    assert prefix.misses == len(LENGTHS), "padding is no part of what is kept"
    torch.testing.assert_close(found, hidden(model, wide), rtol=1e-6, atol=1e-6)


def test_lower_blocks_are_computed_once_an_example_over_signs_and_epochs():
    model = llama()
    prefix, batches = Prefix(model, 3, 1 << 20), [batch_of(seed=s) for s in (0, 1)]
    counter = Counter(model)
    for _ in range(2):  # epochs
        for batch in batches:
            for _ in range(2):  # +eps, -eps
                with prefix.serving(batch):
                    hidden(model, batch)
    rows = 2 * len(LENGTHS)
    assert counter.rows == [rows, rows, rows, 4 * rows]
    assert prefix.misses == rows
    assert prefix.bytes == 2 * sum(LENGTHS) * HIDDEN * 4


def test_states_do_not_depend_on_the_batch_that_they_came_in(model):
    """So a run that is resumed with nothing kept goes on with the same bits."""
    batch = batch_of()
    alone = batch_of((LENGTHS[0],))
    assert (alone.input_ids[0] == batch.input_ids[0, : LENGTHS[0]]).all()
    cold, warm = Prefix(model, 2, 1 << 20), Prefix(model, 2, 1 << 20)
    with warm.serving(alone):
        hidden(model, alone)
    found = []
    for prefix in (cold, warm):
        with prefix.serving(batch):
            found.append(hidden(model, batch))
    assert (cold.misses, warm.misses) == (3, 3)
    assert torch.equal(*found)


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_full_budget_keeps_what_it_has(kept, model):
    """The first `kept` of three examples that fit; the rest is computed anew in every epoch."""
    room = sum(LENGTHS[:kept]) * HIDDEN * 4
    prefix = Prefix(model, 2, room)
    batches = [batch_of((n,), seed=n) for n in LENGTHS]
    for _ in range(3):
        for batch in batches:
            with prefix.serving(batch):
                found = hidden(model, batch)
            torch.testing.assert_close(found, hidden(model, batch), rtol=1e-6, atol=1e-6)
            assert prefix.bytes <= room
    assert prefix.misses == 3 + 2 * (3 - kept)


def test_without_room_both_signs_still_share_one_computation(model):
    prefix, batch = Prefix(model, 2, 0), batch_of()
    for _ in range(2):
        with prefix.serving(batch):
            hidden(model, batch)
    assert (prefix.misses, prefix.hits) == (3, 3)


def test_gradients_reach_the_blocks_above():
    model, batch = llama(), batch_of()
    prefix, ids = Prefix(model, 3, 1 << 20), torch.from_numpy(batch.input_ids)
    mask, weight = torch.from_numpy(batch.attention_mask), model.model.layers[3].mlp.up_proj.weight
    weight.requires_grad_(True)

    def gradient():
        states = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return torch.autograd.grad(states[mask.bool()].square().sum(), [weight])[0]

    expected = gradient()
    with prefix.serving(batch):
        found = gradient()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_another_batch_inside_is_refused(model):
    prefix = Prefix(model, 2, 1 << 20)
    with prefix.serving(batch_of()), pytest.raises(ValueError, match="expected copies of"):
        hidden(model, batch_of((4, 4)))


def test_embeddings_that_are_scaled_do_no_harm():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8)).eval()
    assert Prefix.applies(model) is None
    prefix, batch = Prefix(model, 2, 1 << 20), batch_of()
    with prefix.serving(batch):
        found = hidden(model, batch)
    torch.testing.assert_close(found, hidden(model, batch), rtol=1e-6, atol=1e-6)


def test_what_cannot_be_skipped_is_refused(model):
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=64)).eval()
    assert "more than one tensor" in Prefix.applies(bloom)
    with pytest.raises(UsageError, match="cannot be kept: its blocks"):
        Prefix(bloom, 1, 1 << 20)
    assert not any("forward" in vars(block) for _, block in models.blocks(bloom))
    for first in (0, DEPTH):
        with pytest.raises(UsageError, match="must be 1 to 3"):
            Prefix(model, first, 1 << 20)


def test_a_block_that_looks_at_its_neighbour_is_found_out():
    """Its outputs differ when the block below is skipped, which the check sees."""
    model = llama()
    lower, upper = model.model.layers[0], model.model.layers[2]
    seen = {}
    lower.mlp.register_forward_hook(lambda _, args, out: seen.update(out=out))
    upper.mlp.register_forward_hook(lambda _, args, out: out + seen["out"].mean())
    assert "outputs differ" in Prefix.applies(model)


def test_lowest_block_of_some_layers(model):
    names = [f"model.layers.{i}.mlp.up_proj" for i in (3, 2)]
    assert lowest(model, names) == 2
    assert lowest(model, []) == DEPTH
