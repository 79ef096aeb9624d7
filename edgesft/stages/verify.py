"""Whether an export computes what its model computes, number by number, and which layer departs first.

For a quantised export two questions are kept apart. Is it the right computation: torch with the weights read
back from the export must agree with it closely, the runtime's own int8 arithmetic switched off, and every
such weight must be the model's weight rounded. How far does it drift: the artefact as shipped against the
model as it was; that is reported, and fails only beyond stated limits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import psutil
from pydantic import Field

from edgesft.core import catalog, console
from edgesft.core.artifact import Artifact, Workdir, write_json
from edgesft.core.errors import CheckFailed
from edgesft.core.params import validate

if TYPE_CHECKING:
    from edgesft.core.torch_runtime import TorchRunnable
    from edgesft.stages.agreement import FloatArray, IntArray
    from edgesft.stages.rounding import WeightCheck

HEAD = "head"  # what departs when every block agrees and the output does not
PLAIN = "plain"  # the graph of an export with packed layers for machines without their kernels
DECODING = 24  # bytes a weight that a runtime takes while it decodes that graph to float32 (measured: 18)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """relative: of outputs, to the largest of the position; of a layer's output, to its length.

    The others bound the artefact as shipped against the model: share of positions with the same most
    probable token, mean KL divergence in nats, ratio of perplexities; decode_kl: its decoding against its
    own prefill.
    """

    relative: float
    top1_agreement: float
    mean_kl: float
    perplexity_ratio: float
    decode_kl: float


# By `quantize`. Rounding in another order makes 8e-6 of 30 layers in float32, and up to 6e-5 of a model that
# pruning has hurt. The limits on drift are wide on purpose: they catch an artefact that is broken, not one
# that is poor; that is what `eval` tells.
LIMITS = {
    "none": Limits(relative=3e-4, top1_agreement=0.97, mean_kl=1e-4, perplexity_ratio=1.001, decode_kl=1e-4),
    "int8": Limits(relative=5e-4, top1_agreement=0.7, mean_kl=0.2, perplexity_ratio=1.3, decode_kl=0.2),
    "int4": Limits(relative=5e-4, top1_agreement=0.2, mean_kl=2.0, perplexity_ratio=5.0, decode_kl=0.3),
}


@dataclass(frozen=True, kw_only=True)
class Verify:
    """EXPORTED + MODEL -> report.json. Raises CheckFailed, naming the first layer that departs."""

    name: ClassVar[str] = "verify"
    gives: ClassVar[str] = "verification"

    tokens: Annotated[int, Field(ge=1, le=4096, description="greedy tokens to compare after each prompt")] = (
        16
    )
    prompts: Annotated[tuple[str, ...], Field(description="texts to compare on; none: built-in ones")] = ()
    threads: Annotated[int, Field(ge=0, le=4096, description="0: the physical cores")] = 0

    @classmethod
    def from_recipe(cls, table: Mapping[str, Any]) -> "Verify":
        """A stage from a recipe's `[verify]` table. Raises UsageError for unknown keys and bad values."""
        return validate(cls, table, "verify")

    def params(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "prompts": list(self.prompts)}

    def problems(self, inputs: Mapping[str, Artifact]) -> list[str]:
        return []

    def run(self, inputs: Mapping[str, Artifact], work: Workdir) -> dict[str, Any]:
        report = verify(
            inputs["exported"],
            inputs["model"],
            prompts=self.prompts or None,
            tokens=self.tokens,
            threads=self.threads,
        )
        judge(report)
        write_json(work.path / "report.json", report)
        return report


def brief(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a person reads first: is it the same computation, and how far the shipped form drifts."""
    found: dict[str, Any] = {"ok": report["ok"], "quantize": report["quantize"], "builder": report["builder"]}
    limit = report["limits"]["relative"]
    for name in ("prefill", "batch", "decode", PLAIN):
        errors = report.get(name)
        if errors is not None:
            title = "without the kernels" if name == PLAIN else name
            found[title] = f"{_show(errors['max_rel'])} of the largest value (limit {limit:g})"
    greedy = report.get("greedy")
    if greedy is not None:
        found["greedy tokens"] = f"{greedy['tokens'] - greedy['mismatches']} of {greedy['tokens']} equal"
    drift = report.get("drift") or {}
    if report["quantize"] != "none" and drift:
        ratio = drift["perplexity_ratio"]
        found["drift of the shipped form"] = (
            f"top-1 {drift['top1_agreement']:.2f}, KL {drift['mean_kl']:.3f}, perplexity x {ratio:.2f}"
        )
    first = report["first_departing_layer"]
    return found | ({"first departing layer": first} if first else {}) | {"warnings": report["warnings"]}


def judge(report: Mapping[str, Any]) -> None:
    """Raise CheckFailed for a report that is not ok, with its first reason and the layer it names."""
    if report["ok"]:
        return
    layer = report["first_departing_layer"]
    where = f"the first layer that departs is `{layer}`: " if layer else ""
    hint = (
        "; ".join(report["warnings"]) or "edgesft verify EXPORTED --against MODEL --json   shows every number"
    )
    raise CheckFailed(
        f"`{report['exported']}` does not agree with its model; {where}{report['failures'][0]}", hint
    )


def verify(
    exported: Artifact,
    model: Artifact,
    *,
    prompts: Sequence[str] | None = None,
    tokens: int = 16,
    threads: int = 0,
    limits: Limits | None = None,
) -> dict[str, Any]:
    """Compare an export with torch; returns the report, ready for JSON. `judge` turns it into an error.

    prompts: None takes built-in ones. tokens: greedy ones after each prompt. limits: None takes those that
    belong to the export's quantisation.
    Raises ArtifactError for inputs that are broken, unsafe, or that do not fit each other at all.
    """
    from edgesft.core.torch_runtime import TorchRunnable
    from edgesft.stages import agreement

    description = catalog.runtime("exporters.description").read_description(exported.path)
    limits = limits or LIMITS[description.get("quantize", "none")]
    warnings = _origin(exported, model)
    for warning in warnings:
        console.warn(warning)
    torch = TorchRunnable(model.path, threads)
    rows = agreement.rows(
        model.path, prompts, min(torch.vocabulary, description["vocabulary"]), torch.context
    )
    comparison = _Comparison(exported.path, model.path, description, torch, rows, tokens, threads, limits)
    report = {
        "ok": False,
        "exported": exported.ref,
        "against": model.ref,
        "quantize": description.get("quantize", "none"),
        "builder": description.get("builder"),
        **comparison.report(),
        "limits": dict(vars(limits)),
        "warnings": warnings,
    }
    failures = _failures(report, limits)
    report["first_departing_layer"] = _first(report, comparison.names, limits)
    return report | {"failures": failures, "ok": not failures}


def _origin(exported: Artifact, model: Artifact) -> list[str]:
    """A warning if the export says that it was made of another model; the numbers decide."""
    made_of = exported.manifest.get("inputs", {}).get("model")
    if made_of in (None, model.digest):
        return []
    return [f"`{exported.ref}` was exported from another model than `{model.ref}`"]


@dataclass(frozen=True)
class _Comparison:
    """Everything measured, in an order that holds one torch model and one session in memory at a time."""

    exported: Path
    model: Path
    description: Mapping[str, Any]
    torch: "TorchRunnable"
    rows: "list[IntArray]"
    tokens: int
    threads: int
    limits: Limits

    @property
    def decoder(self) -> bool:
        return bool(self.description["kind"] == "decoder")

    @property
    def quantized(self) -> bool:
        return bool(self.description.get("quantize", "none") != "none")

    @property
    def names(self) -> list[str]:
        """Names of the model's blocks in order."""
        from edgesft.core import models

        return [name for name, _ in models.blocks(self.torch.model)]

    def report(self) -> dict[str, Any]:
        from edgesft.stages import agreement

        made: dict[str, Any] = {}
        runtime, probe = catalog.runtime("exporters.runtime"), catalog.runtime("exporters.probe")
        shipped = runtime.OnnxRunnable(self.exported, threads=self.threads, spin=False)
        with console.progress("verify", 4) as bar:
            expected = [agreement.each(self.torch, row) for row in self.rows]
            bar.advance(note="torch")
            own: list[FloatArray] = []
            if self.decoder:
                own = [agreement.each(shipped, row) for row in self.rows]
                made["drift"] = self._drift(shipped, own, expected)
            if not self.quantized:
                made |= self._agreement(shipped, expected)
            bar.advance(note="as shipped")
            del shipped
            weights = self._weights(probe)
            bar.advance(note="weights")
            inside = probe.Probe(self.exported, threads=self.threads)
            if self.quantized:  # torch now computes with the export's weights
                expected = [agreement.each(self.torch, row) for row in self.rows]
                made["drift"]["of_arithmetic"] = agreement.drift(self.rows, expected, own).short()
                made |= self._agreement(inside, expected)
            made["layers"] = self._layers(inside)
            del inside
            made[PLAIN] = self._plain(probe, expected)
            bar.advance(note="layers")
        return made | {"weights": weights.report()}

    def _agreement(self, got: Any, expected: "list[FloatArray]") -> dict[str, Any]:  # noqa: ANN401
        """Is it the right computation."""
        from edgesft.stages import agreement

        prefill = agreement.prefill(got, self.rows, expected)
        batch = agreement.batch(got, self.rows, expected)
        made: dict[str, Any] = {
            "prefill": prefill.report(top1=self.decoder),
            "batch": batch.report(top1=self.decoder),
            "decode": None,
            "greedy": None,
        }
        if self.decoder:
            # Without int8 arithmetic a step of an 8-bit model takes as long as a whole prompt.
            decode, steps = agreement.Errors(), 4 if self.quantized else 16
            for _, reference, theirs in agreement.decode(got, self.rows, expected, steps):
                decode.add(reference, theirs)
            made["decode"] = decode.report()
            said = agreement.continued(self.torch, self.rows, self.tokens)
            greedy = agreement.greedy(said, got, self.limits.relative, step=not self.quantized)
            made["greedy"] = greedy.report()
        return made

    def _plain(self, probe: Any, expected: "list[FloatArray]") -> dict[str, Any] | None:  # noqa: ANN401
        """The export's other graph, where it has one; None too where the memory to decode it is not free."""
        from edgesft.stages import agreement

        spare = catalog.runtime("exporters.custom").spare(self.exported, self.description)
        if spare is None:
            return None
        needed = DECODING * sum(row["rows"] * row["columns"] for row in self.description["packed"])
        free = psutil.virtual_memory().available
        if free < needed:
            console.warn(
                f"`{spare.file}` is not checked: it takes {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free"
            )
            return None
        other = probe.Probe(self.exported, threads=self.threads, chosen=spare)
        return agreement.prefill(other, self.rows, expected).report()

    def _drift(
        self,
        shipped: Any,  # noqa: ANN401
        own: "list[FloatArray]",
        expected: "list[FloatArray]",
    ) -> dict[str, Any]:
        """How far the artefact as shipped is from the model, and its decoding from its own prefill.

        The latter is no small number for int8 arithmetic: an error of 1e-7 rounds a few activations the other
        way, and some layers later all of the rounding noise is another.
        """
        from edgesft.stages import agreement

        made = agreement.drift(self.rows, expected, own).report()
        decode = agreement.Drift()
        for row, reference, theirs in agreement.decode(shipped, self.rows, own, 16):
            decode.add(row, reference, theirs)
        made["decode_against_prefill"] = decode.short()
        if self.quantized:
            said = agreement.continued(self.torch, self.rows, self.tokens)
            greedy = agreement.greedy(said, shipped, 0.0, step=True)
            made["greedy_agreement"] = 1 - greedy.misses / greedy.tokens
        return made

    def _weights(self, probe: Any) -> "WeightCheck":  # noqa: ANN401
        """Check every weight of the export; of a quantised one, give them to torch."""
        from edgesft.core import models
        from edgesft.stages import agreement
        from edgesft.stages.rounding import WeightCheck

        check, own = WeightCheck(), models.tensors(self.model)
        for held in probe.weights(self.exported):
            if held.name not in own:
                check.blame(held.name, "the model has no tensor of that name")
                continue
            check.add(own.get(held.name).float().numpy(), held)
            if self.quantized:
                agreement.replace(self.torch, held.name, held.array)
        return check

    def _layers(self, inside: Any) -> list[dict[str, Any]]:  # noqa: ANN401
        """The relative error after each block, over the longest prompt and that of one token."""
        from edgesft.stages import agreement

        names = self.names
        chosen = [max(self.rows, key=len), self.rows[-1]]
        worst = [0.0] * len(names)
        for row in chosen:
            got = inside.hidden(row)
            found = agreement.layers(names, agreement.hidden(self.torch, row), got)
            worst = [e if not e <= w else w for e, w in zip(found, worst, strict=False)]  # keeps NaN
        return [
            {"name": name, "relative_error": agreement.finite(error)}
            for name, error in zip(names, worst, strict=False)
        ]


def _within(value: float | None, limit: float) -> bool:
    return value is not None and value <= limit


def _failures(report: Mapping[str, Any], limits: Limits) -> list[str]:
    """What lies outside the limits, in words."""
    found = []
    for part in ("prefill", "batch", "decode", PLAIN):
        if report[part] is not None and not _within(report[part]["max_rel"], limits.relative):
            what = "`model.plain.onnx`" if part == PLAIN else part
            found.append(f"{what} is off by {_show(report[part]['max_rel'])}, expected {limits.relative:g}")
    greedy = report["greedy"]
    if greedy is not None and not greedy["equal"]:
        first = greedy["first_mismatch"]
        found.append(
            f"greedy token {first['index']} after prompt {first['prompt']} is {first['got']}, "
            f"expected {first['expected']}"
        )
    for layer in report["layers"]:
        if not _within(layer["relative_error"], limits.relative):
            error = _show(layer["relative_error"])
            found.append(f"the output of `{layer['name']}` is off by {error}, expected {limits.relative:g}")
            break
    weights = report["weights"]
    if weights is not None and weights["first_departing"]:
        found.append(f"the weight `{weights['first_departing']}` departs: {weights['reason']}")
    return found + _drifted(report.get("drift") or {}, limits)


def _drifted(drift: Mapping[str, Any], limits: Limits) -> list[str]:
    if not drift:
        return []
    found = []
    if drift["top1_agreement"] < limits.top1_agreement:
        found.append(
            f"it agrees on {drift['top1_agreement']:.1%} of tokens, expected {limits.top1_agreement:.0%}"
        )
    for key in ("mean_kl", "perplexity_ratio"):
        if not _within(drift[key], getattr(limits, key)):
            found.append(f"{key} is {_show(drift[key])}, expected at most {getattr(limits, key):g}")
    apart = drift["decode_against_prefill"]["mean_kl"]
    if not _within(apart, limits.decode_kl):
        found.append(
            f"shipped decoding departs from prefill by mean_kl {_show(apart)}, expected {limits.decode_kl:g}"
        )
    return found


def _show(value: float | None) -> str:
    return "NaN or infinity" if value is None else f"{value:.3g}"


def _first(report: Mapping[str, Any], names: Sequence[str], limits: Limits) -> str | None:
    """The layer where it begins: by its output, else by its weights, else the head if only logits are off."""
    for layer in report["layers"]:
        if not _within(layer["relative_error"], limits.relative):
            return str(layer["name"])
    weight = (report["weights"] or {}).get("first_departing")
    if weight:
        return _owner(str(weight), names)
    outputs = [report[p] for p in ("prefill", "batch", "decode") if report[p] is not None]
    if report["layers"] and any(not _within(o["max_rel"], limits.relative) for o in outputs):
        return HEAD
    return None


def _owner(tensor: str, names: Sequence[str]) -> str:
    """The block that a tensor belongs to, or the tensor itself: files may leave out the model's prefix."""
    for name in names:
        if f".{'.'.join(name.split('.')[-2:])}." in f".{tensor}":
            return name
    return tensor
