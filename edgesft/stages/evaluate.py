"""How good a model is on a data set: accuracy, loss and perplexity with 95 % intervals.

Works on torch models and on exported ones through the same numpy interface, batch by batch, so their
predictions can be compared one by one; for an exported model torch is never imported.
"""

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field

from edgesft.core import artifact, catalog, console
from edgesft.core.artifact import Artifact, Workdir
from edgesft.core.data import DataOptions
from edgesft.core.errors import ArtifactError
from edgesft.core.params import BatchSize, Count, validate

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edgesft.core.data import Dataset
    from edgesft.core.data.batches import ArrayBatch
    from edgesft.core.protocols import Runnable

    Array: TypeAlias = npt.NDArray[np.float64]
    IntArray: TypeAlias = npt.NDArray[np.int64]

LOGIT_BYTES = 128 << 20  # of one batch's logits together
Z = 1.959963984540054  # two-sided 95 % of the normal distribution


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """MODEL or EXPORTED + DATA -> evaluation.

    threads decide no result and are left out of the request. Raises ArtifactError (model, data, an encoder
    where a language model is needed), UsageError (options).
    """

    name: ClassVar[str] = "evaluate"
    gives: ClassVar[str] = "evaluation"

    split: Annotated[
        Literal["train", "dev", "test"], Field(description="part of the data that is looked at")
    ] = "test"
    limit: Annotated[Count | None, Field(description="examples at most")] = None
    batch_size: BatchSize = 16
    threads: Annotated[int, Field(ge=0, le=4096, description="0: the physical cores")] = 0
    data_options: DataOptions = field(default_factory=DataOptions)

    @classmethod
    def from_recipe(cls, table: Mapping[str, Any]) -> "Evaluate":
        """From a recipe's table. Raises UsageError for a bad field."""
        return validate(cls, table, "eval")

    def params(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        del values["threads"]
        return values

    def problems(self, inputs: Mapping[str, Artifact]) -> list[str]:
        return []

    def run(self, inputs: Mapping[str, Artifact], work: Workdir) -> dict[str, Any]:
        """Write evaluation.json, predictions included; the metrics are the rest of it."""
        found = self.measure(inputs)
        artifact.write_json(work.path / "evaluation.json", found)
        return {k: v for k, v in found.items() if k not in ("predictions", "gold")}

    def measure(self, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
        """The evaluation without an output folder. inputs: `data`, and `model` or `exported`."""
        from edgesft.core import data
        from edgesft.core.tokens import Tokenizer

        model = inputs["exported"] if "exported" in inputs else inputs["model"]
        tokenizer = Tokenizer(model.path)
        runnable = open_runnable(model, self.threads)
        options = self.data_options
        context = int(getattr(runnable, "context", 0) or 0)
        if 0 < context < options.max_length:
            options = dataclasses.replace(options, max_length=context)
        dataset = data.open_data(inputs["data"], options, tokenizer)
        return evaluate(runnable, dataset, split=self.split, limit=self.limit, batch_size=self.batch_size)


def resolve(ref: str) -> Artifact:
    """A model or an exported folder behind what a user typed. Raises ArtifactError, UsageError."""
    from edgesft.core import models

    return models.resolve(ref, "model", "onnx")


def open_runnable(found: Artifact, threads: int = 0) -> "Runnable":
    """The runnable of a model (torch) or an exported folder (its runtime, without torch)."""
    if found.kind == "onnx":
        runnable: Runnable = catalog.runtime("exporters.runtime").load(found.path, threads=threads)
        return runnable
    from edgesft.core.torch_runtime import TorchRunnable

    return TorchRunnable(found.path, threads)


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Sums:
    """What is kept of each example. For free text one entry an example row, else one an example.

    index: number in the split; nll and tokens: of the right answer over the whole vocabulary; right: correct
    next tokens (free text) or 0/1; loss: over the answers to choose from, NaN for free text.
    """

    index: "IntArray"
    nll: "Array"
    tokens: "IntArray"
    right: "IntArray"
    loss: "Array"
    prediction: "IntArray"
    gold: "IntArray"


def evaluate(
    runnable: "Runnable",
    dataset: "Dataset",
    *,
    split: str = "test",
    limit: int | None = None,
    batch_size: int = 16,
) -> dict[str, Any]:
    """Accuracy, loss, perplexity and their intervals, predictions in the order of the split.

    Answers to choose from: accuracy and loss (cross-entropy) over the label words or the candidates, which
    are scored by their mean log-probability (MeZO, 2023); `perplexity` = exp of the mean negative
    log-likelihood per token of the right answer over the whole vocabulary. Free text: next-token accuracy,
    loss per token, `perplexity` = exp(loss). Results do not depend on the batch size beyond rounding.
    Raises ArtifactError for an encoder, and for logits that are not finite.
    """
    if runnable.kind != "decoder":
        raise ArtifactError(
            f"an {runnable.kind} has no next-token predictions to evaluate, expected a decoder"
        )
    begin = time.perf_counter()
    total = len(dataset.split(split))
    total = total if limit is None else min(limit, total)
    positions = max(1, LOGIT_BYTES // (4 * runnable.vocabulary))
    parts, fed, seen = [], 0, set[int]()
    with console.progress(f"evaluate {split}", total) as bar:
        for batch in dataset.batches(split, batch_size, limit, positions):
            parts.append(_measure(runnable, batch))
            fed += batch.tokens
            bar.advance(_new(batch, seen))
    sums = _in_order(parts)
    chooses = not bool(math.isnan(float(sums.loss[0])))
    found = _choice_summary(sums) if chooses else _text_summary(sums)
    return {
        **found,
        "split": split,
        "data": dataset.ref,
        "tokens": fed,
        "seconds": round(time.perf_counter() - begin, 3),
    }


def _new(batch: "ArrayBatch", seen: set[int]) -> int:
    """How many examples of the batch had no row in an earlier one; they join `seen`."""
    before = len(seen)
    seen.update([] if batch.indices is None else batch.indices.tolist())
    return len(seen) - before


def _measure(runnable: "Runnable", batch: "ArrayBatch") -> Sums:
    import numpy as np

    logits = runnable.logits(batch.input_ids, batch.attention_mask, batch.positions)
    chosen, best = _log_probabilities(logits, batch.targets)
    if not np.isfinite(chosen).all():
        at = int(np.flatnonzero(~np.isfinite(chosen))[0])
        raise ArtifactError(
            f"the model gives logits that are not finite, at position {int(batch.positions[at])}"
        )
    assert batch.indices is not None
    if batch.kind == "labels":
        assert batch.choices is not None
        return _chosen(batch, logits[:, batch.choices].astype(np.float64), -chosen)
    rows = len(batch.input_ids)
    nll = np.bincount(batch.rows, -chosen, rows).astype(np.float64)
    tokens = np.bincount(batch.rows, minlength=rows)
    if batch.kind == "candidates":
        assert batch.gold is not None
        scores = (-nll / tokens).reshape(len(batch.gold), -1)
        right = np.arange(len(batch.gold)) * scores.shape[1] + batch.gold
        return _chosen(batch, scores, nll[right], tokens[right])
    hits = np.bincount(batch.rows, best == batch.targets, rows).astype(np.int64)
    nothing = np.full(rows, np.nan)
    none = np.full(rows, -1, dtype=np.int64)
    return Sums(batch.indices, nll, tokens, hits, nothing, none, none)


def _log_probabilities(
    logits: "npt.NDArray[np.float32]",  # (N, V)
    targets: "IntArray",  # (N,)
) -> "tuple[Array, IntArray]":
    """Log-probability of each target (N,) and the best token of each row (N,), some rows at a time."""
    import numpy as np

    chosen = np.empty(len(targets), dtype=np.float64)
    best = np.empty(len(targets), dtype=np.int64)
    step = max(1, (16 << 20) // (8 * logits.shape[1]))
    for i in range(0, len(targets), step):
        part = logits[i : i + step].astype(np.float64)
        best[i : i + step] = part.argmax(1)
        part -= part.max(1, keepdims=True)
        picked = part[np.arange(len(part)), targets[i : i + step]]
        chosen[i : i + step] = picked - np.log(np.exp(part).sum(1))
    return chosen, best


def _chosen(
    batch: "ArrayBatch",
    scores: "Array",  # (E, C)
    nll: "Array",  # (E,)
    tokens: "IntArray | None" = None,
) -> Sums:
    """Choices between C answers: prediction, and cross-entropy over the scores."""
    import numpy as np

    assert batch.gold is not None
    assert batch.indices is not None
    shifted = scores - scores.max(1, keepdims=True)
    loss = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(scores)), batch.gold]
    prediction = scores.argmax(1).astype(np.int64)
    right = (prediction == batch.gold).astype(np.int64)
    ones = np.ones(len(scores), dtype=np.int64)
    return Sums(batch.indices, nll, ones if tokens is None else tokens, right, loss, prediction, batch.gold)


def _in_order(parts: list[Sums]) -> Sums:
    """All parts together in the order of the split; the rows of one text are added up."""
    import numpy as np

    joined = {
        f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(Sums)
    }
    index, first, inverse = np.unique(joined["index"], return_index=True, return_inverse=True)
    add = ("nll", "tokens", "right")
    made = {k: v[first] for k, v in joined.items() if k not in add}
    made |= {k: np.bincount(inverse, joined[k], len(index)) for k in add}
    return Sums(
        **{**made, "tokens": made["tokens"].astype(np.int64), "right": made["right"].astype(np.int64)}
    )


# ---------------------------------------------------------------- summaries


def _choice_summary(sums: Sums) -> dict[str, Any]:
    count = len(sums.index)
    right = int(sums.right.sum())
    loss = ratio(sums.loss, sums.tokens * 0 + 1)
    answer = ratio(sums.nll, sums.tokens)
    return {
        "examples": count,
        "accuracy": right / count,
        "loss": loss[0],
        "perplexity": _exp(answer[0]),
        "intervals": {
            "accuracy": list(wilson(right, count)),
            "loss": [loss[1], loss[2]],
            "perplexity": [_exp(answer[1]), _exp(answer[2])],
        },
        "predictions": sums.prediction.tolist(),
        "gold": sums.gold.tolist(),
    }


def _text_summary(sums: Sums) -> dict[str, Any]:
    """Next-token measures. `predictions`: correct next tokens of each example, `gold`: how many there are."""
    loss = ratio(sums.nll, sums.tokens)
    accuracy = ratio(sums.right, sums.tokens)
    return {
        "examples": len(sums.index),
        "accuracy": accuracy[0],
        "loss": loss[0],
        "perplexity": _exp(loss[0]),
        "intervals": {
            "accuracy": [max(0.0, accuracy[1]), min(1.0, accuracy[2])],
            "loss": [max(0.0, loss[1]), loss[2]],
            "perplexity": [_exp(max(0.0, loss[1])), _exp(loss[2])],
        },
        "predictions": sums.right.tolist(),
        "gold": sums.tokens.tolist(),
    }


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))


def wilson(right: int, count: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927)."""
    p, z2 = right / count, Z * Z
    center = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * math.sqrt(p * (1 - p) / count + z2 / (4 * count * count))
    return (0.0 if right == 0 else center - half), (1.0 if right == count else center + half)


def ratio(sums: "Array | IntArray", counts: "IntArray") -> tuple[float, float, float]:
    """sum(sums) / sum(counts) with its 95 % interval: linearised ratio estimator over examples.

    Examples, not tokens, are what is drawn at random, so long texts widen it. One example: no spread is known
    and the interval is the value itself.
    """
    import numpy as np

    total = float(counts.sum())
    mean = float(sums.sum()) / total
    n = len(counts)
    if n < 2:
        return mean, mean, mean
    residual = sums - mean * counts
    half = Z * math.sqrt(float(np.square(residual).sum()) * n / (n - 1)) / total
    return mean, mean - half, mean + half
