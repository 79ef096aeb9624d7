"""Cost of the zeroth-order perturbation against torch, one thread, the sides interleaved in one process.

    python tests/bench/bench_zo_step_kernel.py --out docs/results/zo-step-kernel.json

For each law of the noise: an update (`sweep`), the two strips of a pair of directions (`pair`), many updates
of one weight (`replay`, for each update) in nanoseconds a weight, next to filling a buffer with
`Tensor.normal_` and to one addition in memory by torch, which is what memory allows; then a perturbed linear
layer and a stacked pair against plain ones. Times are CPU seconds of the thread; a ratio is the median over
rounds of the ratios within a round.
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
from edgesft.core.protocols import Law, Mask, Shift, Update
from edgesft.kernels import dispatch, perturb

SHAPES = ((576, 1536), (1536, 576), (2048, 2048))
LAWS: tuple[tuple[Law, int], ...] = (("gaussian", 0), ("rademacher", 0), ("low-rank", 2))
NS, RATIO = 1.0, 1.25  # the bars: nanoseconds a weight of a gaussian update, perturbed over plain linear
UPDATES = 50


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


def mask_of(law: Law, high: float) -> Mask:
    return Mask() if law == "low-rank" else Mask(high=high)


def updates(shape: tuple[int, int], high: float, rounds: int) -> dict[str, float]:
    weight, z = torch.randn(shape) * 0.02, torch.empty(shape)
    strips = [torch.empty(shape), torch.empty(shape)]
    sides: dict[str, Callable[[], object]] = {
        "torch_normal": z.normal_,
        "torch_add": lambda: weight.add_(0.0),
    }
    per: dict[str, int] = {}
    for law, rank in LAWS:
        mask, shift, opposite = mask_of(law, high), Shift(1, 1e-9, law, rank), Shift(1, -1e-9, law, rank)

        def sweep(shift: Shift = shift, mask: Mask = mask) -> int:
            return perturb.descend_(weight, shifts=(shift,), tensor=2, mask=mask)

        def pair(shifts: tuple[Shift, Shift] = (shift, opposite), mask: Mask = mask) -> None:
            kernel = dispatch.pick("perturb", weight, strips[0])
            kernel.strips(weight, slice(0, shape[0]), shifts, strips, tensor=2, mask=mask)  # type: ignore[attr-defined]

        def replay(step: Update = Update((shift,)), mask: Mask = mask) -> int:  # noqa: B008 - of this law
            return perturb.replay_(weight, [step] * UPDATES, tensor=2, mask=mask)

        sides |= {f"{law}_sweep": sweep, f"{law}_pair": pair, f"{law}_replay": replay}
        per[f"{law}_replay"] = UPDATES
    times = measure(sides, rounds)
    found = {}
    for name, values in times.items():
        found[f"{name}_ns"] = 1e9 / weight.numel() / per.get(name, 1) * statistics.median(values)
    return found


def forward(shape: tuple[int, int], rows: int, high: float, rounds: int) -> dict[str, float]:
    weight, x = torch.randn(shape) * 0.02, torch.randn(rows, shape[1])
    both = x.repeat(2, 1)
    sides: dict[str, Callable[[], object]] = {
        "plain": lambda: linear(x, weight),
        "plain_two": lambda: (linear(x, weight), linear(x, weight)),
        "by_torch": lambda: linear(x, weight + 1e-3 * torch.randn(shape)),
    }
    for law, rank in LAWS:
        mask, shift, opposite = mask_of(law, high), Shift(1, 1e-3, law, rank), Shift(1, -1e-3, law, rank)

        def one(shift: Shift = shift, mask: Mask = mask) -> object:
            return perturb.perturbed_linear(x, weight, None, shifts=(shift,), tensor=2, mask=mask)

        def two(shifts: tuple[Shift, Shift] = (shift, opposite), mask: Mask = mask) -> object:
            return perturb.perturbed_linear(both, weight, None, shifts=shifts, tensor=2, mask=mask)

        sides |= {law: one, f"{law}_pair": two}
    times = measure(sides, rounds)
    found = {f"{name}_ms": 1e3 * statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        if not name.startswith("plain"):
            plain = times["plain_two" if name.endswith("pair") else "plain"]
            found[f"{name}_ratio"] = statistics.median(a / b for a, b in zip(values, plain, strict=True))
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
        "what": "perturbation by `descend_`, strips, `replay_` and `perturbed_linear`, one thread",
        "bars": {"gaussian_sweep_ns": NS, "gaussian_ratio": RATIO},
        "rows": arguments.rows,
        "high": arguments.high if math.isfinite(arguments.high) else "inf",
        "rounds": arguments.rounds,
        "kernels": dispatch.status(),
        "shapes": {
            f"{out}x{width}": {
                name: round(value, 3)
                for name, value in {
                    **updates((out, width), arguments.high, arguments.rounds),
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
