"""Replay of a trajectory: seconds, size of the file, and every bit against the steps taken one by one.

    python tests/bench/bench_replay.py --out docs/results/replay.json

Synthetic steps on the linear layers of a real model, each law in turn. The run is taken step by step with
`descend`, every weight swept once a step, as training does; the trajectory is written and read; then it is
replayed layer by layer as `merge` does, each layer checked by its hash. With fewer blocks the seconds are
also given scaled to the whole model: they are proportional to the weights.
"""

import argparse
import hashlib
import json
import math
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgesft.core import models
from edgesft.core.catalog import runtime
from edgesft.core.protocols import Law, Mask, Shift
from edgesft.core.tuning import delta_file, trajectory
from edgesft.core.tuning.replay import Replay
from edgesft.core.tuning.scalar_optim import Measured
from edgesft.core.tuning.schedule import derive
from edgesft.core.tuning.trajectory import Settings, Trajectory

LAWS: tuple[Law, ...] = ("rademacher", "gaussian")
SEED = 1


def linears(path: Path) -> dict[str, tuple[int, int]]:
    """Linear layers of the blocks by the names of the files, with their shapes."""
    weights = models.tensors(path)
    found = {}
    for name in weights:
        layer = name.removesuffix(".weight")
        if layer.endswith("_proj") and len(weights.shape(name)) == 2:
            out, width = weights.shape(name)
            found[layer] = (out, width)
    return found


def measured(steps: int, law: Law) -> list[Measured]:
    rng = random.Random(0)
    seeds = [derive(derive(SEED, "step", step), 0) for step in range(steps)]
    return [Measured(step, 1e-6, (Shift(seed, rng.gauss(0, 10), law),)) for step, seed in enumerate(seeds)]


def taken(run: Trajectory, held: "dict[str, Any]", masks: dict[str, Mask]) -> float:
    """Take the steps one by one; returns the seconds."""
    host, tensor_id = runtime("kernels.perturb.host"), runtime("kernels.perturb").tensor_id
    began = time.perf_counter()
    for update in run.updates():
        for name, weight in held.items():
            host.descend(
                weight,
                shifts=update.shifts,
                tensor=tensor_id(f"{name}.weight"),
                mask=masks[name],
                shrink=update.shrink,
                rounding=update.rounding,
            )
    return time.perf_counter() - began


def compare(path: Path, layers: Sequence[str], steps: int, law: Law, optimizer: str) -> dict[str, Any]:
    base = delta_file.base_of(path)

    def weight(name: str) -> Any:
        return np.array(base(name).numpy(), dtype=np.float32)

    def digests(held: dict[str, Any]) -> dict[str, bytes]:
        return {name: hashlib.sha256(array.data).digest() for name, array in held.items()}

    held = {name: weight(name) for name in layers}
    masks = {name: Mask(high=float(np.quantile(np.abs(w), 0.25))) for name, w in held.items()}
    settings = Settings(seed=SEED, optimizer=optimizer)  # type: ignore[arg-type] - checked by argparse
    draft = Trajectory(settings=settings, layers={}, measured=measured(steps, law), steps=steps)
    before = digests(held)
    one_by_one = taken(draft, held, masks)
    shapes = {name: w.shape for name, w in held.items()}
    run = Trajectory.of(
        settings, draft.measured, shapes=shapes, masks=masks, base=before, final=digests(held), steps=steps
    )
    with tempfile.TemporaryDirectory() as folder:
        size = run.save(Path(folder)).stat().st_size
        replay = Replay(trajectory.load(Path(folder)))
    equal = all(replay.run(n, weight(n)).tobytes() == held[n].tobytes() for n in layers)
    count = sum(math.prod(shape) for shape in shapes.values())
    return {
        "law": law,
        "optimizer": optimizer,
        "weights": count,
        "file_bytes": size,
        "one_by_one_seconds": one_by_one,
        "replay_seconds": replay.seconds,
        "replay_ns_a_weight_and_step": replay.seconds * 1e9 / count / steps,
        "bit_equal": equal and replay.verified,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--blocks", type=int, default=0, help="only the first ones; 0: all")
    parser.add_argument("--optimizer", choices=("sgd", "sign", "adam"), default="sgd")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    path = models.resolve(arguments.model).path
    shapes = linears(path)
    chosen = [n for n in shapes if not arguments.blocks or int(n.split(".")[2]) < arguments.blocks]
    share = sum(math.prod(shapes[n]) for n in chosen) / sum(map(math.prod, shapes.values()))
    rows = []
    for law in LAWS:
        row = compare(path, chosen, arguments.steps, law, arguments.optimizer)
        rows.append(row | {"replay_seconds_whole_model": row["replay_seconds"] / share})
        print(json.dumps(rows[-1]))
    result = {"model": arguments.model, "steps": arguments.steps, "layers": len(chosen), "runs": rows}
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not all(row["bit_equal"] for row in rows):
        raise SystemExit("the replay is not bit-equal")


if __name__ == "__main__":
    main()
