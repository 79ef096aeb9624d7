"""The noise of the perturbation: its numbers, its statistics, and native code against the reference."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from edgesft.core.protocols import Mask
from edgesft.kernels import dispatch, perturb
from edgesft.kernels.perturb import reference

NATIVE = next(each for each in dispatch.implementations("perturb") if each.name == "native")
REFERENCE = dispatch.implementations("perturb")[-1]
LAWS = [("gaussian", 0), ("rademacher", 0), ("low-rank", 1), ("low-rank", 3)]
# of seed 1, tensor 2: 64 signs, the rounding words of entries 3 and 4, a matrix of rank 2
SIGNS = 0x874485266F33D4F5
ROUNDING = [1754801499, 975649627]
LOW_RANK = [0.3606534004211426, -0.08780796080827713, 0.5939630270004272, 0.9084873795509338]

needs_compiler = pytest.mark.skipif(not NATIVE.state()[0], reason=NATIVE.state()[1])


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bits(x):
    return x.contiguous().view({4: torch.int32, 2: torch.int16, 8: torch.int64}[x.element_size()])


# --- the generator ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(  # the known answers published with Philox4x32-10
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = tuple(torch.tensor([int(w, 16)]) for w in counter.split())
    k0, k1 = (int(w, 16) for w in key.split())
    found = reference.philox(words, (k0, k1))
    assert [f"{int(w):08x}" for w in found] == expected.split()


def test_noise_never_changes():
    """Stored trajectories are replayed with these numbers: a change here breaks every one of them."""
    found = reference.noise(6, seed=1, tensor=2, start=0)
    signs = perturb.noise((64,), 1, 2, law="rademacher") < 0
    assert sum(bit << i for i, bit in enumerate(signs.tolist())) == SIGNS
    assert reference.random_words(2, seed=1, tensor=2, start=3, device="cpu").tolist() == ROUNDING
    assert perturb.noise((2, 2), 1, 2, law="low-rank", rank=2).view(-1).tolist() == LOW_RANK
    expected = "-0x1.b727cep-2 0x1.20740ep-3 0x1.9fa8fap+0 0x1.a2551p-2 0x1.00c436p-1 -0x1.48b604p-1"
    assert found.tolist() == [float.fromhex(v) for v in expected.split()]


def exact(words, turns):
    """Box-Muller in float64 from the same words; the mapping of the module's docstring."""
    u = ((words >> 1).double() + 0.5) / 2**31
    low = turns & 0x3FFFFFFF
    angle = (low - ((low & 0x20000000) << 1)).double() * (math.pi / 2**31)
    sign = 1.0 - 2.0 * (turns >> 31).double()
    cosine, sine = sign * angle.cos(), angle.sin()
    swap = (turns & 0x40000000) != 0
    r = (-2 * u.log()).sqrt()
    return torch.stack((r * torch.where(swap, sine, cosine), r * torch.where(swap, cosine, sine))), r


def test_accuracy_against_float64():
    generator = torch.Generator().manual_seed(3)
    words, turns = torch.randint(0, 2**32, (2, 1 << 20), generator=generator)
    expected, r = exact(words, turns)
    error = (torch.stack(reference.normal_pair(words, turns)).double() - expected).abs()
    assert float((error > 1e-6).double().mean()) < 1e-3
    assert torch.all(error < 1.5e-6 + 6e-8 / r)
    words >>= torch.randint(0, 32, (1 << 20,), generator=generator)  # the tails
    expected, r = exact(words, turns)
    error = (torch.stack(reference.normal_pair(words, turns)).double() - expected).abs()
    assert float(r.max()) > 6
    assert torch.all(error < 1.5e-6 + 6e-8 / r)


def test_extreme_words_give_finite_normals():
    edge = [0, 1, 2, 3, 0x3FFFFFFF, 0x40000000, 0x7FFFFFFF, 0x80000000, 0xC0000000, 0xFFFFFFFE, 0xFFFFFFFF]
    words, turns = (
        g.reshape(-1) for g in torch.meshgrid(torch.tensor(edge), torch.tensor(edge), indexing="ij")
    )
    for z in reference.normal_pair(words, turns):
        assert torch.isfinite(z).all()
        assert z.abs().max() < 6.67
    assert float(reference.radius(torch.tensor([0]))) == pytest.approx(math.sqrt(64 * math.log(2)), rel=1e-6)
    assert float(reference.radius(torch.tensor([0xFFFFFFFF]))) == 0.0


def test_noise_is_standard_normal():
    n = 1 << 22
    z = perturb.noise((n,), 12345, 678).double().numpy()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs(stats.skew(z)) < 5 * math.sqrt(6 / n)
    assert abs(stats.kurtosis(z)) < 5 * math.sqrt(24 / n)
    for limit in (1, 2, 3, 4, 5):
        expected = 2 * stats.norm.sf(limit)
        found = np.count_nonzero(np.abs(z) > limit) / n
        assert abs(found - expected) < 5 * math.sqrt(expected / n)
    assert stats.kstest(z[: 1 << 18], "norm").pvalue > 1e-4


def correlation(a, b):
    return float(np.corrcoef(a, b)[0, 1])


def test_noise_is_independent():
    n = 1 << 18
    limit = 5 / math.sqrt(n)

    def z(seed=7, tensor=1, start=0):
        return perturb.noise((n,), seed, tensor, start=start).double().numpy()

    base = z()
    others = [z(seed=8), z(seed=7 + 2**32), z(tensor=2), z(tensor=1 + 2**31), z(start=n), z(start=2**34)]
    for other in others:
        assert abs(correlation(base, other)) < limit
        assert abs(correlation(base**2, other**2)) < limit
    for lag in (1, 2, 3, 4, 64, 512):  # within and across the blocks of four
        assert abs(correlation(base[:-lag], base[lag:])) < limit
        assert abs(correlation(base[:-lag] ** 2, base[lag:] ** 2)) < limit


def test_noise_depends_on_the_index_alone():
    whole = perturb.noise((5000,), -9, 3)
    assert torch.equal(bits(whole), bits(perturb.noise((50, 100), -9, 3).view(-1)))
    for start, count in ((1, 1), (3, 2), (510, 5), (1023, 2000), (4999, 1)):
        assert torch.equal(
            bits(whole[start : start + count]), bits(perturb.noise((count,), -9, 3, start=start))
        )
    assert perturb.noise((0,), 1, 1).shape == (0,)
    assert perturb.noise((), 1, 1).shape == ()


def test_seeds_wrap_at_64_bits():
    assert torch.equal(perturb.noise((9,), -1, 5), perturb.noise((9,), 2**64 - 1, 5 + 2**32))
    assert not torch.equal(perturb.noise((9,), -1, 5), perturb.noise((9,), 2**32 - 1, 5))


def test_tensor_id_is_stable():
    assert perturb.tensor_id("model.layers.0.self_attn.q_proj.weight") == 0xFDD6D894
    names = [f"model.layers.{i}.mlp.{p}.weight" for i in range(200) for p in ("up_proj", "down_proj")]
    assert len({perturb.tensor_id(n) for n in names}) == len(names)


@pytest.mark.parametrize(("law", "rank"), [("rademacher", 0), ("low-rank", 1), ("low-rank", 8)])
def test_other_laws_have_mean_0_and_variance_1(law, rank):
    out, width = 1024, 2048
    found = []
    for seed in range(3):
        z = perturb.noise((out, width), seed, 3, law=law, rank=rank).double()
        found.append((float(z.mean()), float((z**2).mean())))
    # entries of u v^T share factors: sqrt(1/out + 1/width) is the order of the variance's deviation
    free = out * width if law == "rademacher" else out / 2
    for mean, square in found:
        assert abs(mean) < 5 / math.sqrt(free)
        assert abs(square - 1) < 5 * math.sqrt(2 / free)
    if law == "rademacher":
        assert set(z.view(-1)[:1000].tolist()) == {1.0, -1.0}
        assert all(square == 1 for _, square in found)


def test_low_rank_noise_is_a_product_of_gaussian_factors():
    u = perturb.noise((30, 3), 5, 9 ^ 0x75).double()
    v = perturb.noise((20, 3), 5, 9 ^ 0x76).double()
    z = perturb.noise((30, 20), 5, 9, law="low-rank", rank=3)
    torch.testing.assert_close(z.double(), u @ v.t() / math.sqrt(3), rtol=1e-5, atol=1e-6)
    assert torch.linalg.matrix_rank(z.double(), rtol=1e-5) == 3


def test_domains_are_independent():
    n = 1 << 17
    limit = 5 / math.sqrt(n)
    gaussian = perturb.noise((n,), 7, 1).double().numpy()
    signs = perturb.noise((n,), 7, 1, law="rademacher").double().numpy()
    rounding = reference.random_words(n, seed=7, tensor=1, start=0, device="cpu").double().numpy()
    share = reference.chosen(n, mask=Mask(keep=100, seed=7), tensor=1, start=0, device="cpu").double().numpy()
    left = perturb.noise((n, 1), 7, 1 ^ 0x75).view(-1).double().numpy()
    values = [gaussian, np.abs(gaussian), signs, rounding, share, left]
    for i, a in enumerate(values):
        for b in values[:i]:
            if not (a is values[1] and b is values[0]):
                assert abs(correlation(a, b)) < limit
    for lag in (1, 2, 31, 32, 64, 128, 2048):
        assert abs(correlation(signs[:-lag], signs[lag:])) < limit
        assert abs(correlation(share[:-lag], share[lag:])) < limit


def test_a_mask_keeps_its_share():
    n = 1 << 18
    for keep in (0, 1, 64, 200, 255):
        mask = Mask(keep=keep, seed=3)
        found = int(reference.chosen(n, mask=mask, tensor=1, start=0, device="cpu").sum())
        assert abs(found - n * keep / 256) <= 5 * math.sqrt(n * keep / 256)


@pytest.mark.parametrize(("law", "rank"), LAWS)
def test_every_law_depends_on_the_index_alone(law, rank):
    whole = perturb.noise((50, 103), -9, 3, law=law, rank=rank).view(-1)
    for start, rows in ((103, 1), (206, 12), (103 * 30, 20)):
        part = perturb.noise((rows, 103), -9, 3, start=start, law=law, rank=rank).view(-1)
        assert torch.equal(bits(whole[start : start + rows * 103]), bits(part))


def test_wrong_laws_are_refused():
    with pytest.raises(ValueError, match="`cauchy`"):
        perturb.noise((3, 3), 1, 1, law="cauchy")
    with pytest.raises(ValueError, match="rank is 0"):
        perturb.noise((3, 3), 1, 1, law="low-rank")
    with pytest.raises(ValueError, match="needs a matrix"):
        perturb.noise((9,), 1, 1, law="low-rank", rank=2)


# --- native against the reference ---------------------------------------------------------------------------


@needs_compiler
def test_native_is_in_use():
    assert NATIVE.fits()
    for dtype in (torch.float32, torch.bfloat16):
        assert dispatch.pick("perturb", torch.empty(3, dtype=dtype)) is NATIVE
    assert dispatch.pick("perturb", torch.empty(3, dtype=torch.float16)) is REFERENCE
    assert dispatch.pick("perturb", torch.empty(4, 3).t()) is REFERENCE
    assert dispatch.pick("perturb", torch.empty(3), torch.empty(3, dtype=torch.float16)) is REFERENCE


@needs_compiler
@pytest.mark.parametrize("start", [0, 1, 127, 511, 2047, 2**34 - 1000, 2**39 - 1000, 2**40 + 17])
@pytest.mark.parametrize("seed", [0, -1, -(2**63), 0x123456789ABCDEF])
@pytest.mark.parametrize(("law", "rank"), LAWS)
def test_native_noise_has_the_bits_of_the_reference(law, rank, seed, start):
    if law == "low-rank":
        start %= 100_000
    found = torch.empty(3001)
    options = {"seed": seed, "tensor": 0xFFFFFFFF - start % 7, "start": start, "law": law, "rank": rank}
    NATIVE.noise(found, width=37, **options)
    expected = reference.noise(3001, width=37, **options)
    assert torch.equal(bits(found), bits(expected))


@needs_compiler
def test_native_noise_has_the_bits_of_the_reference_at_length():
    n = 1 << 20
    options = {"seed": 99, "tensor": 4, "start": 0, "law": "gaussian", "rank": 0, "width": 1}
    found, expected = torch.empty(n), torch.empty(n)
    NATIVE.noise(found, **options)
    REFERENCE.noise(expected, **options)
    assert torch.equal(bits(found), bits(expected))


@needs_compiler
def test_one_openmp_runtime_in_the_process():
    assert NATIVE.fits()
    try:
        with open("/proc/self/maps", encoding="utf-8") as file:
            mapped = {line.split()[-1] for line in file if "libgomp" in line or "libomp" in line}
    except OSError:
        pytest.skip("no /proc")
    torch_own = {path for path in mapped if "/torch" in path}
    assert not torch_own or mapped == torch_own
