"""What points of bits and losses say: the front, what each family pays above it, and L R against Q alone.

Perplexities are compared as losses above the dense model's, in nats a token.  To mix two methods over the layers gives,
to first order, any point on the line between them, and the dense model is a point of 16 bits and no loss: so a method,
or a family, is the lower convex hull of its points and that one.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from drawing import axes
from machinery import Result, decide, interval, with_interval

ASIDE = ("limit", "theory", "embedding")  # families of what is no point
DENSE_BITS = 16.0
LEVELS = (0.3, 0.1, 0.03)  # nats a token: 35 %, 11 % and 3 % more perplexity than the dense model
LAYERS = 7  # linear layers of a block
Curve = list[tuple[float, float]]


def label(result: Result) -> str:
    """The method and its settings in words."""
    words = {"bits": "{} bits", "group": "groups of {}", "rank": "k = {}", "q_bits": "Q {} bits", "kept": "{:.0%} kept",
             "factor_bits": "factors {} bits", "value_bits": "values {} bits", "refine_passes": "{} passes",
             "pattern": "{}", "count": "{}", "outer_iterations": "{} rounds"}
    config = result["config"]
    settings = (words[key].format(value) if key in words else f"{'' if value else 'no '}{key}"  # others are switches
                for key, value in config["settings"])
    return ", ".join([config["method"].replace("_", " "), *settings])


@dataclass(frozen=True)
class Point:
    """One method and setting: ``lost`` [seeds, windows] nats a token above the dense model, ``error`` of its layers."""

    family: str
    method: str
    label: str
    bits: float
    lost: np.ndarray
    perplexity: float
    error: float

    @property
    def mean(self) -> float:
        """Nats a token, over all seeds and windows."""
        return float(self.lost.mean())


def gather(results: Sequence[Result], model: str) -> list[Point]:
    """The points of a model, by increasing bits."""
    found: dict[str, list[Result]] = {}
    for r in results:
        if r["config"]["model"] == model and r["family"] not in ASIDE:
            found.setdefault(label(r), []).append(r)
    return sorted((_point(name, rows) for name, rows in found.items()), key=lambda p: p.bits)


def _point(name: str, rows: list[Result]) -> Point:
    lost = np.array([np.array(r["losses"]) - np.array(r["base_losses"]) for r in rows])
    errors = [r["error"] for r in rows if r["error"] is not None]
    return Point(rows[0]["family"], rows[0]["config"]["method"], name, float(np.mean([r["bits"] for r in rows])), lost,
                 float(np.exp(np.mean([np.log(r["perplexity"]) for r in rows]))),
                 float(np.mean(errors)) if errors else np.nan)


def beaten(p: Point, q: Point) -> bool:
    """Whether q, of no more bits, surely loses less: by the 95 % interval over the windows, paired."""
    mean, half = interval(p.lost.mean(0) - q.lost.mean(0))
    return q.bits <= p.bits and mean > half


def front(points: Sequence[Point]) -> list[Point]:
    """The points that none surely beats: ties on this text are all there."""
    return [p for p in points if not any(beaten(p, q) for q in points)]


def hull(points: Sequence[tuple[float, float]]) -> Curve:
    """The lower convex hull of (bits, nats) and the dense model, from the fewest bits on."""
    found: Curve = []
    for x, y in sorted([*points, (DENSE_BITS, 0.0)]):
        while len(found) > 1 and ((found[-1][0] - found[-2][0]) * (y - found[-2][1])
                                  <= (found[-1][1] - found[-2][1]) * (x - found[-2][0])):
            found.pop()
        if not found or x > found[-1][0]:
            found.append((x, y))
    return found


def bits_at(curve: Curve, nats: float) -> float:
    """The fewest bits at which a hull loses no more than so many nats."""
    down = [curve[0], *(b for a, b in zip(curve, curve[1:], strict=False) if b[1] < a[1])]
    return float(np.interp(-nats, [-y for _, y in down], [x for x, _ in down]))


def curve(points: Sequence[Point]) -> Curve:
    """The hull of some points."""
    return hull([(p.bits, p.mean) for p in points])


def paid(points: Sequence[Point], by: str, nats: float) -> dict[str, float]:
    """Bits that each family, or method, needs for a loss, above what all of them together need."""
    least = bits_at(curve(points), nats)
    names = dict.fromkeys(getattr(p, by) for p in points)
    return {name: bits_at(curve([p for p in points if getattr(p, by) == name]), nats) - least for name in names}


def dense_perplexity(results: Sequence[Result], model: str) -> float:
    """That of the model before compression."""
    return next(r["base_perplexity"] for r in results if r["config"]["model"] == model and "base_perplexity" in r)


def models(results: Sequence[Result]) -> list[str]:
    """The models that there are results of."""
    return list(dict.fromkeys(r["config"]["model"] for r in results))


def verdict(results: Sequence[Result]) -> str:
    """The front of each model, what each family pays above it, and L R beside Q against Q alone at equal bits."""
    lines = []
    for model in models(results):
        points = gather(results, model)
        lines.append(f"{model}, dense {dense_perplexity(results, model):.2f}. Surely beaten by nothing of no more "
                     f"bits, and within {LEVELS[0]:g} nats of the dense model: " + "; ".join(
                         f"{p.label} ({p.bits:.2f} bits, {p.perplexity:.2f})" for p in front(points)
                         if p.mean <= LEVELS[0]) + ".")
        for nats in LEVELS:
            families = sorted(paid(points, "family", nats).items(), key=lambda row: row[1])
            lines.append(f"{model}, at {nats:g} nats above dense {bits_at(curve(points), nats):.2f} bits are needed; "
                         "each family alone pays above it: " + ", ".join(f"{f} {b:.2f}" for f, b in families) + ".")
        lines += against_q_alone(model, results) + boundary(model, results)
        if other := [r for r in results if r["config"]["model"] == model and r["family"] == "embedding"]:
            lines.append(f"{model}, not comparable, bits being of the embedding's weights: " + "; ".join(
                f"{label(r)} ({r['bits']:.2f} bits) {r['perplexity']:.2f}" for r in other) + ".")
    return "\n  ".join(lines)


def against_q_alone(model: str, results: Sequence[Result]) -> list[str]:
    """Each L R beside Q over E8P alone at the same bits, paired by seed, by two estimates of the latter.

    Mixed: on the hull, as layers of two widths have it.  Bent: what is lost is geometric between the measured bits, as
    the curve itself bends, and nothing beyond the last of them; a grid of just these bits might reach it.
    """
    ours = [r for r in results if r["config"]["model"] == model and r["family"] not in ASIDE]
    lost = lambda r: float(np.mean(r["losses"]) - np.mean(r["base_losses"]))
    alone = {seed: sorted((r["bits"], lost(r)) for r in ours if r["config"]["method"] == "e8p" and r["seed"] == seed)
             for seed in {r["seed"] for r in ours}}

    def mixed(bits, points):
        return float(np.interp(bits, *zip(*hull(points), strict=True)))

    def bent(bits, points):
        known, losses = zip(*points, strict=True)
        return float(np.exp(np.interp(bits, known, np.log(np.maximum(losses, 1e-9))))) if bits <= known[-1] else 0.0

    lines = []
    for words, estimate in (("mixed of 2, 3, 4 and 16 bits to the same size", mixed),
                            ("as its curve bends", bent)):
        found: dict[str, list[float]] = {}
        for r in ours:
            points = alone[r["seed"]]
            if r["family"] == "both" and points and r["bits"] >= points[0][0]:
                found.setdefault(f"{label(r)} ({r['bits']:.2f} bits)", []).append(
                    float(np.exp(lost(r) - estimate(r["bits"], points))))
        sides: dict[str, list[str]] = {}
        for name, ratios in found.items():
            sides.setdefault(decide(ratios), []).append(f"{name} {with_interval(ratios)}")
        if sides:
            lines.append(f"{model}, perplexity over that of E8P alone, {words}: " + "; ".join(
                f"{side} for {', '.join(each)}" for side, each in sides.items()) + ".")
    return lines


def saved(error: float, bits: float, alone: Sequence[tuple[float, float]]) -> float:
    """Bits that Q alone needs for this error, log error linear between its (bits, error), less those paid."""
    known = sorted((np.log(e), b) for b, e in alone)
    return float(np.interp(np.log(error), [e for e, _ in known], [b for _, b in known])) - bits


def boundary(model: str, results: Sequence[Result]) -> list[str]:
    """Where L R beside a 2-bit Q saves bits over Q alone, layer by layer: as predicted and as measured, by rank."""
    ours = [r for r in results if r["config"]["model"] == model]
    measured = {(_option(r), r["seed"]): r["errors"] for r in ours if r["family"] not in ASIDE and _option(r)}
    signs: dict[int, list[tuple[bool, bool]]] = {}
    for r in (r for r in ours if r["family"] == "theory"):
        options = [tuple(option[:2]) for option in r["options"]]
        for layer, errors in enumerate(r["errors"]):
            bits = dict(zip(options, r["option_bits"][layer % LAYERS], strict=True))
            real = {o: measured[o, r["seed"]][layer] for o in options if (o, r["seed"]) in measured}
            for rank, q in (o for o in real if o[0]):
                signs.setdefault(rank, []).append(tuple(
                    saved(e[rank, q], bits[rank, q], [(bits[o], e[o]) for o in real if not o[0]]) > 0
                    for e in (dict(zip(options, errors, strict=True)), real)))
    each = "; ".join(f"k = {rank}: {sum(b for _, b in rows)} save bits, predicted {sum(a for a, _ in rows)}, right "
                     f"{sum(a == b for a, b in rows)} of {len(rows)} (the commoner answer: "
                     f"{max(sum(b for _, b in rows), sum(not b for _, b in rows))})" for rank, rows in signs.items())
    return [f"{model}, error of L R of 4 bits beside a 2-bit Q against Q alone at equal bits, layers and seeds "
            f"(prediction: allocate.error_model): {each}."] if signs else []


def _option(r: Result) -> tuple[int, int] | None:
    """(rank, bits of Q) of Q alone and of CALDERA with a 2-bit Q and 4-bit factors; None of anything else."""
    settings = dict(map(tuple, r["config"]["settings"]))
    if r["config"]["method"] == "e8p":
        return 0, settings["bits"]
    plain = r["config"]["method"] == "caldera" and settings.keys() <= {"rank", "outer_iterations"}
    return (settings["rank"], 2) if plain else None


def draw(results: Sequence[Result]):
    """For each model: log perplexity above the dense model's and error against bits, and bits above the hull of all."""
    names = models(results)
    figure, panels = axes(3, len(names), height=4.0)
    families = list(dict.fromkeys(r["family"] for r in results if r["family"] not in ASIDE))
    for row, model in enumerate(names):
        points = gather(results, model)
        first, second, third = panels[3 * row:3 * row + 3]
        for panel, value in ((first, "mean"), (second, "error")):
            for i, family in enumerate(families):
                of = [p for p in points if p.family == family and getattr(p, value) > 0]
                panel.scatter([p.bits for p in of], [getattr(p, value) for p in of], s=12, color=f"C{i}",
                              marker="osD^v"[i % 5], label=family, alpha=0.8)
            panel.set(xlabel="stored bits per weight", xscale="log", yscale="log", xlim=(0.85, 11), title=model)
            panel.set_xticks([1, 2, 3, 4, 6, 8, 10], ["1", "2", "3", "4", "6", "8", "10"])
            panel.set_xticks([], minor=True)
        bits = np.geomspace(curve(points)[0][0], 11, 200)
        first.plot(bits, np.interp(bits, *zip(*curve(points), strict=True)), "0.3", label="hull: mixtures of all")
        best = [p for p in front(points) if p.mean > 0]
        first.scatter([p.bits for p in best], [p.mean for p in best], s=45, facecolors="none", edgecolors="k",
                      linewidths=0.7, label="surely beaten by none of fewer bits")
        first.set(ylabel=f"log perplexity above the dense model's ({dense_perplexity(results, model):.2f}), nats")
        limits = next(r for r in results if r["config"]["model"] == model and r["family"] == "limit")
        for sources, style, text in (("white", "--", "Gaussian reference"), ("own", ":", "the same, W's own energies")):
            second.plot(limits["bits"], limits[sources], "0.3", linestyle=style, label=text)
        second.set(ylabel="relative error on held-out text, mean of the layers")
        cost = paid(points, "method", LEVELS[1])
        ordered = sorted(cost, key=lambda name: cost[name], reverse=True)
        colors = {p.method: f"C{families.index(p.family)}" for p in points}
        third.barh([name.replace("_", " ") for name in ordered], [cost[name] for name in ordered],
                   color=[colors[name] for name in ordered])
        third.tick_params(axis="y", labelsize=5.5)
        third.set(xlabel=f"bits above the hull of all at {LEVELS[1]:g} nats", title=textwrap.fill(
            f"{model}: each method alone, mixed with 16 bits", 50))
    handles = {name: handle for panel in panels[:2] for handle, name in zip(
        *panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=8)
    return figure
