"""Block LDLQ loses at most (g m μ² σ² / n) tr(H^½)²: true, attained by one H, and too loose to guide any real layer.

Statement (QuIP#, arXiv 2402.04396, Theorem 4.1).  H = L blockdiag(D) Lᵀ in blocks of g columns, rounding errors η with
E ηᵀη <= σ² I in every row and block, and μ = μ_H.  Then E tr(E H Eᵀ) <= (g m μ² σ² / n) tr(H^½)².  The steps, with
root = chol(H) = B O, B = H^½, O orthogonal, C = Oᵀ B O, and _jj the g x g blocks on the diagonal:

    tr(E H Eᵀ) = Σ_j tr(η_j D_j η_jᵀ)                      the identity of ldlq_identity.py
    E …        = m Σ_j tr(D_j Σ_j) <= m σ² tr D            Σ_j <= σ² I, the covariance of η_j
    tr D      <= Σ_j λ_max(B_jj) tr C_jj                    "blocks"
              <= max_j λ_max(B_jj) · tr B                   "spectral", sharper than the theorem
              <= max_j tr(B_jj) · tr B                      "trace"
              <= (g μ² / n) tr(B)²                          "theorem"
and, without incoherence, tr D_g <= tr D_2g <= tr H: D grows with the block.

Assumptions.  The bound on E ηᵀη at the targets that LDLQ meets: no other independence is used, but a finite grid need
not obey it.  The paper's own proof was not read: the chain is
derived here; the factor g enters in the third step only, which puts a trace in place of an eigenvalue.

Proof.  D_j = root_jj root_jjᵀ and root_jj = P_jᵀ B O_j (P_j the coordinates, O_j the columns of O, of block j), so
tr D_j = ‖(B^½ P_j)ᵀ (B^½ O_j)‖²_F <= ‖B^½ P_j‖² ‖B^½ O_j‖²_F = λ_max(B_jj) tr C_jj, and Σ_j tr C_jj = tr B.  Each of
the g diagonal entries of B_jj is Σ_k √λ_k q_ik² <= (μ²/n) tr B.  D_j is the covariance of block j given the blocks
before (Schur complement): to condition on half of a block as well takes away more.

Verdict.  Attained, for every g, by H = λ v vᵀ with v flat and a Hadamard basis (μ = 1); false without g or without μ.
Elsewhere loose: on rotated H of SmolLM2 (q, o, down) it is 208, 311 and 263 times tr D, of which g μ² is nearly all,
where the trivial tr H is 7.3, 4.2 and 2.3 times tr D: it does not even show that feedback helps.  "spectral" is 2.5,
2.8 and 1.7 times tr D, and does.  D itself hardly grows with g: tr D_8 is 1.004 to 1.08 times tr D_1.  On H = I, μ is
that of whatever basis LAPACK returns.
  σ²: the errors of E8P on a Gaussian are not white: −1.5 % correlation between any two weights of a block (the common
±1/4 resolves the direction 1 better, 0.082), so λ_max is 0.093 where the mean is 0.0915.  Measured loss over m σ̄² tr D
with that mean: 1.065 to 1.075 on the rotated layers, above what λ_max allows, as feedback widens the target (variance
1.04 to 1.05 times W's) and the grid is finite; 1.47 on a rank-deficient H; 6.0 on q without rotation.
"""

from dataclasses import dataclass
from functools import partial

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from caldera_jax import E8P, Codebook, codebooks, hessian
from caldera_jax.incoherence import rotate
from caldera_jax.ldlq import block_ldlq, ldlq
from caldera_jax.objective import feedback_trace, incoherence, ldlq_bound, proxy_loss


@dataclass(frozen=True)
class Config:
    """Sizes of the sweep."""

    m: int = 256
    n: int = 256
    spectra: tuple[str, ...] = common.SPECTRA + ("axis",)
    blocks: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    layers: tuple[str, ...] = ("q", "o", "down")
    codebook: Codebook = E8P()
    damping: float = 0.01
    samples: int = 2**18
    seed: int = 0


STEPS = ("blocks", "spectral", "trace", "theorem")
block_ldlq, rotate = jax.jit(block_ldlq, static_argnums=(2, 3)), jax.jit(rotate)
ldlq = jax.jit(ldlq, static_argnums=1)


def instance(kind: str, n: int, seed: int = 0) -> np.ndarray:
    """A Hessian of common.SPECTRA, or "axis": the power law with the axes as eigenvectors (μ = √n)."""
    return np.diag(1 / (1.0 + np.arange(n))) if kind == "axis" else common.hessian(kind, n, seed)


def chain(h: np.ndarray, block: int) -> dict[str, float]:
    """tr D and the four bounds on it, each above the one before; tr H."""
    left, singular, right = np.linalg.svd(np.linalg.cholesky(h + 1e-12 * np.mean(np.diag(h)) * np.eye(len(h))))
    half, diagonal = (left * singular) @ left.T, singular @ right**2  # B, and diag C: root = B (left right)
    cuts = [slice(i, i + block) for i in range(0, len(h), block)]
    largest = np.array([np.linalg.eigvalsh(half[cut, cut])[-1] for cut in cuts])
    return {"trace_d": feedback_trace(h, block),
            "blocks": float(largest @ [diagonal[cut].sum() for cut in cuts]),
            "spectral": float(largest.max() * np.trace(half)),
            "trace": float(max(np.trace(half[cut, cut]) for cut in cuts) * np.trace(half)),
            "theorem": ldlq_bound(h, 1, 1.0, block), "trace_h": float(np.trace(h))}


@partial(jax.jit, static_argnums=0)
def covariance(codebook: Codebook, x):
    """Mean of ηᵀη [8, 8] over the blocks of x, scaled by the RMS of x, and the standard error of every entry."""
    x = x.reshape(-1, codebook.block)
    eta = codebooks.quantize(codebook, x).values - x
    products = eta[:, :, None] * eta[:, None, :] / jnp.mean(x**2)
    return products.mean(0), products.std(0) / jnp.sqrt(len(x))


def spent(w, h, codebook: Codebook, damping: float):
    """Package LDLQ: (loss, mean square of η, mean square of the targets, damped H), W with unit mean square."""
    w = w / jnp.sqrt(jnp.mean(w**2))
    factors = hessian.factor(h, damping, codebook.block)
    h, q = factors.root @ factors.root.T, ldlq(w, codebook, factors).values
    eta = jnp.pad(q - w, ((0, 0), (0, -w.shape[1] % codebook.block))) @ factors.lower
    eta = eta[:, :w.shape[1]]
    return proxy_loss(q - w, h), jnp.mean(eta**2), jnp.mean((q - eta) ** 2), h


def row(name: str, rotated: bool, w, h, config: Config, variance: float) -> dict:
    """One instance: the chain at the codebook's block, and the measured loss over m σ̄² tr D."""
    w, h = jnp.asarray(w), jnp.asarray(h)
    if rotated:
        w, h, _ = rotate(jax.random.key(config.seed), w, h)
    loss, own, target, h = spent(w, h, config.codebook, config.damping)
    steps = chain(np.asarray(h), config.codebook.block)
    return {"name": name, "rotated": rotated, "mu": incoherence(w, h).hessian, **steps,
            "trace_d_of_1": feedback_trace(h), "loss": float(loss),
            "loss_over_m_sigma_trace_d": float(loss) / (len(w) * variance * steps["trace_d"]),
            "eta_variance": float(own), "target_variance": float(target)}


def measure(config: Config) -> dict:
    """E8P's error covariance; the chain and the loss over spectra and real layers; tr D against the block."""
    x = jnp.asarray(np.random.default_rng(config.seed).normal(size=(config.samples, 8)))
    matrix, error = (np.asarray(a) for a in covariance(config.codebook, x))
    variance = float(np.trace(matrix) / 8)
    w = common.gaussian(config.m, config.n, config.seed)
    cases = {kind: (w, instance(kind, config.n)) for kind in config.spectra}
    real = common.layers()
    cases |= {name: real[name] for name in config.layers}
    rows = [row(name, rotated, *pair, config, variance) for name, pair in cases.items() for rotated in (False, True)]
    growth = []
    for name in config.layers[:2]:
        w, h, _ = rotate(jax.random.key(config.seed), *map(jnp.asarray, real[name]))
        h = np.asarray(hessian.regularise(h, config.damping))
        growth += [{"name": name, "block": block, **chain(h, block)} for block in config.blocks]
    return {"covariance": matrix.tolist(), "standard_error": error.tolist(), "variance": variance,
            "eigenvalues": np.linalg.eigvalsh(matrix).tolist(), "rows": rows, "growth": growth}


def draw(result: dict):
    """Left: the chain over tr D, on every rotated instance.  Right: tr D and its bounds against the block."""
    figure, (left, right) = common.axes(2, height=2.6)
    rows = [r for r in result["rows"] if r["rotated"]]
    for i, r in enumerate(rows):
        real = r["name"] in result["config"]["layers"]
        left.semilogy(range(5), [1] + [r[s] / r["trace_d"] for s in STEPS], "o-" if real else ".--", color=f"C{i}",
                      label=r["name"], linewidth=1 if real else 0.6)
        left.plot(5, r["trace_h"] / r["trace_d"], "o" if real else ".", color=f"C{i}")
    left.set_xticks(range(6), ["tr D", *STEPS, "tr H"])
    left.set(ylabel="over tr D", title="each step of the proof, rotated H, g = 8", ylim=(0.8, None))
    left.legend(ncols=2, loc="upper left")
    for i, name in enumerate(result["config"]["layers"][:2]):
        points = [r for r in result["growth"] if r["name"] == name]
        for key, style in (("trace_d", "o-"), ("spectral", "--"), ("theorem", ":")):
            label = {"trace_d": "tr D", "spectral": "max λ(B_jj) tr B", "theorem": "theorem"}[key]
            right.loglog([r["block"] for r in points], [r[key] / points[0]["trace_d"] for r in points], style,
                         color=f"C{i}", label=f"{label}, {name}")
        right.axhline(points[0]["trace_h"] / points[0]["trace_d"], color=f"C{i}", linewidth=0.5)
    right.set(xlabel="block g", ylabel="over tr D of g = 1", title="rotated layers; thin lines: tr H", ylim=(0.5, 2e4))
    right.set_xticks(result["config"]["blocks"], result["config"]["blocks"])
    right.minorticks_off()
    right.legend(loc="upper left", ncols=2)
    return figure


def rotated(h, seed=1):
    return np.asarray(rotate(jax.random.key(seed), jnp.zeros((8, len(h))), jnp.asarray(h))[1])


def flat_rank_one(n):
    """λ v vᵀ with v a row of a Hadamard matrix: μ = 1 in a Hadamard basis."""
    return np.ones((n, n)) / n


@pytest.mark.parametrize("kind", common.SPECTRA + ("axis",))
def test_tr_d_is_the_conditional_variances_and_grows_with_the_block_up_to_tr_h(kind):
    h = instance(kind, 40) + 1e-3 * np.eye(40)
    for block in (1, 8, 16):  # 16 leaves a partial block
        starts = range(0, 40, block)
        own = [h[s:s + block, s:s + block] - h[s:s + block, :s] @ np.linalg.solve(h[:s, :s], h[:s, s:s + block])
               for s in starts]
        np.testing.assert_allclose(feedback_trace(h, block), sum(map(np.trace, own)), rtol=1e-8)  # κ ε = 1e7 · 1e-16
    traces = [feedback_trace(h, block) for block in (1, 2, 4, 8, 40)]
    assert (np.diff(traces) >= -1e-9 * traces[-1]).all()
    np.testing.assert_allclose(traces[-1], np.trace(h), rtol=1e-10)
    if kind not in ("flat", "axis"):  # and strictly: this is not a claim about diagonal H
        assert (np.diff(traces) > 1e-8 * traces[-1]).all()  # beyond rounding, κ ε


@pytest.mark.parametrize("block", [1, 8, 16])
@pytest.mark.parametrize("kind", common.SPECTRA + ("axis", "rank one"))
def test_every_step_of_the_proof_holds_before_and_after_rotation(kind, block):
    h = flat_rank_one(40) if kind == "rank one" else instance(kind, 40)
    for matrix in (h, rotated(h), rotated(h, 2)):
        steps = chain(matrix, block)
        values = [steps[name] for name in ("trace_d",) + STEPS]
        # D and B are those of H + 1e-12 I, whose half may be 1e-6 from H's: for a singular H the theorem lacks 2e-6 n
        slack = np.array([1e-9, 1e-9, 1e-9, 1e-4])
        assert (np.diff(values) >= -slack * values[:-1]).all(), steps
        assert steps["trace_d"] <= steps["trace_h"] * (1 + 1e-9)


@pytest.mark.parametrize("block", [1, 2, 8, 16])
def test_the_bound_is_attained_by_one_flat_direction_and_false_without_g(block):
    h = flat_rank_one(64)
    np.testing.assert_allclose(feedback_trace(h, block), ldlq_bound(h, 1, 1.0, block, mu=1.0), rtol=1e-5)
    if block > 1:  # by the factor g, as the bound with it is attained
        assert feedback_trace(h, block) > block * (1 - 1e-5) * ldlq_bound(h, 1, 1.0, 1, mu=1.0)


def test_the_bound_is_false_without_mu_and_says_more_than_tr_h_only_for_concentrated_spectra():
    h = instance("axis", 64)
    exceeded = feedback_trace(h) / ldlq_bound(h, 1, 1.0, 1, mu=1.0)
    np.testing.assert_allclose(exceeded, 64 * np.trace(h) / np.trace(np.sqrt(h)) ** 2)  # > 1: Cauchy–Schwarz
    assert exceeded > 1
    assert feedback_trace(h) <= ldlq_bound(h, 1, 1.0, 1)
    for kind in ("geometric", "power", "deficient"):
        steps = chain(rotated(instance(kind, 64)), 8)
        assert steps["theorem"] > steps["trace_h"] > steps["trace_d"]
    spike = np.eye(64) * 1e-6 + flat_rank_one(64) * 64
    share = 8 / 64 * (1 + 63 * 1e-3 / 8) ** 2  # g / n (Σ √λ)² / Σ λ, up to λ_min / λ_max
    np.testing.assert_allclose(ldlq_bound(spike, 1, 1.0, 8, mu=1.0) / np.trace(spike), share, rtol=1e-5)
    assert feedback_trace(spike, 8) / np.trace(spike) <= share < 1


@pytest.mark.parametrize("correlated", [False, True])
def test_the_expected_loss_is_tr_of_d_times_the_covariance_so_that_its_largest_eigenvalue_counts(correlated):
    h = jnp.asarray(instance("power", 40) + flat_rank_one(40) * 8)
    factors = hessian.factor(h, 0.0, 8)
    sigma = np.eye(8) + (correlated * 0.9) * (np.ones((8, 8)) - np.eye(8))
    z = jnp.asarray((common.gaussian(20_000, 8, 3) @ np.linalg.cholesky(sigma).T).reshape(4000, 40))

    def noise(target, start):  # a quantizer whose errors have covariance sigma, whatever the target
        return target + lax.dynamic_slice_in_dim(z, start, 8, axis=1), jnp.zeros((len(target), 1), jnp.uint8)

    w = jnp.asarray(common.gaussian(4000, 40))
    q, _ = block_ldlq(w, factors.lower, noise, 8)
    losses = np.asarray(jnp.sum((q - w) @ factors.h * (q - w), axis=1))
    mean, error = losses.mean(), 5 * losses.std() / np.sqrt(len(losses))  # z = 5 standard errors; rows independent
    root = np.asarray(factors.root)
    blocks = [root[s:s + 8, s:s + 8] for s in range(0, 40, 8)]
    assert abs(mean - sum(np.trace(b @ b.T @ sigma) for b in blocks)) <= error
    trace = feedback_trace(factors.h, 8)
    assert mean <= np.linalg.eigvalsh(sigma)[-1] * trace + error
    assert (mean > trace + error) == correlated  # the variance of each weight, 1, does not bound the loss
    assert mean <= np.linalg.eigvalsh(sigma)[-1] * ldlq_bound(factors.h, 1, 1.0, 8)


@pytest.mark.parametrize("block", [1, 8])
def test_random_rounding_stays_below_a_quarter_m_tr_d_and_meets_it_midway_between_integers(block):
    u = jnp.asarray(np.random.default_rng(5).random((1000, 40)))

    def dithered(target, start):
        rounded = jnp.floor(target + lax.dynamic_slice_in_dim(u, start, block, axis=1))
        return rounded, jnp.zeros((len(target), 1), jnp.uint8)

    for kind in common.SPECTRA:
        factors = hessian.factor(jnp.asarray(instance(kind, 40)), 1e-6, block)
        h = np.asarray(factors.root @ factors.root.T)
        w = jnp.asarray(np.round(5 * common.gaussian(1000, 40)) + 0.5)
        q, _ = block_ldlq(w, factors.lower, dithered, block)
        losses = np.sum(np.asarray(q - w) @ h * np.asarray(q - w), axis=1)
        bound = feedback_trace(h, block) / 4
        assert losses.mean() <= bound * (1 + 1e-9) + 5 * losses.std() / np.sqrt(len(losses)) * (kind != "flat")
        if kind == "flat":
            np.testing.assert_allclose(losses, bound, rtol=1e-9)


def test_e8p_errors_have_equal_variances_and_a_small_negative_correlation_from_the_common_shift():
    x = jnp.asarray(np.random.default_rng(8).normal(size=(2**16, 8)))
    matrix, error = (np.asarray(a) for a in covariance(E8P(), x))
    off = ~np.eye(8, dtype=bool)
    assert (np.abs(np.diag(matrix) - 0.0915) < 5 * np.diag(error) + 0.00005).all()  # 0.0915 is given to four places
    mean = matrix[off].mean()
    assert (np.abs(matrix[off] - mean) < 5 * error[off]).all()
    # 28 entries that are nearly independent: 5 standard errors of their mean; −1.5 % is given to one decimal
    deviation = 5 * error[off].mean() / np.sqrt(28)
    assert mean < -deviation and abs(mean + 0.015 * 0.0915) < deviation + 0.0005 * 0.0915
    # with variance v and covariance c everywhere: v + 7 c along 1, v − c else; the sampling error Δ is a symmetric
    # matrix of independent entries, ‖Δ‖ <= (2 √8 + 5) standard errors; Weyl, and Davis–Kahan for the direction
    spread, diagonal = (2 * np.sqrt(8) + 5) * error.max(), np.diag(matrix).mean()
    values, vectors = np.linalg.eigh(matrix)
    assert abs(values[0] - (diagonal + 7 * mean)) < spread and values[-1] < diagonal - mean + spread
    assert (vectors[:, 0].sum()) ** 2 / 8 > 1 - (spread / (8 * mean)) ** 2 > 0


def test_e8p_on_the_weights_alone_understates_the_loss_and_the_theorem_overstates_it():
    w, variance = jnp.asarray(common.gaussian(512, 64)), 0.0915
    ratios, wider = {}, {}
    for kind in ("flat", "deficient"):
        loss, own, target, h = spent(*rotate(jax.random.key(0), w, jnp.asarray(instance(kind, 64)))[:2], E8P(), 0.01)
        trace = feedback_trace(h, 8)
        ratios[kind], wider[kind] = float(loss) / (512 * variance * trace), float(target)
        assert float(loss) < 512 * 1.015 * variance * ldlq_bound(h, 1, 1.0, 8)  # λ_max = (1 + 0.015) variance
        assert float(own) >= 0.965 * variance
    # the standard deviation of |η|²/8 is about 0.04, over 512 · 8 blocks: 5 standard errors are 3.5 %, or 6 % where D
    # lives on a third of the columns.  W has mean square 1; what the targets have more is known to 5 √(2 / (512 · 64))
    assert abs(ratios["flat"] - 1) < 0.035 and abs(wider["flat"] - 1) < 1e-9
    assert ratios["deficient"] > 1.06 and wider["deficient"] > 1.039


if __name__ == "__main__":
    common.run(__file__, Config(), measure, draw)
