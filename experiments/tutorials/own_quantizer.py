"""Tutorial 2 of 4: put a quantizer of your own in the place of Q's.

1. Write a codebook: Lloyd and Max's levels, the best of a scalar grid for Gaussian numbers.
2. Pass it as ``quantizer=``, and compare it with the package's grids of as many bits.
3. Pass it as ``factor_quantizer=``, too, for L and R.
4. See that what is packed are its codes, and what comes back are its levels.

    python experiments/tutorials/own_quantizer.py
"""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import norm

import caldera_jax as cj
from caldera_jax.codebooks import rounding_error


@cache
def lloyd_max(bits):
    """Levels for N(0, 1) by Lloyd's iteration: edges midway between levels, each level the mean between its edges."""
    levels = norm.ppf((np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(1000):
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        levels = -np.diff(norm.pdf(edges)) / np.diff(norm.cdf(edges))
    return levels


# A codebook has the seven members of cj.Codebook; CalderaConfig refuses what lacks one.  It is hashable, as a frozen
# dataclass is, since it becomes a static argument of a compiled program.  It needs no base class.
@dataclass(frozen=True)
class LloydMax:
    code_bits: int = 2  # of the code of one block; this many are packed
    block = 1  # weights that are rounded together: 1 for a scalar grid, 8 for the E8 lattice
    group = None  # one scale a matrix; 64 would be one for every 64 weights of a row, and cost its bits

    def scale(self, x, real):  # what weights are divided by, from all that share it; real is False where x is padding
        return jnp.sqrt(jnp.mean(x**2, axis=-1, where=real))

    def encode(self, x, key=None):  # weights over their scale -> unsigned codes; the key is for random rounding
        levels = lloyd_max(self.code_bits)
        return jnp.searchsorted(jnp.asarray((levels[1:] + levels[:-1]) / 2, x.dtype), x).astype(jnp.uint8)

    def decode(self, codes, dtype=jnp.float32):
        return jnp.asarray(lloyd_max(self.code_bits), dtype)[codes.astype(jnp.int32)]

    def round(self, x, key=None):  # both, from one search
        codes = self.encode(x)
        return self.decode(codes, x.dtype), codes


def main(size=256):
    """Returns W, H, the errors by name, the weight compressed with that grid, and its trace."""
    # Q rounds W after the rotation, which makes the entries of any W nearly Gaussian: a grid that is good for Gaussian
    # numbers is good for Q.  Here W itself has heavy tails, and inputs of unequal size give LDLQ something to use.
    rng = np.random.default_rng(0)
    w = rng.normal(size=(size, size)) ** 3
    x = rng.normal(size=(4 * size, size)) / np.sqrt(np.arange(1, size + 1))
    h = x.T @ x / len(x)

    # Q alone (rank 0) on three grids of 2 bits: ours, four equal steps that end at 1.5 standard deviations, and E8P, a
    # lattice that rounds eight weights at once.  LDLQ feeds the errors of any grid back: what is left should grow as
    # the root of the grid's own mean squared error.
    errors, grids = {}, {"LloydMax(2)": LloydMax(2), "Uniform(2)": cj.Uniform(2, clip=1.5), "E8P()": cj.E8P()}
    print("grid of Q     bits a weight   mean squared error on N(0, 1)    error   over its root")
    for name, grid in grids.items():
        layer, trace = cj.compress_matrix(jax.random.key(0), w, h, cj.CalderaConfig(rank=0, quantizer=grid))
        errors[name], alone = float(trace.error[0]), rounding_error(grid)
        bits, ratio = layer.stored_bits / w.size, errors[name] / alone**0.5
        print(f"{name:12} {bits:14.4f} {alone:31.4f}   {errors[name]:.4f} {ratio:15.4f}")

    # Q with 2 bits, L and R with 4, on our grid.  (Files name the package's grids alone: this layer stays in memory.)
    config = cj.CalderaConfig(rank=size // 16, quantizer=LloydMax(2), factor_quantizer=LloydMax(4), outer_iterations=4)
    compressed, trace = cj.compress_matrix(jax.random.key(0), w, h, config)
    q, _, _ = jax.jit(cj.CompressedLinear.rotated)(compressed)  # Q, L and R as they decode, in the rotated basis
    bits, q_bits = compressed.stored_bits / w.size, 8 * compressed.q.codes.nbytes / w.size
    print(f"\nwith L R: {bits:.4f} bits a weight, {q_bits:.4f} of them codes of Q")
    print("levels of the grid:", *(f"{level:.4f}" for level in lloyd_max(2)))
    print("values of Q / scale:", *(f"{value:.4f}" for value in np.unique(q / compressed.q.scale)))
    again = cj.relative_error(w, jax.jit(cj.CompressedLinear.dense)(compressed), h)
    print(f"error of dense(): {again:.6f}; in the trace: {trace.error[1:].min():.6f}")
    return w, h, errors, compressed, trace


if __name__ == "__main__":
    main()
