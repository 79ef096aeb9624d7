"""The kernels in a program of their own: under sanitizers, and for ARM in an emulator."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgesft.kernels.nm_matmul import units

NATIVE = Path(__file__).parents[3] / "native"
SELFTEST, ALLOCATIONS = NATIVE / "nm_selftest.cpp", NATIVE / "nm_allocations.cpp"
WAYS = ("malloc", "calloc", "realloc", "aligned_alloc", "posix_memalign", "mmap")  # to memory


def program(folder, compiler, machine, flags, main=SELFTEST, linking=()):
    """The program of `main`, its units compiled for `machine`; None where it cannot be linked so."""
    sources = [(path, more) for path, more in units.units(machine) if path.name != "ort_op.cpp"]
    sources.append((main, (f"-I{units.HERE}",)))
    common = [flag for flag in units.COMMON if flag != "-O3"]

    def compiled(job):
        source, more = job
        out = folder / f"{source.stem}.o"
        command = [compiler, *common, *flags, *more, "-c", str(source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:2000]
        return str(out)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    out = folder / "selftest"
    done = subprocess.run(
        [compiler, *flags, *objects, *linking, "-pthread", "-o", str(out)], capture_output=True, text=True
    )
    return out if done.returncode == 0 else None


def passes(command, *sets):
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    said = done.stdout.strip().split("\n")[-1]
    assert said.endswith(": 0 failures")
    assert all(f" {name}" in said for name in ("generic", *sets)), said


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_no_sanitizer_complains(tmp_path):
    import platform

    flags = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    built = program(tmp_path, "g++", platform.machine(), flags)
    if built is None:
        pytest.skip("this g++ has no sanitizers")
    passes([str(built)])


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_products_allocate_nothing_once_they_ran(tmp_path):
    """Of any kind of matrix, any number of rows, on two threads."""
    import platform

    wrapped = [f"-Wl,--wrap={way}" for way in WAYS]
    built = program(tmp_path, "g++", platform.machine(), ("-O2",), ALLOCATIONS, wrapped)
    if built is None:
        pytest.skip("this linker cannot wrap functions")
    done = subprocess.run([str(built)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    assert done.stdout.endswith("calls without an allocation: 0 failures\n")
    assert int(done.stdout.split()[0]) > 100


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("qemu-aarch64") is None,
    reason="g++-aarch64-linux-gnu and qemu-user are not installed",
)
def test_arm_gives_the_same_bits(tmp_path):
    built = program(tmp_path, "aarch64-linux-gnu-g++", "aarch64", ("-O2", "-static"))
    assert built is not None
    passes(["qemu-aarch64", "-cpu", "max", str(built)], "neon", "neon_dot")
    older = subprocess.run(
        ["qemu-aarch64", "-cpu", "cortex-a53", str(built)], capture_output=True, text=True, timeout=600
    )
    assert older.returncode == 0, older.stdout[-2000:]
    assert " neon:" in older.stdout  # a core without dotprod does not get it
