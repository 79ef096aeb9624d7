"""How a change to a model is stored and read back: `delta.safetensors`, a PEFT LoRA adapter folder, or
`trajectory.safetensors`, the steps of a zeroth-order run (see `core.tuning.trajectory`).

`delta.safetensors` holds `<layer>.<theta name>` and `<layer>.region.mask` or `.region.index` (which entries).
Metadata names the method and each layer's shape and region. No pickle is ever read.
"""

import copy
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from edgesft.core import artifact, catalog
from edgesft.core.artifact import Artifact
from edgesft.core.errors import ArtifactError, UsageError
from edgesft.core.protocols import Mask, Region, Theta, Update
from edgesft.core.quantized.codes import quantize
from edgesft.core.region import Flat, Whole
from edgesft.core.tuning import trajectory
from edgesft.core.tuning.replay import Replay
from edgesft.core.tuning.tuned import Tuned, digest
from edgesft.core.weights import Planned, Weights, check_finite, dtype_name, write_file

FILE = "delta.safetensors"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
_EXTRA = ("region.mask", "region.index")  # beside theta

Base: TypeAlias = "Callable[[str], Tensor]"  # layer name -> its pretrained weight, float32


class Delta(Protocol):
    """A change to some layers. layers: their names."""

    layers: frozenset[str]

    def effective(self, layer: str, weight: Tensor) -> Tensor:
        """The changed weight (out, in) float32 for the base weight of the same shape, which is only read."""
        ...


def resolve(ref: str) -> Artifact:
    """A delta that EdgeSFT wrote, hashes checked, or a foreign PEFT LoRA adapter folder.

    Raises ArtifactError when it is missing, altered, of another kind, or a pickle.
    """
    path = Path(ref)
    if not path.is_dir() or (path / artifact.MANIFEST).exists() or (path / artifact.PARTIAL).exists():
        return artifact.read(path, "delta", ref=ref)
    if not (path / ADAPTER_CONFIG).is_file():
        raise ArtifactError(f"`{path}` is no delta: it has neither {artifact.MANIFEST} nor {ADAPTER_CONFIG}")
    PeftAdapter(path)
    return Artifact(path, "delta", artifact.digest_folder(path), ref)


def load(path: Path, *, step: trajectory.Chosen = "last", allow_other_base: bool = False) -> Delta:
    """The delta in a folder. Raises ArtifactError when it is broken or of a form that cannot be merged.

    step, allow_other_base: of a trajectory; see `TrajectoryDelta`.
    """
    if (path / trajectory.FILE).is_file():
        return TrajectoryDelta(path / trajectory.FILE, step=step, allow_other_base=allow_other_base)
    return StoredDelta(path / FILE) if (path / FILE).is_file() else PeftAdapter(path)


def base_of(model: Path) -> Base:
    """The pretrained weight (out, in) float32 of a layer by its name, out of a model folder's files."""
    weights = Weights(model)
    return lambda layer: weights.get(tensor_name(weights, layer)).float()


def tensor_name(weights: Weights, layer: str) -> str:
    """The name under which a model's files keep the weight of a layer; a backbone alone has a prefix less.

    Raises ArtifactError if there is none.
    """
    for name in (f"{layer}.weight", f"model.{layer}.weight", f"{layer.partition('.')[2]}.weight"):
        if name in weights:
            return name
    raise ArtifactError(f"the model `{weights.path}` has no layer `{layer}`")


# ---------------------------------------------------------------- writing


def save(out: Path, tuned: Tuned, method: Mapping[str, Any]) -> None:
    """Write what was tuned into the folder `out`, one layer in memory at a time.

    method: the resolved table of the delta (`catalog.describe`). Weights tuned in place are not stored so:
    their trajectory is.
    """
    delta = next(iter(tuned.layers.values())).delta
    if hasattr(delta, "peft"):
        _save_peft(out, tuned, delta.peft())
        return
    stored = _Stored(tuned)
    plan, layers = [], {}
    for name in tuned.layers:
        tensors = stored.of(name)
        plan += [
            Planned(f"{name}.{key}", dtype_name(t.dtype), tuple(t.shape))
            for key, t in sorted(tensors.items())
        ]
        theta = [key for key in tensors if key not in _EXTRA]
        layers[name] = {"shape": list(tuned.shapes[name]), "theta": theta}
    metadata = {"format": "edgesft.delta", "version": "1"}
    metadata |= {"delta": json.dumps(dict(method)), "layers": json.dumps(layers)}
    write_file(out / FILE, plan, stored.get, metadata)


class _Stored:
    """The tensors that stand for each layer; those of the last one asked for are kept."""

    def __init__(self, tuned: Tuned) -> None:
        self._tuned = tuned
        self._last: tuple[str, Theta] | None = None
        self._where = {
            f"{name}.{key}": name for name, layer in tuned.layers.items() for key in (*layer.theta, *_EXTRA)
        }

    def of(self, name: str) -> Theta:
        if self._last is None or self._last[0] != name:
            self._last = (name, self._make(name))
        return self._last[1]

    def get(self, key: str) -> Tensor:
        name = self._where[key]
        return self.of(name)[key[len(name) + 1 :]]

    def _make(self, name: str) -> Theta:
        layer = self._tuned.layers[name]
        theta = {key: p.detach() for key, p in layer.theta.items()}
        if hasattr(layer.delta, "output") or layer.region is None:
            return theta
        return theta | positions(layer.region, layer.weight.detach())


def positions(region: Region, weight: Tensor) -> Theta:
    """A region as bits or as positions, whichever is smaller; nothing for the whole tensor."""
    if isinstance(region, Whole):
        return {}
    index = region.mask(weight).flatten().nonzero().flatten()
    if 4 * index.numel() < weight.numel() / 8:
        return {"region.index": index.int()}
    bits = np.zeros(weight.numel(), dtype=np.uint8)
    bits[index.numpy()] = 1
    return {"region.mask": torch.from_numpy(np.packbits(bits))}


def _save_peft(out: Path, tuned: Tuned, config: Mapping[str, Any]) -> None:
    linears = [n for n, m in tuned.model.named_modules() if isinstance(m, nn.Linear)]
    causal = type(tuned.model).__name__.endswith("ForCausalLM")
    whole = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": _targets(tuned.layers, [n.removesuffix(".base") for n in linears]),
    }
    artifact.write_json(out / ADAPTER_CONFIG, whole | dict(config))
    tensors = {
        f"{PREFIX}{name}.lora_{key}.weight": layer.theta[key]
        for name, layer in tuned.layers.items()
        for key in ("A", "B")
    }
    plan = [Planned(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in tensors.items()]
    write_file(out / ADAPTER, plan, tensors.__getitem__)


def _targets(chosen: Iterable[str], linears: Iterable[str]) -> list[str]:
    """Last parts of the layers' names where they say the same; else the names in full."""
    wanted = set(chosen)
    leaves = {name.rpartition(".")[2] for name in wanted}
    matched = {name for name in linears if name.rpartition(".")[2] in leaves}
    return sorted(leaves if matched == wanted else wanted)


# ---------------------------------------------------------------- reading


class StoredDelta:
    """`delta.safetensors`, read layer by layer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = Weights(path)
        meta = _metadata(path)
        if meta.get("format") != "edgesft.delta" or meta.get("version") != "1":
            raise ArtifactError(f"`{path}` is not a delta that this EdgeSFT knows")
        try:
            self._layers: dict[str, dict[str, Any]] = json.loads(meta["layers"])
            table = json.loads(meta["delta"])
            self._method: Any = catalog.build("delta", table)
            known = {f"{n}.{k}" for n, layer in self._layers.items() for k in (*layer["theta"], *_EXTRA)}
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            raise ArtifactError(f"the metadata of `{path}` is broken: {error}") from None
        self._keys = frozenset(self._file.keys())
        if stray := sorted(self._keys - known):
            raise ArtifactError(f"`{path}` holds `{stray[0]}`, which its metadata does not name")
        self.layers = frozenset(self._layers)

    def effective(self, layer: str, weight: Tensor) -> Tensor:
        entry = self._layers[layer]
        if list(weight.shape) != entry["shape"]:
            raise ArtifactError(
                f"`{layer}` is {list(weight.shape)} in the model and {entry['shape']} in `{self._path}`"
            )
        theta = {key: self._get(f"{layer}.{key}") for key in entry["theta"]}
        try:
            if hasattr(self._method, "fold"):
                folded: Tensor = self._method.fold(weight, None, theta)[0]
                return folded
            changed: Tensor = self._method.effective(weight, self._region(layer, weight), theta, 1.0)
        except (RuntimeError, IndexError, KeyError) as error:
            raise ArtifactError(f"`{layer}` in `{self._path}` does not fit its weight: {error}") from None
        return changed

    def _region(self, layer: str, weight: Tensor) -> Region:
        if f"{layer}.region.mask" in self._keys:
            packed = self._get(f"{layer}.region.mask").numpy()
            if packed.dtype != np.uint8 or packed.size != -(-weight.numel() // 8):
                raise ArtifactError(f"`{layer}.region.mask` in `{self._path}` is not a mask of its weight")
            return Flat(torch.from_numpy(np.flatnonzero(np.unpackbits(packed, count=weight.numel()))))
        if f"{layer}.region.index" in self._keys:
            return Flat(_within(self._get(f"{layer}.region.index"), weight.numel()))
        return Whole()

    def _get(self, key: str) -> Tensor:
        if key not in self._keys:
            raise ArtifactError(f"`{self._path}` lacks `{key}`, which its metadata names")
        tensor = self._file.get(key)
        check_finite(key, tensor)
        return tensor


def _within(index: Tensor, numel: int) -> Tensor:
    """Untrusted positions as int64; IndexError if one lies outside or they do not ascend."""
    long = index.long()
    if long.numel() and (int(long[0]) < 0 or int(long[-1]) >= numel or bool((long.diff() <= 0).any())):
        raise IndexError("positions outside the tensor or not ascending")
    return long


class TrajectoryDelta:
    """`trajectory.safetensors`, replayed layer by layer when it is asked for.

    step: up to which step of the run. allow_other_base: replay also on weights that the run did not start
    from. Raises UsageError if the run has no such step. replay: steps, seconds and whether it is verified.
    """

    def __init__(
        self, path: Path, *, step: trajectory.Chosen = "last", allow_other_base: bool = False
    ) -> None:
        run = trajectory.load(path)
        self.replay = Replay(run, step, allow_other_base=allow_other_base, source=path)
        self.layers = frozenset(run.layers)
        self._dtype = run.settings.dtype

    def effective(self, layer: str, weight: Tensor) -> Tensor:
        """Cast as the run held it, replayed and checked; then float32, which of fp64 rounds."""
        if self._dtype == "fp32":
            array = np.array(weight.detach().numpy(), dtype=np.float32, order="C")  # a copy
            return torch.from_numpy(self.replay.run(layer, array))
        found = self.replay.run(layer, _held(weight, self._dtype), _Torch())
        return found.float() if isinstance(found, Tensor) else found.dequantize()


def _held(weight: Tensor, dtype: str) -> Any:  # noqa: ANN401 - a Tensor or a Quantized
    """A fresh copy of a float32 weight in the form in which a run holds it: `bf16`, `fp64`, `int8-32`."""
    if dtype in ("bf16", "fp64"):
        return weight.to(torch.bfloat16 if dtype == "bf16" else torch.float64, copy=True)
    bits, _, group = dtype.removeprefix("int").partition("-")
    return quantize(weight, 8 if bits == "8" else 4, int(group))


class _Torch:
    """Weights as tensors, quantised or not; see `replay.Machine`."""

    def digest(self, held: Any) -> bytes:  # noqa: ANN401 - a Tensor or a Quantized
        return digest(held)

    def copy(self, held: Any) -> Any:  # noqa: ANN401
        return held.clone() if isinstance(held, Tensor) else copy.deepcopy(held)

    def replay(self, held: Any, updates: Sequence[Update], *, tensor: int, mask: Mask) -> None:  # noqa: ANN401
        catalog.runtime("kernels.perturb").replay_(held, updates, tensor=tensor, mask=mask)


class PeftAdapter:
    """A LoRA adapter folder as PEFT writes it. What merging would get wrong is refused by name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        for pickle in ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth"):
            if (path / pickle).exists() and not (path / ADAPTER).exists():
                raise ArtifactError(f"`{path / pickle}` is a pickle, which can run code; expected {ADAPTER}")
        self._config = _peft_config(path / ADAPTER_CONFIG)
        self._file = Weights(path / ADAPTER)
        pairs: dict[str, set[str]] = {}
        for key in self._file:
            match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
            if match is None:
                raise ArtifactError(
                    f"`{path / ADAPTER}` holds `{key}`; only LoRA of linear layers can be merged"
                )
            pairs.setdefault(match[1], set()).add(match[2])
        if lone := sorted(name for name, found in pairs.items() if len(found) < 2):
            raise ArtifactError(f"`{path / ADAPTER}` has only half of the pair for `{lone[0]}`")
        self.layers = frozenset(pairs)

    def effective(self, layer: str, weight: Tensor) -> Tensor:
        a, b = (self._factor(layer, side) for side in "AB")
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise ArtifactError(f"the factors of `{layer}` in `{self._path}` do not fit each other")
        change = self._scale(layer, a.shape[0]) * (b @ a)
        if self._config.get("fan_in_fan_out"):
            change = change.T
        if change.shape != weight.shape:
            raise ArtifactError(
                f"`{layer}` is {list(weight.shape)} in the model and {list(change.shape)} in `{self._path}`"
            )
        return weight + change

    def _factor(self, layer: str, side: str) -> Tensor:
        key = f"{PREFIX}{layer}.lora_{side}.weight"
        tensor = self._file.get(key)
        check_finite(key, tensor)
        return tensor.float()

    def _scale(self, layer: str, rank: int) -> float:
        patterns: Mapping[str, float] = self._config.get("alpha_pattern") or {}
        alpha = self._config["lora_alpha"]
        for pattern, special in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", layer):  # how PEFT reads it: the first that matches
                alpha = special
                break
        return float(alpha) / (math.sqrt(rank) if self._config.get("use_rslora") else rank)


# Settings of PEFT under which W + scale * B A is not the adapted weight, with the values that are harmless.
_UNMERGEABLE: Mapping[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "kasa_config": (None,),
    "velora_config": (None,),
    "arrow_config": (None,),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def _peft_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"`{path}` is missing") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"`{path}` is not readable: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise ArtifactError(f"`{path}` is an adapter of type `{found}`, only `LORA` can be merged")
    for name, harmless in _UNMERGEABLE.items():
        if config.get(name) not in harmless:
            raise ArtifactError(
                f"`{path}` sets `{name}` to `{config[name]}`, which cannot be merged here",
                "merge it with PEFT (`merge_and_unload`) and give the merged model",
            )
    alphas = [config.get("lora_alpha"), *(config.get("alpha_pattern") or {}).values()]
    if not all(isinstance(a, int | float) and math.isfinite(a) for a in alphas):
        raise ArtifactError(f"`{path}` has no usable `lora_alpha`: {alphas}")
    return config


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"`{path}` is not a whole safetensors file: {error}") from None
