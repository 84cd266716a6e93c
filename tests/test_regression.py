"""Rank-constrained regression: the optimum, whatever root, and nothing better."""

import jax
import jax.numpy as jnp
import matrices
import numpy as np
import oracles
import pytest

from caldera_jax.regression import rank_constrained, rank_constrained_iteratively

SOLVE = jax.jit(rank_constrained, static_argnums=2)
ITERATE = jax.jit(rank_constrained_iteratively, static_argnums=3)
KEY = jax.random.key(0)
M, N = 9, 13


def _root(h):
    values, vectors = np.linalg.eigh(h)
    return vectors * np.sqrt(np.clip(values, 0, None))


def _product(factors):
    return np.asarray(factors.left, np.float64) @ np.asarray(factors.right, np.float64)


@pytest.mark.parametrize("kind", matrices.HESSIANS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_optimal_value_is_the_tail_of_the_singular_values(kind, dtype):
    a, h = matrices.gaussian(M, N), matrices.hessian(kind, N)
    for rank in (1, 4, 9):
        factors = SOLVE(jnp.asarray(a, dtype), jnp.asarray(_root(h), dtype), rank)
        assert factors.left.dtype == dtype and factors.left.shape == (M, rank) and factors.right.shape == (rank, N)
        tail = oracles.rank_constrained(a, h, rank)[1]
        found = oracles.loss(_product(factors) - a, h)
        np.testing.assert_allclose(found, tail, rtol=100 * np.finfo(dtype).eps,
                                   atol=100 * np.finfo(dtype).eps * oracles.loss(a, h))


@pytest.mark.parametrize("kind", matrices.HESSIANS)
def test_it_is_lemma_4_2_on_the_range_of_the_inputs(kind):
    """Through the symmetric root and its pseudoinverse; a singular H leaves LR free outside its range."""
    a, h = matrices.gaussian(M, N), matrices.hessian(kind, N)
    wanted = oracles.rank_constrained(a, h, 4)[0]
    found = _product(SOLVE(jnp.asarray(a), jnp.asarray(_root(h)), 4))
    np.testing.assert_allclose(found @ h, wanted @ h, atol=1e-6 * np.abs(wanted @ h).max())


def test_no_random_or_alternating_competitor_is_better():
    a, h = matrices.gaussian(M, N), matrices.hessian("geometric", N)
    best = oracles.loss(_product(SOLVE(jnp.asarray(a), jnp.asarray(_root(h)), 3)) - a, h)
    rng = np.random.default_rng(0)
    for _ in range(5):
        right = rng.normal(size=(3, N))
        for _ in range(200):  # alternating least squares, each half step exact
            left = a @ h @ right.T @ np.linalg.inv(right @ h @ right.T)
            right = np.linalg.pinv(left) @ a
            assert oracles.loss(left @ right - a, h) >= best * (1 - 1e-9)


def test_gradient_descent_comes_down_to_it_and_no_further():
    a, h = matrices.gaussian(M, N), matrices.hessian("power", N)
    best = oracles.loss(_product(SOLVE(jnp.asarray(a), jnp.asarray(_root(h)), 3)) - a, h)

    def loss(pair):
        e = pair[0] @ pair[1] - a
        return jnp.sum((e @ h) * e)

    def step(pair, _):
        return jax.tree.map(lambda p, g: p - 0.02 * g, pair, jax.grad(loss)(pair)), None

    rng = np.random.default_rng(1)
    start = jnp.asarray(rng.normal(size=(M, 3))), jnp.asarray(rng.normal(size=(3, N)))
    found = float(loss(jax.jit(lambda p: jax.lax.scan(step, p, None, 6000)[0])(start)))
    assert best * (1 - 1e-9) <= found <= best * 1.05


@pytest.mark.parametrize("rank", [1, 4])
def test_every_square_root_gives_the_same_product(rank):
    a, h = matrices.gaussian(M, N), matrices.hessian("geometric", N) + 0.01 * np.eye(N)
    x = np.random.default_rng(0).normal(size=(40, N)) @ np.linalg.cholesky(h).T
    gram = x.T @ x
    roots = [np.linalg.cholesky(gram), _root(gram), np.linalg.qr(x)[1].T, _root(gram) @ matrices.orthogonal(N, 5)]
    products = [_product(SOLVE(jnp.asarray(a), jnp.asarray(root), rank)) for root in roots]
    for product in products[1:]:
        np.testing.assert_allclose(product, products[0], atol=1e-9)


def test_the_inverse_free_form_is_the_same():
    """L = top eigenvectors of A H A^T, R = L^T A."""
    a, h = matrices.gaussian(M, N), matrices.hessian("power", N)
    left = np.linalg.eigh(a @ h @ a.T)[1][:, ::-1][:, :4]
    found = _product(SOLVE(jnp.asarray(a), jnp.asarray(_root(h)), 4))
    np.testing.assert_allclose(found, left @ left.T @ a, atol=1e-10)


def test_left_factor_is_orthonormal_and_full_rank_reproduces_a():
    for m, n in ((9, 13), (13, 9), (5, 1), (1, 1)):
        a, root = matrices.gaussian(m, n), _root(matrices.hessian("power", n))
        factors = SOLVE(jnp.asarray(a), jnp.asarray(root), min(m, n))
        np.testing.assert_allclose(factors.left.T @ factors.left, np.eye(min(m, n)), atol=1e-13)
        np.testing.assert_allclose(_product(factors), a, atol=1e-12)


def _iterate(a, h, rank, guess=None):
    return _product(ITERATE(KEY, jnp.asarray(a), jnp.asarray(a @ h), rank, guess))


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
@pytest.mark.parametrize("matrix", [matrices.decaying, matrices.gaussian, matrices.heavy_tailed])
def test_subspace_iteration_is_close_to_exact_and_never_better(matrix, shape):
    a, h = matrix(*shape), matrices.hessian("power", shape[1])
    for rank in (3, 12):
        exact = oracles.rank_constrained(a, h, rank)[1]
        near = oracles.loss(_iterate(a, h, rank) - a, h)
        assert exact * (1 - 1e-12) <= near <= 1.01 * exact


def test_a_good_guess_makes_two_rounds_as_good_as_many():
    """The guess is the answer with noise, as L on a 4-bit grid is; a guess of zero stands for none."""
    a, h = matrices.decaying(60, 90), matrices.hessian("power", 90)
    exact, _, best = oracles.rank_constrained(a, h, 8)
    exact = oracles.loss(exact - a, h)
    noisy = best[:, :8] + 0.1 * matrices.gaussian(60, 8) / np.sqrt(60)
    assert oracles.loss(_iterate(a, h, 8, jnp.asarray(noisy)) - a, h) <= 1.001 * exact
    np.testing.assert_allclose(_iterate(a, h, 8, jnp.zeros((60, 8))), _iterate(a, h, 8), atol=1e-12)


def test_subspace_iteration_is_exact_when_the_matrix_is_no_larger_than_its_basis():
    a, h = matrices.gaussian(M, N), matrices.hessian("geometric", N)
    exact = _product(SOLVE(jnp.asarray(a), jnp.asarray(_root(h)), 4))
    np.testing.assert_allclose(_iterate(a, h, 4), exact, atol=1e-10)


def test_in_float32_it_loses_what_is_below_the_root_of_epsilon_and_no_more():
    """Singular values 1, 1e-1, ... 1e-7: what is lost has at most the energy eps * sigma_1^2 for each direction."""
    u, v = matrices.orthogonal(8, 1), matrices.orthogonal(12, 2)[:8]
    sigma = 10.0 ** -np.arange(8)
    a = ((u * sigma) @ v).astype(np.float32)
    for rank in (2, 5, 8):
        found = _product(ITERATE(KEY, jnp.asarray(a), jnp.asarray(a), rank))
        lost = np.sum((found - a.astype(np.float64)) ** 2) - np.sum(sigma[rank:] ** 2)
        assert lost <= 8 * np.finfo(np.float32).eps
        if rank <= 2:  # well above the root of epsilon
            assert lost <= 1e-3 * np.sum(sigma[rank:] ** 2)


@pytest.mark.parametrize("solve", [
    lambda a: SOLVE(a, jnp.eye(N), 3), lambda a: ITERATE(KEY, a, a, 3)])
def test_zero_gives_zero(solve):
    np.testing.assert_array_equal(_product(solve(jnp.zeros((M, N)))), np.zeros((M, N)))
