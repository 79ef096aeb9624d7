"""The error family. The class says whose fault it was; its exit code says so to the shell.

A message says what was got, what was expected and where it came from, with literals in backticks and no
full stop after a single sentence. A hint is a command wherever one exists.
"""

import difflib
from collections.abc import Iterable
from typing import ClassVar


class EdgeSFTError(Exception):
    """Base of everything that EdgeSFT raises on purpose.

    message: one line, what was got and what was expected.
    hint: the next step, a command where there is one.
    """

    exit_code: ClassVar[int] = 70

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class CheckFailed(EdgeSFTError):
    """A verification ran and said no."""

    exit_code = 1


class UsageError(EdgeSFTError):
    """A name or a value on the command line or in a recipe is wrong."""

    exit_code = 2


class ArtifactError(EdgeSFTError):
    """A file or a folder, data included, is missing, broken, refused or of the wrong kind."""

    exit_code = 3


class DeviceError(EdgeSFTError):
    """This device or its runtime cannot do it."""

    exit_code = 4


class Interrupted(EdgeSFTError):
    """Stopped by a signal with the work so far saved; the same command goes on."""

    exit_code = 130


def nearest(name: str, known: Iterable[str]) -> str | None:
    """A hint that names the closest of the `known` names, or all of them when none is close."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(f"`{c}`" for c in close) + "?"
    return "known: " + ", ".join(f"`{n}`" for n in names) if names else None
