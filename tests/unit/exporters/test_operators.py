"""The operators' table: from a real profile of a small graph, and exact costs of single nodes."""

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgesft.core.errors import ArtifactError
from edgesft.exporters import operators
from edgesft.exporters.costs import Call, Cost, Node, Tensor, Weight, cost

ALL = [{"phase": "call", "repetition": 0, "begin_us": 0, "end_us": 10**12}]


def saved(folder, nodes, inputs, outputs, weights, domains=(("", 17),)):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [value(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    opsets = [helper.make_opsetid(*d) for d in domains]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), folder / "model.onnx")
    return folder


@pytest.fixture
def mlp(tmp_path):
    """Two layers: product, and the sum with a vector; the second product is with a MatMulNBits."""
    weights = {
        "w": np.ones((64, 128), np.float32),
        "b": np.ones(128, np.float32),
        "codes": np.zeros((32, 4, 16), np.uint8),
        "scales": np.ones(32 * 4, np.float32),
    }
    bits = {"K": 128, "N": 32, "bits": 4, "block_size": 32, "accuracy_level": 4}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="layers.0.fc"),
        helper.make_node("Add", ["h", "b"], ["hb"], name="layers.0.bias"),
        helper.make_node(
            "MatMulNBits", ["hb", "codes", "scales"], ["y"], "layers.1.fc", domain="com.microsoft", **bits
        ),
    ]
    shapes = {"x": [1, "s", 64]}, {"y": [1, "s", 32]}
    return saved(tmp_path, nodes, *shapes, weights, (("", 17), ("com.microsoft", 1)))


def profiled(folder, calls):
    """The raw profile of `calls` (lengths) of the graph in `folder`."""
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "raw")
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    for length in calls:
        session.run(None, {"x": np.ones((1, length, 64), np.float32)})
    return folder.joinpath(session.end_profiling())


def test_a_real_profile(mlp):
    raw = profiled(mlp, [4, 4, 4])
    graph = operators.read_graph(mlp)
    runs = operators.read_runs(raw, ALL)
    table = operators.table(runs, graph, "call")
    assert len(runs) == table["steps"] == 3
    assert all(len(r.events) == 3 for r in runs)
    assert sorted(g["name"] for g in table["groups"]) == ["layers.*.bias", "layers.*.fc", "layers.*.fc"]
    rows = {(r["operator"], r["layer"]): r for r in table["rows"]}
    assert set(rows) == {("MatMul", 0), ("Add", 0), ("MatMulNBits", 1)}
    product = rows["MatMul", 0]
    assert product["flops"] == 2 * 4 * 64 * 128
    assert product["bytes"] == 4 * (4 * 64 + 64 * 128 + 4 * 128)
    assert product["kernel"] == "CPU MatMul, float"
    bits = rows["MatMulNBits", 1]
    assert bits["kernel"] == "CPU MatMulNBits, 4 bit, blocks of 32, accuracy level 4"
    assert bits["arithmetic"] == "int8"
    assert bits["flops"] == 2 * 4 * 128 * 32
    assert bits["bytes"] == 4 * 4 * 128 + 32 * 4 * 16 + 4 * 32 * 4 + 4 * 4 * 32
    assert rows["Add", 0]["flops"] is None
    assert table["flops"] == product["flops"] + bits["flops"]
    assert sum(r["share"] for r in table["rows"]) == pytest.approx(1)
    assert table["total_ms"] == pytest.approx(sum(layer["ms"] for layer in table["layers"]))
    assert table["total_ms"] <= table["run_ms"] * 1.5


def test_what_a_graph_says(mlp):
    graph = operators.read_graph(mlp)
    assert set(graph.nodes) == {"layers.0.fc", "layers.0.bias", "layers.1.fc"}
    assert graph.weight_bytes == 4 * 64 * 128 + 4 * 128 + 32 * 4 * 16 + 4 * 32 * 4
    assert graph.parameters == 64 * 128 + 128 * 32
    assert graph.cache_bytes is None


def test_tables_of_rows_and_shared_weights_are_not_counted_as_read_whole(tmp_path):
    table = np.ones((1000, 64), np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["h"], name="embed"),
        helper.make_node("Transpose", ["table"], ["t"], name="form", perm=[1, 0]),
        helper.make_node("MatMul", ["h", "t"], ["a"], name="head"),
        helper.make_node("MatMul", ["h", "t"], ["y"], name="again"),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [1, "s"])
    past = helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT16, [1, 2, "p", 16])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "s", 1000])
    graph = helper.make_graph(nodes, "g", [ids, past], [out], [numpy_helper.from_array(table, "table")])
    onnx.save(helper.make_model(graph, ir_version=9), tmp_path / "model.onnx")
    found = operators.read_graph(tmp_path)
    assert found.weight_bytes == table.nbytes  # by the head, once for both
    assert found.parameters == 2 * table.size
    assert found.cache_bytes == 2 * 16 * 2


def test_convolutions_and_hidden_weights_leave_the_parameters_unknown(tmp_path):
    weights = {"w": np.ones((8, 64, 1, 1), np.float32)}
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="conv")]
    saved(tmp_path, nodes, {"x": [1, 64, 4, 4]}, {"y": [1, 8, 4, 4]}, weights)
    assert operators.read_graph(tmp_path).parameters is None


def span(name, ts, dur, operator=None, **args):
    category = "Node" if operator else "Session"
    args |= {"op_name": operator, "provider": "CPUExecutionProvider"} if operator else {}
    suffix = "_kernel_time" if operator else ""
    return {"cat": category, "ph": "X", "name": name + suffix, "ts": ts, "dur": dur, "args": args}


def raw_file(tmp_path, *spans):
    file = tmp_path / "raw.json"
    file.write_text(json.dumps(spans))
    return file


def test_runs_get_their_phase_and_the_warm_up_does_not_count(tmp_path):
    spans = []
    for i, length in enumerate([900, 90, 500, 50, 52, 54]):
        spans += [span("model_run", 1000 * i, length), span("a", 1000 * i + 1, length - 10, "MatMul")]
    phases = [
        {"phase": "prefill", "repetition": -1, "begin_us": 0, "end_us": 950},
        {"phase": "decode", "repetition": -1, "begin_us": 950, "end_us": 1999},
        {"phase": "prefill", "repetition": 0, "begin_us": 1999, "end_us": 2900},
        {"phase": "decode", "repetition": 0, "begin_us": 2900, "end_us": 4999},
    ]
    runs = operators.read_runs(raw_file(tmp_path, *spans), phases)
    assert [r.phase for r in runs] == ["prefill", "decode", "prefill", "decode", "decode"]
    late = operators.settled(runs, "decode")
    assert [r.duration for r in late] == [50, 52]
    assert operators.table(late, None, "decode")["total_ms"] == pytest.approx(0.041)


def test_what_runs_inside_a_node_is_taken_off_it(tmp_path):
    spans = [
        span("model_run", 0, 200),
        span("outer", 10, 100, "If"),
        span("inner", 20, 30, "MatMul"),
        span("later", 60, 40, "MatMul"),
        span("after", 110, 50, "MatMul"),
    ]
    (run,) = operators.read_runs(raw_file(tmp_path, *spans), ALL)
    assert {e.name: e.own for e in run.events} == {"outer": 30, "inner": 30, "later": 40, "after": 50}
    assert operators.table([run], None, "call")["total_ms"] == pytest.approx(0.15)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"name": "model_run"}]', "[]"])
def test_what_is_no_profile_is_refused(tmp_path, text):
    file = tmp_path / "raw.json"
    file.write_text(text)
    with pytest.raises(ArtifactError, match=r"raw\.json"):
        operators.read_runs(file, ALL)


def test_calls_outside_of_every_phase_are_refused(tmp_path):
    file = raw_file(tmp_path, span("model_run", 0, 100), span("a", 1, 50, "MatMul"))
    with pytest.raises(ArtifactError, match="1 calls and 1 nodes, none of what was run"):
        operators.read_runs(file, [{**ALL[0], "begin_us": 5000}])


@pytest.mark.parametrize(
    ("name", "layer", "pattern"),
    [
        ("layers.3.qkv/MatMulNBits", 3, "layers.*.qkv/MatMulNBits"),
        ("/model/layers.12/attn/MatMul", 12, "/model/layers.*/attn/MatMul"),
        ("/encoder/layer.0/output/Add", 0, "/encoder/layer.*/output/Add"),
        ("transformer.h.7.mlp", 7, "transformer.h.*.mlp"),
        ("/layer1/layer1.0/conv1/Conv", 1, "/layer*/layer1.0/conv1/Conv"),
        ("logits/MatMulNBits", None, "logits/MatMulNBits"),
        ("node_fused_12", None, "node_fused_12"),
        ("path.12", None, "path.12"),
    ],
)
def test_layers_are_read_from_names(tmp_path, name, layer, pattern):
    file = raw_file(tmp_path, span("model_run", 0, 9), span(name, 1, 5, "MatMul"))
    (row,) = operators.table(operators.read_runs(file, ALL), None, "call")["groups"]
    assert row["name"] == pattern
    table = operators.table(operators.read_runs(file, ALL), None, "call")
    assert table["rows"][0]["layer"] == layer
    assert [x["layer"] for x in table["layers"]] == ([] if layer is None else [layer])


def f32(*shape):
    return Tensor("float", shape)


GQA = Node("a", "GroupQueryAttention", {"num_heads": 9, "kv_num_heads": 3})
CACHE = f32(1, 3, 512, 64)  # room for more than it holds


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        # both operands seen
        (Call("MatMul", None, (f32(2, 3, 4), f32(4, 5)), (f32(2, 3, 5),)), Cost(4 * 74, 2 * 30 * 4)),
        # attention: as many products as there are heads
        (
            Call("MatMul", None, (f32(2, 8, 1, 16), f32(2, 8, 16, 9)), (f32(2, 8, 1, 9),)),
            Cost(4 * (256 + 2304 + 144), 2 * 144 * 16),
        ),
        # the second one packed away, and the node not in the graph
        (Call("MatMul", None, (f32(3, 4),), (f32(3, 5),)), Cost(None, 2 * 15 * 4)),
        (Call("FusedMatMul", None, (f32(3, 4),), (f32(3, 5),)), Cost(None, None)),
        (Call("FusedMatMul", None, (f32(3, 4), f32(3, 5)), (f32(4, 5),)), Cost(4 * 47, None)),
        # Gemm: B packed and known, C listed; A transposed
        (
            Call(
                "Gemm",
                Node("g", "Gemm", {"transB": 1}, {1: Weight((5, 4), 32)}),
                (f32(3, 4), f32(5)),
                (f32(3, 5),),
            ),
            Cost(4 * (12 + 20 + 15), 2 * 15 * 4),
        ),
        (
            Call("Gemm", Node("g", "Gemm", {"transA": 1}), (f32(4, 3), f32(4, 5)), (f32(3, 5),)),
            Cost(4 * (12 + 20 + 15), 2 * 15 * 4),
        ),
        (Call("Gemm", None, (f32(3, 4), f32(5)), (f32(3, 5),)), Cost(None, 2 * 15 * 4)),
        # 3 x 3 convolution of 2 groups
        (
            Call("Conv", None, (f32(1, 8, 6, 6), f32(16, 4, 3, 3), f32(16)), (f32(1, 16, 4, 4),)),
            Cost(4 * (288 + 576 + 256), 2 * 256 * 36),
        ),
        (Call("FusedConv", None, (f32(1, 8, 6, 6),), (f32(1, 16, 4, 4),)), Cost(None, None)),
        # rows out of a table that is not read whole
        (
            Call("Gather", None, (f32(49152, 576), Tensor("int64", (1, 1))), (f32(1, 1, 576),)),
            Cost(2 * 576 * 4 + 8, 0),
        ),
        # one token, 100 in the cache with it: not the 512 that there is room for
        (
            Call(
                "GroupQueryAttention",
                GQA,
                (f32(1, 1, 960), CACHE, CACHE),
                (f32(1, 1, 576), CACHE, CACHE),
                100,
            ),
            Cost(4 * (960 + 576) + 2 * 3 * 64 * 4 * 101, 4 * 9 * 64 * 100),
        ),
        # a prompt of 4: token i sees i + 1
        (
            Call(
                "GroupQueryAttention", GQA, (f32(1, 4, 960), CACHE, CACHE), (f32(1, 4, 576), CACHE, CACHE), 4
            ),
            Cost(4 * 4 * (960 + 576) + 2 * 3 * 64 * 4 * 8, 4 * 9 * 64 * (1 + 2 + 3 + 4)),
        ),
        (Call("GroupQueryAttention", GQA, (f32(1, 1, 960), CACHE), (f32(1, 1, 576),)), Cost(None, None)),
        (Call("Add", None, (f32(4), f32(4)), (f32(4),)), Cost(48, None)),
        (Call("Add", None, (Tensor("string", (4,)),), (Tensor("string", (4,)),)), Cost(None, None)),
        (Call("LSTM", None, (f32(4, 4),), (f32(4, 4),)), Cost(None, None)),
    ],
)
def test_costs_of_single_nodes(call, expected):
    assert cost(call) == expected


def test_an_operator_of_unknown_work_leaves_the_flops_of_the_run_unknown(tmp_path):
    shapes = {
        "input_type_shape": [{"float": [3, 4]}, {"float": [4, 5]}],
        "output_type_shape": [{"float": [3, 5]}],
    }
    spans = [
        span("model_run", 0, 99),
        span("a", 1, 5, "MatMul", **shapes),
        span("s", 7, 5, "Shape", **shapes),
    ]
    runs = operators.read_runs(raw_file(tmp_path, *spans), ALL)
    assert operators.table(runs, None, "call")["flops"] == 2 * 15 * 4
    runs = operators.read_runs(raw_file(tmp_path, *spans, span("l", 20, 5, "LSTM", **shapes)), ALL)
    assert operators.table(runs, None, "call")["flops"] is None
