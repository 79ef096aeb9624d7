"""N:M sparsity: which entries are kept, always by rank and never by a threshold, and what a matrix keeps.

Groups of M run along the inputs of a weight (out, in), the contiguous axis that sparse tensor cores read.
N is the number kept. Ties are broken by position (the lower index is kept), so the same scores give the
same mask on every machine, and no group ever keeps one entry more or less than N.
"""

from typing import Annotated

import torch
from pydantic import BeforeValidator
from torch import Tensor

from edgesft.core.errors import CheckFailed
from edgesft.core.params import Pattern, parse_pattern


def _absent(value: object) -> object:
    """TOML and the command line have no null: `none` and the empty string stand for it."""
    return None if value in ("", "none") else value


OptionalPattern = Annotated[Pattern | None, BeforeValidator(_absent)]


def split_pattern(pattern: str | None) -> tuple[int, int] | None:
    """(N, M) of `N:M`, or None where no pattern is asked for. Raises ValueError."""
    return parse_pattern(pattern) if pattern else None


def kept(total: int, density: float) -> int:
    """How many of `total` entries stay: floor(total * (1 - density)) go, and never all of them."""
    removed = int(total * (1 - density) + 1e-6)  # 1 - 0.9 is a little below 0.1 in binary
    return max(1, total - removed)


def keep_groups(scores: Tensor, n: int, m: int) -> Tensor:  # scores: (out, in)
    """Mask (out, in), bool, of the n entries with the highest score in every aligned group of m.

    Raises ValueError if m does not divide `in`.
    """
    rows, columns = scores.shape
    if columns % m:
        raise ValueError(f"{columns} inputs cannot be divided into groups of {m}")
    return _top(scores.reshape(rows, columns // m, m), n).reshape(rows, columns)


def keep_rows(scores: Tensor, density: float) -> Tensor:  # scores: (out, in)
    """Mask of the highest scores of every row, `kept(in, density)` of them."""
    return _top(scores, kept(scores.shape[-1], density))


def keep_matrix(scores: Tensor, density: float) -> Tensor:  # scores: (out, in)
    """Mask of the highest scores of the whole matrix, `kept(out * in, density)` of them."""
    return _top(scores.reshape(1, -1), kept(scores.numel(), density)).reshape(scores.shape)


def _top(scores: Tensor, count: int) -> Tensor:  # (..., k) -> bool, `count` true along the last axis
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def below_all(scores: Tensor, where: Tensor) -> Tensor:  # both (out, in); scores >= 0
    """`scores` with -1 at `where`: those entries are kept only where a group has nothing else.

    Used for entries that are zero already: to keep one would leave a zero too many in the group.
    """
    return scores.masked_fill(where, -1.0)


def nonzeros(weight: Tensor, m: int) -> Tensor:  # weight: (out, in)
    """Nonzero entries of each aligned group of m, (out, in / m) int64."""
    rows, columns = weight.shape
    return (weight.reshape(rows, columns // m, m) != 0).sum(-1)


def fill_groups(weight: Tensor, n: int, m: int) -> tuple[Tensor, int]:  # weight: (out, in)
    """`weight` with exactly n nonzeros in each group that had fewer, and how many entries that took.

    Real checkpoints hold exact zeros, those that were quantised above all, so a group can lack n nonzeros
    to keep. Such an entry becomes 2^-24 of the largest weight of its row (at least the smallest number that
    the type can hold): less than the rounding error of the row's dot product in float32.
    """
    short = nonzeros(weight, m) < n  # (out, groups)
    if not bool(short.any()):
        return weight, 0
    # subnormal numbers slow some processors down; float16 has no room to avoid them
    floor = 2.0**-24 if weight.dtype == torch.float16 else torch.finfo(weight.dtype).smallest_normal
    tiny = (weight.abs().amax(1).float() * 2.0**-24).clamp_min(floor)  # (out,)
    filled = weight.clone()
    groups = filled.reshape(weight.shape[0], -1, m)
    lacking = groups[short]  # (k, m)
    wanted = _top((lacking != 0).to(torch.float32), n) & (lacking == 0)
    values = tiny.to(weight.dtype)[short.nonzero()[:, 0]].unsqueeze(1).expand_as(lacking)
    groups[short] = torch.where(wanted, values, lacking)
    return filled, int(wanted.sum())


def check_pattern(name: str, weight: Tensor, n: int, m: int) -> None:  # weight: (out, in)
    """Raise CheckFailed unless every aligned group of m has exactly n nonzeros."""
    columns = weight.shape[1]
    if columns % m:
        raise CheckFailed(f"`{name}` has {columns} inputs, which {m} does not divide")
    counts = nonzeros(weight, m)
    wrong = (counts != n).nonzero()
    if len(wrong):
        row, group = (int(i) for i in wrong[0])
        raise CheckFailed(
            f"`{name}` has {int(counts[row, group])} nonzeros in row {row}, inputs {group * m} to "
            f"{group * m + m - 1}, expected {n} ({len(wrong)} of {counts.numel()} groups differ)"
        )
