"""The main job: a model in, the same model compressed out, resumable at every layer.

The only file that knows both the numerics and the models.  Every process of a run calls ``compress`` with the same
arguments and a directory that all of them see.  Each calibrates on its own windows, compresses its own layers and
writes them; process 0 writes what belongs to all (``run.Run``).
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from caldera_jax import allocate, linear, objective
from caldera_jax.allocate import ErrorModel, Option
from caldera_jax.decompose import CalderaConfig
from caldera_jax.jobs import artifact, calibration, evaluate, level, report, spread
from caldera_jax.jobs.artifact import fingerprint
from caldera_jax.jobs.level import Importance
from caldera_jax.jobs.run import Run
from caldera_jax.levels import Curve, LevelConfig, Levelled
from caldera_jax.linear import CompressedLinear, compress_matrix
from caldera_jax.models import convert, data, files, llama
from caldera_jax.models.convert import Model
from caldera_jax.models.data import Tokens
from caldera_jax.objective import proxy_loss, ratio


@dataclass(frozen=True)
class RunConfig:
    """All that decides the result of a run.

    hessians: a directory of Hessians as the authors released them, instead of calibrating.
    blocks: compress only the first so many blocks (None: all).  activations: take the Moments on the dense model, as
    in the paper, or on the model whose earlier blocks are compressed already.
    bits: a budget of stored bits a weight.
    level: integers of free rate, all layers at one level (``levels``): at c, or where that is None at what meets the
    budget.
    importance: how that of the outputs is estimated.
    Without ``level`` rates are fixed, as in ``caldera``; with a budget ``allocate`` chooses rank, bits of Q and of L R
    of every layer.  allocation: by what; see ``allocate.damage``; "uniform" chooses one for all layers.  ranks: to
    choose from (None: ``allocate.grid`` of each layer, or any for "uniform"); (0,) shares out the bits of Q alone.
    """

    model: str
    caldera: CalderaConfig = CalderaConfig()
    calibration: Tokens = Tokens()
    evaluation: Tokens = Tokens(windows=32)
    activations: Literal["dense", "compressed"] = "dense"
    blocks: int | None = None
    seed: int = 0
    hessians: str | None = None
    bits: float | None = None
    allocation: allocate.Rule = "gradient"
    ranks: tuple[int, ...] | None = None
    level: LevelConfig | None = None
    c: float | None = None
    importance: Importance = Importance()

    def __post_init__(self):
        if self.activations not in ("dense", "compressed"):
            raise ValueError(f"activations must be 'dense' or 'compressed', got {self.activations!r}")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2^32 - 1, got {self.seed}")
        if self.evaluation.window < 2:
            raise ValueError(f"perplexity needs windows of at least 2 tokens, got {self.evaluation.window}")
        if self.allocation not in get_args(allocate.Rule):
            raise ValueError(f"allocation must be one of {', '.join(get_args(allocate.Rule))}; got {self.allocation!r}")
        if self.bits is not None and not 0 < self.bits < math.inf:
            raise ValueError(f"a budget of {self.bits} bits a weight cannot be met: give a positive number")
        if self.level is None and self.c is not None or self.level is not None and (
                (self.bits is None) == (self.c is None)):
            raise ValueError("one level for all layers has a LevelConfig, and is either given as c or found for a "
                             f"budget of bits; got {self.level}, bits {self.bits} and c {self.c}")
        if self.c is not None and not 0 < self.c < math.inf:
            raise ValueError(f"the level c must be positive and finite, got {self.c}")
        if self.level is not None:
            return
        if self.bits is not None and self.activations == "compressed":
            raise ValueError("a budget is shared out before any layer is compressed, so its Moments must be those of "
                             "the dense model: use activations='dense', or give no bits")
        if self.bits is not None and self.caldera.downdate:
            raise ValueError("a budget is shared out by what layers lose without the downdate, which would spoil the "
                             "plan: add --downdate False (downdate=False), or give no budget")
        if self.ranks is not None and (self.bits is None or not self.ranks or min(self.ranks) < 0):
            raise ValueError("ranks are what a budget of bits chooses from, one or more numbers from 0 on; got "
                             f"{self.ranks} and {'no' if self.bits is None else 'a'} budget: give both or neither")


def recorded(value: Any) -> Any:
    """The inverse of ``report.plain``: the RunConfig that a manifest's ``run`` holds as ``config``."""
    if isinstance(value, dict):
        fields = {name: recorded(item) for name, item in value.items()}
        kinds = {kind.__name__: kind for kind in (RunConfig, Tokens, CalderaConfig, LevelConfig, Importance)}
        kinds |= artifact.GRIDS
        return kinds[fields.pop("kind")](**fields) if "kind" in fields else fields
    return tuple(recorded(item) for item in value) if isinstance(value, list) else value


def compress(config: RunConfig, out: Path, moments: Path | None = None) -> dict[str, Any]:
    """Calibrate, compress every linear layer of the chosen blocks, write the artifact, evaluate, write the report.

    ``moments``: a directory to keep the Moments in; where it holds those of the same model and text, no calibration
    runs.
    Killed and started again with the same arguments, by any number of processes, it goes on with the unfinished layers
    and ends with the same bytes.  Memory: embedding and head, one block, its Moments and the residual streams, or one
    layer's workspace; see ``memory_need``.  Disk, until the run ends: 8 n² bytes for each input of n features, of all
    blocks (of one block with ``activations="compressed"``).
    Raises ValueError for bad input (which layer, what to do) and OSError where the disk is full; finished layers stay.
    """
    start = time.perf_counter()
    model = convert.load(config.model)
    tokens, held_out = texts(config, model)
    check(config, model)
    planned = config.bits is not None and config.level is None
    most = dearest(config, model) / weights(config, model.config) if planned else None
    run = Run(out, identity(config, model, tokens, held_out))
    if (done := spread.first(run.report())) is not None:
        return done
    clock = report.Clock(spread.first(run.recall("clock")))
    clock.add("load", time.perf_counter() - start)
    origin = report.provenance(config, config.seed)
    base = model._replace(params={**model.params, "blocks": list(model.params["blocks"])})
    if not spread.first(run.complete()):
        layers = _blocks(config, model, tokens, run, clock, moments)
        with clock.stage("write"):
            run.write(model, layers)
    warn(config, records := run.records())
    with clock.stage("evaluate"):
        model = artifact.load(out)
        measured = evaluate.compare(model.config, base.params, model.params, held_out, title="perplexity")
    return run.finish(partial(summary, config, origin, everyone(clock), records, measured, model, most, out))


def _blocks(config: RunConfig, model: Model, tokens: np.ndarray, run: Run, clock: report.Clock,
            kept: Path | None) -> list[str]:
    """Calibrate all blocks and then compress their layers, or block after block where calibration needs the compressed
    ones; the blocks become the compressed ones.  Returns the paths of the layers."""
    chosen = count(config, model.config)
    sequential, blocks = config.activations == "compressed", model.params["blocks"]
    folder = run.work / "moments" if kept is None else kept / run.moments_hash
    inputs = calibration.collect(model.config, model.params, tokens, chosen, sequential)
    shapes = list(llama.shapes(model.config).values())
    costs = [(m + 0.4 * n) * n for m, n in shapes]  # about as the seconds on a CPU
    slots = spread.assign([costs] * chosen, spread.slots())
    plan, known, importance = {}, {}, {}
    if config.level is not None:
        with clock.stage("gradients"):
            importance = _importance(config, model, tokens, run, run.work if kept is None else folder)
        if sequential and config.c is None:  # curves are measured before any block is compressed, on fewer windows
            first, few = run.work / "first", config.importance.of(tokens)
            if not spread.first(calibrated(first, chosen)):
                with clock.stage("calibrate"):
                    _calibrate(calibration.collect(model.config, model.params, few, chosen), first, range(chosen))
            known = _curves(config, model, run, clock, first, slots, shapes, importance)
    for group in [[index] for index in range(chosen)] if sequential else [range(chosen)]:
        if config.hessians is None and (sequential or not spread.first(calibrated(folder, chosen))):
            with clock.stage("calibrate"):
                _calibrate(inputs, folder, group)
            run.remember("clock", clock.stages)
        if not sequential:
            inputs.close()  # its streams
        if config.level is not None:
            if not sequential and config.c is None:
                known = _curves(config, model, run, clock, folder, slots, shapes, importance)
            with clock.stage("compress"):
                _at_level(config, model, run, clock, folder, slots, group, shapes, importance, known)
        else:
            plan = {} if config.bits is None else _plan(config, model, tokens, run, clock, folder, slots)
            with clock.stage("compress"):
                _layers(run, slots, group, shapes, "compress",
                        lambda index, i, plan=plan: _layer(config, model, run, clock, folder, plan, index, i))
                run.wait([f"blocks.{index}.{name}" for index in group for name in llama.LINEARS])
        for index in group:
            blocks[index] = run.block(index, blocks[index])
        run.remember("clock", clock.stages)
        if sequential and kept is None and spread.rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
    inputs.close()
    return [f"blocks.{index}.{name}" for index in range(chosen) for name in llama.LINEARS]


def calibrated(folder: Path, blocks: int) -> bool:
    """Whether the Moments of so many blocks are all there, and none was cut off since."""
    names = sorted(set(llama.INPUT_OF.values()))
    return all(files.whole(calibration.spilled(folder, index, name)) for index in range(blocks) for name in names)


def _calibrate(inputs: Iterator[tuple[int, dict[str, Any]]], folder: Path, group: Sequence[int]) -> None:
    quiet = len(group) == 1 or spread.rank() > 0
    for _ in tqdm(group, "calibrate", disable=quiet, unit="block", leave=False):
        calibration.spill(folder, *next(inputs))
    spread.barrier()


def _layers(run: Run, slots: Sequence[Sequence[int]], group: Sequence[int], shapes: Sequence[tuple[int, int]],
            title: str, work: Callable[[int, int], None]) -> None:
    """work(block, number of the layer in it) for each layer of these blocks that is this process's, on its device."""
    devices = jax.local_device_count()
    own = [[(index, i) for index in group for i, slot in enumerate(slots[index])
            if slot == spread.rank() * devices + device] for device in range(devices)]
    title = title if spread.count() == 1 else f"{title} (1 of {spread.count()} processes)"
    total = sum(math.prod(shapes[i]) for items in own for _, i in items)
    with tqdm(total=total, unit="weight", unit_scale=True, desc=title, disable=spread.rank() > 0) as progress:

        def each(items):
            for index, i in items:
                progress.set_postfix_str(f"blocks.{index}.{llama.LINEARS[i]}")
                work(index, i)
                progress.update(math.prod(shapes[i]))

        spread.on_devices(each, own)


def _given(config: RunConfig, model: Model, folder: Path, index: int, i: int):
    """(key, W, H) of one layer."""
    name = llama.LINEARS[i]
    source = llama.INPUT_OF[name]
    key = jax.random.fold_in(jax.random.key(config.seed), index * len(llama.LINEARS) + i)
    w = jnp.asarray(model.params["blocks"][index][name])
    if config.hessians is None:
        return key, w, calibration.load_moments(calibration.spilled(folder, index, source))[source].mean()
    return key, w, jnp.asarray(calibration.released(Path(config.hessians), model.config, index, source))


def _layer(config: RunConfig, model: Model, run: Run, clock: report.Clock, folder: Path, plan: dict[str, Any],
           index: int, i: int) -> None:
    """Compress one layer, as the plan says, and write it, unless it is finished."""
    path = f"blocks.{index}.{llama.LINEARS[i]}"
    if run.layer(path) is not None:
        return
    chosen = plan.get(path)
    caldera = config.caldera if chosen is None else Option(*recorded(chosen["option"])).of(config.caldera)
    with clock.part() as part:
        key, w, h = _given(config, model, folder, index, i)
        layer, trace = compress_matrix(key, w, h, caldera, path)
        error, *achieved = (float(x) for x in _errors(w, layer, h))
    row = record(path, layer, error, float(trace.damping), [round(float(e), 6) for e in trace.error], part)
    if chosen is not None:
        losses = ErrorModel(*([x] for x in achieved[:2]), *achieved[2:])
        (loss,) = allocate.damage(config.allocation, layer.shape, losses, chosen["fisher"])
        row |= {"fisher": chosen["fisher"], "predicted_loss": chosen["predicted_loss"], "loss": loss}
    run.keep_layer(path, layer, row)


def _importance(config: RunConfig, model: Model, tokens: np.ndarray, run: Run, folder: Path) -> dict[str, np.ndarray]:
    """g of every layer's outputs."""
    own = config.importance
    found = level.output_fisher(model, own.of(tokens), config.seed, run, folder)
    return {path: objective.importance(of.importance(), own.floor, own.shrinkage) for path, of in found.items()}


def _curves(config: RunConfig, model: Model, run: Run, clock: report.Clock, folder: Path,
            slots: Sequence[Sequence[int]], shapes: Sequence[tuple[int, int]],
            importance: dict[str, np.ndarray]) -> dict[str, Curve]:
    with clock.stage("measure"):
        return level.curves(config.level, run, config.bits, shapes, len(slots),
                            partial(_given, config, model, folder), importance,
                            lambda group, work: _layers(run, slots, group, shapes, "measure", work))


def _at_level(config: RunConfig, model: Model, run: Run, clock: report.Clock, folder: Path,
              slots: Sequence[Sequence[int]], group: Sequence[int], shapes: Sequence[tuple[int, int]],
              importance: dict[str, np.ndarray], known: dict[str, Curve]) -> None:
    """Compress these blocks at the level; the last ones again, at another, where all together miss the budget."""
    paths, name = [f"blocks.{index}.{name}" for index in group for name in llama.LINEARS], f"level.{group[0]}"
    before = [f"blocks.{index}.{name}" for index in range(group[0]) for name in llama.LINEARS]
    done = {path: (row["level"], row["bits"]) for path in before for row in [run.recall(path)]}
    whole = 0 if config.bits is None else budget(config, model.config)
    tried = spread.first(run.recall(name)) or [
        config.c or spread.first(level.next_level(config.level, known, done, whole))]
    while True:
        run.remember(name, tried)
        turn = len(tried) - 1
        _layers(run, slots, group, shapes, "compress", lambda index, i, c=tried[-1], turn=turn: _level_layer(
            config, model, run, clock, folder, importance, c, turn, index, i))
        run.wait([f"{path}.at{turn}" for path in paths])
        if config.bits is None or group[-1] + 1 < len(slots):
            return
        found = {path: tuple(run.recall(f"{path}.at{turn}")) for path in paths}
        total = sum(bits for _, bits in (done | found).values())
        if level.LEAST * whole <= total <= whole or (turn >= 3 and total <= whole):
            return
        if turn >= 6:
            raise ValueError(f"no level meets {config.bits} bits a weight: the nearest takes "
                             f"{total / weights(config, model.config):.4f}; raise the budget")
        known = level.corrected(config.level, known, found)
        tried = [*tried, spread.first(level.next_level(config.level, known, done, whole))]


def _level_layer(config: RunConfig, model: Model, run: Run, clock: report.Clock, folder: Path,
                 importance: dict[str, np.ndarray], c: float, turn: int, index: int, i: int) -> None:
    """Compress one layer at level c, and write it, unless it is finished there."""
    path = f"blocks.{index}.{llama.LINEARS[i]}"
    if (row := run.recall(path)) is None or row["level"] != c or run.layer(path) is None:
        with clock.part() as part:
            _, w, h = _given(config, model, folder, index, i)
            *parts, damping = linear.at_level(w, h, importance[path], c, config.level, path)
            layer = linear.packed(*parts, config.level)
            error, damage = (float(x) for x in _damage(w, layer, h, jnp.asarray(importance[path], h.dtype)))
        row = record(path, layer, error, damping, [], part) | {"level": c, "predicted_damage": damage}
        run.keep_layer(path, layer, row)
    run.keep(f"{path}.at{turn}", [c, row["bits"]])


@jax.jit
@jax.default_matmul_precision("highest")
def _damage(w, layer, h, g):
    """Relative error, and ½ Σ_i g_i e_i H e_iᵀ."""
    w = w.astype(h.dtype)
    e = layer.dense().astype(h.dtype) - w
    each = jnp.sum((e @ h) * e, axis=1)
    return ratio(jnp.sum(each), proxy_loss(w, h)), g @ each / 2


def _plan(config: RunConfig, model: Model, tokens: np.ndarray, run: Run, clock: report.Clock, folder: Path,
          slots: Sequence[Sequence[int]]) -> dict[str, Any]:
    """{path: option, predicted_loss, fisher}; what each layer would lose, the Fisher information and the plan are kept.

    Each process measures its own layers; process 0 solves the plan.
    """
    shapes, choices = list(llama.shapes(model.config).values()), offered(config, model)
    paths = {f"blocks.{index}.{name}": name for index in range(len(slots)) for name in llama.LINEARS}
    with clock.stage("measure"):
        _layers(run, slots, range(len(slots)), shapes, "measure",
                lambda index, i: _measure(config, model, run, folder, choices, index, i))
        run.wait([f"{path}.options" for path in paths])
    fisher = dict.fromkeys(paths, 0.0)
    if config.allocation in ("gradient", "trace"):
        with clock.stage("gradients"):
            found = level.output_fisher(model, tokens, config.seed, run, run.work)
        fisher = {path: float(found[path].rows.sum()) for path in paths}
    if spread.rank() == 0 and run.recall("plan") is None:
        models = {path: ErrorModel(**run.recall(f"{path}.options")) for path in paths}
        of = llama.shapes(model.config)
        damages = [allocate.damage(config.allocation, of[name], models[path], fisher[path])
                   for path, name in paths.items()]
        bits = [choices[name][1] for name in paths.values()]
        solve = allocate.alike if config.allocation == "uniform" else allocate.plan
        found = zip(paths.items(), solve(bits, damages, budget(config, model.config)), damages, strict=True)
        run.remember("plan", {path: {"option": choices[name][0][best], "predicted_loss": damage[best],
                                     "fisher": fisher[path]} for (path, name), best, damage in found})
    run.wait(["plan"])
    run.remember("clock", clock.stages)
    return run.recall("plan")


def _measure(config: RunConfig, model: Model, run: Run, folder: Path, choices: dict[str, Any], index: int,
             i: int) -> None:
    """The error model of one layer, written unless it is there."""
    path = f"blocks.{index}.{llama.LINEARS[i]}"
    if run.recall(f"{path}.options") is None:
        found = allocate.error_model(*_given(config, model, folder, index, i), config.caldera,
                                     choices[llama.LINEARS[i]][0], path)
        run.keep(f"{path}.options", found._asdict())


@jax.jit
@jax.default_matmul_precision("highest")
def _errors(w, layer, h):
    """Relative error, tr(E H Eᵀ), ‖E‖², tr(W H Wᵀ) and tr H."""
    w = w.astype(h.dtype)
    e = layer.dense() - w
    loss, energy = proxy_loss(e, h), proxy_loss(w, h)
    return ratio(loss, energy), loss, jnp.sum(e * e), energy, jnp.trace(h)


def record(path: str, layer: CompressedLinear, error: float, damping: float, half_steps: list[float],
           part: dict[str, float]) -> dict[str, Any]:
    """What the report says of one layer.  ``bits``: all stored bits of the layer; ``error``: against the undamped H."""
    (m, n), parts = layer.shape, layer.bits_of_parts()
    sizes, used = (m * n, m * layer.rank, n * layer.rank), (layer.q, layer.left_t, layer.right)
    q_bits, *factor_bits = (0 if part is None else bits / size if isinstance(part, Levelled) else
                            grid.code_bits / grid.block
                            for grid, part, bits, size in zip(layer.grids, used, parts[:3], sizes, strict=True))
    return {"path": path, "shape": [m, n], "error": error, "bits": sum(parts), "bits_per_weight": sum(parts) / (m * n),
            "rank": layer.rank, "q_bits": q_bits, "factor_bits": factor_bits, "damping": damping,
            "half_step_errors": half_steps, "seconds": round(part["seconds"], 3),
            "compile_seconds": round(part["compile_seconds"], 3), "process": spread.rank()}


def warn(config: RunConfig, records: list[dict[str, Any]]) -> None:
    """Name the layers whose Hessian needed more damping than asked for."""
    asked = (config.level or config.caldera).damping
    for row in records if spread.rank() == 0 else ():
        if row["damping"] > 1.01 * max(asked, 1e-12):
            print(f"{row['path']}: the Hessian is not positive definite with damping {asked:g}; raised to "
                  f"{row['damping']:g}")


def everyone(clock: report.Clock) -> tuple[dict[str, dict[str, float]], int]:
    """Each stage as the slowest and the largest process had it, and the sum of all processes' peak memory."""
    fields = ("seconds", "compile_seconds", "peak_memory_bytes")
    own = np.asarray([[stage[field] for field in fields] for stage in clock.stages.values()], np.float64)
    each = np.stack(spread.gather(own))
    rows = zip(clock.stages, each.max(0).tolist(), strict=True)
    stages = {name: {"seconds": round(row[0], 3), "compile_seconds": row[1], "peak_memory_bytes": int(row[2])}
              for name, row in rows}
    return stages, int(each[:, :, 2].max(1).sum())


def summary(config: RunConfig, origin: dict[str, Any], clocked: tuple[dict[str, dict[str, float]], int],
            records: list[dict[str, Any]], measured: evaluate.Comparison, model: Model, most: float | None,
            out: Path) -> dict[str, Any]:
    """The report of a finished run; ``most``: bits a weight that a plan could buy.  Of several processes ``stages``,
    ``seconds`` and ``peak_memory_bytes`` are those of the slowest and of the largest; ``peak_memory_bytes_of_all`` is
    the sum of their peaks."""
    bits = sum(r["bits"] for r in records)
    weights = sum(r["shape"][0] * r["shape"][1] for r in records)
    sizes = {"budget_bits_per_weight": config.bits} if config.bits or config.level else {}
    total = lambda *names: {name: sum(r[name] for r in records) for name in names}
    if config.level is not None:  # the last block's level; with compressed activations others may differ by a little
        sizes |= {"level": records[-1]["level"], **total("predicted_damage")}
    elif config.bits:
        sizes |= {"dearest_bits_per_weight": most, "allocation": config.allocation, **total("predicted_loss", "loss")}
    files = artifact.read_manifest(out)["files"]
    base, value, divergence = (float(np.mean(of, dtype=np.float64)) for of in measured[:3])
    stages, memory = clocked
    return {"model": config.model, **origin, "processes": spread.count(), "base_perplexity": math.exp(base),
            "compressed_perplexity": math.exp(value), "lost": value - base, "divergence": divergence,
            "evaluated_tokens": config.evaluation.windows * (config.evaluation.window - 1),
            "bits_per_weight": bits / weights, **sizes, "stored_bytes": bits // 8, "compressed_weights": weights,
            "model_bytes": artifact.model_bytes(model.params),
            "disk_bytes": sum((out / f).stat().st_size for f in files),
            "mean_layer_error": float(np.mean([r["error"] for r in records])),
            "max_layer_error": max(r["error"] for r in records), "layers": records, "seconds": report.seconds(stages),
            "stages": stages, "peak_memory_bytes": max(s["peak_memory_bytes"] for s in stages.values()),
            "peak_memory_bytes_of_all": memory}


def memory_need(config: llama.LlamaConfig) -> int:
    """About the peak memory of one process, bytes: JAX and its programs, embedding and logits, and what is more of: a
    block, and what the layer with the most inputs works with; a block, its gradients, their squares and the rest of a
    backward pass, and the streams of CHUNK tokens that enter every block."""
    inputs = max(n for _, n in llama.shapes(config).values())
    block = llama.block_weights(config)
    layer, gradients = 3 * block + 16 * inputs**2, 5 * block + config.layers * calibration.CHUNK * config.dim
    return 10**9 + 4 * (4 * config.vocab * config.dim + max(layer, gradients))


def texts(config: RunConfig, model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Calibration and evaluation windows, from text that does not overlap: one source is split by document."""
    ours, theirs = config.calibration, config.evaluation
    documents = data.load_text(ours.text)
    if data.same_text(ours.text, theirs.text):
        documents, held_out = data.split(documents)
    else:
        held_out = data.load_text(theirs.text)
        if shared := {" ".join(d.split()) for d in documents} & {" ".join(d.split()) for d in held_out}:
            raise ValueError(f"{len(shared)} documents are in both the calibration text {ours.text!r} and the "
                             f"evaluation text {theirs.text!r}: remove them from one, or pass one text, to be split")
    longest = max(ours.window, theirs.window)
    if longest > model.config.context:
        raise ValueError(f"windows of {longest} tokens exceed the model's context {model.config.context}: shorten them")
    return (data.token_windows(model.tokenizer, documents, ours.window, ours.windows, "calibration"),
            data.token_windows(model.tokenizer, held_out, theirs.window, theirs.windows, "evaluation"))


def check(config: RunConfig, model: Model) -> None:
    """Raise ValueError, before any work, for what would fail at some later layer."""
    if config.blocks is not None and config.blocks > model.config.layers:
        raise ValueError(f"blocks={config.blocks}, but {config.model} has {model.config.layers}")
    rank = config.caldera.rank if config.level is None else config.level.rank
    if config.bits is not None and config.level is None:
        bits = [bits for _, bits in offered(config, model).values()] * count(config, model.config)
        if config.allocation != "uniform":  # whose options have been made to fit
            allocate.check(bits, budget(config, model.config), weights(config, model.config))
    for name, shape in llama.shapes(model.config).items():
        if (config.bits is None or config.level is not None) and rank > min(shape):
            raise ValueError(f"rank {rank} exceeds min(m, n) = {min(shape)} of layer {name} {shape}: "
                             f"choose a rank of at most {min(min(s) for s in llama.shapes(model.config).values())}")


def count(config: RunConfig, model: llama.LlamaConfig) -> int:
    """Number of blocks that a run compresses."""
    return model.layers if config.blocks is None else config.blocks


def weights(config: RunConfig, model: llama.LlamaConfig) -> int:
    """Number of weights that a run compresses."""
    return count(config, model) * llama.block_weights(model)


def budget(config: RunConfig, model: llama.LlamaConfig) -> float:
    """Bits that a run may store."""
    return config.bits * weights(config, model)


def offered(config: RunConfig, model: Model) -> dict[str, tuple[list[Option], list[int]]]:
    """The options of each of a block's layers under the budget, and the bits that each stores."""
    shapes, caldera, dtype = llama.shapes(model.config), config.caldera, _scales(model)
    choices = {name: allocate.options(shape, caldera, config.ranks) for name, shape in shapes.items()}
    if config.allocation == "uniform":
        alike = allocate.alike_options([*shapes.values()] * count(config, model.config), caldera,
                                       budget(config, model.config), dtype, config.ranks)
        choices = dict.fromkeys(shapes, alike)
    return {name: (of, [allocate.stored_bits(shapes[name], option.of(caldera), dtype) for option in of])
            for name, of in choices.items()}


def dearest(config: RunConfig, model: Model) -> int:
    """Bits beyond which a larger budget buys nothing."""
    shapes = [*llama.shapes(model.config).values()] * count(config, model.config)
    return allocate.dearest_bits(shapes, config.caldera, config.allocation, _scales(model), config.ranks)


def _scales(model: Model) -> Any:
    dtype = jnp.asarray(model.params["blocks"][0]["q"]).dtype
    return dtype if dtype == jnp.float64 else jnp.dtype(jnp.float32)


def hessians_sha256(directory: str) -> dict[str, str]:
    """SHA-256 of every file of released Hessians, by name."""
    return {path.name: files.sha256(path) for path in sorted(Path(directory).glob("*.pt"))}


def identity(config: RunConfig, model: Model, tokens: np.ndarray, held_out: np.ndarray) -> dict[str, Any]:
    """What a run must share with the one it resumes: every setting, and the SHA-256 of all that goes in."""
    given = {} if config.hessians is None else {"hessians_sha256": hessians_sha256(config.hessians)}
    return {"config": report.plain(config), "model_sha256": fingerprint(model), **given,
            "tokenizer_sha256": files.sha256(model.tokenizer.to_str().encode()),
            "calibration_sha256": files.sha256(tokens), "evaluation_sha256": files.sha256(held_out)}
