"""Checkpoints of compressed-tensors in the format `marlin-24`: 2:4 int4 and int8, laid out for a GPU.

A matrix `X.weight` (out, in) is three tensors. `X.weight_packed` (in / 32, ...) int32: codes of the kept
weights, plus half their range, several to a word, in tiles of 16 x 16 whose entries are permuted by 1024.
`X.meta` (in / 32, 2 out) int16: places of the kept weights, two bits each, in the order of CUTLASS.
`X.scale_packed` (groups, out) fp16. Read only: nothing here writes it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from edgesft.core import catalog
from edgesft.core.errors import ArtifactError
from edgesft.core.weights import Weights

if TYPE_CHECKING:
    import numpy.typing as npt

FORMAT: Final = "marlin-24"
PARTS: Final = (".weight_packed", ".meta", ".scale_packed")
WEIGHT: Final = ".weight"
GROUP: Final = 128  # the only one that the format has, beside whole rows
_TYPES: Final = {".weight_packed": "I32", ".meta": "I16", ".scale_packed": "F16"}


@dataclass(frozen=True)
class Scheme:
    """bits of a code, 4 or 8; group: inputs that share a scale, 0 for all."""

    bits: int
    group: int


def scheme(about: Mapping[str, Any]) -> Scheme:
    """What a `quantization_config` says. Raises ArtifactError for what the format cannot mean."""
    found = set()
    for each in (about.get("config_groups") or {}).values():
        weights = each.get("weights") if isinstance(each, Mapping) else None
        if not isinstance(weights, Mapping) or each.get("input_activations"):
            raise ArtifactError(f"`{FORMAT}` is for weights alone, its config says {each!r}")
        group = weights.get("group_size") if weights.get("strategy") == "group" else 0
        fit = weights.get("type", "int") == "int" and weights.get("symmetric", True)
        if not fit or weights.get("num_bits") not in (4, 8) or group not in (0, GROUP):
            raise ArtifactError(
                f"`{FORMAT}` has symmetric int4 and int8 in groups of {GROUP}, not {weights!r}"
            )
        found.add(Scheme(int(weights["num_bits"]), int(group)))
    if len(found) != 1:
        raise ArtifactError(f"`{FORMAT}` needs one scheme for all weights, its config has {len(found)}")
    return found.pop()


class Marlin24(Mapping[str, Any]):
    """The matrices of a folder by the names of their weights, as `kernels.nm_matmul.layout.Packed`.

    Codes and scales stay what they are. Raises ArtifactError for a matrix whose parts do not go together.
    """

    def __init__(self, weights: Weights, how: Scheme) -> None:
        self._weights, self._how = weights, how
        bases = dict.fromkeys(
            name.removesuffix(part) for name in weights for part in PARTS if name.endswith(part)
        )
        self._shapes = {base + WEIGHT: self._shape(base) for base in bases}
        self.dtypes = dict.fromkeys(self._shapes, "F16")

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, int]:
        return self._shapes[name]

    def value(self, name: str) -> str:
        """`int4` or `int8`."""
        return f"int{self._how.bits}"

    def nbytes(self, name: str) -> int:
        infos = [self._weights.info(name.removesuffix(WEIGHT) + part) for part in PARTS]
        return sum(info.end - info.start for info in infos)

    def _shape(self, base: str) -> tuple[int, int]:
        for part, kind in _TYPES.items():
            if base + part not in self._weights:
                raise self._broken(base, f"there is no `{base}{part}`")
            info = self._weights.info(base + part)
            if info.dtype != kind or len(info.shape) != 2:
                raise self._broken(base, f"`{base}{part}` is {info.dtype} {list(info.shape)}")
        if base + WEIGHT in self._weights:
            raise self._broken(base, "it is there plain as well")
        words, meta, scales = (self._weights.shape(base + part) for part in PARTS)
        columns, rows = 32 * words[0], words[1] * (32 // self._how.bits) // 16
        groups = columns // self._how.group if self._how.group else 1
        fit = rows and columns and rows % 64 == 0 and columns % max(32, self._how.group) == 0
        if not fit or words[1] * 32 != rows * 16 * self._how.bits:
            raise self._broken(base, f"{list(words)} words are no matrix")
        if meta != (columns // 32, 2 * rows) or scales != (groups, rows):
            raise self._broken(
                base, f"places {list(meta)} and scales {list(scales)} are not of a matrix {rows} x {columns}"
            )
        return rows, columns

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - layout.Packed, which core does not import
        rows, columns = self._shapes[name]
        base = name.removesuffix(WEIGHT)
        words, meta, scales = (self._weights.get(base + part).numpy() for part in PARTS)
        kept = _kept(words.view(np.uint32), rows, columns, self._how.bits)
        if self._how.bits == 8 and kept.min() < -127:
            raise self._broken(base, "it has the code -128, which int8 here has not")
        places = _places(meta.view(np.uint16).reshape(-1), rows, columns)
        if (places[..., 0] >= places[..., 1]).any():
            raise self._broken(base, "two places of a group of four are not in order")
        codes = np.zeros((rows, columns // 4, 4), np.int8)
        np.put_along_axis(codes, places, kept.reshape(rows, -1, 2), axis=-1)
        layout = catalog.runtime("kernels.nm_matmul.layout")
        try:
            return layout.pack_codes(
                codes.reshape(rows, columns),
                _scales(scales, columns, self._how.group),
                self.value(name),
                self._how.group,
                sparse=True,
            )
        except ValueError as error:
            raise self._broken(base, str(error)) from None

    def _broken(self, base: str, reason: str) -> ArtifactError:
        return ArtifactError(f"`{base}` in `{self._weights.path}` is no {FORMAT} weight: {reason}")


def _kept(words: "npt.NDArray[np.uint32]", rows: int, columns: int, bits: int) -> "npt.NDArray[np.int8]":
    """Codes (rows, columns / 2) of the kept weights."""
    fields = np.arange(0, 32, bits, dtype=np.uint32)
    stored = (words[:, :, None] >> fields) & np.uint32((1 << bits) - 1)
    permuted = stored.reshape(-1, 1024)
    tiles = np.empty_like(permuted)
    tiles[:, _permutation(bits)] = permuted
    tall = tiles.reshape(columns // 32, rows // 16, 16, 16).transpose(0, 2, 1, 3).reshape(-1, rows)
    return np.ascontiguousarray((tall.astype(np.int16) - (1 << bits - 1)).astype(np.int8).T)


def _permutation(bits: int) -> "npt.NDArray[np.int64]":
    """Where each entry of 16 rows and 64 columns of tiles comes from."""
    thread, column, half, pair, odd = np.ix_(*map(np.arange, (32, 4, 2, 2, 2)))
    row = 2 * (thread % 4) + 8 * pair + odd
    # eight columns of four threads each; two of them make a tile
    from_ = 16 * row + 256 * (thread // 8) + 8 * (thread // 4 % 2) + 4 * half + column
    order = [0, 2, 4, 6, 1, 3, 5, 7] if bits == 4 else [0, 2, 1, 3]
    return from_.reshape(-1, len(order))[:, order].reshape(-1)


def _places(meta: "npt.NDArray[np.uint16]", rows: int, columns: int) -> "npt.NDArray[np.int64]":
    """Places (rows, columns / 4, 2) of the kept weights; a word has those of four groups."""
    row, word = np.ix_(np.arange(rows), np.arange(columns // 16))
    at = row // 64 * 64 + row % 2 * 2 + row % 8 // 4 + row % 4 // 2 * 32 + row % 64 // 8 * 4
    swap = ((at % 2 == 0) & (word % 2 == 1)).astype(np.int64) - ((at % 2 == 1) & (word % 2 == 0))
    at, word = at + swap, word - swap
    found = meta[word // 2 * (2 * rows) + at * 2 + word % 2].astype(np.int64)
    places: npt.NDArray[np.int64] = (found[..., None] >> np.arange(0, 16, 2) & 3).reshape(rows, -1, 2)
    return places


def _scales(stored: "npt.NDArray[np.float16]", columns: int, group: int) -> "npt.NDArray[np.float16]":
    """Scales (rows, groups)."""
    found = stored
    if group and group < columns // 2:  # where it is not, the format leaves them in order
        order = (8 * np.arange(8)[:, None] + [0, 4, 1, 5, 2, 6, 3, 7]).reshape(-1)
        found = np.empty_like(stored).reshape(-1, 64)
        found[:, order] = stored.reshape(-1, 64)
        found = found.reshape(stored.shape)
    return np.ascontiguousarray(found.T)
