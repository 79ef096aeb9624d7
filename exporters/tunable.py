"""Zeroth-order tuning of an exported decoder on ONNX Runtime: neither torch nor transformers is imported.

A step is two losses at described points, out of forward passes of the graph, and one sweep over the weights.
The weights are private pages of a mapping of the data file (`exporters.mapped`): graph and sweep share one
copy, the file is untouched until `commit`. The first step makes every page of them memory of the process.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edgesft.core import catalog
from edgesft.core.artifact import Artifact
from edgesft.core.data import scoring
from edgesft.core.data.batches import TOGETHER_TOKENS, ArrayBatch
from edgesft.core.errors import UsageError
from edgesft.core.protocols import Mask, Shift, Update
from edgesft.exporters import mapped, replace
from edgesft.exporters.description import TunedWeight, read_description, tuned_weights
from edgesft.exporters.runtime import OnnxRunnable
from edgesft.exporters.weights import FloatArray
from edgesft.kernels.perturb import host
from edgesft.kernels.perturb.ort_op import CHOICE, LAWS, RANGE, SCALE, SHIFTS

LOGIT_BYTES = 128 << 20  # of one pass together
_CHUNK = 1 << 20  # entries looked at together
NOTHING = Mask(keep=0)


def problems(path: Path) -> list[str]:
    """Why the export at `path` cannot be tuned; empty if it can. Raises ArtifactError for a broken one."""
    if tuned_weights(read_description(path), path):
        return []
    return [
        f"`{path}` was exported without weights that can be tuned; export it again: "
        "`edgesft export MODEL --target onnx --tunable`"
    ]


class OnnxTunable:
    """An exported folder under tuning; implements `core.protocols.Tunable`.

    select: a method of the axis `select`, whose regions are bands of magnitudes; None: every entry.
    threads: of ONNX Runtime; 0 takes the physical cores. spin: as for `OnnxRunnable`.
    Building it checks places, not hashes: `core.artifact.read` does.
    Raises ArtifactError for a folder that is missing or broken, UsageError for one without weights that can
    be tuned or a selection that does not fit, DeviceError where the operation cannot be compiled.
    """

    def __init__(self, path: Path, *, select: Any = None, threads: int = 0, spin: bool = False) -> None:  # noqa: ANN401 - Select
        self.path = Path(path)
        replace.recover(self.path)
        found = problems(self.path)
        if found:
            raise UsageError(found[0])
        self._model = OnnxRunnable(self.path, threads=threads, spin=spin)
        self._weights = tuned_weights(self._model.description, self.path)
        self._arrays = {w.layer: self._bound.weights[w.input] for w in self._weights.values()}
        self.masks = self._select(select)
        if not self.masks:
            raise UsageError("the selection leaves nothing to train")
        self.shapes = {layer: self._weights[layer].shape for layer in self.masks}
        self._table = self._mask_table()

    @property
    def _bound(self) -> mapped.Bound:
        assert isinstance(self._model.session, mapped.Bound)
        return self._model.session

    def _select(self, select: Any) -> dict[str, Mask]:  # noqa: ANN401 - Select
        masks = {}
        for layer, array in self._arrays.items():
            region = None if select is None else select.region(layer, array, None, 0.0)
            if select is not None and region is None:
                continue
            if region is not None and not hasattr(region, "rule"):
                raise UsageError(
                    "an exported artefact is tuned inside bands of magnitudes only",
                    "--set select.use=everything",
                )
            masks[layer] = Mask() if region is None else region.rule()
        return masks

    def _mask_table(self) -> dict[str, npt.NDArray[Any]]:
        """The graph's inputs that hold the masks; a layer that is not tuned has none of its entries in."""
        masks = [self.masks.get(layer, NOTHING) for layer in self._weights]
        choice = [[m.keep, _signed(m.seed)] for m in masks]
        return {
            RANGE: np.array([[m.low, m.high] for m in masks], np.float32),
            CHOICE: np.array(choice, np.int64),
        }

    @property
    def weights(self) -> Mapping[str, FloatArray]:
        """Every weight that could be tuned (out, in) by layer, as it is now; to be read only."""
        return self._arrays

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return int(self._model.description["tunable"]["parameters"])

    @property
    def trainable(self) -> int:
        """How many entries are inside the masks now; of a random share its expectation."""
        total = 0
        for layer, mask in self.masks.items():
            inside = sum(
                int(((size >= np.float32(mask.low)) & (size <= np.float32(mask.high))).sum())
                for size in map(np.abs, _chunks(self._arrays[layer]))
            )
            total += round(inside * mask.keep / 256)
        return total

    # ------------------------------------------------------------ losses

    def loss(self, objective: Any, batch: ArrayBatch) -> "OnnxLoss":  # noqa: ANN401 - an Objective
        """The mean loss of one batch as a function of the shift. Raises UsageError for another objective."""
        use = catalog.describe("objective", objective)["use"]
        if use != "task":
            raise UsageError(
                f"the objective is `{use}`, an exported artefact is tuned with `task`",
                "--set objective.use=task",
            )
        return OnnxLoss(self, batch)

    def assess(self, batch: ArrayBatch) -> tuple[float, int | None]:
        """(mean task loss, right answers) at the present weights; None where there are no answers."""
        return self.measure(batch, [None])[0]

    def measure(self, batch: ArrayBatch, shifts: Sequence[Shift | None]) -> list[tuple[float, int | None]]:
        """`assess` at each of several points, from one pass in which every weight is read once."""
        if batch.kind == "labels":
            groups = np.split(self._logits(batch, batch.positions, shifts), len(shifts))
            return [scoring.choice_loss(batch, scoring.label_scores(batch, logits)) for logits in groups]
        found = self._log_probabilities(batch, shifts)
        if batch.kind == "candidates":
            return [scoring.choice_loss(batch, scoring.candidate_scores(batch, each)) for each in found]
        return [(scoring.text_loss(batch, each), None) for each in found]

    def _log_probabilities(
        self, batch: ArrayBatch, shifts: Sequence[Shift | None]
    ) -> npt.NDArray[np.float64]:  # (groups, N)
        """Of each target; where the logits would be too many, some rows of the batch after the others."""
        found = np.empty((len(shifts), len(batch.positions)), np.float64)
        most = max(1, LOGIT_BYTES // (4 * self._model.vocabulary * len(shifts)))
        for rows, at in _passes(batch, most):
            part = _rows(batch, rows, at)
            groups = np.split(self._logits(part, part.positions, shifts), len(shifts))
            for to, logits in zip(found, groups, strict=True):
                to[at] = scoring.log_probabilities(logits, part.targets)
        return found

    def _logits(
        self, batch: ArrayBatch, positions: npt.NDArray[np.int64], shifts: Sequence[Shift | None]
    ) -> FloatArray:
        """(groups * N, vocabulary) after `positions` of the batch, group after group."""
        model, groups = self._model, len(shifts)
        model.check_ids(batch.input_ids)
        model.check_length(batch.input_ids.shape[1])
        rows, length = batch.input_ids.shape
        starts = np.arange(groups, dtype=np.int64)[:, None] * (rows * length)
        empty = np.zeros(model.cache_shape(groups * rows, 0), np.float32)
        feeds: dict[str, Any] = {
            "input_ids": np.tile(batch.input_ids, (groups, 1)),
            "attention_mask": np.tile(batch.attention_mask, (groups, 1)),
            "logit_positions": (starts + positions).reshape(-1),
            **{f"past_key_values.{i}.{n}": empty for i in range(model.layers) for n in ("key", "value")},
            SHIFTS: np.array([_shift_row(s) for s in shifts], np.int64),
            SCALE: np.array([0.0 if s is None else s.scale for s in shifts], np.float32),
            **self._table,
        }
        (logits,) = model.session.run(["logits"], feeds)
        found: FloatArray = np.asarray(logits, np.float32)
        return found

    # ------------------------------------------------------------ weights

    def descend(self, update: Update) -> int:
        """w <- shrink w + sum of scale * z inside the masks of w before; returns the entries in them."""
        return self.replay([update])

    def replay(self, updates: Sequence[Update]) -> int:
        """`descend` by each in turn; returns the entries inside the masks of the last."""
        return sum(
            host.replay(self._arrays[layer], updates, tensor=self._weights[layer].tensor, mask=mask)
            for layer, mask in self.masks.items()
        )

    def restore(self) -> None:
        """Back to the weights in the file: those it was loaded with, or last committed."""
        stored = mapped.map_weights(self.path, self._model.description)
        for layer in self.masks:
            np.copyto(self._arrays[layer], stored[self._weights[layer].input])

    def digests(self) -> dict[str, bytes]:
        """SHA-256 of the float32 bytes of each tuned weight as it is now, by layer."""
        return {layer: hashlib.sha256(self._arrays[layer].data).digest() for layer in self.masks}

    def commit(self, about: Mapping[str, Any] | None = None) -> Artifact:
        """Write the weights into the artefact in place: a kill leaves the old one or the new one.

        about: goes into the manifest as `tuned`. It takes as much disk as the artefact while it runs.
        Raises ArtifactError where the artefact was altered or cannot be replaced.
        """
        name = self._model.description["tunable"]["file"]
        return replace.replace_data(self.path, name, self._write, about or {})

    def _write(self, file: BinaryIO) -> None:
        for layer in self.masks:
            weight: TunedWeight = self._weights[layer]
            file.seek(weight.offset)
            file.write(self._arrays[layer].data)


class OnnxLoss:
    """The loss of one batch as a function of the shift; see `core.protocols.Loss`."""

    def __init__(self, tunable: OnnxTunable, batch: ArrayBatch) -> None:
        self._tunable, self._batch = tunable, batch

    @property
    def prefers_together(self) -> bool:
        """Whether one stacked pass is expected to beat one pass for each shift."""
        return self._batch.input_ids.size <= TOGETHER_TOKENS

    def __call__(self, shift: Shift | None = None) -> float:
        return self.together([shift])[0]

    def together(self, shifts: Sequence[Shift | None]) -> list[float]:
        """The losses at several shifts from one pass over the weights."""
        return [loss for loss, _ in self._tunable.measure(self._batch, shifts)]


def _signed(seed: int) -> int:
    """The int64 of the same 64 bits."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >> 63 else seed


def _shift_row(shift: Shift | None) -> list[int]:
    return [0, 0, 0] if shift is None else [_signed(shift.seed), LAWS[shift.law], shift.rank]


def _chunks(array: FloatArray) -> Iterator[FloatArray]:
    flat = array.reshape(-1)
    return (flat[start : start + _CHUNK] for start in range(0, flat.size, _CHUNK))


def _passes(batch: ArrayBatch, most: int) -> Iterator[tuple[slice, slice]]:
    """(rows, places in `positions`) of parts of a batch with at most `most` positions, or of one row."""
    counts = np.bincount(batch.rows, minlength=len(batch.input_ids))
    start = at = 0
    while start < len(counts):
        fit = int(np.searchsorted(np.cumsum(counts[start:]), most, side="right"))
        end = start + max(1, fit)
        last = at + int(counts[start:end].sum())
        yield slice(start, end), slice(at, last)
        start, at = end, last


def _rows(batch: ArrayBatch, rows: slice, at: slice) -> ArrayBatch:
    """Some rows of a batch: what a forward pass and the choice of its targets need."""
    first = rows.start * batch.input_ids.shape[1]
    return ArrayBatch(
        kind="lm",
        input_ids=batch.input_ids[rows],
        attention_mask=batch.attention_mask[rows],
        positions=batch.positions[at] - first,
        targets=batch.targets[at],
        weights=batch.weights[at],
        rows=batch.rows[at] - rows.start,
    )
