"""One gate while it runs: probe both sides, fix what decides, measure pairs until the panel has a verdict."""

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edgesft.core import artifact, catalog, console
from edgesft.core.artifact import Artifact, Workdir
from edgesft.core.errors import DeviceError
from edgesft.core.statistics import sequential
from edgesft.stages import profile
from edgesft.stages.gating import arming
from edgesft.stages.gating import budget as budgeting
from edgesft.stages.gating.arming import Choice
from edgesft.stages.gating.budget import Budget
from edgesft.stages.gating.pairs import CALLS, CLOCKS, Bench, NoSamples, enough_calls, thread_sleeps
from edgesft.stages.gating.panel import Panel, Series, median
from edgesft.stages.gating.verdict import SCHEMA, DeviceLost, NotComparable, NothingMeasured, exact

if TYPE_CHECKING:
    from edgesft.stages.gate import Gate

HEADER = "gate.json"
PROBE_CALLS = 16
TTFT_PROMPTS = 8
TAIL_PROMPTS = 24  # where the 95th percentile of them decides
EXACT = ("peak_memory", "size")


def metrics_of(model: Artifact, asked: Sequence[str]) -> tuple[str, ...]:
    """What decides about a model, as far as its files tell: `latency` of what generates no tokens."""
    if model.kind in ("graph", "engine"):
        return ("latency",)
    described = artifact.read_json(model.path / "export.json") if model.kind == "onnx" else None
    return ("latency",) if (described or {}).get("kind", "decoder") != "decoder" else tuple(asked)


def alone(
    metric: str,
    prompt_tokens: int,
    decode_tokens: int,
    repetitions: int,
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """What a process runs for one metric alone, the tail aside: the key by which a calibration is found."""
    least = {"tpot": 0, "ttft": TTFT_PROMPTS, "latency": CALLS[0]}[metric]
    return {
        "prompt_tokens": prompt_tokens,
        "decode_tokens": 0 if least else decode_tokens,
        "repetitions": max(repetitions, least),
        **({"shapes": {k: list(v) for k, v in shapes.items()}} if shapes else {}),
    }


class Session:
    """A gate that runs. work: where it keeps its pairs; None if it only chooses, or reports a refusal."""

    def __init__(self, options: "Gate", inputs: Mapping[str, Artifact], work: Workdir | None) -> None:
        self.options, self.inputs = options, dict(inputs)
        self.fingerprint = profile.device(options.threads)
        self.budgets: list[Budget] = budgeting.parse(options.budgets, "gate.budgets")
        self.rule = sequential.Rule(
            tolerance=options.tolerance_percent / 100,
            alpha=options.alpha,
            beta=options.beta,
            max_pairs=options.max_pairs,
        )
        self.calibration: dict[str, Any] | None = None
        self.chosen: dict[str, Choice] = {}
        self.checks: dict[str, bool] = {}
        self.workload: dict[str, int] = {}
        self.folder: Path | None = None if work is None else work.checkpoint
        self.bench: Bench | None = None
        self.panel = Panel([], self.rule, self.budgets, options.level, self._size())

    def _size(self) -> float:
        return float(self.inputs["head"].bytes)

    @property
    def pairs(self) -> list[dict[str, Any]]:
        return [] if self.bench is None else self.bench.pairs

    @property
    def counted(self) -> list[dict[str, Any]]:
        return [] if self.bench is None else self.bench.counted

    def run(self) -> dict[str, Any]:
        """The report of a pass, a failure or an open verdict. Raises GateVerdict for anything else."""
        bench = self._bench()
        header = self._header()
        kind, probes = self._probe(bench)
        self._plan(bench, kind, probes, header)
        with console.progress("gate", self.options.max_pairs, len(bench.counted)) as bar:
            while True:
                verdict = self.panel.advance(bench.counted) if self._needs_pairs() else sequential.PASS
                if verdict is not None:
                    return self.report(verdict)
                self._add(bench)
                if bench.pairs[-1]["discarded"] is None:
                    bar.advance(1, self._note(bench.pairs[-1]))

    def _needs_pairs(self) -> bool:
        """Whether anything that is looked at has to be measured: the size of a file has not."""
        return bool(self.panel.series or "peak_memory" in self.checks) or any(
            b.source != "size" for b in self.panel.budgets
        )

    def _note(self, pair: Mapping[str, Any]) -> str:
        if not self.panel.series:
            return ""
        first = self.panel.series[0]
        return f"{first.metric} ratio {pair['ratio'][first.metric][first.clocks[0]]:.3f}"

    def _bench(self) -> Bench:
        assert self.folder is not None
        options = self.options
        self.bench = Bench(
            self.inputs,
            self.folder / "pairs.jsonl",
            threads=self.fingerprint["refuse"]["threads"],
            seed=options.seed,
            slowdown=options.drill_slowdown,
            timeout=options.timeout,
            shapes=options.shapes,
            energy=any(b.source == "energy" for b in self.budgets),
        )
        self.bench.workload = self._tokens(options.metrics)
        return self.bench

    def _header(self) -> dict[str, Any] | None:
        """What the pairs of an interrupted run were measured with; None for a run that begins.

        Raises NotComparable if that was another device.
        """
        assert self.folder is not None
        header = artifact.read_json(self.folder / HEADER) if self.pairs else None
        if header is None:
            return None
        differ = catalog.runtime("devices.host").differences(self.fingerprint, header["fingerprint"])
        if differ:
            self._refuse(f"the pairs so far are of another device: {differ[0]}")
        return header

    def _tokens(self, sources: Sequence[str], calls: int = CALLS[0]) -> dict[str, int]:
        """What a process runs so that it has the samples that are wanted."""
        options = self.options
        tokens = {"prompt_tokens": options.prompt_tokens, "decode_tokens": options.decode_tokens}
        prompts = TAIL_PROMPTS if options.check_tail else TTFT_PROMPTS
        if "latency" in sources:
            return {**tokens, "decode_tokens": 0, "repetitions": max(options.repetitions, calls)}
        if "ttft" not in sources:
            return {**tokens, "repetitions": options.repetitions}
        if "tpot" not in sources:
            return {**tokens, "decode_tokens": 0, "repetitions": max(options.repetitions, prompts)}
        prefills = max(0, prompts - options.repetitions)
        return {**tokens, "repetitions": options.repetitions, "prefills": prefills}

    def _probe(self, bench: Bench) -> tuple[str, list[dict[str, Any]]]:
        """Run each side once: what cannot run or be compared is found out first. The kind of both."""
        self._check_energy()
        kinds = {role: model.kind for role, model in self.inputs.items()}
        if len(set(kinds.values())) > 1:
            self._refuse(f"base is of kind `{kinds['base']}`, head of kind `{kinds['head']}`")
        light = kinds["head"] in ("graph", "engine")
        probes = []
        for role in bench.inputs:
            try:
                probes.append(bench.probe(role, PROBE_CALLS if light else 0))
            except DeviceError as error:
                raise self._lost(error, f"{role} could not be run: ") from None
        first, last = probes[0]["loaded"], probes[-1]["loaded"]
        for name in ("kind", "vocabulary", "inputs"):
            if first.get(name) != last.get(name):
                self._refuse(f"the {name} of base is `{first.get(name)}`, that of head `{last.get(name)}`")
        why = budgeting.unmeasurable(self.budgets, str(first["kind"]))
        if why is not None:
            self._nothing(why)
        bench.timeout = min(bench.timeout, max(60.0, 20 * max(p["wall_s"] for p in probes)))
        return str(first["kind"]), probes

    def _check_energy(self) -> None:
        """Raise NothingMeasured if there is a budget on energy and nothing here that measures it."""
        if not any(b.source == "energy" for b in self.budgets):
            return
        with catalog.runtime("devices.power").Meter() as meter:
            pass
        found = meter.result()["energy"]
        if found["source"] is None:
            self._nothing(f"`energy_per_token_mj` cannot be measured on this device: {found['reason']}")

    def _plan(
        self,
        bench: Bench,
        kind: str,
        probes: Sequence[Mapping[str, Any]],
        header: Mapping[str, Any] | None,
    ) -> None:
        """Fix metrics, estimators, clocks and workload, all before the first pair."""
        metrics: tuple[str, ...] = ()
        if "base" in self.inputs:
            metrics = tuple(self.options.metrics) if kind == "decoder" else ("latency",)
        if kind == "decoder" and "latency" in metrics:
            self._nothing("`latency` is of one call, and this artefact generates tokens; known: tpot, ttft")
        names, metrics = self._selected(metrics)
        self._choose_for(metrics, header)
        series = self._series(names, metrics, [] if header is not None else probes)
        self.panel = Panel(series, self.rule, self.budgets, self.options.level, self._size())
        sources = {s.source: s.clocks for s in series}
        for each in self.budgets:
            source = {"rate": "tpot", "energy": "tpot"}.get(each.source, each.source)
            if source in ("tpot", "ttft", "latency"):
                clocks = sources.get(source, ())
                sources[source] = clocks if "wall" in clocks else (*clocks, "wall")
        # Without any: decode all the same, or no memory would be touched.
        wanted = tuple(sources) or (("tpot",) if kind == "decoder" else ("latency",))
        self.workload = self._tokens(wanted, enough_calls(probes) if "latency" in wanted else 0)
        if header is not None:
            self.workload = dict(header["workload"])
        bench.series, bench.sources, bench.workload = series, sources, self.workload

    def _selected(self, metrics: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
        """Names of all metrics that are looked at, and the primary ones among them.

        Drops budgets that no pattern of `only` names. Raises NothingMeasured for a pattern without a match.
        """
        names = [n for m in metrics for n in (m, f"{m}_p95")]
        names += EXACT if "base" in self.inputs else ()
        known = [*names, *(b.name for b in self.budgets)]
        for pattern in self.options.only:
            if not fnmatch.filter(known, pattern):
                self._nothing(
                    f"no metric of this gate is named `{pattern}`; known: {', '.join(known)}",
                    "`--metric` says which latencies are measured",
                )
        if self.options.only:
            kept = {n for p in self.options.only for n in fnmatch.filter(known, p)}
            names = [n for n in names if n in kept]
            self.budgets = [b for b in self.budgets if b.name in kept]
        return names, tuple(m for m in metrics if m in names or f"{m}_p95" in names)

    def _series(
        self, names: Sequence[str], metrics: Sequence[str], probes: Sequence[Mapping[str, Any]]
    ) -> list[Series]:
        """The panel's metrics, primary ones first, and which of memory and size are looked at."""
        options = self.options
        decides = dict.fromkeys(names, False) | {m: True for m in metrics if m in names}
        decides |= {n: options.check_tail for n in names if n.endswith("_p95")}
        checked = {"peak_memory": options.check_memory, "size": options.check_size}
        decides |= {n: checked[n] for n in names if n in checked}
        if not any(decides.values()) and not self.budgets:
            decides = dict.fromkeys(names, True)  # what is asked for alone decides, or nothing would
        self.checks = {n: decides[n] for n in EXACT if n in decides}
        found = []
        for suffix, margin in (("", options.margin_percent), ("_p95", options.tail_margin_percent)):
            for each in metrics:
                if each + suffix not in names:
                    continue
                choice = self.chosen[each]
                if choice.clock == "both" and thread_sleeps(probes, each):
                    choice = self.chosen[each] = Choice(each, choice.estimator, "wall")
                estimator = "p95" if suffix else choice.estimator
                found.append(
                    Series(
                        each + suffix,
                        each,
                        estimator,
                        choice.clock,
                        CLOCKS[choice.clock],
                        decides[each + suffix],
                        margin / 100,
                    )
                )
        return found

    def choose(self, metrics: Sequence[str], *, quiet: bool = False) -> dict[str, Choice]:
        """The number of a process for every metric. Raises NotComparable: the calibration does not fit."""
        shapes = {m: self._alone(m) for m in metrics}
        try:
            chosen, self.calibration = arming.choose(
                self.options, shapes, self.inputs["base"], self.fingerprint, quiet=quiet
            )
        except arming.Refused as refused:
            report = {**self.report("not_comparable", refused.message), "hint": refused.hint}
            raise NotComparable(refused.message, report, refused.hint) from None
        return chosen

    def _alone(self, metric: str) -> dict[str, Any]:
        """What a process runs for this metric alone, the tail aside: what a calibration of it ran."""
        options = self.options
        return alone(
            metric, options.prompt_tokens, options.decode_tokens, options.repetitions, options.shapes
        )

    def _choose_for(self, metrics: Sequence[str], header: Mapping[str, Any] | None) -> None:
        if header is not None:
            self.calibration = header["calibration"]
            self.chosen = {c.metric: c for c in map(arming.parse, header["choices"])}
        if all(m in self.chosen for m in metrics):
            return
        given = {c.metric: c for c in map(arming.parse, self.options.choices)}
        self.chosen = self.choose(metrics, quiet=bool(given))
        if given and any(given.get(m, c) != c for m, c in self.chosen.items()):
            self.calibration = None  # the request was fixed by another one, or by hand
        self.chosen |= {m: c for m, c in given.items() if m in metrics}

    def _add(self, bench: Bench) -> None:
        assert self.folder is not None
        try:
            bench.add()
        except DeviceError as error:
            raise self._lost(error) from None
        if len(bench.pairs) == 1:  # not before: what measured nothing leaves nothing to go on from
            artifact.write_json(
                self.folder / HEADER,
                {
                    "fingerprint": self.fingerprint,
                    "workload": bench.workload,
                    "choices": [str(c) for c in self.chosen.values()],
                    "calibration": self.calibration,
                },
            )

    def _refuse(self, why: str) -> NoReturn:
        raise NotComparable(f"base and head cannot be compared: {why}", self.report("not_comparable", why))

    def _nothing(self, why: str, hint: str | None = None) -> NoReturn:
        raise NothingMeasured(why, {**self.report("nothing_measured", why), "hint": hint}, hint)

    def _lost(self, error: DeviceError, what: str = "") -> NothingMeasured | DeviceLost:
        """The verdict when a process did not come back: pairs that are there can be gone on from."""
        if not self.counted or isinstance(error, NoSamples):
            report = self.report("nothing_measured", what + error.message)
            return NothingMeasured(what + error.message, {**report, "hint": error.hint}, error.hint)
        why = f"lost after {len(self.counted)} pairs: {what}{error.message}"
        hint = "with `-o OUT` the pairs so far are kept, and the same command goes on"
        return DeviceLost(why, {**self.report("device_lost", why), "hint": hint}, hint)

    def report(self, verdict: str, error: str | None = None) -> dict[str, Any]:
        """The JSON report of what is known now."""
        counted, options = self.counted, self.options
        metrics = self.panel.metric_entries(counted)
        exacts = self._exacts()
        budgets = self.panel.budget_entries(counted)
        if verdict in ("pass", "inconclusive") and any(
            e["blocking"] and e["verdict"] == "fail" for e in exacts
        ):
            verdict = "fail"
        entry, decided_by = self._deciding(verdict, metrics, exacts, budgets)
        series = next((s for s in self.panel.series if s.metric == entry["metric"]), None)
        same = ("metric", "ratio", "interval", "level", "pairs", "noise", "detectable", "pairs_predicted")
        empty = {**dict.fromkeys(same), "interval": [None, None], "pairs": len(counted)}
        return {
            "schema": SCHEMA,
            "verdict": verdict,
            **({"error": error} if error else {}),
            **empty,
            **{k: entry[k] for k in same if k in entry},
            "estimator": None if series is None else series.estimator,
            "clock": None if series is None else series.clock,
            "decided_by": decided_by,
            "looks": self.panel.looks,
            "margins": {
                "regression": options.margin_percent / 100,
                "tolerance": self.rule.tolerance,
                "tail": options.tail_margin_percent / 100,
            },
            "errors": {
                "alpha": options.alpha,
                "beta": options.beta,
                "looks": list(self.rule.looks),
                "metrics": len(self.panel.blocking),
            },
            "inconclusive": options.inconclusive,
            "drill_slowdown": options.drill_slowdown,
            "discarded": [
                {"pair": p["pair"], "why": p["discarded"]} for p in self.pairs if p["discarded"] is not None
            ],
            "base": profile.about(self.inputs["base"]) if "base" in self.inputs else None,
            "head": profile.about(self.inputs["head"]),
            "workload": {**self.workload, "seed": options.seed},
            "fingerprint": self.fingerprint,
            "calibration": self.calibration,
            "metrics": [*metrics, *exacts],
            "budgets": budgets,
            "raw": self.pairs,
        }

    def _exacts(self) -> list[dict[str, Any]]:
        """Memory, the median over pairs, and size."""
        found = []
        if "peak_memory" in self.checks and self.counted:
            peaks = {r: median([p[r]["peak_bytes"] for p in self.counted]) for r in ("base", "head")}
            found.append(exact("peak_memory", peaks, self.checks["peak_memory"], len(self.counted)))
        if "size" in self.checks:
            sizes = {r: float(self.inputs[r].bytes) for r in ("base", "head")}
            found.append(exact("size", sizes, self.checks["size"], None))
        return found

    def _deciding(
        self,
        verdict: str,
        metrics: Sequence[Mapping[str, Any]],
        exacts: Sequence[Mapping[str, Any]],
        budgets: Sequence[Mapping[str, Any]],
    ) -> tuple[Mapping[str, Any], str | None]:
        """The entry that led to the verdict, and by which clock; `exact` or `budget` where by none."""
        states = self.panel.states
        decision = verdict if verdict in ("pass", "fail") else None
        at: Mapping[str, Any]
        for each in self.panel.blocking:
            state = states[each.metric]
            if (state.decision not in ("pass", "fail")) if decision is None else state.decision == decision:
                clock = state.clock or each.clocks[0]
                entry = next(e for e in metrics if (e["metric"], e["clock"]) == (each.metric, clock))
                return entry, clock
        for at in exacts:
            if at["blocking"] and at["verdict"] == decision:
                return at, "exact"
        for at in budgets:
            if at["verdict"] == verdict:
                return {"metric": at["name"], "level": at["level"], "pairs": len(self.counted)}, "budget"
        if metrics:
            return metrics[0], str(metrics[0]["clock"])
        return {"metric": None}, None
