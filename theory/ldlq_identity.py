"""LDLQ, GPTQ and Babai's nearest plane are one algorithm, and its loss is its rounding errors weighted by D.

Statement.  Let H = L blockdiag(D) Lᵀ be positive definite, L unit block lower triangular (blocks of g columns), and
round columns last to first, each at W_j + Σ_{i>j} (W − Q)_i L_ij.  For *any* rounding, with η_j the error of rounding
block j and E = Q − W,

    E L = η   and   tr(E H Eᵀ) = Σ_j tr(η_j D_j η_jᵀ),   for g = 1:  Σ_j D_j ‖η_j‖².

For g = 1 and rounding to the nearest point of a grid that does not depend on the column, Q is that of
* GPTQ (arXiv 2210.17323) run on the columns in reversed order, and
* Babai's nearest plane algorithm on the lattice with basis H^½ (Theorem in arXiv 2507.18553, back to front),
so that on the integers, where |η| <= ½, both inherit Babai's bound tr(E H Eᵀ) <= (m/4) tr D.

Assumptions.  H positive definite (the package damps it); no ties in rounding, for the equalities of codes.  QuIP
(arXiv 2307.13304) writes H = (U + I) D (U + I)ᵀ with U strictly upper triangular: the same after reversing columns.

Proof.  Q_j = W_j + Σ_{i>j} (W − Q)_i L_ij + η_j says Σ_{i>=j} E_i L_ij = η_j: that is E L = η.  Then tr(E H Eᵀ) =
tr(E L D Lᵀ Eᵀ) = tr(η D ηᵀ).  Nearest plane: with H = root rootᵀ, the rows of L are the Gram–Schmidt coefficients of
the basis vectors (rows of root), and D_j = ‖b*_j‖², so its j-th projection coefficient is W_j plus the fed back errors.
  GPTQ updates the columns that are left by err · (H⁻¹)_{j,rest} / (H⁻¹)_jj, which by the inverse of a
Cholesky factor is the same feedback, applied as soon as an error is known in place of when a column is rounded.

Verdict: exact.  An identity for every quantizer, clipped, lattice or random; only Babai's bound needs the full grid.
"""

from dataclasses import dataclass
from functools import partial

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caldera_jax import E8P, CalderaConfig, NormalFloat, Uniform, hessian
from caldera_jax.codebooks import Codebook
from caldera_jax.ldlq import block_ldlq, ldlq, sweep
from caldera_jax.objective import feedback_trace, proxy_loss


@dataclass(frozen=True)
class Config:
    """Sizes of the sweep."""

    m: int = 96
    n: int = 128
    spectra: tuple[str, ...] = common.SPECTRA
    blocks: tuple[int, ...] = (1, 8)
    damping: float = 1e-6
    seed: int = 0


block_ldlq, ldlq = jax.jit(block_ldlq, static_argnums=(2, 3)), jax.jit(ldlq, static_argnums=1)


def integers(target, start):
    """Rounding to the integers, the grid of QuIP's Theorem 1; the codes are of no use here."""
    return jnp.round(target), jnp.zeros((len(target), 1), jnp.uint8)


@partial(jax.jit, static_argnums=3)
def identity(w, q, factors: hessian.HessianFactors, block: int):
    """Both sides of the identity: tr(E H Eᵀ) and Σ_j tr(η_j D_j η_jᵀ), and η = E L; H with its damping."""
    h = factors.root @ factors.root.T
    eta = (q - w) @ factors.lower
    weighted = sum(jnp.sum((eta[:, j:j + block] @ factors.root[j:j + block, j:j + block]) ** 2)
                   for j in range(0, w.shape[1], block))
    return proxy_loss(q - w, h), weighted, eta


def gptq(w: np.ndarray, h: np.ndarray) -> np.ndarray:
    """GPTQ on the integers, first column to last, every error sent at once to the columns that are left."""
    w, q = w.copy(), np.zeros_like(w)
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    for j in range(w.shape[1]):
        q[:, j] = np.rint(w[:, j])
        error = (w[:, j] - q[:, j]) / upper[j, j]
        w[:, j:] -= np.outer(error, upper[j, j:])
    return q


def nearest_plane(w: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Babai: the lattice point near w root, projecting on the Gram–Schmidt vectors of the rows of root = chol(H)."""
    basis, q = np.linalg.cholesky(h), np.zeros_like(w)
    orthogonal = basis.copy()
    for j in range(len(h)):  # Gram–Schmidt in the order 0, 1, …; planes are chosen from the last vector down
        for i in range(j):
            orthogonal[j] -= (orthogonal[j] @ orthogonal[i]) / (orthogonal[i] @ orthogonal[i]) * orthogonal[i]
    rest = w @ basis
    for j in reversed(range(len(h))):
        q[:, j] = np.rint(rest @ orthogonal[j] / (orthogonal[j] @ orthogonal[j]))
        rest -= np.outer(q[:, j], basis[j])
    return q


def measure(config: Config) -> dict:
    """Loss against the identity and Babai's bound, over spectra, weights and block sizes."""
    rows = []
    for kind in config.spectra:
        for name, make in common.WEIGHTS.items():
            for block in config.blocks:
                w = jnp.asarray(make(config.m, config.n, config.seed))
                w = w / jnp.sqrt(jnp.mean(w**2)) * 3
                factors = hessian.factor(jnp.asarray(common.hessian(kind, config.n)), config.damping, block)
                q, _ = block_ldlq(w, factors.lower, integers, block)
                loss, weighted, eta = identity(w, q, factors, block)
                h = factors.root @ factors.root.T
                rows.append({"spectrum": kind, "weights": name, "block": block, "loss": float(loss),
                             "weighted": float(weighted), "largest_error": float(jnp.abs(eta).max()),
                             "bound": config.m / 4 * feedback_trace(h) if block == 1 else None,
                             "plain_rounding": float(proxy_loss(jnp.round(w) - w, h))})
    return {"rows": rows}


def draw(result: dict):
    """Loss against identity and bound, one point an instance."""
    figure, axis = common.axes()
    rows = result["rows"]
    x = [r["weighted"] for r in rows]
    axis.loglog(x, [r["plain_rounding"] for r in rows], "x", color="0.6", label="rounding without feedback")
    axis.loglog(*zip(*((r["weighted"], r["bound"]) for r in rows if r["bound"]), strict=True), "_", color="C3",
                label="Babai's bound (m/4) tr D, g = 1")
    axis.loglog(x, [r["loss"] for r in rows], ".", color="C0", label="LDLQ")
    axis.loglog(sorted(x), sorted(x), color="C0", linewidth=0.5)
    axis.set(xlabel="Σ tr(η D ηᵀ)", ylabel="tr(E H Eᵀ)",
             title=f"{result['config']['m']} x {result['config']['n']}, integers, {len(rows)} instances")
    axis.legend()
    return figure


QUANTIZERS = (E8P(), NormalFloat(4, None), Uniform(2), Uniform(3, clip=1.5))


@pytest.mark.parametrize("codebook", QUANTIZERS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("kind", common.SPECTRA)
def test_the_loss_is_the_rounding_errors_weighted_by_d_and_each_block_is_at_its_nearest_point(kind, codebook: Codebook):
    for name, make in common.WEIGHTS.items():
        block = CalderaConfig(rank=0, quantizer=codebook).block
        w = jnp.asarray(make(24, 40))
        factors = hessian.factor(jnp.asarray(common.hessian(kind, 40)), 1e-4, block)
        q = ldlq(w, codebook, factors)
        loss, weighted, eta = identity(w, q.values, factors, block)
        np.testing.assert_allclose(loss, weighted, rtol=1e-9, err_msg=name)  # κ(H) ε = 1e6 · 1e-16, and sums
        again, _ = codebook.round((q.values - eta) / q.scale)  # so η is the error of *rounding*, not just any E L
        np.testing.assert_allclose(again * q.scale, q.values, atol=1e-9 * float(jnp.abs(w).max()))


@pytest.mark.parametrize("block", [1, 8])
def test_the_identity_needs_this_feedback(block):
    w, factors = jnp.asarray(common.gaussian(24, 40)), hessian.factor(
        jnp.asarray(common.hessian("geometric", 40)), 1e-4, block)
    eye = jnp.eye(40)
    for wrong in (0.9 * (factors.lower - eye) + eye, factors.lower.T, eye):
        q, _ = block_ldlq(w, wrong, integers, block)
        _, _, eta = identity(w, q, factors, block)
        assert not np.allclose(jnp.round(q - eta), q)
    q, _ = block_ldlq(w, factors.lower, integers, block)
    loss, _, _ = identity(w, q, factors, block)
    slab = sweep(w, w, factors.lower, integers, block, 8, triangular=True)[0]
    np.testing.assert_array_equal(slab, q)
    np.testing.assert_allclose(proxy_loss(slab - w, factors.root @ factors.root.T), loss)


@pytest.mark.parametrize("kind", common.SPECTRA)
@pytest.mark.parametrize("name", common.WEIGHTS)
def test_ldlq_is_gptq_from_the_last_column_and_babais_nearest_plane(kind, name):
    w = 3 * common.WEIGHTS[name](16, 24)
    factors = hessian.factor(jnp.asarray(common.hessian(kind, 24)), 1e-3)
    h = np.asarray(factors.root @ factors.root.T)
    q, _ = block_ldlq(jnp.asarray(w), factors.lower, integers, 1)
    np.testing.assert_array_equal(gptq(w[:, ::-1], h[::-1, ::-1])[:, ::-1], q)
    np.testing.assert_array_equal(nearest_plane(w, h), q)
    if kind not in ("flat", "deficient"):  # on H = I order does not matter
        assert not np.array_equal(gptq(w, h), q)


@pytest.mark.parametrize("kind", common.SPECTRA)
def test_babais_bound_holds_and_is_met_by_the_deepest_holes(kind):
    factors = hessian.factor(jnp.asarray(common.hessian(kind, 24)), 1e-4)
    h = factors.root @ factors.root.T
    bound = 20 / 4 * feedback_trace(h)
    for make in common.WEIGHTS.values():
        w = jnp.asarray(5 * make(20, 24))
        q, _ = block_ldlq(w, factors.lower, integers, 1)
        assert float(proxy_loss(q - w, h)) <= bound * (1 + 1e-9)
    signs = np.sign(common.gaussian(20, 24, 7))  # W = Q − η L⁻¹ with every |η| just under ½ is as bad as can be
    q = np.round(common.gaussian(20, 24))
    w = jnp.asarray(q - np.linalg.solve(np.asarray(factors.lower).T, (0.4999999 * signs).T).T)
    found, _ = block_ldlq(w, factors.lower, integers, 1)
    np.testing.assert_array_equal(found, q)
    np.testing.assert_allclose(proxy_loss(found - w, h), bound, rtol=1e-6)


if __name__ == "__main__":
    common.run(__file__, Config(), measure, draw)
