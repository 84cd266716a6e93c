"""The main job: a model in, the same model compressed out, resumable at every layer.

The only file that knows both the numerics and the models.  State of an unfinished run lives in ``OUT/unfinished``:
the run's own description, one safetensors file and one record for each finished layer.
"""

import hashlib
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from caldera_jax import artifact, calibration, evaluate, files, report
from caldera_jax.decompose import CalderaConfig
from caldera_jax.hessian import Moments
from caldera_jax.linear import CompressedLinear, compress_matrix
from caldera_jax.models import convert, data, llama
from caldera_jax.models.convert import Model
from caldera_jax.objective import relative_error


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


def compress(config: RunConfig, out: Path, moments: Path | None = None) -> dict[str, Any]:
    """Calibrate, compress every linear layer of the chosen blocks, write the artifact, evaluate, write the report.

    ``moments``: a directory to keep each block's Moments in; where it holds those of the same model and text, no
    calibration runs.
    Killed and started again with the same arguments, it goes on with the first unfinished layer and ends with the same
    bytes.  Memory: the dense model, one block's activations and Moments, one layer's workspace.
    Raises ValueError for bad input (which layer, what to do) and OSError where the disk is full; finished layers stay.
    """
    start = time.perf_counter()
    model = convert.load(config.model)
    tokens, held_out = texts(config, model)
    check(config, model)
    run = Run(out, identity(config, model, tokens, held_out))
    if (done := run.report()) is not None:
        return done
    clock = report.Clock(run.recall("clock"))
    clock.add("load", time.perf_counter() - start)
    origin = report.provenance(config, config.seed)
    if (base := run.recall("base")) is None:
        with clock.stage("evaluate base"):
            base = evaluate.perplexity(model.config, model.params, held_out, title="base perplexity")
        run.remember("base", base)
    if not run.complete():
        layers = _blocks(config, model, tokens, run, clock, moments)
        with clock.stage("write"):
            artifact.finish(out, model, layers, run.identity)
    del model  # the dense one
    with clock.stage("evaluate compressed"):
        model = artifact.load(out)
        value = evaluate.perplexity(model.config, model.params, held_out, title="compressed perplexity")
    return run.finish(summary(config, origin, clock, run.records(), base, value, model, out))


def _blocks(config: RunConfig, model: Model, tokens: np.ndarray, run: "Run", clock: report.Clock,
            spill: Path | None) -> dict[str, Any]:
    """Compress block after block, each replaced in the model when done; the metas of all layers by path."""
    chosen = model.config.layers if config.blocks is None else config.blocks
    sequential = config.activations == "compressed"
    folder = None if spill is None else spill / run.moments_hash
    if config.hessians is not None:
        inputs = calibration.released(Path(config.hessians), model.config, chosen)
    else:
        inputs = calibration.collect(model.config, model.params, tokens, chosen, sequential, folder)
    metas: dict[str, Any] = {}
    weights = sum(m * n for m, n in llama.shapes(model.config).values())
    with tqdm(total=chosen * weights, unit="weight", unit_scale=True, desc="compress") as progress:
        for _ in range(chosen):
            with clock.stage("calibrate"):
                index, moments = next(inputs)
            block = _layers(config, model, index, moments, run, clock, progress)
            model.params["blocks"][index] = block
            run.keep_block(index, block)
            run.remember("clock", clock.stages)
            metas |= {f"blocks.{index}.{name}": artifact.layer_meta(block[name]) for name in llama.LINEARS}
    for index in range(chosen, model.config.layers):
        run.keep_block(index, model.params["blocks"][index])
    return metas


def _layers(config: RunConfig, model: Model, index: int, moments: dict[str, Moments], run: "Run",
            clock: report.Clock, progress: tqdm) -> dict[str, Any]:
    """The block with its linear layers compressed, finished ones taken from the disk."""
    block = dict(model.params["blocks"][index])
    for position, name in enumerate(llama.LINEARS):
        path, w = f"blocks.{index}.{name}", jnp.asarray(block[name])
        progress.set_postfix_str(path)
        layer = run.layer(path)
        if layer is None:
            with clock.stage("compress") as part:
                key = jax.random.fold_in(jax.random.key(config.seed), index * len(llama.LINEARS) + position)
                h = moments[llama.INPUT_OF[name]].mean()
                layer, trace = compress_matrix(key, w, h, config.caldera, path)
                error = float(_error(w, layer, h))
            if float(trace.damping) > 1.01 * max(config.caldera.damping, 1e-12):
                progress.write(f"{path}: the Hessian is not positive definite with damping {config.caldera.damping:g}; "
                               f"raised to {float(trace.damping):g}")
            run.keep_layer(path, layer, record(path, layer, error, trace, part))
        block[name] = jax.tree.map(np.asarray, layer)  # on the host, as the dense ones
        progress.update(w.size)
    return block


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
            "seconds": round(part["seconds"], 3), "compile_seconds": round(part["compile_seconds"], 3)}


def summary(config: RunConfig, origin: dict[str, Any], clock: report.Clock, records: list[dict[str, Any]], base: float,
            value: float, model: Model, out: Path) -> dict[str, Any]:
    """The report of a finished run."""
    bits = sum(r["bits"] for r in records)
    weights = sum(r["shape"][0] * r["shape"][1] for r in records)
    files = artifact.read_manifest(out)["files"]
    stages = {name: {**stage, "seconds": round(stage["seconds"], 3)} for name, stage in clock.stages.items()}
    return {"model": config.model, **origin, "base_perplexity": base,
            "compressed_perplexity": value,
            "evaluated_tokens": config.evaluation.windows * (config.evaluation.window - 1),
            "bits_per_weight": bits / weights, "stored_bytes": bits // 8, "compressed_weights": weights,
            "model_bytes": artifact.model_bytes(model.params),
            "disk_bytes": sum((out / f).stat().st_size for f in files),
            "mean_layer_error": float(np.mean([r["error"] for r in records])),
            "max_layer_error": max(r["error"] for r in records), "layers": records, "seconds": clock.seconds,
            "stages": stages, "peak_memory_bytes": int(max(s["peak_memory_bytes"] for s in clock.stages.values()))}


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
    for path, array in jax.tree_util.tree_leaves_with_path(model.params):
        if not np.isfinite(np.asarray(array, np.float32)).all():
            name = ".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)
            raise ValueError(f"{name}: the weights hold NaN or infinite values: fetch the model again")


def identity(config: RunConfig, model: Model, tokens: np.ndarray, held_out: np.ndarray) -> dict[str, Any]:
    """What a run must share with the one it resumes: every setting, and the SHA-256 of all that goes in."""
    digest = hashlib.sha256(repr(model.config).encode())
    for leaf in jax.tree.leaves(model.params):
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return {"config": report.plain(config), "model_sha256": digest.hexdigest(),
            "tokenizer_sha256": files.sha256(model.tokenizer.to_str().encode()),
            "calibration_sha256": files.sha256(tokens), "evaluation_sha256": files.sha256(held_out)}


class Run:
    """The output directory of one run: what is finished, and where the next part goes."""

    def __init__(self, out: Path, identity: dict[str, Any]):
        self.out, self.identity, self.work = out, identity, out / "unfinished"
        dense = identity["config"]["activations"] == "dense"
        inputs = [identity["model_sha256"], identity["calibration_sha256"]]
        self.moments_hash = report.config_hash(inputs if dense else identity)
        known = self._read(self.work / "run.json")
        if known is None and (out / artifact.MANIFEST).exists():
            known = artifact.read_manifest(out)["run"]
        if known is None and out.exists() and not self._empty():
            raise ValueError(f"{out} exists and holds something else: choose another --out")
        if known is not None and known != identity:
            raise ValueError(f"{out} belongs to another run ({_difference(known, identity)}): choose another --out, or "
                             "remove it to start over")
        if not self._read(out / "report.json"):
            self.work.mkdir(parents=True, exist_ok=True)
            files.write_json(self.work / "run.json", identity)

    def _empty(self) -> bool:
        """Whether there is nothing but, at most, the traces of a run cut off before it had written anything."""
        traces = {self.work, self.work / "run.json.tmp"}
        return self.out.is_dir() and set(self.out.rglob("*")) <= traces

    def _read(self, path: Path) -> Any:
        return files.read_json(path) if path.is_file() else None

    def report(self) -> dict[str, Any] | None:
        """The report, if this run is finished; its directory of unfinished work is removed."""
        if self.complete() and (done := self._read(self.out / "report.json")) is not None:
            shutil.rmtree(self.work, ignore_errors=True)
            return done
        return None

    def complete(self) -> bool:
        """Whether the artifact is whole (its report may still be missing)."""
        return (self.out / artifact.MANIFEST).is_file()

    def recall(self, name: str) -> Any:
        """A record kept by ``remember``, or None."""
        return self._read(self.work / f"{name}.json")

    def remember(self, name: str, value: Any) -> None:
        """Keep a record for a later start."""
        files.write_json(self.work / f"{name}.json", report.plain(value))

    def records(self) -> list[dict[str, Any]]:
        """What was recorded of each layer, in order."""
        rows = {path: self.recall(path) for path in artifact.read_manifest(self.out)["layers"]}
        if missing := [path for path, row in rows.items() if row is None]:
            raise ValueError(f"{self.work}: the record of {missing[0]} is gone, and the report needs it: remove "
                             f"{self.out} and start again (the model itself is whole: `caldera eval {self.out}`)")
        return [{name: value for name, value in row.items() if name != "meta"} for row in rows.values()]

    def layer(self, path: str) -> CompressedLinear | None:
        """A finished layer; None where there is none, or where its file is damaged and it must be made again."""
        try:
            kept = self.recall(path)
            return kept and artifact.layer_from(files.read_arrays(self.work / f"{path}.safetensors"), kept["meta"])
        except (ValueError, KeyError) as error:
            tqdm.write(f"{path}: kept, but not readable ({error}); compressing it again")
            return None

    def keep_layer(self, path: str, layer: CompressedLinear, row: dict[str, Any]) -> None:
        """Write a finished layer: arrays first, and then the record that makes it count."""
        files.write_arrays(self.work / f"{path}.safetensors", artifact.layer_arrays(layer))
        self.remember(path, {**row, "meta": artifact.layer_meta(layer)})

    def keep_block(self, index: int, block: dict[str, Any]) -> None:
        """Write a block's file."""
        files.write_arrays(self.out / artifact.block_file(index), artifact.block_arrays(block))

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write the report and drop the unfinished work."""
        files.write_json(self.out / "report.json", summary)
        shutil.rmtree(self.work)
        return summary


def _difference(known: dict[str, Any], wanted: dict[str, Any]) -> str:
    """The first setting that differs, in words."""
    def flat(value, prefix=""):
        if not isinstance(value, dict):
            return {prefix: value}
        parts = (flat(item, f"{prefix}.{key}" if prefix else key) for key, item in value.items())
        return {name: leaf for part in parts for name, leaf in part.items()}

    a, b = flat(known), flat(wanted)
    name = next(key for key in [*b, *a] if a.get(key, "absent") != b.get(key, "absent"))
    return f"its {name.removeprefix('config.')} is {a.get(name, 'absent')!r}, this run's {b.get(name, 'absent')!r}"
