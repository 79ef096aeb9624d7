"""The gate: verdicts, exit codes, what makes it refuse, and resuming by pair."""

import json
import math

import numpy as np
import pytest

from edgesft.core.artifact import Artifact
from edgesft.core.catalog import runtime
from edgesft.core.errors import ArtifactError, EdgeSFTError, UsageError
from edgesft.core.stage import execute
from edgesft.stages import gate as gating
from edgesft.stages.gate import Gate

client, host = runtime("devices.client"), runtime("devices.host")


class Machine:
    """Stands for the worker: 2 % noise, head slower by `slowdown`, more and less of it by `swing` in turn."""

    def __init__(self, slowdown=0.0):
        self.slowdown, self.calls, self.peaks = slowdown, [], {"base": 1_000_000, "head": 1_000_000}
        self.kinds, self.vocabularies = dict.fromkeys(self.peaks, "decoder"), dict.fromkeys(self.peaks, 100)
        self.ramp = self.swing = self.waiting = 0.0
        self.fails = lambda role, pair: None

    def measure(self, request, timeout):
        role, (_, number) = request["path"].rsplit("/", 1)[-1], request["seed"]
        self.calls.append((role, number - 1))
        error = self.fails(role, number - 1)
        if error is not None:
            raise error
        rng = np.random.default_rng([len(self.calls), number])
        level = 8e6 * math.exp(0.02 * rng.standard_normal()) * (1 + request["slowdown"] / 100)
        if role == "head":
            level *= (1 + self.slowdown) * math.exp(self.swing * (-1) ** number)
        work, wait = request["workload"], 1 + self.waiting * (role == "head")
        reps = []
        for index in range(work["repetitions"]):
            steps = level * np.exp(0.01 * rng.standard_normal(work["decode_tokens"] + 1) - self.ramp * index)
            ns = steps.astype(int).tolist()
            rep = {"ttft_ns": 5 * ns[0], "ttft_cpu_ns": 5 * ns[0], "step_cpu_ns": ns[1:]}
            rep["step_ns"] = [int(t * wait) for t in ns[1:]]
            if self.kinds[role] == "encoder":
                rep = {"call_ns": ns[0], "call_cpu_ns": ns[0], "step_ns": []}
            reps.append(rep)
        return {
            "loaded": {"load_ns": 10**8, "kind": self.kinds[role], "vocabulary": self.vocabularies[role]},
            "repetitions": reps,
            "done": {"peak_bytes": self.peaks[role]},
            "wall_s": 1.0,
        }


@pytest.fixture
def machine(monkeypatch):
    found = Machine()
    monkeypatch.setattr(client, "measure", found.measure)
    monkeypatch.setattr(host, "telemetry", lambda: {"seconds": 0.0})
    return found


@pytest.fixture
def sides(tmp_path):
    made = {}
    for role in ("base", "head"):
        folder = tmp_path / role
        folder.mkdir()
        (folder / "model.onnx").write_bytes(b"x" * 1000)
        made[role] = Artifact(folder, "onnx", f"sha256:{role}", role)
    return made


def code(report, inconclusive=None):
    """Exit code that the report leads to."""
    try:
        gating.judge(report, inconclusive)
    except EdgeSFTError as error:
        return error.exit_code
    return 0


def test_the_same_speed_passes(machine, sides):
    report = Gate().measure(sides)
    assert report["verdict"] == "pass"
    assert report["pairs"] in (8, 12, 16)
    assert report["interval"][0] <= 1.0 <= report["interval"][1] < 1.05
    assert code(report) == 0
    assert report["schema"] == 1
    assert [m["metric"] for m in report["metrics"]] == ["tpot", "tpot", "peak_memory", "size"]
    assert [m.get("clock") for m in report["metrics"]] == ["cpu", "wall", None, None]
    assert len(report["raw"]) == report["pairs"] + len(report["discarded"])
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize("how", ["slower", "drill"])
def test_a_fifth_slower_fails_with_exit_code_10(machine, sides, how):
    machine.slowdown = 0.2 if how == "slower" else 0.0
    report = Gate(drill_slowdown=20 if how == "drill" else 0).measure(sides)
    assert report["verdict"] == "fail"
    assert report["pairs"] == 12
    assert report["ratio"] == pytest.approx(1.2, abs=0.02)
    assert code(report) == 10
    assert report["looks"][0]["n"] == 8
    assert report["looks"][-1]["p_regression"] <= 0.01 / 6 / 2


def test_waiting_is_seen_by_the_wall_though_not_by_processor_time(machine, sides):
    machine.waiting = 0.2
    report = Gate().measure(sides)
    assert (report["verdict"], report["decided_by"]) == ("fail", "wall")
    assert report["ratio"] == pytest.approx(1.2, abs=0.03)
    assert report["metrics"][0]["ratio"] == pytest.approx(1.0, abs=0.03)
    assert Gate(clock="cpu").measure(sides)["verdict"] == "pass"
    alone = Gate(clock="wall").measure(sides)
    assert alone["verdict"] == "fail"
    assert [m.get("clock") for m in alone["metrics"]] == ["wall", None, None]


def test_faster_passes(machine, sides):
    machine.slowdown = -0.3
    assert Gate().measure(sides)["verdict"] == "pass"


def test_too_much_noise_leaves_it_open_and_the_policy_decides(machine, sides):
    machine.swing = 0.1
    report = Gate(max_pairs=8).measure(sides)
    assert report["verdict"] == "inconclusive"
    assert report["pairs"] == 8
    assert [code(report, policy) for policy in (None, "report", "fail", "pass")] == [11, 11, 10, 0]
    assert Gate(max_pairs=8, inconclusive="fail").measure(sides)["inconclusive"] == "fail"


def test_order_is_random_fixed_by_the_seed_and_both_sides_get_the_same_prompts(machine, sides):
    firsts = [[p["first"] for p in Gate(seed=seed).measure(sides)["raw"][:8]] for seed in (0, 0, 1)]
    assert firsts[0] == firsts[1]
    assert set(firsts[0]) == {"base", "head"} or set(firsts[2]) == {"base", "head"}
    pairs = [number for _, number in machine.calls if number >= 0]
    assert pairs[0::2] == pairs[1::2]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda m, s: m.vocabularies.update(head=50), "vocabulary"),
        (lambda m, s: m.kinds.update(head="encoder"), "kind"),
        (lambda m, s: s.update(head=Artifact(s["head"].path, "model", "sha256:h", "h")), "kind"),
    ],
)
def test_what_is_not_two_versions_of_one_thing_is_not_comparable(machine, sides, change, word):
    change(machine, sides)
    report = Gate().measure(sides)
    assert report["verdict"] == "not_comparable"
    assert word in report["error"]
    assert code(report) == 12


def test_another_precision_is_compared_and_recorded(machine, sides):
    for role, quantize in (("base", "none"), ("head", "int4")):
        (sides[role].path / "export.json").write_text(json.dumps({"quantize": quantize}))
    report = Gate().measure(sides)
    assert (report["base"]["quantize"], report["head"]["quantize"]) == ("none", "int4")


def test_a_side_that_never_runs_is_nothing_measured_never_a_regression(machine, sides):
    machine.fails = lambda role, pair: client.WorkerFailed("no such kernel") if role == "head" else None
    report = Gate().measure(sides)
    assert report["verdict"] == "nothing_measured"
    assert [r for r, _ in machine.calls].count("head") == 3
    assert report["ratio"] is None
    assert code(report) == 13


def test_a_failure_that_passes_is_tried_again(machine, sides):
    left = [2]

    def fails(role, pair):
        if pair == 3 and left[0]:
            left[0] -= 1
            return client.WorkerFailed("for once")
        return None

    machine.fails = fails
    assert Gate().measure(sides)["verdict"] == "pass"


def test_a_lost_device_keeps_what_was_measured_and_goes_on_by_pair(machine, sides, tmp_path):
    out = tmp_path / "out"
    machine.fails = lambda role, pair: client.WorkerLost("killed by `SIGKILL`") if pair == 5 else None
    with pytest.raises(EdgeSFTError) as caught:
        execute(Gate(), sides, out)
    assert caught.value.exit_code == 14
    assert caught.value.report["verdict"] == "device_lost"
    assert len(caught.value.report["raw"]) == 5
    kept = out / ".partial" / "checkpoint" / "pairs.jsonl"
    before = kept.read_text()
    kept.write_text(before + '{"pair": 5, "rat')  # a kill in the middle of a line
    machine.fails = lambda role, pair: None
    machine.calls.clear()
    made, _ = execute(Gate(), sides, out)
    assert min(number for _, number in machine.calls if number >= 0) == 5
    report = gating.load(made)
    assert "".join(json.dumps(p) + "\n" for p in report["raw"][:5]) == before
    assert [p["pair"] for p in report["raw"]] == list(range(len(report["raw"])))
    assert made.metrics["verdict"] == report["verdict"] == "pass"
    assert "raw" not in made.metrics
    assert len((out / "metrics.jsonl").read_text().splitlines()) == len(report["raw"])


def test_resuming_gives_the_order_of_an_unbroken_run(machine, sides, tmp_path):
    whole = [p["first"] for p in Gate(seed=3).measure(sides)["raw"]]
    machine.fails = lambda role, pair: client.WorkerLost("gone") if pair == 4 else None
    with pytest.raises(EdgeSFTError):
        execute(Gate(seed=3), sides, tmp_path / "out")
    machine.fails = lambda role, pair: None
    broken = [p["first"] for p in gating.load(execute(Gate(seed=3), sides, tmp_path / "out")[0])["raw"]]
    assert whole[: len(broken)] == broken[: len(whole)]


def test_a_throttled_pair_is_measured_again_within_the_cap(machine, sides, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(host, "telemetry", lambda: {"seconds": float(next(clock))})
    seen = []

    def held_back(before, after):
        seen.append(before)
        return "the processor throttled for heat" if len(seen) in (2, 5) else None

    monkeypatch.setattr(host, "held_back", held_back)
    report = Gate().measure(sides)
    assert [d["pair"] for d in report["discarded"]] == [1, 4]
    assert report["pairs"] == len(report["raw"]) - 2
    monkeypatch.setattr(host, "held_back", lambda before, after: "the processor throttled for heat")
    report = Gate(max_pairs=8).measure(sides)
    assert len(report["discarded"]) == 2  # a fifth of the pairs; the rest counts, or it would never end
    assert report["pairs"] == 8


def test_pairs_without_a_steady_state_are_discarded_within_the_cap(machine, sides):
    machine.ramp = 0.4
    report = Gate(max_pairs=8, repetitions=4).measure(sides)
    assert "no steady state" in report["discarded"][0]["why"]
    assert len(report["discarded"]) == 2


@pytest.mark.parametrize(("asked", "exit_code"), [(False, 0), (True, 10)])
def test_memory_blocks_only_if_asked(machine, sides, asked, exit_code):
    machine.peaks["head"] = 1_030_000
    report = Gate(check_memory=asked).measure(sides)
    memory = next(m for m in report["metrics"] if m["metric"] == "peak_memory")
    assert (memory["verdict"], memory["blocking"]) == ("fail", asked)
    assert code(report) == exit_code


def test_size_blocks_only_if_asked(machine, sides):
    (sides["head"].path / "more.bin").write_bytes(b"x" * 21)
    assert code(Gate().measure(sides)) == 0
    assert code(Gate(check_size=True).measure(sides)) == 10
    (sides["head"].path / "more.bin").write_bytes(b"x" * 19)
    assert code(Gate(check_size=True).measure(sides)) == 0


def test_time_to_first_token_has_prompts_of_its_own(machine, sides):
    report = Gate(metric="ttft").measure(sides)
    assert report["metric"] == "ttft"
    assert report["workload"]["decode_tokens"] == 0
    assert len(report["raw"][0]["base"]["samples_ms"]["wall"]) >= 8
    assert report["metrics"][0]["base_ms"] == pytest.approx(40, rel=0.1)


def test_encoders_are_compared_by_call(machine, sides):
    machine.kinds = dict.fromkeys(machine.kinds, "encoder")
    report = Gate().measure(sides)
    assert report["metric"] == "latency"
    assert len(report["raw"][0]["base"]["samples_ms"]["cpu"]) >= 64


@pytest.mark.parametrize(
    "values", [{"tolerance_percent": 5}, {"max_pairs": 4}, {"metric": "tokens"}, {"margn": 1}]
)
def test_bad_options_are_usage_errors(values):
    with pytest.raises(UsageError, match=next(iter(values))):
        Gate.from_recipe(values)


def test_how_an_open_verdict_counts_is_not_part_of_the_request():
    assert Gate(inconclusive="fail").params() == Gate().params()
    assert Gate(drill_slowdown=20).params() != Gate().params()


def test_a_verdict_of_a_newer_schema_is_refused(tmp_path):
    (tmp_path / "verdict.json").write_text('{"schema": 2}')
    with pytest.raises(ArtifactError, match="schema 1"):
        gating.load(Artifact(tmp_path, "verdict", "sha256:0", "v"))


def test_gate_takes_folders_and_refuses_what_is_none(tmp_path):
    with pytest.raises(EdgeSFTError) as caught:
        gating.gate(tmp_path / "nowhere", tmp_path / "nowhere")
    assert caught.value.exit_code == 3
