"""LPLRFactorize (Algorithm 2 of arXiv 2405.18886): low-rank factors on low-precision grids, A ≈ L R in the H-norm."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Key

from caldera_jax.codebooks import Codebook, Quantized, quantize
from caldera_jax.hessian import HessianFactors
from caldera_jax.regression import rank_constrained, rank_constrained_iteratively


class LowRank(NamedTuple):
    """L R on grids.  L is held transposed: its groups run along the m outputs, those of R along the n inputs."""

    left_t: Quantized  # values [k, m]
    right: Quantized  # values [k, n]

    def dense(self) -> Float[Array, "m n"]:
        """The product L R."""
        return self.left_t.values.T @ self.right.values


def better(condition: Bool[Array, ""], new, old):
    """``new`` where the condition holds, else ``old``: the best-so-far of every loop."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def empty(function, *args):
    """Zeros in the structure of ``function(*args)``: a loop can carry its result before the first call."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, *args))


def _solve(gram, rhs):
    """gram⁻¹ rhs for a symmetric gram [k, k], nudged so that repeated directions are shared and not blown up."""
    nudge = 4 * len(gram) * jnp.finfo(gram.dtype).eps * jnp.trace(gram) / len(gram)
    nudge = jnp.maximum(nudge, jnp.finfo(gram.dtype).tiny)
    return jax.scipy.linalg.solve(gram + nudge * jnp.eye(len(gram), dtype=gram.dtype), rhs, assume_a="pos")


def lplr_factorize(key: Key[Array, ""], a: Float[Array, "m n"], factors: HessianFactors, rank: int,
                   left_grid: Codebook, right_grid: Codebook, iterations: int = 10, svd: str = "exact",
                   a_h: Float[Array, "m n"] | None = None, guess: LowRank | None = None) -> LowRank:
    """Quantized L [m, k], R [k, n] with small tr((LR − A) H (LR − A)ᵀ), H = h + damping I.

    From the closed form of Lemma 4.2, alternates R ← quantize(L⁺ A) and L ← quantize(A H Rᵀ (R H Rᵀ)⁻¹): once for the
    start and ``iterations`` times more.  Keeps the best pair of all half steps, scored through Gram matrices of size k.
    ``svd``: "exact", or "randomized" for subspace iteration, which starts from ``guess``.  ``a_h``: A h, if known.
    O(m n min(m, n)) once for the exact SVD and O(k n (m + n)) an iteration.  Not monotone: rounding can undo what a
    least-squares step gains.
    """
    a_h = (a @ factors.h if a_h is None else a_h) + factors.damping * a
    energy = jnp.sum(a_h * a)
    svd_key, key = jax.random.split(key)
    if svd == "exact":
        start = rank_constrained(a, factors.root, rank)
    else:
        start = rank_constrained_iteratively(svd_key, a, a_h, rank, None if guess is None else guess.left_t.values.T)

    def fit_right(key, left_t):
        return quantize(right_grid, _solve(left_t @ left_t.T, left_t @ a), key)

    def fit_left(key, gram, cross):
        return quantize(left_grid, _solve(gram, cross), key)

    def loss(left_t, gram, cross):
        """From gram = R H Rᵀ and cross = R H Aᵀ."""
        return energy - 2 * jnp.sum(left_t * cross) + jnp.sum((left_t @ left_t.T) * gram)

    def step(state, now):
        left_t, best, least = state
        index, key = now
        right_key, left_key = jax.random.split(key)
        right = fit_right(right_key, left_t.values)
        right_h = right.values @ factors.h + factors.damping * right.values
        gram, cross = right_h @ right.values.T, right.values @ a_h.T
        found = jnp.where(index > 0, loss(left_t.values, gram, cross), jnp.inf)  # the first L is not on its grid
        best, least = better(found < least, (LowRank(left_t, right), found), (best, least))
        left_t = fit_left(left_key, gram, cross)
        found = loss(left_t.values, gram, cross)
        best, least = better((index == 0) | (found < least), (LowRank(left_t, right), found), (best, least))
        return (left_t, best, least), None

    left_t = empty(fit_left, key, start.right @ start.right.T, start.left.T)._replace(values=start.left.T)
    right = empty(fit_right, key, start.left.T)
    now = jnp.arange(iterations + 1), jax.random.split(key, iterations + 1)
    (_, best, _), _ = lax.scan(step, (left_t, LowRank(left_t, right), jnp.asarray(jnp.inf, a.dtype)), now)
    return best
