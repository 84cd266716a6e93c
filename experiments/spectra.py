"""Fig. 1 of the paper: singular values of a weight matrix, and of what Q and L R keep of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from machinery import Experiment, Result, axes, layers

from caldera_jax import CalderaConfig, compress_matrix
from caldera_jax.models import llama


@dataclass(frozen=True)
class Config:
    """One layer and its decomposition."""

    model: str
    block: int
    layer: str
    caldera: CalderaConfig
    seed: int


def runs(preset: str) -> list[Config]:
    """Every layer of a block of either model; seeds innermost."""
    places, rank, seeds = [("tiny-smoke", 0)], 4, 1
    if preset == "full":
        places, rank, seeds = [("smollm2-135m", 14), ("tiny", 2)], 32, 3
    return [Config(*place, layer, CalderaConfig(rank=rank, outer_iterations=15 if preset == "full" else 2,
                                                svd="randomized"), seed)
            for place in places for layer in llama.LINEARS for seed in range(seeds)]


def measure(config: Config) -> Result:
    """Singular values of W, Q, L R and W H^½ over √(‖W‖²_F), ‖W H^½‖_F, and the energy of W's k leading directions."""
    w, h = (np.asarray(a, np.float64) for a in layers(config.model, config.block)[config.layer])
    layer, _ = compress_matrix(jax.random.key(config.seed), np.float32(w), np.float32(h), config.caldera)
    q, left, right = (np.asarray(part, np.float64) for part in layer.rotated())
    values = lambda a: np.linalg.svd(a, compute_uv=False)
    spectrum, white = values(w), values(np.random.default_rng(config.seed).standard_normal(w.shape))
    weighted = np.sqrt(np.clip(np.linalg.eigvalsh(w @ h @ w.T)[::-1], 0, None))[:min(w.shape)]
    share = lambda s: float(np.sum(s[:config.caldera.rank] ** 2) / np.sum(s**2))
    scale = np.linalg.norm(w)
    thin = lambda s: [float(f"{x:.4g}") for x in s]
    return {"shape": list(w.shape), "w": thin(spectrum / scale), "q": thin(values(q) / scale),
            "lr": thin(values(left @ right)[:config.caldera.rank] / scale),
            "white": thin(white / np.linalg.norm(white)), "weighted": thin(weighted / np.linalg.norm(weighted)),
            "share": share(spectrum), "share_white": share(white), "share_weighted": share(weighted)}


def verdict(results: Sequence[Result]) -> str:
    """Energy in the k leading directions against that of white weights, and what Q is left with."""
    rank = results[0]["config"]["caldera"]["rank"]
    each = []
    for layer in llama.LINEARS:
        chosen = [r for r in results if r["config"]["layer"] == layer]
        for model in dict.fromkeys(r["config"]["model"] for r in chosen):
            r = next(r for r in chosen if r["config"]["model"] == model)
            each.append((model, layer, r["share"], r["share_white"], r["share_weighted"]))
    holds = sum(share > 1.5 * white for _, _, share, white, _ in each)
    text = "; ".join(f"{model} {layer} {share:.2f} (white {white:.2f}, weighted by H {weighted:.2f})"
                     for model, layer, share, white, weighted in each)
    return (f"{rank} directions hold more than 1.5 times what they hold of white weights in {holds} of {len(each)} "
            f"layers. Share of ‖W‖²_F: {text}.")


def draw(results: Sequence[Result]):
    """Spectra of the query layers."""
    chosen = [r for r in results if r["config"]["layer"] == "q" and r["seed"] == 0]
    figure, panels = axes(len(chosen))
    for panel, r in zip(panels, chosen, strict=True):
        for i, (key, label) in enumerate((("w", "W"), ("q", "Q"), ("lr", "L R"), ("white", "white W"),
                                          ("weighted", "W H^½"))):
            panel.semilogy(np.arange(1, len(r[key]) + 1), r[key], f"C{i}", label=label)
        config = r["config"]
        panel.set(xlabel="index", ylabel="singular value / Frobenius norm", ylim=(1e-4, 1),
                  title=f"{config['model']} {config['block']}.{config['layer']}, k = {config['caldera']['rank']}")
        panel.legend()
    return figure


EXPERIMENT = Experiment("spectra", "weights are close to low rank, and Q and L R share the work: L R holds the large "
                        "directions (2405.18886, Fig. 1)", runs, measure, draw, verdict)
