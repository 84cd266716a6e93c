"""One level for the whole model: the importance of every output, and the level c that a budget pays for.

Each process takes the gradients of its own shards of the windows, measures its own layers and compresses them; process
0 solves for c.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from caldera_jax import levels, linear, objective
from caldera_jax.jobs import calibration, spread
from caldera_jax.jobs.calibration import OutputFisher, TableFisher
from caldera_jax.jobs.run import Run
from caldera_jax.jobs.settings import budget, count, weights
from caldera_jax.jobs.work import Given, Work, record
from caldera_jax.levels import Curve, LevelConfig
from caldera_jax.linear import at_level
from caldera_jax.models import data, files, llama
from caldera_jax.models.convert import Model

AIM, KNOWN, LEAST = 0.9975, 0.999, 0.995  # of a budget: what is solved for, first and by bits found, and enough
ROWS = 64  # of a layer, that are measured
TRIES = 6
UNSEEN = 0.5  # importance of a table's rows is drawn so far towards their mean: few windows show few of the tokens


class Metrics(NamedTuple):
    """What errors are weighed by: g of each layer's outputs and each table's rows; H of a table's columns (that of a
    layer is its Moments')."""

    g: Mapping[str, Float[np.ndarray, " _"]]
    h: Mapping[str, Float[np.ndarray, "_ _"]]


Done = Mapping[str, tuple[float, int]]  # the level of each layer, and its bits there


def output_fisher(model: Model, tokens: Int[np.ndarray, "w s"], seed: int, run: Run, folder: Path,
                  tables: bool = False) -> dict[str, OutputFisher | TableFisher]:
    """Of all layers, and of the ``tables``, from all these windows; the shards of them are kept in the folder, and made
    unless they are there.

    Raises ValueError (naming the layer) where gradients overflow.
    """
    key = jax.random.fold_in(jax.random.key(seed), model.config.layers * len(llama.linears(model.config)))  # no layer's
    edges = [len(tokens) * i // spread.SHARDS for i in range(spread.SHARDS + 1)]
    name = f"fisher{'_tables' * tables}_{seed}_{files.sha256(tokens)[:12]}"
    paths = [folder / f"{name}_{i}.safetensors" for i in range(spread.SHARDS)]
    devices = jax.local_device_count()
    own = [[i for i in range(spread.SHARDS) if i * spread.slots() // spread.SHARDS == spread.rank() * devices + device]
           for device in range(devices)]

    def each(numbers):
        for i in tqdm(numbers, "gradients", disable=spread.rank() > 0, leave=False, unit="shard"):
            if not files.whole(paths[i]):
                windows = range(edges[i], edges[i + 1])
                found = calibration.output_fisher(model.config, model.params, tokens, key, windows, tables=tables)
                files.write_arrays(paths[i], {f"{path}.{name}": np.asarray(value) for path, of in found.items()
                                              for name, value in of._asdict().items()})

    folder.mkdir(parents=True, exist_ok=True)
    spread.on_devices(each, own)
    run.wait_for(paths)
    total: dict[str, np.ndarray] = {}
    for path in paths:
        for name, value in files.read_arrays(path).items():
            if not np.isfinite(value).all():
                raise ValueError(f"{name.rsplit('.', 1)[0]}: its gradients hold NaN or infinite values: the model "
                                 "overflows on the calibration text; give another text, or weights of a sane size")
            total[name] = total[name] + value if name in total else value
    found: dict[str, OutputFisher | TableFisher] = {}
    for path in {name.rsplit(".", 1)[0] for name in total}:
        rows = total[f"{path}.rows"]
        found[path] = (TableFisher(total[f"{path}.second"], rows) if f"{path}.second" in total else
                       OutputFisher(rows, float(total[f"{path}.trace"])))
    return found


def importance(job: Work, tokens: Int[np.ndarray, "w s"], folder: Path) -> Metrics:
    """g of every layer's outputs, g and H of the tables where they are asked for; what they are found from is kept in
    the folder.

    An expert that none of these windows asks has the mean of the block's others: to others it may matter.
    """
    own, texts = job.config.importance, len(data.named(job.config.calibration.text))
    with job.clock.stage("gradients"):
        found = output_fisher(job.model, own.of(tokens, texts), job.config.seed, job.run, folder,
                              job.config.tables == "level")
    tables = {path: found.pop(path) for path in ("embed", "head") if path in found}
    if tables and job.model.config.tied:
        tables = {"embed": TableFisher(*map(np.add, tables["embed"], tables["head"]))}
    asked: dict[str, list[np.ndarray]] = {}
    for path, of in sorted(found.items()):
        if of.trace > 0:
            asked.setdefault(llama.kind_of(path), []).append(of.importance())
    raw = {path: of.importance() if of.trace > 0 else np.mean(asked.get(llama.kind_of(path), [of.rows]), axis=0)
           for path, of in found.items()}
    raw |= {path: of.rows / max(np.sum(of.rows), 1e-30) for path, of in tables.items()}
    drawn = {path: max(own.shrinkage, UNSEEN if path in tables else 0) for path in raw}
    return Metrics({path: objective.importance(g, own.floor, drawn[path]) for path, g in raw.items()},
                   {path: of.second for path, of in tables.items()})


def parts(job: Work) -> list[int]:
    """What is brought to the level: blocks, and behind them the tables."""
    return [*range(count(job.config, job.model.config)), *[job.tables] * (job.config.tables == "level")]


def curves(job: Work, metrics: Metrics, calibrate: Callable[[int], None],
           drop: Callable[[int], None]) -> dict[str, Curve]:
    """Of all that the budget is for, block after block: ``calibrate`` gives a block's Moments, ``drop`` removes them.

    Each is measured at the level that meets the budget by the curves of the blocks before it; the first block, at the
    level where it alone would meet it, which is found in two steps.
    """
    config, found = job.config, {}
    group = [index for index in parts(job) if index < job.tables or config.counted == "model"]
    missing = [index for index in group if not spread.first(
        all(job.run.recall(f"{path}.curve") is not None for path in job.paths([index])))]
    bar = job.bar("measure", [0, 0] * (0 in missing) + missing, leave=False)  # the first is measured three times
    for index in group:
        own = job.paths([index])
        if index in missing:
            calibrate(index)
            with job.clock.stage("measure"):
                for name in ("curve",) if index else ("guess0", "guess1", "curve"):
                    of = sum(job.weights(i) for i in group if found.keys() >= set(job.paths([i])))
                    c = spread.first(levels.solve(list(found.values()), config.bits * of, config.level, of)
                                     ) if found else None
                    job.each([index], bar, partial(_measure, job, metrics, c, name))
                    job.run.wait([f"{path}.{name}" for path in own])
                    found |= {path: Curve(**job.run.recall(f"{path}.{name}")) for path in own}
            drop(index)
        found |= {path: Curve(**job.run.recall(f"{path}.curve")) for path in own}
    bar.close()
    return found


def _measure(job: Work, metrics: Metrics, c: float | None, name: str, index: int, i: int) -> None:
    """The Curve of one layer, kept unless it is there.

    64 rows of a layer stand for all: the classes of widths of all rows are counted, and only how many bits the integers
    of a class take is theirs.
    """
    path, config = job.path(index, i), job.config
    if job.run.recall(f"{path}.{name}") is not None:
        return
    (_, w, h, *_), of_outputs = _given(job, metrics, index, i)
    if c is None:
        size = of_outputs @ np.mean(np.asarray(w, np.float64) ** 2, axis=1) / len(w) * float(jnp.trace(h)) / len(h)
        c = math.sqrt(max(size, 1e-30)) * 2.0 ** -min(config.bits, 6.0)
    some = min(len(w), ROWS)
    rows = np.arange(some) * len(w) // some
    *parts, _ = at_level(w, h, of_outputs, c, config.level, path, rows)
    job.run.keep(f"{path}.{name}", levels.measure(parts, c, config.level, rows)._asdict())


def next_level(config: LevelConfig, known: Mapping[str, Curve], done: Done, budget: float, weights: int,
               exact: bool = False) -> float:
    """c for the layers that are not done, of so many weights: what is left of the budget, by their curves.

    Unless these are ``exact``, as far as those of the others, done at (c, with so many bits), have been right; a tenth
    of all taken to be.  The last c stays where it meets the budget, so that all layers have one level.
    """
    left = [curve for path, curve in known.items() if path not in done]
    spent = sum(bits for _, bits in done.values())
    predicted = spent if exact else sum(known[path].bits(c, config) for path, (c, _) in done.items())
    share = (predicted + budget / 10) / (spent + budget / 10)
    if done and not exact:
        c = [*done.values()][-1][0]
        if LEAST * budget <= spent + sum(curve.bits(c, config) for curve in left) / share <= KNOWN * budget:
            return c
    return levels.solve(left, ((KNOWN if exact or done else AIM) * budget - spent) * share, config, weights)


def corrected(config: LevelConfig, known: Mapping[str, Curve],
              done: Mapping[str, tuple[float, int]]) -> dict[str, Curve]:
    """The curves as they would have predicted what was found."""
    def right(curve, c, bits):
        predicted = curve.bits(c, config) - curve.side
        if predicted < 1:  # of an expert that the few windows did not ask: no ratio mends it
            return curve._replace(side=bits)
        ratio = (bits - curve.side) / predicted
        return curve._replace(counts=[ratio * count for count in curve.counts])

    return {path: right(curve, *done[path]) if path in done else curve for path, curve in known.items()}


def compress(job: Work, index: int, bar: tqdm, metrics: Metrics, known: Mapping[str, Curve]) -> None:
    """Compress a block, or the tables, at the level given, or at the one that meets the budget as the curves predict
    it; the last of what it is for again, at another, where all together do not.  Tables that it is not for are
    compressed at the last block's level."""
    config, model, run, clock, _ = job
    group = parts(job)
    before = group[:group.index(index)]
    name, own = f"level.{index}", job.paths([index])
    done = {path: (row["level"], row["bits"]) for path in job.paths(before) for row in [run.recall(path)]}
    counted = config.bits is not None and (index < job.tables or config.counted == "model")
    whole = budget(config, model.config) if counted else math.inf
    left = weights(config, model.config) - sum(map(job.weights, before))
    tried = spread.first(run.recall(name)) or [config.c or (
        spread.first(next_level(config.level, known, done, whole, left)) if counted else [*done.values()][-1][0])]
    totals = []
    while True:
        run.remember(name, tried)
        turn = f"at{len(tried)}"
        with clock.stage("compress"):
            job.each([index], bar, partial(_layer, job, metrics, tried[-1], turn))
            run.wait([f"{path}.{turn}" for path in own])
        found = {path: tuple(run.recall(f"{path}.{turn}")) for path in own}
        totals.append(sum(bits for _, bits in (done | found).values()))
        last = all(later == job.tables and config.counted == "layers" for later in group[len(before) + 1:])
        if not counted or not last or LEAST * whole <= totals[-1] <= whole:
            return
        if len(tried) == TRIES:
            nearest = min(totals, key=lambda total: abs(total - whole)) / weights(config, model.config)
            raise ValueError(f"no level found takes {config.bits} bits a weight, or up to 0.5 % less: the nearest "
                             f"takes {nearest:.4f}; give another budget")
        exact = corrected(config.level, known, found)
        tried = [*tried, spread.first(next_level(config.level, exact, done, whole, left, True))]


def _layer(job: Work, metrics: Metrics, c: float, turn: str, index: int, i: int) -> None:
    """Compress one layer at level c, and write it, unless it is finished there."""
    path, run = job.path(index, i), job.run
    if (row := run.recall(path)) is None or row["level"] != c or run.layer(path) is None:
        with job.clock.part() as part:
            given, of_outputs = _given(job, metrics, index, i)
            _, w, h, *_ = given
            *parts, damping = at_level(w, h, of_outputs, c, job.config.level, path)
            layer = linear.packed(*parts, job.config.level)
            error, damage = map(float, _damage(w, layer, h, jnp.asarray(metrics.g[path], h.dtype)))
        row = record(path, layer, given, error, damping, [], part)
        row |= {"level": c, "predicted_damage": damage}
        run.keep_layer(path, layer, row)
    run.keep(f"{path}.{turn}", [c, row["bits"]])


def _given(job: Work, metrics: Metrics, index: int, i: int) -> tuple[Given, Float[np.ndarray, " m"]]:
    """A layer, or a table, and the importance of its outputs.

    Where the cap cuts tokens down, g grows by about as much as damping by the whole tokens' tr H would raise D.  This
    is found, not derived (experiments/README.md, One level): where attention rests on a massive token, finer steps for
    its layer pay more than H and g say.
    """
    path = job.path(index, i)
    if index == job.tables:
        w = jnp.asarray(np.asarray(job.model.params[path]))
        w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
        return Given(jax.random.key(0), w, jnp.asarray(metrics.h[path], w.dtype), 0.0, 1.0), metrics.g[path]
    given = job.given(index, i)
    return given, metrics.g[path] * given.lift


@jax.jit
@jax.default_matmul_precision("highest")
def _damage(w, layer, h, g):
    """Relative error, and ½ Σ_i g_i e_i H e_iᵀ."""
    w = w.astype(h.dtype)
    e = layer.dense().astype(h.dtype) - w
    each = jnp.sum((e @ h) * e, axis=1)
    return objective.ratio(jnp.sum(each), objective.proxy_loss(w, h)), g @ each / 2
