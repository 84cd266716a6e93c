"""Probabilities of trellis-coded integers, and range coding of them: rANS (Duda, arXiv 1311.2540).

A target is drawn from a Gaussian of standard deviation 2^(width / 8) steps.  An integer, of those its state allows,
spacing k + parity, has the probability of all targets that it is the best for: as a bit has its price, and the rarer
integers have more of them, these cells do not end in the middle between neighbours.  Widths are small integers, the sum
of one for the row and one for the column, so that all tables are made once and no layer stores one.

Integers lie in lanes of at most 256 x 32, whole sequences of the trellis one after the other.  A lane is a stream of
its own, of 16-bit words beside a state of 32 bits, and all lanes are coded side by side.
"""

import math
from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Int, Int8, Int16, Int32, UInt16, UInt32
from scipy.special import ndtr

from caldera_jax.trellis import SEQUENCE, trellis

PRECISION = 12  # bits of a frequency: those of a row sum to 4096
WIDTHS = (-24, 44)  # standard deviations of 1/8 to 45 steps
DEAD = -64  # the class of a row or column that is all zeros: it is not coded, and the trellis passes it over
OUTLIER = 64  # bits of an integer that the tables do not hold, place and value
COLUMNS = 32  # of a lane
LIST = 64  # integers in a column, where those of a list are coded
START = np.uint32(1 << 16)
PRICE = {1: 0.116, 2: 0.37}  # λ in steps² a bit, about ``levels.price``; what is stored depends on it, so it stays
LANE = 48  # bits of a lane beside its words: its state and its length


class Tables(NamedTuple):
    """Rows are widths, by parity; symbol s is the integer spacing (s - reach) + parity."""

    frequency: np.ndarray  # int32 [widths, parities, symbols]
    below: np.ndarray  # sums of the frequencies before
    bits: np.ndarray  # float64; of what has no frequency, those of an outlier

    @property
    def reach(self) -> int:
        """The largest |k|; it has no frequency, and stands for all beyond."""
        return self.frequency.shape[2] // 2

    def symbol(self, q):
        """The symbols of integers, NumPy's or JAX's."""
        return (q >> self.frequency.shape[1] - 1).clip(-self.reach, self.reach) + self.reach


class Stream(NamedTuple):
    """Integers as they are stored; ``places`` and ``values`` are of the outliers, in row-major order."""

    words: UInt16[np.ndarray, " words"]
    lengths: UInt16[np.ndarray, " lanes"]
    states: UInt32[np.ndarray, " lanes"]
    places: UInt32[np.ndarray, " outliers"]
    values: Int32[np.ndarray, " outliers"]

    @property
    def stored_bits(self) -> int:
        """All of it."""
        return 8 * sum(a.nbytes for a in self)


@cache
def tables(spacing: int) -> Tables:
    """For the integers of one parity (spacing 2), or for all (1).

    Between q and its neighbour p the targets change hands where (y − q)² + λ bits(q) = (y − p)² + λ bits(p), with bits
    that follow from the cells: a few rounds from equal bits.  Computed in float64 and rounded; no frequency is so near
    to where it would be another that a processor's last bits could matter (tested), as writer and reader must have the
    same ones.
    """
    reach = 127  # symbols fit in 8 bits
    width, parity, k = np.meshgrid(range(WIDTHS[0], WIDTHS[1] + 1), range(spacing), range(-reach, reach + 1),
                                   indexing="ij")
    q, sigma, bits = spacing * k + parity, 2.0 ** (width / 8), np.zeros(k.shape)
    for _ in range(6):
        drawn = np.clip(PRICE[spacing] * np.diff(bits) / (2 * spacing), -0.45 * spacing, 0.45 * spacing)
        edges = np.pad((q[..., 1:] + q[..., :-1]) / 2 + drawn, ((0, 0), (0, 0), (1, 1)), constant_values=np.inf)
        low, high = (ndtr(-np.abs(edge) / sigma) for edge in (edges[..., :-1], edges[..., 1:]))
        p = np.where(q == 0, 1 - low - high, np.abs(low - high))  # of the nearer tail, whose digits are all right
        bits = -np.log2(np.maximum(p, 1e-9))
    kept = (p > 2.0 ** -PRECISION / 2) | (abs(q) <= 2)  # what stands for outliers has one
    kept &= abs(k) < reach
    rows = zip(p.reshape(-1, p.shape[2]), kept.reshape(-1, p.shape[2]), strict=True)
    frequency = np.array([_rounded(*row) for row in rows], np.int32).reshape(p.shape)
    bits = PRECISION - np.log2(np.maximum(frequency, 1))
    return Tables(frequency, np.cumsum(frequency, axis=2, dtype=np.int32) - frequency,
                  np.where(frequency > 0, bits, PRECISION + OUTLIER))


def bits(integers: Int[np.ndarray, "m n"], row: Int[np.ndarray, " m"], column: Int[np.ndarray, " n"],
         states: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits of each integer that is coded, by the tables, and its width; ``encode`` adds what ``LANE`` counts."""
    spacing = trellis(states).spacing
    table, coded = tables(spacing), ~((row[:, None] <= DEAD) | (column <= DEAD))
    q, width = integers.astype(np.int32)[coded], (row[:, None] + column)[coded]
    return table.bits[np.clip(width, *WIDTHS) - WIDTHS[0], q & spacing - 1, table.symbol(q)], width


def _rounded(p, kept):
    """Frequencies near p, at least one where ``kept``, else none."""
    left = (1 << PRECISION) - kept.sum()
    share = np.where(kept, p, 0) * left / p[kept].sum()
    whole = np.floor(share).astype(int)
    whole[np.argsort(whole - share, kind="stable")[:left - whole.sum()]] += 1
    return whole + kept


def stand_in(q, spacing: int):
    """The integer of the same class, -2 to 1, coded in the place of an outlier: the trellis goes the same way."""
    return (q + 2 & 3) - 2 if spacing == 2 else 0 * q


def lanes(m: int, n: int) -> tuple[int, int]:
    """Of a matrix, down and across."""
    return -(-m // SEQUENCE), -(-n // COLUMNS)


def encode(integers: Int[np.ndarray, "m n"], row: Int[np.ndarray, " m"], column: Int[np.ndarray, " n"],
           states: int) -> Stream:
    """The integers as a stream; ``row`` and ``column`` are the classes whose sums are the widths."""
    spacing = trellis(states).spacing
    table, q = tables(spacing), np.asarray(integers, np.int32)
    absent = (row[:, None] <= DEAD) | (column <= DEAD)
    if q[absent].any():
        raise ValueError(f"a row or column of class {DEAD} must be all zeros")
    width = np.clip(row[:, None] + column, *WIDTHS) - WIDTHS[0]
    parity = q & spacing - 1
    symbol = table.symbol(q)
    out = (table.frequency[width, parity, symbol] == 0) & ~absent
    symbol = np.where(out, table.symbol(stand_in(q, spacing)), symbol)
    frequency, below = (_lanes(np.where(absent, nothing, a[width, parity, symbol]), nothing).astype(np.uint32)
                        for a, nothing in ((table.frequency, 1 << PRECISION), (table.below, 0)))
    ends, full, words = jax.device_get(_push(frequency, below))
    places = np.flatnonzero(out)
    return Stream(words.T[full.T], full.sum(0).astype(np.uint16), ends, places.astype(np.uint32),
                  q.ravel()[places])


def decode(stream: Stream, row: Int[np.ndarray, " m"], column: Int[np.ndarray, " n"],
           states: int) -> Int[np.ndarray, "m n"]:
    """What ``encode`` was given, in 16 bits, or in 32 where one needs more.

    ValueError where a stream does not end as it began: damaged, or of other classes.
    """
    return decode_all([stream], [row], [column], states)[0]


def decode_all(streams: Sequence[Stream], rows: Sequence[Int[np.ndarray, " _"]],
               columns: Sequence[Int[np.ndarray, " _"]], states: int) -> list[Int[np.ndarray, "_ _"]]:
    """Several at once: the lanes of all side by side.  Raises as ``decode``, whichever is damaged."""
    tall = min(SEQUENCE, max(map(len, rows)))  # no lane is taller than the tallest matrix, and lists are short
    shapes = [lanes(len(row), len(column)) for row, column in zip(rows, columns, strict=True)]
    below = lambda a, length: np.pad(a, (0, -len(a) % length), constant_values=DEAD).reshape(-1, length)
    of_row, of_column = (np.ascontiguousarray(np.concatenate(each).T, np.int32) for each in (
        [np.repeat(below(row, SEQUENCE), over, axis=0)[:, :tall] for row, (_, over) in zip(rows, shapes, strict=True)],
        [np.tile(below(column, COLUMNS), (down, 1)) for column, (down, _) in zip(columns, shapes, strict=True)]))
    counts = [*map(math.prod, shapes)]
    if any({len(s.lengths), len(s.states)} != {count} for s, count in zip(streams, counts, strict=True)):
        raise ValueError("a stream of coded integers is damaged: it has not as many lanes as its matrix")
    words, lengths, starts = (np.concatenate([stream[i] for stream in streams]) for i in range(3))
    first = np.cumsum(lengths, dtype=np.int32) - lengths
    room = len(first) * (COLUMNS * SEQUENCE * PRECISION // 16 + 2)  # for as many as there can be: one program a shape
    if any(len(s.words) != s.lengths.sum(dtype=np.int64) for s in streams) or len(words) >= room:
        raise ValueError("a stream of coded integers is damaged: its words are not as many as its lanes say")
    words = np.pad(words, (0, room - len(words)))
    of_all, ends, read = jax.device_get(_pull(words, first, starts, of_row, of_column, states))
    sizes = [len(row) * len(column) for row, column in zip(rows, columns, strict=True)]
    if (ends != START).any() or (read - first != lengths).any() or any(
            (stream.places >= size).any() for stream, size in zip(streams, sizes, strict=True)):
        raise ValueError("a stream of coded integers is damaged, or is read with other scales than it was written with")
    found, apart = [], np.split(of_all, np.cumsum(counts)[:-1], axis=1)
    for stream, shape, q, row, column in zip(streams, shapes, apart, rows, columns, strict=True):
        kind = q.dtype if (stream.values.astype(q.dtype) == stream.values).all() else stream.values.dtype
        q = q.reshape(COLUMNS, tall, *shape).transpose(2, 1, 3, 0).reshape(tall * shape[0], -1)
        q = q[:len(row), :len(column)].astype(kind, order="C")
        q.reshape(-1)[stream.places] = stream.values
        found.append(q)
    return found


class Classes(NamedTuple):
    """Arrays of small integers as they are stored: coded about a middle, with the width that suits each."""

    stream: Stream
    middles: Int16[np.ndarray, " arrays"]
    widths: Int8[np.ndarray, " arrays"]

    @property
    def stored_bits(self) -> int:
        """All of it."""
        return self.stream.stored_bits + 8 * (self.middles.nbytes + self.widths.nbytes)


def encode_classes(arrays: Sequence[Int[np.ndarray, " _"]]) -> Classes:
    """Small integers: classes of scales and widths, those of a layer together."""
    middles = np.array([np.median(a) for a in arrays]).round().astype(np.int16)
    apart = [_folded(a - middle) for a, middle in zip(arrays, middles, strict=True)]
    widths = np.array([_best_width(a) for a in apart], np.int8)
    columns = np.repeat(widths.astype(np.int32), [a.shape[1] for a in apart])
    return Classes(encode(np.hstack(apart), np.zeros(LIST, np.int32), columns, 1), middles, widths)


def decode_classes(found: Sequence[Classes], sizes: Sequence[Sequence[int]]) -> list[list[Int32[np.ndarray, " _"]]]:
    """The arrays, of these sizes, of several layers at once.  ValueError where they are damaged."""
    columns = [[-(-size // LIST) for size in of] for of in sizes]
    widths = [np.repeat(of.widths.astype(np.int32), count) for of, count in zip(found, columns, strict=True)]
    rows = [np.zeros(LIST, np.int32)] * len(found)
    streams = decode_all([of.stream for of in found], rows, widths, 1)
    return [[a.T.ravel()[:size] + np.int32(middle) for a, size, middle in zip(
        np.split(stream, np.cumsum(count)[:-1], axis=1), of_sizes, of.middles, strict=True)]
            for stream, count, of_sizes, of in zip(streams, columns, sizes, found, strict=True)]


def _folded(a):
    """[64, columns] of a list, with zeros at its end."""
    return np.pad(a, (0, -len(a) % LIST)).reshape(-1, LIST).T


def _best_width(a):
    """That of the fewest bits."""
    table = tables(1)
    return WIDTHS[0] + int(np.argmin(table.bits[:, 0, table.symbol(a.ravel())].sum(1)))


def _lanes(a, fill):
    """[8192, lanes] of a matrix [m, n]: 32 columns of 256 rows, one after the other."""
    m, n = a.shape
    a = np.pad(a, ((0, -m % SEQUENCE), (0, -n % COLUMNS)), constant_values=fill)
    a = a.reshape(-1, SEQUENCE, a.shape[1] // COLUMNS, COLUMNS).transpose(3, 1, 0, 2)
    return a.reshape(COLUMNS * SEQUENCE, -1)


@jax.jit
def _push(frequency: UInt32[Array, "t lanes"], below: UInt32[Array, "t lanes"]):
    """States at the end, and for each symbol whether a word went out, and which."""
    def step(x, symbol):
        f, b = symbol
        full, word = x >> 20 >= f, x.astype(jnp.uint16)
        x = jnp.where(full, x >> 16, x)
        return (x // f << PRECISION) + x % f + b, (full, word)

    start = jnp.full(frequency.shape[1], START)
    x, (full, words) = lax.scan(step, start, (frequency, below), reverse=True)
    return x, full, words


@cache
def _slots(spacing: int) -> np.ndarray:
    """uint32, for each width, parity and slot: the symbol (8 bits), its frequency less one (12), the slot's place in it
    (12).  The last 4096 are of what is not there: the integer 0, free of charge."""
    table = tables(spacing)
    rows = []
    for frequency, below in zip(table.frequency.reshape(-1, table.frequency.shape[2]),
                                table.below.reshape(-1, table.below.shape[2]), strict=True):
        symbol = np.repeat(np.arange(len(frequency)), frequency)
        rows.append(symbol << 24 | frequency[symbol] - 1 << 12 | np.arange(len(symbol)) - below[symbol])
    rows.append(table.reach << 24 | (1 << PRECISION) - 1 << 12 | np.arange(1 << PRECISION))
    return np.concatenate(rows).astype(np.uint32)


@partial(jax.jit, static_argnames="trellis_states")
def _pull(words, read, states, of_row, of_column, trellis_states):
    code = trellis(trellis_states)
    spacing, reach = code.spacing, tables(code.spacing).reach
    slots, after = jnp.asarray(_slots(spacing)), jnp.asarray(code.after.ravel())
    parity_of, nothing = jnp.asarray(code.parity), jnp.int32(len(_slots(spacing)) >> PRECISION) - 1

    def column(carry, of_column):
        def place(carry, of_row):
            x, read, state = carry
            width, parity = of_row + of_column, parity_of[state]
            gone = (of_row <= DEAD) | (of_column <= DEAD)
            table = jnp.where(gone, nothing, (jnp.clip(width, *WIDTHS) - WIDTHS[0]) * spacing + parity)
            found = slots[(table << PRECISION) + (x & (1 << PRECISION) - 1).astype(jnp.int32)]
            x = ((found >> 12 & 4095) + 1) * (x >> PRECISION) + (found & 4095)
            empty = x < START
            x = jnp.where(empty, x << 16 | words[read].astype(jnp.uint32), x)
            q = spacing * ((found >> 24).astype(jnp.int32) - reach) + jnp.where(gone, 0, parity)
            state = jnp.where(gone, state, after[2 * state + (q >> 1 & 1)])
            return (x, read + empty.astype(jnp.int32), state), q.astype(jnp.int16)

        carry, q = lax.scan(place, (*carry, jnp.zeros_like(carry[1])), of_row)
        return carry[:2], q

    (x, read), q = lax.scan(column, (states, read), of_column)
    return q.reshape(-1, q.shape[2]), x, read
