"""External data that leaves its folder is refused, and whatever is no ONNX model. Nothing crashes."""

import os
import random
import resource
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgesft.core.errors import ArtifactError
from edgesft.exporters import safety

WEIGHT = np.arange(16, dtype=np.float32).reshape(4, 4)


def _external(tensor: TensorProto, **entries: str) -> TensorProto:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def _model(location: str = "model.onnx.data", offset: str = "0", length: str = "64") -> onnx.ModelProto:
    weight = _external(numpy_helper.from_array(WEIGHT, "w"), location=location, offset=offset, length=length)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 4])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _write(folder: Path, model: onnx.ModelProto) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    (folder / "model.onnx.data").write_bytes(WEIGHT.tobytes())
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    return tmp_path / "out"


def test_a_good_model_is_accepted(folder: Path) -> None:
    assert safety.check(_write(folder, _model())) == {"model.onnx.data"}
    nested = _write(folder, _model("weights/part"))
    (nested / "weights").mkdir()
    (nested / "weights/part").write_bytes(WEIGHT.tobytes() + b"more")
    assert safety.check(nested) == {"weights/part"}


def test_a_model_without_external_data_is_accepted(folder: Path) -> None:
    model = _model()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(WEIGHT, "w"))
    assert safety.check(_write(folder, model)) == frozenset()


@pytest.mark.parametrize(
    "location",
    ["../secret", "a/../../secret", "/etc/passwd", "..", ".", "", "a\\b", "*/_ORT_MEM_ADDR_/*", "x" * 5000],
)
def test_a_name_that_leaves_the_folder_is_refused(folder: Path, location: str) -> None:
    with pytest.raises(ArtifactError):
        safety.check(_write(folder, _model(location)))


def test_a_symbolic_link_is_refused(folder: Path) -> None:
    _write(folder, _model("link"))
    (folder / "link").symlink_to(folder / "model.onnx.data")
    with pytest.raises(ArtifactError, match="symbolic link"):
        safety.check(folder)


def test_a_symbolic_link_above_the_file_is_refused(folder: Path) -> None:
    _write(folder, _model("sub/secret"))
    (folder / "sub").symlink_to(folder.parent)
    with pytest.raises(ArtifactError, match="symbolic link"):
        safety.check(folder)


def test_a_hard_link_is_refused(folder: Path) -> None:
    _write(folder, _model("linked"))
    os.link(folder.parent / "secret", folder / "linked")
    with pytest.raises(ArtifactError, match="hard link"):
        safety.check(folder)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_regular_file_is_refused(folder: Path, make: Callable[[Path], None]) -> None:
    _write(folder, _model("odd"))
    make(folder / "odd")
    with pytest.raises(ArtifactError, match="not a regular file"):
        safety.check(folder)


@pytest.mark.parametrize("offset", ["-1", "4", str(2**63), "9" * 30, "0x10", "1_0", " 0", "\u0663", ""])
def test_an_odd_offset_is_refused(folder: Path, offset: str) -> None:
    with pytest.raises(ArtifactError):
        safety.check(_write(folder, _model(offset=offset)))


@pytest.mark.parametrize("length", ["-64", "63", "65", str(2**62), "1e3", ""])
def test_an_odd_length_is_refused(folder: Path, length: str) -> None:
    with pytest.raises(ArtifactError):
        safety.check(_write(folder, _model(length=length)))


@pytest.mark.parametrize("key", ["__class__", "prepacked_0", "Location", ""])
def test_an_unknown_key_is_refused(folder: Path, key: str) -> None:
    model = _model()
    model.graph.initializer[0].external_data.add(key=key, value="1")
    with pytest.raises(ArtifactError, match="known are"):
        safety.check(_write(folder, model))


def test_a_key_given_twice_is_refused(folder: Path) -> None:
    model = _model()
    model.graph.initializer[0].external_data.add(key="location", value="../secret")
    with pytest.raises(ArtifactError, match="twice"):
        safety.check(_write(folder, model))


def test_no_location_is_refused(folder: Path) -> None:
    model = _model()
    del model.graph.initializer[0].external_data[:]
    with pytest.raises(ArtifactError, match="no location"):
        safety.check(_write(folder, model))


def test_a_missing_or_short_file_is_refused(folder: Path) -> None:
    _write(folder, _model())
    (folder / "model.onnx.data").write_bytes(WEIGHT.tobytes()[:-1])
    with pytest.raises(ArtifactError, match="has 63 bytes"):
        safety.check(folder)
    (folder / "model.onnx.data").unlink()
    with pytest.raises(ArtifactError, match="cannot be found"):
        safety.check(folder)


@pytest.mark.parametrize("dims", [[-1, 16], [2**40, 2**40]])
def test_an_impossible_shape_is_refused(folder: Path, dims: list[int]) -> None:
    model = _model()
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend(dims)
    with pytest.raises(ArtifactError):
        safety.check(_write(folder, model))


def test_packed_types_are_counted_in_bits(folder: Path) -> None:
    model = _model(length="8")
    model.graph.initializer[0].data_type = TensorProto.UINT4  # 16 elements of half a byte
    safety.check(_write(folder, model))
    model.graph.initializer[0].data_type = TensorProto.STRING
    with pytest.raises(ArtifactError, match="cannot lie in external data"):
        safety.check(_write(folder, model))


def _bad() -> TensorProto:
    return _external(numpy_helper.from_array(WEIGHT, "bad"), location="../secret")


def _sparse() -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=_bad(), dims=[4, 4])


def _graph() -> onnx.GraphProto:
    inner = helper.make_graph([], "inner", [], [], [_bad()])
    return helper.make_graph([helper.make_node("If", ["c"], [], then_branch=inner)], "outer", [], [])


def _hide(model: onnx.ModelProto, place: str) -> None:
    node = model.graph.node[0]
    match place:
        case "attribute":
            node.attribute.append(helper.make_attribute("t", _bad()))
        case "attribute list":
            node.attribute.append(helper.make_attribute("t", [_bad()]))
        case "sparse attribute":
            node.attribute.append(helper.make_attribute("t", _sparse()))
        case "subgraph":
            node.attribute.append(helper.make_attribute("g", _graph()))
        case "subgraph list":
            node.attribute.append(helper.make_attribute("g", [_graph()]))
        case "sparse initializer":
            model.graph.sparse_initializer.append(_sparse())
        case "function":
            constant = helper.make_node("Constant", [], ["o"], value=_bad())
            model.functions.append(
                helper.make_function("d", "f", [], ["o"], [constant], [helper.make_opsetid("", 18)])
            )
        case "training":
            model.training_info.add().initialization.CopyFrom(_graph())


@pytest.mark.parametrize(
    "place",
    [
        "attribute",
        "attribute list",
        "sparse attribute",
        "subgraph",
        "subgraph list",
        "sparse initializer",
        "function",
        "training",
    ],
)
def test_tensors_are_found_wherever_they_hide(folder: Path, place: str) -> None:
    model = _model()
    _hide(model, place)
    with pytest.raises(ArtifactError, match="leaves its folder"):
        safety.check(_write(folder, model))


def test_the_model_file_itself_must_be_plain(folder: Path) -> None:
    _write(folder, _model())
    for name in ("../secret", "/etc/passwd", "nothing.onnx"):
        with pytest.raises(ArtifactError):
            safety.check(folder, name)
    (folder / "link.onnx").symlink_to(folder / "model.onnx")
    os.mkfifo(folder / "pipe.onnx")
    for name in ("link.onnx", "pipe.onnx"):
        with pytest.raises(ArtifactError):
            safety.check(folder, name)


def test_truncations_are_refused_or_harmless(folder: Path) -> None:
    whole = _write(folder, _model()).joinpath("model.onnx").read_bytes()
    refused = 0
    for size in range(len(whole)):
        (folder / "model.onnx").write_bytes(whole[:size])
        try:
            safety.check(folder)
        except ArtifactError:
            refused += 1
    assert refused >= len(whole) - 6  # a cut between two top-level fields after the graph is still a model


def test_mutations_end_in_a_typed_error_or_in_success(folder: Path) -> None:
    model = _model()
    for place in ("subgraph", "function"):
        _hide(model, place)
    for tensor in safety._tensors(model):
        tensor.external_data[0].value = "model.onnx.data"
    whole = _write(folder, model).joinpath("model.onnx").read_bytes()
    safety.check(folder)
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            kind = rng.randrange(3)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                del data[at : at + rng.randint(1, 8)]
            else:
                data[at:at] = rng.randbytes(rng.randint(1, 8))
        (folder / "model.onnx").write_bytes(data)
        try:
            safety.check(folder)
        except ArtifactError:
            refused += 1
    assert 100 < refused < 300


def _field(number: int, body: bytes) -> bytes:
    size, out = len(body), b""
    while size > 127:
        out, size = out + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + out + bytes([size]) + body


def test_a_bomb_of_empty_tensors_is_refused_before_it_is_parsed(folder: Path) -> None:
    bomb = _field(7, b"\x2a\x00" * 5_000_000)  # 10 MB that would become 850 MB
    _write(folder, _model()).joinpath("model.onnx").write_bytes(bomb)
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ArtifactError, match="more than 2000000 fields"):
        safety.check(folder)
    assert time.monotonic() - begin < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_deep_nesting_is_refused(folder: Path) -> None:
    data = b""
    for _ in range(200):
        data = _field(1, _field(5, _field(6, data)))  # node, attribute, graph
    _write(folder, _model()).joinpath("model.onnx").write_bytes(_field(7, data))
    with pytest.raises(ArtifactError, match="deep"):
        safety.check(folder)
