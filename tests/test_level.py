"""One level: the search is exhaustive, the feedback LDLQ's, and what lies outside the ordinary costs little."""

import itertools

import jax
import jax.numpy as jnp
import matrices
import numpy as np
import pytest

import caldera_jax as cj
from caldera_jax import entropy, hessian, levels, linear, objective
from caldera_jax.jobs import artifact
from caldera_jax.trellis import trellis


def factors(h, dtype=np.float64, damping=0.01):
    return hessian.factor(jnp.asarray(h, dtype), damping)


def stored_bits(found, states=64):
    """All that is stored."""
    return levels.encode(found, states).stored_bits


@pytest.mark.parametrize("bit_price", [0.0, 0.37, 2.0])
@pytest.mark.parametrize("states", [1, 4, 8])
def test_the_search_finds_the_cheapest_of_all_legal_integers(states, bit_price):
    rng, length, code = np.random.default_rng(0), 5, trellis(states)
    table, reach = entropy.tables(code.spacing), np.arange(-14, 15)
    width = rng.integers(-20, 20, (length, 6))
    y = 2.0 ** (width / 8) * rng.standard_normal((length, 6)).clip(-2, 2)
    found = np.asarray(levels.search(jnp.asarray(y), jnp.asarray(width), bit_price, states, jnp.zeros(y.shape, bool)))

    def cost(t, lane, q):
        parity = q & code.spacing - 1
        bits = table.bits[width[t, lane] - entropy.WIDTHS[0], parity, (q - parity) // code.spacing + table.reach]
        return (y[t, lane] - q) ** 2 + bit_price * bits

    for lane in range(6):
        best = {0: (0.0, ())}  # by state
        for t in range(length):
            after = {}
            for (state, (total, path)), q in itertools.product(best.items(), reach):
                if (q - code.parity[state]) % code.spacing == 0:
                    there, sum_ = code.after[state, q >> 1 & 1], total + cost(t, lane, q)
                    if there not in after or sum_ < after[there][0]:
                        after[there] = sum_, (*path, q)
            best = after
        total, _ = min(best.values())
        state, ours = 0, 0.0
        for t in range(length):
            assert (found[t, lane] - code.parity[state]) % code.spacing == 0
            state, ours = code.after[state, found[t, lane] >> 1 & 1], ours + cost(t, lane, found[t, lane])
        assert ours == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize("states", levels.DISTORTION)
def test_the_distortion_that_prices_a_bit_is_measured(states):
    """A trellis of 256 states lowers it from 1/3, of the integers of one parity, to 0.25: 1.25 dB."""
    y = 11.3 * jax.random.normal(jax.random.key(0), (256, 100))
    width, nothing = jnp.full(y.shape, 28, jnp.int32), jnp.zeros(y.shape, bool)
    q = jax.jit(levels.search, static_argnums=(2, 3))(y, width, levels.price(states), states, nothing)
    assert float(jnp.mean((y - q.astype(y.dtype)) ** 2)) == pytest.approx(levels.DISTORTION[states], rel=0.02)


def test_one_state_and_bits_for_nothing_is_rounding_with_feedback():
    w, h = matrices.gaussian(20, 24, 0), matrices.hessian("geometric", 24, 0)
    f, g = factors(h), np.random.default_rng(1).uniform(0.5, 2, 20)
    found = levels.quantize(jnp.asarray(w), f, jnp.asarray(g), 0.3, 1, 0.0)
    a, b = (np.asarray(levels.power(octaves, jnp.float64)) for octaves in (found.row, found.column))
    step = 0.3 * a[:, None] * b
    lower, q = np.asarray(f.lower), w.copy()
    for j in range(23, -1, -1):
        target = w[:, j] + (w - q) @ lower[:, j] - (w - q)[:, j]
        q[:, j] = step[:, j] * np.round(target / step[:, j])
    np.testing.assert_allclose(found.dense(jnp.float64), q, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (43, 21), (300, 40), (256, 33)])
def test_any_size_is_stored_and_comes_back(shape):
    m, n = shape
    w, h = matrices.gaussian(m, n, 0), matrices.hessian("power", n, 0)
    found = jax.jit(levels.quantize)(jnp.asarray(w), factors(h), jnp.ones(m), 0.5)
    assert found.integers.shape == shape and np.isfinite(np.asarray(found.dense())).all()
    again, = levels.decode([levels.encode(found)], [shape])
    for ours, theirs in zip(found, again, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_error_is_the_sum_of_roundings_weighted_by_importance_and_d():
    m, n = 70, 40
    w, h = matrices.gaussian(m, n, 0), matrices.hessian("geometric", n, 0)
    f, g = factors(h), np.random.default_rng(0).uniform(0.1, 4, m)
    found = levels.quantize(jnp.asarray(w), f, jnp.asarray(g), 0.4)
    e, damped = w - np.asarray(found.dense(jnp.float64)), np.asarray(f.h) + 0.01 * np.eye(n)
    eta = e @ np.asarray(f.lower)  # the roundings
    d = np.diagonal(np.asarray(f.root)) ** 2
    weighted = np.einsum("i,ij,jk,ik", g, e, damped, e)
    assert weighted == pytest.approx(np.einsum("i,ij,j", g, eta**2, d), rel=1e-9)
    # each rounding has the mean square of the code: one level for all weights
    assert 0.2 < weighted / (0.4**2 * m * n) < 0.4


def test_scaling_the_weights_or_the_importance_changes_nothing_but_the_level():
    w, h = matrices.gaussian(30, 40, 0), matrices.hessian("geometric", 40, 0)
    f, g = factors(h), jnp.asarray(np.random.default_rng(0).uniform(0.1, 4, 30))
    one = levels.quantize(jnp.asarray(w), f, g, 0.4)
    for other in (levels.quantize(jnp.asarray(2 * w), f, g, 0.8), levels.quantize(jnp.asarray(w), f, 4 * g, 0.8)):
        np.testing.assert_array_equal(other.integers, one.integers)


def test_important_outputs_have_smaller_errors():
    w, h = matrices.gaussian(128, 60, 0), matrices.hessian("geometric", 60, 0)
    g = np.where(np.arange(128) < 64, 16.0, 1.0)
    e = w - np.asarray(levels.quantize(jnp.asarray(w), factors(h), jnp.asarray(g), 1.0).dense(jnp.float64))
    errors = np.einsum("ij,jk,ik->i", e, h, e)
    assert errors[64:].sum() > 8 * errors[:64].sum()


def test_rows_do_not_depend_on_each_other_beyond_their_sequence():
    """What makes rows shardable in whole sequences: but for s_j, which looks at all of a column."""
    w, h = matrices.gaussian(600, 40, 0), matrices.hessian("geometric", 40, 0)
    f = factors(h)
    whole = levels.quantize(jnp.asarray(w), f, jnp.ones(600), 0.4, bit_price=0.0)
    part = levels.quantize(jnp.asarray(w[256:512]), f, jnp.ones(256), 0.4, bit_price=0.0)
    np.testing.assert_array_equal(whole.integers[256:512], part.integers)


def test_more_states_and_a_trellis_leave_a_smaller_gap_to_the_limit():
    w, h = matrices.gaussian(256, 200, 0), matrices.hessian("power", 200, 0)
    f, gaps = factors(h, damping=0.0), []
    for states in (1, 4, 64):
        found = levels.quantize(jnp.asarray(w), f, jnp.ones(256), 0.25 if states == 1 else 0.125, states)
        relative = float(objective.relative_error(w, found.dense(jnp.float64), h))
        bits = stored_bits(found, states) / w.size
        assert 1.5 < bits < 4.5
        gaps.append(bits - objective.rate_distortion_limit(relative, w, h))
    assert gaps[0] > gaps[1] + 0.08 and gaps[1] > gaps[2] > 0.05 and gaps[0] < 0.4


def test_a_dearer_bit_saves_bits_and_costs_error():
    w, h = matrices.gaussian(128, 100, 0), matrices.hessian("power", 100, 0)
    found = [levels.quantize(jnp.asarray(w), factors(h), jnp.ones(128), 0.3, bit_price=p) for p in (0.0, 0.37, 1.5)]
    bits = [stored_bits(one) for one in found]
    errors = [float(objective.relative_error(w, one.dense(jnp.float64), h)) for one in found]
    assert bits[0] > bits[1] > bits[2] and errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_outlier_of_ten_thousand_is_right_and_cheap(dtype):
    w, h = matrices.gaussian(128, 96, 0).astype(dtype), matrices.hessian("geometric", 96, 0)
    plain = levels.quantize(jnp.asarray(w), factors(h, dtype), jnp.ones(128, dtype), dtype(0.4))
    w[40, 50] = 1e4
    found = levels.quantize(jnp.asarray(w), factors(h, dtype), jnp.ones(128, dtype), dtype(0.4))
    error = np.abs(np.asarray(found.dense(dtype)) - w)
    assert error[40, 50] < 3 and stored_bits(found) < stored_bits(plain) + 512
    others = np.delete(np.arange(128), 40)
    before = np.abs(np.asarray(plain.dense(dtype)) - w)
    assert error[others].mean() == pytest.approx(before[others].mean(), rel=0.02)


def test_a_dead_row_among_the_others_costs_a_byte_and_changes_no_width():
    w, h = matrices.gaussian(128, 96, 0), matrices.hessian("geometric", 96, 0)
    apart = np.zeros((640, 96))
    apart[::5] = w
    alone, among = (levels.quantize(jnp.asarray(one), factors(h), jnp.ones(len(one)), 0.4) for one in (w, apart))
    assert np.abs(np.asarray(among.width - alone.width)).mean() < 1  # other sequences, so other roundings
    assert stored_bits(among) < 1.02 * stored_bits(alone) + 8 * 512 + 48 * 18  # and the lanes that are new


def test_zero_rows_zero_columns_dead_inputs_and_constant_rows():
    w, h = matrices.gaussian(128, 96, 0), matrices.hessian("geometric", 96, 0).copy()
    w[3], w[:, 5], w[7], w[11] = 0, 0, 1.5, 0
    w[11, 40] = 50
    h[9], h[:, 9] = 0, 0
    found = levels.quantize(jnp.asarray(w), factors(h), jnp.ones(128), 0.4)
    dense = np.asarray(found.dense(jnp.float64))
    assert np.isfinite(dense).all() and not dense[3].any() and abs(dense[11, 40] - 50) < 3
    assert objective.relative_error(w, dense, h) < 0.3 and stored_bits(found) / w.size < 4
    nothing = levels.quantize(jnp.zeros((70, 30)), factors(np.zeros((30, 30)), damping=1.0), jnp.ones(70), 0.4)
    assert not np.asarray(nothing.integers).any() and stored_bits(nothing) < 400


# ---- a weight at a level


def weight(rank=0, m=70, n=50, dtype=np.float32, **more):
    """A weight with a spike, its H and importance, and the layer; its own compilation."""
    w, h = matrices.gaussian(m, n, 0).astype(dtype), matrices.hessian("power", n, 0).astype(dtype)
    g = np.random.default_rng(0).uniform(0.1, 3, m).astype(dtype)
    return w, h, g, cj.level(w, h, g, 0.3, cj.LevelConfig(8, rank=rank), **more)


@pytest.mark.parametrize("rank", [0, 4])
def test_apply_multiplies_by_what_it_decodes_to_in_every_precision(rank):
    *_, layer = weight(rank)
    dense, x = np.asarray(layer.dense(), np.float64), matrices.gaussian(6, 50, 9)
    assert layer.shape == (70, 50) and layer.rank == rank and layer.dtype == np.float32
    assert layer.q.integers.dtype == np.int8
    for dtype, tolerance in ((jnp.float64, 1e-5), (jnp.float32, 1e-5), (jnp.bfloat16, 0.02), (jnp.float16, 0.003)):
        y = jax.jit(cj.apply)(layer, jnp.asarray(x, dtype).reshape(2, 3, 50))
        assert y.dtype == dtype and y.shape == (2, 3, 70)
        wanted = x @ dense.T
        assert np.abs(np.asarray(y, np.float64).reshape(6, 70) - wanted).max() < tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("rank", [0, 4])
def test_what_is_stored_is_what_is_counted_and_comes_back(rank):
    *_, layer = weight(rank)
    arrays, meta = artifact.layer_arrays(layer), artifact.layer_meta(layer)
    assert layer.stored_bits == 8 * sum(array.nbytes for array in arrays.values())
    again = artifact.layer_from(arrays, meta)
    assert jax.tree.structure(again) == jax.tree.structure(layer)
    for ours, theirs in zip(jax.tree.leaves(layer), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def test_one_level_means_one_loss_a_weight_whatever_the_units_of_h_g_and_w():
    w, h, g, layer = weight()
    for units in ((2.0**40, 1, 1), (1, 2.0**-30, 1), (1, 1, 2.0**20)):
        of_h, of_g, of_w = (np.float32(unit) for unit in units)
        level = 0.3 * float(np.sqrt(of_h * of_g)) * float(of_w)
        other = cj.level(of_w * w, of_h * h, of_g * g, level, cj.LevelConfig(8))
        np.testing.assert_array_equal(other.q.integers, layer.q.integers)
        np.testing.assert_allclose(other.dense(), of_w * layer.dense(), rtol=1e-6)
    e = np.asarray(layer.dense(), np.float64) - w
    assert 0.15 < np.einsum("i,ij,jk,ik", g, e, h, e) / w.size / 0.3**2 < 0.4


def test_outputs_and_inputs_that_do_not_matter_cost_next_to_nothing():
    w, h, g, layer = weight()
    none = cj.level(w, h, 0 * g, 0.3, cj.LevelConfig(8))
    assert not np.asarray(none.dense()).any() and none.stored_bits < 0.05 * layer.stored_bits + 500
    dead = cj.level(w, 0 * h, g, 0.3, cj.LevelConfig(8))
    assert not np.asarray(dead.dense()).any() and np.isfinite(np.asarray(cj.apply(dead, np.ones((2, 50))))).all()
    some = g * (np.arange(70) >= 64)
    assert not np.asarray(cj.level(w, h, some, 0.3, cj.LevelConfig(8)).dense())[:64].any()


def test_integers_beyond_eight_bits_take_sixteen_and_an_outlier_more():
    w, h, g, _ = weight()
    for size, dtype in ((300, np.int16), (3e5, np.int32)):
        w[5, 7] = size
        layer = cj.level(w, h, g, 0.3, cj.LevelConfig(8))
        assert layer.q.integers.dtype == dtype
        assert np.asarray(layer.dense())[5, 7] == pytest.approx(size, abs=2)
        np.testing.assert_allclose(cj.apply(layer, np.eye(50, dtype=np.float32)), layer.dense().T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("change", "message"), [
    (dict(g=np.full(70, np.nan)), "the layer: the importance of its outputs must be 70 finite numbers >= 0"),
    (dict(g=-np.ones(70)), "from -1 to"),
    (dict(c=0.0), "the level must be positive and finite, got 0.0"), (dict(c=np.inf), "must be positive and finite"),
    (dict(c=1e-12), "the layer: the level 1e-12 is too fine for float64: an integer would be"),
    (dict(w=np.full((70, 50), np.inf)), "the layer: the weight holds NaN or infinite"),
    (dict(h=np.diag(np.r_[-1e9, np.ones(49)])), "the layer: no damping up to"),
    (dict(config=cj.LevelConfig(rank=51)), "rank 51 exceeds")])
def test_bad_input_names_the_layer_and_what_to_do(change, message):
    good = dict(w=matrices.gaussian(70, 50, 0), h=np.eye(50), g=np.ones(70), c=0.3, config=cj.LevelConfig(8))
    with pytest.raises(ValueError, match=message):
        cj.level(**good | change, name="the layer")


def test_a_curve_predicts_the_bits_of_all_rows_from_some_at_other_levels():
    w, h = matrices.gaussian(640, 200, 0), matrices.hessian("power", 200, 0)
    g, rows, config = np.random.default_rng(0).uniform(0.1, 3, 640), np.arange(64) * 10, cj.LevelConfig(8)
    *parts, _ = linear.at_level(w, h, g, 0.08, config, rows=rows)
    curve = levels.measure(parts, 0.08, config, rows)
    for c, slack in ((0.05, 0.03), (0.08, 0.01), (0.1, 0.04)):
        found = cj.level(w, h, g, c, config).stored_bits
        assert 1 < found / w.size < 4 and curve.bits(c, config) == pytest.approx(found, rel=slack)
    budget = curve.bits(0.2, config)
    assert levels.solve([curve, curve], 2 * budget, config) == pytest.approx(0.2, rel=1e-6)
    with pytest.raises(ValueError, match="below what any level takes, .*: raise it"):
        levels.solve([curve], curve.side, config)
    with pytest.raises(ValueError, match="above what any level takes, .*: lower it"):
        levels.solve([curve], 9.0 * w.size, config)
