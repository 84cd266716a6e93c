"""E8P as Pallas kernels see it: the encoder, and the decoder that ``matmul`` calls on words it holds on chip.

What ran where is said in ``kernels``.
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

    * TPU tiles: [8, 64, 128], 8192 vectors, entries along the first axis.  On chip: (8 + 8 + 1) x 4 bytes a vector,
      twice for the pipeline: 1.1 MB of vector memory, whatever m and n are.
    * GPU: one thread a vector, blocks of 128 threads (``kernels`` says how much faster than the reference).
    * Main memory: 8.5 bytes a weight (4 in, 4 out, 1/2 for codes as int32), and up to twice as much again outside,
      where XLA puts entries first and codes into 16 bits.
    * Cost: about 110 operations a weight (``experiments/roofline.py`` counts them): arithmetic binds, not memory.

    float64 goes to the reference; half precision is searched in float32, as there.
    """
    return dispatch(reference, pallas, x, gpu=mosaic) if x.dtype.itemsize <= 4 and x.size else reference(x)


@partial(jax.jit, static_argnames="interpret")
def pallas(x, interpret: bool = False):
    """``encode`` by the kernel for a TPU."""
    zero = np.int32(0)
    entries = _entries(x, ROWS * LANES).reshape(8, -1, LANES)
    vectors = pl.BlockSpec((8, ROWS, LANES), lambda i: (zero, i, zero))
    values, codes = pl.pallas_call(
        _encode_tile, grid=(entries.shape[1] // ROWS,), in_specs=[vectors],
        out_specs=(vectors, pl.BlockSpec((ROWS, LANES), lambda i: (i, zero))),
        out_shape=(jax.ShapeDtypeStruct(entries.shape, jnp.float32),
                   jax.ShapeDtypeStruct(entries.shape[1:], jnp.int32)),
        compiler_params=compiler_params(), interpret=interpret)(entries)
    return _as_stored(values, codes, x)


@jax.jit
def mosaic(x):
    """``encode`` by the kernel for a GPU."""
    from jax.experimental.pallas import mosaic_gpu  # not in every build of jaxlib

    entries = _entries(x, LANES)
    run = mosaic_gpu.kernel(
        _encode_block, grid=(entries.shape[1] // LANES,), grid_names=("block",),
        out_type=(jax.ShapeDtypeStruct(entries.shape, jnp.float32),
                  jax.ShapeDtypeStruct(entries.shape[1:], jnp.int32)),
        # the other semantics take seconds to look for layouts, and here there is but one
        compiler_params=mosaic_gpu.CompilerParams(lowering_semantics=mosaic_gpu.LoweringSemantics.Lane))
    return _as_stored(*run(entries), x)


def _entries(x, step):
    """[8, vectors], float32: the vectors padded to whole steps."""
    entries = x.astype(jnp.float32).reshape(-1, 8).T
    return jnp.pad(entries, ((0, 0), (0, -entries.shape[1] % step)))


def _as_stored(values, codes, x):
    """What a kernel gives, in the shapes and types that ``encode`` returns for x."""
    count = x.size // 8
    values = values.reshape(8, -1)[:, :count].T.reshape(x.shape).astype(x.dtype)
    return values, codes.reshape(-1)[:count].astype(jnp.uint16).reshape(*x.shape[:-1], x.shape[-1] // 8)


def _encode_tile(x, values, codes):
    found, codes[...] = _nearest([x[i] for i in range(8)])
    for i, value in enumerate(found):
        values[i] = value


def _encode_block(x, values, codes):
    at = pl.ds(lax.axis_index("block") * LANES, LANES)
    found, codes[at] = _nearest([x[i, at] for i in range(8)])
    for i, value in enumerate(found):
        values[i, at] = value


def _nearest(v):
    """The entries of the nearest codewords, and their codes (int32), from arrays of entries."""
    found = lattice.search(v)
    shift = 0.25 - 0.5 * (found >> 24).astype(jnp.float32)
    magnitudes = [(1 + 2 * (found >> i & 1) + 4 * (found >> 8 + i & 1)).astype(jnp.float32) / 2 for i in range(8)]
    values = [jnp.where(found >> 16 + i & 1 == 1, -a, a) + shift for i, a in enumerate(magnitudes)]
    return values, lattice.code_of(found)
