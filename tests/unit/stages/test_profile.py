"""The profile: what is reported, what is refused, and that it goes on where it was."""

import json

import numpy as np
import pytest

from edgesft.core.artifact import Artifact
from edgesft.core.catalog import runtime
from edgesft.core.errors import ArtifactError, DeviceError, UsageError
from edgesft.core.stage import execute
from edgesft.stages import profile
from edgesft.stages.profile import Profile

client = runtime("devices.client")


def measured(request, *, kind="decoder", step_ms=8.0, warm=0, evicted=1.0, seed=0):
    """What a worker would answer, with 1 % noise; the first `warm` prompts take twice as long."""
    rng = np.random.default_rng([seed, *request["seed"]])
    work = request["workload"]
    reps = []
    for index in range(work["repetitions"] + work.get("prefills", 0)):
        slow = 2.0 if index < warm else 1.0
        steps = work["decode_tokens"] if index < work["repetitions"] else 0
        times = (slow * step_ms * 1e6 * np.exp(0.01 * rng.standard_normal(steps + 1))).astype(int).tolist()
        if kind == "encoder":
            reps.append({"index": index, "call_ns": times[0], "call_cpu_ns": times[0], "step_ns": []})
            reps[-1]["wall_ns"] = times[0]
            continue
        first = 5 * times[0]
        reps.append({"index": index, "ttft_ns": first, "ttft_cpu_ns": first, "step_ns": times[1:]})
        reps[-1] |= {"step_cpu_ns": times[1:], "wall_ns": first + sum(times[1:]) + 1000}
    loaded = {"event": "loaded", "load_ns": 500_000_000 if request.get("cold") else 200_000_000}
    loaded |= {"evicted": evicted, "kind": kind, "vocabulary": 100}
    done = {"event": "done", "peak_bytes": 3_000_000, "peak_above_bytes": 2_000_000}
    return {"loaded": loaded, "repetitions": reps, "done": done, "wall_s": 1.0}


@pytest.fixture
def exported(tmp_path):
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"x" * 1000)
    (folder / "export.json").write_text(json.dumps({"quantize": "int4", "context": 512}))
    return Artifact(folder, "onnx", "sha256:1", "exported", {"metrics": {"pattern": "2:4"}})


@pytest.fixture
def fake(monkeypatch):
    """Replace the worker; returns the list of requests. `fake.answer` may be exchanged."""

    class Fake(list):
        answer = staticmethod(measured)

        def measure(self, request, timeout):
            self.append(request)
            return self.answer(request)

    calls = Fake()
    monkeypatch.setattr(client, "measure", calls.measure)
    return calls


def test_the_defaults_give_every_percentile_of_the_time_per_token(exported, fake, tmp_path):
    made, ran = execute(Profile(), {"exported": exported}, tmp_path / "out")
    found = profile.load(made)
    assert ran
    assert made.kind == "profile"
    assert found["tpot_ms"]["samples"] >= 662
    assert found["tpot_ms"]["p50"] == pytest.approx(8.0, rel=0.01)
    assert found["tpot_ms"]["p99"] == pytest.approx(8.0 * np.exp(0.0233), rel=0.01)
    low, high = found["tpot_ms"]["low"]["p99"], found["tpot_ms"]["high"]["p99"]
    assert low <= found["tpot_ms"]["p99"] <= high
    assert found["ttft_ms"]["p90"] == pytest.approx(40.0 * np.exp(0.0128), rel=0.01)
    assert found["ttft_ms"]["p99"] is None
    assert "needs 662 samples" in found["ttft_ms"]["reasons"]["p99"]
    assert found["tokens_per_second"] == pytest.approx(125, rel=0.01)
    assert found["end_to_end"]["tokens_per_second"] < found["tokens_per_second"]
    assert found["peak_memory_bytes"] == 3_000_000
    assert found["artifact_bytes"] == exported.bytes
    assert (found["quantize"], found["pattern"], found["density"]) == ("int4", "2:4", 0.5)
    assert found["fingerprint"]["id"].startswith("sha256:")
    assert found["load_ms"]["cold"] == 500.0
    assert found["load_ms"]["warm"] == 200.0
    assert len(found["samples"]["tpot_ms"]) == found["tpot_ms"]["samples"]
    assert "samples" not in made.metrics
    assert made.metrics["tpot_ms"] == found["tpot_ms"]


def test_every_process_is_fresh_and_has_its_own_prompts(exported, fake, tmp_path):
    execute(Profile(processes=3, seed=5), {"exported": exported}, tmp_path / "out")
    assert [c["seed"] for c in fake] == [[5, 0], [5, 1], [5, 2], [5, 3]]
    assert [c["cold"] for c in fake] == [True, False, False, False]
    assert fake[0]["workload"]["repetitions"] == 0


def test_too_few_samples_are_refused_with_the_number(exported, fake, tmp_path):
    stage = Profile(prompts=4, decode_tokens=24, prefill_seconds=0)
    found = profile.load(execute(stage, {"exported": exported}, tmp_path / "out")[0])
    assert found["tpot_ms"]["p90"] is not None
    assert found["tpot_ms"]["p99"] is None
    assert "needs 662 samples, has" in found["tpot_ms"]["reasons"]["p99"]
    assert found["ttft_ms"]["p50"] is None
    assert found["samples"]["processes"][0]["repetitions"][0]["step_ms"]


def test_warm_up_is_cut_and_said(exported, fake, tmp_path):
    fake.answer = lambda request: measured(request, warm=3)
    stage = Profile(prompts=14, decode_tokens=32)
    found = profile.load(execute(stage, {"exported": exported}, tmp_path / "out")[0])
    assert [c["cut"] for c in found["warmup"]["tpot"]] == pytest.approx([96, 96], abs=6)
    assert found["warmup"]["steady"]
    assert found["tpot_ms"]["p99"] < 9


def test_prompts_for_the_first_token_are_added_only_if_they_are_affordable(exported, fake, tmp_path):
    execute(Profile(prompts=14), {"exported": exported}, tmp_path / "quick")
    assert fake[2]["workload"]["prefills"] == 77 - 28
    fake.clear()
    fake.answer = lambda request: measured(request, step_ms=80.0)
    found = profile.load(execute(Profile(), {"exported": exported}, tmp_path / "slow")[0])
    assert fake[2]["workload"]["prefills"] == 0
    assert found["ttft_ms"]["p50"] is not None
    assert found["ttft_ms"]["p90"] is None


def test_a_load_from_the_page_cache_is_not_called_cold(exported, fake, tmp_path):
    fake.answer = lambda request: measured(request, evicted=0.3)
    found = profile.load(execute(Profile(), {"exported": exported}, tmp_path / "out")[0])
    assert found["load_ms"]["cold"] is None
    assert "30 %" in found["load_ms"]["reason"]


def test_an_encoder_has_a_latency_a_call(exported, fake, tmp_path):
    fake.answer = lambda request: measured(request, kind="encoder")
    found = profile.load(execute(Profile(prompts=40), {"exported": exported}, tmp_path / "out")[0])
    assert found["latency_ms"]["p90"] == pytest.approx(8.1, rel=0.01)
    assert found["latency_ms"]["p99"] is not None  # further calls of 8 ms were affordable
    assert fake[2]["workload"]["prefills"] == 795 - 80
    assert found["tpot_ms"]["p50"] is None
    assert found["ttft_ms"]["reasons"]["p50"] == "an encoder generates no tokens"
    assert found["calls_per_second"] == pytest.approx(125, rel=0.01)


def test_rates_that_do_not_add_up_are_noted(exported, fake, tmp_path):
    def answer(request):
        found = measured(request)
        for each in found["repetitions"]:
            each["wall_ns"] = int(each["wall_ns"] * 1.2)
        return found

    fake.answer = answer
    found = profile.load(execute(Profile(), {"exported": exported}, tmp_path / "out")[0])
    assert any("add up" in note for note in found["notes"])


def test_an_interrupted_profile_measures_only_what_is_missing(exported, fake, tmp_path):
    def dies(request):
        if request["seed"][1] == 2:
            raise client.WorkerLost("the measuring process was killed by `SIGKILL`")
        return measured(request)

    fake.answer = dies
    with pytest.raises(DeviceError, match="SIGKILL"):
        execute(Profile(), {"exported": exported}, tmp_path / "out")
    fake.clear()
    fake.answer = measured
    execute(Profile(), {"exported": exported}, tmp_path / "out")
    assert [c["seed"][1] for c in fake] == [2]
    fake.clear()
    assert not execute(Profile(), {"exported": exported}, tmp_path / "out")[1]
    assert fake == []


def test_another_device_is_another_request(exported, fake, tmp_path, monkeypatch):
    execute(Profile(), {"exported": exported}, tmp_path / "out")
    host = runtime("devices.host")
    monkeypatch.setattr(host, "governor", lambda: "powersave")
    with pytest.raises(ArtifactError, match=r"device\.governor"):
        execute(Profile(), {"exported": exported}, tmp_path / "out")


def test_what_does_not_fit_the_context_is_refused_before_anything_runs(exported, fake, tmp_path):
    with pytest.raises(UsageError, match="512 at most"):
        execute(Profile(prompt_tokens=500), {"exported": exported}, tmp_path / "out")
    assert fake == []
    assert not (tmp_path / "out").exists()


def test_other_kinds_are_refused(tmp_path, fake):
    delta = Artifact(tmp_path, "delta", "sha256:1", "some/delta")
    with pytest.raises(ArtifactError, match="`delta`"):
        execute(Profile(), {"exported": delta}, tmp_path / "out")


@pytest.mark.parametrize(
    "table", [{"prompts": 0}, {"processes": 0}, {"promts": 3}, {"threads": -1}, {"prefill_seconds": -1}]
)
def test_bad_values_are_named(table):
    with pytest.raises(UsageError, match=f"profile.*{next(iter(table))}"):
        Profile.from_recipe(table)
