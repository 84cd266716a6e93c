"""LPLRFactorize (Algorithm 2 of arXiv 2405.18886): low-rank factors on low-precision grids, A ≈ L R in the H-norm."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Key

from caldera_jax import hessian
from caldera_jax.codebooks import Codebook, Quantized, fit_scale, pad_columns, quantize, spread
from caldera_jax.hessian import HessianFactors
from caldera_jax.ldlq import ldlq
from caldera_jax.regression import Factors, rank_constrained, rank_constrained_iteratively


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


def round_rows(x: Float[Array, "k m"], root: Float[Array, "k k"], grid: Codebook,
               key: Key[Array, ""] | None = None) -> Quantized:
    """X on the grid with small tr((Q − X)ᵀ G (Q − X)), G = root rootᵀ: each row to its nearest, last to first, and its
    error fed back to the rows before it.

    With G = lower diag(d) lowerᵀ the loss is Σ d_j ‖η_j‖² for rounding errors η: of errors alike the sum of d in place
    of tr G, and Π d_j = det G whatever the order.  O(k² m).  LDLQ (``ldlq``) along the other axis: the blocks of a grid
    lie along the m columns, so that the feedback is one row's.
    """
    k, m = x.shape
    scale = fit_scale(grid, x)
    steps = jnp.broadcast_to(spread(grid, scale, m), (k, m))
    lower = root / jnp.diagonal(root)[None]

    def step(q, j):
        target = x[j] + lower[:, j] @ (x - q)  # rows not yet rounded, and this one, carry no error
        values, codes = grid.round(pad_columns((target / steps[j])[None], grid.block),
                                   None if key is None else jax.random.fold_in(key, j))
        return q.at[j].set(values[0, :m] * steps[j]), codes[0]

    q, codes = lax.scan(step, x, jnp.arange(k - 1, -1, -1))
    return Quantized(q, codes[::-1], scale)


def lplr_factorize(key: Key[Array, ""], a: Float[Array, "m n"], factors: HessianFactors, rank: int,
                   left_grid: Codebook, right_grid: Codebook, iterations: int = 10, svd: str = "exact",
                   a_h: Float[Array, "m n"] | None = None, guess: LowRank | None = None,
                   rounding: str = "nearest") -> LowRank:
    """Quantized L [m, k], R [k, n] with small tr((LR − A) H (LR − A)ᵀ), H = h + damping I.

    From the closed form of Lemma 4.2, alternates R ← quantize(L⁺ A) and L ← quantize(A H Rᵀ (R H Rᵀ)⁻¹): once for the
    start and ``iterations`` times more.  Keeps the best pair of all half steps, scored through Gram matrices of size k.
    ``svd``: "exact", or "randomized" for subspace iteration, which starts from ``guess``.  ``a_h``: A h, if known.
    O(m n min(m, n)) once for the exact SVD and O(k n (m + n)) an iteration.  Not monotone: rounding can undo what a
    least-squares step gains.

    ``rounding``: "nearest", as in the paper; or "feedback", which is not in it: R by LDLQ on H, L by ``round_rows`` on
    R H Rᵀ.  L T, Tᵀ R are then as good a start for any rotation T, and a random one makes the rows of R alike and takes
    the sum of the d of R H Rᵀ towards k (Π σᵢ²)^{1/k}, the least it can be, σᵢ the singular values of A H^½; to the
    nearest L's rounding costs Σ σᵢ².  In the plain norm A − L R is about as large as before (theory/factor_bits.py).
    """
    a_h = (a @ factors.h if a_h is None else a_h) + factors.damping * a
    energy = jnp.sum(a_h * a)
    svd_key, key = jax.random.split(key)
    if svd == "exact":
        start = rank_constrained(a, factors.root, rank)
    else:
        start = rank_constrained_iteratively(svd_key, a, a_h, rank, None if guess is None else guess.left_t.values.T)

    fed_back = rounding == "feedback"
    if fed_back:
        turn_key, key = jax.random.split(key)
        turn = jnp.linalg.qr(jax.random.normal(turn_key, (rank, rank), a.dtype))[0]
        start = Factors(start.left @ turn, turn.T @ start.right)
        of_right = factors._replace(lower=hessian.block_ldl(factors.root, right_grid.block))

    def fit_right(key, left_t):
        target = _solve(left_t @ left_t.T, left_t @ a)
        return ldlq(target, right_grid, of_right, 0, key) if fed_back else quantize(right_grid, target, key)

    def fit_left(key, gram, cross):
        target = _solve(gram, cross)
        if not fed_back:
            return quantize(left_grid, target, key)
        return round_rows(target, hessian.factor(gram, 1e-6).root, left_grid, key)

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
