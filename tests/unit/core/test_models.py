"""Models: refused when unsafe or broken, loaded and saved so that nothing but transformers is needed."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from edgesft.core import models
from edgesft.core.artifact import Request, create
from edgesft.core.errors import ArtifactError, UsageError

torch.set_num_threads(1)


def config(**more: object) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": True,
            **more,
        }
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config()).save_pretrained(out)
    return out


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def edit(folder: Path, **values: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_resolve_gives_the_same_digest_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    first = models.resolve(str(folder))
    second = models.resolve(str(shutil.copytree(folder, tmp_path / "copy")))
    assert first.kind == "model"
    assert first.digest == second.digest


def test_load_is_what_transformers_loads(folder: Path, offline: None) -> None:
    ours, theirs = models.load(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(12)[None]
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    assert not ours.training
    assert not any(p.requires_grad for p in ours.parameters())


def test_parts_have_their_names(folder: Path) -> None:
    model = models.load(folder)
    found = models.linears(model)
    assert len(found) == 14
    assert next(iter(found)) == "model.layers.0.self_attn.q_proj"
    assert not any("lm_head" in name for name in found)
    assert (
        dict(model.named_modules())["model.layers.1.mlp.down_proj"] is found["model.layers.1.mlp.down_proj"]
    )
    assert [name for name, _ in models.blocks(model)] == ["model.layers.0", "model.layers.1"]
    ids = torch.arange(6)[None]
    hidden = models.backbone(model)(input_ids=ids).last_hidden_state
    assert torch.equal(models.head(model)(hidden), model(input_ids=ids).logits)


def test_the_head_keeps_the_scaling_of_its_architecture() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    model = Gemma2ForCausalLM(
        Gemma2Config(
            **sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.05
        )
    ).eval()
    ids = torch.arange(6)[None]
    hidden = models.backbone(model)(input_ids=ids).last_hidden_state
    assert torch.allclose(models.head(model)(hidden), model(input_ids=ids).logits, atol=1e-6)
    assert not torch.allclose(model.lm_head(hidden), model(input_ids=ids).logits, atol=1e-3)


def test_conv1d_is_refused_by_name() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32))
    with pytest.raises(ArtifactError, match="Conv1D"):
        models.linears(model)


@pytest.mark.parametrize("given", ["module", "tensors"])
def test_save_writes_a_folder_that_transformers_loads(folder: Path, tmp_path: Path, given: str) -> None:
    model = models.load(folder)
    name = "model.layers.0.mlp.up_proj"
    with torch.no_grad():
        models.linears(model)[name].weight.mul_(0.5)
    out = tmp_path / "out"
    out.mkdir()
    changed = {f"{name}.weight": models.linears(model)[name].weight}
    models.save(model if given == "module" else changed, folder, out)
    again, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for (n, p), (_, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(p, q), n
    assert "lm_head.weight" not in models.tensors(out)
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()


def test_save_keeps_or_widens_the_type(tmp_path: Path) -> None:
    source, half, full = tmp_path / "s", tmp_path / "h", tmp_path / "f"
    LlamaForCausalLM(config(tie_word_embeddings=False)).to(torch.bfloat16).save_pretrained(source)
    half.mkdir()
    full.mkdir()
    model = models.load(source)
    models.save(model, source, half)
    models.save(model, source, full, dtype="float32")
    assert {models.tensors(half).dtype(n) for n in models.tensors(half)} == {"bfloat16"}
    assert {models.tensors(full).dtype(n) for n in models.tensors(full)} == {"float32"}
    assert AutoModelForCausalLM.from_pretrained(full).dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(half).dtype == torch.bfloat16
    assert "lm_head.weight" in models.tensors(half)


def test_only_known_files_go_along(folder: Path, tmp_path: Path) -> None:
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / "tokenizer.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    models.save({}, folder, out)
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {p.name for p in out.iterdir()} == expected


def test_nan_weights_are_refused_on_load_and_on_save(folder: Path, tmp_path: Path) -> None:
    model = models.load(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    bad = models.tensors(folder).get(name).clone()
    bad[3, 5] = float("nan")
    with pytest.raises(ArtifactError, match=rf"`{name}`.*\[3, 5\]"):
        models.save({name: bad}, folder, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    with torch.no_grad():
        dict(model.named_parameters())[name].copy_(bad)
    model.save_pretrained(folder)
    with pytest.raises(ArtifactError, match=r"\[3, 5\]"):
        models.load(folder)
    with pytest.raises(ArtifactError, match=r"\[3, 5\]"):
        models.check_weights(folder)


def test_remote_code_is_neither_imported_nor_fetched(folder: Path, tmp_path: Path, offline: None) -> None:
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    edit(
        folder,
        auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        _attn_implementation_internal="org/kernel",
        attn_implementation="org/kernel",
        _name_or_path="org/else",
        trust_remote_code=True,
        use_kernels=True,
    )
    models.resolve(str(folder))
    model = models.load(folder)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config._attn_implementation == "sdpa"
    assert not canary.exists()
    out = tmp_path / "out"
    out.mkdir()
    models.save({}, folder, out)
    assert "auto_map" not in json.loads((out / "config.json").read_text())


def test_an_unknown_architecture_is_refused(folder: Path, offline: None) -> None:
    edit(folder, model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    with pytest.raises(ArtifactError, match="evil"):
        models.load(folder)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_pickle_is_refused_and_not_read(folder: Path, tmp_path: Path, name: str) -> None:
    import pickle

    canary = tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    for ref in (folder, folder / name):
        with pytest.raises(ArtifactError, match="pickle") as caught:
            models.resolve(str(ref))
        assert caught.value.hint is not None
    assert not canary.exists()


def test_wrong_kinds_and_missing_things(folder: Path, tmp_path: Path, offline: None) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        models.resolve(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        models.resolve(str(tmp_path / "empty"))
    with pytest.raises(ArtifactError, match="folder that holds it"):
        models.resolve(str(folder / "model.safetensors"))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="kind `delta`"):
        models.resolve(str(folder))
    delta = tmp_path / "delta"
    with create(delta, Request("delta", "tune", {}, {})) as (work, _):
        (work.path / "delta.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="kind `delta`"):
        models.resolve(str(delta))
    with pytest.raises(UsageError, match="smollm3"):
        models.resolve("demo:smollm3")


def test_a_missing_local_folder_asks_no_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match="does not exist"):
        models.resolve("out/merged")
    assert models.looks_like_hub_id("org/name@main")
    assert not models.looks_like_hub_id("../name")
    assert not models.looks_like_hub_id("/org/name")


def test_a_hub_id_without_network_is_an_artifact_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def fail(*args: object, **kwargs: object) -> None:
        assert kwargs["allow_patterns"]
        assert not any("bin" in str(p) or "py" in str(p) for p in kwargs["allow_patterns"])  # type: ignore[attr-defined]
        raise ConnectionError("no route to the hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ArtifactError, match="no route"):
        models.resolve("org/name")


def test_lacking_and_misshapen_tensors_are_refused(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if "layers.1.mlp.up" not in k}, file)
    with pytest.raises(ArtifactError, match=r"layers\.1\.mlp\.up"):
        models.load(folder)
    save_file(state | {"model.norm.weight": torch.ones(7)}, file)
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        models.load(folder)


def test_quantised_and_broken_configs_are_refused(folder: Path) -> None:
    edit(folder, quantization_config={"quant_method": "awq"})
    with pytest.raises(ArtifactError, match="awq"):
        models.resolve(str(folder))
    (folder / "config.json").write_text("{broken")
    with pytest.raises(ArtifactError, match=r"config\.json"):
        models.resolve(str(folder))


def test_encoders_load_without_a_head(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path)
    assert models.kind(tmp_path) == "encoder"
    model = models.load(tmp_path)
    assert len(models.linears(model)) == 12
    with pytest.raises(ArtifactError, match="head"):
        models.head(model)


def test_a_gguf_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESFT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "x.gguf"
    file.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="not a GGUF"):
        models.resolve(str(file))
    file.write_bytes(b"GGUF" + b"\xff" * 64)
    with pytest.raises(ArtifactError, match=r"x\.gguf"):
        models.resolve(str(file))
    assert not [p for p in (tmp_path / "cache" / "models").iterdir() if not p.name.startswith(".")]
