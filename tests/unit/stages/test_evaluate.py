"""Evaluation: numbers equal to those computed by hand, independent of batches, the same for any runtime."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from edgesft.core import data
from edgesft.core.artifact import Artifact
from edgesft.core.data import DataOptions, Dataset
from edgesft.core.errors import ArtifactError
from edgesft.core.stage import execute
from edgesft.core.tokens import Tokenizer
from edgesft.stages import evaluate as stage
from edgesft.stages.evaluate import Evaluate, evaluate, ratio, wilson

torch.set_num_threads(1)
WORDS = ["<eos>", "good", "bad", "it", "was", "so", "very", "fine", "[UNK]"]


class Table:
    """A model whose next-token logits depend on the last token only, so that results can be computed."""

    kind = "decoder"
    vocabulary = len(WORDS)
    context = 0

    def __init__(self) -> None:
        self.table = np.random.default_rng(0).normal(size=(len(WORDS), len(WORDS))).astype(np.float32) * 2

    def logits(
        self,
        input_ids: npt.NDArray[np.int64],
        attention_mask: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.float32]:
        assert attention_mask.reshape(-1)[positions].all()
        return self.table[input_ids.reshape(-1)[positions]]

    def logp(self, last: str, token: str) -> float:
        row = torch.log_softmax(torch.tensor(self.table[WORDS.index(last)], dtype=torch.float64), 0)
        return float(row[WORDS.index(token)])

    def start(self, capacity: int) -> Any:
        raise NotImplementedError


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    backend = Backend(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return Tokenizer(tmp_path)


def opened(tmp_path: Path, tokenizer: Tokenizer, rows: list[dict[str, Any]], **options: Any) -> Dataset:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    chosen = DataOptions(**{"dev": 0.0, "test": 0.5, **options})
    return data.open_data(data.resolve(str(file)), chosen, tokenizer)


REVIEWS = [
    {"text": f"{'so ' * (i % 5)}{w}", "label": i % 2} for i in range(20) for w in ("fine", "very", "it")
]


def test_label_words(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = Table()
    words = {"template": "it was {text}", "label_words": {"0": "bad", "1": "good"}}
    dataset = opened(tmp_path, tokenizer, REVIEWS, **words)
    found = evaluate(model, dataset, batch_size=4)
    losses, nll, hits, predictions = [], [], 0, []
    for example in dataset.split("test"):
        last = example.prompt.split()[-1]
        scores = [model.logp(last, w) for w in ("bad", "good")]
        losses.append(math.log(sum(math.exp(s) for s in scores)) - scores[example.gold])
        nll.append(-scores[example.gold])
        predictions.append(int(scores[1] > scores[0]))
        hits += predictions[-1] == example.gold
    assert found["examples"] == len(losses) == 30
    assert found["accuracy"] == pytest.approx(hits / 30)
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(float(np.mean(nll))), rel=1e-6)
    assert found["predictions"] == predictions
    assert found["gold"] == [e.gold for e in dataset.split("test")]
    assert found["intervals"]["accuracy"] == pytest.approx(wilson(hits, 30))
    low, high = found["intervals"]["loss"]
    assert high - low == pytest.approx(2 * 1.96 * np.std(losses, ddof=1) / math.sqrt(30), rel=1e-3)


def test_candidates_are_scored_by_their_mean(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = Table()
    words = {"template": "it was {text}", "label_words": {"0": "very bad", "1": "good"}}
    dataset = opened(tmp_path, tokenizer, REVIEWS, **words)
    found = evaluate(model, dataset, batch_size=7)
    losses, predictions, total = [], [], []
    for example in dataset.split("test"):
        last = example.prompt.split()[-1]
        scores = [(model.logp(last, "very") + model.logp("very", "bad")) / 2, model.logp(last, "good")]
        losses.append(math.log(sum(math.exp(s) for s in scores)) - scores[example.gold])
        predictions.append(int(scores[1] > scores[0]))
        total.append((-scores[example.gold] * (2 - example.gold), 2 - example.gold))
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert found["predictions"] == predictions
    nll = sum(t for t, _ in total) / sum(n for _, n in total)
    assert found["perplexity"] == pytest.approx(math.exp(nll), rel=1e-6)


@pytest.mark.parametrize("length", [2, 3, 50])
def test_free_text_is_measured_by_token(tmp_path: Path, tokenizer: Tokenizer, length: int) -> None:
    model = Table()
    rng = np.random.default_rng(1)
    rows = [{"text": " ".join(rng.choice(WORDS[1:8], size=int(n)))} for n in rng.integers(2, 12, size=30)]
    dataset = opened(tmp_path, tokenizer, rows, max_length=length)
    found = evaluate(model, dataset, batch_size=3)
    pairs = []
    for example in dataset.split("test"):
        words = example.candidates[0].split()
        pairs += itertools.pairwise(words)
    loss = -np.mean([model.logp(a, b) for a, b in pairs])
    hits = [WORDS[int(model.table[WORDS.index(a)].argmax())] == b for a, b in pairs]
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert found["accuracy"] == pytest.approx(np.mean(hits))
    assert found["examples"] == 15
    assert sum(found["gold"]) == len(pairs)
    low, high = found["intervals"]["loss"]
    assert low < found["loss"] < high


def test_results_do_not_depend_on_batches(tmp_path: Path, tokenizer: Tokenizer) -> None:
    words = {"template": "it was {text}", "label_words": {"0": "very bad", "1": "good"}}
    dataset = opened(tmp_path, tokenizer, REVIEWS, **words)
    one, many = (evaluate(Table(), dataset, batch_size=n) for n in (1, 64))
    for key in ("accuracy", "loss", "perplexity"):
        assert one[key] == pytest.approx(many[key], rel=1e-12)
    assert one["predictions"] == many["predictions"]
    few = evaluate(Table(), dataset, batch_size=5, limit=4)
    assert few["predictions"] == one["predictions"][:4]


def test_logits_of_a_batch_are_bounded(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Watched(Table):
        def logits(self, *args: Any) -> npt.NDArray[np.float32]:
            made = super().logits(*args)
            seen.append(made.nbytes)
            return made

    monkeypatch.setattr(stage, "LOGIT_BYTES", 4 * len(WORDS) * 12)
    rows = [{"text": "it was so very fine"}] * 40
    evaluate(Watched(), opened(tmp_path, tokenizer, rows), batch_size=64)
    assert max(seen) == 4 * len(WORDS) * 12


def test_bad_models_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    dataset = opened(tmp_path, tokenizer, [{"text": "it was fine"}] * 4)
    encoder, sick = Table(), Table()
    encoder.kind = "encoder"
    with pytest.raises(ArtifactError, match="encoder"):
        evaluate(encoder, dataset)
    sick.table[:] = np.nan
    with pytest.raises(ArtifactError, match="not finite"):
        evaluate(sick, dataset)


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (5, 10), (430, 872)])
def test_wilson_solves_its_equation(right: int, count: int) -> None:
    """The ends are the p for which the observed share is 1.96 standard errors away."""
    low, high = wilson(right, count)
    assert 0 <= low <= right / count <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(right / count - end) == pytest.approx(stage.Z * math.sqrt(end * (1 - end) / count))


def test_the_ratio_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        counts = rng.integers(1, 40, size=60)
        sums = counts * rng.normal(2.0, 0.5, size=60)
        _, low, high = ratio(sums, counts)
        covered += low <= 2.0 <= high
    assert 0.9 <= covered / 400 <= 0.98
    assert ratio(np.array([6.0]), np.array([3])) == (2.0, 2.0, 2.0)


def test_the_stage_with_and_without_a_folder(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "open_runnable", lambda found, threads: Table())
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in REVIEWS))
    options = DataOptions(template="it was {text}", label_words={"0": "bad", "1": "good"})
    evaluation = Evaluate(data_options=options, threads=1)
    model = Artifact(tokenizer.path, "model", "sha256:0", "m")
    inputs = {"model": model, "data": data.resolve(str(file))}
    direct = evaluation.measure(inputs)
    made, ran = execute(evaluation, inputs, tmp_path / "out")
    assert ran
    assert made.kind == "evaluation"
    assert made.metrics["loss"] == direct["loss"]
    assert "predictions" not in made.metrics
    kept = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert kept["predictions"] == direct["predictions"]
    assert not execute(Evaluate(data_options=options, threads=2), inputs, tmp_path / "out")[1]
    with pytest.raises(ArtifactError, match="limit"):
        execute(Evaluate(data_options=options, limit=3), inputs, tmp_path / "out")


def test_torch_models_give_what_transformers_gives(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            initializer_range=0.5,
        )
    ).eval()
    folder = tokenizer.path
    model.save_pretrained(folder)
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"text": f"{'so ' * (i % 9)}it was fine"}) + "\n" for i in range(12)))
    inputs = {"model": stage.resolve(str(folder)), "data": data.resolve(str(file))}
    found = Evaluate(threads=1, split="train", batch_size=4).measure(inputs)
    part = data.open_data(inputs["data"], DataOptions(), tokenizer).split("train")
    losses, count = 0.0, 0
    for example in part:
        ids = torch.tensor([tokenizer.encode(example.candidates[0])])
        with torch.no_grad():
            losses += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert found["loss"] == pytest.approx(losses / count, rel=1e-5)
