"""One layer at batch 1 inside ONNX Runtime: packed 2:4 and dense tiles against MatMulNBits and ggml.

    EDGESFT_BENCH_PEERS=/path/to/python python -m pytest tests/bench/test_nm_matmul.py -s

Each shape in so many different copies that no cache holds them, all contestants by turns, one at a time, each
in a process of its own that lives as long as the shape; medians over rounds of the ratio inside a round. The
read bandwidth is measured in our process in the same rounds; a bar that no kernel could meet which reads our
bytes at that bandwidth is written down as missed, and does not fail. Weights of all lie on huge pages. The
peers' Python has llama-cpp-python, whose ggml is used; without it that row is left out, its bars skipped.

EDGESFT_BENCH_ROUNDS (15), EDGESFT_BENCH_OUT (docs/results).
"""

import os
import random
import statistics
import subprocess

import pytest

from .workers import PEERS, Worker, machine, own, peer_python, peer_versions, write

pytestmark = pytest.mark.bench
SHAPES = [(576, 1536), (1536, 576), (2048, 2048), (4096, 11008)]
MEGABYTES = 128
ROUNDS = int(os.environ.get("EDGESFT_BENCH_ROUNDS", "15"))
GGML = "ggml Q4_0"
BARS = [  # ours, theirs, at least
    ("2:4 int4 g64", "MatMulNBits g32", 2.2),
    ("2:4 int4 g64", "MatMulNBits g128", 1.7),
    ("2:4 int4 g64", GGML, 1.6),
    ("dense int4 g32", "MatMulNBits g32", 1.7),
]
BYTES = {  # a weight
    "2:4 int4 g64": 3.25 / 8,
    "2:4 int4 g32": 3.5 / 8,
    "dense int4 g32": 4.5 / 8,
    "MatMulNBits g32": 5.125 / 8,
    "MatMulNBits g128": 4.28125 / 8,
    GGML: 4.5 / 8,
}


@pytest.fixture(scope="module")
def ggml(tmp_path_factory):
    """The command of the ggml worker, None without one."""
    python = peer_python()
    if python is None:
        return None
    code = "import llama_cpp, pathlib; print(pathlib.Path(llama_cpp.__file__).parent)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    package = done.stdout.strip()
    out = tmp_path_factory.mktemp("ggml") / "gemv"
    libraries = f"{package}/lib"
    command = ["g++", "-O2", "-std=c++17", PEERS / "ggml_gemv.cpp", f"-I{package}/../include"]
    command += [f"-L{libraries}", "-lggml", "-lggml-cpu", "-lggml-base", f"-Wl,-rpath,{libraries}"]
    subprocess.run([*command, "-o", out], check=True, capture_output=True)
    return [out]


def measured(rows, columns, threads, ggml, m=1, megabytes=MEGABYTES):
    """Seconds of a layer by contestant and the bytes a second that were read, a list of rounds each."""
    ours = Worker(own("gemv.py"))
    opened = {"rows": rows, "columns": columns, "threads": threads, "megabytes": megabytes, "m": m}
    copies = ours.json({"open": opened})["copies"]
    names = [*copies, *([GGML] if ggml else [])]
    theirs = Worker(ggml) if ggml else None
    if theirs:
        theirs.ask(f"open {rows} {columns} {threads} {copies['MatMulNBits g32']}")
    rng = random.Random(0)
    seconds, bandwidth = {name: [] for name in names}, []
    for turn in range(ROUNDS + 1):
        bandwidth.append(ours.json({"read": threads})["bytes_per_second"])
        for name in rng.sample(names, len(names)):
            took = float(theirs.ask(f"run {m}")) if name == GGML else ours.json({"run": name})["seconds"]
            if turn:
                seconds[name].append(took)
    ours.close()
    if theirs:
        theirs.close()
    return seconds, bandwidth[1:]


def _share(bytes_, took, bandwidth):
    return round(statistics.median(bytes_ / t / b for t, b in zip(took, bandwidth, strict=True)), 3)


def row(rows, columns, threads, seconds, bandwidth):
    """The line of the table; a ratio is the median over rounds."""
    bytes_ = {name: rows * columns * BYTES[name] for name in seconds}
    made = {
        "shape": f"{rows}x{columns}",
        "threads": threads,
        "read_gb_s": round(statistics.median(bandwidth) / 1e9, 1),
        "us": {name: round(statistics.median(took) * 1e6, 1) for name, took in seconds.items()},
        "share_of_read_bandwidth": {
            name: _share(bytes_[name], took, bandwidth) for name, took in seconds.items()
        },
        "ratios": {},
    }
    for ours, theirs, bar in BARS:
        if theirs in seconds:
            ratio = statistics.median(b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True))
            # what a kernel would reach that reads our bytes at the whole bandwidth and does nothing else
            roof = statistics.median(
                t * b / bytes_[ours] for t, b in zip(seconds[theirs], bandwidth, strict=True)
            )
            said = {"ratio": round(ratio, 2), "bar": bar, "ratio_at_the_roof": round(roof, 2)}
            made["ratios"][f"{ours} / {theirs}"] = said
    sparse = [b / a for a, b in zip(seconds["2:4 int4 g64"], seconds["dense int4 g32"], strict=True)]
    made["due_to_sparsity"] = round(statistics.median(sparse), 2)
    return made


@pytest.mark.timeout(0)
def test_decode_and_prefill_of_one_layer(ggml):
    table, prefill = [], []
    for threads in (1, 2):
        for rows, columns in SHAPES:
            table.append(row(rows, columns, threads, *measured(rows, columns, threads, ggml)))
            print(table[-1], flush=True)
    for rows, columns in ((576, 1536), (2048, 2048)):
        seconds, _ = measured(rows, columns, 2, ggml, m=512, megabytes=4)
        medians = {name: round(statistics.median(took) * 1e6) for name, took in seconds.items()}
        prefill.append({"shape": f"{rows}x{columns}", "tokens": 512, "threads": 2, "us": medians})
        print(prefill[-1], flush=True)
    python = peer_python()
    missed, beyond = [], []
    for each in table:
        for name, said in each["ratios"].items():
            if said["ratio"] >= said["bar"]:
                continue
            where = f"{each['shape']}, {each['threads']} threads"
            line = f"{where}: {name} is {said['ratio']}, the bar {said['bar']}"
            if said["ratio_at_the_roof"] < said["bar"]:  # of the memory, as it was while this was measured
                beyond.append(f"{line}, the memory allows {said['ratio_at_the_roof']}")
            else:
                missed.append(line)
    for each in table:
        rows, columns = map(int, each["shape"].split("x"))
        share, bar = each["share_of_read_bandwidth"]["2:4 int4 g64"], {1: 0.9, 2: 0.8}[each["threads"]]
        if rows * columns * BYTES["2:4 int4 g64"] >= 2e6 and share < bar:
            missed.append(
                f"{each['shape']}, {each['threads']} threads: {share} of the bandwidth, the bar {bar}"
            )
    for each in prefill:
        for name in ("2:4 int4 g64", "dense int4 g32"):
            if each["us"][name] > each["us"]["MatMulNBits g128"]:
                missed.append(f"{each['shape']}: a prefill by {name} is slower than ONNX Runtime's")
    peers = peer_versions(python) if python else {}
    write(
        "nm-matmul.json",
        {
            "machine": machine() | peers,
            "rounds": ROUNDS,
            "decode": table,
            "prefill": prefill,
            "missed": missed,
            "missed_beyond_the_memory": beyond,
        },
    )
    assert not missed, "\n".join(missed)
    if not ggml:
        pytest.skip("EDGESFT_BENCH_PEERS is not set: nothing was held against ggml")
