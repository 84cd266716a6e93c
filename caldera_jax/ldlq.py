"""Quantization with linear feedback: block LDLQ (QuIP#, arXiv 2402.04396), and coordinate descent after it.

``quantize(target, start)`` rounds a slab of columns [m, block] that begins at column ``start``, and returns its values
and its codes (or any arrays); it may be any function.  All widths here are multiples of ``block``: ``ldlq`` pads.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Key, PyTree, UInt

from caldera_jax.codebooks import Codebook, Quantized, fit_scale, pad_columns, spread
from caldera_jax.hessian import HessianFactors, inverses

Quantizer = Callable[[Array, Array], tuple[Array, PyTree[Array]]]


def block_ldlq(w: Float[Array, "m n"], lower: Float[Array, "n n"], quantize: Quantizer,
               block: int) -> tuple[Float[Array, "m n"], UInt[Array, "m codes"]]:
    """Quantize columns last to first, feeding each rounding error back through ``lower``.

    Column block j is rounded at W_j + Σ_{i>j} (W − Q)_i lower_ij, so that tr(E H Eᵀ) = Σ_j tr(η_j D_j η_jᵀ) with the
    rounding errors η.  Optimal among feedbacks that depend on H only (QuIP, arXiv 2307.13304, Theorem 1; the unbounded
    grid).  O(m n²).  ``sweep`` does the same in larger products.
    """
    def step(q, start):
        columns = lax.dynamic_slice_in_dim(lower, start, block, axis=1)
        target = lax.dynamic_slice_in_dim(w, start, block, axis=1) + (w - q) @ columns
        values, codes = quantize(target, start)
        return lax.dynamic_update_slice_in_dim(q, values, start, axis=1), codes

    starts = jnp.arange(w.shape[1] - block, -1, -block)
    q, codes = lax.scan(step, w, starts)  # q starts at w: columns not yet rounded carry no error
    return q, jnp.moveaxis(codes[::-1], 0, 1).reshape(len(w), -1)


def sweep(w: Float[Array, "m n"], q: Float[Array, "m n"], feedback: Float[Array, "n n"], quantize: Quantizer,
          block: int, slab: int, triangular: bool = False) -> tuple[Float[Array, "m n"], PyTree[Array]]:
    """One pass over the columns, last to first: Q_j ← quantize(W_j + (W − Q) feedback_j), in two levels.

    Also what ``quantize`` gave beside the values, an array or a tree of them, stacked: one for each block of columns.

    All columns enter a slab's feedback by large products; inside the slab only the slab's own changes follow.
    From q = w with ``feedback = lower`` and ``triangular`` this is ``block_ldlq``, half the work of the full square;
    from a rounded q with ``feedback`` of ``descent_feedback`` it is a pass of coordinate descent.  ``slab`` is a
    multiple of ``block`` and divides n.
    """
    m, n = w.shape
    chunk = _chunk(n, slab)

    def outer(state, first):
        q, e = state  # e = w − q, kept beside q: to subtract whole matrices for every slab would cost as much again
        old = lax.dynamic_slice_in_dim(q, first, slab, axis=1)
        aside = lax.dynamic_slice_in_dim(feedback, first, slab, axis=1)
        inside = lax.dynamic_slice_in_dim(aside, first, slab, axis=0)
        w_slab = lax.dynamic_slice_in_dim(w, first, slab, axis=1)

        def add(i, target):
            part = lambda a, axis: lax.dynamic_slice_in_dim(a, i * chunk, chunk, axis=axis)
            return target + part(e, 1) @ part(aside, 0)

        target = lax.fori_loop(first // chunk if triangular else 0, n // chunk, add, w_slab)

        def inner(new, start):
            change = (old - new) @ lax.dynamic_slice_in_dim(inside, start, block, axis=1)
            values, codes = quantize(lax.dynamic_slice_in_dim(target, start, block, axis=1) + change, first + start)
            return lax.dynamic_update_slice_in_dim(new, values, start, axis=1), codes

        new, codes = lax.scan(inner, old, jnp.arange(slab - block, -1, -block))
        put = lambda a, part: lax.dynamic_update_slice_in_dim(a, part, first, axis=1)
        return (put(q, new), put(e, w_slab - new)), codes

    (q, _), codes = lax.scan(outer, (q, w - q), jnp.arange(n - slab, -1, -slab))
    return q, jax.tree.map(lambda a: a.reshape(n // block, *a.shape[2:])[::-1], codes)


def _chunk(n, slab):
    """Columns of a large product: whole slabs, about 1024, dividing n."""
    return max(width for width in range(slab, n + 1, slab) if n % width == 0 and (width <= 1024 or width == slab))


def descent_feedback(h: Float[Array, "n n"], block: int) -> Float[Array, "n n"]:
    """Feedback H_ij H_jj⁻¹ (i ≠ j, else 0) of coordinate descent: each block at its optimum given all the others."""
    n = len(h)
    columns, blocks = h.reshape(n, -1, block), jnp.arange(n // block)
    diagonal = columns.reshape(-1, block, n // block, block)[blocks, :, blocks]
    feedback = inverses(diagonal) @ columns.transpose(1, 2, 0)  # [j, g, i]
    own = jnp.repeat(blocks, block)[None, None, :] == blocks[:, None, None]
    return jnp.where(own, 0, feedback).transpose(2, 0, 1).reshape(n, n)


def slab_width(n: int, block: int) -> int:
    """Columns of a slab: about 128, chosen so that little padding is needed."""
    if n <= 256:
        return -(-n // block) * block
    return min(range(-(-64 // block) * block, 257, block), key=lambda width: (-n % width, abs(width - 128)))


def ldlq(w: Float[Array, "m n"], codebook: Codebook, factors: HessianFactors, refine_passes: int = 0,
         key: Key[Array, ""] | None = None) -> Quantized:
    """Q near W on the codebook's grid with small tr((Q − W) H (Q − W)ᵀ), H = h + damping I; any m, n >= 1.

    Block LDLQ, then ``refine_passes`` passes of coordinate descent, each of which may raise the error of a lattice
    quantizer (it rounds in the plain norm of the block) or a dithered one, unlike for nearest rounding on a scalar
    grid.  O(m n² (1 + passes)).
    """
    m, n = w.shape
    block = codebook.block
    slab = slab_width(n, block)
    width = n + -n % slab
    scale = fit_scale(codebook, w)
    columns = pad_columns(spread(codebook, scale, n), width) if codebook.group is not None else scale
    columns = jnp.where(columns > 0, columns, 1)

    def quantize(target, start):
        step = columns if columns.shape[1] == 1 else lax.dynamic_slice_in_dim(columns, start, block, axis=1)
        values, codes = codebook.round(target / step, None if key is None else jax.random.fold_in(key, start))
        return values * step, codes

    w = pad_columns(w, width)
    lower = _pad_square(factors.lower, width)
    q, codes = sweep(w, w, lower, quantize, block, slab, triangular=True)
    if refine_passes:
        h = factors.h + factors.damping * jnp.eye(n, dtype=w.dtype)
        feedback = descent_feedback(_pad_square(h, width, 1.0), block)
        q, codes = lax.fori_loop(0, refine_passes, lambda _, state: sweep(w, state[0], feedback, quantize, block, slab),
                                 (q, codes))
    codes = jnp.moveaxis(codes, 0, 1).reshape(m, -1)
    return Quantized(q[:, :n], codes[:, :-(-n // block)], scale)


def _pad_square(a, width, diagonal=0.0):
    """a with zero rows and columns up to ``width``, and ``diagonal`` on the new part of the diagonal."""
    n = len(a)
    new = jnp.arange(width) >= n
    return jnp.pad(a, ((0, width - n), (0, width - n))) + jnp.diag(jnp.where(new, diagonal, 0).astype(a.dtype))
