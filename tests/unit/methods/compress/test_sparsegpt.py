"""compress:sparsegpt: the checks of its paper, and its update against least squares."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgesft.core import nm
from edgesft.core.catalog import runtime
from edgesft.core.errors import ArtifactError
from edgesft.core.signals import Statistics
from edgesft.methods.compress.magnitude import Magnitude
from edgesft.methods.compress.sparsegpt import SparseGPT
from edgesft.methods.compress.wanda import Wanda

torch.set_num_threads(1)


def of(inputs: Tensor) -> Any:  # (tokens, in)
    return SimpleNamespace(
        input_sq=lambda name: inputs.square().mean(0),
        hessian=lambda name: inputs.T @ inputs * (2 / len(inputs)),
    )


def correlated(width: int, tokens: int, seed: int = 0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width // 2, generator=rng) @ torch.randn(width // 2, width, generator=rng)
    mix = mix / width + 0.3 * torch.eye(width)
    sizes = torch.logspace(-1, 1, width)[torch.randperm(width, generator=rng)]
    return torch.randn(tokens, width, generator=rng) @ mix * sizes


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(40, 64, generator=torch.Generator().manual_seed(1))


def error(inputs: Tensor, weight: Tensor, new: Tensor) -> float:
    return float((inputs @ (weight - new).T).square().sum() / (inputs @ weight.T).square().sum())


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", None])
def test_an_identity_hessian_gives_magnitude_and_changes_no_kept_weight(
    weight: Tensor, pattern: str | None
) -> None:
    signals: Any = SimpleNamespace(hessian=lambda name: torch.eye(64))
    new = SparseGPT(pattern=pattern).compress("w", weight, signals)
    torch.testing.assert_close(
        new, Magnitude(pattern=pattern).compress("w", weight, Statistics()), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_width_of_a_block_changes_nothing_but_speed(weight: Tensor, precision: Any) -> None:
    signals = of(correlated(64, 512))
    results = [
        SparseGPT(block=block, precision=precision).compress("w", weight, signals)
        for block in (3, 16, 32, 64, 128)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-5, rtol=0)


def test_output_error_orders_sparsegpt_wanda_magnitude(weight: Tensor) -> None:
    for seed in range(3):
        inputs = correlated(64, 1024, seed)
        signals = of(inputs)
        sparsegpt = error(inputs, weight, SparseGPT().compress("w", weight, signals))
        wanda = error(inputs, weight, Wanda().compress("w", weight, signals))
        magnitude = error(inputs, weight, Magnitude().compress("w", weight, signals))
        assert sparsegpt < 0.8 * wanda
        assert wanda < 0.8 * magnitude


def test_one_drop_is_made_up_for_as_least_squares_would() -> None:
    """With one column dropped first, the update is the exact optimum of the remaining ones (OBS, 1992)."""
    inputs = correlated(8, 400).double()
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(3)).double()
    hessian = inputs.T @ inputs * (2 / len(inputs))
    weight[:, 0] = 1e-3  # the cheapest by far, in every row
    damped = hessian + 1e-12 * hessian.diagonal().mean() * torch.eye(8).double()
    signals: Any = SimpleNamespace(hessian=lambda name: hessian)
    sparse = SparseGPT(pattern="7:8", damping=1e-12, precision="float64").compress("w", weight, signals)
    rest = damped[1:, 1:]
    shift = torch.linalg.solve(rest, damped[1:, :1] @ weight[:, :1].T).T
    assert (sparse[:, 0] == 0).all()
    torch.testing.assert_close(sparse[:, 1:], weight[:, 1:] + shift, atol=1e-9, rtol=1e-6)


def test_the_mask_follows_the_weights_as_they_change(weight: Tensor) -> None:
    """Compensation must be able to move a later group's mask away from the one of the first weights."""
    inputs = correlated(64, 512)
    signals = of(inputs)
    swept = SparseGPT().compress("w", weight, signals) != 0
    hessian = signals.hessian("w") + 0.01 * signals.hessian("w").diagonal().mean() * torch.eye(64)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    static = nm.keep_groups((weight / factor.diagonal()).square(), 2, 4)
    assert torch.equal(swept[:, :4], static[:, :4])
    assert not torch.equal(swept, static)


def test_damping_is_raised_until_the_factor_exists(weight: Tensor) -> None:
    inputs = correlated(64, 4)  # rank 4 of 64
    indefinite = inputs.T @ inputs / 2
    indefinite -= 0.05 * indefinite.diagonal().mean() * torch.eye(64)
    new = SparseGPT().compress("w", weight, SimpleNamespace(hessian=lambda name: indefinite))  # type: ignore[arg-type]
    assert new.isfinite().all()
    nm.check_pattern("w", new, 2, 4)


def test_a_hessian_beyond_repair_is_refused(weight: Tensor) -> None:
    bad = -torch.ones(64, 64) * 1e3 + torch.eye(64)
    with pytest.raises(ArtifactError, match="no positive definite Hessian"):
        SparseGPT().compress("layer", weight, SimpleNamespace(hessian=lambda name: bad))  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match="of `layer` are not finite"):
        SparseGPT().compress(
            "layer",
            weight,
            SimpleNamespace(hessian=lambda name: bad * float("nan")),  # type: ignore[arg-type]
        )


def test_silent_inputs_go_first_and_are_not_compensated(weight: Tensor) -> None:
    inputs = correlated(64, 512)
    inputs[:, [5, 6]] = 0
    new = SparseGPT().compress("w", weight, of(inputs))
    assert (new[:, [5, 6]] == 0).all()
    assert torch.equal(new[:, [4, 7]] != 0, torch.ones(40, 2, dtype=torch.bool))


def test_the_hessian_is_not_modified(weight: Tensor) -> None:
    inputs = correlated(64, 512)
    hessian = inputs.T @ inputs
    before = hessian.clone()
    SparseGPT().compress("w", weight, SimpleNamespace(hessian=lambda name: hessian))  # type: ignore[arg-type]
    assert torch.equal(hessian, before)


def test_unstructured_compares_within_a_block_of_columns(weight: Tensor) -> None:
    new = SparseGPT(pattern=None, density=0.25, block=16).compress("w", weight, of(correlated(64, 512)))
    for begin in range(0, 64, 16):
        assert int((new[:, begin : begin + 16] != 0).sum()) == nm.kept(40 * 16, 0.25)


def test_what_is_kept_is_codes_of_one_scale_in_each_group() -> None:
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(2))
    made = SparseGPT(quantize="int4", group=32).compress("w", weight, of(correlated(96, 512)))
    assert int(made.reshape(24, -1, 4).ne(0).sum(-1).max()) <= 2
    for group in made.reshape(-1, 32):
        kept = group[group != 0]
        steps = [kept / (kept.abs().min() / n) for n in range(1, 9)]  # its smallest is 1 to 8 steps
        fits = [s for s in steps if (s - s.round()).abs().max() < 1e-3]
        assert any(s.max() - s.min() <= 15 for s in fits)


@pytest.mark.parametrize(("quantize", "bits"), [("int4", 4), ("int8", 8)])
def test_rounding_in_the_sweep_beats_rounding_after_it(quantize: Any, bits: int) -> None:
    scales = runtime("kernels.nm_matmul.scales")
    inputs = correlated(128, 1024)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    pruned = SparseGPT().compress("w", weight, of(inputs))
    found = scales.search_scales(pruned.numpy(), bits, 32)
    after = torch.from_numpy(scales.values(scales.codes(pruned.numpy(), found, bits, 32), found, 32))
    together = SparseGPT(quantize=quantize, group=32).compress("w", weight, of(inputs))
    # what pruning costs is in both
    lost = [error(inputs, weight, new) - error(inputs, weight, pruned) for new in (together, after)]
    assert lost[0] < 0.7 * lost[1] if bits == 4 else lost[0] < 0.01


def test_an_export_finds_the_codes_again() -> None:
    scales = runtime("kernels.nm_matmul.scales")
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(2))
    made = SparseGPT(quantize="int4", group=32).compress("w", weight, of(correlated(256, 1024))).numpy()
    found = scales.search_scales(made, 4, 32)
    back = scales.values(scales.codes(made, found, 4, 32), found, 32)
    exact = np.isclose(back, made, rtol=2e-3, atol=0).reshape(-1, 32).all(1)
    assert exact.mean() > 0.99


@pytest.mark.parametrize("block", [3, 64, 128])
def test_the_width_of_a_block_changes_no_code_either(weight: Tensor, block: int) -> None:
    signals = of(correlated(64, 512))
    made = SparseGPT(block=block, quantize="int4", precision="float64").compress("w", weight, signals)
    other = SparseGPT(block=256, quantize="int4", precision="float64").compress("w", weight, signals)
    torch.testing.assert_close(made, other, atol=1e-5, rtol=0)
