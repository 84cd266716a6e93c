"""What every method is judged by: data-aware error, its information-theoretic reference, bounds, and bits per weight.

The bounds take and return units of tr(E H Eᵀ), as ``proxy_loss``; ``theory/`` states, checks and draws each.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

Matrix = np.ndarray | Array
Spectral = tuple[np.ndarray, np.ndarray]  # ``np.linalg.eigh`` of H, for callers that need it more than once


def proxy_loss(e: Float[Array, "m n"], h: Float[Array, "n n"]) -> Float[Array, ""]:
    """tr(E H Eᵀ) = ‖E Xᵀ‖²_F / tokens; O(m n²)."""
    return jnp.sum(jnp.matmul(e, h, precision=lax.Precision.HIGHEST) * e)


def ratio(loss: Float[Array, ""], energy: Float[Array, ""]) -> Float[Array, ""]:
    """sqrt(loss / energy); 0 / 0 is 0, a loss without energy is infinite, and a loss below 0 (rounding) counts as 0."""
    loss = jnp.maximum(loss, 0)
    none = jnp.where(loss > jnp.finfo(loss.dtype).tiny, jnp.inf, 0).astype(loss.dtype)
    return jnp.where(energy > 0, jnp.sqrt(loss / jnp.where(energy > 0, energy, 1)), none)


def relative_error(w: Float[Array | np.ndarray, "m n"], w_hat: Float[Array | np.ndarray, "m n"],
                   h: Float[Array | np.ndarray, "n n"]) -> Float[Array, ""]:
    """sqrt(tr(E H Eᵀ) / tr(W H Wᵀ)), E = W_hat − W, with the true (undamped, unrotated) H."""
    w, w_hat, h = (jnp.asarray(a) for a in (w, w_hat, h))
    if w.shape != w_hat.shape or h.shape != (w.shape[1], w.shape[1]):
        raise ValueError(f"need w and w_hat [m, n] and h [n, n]; got {w.shape}, {w_hat.shape} and {h.shape}")
    return ratio(proxy_loss(w_hat - w, h), proxy_loss(w, h))


def energies(a: Matrix, h: Matrix | None = None) -> Float[np.ndarray, " k"]:
    """σᵢ²(A H^½), falling, min(m, n) of them; those beyond the k-th are the least loss of A less any L R of rank k.

    H = I where there is none.  Those below ε σ₁² are lost in rounding.  Host function, float64, O(m n²).
    """
    a = np.asarray(a, np.float64)
    a = np.linalg.qr(a, mode="r") if len(a) > a.shape[1] else a
    return np.clip(np.linalg.eigvalsh((a if h is None else a @ np.asarray(h, np.float64)) @ a.T)[::-1], 0, None)


def importance(raw: Float[np.ndarray, " m"], floor: float = 0.02, shrinkage: float = 0.1) -> Float[np.ndarray, " m"]:
    """g of a layer's outputs from noisy estimates: no less than ``floor`` of their mean, then drawn towards it.

    Few windows miss what an output is good for elsewhere: without a floor such an output would lose all its bits.
    """
    raised = np.maximum(raw, floor * np.mean(raw))
    return (1 - shrinkage) * raised + shrinkage * np.mean(raised)


def bits_per_weight(stored_bits: int, weights: int) -> float:
    """Stored bits of the compressed linear layers over their number of weights."""
    return stored_bits / weights


def rate_distortion_limit(relative: float, w: Matrix, h: Matrix | Spectral, sources: str = "white") -> float:
    """Least bits a weight at a relative error, for Gaussian weights: reverse water-filling over H's eigenvectors vᵢ.

    Σ ½ log2(sᵢ / θ)⁺ / n with Σ min(sᵢ, θ) = relative² tr(W H Wᵀ) / m.  ``sources``: "white", i.i.d. weights of
    W's mean square, sᵢ = λᵢ ‖W‖²_F / (m n); or "own", sᵢ = λᵢ ‖W vᵢ‖² / m, W's own energy along each vᵢ, which the
    decoder is taken to know.  W [m, n] enters through nothing else.  ``h``: H [n, n], or its ``np.linalg.eigh``.
    A reference and no bound: a real W is not Gaussian, and Gaussian is the hardest source of its variance.
    Host function, float64, O(n³).
    """
    variances, energy = _variances(w, h, sources)
    if relative**2 * energy >= variances.sum():
        return 0.0
    below = np.cumsum(variances) - variances  # Σ of those under the i-th, which the water covers
    level = (relative**2 * energy - below) / np.arange(len(variances), 0, -1)
    theta = level[np.argmax(level <= variances)]
    with np.errstate(divide="ignore"):
        return float(np.sum(np.maximum(np.log2(variances) - np.log2(theta), 0)) / (2 * len(variances)))


def rate_distortion_error(bits: float | Sequence[float], w: Matrix, h: Matrix | Spectral,
                          sources: str = "white") -> float | Float[np.ndarray, " bits"]:
    """The relative error at a number of bits a weight, or at each of several: the inverse of
    ``rate_distortion_limit``."""
    variances, energy = _variances(w, h, sources)
    positive = variances[variances > 0][::-1]
    active = np.arange(1, len(positive) + 1)
    spent = 2 * np.asarray(bits, np.float64)[..., None] * len(variances)
    level = (np.cumsum(np.log2(positive)) - spent) / active  # log2 θ if so many are active
    first = np.argmax(level >= np.append(np.log2(positive[1:]), -np.inf), axis=-1)[..., None]
    theta = 2.0 ** np.take_along_axis(level, first, axis=-1)
    error = np.sqrt(np.minimum(positive, theta).sum(-1) / energy)
    return float(error) if np.ndim(bits) == 0 else error


def rate_gap(bits: float, relative: float, w: Matrix, h: Matrix | Spectral, sources: str = "white") -> float:
    """Bits a weight that a method pays above ``rate_distortion_limit`` at its own error."""
    return bits - rate_distortion_limit(relative, w, h, sources)


def _variances(w, h, sources: str) -> tuple[np.ndarray, float]:
    """Variances of the Gaussian sources, ascending, and tr(W H Wᵀ) / m."""
    w, (spectrum, vectors) = np.asarray(w, np.float64), _eigh(h)
    spectrum, along = np.clip(spectrum, 0, None), np.mean((w @ vectors) ** 2, axis=0)
    if sources not in ("white", "own"):
        raise ValueError(f"sources must be 'white' or 'own', got {sources!r}")
    return np.sort(spectrum * (along if sources == "own" else along.mean())), float(spectrum @ along)


def _eigh(h: Matrix | Spectral) -> Spectral:
    """Eigenvalues, ascending, and eigenvectors in columns."""
    return h if isinstance(h, tuple) else np.linalg.eigh(np.asarray(h, np.float64))


class Incoherence(NamedTuple):
    """μ_W = max |w_ij| √(m n) / ‖W‖_F, from 1 to √(m n), and μ_H = √n max |q_ij| over H's eigenvectors, 1 to √n."""

    weight: float
    hessian: float


def incoherence(w: Matrix, h: Matrix) -> Incoherence:
    """How far W [m, n] and H [n, n] are from spread out (QuIP, arXiv 2307.13304, Definition 1; 1 is best).

    Equal eigenvalues leave H's eigenvectors free, and then μ_H is that of the basis LAPACK returns (1 for H = I would
    need another basis).  W = 0 counts as 1.  Host function, float64, O(n³).
    """
    w, vectors = np.asarray(w, np.float64), _eigh(h)[1]
    norm = np.linalg.norm(w)
    return Incoherence(float(np.abs(w).max() * np.sqrt(w.size) / norm) if norm else 1.0,
                       float(np.sqrt(len(vectors)) * np.abs(vectors).max()))


def feedback_trace(h: Matrix, block: int = 1) -> float:
    """tr D of H = L blockdiag(D) Lᵀ, L unit block lower triangular: the loss of LDLQ for unit rounding errors.

    tr(E H Eᵀ) = m σ² tr D when the rounding errors have variance σ² and are uncorrelated within a block (QuIP, Theorem
    1).  tr D <= tr H, and it falls as the block shrinks.  A singular H is factored with 1e-12 of its mean diagonal
    added.  Host function, float64, O(n³ / 3).
    """
    h = np.asarray(h, np.float64)
    root = np.linalg.cholesky(h + 1e-12 * np.mean(np.diag(h)) * np.eye(len(h)))
    return float(sum(np.sum(root[i:i + block, i:i + block] ** 2) for i in range(0, len(h), block)))


def ldlq_bound(h: Matrix | Spectral, m: int, variance: float, block: int = 1, mu: float | None = None) -> float:
    """Block LDLQ: E tr(E H Eᵀ) <= g m μ² σ² / n · tr(H^½)² (QuIP# Theorem 4.1, arXiv 2402.04396; g = ``block``).

    ``variance``: the rounding error's covariance is at most σ² I.  ``mu``: μ_H, measured where it is None.  For an
    unbounded grid.  Below plain rounding's m σ² tr H only where g μ² tr(H^½)² < n tr H.  Host function, float64, O(n³).
    """
    spectrum, vectors = _eigh(h)
    mu = np.sqrt(len(vectors)) * np.abs(vectors).max() if mu is None else mu
    return float(block * m * mu**2 * variance / len(vectors) * np.sqrt(np.clip(spectrum, 0, None)).sum() ** 2)


def caldera_bound(h: Matrix | Spectral, m: int, rank: int, bits: int, radius: float, factor_loss: float = 0.0) -> float:
    """CALDERA's printed bound on E tr(E H Eᵀ): m 4 n λ_max R² / (π (2^B − 1)²) · (1 − k/2m)² + m ε.

    Theorem 4.1 of arXiv 2405.18886, times m (the paper divides by m).  Q on a uniformly dithered grid of B ``bits`` on
    [−R, R], R = ``radius``; ε = ``factor_loss`` of quantizing L and R, per output; H undamped.  Where the closed form
    is loose and where it fails: ``theory/caldera_bound.py``.  Host function, float64, O(n³).
    """
    spectrum = h[0] if isinstance(h, tuple) else np.linalg.eigvalsh(np.asarray(h, np.float64))
    step = radius / (2**bits - 1)
    return float(m * (4 * len(spectrum) * spectrum[-1] * step**2 / np.pi * (1 - rank / (2 * m)) ** 2 + factor_loss))
