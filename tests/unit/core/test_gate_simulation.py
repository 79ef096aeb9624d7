"""Error rates of the gate's rule on simulated machines."""

import math

import numpy as np
import pytest
from scipy import signal, stats

from edgesft.core import sequential as s
from edgesft.core import statistics

# Latency of an iteration: exp(drift over processes + slow regime + process + iteration noise + warm-up)
# times (1 + bursty Pareto spikes). The effect of the session is shared by both sides and cancels.
PROFILES = {
    "quiet": {"drift": (0.004, 0.95), "slow": (0.002, 0.3, 0.05), "process": 0.005, "noise": (0.008, 0.5)}
    | {"spikes": (0.005, 0.2, 2.5, 0.1)},
    "ci": {"drift": (0.03, 0.98), "slow": (0.03, 0.17, 0.10), "process": 0.012, "noise": (0.025, 0.7)}
    | {"spikes": (0.03, 0.4, 1.8, 0.2)},
}


def markov(rng, shape, enter, leave):
    """0/1 series along the last axis that starts in its stationary state."""
    state = rng.random(shape[:-1]) < enter / (enter + leave)
    out = np.empty(shape, dtype=bool)
    for k in range(shape[-1]):
        u = rng.random(shape[:-1])
        state = np.where(state, u > leave, u < enter)
        out[..., k] = state
    return out


def ar(rng, shape, sd, rho):
    x = rng.standard_normal(shape) * sd * math.sqrt(1 - rho**2)
    x[..., 0] /= math.sqrt(1 - rho**2)
    return signal.lfilter([1.0], [1.0, -rho], x, axis=-1)


def simulate(profile, trials, seed, pairs=48, steps=64):
    """Log of one number a process, (trials, pairs, 2): the second is head, in random order of time."""
    p, rng = PROFILES[profile], np.random.default_rng(seed)
    shape = (trials, 2 * pairs)
    level = ar(rng, shape, *p["drift"]) + p["process"] * rng.standard_normal(shape)
    level += p["slow"][2] * markov(rng, shape, *p["slow"][:2])
    x = level[..., None] + ar(rng, (*shape, steps), *p["noise"]) + 0.3 * np.exp(-np.arange(steps) / 3)
    rate, burst, tail, scale = p["spikes"]
    hit = markov(rng, x.shape, rate * burst / (1 - rate), burst)
    x += np.log1p(hit * scale * rng.pareto(tail, x.shape))
    value = np.empty(shape)
    for index in np.ndindex(shape):
        series = x[index]
        value[index] = statistics.estimate(series[statistics.mser(series).cut :], "p10")
    ordered = value.reshape(trials, pairs, 2)
    swap = rng.random((trials, pairs)) < 0.5
    return np.where(swap[..., None], ordered[..., ::-1], ordered)


def verdicts(logs, slowdown, rule):
    """Decision and pairs of every trial."""
    d = logs[..., 1] - logs[..., 0] + math.log1p(slowdown)
    out = []
    for row in d:
        looks = (s.look(row[:n], rule) for n in rule.looks)
        out.append(next(found for found in looks if found.decision != s.CONTINUE))
    return out


@pytest.mark.parametrize("profile", ["quiet", "ci"])
def test_gate_rarely_cries_wolf_and_never_sleeps(profile):
    logs = simulate(profile, trials=200, seed=11)
    rule = s.Rule()
    same = [v.decision for v in verdicts(logs, 0.0, rule)]
    slow = [v.decision for v in verdicts(logs, 0.05, rule)]
    assert same.count(s.FAIL) <= 2
    assert same.count(s.PASS) >= 190
    assert slow.count(s.FAIL) >= 190
    assert slow.count(s.PASS) <= 2


def test_pooling_iterations_would_cry_wolf():
    # The negative control: processes repeat, iterations of one process do not.
    rng = np.random.default_rng(4)
    alarms = 0
    for _ in range(200):
        base, head = (
            0.012 * rng.standard_normal((12, 1)) + 0.01 * rng.standard_normal((12, 64)) for _ in "ab"
        )
        alarms += stats.mannwhitneyu(head.ravel(), base.ravel(), alternative="greater").pvalue < 0.01
    assert alarms > 20
