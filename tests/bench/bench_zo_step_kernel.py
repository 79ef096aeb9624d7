"""Cost of the zeroth-order perturbation against torch, one thread, the sides interleaved in one process.

    python tests/bench/bench_zo_step_kernel.py --out docs/results/zo-step-kernel.json

Fused noise and update against filling a buffer with `Tensor.normal_` (which adds nothing), and a perturbed
linear layer against a plain one. Times are CPU seconds of the thread; a ratio is the median over rounds of
the ratios within a round.
"""

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import linear

from edgesft.core.catalog import runtime
from edgesft.kernels import dispatch, perturb

SHAPES = ((576, 1536), (1536, 576), (2048, 2048))
NS, RATIO = 1.0, 1.25  # the bars: nanoseconds a weight of add_noise_, perturbed over plain linear


def measure(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each side in each round, in a seeded random order; the first two rounds warm up."""
    rng = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 2):
        for name in rng.sample(sorted(sides), len(sides)):
            begin = time.thread_time()
            sides[name]()
            times[name].append(time.thread_time() - begin)
    return {name: values[2:] for name, values in times.items()}


def update(shape: tuple[int, int], high: float, rounds: int) -> dict[str, float]:
    weight, z = torch.randn(shape) * 0.02, torch.empty(shape)

    def ours() -> int:
        return perturb.add_noise_(weight, seed=1, tensor=2, scale=1e-9, low=0.0, high=high)

    times = measure({"ours": ours, "torch": z.normal_}, rounds)
    scale = 1e9 / weight.numel()
    found = {f"{name}_ns": scale * statistics.median(values) for name, values in times.items()}
    return {**found, "ours_ns_best": scale * min(times["ours"])}


def forward(shape: tuple[int, int], rows: int, high: float, rounds: int) -> dict[str, float]:
    weight, x = torch.randn(shape) * 0.02, torch.randn(rows, shape[1])
    sides: dict[str, Callable[[], object]] = {
        "plain": lambda: linear(x, weight),
        "perturbed": lambda: perturb.perturbed_linear(
            x, weight, None, seed=1, tensor=2, scale=1e-3, low=0.0, high=high
        ),
        "by_torch": lambda: linear(x, weight + 1e-3 * torch.randn(shape)),
    }
    times = measure(sides, rounds)
    found = {f"{name}_ms": 1e3 * statistics.median(values) for name, values in times.items()}
    for name in ("perturbed", "by_torch"):
        ratios = [a / b for a, b in zip(times[name], times["plain"], strict=True)]
        found[f"{name}_ratio"] = statistics.median(ratios)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--high", type=float, default=0.02, help="threshold; inf is dense MeZO")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    result: dict[str, object] = {
        "what": "perturbation by `add_noise_` and `perturbed_linear`, one thread",
        "bars": {"ours_ns": NS, "perturbed_ratio": RATIO},
        "rows": arguments.rows,
        "high": arguments.high if math.isfinite(arguments.high) else "inf",
        "rounds": arguments.rounds,
        "kernels": dispatch.status(),
        "shapes": {
            f"{out}x{width}": {
                name: round(value, 3)
                for name, value in {
                    **update((out, width), arguments.high, arguments.rounds),
                    **forward((out, width), arguments.rows, arguments.high, arguments.rounds),
                }.items()
            }
            for out, width in SHAPES
        },
    }
    print(json.dumps(result, indent=2))
    if arguments.out is not None:
        result["fingerprint"] = runtime("devices.host").fingerprint()
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
