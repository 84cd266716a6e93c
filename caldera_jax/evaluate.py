"""Perplexity of a dense or compressed model."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from tqdm import tqdm

from caldera_jax import calibration
from caldera_jax.models import llama
from caldera_jax.models.llama import LlamaConfig, Params


def perplexity(config: LlamaConfig, params: Params, windows: Int[np.ndarray, "w s"], batch: int = 4,
               title: str | None = None) -> float:
    """exp of the mean negative log-likelihood of tokens 2 … s of each window, given the tokens before them in it.

    Windows do not overlap and no BOS is added: w (s − 1) predictions.  Block by block, so that one block's weights are
    on the device at a time.  Raises ValueError for windows of fewer than two tokens, or a loss that is not finite.
    """
    if windows.shape[1] < 2:
        raise ValueError(f"perplexity needs windows of at least 2 tokens, got {windows.shape[1]}")
    hidden = calibration.embed(config, params, windows)
    for index, block in enumerate(tqdm(params["blocks"], title, disable=title is None, unit="block", leave=False)):
        hidden = calibration.run_block(config, block, hidden, batch)
        if not np.isfinite(hidden).all():
            raise ValueError(f"blocks.{index}: its output holds NaN or infinite values: the weights overflow")
    last = jax.device_put({name: value for name, value in params.items() if name != "blocks"})
    losses = [np.asarray(_loss(config, last, hidden[i:i + 1], windows[i:i + 1]), np.float64)
              for i in range(len(windows))]
    total = np.concatenate(losses).sum()
    if not np.isfinite(total):
        raise ValueError("the loss is not finite: the head's weights overflow")
    return float(np.exp(total / (windows.size - len(windows))))


@partial(jax.jit, static_argnums=0)
@jax.default_matmul_precision("highest")
def _loss(config, params, hidden, tokens):
    """Negative log-likelihood of each predicted token, [1, s - 1]."""
    logits = jax.nn.log_softmax(llama.head(config, params, hidden[:, :-1]))
    return -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
