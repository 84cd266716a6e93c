"""A small Llama trained here in float32, for experiments that need weights which were never quantized.

    python experiments/train_tiny.py [--preset smoke]     # what is finished is skipped, what was interrupted goes on
    python experiments/train_tiny.py --draw               # figures/train_tiny.png from the JSON, nothing is trained

A byte-level BPE and a decoder are trained on the part of a text that ``data.split`` gives to calibration; held-out loss
is on the other part.  The model goes to the cache as a Hugging Face directory (``load_tiny``) with its record, and
that also to results/train_tiny_PRESET_HASH.json.

A step depends on the state before it and on (seed, step) alone, so a run that was killed at any moment and started
again ends with the same bytes as one that was not: on the same machine, with the same versions and number of cores.
"""

import dataclasses
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import drawing
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from drawing import axes
from jax import Array
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from caldera_jax.jobs import evaluate, report
from caldera_jax.models import convert, data, files, llama
from caldera_jax.models import tokenizer as tokenization


@dataclasses.dataclass(frozen=True)
class Config:
    """All that decides the weights, and the record.

    every: steps between checkpoints, each with a held-out loss; average: steps in a mean of the training loss.
    """

    preset: str
    text: str = "enwiki"
    vocab: int = 1024
    dim: int = 192
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    ffn_dim: int = 512
    context: int = 512
    window: int = 512
    batch: int = 2  # as many tokens a second as with more, and more steps
    steps: int = 5000
    warmup: int = 200
    learning_rate: float = 4e-3
    final_rate: float = 0.05  # of the learning rate, where the cosine ends
    weight_decay: float = 0.1  # of matrices; gains have none
    momenta: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0  # of the gradient's norm
    every: int = 250
    average: int = 50
    held_out_windows: int = 64
    seed: int = 0

    def __post_init__(self):
        if not 2 <= self.window <= self.context:
            raise ValueError(f"window must lie between 2 and the context {self.context}, got {self.window}")
        if not 256 <= self.vocab:
            raise ValueError(f"vocab must be at least 256, one token a byte, got {self.vocab}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} does not divide into {self.heads} heads")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"warmup must lie between 0 and the {self.steps} steps, got {self.warmup}")
        for name in ("batch", "every", "average", "held_out_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)}")
        if self.held_out_windows % self.batch:
            raise ValueError(f"{self.held_out_windows} held_out_windows do not divide into batches of {self.batch}")

    @property
    def model(self) -> llama.LlamaConfig:
        """The decoder that is trained; its embedding is its head."""
        return llama.LlamaConfig(self.vocab, self.dim, self.layers, self.heads, self.kv_heads, self.dim // self.heads,
                                 self.ffn_dim, tied=True, context=self.context)


PRESETS = {
    "tiny": Config("tiny"),
    # Seconds: for tests, and to try an experiment out.
    "smoke": Config("smoke", vocab=512, dim=32, layers=2, heads=2, kv_heads=1, ffn_dim=64, context=64, window=64,
                    batch=4, steps=48, warmup=4, learning_rate=0.01, every=16, average=4, held_out_windows=8),
}


DESCRIBED = "training.json"  # the record, in the model's directory: a finished model is not made again


class State(NamedTuple):
    """Everything that a training step changes."""

    step: Array
    params: llama.Params
    optimizer: optax.OptState


class Text(NamedTuple):
    """Tokens to train on [t] and to evaluate on [w, window], and what made them."""

    tokenizer: Tokenizer
    train: np.ndarray
    held_out: np.ndarray
    bytes_per_token: float  # of the held-out text
    sha256: str


def preset(name: str) -> Config:
    """A configuration by name; ValueError listing the known ones."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}: choose from {', '.join(PRESETS)}")
    return PRESETS[name]


def directory(config: Config) -> Path:
    """Where the finished model lies."""
    return data.cache_directory() / f"tiny_{report.config_hash(config)}"


def record_path(config: Config) -> Path:
    """Where the record of the training lies."""
    return drawing.RESULTS / f"train_tiny_{config.preset}_{report.config_hash(config)}.json"


def load_tiny(name: str = "tiny") -> Path:
    """The directory of a trained model, for ``convert.load`` and ``caldera compress``; ValueError if there is none."""
    if not (path := directory(preset(name))).is_dir():
        raise ValueError(f"the model {name!r} is not trained yet on this machine: "
                         f"python experiments/train_tiny.py --preset {name}")
    return path


# ---- text


def train_tokenizer(documents: list[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with at most ``vocab`` tokens, none of them special: any text can be encoded and comes back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def read_text(config: Config) -> Text:
    """Tokenizer and tokens of both parts of the text; ValueError where it is too short for one window, or one batch."""
    documents, others = data.split(data.load_text(config.text))
    tokenizer = train_tokenizer(documents, config.vocab)
    encoded = [tokenization.encode(tokenizer, data.SEPARATOR.join(part)) for part in (documents, others)]
    windows = len(encoded[1]) // config.window
    if len(encoded[0]) < config.window or windows < config.held_out_windows:
        raise ValueError(f"text {config.text!r} is too short: {len(encoded[0])} tokens to train on and {windows} "
                         f"held-out windows of {config.window}, but {config.held_out_windows} are needed")
    held_out = data.token_windows(tokenizer, others, config.window, windows, "held-out")
    size = len(data.SEPARATOR.join(others).encode())
    digest = files.sha256("\0".join([*documents, "", *others]).encode())
    return Text(tokenizer, encoded[0], held_out, size / len(encoded[1]), digest)


def batch(config: Config, tokens: np.ndarray, step: int) -> np.ndarray:
    """Windows [b, s] at random places, the same for the same seed and step."""
    starts = np.random.default_rng((config.seed, step)).integers(0, len(tokens) - config.window + 1, config.batch)
    return tokens[starts[:, None] + np.arange(config.window)]


# ---- training


def optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW on clipped gradients; the rate rises linearly from zero and falls as a cosine."""
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.warmup, config.steps,
                                              config.learning_rate * config.final_rate)
    matrices = lambda params: jax.tree.map(lambda p: p.ndim > 1, params)
    return optax.chain(optax.clip_by_global_norm(config.clip), optax.adamw(
        rate, *config.momenta, weight_decay=config.weight_decay, mask=matrices))


@partial(jax.jit, static_argnums=0)
def init(config: Config) -> State:
    """The state before the first step."""
    params = llama.init(jax.random.key(config.seed), config.model)
    return State(jnp.int32(0), params, optimizer(config).init(params))


@partial(jax.jit, static_argnums=0)
@jax.default_matmul_precision("highest")
def loss(config: Config, params: llama.Params, tokens: Array) -> Array:
    """Mean negative log-likelihood, in nats, of tokens 2 ... s of each window [b, s], given those before."""
    logits = jax.nn.log_softmax(llama.forward(config.model, params, tokens[:, :-1]))
    return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
@jax.default_matmul_precision("highest")
def update(config: Config, state: State, tokens: Array) -> tuple[State, Array]:
    """One step, and the loss before it."""
    value, gradient = jax.value_and_grad(partial(loss, config))(state.params, tokens)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        change, moments = optimizer(config).update(gradient, state.optimizer, state.params)
    return State(state.step + 1, optax.apply_updates(state.params, change), moments), value


def held_out_loss(config: Config, params: llama.Params, windows: np.ndarray) -> float:
    """``loss`` over windows that divide into batches."""
    return float(np.mean([loss(config, params, part) for part in windows.reshape(-1, config.batch, config.window)],
                         dtype=np.float64))


def advance(config: Config, state: State, text: Text, end: int, progress: tqdm) -> tuple[State, list[float]]:
    """Steps up to ``end``, and their losses; ValueError where one is not finite."""
    losses = []
    for step in range(int(state.step), end):
        state, value = update(config, state, batch(config, text.train, step))
        losses.append(float(value))
        if not np.isfinite(losses[-1]):
            raise ValueError(f"the loss of step {step} is {losses[-1]}: choose a smaller learning_rate than "
                             f"{config.learning_rate}")
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        progress.update()
    return state, losses


# ---- checkpoints


def state_sha256(state: State) -> str:
    """SHA-256 of the bytes of all arrays."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


@contextmanager
def checkpoints(config: Config) -> Iterator[ocp.CheckpointManager]:
    """The two newest checkpoints of a training; each appears by a rename, when it is whole."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True,
                                           enable_async_checkpointing=False)
    with ocp.CheckpointManager(_beside(config, "training").absolute(), options=options) as manager:
        yield manager


def save(manager: ocp.CheckpointManager, state: State, history: dict[str, Any]) -> None:
    """Write a checkpoint: the state, and the record so far with the state's digest."""
    if (step := int(state.step)) in manager.all_steps():
        manager.delete(step)  # one that could not be restored
    record = {**history, "state_sha256": state_sha256(state)}
    manager.save(step, args=ocp.args.Composite(
        state=ocp.args.StandardSave(state), history=ocp.args.JsonSave(record)))


def restore(manager: ocp.CheckpointManager, config: Config, history: dict[str, Any]
            ) -> tuple[State, dict[str, Any]] | None:
    """State and record of the newest checkpoint whose arrays have the digest that was written with them.

    None where there is none.  Raises ValueError for a checkpoint of another run than that of ``history``.
    """
    like = jax.tree.map(lambda a: np.empty(a.shape, a.dtype), jax.eval_shape(partial(init, config)))
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            kept = manager.restore(step, args=ocp.args.Composite(history=ocp.args.JsonRestore())).history
            _check(kept, history, manager.directory / str(step))
            state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))).state
            if state_sha256(state) == kept.pop("state_sha256"):
                return state, kept
            reason = "its arrays are not those that were written"
        except OtherRun:
            raise
        except Exception as error:  # the library raises many kinds
            reason = type(error).__name__
        tqdm.write(f"checkpoint {step} is damaged ({reason}): going on from the one before", file=sys.stderr)
    return None


class OtherRun(ValueError):
    """A checkpoint that this training did not write."""


def _check(kept: dict[str, Any], history: dict[str, Any], path: Any) -> None:
    """The configuration and the text must be those of this run."""
    for name in ("config_hash", "text_sha256"):
        if kept[name] != history[name]:
            raise OtherRun(f"{path} is of another run ({name} {kept[name][:12]}, not {history[name][:12]}): remove "
                           "its folder to train anew")


def _beside(config: Config, what: str) -> Path:
    path = directory(config)
    return path.with_name(f"{path.name}_{what}")


# ---- the run


def train(config: Config) -> dict[str, Any]:
    """The record of the finished model, which is trained, or trained to its end, where it is not there."""
    finished, unfinished = record_path(config), _beside(config, "training")
    with alone(config):
        if new := not (described := directory(config) / DESCRIBED).is_file():
            unfinished.mkdir(exist_ok=True)
            with jax.enable_x64(False):  # float32 throughout, whatever the caller has chosen
                _train(config)
        shutil.rmtree(unfinished, ignore_errors=True)
        if new or not finished.is_file():
            finished.parent.mkdir(parents=True, exist_ok=True)
            files.write(finished, described.read_bytes())
    return files.read_json(finished)


@contextmanager
def alone(config: Config) -> Iterator[None]:
    """Wait until no other process trains this model; the system frees the lock of a process that was killed."""
    path = _beside(config, "lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is training {config.preset}: waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _train(config: Config) -> None:
    """Train from the newest checkpoint to the end, and write the model with its record."""
    text = read_text(config)
    history: dict[str, Any] = {"config_hash": report.config_hash(config), "text_sha256": text.sha256, "losses": [],
                               "held_out": [], "stages": {}}
    few = text.held_out[:config.held_out_windows]
    with checkpoints(config) as manager:
        state, history = restore(manager, config, history) or (init(config), history)
        clock = report.Clock(history["stages"])
        with tqdm(total=config.steps, initial=int(state.step), desc=f"training {config.preset}",
                  unit="step") as progress:
            while (step := int(state.step)) < config.steps:
                if not history["held_out"]:
                    history["held_out"].append([0, held_out_loss(config, state.params, few)])
                with clock.stage("training"):
                    end = min(config.steps, step - step % config.every + config.every)
                    state, losses = advance(config, state, text, end, progress)
                with clock.stage("held-out loss"):
                    history["held_out"].append([end, held_out_loss(config, state.params, few)])
                history["losses"] += losses
                history["stages"] = clock.stages
                save(manager, state, history)
    with clock.stage("perplexity"):
        perplexity = evaluate.perplexity(config.model, jax.device_get(state.params), text.held_out, title="perplexity")
    part = _beside(config, "part")
    write_model(config, part, state.params, text.tokenizer)
    files.write_json(part / DESCRIBED, describe(config, part, state, text, history, clock, perplexity))
    shutil.rmtree(directory(config), ignore_errors=True)  # without a record: of an older version
    os.replace(part, directory(config))


def write_model(config: Config, part: Path, params: llama.Params, tokenizer: Tokenizer) -> None:
    """A Hugging Face directory in place of what an interrupted run left there."""
    shutil.rmtree(part, ignore_errors=True)
    convert.save_hf(part, config.model, jax.device_get(params))
    tokenizer.save(str(part / "tokenizer.json"))
    files.write_json(part / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast",
                                                      "model_max_length": config.context})


def averages(config: Config, losses: list[float]) -> list[tuple[int, float]]:
    """(steps done, mean loss of the last ``average`` of them)."""
    parts = [losses[i:i + config.average] for i in range(0, len(losses), config.average)]
    return list(zip(np.cumsum([len(part) for part in parts]).tolist(), map(float, map(np.mean, parts)), strict=True))


def describe(config: Config, model: Path, state: State, text: Text, history: dict[str, Any], clock: report.Clock,
             perplexity: float) -> dict[str, Any]:
    """The record of the model in that directory.

    Bits per byte: bits of a predicted token over the mean bytes of a held-out token.
    """
    found = report.provenance(config, config.seed)
    tokens = config.steps * config.batch * config.window
    return {
        **found, "text_sha256": text.sha256, "text_tokens": {"training": len(text.train),
                                                             "held out": text.held_out.size},
        "weights": sum(leaf.size for leaf in jax.tree.leaves(state.params)), "tokens": tokens,
        "perplexity": perplexity, "bits_per_byte": float(np.log2(perplexity)) / text.bytes_per_token,
        "bytes_per_token": text.bytes_per_token, "training_loss": averages(config, history["losses"]),
        "held_out_loss": history["held_out"], "seconds": report.seconds(clock.stages),
        "tokens_per_second": tokens / clock.stages["training"]["seconds"],
        "state_sha256": state_sha256(state), "weights_sha256": files.sha256(model / "model.safetensors"),
        "tokenizer_sha256": files.sha256(model / "tokenizer.json"),
    }


# ---- figure


def draw(result: dict[str, Any]) -> Any:
    """Training and held-out loss over the tokens seen, with labels from the record's configuration."""
    config, (figure, (panel,)) = result["config"], axes()
    millions = lambda steps: np.array(steps) * config["batch"] * config["window"] / 1e6
    steps, values = zip(*result["training_loss"], strict=True)
    middles = [(before + after) / 2 for before, after in zip((0, *steps), steps, strict=False)]
    panel.plot(millions(middles), values, label=f"training, mean of {config['average']} steps")
    steps, values = zip(*result["held_out_loss"], strict=True)
    panel.plot(millions(steps), values, "o-", label=f"held out, {config['held_out_windows']} windows")
    panel.set(xlabel=f"million tokens seen ({config['steps']} steps of {config['batch']} x {config['window']})",
              ylabel="loss, nats a token",
              title=f"{result['weights'] / 1e6:.2f} million weights on {config['text']}:\nheld-out perplexity "
                    f"{result['perplexity']:.1f}, {result['bits_per_byte']:.2f} bits a byte")
    panel.legend()
    return figure


def main(preset_: Annotated[Literal["tiny", "smoke"], tyro.conf.arg(name="preset")] = "tiny",
         draw_only: Annotated[bool, tyro.conf.arg(name="draw")] = False) -> None:
    """Train a small float32 model unless it is there, and draw its loss.

    Args:
        preset_: tiny (half an hour on two quiet cores), or smoke (seconds).
        draw_only: train nothing.
    """
    config = preset(preset_)
    if draw_only and not record_path(config).is_file():
        raise ValueError(f"no record {record_path(config).name}: python experiments/train_tiny.py --preset {preset_}")
    result = files.read_json(record_path(config)) if draw_only else train(config)
    target = drawing.FIGURES / ("train_tiny.png" if preset_ == "tiny" else f"train_tiny_{preset_}.png")
    draw(result).savefig(part := target.with_suffix(".part.png"), dpi=220)
    os.replace(part, target)
    print(f"{directory(config)}: {result['weights'] / 1e6:.2f} million weights, perplexity {result['perplexity']:.3f}, "
          f"{result['bits_per_byte']:.3f} bits a byte, {result['seconds']['total']:.0f} s; drawn: {target.name}")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except ValueError as error:
        sys.exit(f"train_tiny.py: {error}")
