"""The second moment of a layer's inputs: accumulated without loss, damped, factored once.

H = XᵀX / tokens with the tokens as rows of X.  Everything that depends on H alone is in ``HessianFactors``.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

TILE = 2048  # columns of X in one product of XᵀX
MASSIVE = 1e3  # times the median squared norm of its window's tokens: a token that outweighs all others in H


class Moments(NamedTuple):
    """Running sum of x xᵀ and the number of tokens; ``error`` holds what rounding took from ``sum``, ``peak`` the
    largest squared norm of a token, over the median of its window; ``energy`` the sum of all squared norms, not
    capped, and ``ordinary`` what it would be if all had the median of their window; ``seen`` the number of tokens that
    are not zero: of an expert's inputs, those that are routed to it.  Beyond TILE inputs only the
    tiles on and above the diagonal are summed; ``mean`` mirrors them."""

    sum: Float[Array, "n n"]
    error: Float[Array, "n n"]
    count: Int[Array, ""]
    peak: Float[Array, ""]
    energy: Float[Array, ""]
    ordinary: Float[Array, ""]
    seen: Int[Array, ""]

    def mean(self) -> Float[Array, "n n"]:
        """H = Σ x xᵀ / tokens."""
        h = (self.sum + self.error) / self.count.astype(self.sum.dtype)
        return h if len(h) <= TILE else jnp.triu(h) + jnp.triu(h, 1).T

    def left_out(self, damping: float) -> Float[Array, ""]:
        """(1 + λ r) / (1 + λ s): r and s are tr H of the tokens as they are, and as they count, over that of ordinary
        ones.  About what damping by λ of the one or the other adds to D; 1 where no token is capped."""
        ordinary = jnp.where(self.ordinary > 0, self.ordinary, jnp.ones_like(self.ordinary))
        return (ordinary + damping * self.energy) / (ordinary + damping * jnp.trace(self.sum + self.error))


def zero(n: int, dtype=jnp.float32) -> Moments:
    """Moments of no tokens."""
    return Moments(jnp.zeros((n, n), dtype), jnp.zeros((n, n), dtype), jnp.zeros((), jnp.int32), jnp.zeros((), dtype),
                   *jnp.zeros((2, 1), dtype)[:, 0], jnp.zeros((), jnp.int32))


def update(moments: Moments, x: Float[Array, "*batch n"], cap: float | Float[Array, ""] = jnp.inf) -> Moments:
    """Add the outer products of the tokens in x, whose last axis but one is a window; O(tokens n²).

    A token whose squared norm exceeds ``cap`` times its window's median counts as one of that norm (inf: as it is).
    Tokens that are zero add nothing, and the median is of the others.
    Models have tokens, mostly the first of a text, with 10³ to 10⁵ times the others' (2402.17762).  One such token
    fills H, whose damping then drowns the others; a cap of 10⁴ leaves them most of their due.
    """
    rows = jnp.atleast_2d(x).astype(moments.sum.dtype)
    norms = jnp.sum(rows * rows, axis=-1, keepdims=True)
    middle = jnp.nanmedian(jnp.where(norms == 0, jnp.nan, norms), axis=-2, keepdims=True)
    ratio = norms / jnp.where(middle > 0, middle, jnp.ones_like(middle))
    ratio = jnp.where(middle > 0, ratio, jnp.ones_like(ratio))  # all tokens are zero: nothing to compare with
    cap = jnp.asarray(cap, ratio.dtype)
    rows = (rows * jnp.where(ratio > cap, jnp.sqrt(cap / ratio), jnp.ones_like(ratio))).reshape(-1, x.shape[-1])
    gram = jnp.zeros_like(moments.sum)
    for i in range(0, rows.shape[1], TILE):  # from the diagonal on: XᵀX is symmetric
        part = jnp.matmul(rows[:, i:i + TILE].T, rows[:, i:], precision=lax.Precision.HIGHEST)
        gram = gram.at[i:i + TILE, i:].set(part)
    return merge(moments, Moments(gram, jnp.zeros_like(gram), jnp.asarray(len(rows), jnp.int32), jnp.max(ratio),
                                  jnp.sum(norms), jnp.sum(jnp.where(norms > 0, middle, 0)),
                                  jnp.sum(norms > 0, dtype=jnp.int32)))


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of both sets of tokens.  The sum is compensated (Knuth's two-sum): exact to one rounding of the total."""
    total = a.sum + b.sum
    part = total - a.sum
    lost = (a.sum - (total - part)) + (b.sum - part)
    return Moments(total, a.error + b.error + lost, a.count + b.count, jnp.maximum(a.peak, b.peak),
                   a.energy + b.energy, a.ordinary + b.ordinary, a.seen + b.seen)


class HessianFactors(NamedTuple):
    """All that depends on H alone, n inputs (n' = n rounded up to the quantizer's block).

    ``h`` is normalised to mean diagonal 1 but not damped: errors are scored with it.  ``root`` and ``lower`` belong to
    h + damping I = root rootᵀ (Cholesky), and ``lower`` is the unit block lower triangular factor of its block LDL.
    """

    h: Float[Array, "n n"]
    damping: Float[Array, ""]
    root: Float[Array, "n n"]
    lower: Float[Array, "p p"]
    finite: Bool[Array, ""]


def normalise(h: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """h divided by its mean diagonal, and symmetric to the last bit.  A zero h stays zero."""
    scale = jnp.mean(jnp.diagonal(h))
    return (h + h.T) / (2 * jnp.where(scale > 0, scale, jnp.ones((), h.dtype)))


def regularise(h: Float[Array, "n n"], damping: float) -> Float[Array, "n n"]:
    """h / mean diagonal + damping I, as the original does with damping = 0.01."""
    return normalise(h) + damping * jnp.eye(len(h), dtype=h.dtype)


def damped_root(h: Float[Array, "n n"],
                damping: float | Float[Array, ""]) -> tuple[Float[Array, "n n"], Float[Array, ""]]:
    """Cholesky factor of h + d I for the least d = damping, 10 damping, … that gives a finite one, and that d.

    With damping = 0 the next tries are 1e-6, 1e-5, …  Gives up (NaN in the factor) when d exceeds 1000, which only
    an h with NaN, infinities or large negative eigenvalues reaches.  O(n³ / 3) a try.
    """
    eye = jnp.eye(len(h), dtype=h.dtype)

    def attempt(d):
        return jnp.linalg.cholesky(h + d * eye, symmetrize_input=False), d

    def failed(state):
        root, d = state
        return ~jnp.all(jnp.isfinite(root)) & (d < 1000)

    def harder(state):
        return attempt(jnp.maximum(10 * state[1], 1e-6))

    return lax.while_loop(failed, harder, attempt(jnp.asarray(damping, h.dtype)))


def inverses(blocks: Float[Array, "b g g"]) -> Float[Array, "b g g"]:
    """Inverses of many small matrices that need no pivots, triangular or positive definite, by Gauss–Jordan; O(b g³).

    Not by LAPACK: on a CPU its batched routines hold a thread while they wait for others, and two of them at once on
    two cores wait for each other for ever (jaxlib 0.10.2).
    """
    count, g, _ = blocks.shape
    rows = jnp.concatenate([blocks, jnp.broadcast_to(jnp.eye(g, dtype=blocks.dtype), (count, g, g))], axis=2)
    for i in range(g):
        pivot = rows[:, i] / rows[:, i, i][:, None]
        rows = (rows - rows[:, :, i][:, :, None] * pivot[:, None]).at[:, i].set(pivot)
    return rows[:, :, g:]


def block_ldl(root: Float[Array, "n n"], block: int) -> Float[Array, "p p"]:
    """The unit block lower triangular factor of H = root rootᵀ = lower blockdiag(D) lowerᵀ, n padded to the block.

    lower = root blockdiag(root_jj)⁻¹.  Padding is an identity, coupled to nothing.  O(n² block).
    """
    n = len(root)
    pad = -n % block
    root = jnp.pad(root, ((0, pad), (0, pad))) + jnp.diag((jnp.arange(n + pad) >= n).astype(root.dtype))
    blocks = jnp.arange((n + pad) // block)
    columns = root.reshape(n + pad, -1, block)
    inverse = inverses(columns.reshape(-1, block, *columns.shape[1:])[blocks, :, blocks])
    return jnp.einsum("ajg,jgh->ajh", columns, inverse, precision=lax.Precision.HIGHEST).reshape(n + pad, n + pad)


def factor(h: Float[Array, "n n"], damping: float = 0.01, block: int = 1) -> HessianFactors:
    """Normalise, damp (raising the damping where the Cholesky fails) and factor h, once per layer; O(n³ / 3).

    ``finite`` is False when h holds NaN or infinities, or has large negative eigenvalues.  The damping used is
    reported in ``damping``, in units of the mean diagonal.
    """
    h = normalise(h)
    root, used = damped_root(h, damping)
    return HessianFactors(h, used, root, block_ldl(root, block), jnp.all(jnp.isfinite(root)))


def identity(n: int, block: int = 1, dtype=jnp.float32) -> HessianFactors:
    """Factors of H = I: the data-free problem ‖Q + LR − W‖²_F."""
    return factor(jnp.eye(n, dtype=dtype), 0.0, block)
