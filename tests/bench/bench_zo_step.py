"""What one sparse-mezo step costs beside the two plain forwards that no zeroth-order step can avoid.

    python tests/bench/bench_zo_step.py --model demo:smollm2-135m --data demo:sst2 --out zo_step.json

Time: pairs of (two plain losses, one step) in turn, in one process, so that a noisy machine hurts both; the
ratio of a pair is one sample. Memory: one process for a plain loss and one for a step; each warms up, clears
the kernel's high-water mark and reads it after the measured call (Linux).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

BAR_TIME, BAR_MEMORY = 1.6, 0.05


def prepare(arguments):
    """(run one plain loss, run one step, bytes of the model's weights)."""
    import torch

    from edgesft.core import catalog, data, models, recipe
    from edgesft.core.schedule import derive
    from edgesft.stages.tune import Tune

    torch.set_num_threads(arguments.threads)
    model_files, files = models.resolve(arguments.model), data.resolve(arguments.data)
    stage = Tune.from_recipe(recipe.load(arguments.recipe).table("tune") | {"seed": arguments.seed})
    model = models.load(model_files.path)
    dataset = data.open_data(files, stage.data, models.tokenizer(model_files.path))
    batch = dataset.batch("train", 0, arguments.batch_size, stage.seed).torch()
    plain = catalog.build("objective", {"use": "task"})
    tuned = stage._tuned(model)
    loss = tuned.loss(stage.objective, batch)
    done = [0]

    def one():
        with torch.no_grad():
            return float(plain.loss(model, batch))

    def step():
        with tuned:
            gradient = stage.estimate.gradient(loss, tuned.theta, derive(stage.seed, "step", done[0]))
            tuned.descend(gradient, stage.lr)
        done[0] += 1

    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return one, step, size, list(batch.input_ids.shape)


def high_water_mark():
    """Largest resident memory since the last `clear_refs`, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def child(arguments):
    """Print the high-water mark of one call, after one warm-up call of the same kind."""
    one, step, size, _ = prepare(arguments)
    call = one if arguments.child == "forward" else step
    one()
    call()
    Path("/proc/self/clear_refs").write_text("5")
    call()
    print(json.dumps({"peak": high_water_mark(), "model_bytes": size}))


def memory(arguments):
    """Peak bytes of a plain forward and of a step; the median of `repeats` processes each."""
    found = {}
    for kind in ("forward", "step"):
        peaks = []
        for _ in range(arguments.repeats):
            command = [sys.executable, __file__, "--child", kind]
            for name in ("model", "data", "recipe", "batch_size", "threads", "seed"):
                command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            answer = json.loads(done.stdout.splitlines()[-1])
            peaks.append(answer["peak"])
        found[f"{kind}_peak_bytes"] = int(statistics.median(peaks))
        found["model_bytes"] = answer["model_bytes"]
    extra = found["step_peak_bytes"] - found["forward_peak_bytes"]
    return found | {"extra_bytes": extra, "extra_of_model": extra / found["model_bytes"]}


def timing(arguments):
    """Seconds and processor seconds of two plain losses and of a step, in turn."""
    one, step, _, shape = prepare(arguments)
    one()
    step()
    samples = []
    for _ in range(arguments.pairs):
        marks = [(time.perf_counter(), time.process_time())]
        for call in (lambda: (one(), one()), step):
            call()
            marks.append((time.perf_counter(), time.process_time()))
        (w0, c0), (w1, c1), (w2, c2) = marks
        samples.append(
            {"two_forwards": w1 - w0, "step": w2 - w1, "cpu_forwards": c1 - c0, "cpu_step": c2 - c1}
        )
    ratios = [s["step"] / s["two_forwards"] for s in samples]
    busy = [s["cpu_step"] / s["cpu_forwards"] for s in samples]
    return {
        "batch_shape": shape,
        "two_forwards_seconds": statistics.median(s["two_forwards"] for s in samples),
        "step_seconds": statistics.median(s["step"] for s in samples),
        "ratio": statistics.median(ratios),
        "ratio_least": min(ratios),
        "cpu_ratio": statistics.median(busy),
        "samples": samples,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--data", default="demo:sst2")
    parser.add_argument("--recipe", default="sparse-mezo")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=1, help="processes a kind for memory")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", choices=("forward", "step"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    result = {key: getattr(arguments, key) for key in ("model", "data", "recipe", "batch_size", "threads")}
    result |= {"machine": platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    result["time"], result["memory"] = timing(arguments), memory(arguments)
    result["passed"] = {
        "time": result["time"]["ratio"] <= BAR_TIME,
        "memory": result["memory"]["extra_of_model"] <= BAR_MEMORY,
    }
    text = json.dumps(result, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
