import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from edgesft.core import models
from edgesft.core.errors import ArtifactError, DeviceError, UsageError
from edgesft.core.tuning import offload
from edgesft.core.weights import Planned, Weights, dtype_name, write_file

IDS = torch.tensor([[5, 9, 2, 77, 31, 8], [200, 3, 3, 17, 90, 4]])
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def plain(tiny_model):
    return models.load(tiny_model)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


class Perturbed(nn.Module):
    """A layer whose k groups of rows see W + scale z for k scales, with its base not called but read."""

    def __init__(self, base: nn.Linear, seed: int) -> None:
        super().__init__()
        self.base, self.seed, self.scales = base, seed, (0.0,)

    def z(self) -> torch.Tensor:
        shape = self.base.out_features, self.base.in_features
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, z = self.base.weight, self.z()
        parts = x.chunk(len(self.scales))
        return torch.cat(
            [
                functional.linear(part, weight + scale * z, self.base.bias)
                for part, scale in zip(parts, self.scales, strict=True)
            ]
        )


class Trial:
    """Zeroth-order steps on all linear layers, in memory or offloaded."""

    def __init__(self, model: nn.Module, held: offload.Offload | None) -> None:
        self.model, self.held, self.layers = model, held, {}
        for i, (name, base) in enumerate(models.linears(model).items()):
            self.layers[name] = layer = Perturbed(base, i)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
            if held:
                held.attach(name, layer)

    def losses(self, scales: tuple[float, ...]) -> list[float]:
        for layer in self.layers.values():
            layer.scales = scales
        with torch.no_grad():
            found = self.model(IDS.repeat(len(scales), 1)).logits.chunk(len(scales))
        return [float(part.logsumexp(-1).mean()) for part in found]

    def step(self) -> float:
        plus, minus = self.losses((1e-2, -1e-2))
        for name, layer in self.layers.items():
            if self.held:
                with self.held.weight(name) as weight:
                    weight.add_(layer.z(), alpha=minus - plus)
            else:
                layer.base.weight.data.add_(layer.z(), alpha=minus - plus)
        return plus - minus


@pytest.mark.parametrize("memory", [None, 200_000])
def test_three_steps_offloaded_are_those_in_memory_bit_for_bit(tiny_model, tmp_path, memory):
    inside = Trial(models.load(tiny_model), None)
    with offload.load(tiny_model, tmp_path, memory_bytes=memory) as held:
        outside = Trial(held.model, held)
        assert 0 < len(held.on_disk) <= len(held.layers)
        assert (len(held.on_disk) == len(held.layers)) is (memory is None)
        for _ in range(3):
            g = inside.step()
            assert g != 0
            assert outside.step() == g
        for name, layer in inside.layers.items():
            with held.weight(name) as weight:
                assert torch.equal(weight, layer.base.weight), name
        assert not torch.equal(inside.layers[FIRST].base.weight, Weights(tiny_model)[f"{FIRST}.weight"])


def test_a_stacked_forward_reads_each_layer_once_and_two_forwards_twice(tiny_model, tmp_path):
    with offload.load(tiny_model, tmp_path) as held:
        trial = Trial(held.model, held)
        together = trial.losses((1e-2, -1e-2))
        assert held.reads == dict.fromkeys(held.layers, 1)
        held.reads.clear()
        apart = [trial.losses((scale,))[0] for scale in (1e-2, -1e-2)]
        assert held.reads == dict.fromkeys(held.layers, 2)
        assert together == pytest.approx(apart, rel=1e-6)
        held.reads.clear()
        trial.step()
        assert held.reads == held.writes == dict.fromkeys(held.layers, 1)


def test_no_more_than_allowed_is_in_memory_at_any_time(tiny_model, tmp_path, plain):
    total = sum(p.nbytes for p in plain.parameters())
    allowed = total // 2
    with offload.load(tiny_model, tmp_path, memory_bytes=allowed) as held:
        seen = []

        def look(*_: object) -> None:
            seen.append(sum(p.nbytes for p in held.model.parameters() if p.device.type != "meta"))

        for name in held.on_disk:  # as accelerate calls it, with the layer loaded
            layer = held.layers[name]
            layer._old_forward = lambda x, f=layer._old_forward: (look(), f(x))[1]
        assert torch.equal(logits(held.model), logits(plain))
        facts = held.facts()
        assert len(seen) == len(held.on_disk)
        assert facts["memory_bytes"] < max(seen) <= allowed
        assert facts["memory_bytes"] + facts["disk_bytes"] == total
        assert facts["memory_bytes"] + facts["largest_bytes"] <= allowed
        assert facts["layers_in_memory"] > 0
        assert facts["layers_on_disk"] + facts["layers_in_memory"] == len(held.layers)
        names = list(held.layers)
        assert list(held.on_disk) == names[facts["layers_in_memory"] :]  # the first blocks stay


def test_a_model_that_fits_stays_in_memory(tiny_model, tmp_path, plain):
    with offload.load(tiny_model, tmp_path, memory_bytes=1 << 30) as held:
        assert not held.on_disk
        assert torch.equal(logits(held.model), logits(plain))
        with held.weight(FIRST) as weight:
            weight.zero_()
        assert not torch.equal(logits(held.model), logits(plain))


def test_a_forward_cannot_change_the_file_and_weight_does(tiny_model, tmp_path, plain):
    with offload.load(tiny_model, tmp_path) as held:
        layer = held.layers[FIRST]
        forward = layer._old_forward
        layer._old_forward = lambda x: (layer.weight.data.mul_(2), forward(x))[1]
        assert not torch.equal(logits(held.model), logits(plain))
        layer._old_forward = forward
        assert torch.equal(logits(held.model), logits(plain))
        with held.weight(FIRST) as weight:
            assert weight.data_ptr() == layer.weight.data_ptr()  # who holds the layer sees the same
            weight.mul_(2)
        assert layer.weight.device.type == "meta"
        assert not torch.equal(logits(held.model), logits(plain))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_folder_is_one_of_accelerate(tiny_model, tmp_path, dtype):
    from accelerate.utils import OffloadedWeightsLoader

    base = Weights(tiny_model)
    with offload.load(tiny_model, tmp_path, dtype=dtype) as held:
        stored = OffloadedWeightsLoader(save_folder=tmp_path / offload.SCRATCH)
        assert set(stored) == {f"{name}.weight" for name in held.layers}
        for name in stored:
            assert torch.equal(stored[name], base[name].to(getattr(torch, dtype)))
        expected = logits(models.load(tiny_model, dtype=dtype))
        assert torch.equal(logits(held.model), expected)


def test_detached_modules_leave_the_layers_as_they_were(tiny_model, tmp_path, plain):
    with offload.load(tiny_model, tmp_path) as held:
        trial = Trial(held.model, held)
        for name, layer in trial.layers.items():
            held.detach(layer)
            parent, _, leaf = name.rpartition(".")
            setattr(held.model.get_submodule(parent), leaf, layer.base)
        assert torch.equal(logits(held.model), logits(plain))


# ---------------------------------------------------------------- refusals


def test_the_scratch_goes_and_nothing_else_does(tiny_model, tmp_path):
    other = tmp_path / "precious.dat"
    other.write_text("mine")
    with offload.load(tiny_model, tmp_path):
        assert (tmp_path / offload.SCRATCH / "index.json").is_file()
        with pytest.raises(UsageError, match="in use by another run"):
            offload.load(tiny_model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.dat"]
    with offload.load(tiny_model, tmp_path):  # free again
        pass


def test_what_a_killed_run_left_is_made_anew(tiny_model, tmp_path, plain):
    left = tmp_path / offload.SCRATCH
    left.mkdir()
    (left / f"{FIRST}.weight.dat").write_bytes(b"half")
    (left / "index.json").write_text("{")
    with offload.load(tiny_model, tmp_path) as held:
        assert torch.equal(logits(held.model), logits(plain))


def test_too_little_memory_or_disk_is_refused_with_the_number(tiny_model, tmp_path, monkeypatch):
    with pytest.raises(DeviceError, match=r"needs 99584 bytes of memory .* 1000 are allowed"):
        offload.load(tiny_model, tmp_path, memory_bytes=1000)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DeviceError, match="has 1000 bytes free, the layers to offload need 294912"):
        offload.load(tiny_model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_is_refused(tiny_model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DeviceError, match="cannot be written"):
        offload.load(tiny_model, tmp_path / "file")


@pytest.mark.parametrize("fault", ["nan", "missing", "shape", "untied"])
def test_bad_weights_are_refused_and_leave_nothing(tiny_model, tmp_path, fault):
    model, name = tmp_path / "model", "model.layers.1.mlp.up_proj.weight"
    shutil.copytree(tiny_model, model)
    tensors = {key: tensor.clone() for key, tensor in Weights(tiny_model).items()}
    if fault == "nan":
        tensors[name][3, 4] = float("nan")
    elif fault == "missing":
        del tensors[name]
    elif fault == "shape":
        tensors[name] = tensors[name][1:]
    else:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    plan = [Planned(key, dtype_name(t.dtype), tuple(t.shape)) for key, t in tensors.items()]
    write_file(model / "model.safetensors", plan, tensors.__getitem__)
    scratch: Path = tmp_path / "scratch"
    with pytest.raises(ArtifactError, match=r"lm_head\.weight" if fault == "untied" else "up_proj"):
        offload.load(model, scratch)
    assert list(scratch.iterdir()) == []
