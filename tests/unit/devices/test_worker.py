"""The measuring child: what it runs, what it times, how it dies; and the parent's view of each."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgesft.core import subject
from edgesft.core.artifact import Artifact
from edgesft.core.errors import ArtifactError, DeviceError, UsageError
from edgesft.devices import client, worker

RUNTIME = """
import json, os, signal, sys, time
from pathlib import Path
import numpy as np
from edgesft.core.errors import ArtifactError

class Decoding:
    def __init__(self, how): self.how, self.fed = how, 0
    def prefill(self, ids):
        self.fed += len(ids)
        return self._wait(2 * self.how["step_ms"])
    def step(self, token):
        assert token == self.how["vocabulary"] - 1
        self.fed += 1
        if self.how.get("die_at") == self.fed: os.kill(os.getpid(), signal.SIGKILL)
        if self.how.get("hang_at") == self.fed: time.sleep(60)
        return self._wait(self.how["step_ms"])
    def _wait(self, ms):
        end = time.perf_counter() + ms / 1e3
        while time.perf_counter() < end: pass
        return np.arange(self.how["vocabulary"], dtype=np.float32)

class Model:
    def __init__(self, how):
        self.how, self.kind, self.vocabulary = how, how.get("kind", "decoder"), how["vocabulary"]
    def start(self, capacity): return Decoding(self.how)
    def logits(self, ids, mask, positions): return Decoding(self.how)._wait(self.how["step_ms"])[None]
    def describe(self, sequence, batch): return {"x": {"type": "float32", "shape": [batch, sequence]}}
    def feeds(self, sequence, batch, rng): return rng.standard_normal((batch, sequence))
    def prepare(self, feeds): return lambda: Decoding(self.how)._wait(self.how["step_ms"])

def load(path, *, threads=0):
    how = json.loads((path / "how.json").read_text())
    print("a runtime that chats on stdout")
    if how.get("refuse"): raise ArtifactError("broken weights", "export it again")
    if how.get("raise"): print("the last words", file=sys.stderr); raise RuntimeError("no such kernel")
    if how.get("exit") is not None: os._exit(how["exit"])
    assert threads == int(os.environ["OMP_NUM_THREADS"])
    assert "torch" not in sys.modules and "onnxruntime" not in sys.modules and "scipy" not in sys.modules
    time.sleep(how.get("load_ms", 0) / 1e3)
    model = Model(how)
    model.ballast = np.ones(how.get("megabytes", 0) * 2**17)
    return model
"""
WORKLOAD = {"prompt_tokens": 8, "decode_tokens": 12, "repetitions": 2}


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """make(**how) -> an artefact that the fake runtime loads."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "fake_runtime.py").write_text(RUNTIME)
    monkeypatch.setenv("PYTHONPATH", str(modules))
    monkeypatch.setitem(client.RUNTIMES, "fake", "fake_runtime:load")

    def make(**how):
        folder = tmp_path / f"artefact-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "how.json").write_text(json.dumps({"vocabulary": 16, "step_ms": 0.2, **how}))
        return Artifact(folder, "fake", "sha256:0", folder.name)

    return make


def ask(artifact, **more):
    return client.request(artifact, **{"threads": 1, "workload": WORKLOAD, "seed": [0, 1], **more})


def test_a_decoder_is_loaded_prompted_and_decoded(exported):
    found = client.measure(ask(exported(load_ms=30, megabytes=40), workload={**WORKLOAD, "prefills": 3}), 60)
    assert found["loaded"]["kind"] == "decoder"
    assert found["loaded"]["vocabulary"] == 16
    assert found["loaded"]["load_ns"] >= 30e6
    assert [len(r["step_ns"]) for r in found["repetitions"]] == [12, 12, 0, 0, 0]
    for each in found["repetitions"]:
        assert each["ttft_ns"] >= 0.4e6
        assert all(t >= 0.2e6 for t in each["step_ns"])
        assert 0 <= each["wall_ns"] - sum(each["step_ns"]) - each["ttft_ns"] < 50e6
        assert all(c >= 0 for c in each["step_cpu_ns"])
    memory = found["done"]
    assert 40 * 2**20 <= memory["peak_above_bytes"] <= memory["peak_bytes"]


def test_an_encoder_is_called(exported):
    found = client.measure(ask(exported(kind="encoder")), 60)
    assert [set(r) >= {"call_ns", "call_cpu_ns"} for r in found["repetitions"]] == [True, True]
    samples, _ = client.timings(found["repetitions"], "latency")
    assert len(samples) == 2
    assert min(samples) >= 0.2


@pytest.mark.parametrize(
    ("kind", "metric"), [("decoder", "tpot"), ("encoder", "latency"), ("graph", "latency")]
)
def test_slowdown_waits_inside_what_is_timed(exported, kind, metric):
    how = {"kind": kind, "step_ms": 2.0}
    quick, slow = (client.measure(ask(exported(**how), slowdown=percent), 60) for percent in (0, 50))
    ratio = np.divide(*(min(client.timings(m["repetitions"], metric)[0]) for m in (slow, quick)))
    assert ratio >= 1.45  # more where other work takes the core away meanwhile


def test_moments_of_either_clock_are_put_on_ours():
    ours = time.perf_counter_ns()
    for moment in (time.time_ns(), time.monotonic_ns()):
        assert 0 <= worker._on_our_clock(moment) - ours < 1_000_000_000


def test_short_calls_are_timed_several_at_once(exported):
    work = {**WORKLOAD, "repetitions": 4}
    found = client.measure(ask(exported(kind="graph", step_ms=0.02), workload=work), 60)
    assert found["loaded"]["inputs"] == {"x": {"type": "float32", "shape": [1, 8]}}
    first, *rest = found["repetitions"]
    assert first["calls"] == 1
    assert len({r["calls"] for r in rest}) == 1
    assert 10 <= rest[0]["calls"] <= 60
    assert min(r["wall_ns"] for r in rest) >= 0.5e6
    assert 0.02 <= min(client.timings(rest, "latency")[0]) < 0.06


def test_long_calls_are_timed_one_by_one(exported):
    found = client.measure(ask(exported(kind="graph", step_ms=2.0)), 60)
    assert [r["calls"] for r in found["repetitions"]] == [1, 1]


def test_pauses_come_after_the_repetitions(exported):
    began = time.monotonic()
    found = client.measure(ask(exported(), idle_seconds=[0.3, 0.1]), 60)
    assert time.monotonic() - began >= 0.4
    assert [(e["seconds"], len(e["step_ns"])) for e in found["idle"]] == [(0.3, 12), (0.1, 12)]
    assert all(e["ttft_ns"] >= 0.4e6 for e in found["idle"])
    assert len(found["repetitions"]) == 2


def test_pauses_do_not_count_as_hanging(exported):
    with pytest.raises(client.WorkerLost, match="no answer within 2 s"):
        client.measure(ask(exported(hang_at=10), idle_seconds=[0.5, 0.5]), 1)


def test_refusal_of_the_artefact_comes_back_as_it_was(exported):
    with pytest.raises(ArtifactError) as caught:
        client.measure(ask(exported(refuse=True)), 60)
    assert caught.value.message == "broken weights"
    assert caught.value.hint == "export it again"


def test_a_failing_runtime_is_a_device_error_with_its_last_words(exported):
    with pytest.raises(client.WorkerFailed, match="RuntimeError: no such kernel") as caught:
        client.measure(ask(exported(**{"raise": True})), 60)
    assert "the last words" in caught.value.message
    assert caught.value.exit_code == 4


def test_a_silent_death_is_a_failure(exported):
    with pytest.raises(client.WorkerFailed, match="status 7"):
        client.measure(ask(exported(exit=7)), 60)


def test_a_killed_child_is_lost(exported):
    with pytest.raises(client.WorkerLost, match="SIGKILL"):
        client.measure(ask(exported(die_at=10)), 60)


def test_a_hanging_child_is_lost_and_ended(exported):
    began = time.monotonic()
    with pytest.raises(client.WorkerLost, match="no answer within 3 s"):
        client.measure(ask(exported(hang_at=10)), 3)
    assert time.monotonic() - began < 20


def test_artefacts_of_other_kinds_have_no_runtime():
    with pytest.raises(DeviceError, match="`delta`"):
        client.runtime_of("delta")


def test_engines_are_known_but_not_run(monkeypatch, tmp_path):
    engine = Artifact(tmp_path / "x.engine", "engine", "sha256:0", "x.engine")
    with pytest.raises(DeviceError, match="need TensorRT and an NVIDIA GPU") as caught:
        ask(engine)
    assert caught.value.hint == "edgesft doctor"
    monkeypatch.setattr(client.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(DeviceError, match="does not run TensorRT engines"):
        ask(engine)


def test_options_that_do_not_fit_the_kind_are_refused(tmp_path):
    model = Artifact(tmp_path, "model", "sha256:0", "some-model")
    with pytest.raises(UsageError, match="`some-model` is run by torch"):
        ask(model, operators=tmp_path / "raw.json")
    with pytest.raises(UsageError, match="shapes are for foreign graphs"):
        ask(model, shapes={"x": [1]})
    assert "shapes" not in ask(model, shapes=None)


def test_only_the_named_files_are_read(tmp_path):
    for name in ("model.onnx", "model.data", "other.onnx"):
        (tmp_path / name).write_bytes(b"x")
    graph = subject.Graph(
        tmp_path / "model.onnx", "graph", "", "", files=(tmp_path / "model.onnx", tmp_path / "model.data")
    )
    assert {p.name for p in worker._files(ask(graph))} == {"model.onnx", "model.data"}
    folder = Artifact(tmp_path, "onnx", "", "")
    assert {p.name for p in worker._files(ask(folder))} == {"model.onnx", "model.data", "other.onnx"}
    assert worker._files({"path": str(tmp_path / "other.onnx")}) == [tmp_path / "other.onnx"]


class Batches:
    """A decoder of batches: the most probable token of row b after t steps is b + t."""

    kind, vocabulary = "decoder", 40

    def __init__(self):
        self.fed = []

    def start(self, capacity, batch):
        self.fed.append([])
        self.capacity, self.batch = capacity, batch
        return self

    def prefill(self, ids):
        self.fed[-1].append(ids)
        return np.eye(40)[np.arange(self.batch) + len(self.fed[-1])]

    step = prefill


def test_a_batch_is_decoded_row_by_row(monkeypatch, tmp_path):
    made = Batches()
    monkeypatch.setitem(sys.modules, "batches", type("M", (), {"load": lambda path, threads: made}))
    request = {"path": str(tmp_path), "runtime": "batches:load", "threads": 1, "seed": [0]}
    events = list(worker.measure({**request, "workload": {**WORKLOAD, "batch": 3}}))
    assert [len(e["step_ns"]) for e in events if e["event"] == "repetition"] == [12, 12]
    assert made.capacity == 8 + 12 + 1
    prompt, *steps = made.fed[0]
    assert prompt.shape == (3, 8)
    assert len({row.tobytes() for row in prompt}) == 3
    assert [s.tolist() for s in steps] == [[t, t + 1, t + 2] for t in range(1, 13)]


def model(vocabulary=50):
    return type("Model", (), {"vocabulary": vocabulary})()


def test_prompts_differ_between_repetitions_and_processes_but_not_between_sides():
    work = {"prompt_tokens": 64}
    prompts = [worker._prompt(model(), work, [0, pair], index) for pair in (1, 2) for index in (0, 1)]
    assert len({p.tobytes() for p in prompts}) == 4
    assert all(p.min() >= 0 and p.max() < 50 for p in prompts)
    assert (worker._prompt(model(), work, [0, 1], 0) == prompts[0]).all()


def repetition(steps, first=10_000_000):
    return {"ttft_ns": first, "step_ns": steps}


def test_clock_that_goes_back_is_refused():
    with pytest.raises(DeviceError, match="went back"):
        worker.check_clock([repetition([5_000_000, -3, 5_000_000])])


def test_suspended_machine_is_refused():
    with pytest.raises(DeviceError, match="suspended"):
        worker.check_clock([repetition([8_000_000] * 20 + [30_000_000_000])])
    with pytest.raises(DeviceError, match=r"suspended for 2\.0 s"):
        worker.check_clock([repetition([8_000_000] * 20)], suspended_ns=2_000_000_000)


def test_scheduling_is_no_suspension_and_slow_models_are_allowed():
    worker.check_clock([repetition([8_000_000] * 20 + [400_000_000])])
    worker.check_clock([repetition([3_000_000_000] * 5, first=40_000_000_000)])


def test_a_patched_clock_is_noticed_end_to_end(monkeypatch, tmp_path):
    class Runs:
        kind, vocabulary = "decoder", 4

        def start(self, capacity):
            return type("D", (), {"prefill": lambda s, i: np.zeros(4), "step": lambda s, t: np.zeros(4)})()

    monkeypatch.setitem(sys.modules, "patched_runtime", type("M", (), {"load": lambda path, threads: Runs()}))
    ticks = iter(range(10_000_000, 0, -1000))
    monkeypatch.setattr(worker.time, "perf_counter_ns", lambda: next(ticks))
    request = {"path": str(tmp_path), "runtime": "patched_runtime:load", "threads": 1, "seed": [0]}
    with pytest.raises(DeviceError, match="went back"):
        list(worker.measure({**request, "workload": WORKLOAD}))


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_the_drill_waits_by_the_clock_that_decides(clock):
    read = time.perf_counter_ns if clock == "wall" else time.thread_time_ns
    plain, slowed = worker._Stopwatch(0.0, clock), worker._Stopwatch(0.5, clock)
    for watch in (plain, slowed):
        watch.lap()
        for _ in range(5):
            end = read() + 5_000_000
            while read() < end:
                pass
            watch.lap()
    times = {w: (w.wall if clock == "wall" else w.cpu)[1:] for w in (plain, slowed)}
    assert min(times[slowed]) >= 7_400_000
    assert clock == "wall" or min(times[plain]) <= 6_500_000  # of wall time, other work may take any share


def test_laps_leave_nothing_out():
    watch = worker._Stopwatch(0.0, "wall")
    began = time.perf_counter_ns()
    for _ in range(100):
        watch.lap()
    assert sum(watch.wall) >= 0.98 * (time.perf_counter_ns() - began - 200_000)


class Instant:
    """A decoder that takes no time."""

    kind, vocabulary = "decoder", 4

    def start(self, capacity):
        return self

    def prefill(self, ids):
        return np.zeros(4)

    def step(self, token):
        return np.zeros(4)


@pytest.mark.parametrize(
    ("until", "unsettled", "count"), [(True, True, 4), (True, False, 2), (False, True, 2)]
)
def test_unsettled_runs_are_doubled_once(monkeypatch, tmp_path, until, unsettled, count):
    monkeypatch.setitem(sys.modules, "instant", type("M", (), {"load": lambda path, threads: Instant()}))
    monkeypatch.setattr(worker, "_unsettled", lambda done, clock: unsettled)
    request = {"path": str(tmp_path), "runtime": "instant:load", "threads": 1, "seed": [0]}
    events = list(worker.measure({**request, "workload": WORKLOAD, "until_steady": until}))
    assert [e["event"] for e in events] == ["loaded", *["repetition"] * count, "done"]


def test_a_run_is_unsettled_while_it_still_gets_faster():
    rng = np.random.default_rng(0)
    flat = [(8e6 * np.exp(0.01 * rng.standard_normal(64))).tolist() for _ in range(4)]
    falling = [(np.array(steps) * scale).tolist() for steps, scale in zip(flat, (4, 3, 2, 1), strict=True)]
    assert not worker._unsettled([repetition(steps) for steps in flat])
    assert worker._unsettled([repetition(steps) for steps in falling])


def test_about_reads_what_made_the_artefact(tmp_path):
    (tmp_path / "export.json").write_text(json.dumps({"quantize": "int4"}))
    artifact = Artifact(tmp_path, "onnx", "sha256:0", "x", {"metrics": {"pattern": "2:4"}, "params": {}})
    found = client.about(artifact)
    assert (found["quantize"], found["pattern"], found["density"]) == ("int4", "2:4", 0.5)
    bare = client.about(Artifact(Path("/nonexistent"), "model", "sha256:0", "x"))
    assert bare["quantize"] is None
    assert bare["density"] is None


def test_timings_take_the_clock_that_is_asked_for():
    reps = [{"ttft_ns": 4e6, "ttft_cpu_ns": 3e6, "step_ns": [2e6, 2e6], "step_cpu_ns": [1e6, 1e6]}]
    assert client.timings(reps, "tpot")[0] == [2, 2]
    assert client.timings(reps, "tpot", "cpu")[0] == [1, 1]
    assert client.timings(reps, "ttft", "cpu")[0] == [3]
