"""Products with matrices of bytes against float64; layers in bytes against the layers they were."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from caldera_jax import CalderaConfig, LevelConfig, compress_matrix, level, linear
from caldera_jax.kernels import integers
from caldera_jax.levels import Integers, Levelled


@pytest.mark.parametrize(("m", "n", "b"), [(5, 7, 1), (40, 24, 2), (33, 130, 16), (24, 9, integers.ROWS + 3),
                                       (3, 8960, 2)])
def test_a_product_of_bytes_is_as_close_as_one_in_single_precision(m, n, b):
    rng = np.random.default_rng(n)
    z = rng.integers(-128, 128, (m, n), np.int8)
    x = np.float32(rng.standard_normal((b, n)) * np.exp(3 * rng.standard_normal((b, n))))
    wanted = np.float64(x) @ np.float64(z).T
    for run in (integers.multiply, jax.jit(integers.multiply)):
        y = np.asarray(run(jnp.asarray(x), jnp.asarray(z)))
        assert y.dtype == np.float32 and y.shape == (b, m)
        # every entry off by at most 2^-24 of the largest, and a few roundings
        bound = np.abs(x).max(1, keepdims=True) * 2.0**-24 * np.abs(np.float64(z)).sum(1) + 2.0**-21 * np.abs(
            wanted) + 2.0**-21 * np.sqrt((np.float64(x) ** 2) @ (np.float64(z) ** 2).T)
        assert (np.abs(y - wanted) <= bound).all()


def test_digits_of_any_size_and_of_nothing():
    x = jnp.asarray([[0.0, 0.0, 0.0], [1e-30, -1e-31, 0.0], [3e38, -1e38, 1.0], [127.0, 0.5, -63.5]], jnp.float32)
    found, size = integers.digits(x)
    assert found.dtype == jnp.int8 and found.shape == (3, 4, 3)
    back = sum(np.float64(found[i]) / 254.0**i for i in range(3)) * np.float64(size)
    assert (np.abs(back - np.float64(x)) <= 2.0**-17 * np.float64(size) + 2.0**-22 * np.abs(np.float64(x))).all()
    assert not np.asarray(integers.multiply(x[:1], jnp.ones((2, 3), jnp.int8))).any()


def test_no_row_at_all():
    assert integers.multiply(jnp.zeros((0, 4), jnp.float32), jnp.ones((3, 4), jnp.int8)).shape == (0, 3)


# ---- layers


def levelled(m, n, widest, dtype=np.float32, seed=0):
    """A layer of one level with integers that reach so far in a column."""
    rng = np.random.default_rng(seed)
    z = rng.integers(-4, 5, (m, n)).astype(np.int32)
    z[:, 1], z[0, 1] = rng.integers(-widest, widest + 1, m), widest
    z[:, 2], z[-1, 2] = 0, -widest
    octaves = lambda size: jnp.asarray(rng.integers(-9, 9, size))
    q = Levelled(jnp.asarray(0.01, dtype), jnp.asarray(z), octaves(m), octaves(n), octaves(m), octaves(n))
    return linear.CompressedLinear(q, None, None, (), (), (m, n), (Integers(),) * 3)


@pytest.mark.parametrize(("widest", "copies"), [(127, 0), (128, 1), (254, 1), (255, 2), (3000, 23)])
def test_integers_beyond_eight_bits_are_the_sum_of_their_copies(widest, copies):
    layer = levelled(12, 64, widest)
    found = linear.in_bytes(layer)
    assert found.q.integers.dtype == jnp.int8 and found.q.integers.shape == (12, 64 + 2 * copies)
    x = np.random.default_rng(3).standard_normal((5, 64))
    wanted = x @ np.asarray(layer.dense(), np.float64).T
    np.testing.assert_allclose(linear.apply(found, np.float32(x)), wanted, atol=3e-6 * np.abs(wanted).max())
    exact = dataclasses.replace(found, q=found.q._replace(a=found.q.a.astype(float), b=found.q.b.astype(float)))
    np.testing.assert_allclose(linear.apply(exact, x), wanted, atol=1e-6 * np.abs(wanted).max())  # scales were single
    half = np.asarray(linear.apply(found, jnp.asarray(x, jnp.bfloat16)), np.float64)
    assert linear.apply(found, jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_allclose(half, wanted, atol=0.02 * np.abs(wanted).max())
    places = np.array([[0, 11, 3], [1, 12, -1]])
    np.testing.assert_allclose(linear.rows(found, places), linear.rows(layer, places), rtol=1e-5)


def test_double_precision_stays():
    layer = levelled(12, 64, 300, np.float64)
    x = np.random.default_rng(3).standard_normal((5, 64))
    found = linear.in_bytes(layer)
    np.testing.assert_allclose(linear.apply(found, x), linear.apply(layer, x), rtol=1e-12, atol=1e-12)
    assert found.dtype == layer.dtype == jnp.float64


def test_layers_of_one_name_become_alike_and_compute_the_same():
    layers = [levelled(12, 64, widest) for widest in (100, 300, 2000)]
    ready = [linear.in_bytes(layer) for layer in layers]
    same = linear.alike(ready)
    assert len({tuple(leaf.shape for leaf in jax.tree.leaves(one)) for one in same}) == 1
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 64)), jnp.float32)
    for one, other in zip(same, ready, strict=True):
        np.testing.assert_array_equal(linear.apply(one, x), linear.apply(other, x))
        np.testing.assert_array_equal(linear.rows(one, np.arange(12)), linear.rows(other, np.arange(12)))
    dense = np.ones((12, 64), np.float32)
    assert linear.alike([dense, same[0]])[0] is dense


def test_layers_of_nearly_one_rank_become_alike():
    w, h = problem(24, 32)
    ready = [linear.in_bytes(compress_matrix(jax.random.key(0), w, h, CalderaConfig(
        rank=rank, outer_iterations=1, inner_iterations=1, factor_bits=16))[0]) for rank in (0, 5, 7, 1)]
    same = linear.alike(ready)
    assert len({tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(one)) for one in same}) == 3
    assert [one.rank for one in same] == [0, 8, 8, 1]
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, 32)), jnp.float32)
    for one, other in zip(same, ready, strict=True):
        np.testing.assert_allclose(linear.apply(one, x), linear.apply(other, x), atol=1e-5)


def problem(m, n):
    rng = np.random.default_rng(1)
    w, inputs = rng.standard_normal((m, n)), rng.standard_normal((4 * n, n)) * np.exp(rng.standard_normal(n))
    return np.float32(w / np.sqrt(n)), np.float32(inputs.T @ inputs / len(inputs))


@pytest.mark.parametrize("config", [
    CalderaConfig(rank=0, outer_iterations=1), CalderaConfig(rank=3, outer_iterations=1, inner_iterations=1)])
def test_e8p_is_quarters_with_its_rotation_and_low_rank_beside_it(config):
    w, h = problem(30, 44)
    layer, _ = compress_matrix(jax.random.key(0), w, h, config)
    found = linear.in_bytes(layer)
    assert isinstance(found.q, linear.Bytes) and not found.q.again.size and found.rank == layer.rank
    x = jnp.asarray(np.random.default_rng(3).standard_normal((9, 44)), jnp.float32)
    wanted = np.asarray(linear.apply(layer, x))
    np.testing.assert_allclose(linear.apply(found, x), wanted, atol=1e-5 * np.abs(wanted).max())


def test_a_level_with_low_rank_beside_it():
    w, h = problem(30, 44)
    layer = level(w, h, np.ones(30, np.float32), 0.02, LevelConfig(rank=2))
    found = linear.in_bytes(layer)
    x = jnp.asarray(np.random.default_rng(3).standard_normal((9, 44)), jnp.float32)
    wanted = np.asarray(linear.apply(layer, x))
    np.testing.assert_allclose(linear.apply(found, x), wanted, atol=1e-5 * np.abs(wanted).max())


def test_what_is_not_of_integers_or_would_take_more_than_two_bytes_stays_as_it_is():
    w, h = problem(16, 24)
    four, _ = compress_matrix(jax.random.key(0), w, h, CalderaConfig(rank=0, q_bits=4, outer_iterations=1))
    fine = levelled(12, 4, 3000)
    lowest = np.full(fine.shape, -(2**31), np.int32)
    for weight in (w, four, fine, dataclasses.replace(fine, q=fine.q._replace(integers=lowest))):
        assert linear.in_bytes(weight) is weight
