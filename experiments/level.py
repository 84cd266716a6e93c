"""One level for all weights of a model: perplexity and divergence against stored bits, and what each part is worth."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from drawing import axes
from machinery import Experiment, Result, decide, model, source, with_interval
from perplexity import moments

from caldera_jax import LevelConfig, hessian, incoherence, levels, linear
from caldera_jax.incoherence import Rotation
from caldera_jax.jobs import artifact, evaluate, level
from caldera_jax.jobs.compress import compress
from caldera_jax.jobs.settings import Importance, RunConfig, count
from caldera_jax.models import data, llama
from caldera_jax.models.data import Tokens
from caldera_jax.objective import proxy_loss
from caldera_jax.packing import pack_signs

PYTHON = 16  # windows of program text, the second domain


@dataclass(frozen=True)
class Config:
    """One compressed model; ``part``: what is changed of ``plain``.  It holds names only, so that its hash does not
    depend on where the model lies."""

    model: str
    part: str
    bits: float
    windows: int
    window: int
    seed: int


# ---- what can be changed


def alike(job, tokens, folder) -> dict[str, np.ndarray]:
    """Importance that knows nothing of the model: that of every output of a layer, and of every layer's own size."""
    found = {}
    for path in job.paths(range(count(job.config, job.model.config))):
        _, index, name = path.split(".")
        _, w, h, *_ = job.given(int(index), llama.LINEARS.index(name))
        found[path] = np.full(len(w), len(w) / float(proxy_loss(w.astype(h.dtype), h)))
    return found


def elsewhere(importance: Callable[..., Any], job, tokens, folder):
    """Importance from program text."""
    text = Tokens("python", job.config.calibration.windows, tokens.shape[1])
    return importance(job, data.windows_beside(job.model, text, "", "calibration"), folder)


def one_step(quantize: Callable[..., Any], w, factors, *more, **named):
    """The same step in all columns: the geometric mean of theirs."""
    mean = jnp.exp(jnp.mean(jnp.log(jnp.diagonal(factors.root))))
    return quantize(w, factors._replace(root=mean * jnp.eye(len(factors.root), dtype=w.dtype)), *more, **named)


def signs(n: int) -> Any:
    """Of the rotation of n inputs."""
    return incoherence.draw(jax.random.key(n), 1, n, "hadamard", jnp.float32).right


def rotated(at_level: Callable[..., Any], w, h, *more):
    """With inputs rotated by signs and a Hadamard transform."""
    right = signs(w.shape[1])
    return at_level(incoherence.rotate_weight(Rotation((), right), w), incoherence.rotate_hessian(right, h), *more)


def turned(packed: Callable[..., Any], *parts):
    """The layer that ``rotated`` found, with its rotation."""
    layer = packed(*parts)
    return replace(layer, right_side=pack_signs(signs(layer.shape[1])))


@contextmanager
def changed(*patches) -> Iterator[None]:
    """Functions of the package replaced, and nothing kept that was compiled with others."""
    jax.clear_caches()
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()
        jax.clear_caches()


PLAIN, ALIKE, OWN = "all parts", "layers alike, too", "tokens capped at 10000, importance as it is"
SETTINGS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "scalar integers": {"level": LevelConfig(states=1)}, "8 states": {"level": LevelConfig(states=8)},
    "bits for nothing": {"level": LevelConfig(bit_price=0.0)},
    "twice their price": {"level": LevelConfig(bit_price=0.74)},
    "outputs of a layer alike": {"importance": Importance(shrinkage=1.0)}, ALIKE: {},
    "columns alike": {}, "inputs rotated": {}, "on compressed blocks": {"activations": "compressed"},
    **{f"importance from {windows} windows": {"importance": Importance(windows=windows)} for windows in (4, 64)},
    "importance as estimated": {"importance": Importance(floor=0.0, shrinkage=0.0)}, "importance on python": {},
    "16 windows of text": {"calibration": 16}, "on python": {"text": "python"},
    "on both texts": {"text": "enwiki+python"},
    "tokens capped at 10000": {"token_cap": 1e4}, OWN: {"token_cap": 1e4},
}


def patches(part: str) -> list[Any]:
    """What is replaced in the package."""
    return {ALIKE: [patch.object(level, "importance", alike)],
            "importance on python": [patch.object(level, "importance", partial(elsewhere, level.importance))],
            OWN: [patch.object(hessian.Moments, "left_out", lambda moments, damping: 1.0)],
            "columns alike": [patch.object(levels, "quantize", partial(one_step, levels.quantize))],
            "inputs rotated": [patch.object(level, "at_level", partial(rotated, level.at_level)),
                               patch.object(linear, "packed", partial(turned, linear.packed))]}.get(part, [])


# ---- runs


def runs(preset: str) -> list[Config]:
    """Levels from 1 to 4 bits, and every change at 2 bits; on SmolLM2-135M one seed, on the tiny model, at 3 bits for
    2, three: they draw other labels for the importance."""
    if preset == "smoke":
        return [Config("tiny-smoke", part, bits, 8, 64, 0)
                for part, bits in ((PLAIN, 4.0), (PLAIN, 5.0), ("scalar integers", 4.0), ("inputs rotated", 4.0))]
    few = ("scalar integers", "bits for nothing", "outputs of a layer alike", ALIKE, "columns alike",
           "inputs rotated", "on compressed blocks")
    points = [(PLAIN, bits) for bits in (2.0, 2.5, 3.0, 4.0)] + [(part, 3.0) for part in few]
    tiny = [Config("tiny", part, bits, 32, 256, seed) for part, bits in points for seed in range(3)]
    large = [Config("smollm2-135m", PLAIN, bits, 64, 512, 0) for bits in (2.0, 2.3, 3.0, 1.5, 4.0, 1.0)]
    large += [Config("smollm2-135m", "on both texts", bits, 64, 512, 0) for bits in (2.0, 3.0)]
    return large + [Config("smollm2-135m", part, 2.0, 64, 512, 0) for part in SETTINGS
                    if part not in (PLAIN, "on both texts")] + tiny


def run_config(config: Config) -> RunConfig:
    """The whole of it."""
    own = {"level": LevelConfig(), "token_cap": 0.0, **SETTINGS[config.part]}
    text, windows = own.pop("text", "enwiki"), min(own.pop("calibration", config.windows), config.windows)
    return RunConfig(source(config.model), calibration=Tokens(text, windows, config.window),
                     evaluation=Tokens("enwiki", min(32, config.windows), config.window), bits=config.bits,
                     seed=config.seed, **own)


def measure(config: Config) -> Result:
    """Compress the whole model, in a directory that is then dropped; both texts' perplexity and divergence."""
    with TemporaryDirectory() as folder, changed(*patches(config.part)):
        out = Path(folder) / "out"
        found = compress(run_config(config), out, Path(moments().name))
        base, other = model(config.model), artifact.load(out)
        windows = min(PYTHON, config.windows)
        tokens = data.windows_beside(base, Tokens("python", windows, config.window), "", "evaluation")
        before, after, divergence = (float(np.mean(part, dtype=np.float64)) for part in evaluate.compare(
            base.config, base.params, other.params, tokens)[:3])
    kept = ("base_perplexity", "compressed_perplexity", "lost", "divergence", "predicted_damage", "bits_per_weight",
            "level", "mean_layer_error", "model_bytes", "disk_bytes")
    bits = {name: float(np.mean([row["bits_per_weight"] for row in found["layers"] if row["path"].endswith(name)]))
            for name in llama.LINEARS}
    return {**{name: found[name] for name in kept}, "bits_by_kind": bits, "stages": found["seconds"], "python": {
        "base_perplexity": np.exp(before), "compressed_perplexity": np.exp(after), "lost": after - before,
        "divergence": divergence}}


def cell(results: Sequence[Result], name: str, part: str, bits: float | None = None) -> list[Result]:
    """The runs of one model and part, at one budget or all, by bits and seed."""
    found = [r for r in results if (r["config"]["model"], r["config"]["part"]) == (name, part)
             and bits in (None, r["config"]["bits"])]
    return sorted(found, key=lambda r: (r["config"]["bits"], r["seed"]))


def changed_at(results: Sequence[Result], name: str) -> tuple[float, dict[str, list[Result]]]:
    """Where a model's changes were measured, and their runs."""
    parts = {r["config"]["part"]: r["config"]["bits"] for r in results
             if r["config"]["model"] == name and r["config"]["part"] != PLAIN}
    bits = min(parts.values())
    return bits, {part: cell(results, name, part, bits) for part in parts}


def verdict(results: Sequence[Result]) -> str:
    """Both texts at every budget, the prediction, and what each change does to the divergence at one of them."""
    lines = []
    for name in dict.fromkeys(r["config"]["model"] for r in results):
        first = cell(results, name, PLAIN)[0]
        curve = [f"{bits:g} bits {np.mean([r['compressed_perplexity'] for r in rows]):.2f} "
                 f"({np.mean([r['python']['compressed_perplexity'] for r in rows]):.2f})"
                 for bits in sorted({r["config"]["bits"] for r in cell(results, name, PLAIN)})
                 for rows in [cell(results, name, PLAIN, bits)]]
        lines.append(f"{name}: perplexity on Wikipedia (on program text), dense {first['base_perplexity']:.2f} "
                     f"({first['python']['base_perplexity']:.2f}): {'; '.join(curve)}.")
        share = [r["divergence"] / r["predicted_damage"] for r in cell(results, name, PLAIN)]
        lines.append(f"{name}: measured divergence {min(share):.2f} to {max(share):.2f} of that predicted, the more "
                     "the fewer bits.")
        used = [r["bits_per_weight"] / r["config"]["bits"] for r in results if r["config"]["model"] == name]
        lines.append(f"{name}: of the budget {min(used):.2%} to {max(used):.2%} is used.")
        bits, parts = changed_at(results, name)
        plain = cell(results, name, PLAIN, bits)
        for part, rows in parts.items():
            ratio = [r["divergence"] / p["divergence"] for r, p in zip(rows, plain, strict=True)]
            decided = f", {decide(ratio)}" if len(ratio) > 1 else ""
            texts = " and ".join(f"{np.mean([r[text]['lost'] if text else r['lost'] for r in rows]):.3f} for "
                                 f"{np.mean([r[text]['lost'] if text else r['lost'] for r in plain]):.3f}"
                                 for text in ("", "python"))
            lines.append(f"{name}, {bits:g} bits, {part}: divergence {with_interval(ratio)} times as large{decided}; "
                         f"nats lost on Wikipedia and program text {texts}.")
    return "\n  ".join(lines)


def draw(results: Sequence[Result]):
    """Divergence against bits on both texts, predicted against measured divergence, and what each change costs."""
    names = list(dict.fromkeys(r["config"]["model"] for r in results))
    figure, panels = axes(3, len(names), height=2.8)
    for row, name in enumerate(names):
        left, middle, right = panels[3 * row:3 * row + 3]
        for i, part in enumerate((PLAIN, "on both texts")):
            own = cell(results, name, part)
            cells = [cell(own, name, part, bits) for bits in dict.fromkeys(r["config"]["bits"] for r in own)]
            for text, marker in (("", "o-"), ("python", "s--")):
                if cells:
                    left.semilogy([np.mean([r["bits_per_weight"] for r in rows]) for rows in cells],
                                  [np.mean([(r[text] if text else r)["divergence"] for r in rows]) for rows in cells],
                                  f"C{i}{marker}", label=f"{part}: {text or 'enwiki'}")
        left.set(xlabel="stored bits per weight", ylabel="divergence, nats a token", title=name)
        left.legend()
        rows = [r for r in results if r["config"]["model"] == name and r["config"]["part"] != ALIKE]  # not in nats
        for part in dict.fromkeys(r["config"]["part"] for r in rows):
            own = cell(results, name, part)
            middle.loglog([r["predicted_damage"] for r in own], [r["divergence"] for r in own],
                          "ko-" if part == PLAIN else ".", label=PLAIN if part == PLAIN else None)
        ends = np.array([min(r["predicted_damage"] for r in rows), max(r["predicted_damage"] for r in rows)])
        middle.loglog(ends, ends, color="0.5", linewidth=0.6)
        middle.set(xlabel="½ Σ g e H eᵀ, nats a token", ylabel="measured divergence", title="predicted and measured")
        bits, parts = changed_at(results, name)
        plain = cell(results, name, PLAIN, bits)
        ratios = {part: [r["divergence"] / p["divergence"] for r, p in zip(own, plain, strict=True)]
                  for part, own in parts.items()}
        order = sorted(ratios, key=lambda part: np.mean(ratios[part]))
        right.barh(order, [np.mean(ratios[part]) - 1 for part in order], left=1, color="C0", height=0.6)
        for y, part in enumerate(order):
            right.plot(ratios[part], [y] * len(ratios[part]), "k.")
        right.set(xlabel="divergence over that with all parts", title=f"{bits:g} bits", xscale="log")
    return figure


EXPERIMENT = Experiment("level", "one level for all weights loses half of what fixed rates lose at 2 bits, and "
                        "trellis, column steps and importance are each worth bits", runs, measure, draw, verdict)
