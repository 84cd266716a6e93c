"""One level for all weights of a model: W ≈ diag(a) Z diag(b) with integers Z and steps a_i b_j = c / √(g_i D_j).

g_i is the importance of output i, D the diagonal of H = lower D lowerᵀ, and c the one number that sets the size of the
whole model.  Each weight has a rate of its own: the integers are chosen by a trellis along the outputs of a column
(``trellis``), with LDLQ's feedback from column to column, and stored by their probabilities (``entropy``).

KL(dense ‖ compressed) ≈ ½ Σ_i g_i e_i H e_iᵀ over all rows of all layers.  Where one more bit divides a weight's
distortion by 4, whatever its rate, the least is where all have the same: steps equal in the metric of g and D.

So far a function of one matrix: the commands do not use it yet.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from caldera_jax import entropy
from caldera_jax.codebooks import pad_columns
from caldera_jax.hessian import HessianFactors
from caldera_jax.ldlq import slab_width, sweep
from caldera_jax.trellis import SEQUENCE, trellis, viterbi

# Mean square of a rounding at high rate, in steps² (measured: tests/test_level.py).
DISTORTION = {1: 1 / 12, 4: 0.272, 8: 0.268, 16: 0.267, 32: 0.265, 64: 0.264, 128: 0.263, 256: 0.261}


class Levelled(NamedTuple):
    """W ≈ c diag(2^(row / 8)) Z diag(2^(column / 8)); z_ij has the width spread_i + width_j of ``entropy``."""

    level: Float[Array, ""]
    integers: Int[Array, "m n"]
    row: Int[Array, " m"]
    column: Int[Array, " n"]
    spread: Int[Array, " m"]
    width: Int[Array, " n"]

    def dense(self, dtype=jnp.float32) -> Float[Array, "m n"]:
        """The matrix."""
        a, b = self.level.astype(dtype) * power(self.row, dtype), power(self.column, dtype)
        return a[:, None] * self.integers.astype(dtype) * b[None]


class Coded(NamedTuple):
    """A ``Levelled`` as it is stored; the sides are its row, spread, column and width."""

    level: Float[np.ndarray, ""]
    integers: entropy.Stream
    sides: entropy.Classes

    @property
    def stored_bits(self) -> int:
        """Every bit that must be kept."""
        return 8 * self.level.nbytes + self.integers.stored_bits + self.sides.stored_bits


def encode(found: Levelled, states: int = 8) -> Coded:
    """As it is stored.  Host function."""
    found = Levelled(*map(np.asarray, found))
    return Coded(found.level, entropy.encode(found.integers, found.spread, found.width, states),
                 entropy.encode_classes([found.row, found.spread, found.column, found.width]))


def decode(stored: Coded, shape: tuple[int, int], states: int = 8) -> Levelled:
    """The same again, to the bit.  Host function.  ValueError where a stream is damaged."""
    m, n = shape
    row, spread, column, width = entropy.decode_classes(stored.sides, (m, m, n, n))
    return Levelled(stored.level, entropy.decode(stored.integers, spread, width, states), row, column, spread, width)


def octave(x: Float[Array, "*shape"], least: int = -320, most: int = 320) -> Int[Array, "*shape"]:
    """The nearest eighth of an octave: round(8 log2 x), within bounds."""
    return jnp.clip(jnp.round(8 * jnp.log2(x)), least, most).astype(jnp.int32)


def power(octaves: Int[Array, "*shape"], dtype) -> Float[Array, "*shape"]:
    """2^(octaves / 8)."""
    return jnp.exp2(octaves.astype(dtype) / 8)


def price(states: int) -> float:
    """Of a bit, in steps²: −dD/dR = 2 ln 2 D at high rate, so that a bit in the code is worth one in the steps."""
    return 2 * math.log(2) * DISTORTION[states]


def quantize(w: Float[Array, "m n"], factors: HessianFactors, g: Float[Array, " m"], c: ArrayLike,
             states: int = 8, bit_price: float | None = None) -> Levelled:
    """Integers at level c: small Σ_i g_i e_i H e_iᵀ + λ c² bits.  H is that of the factors, of block 1.

    Rows are independent given H, so that the feedback of a column is scalar and exact, and its sequences of 64 outputs
    are lanes.  O(m n² + m n states); n columns one after the other, 64 steps each.
    """
    (m, n), lam = w.shape, price(states) if bit_price is None else bit_price
    d, c = jnp.diagonal(factors.root) ** 2, jnp.asarray(c, w.dtype)
    row, column = octave(1 / jnp.sqrt(g)), octave(1 / jnp.sqrt(d))
    w, b = w / (c * power(row, w.dtype))[:, None], power(column, w.dtype)
    spread = deviation(w / b[None], 1, n)
    live = jnp.maximum(jnp.sum(spread > entropy.DEAD), 1).astype(w.dtype)
    across, length = -(-m // SEQUENCE), min(m, SEQUENCE)
    fold = lambda a, fill=0: jnp.pad(a, (0, across * length - m), constant_values=fill).reshape(across, length).T
    dead = fold(spread <= entropy.DEAD, True)

    slab = slab_width(n, 1)
    width = n + -n % slab
    steps = jnp.pad(b, (0, width - n), constant_values=1)

    def rounded(target, start):
        step = lax.dynamic_index_in_dim(steps, start, keepdims=False)
        y = target[:, 0] / step
        wide = deviation(y / power(spread, y.dtype), 0, live)
        q = search(fold(y), fold(spread) + wide, lam, states, dead | (wide <= entropy.DEAD)).T.reshape(-1)[:m]
        return (q.astype(w.dtype) * step)[:, None], (q, wide)

    padded, lower = pad_columns(w, width), jnp.pad(factors.lower, (0, width - n))
    _, (integers, wide) = sweep(padded, padded, lower, rounded, 1, slab, triangular=True)
    return Levelled(c, integers[:n].T, row, column, spread, wide[:n])


def deviation(y: Float[Array, "*shape"], axis: int, count: ArrayLike) -> Int[Array, "*rest"]:
    """The class of the root mean square of y; ``count`` of its numbers count, the others are zeros.

    What exceeds four times the result is cut to that, so that an outlier does not widen it.  ``entropy.DEAD`` where all
    numbers are zero, and only there.
    """
    square, least = jnp.square(y), jnp.finfo(y.dtype).tiny
    mean = jnp.sum(square, axis=axis, keepdims=True) / count + least
    for _ in range(8):
        mean = jnp.sum(jnp.minimum(square, 16 * mean), axis=axis, keepdims=True) / count + least
    found = octave(jnp.sqrt(jnp.squeeze(mean, axis)), entropy.DEAD + 1, 127)
    return jnp.where(jnp.any(y != 0, axis=axis), found, entropy.DEAD)


def search(y: Float[Array, "t lanes"], width: Int[Array, "t lanes"], bit_price: float,
           states: int, absent: Bool[Array, "t lanes"]) -> Int[Array, "t lanes"]:
    """Integers q of the path of least Σ (y − q)² + bit_price bits(q), with the bits of ``entropy.tables`` for a width.

    In a class the least is one of three: the two on either side of where the bits of a Gaussian put the least, and the
    nearest.  An absent place gets 0.  (Bits grow ever faster with |q| until they are those of an outlier.)
    """
    code = trellis(states)
    spacing, table = code.spacing, entropy.tables(code.spacing)
    y, width = y[:, None], (jnp.clip(width.astype(jnp.int32), *entropy.WIDTHS) - entropy.WIDTHS[0])[:, None]
    classes = jnp.arange(4 if spacing == 2 else 1, dtype=jnp.int32)[None, :, None]
    period, parity = classes.size, classes & spacing - 1
    at = classes.astype(y.dtype)
    drawn = y / (1 + bit_price / (2 * math.log(2) * jnp.exp2((width + entropy.WIDTHS[0]).astype(y.dtype) / 4)))
    below = at + period * jnp.floor((drawn - at) / period)
    choices = jnp.stack([below, below + period, at + period * jnp.round((y - at) / period)]).astype(jnp.int32)
    row = (width * spacing + parity) * table.bits.shape[2]
    bits = jnp.asarray(table.bits.ravel(), y.dtype)[row[None] + table.symbol(choices)]
    cost = (y[None] - choices.astype(y.dtype)) ** 2 + bit_price * bits
    best = jnp.argmin(cost, axis=0, keepdims=True)
    least, q = (jnp.take_along_axis(a, best, axis=0)[0] for a in (cost, choices))
    chosen = jnp.take_along_axis(q, viterbi(least, code, absent)[:, None], axis=1)[:, 0]
    return jnp.where(absent, 0, chosen)
