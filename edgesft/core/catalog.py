"""The folder is the registry: list, summarise and load methods, stages, exporters and kernels by name.

Listing reads docstrings as text and imports nothing; loading imports one module. A third party adds an
entry point in the group `edgesft.<axis>`.
"""

import ast
import dataclasses
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from edgesft.core.errors import UsageError, nearest
from edgesft.core.method import Method
from edgesft.core.params import schema, validate

AXES = ("select", "delta", "estimate", "objective", "tokens", "compress", "activate", "compose")
ROOT = Path(__file__).resolve().parent.parent / "methods"


@dataclass(frozen=True)
class Entry:
    """One method as the listing knows it. `source` is its file, or the distribution that adds it."""

    axis: str
    name: str
    summary: str
    source: str

    @property
    def title(self) -> str:
        return f"{self.axis}:{self.name}"


def _plugins(axis: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=f"edgesft.{axis}")}


def names(axis: str) -> list[str]:
    """Names of every method of an axis, built in or added by a plugin."""
    built_in = {p.stem.replace("_", "-") for p in (ROOT / axis).glob("[a-z]*.py")}
    return sorted(built_in | set(_plugins(axis)))


def entries(axis: str | None = None) -> Iterator[Entry]:
    """Every method, without importing any."""
    if axis is not None and axis not in AXES:
        raise UsageError(f"there is no axis `{axis}`", nearest(axis, AXES))
    for each in AXES if axis is None else (axis,):
        plugins = _plugins(each)
        for name in names(each):
            if name in plugins:
                point = plugins[name]
                source = point.dist.name if point.dist else point.module
                yield Entry(each, name, f"from the plugin `{source}`", source)
            else:
                path = ROOT / each / f"{name.replace('-', '_')}.py"
                yield Entry(each, name, _docstring(path).splitlines()[0], f"methods/{each}/{path.name}")


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "(undocumented)"


def document(axis: str, name: str) -> str:
    """The documentation of a method: its module's docstring."""
    _known(axis, name)
    path = ROOT / axis / f"{name.replace('-', '_')}.py"
    if path.exists():
        return _docstring(path)
    return (load(axis, name).__doc__ or "(undocumented)").strip()


def _known(axis: str, name: str) -> None:
    if axis not in AXES:
        raise UsageError(f"there is no axis `{axis}`", nearest(axis, AXES))
    if name not in names(axis):
        raise UsageError(f"there is no {axis} method `{name}`", nearest(name, names(axis)))


def load(axis: str, name: str) -> type[Method]:
    """The class of a method; imports its module only."""
    _known(axis, name)
    plugins = _plugins(axis)
    if name in plugins:
        found: Any = plugins[name].load()
        if not (isinstance(found, type) and issubclass(found, Method)):
            raise UsageError(f"the plugin `{axis}:{name}` is not a Method")
        return found
    module = importlib.import_module(f"edgesft.methods.{axis}.{name.replace('-', '_')}")
    for value in vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, Method)
            and value.__module__ == module.__name__
            and "__dataclass_fields__" in vars(value)
        ):
            return value
    raise UsageError(f"`methods/{axis}/{name}.py` holds no method")


def build(axis: str, values: dict[str, Any]) -> Method:
    """A method from a recipe's table: `{use = "name", field = value, ...}`."""
    rest = dict(values)
    name = rest.pop("use", None)
    if not isinstance(name, str):
        raise UsageError(f"`{axis}` names no method", f'write `{axis} = {{ use = "{names(axis)[0]}" }}`')
    return validate(load(axis, name), rest, f"{axis}:{name}")


def describe(axis: str, chosen: Method) -> dict[str, Any]:
    """The resolved table of a method, defaults included: what a manifest records."""
    module = type(chosen).__module__
    name = next(
        (n for n, p in _plugins(axis).items() if p.value.startswith(module)),
        module.rsplit(".", 1)[-1].replace("_", "-"),
    )
    return {"use": name, **dataclasses.asdict(chosen)}  # type: ignore[call-overload]


def split(title: str) -> tuple[str, str]:
    """(axis, name) of `axis:name`; a bare name will do where only one axis has it."""
    axis, colon, name = title.partition(":")
    if not colon:
        homes = [a for a in AXES if title in names(a)]
        if len(homes) != 1:
            known = [entry.title for entry in entries()]
            raise UsageError(
                f"there is no method `{title}`", nearest(title, [*known, *(t.split(":")[1] for t in known)])
            )
        return homes[0], title
    _known(axis, name)
    return axis, name


def page(axis: str, name: str) -> str:
    """A method as a markdown page: its docstring and its parameters."""
    lines = [f"# {axis}:{name}", "", document(axis, name).strip(), "", "## Parameters", ""]
    parameters = fields(axis, name)
    for field, about in parameters.items():
        limits = [
            f"{word} {about[key]}"
            for key, word in (
                ("exclusiveMinimum", ">"),
                ("minimum", ">="),
                ("exclusiveMaximum", "<"),
                ("maximum", "<="),
            )
            if key in about
        ]
        kind = (
            about.get("type") or " or ".join(str(x.get("type", x)) for x in about.get("anyOf", [])) or "value"
        )
        facts = ", ".join([kind, *limits, *(f"one of {about['enum']}" for _ in [0] if "enum" in about)])
        default = f", default `{about['default']}`" if "default" in about else ""
        lines.append(f"- `{field}` ({facts}{default}): {about.get('description', '')}".rstrip(": "))
    return "\n".join(lines if parameters else [*lines[:-2], "(no parameters)"]) + "\n"


def fields(axis: str, name: str) -> dict[str, dict[str, Any]]:
    """Fields of a method with type, range, default and meaning."""
    return schema(load(axis, name))


def runtime(name: str) -> Any:  # noqa: ANN401 - the module's own contract is typed where it is defined
    """A module of exporters, kernels or devices by dotted name: `exporters.runtime`, `devices.host`.

    Stages reach the machine side only through here, so that no stage imports a runtime at start-up.
    """
    return importlib.import_module(f"edgesft.{name}")
