"""The commands: parse, call one stage, print. No logic, and nothing heavy is imported before it is needed."""

import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from edgesft import __version__
from edgesft.core import console
from edgesft.core.errors import EdgeSFTError, UsageError

app = typer.Typer(
    name="edgesft",
    help="From a pretrained model to a verified, profiled and gated edge artefact.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
methods_app = typer.Typer(help="List the methods of every axis, or show one.", rich_markup_mode=None)
recipes_app = typer.Typer(help="List the recipes, or show one.", rich_markup_mode=None)
app.add_typer(methods_app, name="methods", rich_help_panel="Look")
app.add_typer(recipes_app, name="recipes", rich_help_panel="Look")

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


def _data_options(
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
        "label_words": _pairs(words, "--label-word"),
        "columns": _pairs(columns, "--map"),
        "format": form,
        "skip_bad": skip_bad,
    }
    if max_length is not None:
        given["max_length"] = max_length
    return validate(DataOptions, given, "data")


def _given(**values: object) -> dict[str, Any]:
    """The options that were given on the command line."""
    return {name: value for name, value in values.items() if value is not None}


def _use_threads(count: int) -> None:
    """Tell numeric libraries how many threads they get, before they are imported."""
    from edgesft.core import threads

    os.environ["OMP_NUM_THREADS"] = str(threads.resolve(count))


def _pairs(items: list[str] | None, option: str) -> dict[str, str]:
    pairs = {}
    for item in items or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UsageError(f"`{option} {item}` is not of the form KEY=VALUE")
        pairs[key] = value
    return pairs


def _write(
    stage: Any,  # noqa: ANN401 - a core.stage.Stage
    inputs: Mapping[str, Any],
    out: Path,
    *,
    json: bool,
    dry_run: bool,
    show: Callable[[Mapping[str, Any]], None] | None = None,
) -> Any:  # noqa: ANN401 - core.artifact.Artifact
    """Run a writing stage and print its metrics."""
    from edgesft.core import stage as stages

    if dry_run:
        plan = stages.plan(stage, inputs, out)
        console.data_json(plan) if json else console.facts(plan)
        return None
    made, ran = stages.execute(stage, inputs, out)
    result = {"kind": made.kind, "out": str(out), "digest": made.digest, "ran": ran, **made.metrics}
    if json:
        console.data_json(result)
    else:
        console.say(f"wrote `{out}`" if ran else f"up to date: `{out}`")
        (show or console.facts)(made.metrics)
    return made


@app.command(rich_help_panel="Stages")
def tune(
    model: Model,
    data: Data,
    out: Out,
    zo: Annotated[bool, typer.Option("--zo", help="Short for --recipe sparse-mezo: no gradients.")] = False,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe name or .toml file; `lora` if none is named.")
    ] = None,
    sets: Sets = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.")] = None,
    seed: SeedOption = None,
    threads: Threads = 0,
    template: Template = None,
    label_word: LabelWords = None,
    columns: Columns = None,
    form: Format = "auto",
    skip_bad: SkipBad = 0,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Fine-tune MODEL on DATA into a delta.

    Example: edgesft tune demo:smollm2-135m demo:sst2 --zo --steps 200 -o out/delta
    """
    from edgesft.core import data as data_module
    from edgesft.core import models
    from edgesft.core import recipe as recipes
    from edgesft.stages.tune import Tune

    if zo and recipe is not None:
        raise UsageError("`--zo` and `--recipe` exclude each other: `--zo` is `--recipe sparse-mezo`")
    chosen = recipes.load("sparse-mezo" if zo else recipe or "lora")
    chosen = recipes.override(chosen, sets or [], "tune")
    options = _data_options(template, label_word, columns, form, skip_bad)
    stage = Tune.from_recipe(chosen.table("tune") | _given(steps=steps, seed=seed), options)
    _use_threads(threads)
    inputs = {"model": models.resolve(model), "data": data_module.resolve(data, options)}
    _write(stage, inputs, out, json=json, dry_run=dry_run)


@app.command(rich_help_panel="Stages")
def merge(
    model: Model,
    deltas: Annotated[list[Path], typer.Argument(metavar="DELTA...", help="Deltas or PEFT LoRA adapters.")],
    out: Out,
    allow_other_base: Annotated[
        bool, typer.Option(help="Merge though the delta was made on another model.")
    ] = False,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Write deltas into MODEL: an ordinary Hugging Face folder.

    Example: edgesft merge demo:smollm2-135m out/delta -o out/merged
    """
    from edgesft.core import delta_file, models
    from edgesft.stages.merge import Merge

    inputs = {"model": models.resolve(model)}
    inputs |= {f"delta-{i}": delta_file.resolve(str(path)) for i, path in enumerate(deltas)}
    _write(Merge(allow_other_base=allow_other_base), inputs, out, json=json, dry_run=dry_run)


@app.command(rich_help_panel="Stages")
def sparsify(
    model: Model,
    out: Out,
    data: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="Calibration text; magnitude needs none.")
    ] = None,
    pattern: Annotated[str, typer.Option(metavar="N:M", help="N kept of every M.")] = "2:4",
    method: Annotated[str, typer.Option(help="magnitude, wanda or sparsegpt.")] = "wanda",
    samples: Annotated[int | None, typer.Option(min=1, help="Calibration sequences.")] = None,
    length: Annotated[int | None, typer.Option(min=8, help="Tokens a calibration sequence.")] = None,
    sets: Sets = None,
    seed: SeedOption = None,
    threads: Threads = 0,
    columns: Columns = None,
    form: Format = "auto",
    skip_bad: SkipBad = 0,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Prune MODEL to an N:M pattern in one shot.

    Example: edgesft sparsify out/merged demo:boolq --pattern 2:4 --method wanda -o out/sparse
    """
    from edgesft.core import data as data_module
    from edgesft.core import models
    from edgesft.core import recipe as recipes
    from edgesft.stages.sparsify import Sparsify

    base = recipes.Recipe("sparsify", "", {"sparsify": {"pattern": pattern, "compress": {"use": method}}})
    table = recipes.override(base, sets or [], "sparsify").table("sparsify")
    options = _data_options(None, None, columns, form, skip_bad)
    given = _given(samples=samples, length=length, seed=seed, threads=threads, data_options=options)
    stage = Sparsify.from_recipe(table | given)
    _use_threads(threads)
    inputs = {"model": models.resolve(model)}
    if data is not None:
        inputs["data"] = data_module.resolve(data, options)
    _write(stage, inputs, out, json=json, dry_run=dry_run)


@app.command(rich_help_panel="Stages")
def export(
    model: Model,
    out: Out,
    target: Annotated[str, typer.Option(help="onnx (tensorrt is not in this version).")] = "onnx",
    quantize: Annotated[str, typer.Option(help="none, int8 or int4.")] = "none",
    sets: Sets = None,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Export MODEL with a KV cache for a runtime.

    Example: edgesft export out/sparse --target onnx --quantize int4 -o out/exported
    """
    from edgesft.core import models
    from edgesft.core import recipe as recipes
    from edgesft.core.params import validate
    from edgesft.stages.export import Export

    base = recipes.Recipe("export", "", {"export": {"target": target, "quantize": quantize}})
    stage = validate(Export, recipes.override(base, sets or [], "export").table("export"), "export")
    _write(stage, {"model": models.resolve(model)}, out, json=json, dry_run=dry_run)


@app.command(rich_help_panel="Judge")
def verify(
    exported: Exported,
    against: Annotated[str, typer.Option(metavar="MODEL", help="The model that was exported.")],
    tokens: Annotated[int, typer.Option(min=1, max=4096, help="Greedy tokens to compare.")] = 16,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Compare an export with torch, number by number.

    Prefill, decode and greedy tokens; exit 1 names the first layer that departs.

    Example: edgesft verify out/exported --against out/sparse
    """
    from edgesft.core import artifact, models
    from edgesft.stages import verify as verification

    _use_threads(threads)
    report = verification.verify(
        artifact.read(exported, "onnx"), models.resolve(against), tokens=tokens, threads=threads
    )
    console.data_json(report) if json else console.facts(verification.brief(report))
    verification.judge(report)


@app.command("eval", rich_help_panel="Judge")
def evaluate(
    model: Either,
    data: Data,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Examples at most.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=4096)] = 16,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Keep the result in a folder.")] = None,
    threads: Threads = 0,
    template: Template = None,
    label_word: LabelWords = None,
    columns: Columns = None,
    form: Format = "auto",
    skip_bad: SkipBad = 0,
    predictions: Annotated[bool, typer.Option(help="With --json: every prediction too.")] = False,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Accuracy, loss and perplexity on a data set.

    With 95 % intervals; classification is scored over the label words.

    Example: edgesft eval out/exported demo:sst2 --json
    """
    from edgesft.core import data as data_module
    from edgesft.stages import evaluate as evaluation

    options = _data_options(template, label_word, columns, form, skip_bad)
    stage = evaluation.Evaluate.from_recipe(
        _given(split=split, limit=limit, batch_size=batch_size, threads=threads, data_options=options)
    )
    _use_threads(threads)
    inputs = {"model": evaluation.resolve(model), "data": data_module.resolve(data, options)}
    if out is not None:
        _write(stage, inputs, out, json=json, dry_run=dry_run)
        return
    result = stage.measure(inputs)
    shown = {k: v for k, v in result.items() if predictions or k not in ("predictions", "gold")}
    console.data_json(shown) if json else console.facts(
        {k: v for k, v in shown.items() if k not in ("predictions", "gold")}
    )


@app.command(rich_help_panel="Use")
def generate(
    model: Either,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, max=1_000_000)] = 64,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the model's chat template.")] = False,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Greedy text from a model or an export, with its speed.

    Example: edgesft generate out/exported --prompt "The capital of France is"
    """
    from edgesft.core import models
    from edgesft.stages import generate as generation

    _use_threads(threads)
    found = models.resolve(model, "model", "onnx")
    result = generation.generate(
        found.path, prompt, max_new_tokens=max_new_tokens, chat=chat, threads=threads
    )
    if json:
        console.data_json(result)
        return
    console.data(prompt + result["text"])
    console.say(
        f"\n{result['new_tokens']} tokens, first after {console.plain(result['ttft_ms'])} ms,"
        f" then {console.plain(result['decode_tokens_per_second'])} tokens/s"
    )


@app.command(rich_help_panel="Judge")
def profile(
    exported: Either,
    out: Out,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt.")] = None,
    decode_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens decoded after each.")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Prompts a process.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Fresh processes.")] = None,
    seed: SeedOption = None,
    threads: Threads = 0,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Latency, memory and load time on this machine.

    Every raw sample is kept; a percentile is given only when there are enough of them.

    Example: edgesft profile out/exported -o out/profile
    """
    from edgesft.stages import profile as profiling

    stage = profiling.Profile.from_recipe(
        _given(
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            prompts=prompts,
            processes=processes,
            seed=seed,
            threads=threads,
        )
    )
    inputs = {"exported": profiling.resolve(exported)}
    if dry_run:
        _write(stage, inputs, out, json=json, dry_run=True)
        return
    made = _write(stage, inputs, out, json=False, dry_run=False, show=lambda metrics: None)
    console.data_json(profiling.load(made)) if json else console.facts(profiling.brief(made.metrics))


@app.command(rich_help_panel="Judge")
def gate(
    base: Annotated[Path, typer.Option(help="The artefact to compare with.")],
    head: Annotated[Path, typer.Option(help="The artefact on trial.")],
    metric: Annotated[str, typer.Option(help="tpot or ttft.")] = "tpot",
    max_pairs: Annotated[int | None, typer.Option(min=8, max=48, help="Pairs of processes at most.")] = None,
    margin: Annotated[float | None, typer.Option(help="Slowdown in percent that must not pass.")] = None,
    inconclusive: Annotated[
        str, typer.Option(help="What exit code an open verdict gives: report, pass or fail.")
    ] = "report",
    drill_slowdown: Annotated[
        float, typer.Option(min=0, max=1000, help="Slow the head by this percent, to see the gate fire here.")
    ] = 0.0,
    check_memory: Annotated[bool, typer.Option(help="Fail when peak memory grew by more than 2 %.")] = False,
    check_size: Annotated[bool, typer.Option(help="Fail when the artefact grew by more than 2 %.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Keep verdict and raw pairs; resumable.")
    ] = None,
    seed: SeedOption = None,
    threads: Threads = 0,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Is head slower than base? A verdict for CI.

    Exit 0 pass, 10 regression, 11 inconclusive, 12 not comparable, 13 nothing measured, 14 device lost.

    Example: edgesft gate --base out/main --head out/change
    """
    from edgesft.stages import gate as gating
    from edgesft.stages.verdict import describe, judge

    given = _given(
        metric=metric,
        max_pairs=max_pairs,
        margin_percent=margin,
        inconclusive=inconclusive,
        drill_slowdown=drill_slowdown,
        check_memory=check_memory,
        check_size=check_size,
        seed=seed,
        threads=threads,
    )
    if dry_run:
        sides = {"base": gating.resolve(base), "head": gating.resolve(head)}
        _write(gating.Gate.from_recipe(given), sides, out or Path("-"), json=json, dry_run=True)
        return
    report = gating.gate(base, head, out=out, **given)
    if json:
        console.data_json(report)
    elif report["verdict"] == "pass":
        console.data(describe(report))
    judge(report)


@app.command(rich_help_panel="Stages")
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe name or .toml file.")],
    model: Model,
    data: Data,
    out: Out,
    sets: Sets = None,
    seed: SeedOption = None,
    threads: Threads = 0,
    template: Template = None,
    label_word: LabelWords = None,
    columns: Columns = None,
    form: Format = "auto",
    skip_bad: SkipBad = 0,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """All stages of a recipe. Killed, the same command goes on; complete, it does nothing.

    Example: edgesft run quickstart demo:smollm2-135m demo:sst2 -o out/quickstart
    """
    from edgesft.core import data as data_module
    from edgesft.core import models
    from edgesft.core import recipe as recipes
    from edgesft.stages import pipeline, report

    _use_threads(threads)
    chosen = recipes.override(recipes.load(recipe), sets or [])
    options = _data_options(template, label_word, columns, form, skip_bad)
    chain = pipeline.plan(chosen, data_options=options, threads=threads, seed=seed)
    inputs = {"model": models.resolve(model), "data": data_module.resolve(data, options)}
    if dry_run:
        planned = pipeline.preview(chain, inputs, out)
        console.data_json(planned) if json else console.facts(planned)
        return
    summary = pipeline.run(chain, inputs, chosen, out)
    if json:
        console.data_json(summary)
    else:
        console.table(report.COLUMNS, report.rows(summary))
        console.say(f"\n{report.verdict_line(summary)}")
        state = "complete" if summary["ran"] else "already complete, nothing was done"
        console.say(f"{state}: `{out}`; report: `{out / pipeline.REPORT}`")
    pipeline.judge(summary)


@methods_app.callback(invoke_without_command=True)
def methods(
    context: typer.Context,
    axis: Annotated[str | None, typer.Option(help="One axis only.")] = None,
    json: Json = False,
) -> None:
    """List the methods of every axis, or show one.

    Example: edgesft methods show select:small-magnitude
    """
    if context.invoked_subcommand is not None:
        return
    from edgesft.core import catalog

    found = list(catalog.entries(axis))
    if json:
        console.data_json([{"axis": e.axis, "name": e.name, "summary": e.summary} for e in found])
    else:
        console.table(("method", "what it does"), [(e.title, e.summary) for e in found], left=True)


@methods_app.command("show")
def methods_show(
    name: Annotated[str, typer.Argument(metavar="AXIS:NAME", help="As `edgesft methods` lists it.")],
    json: Json = False,
) -> None:
    """Documentation and parameters of one method.

    Example: edgesft methods show select:small-magnitude
    """
    from edgesft.core import catalog

    axis, found = catalog.split(name)
    record = {
        "axis": axis,
        "name": found,
        "documentation": catalog.document(axis, found),
        "parameters": catalog.fields(axis, found),
    }
    console.data_json(record) if json else console.data(catalog.page(axis, found))


@recipes_app.callback(invoke_without_command=True)
def recipes_list(context: typer.Context, json: Json = False) -> None:
    """List the recipes, or show one.

    Example: edgesft recipes show sparse-mezo
    """
    if context.invoked_subcommand is not None:
        return
    from edgesft.core import recipe as recipes

    found = [recipes.load(name) for name in recipes.names()]
    if json:
        console.data_json([{"name": r.name, "summary": r.summary} for r in found])
    else:
        console.table(("recipe", "what it does"), [(r.name, r.summary) for r in found], left=True)


@recipes_app.command("show")
def recipes_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `edgesft recipes` lists it, or a file.")],
    json: Json = False,
) -> None:
    """The tables of one recipe.

    Example: edgesft recipes show sparse-mezo
    """
    from edgesft.core import recipe as recipes

    found = recipes.load(name)
    if json:
        console.data_json({"name": found.name, "summary": found.summary, "tables": found.tables})
    else:
        console.data(recipes.text(name))


@app.command(rich_help_panel="Look")
def devices(json: Json = False) -> None:
    """This machine, and the devices that EdgeSFT knows.

    Example: edgesft devices --json
    """
    from edgesft.core import catalog

    host = catalog.runtime("devices.host")
    record = host.overview()
    if json:
        console.data_json(record)
    else:
        console.facts(record["host"])
        console.table(record["columns"], record["rows"])


@app.command(rich_help_panel="Look")
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Any folder written by EdgeSFT.")],
    json: Json = False,
) -> None:
    """What an artefact is and what it came from.

    Its files are compared with their hashes.

    Example: edgesft inspect out/delta
    """
    from edgesft.stages.inspection import inspect as examine

    record = examine(directory)
    console.data_json(record) if json else console.facts(record)


@app.command(rich_help_panel="Look")
def doctor(json: Json = False) -> None:
    """What works on this machine, and what to install for the rest.

    Example: edgesft doctor --json
    """
    from edgesft.stages import doctor as diagnosis

    record = diagnosis.examine()
    if json:
        console.data_json(record)
    else:
        console.facts(diagnosis.brief(record))
        console.table(
            ("package", "wanted", "here", ""),
            [
                (p["name"], p["requirement"], p["version"], "ok" if p["ok"] else "missing")
                for p in record["packages"]
            ],
            left=True,
        )
        for hint in record["hints"]:
            console.say(f"hint: {hint}")


@app.command(rich_help_panel="Look")
def docs(out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the pages.")]) -> None:
    """Write a page for every method, from the method itself.

    Example: edgesft docs -o docs/methods
    """
    from edgesft.core import catalog

    out.mkdir(parents=True, exist_ok=True)
    for entry in catalog.entries():
        page = out / f"{entry.axis}-{entry.name}.md"
        page.write_text(catalog.page(entry.axis, entry.name), encoding="utf-8")
    console.say(f"wrote `{out}`")


def _version(wanted: bool) -> None:
    if wanted:
        console.data(f"edgesft {__version__}")
        raise typer.Exit


@app.callback()
def root(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more; show traces of bugs.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """From a pretrained model to a verified, profiled and gated edge artefact."""
    if verbose:
        import logging

        os.environ["EDGESFT_VERBOSE"] = "1"
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")


def main() -> None:
    """Entry point: maps every outcome to its exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except EdgeSFTError as error:
        console.error(error.message, error.hint)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.error("interrupted", "the same command goes on where it stopped")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except Exception as error:
        sys.exit(_unexpected(error))


def _terminate(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _unexpected(error: Exception) -> int:
    """Click's own errors keep their code 2; anything else is a bug: short message, full trace in a file."""
    show = getattr(error, "format_message", None)
    if show is not None:  # click.ClickException and its kin
        console.error(show(), "edgesft --help")
        return int(getattr(error, "exit_code", 2))
    if type(error).__name__ == "Abort":
        console.error("interrupted")
        return 130
    trace = "".join(traceback.format_exception(error))
    if os.environ.get("EDGESFT_VERBOSE"):
        console.say(trace)
    with tempfile.NamedTemporaryFile("w", prefix="edgesft-bug-", suffix=".txt", delete=False) as file:
        file.write(trace)
    console.error(
        f"this is a bug in EdgeSFT: {type(error).__name__}: {error}", f"the full trace is in `{file.name}`"
    )
    return 70


if __name__ == "__main__":
    main()
