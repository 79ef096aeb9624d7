"""Dev loss before and after zeroth-order tuning, one run a seed, through the command line.

    python tests/bench/bench_dev_loss.py --steps 300 --seeds 0 1 2 --out docs/results/sparse-mezo-sst2.json

Each run is an ordinary `edgesft tune`, so a killed one goes on. Accuracy on the test part, with its
interval, is measured on the merged model.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path


def edgesft(*arguments: object) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "edgesft", *map(str, arguments), "--json"], stdout=subprocess.PIPE, check=True
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--data", default="demo:sst2")
    parser.add_argument("--recipe", default="sparse-mezo")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--set", dest="sets", nargs="*", default=[], help="KEY=VALUE, as `edgesft tune` takes it"
    )
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("out/dev-loss"))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    threads = ("--threads", arguments.threads)
    sets = [part for setting in arguments.sets for part in ("--set", setting)]
    before = edgesft("eval", arguments.model, arguments.data, *threads)
    runs = []
    for seed in arguments.seeds:
        delta, merged = arguments.work / f"delta-{seed}", arguments.work / f"merged-{seed}"
        tuned = edgesft("tune", arguments.model, arguments.data, "--recipe", arguments.recipe,
                        "--steps", arguments.steps, "--seed", seed, *threads, *sets, "-o", delta)  # fmt: skip
        edgesft("merge", arguments.model, delta, "-o", merged)
        after = edgesft("eval", merged, arguments.data, *threads)
        runs.append(
            {
                "seed": seed,
                "dev_loss": [tuned["dev_loss_before"], tuned["dev_loss_after"]],
                "dev_accuracy": [tuned["dev_accuracy_before"], tuned["dev_accuracy_after"]],
                "test_loss": [before["loss"], after["loss"]],
                "test_accuracy": [before["accuracy"], after["accuracy"]],
                "test_accuracy_interval": [
                    before["intervals"]["accuracy"], after["intervals"]["accuracy"]
                ],
                "seconds_per_step": tuned["seconds_per_step"],
            }
        )  # fmt: skip
        print(json.dumps(runs[-1]), flush=True)
    result = {
        "what": f"{arguments.recipe}, {arguments.steps} steps on {arguments.data}, {arguments.model}",
        "lower_dev_loss": f"{sum(r['dev_loss'][1] < r['dev_loss'][0] for r in runs)} of {len(runs)} seeds",
        "test_examples": before["examples"],
        "runs": runs,
        "parameters": json.loads(
            (arguments.work / f"delta-{arguments.seeds[0]}" / "manifest.json").read_text()
        )["params"],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
