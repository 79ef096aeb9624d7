"""Packed matrices as operations of ONNX Runtime; ort_op.cpp says what they compute."""

from typing import Any, Final

from edgesft.core.errors import DeviceError
from edgesft.kernels.nm_matmul import layout, library

DOMAIN: Final = "edgesft"
LINEAR: Final = "PackedLinear"
EMBEDDING: Final = "PackedEmbedding"
OLDEST: Final = (1, 17)  # ONNX Runtime; from there on a custom operation may use its threads


def register(options: Any) -> Any:  # noqa: ANN401 - onnxruntime.SessionOptions, without types
    """Make the operations known to sessions opened with `options`, which is returned.

    Raises DeviceError where there is no library, and for an ONNX Runtime that is too old.
    """
    import onnxruntime as ort

    version = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise DeviceError(
            f"ONNX Runtime {ort.__version__} is too old for packed weights, {oldest} is needed",
            "pip install --upgrade onnxruntime",
        )
    options.register_custom_ops_library(str(library.path()))
    return options


def attributes(packed: layout.Packed) -> dict[str, int | float]:
    """Of a node that holds this matrix. Raises NotPacked for a pattern that the operations lack."""
    if packed.pattern not in (layout.TWO_FOUR, layout.DENSE):
        raise layout.NotPacked(f"ONNX Runtime's operations have 2:4 and dense, not {packed.pattern}")
    return {
        "rows": packed.rows,
        "columns": packed.columns,
        "sparse": int(packed.sparse),
        "value": layout.VALUES.index(packed.value),
        "group": packed.group,
        "unit": packed.unit,
        "version": layout.VERSION,
    }
