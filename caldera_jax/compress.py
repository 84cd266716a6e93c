"""The main job: a model in, the same model compressed out, resumable at every layer.

The only file that knows both the numerics and the models.  Every process of a run calls ``compress`` with the same
arguments and a directory that all of them see.  Each calibrates on its own windows, compresses its own layers and
writes them; process 0 writes what belongs to all (``run.Run``).
"""

import hashlib
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from caldera_jax import artifact, calibration, evaluate, files, hessian, report, spread
from caldera_jax.decompose import CalderaConfig
from caldera_jax.linear import CompressedLinear, compress_matrix
from caldera_jax.models import convert, data, llama
from caldera_jax.models.convert import Model
from caldera_jax.objective import relative_error
from caldera_jax.run import Run


@dataclass(frozen=True)
class Tokens:
    """``windows`` windows of ``window`` tokens of a built-in text, a file or a directory."""

    text: str = "enwiki"
    windows: int = 64
    window: int = 512


@dataclass(frozen=True)
class RunConfig:
    """All that decides the result of a run.

    hessians: a directory of Hessians as the authors released them, instead of calibrating.
    blocks: compress only the first so many blocks (None: all).  activations: take the Moments on the dense model, as
    in the paper, or on the model whose earlier blocks are compressed already.
    """

    model: str
    caldera: CalderaConfig = CalderaConfig()
    calibration: Tokens = Tokens()
    evaluation: Tokens = Tokens(windows=32)
    activations: Literal["dense", "compressed"] = "dense"
    blocks: int | None = None
    seed: int = 0
    hessians: str | None = None

    def __post_init__(self):
        if self.activations not in ("dense", "compressed"):
            raise ValueError(f"activations must be 'dense' or 'compressed', got {self.activations!r}")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to 2^32 - 1, got {self.seed}")
        if self.evaluation.window < 2:
            raise ValueError(f"perplexity needs windows of at least 2 tokens, got {self.evaluation.window}")


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
    layer's workspace.  Disk, until the run ends: 8 n² bytes for each input of n features, of all blocks (of one block
    with ``activations="compressed"``).
    Raises ValueError for bad input (which layer, what to do) and OSError where the disk is full; finished layers stay.
    """
    start = time.perf_counter()
    model = convert.load(config.model)
    tokens, held_out = texts(config, model)
    check(config, model)
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
    return run.finish(partial(summary, config, origin, everyone(clock), records, base, value, model, out))


def _blocks(config: RunConfig, model: Model, tokens: np.ndarray, run: Run, clock: report.Clock,
            kept: Path | None) -> list[str]:
    """Calibrate all blocks and then compress their layers, or block after block where calibration needs the compressed
    ones; the blocks become the compressed ones.  Returns the paths of the layers."""
    chosen = model.config.layers if config.blocks is None else config.blocks
    sequential, blocks = config.activations == "compressed", model.params["blocks"]
    folder = run.work / "moments" if kept is None else kept / run.moments_hash
    inputs = calibration.collect(model.config, model.params, tokens, chosen, sequential)
    costs = [(m + 0.4 * n) * n for m, n in llama.shapes(model.config).values()]  # about as the seconds on a CPU
    slots = spread.assign([costs] * chosen, spread.slots())
    for group in [[index] for index in range(chosen)] if sequential else [range(chosen)]:
        if config.hessians is None and (sequential or not spread.first(calibrated(folder, chosen))):
            with clock.stage("calibrate"):
                _calibrate(inputs, folder, group)
            run.remember("clock", clock.stages)
        if not sequential:
            inputs.close()  # its streams
        with clock.stage("compress"):
            _layers(config, model, run, clock, folder, {index: slots[index] for index in group})
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


def _layers(config: RunConfig, model: Model, run: Run, clock: report.Clock, folder: Path,
            slots: dict[int, list[int]]) -> None:
    """Compress the layers that are this process's and not finished, each on the device that it is assigned to."""
    devices, shapes = jax.local_device_count(), list(llama.shapes(model.config).values())
    work = [[(index, i) for index, of in slots.items() for i, slot in enumerate(of)
             if slot == spread.rank() * devices + device] for device in range(devices)]
    title = "compress" if spread.count() == 1 else f"compress (1 of {spread.count()} processes)"
    total = sum(math.prod(shapes[i]) for items in work for _, i in items)
    with tqdm(total=total, unit="weight", unit_scale=True, desc=title, disable=spread.rank() > 0) as progress:

        def compress_each(items):
            for index, i in items:
                path = f"blocks.{index}.{llama.LINEARS[i]}"
                progress.set_postfix_str(path)
                if run.layer(path) is None:
                    _layer(config, model, run, clock, folder, index, i)
                progress.update(math.prod(shapes[i]))

        spread.on_devices(compress_each, work)


def _layer(config: RunConfig, model: Model, run: Run, clock: report.Clock, folder: Path, index: int, i: int) -> None:
    """Compress one layer and write it."""
    name = llama.LINEARS[i]
    path, source = f"blocks.{index}.{name}", llama.INPUT_OF[name]
    with clock.part() as part:
        key = jax.random.fold_in(jax.random.key(config.seed), index * len(llama.LINEARS) + i)
        w = jnp.asarray(model.params["blocks"][index][name])
        if config.hessians is None:
            h = hessian.load(calibration.spilled(folder, index, source))[source].mean()
        else:
            h = jnp.asarray(calibration.released(Path(config.hessians), model.config, index, source))
        layer, trace = compress_matrix(key, w, h, config.caldera, path)
        error = float(_error(w, layer, h))
    run.keep_layer(path, layer, record(path, layer, error, trace, part))


@jax.jit
@jax.default_matmul_precision("highest")
def _error(w, layer, h):
    return relative_error(w.astype(h.dtype), layer.dense(), h)


def record(path: str, layer: CompressedLinear, error: float, trace, part: dict[str, float]) -> dict[str, Any]:
    """What the report says of one layer.  ``bits``: all stored bits of the layer; ``error``: against the undamped H."""
    m, n = layer.shape
    return {"path": path, "shape": [m, n], "error": error, "bits": layer.stored_bits,
            "bits_per_weight": layer.stored_bits / (m * n), "rank": layer.rank, "damping": float(trace.damping),
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
            records: list[dict[str, Any]], base: float, value: float, model: Model, out: Path) -> dict[str, Any]:
    """The report of a finished run.  Of several processes ``stages``, ``seconds`` and ``peak_memory_bytes`` are those
    of the slowest and of the largest; ``peak_memory_bytes_of_all`` is the sum of their peaks."""
    bits = sum(r["bits"] for r in records)
    weights = sum(r["shape"][0] * r["shape"][1] for r in records)
    files = artifact.read_manifest(out)["files"]
    stages, memory = measured
    return {"model": config.model, **origin, "processes": spread.count(), "base_perplexity": base,
            "compressed_perplexity": value,
            "evaluated_tokens": config.evaluation.windows * (config.evaluation.window - 1),
            "bits_per_weight": bits / weights, "stored_bytes": bits // 8, "compressed_weights": weights,
            "model_bytes": artifact.model_bytes(model.params),
            "disk_bytes": sum((out / f).stat().st_size for f in files),
            "mean_layer_error": float(np.mean([r["error"] for r in records])),
            "max_layer_error": max(r["error"] for r in records), "layers": records, "seconds": report.seconds(stages),
            "stages": stages, "peak_memory_bytes": max(s["peak_memory_bytes"] for s in stages.values()),
            "peak_memory_bytes_of_all": memory}


def memory_need(config: llama.LlamaConfig) -> int:
    """About the peak memory of one process, bytes: JAX and its programs, embedding and logits, a block, and what the
    layer with the most inputs works with."""
    inputs = max(n for _, n in llama.shapes(config).values())
    block = sum(math.prod(shape) for shape in llama.shapes(config).values())
    return 10**9 + 4 * (4 * config.vocab * config.dim + 3 * block + 16 * inputs**2)


def texts(config: RunConfig, model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Calibration and evaluation windows, from text that does not overlap: one source is split by document."""
    ours, theirs = config.calibration, config.evaluation
    documents = data.load_text(ours.text)
    if ours.text == theirs.text:
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
    for name, shape in llama.shapes(model.config).items():
        if config.caldera.rank > min(shape):
            raise ValueError(f"rank {config.caldera.rank} exceeds min(m, n) = {min(shape)} of layer {name} {shape}: "
                             f"choose a rank of at most {min(min(s) for s in llama.shapes(model.config).values())}")


def fingerprint(model: Model) -> str:
    """SHA-256 of configuration and weights, block by block, each read by one of the processes.

    Raises ValueError naming an array with NaN or infinities.
    """
    digests, owners = [], [index % spread.count() for index in range(model.config.layers)]
    for index, block in enumerate(model.params["blocks"]):
        mine = owners[index] == spread.rank()
        digests.append(_digest(f"blocks.{index}.", block) if mine else bytes(32))
    rows = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
    rest = _digest("", {name: value for name, value in model.params.items() if name != "blocks"})
    return files.sha256(repr(model.config).encode() + rest + spread.exchange(rows, owners).tobytes())


def _digest(prefix: str, arrays: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        if not np.isfinite(array).all():
            raise ValueError(f"{prefix}{name}: the weights hold NaN or infinite values: fetch the model again")
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.digest()


def hessians_sha256(directory: str) -> dict[str, str]:
    """SHA-256 of every file of released Hessians, by name."""
    return {path.name: files.sha256(path) for path in sorted(Path(directory).glob("*.pt"))}


def identity(config: RunConfig, model: Model, tokens: np.ndarray, held_out: np.ndarray) -> dict[str, Any]:
    """What a run must share with the one it resumes: every setting, and the SHA-256 of all that goes in."""
    given = {} if config.hessians is None else {"hessians_sha256": hessians_sha256(config.hessians)}
    return {"config": report.plain(config), "model_sha256": fingerprint(model), **given,
            "tokenizer_sha256": files.sha256(model.tokenizer.to_str().encode()),
            "calibration_sha256": files.sha256(tokens), "evaluation_sha256": files.sha256(held_out)}
