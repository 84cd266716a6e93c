"""Tables 1 and 2 of the paper: perplexity against average bits, over ranks and bits of the factors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import machinery
import numpy as np
from machinery import Experiment, Result, axes, source

from caldera_jax import CalderaConfig, files
from caldera_jax.compress import RunConfig, Tokens, compress

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
    """Q alone, ranks and bits of L R beside a 2-bit Q, L R beside 3 and 4 bits, the downdate; seeds innermost."""
    if preset == "smoke":
        return [Config("tiny-smoke", CalderaConfig(rank=rank, factor_bits=16, outer_iterations=2, inner_iterations=2,
                                                   svd="randomized"), 8, 64, 0) for rank in (0, 4)]
    settings = [{"rank": 0, "q_bits": bits} for bits in (2, 3, 4)]
    settings += [{"rank": 0, "q_bits": 8, "quantizer": "uniform"}]
    settings += [{"rank": rank, "factor_bits": bits} for bits in (4, 16) for rank in (8, 16, 32, 64)]
    settings += [{"rank": 32, "q_bits": bits} for bits in (3, 4)]
    settings += [{"rank": 32, "downdate": True, "refine_passes": passes} for passes in (0, 10)]
    return [Config("tiny", CalderaConfig(svd="randomized", **setting), 32, 256, seed)
            for setting in settings for seed in range(3)]


@cache
def moments() -> TemporaryDirectory:
    """Where the Moments are kept until this process ends: calibration runs once for a model."""
    return TemporaryDirectory()


def measure(config: Config) -> Result:
    """Compress the whole model, in a directory that is then dropped; what ``compress`` reports, as ``MEASURED``."""
    tokens = Tokens(windows=config.windows, window=config.window)
    chosen = RunConfig(source(config.model), config.caldera, tokens, tokens, seed=config.seed)
    with TemporaryDirectory() as folder:
        found = compress(chosen, Path(folder) / "out", Path(moments().name))
    return {name: found[name] for name in MEASURED} | {"stages": found["seconds"]}


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
        self.perplexity: dict[str, dict[int, np.ndarray]] = {}
        self.bits: dict[str, dict[int, float]] = {}
        for name in dict.fromkeys(map(family, results)):
            chosen = [r for r in results if family(r) == name]
            each = {key: [r for r in chosen if setting(r) == key] for key in sorted(set(map(setting, chosen)))}
            self.perplexity[name] = {k: np.array([r["compressed_perplexity"] for r in v]) for k, v in each.items()}
            self.bits[name] = {k: float(np.mean([r["bits_per_weight"] for r in v])) for k, v in each.items()}

    def alone(self, bits: float) -> float:
        """Perplexity of the lattice Q alone at so many bits: its logarithm linear between 2, 3 and 4 bits, about what
        mixing them over the layers would give; beyond the last of them that of the last."""
        known = self.perplexity["Q alone"]
        return float(np.exp(np.interp(bits, list(self.bits["Q alone"].values()),
                                      [np.log(v.mean()) for v in known.values()])))


def models(results: Sequence[Result]) -> dict[str, Curves]:
    """The model of the results, and SmolLM2-135M from the reports of ``whole_model.py`` that are there."""
    there = [files.read_json(path) for path in sorted(machinery.RESULTS.glob("whole_model_*.json"))]
    found = {results[0]["config"]["model"]: Curves(results)}
    return found | ({there[0]["config"]["model"]: Curves(there)} if there else {})


def verdict(results: Sequence[Result]) -> str:
    """For each model: the order of the bits and of the ranks, the downdate, and rank against Q alone at equal bits."""
    return "\n  ".join(line for name, curves in models(results).items() for line in _verdict(name, curves))


def _verdict(name: str, curves: Curves) -> list[str]:
    listed = lambda values: ", ".join(f"{v.mean():.2f}" for v in values)
    alone = {bits: v for part in ("Q alone", "Q alone, uniform") for bits, v in curves.perplexity.get(part, {}).items()}
    lines = [f"{name}, {curves.seeds} seed(s), dense {curves.base:.2f}. Q alone at {', '.join(map(str, alone))} bits: "
             f"{listed(alone.values())}{_ordered(list(alone.values()), 'more bits')}."]
    for part in (p for p in curves.perplexity if p.startswith("Q of 2 bits")):
        plain, _, changed = part.partition(", L R of ")[2].partition(", ")
        reference = curves.perplexity.get(f"Q of 2 bits, L R of {plain}", {})
        if not changed:
            ranks = {0: alone[2], **reference}
            lines.append(f"{name}, {part} bits, rank {', '.join(map(str, ranks))}: {listed(ranks.values())}"
                         f"{_ordered(list(ranks.values()), 'more rank')}.")
        elif both := [k for k in curves.perplexity[part] if k in reference]:
            lines.append(f"{name}, {changed}: " + ", ".join(
                f"{curves.perplexity[part][k].mean() / reference[k].mean():.3f} times the perplexity of the plain loop "
                f"at k = {k}, {plain}-bit factors" for k in both) + ".")
    return lines + ([_at_equal_bits(name, curves)] if len(curves.perplexity["Q alone"]) > 1 else [])


def _ordered(values: Sequence[np.ndarray], what: str) -> str:
    """Whether every perplexity of a setting is below every one of the setting before."""
    if len(values) < 2:
        return ""
    holds = sum(after.max() < before.min() for before, after in zip(values, values[1:], strict=False))
    any_seed = ", whatever the seeds" if len(values[0]) > 1 else ""
    return f" ({what}, lower perplexity in {holds} of {len(values) - 1} steps{any_seed})"


def _at_equal_bits(name: str, curves: Curves) -> str:
    """Every setting with L R over Q alone at the same bits; beyond the bits of Q alone, L R can lose but not win."""
    bits = {(part, k): value for part, values in curves.bits.items() for k, value in values.items()
            if part.startswith("Q of") and "block after block" not in part}  # Q alone was not run block after block
    ratios = {key: curves.perplexity[key[0]][key[1]].mean() / curves.alone(value) for key, value in bits.items()}
    most = max(curves.bits["Q alone"].values())
    beyond = {key: f" (Q {most:.2f})" if value > most else "" for key, value in bits.items()}
    each = "; ".join(f"{part}, k = {k}, {bits[part, k]:.2f} bits{beyond[part, k]}: {r:.3f}"
                     for (part, k), r in ratios.items())
    wins, open_ = (sum(r < 1 and bool(beyond[key]) == far for key, r in ratios.items()) for far in (False, True))
    undecided = f", undecided in {open_}, which has more bits than any Q alone" if open_ else ""
    return (f"{name}, perplexity over that of Q alone at the same bits: L R is worth its bits in {wins} of "
            f"{len(ratios)} settings{undecided}. {each}.")


def draw(results: Sequence[Result]):
    """A panel a model: mean and range over the seeds; a family looks the same in both."""
    found = models(results)
    families = list(dict.fromkeys(part for curves in found.values() for part in curves.perplexity))
    figure, panels = axes(len(found), height=3.6)
    handles = {}
    for panel, (name, curves) in zip(panels, found.items(), strict=True):
        handles["dense"] = panel.axhline(curves.base, color="0.5", linestyle="--")
        for part, settings in curves.perplexity.items():
            values, i = list(settings.values()), families.index(part)
            mean, low, high = (np.array([f(v) for v in values]) for f in (np.mean, np.min, np.max))
            handles[part] = panel.errorbar(list(curves.bits[part].values()), mean, [mean - low, high - mean],
                                           color=f"C{i % 10}", marker="osD^v"[i % 5], capsize=2,
                                           linestyle="-" if len(values) > 1 else "none")
        panel.set(xlabel="stored bits per weight", ylabel="perplexity", yscale="log",
                  title=f"{name}, {curves.seeds} seed{'s' * (curves.seeds > 1)}")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("{x:g}")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2 if len(found) > 1 else 1)
    return figure


EXPERIMENT = Experiment("perplexity", "perplexity falls with rank and bits, and L R beside a 2-bit Q is worth its bits "
                        "(2405.18886, Tables 1 and 2)", runs, measure, draw, verdict)
