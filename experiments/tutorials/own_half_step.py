"""Tutorial 3 of 4: replace a half step of the algorithm, and draw the difference.

1. Write two half steps that are blind to H: L R by a plain SVD, and Q by nearest rounding.
2. Factor H once and call ``cj.caldera``, the bare algorithm, which takes half steps as arguments.
3. Run the paper's algorithm and each replacement from the same W, H and key.
4. Draw the errors after every half step, and print how much the blind ones lose.

    python experiments/tutorials/own_half_step.py [picture.png]
"""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import caldera_jax as cj
from caldera_jax import hessian, incoherence
from caldera_jax.codebooks import quantize
from caldera_jax.lplr import LowRank


# A half step has the signature of ``decompose.factorize_step`` or ``decompose.quantize_step``.  ``target`` is what the
# other part leaves: W − Q here.  Ours need none of target_h = (W − Q) H, the L R before, and the factors of H.
def svd_blind_to_h(key, target, target_h, low_rank, factors, config):
    """(L, R) ← the k largest singular directions of W − Q, rounded.  Lemma 4.2 takes those of (W − Q) H^½."""
    u, s, v = jnp.linalg.svd(target, full_matrices=False)
    k, (left, right) = config.rank, config.factor_grids
    root = jnp.sqrt(s[:k, None])
    return LowRank(quantize(left, root * u[:, :k].T), quantize(right, root * v[:k]))


def nearest_rounding(key, target, low_rank, factors, config):
    """Q ← each block of W − L R to the nearest point of the grid.  LDLQ feeds errors back to columns yet to come."""
    return quantize(config.q_grid, target)


# What compress_matrix does before it packs.  It has no arguments for half steps, and cj.caldera has.
@partial(jax.jit, static_argnames=("config", "quantize_step", "factorize_step"))
@jax.default_matmul_precision("highest")
def errors(key, w, h, config, **half_steps):
    """The error after every half step: L R, Q, L R, Q, …"""
    w, h, _ = incoherence.rotate(jax.random.fold_in(key, 0), w, h)
    factors = hessian.factor(h, config.damping, config.block)  # normalised, damped, Cholesky and block LDL
    return cj.caldera(key, w, factors, config, **half_steps)[1].error


def main(size=256, bits=(16, 4), picture="out/own_half_step.png"):
    """Returns {bits of L and R: {name: errors}}."""
    # Some inputs are far stronger than others: there is something to lose by not looking at H.
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(size, size)), rng.normal(size=(4 * size, size)) / np.arange(1, size + 1) ** 0.75
    h = x.T @ x / len(x)
    runs = {"as in the paper": {}, "L R blind to H": {"factorize_step": svd_blind_to_h},
            "Q blind to H": {"quantize_step": nearest_rounding}}

    # With 16-bit factors it shows how L R is chosen.  With 4 bits its rounding shows, too, and can weigh more.
    found = {}
    for b in bits:
        config = cj.CalderaConfig(rank=size // 16, factor_bits=b, outer_iterations=6)
        found[b] = {name: np.asarray(errors(jax.random.key(1), w, h, config, **steps)) for name, steps in runs.items()}
        least = {name: float(trace[1:].min()) for name, trace in found[b].items()}  # once Q and L R are both there
        for name, value in least.items():
            ratio = value / least["as in the paper"]
            print(f"{b:2}-bit L and R, {name:15}  error {value:.4f}, {ratio:.3f} of the paper's")
    draw(found, picture)
    return found


def draw(found, picture):
    """From the first Q on; the error of L R alone would set the scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for panel, (b, runs) in zip(panels, found.items(), strict=True):
        for name, trace in runs.items():
            panel.plot(range(2, len(trace) + 1), trace[1:], "o-", markersize=3, linewidth=1, label=name)
        panel.set(title=f"{b}-bit L and R", xlabel="half step (odd: L R, even: Q)", ylim=(0, None))
    panels[0].set_ylabel("‖(Q + L R − W) Xᵀ‖ / ‖W Xᵀ‖")
    panels[-1].legend(loc="lower left", fontsize=8)
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)
    print(f"drawn: {picture}")


if __name__ == "__main__":
    main(picture=sys.argv[1] if len(sys.argv) > 1 else "out/own_half_step.png")
