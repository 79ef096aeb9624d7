"""What this machine really reaches: memory bandwidth and matrix products, measured once per fingerprint.

These are the denominators of a roofline; the data sheet only says when a measurement is too good to be true.
Each figure comes from a process of its own, because thread pools are sized when a library is loaded. The
record is kept in the cache folder by fingerprint and number of threads.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from edgesft.core import artifact, cache, console
from edgesft.core.errors import DeviceError
from edgesft.devices import host, sysfs

SCHEMA = 1
SECONDS = 1.0  # that one figure is measured for
PASSES = 5  # at least, of which the median counts
SMALLEST, LARGEST = 256 << 20, 2 << 30  # bytes of working set
CACHES = 4  # working set in last-level caches, where the memory allows it
EDGE = 1536  # of the square matrices: 9.4 MB each in float32, blocked by every BLAS
BUSY = 0.25  # spread of the passes from which on a note says so
TIMEOUT = 120.0
KINDS = ("copy", "read", "cached", "fp32", "int8")
BIG_CACHE = 64 << 20  # bytes of last-level cache from which on whole models stay in it


def measured(threads: int, refresh: bool = False) -> dict[str, Any]:
    """Bandwidth and matrix products with `threads` threads; from the cache folder unless `refresh`.

    Returns `copy_gbs` (bytes read and bytes written), `read_gbs`, `cache_read_gbs` (a working set of a
    quarter of the last-level cache, where that can hold models; else None), `gemm_gflops` (by type:
    fp32 from numpy's BLAS; int8 from ONNX Runtime where it is installed; a multiply-add is two), `threads`,
    `seconds`, `fingerprint_id`, `working_set_bytes`, `cache_bytes`, `spread` (of the passes, (p90 - p10) /
    median), `datasheet`, `notes`. Raises DeviceError if the machine cannot be measured.
    """
    if threads < 1:
        raise ValueError(f"threads are 1 or more, got {threads}")
    identity = host.fingerprint(threads=threads)["id"]
    home = cache.folder() / "roofline"
    file = home / f"{identity.removeprefix('sha256:')[:16]}-{threads}.json"
    from filelock import FileLock

    lock = FileLock(home / ".lock")  # two that measure at once would halve each other
    try:
        home.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        console.warn(f"the cache folder `{home}` cannot be used ({error}); this is measured again each time")
        return _measure(threads, identity)
    try:
        found = None if refresh else _cached(file, identity)
        if found is None:
            found = _measure(threads, identity)
            with suppress(OSError):  # a full disk only costs the next measurement
                artifact.write_json(file, found)
        return found
    finally:
        lock.release()


def _cached(file: Path, identity: str) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        fits = found["schema"] == SCHEMA and found["fingerprint_id"] == identity
        return dict(found) if fits and found["copy_gbs"] > 0 and found["gemm_gflops"]["fp32"] > 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _measure(threads: int, identity: str) -> dict[str, Any]:
    console.say(f"measuring memory bandwidth and matrix products once, {threads} threads")
    began = time.monotonic()
    cached = last_level_cache()
    size, size_notes = working_set(cached, _available())
    absent = {"int8": host.installed("onnxruntime") is None, "cached": cached < BIG_CACHE}
    rates = {
        kind: _child(kind, threads, cached // CACHES if kind == "cached" else size)
        for kind in KINDS
        if not absent.get(kind)
    }
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "copy_gbs": rates["copy"]["rate"],
        "read_gbs": rates["read"]["rate"],
        "cache_read_gbs": rates["cached"]["rate"] if "cached" in rates else None,
        "gemm_gflops": {k: rates[k]["rate"] for k in ("fp32", "int8") if k in rates},
        "source": "measured: numpy copy, BLAS dot and product" + ", ONNX Runtime int8" * ("int8" in rates),
        "threads": threads,
        "seconds": round(time.monotonic() - began, 2),
        "fingerprint_id": identity,
        "working_set_bytes": size,
        "cache_bytes": cached,
        "spread": {kind: rate["spread"] for kind, rate in rates.items()},
    }
    return found | _sanity(found, size_notes)


def _sanity(found: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Data sheet beside the measured figures, and what looks wrong."""
    spec = host.spec()
    peak = spec.peak("fp32")
    sheet = {"bandwidth_gbs": spec.bandwidth_gbs, "fp32_gflops": None if peak is None else 1000 * peak}
    notes = list(notes)
    restless = {kind: spread for kind, spread in found["spread"].items() if spread > BUSY}
    if restless:
        widest = ", ".join(f"`{kind}` {100 * spread:.0f} %" for kind, spread in restless.items())
        notes.append(f"the machine was busy, passes differed ({widest}): measure again with `refresh`")
    fastest = max(found["copy_gbs"], found["read_gbs"])
    if sheet["bandwidth_gbs"] and fastest > sheet["bandwidth_gbs"]:
        notes.append(
            f"{fastest:.1f} GB/s are more than the data sheet's {sheet['bandwidth_gbs']:.1f}: a cache helped"
        )
    flops = found["gemm_gflops"]["fp32"]
    if sheet["fp32_gflops"] and flops > sheet["fp32_gflops"]:
        notes.append(
            f"{flops:.0f} GFLOP/s are more than {sheet['fp32_gflops']:.0f} at the nominal clock: it boosts"
        )
    return {"datasheet": sheet, "notes": notes}


def last_level_cache(root: Path = Path("/")) -> int:
    """Bytes of the largest cache that the first processor sees; 0 where that is not shown."""
    sizes = [sysfs.text(f) for f in (root / "sys/devices/system/cpu/cpu0/cache").glob("index[0-9]*/size")]
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units and s[:-1].isdigit()), default=0)


def _available() -> int:
    """Bytes of memory that may be used without harm."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limit = host.memory_limit()
    return free if limit is None else min(free, limit)


def working_set(cached: int, available: int) -> tuple[int, list[str]]:
    """Bytes to stream through, several times the last-level cache of `cached` bytes, and what to say of it.

    At most a quarter of the `available` memory and 2 GiB. Raises DeviceError below 16 MiB.
    """
    size = min(max(SMALLEST, CACHES * cached), LARGEST, available // 4)
    if size < 16 << 20:
        raise DeviceError(
            f"only {available >> 20} MiB of memory are free, too little to measure its bandwidth"
        )
    notes = []
    if size < 2 * cached:
        notes.append(
            f"a working set of {size >> 20} MiB is less than two last-level caches of {cached >> 20} MiB"
        )
    return size, notes


def _child(kind: str, threads: int, size: int) -> dict[str, float]:
    """Run one measurement in a process of its own. Raises DeviceError."""
    import edgesft

    pool = str(threads if kind == "fp32" else 1)  # the others bring threads of their own
    root = str(Path(edgesft.__file__).resolve().parent.parent)
    path = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH", ""), root) if p)
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "edgesft.devices.roofline", kind, str(threads), str(size)],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT,
            check=False,
            env={**os.environ, "PYTHONPATH": path, **dict.fromkeys(names, pool)},
        )
    except subprocess.TimeoutExpired:
        raise DeviceError(f"measuring `{kind}` took more than {TIMEOUT:.0f} s") from None
    with suppress(ValueError, KeyError, IndexError):
        found = json.loads(done.stdout.splitlines()[-1])
        return {"rate": float(found["rate"]), "spread": float(found["spread"])}
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    raise DeviceError(f"measuring `{kind}` failed with status {done.returncode}: {last}")


def main(kind: str, threads: int, size: int) -> None:
    """The child's side: one JSON line on stdout."""
    makers = {"copy": _copy, "read": _read, "cached": _read, "fp32": _fp32, "int8": _int8}
    work, run = makers[kind](threads, size)
    run()  # page faults, thread start, clocks
    times: list[float] = []
    until = time.perf_counter() + SECONDS
    while len(times) < PASSES or time.perf_counter() < until:
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    times.sort()
    middle = statistics.median(times)
    spread = (times[int(0.9 * (len(times) - 1))] - times[int(0.1 * (len(times) - 1))]) / middle
    console.data(json.dumps({"rate": round(work / middle / 1e9, 3), "spread": round(spread, 4)}))


Work = tuple[float, Callable[[], object]]  # bytes or operations of one pass, and the pass


def _each_slice(threads: int, length: int, run: Callable[[slice], object]) -> Callable[[], object]:
    """`run` over equal slices of `length`, a thread each; numpy releases the interpreter's lock."""
    from concurrent.futures import ThreadPoolExecutor
    from itertools import pairwise

    cuts = [length * t // threads for t in range(threads + 1)]
    parts = [slice(a, b) for a, b in pairwise(cuts)]
    if threads == 1:
        return lambda: run(parts[0])
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(run, parts))


def _copy(threads: int, size: int) -> Work:
    import numpy as np

    source = np.ones(size // 2 // 4, dtype=np.float32)
    target = np.empty_like(source)
    return 2.0 * source.nbytes, _each_slice(
        threads, source.size, lambda part: np.copyto(target[part], source[part])
    )


def _read(threads: int, size: int) -> Work:
    import numpy as np

    a = np.ones(size // 2 // 4, dtype=np.float32)
    b = np.ones_like(a)
    return 2.0 * a.nbytes, _each_slice(threads, a.size, lambda part: np.dot(a[part], b[part]))


def _fp32(threads: int, size: int) -> Work:
    import numpy as np

    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((EDGE, EDGE), dtype=np.float32) for _ in range(2))
    out = np.empty_like(a)
    return 2.0 * EDGE**3, lambda: np.matmul(a, b, out=out)


def _int8(threads: int, size: int) -> Work:
    """ONNX Runtime's MatMulInteger, uint8 times int8, the weights constant as in a model."""
    import numpy as np
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (EDGE, EDGE)).astype(np.int8)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "w"], ["y"])],
        "int8",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, [EDGE, EDGE])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [EDGE, EDGE])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"a": rng.integers(0, 256, (EDGE, EDGE)).astype(np.uint8)}
    return 2.0 * EDGE**3, lambda: session.run(None, feed)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
