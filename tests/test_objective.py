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
    w = matrices.gaussian(9, 6)
    for relative in (0.5, 0.1, 0.01):
        np.testing.assert_allclose(cj.rate_distortion_limit(relative, w, np.eye(6)), -np.log2(relative), rtol=1e-9)


@pytest.mark.parametrize("sources", ["white", "own"])
@pytest.mark.parametrize("kind", ["geometric", "power", "spiked", "deficient"])
def test_reverse_water_filling_meets_its_distortion_at_the_level_found_by_search(kind, sources):
    w, h = matrices.decaying(8, 12), matrices.hessian(kind, 12)
    spectrum, vectors = np.linalg.eigh(h)
    spectrum = np.clip(spectrum, 0, None)
    along = np.mean((w @ vectors) ** 2, axis=0)
    variances = spectrum * (along if sources == "own" else along.mean())
    for relative in (0.6, 0.2, 0.05):
        low, high = 0.0, variances.max()
        for _ in range(200):
            level = (low + high) / 2
            covered = np.minimum(variances, level).sum() > relative**2 * (spectrum @ along)
            low, high = (low, level) if covered else (level, high)
        wanted = 0.5 * np.log2(np.maximum(variances, high) / high).sum() / 12
        found = cj.rate_distortion_limit(relative, w, h, sources)
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
        if found:
            np.testing.assert_allclose(cj.rate_distortion_error(found, w, h, sources), relative, rtol=1e-9)
            each = [cj.rate_distortion_error(bits, w, h, sources) for bits in (found, 2 * found)]
            assert cj.rate_distortion_error((found, 2 * found), w, h, sources).tolist() == each
            np.testing.assert_allclose(cj.rate_gap(2.5, relative, w, h, sources), 2.5 - found, rtol=1e-12)


def test_rate_falls_with_the_error_to_zero_at_one_and_ignores_the_scales_of_w_and_h():
    w, h = matrices.decaying(8, 12), matrices.hessian("geometric", 12)
    rates = [cj.rate_distortion_limit(r, w, h, "own") for r in (0.01, 0.1, 0.3, 0.9, 1.0, 2.0)]
    assert np.all(np.diff(rates[:5]) < 0) and rates[4] == pytest.approx(0, abs=1e-9) and rates[5] == 0
    np.testing.assert_allclose(cj.rate_distortion_limit(0.1, 3 * w, 1e6 * h, "own"), rates[1], rtol=1e-9)


def test_knowing_where_w_has_its_energy_never_costs_bits_at_a_given_distortion():
    w, h = matrices.decaying(8, 12), matrices.hessian("flat", 12)  # H = I: any eigenvectors, so only W's energy counts
    h = h + np.diag(np.linspace(0, 1e-9, 12))
    for relative in (0.5, 0.1, 0.02):
        own, white = (cj.rate_distortion_limit(relative, w, h, s) for s in ("own", "white"))
        assert own < white


@pytest.mark.parametrize("kind", ["flat", "geometric", "spiked", "deficient"])
@pytest.mark.parametrize("m, n", [(8, 12), (20, 12), (12, 12)])
def test_energies_are_the_squared_singular_values_of_a_times_a_root_of_h(kind, m, n):
    a, h = matrices.decaying(m, n), matrices.hessian(kind, n)
    values, vectors = np.linalg.eigh(h)
    wanted = np.linalg.svd(a @ (vectors * np.sqrt(np.clip(values, 0, None))), compute_uv=False) ** 2
    np.testing.assert_allclose(objective.energies(a, h), wanted, atol=1e-13 * wanted[0])


def test_the_spectrum_of_h_does_for_h():
    w, h = matrices.decaying(8, 12), matrices.hessian("geometric", 12)
    spectral = np.linalg.eigh(h)
    found, wanted = ([cj.rate_distortion_limit(0.1, w, x, "own"), cj.rate_distortion_error(2.0, w, x),
                      objective.ldlq_bound(x, 8, 0.1, 4), objective.caldera_bound(x, 8, 2, 2, 0.5)]
                     for x in (spectral, h))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_unknown_sources_are_refused():
    with pytest.raises(ValueError, match="'white' or 'own'"):
        cj.rate_distortion_limit(0.1, np.eye(3), np.eye(3), "grey")


def test_incoherence_is_1_for_constant_entries_and_largest_for_a_spike():
    h = np.array([[2.0, 1.0], [1.0, 2.0]])  # eigenvectors (1, ±1) / √2
    found = objective.incoherence(np.ones((3, 2)), h)
    np.testing.assert_allclose(found, (1, 1), rtol=1e-12)
    spike = np.zeros((3, 2))
    spike[1, 1] = -7
    found = objective.incoherence(spike, np.diag([1.0, 2.0]))
    np.testing.assert_allclose(found, (np.sqrt(6), np.sqrt(2)), rtol=1e-12)
    assert objective.incoherence(0 * spike, h).weight == 1


@pytest.mark.parametrize("block", [1, 2, 8])
def test_the_feedback_trace_is_that_of_the_block_ldl(block):
    h = matrices.hessian("geometric", 16)
    wanted = sum(np.trace(d) for d in oracles.block_ldl(h, block)[1])
    np.testing.assert_allclose(objective.feedback_trace(h, block), wanted, rtol=1e-8)


def test_the_bounds_are_their_formulas():
    h = np.diag([1.0, 4.0])  # μ_H = √2, tr H^½ = 3
    np.testing.assert_allclose(objective.ldlq_bound(h, 5, 0.25, 1), 5 * 2 * 0.25 / 2 * 9)
    np.testing.assert_allclose(objective.ldlq_bound(h, 5, 0.25, 8, mu=1.0), 8 * 5 * 0.25 / 2 * 9)
    np.testing.assert_allclose(objective.caldera_bound(h, 8, 4, 2, 3.0, 0.5), 8 * (32 / np.pi * 0.75**2 + 0.5))


def test_bits_per_weight_is_a_quotient():
    assert objective.bits_per_weight(2100, 1000) == 2.1
