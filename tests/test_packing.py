"""Packing: a round trip for every width, and not one bit more than the codes have."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caldera_jax.packing import pack, pack_signs, row_bytes, unpack, unpack_signs

WIDTHS = (*range(1, 17), 24, 32)


def _codes(rows, count, bits, seed=0):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, count), dtype=np.uint64)
    codes[0, 0], codes[-1, -1] = 2**bits - 1, 2**bits - 1
    return codes.astype(np.uint32)


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_survive_packing_and_take_exactly_their_bits(bits):
    codes = _codes(3, 11, bits)
    packed = pack(jnp.asarray(codes), bits)
    assert packed.dtype == jnp.uint8 and packed.shape == (3, row_bytes(11, bits)) == (3, -(-11 * bits // 8))
    np.testing.assert_array_equal(unpack(packed, bits, 11), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_packed_row_is_one_little_endian_integer_in_base_2_to_the_bits(bits):
    codes = _codes(2, 5, bits, seed=1)
    for row, packed in zip(codes, np.asarray(pack(jnp.asarray(codes), bits)), strict=True):
        assert int.from_bytes(packed.tobytes(), "little") == sum(int(c) << (bits * i) for i, c in enumerate(row))


def test_two_bits_are_two_bits():
    assert pack(jnp.zeros((16, 64), jnp.uint8), 2).size == 16 * 64 * 2 // 8
    assert pack(jnp.zeros((16, 64 // 8), jnp.uint16), 16).size == 16 * 64 * 2 // 8  # E8P: 16 bits for 8 weights


@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(bits=st.sampled_from(WIDTHS), rows=st.integers(1, 3), count=st.integers(1, 9), seed=st.integers(0, 99))
def test_any_shape_survives_packing(bits, rows, count, seed):
    codes = _codes(rows, count, bits, seed)
    np.testing.assert_array_equal(unpack(pack(jnp.asarray(codes), bits), bits, count), codes)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_signs_survive_in_one_bit_each(n, dtype):
    signs = np.random.default_rng(n).choice([-1.0, 1.0], n)
    packed = pack_signs(jnp.asarray(signs, dtype))
    assert packed.shape == (-(-n // 8),)
    unpacked = unpack_signs(packed, n, dtype)
    assert unpacked.dtype == dtype
    np.testing.assert_array_equal(unpacked, signs)
