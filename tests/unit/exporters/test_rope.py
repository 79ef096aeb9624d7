"""Rotary tables equal those of transformers, in both spellings of the config."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from edgesft.exporters.rope import from_config

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
}


def _reference(table: dict[str, Any], theta: float) -> tuple[np.ndarray, np.ndarray]:
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=512,
        rope_parameters={**table, "rope_theta": theta},
    )
    positions = torch.arange(512)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, 512, 32), positions)
    return cos[0, :, :16].numpy(), sin[0, :, :16].numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("old", [False, True])
def test_tables(kind: str, theta: float, old: bool) -> None:
    table = KINDS[kind]
    config: dict[str, Any] = {"rope_parameters": {**table, "rope_theta": theta}}
    if old:
        config = {"rope_theta": theta, "rope_scaling": None if kind == "default" else table}
    rope, reason = from_config({**config, "max_position_embeddings": 512}, 32)
    assert reason is None
    assert rope is not None
    cos, sin = rope.tables(512)
    expected = _reference(table, theta)
    assert cos.dtype == np.float32
    np.testing.assert_allclose(cos, expected[0], atol=2e-5)
    np.testing.assert_allclose(sin, expected[1], atol=2e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"partial_rotary_factor": 0.5}, "0.5 of each head"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "layer to layer"),
    ],
)
def test_what_is_unknown_is_named(config: dict[str, Any], reason: str) -> None:
    rope, why = from_config(config, 32)
    assert rope is None
    assert why is not None
    assert reason in why
