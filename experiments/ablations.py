"""Every choice of the method, one at a time: the error of a layer over that of the default, same layer and seed.

Judged on held-out text; the error on the calibration text, which each was fitted to, is printed beside it.
"""

import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from drawing import axes
from machinery import Experiment, Result, decide, interval, layers
from scipy import stats
from starts import Outliers, Split, Start, compress

from caldera_jax import CalderaConfig, relative_error

PYTHON = "the first 2000 characters of each top module of Python's own library, by name"
HELD_OUT = ("calibration windows", "calibration text")  # only on held-out text: what they were fitted to differs
UNPAIRED = ("rotation",)  # one seed is another draw in another family of rotations
WINDOW = 512  # tokens a window at most


@dataclass(frozen=True)
class Config:
    """One layer, compressed with one choice that is not the default's, or with none."""

    model: str
    block: int
    layer: str
    caldera: CalderaConfig
    start: Start
    text: str
    windows: int
    seed: int


@cache
def default(preset: str, **changes: Any) -> CalderaConfig:
    """What the other choices are compared with; or with changes.  Made once: a config checks all its codebooks."""
    if changes:
        return replace(default(preset), **changes)
    if preset == "smoke":
        return CalderaConfig(rank=4, quantizer="uniform", factor_quantizer="uniform", outer_iterations=2,
                             inner_iterations=2, svd="randomized")  # scalar grids compile in a fraction of the time
    return CalderaConfig(rank=32, q_bits=2, factor_bits=4, outer_iterations=15, inner_iterations=10, svd="randomized")


def parts(preset: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Part -> variant -> what it changes of the default.  The first variant is what the others are compared with: the
    default, which changes nothing, but where one pass with the rank divided is compared with one pass."""
    base, full = default(preset), preset == "full"
    k = base.rank

    def values(field: str, others: Sequence[Any], own: Any = None) -> dict[str, dict[str, Any]]:
        own = getattr(base, field) if own is None else own
        return {str(own): {}} | {str(value): {field: value} for value in sorted({*others} - {own})}

    halves = {"start": Split(k // 2)}
    found = {
        "order": values("order", ("lr-first", "q-first")),
        "outer iterations": values("outer_iterations", (1, 2, 5, 15, 30)),
        "inner iterations": values("inner_iterations", (0, 1, 10, 50)),
        "refine passes": values("refine_passes", (0, 1, 10)),
        "damping": values("damping", (0.0, 1e-4, 1e-3, 1e-2, 1e-1)),
        "svd": values("svd", ("exact", "randomized")),
        "rotation": values("rotation", ("hadamard", "orthogonal", "none")),
        "calibration windows": values("windows", (1, 4, 24, 96), 24),
        "calibration text": values("text", ("enwiki", "python"), "enwiki"),
        "start": {"L R of W": {}, "L R of k outlier channels": {"start": Outliers(k)},
                  "L R of k/2 outlier channels": {"start": Outliers(k // 2)},
                  "L R of k channels of largest H_jj": {"start": Outliers(k, weighted=False)},
                  "one pass, k/2 before Q and k/2 after": halves},
        "one pass": {"k/2 before Q and k/2 after": halves, "all of the rank before Q": {"start": Split(k)},
                     "all of the rank after Q": {"start": Split(0)}},
    }
    left_out = () if full else ("outer iterations", "inner iterations", "refine passes", "damping", "svd", "rotation",
                               "calibration windows")
    return {part: variants for part, variants in found.items() if part not in left_out}


def places(preset: str) -> list[tuple[str, int, str]]:
    """(model, block, layer)."""
    if preset == "smoke":
        return [("tiny-smoke", 0, "q")]
    return [*(("smollm2-135m", 14, layer) for layer in ("q", "v", "down")), ("tiny", 2, "q")]


def config_of(preset: str, place: tuple[str, int, str], change: dict[str, Any], seed: int) -> Config:
    """The default with a change: of the data or the start, or of a field of CalderaConfig."""
    own = {"start": None, "text": "enwiki", "windows": 24}
    fields = {name: value for name, value in change.items() if name not in own}
    return Config(*place, default(preset, **fields), **{name: change.get(name, own[name]) for name in own},
                  seed=seed)


def runs(preset: str) -> list[Config]:
    """Every place, part, variant and seed; what two parts share is run once."""
    return list(dict.fromkeys(
        config_of(preset, place, change, seed) for place in places(preset) for variants in parts(preset).values()
        for change in variants.values() for seed in range(3 if preset == "full" else 1)))


def measure(config: Config) -> Result:
    """The least relative error, against the H it was compressed with and against that of held-out enwiki."""
    block = config.model, config.block
    python = config.text == "python"
    w, h = (of_python(*block, config.windows) if python else layers(*block, config.text, config.windows))[config.layer]
    layer, trace = compress(jax.random.key(config.seed), w, h, config.caldera, config.start)
    held_out = layers(*block, part="evaluation")[config.layer][1]
    trace = np.asarray(trace, np.float64)
    return {"shape": list(w.shape), "bits_per_weight": layer.stored_bits / w.size, "trace": trace.tolist(),
            "error": float(relative_error(w, layer.dense(), h)),
            "held_out": float(relative_error(w, layer.dense(), held_out)), **({"text": PYTHON} if python else {})}


@cache
def of_python(model: str, block: int, windows: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """``layers`` with H of program text, ``PYTHON``: the same for one version of Python, which every record holds."""
    with tempfile.TemporaryDirectory() as folder:
        write_python(Path(folder))
        return layers(model, block, folder, windows)


def write_python(folder: Path) -> None:
    """A text file for each module of ``PYTHON``."""
    for module in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if text := module.read_text(encoding="utf-8", errors="ignore")[:2000].strip():
            Path(folder, module.stem).with_suffix(".txt").write_text(text, encoding="utf-8")


class Compared(NamedTuple):
    """A variant on one layer: its error over the reference's, mean and half its 95 % interval; the side of 1 that is
    decided; its stored bits per weight less the reference's."""

    ratio: float
    half: float
    side: str
    bits: float

    def margin(self) -> str:
        """1.234 ± 0.012, and the bits where they differ."""
        bits = f" ({self.bits:+.2f} bits)" if abs(self.bits) >= 0.005 else ""
        return f"{self.ratio:.3f} ± {self.half:.3f}{bits}" if np.isfinite(self.half) else f"{self.ratio:.3f}{bits}"


def compare(values: np.ndarray, reference: np.ndarray, paired: bool, bits: float = 0.0) -> Compared:
    """Errors by seed over the reference's: decided as ``machinery.decide`` does, from ``welch`` where not paired."""
    if paired:
        return Compared(*interval(values / reference), decide(values / reference), bits)
    ratio, half = welch(values, reference)
    side = "lower" if ratio < 1 else "higher"
    return Compared(ratio, half, "undecided" if abs(ratio - 1) < max(0.01, half) else side, bits)


def welch(values: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Ratio of two means, and half of Welch's 95 % interval of their difference over the second; infinite for one
    seed, and zero where neither varies."""
    ratio = float(np.mean(values) / np.mean(reference))
    if min(len(values), len(reference)) < 2:
        return ratio, np.inf
    parts = np.array([np.var(v, ddof=1) / len(v) for v in (values, reference)])
    if not parts.any():
        return ratio, 0.0
    degrees = parts.sum() ** 2 / np.sum(parts**2 / (np.array([len(values), len(reference)]) - 1))
    return ratio, float(stats.t.ppf(0.975, degrees) * np.sqrt(parts.sum()) / np.mean(reference))


def compared(results: Sequence[Result], key: str) -> dict[str, dict[str, dict[str, Compared]]]:
    """Part -> variant -> layer: its ``key`` ("held_out", or "error" on the calibration text) over the reference's."""
    preset = results[0]["preset"]
    known = dict(zip(runs(preset), results, strict=True))  # in this order they are collected
    seeds = sorted({r["seed"] for r in results})

    def found(place, change, name):
        return np.array([known[config_of(preset, place, change, seed)][name] for seed in seeds])

    def against(place, change, reference, part):
        bits = np.mean(found(place, change, "bits_per_weight") - found(place, reference, "bits_per_weight"))
        return compare(found(place, change, key), found(place, reference, key), part not in UNPAIRED, float(bits))

    def rows(part, reference, *others):  # each (name, change)
        return {name: {label(place): against(place, change, reference[1], part) for place in places(preset)}
                for name, change in others}

    return {part: rows(part, *variants.items()) for part, variants in parts(preset).items()
            if key == "held_out" or part not in HELD_OUT}


def label(place: tuple[str, int, str]) -> str:
    """model block.layer."""
    return f"{place[0]} {place[1]}.{place[2]}"


def verdict(results: Sequence[Result]) -> str:
    """For each part where its first variant has the least error, and each of the others, layer by layer."""
    held_out, fitted = compared(results, "held_out"), compared(results, "error")
    lines, seeds = [], len({r["seed"] for r in results})
    for part, rows in held_out.items():
        first = next(iter(parts(results[0]["preset"])[part]))
        lines.append(_headline(f"{part}, {first} has the least error", rows))
        for name, row in rows.items():
            beside = f" | calibration text: {_sides(fitted[part][name])}" if part in fitted else ""
            lines.append(f"  {name}: {_sides(row)}{beside}.")
        if part == "calibration windows":
            each = ", ".join(sorted([first, *rows], key=int))
            lines.append(f"  The range is {each} windows of at most {WINDOW} tokens{_singular(results)}.")
    lines.append(
        f"Ratios of errors on held-out text (other half of enwiki), {seeds} seed(s), mean ± half the 95 % interval; "
        "decided, each layer by itself, where that leaves out 1 and the mean is 1 % from it. Paired by seed, but for "
        f"{', '.join(UNPAIRED)} Welch's interval. A seed varies the random rotation and the start of the randomized "
        "SVD: calibration draw and held-out text are one.")
    return "\n  ".join(lines)


def _headline(claim: str, rows: dict[str, dict[str, Compared]]) -> str:
    """On which layers every other variant has a higher error (the nearest), on which one has a lower (the lowest)."""
    found: dict[str, list[str]] = {"holds on": [], "does not hold on": [], "undecided on": []}
    for layer in next(iter(rows.values())):
        column = {name: row[layer] for name, row in rows.items()}
        lower = {name: c for name, c in column.items() if c.side == "lower"}
        every = all(c.side == "higher" for c in column.values())
        name, shown = min((lower or column).items(), key=lambda item: item[1].ratio)
        word = "does not hold on" if lower else "holds on" if every else "undecided on"
        found[word].append(f"{layer} ({name}: {shown.margin()})")
    text = [f"{word} {', '.join(each) or 'none'}" for word, each in found.items() if each or word == "holds on"]
    return f"{claim}: {'; '.join(text)}."


def _sides(row: dict[str, Compared]) -> str:
    """lower on …; higher on …; undecided on …"""
    named = {side: ", ".join(f"{layer} {c.margin()}" for layer, c in row.items() if c.side == side)
             for side in ("lower", "higher", "undecided")}
    return "; ".join(f"{side} on {text}" for side, text in named.items() if text)


def _singular(results: Sequence[Result]) -> str:
    """Where H is of fewer tokens than the layer has inputs."""
    found = sorted({(label((c["model"], c["block"], c["layer"])), c["windows"]) for r in results
                    if (c := r["config"])["windows"] * WINDOW < r["shape"][1]})
    each = ", ".join(f"{layer} with {windows}" for layer, windows in found)
    return each and f"; fewer tokens than inputs, so that H is singular but for the damping: {each}"


def draw(results: Sequence[Result]):
    """A row a variant, a dot a layer: mean and 95 % interval, on held-out text and beside it on the calibration's."""
    both = {"held-out text": compared(results, "held_out"), "calibration text": compared(results, "error")}
    keys = [(part, name) for part, rows in both["held-out text"].items() for name in rows]
    heights = {key: -row - 0.7 * list(both["held-out text"]).index(key[0]) for row, key in enumerate(keys)}
    first = {part: next(iter(variants)) for part, variants in parts(results[0]["preset"]).items()}
    figure, panels = axes(2, height=0.8 + 0.2 * len(keys))
    figure.set_figwidth(7.6)
    for i, (panel, (title, found)) in enumerate(zip(panels, both.items(), strict=True)):
        rows = {key: found[key[0]][key[1]] for key in keys if key[0] in found}
        _draw_ratios(panel, rows, [heights[key] for key in rows], alpha=0.5 if i else 1)
        panel.set(xlabel="ratio of errors", title=title, ylim=(min(heights.values()) - 1, 1))
        panel.set_yticks([*heights.values()],
                         ["" if i else f"{part}: {name} / {first[part]}" for part, name in heights])
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _draw_ratios(panel, rows: dict[tuple[str, str], dict[str, Compared]], heights: list[float], alpha: float) -> None:
    """The dots and intervals of one panel."""
    names, ends = list(next(iter(rows.values()))), [0.98, 1.02]
    for i, layer in enumerate(names):
        ratio, half = np.array([(row[layer].ratio, row[layer].half) for row in rows.values()]).T
        half = np.where(np.isfinite(half), half, 0)
        shift = 0.14 * ((len(names) - 1) / 2 - i)
        panel.errorbar(ratio, np.array(heights) + shift, xerr=half, fmt=f"C{i}o", markersize=2.5, elinewidth=0.8,
                       alpha=alpha, label=layer)
        ends += [*(ratio - half), *(ratio + half)]
    panel.axvline(1, color="0.3", linewidth=0.8)
    fine = 0.02  # nearly linear within 2 % of 1, nearly logarithmic beyond
    panel.set_xscale("function", functions=(lambda x: np.sign(x - 1) * np.log1p(np.abs(x - 1) / fine),
                                            lambda y: 1 + np.sign(y) * np.expm1(np.abs(y)) * fine))
    low, high = 1 - 1.1 * (1 - min(ends)), 1 + 1.1 * (max(ends) - 1)
    ticks = [t for t in (0.3, 0.5, 0.8, 0.9, 0.97, 1, 1.03, 1.1, 1.2, 1.5, 2, 3, 6) if low <= t <= high]
    panel.set_xlim(low, high)
    panel.set_xticks(ticks, [f"{t:g}" for t in ticks])


EXPERIMENT = Experiment(
    "ablations", "each choice of the method is worth its place (beyond the paper): order, iterations, refinement, "
    "damping, SVD, rotation, calibration data and start", runs, measure, draw, verdict)
