"""Text from a dense or a packed model: keys and values are kept, and every sequence grows by a token a step.

Prompts of several lengths are one batch, padded on the right: the token at position p has its key in slot p of the
cache and sees the slots up to p alone, so that padding is never seen, and is written over as the sequence grows.
"""

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, PRNGKeyArray, UInt32
from tokenizers import Tokenizer

from caldera_jax import kernels, linear
from caldera_jax.jobs import artifact, report, spread
from caldera_jax.models import convert, llama, tokenizer, weights
from caldera_jax.models.convert import Model
from caldera_jax.models.llama import LlamaConfig, Params

# What the special token at the end of a text or of a turn is called in the families that ``llama`` computes: a model
# may have several, and its files do not always name all of them.
ENDS = ("</s>", "<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<eos>", "<end_of_turn>",
        "<|end|>")
Held = Literal["packed", "bytes", "dense"]  # how weights lie in memory
Kept = Literal["float32", "bfloat16"]  # how keys and values do
ROUND = 32  # prompts and caches are as long as a multiple of this: few shapes, so few compilations


@dataclass(frozen=True)
class Sampling:
    """How many tokens, and how each is chosen: the likeliest (temperature 0), or drawn from the nucleus of ``top_p``.

    Raises ValueError for numbers out of range.
    """

    tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.tokens < 1:
            raise ValueError(f"the number of tokens to generate must be positive, got {self.tokens}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (the likeliest token) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie above 0 and be at most 1 (all tokens), got {self.top_p}")


def nucleus(logits: Float[Array, "b v"], top_p: float) -> Float[Array, "b v"]:
    """The logits, -inf outside the fewest likeliest tokens whose probability is at least ``top_p``.

    Of equal logits the one of the lower index counts as likelier. top_p = 1 keeps all.  arXiv 1904.09751.  O(v log v).
    """
    if top_p >= 1:
        return logits
    order = jnp.argsort(-logits, axis=-1, stable=True)
    falling = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    likelier = jnp.cumsum(falling, axis=-1) - falling  # probability of the tokens before each
    kept = jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, likelier < top_p, axis=-1, inplace=False)
    return jnp.where(kept, logits, -jnp.inf)


def sample(key: PRNGKeyArray | UInt32[Array, "2"], logits: Float[Array, "b v"], temperature: float, top_p: float
           ) -> Int32[Array, " b"]:
    """A token of each row, drawn from softmax(logits / temperature) within its nucleus; temperature 0: the likeliest.

    ``temperature`` and ``top_p`` are static under ``jit``.
    """
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature  # finite at any temperature but 0
    return jax.random.categorical(key, nucleus(scaled, top_p)).astype(jnp.int32)


# ---- tokens


def stream(config: LlamaConfig, params: Params, prompts: Sequence[Sequence[int] | Int[np.ndarray, " _"]],
           sampling: Sampling = Sampling(), ends: Collection[int] = (), kept: Kept | None = None
           ) -> Iterator[Int32[np.ndarray, " b"]]:
    """The next tokens of the prompts, one of each a step: [b], -1 where a sequence has ended.

    A sequence ends before a token of ``ends``, after ``sampling.tokens`` tokens, or where it is as long as the context.
    ``kept``: the type of keys and values; None: on a CPU that of the embedding, at least float32, else bfloat16.
    With temperature 0 each gets the tokens that it gets alone.  The t-th tokens are drawn with fold_in(seed, t): more
    tokens begin with the same ones (sums over a longer cache may round otherwise).

    Cost: a step reads all weights once, and 2 b c g e numbers of keys and values a block, c being the longest prompt
    plus the tokens asked for; the prompts take b h s c scores, and at most about ``llama.NUMBERS``.  A sliding
    window does not shorten the cache.  All weights are put on the device, packed ones packed.
    Raises ValueError for no prompt, an empty one, one that leaves no room in the context or has tokens outside the
    vocabulary; while it runs, for logits that are not finite.
    """
    if not prompts:
        raise ValueError("no prompt: give at least one")
    tokens = [np.asarray(prompt, np.int64) for prompt in prompts]
    for prompt in tokens:
        if not prompt.size:
            raise ValueError("an empty prompt: give at least one token to go on from")
        if len(prompt) >= config.context:
            raise ValueError(f"a prompt of {len(prompt)} tokens leaves no room in the model's context of "
                             f"{config.context}: shorten it to {config.context - 1} or fewer")
        if prompt.min() < 0 or prompt.max() >= config.vocab:
            raise ValueError(f"a prompt has tokens outside the vocabulary of {config.vocab}: is it another model's?")
    placed = place(params)
    return _steps(config, placed, tokens, sampling, list(ends), _type(placed, kept))


def _type(params, kept):
    """Of keys and values."""
    if kept is not None:
        if kept not in get_args(Kept):
            raise ValueError(f"keys and values are kept as {' or '.join(get_args(Kept))}, got {kept!r}")
        return jnp.dtype(kept)
    return np.promote_types(params["embed"].dtype, np.float32) if kernels.on_cpu() else jnp.dtype(jnp.bfloat16)


def complete(config: LlamaConfig, params: Params, prompts: Sequence[Sequence[int] | Int[np.ndarray, " _"]],
             sampling: Sampling = Sampling(), ends: Collection[int] = (), kept: Kept | None = None
             ) -> list[Int32[np.ndarray, " _"]]:
    """All tokens that ``stream`` gives each prompt; raises as it does."""
    steps = [np.full(len(prompts), -1, np.int32), *stream(config, params, prompts, sampling, ends, kept)]
    return [row[row >= 0] for row in np.stack(steps, axis=1)]


def place(params: Params, held: Held = "packed") -> Params:
    """The weights on the device, read two blocks at a time: packed ones as they are, dense, or in bytes
    (``linear.in_bytes``) where they can be, those of one name alike in all blocks, so that one program runs them."""
    change = {"packed": lambda w: w, "dense": linear.dense, "bytes": linear.in_bytes}[held]

    def take(weight):
        found = change(weight)
        return found if linear.bytewise(found) else jax.device_put(found)  # and what was read from the disk goes

    x64, device = jax.config.jax_enable_x64, jax.config.jax_default_device  # a thread does not know its caller's

    def read(block):
        with jax.enable_x64(x64), jax.default_device(device):
            return {name: take(weight) for name, weight in block.items()}

    with ThreadPoolExecutor(2) as pool:  # decoding is one thread's work
        tasks = [pool.submit(copy_context().run, read, block) for block in params["blocks"]]
    blocks = [task.result() for task in tasks]
    layers = {name: jax.device_put(linear.alike([block[name] for block in blocks])) for name in blocks[0]}
    rest = {name: take(value) for name, value in weights.rest(params).items()}
    return jax.device_put(rest) | {"blocks": [{name: of[i] for name, of in layers.items()} for i in range(len(blocks))]}


def _steps(config, params, prompts, sampling, ends, dtype):
    """One loop for all steps: the first takes the prompts, each later one the tokens before it."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    room = config.context - lengths
    tokens = np.zeros((len(prompts), _rounded(lengths.max())), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[:len(prompt)] = prompt
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    last, key = weights.rest(params), jax.random.key(sampling.seed)
    capacity = _capacity(config, lengths, sampling)
    caches = [llama.empty_cache(config, len(prompts), capacity, dtype) for _ in params["blocks"]]
    ended = np.zeros(len(prompts), bool)
    for i in range(min(sampling.tokens, int(room.max()))):
        x = _embed(config, last, tokens)
        for j, block in enumerate(params["blocks"]):
            x, caches[j] = _block(config.at(j), block, x, caches[j], positions)
        at = np.zeros_like(lengths) if i else lengths - 1
        chosen = np.asarray(_next(config, last, x, at, key, np.int32(i), sampling.temperature, sampling.top_p))
        if np.any((chosen < 0) & ~ended):
            raise ValueError("the model's logits are not finite: its weights overflow or are damaged")
        ended |= np.isin(chosen, ends) | (i >= room)
        if ended.all():
            return
        yield np.where(ended, np.int32(-1), chosen)
        tokens, positions = chosen[:, None], (lengths + np.int32(i))[:, None]


def _capacity(config, lengths, sampling):
    """Slots of the caches."""
    return _rounded(min(max(lengths) + sampling.tokens, config.context))


def _rounded(length) -> int:
    return -(-int(length) // ROUND) * ROUND


@partial(jax.jit, static_argnums=0)
def _embed(config, last, tokens):
    return llama.embed(config, last, tokens)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
@jax.default_matmul_precision("highest")
def _block(config, params, x, cache, positions):
    return llama.cached_block(config, params, x, cache, positions)


@partial(jax.jit, static_argnums=(0, 6, 7))
@jax.default_matmul_precision("highest")
def _next(config, last, x, at, key, step, temperature, top_p):
    """The token after place ``at`` of each row; -1 where a logit is not finite."""
    logits = llama.head(config, last, jnp.take_along_axis(x, at[:, None, None], axis=1))[:, 0]
    chosen = sample(jax.random.fold_in(key, step), logits, temperature, top_p)
    return jnp.where(jnp.isfinite(logits).all(axis=-1), chosen, -1)


# ---- text


def end_tokens(model: Model) -> set[int]:
    """Ids of the tokens that end a text: those that the model's files name so, and its special tokens in ``ENDS``."""
    added = model.tokenizer.get_added_tokens_decoder().items()
    named = tokenizer.end_ids(model.tokenizer, model.special, model.ends)
    return {id for id, token in added if token.special and token.content in ENDS} | set(named)


class Text:
    """The text that tokens add to those before them, as they come: never a part of a character.

    Bytes that make up no character are U+FFFD; they are held back until one follows them, or ``rest``.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]):
        self._decode = tokenizer.decode
        self._ids, self._shown = list(before), len(before)

    def add(self, token: int) -> str:
        """What can be shown now; often a word, empty where a character is not complete."""
        self._ids.append(token)
        text = self.rest()
        if not text or text.endswith("\ufffd"):  # a token without text may not stand alone before a word
            return ""
        self._ids, self._shown = self._ids[self._shown:], len(self._ids) - self._shown
        return text

    def rest(self) -> str:
        """What was held back."""
        before, after = self._decode(self._ids[:self._shown]), self._decode(self._ids)
        return after[len(before):] if after.startswith(before) else self._decode(self._ids[self._shown:])


class Result(NamedTuple):
    """What was generated, with its seconds and bytes."""

    texts: list[str]  # without their prompts
    tokens: list[list[int]]
    prompt_tokens: int
    layers: int  # linear layers of all blocks
    bytewise: int  # of them in bytes
    layer_bytes: int  # of all of them
    weight_bytes: int
    cache_bytes: int
    start_bytes: int  # resident before the model was read
    peak_bytes: int  # the most since then
    stages: dict[str, dict[str, float]]  # load, prompt (until the first tokens), tokens (all others)
    steady_seconds: float  # from the second token of each sequence to the last

    @property
    def prompt_rate(self) -> float:
        """Tokens of the prompts a second, compiling apart; of a short prompt mostly what a first call takes else."""
        return self.prompt_tokens / self._seconds("prompt")

    @property
    def token_rate(self) -> float:
        """Tokens a second, over all sequences, from the third of each on: the second waits for a program to be compiled
        or found.  NaN where there are none."""
        return sum(max(len(row) - 2, 0) for row in self.tokens) / (self.steady_seconds or math.nan)

    @property
    def compile_seconds(self) -> float:
        """Seconds of tracing and compiling."""
        return sum(stage["compile_seconds"] for stage in self.stages.values())

    def _seconds(self, stage):
        return (self.stages[stage]["seconds"] - self.stages[stage]["compile_seconds"]) or math.nan


def load(source: str | Path) -> Model:
    """A compressed directory, or any dense model that ``convert.load`` takes; raises as the two do."""
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        return artifact.load(path)
    try:
        return convert.load(source)
    except ValueError as error:
        raise error if path.exists() else ValueError(f"{error}, or the directory of a compressed model") from error


def run(source: str | Path, prompts: Sequence[str], sampling: Sampling = Sampling(), held: Held | None = None,
        kept: Kept | None = None, show: Callable[[int, str], None] = lambda row, text: None) -> Result:
    """Continue the prompts with a model from the disk, and measure it; ``show(row, text)`` is called as text comes.

    A prompt begins with the token that the model's tokenizer puts first, once (``tokenizer.prompt``).  ``held``: how
    the weights lie in memory (``place``); None: in bytes where these take at most half of what is free.  ``kept``: as
    in ``stream``.  Memory is that of this process: measure one model a process.
    Raises ValueError for empty prompts, as ``stream``, and as ``load``.
    """
    if not all(prompts):
        raise ValueError("an empty prompt: give some text to go on from")
    clock = report.Clock()
    with clock.stage("load"):
        start = report.peak_memory()
        model = load(source)
        count = model.config.layers * llama.block_weights(model.config)
        held = held or ("bytes" if 2 * count <= spread.available_memory() else "packed")
        model = model._replace(params=place(model.params, held))  # what was read from the disk goes
        config, params = model.config, model.params
        ids = [tokenizer.prompt(model.tokenizer, prompt) for prompt in prompts]
        for row in ids:
            tokenizer.check(model.tokenizer, row, config.vocab)
        steps = stream(config, params, ids, sampling, end_tokens(model), kept)
    texts, tokens, said = [Text(model.tokenizer, row) for row in ids], [[] for _ in ids], [""] * len(ids)

    def tell(row, text):
        said[row] += text
        show(row, text)

    with clock.stage("prompt"):
        first = list(itertools.islice(steps, 1))
    with clock.stage("tokens"):
        ends = []
        for step in itertools.chain(first, steps):
            ends.append(time.perf_counter())
            for row, token in enumerate(step.tolist()):
                if token >= 0:
                    tokens[row].append(token)
                    tell(row, texts[row].add(token))
    for row, text in enumerate(texts):
        tell(row, text.rest())
    slots = 2 * config.layers * len(ids) * _capacity(config, list(map(len, ids)), sampling)
    layers = [block[name] for block in params["blocks"] for name in llama.linears(config)]
    bytewise = sum(map(linear.bytewise, layers))
    return Result(
        said, tokens, sum(map(len, ids)), len(layers), bytewise, sum(leaf.nbytes for leaf in jax.tree.leaves(layers)),
        artifact.model_bytes(params), _type(params, kept).itemsize * slots * config.kv_heads * config.head_dim, start,
        max(int(stage["peak_memory_bytes"]) for stage in clock.stages.values()), clock.stages,
        ends[-1] - ends[1] if len(ends) > 2 else 0.0)


def run_apart(source: str | Path, prompts: Sequence[str], sampling: Sampling = Sampling(), held: Held = "dense",
              kept: Kept | None = None) -> Result:
    """``run`` in a process of its own, so that the memory is that of this model alone."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run, source, prompts, sampling, held, kept).result()
