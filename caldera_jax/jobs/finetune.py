"""Fine-tuning a compressed model: rotation signs as reals, and the first r ranks of L R as numbers; codes stay packed.

What is trained and how it is differentiated is ``student``, the steps are ``training``; here is a run from a directory
to a directory.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from caldera_jax.jobs import artifact, calibration, evaluate, report
from caldera_jax.jobs.run import Run
from caldera_jax.jobs.student import Batch, Student, TrainConfig, join, stored, student
from caldera_jax.jobs.training import State, accuracy, enough, fit
from caldera_jax.linear import CompressedLinear
from caldera_jax.models import data, files, llama, tokenizer, weights
from caldera_jax.models.convert import Model
from caldera_jax.models.data import Tokens


@dataclass(frozen=True)
class FinetuneConfig:
    """A training of a compressed model on a text.

    source: its directory.  text: windows of a built-in text, a file or a directory, or of each of several in turn; the
    last ``aside`` of all are for validation.  Each is behind BOS if those of the source's run were.  Where it is the
    text that the model is evaluated on, they are from the part that is not.  With goal "labels" it is a file of JSON
    lines {"text": …, "label": …}, of which all are taken that fit the window.
    """

    source: str
    train: TrainConfig = TrainConfig()
    text: Tokens = Tokens(windows=256)
    aside: int = 64

    def __post_init__(self):
        if not 0 < self.aside or (self.train.goal != "labels" and self.aside >= self.windows):
            raise ValueError(f"{self.aside} of {self.windows} windows for validation: at least 1, and fewer than all")

    @property
    def windows(self) -> int:
        """Of all texts."""
        return self.text.windows * len(data.named(self.text.text))


def finetune(config: FinetuneConfig, out: Path) -> dict[str, Any]:
    """Train a compressed model, write it to ``out`` as a compressed model of its own, evaluate it, write the report.

    Killed and started again with the same arguments it goes on from the last validation, to the same bytes.
    The report is the source's, with what has changed, and ``finetune``.
    Raises ValueError for bad input: a directory that holds no compressed model, a base model that is not its own, text
    that is too short, another run's ``out``.
    """
    source, train = Path(config.source), config.train
    if out.resolve() == source.resolve():
        raise ValueError(f"{out} is the model that is to be trained, and stays as it is: choose another --out")
    before, model = artifact.read_manifest(source)["run"], artifact.load(source)
    base = artifact.base(source) if train.goal == "distill" or train.reconstruct else None
    batch, classes = read(config, model, before["config"])
    learner, free = student(model.config, weights.whole(model.params), train, len(classes))
    own = {"config": report.plain(config), "source_sha256": files.sha256(source / artifact.MANIFEST),
           "data_sha256": [files.sha256(part) for part in batch if part is not None]}
    run = Run(out, before | {"finetune": [*before.get("finetune", []), own]})
    if (done := run.report()) is not None:
        return done
    origin, clock = report.provenance(config, train.seed), report.Clock(run.recall("clock"))
    if not run.complete():
        if train.goal == "distill":
            with clock.stage("teacher"):
                batch = batch._replace(teacher=_kept(run, "teacher", lambda: last_streams(base, batch.tokens)))
        with clock.stage("train"):
            edge = len(batch.tokens) - config.aside
            dense = base.params["blocks"] if train.reconstruct else ()
            state = fit(learner, free, batch[:edge], batch[edge:], run.work / "state", dense)
        run.remember("clock", clock.stages)
        run.remember("training", {
            "steps": len(state.losses), "trained": sum(leaf.size for leaf in jax.tree.leaves(state.free)),
            "losses": state.losses.tolist(), "validation": state.validation.tolist(),
            "fits": state.fits.tolist() if train.reconstruct else [], "classes": classes,
            **({"accuracy": accuracy(learner, state.best, batch[edge:])} if classes else {})})
        _write(run, model, learner, state)
    with clock.stage("evaluate"):
        trained, tokens = artifact.load(out), held_out(model, before["config"])
        value = evaluate.perplexity(trained.config, trained.params, tokens, title="perplexity")
    return run.finish(partial(_summary, config, origin, clock, run, source, value, trained))


def read(config: FinetuneConfig, model: Model, run: dict[str, Any]) -> tuple[Batch, list[str]]:
    """Windows to train on and, after them, to validate on, those of several texts in turn; and the names of the
    classes."""
    text = config.text
    if text.window > model.config.context:
        raise ValueError(f"windows of {text.window} tokens exceed the model's context {model.config.context}: shorten "
                         "them")
    if config.train.goal == "labels":
        first = [tokenizer.bos(model.tokenizer, model.special)] if run.get("bos") else []
        batch, classes = labelled(model, Path(text.text), text.window, first)
        if len(batch.tokens) <= config.aside:
            raise ValueError(f"{text.text}: {len(batch.tokens)} lines, and the last {config.aside} are for validation: "
                             "give more, or put fewer aside")
        enough(config.train, len(batch.tokens) - config.aside)
        return batch, classes
    enough(config.train, config.windows - config.aside)
    if text.window < 2:
        raise ValueError("windows of 1 token: the next one is to be learned: give 2 or more")
    theirs = run["evaluation"]["text"]
    among = lambda name, texts: any(data.same_text(name, other) for other in data.named(texts))
    if any(among(name, theirs) and name not in data.TEXTS and not among(name, run["calibration"]["text"])
           for name in data.named(text.text)):
        raise ValueError(f"the model is evaluated on all of {theirs}, as it was calibrated on another text: train on "
                         "another one")
    tokens = data.windows_beside(model, text, run["evaluation"]["text"], "calibration", run.get("bos", False))
    return Batch(np.stack(np.split(tokens, config.windows // text.windows), axis=1).reshape(tokens.shape)), []


def labelled(model: Model, path: Path, window: int, first: Sequence[int] = ()) -> tuple[Batch, list[str]]:
    """The lines {"text": …, "label": …} of a file: their tokens, behind ``first``, padded with zeros, and the number of
    their class.

    Raises ValueError for a line that is not of this kind, or longer than the window, and for fewer than two classes.
    """
    if not path.is_file():
        raise ValueError(f'{path}: no file of JSON lines {{"text": …, "label": …}}')
    rows = dict(data.json_lines(path, "text", "label"))
    labels = [str(row["label"]) for row in rows.values()]
    tokens = [np.append(np.int32(first), tokenizer.encode(model.tokenizer, row["text"])) for row in rows.values()]
    for ids in tokens:
        tokenizer.check(model.tokenizer, ids, model.config.vocab)
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise ValueError(f"{path}: {len(classes)} classes; two at least are needed")
    if bad := [(i, len(ids)) for i, ids in zip(rows, tokens, strict=True) if not len(first) < len(ids) <= window]:
        raise ValueError(f"{path}: line {bad[0][0]} has {bad[0][1]} tokens, and a window holds 1 to {window}: widen "
                         "it, or shorten the line")
    padded = np.stack([np.pad(ids, (0, window - len(ids))) for ids in tokens])
    return Batch(padded, None, np.array([classes.index(label) for label in labels]), np.array(list(map(len, tokens)))
                 ), classes


def last_streams(model: Model, tokens: Int[np.ndarray, "w s"]) -> Float[np.ndarray, "w s d"]:
    """What leaves the last block, a block in memory at a time."""
    streams = calibration.embed(model.config, model.params, tokens)
    for index, block in enumerate(tqdm(model.params["blocks"], "teacher", unit="block", leave=False)):
        calibration.run_block(model.config.at(index), block, streams)
    return np.concatenate([shard for device in streams for shard in device])  # of one process: in order


def held_out(model: Model, run: dict[str, Any]) -> Int[np.ndarray, "w s"]:
    """The windows that the run was evaluated on."""
    theirs = Tokens(**{name: run["evaluation"][name] for name in ("text", "windows", "window")})
    return data.windows_beside(model, theirs, run["calibration"]["text"], "evaluation", run.get("bos", False))


def _kept(run: Run, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array of the run's unfinished work, made once."""
    path = run.work / f"{name}.safetensors"
    if not files.whole(path):
        files.write_arrays(path, {name: make()})
    return files.read_arrays(path)[name]


def _write(run: Run, model: Model, learner: Student, state: State) -> None:
    """The artifact, with the best parameters as they are stored."""
    best, paths = stored(state.best, learner.train.factor_dtype), []
    for index, (block, free) in enumerate(zip(learner.blocks, best["blocks"], strict=True)):
        trained = join(block, free)
        for name, layer in trained.items():
            if isinstance(layer, CompressedLinear):
                paths.append(f"blocks.{index}.{name}")
                run.keep_layer(paths[-1], layer, {"bits": layer.stored_bits,
                                                  "bits_per_weight": layer.stored_bits / math.prod(layer.shape)})
        if any(path.startswith(f"blocks.{index}.") for path in paths):
            gains = {name: np.asarray(trained[name]) for name, fields in free.items() if "gain" in fields}
            model.params["blocks"][index] = run.block(model.config, index, {**model.params["blocks"][index], **gains})
    if "classifier" in best:
        model.params["classifier"] = np.asarray(best["classifier"])
    run.write(model, paths)


def _summary(config: FinetuneConfig, origin: dict[str, Any], clock: report.Clock, run: Run, source: Path, value: float,
             trained: Model) -> dict[str, Any]:
    """The source's report with what has changed."""
    old = report.read(source / "report.json")
    new = {path: run.recall(path) for path in artifact.read_manifest(run.out)["layers"]}
    rows = [row | {key: new[row["path"]][key] for key in ("bits", "bits_per_weight")} for row in old["layers"]]
    bits = sum(row["bits"] for row in rows)
    own = {**origin, **run.recall("training"), "perplexity_before": old["compressed_perplexity"], "perplexity": value,
           "bits_per_weight_before": old["bits_per_weight"], "seconds": report.seconds(clock.stages),
           "stages": clock.stages}
    kept = {name: field for name, field in old.items() if name not in ("divergence", "predicted_damage")}
    every = [*rows, *old.get("tables", [])]
    stored = 8 * artifact.dense_bytes(trained.params, {row["path"] for row in every}) + sum(r["bits"] for r in every)
    return {**kept, "compressed_perplexity": value, "lost": math.log(value / old["base_perplexity"]),
            "bits_per_weight": bits / old["compressed_weights"],
            "stored_bytes": bits // 8, "model_bytes": artifact.model_bytes(trained.params),
            "model_bits_per_weight": stored / llama.all_weights(trained.config),
            "disk_bytes": sum((run.out / f).stat().st_size for f in artifact.read_manifest(run.out)["files"]),
            "layers": rows, "finetune": [*old.get("finetune", []), own]}
