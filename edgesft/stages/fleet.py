"""One command on several devices at once, each into a folder of its own, and one table of the answers.

    [devices.bench]
    url = "local"
    threads = 4

    [devices.nano]
    url = "ssh://jetson@nano?python=/opt/edgesft/bin/python"
    options = { prompt_tokens = 32 }

A device that fails does not stop the others.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgesft.core import artifact, catalog, console
from edgesft.core.artifact import Artifact
from edgesft.core.errors import ArtifactError, EdgeSFTError, Interrupted, UsageError, nearest
from edgesft.stages import remote

SCHEMA = 1
FILE = "fleet.json"
LOCAL = "local"
FIELDS = ("url", "threads", "options")
GRACE = 15.0  # seconds that a local run gets to save its checkpoint
# Worst first: a regression found outranks what could not be found out.
WORST = (10, 14, 13, 12, 11, 70, 4, 3, 2, 1, 130)

# column -> where the record of a profile, of a verdict or of a calibration has it
METRICS: dict[str, dict[str, tuple[str, ...]]] = {
    "profile.json": {
        "tpot_p50_ms": ("tpot_ms", "p50"),
        "tpot_p99_ms": ("tpot_ms", "p99"),
        "ttft_p50_ms": ("ttft_ms", "p50"),
        "latency_p50_ms": ("latency_ms", "p50"),
        "tokens_per_second": ("tokens_per_second",),
        "peak_memory_bytes": ("peak_memory_bytes",),
    },
    "verdict.json": {
        "verdict": ("verdict",),
        "metric": ("metric",),
        "ratio": ("ratio",),
        "pairs": ("pairs",),
    },
    "calibration.json": {
        "armed": ("armed",),
        "estimator": ("estimator",),
        "clock": ("clock",),
        "mde_percent": ("mde_percent",),
        "pairs_mean": ("pairs_mean",),
    },
}


@dataclass(frozen=True)
class Member:
    """A device of a fleet. options: further options of the command there, `prompt_tokens` for
    `--prompt-tokens`."""

    name: str
    url: str
    threads: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """Its own part of the command line."""
        words = [] if self.threads is None else ["--threads", str(self.threads)]
        for name, value in self.options.items():
            option = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{option}" if value else f"--no-{option}")
            else:
                for each in value if isinstance(value, list) else [value]:
                    words += [f"--{option}", str(each)]
        return words


def load(path: Path) -> list[Member]:
    """The devices of a fleet file. Raises ArtifactError (no such file) and UsageError (what is in it)."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"`{path}` cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"`{path}` is not TOML: {error}") from None
    for key in table:
        if key != "devices":
            raise UsageError(f"`{path}` has a table `{key}`, expected `devices`", nearest(key, ["devices"]))
    devices = table.get("devices")
    if not isinstance(devices, dict) or not devices:
        raise UsageError(f"`{path}` names no device", 'add `[devices.bench]` with `url = "local"`')
    return [_member(name, values, f"`{path}`, `devices.{name}`") for name, values in devices.items()]


def _member(name: str, values: object, where: str) -> Member:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UsageError(f"{where}: the name of a device has letters, digits, `-` and `_`")
    if not isinstance(values, dict):
        raise UsageError(f"{where}: expected a table", 'url = "local"')
    for key in values:
        if key not in FIELDS:
            raise UsageError(f"{where} has no field `{key}`", nearest(key, FIELDS))
    url, threads, options = values.get("url"), values.get("threads"), values.get("options", {})
    if not isinstance(url, str):
        raise UsageError(f"{where}: `url` is `{url}`, expected `local` or `ssh://...`")
    if url != LOCAL:
        catalog.runtime("devices.remote").parse(url)
    if threads is not None and (type(threads) is not int or not 0 <= threads <= 1024):
        raise UsageError(f"{where}: `threads` is `{threads}`, expected 0 to 1024")
    if not isinstance(options, dict):
        raise UsageError(f"{where}: `options` is `{options}`, expected a table")
    for key, value in options.items():
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", key) or not isinstance(value, str | int | float | list):
            raise UsageError(f"{where}: `options.{key}` cannot be an option of a command")
        if key in ("out", "device", "json", "threads"):
            raise UsageError(f"{where}: `options.{key}` is not for a fleet to set")
    return Member(name, url, threads, options)


def run(
    members: Sequence[Member],
    command: Sequence[str],
    artifacts: Mapping[str, Artifact],
    out: Path,
) -> dict[str, Any]:
    """Run `edgesft COMMAND` on every member, all at the same time; `{name}` stands for an artefact.

    Each writes into `out/NAME`; the summary, also kept as fleet.json, has its exit code, seconds, error and
    first numbers, and as `exit_code` the worst of all (order of WORST, then any other, then 0).
    On Ctrl-C all runs are stopped, those far away too. Raises ArtifactError if `out` cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"`{out}` cannot be written: {error.strerror}") from None
    stop = threading.Event()
    pool = ThreadPoolExecutor(max_workers=max(len(members), 1))
    try:
        running = [pool.submit(_one, m, list(command), artifacts, out / m.name, stop) for m in members]
        devices = [each.result() for each in running]
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=True)
    summary = {
        "schema": SCHEMA,
        "command": list(command),
        "exit_code": worst([d["exit_code"] for d in devices]),
        "devices": devices,
    }
    artifact.write_json(out / FILE, summary)
    return summary


def worst(codes: Sequence[int]) -> int:
    """The exit code of a fleet: the first of WORST among them, else any that is not 0, else 0."""
    found = [code for code in WORST if code in codes]
    return (found or [code for code in codes if code] or [0])[0]


def table(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a summary: a line a device."""
    devices = summary["devices"]
    names = list(dict.fromkeys(name for d in devices for name in d["metrics"]))
    rows = []
    for each in devices:
        numbers = [console.plain(each["metrics"].get(name)) for name in names]
        state = "ok" if each["exit_code"] == 0 else (each["error"] or "failed")
        rows.append([each["name"], str(each["exit_code"]), f"{each['seconds']:.0f}", *numbers, state])
    return ["device", "exit", "s", *names, ""], rows


def _one(
    member: Member, command: list[str], artifacts: Mapping[str, Artifact], out: Path, stop: threading.Event
) -> dict[str, Any]:
    """One device from start to end; whatever goes wrong there stays there."""
    last = ""

    def say(line: str) -> None:
        nonlocal last
        last = line.removeprefix("error: ") if line.startswith("error: ") else last
        console.say(f"{member.name}: {line}")

    began, error = time.monotonic(), None
    words = [*command, *member.arguments]
    try:
        if member.url == LOCAL:
            code = _here(words, artifacts, out, stop, say)
        else:
            code = remote.run(member.url, words, artifacts, out, stop=stop, say=say, bar=False).exit_code
        error = None if code == 0 else last or f"ended with exit code {code}"
    except EdgeSFTError as failure:
        code, error = failure.exit_code, failure.message
        console.say(f"{member.name}: error: {error}")
        if failure.hint:
            console.say(f"{member.name}: hint: {failure.hint}")
    except Exception as failure:
        code, error = 70, f"{type(failure).__name__}: {failure}"
        console.say(f"{member.name}: error: this is a bug in EdgeSFT: {error}")
    return {
        "name": member.name,
        "url": member.url,
        "exit_code": code,
        "seconds": round(time.monotonic() - began, 3),
        "error": error,
        "metrics": metrics(out),
    }


def _here(
    words: list[str],
    artifacts: Mapping[str, Artifact],
    out: Path,
    stop: threading.Event,
    say: Callable[[str], None],
) -> int:
    """Run the command in a process on this machine. Returns its exit code; raises Interrupted."""
    for name, each in artifacts.items():
        words = [word.replace(f"{{{name}}}", str(each.path)) for word in words]
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "edgesft", *words, "-o", str(out)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": _path(), "NO_COLOR": "1"},
        start_new_session=True,  # Ctrl-C comes to us, who then stop all
    )
    assert child.stderr is not None
    stream = child.stderr

    def pass_on() -> None:
        for line in stream:
            say(remote.plain(line.rstrip(b"\n")))

    reader = threading.Thread(target=pass_on)
    reader.start()
    try:
        while child.poll() is None:
            if stop.wait(0.2):
                raise Interrupted("stopped")
        reader.join()
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        reader.join(1.0)
        stream.close()
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _path() -> str:
    """PYTHONPATH under which a child finds this very package."""
    import edgesft

    root = str(Path(edgesft.__file__).resolve().parent.parent)
    return os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)


def metrics(out: Path) -> dict[str, Any]:
    """The first numbers of what a device brought back; empty where there is nothing readable."""
    found: dict[str, Any] = {}
    for file, wanted in METRICS.items():
        try:
            record = artifact.read_json(out / file) or {}
        except ArtifactError:
            continue
        for name, keys in wanted.items():
            value: Any = record
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, str | int | float):
                found[name] = value
    return found
