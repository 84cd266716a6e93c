"""The orthonormal transform of ``caldera_jax.hadamard`` as two small matrix products on a tile held on chip.

T = H_n/q ⊗ M_q, with M of order q a constructed Hadamard matrix (or q = 1), is grouped as T = A ⊗ C: C of order
c = 2^j q <= 256, and A the Sylvester matrix of order a = n / c <= 256.  A vector is then a matrix X [a, c], and T x is
A X Cᵀ.  A tile is R rows of such matrices, one vector or several: [R, c] @ Cᵀ, then (I ⊗ A) [R, R] from the left.  The
entries of A and C are ±1, exact in every dtype; 1 / sqrt(c) and 1 / sqrt(a) multiply the float32 sums.

* Tiles: TPU [max(128, a), c], c = 128 where it can be; CUDA [max(16, a), c padded to a power of two], a near c.
* On chip, s bytes an entry: 2 s (2 R c + R² + c²) on a TPU, 0.5 MB at n = 4096 (R = c = 128) in float32;
  s (R c + R² + c²) in shared memory on a GPU, 48 KiB at n = 4096 (R = c = 64).
* Main memory: 2 s bytes an entry, read once and written once; the reference passes over memory once a factor.
* Cost: n (R + c) multiply-adds a vector, in matrix units; half precision is rounded once between the two products.
* Falls back on the reference: cosine sizes (no Hadamard matrix known here), n > 65536 or c > 256, float64; on a GPU
  also where a tile and both matrices exceed 96 KiB (float32: n > 4096; half: n > 16384, and 11008 = 64 x 172).

Nothing here was run on an accelerator; see the status in ``kernels``.
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
def split(n: int, platform: str = "tpu") -> tuple[int, int] | None:
    """(a, c) with a c = n and T = A ⊗ C; None where there is none with both orders at most 256.

    TPU: c fills 128 lanes if it can.  CUDA: a and c are near each other, so that the tile is small.
    """
    c, kind = hadamard.factor(n)[1:]
    while c < n and (n // c > LARGEST or (2 * c <= 128 if platform == "tpu" else 2 * c * c <= n)):
        c *= 2
    return None if kind == "cosine" or max(c, n // c) > LARGEST else (n // c, c)


def transform(x: Float[Array, "*batch n"], inverse: bool = False) -> Float[Array, "*batch n"]:
    """T x along the last axis, or Tᵀ x: equal to ``hadamard.transform`` (``inverse``) up to rounding."""
    plain = partial(reference, inverse=inverse)
    if x.dtype.itemsize > 4 or x.size == 0 or split(x.shape[-1]) is None:
        return plain(x)
    return dispatch(plain, partial(pallas, inverse=inverse), x)


@cache
def _matrices(n: int, inverse: bool, platform: str) -> tuple[np.ndarray, np.ndarray] | None:
    """I ⊗ A [R, R], and C or its transpose as it multiplies from the right [c, c]; int8."""
    orders = split(n, platform)
    if orders is None:
        return None
    (a, c), rest = orders, hadamard.factor(n)[1]
    dense = np.kron(hadamard.hadamard_matrix(c // rest), hadamard.hadamard_matrix(rest))
    if platform == "cuda":  # Triton: powers of two, 16 at least
        dense = np.pad(dense, (0, (1 << max(c - 1, 15).bit_length()) - c))
    copies = max(1, (128 if platform == "tpu" else 16) // a)
    return np.kron(np.eye(copies, dtype=np.int8), hadamard.hadamard_matrix(a)), dense if inverse else dense.T


def _too_large(left: np.ndarray, right: np.ndarray, itemsize: int, platform: str) -> bool:
    """Whether the tile and both matrices are too much for the shared memory and the registers of a GPU."""
    return platform == "cuda" and itemsize * (left.size + right.size + len(left) * len(right)) > 96 << 10


@partial(jax.jit, static_argnames=("inverse", "platform", "interpret"))
def pallas(x, *, inverse: bool = False, platform: str = "tpu", interpret: bool = False):
    """``transform`` by the kernel for a platform, "tpu" or "cuda"."""
    n, dtype = x.shape[-1], x.dtype
    left, right = _matrices(n, inverse, platform)
    if _too_large(left, right, dtype.itemsize, platform):
        return reference(x, inverse)
    (a, c), rows, wide = split(n, platform), len(left), len(right)
    if platform == "tpu" and dtype == jnp.float16:  # a TPU has bfloat16 only
        x = x.astype(jnp.float32)
    tiles = x.reshape(-1, c)
    tiles = jnp.pad(tiles, ((0, -len(tiles) % rows), (0, wide - c)))
    zero = np.int32(0)
    whole = lambda size: pl.BlockSpec((size, size), lambda i: (zero, zero))
    tile = pl.BlockSpec((rows, wide), lambda i: (i, zero))
    y = pl.pallas_call(
        partial(_kernel, order=(a, c), precision=precision(x.dtype, platform, interpret)),
        grid=(len(tiles) // rows,), in_specs=[tile, whole(rows), whole(wide)], out_specs=tile,
        out_shape=jax.ShapeDtypeStruct(tiles.shape, x.dtype),
        compiler_params=compiler_params(platform, warps=8), interpret=interpret)(
            tiles, jnp.asarray(left, x.dtype), jnp.asarray(right, x.dtype))
    return y[:, :c].reshape(-1)[:x.size].reshape(x.shape).astype(dtype)


def _kernel(x, left, right, y, *, order, precision):
    dot = partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)
    half = (dot(x[...], right[...]) * order[1] ** -0.5).astype(x.dtype)  # scaled here: float16 must not overflow
    y[...] = (dot(left[...], half) * order[0] ** -0.5).astype(x.dtype)
