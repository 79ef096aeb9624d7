"""The timeline: valid for a viewer, in order, nested, and as long as what was measured."""

import json
from dataclasses import dataclass, field
from typing import Any

from edgesft.stages.profiling.trace import timeline


def process(prompts=2, steps=3, kind="decoder"):
    """2 ms to load; prompts of 10 ms and steps of 5 ms, 1 ms between repetitions."""
    repetitions = []
    clock = 10**15
    for _ in range(prompts):
        if kind == "decoder":
            wall = 10_000_000 + steps * 5_000_000
            repetitions.append({"ttft_ns": 10_000_000, "step_ns": [5_000_000] * steps})
        else:
            wall = 20_000_000
            repetitions.append({"call_ns": 4_000_000, "step_ns": [], "calls": 5})
        repetitions[-1] |= {"began_ns": clock, "wall_ns": wall}
        clock += wall + 1_000_000
    return {"loaded": {"load_ns": 2_000_000}, "repetitions": repetitions}


@dataclass
class Event:
    name: str
    operator: str
    start: int
    duration: int
    provider: str = "CPU"
    inputs: tuple[Any, ...] = ()


@dataclass
class Run:
    phase: str
    start: int
    duration: int
    events: list[Event] = field(default_factory=list)


def slices(trace):
    return [e for e in trace["traceEvents"] if e["ph"] == "X"]


def check(trace):
    """What https://ui.perfetto.dev asks of a file: known phases, numbers, order, slices that nest."""
    events = json.loads(json.dumps(trace))["traceEvents"]
    assert {e["ph"] for e in events} == {"X", "M"}
    stacks: dict[tuple[int, int], list[dict[str, Any]]] = {}
    last = -1.0
    for event in (e for e in events if e["ph"] == "X"):
        assert event["ts"] >= last
        assert event["dur"] >= 0
        last = event["ts"]
        stack = stacks.setdefault((event["pid"], event["tid"]), [])
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
            stack.pop()
        if stack:
            assert event["ts"] + event["dur"] <= stack[-1]["ts"] + stack[-1]["dur"], (
                "overlaps and is not inside"
            )
        stack.append(event)
    named = {e["pid"] for e in events if e["name"] == "process_name"}
    assert {e["pid"] for e in events} == named


def test_load_prompts_and_steps_follow_each_other():
    trace = timeline([("process 1", process())])
    check(trace)
    found = slices(trace)
    assert [e["name"] for e in found] == ["load", *(["prefill", *["decode step"] * 3] * 2)]
    assert [e["ts"] for e in found[:4]] == [0, 2000, 12000, 17000]
    assert found[5]["ts"] == 2000 + 25000 + 1000  # the pause between repetitions shows
    assert found[6]["args"] == {"prompt": 1, "step": 0}


def test_processes_are_named_and_laid_one_after_the_other():
    cold = process(prompts=0)
    trace = timeline([("cold load", cold), ("process 1", process())])
    check(trace)
    names = [e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"]
    assert names == ["cold load", "process 1"]
    first = [e for e in slices(trace) if e["pid"] == 1]
    second = [e for e in slices(trace) if e["pid"] == 2]
    assert second[0]["ts"] == first[-1]["ts"] + first[-1]["dur"] == 2000


def test_calls_of_what_is_no_decoder():
    trace = timeline([("process 1", process(kind="graph"))])
    check(trace)
    calls = [e for e in slices(trace) if e["name"] == "call"]
    assert [e["dur"] for e in calls] == [20000, 20000]
    assert calls[0]["args"]["calls"] == 5


def test_operators_lie_inside_their_step():
    inner = Event("branch.add", "Add", 110, 20)
    events = [Event("a", "MatMul", 5, 60), Event("", "If", 100, 50), inner]
    runs = [Run("prefill", 0, 400, [Event("a", "MatMul", 1, 300)]), Run("decode", 1000, 200, [])]
    runs[1].events = [Event(e.name, e.operator, e.start + 1000, e.duration) for e in events]
    trace = timeline([("process 1", process())], runs)
    check(trace)
    found = [e for e in slices(trace) if e["pid"] == 2]
    assert [e["name"] for e in found] == ["prefill", "a", "decode step", "a", "If", "branch.add"]
    step = found[2]
    assert found[3]["ts"] == step["ts"] + 5
    assert found[5]["args"]["operator"] == "Add"
    base = max(e["ts"] + e["dur"] for e in slices(trace) if e["pid"] == 1)
    assert found[0]["ts"] == base
    assert step["ts"] == base + 400
