"""From one way of storing weights to another and back, and packed models in use."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgesft.core import data, models, stored
from edgesft.core import recipe as recipes
from edgesft.core.artifact import Artifact
from edgesft.core.errors import ArtifactError, UsageError
from edgesft.core.stage import execute
from edgesft.core.stored import Stored
from edgesft.core.tuning import delta_file
from edgesft.core.weights import Weights
from edgesft.kernels.nm_matmul import layout
from edgesft.kernels.nm_matmul.torch_op import PackedLinear
from edgesft.stages.convert import Convert
from edgesft.stages.evaluate import Evaluate
from edgesft.stages.export import Export
from edgesft.stages.generate import generate
from edgesft.stages.merge import Merge
from edgesft.stages.sparsify import Sparsify
from edgesft.stages.tune import Tune

torch.set_num_threads(1)
DOWN = "model.layers.0.mlp.down_proj.weight"


def convert(source: Path, out: Path, to: str, **options: Any) -> Artifact:
    stage = Convert.from_options({"to": to, **options})
    return execute(stage, {"model": models.resolve(str(source))}, out)[0]


def sparse(source: Path, out: Path, pattern: str) -> Path:
    stage = Sparsify.from_recipe({"compress": {"use": "magnitude"}, "pattern": pattern, "threads": 1})
    execute(stage, {"model": models.resolve(str(source))}, out)
    return out


@pytest.fixture(scope="module")
def pruned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse(tiny_model, tmp_path_factory.mktemp("sparse") / "s", "2:4")


@pytest.fixture(scope="module")
def packed(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "p"
    convert(pruned, out, "nm-packed", value="int8", group=32)
    return out


def changed(folder: Path, out: Path, name: str, change: Callable[[torch.Tensor], Any]) -> Path:
    """A foreign copy of a folder with one tensor changed in place."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("manifest.json"))
    tensors = load_file(out / "model.safetensors")
    change(tensors[name])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


# ---------------------------------------------------------------- nm-packed


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "2:8", "4:8"])
@pytest.mark.parametrize("value", ["int4", "int8", "fp16", "bf16"])
def test_every_pattern_and_value(tiny_model: Path, tmp_path: Path, pattern: str, value: str) -> None:
    source = sparse(tiny_model, tmp_path / "s", pattern)
    made = convert(source, tmp_path / "p", "nm-packed", value=value)
    assert made.metrics["matrices"] == {pattern: 14}
    assert made.metrics["pattern"] == pattern
    assert made.metrics["relative_error"] < {"int4": 0.12, "int8": 0.01, "fp16": 1e-3, "bf16": 3e-3}[value]
    before, after = Stored(source), Stored(made.path)
    assert set(before) == set(after)
    for name in before:
        old, new = before.get(name), after.get(name).float()
        assert (new[old == 0] == 0).all()
        if name not in after.packed:
            assert torch.equal(old, new)
    assert made.metrics["weight_bytes"] < made.metrics["weight_bytes_before"]


def test_a_model_that_is_not_sparse_becomes_dense_tiles(tiny_model: Path, tmp_path: Path) -> None:
    made = convert(tiny_model, tmp_path / "p", "nm-packed")
    assert made.metrics["matrices"] == {"dense": 14}
    assert made.manifest["params"] == {"to": "nm-packed", "pattern": None, "value": "int4", "group": 64}
    with pytest.raises(ArtifactError, match="no N:M matrix, and bf16 packs no other"):
        convert(tiny_model, tmp_path / "q", "nm-packed", value="bf16")
    assert not (tmp_path / "q").exists()


def test_a_matrix_out_of_pattern_is_named(
    pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = changed(pruned, tmp_path / "b", DOWN, lambda t: t[3, 8:12].fill_(1.0))
    manifest = json.loads((pruned / "manifest.json").read_text())
    found = models.resolve(str(broken))
    claims = Artifact(found.path, found.kind, found.digest, found.ref, manifest)
    stage = Convert.from_options({"to": "nm-packed"})
    made, _ = execute(stage, {"model": claims}, tmp_path / "p")
    assert made.metrics["matrices"] == {"2:4": 13, "dense": 1}
    said = " ".join(capsys.readouterr().err.split())
    assert (
        f"`{DOWN}` is not 2:4: 1 groups have more than 2 weights, the first in row 3, columns 8 to 11" in said
    )
    with pytest.raises(ArtifactError, match=r"not 2:4: 1 groups .* row 3, columns 8 to 11") as caught:
        convert(broken, tmp_path / "q", "nm-packed", pattern="2:4")
    assert "edgesft sparsify" in str(caught.value.hint)
    assert not (tmp_path / "q").exists()


def test_packed_again_with_the_same_options_the_bytes_are_the_same(packed: Path, tmp_path: Path) -> None:
    same = convert(packed, tmp_path / "a", "nm-packed", value="int8", group=32)
    assert (same.path / "model.safetensors").read_bytes() == (packed / "model.safetensors").read_bytes()
    other = convert(packed, tmp_path / "b", "nm-packed", value="int4")
    assert other.metrics["matrices"] == {"2:4": 14}


def test_to_dense_is_exact(packed: Path, tmp_path: Path) -> None:
    made = convert(packed, tmp_path / "d", "dense")
    source, plain = Stored(packed), Weights(made.path)
    assert stored.form(made.path) == "dense"
    assert set(plain) == set(source)
    for name in plain:
        assert torch.equal(plain.get(name), source.get(name))
    config = json.loads((made.path / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    ids = torch.arange(9)[None]
    packed_logits = models.load(packed)(ids).logits
    assert torch.allclose(models.load(made.path)(ids).logits, packed_logits, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"to": "dense", "value": "int8"}, "`--value` is for `--to nm-packed`"),
        ({"to": "compressed-tensors", "group": 32}, "`--group` is for `--to nm-packed`"),
        ({"to": "nm-packed", "value": "bf16", "group": 32}, "`--group` is for int4 and int8"),
        ({"to": "nm-packed", "pattern": "5:8"}, "`--pattern` is `5:8`, `--to nm-packed` has `1:4`"),
        ({"to": "compressed-tensors", "pattern": "4:8"}, "has `2:4`"),
        ({"to": "nm-packed", "group": 48}, r"convert\.group"),
        ({"to": "gguf"}, r"convert\.to"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Convert.from_options(options)


def test_what_is_so_already_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is dense already"):
        convert(tiny_model, tmp_path / "d", "dense")


# ---------------------------------------------------------------- compressed-tensors


def test_compressed_and_back_the_file_is_the_same(pruned: Path, tmp_path: Path) -> None:
    made = convert(pruned, tmp_path / "c", "compressed-tensors")
    assert made.metrics["matrices"] == {"2:4": 14}
    about = json.loads((made.path / "config.json").read_text())["quantization_config"]["sparsity_config"]
    assert about["format"] == "sparse-24-bitmask"
    assert about["ignore"] == ["lm_head"]
    back = convert(made.path, tmp_path / "d", "dense")
    assert Weights(back.path).keys() == Weights(pruned).keys()
    assert (back.path / "model.safetensors").read_bytes() == (pruned / "model.safetensors").read_bytes()
    ids = torch.arange(9)[None]
    assert torch.equal(models.load(made.path)(ids).logits, models.load(pruned)(ids).logits)


def test_from_compressed_to_packed_and_the_other_way(pruned: Path, tmp_path: Path) -> None:
    first = convert(pruned, tmp_path / "c", "compressed-tensors")
    packed = convert(first.path, tmp_path / "p", "nm-packed", value="bf16")
    again = convert(packed.path, tmp_path / "e", "compressed-tensors")
    assert Weights(again.path).dtype("model.layers.0.mlp.down_proj.compressed") == "bfloat16"
    left, right = Stored(first.path), Stored(again.path)
    assert all(torch.equal(left.get(n).bfloat16(), right.get(n).bfloat16()) for n in left)


def test_only_matrices_in_the_pattern_are_compressed(pruned: Path, tiny_model: Path, tmp_path: Path) -> None:
    broken = changed(pruned, tmp_path / "b", DOWN, lambda t: t[3, 8:12].fill_(1.0))
    made = convert(broken, tmp_path / "c", "compressed-tensors")
    assert made.metrics["matrices"] == {"2:4": 13, "plain": 1}
    about = json.loads((made.path / "config.json").read_text())["quantization_config"]["sparsity_config"]
    assert about["ignore"] == ["lm_head", "model.layers.0.mlp.down_proj"]
    with pytest.raises(ArtifactError, match="not 2:4"):
        convert(broken, tmp_path / "x", "compressed-tensors", pattern="2:4")
    with pytest.raises(ArtifactError, match="has no 2:4 matrix to compress"):
        convert(tiny_model, tmp_path / "x", "compressed-tensors")


def test_a_broken_mask_is_refused_with_its_place(pruned: Path, tmp_path: Path) -> None:
    made = convert(pruned, tmp_path / "c", "compressed-tensors")
    mask = "model.layers.1.self_attn.q_proj.bitmask"
    broken = changed(made.path, tmp_path / "b", mask, lambda t: t[5, 2].fill_(0xFF))
    with pytest.raises(ArtifactError, match=r"2 groups of four .* row 5, columns 16 to 19"):
        convert(broken, tmp_path / "d", "dense")
    assert not (tmp_path / "d").exists()


# ---------------------------------------------------------------- in use


def test_layers_lie_on_the_mapped_file(packed: Path) -> None:
    model = models.load(packed)
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 14
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(packed) in line]
    spans = [tuple(int(x, 16) for x in line.split()[0].split("-")) for line in maps]
    for layer in layers:
        for tensor in (layer.stream, layer.scales):
            assert any(low <= tensor.data_ptr() < high for low, high in spans)
    assert not any(p.requires_grad for p in model.parameters())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_packed_model_computes_what_its_weights_say(packed: Path, tmp_path: Path, dtype: str) -> None:
    plain = convert(packed, tmp_path / "d", "dense").path
    ids = torch.arange(20)[None]
    expected = models.load(plain)(ids).logits
    logits = models.load(packed, dtype=dtype)(ids).logits
    assert logits.dtype == getattr(torch, dtype)
    assert float((logits.float() - expected).norm() / expected.norm()) < 0.05


def test_evaluate_and_generate(packed: Path, tiny_data: Path) -> None:
    options = data.DataOptions(label_words={"0": " bad", "1": " good"}, template="{text}. It was")
    inputs = {"model": models.resolve(str(packed)), "data": data.resolve(str(tiny_data), options)}
    found = Evaluate(data_options=options, limit=4, threads=1).measure(inputs)
    assert found["examples"] == 4
    made = generate(packed, "hello", max_new_tokens=5, threads=1)
    assert made["new_tokens"] == len(made["tokens"]) > 0


def tuned(source: Path, texts: Path, out: Path, recipe: str, **values: Any) -> Artifact:
    options = data.DataOptions(
        label_words={"0": " bad", "1": " good"}, template="{text}. It was", max_length=64
    )
    table = recipes.load(recipe).table("tune") | {"steps": 3, "batch_size": 4, "dev_limit": 4} | values
    inputs = {"model": models.resolve(str(source)), "data": data.resolve(str(texts), options)}
    return execute(Tune.from_recipe(table, options), inputs, out)[0]


@pytest.mark.parametrize("recipe", ["lora", "zo-lora"])
def test_tuning_beside_packed_weights(packed: Path, tiny_data: Path, tmp_path: Path, recipe: str) -> None:
    before = (packed / "model.safetensors").read_bytes()
    made = tuned(packed, tiny_data, tmp_path / "t", recipe)
    assert made.metrics["parameters"] > made.metrics["trainable_values"] > 0
    assert (packed / "model.safetensors").read_bytes() == before
    model = models.resolve(str(packed))
    with pytest.raises(ArtifactError, match="as nm-packed, `merge` reads plain ones") as caught:
        execute(Merge(), {"model": model, "delta": delta_file.resolve(str(made.path))}, tmp_path / "m")
    assert f"edgesft convert {packed} --to dense" in str(caught.value.hint)
    plain = convert(packed, tmp_path / "d", "dense")
    merged = {"model": models.resolve(str(plain.path)), "delta": delta_file.resolve(str(made.path))}
    assert execute(Merge(), merged, tmp_path / "m")[0].metrics["layers"] == 14


def test_gradients_on_packed_weights_are_those_on_plain_ones(
    packed: Path, tiny_data: Path, tmp_path: Path
) -> None:
    plain = convert(packed, tmp_path / "d", "dense").path
    losses = [
        tuned(source, tiny_data, tmp_path / str(i), "lora", steps=4, lr=1e-2).metrics
        for i, source in enumerate((packed, plain))
    ]
    assert losses[0]["loss_last"] == pytest.approx(losses[1]["loss_last"], rel=1e-4)
    assert losses[0]["loss_last"] < losses[0]["loss_first"]


@pytest.mark.parametrize(
    ("recipe", "values", "words"),
    [
        ("sparse-mezo", {}, "which `delta:sparse` would have to change; beside them lie `delta:lora`"),
        ("full", {}, "would have to change"),
        ("zo-lora", {"compute": "int8"}, "`compute` is `int8`, .* are tuned with `native`"),
        ("zo-lora", {"base": "int8"}, "`base` is `int8`, .* are tuned with `fp32` or `bf16`"),
    ],
)
def test_what_would_change_packed_weights_is_refused_before_it_runs(
    packed: Path, tiny_data: Path, tmp_path: Path, recipe: str, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        tuned(packed, tiny_data, tmp_path / "t", recipe, **values)
    assert "--to dense" in str(caught.value.hint)
    assert not (tmp_path / "t").exists()


def test_stages_that_read_plain_weights_say_so(packed: Path, tmp_path: Path) -> None:
    for stage in (Export(), Sparsify.from_recipe({"compress": {"use": "magnitude"}})):
        with pytest.raises(ArtifactError, match="holds its weights as nm-packed") as caught:
            execute(stage, {"model": models.resolve(str(packed))}, tmp_path / "x")
        assert "--to dense -o OUT" in str(caught.value.hint)


def test_broken_packed_folders_are_refused(packed: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        ignored = shutil.ignore_patterns("manifest.json")
        return Path(shutil.copytree(packed, tmp_path / name, ignore=ignored))

    cut = copy("cut")
    data_file = cut / "model.safetensors"
    data_file.write_bytes(data_file.read_bytes()[:-64])
    with pytest.raises(ArtifactError, match="truncated"):
        models.resolve(str(cut))
    index = copy("index")
    info = Weights(index).info(f"{DOWN}.nm_stream")
    with (index / "model.safetensors").open("r+b") as file:
        file.seek(info.start)
        file.write(bytes(64))
    with pytest.raises(ArtifactError, match=f"`{DOWN}` .* not in order") as caught:
        models.load(models.resolve(str(index)).path)
    assert "edgesft convert" in str(caught.value.hint)
    old = copy("old")
    config = json.loads((old / "config.json").read_text())
    config["quantization_config"]["version"] = layout.VERSION + 1
    (old / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="nm-packed of version 2, this EdgeSFT reads 1"):
        models.resolve(str(old))


def test_the_command(cli: Callable[..., Any], pruned: Path, tmp_path: Path) -> None:
    planned = cli("convert", pruned, "--to", "nm-packed", "-o", tmp_path / "p", "--dry-run", "--json")
    assert json.loads(planned.stdout)["params"]["value"] == "int4"
    assert not (tmp_path / "p").exists()
    done = cli("convert", pruned, "--to", "nm-packed", "--pattern", "2:4", "-o", tmp_path / "p", "--json")
    assert json.loads(done.stdout)["matrices"] == {"2:4": 14}
    failed = cli("convert", pruned, "--to", "dense", "-o", tmp_path / "d", code=3)
    assert "is dense already" in failed.stderr
    cli("convert", pruned, "--to", "dense", "--value", "int4", "-o", tmp_path / "d", code=2)
