"""`--device`: the same command on another machine, or on a fleet of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from edgesft.core import console
from edgesft.core.errors import UsageError

HERE = (None, "local", "host", "this")
OURS = {"device", "out", "json", "dry_run"}  # what this side does with the answer


def _typed(context: typer.Context, name: str) -> bool:
    """Whether a parameter was given on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def in_catalogue(device: str) -> bool:
    """Whether `device` is one that can only be predicted."""
    from edgesft.core import catalog

    return device in {each.id for each in catalog.runtime("devices.spec").catalogue()}


def command(context: typer.Context, subjects: Mapping[str, str]) -> list[str]:
    """The command line of `context` for another machine: what was typed, artefacts as placeholders.

    subjects: parameter -> placeholder, such as `{"base": "{base}"}`.
    """
    words = [context.info_name or ""]
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in OURS or not _typed(context, name):
            continue
        value = subjects.get(name, context.params[name])
        if parameter.param_type_name == "argument":
            words.append(str(value))
        elif isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            for each in value if isinstance(value, list | tuple) else (value,):
                words += [parameter.opts[0], str(each)]
    return words


def run(
    device: str,
    context: typer.Context,
    subjects: Mapping[str, str | Path | None],
    out: Path | None,
    *,
    json: bool,
    files: Mapping[str, str | Path | None] | None = None,
) -> None:
    """Run the command on `device` (`ssh://...` or a fleet's `.toml` file); ends with its exit code.

    subjects: parameter -> artefact to ship. files: parameter -> other file or folder to ship, where given.
    Raises UsageError for another device.
    """
    from edgesft.core import artifact
    from edgesft.core import subject as subjects_module
    from edgesft.stages.gating.verdict import GateVerdict

    shipped: dict[str, Any] = {
        name: subjects_module.resolve(ref) for name, ref in subjects.items() if ref is not None
    }
    for name, path in (files or {}).items():
        if path is not None and Path(path).exists():
            shipped[name] = (
                artifact.read(Path(path))
                if Path(path).is_dir()
                else artifact.Artifact(Path(path), "file", artifact.digest_file(Path(path)), str(path))
            )
    words = command(context, {name: f"{{{name}}}" for name in shipped})
    if device.startswith("ssh://"):
        from edgesft.stages import remote

        try:
            found = remote.run(device, [*words, *(["--json"] if json else [])], shipped, out)
        except GateVerdict as lost:
            if json:
                console.data_json(lost.report)
            raise
        if found.stdout:
            console.data(found.stdout)
        raise typer.Exit(found.exit_code)
    if device.endswith(".toml"):
        from edgesft.stages import fleet

        if out is None:
            raise UsageError("a fleet needs a folder for what its devices bring back", "add `-o OUT`")
        summary = fleet.run(fleet.load(Path(device)), words, shipped, out)
        console.data_json(summary) if json else console.table(*fleet.table(summary))
        raise typer.Exit(summary["exit_code"])
    raise UsageError(
        f"`--device {device}` is neither `ssh://...` nor a fleet's `.toml` file",
        "a device of the catalogue is only predicted: edgesft devices show NAME --for ARTEFACT",
    )
