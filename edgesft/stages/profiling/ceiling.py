"""How close a step, and each operator in it, comes to what this device can do: the roofline, measured.

A limit is the longer of two times: bytes over the bandwidth, and flops over the rate of a matrix product of
the same arithmetic. Shares above 1 are possible and left as they are: what the limit was measured with may be
slower than what is measured against it.

Source: Williams, Waterman & Patterson (2009), "Roofline", Communications of the ACM 52(4).
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgesft.core import artifact, catalog
from edgesft.core.artifact import Artifact

SLOWEST = "fp32"  # where the rate of an arithmetic is not measured: it is no slower than this one
SPREAD = 0.2  # of the passes that measured a limit, above which the machine was busy
GRAPH = "model.onnx"
FLOAT = 4  # bytes; every KV cache that we run is in float32


def limits(model: Artifact, threads: int, notes: list[str]) -> dict[str, Any]:
    """Bandwidth and matrix rates of this device, measured once a fingerprint; a busy machine is noted.

    bandwidth_gbs: the one that counts for `model`: of the last-level cache where its weights fit into the
    share that was measured, else the faster of reading and copying memory; bandwidth_of says which.
    Raises DeviceError where nothing can be measured.
    """
    module = catalog.runtime("devices.roofline")
    found: dict[str, Any] = module.measured(threads)
    names = ("copy_gbs", "read_gbs", "cache_read_gbs", "gemm_gflops", "spread", "source")
    kept = {k: found[k] for k in names if found.get(k) is not None}
    weights = _load(model)["bytes"]
    room = found.get("cache_bytes", 0) // module.CACHES
    if "cache_read_gbs" in kept and weights is not None and weights <= room:
        kept |= {"bandwidth_gbs": kept["cache_read_gbs"], "bandwidth_of": "last-level cache"}
    else:
        fastest = max(kept["copy_gbs"], kept.get("read_gbs", 0.0))
        kept |= {"bandwidth_gbs": fastest, "bandwidth_of": "memory"}
    worst = max(found.get("spread", {}).values(), default=0.0)
    if worst > SPREAD:
        notes.append(
            f"the limits of this device differed by {100 * worst:.0f} % while they were measured: "
            "the machine was busy, and the roofline may be too low"
        )
    return kept


def against(limits: Mapping[str, Any], work: Mapping[str, Any], arithmetic: str | None) -> dict[str, Any]:
    """Limit of some work against its time. work: `bytes`, `flops` (None: unknown), `ms`.

    Returns gbs, gflops, limit_ms, limit_share, bound; None for what the unknown would decide.
    """
    moved, flops, ms = work["bytes"], work["flops"], work["ms"]
    rates = limits["gemm_gflops"]
    known = arithmetic in rates
    rate = rates[arithmetic] if known else rates.get(SLOWEST)
    memory = None if moved is None else moved / limits["bandwidth_gbs"] / 1e6
    compute = None if flops is None or not rate else flops / rate / 1e6
    bound = None
    if memory is not None and compute is not None:
        # With the rate of a slower arithmetic the compute time is only an upper bound.
        bound = "memory" if memory >= compute else "compute" if known else None
    exact = [t for t, sure in ((memory, True), (compute, known)) if t is not None and sure]
    limit = max(exact, default=None)
    return {
        "gbs": _over(moved, ms),
        "gflops": _over(flops, ms),
        "limit_ms": limit,
        "limit_share": limit / ms if limit is not None and ms else None,
        "bound": bound,
    }


def _over(amount: float | None, ms: float) -> float | None:
    """In thousands of millions a second."""
    return None if amount is None or not ms else amount / ms / 1e6


def add_limits(table: Mapping[str, Any], limits: Mapping[str, Any] | None) -> dict[str, Any]:
    """The table of operators with achieved rates, and their share of the limits where those are known."""

    def rated(row: Mapping[str, Any]) -> dict[str, Any]:
        plain = {"gbs": _over(row["bytes"], row["ms"]), "gflops": _over(row["flops"], row["ms"])}
        if limits is None:
            return {**row, **plain, "limit_share": None, "bound": None}
        found = against(limits, row, row["arithmetic"])
        return {**row, **{k: found[k] for k in (*plain, "limit_share", "bound")}}

    return {**table, "rows": [rated(r) for r in table["rows"]], "groups": [rated(r) for r in table["groups"]]}


def step(
    model: Artifact,
    limits: Mapping[str, Any],
    *,
    ms: float,
    tokens: int | None,
    cached: float | None,
    counted: int | None,
) -> dict[str, Any]:
    """The whole decode step (the whole call of what is no decoder) against the limits.

    ms: of a step. tokens: that one step computes; None for what takes no tokens, of which flops are those
    `counted` from its operators. cached: tokens in the KV cache on average, None without.
    Returns bytes, flops, limit_ms, measured_ms, achieved, bound, arithmetic; None for what is unknown.
    """
    load = _load(model)
    moved, parameters = load["bytes"], load["parameters"]
    if moved is not None and cached is not None:
        cache = load["cache_bytes"]
        moved = None if cache is None else moved + round(cache * (cached + 1))  # read, and a row written
    flops = counted if tokens is None else None if parameters is None else 2 * parameters * tokens
    found = against(limits, {"bytes": moved, "flops": flops, "ms": ms}, load["arithmetic"])
    return {
        "bytes": moved,
        "flops": flops,
        "limit_ms": found["limit_ms"],
        "measured_ms": ms,
        "achieved": found["limit_share"],
        "bound": found["bound"],
        "arithmetic": load["arithmetic"],
    }


def _load(model: Artifact) -> dict[str, Any]:
    """bytes of weights that one call reads, parameters that it multiplies with, bytes of cache a token."""
    if model.kind == "model":
        return _torch_load(model)
    folder, name = place(model)
    graph = catalog.runtime("exporters.operators").read_graph(folder, name)
    about = artifact.read_json(model.path / "export.json") if model.path.is_dir() else None
    quantized = about is not None and about.get("quantize") not in (None, "none")
    return {
        "bytes": graph.weight_bytes,
        "parameters": graph.parameters,
        "cache_bytes": graph.cache_bytes,
        "arithmetic": "int8" if about and quantized and about.get("accuracy_level") == 4 else "fp32",
    }


def _torch_load(model: Artifact) -> dict[str, Any]:
    """torch computes in float32 whatever the file holds, but for packed weights; the embedding counts where
    it is also the head."""
    from edgesft.core import models
    from edgesft.core.stored import Stored

    config, weights = models.read_config(model.path), Stored(model.path)
    shapes = {name: weights.shape(name) for name in weights}
    matrices = {n: math.prod(s) for n, s in shapes.items() if len(s) == 2}
    tables = {n: c for n, c in matrices.items() if "embed" in n.lower() or ".wte." in n or ".wpe." in n}
    parameters = sum(matrices.values()) - sum(tables.values())
    if models.kind(model.path) == "decoder" and not any("lm_head" in n for n in matrices):
        parameters += max(tables.values(), default=0)  # tied
    heads = config.get("num_attention_heads")
    size = config.get("head_dim") or (config.get("hidden_size") or 0) // (heads or 1)
    layers = config.get("num_hidden_layers")
    return {
        "bytes": FLOAT * (parameters + sum(math.prod(s) for s in shapes.values() if len(s) != 2))
        - sum(FLOAT * matrices[name] - weights.packed.nbytes(name) for name in weights.packed),
        "parameters": parameters,
        "cache_bytes": _cache(layers, config.get("num_key_value_heads") or heads, size),
        "arithmetic": "fp32",
    }


def _cache(layers: Any, heads: Any, size: Any) -> int | None:  # noqa: ANN401 - JSON
    """Bytes of keys and values of one token in all layers."""
    return 2 * layers * heads * size * FLOAT if layers and heads and size else None


def place(model: Artifact) -> tuple[Path, str]:
    """(folder, file name) of the graph of an export, the one that runs here, or of a foreign file."""
    if not model.path.is_dir():
        return model.path.parent, model.path.name
    about = artifact.read_json(model.path / "export.json")
    return model.path, GRAPH if about is None else catalog.runtime("exporters.custom").choose(
        model.path, about
    ).file
