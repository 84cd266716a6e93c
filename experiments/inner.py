"""Fig. 4 of the paper: the error of LPLRFactorize, W ≈ L R without Q, over its inner iterations.

LPLRFactorize keeps its best pair, so the error cannot rise by more than rounding: what can fail is that it falls.  The
seed varies the rotation; calibration tokens, block and model are fixed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from drawing import axes
from machinery import Experiment, Result, interval, layers
from outer import Found, where

from caldera_jax import CalderaConfig, compress_matrix
from caldera_jax.objective import energies


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
    found = energies(w, h)
    return float(np.sqrt(found[rank:].sum() / found.sum()))


def excess(result: Result) -> np.ndarray:
    """error² / unrounded² − 1 by number of iterations: what rounding costs."""
    return (np.array(result["trace"]) / result["unrounded"]) ** 2 - 1


def place(result: Result) -> str:
    """The layer."""
    config = result["config"]
    return f"{config['model']} {config['block']}.{config['layer']}"


def removed(results: Sequence[Result]) -> dict[int, Found]:
    """Factor bits -> (layer and bits, rank) -> part of the excess that the most iterations remove, by seed."""
    found: dict[int, Found] = {}
    for r in results:
        bits = r["config"]["factor_bits"]
        key = f"{place(r)}, {bits} bits", f"k = {r['config']['rank']}"
        found.setdefault(bits, {}).setdefault(key, []).append(1 - excess(r)[-1] / excess(r)[0])
    return found


def falls(parts: Sequence[float], least: float = 0.01) -> str:
    """Whether at least 1 % is removed, beyond the seeds' interval; surely less does not hold."""
    mean, half = interval(parts)
    return "holds" if mean >= max(least, half) else "does not hold" if mean + half < least else "undecided"


def verdict(results: Sequence[Result]) -> str:
    """What the inner iterations remove of the cost of rounding, 4 bits (Fig. 4) first."""
    most, seeds = results[0]["config"]["iterations"][-1], len({r["seed"] for r in results})
    found = removed(results)
    lines = [f"{bits} bits{' (Fig. 4)' if bits == 4 else ''}: {most} iterations remove part of what rounding L and R "
             f"adds to the squared error: {where(found[bits], falls)}."
             for bits in sorted(found, key=lambda bits: (bits != 4, bits))]
    if nothing := [f"{group}, {item} ({sum(v < 1e-6 for v in values)} of {len(values)} seeds)"
                   for chosen in found.values() for (group, item), values in chosen.items() if min(values) < 1e-6]:
        lines.append(f"The first pair stays the best, and nothing is removed, on {'; '.join(nothing)}.")
    whole: Found = {}
    for r in results:
        if r["config"]["factor_bits"] == 4:
            whole.setdefault((place(r), f"k = {r['config']['rank']}"), []).append(
                1 - r["trace"][-1] / r["trace"][0])
    if whole:
        lines.append(f"4 bits, part by which the error itself falls, at least 1 %: {where(whole, falls)}.")
    lines.append(f"Mean ± half the 95 % interval over {seeds} seed(s) of the rotation; calibration tokens, block and "
                 f"model are fixed.")
    return "\n  ".join(lines)


def draw(results: Sequence[Result]):
    """A panel a layer: the excess of the squared error against inner iterations."""
    places, seeds = list(dict.fromkeys(map(place, results))), len({r["seed"] for r in results})
    figure, panels = axes(len(places))
    counts = results[0]["config"]["iterations"]
    for panel, layer in zip(panels, places, strict=True):
        for i, bits in enumerate(sorted({r["config"]["factor_bits"] for r in results})):
            for j, rank in enumerate(sorted({r["config"]["rank"] for r in results})):
                chosen = [r for r in results if place(r) == layer
                          and r["config"]["factor_bits"] == bits
                          and r["config"]["rank"] == rank]
                if chosen:
                    mean = np.mean([excess(r) for r in chosen], axis=0)
                    panel.plot(counts, mean, f"C{i}", marker="o", linestyle=("-", "--", ":")[j],
                               label=f"{bits} bits, k = {rank}")
        panel.set(xlabel="inner iterations", ylabel="error² / unrounded² − 1", xscale="symlog", yscale="log",
                  title=f"{layer}, mean of {seeds} seed(s)")
        panel.set_xticks(counts, [*map(str, counts)])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


EXPERIMENT = Experiment("inner", "the error of LPLRFactorize falls over the inner iterations (what Fig. 4 of 2405.18886"
                        " shows, with 4 bits)", runs, measure, draw, verdict)
