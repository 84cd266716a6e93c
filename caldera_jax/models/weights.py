"""Weights that stay in their files until they are asked for, so that a model need not fit in memory."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped
from tokenizers import Tokenizer

from caldera_jax.models import llama
from caldera_jax.models.llama import LlamaConfig, Params


class Tensor(NamedTuple):
    """A tensor of a file: what its header says, and how to read it, or rows of it: a slice, or rising indices."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[..., np.ndarray]


class Table:
    """An embedding or a head [v, d] that stays in its file: ``table[tokens]`` reads the rows of the tokens,
    ``np.asarray(table)`` all.  IndexError for a token without one."""

    def __init__(self, tensor: Tensor):
        self.shape, self._read = tensor.shape, tensor.read
        self.dtype = self[np.zeros(1, int)].dtype

    def __getitem__(self, tokens: Int[np.ndarray, "*batch"]) -> Shaped[np.ndarray, "*batch d"]:
        some, places = np.unique(tokens, return_inverse=True)
        if len(some) and not 0 <= some[0] <= some[-1] < self.shape[0]:
            raise IndexError(f"tokens {some[0]} to {some[-1]} of an embedding or head of {self.shape[0]} rows")
        return self._read(some if len(some) else slice(0))[places.reshape(tokens.shape)]

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._read(), dtype)


class Model(NamedTuple):
    """A model on the host; its ``params["blocks"]`` is a list of ``Block``.

    special: which tokens begin and end a text, and the chat template, as far as they are known; ends: further ids that
    end a text (both ``models.tokenizer``).
    """

    config: LlamaConfig
    params: Params
    tokenizer: Tokenizer
    name: str
    special: dict[str, str] = {}
    ends: tuple[int, ...] = ()


class Block(Mapping):
    """The weights of one block by name, each read from its file when asked for; nothing is kept. ``dict(block)``: all.

    Call ``jax.tree`` functions on ``dict(block)``, or on ``whole(params)``: a Block itself is no pytree.
    """

    def __init__(self, read: dict[str, Callable[[], Any]]):
        self._read = read

    def __getitem__(self, name: str) -> Any:
        return self._read[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


def rest(params: Params) -> Params:
    """The params without the blocks, in memory: embedding, last norm, and what else there is."""
    return {name: _held(value) for name, value in params.items() if name != "blocks"}


def last(params: Params) -> Params:
    """What ``llama.head`` needs, in memory: the last norm, and the head, or the embedding where that is the head."""
    return {name: _held(params[name]) for name in ("norm", "head" if "head" in params else "embed")}


def whole(params: Params) -> Params:
    """The params with all in memory, as a pytree."""
    return rest(params) | {"blocks": [dict(block) for block in params["blocks"]]}


def _held(value):
    return np.asarray(value) if isinstance(value, Table) else value


def by_tensor(config: LlamaConfig, names: dict[str, str]) -> dict[str, tuple[tuple[int, ...], dict[str, slice]]]:
    """Tensor of a block -> its shape, and the parts that it holds, most often one, with their rows."""
    found: dict[str, tuple[tuple[int, ...], dict[str, slice]]] = {}
    for part, (count, *width) in llama.block_shapes(config).items():
        (start, *_), parts = found.get(names[part], ((0,), {}))
        found[names[part]] = (start + count, *width), parts | {part: slice(start, start + count)}
    return found


def assemble(config: LlamaConfig, names: dict[str, str], tensors: dict[str, Tensor], source: str) -> Params:
    """The params tree from ``tensors`` (emptied on the way), every one of which must be used and of the right shape.

    ``names``: part of the tree -> tensor, with ``{}`` for the block's index; parts with one name are its rows, one
    below the other.
    """

    def take(name, shape):
        if name not in tensors:
            raise ValueError(f"{source}: tensor {name} is missing; the configuration asks for it with shape {shape}")
        tensor = tensors.pop(name)
        if tensor.shape != tuple(shape):
            raise ValueError(f"{source}: tensor {name} has shape {tensor.shape}, the configuration asks for {shape}")
        if tensor.dtype not in ("F16", "BF16", "F32", "F64"):
            raise ValueError(f"{source}: tensor {name} is {tensor.dtype}; floating-point weights of 16+ bits needed")
        return tensor

    def block(index):
        found = {}
        for name, (shape, parts) in tensors_of_block.items():
            read = take(name.format(index), shape).read
            found |= {part: partial(read, rows) if len(parts) > 1 else read for part, rows in parts.items()}
        return Block(found)

    tensors_of_block, table = by_tensor(config, names), (config.vocab, config.dim)
    norm, tables = take(names["norm"], (config.dim,)), ("embed",) if config.tied else ("embed", "head")
    others = {name: take(names[name], table) for name in tables}
    blocks = [block(index) for index in range(config.layers)]
    if tensors:
        names = ", ".join(sorted(tensors)[:5])
        raise ValueError(f"{source}: {len(tensors)} tensors that this architecture does not use: {names}, ...")
    return {name: Table(tensor) for name, tensor in others.items()} | {"norm": norm.read(), "blocks": blocks}
