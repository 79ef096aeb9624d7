"""What works on this machine, what would, and what to install for it. Imports no framework."""

import importlib.util
import shutil
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

from edgesft.core import demo
from edgesft.core.catalog import runtime


def examine() -> dict[str, Any]:
    """`ok` is true when every command but those of optional runtimes can work here."""
    packages = [_package(text) for text in metadata.requires("edgesft") or [] if "extra ==" not in text]
    compiler = next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    homes = {name: module for name, (module, _) in demo.MODELS.items()}
    homes |= {name: task.module for name, task in demo.TASKS.items()}
    demos = {f"{demo.PREFIX}{name}": _present(module) for name, module in homes.items()}
    hints = [f"pip install '{p['requirement']}'" for p in packages if not p["ok"]]
    if not all(demos.values()):
        hints.append(demo.INSTALL)
    if compiler is None:
        hints.append(
            "install a C++ compiler (g++ or clang++) for the native kernels; the slower ones work without"
        )
    return {
        "ok": all(p["ok"] for p in packages) and sys.version_info >= (3, 11),
        "python": sys.version.split()[0],
        "packages": packages,
        "compiler": compiler,
        "kernels": runtime("kernels.dispatch").status(),
        "demo": demos,
        "targets": {"onnx": _present("onnxruntime"), "tensorrt": _present("tensorrt")},
        "device": runtime("devices.host").status(),
        "hints": hints,
    }


def brief(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of the examination a person reads first."""
    host = record["device"]["host"]
    memory = (host["memory_bytes"] or 0) / 1e9
    return {
        "ok": record["ok"],
        "python": record["python"],
        "machine": f"{host['name']}, {host['physical_cores']} cores, {memory:.0f} GB",
        "gpus": [gpu["name"] for gpu in record["device"]["gpus"]],
        "compiler": record["compiler"],
        "kernels": {name: f"{k['implementation']} ({k['why']})" for name, k in record["kernels"].items()},
        "targets": record["targets"],
        "demo": record["demo"],
    }


def _present(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _package(text: str) -> dict[str, Any]:
    wanted = Requirement(text)
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return {"name": wanted.name, "requirement": text, "version": None, "ok": False}
    return {
        "name": wanted.name,
        "requirement": text,
        "version": version,
        "ok": wanted.specifier.contains(version, prereleases=True),
    }
