"""A model with its last decoder layers repeated: slower by a known amount of real work, to drill the gate.

python tests/bench/make_slower.py demo:smollm2-135m -n 2 -o out/slower     # then export it like the other
"""

import argparse
import json
import re
from pathlib import Path

from safetensors.torch import save_file

from edgesft.core import models


def main() -> None:
    """Copy the model folder, the last layer once more for each of N further layers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("-n", "--layers", type=int, default=2)
    parser.add_argument("-o", "--out", type=Path, required=True)
    asked = parser.parse_args()
    source = models.resolve(asked.model).path
    config = json.loads((source / "config.json").read_text())
    depth = config["num_hidden_layers"]
    weights = models.tensors(source)
    tensors = {name: weights.get(name) for name in weights.keys()}  # noqa: SIM118 - no mapping
    last = re.compile(rf"(.*\.layers\.){depth - 1}(\..*)")
    for name in list(tensors):
        found = last.fullmatch(name)
        for k in range(asked.layers if found else 0):
            tensors[f"{found[1]}{depth + k}{found[2]}"] = tensors[name].clone()
    asked.out.mkdir(parents=True)
    for file in source.iterdir():
        if file.name in models.KEPT_FILES:
            (asked.out / file.name).write_bytes(file.read_bytes())
    (asked.out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": depth + asked.layers}))
    save_file(tensors, asked.out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
