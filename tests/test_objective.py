"""The verifier: proxy loss, relative error and the rate-distortion reference."""

import jax.numpy as jnp
import matrices
import numpy as np
import oracles
import pytest

import caldera_jax as cj
from caldera_jax import objective

DTYPES = (np.float32, np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_proxy_loss_is_the_error_on_the_tokens(dtype):
    rng = np.random.default_rng(0)
    e, x = rng.normal(size=(5, 7)), rng.normal(size=(30, 7))
    h = x.T @ x / 30
    found = objective.proxy_loss(jnp.asarray(e, dtype), jnp.asarray(h, dtype))
    assert found.dtype == dtype
    np.testing.assert_allclose(found, ((x @ e.T) ** 2).sum() / 30, rtol=50 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", matrices.HESSIANS)
def test_relative_error_is_that_of_the_definition_for_numpy_and_jax_arrays(kind, dtype):
    w, w_hat, h = (a.astype(dtype) for a in (matrices.gaussian(5, 9), matrices.gaussian(5, 9, 1),
                                             matrices.hessian(kind, 9)))
    wanted = oracles.relative(*(a.astype(np.float64) for a in (w, w_hat, h)))
    for convert in (np.asarray, jnp.asarray):
        found = cj.relative_error(convert(w), convert(w_hat), convert(h))
        assert found.dtype == dtype
        np.testing.assert_allclose(found, wanted, rtol=200 * np.finfo(dtype).eps)


def test_relative_error_of_the_weight_itself_is_0_and_of_nothing_is_1():
    w, h = jnp.asarray(matrices.gaussian(5, 9)), jnp.asarray(matrices.hessian("power", 9))
    assert float(cj.relative_error(w, w, h)) == 0
    np.testing.assert_allclose(cj.relative_error(w, 0 * w, h), 1, rtol=1e-15)
    np.testing.assert_allclose(cj.relative_error(3 * w, 2 * w, 7 * h), 1 / 3, rtol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_over_nothing_is_no_error_and_something_over_nothing_is_infinite(dtype):
    w, h = jnp.zeros((2, 3), dtype), jnp.eye(3, dtype=dtype)
    assert float(cj.relative_error(w, w, h)) == 0
    assert float(cj.relative_error(w, w + 1, h)) == np.inf
    assert float(cj.relative_error(w + 1, w, 0 * h)) == 0


def test_shapes_that_do_not_fit_are_refused_with_what_is_needed():
    with pytest.raises((ValueError, TypeError), match=r"need w and w_hat|Type-check error"):
        cj.relative_error(jnp.ones((2, 3)), jnp.ones((3, 2)), jnp.eye(3))


def test_a_white_source_costs_half_a_log_of_its_signal_to_noise_ratio():
    for relative in (0.5, 0.1, 0.01):
        np.testing.assert_allclose(cj.rate_distortion_bits(relative, np.eye(6)), -np.log2(relative), rtol=1e-9)


@pytest.mark.parametrize("kind", ["geometric", "power", "spiked", "deficient"])
def test_reverse_water_filling_meets_its_distortion_with_every_active_eigenvalue_above_the_level(kind):
    h = matrices.hessian(kind, 12)
    spectrum = np.clip(np.linalg.eigvalsh(h), 0, None)
    for relative in (0.6, 0.2, 0.05):
        levels = np.geomspace(1e-8, spectrum.max(), 200001)  # by search over the water level
        distortion = np.minimum.outer(levels[::100], spectrum).sum(1)
        level = np.interp(relative**2 * spectrum.sum(), distortion, levels[::100])
        wanted = 0.5 * np.log2(np.maximum(spectrum, level) / level).sum() / 12
        np.testing.assert_allclose(cj.rate_distortion_bits(relative, h), wanted, rtol=2e-2, atol=1e-3)


def test_rate_falls_with_the_error_to_zero_at_one_and_ignores_the_scale_of_h():
    h = matrices.hessian("geometric", 12)
    rates = [cj.rate_distortion_bits(r, h) for r in (0.01, 0.1, 0.3, 0.9, 1.0, 2.0)]
    assert np.all(np.diff(rates[:5]) < 0) and rates[4] == pytest.approx(0, abs=1e-9) and rates[5] == 0
    np.testing.assert_allclose(cj.rate_distortion_bits(0.1, 1e6 * h), rates[1], rtol=1e-9)


def test_bits_per_weight_is_a_quotient():
    assert objective.bits_per_weight(2100, 1000) == 2.1
