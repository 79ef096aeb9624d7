"""Reports from records: collect the artefacts of runs, render them in any of the formats.

A format is a file in `formats/`: its name is the format's, its docstring the documentation, `FILE` the file
that it writes, `render(runs)` the text. Listing reads the docstrings and imports nothing.
"""

import ast
import errno
import importlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from edgesft.core import artifact, records
from edgesft.core.errors import ArtifactError, UsageError, nearest

FORMATS = Path(__file__).with_name("formats")
FILES = {
    "profile": "profile.json",
    "verdict": "verdict.json",
    "calibration": "calibration.json",
    "prediction": "prediction.json",
    "evaluation": "evaluation.json",
}
CONTROL = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160)), " ")  # no page may hold them
DEPTH = 4  # folders below one that was named, at most, in which runs are looked for


@dataclass(frozen=True)
class Run:
    """One record of a report.

    name: unique within the report, from its folder. kind: a key of `FILES`, or `trend`.
    path: the artefact's folder (of a trend, the baselines').
    """

    name: str
    kind: str
    record: Mapping[str, Any]
    path: Path

    @property
    def uri(self) -> str:
        """Its file as a relative URI: below the working directory where it is, else folder and file only."""
        folder, here = Path(os.path.abspath(self.path)), Path.cwd()
        parts = folder.relative_to(here).parts if folder.is_relative_to(here) else (folder.name,)
        file = FILES.get(self.kind)
        return quote("/".join((*parts, file) if file else parts), errors="replace") or "."


def collect(paths: Iterable[str | Path]) -> list[Run]:
    """The runs at `paths`: artefact folders, or folders that hold some. Hashes and records are checked.

    Raises ArtifactError for what is missing, altered, of another schema, and where there is nothing.
    """
    found: dict[Path, tuple[str, Mapping[str, Any]]] = {}
    asked = [Path(p) for p in paths]
    for path in asked:
        if not path.exists():
            raise ArtifactError(f"`{path}` does not exist")
        manifest = artifact.read_manifest(path) if path.is_dir() else None
        if manifest is not None or not path.is_dir():
            found[path] = _load(path)
            continue
        for folder in _folders(path, DEPTH):
            if (artifact.read_manifest(folder) or {}).get("kind") in FILES:
                found[folder] = _load(folder)
    if not found:
        where = ", ".join(f"`{p}`" for p in asked) or "no folder"
        raise ArtifactError(f"nothing to report in {where}: looked for artefacts of kind {_kinds()}")
    names = _names(list(found))
    return [Run(names[path], kind, record, path) for path, (kind, record) in found.items()]


def trend(record: Mapping[str, Any], path: Path | None = None) -> Run:
    """A series of baselines as a run. Raises ArtifactError for a record of another form."""
    where = path or Path()
    records.check("trend", record, where)
    return Run(f"trend of {record.get('name') or record['metric']}", "trend", record, where)


def _kinds() -> str:
    *first, last = (f"`{k}`" for k in FILES)
    return ", ".join(first) + f" or {last}"


def _load(path: Path) -> tuple[str, Mapping[str, Any]]:
    made = artifact.read(path, *FILES)
    file = path / FILES[made.kind]
    record = artifact.read_json(file)
    if record is None:
        raise ArtifactError(f"`{file}` is missing: `{path}` is a {made.kind} without its record")
    if made.kind in records.RECORDS:
        records.check(made.kind, record, file)
    return made.kind, record


def _folders(path: Path, depth: int) -> Iterator[Path]:
    """Artefact folders below `path`, in order of their names, none within another."""
    for child in sorted(path.iterdir()):
        if child.name.startswith(".") or not child.is_dir():
            continue
        if (child / artifact.MANIFEST).is_file():
            yield child
        elif depth > 1:
            yield from _folders(child, depth - 1)


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """The shortest tails of the paths that tell them apart."""
    parts = {p: Path(os.path.abspath(p)).parts for p in paths}
    names = {}
    for path, own in parts.items():
        others = [o for p, o in parts.items() if p != path]
        count = next((n for n in range(1, len(own)) if all(o[-n:] != own[-n:] for o in others)), len(own))
        names[path] = "/".join(own[-count:]).lstrip("/") or "run"
    return names


def known() -> dict[str, str]:
    """name -> summary of every format, without importing any."""
    found = {}
    for file in sorted(FORMATS.glob("[a-z]*.py")):
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "(undocumented)"
        found[file.stem.replace("_", "-")] = text.splitlines()[0]
    return found


def load_format(name: str) -> Any:  # noqa: ANN401 - a module with FILE and render
    """The module of a format. Raises UsageError for an unknown one."""
    names = [file.stem.replace("_", "-") for file in FORMATS.glob("[a-z]*.py")]
    if name not in names:
        raise UsageError(f"there is no report format `{name}`", nearest(name, names))
    return importlib.import_module(f"edgesft.stages.reporting.formats.{name.replace('-', '_')}")


def render(runs: Sequence[Run], formats: Iterable[str], out: Path) -> list[Path]:
    """Write one file a format into the folder `out`, all or none; files of an earlier report are replaced.

    Raises UsageError for an unknown format before anything is rendered, ArtifactError if `out` cannot be
    written.
    """
    modules = [load_format(name) for name in dict.fromkeys(formats)]
    if not modules:
        raise UsageError(
            "no report format was named", nearest("", [p.stem for p in FORMATS.glob("[a-z]*.py")])
        )
    return _write({module.FILE: module.render(runs) for module in modules}, out)


def _write(texts: Mapping[str, str], out: Path) -> list[Path]:
    """Every text to a hidden folder first, then all of them into place."""
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"`{out}` is a file, expected a folder to write into")
    taken = [n for n in texts if (out / n).is_dir()]
    if taken:
        raise ArtifactError(
            f"`{out / taken[0]}` is a folder, expected a file to write", "choose another `-o`"
        )
    if (out / artifact.MANIFEST).exists():
        raise ArtifactError(f"`{out}` is an artefact, a report would alter it", "choose another `-o`")
    fresh, staging = not out.exists(), out / f".report.{os.getpid()}"
    try:
        staging.mkdir(parents=True)
        for name, text in texts.items():
            # a lone surrogate, as a file name may hold one, has no UTF-8
            artifact.write_bytes(staging / name, text.encode("utf-8", errors="replace"))
        for name in texts:
            os.replace(staging / name, out / name)
    except OSError as error:
        if fresh:
            shutil.rmtree(out, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ArtifactError(f"no room left to write `{out}`", "free some disk and run it again") from None
        raise ArtifactError(f"`{out}` cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return [out / name for name in texts]


def page(template: Path, **values: object) -> str:
    """A page from a jinja2 template that may include `style.html`; every value is escaped.

    Markup that needs no escaping comes as `markupsafe.Markup`, or through the filter `safe`.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader([template.parent, FORMATS])
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=loader, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template(template.name).render(**values)
    return text.translate(CONTROL)
