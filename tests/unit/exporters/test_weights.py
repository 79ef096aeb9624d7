"""Weights arrive as float32 from every floating-point type, and only if they are finite."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgesft.core.errors import ArtifactError
from edgesft.exporters.weights import Arrays


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(3, 5).to(dtype)
    save_file({"other": torch.zeros(3, dtype=torch.uint8), "w": tensor}, tmp_path / "model.safetensors")
    arrays = Arrays(tmp_path)
    got = arrays.get("w")
    assert got.dtype == np.float32
    assert arrays.shape("w") == (3, 5)
    np.testing.assert_array_equal(got, tensor.float().numpy())
    with pytest.raises(ArtifactError, match="dtype U8"):
        arrays.get("other")
    with pytest.raises(ArtifactError, match="no tensor `absent`"):
        arrays.get("absent")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_values_are_refused(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    tensor = torch.zeros(4, 6, dtype=dtype)
    tensor[2, 3] = value
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"`w` in .* at \[2, 3\], expected finite"):
        Arrays(tmp_path).get("w")


def test_too_large_for_float32_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.full((2,), 1e300, dtype=torch.float64)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"at \[0\]"):
        Arrays(tmp_path).get("w")
