"""The child process that measures: one JSON request on stdin, JSON lines on stdout.

A fresh process for each measurement, because address layout, page placement and thread start-up differ from
process to process and decide latencies as much as the code does; and because a crash must not take the
parent with it. It imports the one runtime that the request names, and nothing else that is heavy.

Lines: `{"event": "loaded"}`, `{"event": "repetition"}`..., `{"event": "done"}`; or one
`{"event": "error", "type", "message", "hint"}` and exit status 1. Times are in nanoseconds.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from edgesft.core import statistics
from edgesft.core.errors import ArtifactError, DeviceError, EdgeSFTError

if TYPE_CHECKING:
    from edgesft.core.protocols import Decoding, IntArray, Runnable

SUSPEND_NS = 50_000_000  # by how much the boot clock may gain on the monotonic one
STALL_NS = 20_000_000_000  # steps of several seconds were seen on crowded machines; longer is no scheduling
GAP = 10  # a step this many times the median, and longer than the above, is no step


def main() -> int:
    """Read the request, measure, answer. Returns the exit status."""
    out = _private_stdout()
    _die_with_parent()
    try:
        for event in measure(json.load(sys.stdin)):
            out.write(json.dumps(event) + "\n")
            out.flush()
    except EdgeSFTError as error:
        return _fail(out, type(error).__name__, error.message, error.hint)
    except MemoryError:
        return _fail(out, "DeviceError", "not enough memory to load the model", None)
    except Exception as error:
        import traceback

        traceback.print_exc()
        text = str(error).strip().splitlines()
        return _fail(out, "DeviceError", f"{type(error).__name__}: {text[0] if text else ''}", None)
    return 0


def _fail(out: TextIO, kind: str, message: str, hint: str | None) -> int:
    out.write(json.dumps({"event": "error", "type": kind, "message": message, "hint": hint}) + "\n")
    out.flush()
    return 1


def _private_stdout() -> TextIO:
    """Keep stdout for the protocol: whatever a runtime prints there goes to stderr."""
    mine = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(mine, "w", encoding="utf-8")


def _die_with_parent() -> None:
    """A killed parent must not leave a child that loads the machine (Linux only)."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        except (OSError, AttributeError):
            return


def measure(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Load a model and run a workload.

    request: `path`; `runtime` as `module:attribute`, called with (path, threads=n); `threads`; `cold`, to
    load from the disk; `seed`, a list of integers; `workload` with `prompt_tokens`, `decode_tokens`,
    `repetitions`, `prefills` (prompts without decoding, afterwards); `slowdown`, per cent of every timed
    iteration, by `clock`, to wait in addition; `until_steady`, to double the repetitions once if they end
    unsettled.
    """
    work = request["workload"]
    path = Path(request["path"])
    runtime = _runtime(request["runtime"])
    evicted = evict(path) if request.get("cold") else 0.0
    gc.collect()
    before = _reset_peak()
    began = time.perf_counter_ns()
    model = runtime(path, threads=int(request["threads"]))
    load_ns = time.perf_counter_ns() - began
    yield {
        "event": "loaded",
        "load_ns": load_ns,
        "evicted": evicted,
        "kind": model.kind,
        "vocabulary": int(model.vocabulary),
    }
    drill = (float(request.get("slowdown", 0.0)) / 100, str(request.get("clock", "wall")))
    run = _decode if model.kind == "decoder" else _call
    count, steps = int(work["repetitions"]), int(work["decode_tokens"])
    prefills = int(work.get("prefills", 0))
    done: list[dict[str, Any]] = []
    suspended = _suspended_ns()
    for index in range(2 * count + prefills):
        extra = count <= index < 2 * count
        if extra and not (request.get("until_steady") and _unsettled(done[:count], drill[1])):
            continue
        prompt = _prompt(model, work, request["seed"], index)
        done.append(run(model, prompt, steps if index < 2 * count else 0, drill))
        yield {"event": "repetition", "index": index, **done[-1]}
    check_clock(done, _suspended_ns() - suspended)
    yield {"event": "done", **_peak(before)}


def _runtime(name: str) -> "Callable[..., Runnable]":
    module, _, attribute = name.partition(":")
    found: Callable[..., Runnable] = getattr(importlib.import_module(module), attribute)
    return found


def _prompt(model: "Runnable", work: Mapping[str, Any], seed: list[int], index: int) -> "IntArray":
    """Random tokens (S,), other ones in every repetition of every process, so that no cache can help."""
    rng = np.random.default_rng([*seed, index])
    return rng.integers(0, model.vocabulary, int(work["prompt_tokens"]), dtype=np.int64)


class _Stopwatch:
    """Times laps by the wall and by this thread's processor time, one ending where the next begins.

    Nothing between two tokens may fall outside of both: a busy machine takes the core away just there, at
    the system calls. slowdown: share of every lap to wait in addition, busy as slower code would be, by
    `clock`.
    """

    def __init__(self, slowdown: float, clock: str) -> None:
        self._slowdown, self._by_cpu = slowdown, clock == "cpu"
        self.wall: list[int] = []
        self.cpu: list[int] = []
        self._last_cpu = time.thread_time_ns()
        self._last_wall = time.perf_counter_ns()

    def lap(self) -> None:
        """End a lap and begin the next."""
        if self._slowdown:
            read, last = (
                (time.thread_time_ns, self._last_cpu)
                if self._by_cpu
                else (time.perf_counter_ns, self._last_wall)
            )
            until = last + (read() - last) * (1 + self._slowdown)
            while read() < until:
                pass
        cpu, wall = time.thread_time_ns(), time.perf_counter_ns()
        self.wall.append(wall - self._last_wall)
        self.cpu.append(cpu - self._last_cpu)
        self._last_cpu, self._last_wall = cpu, wall


Drill = tuple[float, str]  # share to wait in addition, and by which clock


def _decode(model: "Runnable", prompt: "IntArray", steps: int, drill: Drill) -> dict[str, Any]:
    """One prompt and `steps` greedy tokens; a step lasts until its token is known. End tokens are ignored."""
    state: Decoding = model.start(len(prompt) + steps + 1)
    began = time.perf_counter_ns()
    watch = _Stopwatch(*drill)
    token = int(state.prefill(prompt).argmax())
    watch.lap()
    for _ in range(steps):
        token = int(state.step(token).argmax())
        watch.lap()
    return {
        "ttft_ns": watch.wall[0],
        "ttft_cpu_ns": watch.cpu[0],
        "step_ns": watch.wall[1:],
        "step_cpu_ns": watch.cpu[1:],
        "wall_ns": time.perf_counter_ns() - began,
    }


def _call(model: "Runnable", prompt: "IntArray", steps: int, drill: Drill) -> dict[str, Any]:
    """One call of an encoder on one sequence."""
    ids = prompt[None, :]
    mask, last = np.ones_like(ids), np.array([len(prompt) - 1], dtype=np.int64)
    watch = _Stopwatch(*drill)
    model.logits(ids, mask, last)
    watch.lap()
    return {"call_ns": watch.wall[0], "call_cpu_ns": watch.cpu[0], "step_ns": [], "wall_ns": watch.wall[0]}


def _unsettled(done: list[dict[str, Any]], clock: str = "wall") -> bool:
    """Whether times still change at the end of the warm-up cut."""
    suffix = "_cpu_ns" if clock == "cpu" else "_ns"
    if any(r["step_ns"] for r in done):
        return not statistics.warm_up([r["step" + suffix] for r in done]).steady
    first = "ttft" if "ttft_ns" in done[0] else "call"
    return not statistics.mser(np.log([max(r[first + suffix], 1) for r in done])).steady


def check_clock(done: list[dict[str, Any]], suspended_ns: int = 0) -> None:
    """Refuse times that no program takes. Raises DeviceError: the clock went back, stood, or was suspended.

    done: the repetitions. suspended_ns: how much the boot clock gained on the monotonic one meanwhile.
    """
    first = [r[name] for r in done for name in ("ttft_ns", "call_ns") if name in r]
    for times in (first, [t for r in done for t in r["step_ns"]]):
        if not times:
            continue
        if min(times) < 0:
            raise DeviceError(f"the monotonic clock went back by {-min(times)} ns during a measurement")
        if max(times) > max(STALL_NS, GAP * float(np.median(times))):
            gap = f"a step took {max(times) / 1e9:.1f} s, over {GAP} times the median"
            raise DeviceError(f"{gap}: the machine was suspended")
    if suspended_ns > SUSPEND_NS:
        raise DeviceError(f"the machine was suspended for {suspended_ns / 1e9:.1f} s during a measurement")


def _suspended_ns() -> int:
    """Time that the machine has been suspended since boot; 0 where that is not known."""
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    if boot is None:
        return 0
    return time.clock_gettime_ns(boot) - time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def evict(path: Path) -> float:
    """Drop a folder's files from the page cache; the share of the probed pages that really went, 0 to 1.

    Needs no rights: written data are flushed, then the kernel is advised. Pages that another process maps
    stay, hence the share.
    """
    if not hasattr(os, "posix_fadvise"):
        return 0.0
    gone = probed = 0
    for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.is_symlink()):
        size = file.stat().st_size
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise ArtifactError(f"`{file}` cannot be read: {error.strerror}") from None
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # a probe must not read ahead
            for k in range(16 if size > 1 << 20 else 1 if size else 0):
                probed += 1
                gone += not _cached(descriptor, size * k // 16)
        except OSError:
            continue
        finally:
            os.close(descriptor)
    return gone / probed if probed else 0.0


def _cached(descriptor: int, offset: int) -> bool:
    """Whether a byte can be read without touching the disk."""
    flag = getattr(os, "RWF_NOWAIT", None)
    if flag is None:
        return True
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, flag) == 1
    except BlockingIOError:
        return False
    except OSError:
        return True  # the file system cannot say: do not claim a cold load


def _status_kib(name: str) -> int:
    """A `kB` field of /proc/self/status; 0 where there is none."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(name + ":")), 0)


def _reset_peak() -> int:
    """Resident bytes now; the kernel's high-water mark starts anew from here where that is permitted."""
    with contextlib.suppress(OSError):  # where not, the peak includes the start of the interpreter
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status_kib("VmRSS") * 1024


def _peak(before: int) -> dict[str, int]:
    """Peak resident bytes of this process: in all, and above what it held before the model was loaded."""
    peak = _status_kib("VmHWM") * 1024
    if not peak:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak_bytes": peak, "peak_above_bytes": max(0, peak - before), "before_bytes": before}


if __name__ == "__main__":
    sys.exit(main())
