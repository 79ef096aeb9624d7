"""An over-the-air update: replay a trajectory on an exported artefact where it lies, without torch."""

from pathlib import Path
from typing import Any

from edgesft.core import artifact, catalog, console
from edgesft.core.tuning.trajectory import FILE, Chosen, load


def update(exported: str, delta: Path, step: Chosen = "last") -> dict[str, Any]:
    """Change the weights of an export made with `--tunable` to those after `step` of a run.

    The artefact is the old one or the new one at any moment. Its weights must be those that the run started
    from, and each result has the hash that the run recorded; else nothing is changed.
    Raises ArtifactError (files missing, altered, of another kind or base), UsageError (no such step).
    """
    from edgesft.core.errors import ArtifactError
    from edgesft.core.tuning.replay import Replay

    artifact.read(Path(exported), "onnx")
    source = artifact.read(delta, "delta")
    if not (delta / FILE).is_file():
        raise ArtifactError(
            f"`{delta}` is no trajectory, which is all that an export can take",
            f"edgesft merge MODEL {delta} -o MERGED, and export that",
        )
    run = load(delta)
    replay = Replay(run, step, source=delta)
    tunable = catalog.runtime("exporters.tunable").OnnxTunable(Path(exported))
    with console.progress("replay", len(run.layers)) as bar:
        for name in run.layers:
            if name not in tunable.weights:
                raise ArtifactError(f"`{exported}` has no weight `{name}` that can be tuned")
            replay.run(name, tunable.weights[name])
            bar.advance()
    made = tunable.commit({"delta": source.digest, "step": replay.steps})
    return {
        "out": str(made.path),
        "digest": made.digest,
        "replayed_steps": replay.steps,
        "replay_seconds": replay.seconds,
        "verified": replay.verified,
    }
