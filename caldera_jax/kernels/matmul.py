"""y = x Qᵀ + (x Rᵀ) Lᵀ straight from the packed codes: decoded on chip, the dense matrix never in main memory.

Rows of packed codes are read as int32 words: a word is one residual E8P code (4 bits, P = 8 weights) or two E8P codes
(2 bits, P = 16).  Decoding a tile of words gives P arrays, one for each place in a word.  Instead of interleaving them,
x comes apart into P arrays of every P-th column, and the product is sum over p of x_p V_pᵀ.  L is packed along its
outputs, so its words give the outputs 8 c + i as eight arrays; Q follows: for each i its rows 8 c + i (a strided load),
and y leaves as [8, b, m / 8].  One kernel runs twice: t = x Rᵀ first, then x Qᵀ + t Lᵀ in one pass over Q and L.

Tiles, with s bytes an entry of x: 8 C rows by 128 words, C = 128 (less for a small matrix); min(b, 256) rows of x; grid
(b tiles, row tiles, steps over words), y on chip over the last.  Vector memory, double-buffered, b the rows of a tile:
2 (8 C 128 4 + P b 128 s + k C 4 + k b s + 8 b C 4) bytes; at m = n = 4096, k = 64, 2 bits and bfloat16 1.1 MB for b = 1
(1.4 MB as its short axes are padded) and 5.4 MB for b = 256, and a few 64 KiB to decode.

Main memory: 1/4 byte a weight at 2 bits, 1/2 at 4 bits, once for every b tile, and k (m + n) / 2 bytes for 4-bit
factors in all, against 2 bytes a weight for a dense half-precision matrix.  Turning bytes into words inside the program
reads and writes them once more (three times the bytes): pass what ``words`` made once to spare it.

Cost: about 6 operations a weight to decode at 2 bits and 12 at 4, lookups included, for every b tile and beside the 2 b
flops of the product.  By ``experiments/roofline.py`` (computed, not measured) decoding binds, not memory: for b = 1 the
speed bound on a TPU v5e is 1.8 times the dense float16 one at 2 bits and 0.9 times at 4; for b = 512 there is nothing
to gain.

What ran where is said in ``kernels``.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Float, Int32, Shaped, UInt

from caldera_jax.kernels import compiler_params, dispatch, on_cpu, precision
from caldera_jax.kernels.e8p import LANES, codeword_words, entry, lookup_in, nibbles

ZERO = np.int32(0)  # a bare 0 is an int64 where x64 is on, which Mosaic refuses as a block index
MANY = 256  # rows of x beside which a dense Q is small
Stages = tuple[float, ...]  # weights of the E8P codewords whose sum a code stands for: (1,) or (1, 1 / 3.45)


class Packed(NamedTuple):
    """A quantized matrix as it is stored: rows (columns, of a trellis) of packed codes (uint8 bytes, or int32 words
    made by ``words``), and scales, one [1, 1] or one a group [rows, groups]."""

    codes: UInt[Array, "rows bytes"] | Int32[Array, "rows words"]
    scale: Float[Array, "_ _"]


class Rows(NamedTuple):
    """A matrix on any other grid: arrays with a row for each of its rows, and what makes those rows of them."""

    arrays: tuple[Array, ...]
    decode: Callable[..., Float[Array, "rows width"]]


class Columns(NamedTuple):
    """A matrix whose codes run down its columns: arrays with a row for each of its columns, and what makes of those the
    columns themselves, as rows in units of ``scale``: first the entries 0, p, 2 p, … for a ``period`` p, then 1, p + 1,
    … ."""

    arrays: tuple[Array, ...]
    decode: Callable[..., Shaped[Array, "columns height"]]
    scale: Float[Array, "1 1"]
    period: int = 1


Part = Packed | Rows | Columns | Float[Array, "_ _"] | None  # packed, decoded already, or absent
Parts = tuple[Part, Part, Part]  # rows of Q [m, n], of Lᵀ [k, m], of R [k, n]


def supported(x: Array, parts: Parts, stages: Sequence[Stages | None]) -> bool:
    """Whether the kernel takes it: Q of one or two E8P stages with one scale, x of 16 or 32 bits and not empty.

    The factors may be packed alike, or decoded (any grid: they are small).  Otherwise ``multiply`` is the reference.
    """
    packed = [stage is None or (isinstance(part, Packed) and len(stage) in (1, 2) and part.scale.shape == (1, 1))
              for part, stage in zip(parts, stages, strict=True) if part is not None]
    return x.dtype.itemsize in (2, 4) and x.size > 0 and isinstance(parts[0], Packed) and all(packed)


def multiply(x: Float[Array, "b n"], parts: Parts, stages: tuple[Stages | None, Stages | None, Stages | None],
             m: int) -> Float[Array, "b m"]:
    """x Qᵀ + (x Rᵀ) Lᵀ in the dtype of x; parts are Q, Lᵀ and R; stages say how each is packed, None that it is not.

    Any m, n, k and b; a part that is None counts as zero, and Q may be ``Rows`` or ``Columns``.  Sums are float32; a
    half-precision x meets weights rounded to its dtype, as in the reference.  What ``supported`` refuses goes to the
    reference.
    """
    plain = partial(reference, stages=stages, m=m)
    if not supported(x, parts, stages):
        return plain(x, parts)
    return dispatch(plain, partial(pallas, stages=stages, m=m), x, parts)


def words(codes: UInt[Array, "rows bytes"] | Int32[Array, "rows words"]) -> Int32[Array, "rows words"]:
    """Bytes as little-endian words (rows padded to whole words); words stay as they are."""
    if codes.dtype == jnp.int32:
        return codes
    padded = jnp.pad(codes, ((0, 0), (0, -codes.shape[1] % 4)))
    return lax.bitcast_convert_type(padded.reshape(len(codes), -1, 4), jnp.int32)


def decode(part: Part, stages: Stages | None, width: int, dtype) -> Float[Array, "rows width"] | None:
    """A part in plain JAX."""
    if part is None or stages is None:
        return part if part is None else part.astype(dtype)
    values = _apart(_bytes(part, stages, width), stages, dtype).reshape(len(part.codes), 8, -1)
    return values.transpose(0, 2, 1).reshape(len(values), -1)[:, :width] * part.scale.astype(dtype)


def reference(x: Float[Array, "b n"], parts: Parts, stages, m: int) -> Float[Array, "b m"]:
    """``multiply`` in plain JAX: no more than a few rows of Q are dense at a time on a CPU, 2^26 weights elsewhere."""
    q, left_t, right = parts
    wide = jnp.dtype(jnp.float32) if x.dtype.itemsize < 4 else x.dtype  # of sums and of t, which half may overflow
    y = jnp.zeros((len(x), m), wide) if q is None else _times(x, q, stages[0], wide, 2)
    if left_t is not None:
        y = y + _times(x, right, stages[2], wide) @ decode(left_t, stages[1], m, wide)
    return y.astype(x.dtype)


def _times(x, part, stages, wide, tiles=1):
    """x Wᵀ for the rows W of a part, in so many tiles at least, summed and returned in the dtype ``wide``."""
    if isinstance(part, Rows):
        return _by_rows(x, part.arrays, lambda *rows: part.decode(*rows).astype(x.dtype), wide, tiles)
    if isinstance(part, Columns):
        y = _by_columns(x, part.arrays, lambda *columns: part.decode(*columns).astype(x.dtype), wide)
        y = y.reshape(len(x), part.period, -1).transpose(0, 2, 1).reshape(len(x), -1)
        return y * part.scale.astype(wide)
    if stages is None:
        return jnp.matmul(part.astype(x.dtype), x.T, preferred_element_type=wide).T
    codes = _bytes(part, stages, x.shape[1])
    x = _pad(x, 8)
    apart = x.reshape(len(x), -1, 8).transpose(0, 2, 1).reshape(x.shape)  # as ``_apart`` has the columns
    return _by_rows(apart, (codes,), lambda rows: _apart(rows, stages, x.dtype), wide, tiles) * part.scale.astype(wide)


def _by_rows(x, arrays, decode, wide, tiles):
    """x Wᵀ for W = decode(*arrays), rows for rows, summed and returned in the dtype ``wide``.

    On a CPU a tile of rows is decoded, one mebibyte or four in single precision, and multiplied while it is in the
    cache; beside MANY rows of x all at once, as a product within a loop has one thread.  Elsewhere a tile is as large
    as memory allows, as each step of the loop costs more than it saves.  A gradient decodes it again.  Q takes two
    ``tiles`` at least beside few rows: a loop of one step is no loop to XLA, which then decodes the layers of a model
    side by side.  W xᵀ and not x Wᵀ, for which XLA on a CPU transposes W; and eight rows of x at least, since its
    product with fewer columns takes twice as long.
    """
    (b, n), rows = x.shape, len(arrays[0])
    columns = jnp.pad(x, ((0, max(8 - b, 0)), (0, 0))).T
    many = b >= MANY
    bits = 26 if many or not on_cpu() else 18 if b < 64 else 20
    tile = -(-rows // max(-(-rows * n >> bits), 1 if many else tiles))
    apart = tuple(_pad(array, tile, 1).reshape(-1, tile, array.shape[1]) for array in arrays)
    product = lambda tile: jnp.matmul(decode(*tile), columns, preferred_element_type=wide)
    y = lax.map(jax.checkpoint(product), apart)
    return y.reshape(-1, columns.shape[1])[:rows, :b].T


def _by_columns(x, arrays, decode, wide):
    """x Vᵀ for Vᵀ = decode(*arrays), some columns of V after the others, in tiles as those of ``_by_rows``."""
    (b, n), of = x.shape, jax.checkpoint(lambda x, *tile: jnp.matmul(x, decode(*tile), preferred_element_type=wide))
    height = jax.eval_shape(decode, *arrays).shape[1]
    bits = 26 if b >= MANY or not on_cpu() else 18
    tile = -(-n // -(-n * height >> bits))
    apart = tuple(_pad(array, tile, 1).reshape(-1, tile, array.shape[1]) for array in arrays)
    xs = _pad(x, tile).reshape(b, -1, tile).transpose(1, 0, 2)
    return lax.scan(lambda y, tile: (y + of(*tile), None), jnp.zeros((b, height), wide), (xs, *apart))[0]


def _bytes(part, stages, width):
    """The packed codes as uint8 [rows, bytes] without padding."""
    codes = part.codes
    if codes.dtype == jnp.int32:
        codes = lax.bitcast_convert_type(codes, jnp.uint8).reshape(len(codes), -1)
    return codes[:, :2 * len(stages) * -(-width // 8)]


def _apart(codes, stages, dtype):
    """The values [rows, columns] that packed codes stand for, column 8 c + i at place i * columns / 8 + c.

    On a CPU the codewords come out of a call that XLA leaves a call, or it would look them up again for each of their
    entries.
    """
    words = _stage_words(codes, len(stages))
    words = set_xla_metadata(words, inlineable="false") if on_cpu() else words
    weighted = lambda i: sum(jnp.asarray(weight, dtype) * entry(word, i).astype(dtype)
                             for weight, word in zip(stages, words, strict=True))
    return jnp.concatenate([weighted(i) for i in range(8)], axis=1)


@partial(jax.jit, static_argnums=1)
def _stage_words(codes, stages: int):
    """The codewords of each stage as nibbles, int32 [rows, columns / 8]; the first stage has the highest 16 bits."""
    halves = lax.bitcast_convert_type(codes.reshape(len(codes), -1, stages, 2), jnp.uint16).astype(jnp.int32)
    both = jnp.asarray(codeword_words())
    return [nibbles(halves[:, :, stage], lambda which, byte: both[which][byte]) for stage in reversed(range(stages))]


@partial(jax.jit, static_argnames=("stages", "m", "interpret"))
def pallas(x, parts: Parts, *, stages, m: int, interpret: bool = False):
    """``multiply`` by the kernel."""
    run = partial(_pass, interpret=interpret)
    q, left_t, right = parts
    if left_t is None:
        return run(x, q, stages[0])[:, :m]
    if stages[2] is None:
        t = jnp.matmul(x, right.astype(x.dtype).T, preferred_element_type=jnp.float32)
    else:
        t = run(x, right, stages[2], dtype=jnp.float32)[:, :len(right.codes)]
    if isinstance(left_t, Packed) and len(stages[1]) == 2:
        t, left, left_stages = t * left_t.scale.astype(jnp.float32), words(left_t.codes), stages[1]
    else:
        left, left_stages = _pad(decode(left_t, stages[1], m, x.dtype), 1, 8), None
        left = left.reshape(len(left), -1, 8).transpose(2, 0, 1)  # [8, k, m / 8]: outputs 8 c + i
    return run(x, q, stages[0], t.astype(x.dtype).T, left, left_stages)[:, :m]


class _How(NamedTuple):
    """What a kernel is specialised to."""

    stages: Stages
    left_stages: Stages | None  # None: L comes decoded
    precision: lax.PrecisionLike


def _pass(x, coded: Packed, stages: Stages, t=None, left=None, left_stages=None, *, interpret, dtype=None):
    """x Wᵀ + tᵀ L for the rows W of ``coded``: [b, rows rounded up to a multiple of 8]."""
    (b, n), packed, dtype = x.shape, words(coded.codes), dtype or x.dtype
    if x.dtype == jnp.float16:  # a TPU has bfloat16 only
        x, t, left = (a if a is None or a.dtype == jnp.int32 else a.astype(jnp.float32) for a in (x, t, left))
    per_word = 16 // len(stages)
    apart = jnp.pad(x, ((0, 0), (0, packed.shape[1] * per_word - n))).reshape(b, -1, per_word).transpose(2, 0, 1)
    y = _call(_How(stages, left_stages, precision(x.dtype)), interpret, coded.scale.astype(jnp.float32),
              jnp.asarray(codeword_words()), packed, apart, *(() if t is None else (t, left)))
    return y[:, :b, :-(-len(packed) // 8)].transpose(1, 2, 0).reshape(b, -1).astype(dtype)


def _pad(x: Array, *multiples: int) -> Array:
    """Zeros up to a multiple at the end of each of the last axes."""
    multiples = (1,) * (x.ndim - len(multiples)) + multiples
    return jnp.pad(x, [(0, -size % multiple) for size, multiple in zip(x.shape, multiples, strict=True)])


# ---- what the kernel does with a tile

def _codewords(tile, lookup):
    """The codewords of the high and of the low half of each word, as nibbles."""
    return nibbles(tile >> 16, lookup), nibbles(tile, lookup)


def _places(tile, stages: Stages, lookup):
    """For each place in a word, a function that gives the tile's weights there."""
    high, low = _codewords(tile, lookup)
    if len(stages) == 1:  # two codes of 2 bits, the earlier one below
        return [partial(entry, code, i) for code in (low, high) for i in range(8)]
    return [partial(_sum, high, low, i, stages) for i in range(8)]


def _sum(first, second, i, stages):
    return stages[0] * entry(first, i) + stages[1] * entry(second, i)


def _entries(codewords, i, stages):
    """``_sum`` for an entry that is known when the kernel runs."""
    return _sum(*(word >> 4 * i for word in codewords), 0, stages)


def _dot(a, b, axes, precision):
    """A product over one axis of each, summed in float32."""
    return lax.dot_general(a, b.astype(a.dtype), ((axes[:1], axes[1:]), ((), ())), precision=precision,
                           preferred_element_type=jnp.float32)


def _products(x, places, precision):
    """sum_p x_p V_pᵀ [b, C] from x_p [b, words] and V_p [C, words]; a single row needs no matrix unit."""
    if x(0).shape[0] > 1:
        return sum(_dot(x(p), weights(), (1, 1), precision) for p, weights in enumerate(places))
    return jnp.sum(sum(weights() * x(p).astype(jnp.float32) for p, weights in enumerate(places)), axis=1)[None]


def _low_rank(t, left, precision):
    """tᵀ L [b, C] from t [k, b] and L [k, C]."""
    if t.shape[1] > 1:
        return _dot(t, left, (0, 0), precision)
    return jnp.sum(t.astype(jnp.float32) * left.astype(jnp.float32), axis=0)[None]


def _loop(count: int, body, start=None):
    """``fori_loop`` with an index that is an int32 also where x64 is on."""
    return lax.fori_loop(0, count, lambda _, carry: (carry[0] + 1, body(*carry)), (ZERO, start))[1]


# ---- the kernel

def _call(how: _How, interpret, scale, entries, packed, x, *factors):
    groups = -(-len(packed) // 8)
    c = LANES if groups >= LANES else -(-groups // 8) * 8  # a small matrix is one tile
    batch = min(x.shape[1], 256)
    x = _pad(x, batch, LANES)  # zeros meet whatever lies beyond the last word
    whole = lambda array: pl.BlockSpec(array.shape, lambda i, j, w: (ZERO,) * array.ndim)
    specs = [whole(scale), whole(entries), pl.BlockSpec((8 * c, LANES), lambda i, j, w: (j, w)),
             pl.BlockSpec((len(x), batch, LANES), lambda i, j, w: (ZERO, i, w))]
    if factors:
        t, left = factors = _pad(factors[0], 8, batch), _pad(factors[1], 8, 1)
        specs += [pl.BlockSpec((len(t), batch), lambda i, j, w: (ZERO, i)),
                  pl.BlockSpec((*left.shape[:-1], LANES), lambda i, j, w: (ZERO,) * (left.ndim - 1) + (j,))]
    grid = (x.shape[1] // batch, -(-groups // c), x.shape[2] // LANES)
    return pl.pallas_call(
        partial(_kernel, how), grid=grid, in_specs=specs,
        out_specs=pl.BlockSpec((8, batch, c), lambda i, j, w: (ZERO, i, j)),
        out_shape=jax.ShapeDtypeStruct((8, x.shape[1], grid[1] * c), jnp.float32),
        compiler_params=compiler_params(), interpret=interpret)(scale, entries, packed, x, *factors)


def _kernel(how: _How, scale, entries, packed, x, *factors_and_y):
    *factors, y = factors_and_y
    lookup, c = lookup_in(entries), y.shape[2]

    @pl.when(pl.program_id(2) == 0)
    def first_words():
        y[...] = jnp.zeros_like(y)
        if factors:
            t, left = factors
            codewords = _codewords(left[...], lookup) if how.left_stages else None

            def low_rank(i, _):
                rows = left[i] if codewords is None else _entries(codewords, i, how.left_stages)
                y[i] = _low_rank(t[...], rows[:, :c], how.precision)

            _loop(8, low_rank)

    def residue(i, _):
        rows = packed[pl.ds(i, c, stride=8), :]
        y[i] += scale[...] * _products(lambda p: x[p], _places(rows, how.stages, lookup), how.precision)

    _loop(8, residue)
