"""The light tokenizer says what transformers' AutoTokenizer says."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors
from transformers import AutoTokenizer

from edgesft.core.errors import ArtifactError
from edgesft.core.tokens import Tokenizer

TEXTS = [
    "",
    "Hello world",
    "in 2024,  12 x",
    " a\n\n b\t<s> c </s>",
    "\u00e9 \u6f22\u5b57 \U0001f600",
    "<|im_start|>user\nhi<|im_end|>",
]
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": 'say "x" & <y>'},
    {"role": "assistant", "content": "x"},
    {"role": "user", "content": "again"},
]
TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'other' %}{{ raise_exception('no such role') }}{% endif %}
    [{{ message['role'] }}] {{ message['content'] | tojson }} {{ message.content | trim }}
    {%- if loop.last %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}
"""


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """As in Llama: BOS put in front by tokenizer.json, a misleading `add_bos_token`, EOS also elsewhere."""
    vocabulary = {t: i for i, t in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "normalized": False, "special": True},
        "pad_token": "<pad>",
        "add_bos_token": False,
        "chat_template": TEMPLATE,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    return tmp_path


def test_ids_are_those_of_transformers(llama: Path) -> None:
    ours, theirs = Tokenizer(llama), AutoTokenizer.from_pretrained(llama)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"], text
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False)["input_ids"], text
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert ours.encode_many(TEXTS * 3) == [ours.encode(t) for t in TEXTS * 3]
    assert ours.bos_id == theirs.bos_token_id
    assert ours.pad_id == theirs.pad_token_id
    assert ours.eos_ids == (1, 7)


@pytest.mark.parametrize("generate", [True, False])
def test_chat_is_that_of_transformers(llama: Path, generate: bool) -> None:
    ours, theirs = Tokenizer(llama), AutoTokenizer.from_pretrained(llama)
    wanted = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=generate)
    assert ours.chat(MESSAGES, generate) == wanted


def test_a_template_can_neither_escape_nor_crash(llama: Path) -> None:
    with pytest.raises(ArtifactError, match="no such role"):
        Tokenizer(llama).chat([{"role": "other", "content": ""}])
    for evil in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}", "{% for %}"):
        (llama / "chat_template.jinja").write_text(evil)
        with pytest.raises(ArtifactError, match="chat template"):
            Tokenizer(llama).chat([{"role": "user", "content": ""}])


def test_what_is_missing_or_broken_is_named(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path / "nowhere")
    (llama / "tokenizer_config.json").write_text("{}")
    assert Tokenizer(llama).chat(MESSAGES) is None
    (llama / "tokenizer.json").write_text("{}")
    with pytest.raises(ArtifactError, match="no valid tokenizer"):
        Tokenizer(llama)


@pytest.mark.demo
@pytest.mark.parametrize("name", ["smollm2-135m", "minilm"])
def test_demo_models_agree_with_transformers(name: str) -> None:
    from edgesft.core import models as edge_models

    path = edge_models.resolve(f"demo:{name}").path
    ours, theirs = Tokenizer(path), AutoTokenizer.from_pretrained(path)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"], text
    if name == "smollm2-135m":
        wanted = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        assert ours.chat(MESSAGES) == wanted
        assert ours.eos_ids == (theirs.eos_token_id,)
        assert [ours.decode([i]) for i in ours.encode("in 1979", special=False)[1:]] == [
            " ",
            "1",
            "9",
            "7",
            "9",
        ]
