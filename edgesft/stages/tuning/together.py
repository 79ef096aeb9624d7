"""Run `tune` on every rank that torchrun has started: one writes, the others follow."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgesft.core import stage as stages
from edgesft.core.artifact import Artifact, Workdir, digest_json
from edgesft.core.tuning.ranks import Ranks, join

if TYPE_CHECKING:
    from edgesft.stages.tune import Tune

RUN, DONE = b"run", b"done"


def execute(stage: "Tune", inputs: Mapping[str, Artifact], out: Path) -> tuple[Artifact | None, bool]:
    """`core.stage.execute` on the leader, and the same training without a folder on every other rank.

    Returns the artefact, None on ranks that follow, and whether anything was run.
    """
    with join() as ranks:
        if ranks.world == 1:
            return stages.execute(stage, inputs, out)
        ranks.agree(
            **{role: each.digest for role, each in inputs.items()}, request=digest_json(stage.params())
        )
        if not ranks.leader:
            if ranks.broadcast(None) == RUN:
                stage.train(inputs, None, ranks)
            return None, False
        leading = _Leading(stage, ranks)
        try:
            return stages.execute(leading, inputs, out)
        finally:
            leading.tell(DONE)


class _Leading:
    """The stage as the leader runs it: when it really starts, the others start too."""

    name: ClassVar[str] = "tune"
    gives: ClassVar[str] = "delta"

    def __init__(self, stage: "Tune", ranks: Ranks) -> None:
        self._stage, self._ranks, self._told = stage, ranks, False

    def params(self) -> dict[str, Any]:
        return self._stage.params()

    def problems(self, inputs: Mapping[str, Artifact]) -> list[str]:
        return self._stage.problems(inputs)

    def tell(self, what: bytes) -> None:
        """What the others wait for, once."""
        if not self._told:
            self._told = True
            self._ranks.broadcast(what)

    def run(self, inputs: Mapping[str, Artifact], work: Workdir) -> dict[str, Any]:
        self.tell(RUN)
        return self._stage.train(inputs, work, self._ranks)
