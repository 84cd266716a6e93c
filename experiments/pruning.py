"""Pruning without training: single weights, inputs, outputs or whole blocks are left out, and every bit is counted.

Each method takes (key, layer, settings) to a dense replacement and the bits of its values and of the mask that says
where they are, each one stream through all rows without padding.  None uses the key.  Host functions, computed in
float64.
"""

import math
import re
from collections import Counter
from collections.abc import Callable

import numpy as np
from baselines import Layer, Method, Replacement
from jaxtyping import Bool, Float, Int
from scipy.linalg import cho_solve, solve_triangular

from caldera_jax.jobs import calibration
from caldera_jax.models import llama
from caldera_jax.models.llama import LlamaConfig, Params

UNSTRUCTURED = "unstructured"
Weights = Float[np.ndarray, "m n"]
Mask = Bool[np.ndarray, "m n"]


def magnitude(key, layer: Layer, kept: float = 0.5, pattern: str = UNSTRUCTURED, value_bits: int = 16) -> Replacement:
    """The weights of largest |w_ij| in the matrix, or in each group of a row (Han et al., arXiv 1506.02626).

    ``kept``: fraction of the weights that stay; of each group of rows and columns that the source ranks together,
    round(kept · its size) exactly.  ``pattern``: "unstructured", or "n:m" for n of every m neighbours of a row, which
    needs kept = n / m; a last group of fewer than m keeps at most n.  ``value_bits``: 16 (float16), 8 or 4 (see
    ``row_grid``).  ValueError for any other setting.  O(m n log(m n)).
    """
    w = np.asarray(layer.w, np.float64)
    return _stored(w, choose(np.abs(w), kept, pattern), pattern, value_bits)


def wanda(key, layer: Layer, kept: float = 0.5, pattern: str = UNSTRUCTURED, value_bits: int = 16) -> Replacement:
    """The weights of largest |w_ij| √H_jj in each row, or group of a row, not updated (Wanda, arXiv 2306.11695).

    Settings and errors of ``magnitude``.
    """
    w, h = _problem(layer)
    return _stored(w, choose(np.abs(w) * np.sqrt(np.diag(h)), kept, pattern, by_row=True), pattern, value_bits)


def gradient(key, layer: Layer, kept: float = 0.5, pattern: str = UNSTRUCTURED, value_bits: int = 16) -> Replacement:
    """The weights of largest w_ij² F_ij in the matrix, F the mean squared gradient (Molchanov et al., 1906.10771).

    The change of the loss when w_ij goes, squared, to first order.  Differs from the source in that weights and not
    filters go, and each matrix keeps its share.  Settings of ``magnitude``; ValueError too where the layer has no
    ``fisher``.
    """
    if layer.fisher is None:
        raise ValueError("gradient pruning needs the mean squared gradient of the loss: give Layer(w, h, fisher)")
    w = np.asarray(layer.w, np.float64)
    return _stored(w, choose(w**2 * np.asarray(layer.fisher, np.float64), kept, pattern), pattern, value_bits)


def sparsegpt(key, layer: Layer, kept: float = 0.5, pattern: str = UNSTRUCTURED, value_bits: int = 16,
              damping: float = 0.01, block: int = 128) -> Replacement:
    """A mask by saliency, and the weights that stay moved to make up for what went: least tr(E H Eᵀ), greedily.

    Columns go last to first, as in LDLQ: pruning rounds w_ij to 0, rounding to ``value_bits`` is in the same feedback,
    and with H + d I = L D Lᵀ, L unit lower triangular, column j is decided at W_j + Σ_{i>j} (W − Q)_i L_ij.  The
    weights that go are those of least w² D_jj = w² / [H⁻¹]_jj, H of the columns not yet decided and w as moved by all
    before: the exact rise of the loss when that one goes and the others follow.  They are chosen for ``block`` columns
    and all rows at once, or for each row's group of an n:m pattern.

    Settings of ``magnitude``.  ``damping``: d in units of H's mean diagonal; ValueError where H + d I is not positive
    definite.  The grid of 8 or 4 bits is that of the weights that stay, as they have moved where nothing is rounded: on
    the grid of W's rows, which they leave, 8 bits were up to 14 % worse than 16.  O(m n²), twice for a grid.  Differs
    from SparseGPT (arXiv 2301.00774) in the order of the columns, and in the grid.
    """
    w, h = _problem(layer)
    w = np.where(np.diag(h) > 0, w, 0)  # an input that is never active: its weights are free, and go first
    root = _root(damped(h, damping))
    width = block if pattern == UNSTRUCTURED else _parse(pattern)[1]
    prune = lambda rounded: _prune(w, root, width, lambda score: choose(score, kept, pattern), rounded)
    rounded = float16 if value_bits == 16 else row_grid(*prune(lambda x: x), value_bits)
    return _replacement(*prune(rounded), pattern, value_bits)


def _prune(w, root, width, choice, rounded):
    """What becomes of w, and the mask, by ``choice`` for ``width`` columns at once; root is lower triangular."""
    n, scale = w.shape[1], np.diag(root)
    lower = root / scale
    q, mask = w.copy(), np.ones(w.shape, bool)
    for start in reversed(range(0, n, width)):
        stop = min(start + width, n)
        inside = slice(start, stop)
        fed = (w[:, stop:] - q[:, stop:]) @ lower[stop:, inside]
        # where the weights would move if nothing more went: what the columns inside feed each other included
        moved = w[:, inside] + solve_triangular(lower[inside, inside], fed.T, lower=True, trans=1).T
        mask[:, inside] = choice((moved * scale[inside]) ** 2)
        for j in reversed(range(start, stop)):
            target = w[:, j] + fed[:, j - start] + (w[:, j + 1:stop] - q[:, j + 1:stop]) @ lower[j + 1:stop, j]
            q[:, j] = np.where(mask[:, j], rounded(target[:, None])[:, 0], 0)
    return q, mask


def columns(key, layer: Layer, kept: float = 0.5, refit: bool = True, value_bits: int = 16,
            damping: float = 0.01) -> Replacement:
    """The round(kept · n) inputs of largest ‖W_:j‖² H_jj, and which they are (``mask_bits``).

    ``refit``: the weights of the inputs S that stay become W H_:S H_SS⁻¹, the least of tr(E H Eᵀ) given S, which is
    tr(W_G (H_GG − H_GS H_SS⁻¹ H_SG) W_Gᵀ) for those that go; H is damped as in ``sparsegpt``.  What rounding D of them
    adds is tr(D H_SS Dᵀ), and they are rounded in its feedback; without ``refit``, to nearest.  Ranked once and not
    again after each that goes, unlike ZipLM (arXiv 2302.04089).  ``value_bits``: see ``row_grid``.  Errors of
    ``magnitude`` and ``sparsegpt``.  O((m + n) n²).
    """
    w, h = _problem(layer)
    stays = _largest((np.sum(w**2, axis=0) * np.diag(h))[None], _count(kept, w.shape[1]))[0]
    if refit and stays.any():
        h = damped(h, damping)
        inside = h[np.ix_(stays, stays)]
        refitted = cho_solve((_root(inside), True), h[stays] @ w.T).T
        values, bits = sparsegpt(key, Layer(refitted, inside), kept=1.0, value_bits=value_bits, damping=0)
    else:
        values, bits = rounded(w[:, stays], value_bits)
    q = np.zeros(w.shape, np.float32)
    q[:, stays] = values
    return Replacement(q, bits + mask_bits(stays[None]))


def rows(key, layer: Layer, kept: float = 0.5, value_bits: int = 16) -> Replacement:
    """The round(kept · m) outputs of largest energy (W H Wᵀ)_ii, rounded, and which they are (``mask_bits``).

    Nothing can make up for an output inside its own layer.  The norm of a filter (arXiv 1608.08710), in the H-norm.
    ``value_bits``: see ``row_grid``; the outputs that go need no grid.  ValueError where kept is not in (0, 1].
    O(m n²).
    """
    w, h = _problem(layer)
    stays = _largest(np.sum((w @ h) * w, axis=1)[None], _count(kept, len(w)))[0]
    values, bits = rounded(w[stays], value_bits)
    q = np.zeros(w.shape, np.float32)
    q[stays] = values
    return Replacement(q, bits + mask_bits(stays[None]))


METHODS = {
    "magnitude": Method("pruning", magnitude, "1506.02626", data=False, random=False),
    "wanda": Method("pruning", wanda, "2306.11695", data=True, random=False),
    "sparsegpt": Method("pruning", sparsegpt, "2301.00774", data=True, random=False),
    "gradient": Method("pruning", gradient, "1906.10771", data=True, random=False),
    "columns": Method("pruning", columns, "2302.04089", data=True, random=False),
    "rows": Method("pruning", rows, "1608.08710", data=True, random=False),
}


def block_influence(config: LlamaConfig, params: Params,
                    tokens: Int[np.ndarray, "w s"]) -> Float[np.ndarray, " blocks"]:
    """1 − mean cosine over the tokens between the residual streams before and after each block (arXiv 2403.03853).

    One forward pass of w windows of s tokens; in one process.
    """
    streams, found = calibration.embed(config, params, tokens), []
    join = lambda: np.concatenate([shard.reshape(-1, config.dim) for device in streams for shard in device], 0)
    before = join().astype(np.float64)
    for index, block in enumerate(params["blocks"]):
        calibration.run_block(config.at(index), block, streams)
        after = join().astype(np.float64)
        norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
        found.append(1 - np.mean(np.sum(before * after, axis=1) / np.maximum(norms, np.finfo(np.float64).tiny)))
        before = after
    return np.array(found)


def drop_blocks(config: LlamaConfig, params: Params, tokens: Int[np.ndarray, "w s"], count: int,
                value_bits: int = 16) -> tuple[Params, int]:
    """The model without the ``count`` blocks of least ``block_influence``, and the bits of its linear layers.

    Bits: the weights of the blocks that stay as ``stored_block`` has them, and which blocks they are (``mask_bits``):
    with count = 0 those of rounding to nearest.  All are ranked on the whole model at once (ShortGPT, arXiv
    2403.03853).  ``config.layers`` counts the old blocks: replace it where it is read.  ValueError where count is not
    in 0 … layers − 1, and for value_bits other than 16, 8 or 4.
    """
    total = len(params["blocks"])
    if not 0 <= count < total:
        raise ValueError(f"count must be 0 to {total - 1} of the model's {total} blocks, got {count}")
    stays = _largest(block_influence(config, params, tokens)[None], total - count)[0]
    blocks, bits = zip(*(stored_block(params["blocks"][i], value_bits) for i in np.flatnonzero(stays)), strict=True)
    return params | {"blocks": list(blocks)}, sum(bits) + mask_bits(stays[None])


def stored_block(block, value_bits: int) -> tuple[dict[str, np.ndarray], int]:
    """A block with its linear weights rounded to nearest on their ``row_grid``, and their bits."""
    found = {name: rounded(np.asarray(block[name], np.float64), value_bits) for name in llama.LINEARS}
    return dict(block) | {name: w for name, (w, _) in found.items()}, sum(bits for _, bits in found.values())


# ---- which weights stay, and what it costs to say so


def choose(score: Weights, kept: float, pattern: str = UNSTRUCTURED, by_row: bool = False) -> Mask:
    """The weights of largest score >= 0: of the matrix or of each row, or of each group of an n:m pattern.

    Among equals the first.  ValueError for a pattern or a fraction that cannot be.
    """
    if pattern == UNSTRUCTURED:
        groups = score if by_row else score.reshape(1, -1)
        return _largest(groups, _count(kept, groups.shape[1])).reshape(score.shape)
    n, m = _parse(pattern)
    if kept != n / m:
        raise ValueError(f"pattern {pattern} keeps {n / m:g} of the weights, got kept = {kept}: set it to {n / m:g}")
    padded = np.pad(score, ((0, 0), (0, -score.shape[1] % m)), constant_values=-1)
    return _largest(padded.reshape(-1, m), n).reshape(padded.shape)[:, :score.shape[1]]


def mask_bits(mask: Mask, pattern: str = UNSTRUCTURED) -> int:
    """Bits that say which weights stay: the least of the ways that can say it.  None where all stay.

    A bitmap: one a weight.  The number of the choice among all of k of a row's n (enumerative coding, Cover 1973):
    ⌈log2 C(n, k)⌉ a row, and where the rows differ in k, ⌈log2(n + 1)⌉ a row for it.  An n:m pattern: the number of the
    choice, ⌈log2 C(m, n)⌉ a group.  The codes are one stream, which is not padded to bytes, at a row or at its end.
    """
    rows, width = mask.shape
    if mask.all():
        return 0
    counts = Counter(mask.sum(1).tolist())
    lengths = rows * _log2(width + 1) if len(counts) > 1 else 0
    ways = [mask.size, lengths + sum(times * _log2(math.comb(width, k)) for k, times in counts.items())]
    if pattern != UNSTRUCTURED:
        n, m = _parse(pattern)
        ways.append(rows * -(-width // m) * _log2(math.comb(m, n)))
    return min(ways)


def _log2(choices):
    """⌈log2⌉, exactly."""
    return (choices - 1).bit_length()


def _parse(pattern):
    found = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not found or not 0 < int(found[1]) < int(found[2]):
        raise ValueError(f"pattern is 'unstructured' or 'n:m' with 0 < n < m (as '2:4'), got {pattern!r}")
    return int(found[1]), int(found[2])


def _count(kept, size):
    if not 0 < kept <= 1:
        raise ValueError(f"kept is the fraction that stays, above 0 and at most 1; got {kept}")
    return round(kept * size)


def _largest(score, count):
    """Mask of the ``count`` largest of each row."""
    mask = np.zeros(score.shape, bool)
    np.put_along_axis(mask, np.argsort(-score, axis=1, kind="stable")[:, :count], True, axis=1)
    return mask


# ---- values as they are stored


def float16(x: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """x rounded to float16, as float32; ValueError where it does not hold x."""
    x = np.asarray(x, np.float64)
    if not np.abs(x).max(initial=0) < 65520:  # NaN too
        raise ValueError(f"float16 holds finite values up to 65504, got {np.abs(x).max()}: scale the weights")
    return x.astype(np.float16).astype(np.float32)


def row_grid(w: Weights, mask: Mask, bits: int) -> Callable[[Weights], Weights]:
    """The function that rounds [m, c] to what ``bits`` a value hold.

    16: float16.  8 or 4: the nearest of 2^bits equally spaced values between the least and the largest that the mask
    leaves of each row, with step and least value in float16.  ValueError for other bits.
    """
    if bits == 16:
        return float16
    if bits not in (8, 4):
        raise ValueError(f"value_bits is 16, 8 or 4, got {bits}")
    some = mask.any(1, keepdims=True)  # a row with none needs some grid
    low = np.where(some, np.min(w, 1, keepdims=True, where=mask, initial=np.inf), 0)
    high = np.where(some, np.max(w, 1, keepdims=True, where=mask, initial=-np.inf), 0)
    top = 2**bits - 1
    low, step = float16(low), float16((high - low) / top)
    divisor = np.where(step > 0, step, 1)
    return lambda x: low + step * np.clip(np.rint((x - low) / divisor), 0, top).astype(np.float32)


def rounded(w: Weights, value_bits: int) -> tuple[Weights, int]:
    """w to the nearest of its ``row_grid``, as float32, and the bits of its values and grids."""
    return row_grid(w, np.ones(w.shape, bool), value_bits)(w), value_bits * w.size + grid_bits(len(w), value_bits)


def grid_bits(rows: int, value_bits: int) -> int:
    """Bits of the step and the least value of so many rows; float16 needs neither."""
    return 32 * rows if value_bits < 16 else 0


def _stored(w, mask, pattern, value_bits):
    """The weights of the mask, rounded."""
    return _replacement(np.where(mask, row_grid(w, mask, value_bits)(w), 0), mask, pattern, value_bits)


def _replacement(q, mask, pattern, value_bits):
    bits = value_bits * int(mask.sum()) + grid_bits(len(q), value_bits) + mask_bits(mask, pattern)
    return Replacement(q.astype(np.float32), bits)


# ---- the problem


def _problem(layer):
    """(w, h) in float64."""
    return np.asarray(layer.w, np.float64), np.asarray(layer.h, np.float64)


def damped(h: Float[np.ndarray, "n n"], damping: float) -> Float[np.ndarray, "n n"]:
    """h + damping · mean diagonal · I."""
    return h + damping * np.mean(np.diag(h)) * np.eye(len(h))


def _root(h):
    try:
        return np.linalg.cholesky(h)
    except np.linalg.LinAlgError as error:
        raise ValueError("h is not positive definite as it is damped: raise damping (0.01 of the mean diagonal is "
                         "usual), or collect h from more tokens") from error
