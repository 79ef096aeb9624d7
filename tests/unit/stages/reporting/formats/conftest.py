"""Small records of every kind, and a folder of artefacts to make runs from."""

import copy
import math
from pathlib import Path

import pytest

from edgesft.core import artifact
from edgesft.core.artifact import Request
from edgesft.stages.reporting import FILES, Run

FINGERPRINT = {
    "schema": 1,
    "id": "sha256:" + "5" * 64,
    "refuse": {"cpu": "Some Processor", "cores": 4, "gpus": [], "threads": 4},
    "record": {"kernel": "6.1", "celsius": None},
}
SIDE = {
    "ref": "out/x",
    "kind": "onnx",
    "digest": "sha256:" + "1" * 64,
    "bytes": 1_000_000,
    "quantize": "int4",
}
WORKLOAD = {"prompt_tokens": 64, "decode_tokens": 32, "repetitions": 2, "seed": 0}


def percentiles(middle, samples=100):
    """As the profile has them: p99 refused below 662 samples."""
    known = {"p50": middle, "p90": 1.2 * middle, "p99": 1.6 * middle if samples >= 662 else None}
    return {
        **known,
        "low": {k: v and 0.98 * v for k, v in known.items()},
        "high": {k: v and 1.02 * v for k, v in known.items()},
        "reasons": {} if samples >= 662 else {"p99": f"needs 662 samples, has {samples}"},
        "samples": samples,
    }


def make_profile():
    rows = [
        {"operator": op, "kernel": f"{op}Kernel", "layer": layer, "node_count": 1, "calls": 1.0, "ms": ms,
         "share": ms / 10, "bytes": 1e6, "flops": 4e6, "gbs": 1 / ms, "gflops": 4 / ms, "limit_share": 0.5,
         "bound": "memory"}
        for layer in (0, 1, None)
        for op, ms in (("MatMulNBits", 2.0), ("GroupQueryAttention", 0.5))
    ]  # fmt: skip
    return {
        "schema": 2,
        "kind": "decoder",
        "ttft_ms": percentiles(300.0),
        "tpot_ms": percentiles(10.0, 700),
        "itl_ms": percentiles(10.0, 700),
        "tokens_per_second": 98.0,
        "end_to_end": {"tokens_per_second": 60.0, "tokens": 700, "seconds": 11.0},
        "load_ms": {"cold": None, "warm": 250.0, "evicted": 0.1, "reason": "only 10 % could be dropped",
                    "idle_resume": [{"seconds": 1.0, "ttft_ms": 310.0, "first_step_ms": 12.0, "ratio": 1.2}]},
        "contexts": [{"prompt_tokens": n, "ttft_ms": percentiles(2.0 * n), "tpot_ms": percentiles(10.0)}
                     for n in (16, 256)],
        "batches": [{"batch": 2, "ttft_ms": percentiles(500.0), "tpot_ms": 12.0, "tokens_per_second": 160.0}],
        "threads_sweep": [{"threads": 1, "ttft_ms": 900.0, "tpot_ms": 30.0, "tokens_per_second": 33.0}],
        "operators": {"phase": "decode", "source": "onnxruntime", "steps": 48, "total_ms": 7.5, "rows": rows,
                      "layers": [{"layer": n, "ms": 2.5, "share": 0.25} for n in (0, 1)],
                      "types": [{"operator": "MatMulNBits", "kernel": "K", "ms": 6.0, "share": 0.8}]},
        "roofline": {"copy_gbs": 11.0, "gemm_gflops": {"fp32": 90.0, "int8": 300.0}, "source": "measured",
                     "step": {"bytes": 1e8, "flops": 3e8, "limit_ms": 9.0, "measured_ms": 10.0,
                              "achieved": 0.9, "bound": "memory"}},
        "energy": {"source": "rapl", "joules_per_token": 0.12, "watts": 12.0, "reason": None},
        "clocks": {"source": None},
        "throttled": {"reasons": []},
        "peak_memory_bytes": 300_000_000,
        "artifact_bytes": 100_000_000,
        "quantize": "int4",
        "pattern": None,
        "threads": 4,
        "workload": {**WORKLOAD, "prompts": 15, "processes": 2},
        "warmup": {"steady": True},
        "notes": [],
        "fingerprint": FINGERPRINT,
        "samples": {"tpot_ms": [10 + 0.01 * (i % 7) for i in range(700)], "ttft_ms": [300.0, 310.0] * 50},
    }  # fmt: skip


def make_verdict(verdict="pass"):
    ratio = {"pass": 1.001, "fail": 1.062, "inconclusive": 1.025}.get(verdict)
    interval = [None, None] if ratio is None else [ratio - 0.01, ratio + 0.01]
    measured = {"ratio": ratio, "interval": interval, "level": 0.99, "pairs": 12 if ratio else 0,
                "noise": 0.01 if ratio else None, "detectable": 0.014 if ratio else None,
                "pairs_predicted": 8 if ratio else None}  # fmt: skip
    own = verdict if ratio else "inconclusive"
    shared = {"metric": "tpot", "verdict": own, "blocking": True, "margin": 0.05, **measured}
    both = {"base_ms": 10.0, "head_ms": 10.0 * ratio} if ratio else {"base_ms": None, "head_ms": None}
    raw = [
        {"pair": i, "first": "base", "discarded": None if i != 3 else "the processor throttled for heat",
         "ratio": {"tpot": {"cpu": ratio * (1 + 0.001 * (i % 3)), "wall": ratio}},
         "base": {"value": {"tpot": {"cpu": 10.0, "wall": 10.1}}},
         "head": {"value": {"tpot": {"cpu": 10.0 * ratio, "wall": 10.1 * ratio}}}}
        for i in range(13 if ratio else 0)
    ]  # fmt: skip
    return {
        "schema": 2,
        "verdict": verdict,
        **({} if ratio else {"error": "`cores` is `8` there and `4` here"}),
        "metric": "tpot",
        **measured,
        "estimator": "median",
        "clock": "both",
        "decided_by": "cpu",
        "looks": [{"clock": "cpu", "n": 8, "p_regression": 0.5, "p_noninferior": 0.01, "hodges_lehmann": 0.0,
                   "decision": "continue"}],
        "margins": {"regression": 0.05, "tolerance": 0.02, "tail": 0.1},
        "errors": {"alpha": 0.01, "beta": 0.05, "looks": [8, 12]},
        "inconclusive": "report",
        "drill_slowdown": 0.0,
        "discarded": [{"pair": 3, "why": "the processor throttled for heat"}] if ratio else [],
        "base": SIDE,
        "head": {**SIDE, "ref": "out/y"},
        "workload": WORKLOAD,
        "fingerprint": FINGERPRINT,
        "calibration": {"made_at": "2026-01-01T00:00:00+00:00", "expires_at": "2026-01-31T00:00:00+00:00",
                        "digest": "sha256:1", "armed": True},
        "metrics": [
            {**shared, "clock": "cpu", **both},
            {**shared, "clock": "wall", **both, "verdict": "inconclusive"},
            {"metric": "peak_memory", "verdict": "fail", "blocking": False, "margin": 0.02, "ratio": 1.04,
             "base": 3e8, "head": 3.12e8},
        ],
        "budgets": [],
        "raw": raw,
    }  # fmt: skip


def make_calibration():
    return {
        "schema": 1, "armed": False, "why": "false alarms", "metric": "tpot", "estimator": "min",
        "clock": "cpu", "margin_percent": 5.0, "tolerance_percent": 2.0, "alpha": 0.01, "beta": 0.05,
        "max_pairs": 48,
        "false_alarm": {"rate": 0.002, "high": 0.004}, "detection": {"3": 0.6, "5": 0.91}, "pass_rate": 0.97,
        "inconclusive": 0.03, "pairs_mean": 13.2, "pairs_predicted": 12, "noise": 0.02, "mde_percent": 5.4,
        "margin_met_percent": 6.0, "processes": 96, "level_ms": 14.2, "workload": WORKLOAD,
        "candidates": [{"estimator": "min", "clock": "cpu", "noise": 0.02, "false_alarm": 0.002,
                        "detection": {"5": 0.91}, "pairs_mean": 13.2}],
        "fingerprint": FINGERPRINT, "artifact": SIDE, "made_at": "2026-01-01T00:00:00+00:00",
        "expires_at": "2026-01-31T00:00:00+00:00", "seed": 0, "samples": {},
    }  # fmt: skip


def make_evaluation():
    return {"examples": 64, "accuracy": 0.9, "loss": 0.3, "perplexity": None, "data": "demo:sst2",
            "split": "test", "intervals": {"accuracy": [0.8, 0.95]}}  # fmt: skip


def make_prediction():
    span = {"low": 5.0, "high": 9.0}
    return {
        "schema": 1,
        "predicted": True,
        "device": {"id": "orin-nano", "name": "Orin Nano", "kind": "soc", "mode": "15W"},
        "prompt_tokens": 128,
        "context": 2048,
        "ttft_ms": span,
        "tpot_ms": {"low": 5.0, "high": None},
        "fit": {"verdict": "tight", "context": 2048, "needed_bytes": {"low": 1e9, "high": 2e9},
                "available_bytes": {"low": 1.5e9, "high": 3e9}},
        "modes": {"15W": {"ttft_ms": span, "tpot_ms": span}},
        "sparse24": {"gain": False, "reason": "the weights do not hold the 2:4 pattern"},
        "assumptions": ["40 to 90 % of 68 GB/s"],
    }  # fmt: skip


def make_trend():
    points = [
        {"name": f"v{i}", "value": 10.0 + (i > 5), "added_at": "2026-01-01", "label": "main"}
        for i in range(12)
    ]
    changes = [{"index": 6, "before": 10.0, "after": 11.0, "ratio": 1.1}]
    return {"schema": 1, "metric": "tpot p50", "unit": "ms", "points": points, "changes": changes}


MAKERS = {
    "profile": make_profile,
    "verdict": make_verdict,
    "calibration": make_calibration,
    "evaluation": make_evaluation,
    "prediction": make_prediction,
    "trend": make_trend,
}


@pytest.fixture(scope="session")
def record():
    """A fresh record of a kind; a verdict takes the verdict."""

    def make(kind, *arguments):
        return copy.deepcopy(MAKERS[kind](*arguments))

    return make


@pytest.fixture(scope="session")
def run(record):
    """A run with a record of its own; fields given replace those of the record."""

    def make(kind, /, *arguments, name=None, **fields):
        return Run(name or kind, kind, {**record(kind, *arguments), **fields}, Path("out") / (name or kind))

    return make


@pytest.fixture(scope="session")
def every(run):
    """A run of every kind, and two profiles."""
    return [*(run(kind) for kind in MAKERS), run("profile", name="another", tokens_per_second=math.nan)]


@pytest.fixture
def seal():
    """Write a record as the artefact of a stage would be."""

    def make(folder, kind, record):
        with artifact.create(folder, Request(kind, kind, {}, {})) as (work, _):
            artifact.write_json(work.path / FILES[kind], record)
        return folder

    return make


HOSTILE = (
    "<script>alert(1)</script>",
    "a|b`c`*d*[x](http://e)@team #1",
    "line\r\n::error::forged",
    "]]>&<!-- \x00\x1b[31m \ud800 $\\frac$ {{7*7}} _x_",
    "_hidden",
    "%0A::stop-commands::x",
    '" onload="alert(1)',
)


@pytest.fixture(params=HOSTILE, ids=range(len(HOSTILE)))
def hostile(request, run):
    """The hostile text, and runs that carry it wherever a file may."""
    text = request.param
    side = {**SIDE, "ref": text}
    entry = {
        "metric": text,
        "verdict": "fail",
        "blocking": True,
        "ratio": 1.2,
        "clock": text,
        "interval": None,
    }
    budget = {"name": text, "unit": text, "limit": 1.0, "value": 2.0, "verdict": "fail", "reason": text}
    fingerprint = {**FINGERPRINT, "refuse": {text: text}}
    operators = {"phase": text, "source": text, "total_ms": 1.0, "layers": [{"layer": text, "ms": 1.0}],
                 "rows": [{"operator": text, "kernel": text, "layer": text, "ms": 1.0, "share": 1.0,
                           "bytes": 1e6, "flops": 1e6}]}  # fmt: skip
    more = {"fingerprint": fingerprint, "workload": {text: text}}
    gate = {"metrics": [entry], "budgets": [budget], "base": side, "head": side, "error": text}
    modes = make_prediction()["modes"]["15W"]
    inside = {"operators": operators, "roofline": {"copy_gbs": 1.0, "gemm_gflops": {text: 2.0}}}
    return text, [
        run("verdict", "fail", name=text, **gate, **more),
        run("profile", name=f"p{text}", notes=[text], throttled={"reasons": [text]}, **inside, **more),
        run("calibration", name=f"c{text}", why=text, estimator=text, artifact=side, **more),
        run("evaluation", name=f"e{text}", data=text),
        run("prediction", name=f"d{text}", assumptions=[text], modes={text: modes},
            device={"id": text, "name": text, "kind": text, "mode": text},
            sparse24={"gain": False, "reason": text}),
        run("trend", name=f"t{text}", metric=text, unit=text,
            points=[{"name": text, "value": 1.0, "label": text}] * 3),
    ]  # fmt: skip
