"""Rank-constrained regression in closed form: Lemma 4.2 of CALDERA (arXiv 2405.18886), Theorem 1 of QERA."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Key


class Factors(NamedTuple):
    """A matrix L R of rank k."""

    left: Float[Array, "m k"]
    right: Float[Array, "k n"]


def rank_constrained(a: Float[Array, "m n"], root: Float[Array, "n n"], rank: int) -> Factors:
    """The L [m, k], R [k, n] of least tr((LR − A) H (LR − A)ᵀ), H = root rootᵀ; the optimum is Σ_{i>k} σᵢ(A root)².

    L holds the top left singular vectors U_k of A root, for any square root of H, and given an orthonormal L the best
    R is Lᵀ A (equal to S_k Z_kᵀ root⁻¹ where the inverse exists): no inverse of H is needed, and a singular H is
    allowed.  A full SVD, O(m n (n + min(m, n))).  Differs from Lemma 4.2 there: R keeps what A has outside the range of
    X, which costs nothing.
    """
    left = jnp.linalg.svd(a @ root, full_matrices=False)[0][:, :rank]
    return Factors(left, left.T @ a)


def rank_constrained_iteratively(key: Key[Array, ""], a: Float[Array, "m n"], a_h: Float[Array, "m n"], rank: int,
                                 guess: Float[Array, "m k"] | None = None, oversample: int = 16) -> Factors:
    """Nearly the same from A and A H alone: U_k as the top eigenvectors of A H Aᵀ, by subspace iteration.

    B ← orth(A H (Aᵀ B)), B [m, k + oversample], and Rayleigh–Ritz at the end (Halko, Martinsson, Tropp, arXiv
    0909.4061): two products with [m, n] matrices and one QR a round, O(m n k).  Four rounds from random columns; two
    from ``guess``, whose columns span nearly what is sought (the L of the last outer iteration), unless it is zero.
    The n x n side would need two products more a round, with the root of H, for a shorter QR; it is not faster.

    The product squares the singular values of A H^½: directions with σᵢ < √ε σ₁ (3e-4 σ₁ in float32) are lost in
    rounding, and what they hold, at most ε σ₁² each, with them.  Directions with close σ mix, which costs their
    difference at most.
    """
    m, width = len(a), min(rank + oversample, *a.shape)
    basis, rounds = jax.random.normal(key, (m, width), a.dtype), 4
    if guess is not None:
        known = jnp.any(guess != 0)
        basis = basis.at[:, :rank].set(jnp.where(known, guess, basis[:, :rank]))
        rounds = jnp.where(known, 2, 4)
    basis = lax.fori_loop(0, rounds, lambda _, b: jnp.linalg.qr(a_h @ (a.T @ b))[0], basis)
    _, vectors = jnp.linalg.eigh((basis.T @ a_h) @ (a.T @ basis), symmetrize_input=True)  # ascending
    left = basis @ vectors[:, ::-1][:, :rank]
    return Factors(left, left.T @ a)
