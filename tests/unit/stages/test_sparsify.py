"""The stage: what it prunes, what it leaves alone bit for bit, and what it refuses."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgesft.core import data, models
from edgesft.core.artifact import Artifact
from edgesft.core.errors import ArtifactError, CheckFailed, UsageError
from edgesft.core.stage import execute
from edgesft.stages.sparsify import Sparsify

torch.set_num_threads(1)

METHODS = ["magnitude", "wanda", "sparsegpt"]
TEXT = "the cat sat on a mat and looked at seven small birds that sang of rain in the old garden"
WORDS = TEXT.split()


def stage(method: str = "wanda", pattern: str = "2:4", **values: Any) -> Sparsify:
    table = {"samples": 6, "length": 32, "threads": 1, "compress": {"use": method}, "pattern": pattern}
    return Sparsify.from_recipe(table | values)


@pytest.fixture
def model(tiny_model: Path) -> Path:
    return tiny_model


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    file = tmp_path_factory.mktemp("text") / "prose.jsonl"
    rows = [{"text": " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 30))} for i in range(1, 60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data.resolve(str(file), data.DataOptions())


def groups(weight: Tensor, m: int) -> Tensor:
    return (weight.reshape(weight.shape[0], -1, m) != 0).sum(-1)


def inputs(model: Path, text: Artifact | None = None) -> dict[str, Artifact]:
    found = {"model": models.resolve(str(model))}
    return found if text is None else found | {"data": text}


def altered(source: Path, out: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    """A copy of a model folder with other tensors, written without EdgeSFT."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, out)
    save_file(change(load_file(out / "model.safetensors")), out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8)])
@pytest.mark.parametrize("method", METHODS)
def test_every_targeted_matrix_has_exactly_n_of_m_and_the_rest_is_the_same_bytes(
    method: str, pattern: str, n: int, m: int, model: Path, text: Artifact, tmp_path: Path
) -> None:
    done, ran = execute(stage(method, pattern), inputs(model, text), tmp_path / "out")
    assert ran
    assert done.kind == "model"
    before, after = models.tensors(model), models.tensors(done.path)
    targets = {f"{name}.weight" for name in models.linears(models.load(model))}
    assert len(targets) == 14
    assert before.keys() == after.keys()
    for name in before:
        if name in targets:
            assert (groups(after.get(name), m) == n).all(), name
        else:
            assert torch.equal(after.get(name), before.get(name)), name
    metrics = done.metrics
    assert metrics["pattern"] == pattern
    assert metrics["density"] == n / m
    assert metrics["sparse_layers"] == 14
    assert metrics["dense_layers"] == []
    assert metrics["sparse_parameters"] == sum(before.get(name).numel() for name in targets)
    assert metrics["seconds"] > 0
    if method == "magnitude":
        assert metrics["relative_output_error"] is None
    else:
        assert 0 < metrics["relative_output_error"] < 1
        lines = (done.path / "metrics.jsonl").read_text().splitlines()
        errors = [json.loads(line)["relative_output_error"] for line in lines]
        assert len(errors) == 14
        assert metrics["relative_output_error"] == pytest.approx(sum(errors) / 14)


def test_the_result_is_an_ordinary_folder(model: Path, text: Artifact, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    done, _ = execute(stage(), inputs(model, text), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(done.path)
    assert loaded(torch.arange(8).unsqueeze(0)).logits.isfinite().all()
    assert (done.path / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    assert models.resolve(str(done.path)).manifest["params"]["compress"] == {
        "use": "wanda",
        "pattern": "2:4",
        "density": 0.5,
    }


def test_the_same_request_gives_the_same_bytes_and_is_not_run_twice(
    model: Path, text: Artifact, tmp_path: Path
) -> None:
    first, _ = execute(stage("sparsegpt"), inputs(model, text), tmp_path / "a")
    second, _ = execute(stage("sparsegpt"), inputs(model, text), tmp_path / "b")
    weights = "model.safetensors"
    assert (first.path / weights).read_bytes() == (second.path / weights).read_bytes()
    assert execute(stage("sparsegpt"), inputs(model, text), tmp_path / "a")[1] is False


def test_later_blocks_are_calibrated_on_pruned_activations(
    model: Path, text: Artifact, tmp_path: Path
) -> None:
    """The second block's mask is Wanda's mask for the inputs that the pruned first block gives."""
    done, _ = execute(stage(), inputs(model, text), tmp_path / "out")
    pruned, dense = models.load(done.path), models.load(model)
    windows = stage()._windows(inputs(model, text))
    name = "model.layers.1.mlp.down_proj"
    seen: list[Tensor] = []
    linear = models.linears(pruned)[name]
    with torch.no_grad():  # the pruned first block, then the second as it was
        original = dict(dense.named_parameters())
        for key, parameter in pruned.named_parameters():
            if key.startswith("model.layers.1."):
                parameter.copy_(original[key])
        linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
        pruned(windows)
    from edgesft.core import nm

    scores = original[f"{name}.weight"].abs() * torch.cat(seen).norm(dim=0)
    expected = nm.keep_groups(scores, 2, 4)
    got = models.tensors(done.path).get(f"{name}.weight") != 0
    assert float((expected == got).float().mean()) > 0.999  # sums of another order may swap a tie


def test_layers_that_m_does_not_divide_stay_dense_and_are_named(
    model: Path, text: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    odd = tmp_path / "odd"
    shutil.copytree(model, odd)
    config = LlamaConfig.from_pretrained(model)
    config.intermediate_size = 90
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(odd)
    done, _ = execute(stage("sparsegpt"), inputs(odd, text), tmp_path / "out")
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert done.metrics["dense_layers"] == names
    assert done.metrics["sparse_layers"] == 12
    for name in names:
        key = f"{name}.weight"
        assert torch.equal(models.tensors(done.path).get(key), models.tensors(odd).get(key))
    assert "2 layers stay dense" in capsys.readouterr().err


def test_exact_zeros_of_the_source_leave_no_group_short(model: Path, text: Artifact, tmp_path: Path) -> None:
    key = "model.layers.0.mlp.up_proj.weight"

    def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[key][3, 4:8] = 0
        tensors[key][5, 8:11] = 0
        return tensors

    source = altered(model, tmp_path / "zeros", blank)
    for method in METHODS:
        done, _ = execute(stage(method), inputs(source, text), tmp_path / method)
        weight = models.tensors(done.path).get(key)
        assert (groups(weight, 4) == 2).all()
        if method != "sparsegpt":  # there compensation fills most of them with real values
            assert done.metrics["tiny_entries"] == 3
            assert float(weight[3, 4:8].abs().max()) < 1e-6


def test_half_precision_files_stay_half_precision(model: Path, text: Artifact, tmp_path: Path) -> None:
    source = altered(model, tmp_path / "half", lambda t: {k: v.to(torch.bfloat16) for k, v in t.items()})
    done, _ = execute(stage("sparsegpt"), inputs(source, text), tmp_path / "out")
    weight = models.tensors(done.path).get("model.layers.1.self_attn.q_proj.weight")
    assert weight.dtype == torch.bfloat16
    assert (groups(weight, 4) == 2).all()


@pytest.mark.parametrize("method", METHODS)
def test_nan_weights_are_refused_with_tensor_and_index(
    method: str, model: Path, text: Artifact, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model.layers.1.mlp.gate_proj.weight"][2, 3] = float("nan")
        return tensors

    source = altered(model, tmp_path / "nan", spoil)
    with pytest.raises(ArtifactError, match=r"model.layers.1.mlp.gate_proj.weight.*\[2, 3\]"):
        execute(stage(method), inputs(source, text), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_method_that_reads_text_asks_for_it(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`compress:wanda` reads calibration text") as caught:
        execute(stage(), inputs(model), tmp_path / "out")
    assert "edgesft sparsify" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()
    execute(stage("magnitude"), inputs(model), tmp_path / "out")


def test_windows_longer_than_the_model_reads_are_refused(model: Path, text: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"`sparsify.length` is 512, the model reads 256"):
        execute(stage(length=512), inputs(model, text), tmp_path / "out")


def test_another_kind_of_input_is_refused(model: Path, text: Artifact) -> None:
    assert "expected `model`" in stage().problems({"model": text, "data": text})[0]


def test_a_pattern_that_fits_no_layer_is_refused(model: Path, text: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no linear layer that `2:7` fits"):
        execute(stage(pattern="2:7"), inputs(model, text), tmp_path / "out")


def test_a_method_that_breaks_its_pattern_is_caught_before_anything_is_sealed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgesft.methods.compress.magnitude import Magnitude

    monkeypatch.setattr(Magnitude, "compress", lambda self, name, weight, signals: weight.clone())
    with pytest.raises(CheckFailed, match="has 4 nonzeros in row 0, inputs 0 to 3, expected 2"):
        execute(stage("magnitude"), inputs(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unstructured(model: Path, text: Artifact, tmp_path: Path) -> None:
    chosen = stage(pattern="none", compress={"use": "wanda", "density": 0.7})
    assert chosen.pattern is None
    done, _ = execute(chosen, inputs(model, text), tmp_path / "out")
    assert done.metrics["pattern"] is None
    assert done.metrics["density"] == pytest.approx(0.7, abs=0.01)


class TestFromRecipe:
    def test_defaults(self) -> None:
        chosen = Sparsify.from_recipe({})
        assert chosen.pattern == "2:4"
        assert chosen.params()["compress"]["use"] == "wanda"

    def test_the_pattern_may_stand_in_either_place(self) -> None:
        inner = Sparsify.from_recipe({"compress": {"use": "wanda", "pattern": "1:4"}})
        outer = Sparsify.from_recipe({"compress": {"use": "wanda"}, "pattern": "1:4"})
        assert inner == outer
        assert (
            Sparsify.from_recipe({"compress": {"use": "wanda", "pattern": "1:4"}, "pattern": "1:4"}) == inner
        )
        with pytest.raises(UsageError, match=r"`sparsify.pattern` is `2:4` and `compress.pattern` is `1:4`"):
            Sparsify.from_recipe({"compress": {"use": "wanda", "pattern": "1:4"}, "pattern": "2:4"})

    def test_a_table_is_not_changed(self) -> None:
        table = {"compress": {"use": "wanda"}, "pattern": "1:4"}
        Sparsify.from_recipe(table)
        assert table == {"compress": {"use": "wanda"}, "pattern": "1:4"}

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ({"sampels": 3}, "no parameter `sampels`"),
            ({"samples": 0}, r"sparsify.samples"),
            ({"length": "x"}, r"sparsify.length"),
            ({"compress": {"use": "wnada"}}, "no compress method `wnada`"),
            ({"compress": {"use": "wanda", "damping": 1}}, "no parameter `damping`"),
            ({"pattern": "5:4"}, r"compress:wanda.pattern"),
            ({"compress": {}}, "names no method"),
        ],
    )
    def test_bad_values_are_usage_errors(self, table: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            Sparsify.from_recipe(table)

    def test_params_are_json_and_leave_out_what_decides_nothing(self) -> None:
        assert json.loads(json.dumps(stage("sparsegpt").params()))["samples"] == 6
        assert stage("magnitude", samples=3).params() == stage("magnitude", samples=4).params()
        assert stage(threads=1).params() == stage(threads=2).params()
        assert stage(seed=1).params() != stage(seed=2).params()


def test_importing_the_stage_imports_no_torch() -> None:
    code = "import sys, edgesft.stages.sparsify; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
