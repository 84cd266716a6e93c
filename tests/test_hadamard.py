"""The fast transform is orthonormal at every size, equal to its dense oracle, and light on memory."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
import scipy.linalg

from caldera_jax import hadamard

BY_KIND = {"sylvester": 64, "hadamard": 344, "cosine": 94}
LARGE = (576, 1536, 4096, 11008, 13824, 28672, 29568, 1009, 4099, 2 * 3001)


def dense_transform(n):
    """[n, n] in float64, from the definition."""
    power, rest, kind = hadamard.factor(n)
    m = np.ones((1, 1))
    if kind == "hadamard":
        m = hadamard.hadamard_matrix(rest).astype(float) / np.sqrt(rest)
    if kind == "cosine":
        m = scipy.fft.dct(np.eye(rest), axis=0, norm="ortho")
    return np.kron(scipy.linalg.hadamard(power) / np.sqrt(power), m)


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # many sizes, each compiled once
def there_and_back(x):
    y = hadamard.transform(x)
    return y, hadamard.inverse(y)


def gaussian(*shape, dtype=np.float64, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype))


@pytest.mark.parametrize("tens", range(20))
def test_every_size_to_200_is_its_orthonormal_dense_oracle(tens):
    for n in range(10 * tens + 1, 10 * tens + 11):
        oracle = dense_transform(n)
        np.testing.assert_allclose(oracle @ oracle.T, np.eye(n), atol=1e-13)
        forth, back = there_and_back(jnp.asarray(np.eye(n)))
        np.testing.assert_allclose(forth, oracle.T, atol=1e-14 * np.sqrt(n), err_msg=f"n = {n}")
        np.testing.assert_allclose(back, np.eye(n), atol=1e-14 * np.sqrt(n), err_msg=f"n = {n}")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", LARGE)
def test_large_sizes_keep_inner_products_and_invert_to_rounding(n, dtype):
    x = gaussian(4, n, dtype=dtype)
    forth, back = (np.asarray(y) for y in there_and_back(x))
    assert forth.dtype == back.dtype == dtype
    eps, wide = np.finfo(dtype).eps, np.asarray(x, np.float64)
    np.testing.assert_allclose(back, x, atol=40 * eps)
    assert np.abs(forth - x).max() > 0.1  # not the identity
    forth = forth.astype(np.float64)
    np.testing.assert_allclose(forth @ forth.T, wide @ wide.T, atol=20 * eps * n)


@pytest.mark.parametrize("n", [1024, 1376, 4099])
def test_float32_agrees_with_the_float64_oracle(n):
    x = gaussian(3, n, dtype=np.float32)
    oracle = np.asarray(x, np.float64) @ dense_transform(n).T
    np.testing.assert_allclose(jax.jit(hadamard.transform)(x), oracle, atol=30 * np.finfo(np.float32).eps)


def test_half_precision_stays_half_precision():
    for n in BY_KIND.values():
        x = gaussian(3, n, dtype=np.float32)
        y = hadamard.transform(x.astype(jnp.bfloat16))
        assert y.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(y, np.float32), hadamard.transform(x), atol=0.1)


@pytest.mark.parametrize("n", BY_KIND.values(), ids=BY_KIND)
def test_entries_are_flat_for_hadamard_and_within_sqrt_2_for_cosines(n):
    largest = np.abs(jax.jit(hadamard.transform)(jnp.asarray(np.eye(n)))).max() * np.sqrt(n)
    kind = hadamard.factor(n)[2]
    assert BY_KIND[kind] == n
    assert largest == pytest.approx(np.sqrt(2) if kind == "cosine" else 1, rel=1e-13)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, (1, 1, "sylvester")),
        (2, (2, 1, "sylvester")),
        (7, (1, 7, "cosine")),
        (6, (2, 3, "cosine")),  # order 12 would need 4 | n
        (12, (1, 12, "hadamard")),
        (576, (16, 36, "hadamard")),
        (1536, (128, 12, "hadamard")),
        (11008, (64, 172, "hadamard")),
        (13824, (128, 108, "hadamard")),
        (28672, (1024, 28, "hadamard")),
        (188, (4, 47, "cosine")),  # no construction here
        (29568, (128, 231, "cosine")),  # order 924 would be a large constant
    ],
)
def test_factor_names_the_smallest_dense_factor(n, expected):
    assert hadamard.factor(n) == expected


def test_hadamard_matrices_exist_for_every_multiple_of_4_to_256_but_two():
    missing = []
    for order in (1, 2, *range(4, 257, 4)):
        matrix = hadamard.hadamard_matrix(order)
        if matrix is None:
            missing.append(order)
            continue
        assert matrix.dtype == np.int8 and matrix.shape == (order, order) and set(np.unique(matrix)) <= {-1, 1}
        np.testing.assert_array_equal(matrix.astype(int) @ matrix.T.astype(int), order * np.eye(order))
    assert missing == [188, 236]


def test_there_is_no_hadamard_matrix_of_other_orders():
    assert all(hadamard.hadamard_matrix(order) is None for order in (-4, 0, 3, 6, 10, 171, 174))


def test_powers_of_two_are_sylvester_matrices():
    for order in (1, 2, 8, 64):
        np.testing.assert_array_equal(hadamard.hadamard_matrix(order), scipy.linalg.hadamard(order))


@pytest.mark.parametrize(
    ("order", "checksum"), [(28, 0xD529ADC1), (36, 0x2AD3D2AB), (92, 0x15159AC7), (116, 0x11EA2A2E), (172, 0x135FE191)]
)
def test_the_matrices_never_change_because_stored_weights_depend_on_them(order, checksum):
    assert zlib.crc32(hadamard.hadamard_matrix(order).tobytes()) == checksum


def test_a_cached_matrix_cannot_be_overwritten():
    with pytest.raises(ValueError, match="read-only"):
        hadamard.hadamard_matrix(12)[0, 0] = 5


@pytest.mark.parametrize("n", BY_KIND.values(), ids=BY_KIND)
def test_jit_vmap_loop_and_eager_agree(n):
    x = gaussian(2, n)
    for function in (hadamard.transform, hadamard.inverse):
        eager = function(x)
        loop = jnp.stack([function(v) for v in x])
        for other in (jax.jit(function)(x), jax.jit(jax.vmap(function))(x), loop):
            np.testing.assert_allclose(other, eager, atol=1e-14)


@pytest.mark.parametrize("n", BY_KIND.values(), ids=BY_KIND)
def test_the_derivative_is_the_transposed_transform(n):
    x, cotangent = gaussian(2, n), gaussian(2, n, seed=1)
    _, pull = jax.vjp(hadamard.transform, x)
    np.testing.assert_allclose(pull(cotangent)[0], hadamard.inverse(cotangent), atol=1e-14)


@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (4096, 11008), (4096, 4099)])
def test_compiled_programs_hold_no_large_constant_and_few_copies(shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    lowered = jax.jit(hadamard.transform).lower(x)
    assert len(lowered.as_text()) < 300_000  # 172² float32 in hexadecimal, and no 4096²
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 4.5 * 4 * shape[0] * shape[1]


def test_an_empty_batch_passes_and_an_empty_axis_says_what_is_wrong():
    assert hadamard.transform(jnp.zeros((0, 12))).shape == (0, 12)
    with pytest.raises(ValueError, match="at least one entry"):
        hadamard.transform(jnp.zeros((3, 0)))


def test_kronecker_is_the_kronecker_product_with_an_identity_for_what_is_left():
    a, b, x = gaussian(3, 3), gaussian(4, 4, seed=1), gaussian(2, 24, seed=2)
    np.testing.assert_allclose(hadamard.kronecker((a, b), x), x @ np.kron(np.kron(a, b), np.eye(2)).T, atol=1e-14)
    np.testing.assert_array_equal(hadamard.kronecker((), x), x)
