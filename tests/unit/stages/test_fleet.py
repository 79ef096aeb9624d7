"""Fleet files, exit codes and tables. Real runs: tests/e2e/test_remote.py."""

import json

import pytest

from edgesft.core.errors import ArtifactError, DeviceError, UsageError
from edgesft.stages import fleet, remote


@pytest.fixture
def load(tmp_path):
    def call(text: str) -> list[fleet.Member]:
        file = tmp_path / "fleet.toml"
        file.write_text(text)
        return fleet.load(file)

    return call


def test_devices_and_their_options(load):
    bench, nano = load(
        '[devices.bench]\nurl = "local"\nthreads = 2\n'
        '[devices.nano]\nurl = "ssh://jetson@nano"\n'
        "options = { prompt_tokens = 32, contexts = [1, 2], html = true, energy = false }\n"
    )
    assert (bench.name, bench.url, bench.arguments) == ("bench", "local", ["--threads", "2"])
    words = "--prompt-tokens 32 --contexts 1 --contexts 2 --html --no-energy"
    assert nano.arguments == words.split()


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "names no device", "url"),
        ("[device.a]\nurl = 'local'", "has a table `device`", "`devices`"),
        ("[devices.a]\nulr = 'local'", "has no field `ulr`", "`url`"),
        ("[devices.a]\nthreads = 1", "`url` is `None`", None),
        ("[devices.a]\nurl = 'ftp://x'", "does not begin with `ssh://`", None),
        ("[devices.a]\nurl = 'ssh://-x'", "is not a host name", None),
        ("[devices.'../a']\nurl = 'local'", "the name of a device", None),
        ("[devices.a]\nurl = 'local'\nthreads = true", "`threads` is `True`", None),
        ("[devices.a]\nurl = 'local'\noptions = 1", "expected a table", None),
        ("[devices.a]\nurl = 'local'\noptions = { 'a b' = 1 }", "cannot be an option", None),
        ("[devices.a]\nurl = 'local'\noptions = { out = 'x' }", "not for a fleet to set", None),
        ("[devices]\na = 1", "expected a table", None),
        ("[devices", "is not TOML", None),
    ],
)
def test_bad_files_are_refused(load, text, message, hint):
    with pytest.raises(UsageError, match=message) as caught:
        load(text)
    assert hint is None or hint in str(caught.value.hint)


def test_a_missing_file(tmp_path):
    with pytest.raises(ArtifactError, match="cannot be read"):
        fleet.load(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([], 0),
        ([0, 0], 0),
        ([0, 11, 10, 14], 10),
        ([14, 13, 12], 14),
        ([12, 13, 0], 13),
        ([11, 12], 12),
        ([4, 11], 11),
        ([2, 4], 4),
        ([0, 99], 99),
    ],
)
def test_the_worst_exit_code(codes, expected):
    assert fleet.worst(codes) == expected


def test_one_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capfd):
    def run(url, command, artifacts, out, *, stop, say, bar):
        assert command[-2:] == ["--threads", "3"] or "good" not in url
        if "bad" in url:
            raise DeviceError("it is off", "switch it on")
        if "odd" in url:
            raise RuntimeError("what")
        say("error: head is slower")
        out.mkdir()
        report = {"verdict": "fail", "ratio": 1.0512, "pairs": 8, "metric": "tpot", "raw": []}
        (out / "verdict.json").write_text(json.dumps(report))
        return remote.Result(10, "")

    monkeypatch.setattr(remote, "run", run)
    members = [fleet.Member(n, f"ssh://{n}", 3) for n in ("bad", "good", "odd")]
    summary = fleet.run(members, ["gate"], {}, tmp_path / "out")
    bad, good, odd = summary["devices"]
    assert (summary["exit_code"], bad["exit_code"], odd["exit_code"]) == (10, 4, 70)
    errors = [each["error"] for each in summary["devices"]]
    assert errors == ["it is off", "head is slower", "RuntimeError: what"]
    assert good["metrics"] == {"verdict": "fail", "metric": "tpot", "ratio": 1.0512, "pairs": 8}
    columns, rows = fleet.table(summary)
    assert columns == ["device", "exit", "s", "verdict", "metric", "ratio", "pairs", ""]
    assert rows[0] == ["bad", "4", "0", "-", "-", "-", "-", "it is off"]
    assert rows[1][3:] == ["fail", "tpot", "1.05", "8", "head is slower"]
    assert "bad: hint: switch it on" in capfd.readouterr().err


def test_numbers_of_a_profile(tmp_path):
    profile = {"tpot_ms": {"p50": 1.5, "p99": None}, "ttft_ms": {"p50": 3}, "peak_memory_bytes": 7}
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    (tmp_path / "verdict.json").write_text("{broken")
    found = fleet.metrics(tmp_path)
    assert found == {"tpot_p50_ms": 1.5, "ttft_p50_ms": 3, "peak_memory_bytes": 7}
