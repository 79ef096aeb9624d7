"""A zeroth-order run as a file: what each step measured, from which the tuned weights are made again.

`trajectory.safetensors` holds a number or two a step, never one a weight: projected gradients, and seeds and
learning rates where they cannot be derived or differ. Of each tuned layer it holds shape, mask, and the
SHA-256 of the weight before and after, so that a replay (`core.tuning.replay`) starts from the right bits and
proves its own.
Everything read is untrusted. Importing this module does not import torch.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import Field

from edgesft.core import artifact, weights
from edgesft.core.errors import ArtifactError, EdgeSFTError, UsageError
from edgesft.core.params import Seed, validate
from edgesft.core.protocols import Mask, Shift, Update
from edgesft.core.tuning.scalar_optim import SCALAR, Measured, updates
from edgesft.core.tuning.schedule import derive

if TYPE_CHECKING:
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]

FILE = "trajectory.safetensors"
FORMAT, VERSION = "edgesft.trajectory", 1
DTYPE = re.compile(r"fp32|bf16|fp64|int(4|8)-(32|64|128)")
NAME_LIMIT, STEP_LIMIT = 1024, 100_000_000
# Tensors of the file and their types. One value in place of a column means: the same in every row.
_COLUMNS = {
    "scales": "F64", "counts": "I32", "lr": "F64", "steps": "I32", "seeds": "I64",
    "shape": "I32", "base": "U8", "final": "U8", "best": "U8",
    "low": "F64", "high": "F64", "keep": "I32", "mask_seed": "I64",
}  # fmt: skip
_NUMPY = {"F64": np.float64, "I64": np.int64, "I32": np.int32, "U8": np.uint8}

Chosen: TypeAlias = int | Literal["best", "last"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What turns measurements into updates, and what else is worth knowing of the run.

    seed: of the run. rounding: base seed of stochastic rounding. dtype: how the run held the tuned weights:
    `fp32`, `bf16`, `fp64`, or `int8-32` (bits, inputs that share a scale). about: any JSON, not used here.
    """

    seed: Seed
    optimizer: Literal["sgd", "sign", "adam"] = "sgd"
    weight_decay: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    rounding: Seed | None = None
    dtype: Annotated[str, Field(pattern=f"^({DTYPE.pattern})$")] = "fp32"
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """One tuned weight (out, in). base, final, best: SHA-256 of its bytes, little-endian, as the run held it
    before the first step, after the last, and at the best one (None: not known)."""

    shape: tuple[int, int]
    mask: Mask
    base: bytes
    final: bytes
    best: bytes | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """A run. layers: by name, in the order of the model. measured: the steps whose updates the weights hold,
    by ascending step; skipped ones and those taken back are absent. steps: how many the run did, with these.
    best: after how many of them the dev loss was lowest; None: not known."""

    settings: Settings
    layers: Mapping[str, Layer]
    measured: Sequence[Measured]
    steps: int
    best: int | None = None

    @classmethod
    def of(
        cls,
        settings: Settings,
        measured: Sequence[Measured],
        *,
        shapes: Mapping[str, tuple[int, int]],
        masks: Mapping[str, Mask],
        base: Mapping[str, bytes],
        final: Mapping[str, bytes],
        steps: int,
        best: int | None = None,
        best_digests: Mapping[str, bytes] | None = None,
    ) -> "Trajectory":
        """Out of what a `Tunable` says of its layers: shapes, masks, and its digests at three times."""
        known = best_digests if best is not None and best_digests is not None else {}
        layers = {
            name: Layer(shape, masks[name], base[name], final[name], known.get(name))
            for name, shape in shapes.items()
        }
        return cls(settings=settings, layers=layers, measured=tuple(measured), steps=steps, best=best)

    def at(self, step: Chosen) -> int:
        """After how many steps `step` is. Raises UsageError if the run has no such step."""
        if step == "last":
            return self.steps
        if step == "best":
            if self.best is None:
                raise UsageError("this trajectory does not know its best step", "take `last`, or a number")
            return self.best
        if not 0 <= step <= self.steps:
            raise UsageError(f"the step is {step}, expected 0 to {self.steps}: the run ended there")
        return step

    def held(self, upto: int) -> int:
        """How many updates the weights hold after `upto` steps."""
        return sum(each.step < upto for each in self.measured)

    def updates(self, upto: int | None = None) -> list[Update]:
        """The updates of the first `upto` steps; None: of all."""
        optimizer = SCALAR[self.settings.optimizer](self.settings.weight_decay, self.settings.rounding)
        count = len(self.measured) if upto is None else self.held(upto)
        return updates(optimizer, self.measured[:count])

    def save(self, folder: Path) -> Path:
        """Write `folder/trajectory.safetensors`, whole or not at all; equal runs give equal bytes.

        Raises ValueError for what cannot be a run (steps out of order, directions of several laws).
        """
        from safetensors.numpy import save

        tensors = {**_step_columns(self), **_layer_columns(self.layers)}
        law, rank = _law(self.measured)
        about = {
            "format": FORMAT,
            "version": VERSION,
            "settings": asdict(self.settings),
            "law": law,
            "rank": rank,
            "measured": len(self.measured),
            "steps": self.steps,
            "best": self.best,
            "layers": list(self.layers),
        }
        path = folder / FILE
        # one entry only: the library writes several in random order
        text = json.dumps(about, separators=(",", ":"), allow_nan=False)
        artifact.write_bytes(path, save(tensors, metadata={"trajectory": text}))
        return path


# ---------------------------------------------------------------- writing


def _column(values: Sequence[Any], kind: str) -> "Array":
    found = np.asarray(values, dtype=_NUMPY[kind])
    return found[:1] if len(found) > 1 and bool((found == found[0]).all()) else found


def _law(measured: Sequence[Measured]) -> tuple[str, int]:
    found = {(s.law, s.rank) for each in measured for s in each.shifts}
    if len(found) > 1:
        raise ValueError(f"one run draws its directions from one law, not {sorted(found)}")
    return found.pop() if found else ("gaussian", 0)


def _seeds(seed: int, measured: Sequence[tuple[int, int]]) -> list[int]:
    """The seeds that an estimate derives: of each (step, number of directions)."""
    return [derive(derive(seed, "step", step), i) for step, count in measured for i in range(count)]


def _step_columns(run: Trajectory) -> "dict[str, Array]":
    steps = [each.step for each in run.measured]
    if steps != sorted(set(steps)) or (steps and not 0 <= steps[0] <= steps[-1] < run.steps):
        raise ValueError(f"the measured steps do not ascend within the {run.steps} of the run")
    counts = [len(each.shifts) for each in run.measured]
    if 0 in counts:
        raise ValueError("a measured step has no direction")
    seeds = [s.seed for each in run.measured for s in each.shifts]
    found = {
        "scales": np.asarray([s.scale for each in run.measured for s in each.shifts], dtype=np.float64),
        "counts": _column(counts, "I32"),
        "lr": _column([each.lr for each in run.measured], "F64"),
    }
    if steps != list(range(len(steps))):
        found["steps"] = np.asarray(steps, dtype=np.int32)
    if seeds != _seeds(run.settings.seed, list(zip(steps, counts, strict=True))):
        found["seeds"] = np.asarray(seeds, dtype=np.int64)
    if not all(np.isfinite(found[name]).all() for name in ("scales", "lr")):
        raise ValueError("a projected gradient or a learning rate is not finite")
    return found


def _layer_columns(layers: Mapping[str, Layer]) -> "dict[str, Array]":
    rows, masks = list(layers.values()), [layer.mask for layer in layers.values()]

    def hashes(which: Sequence[bytes]) -> "Array":
        return np.frombuffer(b"".join(which), dtype=np.uint8).reshape(len(rows), 32)

    found = {
        "shape": np.asarray([layer.shape for layer in rows], dtype=np.int32).reshape(len(rows), 2),
        "base": hashes([layer.base for layer in rows]),
        "final": hashes([layer.final for layer in rows]),
        "low": _column([mask.low for mask in masks], "F64"),
        "high": _column([mask.high for mask in masks], "F64"),
        "keep": _column([mask.keep for mask in masks], "I32"),
        "mask_seed": _column([mask.seed for mask in masks], "I64"),
    }
    best = [layer.best for layer in rows if layer.best is not None]
    if rows and len(best) == len(rows):
        found["best"] = hashes(best)
    return found


# ---------------------------------------------------------------- reading


def load(path: Path) -> Trajectory:
    """The trajectory in a folder (or that file). Raises ArtifactError if anything in it cannot be."""
    from safetensors import SafetensorError, safe_open

    file = path / FILE if path.is_dir() else path
    info = weights.read_header(file)
    try:
        with safe_open(file, framework="numpy") as opened:
            about = json.loads((opened.metadata() or {}).get("trajectory", "{}"))
            if not isinstance(about, dict) or about.get("format") != FORMAT:
                raise ArtifactError(f"`{file}` is not a trajectory")
            if type(about.get("version")) is not int or about["version"] != VERSION:
                raise ArtifactError(
                    f"`{file}` has version {about.get('version')}, this EdgeSFT knows {VERSION}",
                    "pip install --upgrade edgesft",
                )
            if stray := sorted(name for name, each in info.items() if _COLUMNS.get(name) != each.dtype):
                raise ValueError(f"it holds `{stray[0]}` of type {info[stray[0]].dtype}")
            return _read(about, _Columns({name: opened.get_tensor(name) for name in info}))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"`{file}` is not readable: {error}") from None
    except ArtifactError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError, EdgeSFTError) as error:
        why = f"it lacks `{error.args[0]}`" if type(error) is KeyError else str(error)
        raise ArtifactError(f"`{file}` is no valid trajectory: {why}") from None


class _Columns:
    """The tensors of the file. Raises ValueError for what does not fit."""

    def __init__(self, tensors: "dict[str, Array]") -> None:
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def flat(self, name: str) -> "Array":
        found = self._tensors[name]
        if found.ndim != 1:
            raise ValueError(f"`{name}` has the shape {list(found.shape)}, expected one dimension")
        return found

    def rows(self, name: str, count: int, low: float, high: float) -> list[Any]:
        """`count` values, each within low..high (NaN is in no range)."""
        found = self.flat(name)
        if len(found) not in (1, count):
            raise ValueError(f"`{name}` has {len(found)} values, expected {count}")
        if bad := np.flatnonzero(~((found >= low) & (found <= high))).tolist():
            raise ValueError(f"`{name}` is `{found[bad[0]]}` at {bad[0]}, expected {low:g} to {high:g}")
        values: list[Any] = found.tolist()
        return values * count if len(values) != count else values

    def table(self, name: str, count: int, width: int) -> "Array":
        found = self._tensors[name]
        if found.shape != (count, width):
            raise ValueError(f"`{name}` has the shape {list(found.shape)}, expected {[count, width]}")
        return found


def _read(about: Mapping[str, Any], columns: _Columns) -> Trajectory:
    settings = validate(Settings, about["settings"], "settings")
    steps, best = _count(about["steps"], "steps", STEP_LIMIT), about["best"]
    if best is not None:
        _count(best, "best", steps)
    if "best" in columns and best is None:
        raise ValueError("it has hashes of a best step, and no best step")
    return Trajectory(
        settings=settings,
        layers=_read_layers(about["layers"], columns),
        measured=_read_steps(about, settings, steps, columns),
        steps=steps,
        best=best,
    )


def _count(value: object, name: str, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"`{name}` is `{value}`, expected 0 to {most}")
    return value


def _read_steps(
    about: Mapping[str, Any], settings: Settings, steps: int, columns: _Columns
) -> tuple[Measured, ...]:
    scales = columns.flat("scales")
    if bad := np.flatnonzero(~np.isfinite(scales)).tolist():
        raise ValueError(f"the projected gradient {bad[0]} is `{scales[bad[0]]}`, expected a finite number")
    law, rank = about["law"], _count(about["rank"], "rank", 1 << 20)
    if law not in ("gaussian", "rademacher", "low-rank") or (law == "low-rank") != (rank > 0):
        raise ValueError(f"the law is `{law}` of rank {rank}")
    count = _count(about["measured"], "measured", min(steps, len(scales)))
    counts = columns.rows("counts", count, 1, len(scales)) if count else []
    if sum(counts) != len(scales):
        raise ValueError(f"{len(scales)} projected gradients do not fit {count} steps")
    lr = columns.rows("lr", count, 0, 1e6) if count else []
    numbers = columns.rows("steps", count, 0, steps - 1) if "steps" in columns else list(range(count))
    if any(b <= a for a, b in itertools.pairwise(numbers)):
        raise ValueError("the steps do not ascend")
    if "seeds" in columns:
        seeds = columns.rows("seeds", len(scales), 0, 2**63 - 1)
    else:
        seeds = _seeds(settings.seed, list(zip(numbers, counts, strict=True)))
    shifts = [Shift(s, g, law, rank) for s, g in zip(seeds, scales.tolist(), strict=True)]
    ends = np.cumsum([0, *counts]).tolist()
    return tuple(Measured(numbers[i], lr[i], tuple(shifts[ends[i] : ends[i + 1]])) for i in range(count))


def _read_layers(names: object, columns: _Columns) -> dict[str, Layer]:
    if not isinstance(names, list) or not names:
        raise ValueError("it names no layer")
    for name in names:
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= NAME_LIMIT:
            raise ValueError(f"a layer is named {name!r:.80}")
    count = len(names)
    if len(set(names)) != count:
        raise ValueError("it names a layer twice")
    shapes = columns.table("shape", count, 2)
    if not bool((shapes > 0).all()):
        raise ValueError("a layer has no entries")
    low, high = columns.rows("low", count, 0, math.inf), columns.rows("high", count, 0, math.inf)
    keep = columns.rows("keep", count, 0, 256)
    seeds = columns.rows("mask_seed", count, 0, 2**63 - 1)
    hashes = {key: columns.table(key, count, 32) for key in ("base", "final", "best") if key in columns}

    def digest(key: str, row: int) -> bytes:
        return bytes(hashes[key][row].tobytes())

    return {
        name: Layer(
            (int(shapes[i, 0]), int(shapes[i, 1])),
            Mask(low[i], high[i], keep[i], seeds[i]),
            digest("base", i),
            digest("final", i),
            digest("best", i) if "best" in hashes else None,
        )
        for i, name in enumerate(names)
    }
