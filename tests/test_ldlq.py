"""Linear feedback: equal to the definition, its error identity, its trade-off, its padding."""

import jax
import jax.numpy as jnp
import matrices
import numpy as np
import oracles
import pytest

import caldera_jax as cj
from caldera_jax import hessian
from caldera_jax.codebooks import dequantize, quantize
from caldera_jax.ldlq import block_ldlq, descent_feedback, ldlq, slab_width, sweep

LDLQ = jax.jit(ldlq, static_argnums=(1, 3))
FACTOR = jax.jit(hessian.factor, static_argnums=(1, 2))
STEP = 0.3


def _grid(target, start):
    """An unbounded scalar grid (the codes are not used)."""
    return STEP * jnp.round(target / STEP), jnp.zeros((len(target), 1), jnp.uint8)


def _slab_grid(target):
    """A quantizer that really works on a slab: the mean of the rows of a slab is kept on the grid too."""
    mean = target.mean(-1, keepdims=True)
    return STEP * np.round((target - mean) / STEP) + STEP * np.round(mean / STEP)


def _jax_slab_grid(target, start):
    mean = jnp.mean(target, axis=-1, keepdims=True)
    values = STEP * jnp.round((target - mean) / STEP) + STEP * jnp.round(mean / STEP)
    return values, jnp.zeros((len(target), 1), jnp.uint8)


BLOCK_LDLQ = jax.jit(block_ldlq, static_argnums=(2, 3))
QUANTIZE = jax.jit(quantize, static_argnums=0)
SWEEP = jax.jit(sweep, static_argnums=(3, 4, 5, 6))


def _problem(m, n, kind="geometric", seed=0, dtype=np.float64):
    h = matrices.hessian(kind, n, seed)
    h = h / np.diag(h).mean()
    return matrices.gaussian(m, n, seed).astype(dtype), h.astype(dtype)


@pytest.mark.parametrize("block", [1, 4, 12])
def test_block_ldlq_is_the_column_by_column_definition(block):
    w, h = _problem(5, 12)
    h = h + 0.01 * np.eye(12)
    wanted, _, _ = oracles.ldlq(w, h, block, _slab_grid)
    lower = oracles.block_ldl(h, block)[0]
    found, _ = BLOCK_LDLQ(jnp.asarray(w), jnp.asarray(lower), _jax_slab_grid, block)
    np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize(("block", "slab"), [(1, 1), (1, 4), (1, 24), (2, 8), (8, 8), (8, 24)])
def test_a_sweep_in_slabs_is_block_ldlq(block, slab):
    w, h = _problem(5, 24, seed=1)
    lower = jnp.asarray(oracles.block_ldl(h + 0.01 * np.eye(24), block)[0])
    wanted, _ = BLOCK_LDLQ(jnp.asarray(w), lower, _jax_slab_grid, block)
    for triangular in (False, True):
        found, _ = SWEEP(jnp.asarray(w), jnp.asarray(w), lower, _jax_slab_grid, block, slab, triangular)
        np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_a_sweep_in_several_large_products_is_block_ldlq():
    """2304 columns are three products of 768; each slab needs those to its right."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(3, 2304)))
    lower = jnp.asarray(np.tril(rng.normal(size=(2304, 2304)) / 2304, -1) + np.eye(2304))
    lower = jnp.where(jnp.arange(2304)[:, None] // 8 == jnp.arange(2304)[None] // 8, jnp.eye(2304), lower)
    wanted, _ = BLOCK_LDLQ(w, lower, _jax_slab_grid, 8)
    for triangular in (False, True):
        np.testing.assert_allclose(SWEEP(w, w, lower, _jax_slab_grid, 8, 96, triangular)[0], wanted, atol=1e-12)


def test_codes_come_back_in_the_order_of_the_columns():
    w = jnp.asarray(matrices.gaussian(3, 16))
    mark = lambda target, start: (target, jnp.broadcast_to(start.astype(jnp.uint32), (3, 1)))
    wanted = np.broadcast_to(np.arange(0, 16, 4), (3, 4))
    np.testing.assert_array_equal(block_ldlq(w, jnp.eye(16), mark, 4)[1], wanted)
    np.testing.assert_array_equal(sweep(w, w, jnp.eye(16), mark, 4, 8)[1][..., 0].T, wanted)


@pytest.mark.parametrize("kind", ["flat", "geometric", "power", "spiked", "few-tokens"])
@pytest.mark.parametrize("block", [1, 4])
def test_the_error_is_the_sum_of_the_rounding_errors_weighted_by_d(kind, block):
    w, h = _problem(6, 12, kind)
    h = h + 0.01 * np.eye(12)
    lower, d = oracles.block_ldl(h, block)
    q = np.asarray(BLOCK_LDLQ(jnp.asarray(w), jnp.asarray(lower), _grid, block)[0])
    eta = (w - q) @ lower  # the definition of the feedback, solved for what was rounded
    parts = sum(np.trace(eta[:, j] @ dj @ eta[:, j].T) for j, dj in zip(oracles.blocks(12, block), d, strict=True))
    np.testing.assert_allclose(oracles.loss(w - q, h), parts, rtol=1e-10)
    assert np.abs(eta).max() <= STEP / 2 + 1e-12  # and these are errors of nearest rounding


def test_ldlq_is_worse_than_nearest_rounding_in_the_plain_norm_and_better_in_the_h_norm():
    for seed in range(3):
        w, h = _problem(24, 24, "power", seed)
        for grid in (cj.E8P(), cj.Uniform(3)):
            f = FACTOR(jnp.asarray(h), 0.01, 8 if grid.block == 8 else 1)
            found = LDLQ(jnp.asarray(w), grid, f), QUANTIZE(grid, jnp.asarray(w))
            fed, plain = (np.asarray(q.values) - w for q in found)
            assert np.sum(fed**2) > np.sum(plain**2)
            assert oracles.loss(fed, h) < oracles.loss(plain, h)


@pytest.mark.parametrize(("grid", "dtype"), [
    (cj.E8P(), np.float64), (cj.E8P(), np.float32), (cj.Uniform(3), np.float32),
    (cj.NormalFloat(4, group=8), np.float64), (cj.Uniform(4, clip=2.0), np.float64)])
def test_without_correlation_ldlq_is_nearest_rounding(grid, dtype):
    w = jnp.asarray(matrices.gaussian(5, 13), dtype)
    found = LDLQ(w, grid, hessian.identity(13, grid.block, dtype))
    wanted = QUANTIZE(grid, w)
    assert found.values.dtype == dtype
    np.testing.assert_array_equal(found.codes, wanted.codes)
    np.testing.assert_allclose(found.values, wanted.values, rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("block", [1, 4])
def test_descent_feedback_points_every_block_to_its_optimum(block):
    w, h = _problem(5, 12)
    h = h + 0.01 * np.eye(12)
    start = STEP * np.round(w / STEP)
    feedback = descent_feedback(jnp.asarray(h), block)
    found, _ = SWEEP(jnp.asarray(w), jnp.asarray(start), feedback, _jax_slab_grid, block, 12)
    np.testing.assert_allclose(found, oracles.descent_pass(w, start, h, block, _slab_grid), atol=1e-12)
    exact = lambda target, start: (target, jnp.zeros((len(target), 1), jnp.uint8))
    np.testing.assert_allclose(sweep(jnp.asarray(w), jnp.asarray(w), feedback, exact, block, 12)[0], w, atol=1e-12)


def test_a_refinement_pass_never_raises_the_error_of_a_scalar_grid_and_settles():
    w, h = _problem(8, 12, "power")
    h = h + 0.01 * np.eye(12)
    feedback = descent_feedback(jnp.asarray(h), 1)
    q = jnp.asarray(STEP * np.round(w / STEP))
    losses = [oracles.loss(np.asarray(q) - w, h)]
    for _ in range(40):
        q, _ = SWEEP(jnp.asarray(w), q, feedback, _grid, 1, 4)
        losses.append(oracles.loss(np.asarray(q) - w, h))
    assert np.all(np.diff(losses) <= 1e-12) and losses[1] < losses[0]
    np.testing.assert_array_equal(q, SWEEP(jnp.asarray(w), q, feedback, _grid, 1, 4)[0])  # a fixed point


def test_refinement_inside_ldlq_never_raises_the_damped_error_of_a_scalar_grid():
    for seed, kind in enumerate(("power", "spiked", "few-tokens", "dead")):
        w, h = _problem(7, 13, kind, seed)
        f = FACTOR(jnp.asarray(h), 0.01, 1)
        damped = np.asarray(f.h) + 0.01 * np.eye(13)
        losses = [oracles.loss(np.asarray(LDLQ(jnp.asarray(w), cj.Uniform(2), f, passes).values) - w, damped)
                  for passes in (0, 1, 3)]
        assert losses[2] <= losses[1] + 1e-12 and losses[1] <= losses[0] + 1e-12


def test_padding_never_matters():
    """13 columns are 16 of which the last three are zero, decoupled and of unit weight: written out, not left to it."""
    w, h = _problem(5, 13)
    damped = np.eye(16)
    damped[:13, :13] = h / np.diag(h).mean() + 0.01 * np.eye(13)
    for grid, block in ((cj.E8P(), 8), (cj.Uniform(3), 1)):
        found = LDLQ(jnp.asarray(w), grid, FACTOR(jnp.asarray(h), 0.01, block))
        scale = float(found.scale[0, 0])
        round_slab = lambda t, grid=grid, scale=scale: np.asarray(ROUND(grid, jnp.asarray(t / scale))) * scale
        wanted, _, _ = oracles.ldlq(np.pad(w, ((0, 0), (0, 3))), damped, block, round_slab)
        np.testing.assert_allclose(found.values, wanted[:, :13], atol=1e-12)


ROUND = jax.jit(lambda grid, x: grid.round(x)[0], static_argnums=0)


@pytest.mark.parametrize(("grid", "shape"), [
    (cj.Uniform(3), (1, 1)), (cj.Uniform(3), (2, 300)), (cj.NormalFloat(4, group=5), (1, 9)),
    (cj.NormalFloat(4, group=5), (9, 1)), (cj.E8P(), (1, 1))])
def test_any_shape_is_quantized_and_its_codes_decode_to_its_values(grid, shape):
    w, h = _problem(*shape)
    found = LDLQ(jnp.asarray(w), grid, FACTOR(jnp.asarray(h), 0.01, grid.block), 1)
    assert found.values.shape == shape and found.codes.shape == (shape[0], -(-shape[1] // grid.block))
    decoded = dequantize(grid, found.codes, found.scale, shape[1])
    np.testing.assert_allclose(decoded, found.values, atol=1e-13)
    assert float(jnp.abs(found.values).max()) > 0


def test_a_wide_matrix_in_several_slabs_is_the_definition():
    w, h = _problem(2, 300, "power")
    f = FACTOR(jnp.asarray(h), 0.01, 1)
    found = LDLQ(jnp.asarray(w), cj.Uniform(3), f, 1)
    levels = np.linspace(-1, 1, 8) * float(found.scale[0, 0])
    damped = np.asarray(f.h) + 0.01 * np.eye(300)
    q, _, _ = oracles.ldlq(w, damped, 1, oracles.nearest(levels))
    np.testing.assert_allclose(found.values, oracles.descent_pass(w, q, damped, 1, oracles.nearest(levels)), atol=1e-12)


@pytest.mark.parametrize("block", [1, 3, 8, 16])
def test_slabs_hold_whole_blocks_and_pad_little(block):
    for n in (*range(1, 40), 256, 257, 300, 576, 1536, 4097):
        slab = slab_width(n, block)
        assert slab % block == 0 and slab >= block
        assert n + -n % slab < 1.15 * n + block  # padding below 15 %


def test_dithered_ldlq_needs_a_key_and_is_a_function_of_it():
    w, h = _problem(5, 12)
    f = FACTOR(jnp.asarray(h), 0.01, 1)
    runs = [LDLQ(jnp.asarray(w), cj.Dithered(4), f, 0, jax.random.key(i)).codes for i in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert np.any(runs[0] != runs[2])
    with pytest.raises(ValueError, match="PRNG key"):
        ldlq(jnp.asarray(w), cj.Dithered(4), f)


def test_mapping_over_layers_is_a_loop_over_layers():
    ws, hs = (jnp.stack([jnp.asarray(_problem(5, 12, "power", s)[i]) for s in range(3)]) for i in (0, 1))
    one = lambda w, h: ldlq(w, cj.Uniform(3), hessian.factor(h, 0.01, 1), 1)
    batch, loop = jax.jit(jax.vmap(one))(ws, hs), [jax.jit(one)(w, h) for w, h in zip(ws, hs, strict=True)]
    for i, each in enumerate(loop):
        np.testing.assert_array_equal(batch.codes[i], each.codes)
        np.testing.assert_allclose(batch.values[i], each.values, rtol=1e-14)


def test_zero_weights_and_dead_inputs_are_no_trouble():
    w, h = _problem(5, 13, "dead")
    f = FACTOR(jnp.asarray(h), 0.0, 8)  # no damping: it is raised
    assert float(f.damping) > 0
    for grid in (cj.E8P(), cj.Uniform(2)):
        f = FACTOR(jnp.asarray(h), 0.0, grid.block)
        assert np.isfinite(LDLQ(jnp.asarray(w), grid, f).values).all()
        assert np.sum(np.asarray(LDLQ(jnp.zeros((5, 13)), grid, f).values) ** 2) == 0
