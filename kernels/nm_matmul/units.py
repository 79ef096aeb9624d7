"""What the library of this folder is compiled from, and how.

Imports nothing but the standard library: the build of a wheel runs it before anything is installed.
"""

import hashlib
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME = "libedgesft_nm.so"
# Contraction into fused multiply-adds would change results between machines; errno and traps only block
# vectorisation. GCC 12 takes the undefined registers of its own AVX-512 headers for mistakes.
COMMON = (
    "-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-Wno-uninitialized", "-Wno-maybe-uninitialized",
)  # fmt: skip
EVERYWHERE = ("linear.cpp", "ort_op.cpp", "strips_generic.cpp")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (
    "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mf16c", "-mfma",
    "-mprefer-vector-width=512",
)  # fmt: skip
DOTPROD = ("-march=armv8.2-a+dotprod",)
Run = Callable[[list[str]], "subprocess.CompletedProcess[str]"]


class Failed(Exception):
    """The compiler's first complaint."""


def units(machine: str) -> list[tuple[Path, tuple[str, ...]]]:
    """Sources with the flags of each. machine: as platform.machine() calls it.

    An instruction set has a file of its own: all others are compiled for any machine of the kind.
    """
    found: list[tuple[Path, tuple[str, ...]]] = [(HERE / name, ()) for name in EVERYWHERE]
    if machine.lower() in ("x86_64", "amd64"):
        found += [(HERE / "strips_avx2.cpp", AVX2), (HERE / "strips_avx512.cpp", AVX512)]
    elif machine.lower() in ("aarch64", "arm64"):
        found += [(HERE / "strips_neon.cpp", ()), (HERE / "strips_neon_dot.cpp", DOTPROD)]
    return found


def key(machine: str) -> str:
    """SHA-256 of all that decides what the library is, but for the compiler."""
    files = sorted((*HERE.glob("*.h"), *HERE.glob("*.cpp"), *HERE.parent.glob("*.h")), key=lambda p: p.name)
    parts = [f.name.encode() + b"\0" + f.read_bytes() for f in files]
    parts.append(repr((COMMON, [(path.name, flags) for path, flags in units(machine)])).encode())
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def build(compiler: Sequence[str], machine: str, out: Path, run: Run | None = None) -> str:
    """Compile and link into `out`; returns the commands. Raises Failed, OSError."""
    made: list[str] = []

    def call(command: list[str]) -> None:
        result = (run or _run)(command)
        if result.returncode:
            lines = result.stderr.strip().split("\n")
            raise Failed(next((line for line in lines if "error" in line.lower()), lines[-1]))
        made.append(" ".join(command))

    objects = []
    jobs = []
    for source, flags in units(machine):
        objects.append(out.with_name(f"{source.stem}.o"))
        jobs.append([*compiler, *COMMON, *flags, "-c", str(source), "-o", str(objects[-1])])
    with ThreadPoolExecutor(max_workers=2) as pool:
        list(pool.map(call, jobs))
    link = [*compiler, "-shared", "-pthread", *map(str, objects), "-o", str(out)]
    try:
        call([*link, "-static-libstdc++", "-static-libgcc"])  # one file for every Linux
    except Failed:
        call(link)
    for each in objects:
        each.unlink()
    return "\n".join(made)


def _run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
