"""The direct builder computes what torch computes: every family, every precision, from any kind of folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from edgesft.core.errors import ArtifactError
from edgesft.exporters import external
from edgesft.exporters.dialects.graph import Precision
from edgesft.exporters.onnx import export, problems
from edgesft.exporters.readback import dequantized
from edgesft.exporters.runtime import OnnxRunnable

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama-biased": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-narrow": lambda: LlamaConfig(**{**SIZES, "hidden_size": 48, "head_dim": 16}),  # 1.5 blocks of 32
    "llama-one-head": lambda: LlamaConfig(**{**SIZES, "num_key_value_heads": 1}),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=5),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
}
Made = Callable[[str, str], tuple[Path, Path]]


def make_model(folder: Path, config: PretrainedConfig, **options: object) -> Path:
    """A random model whose activations are of the size of real ones, biases and norms included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.08 if parameter.dim() > 1 else 0.2
            parameter.add_(scale * torch.randn_like(parameter))
    model.save_pretrained(folder, **options)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(model folder, exported folder) by family and precision `none`, `int8`, `int4`; in exact arithmetic."""
    root = tmp_path_factory.mktemp("direct")

    def make(family: str, quantize: str) -> tuple[Path, Path]:
        model, out = root / family, root / f"{family}-{quantize}"
        if not model.exists():
            make_model(model, FAMILIES[family]())
        if not out.exists():
            out.mkdir()
            export(model, out, Precision(quantize, 32, 0))
        return model, out

    return make


def torch_logits(model: Path, ids: np.ndarray, out: Path | None = None) -> np.ndarray:
    """Logits (B, S, vocabulary) of torch, with the weights of an export if `out` is given."""
    module = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        if out is not None:
            state = module.state_dict()
            for name, array in dequantized(out):
                state[name].copy_(torch.from_numpy(np.ascontiguousarray(array)))
        return module(torch.from_numpy(ids)).logits.numpy()


def random_ids(batch: int, length: int, vocabulary: int = 96) -> np.ndarray:
    return np.random.default_rng(length).integers(0, vocabulary, (batch, length))


@pytest.mark.parametrize("family", FAMILIES)
def test_float_logits_equal_torch(made: Made, family: str) -> None:
    model, out = made(family, "none")
    ids = random_ids(2, 14)
    got = OnnxRunnable(out, threads=1).logits(ids, np.ones_like(ids), np.arange(28))
    np.testing.assert_allclose(got.reshape(2, 14, -1), torch_logits(model, ids), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantised_logits_equal_torch_with_those_weights(made: Made, family: str, quantize: str) -> None:
    model, out = made(family, quantize)
    ids = random_ids(1, 14)
    got = OnnxRunnable(out, threads=1).logits(ids, np.ones_like(ids), np.arange(14))
    expected = torch_logits(model, ids, out)[0]
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert np.abs(expected - torch_logits(model, ids)[0]).max() > 1e-3  # or nothing was quantised


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "llama-biased", "qwen3"])
def test_every_weight_can_be_read_back(made: Made, family: str, quantize: str) -> None:
    model, out = made(family, quantize)
    original = load_file(model / "model.safetensors")
    back = dict(dequantized(out))
    assert back.keys() == original.keys()
    matrices = {"none": 0.0, "int8": 0.01, "int4": 0.12}[quantize]
    for name, tensor in original.items():
        w = tensor.numpy()
        assert back[name].shape == w.shape
        bound = matrices if w.ndim == 2 else 0.0
        assert np.linalg.norm(back[name] - w) <= bound * np.linalg.norm(w), name


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_two_of_four_survives(tmp_path: Path, quantize: str) -> None:
    model = make_model(tmp_path / "model", FAMILIES["llama"]())
    tensors = load_file(model / "model.safetensors")
    for name, w in tensors.items():
        if "proj" in name:
            groups = w.reshape(w.shape[0], -1, 4)
            groups.scatter_(-1, groups.abs().argsort(-1)[..., :2], 0.0)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    export(model, tmp_path / "out", Precision(quantize))
    checked = 0
    for name, w in dequantized(tmp_path / "out"):
        if "proj" in name:
            assert (w[tensors[name].numpy() == 0] == 0).all(), name
            checked += 1
    assert checked == 14


def test_arithmetic_in_int8_stays_close(made: Made, tmp_path: Path) -> None:
    model, exact = made("llama", "int8")
    export(model, tmp_path, Precision("int8"))
    ids = random_ids(1, 14)
    feeds = (ids, np.ones_like(ids), np.arange(14))
    fast = OnnxRunnable(tmp_path, threads=1).logits(*feeds)
    np.testing.assert_allclose(fast, OnnxRunnable(exact, threads=1).logits(*feeds), atol=0.1)


@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_without_positions_the_last_token_is_meant(made: Made, quantize: str) -> None:
    """A foreign user: a plain session, and only what the graph calls an input."""
    _, out = made("llama", quantize)
    session = ort.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = random_ids(1, 9)
    feeds: dict[str, Any] = {i.name: np.zeros((1, 2, 0, 16), np.float32) for i in session.get_inputs()}
    assert "logit_positions" not in feeds
    feeds |= {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    got = session.run(["logits"], feeds)[0]
    assert got.shape == (1, 96)
    runnable = OnnxRunnable(out, threads=1)
    np.testing.assert_allclose(got, runnable.logits(ids, np.ones_like(ids), np.array([8])), atol=1e-5)
    one = session.run(["logits"], feeds | {"logit_positions": np.array([2])})[0]
    np.testing.assert_allclose(one, runnable.logits(ids, np.ones_like(ids), np.array([2])), atol=1e-5)


def test_a_tied_table_is_written_once(made: Made) -> None:
    sizes = {}
    for family in ("llama", "qwen2"):
        for quantize in ("none", "int4"):
            _, out = made(family, quantize)
            graph = onnx.load(str(out / "model.onnx"), load_external_data=False).graph
            sizes[family, quantize] = [
                i.name for i in graph.initializer if i.name.startswith(("embed", "head"))
            ]
    assert sizes["llama", "none"] == ["embedding.weight"]
    assert sizes["qwen2", "none"] == ["embedding.weight", "head.weight"]
    assert "head.codes" not in sizes["llama", "int4"]
    assert "head.codes" in sizes["qwen2", "int4"]


def test_external_data_is_aligned_and_complete(made: Made) -> None:
    _, out = made("qwen3", "int4")
    graph = onnx.load(str(out / "model.onnx"), load_external_data=False).graph
    end = 0
    for tensor in graph.initializer:
        entries = {e.key: e.value for e in tensor.external_data}
        if entries:
            assert entries["location"] == "model.onnx.data"
            assert int(entries["offset"]) % 4096 == 0
            assert int(entries["offset"]) >= end
            end = int(entries["offset"]) + int(entries["length"])
    assert end == (out / "model.onnx.data").stat().st_size


def test_graph_names_the_residual_stream(made: Made) -> None:
    _, out = made("llama", "none")
    names = {
        o for n in onnx.load(str(out / "model.onnx"), load_external_data=False).graph.node for o in n.output
    }
    assert {"hidden.0", "hidden.1"} <= names


def test_shards(made: Made, tmp_path: Path) -> None:
    config = FAMILIES["llama"]()
    sharded = make_model(tmp_path / "model", config, max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    (tmp_path / "out").mkdir()
    export(sharded, tmp_path / "out", Precision())
    whole = made("llama", "none")[1]
    assert (tmp_path / "out" / "model.onnx.data").read_bytes() == (whole / "model.onnx.data").read_bytes()


def test_bfloat16(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", FAMILIES["llama"]())
    tensors = {k: v.bfloat16() for k, v in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    export(model, tmp_path / "out", Precision())
    ids = random_ids(1, 6)
    got = OnnxRunnable(tmp_path / "out", threads=1).logits(ids, np.ones_like(ids), np.arange(6))
    np.testing.assert_allclose(got, torch_logits(model, ids)[0], atol=1e-4)


def test_description_and_metrics(made: Made, tmp_path: Path) -> None:
    model, _ = made("llama", "none")
    metrics = export(model, tmp_path, Precision("int4", 64, 4))
    said = json.loads((tmp_path / "export.json").read_text())
    assert (said["kind"], said["builder"], said["shared_kv"]) == ("decoder", "direct", True)
    assert (said["layers"], said["kv_heads"], said["head_dim"]) == (2, 2, 16)
    assert (said["vocabulary"], said["hidden"], said["context"]) == (96, 64, 128)
    assert (said["quantize"], said["group"], said["accuracy_level"]) == ("int4", 64, 4)
    assert said["outputs"][:2] == ["logits", "present.0.key"]
    assert metrics["bytes"] == sum((tmp_path / f"model.onnx{e}").stat().st_size for e in ("", ".data"))
    tensors = load_file(model / "model.safetensors")
    down = sum(t.numel() for name, t in tensors.items() if "down_proj" in name)
    assert sum(metrics["parameters"].values()) == sum(t.numel() for t in tensors.values())
    assert metrics["parameters"]["int8"] == 96 * 64 + down
    assert metrics["parameters"]["float32"] == 5 * 64


def test_int4_without_mixing_keeps_only_the_tables_at_8_bits(made: Made, tmp_path: Path) -> None:
    model, _ = made("llama", "none")
    metrics = export(model, tmp_path, Precision("int4", mixed=False))
    assert metrics["parameters"]["int8"] == 96 * 64


def test_nan_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", FAMILIES["llama"]())
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 7] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match=r"`model.layers.1.mlp.down_proj.weight` .* at \[3, 7\]"):
        export(model, tmp_path / "out", Precision("int4"))


def test_a_full_disk_is_seen_before_anything_is_written(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = made("llama", "none")
    usage = external.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(external.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(ArtifactError, match=r"needs 1 MB, .* has 0 MB free"):
        export(model, tmp_path, Precision())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_the_estimate_of_bytes_is_an_upper_bound(made: Made, family: str, quantize: str) -> None:
    from edgesft.exporters.decoder import describe
    from edgesft.exporters.dialects.onnxruntime import needed

    model, out = made(family, quantize)
    size = sum((out / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert size <= needed(describe(model), Precision(quantize, 32, 0))


def test_other_architectures_are_traced_in_float_only(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=32)
    model = make_model(tmp_path / "model", config)
    assert problems(model, Precision()) == []
    assert "architecture `gpt2`" in problems(model, Precision("int4"))[0]
    with pytest.raises(ArtifactError, match="gpt2"):
        export(model, tmp_path, Precision("int8"))
