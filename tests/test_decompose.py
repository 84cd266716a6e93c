"""The outer loop: equal to the definition, its trace, its best iterate, its invariances and its plug-ins."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import matrices
import numpy as np
import oracles
import pytest

import caldera_jax as cj
from caldera_jax import hessian
from caldera_jax.codebooks import quantize
from caldera_jax.decompose import caldera, downdated, factorize_step, quantize_step
from caldera_jax.ldlq import ldlq
from caldera_jax.lplr import LowRank

M, N = 10, 13
KEY = jax.random.key(0)
SCALAR = cj.CalderaConfig(rank=2, q_bits=3, quantizer="uniform", factor_quantizer="uniform", factor_bits=6,
                          outer_iterations=3, inner_iterations=2)
CALDERA = jax.jit(caldera, static_argnums=(3, 4, 5))
FACTOR = jax.jit(hessian.factor, static_argnums=(1, 2))
DOWNDATED, LDLQ = jax.jit(downdated, static_argnums=2), jax.jit(ldlq, static_argnums=1)


def _problem(seed=0, kind="geometric", dtype=np.float64):
    w = matrices.decaying(M, N, seed) + 0.1 * matrices.gaussian(M, N, seed)
    return jnp.asarray(w, dtype), FACTOR(jnp.asarray(matrices.hessian(kind, N, seed), dtype), 0.01, 1)


@pytest.mark.parametrize("order", ["lr-first", "q-first"])
def test_it_is_algorithm_1_half_step_by_half_step(order):
    for seed in range(3):
        w, f = _problem(seed)
        _, trace = CALDERA(KEY, w, f, replace(SCALAR, order=order))
        wanted = oracles.caldera(np.asarray(w), np.asarray(f.h), 2, 3, 6, 3, 2, 0.01, order)
        np.testing.assert_allclose(trace.error, wanted, rtol=1e-8)


@pytest.mark.parametrize("order", ["lr-first", "q-first"])
def test_the_result_is_the_best_half_step_with_both_parts_scored_with_the_true_h(order):
    for seed, kind in enumerate(("geometric", "spiked", "few-tokens", "dead")):
        w, f = _problem(seed, kind)
        best, trace = CALDERA(KEY, w, f, replace(SCALAR, order=order))
        assert trace.error.shape == trace.q_share.shape == (6,) and trace.factor_scale.shape == (6, 2)
        assert bool(trace.finite) and float(trace.damping) == 0.01
        np.testing.assert_allclose(cj.relative_error(w, best.dense(), f.h), trace.error[1:].min(), rtol=1e-10)


def test_the_trace_tells_which_part_is_there():
    w, f = _problem()
    for order, first, second in (("lr-first", "lr_share", "q_share"), ("q-first", "q_share", "lr_share")):
        _, trace = CALDERA(KEY, w, f, replace(SCALAR, order=order))
        assert getattr(trace, first)[0] > 0 and getattr(trace, second)[0] == 0
        shares = np.asarray(getattr(trace, first)), np.asarray(getattr(trace, second))
        np.testing.assert_array_equal(shares[0][0::2], shares[0][1::2])  # each half step changes one part only
        np.testing.assert_array_equal(shares[1][1:-1:2], shares[1][2::2])
        assert np.all(np.abs(shares[0] - shares[1]) <= 1 + np.asarray(trace.error))  # triangle inequality
        assert np.all(shares[0] + shares[1] >= 1 - np.asarray(trace.error))


def test_the_factors_alone_are_a_projection_so_their_share_and_error_are_the_legs_of_a_right_triangle():
    w, f = _problem()
    f = FACTOR(f.h, 0.0, 1)
    best, trace = CALDERA(KEY, w, f, cj.CalderaConfig(rank=3, q_bits=0, factor_bits=16, damping=0.0))
    assert best.q is None and trace.error.shape == (1,)  # nothing to alternate with
    np.testing.assert_allclose(trace.error**2 + trace.lr_share**2, 1, atol=2e-3)
    optimum = oracles.rank_constrained(np.asarray(w), np.asarray(f.h), 3)[1]
    np.testing.assert_allclose(trace.error[0] ** 2, optimum / oracles.loss(np.asarray(w), np.asarray(f.h)), atol=1e-5)


def test_rank_0_is_ldlq_alone_once():
    w, f = _problem()
    best, trace = CALDERA(KEY, w, f, replace(SCALAR, rank=0))
    assert best.low_rank is None and trace.error.shape == (1,) and float(trace.lr_share[0]) == 0
    target, h = np.asarray(w), np.asarray(f.h)
    levels = np.linspace(-1, 1, 8) * np.abs(target).max()
    q = oracles.ldlq(target, h + 0.01 * np.eye(N), 1, oracles.nearest(levels))[0]
    np.testing.assert_allclose(best.dense(), q, atol=1e-12)
    np.testing.assert_allclose(trace.q_share[0] ** 2, oracles.loss(q, h) / oracles.loss(target, h), rtol=1e-10)


def test_scaling_w_by_a_power_of_two_changes_no_code_and_no_error():
    w, f = _problem(2)
    one, two = (CALDERA(KEY, c * w, f, SCALAR) for c in (1.0, 2.0**10))
    np.testing.assert_array_equal(one[0].q.codes, two[0].q.codes)
    np.testing.assert_allclose(one[1].error, two[1].error, rtol=1e-12)
    np.testing.assert_allclose(2.0**10 * one[0].dense(), two[0].dense(), rtol=1e-12)


def test_q_first_downdates_nothing_but_the_damping_before_there_is_an_lr():
    w, f = _problem(3)
    with_, without = (CALDERA(KEY, w, f, replace(SCALAR, order="q-first", downdate=d))[1].error for d in (True, False))
    nothing = LowRank(quantize(cj.Half(), jnp.zeros((2, M))), quantize(cj.Half(), jnp.zeros((2, N))))
    q = LDLQ(w, SCALAR.q_grid, DOWNDATED(f, nothing, 1)).values
    np.testing.assert_allclose(with_[0], cj.relative_error(w, q, f.h), rtol=1e-10)
    np.testing.assert_allclose(with_[:2], without[:2], rtol=0.05)
    assert np.any(with_[2:] != without[2:])


def test_a_half_step_that_fails_later_does_not_cost_the_best_before_it():
    w, f = _problem(3)

    def fails_once_there_is_an_lr(key, target, low_rank, factors, config):
        q = quantize_step(key, target, low_rank, factors, config)
        return q._replace(values=jnp.where(jnp.all(target == w), q.values, jnp.nan))

    config = replace(SCALAR, order="q-first")
    best, trace = CALDERA(KEY, w, f, config, fails_once_there_is_an_lr)
    assert np.isnan(trace.error[2:]).all()
    np.testing.assert_allclose(cj.relative_error(w, best.dense(), f.h), trace.error[1], rtol=1e-10)


def test_downdating_removes_the_directions_of_lr_and_nothing_while_lr_is_zero():
    _, f = _problem(4)
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(M, 2)), rng.normal(size=(2, N))

    def low_rank(left, right):
        part = lambda a: quantize(cj.Half(), jnp.asarray(a))._replace(values=jnp.asarray(a))
        return LowRank(part(left.T), part(right))

    full = np.asarray(f.h) + 0.01 * np.eye(N)
    found = DOWNDATED(f, low_rank(left, right), 1)
    root = np.linalg.cholesky(full)
    v = np.linalg.svd(left @ right @ root)[2][:2]
    wanted = root @ (np.eye(N) - v.T @ v) @ root.T
    np.testing.assert_allclose(found.h, wanted, atol=1e-12)
    np.testing.assert_allclose(found.damping, 0.01 + 0.01 * np.diag(wanted).mean(), rtol=1e-12)
    root = np.asarray(found.root)
    np.testing.assert_allclose(root @ root.T, wanted + float(found.damping) * np.eye(N), atol=1e-12)
    for l, r in ((0 * left, right), (left, 0 * right), (0 * left, 0 * right)):
        np.testing.assert_allclose(DOWNDATED(f, low_rank(l, r), 1).h, full, atol=1e-13)
    one = DOWNDATED(f, low_rank(left * [[1, 0]], right), 1)  # L R of rank 1: one direction goes, not two
    assert np.sum(np.linalg.eigvalsh(one.h) < 1e-9) == 1 and np.sum(np.linalg.eigvalsh(found.h) < 1e-9) == 2


def test_the_same_key_gives_the_same_bits_and_dithering_another_key_others():
    w, f = _problem(5)
    config = replace(SCALAR, quantizer="dithered", factor_quantizer="dithered", q_bits=4, refine_passes=1)
    a, b, c = (CALDERA(jax.random.key(i), w, f, config)[0] for i in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert np.any(a.q.codes != c.q.codes)


def test_mapping_over_layers_is_a_loop_over_layers():
    problems = [_problem(seed) for seed in range(3)]
    ws, fs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    keys = jax.random.split(KEY, 3)
    config = replace(SCALAR, downdate=True)
    batch, trace = jax.jit(jax.vmap(lambda k, w, f: caldera(k, w, f, config)))(keys, ws, fs)
    for i, (w, f) in enumerate(problems):
        one, its_trace = CALDERA(keys[i], w, f, config)
        np.testing.assert_array_equal(batch.q.codes[i], one.q.codes)
        np.testing.assert_allclose(trace.error[i], its_trace.error, rtol=1e-9)


@pytest.mark.parametrize("choice", [{"refine_passes": 2, "svd": "randomized"}, {"lr_metric": "plain"},
                                    {"q_metric": "plain"}])
def test_every_choice_gives_a_sane_error(choice):
    w, f = _problem(6)
    usual, other = (CALDERA(KEY, w, f, c)[1] for c in (SCALAR, replace(SCALAR, **choice)))
    assert bool(other.finite) and np.any(other.error != usual.error)
    assert 0.5 < float(other.error.min() / usual.error.min()) < 2


def test_float32_stays_float32_and_agrees_with_float64():
    errors = []
    for dtype in (np.float32, np.float64):
        best, trace = CALDERA(KEY, *_problem(7, dtype=dtype), SCALAR)
        assert {leaf.dtype for leaf in jax.tree.leaves(trace)} == {np.dtype(dtype), np.dtype(bool)}
        assert best.dense().dtype == dtype
        errors.append(float(trace.error.min()))
    assert abs(errors[0] / errors[1] - 1) < 0.05  # one flipped code cascades; on this small layer it weighs more


def test_numbers_that_are_not_finite_show_in_the_flag():
    w, f = _problem()
    assert not bool(CALDERA(KEY, w.at[0, 0].set(jnp.nan), f, SCALAR)[1].finite)
    h = f.h.at[2, 3].set(jnp.nan)
    assert not bool(CALDERA(KEY, w, FACTOR(h, 0.01, 1), SCALAR)[1].finite)


def test_a_half_step_of_your_own_plugs_in():
    def to_nearest(key, target, low_rank, factors, config):  # Q without feedback
        return quantize(config.q_grid, target)

    def no_alternation(key, target, target_h, low_rank, factors, config):  # L R as in plain SVD, then rounded
        u, s, v = jnp.linalg.svd(target, full_matrices=False)
        k, (left, right) = config.rank, config.factor_grids
        return LowRank(quantize(left, u[:, :k].T), quantize(right, s[:k, None] * v[:k]))

    w, f = _problem(8)
    _, trace = CALDERA(KEY, w, f, SCALAR, to_nearest, no_alternation)
    u, s, v = np.linalg.svd(np.asarray(w), full_matrices=False)
    lr = oracles.uniform(u[:, :2], 6) @ oracles.uniform(s[:2, None] * v[:2], 6)
    np.testing.assert_allclose(trace.error[0], oracles.relative(np.asarray(w), lr, np.asarray(f.h)), rtol=1e-9)
    q = oracles.uniform(np.asarray(w) - lr, 3)
    np.testing.assert_allclose(trace.error[1], oracles.relative(np.asarray(w), q + lr, np.asarray(f.h)), rtol=1e-9)
    usual = CALDERA(KEY, w, f, SCALAR)[1]
    assert usual.error.min() < trace.error.min()
    named = CALDERA(KEY, w, f, SCALAR, quantize_step, factorize_step)[1]
    np.testing.assert_array_equal(named.error, usual.error)


@pytest.mark.parametrize(("wrong", "says"), [
    ({"order": "lr"}, "order must be one of lr-first, q-first; got 'lr'"), ({"svd": "fast"}, "svd must be one of"),
    ({"rotation": "haar"}, "rotation must be one of"), ({"q_metric": "x"}, "q_metric must be one of"),
    ({"lr_metric": "x"}, "lr_metric must be one of"), ({"rank": -1}, "rank must be at least 0, got -1"),
    ({"outer_iterations": 0}, "outer_iterations must be at least 1"), ({"damping": -0.1}, "damping must be at least 0"),
    ({"damping": float("nan")}, "damping must be at least 0"), ({"refine_passes": -1}, "refine_passes must be"),
    ({"inner_iterations": -1}, "inner_iterations must be"), ({"rank": 0, "q_bits": 0}, "switch on one of them"),
    ({"q_bits": 5}, "e8p is not offered at 5 bits"), ({"factor_bits": 7}, "e8p is not offered at 7 bits"),
    ({"factor_bits": (16, 5)}, "e8p is not offered at 5 bits"), ({"quantizer": "gptq"}, "unknown quantizer 'gptq'"),
    ({"factor_quantizer": "gptq"}, "unknown quantizer 'gptq'")])
def test_a_configuration_that_cannot_work_is_refused_when_it_is_made(wrong, says):
    with pytest.raises((ValueError, TypeError)):  # the shape checker of the tests may be the first to object
        cj.CalderaConfig(**wrong)
    config = cj.CalderaConfig()
    for name, value in wrong.items():
        object.__setattr__(config, name, value)
    with pytest.raises(ValueError, match=re.escape(says)):
        config.__post_init__()


def test_configurations_are_values():
    assert cj.CalderaConfig() == cj.CalderaConfig() and hash(cj.CalderaConfig()) == hash(cj.CalderaConfig())
    assert cj.CalderaConfig(rank=1) != cj.CalderaConfig(rank=2)
    assert cj.CalderaConfig(factor_bits=(16, 4)).factor_grids == (cj.Half(), cj.ResidualE8P(4))
    assert cj.CalderaConfig(quantizer=cj.Uniform(5)).q_grid == cj.Uniform(5)
    assert cj.CalderaConfig(q_bits=0).q_grid is None
