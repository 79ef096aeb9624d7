"""Data sets: found, opened lazily, split by seed, drawn from as batches.

What a batch holds is a function of the data, the options, the seed and the step only, so a resumed run
draws the same ones. Orders come from a hash of the row's number, which no library version can change.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from edgesft.core import artifact, console, demo
from edgesft.core.artifact import Artifact
from edgesft.core.data import sources
from edgesft.core.data.batches import ArrayBatch, Batch, IntArray
from edgesft.core.data.encode import Encoded, assemble, encode, text_rows
from edgesft.core.data.examples import DataOptions, Example, Format, Reader
from edgesft.core.data.sources import BadRow, Row, Source
from edgesft.core.errors import ArtifactError, UsageError, nearest
from edgesft.core.models import looks_like_hub_id
from edgesft.core.tokens import Tokenizer

__all__ = ["ArrayBatch", "Batch", "DataOptions", "Dataset", "Example", "Split", "open_data", "resolve"]

SPLITS = ("train", "dev", "test")
SORTED = 4096  # examples whose lengths are compared at a time when evaluation batches are made


# ---------------------------------------------------------------- finding


def resolve(ref: str, options: DataOptions | None = None) -> Artifact:
    """The data behind `demo:NAME`, a local file, a folder of Parquet, or a hub data set `org/name[@rev]`.

    Raises ArtifactError (missing, unknown ending), UsageError (unknown demo name).
    """
    options = options or DataOptions()
    if demo.is_demo(ref):
        task = demo.task(ref)
        path = demo.locate(task.module, task.file, ref)
        found = artifact.digest_folder(path) if path.is_dir() else artifact.digest_file(path)
        return Artifact(path, "data", artifact.digest_json({"demo": ref, "file": found}), ref)
    path = Path(ref).expanduser()
    if not path.exists():
        if not looks_like_hub_id(ref):
            known = ", ".join(f"`{demo.PREFIX}{name}`" for name in demo.TASKS)
            raise ArtifactError(
                f"`{ref}` does not exist", f"data are a file, a hub data set `org/name`, or one of {known}"
            )
        path = _download(ref, options.files)
    if path.is_file():
        return Artifact(path, "data", artifact.digest_file(path), ref)
    if (path / artifact.MANIFEST).exists():
        raise ArtifactError(f"`{path}` is of kind `{artifact.read(path, verify=False).kind}`, expected data")
    files = {
        p.relative_to(path).as_posix(): artifact.digest_file(p)
        for p in sources.parquet_files(path, options.files)
    }
    return Artifact(path, "data", artifact.digest_json(files), ref)


def _download(ref: str, files: str | None) -> Path:
    """Parquet files of a hub data set; where its owner keeps none, those that the hub converted."""
    from huggingface_hub import snapshot_download

    name, _, revision = ref.partition("@")
    try:
        for each in (revision,) if revision else (None, "refs/convert/parquet"):
            got = snapshot_download(
                name, repo_type="dataset", revision=each, allow_patterns=[files or "*.parquet"]
            )
            if any(Path(got).rglob("*.parquet")):
                return Path(got)
    except Exception as error:  # offline, unknown, gated: each release raises other classes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtifactError(
            f"`{ref}` is no local path, and the hub gives no such data set: {reason}",
            "check the name and the network, or give a file or a `demo:` name",
        ) from None
    raise ArtifactError(f"the hub data set `{ref}` has no Parquet files")


def open_data(
    found: Artifact, options: DataOptions | None = None, tokenizer: Tokenizer | None = None
) -> "Dataset":
    """Open data for reading; a tokenizer is needed for batches, not for examples.

    Raises ArtifactError: nothing in it, broken rows (with file and line), labels without a template.
    """
    options = options or DataOptions()
    task = demo.task(found.ref) if demo.is_demo(found.ref) else None
    reader = Reader(options, task)

    def check(row: Row) -> None:
        reader(row)

    if found.path.is_dir() and task is not None:
        source: Source = sources.conversations(found.path)
    else:
        source = sources.open_source(found.path, options.files, options.skip_bad, check)
    if source.skipped:
        console.warn(f"`{found.ref}`: {source.skipped} bad rows skipped, {options.skip_bad} allowed")
    dataset = Dataset(source, reader, options, tokenizer, found.ref)
    dataset.example(0)  # settles the format
    if isinstance(source, sources.Parquet) and reader.used is not None:
        source.used = reader.used
    return dataset


# ---------------------------------------------------------------- orders


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection that looks random."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(values: IntArray, *seeds: int) -> npt.NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        state = np.zeros(1, dtype=np.uint64)
        for seed in seeds:
            state = _mix(state + np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed % 2**64))
        mixed = _mix(values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        return _mix(mixed ^ state)


def shuffled(count: int, *seeds: int) -> IntArray:
    """0..count-1 (count,) in an order that depends on the seeds only."""
    return np.argsort(_hash(np.arange(count, dtype=np.int64), *seeds))  # keys differ: any kind of sort agrees


# ---------------------------------------------------------------- reading


class Split(Sequence[Example]):
    """One of the three parts of a data set; an example is read when it is asked for."""

    def __init__(self, dataset: "Dataset", name: str, rows: IntArray) -> None:
        self._dataset, self.name, self.rows = dataset, name, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> "Split": ...
    def __getitem__(self, i: int | slice) -> "Example | Split":
        if isinstance(i, slice):
            return Split(self._dataset, self.name, self.rows[i])
        return self._dataset.example(int(self.rows[i]))


class Dataset:
    """An opened data set. `skipped`: bad rows left out; `format`: what its rows are."""

    def __init__(
        self,
        source: Source,
        reader: Reader,
        options: DataOptions,
        tokenizer: Tokenizer | None = None,
        ref: str = "data",
    ) -> None:
        if options.dev + options.test >= 1:
            raise UsageError(
                f"the fractions dev {options.dev} and test {options.test} leave nothing to train on"
            )
        self._source, self._reader, self.options, self.ref = source, reader, options, ref
        self._tokenizer = tokenizer
        self._order: tuple[tuple[Any, ...], IntArray] | None = None  # of the epoch drawn from last
        self._splits = self._cut(len(source))

    def __len__(self) -> int:
        return len(self._source)

    @property
    def skipped(self) -> int:
        return self._source.skipped

    @property
    def format(self) -> Format:
        assert self._reader.format is not None  # settled by `open_data`
        return self._reader.format

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ArtifactError(f"`{self.ref}` was opened without a tokenizer")
        return self._tokenizer

    def example(self, i: int) -> Example:
        """The example of row i. Raises ArtifactError with its place."""
        try:
            return self._reader(self._source.row(i))
        except BadRow as error:
            raise ArtifactError(f"{self._source.where(i)}: {error}", error.hint) from None

    def _cut(self, count: int) -> dict[str, IntArray]:
        """Rows of each split: test, dev, then the rest; from three rows on no part asked for is empty."""
        order = shuffled(count, self.options.split_seed)
        least = 1 if count >= 3 else 0
        test = max(round(count * self.options.test), least if self.options.test else 0)
        dev = max(round(count * self.options.dev), least if self.options.dev else 0)
        return {"test": order[:test], "dev": order[test : test + dev], "train": order[test + dev :]}

    def split(self, name: str) -> Split:
        """`train`, `dev` or `test`. Raises UsageError (unknown name), ArtifactError (nothing in it)."""
        if name not in SPLITS:
            raise UsageError(f"there is no split `{name}`", nearest(name, SPLITS))
        rows = self._splits[name]
        if len(rows) == 0:
            raise ArtifactError(f"the split `{name}` of `{self.ref}` is empty: {len(self)} rows in all")
        return Split(self, name, rows)

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each split."""
        return {name: len(self._splits[name]) for name in SPLITS}

    # ------------------------------------------------------------ batches

    def batch(self, split: str, step: int, size: int, seed: int) -> ArrayBatch:
        """The batch of a training step; every row once an epoch, a new order each epoch.

        A plain text longer than `max_length` gives one window of it, drawn by seed and step.
        """
        part = self.split(split)
        examples = []
        for k in range(step * size, (step + 1) * size):
            epoch, at = divmod(k, len(part))
            examples.append(self._drawn(part, int(self._epoch(part, seed, epoch)[at]), seed, k))
        return assemble(examples, self.tokenizer.pad_id)

    def _epoch(self, part: Split, seed: int, epoch: int) -> IntArray:
        key = (part.name, seed, epoch)
        if self._order is None or self._order[0] != key:
            self._order = (key, shuffled(len(part), seed, epoch, 1))
        return self._order[1]

    def _drawn(self, part: Split, i: int, seed: int, k: int) -> Encoded:
        example, length = part[i], self.options.max_length
        if self.format != "text":
            return encode(self.tokenizer, example, i, length)
        windows = text_rows(self.tokenizer, example, i, length)
        if len(windows) == 1:
            return windows[0]
        return windows[int(_hash(np.array([k], dtype=np.int64), seed, 2)[0] % np.uint64(len(windows)))]

    def batches(
        self, split: str, size: int, limit: int | None = None, positions: int | None = None
    ) -> Iterator[ArrayBatch]:
        """Every example of a split (the first `limit` of its order) once, in batches of `size` rows at most.

        Examples of like length go together to save padding. positions: supervised tokens a batch at most
        (single examples may have more). Text longer than `max_length` gives several rows.
        """
        part = self.split(split)
        count = min(len(part), limit) if limit is not None else len(part)
        for begin in range(0, count, SORTED):
            pool: list[Encoded] = []
            for i in range(begin, min(begin + SORTED, count)):
                if self.format == "text":
                    pool += text_rows(self.tokenizer, part[i], i, self.options.max_length)
                else:
                    pool.append(encode(self.tokenizer, part[i], i, self.options.max_length))
            pool.sort(key=lambda e: (-e.length, e.index))  # the largest first: no memory left is seen at once
            yield from (assemble(group, self.tokenizer.pad_id) for group in _groups(pool, size, positions))

    def windows(self, split: str, length: int, count: int, seed: int) -> IntArray:
        """(count, length) token ids of running text, for calibration; no padding.

        Rows are drawn in seeded order and joined (EOS between them) until there is enough; with too little
        text the windows overlap. Raises ArtifactError when there are fewer than `length` tokens in all.
        """
        part = self.split(split)
        stream: list[int] = []
        end = list(self.tokenizer.eos_ids[:1])
        for i in shuffled(len(part), seed, 3):
            stream += self._ids(part[int(i)]) + end
            if len(stream) >= length * count:
                return np.array(stream[: length * count], dtype=np.int64).reshape(count, length)
        if len(stream) < length:
            raise ArtifactError(
                f"the split `{split}` of `{self.ref}` has {len(stream)} tokens, a window needs {length}"
            )
        tokens = np.array(stream, dtype=np.int64)
        starts = _hash(np.arange(count, dtype=np.int64), seed, 4) % np.uint64(len(tokens) - length + 1)
        made: IntArray = tokens[starts.astype(np.int64)[:, None] + np.arange(length)]
        return made

    def _ids(self, example: Example) -> list[int]:
        if example.messages:
            return encode(self.tokenizer, example, 0, 1 << 20).rows[0].ids
        return self.tokenizer.encode(example.prompt + example.candidates[example.gold])


def _groups(pool: Sequence[Encoded], size: int, positions: int | None) -> Iterator[list[Encoded]]:
    """Consecutive examples, at most `size` of them and `positions` supervised tokens together."""
    group: list[Encoded] = []
    used = 0
    for each in pool:
        need = sum(len(row.supervised) for row in each.rows)
        if group and (len(group) == size or (positions is not None and used + need > positions)):
            yield group
            group, used = [], 0
        group.append(each)
        used += need
    if group:
        yield group
