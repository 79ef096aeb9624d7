"""What one zeroth-order step costs beside the two forward passes that no zeroth-order step can avoid.

    python -m pytest tests/bench/test_zo_step.py -s
    EDGESFT_BENCH_OUT=docs/results/zo-step.json python -m pytest tests/bench/test_zo_step.py

Time: all rows of the table in one process, one call of each a round, in an order that is shuffled anew every
round, so that a noisy machine hurts all alike. One sample is the ratio of a row to two forward passes of the
same round; medians are judged. The passes are read twice. "lean" are those that the step itself is made of,
the loss where it is supervised only; they are cheaper, so the bars are held against them. "plain" are those
of the model's own class with the logits of all positions. Only the bar of the short two-sided step is
held against these: a stacked pass saves reading the weights and the logits, but no multiplication.

Memory: a process for each row. `rest` is its resident memory once every library is loaded and the same step
has run on a model of next to nothing; then the real model is loaded and warmed up, the kernel's high-water
mark is cleared and read after one more step (Linux).

EDGESFT_BENCH_ROUNDS (7), EDGESFT_BENCH_THREADS (1), EDGESFT_BENCH_OUT (a file; a temporary one if not set).
"""

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

COMMAND = "EDGESFT_BENCH_OUT=docs/results/zo-step.json python -m pytest tests/bench/test_zo_step.py"
MODEL, DATA = "demo:smollm2-135m", "demo:sst2"
SHAPES = {"long": (8, 64), "short": (8, 16)}  # rows, tokens a row; all rows full
LONG, SHORT = SHAPES
MEMORY_BAR = 1.05  # peak - rest, in weights held
INT4_BAR = 0.35  # of the step over bf16 weights, both net of rest
FEW = 3  # rounds of the rows that are no rival of the bars, which are slow

pytestmark = [pytest.mark.bench, pytest.mark.demo, pytest.mark.timeout(3000)]

Step = Callable[[], float]


def beside(name: str) -> ModuleType:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------- the rows of the table


@dataclass(frozen=True)
class Row:
    """What is measured. kind: `lean`, `ours`, or a function of published_mezo.

    bar: of the time in two passes, the kind `of`; None: reported only. calls: calls that make one sample.
    """

    name: str
    kind: str
    shape: str = LONG
    recipe: str = "sparse-mezo"
    sets: Mapping[str, Any] = field(default_factory=dict)  # over the recipe's table; `estimate` is merged
    bar: float | None = None
    of: str = "lean"
    calls: int = 1
    few: bool = False


def _estimate(**values: Any) -> dict[str, Any]:
    return {"estimate": values}


SIGNS, NORMAL = _estimate(noise="rademacher"), _estimate(noise="gaussian")
ONE_SIDED, TWO_SIDED = (_estimate(noise="rademacher", two_sided=both) for both in (False, True))
TIMED = (
    Row("two lean forwards", "lean", calls=2),
    Row("two plain forwards", "forward", calls=2),
    Row("sparse-mezo, rademacher", "ours", sets=SIGNS, bar=1.08),
    Row("sparse-mezo, gaussian", "ours", sets=NORMAL, bar=1.25),
    Row("mezo, gaussian", "ours", recipe="mezo", sets=NORMAL),
    Row("sparse-mezo, compute bf16", "ours", sets=SIGNS | {"compute": "bf16"}, bar=0.6),
    Row("sparse-mezo, compute int8", "ours", sets=SIGNS | {"compute": "int8"}, bar=0.45),
    Row("MeZO as published", "mezo", few=True),
    Row("AdamW", "adamw", few=True),
    Row("LoRA, AdamW, checkpointed", "lora", few=True),
    Row("two lean forwards, short", "lean", SHORT, calls=2),
    Row("two plain forwards, short", "forward", SHORT, calls=2),
    Row("sparse-mezo, one-sided passes, short", "ours", SHORT, sets=ONE_SIDED),
    Row("sparse-mezo, two-sided, short", "ours", SHORT, sets=TWO_SIDED, bar=0.8, of="plain"),
)
WEIGHED = (
    Row("a lean forward", "lean"),
    Row("sparse-mezo, rademacher", "ours", sets=SIGNS),
    Row("sparse-mezo, base bf16", "ours", sets=SIGNS | {"base": "bf16"}),
    Row("sparse-mezo, base int4", "ours", sets=SIGNS | {"base": "int4"}),
    Row("MeZO as published", "mezo"),
    Row("AdamW", "adamw"),
    Row("LoRA, AdamW, checkpointed", "lora"),
)


def build(row: Row, source: Any, batch: Any) -> tuple[Step, Any]:
    """(one call of the row, its model). source: Artifact of a model folder; batch: ArrayBatch."""
    from edgesft.core import models

    if row.kind in ("lean", "ours"):
        return _ours(row, source, batch)
    model = models.load(source.path)
    return getattr(beside("published_mezo"), row.kind)(model, batch.torch()), model


def _ours(row: Row, source: Any, batch: Any) -> tuple[Step, Any]:
    """A step as the loop of `tune` takes it, less the journal; `lean`: the loss at the stored weights."""
    from edgesft.core import recipe
    from edgesft.core.tuning.scalar_optim import SCALAR, Measured
    from edgesft.core.tuning.schedule import derive
    from edgesft.stages.tune import Tune

    table = recipe.load(row.recipe).table("tune")
    stage = Tune.from_recipe(
        table | {**row.sets, "estimate": table["estimate"] | row.sets.get("estimate", {})}
    )
    model = stage.load(source)
    tuned = stage._tuned(model).__enter__()  # the layers stay in the model as long as it lives
    loss = tuned.loss(stage.objective, batch)
    coarse = stage.base not in ("fp32", "fp64")
    optimizer = SCALAR["sgd"](0.0, stage.seed if coarse else None)
    done = 0

    def step() -> float:
        nonlocal done
        gradient = stage.estimate.gradient(loss, tuned.theta, derive(stage.seed, "step", done))
        tuned.descend(optimizer.update(Measured(done, float(stage.lr), gradient.shifts)))
        done += 1
        return float(gradient.loss)

    def lean() -> float:
        import torch

        with torch.no_grad():
            return float(loss(None))

    return (step if row.kind == "ours" else lean), model


# ---------------------------------------------------------------- what they are run on


def full_batch(windows: Any, choices: Any, gold: Any) -> Any:
    """A batch of full rows, each with one label word to predict: its last token.

    windows: (B, S) token ids; choices: (C,) of the label words; gold: (B,). Gives an ArrayBatch.
    """
    import numpy as np

    from edgesft.core.data.batches import ArrayBatch

    ids = np.array(windows, dtype=np.int64)
    rows, length = ids.shape
    ids[:, -1] = choices[gold]
    return ArrayBatch(
        kind="labels",
        input_ids=ids,
        attention_mask=np.ones_like(ids),
        positions=np.arange(rows, dtype=np.int64) * length + length - 2,
        targets=ids[:, -1].copy(),
        weights=np.full(rows, 1 / rows, dtype=np.float32),
        rows=np.arange(rows, dtype=np.int64),
        choices=choices,
        gold=gold,
    )


def real_batch(shape: str) -> Any:
    """Running text of the training split in rows of the shape, with answers of its first examples."""
    from edgesft.core import data, models

    rows, length = SHAPES[shape]
    dataset = data.open_data(data.resolve(DATA), None, models.tokenizer(models.resolve(MODEL).path))
    answers = dataset.batch("train", 0, rows, 0)
    assert answers.kind == "labels"
    return full_batch(dataset.windows("train", length, rows, 0), answers.choices, answers.gold)


# ---------------------------------------------------------------- time


def interleaved(
    calls: Mapping[str, Step], rounds: int, few: Sequence[str] = (), seed: int = 0
) -> list[dict[str, tuple[float, float]]]:
    """(wall, processor) seconds of each call by name, a round each; `few` rest after `FEW` rounds."""
    rng, found = random.Random(seed), []
    for index in range(rounds):
        names = [name for name in calls if index < FEW or name not in few]
        rng.shuffle(names)
        taken = {}
        for name in names:
            wall, busy = time.perf_counter(), time.process_time()
            calls[name]()
            taken[name] = (time.perf_counter() - wall, time.process_time() - busy)
        found.append({name: taken[name] for name in calls if name in taken})
    return found


def ratios(
    samples: Sequence[Mapping[str, tuple[float, float]]], name: str, against: str, clock: int = 0
) -> list[float]:
    """Time of one in that of another, round by round. clock: 0 wall, 1 processor."""
    return [s[name][clock] / s[against][clock] for s in samples if name in s and against in s]


def summary(
    rows: Sequence[Row], samples: Sequence[Mapping[str, tuple[float, float]]]
) -> list[dict[str, Any]]:
    """A line of the table for each row."""
    lines = []
    for row in rows:
        ending = "" if row.shape == LONG else f", {row.shape}"
        lean, plain = (f"two {kind} forwards{ending}" for kind in ("lean", "plain"))
        mine = ratios(samples, row.name, lean)
        ratio, to_plain = statistics.median(mine), statistics.median(ratios(samples, row.name, plain))
        lines.append(
            {
                "row": row.name,
                "shape": list(SHAPES[row.shape]),
                "seconds": statistics.median(s[row.name][0] for s in samples if row.name in s),
                "ratio": ratio,
                "ratio_range": [min(mine), max(mine)],
                "cpu_ratio": statistics.median(ratios(samples, row.name, lean, 1)),
                "ratio_to_plain": to_plain,
                "rounds": len(mine),
                "bar": row.bar,
                "bar_of": row.of,
                "met": None if row.bar is None else (ratio if row.of == "lean" else to_plain) <= row.bar,
            }
        )
    return lines


def measure_time(rounds: int) -> dict[str, Any]:
    """The table of times, and all samples."""
    from edgesft.core import models

    source, batches = models.resolve(MODEL), {shape: real_batch(shape) for shape in SHAPES}
    calls: dict[str, Step] = {}
    for row in TIMED:
        step, _ = build(row, source, batches[row.shape])
        calls[row.name] = _repeated(step, row.calls)
        step()  # compiles, packs, and takes the memory that it keeps
    samples = interleaved(calls, rounds, [row.name for row in TIMED if row.few])
    return {"rows": summary(TIMED, samples), "samples": samples}


def _repeated(step: Step, times: int) -> Step:
    def call() -> float:
        for _ in range(times - 1):
            step()
        return step()

    return call


# ---------------------------------------------------------------- memory


def status(key: str) -> int:
    """A size out of /proc/self/status in bytes: VmRSS, or VmHWM, the largest since the last clearing."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def _return_freed() -> None:
    """Give freed memory back to the system, where the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def tiny_copy(folder: Path) -> Any:
    """An Artifact: a model of the real one's kind with 64 hidden units and two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from edgesft.core import models
    from edgesft.core.artifact import Artifact

    real = models.read_config(models.resolve(MODEL).path)
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    kept = {key: real[key] for key in ("vocab_size", "max_position_embeddings")}
    config = LlamaConfig(**kept, **small, num_key_value_heads=2, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    return Artifact(folder, "model", "tiny", "tiny")


def weigh(row: Row) -> dict[str, int]:
    """Peak, rest and weights of one row in this process, in bytes."""
    from edgesft.core import models, quantized

    batch = real_batch(row.shape)
    with tempfile.TemporaryDirectory() as folder:
        step, model = build(row, tiny_copy(Path(folder)), batch)
        step()
        del step, model
    _return_freed()
    rest = status("VmRSS")
    step, model = build(row, models.resolve(MODEL), batch)
    step()
    _return_freed()  # what loading the model left behind; a step must not need it
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return {"peak": status("VmHWM"), "rest": rest, "weights": quantized.nbytes(model)}


def measure_memory(threads: int) -> list[dict[str, Any]]:
    """A line of the table for each row, each in a fresh process."""
    lines = []
    for index, row in enumerate(WEIGHED):
        command = [sys.executable, __file__, "--weigh", str(index), "--threads", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{row.name}\n{done.stderr}"
        found = json.loads(done.stdout.splitlines()[-1])
        net = found["peak"] - found["rest"]
        lines.append({"row": row.name, **found, "net": net, "net_of_weights": net / found["weights"]})
    return lines


# ---------------------------------------------------------------- the table and its bars


def table(result: Mapping[str, Any]) -> str:
    """Both tables as text."""
    text = [f"{'step':<38}{'seconds':>9}{'ratio':>8}{'range':>15}{'cpu':>7}{'to plain':>10}   bar"]
    for line in result["time"]:
        low, high = line["ratio_range"]
        bar = "" if line["bar"] is None else f"{line['bar']:.2f}" + ("" if line["met"] else " !")
        bar += " of plain" if bar and line["bar_of"] == "plain" else ""
        text.append(
            f"{line['row']:<38}{line['seconds']:>9.3f}{line['ratio']:>8.3f}{f'{low:.2f} .. {high:.2f}':>15}"
            f"{line['cpu_ratio']:>7.2f}{line['ratio_to_plain']:>10.3f}   {bar}"
        )
    text.append(f"\n{'step':<38}{'MB net of rest':>15}{'weights MB':>12}{'ratio':>8}{'rest MB':>9}")
    for line in result["memory"]:
        sizes = (line["net"] / 1e6, line["weights"] / 1e6, line["net_of_weights"], line["rest"] / 1e6)
        text.append(f"{line['row']:<38}{sizes[0]:>15.0f}{sizes[1]:>12.0f}{sizes[2]:>8.3f}{sizes[3]:>9.0f}")
    return "\n".join(text)


def _machine(threads: int) -> dict[str, Any]:
    import torch

    model = ""
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        names = [line.partition(":")[2].strip() for line in cpuinfo.open() if line.startswith("model name")]
        model = names[0] if names else ""
    return {
        "machine": platform.machine(),
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
    }


@pytest.fixture(scope="module")
def result(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    import torch

    threads = int(os.environ.get("EDGESFT_BENCH_THREADS", "1"))
    torch.set_num_threads(threads)
    machine = _machine(threads)
    memory = measure_memory(threads)  # first: this process holds no model yet
    taken = measure_time(int(os.environ.get("EDGESFT_BENCH_ROUNDS", "7")))
    found = {
        "command": COMMAND,
        "model": MODEL,
        "data": DATA,
        "machine": machine,
        "time": taken["rows"],
        "memory": memory,
    }
    print("\n" + table(found))
    out = os.environ.get("EDGESFT_BENCH_OUT")
    file = Path(out) if out else tmp_path_factory.mktemp("zo-step") / "zo-step.json"
    file.write_text(json.dumps(found | {"samples": taken["samples"]}, indent=2) + "\n")
    return found


@pytest.mark.parametrize("name", [row.name for row in TIMED if row.bar is not None])
def test_time(result: dict[str, Any], name: str) -> None:
    line = next(line for line in result["time"] if line["row"] == name)
    assert line["met"], (
        f"{name}: {line['ratio']:.3f} of two lean forwards ({line['ratio_range'][0]:.3f} .. "
        f"{line['ratio_range'][1]:.3f}; by processor time {line['cpu_ratio']:.3f}), "
        f"{line['ratio_to_plain']:.3f} of two plain ones; the bar is {line['bar']} of {line['bar_of']} ones"
    )


def _net(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(line for line in result["memory"] if line["row"] == name)


def test_a_step_takes_the_memory_of_the_weights(result: dict[str, Any]) -> None:
    line = _net(result, "sparse-mezo, rademacher")
    assert line["net_of_weights"] <= MEMORY_BAR


def test_an_int4_step_takes_a_third_of_a_bf16_step(result: dict[str, Any]) -> None:
    small, large = (_net(result, f"sparse-mezo, base {base}")["net"] for base in ("int4", "bf16"))
    assert small <= INT4_BAR * large, f"{small / large:.3f} of the step over bf16 weights, bar {INT4_BAR}"


def main() -> None:
    parser = argparse.ArgumentParser(description="One row of the memory table, as JSON.")
    parser.add_argument("--weigh", type=int, required=True, help="number of the row")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    print(json.dumps(weigh(WEIGHED[arguments.weigh])))


if __name__ == "__main__":
    main()
