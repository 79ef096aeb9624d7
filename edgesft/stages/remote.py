"""A whole command of EdgeSFT on another machine: artefacts go there by hash, the record comes back.

A run there is known by the digest of its command and its artefacts. The same command finds it again: while it
runs, it is watched; once it has ended, its result is fetched; when it died, it is started once more in the
folder that it wrote, so that it goes on behind its last pair.
"""

import contextlib
import functools
import io
import os
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

import edgesft
from edgesft.core import artifact, catalog, console
from edgesft.core.artifact import Artifact
from edgesft.core.errors import ArtifactError, DeviceError, Interrupted
from edgesft.core.subject import Graph
from edgesft.stages.gating.verdict import DeviceLost

RECORD = ".remote.json"  # hidden: no part of the artefact
WAIT = 10.0  # seconds that the other side holds back an answer without news
LONG = 1800.0  # seconds for requests that hash or copy all that was sent
KEPT_DAYS = 14.0
SHIPPED = (".py", ".toml", ".cpp", ".cu", ".h", ".html", ".json", ".typed")
NEEDED = (3, 11)
STOPPED = 130
TAIL = 6  # lines of a failed installation that the message shows


@dataclass(frozen=True)
class Result:
    """How a command ended there. stdout: as it wrote it. sent: bytes of files that had to be sent."""

    exit_code: int
    stdout: str
    sent: int = 0


@dataclass(frozen=True)
class Parcel:
    """An artefact as it travels. files: name there -> (SHA-256, file here). target: what stands for it."""

    tree: str
    target: str
    files: Mapping[str, tuple[str, Path]]

    @property
    def listing(self) -> dict[str, list[Any]]:
        """Name -> [SHA-256, bytes]."""
        return {name: [sha, path.stat().st_size] for name, (sha, path) in self.files.items()}


def run(
    url: str,
    command: Sequence[str],
    artifacts: Mapping[str, Artifact],
    out: Path | None = None,
    *,
    retries: int = 5,
    first_wait: float = 1.0,
    stop: threading.Event | None = None,
    say: Callable[[str], None] = console.say,
    bar: bool = True,
) -> Result:
    """Run `edgesft COMMAND` on the machine of `url`; `{name}` in it stands for the artefact of that name.

    out: folder here that gets what the command writes with `-o`, whole or not at all. retries, first_wait:
    see `devices.remote.Link`. stop: set it to end the run there. say: gets every line of its stderr. bar:
    show a progress bar while files are sent.
    Raises UsageError (the URL), DeviceError (not reachable, refused, disk full...), ArtifactError (`out`),
    and with exit code 14 LinkLost, or DeviceLost for a gate, when the machine went away.
    """
    far = catalog.runtime("devices.remote")
    target = far.parse(url)
    parcels = {name: pack(each) for name, each in artifacts.items()}
    gating = list(command[:1]) == ["gate"]
    keep = out is not None or gating  # a gate goes on by pair only with a folder
    job = _identity(command, parcels, keep, target.python)
    if out is not None:
        done = _answered(out, job, target.title)
        if done is not None:
            say(f"up to date: `{out}`")
            return done
    link = far.Link(target, retries=retries, first_wait=first_wait, stop=stop, say=say)
    session = _Session(link, parcels, job, _translated(link, parcels, artifacts, job, out, say), bar)
    with _claimed(out) as products:
        try:
            return session.run([*command], keep, out, products)
        except (KeyboardInterrupt, Interrupted):
            _stop(far.Link(target, retries=0, say=say), job, say)
            raise
        except far.LinkLost as error:
            if gating:
                report = {"verdict": "device_lost", "error": error.message, "ratio": None}
                raise DeviceLost(error.message, report, error.hint) from None
            raise
        finally:
            link.close()


def pack(subject: Artifact) -> Parcel:
    """The files of an artefact with their hashes: those of its manifest, else computed now."""
    if isinstance(subject, Graph):
        folder = subject.path.parent
        paths = {p.relative_to(folder).as_posix(): p for p in subject.files}
        target = subject.path.name
    elif subject.path.is_file():
        target = subject.path.name
        paths = {target: subject.path}
    else:
        target = re.sub(r"[^A-Za-z0-9._-]+", "-", subject.path.resolve().name).strip("-.") or "artifact"
        found = (p for p in sorted(subject.path.rglob("*")) if p.is_file())
        names = {p.relative_to(subject.path).as_posix(): p for p in found}
        shown = {n: p for n, p in names.items() if not any(part.startswith(".") for part in n.split("/"))}
        paths = {f"{target}/{name}": path for name, path in shown.items()}
    listed = subject.manifest.get("files", {})
    files = {}
    for name, path in paths.items():
        known = listed.get(name.partition("/")[2])
        digest = str(known["digest"]) if known else artifact.digest_file(path)
        files[name] = (digest.removeprefix("sha256:"), path)
    tree = artifact.digest_json({name: sha for name, (sha, _) in files.items()})
    return Parcel(tree.removeprefix("sha256:"), target, files)


def _identity(command: Sequence[str], parcels: Mapping[str, Parcel], keep: bool, python: str | None) -> str:
    trees = {name: parcel.tree for name, parcel in parcels.items()}
    asked = {"command": list(command), "artifacts": trees, "out": keep, "python": python}
    return artifact.digest_json(asked).removeprefix("sha256:")


@functools.cache
def source() -> bytes:
    """EdgeSFT as a zip archive, the same bytes for the same files; with its metadata, for `doctor`."""
    root = Path(edgesft.__file__).resolve().parent
    names: dict[str, bytes] = {}
    for folder, _, files in os.walk(root, followlinks=True):
        if "__pycache__" not in folder:
            paths = (Path(folder) / f for f in files if f.endswith(SHIPPED))
            names |= {f"edgesft/{p.relative_to(root).as_posix()}": p.read_bytes() for p in paths}
    with contextlib.suppress(metadata.PackageNotFoundError):
        about = metadata.distribution("edgesft").read_text("METADATA") or ""
        names[f"edgesft-{edgesft.__version__}.dist-info/METADATA"] = about.encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(names):
            archive.writestr(zipfile.ZipInfo(name), names[name], zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def requirements() -> list[str]:
    """What EdgeSFT needs to run, as it says of itself."""
    return [text for text in metadata.requires("edgesft") or [] if "extra ==" not in text]


def constraints() -> str:
    """The versions that this project tests with, where its own folder is at hand."""
    file = Path(edgesft.__file__).resolve().parent.parent / "constraints.txt"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


class _Session:
    """One run: what is sent for it, its start, its lines, its end."""

    def __init__(
        self,
        link: Any,  # noqa: ANN401 - a devices.remote.Link
        parcels: Mapping[str, Parcel],
        job: str,
        say: Callable[[str], None],
        bar: bool,
    ) -> None:
        self.link, self.parcels, self.job, self.say, self.bar = link, parcels, job, say, bar
        self.host = link.target.title
        self.sent = 0
        self.code = artifact.digest_bytes(source()).removeprefix("sha256:")

    def run(self, command: list[str], keep: bool, out: Path | None, products: Path | None) -> Result:
        """From the first request to the last."""
        self._begin(command, keep)
        ended = self._follow(self.job, self.say)
        if ended["state"] in ("died", "absent"):
            self.say(f"the run on `{self.host}` died; it is started again and goes on")
            self._start(command, keep)
            ended = self._follow(self.job, self.say)
        code = self._exit_code(ended)
        stdout = self._stdout()
        if out is not None and products is not None:
            self._fetch(products, code)
            record = {"job": self.job, "host": self.host, "exit_code": code, "stdout": stdout}
            _seal(products, out, record)
        self.link.ask("take", timeout=LONG, job=self.job, days=KEPT_DAYS)
        return Result(code, stdout, self.sent)

    def _begin(self, command: list[str], keep: bool) -> None:
        """Find the run there, or start it."""
        found = self.link.call("poll", job=self.job, offset=0, wait=0)[0]
        state = found["state"]
        if state == "finished" and (found["exit"] < 0 or found["exit"] == STOPPED):
            self.link.ask("take", timeout=LONG, job=self.job, days=KEPT_DAYS)
        elif state in ("running", "waiting", "finished") and found["source"] == self.code:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(found["started_at"]))
            word = "has ended" if state == "finished" else "goes on"
            self.say(f"the run that was started on `{self.host}` at {when} {word}")
            return
        if state in ("running", "waiting"):  # of another version of EdgeSFT
            self.link.ask("stop", timeout=LONG, job=self.job)
        self._start(command, keep)

    def _start(self, command: list[str], keep: bool) -> None:
        code = self._ship()
        python = self._python()
        root = self.link.root
        places = {f"{{{n}}}": f"{root}/trees/{p.tree}/files/{p.target}" for n, p in self.parcels.items()}
        for name, place in places.items():
            command = [word.replace(name, place) for word in command]
        environment = {"PYTHONPATH": code, "NO_COLOR": "1"}
        if self.link.target.cache != catalog.runtime("devices.remote").CACHE:
            environment |= {"EDGESFT_CACHE": f"{root}/cache", "EDGESFT_CALIBRATIONS": f"{root}/calibrations"}
        argv = [python, "-m", "edgesft", *command, *(["-o", f"{root}/jobs/{self.job}/out"] if keep else [])]
        self.link.ask("start", job=self.job, argv=argv, env=environment, source=self.code)

    def _ship(self) -> str:
        """Send what is missing. Returns the folder of EdgeSFT there."""
        trees = {parcel.tree: parcel.listing for parcel in self.parcels.values()}
        asked = {"trees": trees, "source": [self.code, len(source())]}
        for _ in range(3):
            missing = self.link.ask("need", timeout=LONG, **asked)["missing"]
            self._send(missing)
            try:
                answer = self.link.ask("assemble", timeout=LONG, **asked)
            except DeviceError as error:
                if getattr(error, "kind", "") != "gone":
                    raise
                continue  # somebody cleaned up in between
            if not answer["altered"]:
                return str(answer["source"])
            name = next(iter(answer["altered"].values()))[0]
            self.say(f"warning: `{name}` on `{self.host}` was altered after it was sent; it is sent again")
        raise ArtifactError(
            f"files on `{self.host}` are altered as soon as they are sent", "look who does it"
        )

    def _send(self, missing: Mapping[str, int]) -> None:
        places = {sha: path for parcel in self.parcels.values() for sha, path in parcel.files.values()}
        sizes = {sha: len(source()) if sha == self.code else places[sha].stat().st_size for sha in missing}
        total = sum(sizes[sha] - have for sha, have in missing.items())
        if not missing:
            return
        with contextlib.ExitStack() as stack:
            title = f"sending to {self.host}, KiB"
            shown = stack.enter_context(console.progress(title, total >> 10)) if self.bar else None
            if shown is None:
                self.say(f"sending {total / 1e6:,.1f} MB to `{self.host}`")
            told = 0

            def advance(count: int) -> None:
                nonlocal told
                self.sent += count
                if shown is not None:
                    shown.advance((self.sent >> 10) - told)
                told = self.sent >> 10

            for sha, have in missing.items():
                with contextlib.ExitStack() as opened:
                    file: IO[bytes] = io.BytesIO(source())
                    if sha != self.code:
                        file = opened.enter_context(places[sha].open("rb"))
                    self.link.send(sha, sizes[sha], have, file, advance)

    def _python(self) -> str:
        """A Python there that can run EdgeSFT: the one named, else that of an environment made for it."""
        from packaging.requirements import Requirement

        wanted = requirements()
        named = self.link.target.python
        hint = f"name one that can: --device 'ssh://{self.host}?python=/path/to/python'"
        if named is None:
            return self._environment(wanted, hint)
        names = [Requirement(text).name for text in wanted]
        found = self.link.ask("probe", timeout=120.0, python=named, packages=names)
        version = ".".join(map(str, found["version"]))
        if tuple(found["version"]) < NEEDED:
            raise DeviceError(f"`{named}` on `{self.host}` is {version}, expected 3.11 or later", hint)
        if found["missing"]:
            lacks = ", ".join(f"`{name}`" for name in found["missing"])
            raise DeviceError(f"`{named}` on `{self.host}` lacks {lacks}", hint)
        return str(found["python"])

    def _environment(self, wanted: list[str], hint: str) -> str:
        made = self.link.ask("environment", requirements=wanted, constraints=constraints())
        if not made["ready"]:
            self.say(f"making an environment on `{self.host}`; this happens once and takes minutes")
            lines: list[str] = []

            def note(line: str) -> None:
                lines.append(line)
                self.say(line)

            ended = self._follow(made["job"], note)
            self.link.ask("take", timeout=LONG, job=made["job"], days=KEPT_DAYS)
            if ended.get("exit") != 0:
                end = "".join(f"\n  | {line}" for line in lines[-TAIL:])
                raise DeviceError(f"no environment could be made on `{self.host}`{end}", hint)
        return str(made["python"])

    def _follow(self, job: str, tell: Callable[[str], None]) -> dict[str, Any]:
        """Pass on what a job logs until it has ended. Returns its last state."""
        offset, held, known = 0, b"", ""
        patience = 1
        while True:
            state, text = self.link.call("poll", job=job, offset=offset, wait=WAIT, known=known)
            offset += len(text)
            *lines, held = (held + text).split(b"\n")
            for line in lines:
                tell(plain(line))
            if not text and state["state"] not in ("running", "waiting"):
                if held:
                    tell(plain(held))
                return dict(state)
            if state["state"] == known == "waiting":
                if not patience:
                    self.say(f"another run has `{self.host}` for itself; this one waits for its end")
                patience -= 1
            known = str(state["state"])

    def _exit_code(self, ended: Mapping[str, Any]) -> int:
        """The exit code there. Raises LinkLost if its process is gone."""
        lost = catalog.runtime("devices.remote").LinkLost
        if ended["state"] in ("died", "absent"):
            raise lost(f"the run on `{self.host}` died twice without a word", "the same command tries again")
        code = int(ended["exit"])
        if code < 0:
            self.link.ask("take", timeout=LONG, job=self.job, days=KEPT_DAYS)
            raise lost(
                f"the run on `{self.host}` was killed by signal {-code}; 9 often means too little memory",
                "the same command goes on",
            )
        return code

    def _stdout(self) -> str:
        answer = io.BytesIO()
        while piece := self.link.call("get", job=self.job, name="stdout", offset=answer.tell())[1]:
            answer.write(piece)
        return answer.getvalue().decode("utf-8", errors="replace")

    def _fetch(self, products: Path, code: int) -> None:
        """Bring what it wrote into `products`, and compare it with its hashes."""
        files = self.link.ask("results", timeout=LONG, job=self.job)["files"]
        if not files:
            if code == 0:
                raise ArtifactError(f"the run on `{self.host}` ended well but wrote no artefact")
            return
        try:
            for name, (sha, size) in files.items():
                path = products / artifact.safe_name(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as file:
                    self.link.receive(self.job, f"out/{name}", file, size)
                    file.flush()
                    os.fsync(file.fileno())
                if artifact.digest_file(path) != f"sha256:{sha}":
                    raise ArtifactError(f"`{name}` of `{self.host}` arrived with another SHA-256")
        except OSError as error:
            raise ArtifactError(f"the result cannot be written here: {error.strerror}") from None
        artifact.read(products)


def _translated(
    link: Any,  # noqa: ANN401 - a devices.remote.Link
    parcels: Mapping[str, Parcel],
    artifacts: Mapping[str, Artifact],
    job: str,
    out: Path | None,
    say: Callable[[str], None],
) -> Callable[[str], None]:
    """`say`, with the folders of the other side in the words of this one."""

    def tell(line: str) -> None:
        for name, parcel in parcels.items():
            line = line.replace(f"{link.root}/trees/{parcel.tree}/files/{parcel.target}", artifacts[name].ref)
        say(line.replace(f"{link.root}/jobs/{job}/out", str(out or "OUT")))

    return tell


def plain(line: bytes) -> str:
    """A line as it may be shown: what steers a terminal is left out."""
    text = re.sub(r"\x1b\[[0-9;?]*[ -/]*[@-~]", "", line.decode("utf-8", errors="replace"))
    return "".join(c for c in text if c.isprintable() or c == "\t")


def _stop(link: Any, job: str, say: Callable[[str], None]) -> None:  # noqa: ANN401 - a devices.remote.Link
    """End the run there, as far as it can be reached."""
    host = link.target.title
    ended = False
    try:
        say(f"stopping the run on `{host}`")
        ended = link.ask("stop", job=job)["ended"]
        link.ask("take", job=job, days=KEPT_DAYS)  # the next time it is a new run, which goes on
    except (DeviceError, Interrupted, KeyboardInterrupt):
        pass  # the reason does not matter: what matters is whether it still runs
    finally:
        link.close()
    if not ended:
        say(f"warning: the run on `{host}` may still run; the same command finds it again")


def _answered(out: Path, job: str, host: str) -> Result | None:
    """The result at `out` if it answers this very run. Raises ArtifactError if `out` holds anything else."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise ArtifactError(f"`{out}` is a file, expected a folder to write into")
    if artifact.read_manifest(out) is not None:
        record = artifact.read_json(out / RECORD) or {}
        if record.get("job") != job or record.get("host") != host:
            why = "it was made by another command or on another machine"
            raise ArtifactError(f"`{out}` holds another artefact: {why}", "choose another `-o` or remove it")
        artifact.read(out)
        return Result(int(record["exit_code"]), str(record["stdout"]))
    if any(each.name != artifact.PARTIAL for each in out.iterdir()):
        raise ArtifactError(f"`{out}` holds something that is not an artefact", "choose another `-o`")
    return None


@contextlib.contextmanager
def _claimed(out: Path | None) -> Iterator[Path | None]:
    """A folder for the products of `out`, which nobody else writes meanwhile; gone afterwards."""
    if out is None:
        yield None
        return
    made = not out.exists()
    partial = out / artifact.PARTIAL
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"`{out}` cannot be written: {error.strerror}") from None
    lock = FileLock(partial / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        hint = "wait for it, or choose another `-o`"
        raise ArtifactError(f"`{out}` is being written by another process", hint) from None
    try:
        products = partial / "products"
        shutil.rmtree(products, ignore_errors=True)
        products.mkdir()
        yield products
    finally:
        lock.release()
        shutil.rmtree(partial, ignore_errors=True)
        if made and out.exists() and not any(out.iterdir()):
            out.rmdir()


def _seal(products: Path, out: Path, record: Mapping[str, Any]) -> None:
    """Move the products into place, the manifest last."""
    if not (products / artifact.MANIFEST).exists():
        return
    artifact.write_json(products / RECORD, record)
    for path in sorted(products.iterdir(), key=lambda p: p.name == artifact.MANIFEST):
        os.replace(path, out / path.name)
