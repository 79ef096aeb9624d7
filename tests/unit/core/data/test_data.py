"""Data sets: formats, templates, splits, and batches that are functions of seed and step only."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from edgesft.core import data
from edgesft.core.data import DataOptions, Dataset
from edgesft.core.errors import ArtifactError, UsageError
from edgesft.core.tokens import Tokenizer

torch.set_num_threads(1)
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level BPE with BOS, and merges of ` great` and ` terrible` so that they are single tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<end>", "<user>", "<assistant>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["It was great", "It was terrible", "so bad that it was ok"] * 9, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer(folder)


Open = Callable[..., Dataset]


@pytest.fixture
def opened(tmp_path: Path, tokenizer: Tokenizer) -> Open:
    def call(rows: list[dict[str, Any]], **options: Any) -> Dataset:
        file = tmp_path / "data.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        chosen = DataOptions(**options)
        return data.open_data(data.resolve(str(file), chosen), chosen, tokenizer)

    return call


SENTIMENT = {"template": "{text} It was", "label_words": {"0": "terrible", "1": "great"}}


def reviews(count: int) -> list[dict[str, Any]]:
    return [{"text": "so " * (i % 7) + f"bad {i}", "label": i % 2} for i in range(count)]


# ---------------------------------------------------------------- formats


def test_formats_are_recognised(opened: Open) -> None:
    assert opened([{"text": "a b c"}]).format == "text"
    assert opened([{"prompt": "a", "completion": " b"}]).format == "prompt"
    assert opened([{"messages": [{"role": "assistant", "content": "x"}]}]).format == "messages"
    assert opened(reviews(3), **SENTIMENT).format == "classify"
    assert opened(reviews(3), format="text").format == "text"
    assert opened([{"sentence": "a"}], columns={"text": "sentence"}).example(0).candidates == ("a",)


def test_a_label_without_a_template_is_refused(opened: Open) -> None:
    with pytest.raises(ArtifactError, match="no template") as caught:
        opened(reviews(3))
    assert "--template" in (caught.value.hint or "")
    with pytest.raises(ArtifactError, match="label word"):
        opened(reviews(3), template="{text} It was")


def test_a_label_that_no_word_covers_is_named_with_its_line(opened: Open) -> None:
    rows = [*reviews(4), {"text": "x", "label": 2}]
    with pytest.raises(ArtifactError, match=r"line 5.*label `2`"):
        opened(rows, **SENTIMENT)
    assert len(opened(rows, **SENTIMENT, skip_bad=1)) == 4


def test_wrong_columns_and_types_are_named(opened: Open) -> None:
    with pytest.raises(ArtifactError, match="`sentence`") as caught:
        opened([{"sentence": "x"}])
    assert caught.value.hint == "--map text=sentence"
    with pytest.raises(ArtifactError, match=r"line 2.*int"):
        opened([{"text": "x"}, {"text": 3}])
    with pytest.raises(ArtifactError, match=r"line 2.*empty"):
        opened([{"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": " "}])
    with pytest.raises(ArtifactError, match="assistant"):
        opened([{"messages": [{"role": "user", "content": "x"}]}])
    with pytest.raises(UsageError, match="txet"):
        opened([{"text": "x"}], columns={"txet": "x"})
    with pytest.raises(ArtifactError, match="`other`"):
        opened(reviews(2), template="{other} It was", label_words=SENTIMENT["label_words"])
    with pytest.raises(UsageError, match="field"):
        opened(reviews(2), template="It was", label_words=SENTIMENT["label_words"])


def test_a_template_reads_columns_only(opened: Open) -> None:
    rows = [{"text": "a {label} {0} {text.__class__}", "label": True}, {"text": "b", "label": False}]
    found = opened(rows, template="{text}|{text.x}", label_words={"True": "y", "False": "n"})
    assert found.example(0).prompt == "a {label} {0} {text.__class__}|{text.x}"
    assert found.example(0).candidates == (" y", " n")
    assert [found.example(i).gold for i in (0, 1)] == [0, 1]


def test_hub_errors_and_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError, match="no route"):
        data.resolve("org/set")
    with pytest.raises(ArtifactError, match="does not exist"):
        data.resolve(str(tmp_path / "nothing.jsonl"))


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize("count", [3, 4, 10, 1000])
def test_splits_are_a_partition_that_depends_on_the_seed(opened: Open, count: int) -> None:
    found = opened([{"text": f"text {i}"} for i in range(count)])
    parts = [set(found.split(n).rows.tolist()) for n in ("train", "dev", "test")]
    assert sum(map(len, parts)) == count
    assert set.union(*parts) == set(range(count))
    assert all(parts)
    again = opened([{"text": f"text {i}"} for i in range(count)])
    assert np.array_equal(again.split("test").rows, found.split("test").rows)
    if count == 1000:
        assert found.sizes == {"train": 600, "dev": 150, "test": 250}
        other = opened([{"text": f"text {i}"} for i in range(count)], split_seed=1)
        assert not np.array_equal(other.split("test").rows, found.split("test").rows)


def test_split_orders_never_change() -> None:
    """These very orders: a saved run must go on after any update of numpy."""
    assert data.shuffled(8, 0).tolist() == [0, 6, 3, 5, 1, 4, 7, 2]
    assert data.shuffled(5, 2**63 - 1, 9).tolist() == [0, 4, 1, 3, 2]
    assert sorted(data.shuffled(1000, 7, 3).tolist()) == list(range(1000))


@given(st.integers(0, 2**63 - 1), st.integers(0, 50))
def test_orders_are_permutations(seed: int, count: int) -> None:
    assert sorted(data.shuffled(count, seed).tolist()) == list(range(count))


def test_bad_splits(opened: Open) -> None:
    found = opened([{"text": "a"}], dev=0, test=0)
    with pytest.raises(UsageError, match="`tset`"):
        found.split("tset")
    with pytest.raises(ArtifactError, match="empty"):
        found.split("test")
    with pytest.raises(UsageError, match="nothing to train"):
        opened([{"text": "a"}], dev=0.5, test=0.5)


# ---------------------------------------------------------------- batches


def test_label_words_of_one_token_are_asked_for_at_one_position(opened: Open, tokenizer: Tokenizer) -> None:
    found = opened(reviews(40), **SENTIMENT)
    batch = found.batch("train", 0, 6, 0)
    assert batch.kind == "labels"
    assert batch.choices is not None
    assert batch.gold is not None
    assert [tokenizer.decode([c]) for c in batch.choices] == [" terrible", " great"]
    assert batch.indices is not None
    length = batch.input_ids.shape[1]
    for b in range(6):
        example = found.split("train")[int(batch.indices[b])]
        ids = batch.input_ids[b][batch.attention_mask[b] == 1].tolist()
        assert ids == tokenizer.encode(example.prompt)
        assert batch.positions[b] == b * length + len(ids) - 1
        assert batch.targets[b] == batch.choices[example.gold]
        assert batch.gold[b] == example.gold
        assert (batch.input_ids[b][len(ids) :] == tokenizer.pad_id).all()
    assert batch.weights.sum() == pytest.approx(1)


def test_longer_answers_become_candidates(opened: Open, tokenizer: Tokenizer) -> None:
    words = {"0": "utterly terrible", "1": "great"}
    found = opened(reviews(40), template="{text} It was", label_words=words)
    batch = found.batch("train", 0, 5, 0)
    assert batch.kind == "candidates"
    assert batch.example is not None
    assert batch.gold is not None
    assert batch.indices is not None
    assert batch.example.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    length = batch.input_ids.shape[1]
    for row in range(10):
        example = found.split("train")[int(batch.indices[row // 2])]
        own = batch.rows == row
        answer = example.candidates[row % 2]
        assert tokenizer.decode(batch.targets[own].tolist()) == answer
        at = batch.positions[own] - row * length
        assert (batch.input_ids[row, at + 1] == batch.targets[own]).all()
        right = row % 2 == batch.gold[row // 2]
        assert batch.weights[own].sum() == pytest.approx(1 / 5 if right else 0)
    assert batch.weights.sum() == pytest.approx(1)


def test_completions_are_supervised_with_their_end(opened: Open, tokenizer: Tokenizer) -> None:
    found = opened([{"prompt": "It was", "completion": " great"}], dev=0, test=0)
    batch = found.batch("train", 0, 1, 0)
    assert batch.kind == "lm"
    assert tokenizer.decode(batch.targets.tolist(), special=True) == " great<eos>"
    assert tokenizer.decode(batch.input_ids[0, : batch.positions[0] + 1].tolist()) == "It was"


def test_only_the_assistant_is_learnt_from(opened: Open, tokenizer: Tokenizer) -> None:
    turns = [("user", "hi"), ("assistant", "so bad"), ("user", "why"), ("assistant", "it was")]
    found = opened([{"messages": [{"role": r, "content": c} for r, c in turns]}], dev=0, test=0)
    batch = found.batch("train", 0, 1, 0)
    whole = tokenizer.decode(batch.input_ids[0].tolist(), special=True)
    assert whole == "<user>hi<end><assistant>so bad<end><user>why<end><assistant>it was<end>"
    assert tokenizer.decode(batch.targets.tolist(), special=True) == "so bad<end>it was<end>"


@pytest.mark.parametrize("length", [8, 12, 20])
def test_a_long_prompt_loses_its_beginning_not_its_answer(
    opened: Open, tokenizer: Tokenizer, length: int
) -> None:
    rows = [{"text": "so bad that it " * 20, "label": i % 2} for i in range(8)]
    found = opened(rows, **SENTIMENT, max_length=length)
    batch = found.batch("train", 0, 3, 0)
    assert batch.kind == "labels"
    assert batch.input_ids.shape == (3, length - 1)
    assert (batch.input_ids[:, 0] == tokenizer.bos_id).all()
    assert tokenizer.decode(batch.input_ids[0].tolist()).endswith(" It was")
    pairs = opened([{"prompt": "so " * 50, "completion": " great"}], dev=0, test=0, max_length=length)
    batch = pairs.batch("train", 0, 1, 0)
    assert tokenizer.decode(batch.targets.tolist(), special=True) == " great<eos>"
    assert batch.input_ids.shape == (1, length)


def test_batches_are_functions_of_seed_and_step(opened: Open) -> None:
    found, again = opened(reviews(50), **SENTIMENT), opened(reviews(50), **SENTIMENT)
    drawn = [found.batch("train", step, 4, 3) for step in range(20)]
    for step in (17, 2, 9):
        other = again.batch("train", step, 4, 3)
        for key, value in vars(drawn[step]).items():
            assert np.array_equal(value, getattr(other, key)), key
    size = found.sizes["train"]
    order = np.concatenate([b.indices for b in drawn if b.indices is not None])
    assert sorted(order[:size].tolist()) == list(range(size))
    assert order[:size].tolist() != order[size : 2 * size].tolist()
    other = found.batch("train", 0, 4, 4)
    assert not np.array_equal(other.indices, drawn[0].indices)


@pytest.mark.parametrize("size", [1, 3, 64])
def test_evaluation_sees_every_example_once(opened: Open, size: int) -> None:
    found = opened(reviews(60), **SENTIMENT)
    batches = list(found.batches("test", size))
    seen = [int(i) for b in batches if b.indices is not None for i in b.indices]
    assert sorted(seen) == list(range(found.sizes["test"]))
    assert max(len(b.input_ids) for b in batches) <= size
    limited = [
        int(i) for b in found.batches("test", size, limit=5) if b.indices is not None for i in b.indices
    ]
    assert sorted(limited) == list(range(5))


@pytest.mark.parametrize("length", [2, 5, 16, 1000])
def test_long_texts_are_predicted_whole_and_once(opened: Open, tokenizer: Tokenizer, length: int) -> None:
    rows = [{"text": f"so bad that it was {i} " * 4} for i in range(12)]
    found = opened(rows, max_length=length, test=0.5)
    targets: dict[int, list[int]] = {}
    for batch in found.batches("test", 4, positions=40):
        assert len(batch.positions) <= max(40, length)
        assert batch.indices is not None
        for row, index in enumerate(batch.indices):
            targets.setdefault(int(index), []).extend(batch.targets[batch.rows == row].tolist())
    for index, found_tokens in targets.items():
        ids = tokenizer.encode(found.split("test")[index].candidates[0])
        assert sorted(found_tokens) == sorted(ids[1:])


def test_windows_are_running_text(opened: Open, tokenizer: Tokenizer) -> None:
    found = opened([{"text": f"it was great {i}"} for i in range(30)])
    windows = found.windows("train", 16, 4, 0)
    assert windows.shape == (4, 16)
    assert windows.dtype == np.int64
    assert np.array_equal(windows, found.windows("train", 16, 4, 0))
    assert not np.array_equal(windows, found.windows("train", 16, 4, 1))
    text = tokenizer.decode(windows[0].tolist(), special=True)
    assert "<eos>" in text
    many = found.windows("train", 16, 100, 0)  # more than there is: windows overlap
    assert many.shape == (100, 16)
    with pytest.raises(ArtifactError, match="tokens"):
        found.windows("train", 100_000, 1, 0)


def test_torch_batches_are_the_same_numbers(opened: Open) -> None:
    batch = opened(reviews(20), **SENTIMENT).batch("train", 0, 3, 0)
    tensors = batch.torch()
    assert tensors.kind == "labels"
    assert tensors.example is None
    assert tensors.input_ids.dtype == torch.int64
    assert tensors.weights.dtype == torch.float32
    assert np.array_equal(tensors.positions.numpy(), batch.positions)
    assert tensors.choices is not None
    assert tensors.to("cpu").gold is not None


def test_without_a_tokenizer_there_are_examples_only(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "x"}\n' * 5)
    found = data.open_data(data.resolve(str(file)))
    assert len(found.split("train")) == 3
    with pytest.raises(ArtifactError, match="tokenizer"):
        found.batch("train", 0, 1, 0)
