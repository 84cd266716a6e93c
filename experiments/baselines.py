"""The layer-wise baselines: a weight and its Hessian in, a dense replacement and its exact stored bits out, untrained.

All methods are on equal terms: one signature, ``(key, layer, **settings) -> Replacement``, and one count of bits.
Everything that is needed to rebuild the weight is counted: codes (rows end on whole bytes, as in ``packing``), 16 bits
for each scale and centroid, b for each zero point, signs of rotations, 32 bits for the one scale of a float16 factor.
What is counted as 16 bits is rounded to float16, so w must be in units in which its scales are normal float16 numbers,
6e-5 to 65504, as the weights of language models are; float16 factors and lattice codes are in units of their own RMS.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import starts
from jax import Array, lax
from jaxtyping import Float, Key
from scipy import optimize, stats

from caldera_jax import CalderaConfig, HessianFactors, hessian, incoherence
from caldera_jax.codebooks import (
    Codebook,
    Half,
    NormalFloat,
    Quantized,
    ResidualE8P,
    Uniform,
    dequantize,
    quantize,
)
from caldera_jax.ldlq import block_ldlq, ldlq
from caldera_jax.packing import row_bytes
from caldera_jax.regression import Factors, rank_constrained

DAMPING = 0.01  # of H for LDLQ, in units of its mean diagonal, as in CALDERA, QuIP and GPTQ
NF_GROUP, NF_SCALES = 64, 256  # weights that share a scale of NormalFloat, and such scales that share one; as in QLoRA
SHRINKS = tuple(1 - i / 50 for i in range(1, 41))  # of the range of a group, tried beside 1: 0.98 to 0.2
CLIP_POWER = 2.4  # of the errors that the best shrink is chosen by, as in GPTQ's code: what is large is clipped less


class Layer(NamedTuple):
    """What a method may look at: w, the undamped, unrotated mean h of x xᵀ, and the mean square of the loss's gradient
    by each weight."""

    w: Float[Array, "m n"]
    h: Float[Array, "n n"]
    fisher: Float[Array, "m n"] | None = None


class Replacement(NamedTuple):
    """``weight``: float32, what the stored bits decode to; ``bits``: all that must be stored to rebuild it."""

    weight: Float[Array, "m n"]
    bits: int


@dataclass(frozen=True)
class Method:
    """A method: its family, the function, the arXiv id, whether it looks at H, and whether it uses the key."""

    family: str
    run: Callable[..., Replacement]
    source: str
    data: bool
    random: bool


METHODS: dict[str, Method] = {}


def method(family: str, source: str, data: bool = False, random: bool = False) -> Callable:
    """Enter the function below in METHODS under its own name."""
    def register(run):
        METHODS[run.__name__] = Method(family, run, source, data, random)
        return run

    return register


def replace(name: str, key: Key[Array, ""], layer: Layer, *, methods: Mapping[str, Method] | None = None,
            **settings) -> Replacement:
    """The replacement of a layer by the method of that name in ``methods`` (None: METHODS), computed in float32.

    Raises ValueError for a method that is not known, settings that it does not take or that are missing, shapes that
    do not fit, and where the input or the result is not finite.
    """
    methods = METHODS if methods is None else methods
    if name not in methods:
        raise ValueError(f"unknown method {name!r}: choose from {', '.join(sorted(methods))}")
    run = methods[name].run
    signature = inspect.signature(run)
    try:
        signature.bind(key, layer, **settings)
    except TypeError as error:
        takes = ", ".join(str(parameter) for parameter in list(signature.parameters.values())[2:])
        raise ValueError(f"{name} takes the settings {takes}; got {settings or 'none'}: {error}") from None
    layer = Layer(*(None if a is None else jnp.asarray(a, jnp.float32) for a in layer))
    shape, n = layer.w.shape, layer.w.shape[-1]
    if layer.w.ndim != 2 or layer.h.shape != (n, n) or layer.fisher is not None and layer.fisher.shape != shape:
        raise ValueError("need w [m, n], h [n, n] and fisher [m, n] or None; got " +
                         ", ".join("None" if a is None else str(a.shape) for a in layer))
    if not all(bool(jnp.all(jnp.isfinite(a))) for a in layer if a is not None):
        raise ValueError(f"{name}: w, h or fisher holds NaN or infinite values: check the file or the calibration text")
    found = run(key, layer, **settings)
    if not bool(jnp.all(jnp.isfinite(found.weight))):
        raise ValueError(f"{name}: the result is not finite: check that h is symmetric positive semidefinite, and that "
                         "w is in units in which its scales fit float16 (at most 65504)")
    return found._replace(weight=found.weight.astype(jnp.float32))


# --- 16-bit numbers and scalar grids ---


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
            zero = jnp.clip(jnp.round(-shrink * least / _divisor(scale)), 0, top)
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
        codes = jnp.clip(jnp.round(x / _divisor(scale)) + zero, 0, 2**self.bits - 1)
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
            codes = self.decode(self.encode(x / _divisor(scale)[..., None]), x.dtype)
            return jnp.sum(codes * x, axis=-1) / _divisor(jnp.sum(codes * codes, axis=-1))

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


def _divisor(x):
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


def _group(group, n):
    """The length of a group; None is a whole row."""
    if group is None:
        return n
    if not isinstance(group, int) or group < 1:
        raise ValueError(f"group must be a number of weights of a row, at least 1, or None for all; got {group!r}")
    return group


# --- quantization ---


_nearest = jax.jit(nearest, static_argnums=1)


@method("quantization", "1712.05877")
def rtn(key, layer, bits: int, group: int | None = None, clip: bool = True) -> Replacement:
    """Each weight to the nearest level of ``Affine``, a grid a row or group; O(m n), 41 times with ``clip``.

    Poor at 2 and 3 bits without groups and without ``clip``: the extremes decide the step.
    """
    grid = Affine(bits, _group(group, layer.w.shape[1]), clip)
    return Replacement(_nearest(layer.w, grid), grid.stored(*layer.w.shape))


@method("quantization", "2305.14314")
def nf(key, layer, bits: int, double: bool = True) -> Replacement:
    """Each weight to the nearest NormalFloat level times the largest magnitude of its group of 64 (QLoRA); O(m n).

    ``double``: the scales are quantized too, 0.127 bits a weight for 0.25 (``DoubleNormalFloat``).
    """
    return Replacement(_nearest(layer.w, _normal_float(bits, double)), nf_bits(*layer.w.shape, bits, double))


def _normal_float(bits, double):
    return (DoubleNormalFloat if double else HalfNormalFloat)(bits, NF_GROUP)


def nf_bits(m: int, n: int, bits: int, double: bool) -> int:
    """Stored bits of NormalFloat; ``double``: 8 a scale, 32 for 256 scales, and 32 for their mean."""
    groups = group_count(m, n, NF_GROUP)
    return code_bits(m, n, bits) + (8 * groups + 32 * -(-groups // NF_SCALES) + 32 if double else 16 * groups)


def _or_nan(weight, factors: HessianFactors):
    """NaN where H could not be factored: codes would hide it."""
    return jnp.where(factors.finite, weight, jnp.nan)


@partial(jax.jit, static_argnums=(2, 3))
@jax.default_matmul_precision("highest")
def _gptq(w, h, grid, order):
    last = jnp.argsort(jnp.diagonal(h)) if order == "activity" else jnp.arange(len(h))[::-1]  # it is rounded first
    factors = hessian.factor(h[last][:, last], DAMPING)
    scale, zero = (a[:, last] for a in grid.fit(w))

    def quantize(target, start):
        return grid.round(target, *(lax.dynamic_slice_in_dim(a, start, 1, axis=1) for a in (scale, zero)))

    found, _ = block_ldlq(w[:, last], factors.lower, quantize, 1)
    return _or_nan(found[:, jnp.argsort(last)], factors)


@method("quantization", "2210.17323", data=True)
def gptq(key, layer, bits: int, group: int | None = None, clip: bool = True, order: str = "activity") -> Replacement:
    """The grid of ``rtn`` with linear feedback: GPTQ's rounding is LDLQ's (2307.13304); O(m n²).

    ``order``: columns by decreasing H_jj ("activity") or from the first to the last ("columns").  Grids are fitted to W
    beforehand and groups are of neighbouring columns, whatever the order (GPTQ's static groups), so that the order need
    not be stored.
    """
    if order not in ("activity", "columns"):
        raise ValueError(f"order must be 'activity' or 'columns', got {order!r}")
    grid = Affine(bits, _group(group, layer.w.shape[1]), clip)
    return Replacement(_gptq(layer.w, layer.h, grid, order), grid.stored(*layer.w.shape))


@cache
def gaussian_clip(bits: int) -> float:
    """The c of least E (g − Q(g))², g standard normal, Q(g) its nearest of 2^bits equal steps from −c to c."""
    def loss(clip):
        levels = np.linspace(-clip, clip, 2**bits)
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        first = -np.diff(stats.norm.pdf(edges))  # ∫ g φ(g) dg over each cell
        return 1 - 2 * levels @ first + levels**2 @ np.diff(stats.norm.cdf(edges))

    return float(optimize.minimize_scalar(loss, bounds=(0.5, 8), method="bounded", options={"xatol": 1e-8}).x)


@partial(jax.jit, static_argnums=3)
@jax.default_matmul_precision("highest")
def _gptq_rotated(key, w, h, grid):
    w, h, rotation = incoherence.rotate(key, w, h)
    factors = hessian.factor(h, DAMPING)
    return _or_nan(incoherence.undo(rotation, decoded(grid, ldlq(w, grid, factors))), factors)


@method("quantization", "2404.00456", data=True, random=True)
def gptq_rotated(key, layer, bits: int) -> Replacement:
    """LDLQ on equal steps after a randomized Hadamard rotation of both sides; one scale a row; O(m n²).

    A rotated row is nearly Gaussian: its grid ends at ``gaussian_clip`` times its RMS, symmetric, with no offset.
    """
    m, n = layer.w.shape
    grid = Grid(bits, clip=gaussian_clip(bits), group=n)
    return Replacement(_gptq_rotated(key, layer.w, layer.h, grid), code_bits(m, n, bits) + 16 * m + sign_bits(m, n))


def sign_bits(m: int, n: int) -> int:
    """Stored bits of a randomized Hadamard rotation of both sides."""
    return code_bits(1, m, 1) + code_bits(1, n, 1)


def _compressed(key, layer, config: CalderaConfig, start: starts.Start = None) -> Replacement:
    found, _ = starts.compress(key, layer.w, layer.h, config, start)
    return Replacement(found.dense(), found.stored_bits)


@method("quantization", "2402.04396", data=True, random=True)
def e8p(key, layer, bits: int) -> Replacement:
    """QuIP#: the E8P lattice code of 2, 3 or 4 bits and LDLQ, rotated, one scale a matrix; not fine-tuned; O(m n²)."""
    return _compressed(key, layer, CalderaConfig(rank=0, q_bits=bits))


def data_scale(w: Float[Array, "m n"], units: Float[Array, "m n"], h: Float[Array, "n n"]) -> Float[Array, " m"]:
    """The a of least (a u − w) H (a u − w)ᵀ for each row: u H wᵀ / u H uᵀ; with 1e-6 I in H, for u that X lacks."""
    units_h = units @ hessian.regularise(h, 1e-6)
    return jnp.sum(units_h * w, axis=1) / _divisor(jnp.sum(units_h * units, axis=1))


@partial(jax.jit, static_argnums=(2, 3))
@jax.default_matmul_precision("highest")
def _rescaled(w, h, grid, feedback):
    if feedback:
        factors = hessian.factor(h, DAMPING)
        codes = ldlq(w, grid, factors).codes
    else:
        codes = quantize(grid, w).codes
    units = grid.decode(codes, w.dtype)
    weight = half(data_scale(w, units, h))[:, None] * units
    return _or_nan(weight, factors) if feedback else weight


@method("quantization", "1603.05279", data=True)
def binary(key, layer, feedback: bool = False) -> Replacement:
    """A sign a weight, and a scale a row that is the best for H: 1 + 16 / n bits; O(m n²).

    ``feedback``: the signs are those of LDLQ's targets on ± mean |w|; the scale is fitted afterwards.  XNOR-Net is the
    case H = I.
    """
    m, n = layer.w.shape
    return Replacement(_rescaled(layer.w, layer.h, Signs(1, group=n), feedback), code_bits(m, n, 1) + 16 * m)


@method("quantization", "2402.17764", data=True)
def ternary(key, layer, feedback: bool = False) -> Replacement:
    """−1, 0 or 1 a weight, and a scale a row that is the best for H; five trits a byte: 1.6 + 16 / n bits; O(m n²).

    What is 0 is decided on the fixed point of the plain norm (``Ternary``), with ``feedback`` for LDLQ's targets;
    the scale is fitted afterwards.  BitNet trains its weights; here they are only rounded.
    """
    m, n = layer.w.shape
    return Replacement(_rescaled(layer.w, layer.h, Ternary(2, group=n), feedback), 8 * m * -(-n // 5) + 16 * m)


def lloyd(x: Float[Array, " n"], weights: Float[Array, " n"], start: Float[Array, " c"],
          rounds: int) -> Float[Array, " c"]:
    """Centroids of small Σ weights (x − nearest centroid)², ascending: ``rounds`` of Lloyd's from ascending ones.

    A centroid whose weights are all zero stays where it is.  O(rounds n log c).
    """
    def step(_, centroids):
        codes = closest(x, centroids)
        total, moment = (jax.ops.segment_sum(a, codes, len(start)) for a in (weights, weights * x))
        return jnp.where(total > 0, moment / _divisor(total), centroids)

    return lax.fori_loop(0, rounds, step, start)


def closest(x: Float[Array, " n"], centroids: Float[Array, " c"]) -> Array:
    """Index of the closest of ascending centroids."""
    return jnp.searchsorted((centroids[1:] + centroids[:-1]) / 2, x, method="scan_unrolled")


@partial(jax.jit, static_argnums=2)
def _clustered(values, weights, count, rounds):
    """Each row on ``count`` centroids of its own; they start in the middle of equal shares of its weights."""
    shares = (jnp.arange(count, dtype=values.dtype) + 0.5) / count

    def row(x, weights):
        centroids = half(lloyd(x, weights, jnp.quantile(x, shares), rounds))
        return centroids[closest(x, centroids)]

    return jax.vmap(row)(values, weights)


@method("quantization", "2306.07629", data=True)
def kmeans(key, layer, bits: int, rows: bool = True, weighting: str | None = None, rounds: int = 25) -> Replacement:
    """2^bits float16 centroids a row, or a matrix with ``rows`` off: Lloyd for Σ s_ij (w_ij − ŵ_ij)²; O(rounds m n).

    ``weighting``: s is the layer's own ("fisher", as in SqueezeLLM), diag(H) ("hessian"), or 1 ("none"); None: Fisher
    where the layer has it, else H.  Differs from SqueezeLLM: no outliers are kept aside.
    """
    w, h, fisher = layer
    weighting = weighting or ("hessian" if fisher is None else "fisher")
    if weighting not in ("hessian", "fisher", "none") or weighting == "fisher" and fisher is None:
        raise ValueError(f"weighting must be 'hessian', 'none', or 'fisher' where the layer has one; got {weighting!r}")
    if not 1 <= bits <= 8:
        raise ValueError(f"2^bits centroids are for 1 to 8 bits, got {bits}")
    m, n = w.shape
    weights = {"hessian": jnp.diagonal(hessian.normalise(h))[None], "fisher": fisher, "none": jnp.ones((1, 1), w.dtype)}
    shape = (m, n) if rows else (1, m * n)
    values, weights = w.reshape(shape), jnp.broadcast_to(weights[weighting], (m, n)).reshape(shape)
    return Replacement(_clustered(values, weights, 2**bits, rounds).reshape(m, n),
                       code_bits(m, n, bits) + 16 * 2**bits * (m if rows else 1))


@method("sharing", "1510.00149")
def kmeans_shared(key, layer, bits: int, rounds: int = 25) -> Replacement:
    """One table of 2^bits float16 weights for the whole matrix, by Lloyd (Deep Compression, without its Huffman code
    and its retraining)."""
    return kmeans(key, layer, bits, rows=False, weighting="none", rounds=rounds)


# --- low rank ---


def factor_grids(m: int, n: int, bits: int) -> tuple[Codebook, Codebook]:
    """The grids of Lᵀ [k, m] and R [k, n]: float16, 256 equal steps, or residual E8P; by rows but for float16."""
    if bits not in (16, 8, 4):
        raise ValueError(f"factor_bits must be 16, 8 or 4, got {bits!r}")
    return tuple({16: Half(), 8: Grid(8, group=size), 4: RowE8P(4, group=size)}[bits] for size in (m, n))


def low_rank_bits(m: int, n: int, rank: int, grids: tuple[Codebook, Codebook]) -> int:
    """Stored bits of factors of that rank, and of their scales: 32 a factor, or 16 a row."""
    sides = zip((m, n), grids, strict=True)
    codes = sum(code_bits(rank, -(-size // grid.block), grid.code_bits) for size, grid in sides)
    return codes + sum(32 if grid.group is None else 16 * rank for grid in grids)


def largest_rank(shape: tuple[int, int], bits: float, stored: Callable[[int], int]) -> int:
    """The greatest k of which stored(k) bits are at most ``bits`` a weight; ValueError where it is 0."""
    m, n = shape
    rank = max((k for k in range(min(m, n) + 1) if stored(k) <= bits * m * n), default=0)
    if rank == 0:
        raise ValueError(f"{bits} bits a weight leave no rank to a {m} x {n} matrix: give it {stored(1) / (m * n):.3f}")
    return rank


def product(found: Factors, grids: tuple[Codebook, Codebook]) -> Float[Array, "m n"]:
    """L R of factors rounded on their grids."""
    sides = zip(grids, (found.left.T, found.right), strict=True)
    left_t, right = (decoded(grid, quantize(grid, factor)) for grid, factor in sides)
    return left_t.T @ right


@partial(jax.jit, static_argnums=(2, 3))
@jax.default_matmul_precision("highest")
def _low_rank(w, root, rank, grids):
    return product(rank_constrained(w, root, rank), grids)


def _svd(layer, bits, root, factor_bits) -> Replacement:
    shape, grids = layer.w.shape, factor_grids(*layer.w.shape, factor_bits)
    stored = partial(low_rank_bits, *shape, grids=grids)
    rank = largest_rank(shape, bits, stored)
    return Replacement(_low_rank(layer.w, root, rank, grids), stored(rank))


def _plain_root(layer):
    return jnp.eye(layer.w.shape[1], dtype=layer.w.dtype)


def _diagonal_root(layer):
    return jnp.diag(jnp.sqrt(jnp.clip(jnp.diagonal(hessian.normalise(layer.h)), 0)))


@jax.jit
def _cholesky(h):
    """A root of H without damping, or with the least that a singular H needs; in units of H's mean diagonal."""
    return hessian.damped_root(hessian.normalise(h), 0.0)[0]


@method("low rank", "1404.0736")
def svd(key, layer, bits: float, factor_bits: int = 16) -> Replacement:
    """The L R of least ‖L R − W‖ within ``bits`` a weight, then rounded to ``factor_bits`` (16, 8 or 4).

    O(m n min(m, n)).  k of rank cost factor_bits k (1/m + 1/n) bits a weight: hopeless at few bits unless W's spectrum
    decays.
    """
    return _svd(layer, bits, _plain_root(layer), factor_bits)


@method("low rank", "2403.07378", data=True)
def svd_data(key, layer, bits: float, factor_bits: int = 16) -> Replacement:
    """``svd`` for the least tr(E H Eᵀ) (DRONE, SVD-LLM, Lemma 4.2); O(m n (m + n))."""
    return _svd(layer, bits, _cholesky(layer.h), factor_bits)


@method("low rank", "2310.11028", data=True, random=True)
def lplr(key, layer, bits: float, factor_bits: int = 4) -> Replacement:
    """L R on grids of few bits by alternating least squares, within ``bits`` a weight: CALDERA without its Q.

    Differs from LPLR: data-aware, rotated, and on lattice codes.
    """
    (m, n), grids = layer.w.shape, CalderaConfig(q_bits=0, factor_bits=factor_bits).factor_grids

    rank = largest_rank((m, n), bits, lambda k: low_rank_bits(m, n, k, grids) + sign_bits(m, n))
    return _compressed(key, layer, CalderaConfig(rank=rank, q_bits=0, factor_bits=factor_bits))


# --- both ---


@partial(jax.jit, static_argnums=(3, 4, 5))
@jax.default_matmul_precision("highest")
def _alternate(w, rows, root, grid, rank, grids, rounds):
    """Q ← the nearest to W − L R, (L, R) ← the best for W − Q in the norm of diag(rows) E root, ``rounds`` times."""
    def step(_, state):
        q = nearest(w - state[1].left @ state[1].right, grid)
        left, right = rank_constrained(rows[:, None] * (w - q), root, rank)
        return q, Factors(left / rows[:, None], right)

    none = Factors(jnp.zeros((len(w), rank), w.dtype), jnp.zeros((rank, w.shape[1]), w.dtype))
    q, low_rank = lax.fori_loop(0, rounds, step, (nearest(w, grid), none))
    return q + product(low_rank, grids)


def _repaired(layer, rank, bits, factor_bits, double, root, rounds=1, rows=None, quantizer="nf") -> Replacement:
    m, n = layer.w.shape
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank must be from 1 to min(m, n) = {min(m, n)}, got {rank}")
    if quantizer not in ("nf", "rtn"):
        raise ValueError(f"quantizer must be 'nf' or 'rtn', got {quantizer!r}")
    if quantizer == "nf":
        grid, q_bits = _normal_float(bits, double), nf_bits(m, n, bits, double)
    else:
        grid = Affine(bits, NF_GROUP, clip=True)
        q_bits = grid.stored(m, n)
    grids = factor_grids(m, n, factor_bits)
    rows = jnp.ones(m, layer.w.dtype) if rows is None else rows
    return Replacement(_alternate(layer.w, rows, root, grid, rank, grids, rounds),
                       q_bits + low_rank_bits(m, n, rank, grids))


@method("both", "2310.08659")
def loftq(key, layer, rank: int, bits: int = 2, rounds: int = 5, factor_bits: int = 16,
          double: bool = True) -> Replacement:
    """Q ← NormalFloat(W − L R), L R ← SVD_k(W − Q), ``rounds`` times, from L R = 0; O(rounds m n min(m, n)).

    Not monotone; the last iterate is the answer, as in LoftQ, with L and R rounded to ``factor_bits`` at the end.
    ``double``: as in ``nf``.
    """
    return _repaired(layer, rank, bits, factor_bits, double, _plain_root(layer), rounds)


@method("both", "2311.12023", data=True)
def lqlora(key, layer, rank: int, bits: int = 2, rounds: int = 5, factor_bits: int = 16,
           double: bool = True) -> Replacement:
    """``loftq`` with the SVD of diag(r) (W − Q) diag(c): r and c the means of √Fisher over rows and over columns.

    Without ``layer.fisher`` r = 1 and c = diag(H)^½, the inputs' part of Fisher: our weighting, not the paper's.
    Differs from LQ-LoRA: all rounds run, and every layer has the same bits.
    """
    if layer.fisher is None:
        return _repaired(layer, rank, bits, factor_bits, double, _diagonal_root(layer), rounds)
    size = jnp.sqrt(layer.fisher)
    rows, columns = jnp.mean(size, axis=1), jnp.mean(size, axis=0)
    rows = jnp.maximum(rows, 1e-3 * jnp.max(rows))  # L is divided by it: an output without gradient is not free
    rows, columns = (a / _divisor(jnp.max(a)) for a in (rows, columns))
    return _repaired(layer, rank, bits, factor_bits, double, jnp.diag(columns), rounds, rows)


@method("both", "2402.02446", data=True)
def lqer(key, layer, rank: int, bits: int = 2, quantizer: str = "nf", factor_bits: int = 16,
         double: bool = True) -> Replacement:
    """Q ← the nearest to W (``quantizer`` "nf", or "rtn" per 64), L R ← the best for W − Q in the norm of diag(H).

    Differs from LQER: the root of the mean square of an input, not the mean of its magnitude.
    """
    return _repaired(layer, rank, bits, factor_bits, double, _diagonal_root(layer), quantizer=quantizer)


@method("both", "2410.06040", data=True)
def qera(key, layer, rank: int, bits: int = 2, quantizer: str = "nf", factor_bits: int = 16,
         double: bool = True) -> Replacement:
    """``lqer`` with all of H: the L R of least tr(E H Eᵀ) for that Q (QERA Theorem 1, Lemma 4.2)."""
    return _repaired(layer, rank, bits, factor_bits, double, _cholesky(layer.h), quantizer=quantizer)


@method("both", "2405.18886", data=True, random=True)
def e8p_repair(key, layer, rank: int, bits: int = 2, factor_bits: int = 4) -> Replacement:
    """``e8p``, then L R by Lemma 4.2 on grids of few bits for what Q left: one round of CALDERA with Q first."""
    return _compressed(key, layer, CalderaConfig(rank=rank, q_bits=bits, factor_bits=factor_bits, outer_iterations=1,
                                                 order="q-first"))


@method("both", "2602.02001", data=True, random=True)
def srr(key, layer, rank: int, bits: int = 2, preserved: int | None = None, factor_bits: int = 4) -> Replacement:
    """``preserved`` directions leave W before Q, the others of the rank repair what Q left; one pass.

    None: of 0, k/4, k/2, 3k/4 and k that of the least error on H, for five times the cost; our rule, not the paper's.
    """
    config = CalderaConfig(rank=rank, q_bits=bits, factor_bits=factor_bits)
    choices = sorted({rank * i // 4 for i in range(5)}) if preserved is None else [preserved]
    made = [(*starts.compress(key, layer.w, layer.h, config, starts.Split(p)), p) for p in choices]
    found, _, preserved = min(made, key=lambda each: float(each[1][-1]))
    repeated = rank - 2 if 0 < preserved < rank else 0  # scales: two of each factor's rows would do, ``starts.joined``
    return Replacement(found.dense(), found.stored_bits - 2 * 32 * repeated)


@method("both", "2506.02077", data=True, random=True)
def odlri(key, layer, rank: int, bits: int = 2, channels: int | None = None, factor_bits: int = 4,
          outer_iterations: int = 15, inner_iterations: int = 10, svd: str = "randomized") -> Replacement:
    """CALDERA whose first L R is fitted to W on the outlier channels only, as many as ``channels`` (None: the rank)."""
    config = CalderaConfig(rank=rank, q_bits=bits, factor_bits=factor_bits, outer_iterations=outer_iterations,
                           inner_iterations=inner_iterations, svd=svd)
    return _compressed(key, layer, config, starts.Outliers(rank if channels is None else channels))


@method("both", "2405.18886", data=True, random=True)
def caldera(key, layer, rank: int, q_bits: int = 2, factor_bits: int = 4, downdate: bool = False,
            refine_passes: int = 0, outer_iterations: int = 15, inner_iterations: int = 10,
            svd: str = "randomized") -> Replacement:
    """CALDERA: E8P + LDLQ and L R on grids of few bits (16: float16) in turn, the best half step kept."""
    return _compressed(key, layer, CalderaConfig(
        rank=rank, q_bits=q_bits, factor_bits=factor_bits, downdate=downdate, refine_passes=refine_passes,
        outer_iterations=outer_iterations, inner_iterations=inner_iterations, svd=svd))
