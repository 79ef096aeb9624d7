"""Traced export: `torch.onnx.export(dynamo=True)` for every architecture without a direct description.

Decoders get the inputs and outputs of the direct builder, so that one runtime drives both: `input_ids`,
`attention_mask`, `past_key_values.{i}.key/.value`, `logit_positions` in, `logits` (N, vocabulary) and
`present.{i}.key/.value` out. Encoders: `input_ids`, `attention_mask` in, `last_hidden_state` out. The output
of block i keeps the name `hidden.{i}` inside the graph, where `verify` finds it.

Three traps of tracing are avoided here: a dynamic size may not be 0 or 1 while tracing; passing a cache
object directly breaks (pytorch/pytorch#155862), so the wrapper fills one from flat tensors; sizes that are
equal while tracing may be taken for one, so all differ.
"""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgesft.core.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor, nn

OPSET = 18  # the newest that ONNX Runtime and TensorRT 10 both build in fp32
BATCH, SEQUENCE, PAST, POSITIONS = 2, 3, 5, 4  # while tracing: all different, none 0 or 1
_OUTPUTS = ("logits", "last_hidden_state")
NOISY = ("torch", "torch.__trace", "transformers", "onnxscript", "onnx_ir")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Cache:
    """The KV cache of a decoder: one pair of (batch, heads, length, dim) a layer."""

    layers: int
    heads: int
    dim: int


def export(model: Path, out: Path) -> dict[str, Any]:
    """Write `out/model.onnx` and `out/model.onnx.data`; return what export.json says about them.

    Raises ArtifactError for a model that is broken, that is no text encoder or decoder with a plain KV cache,
    or that cannot be traced, with the reason.
    """
    import torch

    from edgesft.core import models

    with _quiet(), torch.no_grad():
        module: Any = models.load(model)  # refuses NaN and Inf
        config = module.config
        _refuse(module, model)
        for switch, value in (("attn", "eager"), ("experts", "batched_mm")):  # the forms that trace
            with contextlib.suppress(Exception):
                getattr(module, f"set_{switch}_implementation")(value)
        blocks = [block for _, block in models.blocks(module)]
        if module.can_generate():
            cache = _cache(module, model)
            program = _trace_decoder(module, blocks, cache, model)
            described = _decoder_facts(config, cache)
        else:
            program = _trace_encoder(module, blocks, model)
            described = {"kind": "encoder", "layers": len(blocks)}
        _write(program, out)
    return {
        "format": 1,
        "builder": "traced",
        "shared_kv": False,
        "architecture": str((config.architectures or [type(module).__name__])[0]),
        "vocabulary": int(config.vocab_size),
        "hidden": int(config.hidden_size),
        "context": int(getattr(config, "max_position_embeddings", 0) or 2048),
        "quantize": "none",
        "eos": _eos(model, config),
        "inputs": [v.name for v in program.model.graph.inputs],
        "outputs": [v.name for v in program.model.graph.outputs],
        **described,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the exporter prints and warns about goes to the log, not to the user."""
    noise = io.StringIO()
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if noise.getvalue().strip():
            log.debug("while tracing: %s", noise.getvalue())


def _refuse(module: "nn.Module", path: Path) -> None:
    config: Any = module.config
    if getattr(config, "is_encoder_decoder", False):
        raise ArtifactError(
            f"`{path}` is an encoder-decoder (`{config.model_type}`), expected one or the other"
        )
    if getattr(module, "main_input_name", "input_ids") != "input_ids":
        raise ArtifactError(
            f"`{path}` reads `{module.main_input_name}`, expected a model of text (`input_ids`)"
        )


def _cache(module: Any, path: Path) -> _Cache:  # noqa: ANN401 - a transformers model
    """Sizes of the cache, found by running the model once: configs name them in many ways."""
    import torch
    from transformers import DynamicCache

    state = module(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True).get("past_key_values")
    if not isinstance(state, DynamicCache):
        kind = "no cache" if state is None else f"a `{type(state).__name__}`"
        raise ArtifactError(f"`{path}` keeps {kind} between tokens, expected keys and values")
    shapes = set()
    for layer in state.layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            shapes.add(tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else ())
    if len(shapes) != 1 or len(shape := shapes.pop()) != 4:
        raise ArtifactError(f"`{path}` has layers with unlike caches, expected one shape of keys and values")
    return _Cache(len(state.layers), shape[1], shape[3])


def _trace_decoder(module: Any, blocks: "list[nn.Module]", cache: _Cache, path: Path) -> Any:  # noqa: ANN401
    import torch

    sizes = (BATCH, cache.heads, PAST, cache.dim)
    past = [torch.zeros(sizes) for _ in range(2 * cache.layers)]
    ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.long)
    mask = torch.ones(BATCH, SEQUENCE + PAST, dtype=torch.long)
    positions = torch.tensor([0, 2, 4, 5])  # (POSITIONS,)
    pairs = [f"{i}.{part}" for i in range(cache.layers) for part in ("key", "value")]
    return _trace(
        _decoder_wrapper(module, blocks, cache.layers),
        (ids, mask, positions, past),
        ["input_ids", "attention_mask", "logit_positions", *(f"past_key_values.{p}" for p in pairs)],
        ["logits", *(f"present.{p}" for p in pairs)],
        (
            {0: "batch", 1: "sequence"},
            {0: "batch", 1: "total"},
            {0: "positions"},
            [{0: "batch", 2: "past"} for _ in past],
        ),
        path,
    )


def _trace_encoder(module: Any, blocks: "list[nn.Module]", path: Path) -> Any:  # noqa: ANN401
    import torch

    ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.long)
    dims = {0: "batch", 1: "sequence"}
    return _trace(
        _encoder_wrapper(module, blocks),
        (ids, torch.ones_like(ids)),
        ["input_ids", "attention_mask"],
        ["last_hidden_state"],
        (dims, dims),
        path,
    )


def _trace(
    wrapper: "nn.Module",
    example: tuple[Any, ...],
    inputs: list[str],
    outputs: list[str],
    shapes: tuple[Any, ...],
    path: Path,
) -> Any:  # noqa: ANN401 - torch.onnx.ONNXProgram
    import torch

    try:
        return torch.onnx.export(
            wrapper,
            example,
            dynamo=True,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            verbose=False,
        )
    except Exception as error:  # torch promises no type; whatever it is, it is about this architecture
        log.debug("tracing failed", exc_info=True)
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        raise ArtifactError(f"`{path}` cannot be traced: {type(cause).__name__}: {lines[0][:200]}") from None


def _decoder_wrapper(module: Any, blocks: "list[nn.Module]", layers: int) -> "nn.Module":  # noqa: ANN401
    import inspect

    import torch
    from transformers import DynamicCache

    named = "position_ids" in inspect.signature(module.forward).parameters

    class Wrapper(torch.nn.Module):
        """Flat tensors around a decoder. The head sees the hidden states at `logit_positions` only, swapped
        in before it runs, so that what the model does after its head (scaling, capping) is kept."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module.eval()
            self.seen: list[Tensor] = []
            self.positions: Tensor | None = None
            module.get_output_embeddings().register_forward_pre_hook(self.gather)
            for block in blocks:
                block.register_forward_hook(self.record)
            self.eval()

        def gather(self, _: "nn.Module", args: "tuple[Tensor]") -> "tuple[Tensor]":
            hidden = args[0]  # (B, S, hidden)
            assert self.positions is not None
            return (hidden.reshape(-1, hidden.shape[-1])[self.positions].unsqueeze(0),)  # (1, N, hidden)

        def record(self, _: "nn.Module", args: Any, output: Any) -> None:  # noqa: ANN401
            self.seen.append(output[0] if isinstance(output, tuple) else output)

        def forward(
            self,
            input_ids: "Tensor",  # (B, S)
            attention_mask: "Tensor",  # (B, P + S)
            logit_positions: "Tensor",  # (N,)
            past: "list[Tensor]",  # 2 * layers of (B, heads, P, dim)
        ) -> "tuple[Tensor, ...]":
            # Without a config every layer keeps everything: `present` is past and new in one, also where the
            # model slides a window, which its mask then does alone.
            cache = DynamicCache()
            for i in range(layers):
                cache.update(past[2 * i], past[2 * i + 1], i)
            self.seen, self.positions = [], logit_positions
            more = {}
            if named:
                counted = attention_mask.cumsum(-1) - 1  # (B, P + S)
                more["position_ids"] = counted.clamp(min=0)[:, -input_ids.shape[1] :]
            made = self.module(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=True,
                **more,
            )
            present = [t for layer in made.past_key_values.layers for t in (layer.keys, layer.values)]
            return (made.logits[0], *present, *self.seen)

    return Wrapper()


def _encoder_wrapper(module: Any, blocks: "list[nn.Module]") -> "nn.Module":  # noqa: ANN401
    import torch

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module.eval()
            self.seen: list[Tensor] = []
            for block in blocks:
                block.register_forward_hook(self.record)
            self.eval()

        def record(self, _: "nn.Module", args: Any, output: Any) -> None:  # noqa: ANN401
            self.seen.append(output[0] if isinstance(output, tuple) else output)

        def forward(
            self, input_ids: "Tensor", attention_mask: "Tensor"
        ) -> "tuple[Tensor, ...]":  # (B, S) each
            self.seen = []
            made = self.module(input_ids=input_ids, attention_mask=attention_mask)
            return (made.last_hidden_state, *self.seen)

    return Wrapper()


def _write(program: Any, out: Path) -> None:  # noqa: ANN401
    """Save with the blocks' outputs as named inner values, and without traces of the machine that made it."""
    import numpy as np
    import onnx_ir as ir
    from onnx_ir.passes.common import DeduplicateInitializersPass

    graph = program.model.graph
    named = [v for v in graph.outputs if v.name in _OUTPUTS or v.name.startswith("present.")]
    inner = list(graph.outputs[len(named) :])
    del graph.outputs[len(named) :]
    outputs = {id(v) for v in named}
    for i, value in enumerate(inner):
        if id(value) not in outputs:  # the last block of an encoder may be the output itself
            value.name = f"hidden.{i}"
    for value in graph.inputs:
        if value.name == "logit_positions":  # an input that is an initializer too has a default: the last
            value.const_value = ir.tensor(np.array([-1], np.int64), name=value.name)
            graph.register_initializer(value)
    DeduplicateInitializersPass(size_limit=2**62)(program.model)
    for holder in (program.model, graph, *graph.all_nodes()):
        holder.metadata_props.clear()  # stack traces with the paths of this machine
    for node in graph.all_nodes():
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    ir.save(program.model, out / "model.onnx", external_data="model.onnx.data")


def _decoder_facts(config: Any, cache: _Cache) -> dict[str, Any]:  # noqa: ANN401
    return {"kind": "decoder", "layers": cache.layers, "kv_heads": cache.heads, "head_dim": cache.dim}


def _eos(model: Path, config: Any) -> list[int]:  # noqa: ANN401
    """Ids that end a text: those of generation_config.json if it names any, else those of the config."""
    file = model / "generation_config.json"
    value = None
    if file.is_file():
        with contextlib.suppress(ValueError, AttributeError):
            value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    if value is None:
        value = getattr(config, "eos_token_id", None)
    return [int(v) for v in (value if isinstance(value, list) else [] if value is None else [value])]
