"""Incoherence: random rotations of a weight and its Hessian that leave the objective alone and spread the outliers.

With U, V orthogonal, w' = U w Vᵀ and h' = V h Vᵀ give tr(E' H' E'ᵀ) = tr(E H Eᵀ) for every E' = U E Vᵀ. (QuIP#, arXiv
2402.04396, Lemma 3.1: after random signs and a Hadamard matrix on both sides, with probability 1 - delta each,

    max |w'_ij| <= 2 log(4 m n / delta) ‖w‖_F / sqrt(m n),
    max |q'_ij| <= sqrt(2 log(2 n² / delta) / n)      over the eigenvectors q' of h'.

Where ``hadamard.transform`` falls back on cosines each rotation may add a factor sqrt(2) to these. They do not cover
Kronecker products of Haar factors, whose entries are products of near Gaussians and spread outliers less well.)
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import random
from jaxtyping import Array, Float, PRNGKeyArray

from caldera_jax import hadamard
from caldera_jax.kernels.hadamard import transform

KINDS = ("hadamard", "orthogonal", "none")

# One orthogonal matrix V, its kind told by its structure (so that it is static under jit):
#   an array of signs [size]           V = T diag(signs), T the transform of ``hadamard``
#   a tuple of orthogonal matrices     V = their Kronecker product; the empty tuple is the identity
#   a tuple of one vector [size]       V = diag(vector): trained scales, where there is no rotation
Side = Float[Array, " size"] | tuple[Float[Array, "_ _"], ...] | tuple[Float[Array, " size"]]


class Rotation(NamedTuple):
    """Both sides of w' = U w Vᵀ. A pytree: ``vmap`` and ``scan`` may stack the rotations of layers of one shape."""

    left: Side  # U, on the m outputs
    right: Side  # V, on the n inputs


def draw(key: PRNGKeyArray, m: int, n: int, kind: str = "hadamard", dtype=jnp.float32) -> Rotation:
    """A random rotation of [m, n] matrices.

    kind "hadamard": random signs, then the fast transform: m + n bits to keep, O(log n) an entry to apply.
    kind "orthogonal": Haar orthogonal factors of orders a and b on each side, a b = n and a, b as near sqrt(n) as the
    divisors allow: O(a + b) an entry. A prime n has one dense factor, of n² numbers.
    kind "none": the identity.
    Raises ValueError for any other kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown rotation kind {kind!r}: choose one of {', '.join(map(repr, KINDS))}")
    left, right = random.split(key)
    return Rotation(_draw_side(left, m, kind, dtype), _draw_side(right, n, kind, dtype))


def forward(side: Side, x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """x Vᵀ: every vector v along the last axis becomes V v. Differentiable in x and in the signs or factors.

    ``side`` is cast to the dtype of x. Raises ValueError if its size is not n.
    """
    _check_size(side, x)
    if isinstance(side, tuple):
        return _scale(side[0], x) if _diagonal(side) else hadamard.kronecker(side, x)
    return transform(_scale(side, x))


def backward(side: Side, x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """x V: every vector v along the last axis becomes Vᵀ v. Undoes ``forward`` while V is orthogonal.

    This is the transpose of ``forward`` always, and its inverse only for signs of ±1 and orthogonal factors. Once the
    signs are trained as real numbers, backward(side, forward(side, x)) = signs² x: what the model then computes is
    signs * Tᵀ v, which is linear in the signs and has no division.
    """
    _check_size(side, x)
    if _diagonal(side):
        return _scale(side[0], x)
    if isinstance(side, tuple):
        return hadamard.kronecker([factor.T for factor in side], x)
    return _scale(side, transform(x, inverse=True))


def reciprocal(side: Side, dtype) -> Side:
    """The side whose ``forward`` undoes ``backward`` of this one: itself, unless its signs or scales are not ±1.  What
    a scale of 0 lost stays lost."""
    def inverse(scale):
        scale = scale.astype(dtype)
        return 1 / jnp.where(scale == 0, 1, scale)

    return side if isinstance(side, tuple) and not _diagonal(side) else jax.tree.map(inverse, side)


def rotate(
    key: PRNGKeyArray, w: Float[Array, "m n"], h: Float[Array, "n n"], kind: str = "hadamard"
) -> tuple[Float[Array, "m n"], Float[Array, "n n"], Rotation]:
    """w' = U w Vᵀ, h' = V h Vᵀ (made exactly symmetric) and the Rotation (U, V) that was drawn.

    Raises ValueError for an unknown kind (see ``draw``).
    """
    m, n = w.shape
    rotation = draw(key, m, n, kind, w.dtype)
    return rotate_weight(rotation, w), rotate_hessian(rotation.right, h), rotation


def rotate_weight(rotation: Rotation, w: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """w' = U w Vᵀ."""
    return forward(rotation.left, forward(rotation.right, w).T).T


def rotate_hessian(side: Side, h: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """h' = V h Vᵀ, made exactly symmetric; layers that share h must share V = ``rotation.right`` to share h'."""
    rotated = forward(side, forward(side, h).T)
    return (rotated + rotated.T) / 2


def undo(rotation: Rotation, w: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """w = Uᵀ w' V: the weight in the caller's basis."""
    return backward(rotation.left, backward(rotation.right, w).T).T


def _draw_side(key, n: int, kind: str, dtype) -> Side:
    if kind == "none":
        return ()
    if kind == "hadamard":
        return random.rademacher(key, (n,), dtype)
    small = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
    orders = (n,) if small == 1 else (small, n // small)
    keys = random.split(key, len(orders))
    return tuple(random.orthogonal(k, order, dtype=dtype) for k, order in zip(keys, orders, strict=True))


def _diagonal(side):
    return isinstance(side, tuple) and len(side) == 1 and side[0].ndim == 1


def _scale(signs, x):
    return jnp.broadcast_to(signs.astype(x.dtype), x.shape) * x


def _check_size(side: Side, x: jax.Array) -> None:
    if isinstance(side, tuple):
        size = math.prod(factor.shape[0] for factor in side) if side else x.shape[-1]
    else:
        size = side.shape[0]
    if size != x.shape[-1]:
        raise ValueError(
            f"this side of the rotation acts on a last axis of size {size}, got an array of shape {x.shape}: "
            "use rotation.right for the n inputs and rotation.left for the m outputs"
        )
