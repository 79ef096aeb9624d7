"""Budgets: the file, the bounds, and that a process is what repeats."""

import numpy as np
import pytest

from edgesft.core.errors import ArtifactError, UsageError
from edgesft.stages.gating import budget as budgeting


def process(times, **more):
    """A process as the gate keeps it, two samples of warm-up in front."""
    steps = {"wall": [50.0, 40.0, *times]}
    return {
        "samples_ms": {"tpot": steps, "ttft": steps},
        "cut": {"tpot": 2, "ttft": 2},
        "peak_bytes": 200e6,
        "load_ms": 300.0,
        "watts": 5.0,
    } | more


def check(name, limit, processes, size=1e6, level=0.95, looks=1):
    return budgeting.check(budgeting.parse({name: limit}, "b")[0], processes, size, level, looks)


def several(rng, count=8, level=8.0, between=0.01, samples=64):
    return [
        process(
            (level * np.exp(between * rng.standard_normal() + 0.02 * rng.standard_normal(samples))).tolist()
        )
        for _ in range(count)
    ]


def test_reads_a_table(tmp_path):
    file = tmp_path / "budget.toml"
    file.write_text("[budget]\ntpot_p50_ms = 12\nsize_mb = 100.5\nlevel = 0.99\n")
    assert budgeting.read(file) == ({"tpot_p50_ms": 12.0, "size_mb": 100.5}, 0.99)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[budget]\ntpot_p50_ms = 12\nsize_mb = = 3\n", "line 3"),
        ("[budget]\ntpot_p5_ms = 12\n", "`tpot_p5_ms`"),
        ("[budget]\ntpot_p50_ms = -1\n", "above 0"),
        ("[budget]\ntpot_p50_ms = true\n", "above 0"),
        ("[budget]\ntpot_p50_ms = nan\n", "above 0"),
        ("[budget]\ntpot_p50_ms = '12 ms'\n", "above 0"),
        ("[budget]\ntpot_p50_ms = 1\nlevel = 95\n", "level"),
        ("tpot_p50_ms = 1\n", "table `\\[budget\\]`"),
        ("[budget]\n", "no budget"),
        ("", "no table"),
    ],
)
def test_a_broken_file_is_a_usage_error(tmp_path, text, word):
    file = tmp_path / "budget.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=word) as caught:
        budgeting.read(file)
    if "p5_ms" in word:
        assert "`tpot_p50_ms`" in str(caught.value.hint)


def test_a_missing_file_is_said_so(tmp_path):
    with pytest.raises(ArtifactError, match="does not exist"):
        budgeting.read(tmp_path / "budget.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ArtifactError, match="not readable"):
        budgeting.read(tmp_path / "bytes.toml")


@pytest.mark.parametrize(("limit", "verdict"), [(9.0, "pass"), (7.0, "fail"), (8.0, "inconclusive")])
def test_a_median_is_kept_broken_or_open(limit, verdict):
    entry = check("tpot_p50_ms", limit, several(np.random.default_rng(0)))
    assert entry["verdict"] == verdict
    assert entry["low"] < entry["value"] < entry["high"]
    assert entry["value"] == pytest.approx(8, rel=0.02)


def test_samples_of_one_process_do_not_count_as_independent():
    # Eight processes of a thousand samples each: the bound must span the processes, not 8000 samples.
    rng = np.random.default_rng(1)
    processes = several(rng, between=0.10, samples=1000)
    medians = [np.median(budgeting.steady(p, "tpot")) for p in processes]
    entry = check("tpot_p50_ms", 8, processes)
    assert (entry["low"], entry["high"]) == (min(medians), max(medians))
    tail = check("tpot_p99_ms", 9, processes)
    assert tail["high"] / tail["low"] > 1.2


def test_bounds_hold_as_often_as_they_say():
    rng = np.random.default_rng(2)
    true = 8 * np.quantile(
        np.exp(0.05 * rng.standard_normal(200_000) + 0.02 * rng.standard_normal(200_000)), 0.9
    )
    missed = {"median": 0, "p90": 0}
    for _ in range(60):
        processes = several(rng, count=10, between=0.05)
        median, tail = check("tpot_p50_ms", 8, processes), check("tpot_p90_ms", 8, processes)
        missed["median"] += not median["low"] <= 8 <= median["high"]
        missed["p90"] += not tail["low"] <= true <= tail["high"]
    assert max(missed.values()) <= 7  # 5 % of 60 are 3


def test_a_tail_without_enough_samples_is_refused():
    processes = several(np.random.default_rng(3))
    entry = check("tpot_p99_ms", 100, processes)
    assert (entry["verdict"], entry["value"], entry["high"]) == ("inconclusive", None, None)
    assert entry["reason"] == "p99 needs 662 samples, has 512"
    assert not budgeting.hopeless(entry, 8, 48)
    assert budgeting.hopeless(entry, 8, 9)
    entry = check("tpot_p99_ms", 100, several(np.random.default_rng(3), count=12))
    assert entry["verdict"] == "pass"


def test_looks_share_the_confidence():
    processes = several(np.random.default_rng(4), count=12)
    once, often = (check("tpot_p50_ms", 8, processes, looks=n) for n in (1, 6))
    assert often["low"] < once["low"]
    assert often["high"] > once["high"]
    assert check("tpot_p50_ms", 9, processes[:8], looks=6)["verdict"] == "pass"
    few = check("tpot_p50_ms", 9, processes[:7], looks=6)
    assert few["verdict"] == "inconclusive"
    assert "too few" in few["reason"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("load_ms", 300.0),
        ("peak_memory_mb", 200.0),
        ("size_mb", 1.0),
        ("ttft_p50_ms", 8.0),
        ("itl_p90_ms", 8.0),
        ("energy_per_token_mj", 40.0),  # 5 W for 8 ms
        ("tokens_per_second", 125.0),
    ],
)
def test_every_quantity_is_measured(name, value):
    processes = [process([8.0] * 64) for _ in range(8)]
    assert check(name, value, processes)["value"] == pytest.approx(value)
    more, less = (
        check(name, value * 1.1, processes)["verdict"],
        check(name, value * 0.9, processes)["verdict"],
    )
    expected = ("fail", "pass") if name == "tokens_per_second" else ("pass", "fail")
    assert (more, less) == expected


def test_what_an_artefact_does_not_do_cannot_be_budgeted():
    def why(name, kind):
        return budgeting.unmeasurable(budgeting.parse({name: 1.0}, "b"), kind)

    assert "`latency_p50_ms`" in why("latency_p50_ms", "decoder")
    assert "generates none" in why("tpot_p50_ms", "graph")
    assert why("latency_p50_ms", "graph") is None
    assert why("itl_p50_ms", "decoder") is None
    assert why("size_mb", "encoder") is None
