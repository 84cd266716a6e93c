"""Tokens through the model, block by block, into the Moments of every linear layer's input.

Only one block's weights and Moments are on the device, and the residual stream of all calibration tokens on the host.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from caldera_jax import hessian
from caldera_jax.hessian import Moments
from caldera_jax.models import llama
from caldera_jax.models.llama import LlamaConfig, Params


def embed(config: LlamaConfig, params: Params, tokens: Int[np.ndarray, "w s"]) -> Float[np.ndarray, "w s d"]:
    """The residual stream that enters the first block, for w windows of s tokens."""
    return np.array(llama.embed(config, params, tokens))


def run_block(config: LlamaConfig, block: Params, hidden: Float[np.ndarray, "w s d"],
              batch: int = 4) -> Float[np.ndarray, "w s d"]:
    """The residual stream after one block, ``batch`` windows at a time."""
    block, after = jax.device_put(block), np.empty_like(hidden)
    for i in range(0, len(hidden), batch):
        after[i:i + batch] = _forward(config, block, hidden[i:i + batch])
    return after


def calibrate_block(config: LlamaConfig, block: Params, hidden: Float[np.ndarray, "w s d"],
                    batch: int = 4) -> tuple[Float[np.ndarray, "w s d"], dict[str, Moments]]:
    """The residual stream after one block, and the Moments of its four inputs by the names of ``llama.INPUT_OF``.

    Layers with the same input share them: q, k, v and gate, up.  O(tokens n²) an input beside the forward pass.
    """
    block, after = jax.device_put(block), np.empty_like(hidden)
    sizes = {llama.INPUT_OF[name]: n for name, (_, n) in llama.shapes(config).items()}
    moments = {name: hessian.zero(n) for name, n in sizes.items()}
    for i in range(0, len(hidden), batch):
        after[i:i + batch], moments = _observe(config, block, hidden[i:i + batch], moments)
    return after, moments


def collect(config: LlamaConfig, params: Params, tokens: Int[np.ndarray, "w s"], blocks: int | None = None,
            sequential: bool = False, spill: Path | None = None) -> Iterator[tuple[int, dict[str, Moments]]]:
    """(block index, Moments of its inputs), one block after the other, of the first ``blocks`` blocks (None: all).

    ``sequential``: the caller replaces ``params["blocks"][index]`` before it asks for the next block, whose inputs are
    then those of the compressed model.  ``spill``: a directory in which each block's Moments are kept; when it already
    holds all of them and the model is the dense one, they are read and no token goes through the model.
    """
    blocks = config.layers if blocks is None else blocks
    files = [spill / f"moments_{index:03d}.safetensors" for index in range(blocks)] if spill else []
    if files and not sequential and all(file.is_file() for file in files):  # written whole, so whole
        yield from ((index, hessian.load(file)) for index, file in enumerate(files))
        return
    hidden = embed(config, params, tokens)
    for index in range(blocks):
        after, moments = calibrate_block(config, params["blocks"][index], hidden)
        if files:
            spill.mkdir(parents=True, exist_ok=True)
            hessian.save(files[index], moments)
        if not sequential:
            hidden = after
        del after
        yield index, moments
        if sequential:
            hidden = run_block(config, params["blocks"][index], hidden)


def released(directory: Path, config: LlamaConfig,
             blocks: int | None = None) -> Iterator[tuple[int, dict[str, Moments]]]:
    """(block index, Moments of its inputs) from the Hessians that the authors of QuIP# and CALDERA released.

    Files ``0_qkv.pt``, ``0_o.pt``, ``0_up.pt``, ``0_down.pt``, ``1_qkv.pt``, …; see ``read_hessian``.  Their token
    count is taken as 1, since H is all that is used of them.
    """
    sizes = {llama.INPUT_OF[name]: n for name, (_, n) in llama.shapes(config).items()}
    for index in range(config.layers if blocks is None else blocks):
        moments = {}
        for name, n in sizes.items():
            h = read_hessian(path := directory / f"{index}_{name}.pt")
            if len(h) != n:
                raise ValueError(f"{path}: the Hessian is of {len(h)} inputs, and this model's layer has {n}: these "
                                 "files belong to another model")
            moments[name] = Moments(jnp.asarray(h), jnp.zeros_like(h), jnp.asarray(1, jnp.int32))
        yield index, moments


def read_hessian(path: Path) -> Float[np.ndarray, "n n"]:
    """H = C + μ μᵀ from a file of ``torch.save``: ``flatH`` the lower triangle of the covariance C, row by row, ``mu``.

    Read with ``weights_only``, so a file cannot run code.  Raises ValueError where torch is missing or the file is not
    of this kind.
    """
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"{path}: reading the released Hessians needs torch: pip install torch") from error
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        flat, mean = (np.asarray(saved[key].to(torch.float32)) for key in ("flatH", "mu"))
    except Exception as error:  # torch raises many kinds
        raise ValueError(f"{path}: missing or not a released Hessian (flatH, mu): {error}") from error
    n = len(mean)
    if flat.shape != (n * (n + 1) // 2,):
        raise ValueError(f"{path}: flatH has {flat.size} numbers, and {n} inputs need {n * (n + 1) // 2}: damaged file")
    h = np.zeros((n, n), np.float32)
    h[np.tril_indices(n)] = flat
    return h + np.tril(h, -1).T + np.outer(mean, mean)


@partial(jax.jit, static_argnums=0)
@jax.default_matmul_precision("highest")
def _forward(config, block, x):
    return llama.block(config, block, x, jnp.arange(x.shape[1]))[0]


@partial(jax.jit, static_argnums=0, donate_argnums=3)
@jax.default_matmul_precision("highest")
def _observe(config: LlamaConfig, block: Params, x: Array, moments: dict[str, Moments]):
    y, inputs = llama.block(config, block, x, jnp.arange(x.shape[1]))
    return y, {name: hessian.update(moments[name], inputs[name]) for name in moments}
