"""Packed products by the compiled kernels, called through ctypes on memory of numpy or torch."""

import ctypes
import functools
from typing import ClassVar, Final

import numpy as np

from edgesft.kernels import native
from edgesft.kernels.nm_matmul import layout, library, reference
from edgesft.kernels.nm_matmul.layout import DENSE, TWO_FOUR, Floats, NotPacked, Packed

LEVELS: Final = (0, 4)


class _Given(ctypes.Structure):  # struct Given of linear.h
    _fields_: ClassVar = [
        ("stream", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("stream_bytes", ctypes.c_int64),
        ("scale_count", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("sparse", ctypes.c_int32),
        ("value", ctypes.c_int32),
        ("unit", ctypes.c_float),
    ]


class _Call(ctypes.Structure):  # struct Call of linear.h
    _fields_: ClassVar = [
        ("x", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("gate", ctypes.c_int32),
        ("level", ctypes.c_int32),
    ]


@functools.cache
def functions() -> ctypes.CDLL:
    """The library with the types of its functions. Raises DeviceError where there is none."""
    library.path()
    found = library.load()
    assert found is not None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    found.edgesft_nm_isa.restype = ctypes.c_char_p
    found.edgesft_nm_select.argtypes = [ctypes.c_char_p]
    found.edgesft_nm_problem.argtypes, found.edgesft_nm_problem.restype = [pointer], ctypes.c_char_p
    found.edgesft_nm_buffer.argtypes, found.edgesft_nm_buffer.restype = [size], pointer
    found.edgesft_nm_release.argtypes, found.edgesft_nm_release.restype = [pointer], None
    found.edgesft_nm_bytes.argtypes, found.edgesft_nm_bytes.restype = [pointer], size
    found.edgesft_nm_load.argtypes, found.edgesft_nm_load.restype = [pointer, pointer], None
    found.edgesft_nm_linear.argtypes = [pointer, pointer, pointer, pointer, ctypes.c_uint]
    found.edgesft_nm_rows.argtypes = [pointer, pointer, pointer, ctypes.c_int64, pointer]
    found.edgesft_nm_rows.restype = None
    found.edgesft_nm_read.argtypes, found.edgesft_nm_read.restype = [pointer, size], ctypes.c_uint64
    return found


def instruction_set() -> str:
    """What the kernels use on this machine: avx512, avx2, neon_dot, neon or generic."""
    name: bytes = functions().edgesft_nm_isa()
    return name.decode()


def choose(name: str) -> bool:
    """Use another instruction set from now on; False, and nothing changes, if this machine lacks it."""
    return bool(functions().edgesft_nm_select(name.encode()))


@functools.cache
def _team() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch brings along: its threads serve us too."""
    try:
        runtime = native.openmp_runtime(native.Compiler(("g++",), "g++"))
        if runtime is None:
            return None
        return ctypes.cast(ctypes.CDLL(str(runtime)).GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


class Weights:
    """A packed matrix in memory of the kernels, on huge pages. Raises NotPacked, DeviceError, MemoryError.

    A pattern that the kernels do not stream is 2:4 or dense here. Numbers of 16 bits in such a pattern have
    no kernel at all: they are multiplied as a float32 matrix by numpy.
    """

    def __init__(self, packed: Packed) -> None:
        layout.check(packed) if packed.pattern not in (TWO_FOUR, DENSE) else _check_sizes(packed)
        self._library = functions()
        self._memory: int | None = None
        self._floats: Floats | None = None
        streamed = layout.streamed(packed)
        if streamed is None:
            self._floats = layout.dense(packed)
        else:
            packed = streamed
        self.packed = packed
        if self._floats is None:
            self._load(packed)

    def _load(self, packed: Packed) -> None:
        stream = np.ascontiguousarray(packed.stream)
        scales = np.ascontiguousarray(packed.scales)
        self._given = _Given(
            stream.ctypes.data,
            scales.ctypes.data,
            stream.nbytes,
            scales.size,
            packed.rows,
            packed.columns,
            packed.group,
            int(packed.sparse),
            layout.VALUES.index(packed.value),
            packed.unit,
        )
        why = self._library.edgesft_nm_problem(ctypes.byref(self._given))
        if why is not None:
            raise NotPacked(why.decode())
        size = self._library.edgesft_nm_bytes(ctypes.byref(self._given))
        self._memory = self._library.edgesft_nm_buffer(size)
        if self._memory is None:
            raise MemoryError(f"no memory for {size:,} bytes of weights")
        self._library.edgesft_nm_load(ctypes.byref(self._given), self._memory)

    def __del__(self) -> None:
        if getattr(self, "_memory", None) is not None:
            self._library.edgesft_nm_release(self._memory)

    def call(
        self,
        x: int,
        y: int,
        m: int,
        *,
        bias: int | None = None,
        residual: int | None = None,
        norm: int | None = None,
        epsilon: float = 0.0,
        gate: bool = False,
        level: int = 4,
        threads: int = 1,
    ) -> None:
        """`reference.linear` on addresses of float32 memory, whose sizes are the caller's care.

        threads: of torch's OpenMP runtime; without one the call has a single one. Raises MemoryError.
        """
        if gate and self.packed.rows % (2 * layout.ROWS):
            raise ValueError(f"a gate needs a multiple of {2 * layout.ROWS} rows, not {self.packed.rows}")
        if level not in LEVELS:
            raise ValueError(f"level is {level}, expected one of {LEVELS}")
        if self._floats is not None:
            self._multiply(self._floats, (x, y, bias, residual, norm), m, epsilon=epsilon, gate=gate)
            return
        made = _Call(x, norm, bias, residual, y, m, epsilon, int(gate), level)
        team = _team() if threads > 1 else None
        if self._library.edgesft_nm_linear(
            ctypes.byref(self._given), self._memory, ctypes.byref(made), team, threads
        ):
            raise MemoryError("no memory for the rows of a packed product")

    def _multiply(
        self,
        weight: Floats,
        at: tuple[int, int, int | None, int | None, int | None],
        m: int,
        *,
        epsilon: float,
        gate: bool,
    ) -> None:
        """`call` for a matrix that no kernel streams. at: x, y, bias, residual, norm."""
        rows, columns = weight.shape
        width = rows // 2 if gate else rows
        shapes = ((m, columns), (m, width), (rows,), (m, width), (columns,))
        x, y, bias, residual, norm = (
            None if place is None else _view(place, shape) for place, shape in zip(at, shapes, strict=True)
        )
        assert x is not None
        assert y is not None
        y[...] = reference.product(
            weight, x, bias=bias, residual=residual, norm=norm, epsilon=epsilon, gate=gate, kind=np.float32
        )

    def linear(
        self,
        x: Floats,
        *,
        bias: Floats | None = None,
        residual: Floats | None = None,
        norm: Floats | None = None,
        epsilon: float = 0.0,
        gate: bool = False,
        level: int = 4,
        threads: int = 1,
    ) -> Floats:
        """y (m, rows), or (m, rows / 2) with `gate`; see `reference.linear`. Raises ValueError for sizes."""
        p = self.packed
        if x.ndim != 2 or x.shape[1] != p.columns:
            raise ValueError(f"x has the shape {x.shape}, expected (m, {p.columns})")
        width = p.rows // 2 if gate else p.rows
        y = np.empty((len(x), width), np.float32)
        arrays: dict[str, Floats] = {}
        for name, array, shape in (
            ("x", x, x.shape),
            ("bias", bias, (p.rows,)),
            ("residual", residual, y.shape),
            ("norm", norm, (p.columns,)),
        ):
            if array is None:
                continue
            if array.shape != shape:
                raise ValueError(f"{name} has the shape {array.shape}, expected {shape}")
            arrays[name] = np.ascontiguousarray(array, np.float32)
        at = {name: array.ctypes.data for name, array in arrays.items()}
        first = at.pop("x")
        if len(x):
            self.call(
                first, y.ctypes.data, len(x), epsilon=epsilon, gate=gate, level=level, threads=threads, **at
            )
        return y

    def rows(self, which: "np.typing.NDArray[np.int64]") -> Floats:
        """Rows (n, columns) of the matrix as floats. Raises IndexError."""
        which = np.ascontiguousarray(which, np.int64)
        if which.size and (which.min() < 0 or which.max() >= self.packed.rows):
            raise IndexError(f"a row beyond 0 .. {self.packed.rows - 1}")
        if self._floats is not None:
            return self._floats[which]
        y = np.empty((which.size, self.packed.columns), np.float32)
        self._library.edgesft_nm_rows(
            ctypes.byref(self._given), self._memory, which.ctypes.data, which.size, y.ctypes.data
        )
        return y


def _check_sizes(packed: Packed) -> None:
    """Raise NotPacked for what the layout does not have; the library itself checks the rest."""
    layout.sizes(packed.rows, packed.columns, packed.pattern, packed.value, packed.group)


def _view(address: int, shape: tuple[int, ...]) -> Floats:
    """float32 memory at an address as an array."""
    found = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(found, shape)


def read_bandwidth(megabytes: int = 128, rounds: int = 7) -> float:
    """Bytes a second that one thread reads from memory on huge pages: the roof of a decode step."""
    import statistics
    import time

    code, size = functions(), megabytes << 20
    memory = code.edgesft_nm_buffer(size)
    if memory is None:
        raise MemoryError(f"no memory for {megabytes} MB")
    ctypes.memset(memory, 1, size)
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        code.edgesft_nm_read(memory, size)
        seconds.append(time.perf_counter() - began)
    code.edgesft_nm_release(memory)
    return size / statistics.median(seconds)


class Native:
    """The compiled kernels, for everything that the layout holds."""

    op: ClassVar[str] = "nm_matmul"
    name: ClassVar[str] = "native"

    def fits(self, *_args: object, **_options: object) -> bool:
        return library.load() is not None

    def state(self) -> tuple[bool, str]:
        return library.state()
