"""Any ONNX file: inputs are made for it, decoders keep their cache, unsafe files never reach the runtime."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgesft.core import subject
from edgesft.core.errors import ArtifactError, DeviceError, UsageError
from edgesft.devices import client
from edgesft.exporters import foreign
from edgesft.exporters.foreign import GraphRunnable

V, H, D = 11, 2, 4  # vocabulary, heads, channels of a head
F32, I64 = TensorProto.FLOAT, TensorProto.INT64
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """save(nodes, inputs, outputs, initializers) -> the file; inputs are (name, type, shape)."""

    def make(nodes: list[Any], inputs: list[Any], outputs: list[Any], tensors: Any = (), **more: Any) -> Path:
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info(*i) for i in inputs],
            [o if isinstance(o, onnx.ValueInfoProto) else helper.make_tensor_value_info(*o) for o in outputs],
            list(tensors),
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
        path = tmp_path / more.get("name", "model.onnx")
        path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())
        return path

    return make


def mlp(save: Save, shape: tuple[Any, ...] = ("N", 4), kind: int = F32, name: str = "x") -> Path:
    """y = x, of any shape and type."""
    return save([helper.make_node("Identity", [name], ["y"])], [(name, kind, shape)], [("y", kind, None)])


def lookup(save: Save, name: str = "input_ids", rows: int = V, axis: int = 0) -> Path:
    """A table through a cast and a reshape, which is stored as bytes."""
    shape = (rows, 3) if axis == 0 else (3, rows)
    stored = numpy_helper.from_array(np.ones(shape, np.uint8), "stored")
    scale = numpy_helper.from_array(np.array(0.5, np.float32), "scale")
    flat = numpy_helper.from_array(np.array([-1]), "flat")
    nodes = [
        helper.make_node("DequantizeLinear", ["stored", "scale"], ["table"]),
        helper.make_node("Reshape", [name, "flat"], ["ids.flat"]),
        helper.make_node("Cast", ["ids.flat"], ["ids"], to=TensorProto.INT32),
        helper.make_node("Gather", ["table", "ids"], ["y"], axis=axis),
    ]
    return save(nodes, [(name, I64, ("batch", "sequence"))], [("y", F32, None)], [stored, scale, flat])


def decoder(save: Save, kind: int = I64, **names: str) -> Path:
    """The logits of a position count the tokens so far, in a cache of keys (1, H, P, D) named as usual.

    logits[b, t] = one-hot of (3 * tokens in the cache + the last token) mod V, so that they tell both.
    """
    array = numpy_helper.from_array
    tensors = [
        array(np.ones((V, H * D), np.float32), "embedding"),
        array(np.array([0, 0, H, D]), "split"),
        array(np.array(V, np.float32), "v"),
        array(np.array(3.0, np.float32), "three"),
        array(np.eye(V, dtype=np.float32), "eye"),
        array(np.array([2]), "two"),
    ]
    node = helper.make_node
    nodes = [
        node("Gather", ["embedding", "input_ids"], ["rows"]),
        node("Reshape", ["rows", "split"], ["apart"]),
        node("Transpose", ["apart"], ["new"], perm=[0, 2, 1, 3]),
        node("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
        node("Concat", ["past_key_values.0.value", "new"], ["present.0.value"], axis=2),
        node("Cast", ["attention_mask"], ["mask"], to=F32),
        node("ReduceSum", ["mask"], ["seen"], keepdims=0),  # of all rows
        node("Cast", ["position_ids"], ["place"], to=F32),
        node("Mul", ["place", "three"], ["scaled"]),
        node("Cast", ["input_ids"], ["ids"], to=F32),
        node("Add", ["scaled", "ids"], ["sum"]),
        node("Mod", ["sum", "v"], ["rest"], fmod=1),
        node("Cast", ["rest"], ["which"], to=I64),
        node("Gather", ["eye", "which"], ["plain"]),
        node("Div", ["plain", "seen"], ["logits"]),
    ]
    cache = ("batch_size", H, "past_sequence_length", D)
    inputs = [
        ("input_ids", kind, ("batch_size", "sequence_length")),
        ("attention_mask", kind, ("batch_size", "past_sequence_length + sequence_length")),
        ("position_ids", kind, ("batch_size", "sequence_length")),
        ("past_key_values.0.key", F32, cache),
        ("past_key_values.0.value", F32, cache),
    ]
    if names.get("extra"):
        inputs.append((names["extra"], TensorProto.BOOL, (1,)))
    present = ("batch_size", H, "all", D)
    outputs = [
        ("logits", F32, ("batch_size", "sequence_length", V)),
        ("present.0.key", F32, present),
        ("present.0.value", F32, present),
    ]
    return save(nodes, inputs, outputs, tensors)


def feeds(path: Path, sequence: int = 6, batch: int = 1, seed: int = 0, **more: Any) -> dict[str, Any]:
    return GraphRunnable(path, threads=1, **more).feeds(sequence, batch, np.random.default_rng(seed))


# Sizes


@pytest.mark.parametrize(
    ("shape", "name", "expected"),
    [
        (("N", 4), "x", (2, 4)),
        (("batch_size", "seq_len", 4), "x", (2, 6, 4)),
        ((None, 4), "x", (2, 4)),
        (("unk__5", 4), "x", (2, 4)),
        (("s77", "s12"), "input_ids", (2, 6)),
        (("batch", "past_sequence_length + 1"), "attention_mask", (2, 1)),
        (("batch", "past_sequence_length + sequence_length"), "attention_mask", (2, 6)),
        (("batch", "total_sequence_length"), "attention_mask", (2, 6)),
        (("batch", 3, "past_sequence_length", 4), "x", (2, 3, 0, 4)),
        ((), "x", ()),
    ],
)
def test_open_sizes_are_known_by_their_names(
    save: Save, shape: tuple[Any, ...], name: str, expected: tuple[int, ...]
) -> None:
    assert feeds(mlp(save, shape, name=name), sequence=6, batch=2)[name].shape == expected


@pytest.mark.parametrize("shape", [("batch", 3, "height", "width"), ("height", 4), (1, None), ("s0", "s1")])
def test_other_open_sizes_have_to_be_given(save: Save, shape: tuple[Any, ...]) -> None:
    path = mlp(save, shape, name="pixels")
    with pytest.raises(UsageError, match="`pixels`") as caught:
        feeds(path)
    assert caught.value.hint is not None
    assert "`pixels=" in caught.value.hint
    given = [d if isinstance(d, int) else 5 for d in shape]
    assert feeds(path, shapes={"pixels": given})["pixels"].shape == tuple(given)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"y": [1, 4]}, "has no input `y`, its inputs are `x`"),
        ({"x": [1, 5]}, "shape `1,5` of `x` does not fit `N,4`"),
        ({"x": [1, 4, 1]}, "does not fit"),
        ({"x": [-1, 4]}, "does not fit"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(save: Save, shapes: dict[str, list[int]], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        GraphRunnable(mlp(save), threads=1, shapes=shapes)


def test_inputs_larger_than_any_machine_are_refused(save: Save) -> None:
    with pytest.raises(UsageError, match="bytes"):
        feeds(mlp(save, ("N", 2**40)))


def test_a_batch_needs_room(save: Save) -> None:
    assert GraphRunnable(mlp(save), threads=1).describe(6, 3) == {"x": {"type": "float32", "shape": [3, 4]}}
    with pytest.raises(UsageError, match="no open batch size"):
        GraphRunnable(mlp(save, (1, 4)), threads=1).describe(6, 3)


# Values


def test_token_ids_stay_within_their_table(save: Save) -> None:
    runnable = GraphRunnable(lookup(save), threads=1)
    assert runnable.kind == "graph"
    assert runnable.vocabulary == V
    ids = runnable.feeds(400, 1, np.random.default_rng(0))["input_ids"]
    assert set(ids.ravel().tolist()) == set(range(V))


def test_the_axis_of_the_table_counts(save: Save) -> None:
    assert GraphRunnable(lookup(save, rows=7, axis=1), threads=1).vocabulary == 7


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("attention_mask", {1}),
        ("token_type_ids", {0}),
        ("position_ids", set(range(6))),
        ("input_ids", {0, 1}),
        ("lengths", {1}),
    ],
)
def test_whole_numbers_are_what_their_name_says(save: Save, name: str, values: set[int]) -> None:
    found = feeds(mlp(save, ("batch", "sequence"), I64, name))[name]
    assert set(found.ravel().tolist()) <= values
    assert found.dtype == np.int64


def test_positions_stay_within_their_table(save: Save) -> None:
    assert feeds(lookup(save, "position_ids", rows=4))["position_ids"].tolist() == [[0, 1, 2, 3, 3, 3]]


@pytest.mark.parametrize(
    "kind", [F32, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.UINT8, TensorProto.INT8]
)
def test_values_repeat_with_the_seed_only(save: Save, kind: int) -> None:
    path = mlp(save, (1, 40), kind)
    one, same, other = (feeds(path, seed=s)["x"] for s in (0, 0, 1))
    assert one.dtype == helper.tensor_dtype_to_np_dtype(kind)
    assert (one == same).all()
    assert (one != other).any()
    assert len(set(one.ravel().tolist())) > 20


def test_texts_as_inputs_are_refused(save: Save) -> None:
    with pytest.raises(ArtifactError, match=r"`x` of .* has the type `tensor\(string\)`"):
        GraphRunnable(mlp(save, (1, 4), TensorProto.STRING), threads=1)


# Calls


def test_a_call_runs_the_graph(save: Save) -> None:
    runnable = GraphRunnable(lookup(save), threads=1)
    runnable.prepare(runnable.feeds(5, 2, np.random.default_rng(0)))()


def test_maps_as_outputs_are_run_too(save: Save) -> None:
    zip_map = helper.make_node("ZipMap", ["x"], ["y"], domain="ai.onnx.ml", classlabels_int64s=[0, 1])
    maps = onnx.ValueInfoProto(name="y")
    value = maps.type.sequence_type.elem_type.map_type
    value.key_type = I64
    value.value_type.tensor_type.elem_type = F32
    runnable = GraphRunnable(save([zip_map], [("x", F32, ("N", 2))], [maps]), threads=1)
    runnable.prepare(runnable.feeds(5, 2, np.random.default_rng(0)))()


def test_shapes_that_the_graph_refuses_are_named(save: Save) -> None:
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    path = save([node], [("x", F32, ("batch", "columns"))], [("y", F32, None)], [weight])
    runnable = GraphRunnable(path, threads=1, shapes={"x": [1, 5]})
    call = runnable.prepare(runnable.feeds(5, 1, np.random.default_rng(0)))
    with pytest.raises(UsageError, match=r"with `x=1,5`: .*"):
        call()


# Decoders


@pytest.mark.parametrize("kind", [I64, TensorProto.INT32])
def test_a_foreign_decoder_keeps_its_cache(save: Save, kind: int) -> None:
    runnable = GraphRunnable(decoder(save, kind), threads=1)
    assert (runnable.kind, runnable.vocabulary) == ("decoder", V)
    state = runnable.start(8)
    logits = state.prefill(np.array([1, 2, 5]))
    assert logits.argmax() == (3 * 2 + 5) % V  # position and token
    assert logits.max() == pytest.approx(1 / 3)  # three ones in the mask
    for place, token in ((3, 4), (4, 10)):
        logits = state.step(token)
        assert logits.argmax() == (3 * place + token) % V
        assert logits.max() == pytest.approx(1 / (place + 1))
    for value in state._state._past.values():  # type: ignore[attr-defined]
        assert tuple(value.shape()) == (1, H, 5, D)


def test_a_foreign_decoder_takes_batches(save: Save) -> None:
    state = GraphRunnable(decoder(save), threads=1).start(8, 2)
    prompts = np.array([[1, 2, 5], [3, 3, 9]])
    assert state.prefill(prompts).argmax(-1).tolist() == [(6 + 5) % V, (6 + 9) % V]
    assert state.step(np.array([0, 7])).argmax(-1).tolist() == [9, (9 + 7) % V]  # type: ignore[arg-type]


def test_what_does_not_fit_a_decoder_is_refused(save: Save) -> None:
    runnable = GraphRunnable(decoder(save), threads=1)
    with pytest.raises(UsageError, match=f"token {V} is outside the vocabulary of {V}"):
        runnable.start(4).prefill(np.array([V]))
    with pytest.raises(UsageError, match="room for"):
        runnable.start(2).prefill(np.array([1, 2, 3]))
    with pytest.raises(UsageError, match="no KV cache"):
        GraphRunnable(lookup(save), threads=1).start(4)


def test_two_decoders_in_one_file_are_refused(save: Save) -> None:
    with pytest.raises(ArtifactError, match="use_cache_branch"):
        GraphRunnable(decoder(save, extra="use_cache_branch"), threads=1)


def test_a_decoder_that_wants_more_is_a_graph(save: Save) -> None:
    assert GraphRunnable(decoder(save, extra="speaker"), threads=1).kind == "graph"


# Unsafe files


def external(path: Path, location: str) -> Path:
    """Let the first tensor of a graph lie elsewhere."""
    model = onnx.load(str(path))
    tensor = model.graph.initializer[0]
    size = len(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": str(size)}.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    (path.parent / "weights").write_bytes(b"\1" * size)
    return path


@pytest.mark.parametrize("location", ["../weights", "/etc/passwd", "linked", "hard"])
def test_unsafe_files_are_refused_before_they_are_opened(
    save: Save, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    path = external(lookup(save), location)
    (path.parent / "linked").symlink_to(path.parent / "weights")
    os.link(path.parent / "weights", path.parent / "hard")
    monkeypatch.setattr(foreign, "open_session", lambda *a, **k: pytest.fail("it was opened"))
    with pytest.raises(ArtifactError, match=r"leaves its folder|symbolic link|hard link"):
        GraphRunnable(path, threads=1)
    with pytest.raises(ArtifactError, match=r"leaves its folder|symbolic link|hard link"):
        subject.resolve(path)


def test_external_data_beside_the_file_is_used(save: Save) -> None:
    path = external(lookup(save), "weights")
    assert [p.name for p in foreign.files(path)] == ["model.onnx", "weights"]
    runnable = GraphRunnable(path, threads=1)
    runnable.prepare(runnable.feeds(5, 1, np.random.default_rng(0)))()


def test_a_link_that_the_user_named_is_followed(save: Save, tmp_path: Path) -> None:
    path = lookup(save)
    (tmp_path / "alias.onnx").symlink_to(path)
    assert foreign.files(tmp_path / "alias.onnx") == (path.resolve(),)
    assert GraphRunnable(tmp_path / "alias.onnx", threads=1).vocabulary == V


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match="not a whole ONNX model"):
        GraphRunnable(tmp_path / "x.onnx")
    with pytest.raises(ArtifactError, match="does not exist"):
        GraphRunnable(tmp_path / "y.onnx")


# In a process of its own

WORKLOAD = {"prompt_tokens": 6, "decode_tokens": 5, "repetitions": 3}


def measure(path: Path, **more: Any) -> dict[str, Any]:
    asked = {"threads": 1, "workload": WORKLOAD, "seed": [0, 1], **more}
    return client.measure(client.request(subject.resolve(path), **asked), 60)


def test_operators_of_a_decoder_are_traced(save: Save, tmp_path: Path) -> None:
    raw = tmp_path / "out" / "raw.json"
    raw.parent.mkdir()
    found = measure(decoder(save), operators=raw)
    assert (found["loaded"]["kind"], found["loaded"]["vocabulary"]) == ("decoder", V)
    assert [len(r["step_ns"]) for r in found["repetitions"]] == [5, 5, 5]
    assert [p.name for p in raw.parent.iterdir()] == ["raw.json"]
    phases = found["done"]["operators"]["phases"]
    assert [(p["repetition"], p["phase"], p["runs"]) for p in phases] == [
        (r, *which) for r in (-1, 0, 1, 2) for which in (("prefill", 1), ("decode", 5))
    ]
    events = json.loads(raw.read_text())
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e.get("name") == "model_run")
    assert len(runs) == sum(p["runs"] for p in phases)
    middles = [(begin + end) / 2 for begin, end in runs]
    for phase in phases:  # each window holds its own runs
        inside = [m for m in middles if phase["begin_us"] <= m <= phase["end_us"]]
        assert len(inside) == phase["runs"]
    assert sum(e["cat"] == "Node" and e["args"].get("op_name") == "Concat" for e in events) >= len(runs)


def test_a_graph_is_called_in_its_process(save: Save) -> None:
    found = measure(mlp(save, (1, "columns")), shapes={"x": [1, 3]}, idle_seconds=[0.0])
    assert found["loaded"]["kind"] == "graph"
    assert found["loaded"]["inputs"] == {"x": {"type": "float32", "shape": [1, 3]}}
    assert found["loaded"]["vocabulary"] is None
    assert len(client.timings(found["repetitions"], "latency")[0]) == 3
    assert found["repetitions"][-1]["calls"] > 1
    assert [e["step_ns"] for e in found["idle"]] == [[]]


def test_a_missing_shape_is_said_by_the_process(save: Save) -> None:
    with pytest.raises(UsageError, match="`columns`") as caught:
        measure(mlp(save, (1, "columns")))
    assert caught.value.hint == "give the shape as `x=SIZES`, like `x=1,224`"


def test_a_device_error_has_no_shapes(save: Save) -> None:
    runnable = GraphRunnable(decoder(save), threads=1)
    assert isinstance(runnable.failure(RuntimeError("no\nmore")), DeviceError)
