"""Compile the C++ of a kernel at first use and load it through ctypes.

The library is kept in `<cache>/native/<key>/`, where <cache> is $EDGESFT_CACHE or the user's cache folder
and the key is the SHA-256 of source, commands, compiler version and CPU. $CXX names the compiler;
EDGESFT_NATIVE=0 turns native code off. Whatever fails, `load` returns None after one warning: callers have a
reference. Importing this module does not import torch.
"""

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgesft.core import cache

log = logging.getLogger(__name__)

_COMPILERS = ("g++", "clang++", "c++")
_TIMEOUT = 300.0  # seconds a compiler, or the wait for another process that compiles, may take
# Contraction into fused multiply-adds would change results between machines; errno and traps only block
# vectorisation. GCC keeps to half of the AVX-512 registers unless told otherwise.
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_X86 = ("-mprefer-vector-width=512",)


@dataclass(frozen=True)
class Compiler:
    """command: its path and any arguments from $CXX; version: all it says about itself."""

    command: tuple[str, ...]
    version: str

    @property
    def title(self) -> str:
        return self.version.splitlines()[0] if self.version else self.command[0]

    @property
    def is_clang(self) -> bool:
        return "clang" in self.version


class Unavailable(Exception):
    """Native code cannot be had; the text says why."""


def enabled() -> bool:
    return os.environ.get("EDGESFT_NATIVE", "1") != "0"


def load(source: Path) -> ctypes.CDLL | None:
    """The library made of `source`, compiled if need be; None where there is none (warned of once)."""
    if not enabled():
        return None
    return _load(source)


def state(source: Path) -> tuple[bool, str]:
    """Whether `load` should work and why, without compiling or loading anything."""
    if not enabled():
        return False, "EDGESFT_NATIVE=0"
    if source in _refused:
        return False, _refused[source]
    try:
        compiler = find_compiler()
        built = _library(source, compiler).exists()
    except (Unavailable, OSError) as error:
        return False, str(error)
    return True, f"{'compiled' if built else 'to be compiled at first use'} by {compiler.title}"


_refused: dict[Path, str] = {}


def refuse(source: Path, why: str) -> None:
    """Note, with a warning, that the library of `source` is not used in this process."""
    _refused[source] = why
    log.warning("no native code for `%s`, plain torch is used: %s", source.parent.name, why)


@functools.cache
def _load(source: Path) -> ctypes.CDLL | None:
    try:
        path = _library(source, find_compiler())
        if not path.exists():
            compiler = find_compiler()
            build(path, lambda to: _compile(source, compiler, to))
        trusted(path)
        return ctypes.CDLL(str(path))
    except (Unavailable, OSError) as error:
        refuse(source, str(error))
        return None


@functools.cache
def _asked(command: str) -> Compiler:
    """The compiler that `command` ($CXX, may be empty) names. Raises Unavailable."""
    wanted = shlex.split(command)
    found = next(
        (path for name in ([wanted[0]] if wanted else _COMPILERS) if (path := shutil.which(name))), None
    )
    if found is None:
        names = wanted[:1] or _COMPILERS
        raise Unavailable("no C++ compiler: " + ", ".join(f"`{name}`" for name in names) + " not found")
    result = run([found, "--version"])
    if result.returncode:
        raise Unavailable(f"`{found} --version` failed")
    return Compiler((found, *wanted[1:]), result.stdout.strip())


def find_compiler() -> Compiler:
    """The C++ compiler to be used. Raises Unavailable."""
    return _asked(os.environ.get("CXX", "").strip())


def run(command: list[str]) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"`{command[0]}` did not finish in {_TIMEOUT:.0f} s") from None


@functools.cache
def _cpu() -> str:
    """What -march=native depends on."""
    lines = [platform.machine(), platform.system()]
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return " ".join([*lines, platform.processor(), platform.version()])
    keys = ("vendor_id", "model name", "flags", "Features", "CPU part")
    firsts = {line.split(":", 1)[0].strip(): line for line in reversed(text.splitlines()) if ":" in line}
    return "\n".join(lines + [firsts[key] for key in keys if key in firsts])


def openmp_runtime(compiler: Compiler) -> Path | None:
    """The OpenMP library inside torch that fits the compiler's calls: one runtime, one pool of threads."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    patterns = ("libomp*", "libiomp5*") if compiler.is_clang else ("libgomp*", "libiomp5*")
    for folder in (root / "lib", root.parent / "torch.libs"):
        for pattern in patterns:
            for path in sorted(folder.glob(pattern)):
                if ".so" in path.name or path.suffix == ".dylib":
                    return path
    return None


def plans(compiler: Compiler) -> list[tuple[list[str], list[str]]]:
    """Flags for compiling and for linking, best first: torch's OpenMP, the compiler's own, none; then the
    same without knowledge of the CPU."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    native = [*_FLAGS, "-mcpu=native" if sys.platform == "darwin" and not x86 else "-march=native"]
    runtime = openmp_runtime(compiler)
    found: list[tuple[list[str], list[str]]] = []
    for flags in ([*native, *(_X86 if x86 else ())], list(_FLAGS)):
        if runtime is not None:
            found.append(([*flags, "-fopenmp"], [str(runtime), f"-Wl,-rpath,{runtime.parent}"]))
        found.append(([*flags, "-fopenmp"], ["-fopenmp"]))
        found.append(([*flags, "-fopenmp-simd"], []))
    return found


def cache_root() -> Path:
    """Where compiled libraries are kept."""
    return cache.folder() / "native"


def _library(source: Path, compiler: Compiler) -> Path:
    """Where the library of `source` lies or will lie."""
    headers = sorted((*source.parent.glob("*.h"), *source.parent.parent.glob("*.h")))
    parts = [
        source.read_bytes(),
        *(h.read_bytes() for h in headers),
        compiler.version.encode(),
        _cpu().encode(),
    ]
    parts += [repr((compiler.command, plans(compiler))).encode()]
    key = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    return cache_root() / key / f"{source.parent.name}-{source.stem}.so"


def trusted(path: Path) -> None:
    """Raise Unavailable when somebody else could have put the library there."""
    if not hasattr(os, "getuid"):
        return
    for each in (path, path.parent):
        found = each.stat()
        if found.st_uid not in (os.getuid(), 0) or found.st_mode & 0o002:
            raise Unavailable(f"`{each}` belongs to or can be written by another user")


def build(path: Path, make: Callable[[Path], str]) -> None:
    """Let `make` compile a library at the path that it is given, and move it to `path`, folder and all.

    make returns the commands, which are kept beside it. A second process waits for the first.
    Raises Unavailable, OSError.
    """
    import filelock

    root = path.parent.parent
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with filelock.FileLock(root / f"{path.parent.name}.lock", timeout=_TIMEOUT):
            if path.exists():
                return
            with tempfile.TemporaryDirectory(dir=root, prefix="build-") as folder:
                made = Path(folder) / "made"
                made.mkdir(mode=0o700)
                command = make(made / path.name)
                (made / "command.txt").write_text(command + "\n", encoding="utf-8")
                shutil.rmtree(path.parent, ignore_errors=True)
                made.rename(path.parent)
    except filelock.Timeout:
        raise Unavailable("another process has been compiling it for too long") from None


def first_error(text: str) -> str:
    lines = text.strip().split("\n")
    return next((line for line in lines if "error" in line.lower()), lines[-1])


def _compile(source: Path, compiler: Compiler, path: Path) -> str:
    """Try the plans in turn; returns the commands that worked. Raises Unavailable."""
    complaint = ""
    for compiling, linking in plans(compiler):
        part = path.with_suffix(".o")
        compile_ = [*compiler.command, *compiling, "-c", str(source), "-o", str(part)]
        link = [*compiler.command, "-shared", str(part), *linking, "-o", str(path)]
        for command in (compile_, link):
            result = run(command)
            if result.returncode:
                complaint = complaint or first_error(result.stderr)
                break
        else:
            part.unlink()
            return f"{shlex.join(compile_)}\n{shlex.join(link)}"
    raise Unavailable(f"{compiler.title} failed: {complaint or 'without a message'}")
