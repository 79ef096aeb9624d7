"""Gated feed-forward blocks that keep two large tensors instead of four, where no gradient is taken.

`down(act(gate(x)) * up(x))` as models spell it holds the outputs of `gate`, `act` and `up` and their product,
each (tokens, intermediate): the largest tensors of a forward pass. Written into one another they are two,
with the same bits, and a tenth of the pass goes with the memory it need not fetch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


@contextmanager
def in_place(model: nn.Module) -> Iterator[int]:
    """While it is open, the gated blocks of `model` compute in place; gives how many there are.

    A block is one with the parts of LLaMA's and its kin's, whose result is that of the plain expression to
    the bit; others are left as they are.
    """
    changed: list[nn.Module] = []
    known: dict[type, bool] = {}
    for block in model.modules():
        if "forward" in vars(block) or not all(
            isinstance(getattr(block, p, None), nn.Module) for p in _PARTS
        ):
            continue
        if type(block) not in known:
            known[type(block)] = _agrees(block)
        if known[type(block)]:
            changed.append(block)
    for block in changed:
        block.forward = _forward(block)
    try:
        yield len(changed)
    finally:
        for block in changed:
            del block.forward


def _forward(block: nn.Module) -> Callable[[Tensor], Tensor]:
    plain = type(block).forward

    def forward(x: Tensor) -> Tensor:
        found: Tensor = plain(block, x) if torch.is_grad_enabled() else _product(block, x)
        return found

    return forward


def _product(block: nn.Module, x: Tensor) -> Tensor:
    gate, up, down, act = (getattr(block, part) for part in _PARTS)
    inner: Tensor = gate(x)
    inner = functional.silu(inner, inplace=True) if _is_silu(act) else act(inner)
    inner *= up(x)
    found: Tensor = down(inner)
    return found


def _is_silu(act: nn.Module) -> bool:
    return isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation"


@torch.no_grad()
def _agrees(block: nn.Module) -> bool:
    """Whether a block does what its parts say, on two random tokens."""
    gate = block.gate_proj
    width = getattr(gate, "in_features", None)
    if width is None:
        return False
    parameter = next(block.parameters(), torch.empty(0))  # quantised weights are none
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, int(width), generator=rng).to(parameter.device, parameter.dtype)
    kept = x.clone()
    try:
        same = torch.equal(type(block).forward(block, x.clone()), _product(block, x))
    except (RuntimeError, TypeError):
        return False
    return same and torch.equal(x, kept)
