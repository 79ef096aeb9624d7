"""Commands that only look: methods, recipes, devices, inspect, doctor, docs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from edgesft.cli.app import Json, app
from edgesft.core import console

devices_app = typer.Typer(help="This machine, and the devices that EdgeSFT knows.", rich_markup_mode=None)
methods_app = typer.Typer(help="List the methods of every axis, or show one.", rich_markup_mode=None)
recipes_app = typer.Typer(help="List the recipes, or show one.", rich_markup_mode=None)
app.add_typer(devices_app, name="devices", rich_help_panel="Look")
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


@devices_app.callback(invoke_without_command=True)
def devices(context: typer.Context, json: Json = False) -> None:
    """This machine, and the devices that EdgeSFT knows.

    Example: edgesft devices show orin-nano --for out/exported
    """
    if context.invoked_subcommand is not None:
        return
    from edgesft.core import catalog

    record = catalog.runtime("devices.host").overview()
    if json:
        console.data_json(record)
    else:
        console.facts(record["host"])
        console.table(record["columns"], record["rows"])


@devices_app.command("show")
def devices_show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `edgesft devices` lists it, or `host`.")],
    subject: Annotated[
        str | None,
        typer.Option("--for", metavar="ARTEFACT", help="Predict its speed there, and whether it fits."),
    ] = None,
    mode: Annotated[str | None, typer.Option(help="Power mode; the fastest if none is named.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of context that must fit; by default the prompt's.")
    ] = None,
    json: Json = False,
) -> None:
    """Every figure of one device, with its source; `--for` predicts from them.

    Example: edgesft devices show orin-nano --for out/exported
    """
    from edgesft.core import catalog

    record = catalog.runtime("devices.host").show(name)
    found: dict[str, Any] | None = None
    if subject is not None:
        from edgesft.core import subject as subjects
        from edgesft.stages import predict

        found = predict.predict(
            subjects.resolve(subject), name, mode=mode, prompt_tokens=prompt_tokens, context=context
        )
    if json:
        console.data_json(record | ({"prediction": found} if found else {}))
        return
    console.facts({k: record[k] for k in ("name", "kind", "remarks", "peak_tops") if record.get(k)})
    console.table(record["columns"], record["rows"], left=True)
    if found is not None:
        console.facts(predict.facts(found))
        for columns, rows in predict.tables(found):
            console.table(columns, rows)


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
def docs(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the pages.", show_default=False)],
    schemas: Annotated[
        Path | None, typer.Option(help="Folder of the JSON Schemas of every record.", show_default=False)
    ] = None,
) -> None:
    """Write a page for every method, from the method itself; and the schemas of what is measured.

    Example: edgesft docs -o docs/methods --schemas docs/schemas
    """
    from edgesft.core import catalog

    out.mkdir(parents=True, exist_ok=True)
    for entry in catalog.entries():
        page = out / f"{entry.axis}-{entry.name}.md"
        page.write_text(catalog.page(entry.axis, entry.name), encoding="utf-8")
    console.say(f"wrote `{out}`")
    if schemas is not None:
        from edgesft.core import records

        records.write_schemas(schemas)
        console.say(f"wrote `{schemas}`")
