"""The far side of a remote run, without a connection."""

import ast
import hashlib
import json
import os
import sys
import time
import zipfile
from pathlib import Path

import pytest

from edgesft.devices import agent
from edgesft.devices.agent import Agent, Job, Reader, Refused, Store


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "root"))


def give(store: Store, data: bytes, offset: int = 0) -> str:
    store.receive(sha(data), len(data), offset, iter([data[offset:]]))
    return sha(data)


def tree_of(files: dict[str, bytes]) -> tuple[str, dict]:
    listing = {name: [sha(data), len(data)] for name, data in files.items()}
    return sha(json.dumps(listing).encode()), listing


FILES = {"m/a.bin": b"a" * 1000, "m/sub/b.bin": b"b" * 10, "m/twice.bin": b"b" * 10}


@pytest.fixture
def tree(store):
    for data in FILES.values():
        give(store, data)
    name, listing = tree_of(FILES)
    store.assemble(name, listing)
    return name


def test_any_python_from_3_8_on_can_read_it():
    """Syntax, and the names of the standard library that came later."""
    text = Path(agent.__file__).read_text()
    parsed = ast.parse(text, feature_version=(3, 8))
    names = {n.attr for n in ast.walk(parsed) if isinstance(n, ast.Attribute)}
    later = {"removeprefix", "removesuffix", "file_digest", "is_relative_to", "cache", "pairwise", "batched"}
    assert not names & later
    assert not any(isinstance(n, ast.Match) for n in ast.walk(parsed) if hasattr(ast, "Match"))
    imported = {a.name.split(".")[0] for n in ast.walk(parsed) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module.split(".")[0] for n in ast.walk(parsed) if isinstance(n, ast.ImportFrom)}
    assert imported <= sys.stdlib_module_names


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../a", "a/../b", "a//b", "a\\b", "./a", "a\0b", "a\nb"])
def test_names_that_leave_their_folder_are_refused(store, name):
    with pytest.raises(Refused, match="leaves its folder"):
        agent.checked(name)
    data = sha(b"x")
    give(store, b"x")
    with pytest.raises(Refused):
        store.assemble(sha(b"tree"), {name: [data, 1]})
    assert os.listdir(store.at("trees")) in ([], [".new-" + sha(b"tree")])


@pytest.mark.parametrize("name", ["", "../" + "a" * 61, "A" * 64, "a" * 63])
def test_only_digests_name_folders(store, name):
    with pytest.raises(Refused, match="SHA-256"):
        Job(store, name)
    with pytest.raises(Refused, match="SHA-256"):
        store.receive(name, 1, 0, iter([b"x"]))


def test_an_object_is_kept_only_if_it_is_what_it_says(store):
    with pytest.raises(Refused) as caught:
        store.receive(sha(b"right"), 5, 0, iter([b"wrong"]))
    assert caught.value.kind == "hash"
    assert os.listdir(store.at("objects")) == os.listdir(store.at("incoming")) == []


def test_a_broken_transfer_goes_on_behind_what_arrived(store):
    data = os.urandom(1000)

    def breaks():
        yield data[:600]
        raise EOFError

    with pytest.raises(EOFError):
        store.receive(sha(data), 1000, 0, breaks())
    assert store.received(sha(data)) == 600
    give(store, data, offset=600)
    assert Path(store.at("objects", sha(data))).read_bytes() == data


def test_two_connections_that_send_the_same_file(store):
    data = b"x" * 100
    held = agent.locked(store.at("incoming", sha(data) + ".part"))
    assert store.received(sha(data)) == 0
    give(store, data)
    os.close(held)
    assert sha(data) in store.places()


def test_no_room(store, monkeypatch):
    monkeypatch.setenv(agent.RESERVE, str(10**18))
    with pytest.raises(Refused) as caught:
        give(store, b"x" * 10)
    assert caught.value.kind == "space"
    assert caught.value.facts["needed"] == 10


def test_a_full_disk_leaves_no_part(store):
    def full():
        yield b"x" * 10
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        store.receive(sha(b"y" * 20), 20, 0, full())
    assert os.listdir(store.at("incoming")) == []


def test_a_tree_has_single_plain_files(store, tree):
    for name, data in FILES.items():
        path = Path(store.at("trees", tree, "files", name))
        assert path.read_bytes() == data
        assert path.stat().st_nlink == 1
        assert not path.is_symlink()
    assert os.listdir(store.at("objects")) == []  # moved, not copied: nothing is there twice
    assert store.altered(tree) == []


def test_what_another_tree_has_is_not_asked_for_again(store, tree):
    other, listing = tree_of({"n/a.bin": FILES["m/a.bin"], "n/c.bin": b"c"})
    far = Agent(store, "", Reader(0))
    asked = {"trees": {other: listing, tree: {}}, "source": [sha(b"zip"), 3]}
    assert far.do_need(asked) == {"missing": {sha(b"c"): 0, sha(b"zip"): 0}}
    give(store, b"c")
    store.assemble(other, listing)
    assert store.altered(other) == store.altered(tree) == []


def test_an_altered_file_is_noticed_and_alone_lost(store, tree):
    path = Path(store.at("trees", tree, "files", "m/a.bin"))
    path.chmod(0o600)
    path.write_bytes(b"A" * 1000)
    assert store.altered(tree) == ["m/a.bin"]
    listing = tree_of(FILES)[1]
    far = Agent(store, "", Reader(0))
    asked = {"trees": {tree: listing}, "source": [sha(b"zip"), 3]}
    assert far.do_need(asked)["missing"].keys() == {sha(FILES["m/a.bin"]), sha(b"zip")}


def test_a_file_too_many_is_noticed(store, tree):
    Path(store.at("trees", tree, "files", "m/extra.py")).touch()
    assert store.altered(tree) == ["m/extra.py"]


def test_a_truncated_file_is_sent_again(store, tree):
    path = Path(store.at("trees", tree, "files", "m/a.bin"))
    path.chmod(0o600)
    path.write_bytes(b"a")
    far = Agent(store, "", Reader(0))
    asked = {"trees": {tree: tree_of(FILES)[1]}, "source": [sha(b"zip"), 3]}
    assert far.do_need(asked)["missing"].keys() == {sha(FILES["m/a.bin"]), sha(b"zip")}


@pytest.mark.parametrize("name", ["../evil.py", "/tmp/evil.py"])
def test_a_source_that_leaves_its_folder_is_refused(store, tmp_path, name):
    with zipfile.ZipFile(tmp_path / "z", "w") as archive:
        archive.writestr(name, "x")
    packed = (tmp_path / "z").read_bytes()
    give(store, packed)
    with pytest.raises(Refused, match="leaves its folder"):
        store.unpack(sha(packed))
    assert not list(tmp_path.rglob("evil.py"))


def start(store: Store, code: str, source: str = "v1") -> Job:
    job = Job(store, sha(code.encode()))
    job.start(
        {"argv": [sys.executable, "-c", code], "env": {"EDGESFT_JOB": job.name}, "source": source}, PATH
    )
    return job


PATH = agent.__file__


def wait(job: Job, *states: str) -> dict:
    for _ in range(400):
        found = job.state()
        if found["state"] in states:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{found}, expected {states}")


def test_a_job_keeps_its_output_and_its_end(store):
    job = start(store, "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)")
    assert wait(job, "finished")["exit"] == 7
    assert job.log(0) == b"err\n"
    assert job.log(2) == b"r\n"
    assert Path(job.at("stdout")).read_text() == "out\n"
    far = Agent(store, PATH, Reader(0))
    with pytest.raises(Refused, match="not a result"):
        far.do_get({"job": job.name, "name": "job.json", "offset": 0})
    with pytest.raises(Refused):
        far.do_get({"job": job.name, "name": "out/../job.json", "offset": 0})


def test_a_job_is_started_once_until_it_is_taken(store):
    code = "open('ran', 'a').write('x')"
    job = start(store, code)
    wait(job, "finished")
    start(store, code)  # the result still waits for somebody
    assert Path(job.at("work", "ran")).read_text() == "x"
    start(store, code, "v2")  # of another EdgeSFT
    wait(job, "finished")
    assert Path(job.at("work", "ran")).read_text() == "xx"
    job.take()
    assert job.state()["state"] == "taken"
    start(store, code, "v2")
    wait(job, "finished")
    assert Path(job.at("work", "ran")).read_text() == "xxx"


def test_jobs_wait_for_each_other_and_can_be_stopped(store):
    first = start(store, "import time; time.sleep(60) # 1")
    wait(first, "running")
    second = start(store, "print(2)")
    assert second.state()["state"] == "waiting"
    assert store.clean(0.0) == 0  # nothing goes while something runs
    assert first.stop()
    assert wait(first, "finished")["exit"] == -15
    assert wait(second, "finished")["exit"] == 0


def test_a_waiting_job_can_be_stopped(store):
    lock = agent.locked(store.at("device.lock"))
    job = start(store, "print(1)")
    assert wait(job, "waiting")
    time.sleep(0.2)
    assert job.stop()
    assert wait(job, "finished")["exit"] == 130
    os.close(lock)


def test_a_job_whose_processes_are_gone_has_died(store):
    job = start(store, "import time; time.sleep(60) # 2")
    wait(job, "running")
    for name in ("pid", "child"):
        os.kill(int(Path(job.at(name)).read_text()), 9)
    assert wait(job, "died")["source"] == "v1"


def test_a_number_that_is_another_process_by_now_is_left_alone(store):
    job = start(store, "import time; time.sleep(60) # 3")
    wait(job, "running")
    assert job._ours(int(Path(job.at("pid")).read_text()))
    assert not job._ours(os.getpid())
    assert job.stop()


def test_cleaning_removes_what_is_old(store, tree):
    old = time.time() - 10 * 86400
    os.utime(store.at("trees", tree), (old, old))
    give(store, b"new")
    assert store.clean(5.0) == 1
    assert os.listdir(store.at("trees")) == []
    assert os.listdir(store.at("objects")) == [sha(b"new")]


def test_a_reader_gives_lines_and_blocks():
    far, near = os.pipe()
    os.write(near, b"one\ntwo\n12345three\n")
    reader = Reader(far)
    assert (reader.line(), reader.line()) == (b"one", b"two")
    assert b"".join(reader.blocks(5)) == b"12345"
    assert reader.ready(0)
    assert reader.line() == b"three"
    assert not reader.ready(0)
    os.close(near)
    assert reader.ready(0)
    assert reader.line() == b""
    with pytest.raises(EOFError):
        list(reader.blocks(1))
    os.close(far)
