"""The steps that zeroth-order tuning is compared with, each written plainly.

`mezo`: one step of MeZO (Malladi et al., Fine-Tuning Language Models with Just Forward Passes, 2023) in the
form that was published: the stored weights are moved by +eps, -2 eps, +eps and then updated, with noise drawn
four times from torch's global generator, and the logits of all positions exist. `adamw` and `lora`: what
back-propagation costs, full and with adapters and checkpointed activations.

Each takes a Hugging Face causal model in float32 and a `core.data.batches.Batch`, may change the model for
good, and gives a callable that does one step and returns its loss.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from edgesft.core.data.batches import Batch

Step = Callable[[], float]

EPS, MEZO_LR, ADAM_LR, LORA_LR = 1e-3, 1e-6, 1e-5, 1e-4
RANK = 16


def whole_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's own mean loss of the supervised tokens, from the logits (B, S, vocabulary) of all.

    Supervised tokens must be inputs of their rows: the model shifts its labels itself.
    """
    labels = torch.full_like(batch.input_ids, -100)  # -100: not supervised
    labels.view(-1)[batch.positions + 1] = batch.targets
    return model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels, use_cache=False
    ).loss


def forward(model: nn.Module, batch: Batch) -> Step:
    """One plain forward pass."""

    def step() -> float:
        with torch.no_grad():
            return float(whole_loss(model, batch))

    return step


def mezo(model: nn.Module, batch: Batch, *, eps: float = EPS, lr: float = MEZO_LR) -> Step:
    """One step of MeZO in place on every parameter (a tied one once)."""
    weights = list(model.parameters())
    done = 0

    def each(seed: int, scale: float) -> None:
        """w <- w + scale * z(seed); z in the order of the parameters from one global stream."""
        torch.manual_seed(seed)
        for w in weights:
            z = torch.normal(mean=0.0, std=1.0, size=w.shape, dtype=w.dtype, device=w.device)
            w.data.add_(z, alpha=scale)

    @torch.no_grad()
    def step() -> float:
        nonlocal done
        seed, done = done, done + 1
        each(seed, eps)
        plus = float(whole_loss(model, batch))
        each(seed, -2 * eps)
        minus = float(whole_loss(model, batch))
        each(seed, eps)
        each(seed, -lr * (plus - minus) / (2 * eps))
        return (plus + minus) / 2

    return step


def adamw(model: nn.Module, batch: Batch) -> Step:
    """One step of AdamW on every parameter."""
    model.requires_grad_(True)
    return _descent(model, batch, ADAM_LR)


def lora(model: nn.Module, batch: Batch) -> Step:
    """One step of AdamW on LoRA adapters at every linear layer; the activations of a block are made again."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model.requires_grad_(False)
    model.activation_checkpointing_enable({"use_reentrant": False})
    return _descent(peft.get_peft_model(model, config), batch, LORA_LR)


def _descent(model: nn.Module, batch: Batch, lr: float) -> Step:
    model.train()  # checkpoints are only kept in training; the models here have no dropout
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)

    def step() -> float:
        loss = whole_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step
