import pytest
import torch

from edgesft.core import catalog
from edgesft.core.errors import UsageError
from edgesft.core.protocols import Mask, Shift
from edgesft.core.quantized.codes import quantize
from edgesft.core.region import Whole
from edgesft.kernels import perturb
from edgesft.methods.delta.quantized_update import QuantizedUpdate

torch.set_num_threads(1)
RNG = torch.Generator()


def weights(out=16, width=48, seed=0):
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * 0.1


def test_catalog_builds_it():
    assert catalog.build("delta", {"use": "quantized-update"}) == QuantizedUpdate()
    assert QuantizedUpdate.in_place
    assert QuantizedUpdate.needs_quantized


def test_theta_is_the_weight():
    w = quantize(weights(), 4, 16)
    method = QuantizedUpdate()
    assert method.init(w, Whole(), RNG) == {}
    torch.testing.assert_close(method.effective(w, Whole(), {}, 0.0), w.dequantize(), rtol=0, atol=0)


def test_float_base_is_refused():
    method = QuantizedUpdate()
    for call in (
        lambda: method.init(weights(), Whole(), RNG),
        lambda: method.effective(weights(), Whole(), {}, 0.0),
    ):
        with pytest.raises(UsageError, match="quantised base") as caught:
            call()
        assert "base=int8" in caught.value.hint


@pytest.mark.parametrize("bits", [8, 4])
def test_mean_movement_is_the_float_step(bits):
    """The mean over rounding seeds of w' - w is c z; nearest rounding would not move at all."""
    start = quantize(weights(), bits, 16)
    before, z = start.dequantize(), perturb.noise((16, 48), 7, 3)
    scales = start.scales.float().abs().repeat_interleave(16, 1)
    length = 0.1 * float(scales.median())
    inside = before.abs() < scales * (125 if bits == 8 else 5)  # no end of a range within reach
    room = inside & (z.abs() * length < 0.5 * scales)
    runs, total = 400, torch.zeros_like(before)
    for seed in range(runs):
        w = start.clone()
        active = perturb.descend_(w, shifts=[Shift(7, length)], tensor=3, mask=Mask(), rounding=seed)
        assert active == w.numel()
        moved = w.dequantize() - before
        total += moved
        steps = (moved / scales)[room]
        assert float((steps - steps.round()).abs().max()) < 1e-3  # from code to code
    # an entry moves by s with probability |c z| / s: standard deviation below sqrt(|c z| s / runs)
    error = (total / runs - length * z)[room] / (scales * 0.5 / runs**0.5)[room]
    assert float(error.abs().max()) < 6
    assert float(error.mean().abs()) < 6 / room.sum().sqrt()


@pytest.mark.parametrize("bits", [8, 4])
def test_loss_of_a_quadratic_falls(bits):
    """Two-point estimates on |x (W - target)^T|^2, all steps by stochastic rounding."""
    target, w = weights(8, 32, 1), quantize(weights(8, 32, 2), bits, 16)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(3))

    def loss(shift):
        y = perturb.perturbed_linear(x, w, None, shifts=(shift,), tensor=1, mask=Mask())
        return float((y - x @ target.T).square().mean())

    first, losses = loss(None), []
    for step in range(400):
        g = (loss(Shift(step, 1e-3)) - loss(Shift(step, -1e-3))) / 2e-3
        perturb.descend_(w, shifts=[Shift(step, -1e-2 * g)], tensor=1, mask=Mask(), rounding=step)
        losses.append(loss(None))
    assert min(losses[-50:]) < 0.5 * first
    assert sum(losses[-50:]) / 50 < 0.6 * first
    assert loss(None) == pytest.approx(
        float((x @ (w.dequantize() - target).T).square().mean()), rel=1e-5
    )  # the weight is the codes


def test_replay_gives_the_same_codes():
    runs = []
    for _ in range(2):
        w = quantize(weights(), 4, 16)
        for step in range(20):
            perturb.descend_(w, shifts=[Shift(step, 0.01)], tensor=3, mask=Mask(), rounding=step)
        runs.append(w.codes)
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], quantize(weights(), 4, 16).codes)
