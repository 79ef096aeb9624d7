"""2:4 checkpoints of compressed-tensors: a vector by hand, and everything that may be wrong with one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgesft.core import compressed, stored
from edgesft.core.errors import ArtifactError
from edgesft.core.weights import Planned, Weights, dtype_name, write_file

# rows of 12 columns; the last group of row 1 keeps a weight and a zero
DENSE = torch.tensor(
    [
        [1.0, 0, 2, 0, 0, 3, 0, 4, 5, 6, 0, 0],
        [0, 0, -1, -2, 7, 0, 0, 8, 0, 9, 0, 0],
    ]
)
PARTS = {
    "l.compressed": torch.tensor([[1.0, 2, 3, 4, 5, 6], [-1, -2, 7, 8, 0, 9]]),
    "l.bitmask": torch.tensor([[0b10100101, 0b0011], [0b10011100, 0b0011]], dtype=torch.uint8),
    "l.shape": torch.tensor([[2], [12]]),
}
SPARSITY = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": ["Linear"]}
CONFIG = {"quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": SPARSITY}}


def file(path: Path, tensors: dict[str, Tensor]) -> Weights:
    plan = [Planned(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()]
    write_file(path / "model.safetensors", plan, tensors.__getitem__)
    return Weights(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_vector_by_hand(tmp_path: Path, dtype: torch.dtype) -> None:
    parts = {**PARTS, "l.compressed": PARTS["l.compressed"].to(dtype)}
    found = compressed.Compressed(file(tmp_path, parts))
    assert list(found) == ["l.weight"]
    assert found.shape("l.weight") == (2, 12)
    assert torch.equal(found["l.weight"], DENSE.to(dtype))
    for part in compressed.PARTS:
        made = compressed.compress(DENSE.to(dtype), part)
        assert made.dtype == parts["l" + part].dtype
        assert torch.equal(made, parts["l" + part]), part
    plan = {p.name: p for p in compressed.planned("l.weight", dtype_name(dtype), (2, 12))}
    assert {n: (p.dtype, p.shape) for n, p in plan.items()} == {
        n: (dtype_name(t.dtype), tuple(t.shape)) for n, t in parts.items()
    }


def test_a_negative_zero_never_takes_the_place_of_a_weight() -> None:
    weight = torch.tensor([[-0.0, -0.0, 1.0, 2.0], [0.0, -0.0, 0.0, 3.0]])
    assert compressed.compress(weight, ".compressed").tolist() == [[1.0, 2.0], [-0.0, 3.0]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"l.shape": None}, r"lacks `l\.shape`"),
        ({"l.bitmask": None}, r"lacks `l\.bitmask`"),
        ({"l.weight": torch.zeros(2, 12)}, "compressed and plain"),
        ({"l.shape": torch.tensor([[2], [10]])}, "6\\] weights are kept of a matrix 2 x 10"),
        ({"l.shape": torch.tensor([[3], [12]])}, "are kept of a matrix 3 x 12"),
        ({"l.shape": torch.tensor([[2], [-12]])}, "expected two positive numbers"),
        ({"l.shape": torch.tensor([2, 12, 1])}, "expected two positive numbers"),
        ({"l.shape": torch.tensor([[2.0], [12.0]])}, "expected two positive numbers"),
        ({"l.bitmask": torch.zeros(2, 3, dtype=torch.uint8)}, "its mask is U8"),
        ({"l.bitmask": torch.zeros(2, 2, dtype=torch.int8)}, "its mask is I8"),
        ({"l.compressed": torch.zeros(2, 6, dtype=torch.float8_e4m3fn)}, "are F8_E4M3, expected one of F16"),
    ],
)
def test_parts_that_do_not_go_together(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    parts = {name: tensor for name, tensor in (PARTS | change).items() if tensor is not None}
    weights = file(tmp_path, parts)
    with pytest.raises(ArtifactError, match=words):
        compressed.Compressed(weights)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([[0xA5, 0x03], [0x97, 0x03]], "1 groups of four do not keep two weights, .* row 1, columns 0 to 3"),
        ([[0xA5, 0x13], [0x9C, 0x03]], "bits beyond the last column"),
    ],
)
def test_a_mask_that_is_not_two_of_four(tmp_path: Path, mask: list[list[int]], words: str) -> None:
    weights = file(tmp_path, PARTS | {"l.bitmask": torch.tensor(mask, dtype=torch.uint8)})
    found = compressed.Compressed(weights)
    with pytest.raises(ArtifactError, match=words):
        found["l.weight"]


@pytest.mark.parametrize(
    ("config", "form"),
    [
        ({}, "dense"),
        ({"quantization_config": dict(stored.CONFIG)}, "nm-packed"),
        (CONFIG, "compressed-tensors"),
        ({"compression_config": {"sparsity_config": SPARSITY}}, "compressed-tensors"),
        ({"sparsity_config": SPARSITY}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "dense"}}, "dense"),
    ],
)
def test_forms(tmp_path: Path, config: dict[str, Any], form: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    assert stored.form(tmp_path) == form


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"quant_method": "gptq"}, "quantised by `gptq`"),
        ({"bits": 4}, "quantised by `None`"),
        ({"quant_method": "nm-packed", "version": 7}, "nm-packed of version 7, this EdgeSFT reads 1"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "int-quantized",
                "config_groups": {"group_0": {}},
            },
            "in the format `int-quantized`, expected `sparse-24-bitmask` or `marlin-24`",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "in the format `pack-quantized`",
        ),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}},
            "in the format `sparse-bitmask`",
        ),
    ],
)
def test_other_ways_are_refused_by_name(tmp_path: Path, about: dict[str, Any], words: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": about}))
    with pytest.raises(ArtifactError, match=words):
        stored.form(tmp_path)
