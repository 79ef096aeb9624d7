"""The latency path by its commands: foreign graphs, calibration, gate, budgets, reports, baselines."""

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

QUICK = ["--prompt-tokens", 8, "--decode-tokens", 24, "--prompts", 2, "--processes", 1, "--threads", 1]
QUICK += ["--contexts", 0, "--idle", 0, "--no-roofline"]


def perceptron(path, layers, width=384):
    """A plain ONNX file of `layers` dense layers, made by nobody in particular."""
    rng = np.random.default_rng(layers)
    nodes, weights, name = [], [], "x"
    for k in range(layers):
        weights.append(
            numpy_helper.from_array(0.05 * rng.standard_normal((width, width)).astype(np.float32), f"w{k}")
        )
        nodes += [
            helper.make_node("MatMul", [name, f"w{k}"], [f"m{k}"], name=f"/layers.{k}/dense"),
            helper.make_node("Relu", [f"m{k}"], [f"r{k}"], name=f"/layers.{k}/relu"),
        ]
        name = f"r{k}"
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    return {n: perceptron(folder / f"{n}.onnx", n) for n in (12, 24)}


@pytest.fixture(scope="module")
def exported(cli, tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "x"
    cli("export", tiny_model, "-o", out)
    return out


@pytest.fixture(scope="module")
def profiles(cli, exported, graphs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    cli("profile", exported, "-o", folder / "p", "--html", *QUICK)
    # Thirty calls: the warm-up cut takes half of them at most, and a median needs eleven.
    cli("profile", graphs[12], "-o", folder / "q", "--prompts", 30, *QUICK[6:])
    return folder


def test_a_foreign_graph_with_more_layers_is_a_regression_without_preparation(cli, graphs, tmp_path):
    done = cli("gate", "--base", graphs[12], "--head", graphs[24], "--threads", 1, "--json", code=10)
    report = json.loads(done.stdout)
    assert (report["metric"], report["calibration"]) == ("latency", None)
    assert 1.5 < report["ratio"] < 3
    assert "calibrat" not in done.stderr


def test_a_foreign_graph_is_profiled_like_ours(profiles):
    record = json.loads((profiles / "q" / "profile.json").read_text())
    assert record["kind"] == "graph"
    assert record["latency_ms"]["p50"] > 0
    layers = {row["layer"] for row in record["operators"]["rows"]} - {None}
    assert layers == set(range(12))
    assert record["tokens_per_second"] is None


def test_a_profile_holds_its_report_and_trace(profiles):
    assert "<svg" in (profiles / "p" / "report.html").read_text()
    trace = json.loads((profiles / "p" / "trace.json").read_text())
    assert {"M", "X"} <= {event["ph"] for event in trace["traceEvents"]}


def test_every_report_of_several_runs(cli, profiles, tmp_path):
    forms = "html,junit,sarif,markdown,github,github-action-benchmark,json"
    done = cli("report", profiles / "p", profiles / "q", "--format", forms, "-o", tmp_path / "r", "--json")
    assert len(json.loads(done.stdout)["files"]) == 7
    benchmark = json.loads((tmp_path / "r" / "benchmark.json").read_text())
    assert {"name", "unit", "value"} <= benchmark[0].keys()
    cli("report", profiles / "p", "--format", "htlm", "-o", tmp_path / "s", code=2)
    cli("report", tmp_path, "-o", tmp_path / "s", code=3)
    assert not (tmp_path / "s").exists()


def test_baselines_come_go_and_refuse_what_is_broken(cli, profiles, tmp_path):
    store = tmp_path / "baselines"
    cli("baseline", "add", "main", profiles / "p", "--label", "one", "--store", store)
    cli("baseline", "add", "main", profiles / "p", "--store", store)
    assert len(list((store / "main").glob("*.json"))) == 1
    found = json.loads(cli("baseline", "diff", "main", profiles / "p", "--store", store, "--json").stdout)
    assert {row["ratio"] for row in found["rows"]} == {1.0}
    other = cli("baseline", "diff", "main", profiles / "q", "--store", store, code=12)
    assert "error: " in other.stderr
    cli("baseline", "show", "main", "--store", store)
    entry = next((store / "main").glob("*.json"))
    entry.write_text(entry.read_text().replace('"label": "one"', '"label": "two"'))
    assert "altered" in cli("baseline", "diff", "main", profiles / "p", "--store", store, code=12).stderr
    assert "BROKEN" in cli("baseline", "list", "--store", store).stdout
    cli("baseline", "list", "none", "--store", store, code=2)


@pytest.mark.parametrize(("limit", "code"), [(10_000, 0), (1e-4, 10)])
def test_a_budget_needs_no_base(cli, graphs, tmp_path, limit, code):
    (tmp_path / "budget.toml").write_text(f"[budget]\nlatency_p50_ms = {limit}\n")
    done = cli("gate", "--head", graphs[12], "--budget", tmp_path / "budget.toml", "--json", code=code)
    (budget,) = json.loads(done.stdout)["budgets"]
    assert budget["low"] <= budget["value"] <= budget["high"]


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [("[budget]\ntpot_p55_ms = 1\n", 2, "tpot_p5"), ("[budget\n", 2, "line"), (None, 3, "does not exist")],
)
def test_bad_budgets(cli, exported, tmp_path, text, code, says):
    file = tmp_path / "budget.toml"
    if text is not None:
        file.write_text(text)
    assert says in cli("gate", "--head", exported, "--budget", file, code=code).stderr


def test_what_selects_nothing_measures_nothing(cli, exported, tmp_path):
    done = cli(
        "gate", "--base", exported, "--head", exported, "--only", "tpt*", "-o", tmp_path / "v", code=13
    )
    assert "`tpt*`" in done.stderr
    assert not (tmp_path / "v" / "manifest.json").exists()
    assert "--budget" in cli("gate", "--head", exported, code=2).stderr


def test_an_artefact_that_was_altered_after_its_calibration(cli, exported, tmp_path):
    mine, kept = tmp_path / "x", {"EDGESFT_CALIBRATIONS": str(tmp_path / "kept")}
    shutil.copytree(exported, mine)
    few = ["--processes", 24, "--threads", 1, "--margin", 40, "--json"]
    record = json.loads(cli("calibrate", mine, *few, code=0, **kept).stdout)
    assert record["armed"]
    assert record["processes"] == 24
    again = cli("calibrate", mine, *few, "--if-needed", **kept)
    assert json.loads(again.stdout)["made_at"] == record["made_at"]
    with (mine / "model.onnx").open("ab") as file:
        file.write(b"\0")
    done = cli("gate", "--base", mine, "--head", mine, code=3, **kept)
    assert "model.onnx" in done.stderr


def test_a_device_of_the_catalogue_is_only_predicted(cli, exported, tmp_path):
    shown = json.loads(cli("devices", "show", "orin-nano", "--for", exported, "--json").stdout)
    assert shown["prediction"]["predicted"] is True
    cli("profile", exported, "--device", "orin-nano", "-o", tmp_path / "p")
    assert json.loads((tmp_path / "p" / "manifest.json").read_text())["kind"] == "prediction"
    assert "orin-nano" in cli("devices", "show", "orin-nan", code=2).stderr
    cli("gate", "--base", exported, "--head", exported, "--device", "orin-nano", code=2)


def test_a_host_that_is_not_there(cli, exported, tmp_path):
    done = cli("profile", exported, "--device", "ssh://127.0.0.1:9", "-o", tmp_path / "p", code=4)
    assert "127.0.0.1" in done.stderr
    assert not (tmp_path / "p").exists()
