"""Rank-constrained regression in closed form: Lemma 4.2 of CALDERA (arXiv 2405.18886), Theorem 1 of QERA."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Key

LeftVectors = Callable[[Array, Array, int], Array]  # key, matrix [m, n], rank -> orthonormal [m, rank]


class Factors(NamedTuple):
    """A matrix L R of rank k."""

    left: Float[Array, "m k"]
    right: Float[Array, "k n"]


def exact_svd(key: Key[Array, ""], a: Float[Array, "m n"], rank: int) -> Float[Array, "m k"]:
    """The first ``rank`` left singular vectors of a, by a full SVD; O(m n min(m, n)).  ``key`` is not used."""
    return jnp.linalg.svd(a, full_matrices=False)[0][:, :rank]


def randomized_svd(key: Key[Array, ""], a: Float[Array, "m n"], rank: int, oversample: int = 16,
                   power: int = 3) -> Float[Array, "m k"]:
    """The same, nearly: range finder with power iterations (Halko, Martinsson, Tropp, arXiv 0909.4061); O(m n rank).

    Mixes directions whose singular values are close: the error of the regression grows by a factor near 1, and what is
    lost at a flat spectrum is lost there by any choice of directions.
    """
    width = min(rank + oversample, *a.shape)
    basis = jnp.linalg.qr(a @ jax.random.normal(key, (a.shape[1], width), a.dtype))[0]
    for _ in range(power):
        basis = jnp.linalg.qr(a @ jnp.linalg.qr(a.T @ basis)[0])[0]
    triangle = jnp.linalg.qr((basis.T @ a).T, mode="r").T
    return basis @ jnp.linalg.svd(triangle)[0][:, :rank]


SVDS: dict[str, LeftVectors] = {"exact": exact_svd, "randomized": randomized_svd}


def rank_constrained(key: Key[Array, ""], a: Float[Array, "m n"], root: Float[Array, "n n"], rank: int,
                     left_vectors: LeftVectors = exact_svd) -> Factors:
    """The L [m, k], R [k, n] of least tr((LR − A) H (LR − A)ᵀ), H = root rootᵀ; the optimum is Σ_{i>k} σᵢ(A root)².

    L holds the top left singular vectors U_k of A root, for any square root of H, and given an orthonormal L the best
    R is Lᵀ A (equal to S_k Z_kᵀ root⁻¹ where the inverse exists): no inverse of H is needed, and a singular H is
    allowed.  Differs from Lemma 4.2 there: R keeps what A has outside the range of X, which costs nothing.
    """
    left = left_vectors(key, a @ root, rank)
    return Factors(left, left.T @ a)
