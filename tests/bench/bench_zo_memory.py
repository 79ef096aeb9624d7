"""Peak memory of zeroth-order steps over a base of float32, bfloat16, 8 and 4 bits.

    python tests/bench/bench_zo_memory.py --model demo:smollm2-135m --out zo_memory.json

One process a row. At rest: resident memory after the libraries are imported and a tiny model has been
through the same steps, so that pools, compiled kernels and lazily mapped code are there. Peak: the kernel's
high-water mark from just before the steps to their end (Linux). `net` is peak less rest: weights, and what a
step adds.
Bars: net <= 1.05 of the weights held; net of int4 <= 0.35 of that of bf16.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BASES = ("fp32", "bf16", "int8", "int4")
BAR_WEIGHTS, BAR_INT4 = 1.05, 0.35
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def status(key):
    """A field of /proc/self/status in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in {STATUS}")


def batch_of(vocabulary, rows, length, kind):
    """Random tokens, none padded; kind "labels": a choice of two words; "lm": every position supervised."""
    import torch

    from edgesft.core.data.batches import Batch

    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    if kind == "labels":
        positions = torch.arange(rows) * length + length - 1
        extra = {"choices": torch.tensor([1, 2]), "gold": torch.arange(rows) % 2}
    else:
        positions, extra = torch.arange(rows * length), {}
    return Batch(
        kind=kind,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        positions=positions,
        targets=ids.flatten().roll(-1)[positions],
        weights=torch.full((len(positions),), 1 / len(positions)),
        rows=positions // length,
        **extra,
    )


def stage_of(arguments):
    from edgesft.core import recipe
    from edgesft.stages.tune import Tune

    table = recipe.load(arguments.recipe).table("tune") | {"seed": 0, "base": arguments.base}
    table |= {"compute": arguments.compute}
    if arguments.base.startswith("int"):
        table |= {"delta": {"use": "quantized-update"}, "group": arguments.group}
        table.pop("select", None)
    return Tune.from_recipe(table)


def steps(stage, tuned, batch, count):
    """Zeroth-order steps as `tune` takes them: estimate, then the update in place."""
    import torch

    from edgesft.core.protocols import Update
    from edgesft.core.tuning.schedule import derive

    with tuned, torch.no_grad():
        loss = tuned.loss(stage.objective, batch)
        for step in range(count):
            seed = derive(stage.seed, "step", step)
            gradient = stage.estimate.gradient(loss, tuned.theta, seed)
            tuned.descend(Update(tuple(gradient.shifts), rounding=seed))


def tiny(folder):
    """A small random model whose products run the same code as those of the large one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def child(arguments):
    """Print one row."""
    import torch

    from edgesft.core import memory, models, quantized
    from edgesft.core.artifact import Artifact

    torch.set_num_threads(arguments.threads)
    stage = stage_of(arguments)
    with tempfile.TemporaryDirectory() as folder:
        small = stage.load(Artifact(tiny(Path(folder)), "model", "", folder))
        steps(stage, stage._tuned(small), batch_of(256, 2, arguments.length, arguments.kind), 2)
        del small
    memory.trim()
    rest = resident()
    CLEAR.write_text("5")
    model = stage.load(models.resolve(arguments.model))
    loading = status("VmHWM")
    batch = batch_of(model.config.vocab_size, arguments.rows, arguments.length, arguments.kind)
    tuned = stage._tuned(model)
    memory.trim()
    loaded = resident()
    CLEAR.write_text("5")
    steps(stage, tuned, batch, arguments.steps)
    peak, weights = status("VmHWM"), quantized.nbytes(model)
    net = peak - rest["all"]
    found = {
        "weights_bytes": weights,
        "rest_bytes": rest,
        "loading_net_bytes": loading - rest["all"],
        "loaded_net_bytes": loaded["all"] - rest["all"],
        "peak_bytes": peak,
        "net_bytes": net,
        "net_of_weights": net / weights,
        "growth_by_kind": {key: value - rest[key] for key, value in resident().items()},  # after the steps
    }
    print(json.dumps(found))


def resident():
    """Resident bytes by kind: of files are libraries and mapped weights."""
    return {"all": status("VmRSS"), "anonymous": status("RssAnon"), "of_files": status("RssFile")}


def row(arguments, base):
    """Medians over processes."""
    found = []
    for _ in range(arguments.repeats):
        command = [sys.executable, __file__, "--child", "--base", base]
        for name in ("model", "recipe", "compute", "group", "kind", "rows", "length", "steps", "threads"):
            command += [f"--{name}", str(getattr(arguments, name))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    found.sort(key=lambda each: each["net_bytes"])
    middle = found[len(found) // 2]
    return middle | {"net_bytes_median": statistics.median(f["net_bytes"] for f in found)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--recipe", default="sparse-mezo")
    parser.add_argument("--compute", default="native")
    parser.add_argument("--group", type=int, default=32, help="inputs that share a scale, int8 and int4")
    parser.add_argument("--kind", choices=("labels", "lm"), default="labels")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1, help="processes a row")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=BASES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--base", default="fp32", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    names = ("model", "recipe", "compute", "group", "kind", "rows", "length", "steps", "threads")
    result = {name: getattr(arguments, name) for name in names}
    result |= {"machine": platform.machine(), "cpus": os.cpu_count()}
    bases = {base: row(arguments, base) for base in arguments.bases}
    result["bases"] = bases
    result["passed"] = {
        base: found["net_of_weights"] <= BAR_WEIGHTS
        for base, found in bases.items()
        if base in ("fp32", "bf16")
    }
    if {"int4", "bf16"} <= set(bases):
        result["int4_of_bf16"] = bases["int4"]["net_bytes"] / bases["bf16"]["net_bytes"]
        result["passed"]["int4"] = result["int4_of_bf16"] <= BAR_INT4
    text = json.dumps(result, indent=2)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
