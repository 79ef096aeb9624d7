"""Commands that only look: methods, recipes, devices, inspect, doctor, docs."""

from pathlib import Path
from typing import Annotated

import typer

from edgesft.cli.app import Json, app
from edgesft.core import console

methods_app = typer.Typer(help="List the methods of every axis, or show one.", rich_markup_mode=None)
recipes_app = typer.Typer(help="List the recipes, or show one.", rich_markup_mode=None)
app.add_typer(methods_app, name="methods", rich_help_panel="Look")
app.add_typer(recipes_app, name="recipes", rich_help_panel="Look")


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
