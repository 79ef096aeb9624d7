"""The gate's decision on several metrics and budgets at once, look by look.

Every metric that can block gets an even share of the error budgets at each look, and so does each of its
clocks; at the last look Holm's procedure takes the place of the even shares of the metrics. One that fails
ends it. One that has passed stays passed. The gate passes when all have.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgesft.core.statistics import sequential
from edgesft.core.statistics.sequential import CONTINUE, FAIL, INCONCLUSIVE, PASS, Look, Rule
from edgesft.stages.gating import budget as budgeting
from edgesft.stages.gating.budget import Budget

Pair = Mapping[str, Any]


@dataclass(frozen=True)
class Series:
    """One metric of which every process gives one number.

    source: the samples it is taken from, `tpot` for `tpot_p95`. estimator: `median`, `p10`, `min` or `p95`.
    clocks: which decide together; the warm-up is cut by the first.
    """

    metric: str
    source: str
    estimator: str
    clock: str
    clocks: tuple[str, ...]
    blocking: bool
    margin: float


@dataclass
class _State:
    """What is known of one series: its decision, as soon as there is one, and the clock that made it."""

    decision: str = CONTINUE
    clock: str | None = None
    own: dict[str, str] = field(default_factory=dict)  # by each clock


class Panel:
    """All metrics and budgets of one gate, and what has been decided of them so far."""

    def __init__(
        self, series: Sequence[Series], rule: Rule, budgets: Sequence[Budget], level: float, size: float
    ) -> None:
        """rule: margins aside, the errors of the whole gate. size: bytes of head."""
        self.series, self.rule, self.budgets = list(series), rule, list(budgets)
        self.level, self.size = level, size
        self.blocking = [s for s in self.series if s.blocking]
        self.states = {s.metric: _State() for s in self.series}
        self.looks: list[dict[str, Any]] = []
        self.kept: dict[str, dict[str, Any]] = {}  # the entry of each budget that is decided
        self._seen = 0

    def rule_of(self, series: Series) -> Rule:
        """The rule of one metric by one clock, with its share of the errors."""
        shares = max(1, len(self.blocking)) * len(series.clocks)
        return Rule(
            margin=series.margin,
            tolerance=self.rule.tolerance,
            alpha=self.rule.alpha,
            beta=self.rule.beta,
            max_pairs=self.rule.max_pairs,
            metrics=shares,
        )

    def advance(self, counted: Sequence[Pair]) -> str | None:
        """The verdict, if a look that is due at this number of pairs reaches one; None to go on."""
        for n in self.rule.looks:
            if n <= self._seen:
                continue
            if n > len(counted):
                return None
            self._seen = n
            self._look_at_metrics(counted[:n])
            self._look_at_budgets(counted[:n])
            verdict = self._verdict(n)
            if verdict is not None:
                return verdict
        return None

    def _verdict(self, n: int) -> str | None:
        decisions = [self.states[s.metric].decision for s in self.blocking]
        decisions += [self.kept[b.name]["verdict"] if b.name in self.kept else CONTINUE for b in self.budgets]
        if FAIL in decisions:
            return FAIL
        if CONTINUE in decisions and n < self.rule.max_pairs:
            return None
        return INCONCLUSIVE if {CONTINUE, INCONCLUSIVE} & set(decisions) else PASS

    def _look_at_metrics(self, pairs: Sequence[Pair]) -> None:
        looks = {s.metric: {c: self._look(s, c, pairs) for c in s.clocks} for s in self.series}
        if len(pairs) >= self.rule.max_pairs and len(self.blocking) > 1:
            self._finish(looks)
        for each in self.series:
            state, found = self.states[each.metric], looks[each.metric]
            self.looks += [{"metric": each.metric, "clock": c, **k.json()} for c, k in found.items()]
            if state.decision in (PASS, FAIL):
                continue
            state.own = {c: k.decision for c, k in found.items()}
            one, *other = found.values()
            rule = self.rule_of(each)
            state.decision = sequential.agree(one, other[0], rule) if other else one.decision
            agreeing = (c for c, decision in state.own.items() if decision == state.decision)
            state.clock = next(agreeing, each.clocks[0])

    def _look(self, series: Series, clock: str, pairs: Sequence[Pair]) -> Look:
        return sequential.look(logs(pairs, series.metric, clock), self.rule_of(series))

    def _finish(self, looks: dict[str, dict[str, Look]]) -> None:
        """Put Holm's decisions in the place of those by even shares, clock by clock."""
        for clock in ("cpu", "wall"):
            with_it = [s for s in self.blocking if clock in s.clocks]
            if len(with_it) < len(self.blocking):
                continue  # metrics with one clock have other shares: they keep the even ones
            if len({len(s.clocks) for s in with_it}) > 1:
                continue
            found = sequential.last_looks(
                [looks[s.metric][clock] for s in with_it], [self.rule_of(s) for s in with_it]
            )
            for each, decided in zip(with_it, found, strict=True):
                looks[each.metric][clock] = decided

    def _look_at_budgets(self, pairs: Sequence[Pair]) -> None:
        for each in self.budgets:
            if each.name in self.kept:
                continue
            entry = self.entry_of(each, pairs)
            never = budgeting.hopeless(entry, len(pairs), self.rule.max_pairs)
            if entry["verdict"] != INCONCLUSIVE or never or len(pairs) >= self.rule.max_pairs:
                self.kept[each.name] = entry

    def entry_of(self, budget: Budget, pairs: Sequence[Pair]) -> dict[str, Any]:
        """The line of a budget at these pairs."""
        heads = [p["head"] for p in pairs]
        return budgeting.check(budget, heads, self.size, self.level, len(self.rule.looks))

    def budget_entries(self, counted: Sequence[Pair]) -> list[dict[str, Any]]:
        """Every budget's line: as decided, or as it stands."""
        return [self.kept.get(b.name) or self.entry_of(b, counted) for b in self.budgets]

    def metric_entries(self, counted: Sequence[Pair]) -> list[dict[str, Any]]:
        """Every metric's line of the report by each clock, at the pairs reached."""
        return [self._entry(s, c, counted) for s in self.series for c in s.clocks]

    def _entry(self, series: Series, clock: str, pairs: Sequence[Pair]) -> dict[str, Any]:
        rule, state = self.rule_of(series), self.states[series.metric]
        own = state.own.get(clock, INCONCLUSIVE)
        empty = ("ratio", "noise", "detectable", "pairs_predicted", "base_ms", "head_ms")
        entry: dict[str, Any] = {
            "metric": series.metric,
            "clock": clock,
            "verdict": INCONCLUSIVE if own == CONTINUE else own,
            "blocking": series.blocking,
            "margin": series.margin,
            "estimator": series.estimator,
            "pairs": len(pairs),
            **dict.fromkeys(empty),
            "interval": [None, None],
            "level": 1 - 2 * rule.beta_look,
            "faster": False,
            **({} if series.blocking else {"note": "reported only"}),
        }
        if not pairs:
            return entry
        ratios = logs(pairs, series.metric, clock)
        low, high = sequential.hodges_lehmann_interval(ratios, rule.beta_look)
        spread = sequential.noise(ratios)
        return entry | {
            "ratio": math.exp(sequential.hodges_lehmann(ratios)),
            "interval": [None if x is None else math.exp(x) for x in (low, high)],
            "noise": spread,
            "detectable": sequential.detectable(spread, len(pairs)),
            "pairs_predicted": sequential.pairs_predicted(spread, series.margin),
            "faster": bool(sequential.signed_rank_p([-x for x in ratios]) <= self.rule.alpha),
            "base_ms": median([p["base"]["value"][series.metric][clock] for p in pairs]),
            "head_ms": median([p["head"]["value"][series.metric][clock] for p in pairs]),
        }


def logs(pairs: Sequence[Pair], metric: str, clock: str) -> list[float]:
    """Log ratios head / base of a metric by a clock."""
    return [math.log(p["ratio"][metric][clock]) for p in pairs]


def median(values: Sequence[float]) -> float:
    """The middle of a few numbers; of an even count the mean of the two."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
