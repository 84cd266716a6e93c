"""Bits for L and R: the first-order formula holds for fine grids only, and turning L and R inside saves a bit.

Statement.  L = U_k orthonormal, R = LᵀA the closed form, S = Σ_{i<=k} σᵢ² = tr(R H Rᵀ), entries in [−R_L, R_L] and
[−R_R, R_R], dithered grids of B bits, step Δ = 2 range/(2^B − 1).  With a = m Δ_L²/4 · S and b = k Δ_R²/4 · tr H,

    E loss(L̂R̂) − Σ_{i>k} σᵢ² = Σ v_L,ij (R H Rᵀ)_jj + Σ v_R,jl H_ll + Σ v_L,ij v_R,jl H_ll  <=  a + b (1 + m Δ_L²/4),

v the variances of the entries, all <= Δ²/4.  Asking a, b <= ε/2 gives the first-order formulas (a substitute: the
paper's own were not found)  B_L >= log2(1 + R_L √(2 m S/ε)),  B_R >= log2(1 + R_R √(2 k tr H/ε)).  What they guarantee
is ε (1 + ε/4S); put 2S(√(1 + ε/S) − 1) in place of ε to keep ε.  Fewest bits m B_L + n B_R: a : b = m : n, not 1 : 1.
  For a grid that rounds Gaussian entries at mean squared error D · RMS²:  D S + D (1 + D) ‖R‖²_F tr H / n.

Assumptions.  Unbiased, independent rounding within the range.  D: factors whose entries are as if Gaussian, as those of
O R and L Oᵀ are for a Hadamard matrix O [k, k], which changes neither L R nor what is stored: "turned".

Proof.  (L + δL)(R + δR) − A = (LR − A) + δL R + L δR + δL δR.  δL and δR are independent with independent entries of
mean 0, so every cross term has mean 0.  E‖δL R H^½‖² = Σ v_L,ij (R H Rᵀ)_jj; E‖L δR H^½‖² = Σ v_R,jl H_ll for LᵀL = I;
the third likewise.  With a = ε/2: m Δ_L²/4 = ε/2S.  Minimise m B_L + n B_R, a ~ 4^{−B_L}, b ~ 4^{−B_R}: m/a = n/b.
  Scales: L diag(1/s), diag(s) R is the same product.  Formulas with ‖R H^½‖² and ‖L‖² in place of S and k do not
change under one s, nor do grids fitted to a factor.  One scale for all of R, whose rows have norms rᵢ ~ σᵢ, costs k
r₁² where a scale a row costs Σ rᵢ²; s = r^−½ costs r₁ Σ rᵢ on both sides, less if m = n: Σ rᵢ² + k r₁² >= 2 r₁ Σ rᵢ.
  LDLQ: ‖L δR H^½‖² = tr(δR H δRᵀ) and ‖δL R H^½‖² = tr(δL G δLᵀ), G = R H Rᵀ, are what LDLQ makes small.

Verdict: the identity is exact; its bound is met by sparse factors, whose zeros lie midway between levels, and there
the first-order formula is exceeded 20 times at 1 bit, 3.1 times at 2, 1.06 times at 4 (m = 40).  For dense factors
dithering costs 0.59 to 0.78 of the bound, rounding to nearest 0.28 to 0.43.  The formula by D is within 0.83 to 1.37
of what turned factors cost, on every grid, and within 2 % on real layers.
  Unturned, one scale costs up to 8 times more (e8p, 4 bits, power A and H: 11.7 times the formula, for it clips the
large rows), which alternation only slowly mends.  With H = I a scale a row or turning gains 2.7 to 13 times on decaying
A, 1 to 2 on Gaussian A.  Of a fixed budget k b, 4 bits are best for decaying spectra, 2 for Gaussian, as predicted.
  4 bits are enough, costing < 10 % of the tail, where tail >= 10 times the formula: true for v and o (22 and 31 times:
2.0 and 2.9 % after ten LPLR iterations), not for q (6 times: 13 %).  LPLR does not remove L's noise (refitting R mends
k/m of it and what the tail gives): at equal bits it leaves 0.45 to 0.89 of the formula, and 2-bit L costs 1.2 to 1.6
times what 2-bit R costs, for m > n and m < n alike.  From turned factors ten iterations leave 1 to 27 % less noise;
turned factors rounded once by LDLQ, with no iteration, leave 1.4 to 3.1 times less than ten iterations do.
  Both together, ``lplr_factorize(rounding="feedback")``, leave 0.20, 0.51 and 0.40 of it on q, v and o with 4 bits, and
0.21, 0.50 and 0.49 with 2: L's errors then count by the d of R H Rᵀ, no longer by its diagonal.
"""

from dataclasses import dataclass
from functools import partial
from unittest import mock

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import loss, matrix

from caldera_jax import hadamard, lplr
from caldera_jax import hessian as hessians
from caldera_jax.codebooks import Dithered, ResidualE8P, Uniform, by_bits, fit_scale, quantize
from caldera_jax.ldlq import ldlq
from caldera_jax.objective import proxy_loss
from caldera_jax.regression import Factors, rank_constrained


@dataclass(frozen=True)
class Config:
    """Sizes of the sweeps."""

    m: int = 96
    n: int = 64
    rank: int = 16
    bits: tuple[int, ...] = (2, 3, 4, 6, 8)
    draws: int = 20
    budget: int = 64  # rank times bits
    wide: int = 256
    layers: tuple[str, ...] = ("q", "v", "o")
    layer_rank: int = 32
    seed: int = 0


quantize, ldlq = jax.jit(quantize, static_argnums=0), jax.jit(ldlq, static_argnums=1)
lplr_factorize = jax.jit(lplr.lplr_factorize, static_argnums=(3, 4, 5, 6), static_argnames="rounding")
lplr_turned = jax.jit(lambda *args: lplr.lplr_factorize(*args), static_argnums=(3, 4, 5, 6))
rank_constrained, proxy_loss = jax.jit(rank_constrained, static_argnums=2), jax.jit(proxy_loss)
LATTICE = (2, 3, 4, 8, 16)


def closed_form(a, h, rank):
    """The optimal factors as arrays: L, R, and Σ_{i>k} σᵢ²."""
    root = np.linalg.cholesky(h)
    left, right = rank_constrained(jnp.asarray(a), jnp.asarray(root), rank)
    return np.asarray(left), np.asarray(right), loss(left @ right - a, h)


def turned(left, right):
    """L Oᵀ, O R: the same product, O a Hadamard matrix, so that every row of O R is a mixture of all of R."""
    return hadamard.transform(jnp.asarray(left)), hadamard.transform(jnp.asarray(right).T).T


def bits_needed(epsilon, left, right, h, share=0.5) -> tuple[float, float]:
    """The formulas, of which L takes ``share`` of ε; for any factors, not only an orthonormal L."""
    top = lambda x: np.abs(x).max()
    of_left = len(left) * np.trace(right @ h @ right.T) / (share * epsilon)
    of_right = np.sum(left**2) * np.trace(h) / ((1 - share) * epsilon)
    return float(np.log2(1 + top(left) * np.sqrt(of_left))), float(np.log2(1 + top(right) * np.sqrt(of_right)))


def corrected(epsilon: float, energy: float) -> float:
    """The ε to put into the formulas so that the second order is covered: ε' (1 + ε'/4S) = ε."""
    return 2 * energy * (np.sqrt(1 + epsilon / energy) - 1)


def terms(left, right, h, left_bits: int, right_bits: int) -> tuple[float, float, float]:
    """a, b and b · m Δ_L²/4: what dithering may cost."""
    step = lambda x, bits: 2 * np.abs(x).max() / (2**bits - 1)
    left_step, right_step = step(left, left_bits), step(right, right_bits)
    of_left = len(left) * left_step**2 / 4
    of_right = np.sum(left**2) * right_step**2 / 4 * np.trace(h)
    return (of_left * np.trace(right @ h @ right.T), of_right,
            of_left * len(right) * right_step**2 / 4 * np.trace(h))


def variance(x, bits: int) -> np.ndarray:
    """f (1 − f) Δ²: what the dither does to each entry, f its place between two levels."""
    step = 2 * np.abs(x).max() / (2**bits - 1)
    place = (x / np.abs(x).max() + 1) * (2**bits - 1) / 2 % 1
    return place * (1 - place) * step**2


def expected(left, right, h, left_bits: int, right_bits: int) -> tuple[float, float, float]:
    """The three terms of the identity."""
    v, u = variance(left, left_bits), variance(right, right_bits) @ np.diag(h)
    return float(v.sum(0) @ np.diag(right @ h @ right.T)), float(u @ np.sum(left**2, 0)), float(v.sum(0) @ u)


def rounded(left, right, left_grid, right_grid, seed: int = 0) -> np.ndarray:
    """L̂ R̂, each rounded by the package, L held transposed as there."""
    one, two = jax.random.split(jax.random.key(seed))
    return np.asarray(quantize(left_grid, jnp.asarray(left.T), one).values.T
                      @ quantize(right_grid, jnp.asarray(right), two).values)


def distortion(grid, shape) -> float:
    """D: mean squared error of a grid on a unit Gaussian matrix, in a matrix of this shape."""
    x = jnp.asarray(common.gaussian(*shape, 11))
    return float(jnp.mean((quantize(grid, x, jax.random.key(0)).values - x) ** 2) / jnp.mean(x**2))


def gaussian_noise(d, left, right, h) -> float:
    """D S + D (1 + D) ‖R‖²_F tr H / n."""
    return d * np.trace(right @ h @ right.T) + d * (1 + d) * np.sum(right**2) * np.trace(h) / len(h)


def scalings(left, right, bits: int, family: str) -> dict:
    """The same product in four guises: (L, R, grid of L, grid of R)."""
    grid, norms = by_bits(family, bits), np.linalg.norm(right, axis=1)
    rows = lambda n: Uniform(bits, group=n) if family == "uniform" else ResidualE8P(bits, group=n)
    return {"one scale": (left, right, grid, grid),
            "r^-1/2": (left * np.sqrt(norms), right / np.sqrt(norms)[:, None], grid, grid),
            "scale a row": (left, right, rows(len(left)), rows(right.shape[1])),
            "turned": (*turned(left, right), grid, grid)}


def factorize(a, h, rank, left_bits, right_bits, iterations, turn=False, rounding="nearest") -> float:
    """Loss of the package's LPLR from the closed form, or from its turned factors; or with feedback, which turns."""
    grids, factors = (by_bits("e8p", left_bits), by_bits("e8p", right_bits)), hessians.factor(jnp.asarray(h), 0.0)
    start = lambda *args: Factors(*turned(*rank_constrained(*args))) if turn else rank_constrained(*args)
    with mock.patch.object(lplr, "rank_constrained", start):
        solve = lplr_turned if turn else partial(lplr_factorize, rounding=rounding)
        found = solve(jax.random.key(0), jnp.asarray(a), factors, rank, *grids, iterations)
    return loss(found.dense() - a, h)


def fed_back(a, h, left, right, grid):
    """L R̂ and L̂ R̂ by LDLQ: R̂ with feedback through H, then the best L for it with feedback through G = R̂ H R̂ᵀ."""
    right = np.asarray(ldlq(jnp.asarray(right), grid, hessians.factor(jnp.asarray(h), 0.0, grid.block)).values)
    gram = right @ h @ right.T
    best = np.linalg.solve(gram, right @ h @ a.T).T
    found = ldlq(jnp.asarray(best), grid, hessians.factor(jnp.asarray(gram), 0.0, grid.block))
    return left @ right, np.asarray(found.values) @ right


def sweep(config: Config) -> list[dict]:
    """Measured and predicted cost over bits, families and shapes of A."""
    rows = []
    h = common.hessian("power", config.n, config.seed + 5)
    for kind in ("gaussian", "power", "geometric"):
        a = matrix(kind, config.m, config.n, config.seed)
        left, right, best = closed_form(a, h, config.rank)
        for family in ("dithered", "uniform", "e8p"):
            for bits in config.bits if family != "e8p" else (2, 3, 4):
                grid = by_bits(family, bits)
                draws = range(config.draws if family == "dithered" else 1)
                excess = lambda l, r, g=grid, d=draws, a=a, b=best: float(
                    np.mean([loss(rounded(l, r, g, g, s) - a, h) for s in d])) - b
                d = distortion(grid, right.shape)
                rows.append({"a": kind, "family": family, "bits": bits, "tail": best, "measured": excess(left, right),
                             "turned": excess(*turned(left, right)), "distortion": d,
                             "gaussian": gaussian_noise(d, left, right, h),
                             "first": sum(terms(left, right, h, bits, bits)[:2]),
                             "bound": sum(terms(left, right, h, bits, bits))})
    return rows


def splits(config: Config) -> list[dict]:
    """Rank against precision at one budget, H = I: measured, and tail + 2 D S."""
    rows, h = [], np.eye(config.n)
    for kind in ("geometric", "power", "gaussian"):
        a = matrix(kind, config.m, config.n, config.seed)
        energy = np.linalg.svd(a, compute_uv=False) ** 2
        for bits in LATTICE:
            k, d = config.budget // bits, distortion(by_bits("e8p", bits), (config.rank, config.n))
            rows.append({"a": kind, "bits": bits, "rank": k, "energy": energy.sum(), "tail": energy[k:].sum(),
                         "predicted": energy[k:].sum() + d * (2 + d) * energy[:k].sum(),
                         "measured": [factorize(a, h, k, bits, bits, t) for t in (0, 10)]})
    return rows


def sides(config: Config) -> list[dict]:
    """Bits of L against bits of R from turned factors, tall and wide A, H = I: cost beyond the optimum, over it."""
    rows = []
    for m, n in ((config.n, config.wide), (config.wide, config.n)):
        a = matrix("power", max(m, n), min(m, n), config.seed)
        a = a if m >= n else a.T
        best = closed_form(a, np.eye(n), config.rank)[2]
        rows += [{"m": m, "n": n, "left": bl, "right": br, "excess": [
            factorize(a, np.eye(n), config.rank, bl, br, t, turn=True) / best - 1 for t in (0, 10)]}
            for bl, br in ((2, 4), (4, 2))]
    return rows


def real(config: Config) -> list[dict]:
    """SmolLM2-135M, rotated as the package does: cost of 4-bit factors and the tail, in units of tr(W H Wᵀ)."""
    rows, layers, k, grid = [], common.layers(), config.layer_rank, by_bits("e8p", 4)
    for name in config.layers:
        w, h, _ = common.rotations.rotate(jax.random.key(config.seed), *map(jnp.asarray, layers[name]))
        w, h = np.asarray(w), np.asarray(h) * len(h) / np.trace(h) + 1e-4 * np.eye(len(h))
        (left, right, best), total = closed_form(w, h, k), loss(w, h)
        one, two = (np.asarray(x) for x in turned(left, right))
        cost = lambda product, w=w, h=h, b=best, t=total: (loss(product - w, h) - b) / t
        fed_right, fed_both = fed_back(w, h, one, two, grid)
        noise = gaussian_noise(distortion(grid, right.shape), left, right, h) / total
        rows.append({"layer": name, "tail": best / total, "noise": noise,
                     "closed": cost(rounded(left, right, grid, grid)), "turned": cost(rounded(one, two, grid, grid)),
                     "right": cost(one @ np.asarray(quantize(grid, jnp.asarray(two)).values)),
                     "right_ldlq": cost(fed_right), "both_ldlq": cost(fed_both)})
        for key, turn, rounding in (("lplr", False, "nearest"), ("lplr_turned", True, "nearest"),
                                    ("lplr_feedback", False, "feedback")):
            rows[-1][key], rows[-1][f"{key}_2"] = ([(factorize(w, h, k, bits, bits, t, turn, rounding) - best) / total
                                                    for t in (0, 10)] for bits in (4, 2))
    return rows


def measure(config: Config) -> dict:
    """Bits, scales, splits, sides and real layers."""
    h, scales = np.eye(config.n), []
    for kind in ("power", "geometric", "gaussian"):
        a = matrix(kind, config.m, config.n, config.seed)
        left, right, best = closed_form(a, h, config.rank)
        for family in ("uniform", "e8p"):
            scales.append({"a": kind, "family": family, "tail": best} | {
                name: loss(rounded(*guise) - a, h) - best
                for name, guise in scalings(left, right, 4, family).items()})
    return {"sweep": sweep(config), "scales": scales, "splits": splits(config), "sides": sides(config),
            "layers": real(config)}


def draw(result: dict):
    """Cost over bits, rank against precision, and the criterion on real layers."""
    figure, (first, second, third) = common.axes(3)
    config = result["config"]
    for color, family in zip(("C0", "C1", "C2"), ("dithered", "uniform", "e8p"), strict=True):
        rows = [r for r in result["sweep"] if r["a"] == "power" and r["family"] == family]
        bits = [r["bits"] for r in rows]
        over = lambda key, rows=rows: [r[key] / r["tail"] for r in rows]
        if family == "dithered":
            first.semilogy(bits, over("bound"), color="C3", label="bound, dithered")
            first.semilogy(bits, over("first"), color="C3", linestyle="--", label="its first order")
        first.semilogy(bits, over("measured"), "o", color=color, label=family)
        first.semilogy(bits, over("turned"), "x", color=color, label=f"{family}, turned")
        first.semilogy(bits, over("gaussian"), color=color, linewidth=0.5)
    first.set(xlabel="bits of both factors", ylabel="cost / Σ_{i>k} σᵢ²", ylim=(None, 1e6),
              title=f"{config['m']} x {config['n']}, rank {config['rank']}, power A and H; thin: by D")
    first.legend(ncols=2, loc="upper right")
    for color, kind in zip(("C0", "C1", "C2"), ("geometric", "power", "gaussian"), strict=True):
        rows = [r for r in result["splits"] if r["a"] == kind]
        bits = [r["bits"] for r in rows]
        second.loglog(bits, [r["measured"][1] / r["energy"] for r in rows], "o", color=color, label=kind)
        second.loglog(bits, [r["predicted"] / r["energy"] for r in rows], color=color, label="predicted")
        second.loglog(bits, [r["tail"] / r["energy"] for r in rows], ":", color=color, label="tail")
    second.set(xlabel=f"bits b, rank = {config['budget']}/b", ylabel="loss / ‖A‖²", ylim=(5e-4, 30),
               title="one budget, lplr_factorize, H = I", xticks=LATTICE, xticklabels=LATTICE)
    second.minorticks_off()
    second.legend(ncols=3, loc="upper center")
    x = np.arange(len(result["layers"]))
    get = lambda key: [r[key] for r in result["layers"]]
    for i, (label, values) in enumerate({
            "tail": get("tail"), "noise, by D": get("noise"), "rounded": get("closed"), "turned": get("turned"),
            "LPLR, 10": [r["lplr"][1] for r in result["layers"]],
            "turned, 10": [r["lplr_turned"][1] for r in result["layers"]], "turned, LDLQ": get("both_ldlq"),
            "feedback, 10": [r["lplr_feedback"][1] for r in result["layers"]]}.items()):
        third.bar(x + 0.11 * (i - 3.5), values, 0.11, label=label)
    third.set(yscale="log", xticks=x, xticklabels=config["layers"], ylabel="share of tr(W H Wᵀ)", ylim=(1e-3, 10),
              title=f"SmolLM2-135M block 14, rank {config['layer_rank']}, 4 bits")
    third.legend(ncols=3, loc="upper center")
    return figure


SHAPE, RANK = (24, 40), 5


def problem(kind: str):
    """A 24 x 40, H, and the closed form: L, R, tail."""
    a, h = matrix(kind, *SHAPE), common.hessian("power", SHAPE[1], 5)
    return a, h, *closed_form(a, h, RANK)


def sparse(m: int, n: int, rank: int):
    """Factors whose zeros lie midway between two levels of every grid, where the variance is Δ²/4: L = I, R = I."""
    return np.eye(m)[:, :rank], np.eye(n)[:rank]


def dithered(a, h, left, right, left_bits, right_bits, draws=150) -> np.ndarray:
    """Losses over draws of the dither."""
    return np.array([loss(rounded(left, right, Dithered(left_bits), Dithered(right_bits), seed) - a, h)
                     for seed in range(draws)])


@pytest.mark.parametrize("bits", [(2, 2), (2, 6), (6, 2)])
@pytest.mark.parametrize("kind", ["gaussian", "power"])
def test_dithering_costs_the_three_terms_and_no_more_than_their_bounds(kind, bits):
    a, h, left, right, best = problem(kind)
    losses, wanted, bounds = dithered(a, h, left, right, *bits), expected(left, right, h, *bits), terms(
        left, right, h, *bits)
    error = 5 * losses.std(ddof=1) / np.sqrt(len(losses))
    assert abs(losses.mean() - best - sum(wanted)) <= error
    assert all(term <= limit for term, limit in zip(wanted, bounds, strict=True))
    assert losses.mean() - best <= sum(bounds) + error
    if bits == (2, 2):  # the second order is there
        assert losses.mean() - best - wanted[0] - wanted[1] > error


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_sparse_factors_meet_the_bound_and_break_the_first_order_formula(bits):
    m, k = 40, 4  # m = n and H = I: a = b
    left, right = sparse(m, m, k)
    losses, h = dithered(left @ right, np.eye(m), left, right, bits, bits, 100), np.eye(m)
    error = 5 * losses.std(ddof=1) / 10
    bounds = terms(left, right, h, bits, bits)
    assert sum(bounds) * (1 - 1 / m) ** 2 - error <= losses.mean() <= sum(bounds) + error  # all but the ones are midway
    epsilon = 2 * bounds[0]
    np.testing.assert_allclose(bits_needed(epsilon, left, right, h), bits)  # what the formula asks for
    assert losses.mean() > epsilon + error or bits == 4
    np.testing.assert_allclose(sum(bounds), epsilon * (1 + epsilon / (4 * k)))
    needed = bits_needed(corrected(sum(bounds), k), left, right, h)
    np.testing.assert_allclose(needed, bits)  # with the correction the same bits promise no more than they keep


@pytest.mark.parametrize("share", [0.5, 0.375])
def test_corrected_bits_keep_epsilon(share):
    for kind in ("gaussian", "power"):
        a, h, left, right, best = problem(kind)
        energy = float(np.trace(right @ h @ right.T))
        for fraction in (0.03, 0.3, 3.0):
            bits = [int(np.ceil(b)) for b in bits_needed(corrected(fraction * energy, energy), left, right, h, share)]
            losses = dithered(a, h, left, right, *bits, draws=40)
            assert losses.mean() - best <= fraction * energy + 5 * losses.std(ddof=1) / np.sqrt(40)
            assert sum(terms(left, right, h, *bits)) <= fraction * energy * (1 + 1e-9)


def test_shares_of_m_to_n_take_the_fewest_bits():
    _, h, left, right, _ = problem("power")
    cost = lambda share: np.dot(SHAPE, bits_needed(1e-6, left, right, h, share))  # 2^B >> 1, where the shares are exact
    best = cost(SHAPE[0] / sum(SHAPE))
    assert all(cost(share) > best for share in (0.1, 0.3, 0.45, 0.5, 0.7))
    assert cost(0.5) - best < 0.03 * sum(SHAPE)  # and little is at stake


def test_rounding_r_is_an_ldlq_problem_and_so_is_rounding_l():
    a, grid = matrix("power", 48, 40), by_bits("uniform", 4)
    h = common.hessian("geometric", 40)
    left, right, best = closed_form(a, h, 16)
    one, two = (np.asarray(x) for x in turned(left, right))
    fed_right, fed_both = fed_back(a, h, one, two, grid)
    nearest = one @ np.asarray(quantize(grid, jnp.asarray(two)).values)
    delta = np.linalg.lstsq(one, nearest, rcond=None)[0] - two
    np.testing.assert_allclose(loss(nearest - a, h) - best, loss(delta, h), rtol=1e-6)  # LᵀL = I, and A − LR is off L
    assert loss(fed_right - a, h) - best < 0.5 * (loss(nearest - a, h) - best)
    assert loss(fed_both - a, h) < loss(rounded(one, two, grid, grid) - a, h)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("kind", ["power", "geometric"])
def test_the_package_with_feedback_leaves_less_noise_than_without(kind, bits):
    a, h = matrix(kind, 48, 40), common.hessian("power", 40)
    best = closed_form(a, h, 8)[2]
    plain, fed = (factorize(a, h, 8, bits, bits, 10, rounding=rounding) - best for rounding in ("nearest", "feedback"))
    assert fed < 0.7 * plain


def test_one_factor_between_l_and_r_changes_neither_the_formula_nor_the_rounding():
    a, h, left, right, _ = problem("power")
    for grid in (by_bits("uniform", 4), by_bits("e8p", 4)):
        np.testing.assert_allclose(rounded(left * 8, right / 8, grid, grid), rounded(left, right, grid, grid))
    np.testing.assert_allclose(bits_needed(0.1, left * 8, right / 8, h), bits_needed(0.1, left, right, h))
    np.testing.assert_allclose(terms(left * 8, right / 8, h, 3, 3), terms(left, right, h, 3, 3))


@pytest.mark.parametrize("family", ["uniform", "e8p"])
def test_one_scale_rounds_small_directions_coarsely_and_turning_the_factors_mends_it(family):
    a, h = matrix("power", 64, 64), np.eye(64)
    left, right, best = closed_form(a, h, 16)
    cost = {name: loss(rounded(*guise) - a, h) - best for name, guise in scalings(left, right, 4, family).items()}
    norms = np.linalg.norm(right, axis=1)
    assert np.sum(norms**2) + 16 * norms[0] ** 2 >= 2 * norms[0] * norms.sum()
    assert max(cost["scale a row"], cost["turned"]) < 0.6 * cost["one scale"]
    assert cost["r^-1/2"] < cost["one scale"] or family == "e8p"  # a lattice scaled by its RMS clips L in place of R
    d = distortion(by_bits(family, 4), (16, 64))  # of entries that are Gaussian only nearly: within a fifth
    np.testing.assert_allclose(cost["turned"], gaussian_noise(d, left, right, h), rtol=0.2)


@pytest.mark.parametrize("family", ["dithered", "uniform"])
def test_the_cost_falls_as_the_square_of_the_step(family):
    a, h, left, right, best = problem("gaussian")
    cost = [np.mean([loss(rounded(left, right, grid, grid, s) - a, h) for s in range(20)]) - best
            for grid in (by_bits(family, 8), by_bits(family, 10))]
    exact = ((2**10 - 1) / (2**8 - 1)) ** 2
    assert float(fit_scale(Dithered(8), jnp.asarray(right))[0, 0]) == np.abs(right).max()
    assert exact * 0.6 < cost[0] / cost[1] < exact * 1.6  # one rounding of 320 entries: ±5 √(2/320)
    share = cost[0] / sum(terms(left, right, h, 8, 8))
    assert abs(share / {"dithered": 2 / 3, "uniform": 1 / 3}[family] - 1) < 0.4  # Δ²/6 and Δ²/12 over Δ²/4


if __name__ == "__main__":
    common.run(__file__, Config(), measure, draw)
