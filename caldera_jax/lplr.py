"""LPLRFactorize (Algorithm 2 of arXiv 2405.18886): low-rank factors on low-precision grids, A ≈ L R in the H-norm."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Key

from caldera_jax.codebooks import Codebook, Quantized, quantize
from caldera_jax.hessian import HessianFactors
from caldera_jax.regression import LeftVectors, exact_svd, rank_constrained


class LowRank(NamedTuple):
    """L R on grids.  L is held transposed: its lattice groups run along the m outputs, those of R along the n inputs."""

    left_t: Quantized  # values [k, m]
    right: Quantized  # values [k, n]

    def dense(self) -> Float[Array, "m n"]:
        """The product L R."""
        return self.left_t.values.T @ self.right.values


def better(condition: Bool[Array, ""], new, old):
    """``new`` where the condition holds, else ``old``: the best-so-far of every loop."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _solve(gram, rhs):
    """gram⁻¹ rhs for a symmetric gram [k, k], nudged so that repeated directions are shared and not blown up."""
    nudge = 4 * len(gram) * jnp.finfo(gram.dtype).eps * jnp.trace(gram) / len(gram)
    nudge = jnp.maximum(nudge, jnp.finfo(gram.dtype).tiny)
    return jax.scipy.linalg.solve(gram + nudge * jnp.eye(len(gram), dtype=gram.dtype), rhs, assume_a="pos")


def lplr_factorize(key: Key[Array, ""], a: Float[Array, "m n"], factors: HessianFactors, rank: int,
                   left_grid: Codebook, right_grid: Codebook, iterations: int = 10,
                   left_vectors: LeftVectors = exact_svd) -> LowRank:
    """Quantized L [m, k], R [k, n] with small tr((LR − A) H (LR − A)ᵀ), H = h + damping I.

    From the closed form of Lemma 4.2, alternates L ← quantize(A H Rᵀ (R H Rᵀ)⁻¹) and R ← quantize(L⁺ A), and keeps the
    best pair of all half steps, scored through Gram matrices of size k.  O(m n min(m, n)) once for the exact SVD and
    O(k n (m + n)) an iteration.  Not monotone: rounding can undo what a least-squares step gains.
    """
    a_h = a @ factors.h + factors.damping * a
    energy = jnp.sum(a_h * a)
    start_key, key = jax.random.split(key)
    start = rank_constrained(start_key, a, factors.root, rank, left_vectors)

    def loss(left_t, gram, cross):
        """From gram = R H Rᵀ and cross = R H Aᵀ."""
        return energy - 2 * jnp.sum(left_t * cross) + jnp.sum((left_t @ left_t.T) * gram)

    def grams(right):
        right_h = right @ factors.h + factors.damping * right
        return right_h @ right.T, right @ a_h.T

    def step(state, key):
        right, (gram, cross), best, least = state
        left_key, right_key = jax.random.split(key)
        left_t = quantize(left_grid, _solve(gram, cross), left_key)
        found = loss(left_t.values, gram, cross)
        best, least = better(found < least, (LowRank(left_t, right), found), (best, least))
        right = quantize(right_grid, _solve(left_t.values @ left_t.values.T, left_t.values @ a), right_key)
        gram, cross = grams(right.values)
        found = loss(left_t.values, gram, cross)
        best, least = better(found < least, (LowRank(left_t, right), found), (best, least))
        return (right, (gram, cross), best, least), found

    left_key, right_key, key = jax.random.split(key, 3)
    right = quantize(right_grid, start.right, right_key)
    first = LowRank(quantize(left_grid, start.left.T, left_key), right)
    state = right, grams(right.values), first, jnp.asarray(jnp.inf, a.dtype)
    (_, _, best, _), _ = lax.scan(step, state, jax.random.split(key, max(iterations, 1)))
    return best
