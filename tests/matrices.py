"""Test matrices with prescribed spectra: Hessians Float64 [n, n] and weights [m, n], in NumPy."""

import numpy as np


def orthogonal(n, seed):
    """A Haar orthogonal matrix."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    return q * np.sign(np.diag(r))


def with_spectrum(eigenvalues, seed=0):
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    basis = orthogonal(len(eigenvalues), seed)
    h = (basis * eigenvalues) @ basis.T
    return (h + h.T) / 2


def hessian(kind, n, seed=0):
    """flat (the identity), geometric (condition 1e4), power (1/i), spiked (one eigenvalue 100 n), deficient (rank n/3),
    few-tokens (n/2 tokens), dead (one input never active)."""
    i = np.arange(n)
    if kind in ("few-tokens", "dead"):
        x = np.random.default_rng(seed).normal(size=((n + 1) // 2 if kind == "few-tokens" else 4 * n, n))
        x[:, n // 2] *= kind != "dead"
        return x.T @ x / len(x)
    spectra = {"flat": np.ones(n), "geometric": 1e4 ** (-i / max(n - 1, 1)), "power": 1 / (1 + i),
               "spiked": np.where(i == 0, 100 * n, 1.0), "deficient": np.where(i < -(-n // 3), 1.0, 0)}
    return np.eye(n) if kind == "flat" else with_spectrum(spectra[kind], seed)


HESSIANS = ("flat", "geometric", "power", "spiked", "deficient", "few-tokens", "dead")


def gaussian(m, n, seed=0):
    return np.random.default_rng(seed).normal(size=(m, n))


def heavy_tailed(m, n, seed=0):
    """Student t with 2 degrees of freedom: the variance is infinite."""
    return np.random.default_rng(seed).standard_t(2, size=(m, n))


def decaying(m, n, seed=0):
    """Singular values 1/(1 + i)."""
    k = min(m, n)
    return (orthogonal(m, seed)[:, :k] / (1 + np.arange(k))) @ orthogonal(n, seed + 1)[:k]
