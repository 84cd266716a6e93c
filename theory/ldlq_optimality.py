"""LDLQ is the best linear feedback that depends on H only, in the worst case and on average, on an unbounded grid.

Statement (QuIP, arXiv 2307.13304, Theorem 1).  Round columns last to first to the integers at
Q_j = round(W_j + Σ_{i>j} (W − Q)_i M_ij), M strictly lower triangular.  With H = L D Lᵀ, C = (M+I)⁻¹ H (M+I)⁻ᵀ and
η_j the error of rounding column j: E (M+I) = η and tr(E H Eᵀ) = tr(η C ηᵀ), where

    tr C >= tr D, with equality at M + I = L, and nowhere else if D > 0;
    average: (m/12) tr C for nearest and (m/6) tr C for stochastic rounding of uniform W;
    worst case, nearest: max over W >= (m/4) tr C, and LDLQ never exceeds (m/4) tr D;
    tr D <= tr H, and tr D <= (μ²/n) tr(H^½)² for μ-incoherent H.

Assumptions.  The grid is all of Z.  Averages: W_j mod 1 uniform given the later columns, as for W uniform on [0, 1),
or any W + U with U uniform and independent.

Proof.  B = (M+I)⁻¹ L is unit lower triangular and C = B D Bᵀ, so tr C = Σ_ij B_ij² D_j >= Σ_j D_j.  M ↦ (M+I)⁻¹ is
one to one and smooth both ways, and tr C is a convex quadratic in (M+I)⁻¹: descent on M meets no false minimum.
  Average: column j is rounded at W_j + c, c a function of the later columns.  Given those, W_j + c is uniform mod 1, so
η_j is uniform on [−½, ½] whatever they are: the η_j are independent, of variance 1/12, and E tr(η C ηᵀ) is exact.
Stochastic: given the later columns η_j has mean 0 (for any W), hence uncorrelated, and E w(1 − w) = 1/6.
  Worst: the mean over signs of η C ηᵀ with η = ±½ is ¼ tr C, so some pattern reaches it, and W = Q − η (M+I)⁻¹
(|η| just under ½) realises any pattern.  For LDLQ C = D, and every pattern costs ¼ tr D.
  Incoherence: L D^½ = H^½ U with U orthogonal; H^½ = Σ_k √λ_k v_k v_kᵀ.  With a_kj = v_kᵀ U e_j,
√D_j = Σ_k √λ_k v_jk a_kj <= (μ/√n) Σ_k √λ_k |a_kj|, and Cauchy–Schwarz with Σ_j a_kj² = 1 gives the bound.

The class of rules matters (derived here).  (E L)_j = Q_j − s_j with s_j = W_j + Σ_{i>j} (W − Q)_i L_ij costs at least
D_j dist(s_j, Z)², and s_j is uniform mod 1 whenever the later Q do not look at W_j: on average, and in the worst case,
no *causal* rule beats LDLQ, even if it depends on W.  A rule that looks ahead does: coordinate descent after LDLQ.
  Stochastic rounding has no such worst case (derived here): for n = 2, D = I, L_21 = ℓ <= ½ the largest *expected*
loss is ¼ (2 + ℓ² − 2 ℓ M) for ℓ <= M <= ½: under tr D / 4 at M = ℓ, and lower still for M > ℓ.

Clipped grids {0 .. t} (an example derived here): LDLQ can be worse than plain rounding by any factor.  Take v columns
at W = t, then k at 0, the last at 0.6; D = I; L = −2 from the last to the k, −1 from the k to the v.  The last rounds
up, E = 0.4, which the feedback turns into E = 1 in each of the k (0.8 rounds up), and the v are asked for t + k, which
is clipped.  LDLQ loses v k² + 0.04 k + 0.16, plain rounding 0.16 + 0.64 k: a factor n²/2.56 for v = k = (n − 1)/2.
A grid with k more levels removes the first term, a fixed number of levels does not.

Verdict: tight (worst case attained, averages exact).  n = 24, damping 0.01: the 40 averages over 20000 rows lie within
2.6 standard errors; without feedback the loss is 1 (flat) to 22 (spiked) times LDLQ's; L-BFGS on M stops within 5e-11
of tr D.  tr D / tr H is 1 (flat) to 0.01 (spiked) at n = 512, where the μ bound is 34 to 1000 times tr D and above the
trivial tr H on all five spectra: vacuous but for rank << n / μ² (rank n / 64: 0.19 tr H, if μ is taken over the range
of H; over all eigenvectors 7.9 tr H).  Ten passes of coordinate descent save 0 (flat) to 24 % (spiked).  A clipped
grid: false, factor 1490 at n = 63.  One pass of coordinate descent brings it back to 1, and so does the package's
damping of 0.01 from n = 25 on (κ(H) ~ n⁵; the factor is 6.2 at n = 7).
"""

from dataclasses import dataclass
from functools import partial
from itertools import product

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.linalg import solve_triangular
from matrices import HESSIANS
from scipy.optimize import minimize

from caldera_jax import Uniform, hessian
from caldera_jax.ldlq import block_ldlq, descent_feedback, ldlq, sweep
from caldera_jax.objective import feedback_trace, incoherence, ldlq_bound, proxy_loss


@dataclass(frozen=True)
class Config:
    """Sizes of the sweep, the width for tr D, and k of the counterexample on a grid of ``bits``."""

    m: int = 20000
    n: int = 24
    spectra: tuple[str, ...] = common.SPECTRA
    damping: float = 0.01
    wide: int = 512
    passes: int = 10
    bits: int = 2
    clipped: tuple[int, ...] = (1, 2, 3, 5, 8, 12, 20, 31)
    seed: int = 0


ldlq, factor = jax.jit(ldlq, static_argnums=(1, 3)), jax.jit(hessian.factor, static_argnums=(1, 2))


def feedback_cost(h, unit):
    """tr C = tr((M+I)⁻¹ H (M+I)⁻ᵀ), with unit = M + I."""
    inverse = solve_triangular(unit, jnp.eye(len(h)), lower=True, unit_diagonal=True)
    return jnp.trace(inverse @ h @ inverse.T)


def competitors(lower):
    """LDLQ's feedback and others, each as M + I."""
    eye = jnp.eye(len(lower))
    return {"LDLQ": lower, "none": eye, "half": (lower + eye) / 2, "transposed": lower[::-1, ::-1].T}


def rule(key=None):
    """Rounding to the integers: to the nearest, or with a key up or down at random, without bias."""
    def quantize(target, start):
        u = 0.5 if key is None else jax.random.uniform(jax.random.fold_in(key, start), target.shape, target.dtype)
        return jnp.floor(target + u), jnp.zeros((len(target), 1), jnp.uint8)

    return quantize


@jax.jit
def losses(w, h, unit, key=None):
    """The package's loss, row by row, nearest or (with a key) stochastic."""
    e = block_ldlq(w, unit, rule(key), 1)[0] - w
    return jnp.sum((e @ h) * e, axis=1)


@partial(jax.jit, static_argnums=3)
def descended(w, h, lower, passes: int):
    """LDLQ and then ``passes`` of coordinate descent: the losses by row after each."""
    q = sweep(w, w, lower, rule(), 1, w.shape[1], triangular=True)[0]
    feedback, found = descent_feedback(h, 1), [q]
    for _ in range(passes):
        found.append(sweep(w, found[-1], feedback, rule(), 1, w.shape[1])[0])
    return jnp.stack([jnp.sum(((q - w) @ h) * (q - w), axis=1) for q in found])


def instance(kind: str, n: int, damping: float):
    """H (normalised and damped) and its L."""
    factors = factor(jnp.asarray(common.hessian(kind, n)), damping)
    return factors.root @ factors.root.T, factors.lower


def descend(h, seed: int = 0):
    """The feedback that L-BFGS finds from a random start, as M + I, and the costs on the way."""
    n, below = len(h), np.tril_indices(len(h), -1)
    build = lambda x: jnp.eye(n).at[below].set(x)
    value = jax.jit(jax.value_and_grad(lambda x: feedback_cost(h, build(x))))
    costs = []
    found = minimize(lambda x: tuple(np.asarray(a, float) for a in value(x)), jac=True, method="L-BFGS-B",
                     x0=np.random.default_rng(seed).normal(size=len(below[0])) / n,
                     callback=lambda x: costs.append(float(value(x)[0])),
                     options={"maxiter": 500, "ftol": 0, "gtol": 1e-9})
    return np.asarray(build(found.x)), costs


def worst_patterns(h, unit):
    """η C ηᵀ for every η = ±½."""
    inverse = np.linalg.inv(np.asarray(unit))
    eta = np.array(list(product((-0.5, 0.5), repeat=len(unit))))
    return eta, np.einsum("pi,ij,pj->p", eta, inverse @ np.asarray(h) @ inverse.T, eta)


def counterexample(k: int, top: int):
    """W [1, 2k + 1] in [0, top], and L with H = L Lᵀ, on which a clipped LDLQ fails."""
    lower = np.eye(2 * k + 1)
    lower[k:2 * k, :k], lower[-1, k:2 * k] = -1, -2
    return jnp.asarray(np.repeat([top, 0, 0.6], [k, k, 1])[None, :]), jnp.asarray(lower)


@jax.jit
def clipped(w, unit, top):
    """Feedback ``unit`` on the grid {0 .. top}."""
    return block_ldlq(w, unit, lambda target, start: (rule()(target.clip(0, top), start)), 1)[0]


def clipped_loss(k: int, top: int, extra: int, plain: bool = False):
    """Loss of LDLQ (or of plain rounding) on the counterexample, on the grid {0 .. top + extra}."""
    w, lower = counterexample(k, top)
    q = clipped(w, jnp.eye(len(lower)) if plain else lower, jnp.asarray(top + extra, w.dtype))
    return float(proxy_loss(q - w, lower @ lower.T))


def grid_loss(k: int, bits: int, damping: float, passes: int = 0):
    """The same through the package's own grid and damping, and after passes of coordinate descent."""
    w, lower = counterexample(k, 2**bits - 1)
    h, middle = lower @ lower.T, (2**bits - 1) / 2  # on Uniform's grid, whose R is the largest |W|
    q = ldlq(w - middle, Uniform(bits), factor(h, damping), passes).values + middle
    return float(proxy_loss(q - w, h))


def trace_bounds(kind: str, n: int) -> dict:
    """tr D, tr H and (μ²/n) tr(H^½)², with μ over all eigenvectors and over those with λ > 0, which suffice."""
    flat = np.where(np.arange(n) < -(-n // 64), 1.0, 0)
    h = common.with_spectrum(flat) if kind == "rank n/64" else common.hessian(kind, n)
    spectrum, vectors = np.linalg.eigh(h)
    mu = np.sqrt(n) * np.abs(vectors[:, spectrum > 1e-9 * spectrum[-1]]).max()
    return {"tr_d": feedback_trace(h), "tr_h": np.trace(h), "mu": incoherence(h, h).hessian,
            "bound": ldlq_bound(h, 1, 1.0), "mu_of_range": mu, "bound_of_range": ldlq_bound(h, 1, 1.0, mu=mu)}


def stochastic_loss(w, l, feedback):
    """E of the loss of stochastic rounding for n = 2, D = I, L_21 = l, M_21 = feedback, exactly; w = (w_1, w_2)."""
    spread = lambda x: (x % 1) * (1 - x % 1)
    up, down = (w[1], 1 - w[1]), (1 - w[1], -w[1])  # the last column's probabilities and errors
    first = sum(p * spread(w[0] - feedback * e) for p, e in zip(up, down, strict=True))
    return first + (1 + (l - feedback) ** 2) * spread(w[1])


def largest_expected(l, feedback, points: int = 101):
    """Its largest value over a grid of W that holds the middle of the cell."""
    grid = np.linspace(0, 1, points)
    return float(stochastic_loss(np.meshgrid(grid, grid), l, feedback).max())


def weights(m: int, n: int, lower, seed: int) -> dict:
    """Uniform W, on which the average is exact, and others, down to the best and the worst."""
    rng = np.random.default_rng(seed)
    signs = rng.choice([-1, 1], size=(m, n))
    holes = -np.linalg.solve(np.asarray(lower).T, (0.4999999 * signs).T).T
    return {"uniform": rng.random((m, n)), "gaussian": rng.normal(size=(m, n)),
            "gaussian / 4": rng.normal(size=(m, n)) / 4, "heavy-tailed": common.heavy_tailed(m, n, seed),
            "integers": rng.integers(-4, 5, (m, n)) + 0.0, "deepest holes": holes}


def measure(config: Config) -> dict:
    """Averages against formulas, the bounds on tr D, W that is not uniform, descent on M, and the clipped grid."""
    averages, traces, descents, others, top = [], [], {}, {}, 2**config.bits - 1
    for kind in config.spectra:
        h, lower = instance(kind, config.n, config.damping)
        w = weights(config.m, config.n, lower, config.seed)
        least = feedback_trace(h)
        for (name, unit), key in product(competitors(lower).items(), (None, jax.random.key(config.seed))):
            found = np.asarray(losses(jnp.asarray(w["uniform"]), h, unit, key))
            averages.append({"spectrum": kind, "feedback": name, "rounding": "nearest" if key is None else "stochastic",
                             "cost": float(feedback_cost(h, unit)), "tr_d": least, "loss": found.mean(),
                             "standard_error": found.std() / np.sqrt(config.m)})
        unit, costs = descend(h)
        refined = np.asarray(descended(jnp.asarray(w["uniform"]), h, lower, config.passes)).mean(axis=1)
        descents[kind] = {"steps": len(costs), "excess": costs[-1] / least - 1,
                          "distance": float(np.abs(unit - lower).max()), "refined": list(refined * 12 / least)}
        others[kind] = {name: float(np.mean(losses(jnp.asarray(x), h, lower))) * 12 / least for name, x in w.items()}
    traces = [{"spectrum": kind, **trace_bounds(kind, config.wide)} for kind in (*config.spectra, "rank n/64")]
    clipped = [{"k": k, "n": 2 * k + 1, "plain": clipped_loss(k, top, 0, plain=True),
                "levels": {str(extra): clipped_loss(k, top, extra) for extra in (0, 4, k)},
                "refined": grid_loss(k, config.bits, 0.0, 1), "damped": grid_loss(k, config.bits, 0.01)}
               for k in config.clipped]
    worst = {f"{feedback:.2f}": largest_expected(0.25, feedback) for feedback in (0, 0.25, 0.5)}
    return {"averages": averages, "traces": traces, "descents": descents, "weights": others, "clipped": clipped,
            "stochastic_worst": worst}


def draw(result: dict):
    """Average loss against tr C; tr D and its bounds; the clipped grid."""
    figure, (average, traces, clipped) = common.axes(3)
    config = result["config"]
    for name, color in zip(("LDLQ", "none", "half", "transposed"), ("C0", "0.5", "C1", "C2"), strict=True):
        for rounding, marker in (("nearest", "o"), ("stochastic", "x")):
            rows = [r for r in result["averages"] if r["feedback"] == name and r["rounding"] == rounding]
            average.loglog([r["cost"] / r["tr_d"] for r in rows], [r["loss"] / r["tr_d"] for r in rows], marker,
                           color=color, fillstyle="none", label=name if marker == "o" else None)
    ends = np.array([1, max(r["cost"] / r["tr_d"] for r in result["averages"])])
    average.loglog(ends, ends / 12, "k-", linewidth=0.5, label="tr C / 12: nearest")
    average.loglog(ends, ends / 6, "k--", linewidth=0.5, label="tr C / 6: stochastic")
    average.set(xlabel="tr C / tr D", ylabel="mean loss per row / tr D",
                title=f"uniform W, {config['m']} x {config['n']}, {len(config['spectra'])} spectra")
    average.legend()
    rows = result["traces"]
    for name, marker, label in (("bound", "_", "(μ²/n) tr(H^½)²"), ("bound_of_range", "+", "the same, μ of the range"),
                                ("tr_d", "o", "tr D")):
        traces.semilogy([r["spectrum"] for r in rows], [r[name] / r["tr_h"] for r in rows], marker, label=label)
    traces.axhline(1, color="k", linewidth=0.5, label="tr H")
    traces.set(ylabel="over tr H", title=f"n = {config['wide']}, undamped", ylim=(None, 3e4))
    traces.legend(loc="upper right", ncols=2)
    rows = result["clipped"]
    for name, label in (("0", "W's own range"), ("4", "4 more levels"), ("k", "k = (n − 1)/2 more")):
        values = [r["levels"][str(r["k"]) if name == "k" else name] / r["plain"] for r in rows]
        clipped.loglog([r["n"] for r in rows], values, ".-", label=label)
    clipped.loglog([r["n"] for r in rows], [r["n"] ** 2 / 2.56 for r in rows], "k:", label="n² / 2.56")
    clipped.axhline(1, color="k", linewidth=0.5)
    clipped.set_xticks([3, 10, 30, 60], ["3", "10", "30", "60"])
    clipped.minorticks_off()
    clipped.set(xlabel="n", ylabel="loss of LDLQ / plain rounding", title=f"the counterexample, {config['bits']} bits")
    clipped.legend()
    return figure


N, ROWS = 24, 4000
FEEDBACKS = ("LDLQ", "none", "half", "transposed")


@pytest.mark.parametrize("kind", HESSIANS)
def test_no_feedback_costs_less_than_tr_d_and_what_it_costs_more_is_the_square_of_its_distance(kind):
    h, lower = instance(kind, N, 1e-4)
    minors = [1.0, *(np.linalg.det(np.asarray(h)[:j, :j]) for j in range(1, N + 1))]
    d = np.array(minors[1:]) / minors[:-1]  # D by determinants, not by Cholesky
    np.testing.assert_allclose(feedback_trace(h), d.sum(), rtol=1e-7)  # its 1e-12 is amplified by κ(H) = 1e4
    np.testing.assert_allclose(feedback_cost(h, lower), d.sum(), rtol=1e-9)
    for seed in range(20):
        for size in (1e-3, 0.03, 1):
            other = lower + size * jnp.tril(jnp.asarray(common.gaussian(N, N, seed)), -1) / N
            b = np.linalg.solve(other, lower)
            cost = float(feedback_cost(h, other))
            np.testing.assert_allclose(cost, np.sum(b**2 * d), rtol=1e-8)
            assert cost > d.sum() * (1 + 1e-12)  # > and not only >=: D > 0
    for name, unit in competitors(lower).items():
        assert name == "LDLQ" or kind == "flat" or float(feedback_cost(h, unit)) > 1.01 * d.sum()


@pytest.mark.parametrize("kind", ["geometric", "spiked"])
def test_descent_on_the_feedback_ends_at_the_ldl_factor(kind):
    h, lower = instance(kind, 12, 0.01)
    unit, costs = descend(h)
    assert costs[0] > 1.5 * costs[-1]
    np.testing.assert_allclose(costs[-1], feedback_cost(h, lower), rtol=1e-9)
    np.testing.assert_allclose(unit, lower, atol=1e-5)  # a cost within ε of the least: M within √(ε κ(H)) = 1e-6


def test_with_a_singular_h_the_best_feedback_is_not_unique():
    x = common.gaussian(1, 12)
    h, lower = jnp.asarray(x.T @ x), np.array(common.gaussian(12, 12, 1))
    lower = np.tril(lower, -1) + np.eye(12)
    lower[:, 0] = x[0] / x[0, 0]  # the only column that H = x xᵀ prescribes
    np.testing.assert_allclose(feedback_cost(h, jnp.asarray(lower)), x[0, 0] ** 2, rtol=1e-8)
    np.testing.assert_allclose(feedback_trace(h), x[0, 0] ** 2, rtol=1e-6)
    lower[5, 0] += 0.1
    assert float(feedback_cost(h, jnp.asarray(lower))) > x[0, 0] ** 2 * 1.0001


@pytest.mark.parametrize("rounding, c", [("nearest", 12), ("stochastic", 6)])
@pytest.mark.parametrize("kind", ["geometric", "power", "deficient"])
def test_the_average_loss_is_tr_c_over_12_or_over_6_for_uniform_and_for_dithered_weights(kind, rounding, c):
    h, lower = instance(kind, N, 1e-3)
    uniform = np.random.default_rng(1).random((ROWS, N))
    key = None if rounding == "nearest" else jax.random.key(2)
    for start in (np.zeros((ROWS, N)), 3 * common.heavy_tailed(ROWS, N)):
        for name in FEEDBACKS:
            unit = competitors(lower)[name]
            found = np.asarray(losses(jnp.asarray(start + uniform), h, unit, key))
            cost, error = float(feedback_cost(h, unit)), found.std() / np.sqrt(ROWS)
            assert abs(found.mean() - cost / c) < 5 * error, name  # rows are independent: five standard errors
            assert name == "LDLQ" or found.mean() > feedback_trace(h) / c + 5 * error
    slab = sweep(jnp.asarray(uniform), jnp.asarray(uniform), lower, rule(key), 1, 8, triangular=True)[0]
    np.testing.assert_array_equal(slab, block_ldlq(jnp.asarray(uniform), lower, rule(key), 1)[0])


def test_the_average_needs_weights_that_are_uniform_in_their_cell():
    h, lower = instance("power", N, 0.01)
    found = {name: np.asarray(losses(jnp.asarray(w), h, lower)) for name, w in weights(ROWS, N, lower, 0).items()}
    least = feedback_trace(h) / 12
    error = {name: 5 * x.std() / np.sqrt(ROWS) for name, x in found.items()}
    assert found["integers"].max() < 1e-20 and found["gaussian / 4"].mean() < least - error["gaussian / 4"]
    np.testing.assert_allclose(found["deepest holes"], 3 * least, rtol=1e-5)


@pytest.mark.parametrize("kind", ["flat", "geometric", "spiked", "deficient"])
def test_every_feedback_has_a_weight_that_costs_tr_d_over_4_and_ldlq_none_that_costs_more(kind):
    h, lower = instance(kind, 9, 1e-3)
    quarter = feedback_trace(h) / 4
    for name, unit in competitors(lower).items():
        eta, costs = worst_patterns(h, unit)
        w = jnp.asarray(-0.9999999 * eta @ np.linalg.inv(np.asarray(unit)))  # Q = 0, and every error just under 1/2
        found = np.asarray(losses(w, h, unit))
        np.testing.assert_allclose(found, costs, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(costs.mean(), feedback_cost(h, unit) / 4, rtol=1e-9)
        assert found.max() >= quarter * (1 - 1e-6)
        assert (np.ptp(costs) < 1e-9 * quarter) == (name == "LDLQ" or kind == "flat")
    for make in common.WEIGHTS.values():
        assert np.max(losses(jnp.asarray(5 * make(512, 9)), h, lower)) <= quarter * (1 + 1e-9)
    assert np.max(losses(w, h, jnp.eye(9))) > quarter * 1.01 or kind == "flat"


def test_stochastic_rounding_has_a_smaller_worst_case_which_ldlq_does_not_minimise():
    l, half = 0.25, np.full((20000, 2), 0.5)
    lower = jnp.asarray([[1.0, 0.0], [l, 1.0]])
    for feedback in (0.0, l, 0.5):
        exact = stochastic_loss((0.5, 0.5), l, feedback)
        np.testing.assert_allclose(exact, (2 + l**2 - 2 * l * feedback) / 4, rtol=1e-12)
        np.testing.assert_allclose(largest_expected(l, feedback), exact, rtol=1e-12)
        unit = jnp.eye(2).at[1, 0].set(feedback)
        found = np.asarray(losses(jnp.asarray(half), lower @ lower.T, unit, jax.random.key(0)))
        assert abs(found.mean() - exact) < 5 * found.std() / np.sqrt(len(half))
    assert largest_expected(l, 0.5) < 0.95 * largest_expected(l, l) < 0.95 * 2 / 4


@pytest.mark.parametrize("kind", HESSIANS)
def test_tr_d_is_at_most_tr_h_and_the_incoherence_bound(kind):
    for n in (7, 24, 40):
        found = trace_bounds(kind, n)
        assert found["tr_d"] <= found["tr_h"] * (1 + 1e-9)
        assert found["tr_d"] <= found["bound_of_range"] * (1 + 1e-9)
        assert found["bound_of_range"] <= found["bound"] * (1 + 1e-9)
        root = np.sum(np.sqrt(np.clip(np.linalg.eigvalsh(common.hessian(kind, n)), 0, None)))
        np.testing.assert_allclose(found["bound"], found["mu"] ** 2 / n * root**2, rtol=1e-6)  # √ of eigenvalues ε
    axis_aligned = np.diag(1e-6 ** (np.arange(24) / 23))  # tr D = tr H: without μ² the bound is false
    assert feedback_trace(axis_aligned) > 2 * ldlq_bound(axis_aligned, 1, 1.0, mu=1.0)
    np.testing.assert_allclose(feedback_trace(axis_aligned), np.trace(axis_aligned))


def test_looking_ahead_beats_ldlq_and_looking_back_at_w_does_not():
    h, lower = instance("geometric", N, 1e-3)
    w = np.random.default_rng(3).random((ROWS, N))
    found = np.asarray(descended(jnp.asarray(w), h, lower, 3))
    assert (np.diff(found, axis=0) <= 1e-12).all()  # a pass lowers the loss of every row, or leaves it
    bound, margin = feedback_trace(h) / 12, lambda x: 5 * x.std() / np.sqrt(ROWS)
    half = np.asarray(losses(jnp.asarray(w), h, competitors(lower)["half"]))
    causal = np.where(w[:, -1] > 0.5, half, found[0])  # chooses its feedback by a look at the column rounded first
    assert causal.mean() > bound - margin(causal)
    for ahead in (np.minimum(half, found[0]), found[-1]):  # chooses it by the outcome; coordinate descent
        assert ahead.mean() < bound - margin(ahead)


@pytest.mark.parametrize("bits", [1, 2])
def test_on_a_clipped_grid_ldlq_is_worse_than_plain_rounding_by_any_factor_until_k_levels_more(bits):
    top = 2**bits - 1
    for k in (2, 24):
        plain = clipped_loss(k, top, 0, plain=True)
        np.testing.assert_allclose(plain, 0.16 + 0.64 * k, rtol=1e-9)
        for extra in (0, k - 1, k, 2 * k):
            beyond = max(k - extra, 0)
            expected = k * beyond**2 + 0.04 * k + 0.16
            np.testing.assert_allclose(clipped_loss(k, top, extra), expected, rtol=1e-9)
            assert (expected < plain) == (extra >= k)
    if bits == 2:  # the same from the package's own grid, and one pass of coordinate descent
        np.testing.assert_allclose(grid_loss(k, bits, 0.0), k**3 + 0.04 * k + 0.16, rtol=1e-9)
        np.testing.assert_allclose(grid_loss(k, bits, 0.0, 1), plain, rtol=1e-9)
    assert clipped_loss(24, top, 0) / plain > 100 * clipped_loss(2, top, 0) / clipped_loss(2, top, 0, plain=True) / 2


if __name__ == "__main__":
    common.run(__file__, Config(), measure, draw)
