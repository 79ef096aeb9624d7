"""What 2:4 and int4 together cost: perplexity over held-out prose with the weights of an export.

    python tests/bench/bench_nm_quality.py --out docs/results/nm-quality.json

Rows: the dense model; its int4 exports; pruned to 2:4 by magnitude and by SparseGPT and then rounded by the
export; pruned and rounded by SparseGPT in one sweep (`quantize`). The exports are pure int4 but for the
embedding and the head (`mixed=false`), so that nothing hides the difference. Bar: rounding in the sweep beats
rounding after it.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_prune_quality import perplexity_of, windows_of

from edgesft.core import artifact, data, models
from edgesft.core.stage import execute
from edgesft.exporters.dialects.graph import Precision
from edgesft.exporters.onnx import export
from edgesft.exporters.readback import dequantized
from edgesft.stages.sparsify import Sparsify

ROWS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "magnitude, then int4": {"use": "magnitude"},
    "sparsegpt, then int4": {"use": "sparsegpt"},
    "sparsegpt with int4 in one sweep": {"use": "sparsegpt", "quantize": "int4"},
}


def exported(path: Path, windows: torch.Tensor, sparse: str) -> tuple[float, float]:
    """(perplexity with the weights of an int4 export, bits a weight of its blocks' layers)."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        metrics = export(path, out, Precision("int4", 32, 4, mixed=False), sparse=sparse)
        model = models.load(path)
        state = model.state_dict()
        for name, array in dequantized(out):
            key = name if name in state else f"model.{name}"
            state[key].copy_(torch.from_numpy(array.copy()))
        bits = metrics.get("packed", {}).get("bits_per_weight", float("nan"))
        return perplexity_of(model, windows), bits


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--data", default="demo:prose")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--calibration-length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=32, help="held-out windows")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    inputs = {
        "model": models.resolve(arguments.model),
        "data": data.resolve(arguments.data, data.DataOptions()),
    }
    windows = windows_of(inputs, arguments.windows, arguments.length)
    rows = []
    for title, method in ROWS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = inputs["model"].path
            if method is not None:
                stage = Sparsify.from_recipe(
                    {
                        "compress": method,
                        "pattern": "2:4",
                        "samples": arguments.samples,
                        "length": arguments.calibration_length,
                        "threads": arguments.threads,
                    }
                )
                done, _ = execute(stage, inputs, Path(folder) / "sparse")
                path = done.path
            before = perplexity_of(models.load(path), windows)
            after, bits = exported(path, windows, "always")
            rows.append({"weights": title, "float": before, "exported": after, "bits_per_weight": bits})
            print(rows[-1], flush=True)
    found = {row["weights"]: row["exported"] for row in rows}
    better = found["sparsegpt with int4 in one sweep"] < found["sparsegpt, then int4"]
    said = {key: str(value) for key, value in vars(arguments).items() if key != "out"}
    result = {"rows": rows, "bar": "one sweep < one after the other", "met": better, **said}
    artifact.write_json(arguments.out, result)


if __name__ == "__main__":
    main()
