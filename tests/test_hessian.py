"""Moments without loss, damping that is raised and reported, and the block LDL factorisation."""

import itertools

import jax
import jax.numpy as jnp
import matrices
import numpy as np
import oracles
import pytest

from caldera_jax import CalderaConfig, compress_matrix, hessian, relative_error
from caldera_jax.jobs import calibration
from caldera_jax.jobs.settings import RunConfig
from caldera_jax.ldlq import descent_feedback

DTYPES = (np.float32, np.float64)
FACTOR = jax.jit(hessian.factor, static_argnums=(1, 2))
MERGE = jax.jit(hessian.merge)


def _moments(x, dtype=np.float64, cap=np.inf):
    return hessian.update(hessian.zero(x.shape[-1], dtype), jnp.asarray(x, dtype), cap)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mean_is_the_second_moment(dtype):
    x = np.random.default_rng(0).normal(size=(2, 50, 6)).astype(dtype)
    m = _moments(x, dtype)
    assert m.mean().dtype == dtype and int(m.count) == 100
    rows = x.astype(np.float64).reshape(-1, 6)
    np.testing.assert_allclose(m.mean(), rows.T @ rows / 100, rtol=0, atol=100 * np.finfo(dtype).eps)


@pytest.mark.parametrize("n", [8, 9, 11, 16])
def test_the_mean_is_whole_where_only_one_triangle_is_summed(monkeypatch, n):
    monkeypatch.setattr(hessian, "TILE", 4)
    x = np.random.default_rng(0).normal(size=(2, 50, n))
    m = hessian.merge(_moments(x[:1]), _moments(x[1:]))
    assert not np.asarray(m.sum)[4:, :4].any()
    rows = x.reshape(-1, n)
    np.testing.assert_allclose(m.mean(), rows.T @ rows / 100, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("split", [(1, 99), (50, 50), (30, 30, 40), (1,) * 100])
def test_moments_of_parts_merge_to_those_of_the_whole_in_any_order(split):
    x = np.random.default_rng(0).normal(size=(100, 6))
    parts = [_moments(p) for p in np.split(x, np.cumsum(split)[:-1])]
    for order in (parts, parts[::-1]):
        total = hessian.zero(6, jnp.float64)
        for part in order:
            total = MERGE(total, part)
        assert int(total.count) == 100
        np.testing.assert_allclose(total.mean(), x.T @ x / 100, atol=1e-15)


def test_merging_is_associative_to_rounding_and_zero_is_neutral():
    a, b, c = (_moments(np.random.default_rng(s).normal(size=(9, 4))) for s in range(3))
    left, right = MERGE(MERGE(a, b), c), MERGE(a, MERGE(b, c))
    np.testing.assert_allclose(left.mean(), right.mean(), rtol=1e-14)
    for field, other in zip(MERGE(hessian.zero(4, jnp.float64), a), a, strict=True):
        np.testing.assert_array_equal(field, other)


def test_a_token_beyond_the_cap_counts_as_one_of_that_norm_and_others_as_they_are():
    x = np.random.default_rng(0).normal(size=(3, 40, 6))
    x[1, 0] *= 1e3
    norms = np.sum(x * x, axis=2)
    peak = norms[1, 0] / np.median(norms[1])
    m = _moments(x, cap=1000.0)
    np.testing.assert_allclose(m.peak, peak, rtol=1e-12)
    np.testing.assert_allclose(m.energy, norms.sum(), rtol=1e-12)
    ordinary = 40 * np.sum(np.median(norms, axis=1))
    np.testing.assert_allclose(m.left_out(0.01), (1 + 0.01 * norms.sum() / ordinary) / (
        1 + 0.01 * np.trace(m.sum) / ordinary), rtol=1e-12)
    assert m.left_out(0.01) > 10 and abs(_moments(x).left_out(0.01) - 1) < 1e-12
    np.testing.assert_array_equal(_moments(x, cap=1.01 * peak).sum, _moments(x, cap=np.inf).sum)
    x[1, 0] *= np.sqrt(1000 / peak)
    np.testing.assert_allclose(m.mean(), np.einsum("wti,wtj->ij", x, x) / 120, rtol=1e-12)


@pytest.mark.parametrize("x", [np.zeros((4, 3)), np.eye(4, 3)[[0, 3, 3, 3]], np.ones((1, 3)), np.ones(3)])
def test_where_most_tokens_are_zero_or_there_is_but_one_none_is_capped(x):
    np.testing.assert_array_equal(_moments(x, cap=1.0).sum, np.atleast_2d(x).T @ np.atleast_2d(x))


@pytest.mark.parametrize(("rank", "cap"), [(0, 1e4), (0, 100.0), (8, 100.0)])
def test_with_a_cap_one_massive_token_leaves_the_others_about_as_well_kept_as_without_data(rank, cap):
    """Q alone with the default; L R, part of which goes to that token, with a lower one."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(512, 64)).astype(np.float32), rng.normal(size=(96, 64)).astype(np.float32)
    x[0] *= 1e4
    config = CalderaConfig(rank=rank, outer_iterations=5)

    def others(h):
        found = compress_matrix(jax.random.key(0), w, h, config)[0].dense()
        return float(relative_error(w, found, x[1:].T @ x[1:]))

    capped, whole = (others(_moments(x, np.float32, c).mean()) for c in (cap, np.inf))
    assert capped < min(1.03 * others(np.eye(64, dtype=np.float32)), whole) and RunConfig("").cap == 1e4


@pytest.mark.parametrize("merge", [hessian.merge, MERGE])
def test_a_sum_that_plain_float32_loses_is_kept(merge):
    """2^24 + 1 = 2^24 in float32: two thousand single tokens after a large batch would vanish."""
    total = hessian.Moments(jnp.full((1, 1), 2.0**24, jnp.float32), jnp.zeros((1, 1), jnp.float32),
                            jnp.zeros((), jnp.int32), *jnp.zeros((3, 1), jnp.float32)[:, 0],
                            jnp.zeros((), jnp.int32))
    one = _moments(np.ones((1, 1)), np.float32)
    plain = total.sum
    for _ in range(200):
        total, plain = merge(total, one), plain + one.sum
    assert float(plain[0, 0]) == 2.0**24  # the loss is real
    assert float((total.sum + total.error)[0, 0]) == 2.0**24 + 200


def test_a_random_float32_sum_is_exact_to_one_rounding():
    grams = np.exp(np.random.default_rng(0).normal(size=(3000,)) * 8).astype(np.float32)

    def add(total, gram):
        one = hessian.Moments(gram[None, None], jnp.zeros((1, 1), jnp.float32), jnp.int32(1),
                              *jnp.zeros((3, 1), jnp.float32)[:, 0], jnp.int32(1))
        return hessian.merge(total, one), None

    total = jax.jit(lambda g: jax.lax.scan(add, hessian.zero(1), g)[0])(jnp.asarray(grams))
    wanted = np.sum(grams.astype(np.float64))
    assert abs(float((total.sum + total.error)[0, 0]) - wanted) <= np.finfo(np.float32).eps * wanted
    assert int(total.count) == 3000


def test_moments_survive_saving_with_dots_in_their_names(tmp_path):
    moments = {"model.0.attn.q": _moments(np.ones((3, 4)), np.float32), "b": _moments(np.eye(5)), "a": hessian.zero(2)}
    calibration.save_moments(tmp_path / "m.safetensors", moments)
    loaded = calibration.load_moments(tmp_path / "m.safetensors")
    assert set(loaded) == set(moments)
    for name, m in moments.items():
        for field, other in zip(m, loaded[name], strict=True):
            assert field.dtype == other.dtype
            np.testing.assert_array_equal(field, other)


@pytest.mark.parametrize("kind", matrices.HESSIANS)
def test_regularise_gives_mean_diagonal_one_plus_the_damping(kind):
    h = 37 * matrices.hessian(kind, 9)
    wanted = h / np.diag(h).mean() + 0.01 * np.eye(9)
    found = hessian.regularise(jnp.asarray(h), 0.01)
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(found, found.T)


def test_normalise_leaves_a_zero_matrix_and_symmetrises():
    np.testing.assert_array_equal(hessian.normalise(jnp.zeros((3, 3))), np.zeros((3, 3)))
    h = jnp.asarray([[1.0, 0.2], [0.4, 3.0]])
    np.testing.assert_allclose(hessian.normalise(h), [[0.5, 0.15], [0.15, 1.5]], rtol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", matrices.HESSIANS)
def test_root_times_its_transpose_is_the_damped_hessian(kind, dtype):
    h = matrices.hessian(kind, 13)
    f = FACTOR(jnp.asarray(h, dtype), 0.01, 8)
    wanted = h / np.diag(h).mean()
    eps = np.finfo(dtype).eps
    assert bool(f.finite) and float(f.damping) == dtype(0.01)
    np.testing.assert_allclose(f.h, wanted, atol=8 * eps * np.abs(wanted).max())
    root = np.asarray(f.root, np.float64)
    np.testing.assert_allclose(root @ root.T, wanted + 0.01 * np.eye(13), atol=40 * eps * np.abs(wanted).max())
    assert np.all(np.triu(root, 1) == 0) and np.all(np.diag(root) > 0)


@pytest.mark.parametrize(("n", "block"), [*itertools.product((1, 13, 16), (1, 4, 8))])
def test_block_ldl_multiplies_back_and_is_unit_block_lower_triangular(n, block):
    h = matrices.hessian("geometric", n) + 0.01 * np.eye(n)
    lower = np.asarray(hessian.block_ldl(jnp.linalg.cholesky(jnp.asarray(h)), block))
    width = n + -n % block
    padded = np.eye(width)
    padded[:n, :n] = h
    wanted, d = oracles.block_ldl(padded, block)
    np.testing.assert_allclose(lower, wanted, atol=1e-10)
    blocks = np.zeros((width, width))
    for j, dj in zip(oracles.blocks(width, block), d, strict=True):
        blocks[j, j] = dj
        np.testing.assert_allclose(lower[j, j], np.eye(block), atol=1e-12)
        assert np.all(lower[: j.start, j] == 0)
    np.testing.assert_allclose(lower @ blocks @ lower.T, padded, atol=1e-12)
    np.testing.assert_allclose(lower[n:, :n], 0, atol=1e-14)  # padding is coupled to nothing
    np.testing.assert_allclose(lower[:n, n:], 0, atol=1e-14)


def test_block_one_is_the_scalar_ldl():
    h = matrices.hessian("power", 7) + 0.01 * np.eye(7)
    cholesky = np.linalg.cholesky(h)
    np.testing.assert_allclose(hessian.block_ldl(jnp.asarray(cholesky), 1), cholesky / np.diag(cholesky), atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_damping_is_raised_tenfold_until_the_cholesky_succeeds_and_reported(dtype):
    h = np.diag([1.0, 1.0, 1.0, -0.05]).astype(dtype)
    h *= 4 / np.trace(h)  # mean diagonal 1, least eigenvalue about -0.068
    f = FACTOR(jnp.asarray(h), 0.001, 1)
    np.testing.assert_allclose(f.damping, 0.1, rtol=1e-6)
    assert bool(f.finite) and np.isfinite(f.lower).all()


def test_a_dead_input_without_damping_starts_the_search_at_a_millionth():
    f = FACTOR(jnp.asarray(np.diag([1.0, 0.0, 1.0])), 0.0, 1)
    np.testing.assert_allclose(f.damping, 1e-6, rtol=1e-12)
    assert bool(f.finite)
    assert float(FACTOR(jnp.eye(3), 0.0, 1).damping) == 0  # and none where none is needed
    zero = FACTOR(jnp.zeros((3, 3)), 0.0, 1)
    assert bool(zero.finite) and np.all(zero.h == 0)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_is_flagged_and_ends(wrong):
    h = np.eye(3)
    h[1, 1] = wrong
    assert not bool(FACTOR(jnp.asarray(h), 0.0, 1).finite)


def test_a_negative_definite_matrix_is_damped_or_flagged_but_never_silently_wrong():
    f = FACTOR(jnp.asarray(-1e6 * np.eye(3)), 0.0, 1)
    assert not bool(f.finite)


def test_factoring_a_batch_is_factoring_each_even_with_different_dampings():
    hs = jnp.stack([jnp.asarray(matrices.hessian("geometric", 3)), jnp.asarray(np.diag([1.0, 0, 1])), jnp.eye(3)])
    batch = jax.vmap(lambda h: hessian.factor(h, 0.0, 1))(hs)
    for i, h in enumerate(hs):
        for one, many in zip(FACTOR(h, 0.0, 1), batch, strict=True):
            np.testing.assert_allclose(one, many[i], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_factors_are_the_identity(dtype):
    f = hessian.identity(5, 4, dtype)
    assert f.h.dtype == f.lower.dtype == dtype
    np.testing.assert_array_equal(f.h, np.eye(5))
    np.testing.assert_array_equal(f.root, np.eye(5))
    np.testing.assert_array_equal(f.lower, np.eye(8))
    assert float(f.damping) == 0 and bool(f.finite)


@pytest.mark.parametrize("g", [1, 2, 8])
def test_many_small_inverses_are_those_of_numpy(g):
    draws = np.random.default_rng(g).standard_normal((50, g, 2 * g + 1))
    positive = draws @ draws.transpose(0, 2, 1)
    for blocks in (positive, np.linalg.cholesky(positive)):
        found = np.asarray(hessian.inverses(jnp.asarray(blocks)))
        error = np.max(np.abs(found @ blocks - np.eye(g)), axis=(1, 2))
        assert np.all(error < 1e-14 * g * np.linalg.cond(blocks))  # ε · κ, without pivots stable for these


def test_no_batched_lapack_call_is_left_that_could_wait_for_another_one():
    root = jnp.eye(64)
    for function in (lambda a: hessian.block_ldl(a, 8), lambda a: descent_feedback(a, 8)):
        assert "lapack" not in jax.jit(function).lower(root).as_text()
