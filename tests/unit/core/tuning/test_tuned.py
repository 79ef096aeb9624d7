import hashlib

import pytest
import torch
from torch import nn

from edgesft.core.protocols import Shift, Update
from edgesft.core.region import Flat, Whole, below, kth_smallest_magnitude
from edgesft.core.tuning.tuned import Tuned
from edgesft.kernels import perturb
from edgesft.methods.delta.lora import Lora
from edgesft.methods.delta.sparse import Sparse

torch.set_num_threads(1)
SHIFT = Shift(123, 0.5)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6, bias=False)).requires_grad_(False)


def tuned_of(model, region=None, delta=None, *, in_place, seed=0):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    regions = {n: region(m.weight) if region else Whole() for n, m in layers.items()}
    return Tuned(model, layers, regions, delta or Sparse(), in_place=in_place, kernel=perturb, seed=seed)


def half(weight):
    return below(kth_smallest_magnitude(weight, weight.numel() // 2))


def digest(model):
    h = hashlib.sha256()
    for p in model.parameters():
        h.update(p.detach().numpy().tobytes())
    return h.hexdigest()


def z(weight, name, seed=SHIFT.seed):
    return perturb.noise(tuple(weight.shape), seed, perturb.tensor_id(name))


@pytest.mark.parametrize("region", [None, half])
def test_in_place_shift_is_weight_plus_masked_noise(model, region):
    x, expected_model = torch.randn(5, 12), [m.weight.clone() for m in (model[0], model[2])]
    for i, name in enumerate(("0.weight", "2.weight")):
        w = expected_model[i]
        mask = half(w).mask(w) if region else torch.ones_like(w)
        expected_model[i] = w + SHIFT.scale * mask * z(w, name)
    hidden = torch.tanh(nn.functional.linear(x, expected_model[0], model[0].bias))
    expected = nn.functional.linear(hidden, expected_model[1])
    with tuned_of(model, region, in_place=True) as tuned, tuned.shifted(SHIFT):
        torch.testing.assert_close(tuned.model(x), expected, rtol=1e-5, atol=1e-5)


def test_weights_are_the_same_bits_between_and_after_the_losses(model):
    before, x = digest(model), torch.randn(5, 12)
    with tuned_of(model, half, in_place=True) as tuned:
        seen = []
        for scale in (1e-3, -1e-3):
            with tuned.shifted(Shift(5, scale)):
                tuned.model(x)
            seen.append(digest(model))
    assert seen == [before, before]


def test_layers_are_put_back(model):
    layers, x = (model[0], model[2]), torch.randn(3, 12)
    plain = model(x)
    with tuned_of(model, in_place=True) as tuned:
        assert model[0] is not layers[0]
        assert torch.equal(tuned.model(x), plain)
    assert (model[0], model[2]) == layers


@pytest.mark.parametrize("samples", [1, 3])
def test_descend_moves_the_region_and_nothing_else(model, samples):
    before = [model[0].weight.clone(), model[2].weight.clone()]
    with tuned_of(model, half, in_place=True) as tuned:
        shifts = tuple(Shift(40 + i, -0.001 * (i + 1)) for i in range(samples))
        active = tuned.descend(Update(shifts))
    assert active == sum(w.numel() // 2 for w in before)
    for w, now, name in zip(
        before, (model[0].weight, model[2].weight), ("0.weight", "2.weight"), strict=True
    ):
        mask = half(w).mask(w)
        step = sum(s.scale * z(w, name, s.seed) for s in shifts)
        assert torch.equal(now[~mask], w[~mask])
        torch.testing.assert_close(now[mask], (w + step)[mask], rtol=1e-6, atol=1e-8)


def test_descend_with_rate_zero_changes_no_bit(model):
    before = digest(model)
    with tuned_of(model, in_place=True) as tuned:
        tuned.descend(Update((Shift(1, 0.0),)))
    assert digest(model) == before


def test_weight_decay_shrinks_active_entries_only(model):
    before = model[0].weight.clone()
    with tuned_of(model, half, in_place=True) as tuned:
        tuned.descend(Update((Shift(1, 0.0),), shrink=0.95))
    mask = half(before).mask(before)
    torch.testing.assert_close(model[0].weight[mask], before[mask] * 0.95)
    assert torch.equal(model[0].weight[~mask], before[~mask])


@pytest.mark.parametrize("delta", [Sparse(), Lora(rank=4)])
def test_beside_the_base_is_frozen_and_a_shift_moves_theta(model, delta):
    before, x = digest(model), torch.randn(5, 12)
    with tuned_of(model, delta=delta, in_place=False) as tuned:
        plain = tuned.model(x)
        with tuned.shifted(SHIFT):
            shifted = tuned.model(x)
        assert not torch.equal(plain, shifted)
        for name, p in tuned.theta.items():
            p.add_(SHIFT.scale * z(p, name))
        torch.testing.assert_close(tuned.model(x), shifted)
    assert digest(model) == before


def test_initial_theta_does_not_depend_on_other_layers(model):
    whole = tuned_of(model, delta=Lora(rank=2), in_place=False, seed=3).theta
    layers = {"2": model[2]}
    alone = Tuned(model, layers, {"2": Whole()}, Lora(rank=2), in_place=False, kernel=perturb, seed=3).theta
    other = tuned_of(model, delta=Lora(rank=2), in_place=False, seed=4).theta
    assert torch.equal(whole["2.A"], alone["2.A"])
    assert not torch.equal(whole["2.A"], other["2.A"])


def test_in_place_needs_a_band(model):
    with pytest.raises(TypeError, match="band"):
        tuned_of(model, lambda w: Flat(torch.arange(3)), in_place=True)


@pytest.mark.parametrize("delta", [None, Lora(rank=4), Sparse()])
def test_several_shifts_in_one_pass_are_those_of_several_passes(model, delta):
    x, shifts = torch.randn(5, 12), (Shift(5, 0.1), Shift(5, -0.1), None, Shift(6, 0.2, "rademacher"))
    with tuned_of(model, half if delta is None else None, delta, in_place=delta is None) as tuned:
        alone = []
        for shift in shifts:
            with tuned.shifted(shift):
                alone.append(tuned.model(x))
        with tuned.shifted(*shifts):
            together = tuned.model(x.repeat(len(shifts), 1)).chunk(len(shifts))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_replay_is_descending_again_and_restore_goes_back(model):
    base = {"0": model[0].weight.clone(), "2": model[2].weight.clone()}
    updates = [Update((Shift(k, 0.01 * k),), shrink=0.99) for k in range(1, 5)]
    with tuned_of(model, half, in_place=True) as tuned:
        tuned._base = base.__getitem__
        before = tuned.digests()
        for update in updates:
            tuned.descend(update)
        moved = tuned.digests()
        tuned.restore()
        assert tuned.digests() == before != moved
        tuned.replay(updates)
        assert tuned.digests() == moved


@pytest.mark.parametrize("compute", ["bf16", "int8"])
def test_lower_precision_takes_part_in_every_product(model, compute):
    x = torch.randn(8, 12)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    plain = model(x)
    tuned = Tuned(
        model, layers, {"2": Whole()}, Sparse(), in_place=True, kernel=perturb, seed=0, compute=compute
    )
    with tuned:
        found = tuned.model(x)
    assert not torch.equal(found, plain)
    torch.testing.assert_close(found, plain, rtol=0.1, atol=0.05)
