"""How many threads a runtime gets."""

import os


def resolve(threads: int) -> int:
    """`threads`, or for 0 the physical cores that this process may use.

    Never more than the cores it is allowed to run on: threads that take turns on a core are slower than none.
    """
    if threads > 0:
        return threads
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))
