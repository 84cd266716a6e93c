"""Perplexity of a dense or compressed model, the loss of every token, and how far a model is from its base."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from caldera_jax.jobs import calibration, spread
from caldera_jax.jobs.calibration import Streams
from caldera_jax.models import llama, weights
from caldera_jax.models.llama import LlamaConfig, Params

STREAMS = 2**28  # numbers of the streams that all processes and models together hold at a time


class Comparison(NamedTuple):
    """Of tokens 2 … s of each window, given those before them: the losses of the base p and of the other model q,
    D_KL(p ‖ q) (in nats, all three), and whether both find the same token likeliest."""

    base_loss: Float[np.ndarray, "w t"]
    loss: Float[np.ndarray, "w t"]
    divergence: Float[np.ndarray, "w t"]
    agree: Bool[np.ndarray, "w t"]


def perplexity(config: LlamaConfig, params: Params, windows: Int[np.ndarray, "w s"], batch: int = 4,
               title: str | None = None, scored: Bool[np.ndarray, "w t"] | None = None) -> float:
    """exp of the mean negative log-likelihood of tokens 2 … s of each window, given the tokens before them in it.

    Of ``data.token_windows``, which do not overlap, these are w (s − 1) predictions; of ``sliding_windows`` pass
    ``scored``, too.  No BOS is added to the windows.  Block by block, so that one block's weights are on a device at a
    time; of several processes each takes its own shards of the windows, and all must call this.
    Raises ValueError for windows of fewer than two tokens, or a loss that is not finite.
    """
    losses = token_losses(config, params, windows, batch, title).astype(np.float64)
    losses = losses if scored is None else losses[scored]
    return float(np.exp(losses.sum() / losses.size))


def sliding_windows(tokens: Int[np.ndarray, " n"], context: int, stride: int,
                    bos: int | None = None) -> tuple[Int[np.ndarray, "w s"], Bool[np.ndarray, "w t"]]:
    """Windows of s = ``context`` tokens, each ``stride`` behind the one before, and which of tokens 2 … s each scores.

    The first scores all of them, each later one what the one before has not seen: of n tokens every one but the first
    is scored once, with at least min(context − stride, those there are) before it.  With stride = context windows do
    not overlap, and the first token of none is scored.  The last window is moved back to end with the text.  Costs
    n / stride windows, so context / stride times as much as without overlap.
    With ``bos`` each window is that token and context − 1 of the text, and all n are scored: a stride is at most
    context − 1.
    Raises ValueError where the tokens do not fill one window, or the stride is not from 1 to the context.
    """
    held = context - (bos is not None)  # of the text
    if not 2 <= context <= len(tokens) + context - held:
        raise ValueError(f"a context of {context} tokens: give at least 2, and at most the {len(tokens)} of the text"
                         + (" and BOS" if bos is not None else ""))
    if not 1 <= stride <= held:
        raise ValueError(f"a stride of {stride} tokens: give 1 to the context, {held}"
                         + (" beside BOS" if bos is not None else "") + ", or tokens would be left out")
    starts = np.append(np.arange(0, len(tokens) - held, stride), len(tokens) - held)
    seen = np.append(0, starts[:-1] + held)  # by the windows before
    positions = starts[:, None] + np.arange(held)[None]
    if bos is not None:
        return np.insert(tokens[positions], 0, bos, axis=1), positions >= seen[:, None]
    return tokens[positions], positions[:, 1:] >= seen[:, None]


def token_losses(config: LlamaConfig, params: Params, windows: Int[np.ndarray, "w s"], batch: int = 4,
                 title: str | None = None) -> Float[np.ndarray, "w s-1"]:
    """Negative log-likelihood, in nats, of tokens 2 … s of each window, given the tokens before them in it.

    On every process; float32, or float64 for a float64 embedding.  Raises as ``perplexity`` does.
    """
    return _finite(_grouped(_losses, 1, config, [params], windows, batch, title)[:, 0])


def compare(config: LlamaConfig, base: Params, params: Params, windows: Int[np.ndarray, "w s"], batch: int = 4,
            title: str | None = None) -> Comparison:
    """Losses of both models, D_KL(base ‖ other) = Σ p (log p − log q) over the vocabulary, and top-1 agreement.

    Exactly zero and all true where the two are the same; what rounding takes below zero, some 1e-7, is cut off.  Block
    by block, one model after the other, then the logits of one window at a time: 4 s v numbers for a vocabulary of v,
    and at most about 4 ``llama.NUMBERS``.  On every process.  Raises as ``perplexity`` does, and where the two
    are not of one shape.
    """
    if base["embed"].shape != params["embed"].shape or len(base["blocks"]) != len(params["blocks"]):
        raise ValueError(f"two models to compare have one vocabulary, width and depth; got {base['embed'].shape} and "
                         f"{params['embed'].shape}, {len(base['blocks'])} and {len(params['blocks'])} blocks")
    found = _grouped(_compared, 4, config, [base, params], windows, batch, title)
    return Comparison(*(_finite(found[:, i]) for i in range(3)), found[:, 3] == 1)


def mean(values: Float[np.ndarray, "w t"] | Bool[np.ndarray, "w t"],
         scored: Bool[np.ndarray, "w t"] | None = None) -> tuple[float, float]:
    """m = Σᵢ Sᵢ / Σᵢ nᵢ, Sᵢ the sum over the nᵢ scored tokens of window i, and its standard error between windows.

    sqrt(w / (w − 1) Σᵢ (Sᵢ − m nᵢ)²) / Σᵢ nᵢ: for equal nᵢ that of the mean of w means; nan for
    one window.  It takes windows for independent, and is too small where they follow one another in one document.
    """
    scored = np.ones(values.shape, bool) if scored is None else scored
    sums, counts = np.where(scored, values, 0).sum(1, dtype=np.float64), scored.sum(1)
    m, w = sums.sum() / counts.sum(), len(values)
    error = np.sqrt(w / (w - 1) * np.sum((sums - m * counts) ** 2)) / counts.sum() if w > 1 else np.nan
    return float(m), float(error)


def group(config: LlamaConfig, window: int, models: int = 1) -> int:
    """How many windows go through all blocks before the next ones do: those whose streams are ``STREAMS``, and one for
    each shard."""
    return max(spread.SHARDS, STREAMS // (models * window * config.dim))


def _grouped(function, count, config, models, windows, batch, title):
    """What ``_each`` finds, of a group of windows after the other."""
    if windows.shape[1] < 2:
        raise ValueError(f"perplexity needs windows of at least 2 tokens, got {windows.shape[1]}")
    step = group(config, windows.shape[1], len(models))
    parts = [windows[i:i + step] for i in range(0, len(windows), step)]
    steps = len(windows) * (1 + sum(len(params["blocks"]) for params in models))  # through a block or the head
    found = []
    with tqdm(total=steps, desc=title, disable=title is None or spread.rank() > 0, unit="step", leave=False) as bar:
        for part in parts:
            streams = [_streams(config, params, part, batch, bar) for params in models]
            found.append(_each(function, count, config, models, streams, part, bar))
            del streams  # before the next are made
    return np.concatenate(found)


def _streams(config, params, windows, batch, bar) -> Streams:
    """The residual streams that leave the last block."""
    streams = calibration.embed(config, params, windows)
    for index, block in enumerate(params["blocks"]):
        calibration.run_block(config.at(index), block, streams, batch)
        bar.update(len(windows))
        if not all(np.isfinite(shard).all() for device in streams for shard in device):
            raise ValueError(f"blocks.{index}: its output holds NaN or infinite values: the weights overflow")
    return streams


def _finite(losses):
    if not np.isfinite(losses.astype(np.float64).sum()):
        raise ValueError("the loss is not finite: the head's weights overflow")
    return losses


def _each(function: Callable[..., Any], count: int, config: LlamaConfig, models: Sequence[Params],
          streams: Sequence[Streams], windows: Int[np.ndarray, "w s"], bar: tqdm) -> Float[np.ndarray, "w c t"]:
    """What function(config, models, the streams of one window, its tokens) -> [c, s - 1] finds, of all windows; c is
    ``count``.

    On every process; each computes its own windows.
    """
    last = [weights.last(params) for params in models]
    dtype = np.promote_types(models[0]["embed"].dtype, np.float32)
    found = np.zeros((len(windows), count, windows.shape[1] - 1), dtype)

    def run(shards):
        placed = jax.device_put(last)
        for where, *shard in shards:
            for i, window in enumerate(range(where.start, where.stop)):
                of_window = [hidden[i:i + 1] for hidden in shard]
                found[window] = function(config, placed, of_window, windows[window:window + 1])
                bar.update(spread.count())

    own = spread.own_shards(len(windows))
    spread.on_devices(run, [list(zip(*parts, strict=True)) for parts in zip(own, *streams, strict=True)])
    return spread.exchange(found, spread.window_owners(len(windows)))


@partial(jax.jit, static_argnums=0)
@jax.default_matmul_precision("highest")
def _losses(config, models, hidden, tokens):
    """Negative log-likelihood of each predicted token, [1, s - 1]."""
    losses = lambda x, targets: _loss(_logits(config, models[0], x), targets)
    return llama.in_tiles(losses, config.vocab, hidden[0][:, :-1], tokens[:, 1:])


@partial(jax.jit, static_argnums=0)
@jax.default_matmul_precision("highest")
def _compared(config, models, hidden, tokens):
    """The fields of a Comparison, [4, s - 1]."""
    def found(targets, *streams):
        p, q = (_logits(config, last, x) for last, x in zip(models, streams, strict=True))
        divergence = jnp.maximum(jnp.sum(jnp.exp(p) * (p - q), axis=-1), 0)
        agree = (jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)).astype(p.dtype)
        return jnp.concatenate([_loss(p, targets), _loss(q, targets), divergence, agree])

    return llama.in_tiles(found, config.vocab, tokens[:, 1:], *(x[:, :-1] for x in hidden))


def _logits(config, last, hidden):
    """Log-probabilities of every token at each position, [1, s, v]."""
    return jax.nn.log_softmax(llama.head(config, last, hidden))


def _loss(logits, targets):
    return -jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
