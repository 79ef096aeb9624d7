"""Traced exports agree with torch over batch sizes and lengths, with and without a KV cache."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    GPT2Config,
    MambaConfig,
    OPTConfig,
    PretrainedConfig,
    T5Config,
)

from edgesft.core import models
from edgesft.core.errors import ArtifactError
from edgesft.exporters import safety, traced
from edgesft.exporters.runtime import OnnxRunnable

DECODERS = {
    "gpt2": GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=[1, 2]
    ),
    "opt": OPTConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=64,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
}
BERT = BertConfig(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
)

Made = Callable[[str], tuple[Path, Path]]


def _save(config: PretrainedConfig, auto: type, folder: Path) -> Path:
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(model folder, exported folder) by name; each is traced once."""
    root = tmp_path_factory.mktemp("traced")

    def make(name: str) -> tuple[Path, Path]:
        model, out = root / name, root / f"{name}-out"
        if not out.exists():
            config = DECODERS.get(name, BERT)
            _save(config, AutoModelForCausalLM if name in DECODERS else AutoModel, model)
            out.mkdir()
            (out / "export.json").write_text(json.dumps(traced.export(model, out)))
        return model, out

    return make


@pytest.fixture(params=sorted(DECODERS))
def decoder(request: pytest.FixtureRequest, made: Made) -> tuple[Path, Path]:
    return made(request.param)


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 96, shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_decoder_prefill_over_shapes(decoder: tuple[Path, Path]) -> None:
    model, runnable = models.load(decoder[0]), OnnxRunnable(decoder[1], threads=1)
    for batch, length in ((1, 1), (1, 9), (3, 1), (3, 5)):
        ids = _ids(batch, length)
        mask = torch.ones_like(ids)
        if batch > 1 and length > 1:
            mask[0, -2:] = 0
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask).logits.flatten(0, 1).numpy()
        positions = np.flatnonzero(mask.numpy())
        got = runnable.logits(ids.numpy(), mask.numpy(), positions)
        np.testing.assert_allclose(got, expected[positions], atol=2e-6)


def test_decoder_with_a_cache(decoder: tuple[Path, Path]) -> None:
    model, runnable = models.load(decoder[0]), OnnxRunnable(decoder[1], threads=1)
    ids = _ids(1, 12)
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0].numpy()
    state = runnable.start(12)
    np.testing.assert_allclose(state.prefill(ids[0, :5].numpy()), expected[4], atol=2e-6)
    for t in range(5, 12):
        np.testing.assert_allclose(state.step(int(ids[0, t])), expected[t], atol=2e-6)


def test_decoder_is_described_as_the_runtime_wants_it(made: Made) -> None:
    _, out = made("gpt2")
    described = json.loads((out / "export.json").read_text())
    assert described["kind"] == "decoder"
    assert described["builder"] == "traced"
    assert described["shared_kv"] is False
    assert [described[k] for k in ("layers", "kv_heads", "head_dim", "vocabulary", "hidden")] == [
        2,
        4,
        8,
        96,
        32,
    ]
    assert described["context"] == 64
    assert described["eos"] == [1, 2]
    graph = safety.parse(out).graph
    assert [v.name for v in graph.input] == described["inputs"]
    assert [v.name for v in graph.output] == described["outputs"]
    assert described["outputs"][:3] == ["logits", "present.0.key", "present.0.value"]


def test_logits_come_at_the_last_position_unless_asked(made: Made) -> None:
    _, out = made("gpt2")
    runnable = OnnxRunnable(out, threads=1)
    ids = _ids(1, 4).numpy()
    empty = np.zeros((1, 4, 0, 8), np.float32)
    past = {f"past_key_values.{i}.{n}": empty for i in range(2) for n in ("key", "value")}
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **past}
    (got,) = runnable.session.run(["logits"], feeds)
    np.testing.assert_array_equal(got, runnable.logits(ids, np.ones_like(ids), np.array([3])))


def test_encoder_over_shapes(made: Made) -> None:
    folder, out = made("bert")
    model, runnable = models.load(folder), OnnxRunnable(out, threads=1)
    for batch, length in ((1, 1), (1, 11), (3, 4), (4, 1)):
        ids = _ids(batch, length)
        mask = torch.ones_like(ids)
        if batch > 1 and length > 1:
            mask[1, -1] = 0
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask).last_hidden_state.flatten(0, 1).numpy()
        positions = np.flatnonzero(mask.numpy())
        got = runnable.logits(ids.numpy(), mask.numpy(), positions)
        np.testing.assert_allclose(got, expected[positions], atol=5e-6)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert"])
def test_the_file_is_safe_and_names_the_blocks_but_not_this_machine(made: Made, name: str) -> None:
    folder, out = made(name)
    assert safety.check(out) == {"model.onnx.data"}
    assert sorted(p.name for p in out.iterdir()) == ["export.json", "model.onnx", "model.onnx.data"]
    raw = (out / "model.onnx").read_bytes()
    assert b"site-packages" not in raw
    assert str(folder).encode() not in raw
    named = {o for node in safety.parse(out).graph.node for o in node.output if o.startswith("hidden.")}
    blocks = len(models.blocks(models.load(folder)))
    assert named == {f"hidden.{i}" for i in range(blocks)}
    onnx.checker.check_model(str(out / "model.onnx"))


def test_tracing_is_silent_and_gives_the_same_bytes_again(
    tmp_path: Path, made: Made, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    folder, out = made("opt")
    capfd.readouterr()
    recwarn.clear()
    traced.export(folder, tmp_path)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.parametrize(
    ("config", "auto"),
    [
        (
            T5Config(vocab_size=32, d_model=16, d_kv=8, num_layers=1, num_heads=2, d_ff=16),
            AutoModelForSeq2SeqLM,
        ),
        (MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1), AutoModelForCausalLM),
    ],
    ids=["t5", "mamba"],
)
def test_other_kinds_of_model_are_refused(tmp_path: Path, config: PretrainedConfig, auto: type) -> None:
    with pytest.raises(ArtifactError):
        traced.export(_save(config, auto, tmp_path / "model"), tmp_path)
    assert not (tmp_path / "model.onnx").exists()


def test_a_failure_to_trace_is_an_error_with_its_cause(
    tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        try:
            raise ValueError("a shape depends on data\nmore about it")
        except ValueError as error:
            raise RuntimeError("export failed") from error

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ArtifactError, match=r"cannot be traced: ValueError: a shape depends on data$"):
        traced.export(made("bert")[0], tmp_path)


@pytest.mark.demo
def test_minilm(tmp_path: Path) -> None:
    folder = models.resolve("demo:minilm").path
    (tmp_path / "export.json").write_text(json.dumps(traced.export(folder, tmp_path)))
    runnable, tokenizer = OnnxRunnable(tmp_path, threads=1), models.tokenizer(folder)
    model = models.load(folder)
    for text in ("a", "An encoder turns a sentence into numbers."):
        ids = np.array([tokenizer.encode(text)])
        got = runnable.logits(ids, np.ones_like(ids), np.arange(ids.size))
        with torch.no_grad():
            expected = model(input_ids=torch.from_numpy(ids)).last_hidden_state[0].numpy()
        np.testing.assert_allclose(got, expected, atol=1e-4)
