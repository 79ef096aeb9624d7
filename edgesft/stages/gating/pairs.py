"""Measuring pairs: one fresh process of base and one of head, in an order that a seeded coin decides.

A pair is kept as soon as it is whole. Why a pair does not count is decided from telemetry, from a process
that failed, and from the warm-up, never from its ratio; at most a fifth of the pairs is measured again, and
as many because a process failed.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgesft.core import artifact, catalog, console
from edgesft.core.artifact import Artifact
from edgesft.core.errors import ArtifactError, DeviceError
from edgesft.core.statistics.sequential import LOOKS
from edgesft.stages.gating.panel import Series
from edgesft.stages.gating.verdict import read_pairs

TRIES = 3  # processes started before a side counts as unable to run
REDO = 0.20  # share of pairs, at most, that may be measured again
KEPT = 1000  # samples of a process that the report keeps of one metric
SETTLED = 20  # samples from which on a missing steady state is more than chance
CALLS = (64, 4000)  # of an encoder or a graph in a process, at least and at most
CALL_SECONDS = 0.3  # that all calls of a process take together, where that many fit
ABSENT = 0.05  # share of the wall time below which processor time is that of somebody else's waiting
CLOCKS = {"both": ("cpu", "wall"), "wall": ("wall",), "cpu": ("cpu",)}  # the first decides on the warm-up


class NoSamples(DeviceError):
    """A process came back without a single time that counts."""


class Sides:
    """The artefacts of a gate: that they stay what they were while it runs."""

    def __init__(self, inputs: Mapping[str, Artifact]) -> None:
        self.inputs = {r: inputs[r] for r in ("base", "head") if r in inputs}
        self._seen = {r: self._stamps(a) for r, a in self.inputs.items()}

    @staticmethod
    def _files(model: Artifact) -> list[Path]:
        listed: Sequence[Path] = getattr(model, "files", ())
        if listed:
            return list(listed)
        return (
            [model.path] if model.path.is_file() else sorted(p for p in model.path.rglob("*") if p.is_file())
        )

    def _stamps(self, model: Artifact) -> list[tuple[str, int, int, int]]:
        """What changes when a file does: cheap enough to look at before every pair."""
        found = []
        for path in self._files(model):
            try:
                stat = path.stat()
            except OSError:
                continue  # gone: its line is missing
            found.append((str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino))
        return found

    def check(self) -> None:
        """Raise ArtifactError if a side is no longer what it was at the start, by its content."""
        for role, model in self.inputs.items():
            stamps = self._stamps(model)
            if stamps == self._seen[role]:
                continue
            if model.manifest.get("files"):
                artifact.check_files(model.path, model.manifest)
            else:
                now = resolve(model.path).digest
                if now != model.digest:
                    raise ArtifactError(
                        f"{role}, `{model.ref}`, was altered while it was measured: its digest is `{now}`,"
                        f" it was `{model.digest}`"
                    )
            self._seen[role] = stamps


def resolve(ref: str | Path) -> Artifact:
    """What is measured: an exported folder, a model, a foreign graph. Raises ArtifactError."""
    from edgesft.core import subject

    return subject.resolve(ref)


class Bench:
    """Runs the processes of one gate and keeps what they gave.

    inputs: `head`, and `base` unless head is measured alone. sources: the samples that are wanted of every
    process, with the clocks of each. The caller fills `workload`, `sources` and `series` before the first
    pair.
    """

    def __init__(
        self,
        inputs: Mapping[str, Artifact],
        file: Path,
        *,
        threads: int,
        seed: int,
        slowdown: float,
        timeout: float,
        shapes: Mapping[str, Sequence[int]],
        energy: bool,
    ) -> None:
        self.client, self.host = catalog.runtime("devices.client"), catalog.runtime("devices.host")
        self.sides, self.file = Sides(inputs), file
        self.inputs = self.sides.inputs
        self.threads, self.seed, self.slowdown, self.timeout = threads, seed, slowdown, timeout
        self.shapes, self.energy = {k: list(v) for k, v in shapes.items()}, energy
        self.pairs = read_pairs(file)
        self.workload: dict[str, int] = {}
        self.sources: dict[str, tuple[str, ...]] = {}
        self.series: list[Series] = []

    @property
    def counted(self) -> list[dict[str, Any]]:
        """Pairs that were not thrown away."""
        return [p for p in self.pairs if p["discarded"] is None]

    def probe(self, role: str, prefills: int) -> dict[str, Any]:
        """One process of a side that does not count: caches get warm, and what cannot run shows.

        Raises WorkerLost at once, other DeviceErrors after the last try.
        """
        for _ in range(TRIES - 1):
            try:
                return self._measure(role, -1, {**self.workload, "prefills": prefills})[0]
            except self.client.WorkerFailed as error:
                console.warn(f"{role} failed and is tried again: {error.message}")
        return self._measure(role, -1, {**self.workload, "prefills": prefills})[0]

    def _measure(
        self, role: str, pair: int, workload: Mapping[str, int]
    ) -> tuple[dict[str, Any], float | None]:
        """One process of one side, and its mean power in W if that is wanted; both sides of a pair get the
        same prompts."""
        first = next(iter(self.sources.values()), ("cpu",))[0]
        asked = self.client.request(
            self.inputs[role],
            threads=self.threads,
            workload=workload,
            seed=[self.seed, pair + 1],
            slowdown=self.slowdown if role == "head" else 0.0,
            clock=first,
            until_steady=pair >= 0,
            **({"shapes": self.shapes} if self.shapes else {}),
        )
        if not self.energy or role != "head" or pair < 0:
            found: dict[str, Any] = self.client.measure(asked, self.timeout)
            return found, None
        with catalog.runtime("devices.power").Meter() as meter:
            found = self.client.measure(asked, self.timeout)
        power = meter.result()["energy"]
        if power["watts"] is None:
            raise DeviceError(f"the energy could no longer be read: {power['reason']}")
        return found, float(power["watts"])

    def add(self) -> dict[str, Any]:
        """Measure one pair and append it to the checkpoint.

        A pair of which a process failed is one to be measured again, while the cap allows. Raises
        DeviceError (NoSamples without any time), ArtifactError if a side was altered.
        """
        import numpy as np

        self.sides.check()
        number = len(self.pairs)
        roles = list(self.inputs)
        if len(roles) == 2 and np.random.default_rng([self.seed, 1, number]).random() >= 0.5:
            roles.reverse()
        record: dict[str, Any] = {"pair": number, "first": roles[0], "base": None, "head": None, "ratio": {}}
        before = self.host.telemetry()
        why = None
        for role in roles:
            try:
                record[role] = self._reduce(*self._measure(role, number, self.workload))
            except self.client.WorkerFailed as error:
                if not self._may_redo(failed=True):
                    raise
                why = f"{role} failed: {error.message.splitlines()[0]}"
                record |= {"base": None, "head": None}
                break
        if why is None:
            if len(roles) == 2:
                record["ratio"] = self._ratios(record["base"], record["head"])
            why = self._reason(record, self.host.held_back(before, self.host.telemetry()))
        record["discarded"] = why
        self.pairs.append(record)
        self._keep(record)
        return record

    def _keep(self, record: Mapping[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _ratios(self, base: Mapping[str, Any], head: Mapping[str, Any]) -> dict[str, dict[str, float]]:
        return {
            s.metric: {c: head["value"][s.metric][c] / base["value"][s.metric][c] for c in s.clocks}
            for s in self.series
        }

    def _reduce(self, measured: Mapping[str, Any], watts: float | None) -> dict[str, Any]:
        """One process as the report keeps it: its numbers, and the samples behind them."""
        times, cuts, steady = {}, {}, True
        for source, clocks in self.sources.items():
            found = {c: self.client.timings(measured["repetitions"], source, c) for c in clocks}
            warm = found[clocks[0]][1]
            times[source] = {c: series for c, (series, _) in found.items()}
            cuts[source] = warm.cut
            total = len(times[source][clocks[0]])
            if total <= warm.cut or min(min(t[warm.cut :]) for t in times[source].values()) <= 0:
                raise NoSamples(f"nothing was measured: a process gave no time of `{source}` above zero")
            steady = steady and (warm.steady or total < SETTLED)
        return {
            "value": {s.metric: self._numbers(s, times[s.source], cuts[s.source]) for s in self.series},
            **_thinned(times, cuts),
            "steady": steady,
            "peak_bytes": measured["done"]["peak_bytes"],
            "load_ms": round(measured["loaded"]["load_ns"] / 1e6, 3),
            "wall_s": measured["wall_s"],
            **({} if watts is None else {"watts": watts}),
        }

    def _numbers(self, series: Series, times: Mapping[str, list[float]], cut: int) -> dict[str, float]:
        import numpy as np

        from edgesft.core import statistics

        if series.estimator == "p95":
            return {c: float(np.quantile(times[c][cut:], 0.95)) for c in series.clocks}
        return {c: statistics.estimate(times[c][cut:], series.estimator) for c in series.clocks}

    def _may_redo(self, failed: bool) -> bool:
        """Whether the cap allows one more pair to be thrown away.

        failed: because a process failed. Those are counted apart: a machine that is slow to settle must not
        use up what a clock that jumps once needs.
        """
        discarded = sum(p["discarded"] is not None and (p["head"] is None) == failed for p in self.pairs)
        return discarded < REDO * max(len(self.counted), LOOKS[0])

    def _reason(self, record: Mapping[str, Any], telemetry: str | None) -> str | None:
        """Why the pair does not count, which is never its ratio; None also once the cap is reached."""
        unsteady = [r for r in self.inputs if not record[r]["steady"]]
        why = telemetry or (f"no steady state in {' and '.join(unsteady)}" if unsteady else None)
        return why if self._may_redo(failed=False) else None


def _thinned(times: Mapping[str, Mapping[str, list[float]]], cuts: Mapping[str, int]) -> dict[str, Any]:
    """At most KEPT samples of each series, every k-th, to ten nanoseconds; the cut in terms of these."""
    samples: dict[str, dict[str, list[float]]] = {}
    shorter = {}
    for source, series in times.items():
        step = max(1, math.ceil(max(len(t) for t in series.values()) / KEPT))
        samples[source] = {c: [round(x, 5) for x in t[::step]] for c, t in series.items()}
        shorter[source] = math.ceil(cuts[source] / step)
    return {"samples_ms": samples, "cut": shorter}


def enough_calls(probes: Sequence[Mapping[str, Any]]) -> int:
    """How many timed calls of an encoder or a graph take about CALL_SECONDS, within CALLS."""
    slowest = max(min(r["wall_ns"] for r in p["repetitions"]) for p in probes) / 1e9
    wanted = math.ceil(CALL_SECONDS / max(float(slowest), 1e-9))
    return min(CALLS[1], max(CALLS[0], wanted))


def thread_sleeps(probes: Sequence[Mapping[str, Any]], source: str) -> bool:
    """Whether the calling thread mostly sleeps: another processor works, of which its time says nothing."""
    name = {"tpot": "step", "ttft": "ttft", "latency": "call"}[source]
    ran = took = 0.0
    for each in (r for p in probes for r in p["repetitions"]):
        cpu, wall = each.get(f"{name}_cpu_ns", 0), each.get(f"{name}_ns", 0)
        ran += sum(cpu) if isinstance(cpu, list) else cpu
        took += sum(wall) if isinstance(wall, list) else wall
    return ran < ABSENT * took
