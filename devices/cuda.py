"""What the CUDA driver library itself says, asked through ctypes: no toolkit, no context, no memory."""

import ctypes
from functools import cache

MULTIPROCESSORS = 16  # CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT in cuda.h


@cache
def driver() -> ctypes.CDLL | None:
    """libcuda, ready to be asked; None where there is none or it sees no GPU."""
    for name in ("libcuda.so.1", "libcuda.so"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        return library if library.cuInit(0) == 0 else None
    return None


def version() -> str | None:
    """Highest CUDA that the driver offers, as `12.8`."""
    library, found = driver(), ctypes.c_int()
    if library is None or library.cuDriverGetVersion(ctypes.byref(found)) != 0:
        return None
    return f"{found.value // 1000}.{found.value % 1000 // 10}"


def multiprocessors() -> list[int]:
    """Streaming multiprocessors of every GPU, of its MIG slice where it is cut; empty without a GPU."""
    library, count = driver(), ctypes.c_int()
    if library is None or library.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = []
    for index in range(count.value):
        handle, units = ctypes.c_int(), ctypes.c_int()
        if library.cuDeviceGet(ctypes.byref(handle), index) == 0:
            library.cuDeviceGetAttribute(ctypes.byref(units), MULTIPROCESSORS, handle)
            found.append(units.value)
    return found
