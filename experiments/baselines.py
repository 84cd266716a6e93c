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
from grids import (
    Affine,
    Grid,
    Signs,
    Ternary,
    code_bits,
    decoded,
    divisor,
    group_length,
    half,
    nearest,
    nf_bits,
    normal_float,
)
from jax import Array, lax
from jaxtyping import Float, Key
from scipy import optimize, stats

from caldera_jax import CalderaConfig, HessianFactors, hessian, incoherence
from caldera_jax.codebooks import quantize
from caldera_jax.ldlq import block_ldlq, ldlq

DAMPING = 0.01  # of H for LDLQ, in units of its mean diagonal, as in CALDERA, QuIP and GPTQ


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


def entered(methods: dict[str, Method], family: str, source: str, data: bool = False, random: bool = False) -> Callable:
    """Enter the function below in ``methods`` under its own name."""
    def register(run):
        methods[run.__name__] = Method(family, run, source, data, random)
        return run

    return register


METHODS: dict[str, Method] = {}
method = partial(entered, METHODS)


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


_nearest = jax.jit(nearest, static_argnums=1)


@method("quantization", "1712.05877")
def rtn(key, layer, bits: int, group: int | None = None, clip: bool = True) -> Replacement:
    """Each weight to the nearest level of ``Affine``, a grid a row or group; O(m n), 41 times with ``clip``.

    Poor at 2 and 3 bits without groups and without ``clip``: the extremes decide the step.
    """
    grid = Affine(bits, group_length(group, layer.w.shape[1]), clip)
    return Replacement(_nearest(layer.w, grid), grid.stored(*layer.w.shape))


@method("quantization", "2305.14314")
def nf(key, layer, bits: int, double: bool = True) -> Replacement:
    """Each weight to the nearest NormalFloat level times the largest magnitude of its group of 64 (QLoRA); O(m n).

    ``double``: the scales are quantized too, 0.127 bits a weight for 0.25 (``DoubleNormalFloat``).
    """
    return Replacement(_nearest(layer.w, normal_float(bits, double)), nf_bits(*layer.w.shape, bits, double))


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
    grid = Affine(bits, group_length(group, layer.w.shape[1]), clip)
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


def compressed(key, layer, config: CalderaConfig, start: starts.Start = None) -> Replacement:
    found, _ = starts.compress(key, layer.w, layer.h, config, start)
    return Replacement(found.dense(), found.stored_bits)


@method("quantization", "2402.04396", data=True, random=True)
def e8p(key, layer, bits: int) -> Replacement:
    """QuIP#: the E8P lattice code of 2, 3 or 4 bits and LDLQ, rotated, one scale a matrix; not fine-tuned; O(m n²)."""
    return compressed(key, layer, CalderaConfig(rank=0, q_bits=bits))


def data_scale(w: Float[Array, "m n"], units: Float[Array, "m n"], h: Float[Array, "n n"]) -> Float[Array, " m"]:
    """The a of least (a u − w) H (a u − w)ᵀ for each row: u H wᵀ / u H uᵀ; with 1e-6 I in H, for u that X lacks."""
    units_h = units @ hessian.regularise(h, 1e-6)
    return jnp.sum(units_h * w, axis=1) / divisor(jnp.sum(units_h * units, axis=1))


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
        return jnp.where(total > 0, moment / divisor(total), centroids)

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
