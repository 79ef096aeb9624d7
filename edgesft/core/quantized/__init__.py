"""Models whose weights stay quantised: their layers, and how they are loaded in little more than that memory.

`load` reads a model folder a few rows at a time, so neither the float model nor one of its matrices ever
exists. A forward pass makes the float weights of one strip of rows at a time in a buffer that is kept.
`core.quantized.codes` says what the codes mean.
"""

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgesft.core import catalog, memory, models
from edgesft.core.errors import ArtifactError
from edgesft.core.protocols import Mask
from edgesft.core.quantized.codes import Bits, Quantized, empty, fill, quantize, rows_at_once
from edgesft.core.weights import SIZES, TORCH_NAMES, TensorInfo, Weights, check_finite

__all__ = [
    "Bits",
    "Quantized",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "layers",
    "load",
    "matrices",
    "nbytes",
    "numel",
    "quantize",
    "skeleton",
]

STRIP = 1 << 19  # float weights made at a time in a backward pass: 2 MiB


class _Strips(threading.local):
    """This thread's memory for one strip of float weights."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None

    def of(self, weight: Quantized, rows: slice, dtype: torch.dtype) -> Tensor:
        """Those rows of the weight, until the next call."""
        count, width = rows.stop - rows.start, weight.shape[1]
        buffer = self.buffer
        if buffer is None or buffer.numel() < count * width or buffer.device != weight.device:
            with torch.inference_mode(False):  # one made inside could not be written outside
                self.buffer = buffer = torch.empty(max(STRIP, count * width), device=weight.device)
        return weight.dequantize(rows, out=buffer[: count * width].view(count, width)).to(dtype)


_strips = _Strips()


def _slices(weight: Quantized) -> Iterator[slice]:
    out, width = weight.shape
    step = max(64, STRIP // max(1, width) // 64 * 64)
    for begin in range(0, out, step):
        yield slice(begin, min(out, begin + step))


class _Product(torch.autograd.Function):
    """x W^T + b that lets gradients through to x; the backward pass makes the strips of W again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Quantized, bias: Tensor | None) -> Tensor:  # noqa: ANN401 - torch's
        ctx.weight, ctx.dtype = weight, x.dtype
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401 - torch's
        weight: Quantized = ctx.weight
        outer = grads[0]
        found = outer.new_zeros(*outer.shape[:-1], weight.shape[1])
        for rows in _slices(weight):
            found += outer[..., rows] @ _strips.of(weight, rows, outer.dtype)
        return found, None, None


def _product(x: Tensor, weight: Quantized, bias: Tensor | None) -> Tensor:
    """x (..., in) -> (..., out), in the type of x, without a gradient."""
    kernel = catalog.runtime("kernels.perturb")
    found: Tensor = kernel.perturbed_linear(x, weight, bias, shifts=(None,), tensor=0, mask=Mask())
    return found


class QuantizedLinear(nn.Module):
    """y = x W^T + b over codes. `weight` is the `Quantized` itself: it has a shape, and float rows by index.

    Its codes are no parameters: `state_dict` does not have them.
    """

    def __init__(self, quantized: Quantized, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = quantized.shape
        self.quantized = quantized
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def weight(self) -> Quantized:
        return self.quantized

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if x.requires_grad and torch.is_grad_enabled():
            found: Tensor = _Product.apply(x, self.quantized, self.bias)  # type: ignore[no-untyped-call]
            return found
        return _product(x, self.quantized, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.quantized.move_(fn)
        return self

    def extra_repr(self) -> str:
        q = self.quantized
        return f"in_features={q.shape[1]}, out_features={q.shape[0]}, bits={q.bits}, group={q.group}"


class QuantizedEmbedding(nn.Module):
    """Rows of a table of codes; only those asked for become float. factor: what they are multiplied by."""

    def __init__(self, quantized: Quantized, dtype: torch.dtype, factor: float | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = quantized.shape
        self.quantized, self.dtype, self.factor = quantized, dtype, factor

    @property
    def weight(self) -> Quantized:
        return self.quantized

    def forward(self, ids: Tensor) -> Tensor:  # (...) int64 -> (..., in)
        rows = self.quantized.take(ids.reshape(-1)).dequantize().to(self.dtype)
        if self.factor is not None:
            rows = rows * self.factor
        return rows.view(*ids.shape, self.embedding_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedEmbedding":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.quantized.move_(fn)
        return self


def layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Full name -> every quantised layer of the blocks, in the order and by the names of `models.linears`."""
    return {
        f"{name}.{inner}": module
        for name, block in models.blocks(model)
        for inner, module in block.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def matrices(model: nn.Module) -> list[Quantized]:
    """Every quantised matrix of a model, a tied one once."""
    held = [m.quantized for m in model.modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)]
    return list({id(each): each for each in held}.values())


def numel(model: nn.Module) -> int:
    """How many weights a model has, codes and floats."""
    return sum(p.numel() for p in model.parameters()) + sum(q.numel() for q in matrices(model))


def nbytes(model: nn.Module) -> int:
    """Bytes that the weights of a model take: codes, scales, parameters and buffers."""
    floats = [*model.parameters(), *model.buffers()]
    return sum(t.nbytes for t in floats) + sum(q.nbytes for q in matrices(model))


# ---------------------------------------------------------------- loading


def load(
    path: Path, *, bits: Bits, group: int = 32, embedding_bits: Bits | None = None, dtype: str = "float32"
) -> nn.Module:
    """The model of a folder in eval mode with quantised blocks, embedding and head; the rest is `dtype`.

    A head that is tied to the embedding shares its codes. embedding_bits: of embedding and head; as `bits`
    if None. Read a few rows at a time: beside the codes there are a quarter of a megabyte of float weights
    and their temporaries. Freed memory goes back to the system at once from here on (`memory.tighten`).
    Raises ArtifactError as `models.load` does, and for a layer that cannot be quantised; UsageError for
    settings out of range.
    """
    memory.tighten()
    model = skeleton(path, dtype)
    reader = _Reader(path, model)
    for name, linear in models.linears(model).items():
        quantized = reader.quantized(f"{name}.weight", linear.weight, bits, group)
        _put(model, name, QuantizedLinear(quantized, reader.optional(f"{name}.bias", linear.bias)))
    _ends(model, reader, embedding_bits or bits, group, getattr(torch, dtype))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            _put(model, name, nn.Parameter(reader.floats(name, parameter), requires_grad=False))
    for name, buffer in list(model.named_buffers()):
        if reader.find(name) is not None:
            buffer.copy_(reader.floats(name, buffer))
    memory.trim()
    module: nn.Module = model.eval()
    return module


def skeleton(path: Path, dtype: str) -> Any:  # noqa: ANN401 - transformers is untyped
    """The model without weights; buffers that no file holds, such as rotary frequencies, are real.

    Raises ArtifactError for an architecture that transformers does not know.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModel, AutoModelForCausalLM

    auto = AutoModelForCausalLM if models.kind(path) == "decoder" else AutoModel
    config = models._config(path)
    try:
        with init_empty_weights(include_buffers=False):
            model = auto.from_config(config, dtype=getattr(torch, dtype))
        model.tie_weights()
    except Exception as error:  # unknown architectures, values out of range: many classes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"`{path}` cannot be loaded: {reason}") from None
    return model


def _ends(model: Any, reader: "_Reader", bits: Bits, group: int, dtype: torch.dtype) -> None:  # noqa: ANN401
    """Quantise the embedding and the head."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    if not isinstance(embedding, nn.Embedding):
        raise ArtifactError(f"the embedding is a `{type(embedding).__name__}`, expected `Embedding`")
    factor = getattr(embedding, "embed_scale", None)
    if factor is not None:
        factor = float(torch.as_tensor(factor).to(dtype))  # as the float model rounds it
    elif type(embedding).forward is not nn.Embedding.forward:
        raise ArtifactError(f"the embedding `{type(embedding).__name__}` is computed in a way of its own")
    name = names[id(embedding)]
    table = reader.quantized(f"{name}.weight", embedding.weight, bits, group)
    _put(model, name, QuantizedEmbedding(table, dtype, factor))
    if isinstance(head, nn.Linear):
        name = names[id(head)]
        if head.weight is not embedding.weight:
            table = reader.quantized(f"{name}.weight", head.weight, bits, group)
        _put(model, name, QuantizedLinear(table, reader.optional(f"{name}.bias", head.bias)))


def _put(model: nn.Module, name: str, what: nn.Module | nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, what)


class _Reader:
    """The tensors of a folder for a model, read from the file a few rows at a time, never mapped."""

    def __init__(self, path: Path, model: nn.Module) -> None:
        self.weights = Weights(path)
        self._prefix = f"{getattr(model, 'base_model_prefix', '') or 'model'}."

    def find(self, name: str) -> str | None:
        """What the file calls it: a folder of a bare backbone lacks its prefix, and the other way round."""
        names = (name, name.removeprefix(self._prefix), self._prefix + name)
        return next((each for each in names if each in self.weights), None)

    def _info(self, name: str, like: Tensor) -> TensorInfo:
        found = self.find(name)
        if found is None:
            raise ArtifactError(f"`{self.weights.path}` lacks the tensor `{name}`")
        info = self.weights.info(found)
        if info.shape != tuple(like.shape):
            raise ArtifactError(
                f"the tensor `{found}` of `{info.file}` is {list(info.shape)}, expected {list(like.shape)}"
            )
        return info

    def _parts(self, name: str, info: TensorInfo) -> Iterator[Tensor]:
        """Some rows at a time, in the file's type; rows of the first axis."""
        kind: torch.dtype = getattr(torch, TORCH_NAMES[info.dtype])
        rows, rest = (info.shape[0], info.shape[1:]) if info.shape else (1, ())
        width = math.prod(rest)
        with info.file.open("rb") as file:
            file.seek(info.start)
            for begin in range(0, rows, step := rows_at_once(width)):
                count = min(step, rows - begin)
                data = bytearray(count * width * SIZES[info.dtype])
                if file.readinto(data) != len(data):
                    raise ArtifactError(f"`{info.file}` is truncated: `{name}` ends too early")
                part = torch.frombuffer(data, dtype=kind) if data else torch.empty(0, dtype=kind)
                part = part.float() if part.is_floating_point() else part
                if part.is_floating_point() and not math.isfinite(float(part.sum())):
                    check_finite(name, self.weights.get(self.find(name) or name))  # names the place
                yield part.view(count, *rest)

    def quantized(self, name: str, like: Tensor, bits: Bits, group: int) -> Quantized:
        info = self._info(name, like)
        found, at = empty(info.shape, bits, group), 0
        for part in self._parts(name, info):
            try:
                fill(found, at, part)
            except ArtifactError as error:
                raise ArtifactError(f"`{name}` cannot be quantised: {error.message}") from None
            at += len(part)
        return found

    def floats(self, name: str, like: Tensor) -> Tensor:
        """The tensor in the type and shape of `like`."""
        if "pooler" in name and self.find(name) is None:  # trained by few, used by nothing here
            return torch.zeros(like.shape, dtype=like.dtype)
        info = self._info(name, like)
        found, at = torch.empty(like.shape, dtype=like.dtype), 0
        for part in self._parts(name, info):
            found.view(-1)[at : at + part.numel()] = part.reshape(-1)
            at += part.numel()
        return found

    def optional(self, name: str, like: Tensor | None) -> Tensor | None:
        return None if like is None else self.floats(name, like)
