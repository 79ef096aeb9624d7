"""A model larger than memory: linear layers of the blocks on disk, mapped one at a time while they are used.

Paper: ZO2 (2025) streams blocks through a GPU with both forwards of a zeroth-order step on each; accelerate's
disk offload streams modules from a folder.
How: the folder and the hooks are accelerate's (`<tensor>.dat`, `index.json`, `AlignDevicesHook`), but a layer
is mapped, not copied: its pages come from the file as the product reads them and go when it is done. A
forward maps a private view, which cannot change the file; `Offload.weight` maps the file itself, so that what
an update writes is there for the next forward. A stacked forward of the batch at theta + eps z and
theta - eps z reads every layer once a step, two forwards one after the other twice.
Cost: disk of the size of the offloaded layers; a step reads them once for the losses, and once and back for
the update. Forward passes only: a backward pass would keep every mapping alive. CPU only.
The folder is scratch: it is made anew from the model at every start, and a run goes on by its trajectory.
"""

import errno
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from edgesft.core import memory, models
from edgesft.core.errors import ArtifactError, DeviceError, UsageError
from edgesft.core.weights import TORCH_NAMES, Weights, check_finite

SCRATCH = "edgesft-offload"  # the folder below the one that the user names; nothing else in it is touched


class Offload:
    """A model whose `on_disk` layers lie in a folder. Use as a context: the folder is removed at the end.

    model: in eval mode on the CPU; it runs as any other as long as only the modules `attach`ed stand before
    its layers. layers: name -> linear layer, in forward order. reads, writes: how often a layer was mapped
    for a forward, and by `weight`.
    """

    def __init__(self, model: nn.Module, store: "Store", on_disk: Mapping[str, int]) -> None:
        self.model, self.layers = model, models.linears(model)
        self.on_disk, self._store = on_disk, store
        self.reads: Counter[str] = Counter()
        self.writes: Counter[str] = Counter()
        for name in on_disk:
            self._hook(name, self.layers[name], inside=False)

    def __enter__(self) -> "Offload":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.close()

    @contextmanager
    def weight(self, name: str) -> Iterator[Tensor]:
        """The weight (out, in) of a layer, to be read and changed in place; its layer holds it meanwhile.

        For a layer in memory that is its weight itself. The tensor must not be used after the context.
        """
        layer = self.layers[name]
        if name not in self.on_disk:
            yield layer.weight.data
            return
        self.writes[name] += 1
        for key in _keys(layer):
            _put(layer, key, self._store.map(f"{name}.{key}", shared=True))
        try:
            yield layer.weight.data
        finally:
            for key in _keys(layer):
                _put(layer, key, None)

    def attach(self, name: str, module: nn.Module) -> None:
        """Let `module`, which stands in the model for a layer and keeps it as `base`, have it in its forward.

        Needed where the forward of `module` uses `base.weight` without calling `base`; else nothing is done.
        """
        if name in self.on_disk:
            self._hook(name, module, inside=True)

    def detach(self, module: nn.Module) -> None:
        """Undo `attach`."""
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(module)

    def facts(self) -> dict[str, Any]:
        """What lies where, in bytes; `largest` is the largest layer that is mapped at a time."""
        memory = sum(p.nbytes for p in self.model.parameters() if p.device.type != "meta")
        return {
            "layers_on_disk": len(self.on_disk),
            "layers_in_memory": len(self.layers) - len(self.on_disk),
            "disk_bytes": sum(self.on_disk.values()),
            "memory_bytes": memory,
            "largest_bytes": max(self.on_disk.values(), default=0),
        }

    def _hook(self, name: str, module: nn.Module, *, inside: bool) -> None:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        view = _View(self, self._store, name)
        add_hook_to_module(
            module,
            AlignDevicesHook(execution_device="cpu", offload=True, weights_map=view, place_submodules=inside),
        )


class Store:
    """The folder: `<tensor>.dat` of raw values and `index.json`, as accelerate's `disk_offload` reads them.

    Raises UsageError if another run has it, DeviceError if it cannot be written or has no room.
    """

    def __init__(self, folder: Path, room: int) -> None:
        self.folder = folder / SCRATCH
        self.index: dict[str, dict[str, Any]] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / ".lock", timeout=0)
            self._lock.acquire()
        except Timeout:
            raise UsageError(
                f"`{folder}` is in use by another run that offloads there", "give each run its own folder"
            ) from None
        except OSError as error:
            raise DeviceError(f"`{folder}` cannot be written: {error.strerror}") from None
        self._empty()
        free = shutil.disk_usage(self.folder).free
        if free < room:
            self.close()
            raise DeviceError(
                f"`{folder}` has {free} bytes free, the layers to offload need {room}",
                "name a folder on a larger disk",
            )

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor."""
        flat = tensor.detach().contiguous().reshape(-1)
        try:
            with (self.folder / f"{name}.dat").open("wb") as file:
                file.write(flat.view(torch.uint8).numpy().data)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "no room left" if full else error.strerror
            raise DeviceError(f"`{self.folder}` cannot take the tensor `{name}`: {reason}") from None
        dtype = str(tensor.dtype).removeprefix("torch.")
        self.index[name] = {"dtype": dtype, "shape": list(tensor.shape)}

    def finish(self) -> None:
        """Write the index, once every tensor is there."""
        (self.folder / "index.json").write_text(json.dumps(self.index, indent=1), encoding="utf-8")

    def map(self, name: str, *, shared: bool) -> Tensor:
        """A tensor in the pages of its file. shared: what is written into it goes there, else nowhere."""
        about = self.index[name]
        shape = tuple(about["shape"])
        mapped: Tensor = torch.from_file(
            str(self.folder / f"{name}.dat"),
            shared=shared,
            size=int(torch.Size(shape).numel()),
            dtype=getattr(torch, about["dtype"]),
        )
        return mapped.view(shape)

    def close(self) -> None:
        """Remove the folder and let others have it."""
        self._empty()
        with suppress(OSError):
            (self.folder / ".lock").unlink(missing_ok=True)
        self._lock.release()
        with suppress(OSError):
            self.folder.rmdir()

    def _empty(self) -> None:
        for found in (*self.folder.glob("*.dat"), self.folder / "index.json"):
            found.unlink(missing_ok=True)


class _View(Mapping[str, Tensor]):
    """What the hook of a layer asks for: `weight`, or `base.weight` where a module stands before it."""

    def __init__(self, owner: Offload, store: Store, name: str) -> None:
        self._owner, self._store, self._name = owner, store, name

    def __getitem__(self, key: str) -> Tensor:
        leaf = key.rpartition(".")[2]
        if leaf == "weight":
            self._owner.reads[self._name] += 1
        return self._store.map(f"{self._name}.{leaf}", shared=False)

    def __iter__(self) -> Iterator[str]:
        return iter(_keys(self._owner.layers[self._name]))

    def __len__(self) -> int:
        return len(_keys(self._owner.layers[self._name]))


def load(path: Path, folder: Path, *, memory_bytes: int | None = None, dtype: str = "float32") -> Offload:
    """The model of a folder with as many linear layers in memory as fit into `memory_bytes`, others on disk.

    Embeddings, norms and head are always in memory, the first blocks before the last; None: no linear layer
    of a block. memory_bytes counts weights, the one mapped layer included; activations come on top.
    Raises ArtifactError (as `models.load`), DeviceError (too little memory or disk), UsageError (the folder
    is in use).
    """
    memory.tighten()  # gaps in the heap would take more than is put on disk: 260 MB were seen
    model, weights = _empty_model(path, dtype), Weights(path)
    sizes = {name: sum(p.nbytes for p in layer.parameters()) for name, layer in models.linears(model).items()}
    on_disk = _plan(path, model, sizes, memory_bytes)
    store = Store(folder, sum(on_disk.values()))
    try:
        for name, parameter in model.named_parameters():
            parent, _, leaf = name.rpartition(".")
            tensor = _read(weights, name, parameter)
            if parent in on_disk:
                store.add(name, tensor)
            else:
                _put(
                    model.get_submodule(parent), leaf, tensor.clone()
                )  # not in the pages of the model's file
        store.finish()
        model.tie_weights()  # type: ignore[operator]
        _check(model, weights, on_disk)
        return Offload(model.eval().requires_grad_(False), store, on_disk)
    except BaseException:
        store.close()
        raise


def _empty_model(path: Path, dtype: str) -> nn.Module:
    """The model without its weights; buffers, which no file holds, are there."""
    from accelerate import init_empty_weights
    from transformers import AutoModel, AutoModelForCausalLM

    auto = AutoModelForCausalLM if models.kind(path) == "decoder" else AutoModel
    config = models._config(path)
    try:
        with init_empty_weights(include_buffers=False):
            model: nn.Module = auto.from_config(config, dtype=getattr(torch, dtype))
        model.tie_weights()  # type: ignore[operator]
    except Exception as error:  # values out of range: many classes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtifactError(f"`{path}` cannot be loaded: {reason}") from None
    return model


def _plan(path: Path, model: nn.Module, sizes: Mapping[str, int], memory_bytes: int | None) -> dict[str, int]:
    """Which layers go to disk, with their bytes. Raises DeviceError if what must stay does not fit."""
    if memory_bytes is None:
        return dict(sizes)
    total = sum(p.nbytes for p in model.parameters())
    if total <= memory_bytes:
        return {}
    fixed, largest = total - sum(sizes.values()), max(sizes.values())
    left = memory_bytes - fixed - largest
    if left < 0:
        raise DeviceError(
            f"`{path}` needs {fixed + largest} bytes of memory for embeddings, head and one layer, "
            f"{memory_bytes} are allowed"
        )
    on_disk: dict[str, int] = {}
    for name, size in sizes.items():
        if on_disk or size > left:  # from the first one that does not fit
            on_disk[name] = size
        left -= size
    return on_disk


def _read(weights: Weights, name: str, like: Tensor) -> Tensor:
    """A parameter out of the model's files, read and not mapped, so that it is gone with its last use.

    A backbone kept alone has a prefix less.
    """
    tried = (name, f"model.{name}", name.partition(".")[2])
    found = next((each for each in tried if each in weights), None)
    if found is None:
        raise ArtifactError(f"`{weights.path}` lacks the tensor `{name}`")
    info = weights.info(found)
    if info.shape != tuple(like.shape):
        raise ArtifactError(
            f"`{weights.path}` holds `{found}` as {list(info.shape)}, expected {list(like.shape)}"
        )
    data = torch.empty(info.end - info.start, dtype=torch.uint8)
    with info.file.open("rb") as file:
        file.seek(info.start)
        if file.readinto(data.numpy().data) != len(data):
            raise ArtifactError(f"`{info.file}` is truncated in the tensor `{found}`")
    tensor = data.view(getattr(torch, TORCH_NAMES[info.dtype])).view(info.shape).to(like.dtype)
    check_finite(name, tensor)
    return tensor


def _check(model: nn.Module, weights: Weights, on_disk: Mapping[str, int]) -> None:
    """Fill buffers that the files hold; refuse tensors that were left without values or tied against them."""
    for name, buffer in model.named_buffers():
        if name in weights:
            buffer.copy_(weights.get(name))
    own = {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        where = f"`{weights.path}` cannot be offloaded: `{name}`"
        if parameter.device.type == "meta":
            if name.rpartition(".")[0] not in on_disk:
                raise ArtifactError(f"{where} is tied to a layer on disk")
        elif (
            name not in own
            and name in weights
            and not torch.equal(weights.get(name).to(parameter), parameter)
        ):
            raise ArtifactError(f"{where} differs from the tensor that its config ties it to")


def _keys(layer: nn.Module) -> list[str]:
    return [name for name, _ in layer.named_parameters(recurse=False)]


def _put(module: nn.Module, key: str, tensor: Tensor | None) -> None:
    """Make a tensor the parameter of a module; None: one without values."""
    from accelerate.utils import set_module_tensor_to_device

    set_module_tensor_to_device(module, key, "meta" if tensor is None else "cpu", value=tensor)
