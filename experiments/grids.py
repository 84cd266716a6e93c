"""The grids of the baselines, their 16-bit scales, and the bits that they store."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from caldera_jax.codebooks import Codebook, Half, NormalFloat, Quantized, ResidualE8P, Uniform, dequantize, quantize
from caldera_jax.packing import row_bytes

NF_GROUP, NF_SCALES = 64, 256  # weights that share a scale of NormalFloat, and such scales that share one; as in QLoRA
SHRINKS = tuple(1 - i / 50 for i in range(1, 41))  # of the range of a group, tried beside 1: 0.98 to 0.2
CLIP_POWER = 2.4  # of the errors that the best shrink is chosen by, as in GPTQ's code: what is large is clipped less


def half(x: Array) -> Array:
    """x as float16 holds it, in its own dtype; through the bits: XLA may leave out a conversion there and back."""
    return Half().round(x)[0]


class _HalfScale:
    """Scales of a codebook rounded to float16, before anything is rounded on its grid."""

    def scale(self, x, real):
        return half(super().scale(x, real))


class Grid(_HalfScale, Uniform):
    """2^bits levels, equally spaced over [−R, R], R in float16: the largest magnitude, or ``clip`` times the RMS."""


class HalfNormalFloat(_HalfScale, NormalFloat):
    """NormalFloat with float16 scales."""


class DoubleNormalFloat(NormalFloat):
    """NormalFloat whose scales are themselves on 256 equal steps around their mean, float32 steps for every 256 scales.

    Differs from QLoRA: equal steps instead of 8-bit floats.
    """

    def scale(self, x, real):
        scale = super().scale(x, real)
        mean = jnp.mean(scale)
        found = quantize(Uniform(8, group=NF_SCALES), scale.reshape(1, -1) - mean)
        return jnp.maximum(found.values.reshape(scale.shape) + mean, 0)  # none is negative, whatever the steps


class RowE8P(_HalfScale, ResidualE8P):
    """Residual E8P with a float16 scale a row: the rows of a factor are of unequal size."""


@dataclass(frozen=True)
class Affine:
    """2^bits levels s (c − z), c and z from 0 to 2^bits − 1, one s in float16 and one z for ``group`` weights of a row.

    They reach from min(0, least) to max(0, greatest), and 0 is one of them.  ``clip``: both ends are multiplied by that
    of 1 and SHRINKS which leaves the least Σ |error|^CLIP_POWER in the group.
    """

    bits: int
    group: int
    clip: bool

    def __post_init__(self):
        if not 1 <= self.bits <= 16:
            raise ValueError(f"a scalar grid has 1 to 16 bits, got {self.bits}")

    def fit(self, w: Float[Array, "m n"]) -> tuple[Float[Array, "m n"], Float[Array, "m n"]]:
        """s and z in the place of each weight."""
        m, n = w.shape
        groups = jnp.pad(w, ((0, 0), (0, -n % self.group))).reshape(m, -1, self.group)  # a zero is no new extreme
        least, greatest = jnp.minimum(jnp.min(groups, axis=-1), 0), jnp.maximum(jnp.max(groups, axis=-1), 0)
        top = 2**self.bits - 1

        def tried(shrink):
            scale = half(shrink * (greatest - least) / top)
            zero = jnp.clip(jnp.round(-shrink * least / divisor(scale)), 0, top)
            left_out = groups - self.round(groups, scale[..., None], zero[..., None])[0]
            return scale, zero, jnp.sum(jnp.abs(left_out) ** CLIP_POWER, axis=-1)

        def step(best, shrink):
            found = tried(shrink)
            return jax.tree.map(partial(jnp.where, found[2] < best[2]), found, best), None

        best = tried(jnp.ones((), w.dtype))
        if self.clip:
            best, _ = lax.scan(step, best, jnp.asarray(SHRINKS, w.dtype))
        return tuple(jnp.repeat(a, self.group, axis=1)[:, :n] for a in best[:2])

    def round(self, x: Array, scale: Array, zero: Array) -> tuple[Array, Array]:
        """The levels nearest to x, and their codes."""
        codes = jnp.clip(jnp.round(x / divisor(scale)) + zero, 0, 2**self.bits - 1)
        return scale * (codes - zero), codes.astype(jnp.uint16)

    def stored(self, m: int, n: int) -> int:
        """Stored bits."""
        return code_bits(m, n, self.bits) + (16 + self.bits) * group_count(m, n, self.group)


class Signs(Uniform):
    """±R, R the mean magnitude: the least squares scale of the signs."""

    def scale(self, x, real):
        return half(_mean_magnitude(x, real))


class Ternary(Uniform):
    """{−R, 0, R}, R a fixed point of Lloyd's alternation from the mean magnitude (the start is BitNet b1.58's R)."""

    def scale(self, x, real):
        def fit(scale):
            codes = self.decode(self.encode(x / divisor(scale)[..., None]), x.dtype)
            return jnp.sum(codes * x, axis=-1) / divisor(jnp.sum(codes * codes, axis=-1))

        def step(state):
            scale, _, rounds = state
            return fit(scale), scale, rounds + 1

        start = _mean_magnitude(x, real)
        moving = lambda state: jnp.any(state[0] != state[1]) & (state[2] < 100)  # rounding may make two fits alternate
        return half(lax.while_loop(moving, step, (fit(start), start, 0))[0])

    def encode(self, x, key=None):
        return (jnp.clip(jnp.round(x), -1, 1) + 1).astype(jnp.uint8)

    def decode(self, codes, dtype=jnp.float32):
        return codes.astype(dtype) - 1


def _mean_magnitude(x, real):
    return jnp.sum(jnp.where(real, jnp.abs(x), 0), axis=-1) / jnp.sum(real, axis=-1).astype(x.dtype)


def divisor(x):
    """x with 1 for 0: what is divided by it is 0 there."""
    return jnp.where(x == 0, 1, x)


def decoded(grid: Codebook, found: Quantized) -> Float[Array, "m n"]:
    """What codes and scales stand for; the negligible scale of a group of zeros is stored as zero."""
    return dequantize(grid, found.codes, jnp.where(found.scale < 1e-24, 0, found.scale), found.values.shape[1])


def nearest(w: Float[Array, "m n"], grid: Affine | Codebook) -> Float[Array, "m n"]:
    """w rounded on the grid that is fitted to it."""
    if isinstance(grid, Affine):
        return grid.round(w, *grid.fit(w))[0]
    return decoded(grid, quantize(grid, w))


def code_bits(m: int, n: int, bits: int) -> int:
    """Bits of m rows of n codes; rows end on whole bytes."""
    return 8 * m * row_bytes(n, bits)


def group_count(m: int, n: int, group: int) -> int:
    """Groups of so many weights along the rows; the last of a row may be short."""
    return m * -(-n // group)


def group_length(group, n):
    """The length of a group; None is a whole row."""
    if group is None:
        return n
    if not isinstance(group, int) or group < 1:
        raise ValueError(f"group must be a number of weights of a row, at least 1, or None for all; got {group!r}")
    return group


def normal_float(bits, double):
    return (DoubleNormalFloat if double else HalfNormalFloat)(bits, NF_GROUP)


def nf_bits(m: int, n: int, bits: int, double: bool) -> int:
    """Stored bits of NormalFloat; ``double``: 8 a scale, 32 for 256 scales, and 32 for their mean."""
    groups = group_count(m, n, NF_GROUP)
    return code_bits(m, n, bits) + (8 * groups + 32 * -(-groups // NF_SCALES) + 32 if double else 16 * groups)
