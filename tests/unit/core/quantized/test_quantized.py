import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from edgesft.core import models, quantized
from edgesft.core.data.batches import Batch
from edgesft.core.errors import ArtifactError, UsageError
from edgesft.core.quantized.codes import Quantized, quantize
from edgesft.methods.objective.task import Task

torch.set_num_threads(1)
BITS = [8, 4]


def weights(out, width, seed=0):
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * 0.05


def plain(q: Quantized):
    """code * scale, entry by entry."""
    out, width = q.shape
    found = torch.zeros(out, width)
    for r in range(out):
        for c in range(width):
            byte = int(q.codes[r, c // 2 if q.bits == 4 else c])
            code = byte if q.bits == 8 else ((byte >> 4 if c % 2 else byte & 15) - 8)
            found[r, c] = code * q.scales[r, c // q.group].float()
    return found


# ---------------------------------------------------------------- codes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [32, 48, 5, 33])
def test_layout_is_as_documented(bits, width):
    q = quantize(weights(6, width), bits, 16)
    assert q.codes.shape == (6, width if bits == 8 else -(-width // 2))
    assert q.scales.shape == (6, -(-width // 16))
    assert q.scales.dtype is torch.float16
    torch.testing.assert_close(q.dequantize(), plain(q), rtol=0, atol=0)
    torch.testing.assert_close(q.dequantize(slice(2, 5)), plain(q)[2:5], rtol=0, atol=0)
    torch.testing.assert_close(q[torch.tensor([4, 0, 4])], plain(q)[[4, 0, 4]], rtol=0, atol=0)
    assert q.numel() == 6 * width
    assert q.nbytes == q.codes.nbytes + q.scales.nbytes


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.006), (4, 0.096)])
def test_error_is_that_of_the_bits(bits, limit):
    w = weights(64, 256)
    error = (quantize(w, bits, 32).dequantize() - w).norm() / w.norm()
    assert limit / 3 < error < limit


def test_search_beats_the_scale_of_the_largest_entry():
    w = weights(64, 256)
    cut = w.view(64, 8, 32)
    scale = (cut.abs().amax(2, keepdim=True) / 7).half().float()
    simple = ((cut / scale).round().clamp(-8, 7) * scale).view_as(w)
    assert (quantize(w, 4, 32).dequantize() - w).norm() < 0.9 * (simple - w).norm()


@pytest.mark.parametrize("bits", BITS)
def test_exact_zeros_stay(bits):
    w = weights(8, 64)
    w[:, ::2], w[3] = 0, 0
    assert bool((quantize(w, bits, 16).dequantize()[w == 0] == 0).all())


@pytest.mark.parametrize("bits", BITS)
def test_strips_do_not_change_codes(bits):
    """A matrix of several strips of rows has the codes of its rows alone."""
    w = weights(300, 1024)
    whole, row = quantize(w, bits, 32), quantize(w[299:], bits, 32)
    assert torch.equal(whole.codes[299:], row.codes)
    assert torch.equal(whole.scales[299:], row.scales)


@pytest.mark.parametrize("value", [1e-9, 3e-7, 1e-3, 6e4])
@pytest.mark.parametrize("bits", BITS)
def test_extreme_scales(bits, value):
    w = weights(4, 32) / 0.05 / 4 * value
    found = quantize(w, bits, 32).dequantize()
    assert bool(found.isfinite().all())
    step = value / (127 if bits == 8 else 8)
    assert float((found - w).abs().max()) <= step + 6e-8 * (128 if bits == 8 else 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("bits", BITS)
def test_weights_without_a_code_are_refused(bits, value):
    w = weights(4, 32)
    w[2, 3] = value
    with pytest.raises(ArtifactError, match="finite"):
        quantize(w, bits, 32)


@pytest.mark.parametrize(("bits", "group", "shape"), [(3, 32, (2, 4)), (4, 7, (2, 4)), (4, 0, (2, 4))])
def test_settings_out_of_range(bits, group, shape):
    with pytest.raises(UsageError, match="expected"):
        quantize(torch.zeros(shape), bits, group)
    with pytest.raises(UsageError, match="expected a matrix"):
        quantize(torch.zeros(3), 4, 32)


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_that_of_the_dequantised_weight(bits, bias):
    q, b = quantize(weights(96, 80), bits, 32), torch.randn(96) if bias else None
    layer, x = quantized.QuantizedLinear(q, b), torch.randn(3, 5, 80)
    torch.testing.assert_close(layer(x), functional.linear(x, q.dequantize(), b), rtol=1e-5, atol=1e-5)
    low = layer.to(torch.bfloat16)(x.bfloat16())
    assert low.dtype is torch.bfloat16
    torch.testing.assert_close(low.float(), layer.float()(x), rtol=3e-2, atol=3e-2)
    assert q.scales.dtype is torch.float16  # types of modules leave codes alone


def test_gradient_reaches_the_input_over_many_strips():
    q = quantize(weights(700, 1024), 4, 32)
    x = torch.randn(2, 3, 1024, requires_grad=True)
    y = quantized.QuantizedLinear(q)(x)
    pull = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, pull)
    torch.testing.assert_close(found, pull @ q.dequantize(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_embedding_gives_rows(bits):
    q = quantize(weights(50, 24), bits, 16)
    ids = torch.tensor([[3, 3, 49], [0, 1, 2]])
    table = quantized.QuantizedEmbedding(q, torch.float32)
    torch.testing.assert_close(table(ids), q.dequantize()[ids], rtol=0, atol=0)
    scaled = quantized.QuantizedEmbedding(q, torch.bfloat16, 3.0)(ids)
    assert scaled.dtype is torch.bfloat16
    torch.testing.assert_close(scaled.float(), 3 * q.dequantize()[ids], rtol=1e-2, atol=1e-3)


# ---------------------------------------------------------------- models


def floated(path, bits, group=32):
    """The float model with every weight replaced by what its codes say."""
    model = models.load(path)
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    done = set()
    for module in [*models.linears(model).values(), *ends]:
        if id(module.weight) not in done:
            module.weight.data = quantize(module.weight, bits, group).dequantize()
            done.add(id(module.weight))
    return model


def fields(ids, kind):
    positions = torch.arange(ids.numel()) if kind == "lm" else torch.arange(len(ids)) * ids.shape[1] + 5
    n = len(positions)
    extra = (
        {}
        if kind == "lm"
        else {"choices": torch.tensor([7, 9]), "gold": torch.arange(n, dtype=torch.int64) % 2}
    )
    return Batch(
        kind=kind,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        positions=positions,
        targets=ids.flatten()[positions],
        weights=torch.full((n,), 1 / n),
        rows=positions // ids.shape[1],
        **extra,
    )


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A model with biases, a head of its own, and widths that are no multiple of a group."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("untied")
    config = Qwen2Config(
        vocab_size=101,
        hidden_size=40,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.1)
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("which", ["tiny_model", "untied"])
def test_loaded_model_is_the_quantised_float_model(which, bits, request):
    path = request.getfixturevalue(which)
    model, expected = quantized.load(path, bits=bits), floated(path, bits)
    assert not model.training
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    found, linears = quantized.layers(model), models.linears(expected)
    assert list(found) == list(linears)
    for name, layer in found.items():
        torch.testing.assert_close(layer.quantized.dequantize(), linears[name].weight.data, rtol=0, atol=0)
    ids = torch.randint(0, 100, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)
        for kind in ("lm", "labels"):
            a, b = (float(Task().loss(m, fields(ids, kind))) for m in (model, expected))
            assert a == pytest.approx(b, rel=1e-5)


def test_tied_head_shares_the_codes(tiny_model, untied):
    model = quantized.load(tiny_model, bits=4, embedding_bits=8)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert table.quantized is head.quantized
    assert head.weight.shape == (256, 64)
    assert head.quantized.bits == 8
    assert {layer.quantized.bits for layer in quantized.layers(model).values()} == {4}
    other = quantized.load(untied, bits=4)
    assert other.get_input_embeddings().quantized is not other.get_output_embeddings().quantized
    assert len(quantized.matrices(other)) == len(quantized.matrices(model)) + 1


@pytest.mark.parametrize("bits", BITS)
def test_memory_is_that_of_the_codes(tiny_model, bits):
    model, plain_model = quantized.load(tiny_model, bits=bits), models.load(tiny_model)
    count = sum(p.numel() for p in plain_model.parameters())
    assert quantized.numel(model) == count
    norms = sum(p.numel() for n, p in plain_model.named_parameters() if "norm" in n)
    buffers = sum(b.nbytes for b in plain_model.buffers())
    expected = (count - norms) * (bits / 8 + 2 / 32) + 4 * norms + buffers
    assert quantized.nbytes(model) == expected
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model)}
    assert sum(held.values()) <= expected


def _tensors(model):
    for module in model.modules():
        for value in [*vars(module).values(), *module._parameters.values(), *module._buffers.values()]:
            if isinstance(value, Quantized):
                yield from (value.codes, value.scales)
            elif isinstance(value, torch.Tensor):
                yield value


def test_bfloat16_norms_and_activations(tiny_model):
    model = quantized.load(tiny_model, bits=8, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    inverse = next(b for n, b in model.named_buffers() if n.endswith("inv_freq"))
    assert inverse.dtype is torch.float32
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        got, expected = model(ids).logits, quantized.load(tiny_model, bits=8)(ids).logits
    assert got.dtype is torch.bfloat16
    assert float((got.float() - expected).norm() / expected.norm()) < 0.03


def test_broken_folders_are_refused(tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny_model / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    bad = tensors[name].clone()
    bad[5, 6] = float("nan")
    cases = {
        "nan": (tensors | {name: bad}, rf"{name}.*nan.*\[5, 6\]"),
        "lacks": ({k: v for k, v in tensors.items() if k != name}, f"lacks.*{name}"),
        "shape": (tensors | {name: bad[:5].clone()}, r"\[5, 64\], expected \[128, 64\]"),
        "norm": (tensors | {"model.norm.weight": torch.full((64,), torch.inf)}, "model.norm.weight.*inf"),
    }
    for case, (kept, message) in cases.items():
        folder = tmp_path / case
        folder.mkdir()
        (folder / "config.json").write_text((tiny_model / "config.json").read_text())
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ArtifactError, match=message):
            quantized.load(folder, bits=4)


PEAK = """
import gc, json, pathlib, sys
import torch
from edgesft.core import models, quantized
from edgesft.kernels import perturb
torch.set_num_threads(1)
def peak():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
path, tiny = map(pathlib.Path, sys.argv[1:])
quantized.load(tiny, bits=4)(torch.zeros(1, 4, dtype=torch.int64))  # libraries
gc.collect()
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = peak()
model = quantized.load(path, bits=4)
rise, held = peak() - before, quantized.nbytes(model)
print(json.dumps({"rise": rise, "held": held, "weights": quantized.numel(model)}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_never_holds_the_float_model(tiny_model, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    command = [sys.executable, "-c", PEAK, str(tmp_path), str(tiny_model)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["weights"] * 4 > 36e6
    assert found["held"] < 0.15 * found["weights"] * 4
    # the codes, and the temporaries of one strip of rows; the embedding alone is 17 MB in float
    assert found["rise"] < found["held"] + 8e6
