"""N:M masks: exact counts whatever the scores, and the check that says so."""

import pytest
import torch

from edgesft.core import nm
from edgesft.core.errors import CheckFailed

torch.set_num_threads(1)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2), (5, 16)])
def test_keeps_exactly_n_of_m_and_the_highest(n: int, m: int, rng: torch.Generator) -> None:
    scores = torch.rand(7, 48, generator=rng)
    keep = nm.keep_groups(scores, n, m)
    groups = keep.reshape(7, -1, m)
    assert (groups.sum(-1) == n).all()
    kept = scores.reshape(7, -1, m).masked_fill(~groups, 9).amin(-1)
    dropped = scores.reshape(7, -1, m).masked_fill(groups, -9).amax(-1)
    assert (kept > dropped).all()


@pytest.mark.parametrize("value", [0.0, 1.0, float("inf")])
def test_ties_never_change_the_count_and_keep_the_lower_index(value: float) -> None:
    keep = nm.keep_groups(torch.full((3, 8), value), 2, 4)
    assert torch.equal(keep, torch.tensor([True, True, False, False]).repeat(3, 2))


def test_groups_are_aligned_runs_of_inputs() -> None:
    keep = nm.keep_groups(torch.tensor([[1.0, 2, 3, 4, 40, 30, 20, 10]]), 2, 4)
    assert keep.tolist() == [[False, False, True, True, True, True, False, False]]


def test_refuses_inputs_that_m_does_not_divide() -> None:
    with pytest.raises(ValueError, match="10 inputs"):
        nm.keep_groups(torch.rand(2, 10), 2, 4)


@pytest.mark.parametrize(
    ("total", "density", "expected"), [(10, 0.5, 5), (11, 0.5, 6), (10, 0.9, 9), (10, 1.0, 10), (10, 0.01, 1)]
)
def test_number_kept_is_what_floor_leaves(total: int, density: float, expected: int) -> None:
    assert nm.kept(total, density) == expected


def test_rows_and_matrix_differ_in_what_they_compare() -> None:
    scores = torch.tensor([[10.0, 9, 8, 7], [1, 2, 3, 4]])
    assert nm.keep_rows(scores, 0.5).tolist() == [[True, True, False, False], [False, False, True, True]]
    assert nm.keep_matrix(scores, 0.5).tolist() == [[True] * 4, [False] * 4]


def test_entries_already_zero_are_kept_last() -> None:
    weight = torch.tensor([[0.0, 1, 2, 0]])
    scores = torch.tensor([[0.0, 0, 0, 0]])  # an input that was never seen gives ties everywhere
    keep = nm.keep_groups(nm.below_all(scores, weight == 0), 2, 4)
    assert keep.tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fill_gives_every_group_exactly_n(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0, 2, 0, 0, 0, 0, 0, -0.5], [0, 0, 0, 0, 0, 0, 0, 0]], dtype=dtype)
    filled, count = nm.fill_groups(weight, 2, 4)
    assert count == 5
    assert (nm.nonzeros(filled, 4) == 2).all()
    nm.check_pattern("w", filled, 2, 4)
    assert torch.equal(filled[weight != 0], weight[weight != 0])
    assert float(filled[weight == 0].abs().max()) <= 2 * 2.0**-24
    assert (filled.float().abs()[filled != 0] > 0).all()


def test_fill_leaves_a_full_matrix_alone(rng: torch.Generator) -> None:
    weight = torch.randn(4, 16, generator=rng)
    weight = weight * nm.keep_groups(weight.abs(), 2, 4)
    filled, count = nm.fill_groups(weight, 2, 4)
    assert count == 0
    assert filled is weight


def test_fill_never_empties_a_group_that_has_too_many() -> None:
    weight = torch.tensor([[1.0, 2, 3, 0, 0, 0, 0, 1]])
    filled, count = nm.fill_groups(weight, 2, 4)
    assert count == 1
    assert nm.nonzeros(filled, 4).tolist() == [[3, 2]]


def test_check_names_the_first_group_that_is_wrong() -> None:
    weight = torch.tensor([[1.0, 1, 0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1, 1, 0]])
    with pytest.raises(CheckFailed, match=r"`w` has 3 nonzeros in row 1, inputs 4 to 7, expected 2 \(1 of 4"):
        nm.check_pattern("w", weight, 2, 4)
    with pytest.raises(CheckFailed, match="4 does not divide"):
        nm.check_pattern("w", torch.ones(1, 6), 2, 4)


@pytest.mark.parametrize("value", [None, ""])
def test_no_pattern(value: str | None) -> None:
    assert nm.split_pattern(value) is None
    assert nm.split_pattern("4:8") == (4, 8)
