"""The timeline of a profile in Chrome's trace format, for https://ui.perfetto.dev or chrome://tracing.

Every measured process with its load, prompts and decode steps; and a process in which the operators of one
prompt and of one step lie inside their call. Processes are laid one after the other: what passed between
them is no part of a profile. Times are microseconds.

Source: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Events = list[dict[str, Any]]


def timeline(processes: Sequence[tuple[str, Mapping[str, Any]]], calls: Sequence[Any] = ()) -> dict[str, Any]:
    """The trace as a JSON object.

    processes: (name, what `devices.client.measure` returned). calls: `exporters.operators.Run`s whose
    operators are shown, from a process of its own.
    """
    named: Events = []
    slices: Events = []
    base = 0.0
    for pid, (name, measured) in enumerate(processes, start=1):
        named += _names(pid, name, "inference")
        made = list(_process(pid, measured, base))
        slices += made
        base = max(e["ts"] + e["dur"] for e in made)
    if calls:
        pid = len(processes) + 1
        named += _names(pid, "operators (with the runtime's profiler on)", "operators")
        for call in calls:
            slices += _operators(pid, call, base)
            base += call.duration
    # A slice comes before those inside of it, which is how a viewer nests them.
    slices.sort(key=lambda e: (e["ts"], -e["dur"]))
    return {"traceEvents": named + slices, "displayTimeUnit": "ms"}


def _names(pid: int, process: str, thread: str) -> Events:
    return [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 1, "args": {"name": process}},
        {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 1, "args": {"sort_index": pid}},
        {"ph": "M", "name": "thread_name", "pid": pid, "tid": 1, "args": {"name": thread}},
    ]


def _slice(pid: int, name: str, kind: str, ts: float, dur: float, **args: object) -> dict[str, Any]:
    times = {"ts": round(ts, 3), "dur": round(dur, 3)}
    return {"ph": "X", "name": name, "cat": kind, "pid": pid, "tid": 1, **times, "args": args}


def _process(pid: int, measured: Mapping[str, Any], base: float) -> Iterator[dict[str, Any]]:
    """Load, then each repetition where the clock says that it began."""
    load = measured["loaded"]["load_ns"] / 1e3
    yield _slice(pid, "load", "load", base, load)
    repetitions = measured["repetitions"]
    origin = repetitions[0]["began_ns"] if repetitions else 0
    for number, each in enumerate(repetitions):
        at = base + load + (each["began_ns"] - origin) / 1e3
        if "call_ns" in each:
            yield _slice(
                pid, "call", "call", at, each["wall_ns"] / 1e3, index=number, calls=each.get("calls", 1)
            )
            continue
        yield _slice(pid, "prefill", "prefill", at, each["ttft_ns"] / 1e3, prompt=number)
        at += each["ttft_ns"] / 1e3
        for step, took in enumerate(each["step_ns"]):
            yield _slice(pid, "decode step", "decode", at, took / 1e3, prompt=number, step=step)
            at += took / 1e3


def _operators(pid: int, call: Any, base: float) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - operators.Run
    names = {"prefill": "prefill", "decode": "decode step"}
    yield _slice(pid, names.get(call.phase, "call"), call.phase, base, call.duration)
    for event in call.events:
        at = base + event.start - call.start
        shapes = [f"{t.type}{list(t.shape)}" for t in event.inputs]
        yield _slice(
            pid,
            event.name or event.operator,
            event.operator,
            at,
            event.duration,
            operator=event.operator,
            provider=event.provider,
            inputs=", ".join(shapes),
        )
