"""An export with packed layers in unmodified ONNX Runtimes: this one, an older one, and from C."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from safetensors.torch import load_file, save_file

from edgesft.core import models
from edgesft.core.artifact import Artifact
from edgesft.core.stage import execute
from edgesft.exporters.description import MODEL, PLAIN
from edgesft.kernels.nm_matmul import library
from edgesft.stages.export import Export

pytestmark = pytest.mark.skipif(library.load() is None, reason="no compiled kernels on this machine")
ROOT = Path(__file__).parents[3]
# `make` puts an older wheel of ONNX Runtime there; only one can be installed in an environment
OLD = Path(os.environ.get("EDGESFT_OLD_ONNXRUNTIME") or Path(sys.prefix) / "onnxruntime-1.22")
needs_old = pytest.mark.skipif(
    not (OLD / "onnxruntime").is_dir(), reason=f"no older ONNX Runtime in {OLD}, `make unit` puts it there"
)

# argv: graph, library or -, layers, kv_heads, head_dim, where the results go
SESSION = """
import sys, numpy as np, onnxruntime as ort
graph, library, layers, heads, dim, out = sys.argv[1:]
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
options.add_session_config_entry("session.disable_quant_qdq", "1")
if library != "-":
    options.register_custom_ops_library(library)
session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
empty = np.zeros((1, int(heads), 0, int(dim)), np.float32)
names = [f"{i}.{part}" for i in range(int(layers)) for part in ("key", "value")]
cache = {f"past_key_values.{name}": empty for name in names}
wanted = ["logits", *(f"present.{name}" for name in names)]
feed, tokens, logits = np.array([[1, 2, 3, 4, 5]]), [], []
for length in range(5, 21):
    found, *present = session.run(
        wanted, {"input_ids": feed, "attention_mask": np.ones((1, length), np.int64), **cache}
    )
    cache = dict(zip(cache, present))
    logits.append(found[-1])
    tokens.append(int(found[-1].argmax()))
    feed = np.array([[tokens[-1]]])
np.savez(out, logits=np.stack(logits), tokens=tokens)
print(ort.__version__)
"""


@pytest.fixture(scope="module")
def packed(tiny_model, tmp_path_factory):
    """The export of a model that is 2:4, its activations in float32."""
    root = tmp_path_factory.mktemp("runtimes")
    shutil.copytree(tiny_model, root / "model")
    file = root / "model" / "model.safetensors"
    tensors = load_file(file)
    for name, w in tensors.items():
        if "proj" in name:
            groups = w.reshape(w.shape[0], -1, 4)
            groups.scatter_(-1, groups.abs().argsort(-1)[..., :2], 0.0)
    save_file(tensors, file, metadata={"format": "pt"})
    found = models.resolve(str(root / "model"))
    model = Artifact(found.path, found.kind, found.digest, found.ref, {})
    stage = Export(quantize="int4", sparse="always", accuracy_level=0)
    return execute(stage, {"model": model}, root / "out")[0].path


def environment(old):
    return {**os.environ, "PYTHONPATH": f"{OLD}{os.pathsep}{ROOT}" if old else str(ROOT)}


def answer(packed, graph, old, out):
    about = json.loads((packed / "export.json").read_text())
    numbers = [str(about[key]) for key in ("layers", "kv_heads", "head_dim")]
    ours = str(library.path()) if graph == MODEL else "-"
    command = [sys.executable, "-c", SESSION, str(packed / graph), ours, *numbers, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(old), timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == ort.__version__ if not old else done.stdout.startswith("1.22.")
    return np.load(out)


def agree(one, other):
    assert list(one["tokens"]) == list(other["tokens"])
    scale = np.abs(one["logits"]).max()
    np.testing.assert_allclose(one["logits"], other["logits"], atol=2e-5 * scale)


@needs_old
@pytest.mark.parametrize("graph", [MODEL, PLAIN])
def test_an_older_runtime_gives_the_same(packed, tmp_path, graph):
    newest = answer(packed, graph, False, tmp_path / "new.npz")
    agree(newest, answer(packed, graph, True, tmp_path / "old.npz"))


def test_the_plain_graph_needs_no_module_and_no_library_of_ours(packed, tmp_path):
    agree(
        answer(packed, MODEL, False, tmp_path / "ours.npz"),
        answer(packed, PLAIN, False, tmp_path / "plain.npz"),
    )


@pytest.mark.parametrize("old", [False, pytest.param(True, marks=needs_old)])
def test_the_python_example(packed, old):
    said = []
    for more in (["--library", str(library.path())], [], ["--fallback"]):
        done = subprocess.run(
            [
                sys.executable,
                "examples/onnxruntime_plain.py",
                str(packed),
                "--new",
                "12",
                "--threads",
                "1",
                *more,
            ],
            capture_output=True,
            text=True,
            env=environment(old) | ({"EDGESFT_NATIVE": "0"} if "--fallback" in more else {}),
            cwd=ROOT,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stderr == ""
        text, graph, rate = done.stdout.splitlines()[-3:]
        assert (PLAIN if "--fallback" in more else MODEL) in graph
        assert rate.startswith("12 tokens")
        said.append(text)
    assert said[0] == said[1]
    if old:  # newer ones compute with activations in int8 in the fallback
        assert said[2] == said[0]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_the_c_example(packed, tmp_path):
    """Against our own declarations of the interface, or the real ones in $ORT_INCLUDE."""
    folder = Path(ort.__file__).parent / "capi"
    shared = next(folder.glob("libonnxruntime.so.*"), None)
    if shared is None:
        pytest.skip(f"this wheel has no shared library in {folder}")
    (tmp_path / "libonnxruntime.so.1").symlink_to(shared)
    include = os.environ.get("ORT_INCLUDE") or str(ROOT / "tests" / "native")
    command = [
        "cc",
        "-Wall",
        "-Wextra",
        "-Werror",
        str(ROOT / "examples" / "onnxruntime_c.c"),
        f"-I{include}",
    ]
    program = tmp_path / "step"
    done = subprocess.run([*command, str(shared), "-o", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    about = json.loads((packed / "export.json").read_text())
    numbers = [str(about[key]) for key in ("layers", "kv_heads", "head_dim", "vocabulary")]
    from edgesft.exporters.runtime import generate, load

    (expected,) = generate(load(packed, threads=1), [1, 2, 3, 4], 1).tokens
    for graph, ours in ((MODEL, str(library.path())), (PLAIN, "-")):
        done = subprocess.run(
            [str(program), str(packed / graph), ours, *numbers],
            capture_output=True,
            text=True,
            env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"next token: {expected}\n"
    refused = subprocess.run(
        [str(program), str(packed / MODEL), "-", *numbers],
        capture_output=True,
        text=True,
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)},
        timeout=120,
    )
    assert refused.returncode == 1
    assert "Packed" in refused.stderr  # the runtime names the operation that it lacks
