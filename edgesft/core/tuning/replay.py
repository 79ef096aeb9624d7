"""Make the tuned weights of a zeroth-order run again out of its trajectory, and prove each by its hash.

Works on numpy arrays without torch, so that a device can take a fine-tune as a file of a few kilobytes; other
forms of weights bring a `Machine`.
"""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from edgesft.core import catalog
from edgesft.core.errors import ArtifactError
from edgesft.core.protocols import Mask, Update
from edgesft.core.tuning.trajectory import FILE, Chosen, Layer, Trajectory

if TYPE_CHECKING:
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]


class Machine(Protocol):
    """How a weight of some form is hashed, copied and moved."""

    def digest(self, held: Any) -> bytes: ...  # noqa: ANN401 - whatever form the weight has
    def copy(self, held: Any) -> Any: ...  # noqa: ANN401
    def replay(self, held: Any, updates: Sequence[Update], *, tensor: int, mask: Mask) -> None: ...  # noqa: ANN401


class Arrays:
    """Weights as contiguous float32 numpy arrays; needs no torch."""

    def digest(self, held: "Array") -> bytes:
        little = np.ascontiguousarray(held, dtype=held.dtype.newbyteorder("<"))
        return hashlib.sha256(little.data).digest()

    def copy(self, held: "Array") -> "Array":
        return held.copy()

    def replay(self, held: "Array", updates: Sequence[Update], *, tensor: int, mask: Mask) -> None:
        catalog.runtime("kernels.perturb.host").replay(held, updates, tensor=tensor, mask=mask)


class Replay:
    """Makes the weights of a trajectory again, layer by layer, and checks each by its hash.

    step: up to which; where its hash is not stored, a copy goes on to the end, and that hash is checked.
    allow_other_base: replay also on weights that the run did not start from; these cannot be checked.
    source: of the trajectory, for messages.
    steps: how many are replayed; seconds: spent so far; verified: whether every layer so far was checked.
    Raises UsageError if the run has no such step.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        step: Chosen = "last",
        *,
        allow_other_base: bool = False,
        source: Path | str = FILE,
    ) -> None:
        self.trajectory, self.steps = trajectory, trajectory.at(step)
        self.seconds, self.verified = 0.0, True
        self._allow, self._source = allow_other_base, source
        self._updates = trajectory.updates()
        self._held = trajectory.held(self.steps)

    def run(self, name: str, held: Any, machine: Machine | None = None) -> Any:  # noqa: ANN401
        """The tuned weight of a layer. held: the base weight in the form of the run, which it overwrites.

        Raises ArtifactError for a weight of another shape, of another base, and for a wrong result.
        """
        layer, machine = self.trajectory.layers[name], machine or Arrays()
        if tuple(held.shape) != layer.shape:
            raise ArtifactError(
                f"`{name}` is {list(held.shape)} in the model and {list(layer.shape)} in `{self._source}`"
            )
        began = time.perf_counter()
        known = machine.digest(held) == layer.base
        if not known and not self._allow:
            raise ArtifactError(
                f"`{name}` is not the weight that the run of `{self._source}` started from: it is "
                f"{_short(machine.digest(held))}, expected {_short(layer.base)}",
                "give the model that was tuned, or --allow-other-base",
            )
        tensor = catalog.runtime("kernels.perturb").tensor_id(f"{name}.weight")
        try:
            machine.replay(held, self._updates[: self._held], tensor=tensor, mask=layer.mask)
            if known:
                self._check(name, held, machine, tensor)
        except ValueError as error:  # steps or masks that the kernels refuse
            raise ArtifactError(f"`{self._source}` cannot be replayed on `{name}`: {error}") from None
        self.verified = self.verified and known
        self.seconds += time.perf_counter() - began
        return held

    def _check(self, name: str, held: Any, machine: Machine, tensor: int) -> None:  # noqa: ANN401
        layer, rest = self.trajectory.layers[name], self._updates[self._held :]
        expected = layer.final if not rest else layer.base if not self._held else self._best(layer)
        if expected is None:
            held, expected = machine.copy(held), layer.final
            machine.replay(held, rest, tensor=tensor, mask=layer.mask)
        found = machine.digest(held)
        if found != expected:
            raise ArtifactError(
                f"the replay of `{name}` gave {_short(found)}, `{self._source}` says {_short(expected)}",
                "get the file again; EDGESFT_NATIVE=0 replays without compiled code",
            )

    def _best(self, layer: Layer) -> bytes | None:
        """The stored hash after this many updates, if these lead to the best step."""
        best = self.trajectory.best
        return layer.best if best is not None and self.trajectory.held(best) == self._held else None


def _short(digest: bytes) -> str:
    return f"sha256:{digest.hex()}"[:19]
