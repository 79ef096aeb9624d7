"""What can be measured: one function finds out what it is."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgesft.core import artifact, subject
from edgesft.core.artifact import Request, create
from edgesft.core.errors import ArtifactError


def graph(path: Path, weight: float = 1.0, external: bool = False) -> Path:
    """y = x + w."""
    tensor = numpy_helper.from_array(np.full(64, weight, np.float32), "w")
    made = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64])],
        [tensor],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path.parent.mkdir(exist_ok=True)
    onnx.save(
        model,
        str(path),
        save_as_external_data=external,
        location="w.data" if external else None,
        size_threshold=0,
    )
    return path


def test_a_graph_is_its_file_and_its_external_data(tmp_path):
    found = subject.resolve(graph(tmp_path / "a" / "m.onnx", external=True))
    assert (found.kind, found.path.name, found.ref) == ("graph", "m.onnx", str(tmp_path / "a" / "m.onnx"))
    assert [p.name for p in found.files] == ["m.onnx", "w.data"]
    assert found.bytes == sum(p.stat().st_size for p in (tmp_path / "a").iterdir())


def test_the_digest_is_of_the_contents_wherever_they_lie(tmp_path):
    one = subject.resolve(graph(tmp_path / "a" / "m.onnx", external=True))
    (tmp_path / "a" / "unrelated").write_text("x")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "m.onnx").rename(tmp_path / "b" / "n.onnx")
    assert subject.resolve(tmp_path / "b" / "n.onnx").digest == one.digest
    (tmp_path / "b" / "w.data").write_bytes(b"\0" * 256)
    assert subject.resolve(tmp_path / "b" / "n.onnx").digest != one.digest


def test_a_folder_with_one_graph_stands_for_it(tmp_path):
    graph(tmp_path / "a" / "m.onnx")
    (tmp_path / "a" / "config.json").write_text("{}")  # beside the graph, as hub folders have it
    found = subject.resolve(str(tmp_path / "a"))
    assert (found.kind, found.path) == ("graph", (tmp_path / "a" / "m.onnx").resolve())


def test_of_several_graphs_one_has_to_be_named(tmp_path):
    graph(tmp_path / "a" / "m.onnx")
    graph(tmp_path / "a" / "n.onnx")
    with pytest.raises(ArtifactError, match=r"holds 2 graphs: `m\.onnx`, `n\.onnx`"):
        subject.resolve(tmp_path / "a")


def test_a_model_with_a_graph_beside_it_is_a_model(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    graph(tmp_path / "model" / "m.onnx")
    assert subject.resolve(tmp_path / "model").kind == "model"
    assert subject.resolve(tmp_path / "model" / "m.onnx").kind == "graph"


def test_an_export_is_checked_and_its_graph_stands_for_it(tmp_path):
    out = tmp_path / "out"
    with create(out, Request("onnx", "export", {}, {})) as (work, _):
        graph(work.path / "model.onnx", external=True)
    assert subject.resolve(out).kind == "onnx"
    assert subject.resolve(out / "model.onnx") == subject.resolve(out)
    with (out / "w.data").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match="its manifest says"):
        subject.resolve(out / "model.onnx")


def test_a_graph_added_to_an_artefact_is_foreign(tmp_path):
    out = tmp_path / "out"
    with create(out, Request("onnx", "export", {}, {})) as (work, _):
        graph(work.path / "model.onnx")
    assert subject.resolve(graph(out / "other.onnx")).kind == "graph"


@pytest.mark.parametrize("suffix", [".engine", ".plan"])
def test_engines_are_known(tmp_path, suffix):
    file = tmp_path / f"m{suffix}"
    file.write_bytes(b"engine")
    found = subject.resolve(file)
    assert (found.kind, found.bytes, found.digest) == ("engine", 6, artifact.digest_file(file))


@pytest.mark.parametrize("name", ["m.onnx", "m.engine", "m.plan"])
def test_what_is_missing_is_said(tmp_path, name):
    with pytest.raises(ArtifactError, match="does not exist"):
        subject.resolve(tmp_path / name)


def test_other_artefacts_are_refused(tmp_path):
    out = tmp_path / "out"
    with create(out, Request("profile", "profile", {}, {})) as (work, _):
        (work.path / "profile.json").write_text(json.dumps({}))
    with pytest.raises(ArtifactError, match="kind `profile`, expected `onnx` or `model`"):
        subject.resolve(out)


def test_an_empty_folder_is_no_subject(tmp_path):
    with pytest.raises(ArtifactError, match="not a model"):
        subject.resolve(tmp_path)
