"""compress:magnitude against masks worked out by hand."""

import torch

from edgesft.core.signals import Statistics
from edgesft.methods.compress.magnitude import Magnitude

torch.set_num_threads(1)


def test_two_of_four_by_hand() -> None:
    weight = torch.tensor([[0.1, -0.4, 0.3, -0.2, 5.0, 0.0, -6.0, 0.5]])
    expected = torch.tensor([[0.0, -0.4, 0.3, 0.0, 5.0, 0.0, -6.0, 0.0]])
    assert torch.equal(Magnitude().compress("w", weight, Statistics()), expected)


def test_one_of_four_keeps_one() -> None:
    weight = torch.tensor([[0.1, -0.4, 0.3, -0.2]])
    expected = torch.tensor([[0.0, -0.4, 0.0, 0.0]])
    assert torch.equal(Magnitude(pattern="1:4").compress("w", weight, Statistics()), expected)


def test_without_a_pattern_the_whole_matrix_is_compared() -> None:
    weight = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    new = Magnitude(pattern=None, density=0.5).compress("w", weight, Statistics())
    assert torch.equal(new, torch.tensor([[0.0, 0, 0, 0], [5, 6, 7, 8]]))


def test_dropped_entries_are_plus_zero() -> None:
    new = Magnitude().compress("w", -torch.arange(1.0, 5).reshape(1, 4), Statistics())
    assert not torch.signbit(new[new == 0]).any()


def test_reads_no_data() -> None:
    assert Magnitude.needs == frozenset()
