"""What the kernel and the tools of a machine say, as text; empty where they say nothing."""

import shutil
import subprocess
from pathlib import Path


def text(path: str | Path) -> str:
    """A small file's text without surrounding blanks and zero bytes; empty where it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def number(path: str | Path) -> int | None:
    """A file that holds one integer, decimal or 0x...; None for anything else."""
    try:
        return int(text(path), 0)
    except ValueError:
        return None


def tool(*command: str, timeout: float = 5.0) -> str:
    """Output of a tool, empty where it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def no_tool(*_: str) -> str:
    """Stands for `tool` where the files of another machine are read."""
    return ""
