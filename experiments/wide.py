"""The claims at width: every layer of three blocks of a model with 1536 and 8960 inputs, each at equal bits; and of a
block of an encoder with 768 and 3072 inputs, whose weights are float32.

One run is one layer and one rotation: Q alone and L R of every rank and factor bits, with and without the downdate,
passes and the rotation; one level for the layer; what ``theory/`` predicts of them, with the parts of the gap.  Errors
are on the text of H and on held-out text.  A token counts as at most 100 times the median one: one massive token would
be all that an error tells.  The seed varies rotation, subspace start and quantizer keys.
"""

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import encoder
import jax
import jax.numpy as jnp
import numpy as np
from drawing import axes
from machinery import Experiment, Result, model
from outer import Found, side, where
from output_factor import at_bits

import caldera_jax as cj
from caldera_jax import CalderaConfig, hessian, objective
from caldera_jax.jobs import calibration
from caldera_jax.models import data, llama
from caldera_jax.models.data import Tokens
from caldera_jax.objective import relative_error

sys.path.append(str(Path(__file__).resolve().parent.parent / "theory"))

CAP = 100.0  # ``hessian.update``
CHANGES = {"downdate": {"downdate": True}, "10 passes": {"refine_passes": 10},
           "downdate, 10 passes": {"downdate": True, "refine_passes": 10}, "no rotation": {"rotation": "none"}}
BEYOND = {"feedback": {"factor_rounding": "feedback"},  # the paper; of factors of few bits
          "feedback, downdate": {"factor_rounding": "feedback", "downdate": True}}


@dataclass(frozen=True)
class Config:
    """One layer; ``middle``: the rank at which ``changes``, of CHANGES or BEYOND, are tried; ``budgets``: of levels."""

    model: str
    block: int
    layer: str
    ranks: tuple[int, ...]
    factor_bits: tuple[int, ...]
    middle: int
    changes: tuple[str, ...]
    budgets: tuple[float, ...]
    windows: int
    window: int
    seed: int


def runs(preset: str) -> list[Config]:
    """Middle, early and late block; three rotations of the middle one's layers with few weights and of the encoder's,
    one of the others."""
    if preset == "smoke":
        return [Config("tiny-smoke", 0, "q", (4,), (4,), 4, ("downdate", *BEYOND), (3.0, 4.0), 8, 64, 0)]
    budgets = (2.0, 2.25, 2.5, 3.0, 4.0, 5.0)
    return [Config(encoder.NAME, 6, layer, (32, 64, 128), (2, 4, 16), 64, tuple(CHANGES), budgets, 32, 512, seed)
            for layer in encoder.LINEARS for seed in range(3)] + [
        Config("qwen2.5-coder-1.5b", block, layer, (64, 128, 256), (2, 4, 16), 128, (*CHANGES, *BEYOND), budgets, 32,
               512, seed) for block in (14, 2, 26) for layer in llama.LINEARS
        for seed in range(3 if block == 14 and layer in "qkvo" else 1)]


@cache
def hessians(name: str, block: int, windows: int, window: int, part: str) -> dict[str, np.ndarray]:
    """H of the inputs of one block, by the names of ``llama.INPUT_OF``."""
    if name == encoder.NAME:
        return encoder.hessians(block, windows, window, part, CAP)
    chosen = model(name)
    tokens = data.windows_beside(chosen, Tokens("enwiki", windows, window), "enwiki", part)
    moments = calibration.Inputs(chosen.config, chosen.params, tokens, cap=CAP).moments(block)
    return {key: np.asarray(of.mean()) for key, of in moments.items()}


def settings(config: Config, shape: tuple[int, int]) -> Iterator[tuple[str, CalderaConfig]]:
    """Name and configuration of every compression of a layer."""
    base = partial(CalderaConfig, outer_iterations=5, inner_iterations=5, svd="randomized")
    yield from ((f"Q alone, {bits} bits", base(rank=0, q_bits=bits)) for bits in (2, 3, 4))
    yield "Q alone, 2 bits, no rotation", base(rank=0, rotation="none")
    for rank in (rank for rank in config.ranks if rank <= min(shape)):
        for bits in config.factor_bits:
            yield f"k = {rank}, {bits}", base(rank=rank, factor_bits=bits)
            if rank == config.middle:
                yield from ((f"k = {rank}, {bits}, {name}", base(rank=rank, factor_bits=bits,
                                                                 **(CHANGES | BEYOND)[name]))
                            for name in config.changes if (bits < 16 if name in BEYOND else bits > 2))


def measure(config: Config) -> Result:
    """Bits and errors of every setting and of the level, the leading directions' share of the energy, what is
    predicted, and the parts of the gap to the limit."""
    w = np.asarray(encoder.weight(config.block, config.layer) if config.model == encoder.NAME else
                   model(config.model).params["blocks"][config.block][config.layer], np.float32)
    place = config.model, config.block, config.windows, config.window
    h, held_out = (hessians(*place, part)[llama.INPUT_OF[config.layer]] for part in ("calibration", "evaluation"))

    def row(layer: Any, **more: Any) -> Result:
        found = np.asarray(layer.dense(), np.float32)
        return {"bits": layer.stored_bits / w.size, "error": float(relative_error(w, found, h)),
                "held_out": float(relative_error(w, found, held_out)), **more}

    rows, level = {}, {}
    for name, caldera in settings(config, w.shape):
        layer, trace = cj.compress_matrix(jax.random.key(config.seed), w, h, caldera)
        rows[name] = row(layer, trace=np.asarray(trace.error, np.float64).tolist())
    if config.seed == 0:  # it draws nothing
        c, ones = 0.3 * np.sqrt(np.mean(w**2) * np.trace(h) / len(h)), np.ones(len(w), np.float32)

        def levelled(c):
            layer = cj.level(w, h, ones, float(c))
            return layer.stored_bits, row(layer, c=float(c))

        for bits in config.budgets:
            _, found = at_bits(levelled, w.size, bits, c)
            level[f"{bits:g}"], c = found, found["c"] / 1.3
    return {"shape": list(w.shape), "rows": rows, "level": level, "shares": shares(config, w, h),
            **predicted(config, w, h)}


def shares(config: Config, w: np.ndarray, h: np.ndarray) -> Result:
    """Of the energy of W, of W H^½, and of white weights in their place, in so many leading directions."""
    white = np.random.default_rng(config.seed).standard_normal(w.shape, np.float32)
    directions = dict.fromkeys((32, *config.ranks))
    def share(a, h=None):
        energy = objective.energies(a, h)
        return [float(energy[:k].sum() / energy.sum()) for k in directions]

    return {"directions": list(directions), "w": share(w), "white": share(white),
            "weighted": share(w, h), "white_weighted": share(white, h)}


@contextmanager
def theory() -> Iterator[tuple[Any, ...]]:
    """The modules of the claims, which work in float64, as nothing else here does."""
    before = jax.config.jax_enable_x64  # the first import of ``common`` changes it
    try:
        found = tuple(map(importlib.import_module, ("common", "when_rank_pays", "downdate", "rate_gap")))
        jax.config.update("jax_enable_x64", True)
        yield found
    finally:
        jax.config.update("jax_enable_x64", before)


def predicted(config: Config, w: np.ndarray, h: np.ndarray) -> Result:
    """Errors by ``when_rank_pays`` of every rank and factor bits; by ``downdate`` with and without it, at the middle
    rank; parts of the gap of Q alone and of that rank by ``rate_gap``."""
    with theory() as (common, when_rank_pays, downdate, rate_gap):
        parts = common.decompose(config.seed, w, h, CalderaConfig(rank=0))
        c = {bits: common.rounding_error(bits) for bits in (2, *config.factor_bits)}
        damping, ranks = float(parts.factors.damping), [rank for rank in config.ranks if rank <= min(w.shape)]
        every = when_rank_pays.shares(parts.w, parts.factors.h, damping, *ranks)
        found = {f"k = {rank}, {b}": min(when_rank_pays.predict(of_rank, c[2], c[b]))
                 for rank, of_rank in zip(ranks, every, strict=True) for b in config.factor_bits}
        factors = hessian.factor(jnp.asarray(parts.factors.h), damping, 8)
        fine = [bits for bits in config.factor_bits if bits > 2]
        turned = zip(map(str, fine), downdate.predict(parts.w, factors, config.middle, *fine), strict=True)
        asked, spectral = rate_gap.Config(outer_iterations=5, seed=config.seed), np.linalg.eigh(parts.factors.h)
        gaps = [rate_gap.row(asked, config.layer, w, h, *more, spectral=spectral) for more in ((), (config.middle, 4))]
    return {"predicted": found, "downdate": dict(turned), "gap": gaps}


# ---- what they say


def rival(rows: Result, bits: float, names: Sequence[str]) -> float:
    """Error at so many bits of what these rows are: log error is linear in bits between two, and beyond the last."""
    known = sorted((rows[name]["bits"], np.log(rows[name]["held_out"])) for name in names)
    at = min(max(1, int(np.searchsorted([b for b, _ in known], bits))), len(known) - 1)
    (b0, e0), (b1, e1) = known[at - 1:at + 1]
    return float(np.exp(e0 + (e1 - e0) * (bits - b0) / (b1 - b0)))


def ratios(results: Sequence[Result]) -> dict[str, Found]:
    """Part of the claims -> (layer, setting) -> ratios of held-out errors, paired by seed."""
    found: dict[str, Found] = {part: {} for part in CLAIMS}
    levels = {place(r): r["level"] for r in results if r["level"]}
    for r in results:
        rows, key = r["rows"], place(r)
        alone = [name for name in rows if name.endswith(" bits")]

        def add(part, item, value, key=key):
            found[part].setdefault((key, item), []).append(value)

        add("no rotation", "Q alone", rows["Q alone, 2 bits, no rotation"]["held_out"]
            / rows["Q alone, 2 bits"]["held_out"])
        before = "Q alone, 2 bits"
        for name in (name for name in rows if name.startswith("k")):
            own, (rank, bits, *change) = rows[name], name.split(", ", 2)
            if change:
                add(change[0], f"{rank}, {bits} bits", own["held_out"] / rows[f"{rank}, {bits}"]["held_out"])
                continue
            if bits == "4":
                add("rank", rank, own["held_out"] / rows[before]["held_out"])
                before = name
            add("rounds", f"{rank}, {bits} bits", min(own["trace"][-2:]) / own["trace"][1])
            add("alone", f"{rank}, {bits} bits", own["held_out"] / rival(rows, own["bits"], alone))
            add("level", f"{rank}, {bits} bits", own["held_out"] / rival(levels[key], own["bits"], list(levels[key])))
            add("predicted", f"{rank}, {bits} bits", own["error"] / r["predicted"][name])
        shares = {k: own / white for k, own, white in zip(*(r["shares"][key] for key in (
            "directions", "weighted", "white_weighted")), strict=True)}  # 32 is there twice in the first records
        for k, share in shares.items():
            add("share", f"{k} directions", share)
    return {part: of for part, of in found.items() if of}


def place(result: Result) -> str:
    """Block and layer, and the encoder's name."""
    of = "mpnet " if result["config"]["model"] == encoder.NAME else ""
    return f"{of}{result['config']['block']}.{result['config']['layer']}"


def verdict(results: Sequence[Result]) -> str:
    """A sentence for each part: where it holds, by what ratio."""
    def judge(values, wanted):  # of one rotation, by the margin alone
        return side(values if len(values) > 1 else 2 * values, wanted)

    lines = [f"{CLAIMS[part][0]}: {where(found, partial(judge, wanted=CLAIMS[part][1]))}."
             for part, found in ratios(results).items()]
    return "\n  ".join([*lines, "Ratios of errors on held-out text (predicted: on the text of H)."])


def draw(results: Sequence[Result]):
    """Held-out error against bits, a panel for each layer, seed 0."""
    chosen = [r for r in results if r["seed"] == 0]
    columns = min(len(chosen), 7)
    figure, panels = axes(columns, -(-len(chosen) // columns), 2.2)
    for panel in panels[len(chosen):]:
        panel.remove()
    for panel, r in zip(panels[:len(chosen)], chosen, strict=True):
        own = {name: row for name, row in r["rows"].items() if name.count(",") == 1}
        for label, names, style in (("Q alone", [n for n in own if n.startswith("Q")], "C0o-"),
                                    *((f"L R, {b}-bit factors", [n for n in own if n.endswith(f", {b}")], f"C{i}.-")
                                      for i, b in enumerate(r["config"]["factor_bits"], 1))):
            panel.semilogy([own[n]["bits"] for n in names], [own[n]["held_out"] for n in names], style, label=label)
        panel.semilogy([row["bits"] for row in r["level"].values()], [row["held_out"] for row in r["level"].values()],
                       "C4s-", label="level")
        panel.set(title=place(r), xlabel="bits a weight", ylabel="relative error", xlim=(1.9, 4.6))
    panels[0].legend()
    return figure


CLAIMS = {"share": ("the leading directions hold more of ‖W H^½‖² than of white weights with the same H", "higher"),
          "rank": ("the error falls with rank (over that of the rank before, 4-bit factors)", "lower"),
          "rounds": ("the outer iterations lower it (last round over first)", "lower"),
          "downdate": ("the downdate lowers it", "lower"), "10 passes": ("ten passes after LDLQ lower it", "lower"),
          "downdate, 10 passes": ("both do", "lower"),
          "feedback": ("rounding the factors with feedback lowers it", "lower"),
          "feedback, downdate": ("feedback and the downdate together do", "lower"),
          "no rotation": ("leaving the rotation out raises it", "higher"),
          "alone": ("L R beside a 2-bit Q has less error than Q alone of its size", "lower"),
          "level": ("... than one level of its size", "lower"),
          "predicted": ("when_rank_pays predicts more than is measured", "lower")}
EXPERIMENT = Experiment("wide", "what holds of the paper on small models holds at 1536 and 8960 inputs, and on weights "
                        "no grid has touched", runs, measure, draw, verdict)
