"""The profile: what is reported, what is refused, what becomes a note, and that it goes on where it was."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from edgesft.core import records
from edgesft.core.artifact import Artifact, read
from edgesft.core.catalog import runtime
from edgesft.core.errors import ArtifactError, DeviceError, UsageError
from edgesft.core.stage import execute
from edgesft.stages import profile
from edgesft.stages.profile import Profile

client = runtime("devices.client")
LIMITS = {"copy_gbs": 10.0, "read_gbs": 20.0, "gemm_gflops": {"fp32": 100.0}, "threads": 1, "seconds": 2.0}
CORE = {"contexts": (), "idle_seconds": (), "operators": False, "roofline": False, "energy": False}
STEP_US = 7000  # of the runtime's own profile


def measured(request, *, kind="decoder", step_ms=8.0, warm=0, evicted=1.0, seed=0):
    """What a worker would answer, with 1 % noise; the first `warm` prompts take twice as long."""
    rng = np.random.default_rng([seed, *request["seed"]])
    work = request["workload"]
    reps = []
    count = work["repetitions"] + work.get("prefills", 0)
    pauses = request.get("idle_seconds", [])
    clock = 10**12
    for index in range(count + len(pauses)):
        slow = 2.0 if index < warm or index >= count else 1.0
        steps = 0 if work["repetitions"] <= index < count else work["decode_tokens"]
        times = (slow * step_ms * 1e6 * np.exp(0.01 * rng.standard_normal(steps + 1))).astype(int).tolist()
        if kind == "decoder":
            first = 5 * times[0]
            reps.append({"index": index, "ttft_ns": first, "ttft_cpu_ns": first, "step_ns": times[1:]})
            reps[-1] |= {"step_cpu_ns": times[1:], "wall_ns": first + sum(times[1:]) + 1000}
        else:
            reps.append({"index": index, "call_ns": times[0], "call_cpu_ns": times[0], "step_ns": []})
            reps[-1] |= {"wall_ns": times[0], "calls": 1}
        reps[-1]["began_ns"] = clock
        clock += reps[-1]["wall_ns"]
    loaded = {"event": "loaded", "load_ns": 500_000_000 if request.get("cold") else 200_000_000}
    loaded |= {"evicted": evicted, "kind": kind, "vocabulary": 100}
    done = {"event": "done", "peak_bytes": 3_000_000, "peak_above_bytes": 2_000_000}
    if request.get("operators"):
        done["operators"] = {"phases": runtime_profile(Path(request["operators"]), work, kind)}
    idle = [{**r, "seconds": s} for r, s in zip(reps[count:], pauses, strict=True)]
    return {"loaded": loaded, "repetitions": reps[:count], "idle": idle, "done": done, "wall_s": 1.0}


def runtime_profile(path, work, kind):
    """Write what ONNX Runtime would, of a graph with one product and one sum a run; its phases."""
    spans, phases, at = [], [], 0
    for repetition in range(-1, work["repetitions"]):
        steps = work["decode_tokens"] if kind == "decoder" else 0
        named = [("prefill" if kind == "decoder" else "call", 1), *([("decode", steps)] if steps else [])]
        for phase, runs in named:
            begin = at
            for _ in range(runs):
                tokens = work["prompt_tokens"] if phase == "prefill" else 1
                spans.append(span("model_run", "Session", at, STEP_US))
                spans.append(node("layers.0.fc", "MatMul", at + 100, 6000, tokens))
                spans.append(node("layers.0.add", "Add", at + 6200, 500, tokens))
                at += STEP_US + 50
            phases.append({"phase": phase, "repetition": repetition, "begin_us": begin, "end_us": at})
    path.write_text(json.dumps(spans))
    return phases


def span(name, category, ts, dur, **args):
    return {"cat": category, "pid": 1, "tid": 1, "ts": ts, "dur": dur, "ph": "X", "name": name, "args": args}


def node(name, operator, ts, dur, tokens):
    shapes = {
        "input_type_shape": [{"float": [1, tokens, 64]}],
        "output_type_shape": [{"float": [1, tokens, 64]}],
    }
    args = {"op_name": operator, "provider": "CPUExecutionProvider", **shapes}
    return span(f"{name}_kernel_time", "Node", ts, dur, **args)


@pytest.fixture
def exported(tmp_path):
    folder = tmp_path / "exported"
    folder.mkdir()
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="layers.0.fc"),
        helper.make_node("Add", ["y", "y"], ["z"], name="layers.0.add"),
    ]
    past = helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, ["b", 2, "s", 32])
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", 64]), past]
    outputs = [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["b", "s", 64])]
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, [weight])), folder / "model.onnx"
    )
    (folder / "export.json").write_text(json.dumps({"quantize": "int4", "context": 600}))
    return Artifact(folder, "onnx", "sha256:1", "exported", {"metrics": {"pattern": "2:4"}})


class Meter:
    """50 W for two seconds a process; throttled in the second."""

    count = 0

    def __enter__(self):
        Meter.count += 1
        return self

    def __exit__(self, *_):
        pass

    def result(self):
        energy = {"source": "rapl", "joules": 100.0, "watts": 50.0, "seconds": 2.0, "reason": None}
        clocks = {"source": "cpufreq", "mhz_min": 1000.0 + Meter.count, "mhz_max": 2000.0 + Meter.count}
        reasons = ["too hot"] if Meter.count == 2 else []
        throttled = {"reasons": reasons, "counters": {"steal": 0.5}}
        heat = {"source": None, "celsius_max": None}
        return {"energy": energy, "clocks": clocks, "temperature": heat, "throttled": throttled}


@pytest.fixture
def fake(monkeypatch):
    """Replace the worker; returns the list of requests. `fake.answer` may be exchanged."""

    class Fake(list):
        answer = staticmethod(measured)

        def measure(self, request, timeout):
            self.append(request)
            return self.answer(request)

    calls = Fake()
    Meter.count = 0
    monkeypatch.setattr(client, "measure", calls.measure)
    monkeypatch.setattr(
        runtime("devices.roofline"), "measured", lambda threads: {**LIMITS, "threads": threads}
    )
    monkeypatch.setattr(runtime("devices.power"), "Meter", Meter)
    return calls


def made(exported, out, **options):
    """The profile of the core timing alone, unless `options` add to it."""
    return profile.load(execute(Profile(**{**CORE, **options}), {"exported": exported}, out)[0])


def test_the_defaults_give_every_percentile_of_the_time_per_token(exported, fake, tmp_path):
    artefact, ran = execute(Profile(), {"exported": exported}, tmp_path / "out")
    found = profile.load(artefact)
    assert ran
    assert artefact.kind == "profile"
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
    assert "samples" not in artefact.metrics
    assert artefact.metrics["tpot_ms"] == found["tpot_ms"]
    assert found["notes"] == ["the machine was held back: too hot"]
    records.check("profile", found, tmp_path)


def test_every_process_is_fresh_and_has_its_own_prompts(exported, fake, tmp_path):
    execute(Profile(**CORE, processes=3, seed=5), {"exported": exported}, tmp_path / "out")
    assert [c["seed"] for c in fake] == [[5, 0], [5, 1], [5, 2], [5, 3]]
    assert [c["cold"] for c in fake] == [True, False, False, False]
    assert fake[0]["workload"]["repetitions"] == 0


def test_too_few_samples_are_refused_with_the_number(exported, fake, tmp_path):
    found = made(exported, tmp_path / "out", prompts=4, decode_tokens=24, prefill_seconds=0)
    assert found["tpot_ms"]["p90"] is not None
    assert found["tpot_ms"]["p99"] is None
    assert "needs 662 samples, has" in found["tpot_ms"]["reasons"]["p99"]
    assert found["ttft_ms"]["p50"] is None
    assert found["samples"]["processes"][0]["repetitions"][0]["step_ms"]


def test_warm_up_is_cut_and_said(exported, fake, tmp_path):
    fake.answer = lambda request: measured(request, warm=3)
    found = made(exported, tmp_path / "out", prompts=14, decode_tokens=32)
    assert [c["cut"] for c in found["warmup"]["tpot"]] == pytest.approx([96, 96], abs=6)
    assert found["warmup"]["steady"]
    assert found["tpot_ms"]["p99"] < 9


def test_prompts_for_the_first_token_are_added_only_if_they_are_affordable(exported, fake, tmp_path):
    made(exported, tmp_path / "quick", prompts=14)
    assert fake[2]["workload"]["prefills"] == 77 - 28
    fake.clear()
    fake.answer = lambda request: measured(request, step_ms=80.0)
    found = made(exported, tmp_path / "slow")
    assert fake[2]["workload"]["prefills"] == 0
    assert found["ttft_ms"]["p50"] is not None
    assert found["ttft_ms"]["p90"] is None


def test_a_load_from_the_page_cache_is_not_called_cold(exported, fake, tmp_path):
    fake.answer = lambda request: measured(request, evicted=0.3)
    found = made(exported, tmp_path / "out")
    assert found["load_ms"]["cold"] is None
    assert "30 %" in found["load_ms"]["reason"]


def test_an_encoder_has_a_latency_a_call(exported, fake, tmp_path):
    fake.answer = lambda request: measured(request, kind="encoder")
    found = made(exported, tmp_path / "out", prompts=40)
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
    found = made(exported, tmp_path / "out")
    assert any("add up" in note for note in found["notes"])


def test_an_interrupted_profile_measures_only_what_is_missing(exported, fake, tmp_path):
    def dies(request):
        if request["seed"][1] == 2:
            raise client.WorkerLost("the measuring process was killed by `SIGKILL`")
        return measured(request)

    fake.answer = dies
    with pytest.raises(DeviceError, match="SIGKILL"):
        execute(Profile(), {"exported": exported}, tmp_path / "out")
    assert len(fake) == 3  # nothing else is tried where the core timing failed
    fake.clear()
    fake.answer = measured
    execute(Profile(), {"exported": exported}, tmp_path / "out")
    assert [c["seed"][1] for c in fake if c["seed"][1] < 1000] == [2]
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
    with pytest.raises(UsageError, match="600 at most"):
        execute(Profile(prompt_tokens=590), {"exported": exported}, tmp_path / "out")
    assert fake == []
    assert not (tmp_path / "out").exists()


def test_other_kinds_are_refused(tmp_path, fake):
    delta = Artifact(tmp_path, "delta", "sha256:1", "some/delta")
    with pytest.raises(ArtifactError, match="`delta`"):
        execute(Profile(), {"exported": delta}, tmp_path / "out")


@pytest.mark.parametrize(
    "table",
    [
        {"prompts": 0},
        {"processes": 0},
        {"promts": 3},
        {"threads": -1},
        {"prefill_seconds": -1},
        {"batches": [0]},
        {"idle_seconds": [-1]},
    ],
)
def test_bad_values_are_named(table):
    with pytest.raises(UsageError, match=f"profile.*{next(iter(table))}"):
        Profile.from_recipe(table)


def test_the_two_readings_of_time_per_token(exported, fake, tmp_path):
    def answer(request):
        """Every prompt's first step takes twice as long."""
        found = measured(request)
        for each in found["repetitions"]:
            each["step_ns"] = [2 * t if i == 0 else t for i, t in enumerate(each["step_ns"])]
        return found

    fake.answer = answer
    found = made(exported, tmp_path / "out", decode_tokens=4)
    assert found["itl_ms"] == found["tpot_ms"]
    assert found["itl_ms"]["samples"] > 100
    assert found["itl_ms"]["p50"] == pytest.approx(8, rel=0.02)
    assert 25 < found["request_tpot_ms"]["samples"] <= 2 * 15
    assert found["request_tpot_ms"]["p50"] == pytest.approx(10, rel=0.02)


def test_contexts_beyond_the_model_are_left_out_and_the_timed_one_is_not_timed_again(
    exported, fake, tmp_path
):
    found = made(exported, tmp_path / "out", contexts=(32, 128, 4096))
    assert [c["prompt_tokens"] for c in found["contexts"]] == [32, 128]
    assert found["contexts"][0]["ttft_ms"]["p50"] == pytest.approx(40, rel=0.02)
    assert found["contexts"][0]["itl_ms"]["samples"] == 66
    assert found["contexts"][0]["request_tpot_ms"]["samples"] == 11
    assert found["contexts"][1]["itl_ms"] == found["itl_ms"]
    assert [c["workload"]["prompt_tokens"] for c in fake] == [128, 128, 128, 32]
    assert found["notes"] == ["no context of 4096 and more: the model takes 600 tokens at most"]


def test_sweeps(exported, fake, tmp_path):
    found = made(exported, tmp_path / "out", batches=(4, 1), thread_counts=(2,))
    assert [b["batch"] for b in found["batches"]] == [1, 4]
    assert found["batches"][1]["tokens_per_second"] == pytest.approx(500, rel=0.02)
    assert found["threads_sweep"][0]["threads"] == 2
    assert [c["workload"].get("batch") for c in fake[3:]] == [None, 4, None]
    assert fake[5]["threads"] == 2
    titles = [title for title, _, _ in profile.tables(found)]
    assert titles == ["By batch", "By threads"]


def test_what_fails_beside_the_core_timing_is_a_note(exported, fake, tmp_path):
    def answer(request):
        if request["seed"][1] >= 1000:
            raise client.WorkerFailed("this runtime cannot do it\n  | trace of it")
        return measured(request)

    fake.answer = answer
    options = {"contexts": (32,), "batches": (2,), "idle_seconds": (1.0,), "operators": True}
    found = made(exported, tmp_path / "out", **options)
    assert found["tpot_ms"]["p99"] is not None
    assert (found["contexts"], found["batches"], found["operators"]) == ([], [], None)
    said = ["latency after a pause", "context of 32", "batch of 2", "operators"]
    assert found["notes"] == [f"no {what}: this runtime cannot do it" for what in said]


def test_after_a_pause_the_first_prompt_and_step_are_timed(exported, fake, tmp_path):
    found = made(exported, tmp_path / "out", idle_seconds=(0.5, 2.0))
    entries = found["load_ms"]["idle_resume"]
    assert [e["seconds"] for e in entries] == [0.5, 2.0]
    assert entries[1]["ratio"] == pytest.approx(2, rel=0.05)
    assert entries[1]["step_ratio"] == pytest.approx(2, rel=0.05)
    assert entries[1]["first_step_ms"] == pytest.approx(16, rel=0.05)
    assert fake[3]["idle_seconds"] == [0.5, 2.0]


def test_packed_layers_are_part_of_the_profile(exported, fake, tmp_path, monkeypatch):
    packed = {"layer": "layers.0.qkv", "kind": "packed", "pattern": "2:4", "bits": 4, "bits_per_weight": 3.5}
    packed |= {"rows": 64, "columns": 32}
    rows = [packed, {**packed, "layer": "layers.1.qkv"}]
    rows.append(
        {**packed, "layer": "head", "kind": "tiled", "pattern": "dense", "bits": 8, "bits_per_weight": 8.5}
    )
    about = {"quantize": "int4", "context": 600, "packed": rows}
    (exported.path / "export.json").write_text(json.dumps(about))
    (exported.path / "model.plain.onnx").write_bytes((exported.path / "model.onnx").read_bytes())
    custom = runtime("exporters.custom")
    monkeypatch.setattr(custom, "choose", lambda *_: custom.Chosen("model.onnx"))
    found = made(exported, tmp_path / "p")
    records.check("profile", found, tmp_path)
    assert (found["layers"]["packed"], found["layers"]["tiled"]) == (2, 1)
    assert found["layers"]["bits_per_weight"] == pytest.approx((3.5 * 2 + 8.5) / 3, abs=1e-3)
    assert found["layers"]["graph"] == "model.onnx"
    assert found["layers"]["rows"][0] == {
        "layer": "layers.*.qkv", "count": 2, "kind": "packed", "pattern": "2:4", "bits": 4,
        "bits_per_weight": 3.5, "weights": 4096,
    }  # fmt: skip
    assert profile.brief(found)["layers"] == "2 packed, 1 tiled, 0 dense: 5.17 bits a weight"
    title, _, cells = profile.tables(found)[0]
    assert title == "Layers, 5.17 bits a weight"
    assert cells[0] == ["layers.*.qkv", "2", "packed", "2:4", "int4", "3.5", "4,096"]

    monkeypatch.setattr(custom, "choose", lambda *_: custom.Chosen("model.plain.onnx", plain=True))
    found = made(exported, tmp_path / "q")
    assert found["layers"]["graph"] == "model.plain.onnx"
    assert any("`model.plain.onnx` was measured" in note for note in found["notes"])


def test_operators_come_from_a_process_of_their_own(exported, fake, tmp_path):
    found = made(exported, tmp_path / "out", operators=True, roofline=True)
    assert "operators" not in fake[2]
    assert fake[3]["operators"]
    table = found["operators"]
    assert (table["phase"], table["steps"]) == ("decode", 36)
    assert table["total_ms"] == pytest.approx(6.5)
    assert table["coverage"] == pytest.approx(6.5 / 8, rel=0.02)
    first, second = table["rows"]
    assert (first["operator"], first["kernel"], first["layer"]) == ("MatMul", "CPU MatMul, float", 0)
    assert first["ms"] == 6.0
    assert first["share"] == pytest.approx(6 / 6.5)
    moved = 64 * 64 * 4 + 2 * 64 * 4
    assert (first["bytes"], first["flops"]) == (moved, 2 * 64 * 64)
    assert first["gbs"] == pytest.approx(moved / 6e-3 / 1e9)
    assert first["limit_share"] == pytest.approx(moved / 20e9 / 6e-3)
    assert first["bound"] == "memory"
    assert (second["flops"], second["bound"]) == (None, None)
    assert table["layers"] == [{"layer": 0, "ms": 6.5, "share": 1.0}]
    assert table["prefill"]["rows"][0]["flops"] == 2 * 64 * 64 * 128
    title, columns, rows = profile.tables(found)[0]
    assert "decode step" in title
    assert rows[0][0] == "layers.*.fc (CPU MatMul, float)"
    assert len(rows[0]) == len(columns)
    assert profile.brief(found)["share of the device's limit"].endswith("bound by memory")


def test_the_whole_step_against_the_limit(exported, fake, tmp_path):
    step = made(exported, tmp_path / "out", roofline=True)["roofline"]["step"]
    cache = 2 * 32 * 4  # bytes a token
    assert step["bytes"] == 64 * 64 * 4 + round(cache * (128 + 49 / 2 + 1))
    assert step["flops"] == 2 * 64 * 64
    assert step["measured_ms"] == pytest.approx(8, rel=0.01)
    assert step["limit_ms"] == pytest.approx(step["bytes"] / 20e9 * 1e3)
    assert step["achieved"] == pytest.approx(step["limit_ms"] / step["measured_ms"])
    assert step["bound"] == "memory"


def test_weights_that_fit_the_cache_are_held_against_the_cache(exported, fake, tmp_path, monkeypatch):
    cache = {"cache_read_gbs": 80.0, "cache_bytes": 4 * 64 * 64 * 4, "spread": {"read": 0.5}}
    module = runtime("devices.roofline")
    monkeypatch.setattr(module, "measured", lambda threads: {**LIMITS, **cache})
    found = made(exported, tmp_path / "out", roofline=True)
    assert found["roofline"]["bandwidth_of"] == "last-level cache"
    assert found["roofline"]["step"]["limit_ms"] == pytest.approx(found["roofline"]["step"]["bytes"] / 80e6)
    assert "differed by 50 %" in found["notes"][0]
    cache["cache_bytes"] -= 4
    found = made(exported, tmp_path / "larger", roofline=True)
    assert found["roofline"]["bandwidth_of"] == "memory"
    assert found["roofline"]["bandwidth_gbs"] == 20.0


def test_a_roofline_that_cannot_be_measured_is_a_note(exported, fake, tmp_path, monkeypatch):
    def fails(threads):
        raise DeviceError("no room")

    monkeypatch.setattr(runtime("devices.roofline"), "measured", fails)
    found = made(exported, tmp_path / "out", roofline=True, operators=True)
    assert found["roofline"] is None
    assert "no roofline: no room" in found["notes"]
    assert found["operators"]["rows"][0]["gbs"] is not None
    assert found["operators"]["rows"][0]["limit_share"] is None


def test_operators_that_do_not_add_up_to_the_step_are_noted(exported, fake, tmp_path):
    fake.answer = lambda request: measured(request, step_ms=20.0)
    found = made(exported, tmp_path / "out", operators=True)
    assert found["operators"]["total_ms"] == pytest.approx(6.5)  # not scaled
    assert any("add up to 6.5 ms of a step of 20 ms" in note for note in found["notes"])


def test_energy_and_what_held_the_machine_back(exported, fake, tmp_path):
    found = made(exported, tmp_path / "out", energy=True)
    assert found["energy"]["joules"] == 200.0
    assert found["energy"]["joules_per_token"] == pytest.approx(50 / 125, rel=0.01)
    assert found["clocks"]["mhz_min"] == 1001.0
    assert found["clocks"]["mhz_max"] == 2002.0
    assert found["throttled"] == {"reasons": ["too hot"], "counters": {"steal": 1.0}}
    assert profile.brief(found)["held back"] == "too hot"


def test_a_model_run_by_torch_has_no_operators(fake, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (256, 64), "model.norm.weight": (64,)}
    shapes |= {f"model.layers.{i}.mlp.up_proj.weight": (128, 64) for i in range(2)}
    tensors = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    model = Artifact(folder, "model", "sha256:2", "tiny")
    found = made(model, tmp_path / "out", operators=True, roofline=True)
    assert found["operators"] is None
    assert found["notes"] == ["no operators: torch runs this model, only ONNX Runtime times its operators"]
    parameters = 2 * 128 * 64 + 256 * 64  # the head is the embedding
    step = found["roofline"]["step"]
    cache = 2 * 2 * 2 * 16 * 4
    assert step["flops"] == 2 * parameters
    assert step["bytes"] == 4 * (parameters + 64) + cache * (128 + 49 / 2 + 1)
    assert step["arithmetic"] == "fp32"


def test_a_foreign_graph_has_no_contexts_and_counted_flops(exported, fake, tmp_path):
    fake.answer = lambda request: measured(request, kind="graph")
    graph = Artifact(exported.path / "model.onnx", "graph", "sha256:3", "model.onnx")
    options = {"contexts": (32,), "operators": True, "roofline": True, "shapes": {"x": (1, 1, 64)}}
    found = made(graph, tmp_path / "out", **options)
    assert fake[0]["shapes"] == {"x": (1, 1, 64)}
    assert found["contexts"] == []
    assert found["operators"]["phase"] == "call"
    assert found["roofline"]["step"]["flops"] == 2 * 64 * 64
    assert found["roofline"]["step"]["bytes"] == 64 * 64 * 4
    assert found["ttft_ms"]["reasons"]["p50"] == "a graph generates no tokens"
    assert profile.tables(found)[0][0].startswith("Operators of a call")


def test_shapes_are_for_foreign_graphs(exported, fake, tmp_path):
    with pytest.raises(UsageError, match="foreign graphs"):
        execute(Profile(shapes={"x": (1,)}), {"exported": exported}, tmp_path / "out")


def test_the_trace_and_the_page_are_among_the_products(exported, fake, tmp_path):
    execute(Profile(html=True, **{**CORE, "operators": True}), {"exported": exported}, tmp_path / "out")
    made = read(tmp_path / "out", "profile")
    assert {"profile.json", "trace.json", "report.html"} <= set(made.manifest["files"])
    events = json.loads((made.path / "trace.json").read_text())["traceEvents"]
    assert {"load", "prefill", "decode step", "layers.0.fc"} <= {e["name"] for e in events}


def test_a_real_graph_with_real_processes(exported, tmp_path):
    graph = profile.resolve(_foreign(tmp_path / "foreign.onnx"))
    options = {"threads": 1, "prompts": 12, "processes": 1, "operators": True, "batches": (2,)}
    found = made(graph, tmp_path / "out", **options)
    assert found["kind"] == "graph"
    assert found["latency_ms"]["samples"] > 0
    assert [r["operator"] for r in found["operators"]["rows"]] == ["MatMul"]
    assert found["operators"]["rows"][0]["flops"] == 2 * 8 * 256 * 256
    assert found["batches"][0]["latency_ms"]["p50"] > 0


def _foreign(path):
    weight = numpy_helper.from_array(np.ones((256, 256), np.float32), "w")
    value = helper.make_tensor_value_info
    inputs, outputs = ([value(n, TensorProto.FLOAT, ["batch", 8, 256])] for n in ("x", "y"))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="layers.0.fc")]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path
