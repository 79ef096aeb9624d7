"""How a row becomes an example: which columns speak, templates, label words.

Classification is prompted: a template turns the row into a text that ends where a label word answers, as
in MeZO (2023).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field

from edgesft.core.data.sources import BadRow, Row
from edgesft.core.errors import ArtifactError, UsageError, nearest
from edgesft.core.params import Length, Seed

if TYPE_CHECKING:
    from edgesft.core.demo import Task

Fraction = Annotated[float, Field(ge=0, lt=1)]
Format: TypeAlias = Literal["text", "classify", "prompt", "messages"]
ROLES = ("text", "label", "prompt", "completion", "messages")
FIELD = re.compile(r"\{(\w+)\}")
TEMPLATE_HINT = (
    '--template "{text} It was" --label-word 0=terrible --label-word 1=great, or --format text to ignore it'
)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How a data set is read; JSON values only, so that it can stand in a stage's params."""

    format: Annotated[
        Literal["auto", "text", "classify", "prompt", "messages", "calibration"],
        Field(description="what the columns mean; auto: as the first row shows; calibration: texts only"),
    ] = "auto"
    template: Annotated[
        str | None, Field(description="text with {column} fields that ends where a label word answers")
    ] = None
    label_words: Annotated[
        Mapping[str, str], Field(description="label value -> the words that answer for it")
    ] = field(default_factory=dict)
    columns: Annotated[
        Mapping[str, str], Field(description="role (text, label, prompt, completion, messages) -> column")
    ] = field(default_factory=dict)
    files: Annotated[
        str | None, Field(description="glob of the Parquet files of a folder or hub data set")
    ] = None
    skip_bad: Annotated[int, Field(ge=0, description="bad rows to leave out")] = 0
    max_length: Length = 512
    split_seed: Seed = 0
    dev: Annotated[Fraction, Field(description="fraction of the rows in the dev split")] = 0.15
    test: Annotated[Fraction, Field(description="fraction of the rows in the test split")] = 0.25


@dataclass(frozen=True)
class Example:
    """What one row asks of a model.

    prompt: text before the answer, empty for plain text. candidates: the answers to choose from; a single
    one where there is nothing to choose. gold: number of the right one. messages: (role, content) of a
    conversation, whose assistant turns are the answers; then `candidates` is empty.
    """

    prompt: str
    candidates: tuple[str, ...]
    gold: int = 0
    messages: tuple[tuple[str, str], ...] = ()


class Reader:
    """Rows to examples, in the format asked for or the one that the first good row shows.

    Raises UsageError for options that contradict each other.
    """

    def __init__(self, options: DataOptions, task: "Task | None" = None) -> None:
        self._columns, self._words = options.columns, options.label_words
        self._template = options.template
        unknown = [role for role in self._columns if role not in ROLES]
        if unknown and self._template is None:
            raise UsageError(f"there is no role `{unknown[0]}` to map", nearest(unknown[0], ROLES))
        free = options.format in ("auto", "calibration")
        self._labels = options.format == "auto"
        self._task = task if self._template is None and free else None
        self.format: Format | None = None
        self.used: list[str] | None = None  # columns that are read; None: all
        self._read: Callable[[Row], Example] | None = None
        if self._task is not None:
            self._use_task(self._task)
        elif options.format != "auto" and options.format != "calibration":
            self._use(options.format)
        elif self._template is not None:
            self._use("classify")

    def __call__(self, row: Row) -> Example:
        """The example of a row. Raises BadRow."""
        if self._read is None:
            self._use(self._detect(row))
        assert self._read is not None
        return self._read(row)

    def _column(self, role: str) -> str:
        return self._columns.get(role, role)

    def _detect(self, row: Row) -> Format:
        def has(*roles: str) -> bool:
            return all(self._column(role) in row for role in roles)

        if has("messages"):
            return "messages"
        if has("prompt", "completion"):
            return "prompt"
        if has("text", "label") and self._labels:
            return "classify"
        if has("text"):
            return "text"
        there = ", ".join(f"`{name}`" for name in list(row)[:8])
        raise BadRow(
            f"the columns are {there}; expected `messages`, `prompt` and `completion`, or `text`",
            f"--map text={next(iter(row), 'COLUMN')}",
        )

    def _use(self, form: Format) -> None:
        if form == "classify":
            self._require_template()
        readers: dict[Format, tuple[Callable[[Row], Example], tuple[str, ...]]] = {
            "text": (self._text, ("text",)),
            "prompt": (self._prompt, ("prompt", "completion")),
            "messages": (self._messages, ("messages",)),
            "classify": (self._classify, ("label",)),
        }
        if form not in readers:
            raise UsageError(f"there is no data format `{form}`", nearest(form, ("auto", *readers)))
        read, roles = readers[form]
        fields = FIELD.findall(self._template or "") if form == "classify" else []
        self.format, self._read = form, read
        self.used = list(dict.fromkeys(self._column(name) for name in (*fields, *roles)))

    def _require_template(self) -> None:
        if self._template is None:
            raise ArtifactError(
                "the data have a label but there is no template that asks for it", TEMPLATE_HINT
            )
        if not FIELD.search(self._template):
            raise UsageError(f"the template `{self._template}` has no {{column}} field")
        if len(self._words) < 2:
            raise ArtifactError(
                f"the data have a label, and {len(self._words)} of its values have a label word",
                TEMPLATE_HINT,
            )

    def _use_task(self, task: "Task") -> None:
        def classify(row: Row) -> Example:
            return Example(task.prompt(row), task.words(row), task.gold(row))

        if task.kind == "classify":
            self.format, self._read = "classify", classify
        elif task.kind == "prompt":
            self._use("prompt")
        else:
            self._columns = {"text": task.column}
            self._use("text")

    def _string(self, row: Row, role: str, empty: bool = False) -> str:
        name = self._column(role)
        if name not in row:
            there = ", ".join(f"`{key}`" for key in list(row)[:8])
            raise BadRow(f"there is no `{name}`, only {there}")
        value = row[name]
        if not isinstance(value, str):
            raise BadRow(f"`{name}` is a {type(value).__name__}, expected a text")
        if not empty and not value.strip():
            raise BadRow(f"`{name}` is empty")
        return value

    def _text(self, row: Row) -> Example:
        return Example("", (self._string(row, "text"),))

    def _prompt(self, row: Row) -> Example:
        return Example(self._string(row, "prompt", empty=True), (self._string(row, "completion"),))

    def _classify(self, row: Row) -> Example:
        template = self._template or ""
        name = self._column("label")
        if name not in row:
            raise BadRow(f"there is no `{name}`", "--map label=COLUMN")
        label = _plain(row[name])
        if label not in self._words:
            known = ", ".join(f"`{word}`" for word in self._words)
            raise BadRow(
                f"no label word for the label `{label}`, only for {known}", f"--label-word {label}=WORD"
            )

        def fill(match: re.Match[str]) -> str:
            column = self._column(match[1])
            if column not in row:
                raise BadRow(f"the template asks for `{column}`, which is not there")
            return _plain(row[column])

        prompt = FIELD.sub(fill, template)
        return _joined(prompt, tuple(self._words.values()), list(self._words).index(label))

    def _messages(self, row: Row) -> Example:
        name = self._column("messages")
        turns = row.get(name)
        if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
            raise BadRow(f"`{name}` is no list of messages")
        read = []
        for turn in turns:
            role, content = (
                (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
            )
            if not isinstance(role, str) or not isinstance(content, str):
                raise BadRow(f"a message of `{name}` lacks a `role` or a `content`")
            read.append((role, content))
        if not any(role == "assistant" for role, _ in read):
            raise BadRow(f"`{name}` has no turn of the role `assistant`")
        return Example("", (), 0, tuple(read))


def _plain(value: Any) -> str:  # noqa: ANN401 - whatever a column holds
    return value.strip() if isinstance(value, str) else str(value)


def _joined(prompt: str, answers: tuple[str, ...], gold: int) -> Example:
    """Prompt and answers with exactly one gap: a space where neither side brings white space of its own."""
    if prompt and not prompt[-1].isspace():
        answers = tuple(a if a[:1].isspace() else " " + a for a in answers)
    return Example(prompt, answers, gold)
