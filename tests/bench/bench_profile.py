"""What the profiler adds to what it measures, and whether plain ONNX Runtime agrees with it.

    python tests/bench/bench_profile.py EXPORTED -o docs/results/profile.json

Overhead: in one process, the same prompts decoded by the worker's timed loop and by a bare loop that makes
the runtime's calls and reads the clock once before and once after, both sides of a round in random order;
and by itself the time of one lap of the stopwatch. Agreement: the worker in one process, and in another a
script that knows onnxruntime and numpy only and times the calls of its session; pairs of processes in random
order, a number each: the median step. Intervals are of Hodges-Lehmann, at 95 %. Run it on a machine that
does nothing else.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgesft.core import artifact
from edgesft.core.catalog import runtime
from edgesft.core.statistics.sequential import hodges_lehmann, hodges_lehmann_interval

PLAIN = """
import json, sys, time
import numpy as np, onnxruntime as ort

folder = sys.argv[1]
threads, prompt, steps, repetitions, seed = map(int, sys.argv[2:])
about = json.load(open(folder + "/export.json"))
options = ort.SessionOptions()
options.intra_op_num_threads = threads
options.log_severity_level = 3
session = ort.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])
names = [f"{i}.{n}" for i in range(about["layers"]) for n in ("key", "value")]
rng, times = np.random.default_rng(seed), []
for _ in range(repetitions):
    room = prompt + steps
    logits = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, about["vocabulary"]), np.float32))
    binding = session.io_binding()
    binding.bind_ortvalue_output("logits", logits)
    for name in names:
        empty = np.zeros((1, about["kv_heads"], room, about["head_dim"]), np.float32)
        cache = ort.OrtValue.ortvalue_from_numpy(empty)
        binding.bind_ortvalue_input("past_key_values." + name, cache)
        binding.bind_ortvalue_output("present." + name, cache)
    ids = rng.integers(0, about["vocabulary"], (1, prompt))
    own = []
    for length in range(prompt, room + 1):
        begin = time.perf_counter()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((1, length), np.int64))
        session.run_with_iobinding(binding)
        own.append(time.perf_counter() - begin)
        ids = logits.numpy()[0].argmax().reshape(1, 1).astype(np.int64)
    times += own[1:]
print(json.dumps(times))
"""  # shares no line with what it is compared with


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("exported", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=150, help="of the overhead")
    parser.add_argument("--pairs", type=int, default=16, help="of processes, for the agreement")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompts", type=int, default=6, help="of a process, for the agreement")
    parser.add_argument("--threads", type=int, default=0)
    asked = parser.parse_args()
    exported = artifact.read(asked.exported, "onnx")
    about = json.loads((exported.path / "export.json").read_text())
    if about["kind"] != "decoder" or not about.get("shared_kv"):
        parser.error(
            f"`{exported.path}` is no decoder with a KV cache in place, as `edgesft export` writes it"
        )
    host = runtime("devices.host")
    threads = asked.threads or host.default_threads()
    work = {"prompt_tokens": asked.prompt_tokens, "decode_tokens": asked.tokens}
    result = {
        "overhead": overhead(exported.path, threads, work, asked.rounds),
        "agreement": agreement(exported, threads, work, asked.pairs, asked.prompts),
        "workload": {**work, "batch": 1, "threads": threads},
        "artifact": {"digest": exported.digest, "bytes": exported.bytes, "quantize": about["quantize"]},
        "fingerprint": host.fingerprint(threads=threads),
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    artifact.write_json(asked.out, result)
    print(json.dumps({k: {**result[k], "raw": "..."} for k in ("overhead", "agreement")}, indent=2))


def overhead(folder: Path, threads: int, work: dict[str, int], rounds: int) -> dict[str, Any]:
    """Ratio of the latency that the worker's loop reports to the wall time of a loop without a stopwatch."""
    worker = runtime("devices.worker")
    model = runtime("exporters.runtime").OnnxRunnable(folder, threads=threads)
    job = worker._Job(model, work, [0], (0.0, "wall"))
    rng = random.Random(0)
    times: dict[str, list[float]] = {"timed": [], "bare": []}
    for number in range(rounds + 2):
        prompt = worker._prompt(model, work, [0], number)
        for side in rng.sample(sorted(times), 2):
            if side == "bare":
                times[side].append(bare(model, prompt, work["decode_tokens"]))
            else:
                found = job._decode(prompt, work["decode_tokens"])
                times[side].append((found["ttft_ns"] + sum(found["step_ns"])) / 1e9)
    ratios = [t / b for t, b in zip(times["timed"][2:], times["bare"][2:], strict=True)]
    return {
        "what": "latency of a prompt and its tokens in the timed loop / in a bare loop, one process",
        **summary(ratios),
        "bar": "below 1.01",
        "lap_us": round(lap(worker), 3),
        "rounds": rounds,
        "raw": {name: [round(1e3 * t, 4) for t in values[2:]] for name, values in times.items()},
    }


def lap(worker: Any, count: int = 20_000) -> float:
    """Microseconds that the stopwatch itself takes a token."""
    watch = worker._Stopwatch(0.0, "wall")
    begin = time.perf_counter()
    for _ in range(count):
        watch.lap()
    return 1e6 * (time.perf_counter() - begin) / count


def bare(model: Any, prompt: np.ndarray, steps: int) -> float:
    """Seconds of a prompt and greedy steps, the clock read at the start and the end only."""
    state = model.start(len(prompt) + steps + 1)
    begin = time.perf_counter()
    token = int(state.prefill(prompt).argmax())
    for _ in range(steps):
        token = int(state.step(token).argmax())
    return time.perf_counter() - begin


def agreement(exported: Any, threads: int, work: dict[str, int], pairs: int, prompts: int) -> dict[str, Any]:
    """Ratio of the profiler's time per token to that of plain onnxruntime, by pairs of processes."""
    client = runtime("devices.client")
    rng = random.Random(1)
    steps: dict[str, list[float]] = {"profiler": [], "plain": []}
    for number in range(pairs):
        for side in rng.sample(sorted(steps), 2):
            if side == "plain":
                times = plain(exported.path, threads, work, prompts, number)
            else:
                load = {**work, "repetitions": prompts}
                asked = client.request(exported, threads=threads, workload=load, seed=[1, number])
                times = [t / 1e9 for r in client.measure(asked, 600)["repetitions"] for t in r["step_ns"]]
            steps[side].append(statistics.median(times[work["decode_tokens"] :]))  # the first prompt warms up
    ratios = [ours / theirs for ours, theirs in zip(steps["profiler"], steps["plain"], strict=True)]
    return {
        "what": "time per token of the profiler / of a plain onnxruntime script, medians of processes",
        **summary(ratios),
        "bar": "within 3 %",
        "pairs": pairs,
        "tpot_ms": {name: round(1e3 * statistics.median(values), 4) for name, values in steps.items()},
        "raw": {name: [round(1e3 * t, 4) for t in values] for name, values in steps.items()},
    }


def plain(folder: Path, threads: int, work: dict[str, int], prompts: int, seed: int) -> list[float]:
    """Seconds of every decode step, from a process that shares nothing with EdgeSFT but the file."""
    arguments = [folder.resolve(), threads, work["prompt_tokens"], work["decode_tokens"], prompts, seed]
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [sys.executable, "-c", PLAIN, *map(str, arguments)],
            cwd=elsewhere,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            capture_output=True,
            text=True,
            check=True,
            timeout=600,
        )
    found: list[float] = json.loads(done.stdout)
    return found


def summary(ratios: list[float]) -> dict[str, Any]:
    logs = [math.log(r) for r in ratios]
    low, high = hodges_lehmann_interval(logs, 0.025)
    return {
        "ratio": round(math.exp(hodges_lehmann(logs)), 5),
        "median": round(statistics.median(ratios), 5),
        "interval_95": None if low is None or high is None else [round(math.exp(x), 5) for x in (low, high)],
    }


if __name__ == "__main__":
    main()
