"""E8P and the 1-bit E8 code: exact nearest-codeword search in closed form, codes and codewords.

E8P (QuIP#, arXiv 2402.04396) holds 2^16 points of R^8, ``s * a + shift``: magnitudes ``a`` from 256 patterns of
half-odd integers, signs ``s`` such that the entries of ``s * a`` sum to an even number, and a shift of +1/4 or -1/4 in
every entry.  A code is ``pattern << 8 | signs << 1 | shift``; ``signs`` holds entries 0..6 and parity gives entry 7.

``search`` is elementwise over eight arrays, one for each entry of the vectors, without a table or a gather: XLA makes
one loop of it, and a Pallas kernel can call it as it stands.  (Stacking the eight arrays, or permuting the rows of one
array [8, N], breaks that loop up and is ten times slower on a CPU.)
"""

import math
from functools import cache, reduce
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Float, UInt

# Positions of the three entries 1/2 in the 29 published patterns of norm^2 12; the other five entries are 3/2.
TRIPLES = np.array([[int(c) for c in triple] for triple in (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 167 157 147 156 146 "
    "045 067 057 047 056 046 014 237").split()])

# An optimal sorting network for 8 inputs: 19 compare-exchanges.
NETWORK = ((0, 2), (1, 3), (4, 6), (5, 7), (0, 4), (1, 5), (2, 6), (3, 7), (0, 1), (2, 3), (4, 5), (6, 7),
           (2, 4), (3, 5), (1, 4), (3, 6), (1, 2), (3, 4), (5, 6))

FIRST_FIVE_HALVES, FIRST_TRIPLE = 163, 227  # patterns before 163 hold only 1/2 and 3/2, at most four of the latter


@cache
def e8p_patterns() -> np.ndarray:
    """The 256 magnitude patterns, float64 [256, 8]: 227 of norm^2 <= 10 (up to four 3/2; then one 5/2), then the 29."""
    rows = []
    for threes in range(5):
        for where in combinations(range(8), threes):
            rows.append([1.5 if i in where else 0.5 for i in range(8)])
    for five in range(8):
        for three in range(8):  # three == five stands for "no 3/2"
            rows.append([2.5 if i == five else 1.5 if i == three else 0.5 for i in range(8)])
    rows += [[0.5 if i in triple else 1.5 for i in range(8)] for triple in TRIPLES]
    return np.array(rows)


@cache
def e8p_codewords() -> np.ndarray:
    """All codewords in code order, float64 [65536, 8]."""
    code = np.arange(1 << 16)
    magnitude = e8p_patterns()[code >> 8]
    negative = (code[:, None] >> np.arange(1, 8)) & 1
    last = (magnitude.sum(1).astype(int) + negative.sum(1)) % 2  # as many minus signs as make the sum even
    signs = 1 - 2 * np.concatenate([negative, last[:, None]], 1)
    return signs * magnitude + np.where(code & 1, -0.25, 0.25)[:, None]


def _lesser(a, b):
    """Of two (number, label) the one with the lesser number; the first of equals."""
    return jnp.minimum(a[0], b[0]), jnp.where(b[0] < a[0], b[1], a[1])


def _greater(a, b):
    return jnp.maximum(a[0], b[0]), jnp.where(b[0] > a[0], b[1], a[1])


def _keys(v):
    """|v| of each entry as an integer that orders like it; the three lowest bits give way to the entry's number."""
    word = {4: jnp.int32, 8: jnp.int64}[v[0].dtype.itemsize]
    others = word(np.iinfo(word).max - 7)  # neither the sign nor the three bits
    return [lax.bitcast_convert_type(entry, word) & others | word(i) for i, entry in enumerate(v)]


def _sort_descending(keys):
    keys = list(keys)
    for i, j in NETWORK:
        keys[i], keys[j] = jnp.maximum(keys[i], keys[j]), jnp.minimum(keys[i], keys[j])
    return keys


def _bits(*entries):
    return jnp.int32(sum(1 << i for i in entries))


def _least_triple(y):
    """The least sum of y over the 29 triples, and the triple's bits.

    The triples are those of {0..3}, 014, 237, and a pair of {4..7} with one of {0, 2, 3}, or, less the pair 45, with 1.
    """
    triple = lambda *t: (y[t[0]] + y[t[1]] + y[t[2]], _bits(*t))
    pair = lambda *p: (y[p[0]] + y[p[1]], _bits(*p))
    with_one = lambda pair, one: (pair[0] + one[0], pair[1] | one[1])
    without_45 = reduce(_lesser, [pair(6, 7), pair(5, 7), pair(4, 7), pair(5, 6), pair(4, 6)])
    one = reduce(_lesser, [(y[i], _bits(i)) for i in (0, 2, 3)])
    crossing = with_one(_lesser(without_45, pair(4, 5)), one), with_one(without_45, (y[1], _bits(1)))
    others = [(1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2), (0, 1, 4), (2, 3, 7)]
    return reduce(_lesser, [*crossing, *(triple(*t) for t in others)])


def _best_shape(v):
    """The greatest ``2 v.c - |c|^2`` over all s * a, and where: shape, parity of v, triple, largest four keys.

    Shapes 0..4: that many 3/2; 5: one 5/2; 6: one 5/2 and one 3/2; 7: the triples.  With y = |v| sorted, the largest
    magnitudes go to the largest entries (rearrangement), and a wrong parity costs the cheapest sign flip, that of the
    smallest entry, which always holds 1/2: where a triple pattern gives it 3/2, turning that entry into 1/2 of the
    other sign is a better codeword.
    """
    keys, y = _sort_descending(_keys(v)), [jnp.abs(entry) for entry in v]
    s = [lax.bitcast_convert_type(key, y[0].dtype) for key in keys]  # sorted, up to 7 units in the last place
    odd = reduce(jnp.logical_xor, [entry < 0 for entry in v])
    total, (triple, members) = sum(y[1:], y[0]), _least_triple(y)
    even_sum, odd_sum = jnp.where(odd, 2 * s[7], 0), jnp.where(odd, 0, 2 * s[7])  # the penalties
    threes = [total - 2]
    for j in range(4):
        threes.append(threes[-1] + (2 * s[j] - 2))
    five = total + 4 * s[0] - 8
    scores = [score - (odd_sum if j % 2 else even_sum) for j, score in enumerate(threes)]
    scores += [five - even_sum, five + 2 * s[1] - 2 - odd_sum, 3 * total - 2 * triple - 12 - odd_sum]
    best, shape = reduce(_greater, [(score, jnp.int32(i)) for i, score in enumerate(scores)])
    return best, (shape, odd.astype(jnp.int32), members, *keys[:4])  # Mosaic does not select between booleans


def search(v):
    """The codeword nearest to each vector, from the eight arrays of its entries, as one int32: elementwise.

    Eight bits each from the lowest: which entries are 3/2, which is 5/2, which are negative before the shift; then one
    bit, 1 for the shift -1/4.  Exact up to rounding: magnitudes that differ by less than 8 units in the last place
    count as equal.
    """
    quarter = jnp.asarray(0.25, v[0].dtype)
    (up, up_where), (down, down_where) = _best_shape([x - quarter for x in v]), _best_shape([x + quarter for x in v])
    shifted = down - up > sum(v[1:], v[0])
    shape, odd, members, *largest = (jnp.where(shifted, b, a) for a, b in zip(up_where, down_where, strict=True))
    v = [jnp.where(shifted, x + quarter, x - quarter) for x in v]
    first, second, third, fourth = (1 << (key & 7).astype(jnp.int32) for key in largest)

    threes = jnp.where(shape == 7, 255 - members, jnp.where(shape == 6, second, 0))
    for count, bit in enumerate((first, second, third, fourth), 1):
        threes = jnp.where((shape >= count) & (shape < 5), threes | bit, threes)
    fives = jnp.where((shape == 5) | (shape == 6), first, 0)
    above_half = threes | fives
    keys = _keys(v)
    smallest = reduce(jnp.minimum, [jnp.where(above_half & _bits(i) == 0, key, jnp.iinfo(key.dtype).max)
                                    for i, key in enumerate(keys)])
    negative = sum(jnp.where(x < 0, _bits(i), 0) for i, x in enumerate(v))
    odd_sum = (shape == 1) | (shape == 3) | (shape >= 6)
    negative = negative ^ jnp.where((odd == 1) ^ odd_sum, 1 << (smallest & 7).astype(jnp.int32), 0)
    return threes | fives << 8 | negative << 16 | shifted.astype(jnp.int32) << 24


def code_of(found):
    """The 16-bit codes (int32) of what ``search`` found: the pattern's number by counting, elementwise."""
    threes, fives, negative, shifted = found & 255, found >> 8 & 255, found >> 16 & 255, found >> 24
    count = rank = place = five = jnp.zeros_like(found)
    for p in range(7, -1, -1):  # the lexicographic rank of a set, from its last member to its first
        later_sets = int.from_bytes(bytes(math.comb(7 - p, j) for j in range(1, 5)), "little")
        inside = threes >> p & 1
        rank += inside * (jnp.int32(later_sets) >> 8 * jnp.minimum(count, 3) & 255)
        count, place, five = count + inside, place + inside * p, five + (fives >> p & 1) * p
    last = jnp.where(count == 2, 36, jnp.where(count == 3, 92, jnp.where(count == 4, 162, 8 * count)))
    triples = [jnp.where(threes == 255 - _bits(*map(int, t)), FIRST_TRIPLE + i, 0) for i, t in enumerate(TRIPLES)]
    pattern = jnp.where(count == 5, sum(triples), last - rank)
    pattern = jnp.where(fives > 0, FIRST_FIVE_HALVES + 8 * five + jnp.where(count == 0, five, place), pattern)
    return pattern << 8 | (negative & 127) << 1 | shifted


@jax.jit
def _search_rows(x):
    return search([x[:, i] for i in range(8)])


def e8p_round(x: Float[Array, "*batch n"]) -> tuple[Float[Array, "*batch n"], UInt[Array, "*batch n_8"]]:
    """The nearest E8P codeword to each 8 consecutive entries, and its 16-bit code (uint16); n is a multiple of 8."""
    wide = (x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)).reshape(-1, 8)
    # Left a call: XLA would merge the search into each of its uses (eight columns of values, the codes) and repeat it
    # there, five to ten times slower and longer to compile on a CPU.  (An optimization barrier goes before fusion.)
    found = set_xla_metadata(_search_rows(wide), inlineable="false")
    bit = lambda first: (found[:, None] >> (first + jnp.arange(8, dtype=jnp.int32)[None]) & 1).astype(x.dtype)
    shift = jnp.where(found[:, None] >> 24 == 1, jnp.asarray(-0.25, x.dtype), jnp.asarray(0.25, x.dtype))
    values = (1 - 2 * bit(16)) * (0.5 + bit(0) + 2 * bit(8)) + shift
    return values.reshape(x.shape), code_of(found).astype(jnp.uint16).reshape(*x.shape[:-1], x.shape[-1] // 8)


def e8p_decode(codes: UInt[Array, "*batch c"], dtype=jnp.float32) -> Float[Array, "*batch n"]:
    """The codewords, eight values a code."""
    code = codes.astype(jnp.int32)[..., None]
    magnitude = jnp.asarray(e8p_patterns(), dtype)[code[..., 0] >> 8]
    negative = (code >> jnp.arange(1, 8, dtype=jnp.int32).reshape(*[1] * codes.ndim, 7)) & 1
    odd = jnp.sum(magnitude, axis=-1, keepdims=True).astype(jnp.int32) + jnp.sum(negative, axis=-1, keepdims=True,
                                                                                 dtype=jnp.int32)
    signs = (1 - 2 * jnp.concatenate([negative, odd & 1], axis=-1)).astype(dtype)
    shift = (1 - 2 * (code & 1)).astype(dtype) / 4
    return (signs * magnitude + shift).reshape(*codes.shape[:-1], codes.shape[-1] * 8)


@cache
def e8_codewords() -> np.ndarray:
    """The 1-bit E8 code, float64 [256, 8]: 0, the 240 roots of norm^2 2, and +-2 on one axis, less -2 on the last."""
    points = [np.zeros(8)]
    for i, j in combinations(range(8), 2):
        for si in (1, -1):
            for sj in (1, -1):
                points.append(si * np.eye(8)[i] + sj * np.eye(8)[j])
    for signs in range(256):
        s = 1 - 2 * ((signs >> np.arange(8)) & 1)
        if s.prod() == 1:
            points.append(s / 2)
    points += [2 * np.eye(8)[i] for i in range(8)] + [-2 * np.eye(8)[i] for i in range(7)]
    return np.array(points)


def e8_encode(x: Float[Array, "*batch n"]) -> UInt[Array, "*batch n_8"]:
    """The 8-bit code (uint8) of the nearest point of the 1-bit E8 code: 256 dot products a vector."""
    points = jnp.asarray(e8_codewords(), x.dtype)
    vectors = x.reshape(*x.shape[:-1], -1, 8)
    norms = jnp.sum(points**2, axis=1).reshape(*[1] * x.ndim, -1)
    scores = jnp.matmul(vectors, points.T, precision=lax.Precision.HIGHEST) - norms / 2
    return jnp.argmax(scores, axis=-1).astype(jnp.uint8)


def e8_decode(codes: UInt[Array, "*batch c"], dtype=jnp.float32) -> Float[Array, "*batch n"]:
    """The points of the 1-bit E8 code, eight values a code."""
    return jnp.asarray(e8_codewords(), dtype)[codes.astype(jnp.int32)].reshape(*codes.shape[:-1], -1)


