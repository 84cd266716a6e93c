"""The baselines of low rank, alone and beside a quantized matrix; on the terms of ``baselines``."""

from collections.abc import Callable
from functools import partial

import baselines
import jax
import jax.numpy as jnp
import starts
from baselines import Method, Replacement, compressed, sign_bits
from grids import NF_GROUP, Affine, Grid, RowE8P, code_bits, decoded, divisor, nearest, nf_bits, normal_float
from jax import Array, lax
from jaxtyping import Float

from caldera_jax import CalderaConfig, hessian
from caldera_jax.codebooks import Codebook, Half, quantize
from caldera_jax.regression import Factors, rank_constrained

METHODS: dict[str, Method] = {}
method = partial(baselines.entered, METHODS)

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
    return compressed(key, layer, CalderaConfig(rank=rank, q_bits=0, factor_bits=factor_bits))


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
        grid, q_bits = normal_float(bits, double), nf_bits(m, n, bits, double)
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
    rows, columns = (a / divisor(jnp.max(a)) for a in (rows, columns))
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
    return compressed(key, layer, CalderaConfig(rank=rank, q_bits=bits, factor_bits=factor_bits, outer_iterations=1,
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
    return compressed(key, layer, config, starts.Outliers(rank if channels is None else channels))


@method("both", "2405.18886", data=True, random=True)
def caldera(key, layer, rank: int, q_bits: int = 2, factor_bits: int = 4, downdate: bool = False,
            refine_passes: int = 0, outer_iterations: int = 15, inner_iterations: int = 10,
            svd: str = "randomized") -> Replacement:
    """CALDERA: E8P + LDLQ and L R on grids of few bits (16: float16) in turn, the best half step kept."""
    return compressed(key, layer, CalderaConfig(
        rank=rank, q_bits=q_bits, factor_bits=factor_bits, downdate=downdate, refine_passes=refine_passes,
        outer_iterations=outer_iterations, inner_iterations=inner_iterations, svd=svd))
