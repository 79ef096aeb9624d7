"""Files of rows: what is good is read lazily, what is bad is refused with its line or counted."""

import csv
import json
from pathlib import Path

import numpy as np
import psutil
import pytest

from edgesft.core.data import sources
from edgesft.core.data.sources import BadRow, Csv, JsonLines, Lines, Parquet, Row
from edgesft.core.errors import ArtifactError


def rows(source: sources.Source) -> list[Row]:
    return [source.row(i) for i in range(len(source))]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.fixture(params=[7, 64, 4 << 20])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Sizes of the pieces in which a file is scanned: borders fall everywhere."""
    monkeypatch.setattr(sources, "CHUNK", request.param)
    return int(request.param)


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_json_lines_with_every_kind_of_ending(
    tmp_path: Path, chunk: int, ending: bytes, last: bool, bom: bytes
) -> None:
    wanted = [{"text": f"line {i} \u00e9\u6f22" * (i % 4)} for i in range(20)]
    lines = [json.dumps(r, ensure_ascii=bool(i % 2)).encode() for i, r in enumerate(wanted)]
    lines.insert(5, b"")
    file = write(tmp_path / "a.jsonl", bom + ending.join(lines) + (ending if last else b""))
    source = JsonLines(file)
    assert rows(source) == wanted
    assert "line 4" in source.where(3)
    assert "line 8" in source.where(6)  # the blank line counts


BAD = {
    "half": b'{"text": "a',
    "array": b"[1, 2]",
    "number": b"3",
    "utf-8": b'{"text": "\xff"}',
    "twice": b'{"text": "a", "text": "b"}',
    "deep": b"[" * 50_000,
    "words": b"hello",
    "tail": b'{"text": "a"} x',
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_named_or_counted(tmp_path: Path, kind: str) -> None:
    good = b'{"text": "fine"}\n'
    file = write(tmp_path / "a.jsonl", good * 6 + BAD[kind] + b"\n" + good * 3)
    with pytest.raises(ArtifactError, match="line 7") as caught:
        JsonLines(file)
    assert "--skip-bad" in (caught.value.hint or "")
    source = JsonLines(file, skip_bad=1)
    assert source.skipped == 1
    assert len(source) == 9
    assert "line 8" in source.where(6)
    write(file, file.read_bytes() + BAD[kind])
    with pytest.raises(ArtifactError, match="line 11"):
        JsonLines(file, skip_bad=1)


@pytest.mark.parametrize("kind", ["half", "array", "number", "words", "tail"])
@pytest.mark.parametrize("at", [0, 1, 40, 79])
def test_half_lines_of_a_large_file_are_found_without_parsing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, kind: str, at: int
) -> None:
    monkeypatch.setattr(sources, "PARSED_WHOLE", 0)
    lines = [b'{"text": "fine"}'] * 80
    lines[at] = BAD[kind]
    file = write(tmp_path / "a.jsonl", b"\r\n".join(lines) + b"\n")
    with pytest.raises(ArtifactError, match=f"line {at + 1}:"):
        JsonLines(file)
    lines[at] = b'{"text": "fine"}'
    write(file, b"\n\n".join(lines))
    assert len(JsonLines(file)) == 80


def test_a_line_without_end_is_refused_before_it_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", b'{"text": "ok"}\n{"text": "' + b"a" * (50 << 20) + b'"}\n')
    with pytest.raises(ArtifactError, match=r"line 2.*52428\d+ bytes"):
        JsonLines(file)
    assert JsonLines(file, skip_bad=1).row(0) == {"text": "ok"}


@pytest.mark.parametrize("data", [b"", b"\n\n\n", b"\xef\xbb\xbf", b"\r\n"])
@pytest.mark.parametrize("kind", [JsonLines, Csv, Lines])
def test_nothing_in_it(tmp_path: Path, data: bytes, kind: type[Lines]) -> None:
    with pytest.raises(ArtifactError, match=r"empty|no rows"):
        kind(write(tmp_path / "a.x", data))


def test_the_callers_check_counts_too(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"other": "b"}\n')

    def check(row: Row) -> None:
        if "text" not in row:
            raise BadRow("there is no `text`")

    with pytest.raises(ArtifactError, match="line 2: there is no `text`"):
        JsonLines(file, 0, check)
    assert len(JsonLines(file, 1, check)) == 1
    file.write_bytes(b'{"other": "b"}\n')
    with pytest.raises(ArtifactError, match="no good row"):
        JsonLines(file, 1, check)


def test_csv_agrees_with_the_csv_module(tmp_path: Path, chunk: int) -> None:
    file = tmp_path / "a.csv"
    wanted = [
        {"text": f'say "{i}",\nand {i * "x"}', "label": str(i % 2), "note": "" if i % 3 else "a;b"}
        for i in range(30)
    ]
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["text", "label", "note"], quoting=csv.QUOTE_MINIMAL)
        writer.writeheader()
        writer.writerows(wanted)
    source = Csv(file)
    assert list(source.columns) == ["text", "label", "note"]
    assert [source.row(i) for i in (29, 0, 13)] == [wanted[29], wanted[0], wanted[13]]
    assert "line 4" in source.where(1)


def test_csv_with_the_wrong_number_of_fields(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", b"text,label\na,1\nb\nc,2\n")
    with pytest.raises(ArtifactError, match=r"line 3: 1 fields, the header has 2"):
        Csv(file)
    assert rows(Csv(file, skip_bad=1)) == [{"text": "a", "label": "1"}, {"text": "c", "label": "2"}]
    with pytest.raises(ArtifactError, match="header"):
        sources.open_source(write(tmp_path / "b.csv", b"a,,a\n1,2,3\n"), None, 0, None)


@pytest.mark.parametrize(("name", "separator"), [("a.tsv", "\t"), ("a.csv", ";")])
def test_other_separators(tmp_path: Path, name: str, separator: str) -> None:
    file = write(tmp_path / name, f"text{separator}label\na, b{separator}1\n".encode())
    assert Csv(file).row(0) == {"text": "a, b", "label": "1"}


def parquet(path: Path, table: dict[str, list[object]], group: int) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(table), path, row_group_size=group)
    return path


def test_parquet_decodes_only_the_row_groups_and_columns_asked_for(tmp_path: Path) -> None:
    first = parquet(tmp_path / "a.parquet", {"text": [f"t{i}" for i in range(50)], "n": list(range(50))}, 10)
    second = parquet(tmp_path / "b.parquet", {"text": ["last"], "n": [99]}, 10)
    source = Parquet([first, second])
    assert len(source) == 51
    assert source.row(50) == {"text": "last", "n": 99}
    assert source.row(23) == {"text": "t23", "n": 23}
    assert len(source._kept) == 2
    source.used = ["text"]
    assert source.row(31) == {"text": "t31"}


def test_broken_parquet_and_arrow_are_refused(tmp_path: Path) -> None:
    good = parquet(tmp_path / "a.parquet", {"text": ["a"] * 100}, 10).read_bytes()
    for cut in (0, 3, len(good) // 2, len(good) - 1):
        file = write(tmp_path / "cut.parquet", good[:cut])
        with pytest.raises(ArtifactError, match="Parquet"):
            sources.open_source(file, None, 0, None)
    with pytest.raises(ArtifactError, match="Arrow"):
        sources.open_source(write(tmp_path / "x.arrow", b"nothing"), None, 0, None)


def test_a_folder_of_parquet_prefers_its_train_files(tmp_path: Path) -> None:
    parquet(tmp_path / "test-0.parquet", {"text": ["a"]}, 1)
    parquet(tmp_path / "train-0.parquet", {"text": ["b"]}, 1)
    assert rows(sources.open_source(tmp_path, None, 0, None)) == [{"text": "b"}]
    assert rows(sources.open_source(tmp_path, "test*", 0, None)) == [{"text": "a"}]
    parquet(tmp_path / "train-1.parquet", {"other": ["c"]}, 1)
    with pytest.raises(ArtifactError, match="other columns"):
        sources.open_source(tmp_path, None, 0, None)
    with pytest.raises(ArtifactError, match="no Parquet"):
        sources.open_source(tmp_path, "valid*", 0, None)


def test_unknown_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="unknown ending"):
        sources.open_source(write(tmp_path / "a.pkl", b"x"), None, 0, None)


def test_a_million_lines_are_indexed_not_loaded(tmp_path: Path) -> None:
    line = b'{"text": "' + b"some words to fill the line, " * 3 + b'%07d"}\n'
    with (tmp_path / "a.jsonl").open("wb") as file:
        for begin in range(0, 10**6, 10**5):
            file.write(b"".join(line % i for i in range(begin, begin + 10**5)))
    process = psutil.Process()
    before = process.memory_info().rss
    source = JsonLines(tmp_path / "a.jsonl")
    grown = process.memory_info().rss - before
    assert len(source) == 10**6
    assert source.row(765_432)["text"].endswith("0765432")
    assert grown < 100e6
    assert np.all(np.diff(source._starts) > 0)
