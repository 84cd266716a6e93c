"""Tutorial 1 of 4: compress one matrix, W ≈ Q + L R, and read what happened.

1. Make a weight W [m, n] whose spectrum decays, inputs X (rows are tokens), and H = XᵀX / tokens.
2. Compress W; see the error after every half step, and which half step was kept.
3. Check the result: its size, its error measured again, and its product with x.
4. Spend as many bits on Q alone, and compare.

    python experiments/tutorials/one_matrix.py
"""

from dataclasses import replace

import jax
import numpy as np
from scipy.fft import dct

import caldera_jax as cj


def make(size):
    """W [size, 3 size] and 4 tokens an input; the variance of both decays along the directions of a cosine basis."""
    n, rng = 3 * size, np.random.default_rng(0)
    rows = lambda count, power: dct(rng.normal(size=(count, n)) / (1 + rng.permutation(n)) ** power, norm="ortho")
    return rows(size, 1 / 2), rows(4 * n, 1 / 3)


def main(size=256, quantizer="e8p", factor_bits=4):
    """Returns W, H, the compressed weight, its trace, and Q alone with its own trace."""
    # The method needs the inputs only through their second moment, in any units: errors are relative.  Arrays may be
    # NumPy's or JAX's.
    w, x = make(size)
    h = x.T @ x / len(x)
    m, n = w.shape

    # Q has 2 bits a weight.  L and R have k (m + n) numbers: this k makes them 1 bit a weight.
    rank = m * n // (factor_bits * (m + n))
    config = cj.CalderaConfig(rank=rank, quantizer=quantizer, factor_bits=factor_bits, outer_iterations=8)
    print(f"W is {m} x {n}, L R of rank {rank} with {factor_bits} bits, "
          f"{config.outer_iterations} rounds of two half steps")

    # This rotates W and H, alternates L R ← LPLRFactorize(W − Q) and Q ← LDLQ(W − L R), and packs the best.  The key
    # draws the signs of the rotation.
    compressed, trace = cj.compress_matrix(jax.random.key(0), w, h, config)
    trace = jax.device_get(trace)

    # trace.error is ‖(Q + LR − W) Xᵀ‖ / ‖W Xᵀ‖ after each half step.  It need not fall: Q also repairs the rounding of
    # the L R before it, and the next L R rounds anew.  All steps run and the best is kept.  The first has no Q yet and
    # does not count.
    kept = 1 + int(trace.error[1:].argmin())
    print("\nround   half step   error    ‖Q X‖    ‖L R X‖   (over ‖W X‖)")
    for i, (error, q, lr) in enumerate(zip(trace.error, trace.q_share, trace.lr_share, strict=True)):
        name = ("L R", "Q")[i % 2]
        print(f"{1 + i // 2:5}   {name:9}   {error:.4f}   {q:.4f}   {lr:.4f}{'    <- kept' if i == kept else ''}")

    # What is stored is codes, a few scales, and a sign bit for every row and column.  stored_bits counts all of it.
    print(f"\nstored: {compressed.stored_bits / w.size:.4f} bits a weight")

    # The trace was measured in the rotated basis and before packing.  Here is the same error from the packed codes, in
    # the basis and the units of W.  A layer is a pytree, so it goes through jit.
    dense = jax.jit(cj.CompressedLinear.dense)(compressed)
    print(f"error of dense(): {cj.relative_error(w, dense, h):.6f}; in the trace: {trace.error[kept]:.6f}")

    # A layer is applied as it is stored: x is rotated, multiplied by Q and by R and L, and rotated back.
    y, wanted = jax.jit(cj.apply)(compressed, x[:5]), x[:5] @ np.asarray(dense).T
    print(f"apply(x) against x @ dense().T: largest difference {np.abs(y - wanted).max() / np.abs(wanted).max():.1e}")

    # Are the bits of L R well spent?  The same number buys a third bit for Q.  W decides: try a flat spectrum in make.
    alone, its_trace = cj.compress_matrix(jax.random.key(0), w, h, replace(config, rank=0, q_bits=3))
    print("\n                   bits a weight   error")
    for name, layer, error in (("2-bit Q and L R", compressed, trace.error[kept]),
                               ("3-bit Q alone", alone, its_trace.error.min())):
        print(f"{name:18} {layer.stored_bits / w.size:13.4f}   {error:.4f}")
    return w, h, compressed, trace, alone, its_trace


if __name__ == "__main__":
    main()
