"""A randomized Hadamard transform bounds every entry, as QuIP#'s Lemma 3.1 says; it does not make the entries Gaussian.

Statement (arXiv 2402.04396, Lemma 3.1).  W' = U W Vᵀ, H' = V H Vᵀ, U and V a Hadamard matrix over the root of its order
after random signs.  For any fixed W [m, n] and H, with probability at least 1 − δ each (μ as in objective.incoherence)

    μ_W <= 2 log(4 m n / δ),        μ_H <= sqrt(2 log(2 n² / δ)).

Where ``hadamard.factor`` falls back on cosines (entries up to sqrt(2/n)): a factor sqrt(2) more for each such side.
  One transform is not enough for a Gaussian marginal, two are, up to O(d^{-1/2}) in Kolmogorov distance for every input
of size d, and blocks of coordinates want three (arXiv 2605.06014, of which the abstract was read).

Assumptions.  Independent fair signs, W and H fixed before they are drawn, flat T (|T_ij| = 1/√n).

Proof (derived here: the lemma's statement was at hand, its full proof in the paper was not).  One entry of V q,
‖q‖ = 1, is Σ_b T_ib s_b q_b, a Rademacher sum of variance Σ T_ib² q_b² = 1/n: by Hoeffding P(|(V q)_i| > t/√n) <=
2 exp(−t²/2); n² entries of n eigenvectors give μ_H.  W: the same on the right for all m n entries of W Vᵀ, at δ/2,
gives |(W Vᵀ)_aj| <= ‖W_a‖ sqrt(2 log(4mn/δ)/n): its columns have norm at most ‖W‖_F sqrt(2 log(4mn/δ)/n).  Given V,
the same on the left at δ/2: |W'_ij| <= ‖(W Vᵀ)_j‖ sqrt(2 log(4mn/δ)/m).  The product is the claim.
  Marginals, derived here.  A spike becomes flat (±1 in units of the RMS): Kolmogorov distance Φ(1) − 1/2 = 0.341.  Two
equal entries, e_0 + e_c, become 0 (half of the coordinates) and ±√2: 0.25.  A second transform sums d, or d/2, fair
signs: a binomial, at distance 1/√(2πd), or 1/√(πd): the rate d^{-1/2} is attained.  But (Sylvester) the half that is
not 0 is {b: b·c even} or {b: b·c odd}, on which rows i and i⊕c of T agree up to one sign: after two transforms
coordinates i and i⊕c still have equal magnitude.  A third parts them.

Verdict.  The lemma holds: at δ = 0.01, n = 64 and 8192 draws μ_W never and μ_H once exceeded it.  For μ_H it is near
the truth (Haar eigenvectors, δ = 0.01: 4.4 against 5.2).  For μ_W it is loose, 28.6 against 4.7 for a Gaussian W and
11.2 for a constant one, but its log without a root is not slack: a constant W becomes a product of two Gaussian
vectors and exceeds sqrt(2 log(2mn/δ)), the bound for Gaussian entries, in 99 % of the draws at δ = 0.5.  Without signs
both bounds fail.  At the odd width 45 the bounds hold even without the factors sqrt(2).
  Quantizers do not feel the Kolmogorov distance alone.  At 2 bits a uniform quantizer loses 0.244 on a spike after one
transform and 0.119, as on a Gaussian, after two.  E8P (Gaussian: 0.0915) gains from one: 0.074 on a spike and 0.050 on
e_0 + e_1, whose patterns happen to lie near codewords; after *two* the tied neighbours of e_0 + e_1 cost 0.110, at any
d, and three give 0.091.  So more transforms are not always better, and the tie is why blocks need three.
"""

from dataclasses import dataclass
from functools import partial

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, random
from scipy import stats

from caldera_jax import E8P, Codebook, Uniform, codebooks, hadamard, incoherence, objective


@dataclass(frozen=True)
class Config:
    """Sizes of the sweep: the widths are Sylvester, two with constructed factors (12, 36), and a cosine one."""

    widths: tuple[int, ...] = (64, 48, 72, 45)
    tail_draws: int = 8192
    sizes: tuple[int, ...] = (16, 64, 256, 1024, 4096)
    entries: int = 2**21
    rounds: tuple[int, ...] = (1, 2, 3)
    quantizers: tuple[Codebook, ...] = (E8P(), Uniform(2, clip=1.4935))
    seed: int = 0


WEIGHTS = {"spike": lambda n: np.eye(1, n * n, n + 3).reshape(n, n), "constant": lambda n: np.ones((n, n)),
           "gaussian": lambda n: common.gaussian(n, n), "heavy-tailed": lambda n: common.heavy_tailed(n, n)}
BASES = {"axes": np.eye, "constant": lambda n: np.linalg.qr(np.c_[np.ones(n), np.eye(n)[:, 1:]])[0],
         "Haar": lambda n: common.orthogonal(n, 0)}
SPARSE = {"spike": (0,), "two": (0, 1), "two far": (0, 9)}  # positions of the equal nonzeros


def bound_weight(delta, m: int, n: int):
    """μ_W of the lemma."""
    return 2 * np.log(4 * m * n / delta)


def bound_hessian(delta, n: int):
    """μ_H of the lemma."""
    return np.sqrt(2 * np.log(2 * n**2 / delta))


def cosine_sides(*sizes: int) -> float:
    """sqrt(2) for every side whose transform falls back on cosines."""
    return np.sqrt(2) ** sum(hadamard.factor(n)[2] == "cosine" for n in sizes)


@partial(jax.jit, static_argnums=2)
def draws_weight(key, w, count: int):
    """μ of W under ``count`` random rotations by the package."""
    def one(key):
        rotated = incoherence.rotate_weight(incoherence.draw(key, *w.shape, dtype=w.dtype), w)
        return jnp.abs(rotated).max() * jnp.sqrt(w.size / jnp.sum(w**2))
    return lax.map(one, random.split(key, count), batch_size=128)


@partial(jax.jit, static_argnums=2)
def draws_hessian(key, basis, count: int):
    """μ of the eigenvectors (columns of ``basis``) under ``count`` random rotations by the package."""
    n = len(basis)
    def one(key):
        right = incoherence.draw(key, 1, n, dtype=basis.dtype).right
        return jnp.sqrt(1.0 * n) * jnp.abs(incoherence.forward(right, basis.T)).max()
    return lax.map(one, random.split(key, count), batch_size=128)


@partial(jax.jit, static_argnums=(1, 2, 3))
def transformed(key, positions: tuple[int, ...], shape: tuple[int, int], rounds: int):
    """Rows of unit mean square: equal entries at ``positions``, through ``rounds`` independent transforms."""
    x = jnp.zeros(shape).at[:, jnp.array(positions)].set(np.sqrt(shape[1] / len(positions)))
    for one in random.split(key, rounds):
        x = hadamard.transform(random.rademacher(one, shape, x.dtype) * x)
    return x


def kolmogorov(x) -> float:
    """sup |F − Φ|, F the empirical distribution of all entries; values equal up to rounding are one."""
    values, counts = np.unique(np.round(np.asarray(x).ravel(), 9), return_counts=True)
    above = np.cumsum(counts) / counts.sum()
    phi = stats.norm.cdf(values)
    return float(max(np.abs(above - phi).max(), np.abs(above - counts / counts.sum() - phi).max()))


def predicted(name: str, size: int, rounds: int) -> float | None:
    """The distance derived above; None after three rounds."""
    terms = size if name == "spike" else size // 2
    if rounds != 2:
        return None if rounds > 2 else stats.norm.cdf(1) - 0.5 if name == "spike" else 0.25
    atoms = np.arange(terms + 1)
    phi, law = stats.norm.cdf((2 * atoms - terms) / np.sqrt(terms)), stats.binom(terms, 0.5)
    return float(np.maximum(np.abs(law.cdf(atoms) - phi), np.abs(law.cdf(atoms - 1) - phi)).max())


def tied(x, offset: int) -> float:
    """Correlation of the squares of coordinates i and i xor ``offset``."""
    squares = np.asarray(x) ** 2
    a, b = squares - squares.mean(), squares[:, np.arange(squares.shape[1]) ^ offset] - squares.mean()
    return float((a * b).mean() / (a * a).mean()) if (a * a).mean() > 1e-12 else 1.0


def measure(config: Config) -> dict:
    """Tails of μ_W and μ_H; then distance from a Gaussian, tied coordinates and quantization error by rounds."""
    key, tails, marginals = random.key(config.seed), [], []
    levels = np.array([0.5, 0.1, 0.01, 1e-3])
    count = config.tail_draws
    shown = np.unique(np.r_[np.geomspace(1, count, 40).astype(int), np.linspace(1, count, 20).astype(int)])
    for n in config.widths:
        cases = [("W", name, draws_weight(key, jnp.asarray(make(n)), count)) for name, make in WEIGHTS.items()]
        cases += [("H", name, draws_hessian(key, jnp.asarray(make(n)), count)) for name, make in BASES.items()]
        for side, name, mu in cases:
            mu = np.sort(np.asarray(mu))
            bounds = bound_weight(levels, n, n) if side == "W" else bound_hessian(levels, n)
            row = {"side": side, "name": name, "n": n, "transform": hadamard.factor(n)[2], "delta": levels.tolist(),
                   "bound": bounds.tolist(), "exceed": [float((mu > b).mean()) for b in bounds],
                   "exceed_one_log": [float((mu > np.sqrt(2 * np.log(2 * n * n / d))).mean()) for d in levels],
                   "quantile": [float(np.quantile(mu, 1 - d)) for d in levels], "largest": float(mu[-1])}
            tail = {"mu": mu[count - shown].tolist(), "share": (shown / count).tolist()}
            tails.append(row | (tail if n == config.widths[0] else {}))
    normal = common.gaussian(4096, 256, config.seed)
    for name, positions in SPARSE.items():
        for size in config.sizes:
            for rounds in config.rounds:
                x = transformed(key, positions, (config.entries // size, size), rounds)
                found = [codebooks.quantize(grid, x).values for grid in config.quantizers]
                marginals.append({"name": name, "size": size, "rounds": rounds, "kolmogorov": kolmogorov(x),
                                  "predicted": predicted(name, size, rounds),
                                  "tied": tied(x, positions[-1] or 1),
                                  "mse": [float(jnp.mean((q - x) ** 2)) for q in found]})
    grids = [codebooks.quantize(grid, jnp.asarray(normal)).values for grid in config.quantizers]
    return {"tails": tails, "marginals": marginals, "quantizers": [type(g).__name__ for g in config.quantizers],
            "gaussian_mse": [float(np.mean((np.asarray(q) - normal) ** 2) / np.mean(normal**2)) for q in grids]}


def draw(result: dict):
    """Tails of μ_W and μ_H against the lemma; Kolmogorov distance and E8P's error by the number of transforms."""
    figure, (weight, hessian, distance, error) = common.axes(2, 2)
    n = result["config"]["widths"][0]
    delta = np.logspace(-4, 0)
    for axis, side, bound in ((weight, "W", bound_weight(delta, n, n)), (hessian, "H", bound_hessian(delta, n))):
        for i, row in enumerate(r for r in result["tails"] if r["side"] == side and r["n"] == n):
            axis.semilogy(row["mu"], row["share"], ".-", color=f"C{i}", label=row["name"])
        axis.semilogy(bound, delta, "k--", label="Lemma 3.1")
        axis.set(xlabel=f"μ_{side}", ylabel="P(at least)", title=f"{side} {n} x {n}, one transform a side",
                 ylim=(8e-5, 2))
        axis.legend(loc="lower left")
    hessian.set(xlim=(-1.4, 6.3), xticks=range(1, 7))
    weight.semilogy(np.sqrt(2 * np.log(2 * n * n / delta)), delta, "k:", linewidth=0.7, label="Gaussian entries")
    weight.legend(loc="upper right")
    weight.set_xlim(0, 50)
    for i, rounds in enumerate(result["config"]["rounds"]):
        for name, style in (("spike", "o-"), ("two", "s--")):
            rows = [r for r in result["marginals"] if r["name"] == name and r["rounds"] == rounds]
            sizes = [r["size"] for r in rows]
            distance.loglog(sizes, [r["kolmogorov"] for r in rows], style, color=f"C{i}", label=f"{rounds}, {name}")
            error.semilogx(sizes, [r["mse"][0] for r in rows], style, color=f"C{i}", label=f"{rounds}, {name}")
    distance.loglog(sizes, 1 / np.sqrt(np.pi * np.array(sizes)), "k:", linewidth=0.7, label="(πd)^-1/2")
    distance.axhline(0.5 / np.sqrt(result["config"]["entries"]), color="0.7", linewidth=0.7, label="sampling")
    distance.set(xlabel="size d", ylabel="Kolmogorov distance", title="from N(0, 1), after 1, 2, 3 transforms",
                 ylim=(1e-5, 1))
    distance.legend(loc="lower left", ncols=2)
    error.axhline(result["gaussian_mse"][0], color="k", linestyle=":", linewidth=0.7, label="Gaussian")
    error.set(xlabel="size d", ylabel="mean squared error", title="E8P, 2 bits, after 1, 2, 3 transforms",
              ylim=(0.045, 0.145))
    error.legend(ncols=3, loc="upper center")
    return figure


@pytest.mark.parametrize("n", [64, 72, 45])
def test_the_lemma_holds_at_every_delta_and_width(n):
    count, key = 512, random.key(1)
    weights = {name: np.asarray(draws_weight(key, jnp.asarray(make(n)), count)) for name, make in WEIGHTS.items()}
    bases = {name: np.asarray(draws_hessian(key, jnp.asarray(make(n)), count)) for name, make in BASES.items()}
    for delta in (0.9, 0.5, 0.1, 0.01):
        allowed = stats.binom.ppf(1 - 1e-6, count, delta)  # exceedances that probability delta would still explain
        for name, mu in weights.items():
            assert np.sum(mu > cosine_sides(n, n) * bound_weight(delta, n, n)) <= allowed, name
        for name, mu in bases.items():
            assert np.sum(mu > cosine_sides(n) * bound_hessian(delta, n)) <= allowed, name
    if hadamard.factor(n)[2] != "cosine":  # one nonzero becomes flat
        np.testing.assert_allclose(weights["spike"], 1, rtol=1e-12)
        np.testing.assert_allclose(bases["axes"], 1, rtol=1e-12)
        # the bound for Gaussian entries is none for W: a constant W becomes a product of two Gaussian vectors
        assert np.sum(weights["constant"] > bound_hessian(0.5, n)) > 1.5 * 0.5 * count
    else:
        assert 1.9 < weights["spike"].max() <= 2 * (1 + 1e-12) and 1.4 < bases["axes"].max() <= np.sqrt(2) * (1 + 1e-12)


@jax.jit
def halves(key, w):
    left, right = incoherence.draw(key, *w.shape, dtype=w.dtype)
    half = incoherence.forward(right, w)
    return half, incoherence.forward(left, half.T).T


def test_each_of_the_two_steps_holds_for_weights_that_are_not_square():
    w = jnp.asarray(common.heavy_tailed(40, 48))
    m, n = w.shape
    for delta in (0.9, 0.1):
        step = np.sqrt(2 * np.log(4 * m * n / delta))
        for seed in range(20):
            half, both = (np.asarray(a) for a in halves(random.key(seed), w))
            norms = np.linalg.norm(half, axis=0)
            assert (np.abs(half) <= step * np.linalg.norm(w, axis=1)[:, None] / np.sqrt(n)).all()
            assert norms.max() <= step * np.linalg.norm(w) / np.sqrt(n)
            assert (np.abs(both) <= step * norms / np.sqrt(m)).all()
        np.testing.assert_allclose(step**2, bound_weight(delta, m, n))


def test_hoeffding_on_one_entry_is_met_within_a_third_by_two_equal_numbers():
    x = np.asarray(transformed(random.key(2), (0, 5), (512, 64), 1))
    for t in (0.5, 1.0, 1.4):
        assert (np.abs(x) > t).mean() <= 2 * np.exp(-t**2 / 2)
    share = (np.abs(x) > 1.4).mean(axis=1)
    np.testing.assert_allclose(share, 0.5, rtol=1e-12)  # half the coordinates, in every draw
    assert (share > 0.66 * 2 * np.exp(-1.4**2 / 2)).all() and (share > 2 * np.exp(-1.4**2)).all()  # not 2 exp(−t²)


def test_the_verifier_measures_what_the_tails_do():
    w, h = jnp.asarray(common.heavy_tailed(40, 48)), jnp.asarray(common.hessian("power", 48))
    mu_w = np.asarray(draws_weight(random.key(4), w, 3))
    for key, expected in zip(random.split(random.key(4), 3), mu_w, strict=True):
        rotated, turned, rotation = incoherence.rotate(key, w, h)
        found = objective.incoherence(rotated, turned)
        vectors = np.linalg.eigh(np.asarray(h))[1]
        np.testing.assert_allclose(found.weight, expected, rtol=1e-12)
        images = np.asarray(incoherence.forward(rotation.right, jnp.asarray(vectors.T)))
        np.testing.assert_allclose(found.hessian, np.sqrt(48) * np.abs(images).max(), rtol=1e-7)  # ε over the gaps


def test_constructed_factors_are_orthogonal_and_flat_and_cosines_are_at_most_sqrt_2_higher():
    for order in (1, 2, 12, 20, 28, 36, 44, 52, 60):
        matrix = hadamard.hadamard_matrix(order).astype(int)
        np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order, dtype=int))
    for n in (64, 48, 72, 576):
        t = np.asarray(hadamard.transform(jnp.eye(n)))
        np.testing.assert_allclose(t @ t.T, np.eye(n), atol=1e-12)
        np.testing.assert_allclose(np.abs(t), 1 / np.sqrt(n), rtol=1e-12)
    t = np.asarray(hadamard.transform(jnp.eye(90)))
    np.testing.assert_allclose(t @ t.T, np.eye(90), atol=1e-12)
    assert 1.4 / np.sqrt(90) < np.abs(t).max() <= np.sqrt(2 / 90) * (1 + 1e-12)


@pytest.mark.parametrize("n", [64, 72])
def test_without_signs_the_adversary_wins(n):
    spike, h = jnp.asarray(WEIGHTS["spike"](n)), jnp.diag(jnp.arange(1.0, n + 1))
    rotated, turned, _ = incoherence.rotate(random.key(0), spike, h, "none")
    found = objective.incoherence(rotated, turned)
    assert found.weight > bound_weight(0.01, n, n) and found.hessian > bound_hessian(0.01, n)
    bare = incoherence.Rotation(jnp.ones(n), jnp.ones(n))
    row = hadamard.inverse(jnp.eye(n)[3])  # flat; its bare transform is a spike
    worst = incoherence.rotate_weight(bare, jnp.outer(row, row))
    vectors = hadamard.inverse(jnp.eye(n))  # rows: the rows of T, which T takes to the axes
    turned = incoherence.rotate_hessian(bare.right, vectors.T @ jnp.diag(jnp.arange(1.0, n + 1)) @ vectors)
    found = objective.incoherence(worst, turned)
    assert found.weight > bound_weight(0.01, n, n) and found.hessian > bound_hessian(0.01, n)
    signed, _, _ = incoherence.rotate(random.key(0), jnp.outer(row, row), jnp.eye(n))
    assert objective.incoherence(signed, np.eye(n)).weight < bound_weight(0.01, n, n)


@pytest.mark.parametrize("name", ["spike", "two"])
def test_one_transform_leaves_two_or_three_values_and_two_leave_a_binomial_at_distance_d_to_the_minus_half(name):
    draws = 2048
    for size in (16, 64):
        x = np.asarray(transformed(random.key(6), SPARSE[name], (draws, size), 1))
        assert len(np.unique(np.round(x, 9))) == (2 if name == "spike" else 3)
        assert kolmogorov(x) > predicted(name, size, 1) - 1e-9 > 0.24
        x = np.asarray(transformed(random.key(7), SPARSE[name], (draws, size), 2))
        terms = size if name == "spike" else size // 2
        for atom in range(terms):  # P(x <= midpoint) a row against the exact law, z = 5; rows are independent
            below = (x < (2 * atom + 1 - terms) / np.sqrt(terms)).mean(axis=1)
            error = 5 * below.std() / np.sqrt(draws) + 16 / (draws * size)  # 16: e^-16, no event where 16 were due
            assert abs(below.mean() - stats.binom.cdf(atom, terms, 0.5)) <= error, (size, atom)
        np.testing.assert_allclose(predicted(name, size, 2), 1 / np.sqrt(2 * np.pi * terms), rtol=2 / terms)
        x = transformed(random.key(8), SPARSE[name], (draws, size), 3)
        assert kolmogorov(x) < predicted(name, size, 2) * (0.9 if size == 16 else 0.5)


def test_after_two_transforms_of_a_pair_coordinates_keep_equal_magnitudes_until_a_third():
    for offset, name in ((1, "two"), (9, "two far")):
        x = np.asarray(transformed(random.key(9), SPARSE[name], (2048, 64), 2))
        np.testing.assert_allclose(np.abs(x), np.abs(x[:, np.arange(64) ^ offset]), atol=1e-12)
        assert tied(x, offset) > 1 - 1e-9 and abs(tied(x, 2)) < 0.1
        assert tied(np.asarray(transformed(random.key(9), SPARSE[name], (2048, 64), 3)), offset) < 0.2


if __name__ == "__main__":
    common.run(__file__, Config(), measure, draw)
