"""Decoders in plain JAX: Llama, and the families that differ from it by a row of ``families.TABLE``.

Letters: b batch, s sequence, c capacity of a cache, d model width, h query heads, g key/value heads, e head width,
v vocabulary.

``params`` is ``{"embed": [v, d], "blocks": [block, ...], "norm": [d]}`` and ``"head": [v, d]`` when the output is not
tied to the embedding; a block holds its ``linears`` ([m outputs, n inputs], each an array or a ``CompressedLinear``),
the gains that its family has (``attn_norm`` and ``ffn_norm``, Llama's), with ``qkv_bias`` ``q_bias``, ``k_bias`` and
``v_bias``, and with experts the ``router`` [experts, d].
Of experts, e has the layers ``gate_e``, ``up_e`` and ``down_e``, whose inputs are zero for tokens that it is not asked.
Blocks may differ in what a token sees: ``LlamaConfig.at`` is the configuration of one.
Activations are float32 (float64 for a float64 embedding), whatever narrower type the weights are stored in.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, PRNGKeyArray, UInt32

from caldera_jax.linear import CompressedLinear, apply, rows
from caldera_jax.models import families

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")  # of a block without experts
INPUT_OF = {"q": "qkv", "k": "qkv", "v": "qkv", "o": "o", "gate": "up", "up": "up", "down": "down"}

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True)}
NUMBERS = 2**26  # scores or logits that are held at once: of longer sequences those of some positions at a time

Params = dict[str, Any]


@dataclass(frozen=True)
class LinearRopeScaling:
    """Every wavelength grows by ``factor``: positions lie that much closer together."""

    factor: float

    def __post_init__(self):
        if not 0 < self.factor < math.inf:
            raise ValueError(f"a rope scaling needs a positive factor, got {self.factor}")


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's context extension: wavelengths beyond ``original_context / low_freq_factor`` grow by ``factor``."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int

    def __post_init__(self):
        if not (0 < self.factor < math.inf and 0 < self.low_freq_factor < self.high_freq_factor < math.inf
                and self.original_context > 0):
            raise ValueError("Llama 3's rope scaling needs positive numbers, high_freq_factor above low_freq_factor, "
                             f"got {self}")


RopeScaling = LinearRopeScaling | Llama3RopeScaling


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a decoder. ``sliding_window`` w lets a token see itself and the w - 1 before it.

    family: a row of the table.
    attention_scale: of the scores (None: 1 / sqrt(head_dim)); attention_cap c: they become c tanh(scores / c), and so
    do logits by logit_cap, after a division by logit_divisor; embed_scale, residual_scale: of the embedding, and of
    all that is added to the residual stream.
    local: of each block, whether the window is its own (none given: of all); these have local_theta, unscaled, for
    rope_theta, where there is one.
    experts: MLPs of width ffn_dim, of which experts_per_token answer a token; renormalised: their weights sum to 1.
    """

    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tied: bool = False
    context: int = 2048
    sliding_window: int | None = None
    qkv_bias: bool = False
    family: str = field(default="llama", repr=False)  # repr: told only where they differ from the default
    attention_scale: float | None = field(default=None, repr=False)
    attention_cap: float | None = field(default=None, repr=False)
    logit_cap: float | None = field(default=None, repr=False)
    logit_divisor: float = field(default=1.0, repr=False)
    embed_scale: float = field(default=1.0, repr=False)
    residual_scale: float = field(default=1.0, repr=False)
    local: tuple[bool, ...] = field(default=(), repr=False)
    local_theta: float | None = field(default=None, repr=False)
    experts: int = field(default=0, repr=False)
    experts_per_token: int = field(default=0, repr=False)
    renormalised: bool = field(default=False, repr=False)

    def __post_init__(self):
        sizes = ("vocab", "dim", "layers", "heads", "kv_heads", "head_dim", "ffn_dim", "context")
        for name in sizes + ("sliding_window",) * (self.sliding_window is not None):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)}")
        if not 0 < self.rope_theta < math.inf or not 0 <= self.norm_eps < math.inf:
            raise ValueError("rope_theta must be positive and norm_eps at least 0, both finite; got "
                             f"{self.rope_theta} and {self.norm_eps}")
        if self.family not in families.FORWARD:
            raise ValueError(f"unknown family {self.family!r}: known are {', '.join(families.FORWARD)}")
        own = {*self.row.numbers, *self.row.fixed, "family", *["local"] * (self.row.window == "local")}
        for f in (f for f in fields(self) if not f.repr):
            if (value := getattr(self, f.name)) != f.default and f.name not in own:
                raise ValueError(f"blocks of family {self.family!r} have no {f.name}, got {value}")
            if isinstance(value, float) and not 0 < value < math.inf:
                raise ValueError(f"{f.name} must be positive and finite, got {value}")
        if len(self.local) not in (0, self.layers) or any(self.local) and self.sliding_window is None:
            raise ValueError(f"local needs an entry for each of the {self.layers} blocks, and a sliding_window where "
                             f"one is true; got {len(self.local)} and {self.sliding_window}")
        if self.row.experts and not 1 <= self.experts_per_token <= self.experts:
            raise ValueError(f"experts_per_token must be from 1 to the number of experts; got {self.experts_per_token} "
                             f"of {self.experts}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads do not divide into {self.kv_heads} key/value heads")
        if self.head_dim % 2:
            raise ValueError(f"rotary embedding needs an even head_dim, got {self.head_dim}")

    @property
    def row(self) -> families.Family:
        """What the table says of this family."""
        return families.FORWARD[self.family]

    def at(self, index: int) -> "LlamaConfig":
        """The configuration of one block: equal ones, which compile once, for blocks of a kind."""
        if not self.local:
            return self
        if not self.local[index]:
            return replace(self, local=(), local_theta=None, sliding_window=None)
        own = {} if self.local_theta is None else {"rope_theta": self.local_theta, "rope_scaling": None}
        return replace(self, local=(), local_theta=None, **own)

    def told(self) -> dict[str, Any]:
        """The fields by name, as JSON has them; of those that Llama lacks, the ones that differ from its."""
        names = [f.name for f in fields(self) if f.repr or getattr(self, f.name) != f.default]
        return {name: value for name, value in asdict(self).items() if name in names}

    def __repr__(self):  # of a Llama as ever: models are known by it
        return f"LlamaConfig({', '.join(f'{name}={getattr(self, name)!r}' for name in self.told())})"


def shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(m outputs, n inputs) of each of a block's linear layers, in order: attention, then MLP, or one expert after the
    other."""
    d, queries, keys = config.dim, config.heads * config.head_dim, config.kv_heads * config.head_dim
    mlp = {"gate": (config.ffn_dim, d), "up": (config.ffn_dim, d), "down": (d, config.ffn_dim)}
    if config.experts:
        mlp = {f"{name}_{e}": shape for e in range(config.experts) for name, shape in mlp.items()}
    return {"q": (queries, d), "k": (keys, d), "v": (keys, d), "o": (d, queries)} | mlp


def linears(config: LlamaConfig) -> tuple[str, ...]:
    """Names of a block's linear layers, in the order of ``shapes``."""
    return tuple(shapes(config))


def kind_of(name: str) -> str:
    """What a linear layer is, one of ``LINEARS``: "up" of "up_5", which is expert 5's; of a path, "blocks.0.up"."""
    return name.split("_")[0]


def input_of(name: str) -> str:
    """Name of a linear layer's input, which several may share: "up_5" of "gate_5"."""
    return name.replace(kind_of(name), INPUT_OF[kind_of(name)])


def input_sizes(config: LlamaConfig) -> dict[str, int]:
    """Inputs of a block's linear layers -> n."""
    return {input_of(name): n for name, (_, n) in shapes(config).items()}


def block_weights(config: LlamaConfig) -> int:
    """Number of weights of a block's linear layers."""
    return sum(math.prod(shape) for shape in shapes(config).values())


def table_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(vocabulary, width) of the embedding and, unless it is tied to it, of the head."""
    return {name: (config.vocab, config.dim) for name in ("embed", "head")[:1 if config.tied else 2]}


def router_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """(experts, inputs) of a block's router, if it has one."""
    return {"router": (config.experts, config.dim)} if config.experts else {}


def vector_shapes(config: LlamaConfig) -> dict[str, tuple[int]]:
    """(length,) of each of a block's gains and, where there are any, biases."""
    of = shapes(config)
    whole = config.row.qk_norm == "projection"
    widths = {f"{name}_norm": of[name][0] if whole else config.head_dim for name in "qk"}
    biases = {f"{name}_bias": of[name][:1] for name in "qkv"} if config.qkv_bias else {}
    return {name: (widths.get(name, config.dim),) for name in config.row.norms} | biases


def block_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Shape of everything in a block."""
    return shapes(config) | router_shapes(config) | vector_shapes(config)


def all_weights(config: LlamaConfig) -> int:
    """Number of weights of a model, gains and biases with them."""
    block = sum(map(math.prod, block_shapes(config).values()))
    return config.layers * block + sum(map(math.prod, table_shapes(config).values())) + config.dim


def init(key: PRNGKeyArray | UInt32[Array, "2"], config: LlamaConfig, dtype=jnp.float32) -> Params:
    """Random parameters: N(0, 1/n) weights, unit gains, zero biases. For tests and for models trained from nothing."""

    def normal(key, shape):
        return jax.random.normal(key, shape, dtype) / math.sqrt(shape[1])

    unit = 1 - config.row.gain

    def one_block(key):
        matrices = shapes(config) | router_shapes(config)
        keys = jax.random.split(key, len(matrices))
        weights = {name: normal(k, shape) for k, (name, shape) in zip(keys, matrices.items(), strict=True)}
        vectors = {n: jnp.full(s, unit if n.endswith("norm") else 0.0, dtype) for n, s in vector_shapes(config).items()}
        return weights | vectors

    embed_key, head_key, *block_keys = jax.random.split(key, config.layers + 2)
    table = (config.vocab, config.dim)
    params = {"embed": normal(embed_key, table), "blocks": [one_block(k) for k in block_keys]}
    params["norm"] = jnp.full(config.dim, unit, dtype)
    return params if config.tied else params | {"head": normal(head_key, table)}


def rms_norm(config: LlamaConfig, gain: Any, x: Float[Array, "*b n"]) -> Float[Array, "*b n"]:
    """x / sqrt(mean(x²) + eps) · gain, over the last axis; gain + 1 for families that store it so."""
    gain = gain.astype(x.dtype)[(None,) * (x.ndim - 1)]
    gain = gain + config.row.gain if config.row.gain else gain
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + config.norm_eps) * gain


def _normed(config, params, name, x):
    """x after the norm of this name, if blocks of the family have one."""
    return rms_norm(config, params[name], x) if name in config.row.norms else x


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Float64[np.ndarray, " half"]:
    """Radians per position of each rotated pair: theta^(-2i/e), slowed down by ``scaling`` if there is one.

    Linear scaling divides all by ``factor``. Llama 3 scaling divides those that turn less than ``low_freq_factor``
    times within the original context, keeps those that turn more than ``high_freq_factor`` times, and interpolates
    linearly between.
    """
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequency
    if isinstance(scaling, LinearRopeScaling):
        return frequency / scaling.factor
    turns = scaling.original_context * frequency / (2 * np.pi)
    kept = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return frequency * (kept + (1 - kept) / scaling.factor)


def rope(config: LlamaConfig, x: Float[Array, "b s h e"], positions: Int[Array, "*b s"]) -> Float[Array, "b s h e"]:
    """Rotate the pairs (x_i, x_{i + e/2}) by position · frequency_i: Hugging Face's pairing, not GGUF's."""
    frequency = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angle = jnp.atleast_2d(positions).astype(x.dtype)[:, :, None] * jnp.asarray(frequency, x.dtype)[None, None]
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def in_tiles(function: Callable[..., Any], size: int, *arrays: Array) -> Any:
    """function(*arrays), whose arrays, and those it returns, have positions on their second axis and do not mix them.

    Where it works with ``size`` numbers a position and these are more than ``NUMBERS`` together, some positions at a
    time, in the backward pass, too, which computes each tile anew.
    """
    tile = max(1, NUMBERS // size)
    if arrays[0].shape[1] <= tile:
        return function(*arrays)
    at = lambda rows: jax.tree.map(lambda a: a[:, 0], function(*(row[:, None] for row in rows)))
    rows = tuple(jnp.moveaxis(a, 1, 0) for a in arrays)
    return jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), jax.lax.map(jax.checkpoint(at), rows, batch_size=tile))


def attention(
    config: LlamaConfig,
    q: Float[Array, "b s h e"],
    k: Float[Array, "b c g e"],
    v: Float[Array, "b c g e"],
    positions: Int[Array, "*b s"],
    key_positions: Int[Array, " c"],
) -> Float[Array, "b s h*e"]:
    """softmax(q kᵀ / sqrt(e)) v, causal; query head i reads key head i // (h / g). Memory b·h·s·c scores, or about
    ``NUMBERS`` where these are more. ``attention_scale`` takes the place of 1 / sqrt(e)."""
    attend = partial(_attend, config, k, v, key_positions)
    return in_tiles(attend, len(q) * config.heads * k.shape[1], q, jnp.atleast_2d(positions))


def _attend(config, k, v, key_positions, q, positions):
    b, s, h, e = q.shape
    q = q.reshape(b, s, config.kv_heads, h // config.kv_heads, e)
    scores = jnp.einsum("bqgre,bkge->bgrqk", q, k)
    scores = scores / math.sqrt(e) if config.attention_scale is None else scores * config.attention_scale
    scores = _capped(scores, config.attention_cap)
    distance = positions[:, :, None] - key_positions[None, None]
    seen = distance >= 0
    if config.sliding_window is not None:
        seen &= distance < config.sliding_window
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bgrqk,bkge->bqgre", weights, v).reshape(b, s, h * e)


def _capped(x, cap):
    return x if cap is None else cap * jnp.tanh(x / cap)


def embed(config: LlamaConfig, params: Params, tokens: Int[Array | np.ndarray, "b s"]) -> Float[Array, "b s d"]:
    """Rows of the embedding table, at least in float32. A token outside the vocabulary gives NaN."""
    table = params["embed"]
    x = rows(table if isinstance(table, CompressedLinear) else jnp.asarray(table), tokens)
    return scaled(config, x, x.dtype)


def scaled(config: LlamaConfig, x: Any, stored: np.dtype) -> Any:
    """Rows of an embedding table that is stored in this type as they enter the first block, at least in float32."""
    scale = config.embed_scale
    if config.row.root_scale:  # the models were trained with the root rounded so
        scale *= float(np.asarray(math.sqrt(config.dim)).astype(stored))
    x = x.astype(np.promote_types(stored, np.float32))
    return x if scale == 1 else x * scale


def block(
    config: LlamaConfig, params: Params, x: Float[Array, "b s d"], positions: Int[Array, " s"]
) -> tuple[Float[Array, "b s d"], dict[str, Float[Array, "b s _"]]]:
    """One decoder block: the new residual stream, and the inputs of its linear layers by ``input_of``.

    ``config``: of this block, ``config.at(index)``; ValueError for that of a whole model whose blocks differ.
    Inputs that the caller drops cost nothing under ``jit``.
    Experts compute all tokens, one expert after the other, so that no shape depends on the text: experts /
    experts_per_token times the products that the tokens ask for; and the program grows with their number (64 packed
    ones compile in a minute).
    """
    h = _normed(config, params, "attn_norm", x)
    q, k, v = _heads(config, params, h, positions)
    return _after(config, params, x, h, attention(config, q, k, v, positions, positions))


def _heads(config, params, h, positions):
    """Queries and keys, rotated, and values."""
    if config.local:  # which of the kinds would be a guess
        raise ValueError("blocks of this model differ: give the configuration of one, config.at(index)")

    def project(name):
        y = apply(params[name], h)
        if config.qkv_bias:
            y = y + params[f"{name}_bias"].astype(y.dtype)[None, None]
        if (norm := f"{name}_norm") in config.row.norms:
            width = {"head": config.head_dim, "projection": y.shape[2]}[config.row.qk_norm]
            y = rms_norm(config, params[norm], y.reshape(*y.shape[:2], -1, width))
        return y.reshape(*y.shape[:2], -1, config.head_dim)

    q, k, v = (project(name) for name in "qkv")
    return rope(config, q, positions), rope(config, k, positions), v


def _after(config, params, x, h, mixed):
    """What follows the attention, as ``block`` returns it."""

    def add(x, name, y):
        y = _normed(config, params, f"{name}_post_norm", y)
        return x + (y if config.residual_scale == 1 else y * config.residual_scale)

    x = add(x, "attn", apply(params["o"], mixed))
    y, inputs = (_routed if config.experts else _mlp)(config, params, _normed(config, params, "ffn_norm", x))
    return add(x, "ffn", y), {"qkv": h, "o": mixed, **inputs}


def _mlp(config, params, z, of="", weight=None):
    """The MLP's output, or that of expert ``of`` times the weight of each token, and the inputs of its layers.

    The weight goes in before ``down``, which is linear, so that the second moment of its inputs counts each token as
    the output does.
    """
    inner = ACTIVATIONS[config.row.activation](apply(params[f"gate{of}"], z)) * apply(params[f"up{of}"], z)
    inner = inner if weight is None else weight * inner
    return apply(params[f"down{of}"], inner), {f"up{of}": z, f"down{of}": inner}


def _routed(config, params, z):
    """The sum of the experts, each times its weight."""
    y, inputs = jnp.zeros_like(z), {}
    for e, weight in enumerate(jnp.split(route(config, params["router"], z), config.experts, axis=-1)):
        own, of_layers = _mlp(config, params, jnp.where(weight > 0, z, 0), f"_{e}", weight)
        y, inputs = y + own, inputs | of_layers
    return y, inputs


def route(config: LlamaConfig, router: Any, z: Float[Array, "b s d"]) -> Float[Array, "b s experts"]:
    """Weight of each expert for each token: softmax of the router's outputs, and 0 but for the largest
    ``experts_per_token``; over their sum, if ``renormalised``."""
    shares = jax.nn.softmax(apply(router, z), axis=-1)
    weights, chosen = jax.lax.top_k(shares, config.experts_per_token)
    if config.renormalised:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.put_along_axis(jnp.zeros_like(shares), chosen, weights, axis=-1, inplace=False)


class Cache(NamedTuple):
    """Rotated keys and values of one block: what stands at position p of a sequence lies in slot p."""

    k: Float[Array, "b c g e"]
    v: Float[Array, "b c g e"]


def empty_cache(config: LlamaConfig, batch: int, capacity: int, dtype=jnp.float32) -> Cache:
    """A block's Cache for sequences of at most ``capacity`` tokens: 2 · b · c · g · e numbers, which ``cached_block``
    rounds to this type."""
    return Cache(*jnp.zeros((2, batch, capacity, config.kv_heads, config.head_dim), dtype))


def cached_block(
    config: LlamaConfig, params: Params, x: Float[Array, "b s d"], cache: Cache, positions: Int[Array, "b s"]
) -> tuple[Float[Array, "b s d"], Cache]:
    """``block`` for tokens whose predecessors are in the cache; puts their own keys and values there.

    Rows may stand at different positions. A token sees no slot beyond its own, so whatever lies there does no harm:
    sequences padded on the right with any tokens give each the same as alone. A position of c or more is lost silently.
    """
    h = _normed(config, params, "attn_norm", x)
    q, k, v = _heads(config, params, h, positions)
    rows = jnp.arange(len(x))[:, None]
    cache = Cache(*(of.at[rows, positions].set(new.astype(of.dtype)) for of, new in zip(cache, (k, v), strict=True)))
    slots = jnp.arange(cache.k.shape[1], dtype=positions.dtype)
    mixed = attention(config, q, *(of.astype(q.dtype) for of in cache), positions, slots)
    return _after(config, params, x, h, mixed)[0], cache


def head(config: LlamaConfig, params: Params, x: Float[Array, "b s d"]) -> Float[Array, "b s v"]:
    """Logits from the last residual stream."""
    return squashed(config, apply(params["embed" if config.tied else "head"], rms_norm(config, params["norm"], x)))


def squashed(config: LlamaConfig, logits: Float[Array, "*b v"]) -> Float[Array, "*b v"]:
    """Logits from what the head's product gives, divided and capped as the family has them."""
    return _capped(logits if config.logit_divisor == 1 else logits / config.logit_divisor, config.logit_cap)


def forward(config: LlamaConfig, params: Params, tokens: Int[Array | np.ndarray, "b s"]) -> Float[Array, "b s v"]:
    """Logits of the next token at each position. Compiling it unrolls the blocks; ``block`` compiles once a kind."""
    x, positions = embed(config, params, tokens), jnp.arange(tokens.shape[1])
    for i, block_params in enumerate(params["blocks"]):
        x, _ = block(config.at(i), block_params, x, positions)
    return head(config, params, x)
