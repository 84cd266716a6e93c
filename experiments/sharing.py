"""Weights that stand for several others: Kronecker products, blocks with the same weights, a factorised embedding.

Without training.  ``METHODS`` replace one layer; the other two functions take a whole model to a model and its bits.
Host functions, computed in float64; what is stored is rounded to float16, or to 8 or 4 bits (``pruning.row_grid``).
"""

from itertools import product

import numpy as np
from baselines import Layer, Method, Replacement
from jaxtyping import Float
from pruning import grid_bits, rounded, stored_block

from caldera_jax.models import llama
from caldera_jax.models.llama import LlamaConfig, Params

HOW = {"first": lambda weights: weights[0], "mean": lambda weights: np.mean(weights, axis=0)}


def kronecker(key, layer: Layer, bits: float, value_bits: int = 16) -> Replacement:
    """W ≈ Σ_{t<=r} A_t ⊗ B_t with least ‖W − Σ A_t ⊗ B_t‖_F, its factors rounded (arXiv 2110.08152).

    The best r terms are those of the SVD of the rearranged W, a row for each of its blocks (Van Loan and Pitsianis,
    1993): the error is Σ_{t>r} σ_t².  ``bits``: a weight, at most; r is the largest that fits.  A term takes
    2 (m n)^½ values, and more where the sizes have few divisors.  ``value_bits``: 16 (float16), or 8 with a grid for
    each A_t and B_t.  ValueError where not even r = 1 fits, and for other value_bits.  H is not looked at.
    O((m n)^1.5).
    """
    w = np.asarray(layer.w, np.float64)
    (m1, n1), (m2, n2) = factor_shapes(*w.shape)
    term = value_bits * (m1 * n1 + m2 * n2) + grid_bits(2, value_bits)
    terms = min(int(bits * w.size) // term, m1 * n1, m2 * n2)
    if terms < 1:
        raise ValueError(f"a term [{m1}, {n1}] ⊗ [{m2}, {n2}] takes {term / w.size:.3g} bits a weight, more than "
                         f"{bits:.3g}: raise bits")
    left, right, stored = _factors(rearrange(w, m1, n1), terms, value_bits)
    weight = np.einsum("tab,tcd->acbd", left.reshape(-1, m1, n1), right.reshape(-1, m2, n2), optimize=True)
    return Replacement(weight.reshape(w.shape), stored)


def _factors(a, rank, value_bits):
    """The leading terms of the SVD of a [p, q] as they are stored: [k, p] and [k, q], a grid for each row; and their
    bits."""
    if value_bits not in (16, 8):
        raise ValueError(f"value_bits of factors is 16 or 8, got {value_bits}")
    u, s, v = np.linalg.svd(a, full_matrices=False)
    (left, left_bits), (right, right_bits) = (
        rounded(vectors[:rank] * np.sqrt(s[:rank])[:, None], value_bits) for vectors in (u.T, v))
    return left, right, left_bits + right_bits


def rearrange(w: Float[np.ndarray, "m n"], m1: int, n1: int) -> Float[np.ndarray, "blocks inside"]:
    """A row for each of the m1 x n1 blocks of W: A ⊗ B becomes vec A vec Bᵀ."""
    m, n = w.shape
    return w.reshape(m1, m // m1, n1, n // n1).transpose(0, 2, 1, 3).reshape(m1 * n1, -1)


def factor_shapes(m: int, n: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of A and B of least size together, so of the rearranged W closest to square; then A closest to it."""
    divisors = lambda size: [d for d in range(1, size + 1) if size % d == 0]
    cost = lambda a: (a[0] * a[1] + (m // a[0]) * (n // a[1]), max(a) / min(a), a)
    m1, n1 = min(product(divisors(m), divisors(n)), key=cost)
    return (m1, n1), (m // m1, n // n1)


METHODS = {"kronecker": Method("sharing", kronecker, "2110.08152", data=False, random=False)}


def share_blocks(config: LlamaConfig, params: Params, group: int = 2, how: str = "first",
                 value_bits: int = 16) -> tuple[Params, int]:
    """Each ``group`` neighbouring blocks with the same linear weights, each with its own gains and biases.

    ``how``: those of the "first" of them, or their "mean".  Bits: the shared weights as ``stored_block`` has them,
    once.  A last group may be smaller.  ALBERT (arXiv 1909.11942) trains so from the start; here nothing is trained.
    ValueError for a group that is not 2 … blocks, another ``how``, and value_bits other than 16, 8 or 4.
    """
    blocks = params["blocks"]
    if not 2 <= group <= len(blocks):
        raise ValueError(f"group is how many blocks share their weights, 2 to {len(blocks)}; got {group}")
    if how not in HOW:
        raise ValueError(f"how must be one of {', '.join(HOW)}; got {how!r}")
    shared, bits = [], 0
    for i in range(0, len(blocks), group):
        members = [dict(block) for block in blocks[i:i + group]]
        one, stored = stored_block({name: HOW[how]([np.asarray(member[name], np.float64) for member in members])
                                    for name in llama.LINEARS}, value_bits)
        shared += [member | one for member in members]
        bits += stored
    return params | {"blocks": shared}, bits


def factorised_embedding(params: Params, rank: int, value_bits: int = 16) -> tuple[Params, int]:
    """E ≈ A B, [v, k] [k, d], of least ‖E − A B‖_F, rounded, and its bits (arXiv 1909.11942).

    A tied head is the same A B.  ``value_bits``: 16 (float16), or 8 with a grid for each column of A and row of B.  The
    bits are of the embedding, another set of weights than the linear layers: compare them with those of the dense one
    at the same value_bits.  ValueError for a rank that is not 1 … min(v, d), and for other value_bits.  O(v d²).
    """
    table = np.asarray(params["embed"], np.float64)
    if not 1 <= rank <= min(table.shape):
        raise ValueError(f"an embedding {table.shape} takes ranks 1 to {min(table.shape)}, got {rank}")
    left, right, bits = _factors(table, rank, value_bits)
    return params | {"embed": left.T @ right}, bits
