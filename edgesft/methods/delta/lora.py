"""Add a low-rank product beside each frozen matrix: y = W x + scale * B (A x).

Paper: LoRA: Low-Rank Adaptation of Large Language Models (2021); rank-stabilised scale: rsLoRA (2023).
Why: a thousandth of the numbers to train, and the merged model costs nothing more at inference.
How: A is kaiming uniform, B zero, so the first step starts from the untouched model. scale = alpha / rank, or
alpha / sqrt(rank) with `rslora`. Dropout acts on x and only while gradients are recorded.
Cost: rank * (in + out) numbers a matrix, each with gradient and optimiser state; activations are those of the
whole model. Stored as a PEFT adapter folder, which other tools load too.
Mind: merging a dense product into a 2:4 base destroys the pattern; sparsify after merging.
"""

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.nn import functional

from edgesft.core.method import Method, method
from edgesft.core.params import Rank
from edgesft.core.protocols import Theta


@method
class Lora(Method):
    rank: Rank = 16
    alpha: Annotated[float, Field(gt=0, le=65_536, description="numerator of the scale")] = 32.0
    rslora: Annotated[bool, Field(description="scale by alpha / sqrt(rank)")] = False
    dropout: Annotated[float, Field(ge=0, lt=1, description="share of inputs dropped in training")] = 0.0

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def init_output(self, module: nn.Linear, rng: Generator) -> Theta:
        weight = module.weight
        bound = 1 / math.sqrt(module.in_features)  # kaiming uniform with a = sqrt 5
        a = torch.empty(self.rank, module.in_features, dtype=weight.dtype, device=weight.device)
        b = torch.zeros(module.out_features, self.rank, dtype=weight.dtype, device=weight.device)
        return {"A": a.uniform_(-bound, bound, generator=rng), "B": b}

    def output(self, x: Tensor, y: Tensor, theta: Theta) -> Tensor:
        """x (..., in), y (..., out) of the frozen layer -> (..., out)."""
        if self.dropout and torch.is_grad_enabled():
            x = functional.dropout(x, self.dropout)
        return y + self.scale * functional.linear(functional.linear(x, theta["A"]), theta["B"])

    def fold(self, weight: Tensor, bias: Tensor | None, theta: Theta) -> tuple[Tensor, Tensor | None]:
        return weight + self.scale * (theta["B"] @ theta["A"]), bias

    def peft(self) -> dict[str, Any]:
        """Its part of a PEFT adapter_config.json; `A` and `B` are stored as lora_A and lora_B."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "use_rslora": self.rslora,
            "lora_dropout": self.dropout,
        }
