"""The README's figure: perplexity of SmolLM2-135M against stored bits, from the records of other experiments.

    python experiments/hero.py        # figures/hero.png; nothing is measured
"""

from dataclasses import dataclass

import allocation
import drawing
import frontier
import fronts
import level
import machinery
import numpy as np
import recovery

MODEL = "smollm2-135m"


@dataclass(frozen=True)
class Curve:
    """Points (bits a weight, perplexity) by increasing bits, a name beside each, a label and its place."""

    label: str
    at: tuple[float, float]
    points: tuple[tuple[float, float], ...]
    color: str
    names: tuple[str, ...] = ()
    below: bool = False  # where the names are
    step: bool = False  # before and after, not sizes of one method


def curves() -> tuple[float, list[Curve]]:
    """The dense model's perplexity, and every curve of the figure; ValueError where a record is missing."""
    results = {e.name: [r for r in machinery.collect(e, "full") if r["config"]["model"] == MODEL]
               for e in (frontier.EXPERIMENT, allocation.EXPERIMENT, recovery.EXPERIMENT)}
    of = {p.label: (p.bits, p.perplexity) for p in fronts.gather(results["frontier"], MODEL)}
    sizes = {r["config"]["rule"]: (r["bits_per_weight"], r["compressed_perplexity"]) for r in results["allocation"]}
    free = [machinery.record(level.EXPERIMENT, c) for c in level.runs("full")
            if c.model == MODEL and c.part == level.PLAIN and c.bits >= 2]
    (signs,) = recovery.cells(results["recovery"])[MODEL, 32, 0]
    start, end = ((signs[b], signs["wikipedia"][when]) for b, when in (("bits_before", "before"), ("bits", "after")))
    return fronts.dense_perplexity(results["frontier"], MODEL), [
        Curve("Q alone: E8P lattice", (3.4, 25.2), tuple(of[f"e8p, {bits} bits"] for bits in (2, 3, 4)), "C0",
              ("2 bits", "3 bits"), below=True),
        Curve("CALDERA: Q of 2 bits + L R", (2.5, 48.8), tuple(of[f"caldera, k = {k}, 5 rounds"] for k in (16, 32, 64)),
              "C1", ("k = 16", "32", "64")),
        Curve("one level for\nall weights", (1.86, 22.8), tuple(sorted(
            (r["bits_per_weight"], r["compressed_perplexity"]) for r in free)), "C4"),
        Curve("sizes chosen\nlayer by layer", (1.86, 42), (sizes["uniform"], sizes["gradient"]), "C2", step=True),
        Curve("k = 32, signs\nfine-tuned", (2.45, 29.7), (start, end), "C3", step=True),
        Curve("nearest, groups of 64", (3.35, 54.5), (of["rtn, 3 bits, groups of 64"],), "0.4"),
        Curve("GPTQ, groups of 64", (3.35, 37.4), (of["gptq, 3 bits, groups of 64"],), "0.4"),
        Curve("GPTQ, rotated", (3.07, 28.3), (of["gptq rotated, 3 bits"],), "0.4")]


def draw(dense: float, found: list[Curve]):
    """One panel, labels beside the curves."""
    _, (panel,) = drawing.axes()
    panel.figure.set_size_inches(7, 4)
    for c in found:
        panel.plot(*np.array(c.points).T, "o" if c.step else "o-", color=c.color, linewidth=2, markersize=6)
        if c.step:
            panel.plot(*c.points[-1], "*", color=c.color, markersize=13)
            panel.annotate("", c.points[-1], c.points[0], arrowprops={
                "arrowstyle": "-|>,head_width=0.3,head_length=0.5", "color": c.color, "linewidth": 2, "shrinkB": 5})
        for name, point in zip(c.names, c.points, strict=False):
            panel.annotate(name, point, (-5, -13) if c.below else (6, 3), textcoords="offset points", color=c.color,
                           fontsize=9.5, ha="right" if c.below else "left")
        panel.text(*c.at, c.label, color=c.color, fontsize=11, va="center")
    panel.axhline(dense, color="k", linestyle="--", linewidth=1)
    panel.text(1.86, dense * 0.985, f"dense model: {dense:.2f}", fontsize=10, va="top")
    panel.set(yscale="log", xlim=(1.8, 4.1), ylim=(17.2, 70), xticks=np.arange(2, 4.5, 0.5))
    panel.set_yticks(ticks := (20, 25, 30, 40, 50, 60), map(str, ticks))
    panel.minorticks_off()
    panel.grid(color="0.9")
    panel.tick_params(labelsize=10)
    panel.set_xlabel("stored bits a weight of the linear layers", fontsize=11)
    panel.set_ylabel("perplexity of SmolLM2-135M", fontsize=11)
    return panel.figure


if __name__ == "__main__":
    draw(*curves()).savefig(drawing.FIGURES / "hero.png", dpi=200)
