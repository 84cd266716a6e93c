"""Perplexity of a dense or compressed model, and the loss of every token."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from caldera_jax import calibration, spread
from caldera_jax.models import llama
from caldera_jax.models.llama import LlamaConfig, Params


def perplexity(config: LlamaConfig, params: Params, windows: Int[np.ndarray, "w s"], batch: int = 4,
               title: str | None = None) -> float:
    """exp of the mean negative log-likelihood of tokens 2 … s of each window, given the tokens before them in it.

    Windows do not overlap and no BOS is added: w (s − 1) predictions.  Block by block, so that one block's weights are
    on a device at a time; of several processes each takes its own shards of the windows, and all must call this.
    Raises ValueError for windows of fewer than two tokens, or a loss that is not finite.
    """
    losses = token_losses(config, params, windows, batch, title).astype(np.float64)
    return float(np.exp(losses.sum() / losses.size))


def token_losses(config: LlamaConfig, params: Params, windows: Int[np.ndarray, "w s"], batch: int = 4,
                 title: str | None = None) -> Float[np.ndarray, "w s-1"]:
    """Negative log-likelihood, in nats, of tokens 2 … s of each window, given the tokens before them in it.

    On every process; float32, or float64 for a float64 embedding.  Raises as ``perplexity`` does.
    """
    if windows.shape[1] < 2:
        raise ValueError(f"perplexity needs windows of at least 2 tokens, got {windows.shape[1]}")
    streams, quiet = calibration.embed(params, windows), title is None or spread.rank() > 0
    for index, block in enumerate(tqdm(params["blocks"], title, disable=quiet, unit="block", leave=False)):
        calibration.run_block(config, block, streams, batch)
        if not all(np.isfinite(shard).all() for device in streams for shard in device):
            raise ValueError(f"blocks.{index}: its output holds NaN or infinite values: the weights overflow")
    losses = spread.exchange(_losses(config, params, streams, windows), spread.window_owners(len(windows)))
    if not np.isfinite(losses.astype(np.float64).sum()):
        raise ValueError("the loss is not finite: the head's weights overflow")
    return losses


def _losses(config, params, streams, windows):
    """Negative log-likelihood of each predicted token, [w, s - 1]; zeros for windows of other processes."""
    losses = np.zeros((len(windows), windows.shape[1] - 1), np.promote_types(params["embed"].dtype, np.float32))
    last = {name: value for name, value in params.items() if name != "blocks"}

    def run(shards):
        placed = jax.device_put(last)
        for where, shard in shards:
            for i, window in enumerate(range(where.start, where.stop)):
                losses[window] = _loss(config, placed, shard[i:i + 1], windows[window:window + 1])[0]

    own = spread.own_shards(len(windows))
    spread.on_devices(run, [list(zip(*pair, strict=True)) for pair in zip(own, streams, strict=True)])
    return losses


@partial(jax.jit, static_argnums=0)
@jax.default_matmul_precision("highest")
def _loss(config, params, hidden, tokens):
    """Negative log-likelihood of each predicted token, [1, s - 1]."""
    logits = jax.nn.log_softmax(llama.head(config, params, hidden[:, :-1]))
    return -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
