"""Which graph of an exported folder this machine can run, and how a session is told of our operations in it.

An export with packed layers has two: model.onnx needs the compiled kernels, model.plain.onnx does not
(`dialects.plain`). The first is taken wherever it can be.
"""

import contextlib
import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edgesft.exporters.description import MODEL, PLAIN

TUNABLE, PACKED = "tunable", "packed"  # keys of export.json that stand for operations of our own
FUSES: Final = (1, 25)  # ONNX Runtime; from there on it multiplies with codes of a byte as they are


@dataclass(frozen=True)
class Chosen:
    """file: the graph. operations: of ours that it has, TUNABLE and PACKED. plain: whether it is the one for
    machines without the library."""

    file: str
    operations: tuple[str, ...] = ()
    plain: bool = False


def choose(folder: Path, description: Mapping[str, Any]) -> Chosen:
    """The graph of `folder` that is to be run here; the plain one is warned of once."""
    found = tuple(name for name in (TUNABLE, PACKED) if description.get(name))
    if PACKED not in found or not (folder / PLAIN).is_file():
        return Chosen(MODEL, found)
    from edgesft.kernels.nm_matmul import library

    if library.load() is not None:
        return Chosen(MODEL, found)
    _warn(library.state()[1])
    return _without(found)


def spare(folder: Path, description: Mapping[str, Any]) -> Chosen | None:
    """The plain graph of an export that runs the other one here; None otherwise."""
    chosen = choose(folder, description)
    if PACKED not in chosen.operations or not (folder / PLAIN).is_file():
        return None
    return _without(chosen.operations)


def _without(operations: tuple[str, ...]) -> Chosen:
    return Chosen(PLAIN, tuple(name for name in operations if name != PACKED), plain=True)


@functools.cache
def _warn(reason: str) -> None:
    from edgesft.core import console  # not needed by a process that measures

    console.warn(f"packed weights are run without their kernels, slower and in more memory: {reason}")


def configure(options: Any, chosen: Chosen, *, exact: bool) -> None:  # noqa: ANN401 - onnxruntime.SessionOptions
    """Prepare `options` for a graph. exact: activations stay float32 where the plain one has a choice.

    Raises DeviceError where our operations are needed and cannot be compiled.
    """
    if TUNABLE in chosen.operations:
        from edgesft.kernels.perturb import ort_op as perturb

        perturb.register(options)
        # of what is left to ONNX Runtime only the head would gain, by a second copy of the embedding
        options.add_session_config_entry("session.disable_prepacking", "1")
    if PACKED in chosen.operations:
        from edgesft.kernels.nm_matmul import ort_op as packed

        packed.register(options)
    if chosen.plain and (exact or not _fuses()):
        # weights become float32 while the graph is loaded, instead of in every call
        options.add_session_config_entry("session.disable_quant_qdq", "1")


def _fuses() -> bool:
    import onnxruntime as ort

    return tuple(int(part) for part in ort.__version__.split(".")[:2]) >= FUSES


def plain_bits() -> int:
    """Bits of a weight of the plain graph once it is loaded: a code and its share of a scale, or float32."""
    return 9 if _fuses() else 32


def loaded(chosen: Chosen) -> None:
    """To be called when the session is there: gives memory back that the decoding of weights took."""
    if chosen.plain:
        with contextlib.suppress(OSError, AttributeError):  # glibc has it; it keeps freed memory otherwise
            ctypes.CDLL(None).malloc_trim(0)
