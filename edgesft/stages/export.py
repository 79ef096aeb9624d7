"""Model -> a folder that a runtime runs: the graph, its weights, how to feed it, the tokenizer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgesft.core import models, stored
from edgesft.core.artifact import Artifact, Workdir
from edgesft.core.catalog import runtime
from edgesft.core.errors import DeviceError, UsageError, nearest

TARGETS = ("onnx", "tensorrt")
_CARRIED = ("pattern", "density")  # a latency is never apart from what made it


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a model for a runtime.

    quantize: `int8` and `int4` cut matrices into blocks of `group` inputs with a scale each, packed 2:4
    layers into blocks of twice as many inputs, of which they keep `group`; exact zeros stay zero.
    accuracy_level: 4 computes in int8 (fast), 0 in float32 (exact), as MatMulNBits has it. head: `int4` makes
    the head of an int4 export smaller, and a tied embedding with it where it is packed; it costs quality.
    sparse: what becomes of 2:4 layers when weights are quantised. `auto` stores them without their zeros
    where that is faster on this machine, measured layer by layer; `always` does it without measuring, dense
    layers in the same tiles; `never` writes ONNX Runtime's own operations only.
    tunable: the result can be tuned where it runs, and needs a C++ compiler there.
    Raises UsageError for an unknown target, for packed weights that are not quantised and for quantised ones
    that are to be tuned, DeviceError for a target that this version cannot write.
    """

    name: ClassVar[str] = "export"
    gives: ClassVar[str] = "onnx"

    target: Annotated[str, Field(description="`onnx`")] = "onnx"
    quantize: Annotated[Literal["none", "int8", "int4"], Field(description="precision of the weights")] = (
        "none"
    )
    group: Annotated[Literal[16, 32, 64, 128, 256], Field(description="weights that share a scale")] = 32
    accuracy_level: Annotated[Literal[0, 1, 4], Field(description="4: int8 arithmetic; 0 or 1: float32")] = 4
    mixed: Annotated[bool, Field(description="int4 keeps the down projections at 8 bits")] = True
    head: Annotated[Literal["int8", "int4"], Field(description="of the head, under int4")] = "int8"
    sparse: Annotated[
        Literal["auto", "always", "never"], Field(description="`auto` packs 2:4 layers where that is faster")
    ] = "auto"
    tunable: Annotated[bool, Field(description="weights can be tuned on the device, by forward passes")] = (
        False
    )

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UsageError(f"there is no export target `{self.target}`", nearest(self.target, TARGETS))
        if self.target == "tensorrt":
            raise DeviceError("the target `tensorrt` is not available in this version", "use `--target onnx`")
        if self.sparse == "always" and self.quantize == "none":
            raise UsageError(
                "`--sparse always` packs quantised weights, `--quantize` is `none`", "--quantize int4"
            )
        if self.tunable and self.quantize != "none":
            raise UsageError(
                f"`--tunable` is for weights in float32, `--quantize` is `{self.quantize}`",
                "leave out one of the two",
            )

    def params(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)

    def _precision(self) -> Any:  # noqa: ANN401 - the exporter's own class, reached by name only
        return runtime("exporters.dialects.graph").Precision(
            self.quantize, self.group, self.accuracy_level, self.mixed, self.head
        )

    def problems(self, inputs: Mapping[str, Artifact]) -> list[str]:
        """Whether the architecture can be exported at this precision.

        Raises ArtifactError for weights that are not plain.
        """
        stored.require_plain(inputs["model"], "export")
        found: list[str] = runtime("exporters.onnx").problems(
            inputs["model"].path, self._precision(), self.tunable
        )
        return found

    def run(self, inputs: Mapping[str, Artifact], work: Workdir) -> dict[str, Any]:
        """Write the folder; metrics: bytes, builder, layers, parameters by precision, pattern and density."""
        model = inputs["model"]
        metrics: dict[str, Any] = runtime("exporters.onnx").export(
            model.path, work.path, self._precision(), self.tunable, self.sparse
        )
        models.copy_files(model.path, work.path)
        return metrics | {key: carried(model, key) for key in _CARRIED}


def carried(model: Artifact, key: str) -> Any:  # noqa: ANN401 - a pattern or a density
    """What the manifest of a model says about its sparsity: measured if it was, asked for otherwise."""
    return model.metrics.get(key, model.manifest.get("params", {}).get(key))
