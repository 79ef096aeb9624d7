"""Run an exported folder with packed weights in plain ONNX Runtime: no module of edgesft is imported.

    python examples/onnxruntime_plain.py out/x24 --prompt "The capital of France is"

All that such a model needs beside onnxruntime is one shared library, registered in one line. `--library`
names it; left out, the installed edgesft is asked for it in a process of its own. `--fallback` needs none: it
runs `model.plain.onnx`, the same weights in operators that every onnxruntime has, slower and in more memory.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer


def library() -> str:
    """Where the installed edgesft has its operations, compiled now if need be."""
    command = [sys.executable, "-W", "ignore:::runpy", "-m", "edgesft.kernels.nm_matmul.library"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--new", type=int, default=24, help="tokens to generate")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    parser.add_argument("--library", help="libedgesft_nm.so")
    parser.add_argument("--fallback", action="store_true", help="use no library")
    arguments = parser.parse_args()

    options = ort.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    options.log_severity_level = 3
    if arguments.fallback:
        graph = "model.plain.onnx"
        if tuple(int(n) for n in ort.__version__.split(".")[:2]) < (1, 25):
            # older ones would decode every weight in every call; so they do it once, to float32
            options.add_session_config_entry("session.disable_quant_qdq", "1")
    else:
        graph = "model.onnx"
        options.register_custom_ops_library(arguments.library or library())  # the one line
    began = time.perf_counter()
    session = ort.InferenceSession(arguments.folder / graph, options, providers=["CPUExecutionProvider"])
    loaded = time.perf_counter() - began

    about = json.loads((arguments.folder / "export.json").read_text())
    tokenizer = Tokenizer.from_file(str(arguments.folder / "tokenizer.json"))
    ids = tokenizer.encode(arguments.prompt).ids
    empty = np.zeros((1, about["kv_heads"], 0, about["head_dim"]), np.float32)
    names = [f"{layer}.{part}" for layer in range(about["layers"]) for part in ("key", "value")]
    cache = {f"past_key_values.{name}": empty for name in names}
    wanted = ["logits", *(f"present.{name}" for name in names)]

    tokens, feed, times = [], np.array([ids], np.int64), []
    while len(tokens) < arguments.new:
        length = cache["past_key_values.0.key"].shape[2] + feed.shape[1]
        began = time.perf_counter()
        logits, *present = session.run(
            wanted, {"input_ids": feed, "attention_mask": np.ones((1, length), np.int64), **cache}
        )
        times.append(time.perf_counter() - began)
        cache = dict(zip(cache, present, strict=True))
        tokens.append(int(logits[-1].argmax()))
        if tokens[-1] in about["eos"]:
            break
        feed = np.array([[tokens[-1]]], np.int64)
    assert not any(name.split(".")[0] == "edgesft" for name in sys.modules)
    print(arguments.prompt + tokenizer.decode(tokens))
    print(f"onnxruntime {ort.__version__}, {graph} loaded in {loaded:.2f} s")
    if len(times) > 1:
        print(f"{len(tokens)} tokens, {(len(times) - 1) / sum(times[1:]):.0f} a second after the first")


if __name__ == "__main__":
    main()
