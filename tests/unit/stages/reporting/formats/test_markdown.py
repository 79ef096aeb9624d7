"""The comment on a pull request: what stands first, and that no name can break out of its cell."""

import re

import pytest

from edgesft.stages.reporting.formats import markdown


def rows(text):
    """Every table row of the comment, cut at the bars that are not escaped."""
    return [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize(
    ("verdict", "word"),
    [
        ("pass", "PASS"),
        ("fail", "FAIL"),
        ("inconclusive", "INCONCLUSIVE"),
        ("device_lost", "THE DEVICE WAS LOST"),
    ],
)
def test_marker_and_verdict_first(run, verdict, word):
    lines = markdown.render([run("verdict", verdict)]).splitlines()
    assert lines[0] == markdown.MARKER
    assert lines[2] == f"## EdgeSFT: {word}"
    assert lines[4].startswith(f"**{word}** verdict: ")


def test_one_table_before_the_fold(every):
    text = markdown.render(every)
    shown = text[: text.index("<details>")]
    assert shown.count("| :--- |") == 1
    assert "| tpot cpu | 10 ms | 10.01 ms | 1.001 &#91;0.991, 1.011&#93; | 5 % | PASS |" in shown
    assert "FAIL (does not block)" in shown
    assert text.count("<details>") == text.count("</details>") > 5


def test_profiles_alone_are_the_table(run):
    text = markdown.render([run("profile"), run("profile", name="b")])
    shown = text[: text.index("<details>")]
    assert "|   | profile | b |" in shown
    assert "| TPOT p50 (ms) | 10 &#91;9.8, 10.2&#93; | 10 &#91;9.8, 10.2&#93; |" in shown
    assert "needs 662 samples, has 100" in shown


def test_several_verdicts_are_counted(run):
    text = markdown.render([run("verdict"), run("verdict", "fail", name="b"), run("verdict", name="c")])
    assert "## EdgeSFT: 2 PASS, 1 FAIL" in text


def test_budgets_in_the_table(run):
    budget = {"name": "tokens_per_second", "unit": "tokens/s", "limit": 68.0, "value": 60.0, "low": 59.0,
              "high": 61.0, "verdict": "fail", "least": True}  # fmt: skip
    text = markdown.render([run("verdict", "fail", budgets=[budget])])
    assert (
        "| budget tokens_per_second |   | 60 tokens/s &#91;59, 61&#93; |   | at least 68 tokens/s | FAIL |"
        in text
    )


def test_hostile_text_stays_text(hostile):
    _, runs = hostile
    page = markdown.render(runs)
    plain = re.sub(r"</?(details|summary|sub)>", "", page.removeprefix(markdown.MARKER))
    assert "<" not in plain
    assert not re.search(r"[@`~$]|\]\(|://|[\x00-\x08\x0b-\x1f]", plain)
    assert page.count(markdown.MARKER) == 1
    assert all(not line.startswith("::") for line in page.splitlines())
    widths = [len(row) for row in rows(page)]
    tables = "\n".join("T" if line.startswith("|") else "" for line in page.splitlines()).split("\n\n")
    start = 0
    for block in (b.count("T") for b in tables if "T" in b):
        assert len(set(widths[start : start + block])) == 1
        start += block


def test_escape():
    assert markdown.escape("tpot_p50_ms") == "tpot_p50_ms"
    assert markdown.escape("_a_ *b*") == "&#95;a&#95; &#42;b&#42;"
    assert markdown.escape("http://e www.e") == "http&#58;//e www&#46;e"
    assert markdown.escape("a\r\nb") == "a  b"
