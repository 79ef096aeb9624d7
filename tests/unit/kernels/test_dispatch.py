"""Dispatch: the reference is always there, native code only when its numbers are right."""

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from edgesft.core.errors import UsageError
from edgesft.kernels import dispatch, native, perturb
from edgesft.kernels.perturb import cpu


def test_operations_end_with_their_reference():
    assert "perturb" in dispatch.operations()
    for op in dispatch.operations():
        found = dispatch.implementations(op)
        assert all(each.op == op for each in found)
        assert found[-1].name == "reference"
        assert found[-1].fits()


def test_unknown_operation_is_refused():
    with pytest.raises(UsageError, match="`pertub`") as caught:
        dispatch.implementations("pertub")
    assert "`perturb`" in (caught.value.hint or "")


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=True
    ).stdout


def test_status_does_not_import_torch():
    code = "from edgesft.kernels import dispatch; print(dispatch.status())"
    code += "; import sys; print('torch' in sys.modules)"
    status, torch_loaded = run(code).splitlines()
    assert "'perturb': {'implementation': " in status
    assert torch_loaded == "False"


def test_status_says_why_native_code_is_not_used():
    code = "from edgesft.kernels import dispatch; print(dispatch.status())"
    expected = "'implementation': 'reference', 'why': 'no native: EDGESFT_NATIVE=0; "
    assert expected in run(code, EDGESFT_NATIVE="0")
    assert "no C++ compiler" in run(code, CXX="no-such-compiler-here")


def test_reference_takes_over_without_native_code():
    code = (
        "import torch; torch.set_num_threads(1); from edgesft.kernels import dispatch, perturb;"
        "print(dispatch.pick('perturb', torch.empty(2)).name);"
        "print(perturb.noise((40,), 1, 2).tolist())"
    )
    name, values = run(code, EDGESFT_NATIVE="0").splitlines()
    assert name == "reference"
    assert values == str(perturb.noise((40,), 1, 2).tolist())


@pytest.mark.skipif(not native.state(cpu.SOURCE)[0], reason="no native code here")
def test_native_code_with_other_numbers_is_refused(tmp_path):
    """Unsafe arithmetic in $CXX compiles, but does not pass. In a process of its own: merely loading such
    code switches denormal numbers off for all that follows."""
    command = " ".join(native.find_compiler().command)
    code = (
        "import torch; torch.set_num_threads(1); from edgesft.kernels import dispatch;"
        "print(dispatch.pick('perturb', torch.empty(2)).name);"
        "print(dispatch.status()['perturb'])"
    )
    name, status = run(code, EDGESFT_CACHE=str(tmp_path), CXX=f"{command} -ffast-math").splitlines()
    assert name == "reference"
    assert "'implementation': 'reference'" in status


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 only")
@pytest.mark.skipif(not native.state(cpu.SOURCE)[0], reason="no native code here")
@pytest.mark.parametrize("without", ["-mno-avx512f", "-mno-avx"])
def test_other_instruction_sets_give_the_same_bits(without, tmp_path):
    """The half-width branch, and the portable one that other architectures compile too."""
    found = native.find_compiler()
    path = tmp_path / "perturb.so"
    native._compile(cpu.SOURCE, native.Compiler((*found.command, without), found.version), path)
    assert cpu._Library(ctypes.CDLL(str(path))).agrees()
