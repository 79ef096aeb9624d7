"""Safetensors: what is written reads back with the library, what is broken is refused with its name."""

import json
import os
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors import torch as library

from edgesft.core import weights
from edgesft.core.errors import ArtifactError
from edgesft.core.weights import Planned, Weights, check_finite, write_file, write_folder

torch.set_num_threads(1)


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(5, 3),
        "half": torch.randn(7).to(torch.bfloat16),
        "flag": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(3.5),
    }


def plan(state: dict[str, torch.Tensor]) -> list[Planned]:
    return [Planned(n, weights.dtype_name(t.dtype), tuple(t.shape)) for n, t in state.items()]


def test_what_is_written_the_library_reads_bit_for_bit(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    old = os.umask(0o027)
    try:
        write_file(tmp_path / "model.safetensors", plan(state), state.__getitem__)
    finally:
        os.umask(old)
    loaded = library.load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_failure_while_writing_keeps_the_old_file(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"old")

    def get(name: str) -> torch.Tensor:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        write_file(file, plan(state), get)
    assert file.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_shards_have_an_index_and_read_as_one(
    tmp_path: Path, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 62)
    files = write_folder(tmp_path, plan(state), state.__getitem__)
    assert len(files) > 2
    read = Weights(tmp_path)
    assert set(read.keys()) == set(state)
    assert torch.equal(read.get("half"), state["half"])
    assert read.shape("a.weight") == (5, 3)
    assert read.dtype("half") == "bfloat16"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(state)


def test_every_truncation_is_refused_with_both_sizes(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    file = tmp_path / "model.safetensors"
    write_file(file, plan(state), state.__getitem__)
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(ArtifactError, match=r"model\.safetensors") as caught:
            Weights(tmp_path)
        assert str(size) in caught.value.message
    file.write_bytes(whole + b"x")
    with pytest.raises(ArtifactError, match="longer"):
        Weights(tmp_path)


def raw(path: Path, header: str, data: bytes = b"") -> Path:
    text = header.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (f'{{"a":{ENTRY},"a":{ENTRY}}}', "occurs twice"),
        (f'{{"../x":{ENTRY}}}', "named"),
        (f'{{"/x":{ENTRY}}}', "named"),
        ('{"a":{"dtype":"F32","shape":[0,1000000000000],"data_offsets":[0,4]}}', "needs 0"),
        ('{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', "bad shape"),
        ('{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', "bad shape"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}', "hole"),
        ('{"a":{"dtype":"X","shape":[1],"data_offsets":[0,4]}}', "unknown dtype"),
        ('{"a":{"dtype":"F32"}}', "no valid"),
        ("[1]", "no valid"),
        ("[" * 100_000, "no valid"),
        ("{", "no valid"),
    ],
)
def test_odd_headers_are_refused(tmp_path: Path, header: str, words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        Weights(raw(tmp_path / "x.safetensors", header, b"\0" * 4))


def test_a_million_empty_tensors_are_refused_quickly(tmp_path: Path) -> None:
    entry = '":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = "{" + ",".join(f'"{i}{entry}' for i in range(10**6)) + "}"
    file = raw(tmp_path / "x.safetensors", header)
    begin = time.process_time()
    with pytest.raises(ArtifactError, match="header"):
        Weights(file)
    assert time.process_time() - begin < 1


def test_an_index_cannot_leave_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(ArtifactError, match="leaves its folder"):
        Weights(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_first_bad_value_is_named(value: float, dtype: torch.dtype) -> None:
    tensor = torch.randn(30, 40).to(dtype)
    check_finite("w", tensor)
    tensor[7, 11] = value
    tensor[8, 2] = value
    with pytest.raises(ArtifactError, match=r"`w`.*\[7, 11\]"):
        check_finite("w", tensor)


def test_a_sum_that_overflows_is_no_bad_value() -> None:
    check_finite("w", torch.full((4,), 3e38))
    check_finite("i", torch.arange(3))
