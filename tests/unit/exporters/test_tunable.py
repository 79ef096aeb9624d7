"""Tuning an exported decoder: the torch model's numbers, its bits after a step, a whole artefact always."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from edgesft.core import artifact, catalog
from edgesft.core.artifact import Request, create
from edgesft.core.data.batches import ArrayBatch
from edgesft.core.errors import ArtifactError, DeviceError, UsageError
from edgesft.core.protocols import Mask, Shift, Update
from edgesft.core.torch_runtime import TorchRunnable
from edgesft.exporters import replace
from edgesft.exporters.dialects.graph import Precision
from edgesft.exporters.onnx import export
from edgesft.exporters.readback import dequantized
from edgesft.exporters.runtime import generate, load
from edgesft.exporters.tunable import OnnxTunable, problems
from edgesft.kernels.perturb import host, ort_op, tensor_id

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}
SELECT = catalog.build("select", {"use": "small-magnitude", "density": 0.5})
TASK = catalog.build("objective", {"use": "task"})


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    usable, why = ort_op.state()
    if not usable:
        pytest.skip(why)


def _model(folder: Path, family: str = "llama") -> Path:
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(FAMILIES[family])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    module.save_pretrained(folder)
    return folder


def _export(model: Path, out: Path, tunable: bool = True) -> Path:
    with create(out, Request("onnx", "export", {}, {})) as (work, metrics):
        metrics.update(export(model, work.path, Precision(), tunable))
    return out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _model(tmp_path_factory.mktemp("tunable") / "model")


@pytest.fixture
def exported(model: Path, tmp_path: Path) -> Path:
    return _export(model, tmp_path / "exported")


def _batch(kind: str, rows: int = 6, length: int = 9, seed: int = 0) -> ArrayBatch:
    """Rows of different lengths, padded on the right."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, length + 1, rows)
    ids, mask = rng.integers(1, 96, (rows, length)), (np.arange(length) < lengths[:, None]).astype(np.int64)
    ids *= mask
    start = np.arange(rows) * length
    more: dict[str, Any] = {}
    if kind == "labels":
        at, of = start + lengths - 1, np.arange(rows)
        more = {"choices": np.array([7, 20, 33]), "gold": rng.integers(0, 3, rows)}
    else:
        spans = list(zip(start, lengths, strict=True))
        at = np.concatenate([s + np.arange(1 + r % 2, n - 1) for r, (s, n) in enumerate(spans)])
        of = at // length
    if kind == "candidates":
        more = {"example": np.repeat(np.arange(rows // 2), 2), "gold": rng.integers(0, 2, rows // 2)}
    weights = rng.random(len(at)).astype(np.float32)
    targets = rng.integers(1, 96, len(at))
    return ArrayBatch(kind, ids, mask, at, targets, weights / weights.sum(), of, **more)  # type: ignore[arg-type]


def _moved(model: Path, shift: Shift | None, masks: dict[str, Mask]) -> Any:
    """The torch model with noise added to copies of its weights."""
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, mask in masks.items() if shift else ():
        weight = module.get_submodule(name).weight.data.numpy()
        host.descend(weight, shifts=[shift], tensor=tensor_id(f"{name}.weight"), mask=mask)
    return module.eval()


@torch.no_grad()
def _torch_loss(model: Path, batch: ArrayBatch, shift: Shift | None, masks: dict[str, Mask]) -> float:
    return float(TASK.loss(_moved(model, shift, masks), batch.torch(), None))  # type: ignore[attr-defined]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_texts_are_those_of_torch(family: str, tmp_path: Path) -> None:
    source = _model(tmp_path / "model", family)
    ours, theirs = load(_export(source, tmp_path / "x"), threads=1), TorchRunnable(source)
    batch = _batch("lm")
    arguments = batch.input_ids, batch.attention_mask, batch.positions
    np.testing.assert_allclose(ours.logits(*arguments), theirs.logits(*arguments), atol=1e-5)
    stock = load(_export(source, tmp_path / "stock", tunable=False), threads=1)
    np.testing.assert_allclose(ours.logits(*arguments), stock.logits(*arguments), atol=1e-5)
    assert generate(ours, [5, 6, 7], 8).tokens == generate(stock, [5, 6, 7], 8).tokens
    two, one = ours.start(8, 2), stock.start(8, 2)
    prompt = np.array([[5, 6, 7], [9, 9, 1]])
    np.testing.assert_allclose(two.prefill(prompt), one.prefill(prompt), atol=1e-5)


def test_the_layers_are_those_that_torch_names(model: Path, exported: Path) -> None:
    from edgesft.core import models

    tunable = OnnxTunable(exported, threads=1)
    linears = models.linears(_moved(model, None, {}))
    assert tunable.shapes == {name: tuple(layer.weight.shape) for name, layer in linears.items()}
    stored = load_file(model / "model.safetensors")
    for name, array in tunable.weights.items():
        np.testing.assert_array_equal(array, stored[f"{name}.weight"].numpy())
    assert tunable.parameters == sum(p.numel() for p in _moved(model, None, {}).parameters())
    assert tunable.trainable == sum(array.size for array in tunable.weights.values())


@pytest.mark.parametrize("kind", ["labels", "candidates", "lm"])
def test_losses_are_those_of_torch(kind: str, model: Path, exported: Path) -> None:
    batch, tunable = _batch(kind), OnnxTunable(exported, select=SELECT, threads=1)
    masks = dict(tunable.masks)
    shifts = [Shift(11, 0.01), Shift(11, -0.01), None, Shift(12, 0.02, "rademacher")]
    loss = tunable.loss(TASK, batch)
    found = loss.together(shifts)
    for shift, value in zip(shifts, found, strict=True):
        assert value == pytest.approx(_torch_loss(model, batch, shift, masks), abs=2e-6)
        assert loss(shift) == pytest.approx(value, abs=1e-6)
    assert len({round(value, 5) for value in found}) == 4
    task: Any = TASK
    with torch.no_grad():
        expected, right = task.assess(_moved(model, None, {}), batch.torch())
    assert tunable.assess(batch) == (pytest.approx(expected, abs=2e-6), right)


def test_few_logits_at_a_time_give_the_same_loss(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tunable, batch = OnnxTunable(exported, threads=1), _batch("candidates")
    whole = tunable.loss(TASK, batch).together([Shift(1, 0.1), None])
    monkeypatch.setattr("edgesft.exporters.tunable.LOGIT_BYTES", 4 * 96 * 2 * 9)
    assert tunable.loss(TASK, batch).together([Shift(1, 0.1), None]) == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
def test_the_first_projected_gradient_is_that_of_torch(law: Any, model: Path, exported: Path) -> None:
    eps, batch = 1e-3, _batch("labels", rows=16)
    tunable = OnnxTunable(exported, select=SELECT, threads=1)
    loss, masks = tunable.loss(TASK, batch), dict(tunable.masks)
    for seed in (1, 2, 3):
        plus, minus = loss.together([Shift(seed, eps, law), Shift(seed, -eps, law)])
        exact = [_torch_loss(model, batch, Shift(seed, s, law), masks) for s in (eps, -eps)]
        assert (plus - minus) / (2 * eps) == pytest.approx((exact[0] - exact[1]) / (2 * eps), rel=1e-3)


def test_the_masks_are_those_of_the_selection(model: Path, exported: Path) -> None:
    tunable = OnnxTunable(exported, select=SELECT, threads=1)
    share = tunable.trainable / sum(array.size for array in tunable.weights.values())
    assert share == pytest.approx(0.5, abs=0.01)
    select: Any = SELECT
    for name, tensor in load_file(model / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if layer in tunable.masks:
            assert tunable.masks[layer] == select.region(layer, tensor, None, 0.0).rule()


def test_a_layer_that_is_not_selected_does_not_move(exported: Path) -> None:
    class First:
        def region(self, name: str, weight: Any, signals: object, progress: float) -> Any:
            select: Any = SELECT
            return select.region(name, weight, signals, progress) if name.endswith("0.mlp.up_proj") else None

    tunable, batch = OnnxTunable(exported, select=First(), threads=1), _batch("labels")
    assert list(tunable.masks) == ["model.layers.0.mlp.up_proj"]
    before = {name: array.copy() for name, array in tunable.weights.items()}
    one = tunable.loss(TASK, batch)(Shift(1, 0.5))
    assert tunable.descend(Update((Shift(1, 0.5),))) == tunable.shapes["model.layers.0.mlp.up_proj"][0] * 32
    moved = {name for name, array in tunable.weights.items() if not np.array_equal(array, before[name])}
    assert moved == set(tunable.masks)
    assert tunable.assess(batch)[0] == pytest.approx(one, abs=1e-6)  # at the point that the shift described


def test_steps_replay_restore_and_digests(exported: Path) -> None:
    data = (exported / "model.onnx.data").read_bytes()
    updates = [Update((Shift(i, 0.01), Shift(i + 50, -0.02, "rademacher")), 0.999) for i in range(3)]
    tunable = OnnxTunable(exported, select=SELECT, threads=1)
    first, inside = dict(tunable.digests()), tunable.trainable
    counts = [tunable.descend(update) for update in updates]
    last = dict(tunable.digests())
    assert all(first[name] != last[name] for name in first)
    assert counts[0] == inside > counts[-1]  # what grew out of the band is frozen
    tunable.restore()
    assert tunable.digests() == first
    assert tunable.replay(updates) == counts[-1]
    assert tunable.digests() == last
    assert (exported / "model.onnx.data").read_bytes() == data  # until `commit`


def test_a_commit_is_the_artefact_from_then_on(exported: Path) -> None:
    before, batch = artifact.read(exported, "onnx"), _batch("lm")
    tunable = OnnxTunable(exported, select=SELECT, threads=1)
    tunable.descend(Update((Shift(1, 0.05),)))
    loss, digests = tunable.assess(batch)[0], dict(tunable.digests())
    made = tunable.commit({"steps": 1})
    after = artifact.read(exported, "onnx")  # every hash is checked
    assert made.digest == after.digest != before.digest
    assert after.manifest["tuned"] == {"steps": 1}
    assert after.manifest["request"] != before.manifest["request"]
    assert sorted(p.name for p in exported.parent.iterdir()) == ["exported"]
    again = OnnxTunable(exported, select=SELECT, threads=1)
    assert again.digests() == digests
    assert again.assess(batch)[0] == pytest.approx(loss, abs=1e-9)
    tunable.restore()
    assert tunable.digests() == digests
    tunable.descend(Update((Shift(2, 0.05),)))
    assert tunable.commit().digest not in (before.digest, after.digest)


def test_a_commit_without_an_exchange_and_a_kill_between(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replace, "_swap", lambda a, b: False)
    tunable = OnnxTunable(exported, threads=1)
    tunable.descend(Update((Shift(1, 0.05),)))
    digest = tunable.commit().digest
    assert artifact.read(exported, "onnx").digest == digest
    assert sorted(p.name for p in exported.parent.iterdir()) == ["exported"]
    os.rename(exported, exported.with_name(".exported.old"))
    assert OnnxTunable(exported, threads=1).digests() == tunable.digests()


KILLED = """
import os, signal, sys
from pathlib import Path
from edgesft.core.protocols import Shift, Update
from edgesft.exporters import replace
from edgesft.exporters.tunable import OnnxTunable
tunable = OnnxTunable(Path(sys.argv[1]), threads=1)
tunable.descend(Update((Shift(1, 0.05),)))
if sys.argv[2] == "before":
    replace._exchange = lambda a, b: os.kill(os.getpid(), signal.SIGKILL)
else:
    replace._sync = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
tunable.commit()
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_leaves_the_old_or_the_new(when: str, exported: Path) -> None:
    old = artifact.read(exported, "onnx").digest
    done = subprocess.run([sys.executable, "-c", KILLED, str(exported), when], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (artifact.read(exported, "onnx").digest == old) == (when == "before")
    OnnxTunable(exported, threads=1).commit()  # sweeps what the kill left
    assert sorted(p.name for p in exported.parent.iterdir()) == ["exported"]


STEPS = """
import sys
from pathlib import Path
import numpy as np
from edgesft.core.data.batches import ArrayBatch
from edgesft.core.protocols import Shift, Update
from edgesft.exporters.tunable import OnnxTunable
class Task: pass
Task.__module__ = "edgesft.methods.objective.task"
import dataclasses
Task = dataclasses.dataclass(Task)
ids = np.arange(1, 13).reshape(3, 4)
batch = ArrayBatch("labels", ids, np.ones_like(ids), np.array([3, 7, 11]), np.array([5, 6, 5]),
    np.ones(3, np.float32) / 3, np.arange(3), choices=np.array([5, 6]), gold=np.array([0, 1, 0]))
from edgesft.core import catalog
select = catalog.build("select", {"use": "small-magnitude", "density": 0.5})
tunable = OnnxTunable(Path(sys.argv[1]), select=select, threads=1)
loss = tunable.loss(Task(), batch)
for step in range(20):
    plus, minus = loss.together([Shift(step, 1e-2), Shift(step, -1e-2)])
    tunable.descend(Update((Shift(step, -0.002 * (plus - minus) / 2e-2),)))
print(tunable.assess(batch)[0], tunable.commit().digest)
print(sorted(name for name in ("torch", "transformers", "safetensors.torch") if name in sys.modules))
"""


def test_steps_need_no_torch(exported: Path) -> None:
    before = artifact.read(exported, "onnx").digest
    batch = ArrayBatch(
        "labels",
        np.arange(1, 13).reshape(3, 4),
        np.ones((3, 4), np.int64),
        np.array([3, 7, 11]),
        np.array([5, 6, 5]),
        np.ones(3, np.float32) / 3,
        np.arange(3),
        choices=np.array([5, 6]),
        gold=np.array([0, 1, 0]),
    )
    start = OnnxTunable(exported, threads=1).assess(batch)[0]
    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(exported)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (loss, digest), modules = done.stdout.splitlines()[0].split(), done.stdout.splitlines()[1]
    assert modules == "[]"
    assert float(loss) < start - 0.01
    assert digest == artifact.read(exported, "onnx").digest != before


def test_an_export_without_tuned_weights_says_how_to_get_them(model: Path, tmp_path: Path) -> None:
    plain = _export(model, tmp_path / "plain", tunable=False)
    assert "edgesft export MODEL --target onnx --tunable" in problems(plain)[0]
    with pytest.raises(UsageError, match="without weights that can be tuned"):
        OnnxTunable(plain)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"file": "../model.onnx.data"}, "leaves its folder"),
        ({"file": "absent.data"}, "cannot be found"),
        ({"layers": [{"name": "a"}]}, "entry 0"),
        ({"offset": -4}, "entry 0"),
        ({"offset": 1 << 40}, "ends at"),
        ({"shape": [64, 64, 1]}, "entry 0"),
        ({"shape": [1 << 30, 1 << 30]}, "ends at"),
        ({"input": "model.layers.0.self_attn.k_proj.weight"}, "twice"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(change: dict[str, Any], reason: str, exported: Path) -> None:
    file = exported / "export.json"
    description = json.loads(file.read_text())
    table = description["tunable"]
    for key, value in change.items():
        (table if key in table else table["layers"][0])[key] = value
    file.write_text(json.dumps(description))
    with pytest.raises(ArtifactError, match=reason):
        OnnxTunable(exported)


def test_linked_weights_are_refused(exported: Path, tmp_path: Path) -> None:
    os.link(exported / "model.onnx.data", tmp_path / "other")
    with pytest.raises(ArtifactError, match="link"):
        OnnxTunable(exported)


def test_an_altered_artefact_is_not_committed_over(exported: Path) -> None:
    tunable = OnnxTunable(exported, threads=1)
    (exported / "stray").write_text("x")
    with pytest.raises(ArtifactError, match="not listed"):
        tunable.commit()
    assert sorted(p.name for p in exported.parent.iterdir()) == ["exported"]


def test_without_a_compiler_it_says_why(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESFT_NATIVE", "0")
    ort_op._library.cache_clear()
    with pytest.raises(DeviceError, match="needs a C"):
        OnnxTunable(exported)


def test_another_objective_is_refused(exported: Path) -> None:
    with pytest.raises(UsageError, match="`small-magnitude`"):
        OnnxTunable(exported, threads=1).loss(SELECT, _batch("labels"))


def test_the_stored_weights_are_listed_under_their_names(model: Path, exported: Path) -> None:
    found = dict(dequantized(exported))
    for name, tensor in load_file(model / "model.safetensors").items():
        np.testing.assert_array_equal(found[name], tensor.numpy())
