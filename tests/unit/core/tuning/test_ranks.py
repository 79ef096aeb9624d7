import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgesft.core.artifact import Artifact, digest_file
from edgesft.core.data.batches import ArrayBatch
from edgesft.core.errors import DeviceError, UsageError
from edgesft.core.tuning.ranks import Log, Ranks, join

HEAD = """
import json, os, sys
from pathlib import Path
from edgesft.core.tuning import ranks as module
from edgesft.core.errors import EdgeSFTError
folder = Path(sys.argv[1])
"""

# A zeroth-order run on a linear classifier in float64: journal, broadcast, replay, as in training.
LOOP = """
import numpy as np
from edgesft.core.data.batches import ArrayBatch
from edgesft.core.journal import Journal

STEPS, EPS, LR = 12, 1e-3, 0.05

def batch(step):
    rng = np.random.default_rng(step)
    length = rng.integers(2, 6, 7)
    mask = (np.arange(5) < length[:, None]).astype(np.int64)
    return ArrayBatch("labels", rng.integers(1, 9, (7, 5)) * mask, mask, np.arange(7) * 5 + length - 1,
                      rng.integers(0, 3, 7), np.full(7, 1 / 7, np.float32), np.arange(7),
                      choices=np.arange(3), gold=rng.integers(0, 3, 7))

def loss(theta, part):
    if part is None:
        return 0.0
    x = np.stack([(part.input_ids == v).sum(1) for v in range(1, 9)], 1).astype(float)
    scores = x @ theta
    top = scores.max(1)
    wrong = np.log(np.exp(scores - top[:, None]).sum(1)) + top - scores[np.arange(len(x)), part.gold]
    return float(wrong.mean())

def run(ranks, file, die_at=None):
    theta = np.zeros((8, 3))
    journal = Journal(file) if ranks.leader else None
    records = [json.loads(x) for x in ranks.broadcast(file.read_bytes() if journal else None).splitlines()]
    def update(step, g):
        nonlocal theta
        theta = theta - LR * g * np.random.default_rng(1000 + step).standard_normal(theta.shape)
    for record in records:
        update(record["step"], record["g"])
        ranks.log.add(record["step"], [record["g"]])
    for step in range(len(records), STEPS):
        if step == die_at and ranks.rank == 1 and not ranks.restarts:
            os._exit(9)
        z = np.random.default_rng(1000 + step).standard_normal(theta.shape)
        part, share = ranks.split(batch(step))
        plus, minus = ranks.mean([loss(theta + s * EPS * z, part) for s in (1, -1)], share)
        g = (plus - minus) / (2 * EPS)
        ranks.log.add(step, [g])
        if journal:
            journal.append({"step": step, "g": g})
        update(step, g)
    ranks.verify()
    if journal:
        journal.close()
    return theta, len(records)
"""


def launch(folder: Path, source: str, *, world: int = 2, restarts: int = 0) -> str:
    script = folder / "script.py"
    script.write_text(source)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)),
            *("--max-restarts", str(restarts), "--monitor-interval", "0.1", str(script), str(folder)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def alone(folder: Path):
    scope: dict[str, object] = {"__name__": "alone"}
    argv, sys.argv = sys.argv, ["script", str(folder)]
    try:
        exec(HEAD + LOOP, scope)
    finally:
        sys.argv = argv
    return scope["run"](Ranks(), folder / "alone.jsonl")[0]


def test_two_ranks_make_the_run_of_one_and_every_refusal_is_made_by_both(tmp_path):
    """One launch for all that two ranks do while both live: a process group takes seconds to start."""
    body = """
import socket, struct
def wire():
    total = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            s = socket.socket(fileno=os.dup(int(fd)))
        except OSError:
            continue
        with s:
            if s.family in (socket.AF_INET, socket.AF_INET6) and s.type == socket.SOCK_STREAM:
                info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("<Q", info, 200)[0] if len(info) >= 208 else 0
    return total

def refusal(call):
    try:
        call()
    except EdgeSFTError as error:
        return [type(error).__name__, error.message]

with module.join(timeout=60) as ranks:
    out = {"rank": ranks.rank, "leader": ranks.leader}
    ranks.agree(data="sha256:1", model="sha256:2")
    theta, _ = run(ranks, folder / "journal.jsonl")
    out["theta"] = theta.tobytes().hex()
    out["log"] = ranks.log.digest.hex()
    sent, on_wire = ranks.bytes_sent, wire()
    for _ in range(50):
        ranks.mean([1.0, 2.0], 0.5)
    out["sent"], out["wire"] = (ranks.bytes_sent - sent) / 50, (wire() - on_wire) / 50
    out["many"] = ranks.mean([float(i) for i in range(19)], 1.0)
    out["ignored"] = ranks.mean([float("nan") if ranks.rank else 3.0], 1.0 - ranks.rank)
    out["nan"] = str(ranks.mean([float("nan") if ranks.rank else 3.0], 0.5)[0])
    one_row, _ = module.Ranks(0, 7).split(batch(0))
    part, share = ranks.split(one_row)
    out["one row"] = [part is None, share, ranks.mean([loss(theta, part)], share)[0] - loss(theta, one_row)]
    out["bytes"] = ranks.broadcast(b"x" * 100_000 if ranks.leader else None).decode()[:3]
    out["empty"] = ranks.broadcast(b"" if ranks.leader else None) == b""
    if ranks.rank == 1:
        ranks.ask_to_stop()
    before = ranks.stopping
    ranks.mean([0.0], 0.5)
    out["stopping"] = [before, ranks.stopping]
    out["facts"] = refusal(lambda: ranks.agree(data=f"sha256:{ranks.rank}"))
    out["count"] = refusal(lambda: ranks.mean([0.0] * (1 + ranks.rank), 0.5))
    ranks.log.add(12, [0.1 + ranks.rank])
    out["logs"] = refusal(lambda: ranks.mean([0.0], 0.5))
    ranks.barrier()
    (folder / f"{ranks.rank}.json").write_text(json.dumps(out))
"""
    launch(tmp_path, HEAD + LOOP + body)
    zero, one = (json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1))
    assert (zero["rank"], zero["leader"], one["rank"], one["leader"]) == (0, True, 1, False)
    assert zero["theta"] == one["theta"]
    assert zero["log"] == one["log"]
    got = np.frombuffer(bytes.fromhex(one["theta"])).reshape(8, 3)
    expected = alone(tmp_path)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
    for side in (zero, one):
        assert side["sent"] == 88
        assert 88 <= side["wire"] < 1024  # what the kernel sent, gloo's own words included
        assert side["many"] == [2.0 * i for i in range(19)]
        assert side["ignored"] == [3.0]
        assert side["nan"] == "nan"
        assert side["bytes"] == "xxx"
        assert side["empty"]
        assert side["stopping"] == [False, True]
        assert side["facts"][0] == "ArtifactError"
        assert "rank 1 on" in side["facts"][1]
        assert "`sha256:1`, expected `sha256:0`" in side["facts"][1]
        assert side["count"] == [
            "DeviceError",
            "ranks are out of step: rank 1 exchanges 2 values at step 12, rank 0 1",
        ]
        assert side["logs"][0] == "DeviceError"
        assert "out of step: rank 1 has log" in side["logs"][1]
        assert "at step 13" in side["logs"][1]
    assert zero["one row"] == [True, 0.0, 0.0]  # no rows, and yet it takes part
    assert one["one row"] == [False, 1.0, 0.0]


def test_a_killed_rank_comes_back_to_the_same_state(tmp_path):
    body = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so that the rank that lives can say what it saw
with module.join(timeout=60) as ranks:
    theta, replayed = run(ranks, folder / "journal.jsonl", die_at=5)
    found = [theta.tobytes().hex(), ranks.log.digest.hex(), replayed, ranks.restarts]
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found))
"""
    said = launch(tmp_path, HEAD + LOOP + body, restarts=1)
    zero, one = (json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1))
    assert zero == one
    assert zero[2:] == [5, 1]
    assert "lost the others at step 5" in said  # the rank that lived said why it stopped
    got = np.frombuffer(bytes.fromhex(zero[0])).reshape(8, 3)
    np.testing.assert_allclose(got, alone(tmp_path), rtol=0, atol=1e-12)


# ---------------------------------------------------------------- one process


def test_alone_nothing_of_torch_is_imported():
    code = (
        "import sys; from edgesft.core.tuning.ranks import join\n"
        "with join() as r: assert (r.mean([1.5], 1.0), r.broadcast(b'x'), r.bytes_sent) == ([1.5], b'x', 0)\n"
        "r.agree(data='x'); r.barrier(); r.verify(); assert 'torch' not in sys.modules"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ({"WORLD_SIZE": "two", "RANK": "0"}, "`WORLD_SIZE` is `two`"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "`WORLD_SIZE` is `0`"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "`RANK` is `2`, expected an integer from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "`RANK` is `-1`"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1"}, "`MASTER_PORT` is not set"),
    ],
)
def test_variables_that_make_no_sense_are_named(monkeypatch, env, named):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as caught:
        join()
    assert named in caught.value.message


def test_ranks_that_do_not_come_are_waited_for_no_longer_than_the_timeout(monkeypatch):
    env = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(DeviceError, match=r"rank 0 of 2 did not meet the others at .* in 1 s"):
        join(timeout=1)


def test_the_log_depends_on_every_bit_of_every_step():
    def digest(*steps):
        log = Log()
        for step, values in steps:
            log.add(step, values)
        return log.digest

    plain = digest((0, [1.0, 2.0]), (1, [0.5]))
    assert plain == digest((0, [1.0, 2.0]), (1, [0.5]))
    others = [
        digest((0, [1.0, 2.0]), (1, [np.nextafter(0.5, 1)])),
        digest((0, [1.0, 2.0]), (2, [0.5])),
        digest((0, [1.0]), (1, [2.0, 0.5])),
        digest((0, [1.0, 2.0])),
        digest((0, [1.0, 2.0]), (1, [float("nan")])),
    ]
    assert len({plain, *others}) == 6
    assert digest((0, [-0.0])) != digest((0, [0.0]))


# ---------------------------------------------------------------- rows


@pytest.fixture(scope="module")
def joined(tiny_model, tiny_data):
    """One batch of each kind, the model in float64 and the objective."""
    from edgesft.core import data, models
    from edgesft.methods.objective.task import Task

    def batch(file: Path, **options: object) -> ArrayBatch:
        found = Artifact(file, "data", digest_file(file), str(file))
        opened = data.open_data(found, data.DataOptions(**options), models.tokenizer(tiny_model))
        return opened.batch("train", 0, 7, 0)

    texts = tiny_data.with_name("texts.jsonl")
    texts.write_text(
        "".join(json.dumps({"text": f"some {'very ' * (i % 4)}plain"}) + "\n" for i in range(30))
    )
    words = {"0": "bad", "1": "good"}
    batches = {"lm": batch(texts), "candidates": batch(tiny_data, template="{text}:", label_words=words)}
    batches["labels"] = labels_of(batches["candidates"])
    assert {kind: b.kind for kind, b in batches.items()} == dict(zip(batches, batches, strict=True))
    return batches, models.load(tiny_model, dtype="float64"), Task()


def labels_of(batch: ArrayBatch) -> ArrayBatch:
    """A batch of the kind `labels` over the first rows of each example."""
    ids, mask = batch.input_ids[::2], batch.attention_mask[::2]
    count, ends = len(ids), mask.sum(1)
    return ArrayBatch(
        "labels", ids, mask, np.arange(count) * ids.shape[1] + ends - 1, np.full(count, 5),
        np.full(count, 1 / count, np.float32), np.arange(count), choices=np.array([5, 9]), gold=batch.gold,
        indices=batch.indices,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["lm", "labels", "candidates"])
@pytest.mark.parametrize("world", [2, 3, 9])
def test_shares_of_the_losses_of_the_parts_are_the_loss_of_the_batch(joined, kind, world):
    import torch

    batches, model, task = joined
    batch = batches[kind]
    with torch.no_grad():
        whole = float(task.loss(model, batch.torch()))
        parts = [Ranks(r, world).split(batch) for r in range(world)]
        total = sum(share * float(task.loss(model, part.torch())) for part, share in parts if part)
    assert total == pytest.approx(whole, rel=1e-12, abs=0)
    assert sum(share for _, share in parts) == pytest.approx(1, abs=1e-6)
    assert sum(part is None for part, _ in parts) == max(0, world - 7)
    found = [part for part, _ in parts if part]
    assert np.concatenate([part.indices for part in found]).tolist() == batch.indices.tolist()
    for part, share in parts:
        assert (part is None) == (share == 0)
        if part:
            assert part.weights.sum() == pytest.approx(1, abs=1e-6)
            assert part.attention_mask.any(axis=0).all()  # no column of padding alone


def test_one_rank_keeps_the_batch(joined):
    batch = joined[0]["lm"]
    part, share = Ranks().split(batch)
    assert part is batch
    assert share == 1.0
