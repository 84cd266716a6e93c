"""The layer-wise baselines: each against its definition, and the bits of each counted by hand."""

import re
import sys
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import matrices
import numpy as np
import oracles
import pytest
from scipy import integrate, optimize, stats

import caldera_jax as cj
from caldera_jax import codebooks, incoherence, kernels, lattice, linear

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
import baselines  # noqa: E402
import grids  # noqa: E402
import low_rank  # noqa: E402
import starts  # noqa: E402
from baselines import Layer  # noqa: E402

METHODS = baselines.METHODS | low_rank.METHODS
replace = partial(baselines.replace, methods=METHODS)
KEY = jax.random.key(5)
SHAPES = ((40, 52), (33, 24))
U = 2.0**-11  # unit roundoff of float16
EPS = float(np.finfo(np.float32).eps)
FEW = {"outer_iterations": 2, "inner_iterations": 1}
ROTATE, TURN = jax.jit(incoherence.rotate), jax.jit(incoherence.rotate_weight)


@cache
def _layer(m=33, n=24, kind="geometric", seed=0, size=0.02):
    w = (size * matrices.gaussian(m, n, seed)).astype(np.float32)
    fisher = np.random.default_rng(seed).random((m, n)).astype(np.float32)
    return Layer(w, matrices.hessian(kind, n, seed).astype(np.float32), fisher)


@cache
def _found(name, layer_of=(33, 24, "geometric"), **settings):
    return replace(name, KEY, _layer(*layer_of), **settings)


def _weight(name, layer, **settings):
    return np.asarray(replace(name, KEY, layer, **settings).weight, np.float64)


def _double(layer):
    return Layer(*(None if a is None else jnp.asarray(a, jnp.float64) for a in layer))


def _error(layer, weight, h=None):
    """sqrt(tr(E H Eᵀ)), H = I where none is given."""
    e = np.asarray(weight, np.float64) - np.asarray(layer.w, np.float64)
    return np.sqrt(oracles.loss(e, np.eye(e.shape[1]) if h is None else np.asarray(h, np.float64)))


# --- what all have in common: settings, and bits by hand; ``rows`` of c codes of b bits end on whole bytes


def _rows(m, n, bits):
    return m * 8 * -(-n * bits // 8)


def _groups(m, n, group, bits):
    return m * -(-n // group) * bits


def _nf(m, n, bits, double=True):
    groups = _groups(m, n, 64, 1)
    return _rows(m, n, bits) + (8 * groups + 32 * -(-groups // 256) + 32 if double else 16 * groups)


def _halves(m, n, k):
    return 16 * k * (m + n) + 64


def _by_rows(m, n, k, bits):
    """Factors of 8 bits, or of 4 in whole blocks of 8; a float16 scale a row of each."""
    up = lambda size: size + -size % 8 if bits == 4 else size
    return k * (bits * (up(m) + up(n)) + 2 * 16)


def _most(bits, stored):
    """The most that factors store of so many bits a weight."""
    return lambda m, n: max(b for k in range(n + 1) if (b := stored(m, n, k)) <= bits * m * n)


def _lattice(m, n, bits, k=0, factor_bits=4):
    """Whole blocks of 8, a float32 scale a matrix, and signs."""
    up = lambda size: size + -size % 8
    factors = k * factor_bits * (up(m) + up(n) if factor_bits < 8 else m + n) + 64 if k else 0
    return (m * up(n) * bits + 32 if bits else 0) + factors + up(m) + up(n)


CHEAP = [
    ("rtn", {"bits": 4}, lambda m, n: _rows(m, n, 4) + 20 * m),
    ("rtn", {"bits": 3, "group": 7}, lambda m, n: _rows(m, n, 3) + _groups(m, n, 7, 19)),
    ("rtn", {"bits": 2, "group": 1, "clip": False}, lambda m, n: _rows(m, n, 2) + 18 * m * n),
    ("nf", {"bits": 3, "double": False}, lambda m, n: _nf(m, n, 3, False)),
    ("nf", {"bits": 3}, lambda m, n: _nf(m, n, 3)),
    ("gptq", {"bits": 2, "order": "columns"}, lambda m, n: _rows(m, n, 2) + 18 * m),
    ("gptq", {"bits": 4, "group": 16}, lambda m, n: _rows(m, n, 4) + _groups(m, n, 16, 20)),
    ("gptq_rotated", {"bits": 2}, lambda m, n: _rows(m, n, 2) + 16 * m + _rows(1, m, 1) + _rows(1, n, 1)),
    ("binary", {}, lambda m, n: _rows(m, n, 1) + 16 * m),
    ("binary", {"feedback": True}, lambda m, n: _rows(m, n, 1) + 16 * m),
    ("ternary", {}, lambda m, n: m * (8 * -(-n // 5) + 16)),
    ("ternary", {"feedback": True}, lambda m, n: m * (8 * -(-n // 5) + 16)),
    ("kmeans", {"bits": 3, "weighting": "hessian"}, lambda m, n: _rows(m, n, 3) + 16 * 8 * m),
    ("kmeans", {"bits": 2, "rows": False}, lambda m, n: _rows(m, n, 2) + 16 * 4),
    ("kmeans_shared", {"bits": 2}, lambda m, n: _rows(m, n, 2) + 16 * 4),
    ("svd", {"bits": 6}, _most(6, _halves)),
    ("svd_data", {"bits": 6}, _most(6, _halves)),
    ("svd_data", {"bits": 5, "factor_bits": 8}, _most(5, partial(_by_rows, bits=8))),
    ("loftq", {"rank": 4}, lambda m, n: _nf(m, n, 2) + _halves(m, n, 4)),
    ("lqlora", {"rank": 4, "double": False}, lambda m, n: _nf(m, n, 2, False) + _halves(m, n, 4)),
    ("lqer", {"rank": 4, "factor_bits": 8}, lambda m, n: _nf(m, n, 2) + _by_rows(m, n, 4, 8)),
    ("qera", {"rank": 3, "bits": 4, "quantizer": "rtn", "factor_bits": 4},
     lambda m, n: _rows(m, n, 4) + _groups(m, n, 64, 20) + _by_rows(m, n, 3, 4)),
    ("qera", {"rank": 4}, lambda m, n: _nf(m, n, 2) + _halves(m, n, 4)),
]
LATTICE = [  # each of these takes long to compile: most run with -m slow only
    ("e8p", {"bits": 2}, lambda m, n: _lattice(m, n, 2)),
    ("caldera", {"rank": 4, "factor_bits": 16, **FEW}, lambda m, n: _lattice(m, n, 2, 4, 16)),
    ("svd_data", {"bits": 3, "factor_bits": 4}, _most(3, partial(_by_rows, bits=4))),
    ("e8p", {"bits": 3}, lambda m, n: _lattice(m, n, 3)),
    ("e8p", {"bits": 4}, lambda m, n: _lattice(m, n, 4)),
    ("e8p_repair", {"rank": 4, "bits": 3}, lambda m, n: _lattice(m, n, 3, 4)),
    ("srr", {"rank": 4, "preserved": 2}, lambda m, n: _lattice(m, n, 2, 4) + 2 * 32),  # each factor is of two parts
    ("srr", {"rank": 4, "preserved": 4}, lambda m, n: _lattice(m, n, 2, 4)),
    ("odlri", {"rank": 4, **FEW}, lambda m, n: _lattice(m, n, 2, 4)),
    ("caldera", {"rank": 4, "downdate": True, **FEW}, lambda m, n: _lattice(m, n, 2, 4)),
    ("lplr", {"bits": 2}, lambda m, n: _most(2, lambda m, n, k: _lattice(m, n, 0, k))(m, n)),
]


def _ids(rows):
    """Name and settings, as the ids of cases."""
    return [f"{row[0]} {row[1]}" for row in rows]


def _obeys(name, settings, bits, m, n):
    """Finite float32 of the right shape and size, the same twice, on a Hessian of n/2 tokens with a dead input."""
    h = np.array(_layer(m, n, "few-tokens").h)
    h[3], h[:, 3] = 0, 0
    assert np.linalg.matrix_rank(h) <= n // 2 + 1
    layer = _layer(m, n)._replace(h=h)
    found, again = (replace(name, KEY, layer, **settings) for _ in range(2))
    assert found.weight.shape == (m, n) and found.weight.dtype == jnp.float32 and np.isfinite(found.weight).all()
    assert isinstance(found.bits, int) and found.bits == bits(m, n)
    np.testing.assert_array_equal(found.weight, again.weight)
    assert _error(layer, found.weight) < 2 * np.linalg.norm(layer.w)  # LDLQ pays in plain norm, not without end
    assert _error(layer, found.weight, h) < np.sqrt(oracles.loss(np.float64(layer.w), np.float64(h)))  # 0 is worse


@pytest.mark.parametrize(("name", "settings", "bits"), CHEAP, ids=_ids(CHEAP))
def test_a_method_stores_what_it_says_and_is_finite_and_the_same_twice_at_a_singular_h(name, settings, bits):
    _obeys(name, settings, bits, *SHAPES[1])


OTHER_SHAPE = list({row[0]: row for row in [*CHEAP, LATTICE[1]]}.values())  # one of each


@pytest.mark.parametrize(("name", "settings", "bits"), OTHER_SHAPE, ids=_ids(OTHER_SHAPE))
def test_it_does_so_at_another_shape(name, settings, bits):
    _obeys(name, settings, bits, *SHAPES[0])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings", "bits"), LATTICE, ids=_ids(LATTICE))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lattice_methods_do_so_too(name, settings, bits, shape):
    _obeys(name, settings, bits, *shape)


@pytest.mark.parametrize(("name", "settings"), [row[:2] for row in CHEAP], ids=str)
def test_a_method_looks_at_h_and_uses_the_key_where_it_says_so(name, settings):
    weight = _found(name, **settings).weight
    other = replace(name, KEY, _layer()._replace(h=_layer(kind="power", seed=1).h), **settings).weight
    at_fisher = name == "lqlora" or name == "kmeans" and "weighting" not in settings
    looks = METHODS[name].data and not at_fisher
    assert np.array_equal(weight, other) != looks
    turned = replace(name, jax.random.key(6), _layer(), **settings).weight
    assert np.array_equal(weight, turned) != METHODS[name].random


@pytest.mark.parametrize(("name", "settings"), [row[:2] for row in CHEAP], ids=str)
def test_nothing_is_made_of_a_zero_weight(name, settings):
    layer = _layer()
    assert not _weight(name, layer._replace(w=np.zeros_like(layer.w)), **settings).any()


@pytest.mark.parametrize(("name", "settings"), [
    ("binary", {}), ("ternary", {"feedback": True}), ("kmeans", {"bits": 3}), ("kmeans_shared", {"bits": 2})], ids=str)
def test_scales_and_centroids_are_float16_numbers(name, settings):
    weight = np.asarray(_found(name, **settings).weight)
    np.testing.assert_array_equal(weight, weight.astype(np.float16).astype(np.float32))


def test_every_method_of_this_file_is_tested_and_names_its_family_and_source():
    ours = {name: method for name, method in METHODS.items() if method.run.__module__ in ("baselines", "low_rank")}
    for name, method in ours.items():
        assert method.family in ("quantization", "low rank", "both", "sharing") and method.run.__name__ == name
        assert re.fullmatch(r"\d{4}\.\d{4,5}", method.source) and method.run.__doc__
    assert {name for name, *_ in CHEAP + LATTICE} == set(ours)


def test_a_caller_may_have_methods_of_its_own():
    divided = lambda key, layer, by: baselines.Replacement(layer.w / by, 7)
    halved = baselines.Method("quantization", divided, "2210.17323", data=False, random=False)
    found = replace("halved", KEY, _layer(), methods={"halved": halved}, by=4)
    np.testing.assert_array_equal(found.weight, _layer().w / 4)
    assert found.bits == 7 and "halved" not in METHODS
    with pytest.raises(ValueError, match="unknown method 'rtn': choose from halved"):
        replace("rtn", KEY, _layer(), methods={"halved": halved})
    with pytest.raises(ValueError, match="unknown method 'halved': choose from binary"):
        replace("halved", KEY, _layer())


@pytest.mark.parametrize(("name", "settings", "says"), [
    ("gtpq", {}, "unknown method 'gtpq': choose from binary, caldera, .*gptq"),
    ("rtn", {"bits": 4, "groups": 8}, r"rtn takes the settings bits.*, group.*; got .*groups"),
    ("loftq", {}, "loftq takes the settings rank.*, bits.*, rounds.*; got none: missing.*'rank'"),
    ("gptq", {"bits": 2, "order": "rows"}, "order must be 'activity' or 'columns', got 'rows'"),
    ("svd", {"bits": 4, "factor_bits": 2}, "factor_bits must be 16, 8 or 4, got 2"),
    ("rtn", {"bits": 17}, "1 to 16 bits"), ("rtn", {"bits": 4, "group": 0}, "group must be"),
    ("nf", {"bits": 1}, "2 to 8 bits"), ("kmeans", {"bits": 9}, "1 to 8 bits"),
    ("kmeans", {"bits": 2, "weighting": "gauss"}, "weighting must be"),
    ("svd", {"bits": 0.5}, "0.5 bits a weight leave no rank to a 33 x 24 matrix: give it 1.232"),
    ("lplr", {"bits": 0.3}, "leave no rank"), ("qera", {"rank": 0}, "rank must be from 1 to min.m, n. = 24"),
    ("lqer", {"rank": 25}, "rank must be"), ("qera", {"rank": 2, "quantizer": "e8p"}, "quantizer must be")])
def test_an_unknown_method_or_setting_is_refused_with_what_is_known(name, settings, says):
    with pytest.raises(ValueError, match=says):
        replace(name, KEY, _layer(), **settings)


def test_a_layer_that_does_not_fit_or_is_not_finite_is_refused():
    layer = _layer()
    with pytest.raises(ValueError, match=r"need w \[m, n\].*\(33, 24\), \(33, 33\), None"):
        replace("rtn", KEY, Layer(layer.w, np.eye(33)), bits=2)
    with pytest.raises(ValueError, match="weighting must be 'hessian', 'none', or 'fisher' where the layer has one"):
        replace("kmeans", KEY, layer._replace(fisher=None), bits=2, weighting="fisher")
    with pytest.raises(ValueError, match="holds NaN"):
        replace("rtn", KEY, layer._replace(w=layer.w * np.inf), bits=2)
    with pytest.raises(ValueError, match="at most 65504"):
        replace("rtn", KEY, layer._replace(w=layer.w * np.float32(1e8)), bits=2)
    indefinite = np.diag(np.where(np.arange(24) == 0, -1, (1 + 1e-4) / 23))  # mean diagonal 4e-6: beyond any damping
    for name, settings in (("gptq", {"bits": 2}), ("binary", {"feedback": True}), ("qera", {"rank": 4})):
        with pytest.raises(ValueError, match=f"{name}: the result is not finite.*semidefinite"):
            replace(name, KEY, layer._replace(h=indefinite), **settings)


# --- quantization


def _affine_levels(w, bits, group, shrinks=(1,)):
    """The levels of each weight: s (c − z), s in float16, of min–max with 0 inside; of all shrinks of both ends the
    first that leaves the least Σ |error|^2.4 in the group."""
    m, n = w.shape
    top, levels, codes = 2**bits - 1, np.empty((m, n, 2**bits)), np.arange(2**bits)
    for i in range(m):
        for start in range(0, n, group):
            part, least = w[i, start:start + group], np.inf
            low, high = min(part.min(), 0), max(part.max(), 0)
            for shrink in shrinks:
                scale = np.float64(np.float16(shrink * (high - low) / top))
                grid = scale * (codes - np.clip(np.round(-shrink * low / scale), 0, top))
                error = (np.abs(oracles.nearest(grid)(part) - part) ** 2.4).sum()
                if error < least:
                    least, levels[i, start:start + group] = error, grid
    return levels


ALL_SHRINKS = np.arange(50, 9, -1) / 50


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 7, 1])
def test_unclipped_rounding_to_nearest_errs_by_half_a_step_at_most_and_keeps_zeros(bits, group):
    w, size = np.array(_layer().w), group or 24
    w[:, 5] = 0
    found = _weight("rtn", _layer()._replace(w=w), bits=bits, group=group, clip=False)
    assert not found[:, 5].any()
    for start in range(0, 24, size):
        part, rounded = np.float64(w[:, start:start + size]), found[:, start:start + size]
        low, high = np.minimum(part.min(1, keepdims=True), 0), np.maximum(part.max(1, keepdims=True), 0)
        lost = U * (high - low) + 4 * EPS * np.abs(part).max() + 2.0 ** (bits - 25)  # of the scale, maybe subnormal
        assert (np.abs(rounded - part) <= (high - low) / (2**bits - 1) / 2 + lost).all()
        assert max(len(np.unique(row)) for row in rounded) <= 2**bits


@pytest.mark.parametrize(("bits", "group"), [(2, None), (3, 20)])
def test_the_range_is_the_best_of_its_shrinks_and_pays_at_few_bits(bits, group):
    layer = _layer(20, 52)
    w = np.float64(layer.w)
    levels = _affine_levels(w, bits, group or 52, ALL_SHRINKS)
    wanted = np.take_along_axis(levels, np.abs(w[..., None] - levels).argmin(-1)[..., None], -1)[..., 0]
    found = METHODS["rtn"].run(KEY, _double(layer), bits=bits, group=group).weight
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert _error(layer, found) < 0.95 * _error(layer, _weight("rtn", layer, bits=bits, group=group, clip=False))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_float_rounds_to_quantiles_of_the_normal_distribution_times_the_largest_magnitude(bits):
    """2^(b−1) levels from 0 down to −1 and one more from 0 up to 1, equal in probability (QLoRA)."""
    half = 2 ** (bits - 1)
    end = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    above, below = (stats.norm.ppf(np.linspace(0.5, end, count)) / stats.norm.ppf(end) for count in (half + 1, half))
    levels = np.concatenate([-below[:0:-1], above])
    assert len(levels) == 2**bits and levels[0] == -1 and levels[-1] == 1 and 0 in levels
    layer = _layer(5, 150)
    wanted = np.empty((5, 150))
    for start in (0, 64, 128):  # the last group is short
        part = np.float64(layer.w[:, start:start + 64])
        scale = np.abs(part).max(1, keepdims=True).astype(np.float16).astype(np.float64)
        wanted[:, start:start + 64] = oracles.nearest(levels)(part / scale) * scale
    np.testing.assert_allclose(_weight("nf", layer, bits=bits, double=False), wanted, rtol=4 * EPS)


def test_double_quantization_puts_the_scales_on_256_steps_around_their_mean():
    layer = _double(_layer(130, 150))  # 390 scales: the second group of them is short
    w = np.pad(np.asarray(layer.w), ((0, 0), (0, 42))).reshape(-1, 64)
    scale = np.abs(w).max(1)
    mean, stored = scale.mean(), np.empty(390)
    for part in (slice(0, 256), slice(256, 390)):
        stored[part] = oracles.uniform(scale[part] - mean, 8) + mean
    levels = codebooks.NormalFloat(3).levels
    wanted = (oracles.nearest(levels)(w / stored[:, None]) * stored[:, None]).reshape(130, 192)[:, :150]
    found = METHODS["nf"].run(KEY, layer, bits=3)
    np.testing.assert_allclose(found.weight, wanted, rtol=1e-12)
    assert _nf(4096, 4096, 3) / 4096**2 == pytest.approx(3 + 8 / 64 + 32 / (64 * 256), abs=1e-5)  # QLoRA's 0.127
    assert grids.nf_bits(4096, 4096, 3, True) == _nf(4096, 4096, 3)


def _gptq(w, h, levels):
    """GPTQ as it is written down: U upper triangular with H⁻¹ = Uᵀ U, columns first to last; and the least distance
    from a tie, in steps."""
    upper, w, q, margin = np.linalg.cholesky(np.linalg.inv(h)).T, w.copy(), np.empty_like(w), np.inf
    for j in range(w.shape[1]):
        grid = levels[:, j]
        gaps = np.sort(np.abs(w[:, j, None] - grid), axis=1)
        margin = min(margin, ((gaps[:, 1] - gaps[:, 0]) / (grid[:, 1] - grid[:, 0])).min())
        q[:, j] = grid[np.arange(len(w)), np.abs(w[:, j, None] - grid).argmin(1)]
        w[:, j:] -= np.outer((w[:, j] - q[:, j]) / upper[j, j], upper[j, j:])
    return q, margin


def _damped(h):
    h = np.float64(h)
    return h / np.diag(h).mean() + 0.01 * np.eye(len(h))


@pytest.mark.parametrize("settings", [{"bits": 2}, {"bits": 4, "group": 16},
                                      {"bits": 3, "clip": False, "order": "columns"}], ids=str)
def test_gptq_is_what_gptq_does(settings):
    layer = _layer()
    w, h = np.float64(layer.w), np.float64(layer.h)
    shrinks = ALL_SHRINKS if settings.get("clip", True) else (1,)
    levels = _affine_levels(w, settings["bits"], settings.get("group", 24), shrinks)
    order = np.arange(24) if settings.get("order") == "columns" else np.argsort(-np.diag(h))
    reordered, margin = _gptq(w[:, order], _damped(h)[order][:, order], levels[:, order])
    wanted = np.empty_like(w)
    wanted[:, order] = reordered
    assert margin > 1e-9  # no ties
    np.testing.assert_allclose(METHODS["gptq"].run(KEY, _double(layer), **settings).weight, wanted, rtol=1e-9)
    plain = {key: value for key, value in settings.items() if key != "order"}
    assert _error(layer, wanted, h) < 0.8 * _error(layer, _found("rtn", **plain).weight, h)


def test_the_order_by_activity_helps_where_inputs_are_of_unequal_size():
    layer = _layer()
    loud = 10 ** np.linspace(-1, 1, 24, dtype=np.float32)  # the last columns matter most
    layer = layer._replace(h=layer.h * loud[:, None] * loud)
    activity, columns = (_error(layer, _weight("gptq", layer, bits=2, order=order), layer.h)
                         for order in ("activity", "columns"))
    assert activity < 0.8 * columns


def test_gptq_rotated_is_gptq_in_the_rotated_basis_on_clipped_grids():
    layer = _layer()
    w, h, rotation = ROTATE(KEY, layer.w, layer.h)
    w, h = np.float64(w), np.float64(h)
    scale = (baselines.gaussian_clip(3) * np.sqrt((w**2).mean(1))).astype(np.float16).astype(np.float64)
    levels = np.broadcast_to((scale[:, None] * np.linspace(-1, 1, 8))[:, None], (33, 24, 8))
    backwards, margin = _gptq(w[:, ::-1], _damped(h)[::-1, ::-1], levels)
    assert margin > 1e-4
    turned = TURN(rotation, _found("gptq_rotated", bits=3).weight)
    np.testing.assert_allclose(turned, backwards[:, ::-1], atol=30 * EPS * scale.max())


@pytest.mark.parametrize(("bits", "step"), [(2, 0.9957), (3, 0.5860), (4, 0.3352)])  # J. Max (1960), table II
def test_the_clip_is_the_best_for_a_gaussian(bits, step):
    clip = baselines.gaussian_clip(bits)
    assert abs(clip - step * (2**bits - 1) / 2) < 5e-5 * (2**bits - 1) / 2

    def loss(clip):
        levels = np.linspace(-clip, clip, 2**bits)
        g = np.linspace(-9, 9, 40001)
        return integrate.trapezoid((g - oracles.nearest(levels)(g)) ** 2 * stats.norm.pdf(g), g)

    assert loss(clip) < min(loss(clip - 0.02), loss(clip + 0.02))


def test_e8p_errs_by_its_published_error_on_a_white_gaussian():
    """0.0915 of the energy; the tolerance is four standard errors over blocks of 8, which rotation keeps apart."""
    ratios = []
    for seed in range(24):
        w = matrices.gaussian(33, 24, seed)
        weight = _weight("e8p", Layer(w, np.eye(24)), bits=2)
        ratios.append(((weight - w) ** 2).sum() / (w**2).sum())
    error = np.std(ratios, ddof=1) / np.sqrt(len(ratios))
    assert abs(np.mean(ratios) - 0.0915) < 4 * error and error < 0.002


def _nearest_sum(x, grid):
    """Blocks [b, 8] to E8P's nearest codeword, and what is left to the nearest of the second code, by trying all."""
    second = oracles.e8p_codewords() if grid.bits == 4 else np.float64(
        lattice.e8_decode(jnp.arange(256, dtype=jnp.uint8)[:, None], jnp.float64))
    bias = lambda points: (points**2).sum(1) / 2
    nearest = lambda x, points: np.concatenate([
        points[(rows @ points.T - bias(points)).argmax(1)] for rows in np.array_split(x, -(-len(x) // 64))])
    first = nearest(x, oracles.e8p_codewords())
    return first + nearest(grid.residual_scale * (x - first), second) / grid.residual_scale


@pytest.mark.parametrize(("bits", "scalar"), [  # J. Max (1960), table II
    (3, 0.03744), pytest.param(4, 0.01154, marks=pytest.mark.slow)])
def test_e8p_of_more_bits_is_the_nearest_sum_of_two_codewords_and_beats_the_best_equal_steps(bits, scalar):
    w = matrices.gaussian(33, 24, 3)
    grid, scale = codebooks.by_bits("e8p", bits), np.sqrt((w**2).mean())
    rotated, _, rotation = ROTATE(jax.random.split(KEY)[0], w, np.eye(24))
    blocks = np.asarray(rotated).reshape(-1, 8) * (grid.gain / scale)
    wanted = _nearest_sum(blocks, grid).reshape(33, 24) * (scale / grid.gain)
    weight = _weight("e8p", Layer(w, np.eye(24)), bits=bits)
    np.testing.assert_allclose(TURN(rotation, weight), wanted, atol=200 * EPS)
    sample = np.random.default_rng(0).normal(size=(1000, 8))  # unit RMS: as a large matrix is scaled
    errors = ((_nearest_sum(sample * grid.gain, grid) / grid.gain - sample) ** 2).mean(1)
    assert 4.0**-bits < errors.mean() + 4 * errors.std() / np.sqrt(1000) < scalar  # 4^-b: the rate–distortion limit


def _white(m=64, n=256, seed=2):
    return Layer(matrices.gaussian(m, n, seed).astype(np.float32), np.eye(n, dtype=np.float32))


def test_binary_with_h_the_identity_is_the_mean_magnitude_and_errs_by_one_less_two_over_pi():
    layer = _white()
    weight = _weight("binary", layer)
    np.testing.assert_array_equal(np.sign(weight), np.sign(layer.w))
    mean = np.abs(np.float64(layer.w)).mean(1)
    np.testing.assert_allclose(np.abs(weight), np.broadcast_to(mean[:, None], weight.shape), rtol=U + 1e-5)
    errors = ((weight - layer.w) ** 2).mean(1)
    spread = 4 * errors.std(ddof=1) / np.sqrt(len(errors))
    assert abs(errors.mean() - (1 - 2 / np.pi)) < spread + 1 / layer.w.shape[1]  # a fitted scale gains 1 / n at most


@pytest.mark.parametrize("name", ["binary", "ternary"])
@pytest.mark.parametrize("feedback", [False, True])
def test_the_scale_of_signs_and_trits_is_the_best_for_h(name, feedback):
    """No other multiple of a row of the weight is better by more than the rounding of the scale costs."""
    layer = _layer()
    h, root = np.float64(layer.h), np.linalg.cholesky(np.float64(layer.h) + 1e-12 * np.eye(24))
    for row, wanted in zip(np.float64(_found(name, feedback=feedback).weight), np.float64(layer.w), strict=True):
        best = np.linalg.lstsq((row @ root)[:, None], wanted @ root, rcond=None)[0][0]
        assert abs(best - 1) < U + 1e-5 * (1 + np.sqrt((wanted @ h @ wanted) / (row @ h @ row)))  # 1e-6 I is added
    assert len(np.unique(np.sign(_found(name, feedback=feedback).weight))) == (2 if name == "binary" else 3)


@pytest.mark.parametrize("name", ["binary", "ternary"])
def test_feedback_helps_on_data_and_hurts_in_the_plain_norm(name):
    layer = _layer()
    plain, fed = (_found(name, feedback=feedback).weight for feedback in (False, True))
    assert _error(layer, fed, layer.h) < 0.9 * _error(layer, plain, layer.h)
    assert _error(layer, fed) > 1.1 * _error(layer, plain)


def test_ternary_finds_the_best_threshold_of_a_gaussian():
    """Best is t = 0.6120 σ with the mean magnitude above t, twice t, for a scale; it errs by 0.1902."""
    def loss(t):  # of the best scale: 1 − (∫_{|g|>t} |g|)² / P(|g| > t)
        first = integrate.quad(lambda g: 2 * g * stats.norm.pdf(g), t, np.inf)[0]
        return 1 - first**2 / (2 * stats.norm.sf(t))

    best = optimize.minimize_scalar(loss, bounds=(0.1, 2), method="bounded", options={"xatol": 1e-9})
    assert abs(best.x - 0.6120) < 5e-5 and abs(best.fun - 0.1902) < 5e-5
    layer = _white()
    weight = _weight("ternary", layer)
    errors, scales = ((weight - layer.w) ** 2).mean(1), np.abs(weight).max(1)
    error = lambda values: 4 * values.std(ddof=1) / np.sqrt(len(values))
    n = layer.w.shape[1]
    assert abs(errors.mean() - best.fun) < error(errors) + 2 / n  # threshold and scale are fitted to the row
    assert abs(scales.mean() - 2 * best.x) < error(scales) + 4 / n


def test_ternary_is_a_fixed_point_from_the_mean_magnitude():
    layer = _layer()._replace(h=np.eye(24))
    for row, found in zip(np.float64(layer.w), _weight("ternary", layer), strict=True):
        scale, before = np.abs(row).mean(), None
        start = ((row - scale * np.sign(row) * (np.abs(row) > scale / 2)) ** 2).sum()
        while before != scale:
            codes = np.sign(row) * (np.abs(row) > scale / 2)
            before, scale = scale, (codes @ row) / (codes @ codes)
        np.testing.assert_allclose(found, codes * scale, rtol=U + 1e-5)
        magnitudes = np.sort(np.abs(row))[::-1]
        optimum = (row**2).sum() - (np.cumsum(magnitudes) ** 2 / np.arange(1, 25)).max()  # over every threshold
        assert optimum * (1 - EPS) <= ((found - row) ** 2).sum() < start  # Lloyd's may stop short of the optimum


def _lloyd(x, weights, count, rounds):
    """One row: every weight to its nearest centroid, each centroid to the weighted mean of its weights."""
    centroids = np.quantile(x, (np.arange(count) + 0.5) / count)
    for _ in range(rounds):
        codes = np.abs(x[:, None] - centroids).argmin(1)
        for i in range(count):
            if weights[codes == i].sum() > 0:
                centroids[i] = np.average(x[codes == i], weights=weights[codes == i])
    return centroids


@pytest.mark.parametrize(("name", "settings", "weights"), [
    ("kmeans", {"weighting": "hessian"}, "h"), ("kmeans", {}, "fisher"), ("kmeans_shared", {}, None),
    ("kmeans", {"rows": False, "weighting": "hessian"}, "h")], ids=str)
def test_centroids_are_those_of_lloyds_algorithm(name, settings, weights):
    layer = _layer(33, 24, "dead")
    m, n = layer.w.shape
    diagonal = np.broadcast_to(np.diag(layer.h), (m, n))
    importance = {"h": diagonal, "fisher": layer.fisher, None: np.ones((m, n))}[weights]
    rows = settings.get("rows", name == "kmeans")
    found = _weight(name, layer, bits=2, **settings).reshape(-1 if rows else 1, n if rows else m * n)
    for row, x, s in zip(found, np.float64(layer.w).reshape(found.shape), importance.reshape(found.shape), strict=True):
        centroids = _lloyd(x, np.float64(s), 4, 25).astype(np.float16).astype(np.float64)
        wanted = oracles.nearest(centroids)(x)
        np.testing.assert_allclose(row, wanted, rtol=2 * U)  # float32 may round to the next float16


@pytest.mark.parametrize(("name", "settings"), [("kmeans", {"bits": 2}), ("lqlora", {"rank": 4})])
def test_it_is_h_where_the_layer_has_no_fisher(name, settings):
    layer = _layer()
    other = layer._replace(h=_layer(kind="power", seed=1).h)
    by_h, by_other_h = (_weight(name, a._replace(fisher=None), **settings) for a in (layer, other))
    assert not np.array_equal(by_h, by_other_h)
    np.testing.assert_array_equal(_weight(name, layer, **settings), _weight(name, other, **settings))


@pytest.mark.extra
def test_kmeans_is_scikit_learns():
    cluster = pytest.importorskip("sklearn.cluster")
    layer = _layer()._replace(fisher=None)
    found = _weight("kmeans", layer, bits=2, rounds=100)
    for row, x in zip(found, np.float64(layer.w), strict=True):
        start = np.quantile(x, (np.arange(4) + 0.5) / 4)[:, None]
        fitted = cluster.KMeans(4, init=start, n_init=1, max_iter=100, tol=0, algorithm="lloyd").fit(
            x[:, None], sample_weight=np.float64(np.diag(layer.h)))
        np.testing.assert_allclose(row, fitted.cluster_centers_[fitted.labels_, 0], rtol=U + 1e-5)


# --- low rank


def _rounding(a, k):
    """How far float16 factors move L R of A in plain norm: ‖L‖ = √k, ‖R‖ <= ‖A‖, each entry by u of itself."""
    return (2 * U + U**2) * np.sqrt(k) * np.linalg.norm(a)


def test_svd_errs_by_the_tail_of_the_singular_values():
    layer, k = _layer(), (6 * 33 * 24 - 64) // (16 * 57)
    tail = np.sqrt((np.linalg.svd(np.float64(layer.w), compute_uv=False)[k:] ** 2).sum())
    found = _error(layer, _found("svd", bits=6).weight)
    assert tail < found < tail + _rounding(layer.w, k) < 1.02 * tail


def test_svd_on_data_errs_by_the_tail_on_data_beats_svd_there_and_loses_to_it_in_the_plain_norm():
    layer, k = _layer(), (6 * 33 * 24 - 64) // (16 * 57)
    h = np.float64(layer.h)
    tail = np.sqrt(oracles.rank_constrained(np.float64(layer.w), h, k)[1])
    plain, data = (_found(name, bits=6).weight for name in ("svd", "svd_data"))
    assert tail < _error(layer, data, h) < tail + _rounding(layer.w, k) * np.sqrt(np.linalg.eigvalsh(h)[-1])
    assert _error(layer, data, h) < 0.9 * _error(layer, plain, h)
    assert _error(layer, data) > 1.05 * _error(layer, plain)


@pytest.mark.parametrize("bits", [8, 4])
def test_factors_of_few_bits_are_rounded_by_rows(bits):
    """8 bits: 256 equal steps to the largest magnitude; 4: the nearest sum of two E8P codewords, at unit RMS."""
    layer = _double(_layer())
    u, s, v = np.linalg.svd(np.asarray(layer.w), full_matrices=False)
    k = max(k for k in range(24) if _by_rows(33, 24, k, bits) <= 4 * 33 * 24)
    product = 0
    for left, right in zip(u.T[:k], (s[:, None] * v)[:k], strict=True):
        rounded = []
        for row in (left, right):
            scale = np.float64(np.float16(np.abs(row).max() if bits == 8 else np.sqrt((row**2).mean())))
            x = row / scale
            if bits == 8:
                rounded.append(scale * oracles.nearest(np.linspace(-1, 1, 256))(x))
            else:
                blocks = np.pad(x, (0, -len(x) % 8)).reshape(-1, 8)
                rounded.append(scale * _nearest_sum(blocks, codebooks.by_bits("e8p", 4)).ravel()[:len(x)])
        product = product + np.outer(*rounded)
    found = METHODS["svd"].run(KEY, layer, bits=4, factor_bits=bits)
    np.testing.assert_allclose(found.weight, product, atol=1e-9)


@cache
def _shapes(config, m, n):
    """The stored bits of a compressed layer, without making it."""
    spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    with kernels.use("jax"):
        return jax.eval_shape(lambda *arrays: linear._compress(*arrays, config)[0], KEY, spec(m, n),
                              spec(n, n)).stored_bits


@pytest.fixture
def calls(monkeypatch):
    """What the compressing methods ask for, (config, start); they are given zeros, one bit, and no error."""
    asked = []

    def compress(key, w, h, config, start):
        asked.append((config, start))
        return SimpleNamespace(dense=lambda: jnp.zeros(w.shape), stored_bits=1), [0]

    monkeypatch.setattr(low_rank.starts, "compress", compress)
    return asked


def test_lplr_has_the_greatest_rank_of_its_budget(calls):
    m, n, bits = 33, 24, 1.5
    replace("lplr", KEY, _layer(m, n), bits=bits)
    rank = calls[0][0].rank
    assert calls == [(cj.CalderaConfig(rank=rank, q_bits=0, factor_bits=4), None)] and rank >= 2
    used, more = (_shapes(cj.CalderaConfig(rank=k, q_bits=0, factor_bits=4), m, n) for k in (rank, rank + 1))
    assert used == _lattice(m, n, 0, rank) <= bits * m * n < more


Config = partial(cj.CalderaConfig, rank=6)


@pytest.mark.parametrize(("name", "settings", "config", "start"), [
    ("e8p", {"bits": 3}, cj.CalderaConfig(rank=0, q_bits=3), None),
    ("e8p_repair", {"rank": 6, "bits": 4, "factor_bits": 16},
     Config(q_bits=4, factor_bits=16, order="q-first", outer_iterations=1), None),
    ("srr", {"rank": 6, "preserved": 3}, Config(), starts.Split(3)),
    ("srr", {"rank": 6, "preserved": 0, "bits": 3}, Config(q_bits=3), starts.Split(0)),
    ("odlri", {"rank": 6, **FEW}, Config(svd="randomized", **FEW), starts.Outliers(6)),
    ("odlri", {"rank": 6, "channels": 2, "svd": "exact"}, Config(), starts.Outliers(2)),
    ("caldera", {"rank": 6}, Config(svd="randomized"), None),
    ("caldera", {"rank": 6, "q_bits": 4, "factor_bits": 16, "downdate": True, "refine_passes": 2, "svd": "exact"},
     Config(q_bits=4, factor_bits=16, downdate=True, refine_passes=2), None)], ids=str)
def test_a_compressing_method_passes_its_settings_on(name, settings, config, start, calls):
    replace(name, KEY, _layer(), **settings)
    assert calls == [(config, start)]


# --- both


def test_caldera_is_compress_matrix_bit_for_bit():
    name, settings, _ = LATTICE[1]
    layer = _layer(*SHAPES[0])
    wanted, _ = cj.compress_matrix(KEY, layer.w, layer.h, Config(rank=4, factor_bits=16, svd="randomized", **FEW))
    found = replace(name, KEY, layer, **settings)
    np.testing.assert_array_equal(found.weight, wanted.dense())
    assert found.bits == wanted.stored_bits


@pytest.mark.slow
def test_srr_that_preserves_nothing_is_the_repair_of_e8p():
    layer = _double(_layer())
    repair, split = (METHODS[name].run(KEY, layer, rank=4, **settings)
                     for name, settings in (("e8p_repair", {}), ("srr", {"preserved": 0})))
    np.testing.assert_allclose(split.weight, repair.weight, atol=1e-9)
    assert split.bits == repair.bits


@pytest.mark.slow
def test_srr_preserves_what_errs_least_of_quarters_of_the_rank():
    layer = _layer()
    errors = [_error(layer, _found("srr", rank=4, preserved=p).weight, layer.h) for p in range(5)]
    assert _error(layer, _found("srr", rank=4).weight, layer.h) == min(errors) < max(errors)


def test_loftq_of_no_rounds_is_normal_float():
    np.testing.assert_array_equal(_found("loftq", rank=4, rounds=0).weight, _found("nf", bits=2).weight)


def _fit(a, rows, columns, k):
    """The L R nearest to A in the norm Σ (r_i c_j e_ij)²."""
    u, s, v = np.linalg.svd(rows[:, None] * a * columns, full_matrices=False)
    return (u[:, :k] * s[:k]) @ v[:k] / rows[:, None] / columns


def _codes_of_nf(w):
    """NormalFloat of 2 bits, in float64, by the method that is tested above."""
    return np.asarray(METHODS["nf"].run(KEY, Layer(jnp.asarray(w), jnp.eye(w.shape[1])), bits=2).weight)


@pytest.mark.parametrize("name", ["loftq", "lqlora by h", "lqlora by fisher", "lqer"])
def test_a_weighted_svd_repairs_what_the_grid_left(name):
    """From the definitions, in float64, two rounds where there are several; factors in float16 at the end."""
    layer, k = _double(_layer()), 4
    w, name, by = np.asarray(layer.w), *(name + " by ").split(" by ")[:2]
    rows, columns = np.ones(33), np.ones(24)
    if by == "fisher":
        rows, columns = (np.sqrt(np.asarray(layer.fisher)).mean(axis) for axis in (1, 0))
    else:
        layer = layer._replace(fisher=None)
        columns = np.sqrt(np.diag(layer.h)) if name != "loftq" else columns
    low_rank = 0
    for _ in range(1 if name == "lqer" else 2):
        q = _codes_of_nf(w - low_rank)
        low_rank = _fit(w - q, rows, columns, k)
    settings = {} if name == "lqer" else {"rounds": 2}
    found = np.asarray(METHODS[name].run(KEY, layer, rank=k, bits=2, **settings).weight)
    norm = lambda e: np.linalg.norm(rows[:, None] * e * columns)
    allowed = (2 * U + U**2) * np.sqrt(k) * norm(w - q)
    assert norm(found - q - low_rank) < allowed < 0.02 * norm(w - q - low_rank)


def test_loftq_gains_on_normal_float_in_the_plain_norm_and_more_than_one_round_does():
    layer = _layer()
    nf, once, five = (_error(layer, _found("loftq", rank=4, rounds=rounds).weight) for rounds in (0, 1, 5))
    assert five < once < nf


def test_qera_errs_by_the_tail_of_what_the_grid_left():
    layer, k = _double(_layer()), 4
    h, left_out = np.asarray(layer.h), np.asarray(layer.w) - _codes_of_nf(np.asarray(layer.w))
    tail = np.sqrt(oracles.rank_constrained(left_out, h, k)[1])
    found = _error(layer, METHODS["qera"].run(KEY, layer, rank=k).weight, h)
    assert tail < found < tail + _rounding(left_out, k) * np.sqrt(np.linalg.eigvalsh(h)[-1]) < 1.1 * tail


def test_the_more_of_h_a_repair_looks_at_the_better_it_is_on_data():
    layer = _layer()
    loud = np.linspace(0.2, 3, 24, dtype=np.float32)  # inputs of unequal size, so that diag(H) tells something
    layer = layer._replace(h=layer.h * loud[:, None] * loud)
    all_of_it, diagonal, none = (_error(layer, _weight(name, layer, rank=4, **settings), layer.h)
                                 for name, settings in (("qera", {}), ("lqer", {}), ("loftq", {"rounds": 1})))
    assert all_of_it < diagonal < none
