"""A recipe names a method for each axis it cares about: TOML, independent of the model.

A table a stage (`[tune]`, `[sparsify]`, ...); in it the stage's own values and an inline table an axis.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgesft.core.catalog import AXES
from edgesft.core.errors import ArtifactError, UsageError, nearest

ROOT = Path(__file__).resolve().parent.parent / "recipes"
STAGES = ("tune", "merge", "sparsify", "export", "verify", "eval", "profile", "gate")
HOME = {  # the stage that an axis belongs to
    "select": "tune",
    "delta": "tune",
    "estimate": "tune",
    "objective": "tune",
    "tokens": "tune",
    "compress": "sparsify",
    "activate": "export",
    "compose": "merge",
}


@dataclass(frozen=True)
class Recipe:
    """A named combination. summary: its first comment. origin: `--set` by key, for `-v`."""

    name: str
    summary: str
    tables: Mapping[str, Mapping[str, Any]]
    overridden: frozenset[str] = frozenset()

    def table(self, stage: str) -> dict[str, Any]:
        """A copy of a stage's table; empty if the recipe says nothing about it."""
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in self.tables.get(stage, {}).items()}


def names() -> list[str]:
    """Names of the recipes that come with EdgeSFT."""
    return sorted(p.stem for p in ROOT.glob("*.toml"))


def load(ref: str) -> Recipe:
    """A recipe by name, or a `.toml` file by path."""
    path = ROOT / f"{ref}.toml" if ref in names() else Path(ref)
    if path.suffix != ".toml":
        raise UsageError(f"there is no recipe `{ref}`", nearest(ref, names()))
    if not path.is_file():
        raise ArtifactError(f"the recipe `{ref}` does not exist", "edgesft recipes")
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the recipe `{ref}` is not valid TOML: {error}") from None
    _check_tables(ref, tables)
    comments = [line[1:].strip() for line in text.splitlines() if line.startswith("#")]
    return Recipe(path.stem, comments[0] if comments else "", tables)


def text(ref: str) -> str:
    """A recipe as it is written."""
    load(ref)
    path = ROOT / f"{ref}.toml" if ref in names() else Path(ref)
    return path.read_text(encoding="utf-8")


def _check_tables(ref: str, tables: Mapping[str, Any]) -> None:
    for stage, table in tables.items():
        if stage not in STAGES:
            raise UsageError(f"the recipe `{ref}` has a table `[{stage}]`", nearest(stage, STAGES))
        if not isinstance(table, dict):
            raise UsageError(f"in the recipe `{ref}`, `{stage}` is a value, expected a table `[{stage}]`")
        for key, value in table.items():
            if key in AXES and not isinstance(value, dict):
                raise UsageError(f'`{stage}.{key}` is `{value}`, expected a table: {{ use = "NAME" }}')
            if key in HOME and HOME[key] != stage:
                raise UsageError(f"the axis `{key}` belongs into `[{HOME[key]}]`, found in `[{stage}]`")


def override(recipe: Recipe, settings: Iterable[str], stage: str | None = None) -> Recipe:
    """Apply `--set key=value` in order.

    key: `select.density`, `tune.lr`, or, with `stage` given, that stage's own value: `lr`.
    Naming another method (`select.use=magnitude`) drops the values meant for the former one.
    """
    tables = {name: recipe.table(name) for name in recipe.tables}
    touched = set(recipe.overridden)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise UsageError(f"`--set {setting}` is not of the form key=value")
        path = _locate(key.strip(), stage)
        _assign(tables, path, _value(text.strip()), setting)
        touched.add(".".join(path))
    return Recipe(recipe.name, recipe.summary, tables, frozenset(touched))


def _locate(key: str, stage: str | None) -> tuple[str, ...]:
    parts = tuple(key.split("."))
    if parts[0] in HOME:
        parts = (HOME[parts[0]], *parts)
    elif parts[0] not in STAGES:
        if stage is None or len(parts) > 1:
            raise UsageError(
                f"`--set {key}`: no stage or axis `{parts[0]}`", nearest(parts[0], STAGES + AXES)
            )
        parts = (stage, *parts)
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise UsageError(f"`--set {key}`: expected STAGE.KEY or AXIS.KEY")
    return parts


def _assign(tables: dict[str, dict[str, Any]], path: tuple[str, ...], value: object, setting: str) -> None:
    table = tables.setdefault(path[0], {})
    if len(path) == 2:
        if path[1] in AXES:
            value = {"use": value}
        table[path[1]] = value
        return
    axis, name = path[1], path[2]
    if axis not in AXES:
        raise UsageError(f"`--set {setting}`: `{axis}` is not an axis", nearest(axis, AXES))
    if name == "use":
        if table.get(axis, {}).get("use") != value:
            table[axis] = {"use": value}
        return
    table.setdefault(axis, {})[name] = value


def _value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
