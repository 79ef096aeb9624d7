"""Parts of models that do with less memory where no gradient is taken: the same bits, written in place.

- Gated blocks, `down(act(gate(x)) * up(x))`: two tensors of (tokens, intermediate) instead of four.
- Root mean square norms: one tensor of (tokens, hidden) instead of four.
- Rotary embeddings: two tensors for a rotated one instead of five.

Models spell these out in operations that each write fresh memory. Of a pass over a few hundred tokens that is
a sixth of the time. A part is replaced only after its result has been compared with the plain one.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

_GATED = ("gate_proj", "up_proj", "down_proj", "act_fn")
_ROTARY = "apply_rotary_pos_emb"  # what transformers' models call it, each a function of its own

Plain: TypeAlias = Callable[..., Any]


@contextmanager
def in_place(model: nn.Module) -> Iterator[int]:
    """While it is open, parts of `model` compute in place; gives how many of its modules do.

    Parts are recognised by the names of LLaMA and its kin, and left as they are if a trial on random numbers
    does not give the same bits. The function for rotary embeddings is replaced in the module of the model's
    class, so for other models of that class too.
    """
    with ExitStack() as stack:
        known: dict[tuple[type, Callable[..., Tensor]], bool] = {}
        count = 0
        for module in model.modules():
            lean = _gated if _is_gated(module) else _norm if _is_norm(module) else None
            if lean is None or "forward" in vars(module):
                continue
            key = (type(module), lean)
            if key not in known:
                known[key] = _agrees(module, lean)
            if known[key]:
                module.forward = _unless_graded(type(module).forward, lean, module)
                stack.callback(delattr, module, "forward")
                count += 1
        for name in sorted({type(module).__module__ for module in model.modules()}):
            plain = getattr(sys.modules[name], _ROTARY, None)
            if callable(plain) and not isinstance(plain, _Rotary) and _rotates(plain):
                setattr(sys.modules[name], _ROTARY, _Rotary(plain))
                stack.callback(setattr, sys.modules[name], _ROTARY, plain)
        yield count


def _unless_graded(plain: Plain, lean: Plain, module: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        found: Tensor = (plain if torch.is_grad_enabled() else lean)(module, x)
        return found

    return forward


# ---------------------------------------------------------------- gated blocks


def _is_gated(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, part, None), nn.Module) for part in _GATED)


def _gated(block: nn.Module, x: Tensor) -> Tensor:
    gate, up, down, act = (getattr(block, part) for part in _GATED)
    inner: Tensor = gate(x)
    silu = isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation"
    inner = functional.silu(inner, inplace=True) if silu else act(inner)
    inner *= up(x)
    found: Tensor = down(inner)
    return found


# ---------------------------------------------------------------- norms


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1 and hasattr(module, "variance_epsilon")


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    weight, eps = norm.weight, float(norm.variance_epsilon)  # type: ignore[arg-type]
    if not (isinstance(weight, Tensor) and x.dtype == weight.dtype == torch.float32):
        found: Tensor = type(norm).forward(norm, x)
        return found
    y = x.pow(2)
    scale = y.mean(-1, keepdim=True)
    scale += eps
    torch.mul(x, scale.rsqrt_(), out=y)
    y *= weight
    return y


# ---------------------------------------------------------------- rotary embeddings


class _Rotary:
    """(q, k, cos, sin) to q and k rotated; q and k are (B, heads, S, D), cos and sin (B, S, D)."""

    def __init__(self, plain: Plain) -> None:
        self.plain = plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - those of the plain one
        if torch.is_grad_enabled() or kwargs or len(args) != 4:
            return self.plain(*args, **kwargs)
        q, k, cos, sin = args
        if not cos.shape[-1] == q.shape[-1] == k.shape[-1] or cos.dtype != q.dtype:
            return self.plain(*args)
        half = sin.shape[-1] // 2
        signed = torch.cat((-sin[..., :half], sin[..., half:]), -1).unsqueeze(1)
        return _rotated(q, cos.unsqueeze(1), signed), _rotated(k, cos.unsqueeze(1), signed)


def _rotated(x: Tensor, cos: Tensor, signed: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    y = torch.cat((x[..., half:], x[..., :half]), -1)
    y *= signed
    y += x * cos  # no addcmul: it rounds once
    return y


# ---------------------------------------------------------------- trials


@torch.no_grad()
def _agrees(module: nn.Module, lean: Callable[[nn.Module, Tensor], Tensor]) -> bool:
    """Whether both forms of a part give the same for two random tokens, and leave them alone."""
    weight: Any = module.weight if lean is _norm else None
    width = getattr(module.gate_proj, "in_features", None) if weight is None else weight.numel()
    if not isinstance(width, int):
        return False
    parameter = next(module.parameters(), torch.empty(0))  # quantised weights are none
    x = _numbers(1, 2, width).to(parameter.device, parameter.dtype)
    kept = x.clone()
    try:
        same = torch.equal(type(module).forward(module, x.clone()), lean(module, x))
    except (RuntimeError, TypeError):
        return False
    return same and torch.equal(x, kept)


@torch.no_grad()
def _rotates(plain: Plain) -> bool:
    numbers = _numbers(24, 16)
    q, k = numbers[:12].view(1, 3, 4, 16), numbers[12:16].view(1, 1, 4, 16)
    given = (q, k, *numbers[16:].view(2, 1, 4, 16))
    kept = [tensor.clone() for tensor in given]
    try:
        pairs = zip(plain(*given), _Rotary(plain)(*given), strict=True)
        same = all(torch.equal(a, b) for a, b in pairs)
    except (RuntimeError, TypeError, ValueError):
        return False
    return same and all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))


def _numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
