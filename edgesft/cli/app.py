"""The application object and what every command shares: option types, and how a stage is run and shown."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from edgesft.core import console
from edgesft.core.errors import UsageError

app = typer.Typer(
    name="edgesft",
    help="From a pretrained model to a verified, profiled and gated edge artefact.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Hub id, local folder, .gguf file, or demo:NAME.", show_default=False
    ),
]
Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA", help="JSONL, CSV or Parquet file, hub data set id, or demo:NAME.", show_default=False
    ),
]
Exported = Annotated[
    Path, typer.Argument(metavar="EXPORTED", help="Folder written by `export`.", show_default=False)
]
Either = Annotated[
    str,
    typer.Argument(
        metavar="MODEL_OR_EXPORTED", help="A model, or a folder written by `export`.", show_default=False
    ),
]
Subject = Annotated[
    str,
    typer.Argument(
        metavar="ARTEFACT",
        help="Folder written by `export`, a model, or any .onnx file.",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where to run: ssh://[user@]host[:port], or a fleet's .toml file.", show_default="this machine"
    ),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="INPUT=N,N,...", help="Shape of a foreign graph's input: x=1,3,224,224.", show_default=False
    ),
]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="Folder to write; whole or not at all.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")]
Threads = Annotated[int, typer.Option(min=0, max=1024, help="CPU threads; 0 = one a physical core.")]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of everything drawn at random.")]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a recipe value: select.density=0.1", show_default=False
    ),
]
Template = Annotated[
    str | None, typer.Option(help="Prompt of a labelled row, with {column} fields.", show_default=False)
]
LabelWords = Annotated[
    list[str] | None,
    typer.Option(
        "--label-word", metavar="LABEL=WORD", help="Word that answers for a label.", show_default=False
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--map", metavar="ROLE=COLUMN", help="Column of a role: text=sentence", show_default=False),
]
Format = Annotated[str, typer.Option("--format", help="auto, text, classify, prompt or messages.")]
SkipBad = Annotated[int, typer.Option(min=0, help="Malformed lines to tolerate.")]


def data_options(
    template: str | None,
    words: list[str] | None,
    columns: list[str] | None,
    form: str,
    skip_bad: int,
    max_length: int | None = None,
) -> Any:  # noqa: ANN401 - core.data.DataOptions, not imported at start-up
    from edgesft.core.data import DataOptions
    from edgesft.core.params import validate

    given: dict[str, Any] = {
        "template": template,
        "label_words": pairs(words, "--label-word"),
        "columns": pairs(columns, "--map"),
        "format": form,
        "skip_bad": skip_bad,
    }
    if max_length is not None:
        given["max_length"] = max_length
    return validate(DataOptions, given, "data")


def given(**values: object) -> dict[str, Any]:
    """The options that were given on the command line."""
    return {name: value for name, value in values.items() if value is not None}


def use_threads(count: int) -> None:
    """Tell numeric libraries how many threads they get, before they are imported.

    Ranks that torchrun has started on one machine share its cores.
    """
    from edgesft.core import threads

    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)
    found = threads.resolve(count)
    os.environ["OMP_NUM_THREADS"] = str(found if count else max(1, found // max(1, sharing)))


def pairs(items: list[str] | None, option: str) -> dict[str, str]:
    pairs = {}
    for item in items or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UsageError(f"`{option} {item}` is not of the form KEY=VALUE")
        pairs[key] = value
    return pairs


def write(
    stage: Any,  # noqa: ANN401 - a core.stage.Stage
    inputs: Mapping[str, Any],
    out: Path,
    *,
    json: bool,
    dry_run: bool,
    show: Callable[[Mapping[str, Any]], None] | None = None,
    run: Callable[[Any, Mapping[str, Any], Path], tuple[Any, bool]] | None = None,
) -> Any:  # noqa: ANN401 - core.artifact.Artifact
    """Run a writing stage and print its metrics. run: instead of `core.stage.execute`; it may give no
    artefact, where another process writes it."""
    from edgesft.core import stage as stages

    if dry_run:
        plan = stages.plan(stage, inputs, out)
        console.data_json(plan) if json else console.facts(plan)
        return None
    made, ran = (run or stages.execute)(stage, inputs, out)
    if made is None:
        return None
    result = {"kind": made.kind, "out": str(out), "digest": made.digest, "ran": ran, **made.metrics}
    if json:
        console.data_json(result)
    else:
        console.say(f"wrote `{out}`" if ran else f"up to date: `{out}`")
        (show or console.facts)(made.metrics)
    return made


def numbers(text: str | None, option: str, kind: type[int] | type[float] = int) -> tuple[float, ...] | None:
    """`1,2,4` as numbers; `0` is none at all. Raises UsageError."""
    if text is None:
        return None
    try:
        found = tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"`{option} {text}` is not a list of numbers such as `1,2,4`") from None
    return () if found == (0,) else found


def sizes(items: list[str] | None) -> dict[str, tuple[float, ...]] | None:
    """`--shape x=1,3,224,224`, repeated. Raises UsageError."""
    if items is None:
        return None
    return {name: numbers(text, f"--shape {name}=") or () for name, text in pairs(items, "--shape").items()}
