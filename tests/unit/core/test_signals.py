"""Calibration statistics against sums made by hand, and the walk over blocks against the model itself."""

import weakref

import pytest
import torch
from torch import Tensor, nn

from edgesft.core import models, signals
from edgesft.core.errors import ArtifactError, UsageError

torch.set_num_threads(1)

BOTH = frozenset({"input_sq", "hessian"})


def tiny(kind: str = "llama") -> nn.Module:
    from transformers import (
        BertConfig,
        BertModel,
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    torch.manual_seed(0)
    common = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**common, num_key_value_heads=2)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**common, num_key_value_heads=2, head_dim=8)),
        "gemma3": lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(
                **common, num_key_value_heads=2, head_dim=8, sliding_window=4, sliding_window_pattern=2
            )
        ),
        "bert": lambda: BertModel(BertConfig(**common)),
    }[kind]()
    return made.eval().requires_grad_(False)


def texts(count: int = 5, length: int = 16) -> Tensor:
    return torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(1))


def inputs_of(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """What every layer is fed when the whole model runs: layer -> (tokens, in)."""
    seen: dict[str, list[Tensor]] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
        for name, layer in models.linears(model).items()
    ]
    with torch.no_grad():
        models.backbone(model)(input_ids=windows)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(found) for name, found in seen.items()}


class TestStatistics:
    def test_are_means_over_all_tokens_of_all_calls(self) -> None:
        layer = nn.Linear(6, 3)
        gathered = signals.Statistics(BOTH)
        calls = [torch.randn(2, 5, 6), torch.randn(1, 5, 6), torch.randn(4, 6)]
        with gathered.listen({"a": layer}):
            for x in calls:
                layer(x)
        layer(torch.randn(9, 6))  # after the context: not counted
        flat = torch.cat([x.reshape(-1, 6) for x in calls])
        assert gathered.tokens("a") == 19
        torch.testing.assert_close(gathered.input_sq("a"), flat.square().mean(0))
        torch.testing.assert_close(gathered.hessian("a"), 2 * flat.T @ flat / 19)

    def test_only_what_is_needed_is_gathered(self) -> None:
        layer = nn.Linear(6, 3)
        gathered = signals.Statistics(frozenset({"input_sq"}))
        with gathered.listen({"a": layer}):
            layer(torch.randn(2, 6))
        gathered.input_sq("a")
        with pytest.raises(LookupError, match="`hessian` of `a` was not gathered"):
            gathered.hessian("a")
        for other in (gathered.grad_sq, gathered.previous):
            with pytest.raises(LookupError):
                other("a")
        assert gathered.tokens("b") == 0

    def test_a_signal_that_no_forward_pass_gives_is_refused_with_the_nearest(self) -> None:
        with pytest.raises(UsageError) as caught:
            signals.Statistics(frozenset({"hessain"}))
        assert "hessian" in str(caught.value.hint)

    def test_layers_that_read_one_tensor_share_its_products(self, monkeypatch: pytest.MonkeyPatch) -> None:
        products = []
        matmul = Tensor.__matmul__
        monkeypatch.setattr(Tensor, "__matmul__", lambda a, b: products.append(1) or matmul(a, b))
        layers = {name: nn.Linear(6, 3) for name in ("q", "k", "v")}
        gathered = signals.Statistics(BOTH)
        with gathered.listen(layers), torch.no_grad():
            for _ in range(2):
                x = torch.randn(4, 6)
                for layer in layers.values():
                    layer(x)
        assert len(products) == 2
        assert torch.equal(gathered.hessian("q"), gathered.hessian("v"))

    def test_memory_written_anew_in_place_is_another_input(self) -> None:
        layers = {name: nn.Linear(6, 3) for name in ("a", "b")}
        gathered = signals.Statistics(BOTH)
        x = torch.ones(4, 6)
        with gathered.listen(layers), torch.no_grad():
            layers["a"](x)
            x.mul_(3)
            layers["b"](x)
        torch.testing.assert_close(gathered.input_sq("b"), 9 * gathered.input_sq("a"))

    def test_layers_that_share_once_and_differ_later_are_told_apart(self) -> None:
        layers = {name: nn.Linear(6, 3) for name in ("a", "b")}
        gathered = signals.Statistics(BOTH)
        x, y = torch.randn(4, 6), torch.randn(4, 6)
        with gathered.listen(layers), torch.no_grad():
            for first, second in ((x, x), (x, y)):
                layers["a"](first)
                layers["b"](second)
        torch.testing.assert_close(gathered.input_sq("a"), x.square().mean(0))
        torch.testing.assert_close(gathered.input_sq("b"), torch.cat([x, y]).square().mean(0))

    def test_double_precision_on_request(self) -> None:
        layer = nn.Linear(6, 3)
        gathered = signals.Statistics(BOTH, torch.float64)
        with gathered.listen({"a": layer}):
            layer(torch.randn(2, 6))
        assert gathered.hessian("a").dtype == torch.float64
        assert gathered.sample("a").dtype == torch.float32


class TestWalk:
    @pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "bert"])
    @pytest.mark.parametrize("count", [1, 5, 130])
    def test_untouched_weights_give_what_the_whole_model_gives(self, kind: str, count: int) -> None:
        model, windows = tiny(kind), texts(count)
        expected = inputs_of(model, windows)
        visited = []
        for visit in signals.walk(model, windows, BOTH):
            for name in visit.layers:
                visited.append(name)
                x = expected[name]
                assert visit.signals.tokens(name) == windows.numel()
                torch.testing.assert_close(
                    visit.signals.input_sq(name), x.square().mean(0), rtol=1e-4, atol=1e-5
                )
                torch.testing.assert_close(
                    visit.signals.hessian(name), 2 * x.T @ x / len(x), rtol=1e-3, atol=1e-4
                )
        assert visited == list(models.linears(model))

    def test_later_blocks_see_the_changed_weights_of_earlier_ones(self) -> None:
        model, windows = tiny(), texts()
        dense = inputs_of(model, windows)
        seen = {}
        for visit in signals.walk(model, windows, BOTH):
            for name, layer in visit.layers.items():
                seen[name] = visit.signals.input_sq(name)
                layer.weight.mul_(0.5)
        changed = inputs_of(model, windows)  # every weight is halved by now; block 0 read dense inputs
        first, second = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
        torch.testing.assert_close(seen[first], dense[first].square().mean(0))
        torch.testing.assert_close(seen[second], changed[second].square().mean(0), rtol=1e-4, atol=1e-6)
        third = "model.layers.2.self_attn.q_proj"
        assert not torch.allclose(dense[third].square().mean(0), seen[third], rtol=1e-3)
        torch.testing.assert_close(seen[third], changed[third].square().mean(0), rtol=1e-4, atol=1e-6)

    def test_one_block_at_a_time_is_held(self) -> None:
        gone: list[weakref.ref[signals.Statistics]] = []
        for visit in signals.walk(tiny(), texts(), BOTH):
            assert all(former() is None for former in gone)
            gone.append(weakref.ref(visit.signals))
            del visit
        assert len(gone) == 3

    def test_no_hook_stays_behind(self) -> None:
        model = tiny()
        for _ in signals.walk(model, texts(), BOTH):
            pass
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_only_the_layers_asked_for(self) -> None:
        model = tiny()
        chosen = {n: m for n, m in models.linears(model).items() if n.endswith("down_proj")}
        found = [name for visit in signals.walk(model, texts(), BOTH, chosen) for name in visit.layers]
        assert found == list(chosen)

    def test_a_sample_of_the_inputs_is_kept(self) -> None:
        model, windows = tiny(), texts(64, 64)
        expected = inputs_of(model, windows)
        visit = next(iter(signals.walk(model, windows, frozenset({"input_sq"}))))
        name = "model.layers.0.mlp.down_proj"
        sample = visit.signals.sample(name)
        assert signals.SAMPLE <= len(sample) < 2 * signals.SAMPLE
        distances = torch.cdist(sample, expected[name])
        assert float(distances.min(1).values.max()) < 1e-4

    def test_activations_that_overflow_are_refused_with_the_layer(self) -> None:
        model = tiny()
        model.get_submodule("model.layers.1.mlp.up_proj").weight.fill_(1e25)
        with pytest.raises(ArtifactError, match=r"inputs of `model.layers.1.mlp.down_proj` are not finite"):
            for _ in signals.walk(model, texts(), BOTH):
                pass
