import math
import subprocess
import sys

import pytest
import torch

from edgesft.core.protocols import Shift
from edgesft.kernels import perturb
from edgesft.methods.estimate.spsa import Spsa

torch.set_num_threads(1)
A = torch.randn(20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
A = A @ A.T / 20
THETA = {"layer.x": torch.linspace(-1, 1, 20, dtype=torch.float64)}


def z(seed):
    return perturb.noise((20,), seed, perturb.tensor_id("layer.x")).double()


def loss(shift: Shift | None):
    v = THETA["layer.x"] if shift is None else THETA["layer.x"] + shift.scale * z(shift.seed)
    return 0.5 * v @ A @ v


@pytest.mark.parametrize("eps", [1e-3, 0.1, 1.0])
def test_scalar_is_the_directional_derivative_for_any_eps(eps):
    """On a quadratic the two-point difference has no error: g = z . (A theta)."""
    found = Spsa(eps=eps).gradient(loss, THETA, 7)
    (shift,) = found.shifts
    expected = float(z(shift.seed) @ (A @ THETA["layer.x"]))
    assert shift.scale == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert torch.equal(dict(found.items())["layer.x"], shift.scale * z(shift.seed))


def test_samples_average_independent_directions():
    found = Spsa(samples=8).gradient(loss, THETA, 7)
    assert len({s.seed for s in found.shifts}) == 8
    mean = sum(float(z(s.seed) @ (A @ THETA["layer.x"])) * z(s.seed) for s in found.shifts) / 8
    torch.testing.assert_close(dict(found.items())["layer.x"], mean, rtol=1e-7, atol=1e-9)


def test_two_evaluations_a_sample_at_opposite_shifts():
    seen = []
    Spsa(samples=3, eps=0.5).gradient(lambda s: (seen.append(s), loss(s))[1], THETA, 1)
    assert [s.scale for s in seen] == [0.5, -0.5] * 3
    assert all(a.seed == b.seed for a, b in zip(seen[::2], seen[1::2], strict=True))


# ---------------------------------------------------------------- laws of the noise

LAWS = [
    {"noise": "gaussian"},
    {"noise": "rademacher"},
    {"noise": "low-rank", "rank": 1},
    {"noise": "low-rank"},
]
MATRIX = {"layer.weight": torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5)}


def z_of(shift, shape=(4, 5)):
    tensor = perturb.tensor_id("layer.weight")
    return perturb.noise(shape, shift.seed, tensor, law=shift.law, rank=shift.rank).double()


def matrix_loss(shift: Shift | None):
    v = MATRIX["layer.weight"].flatten()
    if shift is not None:
        v = v + shift.scale * z_of(shift).flatten()
    return 0.5 * v @ A @ v


@pytest.mark.parametrize("values", LAWS, ids=str)
def test_shifts_name_their_law(values):
    seen = []
    found = Spsa(**values, samples=2).gradient(lambda s: (seen.append(s), matrix_loss(s))[1], MATRIX, 1)
    rank = values.get("rank", 2) if values["noise"] == "low-rank" else 0
    assert {(s.law, s.rank) for s in (*seen, *found.shifts)} == {(values["noise"], rank)}
    assert Spsa(**values).whole_only is (rank > 0)


@pytest.mark.parametrize("values", LAWS, ids=str)
def test_first_two_moments_of_the_estimate(values):
    """E[g z] is the gradient; with covariance I, E[g^2] is its squared length. n = 4000: about 5 % each."""
    true = A @ MATRIX["layer.weight"].flatten()
    total, square, count = torch.zeros(20, dtype=torch.float64), 0.0, 4000
    for seed in range(count):
        (shift,) = Spsa(**values).gradient(matrix_loss, MATRIX, seed).shifts
        total += shift.scale * z_of(shift).flatten()
        square += shift.scale**2
    assert torch.cosine_similarity(total, true, dim=0) > 0.99
    assert float(total.norm() / count / true.norm()) == pytest.approx(1, abs=0.1)
    assert square / count == pytest.approx(float(true @ true), rel=0.2)


# ---------------------------------------------------------------- how the losses are asked for


class Both:
    """A loss that counts its passes."""

    def __init__(self, prefers_together, plus=3.0, minus=1.0):
        self.prefers_together, self.values, self.passes = prefers_together, (plus, minus), []

    def __call__(self, shift):
        self.passes.append((shift,))
        return self.values[0 if shift.scale > 0 else 1]

    def together(self, shifts):
        self.passes.append(tuple(shifts))
        return [self.values[0 if shift.scale > 0 else 1] for shift in shifts]


@pytest.mark.parametrize(
    ("two_sided", "prefers", "sizes"),
    [(None, False, [1] * 4), (None, True, [2, 2]), (True, False, [2, 2]), (False, True, [1] * 4)],
)
def test_both_signs_in_one_pass_if_asked_or_preferred(two_sided, prefers, sizes):
    loss = Both(prefers)
    found = Spsa(two_sided=two_sided, samples=2, eps=0.5).gradient(loss, {}, 1)
    assert [len(p) for p in loss.passes] == sizes
    assert [s.scale for s in sum(loss.passes, ())] == [0.5, -0.5] * 2
    assert [s.scale for s in found.shifts] == [1.0, 1.0]
    assert found.loss == 2.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_seen(value):
    found = Spsa().gradient(Both(False, plus=value), {}, 1)
    assert not math.isfinite(found.loss)
    assert not math.isfinite(found.shifts[0].scale)
    assert math.isnan(Spsa().gradient(Both(True, value, value), {}, 1).shifts[0].scale)


@pytest.mark.parametrize("name", ["spsa", "fzoo", "backprop"])
def test_importing_an_estimate_does_not_import_torch(name):
    code = f"import sys, edgesft.methods.estimate.{name}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_mean_of_many_draws_is_the_gradient():
    """Relative error of the mean of n draws in d dimensions is about sqrt(d / n)."""
    total = torch.zeros(20, dtype=torch.float64)
    for seed in range(4000):
        total += dict(Spsa().gradient(loss, THETA, seed).items())["layer.x"]
    true = A @ THETA["layer.x"]
    assert torch.cosine_similarity(total, true, dim=0) > 0.99
    assert float((total / 4000 - true).norm() / true.norm()) < 0.15
