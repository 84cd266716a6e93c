"""At one level no rank pays, unless W has directions of its own that the steps cannot use.

Statement (derived here).  W ≈ Z + L R, all at level c (``levels.decompose``), so that the loss is that of the level
with any rank, and only bits differ.  Ŵ = √g W [m, n], D of H = lower D lowerᵀ, and u Ŵ H^½ = s vᵀ the leading
direction, R = u Ŵ its row.  Where a Gaussian of variance σ² costs b(σ / step) bits at its step, the rank of 1 takes

    Σ_j b(|R| / √n · √D_j / c)  +  m b(s / (√m c))          bits of R, whose error costs D_j; and of L, whose costs s²
    −  m Σ_j [b(σ_0 √D_j / c) − b(σ_1 √D_j / c)]            of Z: σ_0² = ‖Ŵ‖² / (m n),  σ_1² = (‖Ŵ‖² − |R|²) / (m n)

more than none.  It pays where that is below 0.
(1) At high rate Z saves (m n / 2) log2(1 / (1 − θ)) bits, θ = |R|² / ‖Ŵ‖² the share of **W itself**, whatever H: about
    0.72 m n θ for a small one.
(2) A direction that stands out for H alone has θ of about 1 / m, as any: Z saves 0.72 n bits, and R alone costs n times
    its rate.  So it does not pay above 0.72 bit a weight, however large its share of ‖W H^½‖² is.
(3) A spike in W does: with θ fixed and m, n growing Z saves O(m n) bits for O(m + n).

Assumptions.  Gaussian targets, no feedback widening; b is measured (``levels.rates``).  In (1) to (3) those of
a matrix have one variance; predicted bits know, as the coder does, that of each row and column, and take k directions
together.  Classes of widths and streams' ends are not counted: they are the same for every c, and only against L R.

Proof.  L has orthonormal columns in the metric of g, so that L δR costs tr(δR H δRᵀ), LDLQ's with steps c / √D_j; δL
costs s² a column, steps c / s, and has the mean square 1 / m.  What Z rounds has lost |R|² of ‖Ŵ‖².  At high rate b(x)
= log2(x) + const, and (1) follows; E |u Ŵ|² = ‖Ŵ‖² / m for u independent of Ŵ.

Verdict: predicts on both sides. On the seven layers of block 14, at about 1, 2 and 3 bits, rank 1 saves at most 0.003
bit a weight, on down, before the classes that it would store are counted; elsewhere it costs up to 0.06, rank 16 costs
0.04 to 0.34 and rank 64 0.09 to 1.05, at a loss that stays within 8 %. So no rank pays there, though 16 directions hold
34 to 91 % of ‖W H^½‖². Of 54 made-up W with eight spikes, from −1.5 to 0.4 bit, the sign is right in 53; spikes pay
from 20 to 80 % of ‖W‖² on, the later the narrower W and the more uneven H.
"""

from dataclasses import dataclass
from functools import partial

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caldera_jax import entropy, hessian, levels
from caldera_jax.levels import LevelConfig
from caldera_jax.linear import at_level


@dataclass(frozen=True)
class Config:
    """Layers of one block at these levels, which give about 1.2, 2 and 3 bits; and spiked W over shares and widths."""

    block: int = 14
    ranks: tuple[int, ...] = (1, 4, 16, 64)
    bits: tuple[float, ...] = (1.2, 2.0, 3.0)
    widths: tuple[int, ...] = (64, 128, 256)
    shares: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.9)
    spectra: tuple[str, ...] = ("flat", "power")
    states: int = 8
    seed: int = 0


factor = partial(jax.jit, static_argnums=(1, 2))(hessian.factor)


def price(sigma: np.ndarray, step: np.ndarray | float, states: int) -> np.ndarray:
    """b: bits of a Gaussian of this deviation at this step, as ``levels.rates`` measured them."""
    widths = np.arange(entropy.WIDTHS[0], entropy.WIDTHS[1] + 1)
    with np.errstate(divide="ignore"):
        classes = 8 * np.log2(np.asarray(sigma) / step)
    return np.interp(classes, widths, levels.rates(LevelConfig(states)))


def extra_bits(w: np.ndarray, root: np.ndarray, d: np.ndarray, c: float, ranks, states: int) -> dict[int, float]:
    """The statement: bits that each rank takes more than none, a weight; W already times √g."""
    m, n = w.shape
    u, s, _ = np.linalg.svd(w @ root, full_matrices=False)
    steps = c / np.sqrt(d)
    of = lambda a, steps: float(np.sum(price(sizes(a), steps, states)))
    parts = {k: (u[:, :k], u[:, :k].T @ w) for k in ranks}
    total = {k: of(w - left @ right, steps) + of(right, steps) + of(left, c / s[:k])
             for k, (left, right) in parts.items()}
    return {k: (bits - of(w, steps)) / w.size for k, bits in total.items()}


def sizes(a: np.ndarray) -> np.ndarray:
    """What the coder knows of the numbers of a matrix: the root mean square of the row times that of the column."""
    rows, columns = (np.sqrt(np.mean(a**2, axis=axis)) for axis in (1, 0))
    return np.outer(rows, columns) / np.sqrt(np.mean(a**2))


def measured_bits(w, h, c: float, rank: int, states: int) -> tuple[float, float]:
    """Bits a weight of the integers of Z, L and R by the tables, sides left out, and the loss with the damped H."""
    *parts, _ = at_level(w, h, np.ones(len(w)), c, LevelConfig(states, rank=rank))
    bits = sum(entropy.bits(*map(np.asarray, (part.integers, part.spread, part.width)), states)[0].sum()
               for part in parts if part is not None)
    z, left, right = (None if part is None else np.asarray(part.dense(jnp.float64)) for part in parts)
    e = z - w if left is None else z + left @ right - w
    damped = h + 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
    return float(bits) / w.size, float(np.sum((e @ damped) * e))


def level_of(w, d: np.ndarray, bits: float) -> float:
    """About the c of so many bits."""
    return float(np.sqrt(np.mean(w**2) * np.exp(np.mean(np.log(d)))) * 2.0**(1.05 - bits))


def compare(w, h, bits: float, ranks, states: int, **names) -> list[dict]:
    """Predicted and measured extra bits of each rank, and how the loss changes."""
    factors = factor(jnp.asarray(h), 0.01, 1)
    size = np.mean(np.diag(h))
    root = np.sqrt(size) * np.asarray(factors.root)
    d = np.diagonal(root) ** 2
    c = level_of(w, d, bits)
    plain, loss = measured_bits(w, h, c, 0, states)
    predicted = extra_bits(w, root, d, c, ranks, states)
    energy = np.linalg.svd(w @ root, compute_uv=False) ** 2
    own = np.linalg.svd(w, compute_uv=False) ** 2
    rows = []
    for k in ranks:
        found, lost = measured_bits(w, h, c, k, states)
        rows.append({**names, "rank": k, "bits": plain, "predicted": predicted[k], "measured": found - plain,
                     "loss": lost / loss, "share_of_wh": float(energy[:k].sum() / energy.sum()),
                     "share_of_w": float(own[:k].sum() / own.sum())})
    return rows


SPIKES = 8


def spiked(m: int, n: int, share: float, seed: int = 0) -> np.ndarray:
    """White W and directions of its own that hold this share of ‖W‖²."""
    w = common.gaussian(m, n, seed)
    spike = common.gaussian(m, SPIKES, seed + 1) @ common.gaussian(SPIKES, n, seed + 2)
    spike *= np.sqrt(share / (1 - share) * np.sum(w**2) / np.sum(spike**2))
    return w + spike


def measure(config: Config) -> dict:
    """Every rank on every layer, and that of the spikes on spiked W."""
    layers, spikes = [], []
    for name, (w, h) in common.layers(config.block).items():
        for bits in config.bits:
            layers += compare(w, h, bits, [k for k in config.ranks if k < min(w.shape)], config.states, layer=name)
        print(name, flush=True)
    for n in config.widths:
        for kind in config.spectra:
            for share in config.shares:
                spikes += compare(spiked(2 * n, n, share), common.hessian(kind, n), 2.0, [SPIKES], config.states,
                                  width=n, spectrum=kind, share=share)
        print(n, flush=True)
    sign = [(r["predicted"] < 0) == (r["measured"] < 0) for r in spikes]
    return {"layers": layers, "spikes": spikes, "paid": sum(r["measured"] < 0 for r in layers),
            "right": sum(sign), "of": len(sign)}


def draw(result: dict):
    """Extra bits by rank on layers, and of a spike by its share; predicted and measured."""
    figure, (left, middle, right) = common.axes(3)
    for i, name in enumerate(dict.fromkeys(r["layer"] for r in result["layers"])):
        rows = [r for r in result["layers"] if r["layer"] == name]
        near = min((r["bits"] for r in rows), key=lambda bits: abs(bits - 2))
        rows = [r for r in rows if r["bits"] == near]
        left.plot([r["rank"] for r in rows], [r["measured"] for r in rows], f"C{i}o-", label=f"{name}, {near:.1f} bits")
        left.plot([r["rank"] for r in rows], [r["predicted"] for r in rows], f"C{i}:")
    left.set(xlabel="rank", ylabel="bits a weight more than none", title=f"block {result['config']['block']}, dotted: "
             "predicted", xscale="log")
    left.legend(ncols=2)
    for i, n in enumerate(result["config"]["widths"]):
        for kind, marker in zip(result["config"]["spectra"], "os", strict=True):
            rows = [r for r in result["spikes"] if (r["width"], r["spectrum"]) == (n, kind)]
            middle.plot([r["share"] for r in rows], [r["measured"] for r in rows], f"C{i}{marker}", fillstyle="none",
                        label=f"{2 * n} x {n}, {kind}")
            middle.plot([r["share"] for r in rows], [r["predicted"] for r in rows], f"C{i}-", linewidth=0.7)
    middle.axhline(0, color="0.5", linewidth=0.6)
    middle.set(xlabel="share of the spikes in ‖W‖²", ylabel="bits a weight more than none",
               title=f"rank {SPIKES}; lines: predicted")
    middle.legend()
    right.loglog([r["share_of_wh"] for r in result["layers"]], [r["share_of_w"] for r in result["layers"]], "k.")
    right.set(xlabel="share of ‖W H^½‖² in k directions", ylabel="share of ‖W‖² in k of its own", title="layers")
    return figure


@pytest.mark.parametrize("kind, share, pays", [("flat", 0.0, False), ("power", 0.0, False), ("flat", 0.8, True),
                                               ("power", 0.8, True)])
def test_a_spike_of_w_pays_and_a_direction_of_h_does_not(kind, share, pays):
    (row,) = compare(spiked(192, 96, share), common.hessian(kind, 96), 2.0, [SPIKES], 8)
    assert (row["predicted"] < 0) == (row["measured"] < 0) == pays
    assert row["measured"] == pytest.approx(row["predicted"], rel=0.25, abs=0.03)
    assert row["loss"] == pytest.approx(1, abs=0.15)  # of the level, with any rank
    assert kind == "flat" or row["share_of_wh"] > 0.1


def test_at_high_rate_z_saves_what_the_share_of_w_says_whatever_h():
    w, n = spiked(96, 40, 0.2), 40
    w = w @ np.diag(1 / np.sqrt(np.mean(w**2, axis=0)))  # rows and columns of one size, about
    w = w / np.sqrt(np.mean(w**2, axis=1))[:, None]
    for kind in ("flat", "geometric"):
        root = np.asarray(factor(jnp.asarray(common.hessian(kind, n)), 0.01, 1).root)
        d = np.diagonal(root) ** 2
        u, s, _ = np.linalg.svd(w @ root, full_matrices=False)
        left, right = u[:, :SPIKES], u[:, :SPIKES].T @ w
        theta = np.sum(right**2) / np.sum(w**2)
        c = level_of(w, d, 5.0)
        found = extra_bits(w, root, d, c, [SPIKES], 8)[SPIKES] * w.size
        of_r = np.sum(price(sizes(right), c / np.sqrt(d), 8))
        of_l = np.sum(price(sizes(left), c / s[:SPIKES], 8))
        assert found - of_r - of_l == pytest.approx(-w.size / 2 * np.log2(1 / (1 - theta)), rel=0.2)


def test_a_direction_of_h_holds_an_ordinary_share_of_w():
    w, h = common.gaussian(400, 60, 0), common.hessian("spiked", 60)
    root = np.linalg.cholesky(h)
    u, s, _ = np.linalg.svd(w @ root, full_matrices=False)
    assert s[0] ** 2 / np.sum(s**2) > 0.2  # it stands out for H
    assert np.sum((u[:, 0] @ w) ** 2) / np.sum(w**2) < 3 / 60  # and is one of sixty in W


def test_what_low_rank_costs_is_what_its_rounding_says():
    """R's error costs tr(δR H δRᵀ), L's sᵢ² a column: all at one level lose the same a number."""
    w, h = spiked(160, 64, 0.5), common.hessian("power", 64)
    *parts, _ = at_level(w, h, np.ones(160), 0.2, LevelConfig(8, rank=2))
    z, left, right = (np.asarray(part.dense(jnp.float64)) for part in parts)
    factors = factor(jnp.asarray(h), 0.01, 1)
    root = np.asarray(factors.root) * np.sqrt(np.mean(np.diag(h)))
    inner = right @ root
    best = np.linalg.lstsq(inner.T, (w @ root).T, rcond=None)[0].T
    lost = np.sum(((left - best) @ inner) ** 2) / left.size
    assert 0.2 < lost / 0.2**2 < 0.35  # d of 8 states: 0.268
    e = z - (w - left @ right)
    assert 0.2 < np.sum((e @ root) ** 2) / w.size / 0.2**2 < 0.35


if __name__ == "__main__":
    common.run(__file__, Config(), measure, draw)
