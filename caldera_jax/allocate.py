"""Bits where they count: rank, bits of Q and of L R of every layer under one budget, by the damage theory predicts.

Each layer is measured once (``error_model``), its damage is weighed by how much the model's output cares
(``damage``), and ``plan`` spends the budget.  ``calibration.gradients`` gives what the output cares.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Key

from caldera_jax import hessian, incoherence
from caldera_jax.codebooks import quantize, rounding_error
from caldera_jax.decompose import CalderaConfig, Decomposition, quantize_step
from caldera_jax.linear import pack
from caldera_jax.lplr import LowRank
from caldera_jax.objective import proxy_loss

Q_BITS = (2, 3, 4)
FACTOR_BITS = (2, 4)  # 16 were never worth their bits (experiments/results/frontier, theory/results/factor_bits.json)

Number = float | int
Rule = Literal["gradient", "trace", "error", "uniform"]
UNITS: dict[Rule, str] = {"gradient": "nats a token", "trace": "nats a token", "error": "squared relative error",
                          "uniform": "squared relative error"}  # of damage


class Option(NamedTuple):
    """What a layer may be stored as."""

    rank: int
    q_bits: int
    factor_bits: int | tuple[int, int] = FACTOR_BITS[-1]  # of no meaning at rank 0

    def of(self, config: CalderaConfig) -> CalderaConfig:
        """The configuration with this choice."""
        return replace(config, **self._asdict())


def grid(shape: tuple[int, int]) -> tuple[int, ...]:
    """0 and the five powers of two nearest min(m, n) / 64, …, min(m, n) / 4, from 8 on: at 4096 64 to 1024, at 192 8 to
    64.

    Few, as every option compiles once for every shape.  None below 8, where on the tiny model of experiments/ the
    predicted damage falls but perplexity does not: a choice made on that perplexity.
    """
    top = round(math.log2(min(shape) / 4))
    return 0, *(2**i for i in range(max(top - 4, 3), top + 1))


def factor_bits(config: CalderaConfig) -> tuple[int | tuple[int, int], ...]:
    """Bits of L and R to choose from: FACTOR_BITS of a family, those of a Codebook."""
    return FACTOR_BITS if isinstance(config.factor_quantizer, str) else (config.factor_bits,)


def options(shape: tuple[int, int], config: CalderaConfig, ranks: Sequence[int] | None = None) -> list[Option]:
    """Q of 2, 3 or 4 bits beside L R of each of these ranks (None: of ``grid``), of 2 or 4 bits.

    Raises ValueError for a rank above min(m, n), and where the configuration leaves no choice of the bits of Q: its
    quantizer is a Codebook, or of a family that does not offer them.
    """
    if not isinstance(config.quantizer, str):
        raise ValueError(f"a budget chooses the bits of Q, but the quantizer {config.quantizer!r} has its own: name a "
                         "family (e8p, trellis, uniform, dithered, nf), or give no budget")
    ranks = grid(shape) if ranks is None else ranks
    if max(ranks) > min(shape):
        raise ValueError(f"rank {max(ranks)} exceeds min(m, n) = {min(shape)} of a layer {shape}: leave it out of the "
                         "ranks")
    of_factors = factor_bits(config)
    return [Option(rank, bits, factors) for bits in Q_BITS for rank in ranks
            for factors in (of_factors if rank else of_factors[-1:])]


@cache
def stored_bits(shape: tuple[int, int], config: CalderaConfig, dtype: Any = jnp.float32) -> int:
    """``CompressedLinear.stored_bits`` of a layer of this shape, to the bit, and without compressing it.

    dtype: of the scales and of orthogonal factors: float32 but for a float64 weight.
    """
    m, n = shape

    def packed(key):
        sizes = (m, n), (config.rank, m), (config.rank, n)
        q, left_t, right = (quantize(book, jnp.zeros(size, dtype), key) if book and all(size) else None
                            for book, size in zip((config.q_grid, *config.factor_grids), sizes, strict=True))
        rotation = incoherence.draw(key, m, n, config.rotation, dtype)
        low_rank = LowRank(left_t, right) if config.rank else None
        return pack(Decomposition(q, low_rank), rotation, config, jnp.ones((), dtype))

    return jax.eval_shape(packed, jax.random.key(0)).stored_bits


class ErrorModel(NamedTuple):
    """Predicted tr(E H Eᵀ) and ‖E‖²_F of a layer for each of its options, in the units of W and H, and what they are
    measured by: tr(W H Wᵀ) and tr H.  H is undamped."""

    loss: list[float]
    plain: list[float]
    energy: float
    trace: float


def error_model(key: Key[Array, ""], w: Float[Array | np.ndarray, "m n"], h: Float[Array | np.ndarray, "n n"],
                config: CalderaConfig, choices: Sequence[Option], name: str = "the matrix") -> ErrorModel:
    """What ``compress_matrix`` with this key would lose with every option, for one LDLQ each and two SVDs in all.

    Q last    ℓ (1 + (c_L + c_R) ‖LR‖² / ‖W − LR‖²): Q = LDLQ(W − LR) absorbs what rounding L and R does, so that it
              only has more to round; LR the closed form of rank k, ℓ the loss measured with it unrounded.  Rank 0:
              what ``compress_matrix`` does, and so exact.
    LR last   Q last · τ + c_L tr(LR H (LR)ᵀ) + c_R ‖LR‖² tr H / n: LR repairs k directions of Q's error, leaves a share
              τ of it, and keeps the error of its own rounding (``theory/when_rank_pays.py``); τ of Q's error at the
              highest rank and the fewest bits, c the error of a factor's grid on a unit Gaussian.

    The smaller of the two is predicted, and nothing is fitted.  To take ℓ from Q alone times ‖W − LR‖² / ‖W‖² would
    save the LDLQs; but where H has few large directions and W much along them Q alone runs out of its grid, and rank,
    which takes them away, would seem worth less than half of what it is.
    Later rounds gain some per cent more.  The configuration's own rank and bits do not matter; the downdate is not
    modelled.  Compiled once for a shape; O(options m n² + m n min(m, n)).
    Raises ValueError (naming ``name``) for NaN or infinities, or an H that no damping makes positive definite.
    """
    w, h = jnp.asarray(w), jnp.asarray(h)
    dtype = w.dtype if w.dtype in (jnp.float32, jnp.float64) else jnp.dtype(jnp.float32)
    ranks, bits = (tuple(sorted({option[i] for option in choices})) for i in (0, 1))
    found = _measure(key, w.astype(dtype), h.astype(dtype), replace(config, rank=0, q_bits=bits[0]), ranks, bits)
    of_q, repaired, square, own, rest, energy, trace = (np.asarray(part, np.float64) for part in found)

    def loss(option):
        """tr(E H Eᵀ) and ‖E‖²."""
        i, j = ranks.index(option.rank), bits.index(option.q_bits)
        c_left, c_right = map(rounding_error, option.of(config).factor_grids)
        wider = 1 + (c_left + c_right) * square[i] / max(rest[i], np.finfo(np.float64).tiny)
        kept = [c_left * own[i] + c_right * square[i] * trace / w.shape[1], (c_left + c_right) * square[i]]
        q_last = of_q[:, i, j] * wider
        return min(q_last, q_last * (1 - repaired[:, i]) + kept, key=lambda losses: losses[0])

    best = np.array([loss(option) for option in choices])
    if not np.isfinite(best).all():
        raise ValueError(f"{name}: the weight or the Hessian holds NaN or infinite values, or no damping makes the "
                         "Hessian positive definite: check the file and the calibration text")
    return ErrorModel(*best.T.tolist(), float(energy), float(trace))


@partial(jax.jit, static_argnums=(3, 4, 5))
@jax.default_matmul_precision("highest")
def _measure(key, w, h, config, ranks, bits):
    """tr(E H Eᵀ) and ‖E‖² of Q beside an unrounded LR [2, ranks, bits], the shares of them that each rank repairs
    [2, ranks]; ‖LR‖², tr(LR H (LR)ᵀ) and ‖W − LR‖² [ranks]; tr(W H Wᵀ) and tr H."""
    rotate_key, key = jax.random.split(key)  # as ``compress_matrix`` begins: the same scale, rotation and damping
    peak = jnp.maximum(jnp.max(jnp.abs(w)), 1e-30)
    scale = peak * jnp.maximum(jnp.sqrt(jnp.mean((w / peak) ** 2)), 1e-6)
    rotated, h, _ = incoherence.rotate(rotate_key, w / scale, h, config.rotation)
    factors = hessian.factor(h, config.damping, config.block)
    round_key, _ = jax.random.split(jax.random.split(key, 1)[0])
    losses = lambda e: jnp.stack([proxy_loss(e, h), jnp.sum(e * e)])

    left = jnp.linalg.svd(rotated @ factors.root, full_matrices=False)[0]
    low_ranks = jnp.stack([left[:, :k] @ (left[:, :k].T @ rotated) for k in ranks])
    targets = rotated[None] - low_ranks

    def error(q_bits, target):
        return quantize_step(round_key, target, None, factors, replace(config, q_bits=q_bits)).values - target

    of_q = [lax.map(lambda target, b=b: losses(error(b, target)), targets) for b in bits]
    e = error(bits[0], targets[-1])
    repairs = jnp.linalg.svd(e @ factors.root, full_matrices=False)[0]
    repaired = jnp.stack([losses(repairs[:, :k].T @ e) for k in ranks])  # as of U Uᵀ e
    repaired = repaired / jnp.maximum(losses(e), jnp.finfo(e.dtype).tiny)[None]
    unit = scale**2
    own, square = unit * lax.map(losses, low_ranks).T
    return (unit * jnp.stack(of_q, axis=-1).transpose(1, 0, 2), repaired.T, square, own,
            unit * jnp.sum(targets**2, axis=(1, 2)), unit * losses(rotated)[0], jnp.trace(h))


def damage(rule: Rule, shape: tuple[int, int], model: ErrorModel, fisher: float = 0.0) -> list[float]:
    """What each option of a layer costs the model, so that layers can be compared; T = ``fisher``, the layer's trace.

    "gradient": ½ T tr(E H Eᵀ) / (m tr H), nats a token: the Fisher information as inputs' H times one number, of the
    layer's own trace.  "trace": ½ T ‖E‖² / (m n), nats a token: one number for all weights of a layer (HAWQ-V2, arXiv
    1911.03852).  "error", "uniform": tr(E H Eᵀ) / tr(W H Wᵀ), the squared relative error: all layers alike.
    """
    m, n = shape
    losses, unit = model.loss, model.energy
    if rule == "gradient":
        unit = 2 * m * model.trace / fisher if fisher > 0 else 0.0
    if rule == "trace":
        losses, unit = model.plain, 2 * m * n / fisher if fisher > 0 else 0.0
    return [loss / unit if unit > 0 else 0.0 for loss in losses]


def plan(bits: Sequence[Sequence[int]], damages: Sequence[Sequence[Number]], budget: Number) -> list[int]:
    """The option of each layer: least Σ damage with Σ bits <= budget, of options with these bits and damages.

    Along each layer's lower convex hull, always the step of most damage a bit, until the next does not fit: the optimum
    at that many bits (Lagrange; Shoham and Gersho 1988).  What is left then goes to the step of most damage a bit that
    fits, on the hull or not, until none does: no optimum, but more budget never means more damage.  Ties: the first
    layer, the first option.
    Raises ValueError where the budget is less than the cheapest options take; of one that is more than any take, the
    rest is left.
    """
    check(bits, budget)
    hulls = [_hull(b, d) for b, d in zip(bits, damages, strict=True)]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(b[i] for b, i in zip(bits, chosen, strict=True))
    steps = [(-_slope(bits[i], damages[i], a, b), i, b) for i, hull in enumerate(hulls)
             for a, b in zip(hull, hull[1:], strict=False)]
    for _, i, option in sorted(steps, key=lambda step: step[0]):  # of a layer in the order of its hull
        if (extra := bits[i][option] - bits[i][chosen[i]]) > left:
            break
        chosen[i], left = option, left - extra
    while True:
        steps = [(-_slope(bits[i], damages[i], now, o), i, o) for i, now in enumerate(chosen)
                 for o in range(len(bits[i])) if damages[i][o] < damages[i][now] and
                 0 < bits[i][o] - bits[i][now] <= left]
        if not steps:
            return chosen
        _, i, option = min(steps, key=lambda step: step[0])
        left -= bits[i][option] - bits[i][chosen[i]]
        chosen[i] = option


def check(bits: Sequence[Sequence[int]], budget: Number, weights: int = 0) -> None:
    """Raise ValueError where no choice of options fits the budget, saying what would do, rounded up."""
    least = sum(map(min, bits))
    if not budget >= least:
        upward = lambda parts: (least * 10**4 // parts + 1) / 10**4
        given, needed = ((f" ({a:.4f} a weight, {b:.4f} MB)" if weights else "") for a, b in (
            (budget / max(weights, 1), budget / 8e6), (upward(max(weights, 1)), upward(8 * 10**6))))
        raise ValueError(f"a budget of {budget} bits{given} is below the {least} bits{needed} of the cheapest choice: "
                         "raise it")


def _slope(bits, damages, a: int, b: int) -> float:
    return (damages[a] - damages[b]) / (bits[b] - bits[a])


def _hull(bits: Sequence[int], damages: Sequence[Number]) -> list[int]:
    """The options on the lower convex hull of (bits, damage), from the cheapest to the least damage."""
    hull: list[int] = []
    for option in sorted(range(len(bits)), key=lambda o: (bits[o], damages[o], o)):
        if hull and damages[option] >= damages[hull[-1]]:
            continue
        while len(hull) > 1 and (_slope(bits, damages, hull[-2], hull[-1])
                                 <= _slope(bits, damages, hull[-2], option)):
            hull.pop()
        hull.append(option)
    return hull


def alike_options(shapes: Sequence[tuple[int, int]], config: CalderaConfig, budget: Number,
                  dtype: Any = jnp.float32, ranks: Sequence[int] | None = None) -> list[Option]:
    """For all bits of Q and of L R, the largest rank that fits, for all layers alike; and the least, where it fits.

    ranks: of which (None: of all from 0 to min(m, n) of the smallest layer).
    Raises ValueError as ``plan`` and ``options`` do.
    """
    most = min(map(min, shapes))
    ranks = range(most + 1) if ranks is None else sorted(ranks)
    options((most, most), config, ranks)  # raises
    total = lambda option: sum(stored_bits(shape, option.of(config), dtype) for shape in shapes)
    least = options((most, most), config, ranks[:1])
    check([[total(option) for option in least]], budget, sum(m * n for m, n in shapes))
    found = [option for option in least if total(option) <= budget]
    for option in (Option(0, bits, factors) for bits in Q_BITS for factors in factor_bits(config)):
        one, two = (total(option._replace(rank=k)) for k in (1, 2))  # every further rank stores as much more
        if fits := [k for k in ranks[1:] if one + (k - 1) * (two - one) <= budget]:
            found.append(option._replace(rank=max(fits)))
    return found


def dearest_bits(shapes: Sequence[tuple[int, int]], config: CalderaConfig, rule: Rule, dtype: Any = jnp.float32,
                 ranks: Sequence[int] | None = None) -> int:
    """Bits of all layers with the largest option of each: more budget buys nothing more."""
    alike = ranks if ranks or rule != "uniform" else (min(map(min, shapes)),)
    largest = lambda shape: Option(max(alike or grid(shape)), max(Q_BITS), factor_bits(config)[-1])
    return sum(stored_bits(shape, largest(shape).of(config), dtype) for shape in shapes)


def alike(bits: Sequence[Sequence[int]], damages: Sequence[Sequence[Number]], budget: Number) -> list[int]:
    """The one option for all layers of least Σ damage with Σ bits <= budget; the baseline that ``plan`` should beat."""
    total = np.where(np.sum(bits, axis=0) <= budget, np.sum(damages, axis=0), np.inf)
    return [int(np.argmin(total))] * len(bits)
