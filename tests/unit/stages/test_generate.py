"""One function continues a prompt with a model folder and with its export, alike."""

import json
import shutil
from pathlib import Path

import pytest

from edgesft.core import models
from edgesft.core.artifact import Request, create
from edgesft.core.errors import ArtifactError, UsageError
from edgesft.core.stage import execute
from edgesft.stages.export import Export
from edgesft.stages.generate import generate


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "x"
    execute(Export(), {"model": models.resolve(str(tiny_model))}, out)
    return out


def test_model_and_export_say_the_same(tiny_model: Path, exported: Path) -> None:
    a, b = (generate(path, "hello", max_new_tokens=12, threads=1) for path in (tiny_model, exported))
    assert a["text"] == b["text"]
    assert a["tokens"] == b["tokens"]
    assert b["prompt_tokens"] == 5
    assert b["new_tokens"] == len(b["tokens"])
    assert b["stop"] in ("eos", "length")
    assert b["ttft_ms"] > 0
    assert b["decode_tokens_per_second"] > 0


def test_the_end_token_is_no_part_of_the_text(exported: Path, tmp_path: Path) -> None:
    free = generate(exported, "hello", max_new_tokens=6, threads=1)
    ending = tmp_path / "x"
    shutil.copytree(exported, ending)
    (ending / "manifest.json").unlink()
    (ending / "generation_config.json").write_text(json.dumps({"eos_token_id": free["tokens"][3]}))
    files = {p.name: p.read_bytes() for p in ending.iterdir()}
    with create(tmp_path / "sealed", Request("onnx", "export", {}, {})) as (work, _):
        for name, content in files.items():
            (work.path / name).write_bytes(content)
    made = generate(tmp_path / "sealed", "hello", max_new_tokens=6, threads=1)
    assert made["stop"] == "eos"
    first = free["tokens"].index(free["tokens"][3])
    assert made["tokens"] == free["tokens"][: first + 1]
    tokenizer = models.tokenizer(exported)
    assert made["text"] == tokenizer.decode(free["tokens"][:first])


def test_one_token_has_no_decoding_speed(exported: Path) -> None:
    assert generate(exported, "a", max_new_tokens=1, threads=1)["decode_tokens_per_second"] is None


def test_chat_uses_the_template(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "m"
    shutil.copytree(tiny_model, model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    made = generate(model, "hi", max_new_tokens=2, threads=1, chat=True)
    assert made["prompt_tokens"] == 4
    assert made["tokens"] == generate(model, "<hi>", max_new_tokens=2, threads=1)["tokens"]


def test_bad_input(tiny_model: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the prompt is empty"):
        generate(exported, "", threads=1)
    with pytest.raises(UsageError, match="no chat template"):
        generate(exported, "hi", threads=1, chat=True)
    with pytest.raises(UsageError, match="context of 256"):
        generate(exported, "hi" * 200, threads=1)
    with pytest.raises(ArtifactError, match="does not exist"):
        generate(tmp_path / "absent", "hi", threads=1)
    with create(tmp_path / "p", Request("profile", "profile", {}, {})) as (work, _):
        shutil.copyfile(tiny_model / "tokenizer.json", work.path / "tokenizer.json")
    with pytest.raises(ArtifactError, match="kind `profile`, expected `model` or `onnx`"):
        generate(tmp_path / "p", "hi", threads=1)
