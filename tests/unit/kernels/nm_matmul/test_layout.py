import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgesft.kernels.nm_matmul import layout
from edgesft.kernels.nm_matmul.layout import NotPacked

from .packs import KINDS, codes, matrix, prune


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_codes_and_scales_come_back_as_they_went_in(data):
    value, sparse = data.draw(st.sampled_from(KINDS[:4]))
    rows, columns = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 150))
    group = data.draw(st.sampled_from([0, 32, 64, 128]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    whole = codes(rng, rows, columns, value, sparse)
    scales = rng.standard_normal((rows, layout.groups(columns, group))).astype(np.float16)
    packed = layout.pack_codes(whole, scales, value, group, sparse=sparse, unit=0.25)
    layout.check(packed)
    assert np.array_equal(layout.codes_of(packed), whole)
    assert np.array_equal(layout.scales_of(packed), scales)
    wide = np.repeat(scales.astype(np.float32), group or columns, 1)[:, :columns]
    assert np.array_equal(layout.dense(packed), whole * (wide * np.float32(0.25)))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["fp16", "bf16"]), st.integers(1, 40), st.integers(1, 100), st.integers(0, 2**32))
def test_numbers_come_back_bit_by_bit(value, rows, columns, seed):
    rng = np.random.default_rng(seed)
    bits = prune(rng.integers(1, 0x7C00, (rows, columns)).astype(np.uint16))
    packed = layout.pack_numbers(bits, value)
    layout.check(packed)
    assert np.array_equal(layout.bits_of(packed), bits)


def test_sizes_of_the_format():
    rng = np.random.default_rng(0)
    packed = matrix(rng, 64, 256, "int4", True, 64)
    assert packed.stream.nbytes == 4 * 8 * 192
    assert packed.scales.size == 4 * 4 * 16
    assert packed.bits == 3.25
    assert matrix(rng, 64, 256, "int8", True, 0).bits == 5.0625
    assert matrix(rng, 64, 256, "int4", False, 32).bits == 4.5
    assert matrix(rng, 64, 256, "bf16", True).bits == 9.0


def test_a_tile_by_hand():
    """Row 3 keeps column 1 (weight -8) and column 2 (7); row 5 columns 28 (1) and 31 (2)."""
    whole = np.zeros((16, 32), np.int8)
    whole[3, 1], whole[3, 2], whole[5, 28], whole[5, 31] = -8, 7, 1, 2
    packed = layout.pack_codes(whole, np.ones((16, 1), np.float16), "int4", 0, sparse=True)
    index, low, high = packed.stream[:64], packed.stream[64:128], packed.stream[128:]
    # an empty group keeps its columns 0 and 1, both weights 0
    assert index[:4].tolist() == [0b00_00_00_00, 0b01_01_01_01] * 2
    assert index[12:16].tolist() == [0b00_00_00_01, 0b01_01_01_10, 0, 0b01010101]  # field 0: 1 and 2
    assert index[20:24].tolist() == [0, 0b01010101, 0b00_00_00_00, 0b11_01_01_01]  # field 3: 0 and 3
    assert low[12:14].tolist() == [0x80, 0x8F]  # codes + 8: plane 0 in the lower half, plane 1 is 0 + 8
    assert high[22:24].tolist() == [0x98, 0xA8]  # plane 3 in the upper half
    assert (low[:12] == 0x88).all()


def test_what_is_not_two_of_four_is_counted_and_found():
    weight = np.zeros((20, 16), np.int8)
    weight[7, 4:8] = 1
    weight[19, 13:16] = 1
    with pytest.raises(NotPacked, match=r"not 2:4: 2 groups .* first in row 7, columns 4 to 7"):
        layout.pack_codes(weight, np.ones((20, 1), np.float16), "int4", 0, sparse=True)
    odd = np.zeros((3, 7), np.int8)
    odd[2, 4:7] = 1
    with pytest.raises(NotPacked, match=r"1 groups .* row 2, columns 4 to 6"):
        layout.check_pattern(odd)
    with pytest.raises(NotPacked, match="not 2:4"):
        layout.pack_numbers(np.ones((16, 4), np.uint16), "fp16")


def test_minus_zero_is_a_zero():
    bits = np.full((16, 4), 0x8000, np.uint16)
    assert (layout.bits_of(layout.pack_numbers(bits, "bf16")) & 0x7FFF == 0).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stream": np.zeros(5, np.uint8)}, "a stream of 5 bytes, expected"),
        ({"scales": np.zeros(3, np.float16)}, "3 scales, expected"),
        ({"rows": 0}, "a matrix of 0 x 64"),
        ({"value": "int3"}, "'int3', expected one of"),
        ({"group": 48}, "groups of 48, expected a multiple of 32"),
        ({"value": "fp16"}, "no groups"),
        ({"unit": float("nan")}, "not finite"),
    ],
)
def test_data_of_other_sizes_is_refused(change, words):
    packed = matrix(np.random.default_rng(0), 32, 64, "int4", True, 32)
    with pytest.raises(NotPacked, match=words):
        layout.check(dataclasses.replace(packed, **change))


def test_places_out_of_order_and_bad_scales_are_refused():
    packed = matrix(np.random.default_rng(0), 32, 64, "int8", True, 32)
    stream, scales = packed.stream.copy(), packed.scales.copy()
    stream[320 + 17] = stream[320 + 16]  # the second place of a group is the first one again
    with pytest.raises(NotPacked, match="not in order"):
        layout.check(dataclasses.replace(packed, stream=stream))
    scales[3] = np.inf
    with pytest.raises(NotPacked, match="scale is not finite"):
        layout.check(dataclasses.replace(packed, scales=scales))


def test_codes_that_do_not_fit_are_refused():
    ones = np.ones((4, 1), np.float16)
    with pytest.raises(NotPacked, match="codes from 0 to 8, int4 has -8 to 7"):
        layout.pack_codes(np.array([[8, 0, 0, 0]] * 4, np.int8), ones, "int4", 0, sparse=True)
    with pytest.raises(NotPacked, match="int8 has -127 to 127"):
        layout.pack_codes(np.full((4, 4), -128, np.int8), ones, "int8", 0, sparse=False)
    with pytest.raises(NotPacked, match="scales of shape"):
        layout.pack_codes(np.zeros((4, 64), np.int8), ones, "int4", 32, sparse=True)
    with pytest.raises(NotPacked, match="not finite"):
        layout.pack_codes(np.zeros((4, 4), np.int8), ones * np.nan, "int4", 0, sparse=True)
