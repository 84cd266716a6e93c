"""Tokens through the model, block by block, into the Moments of every linear layer's input.

Only one block's weights and Moments are on a device, and the residual stream of all tokens is on the host.  The windows
are divided into ``spread.SHARDS``; each process has the streams of its own, and the Moments of all are merged in one
fixed tree, so that they are the same however the shards are spread.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Key

from caldera_jax import hessian, linear
from caldera_jax.hessian import Moments
from caldera_jax.jobs import spread
from caldera_jax.linear import CompressedLinear
from caldera_jax.models import files, llama, weights
from caldera_jax.models.llama import LlamaConfig, Params

CHUNK = 2048  # tokens, or one window, whose streams through all blocks ``output_fisher`` keeps at a time
BATCH = 8192  # tokens, or one window, that go through a block at once, whatever number of windows is asked for
UNPACKED = 2**28  # weights of a block that are put together for all batches, where decoding each anew takes longer

Streams = list[list[np.ndarray]]  # [windows of the shard, s, d] of each shard that this process has, by device


def embed(config: LlamaConfig, params: Params, tokens: Int[np.ndarray, "w s"]) -> Streams:
    """The residual streams that enter the first block, of this process's shards of the w windows of s tokens."""
    return [[_streams(config, params, tokens[shard]) for shard in device] for device in spread.own_shards(len(tokens))]


def _streams(config, params, tokens):
    table = params["embed"]
    if isinstance(table, CompressedLinear):
        return np.array(llama.embed(config, params, tokens))  # streams are written over
    table = table if isinstance(table, weights.Table) else np.asarray(table)
    return llama.scaled(config, table[tokens], table.dtype)


@partial(jax.jit, static_argnums=0)
@jax.default_matmul_precision("highest")
def forward(config: LlamaConfig, block: Mapping[str, Any], x: Float[Array | np.ndarray, "b s d"]
            ) -> Float[Array, "b s d"]:
    """The streams that leave a block: compiled once for each shape and structure, not for all blocks in a row.

    ``config``: of this block (``LlamaConfig.at``), as of all functions of one block here.
    """
    return llama.block(config, block, x, jnp.arange(x.shape[1]))[0]


def run_block(config: LlamaConfig, block: Mapping[str, Any], streams: Streams, batch: int = 4) -> None:
    """Take the streams through one block, in place, at most ``batch`` windows at a time.

    A compressed block is put together once, and multiplied as a dense one; not one of more than ``UNPACKED`` weights,
    which would take too much memory.
    """
    block = dict(block)

    def run(shards):
        placed = jax.device_put(block)
        if llama.block_weights(config) <= UNPACKED:
            placed = {name: linear.dense(value) for name, value in placed.items()}
        for shard in shards:
            for part in _parts(shard, batch):
                shard[part] = forward(config, placed, shard[part])

    spread.on_devices(run, streams)


def _parts(shard, batch):
    step = max(1, min(batch, BATCH // shard.shape[1]))
    return [slice(i, i + step) for i in range(0, len(shard), step)]


def calibrate_block(config: LlamaConfig, block: Mapping[str, Any], streams: Streams, batch: int = 4,
                    advance: bool = True, cap: float = math.inf) -> dict[str, Moments]:
    """The Moments of a block's inputs over all windows, by the names of ``llama.input_of``; on every process.

    Layers with the same input share them: q, k, v and gate, up.  An expert's are over all tokens, too: H is the second
    moment of those routed to it times their share, as its Fisher information is; of one that none is routed to, a
    multiple of I, with the mean trace of its like.
    ``advance``: take the streams through the block, in place.  O(tokens n²) an input beside the forward pass; memory of
    log₂ SHARDS + 1 = 4 Moments an input, of all experts at once.
    """
    block = dict(block)

    def run(shards):
        placed = jax.device_put(block)
        return spread.fold((observe(placed, shard) for shard in shards), _merge)

    def observe(placed, shard):
        moments = _zero(config)
        for part in _parts(shard, batch):
            after, moments = _observe(config, placed, shard[part], moments, cap)
            if advance:
                shard[part] = after
        return moments

    parts = [jax.device_put(part, jax.local_devices()[0]) for part in spread.on_devices(run, streams)]
    own = spread.fold(parts, _merge) if parts else _zero(config)
    return _unasked(own if spread.count() == 1 else {name: _over_processes(moments) for name, moments in own.items()})


def _unasked(moments: dict[str, Moments]) -> dict[str, Moments]:
    """An expert that no token asked gets a multiple of I for H, as large as of its kind's others: other texts may ask.
    """
    experts = {name: of for name, of in moments.items() if name != llama.kind_of(name)}
    found = {}
    for name, of in experts.items():
        like = [other.energy for key, other in experts.items()
                if llama.kind_of(key) == llama.kind_of(name) and other.seen > 0] if of.seen == 0 else []
        if like:
            energy, eye = jnp.mean(jnp.stack(like)), jnp.eye(len(of.sum), dtype=of.sum.dtype)
            found[name] = of._replace(sum=energy / len(eye) * eye, energy=energy, ordinary=energy)
    return moments | found


def _over_processes(own: Moments) -> Moments:
    """The Moments of all processes, merged some rows at a time: no message is larger than one matrix."""
    host = jax.tree.map(np.array, own)
    step = -(-len(host.sum) // spread.count())
    scalars = [spread.gather(value)[:spread.holders()] for value in host[2:]]
    for i in range(0, len(host.sum), step):
        rows = slice(i, i + step)
        parts = map(Moments, spread.gather(host.sum[rows]), spread.gather(host.error[rows]), *scalars)
        total = spread.fold(parts, _merge)
        host.sum[rows], host.error[rows] = total.sum, total.error
    return Moments(jnp.asarray(host.sum), jnp.asarray(host.error), *total[2:])


def collect(config: LlamaConfig, params: Params, tokens: Int[np.ndarray, "w s"], blocks: int | None = None,
            sequential: bool = False, cap: float = math.inf) -> Iterator[tuple[int, dict[str, Moments]]]:
    """(block index, Moments of its inputs), one block after the other, of the first ``blocks`` blocks (None: all).

    ``sequential``: the caller replaces ``params["blocks"][index]`` before it asks for the next block, whose inputs are
    then those of the compressed model.  ``cap``: how much of one token counts (``hessian.update``).  Every
    process must ask for the same blocks.
    """
    inputs = Inputs(config, params, tokens, sequential, cap)
    for index in range(config.layers if blocks is None else blocks):
        yield index, inputs.moments(index)


class Inputs:
    """Windows on their way through a model: no further than to the block whose Moments are asked for, in order.

    As for ``collect``, which asks for all; a block that is passed over costs its forward pass.
    """

    def __init__(self, config: LlamaConfig, params: Params, tokens: Int[np.ndarray, "w s"], sequential: bool = False,
                 cap: float = math.inf):
        self._config, self._params, self._tokens = config, params, tokens
        self._sequential, self._cap, self._at = sequential, cap, 0

    def moments(self, index: int) -> dict[str, Moments]:
        """Of the block's inputs."""
        config, blocks = self._config, self._params["blocks"]
        if self._at == 0:
            self._streams = embed(config, self._params, self._tokens)
        for before in range(self._at, index):
            run_block(config.at(before), blocks[before], self._streams)
        found = calibrate_block(config.at(index), blocks[index], self._streams, advance=not self._sequential,
                                cap=self._cap)
        self._at = index if self._sequential else index + 1
        return found


def of_block(config: LlamaConfig, params: Params, tokens: Int[np.ndarray, "w s"],
             index: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(W [m, n], H [n, n]) of every linear layer of one block, by name: layers to study."""
    moments = Inputs(config, params, tokens).moments(index)
    return {name: (np.asarray(params["blocks"][index][name]), np.asarray(moments[llama.input_of(name)].mean()))
            for name in llama.linears(config)}


def gradients(config: LlamaConfig, params: Params, tokens: Int[np.ndarray, "w s"], key: Key[Array, ""],
              blocks: int | None = None) -> Iterator[tuple[int, dict[str, Float[np.ndarray, "_ _"]]]]:
    """(block index, diagonal Fisher of each linear weight, in nats a token), from the last block to the first.

    F_ij = mean over windows of (∂/∂W_ij Σ_t log p(y_t | tokens up to t))² / s, with every label y_t drawn from the
    model.  E ∂ log p(y_t) = 0 given the tokens, and the y_t are independent given them, so terms between tokens vanish
    in the mean: E F is the sum over tokens of each token's own Fisher, and ½ Σ F_ij E_ij² is the Kullback–Leibler
    divergence a token that a small change E of the weights costs, as far as its entries count one by one.
    ``blocks``: yield those of the first so many (None: all); the others are still gone through.
    A forward and a backward pass, one window at a time; memory: one block and its squared gradients, and on the host
    the streams that enter every block, layers · w · s · d numbers.  Works in this process alone, on its first device.
    Raises ValueError for weights that are not dense.
    """
    for index, squares, _ in _squares(config, params, tokens, key, range(len(tokens)), blocks):
        yield index, {name: np.asarray(square) / tokens.size for name, square in squares.items()}


class OutputFisher(NamedTuple):
    """Of a layer: Σ_j F_ij of each output i, in nats a token, and tr H, H the second moment of the inputs."""

    rows: Float[np.ndarray, " m"]
    trace: float

    def importance(self) -> Float[np.ndarray, " m"]:
        """g_i = Σ_j F_ij / tr H, so that F_ij ≈ g_i H_jj; 0 for a layer without inputs."""
        return self.rows / self.trace if self.trace > 0 else np.zeros_like(self.rows)


class TableFisher(NamedTuple):
    """Of the embedding or the head [v, d]: the Fisher information of row t is rows_t second / Σ rows, in nats a token;
    tr second = Σ rows.  Those of a table that is both are their sums."""

    second: Float[np.ndarray, "d d"]
    rows: Float[np.ndarray, " v"]


def output_fisher(config: LlamaConfig, params: Params, tokens: Int[np.ndarray, "w s"], key: Key[Array, ""],
                  windows: range, blocks: int | None = None, tables: bool = False
                  ) -> dict[str, OutputFisher | TableFisher]:
    """Of every linear layer, by its path, by the F of ``gradients``, and of "embed" and "head" where ``tables`` are
    asked for: the share of these of the w windows.

    The shares of windows that make up all sum to the whole.  Goes through the model for every CHUNK tokens, so that
    the streams are of no more.  Of the head, where labels y enter alone, it is the mean over all y: the gradient at
    logit t has the second moment p_t (1 − p_t).
    """
    total: dict[str, Any] = {}

    def add(path, of):
        of = type(of)(*(np.asarray(value, np.float64) / tokens.size for value in of))
        total[path] = type(of)(*map(np.add, total[path], of)) if path in total else of

    step = max(1, CHUNK // tokens.shape[1])
    for i in range(0, len(windows), step):
        own, ends = windows[i:i + step], {}
        for index, squares, inputs in _squares(config, params, tokens, key, own, blocks, ends):
            for name, square in squares.items():
                add(f"blocks.{index}.{name}", OutputFisher(jnp.sum(square, axis=1), inputs[llama.input_of(name)]))
        if tables:
            add("head", _of_head(config, ends["last"], ends["leaving"].reshape(-1, config.dim)))
            add("embed", _of_embedding(config, params["embed"], tokens[own], ends["pulled"]))
    return {path: of if isinstance(of, TableFisher) else OutputFisher(of.rows, float(of.trace))
            for path, of in total.items()}


@partial(jax.jit, static_argnums=0)
@jax.default_matmul_precision("highest")
def _of_head(config, last, x):
    """Sums over the streams x [t, d] that leave the last block."""
    table = last["head" if "head" in last else "embed"]
    x = llama.rms_norm(config, last["norm"], x)

    def some(rows, x):
        raw = linear.apply(table, x)
        logits, slope = jax.jvp(partial(llama.squashed, config), (raw,), (jnp.ones_like(raw),))
        p = jax.nn.softmax(logits)
        return rows + jnp.sum(x**2, axis=1) @ (p * (1 - p) * slope**2), None

    tile = min(len(x), max(1, llama.NUMBERS // config.vocab))
    tiles = jnp.pad(x, ((0, -len(x) % tile), (0, 0))).reshape(-1, tile, config.dim)  # a zero counts nothing
    rows, _ = jax.lax.scan(some, jnp.zeros(config.vocab, x.dtype), tiles)
    second = x.T @ x
    return TableFisher(second * (jnp.sum(rows) / jnp.maximum(jnp.trace(second), 1e-30)), rows)


def _of_embedding(config, table, tokens, pulled):
    """Sums over windows of tokens, and the gradients with respect to the streams that enter the first block."""
    scale = llama.scaled(config, np.ones(1, pulled.dtype), table.dtype)
    second, rows = np.zeros((config.dim,) * 2), np.zeros(config.vocab)
    for window, gradient in zip(tokens, pulled * scale, strict=True):
        some, places = np.unique(window, return_inverse=True)
        of_token = np.zeros((len(some), config.dim), pulled.dtype)
        np.add.at(of_token, places, gradient)
        second += of_token.T @ of_token
        rows[some] += np.sum(of_token**2, axis=1)
    return TableFisher(second, rows)


def _squares(config, params, tokens, key, windows, blocks, ends=None):
    """(block index, squared gradients of its linear weights, squares of its inputs), summed over these windows, from
    the last block on.  ``ends`` gets the streams ``leaving`` the last block, what is ``last`` there, and, when all is
    done, the gradient ``pulled`` to the streams that enter the first."""
    split = lambda streams: np.split(streams, len(windows))
    entering = [_streams(config, params, tokens[windows])]
    for index in range(config.layers):
        placed = jax.device_put(_dense(config, params, index))
        entering.append(np.concatenate([forward(config.at(index), placed, x) for x in split(entering[-1])]))
    last = jax.device_put(weights.last(params))
    ends = {} if ends is None else ends
    ends |= {"last": last, "leaving": entering[-1]}
    pulled = np.concatenate([_pull_head(config, last, x, jax.random.fold_in(key, i))
                             for i, x in zip(windows, split(entering.pop()), strict=True)])
    for index in reversed(range(config.layers)):
        placed = jax.device_put(_dense(config, params, index))
        squares = {name: jnp.zeros(shape, pulled.dtype) for name, shape in llama.shapes(config).items()}
        inputs = {name: jnp.zeros((), pulled.dtype) for name in llama.input_sizes(config)}
        for i, x in enumerate(split(entering.pop())):
            pulled[i:i + 1], squares, inputs = _pull(config.at(index), placed, x, pulled[i:i + 1], squares, inputs)
        if blocks is None or index < blocks:
            yield index, squares, inputs
    ends["pulled"] = pulled


def _dense(config, params, index):
    block = dict(params["blocks"][index])
    for name in llama.linears(config):
        if not isinstance(block[name], np.ndarray | Array):
            raise ValueError(f"blocks.{index}.{name} is compressed, and gradients are those of dense weights: pass the "
                             "dense model")
    return block


def save_moments(path: Path, moments: dict[str, Moments]) -> None:
    """Write named Moments to one safetensors file."""
    files.write_arrays(path, {f"{name}.{field}": np.asarray(value) for name, m in moments.items()
                              for field, value in m._asdict().items()})


def load_moments(path: Path) -> dict[str, Moments]:
    """What ``save_moments`` wrote; ValueError naming a file that is missing or damaged."""
    arrays = files.read_arrays(path)
    names = sorted({key.rsplit(".", 1)[0] for key in arrays})
    first = {f"{name}.{field}": value for name in names for field, value in (
        ("peak", np.float32(0)), ("ordinary", np.float32(0)), ("seen", arrays.get(f"{name}.count", np.int32(0))),
        ("energy", np.trace(arrays.get(f"{name}.sum", np.zeros((1, 1), np.float32)))))}
    arrays = first | arrays  # the first ones had none of these, no cap and no experts
    if missing := {f"{name}.{field}" for name in names for field in Moments._fields} - arrays.keys():
        raise ValueError(f"{path}: no Moments: it lacks {min(missing)}: remove the file, to calibrate again")
    return {name: Moments(*(jnp.asarray(arrays[f"{name}.{field}"]) for field in Moments._fields)) for name in names}


def spilled(directory: Path, index: int, name: str) -> Path:
    """The file of one input's Moments."""
    return directory / f"moments_{index:03d}_{name}.safetensors"


def spill(directory: Path, index: int, moments: dict[str, Moments]) -> None:
    """Write the Moments of a block, a file for each input, each by one of the processes."""
    directory.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(sorted(moments)):
        if (index + i) % spread.count() == spread.rank():
            save_moments(spilled(directory, index, name), {name: moments[name]})


def released(directory: Path, config: LlamaConfig, index: int, name: str) -> Float[np.ndarray, "n n"]:
    """The Hessian of one input as the authors of QuIP# and CALDERA released it.

    Files ``0_qkv.pt``, ``0_o.pt``, ``0_up.pt``, ``0_down.pt``, ``1_qkv.pt``, …, of expert 5 ``0_up_5.pt``; see
    ``read_hessian``.
    """
    h, n = read_hessian(path := directory / f"{index}_{name}.pt"), llama.input_sizes(config)[name]
    if len(h) != n:
        raise ValueError(f"{path}: the Hessian is of {len(h)} inputs, and this model's layer has {n}: these files "
                         "belong to another model")
    return h


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
def _pull_head(config, last, x, key):
    """Gradient of Σ_t log p(y_t) with respect to the last stream x [1, s, d], y_t drawn from the model."""
    def likelihood(x, labels):
        return jnp.take_along_axis(jax.nn.log_softmax(llama.head(config, last, x)), labels[..., None], -1)

    keys = jax.random.split(key, x.shape[:2]) if x.shape[1] * config.vocab > llama.NUMBERS else None
    labels = (jax.random.categorical(key, llama.head(config, last, x)) if keys is None else llama.in_tiles(
        lambda x, keys: jax.random.categorical(keys[0, 0], llama.head(config, last, x)), config.vocab, x, keys))
    return jax.grad(lambda x: jnp.sum(llama.in_tiles(likelihood, config.vocab, x, labels)))(x)


@partial(jax.jit, static_argnums=0, donate_argnums=4)
@jax.default_matmul_precision("highest")
def _pull(config, block, x, pulled, squares, inputs):
    """The gradient one block earlier, and the squared gradients of the block's linear weights added to ``squares``, the
    squares of their inputs to ``inputs``."""
    linears = {name: block[name].astype(x.dtype) for name in llama.linears(config)}
    through = lambda linears, x: llama.block(config, block | linears, x, jnp.arange(x.shape[1]))
    _, vjp, seen = jax.vjp(through, linears, x, has_aux=True)
    of_linears, pulled = vjp(pulled)
    return (pulled, {name: squares[name] + of_linears[name]**2 for name in squares},
            {name: inputs[name] + jnp.sum(seen[name]**2) for name in inputs})


@partial(jax.jit, static_argnums=0, donate_argnums=3)
@jax.default_matmul_precision("highest")
def _observe(config: LlamaConfig, block: Params, x: Array, moments: dict[str, Moments], cap: Float[Array, ""]):
    y, inputs = llama.block(config, block, x, jnp.arange(x.shape[1]))
    return y, {name: hessian.update(moments[name], inputs[name], cap) for name in moments}


def _zero(config):
    return {name: hessian.zero(n) for name, n in llama.input_sizes(config).items()}


@jax.jit
def _merge(a, b):
    """Of two Moments, or of two dictionaries of them."""
    return jax.tree.map(hessian.merge, a, b, is_leaf=lambda x: isinstance(x, Moments))
