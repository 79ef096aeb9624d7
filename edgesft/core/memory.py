"""Memory that has been freed goes back to the system."""

import ctypes
import gc
import sys
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGE = 1 << 20  # bytes


def _libc() -> Any:  # noqa: ANN401 - ctypes makes its functions as they are asked for
    return ctypes.CDLL(None) if sys.platform.startswith("linux") else None


def trim() -> None:
    """Give back what the allocator holds free: after loading, before a long run in little memory.

    glibc keeps what lies between pieces still in use, tens of megabytes after a model has been loaded. Takes
    milliseconds; does nothing with other C libraries.
    """
    gc.collect()
    give_back = getattr(_libc(), "malloc_trim", None)  # musl has none
    if give_back is not None:
        give_back(0)


def tighten(large: int = _LARGE) -> None:
    """From now on memory of `large` bytes and more goes back as soon as it is freed, in the whole process.

    By itself glibc soon serves activations from its heap, where they leave gaps twice their size. Each of
    them now costs its page faults: a forward pass over 4-bit weights of 512 tokens takes about a twentieth
    longer. Does nothing with other C libraries.
    """
    option = getattr(_libc(), "mallopt", None)
    if option is not None:
        option(_MMAP_THRESHOLD, large)
        option(_TRIM_THRESHOLD, 2 * large)  # at `large`, the small tensors of every layer go and come again
    trim()
