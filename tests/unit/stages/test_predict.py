"""The prediction stage: shapes out of artefacts, the record, and the words for people."""

import json
from pathlib import Path

import pytest

from edgesft.core import models, stage
from edgesft.core.artifact import Artifact
from edgesft.core.errors import ArtifactError, UsageError
from edgesft.stages import predict as prediction
from edgesft.stages.export import Export
from edgesft.stages.predict import Predict


@pytest.fixture(scope="module")
def model(tiny_model):
    return models.resolve(str(tiny_model))


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    made, _ = stage.execute(
        Export(quantize="int4"), {"model": model}, tmp_path_factory.mktemp("exports") / "int4"
    )
    return made


def test_the_shape_of_an_export(exported):
    found = prediction.shape(exported)
    assert found.decoder
    assert (found.layers, found.hidden, found.kv_heads, found.head_dim) == (2, 64, 2, 16)
    assert found.weights == "int4"
    assert found.head == 256 * 64
    assert 0 < found.streamed_bytes <= found.weight_bytes < exported.bytes
    assert found.context == 256


def test_an_export_and_its_model_have_the_same_parameters(exported, model):
    assert prediction.shape(exported).parameters == prediction.shape(model).parameters


def test_the_shape_of_a_model_folder(model):
    found = prediction.shape(model)
    per_layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64
    assert found.parameters == 256 * 64 + 2 * per_layer + 64
    assert found.weights == "float32"
    assert found.weight_bytes == found.streamed_bytes == 4 * found.parameters
    assert (found.kv_bytes, found.context) == (4, 256)


def test_an_input_embedding_of_its_own_is_not_streamed(tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file(
        {
            "model.embed_tokens.weight": torch.zeros(32, 8, dtype=torch.float16),
            "lm_head.weight": torch.zeros(32, 8, dtype=torch.float16),
            "model.layers.0.mlp.up_proj.weight": torch.zeros(16, 8, dtype=torch.float16),
        },
        tmp_path / "model.safetensors",
    )
    config = {
        "architectures": ["XForCausalLM"],
        "hidden_size": 8,
        "num_attention_heads": 2,
        "vocab_size": 32,
        "num_hidden_layers": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config, **config}))
    found = prediction.shape(Artifact(tmp_path, "model", "sha256:0", "x"))
    assert found.weight_bytes == 2 * (2 * 32 * 8 + 16 * 8)
    assert found.streamed_bytes == 2 * (32 * 8 + 16 * 8)
    assert found.parameters == 32 * 8 + 16 * 8
    assert (found.weights, found.kv_heads, found.kv_bytes) == ("float16", 2, 2)


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size", None), ("vocab_size", "many"), ("vocab_size", -1)]
)
def test_a_broken_config_is_named(tiny_model, tmp_path, key, value):
    (tmp_path / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes())
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ArtifactError, match=f"`{key}`"):
        prediction.shape(Artifact(tmp_path, "model", "sha256:0", "x"))


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"config\.json"):
        prediction.shape(Artifact(tmp_path, "model", "sha256:0", "x"))


def test_an_engine_is_only_its_bytes(tmp_path):
    file = tmp_path / "x.engine"
    file.write_bytes(b"0" * 5000)
    found = prediction.predict(Artifact(file, "engine", "sha256:0", "x.engine"), "orin-nano")
    assert found["shape"]["weight_bytes"] == 5000
    assert found["latency_ms"]["high"] is None


def test_the_record_is_json_and_says_what_it_is(exported):
    found = json.loads(json.dumps(prediction.predict(exported, "orin-nano-super", "25w", prompt_tokens=64)))
    assert found["predicted"] is True
    assert found["schema"] == prediction.SCHEMA
    assert found["device"]["mode"] == "25w"
    assert found["artifact"]["digest"] == exported.digest
    assert found["context"] == 256  # as much as the model takes
    assert found["fit"]["verdict"] == "fits"


@pytest.mark.parametrize("more", [{"prompt_tokens": 257}, {"context": 1000}])
def test_more_tokens_than_the_model_takes_are_refused(exported, more):
    with pytest.raises(UsageError, match="takes 256 at most"):
        prediction.predict(exported, "orin-nano", **more)


def test_an_unknown_device_names_the_nearest(exported):
    with pytest.raises(UsageError) as caught:
        prediction.predict(exported, "orin-nno")
    assert "orin-nano" in caught.value.hint


def test_this_machine_is_measured(exported, monkeypatch):
    roof = {"copy_gbs": 20.0, "read_gbs": 10.0, "gemm_gflops": {"fp32": 100.0}}
    monkeypatch.setattr(
        prediction.catalog.runtime("devices.roofline"), "measured", lambda threads, refresh=False: roof
    )
    found = prediction.predict(exported, "host")
    assert any("this machine measured" in text for text in found["assumptions"])
    assert found["tpot_ms"]["low"] > 0


def test_the_control_group_s_memory_bounds_this_machine(exported, monkeypatch):
    host = prediction.catalog.runtime("devices.host")
    monkeypatch.setattr(host, "memory_limit", lambda: 10**9)
    assert prediction._limited(host).memory_gb == 1.0
    monkeypatch.setattr(host, "memory_limit", lambda: None)
    assert prediction._limited(host).memory_gb == host.spec().memory_gb


def test_the_stage_writes_a_record_once(exported, tmp_path):
    asked = Predict(device="orin-nano", prompt_tokens=32)
    made, ran = stage.execute(asked, {"subject": exported}, tmp_path / "out")
    assert ran
    assert made.kind == "prediction"
    assert prediction.load(made)["device"]["id"] == "orin-nano"
    assert made.metrics["predicted"] is True
    _, again = stage.execute(asked, {"subject": exported}, tmp_path / "out")
    assert not again
    with pytest.raises(ArtifactError, match="device"):
        stage.execute(Predict(device="agx-thor", prompt_tokens=32), {"subject": exported}, tmp_path / "out")


def test_the_stage_refuses_what_is_no_model(tmp_path):
    other = Artifact(tmp_path, "profile", "sha256:0", "out/p")
    with pytest.raises(ArtifactError, match="kind `profile`"):
        stage.execute(Predict(device="orin-nano"), {"subject": other}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_prediction_of_a_later_schema_is_refused(exported, tmp_path):
    made, _ = stage.execute(Predict(device="orin-nano"), {"subject": exported}, tmp_path / "out")
    file = made.path / prediction.FILE
    file.write_text(json.dumps({**json.loads(file.read_text()), "schema": 99}))
    with pytest.raises(ArtifactError, match="schema"):
        prediction.load(made)


def test_people_read_ranges_marked_as_predicted(exported):
    record = prediction.predict(exported, "orin-nano")
    facts = prediction.facts(record)
    assert facts["predicted"].startswith("Jetson Orin Nano 8GB")
    assert " to " in facts["tpot_ms"]
    assert facts["memory"].startswith("fits")
    (columns, rows), *rest = prediction.tables(record)
    assert rest == []
    assert "predicted" in columns[0]
    assert [row[0] for row in rows] == ["7w", "15w"]
    assert all(len(row) == len(columns) for row in rows)


def test_a_lower_end_alone_is_called_that(tmp_path):
    file = tmp_path / "x.engine"
    file.write_bytes(b"0" * 10**6)
    record = prediction.predict(Artifact(file, "engine", "sha256:0", "x.engine"), "orin-nano")
    assert prediction.facts(record)["latency_ms"].startswith("at least ")


def test_the_module_is_light():
    import subprocess
    import sys

    code = (
        "import sys; from edgesft.stages import predict; from edgesft.devices import power, roofline;"
        "print([m for m in ('torch', 'onnxruntime', 'onnx', 'scipy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert Path(prediction.__file__).name == "predict.py"
