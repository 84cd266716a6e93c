"""CALDERA, Algorithm 1 of arXiv 2405.18886: W ≈ Q + LR by alternating LDLQ and LPLRFactorize."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Key

from caldera_jax import hessian
from caldera_jax.codebooks import Codebook, Quantized, by_bits, down, quantize
from caldera_jax.hessian import HessianFactors
from caldera_jax.ldlq import ldlq
from caldera_jax.lplr import LowRank, better, empty, lplr_factorize
from caldera_jax.objective import ratio


@dataclass(frozen=True)
class CalderaConfig:
    """Every choice of the method; hashable, so that one configuration and one shape compile once.

    rank: k of L R; 0 for Q alone.  q_bits: 2, 3 or 4 for the lattice; 0 for L R alone.
    factor_bits: of L and R, or (left, right); 2, 3, 4 lattice, 8 scalar, 16 float16.
    quantizer, factor_quantizer: a family by name (e8p, uniform, dithered, nf; trellis, of Q alone) or a Codebook,
        which then sets the bits.
    draft: another family (with ``q_bits``) or Codebook for Q in all rounds but the last, which has Q on its own grid,
        beside their best L R, and L R once more.  A trellis in all rounds takes long.  Of no meaning without Q or L R.
    outer_iterations, inner_iterations: all run, and the best half step is kept.
    order: "lr-first" as in the authors' scripts, or "q-first" as printed.
    downdate: the paper's Hessian update, Q ignores the directions that LR repairs.
    refine_passes: coordinate descent passes after each LDLQ (the original: 10).
    svd: "exact" or "randomized".  rotation: "hadamard", "orthogonal" or "none".
    damping: added to H in units of its mean diagonal; serves the optimization only.
    factor_rounding: of L and R, to the "nearest" as in the paper, or with "feedback" (``lplr_factorize``).
    q_metric, lr_metric: "data" minimises the error on X; "plain" forgets X in that half step.
    """

    rank: int = 64
    q_bits: int = 2
    factor_bits: int | tuple[int, int] = 4
    quantizer: str | Codebook = "e8p"
    factor_quantizer: str | Codebook = "e8p"
    outer_iterations: int = 15
    inner_iterations: int = 10
    order: Literal["lr-first", "q-first"] = "lr-first"
    downdate: bool = False
    refine_passes: int = 0
    svd: Literal["exact", "randomized"] = "exact"
    rotation: Literal["hadamard", "orthogonal", "none"] = "hadamard"
    damping: float = 0.01
    q_metric: Literal["data", "plain"] = "data"
    lr_metric: Literal["data", "plain"] = "data"
    factor_rounding: Literal["nearest", "feedback"] = field(default="nearest", metadata={"later": True})
    draft: str | Codebook | None = field(default=None, metadata={"later": True})

    def __post_init__(self):
        _one_of("order", self.order, ("lr-first", "q-first"))
        _one_of("svd", self.svd, ("exact", "randomized"))
        _one_of("rotation", self.rotation, ("hadamard", "orthogonal", "none"))
        _one_of("q_metric", self.q_metric, ("data", "plain"))
        _one_of("lr_metric", self.lr_metric, ("data", "plain"))
        _one_of("factor_rounding", self.factor_rounding, ("nearest", "feedback"))
        for name, least in (("rank", 0), ("refine_passes", 0), ("outer_iterations", 1), ("inner_iterations", 0),
                            ("damping", 0)):
            if not least <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}; give a finite number")
        for name in ("quantizer", "factor_quantizer", *("draft",) * (self.draft is not None)):
            if not isinstance(getattr(self, name), str | Codebook):
                raise ValueError(f"{name} must be the name of a family or a Codebook, got {getattr(self, name)!r}")
        pair = self.factor_bits if isinstance(self.factor_bits, tuple) else (self.factor_bits,) * 2
        if len(pair) != 2 or not all(isinstance(bits, int) for bits in pair):
            raise ValueError(f"factor_bits must be an integer or a tuple of two (L, R), got {self.factor_bits!r}")
        if not (self.q_grid or self.rank):  # q_grid raises for bits that are not offered
            raise ValueError("rank=0 and q_bits=0 leave nothing: switch on one of them")
        if self.factor_quantizer == "trellis" or down(self.factor_quantizer):
            raise ValueError("a trellis is a grid of Q, whose columns are long: give factor_quantizer another family")
        _ = self.factor_grids  # raises for bits that are not offered
        if self.draft is not None and self.q_grid:
            if self.rounds.q_grid == self.q_grid:
                raise ValueError(f"draft is the grid of Q itself, {self.q_grid}: name another, or leave it out")
            if self.rank and self.outer_iterations < 2:
                raise ValueError("a draft is for all rounds but the last, and outer_iterations=1 leaves none: give 2")

    @property
    def q_grid(self) -> Codebook | None:
        """The grid of Q; None when Q is off."""
        if not isinstance(self.quantizer, str):
            return self.quantizer
        return by_bits(self.quantizer, self.q_bits) if self.q_bits else None

    @property
    def factor_grids(self) -> tuple[Codebook, Codebook]:
        """The grids of L and of R."""
        if not isinstance(self.factor_quantizer, str):
            return self.factor_quantizer, self.factor_quantizer
        left, right = self.factor_bits if isinstance(self.factor_bits, tuple) else (self.factor_bits,) * 2
        return by_bits(self.factor_quantizer, left), by_bits(self.factor_quantizer, right)

    @property
    def rounds(self) -> "CalderaConfig":
        """That of all rounds but the last: with ``draft`` in place of the grid of Q."""
        return replace(self, quantizer=self.draft, draft=None, outer_iterations=max(1, self.outer_iterations - 1))

    @property
    def block(self) -> int:
        """Columns that Q rounds together."""
        return self.q_grid.block if self.q_grid else 1


def _one_of(name, value, offered):
    if value not in offered:
        raise ValueError(f"{name} must be one of {', '.join(offered)}; got {value!r}")


class Decomposition(NamedTuple):
    """W ≈ Q + L R; a part that is off is None."""

    q: Quantized | None
    low_rank: LowRank | None

    def dense(self) -> Float[Array, "m n"]:
        """Q + L R."""
        parts = ([self.q.values] if self.q else []) + ([self.low_rank.dense()] if self.low_rank else [])
        return sum(parts[1:], parts[0])


class Trace(NamedTuple):
    """What happened after each half step (s of them: L R, Q, L R, … or Q, L R, …, the round after a draft Q, L R);
    errors use the true, undamped H.

    A part that is not there yet counts as zero.  ``damping`` is the damping used, in units of H's mean diagonal.
    """

    error: Float[Array, " s"]  # sqrt(tr(E H Eᵀ) / tr(W H Wᵀ))
    q_share: Float[Array, " s"]  # ‖Q X‖ / ‖W X‖
    lr_share: Float[Array, " s"]  # ‖L R X‖ / ‖W X‖
    q_scale: Float[Array, " s"]  # mean scale of Q's grid
    factor_scale: Float[Array, "s 2"]  # mean scales of L's and R's grids
    damping: Float[Array, ""]
    finite: Bool[Array, ""]


def quantize_step(key: Key[Array, ""], target: Float[Array, "m n"], low_rank: LowRank | None,
                  factors: HessianFactors, config: CalderaConfig) -> Quantized:
    """Q ← the rounding of W − L R: LDLQ on H (or on the downdated H), or plain nearest rounding."""
    if config.q_metric == "plain":
        return quantize(config.q_grid, target, key)
    if config.downdate and low_rank is not None:
        factors = downdated(factors, low_rank, config.block)
    return ldlq(target, config.q_grid, factors, config.refine_passes, key)


def factorize_step(key: Key[Array, ""], target: Float[Array, "m n"], target_h: Float[Array, "m n"],
                   low_rank: LowRank | None, factors: HessianFactors, config: CalderaConfig) -> LowRank:
    """(L, R) ← LPLRFactorize(W − Q), given (W − Q) H and the L R of the round before (zero or None at first)."""
    if config.lr_metric == "plain":
        factors, target_h = hessian.identity(target.shape[1], 1, target.dtype), target
    return lplr_factorize(key, target, factors, config.rank, *config.factor_grids, config.inner_iterations, config.svd,
                          target_h, low_rank, config.factor_rounding)


def downdated(factors: HessianFactors, low_rank: LowRank, block: int) -> HessianFactors:
    """H' = M (I − V Vᵀ) Mᵀ, M = root of H, V the right singular vectors of L R M; damped by 0.01 (1 + mean diagonal).

    Q then ignores the directions that L R will repair.  Directions in which L R is zero stay, so that L R = 0 changes
    nothing but the damping.  Differs from the original in: 1. it deletes an arbitrary subspace while L R = 0; 2. it
    subtracts the least eigenvalue of H', which is zero here up to rounding.  O(n³ / 3) each time.
    """
    basis, triangle = jnp.linalg.qr((low_rank.right.values @ factors.root).T)
    _, size, inside = jnp.linalg.svd(low_rank.left_t.values.T @ triangle.T, full_matrices=False)
    active = size > 10 * len(factors.h) * jnp.finfo(size.dtype).eps * size[0]
    v = basis @ jnp.where(active[None], inside.T, 0)
    m_v = factors.root @ v
    h = factors.root @ factors.root.T - m_v @ m_v.T
    h = (h + h.T) / 2
    root, damping = hessian.damped_root(h, 0.01 + 0.01 * jnp.mean(jnp.diagonal(h)))
    return HessianFactors(h, damping, root, hessian.block_ldl(root, block), jnp.all(jnp.isfinite(root)))


def caldera(key: Key[Array, ""], w: Float[Array, "m n"], factors: HessianFactors, config: CalderaConfig,
            quantize_step: Callable[..., Quantized] = quantize_step,
            factorize_step: Callable[..., LowRank] = factorize_step) -> tuple[Decomposition, Trace]:
    """Q, L, R on their grids with small tr(E H Eᵀ), E = Q + L R − W: alternate the two half steps, keep the best.

    w [m, n] in the basis of ``factors`` (factored with ``block=config.block``).  The best iterate is chosen with the
    true H after every half step once both parts exist.  A half step of your own replaces either function; it has the
    signature of the one it replaces.  O(T m n (n + min(m, n))) for T outer iterations with exact SVD.  Pure: numeric
    failure shows in ``Trace.finite``.
    With ``config.draft`` the better half step of the last round, Q first, is kept.
    Differs from the original in: 1. with L R off, W is never scaled in place; 2. scores use the undamped H.
    """
    if config.draft is not None and config.rank and config.q_grid:
        return _drafted(key, w, factors, config, quantize_step, factorize_step)
    w_h = w @ factors.h
    energy = jnp.sum(w_h * w)

    def q_half(key, state):
        low_rank = state[2]
        target = w if low_rank is None else w - low_rank.dense()
        q = quantize_step(key, target, low_rank, factors, config)
        return q, q.values @ factors.h, low_rank

    def lr_half(key, state):
        q, q_h, low_rank = state
        target, target_h = (w, w_h) if q is None else (w - q.values, w_h - q_h)
        return q, q_h, factorize_step(key, target, target_h, low_rank, factors, config)

    start = (None, None, None)  # Q, Q H, (L, R); zero at first, or None for good
    if config.rank:
        start = empty(lr_half, key, start)
    if config.q_grid:
        start = empty(q_half, key, start)
    steps = [step for step, on in ((lr_half, config.rank), (q_half, config.q_grid)) if on]
    steps = steps[::-1] if config.order == "q-first" else steps

    def round_of(carry, now):
        state, best, least = carry
        index, key = now
        rows = []
        for position, (step, step_key) in enumerate(zip(steps, jax.random.split(key), strict=False)):
            state = step(step_key, state)
            row = measure(w, w_h, energy, factors.h, *state)
            first = (index == 0) & (position == len(steps) - 1)  # each part was updated once; kept even if it is NaN
            found = Decomposition(state[0], state[2])
            best, least = better(first | (index > 0) & (row[0] < least), (found, row[0]), (best, least))
            rows.append(row)
        return (state, best, least), jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)

    repeats = config.outer_iterations if len(steps) == 2 else 1  # one part alone has nothing to alternate with
    carry = start, Decomposition(start[0], start[2]), jnp.asarray(jnp.inf, w.dtype)
    (_, best, least), rows = lax.scan(round_of, carry, (jnp.arange(repeats), jax.random.split(key, repeats)))
    rows = (row.reshape(-1, *row.shape[2:]) for row in rows)
    finite = factors.finite & jnp.isfinite(least) & jnp.all(jnp.isfinite(best.dense()))
    return best, Trace(*rows, factors.damping, finite)


def _drafted(key, w, factors, config, quantize_step, factorize_step):
    """All rounds but one with the draft's grid; then Q on its own, beside their best L R, and L R once more."""
    of_draft = factors._replace(lower=hessian.block_ldl(factors.root, config.rounds.block))
    (_, low_rank), trace = caldera(key, w, of_draft, config.rounds, quantize_step, factorize_step)
    q_key, lr_key = (jax.random.fold_in(key, config.outer_iterations + i) for i in range(2))
    w_h = w @ factors.h
    energy = jnp.sum(w_h * w)
    q = quantize_step(q_key, w - low_rank.dense(), low_rank, factors, config)
    q_h = q.values @ factors.h
    again = factorize_step(lr_key, w - q.values, w_h - q_h, low_rank, factors, config)
    first, second = (measure(w, w_h, energy, factors.h, q, q_h, part) for part in (low_rank, again))
    low_rank, least = better(second[0] < first[0], (again, second[0]), (low_rank, first[0]))
    rows = (jnp.concatenate([before, jnp.stack(last)]) for before, *last in zip(trace, first, second, strict=False))
    return Decomposition(q, low_rank), Trace(*rows, trace.damping, trace.finite & jnp.isfinite(least))


def measure(w, w_h, energy, h, q: Quantized | None, q_h, low_rank: LowRank | None):
    """Error, shares and scales of an iterate, as the first fields of Trace; O(k n (m + n)) given w H and Q H."""
    zero = jnp.zeros((), w.dtype)
    e, e_h, q_share, lr_share, scale, factor_scale = w, w_h, zero, zero, zero, jnp.zeros(2, w.dtype)
    if q is not None:
        e, e_h, q_share, scale = e - q.values, e_h - q_h, jnp.sum(q.values * q_h), jnp.mean(q.scale)
    if low_rank is not None:
        left_t, right = low_rank.left_t.values, low_rank.right.values
        right_h = right @ h
        e, e_h = e - left_t.T @ right, e_h - left_t.T @ right_h
        lr_share = jnp.sum((left_t @ left_t.T) * (right_h @ right.T))
        factor_scale = jnp.stack([jnp.mean(low_rank.left_t.scale), jnp.mean(low_rank.right.scale)])
    return ratio(jnp.sum(e * e_h), energy), ratio(q_share, energy), ratio(lr_share, energy), scale, factor_scale
