import dataclasses

import numpy as np
import pytest
import torch

from edgesft.kernels.nm_matmul import layout, library, reference, torch_op
from edgesft.kernels.nm_matmul.layout import NotPacked

from .packs import KINDS, matrix


def layer(value="int4", sparse=True, rows=96, columns=100, bias=True, level=4):
    rng = np.random.default_rng(0)
    packed = matrix(rng, rows, columns, value, sparse, 32 if value in layout.OFFSETS else 0)
    given = torch.from_numpy(rng.standard_normal(rows).astype(np.float32)) if bias else None
    return torch_op.PackedLinear(packed, given, level), packed, given


@pytest.mark.parametrize(("value", "sparse"), KINDS)
@pytest.mark.parametrize("shape", [(100,), (3, 100), (2, 20, 100)])
def test_a_layer_is_its_reference(value, sparse, shape):
    made, packed, bias = layer(value, sparse)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    got = made(x)
    assert got.shape == (*shape[:-1], 96)
    expected = reference.linear(packed, x.reshape(-1, 100).numpy(), bias=bias.numpy())
    assert np.abs(got.reshape(-1, 96).numpy() - expected).max() <= 2e-6 * np.abs(expected).max()


def test_without_the_library_the_numbers_are_the_same(monkeypatch):
    made, _, _ = layer()
    x = torch.randn(4, 100)
    native = made(x)
    library._load.cache_clear()
    monkeypatch.setenv("EDGESFT_NATIVE", "0")
    assert torch.allclose(made(x), native, rtol=1e-5, atol=1e-5)


def test_half_precision_in_is_half_precision_out():
    made, _, _ = layer()
    x = torch.randn(2, 100).bfloat16()
    assert made(x).dtype == torch.bfloat16
    assert torch.equal(made(x), made(x.float()).bfloat16())


def test_the_operation_keeps_torch_s_rules():
    made, _, _ = layer()
    said = (96, 100, "2:4", "int4", 32, 0.5, 4)
    sample = (torch.randn(3, 100), made.stream, made.scales, made.bias, *said)
    torch.library.opcheck(torch_op.packed_linear, sample)


def test_it_compiles_and_exports():
    made, _, _ = layer()
    model = torch.nn.Sequential(made, torch.nn.ReLU())
    x = torch.randn(3, 100)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
    program = torch.export.export(model, (x,))
    assert any("packed_linear" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize(("value", "sparse"), KINDS)
@pytest.mark.parametrize("native", [True, False])
def test_gradients_go_through_to_x_and_the_bias(value, sparse, native, monkeypatch):
    if not native:
        library._load.cache_clear()
        monkeypatch.setenv("EDGESFT_NATIVE", "0")
    made, packed, bias = layer(value, sparse, level=0)
    made.bias.requires_grad_(True)
    x = torch.randn(2, 5, 100, requires_grad=True)
    weight = torch.from_numpy(layout.dense(packed))
    y = made(x)
    outer = torch.randn_like(y)
    y.backward(outer)
    assert torch.allclose(x.grad, outer @ weight, rtol=1e-4, atol=1e-4)
    assert torch.allclose(made.bias.grad, outer.sum((0, 1)), rtol=1e-5, atol=1e-5)
    assert torch.allclose(y, torch.nn.functional.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_gradients_are_right_under_compile_and_in_half_precision():
    made, _, _ = layer(level=0)
    x = torch.randn(3, 100, requires_grad=True)
    made(x).square().sum().backward()
    expected, x.grad = x.grad, None
    torch.compile(made, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    assert torch.allclose(x.grad, expected)
    half = x.detach().bfloat16().requires_grad_(True)
    y = made(half)
    y.square().sum().backward()
    assert y.dtype is half.grad.dtype is torch.bfloat16
    assert torch.allclose(half.grad.float(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


def test_the_operations_keep_torch_s_rules_with_gradients():
    made, _, _ = layer(level=0)
    said = ("2:4", "int4", 32, 0.5)
    x = torch.randn(3, 100, requires_grad=True)
    bias = made.bias.detach().requires_grad_(True)
    sample = (x, made.stream, made.scales, bias, 96, 100, *said, 0)
    torch.library.opcheck(torch_op.packed_linear, sample)
    torch.library.opcheck(
        torch_op.packed_linear_gradient, (torch.randn(3, 96), made.stream, made.scales, 96, 100, *said)
    )


def test_a_layer_lies_on_the_memory_that_it_is_given():
    _, packed, _ = layer()
    made = torch_op.PackedLinear(packed)
    assert made.stream.data_ptr() == packed.stream.ctypes.data
    assert made.scales.data_ptr() == packed.scales.ctypes.data
    fixed = packed.stream.copy()
    fixed.flags.writeable = False
    assert torch_op.PackedLinear(dataclasses.replace(packed, stream=fixed)).stream.data_ptr() != (
        fixed.ctypes.data
    )


def test_a_conversion_leaves_codes_and_scales_alone():
    made, _, _ = layer()
    x = torch.randn(2, 100)
    before = made(x)
    made.to(torch.bfloat16).float()
    assert made.scales.dtype == torch.float16
    assert torch.allclose(made(x), before, atol=0.05)
    assert made.half().weight.dtype == made.bias.dtype == torch.float16
    assert tuple(made.weight.shape) == (96, 100)
    assert made.weight.numel() == 9600


def test_two_layers_at_one_address_one_after_the_other():
    """Memory that was freed is given out again: the second layer must not meet the first one's weights."""
    x, before = torch.randn(1, 100), len(torch_op._made)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        packed = matrix(rng, 32, 100, "int4", True, 32)
        made = torch_op.PackedLinear(packed)
        expected = reference.linear(packed, x.numpy())
        assert np.abs(made(x).numpy() - expected).max() <= 2e-6 * np.abs(expected).max()
        del made
    assert len(torch_op._made) == before


def test_what_cannot_be_is_refused():
    made, packed, _ = layer()
    with pytest.raises(NotPacked, match="a stream of"):
        torch_op.PackedLinear(dataclasses.replace(packed, stream=packed.stream[:-1]))
    with pytest.raises((RuntimeError, ValueError)):
        made(torch.randn(2, 99))
