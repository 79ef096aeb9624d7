"""Commands that make something: tune, merge, sparsify, export, run a whole recipe, generate."""

from pathlib import Path
from typing import Annotated, Any

import typer

from edgesft.cli.app import (
    Columns,
    Data,
    DryRun,
    Either,
    Format,
    Json,
    LabelWords,
    Model,
    Out,
    SeedOption,
    Sets,
    SkipBad,
    Template,
    Threads,
    app,
    data_options,
    given,
    use_threads,
    write,
)
from edgesft.core import console
from edgesft.core.errors import UsageError


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
    base: Annotated[
        str | None, typer.Option(help="Weights in memory: fp32, bf16, int8 or int4.", metavar="TYPE")
    ] = None,
    compute: Annotated[
        str | None, typer.Option(help="Matrix products: native, bf16 or int8.", metavar="TYPE")
    ] = None,
    offload: Annotated[
        Path | None, typer.Option(help="Folder for the layers of a model larger than memory.")
    ] = None,
    find_lr: Annotated[bool, typer.Option("--find-lr", help="Look for a learning rate first.")] = False,
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
    from edgesft.stages.tuning import together

    if zo and recipe is not None:
        raise UsageError("`--zo` and `--recipe` exclude each other: `--zo` is `--recipe sparse-mezo`")
    chosen = recipes.load("sparse-mezo" if zo else recipe or "lora")
    chosen = recipes.override(chosen, sets or [], "tune")
    options = data_options(template, label_word, columns, form, skip_bad)
    table = given(steps=steps, seed=seed, base=base, compute=compute, lr="auto" if find_lr else None)
    table |= given(offload=None if offload is None else str(offload))
    stage = Tune.from_recipe(chosen.table("tune") | table, options)
    inputs = {"model": models.resolve(model, "model", "onnx"), "data": data_module.resolve(data, options)}
    use_threads(threads)
    write(stage, inputs, out, json=json, dry_run=dry_run, run=together.execute)


@app.command(rich_help_panel="Stages")
def merge(
    model: Model,
    deltas: Annotated[list[Path], typer.Argument(metavar="DELTA...", help="Deltas or PEFT LoRA adapters.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write.")] = None,
    in_place: Annotated[
        bool, typer.Option("--in-place", help="Update MODEL, an export made with --tunable, by a trajectory.")
    ] = False,
    allow_other_base: Annotated[
        bool, typer.Option(help="Merge though the delta was made on another model.")
    ] = False,
    step: Annotated[
        str, typer.Option(help="Of a trajectory: `last`, `best` (dev loss), or a number of steps.")
    ] = "last",
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Write deltas into MODEL: an ordinary Hugging Face folder.

    Example: edgesft merge demo:smollm2-135m out/delta -o out/merged
    """
    from edgesft.core import models
    from edgesft.core.tuning import delta_file
    from edgesft.stages.merge import Merge

    if in_place == (out is not None):
        raise UsageError("`merge` takes either `-o OUT`, a new folder, or `--in-place`, to change an export")
    if out is None:
        _update(model, deltas, _step(step), json=json)
        return
    inputs = {"model": models.resolve(model)}
    inputs |= {f"delta-{i}": delta_file.resolve(str(path)) for i, path in enumerate(deltas)}
    stage = Merge(allow_other_base=allow_other_base, step=_step(step))
    write(stage, inputs, out, json=json, dry_run=dry_run)


def _step(text: str) -> Any:  # noqa: ANN401 - int, "best" or "last"
    if text not in ("last", "best") and not text.isdecimal():
        raise UsageError(f"`--step` is `{text}`, expected `last`, `best` or a number of steps")
    return int(text) if text.isdecimal() else text


def _update(exported: str, deltas: list[Path], step: Any, *, json: bool) -> None:  # noqa: ANN401
    """Replay a trajectory on an exported artefact, in place."""
    from edgesft.stages import update

    if len(deltas) != 1:
        raise UsageError(f"an export takes one trajectory at a time, got {len(deltas)}")
    result = update.update(exported, deltas[0], step)
    console.data_json(result) if json else console.facts(result)


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
    options = data_options(None, None, columns, form, skip_bad)
    more = given(samples=samples, length=length, seed=seed, threads=threads, data_options=options)
    stage = Sparsify.from_recipe(table | more)
    use_threads(threads)
    inputs = {"model": models.resolve(model)}
    if data is not None:
        inputs["data"] = data_module.resolve(data, options)
    write(stage, inputs, out, json=json, dry_run=dry_run)


@app.command(rich_help_panel="Stages")
def convert(
    model: Model,
    out: Out,
    to: Annotated[str, typer.Option(help="nm-packed, compressed-tensors or dense.", show_default=False)],
    value: Annotated[
        str | None,
        typer.Option(help="nm-packed weights: int4, int8, fp16 or bf16.", show_default="int4"),
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(help="Inputs that share a scale: 32, 64, 128 or 256.", show_default="64"),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(metavar="N:M", help="Insist on it.", show_default="found for each matrix"),
    ] = None,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Store the weights of MODEL in another way: packed (docs/format.md), 2:4 compressed, or plain.

    Example: edgesft convert out/sparse --to nm-packed --value int4 -o out/packed
    """
    from edgesft.core import models
    from edgesft.stages.convert import Convert

    stage = Convert.from_options({"to": to, **given(value=value, group=group, pattern=pattern)})
    write(stage, {"model": models.resolve(model)}, out, json=json, dry_run=dry_run)


@app.command(rich_help_panel="Stages")
def export(
    model: Model,
    out: Out,
    target: Annotated[str, typer.Option(help="onnx (tensorrt is not in this version).")] = "onnx",
    quantize: Annotated[str, typer.Option(help="none, int8 or int4.")] = "none",
    sparse: Annotated[
        str | None,
        typer.Option(
            help="2:4 layers packed: auto (where faster here), always or never.", show_default="auto"
        ),
    ] = None,
    tunable: Annotated[
        bool, typer.Option("--tunable", help="With weights that `tune` can change on the device.")
    ] = False,
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

    asked = {"target": target, "quantize": quantize, "tunable": tunable, **given(sparse=sparse)}
    base = recipes.Recipe("export", "", {"export": asked})
    stage = validate(Export, recipes.override(base, sets or [], "export").table("export"), "export")
    write(stage, {"model": models.resolve(model)}, out, json=json, dry_run=dry_run)


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

    use_threads(threads)
    chosen = recipes.override(recipes.load(recipe), sets or [])
    options = data_options(template, label_word, columns, form, skip_bad)
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

    use_threads(threads)
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
