"""Rows out of files: JSON lines, plain lines, CSV, Parquet, Arrow. Large files are indexed, not loaded.

A source is a sequence of rows (column -> value). Line files keep one 8-byte offset a row; a row is parsed
when it is asked for. Files of up to 32 MB, and every file when bad rows may be skipped, are parsed once
when opened, so that a bad line is reported before work begins.
"""

import csv
import itertools
import json
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edgesft.core.data.batches import IntArray
from edgesft.core.errors import ArtifactError

Row: TypeAlias = dict[str, Any]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Check: TypeAlias = Callable[[Row], None]  # raises BadRow

LINE_LIMIT = 16 << 20  # bytes of one row; a longer one is a broken file, not an example
PARSED_WHOLE = 32 << 20  # bytes up to which every row is parsed when the file is opened
CHUNK = 4 << 20
LF, CR = 10, 13
ROW_GROUP_BYTES = 256 << 20  # decoded Parquet kept in memory


class BadRow(Exception):
    """What is wrong with one row; callers turn it into an ArtifactError that names the place."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class Source(ABC):
    """Rows by number. `columns` are those of the first row; `skipped` counts bad rows left out."""

    columns: Sequence[str] = ()
    skipped: int = 0

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, i: int) -> Row:
        """Row i. Raises ArtifactError, naming its place, when it cannot be parsed."""

    @abstractmethod
    def where(self, i: int) -> str:
        """Place of row i for messages: a file and a line."""


class Memory(Source):
    """Rows that are there already (a small demo set)."""

    def __init__(self, rows: Sequence[Row], path: Path) -> None:
        self._rows, self._path = rows, path
        self.columns = list(rows[0]) if rows else []

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, i: int) -> Row:
        return self._rows[i]

    def where(self, i: int) -> str:
        return f"`{self._path}`, row {i + 1}"


class Lines(Source):
    """A text file with one row a line: the base of JSON lines, CSV and plain text.

    skip_bad: how many rows may be bad; one more raises ArtifactError.
    """

    header = 0  # lines before the first row

    def __init__(self, path: Path, skip_bad: int = 0, check: Check | None = None) -> None:
        self._path, self._allowed = path, skip_bad
        self.columns = ()
        self._file = path.open("rb", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size
        if self._size == 0:
            raise ArtifactError(f"`{path}` is empty, expected at least one row")
        self._odd: list[IntArray] = []  # offsets inside lines that cannot be good
        self._first = 3 if os.pread(self._file.fileno(), 3, 0) == b"\xef\xbb\xbf" else 0  # behind a BOM
        self._stops = self._scan()
        self._starts = np.concatenate([np.array([self._first], dtype=np.int64), self._stops[:-1]])
        self._numbers: IntArray | None = None  # line of each row, once some were left out
        self._drop_blank()
        if self.header and len(self):
            self._read_header(self._text(0))
            self._keep(slice(self.header, None))
        if len(self) == 0:
            raise ArtifactError(f"`{path}` holds no rows, expected at least one")
        self._check_all(check)
        if not self.columns:
            self.columns = list(self.row(0))

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def _scan(self) -> IntArray:
        """Offset behind each line. Read in pieces, not mapped: a mapped file would count as ours."""
        found, at, tail = [], 0, b"\n\n"
        with self._path.open("rb", buffering=0) as file:
            while piece := file.read(CHUNK):
                data = np.frombuffer(tail + piece, np.uint8)  # two bytes of the past, for the ends of lines
                found.append(self._breaks(data, at - 2) + 1)
                at, tail = at + len(piece), data[-2:].tobytes()
        stops = np.concatenate(found)
        return stops if len(stops) and stops[-1] == at else np.append(stops, at)

    def _breaks(self, data: Bytes, offset: int) -> IntArray:
        """Offsets in the file of the line breaks in `data`, whose first two bytes were seen before."""
        return np.flatnonzero(data[2:] == LF) + (2 + offset)

    def _drop_blank(self) -> None:
        """Leave out lines of nothing but a line break."""
        short = np.flatnonzero(self._stops - self._starts <= 2)
        blank = [int(i) for i in short if not self._bytes(int(i)).strip()]
        if blank:
            self._drop(blank)

    def _drop(self, rows: Sequence[int]) -> None:
        keep = np.ones(len(self), dtype=bool)
        keep[list(rows)] = False
        if self._numbers is None:
            self._numbers = np.arange(1, len(self) + 1)
        self._keep(keep)

    def _keep(self, which: "slice | npt.NDArray[np.bool_]") -> None:
        if self._numbers is not None:
            self._numbers = self._numbers[which]
        self._starts, self._stops = self._starts[which], self._stops[which]

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, i: int) -> str:
        line = int(self._numbers[i]) if self._numbers is not None else i + 1
        return f"`{self._path}`, line {line}"

    def _bytes(self, i: int) -> bytes:
        begin, end = int(self._starts[i]), int(self._stops[i])
        if end - begin > LINE_LIMIT:
            raise BadRow(f"the line has {end - begin} bytes, expected at most {LINE_LIMIT}")
        return os.pread(self._file.fileno(), end - begin, begin)

    def _text(self, i: int) -> str:
        return _decoded(self._bytes(i))

    def row(self, i: int) -> Row:
        try:
            return self.parse(self._text(i))
        except BadRow as error:
            raise ArtifactError(f"{self.where(i)}: {error}", error.hint or SKIP_HINT) from None

    def parse(self, text: str) -> Row:
        """A row out of its text. Raises BadRow."""
        return {"text": text}

    def _read_header(self, text: str) -> None:
        raise NotImplementedError

    def _suspects(self) -> Iterable[int]:
        """Rows worth parsing in a file that is too large to parse whole: too long, marked, and the last."""
        long = np.flatnonzero(self._stops - self._starts > LINE_LIMIT)
        marked = np.searchsorted(self._stops, np.concatenate([*self._odd, long[:0]]), side="right")
        found = np.unique(np.concatenate([long, marked, [len(self) - 1]]))
        return [int(i) for i in found if i < len(self)]

    def _check_all(self, check: Check | None) -> None:
        whole = self._size <= PARSED_WHOLE or self._allowed > 0
        bad = []
        for i in range(len(self)) if whole else self._suspects():
            try:
                row = self.parse(self._text(i))
                if check is not None:
                    check(row)
            except BadRow as error:
                bad.append(i)
                if len(bad) > self._allowed:
                    more = f" ({self._allowed} bad rows are allowed)" if self._allowed else ""
                    hint = error.hint or SKIP_HINT
                    raise ArtifactError(f"{self.where(i)}: {error}{more}", hint) from None
        if bad:
            self._drop(bad)
            self.skipped = len(bad)
            if len(self) == 0:
                raise ArtifactError(f"`{self._path}` holds no good row, {self.skipped} bad ones were skipped")


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise BadRow(f"byte {error.start + 1} of the line is not UTF-8") from None


SKIP_HINT = "mend the file, or let some bad rows pass with `--skip-bad N`"


def _no_twice(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [k for k, _ in pairs]
        raise BadRow(f"the key `{next(k for k in keys if keys.count(k) > 1)}` occurs twice")
    return row


class JsonLines(Lines):
    """One JSON object a line."""

    _decoder = json.JSONDecoder(object_pairs_hook=_no_twice)

    def parse(self, text: str) -> Row:
        try:
            row = self._decoder.decode(text)
        except json.JSONDecodeError as error:
            raise BadRow(f"not JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise BadRow("nested too deeply") from None
        if not isinstance(row, dict):
            raise BadRow(f"a JSON {type(row).__name__}, expected an object")
        return row

    def _breaks(self, data: Bytes, offset: int) -> IntArray:
        """Also marks lines that do not go from `{` to `}`: half lines show without parsing the rest."""
        breaks = np.flatnonzero(data[2:] == LF) + 2
        starts = breaks[breaks + 1 < len(data)] + 1
        if data[1] == LF and offset >= 0:
            starts = np.append(starts, 2)
        first = data[starts]
        last = data[breaks - 1]
        last = np.where(last == CR, data[breaks - 2], last)
        starts = starts[(first != ord("{")) & (first != LF) & (first != CR)]
        ends = breaks[(last != ord("}")) & (last != LF)]
        self._odd.append(np.concatenate([starts, ends]) + offset)
        return breaks + offset


class Csv(Lines):
    """Comma-, semicolon- or tab-separated values with a header; fields in quotes may hold line breaks."""

    header = 1
    _quoted = False

    def _breaks(self, data: Bytes, offset: int) -> IntArray:
        fresh = data[2:]
        inside = np.bitwise_xor.accumulate(fresh == ord('"')) ^ self._quoted
        self._quoted = bool(inside[-1])
        return np.flatnonzero((fresh == LF) & ~inside) + (2 + offset)

    def _read_header(self, text: str) -> None:
        tab = "\t" in text or self._path.suffix == ".tsv"
        self._delimiter = "\t" if tab else ";" if text.count(";") > text.count(",") else ","
        names = self._fields(text)
        if not all(names) or len(set(names)) != len(names):
            raise BadRow("empty or repeated column names, expected a header")
        self.columns = names

    def _fields(self, text: str) -> list[str]:
        try:
            return next(csv.reader([text], delimiter=self._delimiter, strict=True), [])
        except csv.Error as error:
            raise BadRow(f"not CSV: {error}") from None

    def parse(self, text: str) -> Row:
        fields = self._fields(text)
        if len(fields) != len(self.columns):
            raise BadRow(f"{len(fields)} fields, the header has {len(self.columns)}")
        return dict(zip(self.columns, fields, strict=True))

    def where(self, i: int) -> str:
        line, left = 1, int(self._starts[i])  # counted: a row may span several lines
        with self._path.open("rb") as file:
            while left and (piece := file.read(min(CHUNK, left))):
                line += piece.count(b"\n")
                left -= len(piece)
        return f"`{self._path}`, line {line}"


class Parquet(Source):
    """Parquet files one after the other; row groups are decoded when needed and a few of them kept."""

    def __init__(self, paths: Sequence[Path]) -> None:
        import pyarrow.parquet as pq

        self._paths = list(paths)
        self._files: list[Any] = []
        firsts, self._groups = [0], []
        for number, path in enumerate(paths):
            try:
                file = pq.ParquetFile(path, memory_map=True)
            except Exception as error:  # pyarrow raises several families
                raise ArtifactError(f"`{path}` is no readable Parquet file: {error}") from None
            self._files.append(file)
            for group in range(file.metadata.num_row_groups):
                self._groups.append((number, group))
                firsts.append(firsts[-1] + file.metadata.row_group(group).num_rows)
        self._firsts = np.array(firsts, dtype=np.int64)
        if firsts[-1] == 0:
            raise ArtifactError(f"`{paths[0]}` holds no rows, expected at least one")
        self.columns = list(self._files[0].schema_arrow.names)
        for path, file in zip(paths, self._files, strict=True):
            if list(file.schema_arrow.names) != self.columns:
                raise ArtifactError(
                    f"`{path}` has other columns than `{paths[0]}`", "name one set with `files`"
                )
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self.used: Sequence[str] | None = None  # columns worth decoding

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def where(self, i: int) -> str:
        file, _ = self._groups[self._group(i)]
        return f"`{self._paths[file]}`, row {i + 1}"

    def _group(self, i: int) -> int:
        return int(np.searchsorted(self._firsts, i, side="right")) - 1

    def row(self, i: int) -> Row:
        group = self._group(i)
        table = self._table(group)
        at = i - int(self._firsts[group])
        return {name: table.column(name)[at].as_py() for name in table.column_names}

    def _table(self, group: int) -> Any:  # noqa: ANN401 - pyarrow is untyped
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        file, inner = self._groups[group]
        try:
            table = self._files[file].read_row_group(inner, columns=self.used)
        except Exception as error:
            raise ArtifactError(f"`{self._paths[file]}` is damaged: {error}") from None
        self._kept[group] = table
        while len(self._kept) > 1 and sum(t.nbytes for t in self._kept.values()) > ROW_GROUP_BYTES:
            self._kept.popitem(last=False)
        return table


class Arrow(Source):
    """An Arrow IPC file or stream, memory-mapped."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._path = path
        try:
            mapped = pa.memory_map(str(path))
            try:
                self._table = pa.ipc.open_stream(mapped).read_all()
            except pa.ArrowInvalid:
                self._table = pa.ipc.open_file(mapped).read_all()
        except (pa.ArrowInvalid, OSError) as error:
            raise ArtifactError(f"`{path}` is no readable Arrow file: {error}") from None
        if self._table.num_rows == 0:
            raise ArtifactError(f"`{path}` holds no rows, expected at least one")
        self.columns = list(self._table.column_names)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def where(self, i: int) -> str:
        return f"`{self._path}`, row {i + 1}"

    def row(self, i: int) -> Row:
        return {name: self._table.column(name)[i].as_py() for name in self.columns}


def conversations(folder: Path) -> Memory:
    """`prompt` + `completion` rows of every pair of turns in a folder of YAML conversations."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    rows: list[Row] = []
    for file in sorted(folder.glob("*.yml")):
        try:
            loaded = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)
        except (yaml.YAMLError, OSError, ValueError) as error:
            raise ArtifactError(f"`{file}` is not readable: {error}") from None
        for turns in (loaded or {}).get("conversations") or []:
            said = [str(t).strip() for t in turns if t is not None]
            rows += [{"prompt": a + "\n", "completion": b} for a, b in itertools.pairwise(said) if a and b]
    return Memory(rows, folder)


SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")


def open_source(path: Path, files: str | None, skip_bad: int, check: Check | None) -> Source:
    """The rows of a file, or of the Parquet files of a folder (those that the glob `files` names).

    Raises ArtifactError when there are none, or they are broken.
    """
    if path.is_dir():
        return Parquet(parquet_files(path, files))
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return Parquet([path])
    if suffix == ".arrow":
        return Arrow(path)
    if suffix in (".csv", ".tsv"):
        return _lines(Csv, path, skip_bad, check)
    if suffix == ".txt":
        return _lines(Lines, path, skip_bad, check)
    if suffix in (".jsonl", ".ndjson", ".json"):
        return _lines(JsonLines, path, skip_bad, check)
    raise ArtifactError(f"`{path}` has an unknown ending, expected one of {', '.join(SUFFIXES)}")


def _lines(kind: type[Lines], path: Path, skip_bad: int, check: Check | None) -> Lines:
    try:
        return kind(path, skip_bad, check)
    except BadRow as error:  # the header itself
        raise ArtifactError(f"`{path}`, line 1: {error}") from None
    except OSError as error:
        raise ArtifactError(f"`{path}` cannot be read: {error.strerror or error}") from None


def parquet_files(folder: Path, files: str | None) -> list[Path]:
    """Parquet files under a folder: those of the glob, else those called `train*`, else all."""
    found = sorted(folder.glob(files)) if files else sorted(folder.rglob("*.parquet"))
    found = [p for p in found if p.is_file() and p.suffix == ".parquet"]
    train = [p for p in found if p.name.startswith("train") or p.parent.name == "train"]
    chosen = found if files else train or found
    if not chosen:
        raise ArtifactError(
            f"`{folder}` holds no Parquet file" + (f" that `{files}` matches" if files else "")
        )
    return chosen
