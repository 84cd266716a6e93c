"""Pruning: which weights stay, what moves to make up for the others, and every bit of both."""

import dataclasses
import sys
from itertools import combinations, product
from pathlib import Path

import jax
import jax.numpy as jnp
import matrices
import numpy as np
import oracles
import pytest
import tiny

from caldera_jax.jobs import evaluate
from caldera_jax.models import llama

sys.path.append(str(Path(__file__).parent.parent / "experiments"))

import baselines  # noqa: E402
import machinery  # noqa: E402
import pruning  # noqa: E402
from baselines import Layer, Method, Replacement  # noqa: E402
from pruning import METHODS, choose, mask_bits  # noqa: E402

SINGLE = ("magnitude", "wanda", "sparsegpt", "gradient")  # methods that take single weights
EPS32, EPS16 = np.finfo(np.float32).eps, np.finfo(np.float16).eps


def _layer(m=7, n=13, kind="power", seed=0):
    """With inputs of unlike scale, as they are."""
    h = matrices.hessian(kind, n, seed)
    scale = np.exp(np.random.default_rng(seed).normal(size=n))
    return Layer(matrices.gaussian(m, n, seed), h * scale * scale[:, None], matrices.gaussian(m, n, seed + 1) ** 2)


def _run(name, layer, **settings):
    return METHODS[name].run(None, layer, **settings)


def _mask(weight):
    return np.asarray(weight) != 0


@pytest.fixture
def exact(monkeypatch):
    """Values are not rounded: the claims are about which weights stay and where they move."""
    monkeypatch.setattr(pruning, "row_grid", lambda w, mask, bits: lambda x: x)
    monkeypatch.setattr(pruning, "float16", lambda x: x)


# ---- which weights stay


def test_with_white_inputs_wanda_is_magnitude_in_each_row():
    w = matrices.heavy_tailed(6, 17)
    found = _run("wanda", Layer(w, 3 * np.eye(17)), kept=0.4).weight
    for row, dense in zip(found, w, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(row), np.sort(np.argsort(-np.abs(dense))[:round(0.4 * 17)]))
        np.testing.assert_array_equal(row[row != 0], dense[row != 0].astype(np.float16))


@pytest.mark.parametrize("seed", range(3))
def test_with_uncorrelated_inputs_no_other_choice_in_a_row_loses_less_than_wanda(exact, seed):
    rng = np.random.default_rng(seed)
    w, h = rng.normal(size=(3, 8)), np.diag(np.exp(3 * rng.normal(size=8)))
    found = _run("wanda", Layer(w, h), kept=0.5).weight
    for dense, row in zip(w, found, strict=True):
        least = min(np.sum(dense[list(gone)] ** 2 * np.diag(h)[list(gone)]) for gone in combinations(range(8), 4))
        kept = np.where(row != 0, dense, 0)
        np.testing.assert_allclose((kept - dense) @ h @ (kept - dense), least, rtol=1e-14)


def test_with_white_inputs_sparsegpt_moves_nothing_and_is_magnitude_in_its_blocks(exact):
    w = matrices.gaussian(5, 300)
    found = _run("sparsegpt", Layer(w, 2 * np.eye(300)), kept=0.3).weight
    np.testing.assert_array_equal(found[_mask(found)], w[_mask(found)].astype(np.float32))
    for start in (0, 128, 256):
        inside = slice(start, start + 128)
        alone = _run("magnitude", Layer(w[:, inside], None), kept=0.3).weight
        np.testing.assert_array_equal(found[:, inside], alone)
    pairs = _run("sparsegpt", Layer(w, 2 * np.eye(300)), pattern="2:4").weight
    np.testing.assert_array_equal(pairs, _run("magnitude", Layer(w, None), pattern="2:4").weight)


def test_the_gradient_weighs_each_weight():
    w, fisher = matrices.gaussian(4, 9), matrices.gaussian(4, 9, 1) ** 2
    found = _run("gradient", Layer(w, np.eye(9), fisher), kept=0.25).weight
    least = np.sort((w**2 * fisher).ravel())[-9]
    np.testing.assert_array_equal(_mask(found), w**2 * fisher >= least)
    np.testing.assert_array_equal(_run("gradient", Layer(w, np.eye(9), np.full((4, 9), 0.3)), kept=0.25).weight,
                                  _run("magnitude", Layer(w, np.eye(9)), kept=0.25).weight)


@pytest.mark.parametrize("shape", [(7, 13), (5, 130), (3, 257), (1, 5)])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.77, 1.0])
def test_as_many_stay_as_were_asked_for_in_each_group_of_the_source(shape, kept):
    m, n = shape
    layer = _layer(m, n)
    for name in ("magnitude", "gradient"):
        assert _mask(_run(name, layer, kept=kept).weight).sum() == round(kept * m * n)
    assert (_mask(_run("wanda", layer, kept=kept).weight).sum(1) == round(kept * n)).all()
    mask = _mask(_run("sparsegpt", layer, kept=kept).weight)
    for start in range(0, n, 128):
        assert mask[:, start:start + 128].sum() == round(kept * mask[:, start:start + 128].size)


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8), ("1:3", 1, 3)])
@pytest.mark.parametrize("name", SINGLE)
def test_a_pattern_leaves_n_of_every_m_and_no_more_of_a_short_last_group(name, pattern, n, m):
    for width in (24, 29, 133):
        mask = _mask(_run(name, _layer(5, width), kept=n / m, pattern=pattern).weight)
        for start in range(0, width, m):
            group = mask[:, start:start + m]
            assert (group.sum(1) == min(n, group.shape[1])).all()


def test_among_equals_the_first_stay():
    np.testing.assert_array_equal(choose(np.ones((2, 5)), 0.6, by_row=True), [[1, 1, 1, 0, 0]] * 2)
    np.testing.assert_array_equal(choose(np.zeros((1, 6)), 0.5, "2:4"), [[1, 1, 0, 0, 1, 1]])


# ---- what makes up for the others


def _best_without(w, h, gone, free):
    """The minimiser of (w' − w) h (w' − w)ᵀ with w'_gone = 0 and only the ``free`` others moved; and its value."""
    others = np.setdiff1d(free, [gone])
    best = w.copy()
    best[gone] = 0
    best[others] = w[others] + w[gone] * np.linalg.solve(h[np.ix_(others, others)], h[others, gone])
    return best, (best - w) @ h @ (best - w)


@pytest.mark.parametrize("seed", range(6))
def test_one_weight_removed_is_the_optimal_brain_surgeon(exact, seed):
    """Among the columns up to it: those after it were decided before.  And no other would have cost less."""
    n = 9
    layer = _layer(1, n, "geometric", seed)
    w, h = layer.w[0], layer.h
    found = _run("sparsegpt", layer, kept=(n - 1) / n, damping=0).weight[0]
    (gone,) = np.flatnonzero(found == 0)
    costs = [_best_without(w, h, j, np.arange(j + 1))[1] for j in range(n)]
    assert gone == np.argmin(costs)
    np.testing.assert_allclose(found, _best_without(w, h, gone, np.arange(gone + 1))[0], rtol=0,
                               atol=4 * EPS32 * np.abs(w).max())


def test_the_last_column_removed_moves_all_others_to_the_closed_form(exact):
    """w' = w − w_j H⁻¹_j: / H⁻¹_jj, at the cost w_j² / H⁻¹_jj."""
    n = 9
    layer = _layer(1, n, "geometric")
    w, h = layer.w.copy(), layer.h
    w[0, -1] = 1e-4  # the least by far
    found = _run("sparsegpt", Layer(w, h), kept=(n - 1) / n, damping=0).weight[0]
    inverse = np.linalg.inv(h)
    np.testing.assert_allclose(found, w[0] - w[0, -1] * inverse[-1] / inverse[-1, -1], rtol=0,
                               atol=EPS32 * np.abs(w).max())
    assert found[-1] == 0 and np.abs(found[:-1] - w[0, :-1]).max() > 100 * EPS32 * np.abs(w).max()


def _published(w, h, width, choice, rounded):
    """SparseGPT from the definition, columns last to first: at each column the others follow by the inverse of H of
    the columns not yet decided, made anew."""
    w, n = w.copy(), w.shape[1]
    q, mask = np.zeros_like(w), np.zeros(w.shape, bool)
    inverses = [np.linalg.inv(h[:j + 1, :j + 1]) for j in range(n)]
    for j in reversed(range(n)):
        if j == n - 1 or (j + 1) % width == 0:
            block = np.arange(j // width * width, j + 1)
            mask[:, block] = choice(w[:, block] ** 2 / np.array([inverses[c][c, c] for c in block]))
        q[:, j] = np.where(mask[:, j], rounded(w[:, j]), 0)
        w[:, :j + 1] -= np.outer((w[:, j] - q[:, j]) / inverses[j][j, j], inverses[j][j])
    return q


def _most(count):
    """The ``count(size)`` largest of all."""
    return lambda score: score >= np.sort(score.ravel())[::-1][count(score.size) - 1]


@pytest.mark.parametrize("kind", ["geometric", "few-tokens", "spiked"])
@pytest.mark.parametrize(("block", "n"), [(128, 31), (8, 31), (5, 20)])
def test_sparsegpt_is_its_published_formulation(kind, block, n):
    layer = _layer(6, n, kind)
    damped = layer.h + 0.01 * np.trace(layer.h) / n * np.eye(n)
    half = lambda x: x.astype(np.float16)
    wanted = _published(layer.w, damped, block, _most(lambda size: round(0.4 * size)), half)
    found = _run("sparsegpt", layer, kept=0.4, block=block)
    np.testing.assert_array_equal(found.weight, wanted)  # float16 hides the order of the sums
    assert not np.array_equal(found.weight, np.where(_mask(found.weight), half(layer.w), 0))  # weights have moved


def test_sparsegpt_chooses_the_group_of_a_pattern_when_it_comes_to_it():
    layer = _layer(6, 22, "geometric")
    damped = layer.h + 0.01 * np.trace(layer.h) / 22 * np.eye(22)
    two = lambda score: score >= np.sort(score, axis=1)[:, -2:][:, :1]
    wanted = _published(layer.w, damped, 4, two, lambda x: x.astype(np.float16))
    np.testing.assert_array_equal(_run("sparsegpt", layer, pattern="2:4").weight, wanted)


def test_rounding_is_in_the_feedback_of_sparsegpt():
    """All weights stay: it is LDLQ on a grid of 16 levels, and better than rounding to the same grid."""
    layer = _layer(6, 31, "geometric")
    damped = layer.h + 0.01 * np.trace(layer.h) / 31 * np.eye(31)
    low = layer.w.min(1).astype(np.float16).astype(np.float64)
    step = ((layer.w.max(1) - layer.w.min(1)) / 15).astype(np.float16).astype(np.float64)
    grid = low[:, None] + step[:, None] * np.arange(16)
    nearest = lambda x: np.take_along_axis(grid, np.abs(x - grid).argmin(1)[:, None], 1)
    wanted, _, _ = oracles.ldlq(layer.w, damped, 1, nearest)
    found = _run("sparsegpt", layer, kept=1.0, value_bits=4)
    np.testing.assert_allclose(found.weight, wanted, atol=EPS32 * np.abs(layer.w).max())
    plain = _run("wanda", layer, kept=1.0, value_bits=4)
    assert oracles.loss(found.weight - layer.w, layer.h) < oracles.loss(plain.weight - layer.w, layer.h)


@pytest.mark.parametrize("seed", range(3))
def test_where_inputs_differ_and_are_correlated_it_pays_to_look_and_to_make_up(seed):
    layer = _layer(40, 70, "power", seed)
    errors = [oracles.relative(layer.w, _run(name, layer, kept=0.6).weight, layer.h)
              for name in ("sparsegpt", "wanda", "magnitude")]
    assert errors == sorted(errors) and errors[0] < 0.9 * errors[2]


@pytest.fixture(scope="module")
def tiny_layers():
    try:
        machinery.source("tiny")
    except ValueError as error:
        pytest.skip(str(error))
    return machinery.layers("tiny", 2, windows=4)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_on_a_trained_model_each_method_is_better_than_the_one_that_looks_at_less(tiny_layers, pattern):
    for name, (w, h) in tiny_layers.items():
        errors = [oracles.relative(w, _run(method, Layer(w, h), pattern=pattern).weight, np.float64(h))
                  for method in ("sparsegpt", "wanda", "magnitude")]
        assert errors == sorted(errors), (name, errors)
        assert errors[0] < 0.9 * errors[2]


# ---- inputs and outputs


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9])
def test_refitted_columns_lose_the_schur_complement_and_no_more(exact, kept):
    layer = _layer(6, 15, "geometric")
    w, h = layer.w, layer.h
    found = _run("columns", layer, kept=kept, damping=0)
    stays = _mask(found.weight).any(0)
    assert stays.sum() == round(kept * 15)
    gone = ~stays
    schur = h[np.ix_(gone, gone)] - h[np.ix_(gone, stays)] @ np.linalg.solve(h[np.ix_(stays, stays)],
                                                                             h[np.ix_(stays, gone)])
    least = oracles.loss(w[:, gone], schur)
    # the minimum is stationary, so that rounding the weights to float32 costs its square
    rounding = (EPS32 / 2) ** 2 * np.sum(found.weight**2) * np.linalg.norm(h, 2)
    np.testing.assert_allclose(oracles.loss(found.weight - w, h), least, atol=rounding,
                               rtol=np.linalg.cond(h) * np.finfo(np.float64).eps)
    left_out = _run("columns", layer, kept=kept, refit=False).weight
    np.testing.assert_array_equal(left_out, np.where(stays, w, 0).astype(np.float32))
    assert least < oracles.loss(left_out - w, h)


def test_columns_of_the_largest_share_stay_and_rows_of_the_largest_energy():
    layer = _layer(8, 15)
    share = (layer.w**2).sum(0) * np.diag(layer.h)
    for refit in (True, False):
        found = _run("columns", layer, kept=0.4, refit=refit)
        assert set(np.flatnonzero(_mask(found.weight).any(0))) == set(np.argsort(-share)[:6])
    energy = [w @ layer.h @ w for w in layer.w]
    found = _run("rows", layer, kept=0.4)
    stays = np.isin(np.arange(8), np.argsort(energy)[::-1][:3])
    np.testing.assert_array_equal(found.weight, np.where(stays[:, None], layer.w.astype(np.float16), 0))


@pytest.mark.parametrize("value_bits", [8, 4])
def test_the_values_of_columns_and_rows_are_on_the_grids_of_what_stays(value_bits):
    """And those of columns are rounded in the feedback of SparseGPT: refitting again would not help, rounding does."""
    layer = _layer(6, 31, "geometric")
    for name, settings in (("columns", {"refit": False}), ("rows", {})):
        found = _run(name, layer, kept=0.6, value_bits=value_bits, **settings).weight
        stays = np.ix_(_mask(found).any(1), _mask(found).any(0))
        np.testing.assert_array_equal(found[stays], _nearest(layer.w[stays], value_bits))
    fed = _run("columns", layer, kept=0.6, value_bits=value_bits)
    stays = _mask(fed.weight).any(0)
    h = layer.h + 0.01 * np.trace(layer.h) / 31 * np.eye(31)
    inside = h[np.ix_(stays, stays)]
    refitted = layer.w @ h[:, stays] @ np.linalg.inv(inside)
    wanted = _run("sparsegpt", Layer(refitted, inside), kept=1.0, value_bits=value_bits, damping=0).weight
    np.testing.assert_allclose(fed.weight[:, stays], wanted, rtol=0, atol=EPS32 * np.abs(wanted).max())
    plain = np.zeros_like(layer.w)
    plain[:, stays] = _nearest(refitted, value_bits)
    assert oracles.loss(fed.weight - layer.w, h) < oracles.loss(plain - layer.w, h)


def _nearest(w, bits):
    """The nearest of 2^bits equal steps of each row, as float32 adds them up."""
    low, high = w.min(1, keepdims=True), w.max(1, keepdims=True)
    step = ((high - low) / (2**bits - 1)).astype(np.float16).astype(np.float32)
    low = low.astype(np.float16).astype(np.float32)
    levels = low + step * np.arange(2**bits, dtype=np.float32)
    return np.take_along_axis(levels, np.abs(w[:, :, None] - np.float64(levels)[:, None]).argmin(2), 1)


@pytest.mark.parametrize("name", ["columns", "rows", "wanda", "magnitude", "sparsegpt"])
@pytest.mark.parametrize("value_bits", [16, 8])
@pytest.mark.parametrize("kind", ["power", "geometric"])
def test_the_error_falls_as_more_stays(name, value_bits, kind):
    layer = _layer(24, 70, kind)
    kept = (0.25, 0.4, 0.6, 0.75, 0.9, 1.0)
    errors = [oracles.relative(layer.w, _run(name, layer, kept=k, value_bits=value_bits).weight, layer.h) for k in kept]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * errors[0]


@pytest.mark.parametrize(("name", "kept"), [*product(("columns", "rows"), (0.25, 0.6, 0.75, 0.9)),
                                            *product(SINGLE, (0.25, 0.5, 0.6))])
@pytest.mark.parametrize("kind", ["power", "geometric"])
def test_eight_bits_a_value_are_as_good_as_sixteen(name, kept, kind):
    """One part in 255 of a row's range is far below what pruning loses, but where single weights go and most stay."""
    layer = Layer(matrices.gaussian(24, 70), matrices.hessian(kind, 70), matrices.gaussian(24, 70, 1) ** 2)
    sixteen, eight = (oracles.relative(layer.w, _run(name, layer, kept=kept, value_bits=bits).weight, layer.h)
                      for bits in (16, 8))
    assert abs(eight / sixteen - 1) < 0.01


@pytest.mark.parametrize("kept", [0.25, 0.6, 0.75])
def test_on_a_trained_model_eight_bits_a_value_are_as_good_as_sixteen(tiny_layers, kept):
    for name, method in product(("q", "up", "down"), ("sparsegpt", "columns", "rows")):
        w, h = tiny_layers[name]
        sixteen, eight = (oracles.relative(w, _run(method, Layer(w, h), kept=kept, value_bits=bits).weight,
                                           np.float64(h)) for bits in (16, 8))
        assert abs(eight / sixteen - 1) < 0.01, (name, method)


@pytest.mark.parametrize("value_bits", [16, 8, 4])
def test_where_all_stay_there_is_no_mask_and_columns_and_rows_are_rounded(value_bits):
    layer = _layer(6, 31)
    bits = value_bits * 6 * 31 + (32 * 6 if value_bits < 16 else 0)
    wanted = layer.w.astype(np.float16) if value_bits == 16 else _nearest(layer.w, value_bits)
    for name, settings in (("columns", {"refit": False}), ("rows", {})):
        found = _run(name, layer, kept=1.0, value_bits=value_bits, **settings)
        assert found.bits == bits
        np.testing.assert_array_equal(found.weight, wanted)
    assert _run("columns", layer, kept=1.0, value_bits=value_bits).bits == bits


# ---- bits


def _bits_for(choices):
    """The least b with 2^b >= choices."""
    return next(b for b in range(64) if 2**b >= choices)


def _choices(n, k):
    """The ways to choose k of n, by Pascal's triangle."""
    row = [1]
    for _ in range(n):
        row = [1, *(a + b for a, b in zip(row, row[1:], strict=False)), 1]
    return row[k]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 3), (3, 7)])
def test_a_pattern_costs_the_number_of_its_choices(n, m):
    choices = sum(sum(bits) == n for bits in product((0, 1), repeat=m))
    mask = np.tile(np.arange(m) < n, (5, 3))
    whole = lambda width: 5 * _bits_for(_choices(width, 3 * n))  # or each row as one choice, if that is less
    assert mask_bits(mask, f"{n}:{m}") == min(15 * _bits_for(choices), whole(3 * m)) < mask.size
    assert mask_bits(np.pad(mask, ((0, 0), (0, 1))), f"{n}:{m}") == min(20 * _bits_for(choices), whole(3 * m + 1))
    assert (_bits_for(6), _bits_for(70)) == (3, 7)


@pytest.mark.parametrize("width", [1, 2, 5, 44, 65])
def test_a_mask_costs_the_number_of_each_rows_choice_or_a_bitmap(width):
    for count in range(width):
        even = np.tile(np.arange(width) < count, (6, 1))
        each = _bits_for(_choices(width, count))
        assert mask_bits(even) == 6 * each <= min(6 * width, 6 * count * _bits_for(width))  # nor do indices cost less
        uneven = even.copy()
        uneven[0, count] = True  # then each row says how many it has, 0 to width
        other = 5 * each + _bits_for(_choices(width, count + 1)) + 6 * _bits_for(width + 1)
        assert mask_bits(uneven) == min(6 * width, other)
    assert mask_bits(np.ones((6, width), bool)) == 0


def test_as_many_masks_as_the_bits_can_say_and_no_bit_less():
    """All masks of two rows with k of 5 each: counted, and coded one after the other as whole numbers of bits."""
    for k in range(6):
        masks = [a + b for a, b in product(product((0, 1), repeat=5), repeat=2) if sum(a) == sum(b) == k]
        bits = mask_bits(np.array(masks[0], bool).reshape(2, 5))
        assert len(masks) <= 2**bits and (bits == 0 or len(masks) > 2 ** (bits - 2))  # less than one a row is lost


def test_a_row_of_any_width_is_counted_exactly():
    """Beyond float64: Stirling's bounds on log2 C(2k, k) are 2k − log2(√(πk)) and 1 / (8k ln 2) below."""
    mask = np.zeros((1, 11008), bool)
    mask[0, :5504] = True
    assert mask_bits(mask) == np.ceil(11008 - np.log2(np.pi * 5504) / 2)
    assert mask_bits(np.eye(1, 2**12 + 1, dtype=bool)) == 13 == mask_bits(np.eye(1, 2**12, dtype=bool)) + 1


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize(("value_bits", "grids"), [(16, 0), (8, 32), (4, 32)])
def test_bits_are_values_mask_and_grids(name, value_bits, grids):
    m, n, kept = 7, 40, 0.5
    values = m * n // 2 * value_bits + grids * m
    found = _run(name, _layer(m, n), kept=kept)
    each = [_bits_for(_choices(n, k)) for k in _mask(found.weight).sum(1)]
    mask = min(m * n, sum(each) + (m * _bits_for(n + 1) if name != "wanda" else 0))
    assert _run(name, _layer(m, n), kept=kept, value_bits=value_bits).bits == values + mask
    assert _run(name, _layer(m, n), pattern="2:4", value_bits=value_bits).bits == values + 3 * m * n // 4
    assert _run(name, _layer(m, n), kept=1.0, value_bits=value_bits).bits == m * n * value_bits + grids * m


@pytest.mark.parametrize(("value_bits", "grid"), [(16, 0), (8, 32), (4, 32)])
@pytest.mark.parametrize("kept", [0.25, 0.6, 0.75, 0.9])
def test_bits_of_inputs_and_outputs_are_what_stays_and_which_they_are(value_bits, grid, kept):
    m, n = 7, 40
    columns, rows = round(kept * n), round(kept * m)
    for refit in (True, False):
        found = _run("columns", _layer(m, n), kept=kept, refit=refit, value_bits=value_bits)
        assert found.bits == (value_bits * columns + grid) * m + _bits_for(_choices(n, columns))
    found = _run("rows", _layer(m, n), kept=kept, value_bits=value_bits)
    assert found.bits == (value_bits * n + grid) * rows + _bits_for(_choices(m, rows))


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("value_bits", [8, 4])
def test_values_are_what_their_codes_decode_to(name, value_bits):
    layer = _layer(5, 60)
    found = _run(name, layer, kept=0.7, value_bits=value_bits).weight
    mask = _mask(found)
    moved = np.where(mask, layer.w, 0)
    if name == "sparsegpt":  # its grid is of where they move unrounded, which may choose others
        damped = layer.h + 0.01 * np.trace(layer.h) / 60 * np.eye(60)
        moved = _published(layer.w, damped, 128, _most(lambda size: round(0.7 * size)), lambda x: x)
    for w, known, q in zip(layer.w, moved, found, strict=True):
        known = known[known != 0]
        low, step = np.float16(known.min()), np.float16((known.max() - known.min()) / (2**value_bits - 1))
        levels = np.float64(low) + np.float64(step) * np.arange(2**value_bits)
        apart = np.abs(q[q != 0][:, None] - levels).min(1)
        assert (apart <= 2 * EPS32 * np.abs(known).max()).all()
        if name != "sparsegpt":  # half a step, and what float16 takes from the ends of the grid
            ends = EPS16 * (np.abs(known).max() + np.ptp(known))
            assert np.abs(q - w)[q != 0].max() <= 0.5 * step + ends
    assert mask.sum() <= round(0.7 * 300) and mask.sum() >= round(0.7 * 300) - 5  # a level may be 0


@pytest.mark.parametrize("name", [*SINGLE, "columns", "rows"])
def test_sixteen_bit_values_are_float16_numbers(name):
    found = _run(name, _layer(5, 60))
    assert isinstance(found, Replacement) and isinstance(found.bits, int)
    assert found.weight.dtype == np.float32 and found.weight.shape == (5, 60)
    np.testing.assert_array_equal(found.weight, found.weight.astype(np.float16))


def test_a_row_of_which_nothing_or_one_weight_stays_has_a_grid():
    w = np.array([[1e-3, 2e-3, 1e-3, 3e-3], [5.0, 1.0, 2.0, -3.0], [0.5, 7.0, 0.25, 0.125]])
    found = _run("magnitude", Layer(w, np.eye(4)), kept=1 / 3, value_bits=4).weight
    np.testing.assert_array_equal(found[0], 0)
    np.testing.assert_array_equal(found[2], [0, 7, 0, 0])
    np.testing.assert_array_equal(found != 0, [[0] * 4, [1, 0, 1, 1], [0, 1, 0, 0]])


# ---- hard inputs


@pytest.mark.parametrize("name", [*SINGLE, "columns", "rows"])
@pytest.mark.parametrize("kind", matrices.HESSIANS)
def test_any_second_moment_and_both_dtypes_will_do(name, kind):
    """NumPy or JAX, float32 or float64: the same, as all is computed in float64."""
    layer = Layer(*(np.float32(a) for a in _layer(6, 17, kind)))
    found = _run(name, layer)
    assert np.isfinite(found.weight).all() and _mask(found.weight).any()
    for other in (Layer(*(np.float64(a) for a in layer)), Layer(*(jnp.asarray(a) for a in layer))):
        again = _run(name, other)
        np.testing.assert_array_equal(again.weight, found.weight)
        assert again.bits == found.bits


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "columns"])
def test_weights_of_an_input_that_is_never_active_go_first(name):
    layer = _layer(6, 16, "dead")
    w = layer.w.copy()
    w[:, 8] = 100
    found = _run(name, Layer(w, layer.h), kept=0.5).weight
    assert (found[:, 8] == 0).all()
    assert (_run("magnitude", Layer(w, layer.h), kept=0.5).weight[:, 8] != 0).all()


def test_zero_weights_and_zero_inputs_are_no_trouble():
    for name in ("wanda", "magnitude", "rows"):
        np.testing.assert_array_equal(_run(name, Layer(np.zeros((3, 5)), np.zeros((5, 5)))).weight, 0)
    for name in ("sparsegpt", "columns"):
        np.testing.assert_array_equal(_run(name, Layer(np.zeros((3, 5)), np.eye(5))).weight, 0)


@pytest.mark.parametrize(("name", "settings", "text"), [
    *((name, {"kept": kept}, r"above 0 and at most 1; got") for name in METHODS for kept in (0, -0.5, 1.01, np.nan)),
    ("magnitude", {"pattern": "4:2"}, "0 < n < m"), ("wanda", {"pattern": "half"}, "0 < n < m"),
    ("sparsegpt", {"pattern": "0:4"}, "0 < n < m"), ("sparsegpt", {"pattern": "2:4", "kept": 0.25}, "set it to 0.5"),
    ("gradient", {"pattern": "1:4"}, "set it to 0.25"),
    *((name, {"value_bits": 3}, "16, 8 or 4, got 3") for name in METHODS),
])
def test_settings_that_cannot_be_are_refused_with_what_to_do(name, settings, text):
    with pytest.raises(ValueError, match=text):
        _run(name, _layer(4, 8), **settings)


def test_what_is_missing_or_too_large_or_not_definite_is_named():
    w = matrices.gaussian(4, 8)
    with pytest.raises(ValueError, match="give Layer"):
        _run("gradient", Layer(w, np.eye(8)))
    for value, value_bits in product((1e6, np.inf, np.nan), (16, 8)):
        with pytest.raises(ValueError, match="float16 holds finite values up to 65504"):
            _run("magnitude", Layer(np.full((4, 8), value), np.eye(8)), kept=1.0, value_bits=value_bits)
    dead = matrices.hessian("dead", 8)
    for name in ("sparsegpt", "columns"):
        with pytest.raises(ValueError, match="raise damping"):
            _run(name, Layer(w, dead), damping=0, kept=1.0)


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_is_replaced_as_by_the_other_methods(name, monkeypatch):
    monkeypatch.setattr(baselines, "METHODS", METHODS)
    layer = Layer(*(np.float32(a) for a in _layer(6, 17)))
    found = baselines.replace(name, jax.random.key(0), layer, kept=0.3)
    np.testing.assert_array_equal(found.weight, _run(name, layer, kept=0.3).weight, strict=True)


def test_every_method_says_where_it_is_from():
    for method in METHODS.values():
        assert isinstance(method, Method) and method.family == "pruning" and not method.random
        year, number = method.source.split(".")
        assert len(year) == 4 and len(number) in (4, 5) and (year + number).isdigit()
    assert {name for name, method in METHODS.items() if not method.data} == {"magnitude"}


# ---- whole blocks

CONFIG = dataclasses.replace(tiny.CONFIG, layers=4)
BLOCK = jax.jit(llama.block, static_argnums=0)


@pytest.fixture(scope="module")
def model():
    """A random model with a block that does nothing, and windows of tokens."""
    rng, ones = np.random.default_rng(3), np.ones(CONFIG.dim, np.float32)
    normal = lambda m, n: (rng.normal(size=(m, n)) / np.sqrt(n)).astype(np.float32)
    blocks = [{name: normal(*shape) for name, shape in llama.shapes(CONFIG).items()} |
              {"attn_norm": ones, "ffn_norm": ones} for _ in range(4)]
    params = {"embed": normal(256, 24), "blocks": blocks, "norm": ones, "head": normal(256, 24)}
    params["blocks"][2] |= {name: np.zeros_like(params["blocks"][2][name]) for name in ("o", "down")}
    return params, np.random.default_rng(0).integers(0, CONFIG.vocab, (3, 20))


def test_block_influence_is_one_minus_the_mean_cosine(model):
    params, tokens = model
    whole = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
    x, wanted = llama.embed(CONFIG, whole, tokens), []
    for block in whole["blocks"]:
        y = BLOCK(CONFIG, block, x, jnp.arange(20))[0]
        a, b = (np.asarray(part).reshape(-1, CONFIG.dim) for part in (x, y))
        wanted.append(1 - np.mean([u @ v / np.linalg.norm(u) / np.linalg.norm(v) for u, v in zip(a, b, strict=True)]))
        x = y
    np.testing.assert_allclose(pruning.block_influence(CONFIG, params, tokens), wanted, atol=100 * EPS32)
    assert abs(wanted[2]) < 1e-12 and min(np.delete(wanted, 2)) > 0.01


LINEAR = {name: m * n for name, (m, n) in llama.shapes(CONFIG).items()}
OUTPUTS = sum(m for m, _ in llama.shapes(CONFIG).values())


@pytest.mark.parametrize("value_bits", [16, 8, 4])
def test_the_block_that_does_nothing_goes_first_and_the_model_is_the_same(model, value_bits):
    params, tokens = model
    found, _ = pruning.drop_blocks(CONFIG, params, tokens, 1, value_bits)
    for block, kept in zip(found["blocks"], [params["blocks"][i] for i in (0, 1, 3)], strict=True):
        for name in kept:
            wanted = kept[name]
            if name in llama.LINEARS:
                wanted = wanted.astype(np.float16) if value_bits == 16 else _nearest(np.float64(wanted), value_bits)
            np.testing.assert_array_equal(block[name], wanted.astype(np.float32), strict=True)
    none, _ = pruning.drop_blocks(CONFIG, params, tokens, 0, value_bits)
    np.testing.assert_allclose(evaluate.perplexity(CONFIG, found, tokens), evaluate.perplexity(CONFIG, none, tokens),
                               rtol=100 * EPS32)


@pytest.mark.parametrize(("value_bits", "grid"), [(16, 0), (8, 32), (4, 32)])
def test_bits_of_a_model_are_its_blocks_and_which_they_are(model, value_bits, grid):
    for count, which in enumerate((1, 4, 6, 4)):  # choices of so many of four
        _, bits = pruning.drop_blocks(CONFIG, *model, count, value_bits)
        each = value_bits * sum(LINEAR.values()) + grid * OUTPUTS
        assert isinstance(bits, int) and bits == (4 - count) * each + _bits_for(which)
    assert sum(LINEAR.values()) == llama.block_weights(CONFIG)


def test_dropping_none_only_rounds(model):
    """To float16 without loss where it is that already; to eight bits as the rounding of single layers does."""
    params, tokens = model
    stored, _ = pruning.drop_blocks(CONFIG, params, tokens, 0)
    again, _ = pruning.drop_blocks(CONFIG, stored, tokens, 0)
    jax.tree.map(np.testing.assert_array_equal, again, stored)
    found, _ = pruning.drop_blocks(CONFIG, params, tokens, 0, 8)
    for block, old in zip(found["blocks"], params["blocks"], strict=True):
        for name in llama.LINEARS:
            alone = _run("rows", Layer(old[name], np.eye(old[name].shape[1])), kept=1.0, value_bits=8)
            np.testing.assert_array_equal(block[name], alone.weight)


def test_value_bits_that_a_block_cannot_have_are_refused(model):
    with pytest.raises(ValueError, match="16, 8 or 4, got 3"):
        pruning.drop_blocks(CONFIG, *model, 1, value_bits=3)


def test_blocks_go_in_the_order_of_their_influence(model):
    params, tokens = model
    order = np.argsort(pruning.block_influence(CONFIG, params, tokens))
    for count in range(4):
        found, _ = pruning.drop_blocks(CONFIG, params, tokens, count)
        stays = np.sort(order[count:])
        assert [float(block["q"][0, 0]) for block in found["blocks"]] == [
            float(np.float16(params["blocks"][i]["q"][0, 0])) for i in stays]
        assert np.isfinite(evaluate.perplexity(CONFIG, found, tokens))


@pytest.mark.parametrize("count", [-1, 4, 5])
def test_a_number_of_blocks_that_the_model_has_not_is_refused(model, count):
    with pytest.raises(ValueError, match="count must be 0 to 3 of the model's 4 blocks"):
        pruning.drop_blocks(CONFIG, *model, count)
