"""E8P and the 1-bit E8 code against brute force over codewords built from the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from caldera_jax import lattice

DTYPES = (np.float32, np.float64)
ROUND, E8_ENCODE = jax.jit(lattice.e8p_round), jax.jit(lattice.e8_encode)
VECTORS = 320


def _inputs(kind):
    rng = np.random.default_rng(7)
    normal = rng.normal(size=(VECTORS, 8))
    return {"gaussian": normal, "wide x2": 2 * normal, "wide x4": 4 * normal,
            "heavy-tailed": rng.standard_t(1.5, size=(VECTORS, 8)),
            "ties of 1/4": rng.integers(-12, 13, (VECTORS, 8)) / 4,
            "ties of 1/2": rng.integers(-5, 6, (VECTORS, 8)) / 2,
            "few distinct": rng.choice([-1.0, 0, 1], (VECTORS, 8)) * rng.choice([0.25, 0.75, 1, 1.25], (VECTORS, 1)),
            "huge": 1e6 * normal, "tiny": 1e-20 * normal, "zeros": np.zeros((VECTORS, 8)),
            "one entry": np.where(np.arange(8) == rng.integers(0, 8, (VECTORS, 1)), 3 * normal, 0),
            "midpoints": oracles.e8p_codewords()[rng.integers(0, 1 << 16, (2, VECTORS))].mean(0)}[kind]


KINDS = ("gaussian", "wide x2", "wide x4", "heavy-tailed", "ties of 1/4", "ties of 1/2", "few distinct", "huge", "tiny",
         "zeros", "one entry", "midpoints")


def _tolerance(x, dtype):
    """A few rounding errors of a score of this size."""
    return 16 * np.finfo(dtype).eps * (8 + 2.75 * np.abs(x).sum(1))


def test_e8p_has_65536_distinct_codewords_those_of_the_definition():
    ours, theirs = lattice.e8p_codewords(), oracles.e8p_codewords()
    assert ours.shape == theirs.shape == (1 << 16, 8)
    assert len(np.unique(ours, axis=0)) == 1 << 16
    np.testing.assert_array_equal(np.unique(ours, axis=0), np.unique(theirs, axis=0))


def test_e8p_norms_are_the_published_ones():
    norms = (lattice.e8p_patterns() ** 2).sum(1)
    assert (norms <= 10).sum() == 227 and (norms == 12).sum() == 29 and len(norms) == 256
    assert len(np.unique(lattice.e8p_patterns(), axis=0)) == 256


def test_every_e8p_codeword_less_its_shift_is_in_the_coset_of_even_sum():
    codewords = lattice.e8p_codewords()
    shift = np.where(np.arange(1 << 16) & 1, -0.25, 0.25)[:, None]
    point = codewords - shift
    assert np.all(np.abs(point % 1) == 0.5) and np.all(point.sum(1) % 2 == 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_e8p_round_is_nearest(kind, dtype):
    x = _inputs(kind).astype(dtype)
    values, codes = ROUND(jnp.asarray(x))
    assert values.dtype == dtype and codes.dtype == jnp.uint16
    x, values = x.astype(np.float64), np.asarray(values, np.float64)
    shortfall = oracles.best_scores(x, oracles.e8p_codewords()) - oracles.scores(x, values)
    assert np.all(shortfall <= _tolerance(x, dtype))
    np.testing.assert_array_equal(values, lattice.e8p_codewords()[np.asarray(codes)[:, 0]])


def test_e8p_ties_are_nearest_without_tolerance_in_float32():
    """All scores are multiples of 1/32 there, so no tolerance is due."""
    for kind in ("ties of 1/4", "ties of 1/2", "few distinct", "zeros"):
        x = _inputs(kind)
        values = np.asarray(ROUND(jnp.asarray(x, jnp.float32))[0], np.float64)
        np.testing.assert_array_equal(oracles.scores(x, values), oracles.best_scores(x, oracles.e8p_codewords()))


@pytest.fixture(scope="module")
def whole_code():
    return jnp.arange(1 << 16, dtype=jnp.uint16)[:, None]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_e8p_code_survives_decoding_and_encoding(dtype, whole_code):
    points = lattice.e8p_decode(whole_code, dtype)
    np.testing.assert_array_equal(points, lattice.e8p_codewords())
    values, codes = ROUND(points)
    np.testing.assert_array_equal(codes, whole_code)
    np.testing.assert_array_equal(values, points)


def test_e8p_error_on_a_gaussian_is_the_published_one():
    x = np.random.default_rng(0).normal(size=(1 << 16, 8)) * 1.03
    each = ((np.asarray(ROUND(jnp.asarray(x))[0]) - x) ** 2).mean(1) / 1.03**2
    assert abs(each.mean() - 0.0915) < 0.00005 + 4 * each.std() / np.sqrt(len(each))


def test_e8p_round_is_the_same_mapped_and_in_any_batch_shape():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 16)))
    values, codes = ROUND(x)
    assert values.shape == (2, 3, 16) and codes.shape == (2, 3, 2)
    rows = ROUND(x.reshape(-1, 8))
    np.testing.assert_array_equal(values.reshape(-1, 8), rows[0])
    np.testing.assert_array_equal(codes.reshape(-1, 1), rows[1])
    for other, same in zip(jax.jit(jax.vmap(lattice.e8p_round))(x), (values, codes), strict=True):
        np.testing.assert_array_equal(other, same)
    np.testing.assert_array_equal(ROUND(x[0, 0])[1], codes[0, 0])
    np.testing.assert_array_equal(lattice.e8p_decode(codes[0, 0], jnp.float64), values[0, 0])


@pytest.mark.slow  # a hundred small compilations
def test_e8p_round_is_the_same_eager_and_jitted():
    x = jnp.asarray(_inputs("gaussian"))
    for eager, jitted in zip(lattice.e8p_round(x), ROUND(x), strict=True):
        np.testing.assert_array_equal(eager, jitted)


def test_the_one_bit_code_has_256_distinct_points_241_of_them_the_shortest_of_e8():
    points = lattice.e8_codewords()
    assert points.shape == (256, 8) and len(np.unique(points, axis=0)) == 256
    norms = (points**2).sum(1)
    np.testing.assert_array_equal(np.unique(points[norms <= 2], axis=0), np.unique(oracles.e8_small_points(), axis=0))
    far = points[norms > 2]
    assert len(far) == 15 and np.all((np.abs(far) == 2).sum(1) == 1) and np.all((far != 0).sum(1) == 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bit_encoding_is_nearest_and_decodes_to_its_point(dtype):
    for kind in KINDS:
        x = _inputs(kind).astype(dtype)
        codes = E8_ENCODE(jnp.asarray(x))
        assert codes.shape == (VECTORS, 1) and codes.dtype == jnp.uint8
        values = np.asarray(lattice.e8_decode(codes, dtype), np.float64)
        x = x.astype(np.float64)
        shortfall = oracles.best_scores(x, lattice.e8_codewords()) - oracles.scores(x, values)
        assert np.all(shortfall <= _tolerance(x, dtype)), kind


def test_every_one_bit_code_survives_decoding_and_encoding():
    codes = jnp.arange(256, dtype=jnp.uint8)[None]
    np.testing.assert_array_equal(lattice.e8_encode(lattice.e8_decode(codes)), codes)
