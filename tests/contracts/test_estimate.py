"""Laws of every method of the axis `estimate`."""

import pytest
import torch

from edgesft.core import catalog
from edgesft.core.protocols import Shift

torch.set_num_threads(1)
NAMES = catalog.names("estimate")
FORWARD_ONLY = [n for n in NAMES if getattr(catalog.load("estimate", n), "forward_only", False)]


class Quadratic:
    """L = 1/2 theta^T A theta + b^T theta over two tensors, float64, at theta or at a shifted theta."""

    prefers_together = False

    def __init__(self, size=6):
        generator = torch.Generator().manual_seed(1)
        root = torch.randn(2 * size, 2 * size, generator=generator, dtype=torch.float64)
        self.A = root @ root.T / (2 * size) + torch.eye(2 * size, dtype=torch.float64)
        self.b = torch.randn(2 * size, generator=generator, dtype=torch.float64)
        self.theta = {
            "one.x": torch.randn(size, generator=generator, dtype=torch.float64),
            "two.x": torch.randn(2, size // 2, generator=generator, dtype=torch.float64),
        }
        self.calls = []

    def noise(self, shift):
        kernel = catalog.runtime("kernels.perturb")

        def z(name, like):
            tensor = kernel.tensor_id(name)
            return kernel.noise(
                tuple(like.shape), shift.seed, tensor, law=shift.law, rank=shift.rank
            ).double()

        return {name: z(name, like) for name, like in self.theta.items()}

    def flat(self, tensors):
        return torch.cat([tensors[k].flatten() for k in self.theta])

    def __call__(self, shift: Shift | None):
        self.calls.append(shift)
        v = self.flat(self.theta)
        if shift is not None:
            v = v + shift.scale * self.flat(self.noise(shift))
        return 0.5 * v @ self.A @ v + self.b @ v

    def together(self, shifts):
        return [float(self(shift)) for shift in shifts]

    @property
    def gradient(self):
        return self.A @ self.flat(self.theta) + self.b


@pytest.mark.parametrize("name", NAMES)
def test_items_name_and_shape_every_tensor(name):
    problem = Quadratic()
    found = catalog.build("estimate", {"use": name}).gradient(problem, problem.theta, 11)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in problem.theta.items()}
    assert isinstance(found.loss, float)


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_that_of_theta(name):
    problem = Quadratic()
    found = catalog.build("estimate", {"use": name}).gradient(problem, problem.theta, 11)
    assert found.loss == pytest.approx(float(problem(None)), rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_theta_is_untouched_and_asks_for_no_gradient(name):
    problem = Quadratic()
    before = {k: v.clone() for k, v in problem.theta.items()}
    dict(catalog.build("estimate", {"use": name}).gradient(problem, problem.theta, 11).items())
    assert all(torch.equal(problem.theta[k], before[k]) for k in before)
    assert not any(v.requires_grad for v in problem.theta.values())


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bytes(name):
    problem = Quadratic()
    estimate = catalog.build("estimate", {"use": name})
    first, second = (dict(estimate.gradient(problem, problem.theta, 11).items()) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", FORWARD_ONLY)
def test_the_same_estimate_from_stacked_passes(name):
    """The losses of these are the same numbers, so the estimate must be too."""
    estimate, alone, stacked = catalog.build("estimate", {"use": name}), Quadratic(), Quadratic()
    stacked.prefers_together = True
    first, second = (estimate.gradient(p, p.theta, 11) for p in (alone, stacked))
    assert (first.shifts, first.loss) == (second.shifts, second.loss)
    assert sorted(map(str, alone.calls)) == sorted(map(str, stacked.calls))


@pytest.mark.parametrize("name", NAMES)
def test_points_along_the_true_gradient_on_average(name):
    problem = Quadratic()
    estimate = catalog.build("estimate", {"use": name})
    total = torch.zeros_like(problem.gradient)
    for seed in range(600):
        total += problem.flat(dict(estimate.gradient(problem, problem.theta, seed).items()))
    cosine = torch.cosine_similarity(total, problem.gradient, dim=0)
    assert cosine > 0.97  # spsa: 1 - 12 dimensions / (2 * 600) = 0.99 expected
