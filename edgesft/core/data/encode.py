"""Examples to token ids, and token ids to padded batches."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgesft.core.data.batches import ArrayBatch, IntArray
from edgesft.core.data.examples import Example
from edgesft.core.errors import ArtifactError
from edgesft.core.tokens import Tokenizer


@dataclass(frozen=True)
class Row:
    """Token ids, and which of them (index >= 1) are supervised."""

    ids: list[int]
    supervised: range | list[int]


@dataclass(frozen=True)
class Encoded:
    """One example: a row for each candidate, or one row. index: its number in the split."""

    rows: tuple[Row, ...]
    gold: int
    index: int
    chooses: bool  # whether there is more than one answer

    @property
    def length(self) -> int:
        return max(len(row.ids) for row in self.rows)


def encode(tokenizer: Tokenizer, example: Example, index: int, max_length: int) -> Encoded:
    """Rows of at most `max_length` tokens; a long prompt loses its beginning, never the answer.

    A prompt and its answer are tokenised together, because at their border tokenizers may merge; the answer
    begins where the rows of the candidates and the prompt alone first differ.
    """
    if example.messages:
        row = _conversation(tokenizer, example)
        return Encoded((_cut(tokenizer, row, max_length),), 0, index, False)
    if not example.prompt and len(example.candidates) == 1:
        ids = _whole_text(tokenizer, example.candidates[0])[:max_length]
        return Encoded((Row(ids, range(1, len(ids))),), 0, index, False)
    chooses = len(example.candidates) > 1
    end = [] if chooses else list(tokenizer.eos_ids[:1])  # a completion also learns to stop
    texts = [example.prompt, *(example.prompt + answer for answer in example.candidates)]
    prompt, *full = tokenizer.encode_many(texts)
    start = max(1, min(_common(prompt, ids) for ids in full))
    rows = [Row(ids + end, range(start, len(ids) + len(end))) for ids in full]
    return Encoded(tuple(_cut(tokenizer, row, max_length) for row in rows), example.gold, index, chooses)


def _whole_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a plain text; at least two, so that one has a predecessor."""
    ids = tokenizer.encode(text)
    return ids if len(ids) > 1 else [*tokenizer.eos_ids[:1], *ids]


def text_rows(tokenizer: Tokenizer, example: Example, index: int, max_length: int) -> list[Encoded]:
    """A plain text as consecutive rows that predict every one of its tokens once."""
    ids = _whole_text(tokenizer, example.candidates[0])
    step = max(1, max_length - 1)
    parts = [ids[i : i + max_length] for i in range(0, max(1, len(ids) - 1), step)]
    return [Encoded((Row(part, range(1, len(part))),), 0, index, False) for part in parts]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _cut(tokenizer: Tokenizer, row: Row, max_length: int) -> Row:
    """Drop tokens from the front, a leading BOS kept."""
    excess = len(row.ids) - max_length
    if excess <= 0:
        return row
    first = 1 if row.ids[0] == tokenizer.bos_id and max_length > 1 else 0
    ids = row.ids[:first] + row.ids[first + excess :]
    supervised = [i - excess for i in row.supervised if i - excess >= max(1, first)]
    return Row(ids, supervised)


def _conversation(tokenizer: Tokenizer, example: Example) -> Row:
    """A conversation in the model's own template; every turn of the assistant is supervised.

    Templates that rewrite earlier turns leave only the last turn supervised.
    """
    messages = [{"role": role, "content": content} for role, content in example.messages]
    whole = tokenizer.chat(messages, generate=False)
    if whole is None:
        raise ArtifactError(
            f"`{tokenizer.path}` has no chat template, which `messages` need",
            "use a model with one, or data with `prompt` and `completion`",
        )
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.chat(messages[:i], generate=True) or ""
            after = tokenizer.chat(messages[: i + 1], generate=False) or ""
            if whole.startswith(after) and after.startswith(before):
                spans.append((len(before), len(after)))
    ids: list[int] = []
    supervised: list[int] = []
    at = 0
    for begin, end in spans:
        ids += tokenizer.encode(whole[at:begin], special=False)
        answer = tokenizer.encode(whole[begin:end], special=False)
        supervised += range(len(ids), len(ids) + len(answer))
        ids += answer
        at = end
    if not supervised:
        raise ArtifactError(f"the chat template of `{tokenizer.path}` rewrites the assistant's turns")
    ids += tokenizer.encode(whole[at:], special=False)
    return Row(ids, [i for i in supervised if i >= 1])


def assemble(examples: Sequence[Encoded], pad: int) -> ArrayBatch:
    """One batch of examples, right padded. Raises ArtifactError if none of its tokens is supervised."""
    rows = [row for example in examples for row in example.rows]
    length = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), length), pad, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
        mask[i, : len(row.ids)] = 1
    counts = np.array([len(row.supervised) for row in rows], dtype=np.int64)
    if counts.sum() == 0 or (examples[0].chooses and (counts == 0).any()):
        raise ArtifactError(f"no token of example {examples[0].index} can be predicted: it is too short")
    of = np.repeat(np.arange(len(rows), dtype=np.int64), counts)
    column = np.array([t for row in rows for t in row.supervised], dtype=np.int64)
    indices = np.array([example.index for example in examples], dtype=np.int64)
    batch = ArrayBatch(
        kind="lm",
        input_ids=ids,
        attention_mask=mask,
        positions=of * length + column - 1,
        targets=ids[of, column],
        weights=np.full(len(of), 1 / len(of), dtype=np.float32),
        rows=of,
        indices=indices,
    )
    return _choosing(batch, examples, counts, pad) if examples[0].chooses else batch


def _choosing(batch: ArrayBatch, examples: Sequence[Encoded], counts: IntArray, pad: int) -> ArrayBatch:
    """The same rows as a choice: over single tokens after one shared prompt, else over whole candidates."""
    gold = np.array([example.gold for example in examples], dtype=np.int64)
    sizes = {len(example.rows) for example in examples}
    if len(sizes) > 1:
        raise ArtifactError(
            f"examples with {sorted(sizes)} answers are mixed, expected one number of answers"
        )
    width = sizes.pop()
    first = np.arange(len(examples), dtype=np.int64) * width
    words = batch.targets.reshape(len(examples), width) if (counts == 1).all() else None
    if words is not None and (words == words[0]).all() and len(set(words[0])) == width and _same(examples):
        return _labels(batch, words[0], gold, first, pad)
    right = first + gold
    weights = np.zeros(len(batch.rows), dtype=np.float32)
    for row in right:
        weights[batch.rows == row] = 1 / (counts[row] * len(right))
    return dataclasses.replace(
        batch,
        kind="candidates",
        weights=weights,
        example=np.repeat(np.arange(len(examples), dtype=np.int64), width),
        gold=gold,
    )


def _same(examples: Sequence[Encoded]) -> bool:
    """Whether the rows of every example differ in their last token only."""
    return all(row.ids[:-1] == e.rows[0].ids[:-1] for e in examples for row in e.rows[1:])


def _labels(batch: ArrayBatch, words: IntArray, gold: IntArray, first: IntArray, pad: int) -> ArrayBatch:
    """One row an example without its answer: the prompt, whose last position is asked for a label word."""
    length = int(batch.attention_mask[first].sum(1).max()) - 1  # the answer's token is not fed
    ends = batch.attention_mask[first].sum(1) - 1
    keep = np.arange(length) < ends[:, None]
    count = len(first)
    return ArrayBatch(
        kind="labels",
        input_ids=np.where(keep, batch.input_ids[first, :length], pad),
        attention_mask=keep.astype(np.int64),
        positions=np.arange(count, dtype=np.int64) * length + ends - 1,
        targets=words[gold],
        weights=np.full(count, 1 / count, dtype=np.float32),
        rows=np.arange(count, dtype=np.int64),
        choices=np.ascontiguousarray(words),
        gold=gold,
        indices=batch.indices,
    )
