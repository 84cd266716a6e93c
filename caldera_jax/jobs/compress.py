"""The main job: a model in, the same model compressed out, resumable at every layer.

The only file that knows both the numerics and the models.  Every process of a run calls ``compress`` with the same
arguments and a directory that all of them see.  Each calibrates on its own windows, compresses its own layers and
writes them; process 0 writes what belongs to all (``run.Run``).
"""

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from caldera_jax import allocate
from caldera_jax.allocate import ErrorModel, Option
from caldera_jax.codebooks import Uniform
from caldera_jax.jobs import artifact, calibration, evaluate, level, plan, report, spread
from caldera_jax.jobs.artifact import fingerprint
from caldera_jax.jobs.run import Run, moments_hash
from caldera_jax.jobs.settings import RunConfig, budget, count, revived, weights
from caldera_jax.jobs.work import Work, record
from caldera_jax.linear import compress_matrix, dense, rounded
from caldera_jax.models import convert, data, files, llama
from caldera_jax.models.convert import Model
from caldera_jax.objective import proxy_loss, ratio


def compress(config: RunConfig, out: Path, moments: Path | None = None) -> dict[str, Any]:
    """Calibrate, compress every linear layer of the chosen blocks, write the artifact, evaluate, write the report.

    ``moments``: a directory to keep the Moments in; where it holds those of the same model and text, no calibration
    runs.
    Killed and started again with the same arguments, by any number of processes, it goes on with the unfinished layers
    and ends with the same bytes.  Memory: embedding and head, one block, its Moments and the residual streams, or one
    layer's workspace; see ``memory_need``.  Disk: 8 n² bytes for each input of n features of one block; of all blocks,
    with ``moments`` and where rates are planned for a budget.
    Raises ValueError for bad input (which layer, what to do) and OSError where the disk is full; finished layers stay.
    """
    start = time.perf_counter()
    model = convert.load(config.model)
    tokens, held_out = texts(config, model)
    check(config, model)
    planned = config.bits is not None and config.level is None
    most = plan.dearest(config, model) / weights(config, model.config) if planned else None
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
    """Calibrate and compress block after block, and the tables; the blocks become the compressed ones.  Returns the
    paths of what is compressed.

    What a budget buys is found before: a level from fewer windows, each block's Moments dropped when its layers are
    measured; a plan of fixed rates from the Moments of all blocks, which stay until then.
    """
    chosen, blocks = count(config, model.config), model.params["blocks"]
    dense = model.params | {"blocks": list(blocks)}
    sequential = config.activations == "compressed"
    job = Work(config, model, run, clock, run.work / "moments" if kept is None else kept / run.moments_hash)
    inputs = calibration.Inputs(model.config, model.params if sequential else dense, tokens, sequential, config.cap)
    metrics, known, of_layers = level.Metrics({}, {}), {}, {}
    if config.level is not None or config.outputs == "fisher":
        metrics = level.importance(job, tokens, run.work if kept is None else job.folder)
    if config.level is not None:
        if config.bits:
            few = config.importance.of(tokens, len(data.named(config.calibration.text)))
            first = job._replace(folder=run.work / "first" if kept is None else kept / moments_hash(
                run.identity | {"config": report.plain(replace(config, activations="dense")),
                                "calibration_sha256": files.sha256(few)}))
            calibrate = partial(_calibrate, calibration.Inputs(model.config, dense, few, cap=config.cap), first)
            known = level.curves(first, metrics, calibrate, partial(_drop, first, kept))
            del calibrate  # its streams
    elif config.bits is not None:
        unplanned = range(chosen if spread.first(run.recall("plan")) is None else 0)
        for index in tqdm(unplanned, "calibrate", disable=spread.rank() > 0, unit="block", leave=False):
            _calibrate(inputs, job, index)
        of_layers = plan.plan(job, tokens)
    tables = [job.tables] * (config.tables != "dense")
    missing = [i for i in [*range(chosen), *tables] if spread.first(run.recall(f"block.{i}")) is None]
    bar = job.bar("compress", missing)
    for index in range(chosen):
        if spread.first(run.recall(f"block.{index}")) is None:
            _calibrate(inputs, job, index)
            if config.level is not None:
                level.compress(job, index, bar, metrics, known)
            else:
                with clock.stage("compress"):
                    job.each([index], bar, partial(_layer, job, of_layers, metrics.g))
                    run.wait(job.paths([index]))
            _drop(job, kept, index)
            run.remember("clock", clock.stages)
            run.remember(f"block.{index}", "done")
        blocks[index] = run.block(model.config, index, blocks[index])
    if job.tables in missing:
        if config.tables == "level":
            level.compress(job, job.tables, bar, metrics, known)
        else:
            with clock.stage("compress"):
                job.each([job.tables], bar, partial(_table, job))
                run.wait(job.paths([job.tables]))
        run.remember("clock", clock.stages)
        run.remember(f"block.{job.tables}", "done")
    model.params.update({path: run.finished(path) for path in job.paths(tables)})
    bar.close()
    return job.paths([*range(chosen), *tables])


def calibrated(folder: Path, config: llama.LlamaConfig, blocks: Iterable[int]) -> bool:
    """Whether the Moments of these blocks are all there, and none was cut off since."""
    names = sorted(llama.input_sizes(config))
    return all(files.whole(calibration.spilled(folder, index, name)) for index in blocks for name in names)


def _calibrate(inputs: calibration.Inputs, job: Work, index: int) -> None:
    """The Moments of a block into the job's folder, unless they are there; the tables have none."""
    if index == job.tables or job.config.hessians is not None:
        return
    if not spread.first(calibrated(job.folder, job.model.config, [index])):
        with job.clock.stage("calibrate"):
            calibration.spill(job.folder, index, inputs.moments(index))
            spread.barrier()


def _drop(job: Work, kept: Path | None, index: int) -> None:
    """Remove the Moments of a block, unless they are to be kept."""
    spread.barrier()
    if index < job.tables and kept is None and spread.rank() == 0:
        for name in llama.input_sizes(job.model.config):
            calibration.spilled(job.folder, index, name).unlink(missing_ok=True)


def _layer(job: Work, of_layers: dict[str, Any], of_outputs: Mapping[str, np.ndarray], index: int, i: int) -> None:
    """Compress one layer at a fixed rate, as the plan says, and write it, unless it is finished."""
    path, config, run = job.path(index, i), job.config, job.run
    if run.layer(path) is not None:
        return
    chosen = of_layers.get(path)
    caldera = config.caldera if chosen is None else Option(*revived(chosen["option"])).of(config.caldera)
    with job.clock.part() as part:
        given = job.given(index, i)
        key, w, h, *_ = given
        layer, trace = compress_matrix(key, w, h, caldera, path, of_outputs[path] if of_outputs else None)
        error, *achieved = (float(x) for x in _errors(w, layer, h))
    row = record(path, layer, given, error, float(trace.damping), [round(float(e), 6) for e in trace.error], part)
    if chosen is not None:
        losses = ErrorModel(*([x] for x in achieved[:2]), *achieved[2:])
        (loss,) = allocate.damage(config.allocation, layer.shape, losses, chosen["fisher"])
        row |= {"fisher": chosen["fisher"], "predicted_loss": chosen["predicted_loss"], "loss": loss}
    run.keep_layer(path, layer, row)


def _table(job: Work, index: int, i: int) -> None:
    """Round the embedding or the head to so many bits a weight, a scale a row, and write it, unless it is finished."""
    path, run = job.path(index, i), job.run
    if run.layer(path) is not None:
        return
    with job.clock.part() as part:
        w = np.asarray(job.model.params[path])
        layer = rounded(w, Uniform(int(job.config.tables), group=w.shape[1]))
        error = np.linalg.norm(np.asarray(dense(layer)) - w) / max(np.linalg.norm(w), 1e-30)
    run.keep_layer(path, layer, record(path, layer, None, float(error), 0.0, [], part))


@jax.jit
@jax.default_matmul_precision("highest")
def _errors(w, layer, h):
    """Relative error, tr(E H Eᵀ), ‖E‖², tr(W H Wᵀ) and tr H."""
    w = w.astype(h.dtype)
    e = layer.dense() - w
    loss, energy = proxy_loss(e, h), proxy_loss(w, h)
    return ratio(loss, energy), loss, jnp.sum(e * e), energy, jnp.trace(h)


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
    stored = 8 * artifact.dense_bytes(model.params, {r["path"] for r in records}) + sum(r["bits"] for r in records)
    tables, records = ([r for r in records if (r["path"] in model.params) == of] for of in (True, False))
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
            "evaluated_tokens": measured.loss.size,
            "bits_per_weight": bits / weights, **sizes, "stored_bytes": bits // 8, "compressed_weights": weights,
            "model_bytes": artifact.model_bytes(model.params), **({"tables": tables} if tables else {}),
            "model_bits_per_weight": stored / llama.all_weights(model.config),
            "disk_bytes": sum((out / f).stat().st_size for f in files),
            "mean_layer_error": float(np.mean([r["error"] for r in records])),
            "max_layer_error": max(r["error"] for r in records), "layers": records, "seconds": report.seconds(stages),
            "stages": stages, "peak_memory_bytes": max(s["peak_memory_bytes"] for s in stages.values()),
            "peak_memory_bytes_of_all": memory}


class Need(NamedTuple):
    """About so many bytes of memory, at the peak."""

    each: int  # of every process
    together: int  # divided among all


def memory_need(config: llama.LlamaConfig, calibrated: tuple[int, int], evaluated: tuple[int, int],
                models: int = 2, tables: bool = False) -> Need:
    """Of a run over (windows, tokens of each) of both kinds, evaluating so many models at a time; ``tables``: with
    embedding and head brought to the level.

    Of each process: JAX and its programs, embeddings and heads, and the most of: a block, and what the layer with the
    most inputs works with; a block, the Moments of its inputs and a forward pass of a batch; a block, its gradients,
    their squares and a backward pass of a window, and the streams of CHUNK tokens that enter every block; the logits
    of a window; what a table at the level works with (measured).  Together: the residual streams.
    """
    inputs = llama.input_sizes(config).values()
    block, window, width = llama.block_weights(config), max(calibrated[1], evaluated[1]), config.ffn_dim + config.dim
    width = width * max(5, 3 * config.experts) // 5  # XLA holds what most experts see, by its own account on a CPU
    batch = max(window, min(4 * window, calibration.BATCH))
    scores = lambda tokens: min(tokens * window * config.heads, llama.NUMBERS)
    layer = 3 * block + 16 * max(inputs)**2
    forward = block + 8 * sum(n**2 for n in inputs) + 2 * scores(batch) + 4 * batch * width
    backward = (5 * block + config.layers * max(calibration.CHUNK, window) * config.dim + 3 * scores(window)
                + 6 * window * width)
    logits = 4 * min(window * config.vocab, llama.NUMBERS)
    levelled = 9 * config.vocab * config.dim * tables  # 36 bytes a weight
    each = 10**9 + 4 * (4 * config.vocab * config.dim + max(layer, forward, backward, logits, levelled))
    held = min(evaluated[0], evaluate.group(config, evaluated[1], models))
    return Need(each, 4 * config.dim * max(math.prod(calibrated), models * held * evaluated[1]))


def texts(config: RunConfig, model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Calibration and evaluation windows, from text that does not overlap: one source is split by document."""
    ours, theirs = config.calibration, config.evaluation
    documents = data.documents_beside(ours.text, theirs.text, "calibration")
    held_out = data.documents_beside(theirs.text, ours.text, "evaluation")
    plain = lambda texts: {" ".join(d.split()) for of in texts.values() for d in of}
    if shared := plain(documents) & plain(held_out):
        raise ValueError(f"{len(shared)} documents are in both the calibration text {ours.text!r} and the evaluation "
                         f"text {theirs.text!r}: remove them from one, or pass one text, to be split")
    longest = max(ours.window, theirs.window)
    if longest > model.config.context:
        raise ValueError(f"windows of {longest} tokens exceed the model's context {model.config.context}: shorten them")
    return (data.windows_beside(model, ours, theirs.text, "calibration", config.bos),
            data.windows_beside(model, theirs, ours.text, "evaluation", config.bos))


def check(config: RunConfig, model: Model) -> None:
    """Raise ValueError, before any work, for what would fail at some later layer."""
    if config.blocks is not None and config.blocks > model.config.layers:
        raise ValueError(f"blocks={config.blocks}, but {config.model} has {model.config.layers}")
    rank = config.caldera.rank if config.level is None else config.level.rank
    if config.bits is not None and config.level is None:
        bits = [bits for _, bits in plan.offered(config, model).values()] * count(config, model.config)
        if config.allocation != "uniform":  # whose options have been made to fit
            allocate.check(bits, budget(config, model.config), weights(config, model.config))
    for name, shape in llama.shapes(model.config).items():
        if (config.bits is None or config.level is not None) and rank > min(shape):
            raise ValueError(f"rank {rank} exceeds min(m, n) = {min(shape)} of layer {name} {shape}: "
                             f"choose a rank of at most {min(min(s) for s in llama.shapes(model.config).values())}")


def hessians_sha256(directory: str) -> dict[str, str]:
    """SHA-256 of every file of released Hessians, by name."""
    return {path.name: files.sha256(path) for path in sorted(Path(directory).glob("*.pt"))}


def identity(config: RunConfig, model: Model, tokens: np.ndarray, held_out: np.ndarray) -> dict[str, Any]:
    """What a run must share with the one it resumes: every setting, and the SHA-256 of all that goes in."""
    given = {} if config.hessians is None else {"hessians_sha256": hessians_sha256(config.hessians)}
    return {"config": report.plain(config), "model_sha256": fingerprint(model), **given,
            "tokenizer_sha256": files.sha256(model.tokenizer.to_str().encode()),
            "calibration_sha256": files.sha256(tokens), "evaluation_sha256": files.sha256(held_out)}
