"""The export stage: a whole folder or none, the same one only once, and plain refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from edgesft.core import models
from edgesft.core.artifact import Artifact
from edgesft.core.errors import ArtifactError, DeviceError, UsageError
from edgesft.core.params import validate
from edgesft.core.stage import execute
from edgesft.exporters.runtime import generate, load
from edgesft.stages.export import Export


def _model(path: Path, **manifest: Any) -> Artifact:
    found = models.resolve(str(path))
    return Artifact(found.path, found.kind, found.digest, found.ref, manifest)


def test_the_folder_runs_and_says_what_it_is(tiny_model: Path, tmp_path: Path) -> None:
    model = _model(tiny_model, metrics={"pattern": "2:4", "density": 0.5})
    made, ran = execute(Export(quantize="int8"), {"model": model}, tmp_path / "x")
    assert ran
    assert made.kind == "onnx"
    assert made.manifest["params"] == {
        "target": "onnx",
        "quantize": "int8",
        "group": 32,
        "accuracy_level": 4,
        "sparse": "auto",
        "mixed": True,
        "head": "int8",
        "tunable": False,
    }
    metrics = made.metrics
    assert (metrics["builder"], metrics["layers"], metrics["pattern"], metrics["density"]) == (
        "direct",
        2,
        "2:4",
        0.5,
    )
    assert metrics["bytes"] == sum(
        (tmp_path / "x" / n).stat().st_size for n in ("model.onnx", "model.onnx.data")
    )
    assert metrics["parameters"]["int8"] > 10 * metrics["parameters"]["float32"]
    assert (tmp_path / "x" / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "x" / "export.json").read_text())["eos"] == [0]
    assert len(generate(load(tmp_path / "x", threads=1), [5, 6], 4).tokens) == 4
    again, ran = execute(Export(quantize="int8"), {"model": model}, tmp_path / "x")
    assert not ran
    assert again.digest == made.digest


def test_a_dense_model_has_no_pattern(tiny_model: Path, tmp_path: Path) -> None:
    made, _ = execute(Export(), {"model": _model(tiny_model)}, tmp_path / "x")
    assert made.metrics["pattern"] is None


def test_equal_requests_give_equal_bytes(tiny_model: Path, tmp_path: Path) -> None:
    a, _ = execute(Export(quantize="int4"), {"model": _model(tiny_model)}, tmp_path / "a")
    b, _ = execute(Export(quantize="int4"), {"model": _model(tiny_model)}, tmp_path / "b")
    assert a.digest == b.digest


def test_another_precision_into_the_same_folder_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    execute(Export(), {"model": _model(tiny_model)}, tmp_path / "x")
    with pytest.raises(ArtifactError, match=r"`params\.quantize` is `none` there and `int4` here"):
        execute(Export(quantize="int4"), {"model": _model(tiny_model)}, tmp_path / "x")


def test_a_tunable_export_runs_and_is_another_request(tiny_model: Path, tmp_path: Path) -> None:
    made, _ = execute(Export(tunable=True), {"model": _model(tiny_model)}, tmp_path / "x")
    assert made.metrics["tunable"] == 2 * 7
    table = json.loads((tmp_path / "x" / "export.json").read_text())["tunable"]
    assert table["file"] == "model.onnx.data"
    assert table["layers"][0]["name"] == "model.layers.0.self_attn.q_proj"
    plain, _ = execute(Export(), {"model": _model(tiny_model)}, tmp_path / "plain")
    assert "tunable" not in plain.metrics
    assert plain.metrics["parameters"] == made.metrics["parameters"] == {"float32": table["parameters"]}
    assert made.metrics["bytes"] == pytest.approx(plain.metrics["bytes"], rel=0.2)  # no weight is kept twice
    ids = [5, 6, 7]
    ours, stock = (load(tmp_path / n, threads=1) for n in ("x", "plain"))
    assert generate(ours, ids, 4).tokens == generate(stock, ids, 4).tokens
    with pytest.raises(ArtifactError, match=r"`params\.tunable` is `False` there and `True` here"):
        execute(Export(tunable=True), {"model": _model(tiny_model)}, tmp_path / "plain")


def test_quantised_weights_are_not_tuned() -> None:
    with pytest.raises(UsageError, match="`--tunable` is for weights in float32, `--quantize` is `int8`"):
        Export(tunable=True, quantize="int8")


def test_a_traced_model_is_not_tuned(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=4)).save_pretrained(tmp_path / "m")
    (found,) = Export(tunable=True).problems({"model": _model(tmp_path / "m")})
    assert "architecture `gpt2`; `--tunable` needs a family among `llama`" in found


def test_a_refused_model_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    models.copy_files(tiny_model, broken, ["config.json", "tokenizer.json"])
    tensors = load_file(tiny_model / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 1] = float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"`model.layers.1.self_attn.o_proj.weight` .* at \[0, 1\]"):
        execute(Export(), {"model": _model(broken)}, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_targets() -> None:
    with pytest.raises(DeviceError, match="`tensorrt` is not available"):
        Export(target="tensorrt")
    with pytest.raises(UsageError, match="no export target `onxx`") as caught:
        Export(target="onxx")
    assert caught.value.hint == "did you mean `onnx`?"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"quantize": "int5"}, "export.quantize"),
        ({"group": 48}, "export.group"),
        ({"accuracy_level": 9}, "export.accuracy_level"),
        ({"quantise": "int4"}, "no parameter `quantise`"),
        ({"target": "onxx"}, "no export target"),
    ],
)
def test_values_are_checked_at_the_border(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        validate(Export, values, "export")


def test_packed_weights_are_quantised_ones() -> None:
    with pytest.raises(UsageError, match="`--sparse always` packs quantised weights") as caught:
        Export(sparse="always")
    assert caught.value.hint == "--quantize int4"
    Export(sparse="always", quantize="int8")
