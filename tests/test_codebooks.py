"""Codebooks: nearest codewords, codes that decode to values, scales, and their errors against one another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import caldera_jax as cj
from caldera_jax.codebooks import by_bits, dequantize, fit_scale, quantize

DTYPES = (np.float32, np.float64)
# QLoRA (arXiv 2305.14314), Appendix E.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
GRIDS = {"e8p": cj.E8P(), "e8p per group": cj.E8P(group=16), "residual 3": by_bits("e8p", 3),
         "residual 4": cj.ResidualE8P(4), "uniform 1": cj.Uniform(1), "uniform 4": cj.Uniform(4),
         "uniform 11": cj.Uniform(11), "clipped": cj.Uniform(3, clip=2.5), "per group": cj.Uniform(4, group=7),
         "nf4": cj.NormalFloat(4), "nf3 per 8": cj.NormalFloat(3, group=8), "float16": cj.Half(),
         "bfloat16": cj.Half("bfloat16"), "dithered": cj.Dithered(4), "trellis 2": cj.Trellis(2, 256),
         "trellis 3": cj.Trellis(3, 512)}
SCALARS = ("uniform 1", "uniform 4", "uniform 11", "clipped", "per group", "nf4", "nf3 per 8", "float16", "bfloat16")
QUANTIZE = jax.jit(quantize, static_argnums=0)
ROUND = jax.jit(lambda grid, x: grid.round(x), static_argnums=0)
KEY = jax.random.key(3)


def _levels(grid):
    return np.sort(np.asarray(grid.decode(jnp.arange(2**grid.code_bits, dtype=jnp.uint16), jnp.float64)))


@pytest.mark.parametrize("name", GRIDS)
def test_codes_decode_to_the_quantized_values_in_every_dtype(name):
    grid = GRIDS[name]
    for dtype in DTYPES:
        x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 19)).astype(dtype))
        found = QUANTIZE(grid, x, KEY)
        assert found.values.dtype == found.scale.dtype == dtype and found.values.shape == x.shape
        assert found.codes.shape == (5, -(-19 // grid.block))
        assert int(jnp.max(found.codes)) < 2**grid.code_bits
        decoded = dequantize(grid, found.codes, found.scale, 19)
        atol = 4 * np.finfo(dtype).eps * float(jnp.abs(x).max())
        np.testing.assert_allclose(decoded, found.values, rtol=0, atol=atol)


@pytest.mark.parametrize("name", GRIDS)
def test_every_codebook_is_hashable_frozen_and_obeys_the_protocol(name):
    grid = GRIDS[name]
    assert isinstance(grid, cj.Codebook) and hash(grid) == hash(dataclasses.replace(grid))
    assert grid == dataclasses.replace(grid) and grid not in [g for n, g in GRIDS.items() if n != name]
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.group = 5


@pytest.mark.parametrize("name", SCALARS)
def test_a_scalar_grid_takes_each_number_to_its_nearest_level(name):
    grid = GRIDS[name]
    x = np.concatenate([np.random.default_rng(0).normal(size=500), np.linspace(-1.2, 1.2, 500), [0.0]])
    if isinstance(grid, cj.Half):  # every finite float of the kind
        bits = jnp.arange(1 << 16, dtype=jnp.uint16)
        levels = np.asarray(grid.decode(bits, jnp.float64))
        levels = np.unique(levels[np.isfinite(levels)])
    else:
        levels = _levels(grid)
        assert len(np.unique(levels)) == 2**grid.bits
    values = np.asarray(grid.round(jnp.asarray(x))[0])
    place = np.clip(np.searchsorted(levels, x), 1, len(levels) - 1)
    least = np.minimum(np.abs(x - levels[place - 1]), np.abs(x - levels[place]))
    np.testing.assert_allclose(np.abs(x - values), least, atol=1e-14)
    assert np.isin(values, levels).all()


@pytest.mark.parametrize("name", [*SCALARS, "e8p"])
def test_rounding_what_is_already_on_the_grid_changes_nothing(name):
    grid = GRIDS[name]
    values, codes = ROUND(grid, jnp.asarray(np.random.default_rng(2).normal(size=(4, 16))))
    again, same = ROUND(grid, values)
    np.testing.assert_array_equal(codes, same)
    np.testing.assert_array_equal(values, again)


def test_more_lattice_bits_give_less_error_each_near_its_known_value():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(64, 512)))
    errors = [float(jnp.mean((QUANTIZE(by_bits("e8p", b), x).values - x) ** 2)) for b in (2, 3, 4)]
    assert abs(errors[0] - 0.0915) < 0.002
    assert errors[2] < errors[1] / 3 < errors[0] / 9  # 6 dB a bit is a factor of 4


def test_the_residual_decoder_uses_the_scale_of_its_encoder():
    """The original encodes with 0.9 and decodes with 3.45."""
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 16)))  # a shape that another test compiles too
    grid = cj.ResidualE8P(4, residual_scale=0.9)
    values, codes = ROUND(grid, x)
    np.testing.assert_allclose(values, grid.decode(codes, jnp.float64), atol=1e-14)
    quarters = np.asarray((values - ROUND(cj.E8P(), x)[0]) * 0.9) * 4
    np.testing.assert_allclose(quarters, np.rint(quarters), atol=1e-12)  # a codeword of the second stage


def test_normalfloat_4_is_the_published_table():
    np.testing.assert_allclose(cj.NormalFloat(4).levels, NF4, atol=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
def test_normalfloat_has_distinct_levels_from_minus_one_to_one_and_zero(bits):
    levels = cj.NormalFloat(bits).levels
    assert len(levels) == 2**bits and np.all(np.diff(levels) > 0)
    assert levels[0] == -1 and levels[-1] == 1 and 0 in levels


@pytest.mark.parametrize("bits", range(1, 17))
def test_the_uniform_step_is_2_r_over_2_to_the_b_minus_1(bits):
    levels = _levels(cj.Uniform(bits))
    np.testing.assert_allclose(np.diff(levels), 2 / (2**bits - 1), rtol=1e-9)
    assert levels[0] == -1 and levels[-1] == 1


def test_clipping_sends_what_lies_outside_to_the_end_levels_only():
    x = jnp.asarray([[10.0, -10.0, 0.3, -0.2, 0.1, 0.05, 0.2, -0.1]])
    grid = cj.Uniform(4, clip=1.5)
    found = quantize(grid, x)
    top = 1.5 * float(jnp.sqrt(jnp.mean(x * x)))
    np.testing.assert_allclose(found.scale, top, rtol=1e-14)
    np.testing.assert_allclose(found.values[0, :2], [top, -top], rtol=1e-14)
    assert np.all(np.abs(found.values - x)[0, 2:] <= top / 15 + 1e-14)


def test_dithered_rounding_is_unbiased_with_variance_at_most_a_quarter_step_squared():
    grid, draws = cj.Dithered(3), 4000
    x = jnp.linspace(-1, 1, 29)
    values = jax.vmap(lambda key: grid.round(x, key)[0])(jax.random.split(KEY, draws))
    step = 2 / 7
    assert np.all(np.abs(values.mean(0) - x) <= 5 * step / 2 / np.sqrt(draws))
    assert np.all(values.var(0) <= step**2 / 4 * (1 + 1e-9))
    assert np.all(np.abs(values - x[None]) < step * (1 + 1e-9))
    assert float(values.var(0).max()) > 0.9 * step**2 / 4  # it does dither


def test_dithered_rounding_is_a_function_of_its_key_and_demands_one():
    x = jnp.linspace(-1, 1, 40)
    grid = cj.Dithered(4)
    np.testing.assert_array_equal(grid.round(x, KEY)[1], grid.round(x, KEY)[1])
    assert np.any(grid.round(x, KEY)[1] != grid.round(x, jax.random.key(4))[1])
    with pytest.raises(ValueError, match="pass a PRNG key"):
        grid.round(x)


@pytest.mark.parametrize("grid", [cj.Uniform(4, group=8), cj.Uniform(3, clip=2.0, group=8), cj.NormalFloat(4, group=8),
                                  cj.Half(group=8)])
def test_scales_per_group_equal_quantizing_each_group_alone_even_a_partial_last_one(grid):
    x = np.random.default_rng(5).normal(size=(3, 21)) * np.array([[1], [100], [1e-3]])
    found = QUANTIZE(grid, jnp.asarray(x))
    assert found.scale.shape == (3, 3)
    for row in range(3):
        for j, start in enumerate((0, 8, 16)):
            part = jnp.asarray(x[row : row + 1, start : start + 8])
            alone = QUANTIZE(grid, part)
            np.testing.assert_allclose(alone.scale[0, 0], found.scale[row, j], rtol=1e-14)
            np.testing.assert_allclose(alone.values[0], found.values[row, start : start + 8], rtol=1e-14)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_matrices_and_zero_groups_stay_zero_for_all_purposes(name, dtype):
    x = np.random.default_rng(5).normal(size=(5, 19)).astype(dtype)
    x[1] = 0
    x[2, 8:] = 0
    for matrix in (np.zeros((5, 19), dtype), x):
        found = QUANTIZE(GRIDS[name], jnp.asarray(matrix), KEY)
        assert np.isfinite(found.values).all() and np.all(found.scale > 0)
    nothing = np.asarray(QUANTIZE(GRIDS[name], jnp.zeros((5, 19), dtype), KEY).values)
    assert np.sum(nothing**2) == 0  # so that no error is measured against no energy


def test_the_scale_of_one_matrix_is_its_rms_over_the_gain_or_its_largest_magnitude():
    x = jnp.asarray(np.random.default_rng(5).normal(size=(3, 21)))
    rms = np.sqrt(np.mean(np.asarray(x) ** 2))
    for grid, wanted in ((cj.E8P(), rms / 1.03), (cj.ResidualE8P(4), rms), (by_bits("e8p", 3), rms / 0.98),
                         (cj.Uniform(4), np.abs(x).max()), (cj.Half(), rms)):
        scale = fit_scale(grid, x)
        assert scale.shape == (1, 1)
        np.testing.assert_allclose(scale, wanted, rtol=1e-14)


def test_sixteen_bits_are_really_rounded():
    x = jnp.asarray(np.random.default_rng(5).normal(size=(9, 21)))
    for kind, ulp in (("float16", 2.0**-11), ("bfloat16", 2.0**-8)):
        found = quantize(cj.Half(kind), x)
        error = np.abs(found.values - x) / np.abs(x)
        assert 0.3 * ulp < error.max() <= ulp * 1.001  # more than nothing, at most half a unit in the last place
        assert found.codes.dtype == jnp.uint16


@pytest.mark.parametrize(("family", "bits"), [("e8p", 5), ("e8p", 1), ("uniform", 0), ("uniform", 17), ("nf", 1),
                                              ("nf", 9), ("dithered", 0)])
def test_bits_that_are_not_offered_are_named_with_those_that_are(family, bits):
    with pytest.raises(ValueError, match=f"{family} is not offered at {bits} bits: choose from "):
        by_bits(family, bits)


def test_unknown_families_and_impossible_grids_are_refused():
    with pytest.raises(ValueError, match="unknown quantizer 'gptq': choose from e8p"):
        by_bits("gptq", 4)
    for wrong in (lambda: cj.Uniform(0), lambda: cj.Uniform(17), lambda: cj.NormalFloat(1), lambda: cj.Half("float8"),
                  lambda: cj.ResidualE8P(2), lambda: cj.Dithered(17), lambda: cj.Trellis(5), lambda: cj.Trellis(0),
                  lambda: cj.Trellis(2, 3000), lambda: cj.Trellis(2, 2**17)):
        with pytest.raises(ValueError, match="got"):
            wrong()


@pytest.mark.parametrize(("family", "bits"), [("e8p", (2, 3, 4, 8, 16)), ("uniform", range(1, 17)),
                                              ("dithered", range(1, 17)), ("nf", range(2, 9)),
                                              ("trellis", range(1, 5))])
def test_by_bits_gives_that_many_bits_a_weight(family, bits):
    for b in bits:
        grid = by_bits(family, b)
        assert grid.code_bits == b * grid.block


def test_the_scalar_oracle_and_uniform_agree():
    x = np.random.default_rng(5).normal(size=(9, 21))
    np.testing.assert_allclose(quantize(cj.Uniform(3), jnp.asarray(x)).values, oracles.uniform(x, 3), atol=1e-14)
