"""`verify` says yes to a true export, and names the place in one that was tampered with."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModel, BertConfig, LlamaConfig, LlamaForCausalLM

from edgesft.core import artifact, models
from edgesft.core.artifact import Artifact
from edgesft.core.errors import ArtifactError, CheckFailed, UsageError
from edgesft.core.stage import execute
from edgesft.exporters import safety, traced
from edgesft.exporters.runtime import OnnxRunnable
from edgesft.kernels.nm_matmul import library
from edgesft.stages import agreement, verify
from edgesft.stages.export import Export
from edgesft.stages.rounding import WeightCheck

TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
Exported = Callable[[str], Artifact]


def _llama(folder: Path, seed: int = 0) -> Artifact:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:  # two of four, as after `sparsify`
                weight.view(-1, 4).scatter_(1, weight.view(-1, 4).abs().argsort(1)[:, :2], 0.0)
            if "norm" in name:
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return models.resolve(str(folder))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return _llama(tmp_path_factory.mktemp("verify") / "model")


@pytest.fixture
def exported(tmp_path: Path, model: Artifact) -> Exported:
    """A fresh export at a precision, free to be tampered with; `auto` would choose by chance."""

    def made(quantize: str) -> Artifact:
        stage = Export(quantize=quantize, sparse="never")
        return execute(stage, {"model": model}, tmp_path / quantize)[0]

    return made


def _tamper(found: Artifact, initializer: str, index: int, change: Callable[[Any], Any]) -> Artifact:
    """Change one number of an initializer in the data file, and the manifest with it."""
    tensor = next(t for t in safety.parse(found.path).graph.initializer if t.name == initializer)
    entries = {e.key: e.value for e in tensor.external_data}
    dtype = np.dtype("<f4") if tensor.data_type == 1 else np.dtype("u1")
    file = found.path / entries["location"]
    data = np.memmap(file, dtype, "r+", int(entries["offset"]), tuple(tensor.dims)).reshape(-1)
    data[index] = change(data[index])
    data.flush()
    manifest = json.loads((found.path / "manifest.json").read_text())
    manifest["files"][file.name]["digest"] = artifact.digest_file(file)
    artifact.write_json(found.path / "manifest.json", manifest)
    return artifact.read(found.path, "onnx")


def _entry(found: Artifact, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((found.path / "export.json").read_text())["weights"][name]
    return entry


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_a_true_export_passes(exported: Exported, model: Artifact, quantize: str) -> None:
    report = verify.verify(exported(quantize), model, tokens=6, threads=1)
    verify.judge(report)
    assert report["ok"] is True
    assert report["first_departing_layer"] is None
    assert report["failures"] == report["warnings"] == []
    for part in ("prefill", "batch", "decode"):
        assert report[part]["max_rel"] < 5e-6
        assert report[part]["top1_agreement"] == 1
    assert report["prefill"]["positions"] == 24 + 7 + 12 + 16 + 1  # the one-token prompt comes last
    assert report["greedy"] == {
        "tokens": 18,
        "equal": True,
        "mismatches": 0,
        "ties": 0,
        "first_mismatch": None,
    }
    assert [layer["name"] for layer in report["layers"]] == [f"model.layers.{i}" for i in range(3)]
    assert all(layer["relative_error"] < 5e-6 for layer in report["layers"])
    assert report["weights"]["zeros_kept"] is True
    assert report["weights"]["tensors"] == 2 + 1 + 3 * 9
    assert report["weights"]["quantized"] == (0 if quantize == "none" else 2 + 3 * 7)
    assert (report["weights"]["max_error_in_steps"] > 0.4) is (quantize != "none")
    assert report["drift"]["decode_against_prefill"]["mean_kl"] < 1e-6
    json.dumps(report, allow_nan=False)


def test_drift_of_coarser_codes_is_larger(exported: Exported, model: Artifact) -> None:
    drift = {
        q: verify.verify(exported(q), model, tokens=2, threads=1)["drift"] for q in ("none", "int8", "int4")
    }
    assert 0 <= drift["none"]["mean_kl"] < drift["int8"]["mean_kl"] < drift["int4"]["mean_kl"]
    assert drift["int4"]["of_arithmetic"]["mean_kl"] < drift["int4"]["mean_kl"]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_one_altered_weight_names_its_layer(exported: Exported, model: Artifact, layer: int) -> None:
    found = _tamper(exported("none"), f"layers.{layer}.down.weight", 100, lambda w: w + 0.5)
    report = verify.verify(found, model, tokens=2, threads=1)
    assert report["ok"] is False
    assert report["first_departing_layer"] == f"model.layers.{layer}"
    with pytest.raises(CheckFailed, match=rf"first layer that departs is `model.layers.{layer}`") as caught:
        verify.judge(report)
    assert caught.value.exit_code == 1


def test_an_alteration_too_small_to_see_in_the_output_is_found(exported: Exported, model: Artifact) -> None:
    found = _tamper(exported("none"), "layers.1.down.weight", 100, lambda w: np.nextafter(w, np.inf))
    report = verify.verify(found, model, tokens=2, threads=1)
    assert report["prefill"]["max_rel"] < 1e-5
    assert report["first_departing_layer"] == "model.layers.1"
    assert report["failures"][0].startswith("the weight `model.layers.1.mlp.down_proj.weight` departs")


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_one_altered_code_names_its_layer(exported: Exported, model: Artifact, quantize: str) -> None:
    found = exported(quantize)
    entry = _entry(found, "model.layers.1.mlp.down_proj.weight")
    report = verify.verify(_tamper(found, entry["tensor"], 9, lambda c: c ^ 1), model, tokens=2, threads=1)
    assert report["first_departing_layer"] == "model.layers.1"
    assert report["prefill"]["max_rel"] < 5e-6  # it is the right computation, of wrong weights


def test_one_altered_scale_names_its_layer(exported: Exported, model: Artifact) -> None:
    found = exported("int4")
    entry = _entry(found, "model.layers.1.mlp.down_proj.weight")
    report = verify.verify(_tamper(found, entry["scales"], 3, lambda s: s * 1.5), model, tokens=2, threads=1)
    assert report["first_departing_layer"] == "model.layers.1"


def test_a_weight_of_infinity_fails_without_a_crash(exported: Exported, model: Artifact) -> None:
    found = _tamper(exported("none"), "layers.1.down.weight", 100, lambda _: np.inf)
    report = verify.verify(found, model, tokens=2, threads=1)
    assert report["first_departing_layer"] == "model.layers.1"
    assert report["prefill"]["max_rel"] is None
    json.dumps(report, allow_nan=False)
    with pytest.raises(CheckFailed, match="NaN or infinity"):
        verify.judge(report)


def test_another_model_is_named_and_refused_by_its_numbers(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = _llama(tmp_path / "other", seed=1)
    report = verify.verify(exported("none"), other, tokens=2, threads=1)
    assert report["ok"] is False
    assert "was exported from another model" in report["warnings"][0]
    assert "was exported from another model" in capsys.readouterr().err
    with pytest.raises(CheckFailed):
        verify.judge(report)


def test_a_model_of_another_size_is_an_error(exported: Exported, tmp_path: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY | {"vocab_size": 64})).save_pretrained(tmp_path / "small")
    with pytest.raises(ArtifactError, match=r"\[24, 96\] numbers, the model \[24, 64\]"):
        verify.verify(exported("none"), models.resolve(str(tmp_path / "small")), threads=1)


def test_a_folder_that_is_no_export_is_an_error(model: Artifact) -> None:
    with pytest.raises(ArtifactError, match="not an export"):
        verify.verify(model, model, threads=1)


def test_an_encoder_is_compared_by_its_hidden_states(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    bert = AutoModel.from_config(config)
    with torch.no_grad():
        for weight in bert.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    bert.save_pretrained(tmp_path / "bert")
    made, out = models.resolve(str(tmp_path / "bert")), tmp_path / "out"
    out.mkdir()
    (out / "export.json").write_text(json.dumps(traced.export(made.path, out)))
    found = Artifact(out, "onnx", "", str(out))
    report = verify.verify(found, made, threads=1)
    verify.judge(report)
    assert report["decode"] is report["greedy"] is report["weights"] is None
    assert "drift" not in report
    assert report["batch"]["max_rel"] < 1e-5
    assert len(report["layers"]) == 2

    # the graph file, not the data file: small tensors lie in it
    graph = safety.parse(out)
    name = "module.encoder.layer.1.output.LayerNorm.bias"
    bias = next(t for t in graph.graph.initializer if t.name == name)
    bias.raw_data = (np.frombuffer(bias.raw_data, np.float32) + np.float32(0.1)).tobytes()
    (out / "model.onnx").write_bytes(graph.SerializeToString())
    assert verify.verify(found, made, threads=1)["first_departing_layer"] == "encoder.layer.1"


def test_the_stage_writes_its_report_and_leaves_nothing_when_it_fails(
    exported: Exported, model: Artifact, tmp_path: Path
) -> None:
    stage = verify.Verify.from_recipe({"tokens": 2, "threads": 1, "prompts": []})
    assert stage.params() == {"tokens": 2, "prompts": []}
    done, ran = execute(stage, {"exported": exported("none"), "model": model}, tmp_path / "yes")
    assert ran
    assert done.metrics["ok"] is True
    assert json.loads((tmp_path / "yes/report.json").read_text())["ok"] is True
    bad = _tamper(exported("none"), "layers.1.down.weight", 100, lambda w: w + 0.5)
    with pytest.raises(CheckFailed):
        execute(stage, {"exported": bad, "model": model}, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    with pytest.raises(UsageError, match="has no parameter `token`"):
        verify.Verify.from_recipe({"token": 2})


# -- the measurements --------------------------------------------------------------------------------


class _Table:
    """A runnable whose next logits are a row of a table, by the last token; `broken` spoils its cache."""

    vocabulary, kind = 5, "decoder"

    def __init__(self, table: np.ndarray, broken: bool = False) -> None:
        self.table, self.broken = table.astype(np.float32), broken

    def logits(self, input_ids: np.ndarray, attention_mask: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return self.table[input_ids.reshape(-1)[positions]]

    def start(self, capacity: int) -> Any:
        return SimpleNamespace(prefill=lambda ids: self.table[ids[-1]], step=self._step)

    def _step(self, token: int) -> np.ndarray:
        return self.table[token] + (1 if self.broken else 0) * np.arange(5, dtype=np.float32)


TABLE = np.random.default_rng(3).normal(size=(5, 5))
ROWS = [np.array(r) for r in ([1, 2, 3, 4, 0, 1, 2], [3, 3, 1], [2])]


def _expected(model: _Table) -> list[np.ndarray]:
    return [agreement.each(model, row) for row in ROWS]


def _decode(got: _Table) -> agreement.Errors:
    errors = agreement.Errors()
    for _, a, b in agreement.decode(got, ROWS, _expected(_Table(TABLE)), 16):
        errors.add(a, b)
    return errors


def test_a_broken_cache_shows_in_decode_only() -> None:
    good, bad = _Table(TABLE), _Table(TABLE, broken=True)
    assert agreement.prefill(bad, ROWS, _expected(good)).max_abs == 0
    assert agreement.batch(bad, ROWS, _expected(good)).max_abs == 0
    assert _decode(good).max_abs == 0
    assert _decode(bad).max_abs == pytest.approx(4)


def test_a_near_tie_is_no_mismatch_and_a_clear_choice_is() -> None:
    table = np.tile(np.array([[0.0, 3.0, 2.9995, 1.0, 0.0]]), (5, 1))
    said = agreement.continued(_Table(table), ROWS, 4)
    assert [list(c.tokens) for c in said] == [[1, 1, 1, 1]] * 3
    other = table.copy()
    other[:, 2] = 3.0005
    for step in (True, False):
        tie = agreement.greedy(said, _Table(other), 1e-3, step=step).report()
        assert (tie["tokens"], tie["equal"], tie["ties"]) == (12, True, 12)
        miss = agreement.greedy(said, _Table(other), 1e-6, step=step).report()
        assert (miss["equal"], miss["mismatches"]) == (False, 12)
        assert miss["first_mismatch"] == {
            "prompt": 0,
            "index": 0,
            "expected": 1,
            "got": 2,
            "margin": pytest.approx(0.0005, rel=1e-2),
        }


def test_nan_is_never_a_tie() -> None:
    table = np.zeros((5, 5))
    said = agreement.continued(_Table(table), ROWS, 2)
    assert agreement.greedy(said, _Table(table + np.nan), 1.0, step=True).misses == 6


def test_errors_keep_nan() -> None:
    errors = agreement.Errors()
    errors.add(np.ones((2, 3), np.float32), np.array([[1, np.nan, 1], [1, 1, 1]], np.float32))
    errors.add(np.ones((1, 3), np.float32), np.ones((1, 3), np.float32))
    assert errors.report()["max_abs"] is None
    assert errors.report()["max_rel"] is None


def test_drift_against_a_computation_by_hand() -> None:
    p, q = np.log([[0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]), np.log([[0.25, 0.5, 0.25], [0.2, 0.3, 0.5]])
    found = agreement.drift([np.array([0, 1])], [p.astype(np.float32)], [(q + 7).astype(np.float32)]).report()
    kl = (0.5 * np.log(0.5 / 0.25) + 0.25 * np.log(0.25 / 0.5)) / 2
    assert found["mean_kl"] == pytest.approx(kl, rel=1e-5)
    assert found["top1_agreement"] == 0.5
    assert found["perplexity"] == {"model": pytest.approx(4), "exported": pytest.approx(2)}
    assert found["perplexity_ratio"] == pytest.approx(0.5)


def _held(array: np.ndarray, scale: float = 1.0, bits: int = 4) -> Any:
    rows, inputs = array.shape
    blocks = np.full((rows, inputs // 4), scale, np.float32)
    zeros = np.full_like(blocks, 1 << (bits - 1))
    return SimpleNamespace(
        name="w", array=array.astype(np.float32), scales=blocks, zeros=zeros, bits=bits, group=4
    )


@pytest.mark.parametrize(
    ("weight", "held", "fault"),
    [
        ([0.4, -0.4, 2.5, 0], [0, 0, 2, 0], None),
        ([9, -10, 3, 0], [7, -8, 3, 0], None),  # cut off at both ends
        ([0.6, 0, 0, 0], [0, 0, 0, 0], "0.6 steps off"),
        ([6, 0, 0, 0], [7, 0, 0, 0], "1 steps off"),  # at the last code, but inwards
        ([12, 0, 0, 0], [7, 0, 0, 0], "cut off by 5 steps"),
        ([0, 0.1, 0, 0], [0, 0, 1, 0], "was 0 is not any more"),
        ([1, np.nan, 0, 0], [1, 0, 0, 0], "nan"),
    ],
)
def test_rounding_to_the_nearest_code(weight: list[float], held: list[float], fault: str | None) -> None:
    check = WeightCheck()
    check.add(np.array([weight], np.float32), _held(np.array([held])))
    assert check.tensors == check.quantized == 1
    if fault is None:
        assert check.first is None
    else:
        assert check.first == "w"
        assert fault in str(check.reason)


def test_plain_weights_must_be_equal() -> None:
    check, weight = WeightCheck(), np.ones((2, 4), np.float32)
    held = SimpleNamespace(name="w", array=weight.copy(), scales=None, zeros=None, bits=32, group=32)
    check.add(weight, held)
    assert check.first is None
    held.array[1, 2] = 2
    check.add(weight, held)
    assert check.reason == "it is another number at [1, 2]"


def test_prompts(tmp_path: Path, tiny_model: Path) -> None:
    built_in = agreement.rows(tiny_model, None, 256, 256)
    assert len(built_in) == len(agreement.PROMPTS) + 1
    assert [len(r) for r in built_in][-1] == 1
    assert max(len(r) for r in built_in) <= 128
    own = agreement.rows(tiny_model, ["ab", ""], 256, 0)
    assert [len(r) for r in own] == [2, 1]
    with pytest.raises(ArtifactError, match="no prompt"):
        agreement.rows(tiny_model, [""], 256, 0)
    with pytest.raises(ArtifactError, match=r"has no tokenizer.json"):
        agreement.rows(tmp_path, ["ab"], 256, 0)
    drawn = agreement.rows(tmp_path, None, 50, 16)
    assert max(int(r.max()) for r in drawn) < 50
    assert max(len(r) for r in drawn) == 8


def test_the_probe_leaves_the_file_alone(exported: Exported) -> None:
    from edgesft.exporters.probe import Probe

    found = exported("int4")
    before = artifact.digest_folder(found.path)
    probe, ids = Probe(found.path, threads=1), np.arange(5)
    hidden = probe.hidden(ids)
    assert [h.shape for h in hidden] == [(5, 48)] * 3
    exact, shipped = agreement.each(probe, ids), agreement.each(OnnxRunnable(found.path, threads=1), ids)
    assert 0 < np.abs(exact - shipped).max() < 0.1 * np.abs(exact).max()
    assert artifact.digest_folder(found.path) == before


@pytest.mark.skipif(library.load() is None, reason="no compiled kernels on this machine")
def test_the_graph_without_our_operations_is_checked_too(
    tmp_path: Path, model: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = Export(quantize="int4", sparse="always")
    found = execute(stage, {"model": model}, tmp_path / "packed")[0]
    report = verify.verify(found, model, tokens=2, threads=1)
    assert report["ok"]
    assert report["plain"]["max_rel"] < 1e-4
    assert "without the kernels" in verify.brief(report)

    file = found.path / "model.plain.onnx"
    graph = onnx.load(str(file), load_external_data=False)
    node = next(n for n in graph.graph.node if n.op_type == "Sparse4")
    next(a for a in node.attribute if a.name == "unit").f *= 1.5
    file.write_bytes(graph.SerializeToString())
    broken = verify.verify(found, model, tokens=2, threads=1)
    assert not broken["ok"]
    assert broken["failures"][0].startswith("`model.plain.onnx` is off by")

    monkeypatch.setattr(verify.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert verify.verify(found, model, tokens=2, threads=1)["plain"] is None
    assert "`model.plain.onnx` is not checked: it takes" in capsys.readouterr().err
