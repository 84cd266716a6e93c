"""Fig. 3 of the paper: error by outer iteration, with and without downdate and rotation, over ranks and factor bits."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from machinery import Experiment, Result, axes, layers

from caldera_jax import CalderaConfig, compress_matrix

VARIANTS = {"plain": {}, "downdate": {"downdate": True}, "downdate, 10 passes": {"downdate": True, "refine_passes": 10},
            "no rotation": {"rotation": "none"}}


@dataclass(frozen=True)
class Config:
    """One run of the loop on one layer."""

    model: str
    block: int
    layer: str
    variant: str
    caldera: CalderaConfig
    seed: int


def runs(preset: str) -> list[Config]:
    """Rank 0 with and without rotation, then every rank, factor bits and variant; seeds innermost."""
    full = preset == "full"
    where = [("tiny-smoke", 0, "q")]
    if full:
        where = [("smollm2-135m", 14, "q"), ("smollm2-135m", 14, "v"), ("tiny", 2, "q")]
    ranks, bits, seeds = ((16, 32, 64), (4, 16), 3) if full else ((4,), (4,), 1)
    settings = [("plain", 0, 4), ("no rotation", 0, 4)] + [
        (variant, rank, b) for rank in ranks for b in bits for variant in VARIANTS]
    if not full:
        settings = [s for s in settings if "10" not in s[0]]
    return [Config(*place, variant, CalderaConfig(
        rank=rank, factor_bits=b, outer_iterations=15 if full else 2, inner_iterations=10 if full else 2,
        svd="randomized", **VARIANTS[variant]), seed) for place in where for variant, rank, b in settings
        for seed in range(seeds)]


def measure(config: Config) -> Result:
    """The trace of ``compress_matrix``: relative errors against the undamped H after each half step, and the least."""
    w, h = layers(config.model, config.block)[config.layer]
    layer, trace = compress_matrix(jax.random.key(config.seed), w, h, config.caldera)
    errors = np.asarray(trace.error, np.float64)
    return {"shape": list(w.shape), "bits_per_weight": layer.stored_bits / w.size, "trace": errors.tolist(),
            "error": float(errors[1:].min() if config.caldera.rank else errors[0])}


def setting(result: Result) -> tuple[str, str, int, int]:
    """(layer, variant, rank, factor bits)."""
    config = result["config"]
    return (f"{config['model']} {config['block']}.{config['layer']}", config["variant"], config["caldera"]["rank"],
            config["caldera"]["factor_bits"])


def ratios(results: Sequence[Result]) -> dict[tuple[str, str, int], np.ndarray]:
    """Error over that of the plain loop at the same layer, rank, factor bits and seed: (variant, layer, bits) -> all of
    them; and of the plain loop over rank 0 as "rank", over its first round as "rounds"."""
    known = {(*setting(r), r["seed"]): r["error"] for r in results}
    first = {(setting(r)[0], *setting(r)[2:], r["seed"]): r["trace"][1] for r in results
             if setting(r)[1] == "plain" and setting(r)[2]}
    out: dict[tuple[str, str, int], list[float]] = {}
    for (layer, variant, rank, bits, seed), error in known.items():
        if variant != "plain":
            out.setdefault((variant, layer, bits if rank else 0), []).append(
                error / known[layer, "plain", rank, bits, seed])
        elif rank:
            out.setdefault(("rank", layer, bits), []).append(error / known[layer, "plain", 0, 4, seed])
            out.setdefault(("rounds", layer, bits), []).append(error / first[layer, rank, bits, seed])
    return {key: np.array(values) for key, values in out.items()}


def verdict(results: Sequence[Result]) -> str:
    """A line for each claim of the figure."""
    found = ratios(results)
    lines = []
    for variant, claim in (("rank", "L R lowers the error of Q alone"), ("rounds", "the outer iterations lower it"),
                           ("downdate", "the downdate lowers the error"),
                           ("downdate, 10 passes", "so it does with ten passes after LDLQ"),
                           ("no rotation", "leaving the rotation out raises it")):
        chosen = {key: v for key, v in found.items() if key[0] == variant}
        if not chosen:
            continue
        sides = [v.mean() > 1 if variant == "no rotation" else v.mean() < 1 for v in chosen.values()]
        word = "holds" if all(sides) else "does not hold" if not any(sides) else "depends"
        each = "; ".join(f"{layer}, {f'{bits}-bit factors' if bits else 'Q alone'} {v.mean():.3f} ({v.min():.3f} to "
                         f"{v.max():.3f})" for (_, layer, bits), v in chosen.items())
        lines.append(f"{claim}: {word}. Ratio of errors, mean and range over ranks and seeds: {each}.")
    return "\n  ".join(lines)


def draw(results: Sequence[Result]):
    """A panel for each layer and number of factor bits."""
    places = list(dict.fromkeys((setting(r)[0], setting(r)[3]) for r in results if setting(r)[2]))
    figure, panels = axes(len({bits for _, bits in places}), len({layer for layer, _ in places}))
    for panel, (layer, bits) in zip(panels, places, strict=True):
        for i, variant in enumerate(VARIANTS):
            chosen = [r for r in results if setting(r)[:2] == (layer, variant) and setting(r)[3] == bits]
            for j, rank in enumerate(sorted({setting(r)[2] for r in chosen} - {0})):
                traces = np.array([r["trace"] for r in chosen if setting(r)[2] == rank])
                steps, best = np.arange(1, traces.shape[1]) / 2 + 0.5, np.minimum.accumulate(traces[:, 1:], axis=1)
                panel.semilogy(steps, best.mean(0), f"C{i}", linestyle=("-", "--", ":")[j],
                               label=f"{variant}, k = {rank}")
        for variant, color in (("plain", "0.3"), ("no rotation", "0.7")):
            alone = [r["error"] for r in results if setting(r)[:3] == (layer, variant, 0)]
            panel.axhline(np.mean(alone), color=color, linewidth=0.8, label=f"Q alone, {variant}")
        panel.set(xlabel="outer iteration", ylabel="best relative error so far", title=f"{layer}, {bits}-bit factors")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


EXPERIMENT = Experiment(
    "outer", "the error falls over the outer iterations, with rank, with the downdate and with the rotation "
    "(2405.18886, Fig. 3)", runs, measure, draw, verdict)
