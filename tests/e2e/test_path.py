"""The whole path on a tiny random model, through the command line."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

WORDS = ["--template", "{text} It was", "--label-word", "0= bad", "--label-word", "1= good"]


@pytest.fixture(scope="module")
def made(cli, tiny_model, tiny_data, tmp_path_factory):
    """Folder with every artefact of the path, made once."""
    out = tmp_path_factory.mktemp("path")
    cli("tune", tiny_model, tiny_data, "--zo", "--steps", 4, "--threads", 1, *WORDS, "-o", out / "delta")
    cli("merge", tiny_model, out / "delta", "-o", out / "merged")
    cli(
        "sparsify", out / "merged", tiny_data, "--pattern", "2:4", "--method", "wanda", "--samples", 4,
        "--length", 32, "--threads", 1, "-o", out / "sparse",
    )  # fmt: skip
    cli("export", out / "sparse", "--target", "onnx", "-o", out / "fp32")
    cli("export", out / "sparse", "--target", "onnx", "--quantize", "int4", "-o", out / "int4")
    return out


def test_tune_changes_only_small_weights(made, tiny_model):
    from safetensors.numpy import load_file

    before, after = (
        load_file(tiny_model / "model.safetensors"),
        load_file(made / "merged" / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    changed = 0
    for name, old in before.items():
        moved = old != after[name]
        if "proj" not in name:
            assert not moved.any(), name
            continue
        changed += moved.sum()
        threshold = np.quantile(np.abs(old), 0.25)
        assert np.abs(old[moved]).max() <= threshold * 1.01, name
        assert moved.mean() == pytest.approx(0.25, abs=0.01)
    assert changed > 0


def test_merged_and_sparse_load_without_us(made):
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert not any(n.split('.')[0] == 'edgesft' for n in sys.modules)\n"
    )
    for name in ("merged", "sparse"):
        subprocess.run([sys.executable, "-c", code, made / name], check=True, timeout=120)


def test_exactly_two_zeros_in_every_group(made):
    from safetensors.numpy import load_file

    tensors = load_file(made / "sparse" / "model.safetensors")
    dense = load_file(made / "merged" / "model.safetensors")
    pruned = [name for name in tensors if "proj" in name]
    assert len(pruned) == 14
    for name, weight in tensors.items():
        if name in pruned:
            zeros = (weight.reshape(weight.shape[0], -1, 4) == 0).sum(-1)
            assert (zeros == 2).all(), name
        else:
            assert np.array_equal(weight, dense[name]), name


@pytest.mark.parametrize("form", ["fp32", "int4"])
def test_verify_says_yes(cli, made, form):
    report = json.loads(cli("verify", made / form, "--against", made / "sparse", "--json").stdout)
    assert report["ok"] is True
    assert report["first_departing_layer"] is None


def test_verify_names_the_model_that_was_not_exported(cli, made, tiny_model):
    done = cli("verify", made / "fp32", "--against", tiny_model, code=1)
    assert "error:" in done.stderr


def test_torch_and_export_agree_on_every_prediction(cli, made, tiny_data):
    results = [
        json.loads(
            cli("eval", made / form, tiny_data, *WORDS, "--json", "--predictions", "--threads", 1).stdout
        )
        for form in ("sparse", "fp32")
    ]
    assert results[0]["predictions"] == results[1]["predictions"]
    for result in results:
        assert {"accuracy", "loss", "perplexity", "examples", "intervals"} <= result.keys()
        assert result["examples"] == len(result["predictions"]) > 0
        low, high = result["intervals"]["accuracy"]
        assert 0 <= low <= result["accuracy"] <= high <= 1
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], abs=1e-4)


def test_generate_gives_the_same_text_on_both(cli, made):
    results = [
        json.loads(cli("generate", made / form, "--prompt", "a sad", "--max-new-tokens", 8, "--json").stdout)
        for form in ("sparse", "fp32")
    ]
    assert results[0]["text"] == results[1]["text"]
    assert all(r["ttft_ms"] > 0 and r["decode_tokens_per_second"] > 0 for r in results)


def test_profile_has_its_keys(cli, made):
    out = made / "profile"
    record = json.loads(
        cli("profile", made / "int4", "-o", out, "--prompt-tokens", 16, "--decode-tokens", 20,
            "--prompts", 4, "--processes", 1, "--threads", 1, "--json").stdout
    )  # fmt: skip
    assert {
        "ttft_ms", "tpot_ms", "tokens_per_second", "peak_memory_bytes", "artifact_bytes", "fingerprint",
        "samples",
    } <= record.keys()  # fmt: skip
    assert record["tpot_ms"]["p50"] > 0
    assert record["tpot_ms"]["p99"] is None
    assert "662" in json.dumps(record["tpot_ms"])
    assert record["artifact_bytes"] > 0
    assert json.loads((out / "profile.json").read_text())["tpot_ms"] == record["tpot_ms"]


def test_gate_fires_on_a_slow_head(cli, made):
    done = cli("gate", "--base", made / "fp32", "--head", made / "fp32", "--drill-slowdown", 60,
               "--threads", 1, "--max-pairs", 16, "--json", code=10)  # fmt: skip
    report = json.loads(done.stdout)
    assert report["verdict"] == "fail"
    assert report["ratio"] > 1.2


def test_the_same_request_is_not_run_twice(cli, made, tiny_model):
    before = (made / "merged" / "manifest.json").stat().st_mtime_ns
    done = cli("merge", tiny_model, made / "delta", "-o", made / "merged")
    assert "up to date" in done.stderr
    assert (made / "merged" / "manifest.json").stat().st_mtime_ns == before


def test_a_dry_run_tells_the_plan_and_writes_nothing(cli, made, tiny_model, tiny_data, recipe, tmp_path):
    out = tmp_path / "out"
    commands = (
        ["tune", tiny_model, tiny_data, "--zo", *WORDS],
        ["merge", tiny_model, made / "delta"],
        ["sparsify", tiny_model, tiny_data],
        ["export", tiny_model],
        ["eval", tiny_model, tiny_data, *WORDS],
        ["profile", made / "int4", "--prompt-tokens", 8],
        ["gate", "--base", made / "int4", "--head", made / "fp32"],
        ["run", recipe, tiny_model, tiny_data, *WORDS],
    )
    for command in commands:
        plan = json.loads(cli(*command, "-o", out, "--dry-run", "--json").stdout)
        assert plan["out"] == str(out)
        assert not out.exists(), command


def test_inspect_tells_where_it_came_from(cli, made):
    record = json.loads(cli("inspect", made / "delta", "--json").stdout)
    assert record["kind"] == "delta"
    assert record["params"]["select"] == {"use": "small-magnitude", "density": 0.25}
    assert 0.2 < record["metrics"]["trained_fraction"] < 0.3


RECIPE = """
# A small path.
[tune]
steps = 30
batch_size = 4
select = { use = "small-magnitude" }
delta = { use = "sparse" }
estimate = { use = "spsa" }
objective = { use = "task" }
[merge]
[sparsify]
samples = 4
length = 32
compress = { use = "magnitude" }
[export]
[verify]
[eval]
[profile]
prompt_tokens = 8
decode_tokens = 8
prompts = 4
processes = 1
prefill_seconds = 0
contexts = [16]
idle_seconds = []
roofline = false
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "small.toml"
    file.write_text(RECIPE)
    return file


def test_a_killed_run_goes_on_and_a_complete_one_does_nothing(cli, recipe, tiny_model, tiny_data, tmp_path):
    command = ["run", recipe, tiny_model, tiny_data, *WORDS, "--threads", "1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    cli(*command, "-o", whole)
    rng = random.Random(1)
    for _ in range(3):
        child = subprocess.Popen(
            [sys.executable, "-m", "edgesft", *map(str, command), "-o", killed],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ,
        )  # fmt: skip
        time.sleep(rng.uniform(3, 8))
        child.send_signal(signal.SIGKILL)
        child.wait()
    cli(*command, "-o", killed)
    for name in ("tuned", "sparse", "export"):
        manifests = [json.loads((root / name / "manifest.json").read_text()) for root in (whole, killed)]
        assert manifests[0]["files"] == manifests[1]["files"], name
    assert "<svg" in (killed / "report.html").read_text()
    again = cli(*command, "-o", killed)
    assert "already complete" in again.stderr
    summary = json.loads(cli(*command, "-o", killed, "--json").stdout)
    assert summary["ran"] == 0
    assert [v["stage"] for v in summary["variants"]] == [
        "pretrained", "tuned", "sparse", "dense export", "sparse export",
    ]  # fmt: skip
