"""Commands that judge: verify, eval, profile, calibrate, gate."""

from pathlib import Path
from typing import Annotated

import typer

from edgesft.cli import elsewhere
from edgesft.cli.app import (
    Columns,
    Data,
    Device,
    DryRun,
    Either,
    Exported,
    Format,
    Json,
    LabelWords,
    Out,
    SeedOption,
    Shapes,
    SkipBad,
    Subject,
    Template,
    Threads,
    app,
    data_options,
    given,
    numbers,
    sizes,
    use_threads,
    write,
)
from edgesft.core import console
from edgesft.core.errors import UsageError


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
    context: typer.Context,
    exported: Subject,
    out: Out,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt.")] = None,
    decode_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens decoded after each.")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Prompts a process.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Fresh processes.")] = None,
    contexts: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Prompt lengths of the context sweep; 0: none.")
    ] = None,
    batches: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Batch sizes to sweep.", show_default=False)
    ] = None,
    thread_counts: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Thread counts to sweep.", show_default=False)
    ] = None,
    idle: Annotated[
        str | None, typer.Option(metavar="S,S,...", help="Pauses in seconds to resume from; 0: none.")
    ] = None,
    operators: Annotated[bool, typer.Option(help="A table of operators and layers.")] = True,
    roofline: Annotated[bool, typer.Option(help="Measure the machine's limits, once.")] = True,
    html: Annotated[bool, typer.Option("--html", help="Write report.html into the profile too.")] = False,
    shape: Shapes = None,
    device: Device = None,
    seed: SeedOption = None,
    threads: Threads = 0,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Latency, memory, load time, operators and energy on a device.

    Every raw sample is kept; a percentile is given only when there are enough of them.

    Example: edgesft profile out/exported -o out/profile --html
    """
    from edgesft.core import subject
    from edgesft.stages import profile as profiling
    from edgesft.stages.profiling import overview

    if device is not None and elsewhere.in_catalogue(device):
        from edgesft.core.params import validate
        from edgesft.stages import predict

        asked = validate(predict.Predict, given(device=device, prompt_tokens=prompt_tokens), "predict")
        inputs = {"subject": subject.resolve(exported)}
        write(asked, inputs, out, json=json, dry_run=dry_run, show=lambda m: console.facts(predict.facts(m)))
        return
    if device not in elsewhere.HERE:
        elsewhere.run(str(device), context, {"exported": exported}, out, json=json)
    stage = profiling.Profile.from_recipe(
        given(
            prompt_tokens=prompt_tokens,
            decode_tokens=decode_tokens,
            prompts=prompts,
            processes=processes,
            contexts=numbers(contexts, "--contexts"),
            batches=numbers(batches, "--batches"),
            thread_counts=numbers(thread_counts, "--thread-counts"),
            idle_seconds=numbers(idle, "--idle", float),
            operators=operators,
            roofline=roofline,
            html=html,
            shapes=sizes(shape),
            seed=seed,
            threads=threads,
        )
    )
    inputs = {"exported": subject.resolve(exported)}
    if dry_run:
        write(stage, inputs, out, json=json, dry_run=True)
        return
    made = write(stage, inputs, out, json=False, dry_run=False, show=lambda metrics: None)
    record = profiling.load(made)
    if json:
        console.data_json(record)
        return
    console.facts(overview.brief(record))
    for title, columns, rows in overview.tables(record):
        console.data(f"\n{title}")
        console.table(columns, rows)


@app.command(rich_help_panel="Judge")
def calibrate(
    context: typer.Context,
    exported: Subject,
    processes: Annotated[int | None, typer.Option(min=24, help="Processes to run; 96 make 48 pairs.")] = None,
    metric: Annotated[str | None, typer.Option(help="tpot, ttft or latency; by default what fits.")] = None,
    margin: Annotated[float | None, typer.Option(help="Slowdown in percent that must be found.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Slowdown in percent that never fails.")] = None,
    max_pairs: Annotated[int | None, typer.Option(min=8, help="Pairs that a gate may take.")] = None,
    days: Annotated[float | None, typer.Option(min=0.01, help="Days that the result holds.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Keep the record and its samples here too.")
    ] = None,
    if_needed: Annotated[
        bool, typer.Option("--if-needed", help="Do nothing while the last one holds for this device.")
    ] = False,
    shape: Shapes = None,
    device: Device = None,
    seed: SeedOption = None,
    threads: Threads = 0,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """What a gate can promise on this device, from running one artefact against itself.

    Picks the statistic, says how often it errs, and keeps that for `gate`. Exit 1: no gate is armed.

    Example: edgesft calibrate out/exported
    """
    from edgesft.stages import calibrate as calibration

    if device not in elsewhere.HERE:
        elsewhere.run(str(device), context, {"exported": exported}, out, json=json)
    options = given(
        processes=processes,
        metric=metric,
        margin_percent=margin,
        tolerance_percent=tolerance,
        max_pairs=max_pairs,
        days=days,
        shapes=sizes(shape),
        seed=seed,
        threads=threads,
    )
    if dry_run:
        inputs = {"artifact": calibration.resolve(exported)}
        write(calibration.Calibrate.from_recipe(options), inputs, out or Path("-"), json=json, dry_run=True)
        return
    record = calibration.calibrate(exported, out=out, if_needed=if_needed, **options)
    console.data_json(record) if json else console.facts(calibration.brief(record))
    calibration.judge(record)


@app.command(rich_help_panel="Judge")
def gate(
    context: typer.Context,
    head: Annotated[str, typer.Option(help="The artefact on trial.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(help="The artefact to compare with; may be left out with --budget.", show_default=False),
    ] = None,
    budget: Annotated[
        Path | None, typer.Option(help="TOML file of absolute limits for head.", show_default=False)
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="tpot, ttft or latency; may be repeated.", show_default="tpot, or latency"),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Only metrics and budgets of these names.", show_default=False),
    ] = None,
    margin: Annotated[float | None, typer.Option(help="Slowdown in percent that must not pass.")] = None,
    tail_margin: Annotated[float | None, typer.Option(help="The same for p95.")] = None,
    check_tail: Annotated[bool, typer.Option(help="Let p95 decide too.")] = False,
    check_memory: Annotated[bool, typer.Option(help="Fail when peak memory grew by more than 2 %.")] = True,
    check_size: Annotated[bool, typer.Option(help="Fail when the artefact grew by more than 2 %.")] = True,
    max_pairs: Annotated[int | None, typer.Option(min=8, help="Pairs of processes at most.")] = None,
    inconclusive: Annotated[
        str, typer.Option(help="What exit code an open verdict gives: report, pass or fail.")
    ] = "report",
    calibration: Annotated[
        str, typer.Option(help="auto: what `calibrate` kept for this device; none; or a file.")
    ] = "auto",
    drill_slowdown: Annotated[
        float, typer.Option(min=0, max=1000, help="Slow the head by this percent, to see the gate fire here.")
    ] = 0.0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Keep verdict and raw pairs; resumable.")
    ] = None,
    shape: Shapes = None,
    device: Device = None,
    seed: SeedOption = None,
    threads: Threads = 0,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Is head slower than base, or than its budget? A verdict for CI.

    Exit 0 pass, 10 regression, 11 inconclusive, 12 not comparable, 13 nothing measured, 14 device lost.

    Example: edgesft gate --base out/main --head out/change
    """
    from edgesft.stages import gate as gating
    from edgesft.stages.gating import verdict

    if base is None and budget is None:
        raise UsageError("there is nothing to compare `--head` with", "add `--base` or `--budget`")
    if device not in elsewhere.HERE:
        files = {"budget": budget, "calibration": calibration}
        elsewhere.run(str(device), context, {"base": base, "head": head}, out, json=json, files=files)
    options = given(
        metrics=tuple(metric) if metric else None,
        only=tuple(only) if only else None,
        margin_percent=margin,
        tail_margin_percent=tail_margin,
        check_tail=check_tail,
        check_memory=check_memory,
        check_size=check_size,
        max_pairs=max_pairs,
        inconclusive=inconclusive,
        drill_slowdown=drill_slowdown,
        shapes=sizes(shape),
        seed=seed,
        threads=threads,
    )
    if dry_run:
        sides = {r: gating.resolve(ref) for r, ref in (("base", base), ("head", head)) if ref is not None}
        write(gating.Gate.from_recipe(options), sides, out or Path("-"), json=json, dry_run=True)
        return
    report = gating.gate(base, head, out=out, calibration=calibration, budget=budget, **options)
    if json:
        console.data_json(report)
    else:
        for line in verdict.lines(report):
            console.data(line)
    verdict.judge(report)
