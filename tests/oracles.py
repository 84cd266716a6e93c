"""Slow references in NumPy float64, written from the definitions and sharing nothing with the package."""

from functools import cache
from itertools import product

import numpy as np
import scipy.linalg

# Positions of the entries 1/2 in the 29 patterns of norm^2 12 (QuIP#, arXiv 2402.04396).
PUBLISHED_29 = ("123 023 013 012 367 357 347 356 346 345 267 257 247 256 246 245 167 157 147 156 146 045 067 057 047 "
                "056 046 014 237").split()


@cache
def e8p_codewords():
    """Half-odd-integer patterns (norm^2 <= 10 and the 29), every sign choice of even sum, plus or minus 1/4."""
    grid = np.array(list(product((0.5, 1.5, 2.5), repeat=8)))
    small = grid[(grid**2).sum(1) <= 10]
    large = np.full((29, 8), 1.5)
    for row, places in zip(large, PUBLISHED_29, strict=True):
        row[[int(p) for p in places]] = 0.5
    signs = np.array(list(product((1, -1), repeat=8)))
    points = (np.concatenate([small, large])[:, None] * signs).reshape(-1, 8)
    points = points[points.sum(1) % 2 == 0]
    return np.concatenate([points - 0.25, points + 0.25])


@cache
def e8_small_points():
    """All points of E8 (integer or half-odd-integer entries, even sum) of norm^2 <= 2."""
    points = np.concatenate([np.array(list(product((-1.0, 0, 1), repeat=8))),
                             np.array(list(product((-0.5, 0.5), repeat=8)))])
    return points[(points.sum(1) % 2 == 0) & ((points**2).sum(1) <= 2)]


def best_scores(x, points):
    """max over the points c of x.c - |c|^2 / 2, for each row of x: the greatest score is the least distance."""
    bias = (points**2).sum(1) / 2
    return np.concatenate([(rows @ points.T - bias).max(1) for rows in np.array_split(x, max(len(x) // 64, 1))])


def scores(x, values):
    return (x * values).sum(1) - (values**2).sum(1) / 2


def loss(e, h):
    """tr(E H E^T)."""
    return np.trace(e @ h @ e.T)


def relative(w, w_hat, h):
    return np.sqrt(loss(w - w_hat, h) / loss(w, h))


def blocks(n, g):
    return [slice(i, i + g) for i in range(0, n, g)]


def block_ldl(h, g):
    """(lower, [D_j]) with h = lower blockdiag(D) lower^T, by eliminating one block after the other."""
    lower, d, rest = np.eye(len(h)), [], h.copy()
    for j in blocks(len(h), g):
        d.append(rest[j, j].copy())
        lower[:, j] = np.where(np.arange(len(h))[:, None] >= j.start, rest[:, j] @ np.linalg.inv(rest[j, j]), 0)
        rest = rest - lower[:, j] @ d[-1] @ lower[:, j].T
    return lower, d


def ldlq(w, h, g, round_slab):
    """Columns last to first: Q_j = round(W_j + sum_{i > j} (W - Q)_i lower_ij); and the rounding errors eta."""
    lower, d = block_ldl(h, g)
    q, eta = np.zeros_like(w), np.zeros_like(w)
    for j in blocks(w.shape[1], g)[::-1]:
        target = w[:, j] + sum((w[:, i] - q[:, i]) @ lower[i, j] for i in blocks(w.shape[1], g) if i.start > j.start)
        q[:, j] = round_slab(target)
        eta[:, j] = target - q[:, j]
    return q, eta, d


def descent_pass(w, q, h, g, round_slab):
    """Columns last to first: each block to the rounding of the real minimiser of tr(E H E^T) given all the others."""
    q = q.copy()
    for j in blocks(w.shape[1], g)[::-1]:
        others = np.ones(w.shape[1], bool)
        others[j] = False
        e = w - q
        q[:, j] = round_slab(w[:, j] + np.linalg.solve(h[j, j], (e[:, others] @ h[others][:, j]).T).T)
    return q


def rank_constrained(a, h, k):
    """The best L R of rank k in the H-norm, the optimal value and U_k, by the symmetric root and its pseudoinverse."""
    singular = np.linalg.cond(h) > 1e12  # where sqrtm is inaccurate
    values, vectors = np.linalg.eigh(h)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T if singular else np.real(scipy.linalg.sqrtm(h))
    u, s, v = np.linalg.svd(a @ root, full_matrices=False)
    return (u[:, :k] * s[:k]) @ v[:k] @ np.linalg.pinv(root, rcond=1e-7), (s[k:] ** 2).sum(), u[:, :k]


def nearest(levels):
    """The function that takes every number to its nearest level."""
    return lambda x: levels[np.abs(x[..., None] - levels).argmin(-1)]


def uniform(x, bits):
    """Nearest of 2^bits equally spaced levels on [-max|x|, max|x|]."""
    return nearest(np.linspace(-1, 1, 2**bits) * np.abs(x).max())(x)


def lplr(a, h, k, bits, iterations):
    """Alternating least squares with rounding from the closed form, once and ``iterations`` more; the best pair."""
    left, pairs = rank_constrained(a, h, k)[2], []
    for i in range(iterations + 1):
        right = uniform(np.linalg.pinv(left) @ a, bits)
        if i > 0:  # the first left factor is not rounded yet
            pairs.append(left @ right)
        left = uniform(a @ h @ right.T @ np.linalg.inv(right @ h @ right.T), bits)
        pairs.append(left @ right)
    return min(pairs, key=lambda pair: loss(pair - a, h))


def caldera(w, h, k, q_bits, factor_bits, outer, inner, damping, order):
    """The error after every half step of Algorithm 1 with scalar grids, scored with h normalised but not damped."""
    h = h / np.diag(h).mean()
    damped = h + damping * np.eye(len(h))
    q, lr, errors = np.zeros_like(w), np.zeros_like(w), []
    for _ in range(outer):
        for part in (("lr", "q") if order == "lr-first" else ("q", "lr")):
            if part == "lr":
                lr = lplr(w - q, damped, k, factor_bits, inner)
            else:
                target = w - lr
                levels = np.linspace(-1, 1, 2**q_bits) * np.abs(target).max()
                q = ldlq(target, damped, 1, nearest(levels))[0]
            errors.append(relative(w, q + lr, h))
    return np.array(errors)
