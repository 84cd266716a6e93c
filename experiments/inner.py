"""Fig. 4 of the paper: the error of LPLRFactorize, W ≈ L R without Q, over its inner iterations."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from machinery import Experiment, Result, axes, layers

from caldera_jax import CalderaConfig, compress_matrix


@dataclass(frozen=True)
class Config:
    """L R of one layer at one precision, for several numbers of inner iterations."""

    model: str
    block: int
    layer: str
    rank: int
    factor_bits: int
    iterations: tuple[int, ...]
    seed: int


def runs(preset: str) -> list[Config]:
    """Layers, ranks and bits; seeds innermost."""
    if preset == "smoke":
        return [Config("tiny-smoke", 0, "q", 4, 4, (0, 2), 0)]
    places = [("smollm2-135m", 14, "q"), ("smollm2-135m", 14, "v"), ("tiny", 2, "q")]
    return [Config(*place, rank, bits, (0, 1, 2, 5, 10, 50), seed) for place in places for rank in (16, 32, 64)
            for bits in (2, 4, 8) for seed in range(3)]


def measure(config: Config) -> Result:
    """Relative errors by number of inner iterations, and that of the unrounded best L R."""
    w, h = layers(config.model, config.block)[config.layer]

    def error(bits: int, iterations: int) -> float:
        chosen = CalderaConfig(rank=config.rank, q_bits=0, factor_bits=bits, inner_iterations=iterations)
        return float(compress_matrix(jax.random.key(config.seed), w, h, chosen)[1].error[0])

    return {"shape": list(w.shape), "trace": [error(config.factor_bits, count) for count in config.iterations],
            "unrounded": _floor(w, h, config.rank)}


def _floor(w: np.ndarray, h: np.ndarray, rank: int) -> float:
    """Least relative error of any L R of this rank (Lemma 4.2)."""
    w, h = np.asarray(w, np.float64), np.asarray(h, np.float64)
    energies = np.clip(np.linalg.eigvalsh(w @ h @ w.T)[::-1], 0, None)
    return float(np.sqrt(energies[rank:].sum() / energies.sum()))


def excess(result: Result) -> np.ndarray:
    """error² / unrounded² − 1 by number of iterations: what rounding costs."""
    return (np.array(result["trace"]) / result["unrounded"]) ** 2 - 1


def verdict(results: Sequence[Result]) -> str:
    """How much of the cost of rounding the inner iterations remove."""
    lines = []
    for bits in sorted({r["config"]["factor_bits"] for r in results}):
        chosen = [r for r in results if r["config"]["factor_bits"] == bits]
        removed = np.array([1 - excess(r)[-1] / excess(r)[0] for r in chosen])
        counts, seeds = chosen[0]["config"]["iterations"], len({r["seed"] for r in chosen})
        ten = np.array([1 - excess(r)[-2] / excess(r)[0] for r in chosen])
        lines.append(f"{bits} bits: {counts[-1]} inner iterations remove {removed.mean():.0%} ({removed.min():.0%} to "
                     f"{removed.max():.0%}) of what rounding adds to the squared error, {counts[-2]} of them "
                     f"{ten.mean():.0%}")
    word = "holds" if all(np.all(np.diff(r["trace"]) <= 1e-6) for r in results) else "holds on average only"
    return f"{word}, over {seeds} seed(s). " + "; ".join(lines) + "."


def draw(results: Sequence[Result]):
    """A panel a layer: error over the unrounded one against inner iterations."""
    name = lambda r: f"{r['config']['model']} {r['config']['block']}.{r['config']['layer']}"
    places = list(dict.fromkeys(map(name, results)))
    figure, panels = axes(len(places))
    for panel, place in zip(panels, places, strict=True):
        for i, bits in enumerate(sorted({r["config"]["factor_bits"] for r in results})):
            for j, rank in enumerate(sorted({r["config"]["rank"] for r in results})):
                chosen = [r for r in results if name(r) == place and r["config"]["factor_bits"] == bits
                          and r["config"]["rank"] == rank]
                if chosen:
                    over = np.array([np.array(r["trace"]) / r["unrounded"] for r in chosen])
                    panel.plot(chosen[0]["config"]["iterations"], over.mean(0), f"C{i}", marker="o",
                               linestyle=("-", "--", ":")[j], label=f"{bits} bits, k = {rank}")
        panel.set(xlabel="inner iterations", ylabel="error / unrounded error", title=place, xscale="symlog")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


EXPERIMENT = Experiment("inner", "the error of LPLRFactorize falls over the inner iterations (2405.18886, Fig. 4)",
                        runs, measure, draw, verdict)
