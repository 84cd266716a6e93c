"""CALDERA's Theorem 4.1: its first inequality is an identity plus the factors' cost, its closed form says nothing new.

Statement (arXiv 2405.18886, Theorem 4.1, second hand; in our letters, times m, H undamped, W − LR rounded by LDLQ with
a uniformly dithered grid of B bits on [−R, R], v = R²/(2^B − 1)² the largest variance of its errors η):

    E tr(E H Eᵀ) <= Σ_{i>k} E λᵢ(η D ηᵀ) + m ε  ≲  m (4 n λ_max v / π) (1 − k/2m)² + m ε,    E = Q + LR − W.

(i)   λᵢ(η D ηᵀ) = σᵢ((W − Q) H^½)² exactly, so the first step is Lemma 4.2 for W − Q, plus ε, what rounding L and R
      costs; with unrounded factors it is an equality.
(ii)  The printed closed form holds, but already Σ_{i>k} λᵢ <= (1 − k/min(m, n)) Σ λᵢ, trivially, gives
      m n λ_max v (1 − k/min(m, n)), less than the printed form at every k, by 4/π at k = 0.
(iii) What (1 − k/2m)² stands for is the tail of a Marchenko–Pastur law: Σ_{i>k} σᵢ(η)² -> m n v τ_MP(k/m, n/m).
(iv)  The printed form is below that of plain LDLQ, m n λ_max v, only for k > (2 − √π) m = 0.2275 m: at m = 4096
      from k = 933, and at the published k = 64, 128, 256 it exceeds it.
CALDERA beats plain LDLQ, Q being the same, iff m ε < Σ_{i<=k} E λᵢ(η D ηᵀ).

Assumptions.  No target leaves [−R, R] (feedback widens them: R is at least their largest, not W's); E over the dither.

Proof.  (i) (W − Q) L_H = −η for H = L_H D L_Hᵀ (LDLQ identity), so (W − Q) H (W − Q)ᵀ = η D ηᵀ; now Lemma 4.2.
(ii) Of at most min(m, n) numbers in falling order, the first k hold k/min(m, n) of the sum or more; E tr(η D ηᵀ) <=
m v tr D <= m n λ_max v; and 1 − k/m <= (1 − k/2m)² < (4/π) (1 − k/2m)².  (iii) σᵢ(η D^½) <= √D_max σᵢ(η), and the
spectrum of ηηᵀ/n converges.  (iv) (4/π) (1 − k/2m)² < 1.

Verdict: (i) exact; (ii) true and vacuous: weaker than the trivial bound at every rank; loose on real layers by
λ_max n / tr D, 191 (down) to 2206 (q, k, v), besides.  With H = I the Marchenko–Pastur tail is 1.5 times the mean loss
at every rank: dithering has 2/3 of its largest variance on average.  At n = m = 4096 and k = 64, 128, 256 the printed
form is 1.25, 1.23, 1.19 of plain LDLQ's bound, the Marchenko–Pastur tail 0.94, 0.89, 0.79.
"""

from dataclasses import dataclass
from functools import partial

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from caldera_jax import Dithered, hessian
from caldera_jax.codebooks import quantize
from caldera_jax.ldlq import block_ldlq
from caldera_jax.objective import caldera_bound, feedback_trace, proxy_loss
from caldera_jax.regression import rank_constrained


@dataclass(frozen=True)
class Config:
    """The curves: error and bounds over rank, for each number of bits, spectrum of H and shape."""

    shapes: tuple[tuple[int, int], ...] = ((128, 128), (96, 192), (192, 96))
    bits: tuple[int, ...] = (4, 6)
    spectra: tuple[str, ...] = ("flat", "geometric", "power")
    parts: int = 16  # ranks are multiples of min(m, n) / parts
    draws: int = 4
    damping: float = 0.01
    published: tuple[int, ...] = (64, 128, 256)
    width: int = 4096
    seed: int = 0


@partial(jax.jit, static_argnums=4)
def dithered_ldlq(w, lower, radius, key, bits: int):
    """LDLQ on the package's dithered grid on [−R, R], another dither for every column."""
    grid = Dithered(bits)

    def round_columns(target, start):
        values, codes = grid.round(target / radius, jax.random.fold_in(key, start))
        return values * radius, codes

    return block_ldlq(w, lower, round_columns, 1)[0]


def marchenko_pastur_tail(part: float, ratio: float) -> float:
    """τ_MP(k/m, n/m): the share of ‖η‖²_F beyond the k leading singular values of η [m, n], i.i.d., m -> ∞."""
    small, y = min(1.0, ratio), min(ratio, 1 / ratio)  # of the min(m, n) eigenvalues; aspect ratio y <= 1
    if part >= small:
        return 0.0
    low, high = (1 - np.sqrt(y)) ** 2, (1 + np.sqrt(y)) ** 2
    angle = np.linspace(0, np.pi, 20001)  # x = middle − half cos: no square root at the edges
    x = (low + high) / 2 - (high - low) / 2 * np.cos(angle)
    with np.errstate(divide="ignore", invalid="ignore"):
        density = ((high - low) / 2 * np.sin(angle)) ** 2 / (2 * np.pi * y * x)
    density = np.where(x > 0, density, 0)
    count = integrate.cumulative_simpson(density, x=angle, initial=0)
    energy = integrate.cumulative_simpson(density * x, x=angle, initial=0)
    return float(np.interp(1 - part / small, count / count[-1], energy / energy[-1]))


def bounds(h: np.ndarray, m: int, rank: int, bits: int, radius: float) -> dict[str, float]:
    """The chain of bounds on E Σ_{i>k} λᵢ(η D ηᵀ): from the mean of tr D to the printed closed form."""
    n, variance = len(h), (radius / (2**bits - 1)) ** 2
    rest, top = 1 - rank / min(m, n), float(np.linalg.eigvalsh(h)[-1])
    return {"averaging": m * variance * feedback_trace(h) * rest, "trivial": m * n * top * variance * rest,
            "marchenko_pastur": m * n * top * variance * marchenko_pastur_tail(rank / m, n / m),
            "printed": caldera_bound(h, m, rank, bits, radius), "ldlq": m * n * top * variance}


def crossing(m: int) -> float:
    """(iv): the rank from which the printed form is below that of plain LDLQ."""
    return (2 - np.sqrt(np.pi)) * m


def instance(m: int, n: int, kind: str, damping: float, seed: int):
    """W with entries of RMS 1, and the factors of a damped H."""
    w = jnp.asarray(common.gaussian(m, n, seed))
    return w, hessian.factor(jnp.asarray(common.hessian(kind, n, seed)), damping)


def quantized(w, factors, bits: int, seed: int):
    """Q, its errors η = (Q − W) L and a range that no target leaves.

    A wider range has a wider step, whose errors widen the targets again: below about 4 bits, where feedback is strong,
    no range is wide enough, and the theorem has no instance.  ValueError then.
    """
    radius = 4.0
    for _ in range(16):
        q = dithered_ldlq(w, factors.lower, radius, jax.random.key(seed), bits)
        eta = (q - w) @ factors.lower
        if float(jnp.abs(q - eta).max()) <= radius:
            return np.asarray(q), np.asarray(eta), radius
        radius *= 1.25
    raise ValueError(f"no range up to {radius:.0f} holds the targets of {bits} bits: use more bits or damping")


def measure(config: Config) -> dict:
    """Mean loss of Q and of Q + LR with unrounded factors, over ranks, against every bound."""
    rows = []
    for m, n in config.shapes:
        for kind in config.spectra:
            w, factors = instance(m, n, kind, config.damping, config.seed)
            h = np.asarray(factors.root @ factors.root.T)
            for bits in config.bits:
                tails, radius = [], 0.0
                for draw in range(config.draws):
                    q, eta, radius = quantized(w, factors, bits, draw)
                    energy = np.linalg.svd((w - q) @ factors.root, compute_uv=False) ** 2
                    tails.append(np.append(np.cumsum(energy[::-1])[::-1], 0.0))
                ranks = [i * min(m, n) // config.parts for i in range(config.parts + 1)]
                rows.append({"m": m, "n": n, "spectrum": kind, "bits": bits, "radius": radius, "ranks": ranks,
                             "loss": [float(np.mean(tails, axis=0)[k]) for k in ranks],
                             "bounds": [bounds(h, m, k, bits, radius) for k in ranks]})
    width = config.width
    at_width = [{"rank": k, "printed_over_ldlq": 4 / np.pi * (1 - k / (2 * width)) ** 2,
                 "marchenko_pastur_over_ldlq": marchenko_pastur_tail(k / width, 1.0)} for k in config.published]
    real = []
    for name, (_, h) in common.layers().items():
        damped = h + 0.01 * np.eye(len(h))
        real.append({"layer": name, "loose": float(np.linalg.eigvalsh(damped)[-1] * len(h) / feedback_trace(damped))})
    return {"rows": rows, "crossing_over_m": crossing(1), "crossing": crossing(width), "at_width": at_width,
            "real_layers_lambda_max_n_over_tr_d": real}


def draw(result: dict):
    """Loss and bounds over k/m, of the first bits: one panel a spectrum, square shape."""
    config = result["config"]
    m, n = config["shapes"][0]
    figure, panels = common.axes(len(config["spectra"]))
    labels = {"printed": "printed closed form", "ldlq": "plain LDLQ: m n λ v", "trivial": "(1 − k/m) m n λ v",
              "marchenko_pastur": "Marchenko–Pastur tail", "averaging": "(1 − k/m) m v tr D"}
    for axis, kind in zip(panels, config["spectra"], strict=True):
        row = next(r for r in result["rows"] if r["spectrum"] == kind and (r["m"], r["n"]) == (m, n)
                   and r["bits"] == config["bits"][0])
        x = np.array(row["ranks"][:-1]) / m
        for i, (key, label) in enumerate(labels.items()):
            axis.semilogy(x, [b[key] for b in row["bounds"][:-1]], f"C{i + 1}--", label=label)
        axis.semilogy(x, row["loss"][:-1], "C0o-", label="measured")
        axis.set(xlabel="k / m", ylabel="tr(E H Eᵀ)", title=f"{m} x {n}, {row['bits']} bits dithered, {kind} H")
    panels[0].legend(loc="lower left")
    return figure


SHAPES = ((24, 24), (20, 36), (36, 20))


@pytest.mark.parametrize("kind", common.SPECTRA)
@pytest.mark.parametrize("m, n", SHAPES)
def test_the_eigenvalues_are_the_squared_singular_values_and_the_first_step_is_an_equality(kind, m, n):
    w, factors = instance(m, n, kind, 0.01, 0)
    q, eta, _ = quantized(w, factors, 6, 0)
    h = np.asarray(factors.root @ factors.root.T)
    d = np.linalg.solve(factors.lower, np.linalg.solve(factors.lower, h).T)
    left = np.sort(np.linalg.eigvalsh(eta @ d @ eta.T))[::-1][:min(m, n)]
    right = np.linalg.svd((w - q) @ factors.root, compute_uv=False) ** 2
    np.testing.assert_allclose(left, right, atol=1e-9 * right[0])
    transposed = np.linalg.eigvalsh((w - q) @ factors.lower.T @ d @ factors.lower @ (w - q).T)
    assert kind in ("flat",) or not np.allclose(np.sort(transposed)[::-1][:min(m, n)], right, rtol=1e-3)
    for rank in (0, 1, 7, min(m, n)):
        factors_lr = rank_constrained(w - q, factors.root, rank)
        loss = proxy_loss(q + factors_lr.left @ factors_lr.right - w, jnp.asarray(h))
        np.testing.assert_allclose(loss, right[rank:].sum(), atol=1e-9 * right.sum())


@pytest.mark.parametrize("kind", common.SPECTRA)
@pytest.mark.parametrize("m, n", SHAPES)
def test_the_printed_form_holds_and_is_above_the_trivial_bound_at_every_rank(kind, m, n):
    w, factors = instance(m, n, kind, 0.01, 1)
    h, draws = np.asarray(factors.root @ factors.root.T), 12
    found = [quantized(w, factors, 6, seed) for seed in range(draws)]
    radius = max(r for _, _, r in found)
    tails = np.array([np.linalg.svd((w - q) @ factors.root, compute_uv=False) ** 2 for q, _, _ in found])
    for rank in range(0, min(m, n)):
        loss = tails[:, rank:].sum(1)
        b = bounds(h, m, rank, 6, radius)
        assert loss.mean() <= b["averaging"] + 5 * loss.std(ddof=1) / np.sqrt(draws)  # a bound in expectation
        assert b["averaging"] <= b["trivial"] * (1 + 1e-9)
        assert b["trivial"] < b["printed"]
        assert loss.mean() <= b["printed"]


def test_below_a_fifth_of_m_the_printed_form_is_worse_than_plain_ldlq():
    h, m = common.hessian("power", 40), 80
    for rank in range(m):
        b = bounds(h, m, min(rank, 40), 2, 3.0) | {"printed": caldera_bound(h, m, rank, 2, 3.0)}
        assert (b["printed"] < b["ldlq"]) == (rank > crossing(m))
    assert crossing(4096) == pytest.approx(932.03, abs=0.01)


@pytest.mark.parametrize("m, n", [(300, 300), (200, 500), (500, 200)])
def test_the_tail_of_gaussian_noise_is_that_of_marchenko_and_pastur(m, n):
    energy = np.linalg.svd(common.gaussian(m, n), compute_uv=False) ** 2
    for rank in (0, 10, 50, 150, min(m, n)):
        share = energy[rank:].sum() / energy.sum()
        # linear statistics of eigenvalues deviate from their limit by O(1 / min(m, n)) of the sum
        assert abs(share - marchenko_pastur_tail(rank / m, n / m)) < 3 / min(m, n)
    assert marchenko_pastur_tail(1 / 16, 1.0) == pytest.approx(0.79, abs=0.01)
    assert marchenko_pastur_tail(1 / 16, 1.0) < 0.9 * (1 - 1 / 32) ** 2  # what the printed form has in its place


def test_low_rank_beats_plain_ldlq_only_if_rounding_the_factors_costs_less_than_it_repairs():
    w, factors = instance(24, 40, "power", 0.01, 2)
    q, _, _ = quantized(w, factors, 6, 0)
    h, a = factors.root @ factors.root.T, jnp.asarray(w - q)
    energy = np.linalg.svd(a @ factors.root, compute_uv=False) ** 2
    lr, seen = rank_constrained(a, factors.root, 4), set()
    for bits in (1, 2, 4, 8):
        left, right = (quantize(Dithered(bits), f, jax.random.key(i)).values for i, f in enumerate(lr))
        loss = float(proxy_loss(left @ right - a, h))
        epsilon = loss - energy[4:].sum()
        assert (loss < energy.sum()) == (epsilon < energy[:4].sum())
        seen.add(loss < energy.sum())
    assert seen == {True, False}  # 1-bit factors harm, 8-bit ones help


if __name__ == "__main__":
    common.run(__file__, Config(), measure, draw)
