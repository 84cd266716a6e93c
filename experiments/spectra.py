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
    """Energy in the k leading directions against that of white weights, and Q's largest singular value against W's."""
    rank, seeds = results[0]["config"]["caldera"]["rank"], len({r["seed"] for r in results})
    each: dict[tuple[str, str], list[Result]] = {}
    for r in results:
        each.setdefault((r["config"]["model"], r["config"]["layer"]), []).append(r)
    mean = lambda chosen, value: float(np.mean([value(r) for r in chosen]))
    margin = {key: mean(v, lambda r: r["share"] / r["share_white"]) for key, v in each.items()}
    flattened = {key: mean(v, lambda r: r["q"][0] / r["w"][0]) for key, v in each.items()}
    share = lambda v, key: f"{mean(v, lambda r: r[key]):.2f}"
    text = "; ".join(f"{model} {layer} {share(v, 'share')} ({share(v, 'share_white')} white; "
                     f"{share(v, 'share_weighted')} of ‖W H^½‖²)" for (model, layer), v in each.items())
    word = "holds" if min(margin.values()) > 1 else "does not hold"
    return (f"{word} over {seeds} seed(s), weakly in W alone: {rank} directions hold {min(margin.values()):.2f} to "
            f"{max(margin.values()):.2f} times what they hold of white weights; Q's largest singular value "
            f"is {min(flattened.values()):.2f} to {max(flattened.values()):.2f} of W's.\n"
            f"  Shares of ‖W‖²_F: {text}.")


def draw(results: Sequence[Result]):
    """Spectra of the query layers."""
    chosen = [r for r in results if r["config"]["layer"] == "q" and r["seed"] == 0]
    figure, panels = axes(len(chosen))
    for panel, r in zip(panels, chosen, strict=True):
        for i, (key, label) in enumerate((("w", "W"), ("q", "Q"), ("lr", "L R"), ("white", "white W"),
                                          ("weighted", "W H^½"))):
            panel.loglog(np.arange(1, len(r[key]) + 1), r[key], f"C{i}", label=label)
        config = r["config"]
        panel.set(xlabel="index", ylabel="singular value / Frobenius norm", ylim=(1e-4, 1),
                  title=f"{config['model']} {config['block']}.{config['layer']}, k = {config['caldera']['rank']}")
        panel.legend()
    return figure


EXPERIMENT = Experiment("spectra", "weights are close to low rank, and Q and L R share the work: L R holds the large "
                        "directions (2405.18886, Fig. 1)", runs, measure, draw, verdict)
