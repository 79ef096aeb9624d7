"""Worker: an exported folder by this project's own runtime: ours.py FOLDER THREADS."""

import sys
import time
from pathlib import Path

import numpy as np
from talk import serve

from edgesft.core.catalog import runtime


def main(folder: Path, threads: int) -> None:
    model = runtime("exporters.runtime").load(folder, threads=threads, spin=True)

    def run(prompt: list[int], new: int) -> dict:
        state = model.start(len(prompt) + new)
        began = time.perf_counter()
        tokens = [int(state.prefill(np.array(prompt, np.int64)).argmax())]
        first = time.perf_counter()
        while len(tokens) < new:
            tokens.append(int(state.step(tokens[-1]).argmax()))
        last = time.perf_counter()
        return {"prefill_s": first - began, "decode_s": last - first, "tokens": tokens}

    serve(run)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
