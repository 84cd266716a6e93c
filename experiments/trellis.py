"""Q on the fixed-rate trellis against E8P of as many bits: on unit Gaussian numbers, and in the loop on real layers.

A run is a layer and a rotation: Q alone, and Q + L R with E8P, the trellis in all rounds, or E8P until the last; each
also with the factors rounded with feedback and the downdate.  Errors are on the text of H and on held-out text.  The
layer q has the codes by themselves, too: error on Gaussian numbers (the seed varies them) and seconds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from devices import timed
from drawing import axes
from machinery import Experiment, Result, layers, with_interval
from outer import Found, side, where

import caldera_jax as cj
from caldera_jax import CalderaConfig, Trellis
from caldera_jax.codebooks import Codebook, by_bits, down, quantize
from caldera_jax.kernels.matmul import Packed
from caldera_jax.objective import relative_error
from caldera_jax.packing import row_bytes

KINDS = {"": {}, ", feedback, downdate": {"factor_rounding": "feedback", "downdate": True}}


@dataclass(frozen=True)
class Config:
    """One layer; ``states`` of the trellises: the last on numbers alone, the one before it for all but Q at 2 bits."""

    model: str
    block: int
    layer: str
    rank: int
    states: tuple[int, ...]
    rounds: int
    numbers: int
    seed: int


def runs(preset: str) -> list[Config]:
    """The small layers of one block; three rotations."""
    if preset == "smoke":
        return [Config("tiny-smoke", 0, "q", 4, (256, 1024), 2, 192 * 8, 0)]
    return [Config("smollm2-135m", 14, layer, 32, (256, 1024, 4096, 65536), 5, 192 * 128, seed)
            for layer in "qkvo" for seed in range(3)]


def settings(config: Config) -> Iterator[tuple[str, CalderaConfig]]:
    """Name and configuration of every compression of a layer."""
    base = partial(CalderaConfig, outer_iterations=config.rounds, inner_iterations=5, svd="randomized")
    usual = config.states[-2]
    for bits in (2, 3, 4):
        yield f"alone, {bits} bits, E8P", base(rank=0, q_bits=bits)
        for states in config.states[:-1] if bits == 2 else (usual,):
            yield f"alone, {bits} bits, {states} states", base(rank=0, quantizer=Trellis(bits, states))
    for kind, more in KINDS.items():
        for name, grids in (("E8P", {}), ("trellis", {"quantizer": Trellis(2, usual)}),
                            ("draft", {"quantizer": Trellis(2, usual), "draft": "e8p"})):
            yield f"L R{kind}, {name}", base(rank=config.rank, **grids, **more)


def measure(config: Config) -> Result:
    """Bits and errors of every setting; of q, the codes by themselves."""
    place = config.model, config.block
    (w, h), (_, held_out) = (layers(*place, part=part)[config.layer] for part in ("calibration", "evaluation"))
    rows = {}
    for name, caldera in settings(config):
        layer, trace = cj.compress_matrix(jax.random.key(config.seed), w, h, caldera)
        found = np.asarray(layer.dense())
        rows[name] = {"bits": layer.stored_bits / w.size, "error": float(relative_error(w, found, h)),
                      "held_out": float(relative_error(w, found, held_out)),
                      "trace": np.asarray(trace.error, np.float64).tolist()}
    return {"shape": list(w.shape), "rows": rows, "codes": codes(config) if config.layer == "q" else {}}


def codes(config: Config) -> dict[str, Result]:
    """Code -> bits, mean squared error on unit Gaussian numbers, bits above the limit of as much error, microseconds a
    number of encoding them, and milliseconds of one token through a packed layer of 1536 x 576."""
    rng = np.random.default_rng(config.seed)
    x = jnp.asarray(rng.standard_normal((192, config.numbers // 192)), jnp.float32)
    grids = {f"E8P, {bits}": by_bits("e8p", bits) for bits in (2, 3, 4)} | {
        f"{states} states, {bits}": Trellis(bits, states) for bits in (1, 2, 3, 4) for states in config.states}
    found = {}
    for name, grid in grids.items():
        bits = grid.code_bits // grid.block
        error = float(jnp.mean((_QUANTIZE(grid, x).values - x) ** 2))
        taken = timed(partial(quantize, grid), [(x,)], 0.1)["seconds"]
        found[name] = {"bits": bits, "error": error, "above": bits + float(np.log2(error)) / 2,
                       "encode_us": 1e6 * taken / x.size, "apply_ms": 1e3 * applied(grid, config.seed)}
    return found


_QUANTIZE = jax.jit(quantize, static_argnums=0)


def applied(grid: Codebook, seed: int, m: int = 1536, n: int = 576) -> float:
    """Median seconds of one token through Q alone of random codes."""
    rng, lines, count = np.random.default_rng(seed), *((n, m) if down(grid) else (m, n // grid.block))
    packed = rng.integers(0, 256, (lines, row_bytes(count, grid.code_bits)), np.uint8)
    q = Packed(jnp.asarray(packed), jnp.ones((1, 1), jnp.float32))
    layer = cj.CompressedLinear(q, None, None, (), (), (m, n), (grid, grid, grid))
    x = jnp.asarray(rng.standard_normal((1, n)), jnp.float32)
    return timed(cj.apply, [(layer, x)], 0.1)["seconds"]


def ratios(results: Sequence[Result]) -> dict[str, Found]:
    """What is compared -> (layer, setting) -> ratios of held-out errors, paired by seed."""
    found: dict[str, Found] = {"alone": {}, "loop": {}, "draft": {}}
    for r in results:
        usual, rows = r["config"]["states"][-2], r["rows"]

        def add(what, item, name, reference, place=f"{r['config']['block']}.{r['config']['layer']}", rows=rows):
            found[what].setdefault((place, item), []).append(rows[name]["held_out"] / rows[reference]["held_out"])

        for bits in (2, 3, 4):
            add("alone", f"{bits} bits", f"alone, {bits} bits, {usual} states", f"alone, {bits} bits, E8P")
        for kind in KINDS:
            add("loop", f"L R{kind}", f"L R{kind}, trellis", f"L R{kind}, E8P")
            add("draft", f"L R{kind}", f"L R{kind}, draft", f"L R{kind}, trellis")
    return found


def verdict(results: Sequence[Result]) -> str:
    """A sentence for each part."""
    found, usual = ratios(results), results[0]["config"]["states"][-2]
    judge = partial(side, wanted="lower") if len({r["seed"] for r in results}) > 1 else (
        lambda values: side(2 * list(values), "lower"))
    above = lambda name: with_interval([r["codes"][name]["above"] for r in results if name in r["codes"]])
    lines = [f"On Gaussian numbers the trellis of {usual} states is {above(f'{usual} states, {bits}')} bits above the "
             f"limit at {bits} bits, E8P {above(f'E8P, {bits}')}." for bits in (2, 3, 4)]
    lines += [f"Q alone on {usual} states has less error than on E8P: {where(found['alone'], judge)}.",
              f"So has Q beside L R: {where(found['loop'], judge)}.",
              f"E8P until the last round has less error than the trellis in all: {where(found['draft'], judge)}."]
    return "\n  ".join([*lines, "Ratios of errors on held-out text."])


def draw(results: Sequence[Result]):
    """Bits above the limit by states; errors in the loop over E8P's."""
    figure, (left, right) = axes(2)
    coded = [r["codes"] for r in results if r["codes"]]
    states = results[0]["config"]["states"]
    for i, bits in enumerate((1, 2, 3, 4)):
        mean = [np.mean([c[f"{s} states, {bits}"]["above"] for c in coded]) for s in states]
        left.plot(states, mean, f"C{i}o-", label=f"trellis, {bits} bit{'s' * (bits > 1)}")
        if bits > 1:
            left.axhline(np.mean([c[f"E8P, {bits}"]["above"] for c in coded]), color=f"C{i}", linestyle=":",
                         label=f"E8P, {bits} bits")
    left.set(xscale="log", xlabel="states", ylabel="bits above the limit", title="unit Gaussian numbers")
    left.set_xticks(states, [*map(str, states)])
    left.set_xticks([], minor=True)
    names = list(dict.fromkeys(r["config"]["layer"] for r in results))
    for i, kind in enumerate(KINDS):
        for name, style in (("trellis", "o-"), ("draft", "s:")):
            mean = [np.mean([r["rows"][f"L R{kind}, {name}"]["held_out"] / r["rows"]["L R, E8P"]["held_out"]
                             for r in results if r["config"]["layer"] == layer]) for layer in names]
            right.plot(names, mean, f"C{i}{style}", label=f"{name}{kind}")
    mean = [np.mean([r["rows"]["L R, feedback, downdate, E8P"]["held_out"] / r["rows"]["L R, E8P"]["held_out"]
                     for r in results if r["config"]["layer"] == layer]) for layer in names]
    right.plot(names, mean, "C2^--", label="E8P, feedback, downdate")
    right.axhline(1, color="k", linewidth=0.5)
    right.set(ylabel="error over that of E8P", title=f"layers, k = {results[0]['config']['rank']}")
    for panel, place, columns in ((left, "upper right", 2), (right, "upper left", 1)):
        low, high = panel.get_ylim()
        panel.set_ylim(top=low + 1.5 * (high - low))
        panel.legend(loc=place, ncols=columns)
    return figure


EXPERIMENT = Experiment("trellis", "a fixed-rate trellis (QTIP, 2406.11235) has less error than E8P of as many bits, "
                        "also as the Q of CALDERA, and only the last round needs it", runs, measure, draw, verdict)
