"""Workflow commands: one a line, nothing from a file can end or forge one."""

import re

from edgesft.stages.reporting.formats import github, markdown

LINE = re.compile(r"::(error|warning|notice) title=[^:,\r\n]*::[^\r\n]*")


def lines(runs):
    text = github.render(runs)
    assert text.endswith("\n")
    found = text[:-1].split("\n")
    assert all(LINE.fullmatch(line) for line in found), found
    return found


def test_the_worst_comes_first(run):
    found = lines([run("verdict", "inconclusive"), run("verdict", "fail", name="other")])
    assert found[0].startswith("::error title=EdgeSFT other tpot::tpot of head is 1.062 times that of base")
    assert found[1].startswith("::warning title=EdgeSFT verdict tpot::")
    assert "margin 5 %25" in found[0]
    assert all(line.startswith("::notice") for line in found[2:])


def test_a_pass_is_said(run):
    assert lines([run("verdict")])[0] == "::notice title=EdgeSFT::verdict: the gate passed"


def test_no_more_than_github_shows(run):
    found = lines([run("profile", notes=[f"note {i}" for i in range(30)])])
    assert len(found) == github.SHOWN
    assert found[-1] == "::notice title=EdgeSFT::22 more, see the step summary"


def test_escapes():
    assert github.message("50 %\r\nx") == "50 %25%0D%0Ax"
    assert github.property_value("a:b,c%\n") == "a%3Ab%2Cc%25%0A"


def test_hostile_text_stays_text(hostile):
    assert lines(hostile[1])


def test_the_summary_is_the_markdown(every):
    assert github.summary(every) == markdown.render(every)
