"""Compiling, caching and loading C++; what happens when that fails."""

import ctypes
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edgesft.kernels import native

SOURCE = 'extern "C" int answer() { return 42; }\n'


def compiler():
    try:
        return native.find_compiler()
    except native.Unavailable:
        return None


needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGESFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_refused", {})
    native._load.cache_clear()
    native._asked.cache_clear()
    yield
    native._load.cache_clear()
    native._asked.cache_clear()


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "tiny" / "cpu.cpp"
    path.parent.mkdir()
    path.write_text(SOURCE, encoding="utf-8")
    return path


def script(path, text):
    path.write_text("#!/bin/sh\n" + text, encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@needs_compiler
def test_compiles_once_and_loads_again(source, tmp_path, monkeypatch):
    assert native.state(source) == (True, f"to be compiled at first use by {native.find_compiler().title}")
    library = native.load(source)
    assert isinstance(library, ctypes.CDLL)
    assert library.answer() == 42
    assert native.state(source)[1].startswith("compiled by")

    kept = [p for p in (tmp_path / "cache" / "native").iterdir() if p.is_dir()]
    assert len(kept) == 1
    assert sorted(p.name for p in kept[0].iterdir()) == [
        "command.txt",
        "tiny-cpu.so",
    ]  # no half-made folder stays
    assert "-ffp-contract=off" in (kept[0] / "command.txt").read_text()

    native._load.cache_clear()
    monkeypatch.setattr(native, "build", lambda *_: pytest.fail("compiled again"))
    assert native.load(source).answer() == 42


@needs_compiler
def test_another_source_is_another_library(source):
    assert native.load(source).answer() == 42
    source.write_text(SOURCE.replace("42", "43"), encoding="utf-8")
    native._load.cache_clear()
    assert native.load(source).answer() == 43


@needs_compiler
def test_key_knows_compiler_flags_and_cpu(source, monkeypatch):
    found = native.find_compiler()
    first = native._library(source, found)
    assert native._library(source, native.Compiler(found.command, found.version + "+")) != first
    assert native._library(source, native.Compiler((*found.command, "-O1"), found.version)) != first
    monkeypatch.setattr(native, "_cpu", lambda: "another one")
    assert native._library(source, found) != first


def test_off_by_environment(source, monkeypatch, caplog):
    monkeypatch.setenv("EDGESFT_NATIVE", "0")
    assert native.load(source) is None
    assert native.state(source) == (False, "EDGESFT_NATIVE=0")
    assert not caplog.records


def test_no_compiler_is_one_warning(source, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler-here")
    with caplog.at_level(logging.WARNING):
        assert native.load(source) is None
        assert native.load(source) is None
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "`no-such-compiler-here` not found" in caplog.text
    assert native.state(source) == (False, "no C++ compiler: `no-such-compiler-here` not found")


@needs_compiler
def test_broken_source_is_one_warning_and_leaves_nothing(source, tmp_path, caplog):
    source.write_text("this is no C++\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert native.load(source) is None
    assert len(caplog.records) == 1
    assert "failed" in caplog.text
    assert not [p for p in (tmp_path / "cache" / "native").iterdir() if p.is_dir()]
    assert not native.state(source)[0]


@needs_compiler
def test_falls_back_to_flags_that_work(source, tmp_path, monkeypatch):
    """A compiler that knows neither -march=native nor OpenMP still gives a library."""
    real = native.find_compiler().command[0]
    refusing = 'for a in "$@"; do case "$a" in -march=*|-fopenmp) echo "unknown $a" >&2; exit 1;; esac; done'
    text = f'{refusing}\nexec {real} "$@"\n'
    monkeypatch.setenv("CXX", str(script(tmp_path / "cxx", text)))
    assert native.load(source).answer() == 42
    command = next((tmp_path / "cache" / "native").glob("*/command.txt")).read_text()
    assert "-fopenmp-simd" in command
    assert "-march" not in command


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners here")
def test_a_library_that_others_can_write_is_not_loaded(source, caplog):
    native.load(source)
    path = native._library(source, native.find_compiler())
    path.chmod(0o777)
    native._load.cache_clear()
    assert native.load(source) is None
    assert "another user" in caplog.text


@needs_compiler
def test_a_broken_library_is_a_warning(source, caplog):
    path = native._library(source, native.find_compiler())
    path.parent.mkdir(parents=True, mode=0o700)
    path.write_bytes(b"not a library")
    assert native.load(source) is None
    assert len(caplog.records) == 1


@needs_compiler
def test_two_processes_compile_once(source, tmp_path):
    real = native.find_compiler().command[0]
    log = tmp_path / "log"
    cxx = script(tmp_path / "cxx", f'case "$*" in *-c\\ *) echo once >> {log};; esac\nexec {real} "$@"\n')
    code = (
        "import sys; from pathlib import Path; from edgesft.kernels import native;"
        "c = native.find_compiler(); s = Path(sys.argv[1]); p = native._library(s, c);"
        "native.build(p, lambda to: native._compile(s, c, to)); assert p.exists()"
    )
    env = {**os.environ, "CXX": str(cxx), "EDGESFT_CACHE": str(tmp_path / "cache")}
    both = [subprocess.Popen([sys.executable, "-c", code, str(source)], env=env) for _ in range(2)]
    assert [p.wait(60) for p in both] == [0, 0]
    assert log.read_text().splitlines() == ["once"]


def test_openmp_runtime_comes_with_torch():
    found = native.openmp_runtime(native.Compiler(("g++",), "g++ 12"))
    if sys.platform == "linux":
        assert found is not None
        assert "libgomp" in found.name or "libiomp5" in found.name
    plans = native.plans(native.Compiler(("g++",), "g++ 12"))
    assert all("-ffp-contract=off" in compiling for compiling, _ in plans)
    assert plans[-1][0][-1] == "-fopenmp-simd"
    if found is not None:
        assert plans[0][1][0] == str(Path(found))
