"""N:M patterns beside 2:4: they come back as they went in, and are multiplied as what the kernels know."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesft.kernels.nm_matmul import cpu, layout, library, ort_op, patterns, reference, torch_op
from edgesft.kernels.nm_matmul.layout import NotPacked

from .packs import PATTERNS, matrix, patterned, prune, shape

OTHERS = [name for name in PATTERNS if name != "2:4"]


def test_every_quarter_of_four_eight_and_sixteen():
    assert sorted(patterns.PATTERNS) == sorted(PATTERNS)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_codes_come_back_as_they_went_in(data):
    value, pattern = data.draw(st.sampled_from(["int4", "int8"])), data.draw(st.sampled_from(PATTERNS))
    rows, columns = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 150))
    group = data.draw(st.sampled_from([0, 32, 64]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    low, high = layout.LIMITS[value]
    whole = prune(rng.integers(low, high + 1, (rows, columns)).astype(np.int8), *shape(pattern))
    whole[rng.random(whole.shape) < 0.2] = 0  # groups with less than N weights
    scales = rng.standard_normal((rows, layout.groups(columns, group))).astype(np.float16)
    packed = layout.pack_codes(whole, scales, value, group, sparse=True, unit=0.25, pattern=pattern)
    layout.check(packed)
    assert np.array_equal(layout.codes_of(packed), whole)
    assert np.array_equal(layout.scales_of(packed), scales)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_numbers_come_back_bit_by_bit(data):
    value, pattern = data.draw(st.sampled_from(["fp16", "bf16"])), data.draw(st.sampled_from(PATTERNS))
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 100))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    bits = prune(rng.integers(1, 0x7C00, (rows, columns)).astype(np.uint16), *shape(pattern))
    packed = layout.pack_numbers(bits, value, pattern)
    layout.check(packed)
    assert np.array_equal(layout.bits_of(packed), bits)


@pytest.mark.parametrize(
    ("pattern", "int4", "int8", "bf16"),
    [
        ("1:4", 1.5, 2.5, 4.5),
        ("2:4", 3, 5, 9),
        ("3:4", 4, 7, 13),
        ("2:8", 1.75, 2.75, 4.75),
        ("4:8", 3, 5, 9),
        ("6:8", 4, 7, 13),
        ("4:16", 2, 3, 5),
        ("8:16", 3, 5, 9),
        ("12:16", 4, 7, 13),
    ],
)
def test_bits_a_weight(pattern, int4, int8, bf16):
    for value, bits in (("int4", int4), ("int8", int8), ("bf16", bf16)):
        assert layout.tile_bytes(pattern, value) * 8 == bits * layout.ROWS * layout.COLUMNS


def test_a_mask_by_hand():
    """4:8: row 2 keeps columns 1, 3, 4, 6 of its first group; the mask is shorter than four places."""
    whole = np.zeros((16, 32), np.int8)
    whole[2, [1, 3, 4, 6]] = [1, 2, -3, 4]
    packed = layout.pack_codes(whole, np.ones((16, 1), np.float16), "int4", 0, sparse=True, pattern="4:8")
    index, planes = packed.stream[:64].reshape(16, 4), packed.stream[64:].reshape(2, 16, 4)
    assert index[2].tolist() == [0b01011010, 0b00001111, 0b00001111, 0b00001111]
    assert index[3].tolist() == [0b00001111] * 4  # an empty group keeps its first columns
    assert planes[0, 2].tolist() == [0x89, 0x8A, 0x85, 0x8C]  # codes + 8; plane 1 is the second group
    assert (planes[1] == 0x88).all()


def test_places_by_hand():
    """2:8: three bits a place, the lower place first; four groups make 24 bits."""
    whole = np.zeros((16, 32), np.int8)
    whole[0, [2, 7]] = [5, -6]
    packed = layout.pack_codes(whole, np.ones((16, 1), np.float16), "int8", 0, sparse=True, pattern="2:8")
    index, planes = packed.stream[:48].reshape(16, 3), packed.stream[48:].reshape(2, 16, 4)
    first, empty = 2 | 7 << 3, 0 | 1 << 3
    assert int.from_bytes(index[0].tobytes(), "little") == first | empty << 6 | empty << 12 | empty << 18
    assert planes[0, 0].tolist() == [133, 122, 128, 128]


def test_a_negative_zero_never_takes_the_place_of_a_weight():
    bits = np.zeros((16, 32), np.uint16)
    bits[:, :4] = [0x8000, 0x8000, 0x3C00, 0x4000]
    for pattern in PATTERNS[1:]:
        found = layout.bits_of(layout.pack_numbers(bits, "fp16", pattern))
        assert np.array_equal(found.view(np.float16), bits.view(np.float16))


def test_what_is_not_in_a_pattern_is_counted_and_found():
    weight = np.zeros((20, 32), np.int8)
    weight[7, 8:14] = 1
    ones = np.ones((20, 1), np.float16)
    with pytest.raises(NotPacked, match=r"not 4:8: 1 groups .* row 7, columns 8 to 15"):
        layout.pack_codes(weight, ones, "int4", 0, sparse=True, pattern="4:8")
    layout.pack_codes(weight, ones, "int4", 0, sparse=True, pattern="6:8")
    with pytest.raises(NotPacked, match="the pattern is '5:8', expected one of"):
        layout.pack_codes(weight, ones, "int4", 0, sparse=True, pattern="5:8")


@pytest.mark.parametrize("pattern", OTHERS)
def test_a_broken_index_is_refused(pattern):
    packed = patterned(np.random.default_rng(0), 32, 64, "int8", pattern, 32)
    found = patterns.find(pattern)
    stream = packed.stream.copy()
    stream[: 16 * found.row_bytes] = 0
    words = "does not name" if found.masked else "not in order"
    if found.n > 1:
        with pytest.raises(NotPacked, match=words):
            layout.check(dataclasses.replace(packed, stream=stream))
        with pytest.raises(NotPacked, match=words):
            layout.codes_of(dataclasses.replace(packed, stream=stream))
    with pytest.raises(NotPacked, match="a stream of"):
        layout.check(dataclasses.replace(packed, stream=packed.stream[:-1]))
    with pytest.raises(NotPacked, match="`sparse` is False"):
        layout.check(dataclasses.replace(packed, sparse=False))


def test_which_patterns_fit():
    rng = np.random.default_rng(0)
    for name in PATTERNS:
        weight = prune(rng.standard_normal((9, 77)).astype(np.float32), *shape(name))
        found = patterns.fits(weight)
        assert name in found
        for other in PATTERNS:
            try:
                patterns.check_pattern(weight, *shape(other))
            except NotPacked:
                assert other not in found
            else:
                assert other in found


@pytest.mark.parametrize("pattern", [*PATTERNS, "dense"])
@pytest.mark.parametrize("value", ["int4", "int8", "fp16", "bf16"])
def test_products_are_those_of_the_reference(value, pattern):
    if (value, pattern) in {("fp16", "dense"), ("bf16", "dense")}:
        pytest.skip("numbers of 16 bits have no dense tiles")
    rng = np.random.default_rng(1)
    packed = patterned(rng, 83, 100, value, pattern, 32 if value in layout.OFFSETS else 0)
    bias = torch.from_numpy(rng.standard_normal(83).astype(np.float32))
    x = rng.standard_normal((5, 100)).astype(np.float32)
    for level in (0, 4):
        made = torch_op.PackedLinear(packed, bias, level)
        expected = reference.linear(packed, x, bias=bias.numpy(), level=level)
        got = made(torch.from_numpy(x)).numpy()
        assert np.abs(got - expected).max() <= 2e-6 * np.abs(expected).max()
    assert np.allclose(made.weight.dequantize().numpy(), layout.dense(packed), rtol=1e-6, atol=0)


@pytest.mark.skipif(library.load() is None, reason="no compiled kernels on this machine")
def test_what_is_two_of_four_too_is_streamed_so():
    rng = np.random.default_rng(0)
    assert cpu.Weights(patterned(rng, 40, 64, "int4", "1:4")).packed.pattern == "2:4"
    assert cpu.Weights(patterned(rng, 40, 64, "bf16", "1:4")).packed.pattern == "2:4"
    assert cpu.Weights(patterned(rng, 40, 64, "int4", "4:8")).packed.pattern == "dense"
    plain = cpu.Weights(patterned(rng, 64, 64, "bf16", "4:8"))
    x = rng.standard_normal((3, 64)).astype(np.float32)
    more = {"norm": rng.standard_normal(64).astype(np.float32), "epsilon": 1e-5, "gate": True}
    expected = reference.linear(plain.packed, x, **more)
    assert np.allclose(plain.linear(x, **more), expected, rtol=1e-4, atol=1e-5)
    assert np.array_equal(plain.rows(np.array([3, 1])), layout.dense(plain.packed)[[3, 1]])


def test_onnx_runtime_does_not_get_what_it_lacks():
    packed = patterned(np.random.default_rng(0), 32, 64, "int4", "4:8", 32)
    with pytest.raises(NotPacked, match="not 4:8"):
        ort_op.attributes(packed)


def test_strips_of_a_matrix_are_matrices_on_the_same_memory():
    rng = np.random.default_rng(0)
    packed = matrix(rng, 70, 96, "int4", True, 32)
    some = layout.part(packed, 1, 3)
    assert some.rows == 32
    assert np.shares_memory(some.stream, packed.stream)
    assert np.array_equal(layout.dense(some), layout.dense(packed)[16:48])
    assert np.array_equal(layout.dense(layout.part(packed, 4, 5)), layout.dense(packed)[64:70])
