"""The downdate: the exact problem that it solves, and when it helps.

Statement (derived here; the update is that of Algorithm 1 of arXiv 2405.18886).  M a square root of the damped Hessian
H̄ = H + δI, V [n, k] the right singular vectors of LR M, H' = M (I − V Vᵀ) Mᵀ.
(1) min over B of ‖(W − Q) M − B Vᵀ‖²_F = tr((W − Q) H' (W − Q)ᵀ), and W − LR in place of W changes nothing.  So LDLQ on
    H' seeks the Q that is best up to a repair of rank k in the directions V of the last LR.
(2) An unrounded LR step leaves no more than that: Σ_{i>k} σᵢ²((W − Q) M) <= tr((W − Q) H' (W − Q)ᵀ), with equality
    where V holds the k leading directions of (W − Q) M.
(3) Until it is repaired such a Q is no better than LDLQ's on H̄, in expectation, for uncorrelated rounding errors of
    equal variance: with H̄ = L blockdiag(D) Lᵀ and L' that of H' + δ'I, tr(L'⁻¹ H̄ L'⁻ᵀ) >= tr D.  So with the downdate
    LR has to come last, and what rounding LR then costs is paid in full (``alternating_loop.py``).
(4) Hence the sign.  Scored with H, not H̄: N the noise of LDLQ on H̄ with unit errors and ρ', τ as in
    ``when_rank_pays.py``; T' the share of that noise in Σ_{i>k} σᵢ²(η L'⁻¹ H^½) for i.i.d. η, V from the best LR of W;
    and φ = what LPLRFactorize on W itself loses by rounding, over tr(W H Wᵀ).  The relative error² is about

        Q last  c N ρ',     LR last  c N ρ' τ + φ,     with the downdate  c' N ρ' T' + φ,

    c and c' the grid's error on targets that feedback has widened. The downdate helps about where both φ < N ρ' (c −
    c' T'), rounding LR costs less than k directions repair of Q's noise, and c' T' < c τ, they repair more of it than
    they would of plain LDLQ's. Nothing is fitted; φ is measured by one call on W, with no Q and no loop.
(5) So with unrounded factors (φ = 0) only c' T' < c τ matters.  φ is of the order of c_F times the energy that LR takes
    (``factor_bits.py``), while 1 − c'T'/c is a share of the *noise*: the downdate harms where φ is the larger, as in
    query and key.

Assumptions of the "≈".  As in ``when_rank_pays.py``; V is that of the first closed form; LPLR loses on W − Q what it
loses on W.

Proof.  (1) The least-squares B is (W − Q) M V, and what is left is (W − Q) M (I − V Vᵀ); LR M (I − V Vᵀ) = 0.
(2) B Vᵀ is one of the competitors of Lemma 4.2.  (3) X = L'⁻¹ L is unit block lower triangular, so tr(X D Xᵀ) =
tr D + Σ_{i>j} tr(X_ij D_j X_ijᵀ).  (4) E L' = η for LDLQ on H' (LDLQ identity), so E = η L'⁻¹, of which Lemma 4.2
leaves the tail; LR's rounding errors are taken as orthogonal to it.

Verdict: predicts on real layers. Seven layers of block 14, ranks 16 to 64, five rounds, one seed. 4-bit factors: sign
right in 18 of 21 cases without passes after LDLQ (12 of the 15 where the prediction exceeds 2 %: o and up are
predicted to gain up to 6 % and lose up to 2 %) and in 18 with ten passes (14 of those 15). Without passes the
downdate helps in 5 of 21, with ten in 11: it harms q, k and gate by 11 to 84 % (ten passes: 7 to 81 %), changes v, o
and up by −4 to +2 % (−9 to −1 %) and down by +2 % (within 1 %). 16-bit factors: it helps in all 42 cases, as
predicted, by 2 to 20 % against the better of no and ten passes without it (passes raise the error of most runs with
16-bit factors and no downdate).
  Always to say "helps with 16 bits, harms with 4" would be right in 37 of 42 layer cases without passes and 31 with
ten, where (4) is right in 39 and 39; on the 72 made-up layers both are right in 62: there (4) adds nothing. The error
with the downdate is 0.96 to 1.00 of that predicted with 16 bits and no passes, 0.77 to 1.06 with 4, low where LR is
large. At 7B width, where the authors' downdated runs are the better ones, nothing was measured.
"""

from dataclasses import dataclass
from functools import partial

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import lapack
from when_rank_pays import spiked

from caldera_jax import CalderaConfig, HessianFactors, decompose, hessian, regression
from caldera_jax.codebooks import E8P, Quantized, fit_scale
from caldera_jax.lplr import LowRank, lplr_factorize
from caldera_jax.objective import energies, feedback_trace


@dataclass(frozen=True)
class Config:
    """Layers of one block; and spiked W (``spikes`` directions that hold a share of ‖W‖²_F) over spectra and widths."""

    block: int = 14
    ranks: tuple[int, ...] = (16, 32, 64)
    factor_bits: tuple[int, ...] = (4, 16)
    refine_passes: tuple[int, ...] = (0, 10)
    outer_iterations: int = 5
    spectra: tuple[str, ...] = ("flat", "power", "spiked")
    widths: tuple[int, ...] = (64, 128, 256)
    shares: tuple[float, ...] = (0.0, 0.3, 0.6, 0.9)
    spikes: int = 8
    seed: int = 0


lplr_factorize = jax.jit(lplr_factorize, static_argnums=(3, 4, 5, 6))
downdated = jax.jit(decompose.downdated, static_argnums=2)
rank_constrained = jax.jit(regression.rank_constrained, static_argnums=2)


def unrounded(left, right) -> LowRank:
    """L R as the package's half steps hand it on, on no grid."""
    return LowRank(*(Quantized(jnp.asarray(a), None, None) for a in (left.T, right)))


def widened(feedback: float, rounds: int = 20) -> float:
    """c: the 2-bit grid's error on Gaussian targets of variance 1 + c · ``feedback``, scale fitted to variance 1."""
    grid, x, c = E8P(), jnp.asarray(common.gaussian(128, 512, 7), jnp.float32), 0.0
    scale = fit_scale(grid, x)
    for _ in range(rounds):
        target = x * jnp.sqrt(1 + c * jnp.float32(feedback))
        c = jnp.mean((_round(grid, target / scale) * scale - target) ** 2)
    return float(c)


@partial(jax.jit, static_argnums=0)
def _round(grid, x):
    return grid.round(x, None)[0]


def feedback_noise(inverse: np.ndarray) -> float:
    """The variance that LDLQ's feedback −η (I − L⁻¹) adds to what is rounded, for unit errors η; mean over columns."""
    return float(np.sum((np.eye(len(inverse)) - inverse) ** 2) / len(inverse))


def predict(w: np.ndarray, factors: HessianFactors, rank: int, *factor_bits: int,
            block: int = 8) -> list[dict[str, float]]:
    """(4) at every number of factor bits: the three relative errors, and φ / (c N ρ'), 1 − c'T'/c and 1 − τ, which
    decide the sign."""
    (m, n), h = w.shape, np.asarray(factors.h)
    best = rank_constrained(jnp.asarray(w), factors.root, rank)
    rest = float(np.mean((w - np.asarray(best.left @ best.right)) ** 2) / np.mean(w**2))
    eta = common.gaussian(m, n, 3) * np.sqrt(np.mean(w**2) / np.sum((w @ h) * w))

    def noise(lower) -> tuple[float, np.ndarray]:
        inverse = inverted(np.asarray(lower)[:n, :n])
        return widened(feedback_noise(inverse)), energies(eta @ inverse, h)

    (c, kept), (c_down, repaired) = map(noise, (factors.lower, downdated(factors, unrounded(*best), block).lower))

    def at(bits: int) -> dict[str, float]:
        phi, left = factor_loss(w, factors, rank, bits), rest + 2 * common.rounding_error(bits) * (1 - rest)  # ρ'
        plain, after, down = left * np.array([c * kept.sum(), c * kept[rank:].sum(), c_down * repaired[rank:].sum()])
        return {"q_last": float(np.sqrt(plain)), "lr_last": float(np.sqrt(after + phi)),
                "downdated": float(np.sqrt(down + phi)), "factor_noise": phi / plain, "repaired": 1 - down / plain,
                "tail": 1 - after / plain}

    return [at(bits) for bits in factor_bits]


def inverted(lower: np.ndarray) -> np.ndarray:
    """The inverse of a lower triangular matrix."""
    return lapack.dtrtri(lower, lower=1)[0]


def factor_loss(w: np.ndarray, factors: HessianFactors, rank: int, factor_bits: int) -> float:
    """φ: what LPLRFactorize on W loses beyond Σ_{i>k} σᵢ²(W M), over tr(W H Wᵀ)."""
    grids = CalderaConfig(rank=rank, factor_bits=factor_bits).factor_grids
    found = np.asarray(lplr_factorize(jax.random.key(0), jnp.asarray(w), factors, rank, *grids, 10).dense())
    h, root = np.asarray(factors.h), np.asarray(factors.root)
    damped = h + float(factors.damping) * np.eye(len(h))
    lost = np.sum(((w - found) @ root) ** 2) - np.sum(energies(w, damped)[rank:])
    return float(lost / np.sum((w @ h) * w))


def compare(config: Config, w, h, rank: int, bits: int, passes: tuple[int, ...] = (0,), **names) -> dict:
    """One row: the prediction, and the least errors without and with the downdate for each number of passes."""
    row = {**names, "shape": list(w.shape), "rank": rank, "factor_bits": bits}
    for count in passes:
        for down in (False, True):
            parts = common.decompose(config.seed, w, h, CalderaConfig(
                rank=rank, factor_bits=bits, outer_iterations=config.outer_iterations, svd="randomized", downdate=down,
                refine_passes=count))
            row[f"{'with' if down else 'without'}_{count}"] = float(parts.trace.error[1:].min())
    factors = hessian.factor(jnp.asarray(parts.factors.h), float(parts.factors.damping), 8)
    return {**row, **predict(parts.w, factors, rank, bits)[0]}


def predicted_gain(row: dict) -> float:
    """log of the predicted error with the downdate over that without; negative where it helps."""
    return float(np.log(row["downdated"] / min(row["q_last"], row["lr_last"])))


def measured_gain(row: dict, passes: int) -> float:
    """The same, measured."""
    return float(np.log(row[f"with_{passes}"] / row[f"without_{passes}"]))


def signs(rows: list[dict], passes: int) -> dict:
    """How often the sign is right, of all rows and of those where the prediction exceeds 2 %; ratios of the errors."""
    expected = np.array([predicted_gain(r) for r in rows])
    found = np.array([measured_gain(r, passes) for r in rows])
    right, clear = (expected < 0) == (found < 0), np.abs(expected) > 0.02
    ratio = np.array([r[f"with_{passes}"] / r["downdated"] for r in rows])
    return {"right": int(right.sum()), "rows": len(rows), "right_where_clear": int(right[clear].sum()),
            "clear": int(clear.sum()), "helped": int((found < 0).sum()), "ratio_mean": float(ratio.mean()),
            "ratio_min": float(ratio.min()), "ratio_max": float(ratio.max())}


def measure(config: Config) -> dict:
    """Predicted and measured effect on every layer, and over spectra, widths and shares of W in a few directions."""
    layers, grown = [], []
    for name, (w, h) in common.layers(config.block).items():
        for rank in config.ranks:
            layers += [compare(config, w, h, rank, bits, config.refine_passes, layer=name)
                       for bits in config.factor_bits]
        print(name, flush=True)
        jax.clear_caches()  # a program for every choice and shape: together more than a process may map
    for n in config.widths:
        for kind in config.spectra:
            h = common.hessian(kind, n)
            grown += [compare(config, spiked(n, n, config.spikes, share), h, config.spikes, bits, spectrum=kind,
                              share=share) for share in config.shares for bits in config.factor_bits]
        print(n, flush=True)
        jax.clear_caches()
    by_bits = lambda rows, b: [r for r in rows if r["factor_bits"] == b]
    return {"layers": layers, "synthetic": grown, "signs": {
        f"{name}, {bits} bits, {passes} passes": signs(by_bits(rows, bits), passes) for bits in config.factor_bits
        for name, rows, counts in (("layers", layers, config.refine_passes), ("synthetic", grown, (0,)))
        for passes in counts}}


def draw(result: dict):
    """Predicted against measured effect, on layers and on made-up ones; and the boundary."""
    figure, (left, middle, right) = common.axes(3)
    config = result["config"]
    percent = lambda x: 100 * np.expm1(x)
    for i, bits in enumerate(config["factor_bits"]):
        for panel, name, counts in ((left, "layers", config["refine_passes"]), (middle, "synthetic", [0])):
            rows = [r for r in result[name] if r["factor_bits"] == bits]
            expected = [percent(predicted_gain(r)) for r in rows]
            for passes in counts:
                label = f"{bits}-bit factors" + (f", {passes} passes" if len(counts) > 1 else "")
                panel.plot(expected, [percent(measured_gain(r, passes)) for r in rows], f"C{i}{'^' if passes else 'o'}",
                           fillstyle="none" if passes else "full", label=label)
    for row in result["layers"] + result["synthetic"]:
        right.loglog(max(row["factor_noise"], 1e-4), row["repaired"], "C2o" if measured_gain(row, 0) < 0 else "C3x",
                     fillstyle="none")
    span = lambda values: f"{min(values)} to {max(values)}"
    for panel, title in ((left, f"block {config['block']}, ranks {span(config['ranks'])}"),
                         (middle, f"{config['spikes']} spikes, widths {span(config['widths'])}")):
        panel.axhline(0, color="0.5", linewidth=0.5)
        panel.axvline(0, color="0.5", linewidth=0.5)
        panel.set(xlabel="predicted change of the error by the downdate, %", ylabel="measured, %", title=title)
        panel.legend()
    ends = np.array([1e-4, 1.0])
    right.loglog(ends, ends, color="0.5", linewidth=0.6)
    right.set(xlabel="factors' rounding noise / Q's noise", ylabel="share of Q's noise that LR repairs",
              ylim=(0.05, 1.3), title="o helped, x harmed; line: φ = what is repaired")
    return figure


SMALL = Config(outer_iterations=4)


def instance(kind: str, m: int, n: int, rank: int, seed: int = 0):
    """Damped factors, W, Q, and an LR that is not the best one of W."""
    factors = hessian.factor(jnp.asarray(common.hessian(kind, n, seed)), 0.01, 8)
    w = common.gaussian(m, n, seed)
    left, right = common.gaussian(m, rank, seed + 1), common.gaussian(rank, n, seed + 2)
    return factors, w, np.rint(2 * w) / 2, unrounded(jnp.asarray(left), jnp.asarray(right))


@pytest.mark.parametrize("kind", common.SPECTRA)
@pytest.mark.parametrize("m, n, rank", [(24, 40, 5), (40, 21, 3)])
def test_the_loss_in_the_downdated_h_is_what_the_best_repair_along_v_leaves(kind, m, n, rank):
    factors, w, q, low_rank = instance(kind, m, n, rank)
    root, lr = np.asarray(factors.root), np.asarray(low_rank.dense())
    h = np.asarray(downdated(factors, low_rank, 8).h)
    v = np.linalg.svd(lr @ root)[2][:rank]
    left = (w - q) @ root
    repair = np.linalg.lstsq(v.T, left.T, rcond=None)[0].T  # B, row by row
    scale = np.sum(left**2)
    assert abs(common.loss(w - q, h) - np.sum((left - repair @ v) ** 2)) < 1e-10 * scale
    assert abs(common.loss(w - lr - q, h) - common.loss(w - q, h)) < 1e-8 * scale  # LR has no part in it
    other = np.linalg.svd(common.gaussian(n, n, 9))[2][:rank]
    repair = np.linalg.lstsq(other.T, left.T, rcond=None)[0].T
    assert abs(common.loss(w - q, h) - np.sum((left - repair @ other) ** 2)) > 1e-3 * scale
    spectrum = np.linalg.eigvalsh(h)
    assert np.all(np.abs(spectrum[:rank]) < 1e-12 * spectrum[-1]) and spectrum[rank] > 1e-6  # k zeros, none below


@pytest.mark.parametrize("kind", common.SPECTRA)
def test_an_unrounded_lr_step_leaves_no_more_and_as_much_where_v_holds_the_leading_directions(kind):
    m, n, rank = 24, 40, 5
    factors, w, q, low_rank = instance(kind, m, n, rank)
    tail = float(np.sum(np.linalg.svd((w - q) @ np.asarray(factors.root), compute_uv=False)[rank:] ** 2))
    assert tail < common.loss(w - q, np.asarray(downdated(factors, low_rank, 8).h))
    leading = unrounded(*rank_constrained(jnp.asarray(w - q), factors.root, rank))
    assert abs(common.loss(w - q, np.asarray(downdated(factors, leading, 8).h)) - tail) < 1e-10 * tail


def test_an_lr_of_zero_or_of_lower_rank_downdates_no_more_than_it_holds():
    factors, w, _, low_rank = instance("power", 24, 40, 5)
    damped = np.asarray(factors.root @ factors.root.T)
    zero = unrounded(0 * low_rank.left_t.values.T, low_rank.right.values)
    assert np.allclose(np.asarray(downdated(factors, zero, 8).h), damped, rtol=0, atol=1e-12)
    two = unrounded(low_rank.left_t.values.T * (np.arange(5) < 2)[None].astype(float), low_rank.right.values)
    spectrum = np.linalg.eigvalsh(np.asarray(downdated(factors, two, 8).h))
    assert np.sum(np.abs(spectrum) < 1e-12 * spectrum[-1]) == 2


@pytest.mark.parametrize("kind", common.SPECTRA)
@pytest.mark.parametrize("block", [1, 8])
def test_before_the_repair_the_downdated_feedback_is_never_better(kind, block):
    n, rank = 40, 5
    factors = hessian.factor(jnp.asarray(common.hessian(kind, n)), 0.01, block)
    *_, low_rank = instance(kind, 24, n, rank)
    damped = np.asarray(factors.root @ factors.root.T)
    inverse = np.linalg.inv(np.asarray(downdated(factors, low_rank, block).lower)[:n, :n])
    trace = feedback_trace(damped, block)
    assert np.trace(inverse @ damped @ inverse.T) >= trace * (1 + 1e-3)  # strictly: the feedbacks differ
    own = np.linalg.inv(np.asarray(factors.lower)[:n, :n])
    assert abs(np.trace(own @ damped @ own.T) / trace - 1) < 1e-9


@pytest.mark.parametrize("kind, share, bits, helps", [
    pytest.param("power", 0.0, 16, True, marks=pytest.mark.slow), ("power", 0.3, 16, True),
    pytest.param("power", 0.9, 4, False, marks=pytest.mark.slow), ("spiked", 0.3, 4, False)])
def test_the_sign_is_as_predicted_where_it_is_clear(kind, share, bits, helps):
    row = compare(SMALL, spiked(64, 96, 8, share), common.hessian(kind, 96), 8, bits)
    assert abs(predicted_gain(row)) > 0.02  # clear: rotations move a final error by about 2 %
    assert (predicted_gain(row) < 0) == helps == (measured_gain(row, 0) < 0), row
    condition = row["factor_noise"] < row["repaired"] and row["repaired"] > row["tail"]
    assert condition == helps  # the two inequalities of (4) and the three errors say the same


if __name__ == "__main__":
    common.run(__file__, Config(), measure, draw)
