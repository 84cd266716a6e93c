"""When low rank pays: five numbers of (W, H) predict the error, and say which rank and factor bits beat plain bits.

Statement (derived here; no fitted constant).  W of mean square 1 after rotation, H = L D Lᵀ (damped), k = rank,
c_B = mean squared error of the B-bit grid on a unit Gaussian.  Let

    noise   N = m tr D / tr(W H Wᵀ),              so that Q alone has relative error² c_B N (LDLQ identity);
    plain   ρ = ‖W − LR‖²_F / ‖W‖²_F,             LR the best rank k of W in the H-norm (Lemma 4.2);
    tail    τ = Σ_{i>k} σᵢ² / Σ σᵢ² of η D^½,     η i.i.d.: what k directions cannot repair of LDLQ's own noise;
    signal  S = Σ_{i<=k} σᵢ² / Σ σᵢ² of W H^½;
    aligned α = (tr H / n) ‖LR‖²_F / tr(LR H (LR)ᵀ),   how little of R's energy H singles out: rounding R is white in
                                                       the plain norm, so it costs α times what rounding L costs.

With B bits on Q and B_F on each factor the relative error² of CALDERA is about the smaller of

    Q last:   c_B N ρ',   ρ' = ρ + 2 c_{B_F} (1 − ρ)    Q rounds W − LR, whose mean square is ρ', and absorbs whatever
                                                        the factors' rounding did in the H-norm;
    LR last:  c_B N ρ' τ + (1 + α) c_{B_F} S            LR repairs k directions of Q's noise and leaves its own.

At equal bits, B' = B + B_F k (1/m + 1/n) on Q alone has c_{B'} N, so low rank pays iff the bits it gains,
−½ log2 min(ρ', ρ' τ + (1 + α) c_{B_F} S / (c_B N)) / s with s = ½ log2(c_B / c_{B+1}), exceed B_F k (1/m + 1/n).
Three consequences.
(a) Q last: direction k gains ½ log2(ρ'_{k−1}/ρ'_k)/s bits for B_F (1/m + 1/n), that is, it pays iff its share of
    ρ'_{k−1} exceeds 2 ln 2 s B_F (1/m + 1/n), to first order; the best rank is the k of the largest sum, and the plain
    spectrum of W, which leaves the least ρ at every k, says what it saves at most.
(b) White W: no direction has a larger share than (√m + √n)² / (m n) = 4/n at m = n, and 4 bits need 9/n: rank never
    pays for white weights, at any width, with factors of 2 bits or more; only structure in W pays.
(c) Fixed rank: repair alone removes at most k (√(m D_max) + √(tr D))² / (m tr D) of the noise, so its share vanishes as
    widths grow (arXiv 2606.01412, known here from its abstract and paper.md, makes the same point).

Assumptions of the "≈".  η uncorrelated with equal variances (E8P on rotated weights), LR at its first closed form (the
loop then improves on it), factor noise independent of Q's.  Strong feedback breaks "equal": block j rounds W_j plus
Σ_{i>j} η_i (L⁻¹)_ij, of variance ω_j = 1 + Σ_{i>j} c(ω_i) ‖(L⁻¹)_ij‖² / g, with c(ω) the error, on a Gaussian of
variance ω, of the grid fitted to variance 1: the loss is Σ c(ω_j) tr D_j / (c tr D) times larger (``widening``).

Proof.  Q last: LDLQ identity with target variance ρ'.  Widening: (W − Q)(L − I) = η (L⁻¹ − I), for Q − W = η L⁻¹.
LR last: Lemma 4.2 on (W − Q) H^½ = LR H^½ − η D^½, of which k directions go, and rounding L and R costs c_{B_F} of LR's
energy each, in the norm each is rounded in (least squares for R given the rounded L mends only what lies in k of m
directions).  (b) Geman: σ₁(η) → √m + √n.  (c) Σ_{i<=k} σᵢ² <= k σ₁², and E σ₁(G D^½) <= √(m D_max) + √(tr D) (Chevet);
σ₁ is √D_max-Lipschitz in G, so it exceeds this by t √D_max with probability at most exp(−t²/2).

Verdict: predicts.  On seven real layers, ranks 8 to 64 and factors of 2, 4 and 16 bits (84 runs) the measured error is
0.89 to 1.04 of the predicted one, 0.975 on average, and the sign of the bits saved is right in 80.  2-bit factors save
bits in 10 of 28 runs (at most 0.09, query, rank 64), 4-bit ones in 2 of 28: with Q last, 4 bits are too many.
By (a), which leaves out that LR must serve H, too, the best ranks are 62, 40 and 12 for the query with 2, 3 and 4 bits
(0.15, 0.08 and 0.02 bits saved at most), 32, 13 and 0 for the key, 0 for the value; the others save at most 0.03.
Fails: for a geometric H of condition 1e4 (0.01 damped) feedback widens what Q rounds, by 12 %, and its loss by 27 %, as
``widening`` says; and τ takes the k directions that repair Q's noise for free ones, though they must hold LR as well.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import Parts

from caldera_jax import E8P, CalderaConfig, hessian, regression
from caldera_jax.objective import energies, feedback_trace


@dataclass(frozen=True)
class Config:
    """Layers of one block, ranks and factor bits of the sweep, Q at 2 bits; and sizes for the vanishing share."""

    block: int = 14
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    factor_bits: tuple[int, ...] = (2, 4, 16)
    outer_iterations: int = 15
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    fixed_rank: int = 16
    seed: int = 0


class Shares(NamedTuple):
    """N, ρ, τ, S and α of the statement."""

    noise: float
    plain: float
    tail: float
    signal: float
    aligned: float


def noise_energy(root: np.ndarray, m: int, block: int, seed: int = 0) -> np.ndarray:
    """σᵢ²(η blockdiag(D)^½), falling, for one draw of η (it concentrates)."""
    eta, n = common.gaussian(m, len(root), seed), len(root)
    noise = np.concatenate([eta[:, j:j + block] @ root[j:j + block, j:j + block] for j in range(0, n, block)], axis=1)
    return energies(noise)


def shares(w: np.ndarray, h: np.ndarray, damping: float, *ranks: int, block: int = 8) -> list[Shares]:
    """The shares of a rotated layer at every rank; O(m n min(m, n) + n³)."""
    damped = h + damping * np.eye(len(h))
    root, energy = np.linalg.cholesky(damped), float(np.sum((w @ damped) * w))
    noise, tail = len(w) * feedback_trace(damped, block) * np.mean(w**2) / energy, noise_energy(root, len(w), block)
    best = regression.rank_constrained(jnp.asarray(w), jnp.asarray(root), max(ranks, default=0))  # holds all lower ones

    def of(rank: int) -> Shares:
        low_rank = np.asarray(best.left[:, :rank] @ best.right[:rank])
        kept = float(np.sum((low_rank @ damped) * low_rank))
        aligned = np.trace(damped) / len(h) * np.sum(low_rank**2) / kept if kept else 0.0
        return Shares(noise, float(np.sum((w - low_rank) ** 2) / np.sum(w**2)),
                      float(tail[rank:].sum() / tail.sum()), kept / energy, float(aligned))

    return [of(rank) for rank in ranks]


def predict(s: Shares, c_q: float, c_factor: float) -> tuple[float, float]:
    """Relative errors with Q last and with LR last."""
    q_last = c_q * s.noise * (s.plain + 2 * c_factor * (1 - s.plain))
    return float(np.sqrt(q_last)), float(np.sqrt(q_last * s.tail + (1 + s.aligned) * c_factor * s.signal))


def vanishing_share(m: int, d: np.ndarray, rank: int, deviations: float = 0.0) -> float:
    """(c): the largest part of LDLQ's noise that k directions can hold, in expectation or at ``deviations`` t."""
    top = np.sqrt(m * d.max()) + np.sqrt(d.sum()) + deviations * np.sqrt(d.max())
    return float(min(1.0, rank * top**2 / (m * d.sum())))


def direction_pays(m: int, n: int, factor_bits: float, slope: float = 1.0) -> float:
    """(a): the share of the remaining ‖W‖²_F above which one more direction pays; ``slope`` = ½ log2(c_B / c_{B+1})."""
    return 2 * np.log(2) * factor_bits * (1 / m + 1 / n) * slope


def best_rank(singular_values: np.ndarray, m: int, n: int, factor_bits: float, c_factor: float,
              slope: float = 1.0) -> tuple[int, float]:
    """(a): the rank that saves most bits with Q last, and how many, if LR leaves the least of ‖W‖²_F."""
    energy = np.append(0, np.cumsum(singular_values**2)) / np.sum(singular_values**2)
    left = 1 - (1 - 2 * c_factor) * energy  # ρ'
    saved = -np.log2(left) / (2 * slope) - factor_bits * np.arange(len(left)) * (1 / m + 1 / n)
    return int(np.argmax(saved)), float(saved.max())


@cache
def _overload() -> tuple[np.ndarray, np.ndarray]:
    """ω from 1 to 4, and c(ω): error of E8P, fitted to variance 1, on a Gaussian of variance ω."""
    grid, wide = E8P(), np.linspace(1, 4, 31)
    x = jnp.asarray(common.gaussian(2048, 64)) * grid.gain
    error = jax.jit(lambda x: jnp.mean((grid.round(x)[0] - x) ** 2) / grid.gain**2)
    return wide, np.array([float(error(x * np.sqrt(w))) for w in wide])


def widening(damped: np.ndarray, block: int = 8) -> tuple[float, float]:
    """Mean square of what Q rounds over that of W − LR, and the loss over c tr D; n a multiple of ``block``."""
    n, (wide, c) = len(damped), _overload()
    root = np.linalg.cholesky(damped)
    fed_back = (np.linalg.inv(hessian.block_ldl(jnp.asarray(root), block)) - np.eye(n)) ** 2
    target, variance, loss, plain = np.ones(n), np.zeros(n), 0.0, 0.0
    for j in range(n - block, -1, -block):
        cut = slice(j, j + block)
        target[cut] += variance @ fed_back[:, cut]
        variance[cut] = np.interp(target[cut].mean(), wide, c)
        trace = np.sum(root[cut, cut] ** 2)
        loss, plain = loss + variance[j] * trace, plain + c[0] * trace
    return float(target.mean()), float(loss / plain)


def bits_saved(error: float, alone: dict[int, float], paid: float) -> float:
    """Bits that Q alone would need beyond 2 for this error, less the bits paid for the factors.

    From the errors of Q alone at 2, 3 and 4 bits, with log error linear between them and beyond.
    """
    two, three, four = (np.log2(alone[b]) for b in (2, 3, 4))
    needed = (two - np.log2(error)) / (two - three)
    return float((needed if needed <= 1 else 1 + (three - np.log2(error)) / (three - four)) - paid)


def measure(config: Config) -> dict:
    """Predicted and measured error, and bits saved, of every layer, rank and factor bits; and shares over widths."""
    c = {bits: common.rounding_error(bits, config.seed) for bits in (2, 3, 4, 16)}
    slope, rows, best = 0.5 * np.log2(c[2] / c[3]), [], []
    for name, (w, h) in common.layers(config.block).items():
        alone = {b: float(decompose(config, w, h, 0, 4, b).trace.error.min()) for b in (2, 3, 4)}
        for rank in config.ranks:
            rows += [compare(config, w, h, rank, bits, c, alone, name) for bits in config.factor_bits]
        top = np.linalg.svd(w, compute_uv=False)
        best.append({"layer": name} | {str(b): best_rank(top, *w.shape, b, c[b], slope) for b in (2, 3, 4)})
        print(name, f"{len(rows)} rows", flush=True)
    widths = [{"n": n, **_share_at(n, config)} for n in config.widths]
    return {"c": {str(b): x for b, x in c.items()}, "slope": slope, "rows": rows, "best_rank": best, "widths": widths,
            **summary(rows)}


def compare(config: Config, w, h, rank: int, bits: int, c: dict[int, float], alone: dict[int, float], name: str):
    """One row: shares, error and bits saved, predicted and measured."""
    parts, paid = decompose(config, w, h, rank, bits), bits * rank * (1 / len(w) + 1 / len(h))
    s, = shares(parts.w, parts.factors.h, float(parts.factors.damping), rank)
    error, predicted = float(parts.trace.error[1:].min()), predict(s, c[2], c[bits])
    expected = {b: float(np.sqrt(c[b] * s.noise)) for b in (2, 3, 4)}
    return {"layer": name, "shape": list(w.shape), "rank": rank, "factor_bits": bits, "bits": 2 + paid, "error": error,
            "predicted": predicted, **s._asdict(), "alone": {str(b): e for b, e in alone.items()},
            "saved": bits_saved(error, alone, paid), "predicted_saved": bits_saved(min(predicted), expected, paid)}


def summary(rows: list[dict]) -> dict:
    """How the prediction fares: ratios of errors, and how often the sign of what is saved is right."""
    ratio = np.array([r["error"] / min(r["predicted"]) for r in rows])
    saved, expected = (np.array([r[key] for r in rows]) for key in ("saved", "predicted_saved"))
    return {"ratio_mean": float(ratio.mean()), "ratio_min": float(ratio.min()), "ratio_max": float(ratio.max()),
            "signs_right": int(np.sum((saved > 0) == (expected > 0))), "signs": len(rows)}


def decompose(config: Config, w, h, rank: int, factor_bits: int, q_bits: int = 2) -> Parts:
    """The package's answer."""
    return common.decompose(config.seed, w, h, CalderaConfig(
        rank=rank, q_bits=q_bits, factor_bits=factor_bits, outer_iterations=config.outer_iterations, svd="randomized"))


def _share_at(n: int, config: Config) -> dict[str, float]:
    """Noise share of a fixed rank at width n, measured and bounded, for flat D and D = 1/i."""
    out = {}
    for name, d in (("flat", np.ones(n)), ("power", 1 / np.arange(1, n + 1))):
        energy = np.linalg.svd(common.gaussian(n, n, config.seed) * np.sqrt(d), compute_uv=False) ** 2
        out[name] = float(energy[:config.fixed_rank].sum() / energy.sum())
        out[f"{name}_bound"] = vanishing_share(n, d, config.fixed_rank)
    return out


def draw(result: dict):
    """Predicted against measured error, gain in bits against rank, and the vanishing share."""
    from matplotlib.ticker import NullLocator

    figure, (left, middle, right) = common.axes(3)
    rows, config = result["rows"], result["config"]
    for i, bits in enumerate(config["factor_bits"]):
        chosen = [r for r in rows if r["factor_bits"] == bits]
        left.loglog([min(r["predicted"]) for r in chosen], [r["error"] for r in chosen], ".", color=f"C{i}",
                    label=f"{bits}-bit factors")
        if bits < 16:
            middle.plot([r["predicted_saved"] for r in chosen], [r["saved"] for r in chosen], ".", color=f"C{i}",
                        label=f"{bits}-bit factors")
    ends = [min(r["error"] for r in rows), max(r["error"] for r in rows)]
    left.loglog(ends, ends, color="0.5", linewidth=0.5)
    left.set(xlabel="predicted relative error", ylabel="measured relative error",
             title=f"block {config['block']}, 7 layers, ranks {min(config['ranks'])} to {max(config['ranks'])}")
    for axis, set_ticks in ((left.xaxis, left.set_xticks), (left.yaxis, left.set_yticks)):
        set_ticks(ticks := [0.03, 0.05, 0.1, 0.2], [f"{t:g}" for t in ticks])
        axis.set_minor_locator(NullLocator())
    left.legend()
    middle.axhline(0, color="0.5", linewidth=0.5)
    middle.axvline(0, color="0.5", linewidth=0.5)
    middle.set(xlabel="predicted bits saved against Q alone", ylabel="measured bits saved", title="does rank pay?")
    middle.legend()
    n = [w["n"] for w in result["widths"]]
    for i, kind in enumerate(("flat", "power")):
        right.loglog(n, [w[kind] for w in result["widths"]], f"C{i}o-", label=f"{kind} D")
        right.loglog(n, [w[f"{kind}_bound"] for w in result["widths"]], f"C{i}--", label=f"{kind} D, bound (c)")
    right.set(xlabel="width n = m", ylabel="share of the noise",
              title=f"noise that rank {config['fixed_rank']} can hold")
    right.legend()
    return figure


@pytest.fixture(scope="module")
def c():
    return {bits: common.rounding_error(bits) for bits in (2, 3, 4, 16)}


ONCE = Config(outer_iterations=1)
VARIANTS = ((0, 2), (8, 2), (8, 16))  # rank, factor bits


def spiked(m: int, n: int, rank: int, share: float) -> np.ndarray:
    """White noise, and ``rank`` equal directions that hold ``share`` of ‖W‖²_F."""
    signal = common.orthogonal(m, 1)[:, :rank] @ common.orthogonal(n, 2)[:rank]
    return np.sqrt(share / rank * m * n) * signal + np.sqrt(1 - share) * common.gaussian(m, n)


def first_round(kind: str, share: float, rank: int, bits: int):
    """Parts after LR and Q were found once, the damped H, and the shares, for 64 x 96."""
    parts = decompose(ONCE, spiked(64, 96, 8, share), common.hessian(kind, 96), rank, bits)
    damping = float(parts.factors.damping)
    return parts, parts.factors.h + damping * np.eye(96), shares(parts.w, parts.factors.h, damping, rank)[0]


@pytest.mark.parametrize("share", [0.0, 0.6])
@pytest.mark.parametrize("kind", ["flat", "geometric", "power"])
def test_the_shares_predict_what_q_loses_and_the_feedback_how_much_it_widens(kind, share, c):
    for rank, bits in VARIANTS:
        parts, h, s = first_round(kind, share, rank, bits)
        target = parts.q - parts.e @ parts.factors.lower  # what Q rounds
        left, energy = np.mean((parts.w - parts.lr) ** 2), np.sum((parts.w @ h) * parts.w) / 64
        wider, worse = widening(h)
        # rows are independent: z = 5 standard errors of their mean, from the sample
        for rows, expected in ((np.mean(target**2, axis=1), wider * left),
                               (np.sum((parts.e @ h) * parts.e, axis=1), worse * c[2] * s.noise * left * energy)):
            assert abs(rows.mean() - expected) <= 5 * rows.std(ddof=1) / 8, (rank, bits)
        predicted = predict(s, c[2], c[bits])[0] ** 2 / (c[2] * s.noise)  # ρ'
        if rank == 0 or bits == 16:
            np.testing.assert_allclose(left, predicted, rtol=1e-4)  # float32, and float16 factors
        # LPLR improves on rounding the closed form, whose cost is 2 c + c² but for the sample: the block errors of E8P
        # deviate by less than half their mean, over 64 codewords of L and 96 of R
        assert left <= predicted + (1 - s.plain) * c[bits] * (c[bits] + 2.5 * np.sqrt(1 / 64 + 1 / 96)) + 1e-4


@pytest.mark.parametrize("share", [0.0, 0.6])
@pytest.mark.parametrize("kind", ["flat", "geometric", "power"])
def test_lr_last_repairs_more_than_its_own_columns_hold_and_less_than_2k_free_directions(kind, share):
    parts, h, s = first_round(kind, share, 8, 16)
    root = np.linalg.cholesky(h)
    noise = np.linalg.svd(parts.e @ root, compute_uv=False) ** 2
    found = regression.rank_constrained(jnp.asarray(parts.w - parts.q), jnp.asarray(root), 8)
    rest = np.sum(((parts.w - parts.q - np.asarray(found.left @ found.right)) @ root) ** 2)
    # W − Q is LR − E: by Weyl no rank 8 leaves less than E's tail at 16, and L with another R leaves what is off L
    basis = np.linalg.qr(parts.lr @ common.gaussian(96, 8))[0]
    off = np.sum(((parts.e - basis @ (basis.T @ parts.e)) @ root) ** 2)
    assert noise[16:].sum() * (1 - 1e-9) <= rest <= off * (1 + 1e-9)
    rows = np.sum((parts.e @ root) ** 2, axis=1)
    assert noise[16:].sum() <= s.tail * noise.sum() <= (1 - 8 / 64) * noise.sum() + 5 * 8 * rows.std(ddof=1)


def test_white_weights_never_pay_and_a_strong_spike_does(c):
    slope = 0.5 * np.log2(c[2] / c[3])
    for m, n in ((64, 64), (64, 96), (40, 200)):
        values = np.linalg.svd(common.gaussian(m, n), compute_uv=False)
        # σ₁ exceeds √m + √n by 3 with probability e^{−4.5}; 1/m + 1/n + 2/√(mn) <= 2 (1/m + 1/n) by the means
        assert values[0] <= np.sqrt(m) + np.sqrt(n) + 3
        assert 2 * (1 / m + 1 / n) < direction_pays(m, n, 2, slope)
        for bits in (2, 3, 4):
            assert best_rank(values, m, n, bits, c[bits], slope) == (0, 0)
    h = common.hessian("flat", 96)
    for share, pays in ((0.0, False), (0.8, True)):
        w = spiked(64, 96, 8, share)
        rank, saved = best_rank(np.linalg.svd(w, compute_uv=False), 64, 96, 2, c[2], slope)
        assert (rank, saved > 0) == (8 if pays else 0, pays)
        alone = {b: float(decompose(ONCE, w, h, 0, 2, b).trace.error.min()) for b in (2, 3, 4)}
        row = compare(ONCE, w, h, 8, 2, c, alone, "spiked")
        assert (row["saved"] > 0) == pays and (row["predicted_saved"] > 0) == pays, row


def test_the_best_rank_stops_where_only_the_noise_of_the_factors_is_left(c):
    decaying, slope = 2.0 ** -np.arange(64), 0.5 * np.log2(c[2] / c[3])
    rank, saved = best_rank(decaying, 64, 64, 2, c[2], slope)
    assert 0 < rank < 8 and saved < -np.log2(2 * c[2]) / (2 * slope)  # ρ' >= 2 c: 0.18 of ‖W‖² stays for Q
    share = decaying**2 / np.cumsum(decaying[::-1] ** 2)[::-1]
    assert (share > direction_pays(64, 64, 2, slope)).all()  # of what is left of W alone every direction would pay
    assert best_rank(decaying, 64, 64, 2, 1e-9, slope)[0] > rank  # the floor, not the price, ends it


@pytest.mark.parametrize("m, n", [(60, 60), (40, 100), (100, 40), (300, 300)])
def test_the_share_of_a_fixed_rank_is_bounded_and_vanishes(m, n):
    i = np.arange(n)
    for d in (np.ones(n), 1 / (1 + i), np.where(i == 0, 10.0, 1.0), np.where(i < n // 2, 1.0, 0.0)):
        for seed in range(5):
            energy = np.linalg.svd(common.gaussian(m, n, seed) * np.sqrt(d), compute_uv=False) ** 2
            total = m * d.sum()  # its expectation: with it the bound is on the mean of the sum, t = 5 on the deviation
            for rank in (0, 1, 4, min(m, n)):
                assert energy[:rank].sum() / total <= min(1, vanishing_share(m, d, rank, 5.0)) * (1 + 5 * np.sqrt(
                    2 * np.sum(d**2) / m) / d.sum()), (rank, seed)
    np.testing.assert_allclose(vanishing_share(4 * m, np.ones(4 * n), 4), vanishing_share(m, np.ones(n), 4) / 4)


def test_the_bound_on_the_share_cannot_do_without_either_term():
    for n in (200, 400):
        energy = np.linalg.norm(common.gaussian(n, n), 2) ** 2 / n**2
        # σ₁ is near 2 √n, and below it by 5 with probability e^{−12.5}; either term alone would say 1/n
        assert energy > (2 * np.sqrt(n) - 5) ** 2 / n**2 > 1 / n
        assert energy <= vanishing_share(n, np.ones(n), 1, 5.0)


if __name__ == "__main__":
    common.run(__file__, Config(), measure, draw)
