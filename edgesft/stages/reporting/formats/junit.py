"""JUnit XML: a suite a run, a test case a metric, budget and percentile.

A failure is a fail; an error is a gate without a verdict (not comparable, nothing measured, device lost);
skipped is an open verdict or a percentile without enough samples. The `time` of a case is the latency that
was measured, in seconds, so that a CI server's own charts show it; of other cases it is 0.
Fits the Windy Road schema of Ant's JUnit report, which Jenkins and GitLab read.
"""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from xml.etree import ElementTree

from edgesft import __version__
from edgesft.stages.reporting import FILES, Run
from edgesft.stages.reporting.findings import Finding, findings

FILE = "junit.xml"
ELEMENTS = {"fail": "failure", "error": "error", "inconclusive": "skipped", "refused": "skipped"}
# everything that XML 1.0 cannot hold, even escaped
ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(runs: Sequence[Run]) -> str:
    """The document, with a suite for every run that has something to check."""
    root = ElementTree.Element("testsuites")
    found = findings(runs)
    index = 0
    for run in runs:
        own = [f for f in found if f.run is run]
        if own:
            _suite(root, run, own, index)
            index += 1
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _suite(root: ElementTree.Element, run: Run, found: Sequence[Finding], index: int) -> None:
    kinds = [ELEMENTS.get(f.outcome) for f in found]
    times = [_seconds(f) for f in found]
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        {
            "name": _token(run.name),
            "package": f"edgesft.{run.kind}",
            "id": str(index),
            "timestamp": _timestamp(run),
            "hostname": "localhost",
            "tests": str(len(found)),
            "failures": str(kinds.count("failure")),
            "errors": str(kinds.count("error")),
            "skipped": str(kinds.count("skipped")),
            "time": f"{sum(times):.3f}",  # Jenkins's own schema allows three digits here
        },
    )
    properties = ElementTree.SubElement(suite, "properties")
    facts = {"edgesft": __version__, "record": run.uri, "kind": run.kind}
    facts["fingerprint"] = (run.record.get("fingerprint") or {}).get("id", "")
    for name, value in facts.items():
        ElementTree.SubElement(properties, "property", {"name": name, "value": _text(str(value))})
    for finding, kind, seconds in zip(found, kinds, times, strict=True):
        about = {"name": _token(finding.name), "classname": f"edgesft.{run.kind}", "time": f"{seconds:.6f}"}
        case = ElementTree.SubElement(suite, "testcase", about)
        if kind:
            attributes = {"message": _text(finding.message)}
            if kind != "skipped":
                attributes["type"] = finding.check
            ElementTree.SubElement(case, kind, attributes).text = _text(finding.message)
    said = "\n".join(f"{f.outcome}: {f.message}" for f in found)
    ElementTree.SubElement(suite, "system-out").text = _text(said)
    ElementTree.SubElement(suite, "system-err")


def _seconds(finding: Finding) -> float:
    usable = finding.unit == "ms" and finding.value is not None and 0 <= finding.value < 1e9
    return (finding.value or 0.0) / 1000 if usable else 0.0


def _timestamp(run: Run) -> str:
    """When the record was written, in UTC; the schema allows no time zone."""
    file = run.path / FILES.get(run.kind, "")
    made = file.stat().st_mtime if file.exists() else 0.0
    return datetime.fromtimestamp(made, tz=UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _text(text: str) -> str:
    return ILLEGAL.sub("?", text)


def _token(text: str) -> str:
    """In one line without spaces at the ends, never empty."""
    return " ".join(_text(text).split()) or "-"
