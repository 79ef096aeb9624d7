"""The laws of the axis `compress`, over every method that the catalogue finds."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from edgesft.core import catalog
from edgesft.core.errors import UsageError

torch.set_num_threads(1)

NAMES = catalog.names("compress")
SHAPES = [(16, 32), (5, 64), (48, 16), (1, 8)]


class Fixed:
    """Signals of fixed inputs X (tokens, in); complains about any signal that `needs` does not name."""

    def __init__(self, inputs: Tensor, needs: frozenset[str]) -> None:
        self.inputs, self.needs = inputs, needs

    def _allow(self, signal: str) -> None:
        assert signal in self.needs, f"reads `{signal}`, which `needs` does not name"

    def input_sq(self, name: str) -> Tensor:
        self._allow("input_sq")
        return self.inputs.square().mean(0)

    def hessian(self, name: str) -> Tensor:
        self._allow("hessian")
        return self.inputs.T @ self.inputs * (2 / len(self.inputs))

    def grad_sq(self, name: str) -> Tensor:
        raise AssertionError("one-shot compression has no gradients")

    def previous(self, name: str) -> Tensor:
        raise AssertionError("one-shot compression has no phase before it")


def case(shape: tuple[int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (out, in) and inputs (tokens, in) that are correlated and of very different sizes."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=rng)
    mix = torch.randn(shape[1], shape[1], generator=rng) / shape[1] ** 0.5
    sizes = torch.logspace(-1, 1, shape[1])[torch.randperm(shape[1], generator=rng)]
    return weight, torch.randn(4 * shape[1], shape[1], generator=rng) @ mix * sizes


def compress(name: str, weight: Tensor, inputs: Tensor, **values: object) -> Tensor:
    chosen: Any = catalog.build("compress", {"use": name, **values})
    return chosen.compress("layer", weight, Fixed(inputs, chosen.needs))


def has(name: str, field: str) -> bool:
    found = field in {f.name for f in dataclasses.fields(catalog.load("compress", name))}  # type: ignore[arg-type]
    if not found:
        pytest.skip(f"`compress:{name}` has no field `{field}`")
    return found


def test_the_axis_has_its_one_shot_methods() -> None:
    assert {"magnitude", "wanda", "sparsegpt"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
class TestLaws:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_shape_and_type_stay_and_the_weight_is_not_touched(
        self, name: str, shape: tuple[int, int]
    ) -> None:
        weight, inputs = case(shape)
        before = weight.clone()
        new = compress(name, weight, inputs)
        assert new.shape == weight.shape
        assert new.dtype == torch.float32
        assert torch.equal(weight, before)
        assert new.isfinite().all()

    def test_the_same_request_gives_the_same_bytes(self, name: str) -> None:
        weight, inputs = case((16, 32))
        assert torch.equal(compress(name, weight, inputs), compress(name, weight.clone(), inputs.clone()))

    @pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "4:8", "1:2"])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_exactly_n_of_every_m_stay(self, name: str, pattern: str, shape: tuple[int, int]) -> None:
        assert has(name, "pattern")
        n, m = (int(v) for v in pattern.split(":"))
        weight, inputs = case(shape)
        new = compress(name, weight, inputs, pattern=pattern)
        assert ((new.reshape(shape[0], -1, m) != 0).sum(-1) == n).all()

    def test_silent_inputs_and_zero_weights_cost_no_group_its_count(self, name: str) -> None:
        assert has(name, "pattern")
        weight, inputs = case((16, 32))
        inputs[:, [0, 1, 2, 9, 20, 21]] = 0
        weight[:, [4, 5]] = 0
        weight[3, 28] = 0
        new = compress(name, weight, inputs, pattern="2:4")
        assert ((new.reshape(16, -1, 4) != 0).sum(-1) == 2).all()

    def test_inputs_that_are_all_silent_are_no_accident(self, name: str) -> None:
        assert has(name, "pattern")
        weight, inputs = case((16, 32))
        new = compress(name, weight, torch.zeros_like(inputs), pattern="2:4")
        assert ((new.reshape(16, -1, 4) != 0).sum(-1) == 2).all()
        assert torch.equal(new[new != 0], weight[new != 0])

    def test_fewer_calibration_tokens_than_inputs_are_enough(self, name: str) -> None:
        weight, inputs = case((16, 32))
        assert compress(name, weight, inputs[:3]).isfinite().all()

    def test_the_default_pattern_is_two_of_four(self, name: str) -> None:
        assert has(name, "pattern")
        weight, inputs = case((16, 32))
        assert torch.equal(compress(name, weight, inputs), compress(name, weight, inputs, pattern="2:4"))

    @pytest.mark.parametrize("density", [0.25, 0.5, 0.7])
    @pytest.mark.parametrize("none", [None, "none", ""])
    def test_without_a_pattern_density_is_the_share_kept(
        self, name: str, density: float, none: str | None
    ) -> None:
        assert has(name, "pattern")
        assert has(name, "density")
        weight, inputs = case((16, 64))
        new = compress(name, weight, inputs, pattern=none, density=density)
        assert float((new != 0).float().mean()) == pytest.approx(density, abs=1 / 64)

    def test_density_one_changes_nothing(self, name: str) -> None:
        assert has(name, "density")
        weight, inputs = case((16, 64))
        assert torch.equal(compress(name, weight, inputs, pattern=None, density=1.0), weight)

    @pytest.mark.parametrize("pattern", ["4:2", "0:4", "2-4", "2:400", "x"])
    def test_a_bad_pattern_is_a_usage_error_that_names_the_field(self, name: str, pattern: str) -> None:
        assert has(name, "pattern")
        with pytest.raises(UsageError, match=f"compress:{name}.pattern"):
            catalog.build("compress", {"use": name, "pattern": pattern})

    def test_the_resolved_table_builds_the_same_method(self, name: str) -> None:
        chosen = catalog.build("compress", {"use": name})
        assert catalog.build("compress", catalog.describe("compress", chosen)) == chosen

    def test_inputs_that_m_does_not_divide_are_refused(self, name: str) -> None:
        assert has(name, "pattern")
        weight, inputs = case((4, 10))
        with pytest.raises(ValueError, match="10 inputs"):
            compress(name, weight, inputs, pattern="2:4")
