import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgesft.core import artifact, data, models
from edgesft.core.errors import ArtifactError, UsageError
from edgesft.core.stage import execute
from edgesft.core.tuning import delta_file, trajectory
from edgesft.stages.merge import Merge
from edgesft.stages.tune import Tune

torch.set_num_threads(1)
OPTIONS = data.DataOptions(template="{text} ", label_words={"0": "b", "1": "g"}, max_length=64)
IDS = torch.arange(24).view(2, 12)
TABLES = {
    "sparse": {"select": {"use": "small-magnitude"}, "estimate": {"use": "spsa"}, "lr": 1e-2},
    "lora": {"delta": {"use": "lora", "rank": 4}, "lr": 1e-2, "optimizer": "adam"},
    "values": {"select": {"use": "magnitude"}, "lr": 1e-2, "optimizer": "adam"},
}


@pytest.fixture(scope="module")
def model(tiny_model):
    return models.resolve(str(tiny_model))


@pytest.fixture(scope="module")
def deltas(model, tiny_data, tmp_path_factory):
    """One delta of each kind, and the logits of the model that it was trained in."""
    made, root = {}, tmp_path_factory.mktemp("deltas")
    inputs = {"model": model, "data": data.resolve(str(tiny_data), OPTIONS)}
    from edgesft.stages.tuning.run import Run

    for name, table in TABLES.items():
        logits = {}
        real = Run._write

        def write(self, logits=logits, real=real):
            with torch.no_grad():
                logits["adapted"] = self.tuned.model(IDS).logits
            real(self)

        Run._write = write
        stage = Tune.from_recipe(table | {"steps": 4, "batch_size": 4, "dev_limit": 4}, OPTIONS)
        try:
            made[name] = execute(stage, inputs, root / name)[0], logits["adapted"]
        finally:
            Run._write = real
    return made


def logits_of(folder):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


@pytest.mark.parametrize("name", ["sparse", "values"])
def test_merged_equals_adapted_bit_for_bit(name, model, deltas, tmp_path):
    delta, adapted = deltas[name]
    out, _ = execute(Merge(), {"model": model, "delta": delta}, tmp_path / "m")
    assert torch.equal(logits_of(out.path), adapted)
    assert not torch.equal(adapted, logits_of(model.path))
    assert out.kind == "model"
    assert out.metrics["layers"] == 14
    assert out.metrics["lost_to_rounding"] == 0
    assert 0 < out.metrics["changed_fraction"] < 0.3


def test_merged_lora_equals_adapted(model, deltas, tmp_path):
    delta, adapted = deltas["lora"]
    out, _ = execute(Merge(), {"model": model, "delta": delta}, tmp_path / "m")
    torch.testing.assert_close(logits_of(out.path), adapted, rtol=1e-5, atol=1e-5)


def test_the_folder_is_an_ordinary_one(model, deltas, tmp_path):
    out, _ = execute(Merge(), {"model": model, "delta": deltas["sparse"][0]}, tmp_path / "m")
    names = {p.name for p in out.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "manifest.json"} <= names
    assert not any(n.startswith(("adapter", "delta", "trajectory")) for n in names)
    before = models.tensors(model.path)
    after = models.tensors(out.path)
    assert set(after) == set(before)
    touched = {f"{layer}.weight" for layer in delta_file.load(deltas["sparse"][0].path).layers}
    assert all(torch.equal(after.get(n), before.get(n)) for n in before if n not in touched)


def test_deltas_add_up_in_any_order(model, deltas, tmp_path):
    a, b, c = (deltas[n][0] for n in ("sparse", "lora", "values"))
    one, _ = execute(Merge(), {"model": model, "delta-0": a, "delta-1": b, "delta-2": c}, tmp_path / "one")
    two, _ = execute(Merge(), {"model": model, "delta-0": c, "delta-1": b, "delta-2": a}, tmp_path / "two")
    base, after, other = (models.tensors(f) for f in (model.path, one.path, two.path))
    for layer in delta_file.load(b.path).layers:
        w = base.get(f"{layer}.weight")
        expected = w + sum(delta_file.load(d.path).effective(layer, w) - w for d in (a, b, c))
        torch.testing.assert_close(after.get(f"{layer}.weight"), expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(after.get(f"{layer}.weight"), other.get(f"{layer}.weight"))


def test_another_base_is_refused_unless_allowed(model, deltas, tmp_path):
    other = tmp_path / "other"
    models.load(model.path).save_pretrained(other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors")
    inputs = {"model": models.resolve(str(other)), "delta": deltas["sparse"][0]}
    with pytest.raises(ArtifactError, match="trained on another model"):
        execute(Merge(), inputs, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    execute(Merge(allow_other_base=True), inputs, tmp_path / "m")


def test_low_precision_models_keep_their_type_and_say_what_was_lost(model, tmp_path, tiny_data):
    half = tmp_path / "half"
    models.load(model.path, dtype="bfloat16").save_pretrained(half)
    models.copy_files(model.path, half)
    inputs = {"model": models.resolve(str(half)), "data": data.resolve(str(tiny_data), OPTIONS)}
    table = TABLES["sparse"] | {"steps": 2, "batch_size": 2, "dev_limit": 2, "lr": 1e-7}
    delta, _ = execute(Tune.from_recipe(table, OPTIONS), inputs, tmp_path / "d")
    both = {"model": inputs["model"], "delta": delta}
    rounded, _ = execute(Merge(), both, tmp_path / "m")
    exact, _ = execute(Merge(dtype="float32"), both, tmp_path / "f")
    name = "model.layers.0.mlp.up_proj.weight"
    assert models.tensors(rounded.path).dtype(name) == "bfloat16"
    assert models.tensors(exact.path).dtype(name) == "float32"
    assert rounded.metrics["lost_to_rounding"] > 0
    assert exact.metrics["lost_to_rounding"] == 0
    assert exact.metrics["changed_values"] > rounded.metrics["changed_values"]


def test_a_foreign_adapter_merges_and_its_nan_is_refused(model, tmp_path):
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(
        models.load(model.path), LoraConfig(r=2, init_lora_weights=False, target_modules=["v_proj"])
    ).eval()
    peft.save_pretrained(str(tmp_path / "adapter"))
    foreign = delta_file.resolve(str(tmp_path / "adapter"))
    out, _ = execute(Merge(), {"model": model, "delta": foreign}, tmp_path / "m")
    with torch.no_grad():
        torch.testing.assert_close(logits_of(out.path), peft(IDS).logits, rtol=1e-4, atol=1e-5)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, file)
    with pytest.raises(ArtifactError, match="finite"):
        execute(Merge(), {"model": model, "delta": foreign}, tmp_path / "n")
    assert not (tmp_path / "n").exists()


def test_a_layer_that_the_model_lacks_is_named(model, deltas, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    source = deltas["lora"][0].path
    (adapter / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    tensors = load_file(source / "adapter_model.safetensors")
    renamed = {k.replace("layers.1.", "layers.7."): v for k, v in tensors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match=r"no layer `model\.layers\.7\."):
        execute(Merge(), {"model": model, "delta": delta_file.resolve(str(adapter))}, tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "file"), [("sparse", "trajectory.safetensors"), ("values", "delta.safetensors")]
)
def test_an_altered_delta_is_refused_when_it_is_read(name, file, deltas, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(deltas[name][0].path, copy)
    assert delta_file.resolve(str(copy)).digest == deltas[name][0].digest
    raw = bytearray((copy / file).read_bytes())
    raw[-5] ^= 1
    (copy / file).write_bytes(raw)
    with pytest.raises(ArtifactError, match="altered"):
        delta_file.resolve(str(copy))
    with pytest.raises(ArtifactError):
        delta_file.resolve(str(tmp_path / "nothing"))
    manifest = json.loads((copy / artifact.MANIFEST).read_text())
    (copy / artifact.MANIFEST).write_text(json.dumps(manifest | {"kind": "profile"}))
    with pytest.raises(ArtifactError, match="kind"):
        delta_file.resolve(str(copy))


# ---------------------------------------------------------------- trajectories


def tensors_of(folder):
    return dict(models.tensors(folder).items())


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rewritten(delta, out, **changes):
    """The trajectory of a delta with other contents, as an artefact that names no model."""
    run = trajectory.load(delta.path)
    with artifact.create(out, artifact.Request("delta", "tune", {}, {})) as (work, _):
        dataclasses.replace(run, **changes).save(work.path)
    return artifact.read(out, "delta")


def test_a_trajectory_says_what_its_replay_did(model, deltas, tmp_path):
    out, _ = execute(Merge(), {"model": model, "delta": deltas["sparse"][0]}, tmp_path / "m")
    assert out.metrics["replayed_steps"] == 4
    assert out.metrics["verified"] is True
    assert out.metrics["replay_seconds"] > 0
    other, _ = execute(Merge(), {"model": model, "delta": deltas["values"][0]}, tmp_path / "n")
    assert not {"replayed_steps", "verified", "replay_seconds"} & set(other.metrics)


def test_a_step_in_the_middle_is_where_a_shorter_run_ends(model, deltas, tiny_data, tmp_path):
    inputs = {"model": model, "data": data.resolve(str(tiny_data), OPTIONS)}
    stage = Tune.from_recipe(TABLES["sparse"] | {"steps": 2, "batch_size": 4, "dev_limit": 4}, OPTIONS)
    short, _ = execute(stage, inputs, tmp_path / "short")
    expected, _ = execute(Merge(), {"model": model, "delta": short}, tmp_path / "a")
    both = {"model": model, "delta": deltas["sparse"][0]}
    found, _ = execute(Merge(step=2), both, tmp_path / "b")
    assert equal(tensors_of(found.path), tensors_of(expected.path))
    assert found.metrics["replayed_steps"] == 2
    assert found.metrics["verified"] is True
    whole, _ = execute(Merge(step=4), both, tmp_path / "c")
    assert not equal(tensors_of(whole.path), tensors_of(found.path))
    none, _ = execute(Merge(step=0), both, tmp_path / "d")
    assert equal(tensors_of(none.path), tensors_of(model.path))


def test_the_best_step_is_merged(model, deltas, tmp_path):
    delta = rewritten(deltas["sparse"][0], tmp_path / "d", best=3)
    bare = {n: dataclasses.replace(x, best=None) for n, x in trajectory.load(delta.path).layers.items()}
    delta = rewritten(delta, tmp_path / "e", layers=bare)
    best, _ = execute(Merge(step="best"), {"model": model, "delta": delta}, tmp_path / "a")
    third, _ = execute(Merge(step=3), {"model": model, "delta": deltas["sparse"][0]}, tmp_path / "b")
    assert equal(tensors_of(best.path), tensors_of(third.path))
    assert best.metrics["replayed_steps"] == 3


@pytest.mark.parametrize(
    ("name", "step", "message"),
    [("values", 3, "no delta"), ("lora", "best", "no delta"), ("sparse", 5, "0 to 4")],
)
def test_steps_that_there_are_not_are_refused_before_work(name, step, message, model, deltas, tmp_path):
    with pytest.raises(UsageError, match=message):
        execute(Merge(step=step), {"model": model, "delta": deltas[name][0]}, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_weights_that_the_run_did_not_start_from_are_refused(model, deltas, tmp_path):
    """Also where no manifest says which model it was."""
    other = tmp_path / "other"
    models.load(model.path).save_pretrained(other)
    models.copy_files(model.path, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors")
    delta = rewritten(deltas["sparse"][0], tmp_path / "d")
    inputs = {"model": models.resolve(str(other)), "delta": delta}
    with pytest.raises(ArtifactError, match=r"layers\.1\.mlp\.up_proj.*sha256:.*sha256:"):
        execute(Merge(), inputs, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    out, _ = execute(Merge(allow_other_base=True), inputs, tmp_path / "m")
    assert out.metrics["verified"] is False
    right = {"model": model, "delta": delta}
    assert execute(Merge(allow_other_base=True), right, tmp_path / "n")[0].metrics["verified"] is True


def test_a_replay_that_ends_elsewhere_writes_nothing(model, deltas, tmp_path):
    run = trajectory.load(deltas["sparse"][0].path)
    first, *rest = run.measured
    shift = dataclasses.replace(first.shifts[0], scale=first.shifts[0].scale * 1.001)
    measured = (dataclasses.replace(first, shifts=(shift,)), *rest)
    delta = rewritten(deltas["sparse"][0], tmp_path / "d", measured=measured)
    for step in ("last", 2):
        with pytest.raises(ArtifactError, match="the replay of"):
            execute(Merge(step=step), {"model": model, "delta": delta}, tmp_path / "m")
        assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("base", ["bf16", "int8"])
def test_a_run_in_another_type_than_the_file_is_merged(base, model, tiny_data, tmp_path):
    inputs = {"model": model, "data": data.resolve(str(tiny_data), OPTIONS)}
    table = TABLES["sparse"] | {"steps": 2, "batch_size": 2, "dev_limit": 2, "base": base}
    delta, _ = execute(Tune.from_recipe(table, OPTIONS), inputs, tmp_path / "d")
    out, _ = execute(Merge(), {"model": model, "delta": delta}, tmp_path / "m")
    assert out.metrics["verified"] is True
    weights = models.tensors(out.path)
    tuned = weights.get("model.layers.0.mlp.up_proj.weight")
    assert tuned.dtype is torch.float32
    if base == "bf16":
        assert torch.equal(tuned, tuned.bfloat16().float())
