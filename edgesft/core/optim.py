"""Plain optimisers over theta.

An optimiser walks a gradient one tensor at a time, so a gradient that makes its tensors on demand never
exists whole.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

from edgesft.core.protocols import Gradient, Theta


class Optimizer(Protocol):
    """Moves theta against a gradient. `state` is everything that a resumed run needs."""

    def step(self, theta: Theta, gradient: Gradient, lr: float) -> None: ...
    def state(self) -> Theta: ...
    def restore(self, state: Theta) -> None: ...


@dataclass
class Sgd:
    """theta <- theta - lr g - lr decay theta. Keeps nothing."""

    decay: float = 0.0

    @torch.no_grad()
    def step(self, theta: Theta, gradient: Gradient, lr: float) -> None:
        for name, g in gradient.items():
            p = theta[name]
            if self.decay:
                p.mul_(1 - lr * self.decay)
            p.add_(g, alpha=-lr)

    def state(self) -> Theta:
        return {}

    def restore(self, state: Theta) -> None:
        pass


@dataclass
class Adam:
    """Adam (Kingma and Ba 2014) with decoupled weight decay (Loshchilov and Hutter 2017); decay 0 is Adam."""

    decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    steps: int = 0
    first: Theta = field(default_factory=dict)
    second: Theta = field(default_factory=dict)

    @torch.no_grad()
    def step(self, theta: Theta, gradient: Gradient, lr: float) -> None:
        self.steps += 1
        first_share = 1 - self.beta1**self.steps
        second_share = 1 - self.beta2**self.steps
        for name, g in gradient.items():
            p = theta[name]
            m = self.first.setdefault(name, torch.zeros_like(p))
            v = self.second.setdefault(name, torch.zeros_like(p))
            m.lerp_(g, 1 - self.beta1)
            v.mul_(self.beta2).addcmul_(g, g, value=1 - self.beta2)
            if self.decay:
                p.mul_(1 - lr * self.decay)
            p.addcdiv_(m, (v / second_share).sqrt_().add_(self.eps), value=-lr / first_share)

    def state(self) -> Theta:
        moments = {f"first/{k}": v for k, v in self.first.items()}
        moments |= {f"second/{k}": v for k, v in self.second.items()}
        return moments | {"steps": torch.tensor(self.steps)}

    def restore(self, state: Theta) -> None:
        self.steps = int(state["steps"])
        self.first = {k[6:]: v for k, v in state.items() if k.startswith("first/")}
        self.second = {k[7:]: v for k, v in state.items() if k.startswith("second/")}


OPTIMIZERS: dict[str, Callable[[float], Optimizer]] = {
    "sgd": lambda decay: Sgd(decay),
    "adam": lambda decay: Adam(decay),
}
