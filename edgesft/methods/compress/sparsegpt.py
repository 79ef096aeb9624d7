"""Drop weights column by column and let the columns to come make up for each loss.

Paper: SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot (2023), algorithm 1.
With H = (2 / n) sum x x^T and U the upper Cholesky factor of its inverse, the weight W[i, j] costs
(W[i, j] / U[j, j])^2 to drop, and the rest of row i moves by -W[i, j] / U[j, j] * U[j, j:]. The mask of
a group is chosen when the sweep reaches it, from the weights as they are by then.
Costs a matrix (in, in) a layer, O(in^3) to factor it and O(out * in^2) for the sweep.

With `quantize` what is kept is rounded in the same sweep (section 3.5 of the paper): the columns to come make
up for the rounding too. The scale of a group is found when the sweep enters it, by a search that weighs an
error as the sweep does.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from edgesft.core import nm
from edgesft.core.catalog import runtime
from edgesft.core.errors import ArtifactError
from edgesft.core.method import Method, method
from edgesft.core.params import Density
from edgesft.core.protocols import Signals

RETRIES = 6


@method
class SparseGPT(Method):
    """pattern: N:M; without one (`none`) `density` says how much of each block of columns is kept.

    damping: share of the mean of H's diagonal that is added to it; ten times more on each failure to factor.
    block: columns between two updates of everything to their right. It changes the speed only, except
    without a pattern, where it is also the set of columns within which scores are compared.
    precision: of H, its factor and the sweep.
    quantize: round what is kept to codes of one scale a row and `group` columns. `export` finds these codes
    again at the same precision, if its `group` is half of this one (2:4 keeps so many of them); a checkpoint
    in bfloat16 holds them to its own precision.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    pattern: nm.OptionalPattern = "2:4"
    density: Density = 0.5
    damping: Annotated[float, Field(gt=0, le=1, description="added to the diagonal, of its mean")] = 0.01
    block: Annotated[int, Field(ge=1, le=65_536, description="columns between two lazy updates")] = 128
    precision: Annotated[
        Literal["float32", "float64"], Field(description="of H, its factor and the sweep")
    ] = "float32"
    quantize: Annotated[
        Literal["none", "int8", "int4"], Field(description="round the kept weights in the same sweep")
    ] = "none"
    group: Annotated[Literal[32, 64, 128, 256], Field(description="columns that share a scale")] = 64

    def compress(self, name: str, weight: Tensor, signals: Signals) -> Tensor:  # (out, in) -> (out, in)
        hessian = signals.hessian(name).to(getattr(torch, self.precision), copy=True)
        dead = hessian.diagonal() == 0  # (in,)
        factor = _factor(name, hessian, dead, self.damping)
        swept = self._sweep(weight.to(hessian.dtype, copy=True), factor, dead)
        return swept.to(weight.dtype)

    def _sweep(self, W: Tensor, U: Tensor, dead: Tensor) -> Tensor:  # (out, in), (in, in), (in,)
        shape = nm.split_pattern(self.pattern)
        group = shape[1] if shape else 1
        if W.shape[1] % group:
            raise ValueError(f"{W.shape[1]} inputs cannot be divided into groups of {group}")
        if self.quantize != "none":
            group = math.lcm(group, self.group)
        width = -(-self.block // group) * group  # no group may straddle two blocks
        for begin in range(0, W.shape[1], width):
            end = min(begin + width, W.shape[1])
            part = W[:, begin:end].T.contiguous()  # (width, out): a column of W lies in one piece
            errors = self._sweep_block(part, U[begin:end, begin:end].contiguous(), dead[begin:end])
            W[:, begin:end] = part.T
            W[:, end:].addmm_(errors.T, U[begin:end, end:], alpha=-1)
        return W

    def _sweep_block(self, part: Tensor, U: Tensor, dead: Tensor) -> Tensor:
        """Prune `part` (width, out) in place; the errors (width, out) that later columns absorb."""
        shape = nm.split_pattern(self.pattern)
        diagonal = U.diagonal()
        errors = torch.empty_like(part)
        if shape is None:
            drop = ~nm.keep_matrix(_scores(part, diagonal, dead), self.density)
        else:
            drop = torch.zeros_like(part, dtype=torch.bool)
        rounding = None if self.quantize == "none" else _Rounding(self.quantize, self.group)
        for i in range(len(part)):
            if rounding is not None and i % self.group == 0:
                inside = slice(i, i + self.group)
                gone = (
                    drop[inside]
                    if shape is None
                    else _ahead(part[inside], diagonal[inside], dead[inside], shape)
                )
                rounding.enter(part[inside].masked_fill(gone, 0.0), diagonal[inside])
            if shape is not None and i % shape[1] == 0:
                j = i + shape[1]
                scores = _scores(part[i:j], diagonal[i:j], dead[i:j])
                drop[i:j] = ~nm.keep_groups(scores.T, *shape).T
            kept = part[i] if rounding is None else rounding(part[i])
            kept = kept.masked_fill(drop[i], 0.0)
            errors[i] = (part[i] - kept) / diagonal[i]
            part[i] = kept
            part[i + 1 :].addr_(U[i, i + 1 :], errors[i], alpha=-1)
        return errors


class _Rounding:
    """To whole codes of a scale for each output, found anew for every group of columns."""

    def __init__(self, quantize: str, group: int) -> None:
        self._bits, self._group = {"int4": 4, "int8": 8}[quantize], group
        self._least, self._most = {"int4": (-8, 7), "int8": (-127, 127)}[quantize]

    def enter(self, part: Tensor, diagonal: Tensor) -> None:  # (width, out), (width,)
        """Find the scales for the weights that a group is likely to keep."""
        search = runtime("kernels.nm_matmul.scales").search_scales
        importance = diagonal.float().pow(-2)
        found = search(
            part.T.float().contiguous().numpy(), self._bits, 0, (importance / importance.max()).numpy()
        )
        self._scale = torch.from_numpy(found[:, 0]).to(part.dtype)  # (out,)

    def __call__(self, column: Tensor) -> Tensor:  # (out,) -> (out,)
        codes = (column / self._scale).nan_to_num(0.0, 0.0, 0.0).round().clamp(self._least, self._most)
        return codes * self._scale


def _ahead(part: Tensor, diagonal: Tensor, dead: Tensor, shape: tuple[int, int]) -> Tensor:
    """What the groups of `part` (width, out) would drop if nothing moved any more."""
    return ~nm.keep_groups(_scores(part, diagonal, dead).T, *shape).T


def _scores(part: Tensor, diagonal: Tensor, dead: Tensor) -> Tensor:  # (k, out), (k,), (k,) -> (k, out)
    """Cost of dropping each entry: 0 for an input that was never seen, less for what is zero already."""
    scores = (part / diagonal.unsqueeze(1)).square().masked_fill(dead.unsqueeze(1), 0.0)
    return nm.below_all(scores, part == 0)


def _factor(name: str, hessian: Tensor, dead: Tensor, damping: float) -> Tensor:  # (in, in), (in,)
    """Upper Cholesky factor of the inverse of the damped `hessian`, which is overwritten.

    An input that was never seen gets the mean of the others on the diagonal: it is uncorrelated with all,
    so the value only has to keep the matrix well scaled. Raises ArtifactError if H is not finite, or if no
    damping up to 10^6 times the asked one makes it positive definite.
    """
    diagonal = hessian.diagonal()
    if not bool(hessian.isfinite().all()):
        raise ArtifactError(f"the calibration inputs of `{name}` are not finite")
    live = diagonal[~dead]
    mean = float(live.mean()) if len(live) else 1.0
    diagonal[dead] = mean
    added = 0.0
    for attempt in range(RETRIES + 1):
        wanted = damping * 10**attempt * mean
        diagonal += wanted - added
        added = wanted
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if int(failed):
            continue
        upper: Tensor
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed) and bool(upper.isfinite().all()):
            return upper
    raise ArtifactError(
        f"the calibration inputs of `{name}` give no positive definite Hessian, damped up to {wanted:.3g}",
        "calibrate on more text, or raise `compress.damping`",
    )
