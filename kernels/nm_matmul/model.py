"""Torch models out of folders whose weights are stored packed or compressed (`core.stored`).

A packed matrix of a linear layer stays on the mapped file: its layer is a `PackedLinear`, and no dense weight
is ever made. A compressed one becomes an ordinary weight.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgesft.core import models, quantized
from edgesft.core.errors import ArtifactError
from edgesft.core.stored import Stored
from edgesft.core.weights import check_finite
from edgesft.kernels.nm_matmul.torch_op import PackedLinear


def load(path: Path, *, dtype: str = "float32") -> nn.Module:
    """The model of a folder in eval mode, on the CPU, as `models.load` gives it; its packed layers packed.

    Raises ArtifactError when weights are missing, of another shape, broken, NaN or infinite.
    """
    kind: torch.dtype = getattr(torch, dtype)
    stored = Stored(path)
    model = quantized.skeleton(path, dtype)
    prefix = f"{getattr(model, 'base_model_prefix', '') or 'model'}."
    for name, linear in list(model.named_modules()):
        found = stored.find(f"{name}.weight", prefix) if isinstance(linear, nn.Linear) else None
        if found is None or found not in stored.packed:
            continue
        packed = stored.packed[found]
        _check_shape(stored, found, (packed.rows, packed.columns), linear.weight)
        bias = None if linear.bias is None else _tensor(stored, f"{name}.bias", linear.bias, prefix, kind)
        _put(model, name, PackedLinear(packed, bias, dtype=kind))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            tensor = _tensor(stored, name, parameter, prefix, kind)
            _put(model, name, nn.Parameter(tensor, requires_grad=False))
    for name, buffer in list(model.named_buffers()):
        if stored.find(name, prefix) is not None:
            buffer.copy_(_tensor(stored, name, buffer, prefix, buffer.dtype))
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    module: nn.Module = model.eval()
    return module


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Full name -> every linear layer of the blocks, packed or not, in forward order."""
    return {
        f"{name}.{inner}": module
        for name, block in models.blocks(model)
        for inner, module in block.named_modules()
        if isinstance(module, PackedLinear | nn.Linear)
    }


def exact(model: nn.Module) -> None:
    """Let packed layers multiply with x as it is, not rounded to int8: small steps must not drown in that."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.level = 0


def numel(model: nn.Module) -> int:
    """How many weights a model has, packed and not."""
    packed = [m.weight.numel() for m in model.modules() if isinstance(m, PackedLinear)]
    return sum(p.numel() for p in model.parameters()) + sum(packed)


def nbytes(model: nn.Module) -> int:
    """Bytes that the weights of a model take."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def _tensor(stored: Stored, name: str, like: Tensor, prefix: str, kind: torch.dtype) -> Tensor:
    """A tensor of the folder in type `kind`, in memory of its own."""
    found = stored.find(name, prefix)
    if found is None and "pooler" in name:  # trained by few, used by nothing here
        return torch.zeros(like.shape, dtype=kind)
    if found is None:
        raise ArtifactError(f"`{stored.path}` lacks the tensor `{name}`")
    _check_shape(stored, found, stored.shape(found), like)
    tensor = stored.get(found).to(kind, copy=True)
    check_finite(found, tensor)
    return tensor


def _check_shape(stored: Stored, name: str, shape: tuple[int, ...], like: Tensor) -> None:
    if tuple(shape) != tuple(like.shape):
        raise ArtifactError(
            f"the tensor `{name}` of `{stored.path}` is {list(shape)}, expected {list(like.shape)}"
        )


def _put(model: Any, name: str, what: nn.Module | nn.Parameter) -> None:  # noqa: ANN401 - nn.Module
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, what)
