"""Data-parallel zeroth-order tuning: ranks under torchrun that share seeds and exchange a few numbers a step.

Paper: distributed MeZO follows from Fine-Tuning Language Models with Just Forward Passes (2023), section 2: a
step is its seed and its projected gradient, so nothing else need travel.
How: every rank holds the whole model, computes the losses of its rows of the joined batch, and all ranks add
up the same float64 numbers in the same order, so every rank makes the same step to the bit. Each exchange
carries the hash of all steps before it; ranks that have parted are found at the next step.
Cost: one all-gather of 88 bytes a step (each further 8 losses: one more).
Importing this module imports no torch; one process alone never imports `torch.distributed`.
"""

import dataclasses
import gc
import hashlib
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesft import __version__
from edgesft.core.data.batches import ArrayBatch
from edgesft.core.errors import ArtifactError, DeviceError, UsageError

TIMEOUT = 1800.0  # seconds that a rank waits for the others: the longest dev evaluation must fit in
ROOM = 8  # values an exchange
HEADER = struct.Struct("<8sqii")  # hash of the log, steps in it, values in all, whether to stop
FACTS_LIMIT = 1 << 20  # bytes of another rank's facts
LAUNCH = "torchrun --nproc-per-node N -m edgesft ..."
RESTART = "`torchrun --max-restarts 3` starts all ranks again; the run goes on from its journal"


class Log:
    """A rolling SHA-256 over (step, the step's float64 values). step: the number of the next step."""

    def __init__(self) -> None:
        self.step = 0
        self._hash = hashlib.sha256()

    def add(self, step: int, values: Sequence[float]) -> None:
        """Record what decided a step: losses, projected gradients; NaN counts by its bits."""
        self._hash.update(struct.pack(f"<qq{len(values)}d", step, len(values), *values))
        self.step = step + 1

    @property
    def digest(self) -> bytes:
        """The first 8 bytes of the hash."""
        return self._hash.digest()[:8]


class Ranks:
    """The processes of one run, seen from one of them. Use as a context: the group is left at its end.

    rank, world: which of how many. local: which on this machine. device: `cpu` or `cuda:N`, where this rank
    computes. bytes_sent: payload that this rank has given to exchanges, once for every receiver.
    log: of the steps made; add to it on every rank alike. stopping: whether any rank asked to stop, as
    of the last `mean`.
    """

    def __init__(self, rank: int = 0, world: int = 1, local: int = 0, device: str = "cpu") -> None:
        self.rank, self.world, self.local, self.device = rank, world, local, device
        self.log = Log()
        self.bytes_sent = 0
        self.stopping = False
        self._stop = False

    @property
    def leader(self) -> bool:
        """Whether this rank keeps the journal and writes the results."""
        return self.rank == 0

    @property
    def restarts(self) -> int:
        """How often torchrun has started this run again."""
        count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
        return int(count) if self.world > 1 and count.isdigit() else 0

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.world == 1:
            return
        import torch.distributed as dist

        if kind is None:
            with suppress(DeviceError):  # a rank that failed has said so itself
                self.barrier()  # who leaves first must not break the last exchange of another
        with suppress(RuntimeError, ValueError, AssertionError):  # the first error is the one to be shown
            dist.destroy_process_group()
        gc.collect()  # a sharded model in a cycle keeps threads of the group, which abort a process that ends

    # ------------------------------------------------------------ rows

    def split(self, batch: ArrayBatch) -> tuple[ArrayBatch | None, float]:
        """This rank's rows of the joined batch and their share of its mean loss: sum share * loss = loss.

        Whole examples in order, the candidates of one together. Weights are made to sum to 1 again. Without
        rows: (None, 0.0); such a rank takes part in every exchange with any values and share 0.
        """
        if self.world == 1:
            return batch, 1.0
        rows = len(batch.input_ids)
        width = 1 if batch.example is None else rows // (int(batch.example[-1]) + 1)
        examples = rows // width
        first, last = (examples * r // self.world for r in (self.rank, self.rank + 1))
        part = _slice(batch, slice(first, last), width)
        if part is None:
            return None, 0.0
        if batch.kind == "lm":
            own = (batch.rows >= first) & (batch.rows < last)
            # the new weights are float32: over what they sum to, the share takes their rounding back
            return part, float(batch.weights[own].sum(dtype=np.float64) / part.weights.sum(dtype=np.float64))
        return part, (last - first) / examples

    # ------------------------------------------------------------ exchanges

    def ask_to_stop(self) -> None:
        """All ranks see `stopping` after the next `mean`, and so stop after the same step."""
        self._stop = True

    def mean(self, values: Sequence[float], share: float) -> list[float]:
        """sum of share * value over the ranks, in float64 and in rank order: equal bits on every rank.

        Every rank gives as many values. share 0: the values are ignored, NaN too. share 1 on all: a sum.
        Raises DeviceError when a rank has made other steps than the leader, or is gone.
        """
        own = [share * float(v) if share else 0.0 for v in values]
        if self.world == 1:
            self.stopping = self._stop
            return own
        total: list[float] = []
        for begin in range(0, max(1, len(own)), ROOM):
            part = own[begin : begin + ROOM]
            head = HEADER.pack(self.log.digest, self.log.step, len(own), self._stop)
            body = struct.pack(f"<{ROOM}d", *part, *[0.0] * (ROOM - len(part)))
            gathered = self._gather(head + body)
            heads = [HEADER.unpack_from(each) for each in gathered]
            self._in_step(heads)
            self.stopping = any(stop for *_, stop in heads)
            numbers = [struct.unpack_from(f"<{ROOM}d", each, HEADER.size) for each in gathered]
            total += [_sum(column) for column in zip(*numbers, strict=True)][: len(part)]
        return total

    def verify(self) -> None:
        """Raise DeviceError unless all ranks have made the same steps: `mean` of nothing, for the end."""
        self.mean([], 0.0)

    def agree(self, **facts: str) -> None:
        """Raise ArtifactError, on every rank alike, where one has other facts than the leader.

        The version of EdgeSFT, the number of ranks and whatever is given: digests of model, data and request,
        at the end of the weights.
        """
        if self.world == 1:
            return
        mine = {"version": __version__, "world": str(self.world), **facts, "host": socket.gethostname()}
        gathered = self._gather_bytes(json.dumps(mine).encode())
        found = [_facts(each, rank) for rank, each in enumerate(gathered)]
        first = found[0]
        for rank, theirs in enumerate(found[1:], 1):
            for name in sorted((first.keys() | theirs.keys()) - {"host"}):
                if theirs.get(name) != first.get(name):
                    raise ArtifactError(
                        f"rank {rank} on `{theirs.get('host')}` has {name} `{theirs.get(name)}`, expected "
                        f"`{first.get(name)}` as rank 0 on `{first.get('host')}` has",
                        "give every rank the same EdgeSFT, model, data and options",
                    )

    def broadcast(self, data: bytes | None) -> bytes:
        """The leader's bytes on every rank; the others give None."""
        if self.world == 1:
            return data or b""
        import torch
        import torch.distributed as dist

        with self.waiting():
            size = torch.tensor([len(data or b"")])
            dist.broadcast(size, 0)
            payload = torch.zeros(int(size), dtype=torch.uint8)
            if self.leader and data:
                payload.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            if len(payload):
                dist.broadcast(payload, 0)
        self.bytes_sent += (8 + len(payload)) * (self.world - 1) if self.leader else 0
        return payload.numpy().tobytes()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            self._gather(bytes(1))

    def _in_step(self, heads: Sequence[tuple[bytes, int, int, int]]) -> None:
        log, step, count, _ = heads[0]
        for rank, (theirs, at, values, _) in enumerate(heads):
            if at != step or theirs != log:
                raise DeviceError(
                    f"ranks are out of step: rank {rank} has log {theirs.hex()} at step {at}, "
                    f"rank 0 has log {log.hex()} at step {step}",
                    RESTART,
                )
            if values != count:
                raise DeviceError(
                    f"ranks are out of step: rank {rank} exchanges {values} values at step {at}, "
                    f"rank 0 {count}",
                    RESTART,
                )

    def _gather(self, data: bytes) -> list[bytes]:
        """The bytes of every rank; all give as many."""
        import torch
        import torch.distributed as dist

        own = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found = [torch.empty_like(own) for _ in range(self.world)]
        with self.waiting():
            dist.all_gather(found, own)
        self.bytes_sent += len(data) * (self.world - 1)
        return [each.numpy().tobytes() for each in found]

    def _gather_bytes(self, data: bytes) -> list[bytes]:
        """The bytes of every rank, however many each has."""
        sizes = [int.from_bytes(each, "little") for each in self._gather(len(data).to_bytes(8, "little"))]
        for rank, size in enumerate(sizes):
            if size > FACTS_LIMIT:
                raise ArtifactError(f"rank {rank} sends {size} bytes, expected at most {FACTS_LIMIT}")
        padded = self._gather(data.ljust(max(sizes), b"\0"))
        return [each[:size] for each, size in zip(padded, sizes, strict=True)]

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around an exchange of `torch.distributed`: its failure becomes a DeviceError."""
        try:
            yield
        except RuntimeError as error:  # torch's own errors of distribution are all of this class
            raise DeviceError(
                f"rank {self.rank} of {self.world} has lost the others at step {self.log.step}: "
                f"{_reason(error)}",
                RESTART,
            ) from None


def join(device: str = "cpu", *, timeout: float = TIMEOUT) -> Ranks:
    """The ranks that torchrun has started (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT).

    One process alone without them. device: `cpu`, or `cuda`: the GPU of the local rank; scalars then travel
    over gloo all the same and tensors on the GPU over nccl. timeout: seconds that an exchange may take.
    Raises UsageError (variables that make no sense), DeviceError (the others do not come, no such GPU).
    """
    rank, world, local = _place(os.environ)
    on_gpu = device.startswith("cuda")
    if world == 1:
        return Ranks(device=device)
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        raise DeviceError("this torch was built without `torch.distributed`, which several ranks need")
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if on_gpu:
        if torch.cuda.device_count() <= local:
            found = torch.cuda.device_count()
            raise DeviceError(f"rank {rank} needs GPU {local} of its machine, found {found} of them")
        torch.cuda.set_device(local)
    place = f"`{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}`"
    wait = timedelta(seconds=timeout)
    try:
        store, _, _ = next(rendezvous("env://", rank, world, timeout=wait))
        store = PrefixStore(_meet(store, rank, world, timeout), store)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=wait)
    except (RuntimeError, ValueError, OSError) as error:
        raise DeviceError(
            f"rank {rank} of {world} did not meet the others at {place} in {timeout:g} s: {_reason(error)}",
            LAUNCH,
        ) from None
    return Ranks(rank, world, local, f"cuda:{local}" if on_gpu else device)


def _meet(store: Any, rank: int, world: int, timeout: float) -> str:  # noqa: ANN401 - a store of torch
    """A name for this start of the group that no earlier start has had.

    torchrun keeps its store when it starts ranks again, and a rank may find the address of one that is dead
    there; the count of restarts tells nothing, for it differs between machines (pytorch issue 135712). So the
    leader lists the random words of all ranks until each has found its own in the list.
    """
    own, end = secrets.token_hex(8), time.monotonic() + timeout
    store.set(f"edgesft/word/{rank}", own)
    while time.monotonic() < end:
        if rank == 0:
            words = [store.get(f"edgesft/word/{each}").decode() for each in range(world)]
            store.set("edgesft/words", " ".join(words))
            if store.check([f"edgesft/{own}/{each}" for each in range(1, world)]):
                return f"edgesft/{own}"
        else:
            words = store.get("edgesft/words").decode().split()
            if len(words) == world and words[rank] == own:
                store.set(f"edgesft/{words[0]}/{rank}", "here")
                return f"edgesft/{words[0]}"
        time.sleep(0.01)
    raise TimeoutError("a rank is missing")


def _place(env: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, world, local rank) by the environment."""
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return 0, 1, 0
    found: list[int] = []
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        text = env.get(name, "0")
        limit = found[0] if found else 1 << 16
        low = 0 if found else 1
        if not text.isdecimal() or not low <= int(text) < limit:
            raise UsageError(f"`{name}` is `{text}`, expected an integer from {low} to {limit - 1}", LAUNCH)
        found.append(int(text))
    world, rank, local = found
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if world > 1 and missing:
        raise UsageError(f"`WORLD_SIZE` is {world}, but `{missing[0]}` is not set", LAUNCH)
    return rank, world, local


def _slice(batch: ArrayBatch, examples: slice, width: int) -> ArrayBatch | None:
    """Some consecutive examples of `width` rows each, padded to the longest; None if there are none."""
    first, last = examples.start * width, examples.stop * width
    own = (batch.rows >= first) & (batch.rows < last)  # (N,) positions in these rows
    if last == first or not own.any():
        return None
    length = batch.input_ids.shape[1]
    mask = batch.attention_mask[first:last]
    used = int(np.flatnonzero(mask.any(axis=0)).max()) + 1
    rows = batch.rows[own] - first
    weights = batch.weights[own].astype(np.float64)
    changed: dict[str, npt.NDArray[Any]] = {
        "input_ids": np.ascontiguousarray(batch.input_ids[first:last, :used]),
        "attention_mask": np.ascontiguousarray(mask[:, :used]),
        "positions": rows * used + batch.positions[own] % length,
        "targets": batch.targets[own],
        "weights": (weights / (weights.sum() or 1.0)).astype(np.float32),
        "rows": rows,
    }
    if batch.example is not None:
        changed["example"] = batch.example[first:last] - examples.start
    for name in ("gold", "indices"):
        values = getattr(batch, name)
        if values is not None:
            changed[name] = values[examples]
    return dataclasses.replace(batch, **changed)  # type: ignore[arg-type]


def _sum(values: Sequence[float]) -> float:
    total = 0.0
    for value in values:  # in rank order; the built-in sum is compensated from Python 3.12 on
        total += value
    return total


def _facts(data: bytes, rank: int) -> dict[str, str]:
    try:
        found = json.loads(data)
        if isinstance(found, dict):
            return {str(k): str(v) for k, v in found.items()}
    except ValueError:
        pass
    raise ArtifactError(f"rank {rank} sends no facts about itself, expected a JSON object")


def _reason(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0].rpartition(".cc:")[2].partition("] ")[2] or lines[0]
