"""A machine behind `ssh://[user@]host[:port]`: the connection, what can go wrong with it, and its requests.

The OpenSSH client of this machine does the work, with the user's own configuration and keys. Host keys are
always checked and never accepted without being asked; nobody is asked for a password. `devices.agent` is
sent over the connection and answers there. A connection that breaks is made again, and what was asked is
asked again: every request may be repeated.
"""

import json
import os
import re
import secrets
import select
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn
from urllib.parse import parse_qsl, urlsplit

from edgesft.core import console
from edgesft.core.errors import ArtifactError, DeviceError, Interrupted, UsageError, nearest

AGENT = Path(__file__).with_name("agent.py")
CACHE = "~/.cache/edgesft/remote"
CHUNK = 1 << 20
NOISE = 1 << 16  # bytes that login scripts may print before we are heard
SILENCE = 60.0  # seconds without an answer after which a connection counts as broken
HOST = r"[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\]"
USER = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
PATH = r"(?:~?/)?[A-Za-z0-9_.+@=:,][A-Za-z0-9_.+@=:,/-]*"
OPTIONS = ("python", "key", "cache")
OLD, CUT = 97, 98  # exit codes of BOOT

# Ours come first, and ssh takes the first value of an option: nothing given by the user undoes a check.
CHECKS = ("BatchMode=yes", "StrictHostKeyChecking=yes", "ClearAllForwardings=yes", "ControlMaster=no")
DEFAULTS = ("ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3")

# One line without a quote that a remote shell could misread; runs in every Python since 2.6.
BOOT = (
    "import os,sys;v=sys.version_info;"
    "v<(3,8) and (sys.stderr.write('%d.%d\\n'%v[:2]),sys.exit(97));"
    "n,b=int(sys.argv[1]),b'';"
    "exec('while len(b)<n:\\n p=os.read(0,n-len(b))\\n p or sys.exit(98)\\n b+=p');"
    "g={'__name__':'agent'};exec(compile(b,'agent','exec'),g);g['main'](b,sys.argv[2],sys.argv[3])"
)


class LinkLost(DeviceError):
    """The connection broke and did not come back; the run there goes on, the same command finds it."""

    exit_code = 14


class Unreachable(DeviceError):
    """No connection to the machine could be made."""


class FarRefused(DeviceError):
    """The other side cannot do what was asked. kind: see `agent.Refused`."""

    def __init__(self, message: str, kind: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.kind = kind


@dataclass(frozen=True)
class Target:
    """Where a command runs. python: the interpreter there; None makes an environment. key: private key here.
    cache: folder there."""

    host: str
    user: str | None = None
    port: int | None = None
    python: str | None = None
    key: str | None = None
    cache: str = CACHE

    @property
    def title(self) -> str:
        """`user@host:port` as far as given."""
        return (f"{self.user}@" if self.user else "") + self.host + (f":{self.port}" if self.port else "")

    @property
    def known_as(self) -> str:
        """The name under which ssh keeps the host's key."""
        bare = self.host.strip("[]")
        return f"[{bare}]:{self.port}" if self.port not in (None, 22) else bare


def parse(url: str) -> Target:
    """The target of `ssh://[user@]host[:port][?python=PATH&key=PATH&cache=PATH]`.

    What the URL leaves open: EDGESFT_REMOTE_PYTHON and EDGESFT_REMOTE_CACHE. Raises UsageError for anything
    that ssh or a shell could take for something else.
    """
    form = "ssh://[user@]host[:port][?python=/path&key=/path&cache=/path]"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"the device `{url}` is not a URL: {error}", form) from None
    if parts.scheme != "ssh":
        raise UsageError(f"the device `{url}` does not begin with `ssh://`", form)
    if parts.password is not None:
        raise UsageError(f"the device `{parts.hostname}` is given with a password", "use a key: ssh-copy-id")
    user, at, place = parts.netloc.rpartition("@")
    host = (
        place[: place.index("]") + 1] if place.startswith("[") and "]" in place else place.partition(":")[0]
    )
    if not re.fullmatch(HOST, host):
        raise UsageError(f"`{host}` in `{url}` is not a host name", form)
    if at and not re.fullmatch(USER, user):
        raise UsageError(f"`{user}` in `{url}` is not a user name", form)
    if port == 0 or parts.path not in ("", "/") or parts.fragment:
        wrong = "port 0" if port == 0 else f"`{parts.path or '#' + parts.fragment}`"
        raise UsageError(f"{wrong} has no meaning in `{url}`", form)
    given = {
        "python": os.environ.get("EDGESFT_REMOTE_PYTHON"),
        "cache": os.environ.get("EDGESFT_REMOTE_CACHE") or CACHE,
    }
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name not in OPTIONS:
            raise UsageError(f"a device has no option `{name}`", nearest(name, OPTIONS))
        given[name] = value
    for name, path in given.items():
        if path is not None and not re.fullmatch(PATH, path):
            raise UsageError(f"`{path}` cannot be the `{name}` of a device", "a path of plain characters")
    return Target(host, user or None, port, **given)  # type: ignore[arg-type]


def arguments(target: Target, command: str) -> list[str]:
    """The command line of ssh. Raises UsageError if EDGESFT_SSH is not a list of arguments."""
    try:
        extra = shlex.split(os.environ.get("EDGESFT_SSH", ""))
    except ValueError as error:
        raise UsageError(f"EDGESFT_SSH cannot be read: {error}") from None
    out = ["ssh", "-T", "-a", "-x", *(x for option in CHECKS for x in ("-o", option)), *extra]
    out += [x for option in DEFAULTS for x in ("-o", option)]
    if target.port is not None:
        out += ["-p", str(target.port)]
    if target.user is not None:
        out += ["-l", target.user]
    if target.key is not None:
        out += ["-i", os.path.expanduser(target.key)]
    return [*out, "--", target.host.strip("[]"), command]


def boot(target: Target, size: int, mark: str) -> str:
    """What the shell there runs: Python, told to read `size` bytes of program and to answer with `mark`."""
    python = target.python or "python3"
    quoted = '"$HOME"/' + shlex.quote(python[2:]) if python.startswith("~/") else shlex.quote(python)
    return f"exec {quoted} -I -c {shlex.quote(BOOT)} {size} {mark} {shlex.quote(target.cache)}"


class Connection:
    """One ssh process with the agent at its other end.

    Raises Unreachable or DeviceError if it does not come about, LinkLost when it breaks.
    """

    def __init__(self, target: Target, stopped: Callable[[], bool]) -> None:
        self.target, self._stopped = target, stopped
        self._held = bytearray()
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the connection
        source, mark = AGENT.read_bytes(), "edgesft-" + secrets.token_hex(8)
        try:
            # A session of its own: Ctrl-C is for us, who need the connection to stop what runs there.
            self._child = subprocess.Popen(
                arguments(target, boot(target, len(source), mark)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            hint = "install the OpenSSH client, for example `apt install openssh-client`"
            raise DeviceError(f"`ssh` cannot be started: {error.strerror}", hint) from None
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._in, self._out = self._child.stdin.fileno(), self._child.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        try:
            self.hello = self._greet(source, mark)
        except BaseException:
            self.close()
            raise

    def _greet(self, source: bytes, mark: str) -> dict[str, Any]:
        try:
            self._write(source)
            seen = 0
            while (line := self._line()) != mark.encode():
                seen += len(line) + 1
                if seen > NOISE:
                    raise DeviceError(f"`{self.target.title}` prints too much at login")
            return self._answer(self._line())
        except LinkLost:
            self.close()
            _raise_failure(self.target, self._child.returncode, self._said())

    def close(self) -> None:
        """End it; what runs there detached goes on."""
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._child.wait(1.0)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def call(
        self,
        request: Mapping[str, Any],
        payload: IO[bytes] | None = None,
        advance: Callable[[int], None] | None = None,
        timeout: float = SILENCE,
    ) -> tuple[dict[str, Any], bytes]:
        """Ask, and wait `timeout` seconds at most for the answer: (answer, the bytes behind it).

        payload: `request["bytes"]` bytes are read from it and sent along; advance: told of every piece.
        """
        try:
            self._write(json.dumps(request).encode() + b"\n")
            left = int(request["bytes"]) if payload is not None else 0
            while payload is not None and left:
                piece = payload.read(min(left, CHUNK))
                if not piece:
                    raise ArtifactError("a file became shorter while it was sent")
                self._write(piece)
                left -= len(piece)
                if advance is not None:
                    advance(len(piece))
        except LinkLost:
            # Refused in the middle of a file: the answer was sent before the other side closed.
            self._answer(self._line(5.0))
            raise
        answer = self._answer(self._line(timeout))
        return answer, self._exactly(int(answer.get("bytes", 0)))

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(line)
        except ValueError:
            raise LinkLost("the answer was cut off") from None
        if not isinstance(answer, dict):
            raise LinkLost("the answer makes no sense")
        if "error" in answer:
            _raise_refused(self.target, answer["error"])
        return answer

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            self._wait(self._in, writing=True, seconds=SILENCE)
            try:
                rest = rest[os.write(self._in, rest[:CHUNK]) :]
            except BlockingIOError:
                continue
            except OSError:
                raise LinkLost("the connection was closed") from None

    def _wait(self, descriptor: int, *, writing: bool, seconds: float) -> None:
        until = time.monotonic() + seconds
        while True:
            reading, writable = ([], [descriptor]) if writing else ([descriptor], [])
            if any(select.select(reading, writable, [], 0.25)):
                return
            if self._stopped():
                raise Interrupted("stopped")
            if time.monotonic() > until:
                raise LinkLost(f"no answer within {seconds:.0f} s")

    def _more(self, seconds: float) -> None:
        self._wait(self._out, writing=False, seconds=seconds)
        try:
            piece = os.read(self._out, CHUNK)
        except BlockingIOError:
            return
        if not piece:
            said = self._said()
            raise LinkLost("the connection was closed" + (f": {said.splitlines()[-1]}" if said else ""))
        self._held += piece

    def _line(self, seconds: float = SILENCE) -> bytes:
        at = 0
        while (end := self._held.find(b"\n", at)) < 0:
            at = len(self._held)
            self._more(seconds)
        line = bytes(self._held[:end])
        del self._held[: end + 1]
        return line

    def _exactly(self, count: int) -> bytes:
        while len(self._held) < count:
            self._more(SILENCE)
        data = bytes(self._held[:count])
        del self._held[:count]
        return data

    def _said(self) -> str:
        """The end of what ssh and the other side wrote to stderr."""
        descriptor = self._stderr.fileno()  # shared with ssh, so it must not be moved
        size = os.fstat(descriptor).st_size
        return os.pread(descriptor, 4000, max(0, size - 4000)).decode(errors="replace").strip()


def _raise_failure(target: Target, code: int, said: str) -> NoReturn:
    """The error for what ssh said. code: its exit status; 255 is ssh's own, others are of the command."""
    host, last = target.title, (said.splitlines() or [f"ssh ended with status {code}"])[-1]
    python = target.python or "python3"
    if "HOST IDENTIFICATION HAS CHANGED" in said or "differs from the key" in said:
        raise DeviceError(
            f"the host key of `{host}` is not the one known for it: another machine may answer in its place",
            f"compare `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` there with {_scan(target)} here;"
            f" only if they agree: ssh-keygen -R '{target.known_as}'",
        )
    if "Host key verification failed" in said or "host key is known" in said:
        raise DeviceError(
            f"the host key of `{host}` is not known, and is not accepted unseen",
            f"compare `ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub` there with {_scan(target)} here,"
            " then connect once with `ssh` and answer yes",
        )
    if "Permission denied" in said or "Too many authentication failures" in said:
        hint = "a key that needs no password must be accepted there: ssh-copy-id, or ssh-add for a locked key"
        raise DeviceError(f"`{host}` refused the authentication: {last}", hint)
    if code == OLD:
        version = re.search(r"\d+\.\d+", last)
        found = version[0] if version else "too old"
        raise DeviceError(f"`{python}` on `{host}` is {found}, expected 3.8 or later", _python_hint(target))
    if code in (126, 127):
        raise DeviceError(f"`{python}` cannot be started on `{host}`: {last}", _python_hint(target))
    if code == 255:
        where = f"port {target.port}" if target.port else "its port"
        raise Unreachable(
            f"`{host}` cannot be reached: {last}", f"is it on, and does sshd listen at {where}?"
        )
    raise DeviceError(f"EdgeSFT cannot be started on `{host}`: {last}", f"it ended with status {code}")


def _scan(target: Target) -> str:
    port = f"-p {target.port} " if target.port else ""
    return f"`ssh-keyscan {port}{target.host.strip('[]')} | ssh-keygen -lf -`"


def _python_hint(target: Target) -> str:
    return f"name one: --device 'ssh://{target.title}?python=/path/to/python'"


def _raise_refused(target: Target, failure: Mapping[str, Any]) -> NoReturn:
    kind, message = str(failure.get("kind")), str(failure.get("message"))
    if kind == "space":
        free = f", {failure['free'] / 1e6:,.0f} MB are free" if "free" in failure else ""
        needs = f"{failure['needed'] / 1e6:,.1f} MB more are needed" if "needed" in failure else "it is full"
        raise FarRefused(
            f"no room on the disk of `{target.title}`: {needs}{free}",
            kind,
            f"free some disk there, or choose another folder: ?cache=/path (now `{target.cache}`)",
        )
    hint = _python_hint(target) if kind == "python" else None
    raise FarRefused(f"`{target.title}`: {message}", kind, hint)


class Link:
    """Requests to a machine over a connection that may break.

    retries: how often in a row it is made again before LinkLost; first_wait: seconds before the first try,
    doubled for each next one. stop: set it to end with Interrupted. say: told what the user should know.
    """

    def __init__(
        self,
        target: Target,
        *,
        retries: int = 5,
        first_wait: float = 1.0,
        stop: threading.Event | None = None,
        say: Callable[[str], None] = console.say,
    ) -> None:
        self.target, self.say = target, say
        self._retries, self._first_wait = retries, first_wait
        self._stop = stop or threading.Event()
        self._connection: Connection | None = None
        self._failures = 0
        self._root = ""

    @property
    def root(self) -> str:
        """Absolute path of the cache folder there."""
        if not self._root:
            self.call("hello")
        return self._root

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def call(self, do: str, timeout: float = SILENCE, **fields: object) -> tuple[dict[str, Any], bytes]:
        """One request; asked again whenever the connection breaks. Raises LinkLost, FarRefused..."""
        while True:
            if self._stop.is_set():
                raise Interrupted("stopped")
            try:
                answer = self._connected().call({"do": do, **fields}, timeout=timeout)
                self._failures = 0
                return answer
            except LinkLost as error:
                self._again(error)

    def ask(self, do: str, timeout: float = SILENCE, **fields: object) -> dict[str, Any]:
        """The answer of a request that brings no bytes."""
        return self.call(do, timeout, **fields)[0]

    def send(self, sha: str, size: int, have: int, file: IO[bytes], advance: Callable[[int], None]) -> int:
        """Send a file of which `have` bytes are there; goes on where a broken connection stopped.

        Returns the bytes that were sent. Raises ArtifactError if it changed since it was hashed.
        """
        sent = 0

        def count(n: int) -> None:
            nonlocal sent
            sent += n
            advance(n)

        while True:
            file.seek(have)
            request = {"do": "put", "sha": sha, "offset": have, "bytes": size - have}
            try:
                self._connected().call(request, file, count, timeout=10 * SILENCE)
                self._failures = 0
                return sent
            except LinkLost as error:
                self._again(error)
            except FarRefused as error:
                self.close()
                if error.kind == "hash":
                    raise ArtifactError("a file changed while it was sent", "run the command again") from None
                if error.kind != "busy":
                    raise
            state = self.ask("have", sha=sha)
            if state["whole"]:
                return sent
            have = min(int(state["have"]), size)

    def receive(self, job: str, name: str, file: IO[bytes], size: int) -> None:
        """Write the file `name` of a job into `file`, from where `file` stands."""
        while file.tell() < size:
            data = self.call("get", job=job, name=name, offset=file.tell())[1]
            if not data or file.tell() + len(data) > size:
                got = file.tell() + len(data)
                raise DeviceError(
                    f"`{self.target.title}` sent {got} bytes of `{name}`, announced were {size}"
                )
            file.write(data)

    def _connected(self) -> Connection:
        while self._connection is None:
            if self._failures:
                self._pause()
            try:
                self._connection = Connection(self.target, self._stop.is_set)
            except Unreachable as error:
                if not self._root:
                    raise  # it never was: no reason to hope
                self._again(error)
        self._root = self._connection.hello["root"]
        return self._connection

    def _again(self, error: DeviceError) -> None:
        """Count a failure. Raises LinkLost when there were too many in a row."""
        self.close()
        self._failures += 1
        if self._failures > self._retries:
            raise LinkLost(
                f"the connection to `{self.target.title}` broke and did not come back in {self._retries}"
                f" tries: {error.message}",
                "the run there goes on; the same command finds it again",
            ) from None

    def _pause(self) -> None:
        wait = self._first_wait * 2 ** (self._failures - 1)
        tries = f"{self._failures} of {self._retries}"
        self.say(f"the connection to `{self.target.title}` broke, next try in {wait:.3g} s ({tries})")
        if self._stop.wait(wait):
            raise Interrupted("stopped")
