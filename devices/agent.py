"""The far side of `devices.remote`: keeps files by hash, and runs a command that outlives the connection.

Sent over the connection and run by any Python from 3.8 on, so nothing but the standard library is imported,
and nothing of EdgeSFT; one file, for it travels alone. Requests and answers are one line of JSON each, with
`bytes` raw bytes behind it where the line says so.

    ROOT/objects/SHA256         received, not yet part of a tree
    ROOT/incoming/SHA256.part   being received; a later connection goes on behind what is there
    ROOT/trees/SHA256/          an artefact: `files/` and `index.json`, which is written last
    ROOT/sources/SHA256/        EdgeSFT itself
    ROOT/venvs/SHA256/          an environment; whole when `done` is there
    ROOT/jobs/SHA256/           a run: job.json, stdout, stderr, exit.json, out/

A file lies in one place only and is moved, never linked: readers of ONNX refuse files with two names. A job
runs while its `lock` is held; the lock dies with its processes, so a number that the system gave to another
process is never mistaken for it. One job runs at a time, for two would disturb each other's measurements.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # evaluated nowhere: old interpreters need not know the names
    from collections.abc import Iterator
    from types import FrameType
    from typing import Any

    Request = dict[str, Any]
    Answer = dict[str, Any]
    Files = dict[str, list[Any]]  # name -> [SHA-256, bytes]

CHUNK = 1 << 20
LINE = 64 << 20  # bytes of one request; the file list of a large folder is far below
LOG = 64 << 10  # bytes of a log in one answer
BLOCK = 4 << 20  # bytes of a result in one answer: what a broken connection costs
GRACE = 15.0  # seconds from asking a run to stop until it is killed
UNPACKED = 256 << 20  # bytes that EdgeSFT itself may unfold to
NEEDED = (3, 11)  # what EdgeSFT runs on
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RESERVE = "EDGESFT_REMOTE_RESERVE"  # bytes of the disk to leave free
PROBE = """
import json, sys
from importlib import metadata
missing = []
for name in sys.argv[1:]:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        missing.append(name)
print(json.dumps({"version": list(sys.version_info[:3]), "missing": missing}))
"""


class Refused(Exception):
    """What cannot be done. kind: `space`, `hash`, `gone`, `python` or `bad`."""

    def __init__(self, kind: str, message: str, **facts: object) -> None:
        super().__init__(message)
        self.kind, self.message, self.facts = kind, message, facts


class Stopped(Exception):
    """Somebody asked this run to end."""


class Reader:
    """Bytes of a descriptor: lines, blocks, and whether there is more."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._held = descriptor, b""

    def line(self) -> bytes:
        """A line without its end; empty at the end of the input."""
        while b"\n" not in self._held:
            piece = os.read(self._descriptor, CHUNK)
            if not piece or len(self._held) > LINE:
                return b""
            self._held += piece
        line, _, self._held = self._held.partition(b"\n")
        return line

    def blocks(self, count: int) -> Iterator[bytes]:
        """`count` bytes in pieces. Raises EOFError if the input ends before."""
        while count:
            piece = self._held[:count] or os.read(self._descriptor, min(count, CHUNK))
            if not piece:
                raise EOFError
            self._held = self._held[len(piece) :] if self._held else b""
            count -= len(piece)
            yield piece

    def ready(self, seconds: float) -> bool:
        """Whether something (or the end) is there within `seconds`."""
        return bool(self._held) or bool(select.select([self._descriptor], [], [], seconds)[0])


def checked(name: str) -> str:
    """A relative file name that stays in its folder. Raises Refused."""
    parts = name.split("/")
    if not name or "\\" in name or any(p in ("", ".", "..") for p in parts) or min(map(ord, name)) < 32:
        raise Refused("bad", f"a file name leaves its folder: {name!r}")
    return name


def digest(text: str) -> str:
    """A SHA-256 in hexadecimal, as names of our folders are. Raises Refused."""
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise Refused("bad", f"not a SHA-256: {text[:80]!r}")
    return text


def hash_file(path: str) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(CHUNK), b""):
            found.update(piece)
    return found.hexdigest()


def sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: str, data: bytes) -> None:
    """A file whole or not at all."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(os.path.dirname(path))


def read_json(path: str) -> Any:  # noqa: ANN401 - JSON
    """What a file of ours holds; None where it is missing or broken."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def below(folder: str) -> list[str]:
    """Names of all files below a folder, links and hidden ones left out, sorted."""
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        paths = [os.path.join(place, f) for f in files if not f.startswith(".")]
        found += [os.path.relpath(p, folder) for p in paths if os.path.isfile(p) and not os.path.islink(p)]
    return sorted(found)


def touch(path: str) -> None:
    """In use now: not to be cleaned away."""
    with contextlib.suppress(OSError):
        os.utime(path)


def locked(path: str, *, wait: bool = False, shared: bool = False) -> int | None:
    """A descriptor that holds the lock `path`; None if another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        fcntl.flock(descriptor, kind | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class Store:
    """Files by hash, and the trees made of them."""

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(os.path.expanduser(root))
        for name in ("objects", "incoming", "trees", "sources", "venvs", "jobs"):
            os.makedirs(os.path.join(self.root, name), mode=0o700, exist_ok=True)

    def at(self, *parts: str) -> str:
        return os.path.join(self.root, *parts)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other connection changes trees meanwhile."""
        lock = locked(self.at("store.lock"), wait=True)
        try:
            yield
        finally:
            if lock is not None:
                os.close(lock)

    def free(self) -> int:
        """Bytes that may still be written here."""
        reserve = os.environ.get(RESERVE, "")
        return shutil.disk_usage(self.root).free - (int(reserve) if reserve.isdigit() else 64 << 20)

    def index(self, tree: str) -> Files | None:
        """Name -> (SHA-256, bytes) of a tree whose files are there with their sizes; None for no such."""
        files = read_json(self.at("trees", digest(tree), "index.json"))
        for name, (_, size) in files.items() if isinstance(files, dict) else ():
            path = self.at("trees", tree, "files", name)
            if not os.path.isfile(path) or os.path.getsize(path) != size:
                return None
        return files if isinstance(files, dict) else None

    def places(self) -> dict[str, str]:
        """SHA-256 -> path of all that is here already."""
        found = {}
        for tree in os.listdir(self.at("trees")):
            if re.fullmatch("[0-9a-f]{64}", tree):
                for name, (sha, _) in (self.index(tree) or {}).items():
                    found[sha] = self.at("trees", tree, "files", name)
        return {**found, **{sha: self.at("objects", sha) for sha in os.listdir(self.at("objects"))}}

    def received(self, sha: str) -> int:
        """Bytes of an object that a broken connection left, and that no other connection is writing."""
        part = self.at("incoming", digest(sha) + ".part")
        lock = locked(part) if os.path.exists(part) else None
        if lock is None:
            return 0
        os.close(lock)
        return os.path.getsize(part)

    def receive(self, sha: str, size: int, offset: int, blocks: Iterator[bytes]) -> None:
        """Write a part from `offset` on; when it is whole and right it becomes an object. Raises Refused."""
        if self.free() < size - offset:
            raise Refused("space", "no room", needed=size - offset, free=max(0, self.free()))
        part = self.at("incoming", digest(sha) + ".part")
        lock = locked(part)
        if lock is None:  # a connection that broke without our noticing may hold it for hours
            part = self.at("incoming", f"{sha}.{os.getpid()}.part")
            lock = locked(part, wait=True)
        assert lock is not None
        with os.fdopen(lock, "r+b") as file:
            if os.path.getsize(part) < offset:
                raise Refused("busy", "another connection sends this file")
            file.truncate(offset)
            file.seek(offset)
            try:
                for block in blocks:
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno in FULL:
                    os.unlink(part)
                raise
            if os.path.getsize(part) != size or hash_file(part) != sha:
                os.unlink(part)
                raise Refused("hash", "what arrived has another SHA-256")
            os.chmod(part, 0o444)
            os.replace(part, self.at("objects", sha))
        sync(self.at("objects"))

    def assemble(self, tree: str, files: Files) -> None:
        """A tree out of objects, moved into place whole. Raises Refused if one is missing."""
        home, new = self.at("trees", digest(tree)), self.at("trees", ".new-" + digest(tree))
        if self.index(tree) == files:
            touch(home)
            return
        self.scatter(tree)
        shutil.rmtree(new, ignore_errors=True)
        places = self.places()
        for name, (sha, _) in files.items():
            target = os.path.join(new, "files", checked(name))
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if digest(sha) not in places:
                shutil.rmtree(new)
                raise Refused("gone", f"a file is not here any more: {name}")
            if os.path.dirname(places[sha]) == self.at("objects"):
                os.rename(places[sha], target)
            else:
                shutil.copyfile(places[sha], target)
                sync(target)
            os.chmod(target, 0o444)
            places[sha] = target
        write(os.path.join(new, "index.json"), json.dumps(files).encode())
        os.rename(new, home)
        sync(self.at("trees"))

    def altered(self, tree: str) -> list[str]:
        """Names whose content is not what it was; the tree is then taken apart, what is right kept."""
        files, folder = self.index(tree), self.at("trees", digest(tree), "files")
        if files is None:
            return ["*"]
        wrong = [name for name, (sha, _) in files.items() if hash_file(os.path.join(folder, name)) != sha]
        wrong += [name for name in below(folder) if name not in files]
        if wrong:
            self.scatter(tree)
        return wrong

    def scatter(self, tree: str) -> None:
        """Turn the files of a tree that are still right back into objects, and remove the tree."""
        home = self.at("trees", digest(tree))
        for name, (sha, _) in (read_json(os.path.join(home, "index.json")) or {}).items():
            path = os.path.join(home, "files", checked(name))
            if os.path.isfile(path) and hash_file(path) == sha:
                os.replace(path, self.at("objects", sha))
        shutil.rmtree(home, ignore_errors=True)

    def unpack(self, sha: str) -> str:
        """The folder of EdgeSFT's source, out of the object `sha`. Raises Refused."""
        home, new = self.at("sources", digest(sha)), self.at("sources", ".new-" + digest(sha))
        if not os.path.isdir(home):
            shutil.rmtree(new, ignore_errors=True)
            with zipfile.ZipFile(self.at("objects", sha)) as archive:
                if sum(i.file_size for i in archive.infolist()) > UNPACKED:
                    raise Refused("bad", "the source unfolds to too much")
                for info in archive.infolist():
                    target = os.path.join(new, checked(info.filename))
                    os.makedirs(os.path.dirname(target), exist_ok=True)
                    with archive.open(info) as source, open(target, "wb") as file:
                        shutil.copyfileobj(source, file)
            os.rename(new, home)
            os.unlink(self.at("objects", sha))
        touch(home)
        return home

    def clean(self, days: float) -> int:
        """Remove what nobody used for `days`; environments live six times as long. Returns how many.

        Nothing is removed while a job runs: it may be older than `days`, and with it what it reads.
        """
        removed = 0
        names = [n for n in os.listdir(self.at("jobs")) if re.fullmatch("[0-9a-f]{64}", n)]
        if any(Job(self, name).alive() for name in names):
            return 0
        for kind in ("objects", "incoming", "trees", "sources", "jobs", "venvs"):
            age = days * 86400 * (6 if kind == "venvs" else 1)
            for name in os.listdir(self.at(kind)):
                path = self.at(kind, name)
                try:
                    old = time.time() - os.path.getmtime(path) > age
                except OSError:
                    continue
                if old:
                    shutil.rmtree(path, ignore_errors=True) if os.path.isdir(path) else os.unlink(path)
                    removed += 1
        for name in os.listdir(self.root):
            path = self.at(name)
            if (
                re.fullmatch(r"agent-[0-9a-f]+\.py", name)
                and time.time() - os.path.getmtime(path) > days * 86400
            ):
                os.unlink(path)
        return removed


class Job:
    """A command that runs without us; its folder says how far it is."""

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.name = store, name
        self.home = store.at("jobs", digest(name))

    def at(self, *parts: str) -> str:
        return os.path.join(self.home, *parts)

    def alive(self) -> bool:
        if not os.path.isdir(self.home):
            return False
        lock = locked(self.at("lock"), shared=True)  # two that look must not see each other
        if lock is not None:
            os.close(lock)
        return lock is None

    def state(self) -> dict[str, Any]:
        """`state`: absent, waiting (for another job), running, finished (with `exit`), died or taken."""
        alive = self.alive()  # first: a run that ends now has written its exit code before
        spec, ended = read_json(self.at("job.json")), read_json(self.at("exit.json"))
        if spec is None:
            return {"state": "absent"}
        about = {"source": spec["source"], "started_at": spec["started_at"]}
        if alive:
            return {"state": "running" if os.path.exists(self.at("child")) else "waiting", **about}
        if ended is None:
            return {"state": "died", **about}
        taken = os.path.exists(self.at("taken"))
        return {"state": "taken" if taken else "finished", **about, **ended}

    def start(self, request: Request, agent: str) -> dict[str, Any]:
        """Start it, or say that it runs or has run. What it wrote into `out` before stays: it goes on."""
        os.makedirs(self.at("work"), exist_ok=True)
        lock = locked(self.at("lock"))
        if lock is None:
            return {**self.state(), "started": False}
        os.close(lock)
        before = self.state()
        if before["state"] == "finished" and before["source"] == request["source"]:
            return {**before, "started": False}
        lock = locked(self.at("lock"))
        if lock is None:
            return {**self.state(), "started": False}
        for name in ("exit.json", "taken", "stdout", "stderr", "child", "pid"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.at(name))
        spec = {k: request[k] for k in ("argv", "env", "source")}
        write(self.at("job.json"), json.dumps({**spec, "started_at": time.time()}).encode())
        touch(self.home)
        with open(self.at("supervisor.log"), "wb") as log:
            supervisor = subprocess.Popen(
                [sys.executable, agent, "supervise", self.store.root, self.name, str(lock)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(lock,),
                start_new_session=True,
                env={**os.environ, "EDGESFT_JOB": self.name},
            )
        write(self.at("pid"), str(supervisor.pid).encode())
        os.close(lock)
        return {"state": "waiting", "started": True, "source": request["source"]}

    def supervise(self, lock: int) -> None:
        """Run the command to its end and write down how it ended. Runs in a session of its own."""
        signal.signal(signal.SIGTERM, _stopped)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        spec = read_json(self.at("job.json"))
        began, child = time.monotonic(), None
        try:
            device = locked(self.store.at("device.lock"), wait=True)
            with open(self.at("stdout"), "wb") as out, open(self.at("stderr"), "wb") as err:
                child = subprocess.Popen(
                    spec["argv"],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    cwd=self.at("work"),
                    env={**os.environ, **spec["env"]},
                    pass_fds=tuple(d for d in (lock, device) if d is not None),
                    start_new_session=True,
                )
            write(self.at("child"), str(child.pid).encode())
            code = child.wait()
        except Stopped:
            code = 130 if child is None else _end(child)
        except OSError as error:
            with open(self.at("stderr"), "ab") as err:
                err.write(f"{error}\n".encode())
            code = 127
        seconds = round(time.monotonic() - began, 3)
        write(
            self.at("exit.json"), json.dumps({"exit": code, "ended_at": time.time(), "s": seconds}).encode()
        )

    def stop(self) -> bool:
        """Ask it to end, and wait for that. Returns whether it has ended."""
        until = time.monotonic() + GRACE + 5
        while self.alive() and time.monotonic() < until:
            for name in ("pid", "child"):  # the child alone, where its supervisor was killed
                pid = read_json(self.at(name))
                if isinstance(pid, int) and self._ours(pid):
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGTERM)
                    break
            for _ in range(20):
                if not self.alive():
                    break
                time.sleep(0.1)
        return not self.alive()

    def _ours(self, pid: int) -> bool:
        """Whether the process is of this job; where the system does not tell, the held lock must do."""
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                return f"EDGESFT_JOB={self.name}".encode() in file.read().split(b"\0")
        except OSError:
            return not os.path.isdir("/proc/self")

    def log(self, offset: int) -> bytes:
        with contextlib.suppress(OSError), open(self.at("stderr"), "rb") as file:
            file.seek(offset)
            return file.read(LOG)
        return b""

    def results(self) -> dict[str, Any]:
        """Name -> (SHA-256, bytes) of what it wrote, empty unless whole."""
        out = self.at("out")
        names = below(out) if os.path.isfile(os.path.join(out, "manifest.json")) else []
        paths = {name: os.path.join(out, name) for name in names}
        return {"files": {name: [hash_file(p), os.path.getsize(p)] for name, p in paths.items()}}

    def take(self) -> None:
        """The result has arrived: the next start is a new run, which goes on with what is unfinished."""
        if not os.path.isdir(self.home):
            return
        write(self.at("taken"), b"")
        if not os.path.isdir(self.at("out", ".partial")):
            shutil.rmtree(self.at("out"), ignore_errors=True)


def _stopped(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped


def _end(child: subprocess.Popen[bytes]) -> int:
    """First politely, so that a checkpoint is written; then the whole group."""
    child.terminate()
    try:
        return child.wait(GRACE)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(OSError):
            os.killpg(child.pid, signal.SIGKILL)
        return child.wait()


class Agent:
    """Answers requests: one method each."""

    def __init__(self, store: Store, agent: str, reader: Reader) -> None:
        self.store, self.agent, self.reader = store, agent, reader

    def job(self, request: Request) -> Job:
        return Job(self.store, request["job"])

    def do_hello(self, request: Request) -> Answer:
        """Nothing: a connection begins with all that there is to know."""
        return {}

    def do_need(self, request: Request) -> Answer:
        """Which objects of `trees` and of `source` are missing, and how much of each is here."""
        store, missing, copies = self.store, {}, 0
        with store.alone():
            broken = [tree for tree in request["trees"] if store.index(tree) is None]
            for tree in broken:
                store.scatter(tree)
            places = store.places()
            for tree, files in request["trees"].items():
                if tree in broken:
                    for sha, size in files.values():
                        if sha not in places:
                            missing[digest(sha)] = size
                        elif os.path.dirname(places[sha]) != store.at("objects"):
                            copies += size
                else:
                    touch(store.at("trees", tree))
            sha, size = request["source"]
            if sha not in places and not os.path.isdir(store.at("sources", digest(sha))):
                missing[sha] = size
            have = {sha: min(store.received(sha), size) for sha, size in missing.items()}
            needed = sum(size - have[sha] for sha, size in missing.items()) + copies
            if needed > store.free():
                store.clean(1.0)
            if needed > store.free():
                raise Refused("space", "no room", needed=needed, free=max(0, store.free()))
        return {"missing": have}

    def do_have(self, request: Request) -> Answer:
        """How much of one object is here."""
        sha = digest(request["sha"])
        whole = sha in self.store.places() or os.path.isdir(self.store.at("sources", sha))
        return {"whole": whole, "have": self.store.received(sha)}

    def do_put(self, request: Request) -> Answer:
        count = request["bytes"]
        offset = request["offset"]
        self.store.receive(request["sha"], offset + count, offset, self.reader.blocks(count))
        return {}

    def do_assemble(self, request: Request) -> Answer:
        """Make the trees and the source; compare every file of the trees with its hash."""
        altered = {}
        with self.store.alone():
            for tree, files in request["trees"].items():
                self.store.assemble(tree, files)
                altered[tree] = self.store.altered(tree)
            source = self.store.unpack(request["source"][0])
        return {"source": source, "altered": {t: names for t, names in altered.items() if names}}

    def do_probe(self, request: Request) -> Answer:
        """Version of a Python, and which packages it lacks."""
        argv = [os.path.expanduser(request["python"]), "-c", PROBE, *request["packages"]]
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=60, check=True
            )
            found: Answer = json.loads(done.stdout)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise Refused("python", f"`{argv[0]}` cannot be run: {error}") from None
        return {**found, "python": argv[0]}

    def do_environment(self, request: Request) -> Answer:
        """The Python of the environment for some requirements; `ready` is false if a job makes it now."""
        text = json.dumps([request["requirements"], request["constraints"]])
        key = hashlib.sha256(text.encode()).hexdigest()
        home = self.store.at("venvs", key)
        answer = {"python": os.path.join(home, "bin", "python"), "job": key}
        if os.path.exists(os.path.join(home, "done")):
            touch(home)
            return {**answer, "ready": True}
        job = Job(self.store, digest(key))
        os.makedirs(job.at("work"), exist_ok=True)
        write(job.at("work", "requirements.txt"), "\n".join(request["requirements"]).encode() + b"\n")
        write(job.at("work", "constraints.txt"), request["constraints"].encode())
        argv = [sys.executable, self.agent, "venv", home]
        job.start({"argv": argv, "env": {"EDGESFT_JOB": key}, "source": ""}, self.agent)
        return {**answer, "ready": False}

    def do_start(self, request: Request) -> Answer:
        request["env"]["EDGESFT_JOB"] = request["job"]
        return self.job(request).start(request, self.agent)

    def do_poll(self, request: Request) -> tuple[Answer, Iterator[bytes]]:
        """The state and what was logged behind `offset`, once there is news or `wait` seconds have passed."""
        job, until, pause = self.job(request), time.monotonic() + request["wait"], 0.05
        while True:
            state, text = job.state(), job.log(request["offset"])
            over = state["state"] not in ("running", "waiting") or time.monotonic() > until
            if text or over or state["state"] != request.get("known", state["state"]):
                return {**state, "bytes": len(text)}, iter([text])
            if self.reader.ready(pause):  # somebody is impatient, or gone
                return {**state, "bytes": 0}, iter([])
            pause = min(pause * 1.5, 0.5)  # a process that wakes often would be seen in the measurement

    def do_stop(self, request: Request) -> Answer:
        return {"ended": self.job(request).stop()}

    def do_results(self, request: Request) -> Answer:
        return self.job(request).results()

    def do_get(self, request: Request) -> tuple[Answer, Iterator[bytes]]:
        """A piece of a file of a job from `offset` on: `stdout`, or one below `out/`."""
        name = checked(request["name"])
        if name != "stdout" and not name.startswith("out/"):
            raise Refused("bad", f"not a result: {name!r}")
        path = self.job(request).at(name)
        try:
            count = min(max(0, os.path.getsize(path) - request["offset"]), BLOCK)
        except OSError:
            raise Refused("gone", "the result is not there any more") from None
        return {"bytes": count}, _pieces(path, request["offset"], count)

    def do_take(self, request: Request) -> Answer:
        self.job(request).take()
        with self.store.alone():
            return {"removed": self.store.clean(request["days"])}


def _pieces(path: str, offset: int, count: int) -> Iterator[bytes]:
    with open(path, "rb") as file:
        file.seek(offset)
        while count > 0:
            piece = file.read(min(CHUNK, count))
            if not piece:
                raise EOFError
            count -= len(piece)
            yield piece


def serve(agent: Agent, reader: Reader, out: int) -> None:
    """Answer until the connection ends."""
    for line in iter(reader.line, b""):
        request = json.loads(line)
        blocks: Iterator[bytes] = iter(())
        failure: dict[str, Any] | None = None
        try:
            answer = getattr(agent, "do_" + request["do"])(request)
            if isinstance(answer, tuple):
                answer, blocks = answer
        except Refused as error:
            failure = {"kind": error.kind, "message": error.message, **error.facts}
        except OSError as error:
            full = error.errno in FULL
            failure = {"kind": "space" if full else "bad", "message": str(error), "free": agent.store.free()}
        if failure is not None:
            _say(out, json.dumps({"error": failure}).encode() + b"\n")
            if request["do"] == "put":
                return  # the rest of the file may still be on its way
            continue
        _say(out, json.dumps(answer).encode() + b"\n")
        for block in blocks:
            _say(out, block)


def _say(out: int, data: bytes) -> None:
    while data:
        data = data[os.write(out, data) :]


def venv(home: str) -> int:
    """Make an environment from requirements.txt and constraints.txt of the working folder."""
    names = [sys.executable, *(f"python3.{minor}" for minor in range(14, NEEDED[1] - 1, -1))]
    new_enough = f"import sys; sys.exit(sys.version_info < {NEEDED})"
    paths = (path for path in map(shutil.which, names) if path)
    null = subprocess.DEVNULL
    python = next((p for p in paths if not subprocess.call([p, "-c", new_enough], stderr=null)), None)
    if python is None:
        print("no Python from {}.{} on is installed".format(*NEEDED), file=sys.stderr)
        return 3
    with open("requirements.txt", encoding="utf-8") as file:
        wanted = file.read().split("\n")
    shutil.rmtree(home, ignore_errors=True)
    make = [python, "-m", "venv", *([] if any(wanted) else ["--without-pip"]), home]
    pip = [
        os.path.join(home, "bin", "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-input",
        "--progress-bar=off",
    ]
    pip += ["--disable-pip-version-check", "-r", "requirements.txt", "-c", "constraints.txt"]
    for argv in [make, pip] if any(wanted) else [make]:
        code = subprocess.call(argv, stdout=sys.stderr.fileno())
        if code:
            shutil.rmtree(home, ignore_errors=True)
            return 1
    write(os.path.join(home, "done"), b"")
    return 0


def main(source: bytes, mark: str, root: str) -> None:
    """Serve one connection on stdin and stdout. source: this very file; mark: says that we begin to talk."""
    os.umask(0o077)
    out = os.dup(1)
    os.dup2(2, 1)  # nothing but answers may go to stdout
    failure = None
    try:
        store = Store(root)
        agent = store.at(f"agent-{hashlib.sha256(source).hexdigest()[:16]}.py")
        if not os.path.exists(agent):
            write(agent, source)
        touch(agent)
    except OSError as error:
        failure = {"kind": "space" if error.errno in FULL else "bad", "message": str(error), "free": 0}
    hello = {"error": failure} if failure else {"root": store.root, "python": sys.executable}
    _say(out, f"\n{mark}\n{json.dumps(hello)}\n".encode())
    if not failure:
        reader = Reader(0)
        with contextlib.suppress(BrokenPipeError, EOFError):
            serve(Agent(store, agent, reader), reader, out)


if __name__ == "__main__":
    if sys.argv[1] == "supervise":
        Job(Store(sys.argv[2]), sys.argv[3]).supervise(int(sys.argv[4]))
    elif sys.argv[1] == "venv":
        sys.exit(venv(sys.argv[2]))
