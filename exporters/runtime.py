"""Run an exported model behind the small interface of `core.protocols.Runnable`, and generate greedily.

Neither torch nor transformers is imported. Nothing of the folder reaches ONNX Runtime before its manifest,
its description and the places of its external data are checked.
"""

import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from edgesft.core import artifact, tokens
from edgesft.core import threads as core_threads
from edgesft.core.errors import ArtifactError, DeviceError, UsageError
from edgesft.exporters import custom
from edgesft.exporters.description import DATA, read_description
from edgesft.exporters.weights import FloatArray

if TYPE_CHECKING:
    from edgesft.core.protocols import Decoding, Runnable

IntArray = npt.NDArray[np.int64]


class Session(Protocol):
    """What is used of onnxruntime.InferenceSession, which has no types of its own."""

    def run(self, names: Sequence[str] | None, feeds: Mapping[str, Any]) -> list[Any]: ...
    def run_with_iobinding(self, binding: Any) -> None: ...  # noqa: ANN401
    def run_with_ort_values(self, names: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]: ...
    def io_binding(self) -> Any: ...  # noqa: ANN401
    def get_inputs(self) -> list[Any]: ...
    def get_outputs(self) -> list[Any]: ...
    def get_overridable_initializers(self) -> list[Any]: ...
    def get_profiling_start_time_ns(self) -> int: ...
    def end_profiling(self) -> str: ...


def load(path: Path, *, threads: int = 0, spin: bool = True) -> "OnnxRunnable":
    """The runnable of an exported folder, every byte checked against its manifest.

    threads: 0 takes the physical cores. spin: whether waiting threads burn their core, which is faster on a
    free machine and slower on a shared one. Raises ArtifactError for a folder that is missing, altered, of
    another kind or unsafe; DeviceError if this ONNX Runtime cannot run it.
    """
    artifact.read(Path(path), "onnx")
    return OnnxRunnable(Path(path), threads=threads, spin=spin)


class OnnxRunnable:
    """An exported folder. Building it checks places, not hashes; `load` checks both.

    Where packed weights have no kernels it runs the plain graph, see `custom`.

    trace: where ONNX Runtime's profiler writes, see `open_session`.
    """

    def __init__(self, path: Path, *, threads: int = 0, spin: bool = True, trace: Path | None = None) -> None:
        from edgesft.exporters import mapped, safety

        self.path = Path(path)
        self.description = read_description(self.path)
        self.chosen = custom.choose(self.path, self.description)
        safety.check(self.path, self.chosen.file)
        self.threads = core_threads.resolve(threads)
        weights = mapped.map_weights(self.path, self.description)
        self.session: Session = open_session(
            self.path / self.chosen.file,
            threads=self.threads,
            spin=spin,
            trace=trace,
            chosen=self.chosen,
            exact=self.description.get("accuracy_level") != 4,
        )
        if weights:
            self.session = mapped.Bound(self.session, weights)
        self.kind: str = self.description["kind"]
        self.vocabulary: int = self.description["vocabulary"]
        self.context: int = int(self.description.get("context") or 0)
        self.eos: tuple[int, ...] = tuple(int(i) for i in self.description.get("eos", []))
        self._takes = [i.name for i in self.session.get_inputs()]
        self._takes += [i.name for i in self.session.get_overridable_initializers()]
        self._gives = [o.name for o in self.session.get_outputs()]
        self._check_names()

    def _check_names(self) -> None:
        layers = range(self.layers) if self.kind == "decoder" else range(0)
        needed = ["input_ids", "attention_mask"]
        needed += [f"past_key_values.{i}.{n}" for i in layers for n in ("key", "value")]
        missing = [n for n in needed if n not in self._takes]
        outputs = ["logits" if self.kind == "decoder" else "last_hidden_state"]
        outputs += [f"present.{i}.{n}" for i in layers for n in ("key", "value")]
        missing += [n for n in outputs if n not in self._gives]
        if missing:
            file = self.path / self.chosen.file
            raise ArtifactError(f"`{file}` has no input or output `{missing[0]}`; export.json needs it")

    @property
    def layers(self) -> int:
        return self._number("layers")

    def _number(self, key: str) -> int:
        value = self.description.get(key)
        if not isinstance(value, int) or value < 1:
            raise ArtifactError(
                f"`{self.path}` has `{key}` = `{value}` in export.json, expected a positive integer"
            )
        return value

    def cache_shape(self, batch: int, length: int) -> tuple[int, int, int, int]:
        """(batch, kv_heads, length, head_dim) of one tensor of the KV cache."""
        return batch, self._number("kv_heads"), length, self._number("head_dim")

    def check_ids(self, ids: IntArray) -> None:
        """Raises UsageError for an empty text or a token outside the vocabulary."""
        tokens.check_ids(ids, self.vocabulary)

    def check_length(self, length: int) -> None:
        """Raises UsageError if a text of `length` tokens exceeds the context."""
        tokens.check_length(length, self.context)

    def logits(
        self,
        input_ids: IntArray,  # (B, S)
        attention_mask: IntArray,  # (B, S)
        positions: IntArray,  # (N,)
    ) -> FloatArray:
        """Logits (N, vocabulary), of encoders hidden states (N, hidden), at flat positions b * S + t.

        Rows are padded on the right. Raises UsageError for what does not fit the model.
        """
        self.check_ids(input_ids)
        self.check_length(input_ids.shape[1])
        _check_padding(attention_mask)
        feeds: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if "token_type_ids" in self._takes:
            feeds["token_type_ids"] = np.zeros_like(input_ids)
        if self.kind == "encoder":
            (states,) = self.session.run(["last_hidden_state"], feeds)
            return _at(states, positions)
        empty = np.zeros(self.cache_shape(len(input_ids), 0), np.float32)
        feeds |= {f"past_key_values.{i}.{n}": empty for i in range(self.layers) for n in ("key", "value")}
        if "logit_positions" in self._takes:
            feeds["logit_positions"] = np.asarray(positions, np.int64)
            (found,) = self.session.run(["logits"], feeds)
            return _float(found)
        (found,) = self.session.run(["logits"], feeds)
        return _at(found, positions)

    def start(self, capacity: int, batch: int = 1) -> "Decoding":
        """A fresh decoding state with room for `capacity` tokens. Raises UsageError beyond the context.

        batch: sequences that are decoded together. From 2 on a prompt is (B, S), all rows of one length, a
        step takes tokens (B,), and both give logits (B, vocabulary).
        """
        if self.kind != "decoder":
            raise UsageError(f"`{self.path}` is an encoder, only a decoder generates text")
        self.check_length(capacity)
        if self.description.get("shared_kv"):
            return _Shared(self, capacity, batch)
        empty = np.zeros(self.cache_shape(batch, 0), np.float32)
        past = {f"past_key_values.{i}.{n}": empty for i in range(self.layers) for n in ("key", "value")}
        return Growing(self.session, past, self.vocabulary, capacity, batch, takes=self._takes)


class _Shared:
    """Past and present are one buffer of `capacity` rows, bound once: a step copies no cache."""

    def __init__(self, model: OnnxRunnable, capacity: int, batch: int = 1) -> None:
        import onnxruntime as ort

        self._model, self._capacity, self._length, self._batch = model, capacity, 0, batch
        self._mask = np.ones((batch, capacity), np.int64)
        self._logits = np.empty((batch, model.vocabulary), np.float32)
        self._io, self._value = model.session.io_binding(), ort.OrtValue.ortvalue_from_numpy
        self._io.bind_ortvalue_output("logits", self._value(self._logits))
        self._caches = []
        for i in range(model.layers):
            for name in ("key", "value"):
                # pages of zeros appear when first written, so a long capacity costs nothing until it is used
                buffer = np.zeros(model.cache_shape(batch, capacity), np.float32)
                value = self._value(buffer)
                self._io.bind_ortvalue_input(f"past_key_values.{i}.{name}", value)
                self._io.bind_ortvalue_output(f"present.{i}.{name}", value)
                self._caches.append((buffer, value))
        self._token = np.zeros((batch, 1), np.int64)

    def prefill(self, input_ids: IntArray) -> FloatArray:
        """Feed a prompt (S,), or more of it; logits (vocabulary,) after its last token.

        In a batch: (B, S), once; logits (B, vocabulary).
        """
        ids = rows(input_ids, self._batch)
        self._model.check_ids(ids)
        if self._batch > 1 and self._length and ids.shape[1] > 1:
            raise UsageError("the prompts of a batch come in one piece")  # GroupQueryAttention asks for it
        return self._feed(ids)

    def step(self, token: "int | IntArray") -> FloatArray:
        """Feed one token, in a batch (B,); logits (vocabulary,), in a batch (B, vocabulary), after it."""
        self._token[:, 0] = token
        self._model.check_ids(self._token)
        return self._feed(self._token)

    def _feed(self, ids: IntArray) -> FloatArray:
        self._length = _room(self._length, ids.shape[1], self._capacity)
        self._io.bind_cpu_input("input_ids", ids)
        # a slice of several rows has gaps, which a binding cannot take; that of one row is not copied
        mask = np.ascontiguousarray(self._mask[:, : self._length])  # bound arrays must outlive the run
        self._io.bind_cpu_input("attention_mask", mask)
        if self._batch > 1:
            last = np.arange(1, self._batch + 1, dtype=np.int64) * ids.shape[1] - 1  # flat, of each row
            # an input with a default has no name that `bind_cpu_input` knows
            self._io.bind_ortvalue_input("logit_positions", self._value(last))
        self._model.session.run_with_iobinding(self._io)
        logits = self._logits.copy()  # the buffer is written again by the next step
        return logits if self._batch > 1 else logits[0]


class Growing:
    """For graphs that return past and new in one: the present of one call is the past of the next.

    past: the empty cache by input name, `past_key_values.*`; its output is `present.*`. takes: names of the
    inputs, where `position_ids`, `logit_positions` and `num_logits_to_keep` are filled in if they are among
    them. dtypes: of the inputs that are not int64.
    """

    def __init__(
        self,
        session: Session,
        past: Mapping[str, npt.NDArray[Any]],
        vocabulary: int,
        capacity: int,
        batch: int = 1,
        *,
        takes: Collection[str],
        dtypes: Mapping[str, npt.DTypeLike] | None = None,
    ) -> None:
        import onnxruntime as ort

        self._session, self._value = session, ort.OrtValue.ortvalue_from_numpy
        self._vocabulary, self._capacity, self._length, self._batch = vocabulary, capacity, 0, batch
        self._mask = np.ones((batch, capacity), np.int64)
        self._takes, self._dtypes = takes, dtypes or {}
        self._names = ["logits", *(n.replace("past_key_values.", "present.", 1) for n in past)]
        self._past: dict[str, Any] = {n: self._value(array) for n, array in past.items()}

    def prefill(self, input_ids: IntArray) -> FloatArray:
        """Feed a prompt (S,), in a batch (B, S), or more of it; logits (vocabulary,) after its last token, in
        a batch (B, vocabulary)."""
        ids = rows(input_ids, self._batch)
        tokens.check_ids(ids, self._vocabulary)
        before, self._length = self._length, _room(self._length, ids.shape[1], self._capacity)
        made = {
            "input_ids": ids,
            "attention_mask": self._mask[:, : self._length],
            "position_ids": np.broadcast_to(np.arange(before, self._length), ids.shape),
            "logit_positions": np.arange(1, self._batch + 1) * ids.shape[1] - 1,
            "num_logits_to_keep": np.array(1),
        }
        feeds = {
            name: self._value(np.ascontiguousarray(array, self._dtypes.get(name, np.int64)))
            for name, array in made.items()
            if name in self._takes
        }
        logits, *present = self._session.run_with_ort_values(self._names, {**feeds, **self._past})
        self._past = dict(zip(self._past, present, strict=True))
        found = logits.numpy()  # (B, S, vocabulary), or of the last position only, or (B, vocabulary)
        last = _float(found.reshape(self._batch, -1, found.shape[-1])[:, -1])
        return last if self._batch > 1 else last[0]

    def step(self, token: "int | IntArray") -> FloatArray:
        """Feed one token, in a batch (B,); logits (vocabulary,), in a batch (B, vocabulary), after it."""
        return self.prefill(np.asarray(token).reshape(self._batch, 1))


def open_session(
    file: Path,
    *,
    threads: int,
    spin: bool = True,
    trace: Path | None = None,
    chosen: custom.Chosen | None = None,
    exact: bool = False,
) -> Session:
    """An ONNX Runtime session on the CPU. threads: at least 1. The file must have been found safe before.

    trace: beginning of the name of a file for ONNX Runtime's own profile, which `end_profiling` closes and
    names; None: not profiled. chosen, exact: of an export, see `custom.configure`.
    Raises DeviceError if this ONNX Runtime has no implementation for an operation, ArtifactError otherwise.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    if chosen is not None:
        custom.configure(options, chosen, exact=exact)
    if trace is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(trace)
    _read_ahead(file.with_name(DATA))
    try:
        session: Session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # a class of its own for each status code, of a module without types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        if type(error).__name__ == "NotImplemented":
            raise DeviceError(f"ONNX Runtime {ort.__version__} cannot run `{file}`: {reason}") from None
        raise ArtifactError(f"ONNX Runtime {ort.__version__} cannot load `{file}`: {reason}") from None
    if chosen is not None:
        custom.loaded(chosen)
    return session


def _read_ahead(data: Path) -> None:
    """Have the system read the weights already: they are mapped, and faults fetch them in pieces otherwise
    (measured on a cold file of 677 MB: 2.3 s to open it, so 0.5)."""
    if hasattr(os, "posix_fadvise") and data.is_file():
        with data.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


@dataclass(frozen=True)
class Generated:
    """tokens: the new ones, the end token included if it came. ttft_s: until the first was known.

    step_times: seconds of each further token. stop: `eos` or `length`.
    """

    tokens: tuple[int, ...]
    ttft_s: float
    step_times: tuple[float, ...]
    stop: str

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed, the prompt left out; None if nothing was decoded after the first token."""
        total = sum(self.step_times)
        return len(self.step_times) / total if total > 0 else None


def generate(
    model: "Runnable", ids: Sequence[int], max_new_tokens: int, eos: Collection[int] = ()
) -> Generated:
    """Greedy continuation of `ids`: the most probable token each time, the lowest id among equals.

    Stops after a token of `eos` or `max_new_tokens`. Raises UsageError if prompt and new tokens exceed the
    context, or if there is no prompt.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    state = model.start(len(ids) + max_new_tokens)
    began = time.perf_counter()
    token = int(state.prefill(np.array(ids, np.int64)).argmax())
    last = time.perf_counter()
    tokens, ttft, steps = [token], last - began, []
    while token not in eos and len(tokens) < max_new_tokens:
        token = int(state.step(token).argmax())
        now = time.perf_counter()
        steps.append(now - last)
        last = now
        tokens.append(token)
    return Generated(tuple(tokens), ttft, tuple(steps), "eos" if token in eos else "length")


def rows(input_ids: IntArray, batch: int) -> IntArray:
    """(S,) or (B, S) as (B, S). Raises UsageError if these are not `batch` sequences."""
    ids: IntArray = np.array(input_ids, np.int64, ndmin=2)
    if len(ids) != batch:
        raise UsageError(f"{len(ids)} prompts were given to a batch of {batch}")
    return ids


def _room(length: int, more: int, capacity: int) -> int:
    if length + more > capacity:
        raise UsageError(f"{length + more} tokens are more than the {capacity} that there is room for")
    return length + more


def _check_padding(mask: IntArray) -> None:
    """Rows of ones, then zeros: the attention kernel only ever sees how long a row is."""
    if mask.size and (not (mask[:, 0] == 1).all() or (np.diff(mask, axis=1) > 0).any()):
        raise UsageError("attention_mask is not padded on the right, or a row is empty")


def _at(states: Any, positions: IntArray) -> FloatArray:  # noqa: ANN401
    """Rows (N, width) of (B, S, width) at flat positions."""
    rows: FloatArray = _float(states).reshape(-1, states.shape[-1])[positions]
    return rows


def _float(array: Any) -> FloatArray:  # noqa: ANN401 - what ONNX Runtime returns
    found: FloatArray = np.asarray(array, np.float32)
    return found
