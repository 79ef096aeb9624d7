"""Pick the fastest implementation that says it fits, else the reference.

A folder here is an operation; its package lists `IMPLEMENTATIONS`, fastest first, the reference last.
Nothing here imports torch.
"""

import functools
import importlib
from pathlib import Path
from typing import Any, ClassVar, Protocol

from edgesft.core.errors import UsageError, nearest
from edgesft.core.protocols import Kernel

ROOT = Path(__file__).resolve().parent


class Implementation(Kernel, Protocol):
    """A kernel that can say in words how it stands on this machine."""

    name: ClassVar[str]

    def fits(self, *args: Any, **options: Any) -> bool:  # noqa: ANN401 - each operation has its own
        """Whether it can do the call with these arguments; without any, whether it works here at all."""
        ...

    def state(self) -> tuple[bool, str]:
        """Whether it should work here, and why; found without compiling, loading or importing torch."""
        ...


def operations() -> list[str]:
    """Names of all operations."""
    return sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))


@functools.cache
def implementations(op: str) -> tuple[Implementation, ...]:
    """Implementations of an operation, fastest first. Raises UsageError for an unknown one."""
    if op not in operations():
        raise UsageError(f"there is no kernel operation `{op}`", nearest(op, operations()))
    found: tuple[Implementation, ...] = importlib.import_module(f"edgesft.kernels.{op}").IMPLEMENTATIONS
    return found


def pick(op: str, *args: Any, **options: Any) -> Implementation:  # noqa: ANN401 - passed on to `fits`
    """The fastest implementation that fits a call with these arguments."""
    return next(each for each in implementations(op) if each.fits(*args, **options))


def status() -> dict[str, dict[str, str]]:
    """For each operation the `implementation` that this machine would use and `why`, for `doctor`."""
    return {op: _status(op) for op in operations()}


def _status(op: str) -> dict[str, str]:
    reasons: list[str] = []
    for each in implementations(op):
        works, why = each.state()
        if works:
            return {"implementation": each.name, "why": "; ".join((*reasons, why))}
        reasons.append(f"no {each.name}: {why}")
    raise AssertionError(f"`{op}` has no reference")  # its list is wrong, not the machine
