"""Perplexity of a demo model over held-out prose: dense, and one-shot 2:4 by magnitude, Wanda and SparseGPT.

    python tests/bench/bench_prune_quality.py --out docs/results/prune_quality.json

Bar: SparseGPT <= Wanda < magnitude. Calibration windows come from the train split of the passages,
perplexity from windows of the test split. Exit code 1 if the bar is missed.
"""

import argparse
import math
import platform
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from edgesft.core import artifact, data, models
from edgesft.core.artifact import Artifact
from edgesft.core.stage import execute
from edgesft.stages.sparsify import Sparsify

METHODS = ("magnitude", "wanda", "sparsegpt")


def perplexity(path: Path, windows: torch.Tensor) -> float:  # windows: (count, length) int64
    """exp of the mean next-token loss over all windows."""
    return perplexity_of(models.load(path), windows)


def windows_of(inputs: Mapping[str, Artifact], count: int, length: int) -> torch.Tensor:
    """(count, length) held-out tokens of the data in `inputs`, by the tokenizer of its model."""
    opened = data.open_data(inputs["data"], data.DataOptions(), models.tokenizer(inputs["model"].path))
    return torch.as_tensor(opened.windows(split="test", length=length, count=count, seed=0))


def perplexity_of(model: Any, windows: torch.Tensor) -> float:
    """`perplexity` of a model in memory."""
    head, backbone = models.head(model), models.backbone(model)
    total, count = 0.0, 0
    with torch.no_grad():
        for part in windows.split(2):
            hidden = backbone(input_ids=part, use_cache=False).last_hidden_state[:, :-1]
            logits = head(hidden.flatten(0, 1))
            total += float(torch.nn.functional.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum"))
            count += part[:, 1:].numel()
    return math.exp(total / count)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One row for each method, the dense model first."""
    torch.set_num_threads(arguments.threads)
    options = data.DataOptions()
    inputs: dict[str, Artifact] = {
        "model": models.resolve(arguments.model),
        "data": data.resolve(arguments.data, options),
    }
    windows = windows_of(inputs, arguments.windows, arguments.length)
    rows = [{"method": "dense", "perplexity": perplexity(inputs["model"].path, windows)}]
    for method in arguments.methods:
        stage = Sparsify.from_recipe(
            {
                "compress": {"use": method},
                "pattern": arguments.pattern,
                "samples": arguments.samples,
                "length": arguments.calibration_length,
                "threads": arguments.threads,
            }
        )
        with tempfile.TemporaryDirectory() as folder:
            began = time.monotonic()
            done, _ = execute(stage, inputs, Path(folder) / "sparse")
            wall = time.monotonic() - began
            kept = ("density", "relative_output_error", "sparse_layers", "tiny_entries", "seconds")
            row = {"method": method, "perplexity": perplexity(done.path, windows), "wall_seconds": wall}
            rows.append(row | {key: done.metrics[key] for key in kept})
        print(rows[-1], file=sys.stderr)
    return {
        "rows": rows,
        "evaluated_tokens": windows.numel(),
        **{k: str(v) for k, v in vars(arguments).items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--data", default="demo:prose")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--calibration-length", type=int, default=256, help="tokens a calibration window")
    parser.add_argument("--windows", type=int, default=32, help="held-out windows")
    parser.add_argument("--length", type=int, default=512, help="tokens a held-out window")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments)
    found = {row["method"]: row["perplexity"] for row in result["rows"]}
    result["bar"] = "sparsegpt <= wanda < magnitude"
    ordered = all(name in found for name in METHODS)
    result["met"] = ordered and found["sparsegpt"] <= found["wanda"] < found["magnitude"]
    result["machine"] = {"machine": platform.machine(), "torch": torch.__version__}
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        artifact.write_json(arguments.out, result)
    for row in result["rows"]:
        print(f"{row['method']:>10}  perplexity {row['perplexity']:.2f}  seconds {row.get('seconds', 0):.1f}")
    return 0 if result["met"] or not ordered else 1


if __name__ == "__main__":
    sys.exit(main())
