"""The report of a recipe's run: its table, its verdict, its plots."""

import json

import pytest

from edgesft.core.artifact import Artifact
from edgesft.stages import report

VARIANT = {
    "stage": "sparse export",
    "runtime": "onnx",
    "accuracy": 0.9,
    "accuracy_interval": [0.85, 0.94],
    "loss": 0.3,
    "bytes": 1e8,
    "ttft_ms_p50": 300.0,
    "tpot_ms_p50": 15.0,
    "tpot_ms_p99": None,
    "tokens_per_second": 66.0,
    "peak_memory_bytes": None,
}
VERDICT = {"verdict": "pass", "ratio": 0.999, "interval": [0.97, None], "pairs": 12, "inconclusive": "report"}
SUMMARY = {
    "recipe": "<quickstart>",
    "model": "m",
    "data": "d",
    "variants": [VARIANT, {**VARIANT, "stage": "tuned", "accuracy": None, "accuracy_interval": None}],
    "verdict": VERDICT,
    "notes": ["a <note>"],
    "seconds": {"tuned": 1.0},
}


@pytest.fixture
def made(tmp_path):
    def artefact(name, kind, file, text):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(text)
        return Artifact(tmp_path / name, kind, "sha256:1", name, {"metrics": {"of": name}})

    steps = [{"step": i, "loss": 1.0 - 0.01 * i, "dev_loss": 0.5 if i % 10 == 0 else None} for i in range(40)]
    pairs = [{"pair": i, "ratio": {"tpot": {"cpu": 1.0 + 0.01 * i}}, "discarded": None} for i in range(8)]
    gate = {"schema": 2, "metric": "tpot", "margins": {"regression": 0.05}, "metrics": [], "raw": pairs}
    profile = {"samples": {"tpot_ms": [15.0, 16.0]}}
    return {
        "tuned-delta": artefact("d", "delta", "metrics.jsonl", "\n".join(map(json.dumps, steps))),
        "profile-export": artefact("p", "profile", "profile.json", json.dumps(profile)),
        "profile-export-dense": artefact("q", "profile", "profile.json", json.dumps({"samples": {}})),
        "gate": artefact("g", "verdict", "verdict.json", json.dumps(gate)),
    }


def test_the_page_has_every_plot_and_escapes(made):
    page = report.html(SUMMARY, made)
    for title in ("Training loss", "Quality against latency", "Latency distribution", "Gate"):
        assert f"<h3>{title}</h3>" in page
    assert page.count('<svg role="img"') == 4
    assert "&lt;quickstart&gt;: m on d" in page
    assert "a &lt;note&gt;" in page
    assert "0.999 times as long [0.970, ?] over 12 pairs" in " ".join(page.split())


def test_without_artefacts_there_are_no_plots():
    page = report.html({**SUMMARY, "verdict": None, "variants": []}, {})
    assert "<figure>" not in page


def test_rows_and_verdict():
    first, second = report.rows(SUMMARY)
    assert dict(zip(report.COLUMNS, first, strict=True)) == {
        "stage": "sparse export",
        "runtime": "onnx",
        "accuracy [95 %]": "90.0 % [85.0, 94.0]",
        "loss": "0.3",
        "size MB": "100",
        "TTFT ms": "300",
        "TPOT p50": "15",
        "TPOT p99": "-",
        "tokens/s": "66",
        "peak MB": "-",
    }
    assert second[2] == "-"
    assert report.verdict_line(SUMMARY) == "gate: PASS, sparse / dense export 0.999 [0.970, ?] over 12 pairs"
    assert report.verdict_line({"verdict": None, "notes": []}) == "no gate in this recipe"
    lost = {"verdict": "device_lost", "ratio": None, "interval": [None, None], "pairs": 0}
    assert report.verdict_line({"verdict": lost}) == "gate: DEVICE_LOST"
