"""Decode speed of an export against torch eager fp32 at batch 1, blocks of both interleaved in one process.

    python tests/bench/bench_decode.py MODEL EXPORTED --out docs/results/decode.json

Every round decodes the same number of tokens on each side, in a seeded random order; the ratio is the
median over rounds of torch's median step time over the export's.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from edgesft.core import models
from edgesft.core.catalog import runtime
from edgesft.core.torch_runtime import TorchRunnable


def median_step(runnable, prompt, tokens: int) -> float:
    """Median seconds of a greedy decode step after `prompt`, the first three steps left out."""
    state = runnable.start(len(prompt) + tokens + 1)
    token = int(np.argmax(state.prefill(prompt)))
    times = []
    for _ in range(tokens):
        begin = time.perf_counter()
        logits = state.step(token)
        times.append(time.perf_counter() - begin)
        token = int(np.argmax(logits))
    return statistics.median(times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("exported", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    host = runtime("devices.host")
    threads = arguments.threads or host.default_threads()
    torch.set_num_threads(threads)
    model = models.resolve(arguments.model)
    sides = {
        "torch": TorchRunnable(model.path, threads),
        "export": runtime("exporters.runtime").load(arguments.exported, threads=threads),
    }
    rng = random.Random(0)
    prompt = np.array(
        [rng.randrange(1000, sides["export"].vocabulary) for _ in range(arguments.prompt_tokens)]
    )
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name in rng.sample(sorted(sides), 2):
            times[name].append(median_step(sides[name], prompt, arguments.tokens))
    ratios = [slow / fast for slow, fast in zip(times["torch"], times["export"], strict=True)]
    result = {
        "what": "torch eager fp32 step time / export step time, batch 1",
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "bar": 2.5,
        "torch_ms": [round(1e3 * t, 3) for t in times["torch"]],
        "export_ms": [round(1e3 * t, 3) for t in times["export"]],
        "prompt_tokens": arguments.prompt_tokens,
        "threads": threads,
        "model": model.ref,
        "fingerprint": host.fingerprint(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "fingerprint"}, indent=2))


if __name__ == "__main__":
    main()
