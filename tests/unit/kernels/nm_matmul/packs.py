"""Random packed matrices for the tests of this folder."""

import numpy as np

from edgesft.kernels.nm_matmul import layout

KINDS = [
    ("int4", True),
    ("int8", True),
    ("int4", False),
    ("int8", False),
    ("fp16", True),
    ("bf16", True),
]


def prune(weight, n=2, m=4):
    """The n largest of every m columns; what is left of a row's end counts as a group."""
    rows, columns = weight.shape
    four = np.pad(weight, ((0, 0), (0, -columns % m))).reshape(rows, -1, m)
    order = np.argsort(-np.abs(four.astype(np.float64)), axis=-1, kind="stable")[..., :n]
    kept = np.zeros_like(four)
    np.put_along_axis(kept, order, np.take_along_axis(four, order, -1), -1)
    return np.ascontiguousarray(kept.reshape(rows, -1)[:, :columns])


def codes(rng, rows, columns, value, sparse):
    low, high = layout.LIMITS[value]
    drawn = rng.integers(low, high + 1, (rows, columns)).astype(np.int8)
    return prune(drawn) if sparse else drawn


def matrix(rng, rows, columns, value, sparse, group=0, unit=0.5):
    if value in ("fp16", "bf16"):
        weight = prune(rng.standard_normal((rows, columns)).astype(np.float32))
        if value == "fp16":
            return layout.pack_numbers(weight.astype(np.float16).view(np.uint16), value)
        return layout.pack_numbers((weight.view(np.uint32) >> 16).astype(np.uint16), value)
    scales = (rng.standard_normal((rows, layout.groups(columns, group))) * 0.05).astype(np.float16)
    return layout.pack_codes(
        codes(rng, rows, columns, value, sparse), scales, value, group, sparse=sparse, unit=unit
    )


PATTERNS = ["1:4", "2:4", "3:4", "2:8", "4:8", "6:8", "4:16", "8:16", "12:16"]


def shape(pattern):
    n, m = pattern.split(":")
    return int(n), int(m)


def patterned(rng, rows, columns, value, pattern, group=0, unit=0.5):
    """A matrix of an N:M pattern, or a dense one."""
    if pattern == "dense":
        return matrix(rng, rows, columns, value, False, group, unit)
    if value in ("fp16", "bf16"):
        weight = prune(rng.standard_normal((rows, columns)).astype(np.float32), *shape(pattern))
        half = weight.astype(np.float16).view(np.uint16)
        bits = half if value == "fp16" else (weight.view(np.uint32) >> 16).astype(np.uint16)
        return layout.pack_numbers(bits, value, pattern)
    low, high = layout.LIMITS[value]
    whole = prune(rng.integers(low, high + 1, (rows, columns)).astype(np.int8), *shape(pattern))
    scales = (rng.standard_normal((rows, layout.groups(columns, group))) * 0.05).astype(np.float16)
    return layout.pack_codes(whole, scales, value, group, sparse=True, unit=unit, pattern=pattern)
