import json
import os
import subprocess
import sys

import pytest
import torch

from edgesft.core.tuning.ranks import Ranks
from edgesft.core.tuning.sharding import _buckets, average, joined, prepare

# One step of LoRA by back-propagation on a batch of seven rows with answers of different lengths.
STEP = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from edgesft.core import models
from edgesft.core.tuning import sharding
from edgesft.core.data.batches import ArrayBatch
from edgesft.core.tuning.ranks import Ranks, join
from edgesft.core.region import Whole
from edgesft.core.tuning.tuned import Tuned
from edgesft.kernels import perturb
from edgesft.methods.delta.lora import Lora
from edgesft.methods.estimate.backprop import Backprop
from edgesft.methods.objective.task import Task

torch.set_num_threads(1)

def batch(rows=7, length=9):
    rng = np.random.default_rng(0)
    ends = rng.integers(4, length + 1, rows)
    mask = (np.arange(length) < ends[:, None]).astype(np.int64)
    ids = rng.integers(1, 256, (rows, length)) * mask
    of = np.repeat(np.arange(rows), ends - 3)
    column = np.concatenate([np.arange(3, end) for end in ends])
    weights = np.full(len(of), 1 / len(of), np.float32)
    return ArrayBatch("lm", ids, mask, of * length + column - 1, ids[of, column], weights, of)

def gradient(model, ranks, whole, shard=None):
    layers = models.linears(model)
    tuned = Tuned(model, layers, {n: Whole() for n in layers}, Lora(rank=4), in_place=False,
                  kernel=perturb, seed=0)
    generator = torch.Generator().manual_seed(1)
    for p in tuned.theta.values():
        p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    part, share = ranks.split(whole)
    with tuned:
        sharding.prepare(model, ranks, shard=shard)
        own = None
        if part is not None or shard:  # a sharded block is gathered by all ranks or by none
            own = Backprop().gradient(tuned.loss(Task(), part or whole), tuned.theta, 0)
        found = sharding.joined(own, tuned.theta, ranks, share)
        sizes = [sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in block.parameters())
                 for _, block in models.blocks(model)]
    return found.loss, {k: v.double().flatten().tolist() for k, v in found.items()}, sizes
"""


def alone(model):
    scope = {"__name__": "alone"}
    exec(STEP, scope)
    return scope, scope["gradient"](scope["models"].load(model), Ranks(), scope["batch"]())


def close(values, expected):
    assert values.keys() == expected.keys()
    for name, value in expected.items():
        want = torch.tensor(value, dtype=torch.float64)
        assert want.abs().max() > 1e-4, name
        torch.testing.assert_close(
            torch.tensor(values[name], dtype=torch.float64), want, rtol=1e-5, atol=1e-6
        )


def test_the_gradient_of_two_ranks_is_that_of_the_joined_batch_sharded_or_not(tmp_path, tiny_model):
    body = """
with join(timeout=60) as ranks:
    for name, shard, rows in (("whole", None, 7), ("sharded", True, 7), ("one row", None, 1)):
        before = ranks.bytes_sent
        found = gradient(models.load(Path(sys.argv[2])), ranks, batch(rows), shard)
        sent = ranks.bytes_sent - before
        (Path(sys.argv[1]) / f"{name}-{ranks.rank}.json").write_text(json.dumps([*found, sent]))
"""
    script = tmp_path / "script.py"
    script.write_text(STEP + body)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("--monitor-interval", "0.1", str(script), str(tmp_path), str(tiny_model)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    scope, (loss, expected, sizes) = alone(tiny_model)
    theta = sum(map(len, expected.values()))
    for name in ("whole", "sharded"):
        zero, one = (json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1))
        assert zero[:2] == one[:2]  # the same bits, so that theta stays the same
        assert zero[0] == pytest.approx(loss, rel=1e-6)
        close(zero[1], expected)
        assert zero[3] == 4 * theta + 88
        shares = [a + b for a, b in zip(zero[2], one[2], strict=True)]
        if name == "sharded":
            assert shares == sizes
            assert max(zero[2] + one[2]) <= 0.51 * max(sizes)
        else:
            assert zero[2] == one[2] == sizes
    loss, expected, _ = scope["gradient"](scope["models"].load(tiny_model), Ranks(), scope["batch"](1))
    for rank in (0, 1):  # one of them has no row
        found = json.loads((tmp_path / f"one row-{rank}.json").read_text())
        assert found[0] == pytest.approx(loss, rel=1e-6)
        close(found[1], expected)


def test_alone_nothing_is_exchanged_or_sharded():
    gradients = {"a": torch.randn(3)}
    before = gradients["a"].clone()
    average(gradients, Ranks())
    assert torch.equal(gradients["a"], before)
    model = torch.nn.Linear(2, 2)
    assert prepare(model, Ranks(), shard=True) is model
    assert type(model) is torch.nn.Linear
    found = joined(None, gradients, Ranks(), 0.0)
    assert (found.loss, dict(found.items())["a"].tolist()) == (0.0, [0.0, 0.0, 0.0])


def test_buckets_keep_the_order_and_mix_no_types(monkeypatch):
    monkeypatch.setattr("edgesft.core.tuning.sharding.BUCKET", 32)
    tensors = [
        torch.zeros(n, dtype=d) for n, d in ((4, torch.float32), (4, torch.float32), (1, torch.float32))
    ]
    tensors += [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(100)]
    found = list(_buckets(tensors))
    assert [[t.numel() for t in bucket] for bucket in found] == [[4, 4], [1], [2], [100]]
    assert [id(t) for bucket in found for t in bucket] == [id(t) for t in tensors]
