"""The perturbed linear layer as an operation of ONNX Runtime; ort_op.cpp says what it computes.

Compiled at first use with what `kernels.native` finds; neither torch nor a header of ONNX Runtime is needed.
"""

import functools
from pathlib import Path
from typing import Any, Final

from edgesft.core.errors import DeviceError
from edgesft.kernels import native

SOURCE = Path(__file__).with_suffix(".cpp")
DOMAIN: Final = "edgesft"
OP: Final = "PerturbedLinear"
OPTIONS: Final = ("shifts", "shift_scale", "mask_range", "mask_choice")  # inputs of a graph, see ort_op.cpp
SHIFTS, SCALE, RANGE, CHOICE = OPTIONS
LAWS: Final = {"gaussian": 0, "rademacher": 1, "low-rank": 2}  # second column of the input `shifts`
OLDEST: Final = (1, 17)  # ONNX Runtime; from there on a custom operation may use its threads


def state() -> tuple[bool, str]:
    """Whether `register` should work and why, without compiling or loading anything."""
    return native.state(SOURCE)


def register(options: Any) -> None:  # noqa: ANN401 - onnxruntime.SessionOptions, without types
    """Make the operation known to the session that will be opened with `options`.

    Raises DeviceError where it cannot be compiled, and for an ONNX Runtime that is too old.
    """
    import onnxruntime as ort

    version = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise DeviceError(
            f"ONNX Runtime {ort.__version__} is too old for an export with `--tunable`, {oldest} is needed",
            "pip install --upgrade onnxruntime",
        )
    options.register_custom_ops_library(_library())


@functools.cache
def _library() -> str:
    """Path of the compiled library. Raises DeviceError."""
    library = native.load(SOURCE)
    if library is None:
        _, why = native.state(SOURCE)
        raise DeviceError(
            f"an export with `--tunable` needs a C++ compiler on the device: {why}",
            "install g++, or export without `--tunable`",
        )
    return library._name
