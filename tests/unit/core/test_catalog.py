"""The folder is the registry."""

from pathlib import Path

import pytest

from edgesft.core import catalog
from edgesft.core.errors import UsageError


def test_every_method_loads_and_is_documented():
    found = list(catalog.entries())
    assert len(found) >= 11
    for entry in found:
        kind = catalog.load(entry.axis, entry.name)
        assert kind.__dataclass_params__.frozen
        assert len(entry.summary) > 10, entry.title
        page = catalog.page(entry.axis, entry.name)
        assert page.startswith(f"# {entry.title}")
        for name, about in catalog.fields(entry.axis, entry.name).items():
            assert about.get("description"), f"{entry.title}.{name} has no description"


def test_built_methods_describe_themselves_again():
    built = catalog.build("select", {"use": "small-magnitude", "density": 0.1})
    assert catalog.describe("select", built) == {"use": "small-magnitude", "density": 0.1}


@pytest.mark.parametrize(
    ("values", "message", "hint"),
    [
        ({"use": "small-magntude"}, "no select method `small-magntude`", "small-magnitude"),
        ({"use": "small-magnitude", "desnity": 0.1}, "no parameter `desnity`", "density"),
        ({"use": "small-magnitude", "density": 1.5}, "less than or equal to 1", None),
        ({"use": "small-magnitude", "density": 0}, "greater than 0", None),
        ({"use": "small-magnitude", "density": "lots"}, "valid number", None),
        ({"density": 0.1}, "names no method", "use"),
    ],
)
def test_mistakes_are_answered(values, message, hint):
    with pytest.raises(UsageError, match=message) as caught:
        catalog.build("select", values)
    if hint:
        assert hint in caught.value.hint


def test_names_can_be_short_where_they_are_unique():
    assert catalog.split("wanda") == ("compress", "wanda")
    assert catalog.split("select:magnitude") == ("select", "magnitude")
    with pytest.raises(UsageError):
        catalog.split("magnitude")  # select and compress both have it
    with pytest.raises(UsageError):
        catalog.split("selct:magnitude")


def test_the_documentation_is_what_the_methods_say():
    pages = Path(__file__).resolve().parents[3] / "docs" / "methods"
    written = {p.name: p.read_text() for p in pages.glob("*.md")}
    wanted = {f"{e.axis}-{e.name}.md": catalog.page(e.axis, e.name) for e in catalog.entries()}
    assert written == wanted, "run `edgesft docs -o docs/methods`"
