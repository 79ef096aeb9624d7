"""What a process leaves in the page cache and in memory: drop the one, read the peak of the other."""

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from edgesft.core.errors import ArtifactError


def evict(files: Iterable[Path]) -> float:
    """Drop files from the page cache; the share of the probed pages that really went, 0 to 1.

    Needs no rights: written data are flushed, then the kernel is advised. Pages that another process maps
    stay, hence the share. What is no regular file is passed over.
    """
    if not hasattr(os, "posix_fadvise"):
        return 0.0
    gone = probed = 0
    for file in (p for p in files if p.is_file() and not p.is_symlink()):
        size = file.stat().st_size
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise ArtifactError(f"`{file}` cannot be read: {error.strerror}") from None
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # a probe must not read ahead
            for k in range(16 if size > 1 << 20 else 1 if size else 0):
                probed += 1
                gone += not cached(descriptor, size * k // 16)
        except OSError:
            continue
        finally:
            os.close(descriptor)
    return gone / probed if probed else 0.0


def cached(descriptor: int, offset: int) -> bool:
    """Whether a byte can be read without touching the disk."""
    flag = getattr(os, "RWF_NOWAIT", None)
    if flag is None:
        return True
    try:
        return os.preadv(descriptor, [bytearray(1)], offset, flag) == 1
    except BlockingIOError:
        return False
    except OSError:
        return True  # the file system cannot say: do not claim a cold load


def status_kib(name: str) -> int:
    """A `kB` field of /proc/self/status; 0 where there is none."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(name + ":")), 0)


def reset_peak() -> int:
    """Resident bytes now; the kernel's high-water mark starts anew from here where that is permitted."""
    with contextlib.suppress(OSError):  # where not, the peak includes the start of the interpreter
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status_kib("VmRSS") * 1024


def peak(before: int) -> dict[str, int]:
    """Peak resident bytes of this process: in all, and above what it held before the model was loaded."""
    high = status_kib("VmHWM") * 1024
    if not high:
        import resource

        high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak_bytes": high, "peak_above_bytes": max(0, high - before), "before_bytes": before}
