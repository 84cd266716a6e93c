"""E8P as Pallas kernels see it: the encoder, and the decoder that ``matmul`` calls on words it holds on chip.

Nothing here was run on an accelerator; see the status in ``kernels``.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Float, Int32, UInt

from caldera_jax import lattice
from caldera_jax.kernels import compiler_params, dispatch

LANES = 128
ROWS = 64  # of 128 vectors a step


# ---- decode: two tables of 1 KiB, which give all eight entries of a codeword at once

@cache
def codeword_words() -> np.ndarray:
    """int32 [2, 256]: what the high byte (pattern) and the low byte (signs, shift) of a code give; their xor is the
    codeword as nibbles u_i = 2 v_i + 15/2, 0 to 15, one for each entry v_i.

    With s a + shift = v, u = 8 + 2 (a - 1/2) + 1 for a plus sign and the shift 1/4.  The other shift clears the lowest
    bit of u and a minus sign flips the three others; the last sign makes the sum of s a even, and each byte flips it
    for its own part of the parity.
    """
    patterns, low = lattice.e8p_patterns(), np.arange(256)[:, None]
    minus = low >> np.arange(1, 8) & 1
    parity = np.stack([patterns.sum(1), minus.sum(1)]).astype(np.int64) % 2  # of each byte
    high = 8 + (2 * patterns - 1).astype(np.int64)
    low = np.concatenate([14 * minus, 0 * low], axis=1) ^ (1 - (low & 1))
    entries = np.stack([high, low]) ^ 14 * (np.arange(8) == 7) * parity[..., None]
    return (entries << 4 * np.arange(8)).sum(2).astype(np.uint32).view(np.int32)


def nibbles(code: Int32[Array, "*shape"], lookup) -> Int32[Array, "*shape"]:
    """The codeword of the 16 lowest bits of ``code`` as eight nibbles (``codeword_words``).

    ``lookup(which, byte)`` reads row ``which`` of the table at each byte.
    """
    return lookup(0, code >> 8 & 255) ^ lookup(1, code & 255)


def entry(word: Int32[Array, "*shape"], i: int) -> Float[Array, "*shape"]:
    """Entry v_i of the codewords, float32: the nibble moves into the mantissa of the number 8 + u_i / 2."""
    moved = word << 19 - 4 * i if i < 5 else word >> 4 * i - 19
    return lax.bitcast_convert_type(moved & 15 << 19 | 0x41000000, jnp.float32) - 11.75


def lookup_in(table):
    """The ``lookup`` of ``nibbles`` inside a kernel that holds ``codeword_words`` as a ref.

    A TPU has no general gather, but permutes the 128 lanes of a register: two permutations and a select, for arrays
    whose last axis is 128.
    """
    def lookup(which, byte):
        lower, upper = (jnp.take_along_axis(jnp.broadcast_to(table[which:which + 1, half], byte.shape), byte & 127,
                                            axis=1, mode="promise_in_bounds")
                        for half in (pl.ds(0, LANES), pl.ds(LANES, LANES)))
        return jnp.where(byte > 127, upper, lower)
    return lookup


# ---- encode

def reference(x: Float[Array, "*batch n"]) -> tuple[Float[Array, "*batch n"], UInt[Array, "*batch n_8"]]:
    """``lattice.e8p_round``: the nearest E8P codeword to each 8 consecutive entries, and its code (uint16)."""
    return lattice.e8p_round(x)


def encode(x: Float[Array, "*batch n"]) -> tuple[Float[Array, "*batch n"], UInt[Array, "*batch n_8"]]:
    """The nearest E8P codeword to each 8 consecutive entries, and its 16-bit code (uint16); n is a multiple of 8.

    The exact search of ``lattice.search``, held in registers from entries to code.

    * Tiles: [8, 64, 128]: 8192 vectors, entries along the first axis.
    * On chip: (8 + 8 + 1) x 4 bytes a vector, twice for the pipeline: 1.1 MB of vector memory, whatever m and n are.
    * Main memory: 8.5 bytes a weight (4 in, 4 out, 1/2 for codes as int32), and up to twice as much again outside,
      where XLA puts entries first and codes into 16 bits.
    * Cost: about 110 operations a weight (``experiments/roofline.py`` counts them): arithmetic binds, not memory.

    float64 goes to the reference; half precision is searched in float32, as there.
    """
    return dispatch(reference, pallas, x) if x.dtype.itemsize <= 4 and x.size else reference(x)


@partial(jax.jit, static_argnames="interpret")
def pallas(x, interpret: bool = False):
    """``encode`` by the kernel."""
    entries = x.astype(jnp.float32).reshape(-1, 8).T
    count, step, zero = entries.shape[1], ROWS * LANES, np.int32(0)
    padded = -(-count // step) * step
    entries = jnp.pad(entries, ((0, 0), (0, padded - count))).reshape(8, -1, LANES)
    vectors = pl.BlockSpec((8, ROWS, LANES), lambda i: (zero, i, zero))
    values, codes = pl.pallas_call(
        _encode_kernel, grid=(padded // step,), in_specs=[vectors],
        out_specs=(vectors, pl.BlockSpec((ROWS, LANES), lambda i: (i, zero))),
        out_shape=(jax.ShapeDtypeStruct(entries.shape, jnp.float32),
                   jax.ShapeDtypeStruct(entries.shape[1:], jnp.int32)),
        compiler_params=compiler_params(), interpret=interpret)(entries)
    values = values.reshape(8, -1)[:, :count].T.reshape(x.shape).astype(x.dtype)
    return values, codes.reshape(-1)[:count].astype(jnp.uint16).reshape(*x.shape[:-1], x.shape[-1] // 8)


def _encode_kernel(x, values, codes):
    found = lattice.search([x[i] for i in range(8)])
    shift = 0.25 - 0.5 * (found >> 24).astype(jnp.float32)
    for i in range(8):
        magnitude = (1 + 2 * (found >> i & 1) + 4 * (found >> 8 + i & 1)).astype(jnp.float32) / 2
        values[i] = jnp.where(found >> 16 + i & 1 == 1, -magnitude, magnitude) + shift
    codes[...] = lattice.code_of(found)
