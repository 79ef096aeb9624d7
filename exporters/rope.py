"""Rotary position tables: the frequencies of a config and the cosines and sines of every position.

RoFormer (2021), eq. 15: theta_i = base^(-2i / d). Linear scaling divides positions (Chen et al., 2023);
llama3 scaling divides low frequencies by `factor`, leaves high ones and blends between (Llama 3.1).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgesft.exporters.weights import FloatArray

KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Rope:
    """kind: one of KINDS. original: context of pretraining. The last three matter to llama3."""

    base: float
    dim: int
    kind: str = "default"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192

    def frequencies(self) -> FloatArray:
        """Angular frequency of each pair of channels, radians a token. (dim / 2,)"""
        # float32 step by step, as the models were trained: a float64 table departs at long contexts
        exponent = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        plain = np.float32(1) / np.power(np.float32(self.base), exponent)
        if self.kind == "linear":
            plain = plain / np.float32(self.factor)
        if self.kind == "llama3":
            plain = self._llama3(plain)
        return np.asarray(plain, np.float32)

    def _llama3(self, plain: FloatArray) -> FloatArray:
        wavelength = 2 * math.pi / plain
        blend = (self.original / wavelength - self.low) / (self.high - self.low)
        mixed = (1 - blend) * plain / self.factor + blend * plain
        out = np.where(wavelength > self.original / self.low, plain / self.factor, plain)
        middle = (wavelength <= self.original / self.low) & (wavelength >= self.original / self.high)
        return np.asarray(np.where(middle, mixed, out), np.float32)

    def tables(self, context: int) -> tuple[FloatArray, FloatArray]:
        """Cosines and sines, (context, dim / 2) each."""
        angle = np.arange(context, dtype=np.float32)[:, None] * self.frequencies()[None]
        return np.cos(angle), np.sin(angle)


def from_config(config: Mapping[str, Any], dim: int) -> tuple[Rope | None, str | None]:
    """The rope of a config, or None and the reason why it is none of KINDS.

    transformers 5 writes `rope_parameters`; before, `rope_theta` and `rope_scaling`.
    """
    table: dict[str, Any] = {"rope_theta": config.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if isinstance(value, Mapping):
            table |= {k: v for k, v in value.items() if v is not None}
    kind = str(table.get("rope_type", table.get("type", "default")))
    if kind not in KINDS:
        return None, f"rope scaling `{kind}`"
    if any(isinstance(v, Mapping) for v in table.values()):
        return None, "rope parameters that differ from layer to layer"
    partial = table.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        return None, f"rotary embedding of {partial} of each head"
    base = table.get("rope_theta")
    return Rope(
        base=float(10000.0 if base is None else base),
        dim=dim,
        kind=kind,
        factor=float(table.get("factor", 1.0)),
        low=float(table.get("low_freq_factor", 1.0)),
        high=float(table.get("high_freq_factor", 4.0)),
        original=int(
            table.get("original_max_position_embeddings") or config.get("max_position_embeddings") or 8192
        ),
    ), None
