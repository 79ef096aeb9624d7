"""What a device may do with a model before anybody has run it there: times, and whether it fits.

A roofline with an interval of efficiencies, never a number alone. Memory traffic and operations follow from
the model's shape; how much of the data sheet is reached is taken from measurements of others:

- one H100 reached 90 % of its bandwidth and 81 % of its dense bf16 rate;
- NVIDIA's published int4 decode rates of seven models on an Orin Nano, before and after its Super mode,
  divided by what its bandwidth allows, lie between 46 % and 87 %.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgesft.core.errors import DeviceError, UsageError, nearest
from edgesft.devices.spec import DeviceSpec

# Share of peak bandwidth while weights are streamed, worst and best, by kind of device.
BANDWIDTH = {"gpu": (0.50, 0.90), "soc": (0.40, 0.90), "cpu": (0.40, 0.90)}
# Share of peak rate in a prompt's matrix products. A small model's products are too small to fill a GPU.
COMPUTE = {"gpu": (0.15, 0.81), "soc": (0.15, 0.81), "cpu": (0.20, 0.81)}
# What this machine measured of itself is reached more closely than a data sheet.
MEASURED = {"bandwidth": (0.50, 1.05), "compute": (0.30, 1.05)}
KERNELS = 12  # launches a layer and step, at most; fused and captured graphs have fewer
LAUNCH_US = {"gpu": (0.5, 5.0), "soc": (1.0, 10.0), "cpu": (0.2, 3.0)}
# Gigabytes that are not the model's: operating system and services, least and most.
SYSTEM_GB = {"gpu": (0.3, 0.6), "soc": (0.8, 2.0), "cpu": (0.4, 1.5)}
SHARE = {"gpu": 0.98, "soc": 0.95, "cpu": 0.97}  # of the memory that the maker states, after carve-outs
# Gigabytes that a runtime takes beside weights and cache: libraries, context, work space.
RUNTIME_GB = {"gpu": (0.4, 1.2), "soc": (0.4, 1.2), "cpu": (0.08, 0.25)}
COPIES = {"gpu": (1.0, 1.3), "soc": (1.0, 1.3), "cpu": (1.0, 2.0)}  # of the weights: packed for the kernels
FIT = ("fits", "tight", "does not fit")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What of a model decides its speed.

    weight_bytes: all weights as stored. streamed_bytes: those that one token reads; the rows of an input
    embedding that is not the output layer as well are left out. parameters: weights that a token multiplies
    with; None where unknown (a foreign graph). head: those of them in the output layer, which only the last
    token of a prompt needs. weights: stored type of most of them. kv_bytes: bytes of one number in the
    key-value cache. decoder: whether it generates tokens.
    """

    weight_bytes: int
    streamed_bytes: int
    parameters: int | None
    head: int = 0
    weights: str = "float32"
    decoder: bool = True
    layers: int = 0
    hidden: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    kv_bytes: int = 4
    context: int | None = None
    pattern: str | None = None

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of so many tokens."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.kv_bytes * tokens if self.decoder else 0

    def operations(self, tokens: int, before: int) -> float | None:
        """Of `tokens` new ones after `before` others: two a parameter, and attention's scores and sums."""
        if self.parameters is None:
            return None
        seen = tokens * before + tokens * (tokens + 1) / 2
        products = (self.parameters - self.head) * tokens + self.head
        return 2.0 * products + 4.0 * self.layers * self.hidden * seen


@dataclass(frozen=True)
class Rates:
    """Bytes and operations a second, worst and best; operations None where the catalogue has no rate."""

    bandwidth: tuple[float, float]
    compute: tuple[float, float] | None
    launch: tuple[float, float]  # seconds of one pass over the model


def compute_type(spec: DeviceSpec, weights: str) -> str | None:
    """The type in which products are made: of the rates that the device has, the one a runtime would use.

    Weights of 4 or 8 bits are widened to fp16 on a GPU; ONNX Runtime multiplies them in int8 on a processor.
    """
    if spec.kind == "cpu":
        narrow = ("int8_amx", "int8_vnni", "int8") if weights in ("int4", "int8") else ()
        wanted = (*narrow, "fp32")
    else:
        wanted = ("fp16_acc32", "fp16", "bf16")
    return next((name for name in wanted if name in spec.ops), None)


def rates(
    spec: DeviceSpec,
    shape: Shape,
    mode: str | None,
    sparse: bool = False,
    measured: Mapping[str, Any] | None = None,
) -> Rates:
    """What this device may reach. measured: a record of `devices.roofline`, for this machine.

    Raises UsageError where the catalogue has no bandwidth for it.
    """
    layers = KERNELS * max(shape.layers, 1)
    low, high = LAUNCH_US[spec.kind]
    launch = (layers * high / 1e6, layers * low / 1e6)
    if measured is not None:
        worst, best = MEASURED["bandwidth"]
        fastest = max(measured["read_gbs"], measured["copy_gbs"]) * 1e9
        slowest = min(measured["read_gbs"], measured["copy_gbs"]) * 1e9
        flops = measured["gemm_gflops"]
        product = flops.get("int8") if shape.weights in ("int4", "int8") else None
        floor = flops["fp32"] * 1e9 * MEASURED["compute"][0]
        ceiling = (product or flops["fp32"]) * 1e9 * MEASURED["compute"][1]
        return Rates((slowest * worst, fastest * best), (floor, ceiling), launch)
    if spec.bandwidth_gbs is None:
        raise UsageError(
            f"the catalogue has no bandwidth for `{spec.id}`: it differs from machine to machine",
            "use the device `host`, which is measured",
        )
    capped = _capped(spec, mode)
    worst, best = BANDWIDTH[spec.kind]
    bandwidth = (spec.bandwidth_gbs * 1e9 * worst * capped, spec.bandwidth_gbs * 1e9 * best)
    dtype = compute_type(spec, shape.weights)
    peak = None if dtype is None else spec.peak(dtype, sparse=sparse, mode=mode)
    if peak is None:
        return Rates(bandwidth, None, launch)
    worst, best = COMPUTE[spec.kind]
    return Rates(bandwidth, (peak * 1e12 * worst * capped, peak * 1e12 * best), launch)


def _capped(spec: DeviceSpec, mode: str | None) -> float:
    """By how much the slow end goes down in a mode of unknown clock: its watts to those of the largest."""
    values = {} if mode is None else spec.modes[mode]
    watts = [m["watts"] for m in spec.modes.values() if "watts" in m]
    if "ghz" in values or "watts" not in values:
        return 1.0
    return float(values["watts"] / max(watts))


def _range(work_bytes: float, operations: float | None, found: Rates) -> dict[str, float | None]:
    """Milliseconds, best and worst: the longer of the two limits, and their sum without any overlap."""
    low = work_bytes / found.bandwidth[1] + found.launch[1]
    high: float | None = work_bytes / found.bandwidth[0] + found.launch[0]
    if operations is None or found.compute is None:
        high = None  # nothing bounds what the operations cost
    else:
        low = max(work_bytes / found.bandwidth[1], operations / found.compute[1]) + found.launch[1]
        high = work_bytes / found.bandwidth[0] + operations / found.compute[0] + found.launch[0]
    return {"low": round(1000 * low, 4), "high": None if high is None else round(1000 * high, 4)}


def times(shape: Shape, found: Rates, prompt_tokens: int, context: int) -> dict[str, Any]:
    """Ranges in ms: ttft of a prompt, tpot right after it and with a full context; or latency of one call."""
    first = _range(shape.streamed_bytes, shape.operations(prompt_tokens, 0), found)
    if not shape.decoder:
        return {"latency_ms": first}
    early, late = (
        _range(shape.streamed_bytes + shape.cache_bytes(n), shape.operations(1, n), found)
        for n in (prompt_tokens, context)
    )
    return {
        "ttft_ms": first,
        "tpot_ms": early,
        "tpot_full_context_ms": late,
        "tokens_per_second": {
            "low": None if early["high"] is None else round(1000 / early["high"], 3),
            "high": round(1000 / early["low"], 3) if early["low"] else None,
        },
    }


def fit(spec: DeviceSpec, shape: Shape, context: int) -> dict[str, Any]:
    """Whether weights, cache of `context` tokens and runtime find room: `fits`, `tight`, `does not fit`.

    Ranges in bytes of what is needed and of what is left beside the system. Raises DeviceError where the
    catalogue has no memory size.
    """
    if spec.memory_gb is None:
        raise DeviceError(f"the memory of `{spec.id}` is unknown")
    usable = spec.memory_gb * 1e9 * SHARE[spec.kind]
    most, least = (usable - gb * 1e9 for gb in SYSTEM_GB[spec.kind])
    fixed = shape.cache_bytes(context) + 8 * 4 * shape.hidden * context  # a prompt's activations, float32
    low, high = (
        copies * shape.weight_bytes + fixed + gb * 1e9
        for copies, gb in zip(COPIES[spec.kind], RUNTIME_GB[spec.kind], strict=True)
    )
    verdict = FIT[0] if high <= least else FIT[2] if low > most else FIT[1]
    return {
        "verdict": verdict,
        "context": context,
        "needed_bytes": {"low": round(low), "high": round(high)},
        "available_bytes": {"low": round(max(least, 0)), "high": round(most)},
        "weight_bytes": shape.weight_bytes,
        "kv_cache_bytes": shape.cache_bytes(context),
        "unified_memory": spec.kind != "gpu",
    }


def predict(
    spec: DeviceSpec,
    shape: Shape,
    mode: str | None = None,
    *,
    prompt_tokens: int = 128,
    context: int | None = None,
    measured: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Ranges of times, per power mode, and whether it fits. JSON values only, marked `predicted`.

    mode: a power mode of the device; its fastest if None. context: tokens of the cache, 2048 or the model's
    limit if None. Raises UsageError for an unknown mode or a device without figures.
    """
    if mode is not None and mode not in spec.modes:
        raise UsageError(f"`{spec.id}` has no power mode `{mode}`", nearest(mode, spec.modes))
    if context is None:
        context = min(shape.context or 2048, 2048)
    context = max(context, prompt_tokens + 1) if shape.decoder else prompt_tokens
    main = times(shape, rates(spec, shape, mode, measured=measured), prompt_tokens, context)
    return {
        "predicted": True,
        "device": {"id": spec.id, "name": spec.name, "kind": spec.kind, "mode": mode},
        "prompt_tokens": prompt_tokens,
        "context": context,
        **main,
        "fit": fit(spec, shape, context),
        "modes": {
            name: times(shape, rates(spec, shape, name, measured=measured), prompt_tokens, context)
            for name in spec.modes
        },
        "sparse24": _sparse(spec, shape, mode, prompt_tokens, context),
        "assumptions": assumptions(spec, shape, mode, measured),
    }


def _sparse(spec: DeviceSpec, shape: Shape, mode: str | None, prompt: int, context: int) -> dict[str, Any]:
    """The range with 2:4 kernels of TensorRT, or why there is none."""
    if shape.pattern != "2:4":
        return {"gain": False, "reason": "the weights do not hold the 2:4 pattern"}
    if not spec.sparse24:
        return {"gain": False, "reason": f"`{spec.id}` has no 2:4 units"}
    if shape.weights == "int4":
        return {
            "gain": False,
            "reason": "weights of 4 bits have no 2:4 kernels, neither here nor in TensorRT",
        }
    # Half of the values and two bits of index for each that is kept.
    bits = {"int8": 8, "float16": 16, "bfloat16": 16}.get(shape.weights, 16)
    share = 0.5 * (bits + 2) / bits
    smaller = Shape(
        **{
            **vars(shape),
            "weight_bytes": round(share * shape.weight_bytes),
            "streamed_bytes": round(share * shape.streamed_bytes),
        }
    )
    found = times(smaller, rates(spec, shape, mode, sparse=True), prompt, context)
    reason = "a TensorRT engine with sparse weights; ONNX Runtime computes 2:4 weights as dense ones"
    return {"gain": True, "reason": reason, **found}


def assumptions(
    spec: DeviceSpec, shape: Shape, mode: str | None, measured: Mapping[str, Any] | None
) -> list[str]:
    """Everything that the ranges rest on, in words."""
    if measured is not None:
        low, high = (f"{100 * x:.0f}" for x in MEASURED["bandwidth"])
        found = [
            f"{low} to {high} % of the bandwidth that this machine measured",
            "from a part of its measured fp32 rate to all of its measured int8 rate"
            if shape.weights in ("int4", "int8")
            else "a part to all of its measured fp32 rate",
        ]
    else:
        low, high = (f"{100 * x:.0f}" for x in BANDWIDTH[spec.kind])
        found = [
            f"{low} to {high} % of {spec.bandwidth_gbs:g} GB/s: an H100 reached 90 %; int4 decoding on an "
            "Orin Nano, by NVIDIA's own figures, 46 to 87 %"
        ]
        low, high = (f"{100 * x:.0f}" for x in COMPUTE[spec.kind])
        dtype = compute_type(spec, shape.weights)
        found.append(
            f"{low} to {high} % of the dense `{dtype}` rate: an H100 reached 81 % with large products; the "
            "lower end, for small ones, is an estimate"
            if dtype
            else "no rate in the catalogue for the operations: only the lower end is known"
        )
    low, high = (f"{x:g}" for x in LAUNCH_US[spec.kind])
    found.append(f"{KERNELS} kernels a layer, {low} to {high} us each to start: an estimate")
    found.append("every weight that a token uses is read once a token; a cache that holds them all is faster")
    if shape.parameters is None:
        found.append("the operations of this graph are not counted: only the lower end is known")
    if mode is not None and _capped(spec, mode) < 1:
        found.append(f"the clock of mode `{mode}` is unknown: the slow end is scaled by its watts")
    ends = " to ".join(f"{x:g}" for x in SYSTEM_GB[spec.kind])
    takes = " to ".join(f"{x:g}" for x in RUNTIME_GB[spec.kind])
    copies = " to ".join(f"{x:g}" for x in COPIES[spec.kind])
    found.append(
        f"the system takes {ends} GB, the runtime {takes} GB, weights are held {copies} times: estimates"
    )
    if spec.kind == "gpu":
        found.append("the GPU's own memory is meant, not the computer's")
    doubtful = [f for f in ("bandwidth_gbs", "memory_gb", "ghz") if _unsure(spec, f)]
    return found + [f"the catalogue's `{f}` is unverified" for f in doubtful]


def _unsure(spec: DeviceSpec, figure: str) -> bool:
    return (spec.why(figure) or {}).get("confidence") == "unverified"
