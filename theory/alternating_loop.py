"""The alternating loop: which half steps can raise the objective, and what it takes for it to descend.

Statement (derived here, from Lemma 4.2 of arXiv 2405.18886).  f(Q, LR) = tr(E H Eᵀ), E = Q + LR − W.
(1) LR step, unrounded: never raises f, for the H that it uses.  It leaves Σ_{i>k} σᵢ²((W − Q) H^½).
(2) LR step, rounded: may raise f, even from 0.  Least squares followed by rounding is no projection: it moves a point
    that is on the grid already.
(3) Q step: forgets Q.  f becomes tr(η D ηᵀ), η the new rounding errors of W − LR, whatever f was; so it rises where f
    was less, above all after an unrounded LR step, which leaves only a share τ < 1 of such an error.  Even with H = I a
    grid whose scale is fitted to the mean square is no projection, and with other H LDLQ is not the closest point.
(4) Absorption.  With Q last f depends on LR through W − LR alone, and its expectation (one fitted scale, no clipping)
    through the mean square: noise Δ on LR, uncorrelated with W − LR, costs ‖Δ‖²_F / ‖W − LR‖²_F of f, however H weighs
    it.  With LR last it costs tr(Δ H Δᵀ).  So the part rounded last absorbs what was lost before, and an LR rounded
    last is paid for in full.
(5) Memory.  W − Q_t = LR_t − E_t: after its first round the LR step sees no more of W than the last LR and the last
    error.  What rounding takes of LR, the share δ of its energy, is not given back along it: ⟨LR_{t+1}, LR_t⟩ ≈
    (1 − δ) ‖LR_t‖² in the inner product of H, so ‖LR_{t+1}‖ may fall to (1 − δ) ‖LR_t‖.  Only what the fit takes of
    E_t makes up for it; what is lost goes to Q, where it costs c_B of itself.
(6) Descent.  f never rises if the LR step is unrounded, or keeps the last LR where the new one is worse, and the Q step
    is coordinate descent from the last Q on a fixed scalar grid; for diagonal H nearest rounding on such a grid does as
    well.  On a finite grid f then comes to rest after finitely many rounds, for an LR step that depends on Q alone.

Proof.  (1) LR_t is one of the competitors over which Lemma 4.2 minimises.  (3) The LDLQ identity holds for any target.
(4) E L = η: Q rounds W − LR − Δ, and a grid fitted to the target's mean square has errors in proportion to it.
(5) E_t = Q_t + LR_t − W.  A least-squares fit has ⟨A − LR, LR⟩ = 0, so ⟨A, LR_{t+1}⟩ = ‖LR_{t+1}‖² = ‖A‖² − (its loss)
with A = LR_t − E_t, and δ ‖LR_t‖² is what of the loss is not the tail of A; the norm then by Cauchy–Schwarz.  The "≈":
the fit's part of E_t is left out, and the factor fitted last is taken as not rounded.
(6) Each new entry of Q is the grid point nearest to the minimum of a parabola in that entry, so none raises f; and f,
after the Q step, takes finitely many values on a finite grid.

Verdict: the loop does not descend, and should not.  On the seven layers of block 14 at rank 32 every LR step after the
first raises the error with 2-bit factors (98 of 98) and no Q step does; with 16-bit factors it is the other way round
(0 and 98 of 98); with 4 bits 83 and 15.  The best iterate follows Q with 2 bits on all seven layers, in the first round
on six: the other fourteen rounds are wasted, and LR's share of W's energy falls to 0.52 of what it was (4 bits:
1.00, no leak; 16 bits: 1.09).  With 4 bits it follows Q on six (all but value), 4.4 % below the first round;
with 16 bits it follows LR on all seven, 17 % below.  Keeping LR from rising (``cautious``) stops the loop in its first
round on six of seven layers with 4 bits, 3.5 % higher there.
"""

from dataclasses import dataclass
from functools import partial

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from when_rank_pays import spiked

from caldera_jax import CalderaConfig, caldera, hessian, incoherence, regression
from caldera_jax.codebooks import E8P, NormalFloat, Uniform, quantize
from caldera_jax.decompose import factorize_step, quantize_step
from caldera_jax.ldlq import block_ldlq, descent_feedback, ldlq, sweep
from caldera_jax.lplr import better, lplr_factorize
from caldera_jax.objective import proxy_loss

block_ldlq = jax.jit(block_ldlq, static_argnums=(2, 3))
ldlq, quantize = jax.jit(ldlq, static_argnums=(1, 3)), jax.jit(quantize, static_argnums=0)
lplr_factorize = jax.jit(lplr_factorize, static_argnums=(3, 4, 5, 6))
rank_constrained = jax.jit(regression.rank_constrained, static_argnums=2)


@dataclass(frozen=True)
class Config:
    """Layers of one block at one rank; and a spiked W with ``rank`` directions that hold ``share`` of ‖W‖²_F."""

    block: int = 14
    rank: int = 32
    factor_bits: tuple[int, ...] = (2, 4, 16)
    outer_iterations: int = 15
    m: int = 128
    n: int = 192
    spiked_rank: int = 8
    share: float = 0.6
    spectrum: str = "power"
    spiked_bits: tuple[int, ...] = (2, 3, 4, 16)
    seed: int = 0


def cautious(key, target, target_h, low_rank, factors, config):
    """An LR half step for ``caldera`` that keeps the last LR where the new one is worse: it never raises f."""
    new = factorize_step(key, target, target_h, low_rank, factors, config)
    if low_rank is None:
        return new
    loss = lambda part: proxy_loss(part.dense() - target, factors.h)
    return better(loss(new) < loss(low_rank), new, low_rank)


@partial(jax.jit, static_argnums=(3, 4))
@jax.default_matmul_precision("highest")
def loop(key, w, h, config: CalderaConfig, step=factorize_step):
    """The package's loop on a rotated layer with an LR step of one's choice; its Trace."""
    rotate_key, key = jax.random.split(key)
    w, h, _ = incoherence.rotate(rotate_key, w / jnp.sqrt(jnp.mean(w**2)), h, config.rotation)
    return caldera(key, w, hessian.factor(h, config.damping, config.block), config, factorize_step=step)[1]


@partial(jax.jit, static_argnums=(3, 4))
@jax.default_matmul_precision("highest")
def memory(key, w, factors: hessian.HessianFactors, config: CalderaConfig, rounds: int):
    """Round by round, LR first: ‖LR‖², ⟨LR, last LR⟩, δ ‖last LR‖² and f after the Q step, all for the damped H."""
    h = factors.root @ factors.root.T
    energy = lambda a, b=None: jnp.sum((a @ h) * (a if b is None else b))

    def step(state, key):
        q, last = state
        a = w - q
        lr_key, q_key = jax.random.split(key)
        new = factorize_step(lr_key, a, a @ factors.h, None, factors, config)
        lr = new.dense()
        tail = jnp.sum(jnp.linalg.svd(a @ factors.root, compute_uv=False)[config.rank:] ** 2)
        q = quantize_step(q_key, w - lr, new, factors, config).values
        return (q, lr), (energy(lr), energy(lr, last), energy(lr - a) - tail, energy(q + lr - w))

    return jax.lax.scan(step, (jnp.zeros_like(w), jnp.zeros_like(w)), jax.random.split(key, rounds))[1]


@partial(jax.jit, static_argnums=(2, 4, 5))
def descent(w, h, rank: int, scale, levels: int, rounds: int):
    """f after each half step of the loop of (6): unrounded LR, coordinate descent on ``scale`` · {−levels … levels}."""
    spectrum, vectors = jnp.linalg.eigh(h)
    root, feedback = vectors * jnp.sqrt(jnp.maximum(spectrum, 0))[None], descent_feedback(h, 1)

    def nearest(target, start):
        values = scale * jnp.clip(jnp.round(target / scale), -levels, levels)
        return values, jnp.zeros(values.shape, jnp.uint8)

    def step(q, _):
        factors = regression.rank_constrained(w - q, root, rank)
        lr = factors.left @ factors.right
        new, _ = sweep(w - lr, q, feedback, nearest, 1, len(h))
        return new, (proxy_loss(q + lr - w, h), proxy_loss(new + lr - w, h))

    start = scale * jnp.clip(jnp.round(w / scale), -levels, levels)
    return jnp.stack(jax.lax.scan(step, start, None, rounds)[1], 1).ravel()


def integers(target, start):
    """Rounding to the integers: a grid that is never fitted."""
    return jnp.round(target), jnp.zeros((len(target), 1), jnp.uint8)


def rises(error: np.ndarray) -> dict[str, int]:
    """How many LR and Q steps of an LR-first trace raised the error, of those that could; and the best half step."""
    return {"lr_rises": int(np.sum(error[2::2] > error[1:-1:2])), "lr_steps": len(error[2::2]),
            "q_rises": int(np.sum(error[3::2] > error[2::2])), "q_steps": len(error[3::2]),
            "best": 1 + int(error[1:].argmin())}


def measure(config: Config) -> dict:
    """Traces of the loop and of the cautious loop on every layer; the drift of a spiked W; the loop that descends."""
    rows = []
    for name, (w, h) in common.layers(config.block).items():
        for bits in config.factor_bits:
            chosen = CalderaConfig(rank=config.rank, factor_bits=bits, outer_iterations=config.outer_iterations,
                                   svd="randomized")
            layer = jnp.asarray(w, jnp.float32), jnp.asarray(h, jnp.float32)
            trace, careful = (loop(jax.random.key(config.seed), *layer, chosen, step)
                              for step in (factorize_step, cautious))
            error, share = (np.asarray(a, np.float64) for a in (trace.error, trace.lr_share))
            rows.append({"layer": name, "factor_bits": bits, "error": error.tolist(),
                         "share": (share[::2] ** 2).tolist(), "cautious": np.asarray(careful.error).tolist(),
                         **rises(error), "first_round": float(error[1]), "least": float(error[1:].min()),
                         "cautious_least": float(np.asarray(careful.error)[1:].min())})
        print(name, flush=True)
    return {"rows": rows, "drift": [drift(config, bits) for bits in config.spiked_bits], **counts(rows),
            "descent": {kind: _descent(config, kind).tolist() for kind in common.SPECTRA}}


def drift(config: Config, bits: int) -> dict:
    """Energy of LR round by round as a share of W's, and Π (1 − δ), on the spiked W."""
    w, h = spiked(config.m, config.n, config.spiked_rank, config.share), common.hessian(config.spectrum, config.n)
    factors = hessian.factor(jnp.asarray(h), 0.01, 8)
    energy = float(np.sum((w @ np.asarray(factors.root)) ** 2))
    kept, along, lost, f = (np.asarray(a) / energy for a in memory(
        jax.random.key(config.seed), jnp.asarray(w), factors,
        CalderaConfig(rank=config.spiked_rank, factor_bits=bits), config.outer_iterations))
    return {"factor_bits": bits, "share": kept.tolist(), "along": (along[1:] / kept[:-1]).tolist(),
            "delta": (lost[1:] / kept[:-1]).tolist(), "error": np.sqrt(f).tolist()}


def _descent(config: Config, kind: str):
    w, h = common.gaussian(config.m, config.n, config.seed), common.hessian(kind, config.n)
    losses = descent(jnp.asarray(w), jnp.asarray(h), config.spiked_rank, 1.0, 2, config.outer_iterations)
    return np.sqrt(np.asarray(losses) / np.sum((w @ h) * w))


def counts(rows: list[dict]) -> dict:
    """Over the layers, by factor bits: half steps that rose, layers whose best was in round one, what caution costs."""
    out = {}
    for bits in sorted({r["factor_bits"] for r in rows}):
        chosen = [r for r in rows if r["factor_bits"] == bits]
        total = {key: sum(r[key] for r in chosen) for key in ("lr_rises", "lr_steps", "q_rises", "q_steps")}
        out[str(bits)] = {**total, "best_in_first_round": sum(r["best"] == 1 for r in chosen), "layers": len(chosen),
                          "best_after_q": sum(r["best"] % 2 == 1 for r in chosen),
                          "gain_over_first_round": float(np.mean([1 - r["least"] / r["first_round"] for r in chosen])),
                          "cost_of_caution": float(np.mean([r["cautious_least"] / r["least"] - 1 for r in chosen])),
                          "stopped_by_caution": sum(r["cautious_least"] > r["least"] for r in chosen),
                          "share_first_to_last": float(np.mean([r["share"][-1] / r["share"][0] for r in chosen]))}
    return {"counts": out}


def draw(result: dict):
    """The half steps of one layer; LR's energy leaking into Q; the loop that descends."""
    figure, (left, middle, right) = common.axes(3)
    config = result["config"]
    for i, row in enumerate(r for r in result["rows"] if r["layer"] == "q"):
        steps = np.arange(len(row["error"]))
        left.plot(steps[1:], row["error"][1:], f"C{i}-", linewidth=0.6)
        left.plot(steps[1::2], row["error"][1::2], f"C{i}o", label=f"{row['factor_bits']}-bit factors")
        left.plot(steps[2::2], row["error"][2::2], f"C{i}^", fillstyle="none")
    left.set(xlabel="half step", ylabel="relative error", ylim=(0, None),
             title=f"block {config['block']}, q, rank {config['rank']}; • after Q, ▵ after LR")
    left.legend(loc="upper center", ncols=3)
    for i, row in enumerate(result["drift"]):
        share, rounds = np.array(row["share"]), np.arange(1, 1 + len(row["share"]))
        middle.plot(rounds, share, f"C{i}o", label=f"{row['factor_bits']} bits")
        middle.plot(rounds, share[0] * np.cumprod([1, *(1 - np.array(row["delta"]))]), f"C{i}--")
    middle.set(xlabel="round", ylabel="LR's share of W's energy", ylim=(0, 1),
               title="dashed: Π (1 − δ), nothing taken of E")
    middle.legend(ncols=2)
    for i, (kind, error) in enumerate(result["descent"].items()):
        right.plot(np.arange(len(error)) / 2 + 1, np.array(error) / error[0], f"C{i}", label=kind)
    right.set(xlabel="round", ylabel="error / error of the first half step", title="coordinate descent: never rises")
    right.legend()
    return figure


SMALL = CalderaConfig(rank=4, factor_bits=4, outer_iterations=4, inner_iterations=4)


@pytest.mark.parametrize("kind", common.SPECTRA)
def test_an_unrounded_lr_step_never_raises_f_whatever_q_and_lr_were(kind):
    h = common.hessian(kind, 40)
    factors = hessian.factor(jnp.asarray(h), 0.01)
    damped = np.asarray(factors.root @ factors.root.T)
    for seed in range(4):
        w, q = common.gaussian(24, 40, seed), np.rint(common.gaussian(24, 40, seed + 9))
        rounded = lplr_factorize(jax.random.key(seed), jnp.asarray(w - q), factors, 4, *SMALL.factor_grids, 4)
        for before in (common.gaussian(24, 4, seed) @ common.gaussian(4, 40, seed + 5), np.asarray(rounded.dense())):
            found = rank_constrained(jnp.asarray(w - q), factors.root, 4)
            after = np.asarray(found.left @ found.right)
            assert common.loss(q + after - w, damped) <= common.loss(q + before - w, damped) * (1 + 1e-12)


@pytest.mark.parametrize("bits", [2, 4])
def test_a_rounded_lr_step_moves_a_point_that_is_on_its_grid(bits):
    left, right = CalderaConfig(rank=4, factor_bits=bits).factor_grids
    left_t, r = (quantize(grid, jnp.asarray(common.gaussian(4, size, 3))).values for grid, size in
                 ((left, 24), (right, 40)))
    a = left_t.T @ r
    factors = hessian.identity(40, 1, jnp.float64)
    found = lplr_factorize(jax.random.key(0), a, factors, 4, left, right, 10).dense()
    exact = rank_constrained(a, factors.root, 4)
    scale = float(jnp.sum(a**2))
    assert float(jnp.sum((exact.left @ exact.right - a) ** 2)) < 1e-20 * scale  # unrounded, it stays: f = 0
    assert float(jnp.sum((found - a) ** 2)) > 1e-4 * scale  # f was 0 before: any positive value is a rise


@pytest.mark.parametrize("grid, projection", [(E8P(), False), (NormalFloat(2), True), (Uniform(2), True)])
def test_a_fitted_scale_makes_a_lattice_no_projection_but_leaves_an_absmax_grid_one(grid, projection):
    w = quantize(grid, jnp.asarray(common.gaussian(8, 64))).values  # on its grid: f = 0 with H = I and LR = 0
    again = ldlq(w, grid, hessian.identity(64, grid.block, jnp.float64)).values
    moved = float(jnp.max(jnp.abs(again - w)))
    assert moved < 1e-12 if projection else moved > 1e-3


def test_ldlq_is_not_the_closest_point_so_it_can_undo_a_better_q_though_the_grid_is_fixed():
    rises = 0
    for seed in range(20):
        w, h = common.gaussian(3, 6, seed), common.hessian("geometric", 6, seed)
        lower = hessian.factor(jnp.asarray(h), 1e-9).lower
        q = np.asarray(block_ldlq(jnp.asarray(w), lower, integers, 1)[0])
        better_q = q.copy()  # one pass of single entries by one step each, by brute force
        for i, j, step in np.ndindex(3, 6, 2):
            trial = better_q.copy()
            trial[i, j] += 2 * step - 1
            better_q = trial if common.loss(trial - w, h) < common.loss(better_q - w, h) else better_q
        rises += common.loss(q - w, h) > common.loss(better_q - w, h) * (1 + 1e-9)
    assert rises > 0


def test_with_h_diagonal_and_a_fixed_grid_rounding_is_the_best_q_and_so_cannot_rise():
    h = np.diag(np.random.default_rng(0).uniform(0.1, 5, 12))
    w = common.gaussian(5, 12)
    lower = hessian.factor(jnp.asarray(h), 0.0).lower
    q = np.asarray(block_ldlq(jnp.asarray(w), lower, integers, 1)[0])
    for seed in range(50):
        other = q + np.random.default_rng(seed).integers(-1, 2, q.shape)
        assert common.loss(q - w, h) <= common.loss(other - w, h)


@pytest.mark.parametrize("kind", common.SPECTRA)
def test_with_q_last_noise_on_lr_costs_its_plain_mean_square_and_with_lr_last_its_weighted_one(kind):
    m, n, h = 128, 96, common.hessian(kind, 96)
    factors = hessian.factor(jnp.asarray(h), 0.01)
    h = np.asarray(factors.root @ factors.root.T)
    vectors, d = np.linalg.eigh(h)[1], np.diagonal(np.asarray(factors.root)) ** 2

    def q_step(target):
        step = np.sqrt(np.mean(target**2)) / 2  # fitted to the target, unbounded
        q = step * np.asarray(block_ldlq(jnp.asarray(target / step), factors.lower, integers, 1)[0])
        return common.loss(q - target, h)

    w, weighted = common.gaussian(m, n, 1), []
    for directions in (vectors[:, -8:], vectors[:, :8]):  # where H weighs most, and least
        delta = common.gaussian(m, 8, 2) @ directions.T
        delta *= 0.5 / np.sqrt(np.mean(delta**2))
        square = np.mean((w - delta) ** 2) / np.mean(w**2)
        # errors uniform in a cell: their squares have a relative deviation of √0.8 an entry; z = 5 for a ratio of two
        tolerance = 5 * np.sqrt(2 * 0.8 * np.sum(d**2) / m) / np.sum(d)
        assert abs(q_step(w - delta) / q_step(w) / square - 1) < tolerance < 0.3
        weighted.append(common.loss(delta, h) / common.loss(w, h))
    assert kind == "flat" or weighted[0] > 5 * weighted[1]  # LR last: H decides


@pytest.mark.parametrize("bits", [2, 16])
def test_what_rounding_takes_of_lr_is_not_given_back_along_it(bits):
    config = Config(m=64, n=96, outer_iterations=8, spectrum="flat")
    row, c = drift(config, bits), common.rounding_error(bits)
    # One round's ⟨E, LR⟩ is that of a random E of m n entries, and ⟨rounding error, factor⟩ that of errors of variance
    # c in the entries of L and R; z = 5 for the mean over rounds taken as independent.
    variance = row["error"][0] ** 2 / row["share"][-1] / (64 * 96) + c / 8 * (1 / 64 + 1 / 96)
    tolerance = 5 * np.sqrt(variance / len(row["along"]))
    along, delta = np.mean(row["along"]), np.mean(row["delta"])
    assert abs(along + delta - 1) < tolerance
    if bits == 2:
        assert delta > tolerance and row["share"][-1] < 0.8 * row["share"][0] and np.argmin(row["error"]) == 0
    else:
        assert abs(delta) < 1e-6 and row["share"][-1] > row["share"][0] and np.argmin(row["error"]) > 0


@pytest.mark.parametrize("kind", common.SPECTRA)
def test_unrounded_lr_and_coordinate_descent_on_a_fixed_scalar_grid_descend_and_come_to_rest(kind):
    h = jnp.asarray(common.hessian(kind, 24))
    for name, make in common.WEIGHTS.items():
        for rank, levels in ((0, 2), (3, 2), (3, 100), (12, 1)):
            losses = np.asarray(descent(jnp.asarray(make(12, 24)), h, rank, 0.7, levels, 40))
            assert losses[-1] == pytest.approx(losses[-5], rel=1e-12, abs=1e-12), (name, rank, levels)
            assert np.all(np.diff(losses) <= 1e-12 * losses[0] + 1e-12), (name, rank, levels)


def test_on_a_lattice_coordinate_descent_can_rise():
    h = common.hessian("geometric", 32)
    factors = hessian.factor(jnp.asarray(h), 0.01, 8)
    w = [jnp.asarray(common.gaussian(4, 32, seed)) for seed in range(8)]
    damped = np.asarray(factors.h + factors.damping * np.eye(32))
    one, two = ([common.loss(np.asarray(ldlq(x, E8P(), factors, passes).values - x), damped) for x in w]
                for passes in (1, 2))
    assert any(b > a * (1 + 1e-9) for a, b in zip(one, two, strict=True))


def test_a_cautious_lr_step_never_raises_the_error_and_rounding_does():
    w, h = (jnp.asarray(a) for a in (spiked(64, 96, 8, 0.6), common.hessian("power", 96)))
    chosen = CalderaConfig(rank=8, factor_bits=2, quantizer="uniform", factor_quantizer="uniform", rotation="none",
                           outer_iterations=6, inner_iterations=4)
    free, careful = (np.asarray(loop(jax.random.key(0), w, h, chosen, step).error)
                     for step in (factorize_step, cautious))
    assert np.all(careful[2::2] <= careful[1:-1:2] * (1 + 1e-12))
    assert rises(free)["lr_rises"] > 0
    assert np.array_equal(free[:2], careful[:2])


if __name__ == "__main__":
    common.run(__file__, Config(), measure, draw)
