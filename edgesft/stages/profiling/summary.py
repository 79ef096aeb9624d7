"""From raw times of several processes to percentiles, rates, loads and memory: the numbers of a profile.

The time per output token has two readings, and both are given. `itl_ms` (inter-token latency) is over the
single gaps between two tokens. `request_tpot_ms` is, for each prompt, the mean of its gaps, the way load
generators for servers define time per output token. `tpot_ms` has the samples of `itl_ms`; the name stays
because everything of EdgeSFT that compares decode speed means a single step by it.
"""

import math
import statistics as plain
from collections.abc import Mapping, Sequence
from typing import Any

from edgesft.core import catalog
from edgesft.core.errors import DeviceError

WANTED = (50, 90, 99)
BUSY = 0.8  # share of the time with a core below which a profile says so

Measured = Sequence[Mapping[str, Any]]  # what `devices.client.measure` returns, of several processes


def decodes(measured: Measured) -> bool:
    """Whether what ran is a decoder; what is not is called as a whole."""
    return bool(measured[0]["loaded"]["kind"] == "decoder")


def summarise(measured: Measured) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Percentiles, rates and memory of several processes of one workload; and the samples behind them."""
    from edgesft.core import statistics

    decoder = decodes(measured)
    notes: list[str] = []
    none = statistics.refused(f"{_article(measured[0]['loaded']['kind'])} generates no tokens", WANTED)
    found: dict[str, Any] = {"kind": measured[0]["loaded"]["kind"]}
    found |= dict.fromkeys(("ttft_ms", "tpot_ms", "itl_ms", "request_tpot_ms"), none)
    samples: dict[str, list[float]] = {"ttft_ms": [], "tpot_ms": []}
    cuts = {}
    for metric in ("ttft", "tpot") if decoder else ("latency",):
        pooled, cuts[metric] = _pool(measured, metric)
        found[f"{metric}_ms"] = statistics.percentiles(pooled, WANTED)
        samples[f"{metric}_ms"] = [round(t, 4) for t in pooled]
    if decoder:
        found["itl_ms"] = found["tpot_ms"]
        found["request_tpot_ms"] = statistics.percentiles(_of_requests(measured, cuts["tpot"]), WANTED)
        found["tokens_per_second"], found["end_to_end"] = _rates(measured, cuts["tpot"], notes)
    else:
        median = found["latency_ms"]["p50"]
        found["calls_per_second"] = None if median is None else 1000 / median
        found["tokens_per_second"] = None
    steady = all(c["steady"] for c in cuts["tpot" if decoder else "latency"])
    if not steady:
        notes.append("no steady state: latencies still changed at the end of the warm-up cut")
    memory = [m["done"] for m in measured]
    return {
        **found,
        "peak_memory_bytes": max(m["peak_bytes"] for m in memory),
        "memory": {
            "peak_bytes": [m["peak_bytes"] for m in memory],
            "peak_above_bytes": [m["peak_above_bytes"] for m in memory],
            "device_peak_bytes": None,  # every runtime here computes on the processor
        },
        "warmup": {"steady": steady, **cuts},
        "notes": notes,
    }, samples


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _pool(measured: Measured, metric: str) -> tuple[list[float], list[dict[str, Any]]]:
    """Samples of all processes in milliseconds after the warm-up cut of each, and the cuts."""
    timings = catalog.runtime("devices.client").timings
    pooled: list[float] = []
    cuts = []
    for each in measured:
        samples, warm = timings(each["repetitions"], metric)
        pooled += samples[warm.cut :]
        cuts.append({"cut": warm.cut, "samples": len(samples), "steady": warm.steady})
    return pooled, cuts


def _of_requests(measured: Measured, cuts: Sequence[Mapping[str, Any]]) -> list[float]:
    """Mean ms of the decode steps of each prompt, those left out that the warm-up cut reaches into."""
    found = []
    for each, cut in zip(measured, cuts, strict=True):
        at = 0
        for repetition in each["repetitions"]:
            steps = repetition["step_ns"]
            if steps and at >= cut["cut"]:
                found.append(plain.fmean(steps) / 1e6)
            at += len(steps)
    return found


def _rates(
    measured: Measured, cuts: Sequence[Mapping[str, Any]], notes: list[str]
) -> tuple[float, dict[str, Any]]:
    """Decode rate after the warm-up, and the rate over the whole of every prompt beside it.

    Tokens are counted by id. A rate made of parts that do not add up to the wall time is noted.
    """
    steady: list[float] = []
    parts = seconds = 0.0
    tokens = 0
    for each, cut in zip(measured, cuts, strict=True):
        decoded = [r for r in each["repetitions"] if r["step_ns"]]
        steps = [t / 1e9 for r in decoded for t in r["step_ns"]]
        steady += steps[cut["cut"] :]
        parts += sum(steps) + sum(r["ttft_ns"] for r in decoded) / 1e9
        seconds += sum(r["wall_ns"] for r in decoded) / 1e9
        tokens += sum(len(r["step_ns"]) + 1 for r in decoded)
    if not steady:
        raise DeviceError("nothing was measured: no decode step was made")
    if seconds > 1.05 * parts:
        notes.append(f"prompts and decode steps add up to {parts:.3f} s of {seconds:.3f} s on the clock")
    ran = sum(t for m in measured for r in m["repetitions"] for t in r["step_cpu_ns"]) / 1e9
    took = sum(t for m in measured for r in m["repetitions"] for t in r["step_ns"]) / 1e9
    if ran < BUSY * took:
        notes.append(
            f"the machine is busy: the decoding thread had a core for {100 * ran / took:.0f} % of the time"
        )
    return len(steady) / sum(steady), {
        "tokens_per_second": tokens / seconds,
        "tokens": tokens,
        "seconds": seconds,
    }


def short(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Percentiles of one process with few prompts; the first of them is the warm-up."""
    from edgesft.core import statistics

    late = measured["repetitions"][1:]
    if not decodes([measured]):
        return {"latency_ms": statistics.percentiles([r["call_ns"] / 1e6 for r in late], WANTED)}
    steps = [t / 1e6 for r in late for t in r["step_ns"]]
    requests = [plain.fmean(r["step_ns"]) / 1e6 for r in late if r["step_ns"]]
    table = statistics.percentiles(steps, WANTED)
    return {
        "ttft_ms": statistics.percentiles([r["ttft_ns"] / 1e6 for r in late], WANTED),
        "tpot_ms": table,
        "itl_ms": table,
        "request_tpot_ms": statistics.percentiles(requests, WANTED),
    }


def loads(cold: Mapping[str, Any], measured: Measured) -> dict[str, Any]:
    """Load times in ms. The cold one counts only if the page cache really let go of the files."""
    evicted = cold["loaded"]["evicted"]
    found: dict[str, Any] = {
        "cold": cold["loaded"]["load_ns"] / 1e6,
        "warm": plain.median(m["loaded"]["load_ns"] / 1e6 for m in measured),
        "evicted": evicted,
    }
    if evicted < 0.9:
        found["cold"] = None
        found["reason"] = f"only {100 * evicted:.0f} % of the files could be dropped from the page cache"
    return found


def resumed(idle: Sequence[Mapping[str, Any]], steady: Mapping[str, float]) -> list[dict[str, Any]]:
    """What the first prompt and step cost after each pause, against `steady` medians in ms.

    ratio: of the prompt (of the call); step_ratio: of the first step after it. steady: `first`, `step`.
    """
    found = []
    for each in idle:
        decoder = "ttft_ns" in each
        first = each["ttft_ns" if decoder else "call_ns"] / 1e6
        entry = {"seconds": each["seconds"], "ttft_ms" if decoder else "call_ms": first}
        entry["ratio"] = first / steady["first"]
        if each["step_ns"]:
            entry["first_step_ms"] = each["step_ns"][0] / 1e6
            entry["step_ratio"] = entry["first_step_ms"] / steady["step"]
        found.append(entry)
    return found


def centre(samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Medians in ms of the first prompt (or call) and of a step, however few samples there are."""
    names = {"first": "latency_ms" if samples.get("latency_ms") else "ttft_ms", "step": "tpot_ms"}
    return {k: plain.median(samples[name]) for k, name in names.items() if samples.get(name)}


def power(meters: Sequence[Mapping[str, Any]], tokens_per_second: float | None) -> dict[str, Any]:
    """energy, clocks, temperature and throttled of the timed processes, out of one meter's result for each.

    joules_per_token: mean power of the processes, their loading included, over the decoded tokens a second.
    """
    energy = dict(meters[0]["energy"])
    seconds = sum(m["energy"]["seconds"] for m in meters)
    if all(m["energy"]["source"] for m in meters) and seconds > 0:
        joules = math.fsum(m["energy"]["joules"] for m in meters)
        energy |= {"joules": joules, "watts": joules / seconds}
    energy |= {"seconds": seconds, "joules_per_token": None}
    if energy["source"] and tokens_per_second:
        energy["joules_per_token"] = energy["watts"] / tokens_per_second
    reasons = dict.fromkeys(r for m in meters for r in m["throttled"]["reasons"])
    counters = [m["throttled"].get("counters", {}) for m in meters]
    added = {k: math.fsum(c.get(k, 0.0) for c in counters) for k in counters[0]}
    return {
        "energy": energy,
        "clocks": _merged([m["clocks"] for m in meters]),
        "temperature": _merged([m["temperature"] for m in meters]),
        "throttled": {"reasons": list(reasons), "counters": added},
    }


def _merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first, its extremes and means those of all."""
    found = {k: v for k, v in parts[0].items() if k != "domains"}
    for ending, of in (("_min", min), ("_max", max), ("_mean", plain.fmean)):
        for key in (k for k in found if k.endswith(ending)):
            values = [p[key] for p in parts if p.get(key) is not None]
            found[key] = of(values) if values else None
    return found


def raw(measured: Mapping[str, Any]) -> dict[str, Any]:
    """One process's samples in milliseconds, to a tenth of a microsecond."""

    def ms(value: int | list[int]) -> Any:  # noqa: ANN401 - a number for a number, a list for a list
        return [round(v / 1e6, 4) for v in value] if isinstance(value, list) else round(value / 1e6, 4)

    return {
        "load_ms": ms(measured["loaded"]["load_ns"]),
        "peak_bytes": measured["done"]["peak_bytes"],
        "wall_s": measured["wall_s"],
        "repetitions": [
            {k.replace("_ns", "_ms"): ms(v) for k, v in r.items() if k.endswith("_ns")}
            for r in measured["repetitions"]
        ],
    }
