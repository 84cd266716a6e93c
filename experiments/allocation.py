"""Automatic sizes: a budget spent layer by layer, against the same rank and bits everywhere, at equal stored bits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from drawing import axes
from machinery import Experiment, Result, decide, source, with_interval
from perplexity import moments

from caldera_jax import CalderaConfig
from caldera_jax.jobs.compress import compress
from caldera_jax.jobs.settings import RunConfig
from caldera_jax.models.data import Tokens

RULES = {"uniform": {}, "error": {}, "trace": {}, "gradient": {},
         "gradient, rank 0": {"allocation": "gradient", "ranks": (0,)}}  # Q alone, its bits mixed


@dataclass(frozen=True)
class Config:
    """One compressed model.  It holds names only, so that its hash does not depend on where the model lies."""

    model: str
    rule: str
    bits: float
    caldera: CalderaConfig
    windows: int
    window: int
    seed: int


def runs(preset: str) -> list[Config]:
    """Every rule at four budgets on the tiny model, three seeds, at 2.3 bits six; three at 2.3 bits on SmolLM2-135M,
    one seed."""
    if preset == "smoke":
        few = CalderaConfig(quantizer="uniform", factor_quantizer="uniform", outer_iterations=2, inner_iterations=2,
                            svd="randomized")  # scalar grids compile in a fraction of the time
        return [Config("tiny-smoke", rule, 4.5, few, 8, 64, 0) for rule in ("uniform", "gradient, rank 0")]
    tiny = [Config("tiny", rule, bits, CalderaConfig(svd="randomized"), 32, 256, seed)
            for bits in (2.3, 2.6, 3.02, 3.5) for rule in RULES for seed in range(6 if bits == 2.3 else 3)]
    few = CalderaConfig(outer_iterations=5, svd="randomized")
    return tiny + [Config("smollm2-135m", rule, 2.3, few, 64, 512, 0)
                   for rule in ("uniform", "gradient", "gradient, rank 0")]


def measure(config: Config) -> Result:
    """Compress the whole model under the budget, in a directory that is then dropped; tokens count whole."""
    tokens = Tokens(windows=config.windows, window=config.window)
    chosen = RunConfig(source(config.model), config.caldera, tokens, Tokens(windows=32, window=config.window),
                       seed=config.seed, bits=config.bits, token_cap=0.0,
                       **{"allocation": config.rule, **RULES[config.rule]})
    with TemporaryDirectory() as folder:
        found = compress(chosen, Path(folder) / "out", Path(moments().name))
    kept = ("base_perplexity", "compressed_perplexity", "bits_per_weight", "mean_layer_error")
    rows = [{key: row[key] for key in ("path", "rank", "q_bits", "factor_bits", "bits_per_weight", "error",
                                       "predicted_loss", "loss")
             if key in row} for row in found["layers"]]
    return {**{name: found[name] for name in kept}, "layers": rows, "stages": found["seconds"]}


def cell(results: Sequence[Result], model: str, rule: str, bits: float) -> list[Result]:
    """The seeds of one model, rule and budget, in order."""
    wanted = (model, rule, bits)
    found = [r for r in results if (r["config"]["model"], r["config"]["rule"], r["config"]["bits"]) == wanted]
    return sorted(found, key=lambda r: r["seed"])


def verdict(results: Sequence[Result]) -> str:
    """Perplexity of each rule over that of uniform sizes at the same budget, paired by seed; and how the budget is
    met."""
    lines = []
    for model, bits in dict.fromkeys((r["config"]["model"], r["config"]["bits"]) for r in results):
        uniform = [r["compressed_perplexity"] for r in cell(results, model, "uniform", bits)]
        each = []
        for rule in list(RULES)[1:]:
            if rows := cell(results, model, rule, bits):
                ratio = [r["compressed_perplexity"] / u for r, u in zip(rows, uniform, strict=True)]
                decided = f" ({decide(ratio)}, below 1 in {sum(x < 1 for x in ratio)} of {len(ratio)} seeds)"
                each.append(f"{rule} {with_interval(ratio)}" + (decided if len(ratio) > 1 else ""))
        lines.append(f"{model}, {bits:g} bits, uniform {np.mean(uniform):.2f}; perplexity over it: {', '.join(each)}.")
        if rows := cell(results, model, "gradient", bits):
            share = [sum(layer["predicted_loss"] for layer in r["layers"])
                     / np.log(r["compressed_perplexity"] / r["base_perplexity"]) for r in rows]
            low_rank = [sum(layer["rank"] > 0 for layer in r["layers"]) for r in rows]
            lines.append(f"{model}, {bits:g} bits, gradient: predicted {min(share):.2f} to {max(share):.2f} of the "
                         f"nats lost; L R on {min(low_rank)} to {max(low_rank)} of {len(rows[0]['layers'])} layers.")
    used = [r["bits_per_weight"] / r["config"]["bits"] for r in results if r["config"]["rule"] != "uniform"]
    lines.append(f"Of the budget {min(used):.2%} to {max(used):.2%} is used.")
    return "\n  ".join(lines)


def draw(results: Sequence[Result]):
    """Perplexity against bits by rule; and the bits of each layer of one plan."""
    names = list(dict.fromkeys(r["config"]["model"] for r in results))
    figure, panels = axes(2, len(names), height=2.8)
    for row, model in enumerate(names):
        first, second = panels[2 * row:2 * row + 2]
        for i, rule in enumerate(RULES):
            chosen = [cell(results, model, rule, bits)
                      for bits in sorted({r["config"]["bits"] for r in results if r["config"]["model"] == model})]
            values = [[r["compressed_perplexity"] for r in rows] for rows in chosen if rows]
            bits = [np.mean([r["bits_per_weight"] for r in rows]) for rows in chosen if rows]
            mean, low, high = (np.array([f(v) for v in values]) for f in (np.mean, np.min, np.max))
            first.errorbar(bits, mean, [mean - low, high - mean], color=f"C{i}", marker="osD^v"[i], capsize=2,
                           label=rule)
        seeds = {len(rows) for rows in chosen if rows}
        budgets = [r["config"]["bits"] for r in results if r["config"]["model"] == model]
        first.set(xlabel="stored bits per weight", ylabel="perplexity", xlim=(min(budgets) - 0.1, max(budgets) + 0.1),
                  title=f"{model}, mean and range of {' or '.join(map(str, sorted(seeds)))} seeds")
        plan = next(r for r in results if r["config"]["model"] == model and r["config"]["rule"].startswith("gradient")
                    and r["seed"] == 0 and r["config"]["bits"] in (2.3, 4.5))
        blocks = sorted({int(layer["path"].split(".")[1]) for layer in plan["layers"]})
        kinds = list(dict.fromkeys(layer["path"].split(".")[2] for layer in plan["layers"]))
        table = np.array([[next(x["bits_per_weight"] for x in plan["layers"] if x["path"] == f"blocks.{b}.{kind}")
                           for b in blocks] for kind in kinds])
        second.grid(False)
        shown = second.imshow(table, aspect="auto", cmap="viridis")
        second.set_yticks(range(len(kinds)), kinds)
        second.set(xlabel="block", title=f"{model}, bits of each layer, gradient, {plan['config']['bits']:g} bits")
        figure.colorbar(shown, ax=second)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


EXPERIMENT = Experiment("allocation", "at equal stored bits sizes chosen layer by layer give lower perplexity than the "
                        "same size everywhere", runs, measure, draw, verdict)
