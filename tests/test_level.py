"""One level: the search is exhaustive, the feedback LDLQ's, and what lies outside the ordinary costs little."""

import itertools

import jax
import jax.numpy as jnp
import matrices
import numpy as np
import pytest

from caldera_jax import entropy, hessian, levels, objective
from caldera_jax.trellis import trellis


def factors(h, dtype=np.float64, damping=0.01):
    return hessian.factor(jnp.asarray(h, dtype), damping)


def stored_bits(found, states=8):
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
    """A trellis of 256 states lowers it from 1/3, of the integers of one parity, to 0.26: 1.06 dB."""
    y = 11.3 * jax.random.normal(jax.random.key(0), (64, 300))
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


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (43, 21), (130, 70), (64, 129)])
def test_any_size_is_stored_and_comes_back(shape):
    m, n = shape
    w, h = matrices.gaussian(m, n, 0), matrices.hessian("power", n, 0)
    found = jax.jit(levels.quantize)(jnp.asarray(w), factors(h), jnp.ones(m), 0.5)
    assert found.integers.shape == shape and np.isfinite(np.asarray(found.dense())).all()
    again = levels.decode(levels.encode(found), shape)
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
    w, h = matrices.gaussian(192, 40, 0), matrices.hessian("geometric", 40, 0)
    f = factors(h)
    whole = levels.quantize(jnp.asarray(w), f, jnp.ones(192), 0.4, bit_price=0.0)
    part = levels.quantize(jnp.asarray(w[64:128]), f, jnp.ones(64), 0.4, bit_price=0.0)
    np.testing.assert_array_equal(whole.integers[64:128], part.integers)


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
