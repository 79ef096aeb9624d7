"""The compiled library of this folder: one for ctypes, torch and ONNX Runtime.

A wheel for a platform brings it along, in `prebuilt/`; anywhere else it is compiled at first use, by a C++
compiler alone, into the cache (kernels/native.py). It asks the processor at run time what it may use, so the
machine that compiled it does not matter.
"""

import ctypes
import functools
import hashlib
import platform
from pathlib import Path
from typing import Final

from edgesft.core.errors import DeviceError
from edgesft.kernels import native
from edgesft.kernels.nm_matmul import units

ABI: Final = 1  # of nm.h
PREBUILT = Path(__file__).resolve().parent / "prebuilt"
KEY: Final = "key.txt"  # beside the library: `units.key` of what it was made of
_HINT = "install g++ (Debian: `apt install g++`), or a wheel of edgesft made for this platform"


def load() -> ctypes.CDLL | None:
    """The library; None where there is none, warned of once."""
    return _load() if native.enabled() else None


def path() -> Path:
    """Where the library lies. Raises DeviceError where there is none."""
    library = load()
    if library is None:
        raise DeviceError(f"packed weights need the compiled kernels: {state()[1]}", _HINT)
    return Path(library._name)


def state() -> tuple[bool, str]:
    """Whether `load` should work and why, without compiling or loading anything."""
    if not native.enabled():
        return False, "EDGESFT_NATIVE=0"
    if _refused:
        return False, _refused[0]
    if _prebuilt() is not None:
        return True, "came with the package"
    try:
        compiler = native.find_compiler()
        built = _cached(compiler).exists()
    except (native.Unavailable, OSError) as error:
        return False, str(error)
    return True, f"{'compiled' if built else 'to be compiled at first use'} by {compiler.title}"


_refused: list[str] = []


@functools.cache
def _load() -> ctypes.CDLL | None:
    try:
        return _opened(_prebuilt() or _compiled())
    except (native.Unavailable, OSError) as error:
        _refused.append(str(error))
        native.log.warning("no packed kernels, a slow reference is used: %s", error)
        return None


def _prebuilt() -> Path | None:
    """The library that came with the package, if it was made of these very sources for this machine."""
    try:
        key = (PREBUILT / KEY).read_text(encoding="ascii").strip()
    except OSError:
        return None
    found = PREBUILT / units.NAME
    return found if key == units.key(platform.machine()) and found.is_file() else None


def _cached(compiler: native.Compiler) -> Path:
    parts = "\0".join([units.key(platform.machine()), compiler.version, repr(compiler.command)])
    return native.cache_root() / hashlib.sha256(parts.encode()).hexdigest() / units.NAME


def _compiled() -> Path:
    """Raises native.Unavailable, OSError."""
    compiler = native.find_compiler()
    found = _cached(compiler)

    def make(to: Path) -> str:
        try:
            return units.build(compiler.command, platform.machine(), to, native.run)
        except units.Failed as error:
            raise native.Unavailable(f"{compiler.title} failed: {error}") from None

    if not found.exists():
        native.build(found, make)
    native.trusted(found)
    return found


def _opened(found: Path) -> ctypes.CDLL:
    """Raises native.Unavailable for a library of another make, OSError for one that cannot be loaded."""
    library = ctypes.CDLL(str(found))
    try:
        abi = library.edgesft_nm_abi()
    except AttributeError:
        raise native.Unavailable(f"`{found}` is not the library of the packed kernels") from None
    if abi != ABI:
        raise native.Unavailable(f"`{found}` has the interface {abi}, this edgesft needs {ABI}")
    return library


if __name__ == "__main__":  # so that a runtime without Python, or without us, can be told where it lies
    print(path())
