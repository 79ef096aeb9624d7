"""A tokenizer that needs neither transformers nor torch: tokenizer.json, its special tokens, its chat
template.

tokenizer.json decides about BOS and EOS around a text, as in transformers 5, which ignores
`add_bos_token` of tokenizer_config.json where that file exists.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgesft.core.errors import ArtifactError, UsageError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def check_ids(ids: npt.NDArray[np.int64], vocabulary: int) -> None:
    """Raises UsageError for an empty text or a token outside the vocabulary."""
    if ids.size == 0:
        raise UsageError("there are no tokens to run, expected at least one")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        bad = low if low < 0 else high
        raise UsageError(f"token {bad} is outside the vocabulary of {vocabulary}")


def check_length(length: int, context: int) -> None:
    """Raises UsageError if a text of `length` tokens exceeds the context; 0: no limit is known."""
    if context and length > context:
        raise UsageError(f"{length} tokens are more than the model's context of {context}")


class Tokenizer:
    """What a model folder says about text. Raises ArtifactError when a file is missing or broken."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        file = path / "tokenizer.json"
        if not file.is_file():
            hint = "in Python: `AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)` writes it"
            raise ArtifactError(f"`{path}` has no tokenizer.json", hint)
        try:
            self._backend = Backend.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception
            raise ArtifactError(f"`{file}` is no valid tokenizer: {error}") from None
        self._backend.no_truncation()
        self._backend.no_padding()
        self.path = path
        config = read_json(path / "tokenizer_config.json", missing={})
        self.special = {name: text for name in NAMED if (text := _content(config.get(name))) is not None}
        self._add_special(config)
        self.vocabulary: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.eos_ids = self._eos()
        self.bos_id = self._id("bos_token")
        pad = self._id("pad_token")
        self.pad_id: int = pad if pad is not None else (self.eos_ids[0] if self.eos_ids else 0)
        self.template = _template(path, config)

    def _add_special(self, config: Mapping[str, Any]) -> None:
        """Tokens that only tokenizer_config.json knows to be special (transformers adds them too)."""
        from tokenizers import AddedToken

        known = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        new = [t for t in self.special.values() if t not in known]
        if new:
            self._backend.add_special_tokens([AddedToken(t, special=True) for t in dict.fromkeys(new)])

    def _id(self, name: str) -> int | None:
        found: int | None = self._backend.token_to_id(self.special[name]) if name in self.special else None
        return found

    def _eos(self) -> tuple[int, ...]:
        """Every id that ends a text: generation_config.json, config.json and the tokenizer's own."""
        ids: list[int] = []
        for name in ("generation_config.json", "config.json"):
            value = read_json(self.path / name, missing={}).get("eos_token_id")
            ids += value if isinstance(value, list) else [value] if isinstance(value, int) else []
        own = self._id("eos_token")
        if own is not None:
            ids.insert(0, own)
        return tuple(dict.fromkeys(i for i in ids if isinstance(i, int)))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; special: with what the tokenizer puts around one (BOS, CLS...)."""
        found: list[int] = self._backend.encode(text, add_special_tokens=special).ids
        return found

    def encode_many(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """`encode` of each text."""
        if len(texts) < 8:  # starting the library's threads costs more than they win
            return [self.encode(t, special) for t in texts]
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=special)]

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Text of token ids; special: keep special tokens in it."""
        found: str = self._backend.decode(list(map(int, ids)), skip_special_tokens=not special)
        return found

    def token(self, index: int) -> str | None:
        """The vocabulary entry of an id."""
        found: str | None = self._backend.id_to_token(index)
        return found

    def chat(self, messages: Sequence[Mapping[str, Any]], generate: bool = True) -> str | None:
        """The conversation as the model wants to read it, or None where it has no chat template.

        messages: `{"role": ..., "content": ...}`; generate: end with the opening of the assistant's turn.
        The text holds its special tokens: encode it with `special=False`.
        """
        if self.template is None:
            return None
        from jinja2 import TemplateError

        try:
            made: str = (
                _environment()
                .from_string(self.template)
                .render(
                    messages=[dict(m) for m in messages],
                    add_generation_prompt=generate,
                    tools=None,
                    **self.special,
                )
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ArtifactError(f"the chat template of `{self.path}` fails: {error}") from None
        return made


def _environment() -> Any:  # noqa: ANN401 - jinja2 is imported late
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _content(value: object) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template(path: Path, config: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    value = config.get("chat_template")
    if isinstance(value, list):  # several by name
        named = {e.get("name"): e.get("template") for e in value if isinstance(e, Mapping)}
        value = named.get("default")
    return value if isinstance(value, str) else None


def read_json(file: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object from a file; `missing` stands for a file that does not exist. Raises ArtifactError."""
    if not file.is_file():
        if missing is not None:
            return dict(missing)
        raise ArtifactError(f"`{file}` does not exist")
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"`{file}` is not readable: {error}") from None
    if not isinstance(loaded, dict):
        raise ArtifactError(f"`{file}` holds no JSON object")
    return loaded
