"""Codebooks: grids of 1 to 16 bits a weight, each with its scale rule, its search and its codes.

A codebook works on numbers already divided by their scale.  ``scale`` says what to divide by, one number for a whole
matrix (``group=None``) or one for every ``group`` consecutive weights of a row.  ``quantize`` puts the two together.
A quantizer of your own is any object with the members of ``Codebook``.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Key, UInt
from scipy.special import ndtri

from caldera_jax import bitshift, lattice
from caldera_jax.kernels import e8p


@runtime_checkable
class Codebook(Protocol):
    """A grid of codewords of ``block`` weights, ``code_bits`` bits each; hashable, so it can be a static argument.

    ``encode(x)`` takes [..., n] scaled weights, n a multiple of ``block``, to [..., n / block] unsigned codes of the
    nearest codewords; ``decode`` takes codes to values; ``round`` gives both from one search.  Only the dithered
    quantizer uses ``key``.  A grid with ``down = True``, ``block`` 1 and ``group`` None rounds and decodes the columns
    of [m, n], each as one (``Trellis``): its codes are packed column by column.
    """

    @property
    def block(self) -> int: ...
    @property
    def code_bits(self) -> int: ...
    @property
    def group(self) -> int | None: ...
    def scale(self, x: Array, real: Array) -> Array: ...
    def encode(self, x: Array, key: Array | None = None) -> Array: ...
    def decode(self, codes: Array, dtype=jnp.float32) -> Array: ...
    def round(self, x: Array, key: Array | None = None) -> tuple[Array, Array]: ...


class _Codes:
    """``round`` for codebooks that are written by their codes."""

    def round(self, x, key=None):
        codes = self.encode(x, key)
        return self.decode(codes, x.dtype), codes


class _Values:
    """``encode`` for codebooks whose search finds values and codes together."""

    def encode(self, x, key=None):
        return self.round(x, key)[1]


def _rms(x, real):
    return jnp.sqrt(jnp.sum(jnp.where(real, x * x, 0), axis=-1) / jnp.sum(real, axis=-1).astype(x.dtype))


@dataclass(frozen=True)
class E8P(_Values):
    """2 bits a weight: the 2^16 points of QuIP#'s lattice code in R^8 (arXiv 2402.04396), exact nearest-point search.

    Scale: RMS / ``gain``; 1.03 is the published value, with mean squared error 0.0915 on a unit Gaussian.
    """

    gain: float = 1.03
    group: int | None = None
    block: ClassVar[int] = 8
    code_bits: ClassVar[int] = 16

    def scale(self, x, real):
        return _rms(x, real) / self.gain

    def decode(self, codes, dtype=jnp.float32):
        return lattice.e8p_decode(codes, dtype)

    def round(self, x, key=None):
        return e8p.encode(x)


@dataclass(frozen=True)
class ResidualE8P(_Values):
    """4 or 3 bits a weight: E8P, then ``residual_scale`` times its error in E8P (4 bits) or in the 1-bit E8 code (3).

    Encoder and decoder use the same residual scale (the original encodes Q with 0.9 and decodes with 2.04 or 3.45).
    The two stages are searched one after the other, so the pair is not the nearest of all 2^32 (2^24) sums.
    """

    bits: int = 4
    gain: float = 1.0
    residual_scale: float = 3.45
    group: int | None = None
    block: ClassVar[int] = 8

    def __post_init__(self):
        if self.bits not in (3, 4):
            raise ValueError(f"residual E8P has 3 or 4 bits, got {self.bits}: use E8P for 2 bits, Uniform for others")

    @property
    def code_bits(self):
        return 8 * self.bits

    def scale(self, x, real):
        return _rms(x, real) / self.gain

    def decode(self, codes, dtype=jnp.float32):
        if self.bits == 4:
            second = lattice.e8p_decode((codes & 0xFFFF).astype(jnp.uint16), dtype)
        else:
            second = lattice.e8_decode((codes & 0xFF).astype(jnp.uint8), dtype)
        first = lattice.e8p_decode((codes >> (8 * (self.bits - 2))).astype(jnp.uint16), dtype)
        return first + second / self.residual_scale

    def round(self, x, key=None):
        first, high = e8p.encode(x)
        residual = self.residual_scale * (x - first)
        if self.bits == 4:
            second, low = e8p.encode(residual)
        else:
            low = lattice.e8_encode(residual)
            second = lattice.e8_decode(low, x.dtype)
        codes = high.astype(jnp.uint32) << (8 * (self.bits - 2)) | low.astype(jnp.uint32)
        return first + second / self.residual_scale, codes


@dataclass(frozen=True)
class Trellis(_Codes):
    """1 to 4 bits a weight, each weight a hash of the log2 ``states`` bits that begin with its own (``bitshift``).

    At 2 bits and 4096 states mean squared error 0.072 on a unit Gaussian, where E8P has 0.0915 and the limit is 0.0625.
    Sequences run down the columns of a matrix, which are codes of their own (``down``): LDLQ feeds back column by
    column.  Columns of fewer than about 2 log2 ``states`` weights are rounded badly.  Scale: RMS / ``gain``; None: the
    best on a unit Gaussian, or a little more.
    Differs from QTIP (arXiv 2406.11235) in: 1. a sequence is of one column, not of a tile of 16 x 16, so that feedback
    is scalar and any size goes; 2. a and b of the hash.
    """

    bits: int = 2
    states: int = 4096
    gain: float | None = None
    group: ClassVar[int | None] = None
    block: ClassVar[int] = 1
    down: ClassVar[bool] = True

    def __post_init__(self):
        if not 1 <= self.bits <= 4:
            raise ValueError(f"a trellis has 1 to 4 bits, got {self.bits}")
        if self.states not in STATES:
            raise ValueError(f"a trellis has {', '.join(map(str, STATES[:-1]))} or {STATES[-1]} states, got "
                             f"{self.states}")

    @property
    def code_bits(self):
        return self.bits

    def scale(self, x, real):
        return _rms(x, real) / (self.gain or GAINS[self.bits])

    def encode(self, x, key=None):
        def column(x):
            return bitshift.encode(x.reshape(-1, bitshift.length(len(x))), self.bits, self.states).reshape(-1)

        return lax.map(column, x.T).T

    def decode(self, codes, dtype=jnp.float32):
        apart = codes.T.reshape(codes.shape[1], -1, bitshift.length(len(codes)))
        return bitshift.decode(apart, self.bits, self.states, dtype).reshape(codes.shape[::-1]).T


STATES = tuple(2**i for i in range(8, 17))  # of a Trellis
GAINS = {1: 1.12, 2: 0.98, 3: 0.92, 4: 0.9}  # RMS of what is rounded, over that of the hash


@dataclass(frozen=True)
class Uniform(_Codes):
    """2^bits equally spaced levels on [-1, 1] times the scale: step 2 R / (2^bits - 1), as in the paper's theory.

    The scale R is the largest magnitude, or ``clip`` times the RMS: larger inputs then go to the end levels.
    """

    bits: int = 8
    clip: float | None = None
    group: int | None = None
    block: ClassVar[int] = 1

    def __post_init__(self):
        if not 1 <= self.bits <= 16:
            raise ValueError(f"a scalar grid has 1 to 16 bits, got {self.bits}")

    @property
    def code_bits(self):
        return self.bits

    def scale(self, x, real):
        if self.clip is not None:
            return self.clip * _rms(x, real)
        return jnp.max(jnp.where(real, jnp.abs(x), 0), axis=-1)

    def _position(self, x):
        """Position on the grid, 0 .. 2^bits - 1, not yet rounded."""
        top = 2**self.bits - 1
        return jnp.clip((x + 1) * (top / 2), 0, top)

    def _code_dtype(self):
        return jnp.uint8 if self.bits <= 8 else jnp.uint16

    def encode(self, x, key=None):
        return jnp.round(self._position(x)).astype(self._code_dtype())

    def decode(self, codes, dtype=jnp.float32):
        return codes.astype(dtype) * (2 / (2**self.bits - 1)) - 1


@dataclass(frozen=True)
class Dithered(Uniform):
    """The quantizer of the paper's theory: rounds up or down at random so that E round(x) = x while |x| <= R.

    Variance at most (step / 2)^2.  The key is required: the same key gives the same rounding.
    """

    def encode(self, x, key=None):
        if key is None:
            raise ValueError("Dithered rounds at random: pass a PRNG key, round(x, key) or encode(x, key)")
        position = self._position(x)
        return jnp.floor(position + jax.random.uniform(key, x.shape, x.dtype)).clip(
            0, 2**self.bits - 1).astype(self._code_dtype())


@dataclass(frozen=True)
class NormalFloat(_Codes):
    """2^bits quantiles of the normal distribution, zero among them, scaled to [-1, 1] (QLoRA, arXiv 2305.14314)."""

    bits: int = 4
    group: int | None = 64
    block: ClassVar[int] = 1

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise ValueError(f"NormalFloat has 2 to 8 bits, got {self.bits}")

    @property
    def code_bits(self):
        return self.bits

    @cached_property
    def levels(self) -> np.ndarray:
        """The grid, ascending: half of the levels below zero, one more than the rest above."""
        half = 2 ** (self.bits - 1)
        tail = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2  # mean of the two halves' outermost probabilities
        above = ndtri(np.linspace(0.5, tail, half + 1))
        below = -ndtri(np.linspace(0.5, tail, half))[1:]
        return np.sort(np.concatenate([below, above])) / above[-1]

    def scale(self, x, real):
        return jnp.max(jnp.where(real, jnp.abs(x), 0), axis=-1)

    def encode(self, x, key=None):
        middles = jnp.asarray((self.levels[1:] + self.levels[:-1]) / 2, x.dtype)
        return jnp.searchsorted(middles, x, method="scan_unrolled").astype(jnp.uint8)

    def decode(self, codes, dtype=jnp.float32):
        return jnp.asarray(self.levels, dtype)[codes.astype(jnp.int32)]


@dataclass(frozen=True)
class Half(_Codes):
    """16 bits, really rounded to float16 or bfloat16; in units of the RMS, so that float16 does not overflow."""

    format: str = "float16"
    group: int | None = None
    block: ClassVar[int] = 1
    code_bits: ClassVar[int] = 16

    def __post_init__(self):
        if self.format not in ("float16", "bfloat16"):
            raise ValueError(f"a 16-bit factor is 'float16' or 'bfloat16', got {self.format!r}")

    def scale(self, x, real):
        return _rms(x, real)

    def encode(self, x, key=None):
        return lax.bitcast_convert_type(x.astype(self.format), jnp.uint16)

    def decode(self, codes, dtype=jnp.float32):
        return lax.bitcast_convert_type(codes.astype(jnp.uint16), jnp.dtype(self.format)).astype(dtype)


def by_bits(name: str, bits: int) -> Codebook:
    """The codebook of a family with that many bits a weight.

    ``e8p``: lattice at 2, 3 and 4 bits, scalar at 8, float16 at 16.  ``uniform``, ``dithered``: 1 to 16 bits.
    ``nf``: 2 to 8.  ``trellis``: 1 to 4.  Raises ValueError for a family or a number of bits that is not offered.
    """
    families = {
        "e8p": {2: E8P(), 3: ResidualE8P(3, gain=0.98, residual_scale=2.04), 4: ResidualE8P(4), 8: Uniform(8),
                16: Half()},
        "uniform": {b: Uniform(b) for b in range(1, 17)},
        "dithered": {b: Dithered(b) for b in range(1, 17)},
        "nf": {b: NormalFloat(b) for b in range(2, 9)},
        "trellis": {b: Trellis(b) for b in range(1, 5)},
    }
    if name not in families:
        raise ValueError(f"unknown quantizer {name!r}: choose from {', '.join(families)}, or pass a Codebook")
    if bits not in families[name]:
        raise ValueError(f"{name} is not offered at {bits} bits: choose from {', '.join(map(str, families[name]))}")
    return families[name][bits]


class Quantized(NamedTuple):
    """A matrix on a grid: its values, the codes that stand for them, and the scales that both share."""

    values: Float[Array, "m n"]
    codes: UInt[Array, "m codes"]
    scale: Float[Array, "rows groups"]


def down(grid: object) -> bool:
    """Whether the codes of a grid run down the columns."""
    return getattr(grid, "down", False)


def fit_scale(codebook: Codebook, x: Float[Array, "m n"]) -> Float[Array, "rows groups"]:
    """Scales of a matrix: [1, 1], or [m, ceil(n / group)] per group.  A group of zeros gets a negligible scale."""
    if codebook.group is None:
        scale = codebook.scale(x.reshape(1, 1, -1), jnp.ones((1, 1, x.size), bool))
    else:
        m, n = x.shape
        groups = -(-n // codebook.group)
        padded = jnp.pad(x, ((0, 0), (0, groups * codebook.group - n))).reshape(m, groups, codebook.group)
        real = (jnp.arange(groups * codebook.group) < n).reshape(1, groups, codebook.group)
        scale = codebook.scale(padded, jnp.broadcast_to(real, padded.shape))
    floor = float(jnp.finfo(scale.dtype).tiny) ** 0.8  # grids without a zero still round a zero matrix to one of
    return jnp.maximum(scale, floor)  # zero energy: the square of the floor is 0


def spread(codebook: Codebook, scale: Float[Array, "rows groups"], n: int) -> Float[Array, "rows columns"]:
    """Scales as they multiply a matrix of n columns: [1, 1] per matrix, [m, n] per group."""
    return scale if codebook.group is None else jnp.repeat(scale, codebook.group, axis=1)[:, :n]


def pad_columns(x: Float[Array, "m n"], multiple: int) -> Float[Array, "m padded"]:
    """Zero columns up to a multiple of ``multiple``."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple)))


def quantize(codebook: Codebook, x: Float[Array, "m n"], key: Key[Array, ""] | None = None) -> Quantized:
    """Each block of a row to the nearest point of the grid fitted to x; any width (the last code may cover padding)."""
    n = x.shape[1]
    scale = fit_scale(codebook, x)
    values, codes = codebook.round(pad_columns(x / spread(codebook, scale, n), codebook.block), key)
    return Quantized(values[:, :n] * spread(codebook, scale, n), codes, scale)


def dequantize(codebook: Codebook, codes: UInt[Array, "m codes"], scale: Float[Array, "rows groups"],
               n: int) -> Float[Array, "m n"]:
    """The matrix of n columns that the codes stand for, in the dtype of ``scale``."""
    return codebook.decode(codes, scale.dtype)[:, :n] * spread(codebook, scale, n)


@cache
def rounding_error(grid: Codebook) -> float:
    """c: mean squared error a weight of a grid, fitted as to a layer, on a fixed sample of unit Gaussian numbers."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((256, 1024)), jnp.float32)
    return float(jnp.mean((_quantize(grid, x, jax.random.key(0)).values - x) ** 2))


_quantize = jax.jit(quantize, static_argnums=0)
