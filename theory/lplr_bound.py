"""A Gaussian sketch of p columns costs at most 1 + k/(p − k − 1) times the best rank k, for every k <= p − 2 at once.

Statement.  LPLR (arXiv 2310.11028, Algorithm 1): L = A G rounded, G Gaussian [n, p]; R = L⁺A rounded.  Its Theorem 3.2
(known here second hand) reads

    E‖LR − A‖²_F <= (1 + k/(p − k − 1)) ‖A_k − A‖²_F + ε.

LR has rank p.  The theorem holds for each k, so its right side may be minimised over 0 <= k <= p − 2: the envelope.
For unrounded factors ε = 0: Theorem 10.5 of Halko, Martinsson, Tropp (arXiv 0909.4061).  Derived here, for dithered
factors of steps Δ_L (of A G) and Δ_R (of L̂⁺A), with no term left out:  ε = E[ m Δ_L²/4 ‖(AG)⁺A‖²_F + n Δ_R²/4 ‖L̂‖²_F ].
For σ₁..σ_k -> ∞ before a flat tail of n − k ones the sketch costs exactly (1 + k/(p − k − 1)) (n − p).

Assumptions.  G Gaussian.  For ε: unbiased rounding, independent entries, variance <= Δ²/4; its Δ are the realised ones.

Proof.  Unrounded LR = P A, P the projection on the range of A G.  With G₁ = V_kᵀ G, G₂ the rest, the range holds
U [I; F], F = Σ₂ G₂ G₁⁺ Σ₁⁻¹, so ‖A − PA‖² <= ‖Σ₂‖² + ‖Σ₂ G₂ G₁⁺‖², of mean ‖Σ₂‖² E‖G₁⁺‖² = ‖Σ₂‖² k/(p − k − 1).
  Rounding L: the best R for L̂ is no worse than L⁺A, and A − L̂L⁺A = (A − PA) − δL L⁺A: the cross term is 0 on
average.  Rounding R: A − L̂(R + δR), likewise, an equality.  (The mean over G exists from p = k + 2 on, the variance
from p = k + 4.)
  Spikes: in the limit the range is U [I; F] and p − k directions wholly in the tail; they take p − k of its n − k
units, and the same share of ‖F Σ₁‖².

Verdict: true and, without more on the spectrum, sharp: spikes meet it up to (n − p)/(n − k).  Dropping k/(p − k − 1)
fails.  On a flat spectrum the sketch costs n − p, as the SVD, and the envelope is n, at k = 0.  On geometric and power
spectra it costs 0.31 to 0.64 of the envelope, and 1.5 to 16 times the SVD of the same rank p; k = p/2 − 1 in the
bound, in place of the best k, loosens it up to 58 times.
  ε of dithered factors is 0.56 of the formula at 8 bits, 0.10 to 0.21 at 2 (nearest: 0.26 to 0.32, 0.06 to 0.12): fine
grids have Δ²/6 and Δ²/12 in place of Δ²/4, and the fit of R mends some of L.
  Against intuition, at 4 bits (e8p, power, H = I, p = 16) the rounded sketch, 0.097 ‖A‖², beats the package's rounded
closed form without further iterations, 0.142: its factors are isotropic, while one scale clips the large rows of
R = LᵀA.  From three iterations on the package is ahead: 0.052, and 0.035 after 30; the SVD has 0.028.
"""

from dataclasses import dataclass
from functools import partial

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import matrix

from caldera_jax import hessian
from caldera_jax.codebooks import by_bits, quantize
from caldera_jax.lplr import lplr_factorize
from caldera_jax.objective import proxy_loss
from caldera_jax.regression import rank_constrained


@dataclass(frozen=True)
class Config:
    """Sizes of the sweeps; A = an orthogonal matrix times common.hessian(kind), [m, n]."""

    m: int = 96
    n: int = 64
    spectra: tuple[str, ...] = ("flat", "geometric", "power", "spiked", "deficient")
    columns: tuple[int, ...] = (3, 4, 6, 8, 12, 16, 24, 32, 48)
    draws: int = 200
    rounded_columns: int = 16
    bits: tuple[int, ...] = (2, 3, 4, 6, 8)
    iterations: tuple[int, ...] = (0, 1, 3, 10, 30)
    refined_bits: tuple[int, ...] = (4, 3, 2)
    seed: int = 0


lplr_factorize = jax.jit(lplr_factorize, static_argnums=(3, 4, 5, 6))
rank_constrained = jax.jit(rank_constrained, static_argnums=2)


def bound(sigma: np.ndarray, columns: int, rank: int) -> float:
    """(1 + k/(p − k − 1)) Σ_{i>k} σᵢ²."""
    return float((1 + rank / (columns - rank - 1)) * np.sum(sigma[rank:] ** 2))


def envelope(sigma: np.ndarray, columns: int) -> tuple[float, int]:
    """The least of the bounds over k <= p − 2, and its k."""
    return min((bound(sigma, columns, k), k) for k in range(columns - 1))


def sketch(key, a, columns: int, left_grid=None, right_grid=None):
    """LPLR, and the two sums that ε is made of: loss, ‖(AG)⁺A‖²_F · scale_L², ‖L̂‖²_F · scale_R²."""
    draw, left_key, right_key = jax.random.split(key, 3)
    left = a @ jax.random.normal(draw, (a.shape[1], columns), a.dtype)
    right = jnp.linalg.lstsq(left, a)[0]
    if left_grid is None:
        return jnp.stack([jnp.sum((left @ right - a) ** 2), jnp.sum(right**2), jnp.sum(left**2)])
    rounded = quantize(left_grid, left.T, left_key)
    fit = quantize(right_grid, jnp.linalg.lstsq(rounded.values.T, a)[0], right_key)
    return jnp.stack([jnp.sum((rounded.values.T @ fit.values - a) ** 2),
                      jnp.sum(right**2) * rounded.scale[0, 0] ** 2, jnp.sum(rounded.values**2) * fit.scale[0, 0] ** 2])


@partial(jax.jit, static_argnums=(2, 3, 4))
def _sketches(keys, a, columns, left_grid, right_grid):
    return jax.lax.map(lambda key: sketch(key, a, columns, left_grid, right_grid), keys)


def sketches(a, columns: int, draws: int, left_grid=None, right_grid=None, seed: int = 0) -> np.ndarray:
    """``sketch`` for many keys: [draws, 3]."""
    keys = jax.random.split(jax.random.key(seed), draws)
    return np.asarray(_sketches(keys, jnp.asarray(a), columns, left_grid, right_grid))


def epsilon(shape, bits: int, left_sum, right_sum, share: float = 1 / 4):
    """m Δ_L² ‖L⁺A‖² + n Δ_R² ‖L̂‖², times 1/4 for dithered rounding; Δ = 2 scale / (2^B − 1)."""
    return share * (2 / (2**bits - 1)) ** 2 * (shape[0] * left_sum + shape[1] * right_sum)


def refined(a, factors, columns, bits, iterations) -> float:
    """Loss of the package's quantized factors beyond Σ_{i>p} σᵢ², over it."""
    grid = by_bits("e8p", bits)
    found = lplr_factorize(jax.random.key(0), jnp.asarray(a), factors, columns, grid, grid, iterations)
    h = factors.root @ factors.root.T
    best = rank_constrained(jnp.asarray(a), factors.root, columns)
    return float(proxy_loss(found.dense() - a, h) / proxy_loss(best.left @ best.right - a, h)) - 1


def measure(config: Config) -> dict:
    """The bound over spectra and p; ε over bits; the package's alternation."""
    m, n, p = config.m, config.n, config.rounded_columns
    plain, rounded, iterated = [], [], []
    for kind in config.spectra:
        a = matrix(kind, m, n, config.seed)
        sigma = np.linalg.svd(a, compute_uv=False)
        for columns in config.columns:
            losses = sketches(a, columns, config.draws, seed=config.seed)[:, 0] / np.sum(sigma**2)
            least, k = envelope(sigma, columns)
            plain.append({"spectrum": kind, "columns": columns, "loss": losses.mean(),
                          "standard_error": losses.std(ddof=1) / np.sqrt(len(losses)), "best_k": k,
                          "envelope": least / np.sum(sigma**2), "half": bound(sigma, columns, columns // 2 - 1)
                          / np.sum(sigma**2), "svd": float(np.sum(sigma[columns:] ** 2) / np.sum(sigma**2))})
    for kind in ("geometric", "power"):
        a = matrix(kind, m, n, config.seed)
        exact = sketches(a, p, 40, seed=config.seed)[:, 0]
        for family in ("dithered", "uniform", "e8p"):
            for bits in (b for b in config.bits if family != "e8p" or b in (2, 3, 4)):
                grid = by_bits(family, bits)
                losses, left, right = sketches(a, p, 40, grid, grid, seed=config.seed).T
                row = {"spectrum": kind, "family": family, "bits": bits, "energy": float(np.sum(a**2)),
                       "epsilon": float(np.mean(losses - exact)), "tail": float(exact.mean())}
                formula = float(np.mean(epsilon(a.shape, bits, left, right)))
                rounded.append(row | {"formula": None if family == "e8p" else formula})  # the lattice has no step
    for norm in ("flat", "power"):
        for kind in ("geometric", "power"):
            a = matrix(kind, m, n, config.seed)
            factors = hessian.factor(jnp.asarray(common.hessian(norm, n, config.seed + 5)), 0.0)
            for bits in config.refined_bits:
                iterated.append({"h": norm, "spectrum": kind, "bits": bits, "excess": [
                    refined(a, factors, p, bits, t) for t in config.iterations]})
    return {"sketch": plain, "rounded": rounded, "iterated": iterated}


def draw(result: dict):
    """Error over p, ε over bits, and error over iterations."""
    figure, (first, second, third) = common.axes(3)
    config = result["config"]
    for color, kind in zip(("C0", "C1", "C2"), ("geometric", "power", "spiked"), strict=True):
        rows = [r for r in result["sketch"] if r["spectrum"] == kind]
        p = [r["columns"] for r in rows]
        first.semilogy(p, [r["loss"] for r in rows], "o", color=color, label=kind)
        first.semilogy(p, [r["envelope"] for r in rows], color=color, label="envelope")
        first.semilogy(p, [r["svd"] for r in rows], color=color, linestyle=":", label="SVD")
    first.set(xlabel="columns p", ylabel="‖LR − A‖² / ‖A‖²", title=f"{config['m']} x {config['n']}, unrounded",
              ylim=(2e-7, 3e2))
    first.legend(ncols=3, loc="upper right")
    rows = [r for r in result["rounded"] if r["spectrum"] == "power"]
    for color, family in zip(("C0", "C1", "C2"), ("dithered", "uniform", "e8p"), strict=True):
        points = [(r["bits"], r["epsilon"] / r["energy"]) for r in rows if r["family"] == family]
        second.semilogy(*zip(*points, strict=True), "o", color=color, label=f"{family}: ε measured")
    formula = [(r["bits"], r["formula"] / r["energy"]) for r in rows if r["family"] == "dithered"]
    second.semilogy(*zip(*formula, strict=True), color="C0", label="ε: formula, dithered")
    second.axhline(rows[0]["tail"] / rows[0]["energy"], color="0.5", label="the sketch, unrounded")
    second.set(xlabel="bits of both factors", ylabel="ε / ‖A‖²",
               title=f"power spectrum, p = {config['rounded_columns']}")
    second.legend()
    for color, bits in zip(("C0", "C1", "C2"), config["refined_bits"], strict=True):
        for norm, style in (("flat", "--"), ("power", "-")):
            row = next(r for r in result["iterated"]
                       if (r["h"], r["spectrum"], r["bits"]) == (norm, "power", bits))
            third.semilogy(config["iterations"], row["excess"], style, marker=".", color=color,
                           label=f"{bits} bits, {'H = I' if norm == 'flat' else 'H power'}")
    third.set(xlabel="iterations", ylabel="loss / Σ_{i>p} σᵢ² − 1", xscale="symlog", xlim=(-0.1, 40),
              ylim=(0.1, 2000), title=f"lplr_factorize, e8p, power A, rank {config['rounded_columns']}")
    third.legend(ncols=2, loc="upper right")
    return figure


@pytest.mark.parametrize("kind", common.SPECTRA)
def test_the_bound_holds_for_every_k_at_once(kind):
    a = matrix(kind, 24, 16)
    sigma = np.linalg.svd(a, compute_uv=False)
    for columns in (3, 10):
        losses = sketches(a, columns, 150)[:, 0]
        error = 5 * losses.std(ddof=1) / np.sqrt(len(losses)) + 1e-12 * sigma[0] ** 2  # CLT, and rounding
        for k in range(columns - 1):
            assert losses.mean() <= bound(sigma, columns, k) + error
        best = rank_constrained(jnp.asarray(a), hessian.identity(16, dtype=jnp.float64).root, columns)
        optimum = float(jnp.sum((best.left @ best.right - a) ** 2))
        np.testing.assert_allclose(optimum, np.sum(sigma[columns:] ** 2), atol=1e-13 * sigma[0] ** 2 * 16)
        assert losses.min() >= optimum - 1e-12 * sigma[0] ** 2
        if kind == "flat":  # any p directions are the best ones: n − p, against an envelope of n, at k = 0
            np.testing.assert_allclose(losses, 16 - columns, rtol=1e-12)
            assert envelope(sigma, columns) == (pytest.approx(16), 0)


def test_spikes_before_a_flat_tail_meet_the_bound_and_refute_one_without_its_second_term():
    n, k, p = 60, 4, 9  # p − k > 3: the variance exists
    sigma = np.where(np.arange(n) < k, 1e4, 1.0)
    losses = sketches(np.diag(sigma), p, 400)[:, 0]
    error = 5 * losses.std(ddof=1) / np.sqrt(len(losses))
    assert abs(losses.mean() - (n - p) * (1 + k / (p - k - 1))) <= error + 1e-6 * n  # and O(σ₁⁻²)
    assert losses.mean() <= bound(sigma, p, k) + error and envelope(sigma, p)[1] == k
    assert losses.mean() > np.sum(sigma[k:] ** 2) + error  # the negative control
    assert losses.mean() > (1 + k / (p - 1)) * np.sum(sigma[k:] ** 2) + error  # nor is p what counts


@pytest.mark.parametrize("kind", ["geometric", "power", "flat"])
def test_with_dithered_factors_epsilon_is_the_variance_of_both(kind):
    a, draws = matrix(kind, 24, 16), 150
    sigma = np.linalg.svd(a, compute_uv=False)
    exact, measured = sketches(a, 8, draws)[:, 0], {}
    for bits in (3, 8):
        grid = by_bits("dithered", bits)
        losses, left, right = sketches(a, 8, draws, grid, grid).T
        over = (losses - exact) - epsilon(a.shape, bits, left, right)
        error = 5 * over.std(ddof=1) / np.sqrt(draws)
        assert over.mean() <= error
        measured[bits] = np.mean(losses - exact) / np.mean(epsilon(a.shape, bits, left, right))
        allowed = envelope(sigma, 8)[0] + np.mean(epsilon(a.shape, bits, left, right))
        assert losses.mean() <= allowed + 5 * losses.std(ddof=1) / np.sqrt(draws)
    assert 1 / 6 < measured[8] < 1  # fine grids: Δ²/6, a position between two levels being uniform; L less what R mends
    if kind == "flat":  # the variance of rounding to nearest, Δ²/12, is too little
        over = (losses - exact) - epsilon(a.shape, 8, left, right, share=1 / 12)
        assert over.mean() > 5 * over.std(ddof=1) / np.sqrt(draws)


def test_the_packages_alternation_beats_the_rounded_sketch_and_its_clipped_start_does_not():
    factors, a = hessian.identity(64, dtype=jnp.float64), matrix("power", 96, 64)
    grid, tail = by_bits("e8p", 4), np.sum(np.linalg.svd(a, compute_uv=False)[16:] ** 2)
    sketched = sketches(a, 16, 10, grid, grid)[:, 0]
    error = 5 * sketched.std(ddof=1) / np.sqrt(10)
    start, end = (tail * (1 + refined(a, factors, 16, 4, t)) for t in (0, 10))
    assert tail < end < sketched.mean() - error
    assert start > sketched.mean() + error


if __name__ == "__main__":
    common.run(__file__, Config(), measure, draw)
