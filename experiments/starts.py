"""Other starts of the alternation: L R first on the outlier channels (ODLRI), or divided before and after Q (SRR)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Key

from caldera_jax import (
    CalderaConfig,
    CompressedLinear,
    Decomposition,
    HessianFactors,
    caldera,
    compress_matrix,
    hessian,
    incoherence,
)
from caldera_jax.codebooks import Quantized
from caldera_jax.decompose import factorize_step, quantize_step
from caldera_jax.linear import pack
from caldera_jax.lplr import LowRank, better
from caldera_jax.objective import proxy_loss, ratio


@dataclass(frozen=True)
class Outliers:
    """The first L R is fitted to W on ``channels`` inputs only; the loop then goes on as ever (ODLRI, 2506.02077).

    They are the inputs of largest H_jj ms(W_j), or with ``weighted`` off of largest H_jj.
    """

    channels: int
    weighted: bool = True


@dataclass(frozen=True)
class Split:
    """``preserved`` of the k directions leave W before Q, the others repair what Q left; one pass (SRR, 2602.02001)."""

    preserved: int


Start = Outliers | Split | None  # None: the package's own, the first L R is fitted to all of W


def compress(key: Key[Array, ""], w: Float[Array | np.ndarray, "m n"], h: Float[Array | np.ndarray, "n n"],
             config: CalderaConfig, start: Start) -> tuple[CompressedLinear, Float[Array, " s"]]:
    """``compress_matrix`` from another start: the layer, and sqrt(tr(E H Eᵀ) / tr(W H Wᵀ)) after each half step.

    w [m, n] in any units, h [n, n] neither rotated nor damped.  Same key, same rotation as ``compress_matrix``.  One
    compilation per shape, config and start.  Raises ValueError for a start that does not fit the config, and where the
    result is not finite.
    """
    if start is None:
        layer, trace = compress_matrix(key, w, h, config)
        return layer, trace.error
    if isinstance(start, Outliers) and (config.order != "lr-first" or not 1 <= start.channels <= len(h)):
        raise ValueError(f"{start} needs order 'lr-first' and 1 to {len(h)} channels; the order is {config.order!r}")
    if isinstance(start, Split) and not 0 <= start.preserved <= config.rank:
        raise ValueError(f"{start} must leave 0 to {config.rank} directions of the rank for the repair")
    layer, errors, finite = _compress(key, jnp.asarray(w), jnp.asarray(h), config, start)
    if not bool(finite):
        raise ValueError(f"{start}: the iteration overflowed: check that h is symmetric positive semidefinite")
    return layer, errors


@partial(jax.jit, static_argnums=(3, 4))
@jax.default_matmul_precision("highest")
def _compress(key, w, h, config, start):
    rotate_key, key = jax.random.split(key)
    scale = jnp.sqrt(jnp.mean(w**2))
    rotated, rotated_h, rotation = incoherence.rotate(rotate_key, w / scale, h, config.rotation)
    factors = hessian.factor(rotated_h, config.damping, config.block)
    if isinstance(start, Split):
        found, errors = split(key, rotated, factors, config, start.preserved)
    else:  # channels mix in the rotated basis: they are chosen before it, and what is fitted is rotated
        first = incoherence.rotate_weight(rotation, outliers(w / scale, h, start))
        found, trace = caldera(key, rotated, factors, config, factorize_step=fitted_first(first, first @ factors.h))
        errors = trace.error
    return pack(found, rotation, config, scale), errors, factors.finite & jnp.all(jnp.isfinite(errors))


def outliers(w: Float[Array, "m n"], h: Float[Array, "n n"], start: Outliers) -> Float[Array, "m n"]:
    """W with zeros outside the channels of largest H_jj ms(W_j), not rotated.

    Its rank is at most ``start.channels``: with no more channels than k, L R can hold all of it but the rounding.
    """
    score = jnp.diagonal(h) * (jnp.mean(w**2, axis=0) if start.weighted else 1)
    _, chosen = jax.lax.top_k(score, start.channels)
    return jnp.zeros_like(w).at[:, chosen].set(w[:, chosen])


def fitted_first(first: Float[Array, "m n"], first_h: Float[Array, "m n"]) -> Callable[..., LowRank]:
    """A half step for ``caldera``: L R is fitted to ``first`` (``first_h`` = first H) at first, to W − Q afterwards.

    Differs from ODLRI, as we read its summaries: 1. the fit is in the norm of all of H, which only weighs the rounding
    of L and R while the channels are no more than k; 2. the first L R is on its grids, so that it may stay.
    """
    def step(key, target, target_h, low_rank, factors, config):
        if low_rank is not None:  # None only while the loop asks for shapes
            begun = jnp.any(low_rank.left_t.values != 0)
            target, target_h = better(begun, (target, target_h), (first, first_h))
        return factorize_step(key, target, target_h, low_rank, factors, config)

    return step


def split(key: Key[Array, ""], w: Float[Array, "m n"], factors: HessianFactors, config: CalderaConfig,
          preserved: int) -> tuple[Decomposition, Float[Array, " s"]]:
    """L₁ R₁ of rank p ← W, Q ← W − L₁ R₁, L₂ R₂ of rank k − p ← W − L₁ R₁ − Q; and the error after each.

    In the basis of ``factors``.  p = k is one round of ``caldera`` with L R first, p = 0 one with Q first.  Our reading
    of SRR, with LDLQ for its quantizer and all of H for its scaling; its rule for p is left out.
    """
    left_out, parts, errors, q = w, [], [], None
    ranks = (preserved, None, config.rank - preserved)  # None: Q
    for step_key, rank in zip(jax.random.split(key, 3), ranks, strict=True):
        if rank == 0:
            continue
        if rank is None:
            q = quantize_step(step_key, left_out, None, factors, config)
            left_out = left_out - q.values
        else:
            parts.append(factorize_step(step_key, left_out, left_out @ factors.h, None, factors,
                                        replace(config, rank=rank)))
            left_out = left_out - parts[-1].dense()
        errors.append(ratio(proxy_loss(left_out, factors.h), proxy_loss(w, factors.h)))
    return Decomposition(q, joined(parts)), jnp.stack(errors)


def joined(parts: Sequence[LowRank]) -> LowRank:
    """Several L R as one of the sum of their ranks; a scale of a whole matrix becomes one a row, equal in a part.

    So k scales a factor are kept where one a part would do: whoever counts the bits counts those (``baselines.srr``).
    """
    def by_rows(part: Quantized) -> Quantized:
        return part._replace(scale=jnp.broadcast_to(part.scale, (len(part.values), part.scale.shape[1])))

    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(LowRank(*map(by_rows, part)) for part in parts))
