"""y = x Zᵀ for a matrix of bytes and x in single precision, by products of integers.

A row of x is s (x₁ + x₂ / 254 + x₃ / 254²) with three digits in −127 … 127 and s = max |x| / 127, off by at most
2⁻²⁴ max |x| an entry; the sums of integers are exact, so that y is as close as a product in single precision.  On a CPU
a product of bytes reads a quarter of what one in single precision does, and three rows cost less than that spares.
(XLA's product of bytes with one row alone is slow: there are always three.)
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8

DIGITS = 3
ROWS = 256  # of x at a time: what is between the integers and y stays in the cache


def multiply(x: Float[Array, "b n"], z: Int8[Array, "m n"]) -> Float[Array, "b m"]:
    """x Zᵀ in float32.  n must stay below 2³¹ / (127 · 128), 132,104.  No gradient passes the digits: it would be zero.
    """
    x = x.astype(jnp.float32)
    if len(x) <= ROWS:
        return _multiply(x, z)
    tiles = jnp.pad(x, ((0, -len(x) % ROWS), (0, 0))).reshape(-1, ROWS, x.shape[1])
    return lax.map(lambda rows: _multiply(rows, z), tiles).reshape(-1, len(z))[:len(x)]


def digits(x: Float[Array, "b n"]) -> tuple[Int8[Array, "d b n"], Float[Array, "b 1"]]:
    """The digits of every entry, the highest first, and s of every row."""
    top = jnp.max(jnp.abs(x), axis=1, keepdims=True)
    rest = x * (127 / jnp.where(top > 0, top, 1))
    found = []
    for _ in range(DIGITS):
        found.append(jnp.round(rest))
        rest = (rest - found[-1]) * 254
    return jnp.stack(found).astype(jnp.int8), top / 127


def _multiply(x, z):
    of_x, size = digits(x)
    rows = of_x.reshape(-1, x.shape[1])
    y = lax.dot_general(rows, z, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    first, second, third = y.astype(x.dtype).reshape(DIGITS, len(x), len(z))
    return (first + (second + third / 254) / 254) * size
