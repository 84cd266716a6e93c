"""The orthonormal transform of ``caldera_jax.hadamard`` as two small matrix products on a tile held on chip.

T = H_n/q ⊗ M_q, with M of order q a constructed Hadamard matrix (or q = 1), is grouped as T = A ⊗ C: C of order
c = 2^j q <= 256, and A the Sylvester matrix of order a = n / c <= 256.  A vector is then a matrix X [a, c], and T x is
A X Cᵀ.  A tile is R rows of such matrices, one vector or several: [R, c] @ Cᵀ, then (I ⊗ A) [R, R] from the left.  The
entries of A and C are ±1, exact in every dtype; 1 / sqrt(c) and 1 / sqrt(a) multiply the float32 sums.

* Tiles: [max(128, a), c], c = 128 where it can be.
* On chip, s bytes an entry: 2 s (2 R c + R² + c²), 0.5 MB at n = 4096 (R = c = 128) in float32.
* Main memory: 2 s bytes an entry, read once and written once; the reference passes over memory once a factor.
* Cost: n (R + c) multiply-adds a vector, in matrix units; half precision is rounded once between the two products.
* Falls back on the reference: cosine sizes (no Hadamard matrix known here), n > 65536 or c > 256, float64.

What ran where is said in ``kernels``.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from caldera_jax import hadamard
from caldera_jax.kernels import compiler_params, dispatch, precision

LARGEST = 256  # the order of A and of C


def reference(x: Float[Array, "*batch n"], inverse: bool = False) -> Float[Array, "*batch n"]:
    """``hadamard.transform`` or, if ``inverse``, ``hadamard.inverse``."""
    return hadamard.inverse(x) if inverse else hadamard.transform(x)


@cache
def split(n: int) -> tuple[int, int] | None:
    """(a, c) with a c = n and T = A ⊗ C, c filling 128 lanes if it can; None where none has both orders at most 256."""
    c, kind = hadamard.factor(n)[1:]
    while c < n and (n // c > LARGEST or 2 * c <= 128):
        c *= 2
    return None if kind == "cosine" or max(c, n // c) > LARGEST else (n // c, c)


def transform(x: Float[Array, "*batch n"], inverse: bool = False) -> Float[Array, "*batch n"]:
    """T x along the last axis, or Tᵀ x: equal to ``hadamard.transform`` (``inverse``) up to rounding."""
    plain = partial(reference, inverse=inverse)
    if x.dtype.itemsize > 4 or x.size == 0 or split(x.shape[-1]) is None:
        return plain(x)
    return dispatch(plain, partial(pallas, inverse=inverse), x)


@cache
def _matrices(n: int, inverse: bool) -> tuple[np.ndarray, np.ndarray]:
    """I ⊗ A [R, R], and C or its transpose as it multiplies from the right [c, c]; int8."""
    (a, c), rest = split(n), hadamard.factor(n)[1]
    dense = np.kron(hadamard.hadamard_matrix(c // rest), hadamard.hadamard_matrix(rest))
    copies = np.eye(max(1, 128 // a), dtype=np.int8)
    return np.kron(copies, hadamard.hadamard_matrix(a)), dense if inverse else dense.T


@partial(jax.jit, static_argnames=("inverse", "interpret"))
def pallas(x, *, inverse: bool = False, interpret: bool = False):
    """``transform`` by the kernel."""
    n, dtype = x.shape[-1], x.dtype
    (a, c), (left, right), zero = split(n), _matrices(n, inverse), np.int32(0)
    rows = len(left)
    if dtype == jnp.float16:  # a TPU has bfloat16 only
        x = x.astype(jnp.float32)
    tiles = x.reshape(-1, c)
    tiles = jnp.pad(tiles, ((0, -len(tiles) % rows), (0, 0)))
    whole = lambda size: pl.BlockSpec((size, size), lambda i: (zero, zero))
    tile = pl.BlockSpec((rows, c), lambda i: (i, zero))
    y = pl.pallas_call(
        partial(_kernel, order=(a, c), precision=precision(x.dtype)), grid=(len(tiles) // rows,),
        in_specs=[tile, whole(rows), whole(c)], out_specs=tile, out_shape=jax.ShapeDtypeStruct(tiles.shape, x.dtype),
        compiler_params=compiler_params(), interpret=interpret)(
            tiles, jnp.asarray(left, x.dtype), jnp.asarray(right, x.dtype))
    return y.reshape(-1)[:x.size].reshape(x.shape).astype(dtype)


def _kernel(x, left, right, y, *, order, precision):
    dot = partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)
    half = (dot(x[...], right[...]) * order[1] ** -0.5).astype(x.dtype)  # scaled here: float16 must not overflow
    y[...] = (dot(left[...], half) * order[0] ** -0.5).astype(x.dtype)
