"""Compiles the packed kernels into a wheel, where there is a C++ compiler; pyproject.toml says the rest.

EDGESFT_NO_NATIVE_BUILD=1 leaves them out: they are compiled at first use then. $CXX names the compiler, and
EDGESFT_TARGET=aarch64 (or x86_64) what it compiles for, if that is not this machine. An editable install is
never slowed down by it.
"""

import os
import platform
import runpy
import shlex
import shutil
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

UNITS = runpy.run_path(str(Path(__file__).with_name("kernels") / "nm_matmul" / "units.py"))
FOLDER = Path("edgesft") / "kernels" / "nm_matmul" / "prebuilt"


def target() -> str:
    return os.environ.get("EDGESFT_TARGET") or platform.machine()


def compiler() -> list[str] | None:
    """The command, None where there is no compiler or none is wanted."""
    if os.environ.get("EDGESFT_NO_NATIVE_BUILD") == "1":
        return None
    asked = shlex.split(os.environ.get("CXX", "")) or ["g++", "clang++", "c++"]
    if os.environ.get("CXX"):
        return asked if shutil.which(asked[0]) else None
    return next(([name] for name in asked if shutil.which(name)), None)


class Build(build_py):
    """Python files, and the library among them."""

    def run(self) -> None:
        super().run()
        command = compiler()
        if self.editable_mode or command is None:
            return
        folder = Path(self.build_lib) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        try:
            UNITS["build"](command, target(), folder / UNITS["NAME"])
        except (UNITS["Failed"], OSError) as error:
            print(f"warning: the packed kernels were not compiled ({error}); they will be at first use")
            shutil.rmtree(folder)
            return
        (folder / "key.txt").write_text(UNITS["key"](target()) + "\n")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        found: list[str] = super().get_outputs(include_bytecode)
        folder = Path(self.build_lib) / FOLDER
        return found + [str(folder / name) for name in (UNITS["NAME"], "key.txt") if (folder / name).exists()]


class Wheel(bdist_wheel):
    """For any Python 3; for one platform if it holds the library."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = compiler() is None

    def get_tag(self) -> tuple[str, str, str]:
        if compiler() is None:
            return "py3", "none", "any"
        here = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        return "py3", "none", here.replace(platform.machine(), target())


setup(cmdclass={"build_py": Build, "bdist_wheel": Wheel})
