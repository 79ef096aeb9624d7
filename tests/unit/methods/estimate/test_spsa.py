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


def test_mean_of_many_draws_is_the_gradient():
    """Relative error of the mean of n draws in d dimensions is about sqrt(d / n)."""
    total = torch.zeros(20, dtype=torch.float64)
    for seed in range(4000):
        total += dict(Spsa().gradient(loss, THETA, seed).items())["layer.x"]
    true = A @ THETA["layer.x"]
    assert torch.cosine_similarity(total, true, dim=0) > 0.99
    assert float((total / 4000 - true).norm() / true.norm()) < 0.15
