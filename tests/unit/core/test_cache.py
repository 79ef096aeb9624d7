"""What is made once in the cache: waited for, checked, made again when altered, never half there."""

import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from edgesft.core import artifact, cache
from edgesft.core.artifact import Artifact
from edgesft.core.errors import ArtifactError

Make = Callable[[Path], None]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGESFT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("weights", bytes(range(256)) * 40)
        archive.writestr("../outside", "x")
        archive.writestr("bomb", bytes(10 << 20))
    return file


def made(source: Path, make: Make) -> Artifact:
    return cache.model(source, "copy-1", make, "ref")


def test_it_is_made_once_and_again_when_altered(source: Path) -> None:
    calls: list[Path] = []

    def make(out: Path) -> None:
        calls.append(out)
        (out / "config.json").write_text("{}")

    first = made(source, make)
    assert made(source, make).digest == first.digest
    assert (len(calls), first.kind, first.ref) == (1, "model", "ref")
    (first.path / "config.json").write_text("[]")
    assert made(source, make).digest == first.digest
    assert len(calls) == 2
    source.write_bytes(source.read_bytes() + b"x")  # another content, another place
    assert made(source, make).path != first.path


def test_a_failure_leaves_nothing_to_be_taken_for_a_model(source: Path) -> None:
    def fail(out: Path) -> None:
        (out / "config.json").write_text("{}")
        raise ArtifactError("broken")

    with pytest.raises(ArtifactError, match="broken"):
        made(source, fail)
    home = cache.folder() / "models"
    assert not list(home.glob("*/config.json"))
    assert not list(home.glob("*/manifest.json"))

    def full(out: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ArtifactError, match="cache folder") as caught:
        made(source, full)
    assert "EDGESFT_CACHE" in (caught.value.hint or "")


def test_a_second_caller_waits_for_the_first(source: Path) -> None:
    begun, go = threading.Event(), threading.Event()
    digests: list[str] = []

    def slow(out: Path) -> None:
        begun.set()
        assert go.wait(20)
        (out / "config.json").write_text("{}")

    def never(out: Path) -> None:
        raise AssertionError("made twice")

    one = threading.Thread(target=lambda: digests.append(made(source, slow).digest))
    one.start()
    assert begun.wait(20)
    two = threading.Thread(target=lambda: digests.append(made(source, never).digest))
    two.start()
    go.set()
    one.join(20)
    two.join(20)
    assert len(digests) == 2
    assert len(set(digests)) == 1


def test_only_wanted_members_come_out(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    cache.unzip(source, out, {"config.json": "config.json", "weights": "model.safetensors"})
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "model.safetensors"]
    assert (out / "model.safetensors").read_bytes() == bytes(range(256)) * 40
    assert artifact.digest_file(out / "config.json").startswith("sha256:")


@pytest.mark.parametrize(
    ("member", "name", "words"),
    [("bomb", "bomb", "unfolds"), ("absent", "x", "incomplete"), ("../outside", "../x", "leaves its folder")],
)
def test_bad_members_are_refused(source: Path, tmp_path: Path, member: str, name: str, words: str) -> None:
    with pytest.raises(ArtifactError, match=words):
        cache.unzip(source, tmp_path, {member: name})
    assert not (tmp_path.parent / "x").exists()


def test_a_broken_archive_is_refused(source: Path, tmp_path: Path) -> None:
    data = source.read_bytes()
    source.write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match="archive"):
        cache.unzip(source, tmp_path, {"config.json": "config.json"})
