"""A stage is a frozen dataclass: its fields are its options. `execute` runs one: equal requests are not
run twice, unfinished ones go on, outputs appear whole or not at all.
"""

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from edgesft.core import artifact
from edgesft.core.artifact import Artifact, Request, Workdir
from edgesft.core.errors import ArtifactError


class Stage(Protocol):
    """One step from directories to a directory."""

    name: ClassVar[str]
    gives: ClassVar[str]

    def params(self) -> dict[str, Any]:
        """Everything that decides the result, resolved, defaults included; JSON values only."""
        ...

    def problems(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """Reasons why it cannot run, asked before minutes are spent."""
        ...

    def run(self, inputs: Mapping[str, Artifact], work: Workdir) -> dict[str, Any]:
        """Write the products into `work.path`; return the metrics of the manifest."""
        ...


def request(stage: Stage, inputs: Mapping[str, Artifact]) -> Request:
    """What `stage` is asked, in the form that the manifest keeps."""
    return Request(stage.gives, stage.name, stage.params(), {k: v.digest for k, v in inputs.items()})


def execute(stage: Stage, inputs: Mapping[str, Artifact], out: Path) -> tuple[Artifact, bool]:
    """Run a stage into `out`. Returns the artefact and whether anything was run (False: up to date)."""
    asked = request(stage, inputs)
    done = artifact.finished(out, asked)
    if done is not None:
        return done, False
    refuse(stage, inputs)
    try:
        with artifact.create(out, asked) as (work, metrics):
            metrics.update(stage.run(inputs, work))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ArtifactError(f"no room left to write `{out}`", "free some disk and run it again") from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise ArtifactError(f"`{out}` cannot be written: {error.strerror}") from None
        raise
    return artifact.read(out, stage.gives, verify=False), True


def plan(stage: Stage, inputs: Mapping[str, Artifact], out: Path) -> dict[str, Any]:
    """What `execute` would do, without doing it. Raises like `execute` for inputs it would refuse."""
    asked = request(stage, inputs)
    done = artifact.finished(out, asked) is not None
    refuse(stage, inputs)
    return {
        "stage": stage.name,
        "out": str(out),
        "state": "up to date" if done else "to run",
        "params": stage.params(),
        "inputs": {role: {"kind": a.kind, "ref": a.ref, "bytes": a.bytes} for role, a in inputs.items()},
    }


def refuse(stage: Stage, inputs: Mapping[str, Artifact]) -> None:
    """Raise ArtifactError with the first problem that the stage names, if any."""
    problems = stage.problems(inputs)
    if problems:
        raise ArtifactError(problems[0])
