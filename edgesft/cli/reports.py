"""Commands that keep and show what was measured: report, baseline."""

from pathlib import Path
from typing import Annotated

import typer

from edgesft.cli.app import DryRun, Json, app
from edgesft.core import console

baseline_app = typer.Typer(
    help="Keep measurements in a folder, compare with them, see the trend.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(baseline_app, name="baseline", rich_help_panel="Judge")

Store = Annotated[Path, typer.Option("--store", help="Folder of the baselines; it can live in git.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the series.", show_default=False)]
Source = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder written by `profile` or `gate`.", show_default=False)
]
Metric = Annotated[str | None, typer.Option(help="Which number.", show_default="what the series is about")]
STORE = Path("baselines")


@app.command(rich_help_panel="Judge")
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Profiles, verdicts, calibrations, runs, fleets."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="Comma-separated: html, junit, sarif, github, markdown, github-action-benchmark, json.",
        ),
    ] = "html",
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            "--trend", metavar="NAME", help="Add the trend of a series of baselines.", show_default=False
        ),
    ] = None,
    store: Store = STORE,
    json: Json = False,
) -> None:
    """Render measurements, several side by side.

    Example: edgesft report out/p out/q --format html,junit,sarif,markdown -o out/r
    """
    from edgesft.stages import reporting

    runs = reporting.collect(folders)
    if baseline:
        from edgesft.stages import baseline as baselines

        runs += [reporting.trend(baselines.trend_record(store, name)) for name in baseline]
    written = reporting.render(runs, [name.strip() for name in form.split(",")], out)
    if json:
        console.data_json({"runs": [run.name for run in runs], "files": [str(path) for path in written]})
    else:
        for path in written:
            console.say(f"wrote `{path}`")


@baseline_app.command("add")
def baseline_add(
    name: Name,
    source: Source,
    label: Annotated[str | None, typer.Option(help="What it is of: a commit, say.")] = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Accept another device or workload than the series so far.")
    ] = False,
    store: Store = STORE,
    json: Json = False,
) -> None:
    """Keep a measurement. Adding it twice does nothing.

    Example: edgesft baseline add main out/profile --label 3f2c1d0
    """
    from edgesft.stages import baseline

    entry = baseline.add(store, name, source, label, restart=restart)
    if json:
        console.data_json(entry)
    else:
        console.say(f"{'added' if entry['added'] else 'already there'}: `{store / name / entry['file']}`")


@baseline_app.command("list")
def baseline_list(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One series only.")] = None,
    store: Store = STORE,
    json: Json = False,
) -> None:
    """Every entry; one that is broken says why.

    Example: edgesft baseline list
    """
    from edgesft.stages import baseline
    from edgesft.stages.baselines import text as baseline_text

    found = baseline.entries(store, name)
    if json:
        console.data_json(found)
    else:
        console.table(baseline_text.LIST_COLUMNS, baseline_text.list_rows(found), left=True)


@baseline_app.command("show")
def baseline_show(
    name: Name,
    metric: Metric = None,
    check: Annotated[bool, typer.Option("--check", help="Exit 12 if an entry is broken.")] = False,
    store: Store = STORE,
    json: Json = False,
) -> None:
    """The series with its trend: where it changed, and by how much.

    Example: edgesft baseline show main
    """
    from edgesft.stages import baseline
    from edgesft.stages.baselines import text as baseline_text

    record = baseline.show(store, name, check=check, metric=metric)
    if json:
        console.data_json(record)
        return
    console.table(baseline_text.SHOW_COLUMNS, baseline_text.show_rows(record))
    console.say(baseline_text.show_line(record))


@baseline_app.command("diff")
def baseline_diff(
    name: Name,
    source: Source,
    against: Annotated[
        str | None, typer.Option(help="Label or file of the entry.", show_default="the newest")
    ] = None,
    metric: Metric = None,
    fail_over: Annotated[
        float | None,
        typer.Option(min=0, metavar="PERCENT", help="Exit 10 when it is surely slower by more than this."),
    ] = None,
    store: Store = STORE,
    json: Json = False,
) -> None:
    """Compare a measurement with a stored one. Another device or a broken entry: exit 12.

    A stored number knows nothing of today's machine: for a verdict, use `edgesft gate`.

    Example: edgesft baseline diff main out/profile
    """
    from edgesft.stages import baseline
    from edgesft.stages.baselines import text as baseline_text

    record = baseline.diff(store, name, source, against=against, metric=metric, fail_over=fail_over)
    if json:
        console.data_json(record)
    else:
        console.table(baseline_text.DIFF_COLUMNS, baseline_text.diff_rows(record))
        console.say(baseline_text.line(record))
    baseline.judge(record)


@baseline_app.command("prune")
def baseline_prune(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One series only.")] = None,
    keep: Annotated[int, typer.Option(min=1, help="Newest entries of a series that stay.")] = 20,
    older_than_days: Annotated[
        float | None, typer.Option(min=0, help="Remove only what is older.", show_default=False)
    ] = None,
    store: Store = STORE,
    json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Remove old entries.

    Example: edgesft baseline prune main --keep 50
    """
    from edgesft.stages import baseline

    removed = baseline.prune(store, name, keep=keep, older_than_days=older_than_days, dry_run=dry_run)
    if json:
        console.data_json({"removed": removed, "dry_run": dry_run})
    else:
        for file in removed:
            console.data(file)
        console.say(f"{'would remove' if dry_run else 'removed'} {len(removed)}")
