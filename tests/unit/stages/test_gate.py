"""The gate: verdicts, exit codes, what makes it refuse, and resuming by pair."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from edgesft.core import calibrations
from edgesft.core.artifact import Artifact
from edgesft.core.catalog import runtime
from edgesft.core.errors import ArtifactError, EdgeSFTError, UsageError
from edgesft.core.stage import execute
from edgesft.stages import gate as gating
from edgesft.stages import profile
from edgesft.stages.gate import Gate

client, host = runtime("devices.client"), runtime("devices.host")


class Machine:
    """Stands for the worker: 2 % noise, head slower by `slowdown`, more and less of it by `swing` in turn."""

    def __init__(self, slowdown=0.0):
        self.slowdown, self.calls, self.peaks = slowdown, [], {"base": 1_000_000, "head": 1_000_000}
        self.kinds, self.vocabularies = dict.fromkeys(self.peaks, "decoder"), dict.fromkeys(self.peaks, 100)
        self.ramp = self.swing = self.waiting = self.prefill = self.spikes = 0.0
        self.slept = 1.0
        self.fails = lambda role, pair: None

    def measure(self, request, timeout):
        number = request["seed"][1]
        role = next(r for r in self.peaks if r in Path(request["path"]).parts[-2:])
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
        for index in range(work["repetitions"] + work.get("prefills", 0)):
            count = work["decode_tokens"] if index < work["repetitions"] else 0
            steps = level * np.exp(0.01 * rng.standard_normal(count + 1) - self.ramp * index)
            if role == "head":
                steps[9::10] *= 1 + self.spikes
            ns = steps.astype(int).tolist()
            first = int(5 * ns[0] * (1 + self.prefill * (role == "head")))
            rep = {"ttft_ns": first, "ttft_cpu_ns": first, "step_cpu_ns": ns[1:], "wall_ns": sum(ns)}
            rep["step_ns"] = [int(t * wait) for t in ns[1:]]
            if self.kinds[role] != "decoder":
                rep = {"call_ns": ns[0], "call_cpu_ns": int(self.slept * ns[0]), "step_ns": []}
                rep["wall_ns"] = ns[0]
            reps.append(rep)
        return {
            "loaded": {"load_ns": 10**8, "kind": self.kinds[role], "vocabulary": self.vocabularies[role]},
            "repetitions": reps,
            "done": {"peak_bytes": self.peaks[role]},
            "wall_s": 1.0,
        }


@pytest.fixture
def machine(monkeypatch, tmp_path):
    found = Machine()
    monkeypatch.setenv("EDGESFT_CALIBRATIONS", str(tmp_path / "calibrations"))
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
    assert report["schema"] == 2
    names = ["tpot", "tpot", "tpot_p95", "tpot_p95", "peak_memory", "size"]
    assert [m["metric"] for m in report["metrics"]] == names
    assert [m.get("clock") for m in report["metrics"]] == ["cpu", "wall", "cpu", "wall", None, None]
    assert [m["blocking"] for m in report["metrics"]] == [True, True, False, False, True, True]
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
    assert [m.get("clock") for m in alone["metrics"]] == ["wall", "wall", None, None]


def test_faster_passes_and_is_counted(machine, sides):
    machine.slowdown = -0.3
    report = Gate().measure(sides)
    assert report["verdict"] == "pass"
    assert report["metrics"][0]["faster"]
    assert "head is faster: tpot, tpot_p95" in gating.lines(report)
    machine.slowdown = 0.0
    assert not Gate().measure(sides)["metrics"][0]["faster"]


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


def test_a_pair_of_which_a_process_failed_is_measured_again(machine, sides):
    text = "the monotonic clock went back by 5 ns during a measurement\n  | more"
    machine.fails = lambda role, pair: client.WorkerFailed(text) if pair == 3 else None
    report = Gate().measure(sides)
    assert report["verdict"] == "pass"
    whys = {d["pair"]: d["why"] for d in report["discarded"]}
    assert whys[3].endswith("failed: " + text.splitlines()[0])
    assert report["raw"][3]["base"] is None
    assert len(report["raw"]) == report["pairs"] + len(whys)


@pytest.mark.parametrize(("first", "exit_code"), [(0, 13), (4, 14)])
def test_failures_beyond_the_cap_end_the_gate(machine, sides, first, exit_code):
    machine.fails = lambda role, pair: client.WorkerFailed("clock") if pair >= first else None
    report = Gate().measure(sides)
    assert code(report) == exit_code
    assert [d["pair"] for d in report["discarded"] if "failed" in d["why"]] == [first, first + 1]
    assert len(report["raw"]) == first + 2
    assert "clock" in report["error"]


def test_no_samples_are_nothing_measured(machine, sides, monkeypatch):
    plain = machine.measure

    def empty(request, timeout):
        found = plain(request, timeout)
        if request["seed"][1] > 0:
            found["repetitions"] = []
        return found

    monkeypatch.setattr(client, "measure", empty)
    report = Gate().measure(sides)
    assert code(report) == 13
    assert "no time of `tpot`" in report["error"]


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
def test_memory_blocks_unless_told_otherwise(machine, sides, asked, exit_code):
    machine.peaks["head"] = 1_030_000
    report = Gate(check_memory=asked).measure(sides)
    memory = next(m for m in report["metrics"] if m["metric"] == "peak_memory")
    assert (memory["verdict"], memory["blocking"], "note" in memory) == ("fail", asked, not asked)
    assert code(report) == exit_code
    assert report["metric"] == ("peak_memory" if asked else "tpot")
    if asked:
        assert report["decided_by"] == "exact"
        assert report["metrics"][0]["verdict"] == "pass"  # the latency is decided all the same
        assert "peak_memory of head is 1.030 times" in gating.describe(report)


def test_size_blocks_unless_told_otherwise(machine, sides):
    (sides["head"].path / "more.bin").write_bytes(b"x" * 21)
    assert code(Gate(check_size=False).measure(sides)) == 0
    assert code(Gate().measure(sides)) == 10
    (sides["head"].path / "more.bin").write_bytes(b"x" * 19)
    assert code(Gate().measure(sides)) == 0


def test_time_to_first_token_has_prompts_of_its_own(machine, sides):
    report = Gate.from_recipe({"metric": "ttft"}).measure(sides)
    assert report["metric"] == "ttft"
    assert report["workload"]["decode_tokens"] == 0
    assert len(report["raw"][0]["base"]["samples_ms"]["ttft"]["wall"]) >= 8
    assert report["metrics"][0]["base_ms"] == pytest.approx(40, rel=0.1)


def test_several_metrics_are_decided_by_the_same_processes(machine, sides):
    report = Gate(metrics=("tpot", "ttft")).measure(sides)
    assert report["verdict"] == "pass"
    assert report["errors"]["metrics"] == 2
    assert report["workload"]["prefills"] == 6
    side = report["raw"][0]["base"]
    assert len(side["samples_ms"]["ttft"]["cpu"]) == 8
    assert len(side["samples_ms"]["tpot"]["cpu"]) == 64
    assert set(side["value"]) == {"tpot", "ttft", "tpot_p95", "ttft_p95"}
    assert report["level"] > Gate().measure(sides)["level"]
    machine.prefill = 0.2
    report = Gate(metrics=("tpot", "ttft")).measure(sides)
    assert (report["verdict"], report["metric"]) == ("fail", "ttft")
    assert next(m for m in report["metrics"] if m["metric"] == "tpot")["verdict"] == "pass"
    assert report["ratio"] == pytest.approx(1.2, abs=0.03)


def test_the_tail_is_reported_and_decides_where_asked(machine, sides):
    machine.spikes = 0.5
    report = Gate().measure(sides)
    assert report["verdict"] == "pass"
    tail = next(m for m in report["metrics"] if m["metric"] == "tpot_p95")
    assert tail["ratio"] > 1.3
    assert (tail["margin"], tail["blocking"], tail["note"]) == (0.1, False, "reported only")
    report = Gate(check_tail=True).measure(sides)
    assert (report["verdict"], report["metric"]) == ("fail", "tpot_p95")
    machine.spikes = 0.0
    report = Gate(check_tail=True).measure(sides)
    assert report["verdict"] == "pass"
    assert report["errors"]["metrics"] == 2


def test_only_filters_what_is_looked_at(machine, sides):
    machine.peaks["head"] = 2_000_000
    report = Gate(only=("tpot*",)).measure(sides)
    assert {m["metric"] for m in report["metrics"]} == {"tpot", "tpot_p95"}
    assert report["verdict"] == "pass"
    assert code(Gate(only=("peak_memory",), check_memory=False).measure(sides)) == 10  # alone it decides
    machine.calls.clear()
    report = Gate(only=("size",)).measure(sides)
    assert (report["verdict"], report["pairs"], report["metric"]) == ("pass", 0, "size")
    assert len(machine.calls) == 2
    assert gating.describe(report).startswith("pass: size")


def test_a_filter_without_a_match_is_nothing_measured(machine, sides):
    report = Gate(only=("tpot", "tokens*")).measure(sides)
    assert code(report) == 13
    assert "`tokens*`" in report["error"]
    assert "tpot_p95, peak_memory, size" in report["error"]


def test_encoders_are_compared_by_call(machine, sides):
    machine.kinds = dict.fromkeys(machine.kinds, "encoder")
    report = Gate().measure(sides)
    assert report["metric"] == "latency"
    assert len(report["raw"][0]["base"]["samples_ms"]["latency"]["cpu"]) >= 64


@pytest.mark.parametrize(("level", "calls"), [(1e6, 300), (1e4, 4000), (1e8, 64)])
def test_short_calls_are_repeated_until_a_process_has_something_to_say(
    machine, sides, monkeypatch, level, calls
):
    machine.kinds = dict.fromkeys(machine.kinds, "graph")
    plain = machine.measure

    def scaled(request, timeout):
        found = plain(request, timeout)
        for rep in found["repetitions"]:
            for name in ("call_ns", "call_cpu_ns", "wall_ns"):
                rep[name] = int(rep[name] * level / 8e6)
        return found

    monkeypatch.setattr(client, "measure", scaled)
    report = Gate(max_pairs=8).measure(sides)
    assert report["workload"]["repetitions"] == pytest.approx(calls, rel=0.15)
    assert report["raw"][0]["base"]["value"]["latency"]["wall"] == pytest.approx(level / 1e6, rel=0.1)
    assert len(report["raw"][0]["base"]["samples_ms"]["latency"]["wall"]) <= 1000


def test_where_another_processor_works_the_wall_decides_alone(machine, sides):
    machine.kinds, machine.slept = dict.fromkeys(machine.kinds, "encoder"), 0.0
    report = Gate().measure(sides)
    assert (report["verdict"], report["clock"]) == ("pass", "wall")


@pytest.mark.parametrize(
    "values",
    [
        {"tolerance_percent": 5},
        {"max_pairs": 4},
        {"metrics": "tokens"},
        {"metrics": []},
        {"margn": 1},
        {"choices": ["tpot:mean:cpu"]},
        {"budgets": {"tpot_p51_ms": 1}},
    ],
)
def test_bad_options_are_usage_errors(values):
    with pytest.raises(UsageError, match=next(iter(values))):
        Gate.from_recipe(values)


def test_how_an_open_verdict_counts_is_not_part_of_the_request():
    assert Gate(inconclusive="fail").params() == Gate().params()
    assert Gate(drill_slowdown=20).params() != Gate().params()


def test_a_verdict_of_a_newer_schema_is_refused(tmp_path):
    (tmp_path / "verdict.json").write_text('{"schema": 3}')
    with pytest.raises(ArtifactError, match="schema 2"):
        gating.load(Artifact(tmp_path, "verdict", "sha256:0", "v"))


def test_gate_takes_folders_and_refuses_what_is_none(tmp_path):
    with pytest.raises(EdgeSFTError) as caught:
        gating.gate(tmp_path / "nowhere", tmp_path / "nowhere")
    assert caught.value.exit_code == 3


def test_a_gate_without_base_needs_budgets(tmp_path, sides):
    with pytest.raises(UsageError, match="budgets"):
        gating.gate(None, tmp_path)


def test_a_side_that_is_altered_between_two_pairs_ends_it(machine, sides, monkeypatch):
    monkeypatch.setattr(
        "edgesft.stages.gating.pairs.resolve", lambda path: Artifact(path, "onnx", "sha256:new", "x")
    )

    def fails(role, pair):
        if pair == 2:
            (sides["head"].path / "model.onnx").write_bytes(b"y" * 1000)

    machine.fails = fails
    with pytest.raises(ArtifactError, match="head, `head`, was altered"):
        Gate().measure(sides)
    assert max(pair for _, pair in machine.calls) == 2


def test_a_side_that_is_only_touched_is_gone_on_with(machine, sides, monkeypatch):
    hashed = []

    def resolve(path):
        hashed.append(path.name)
        return Artifact(path, "onnx", f"sha256:{path.name}", "x")

    monkeypatch.setattr("edgesft.stages.gating.pairs.resolve", resolve)

    def fails(role, pair):
        if pair == 2 and not hashed:
            (sides["head"].path / "model.onnx").write_bytes(b"x" * 1000)

    machine.fails = fails
    assert Gate().measure(sides)["verdict"] == "pass"
    assert hashed == ["head"]


def test_pairs_of_another_device_are_not_gone_on_with(machine, sides, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(gating, "resolve", lambda ref: sides[ref])
    machine.fails = lambda role, pair: client.WorkerLost("gone") if pair == 4 else None
    assert code(gating.gate("base", "head", out=out)) == 14
    machine.fails = lambda role, pair: None
    plain = host.fingerprint

    def other(**more):
        found = plain(**more)
        return {**found, "refuse": {**found["refuse"], "power_mode": "15W"}, "id": "sha256:other"}

    monkeypatch.setattr(host, "fingerprint", other)
    report = gating.gate("base", "head", out=out)
    assert code(report) == 12
    assert "`power_mode`" in report["error"]
    assert len((out / ".partial" / "checkpoint" / "pairs.jsonl").read_text().splitlines()) == 4
    monkeypatch.setattr(host, "fingerprint", plain)
    assert code(gating.gate("base", "head", out=out)) == 0
    header = out / ".partial"
    assert not header.exists()


def record(sides, **changes):
    """A calibration of this device for exports."""
    base = sides["base"]
    return {
        "armed": True,
        "why": "enough",
        "metric": "tpot",
        "estimator": "p10",
        "clock": "cpu",
        "margin_percent": 5.0,
        "tolerance_percent": 2.0,
        "alpha": 0.01,
        "beta": 0.05,
        "max_pairs": 48,
        "margin_met_percent": 5.0,
        "workload": {"prompt_tokens": 64, "decode_tokens": 32, "repetitions": 2},
        "fingerprint": profile.device(0),
        "artifact": client.about(base),
        "made_at": "2026-01-01T00:00:00+00:00",
        "expires_at": "2999-01-01T00:00:00+00:00",
    } | changes


@pytest.fixture
def known(machine, sides, monkeypatch):
    monkeypatch.setattr(gating, "resolve", lambda ref: sides[ref])
    return lambda **changes: calibrations.save(record(sides, **changes))


def test_a_calibration_that_fits_decides_by_what(known, capsys, tmp_path):
    known()
    report = gating.gate("base", "head", out=tmp_path / "out")
    assert (report["estimator"], report["clock"], report["decided_by"]) == ("p10", "cpu", "cpu")
    assert report["calibration"]["armed"]
    assert report["calibration"]["expires_at"].startswith("2999")
    assert [m.get("clock") for m in report["metrics"]] == ["cpu", "cpu", None, None]
    assert "calibrated on 2026-01-01" in "\n".join(gating.lines(report))
    assert "calibrate" not in capsys.readouterr().err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["params"]["choices"] == ["tpot:p10:cpu"]


def test_without_one_it_says_how_to_make_one(known, capsys):
    report = gating.gate("base", "head")
    assert report["calibration"] is None
    assert (report["estimator"], report["clock"]) == ("median", "both")
    assert capsys.readouterr().err.count("`edgesft calibrate base`") == 1
    gating.gate("base", "head", calibration="none")
    gating.gate("base", "head", estimator="min")
    assert "calibrate" not in capsys.readouterr().err


def test_an_expired_one_is_not_used(known, capsys):
    known(expires_at="2026-01-02T00:00:00+00:00")
    report = gating.gate("base", "head")
    assert report["calibration"] is None
    assert "has expired" in capsys.readouterr().err


def test_one_that_does_not_arm_this_margin_makes_it_not_comparable(known):
    known(armed=False, margin_met_percent=8.0)
    report = gating.gate("base", "head")
    assert code(report) == 12
    assert "8 %" in report["error"]
    assert code(gating.gate("base", "head", margin_percent=8)) == 0


def test_a_named_calibration_must_be_of_this_device_and_whole(known, sides, tmp_path):
    path = known()
    assert gating.gate("base", "head", calibration=path)["estimator"] == "p10"
    mine = profile.device(0)
    other = {**mine, "refuse": {**mine["refuse"], "governor": "other"}}
    report = gating.gate("base", "head", calibration=known(fingerprint=other))
    assert code(report) == 12
    assert "`governor`" in report["error"]
    broken = tmp_path / "calibration.json"
    broken.write_text(path.read_text().replace('"p10"', '"min"'))
    assert code(gating.gate("base", "head", calibration=broken)) == 12
    broken.write_text('{"schema": 99}')
    report = gating.gate("base", "head", calibration=broken)
    assert code(report) == 12
    assert "99" in report["error"]
    report = gating.gate("base", "head", calibration=known(metric="ttft"))
    assert "is of `ttft`" in report["error"]
    with pytest.raises(ArtifactError, match="does not exist"):
        gating.gate("base", "head", calibration=tmp_path / "nowhere")


def test_the_estimator_is_not_chosen_anew_when_it_goes_on(known, sides, tmp_path, machine):
    machine.fails = lambda role, pair: client.WorkerLost("gone") if pair == 4 else None
    with pytest.raises(EdgeSFTError):
        execute(Gate(), sides, tmp_path / "out")  # a pipeline asks without having chosen
    machine.fails = lambda role, pair: None
    known()
    report = gating.load(execute(Gate(), sides, tmp_path / "out")[0])
    assert (report["estimator"], report["calibration"]) == ("median", None)


def test_budgets_are_checked_beside_the_ratio(machine, sides):
    report = Gate(budgets={"tpot_p50_ms": 9, "ttft_p50_ms": 60, "size_mb": 1}).measure(sides)
    assert report["verdict"] == "pass"
    assert [b["verdict"] for b in report["budgets"]] == ["pass"] * 3
    assert report["metric"] == "tpot"
    assert len(report["raw"][0]["head"]["samples_ms"]["ttft"]["wall"]) == 8
    broken = Gate(budgets={"tpot_p50_ms": 7}).measure(sides)
    assert (broken["verdict"], broken["metric"], broken["decided_by"]) == ("fail", "tpot_p50_ms", "budget")
    assert code(broken) == 10
    assert broken["pairs"] == 8
    assert "at most 7" in gating.describe(broken)


def test_budgets_of_head_alone(machine, sides, tmp_path, monkeypatch):
    monkeypatch.setattr(gating, "resolve", lambda ref: sides[ref])
    file = tmp_path / "budget.toml"
    file.write_text("[budget]\ntpot_p50_ms = 9\npeak_memory_mb = 2\n")
    report = gating.gate(None, "head", budget=file, out=tmp_path / "out")
    assert (report["verdict"], report["pairs"], report["base"]) == ("pass", 8, None)
    assert {role for role, _ in machine.calls} == {"head"}
    assert report["raw"][0]["base"] is None
    assert report["metrics"] == []
    assert "all 2 budgets are kept" in gating.describe(report)
    assert len(gating.lines(report)) == 3
    file.write_text("[budget]\ntpot_p50_ms = 8.02\n")  # amid the noise
    report = gating.gate(None, "head", budget=file, max_pairs=12)
    assert (report["verdict"], report["pairs"]) == ("inconclusive", 12)
    assert code(report) == 11


def test_a_tail_that_can_never_have_its_samples_is_not_waited_for(machine, sides):
    report = Gate(budgets={"ttft_p99_ms": 100}).measure({"head": sides["head"]})
    assert (report["verdict"], report["pairs"]) == ("inconclusive", 8)
    assert "needs 662 samples, has" in report["budgets"][0]["reason"]


def test_a_budget_that_cannot_be_measured_is_nothing_measured(machine, sides, monkeypatch):
    report = Gate(budgets={"latency_p50_ms": 9}).measure(sides)
    assert code(report) == 13
    assert "`latency_p50_ms`" in report["error"]
    power = runtime("devices.power")

    class NoMeter:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def result(self):
            return {"energy": {"source": None, "reason": "no counter", "watts": None}}

    monkeypatch.setattr(power, "Meter", NoMeter)
    report = Gate(budgets={"energy_per_token_mj": 9}).measure(sides)
    assert code(report) == 13
    assert "no counter" in report["error"]
    monkeypatch.setattr(
        NoMeter, "result", lambda self: {"energy": {"source": "rapl", "reason": None, "watts": 10.0}}
    )
    report = Gate(budgets={"energy_per_token_mj": 100}).measure(sides)
    assert report["verdict"] == "pass"
    assert report["budgets"][0]["value"] == pytest.approx(80, rel=0.1)  # 10 W for 8 ms


def test_a_foreign_graph_needs_no_calibration(machine, sides, capsys):
    machine.kinds = dict.fromkeys(machine.kinds, "graph")
    graphs = {r: Artifact(a.path / "model.onnx", "graph", a.digest, r) for r, a in sides.items()}
    report = Gate().measure(graphs)
    assert (report["verdict"], report["metric"]) == ("pass", "latency")
    assert "calibrat" not in capsys.readouterr().err


def test_the_report_keeps_to_its_published_type(machine, sides, tmp_path):
    from edgesft.core import records

    report = Gate(metrics=("tpot", "ttft"), budgets={"tpot_p50_ms": 9}).measure(sides)
    records.check("verdict", json.loads(json.dumps(report)), tmp_path)
    records.check("verdict", Gate(only=("nothing",)).measure(sides), tmp_path)
    records.check("verdict", Gate(budgets={"tpot_p50_ms": 9}).measure({"head": sides["head"]}), tmp_path)
