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

from caldera_jax import allocate
from caldera_jax.allocate import ErrorModel, Option
from caldera_jax.decompose import CalderaConfig
from caldera_jax.jobs import artifact, calibration, evaluate, report, spread
from caldera_jax.jobs.artifact import fingerprint
from caldera_jax.jobs.run import Run
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
    bits: a budget of stored bits a weight, for which ``allocate`` chooses rank, bits of Q and of L R of every layer
    (None: all as in ``caldera``, whose rank, q_bits and factor_bits count for nothing otherwise).  allocation: by what;
    see ``allocate.damage``; "uniform" chooses one for all layers.  ranks: to choose from (None: ``allocate.grid`` of
    each layer, or any for "uniform"); (0,) shares out the bits of Q alone.
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
        kinds = {kind.__name__: kind for kind in (RunConfig, Tokens, CalderaConfig)} | artifact.GRIDS
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
    most = None if config.bits is None else dearest(config, model) / weights(config, model.config)
    run = Run(out, identity(config, model, tokens, held_out))
    if (done := spread.first(run.report())) is not None:
        return done
    clock = report.Clock(spread.first(run.recall("clock")))
    clock.add("load", time.perf_counter() - start)
    origin = report.provenance(config, config.seed)
    if (base := spread.first(run.recall("base"))) is None:
        with clock.stage("evaluate base"):
            base = evaluate.perplexity(model.config, model.params, held_out, title="base perplexity")
        run.remember("base", base)
    if not spread.first(run.complete()):
        layers = _blocks(config, model, tokens, run, clock, moments)
        with clock.stage("write"):
            run.write(model, layers)
    del model  # the dense one
    warn(config, records := run.records())
    with clock.stage("evaluate compressed"):
        model = artifact.load(out)
        value = evaluate.perplexity(model.config, model.params, held_out, title="compressed perplexity")
    return run.finish(partial(summary, config, origin, everyone(clock), records, base, value, model, most, out))


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
    for group in [[index] for index in range(chosen)] if sequential else [range(chosen)]:
        if config.hessians is None and (sequential or not spread.first(calibrated(folder, chosen))):
            with clock.stage("calibrate"):
                _calibrate(inputs, folder, group)
            run.remember("clock", clock.stages)
        if not sequential:
            inputs.close()  # its streams
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
    row = record(path, layer, error, trace, part)
    if chosen is not None:
        losses = ErrorModel(*([x] for x in achieved[:2]), *achieved[2:])
        (loss,) = allocate.damage(config.allocation, layer.shape, losses, chosen["fisher"])
        row |= {"fisher": chosen["fisher"], "predicted_loss": chosen["predicted_loss"], "loss": loss}
    run.keep_layer(path, layer, row)


def _plan(config: RunConfig, model: Model, tokens: np.ndarray, run: Run, clock: report.Clock, folder: Path,
          slots: Sequence[Sequence[int]]) -> dict[str, Any]:
    """{path: option, predicted_loss, fisher}; what each layer would lose, the Fisher traces and the plan are kept.

    Each process measures its own layers and takes the gradients of its own shards of the windows; process 0 solves the
    plan.
    """
    shapes, choices = list(llama.shapes(model.config).values()), offered(config, model)
    paths = {f"blocks.{index}.{name}": name for index in range(len(slots)) for name in llama.LINEARS}
    with clock.stage("measure"):
        _layers(run, slots, range(len(slots)), shapes, "measure",
                lambda index, i: _measure(config, model, run, folder, choices, index, i))
        run.wait([f"{path}.options" for path in paths])
    shards = [f"fisher.{i}" for i in range(spread.SHARDS)] if config.allocation in ("gradient", "trace") else []
    with clock.stage("gradients"):
        _gradients(config, model, tokens, run, shards, len(slots))
        run.wait(shards)
    if spread.rank() == 0 and run.recall("plan") is None:
        found = [run.recall(shard) for shard in shards]
        fisher = {path: math.fsum(of.get(path, 0.0) for of in found) for path in paths}
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


def _gradients(config: RunConfig, model: Model, tokens: np.ndarray, run: Run, shards: Sequence[str],
               blocks: int) -> None:
    """The Fisher traces of this process's shards of the windows, each written unless it is there."""
    key = jax.random.fold_in(jax.random.key(config.seed), model.config.layers * len(llama.LINEARS))  # no layer's
    edges = [len(tokens) * i // spread.SHARDS for i in range(spread.SHARDS + 1)]
    devices = jax.local_device_count()
    own = [[i for i in range(len(shards)) if i * spread.slots() // spread.SHARDS == spread.rank() * devices + device]
           for device in range(devices)]

    def each(numbers):
        for i in tqdm(numbers, "gradients", disable=spread.rank() > 0, leave=False, unit="shard"):
            if run.recall(shards[i]) is None:
                windows = range(edges[i], edges[i + 1])
                run.keep(shards[i], calibration.traces(model.config, model.params, tokens, key, windows, blocks))

    spread.on_devices(each, own)


@jax.jit
@jax.default_matmul_precision("highest")
def _errors(w, layer, h):
    """Relative error, tr(E H Eᵀ), ‖E‖², tr(W H Wᵀ) and tr H."""
    w = w.astype(h.dtype)
    e = layer.dense() - w
    loss, energy = proxy_loss(e, h), proxy_loss(w, h)
    return ratio(loss, energy), loss, jnp.sum(e * e), energy, jnp.trace(h)


def record(path: str, layer: CompressedLinear, error: float, trace, part: dict[str, float]) -> dict[str, Any]:
    """What the report says of one layer.  ``bits``: all stored bits of the layer; ``error``: against the undamped H."""
    (m, n), used = layer.shape, (layer.q, layer.left_t, layer.right)
    q_bits, *factor_bits = (grid.code_bits / grid.block if part is not None else 0
                            for grid, part in zip(layer.grids, used, strict=True))
    return {"path": path, "shape": [m, n], "error": error, "bits": layer.stored_bits,
            "bits_per_weight": layer.stored_bits / (m * n), "rank": layer.rank, "q_bits": q_bits,
            "factor_bits": factor_bits, "damping": float(trace.damping),
            "half_step_errors": [round(float(e), 6) for e in trace.error],
            "seconds": round(part["seconds"], 3), "compile_seconds": round(part["compile_seconds"], 3),
            "process": spread.rank()}


def warn(config: RunConfig, records: list[dict[str, Any]]) -> None:
    """Name the layers whose Hessian needed more damping than asked for."""
    for row in records if spread.rank() == 0 else ():
        if row["damping"] > 1.01 * max(config.caldera.damping, 1e-12):
            print(f"{row['path']}: the Hessian is not positive definite with damping {config.caldera.damping:g}; "
                  f"raised to {row['damping']:g}")


def everyone(clock: report.Clock) -> tuple[dict[str, dict[str, float]], int]:
    """Each stage as the slowest and the largest process had it, and the sum of all processes' peak memory."""
    fields = ("seconds", "compile_seconds", "peak_memory_bytes")
    own = np.asarray([[stage[field] for field in fields] for stage in clock.stages.values()], np.float64)
    each = np.stack(spread.gather(own))
    rows = zip(clock.stages, each.max(0).tolist(), strict=True)
    stages = {name: {"seconds": round(row[0], 3), "compile_seconds": row[1], "peak_memory_bytes": int(row[2])}
              for name, row in rows}
    return stages, int(each[:, :, 2].max(1).sum())


def summary(config: RunConfig, origin: dict[str, Any], measured: tuple[dict[str, dict[str, float]], int],
            records: list[dict[str, Any]], base: float, value: float, model: Model, most: float | None,
            out: Path) -> dict[str, Any]:
    """The report of a finished run; ``most``: bits a weight that a budget could buy.  Of several processes ``stages``,
    ``seconds`` and ``peak_memory_bytes`` are those of the slowest and of the largest; ``peak_memory_bytes_of_all`` is
    the sum of their peaks."""
    bits = sum(r["bits"] for r in records)
    weights = sum(r["shape"][0] * r["shape"][1] for r in records)
    sums = {name: sum(r[name] for r in records) for name in ("predicted_loss", "loss")} if config.bits else {}
    planned = {"budget_bits_per_weight": config.bits, "dearest_bits_per_weight": most,
               "allocation": config.allocation, **sums} if config.bits else {}
    files = artifact.read_manifest(out)["files"]
    stages, memory = measured
    return {"model": config.model, **origin, "processes": spread.count(), "base_perplexity": base,
            "compressed_perplexity": value,
            "evaluated_tokens": config.evaluation.windows * (config.evaluation.window - 1),
            "bits_per_weight": bits / weights, **planned, "stored_bytes": bits // 8, "compressed_weights": weights,
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
    if config.bits is not None:
        bits = [bits for _, bits in offered(config, model).values()] * count(config, model.config)
        if config.allocation != "uniform":  # whose options have been made to fit
            allocate.check(bits, budget(config, model.config), weights(config, model.config))
    for name, shape in llama.shapes(model.config).items():
        if config.bits is None and config.caldera.rank > min(shape):
            raise ValueError(f"rank {config.caldera.rank} exceeds min(m, n) = {min(shape)} of layer {name} {shape}: "
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
