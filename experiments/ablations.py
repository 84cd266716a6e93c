"""Every choice of the method, one at a time: the error of a layer over that of the default, same layer and seed."""

import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from machinery import Experiment, Result, axes, layers
from starts import Outliers, Split, Start, compress

from caldera_jax import CalderaConfig, relative_error
from caldera_jax.report import config_hash

PYTHON = "the first 2000 characters of each top module of Python's own library, by name"
HELD_OUT = ("calibration windows", "calibration text")  # parts scored on held-out text: their own H differ


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


def default(preset: str) -> CalderaConfig:
    """What the other choices are compared with."""
    if preset == "smoke":
        return CalderaConfig(rank=4, q_bits=2, factor_bits=4, outer_iterations=2, inner_iterations=2, svd="randomized")
    return CalderaConfig(rank=32, q_bits=2, factor_bits=4, outer_iterations=15, inner_iterations=10, svd="randomized")


def parts(preset: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Part -> variant -> what it changes; no change is the default, which is in every part."""
    base, full = default(preset), preset == "full"
    k = base.rank

    def values(field: str, others: Sequence[Any], own: Any = None) -> dict[str, dict[str, Any]]:
        own = getattr(base, field) if own is None else own
        return {str(value): {} if value == own else {field: value} for value in sorted({own, *others})}

    starts = {"L R of W": {}, "zero (Q first)": {"order": "q-first"},
              "L R of k outlier channels": {"start": Outliers(k)},
              "L R of k/2 outlier channels": {"start": Outliers(k // 2)},
              "L R of k channels of largest H_jj": {"start": Outliers(k, weighted=False)}}
    splits = {f"{name} before Q": {"start": Split(p)} for name, p in (("none", 0), ("k/2", k // 2), ("all", k))}
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
        "start": starts,
        "one pass, rank divided": {"15 rounds" if full else "2 rounds": {}, **splits},
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
    return Config(*place, replace(default(preset), **fields), **{name: change.get(name, own[name]) for name in own},
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
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    with tempfile.TemporaryDirectory() as folder:
        for module in modules:
            if text := module.read_text(encoding="utf-8", errors="ignore")[:2000].strip():
                Path(folder, module.stem).with_suffix(".txt").write_text(text, encoding="utf-8")
        return layers(model, block, folder, windows)


def ratios(results: Sequence[Result]) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """(part, variant) -> layer -> error over the default's by seed; without the default itself."""
    preset, known = results[0]["preset"], {r["config_hash"]: r for r in results}
    seeds = sorted({r["seed"] for r in results})

    def errors(place, part, change):
        key = "held_out" if part in HELD_OUT else "error"
        return np.array([known[config_hash(config_of(preset, place, change, seed))][key] for seed in seeds])

    return {(part, name): {f"{place[0]} {place[1]}.{place[2]}": errors(place, part, change) / errors(place, part, {})
                           for place in places(preset)}
            for part, variants in parts(preset).items() for name, change in variants.items() if change}


def spreads(results: Sequence[Result], key: str) -> dict[str, float]:
    """Standard deviation over seeds of the default's error, over its mean, by layer; 0 with one seed."""
    found: dict[str, list[float]] = {}
    for r in results:
        c = r["config"]
        if r["config_hash"] == config_hash(config_of(r["preset"], (c["model"], c["block"], c["layer"]), {}, r["seed"])):
            found.setdefault(f"{c['model']} {c['block']}.{c['layer']}", []).append(r[key])
    return {layer: float(np.std(e, ddof=1) / np.mean(e)) if len(e) > 1 else 0.0 for layer, e in found.items()}


def verdict(results: Sequence[Result]) -> str:
    """A sentence for each part: its best and its worst variant, and whether they leave the spread over seeds."""
    found, lines = ratios(results), []
    for part, variants in parts(results[0]["preset"]).items():
        spread = spreads(results, "held_out" if part in HELD_OUT else "error")
        own = next(name for name, change in variants.items() if not change)
        rows = {name: found[part, name] for name in variants if name != own}
        mean = {name: np.mean([*row.values()]) for name, row in rows.items()}
        best, worst = min(mean, key=mean.get), max(mean, key=mean.get)
        head = f"the default, {own}, is best" if mean[best] >= 1 else f"{best} is best, {own} the default"
        each = [_described(name, rows[name], spread) for name in dict.fromkeys((best, worst))]
        lines.append(f"{part}{' (held-out text)' if part in HELD_OUT else ''}: {head}. {'; '.join(each)}.")
    widest, seeds = max(spreads(results, "error").values()), len({r["seed"] for r in results})
    lines.append(f"Ratios to the default are means (ranges) over layers and {seeds} seed(s); the default's own standard"
                 f" deviation over seeds is at most {widest:.1%} of its error.")
    return "\n  ".join(lines)


def _described(name: str, row: dict[str, np.ndarray], spread: dict[str, float]) -> str:
    """A variant's ratio, and on how many layers its mean is farther from 1 than the default's seeds are apart."""
    every = np.array([*row.values()])
    lower = sum(v.mean() < 1 - spread[layer] for layer, v in row.items())
    higher = sum(v.mean() > 1 + spread[layer] for layer, v in row.items())
    sides = [f"{word} on {count}" for word, count in (("lower", lower), ("higher", higher)) if count]
    beyond = f"matters ({' and '.join(sides)} of {len(row)} layers, by more than the spread over seeds)"
    if every.shape[1] == 1:
        beyond = "one seed: no spread to compare with"
    elif not sides:
        beyond = "does not matter (within the spread over seeds)"
    return f"{name} {every.mean():.3f} ({every.min():.3f} to {every.max():.3f}), {beyond}"


def draw(results: Sequence[Result]):
    """A row a variant, a dot a layer: mean over seeds, and the range over them."""
    found = ratios(results)
    figure, (panel,) = axes(height=0.8 + 0.2 * len(found))
    figure.set_figwidth(5.2)
    heights = {key: -row - 0.7 * list(parts(results[0]["preset"])).index(key[0]) for row, key in enumerate(found)}
    names = list(next(iter(found.values())))
    for i, layer in enumerate(names):
        shift = 0.14 * ((len(names) - 1) / 2 - i)
        mean = np.array([row[layer].mean() for row in found.values()])
        ends = np.array([[mean_ - row[layer].min(), row[layer].max() - mean_]
                         for mean_, row in zip(mean, found.values(), strict=True)]).T
        panel.errorbar(mean, np.array([*heights.values()]) + shift, xerr=np.maximum(ends, 0), fmt=f"C{i}o",
                       markersize=2.5, elinewidth=0.8, label=layer)
    panel.axvline(1, color="0.3", linewidth=0.8)
    fine = 0.02  # nearly linear within 2 % of the default, nearly logarithmic beyond
    panel.set_xscale("function", functions=(lambda x: np.sign(x - 1) * np.log1p(np.abs(x - 1) / fine),
                                            lambda y: 1 + np.sign(y) * np.expm1(np.abs(y)) * fine))
    every = np.concatenate([v for row in found.values() for v in row.values()])
    low, high = min(every.min(), 0.98), max(every.max(), 1.02)
    ticks = [t for t in (0.3, 0.5, 0.8, 0.9, 0.95, 0.98, 1, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 3, 6, 12)
             if low - 0.01 <= t <= high + 0.01]
    panel.set(xlim=(low - 0.01, high + 0.01), xlabel="error over the default's", ylim=(min(heights.values()) - 1, 1))
    panel.set_xticks(ticks, [f"{t:g}" for t in ticks])
    panel.set_yticks([*heights.values()], [f"{part}: {name}" for part, name in heights])
    figure.legend(loc="outside lower center", ncols=4)
    return figure


EXPERIMENT = Experiment(
    "ablations", "each choice of the method is worth its place: order, iterations, refinement, damping, SVD, rotation, "
    "calibration data and start", runs, measure, draw, verdict)
