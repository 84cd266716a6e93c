"""What ``page`` shows of a compressed model: bits, spectra, error and channels by layer, losses by token."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from caldera_jax import incoherence, kernels, levels
from caldera_jax.jobs import evaluate, explain
from caldera_jax.levels import Levelled
from caldera_jax.linear import CompressedLinear, size
from caldera_jax.models import data, files, llama

PARTS = ("codes of Q", "codes of L", "codes of R", "scales", "rotation", "trained factors")
WINDOWS = 8  # of text that are read


class LayerFacts(NamedTuple):
    """What is kept of a layer W [m, n] ≈ Q + L R with H = Σ λᵢ vᵢ vᵢᵀ, λ falling.  E = Q + L R − W."""

    path: str
    block: int
    kind: str  # of ``llama.LINEARS``
    weights: int
    rank: int
    bits: dict[str, int]  # by part; their sum is stored_bits
    loss: Float[np.ndarray, " n"]  # λᵢ ‖E vᵢ‖², whose sum is tr(E H Eᵀ)
    energy: Float[np.ndarray, " n"]  # λᵢ ‖W vᵢ‖²
    diagonal: Float[np.ndarray, " n"]  # Hⱼⱼ over its median
    taken: Float[np.ndarray, " n"]  # ‖L R eⱼ‖² / ‖W eⱼ‖²; NaN where W eⱼ = 0
    spectra: dict[str, np.ndarray]  # singular values over ‖W H^½‖_F by what they are of; empty but for the examples

    @property
    def name(self) -> str:
        """Within the block: its kind and, of an expert, the number."""
        return self.path.split(".")[2]

    @property
    def error(self) -> float:
        """sqrt(tr(E H Eᵀ) / tr(W H Wᵀ))."""
        energy = self.energy.sum()
        return math.sqrt(max(self.loss.sum(), 0.0) / energy) if energy > 0 else 0.0


class TextFacts(NamedTuple):
    """Held-out windows, the text of each token, and the loss in nats of each but a window's first."""

    pieces: list[list[str]]
    base: Float[np.ndarray, "w s-1"]
    compressed: Float[np.ndarray, "w s-1"]


def measure(directory: Path, moments: Path | None = None) -> list[LayerFacts]:
    """The facts of every compressed layer, in order; raises as ``explain.layers``."""
    chosen = examples(explain.report_of(directory)["layers"])
    found, h, eigen = [], None, (np.empty(0), np.empty((0, 0)))
    for path, layer, w, own, _ in explain.layers(directory, moments):
        if h is None or not np.array_equal(own, h):  # q, k, v share theirs, and so do gate, up
            h, (values, vectors) = own, np.linalg.eigh(own)
            eigen = values[::-1], vectors[:, ::-1]
        found.append(of_layer(path, layer, w, h, eigen, path in chosen))
    return found


def of_layer(path: str, layer: CompressedLinear, w: Float[np.ndarray, "m n"], h: Float[np.ndarray, "n n"],
             eigen: tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n n"]], spectra: bool) -> LayerFacts:
    """The facts of one layer; ``eigen``: λ falling and the vᵢ in columns.  Host function, O(m n²)."""
    with jax.enable_x64(True), kernels.use("jax"):
        q, low_rank = (np.asarray(part) for part in _parts(layer))
    (values, vectors), e = eigen, q + low_rank - w
    along = lambda a: values * np.sum((a @ vectors) ** 2, axis=0)
    energy, diagonal, of_w = along(w), np.diag(h), np.sum(w**2, axis=0)
    active = diagonal[diagonal > 0]
    taken = np.divide(np.sum(low_rank**2, axis=0), of_w, out=np.full(len(of_w), np.nan), where=of_w > 0)
    singular = {}
    if spectra and energy.sum() > 0:  # A H^½ V has those of A H^½
        root, norm = vectors * np.sqrt(np.clip(values, 0, None)), math.sqrt(energy.sum())
        singular = {name: np.linalg.svd(a @ root, compute_uv=False) / norm
                    for name, a in (("W", w), ("Q", q), ("L R", low_rank), ("E", e)) if a.any()}
    _, block, name = path.split(".")
    return LayerFacts(path, int(block), llama.kind_of(name), w.size, layer.rank, bits_of(layer), along(e), energy,
                      diagonal / (np.median(active) if len(active) else 1.0), taken, singular)


@jax.jit
def _parts(layer):
    """Q and L R in the caller's basis, float64; zeros for a part that is off."""
    q, left, right = (None if part is None else part.astype(jnp.float64) for part in layer.rotated())
    sides, none = layer.sides(jnp.float64), jnp.zeros(layer.shape, jnp.float64)
    return (none if q is None else incoherence.undo(sides, q),
            none if left is None else incoherence.undo(sides, left @ right))


def bits_of(layer: CompressedLinear) -> dict[str, int]:
    """Stored bits by PARTS, whose sum is ``stored_bits``."""
    codes = [0 if part is None else levels.encode(part, grid.states).integers.stored_bits
             if isinstance(part, Levelled) else size(part.codes)
             for part, grid in zip((layer.q, layer.left_t, layer.right), layer.grids, strict=True)]
    *parts, sides, trained = layer.bits_of_parts()
    return dict(zip(PARTS, (*codes, sum(parts) - sum(codes), sides, trained), strict=True))


def examples(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """path -> why: the layers of the largest and of the smallest error, and the first of the largest others."""
    size, error = lambda row: math.prod(row["shape"]), lambda row: row["error"]
    worst, best = max(rows, key=error), min(rows, key=error)
    others = [row for row in rows if row is not worst and row is not best]
    return {worst["path"]: "the largest", best["path"]: "the smallest"} | (
        {max(others, key=size)["path"]: "a large layer"} if others else {})


def read_text(directory: Path) -> TextFacts:
    """The first WINDOWS windows of the run's evaluation text and their losses under both models.

    Raises ValueError where the model or the text is not, or no longer, the run's.
    """
    run, config, base, compressed = explain.opened(directory)
    theirs = config.evaluation
    tokens = data.windows_beside(base, theirs, config.calibration.text, "evaluation", config.bos)
    if files.sha256(tokens) != run["evaluation_sha256"]:
        raise ValueError(f"the evaluation text {theirs.text!r} has changed since the run: put the old one back")
    windows = tokens[:WINDOWS]
    losses = (np.asarray(evaluate.token_losses(model.config, model.params, windows, title=title), np.float64)
              for model, title in ((base, "base losses"), (compressed, "compressed losses")))
    return TextFacts([pieces(base.tokenizer, window) for window in windows], *losses)


def pieces(tokenizer, tokens: Int[np.ndarray, " s"]) -> list[str]:
    """The text that each token adds (decoded alone, some lose their blank); U+FFFD for a part of a character."""
    def decode(i, j):
        return tokenizer.decode(tokens[max(i, 0):j].tolist(), skip_special_tokens=False)

    def piece(i):
        before, after = decode(i - 4, i).rstrip("\ufffd"), decode(i - 4, i + 1)
        return after[len(before):] if after.startswith(before) else decode(i, i + 1)

    return [piece(i) for i in range(len(tokens))]
