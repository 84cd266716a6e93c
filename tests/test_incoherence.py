"""Rotations keep the objective, are undone to rounding, and make any weight incoherent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.linalg

from caldera_jax import hadamard, incoherence

KINDS = ("hadamard", "orthogonal", "none")
KEY = jax.random.key(7)


def gaussian(*shape, dtype=np.float64, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


def hessian(n, dtype=np.float64, seed=1):
    x = np.random.default_rng(seed).normal(size=(2 * n, n)) * np.geomspace(1, 30, n)
    return jnp.asarray((x.T @ x / (2 * n)).astype(dtype))


def dense(side, n):
    """V as a float64 matrix, from the definition."""
    if isinstance(side, tuple):
        return functools.reduce(np.kron, [np.asarray(f, np.float64) for f in side], np.eye(1 if side else n))
    power, rest, kind = hadamard.factor(n)
    m = scipy.fft.dct(np.eye(rest), axis=0, norm="ortho")
    if kind == "hadamard":
        m = hadamard.hadamard_matrix(rest) / np.sqrt(rest)
    return np.kron(scipy.linalg.hadamard(power) / np.sqrt(power), m) * np.asarray(side, np.float64)


jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiled once, run once
rotate = jit(incoherence.rotate, static_argnums=3)
undo = jit(incoherence.undo)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n"), [(8, 24), (13, 16), (1, 7), (30, 1), (1, 1)])
def test_rotate_is_the_dense_two_sided_product(m, n, kind):
    w, h = gaussian(m, n), hessian(n)
    w2, h2, rotation = rotate(KEY, w, h, kind)
    u, v = dense(rotation.left, m), dense(rotation.right, n)
    np.testing.assert_allclose(u @ u.T, np.eye(m), atol=1e-14)
    np.testing.assert_allclose(v @ v.T, np.eye(n), atol=1e-14)
    np.testing.assert_allclose(w2, u @ w @ v.T, atol=1e-13)
    np.testing.assert_allclose(h2, v @ h @ v.T, atol=1e-13 * np.abs(h).max())


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_are_products_with_the_dense_matrix_on_any_batch(kind):
    side, x = incoherence.draw(KEY, 5, 36, kind, jnp.float64).right, gaussian(2, 3, 36)
    v = dense(side, 36)
    assert (kind == "none") == np.array_equal(v, np.eye(36))
    np.testing.assert_allclose(incoherence.forward(side, x), x @ v.T, atol=1e-13)
    np.testing.assert_allclose(incoherence.backward(side, x), x @ v, atol=1e-13)
    np.testing.assert_allclose(incoherence.forward(side, x[0, 0]), v @ x[0, 0], atol=1e-13)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("m", "n"), [(36, 344), (192, 47), (1, 1)])
def test_undo_is_exact_to_rounding(m, n, kind, dtype):
    w, h = gaussian(m, n, dtype=dtype), hessian(n, dtype)
    w2, h2, rotation = rotate(KEY, w, h, kind)
    assert {a.dtype for a in jax.tree.leaves((w2, h2, rotation))} == {np.dtype(dtype)}
    np.testing.assert_allclose(undo(rotation, w2), w, atol=60 * np.finfo(dtype).eps)
    if kind != "none" and m > 1:
        assert np.abs(w2 - w).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_does_not_change(kind):
    m, n = 40, 172
    e, h = gaussian(m, n), hessian(n)
    e2, h2, _ = rotate(KEY, e, h, kind)
    np.testing.assert_allclose(np.sum((e2 @ h2) * e2), np.sum((e @ h) * e), rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(e2), np.linalg.norm(e), rtol=1e-13)
    np.testing.assert_allclose(np.linalg.eigvalsh(h2), np.linalg.eigvalsh(h), atol=1e-13 * np.abs(h).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_the_rotated_hessian_is_exactly_symmetric(kind):
    _, h2, _ = rotate(KEY, gaussian(3, 94, dtype=np.float32), hessian(94, np.float32), kind)
    np.testing.assert_array_equal(h2, h2.T)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rotated_product_is_the_product(kind):
    """x wᵀ = backward(left, forward(right, x) w'ᵀ): how a compressed layer is applied."""
    x, w = gaussian(4, 24, seed=3), gaussian(10, 24)
    w2, _, rotation = rotate(KEY, w, hessian(24), kind)
    y = incoherence.backward(rotation.left, incoherence.forward(rotation.right, x) @ w2.T)
    np.testing.assert_allclose(y, x @ w.T, atol=1e-13)


# The bounds of QuIP# (arXiv 2402.04396, Lemma 3.1). Cosines may cost a factor sqrt(2) a side.


def incoherence_of(w):
    return np.abs(w).max() * np.sqrt(w.size) / np.linalg.norm(w)


def spikes(m, n):
    """Three large weights on a small background."""
    w = 0.003 * np.random.default_rng(2).normal(size=(m, n))
    w[[3, 5, 5], [8, 13, 14]] = 1
    return w


def images_of_spikes(m, n):
    """Flat itself, but T without random signs turns it into two spikes."""
    return dense(np.ones(m), m).T[:, :2] @ dense(np.ones(n), n)[:2]


def rotations_of(w, kind, draws=32):
    """Incoherence of w after each of many independent rotations."""
    turn = lambda key: incoherence.rotate_weight(incoherence.draw(key, *w.shape, kind, w.dtype), w)
    return [incoherence_of(turned) for turned in jit(jax.vmap(turn))(jax.random.split(KEY, draws))]


@pytest.mark.parametrize(("m", "n", "slack"), [(96, 344, 1), (188, 94, 2)])  # the latter by cosines on both sides
def test_any_weight_is_incoherent_after_signs_and_hadamard_and_not_before_or_without_signs(m, n, slack):
    draws, delta = 32, 0.01
    bound = 2 * np.log(4 * m * n * draws / delta)  # for all draws at once, with probability 1 - delta
    spiky, flat = spikes(m, n), images_of_spikes(m, n)
    assert max(rotations_of(jnp.asarray(spiky), "hadamard")) < slack * bound
    assert max(rotations_of(jnp.asarray(flat), "hadamard")) < slack * bound
    assert incoherence_of(spiky) > bound
    assert incoherence_of(dense(np.ones(m), m) @ flat @ dense(np.ones(n), n).T) > bound


def test_orthogonal_factors_spread_spikes_but_less_than_hadamard():
    w = spikes(96, 344)
    by_factors, by_hadamard = (np.median(rotations_of(jnp.asarray(w), kind)) for kind in ("orthogonal", "hadamard"))
    assert 2 * by_hadamard < by_factors < incoherence_of(w) / 2


def test_eigenvectors_of_the_hessian_are_incoherent_after_signs_and_hadamard():
    n, delta = 344, 0.01
    bound = np.sqrt(2 * np.log(2 * n**2 / delta))
    basis = np.concatenate([dense(np.ones(n), n)[:1], np.eye(n)[1:]])  # an image of a spike, and spikes
    eigenvectors = np.linalg.qr(basis.T)[0]
    h = jnp.asarray((eigenvectors * np.linspace(1, 3, n)) @ eigenvectors.T)
    side = incoherence.draw(KEY, 1, n, "hadamard", h.dtype).right
    turned = np.linalg.eigh(jit(incoherence.rotate_hessian)(side, h))[1]
    assert np.abs(turned).max() * np.sqrt(n) < bound
    assert np.abs(np.linalg.eigh(h)[1]).max() * np.sqrt(n) > bound


def test_orthogonal_factors_split_the_size_as_evenly_as_its_divisors_allow():
    shapes = lambda n: [f.shape[0] for f in incoherence.draw(KEY, n, 1, "orthogonal").left]
    assert [shapes(n) for n in (1, 2, 7, 36, 48, 94)] == [[1], [2], [7], [6, 6], [6, 8], [2, 47]]


def test_signs_are_signs_of_both_kinds():
    left, right = incoherence.draw(KEY, 300, 400, "hadamard", jnp.float32)
    for signs, size in ((left, 300), (right, 400)):
        assert signs.dtype == jnp.float32 and set(np.asarray(signs)) == {-1.0, 1.0}
        assert abs(float(signs.sum())) < 5 * np.sqrt(size)
    assert np.any(left != right[:300])


def test_orthogonal_factors_are_haar_with_mean_zero_and_both_determinants():
    factors = jax.vmap(lambda k: incoherence.draw(k, 3, 1, "orthogonal", jnp.float64).left[0])(
        jax.random.split(KEY, 4000)
    )
    np.testing.assert_allclose(factors.mean(0), np.zeros((3, 3)), atol=5 / np.sqrt(3 * 4000))
    np.testing.assert_allclose((factors**2).mean(0), np.full((3, 3), 1 / 3), atol=0.03)
    assert abs((np.linalg.det(factors) > 0).mean() - 0.5) < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_key_gives_the_same_rotation_and_another_key_another(kind):
    one, same = (incoherence.draw(KEY, 12, 20, kind) for _ in range(2))
    other = incoherence.draw(jax.random.key(8), 12, 20, kind)
    jax.tree.map(np.testing.assert_array_equal, one, same)
    if kind == "none":
        assert one == other == ((), ())
    else:
        assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_no_rotation_returns_the_same_bits():
    w, h = gaussian(6, 20, dtype=np.float32), hessian(20, np.float32)
    w2, h2, rotation = rotate(KEY, w, (h + h.T) / 2, "none")
    np.testing.assert_array_equal(w2, w)
    np.testing.assert_array_equal(h2, (h + h.T) / 2)
    np.testing.assert_array_equal(incoherence.undo(rotation, w2), w)


@pytest.mark.parametrize("kind", KINDS)
def test_jit_is_eager_and_vmap_is_a_loop(kind):
    m, n = 6, 12
    w, h, keys = gaussian(2, m, n), jnp.stack([hessian(n), hessian(n, seed=2)]), jax.random.split(KEY, 2)
    mapped = jit(jax.vmap(lambda k, w, h: incoherence.rotate(k, w, h, kind)))(keys, w, h)
    for i in range(2):
        eager = incoherence.rotate(keys[i], w[i], h[i], kind)
        jitted = rotate(keys[i], w[i], h[i], kind)
        close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12 * max(1, np.abs(b).max()))
        jax.tree.map(close, jitted, eager)
        jax.tree.map(close, jax.tree.map(lambda a: a[i], mapped), eager)  # noqa: B023
    restored = jit(jax.vmap(incoherence.undo))(mapped[2], mapped[0])
    np.testing.assert_allclose(restored, w, atol=1e-13)


# Trained sides: real-valued signs, as in fine-tuning.


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_backward_is_the_transpose_of_forward_even_when_the_side_is_trained(kind):
    side = incoherence.draw(KEY, 1, 24, kind, jnp.float64).right
    side = jax.tree.map(lambda a: a + 0.3 * gaussian(*a.shape, seed=4), side)
    x, y = gaussian(24, seed=5), gaussian(24, seed=6)
    np.testing.assert_allclose(y @ incoherence.forward(side, x), incoherence.backward(side, y) @ x, rtol=1e-12)


def test_trained_signs_scale_the_round_trip_by_their_squares():
    signs, x = gaussian(24, seed=4), gaussian(3, 24)
    back = incoherence.backward(signs, incoherence.forward(signs, x))
    np.testing.assert_allclose(back, x * (signs**2)[None], atol=1e-13)


@pytest.mark.parametrize("function", [incoherence.forward, incoherence.backward])
def test_gradients_in_signs_and_input_agree_with_finite_differences(function):
    signs, x, c = gaussian(12, seed=4), gaussian(3, 12), gaussian(3, 12, seed=5)
    loss = lambda signs, x: jnp.sum(c * jnp.sin(function(signs, x)))
    gradients = jit(jax.grad(loss, (0, 1)))(signs, x)
    for direction in ((gaussian(12, seed=6), jnp.zeros((3, 12))), (jnp.zeros(12), gaussian(3, 12, seed=6))):
        step = jit(lambda t: loss(signs + t * direction[0], x + t * direction[1]))  # noqa: B023
        slope = sum(jnp.sum(g * d) for g, d in zip(gradients, direction, strict=True))
        np.testing.assert_allclose((step(1e-6) - step(-1e-6)) / 2e-6, slope, rtol=1e-7, atol=1e-8)


def test_a_side_follows_the_dtype_of_what_it_rotates():
    for kind in KINDS:
        side = incoherence.draw(KEY, 1, 12, kind, jnp.float64).right
        assert incoherence.forward(side, gaussian(2, 12, dtype=np.float32)).dtype == jnp.float32


# Errors name the remedy.


def test_an_unknown_kind_is_an_error_that_lists_the_kinds():
    with pytest.raises(ValueError, match="'fourier'.*'hadamard', 'orthogonal', 'none'"):
        incoherence.rotate(KEY, gaussian(2, 4), hessian(4), "fourier")


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_the_wrong_side_is_an_error_that_says_which_side_is_which(kind):
    rotation = incoherence.draw(KEY, 6, 12, kind, jnp.float64)
    for function in (incoherence.forward, incoherence.backward):
        with pytest.raises(ValueError, match=r"size 6.*\(2, 12\).*rotation.right for the n inputs"):
            function(rotation.left, gaussian(2, 12))
