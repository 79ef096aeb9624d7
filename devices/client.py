"""The parent's side of `devices.worker`: start it, ask, wait, and say clearly what went wrong.

Nothing here measures: the parent sleeps while the child runs.
"""

import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import edgesft
from edgesft.core import errors, statistics
from edgesft.core.artifact import Artifact
from edgesft.core.errors import DeviceError, EdgeSFTError, UsageError
from edgesft.core.params import parse_pattern
from edgesft.core.statistics import WarmUp

WORKER = "edgesft.devices.worker"
ENGINE = "engine"
RUNTIMES: dict[str, str | None] = {
    "onnx": "edgesft.exporters.runtime:OnnxRunnable",
    "model": "edgesft.core.torch_runtime:TorchRunnable",
    "graph": "edgesft.exporters.foreign:GraphRunnable",
    ENGINE: None,  # known, but nothing here runs it yet: `runtime_of` says what it takes
}
TAIL = 2000  # characters of stderr that a message may carry


class WorkerLost(DeviceError):
    """The child was killed or hung: the device may be gone, what was measured before stays valid."""


class WorkerFailed(DeviceError):
    """The child said that it could not do it, or died without a word."""


def runtime_of(kind: str) -> str:
    """`module:attribute` that loads an artefact of this kind. Raises DeviceError."""
    if kind == ENGINE:
        if importlib.util.find_spec("tensorrt") is None:
            why = "TensorRT engines need TensorRT and an NVIDIA GPU; the package `tensorrt` is not installed"
            raise DeviceError(why, "edgesft doctor")
        raise DeviceError(
            "this version of EdgeSFT does not run TensorRT engines", "profile the `.onnx` file behind it"
        )
    found = RUNTIMES.get(kind)
    if found is None:
        raise DeviceError(
            f"an artefact of kind `{kind}` cannot be run, expected one of "
            + ", ".join(f"`{k}`" for k, v in RUNTIMES.items() if v is not None)
        )
    return found


def request(
    artifact: Artifact,
    *,
    threads: int,
    workload: Mapping[str, int],
    seed: list[int],
    runtime: str | None = None,
    **more: object,
) -> dict[str, Any]:
    """A request for the worker.

    workload: `prompt_tokens`, `decode_tokens`, `repetitions`, and if wanted `prefills`, `batch`.
    more: `cold`, `slowdown`, `clock`, `until_steady`, `idle_seconds`, `operators`, `shapes`; see
    `worker.measure`. Those that are None are left out.
    Raises DeviceError for a kind that nothing here runs, UsageError for options that do not fit the kind.
    """
    given = {name: value for name, value in more.items() if value is not None}
    if given.get("operators") and artifact.kind == "model":
        raise UsageError(
            f"operators are timed by ONNX Runtime, `{artifact.ref}` is run by torch",
            f"edgesft export {artifact.ref} -o OUT",
        )
    if given.get("shapes") and artifact.kind != "graph":
        raise UsageError(f"shapes are for foreign graphs, `{artifact.ref}` is of kind `{artifact.kind}`")
    if given.get("operators"):
        given["operators"] = str(given["operators"])
    return {
        "path": str(artifact.path),
        "files": [str(p) for p in getattr(artifact, "files", ())],
        "runtime": runtime or runtime_of(artifact.kind),
        "threads": threads,
        "workload": dict(workload),
        "seed": seed,
        **given,
    }


def measure(asked: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """Run the worker once. Returns `{"loaded", "repetitions", "idle", "done", "wall_s"}`.

    timeout: seconds after which the child counts as hung, those that it is asked to be idle not counted.
    Raises WorkerLost (killed by a signal, hung), WorkerFailed (anything else that it could not do), or the
    ArtifactError that it met; messages carry the end of its stderr.
    """
    began = time.monotonic()
    timeout += sum(asked.get("idle_seconds", ()))
    with tempfile.TemporaryFile() as stderr:
        child = subprocess.Popen(
            [sys.executable, "-m", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=_environment(int(asked["threads"])),
        )
        try:
            output, _ = child.communicate(json.dumps(asked).encode(), timeout=timeout)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            why = f"the measurement hung: no answer within {timeout:.0f} s"
            raise WorkerLost(why + _tail(stderr)) from None
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        events = _events(output)
        _raise_failure(child.returncode, events, stderr)
    return {
        "loaded": next(e for e in events if e["event"] == "loaded"),
        "repetitions": [e for e in events if e["event"] == "repetition"],
        "idle": [e for e in events if e["event"] == "idle"],
        "done": events[-1],
        "wall_s": round(time.monotonic() - began, 3),
    }


def _environment(threads: int) -> dict[str, str]:
    """The child's environment: our package importable, thread pools as asked, no network."""
    root = str(Path(edgesft.__file__).resolve().parent.parent)
    path = os.environ.get("PYTHONPATH", "")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in (path, root) if p),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _events(output: bytes) -> list[dict[str, Any]]:
    found = []
    for line in output.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break  # cut off in the middle by a kill
    return found


def _raise_failure(status: int, events: list[dict[str, Any]], stderr: Any) -> None:  # noqa: ANN401 - a file
    if status == 0 and events and events[-1]["event"] == "done":
        return
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
        raise WorkerLost(f"the measuring process was killed by `{name}`{_tail(stderr)}")
    last = events[-1] if events else {}
    if last.get("event") == "error":
        kind = getattr(errors, str(last.get("type")), None)
        if isinstance(kind, type) and issubclass(kind, EdgeSFTError) and kind is not DeviceError:
            raise kind(last["message"], last.get("hint"))
        raise WorkerFailed(last["message"] + _tail(stderr), last.get("hint"))
    raise WorkerFailed(f"the measuring process ended with status {status} and no answer{_tail(stderr)}")


def _tail(stderr: Any) -> str:  # noqa: ANN401 - a file
    """The last lines that the child wrote to stderr, as an appendix to a message."""
    size = stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, size - TAIL))
    text = stderr.read().decode(errors="replace").strip()
    lines = text.splitlines()[-5:]
    return "".join(f"\n  | {line}" for line in lines)


def timings(
    repetitions: Sequence[Mapping[str, Any]], metric: str, clock: str = "wall"
) -> tuple[list[float], WarmUp]:
    """Samples of one process in milliseconds, in the order of time, warm-up included, and where it ends.

    metric: `tpot` (every decode step), `ttft` (every prompt) or `latency` (every call of an encoder).
    clock: `wall`, or `cpu`, the processor time of the thread that calls the runtime.
    """
    suffix = "_ns" if clock == "wall" else "_cpu_ns"
    if metric == "tpot":
        steps = [r[f"step{suffix}"] for r in repetitions if r["step_ns"]]
        return [t / 1e6 for r in steps for t in r], statistics.warm_up(steps)
    name = {"ttft": "ttft", "latency": "call"}[metric] + suffix
    times = [r[name] for r in repetitions if name in r]
    return [t / 1e6 for t in times], statistics.mser([math.log(max(t, 1)) for t in times])


def about(artifact: Artifact) -> dict[str, Any]:
    """What made an artefact: `quantize`, `pattern`, `density` (None where unsaid), kind, digest, bytes."""
    sources: list[Mapping[str, Any]] = [artifact.metrics, artifact.manifest.get("params", {})]
    with contextlib.suppress(OSError, ValueError):
        sources.insert(0, json.loads((artifact.path / "export.json").read_text(encoding="utf-8")))
    nested = [v for s in sources for v in s.values() if isinstance(v, Mapping)]
    found = {}
    for name in ("quantize", "pattern", "density"):
        found[name] = next((s[name] for s in [*sources, *nested] if s.get(name) is not None), None)
    if found["density"] is None and found["pattern"] is not None:
        kept, of = parse_pattern(str(found["pattern"]))
        found["density"] = kept / of
    return {
        "ref": artifact.ref,
        "kind": artifact.kind,
        "digest": artifact.digest,
        "bytes": artifact.bytes,
        **found,
    }
