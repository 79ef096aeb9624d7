"""What zeroth-order tuning learns: sparse, random and no mask, equal steps, each at its best learning rate.

    python tests/bench/bench_zo_quality.py --work out/zo-quality --out docs/results/zo-quality.json --jobs 2
    python tests/bench/bench_zo_quality.py --work out/zo-quality --out ... --dry-run

For each task and method the learning rate is taken from one grid by the dev loss after the last step of the
first seed; the other seeds then run at it. Every run is an ordinary `edgesft tune` in a process of its own;
its model is merged, judged on the test split and thrown away. Finished runs are kept under --work and never
repeated, so the command can be stopped at any time and given again. A run that diverges is a result.

Written: all curves, a table with intervals and the steps to equal quality as JSON; the curves as SVG too.
Exit code 1 if a run failed or is missing, or the bar is missed: sparse >= random >= mezo - 1 point.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

METHODS = ("sparse-mezo", "random-mezo", "mezo")  # names of recipes
SLACK = 0.01  # of accuracy, that the random mask may lose to none
RESAMPLES = 10_000
OVERHEAD = 45.0  # seconds of a run beside its steps and evaluations: loading, merging, writing

Point = tuple[int, float]  # (steps done, value)


class RunFailed(Exception):
    """A process ended with an error that says nothing about the method."""


# ---------------------------------------------------------------- one run


@dataclass(frozen=True)
class Settings:
    """What all runs share. sets: `--set` of every run; data_options: of `tune` and `eval`."""

    model: str
    steps: int
    batch_size: int
    eval_every: int
    compute: str
    noise: str
    threads: int
    sets: tuple[str, ...] = ()
    data_options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    task: str  # NAME of `demo:NAME`, or a file
    method: str
    lr: float
    seed: int

    @property
    def data(self) -> str:
        return self.task if Path(self.task).exists() else f"demo:{self.task}"

    def arguments(self, shared: Settings) -> list[str]:
        """Of `edgesft`, less the folder to write."""
        sets = [
            f"tune.lr={self.lr!r}",
            f"tune.batch_size={shared.batch_size}",
            f"tune.eval_every={shared.eval_every}",
            "tune.dev_limit=100000",
            f"estimate.noise={shared.noise}",
        ]
        if shared.compute != "native":
            sets.append(f"tune.compute={shared.compute}")
        if self.method == "random-mezo":
            sets.append(f"select.seed={self.seed}")  # the mask is part of the chance
        asked = ["tune", shared.model, self.data, "--recipe", self.method, "--steps", str(shared.steps)]
        asked += ["--seed", str(self.seed), "--threads", str(shared.threads)]
        for each in (*sets, *shared.sets):
            asked += ["--set", each]
        return [*asked, *shared.data_options]

    def folder(self, work: Path, shared: Settings) -> Path:
        """Its name has a hash of the whole command: other settings never meet an old result."""
        key = hashlib.sha256("\0".join(self.arguments(shared)).encode()).hexdigest()[:10]
        return work / f"{Path(self.task).stem}-{self.method}-lr{self.lr:g}-seed{self.seed}-{key}"


class Processes:
    """The processes that are under way, so that all of them can be asked to stop."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[str]] = set()
        self._lock, self.stopped = threading.Lock(), False

    def edgesft(self, *arguments: str) -> dict[str, Any]:
        """What a command prints as JSON. Raises RunFailed with the end of what it said."""
        command = [sys.executable, "-m", "edgesft", *arguments, "--json"]
        with self._lock:
            if self.stopped:
                raise RunFailed("stopped")
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            self._running.add(process)
        try:
            out, said = process.communicate()
        finally:
            with self._lock:
                self._running.discard(process)
        if process.returncode:
            raise RunFailed(f"exit {process.returncode}: {said[-2000:].strip()}")
        found: dict[str, Any] = json.loads(out)
        return found

    def stop(self) -> None:
        """Ask every process to end; `tune` ends after its step and keeps a checkpoint."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                process.send_signal(signal.SIGTERM)


def finished(run: Run, work: Path, shared: Settings) -> dict[str, Any] | None:
    """The result of a run that has ended."""
    file = run.folder(work, shared) / "result.json"
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def perform(run: Run, work: Path, shared: Settings, processes: Processes) -> dict[str, Any]:
    """Tune, merge, judge. Raises RunFailed."""
    if (known := finished(run, work, shared)) is not None:
        return known
    folder = run.folder(work, shared)
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = asdict(run)
    try:
        tuned = processes.edgesft(*run.arguments(shared), "-o", str(folder / "delta"))
    except RunFailed as error:
        if "diverged" not in str(error):
            raise
        return _keep(folder, result | {"diverged": True, "dev_loss": None})
    merged = folder / "merged"
    processes.edgesft("merge", shared.model, str(folder / "delta"), "-o", str(merged))
    judged = judge(str(merged), run, shared, processes)
    shutil.rmtree(merged)
    result |= {"diverged": False, "dev_loss": tuned["dev_loss_after"], "test": judged}
    result["curve"] = curve((folder / "delta" / "metrics.jsonl").read_text().splitlines())
    for key in ("steps", "steps_taken_back", "dev_best_step", "seconds_per_step", "active_fraction"):
        result[key] = tuned.get(key)
    return _keep(folder, result)


def judge(model: str, run: Run, shared: Settings, processes: Processes) -> dict[str, Any]:
    """Accuracy on the test split with its interval, and which answers were right."""
    asked = ("eval", model, run.data, "--threads", str(shared.threads), "--predictions", *shared.data_options)
    found = processes.edgesft(*asked)
    right = [int(p == g) for p, g in zip(found["predictions"], found["gold"], strict=True)]
    return {
        "accuracy": found["accuracy"],
        "interval": found["intervals"]["accuracy"],
        "loss": found["loss"],
        "right": right,
    }


def curve(lines: Iterable[str]) -> list[dict[str, float]]:
    """The dev evaluations of a metrics.jsonl, by steps done."""
    keys = ("step", "dev_loss", "dev_accuracy")
    return [{k: line[k] for k in keys} for line in map(json.loads, lines) if "dev_loss" in line]


def _keep(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    part = folder / "result.json.part"
    part.write_text(json.dumps(result) + "\n")
    os.replace(part, folder / "result.json")
    return result


# ---------------------------------------------------------------- many runs


@dataclass
class Campaign:
    """All runs of an experiment. deadline: `time.monotonic()` after which no run starts.

    command: what was typed, for the record.
    """

    work: Path
    shared: Settings
    tasks: Sequence[str]
    methods: Sequence[str]
    lrs: Sequence[float]
    seeds: Sequence[int]
    jobs: int = 1
    deadline: float = math.inf
    command: str = ""

    def __post_init__(self) -> None:
        self.processes, self.failed = Processes(), dict[str, str]()

    def grid(self, task: str) -> list[Run]:
        """The runs that choose learning rates."""
        return [Run(task, method, lr, self.seeds[0]) for lr in self.lrs for method in self.methods]

    def chosen(self, task: str, method: str) -> float | None:
        """The learning rate with the lowest dev loss; None while some of the grid is missing."""
        found = {}
        for run in self.grid(task):
            if run.method == method:
                result = finished(run, self.work, self.shared)
                if result is None:
                    return None
                found[run.lr] = math.inf if result["diverged"] else result["dev_loss"]
        best = min(found, key=lambda lr: (found[lr], lr))
        return best if math.isfinite(found[best]) else None

    def repeats(self, task: str) -> list[Run]:
        """The runs of every seed at the learning rates chosen."""
        rates = {method: self.chosen(task, method) for method in self.methods}
        return [Run(task, m, lr, s) for s in self.seeds for m, lr in rates.items() if lr is not None]

    def run(self) -> None:
        """Everything that is missing, tasks one after the other."""
        for task in self.tasks:
            for stage in (self.grid, self.repeats):
                self._all([r for r in stage(task) if finished(r, self.work, self.shared) is None])

    def _all(self, runs: Sequence[Run]) -> None:
        waiting, going = list(runs), dict[Future[dict[str, Any]], Run]()
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                while waiting or going:
                    while waiting and len(going) < self.jobs and time.monotonic() < self.deadline:
                        run = waiting.pop(0)
                        going[pool.submit(perform, run, self.work, self.shared, self.processes)] = run
                    if not going:
                        return  # no time left
                    done, _ = wait(going, return_when=FIRST_COMPLETED)
                    for each in done:
                        self._note(going.pop(each), each)
            except BaseException:
                self.processes.stop()
                raise

    def _note(self, run: Run, ended: "Future[dict[str, Any]]") -> None:
        name = f"{run.task} {run.method} lr {run.lr:g} seed {run.seed}"
        if (error := ended.exception()) is not None:
            if not isinstance(error, RunFailed):
                raise error
            self.failed[name] = str(error)
            said = f"failed: {error}"
        else:
            result = ended.result()
            said = "diverged"
            if not result["diverged"]:
                said = f"dev loss {result['dev_loss']:.4f}, test accuracy {result['test']['accuracy']:.3f}"
        print(f"{time.strftime('%H:%M:%S')} {name}: {said}", file=sys.stderr, flush=True)

    def missing(self) -> list[str]:
        """Runs without a result. Where no learning rate is chosen yet, its repeats are not listed."""
        runs = itertools.chain.from_iterable((*self.grid(t), *self.repeats(t)) for t in self.tasks)
        absent = dict.fromkeys(r for r in runs if finished(r, self.work, self.shared) is None)
        return [f"{r.task} {r.method} lr {r.lr:g} seed {r.seed}" for r in absent]

    def results(self) -> list[dict[str, Any]]:
        runs = itertools.chain.from_iterable((*self.grid(t), *self.repeats(t)) for t in self.tasks)
        found = (finished(r, self.work, self.shared) for r in dict.fromkeys(runs))
        return [result for result in found if result is not None]


# ---------------------------------------------------------------- what it says


def mean_curve(curves: Sequence[Sequence[Mapping[str, float]]], key: str) -> list[Point]:
    """The mean over runs at each step at which all were judged."""
    by_step = [{int(p["step"]): p[key] for p in each} for each in curves]
    steps = sorted(set.intersection(*(set(each) for each in by_step)))
    return [(step, statistics.fmean(each[step] for each in by_step)) for step in steps]


def steps_to(points: Sequence[Point], target: float, *, upwards: bool) -> float | None:
    """Steps until a curve first reaches a value, straight lines between its points; None: it never does."""
    sign = 1 if upwards else -1
    before: Point | None = None
    for step, value in points:
        if sign * value >= sign * target:
            if before is None or value == before[1]:
                return float(step)
            return before[0] + (step - before[0]) * (target - before[1]) / (value - before[1])
        before = (step, value)
    return None


def speed_up(slow: Sequence[Point], fast: Sequence[Point], *, upwards: bool) -> float | None:
    """Steps of `slow` to its own last value in the steps of `fast` to the same.

    None if `slow` ends no better than it began, or `fast` never gets there, or is there at step 0.
    """
    target = slow[-1][1]
    if (target <= slow[0][1]) if upwards else (target >= slow[0][1]):
        return None
    theirs, ours = steps_to(slow, target, upwards=upwards), steps_to(fast, target, upwards=upwards)
    return theirs / ours if theirs and ours else None


def paired(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> tuple[float, float, float]:
    """Mean accuracy of a less that of b with a 95 % interval: examples drawn anew, the same for both.

    a, b: runs x examples, 1 for a right answer; the runs are taken as they are, so the interval is about
    other examples, not about other seeds.
    """
    import numpy as np

    each = np.mean(np.asarray(a, dtype=float), axis=0) - np.mean(np.asarray(b, dtype=float), axis=0)
    rng = np.random.default_rng(0)
    means = each[rng.integers(0, len(each), (RESAMPLES, len(each)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(each.mean()), float(low), float(high)


def lines_of(task: str, campaign: Campaign, zero: float | None) -> list[dict[str, Any]]:
    """A line of the table for each method of a task that has a result at its learning rate.

    zero: test accuracy of the untuned model.
    """
    from edgesft.stages.evaluate import wilson

    runs: dict[str, list[dict[str, Any]]] = {}
    for run in campaign.repeats(task):
        result = finished(run, campaign.work, campaign.shared)
        if result is not None and not result["diverged"]:
            runs.setdefault(run.method, []).append(result)
    base, lines = runs.get("mezo"), []
    for method, found in runs.items():
        right = [each["test"]["right"] for each in found]
        accuracies = [each["test"]["accuracy"] for each in found]
        mean, count = statistics.fmean(accuracies), len(right[0])
        curves = {key: mean_curve([r["curve"] for r in found], key) for key in ("dev_accuracy", "dev_loss")}
        line = {
            "task": task,
            "method": method,
            "lr": found[0]["lr"],
            "at_edge_of_grid": found[0]["lr"] in (min(campaign.lrs), max(campaign.lrs)),
            "seeds": [each["seed"] for each in found],
            "dev_loss": statistics.fmean(each["dev_loss"] for each in found),
            "accuracy_untuned": zero,
            "accuracies": accuracies,
            "accuracy": mean,
            "interval": list(wilson(mean * count, count)),  # the examples are the same for all seeds
            "spread": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "test_examples": count,
            "active_fraction": found[0]["active_fraction"],
            "curves": curves,
        }
        if base is not None and method != "mezo":
            line["less_mezo"] = list(paired(right, [each["test"]["right"] for each in base]))
            for key, upwards in (("dev_accuracy", True), ("dev_loss", False)):
                slow = mean_curve([r["curve"] for r in base], key)
                line[f"speed_up_{key}"] = speed_up(slow, curves[key], upwards=upwards)
        lines.append(line)
    return lines


def bar(lines: Sequence[Mapping[str, Any]]) -> bool | None:
    """Whether sparse >= random >= mezo - 1 point in mean test accuracy; None while one is missing."""
    found = {line["method"]: line["accuracy"] for line in lines}
    if not all(method in found for method in METHODS):
        return None
    sparse, rand, none = (found[method] for method in METHODS)
    return bool(sparse >= rand >= none - SLACK)


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The table as text."""
    text = [
        f"{'task':<8}{'method':<14}{'lr':>8}{'seeds':>6}{'test accuracy':>15}{'95 %':>15}{'less mezo':>24}"
        f"{'dev loss':>10}{'speed-up: acc, loss':>22}"
    ]
    for line in lines:
        interval = "{:.3f} .. {:.3f}".format(*line["interval"])
        difference = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*line["less_mezo"]) if "less_mezo" in line else ""
        by = [line.get(f"speed_up_{key}") for key in ("dev_accuracy", "dev_loss")]
        saved = ", ".join("-" if v is None else f"{v:.2f}x" for v in by) if "less_mezo" in line else ""
        text.append(
            f"{Path(line['task']).stem:<8}{line['method']:<14}{line['lr']:>8g}{len(line['seeds']):>6}"
            f"{line['accuracy']:>15.3f}{interval:>15}{difference:>24}{line['dev_loss']:>10.4f}{saved:>22}"
        )
    return "\n".join(text)


def plot(lines: Sequence[Mapping[str, Any]], results: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Dev accuracy and dev loss against steps: the mean of the seeds, each seed faintly."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(line["task"] for line in lines))
    figure, axes = plt.subplots(2, len(tasks), figsize=(5 * len(tasks), 7), squeeze=False, sharex="col")
    for column, task in enumerate(tasks):
        for line in (line for line in lines if line["task"] == task):
            color = f"C{METHODS.index(line['method'])}"
            label = f"{line['method']}, lr {line['lr']:g}"
            mine = [r for r in results if all(r[k] == line[k] for k in ("task", "method", "lr"))]
            for row, key in enumerate(("dev_accuracy", "dev_loss")):
                axis = axes[row][column]
                axis.plot(*zip(*line["curves"][key], strict=True), color=color, label=label)
                for each in mine:
                    if not each["diverged"] and each["seed"] in line["seeds"]:
                        points = [(p["step"], p[key]) for p in each["curve"]]
                        axis.plot(*zip(*points, strict=True), color=color, alpha=0.25, linewidth=0.8)
                axis.set_ylabel(key.replace("_", " "))
        axes[0][column].set_title(Path(task).stem)
        axes[0][column].legend(fontsize="small")
        axes[1][column].set_xlabel("steps")
    figure.tight_layout()
    figure.savefig(file)
    plt.close(figure)


def report(campaign: Campaign, out: Path) -> dict[str, Any]:
    """Write the JSON and the plot of what there is so far."""
    lines, bars = [], {}
    for task in campaign.tasks:
        zero = campaign.work / f"untuned-{Path(task).stem}.json"
        mine = lines_of(task, campaign, json.loads(zero.read_text())["accuracy"] if zero.is_file() else None)
        lines += mine
        bars[task] = bar(mine)
    results = campaign.results()
    found = {
        "command": campaign.command,
        "settings": asdict(campaign.shared),
        "grid": list(campaign.lrs),
        "seeds": list(campaign.seeds),
        "bar": "sparse-mezo >= random-mezo >= mezo - 1 point, mean test accuracy",
        "met": bars,
        "missing": campaign.missing(),
        "failed": campaign.failed,
        "table": lines,
        "runs": [{k: v for k, v in r.items() if k != "test"} | _scores(r) for r in results],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    if lines:
        plot(lines, results, out.with_suffix(".svg"))
    return found


def _scores(result: Mapping[str, Any]) -> dict[str, Any]:
    test = result.get("test")
    return {} if test is None else {"test": {k: v for k, v in test.items() if k != "right"}}


def untuned(campaign: Campaign) -> None:
    """Judge the model as it is, once a task."""
    for task in campaign.tasks:
        file = campaign.work / f"untuned-{Path(task).stem}.json"
        if not file.is_file():
            run = Run(task, "", 0.0, 0)
            found = judge(campaign.shared.model, run, campaign.shared, campaign.processes)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found) + "\n")


def estimate(campaign: Campaign) -> str:
    """What would run, and about how long: from a few measured steps of the first method on each task."""
    text, total = [], 0.0
    shared = campaign.shared
    evaluations = 2 + (shared.steps - 1) // shared.eval_every if shared.eval_every else 2
    for task in campaign.tasks:
        runs = len(campaign.grid(task)) + len(campaign.methods) * (len(campaign.seeds) - 1)
        known = {r["method"] + str(r["seed"]) + str(r["lr"]) for r in campaign.results() if r["task"] == task}
        probe = Run(task, campaign.methods[0], campaign.lrs[0], campaign.seeds[0])
        few = Settings(**{**asdict(shared), "steps": 3, "eval_every": 0})
        folder = campaign.work / f"probe-{probe.folder(Path(), few).name}"
        began = time.monotonic()
        found = campaign.processes.edgesft(*probe.arguments(few), "-o", str(folder))
        wall = time.monotonic() - began  # two evaluations of the dev split, three steps, loading
        step = float(found["seconds_per_step"])
        judging = max(0.0, (wall - 3 * step) / 2)  # more than one evaluation, since loading is in it
        each = shared.steps * step + evaluations * judging + OVERHEAD
        left = runs - len(known)
        total += left * each / campaign.jobs
        text.append(
            f"{task}: {runs} runs, {len(known)} of them done; a step {step:.2f} s, an evaluation at most "
            f"{judging:.0f} s, a run about {each / 60:.0f} min"
        )
    if campaign.jobs > 1:
        text.append(f"{campaign.jobs} at a time; a step takes longer where they share memory bandwidth")
    return "\n".join([*text, f"about {total / 3600:.1f} h in all"])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "rte"], help="demo data sets, or files")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-5, 3e-5, 1e-4, 3e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--compute", default="native", choices=("native", "bf16", "int8"))
    parser.add_argument("--noise", default="rademacher", choices=("rademacher", "gaussian"))
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no run starts after these")
    parser.add_argument(
        "--set", dest="sets", nargs="*", default=[], help="KEY=VALUE, as `edgesft tune` has it"
    )
    parser.add_argument("--data-options", default="", help="options of `tune` and `eval` on the data, quoted")
    parser.add_argument("--work", type=Path, default=Path("out/zo-quality"), help="where runs are kept")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true", help="the plan and the time it may take")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parse(arguments)
    names = ("model", "steps", "batch_size", "eval_every", "compute", "noise", "threads")
    shared = Settings(
        **{name: getattr(asked, name) for name in names},
        sets=tuple(asked.sets),
        data_options=tuple(shlex.split(asked.data_options)),
    )
    deadline = time.monotonic() + 60 * asked.minutes
    campaign = Campaign(
        asked.work, shared, asked.tasks, asked.methods, asked.lrs, asked.seeds, asked.jobs, deadline
    )
    campaign.command = shlex.join(["python", "tests/bench/bench_zo_quality.py", *(arguments or sys.argv[1:])])
    if asked.dry_run:
        print(estimate(campaign))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: runs keep their checkpoints
    try:
        untuned(campaign)
        campaign.run()
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    finally:
        found = report(campaign, asked.out)
    print(table(found["table"]))
    for name in found["missing"]:
        print(f"missing: {name}")
    whole = not found["missing"] and not found["failed"]
    return 0 if whole and all(found["met"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
