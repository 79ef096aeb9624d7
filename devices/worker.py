"""The child process that measures: one JSON request on stdin, JSON lines on stdout.

A fresh process for each measurement, because address layout, page placement and thread start-up differ from
process to process and decide latencies as much as the code does; and because a crash must not take the
parent with it. It imports the one runtime that the request names, and nothing else that is heavy.

Lines: `{"event": "loaded"}`, `{"event": "repetition"}`..., `{"event": "idle"}`..., `{"event": "done"}`; or
one `{"event": "error", "type", "message", "hint"}` and exit status 1. Times are in nanoseconds.
"""

import ctypes
import gc
import importlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

import numpy as np

from edgesft.core import statistics
from edgesft.core.errors import DeviceError, EdgeSFTError
from edgesft.devices import footprint

if TYPE_CHECKING:
    from edgesft.core.protocols import Decoding, FloatArray, IntArray, Runnable

SUSPEND_NS = 50_000_000  # by how much the boot clock may gain on the monotonic one
STALL_NS = 20_000_000_000  # steps of several seconds were seen on crowded machines; longer is no scheduling
GAP = 10  # a step this many times the median, and longer than the above, is no step
LAP_NS = 1_000_000  # shorter calls are timed several at once: reading two clocks takes about a microsecond
MAX_CALLS = 10_000  # in one lap


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

    request:
    `path`, and `files` where it is not a folder that holds all of them; `runtime` as `module:attribute`,
    called with (path, threads=n); `threads`; `seed`, a list of integers;
    `workload` with `prompt_tokens`, `decode_tokens`, `repetitions`, `prefills` (prompts without decoding,
    afterwards), `batch` (sequences at once);
    `cold`, to load from the disk; `slowdown`, per cent of every timed iteration, by `clock`, to wait in
    addition; `until_steady`, to double the repetitions once if they end unsettled;
    `idle_seconds`, a list: after the repetitions, for each, sleep and then run one more;
    `operators`, a file for ONNX Runtime's own profile of one repetition to warm up and all that follow. The
    profiler slows what it times. `done.operators.phases` says where in it what was run: `phase` (`prefill`,
    `decode`, `call`), `repetition` (-1: the warm-up), `runs` of the session, `begin_us` and `end_us` on the
    clock of that file;
    `shapes`, of inputs by name, for a foreign graph.
    """
    evicted = footprint.evict(_files(request)) if request.get("cold") else 0.0
    runtime = _runtime(request["runtime"])
    options = {"shapes": request["shapes"]} if request.get("shapes") else {}
    target = Path(request["operators"]) if request.get("operators") else None
    if target is not None:
        options["trace"] = target.with_name(f".{target.name}.{os.getpid()}")
    gc.collect()
    before = footprint.reset_peak()
    began = time.perf_counter_ns()
    model = runtime(Path(request["path"]), threads=int(request["threads"]), **options)
    load_ns = time.perf_counter_ns() - began
    job = _Job(
        model,
        request["workload"],
        request["seed"],
        (float(request.get("slowdown", 0.0)) / 100, str(request.get("clock", "wall"))),
    )
    yield {
        "event": "loaded",
        "load_ns": load_ns,
        "evicted": evicted,
        "kind": model.kind,
        "vocabulary": None if model.vocabulary is None else int(model.vocabulary),
        **job.described(),
    }
    gc.collect()
    gc.freeze()  # a collection amid a step need not look at all that was loaded
    suspended = _suspended_ns()
    done: list[dict[str, Any]] = []
    warm = [{"index": -1, **job.run(-1)}] if target is not None else []
    for event in _events(job, request):
        done.append(event)
        yield event
    check_clock(done, _suspended_ns() - suspended)
    traced = {} if target is None else {"operators": _operators(model, target, [*warm, *done])}
    yield {"event": "done", **footprint.peak(before), **traced}


def _events(job: "_Job", request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The repetitions, as many again if they end unsettled, the prompts alone, those after a pause."""
    work = request["workload"]
    count, prefills = int(work["repetitions"]), int(work.get("prefills", 0))
    done: list[dict[str, Any]] = []
    for index in range(2 * count + prefills):
        extra = count <= index < 2 * count
        if extra and not (request.get("until_steady") and _unsettled(done[:count], job.drill[1])):
            continue
        done.append(job.run(index, decode=index < 2 * count))
        yield {"event": "repetition", "index": index, **done[-1]}
    for index, seconds in enumerate(request.get("idle_seconds", ()), 2 * count + prefills):
        time.sleep(seconds)
        yield {"event": "idle", "index": index, "seconds": seconds, **job.run(index)}


def _operators(model: Any, target: Path, ran: Iterable[Mapping[str, Any]]) -> dict[str, Any]:  # noqa: ANN401
    """End ONNX Runtime's profile, move it to `target`, and say where in it what was run."""
    start = _on_our_clock(model.session.get_profiling_start_time_ns())
    os.replace(model.session.end_profiling(), target)
    phases = []
    for each in ran:
        begin = each["began_ns"] - start
        laps = [("prefill", 1, each["ttft_ns"])] if "ttft_ns" in each else []
        if each["step_ns"]:
            laps.append(("decode", len(each["step_ns"]), sum(each["step_ns"])))
        if "call_ns" in each:
            laps.append(("call", each["calls"], each["wall_ns"]))
        for phase, runs, took in laps:
            record = {"phase": phase, "repetition": each["index"], "runs": runs}
            phases.append({**record, "begin_us": begin / 1e3, "end_us": (begin + took) / 1e3})
            begin += took
    return {"path": str(target), "phases": phases}


def _on_our_clock(moment: int) -> int:
    """A moment in nanoseconds by the performance counter. The standard library of C++ that ONNX Runtime was
    built with decides by which clock it is given: the time of day (GNU) or a monotonic one."""
    ours = time.perf_counter_ns()
    found = [moment - _ahead(read) for read in (time.time_ns, time.monotonic_ns)]
    return min(found, key=lambda each: abs(ours - each))


def _ahead(read: Callable[[], int]) -> int:
    """By how many nanoseconds a clock is ahead of the performance counter: the quickest of some readings, in
    the others this process may have lost its core."""
    readings = []
    for _ in range(20):
        before, there, after = time.perf_counter_ns(), read(), time.perf_counter_ns()
        readings.append((after - before, there - (before + after) // 2))
    return min(readings)[1]


def _runtime(name: str) -> "Callable[..., Runnable]":
    module, _, attribute = name.partition(":")
    found: Callable[..., Runnable] = getattr(importlib.import_module(module), attribute)
    return found


def _prompt(model: "Runnable", work: Mapping[str, Any], seed: list[int], index: int) -> "IntArray":
    """Random tokens (S,), of a batch (B, S), other ones in every repetition of every process, so that no
    cache can help."""
    size, batch = int(work["prompt_tokens"]), int(work.get("batch", 1))
    shape = (size,) if batch == 1 else (batch, size)
    return _rng(seed, index).integers(0, model.vocabulary, shape, dtype=np.int64)


def _rng(seed: list[int], index: int) -> np.random.Generator:
    return np.random.default_rng([*seed, index + 1])  # the warm-up is -1


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
        self.began = self._last_wall = time.perf_counter_ns()

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


@dataclass
class _Job:
    """A loaded model and what to run on it. calls: how many calls of a graph or an encoder make a lap."""

    model: Any
    work: Mapping[str, Any]
    seed: list[int]
    drill: Drill
    calls: int = 1

    @property
    def batch(self) -> int:
        return int(self.work.get("batch", 1))

    def described(self) -> dict[str, Any]:
        """What the inputs of a foreign graph will be; raises UsageError if that cannot be known."""
        if self.model.kind != "graph":
            return {}
        return {"inputs": self.model.describe(int(self.work["prompt_tokens"]), self.batch)}

    def run(self, index: int, decode: bool = True) -> dict[str, Any]:
        """One repetition."""
        if self.model.kind == "decoder":
            prompt = _prompt(self.model, self.work, self.seed, index)
            return self._decode(prompt, int(self.work["decode_tokens"]) if decode else 0)
        if self.model.kind == "graph":
            size, rng = int(self.work["prompt_tokens"]), _rng(self.seed, index)
            call = self.model.prepare(self.model.feeds(size, self.batch, rng))
        else:
            call = self._encoder(_prompt(self.model, self.work, self.seed, index))
        found = self._call(call)
        if index == 0 and found["wall_ns"] < 100 * LAP_NS:
            # The first call counts by itself; by the next ones it is known how many make a lap.
            took = min(self._call(call)["wall_ns"] for _ in range(4))
            self.calls = min(MAX_CALLS, math.ceil(LAP_NS / max(took, 1)))
        return found

    def _decode(self, prompt: "IntArray", steps: int) -> dict[str, Any]:
        """One prompt and `steps` greedy tokens; a step lasts until its token is known. End tokens are
        ignored. In a batch one step makes a token of every sequence."""
        room = prompt.shape[-1] + steps + 1
        state: Decoding = self.model.start(room) if self.batch == 1 else self.model.start(room, self.batch)
        pick = _most_probable if self.batch == 1 else _most_probable_each
        watch = _Stopwatch(*self.drill)
        token = pick(state.prefill(prompt))
        watch.lap()
        for _ in range(steps):
            token = pick(state.step(token))
            watch.lap()
        return {
            "ttft_ns": watch.wall[0],
            "ttft_cpu_ns": watch.cpu[0],
            "step_ns": watch.wall[1:],
            "step_cpu_ns": watch.cpu[1:],
            "began_ns": watch.began,
            "wall_ns": time.perf_counter_ns() - watch.began,
        }

    def _encoder(self, prompt: "IntArray") -> Callable[[], object]:
        """A call of an encoder; the state after the last token of every sequence is asked for."""
        ids = np.atleast_2d(prompt)
        mask, last = np.ones_like(ids), np.arange(1, len(ids) + 1, dtype=np.int64) * ids.shape[1] - 1
        return lambda: self.model.logits(ids, mask, last)

    def _call(self, call: Callable[[], object]) -> dict[str, Any]:
        """Calls on one input; the time of one is the mean of the lap."""
        watch = _Stopwatch(*self.drill)
        for _ in range(self.calls):
            call()
        watch.lap()
        return {
            "call_ns": watch.wall[0] // self.calls,
            "call_cpu_ns": watch.cpu[0] // self.calls,
            "calls": self.calls,
            "step_ns": [],
            "began_ns": watch.began,
            "wall_ns": watch.wall[0],
        }


def _most_probable(logits: "FloatArray") -> int:
    return int(logits.argmax())


def _most_probable_each(logits: "FloatArray") -> Any:  # noqa: ANN401 - numpy's argmax along an axis
    return logits.argmax(axis=-1)


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


def _files(request: Mapping[str, Any]) -> list[Path]:
    """Every file that a load reads: those named, or all below the path."""
    named = [Path(p) for p in request.get("files", ())]
    path = Path(request["path"])
    return named or ([path] if path.is_file() else sorted(path.rglob("*")))


def _leave(status: int) -> NoReturn:
    """End at once: all is said, and taking a model apart piece by piece only costs time."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _leave(main())
