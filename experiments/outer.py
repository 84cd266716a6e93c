"""Fig. 3 of the paper: error by outer iteration, with and without downdate and rotation, over ranks and factor bits.

The seed varies what the key of ``compress_matrix`` does: rotation, start of the subspace iteration, quantizer keys.
Calibration tokens, block and model are fixed, so intervals over seeds say nothing about other texts or layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import jax
import numpy as np
from drawing import axes
from machinery import Experiment, Result, decide, layers, with_interval

from caldera_jax import CalderaConfig, compress_matrix

VARIANTS = {"plain": {}, "10 passes": {"refine_passes": 10}, "downdate": {"downdate": True},
            "downdate, 10 passes": {"downdate": True, "refine_passes": 10}, "no rotation": {"rotation": "none"},
            "no rotation, downdate, 10 passes": {"rotation": "none", "downdate": True, "refine_passes": 10}}
REFERENCES = {"downdate": "plain", "downdate, 10 passes": "10 passes", "no rotation": "plain",
              "no rotation, downdate, 10 passes": "downdate, 10 passes"}
CLAIMS = {"rank": ("the error falls with rank (over that of the rank before)", "lower"),
          "rounds": ("the outer iterations lower it (the last round's better half step over the first's)", "lower"),
          "downdate": ("the downdate lowers it", "lower"),
          "downdate, 10 passes": ("the downdate lowers it, both with ten passes after LDLQ", "lower"),
          "no rotation": ("leaving the rotation out raises it", "higher"),
          "no rotation, downdate, 10 passes": ("so it does with downdate and ten passes", "higher")}
TICKS = (0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.14, 0.2, 0.3)
Found = dict[tuple[str, str], list[float]]  # (group, item) -> values by seed


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


def ratios(results: Sequence[Result]) -> dict[str, Found]:
    """Part of the claim -> (layer and factor bits, rank) -> ratios of errors, paired by seed.

    "rank": the plain loop over that of the next smaller rank.  "rounds": the better half step of its last round over
    that of its first, where only the second half step has both parts.  Variants: over their own reference.
    """
    known = {(*setting(r), r["seed"]): r for r in results}
    ranks = sorted({rank for _, variant, rank, _, _ in known if variant == "plain"})
    found: dict[str, Found] = {part: {} for part in CLAIMS}
    for (layer, variant, rank, bits, seed), r in known.items():
        key = f"{layer}, {bits}-bit factors" if rank else f"{layer}, Q alone", f"k = {rank}"
        if variant in REFERENCES:
            reference = known[layer, REFERENCES[variant], rank, bits, seed]
            found[variant].setdefault(key, []).append(r["error"] / reference["error"])
        elif variant == "plain" and rank:
            below = ranks[ranks.index(rank) - 1]
            before = known[layer, "plain", below, bits if below else 4, seed]
            found["rank"].setdefault(key, []).append(r["error"] / before["error"])
            found["rounds"].setdefault(key, []).append(min(r["trace"][-2:]) / r["trace"][1])
    return {part: chosen for part, chosen in found.items() if chosen}


def side(values: Sequence[float], wanted: str) -> str:
    """Whether ratios are "lower" or "higher" than 1 as wanted, the opposite, or undecided."""
    found = decide(values)
    return found if found == "undecided" else "holds" if found == wanted else "does not hold"


def where(found: Found, judge: Callable[[Sequence[float]], str]) -> str:
    """Where a part of a claim holds, where it does not and where that is undecided, each with its margin: a mean and
    half its 95 % interval, or a value that is the same for every seed."""
    sides: dict[str, dict[str, list[str]]] = {"holds": {}, "does not hold": {}, "undecided": {}}
    for (group, item), values in found.items():
        text = with_interval(values) if len(values) == 1 or np.ptp(values) else f"{values[0]:.3f}"
        sides[judge(values)].setdefault(group, []).append(f"{item} {text}")
    return "; ".join(
        f"{word} on {sum(map(len, groups.values()))} of {len(found)}: "
        + ", ".join(f"{group} ({', '.join(items)})" for group, items in groups.items())
        for word, groups in sides.items() if groups)


def verdict(results: Sequence[Result]) -> str:
    """A sentence for each part of the claim: where it holds, by what ratio of errors."""
    lines = [f"{CLAIMS[part][0]}: {where(found, lambda values, part=part: side(values, CLAIMS[part][1]))}."
             for part, found in ratios(results).items()]
    seeds = len({r["seed"] for r in results})
    lines.append(f"Ratios of errors: mean ± half the 95 % interval over {seeds} seed(s), which vary rotation, subspace "
                 f"start and quantizer keys; calibration tokens, block and model are fixed.")
    alone: dict[str, list[float]] = {}
    for r in results:
        if setting(r)[1:3] == ("no rotation", 0):
            alone.setdefault(setting(r)[0], []).append(r["error"])
    if fixed := [f"{layer} {e[0]:.3f}" for layer, e in alone.items() if len(e) > 1 and len(set(e)) == 1]:
        lines.append(f"Q alone without rotation does not depend on the seed (error on {', '.join(fixed)}): the "
                     f"interval of its ratio is that of the rotated one.")
    return "\n  ".join(lines)


def draw(results: Sequence[Result]):
    """A row for each layer and number of factor bits, a panel for each rank, without and with ten passes: mean traces,
    a dot at the least."""
    names = list(dict.fromkeys(setting(r)[0] for r in results))
    ranks, bits = (sorted({setting(r)[i] for r in results if setting(r)[2]}) for i in (2, 3))
    passes = sorted({"10 passes" in setting(r)[1] for r in results})
    seeds, labels = len({r["seed"] for r in results}), {}
    figure, panels = axes(len(passes) * len(ranks), len(names) * len(bits), 2.0)
    figure.set_figwidth(max(6, 2.7 * len(passes) * len(ranks)))
    for panel, (layer, b, refined, rank) in zip(panels, product(names, bits, passes, ranks), strict=True):
        levels = []
        for i, variant in enumerate(VARIANTS):
            traces = [r["trace"] for r in results if setting(r) == (layer, variant, rank, b)]
            if traces and ("10 passes" in variant) == refined:
                mean = np.mean(traces, axis=0)[1:]  # from where both parts are there
                rounds, best = np.arange(len(mean)) / 2 + 1, mean.argmin()
                turned = "no rotation" not in variant  # or wide and pale: on tiny they lie beneath the rotated ones
                panel.semilogy(rounds, mean, f"C{i}", linewidth=0.8 if turned else 2.5, alpha=1 if turned else 0.4,
                               zorder=2 if turned else 1.9, label=variant)
                panel.plot(rounds[best], mean[best], f"C{i}o", markersize=5 if turned else 8, zorder=3,
                           markerfacecolor=f"C{i}" if turned else "none")
                levels.extend(mean[1:] if "downdate" in variant else mean)  # its first Q awaits L R
        for variant, color in (("plain", "0.3"), ("no rotation", "0.7")):
            levels.append(np.mean([r["error"] for r in results if setting(r)[:3] == (layer, variant, 0)]))
            panel.axhline(levels[-1], color=color, linewidth=0.8, label=f"Q alone, {variant}")
        low, high = 0.9 * min(levels), 1.1 * max(levels)
        ticks = [t for t in TICKS if low <= t <= high]
        panel.set_yticks(ticks, [f"{t:g}" for t in ticks])
        panel.minorticks_off()
        panel.set(xlabel="outer iteration", ylabel="relative error", ylim=(low, high),
                  title=f"{layer}, k = {rank}\n{b}-bit L R, {10 * refined} passes, mean of {seeds} seed(s)")
        labels |= {line.get_label(): line for line in panel.get_lines() if not line.get_label().startswith("_")}
    labels["least of the mean"], = panels[0].plot([], [], "o", color="0.5", markersize=5)
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=5)
    return figure


EXPERIMENT = Experiment(
    "outer", "the error falls over the outer iterations, with rank, with the downdate and with the rotation (what Fig. "
    "3 of 2405.18886 shows, on LLaMA-2 7B at ranks 64, 128, 256)", runs, measure, draw, verdict)
