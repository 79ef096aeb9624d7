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
