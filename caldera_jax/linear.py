"""A compressed linear layer, its exact size, and the one place where a product with a weight is dispatched."""

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int, Int8

from caldera_jax import bitshift, hessian, incoherence, kernels, levels
from caldera_jax.codebooks import E8P, Codebook, Quantized, ResidualE8P, Trellis, dequantize, down, quantize
from caldera_jax.decompose import CalderaConfig, Decomposition, Trace, caldera
from caldera_jax.incoherence import Rotation
from caldera_jax.kernels import integers
from caldera_jax.kernels.matmul import Columns, Packed, Rows, multiply
from caldera_jax.levels import Integers, LevelConfig, Levelled
from caldera_jax.packing import pack as pack_codes
from caldera_jax.packing import pack_signs, unpack, unpack_signs

Grid = Codebook | Integers
PLAIN = LevelConfig()


class Bytes(NamedTuple):
    """Q = diag(a) Z diag(b) as it is multiplied fastest: Z in bytes.  Behind its n columns some stand again, those of
    ``again``: an integer beyond 8 bits is the sum of its copies."""

    integers: Int8[Array | np.ndarray, "m _"]
    again: Int[Array | np.ndarray, " e"]
    a: Float[Array | np.ndarray, " m"]
    b: Float[Array | np.ndarray, " n"]


@no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressedLinear:
    """W [m, n] ≈ Uᵀ (Q + L R) V, everything packed; a pytree whose leaves are all that must be stored.

    q: rows of Q, or its columns (``codebooks.down``).  left_t: rows of Lᵀ [k − r, m].  right: rows of R [k − r, n].  A
    part that is off is None.  A part of free rate is ``Levelled``, of the whole L then, and kept as integers of 8 bits
    (16, 32 where one is larger); what is stored of it is what ``levels.encode`` makes of it.  ``Bytes`` (``in_bytes``)
    is for products alone.
    left_side, right_side: the rotations U of the outputs and V of the inputs: packed sign bits (randomized Hadamard),
    trained reals in their place, a tuple of orthogonal factors, or the empty tuple for none.
    trained: the first r rows of Lᵀ [r, m] and of R [r, n] as numbers, once they are trained; None before.
    """

    q: Packed | Levelled | Bytes | None
    left_t: Packed | Levelled | None
    right: Packed | Levelled | None
    left_side: Array | tuple[Array, ...]
    right_side: Array | tuple[Array, ...]
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    grids: tuple[Grid | None, Grid, Grid] = dataclasses.field(metadata={"static": True})
    trained: tuple[Array, Array] | None = None

    @property
    def rank(self) -> int:
        """k of L R."""
        own = 0 if self.right is None else len(codes(self.right))
        return own + (0 if self.trained is None else len(self.trained[1]))

    @property
    def stored_bits(self) -> int:
        """Every bit that must be kept: codes with their padding, scales, and signs or orthogonal factors.

        What is of free rate is coded to be counted: seconds for ten million weights, and no tracing.
        """
        return sum(self.bits_of_parts())

    def bits_of_parts(self) -> tuple[int, ...]:
        """Stored bits of Q, Lᵀ, R, the rotation and what is trained."""
        parts = zip(self.grids, (self.q, self.left_t, self.right), strict=True)
        coded = (levels.encode(part, grid.states).stored_bits if isinstance(part, Levelled) else size(part)
                 for grid, part in parts)
        return *coded, size((self.left_side, self.right_side)), size(self.trained)

    @property
    def dtype(self):
        """The dtype of the scales, and so of ``dense()``."""
        part = self.q or self.right
        if part is None:
            return jnp.promote_types(self.trained[0].dtype, jnp.float32)
        return (part.level if isinstance(part, Levelled) else part.a if isinstance(part, Bytes) else part.scale).dtype

    def rotated(self) -> tuple[Array | None, Array | None, Array | None]:
        """Q [m, n], L [m, k], R [k, n] decoded, in the rotated basis; None for a part that is off."""
        q, right = (_decode(grid, part, *self.shape[::-1]) for grid, part in
                    ((self.grids[0], self.q), (self.grids[2], self.right)))
        factors = [[part.astype(self.dtype) for part in (first, rest) if part is not None]
                   for first, rest in zip(self.trained or (None, None), (_left_t(self), right), strict=True)]
        if not self.rank:
            return q, None, None
        left_t, right = map(jnp.concatenate, factors)
        return q, left_t.T, right

    def sides(self, dtype) -> Rotation:
        """U and V as ``incoherence`` takes them."""
        sides = jax.tree.map(jnp.asarray, (self.left_side, self.right_side))  # NumPy leaves are welcome
        packed = lambda side: not isinstance(side, tuple) and side.dtype == jnp.uint8
        return Rotation(*(unpack_signs(side, size, dtype) if packed(side) else side
                          for side, size in zip(sides, self.shape, strict=True)))

    def dense(self) -> Float[Array, "m n"]:
        """The matrix in the caller's basis and units."""
        q, left, right = self.rotated()
        low_rank = jnp.zeros(self.shape, self.dtype) if left is None else left @ right
        return incoherence.undo(self.sides(self.dtype), low_rank if q is None else q + low_rank)


def q_alone(weight: CompressedLinear) -> CompressedLinear:
    """The weight without its L R."""
    return dataclasses.replace(weight, left_t=None, right=None, trained=None)


@jax.jit
@jax.default_matmul_precision("highest")
def low_rank(weight: CompressedLinear) -> tuple[Float[Array, "m k"], Float[Array, "k n"]]:
    """Its L and R in the caller's basis, Uᵀ L and R V; of a weight that has some."""
    sides, (_, left, right) = weight.sides(weight.dtype), dataclasses.replace(weight, q=None).rotated()
    return incoherence.backward(sides.left, left.T).T, incoherence.backward(sides.right, right)


def dense(weight: Array | np.ndarray | CompressedLinear) -> Array | np.ndarray:
    """The matrix of a weight: that of a compressed one in a compiled program, any other as it is."""
    return _dense(weight) if isinstance(weight, CompressedLinear) else weight


@jax.jit
@jax.default_matmul_precision("highest")
def _dense(weight):
    return weight.dense()


def codes(part: Packed | Levelled) -> Array | np.ndarray:
    """Those of a part, a row for each of its rows, or for each column of a trellis."""
    return part.integers if isinstance(part, Levelled) else part.codes


def _left_t(weight):
    """Rows of Lᵀ; a levelled L stands the other way round."""
    found = _decode(weight.grids[1], weight.left_t, weight.shape[0])
    return found.T if isinstance(weight.left_t, Levelled) else found


def size(tree) -> int:
    """Bits of all arrays in it."""
    return sum(8 * math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _decode(grid, part, width, height=None):
    """Rows of a part; ``height``: how many, of one whose codes run down the columns."""
    if part is None:
        return None
    if isinstance(part, Levelled):
        return part.dense(part.level.dtype)
    count = height if down(grid) else -(-width // grid.block)
    found = unpack(jnp.asarray(part.codes), grid.code_bits, count)
    return dequantize(grid, found.T if down(grid) else found, jnp.asarray(part.scale), width)


def apply(weight: Array | np.ndarray | CompressedLinear,
          x: Float[Array | np.ndarray, "*batch n"]) -> Float[Array, "*batch m"]:
    """x @ weightᵀ in the dtype of x, for a dense [m, n] array or a compressed weight.

    A compressed weight is never put together: x is rotated, multiplied by Q and, beside it, by R and L, and rotated
    back.  Q is decoded a few rows at a time, and again for a gradient (``kernels.matmul``); of a levelled Q the
    integers alone, which meet b x, and a multiplies what comes out.
    Raises ValueError where the last axis of x is not n.
    """
    x, (m, n) = jnp.asarray(x), weight.shape
    if x.shape[-1] != n:
        raise ValueError(f"the weight is [{m}, {n}], so x needs a last axis of {n}; got shape {x.shape}")
    if not x.size:
        return jnp.zeros((*x.shape[:-1], m), x.dtype)
    rows = x.reshape(-1, n)
    if not isinstance(weight, CompressedLinear):
        w = jnp.asarray(weight)
        in_pieces = len(rows) <= 64 and (x.dtype, w.dtype) == (jnp.float32, jnp.bfloat16) and kernels.on_cpu()
        return (_in_pieces if in_pieces else _widened)(rows, w).reshape(*x.shape[:-1], m)
    sides, stages = weight.sides(x.dtype), tuple(_stages(grid) for grid in weight.grids)
    left_t, right = (weight.left_t if stages[1] else _left_t(weight),
                     weight.right if stages[2] else _decode(weight.grids[2], weight.right, n))
    rotated = incoherence.forward(sides.right, rows)
    if isinstance(weight.q, Bytes):
        y = _by_bytes(rotated, weight.q)
    elif isinstance(weight.q, Levelled):
        a, b = weight.q.scales(jnp.float32 if x.dtype.itemsize < 4 else x.dtype)
        size = jnp.exp(jnp.mean(jnp.log(a)))  # beside b, so that sums of integers stay in the range of half precision
        z = Rows((weight.q.integers,), lambda tile: tile)
        y = multiply(rotated * (b * size).astype(x.dtype)[None], (z, None, None), stages, m)
        y = y * (a / size).astype(x.dtype)[None]
        y = y if right is None else y + multiply(rotated, (None, left_t, right), stages, m)
    else:
        q = weight.q if stages[0] or weight.q is None else _tiles(weight.grids[0], weight.q, m, n)
        y = multiply(rotated, (q, left_t, right), stages, m)
    if weight.trained is not None:
        left_t, right = (jnp.asarray(factor).astype(x.dtype) for factor in weight.trained)
        y = y + rotated @ right.T @ left_t
    return incoherence.backward(sides.left, y).reshape(*x.shape[:-1], m)


def _widened(x, w):
    """x Wᵀ, and not by x Wᵀ: for few rows of x XLA on a CPU transposes W first."""
    return (w.astype(x.dtype) @ x.T).T


@jax.custom_jvp
def _in_pieces(x, w):
    """``_widened`` in float32 for W in bfloat16 and x in its range, as close.

    For few rows XLA on a CPU spends ten times as long on widening W as on the product.  So x is split into three
    numbers of bfloat16 each, and W is read as it is.
    """
    pieces, rest = [], x
    for _ in range(3):
        pieces.append(rest.astype(w.dtype))
        rest = rest - pieces[-1].astype(x.dtype)
    y = lax.dot_general(jnp.concatenate(pieces), w, (((1,), (1,)), ((), ())), preferred_element_type=x.dtype)
    first, second, third = y.reshape(3, len(x), len(w))
    return first + (second + third)


@_in_pieces.defjvp
def _(primals, tangents):
    """A piece has no derivative, their sum has."""
    return _in_pieces(*primals), jax.jvp(_widened, primals, tangents)[1]


def _by_bytes(x, q):
    """x Qᵀ: by products of integers on a CPU, elsewhere, and in double precision, as rows that are widened."""
    by_integers, q = kernels.on_cpu() and x.dtype.itemsize <= 4, Bytes(*map(jnp.asarray, q))
    kind = jnp.dtype(jnp.float32) if by_integers else x.dtype
    scaled = x.astype(kind) * q.b.astype(kind)[None]
    scaled = jnp.concatenate([scaled, scaled[:, q.again]], axis=1)
    z = Rows((q.integers,), lambda tile: tile)
    y = integers.multiply(scaled, q.integers) if by_integers else multiply(
        scaled, (z, None, None), (None,) * 3, len(q.a))
    return (y * q.a.astype(kind)[None]).astype(x.dtype)


def in_bytes(weight: Array | np.ndarray | CompressedLinear) -> Array | np.ndarray | CompressedLinear:
    """The same weight with Q in ``Bytes`` and L R as numbers, where Q is one of integers: levelled, or E8P at 2 bits
    with one scale, whose entries are quarters.  Any other weight as it is, and one that would take more than two bytes
    an integer.  Host function.

    No gradient passes a product with it, and it has no ``dense`` and no ``stored_bits``.
    """
    if not isinstance(weight, CompressedLinear):
        return weight
    if isinstance(q := weight.q, Levelled):
        z, dtype = np.asarray(q.integers), np.dtype(q.level.dtype)
        a, b = (np.exp2(np.asarray(side, dtype) / 8, dtype=dtype) for side in (q.row, q.column))
        a *= np.asarray(q.level)
        _, left, right = _rotated(dataclasses.replace(weight, q=None)) if weight.rank else (None,) * 3
    elif isinstance(q, Packed) and _stages(weight.grids[0]) == (1.0,):
        (found, left, right), scale, (m, n) = _rotated(weight), np.asarray(q.scale), weight.shape
        z = np.rint(4 * np.asarray(found) / np.where(scale == 0, 1, scale)).astype(np.int8)
        a, b = np.full(m, scale.item() / 4, scale.dtype), np.ones(n, scale.dtype)
    else:
        return weight
    most = np.maximum(z.max(axis=0, initial=0).astype(int), -z.min(axis=0, initial=0).astype(int))
    if (copies := np.maximum(most - 1, 0) // 127).sum() > z.shape[1]:
        return weight
    again = np.repeat(np.arange(z.shape[1]), copies)
    first = np.clip(z, -127, 127).astype(np.int8)
    rest = z[:, again].astype(np.int32) - first[:, again]
    beyond = 127 * (np.arange(len(again)) - np.searchsorted(again, again))  # what the copies before hold
    more = np.sign(rest) * np.clip(np.abs(rest) - beyond, 0, 127)
    both = np.concatenate([first, more.astype(np.int8)], axis=1)
    return dataclasses.replace(
        weight, q=Bytes(both, again.astype(np.int32), a, b),
        left_t=None, right=None, trained=None if left is None else (left.T, right))


_rotated = jax.jit(lambda weight: weight.rotated())


def bytewise(weight: Array | np.ndarray | CompressedLinear) -> bool:
    """Whether it is one in ``Bytes``."""
    return isinstance(weight, CompressedLinear) and isinstance(weight.q, Bytes)


def alike(layers: Sequence[Array | np.ndarray | CompressedLinear]) -> list[Array | np.ndarray | CompressedLinear]:
    """The same weights, those in ``Bytes`` with equally many columns and a rank that is a power of two: few programs
    run all of them.  Host function."""
    most = max((len(w.q.again) for w in layers if bytewise(w)), default=0)

    def widened(weight):
        q, more = weight.q, most - len(weight.q.again)
        rank = 1 << (weight.rank - 1).bit_length() if weight.rank else 0
        return dataclasses.replace(
            weight, q=q._replace(integers=np.pad(q.integers, ((0, 0), (0, more))), again=np.pad(q.again, (0, more))),
            trained=weight.trained and tuple(np.pad(part, ((0, rank - len(part)), (0, 0))) for part in weight.trained))

    return [widened(w) if bytewise(w) else w for w in layers]


def rows(weight: Array | np.ndarray | CompressedLinear, places: Int[Array | np.ndarray, "*batch"]
         ) -> Float[Array, "*batch n"]:
    """Those rows of the matrix, at their cost: an embedding's.  NaN for a place without one.

    Raises ValueError for a compressed weight with a rotation or L R, whose rows are made of more than their own codes.
    """
    m, n = weight.shape
    places = jnp.asarray(places)
    if not places.size:
        return jnp.zeros((*places.shape, n), weight.dtype)
    at = jnp.clip(places.reshape(-1), 0, m - 1)
    if not isinstance(weight, CompressedLinear):
        found = jnp.asarray(weight)[at]
    elif (weight.q is None or weight.rank or jax.tree.leaves((weight.left_side, weight.right_side))
          or down(weight.grids[0])):
        raise ValueError("single rows are read of a weight that is Q alone, its rows coded by themselves, without "
                         "rotation: this one has more")
    elif isinstance(q := weight.q, Bytes):
        q = Bytes(*map(jnp.asarray, q))
        z = q.integers[at].astype(q.a.dtype)
        found = q.a[at][:, None] * z[:, :n].at[:, q.again].add(z[:, n:]) * q.b[None]
    elif isinstance(q, Levelled):
        a, b = q.scales(weight.dtype)
        found = a[at][:, None] * jnp.asarray(q.integers)[at].astype(a.dtype) * b[None]
    else:
        scale = q.scale if weight.grids[0].group is None else jnp.asarray(q.scale)[at]
        found = _decode(weight.grids[0], Packed(jnp.asarray(q.codes)[at], scale), n)
    inside = (places >= 0) & (places < m)
    return jnp.where(inside[..., None], found.reshape(*places.shape, n), jnp.nan)


def _tiles(grid, part, m, n):
    """Q on any grid, to be decoded where it is multiplied."""
    if down(grid):
        return _columns(grid, part, m)
    decode = lambda codes, scale=part.scale: _decode(grid, Packed(codes, scale), n)
    return Rows((part.codes,) if grid.group is None else tuple(part), decode)


def _columns(grid, part, m):
    """``_tiles`` of a grid that runs down the columns; a trellis' numbers as they come out of whole bytes."""
    t, scale = bitshift.length(m), jnp.asarray(part.scale)
    if type(grid) is Trellis and (period := bitshift.period(t, grid.bits)):
        in_units = lambda codes: bitshift.apart(codes.reshape(len(codes), m // t, -1), grid.bits, grid.states)
        decode = lambda codes: jnp.concatenate([one.reshape(len(codes), -1) for one in in_units(codes)], axis=1)
        return Columns((part.codes,), decode, scale * jnp.asarray(bitshift.UNIT, scale.dtype), period)
    return Columns((part.codes,), lambda codes: _decode(grid, Packed(codes, jnp.ones_like(scale)), len(codes), m).T,
                   scale)


def _stages(grid: Grid | None) -> tuple[float, ...] | None:
    """The weights of the E8P codewords that a code is the sum of, as ``kernels.matmul`` decodes them; None: another."""
    if type(grid) is E8P and grid.group is None:  # a subclass may decode in its own way
        return (1.0,)
    if type(grid) is ResidualE8P and grid.bits == 4 and grid.group is None:
        return (1.0, 1 / grid.residual_scale)
    return None


def pack(decomposition: Decomposition, rotation: Rotation, config: CalderaConfig, scale: Float[Array, ""],
         outputs: Float[Array, " m"] | None = None) -> CompressedLinear:
    """Store a decomposition of the rotated U diag(1 / outputs) W Vᵀ / scale; the scale goes into the scales of Q and of
    L, and ``outputs``, in float16, beside the signs of U."""
    q, low_rank = decomposition.q, decomposition.low_rank
    grids = (config.q_grid, *config.factor_grids)

    def packed(part: Quantized | None, grid, unit):
        if part is None:
            return None
        return Packed(pack_codes(part.codes.T if down(grid) else part.codes, grid.code_bits), part.scale * unit)

    left_t, right = (None, None) if low_rank is None else low_rank
    one = jnp.ones((), scale.dtype)
    m, n = (left_t.values.shape[1], right.values.shape[1]) if q is None else q.values.shape
    sides = [pack_signs(side) if isinstance(side, jax.Array) else side for side in rotation]
    if outputs is not None:
        sides[0] = outputs * rotation.left.astype(outputs.dtype)
    return CompressedLinear(packed(q, grids[0], scale), packed(left_t, grids[1], scale), packed(right, grids[2], one),
                            *sides, (m, n), grids)


def compress_matrix(key: Array, w: Float[Array | np.ndarray, "m n"], h: Float[Array | np.ndarray, "n n"],
                    config: CalderaConfig, name: str = "the matrix", g: Float[Array | np.ndarray, " m"] | None = None
                    ) -> tuple[CompressedLinear, Trace]:
    """Compress one W [m, n] for inputs of second moment h [n, n]: normalise, rotate, factor, ``caldera``, pack.

    ``g``: the importance of each output, of any size, which the paper does not know: the loss is then Σ g_i e_i H e_iᵀ.
    W's rows are scaled by s_i before all else, s_i² = √g_i / ‖W_i‖, and back in the end, by numbers of 16 bits in place
    of the left rotation's signs: the best scales for a Q whose noise the rotation spreads over all rows alike
    (theory/row_scales.py).  L R is found, and the Trace scored, with s_i² in place of g_i.

    ``h`` is symmetric positive semidefinite, in any units, not rotated.  One compilation per shape, dtype and config.
    Returns the layer and its Trace, whose errors are against h itself.  Rows of w that are spread over devices
    (``shard_rows``) stay so.
    Raises ValueError (naming ``name``) for shapes that do not fit, rank > min(m, n), NaN or infinities in w or h, an h
    that no damping makes positive definite, a g below 0 or without the Hadamard rotation.
    """
    w, h, rows = checked(w, h, config.rank, name)
    if g is not None:
        if config.rotation != "hadamard":
            raise ValueError(f"{name}: rows are scaled for a rotation that spreads what Q loses over all alike, and "
                             f"stored in place of its signs: use rotation='hadamard', got {config.rotation!r}")
        g = np.asarray(g, np.float64)
        g = of_outputs(g / (np.max(g, initial=0) or 1), w, name)  # of any size, also in float32
    compressed, trace = _compress(key, w, h, config, rows, g)
    if not bool(trace.finite):
        raise ValueError(f"{name}: no damping up to 1000 x the mean diagonal makes the Hessian positive definite, or "
                         "the iteration overflowed: check that h is symmetric positive semidefinite")
    return compressed, trace


def level(w: Float[Array | np.ndarray, "m n"], h: Float[Array | np.ndarray, "n n"], g: Float[Array | np.ndarray, " m"],
          c: float, config: LevelConfig = PLAIN, name: str = "the matrix") -> CompressedLinear:
    """W ≈ diag(a) Z diag(b) + L R at level c, free rate: small Σ_i g_i e_i H e_iᵀ + λ c² bits (``levels.decompose``).

    ``h`` as for ``compress_matrix``, ``g`` the importance of each output; c in the square root of the units of their
    product with W², so that one c is one level for all layers of a model.  Where g_i is 0 row i is 0.
    Raises ValueError (naming ``name``) for shapes that do not fit, NaN, infinities or g < 0, a level that is not
    positive or too fine, rank > min(m, n), or an h that no damping makes positive definite.
    """
    return packed(*at_level(w, h, g, c, config, name)[:3], config)


def packed(q: Levelled, left: Levelled | None, right: Levelled | None, config: LevelConfig) -> CompressedLinear:
    """The layer that ``at_level`` found."""
    parts = (part and levels.narrow(part) for part in (q, left, right))
    return CompressedLinear(*parts, (), (), q.integers.shape, (Integers(config.states),) * 3)


def at_level(w: Float[Array | np.ndarray, "m n"], h: Float[Array | np.ndarray, "n n"],
             g: Float[Array | np.ndarray, " m"], c: float, config: LevelConfig, name: str = "the matrix",
             rows: Int[np.ndarray, " r"] | None = None) -> tuple[Levelled, Levelled | None, Levelled | None, float]:
    """Z, L and R of ``levels.decompose``, Z of these rows alone, and the damping used; raises as ``level``."""
    w, h, _ = checked(w, h, config.rank, name)
    g = of_outputs(g, w, name)
    if not 0 < c < math.inf:
        raise ValueError(f"{name}: the level must be positive and finite, got {c}")
    *parts, damping, finite = _at_level(w, h, g, jnp.asarray(c, w.dtype), config, rows)
    if not bool(finite):
        raise ValueError(f"{name}: no damping up to 1000 x the mean diagonal makes the Hessian positive definite: "
                         "check that h is symmetric positive semidefinite")
    most = max(int(jnp.max(jnp.abs(part.integers.astype(w.dtype)), initial=0)) for part in parts if part is not None)
    if most >= min(1 / float(jnp.finfo(w.dtype).eps), 2**30):  # beyond it a number has no parity
        raise ValueError(f"{name}: the level {c} is too fine for {w.dtype}: an integer would be {most}; raise it")
    return *parts, float(damping)


def of_outputs(g, w, name: str) -> Float[Array, " m"]:
    """The importance of the outputs of W in its dtype; ValueError where it is none."""
    g = jnp.asarray(g, w.dtype)
    if g.shape != w.shape[:1] or not bool(jnp.all(jnp.isfinite(g) & (g >= 0))):
        raise ValueError(f"{name}: the importance of its outputs must be {w.shape[0]} finite numbers >= 0, got "
                         f"{g.shape} from {float(jnp.min(g, initial=0)):g} to {float(jnp.max(g, initial=0)):g}: do the "
                         "gradients overflow?")
    return g


@partial(jax.jit, static_argnums=4)
@jax.default_matmul_precision("highest")
def _at_level(w, h, g, c, config, rows):
    *parts, factors = levels.decompose(w, h, g, c, config, rows)
    return *parts, factors.damping, factors.finite


def rounded(w: Float[Array | np.ndarray, "m n"], grid: Codebook) -> CompressedLinear:
    """W on a grid whose rows have scales of their own (``group``), to the nearest, without Hessian or rotation: an
    embedding.  Some rows at a time.  ValueError for a grid without groups."""
    if grid.group is None:
        raise ValueError(f"rows are rounded one by one, and {grid} has one scale for all: give it a group")
    step = max(1, 2**22 // w.shape[1])
    parts = [_rounded(grid, jnp.asarray(w[i:i + step])) for i in range(0, len(w), step)]
    return CompressedLinear(Packed(*map(jnp.concatenate, zip(*parts, strict=True))), None, None, (), (), w.shape,
                            (grid,) * 3)


@partial(jax.jit, static_argnums=0)
def _rounded(grid, w):
    found = quantize(grid, w.astype(jnp.promote_types(w.dtype, jnp.float32)))
    return pack_codes(found.codes, grid.code_bits), found.scale


def checked(w, h, rank: int, name: str):
    """W and H of one dtype, and how the rows of W are spread over devices; ValueError as in ``compress_matrix``."""
    w, h = jnp.asarray(w), jnp.asarray(h)
    if w.ndim != 2 or h.shape != (w.shape[1],) * 2:
        raise ValueError(f"{name}: need w [m, n] and h [n, n]; got {w.shape} and {h.shape}")
    if rank > min(w.shape):
        raise ValueError(f"{name}: rank {rank} exceeds min(m, n) = {min(w.shape)}: choose a lower rank")
    for what, array in (("weight", w), ("Hessian", h)):
        if not bool(jnp.all(jnp.isfinite(array))):
            raise ValueError(f"{name}: the {what} holds NaN or infinite values: check the file or the calibration text")
    dtype = w.dtype if w.dtype in (jnp.float32, jnp.float64) else jnp.dtype(jnp.float32)
    w, h, rows = w.astype(dtype), h.astype(dtype), None
    if isinstance(w.sharding, NamedSharding) and not w.sharding.is_fully_replicated:
        w, h = shard_rows(w, h, list(w.sharding.mesh.devices.flat))  # by rows, on a mesh whose axes are not explicit
        rows = w.sharding
    return w, h, rows


def shard_rows(w: Float[Array | np.ndarray, "m n"], h: Float[Array | np.ndarray, "n n"],
               devices: Sequence[jax.Device] | None = None) -> tuple[Float[Array, "m n"], Float[Array, "n n"]]:
    """w with its rows spread over the devices and h on each of them, for ``compress_matrix`` to work on in parallel.

    Rows of W are independent given H: block LDLQ then needs no communication but one scale (on a trellis more), and L R
    sums of [k, n] and [k, m] an iteration.  What depends on H alone is done on every device, and so is the exact SVD,
    for which every device holds all of A H^½ (svd="randomized" has no such part).  Uses as many of the devices
    (default: all) as divide
    m.  Sums in another order round otherwise: the error agrees within 0.5 %, not the bytes.
    """
    devices = jax.devices() if devices is None else devices
    count = max(d for d in range(1, len(devices) + 1) if w.shape[0] % d == 0)
    mesh = Mesh(np.array(devices[:count]), ("rows",))
    return jax.device_put(w, NamedSharding(mesh, P("rows", None))), jax.device_put(h, NamedSharding(mesh, P()))


def row_scales(g: Float[Array, " m"], energy: Float[Array, " m"]) -> Float[Array, " m"]:
    """s_i² = √(g_i / energy_i) in units of their means, either of which counts as at least 10⁻⁶ of its own."""
    floored = lambda a: jnp.maximum(a / jnp.where(jnp.mean(a) > 0, jnp.mean(a), 1), 1e-6)
    return jnp.sqrt(floored(g) / floored(energy))


@partial(jax.jit, static_argnums=(3, 4))
@jax.default_matmul_precision("highest")
def _compress(key, w, h, config, rows=None, g=None):
    with kernels.use("jax" if rows is not None else kernels.mode()):  # kernels are closed to automatic sharding
        return _pipeline(key, w, h, config, rows, g)


def _pipeline(key, w, h, config, rows, g):
    rotate_key, key = jax.random.split(key)
    outputs = None
    if g is not None:
        outputs = 1 / jnp.sqrt(row_scales(g, jnp.mean((w / _peak(w)) ** 2, axis=1)))
        outputs = outputs.astype(jnp.float16)
        w = w / outputs.astype(w.dtype)[:, None]
    peak = _peak(w)
    scale = peak * jnp.maximum(jnp.sqrt(jnp.mean((w / peak) ** 2)), 1e-6)  # no square leaves the range of the dtype
    rotated, h, rotation = incoherence.rotate(rotate_key, w / scale, h, config.rotation)
    if rows is not None:  # the rotation of the outputs mixes rows: spread them again
        rotated = lax.with_sharding_constraint(rotated, rows)
    decomposition, trace = caldera(key, rotated, hessian.factor(h, config.damping, config.block), config)
    return pack(decomposition, rotation, config, scale, outputs), trace


def _peak(w):
    """The largest magnitude, and no zero."""
    return jnp.maximum(jnp.max(jnp.abs(w)), 1e-30)
