"""What every method is judged by: data-aware error, its information-theoretic reference, and bits per weight."""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float


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


def bits_per_weight(stored_bits: int, weights: int) -> float:
    """Stored bits of the compressed linear layers over their number of weights."""
    return stored_bits / weights


def rate_distortion_bits(relative: float, h: np.ndarray) -> float:
    """Least bits a weight for i.i.d. Gaussian W at the given relative error: reverse water-filling on H's eigenvalues.

    Σ ½ log2(λᵢ / θ)⁺ / n with Σ min(λᵢ, θ) = relative² Σ λᵢ.  A reference and no bound: a real W is not Gaussian.
    Host function, O(n³).
    """
    spectrum = np.clip(np.linalg.eigvalsh(np.asarray(h, np.float64)), 0, None)
    low, high = 0.0, spectrum.max()
    for _ in range(200):
        level = (low + high) / 2
        if np.minimum(spectrum, level).sum() > relative**2 * spectrum.sum():
            high = level
        else:
            low = level
    active = spectrum[spectrum > high]
    return float(0.5 * np.log2(active / high).sum() / len(spectrum))
