"""Back-propagation over several ranks: one gradient from the rows of all, and a frozen base that they share.

How: theta is small and whole on every rank; each rank takes the gradient of its rows, and the sum weighted
by the shares of the joined batch's mean loss is the gradient of the joined batch. The frozen blocks may be
sharded (FSDP2, `torch.distributed.fsdp.fully_shard`): a rank keeps 1 / world of every block and gathers a
block for its forward and its backward.
Embeddings, final norm and head stay whole on every rank: objectives call the head, and take rows of it,
outside the forward of the model, where nothing would gather them. That is why this calls `fully_shard`
itself: accelerate's own preparation shards them too.
Cost: two all-gathers of the blocks a step where they are sharded, one all-reduce of theta.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgesft.core import models
from edgesft.core.protocols import Gradient, Theta
from edgesft.core.tuning.ranks import Ranks
from edgesft.core.tuning.tuned import TunedLinear

BUCKET = 25 << 20  # bytes that are reduced together


@dataclass(frozen=True)
class Joined:
    """The gradient of the joined batch, equal on every rank; see `core.protocols.Gradient`."""

    loss: float
    values: Theta

    def items(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.values.items()


def prepare(model: nn.Module, ranks: Ranks, *, shard: bool | None = None) -> nn.Module:
    """The model, its frozen blocks sharded over the ranks and moved to their devices; changed in place.

    shard: None shards on GPUs and keeps the model whole on CPUs, where ranks mostly share one memory. Call it
    once the layers are tuned: regions and theta are made from whole weights. From then on a weight of a block
    is a `DTensor` outside the forward of its block; take base weights from the model's files.
    """
    if ranks.world == 1 or not (ranks.device.startswith("cuda") if shard is None else shard):
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = torch.device(ranks.device)
    model.requires_grad_(False)
    mesh = init_device_mesh(device.type, (ranks.world,))
    blocks = [block for _, block in models.blocks(model)]
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = {p for p in model.parameters() if id(p) not in inside}
    for p in outside:
        p.data = p.data.to(device)
    root = models.backbone(model)
    fully_shard(root, mesh=mesh, ignored_params=outside & set(root.parameters()))
    for module in model.modules():
        if isinstance(module, TunedLinear):
            module.theta = {name: p.to(device) for name, p in module.theta.items()}
    return model


def joined(gradient: Gradient | None, theta: Theta, ranks: Ranks, share: float) -> Gradient:
    """The gradient of the joined batch out of that of this rank's rows. share: as `Ranks.split` gives it.

    gradient: None on a rank without rows; where blocks are sharded such a rank takes the gradient of any rows
    instead, since all ranks gather a block or none does, and its share 0 drops it.
    Raises DeviceError when the ranks are out of step.
    """
    loss = 0.0 if gradient is None else gradient.loss
    values = {name: torch.zeros_like(p) for name, p in theta.items()}
    if gradient is not None:
        values |= dict(gradient.items())
    (mean,) = ranks.mean([loss], share)  # finds ranks that are out of step before tensors are mixed
    average(values, ranks, share)
    return Joined(mean, values)


def average(gradients: Mapping[str, Tensor], ranks: Ranks, share: float = 1.0) -> None:
    """gradients <- sum over the ranks of share * gradients, in place, in float32 (float64 where they are).

    Every rank gives the same names and shapes in the same order. share 0: the values are ignored, NaN too.
    """
    if ranks.world == 1:
        return
    import torch.distributed as dist

    for bucket in _buckets(list(gradients.values())):
        wide = torch.float64 if bucket[0].dtype is torch.float64 else torch.float32
        flat = torch.cat([g.detach().reshape(-1).to(wide) for g in bucket])
        flat = flat.mul_(share) if share else torch.zeros_like(flat)
        with ranks.waiting():
            dist.all_reduce(flat)
        ranks.bytes_sent += 2 * flat.nbytes * (ranks.world - 1) // ranks.world  # of a ring
        for g, part in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
            g.copy_(part.view_as(g))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Consecutive tensors of one type and device, about BUCKET bytes together."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        alike = not bucket or (tensor.dtype, tensor.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (size + tensor.nbytes > BUCKET or not alike):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
