"""E8P and the 1-bit E8 code: exact nearest-codeword search in closed form, codes and codewords.

E8P (QuIP#, arXiv 2402.04396) holds 2^16 points of R^8, ``s * a + shift``: magnitudes ``a`` from 256 patterns of
half-odd integers, signs ``s`` such that the entries of ``s * a`` sum to an even number, and a shift of +1/4 or -1/4 in
every entry.  A code is ``pattern << 8 | signs << 1 | shift``; ``signs`` holds entries 0..6 and parity gives entry 7.

The search works on eight rows of N numbers ``[8, N]`` so that every operation runs along a long axis.
``lax.optimization_barrier`` stands where XLA on the CPU would otherwise fuse a stage into each of its consumers and
compute it again there.
"""

from functools import cache, partial
from itertools import combinations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, UInt

# Positions of the three entries 1/2 in the 29 published patterns of norm^2 12; the other five entries are 3/2.
TRIPLES = np.array([[int(c) for c in triple] for triple in (
    "123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 167 157 147 156 146 "
    "045 067 057 047 056 046 014 237").split()])

# An optimal sorting network for 8 inputs: 19 compare-exchanges in 6 layers.
NETWORK = (((0, 2), (1, 3), (4, 6), (5, 7)), ((0, 4), (1, 5), (2, 6), (3, 7)), ((0, 1), (2, 3), (4, 5), (6, 7)),
           ((2, 4), (3, 5)), ((1, 4), (3, 6)), ((1, 2), (3, 4), (5, 6)))

FIRST_FIVE_HALVES = 163  # patterns before it hold only 1/2 and 3/2, at most four of the latter


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
def _pattern_of_mask() -> np.ndarray:
    """Pattern index of each 8-bit mask of the entries that are 3/2 (0 where no such pattern exists)."""
    table = np.zeros(256, np.int32)
    for index, row in enumerate(e8p_patterns()):
        if row.max() < 2:
            table[int(((row == 1.5) << np.arange(8)).sum())] = index
    return table


@cache
def e8p_codewords() -> np.ndarray:
    """All codewords in code order, float64 [65536, 8]."""
    code = np.arange(1 << 16)
    magnitude = e8p_patterns()[code >> 8]
    negative = (code[:, None] >> np.arange(1, 8)) & 1
    last = (magnitude.sum(1).astype(int) + negative.sum(1)) % 2  # as many minus signs as make the sum even
    signs = 1 - 2 * np.concatenate([negative, last[:, None]], 1)
    return signs * magnitude + np.where(code & 1, -0.25, 0.25)[:, None]


def _sort_descending(y):
    for layer in NETWORK:
        partner, keep = np.arange(8), np.zeros(8, bool)
        for i, j in layer:
            partner[i], partner[j], keep[i] = j, i, True
        other, larger = y[partner], keep.reshape(8, *[1] * (y.ndim - 1))
        y = lax.optimization_barrier(jnp.where(larger, jnp.maximum(y, other), jnp.minimum(y, other)))
    return y


def _least_triple(y):
    """The least sum of y over the 29 triples, which share pairs of {4..7} and are the triples of {0..3}."""
    least, pair = partial(jnp.minimum), {p: y[p[0]] + y[p[1]] for p in combinations(range(4, 8), 2)}
    without_45 = least(least(pair[6, 7], pair[5, 7]), least(least(pair[4, 7], pair[5, 6]), pair[4, 6]))
    any_pair = least(without_45, pair[4, 5])
    inner = y[0] + y[1] + y[2] + y[3] - jnp.maximum(jnp.maximum(y[0], y[1]), jnp.maximum(y[2], y[3]))
    crossing = least(any_pair + least(y[0], least(y[2], y[3])), without_45 + y[1])
    return least(least(inner, crossing), least(y[0] + y[1] + y[4], y[2] + y[3] + y[7]))


def _shape_scores(v):
    """Best ``2 v.c - |c|^2`` over the codewords of each of the 8 shapes, [8, ...], and whether v has odd many minuses.

    With y = |v| sorted, the largest magnitudes go to the largest entries (rearrangement), and a wrong parity costs the
    cheapest sign flip, that of the smallest entry, which always holds 1/2: where a triple pattern gives it 3/2,
    turning that entry into 1/2 of the other sign is a better codeword.
    """
    y = lax.optimization_barrier(jnp.abs(v))
    s = _sort_descending(y)
    odd = lax.optimization_barrier(jnp.sum(v < 0, axis=0) % 2 == 1)
    triple = lax.optimization_barrier(_least_triple(y))
    even_sum, odd_sum = jnp.where(odd, 2 * s[7], 0), jnp.where(odd, 0, 2 * s[7])  # the penalties
    halves = jnp.sum(y, axis=0) - 2
    threes = [halves]
    for j in range(4):
        threes.append(threes[-1] + 2 * s[j] - 2)
    scores = [score - (odd_sum if j % 2 else even_sum) for j, score in enumerate(threes)]
    scores += [halves + 4 * s[0] - 6 - even_sum, halves + 4 * s[0] + 2 * s[1] - 8 - odd_sum,
               3 * jnp.sum(y, axis=0) - 2 * triple - 12 - odd_sum]
    return jnp.stack(scores), odd


def _first_equal(rows, value):
    """Index of the first row that equals value."""
    index = jnp.zeros(value.shape, jnp.int32)
    for k in range(len(rows) - 1, -1, -1):
        index = jnp.where(rows[k] == value, jnp.int32(k), index)
    return index


def _rank(y):
    """How many entries stand before each one in descending order; ties in order of position."""
    before = [sum((y[k] >= y[i] if k < i else y[k] > y[i]).astype(jnp.int32) for k in range(8) if k != i)
              for i in range(8)]
    return jnp.stack(before)


def _nearest_e8p(x):
    """Magnitudes [8, N], minus signs [8, N] and the shift's sign [1, N] of the codeword nearest to each column."""
    scores, odd = _shape_scores(jnp.stack([x - 0.25, x + 0.25], axis=1))
    scores, total = lax.optimization_barrier((scores, jnp.sum(x, axis=0)))
    best = jnp.max(scores, axis=0)
    down = best[1] - total / 2 > best[0] + total / 2  # shift -1/4 wins
    scores = jnp.where(down, scores[:, 1], scores[:, 0])
    shape = _first_equal(scores, jnp.max(scores, axis=0))
    shape, down = lax.optimization_barrier((shape[None], down[None]))  # [1, N], beside [8, N]

    v = jnp.where(down, x + 0.25, x - 0.25)
    y, odd = lax.optimization_barrier((jnp.abs(v), jnp.where(down, odd[1:], odd[:1])))
    rank = lax.optimization_barrier(_rank(y))
    sums = lax.optimization_barrier(y[TRIPLES[:, 0]] + y[TRIPLES[:, 1]] + y[TRIPLES[:, 2]])
    members = jnp.asarray((1 << TRIPLES).sum(1), jnp.int32)[_first_equal(sums, jnp.min(sums, axis=0))]
    in_triple = (members[None] >> jnp.arange(8, dtype=jnp.int32)[:, None]) & 1

    half, three, five = (jnp.asarray(a, x.dtype) for a in (0.5, 1.5, 2.5))
    threes = jnp.where(shape < 5, shape, jnp.where(shape == 5, 1, 2))  # entries above 1/2
    sorted_shapes = jnp.where(rank < threes, jnp.where((rank == 0) & (shape >= 5), five, three), half)
    magnitude = jnp.where(shape == 7, jnp.where(in_triple == 1, half, three), sorted_shapes)
    odd_sum = (shape == 1) | (shape == 3) | (shape >= 6)
    flip = (odd != odd_sum) & _flipped_entry(shape, rank, in_triple, y)
    return magnitude, (v < 0) != flip, down


def _flipped_entry(shape, rank, in_triple, y):
    """The entry whose sign yields to parity: the smallest (ties with one outside a triple go to one inside it)."""
    inside = jnp.where(in_triple == 1, y, jnp.inf)
    least = jnp.min(inside, axis=0)
    first = _first_equal(inside, least)[None]
    return jnp.where(shape == 7, jnp.arange(8, dtype=jnp.int32)[:, None] == first, rank == 7)


def e8p_round(x: Float[Array, "*batch n"]) -> tuple[Float[Array, "*batch n"], UInt[Array, "*batch n_8"]]:
    """The nearest E8P codeword to each 8 consecutive entries, and its 16-bit code (uint16); n is a multiple of 8."""
    magnitude, negative, down = _nearest_e8p(x.reshape(-1, 8).T)
    shift = jnp.where(down, jnp.asarray(-0.25, x.dtype), jnp.asarray(0.25, x.dtype))
    values = (jnp.where(negative, -magnitude, magnitude) + shift).T.reshape(x.shape)
    place = jnp.arange(8, dtype=jnp.int32)[:, None]
    is_three, is_five = magnitude == 1.5, magnitude == 2.5
    mask = jnp.sum(jnp.where(is_three, 1 << place, 0), axis=0, dtype=jnp.int32)
    five = jnp.sum(jnp.where(is_five, place, 0), axis=0, dtype=jnp.int32)
    three = jnp.where(mask == 0, five, jnp.sum(jnp.where(is_three, place, 0), axis=0, dtype=jnp.int32))
    pattern = jnp.where(jnp.any(is_five, axis=0), FIRST_FIVE_HALVES + 8 * five + three,
                        jnp.asarray(_pattern_of_mask())[mask])
    signs = jnp.sum(jnp.where(negative[:7], 1 << place[:7], 0), axis=0, dtype=jnp.int32)
    code = pattern << 8 | signs << 1 | down[0].astype(jnp.int32)
    return values, code.astype(jnp.uint16).reshape(*x.shape[:-1], x.shape[-1] // 8)


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


