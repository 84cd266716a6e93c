"""What is trained of a compressed model, and the gradients by it: through packed codes, block by block.

A layer computes diag(s) Tᵀ (Q + L R) T diag(t) x, T the fast transform and s, t the signs: linear in each, so that they
may be trained as reals (QuIP#, arXiv 2402.04396, section 5), and so may the first r columns of L and rows of R
(CALDERA, arXiv 2405.18886, section 3).  A layer of one level, diag(s) (diag(a) Z diag(b) + L R), has no signs: s begins
at 1, and the gains of the norms, which b meets, are trained with it.  A step goes through the model block by block,
forward and back, and keeps only the streams between blocks; within a block the gradient decodes a few rows of Q at a
time.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int

from caldera_jax.jobs import calibration
from caldera_jax.levels import Levelled
from caldera_jax.linear import CompressedLinear, Packed, codes
from caldera_jax.models import llama, weights
from caldera_jax.models.llama import LlamaConfig, Params

Free = dict[str, Any]  # {"blocks": [{layer: {field of CompressedLinear: array}}], and "classifier": [c, d]}
OFFERED = {"goal": ("distill", "text", "labels"), "factor_dtype": ("bfloat16", "float32"),
           "schedule": ("linear", "cosine", "constant")}


@dataclass(frozen=True)
class TrainConfig:
    """All that decides a training but the model and the data.

    signs: train the rotations' signs, and at one level, where there are none, a scale of each output and the norms'
    gains; stored as float16 then, the gains as float32.  ranks: train so many first columns of L and rows of R, stored
    as ``factor_dtype``; 0 for none.  A layer of one level without L R gets a new one, which begins at 0 (LoRA, arXiv
    2106.09685).
    goal: "distill", T² KL(teacher ‖ student) of the next token at temperature T (arXiv 1503.02531); "text", the next
    token's negative log-likelihood; "labels", a window's class from a linear head on its last stream.
    reconstruct: epochs of fitting each block's output to the dense model's, block after block, before all are trained
    together.
    batch windows a step, in ``accumulate`` parts; AdamW without weight decay of signs, gradients clipped to the norm
    ``clip``, rates by ``schedule`` to zero after a share ``warmup`` of warm-up.
    validate: after so many steps, and at the end, the loss on the validation windows is taken, the best parameters
    are kept, and the state is written.
    """

    signs: bool = True
    ranks: int = 0
    factor_dtype: str = "bfloat16"
    goal: str = "distill"
    temperature: float = 1.0
    reconstruct: int = 0
    epochs: int = 1
    batch: int = 4
    accumulate: int = 1
    sign_rate: float = 4e-3
    factor_rate: float = 1e-4
    weight_decay: float = 0.0
    clip: float = 1.0
    schedule: str = "cosine"
    warmup: float = 0.05
    validate: int = 16
    seed: int = 0

    def __post_init__(self):
        for name, offered in OFFERED.items():
            if getattr(self, name) not in offered:
                raise ValueError(f"{name} must be one of {', '.join(offered)}; got {getattr(self, name)!r}")
        least = {"ranks": 0, "reconstruct": 0, "epochs": 0, "batch": 1, "accumulate": 1, "validate": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")
        for name in ("temperature", "clip"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("sign_rate", "factor_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of the steps, from 0 to 1; got {self.warmup}")
        if self.batch % self.accumulate:
            raise ValueError(f"a batch of {self.batch} windows does not divide into {self.accumulate} parts")
        if not (self.signs or self.ranks or self.goal == "labels"):
            raise ValueError("nothing is trained: switch on signs, or give ranks")


# ---- what is trained


def loosen(layer: CompressedLinear, signs: bool, ranks: int) -> tuple[CompressedLinear, dict[str, Any]]:
    """The layer, and those of its fields that are trained, in float32: its sides and, of L R, the first ranks.

    What ``join`` puts together computes what the layer does.  Ranks that were trained before are trained again,
    whatever ``ranks``, and of a levelled L R, whose codes hang together, all or none; where there is none at one level,
    so many are made.  Orthogonal factors and absent rotations have no signs.
    """
    free: dict[str, Any] = {}
    if signs:
        sides = layer.sides(jnp.float32)
        free = {name: side.astype(jnp.float32) for name, side in zip(("left_side", "right_side"), sides, strict=True)
                if not isinstance(side, tuple)}
        if isinstance(layer.q, Levelled):
            (own,) = layer.left_side or (jnp.ones(layer.shape[0]),)
            free["left_side"] = (jnp.asarray(own, jnp.float32),)
    own = 0 if layer.trained is None else len(layer.trained[0])
    if ranks and not layer.rank and isinstance(layer.q, Levelled):
        (m, n), key = layer.shape, jax.random.key(0)
        if ranks > min(m, n):
            raise ValueError(f"{ranks} ranks are to be trained, more than a layer of {m} x {n} has: give fewer")
        free["trained"] = jnp.zeros((ranks, m)), jax.random.normal(key, (ranks, n)) / math.sqrt(n)
        return layer, free
    if count := layer.rank if ranks and isinstance(layer.right, Levelled) else max(own, min(ranks, layer.rank)):
        _, left, right = layer.rotated()
        free["trained"] = _balanced(left.T[:count].astype(jnp.float32), right[:count].astype(jnp.float32))
        rest = (_from(part, count - own) for part in (layer.left_t, layer.right))
        layer = dataclasses.replace(layer, **dict(zip(("left_t", "right"), rest, strict=True)), trained=None)
    return layer, free


def _balanced(left_t: Array, right: Array) -> tuple[Array, Array]:
    """Factors of one size and the same product: the scale of W is in CALDERA's L alone (``linear.pack``), and Adam
    moves all by one length.  By a power of two, so that nothing is rounded; not where one of them is 0."""
    of_left, of_right = (jnp.sqrt(jnp.mean(factor**2)) for factor in (left_t, right))
    by = jnp.round(jnp.log2(jnp.where(of_left * of_right > 0, of_right / of_left, 1)) / 2).astype(jnp.int32)
    return jnp.ldexp(left_t, by), jnp.ldexp(right, -by)


def _from(part: Packed | Levelled | None, row: int) -> Packed | Levelled | None:
    """The rows from this one on."""
    if part is None or isinstance(part, Levelled) and row or row == len(codes(part)):
        return None
    return Packed(part.codes[row:], part.scale if len(part.scale) == 1 else part.scale[row:])


def join(block: Mapping[str, Any], free: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The block with what is trained in its place, a norm's gain times its own."""
    return {**block, **{name: block[name].astype(jnp.float32) * fields["gain"] if "gain" in fields else
                        dataclasses.replace(block[name], **fields) for name, fields in free.items()}}


def stored(free: Free, factor_dtype: str) -> Free:
    """What is trained as it is stored: signs in float16, factors in ``factor_dtype``, a classifier in float32."""
    to = {"left_side": jnp.float16, "right_side": jnp.float16, "trained": jnp.dtype(factor_dtype),
          "gain": jnp.float32}

    def rounded(fields):
        return {field: jax.tree.map(lambda a, dtype=to[field]: a.astype(dtype), value)
                for field, value in fields.items()}

    return {**free, "blocks": [{name: rounded(fields) for name, fields in block.items()} for block in free["blocks"]]}


# ---- gradients, block by block


@partial(jax.jit, static_argnums=0)
@jax.default_matmul_precision("highest")
def _pull(config, block, free, x, pulled):
    """Gradients with respect to ``free`` and to x, from that of the block's output."""
    return jax.vjp(lambda free, x: llama.block(config, join(block, free), x, jnp.arange(x.shape[1]))[0], free, x)[1](
        pulled)


@partial(jax.jit, static_argnums=0)
@jax.default_matmul_precision("highest")
def fit_block_gradient(config, block, free, x, target, counted):
    """Sum of the squared distances of the block's output from the target, of tokens that count, and its gradient."""
    def loss(free):
        y = llama.block(config, join(block, free), x, jnp.arange(x.shape[1]))[0]
        return jnp.sum(jnp.where(counted[..., None], y - target, 0) ** 2)

    return jax.value_and_grad(loss)(free)


class Batch(NamedTuple):
    """Windows, and what is to be learned of them: the teacher's last streams [b, s, d], or the classes [b] and the
    number of tokens [b] that count."""

    tokens: Int[np.ndarray, "b s"]
    teacher: Float[np.ndarray, "b s d"] | None = None
    labels: Int[np.ndarray, " b"] | None = None
    lengths: Int[np.ndarray, " b"] | None = None

    def __getitem__(self, rows):  # of every part
        return Batch(*(None if part is None else part[rows] for part in self))


class Entering(NamedTuple):
    """What enters a block, what shall leave it, and which tokens count."""

    x: Float[np.ndarray, "b s d"]
    target: Float[np.ndarray, "b s d"]
    counted: Bool[np.ndarray, "b s"]


def soft_loss(teacher: Float[Array, "*b v"], student: Float[Array, "*b v"],
              temperature: float | Array) -> Float[Array, ""]:
    """T² KL(softmax(teacher / T) ‖ softmax(student / T)), mean over tokens, nats (arXiv 1503.02531)."""
    return temperature**2 * jnp.mean(_soft_losses(teacher, student, temperature))


def _soft_losses(teacher, student, temperature):
    p, q = (jax.nn.log_softmax(logits / temperature) for logits in (teacher, student))
    return jnp.sum(jnp.exp(p) * (p - q), axis=-1)


def _head_loss(config, train, lanes, last, classifier, x, batch):
    """Mean loss over the windows, ``lanes`` of them at a time (one a device): logits of more never exist."""
    head = partial(llama.head, config, last)

    def of_window(x, batch):
        if train.goal == "labels":
            stream = llama.rms_norm(config, last["norm"], x)[batch.lengths - 1]
            return -jax.nn.log_softmax(classifier.astype(x.dtype) @ stream)[batch.labels]
        if train.goal == "distill":
            distances = lambda x, teacher: _soft_losses(head(teacher), head(x), train.temperature)
            return train.temperature**2 * jnp.mean(llama.in_tiles(distances, config.vocab, x[None],
                                                                  batch.teacher[None]))
        right = lambda x, labels: jnp.take_along_axis(jax.nn.log_softmax(head(x)), labels[..., None], axis=-1)
        return -jnp.mean(llama.in_tiles(right, config.vocab, x[None], jnp.roll(batch.tokens, -1)[None])[:, :-1])

    apart = lambda a: a.reshape(lanes, -1, *a.shape[1:]).swapaxes(0, 1)
    each = jax.checkpoint(jax.vmap(of_window))
    return jnp.mean(lax.map(lambda items: each(*items), jax.tree.map(apart, (x, batch))))


@partial(jax.jit, static_argnums=(0, 1, 2))
@jax.default_matmul_precision("highest")
def _pull_head(config, train, lanes, last, classifier, x, batch):
    """The loss, and its gradients with respect to the classifier and to the last streams x."""
    loss = lambda classifier, x: _head_loss(config, train, lanes, last, classifier, x, batch)
    return jax.value_and_grad(loss, argnums=(0, 1))(classifier, x)


_value = jax.jit(jax.default_matmul_precision("highest")(_head_loss), static_argnums=(0, 1, 2))


class Student(NamedTuple):
    """A compressed model in training, on the devices that share each batch: ``blocks`` without what is trained, and
    ``last``, all but the blocks."""

    config: LlamaConfig
    train: TrainConfig
    mesh: Mesh
    last: Params
    blocks: list[dict[str, Any]]

    def place(self, batch: Batch | Entering) -> Batch | Entering:
        """The batch with its windows spread over the devices."""
        return jax.device_put(batch, NamedSharding(self.mesh, P("data")))

    def streams(self, free: Free, batch: Batch) -> list[Array]:
        """What enters each block, and what leaves the last."""
        found = [llama.embed(self.config, self.last, batch.tokens)]
        for i, (block, own) in enumerate(zip(self.blocks, free["blocks"], strict=True)):
            found.append(calibration.forward(self.config.at(i), join(block, own), found[-1]))
        return found

    def loss(self, free: Free, batch: Batch) -> Array:
        """Mean loss of the windows."""
        x = self.streams(free, batch)[-1]
        return _value(self.config, self.train, self.mesh.size, self.last, free.get("classifier"), x, batch)

    def gradient(self, free: Free, batch: Batch) -> tuple[Array, Free]:
        """Mean loss of the windows, and its gradient."""
        *entering, x = self.streams(free, batch)
        classifier = free.get("classifier", jnp.zeros((0, 0), x.dtype))
        loss, (of_classifier, pulled) = _pull_head(self.config, self.train, self.mesh.size, self.last, classifier, x,
                                                   batch)
        gradients = []
        for i, block, own in reversed(list(zip(range(len(entering)), self.blocks, free["blocks"], strict=True))):
            of_block, pulled = _pull(self.config.at(i), block, own, entering.pop(), pulled)
            gradients.append(of_block)
        found = {"blocks": gradients[::-1]}
        return loss, found | {"classifier": of_classifier} if "classifier" in free else found


def student(config: LlamaConfig, params: Params, train: TrainConfig, classes: int = 0) -> tuple[Student, Free]:
    """A model made ready, and what is trained of it.  ``classes``: of goal "labels".

    A classifier of as many classes that the model has is trained on; else it begins at 0.
    Raises ValueError where no layer has what is to be trained.
    """
    share = train.batch // train.accumulate
    devices = jax.local_devices()
    mesh = Mesh(np.array(devices[:max(d for d in range(1, len(devices) + 1) if share % d == 0)]), ("data",))
    blocks, free = [], []
    for block in params["blocks"]:
        loose = {name: loosen(value, train.signs, train.ranks) for name, value in dict(block).items()
                 if isinstance(value, CompressedLinear)}
        blocks.append({**block, **{name: layer for name, (layer, _) in loose.items()}})
        free.append({name: fields for name, (_, fields) in loose.items() if fields})
        if any(isinstance(fields.get("left_side"), tuple) for fields in free[-1].values()):
            free[-1] |= {name: {"gain": jnp.ones(value.shape, jnp.float32)} for name, value in dict(block).items()
                         if name.endswith("norm")}
    names = {name for block in free for fields in block.values() for name in fields}
    if train.signs and not names & {"left_side", "right_side"}:
        raise ValueError("signs are to be trained, and no layer has any: the model was compressed at fixed rates and "
                         "without Hadamard rotation: train ranks alone, without signs")
    if train.ranks and "trained" not in names:
        raise ValueError("ranks are to be trained, and no layer has any: the model was compressed at rank 0: train "
                         "signs alone, with ranks 0")
    everywhere = partial(jax.device_put, device=NamedSharding(mesh, P()))
    found: Free = {"blocks": free}
    if train.goal == "labels":
        old = params.get("classifier")
        found["classifier"] = (jnp.zeros((classes, config.dim), jnp.float32) if old is None or len(old) != classes else
                               jnp.asarray(old, jnp.float32))
    return Student(config, train, mesh, everywhere(weights.rest(params)), everywhere(blocks)), everywhere(found)
