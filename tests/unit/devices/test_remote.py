"""URLs, the command line of ssh, and what its complaints mean. Real connections: tests/e2e/test_remote.py."""

import shlex
import subprocess
import sys

import pytest

from edgesft.core.errors import DeviceError, UsageError
from edgesft.devices import remote
from edgesft.devices.remote import Target


def test_a_url_in_full(monkeypatch):
    monkeypatch.delenv("EDGESFT_REMOTE_PYTHON", raising=False)
    assert remote.parse("ssh://nano") == Target("nano")
    url = "ssh://jet.son@nano.local:2222?python=~/venv/bin/python&key=/k/id&cache=/data/x"
    target = remote.parse(url)
    assert target == Target("nano.local", "jet.son", 2222, "~/venv/bin/python", "/k/id", "/data/x")
    assert target.title == "jet.son@nano.local:2222"
    assert target.known_as == "[nano.local]:2222"
    assert remote.parse("ssh://[fe80::1]:22").host == "[fe80::1]"


def test_the_environment_fills_in(monkeypatch):
    monkeypatch.setenv("EDGESFT_REMOTE_PYTHON", "/opt/python")
    monkeypatch.setenv("EDGESFT_REMOTE_CACHE", "/data/cache")
    target = remote.parse("ssh://nano")
    assert (target.python, target.cache) == ("/opt/python", "/data/cache")
    assert remote.parse("ssh://nano?python=python3.12").python == "python3.12"


@pytest.mark.parametrize(
    "url",
    [
        "nano",
        "http://nano",
        "ssh://",
        "ssh://-oProxyCommand=touch",
        "ssh://-u@nano",
        "ssh://a b@nano",
        "ssh://nano;ls",
        "ssh://$(ls)@nano",
        "ssh://nano`ls`",
        "ssh://user:secret@nano",
        "ssh://nano:0",
        "ssh://nano:70000",
        "ssh://nano:x",
        "ssh://nano/path",
        "ssh://nano#x",
        "ssh://[nano",
        "ssh://nano?pyhton=/x",
        "ssh://nano?python=-c",
        "ssh://nano?python=",
        "ssh://nano?python=/a b",
        "ssh://nano?python=/a;ls",
        "ssh://nano?cache=/a'b",
        "ssh://nano?cache=/a%0Ab",
        "ssh://nano?cache=~root/x",
        "ssh://nano?key=$HOME/x",
    ],
)
def test_odd_urls_are_refused(url):
    with pytest.raises(UsageError) as caught:
        remote.parse(url)
    assert "secret" not in caught.value.message


def test_a_misspelt_option_is_answered():
    with pytest.raises(UsageError) as caught:
        remote.parse("ssh://nano?pyhton=/x")
    assert "`python`" in str(caught.value.hint)


def test_checks_come_before_what_the_user_adds(monkeypatch):
    monkeypatch.setenv("EDGESFT_SSH", "-F '/a b/config' -o StrictHostKeyChecking=no -o ConnectTimeout=1")
    argv = remote.arguments(remote.parse("ssh://u@nano:2222?key=/k"), "COMMAND")
    assert argv.index("StrictHostKeyChecking=yes") < argv.index("StrictHostKeyChecking=no")
    assert argv.index("ConnectTimeout=1") < argv.index("ConnectTimeout=10")
    assert "/a b/config" in argv
    assert argv[-3:] == ["--", "nano", "COMMAND"]
    monkeypatch.setenv("EDGESFT_SSH", "'")
    with pytest.raises(UsageError, match="EDGESFT_SSH"):
        remote.arguments(Target("nano"), "COMMAND")


def test_the_boot_line_survives_a_shell(tmp_path):
    """The shell there sees one line; Python gets the program and our words as they are."""
    program = b"def main(source, mark, root):\n    print(len(source), mark, root)\n"
    target = Target("nano", python=sys.executable, cache=str(tmp_path / "c=d,e"))
    line = remote.boot(target, len(program), "mark")
    assert "\n" not in line
    done = subprocess.run(["sh", "-c", line], input=program, capture_output=True, timeout=30, check=True)
    assert done.stdout.decode().split() == [str(len(program)), "mark", target.cache]
    cut = subprocess.run(["sh", "-c", line], input=program[:-9], capture_output=True, timeout=30, check=False)
    assert cut.returncode == remote.CUT
    home = shlex.split(remote.boot(Target("nano", python="~/bin/python"), 1, "m"))
    assert home[1] == "$HOME/bin/python"


@pytest.mark.parametrize(
    ("code", "said", "message"),
    [
        (255, "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key ...", "is not the one known"),
        (255, "No ED25519 host key is known for x and you have requested strict checking.\n"
         "Host key verification failed.", "is not known, and is not accepted unseen"),
        (255, "u@nano: Permission denied (publickey).", "refused the authentication"),
        (255, "ssh: connect to host nano port 22: Connection refused", "cannot be reached: ssh: connect"),
        (255, "ssh: Could not resolve hostname nano", "cannot be reached"),
        (255, "", "cannot be reached: ssh ended with status 255"),
        (127, "sh: 1: exec: python3: not found", "`python3` cannot be started"),
        (97, "3.6", r"is 3\.6, expected 3\.8"),
        (1, "ModuleNotFoundError: No module named 'fcntl'", "cannot be started on `nano`: ModuleNotFound"),
    ],
)  # fmt: skip
def test_complaints_get_a_sentence_each(code, said, message):
    with pytest.raises(DeviceError, match=message) as caught:
        remote._raise_failure(Target("nano"), code, said)
    assert caught.value.exit_code == 4
    assert caught.value.hint


def test_a_missing_client_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(DeviceError, match="`ssh` cannot be started"):
        remote.Link(Target("nano")).ask("hello")


def test_a_link_lost_has_the_exit_code_of_a_lost_device():
    assert remote.LinkLost.exit_code == 14
