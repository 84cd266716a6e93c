"""Codes to machine words and back: nothing but the bits of the codes is kept."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, UInt, UInt8


def row_bytes(count: int, bits: int) -> int:
    """Bytes of a packed row of ``count`` codes of ``bits`` bits: rows end on whole bytes."""
    return -(-count * bits // 8)


def pack(codes: UInt[Array, "r c"], bits: int) -> UInt8[Array, "r bytes"]:
    """Rows of codes < 2^bits as bytes, least significant bits first."""
    wide = codes.astype(jnp.uint32)
    if bits % 8 == 0:
        shifts = jnp.arange(0, bits, 8, dtype=jnp.uint32)[None, None]
        return (wide[:, :, None] >> shifts).astype(jnp.uint8).reshape(len(codes), -1)
    digits = (wide[:, :, None] >> jnp.arange(bits, dtype=jnp.uint32)[None, None]) & 1
    return jnp.packbits(digits.reshape(len(codes), -1).astype(jnp.uint8), axis=1, bitorder="little")


def unpack(packed: UInt8[Array, "r bytes"], bits: int, count: int) -> UInt[Array, "r c"]:
    """The ``count`` codes of each row."""
    if bits % 8 == 0:
        digits, step = packed.reshape(len(packed), count, bits // 8), 8
    else:
        rows = jnp.unpackbits(packed, axis=1, count=count * bits, bitorder="little")
        digits, step = rows.reshape(len(packed), count, bits), 1
    shifts = jnp.arange(0, bits, step, dtype=jnp.uint32)[None, None]
    return jnp.sum(digits.astype(jnp.uint32) << shifts, axis=-1, dtype=jnp.uint32)


def pack_signs(signs: Float[Array, " n"]) -> UInt8[Array, " bytes"]:
    """±1 as one bit each."""
    return jnp.packbits((signs < 0).astype(jnp.uint8), bitorder="little")


def unpack_signs(packed: UInt8[Array, " bytes"], n: int, dtype=jnp.float32) -> Float[Array, " n"]:
    """The n signs, ±1."""
    return 1 - 2 * jnp.unpackbits(packed, count=n, bitorder="little").astype(dtype)
