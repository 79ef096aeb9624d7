"""Artefacts appear whole or not at all, say what they are, and are not believed blindly."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgesft.core import artifact
from edgesft.core.artifact import Request
from edgesft.core.errors import ArtifactError

REQUEST = Request("delta", "tune", {"steps": 3, "select": {"density": 0.1}}, {"model": "sha256:1"})


def write(out: Path, request: Request = REQUEST, content: bytes = b"x" * 1000) -> None:
    with artifact.create(out, request) as (work, metrics):
        (work.path / "data.bin").write_bytes(content)
        metrics["loss"] = 1.5


def test_round_trip(tmp_path):
    out = tmp_path / "out"
    write(out)
    found = artifact.read(out, "delta")
    assert found.metrics == {"loss": 1.5}
    assert found.bytes == 1000
    assert sorted(p.name for p in out.iterdir()) == ["data.bin", "manifest.json"]
    assert artifact.finished(out, REQUEST) is not None


def test_digest_survives_a_move(tmp_path):
    write(tmp_path / "a")
    before = artifact.read(tmp_path / "a").digest
    (tmp_path / "a").rename(tmp_path / "b")
    assert artifact.read(tmp_path / "b").digest == before


def test_another_request_is_refused_by_field(tmp_path):
    write(tmp_path / "out")
    other = Request("delta", "tune", {"steps": 3, "select": {"density": 0.2}}, {"model": "sha256:1"})
    with pytest.raises(ArtifactError, match=r"params\.select\.density.*0\.1.*0\.2"):
        artifact.finished(tmp_path / "out", other)


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="not an artefact"):
        artifact.finished(tmp_path, REQUEST)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_wrong_kind(tmp_path):
    write(tmp_path / "out")
    with pytest.raises(ArtifactError, match="of kind `delta`, expected `model`"):
        artifact.read(tmp_path / "out", "model")


def test_every_bit_flip_is_caught(tmp_path):
    out = tmp_path / "out"
    write(out, content=os.urandom(4096))
    file = out / "data.bin"
    good = file.read_bytes()
    rng = random.Random(0)
    for _ in range(100):
        bit = rng.randrange(len(good) * 8)
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        with pytest.raises(ArtifactError, match="altered"):
            artifact.read(out)
    file.write_bytes(good)
    artifact.read(out)


def test_truncation_names_both_sizes(tmp_path):
    write(tmp_path / "out")
    (tmp_path / "out" / "data.bin").write_bytes(b"x" * 400)
    with pytest.raises(ArtifactError, match="has 400 bytes, its manifest says 1000"):
        artifact.read(tmp_path / "out")


def test_an_added_file_is_caught(tmp_path):
    write(tmp_path / "out")
    (tmp_path / "out" / "more.py").write_text("import os")
    with pytest.raises(ArtifactError, match="not listed"):
        artifact.read(tmp_path / "out")


def test_a_manifest_cannot_point_outside(tmp_path):
    out = tmp_path / "out"
    write(out)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"digest": "sha256:0", "bytes": 1}
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="leaves its folder"):
        artifact.read(out)


def test_a_newer_schema_is_refused(tmp_path):
    out = tmp_path / "out"
    write(out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"schema": 99}))
    with pytest.raises(ArtifactError, match="schema 99"):
        artifact.read(out)


def test_bad_input_leaves_nothing(tmp_path):
    out = tmp_path / "deep" / "out"

    def fail():
        with artifact.create(out, REQUEST) as (work, _):
            (work.path / "half").write_bytes(b"half")
            raise ArtifactError("bad")

    with pytest.raises(ArtifactError, match="bad"):
        fail()
    assert not out.exists()


def test_an_interrupted_run_keeps_its_checkpoint_and_resumes(tmp_path):
    out = tmp_path / "out"

    def interrupted():
        with artifact.create(out, REQUEST) as (work, _):
            assert not work.resumed
            (work.checkpoint / "step").write_text("7")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(ArtifactError, match="unfinished"):
        artifact.read(out)
    with artifact.create(out, REQUEST) as (work, _):
        assert work.resumed
        assert (work.checkpoint / "step").read_text() == "7"
    assert artifact.read(out).kind == "delta"


def test_another_request_does_not_take_over_a_checkpoint(tmp_path):
    out = tmp_path / "out"

    def interrupted():
        with artifact.create(out, REQUEST) as (work, _):
            (work.checkpoint / "step").write_text("7")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    other = Request("delta", "tune", {"steps": 4}, {})
    with pytest.raises(ArtifactError, match="unfinished run"):
        artifact.finished(out, other)


def test_two_writers(tmp_path):
    out = tmp_path / "out"
    with (
        artifact.create(out, REQUEST) as (work, _),
        pytest.raises(ArtifactError, match=f"process {os.getpid()} on"),
        artifact.create(out, REQUEST),
    ):
        pass
    with artifact.create(out, REQUEST) as (work, _):
        (work.path / "data").write_bytes(b"1")
    assert artifact.read(out).bytes == 1


def test_modes_follow_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        with artifact.create(tmp_path / "out", REQUEST) as (work, _):
            file = work.path / "data"
            file.write_bytes(b"1")
            file.chmod(0o600)
    finally:
        os.umask(old)
    assert (tmp_path / "out" / "data").stat().st_mode & 0o777 == 0o644


KILLED = """
import sys
from pathlib import Path
from edgesft.core import artifact
from edgesft.core.artifact import Request
out = Path(sys.argv[1])
print("ready", flush=True)
with artifact.create(out, Request("delta", "tune", {}, {})) as (work, metrics):
    for i in range(8):
        (work.path / f"part{i}").write_bytes(bytes([i]) * 200_000)
"""


def test_kill_at_any_moment(tmp_path):
    """After kill -9 there is nothing that looks whole; the next start finishes it, bit for bit."""
    rng = random.Random(0)
    out = tmp_path / "out"
    request = Request("delta", "tune", {}, {})
    for _ in range(12):
        child = subprocess.Popen([sys.executable, "-c", KILLED, out], stdout=subprocess.PIPE)
        child.stdout.readline()
        time.sleep(rng.uniform(0, 0.03))
        child.send_signal(signal.SIGKILL)
        child.wait()
        if (out / "manifest.json").exists():
            artifact.read(out)
            break
        assert artifact.finished(out, request) is None
    with artifact.create(out, request) as (work, _):
        for i in range(8):
            (work.path / f"part{i}").write_bytes(bytes([i]) * 200_000)
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", *(f"part{i}" for i in range(8))]
    artifact.read(out)


def test_a_full_disk_is_an_error_with_nothing_left(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from edgesft.core import artifact, stage\n"
        "from edgesft.core.errors import ArtifactError\n"
        "class Big:\n"
        "    name, gives = 'big', 'delta'\n"
        "    def params(self): return {}\n"
        "    def problems(self, inputs): return []\n"
        "    def run(self, inputs, work): (work.path / 'big').write_bytes(b'0' * 100_000); return {}\n"
        "try:\n    stage.execute(Big(), {}, Path(sys.argv[1]))\n"
        "except ArtifactError as error:\n    assert 'no room' in error.message; sys.exit(3)\n"
    )
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", code, out], check=False, timeout=60)
    assert done.returncode == 3
    assert not out.exists()
