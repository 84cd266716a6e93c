"""E8P at 2 bits is 0.27 bit from the Gaussian limit: 0.146 for the shape of E8's cells, the rest at the boundary.

Statement.  A code of R bits a weight, on i.i.d. weights of variance 1 and differential entropy h bits, has

    2^{2h} / (2πe) · 2^{-2R} <= MSE                   Shannon's lower bound; for a Gaussian D(R) = 2^{-2R}, the highest
    gap in bits = R + ½ log2 MSE                      against that D(R); an easier source can have a negative one

E8P's codewords are points of E8 + ¼ (D8 + ½, shifted by ±¼), so its MSE is G(E8)/gain² + overload, G(E8) = 929/12960 =
0.07168 the second moment a weight of a cell of volume 1 (cube 1/12 = 0.0833, sphere of infinite dimension 1/(2πe) =
0.0585), and its gap is ½ log2(2πe G(E8)) = 0.146 (cells; a scalar grid: 0.255) + the loss at the boundary.

Assumptions.  Density smooth on a cell, for the granular part; ``gain`` multiplies weights of RMS 1.  G(E8) is the
textbook value (Conway and Sloane), checked here; E8P is QuIP#'s (arXiv 2402.04396); the split is derived here.

Proof.  Bound: R >= I(x; x̂) >= h(x) − h(x − x̂) >= h − ½ log2(2πe MSE).  Split: the nearest codeword is never nearer than
the nearest lattice point, and is that point where it is a codeword; under a density smooth on a cell the error is
uniform on the Voronoi cell.  h = log2(e√2) for a Laplacian, so its bound is (e/π) 2^{-2R}; uniform: 6/(πe) 2^{-2R}.

Verdict.  Unit Gaussian, 2 bits: MSE 0.0914, gap 0.274 = 0.146 cells + 0.128 boundary.  Granular: 0.0676 = G(E8)/1.03²
to four places; for 31 % of the blocks the nearest lattice point is no codeword, and that makes 26 % of the error.
Entropy coding would save 0.051 (1.949 bits).  Scalars at 2 bits: Lloyd–Max 0.1175 (gap 0.455), uniform 0.119 with the
best range and 0.96 with the largest magnitude as range, no better than rounding all to 0; dithered about twice that.
E8P's lead shrinks with the bits, as its first stage overloads: gaps 0.275, 0.46 and 0.61 at 2, 3 and 4 bits against
Lloyd–Max's 0.46, 0.57 and 0.64.
  Scales: 1.03 is the best gain of the sweep at 2 bits, and (0.98, 2.04) the best pair at 3.  At 4 bits 3.45 is the best
for gain 1, but the pair (0.9, 3.8) has 0.0084 against 0.0092: 9 % less error, 0.065 bit.
  Sources: rotated layers are Gaussian to E8P (0.0916 to 0.0920, gap 0.28); unrotated (0.115 to 0.159) they are like a
Laplacian (0.121) or Student's t5 (0.129), whose best gains are below 1.  There a second stage helps little, as what
the first leaves is overload and not cells: at 4 bits 0.033 on t5 and 0.046 on q, against 0.0092.
"""

from dataclasses import dataclass

import common
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize_scalar

from caldera_jax import E8P, Codebook, Dithered, Half, NormalFloat, ResidualE8P, Uniform, incoherence, lattice
from caldera_jax.codebooks import by_bits, quantize

G_E8, G_SPHERE, G_CUBE = 929 / 12960, 1 / (2 * np.pi * np.e), 1 / 12  # second moments of a cell of volume 1, a weight


@dataclass(frozen=True)
class Config:
    """Quantizers, and the sweeps of their free numbers."""

    samples: int = 2**19
    quantizers: tuple[Codebook, ...] = (
        *(kind(bits) for bits in (2, 3, 4) for kind in (Uniform, Dithered)), *(NormalFloat(b, 64) for b in (2, 3, 4)),
        *(by_bits("e8p", bits) for bits in (2, 3, 4, 8, 16)))
    gains: tuple[float, ...] = (0.8, 0.85, 0.9, 0.95, 0.98, 1.0, 1.03, 1.06, 1.1, 1.15, 1.2)
    scales_3: tuple[float, ...] = (1.8, 1.9, 2.0, 2.04, 2.1, 2.2, 2.4)
    scales_4: tuple[float, ...] = (2.8, 3.1, 3.3, 3.45, 3.6, 3.8, 4.1)
    layers: tuple[str, ...] = ("q", "o", "down")
    seed: int = 0


SOURCES = {"gaussian": stats.norm(), "laplace": stats.laplace(scale=np.sqrt(0.5)),
           "uniform": stats.uniform(-np.sqrt(3), 2 * np.sqrt(3)), "student t5": stats.t(5, scale=np.sqrt(3 / 5))}


def sample(name: str, count: int, seed: int = 0) -> np.ndarray:
    """[count / 64, 64] i.i.d. numbers of variance 1."""
    return SOURCES[name].rvs((count // 64, 64), random_state=np.random.default_rng(seed))


def shannon_lower_bound(name: str, bits: float) -> float:
    """2^{2h} / (2πe) · 2^{-2R}, h the differential entropy: no code of ``bits`` a weight does better."""
    return float(np.exp(2 * SOURCES[name].entropy()) * G_SPHERE * 4.0**-bits)


def gap(mse: float, bits: float) -> float:
    """Bits a weight above the rate–distortion function of a Gaussian of variance 1."""
    return float(bits + np.log2(mse) / 2)


def rate(codebook: Codebook) -> float:
    """Bits a weight, with 16 for the scale of a group."""
    return codebook.code_bits / codebook.block + (16 / codebook.group if codebook.group else 0)


def error(codebook: Codebook, x) -> np.ndarray:
    """Squared errors of the package's quantizer over the mean square of x, same shape as x."""
    x = jnp.asarray(x)
    return np.asarray((quantize(codebook, x, jax.random.key(0)).values - x) ** 2 / jnp.mean(x**2))


def mse(codebook: Codebook, x) -> tuple[float, float]:
    """Mean of ``error`` and its standard error, blocks of 8 being independent."""
    blocks = error(codebook, x).reshape(-1, 8).mean(1)
    return float(blocks.mean()), float(blocks.std() / np.sqrt(len(blocks)))


def best_clip(bits: int, x) -> float:
    """The range of a uniform grid, in units of the RMS, with the least error on x."""
    found = minimize_scalar(lambda clip: mse(Uniform(bits, clip=float(clip)), x)[0], bounds=(0.8, 5), method="bounded",
                            options={"xatol": 1e-3})
    return float(found.x)


def lloyd_max(bits: int, steps: int = 2000) -> float:
    """Mean squared error of the best scalar quantizer of a unit Gaussian: levels and thresholds in turn."""
    levels = stats.norm.ppf((np.arange(2**bits) + 0.5) / 2**bits)
    for _ in range(steps):
        edges = np.r_[-np.inf, (levels[1:] + levels[:-1]) / 2, np.inf]
        mass = np.diff(stats.norm.cdf(edges))
        levels = -np.diff(stats.norm.pdf(edges)) / mass
    return float(1 - mass @ levels**2)  # at the centroids the error is the variance less the energy of the levels


def nearest_e8(x: np.ndarray) -> np.ndarray:
    """The nearest point of E8 = D8 ∪ (D8 + ½) to each row [N, 8]."""
    def d8(y):
        near = np.rint(y)
        rows, worst = np.arange(len(y)), np.abs(y - near).argmax(1)
        other = near.copy()
        other[rows, worst] += np.where(y[rows, worst] > near[rows, worst], 1, -1)
        return np.where(near.sum(1, keepdims=True) % 2 == 0, near, other)

    whole, half = d8(x), d8(x - 0.5) + 0.5
    closer = ((x - whole) ** 2).sum(1) <= ((x - half) ** 2).sum(1)
    return np.where(closer[:, None], whole, half)


def decompose(x: np.ndarray, gain: float) -> dict[str, float]:
    """E8P's error on x [., 64] of unit mean square against the whole lattice E8 + ¼ at the same scale."""
    y = gain * x.reshape(-1, 8)
    found, codes = (np.asarray(a) for a in E8P().round(jnp.asarray(y)))
    near = nearest_e8(y - 0.25) + 0.25
    total, granular = ((found - y) ** 2).mean(1) / gain**2, ((near - y) ** 2).mean(1) / gain**2
    outside = (found != near).any(1)
    share = np.bincount(codes.ravel(), minlength=1 << 16) / len(codes)
    used = share[share > 0]
    entropy = -(used * np.log2(used)).sum() + (len(used) - 1) / (2 * np.log(2) * len(codes))  # Miller–Madow
    return {"mse": float(total.mean()), "granular": float(granular.mean()), "outside": float(outside.mean()),
            "excess_outside": float((total - granular)[outside].mean()), "entropy": float(entropy / 8),
            "error_inside": float(np.abs((total - granular)[~outside]).max())}


def measure(config: Config) -> dict:
    """Errors and gaps on every source; the parts of E8P's gap; the sweeps of gains and residual scales."""
    sources = {name: sample(name, config.samples, config.seed) for name in SOURCES}
    real = common.layers()
    for name in config.layers:
        w = jnp.asarray(real[name][0])
        rotated = incoherence.rotate_weight(incoherence.draw(jax.random.key(config.seed), *w.shape, dtype=w.dtype), w)
        sources |= {f"{name}, rotated": np.asarray(rotated), name: np.asarray(w)}
    rows = []
    for name, x in sources.items():
        clipped = tuple(Uniform(bits, clip=best_clip(bits, x)) for bits in (2, 3, 4))
        for grid in (*config.quantizers, *clipped):
            found, deviation = mse(grid, x)
            bound = shannon_lower_bound(name, rate(grid)) if name in SOURCES else None
            rows.append({"source": name, "quantizer": label(grid), "bits": rate(grid), "mse": found,
                         "standard_error": deviation, "gap": gap(found, rate(grid)), "shannon_lower_bound": bound})
    x = sources["gaussian"]
    sweeps = {"gain": {name: [mse(E8P(gain), x)[0] for gain in config.gains] for name, x in sources.items()}}
    for bits, scales, gain in ((3, config.scales_3, 0.98), (4, config.scales_4, 1.0)):
        sweeps[f"residual_{bits}"] = [mse(ResidualE8P(bits, gain, s), x)[0] for s in scales]
        found = by_bits("e8p", bits).residual_scale
        sweeps[f"gain_{bits}"] = [mse(ResidualE8P(bits, g, found), x)[0] for g in config.gains]
    joint = {f"{bits}": [{"gain": g, "scale": s, "mse": mse(ResidualE8P(bits, g, s), x)[0]}
                         for g in config.gains[1:6] for s in scales]
             for bits, scales in ((3, config.scales_3), (4, config.scales_4))}
    sweeps["joint_best"] = {bits: min(found, key=lambda r: r["mse"]) for bits, found in joint.items()}
    parts = decompose(sample("gaussian", 2**24, config.seed + 1), 1.03)
    cells = np.random.default_rng(config.seed).uniform(0, 2, (2**18, 8))  # 2 Z^8 is in E8: uniform over its cells
    return {"rows": rows, "sweeps": sweeps, "parts": parts, "lloyd_max": {b: lloyd_max(b) for b in (1, 2, 3, 4)},
            "g_e8": float(((cells - nearest_e8(cells)) ** 2).mean()), "losses_in_bits": losses(parts["mse"])}


def losses(found: float) -> dict[str, float]:
    """The gap of a 2-bit Gaussian error: cells against spheres of the same volume, and what is left."""
    cells = 0.5 * np.log2(G_E8 / G_SPHERE)
    return {"total": gap(found, 2), "cells": float(cells), "boundary": gap(found, 2) - float(cells),
            "cells_of_scalar": float(0.5 * np.log2(G_CUBE / G_SPHERE))}


def label(grid: Codebook) -> str:
    """A short name for tables and figures."""
    names = {E8P: "E8P", ResidualE8P: "E8P", NormalFloat: "NormalFloat", Dithered: "Dithered", Half: "float16"}
    return names.get(type(grid), "Uniform, best clip" if getattr(grid, "clip", None) else "Uniform, absmax")


def draw(result: dict):
    """Gap in bits on a Gaussian; E8P's gap on every source; E8P's error against its gain."""
    figure, (left, middle, right) = common.axes(3, height=2.8)
    kinds = list(dict.fromkeys(r["quantizer"] for r in result["rows"]))
    for i, kind in enumerate(k for k in kinds if k != "float16"):
        rows = sorted((r["bits"], r["gap"]) for r in result["rows"]
                      if r["quantizer"] == kind and r["source"] == "gaussian" and r["bits"] < 5)
        left.plot(*zip(*rows, strict=True), "o-", color=f"C{i}", label=kind)
    scalar = [(int(b), int(b) + np.log2(found) / 2) for b, found in result["lloyd_max"].items() if int(b) > 1]
    left.plot(*zip(*scalar, strict=True), "kx-", label="Lloyd–Max")
    for loss, name, side in (("cells_of_scalar", "cells: cube", "bottom"), ("cells", "cells: E8", "top")):
        left.axhline(result["losses_in_bits"][loss], color="k", linestyle=":", linewidth=0.7)
        left.text(4.3, result["losses_in_bits"][loss], name, ha="right", va=side, fontsize=6)
    left.set(xlabel="bits a weight", ylabel="gap in bits", title="above D(R), unit Gaussian", ylim=(0, 3.6))
    left.legend(loc="upper right", ncols=2)
    sources = list(dict.fromkeys(r["source"] for r in result["rows"]))
    for i, bits in enumerate((2, 3, 4)):
        gaps = [next(r["gap"] for r in result["rows"] if (r["source"], r["quantizer"], r["bits"]) == (s, "E8P", bits))
                for s in sources]
        middle.plot(gaps, range(len(sources)), "o", color=f"C{i}", label=f"{bits} bits")
    middle.set_yticks(range(len(sources)), sources)
    middle.set(xlabel="gap in bits", title="E8P by source")
    middle.legend(loc="lower right")
    gains = result["config"]["gains"]
    for i, name in enumerate(("gaussian", "q, rotated", "uniform", "laplace", "student t5")):
        right.plot(gains, result["sweeps"]["gain"][name], "--" if "q" in name else ".-", color=f"C{i}", label=name)
    right.axvline(1.03, color="k", linestyle=":", linewidth=0.7)
    right.axhline(1 / 16, color="k", linewidth=0.7)
    right.text(gains[0], 0.0635, "D(2), Gaussian", fontsize=6)
    right.set(xlabel="gain", ylabel="mean squared error", title="E8P, 2 bits", ylim=(0.055, 0.19))
    right.legend(loc="upper center", ncols=2)
    return figure


GAUSSIAN = sample("gaussian", 2**18, 3)


def test_the_scalar_facts_come_out():
    np.testing.assert_allclose(lloyd_max(1), 1 - 2 / np.pi, rtol=1e-12)
    np.testing.assert_allclose(lloyd_max(2), 0.1175, atol=5e-5)  # given to four places
    for bits in (2, 3, 4):
        found, deviation = mse(Uniform(bits, clip=best_clip(bits, GAUSSIAN)), GAUSSIAN)
        assert 4.0**-bits < lloyd_max(bits) < found + 5 * deviation  # no scalar grid beats Lloyd–Max
        assert mse(NormalFloat(bits, None), GAUSSIAN)[0] > lloyd_max(bits) < mse(Dithered(bits), GAUSSIAN)[0]
    assert abs(mse(Uniform(2, clip=best_clip(2, GAUSSIAN)), GAUSSIAN)[0] - 0.1188) < 5 * deviation * 8
    x = sample("uniform", 2**18)
    exact = ((Uniform(2, clip=0.75 * np.sqrt(3)), 1 / 16), (Uniform(2), 1 / 9), (Dithered(2), 2 / 9))
    for grid, expected in exact:  # step² / 12: steps of a quarter, and of a third, of the range; dithered: step² / 6
        found, deviation = mse(grid, x)
        assert abs(found - expected) < 5 * deviation


def test_the_second_moment_of_e8_is_929_over_12960_below_that_of_the_cube_and_of_d8():
    x = np.random.default_rng(1).uniform(0, 2, (2**17, 8))
    errors = ((x - nearest_e8(x)) ** 2).mean(1)
    assert abs(errors.mean() - G_E8) < 5 * errors.std() / np.sqrt(len(x))
    cube = ((x - np.rint(x)) ** 2).mean(1)
    assert abs(cube.mean() - G_CUBE) < 5 * cube.std() / np.sqrt(len(x))
    assert G_SPHERE < G_E8 < G_CUBE - 0.01


def test_no_root_of_e8_leads_to_a_nearer_point():
    x = np.random.default_rng(2).normal(size=(500, 8)) * 3
    near = nearest_e8(x)
    whole, half = near == np.rint(near), near - 0.5 == np.rint(near - 0.5)
    assert (whole.all(1) | half.all(1)).all() and (near.sum(1) % 2 == 0).all()
    for root in lattice.e8_codewords()[1:241]:  # the 240 faces of the Voronoi cell
        assert (((x - near - root) ** 2).sum(1) >= ((x - near) ** 2).sum(1) - 1e-9).all()


def test_e8p_is_e8_where_the_lattice_point_is_a_codeword_and_its_parts_add_up():
    parts = decompose(GAUSSIAN, 1.03)
    errors = error(E8P(), GAUSSIAN).reshape(-1, 8).mean(1)
    deviation = 5 * errors.std() / np.sqrt(len(errors))
    assert parts["error_inside"] < 1e-12 and 0.29 < parts["outside"] < 0.33
    np.testing.assert_allclose(parts["mse"], parts["granular"] + parts["outside"] * parts["excess_outside"], rtol=1e-9)
    assert abs(parts["granular"] - G_E8 / 1.03**2) < deviation  # the parts vary less than the whole
    assert abs(parts["mse"] - 0.0915) < deviation + 0.00005  # given to four places
    assert parts["granular"] > 1.05 * G_SPHERE / 1.03**2 and parts["mse"] > 1.3 * parts["granular"]
    split = losses(0.0915)
    np.testing.assert_allclose([split["total"], split["cells"], split["boundary"]], [0.275, 0.146, 0.129], atol=6e-4)


@pytest.mark.parametrize("name", SOURCES)
def test_no_quantizer_beats_shannons_lower_bound(name):
    x = sample(name, 2**15, 5)
    for grid in (*Config.quantizers, Uniform(2, clip=1.3), Uniform(3, clip=1.6), Uniform(4, clip=1.7), E8P(1.1)):
        found, deviation = mse(grid, x)
        assert found + 5 * deviation >= shannon_lower_bound(name, rate(grid))
    np.testing.assert_allclose(shannon_lower_bound("gaussian", 2), 1 / 16, rtol=1e-12)
    np.testing.assert_allclose(shannon_lower_bound("laplace", 2), np.e / np.pi / 16, rtol=1e-9)
    assert shannon_lower_bound(name, 2) <= (1 + 1e-12) / 16  # Gaussian is the hardest source of its variance


def test_the_gaussian_limit_binds_the_gaussian_only():
    signs = np.sign(GAUSSIAN[:64])
    assert mse(Uniform(1), signs)[0] < 1e-12 < 4.0**-1
    assert mse(E8P(), GAUSSIAN)[0] > 4.0**-2 * 1.3


def test_published_gains_and_residual_scales_are_the_best_on_a_gaussian_but_for_the_gain_at_4_bits():
    def better(a, b):  # paired: the same weights, blocks of 8 independent
        difference = (error(b, GAUSSIAN) - error(a, GAUSSIAN)).reshape(-1, 8).mean(1)
        return difference.mean() / (difference.std() / np.sqrt(len(difference)))

    for other in (0.9, 0.95, 1.1, 1.2):
        assert better(E8P(1.03), E8P(other)) > 5
    for bits, gain, scale, others in ((3, 0.98, 2.04, (1.8, 2.4)), (4, 1.0, 3.45, (3.1, 3.8, 0.9))):
        assert by_bits("e8p", bits) == ResidualE8P(bits, gain, scale)
        for other in others:
            assert better(ResidualE8P(bits, gain, scale), ResidualE8P(bits, gain, other)) > 5
    assert better(ResidualE8P(3, 0.98, 2.04), ResidualE8P(3, 1.1, 2.04)) > 5
    assert better(ResidualE8P(4, 0.9, 3.8), by_bits("e8p", 4)) > 5


def test_heavy_tails_overload_the_ball_and_a_rotation_restores_it():
    w = sample("student t5", 2**18).reshape(512, 512)
    gaussian, _ = mse(E8P(), GAUSSIAN)
    heavy, _ = mse(E8P(), w)
    assert heavy > 1.3 * gaussian and mse(by_bits("e8p", 4), w)[0] > 2.5 * mse(by_bits("e8p", 4), GAUSSIAN)[0]
    assert mse(E8P(0.95), w)[0] < heavy
    rotation = incoherence.draw(jax.random.key(0), 512, 512, dtype=jnp.float64)
    rotated, deviation = mse(E8P(), incoherence.rotate_weight(rotation, jnp.asarray(w)))
    assert abs(rotated - gaussian) < 5 * np.sqrt(2) * deviation


if __name__ == "__main__":
    common.run(__file__, Config(), measure, draw)
