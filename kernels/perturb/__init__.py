"""Weights plus masked noise that is never stored: the inner operations of zeroth-order tuning.

`perturbed_linear` is the forward of Sparse MeZO (2024), algorithm "S-MeZO-EI": mask, noise and perturbed
weights exist for one strip of output rows at a time, the stored weight is only read, so all losses of a step
see the same weights and hence the same mask. `descend_` is the update with the noise of the same seeds,
`replay_` many updates. A mask that is whole is dense MeZO. Importing this module does not import torch.
"""

import functools
import hashlib
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from edgesft.core.protocols import Kernel, Law, Mask, Shift, Update
from edgesft.kernels.perturb.cpu import Native
from edgesft.kernels.perturb.gpu import Triton
from edgesft.kernels.perturb.plain import Reference

if TYPE_CHECKING:
    from torch import Tensor

    from edgesft.core.quantized import Quantized
    from edgesft.kernels.perturb.api import descend_, noise, perturbed_linear, replay_

__all__ = ["descend_", "noise", "perturbed_linear", "replay_", "tensor_id"]


class Perturb(Kernel, Protocol):
    """What an implementation of these operations offers; see `reference` for the arithmetic."""

    def noise(
        self, out: "Tensor", *, seed: int, tensor: int, start: int, law: Law, rank: int, width: int
    ) -> None:
        """Fill `out` (float32) with z(seed, tensor, start + i); width: columns of the matrix."""
        ...

    def strips(
        self,
        weight: "Tensor | Quantized",
        rows: slice,
        shifts: Sequence[Shift | None],
        outs: "Sequence[Tensor]",
        *,
        tensor: int,
        mask: Mask,
        bare: bool = False,
    ) -> None:
        """outs[j] (rows, in) = those rows of the weight at shifts[j]; bare: of the masked scale * z alone."""
        ...

    def replay(
        self, weight: "Tensor | Quantized", updates: Sequence[Update], *, tensor: int, mask: Mask
    ) -> int:
        """Apply the updates in turn, in place; returns the entries in the mask of the last one."""
        ...


IMPLEMENTATIONS = (Native(), Triton(), Reference())


@functools.cache
def tensor_id(name: str) -> int:
    """A stable 32-bit id of a parameter's name. Tied tensors must share one: pass the same name."""
    return int.from_bytes(hashlib.blake2s(name.encode(), digest_size=4).digest(), "little")


def __getattr__(name: str) -> Any:  # noqa: ANN401 - the functions of `api`
    if name in __all__:
        globals()[name] = found = getattr(importlib.import_module(f"{__name__}.api"), name)
        return found
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")
