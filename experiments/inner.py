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


def place(result: Result) -> str:
    """The layer."""
    config = result["config"]
    return f"{config['model']} {config['block']}.{config['layer']}"


def verdict(results: Sequence[Result]) -> str:
    """How much of the cost of rounding the inner iterations remove."""
    removed: dict[tuple[str, int], list[float]] = {}
    for r in results:
        removed.setdefault((place(r), r["config"]["factor_bits"]), []).append(1 - excess(r)[-1] / excess(r)[0])
    most, seeds = results[0]["config"]["iterations"][-1], len({r["seed"] for r in results})
    rise = max(float(np.max(np.diff(r["trace"]) / r["trace"][0])) for r in results)
    each = "; ".join(f"{layer}, {bits} bits {np.mean(v):.0%} ({min(v):.0%} to {max(v):.0%})"
                     for (layer, bits), v in removed.items())
    return (f"{'holds' if rise < 1e-3 else 'does not hold'} over {seeds} seed(s), and matters on few layers: of what "
            f"rounding L and R adds to the squared error {most} iterations remove (mean, range over ranks and seeds) "
            f"{each}. No count of iterations is worse than a smaller one by more than {max(rise, 0):.0e} of the error.")


def draw(results: Sequence[Result]):
    """A panel a layer: error over the unrounded one against inner iterations."""
    places = list(dict.fromkeys(map(place, results)))
    figure, panels = axes(len(places))
    for panel, layer in zip(panels, places, strict=True):
        for i, bits in enumerate(sorted({r["config"]["factor_bits"] for r in results})):
            for j, rank in enumerate(sorted({r["config"]["rank"] for r in results})):
                chosen = [r for r in results if place(r) == layer
                          and r["config"]["factor_bits"] == bits
                          and r["config"]["rank"] == rank]
                if chosen:
                    over = np.array([np.array(r["trace"]) / r["unrounded"] for r in chosen])
                    panel.plot(chosen[0]["config"]["iterations"], over.mean(0), f"C{i}", marker="o",
                               linestyle=("-", "--", ":")[j], label=f"{bits} bits, k = {rank}")
        panel.set(xlabel="inner iterations", ylabel="error / unrounded error", title=layer, xscale="symlog")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


EXPERIMENT = Experiment("inner", "the error of LPLRFactorize falls over the inner iterations (2405.18886, Fig. 4)",
                        runs, measure, draw, verdict)
