"""Commands that judge: verify, eval, profile, gate."""

from pathlib import Path
from typing import Annotated

import typer

from edgesft.cli.app import (
    Columns,
    Data,
    DryRun,
    Either,
    Exported,
    Format,
    Json,
    LabelWords,
    Out,
    SeedOption,
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

    use_threads(threads)
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

    options = data_options(template, label_word, columns, form, skip_bad)
    stage = evaluation.Evaluate.from_recipe(
        given(split=split, limit=limit, batch_size=batch_size, threads=threads, data_options=options)
    )
    use_threads(threads)
    inputs = {"model": evaluation.resolve(model), "data": data_module.resolve(data, options)}
    if out is not None:
        write(stage, inputs, out, json=json, dry_run=dry_run)
        return
    result = stage.measure(inputs)
    shown = {k: v for k, v in result.items() if predictions or k not in ("predictions", "gold")}
    console.data_json(shown) if json else console.facts(
        {k: v for k, v in shown.items() if k not in ("predictions", "gold")}
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
        given(
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
        write(stage, inputs, out, json=json, dry_run=True)
        return
    made = write(stage, inputs, out, json=False, dry_run=False, show=lambda metrics: None)
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

    options = given(
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
        write(gating.Gate.from_recipe(options), sides, out or Path("-"), json=json, dry_run=True)
        return
    report = gating.gate(base, head, out=out, **options)
    if json:
        console.data_json(report)
    elif report["verdict"] == "pass":
        console.data(describe(report))
    judge(report)
