"""Packed matrices in safetensors files: read in place, checked before use."""

import json
import struct

import numpy as np
import pytest
import torch

from edgesft.core.errors import ArtifactError
from edgesft.core.weights import Planned, Weights, write_file
from edgesft.kernels.nm_matmul import file, layout, packer
from edgesft.kernels.nm_matmul.layout import NotPacked

from .packs import PATTERNS, patterned, prune, shape


def write(path, matrices, *, about=None, extra=(), version=layout.VERSION, change=None):
    """A file with these matrices and plain tensors. change: {tensor: array or None}."""
    tensors = {}
    for name, packed in matrices.items():
        tensors[name + file.STREAM] = packed.stream
        if packed.scales.size:
            tensors[name + file.SCALES] = packed.scales
    tensors |= {name: np.ones(3, np.float32) for name in extra}
    tensors |= change or {}
    held = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items() if array is not None}
    kinds = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}
    plan = [Planned(name, kinds[t.dtype], tuple(t.shape)) for name, t in held.items()]
    said = {name: file.describe(packed, "BF16") | (about or {}) for name, packed in matrices.items()}
    text = {file.KEY: json.dumps({"version": version, "matrices": said})}
    write_file(path, plan, held.__getitem__, text)
    return path


@pytest.fixture
def packed():
    return patterned(np.random.default_rng(0), 40, 96, "int4", "2:4", 32)


def test_what_is_written_is_read(tmp_path):
    rng = np.random.default_rng(0)
    matrices = {f"a.{p}": patterned(rng, 40, 96, "int8", p, 32) for p in [*PATTERNS, "dense"]}
    matrices["b"] = patterned(rng, 33, 70, "bf16", "4:8")
    found = file.Matrices(Weights(write(tmp_path / "x.safetensors", matrices, extra=("norm",))))
    assert set(found) == set(matrices)
    assert found.dtypes["b"] == "BF16"
    for name, packed in matrices.items():
        assert found.shape(name) == (packed.rows, packed.columns)
        assert np.array_equal(layout.dense(found[name]), layout.dense(packed))
        assert found[name].pattern == packed.pattern


def test_nothing_is_copied(tmp_path, packed):
    weights = Weights(write(tmp_path / "x.safetensors", {"w": packed}))
    found = file.Matrices(weights)["w"]
    mapping = weights.mapped("w" + file.STREAM)
    assert found.stream.ctypes.data == mapping.ctypes.data
    assert found.scales.ctypes.data == weights.mapped("w" + file.SCALES).ctypes.data
    base = found.stream
    while isinstance(base.base, np.ndarray):
        base = base.base
    assert type(base.base).__name__ == "mmap"
    before = (tmp_path / "x.safetensors").read_bytes()
    found.stream[0] ^= 255  # a private mapping: the file does not change
    assert (tmp_path / "x.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("about", "words"),
    [
        ({"rows": 56}, "a stream of"),
        ({"rows": "40"}, "`rows` is '40', expected a whole number"),
        ({"rows": True}, "expected a whole number"),
        ({"columns": -3}, "a matrix of 40 x -3"),
        ({"pattern": "5:8"}, "the pattern is '5:8'"),
        ({"pattern": "4:8"}, "does not name 4 places"),
        ({"pattern": 3}, "the pattern is '3'"),
        ({"value": "int3"}, "`value` is 'int3'"),
        ({"value": "fp16"}, "fp16 has no scales"),
        ({"group": 48}, "multiple of 32"),
        ({"unit": "x"}, "`unit` is 'x'"),
        ({"unit": float("inf")}, "`unit` is inf"),
    ],
)
def test_a_broken_description_is_refused(tmp_path, packed, about, words):
    found = file.Matrices(Weights(write(tmp_path / "x.safetensors", {"w": packed}, about=about)))
    with pytest.raises(ArtifactError, match=words) as caught:
        found["w"]
    assert "edgesft convert" in caught.value.hint


@pytest.mark.parametrize(
    ("tensor", "array", "words"),
    [
        (".nm_stream", None, "there is no `w.nm_stream`"),
        (".nm_stream", np.zeros(64, np.uint8), "a stream of 64 bytes, expected"),
        (".nm_stream", np.zeros((9, 192), np.uint8), "expected a row of U8"),
        (".nm_stream", np.zeros(3 * 3 * 192, np.uint8), "not in order"),
        (".nm_scales", None, "there is no `w.nm_scales`"),
        (".nm_scales", np.zeros(7, np.float16), "7 scales, expected 144"),
        (".nm_scales", np.full(144, np.inf, np.float16), "scale is not finite"),
        (".nm_scales", np.zeros(144, np.float32), "expected a row of F16"),
    ],
)
def test_broken_tensors_are_refused(tmp_path, packed, tensor, array, words):
    path = write(tmp_path / "x.safetensors", {"w": packed}, change={"w" + tensor: array})
    with pytest.raises(ArtifactError, match=words):
        file.Matrices(Weights(path))["w"]


def test_another_version_names_the_next_step(tmp_path, packed):
    path = write(tmp_path / "x.safetensors", {"w": packed}, version=2)
    with pytest.raises(ArtifactError, match="packed weights of version 2, this EdgeSFT reads 1") as caught:
        file.Matrices(Weights(path))
    assert "upgrade" in caught.value.hint


def test_what_does_not_belong_together_is_refused(tmp_path, packed):
    both = write(tmp_path / "a.safetensors", {"w": packed}, extra=("w",))
    with pytest.raises(ArtifactError, match="holds `w` packed and plain"):
        file.Matrices(Weights(both))
    stray = write(tmp_path / "b.safetensors", {"w": packed}, change={"v.nm_scales": np.zeros(3, np.float16)})
    with pytest.raises(ArtifactError, match=r"`v\.nm_scales`, which nothing describes"):
        file.Matrices(Weights(stray))
    data = both.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    text = data[8 : 8 + length].replace(b"matrices", b"matricez")
    both.write_bytes(data[:8] + text + data[8 + length :])
    with pytest.raises(ArtifactError, match=r"metadata `nm-packed` of .* are broken"):
        file.Matrices(Weights(both))


def test_a_truncated_file_is_refused(tmp_path, packed):
    path = write(tmp_path / "x.safetensors", {"w": packed})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="truncated"):
        Weights(path)


# ---------------------------------------------------------------- float matrices, packed


def weight(pattern="2:4", rows=48, columns=96, seed=0):
    drawn = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    return drawn if pattern == "dense" else prune(drawn, *shape(pattern))


def test_the_smallest_pattern_is_chosen():
    assert packer.best(weight("dense"), "int4") == "dense"
    assert packer.best(weight("dense"), "bf16") is None
    assert packer.best(weight("2:4"), "int4") == "2:4"
    assert packer.best(weight("4:8"), "int4") == "4:8"
    assert packer.best(weight("1:4"), "int4") == "1:4"
    assert packer.best(weight("6:8"), "int4") == "dense"  # its index eats what four bits save
    assert packer.best(weight("6:8"), "int8") == "6:8"
    assert packer.best(np.zeros((3, 40), np.float32), "int4") == "1:4"


@pytest.mark.parametrize("pattern", [*PATTERNS, "dense"])
def test_packing_rounds_and_keeps_zeros(pattern):
    given = weight(pattern) * 1e-6
    for value, most in (("int4", 0.12), ("int8", 0.01), ("fp16", 1e-3), ("bf16", 3e-3)):
        if pattern == "dense" and value in ("fp16", "bf16"):
            continue
        scale = 1e6 if value == "fp16" else 1.0  # 1e-6 is nearly nothing in fp16
        packed = packer.pack(given * scale, value, 32 if value in layout.OFFSETS else 0, pattern)
        assert (layout.dense(packed)[given == 0] == 0).all()
        changed, total = packer.error(given * scale, packed)
        assert np.sqrt(changed / total) < most


def test_numbers_are_rounded_to_the_nearest():
    given = weight()
    for value, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        expected = torch.from_numpy(given).to(dtype).float().numpy()
        assert np.array_equal(layout.dense(packer.pack(given, value, 0, "2:4")), expected)


@pytest.mark.parametrize("columns", [256, 200])
def test_finer_groups_of_the_same_weights(columns):
    rng = np.random.default_rng(0)
    for group in (128, 0):
        packed = patterned(rng, 40, columns, "int4", "2:4", group)
        for finer in (32, 64, 128):
            found = packer.regroup(packed, finer)
            layout.check(found)
            assert found.group == finer
            assert np.array_equal(layout.dense(found), layout.dense(packed))
    assert packer.regroup(patterned(rng, 40, columns, "int4", "2:4", 64), 128) is None
    assert packer.regroup(patterned(rng, 40, columns, "int4", "2:4", 64), 0) is None


def test_weights_that_cannot_be_packed_are_refused():
    with pytest.raises(NotPacked, match="not finite"):
        packer.pack(np.full((4, 4), np.nan, np.float32), "int4", 32, "dense")
    with pytest.raises(NotPacked, match="beyond fp16, try bf16"):
        packer.pack(np.eye(16, 32, dtype=np.float32) * 1e5, "fp16", 0, "2:4")
    with pytest.raises(NotPacked, match="beyond bf16"):
        packer.pack(np.eye(16, 32, dtype=np.float32) * np.float32(3.4e38), "bf16", 0, "2:4")
    with pytest.raises(NotPacked, match="not 2:4"):
        packer.pack(weight("dense"), "int4", 32, "2:4")
    with pytest.raises(NotPacked, match="'int2'"):
        packer.pack(weight(), "int2", 32, "2:4")
