"""Bad input: a clear error, the right exit code, nothing lost, nothing half-written."""

import json
import pickle
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from filelock import FileLock

WORDS = ["--template", "{text} It was", "--label-word", "0= bad", "--label-word", "1= good"]


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the tiny model that may be broken."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def refused(cli, *command, code, out, says):
    done = cli(*command, "-o", out, code=code)
    assert any(line.startswith("error: ") for line in done.stderr.splitlines()), done.stderr
    assert says in done.stderr, done.stderr
    assert not out.exists(), sorted(out.iterdir())


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--recipe", "sparse-mzo"], "did you mean `sparse-mezo`"),
        (["--zo", "--set", "select.use=small-magntude"], "`small-magnitude`"),
        (["--zo", "--set", "select.desnity=0.1"], "`density`"),
        (["--zo", "--set", "select.density=1.5"], "less than or equal to 1"),
        (["--zo", "--set", "lr=-1"], "greater than 0"),
        (["--zo", "--set", "stepz=3"], "`steps`"),
        (["--zo", "--recipe", "lora"], "exclude each other"),
    ],
)
def test_names_and_values_exit_2(cli, tiny_model, tiny_data, tmp_path, more, says):
    refused(cli, "tune", tiny_model, tiny_data, *WORDS, *more, code=2, out=tmp_path / "out", says=says)


def test_bad_pattern_exits_2(cli, tiny_model, tiny_data, tmp_path):
    refused(
        cli, "sparsify", tiny_model, tiny_data, "--pattern", "4:2", code=2, out=tmp_path / "out", says="4:2"
    )
    refused(cli, "sparsify", tiny_model, "--method", "wnda", code=2, out=tmp_path / "out", says="`wanda`")


def test_unknown_target_and_tensorrt(cli, tiny_model, tmp_path):
    refused(cli, "export", tiny_model, "--target", "onxx", code=2, out=tmp_path / "out", says="onxx")
    refused(cli, "export", tiny_model, "--target", "tensorrt", code=4, out=tmp_path / "out", says="tensorrt")


def test_missing_things(cli, tiny_model, tiny_data, tmp_path):
    out = tmp_path / "out"
    refused(cli, "tune", tmp_path / "no", tiny_data, "--zo", code=3, out=out, says="no")
    refused(cli, "tune", tiny_model, tmp_path / "no.jsonl", "--zo", code=3, out=out, says="no.jsonl")
    refused(cli, "merge", tiny_model, tmp_path / "nodelta", code=3, out=out, says="nodelta")
    refused(cli, "tune", "demo:nothing", tiny_data, "--zo", code=2, out=out, says="smollm2-135m")


def test_truncated_weights(cli, model, tiny_data, tmp_path):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(
        cli, "tune", model, tiny_data, "--zo", *WORDS, code=3, out=tmp_path / "out", says="model.safetensors"
    )


def test_flipped_bit_in_an_artefact(cli, tiny_model, tmp_path):
    made = tmp_path / "export"
    cli("export", tiny_model, "-o", made)
    data = next(p for p in made.iterdir() if p.suffix == ".data")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    for command in (
        ["verify", made, "--against", tiny_model],
        ["generate", made, "--prompt", "x"],
        ["inspect", made],
    ):
        done = cli(*command, code=3)
        assert "altered" in done.stderr
    assert bytearray(data.read_bytes()) == content


def test_nan_weights(cli, model, tiny_data, tmp_path):
    from safetensors.numpy import load_file, save_file

    file = model / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = np.nan
    save_file(tensors, file, metadata={"format": "pt"})
    for command in (
        ["export", model],
        ["sparsify", model, tiny_data],
        ["tune", model, tiny_data, "--zo", *WORDS],
    ):
        refused(cli, *command, code=3, out=tmp_path / "out", says=name)


def test_pickle_is_refused_and_not_opened(cli, tiny_model, tiny_data, tmp_path):
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return (open, (str(canary), "w"))

    folder = tmp_path / "pickled"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    refused(
        cli, "tune", folder, tiny_data, "--zo", *WORDS, code=3, out=tmp_path / "out", says="pytorch_model.bin"
    )
    assert not canary.exists()


def test_remote_code_is_not_run(cli, model, tiny_data, tmp_path):
    canary = tmp_path / "canary"
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "evil.py").write_text(f"open({str(canary)!r}, 'w')")
    cli("export", model, "-o", tmp_path / "out", "--dry-run")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"text": "a", "label": 0}\n{"text": "b", "label"\n', "line 2"),
        (b"", "empty"),
        (b'{"text": "a", "label": 0}\n\xff\xfe\n', "line 2"),
        (b'{"other": 1}\n', "other"),
    ],
)
def test_bad_data(cli, tiny_model, tmp_path, content, says):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    refused(cli, "tune", tiny_model, file, "--zo", *WORDS, code=3, out=tmp_path / "out", says=says)


def test_skip_bad_counts(cli, tiny_model, tiny_data, tmp_path):
    file = tmp_path / "some.jsonl"
    file.write_text("{broken\n" + tiny_data.read_text())
    command = ["tune", tiny_model, file, "--zo", "--steps", 1, "--threads", 1, *WORDS]
    refused(cli, *command, code=3, out=tmp_path / "a", says="line 1")
    cli(*command, "--skip-bad", 1, "-o", tmp_path / "b")


def test_label_without_a_word(cli, tiny_model, tmp_path):
    file = tmp_path / "labels.jsonl"
    file.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 7}\n' * 10)
    refused(cli, "tune", tiny_model, file, "--zo", *WORDS, code=3, out=tmp_path / "out", says="7")


def test_output_that_holds_something_else(cli, tiny_model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    done = cli("export", tiny_model, "-o", out, code=3)
    assert "something that is not an artefact" in done.stderr
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]


def test_another_request_in_the_same_place(cli, tiny_model, tmp_path):
    out = tmp_path / "out"
    cli("export", tiny_model, "-o", out)
    before = (out / "manifest.json").read_bytes()
    done = cli("export", tiny_model, "--quantize", "int4", "-o", out, code=3)
    assert "quantize" in done.stderr
    assert (out / "manifest.json").read_bytes() == before


def test_an_export_is_no_model_and_a_model_no_export(cli, tiny_model, tmp_path):
    cli("export", tiny_model, "-o", tmp_path / "x")
    refused(cli, "export", tmp_path / "x", code=3, out=tmp_path / "out", says="onnx")
    cli("verify", tiny_model, "--against", tiny_model, code=3)


def test_delta_of_another_base(cli, tiny_model, model, tiny_data, tmp_path):
    from safetensors.numpy import load_file, save_file

    cli("tune", tiny_model, tiny_data, "--zo", "--steps", 1, "--threads", 1, *WORDS, "-o", tmp_path / "d")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused(cli, "merge", model, tmp_path / "d", code=3, out=tmp_path / "out", says="base")


def test_a_full_disk_leaves_nothing(cli, tiny_model, tiny_data, tmp_path):
    """The limit on a file's size stands in for the disk: 50 kB, and every product is larger."""
    tune = ["tune", tiny_model, tiny_data, "--zo", "--steps", 1, "--threads", 1, *WORDS]
    cli(*tune, "-o", tmp_path / "delta")
    commands = (
        ["merge", tiny_model, tmp_path / "delta"],
        ["sparsify", tiny_model, "--method", "magnitude"],
        ["export", tiny_model],
    )
    for command in commands:
        out = tmp_path / "out"
        line = shlex.join([sys.executable, "-m", "edgesft", *map(str, command), "-o", str(out)])
        done = subprocess.run(
            ["bash", "-c", f"ulimit -f 50; exec {line}"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 3, done.stderr
        assert "no room left" in done.stderr
        assert not out.exists()


def test_two_writers_of_one_folder(cli, tiny_model, tmp_path):
    out = tmp_path / "out"
    partial = out / ".partial"
    partial.mkdir(parents=True)
    with FileLock(partial / "lock"):
        done = cli("export", tiny_model, "-o", out, code=3)
    assert "is being written by" in done.stderr
    cli("export", tiny_model, "-o", out)
