"""Weights of a layer -> one packed matrix (kernels/nm_matmul), and back under their original names."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgesft.core.errors import ArtifactError
from edgesft.exporters.external import Array
from edgesft.exporters.weights import FloatArray
from edgesft.kernels.nm_matmul import layout
from edgesft.kernels.nm_matmul.scales import codes, search_scales

Stored = tuple[int, int, layout.Halves]  # bits, group and scales (rows, groups) that a weight came with


def is_sparse(weight: FloatArray) -> bool:
    """Whether no aligned group of four inputs has more than two weights that are not 0."""
    try:
        layout.check_pattern(weight)
    except layout.NotPacked:
        return False
    return True


def group_of(group: int, sparse: bool) -> int:
    """Columns that share a scale where an export was asked for groups of `group` weights.

    2:4 keeps every second of them: as many weights lie in twice the columns.
    """
    return max(layout.COLUMNS, 2 * group if sparse else group)


def pack(
    parts: Sequence[FloatArray],
    bits: int,
    group: int,
    *,
    sparse: bool,
    interleaved: bool,
    stored: Sequence[Stored | None] = (),
) -> layout.Packed:
    """Matrices (rows, columns) end to end, or, `interleaved`, by turns of 16 rows, quantised and packed.

    stored: scales that come with the weights, which then are whole codes of them.
    """
    known = list(stored) if stored and all(s is not None and s[0] == bits for s in stored) else []
    if known and len({s[1] for s in known if s is not None}) == 1:
        return _at_scales(parts, [s for s in known if s is not None], sparse, interleaved)
    weight: FloatArray = join(parts, interleaved)
    unit = _unit(weight)
    weight = np.divide(weight, np.float32(unit), dtype=np.float32)
    scales = search_scales(weight, bits, group)
    found = codes(weight, scales, bits, group)
    return layout.pack_codes(found, scales, f"int{bits}", group, sparse=sparse, unit=unit)


def _at_scales(
    parts: Sequence[FloatArray], stored: Sequence[Stored], sparse: bool, interleaved: bool
) -> layout.Packed:
    bits, group, _ = stored[0]
    scales = join([s[2] for s in stored], interleaved)
    found = codes(join(parts, interleaved), scales, bits, group)
    return layout.pack_codes(found, scales, f"int{bits}", group, sparse=sparse)


def _unit(weight: FloatArray) -> float:
    """A power of two that brings scales to the middle of what fp16 holds."""
    most = float(np.abs(weight).max(initial=0.0))
    return 2.0 ** math.frexp(most)[1] if most > 0 else 1.0


def join(parts: Sequence[Array], interleaved: bool) -> Array:
    """Rows end to end, or by turns of 16: the first 16 of each part, the second 16..."""
    if not interleaved:
        return np.concatenate(parts)
    cut = np.stack([p.reshape(-1, layout.ROWS, p.shape[1]) for p in parts], axis=1)
    return cut.reshape(-1, cut.shape[-1])


def entry(packed: layout.Packed, place: Mapping[str, Any]) -> dict[str, Any]:
    """What export.json says of a weight that is a part of `packed`; place: its initializers and rows."""
    return {
        **place,
        "bits": {"int4": 4, "int8": 8}[packed.value],
        "inputs": packed.columns,
        "packed": {
            "rows": packed.rows,
            "columns": packed.columns,
            "pattern": "2:4" if packed.sparse else "dense",
            "value": packed.value,
            "group": packed.group,
            "unit": packed.unit,
            "version": layout.VERSION,
        },
    }


def read(about: Mapping[str, Any], stream: Array, scales: Array) -> layout.Packed:
    """The matrix that an entry of export.json describes. Raises ArtifactError for one that is broken."""
    try:
        said = about["packed"]
        if said["version"] != layout.VERSION:
            raise ArtifactError(
                f"packed weights of format {said['version']}, this EdgeSFT reads {layout.VERSION}",
                "upgrade edgesft, or export the model again",
            )
        found = layout.Packed(
            int(said["rows"]),
            int(said["columns"]),
            said["pattern"] == "2:4",
            str(said["value"]),
            int(said["group"]),
            float(said["unit"]),
            np.asarray(stream),
            np.asarray(scales),
        )
        layout.check(found)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"a packed weight of export.json is broken: {error}") from None
    return found


def rows_of(whole: Array, about: Mapping[str, Any]) -> Array:
    """The rows of one weight out of what `join` made."""
    start, stop = about["rows"]
    if "turn" not in about:
        return whole[start:stop]
    parts = int(about["parts"])
    cut = whole.reshape(-1, parts, layout.ROWS, whole.shape[1])[:, int(about["turn"])]
    return np.ascontiguousarray(cut).reshape(-1, whole.shape[1])
