import json

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from edgesft.core import catalog, models
from edgesft.core.errors import ArtifactError, UsageError
from edgesft.core.protocols import Mask, Shift
from edgesft.core.quantized import codes
from edgesft.core.region import Flat, Whole, below, kth_smallest_magnitude
from edgesft.core.tuning import delta_file
from edgesft.core.tuning.scalar_optim import Measured
from edgesft.core.tuning.schedule import derive
from edgesft.core.tuning.trajectory import Settings, Trajectory
from edgesft.core.tuning.tuned import Tuned, digest
from edgesft.kernels import perturb
from edgesft.methods.delta.lora import Lora
from edgesft.methods.delta.sparse import Sparse

torch.set_num_threads(1)
FLOAT = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)


def test_few_positions_are_an_index_and_many_a_bit_each():
    weight, few, many = torch.zeros(64, 64), torch.tensor([3 * 64 + 5]), torch.arange(0, 64 * 64, 2)
    assert delta_file.positions(Flat(few), weight)["region.index"].tolist() == [3 * 64 + 5]
    assert delta_file.positions(Flat(many), weight)["region.mask"].numel() == 64 * 64 // 8
    assert delta_file.positions(Whole(), weight) == {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def tuned_of(folder, delta, *, in_place, quarter=True):
    model = models.load(folder)
    layers = models.linears(model)
    regions = {
        n: below(kth_smallest_magnitude(m.weight, m.weight.numel() // 4)) if quarter else Whole()
        for n, m in layers.items()
    }
    return Tuned(model, layers, regions, delta, in_place=in_place, kernel=perturb, seed=0)


def shake(tuned):
    torch.manual_seed(1)
    for p in tuned.theta.values():
        p.add_(0.01 * torch.randn_like(p))
    for layer in tuned.layers.values() if tuned.in_place else ():
        p = layer.base.weight.data
        p.add_(0.01 * torch.randn_like(p) * layer.region.mask(p))


def effective(folder, delta, base):
    """Base weights with the delta, by the names of the files."""
    return {f"{name}.weight": delta.effective(name, base(name)) for name in sorted(delta.layers)}


@pytest.mark.parametrize("quarter", [True, False])
def test_sparse_round_trip_is_bit_exact(folder, tmp_path, quarter):
    with tuned_of(folder, Sparse(), in_place=False, quarter=quarter) as tuned:
        shake(tuned)
        base = delta_file.base_of(folder)
        delta_file.save(tmp_path, tuned, catalog.describe("delta", Sparse()))
        found = effective(folder, delta_file.load(tmp_path), base)
        assert len(found) == 14
        for name, layer in tuned.layers.items():
            expected = layer.delta.effective(layer.base.weight, layer.region, layer.theta, 1.0)
            assert not torch.equal(expected, base(name))
            assert torch.equal(found[f"{name}.weight"].view(torch.int32), expected.view(torch.int32))


def test_same_run_same_bytes(folder, tmp_path):
    written = []
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        with tuned_of(folder, Sparse(), in_place=False) as tuned:
            shake(tuned)
            table = catalog.describe("delta", Sparse())
            delta_file.save(tmp_path / run, tuned, table)
        written.append((tmp_path / run / delta_file.FILE).read_bytes())
    assert written[0] == written[1]


def test_lora_artefact_is_a_peft_adapter(folder, tmp_path):
    from peft import PeftModel

    lora, ids = Lora(rank=4, alpha=6.0, rslora=True), torch.arange(20).view(2, 10)
    with tuned_of(folder, lora, in_place=False) as tuned, torch.no_grad():
        shake(tuned)
        delta_file.save(tmp_path, tuned, catalog.describe("delta", lora))
        ours = tuned.model(ids).logits
        plain = models.load(folder)(ids).logits
    assert not (tmp_path / delta_file.FILE).exists(), "one truth only"
    peft = PeftModel.from_pretrained(models.load(folder), str(tmp_path))
    torch.testing.assert_close(peft(ids).logits, ours, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, ours, atol=1e-3)
    merged = models.load(folder)
    for name, weight in effective(folder, delta_file.load(tmp_path), delta_file.base_of(folder)).items():
        merged.get_parameter(name).data.copy_(weight)
    torch.testing.assert_close(merged(ids).logits, ours, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "q_proj" in config["target_modules"]
    assert config["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
        {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": "all-linear"},
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 32, r"model\.layers\.1\.mlp\.up_proj": 1},
        },
    ],
)
def test_foreign_peft_adapter_merges_to_the_same_logits(folder, tmp_path, options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    peft = get_peft_model(models.load(folder), LoraConfig(init_lora_weights=False, **options)).eval()
    peft.save_pretrained(str(tmp_path))
    artefact = delta_file.resolve(str(tmp_path))
    assert artefact.kind == "delta"
    merged, ids = models.load(folder), torch.arange(20).view(2, 10)
    for name, weight in effective(folder, delta_file.load(artefact.path), delta_file.base_of(folder)).items():
        merged.get_parameter(name).data.copy_(weight)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, peft(ids).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(models.load(folder)(ids).logits, merged(ids).logits, atol=1e-3)


@pytest.fixture
def adapter(folder, tmp_path):
    with tuned_of(folder, Lora(rank=2), in_place=False) as tuned:
        delta_file.save(tmp_path, tuned, catalog.describe("delta", Lora()))
    return tmp_path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa"),
        ("lora_alpha", None),
        ("peft_type", "IA3"),
        ("lora_alpha", "8"),
    ],
)
def test_adapters_that_would_merge_wrongly_are_refused_by_name(adapter, key, value):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ArtifactError, match=str(value) if key == "peft_type" else key):
        delta_file.resolve(str(adapter))


def test_broken_adapters_are_refused(adapter):
    file = adapter / "adapter_model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    key = next(iter(tensors))
    for broken, message in [
        ({k: v for k, v in tensors.items() if k != key}, "half of the pair"),
        (tensors | {"base_model.model.lm_head.weight": torch.zeros(2, 2)}, "lm_head"),
    ]:
        save_file(broken, file)
        with pytest.raises(ArtifactError, match=message):
            delta_file.load(adapter)
    file.write_bytes(whole[:-3])
    with pytest.raises(ArtifactError, match="truncated"):
        delta_file.load(adapter)
    file.unlink()
    (adapter / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ArtifactError, match="pickle"):
        delta_file.resolve(str(adapter))


def test_nan_in_an_adapter_is_refused_with_its_name(folder, adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[key][3, 1] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ArtifactError, match=r"up_proj.*\[3, 1\]"):
        effective(folder, delta_file.load(adapter), delta_file.base_of(folder))


def test_a_stored_delta_that_does_not_fit_is_refused(folder, tmp_path):
    with tuned_of(folder, Sparse(), in_place=False) as tuned:
        shake(tuned)
        delta_file.save(tmp_path, tuned, catalog.describe("delta", Sparse()))
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(ArtifactError, match=r"q_proj.*\[32, 32\]"):
        delta_file.load(tmp_path).effective(name, torch.zeros(32, 16))
    file = tmp_path / delta_file.FILE
    tensors = load_file(file)
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors[f"{name}.values"] = tensors[f"{name}.values"][:-1].clone()
    save_file(tensors, file, metadata)
    with pytest.raises(ArtifactError, match="q_proj"):
        delta_file.load(tmp_path).effective(name, torch.zeros(32, 32))
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ArtifactError, match="not a delta"):
        delta_file.load(tmp_path)


def test_targets_are_short_only_where_they_say_the_same():
    linears = ["m.0.q", "m.0.k", "m.1.q", "m.1.k"]
    assert delta_file._targets(["m.0.q", "m.1.q"], linears) == ["q"]
    assert delta_file._targets(["m.0.q"], linears) == ["m.0.q"]


def test_tensor_names_of_a_backbone_alone(folder):
    weights = models.tensors(folder)
    full = "model.layers.0.mlp.up_proj.weight"
    assert delta_file.tensor_name(weights, "model.layers.0.mlp.up_proj") == full
    assert delta_file.tensor_name(weights, "layers.0.mlp.up_proj") == full
    with pytest.raises(ArtifactError, match="no layer `nonsense`"):
        delta_file.tensor_name(weights, "nonsense")


# ---------------------------------------------------------------- trajectories

LAYERS = ("model.layers.1.mlp.up_proj", "model.layers.0.self_attn.q_proj")


def held_as(weight, dtype):
    """A float32 weight as a run in `dtype` loads it."""
    if dtype.startswith("int"):
        bits, group = map(int, dtype[3:].split("-"))
        return codes.quantize(weight, bits, group)
    return weight.to({"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[dtype], copy=True)


def float_of(held):
    return held.float() if isinstance(held, torch.Tensor) else held.dequantize()


def trajectory_in(out, folder, dtype="fp32", optimizer="adam", law="rademacher", directions=2):
    """A run of six steps by `descend_`, as training takes them; its weights after each step."""
    base = delta_file.base_of(folder)
    rounding = None if dtype in ("fp32", "fp64") else 11
    settings = Settings(seed=3, optimizer=optimizer, weight_decay=0.1, rounding=rounding, dtype=dtype)
    measured = [
        Measured(
            step,
            1e-2 / (step + 3),
            tuple(Shift(derive(derive(3, "step", step), i), 1 / (i - 3.3), law) for i in range(directions)),
        )
        for step in range(6)
    ]
    held = {name: held_as(base(name), dtype) for name in LAYERS}
    masks = {LAYERS[0]: Mask(high=0.02), LAYERS[1]: Mask(keep=100, seed=5)}
    after, hashes = (
        [{n: float_of(w).clone() for n, w in held.items()}],
        [{n: digest(w) for n, w in held.items()}],
    )
    for update in Trajectory(settings=settings, layers={}, measured=measured, steps=6).updates():
        for name, w in held.items():
            perturb.descend_(
                w,
                shifts=update.shifts,
                tensor=perturb.tensor_id(f"{name}.weight"),
                mask=masks[name],
                shrink=update.shrink,
                rounding=update.rounding,
            )
        after.append({n: float_of(w).clone() for n, w in held.items()})
        hashes.append({n: digest(w) for n, w in held.items()})
    Trajectory.of(
        settings,
        measured,
        shapes={n: tuple(w.shape) for n, w in held.items()},
        masks=masks,
        base=hashes[0],
        final=hashes[-1],
        steps=6,
        best=4,
        best_digests=hashes[4],
    ).save(out)
    return after


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64", "int8-32", "int4-32"])
@pytest.mark.parametrize(("step", "done"), [("last", 6), ("best", 4), (2, 2)])
def test_a_trajectory_replays_in_the_type_of_the_run(dtype, step, done, folder, tmp_path):
    after, base = trajectory_in(tmp_path, folder, dtype), delta_file.base_of(folder)
    delta = delta_file.load(tmp_path, step=step)
    assert delta.layers == set(LAYERS)
    for name in LAYERS:
        weight = base(name)
        before = weight.clone()
        found = delta.effective(name, weight)
        assert found.dtype is torch.float32
        assert torch.equal(found.view(torch.int32), after[done][name].view(torch.int32))
        assert not torch.equal(found, after[done - 1][name])
        assert torch.equal(weight, before), "only read"
    assert delta.replay.verified
    assert delta.replay.steps == done


@pytest.mark.parametrize("optimizer", ["sgd", "sign", "adam"])
@pytest.mark.parametrize("law", ["gaussian", "rademacher"])
def test_every_optimizer_and_law_replays_bit_for_bit(optimizer, law, folder, tmp_path):
    after, base = trajectory_in(tmp_path, folder, "fp32", optimizer, law), delta_file.base_of(folder)
    found = effective(folder, delta_file.load(tmp_path), base)
    for name in LAYERS:
        assert torch.equal(found[f"{name}.weight"].view(torch.int32), after[6][name].view(torch.int32))


@pytest.mark.parametrize("dtype", ["fp32", "int8-32"])
def test_a_trajectory_on_another_base_is_refused_unless_allowed(dtype, folder, tmp_path):
    trajectory_in(tmp_path, folder, dtype)
    weight = delta_file.base_of(folder)(LAYERS[0]) * 1.5
    with pytest.raises(ArtifactError, match=r"started from: it is sha256:\w{12}, expected sha256:\w{12}$"):
        delta_file.load(tmp_path).effective(LAYERS[0], weight)
    allowed = delta_file.load(tmp_path, allow_other_base=True)
    assert not torch.equal(allowed.effective(LAYERS[0], weight), weight)
    assert not allowed.replay.verified


def test_a_broken_trajectory_is_refused_when_it_is_loaded(folder, tmp_path):
    trajectory_in(tmp_path, folder)
    with pytest.raises(UsageError, match="0 to 6"):
        delta_file.load(tmp_path, step=7)
    file = tmp_path / "trajectory.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="truncated"):
        delta_file.load(tmp_path)
