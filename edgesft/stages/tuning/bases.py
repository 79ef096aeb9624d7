"""What can be tuned on weights that a folder stores packed or compressed: what lies beside them."""

from typing import TYPE_CHECKING

from edgesft.core import catalog, stored
from edgesft.core.artifact import Artifact
from edgesft.core.errors import UsageError

if TYPE_CHECKING:
    from edgesft.stages.tune import Tune

_FIT = {"base": ("fp32", "bf16"), "compute": ("native",), "offload": (None,)}


def check(stage: "Tune", model: Artifact) -> None:
    """Raise UsageError for a delta that would change such weights, and for other types of them in memory."""
    how = stored.form(model.path)
    if how == "dense":
        return
    plain = f"or first `edgesft convert {model.ref} --to dense -o OUT`"
    if not hasattr(stage.delta, "output"):
        able = [n for n in catalog.names("delta") if hasattr(catalog.load("delta", n), "output")]
        delta = catalog.describe("delta", stage.delta)["use"]
        raise UsageError(
            f"`{model.ref}` holds its weights as {how}, which `delta:{delta}` would have to change; beside "
            "them lie " + ", ".join(f"`delta:{name}`" for name in able),
            f"`--recipe lora` or `--recipe zo-lora`, {plain}",
        )
    for key, values in _FIT.items():
        asked = getattr(stage, key)
        if asked not in values:
            able = [f"`{value}`" for value in values if value]
            raise UsageError(
                f"`{key}` is `{asked}`, weights stored as {how} are tuned with {' or '.join(able) or 'none'}",
                f"leave it out, {plain}",
            )
