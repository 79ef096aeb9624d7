"""Commands on another machine, against a real OpenSSH server on the loopback interface."""

import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import psutil
import pytest

from edgesft.core import artifact
from edgesft.core.artifact import Request
from edgesft.core.errors import ArtifactError, DeviceError, Interrupted
from edgesft.core.subject import resolve
from edgesft.devices import remote as far
from edgesft.stages import fleet, remote
from edgesft.stages.gating.verdict import DeviceLost

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin:" + os.environ.get("PATH", ""))
CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AcceptEnv EDGESFT_*
"""
CLIENT = """
Host *
  UserKnownHostsFile {folder}/known
  GlobalKnownHostsFile /dev/null
  IdentityFile {folder}/user
  IdentitiesOnly yes
  IdentityAgent none
"""

# Stands in for EdgeSFT where only the way there and back is tested: counts to its second argument and goes
# on where it was stopped, then copies its input into an artefact.
COUNTER = """
import hashlib, json, os, pathlib, sys, time
words = sys.argv[1:]
out = pathlib.Path(words[words.index("-o") + 1]) if "-o" in words else None
kept = (out / ".partial" if out else pathlib.Path("."))
kept.mkdir(parents=True, exist_ok=True)
kept = kept / "count"
begun = int(kept.read_text()) if kept.exists() else 0
for number in range(begun, int(words[1])):
    print(f"\\x1b[31mpair {number}\\x1b[0m", file=sys.stderr, flush=True)
    time.sleep(0.1)
    kept.write_text(str(number + 1))
text = pathlib.Path(words[2]).read_bytes() if len(words) > 2 and words[2] != "-o" else b""
print(json.dumps({"begun": begun, "bytes": len(text)}))
kept.unlink(missing_ok=True)
if out:
    kept.parent.rmdir()
    (out / "copy.bin").write_bytes(text)
    about = {"digest": "sha256:" + hashlib.sha256(text).hexdigest(), "bytes": len(text)}
    manifest = {"schema": 1, "kind": "copy", "files": {"copy.bin": about}, "metrics": {}}
    (out / "manifest.json").write_text(json.dumps(manifest))
sys.exit(10 if words[0] == "fail" else 0)
"""


class Server:
    """An sshd of our own: other keys, another port, nothing of the user's configuration."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        for name in ("host", "user", "other"):
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(make, check=True, timeout=20)
        shutil.copy(folder / "user.pub", folder / "authorized_keys")
        self.know("host")
        (folder / "sshd_config").write_text(CONFIG.format(port=self.port, folder=folder))
        (folder / "ssh_config").write_text(CLIENT.format(folder=folder))
        self.start()

    def know(self, key: str | None) -> None:
        """Which key the client expects of the host."""
        line = "" if key is None else f"[127.0.0.1]:{self.port} {(self.folder / f'{key}.pub').read_text()}"
        (self.folder / "known").write_text(line)

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            arguments = [str(SSHD), "-D", "-e", "-f", str(self.folder / "sshd_config")]
            self.process = subprocess.Popen(arguments, stderr=log, stdin=subprocess.DEVNULL)
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        self.process.kill()
        pytest.skip("sshd does not start here: " + (self.folder / "log").read_text()[-300:])

    def cut(self) -> int:
        """Break every connection, as a lost network would. Returns how many."""
        links = psutil.Process(self.process.pid).children()
        for each in links:
            each.send_signal(signal.SIGKILL)
        return len(links)

    def stop(self) -> None:
        self.cut()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if SSHD is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        pytest.skip("the OpenSSH client and server are not both installed")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd insists on it when it is root
    made = Server(tmp_path_factory.mktemp("sshd"))
    yield made
    made.stop()


@pytest.fixture
def url(server, tmp_path, monkeypatch):
    """The server as a device; what it keeps lies in the test's own folder."""
    monkeypatch.setenv("EDGESFT_SSH", f"-F {server.folder}/ssh_config")
    server.know("host")
    return f"ssh://127.0.0.1:{server.port}?python={sys.executable}&cache={tmp_path / 'far'}"


@pytest.fixture
def counter(monkeypatch):
    """The stand-in goes over the line in place of EdgeSFT."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("edgesft/__init__.py", "")
        archive.writestr("edgesft/__main__.py", COUNTER)
    monkeypatch.setattr(remote, "source", packed.getvalue)
    monkeypatch.setattr(remote, "requirements", list)


@pytest.fixture
def blob(tmp_path):
    """An artefact of two files."""
    folder = tmp_path / "blob dir"
    with artifact.create(folder, Request("data", "test", {}, {})) as (work, _):
        (work.path / "a.bin").write_bytes(os.urandom(100_000))
        (work.path / "b.bin").write_bytes(os.urandom(50_000))
    return artifact.read(folder)


class Lines(list):
    """Collects what is said; `when` calls something once, at the first line with a text in it."""

    def __init__(self, text: str = "", when=None) -> None:
        self._text, self._when = text, when

    def __call__(self, line: str) -> None:
        self.append(line)
        if self._when is not None and self._text in line:
            when, self._when = self._when, None
            when()


@pytest.fixture(scope="module")
def exported(cli, tiny_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("far") / "tiny"
    cli("export", tiny_model, "-o", out)
    return resolve(out)


PROFILE = ["profile", "{exported}", "--prompt-tokens", "8", "--decode-tokens", "4", "--prompts", "2"]
PROFILE += ["--processes", "1", "--threads", "1"]
QUICK = {"retries": 3, "first_wait": 0.05, "bar": False}


def test_profile_and_a_second_one_ships_nothing(url, exported, tmp_path):
    lines = Lines()
    first = remote.run(
        url, [*PROFILE, "--json"], {"exported": exported}, tmp_path / "p", say=lines, bar=False
    )
    assert first.exit_code == 0, lines
    assert first.sent > exported.bytes
    assert json.loads(first.stdout)["tpot_ms"]
    assert artifact.read(tmp_path / "p", "profile").metrics["tpot_ms"]
    assert [p.name for p in tmp_path.joinpath("p").iterdir() if p.name == artifact.PARTIAL] == []
    assert lines[-1] == f"wrote `{tmp_path / 'p'}`"
    second = remote.run(url, ["inspect", "{exported}", "--json"], {"exported": exported}, bar=False)
    assert (second.exit_code, second.sent) == (0, 0)
    assert json.loads(second.stdout)["kind"] == "onnx"
    again = remote.run("ssh://" + url[6:], [*PROFILE, "--json"], {"exported": exported}, tmp_path / "p")
    assert again.stdout == first.stdout  # up to date: nothing is run, not even a connection made


def test_gate_over_a_connection_that_breaks(server, url, exported):
    lines = Lines("gate", lambda: server.cut())
    words = ["gate", "--base", "{base}", "--head", "{head}", "--max-pairs", "8", "--threads", "1", "--json"]
    artifacts = {"base": exported, "head": exported}
    done = remote.run(url, words, artifacts, say=lines, **QUICK)
    assert done.exit_code in (0, 11), lines
    report = json.loads(done.stdout)
    assert report["pairs"] == 8
    assert any("broke, next try" in line for line in lines)


@pytest.mark.usefixtures("counter")
def test_fleet_of_here_and_there(server, url, blob, tmp_path, capfd, monkeypatch):
    stand_in = tmp_path / "stand-in" / "edgesft"
    stand_in.mkdir(parents=True)
    (stand_in / "__main__.py").write_text(COUNTER)
    (stand_in / "__init__.py").touch()
    monkeypatch.setattr(fleet, "_path", lambda: str(stand_in.parent))
    gone = url.replace(f":{server.port}?", ":1?")
    file = tmp_path / "fleet.toml"
    file.write_text(
        f'[devices.bench]\nurl = "local"\n[devices.far]\nurl = "{url}"\n[devices.gone]\nurl = "{gone}"\n'
    )
    summary = fleet.run(fleet.load(file), ["fail", "2", "{x}/a.bin"], {"x": blob}, tmp_path / "out")
    said = capfd.readouterr().err
    assert [d["exit_code"] for d in summary["devices"]] == [10, 10, 4], said
    assert summary["exit_code"] == 10
    assert json.loads((tmp_path / "out" / "fleet.json").read_text()) == summary
    for name in ("bench", "far"):
        assert artifact.read(tmp_path / "out" / name, "copy")
        assert f"{name}: pair 1" in said
    assert "cannot be reached" in summary["devices"][2]["error"]
    assert not (tmp_path / "out" / "gone").exists()


@pytest.mark.usefixtures("counter")
class TestTheWay:
    """Faults of the way there and back."""

    def test_stdout_exit_code_and_artefact(self, url, blob, tmp_path):
        lines = Lines()
        done = remote.run(url, ["fail", "2", "{x}/a.bin"], {"x": blob}, tmp_path / "o", say=lines, **QUICK)
        assert (done.exit_code, done.stdout) == (10, '{"begun": 0, "bytes": 100000}\n')
        assert "pair 0" in lines  # without what would steer the terminal
        assert artifact.read(tmp_path / "o").kind == "copy"
        with pytest.raises(ArtifactError, match="another command"):
            remote.run(url, ["count", "2", "{x}/a.bin"], {"x": blob}, tmp_path / "o", say=lines, **QUICK)

    def test_lost_for_good_then_found_again(self, server, url, tmp_path):
        lines = Lines("pair 1", server.stop)
        try:
            with pytest.raises(far.LinkLost, match="did not come back in 1 tries") as caught:
                remote.run(url, ["count", "15"], {}, tmp_path / "o", say=lines, retries=1, first_wait=0.05)
            assert caught.value.exit_code == 14
            assert not (tmp_path / "o").exists()
        finally:
            server.start()
        lines = Lines()
        done = remote.run(url, ["count", "15"], {}, tmp_path / "o", say=lines, **QUICK)
        assert json.loads(done.stdout)["begun"] == 0  # it was the same run, and it never stopped
        assert "goes on" in lines[0] or "has ended" in lines[0]

    def test_a_gate_that_is_lost_says_so_as_a_gate(self, server, url):
        try:
            with pytest.raises(DeviceLost) as caught:
                remote.run(url, ["gate", "9"], {}, say=Lines("pair 1", server.stop), retries=0)
            assert caught.value.report["verdict"] == "device_lost"
        finally:
            server.start()

    def test_a_run_that_dies_goes_on_where_it_was(self, url, tmp_path):
        def kill() -> None:
            for file in (tmp_path / "far" / "jobs").glob("*/*"):
                if file.name in ("pid", "child"):
                    os.kill(int(file.read_text()), signal.SIGKILL)

        lines = Lines("pair 3", kill)
        done = remote.run(url, ["count", "8"], {}, tmp_path / "o", say=lines, **QUICK)
        assert json.loads(done.stdout)["begun"] in (3, 4)
        assert any("started again" in line for line in lines)

    @pytest.mark.parametrize("how", ["asked", "Ctrl-C"])
    def test_stop_ends_the_run_there_and_the_next_one_goes_on(self, url, tmp_path, how):
        stop = threading.Event()

        def interrupt() -> None:
            raise KeyboardInterrupt

        lines = Lines("pair 3", stop.set if how == "asked" else interrupt)
        with pytest.raises(Interrupted if how == "asked" else KeyboardInterrupt):
            remote.run(url, ["count", "30"], {}, tmp_path / "o", say=lines, stop=stop, **QUICK)
        child = next((tmp_path / "far" / "jobs").glob("*/child"))
        assert not psutil.pid_exists(int(child.read_text()))
        assert not (tmp_path / "o").exists()
        stop.clear()
        lines = Lines()
        done = remote.run(url, ["count", "30"], {}, tmp_path / "o", say=lines, stop=stop, **QUICK)
        assert json.loads(done.stdout)["begun"] >= 3
        assert "pair 0" not in lines

    def test_what_was_altered_there_is_sent_again(self, url, blob, tmp_path):
        words, lines = ["count", "0", "{x}/a.bin"], Lines()
        remote.run(url, words, {"x": blob}, say=lines, **QUICK)
        victim = next((tmp_path / "far" / "trees").rglob("a.bin"))
        victim.chmod(0o600)
        victim.write_bytes(b"x" * 100_000)
        done = remote.run(url, words, {"x": blob}, say=lines, **QUICK)
        assert done.sent == 100_000
        assert any("was altered after it was sent" in line for line in lines)

    def test_disk_full_there(self, server, url, blob, monkeypatch):
        reserve = "-o SetEnv=EDGESFT_REMOTE_RESERVE=1000000000000000000"
        monkeypatch.setenv("EDGESFT_SSH", f"-F {server.folder}/ssh_config {reserve}")
        with pytest.raises(DeviceError, match="no room on the disk") as caught:
            remote.run(url, ["count", "0"], {"x": blob}, **QUICK)
        assert caught.value.exit_code == 4

    def test_an_upload_goes_on_where_it_broke(self, server, url):
        data = os.urandom(8 << 20)
        sha = hashlib.sha256(data).hexdigest()
        link = far.Link(far.parse(url), first_wait=0.05, say=Lines())
        assert link.root
        pieces: list[int] = []

        def advance(count: int) -> None:
            pieces.append(count)
            if len(pieces) == 6:
                assert server.cut()

        sent = link.send(sha, len(data), 0, io.BytesIO(data), advance)
        assert link.ask("have", sha=sha)["whole"]
        link.close()
        assert len(data) <= sent < 2 * len(data)

    def test_the_host_key_is_checked(self, server, url):
        server.know("other")
        with pytest.raises(DeviceError, match="is not the one known") as caught:
            remote.run(url, ["count", "0"], {})
        assert f"[127.0.0.1]:{server.port}" in str(caught.value.hint)
        server.know(None)
        with pytest.raises(DeviceError, match="is not known, and is not accepted unseen"):
            remote.run(url, ["count", "0"], {})
        assert (server.folder / "known").read_text() == ""

    def test_checks_cannot_be_switched_off(self, server, url, monkeypatch):
        server.know(None)
        lax = "-o StrictHostKeyChecking=no"
        monkeypatch.setenv("EDGESFT_SSH", f"-F {server.folder}/ssh_config {lax}")
        with pytest.raises(DeviceError, match="not accepted unseen"):
            remote.run(url, ["count", "0"], {})

    def test_unreachable_refused_and_without_python(self, server, url, tmp_path):
        with socket.socket() as held:
            held.bind(("127.0.0.1", 0))
            closed = url.replace(f":{server.port}?", f":{held.getsockname()[1]}?")
            with pytest.raises(far.Unreachable, match="cannot be reached") as caught:
                remote.run(closed, ["count", "0"], {})
        assert caught.value.exit_code == 4
        (server.folder / "ssh_config").write_text(
            CLIENT.format(folder=server.folder).replace("/user\n", "/other\n")
        )
        try:
            with pytest.raises(DeviceError, match="refused the authentication"):
                remote.run(url, ["count", "0"], {})
        finally:
            (server.folder / "ssh_config").write_text(CLIENT.format(folder=server.folder))
        with pytest.raises(DeviceError, match="cannot be started"):
            remote.run(url.replace(sys.executable, "/no/such/python"), ["count", "0"], {})
        old = tmp_path / "python2"
        old.write_text("#!/bin/sh\necho 2.7 >&2\nexit 97\n")
        old.chmod(0o700)
        with pytest.raises(DeviceError, match=r"is 2\.7, expected 3\.8"):
            remote.run(url.replace(sys.executable, str(old)), ["count", "0"], {})

    def test_a_python_without_what_edgesft_needs(self, url, monkeypatch):
        monkeypatch.setattr(remote, "requirements", lambda: ["no-such-distribution>=1"])
        with pytest.raises(DeviceError, match="lacks `no-such-distribution`"):
            remote.run(url, ["count", "0"], {}, **QUICK)

    @pytest.mark.slow  # a folder with pip in it takes long to make
    def test_an_environment_that_cannot_be_made(self, url, monkeypatch):
        monkeypatch.setattr(remote, "requirements", lambda: ["no-such-distribution @ file:///no/such.whl"])
        without = url.replace(f"python={sys.executable}&", "")
        lines = Lines()
        with pytest.raises(DeviceError, match="no environment could be made") as caught:
            remote.run(without, ["count", "0"], {}, say=lines, **QUICK)
        assert "such.whl" in caught.value.message
        assert "?python=" in str(caught.value.hint)

    def test_an_environment_is_made_once(self, url, monkeypatch):
        without = url.replace(f"python={sys.executable}&", "")
        for expected in (True, False):
            lines = Lines()
            done = remote.run(without, ["count", "0"], {}, say=lines, **QUICK)
            assert done.exit_code == 0
            assert any("making an environment" in line for line in lines) is expected
