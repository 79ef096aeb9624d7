"""Decoding with a cache equals a prefill of the whole, batches equal single rows, bad input is refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from edgesft.core.artifact import Request, create
from edgesft.core.errors import ArtifactError, UsageError
from edgesft.core.torch_runtime import TorchRunnable
from edgesft.exporters.dialects.graph import Precision
from edgesft.exporters.foreign import GraphRunnable
from edgesft.exporters.onnx import export
from edgesft.exporters.runtime import Generated, OnnxRunnable, generate, load

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=5),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32),
}
TRACED = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=0)
Made = Callable[..., tuple[Path, Path]]


def _export(model: Path, out: Path, precision: Precision) -> None:
    with create(out, Request("onnx", "export", {}, {})) as (work, metrics):
        metrics.update(export(model, work.path, precision))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """(model folder, exported folder) by family and precision."""
    root = tmp_path_factory.mktemp("runtime")

    def make(family: str, quantize: str = "none") -> tuple[Path, Path]:
        model, out = root / family, root / f"{family}-{quantize}"
        if not model.exists():
            torch.manual_seed(0)
            module = AutoModelForCausalLM.from_config(FAMILIES[family]() if family in FAMILIES else TRACED)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_((0.1 if parameter.dim() > 1 else 0.2) * torch.randn_like(parameter))
            module.save_pretrained(model)
        if not out.exists():
            _export(model, out, Precision(quantize, 32, 0))
        return model, out

    return make


def _ids(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 96, length)


def _all(runnable: Any, ids: np.ndarray) -> np.ndarray:
    return runnable.logits(ids[None], np.ones((1, len(ids)), np.int64), np.arange(len(ids)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_decoding_equals_prefill(made: Made, family: str, quantize: str) -> None:
    runnable = load(made(family, quantize)[1], threads=1)
    ids = _ids(20)
    expected = _all(runnable, ids)
    state = runnable.start(24)
    np.testing.assert_allclose(state.prefill(ids[:7]), expected[6], atol=1e-4)
    for t in range(7, 20):
        np.testing.assert_allclose(state.step(int(ids[t])), expected[t], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_may_come_in_pieces(made: Made, family: str) -> None:
    runnable = load(made(family)[1], threads=1)
    ids = _ids(20)
    expected = _all(runnable, ids)
    state = runnable.start(20)
    for start, end in ((0, 6), (6, 15), (15, 20)):
        np.testing.assert_allclose(state.prefill(ids[start:end]), expected[end - 1], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_padding_on_the_right_changes_nothing(made: Made, family: str, kind: str) -> None:
    model, out = made(family)
    runnable = load(out, threads=1) if kind == "onnx" else TorchRunnable(model, 1)
    rows = [_ids(n, n) for n in (3, 12, 8)]
    ids, mask = np.full((3, 12), 5), np.zeros((3, 12), np.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row)], mask[b, : len(row)] = row, 1
    positions = np.flatnonzero(mask)
    got = runnable.logits(ids, mask, positions)
    np.testing.assert_allclose(got, np.concatenate([_all(runnable, row) for row in rows]), atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_and_export_agree(made: Made, family: str) -> None:
    """Greedy tokens, logits at chosen positions in any order, and the runnables' own facts."""
    model, out = made(family)
    ours, reference = load(out, threads=1), TorchRunnable(model, 1)
    assert (ours.vocabulary, ours.kind, ours.context) == (
        reference.vocabulary,
        reference.kind,
        reference.context,
    )
    ids = np.stack([_ids(9, 1), _ids(9, 2)])
    where = np.array([17, 3, 3, 8])
    feeds = (ids, np.ones_like(ids), where)
    assert ours.logits(*feeds).shape == (4, 96)
    np.testing.assert_allclose(ours.logits(*feeds), reference.logits(*feeds), atol=1e-4)
    seen = set()
    for seed in range(4):
        a, b = (generate(r, _ids(6, seed).tolist(), 30) for r in (ours, reference))
        assert a.tokens == b.tokens
        seen |= set(a.tokens)
    assert len(seen) > 3  # or agreement says little


def _decoded(state: Any, prompt: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Logits (..., steps + 1, vocabulary) after a prompt and each token; time is the last axis of both."""
    found = [state.prefill(prompt)]
    found += [state.step(tokens[..., t]) for t in range(tokens.shape[-1])]
    return np.stack(found, axis=-2)


@pytest.mark.parametrize("family", ["llama", "mistral", "traced"])
@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_a_batch_decodes_as_its_rows_do(made: Made, family: str, kind: str) -> None:
    model, out = made(family)
    runnable: Any = load(out, threads=1) if kind == "onnx" else TorchRunnable(model, 1)
    prompts, tokens = _ids(27).reshape(3, 9), _ids(12, 1).reshape(3, 4)
    found = _decoded(runnable.start(13, 3), prompts, tokens)
    assert found.shape == (3, 5, 96)
    alone = [_decoded(runnable.start(13), p, t) for p, t in zip(prompts, tokens, strict=True)]
    np.testing.assert_allclose(found, np.stack(alone), atol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 1e-2  # or the rows say little


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_a_batch_takes_as_many_prompts_as_it_was_made_for(made: Made, kind: str) -> None:
    model, out = made("llama")
    runnable: Any = load(out, threads=1) if kind == "onnx" else TorchRunnable(model, 1)
    with pytest.raises(UsageError, match="2 prompts were given to a batch of 3"):
        runnable.start(13, 3).prefill(_ids(8).reshape(2, 4))


def test_the_prompts_of_a_batch_come_in_one_piece(made: Made) -> None:
    state = load(made("llama")[1], threads=1).start(13, 2)
    state.prefill(_ids(8).reshape(2, 4))
    with pytest.raises(UsageError, match="in one piece"):
        state.prefill(_ids(4).reshape(2, 2))


@pytest.mark.parametrize("batch", [1, 2])
def test_the_graph_alone_decodes_as_the_export_does(made: Made, batch: int) -> None:
    out = made("traced")[1]
    ours, alone = load(out, threads=1), GraphRunnable(out / "model.onnx", threads=1)
    assert (alone.kind, alone.vocabulary) == ("decoder", 96)
    prompts, tokens = _ids(18).reshape(2, 9)[:batch].squeeze(), _ids(8, 1).reshape(2, 4)[:batch].squeeze()
    one, other = (_decoded(r.start(13, batch), prompts, tokens) for r in (ours, alone))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_profile_of_a_session_is_written_where_it_is_asked_for(made: Made, tmp_path: Path) -> None:
    runnable = OnnxRunnable(made("llama")[1], threads=1, trace=tmp_path / "trace")
    runnable.start(8).prefill(_ids(3))
    written = Path(runnable.session.end_profiling())
    assert written.parent == tmp_path
    nodes = [e["args"]["op_name"] for e in json.loads(written.read_text()) if e["cat"] == "Node"]
    assert nodes.count("GroupQueryAttention") == 2


def test_two_sequences_do_not_share_a_cache(made: Made) -> None:
    runnable = load(made("llama")[1], threads=1)
    ids = _ids(10)
    one, two = runnable.start(10), runnable.start(10)
    one.prefill(ids[:5])
    two.prefill(ids[5:])
    np.testing.assert_allclose(one.step(int(ids[5])), _all(runnable, ids[:6])[-1], atol=1e-4)


def test_logits_of_a_step_outlive_the_next(made: Made) -> None:
    state = load(made("llama")[1], threads=1).start(8)
    first = state.prefill(_ids(3))
    kept = first.copy()
    state.step(1)
    np.testing.assert_array_equal(first, kept)


def test_the_cache_is_bound_not_copied(made: Made) -> None:
    state: Any = load(made("llama")[1], threads=1).start(16)
    state.prefill(_ids(5))
    for buffer, _ in state._caches:
        assert buffer[:, :, :5].any()
        assert not buffer[:, :, 5:].any()
    state.step(3)
    assert state._caches[0][0][:, :, 5].any()


def test_generation_stops(made: Made) -> None:
    runnable = load(made("llama")[1], threads=1)
    free = generate(runnable, [1, 2, 3], 8)
    assert (len(free.tokens), len(free.step_times), free.stop) == (8, 7, "length")
    assert free.ttft_s > 0
    assert free.tokens_per_second is not None
    at = free.tokens[2]
    stopped = generate(runnable, [1, 2, 3], 8, eos={at})
    assert stopped.stop == "eos"
    assert stopped.tokens == free.tokens[: free.tokens.index(at) + 1]
    assert Generated((1,), 0.1, (), "length").tokens_per_second is None


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_what_does_not_fit_is_refused(made: Made, kind: str) -> None:
    model, out = made("llama")
    runnable: Any = load(out, threads=1) if kind == "onnx" else TorchRunnable(model, 1)
    with pytest.raises(UsageError, match="65 tokens are more than the model's context of 64"):
        runnable.start(65)
    with pytest.raises(UsageError, match="context of 64"):
        _all(runnable, _ids(65))
    with pytest.raises(UsageError, match="context of 64"):
        generate(runnable, [1] * 60, 5)
    with pytest.raises(UsageError, match="token 96 is outside the vocabulary of 96"):
        _all(runnable, np.array([1, 96]))
    with pytest.raises(UsageError, match="token -1"):
        runnable.start(4).prefill(np.array([-1]))
    with pytest.raises(UsageError, match="no tokens"):
        generate(runnable, [], 5)
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        generate(runnable, [1], 0)
    state = runnable.start(3)
    state.prefill(np.array([1, 2, 3]))
    with pytest.raises(UsageError, match="4 tokens are more than the 3"):
        state.step(1)


@pytest.mark.parametrize("mask", [[[0, 1, 1]], [[1, 0, 1]], [[0, 0, 0]]])
def test_other_padding_is_refused(made: Made, mask: list[list[int]]) -> None:
    runnable = load(made("llama")[1], threads=1)
    with pytest.raises(UsageError, match="padded on the right"):
        runnable.logits(np.ones((1, 3), np.int64), np.array(mask), np.array([0]))


@pytest.fixture
def fresh(made: Made, tmp_path: Path) -> Path:
    """An exported folder to break."""
    _export(made("llama")[0], tmp_path / "out", Precision("int4"))
    return tmp_path / "out"


def test_an_altered_file_is_refused(fresh: Path) -> None:
    data = fresh / "model.onnx.data"
    with data.open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ArtifactError, match="altered"):
        load(fresh)


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "model.onnx.data", "export.json"])
def test_a_missing_file_is_refused(fresh: Path, name: str) -> None:
    (fresh / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        load(fresh)


def test_data_that_is_linked_is_refused_before_it_is_opened(fresh: Path, tmp_path: Path) -> None:
    (fresh / "model.onnx.data").rename(tmp_path / "elsewhere")
    (fresh / "model.onnx.data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="link"):
        OnnxRunnable(fresh)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not readable"),
        ("[]", "not a JSON object"),
        ('{"format": 2}', "format `2`"),
        ('{"format": 1, "kind": "decoder"}', "no valid `vocabulary`"),
        ('{"format": 1, "kind": "poem", "vocabulary": 9, "inputs": [], "outputs": []}', "kind `poem`"),
        (
            '{"format": 1, "kind": "decoder", "vocabulary": 9, "inputs": [], "outputs": []}',
            "`layers` = `None`",
        ),
        (
            '{"format": 1, "kind": "decoder", "vocabulary": 9, "layers": 3, "inputs": [], "outputs": []}',
            "no input or output `past_key_values.2.key`",
        ),
        (
            '{"format": 1, "kind": "encoder", "vocabulary": 9, "inputs": [], "outputs": []}',
            "no input or output `last_hidden_state`",
        ),
    ],
)
def test_a_description_that_does_not_fit(fresh: Path, text: str, said: str) -> None:
    (fresh / "export.json").write_text(text)
    with pytest.raises(ArtifactError, match=said):
        OnnxRunnable(fresh, threads=1)


def test_a_graph_that_the_runtime_refuses(fresh: Path) -> None:
    import onnx

    model = onnx.load(str(fresh / "model.onnx"), load_external_data=False)
    model.graph.node[-1].op_type = "NoSuchOperation"
    onnx.save(model, str(fresh / "model.onnx"))
    with pytest.raises(ArtifactError, match="cannot load"):
        OnnxRunnable(fresh, threads=1)


def test_neither_torch_nor_transformers_is_imported(made: Made) -> None:
    code = (
        "import sys; from pathlib import Path; from edgesft.exporters.runtime import load, generate;"
        f"generate(load(Path({str(made('llama')[1])!r}), threads=1), [1, 2], 3);"
        "assert not {'torch', 'transformers', 'onnxscript'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
