"""Is the diagonal of the output factor enough?  One level with it, and in the basis of the whole factor.

KL ≈ ½ tr(G E H Eᵀ) for one layer, G [m, m] the second moment of the gradients by its outputs (arXiv 1503.05671); the
package takes diag G alone.  With G = U Λ Uᵀ the rows of Uᵀ W have the importance Λ and no cross terms, so that a level
for Uᵀ W and Λ is the best that whole G allows: at high rate ½ log2 (∏ G_ii / det G) / m bits a weight less (Hadamard's
inequality).  U is not counted, and it is not stored: what is measured here is the most that G could give.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import machinery
import numpy as np
from drawing import axes
from jaxtyping import Float
from machinery import Experiment, Result, decide, with_interval

import caldera_jax as cj
from caldera_jax import LevelConfig
from caldera_jax.jobs import calibration, evaluate
from caldera_jax.models import data, llama
from caldera_jax.models.data import Tokens
from caldera_jax.models.weights import rest
from caldera_jax.objective import importance

LEVEL = LevelConfig()
Factors = dict[tuple[int, str], Float[np.ndarray, "m m"]]


@dataclass(frozen=True)
class Config:
    """G and H from so many windows; these layers of all blocks compressed to so many bits."""

    model: str
    layers: tuple[str, ...]
    bits: float
    windows: int
    window: int
    seed: int


def runs(preset: str) -> list[Config]:
    """Every layer of the tiny model; three seeds, of the labels that are drawn."""
    if preset == "smoke":
        return [Config("tiny-smoke", llama.LINEARS, 4.0, 8, 64, 0)]
    return [Config("tiny", llama.LINEARS, bits, 32, 256, seed) for bits in (2.0, 3.0) for seed in range(3)]


def output_factors(model, tokens: np.ndarray, layers: Sequence[str], h: Factors, seed: int) -> Factors:
    """G = Σ Γ Γᵀ / (tokens tr H) of every layer, Γ the gradient of a window's log-likelihood, labels drawn from the
    model; its diagonal is ``calibration.OutputFisher.importance``."""
    chosen = [{name: np.float32(block[name]) for name in layers} for block in model.params["blocks"]]
    others = rest(model.params)

    def likelihood(chosen, window, key):
        blocks = [dict(block) | own for block, own in zip(model.params["blocks"], chosen, strict=True)]
        logits = llama.forward(model.config, others | {"blocks": blocks}, window[None])[0]
        labels = jax.random.categorical(key, jax.lax.stop_gradient(logits))
        return jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], -1))

    @jax.jit
    @jax.default_matmul_precision("highest")
    def squares(total, chosen, window, key):
        return jax.tree.map(lambda sum_, of: sum_ + of @ of.T, total, jax.grad(likelihood)(chosen, window, key))

    total = jax.tree.map(lambda w: jnp.zeros((len(w), len(w)), w.dtype), chosen)
    for i, window in enumerate(tokens):
        total = squares(total, chosen, window, jax.random.fold_in(jax.random.key(seed), i))
    return {(index, name): np.asarray(g, np.float64) / tokens.size / max(np.trace(h[index, name]), 1e-30)
            for index, block in enumerate(total) for name, g in block.items()}


def basis(factor: str, g: Float[np.ndarray, "m m"]) -> tuple[Float[np.ndarray, "m m"], Float[np.ndarray, " m"]]:
    """U and the importance of its columns: of the outputs themselves, or of G's eigenvectors."""
    if factor == "diagonal":
        return np.eye(len(g)), importance(np.diag(g))
    sizes, u = np.linalg.eigh(g)
    return u, importance(np.maximum(sizes, 0))


def excess(factor: str, ours: Float[np.ndarray, "m m"], theirs: Float[np.ndarray, "m m"]) -> float:
    """½ log2 of the damage that theirs says ours does at equal bits, up to what no factor changes."""
    u, g = basis(factor, ours)
    return float(np.log2(np.mean(np.sum(u * (theirs @ u), axis=0) / g)) + np.mean(np.log2(g))) / 2


def at_bits(compressed: Callable[[float], tuple[int, dict]], weights: int, bits: float, c: float) -> tuple[float, dict]:
    """Bits a weight and what a level finds, as close to these bits as six tries come; at best 0.1 %."""
    tried: list[tuple[float, dict]] = []
    while len(tried) < 6 and not (tried and abs(tried[-1][0] - bits) < 1e-3 * bits):
        stored, found = compressed(c)
        tried.append((stored / weights, found))
        c *= 2.0 ** (stored / weights - bits)
    return min(tried, key=lambda one: abs(one[0] - bits))


def measure(config: Config) -> Result:
    """Divergence with either, at equal bits, and what G from other text says of both."""
    model = machinery.model(config.model)
    text = Tokens("enwiki", config.windows, config.window)
    ours, theirs = (data.windows_beside(model, text, text.text, part)
                    for part in ("calibration", "evaluation"))
    h = {(index, name): np.asarray(moments[llama.INPUT_OF[name]].mean())
         for index, moments in calibration.collect(model.config, model.params, ours) for name in config.layers}
    g, held_out = (output_factors(model, tokens, config.layers, h, config.seed) for tokens in (ours, theirs))
    weights = sum(model.params["blocks"][index][name].size for index, name in h)

    def compressed(bases, c):
        bits, found = 0, {}
        for (index, name), (u, sizes) in bases.items():
            w = np.asarray(model.params["blocks"][index][name], np.float64)
            layer = cj.level(np.float32(u.T @ w), h[index, name], np.float32(sizes), c, LEVEL)
            bits, found[index, name] = bits + layer.stored_bits, np.float32(u @ np.asarray(layer.dense(), np.float64))
        return bits, found

    result: Result = {}
    start = np.sqrt(np.mean([np.mean(np.diag(g[at])) * np.mean(np.diag(h[at])) for at in h])) * 0.02
    for factor in ("diagonal", "full"):
        bases = {at: basis(factor, g[at]) for at in h}
        bits, found = at_bits(partial(compressed, bases), weights, config.bits, start)
        blocks = [dict(block) | {name: found[index, name] for name in config.layers}
                  for index, block in enumerate(model.params["blocks"])]
        base, other, divergence = (float(np.mean(part, dtype=np.float64)) for part in evaluate.compare(
            model.config, model.params, model.params | {"blocks": blocks}, theirs[:32])[:3])
        result[factor] = {"bits_per_weight": bits, "divergence": divergence, "lost": other - base}
    gained = lambda judge: {name: float(np.mean([excess("diagonal", g[at], judge[at]) - excess("full", g[at], judge[at])
                                                 for at in h if at[1] == name])) for name in config.layers}
    return {**result, "bits_saved": gained(g), "bits_saved_on_held_out": gained(held_out)}


def _cells(results: Sequence[Result]) -> Iterator[tuple[str, list[Result]]]:
    titles = [f"{r['config']['model']}, {', '.join(r['config']['layers'])}, {r['config']['bits']:g} bits, "
              f"{r['config']['windows']} windows" for r in results]
    for title in dict.fromkeys(titles):
        yield title, [r for r, own in zip(results, titles, strict=True) if own == title]


def verdict(results: Sequence[Result]) -> str:
    """The ratio of the divergences at equal bits, and the bits that G says the basis saves, on its own text and on
    another."""
    lines = []
    for title, rows in _cells(results):
        ratio = [r["full"]["divergence"] / r["diagonal"]["divergence"] for r in rows]
        saved = [np.mean([np.mean([*r[key].values()]) for r in rows])
                 for key in ("bits_saved", "bits_saved_on_held_out")]
        decided = f", {decide(ratio)}" if len(ratio) > 1 else ""
        lines.append(f"{title}: divergence with the whole factor {with_interval(ratio)} times that with its "
                     f"diagonal{decided}; bits saved by G's own text {saved[0]:.3f}, by other text {saved[1]:.3f}, by "
                     f"the divergence {-np.mean(np.log2(ratio)) / 2:.3f}.")
    return "\n  ".join(lines)


def draw(results: Sequence[Result]):
    """Bits saved in the basis of G, layer by layer: as G says, as G of other text says."""
    cells = list(_cells(results))
    figure, panels = axes(len(cells), 1, height=2.8)
    for panel, (title, rows) in zip(panels, cells, strict=True):
        names = rows[0]["config"]["layers"]
        for key, marker, label in (("bits_saved", "o", "G's own text"), ("bits_saved_on_held_out", "s", "other text")):
            panel.plot(names, [np.mean([r[key][name] for r in rows]) for name in names], marker, label=label)
        saved = [np.log2(r["diagonal"]["divergence"] / r["full"]["divergence"]) / 2 for r in rows]
        panel.axhline(np.mean(saved), color="k", linestyle=":", label="by the divergence, all layers")
        panel.axhline(0, color="0.7", linewidth=0.6)
        panel.set(ylabel="bits a weight", title=title)
        panel.legend()
    return figure


EXPERIMENT = Experiment("output_factor", "the diagonal of the output factor is enough", runs, measure, draw, verdict)
