"""Speed of the fused perturbed product against torch's and against strips, interleaved in one process.

    python tests/bench/bench_perturbed_gemm.py --threads 1 --out docs/results/perturbed-gemm.json

For each shape and number of rows a two-sided step is timed: two groups of so many rows, one noise. "torch" is
two plain products of one group each; "strips" is `perturbed_linear` without the fused product. Times are CPU
seconds of the process, all its threads, so that other load on the machine counts less; a ratio is the median
over rounds of the ratios within a round. GFLOP/s are those of the product alone, for a core.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from edgesft.core.catalog import runtime
from edgesft.core.protocols import Law, Mask, Shift
from edgesft.core.quantized.codes import quantize
from edgesft.kernels.perturb import api, gemm

SHAPES = ((576, 576), (1536, 576), (576, 1536))  # (out, in) of SmolLM2-135M
ROWS = (32, 64, 128, 256, 512, 1024, 2048)
CASES: tuple[tuple[str, str, Law], ...] = (  # stored and computed as; noise
    ("float32", "native", "rademacher"),
    ("float32", "native", "gaussian"),
    ("bfloat16", "native", "rademacher"),
    ("bfloat16", "native", "gaussian"),
    ("float32", "bf16", "rademacher"),
    ("float32", "int8", "rademacher"),
    ("int4", "native", "rademacher"),
)


def measure(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of the process of each side in each round, in a seeded random order; two rounds warm up."""
    rng = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 2):
        for name in rng.sample(sorted(sides), len(sides)):
            begin = time.process_time()
            sides[name]()
            times[name].append(time.process_time() - begin)
    return {name: values[2:] for name, values in times.items()}


def compare(
    out: int, width: int, rows: int, case: tuple[str, str, Law], rounds: int
) -> dict[str, float | bool]:
    stored, compute, law = case
    dtype = torch.bfloat16 if stored == "bfloat16" else torch.float32
    plain = (torch.randn(out, width) * 0.02).to(dtype)
    weight: Any = quantize(plain, 4, 32) if stored == "int4" else plain
    x = torch.randn(2 * rows, width).to(dtype)
    halves = x[:rows].contiguous(), x[rows:].contiguous()
    keywords: dict[str, Any] = {
        "shifts": (Shift(1, 1e-3, law), Shift(1, -1e-3, law)),
        "tensor": 2,
        "mask": Mask(),
        "compute": compute,
    }

    def strips() -> Tensor:
        kept, api._gemm = api._gemm, None
        try:
            return api.perturbed_linear(x, weight, None, **keywords)
        finally:
            api._gemm = kept

    times = measure(
        {
            "torch": lambda: [linear(half, plain) for half in halves],
            "fused": lambda: gemm.linear(x, weight, None, **keywords),
            "strips": strips,
        },
        rounds,
    )
    work = 4e-9 * rows * out * width
    found: dict[str, float | bool] = {
        f"{name}_gflops": round(work / statistics.median(values), 1) for name, values in times.items()
    }
    for name in ("torch", "strips"):
        ratios = [a / b for a, b in zip(times["fused"], times[name], strict=True)]
        found[f"fused_to_{name}"] = round(statistics.median(ratios), 3)
    del keywords["tensor"]
    found["used"] = gemm.fits(x, weight, **keywords)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="of one side of the step")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if not gemm.kinds():
        raise SystemExit("the fused product is not available on this machine")
    table: dict[str, dict[str, dict[str, float | bool]]] = {}
    for case in CASES:
        kind = gemm.BYTE if case[1] == "int8" else gemm.HALF if "b" in case[0] + case[1] else gemm.FLOAT
        if not gemm.kinds() & kind:
            continue
        title = " ".join(case)
        print(f"{title}\n     shape  rows   torch   fused  strips  GFLOP/s    fused/torch  fused/strips")
        table[title] = {}
        for out, width in SHAPES:
            for rows in arguments.rows:
                found = compare(out, width, rows, case, arguments.rounds)
                table[title][f"{out}x{width} {rows}"] = found
                speeds = [f"{found[f'{name}_gflops']:7.0f}" for name in ("torch", "fused", "strips")]
                ratios = f"{found['fused_to_torch']:21.2f} {found['fused_to_strips']:13.2f}"
                note = "" if found["used"] else "  (not used)"
                print(f"{f'{out}x{width}':>10} {rows:5d} {' '.join(speeds)}{ratios}{note}", flush=True)
    if arguments.out is not None:
        result = {
            "what": "two-sided perturbed product, fused, against two of torch's and against strips",
            "threads": arguments.threads,
            "rounds": arguments.rounds,
            "table": table,
            "fingerprint": runtime("devices.host").fingerprint(),
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
