import ctypes
import os
import shutil
import subprocess
import sys

import pytest

from edgesft.core.errors import DeviceError
from edgesft.kernels import dispatch, native
from edgesft.kernels.nm_matmul import library, units


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    library._load.cache_clear()
    monkeypatch.setattr(library, "_refused", [])
    yield
    library._load.cache_clear()


def test_without_native_code_there_is_the_reference(monkeypatch):
    monkeypatch.setenv("EDGESFT_NATIVE", "0")
    assert library.load() is None
    with pytest.raises(DeviceError, match="EDGESFT_NATIVE=0") as caught:
        library.path()
    assert "g++" in (caught.value.hint or "")
    assert dispatch.pick("nm_matmul").name == "reference"
    assert "EDGESFT_NATIVE=0" in dispatch.status()["nm_matmul"]["why"]


def test_without_a_compiler_it_says_so_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert library.load() is None
    assert library.load() is None
    assert caplog.text.count("no packed kernels") == 1
    works, why = library.state()
    assert not works
    assert "no C++ compiler" in why


def test_a_compiler_that_fails_is_named(monkeypatch, tmp_path):
    bad = tmp_path / "g++"
    bad.write_text(
        "#!/bin/sh\ncase $1 in --version) echo bad 1;; *) echo 'x.cpp:1: error: no' >&2; exit 1;; esac\n"
    )
    bad.chmod(0o755)
    monkeypatch.setenv("CXX", str(bad))
    monkeypatch.setenv("EDGESFT_CACHE", str(tmp_path / "cache"))
    assert library.load() is None
    assert "error: no" in library.state()[1]


@pytest.mark.skipif(library.load() is None, reason="no compiled kernels on this machine")
def test_a_library_that_came_along_is_taken_only_if_it_fits(monkeypatch, tmp_path):
    import platform

    compiled = library.path()
    library._load.cache_clear()
    monkeypatch.setattr(library, "PREBUILT", tmp_path)
    shutil.copy(compiled, tmp_path / units.NAME)
    assert "compile" in library.state()[1]  # no key, so nobody knows what it was made of
    (tmp_path / library.KEY).write_text("0" * 64)
    assert library._prebuilt() is None
    (tmp_path / library.KEY).write_text(units.key(platform.machine()))
    assert library.state() == (True, "came with the package")
    assert library.path() == tmp_path / units.NAME


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_a_library_of_another_interface_is_refused(monkeypatch, tmp_path):
    import platform

    source = tmp_path / "other.cpp"
    source.write_text('extern "C" int edgesft_nm_abi() { return 99; }')
    monkeypatch.setattr(library, "PREBUILT", tmp_path)
    subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(tmp_path / units.NAME)], check=True)
    (tmp_path / library.KEY).write_text(units.key(platform.machine()))
    assert library.load() is None
    assert "has the interface 99, this edgesft needs 1" in library.state()[1]


def test_a_file_that_is_no_library_is_refused(monkeypatch, tmp_path):
    import platform

    monkeypatch.setattr(library, "PREBUILT", tmp_path)
    (tmp_path / units.NAME).write_bytes(b"nothing")
    (tmp_path / library.KEY).write_text(units.key(platform.machine()))
    assert library.load() is None
    assert not library.state()[0]


@pytest.mark.skipif(library.load() is None, reason="no compiled kernels on this machine")
@pytest.mark.parametrize("name", ["generic", "nonsense", "avx512", "avx2", "neon_dot", "neon"])
def test_the_environment_names_an_instruction_set(name):
    """A machine with less is what `generic` stands for; one that it lacks changes nothing."""
    code = (
        "from edgesft.kernels.nm_matmul import cpu, library\n"
        f"print(cpu.instruction_set(), library.load().edgesft_nm_select({name.encode()!r}))"
    )

    def said(**more):
        kept = {k: v for k, v in os.environ.items() if k != "EDGESFT_ISA"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=kept | more, check=True)
        return done.stdout.split()

    best, (used, present) = said()[0], said(EDGESFT_ISA=name)
    assert used == (name if present == "1" else best)
    assert present == "1" or name != "generic"
    other = ("neon", "neon_dot") if best in ("avx512", "avx2") else ("avx2", "avx512")
    assert present == "0" or name not in (*other, "nonsense")


def test_nothing_is_compiled_for_the_machine_at_hand():
    for machine in ("x86_64", "aarch64", "riscv64"):
        flags = [flag for _, more in units.units(machine) for flag in (*units.COMMON, *more)]
        assert not any("native" in flag for flag in flags)
        assert all(path.is_file() for path, _ in units.units(machine))
    assert units.key("x86_64") != units.key("aarch64")
    assert ctypes.sizeof(ctypes.c_void_p) == 8
    assert native.enabled()
