"""Tables 1 and 2 of the paper: perplexity against average bits, over ranks and bits of the factors.

And, which is no claim of the paper: whether L R is worth its bits, and what the downdate and passes after LDLQ do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import whole_model
from drawing import axes
from machinery import Experiment, Result, decide, interval, source, with_interval

from caldera_jax import CalderaConfig
from caldera_jax.jobs.compress import compress
from caldera_jax.jobs.settings import RunConfig
from caldera_jax.models.data import Tokens

MEASURED = ("base_perplexity", "compressed_perplexity", "bits_per_weight", "mean_layer_error", "max_layer_error")


@dataclass(frozen=True)
class Config:
    """One compressed model.  It holds names only, so that its hash does not depend on where the model lies."""

    model: str
    caldera: CalderaConfig
    windows: int
    window: int
    seed: int


def runs(preset: str) -> list[Config]:
    """Q alone, ranks and bits of L R beside a 2-bit Q, L R beside 3 and 4 bits, passes, downdate; seeds innermost."""
    if preset == "smoke":
        return [Config("tiny-smoke", CalderaConfig(rank=rank, factor_bits=16, outer_iterations=2, inner_iterations=2,
                                                   svd="randomized"), 8, 64, 0) for rank in (0, 4)]
    settings = [{"rank": 0, "q_bits": bits} for bits in (2, 3, 4)]
    settings += [{"rank": 0, "q_bits": 8, "quantizer": "uniform"}]
    settings += [{"rank": rank, "factor_bits": bits} for bits in (4, 16) for rank in (8, 16, 32, 64)]
    settings += [{"rank": 32, "q_bits": bits} for bits in (3, 4)]
    settings += [{"rank": 32, "refine_passes": 10}]
    settings += [{"rank": 32, "downdate": True, "refine_passes": passes} for passes in (0, 10)]
    return [Config("tiny", CalderaConfig(svd="randomized", **setting), 32, 256, seed)
            for setting in settings for seed in range(3)]


@cache
def moments() -> TemporaryDirectory:
    """Where the Moments are kept until this process ends: calibration runs once for a model."""
    return TemporaryDirectory()


def measure(config: Config) -> Result:
    """Compress the whole model, in a directory that is then dropped; what ``compress`` reports, as ``MEASURED``, and
    as ``trace`` (not in older records) the mean over layers of their errors after each half step."""
    tokens = Tokens(windows=config.windows, window=config.window)
    chosen = RunConfig(source(config.model), config.caldera, tokens, tokens, seed=config.seed, token_cap=0.0)
    with TemporaryDirectory() as folder:
        found = compress(chosen, Path(folder) / "out", Path(moments().name))
    trace = np.mean([row["half_step_errors"] for row in found["layers"]], axis=0).tolist()
    return {name: found[name] for name in MEASURED} | {"trace": trace, "stages": found["seconds"]}


def family(result: Result) -> str:
    """What results on one curve share: all but the rank, or the bits where Q is alone."""
    caldera = result["config"]["caldera"]
    if not caldera["rank"]:
        return "Q alone" if caldera["quantizer"] == "e8p" else f"Q alone, {caldera['quantizer']}"
    passes = f", {caldera['refine_passes']} passes" if caldera["refine_passes"] else ""
    after = ", block after block" if result["config"].get("activations") == "compressed" else ""
    return (f"Q of {caldera['q_bits']} bits, L R of {caldera['factor_bits']}"
            f"{', downdate' if caldera['downdate'] else ''}{passes}{after}")


def setting(result: Result) -> int:
    """The rank; the bits where Q is alone."""
    caldera = result["config"]["caldera"]
    return caldera["rank"] or caldera["q_bits"]


class Curves:
    """Perplexities of one model: family -> setting -> those of all seeds, and the bits per weight likewise."""

    def __init__(self, results: Sequence[Result]):
        self.base = results[0]["base_perplexity"]
        self.seeds = len({r["seed"] for r in results})
        self.rounds = results[0]["config"]["caldera"]["outer_iterations"]
        self.perplexity: dict[str, dict[int, np.ndarray]] = {}
        self.bits: dict[str, dict[int, float]] = {}
        for name in dict.fromkeys(map(family, results)):
            chosen = sorted((r for r in results if family(r) == name), key=lambda r: (setting(r), r["seed"]))
            each = {key: [r for r in chosen if setting(r) == key] for key in dict.fromkeys(map(setting, chosen))}
            self.perplexity[name] = {k: np.array([r["compressed_perplexity"] for r in v]) for k, v in each.items()}
            self.bits[name] = {k: float(np.mean([r["bits_per_weight"] for r in v])) for k, v in each.items()}

    def alone(self, bits: float) -> tuple[np.ndarray, np.ndarray]:
        """Perplexity of the lattice Q alone at so many bits, by seed: an upper and a lower estimate.

        Upper: its logarithm linear between the measured bits, about what layers of two widths would give, taken
        blindly; the curve is convex.  Lower: what the logarithm exceeds the dense model's by, geometric between them,
        as the curve itself bends.  Beyond the last measured bits: that of the last, and the dense model's.
        """
        measured = list(self.bits["Q alone"].values())
        excess = np.log(np.array([*self.perplexity["Q alone"].values()]).T / self.base)  # [seeds, measured bits]
        upper = [np.interp(bits, measured, e) for e in excess]
        lower = [np.exp(np.interp(bits, measured, np.log(np.maximum(e, 1e-9)))) for e in excess]  # 1e-9: dense
        return self.base * np.exp(upper), self.base * np.exp(np.array(lower) * (bits <= max(measured)))

    def title(self) -> str:
        """How it was measured."""
        return f"{self.seeds} seed{'s' * (self.seeds > 1)}, {self.rounds} outer iterations"


def models(results: Sequence[Result]) -> dict[str, Curves]:
    """The model of the results, and beside the full preset SmolLM2-135M, from the reports of ``whole_model.py``.

    Raises ValueError naming a report that is missing, and the command that makes it.
    """
    found = {results[0]["config"]["model"]: Curves(results)}
    if results[0]["preset"] == "full":
        there = [whole_model.record(name) for name in whole_model.RUNS]
        found[there[0]["config"]["model"]] = Curves(there)
    return found


def verdict(results: Sequence[Result]) -> str:
    """For each model a line a claim: bits, ranks, what else was changed, and L R against Q alone at equal bits."""
    lines = [line for name, curves in models(results).items() for line in _verdict(name, curves)]
    return "\n  ".join([*lines, "A seed varies the random rotations (and the start of the randomized SVD): calibration "
                        "draw and evaluation tokens are the same in all. Ratios are paired by seed, ± half their 95 % "
                        "interval; decided where that leaves out 1 and the mean is 1 % from it, so one seed decides "
                        "nothing."])


def _verdict(name: str, curves: Curves) -> list[str]:
    uniform = curves.perplexity.get("Q alone, uniform", {})
    alone = curves.perplexity["Q alone"] | uniform
    lines = [f"{name}: {curves.title()}; dense {curves.base:.2f}."]
    grids = "".join(f" ({bits}: uniform)" for bits in uniform)
    lines += _falls(f"{name}, more bits of Q alone{grids}", "{} to {} bits", alone)
    for part, settings in curves.perplexity.items():
        if part.startswith("Q of 2 bits") and not changed(part):
            lines += _falls(f"{name}, more rank, {part} bits", "k = {} to {}", {0: alone[2], **settings})
    lines += [_judged(f"{name}, {change}: perplexity lower than without", ratios)
              for change, ratios in changes(curves).items()]
    return [*lines, _at_equal_bits(name, curves)] if len(curves.perplexity["Q alone"]) > 1 else lines


def changed(part: str) -> list[str]:
    """What a family with L R does differently from the plain loop, the first of it what it is judged for."""
    return part.split(", ")[2:] if part.startswith("Q of") else []


def changes(curves: Curves) -> dict[str, dict[str, np.ndarray]]:
    """Change -> setting -> perplexity over that of the same without the change, by seed."""
    found = {}
    for part in filter(changed, curves.perplexity):
        first, *others = changed(part)
        reference = curves.perplexity.get(part.replace(f", {first}", ""), {})
        ratios = {f"k = {k}": v / reference[k] for k, v in curves.perplexity[part].items() if k in reference}
        if ratios:
            found[first + (f", both with {', '.join(others)}" if others else "")] = ratios
    return found


def _falls(claim: str, step: str, values: dict[int, np.ndarray]) -> list[str]:
    """Whether each step lowers the perplexity, and all together; nothing where there is one setting."""
    steps = list(dict.fromkeys([*zip(values, list(values)[1:], strict=False), (min(values), max(values))]))
    listed = f"{', '.join(map(str, values))}: {', '.join(f'{v.mean():.2f}' for v in values.values())}"
    ratios = {step.format(a, b): values[b] / values[a] for a, b in steps}
    return [_judged(f"{claim}, {listed}; lower perplexity", ratios)] if len(values) > 1 else []


def _judged(claim: str, ratios: dict[str, np.ndarray]) -> str:
    """Where ratios are below 1, above it, and neither."""
    return _sorted(claim, {key: (decide(r), with_interval(r)) for key, r in ratios.items()})


def _sorted(claim: str, each: dict[str, tuple[str, str]]) -> str:
    """The claim, and on which settings it holds (lower), does not (higher) and is undecided, with their margins."""
    words = {"lower": "holds on", "higher": "does not hold on", "undecided": "undecided on"}
    named = {word: ", ".join(f"{key}: {margin}" for key, (found, margin) in each.items() if found == side)
             or "none" * (side == "lower") for side, word in words.items()}
    return f"{claim}: {'; '.join(f'{word} {keys}' for word, keys in named.items() if keys)}."


def _at_equal_bits(name: str, curves: Curves) -> str:
    """Every setting with L R over Q alone at the same bits: worth them below both estimates, not worth above both."""
    each = {}
    for part, settings in curves.perplexity.items():
        if part.startswith("Q of") and "block after block" not in part:  # Q alone was not run block after block
            for k, values in settings.items():
                bits = curves.bits[part][k]
                ratios = [values / estimate for estimate in curves.alone(bits)]
                sides = {decide(r) for r in ratios}
                each[f"{part}, k = {k}, {bits:.2f} bits"] = (
                    sides.pop() if len(sides) == 1 else "undecided", " / ".join(map(with_interval, ratios)))
    measured = ", ".join(map(str, curves.bits["Q alone"]))
    return _sorted(f"{name}, L R is worth its bits: perplexity below both estimates of Q alone's at equal bits (ratio "
                   f"to the upper, mixing layers: its logarithm linear between {measured} bits / to the lower, as the "
                   "curve bends: geometric in the excess over dense, and dense beyond the last; no model of mixed bits "
                   "was measured here)", each)


def draw(results: Sequence[Result]):
    """A panel a model, mean and range over the seeds, where a family looks the same in all; and what was changed, at
    the bits of the loop without the change."""
    found = models(results)
    beside = {f"{name}\n{change}\n{k}": ratios for name, curves in found.items()
              for change, each in changes(curves).items() for k, ratios in each.items()}
    families = list(dict.fromkeys(part for curves in found.values() for part in curves.perplexity if not changed(part)))
    figure, panels = axes(len(found) + bool(beside), height=3.6)
    handles = {}
    for panel, (name, curves) in zip(panels, found.items(), strict=False):
        handles |= _draw_model(panel, curves, families)
        panel.set_title(f"{name}: {curves.title()}")
    if beside:
        _draw_changes(panels[-1], beside)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(panels))
    return figure


def _draw_model(panel, curves: Curves, families: list[str]) -> dict[str, Any]:
    """Every family, and between the measured bits of Q alone its two estimates; the legend's handles."""
    handles = {"dense": panel.axhline(curves.base, color="0.5", linestyle="--")}
    for i, part in ((i, part) for i, part in enumerate(families) if part in curves.perplexity):
        values, bits = list(curves.perplexity[part].values()), list(curves.bits[part].values())
        mean, low, high = (np.array([f(v) for v in values]) for f in (np.mean, np.min, np.max))
        line = "-" if len(values) > 1 and part != "Q alone" else "none"
        handles[part] = panel.errorbar(bits, mean, [mean - low, high - mean], color=f"C{i}", marker="osD^v"[i % 5],
                                       capsize=2, linestyle=line)
        if part == "Q alone" and len(bits) > 1:
            between = np.linspace(min(bits), max(bits), 200)
            upper, lower = np.mean([curves.alone(at) for at in between], axis=2).T
            handles["Q alone, estimates between"] = panel.fill_between(
                between, lower, upper, color=f"C{i}", alpha=0.3, linewidth=0)
    panel.set(xlabel="stored bits per weight", ylabel="perplexity", xscale="log", yscale="log")
    low, high = panel.get_xlim()
    ticks = [t for t in (2, 2.5, 3, 3.5, 4, 5, 6, 8, 10) if low <= t <= high]
    panel.set_xticks(ticks, [f"{t:g}" for t in ticks])
    panel.set_xticks([], minor=True)
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")
    return handles


def _draw_changes(panel, beside: dict[str, np.ndarray]) -> None:
    """A row a change."""
    mean, half = np.array([interval(r) for r in beside.values()]).T
    panel.errorbar(mean, -np.arange(len(mean)), xerr=np.where(np.isfinite(half), half, 0), fmt="ko", capsize=2)
    panel.axvline(1, color="0.5", linestyle="--")
    panel.set_yticks(-np.arange(len(mean)), beside)
    panel.set(xlabel="perplexity over that without the change", ylim=(0.4 - len(mean), 0.6),
              title="mean and 95 % interval; no interval: one seed")


EXPERIMENT = Experiment("perplexity", "perplexity falls with rank (2405.18886, Tables 1 and 2) and bits; beyond the "
                        "paper: L R beside a 2-bit Q is worth its bits", runs, measure, draw, verdict)
