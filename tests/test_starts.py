"""Starts of experiments/starts.py: what they have in common with the package's own, and what they claim."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matrices
import numpy as np
import pytest

import caldera_jax as cj
from caldera_jax import hessian, incoherence
from caldera_jax.decompose import factorize_step, quantize_step
from caldera_jax.lplr import empty

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
import starts  # noqa: E402

M, N, K = 12, 16, 4
KEY = jax.random.key(3)
CONFIG = cj.CalderaConfig(rank=K, q_bits=3, quantizer="uniform", factor_quantizer="uniform", factor_bits=6,
                          outer_iterations=2, inner_iterations=1)  # exact SVD: keys decide the rotation alone
HALF = replace(CONFIG, factor_quantizer=cj.Half())
U = 2.0**-11  # unit roundoff of float16


def _problem(seed=0, spread=100.0):
    """W, and an H whose channels 2, 5, 7 and 11 are active ``spread`` times as much as the others."""
    h = matrices.with_spectrum(np.linspace(0.5, 1.5, N), seed)
    size = np.where(np.isin(np.arange(N), CHANNELS), np.sqrt(spread), 1)
    return jnp.asarray(matrices.gaussian(M, N, seed)), jnp.asarray(h * size[:, None] * size)


CHANNELS = [2, 5, 7, 11]
OTHERS = [j for j in range(N) if j not in CHANNELS]


@partial(jax.jit, static_argnums=(2, 3))
def first_low_rank(w, h, start, config):
    """The first L R of the loop, in the caller's basis."""
    rotated, rotated_h, rotation = incoherence.rotate(KEY, w, h, config.rotation)
    factors = hessian.factor(rotated_h, config.damping, config.block)
    first = incoherence.rotate_weight(rotation, starts.outliers(w, h, start))
    step = starts.fitted_first(first, first @ factors.h)
    nothing = empty(lambda *arrays: factorize_step(*arrays, config), KEY, rotated, rotated, None, factors)
    return incoherence.undo(rotation, step(KEY, rotated, rotated @ factors.h, nothing, factors, config).dense())


FACTOR, QUANTIZE, SPLIT, PREPARE = (jax.jit(f, static_argnums=i) for f, i in (
    (factorize_step, 5), (quantize_step, 4), (starts.split, (3, 4)), (hessian.factor, (1, 2))))


def test_the_channels_are_those_of_largest_energy():
    w, h = _problem()
    for start in (starts.Outliers(K), starts.Outliers(K, weighted=False)):
        masked = np.asarray(starts.outliers(w, h, start))
        np.testing.assert_array_equal(masked[:, CHANNELS], w[:, CHANNELS])
        assert not masked[:, OTHERS].any()
    loud = w.at[:, 0].multiply(1e3)  # an input that W amplifies: it counts where W is looked at
    assert np.asarray(starts.outliers(loud, h, starts.Outliers(1)))[:, 0].any()
    assert not np.asarray(starts.outliers(loud, h, starts.Outliers(1, weighted=False)))[:, 0].any()


def test_the_first_low_rank_part_is_exactly_zero_outside_the_channels_where_nothing_is_rotated():
    (w, h), channels = _problem(), K // 2
    dense = first_low_rank(w, h, starts.Outliers(channels), replace(HALF, rotation="none"))
    zero = ~np.asarray(starts.outliers(w, h, starts.Outliers(channels))).any(axis=0)
    assert zero.sum() == N - channels and np.abs(dense[:, zero]).max() == 0 and np.abs(dense[:, ~zero]).min() > 0


def test_rotated_it_is_zero_outside_them_up_to_the_rounding_of_its_factors():
    """L R of rank k can be A, W on k channels, but for float16: A = L₀ R₀ with ‖L₀‖ = √k, ‖R₀‖ = ‖A‖, and rounding
    moves their product by (2 u + u²) √k ‖A‖ at most.  The fit is in the norm of H + d I, √cond as much in the plain."""
    w, h = _problem()
    dense = first_low_rank(w, h, starts.Outliers(K), HALF)
    wanted = starts.outliers(w, h, starts.Outliers(K))
    damped = np.asarray(h) / np.mean(np.diag(h)) + 0.01 * np.eye(N)
    allowed = (2 * U + U**2) * np.sqrt(K * np.linalg.cond(damped)) * np.linalg.norm(wanted)
    assert np.linalg.norm(dense - wanted) < allowed < 0.1 * np.linalg.norm(wanted)
    assert np.linalg.norm(dense[:, OTHERS]) < allowed


def test_with_every_channel_it_is_the_packages_own_start_and_only_the_first_fit_is_another():
    w, h = _problem()
    _, errors = starts.compress(KEY, w, h, CONFIG, starts.Outliers(N))
    _, usual = starts.compress(KEY, w, h, CONFIG, None)
    np.testing.assert_allclose(errors, usual, rtol=1e-9)
    np.testing.assert_array_equal(usual, cj.compress_matrix(KEY, w, h, CONFIG)[1].error)


@pytest.mark.parametrize("preserved", [0, K // 2, K])
def test_a_split_preserves_then_quantizes_then_repairs_and_leaves_out_what_has_no_rank(preserved):
    w, h = _problem()
    f = PREPARE(h, 0.01, 1)
    found, errors = SPLIT(KEY, w, f, CONFIG, preserved)

    def fit(target, rank):
        return FACTOR(KEY, target, target @ f.h, None, f, replace(CONFIG, rank=rank)).dense() if rank else 0 * target

    kept = fit(w, preserved)
    q = QUANTIZE(KEY, w - kept, None, f, CONFIG).values
    repair = fit(w - kept - q, K - preserved)
    np.testing.assert_allclose(found.q.values, q, atol=1e-12)
    np.testing.assert_allclose(found.low_rank.dense(), kept + repair, atol=1e-10)
    steps = ([kept] if preserved else []) + [kept + q] + ([kept + q + repair] if preserved < K else [])
    np.testing.assert_allclose(errors, [cj.relative_error(w, e, f.h) for e in steps], rtol=1e-9)


@pytest.mark.parametrize(("start", "steps"), [(starts.Outliers(N), 4), (starts.Split(2), 3)])
def test_what_is_stored_has_the_rank_and_the_error_that_are_reported(start, steps):
    w, h = _problem(1)
    layer, errors = starts.compress(KEY, w, h, CONFIG, start)
    _, left, right = layer.rotated()
    assert left.shape == (M, K) and right.shape == (K, N) and layer.rank == K
    assert np.isfinite(errors).all() and errors.shape == (steps,)
    best = errors[1:].min() if isinstance(start, starts.Outliers) else errors[-1]
    np.testing.assert_allclose(cj.relative_error(w, layer.dense(), h), best, rtol=1e-9)


@pytest.mark.parametrize(("start", "change", "says"), [
    (starts.Outliers(2), {"order": "q-first"}, "needs order 'lr-first'"), (starts.Outliers(0), {}, "1 to 16 channels"),
    (starts.Outliers(N + 1), {}, "1 to 16 channels"), (starts.Split(K + 1), {}, "0 to 4 directions"),
    (starts.Split(-1), {}, "0 to 4 directions")])
def test_a_start_that_does_not_fit_is_refused(start, change, says):
    with pytest.raises(ValueError, match=says):
        starts.compress(KEY, *_problem(), replace(CONFIG, **change), start)


def test_an_h_that_is_not_positive_semidefinite_is_named():
    w, _ = _problem()
    h = jnp.diag(np.where(np.arange(N) == 0, -1, (1 + 1e-4) / (N - 1)))  # mean diagonal 1e-4 / N: beyond any damping
    with pytest.raises(ValueError, match="Outliers.*positive semidefinite"):
        starts.compress(KEY, w, h, CONFIG, starts.Outliers(N))
