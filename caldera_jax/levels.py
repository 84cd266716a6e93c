"""One level for all weights of a model: W ≈ diag(a) Z diag(b) with integers Z and steps a_i b_j = c / √(g_i D_j).

g_i is the importance of output i, D the diagonal of H = lower D lowerᵀ, and c the one number that sets the size of the
whole model.  Each weight has a rate of its own: the integers are chosen by a trellis along the outputs of a column
(``trellis``), with LDLQ's feedback from column to column, and stored by their probabilities (``entropy``).

KL(dense ‖ compressed) ≈ ½ Σ_i g_i e_i H e_iᵀ over all rows of all layers.  Where one more bit divides a weight's
distortion by 4, whatever its rate, the least is where all have the same: steps equal in the metric of g and D.

L R beside Z, if any, is rounded at the same level: with orthonormal columns of √g L, R is a weight like any other, and
with R fixed L is one whose inputs have the second moment R H Rᵀ.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.scipy.linalg import cho_solve
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from caldera_jax import entropy, hessian
from caldera_jax.codebooks import pad_columns
from caldera_jax.hessian import HessianFactors
from caldera_jax.ldlq import slab_width, sweep
from caldera_jax.regression import rank_constrained
from caldera_jax.trellis import SEQUENCE, STATES, trellis, viterbi

# Mean square of a rounding at high rate, in steps² (measured: tests/test_level.py).
DISTORTION = {1: 1 / 12, 4: 0.268, 8: 0.262, 16: 0.260, 32: 0.256, 64: 0.254, 128: 0.252, 256: 0.250}


@dataclass(frozen=True)
class LevelConfig:
    """Every choice at a level; hashable, so that one configuration and one shape compile once.

    states: of the trellis; 1 for scalar integers.  bit_price: λ in steps² a bit (None: ``price``).  rank: of L R.
    damping: added to H in units of its mean diagonal.
    """

    states: int = 64
    bit_price: float | None = None
    rank: int = 0
    damping: float = 0.01

    def __post_init__(self):
        if self.states not in STATES:
            raise ValueError(f"states must be one of {', '.join(map(str, STATES))}; got {self.states!r}")
        for name, value in (("bit_price", self.bit_price or 0), ("rank", self.rank), ("damping", self.damping)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")

    @property
    def price(self) -> float:
        """λ."""
        return price(self.states) if self.bit_price is None else self.bit_price


@dataclass(frozen=True)
class Integers:
    """What stands in place of a grid of fixed rate: integers of any size, coded by a trellis of so many states."""

    states: int = 64
    block: ClassVar[int] = 1
    group: ClassVar[None] = None


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
        a, b = self.scales(dtype)
        return a[:, None] * self.integers.astype(dtype) * b[None]

    def scales(self, dtype) -> tuple[Float[Array, " m"], Float[Array, " n"]]:
        """a and b."""
        return jnp.asarray(self.level, dtype) * power(self.row, dtype), power(self.column, dtype)


class Coded(NamedTuple):
    """A ``Levelled`` as it is stored; the sides are ``_sides``."""

    level: Float[np.ndarray, ""]
    integers: entropy.Stream
    sides: entropy.Classes

    @property
    def stored_bits(self) -> int:
        """Every bit that must be kept."""
        return 8 * self.level.nbytes + self.integers.stored_bits + self.sides.stored_bits


def narrow(found: Levelled) -> Levelled:
    """The same in as few bytes as hold it: integers of 8 bits but where one needs more.  Host function."""
    integers = np.asarray(found.integers)
    reach = max(int(integers.max(initial=0)), -int(integers.min(initial=0)) - 1)
    kind = next(kind for kind in (np.int8, np.int16, np.int32) if reach <= np.iinfo(kind).max)
    return Levelled(jnp.asarray(found.level), jnp.asarray(integers.astype(kind)),
                    *(jnp.asarray(classes, jnp.int16) for classes in found[2:]))


def encode(found: Levelled, states: int = 64) -> Coded:
    """As it is stored.  Host function."""
    found = Levelled(*map(np.asarray, found))
    return Coded(found.level, entropy.encode(found.integers, found.spread, found.width, states),
                 entropy.encode_classes(_sides(found.row, found.spread, found.column, found.width)))


def decode(stored: Sequence[Coded], shapes: Sequence[tuple[int, int]], states: int = 64) -> list[Levelled]:
    """The same again, to the bit, all at once.  Host function.  ValueError where a stream is damaged."""
    sides = entropy.decode_classes([one.sides for one in stored], [(m, m, n, n) for m, n in shapes])
    spreads, widths = ([of[i] - of[i - 1] for of in sides] for i in (1, 3))
    integers = entropy.decode_all([one.integers for one in stored], spreads, widths, states)
    return [Levelled(one.level, q, row, column, spread, width) for one, q, (row, _, column, _), spread, width in zip(
        stored, integers, sides, spreads, widths, strict=True)]


def _sides(row, spread, column, width):
    """As they are stored: how wide a row is in steps says less than how wide it is."""
    return [row, spread + row, column, width + column]


def octave(x: Float[Array, "*shape"], least: int = -320, most: int = 320) -> Int[Array, "*shape"]:
    """The nearest eighth of an octave: round(8 log2 x), within bounds."""
    return jnp.clip(jnp.round(8 * jnp.log2(x)), least, most).astype(jnp.int32)


def power(octaves: Int[Array, "*shape"], dtype) -> Float[Array, "*shape"]:
    """2^(octaves / 8)."""
    return jnp.exp2(octaves.astype(dtype) / 8)


def price(states: int) -> float:
    """Of a bit, in steps²: −dD/dR = 2 ln 2 D at high rate, so that a bit in the code is worth one in the steps."""
    return 2 * math.log(2) * DISTORTION[states]


def quantize(w: Float[Array, "m n"], factors: HessianFactors, g: Float[Array, " m"], c: ArrayLike, states: int = 64,
             bit_price: float | None = None, rows: Int[Array, " r"] | None = None) -> Levelled:
    """Integers at level c: small Σ_i g_i e_i H e_iᵀ + λ c² bits.  H is that of the factors, of block 1.

    Rows are independent given H, so that the feedback of a column is scalar and exact, and its sequences of 256
    outputs are lanes.  O(m n² + m n states); n columns one after the other, 256 steps each.  ``rows``: the integers of
    these alone, a sample (all else is of the whole).
    """
    n, lam = w.shape[1], LevelConfig(states, bit_price).price
    d, c = jnp.diagonal(factors.root) ** 2, jnp.asarray(c, w.dtype)
    row, column = octave(1 / jnp.sqrt(g)), octave(1 / jnp.sqrt(d))
    w, b = w / (c * power(row, w.dtype))[:, None], power(column, w.dtype)
    spread = deviation(w / b[None], 1, n)
    if rows is not None:
        w = w[rows]
    of_rows = spread if rows is None else spread[rows]
    live = jnp.maximum(jnp.sum(of_rows > entropy.DEAD), 1).astype(w.dtype)
    m = len(w)
    across, length = -(-m // SEQUENCE), min(m, SEQUENCE)
    fold = lambda a, fill=0: jnp.pad(a, (0, across * length - m), constant_values=fill).reshape(across, length).T
    dead = fold(of_rows <= entropy.DEAD, True)

    slab = slab_width(n, 1)
    width = n + -n % slab
    steps = jnp.pad(b, (0, width - n), constant_values=1)

    def rounded(target, start):
        step = lax.dynamic_index_in_dim(steps, start, keepdims=False)
        y = target[:, 0] / step
        wide = deviation(y / power(of_rows, y.dtype), 0, live)
        q = search(fold(y), fold(of_rows) + wide, lam, states, dead | (wide <= entropy.DEAD)).T.reshape(-1)[:m]
        return (q.astype(w.dtype) * step)[:, None], (q, wide)

    padded, lower = pad_columns(w, width), jnp.pad(factors.lower, (0, width - n))
    _, (integers, wide) = sweep(padded, padded, lower, rounded, 1, slab, triangular=True)
    return Levelled(c, integers[:n].T, row, column, spread, wide[:n])


def decompose(w: Float[Array, "m n"], h: Float[Array, "n n"], g: Float[Array, " m"], c: ArrayLike,
              config: LevelConfig, rows: Int[Array, " r"] | None = None
              ) -> tuple[Levelled, Levelled | None, Levelled | None, HessianFactors]:
    """Z, and L and R unless ``config.rank`` is 0, for W ≈ Z + L R at level c; h in its own units, g of any size.

    U S Vᵀ = √g W H^½, the first k:  R = round(Uᵀ √g W),  L = round(W H Rᵀ (R H Rᵀ)⁻¹),  Z = round(W − L R), each by
    ``quantize`` in its own metric: H and 1, R H Rᵀ and g, H and g.  O(m n²), and an SVD for L R.  ``rows``: of Z.
    """
    unit, factors = jnp.mean(jnp.diagonal(h)), hessian.factor(h, config.damping)
    if not config.rank:
        return _rounded(w, factors, g, c, unit, config, rows), None, None, factors
    damped = factors.h + factors.damping * jnp.eye(len(h), dtype=w.dtype)
    _, right = rank_constrained(jnp.sqrt(g)[:, None] * w, factors.root, config.rank)
    right = _rounded(right, factors, jnp.ones(config.rank, w.dtype), c, unit, config)
    r = right.dense(w.dtype)
    inner = r @ damped @ r.T
    of_inner, size = hessian.factor(inner, 1e-6), jnp.mean(jnp.diagonal(inner))
    fit = cho_solve((of_inner.root, True), r @ damped @ w.T) / jnp.where(size > 0, size, 1)
    left = _rounded(fit.T, of_inner, g, c, unit * size, config)
    return _rounded(w - left.dense(w.dtype) @ r, factors, g, c, unit, config, rows), left, right, factors


def _rounded(w, factors, g, c, unit, config, rows=None):
    """``quantize`` with g and H in units of their means; where either is zero nothing matters, and all is 0."""
    of_g = jnp.mean(g)
    matters = of_g * unit > 0
    size = jnp.where(matters, of_g * unit, 1)
    return quantize(jnp.where(matters, w, 0), factors, g / jnp.where(matters, of_g, 1), c / jnp.sqrt(size),
                    config.states, config.bit_price, rows)


class Curve(NamedTuple):
    """Bits of a layer at every level, from those at level c: ``counts`` weights have the class of width ``lowest`` + k
    there, each counted as often as its bits were those predicted; ``side``: bits that no level changes."""

    c: float
    lowest: int
    counts: list[float]
    side: int

    def bits(self, c: float, config: LevelConfig) -> float:
        """Predicted: where the steps are twice as large, the targets are half as wide."""
        classes = self.lowest - 8 * math.log2(c / self.c) + np.arange(len(self.counts))
        known = np.arange(entropy.WIDTHS[0], entropy.WIDTHS[1] + 1)
        return float(np.interp(classes, known, rates(config)) @ self.counts) + self.side


@cache
def rates(config: LevelConfig, length: int = SEQUENCE) -> Float[np.ndarray, " widths"]:
    """Bits that the search spends on a Gaussian target in sequences of this length, by the class of its width: measured
    on 16,384 of each, or a few more."""
    each = -(-16_384 // length)
    widths = np.repeat(np.arange(entropy.WIDTHS[0], entropy.WIDTHS[1] + 1), each)
    drawn = np.random.default_rng(0).standard_normal((length, len(widths))) * 2.0 ** (widths / 8)
    of_each = np.broadcast_to(widths, drawn.shape).astype(np.int32)
    q = jax.jit(search, static_argnums=(2, 3))(drawn.astype(np.float32), of_each, config.price, config.states,
                                               np.zeros(drawn.shape, bool))
    bits, _ = entropy.bits(np.asarray(q), np.zeros(length, np.int32), widths, config.states)
    return np.maximum.accumulate(bits.reshape(length, -1, each).mean((0, 2)))


def measure(parts: Sequence[Levelled | None], c: float, config: LevelConfig, rows: Int[np.ndarray, " r"]) -> Curve:
    """The Curve of what ``decompose`` found at level c, Z of these rows alone.  Host function."""
    counts, side, lowest = np.zeros(2 * (128 - entropy.DEAD)), 0, 2 * entropy.DEAD
    for i, part in enumerate(parts):
        if part is None:
            continue
        _, q, row, column, spread, width = map(np.asarray, part)
        of_q = spread[rows] if i == 0 else spread
        bits, classes = entropy.bits(q, of_q, width, config.states)
        # Widths fitted to few rows save there what they will not save elsewhere: 1 / (2 ln 2) bit each, less what
        # rounding to classes leaves.  The share is a guess; a sum that misses the budget is corrected.
        fitted = 0.6 * (1 - len(of_q) / len(spread)) / math.log(4) * len(width)
        of_sample = rates(config, len(of_q)) if len(of_q) < min(len(spread), SEQUENCE) else rates(config)
        predicted = of_sample[np.clip(classes, *entropy.WIDTHS) - entropy.WIDTHS[0]].sum()
        scale = (bits.sum() + fitted) / predicted if predicted > 0 else 1.0
        histograms = (np.bincount(a[a > entropy.DEAD] - entropy.DEAD, minlength=1) for a in (spread, width))
        both = scale * np.convolve(*histograms)
        counts[:len(both)] += both
        side += 32 + math.prod(entropy.lanes(len(row), len(column))) * entropy.LANE
        side += entropy.encode_classes(_sides(row, spread, column, width)).stored_bits
    used = np.flatnonzero(counts)
    first, last = (used[0], used[-1]) if len(used) else (0, 0)
    return Curve(c, lowest + int(first), counts[first:last + 1].tolist(), side)


def solve(curves: Sequence[Curve], budget: float | int, config: LevelConfig, weights: int = 1) -> float:
    """The least level c at which all take no more bits than the budget, as their curves predict.

    Raises ValueError for a budget that no level meets: less than the sides alone take, or more than all weights take
    where their probabilities are at their widest.
    """
    total = lambda octaves: sum(curve.bits(2.0**octaves, config) for curve in curves)
    at = [math.log2(curve.c) for curve in curves]
    finest, coarsest = min(at) - 40, max(at) + 40
    least, most = total(coarsest), total(finest)
    if not least < budget < most:
        raise ValueError(f"a budget of {budget / weights:.4f} bits a weight ({budget / 8e6:.4f} MB) is "
                         f"{'below' if budget <= least else 'above'} what any level takes, {least / weights:.4f} to "
                         f"{most / weights:.4f}: {'raise' if budget <= least else 'lower'} it")
    for _ in range(60):
        middle = (finest + coarsest) / 2
        finest, coarsest = (middle, coarsest) if total(middle) > budget else (finest, middle)
    return 2.0**coarsest


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
