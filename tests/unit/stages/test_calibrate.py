"""Calibration: what is promised and refused, what is measured again, resuming by process, the store."""

import json
import math
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from edgesft.core import calibrations
from edgesft.core.artifact import Artifact
from edgesft.core.catalog import runtime
from edgesft.core.errors import ArtifactError, CheckFailed, EdgeSFTError, UsageError
from edgesft.core.stage import execute
from edgesft.stages import calibrate as calibrating
from edgesft.stages.calibrate import Calibrate

client, host = runtime("devices.client"), runtime("devices.host")
SMALL = {"processes": 24, "relabelings": 1000}


class Machine:
    """Stands for the worker: processes differ by `cpu` in both clocks, by `wall` in wall time besides."""

    def __init__(self):
        self.cpu, self.wall, self.kind, self.asked = 0.01, 0.0, "decoder", []
        self.ramp, self.fails, self.call_ns, self.idle = set(), lambda number: None, 10**7, False

    def measure(self, request, timeout):
        self.asked.append({**request, "timeout": timeout})
        number = len(self.asked) - 2  # the first is the probe
        error = self.fails(number)
        if error is not None:
            raise error
        rng = np.random.default_rng([*request["seed"], len(self.asked)])
        level = 8e6 * math.exp(self.cpu * rng.standard_normal())
        wait = math.exp(self.wall * abs(rng.standard_normal()))
        work, reps = request["workload"], []
        for index in range(work["repetitions"]):
            steps = level * np.resize([1.0, 1.005, 0.995], work["decode_tokens"] + 1)  # steady for sure
            if number in self.ramp:
                steps *= math.exp(-index)
            ns = steps.astype(int).tolist()
            walls = [int(t * wait) for t in ns]
            rep = {"wall_ns": 10**7, "ttft_ns": walls[0], "ttft_cpu_ns": ns[0], "step_ns": walls[1:]}
            rep["step_cpu_ns"] = [t // 100 for t in ns[1:]] if self.idle else ns[1:]
            if self.kind != "decoder":
                rep = {"call_ns": walls[0], "call_cpu_ns": ns[0], "step_ns": [], "wall_ns": self.call_ns}
            reps.append(rep)
        loaded = {"load_ns": 10**8, "kind": self.kind, "vocabulary": 100}
        return {"loaded": loaded, "repetitions": reps, "done": {"peak_bytes": 10**6}, "wall_s": 1.0}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    found = Machine()
    monkeypatch.setenv("EDGESFT_CALIBRATIONS", str(tmp_path / "store"))
    monkeypatch.setattr(client, "measure", found.measure)
    monkeypatch.setattr(host, "telemetry", lambda: {"seconds": 0.0})
    return found


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "export.json").write_text(json.dumps({"quantize": "int4"}))
    made = Artifact(folder, "onnx", "sha256:one", "exported")
    monkeypatch.setattr(calibrating, "resolve", lambda ref: made)
    return {"artifact": made}


def whole(inputs, out, **options):
    return calibrating.load(execute(Calibrate(**{**SMALL, **options}), inputs, out)[0])


def test_a_quiet_machine_is_armed_with_all_that_a_gate_needs(machine, inputs, tmp_path):
    record = whole(inputs, tmp_path / "out")
    assert record["armed"]
    assert record["processes"] == 24
    assert record["false_alarm"]["rate"] <= record["false_alarm"]["high"] <= 0.01
    assert record["detection"]["5"] >= 0.99
    assert record["margin_met_percent"] == 3.0
    assert record["clock"] in ("both", "wall")
    assert record["level_ms"] == pytest.approx(8, rel=0.05)
    assert record["metric"] == "tpot"
    assert record["workload"] == {"prompt_tokens": 64, "decode_tokens": 32, "repetitions": 2}
    assert record["artifact"]["quantize"] == "int4"
    assert record["fingerprint"]["id"].startswith("sha256:")
    assert record["noise"] == pytest.approx(0.014, abs=0.007)
    assert len(record["samples"]["values_ms"]["both"]["wall"]["min"]) == 24
    assert len(record["candidates"]) == 9
    assert datetime.fromisoformat(record["expires_at"]) - datetime.fromisoformat(
        record["made_at"]
    ) == timedelta(days=30)
    calibrating.judge(record)
    assert "% false alarms" in record["why"]


def test_processes_are_asked_as_a_gate_asks_them(machine, inputs, tmp_path):
    whole(inputs, tmp_path / "out", processes=24, seed=5)
    probe, *asked = machine.asked
    assert len(asked) == 24
    assert [a["seed"] for a in asked[:4]] == [[5, 1], [5, 1], [5, 2], [5, 2]]  # the sides of a pair
    assert {(a["clock"], a["until_steady"], a["slowdown"]) for a in asked} == {("cpu", True, 0.0)}
    assert (probe["until_steady"], probe["timeout"]) == (False, 300.0)
    assert asked[0]["timeout"] == 60.0


@pytest.mark.parametrize(
    ("kind", "metric", "found", "workload"),
    [
        ("decoder", "ttft", "ttft", {"decode_tokens": 0, "repetitions": 8}),
        ("encoder", "auto", "latency", {"decode_tokens": 0, "repetitions": 64}),
        ("graph", "latency", "latency", {"decode_tokens": 0, "repetitions": 64}),
    ],
)
def test_metrics_have_the_workload_of_their_gate(machine, inputs, tmp_path, kind, metric, found, workload):
    machine.kind = kind
    record = whole(inputs, tmp_path / "out", metric=metric, processes=24)
    assert record["metric"] == found
    assert record["workload"] == {"prompt_tokens": 64, **workload}
    assert machine.asked[-1]["workload"] == record["workload"]
    assert record["armed"]


def test_short_calls_are_made_as_often_as_in_a_gate(machine, inputs, tmp_path):
    machine.kind, machine.call_ns = "graph", 10**6
    record = whole(inputs, tmp_path / "out", processes=24)
    assert record["workload"]["repetitions"] == 64  # the key by which a gate finds it
    assert machine.asked[-1]["workload"]["repetitions"] == record["repetitions"] == 300


def test_where_the_calling_thread_sleeps_only_wall_time_counts(machine, inputs, tmp_path):
    machine.idle = True
    record = whole(inputs, tmp_path / "out", processes=24)
    assert {c["clock"] for c in record["candidates"]} == {"wall"}
    assert (record["armed"], record["clock"]) == (True, "wall")


@pytest.mark.parametrize(("kind", "metric"), [("decoder", "latency"), ("encoder", "tpot")])
def test_a_metric_that_the_artefact_does_not_have_leaves_nothing(machine, inputs, tmp_path, kind, metric):
    machine.kind = kind
    with pytest.raises(UsageError, match=f"metric` is `{metric}`"):
        whole(inputs, tmp_path / "out", metric=metric)
    assert not (tmp_path / "out").exists()


def test_a_noisy_machine_is_not_armed_and_says_what_it_could_keep(machine, inputs, tmp_path):
    machine.cpu = 0.2
    record = calibrating.calibrate("exported", **SMALL)
    assert not record["armed"]
    met = record["margin_met_percent"]
    assert 5 < met < 50
    with pytest.raises(CheckFailed) as caught:
        calibrating.judge(record)
    assert caught.value.exit_code == 1
    assert f"a margin of {met:g} % can be kept" in caught.value.message
    assert f"edgesft calibrate exported --margin {met:g}" in caught.value.hint
    found = calibrations.find(
        record["fingerprint"]["id"], "tpot", record["workload"], client.about(inputs["artifact"])
    )
    assert found["armed"] is False  # kept all the same: the gate must know
    machine.cpu = 3.0
    hopeless = calibrating.calibrate("exported", **SMALL)
    with pytest.raises(CheckFailed, match="no margin up to 50 % can be kept") as caught:
        calibrating.judge(hopeless)
    assert "--margin" not in caught.value.hint


def test_a_wider_margin_arms_where_it_was_said_to(machine, inputs):
    machine.cpu = 0.2
    met = calibrating.calibrate("exported", **SMALL)["margin_met_percent"]
    machine.asked.clear()
    assert calibrating.calibrate("exported", **SMALL, margin_percent=met)["armed"]


def test_waiting_leaves_processor_time_and_that_is_said(machine, inputs, tmp_path, monkeypatch):
    from edgesft.core.statistics import relabel

    machine.wall = 2.0
    # Two clocks keep the promise where one of them does; without them processor time is what is left.
    monkeypatch.setattr(relabel, "CLOCKS", ("wall", "cpu"))
    record = whole(inputs, tmp_path / "out")
    assert record["armed"]
    assert record["clock"] == "cpu"
    assert "does not see waiting" in record["why"]


def test_a_kill_keeps_the_processes_and_the_same_command_goes_on(machine, inputs, tmp_path):
    out = tmp_path / "out"
    machine.fails = lambda number: client.WorkerLost("killed by `SIGKILL`") if number == 10 else None
    with pytest.raises(EdgeSFTError, match="lost after 10 of 24 processes") as caught:
        whole(inputs, out)
    assert caught.value.exit_code == 14
    kept = out / ".partial" / "checkpoint" / "processes.jsonl"
    before = kept.read_text()
    assert len(before.splitlines()) == 10
    kept.write_text(before + '{"process": 10, "val')  # a kill in the middle of a line
    machine.fails = lambda number: None
    machine.asked.clear()
    whole(inputs, out)
    assert len(machine.asked) == 1 + 14
    assert machine.asked[1]["seed"] == [0, 6]
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "".join(lines[:10]) == before
    assert [json.loads(line)["process"] for line in lines] == list(range(24))


def test_without_an_output_folder_it_goes_on_too_and_leaves_only_the_record(machine, inputs):
    machine.fails = lambda number: client.WorkerLost("hung") if number == 7 else None
    with pytest.raises(EdgeSFTError):
        calibrating.calibrate("exported", **SMALL)
    machine.fails = lambda number: None
    machine.asked.clear()
    record = calibrating.calibrate("exported", **SMALL)
    assert len(machine.asked) == 1 + 17
    home = calibrations.folder()
    assert [calibrations.read(f) for f in home.glob("*.json")] == [record]
    assert list((home / ".unfinished").iterdir()) == []


@pytest.mark.parametrize("noise", [0.01, 3.0])
def test_it_is_not_done_again_while_the_last_one_answers(machine, inputs, monkeypatch, noise):
    machine.cpu = noise
    first = calibrating.calibrate("exported", **SMALL, if_needed=True)
    machine.asked.clear()
    assert calibrating.calibrate("exported", **SMALL, if_needed=True)["made_at"] == first["made_at"]
    assert machine.asked == []  # one that arms nothing answers for its margin too
    calibrating.calibrate("exported", **SMALL, margin_percent=9, if_needed=True)
    assert len(machine.asked) == (0 if first["armed"] else 1 + 24)
    machine.asked.clear()
    monkeypatch.setattr(calibrations, "expired", lambda record, now=None: True)
    calibrating.calibrate("exported", **SMALL, if_needed=True)
    assert len(machine.asked) == 1 + 24


def test_what_was_interrupted_long_ago_is_begun_anew(machine, inputs, monkeypatch):
    machine.fails = lambda number: client.WorkerLost("hung") if number == 7 else None
    with pytest.raises(EdgeSFTError):
        calibrating.calibrate("exported", **SMALL)
    machine.fails = lambda number: None
    machine.asked.clear()
    monkeypatch.setattr(calibrating, "STALE", -1.0)
    calibrating.calibrate("exported", **SMALL)
    assert len(machine.asked) == 1 + 24


def test_an_artefact_that_never_runs_is_nothing_measured(machine, inputs, tmp_path):
    machine.fails = lambda number: client.WorkerFailed("no such kernel", "hint")
    with pytest.raises(EdgeSFTError, match="could not be run: no such kernel") as caught:
        whole(inputs, tmp_path / "out")
    assert caught.value.exit_code == 13
    assert len(machine.asked) == 3
    assert not (tmp_path / "out").exists()


def test_a_failure_that_passes_is_tried_again(machine, inputs, tmp_path):
    machine.fails = lambda number: client.WorkerFailed("for once") if number == 3 else None
    assert whole(inputs, tmp_path / "out", processes=24)["processes"] == 24
    assert len(machine.asked) == 1 + 24 + 1


def test_held_back_and_unsteady_processes_are_measured_again_within_the_cap(
    machine, inputs, tmp_path, monkeypatch
):
    heat = iter(range(10**6))
    monkeypatch.setattr(host, "held_back", lambda a, b: "too hot" if next(heat) in (2, 5) else None)
    machine.ramp = {8}
    record = whole(inputs, tmp_path / "out")
    assert [(d["process"], d["why"]) for d in record["discarded"]] == [
        (2, "too hot"),
        (5, "too hot"),
        (8, "no steady state"),
    ]
    assert record["processes"] == 24
    monkeypatch.setattr(host, "held_back", lambda a, b: "too hot")
    machine.asked.clear()
    hot = whole(inputs, tmp_path / "hot")
    assert len(hot["discarded"]) == 5  # a fifth of 24; what then still throttles counts
    assert hot["processes"] == 24


def test_a_machine_that_changes_for_good_is_no_device_to_calibrate(machine, inputs, tmp_path, monkeypatch):
    real, asked = host.fingerprint, []

    def fingerprint(**more):
        asked.append(more)
        found = real(**more)
        if len(asked) > 6:
            found["refuse"]["governor"] = "powersave"
        return found

    monkeypatch.setattr(host, "fingerprint", fingerprint)
    with pytest.raises(EdgeSFTError, match="changed during the calibration: `governor` is") as caught:
        whole(inputs, tmp_path / "out")
    assert caught.value.exit_code == 4
    assert 7 < len(machine.asked) < 14


def test_equal_requests_run_once_but_not_after_they_expired(machine, inputs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = calibrating.calibrate("exported", out=out, **SMALL)
    machine.asked.clear()
    assert calibrating.calibrate("exported", out=out, **SMALL) == first
    assert machine.asked == []
    assert len(list(calibrations.folder().glob("*.json"))) == 1
    later = datetime.now(UTC) + timedelta(days=31)
    monkeypatch.setattr(calibrations, "expired", lambda record, now=None: later > now if now else True)
    with pytest.raises(ArtifactError, match="expired on"):
        calibrating.calibrate("exported", out=out, **SMALL)


def test_an_artefact_that_is_altered_meanwhile_leaves_nothing(machine, inputs, tmp_path, monkeypatch):
    other = Artifact(inputs["artifact"].path, "onnx", "sha256:two", "exported")
    monkeypatch.setattr(calibrating, "resolve", lambda ref: other)
    with pytest.raises(ArtifactError, match="`exported` was altered while it was measured"):
        whole(inputs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_altered_record_is_refused(machine, inputs, tmp_path):
    out = tmp_path / "out"
    calibrating.calibrate("exported", out=out, **SMALL)
    file = out / "calibration.json"
    file.write_text(file.read_text().replace('"armed": true', '"armed": false'))
    with pytest.raises(ArtifactError, match="SHA-256"):
        calibrating.load(Artifact(out, "calibration", "sha256:0", "out"))
    with pytest.raises(ArtifactError):
        calibrating.calibrate("exported", out=out, **SMALL)


@pytest.mark.parametrize(
    "values",
    [
        *({"processes": 23}, {"tolerance_percent": 5}, {"metric": "tokens"}, {"relabelings": 1}),
        *({"days": 0}, {"max_pairs": 4}, {"margn": 1}, {"alpha": 0}),
    ],
)
def test_bad_options_are_usage_errors(values):
    with pytest.raises(UsageError, match=next(iter(values))):
        Calibrate.from_recipe(values)


def test_what_only_limits_the_time_is_not_part_of_the_request():
    assert Calibrate(timeout=10).params() == Calibrate().params()
    for more in ({"processes": 48}, {"seed": 1}, {"days": 1}, {"margin_percent": 8}):
        assert Calibrate(**more).params() != Calibrate().params()


def test_a_person_reads_the_promise(machine, inputs, tmp_path):
    told = calibrating.brief(whole(inputs, tmp_path / "out"))
    assert told["armed"] is True
    assert told["smallest margin kept"] == "3 %"
    assert told["found"]["10 % slower"] == "100.0 %"
    assert len(told["candidates"]) == 9
    assert told["metric"].startswith("tpot, ")


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(EdgeSFTError) as caught:
        calibrating.calibrate(tmp_path / "nowhere")
    assert caught.value.exit_code == 3
