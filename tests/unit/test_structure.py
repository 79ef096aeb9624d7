"""The shape of the package: imports run one way, the links hold, nothing shadows `kernels`."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "edgesft"
FOLDERS = ("exporters", "kernels", "devices")

# layer -> layers that it may import; stages reach methods and the machine side by name only
ALLOWED = {
    "cli": {"cli", "stages", "core"},
    "stages": {"stages", "core"},
    "methods": {"core"},
    "exporters": {"exporters", "kernels", "core"},
    "kernels": {"kernels", "core"},
    "devices": {"devices", "core"},
    "core": {"core"},
}


def sources() -> Iterator[tuple[str, Path]]:
    """(module name, file) of every module of the package, folders behind links included."""
    for folder in (PACKAGE, *(ROOT / name for name in FOLDERS)):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if folder == PACKAGE and len(parts) > 1 and parts[1] in FOLDERS:
                continue
            if parts[0] != "edgesft":
                parts = ("edgesft", *parts)
            yield ".".join(p for p in parts if p != "__init__"), path


MODULES = dict(sources())


def imports(path: Path, *, at_run_time: bool = False) -> set[str]:
    """Modules of the package that a file imports; at_run_time: without those for type checkers only."""
    tree = ast.parse(path.read_text())
    if at_run_time:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name.split(".")[0] == "edgesft"}


def layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_imports_run_one_way():
    wrong = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        if layer(module) in ALLOWED
        for name in imports(path)
        if layer(name) in ALLOWED and layer(name) not in ALLOWED[layer(module)]
    ]
    assert wrong == []


def test_methods_do_not_know_each_other():
    wrong = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        if module.startswith("edgesft.methods.")
        for name in imports(path)
        if name.startswith("edgesft.methods.")
    ]
    assert wrong == []


def test_no_import_cycles():
    graph = {
        name: {i for i in imports(path, at_run_time=True) if i in MODULES and i != name}
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in sorted(graph[name]):
                visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", FOLDERS)
def test_top_level_folders_are_linked_namespaces(name):
    assert (PACKAGE / name).resolve() == ROOT / name
    assert not (ROOT / name / "__init__.py").exists()


def test_transformers_does_not_take_our_kernels_for_its_own():
    code = (
        "import importlib.util, pathlib, transformers\n"
        "spec = importlib.util.find_spec('kernels')\n"
        "origin = getattr(spec, 'origin', None)\n"
        "root = str(pathlib.Path.cwd())\n"
        "assert origin is None or not origin.startswith(root + '/kernels'), origin\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["methods"],
        ["methods", "--json"],
        ["recipes", "--json"],
        ["doctor", "--json"],
        ["devices"],
    ],
)
def test_looking_is_free(arguments):
    code = (
        "import sys\n"
        f"sys.argv = ['edgesft', *{arguments!r}]\n"
        "from edgesft.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)
