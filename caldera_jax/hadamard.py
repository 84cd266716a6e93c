"""An orthonormal fast transform of any size: Hadamard where a Hadamard matrix can be built, cosine otherwise.

For n = 2^a q with q odd the transform is T = H ⊗ M, with H a Sylvester matrix and M

* nothing, if q = 1;
* the smallest Hadamard matrix of order 2^j q, 2 <= j <= a, that a construction below yields (order <= 256);
* the orthonormal cosine transform (DCT-II) of order q otherwise.

Entries of T are ±1/sqrt(n) in the first two cases, and at most sqrt(2/n) in the third.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import jax.scipy.fft
import numpy as np
from jaxtyping import Array, Float

LARGEST_DENSE = 256  # a dense ±1 factor is a constant of the compiled program: 256 KiB in float32 at this order
_SYLVESTER = 64  # one small product instead of six butterflies: fewer passes over memory


def transform(x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """T x along the last axis, T orthonormal, for any n >= 1.

    Costs O(n log n) for each vector, and O(n order) for the dense factor where ``factor(n)`` names one. Half precision
    is rounded once for each Kronecker factor. T alone leaves a vector that is a row of T as a spike: draw random signs
    first (``incoherence``).
    """
    power, rest, kind = factor(x.shape[-1])
    blocks = x.reshape(*x.shape[:-1], power, rest)
    if kind == "cosine":
        blocks = _cosine(jax.scipy.fft.dct, blocks)
    return kronecker((*_sylvesters(power), *_dense(rest, kind)), blocks.reshape(x.shape))


def inverse(x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """Tᵀ x = T⁻¹ x along the last axis: undoes ``transform`` to rounding, at the same cost."""
    power, rest, kind = factor(x.shape[-1])
    dense = tuple(matrix.T for matrix in _dense(rest, kind))
    blocks = kronecker((*_sylvesters(power), *dense), x).reshape(*x.shape[:-1], power, rest)
    if kind == "cosine":
        blocks = _cosine(jax.scipy.fft.idct, blocks)
    return blocks.reshape(x.shape)


def kronecker(
    matrices: Sequence[Float[Array | np.ndarray, "_ _"]], x: Float[Array, "*batch n"]
) -> Float[Array, "*batch n"]:
    """(M_1 ⊗ ... ⊗ M_r) x along the last axis, for square matrices whose orders multiply to n or to a divisor of n.

    If they multiply to d < n the product stands for (M_1 ⊗ ... ⊗ M_r) ⊗ I of order n. No matrices: the identity.
    Costs n times the sum of the orders for each vector.
    """
    batch = x.ndim - 1
    orders = [matrix.shape[0] for matrix in matrices]
    blocks = x.reshape(*x.shape[:-1], *orders, x.shape[-1] // math.prod(orders))
    for matrix in matrices:  # contract the first axis and put it last: after one round the axes are back in order
        matrix = jnp.asarray(matrix, x.dtype)
        blocks = jnp.tensordot(blocks, matrix, ((batch,), (1,)), precision="highest")
    return jnp.moveaxis(blocks, batch, -1).reshape(x.shape)


@functools.cache
def factor(n: int) -> tuple[int, int, str]:
    """How ``transform`` splits n = power * rest: ``(power, rest, kind)``.

    ``power`` is a power of two. ``kind`` says what has order ``rest``: "sylvester" (rest 1), "hadamard" (a constructed
    dense matrix, rest <= 256) or "cosine" (rest is the odd part of n).
    """
    if n < 1:
        raise ValueError(f"a transform needs at least one entry along the last axis, got n = {n}")
    power = n & -n
    odd = n // power
    if odd == 1:
        return n, 1, "sylvester"
    for order in (odd * 2**j for j in range(2, power.bit_length())):
        if order <= LARGEST_DENSE and hadamard_matrix(order) is not None:
            return n // order, order, "hadamard"
    return power, odd, "cosine"


@functools.cache
def hadamard_matrix(order: int) -> np.ndarray | None:
    """A matrix of ±1 (int8, read-only) with M Mᵀ = order I, or None where no construction here yields one.

    Tried in turn: Sylvester (powers of two), Paley I and II (primes), Goethals-Seidel (see ``_four_sequences``),
    doubling of order / 2. Always the same matrix; the slowest search, order 116, takes a quarter of a second, once.
    None does not mean that there is none: 188 and 236 exist, and are not reached.
    """
    if order < 1 or (order > 2 and order % 4):
        return None
    if order == 1:
        return _frozen(np.ones((1, 1)))
    constructions = () if order & (order - 1) == 0 else (_paley_one, _paley_two, _goethals_seidel)
    for construct in constructions:
        matrix = construct(order)
        if matrix is not None:
            return _frozen(matrix)
    half = hadamard_matrix(order // 2)
    return None if half is None else _frozen(np.kron([[1, 1], [1, -1]], half))


def _frozen(matrix: np.ndarray) -> np.ndarray:
    matrix = matrix.astype(np.int8)
    matrix.flags.writeable = False  # the cache hands the same array to every caller
    return matrix


def _sylvesters(power: int) -> tuple[np.ndarray, ...]:
    """Orthonormal symmetric factors of order <= 64 whose Kronecker product is the Sylvester matrix of order power."""
    bits = power.bit_length() - 1
    count = -(-bits // (_SYLVESTER.bit_length() - 1))
    orders = [2 ** ((bits + i) // count) for i in range(count)]
    return tuple(_orthonormal(order) for order in orders)


def _dense(rest: int, kind: str) -> tuple[np.ndarray, ...]:
    return (_orthonormal(rest),) if kind == "hadamard" else ()


def _orthonormal(order: int) -> np.ndarray:
    matrix = hadamard_matrix(order)
    assert matrix is not None, "factor() names constructed orders only"
    return matrix / math.sqrt(order)


def _cosine(dct, x):
    """Through the FFT: O(q log q), no matrix stored, accurate at any q (a dense one needs exact phases)."""
    wide = jnp.float32 if x.dtype.itemsize < 4 else x.dtype  # there is no Fourier transform in half precision
    return dct(x.astype(wide), norm="ortho").astype(x.dtype)


def _is_prime(p: int) -> bool:
    return p > 1 and all(p % d for d in range(2, math.isqrt(p) + 1))


def _residues(p: int) -> np.ndarray:
    """Jacobsthal matrix: the quadratic character of i - j modulo the odd prime p, zero on the diagonal."""
    character = np.full(p, -1)
    character[np.arange(p) ** 2 % p] = 1
    character[0] = 0
    index = np.arange(p)
    return character[(index[:, None] - index) % p]


def _conference(p: int, corner: int) -> np.ndarray:
    """C Cᵀ = p I: the Jacobsthal matrix bordered by ones (rows) and ``corner`` (columns)."""
    matrix = np.ones((p + 1, p + 1), int)
    matrix[1:, 1:] = _residues(p)
    matrix[1:, 0] = corner
    matrix[0, 0] = 0
    return matrix


def _paley_one(order: int) -> np.ndarray | None:
    """Order p + 1 for a prime p = 3 mod 4: identity plus a skew conference matrix."""
    p = order - 1
    if p % 4 != 3 or not _is_prime(p):
        return None
    return np.eye(order, dtype=int) + _conference(p, corner=-1)


def _paley_two(order: int) -> np.ndarray | None:
    """Order 2 (p + 1) for a prime p = 1 mod 4, from a symmetric conference matrix."""
    p = order // 2 - 1
    if p % 4 != 1 or not _is_prime(p):
        return None
    conference = np.kron(_conference(p, corner=1), [[1, 1], [1, -1]])
    return conference + np.kron(np.eye(p + 1, dtype=int), [[1, -1], [-1, -1]])


def _goethals_seidel(order: int) -> np.ndarray | None:
    """Order 4 q from four circulant matrices A, B, C, D with A Aᵀ + B Bᵀ + C Cᵀ + D Dᵀ = 4 q I."""
    q = order // 4
    sequences = _four_sequences(q) if q % 2 and q < 64 else None
    if sequences is None:
        return None
    index = np.arange(q)
    a, b, c, d = (sequence[(index[:, None] - index) % q] for sequence in sequences)
    flip = lambda matrix: matrix[:, ::-1]
    return np.block(
        [
            [a, flip(b), flip(c), flip(d)],
            [-flip(b), a, flip(d.T), -flip(c.T)],
            [-flip(c), -flip(d.T), a, flip(b.T)],
            [-flip(d), flip(c.T), -flip(b.T), a],
        ]
    )


def _four_sequences(q: int) -> np.ndarray | None:
    """Four sequences of ±1 of length q whose power spectra sum to 4 q at every frequency, or None.

    Sought among the sequences that are constant on the orbits of a multiplier group u -> g u mod q, for each g in turn
    with at most 14 orbits. (g = -1 gives the symmetric sequences of Williamson.)
    """
    for orbits in _multiplier_orbits(q):
        count = orbits.max()
        if count > 14:
            return None
        signs = 1 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
        signs = np.concatenate([np.ones((2**count, 1), int), signs], axis=1)  # the entry at 0 is 1
        found = _meet_in_the_middle(signs[:, orbits])
        if found is not None:
            return found
    return None


def _multiplier_orbits(q: int) -> list[np.ndarray]:
    """For each cyclic group of units <g>, the number of the orbit of every residue; fewest orbits first."""
    labels = set()
    for g in range(1, q):
        if math.gcd(g, q) == 1:
            powers = [pow(g, e, q) for e in range(q)]
            labels.add(tuple(min(u * power % q for power in powers) for u in range(q)))
    numbered = (np.unique(label, return_inverse=True)[1] for label in sorted(labels))
    return sorted(numbered, key=lambda orbits: orbits.max())


def _meet_in_the_middle(sequences: np.ndarray) -> np.ndarray | None:
    """Four of the sequences whose power spectra sum to 4 q, or None: one pair's sum against 4 q less the other's.

    Spectra are compared as autocorrelations, which are integers, so that equality is exact.
    """
    q = sequences.shape[1]
    power = np.abs(np.fft.fft(sequences)) ** 2
    possible = (power < 4 * q + 0.5).all(axis=1)
    sequences, power = sequences[possible], power[possible]
    correlation = np.rint(np.fft.ifft(power).real).astype(np.int64)[:, 1 : q // 2 + 1]
    hashes = correlation @ np.cumprod(np.full(q // 2, 6364136223846793005, np.int64))  # modulo 2^64
    sums = sequences.sum(axis=1) ** 2
    squares = [s * s for s in range(1, q + 1, 2)]
    for split in itertools.combinations_with_replacement(squares, 4):
        if sum(split) != 4 * q:  # the spectra at frequency zero
            continue
        first, second, third, fourth = (np.flatnonzero(sums == square) for square in split)
        outer = (hashes[first, None] + hashes[fourth]).ravel()
        inner = -(hashes[second, None] + hashes[third]).ravel()
        for value in _common(outer, inner):
            i, j = divmod(np.flatnonzero(outer == value)[0], len(fourth))
            k, l = divmod(np.flatnonzero(inner == value)[0], len(third))
            four = [first[i], second[k], third[l], fourth[j]]
            if not correlation[four].sum(axis=0).any():  # equal hashes may in principle collide
                return sequences[four]
    return None


def _common(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The values of ``a`` that are in ``b``, ascending; on millions of integers far faster than np.intersect1d."""
    a, b = np.sort(a), np.sort(b)
    return a[np.searchsorted(b, a, "left") < np.searchsorted(b, a, "right")]
