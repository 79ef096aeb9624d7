"""Zeroth-order tuning by its commands: trajectories, ranks, coarse weights, exported artefacts."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

SMALL = ["--zo", "--steps", 4, "--set", "batch_size=4", "--set", "dev_limit=8", "--threads", 1, "--json"]
WORDS = ["--template", "{text}", "--label-word", "0=b", "--label-word", "1=g"]


@pytest.fixture(scope="module")
def tune(cli, tiny_model, tiny_data):
    def call(out, *more, model=tiny_model, code=0):
        done = cli("tune", model, tiny_data, "-o", out, *SMALL, *WORDS, *more, code=code)
        return done if code else json.loads(done.stdout)

    return call


@pytest.fixture(scope="module")
def exported(cli, tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "tunable"
    cli("export", tiny_model, "--target", "onnx", "--tunable", "-o", out)
    return out


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_a_run_is_a_trajectory_that_merge_replays(cli, tune, tiny_model, tmp_path):
    made = tune(tmp_path / "d", "--set", "estimate.two_sided=true")
    assert made["in_place"]
    assert (tmp_path / "d" / "trajectory.safetensors").stat().st_size < 16_384
    merged = json.loads(cli("merge", tiny_model, tmp_path / "d", "-o", tmp_path / "m", "--json").stdout)
    assert (merged["verified"], merged["replayed_steps"]) == (True, 4)
    half = json.loads(
        cli("merge", tiny_model, tmp_path / "d", "-o", tmp_path / "h", "--step", 2, "--json").stdout
    )
    assert half["replayed_steps"] == 2
    a, b, c = (weights(f) for f in (tiny_model, tmp_path / "h", tmp_path / "m"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(a[name], b[name])
    assert not np.array_equal(b[name], c[name])


def test_a_trajectory_of_another_base_is_refused_by_its_hash(cli, tune, tiny_model, tmp_path):
    tune(tmp_path / "d")
    cli("merge", tiny_model, tmp_path / "d", "-o", tmp_path / "m")
    refused = cli("merge", tmp_path / "m", tmp_path / "d", "-o", tmp_path / "again", code=3)
    assert "sha256:" in refused.stderr
    assert not (tmp_path / "again").exists()


def test_two_ranks_are_one(tune, tiny_model, tiny_data, tmp_path):
    alone = tune(tmp_path / "one", "--base", "fp64")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "edgesft", "tune", str(tiny_model), str(tiny_data), "-o", str(tmp_path / "two")]
    command += [str(part) for part in (*SMALL, *WORDS, "--base", "fp64")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    both = json.loads(done.stdout)
    assert both["ranks"] == 2
    assert both["loss_last"] == pytest.approx(alone["loss_last"], abs=1e-12)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for one, two in zip(*lines, strict=True):
        if "projected_gradient" in one:
            # a difference of losses of 1e-12 over 2 eps = 2e-3
            assert two["projected_gradient"] == pytest.approx(one["projected_gradient"], abs=1e-9)


@pytest.mark.parametrize("more", [["--base", "int4"], ["--base", "bf16"], ["--compute", "int8"]])
def test_lower_precision(cli, tune, tiny_model, tmp_path, more):
    tune(tmp_path / "d", *more)
    merged = json.loads(cli("merge", tiny_model, tmp_path / "d", "-o", tmp_path / "m", "--json").stdout)
    assert merged["verified"]


def test_layers_on_disk_give_the_bits_of_memory(tune, tmp_path):
    tune(tmp_path / "memory", "--set", "estimate.two_sided=true")
    tune(tmp_path / "disk", "--set", "estimate.two_sided=true", "--offload", tmp_path / "scratch")
    left, right = ((tmp_path / n / "trajectory.safetensors").read_bytes() for n in ("memory", "disk"))
    assert left == right


@pytest.mark.parametrize(
    "more", [["--set", "last_layers=1"], ["--recipe", "fzoo"], ["--recipe", "random-mezo"]]
)
def test_other_queries(cli, tiny_model, tiny_data, tmp_path, more):
    options = [part for part in SMALL if part != "--zo" or "--recipe" not in more]
    done = cli("tune", tiny_model, tiny_data, "-o", tmp_path / "d", *options, *WORDS, *more)
    assert json.loads(done.stdout)["in_place"]


NO_TORCH = """
import sys
from edgesft.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""


def test_an_export_is_tuned_without_torch_and_updated_where_it_lies(
    cli, tune, tiny_model, tiny_data, exported, tmp_path
):
    arguments = ["tune", exported, tiny_data, "-o", tmp_path / "d", *SMALL, *WORDS]
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = json.loads(done.stdout), tune(tmp_path / "torch")
    assert ours["loss_first"] == pytest.approx(theirs["loss_first"], rel=1e-5)
    merged = json.loads(cli("merge", tiny_model, tmp_path / "d", "-o", tmp_path / "m", "--json").stdout)
    assert merged["verified"]
    updated = json.loads(cli("merge", exported, tmp_path / "d", "--in-place", "--json").stdout)
    assert updated["verified"]
    cli("verify", exported, "--against", tmp_path / "m")


def test_an_export_without_tunable_weights_says_how_to_make_one(cli, tune, tiny_model, tmp_path):
    cli("export", tiny_model, "-o", tmp_path / "plain")
    refused = tune(tmp_path / "d", model=tmp_path / "plain", code=3)
    assert "--tunable" in refused.stderr
