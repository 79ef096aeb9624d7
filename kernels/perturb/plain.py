"""The perturbation in plain torch as an implementation among others; `reference` has the arithmetic."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from edgesft.core.protocols import Law, Mask, Shift, Update

if TYPE_CHECKING:
    from torch import Tensor

    from edgesft.core.quantized import Quantized


class Reference:
    """Plain torch: any device, any float type, any strides; tens of times slower than native code."""

    op: ClassVar[str] = "perturb"
    name: ClassVar[str] = "reference"
    strip: ClassVar[int] = 1 << 18  # temporaries are about 100 bytes an element: 25 MiB

    def fits(self, weight: "Tensor | Quantized | None" = None, out: "Tensor | None" = None) -> bool:
        return True

    def state(self) -> tuple[bool, str]:
        return True, "plain torch"

    def noise(
        self, out: "Tensor", *, seed: int, tensor: int, start: int, law: Law, rank: int, width: int
    ) -> None:
        from edgesft.kernels.perturb import reference

        flat = out.view(-1)
        for at in range(0, flat.numel(), self.strip):
            part = flat[at : at + self.strip]
            part.copy_(
                reference.noise(
                    part.numel(),
                    seed=seed,
                    tensor=tensor,
                    start=start + at,
                    device=out.device,
                    law=law,
                    rank=rank,
                    width=width,
                )
            )

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
        import torch

        from edgesft.kernels.perturb import reference

        width = weight.shape[1]
        for part in reference.slices(rows.stop - rows.start, width, self.strip):
            here = slice(rows.start + part.start, rows.start + part.stop)
            if isinstance(weight, torch.Tensor):
                source = weight[here].to(torch.promote_types(weight.dtype, torch.float32))
            else:
                source = weight.dequantize(here)
            for shift, out in zip(shifts, outs, strict=True):
                start = here.start * width
                reference.strip(source, shift, out[part], tensor=tensor, mask=mask, start=start, bare=bare)

    def replay(
        self, weight: "Tensor | Quantized", updates: Sequence[Update], *, tensor: int, mask: Mask
    ) -> int:
        import torch

        from edgesft.kernels.perturb import reference

        if not isinstance(weight, torch.Tensor):
            return self._replay_codes(weight, updates, tensor=tensor, mask=mask)
        weight = weight.view(1) if weight.dim() == 0 else weight
        width, active = weight[0].numel() if weight.shape[0] else 0, 0
        for part in reference.slices(weight.shape[0], width, self.strip):
            last, start = 0, part.start * width
            for update in updates:
                last = reference.descend(weight[part], update, tensor=tensor, mask=mask, start=start)
            active += last
        return active

    def _replay_codes(
        self, weight: "Quantized", updates: Sequence[Update], *, tensor: int, mask: Mask
    ) -> int:
        from edgesft.kernels.perturb import reference

        active = 0
        for part in reference.slices(*weight.shape, self.strip):
            last = 0
            for update in updates:
                last = reference.descend_codes(weight, update, part, tensor=tensor, mask=mask)
            active += last
        return active
