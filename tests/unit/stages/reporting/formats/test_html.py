"""The page: self-contained, everything escaped, a figure for everything that was measured."""

import re

import pytest
from lxml import html as parser

from edgesft.stages.reporting import plots
from edgesft.stages.reporting.formats import html


def parse(runs):
    text = html.render(runs)
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", text)
    return text, parser.document_fromstring(text.encode("utf-8", errors="replace"))


@pytest.fixture(scope="module")
def whole(every):
    return parse(every)


def test_every_kind_of_run(whole):
    text, page = whole
    titles = [h.text_content() for h in page.iter("h2")]
    assert titles == [
        *("Gate: verdict", "Profiles", "Inside a step", "Calibration", "Evaluations"),
        *("Predicted, not measured", "Trend", "Environment"),
    ]
    figures = [h.text_content() for h in page.xpath("//figure/h3")]
    assert figures == [
        *("Ratio of every pair", "Both sides"),
        *(
            "Distribution of the time per output token (TPOT)",
            "Distribution of the time to first token (TTFT)",
        ),
        *("TTFT by length of the prompt", "TPOT by length of the prompt"),
        *("Time by operator", "Time by layer", "Roofline of profile", "Roofline of another", "trend"),
    ]
    assert "needs 662 samples, has 100" in text


def test_nothing_is_loaded_and_nothing_runs(whole):
    text, page = whole
    assert not page.xpath("//script | //link | //img | //iframe | //object | //image")
    assert "default-src 'none'" in text
    outside = [v for e in page.iter() for k, v in e.attrib.items() if k in ("href", "src", "{x}href")]
    assert all(v.startswith("#") for v in outside)
    assert "@import" not in text


def test_figures_say_what_they_show_and_take_the_ink_of_the_page(whole):
    text, page = whole
    figures = page.xpath("//figure/*[local-name() = 'svg']")
    assert len(figures) == 11
    assert all(f.get("role") == "img" and len(f.get("aria-label")) > 20 for f in figures)
    assert "currentcolor" in text.lower()
    assert plots.INK not in text


@pytest.mark.parametrize("verdict", ["fail", "inconclusive", "not_comparable"])
def test_the_verdict_stands_first(run, verdict):
    _, page = parse([run("verdict", verdict)])
    (lead,) = page.find_class("lead")
    assert lead.text_content().startswith(verdict.replace("_", " ").upper() + " verdict: ")


def test_hostile_text_stays_text(hostile):
    text, runs = hostile
    made, page = parse(runs)
    assert not page.xpath("//script")
    assert not page.xpath("//@onload")
    assert ("{{7*7}}" in text) == ("{{7*7}}" in made)
    assert len(page.xpath("//figure")) == 10
    assert text.split()[0] in page.text_content()


def test_an_encoder_and_missing_parts(run):
    empty = {f"{m}_ms": {"p50": None, "reasons": {}, "samples": 0} for m in ("ttft", "tpot", "itl")}
    bare = {
        "operators": None,
        "roofline": None,
        "energy": None,
        "throttled": None,
        "contexts": [],
        "samples": {},
    }
    table = {"p50": 5.0, "samples": 11}
    _, page = parse([run("profile", kind="encoder", latency_ms=table, **empty, **bare)])
    assert not page.xpath("//figure")
    assert "LATENCY p50 (ms)" in page.text_content()
    assert "TTFT p50" not in page.text_content()


def test_packed_layers_are_listed(run):
    row = {"layer": "layers.*.qkv", "count": 30, "kind": "packed", "pattern": "2:4", "bits": 4,
           "bits_per_weight": 3.5, "weights": 16_588_800}  # fmt: skip
    found = {"packed": 30, "tiled": 0, "dense": 0, "bits_per_weight": 3.5, "rows": [row]}
    _, page = parse([run("profile", layers=found)])
    text = page.text_content()
    assert "Layers of profile" in text
    assert "layers.*.qkv" in text
    assert "16,588,800" in text
    assert "3.5 bits a weight in all" in text


def test_equal_runs_give_equal_pages(every, whole):
    assert html.render(every) == whole[0]


def test_a_far_pair_does_not_squeeze_the_others(run):
    verdict = run("verdict").record
    verdict["raw"][5]["ratio"]["tpot"]["wall"] = 40.0
    assert plots._window(plots.pair_ratios(verdict)[1], [1.0, 1.05])[1] < 1.1
    assert ">40.00<" in plots.pairs(verdict)


def test_the_gate_plot_of_a_budget_shows_what_was_paired(run):
    record = {**run("verdict").record, "metric": "size", "decided_by": "exact"}
    assert plots.pair_ratios(record)[0] == "tpot"
    assert plots.pairs({**record, "raw": []}) is None
