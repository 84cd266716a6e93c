"""Fine-tuning a compressed model: rotation signs as reals, and the first r ranks of L R as numbers; codes stay packed.

A layer computes diag(s) Tᵀ (Q + L R) T diag(t) x, T the fast transform and s, t the signs: linear in each, so that they
may be trained as reals (QuIP#, arXiv 2402.04396, section 5), and so may the first r columns of L and rows of R
(CALDERA, arXiv 2405.18886, section 3).  A step goes through the model block by block, forward and back, and keeps only
the streams between blocks; within a block the gradient decodes a few rows of Q at a time.
"""

import dataclasses
import errno
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from caldera_jax import artifact, calibration, evaluate, files, report
from caldera_jax.linear import CompressedLinear, Packed
from caldera_jax.models import data, llama, tokenizer, weights
from caldera_jax.models.convert import Model
from caldera_jax.models.data import Tokens
from caldera_jax.models.llama import LlamaConfig, Params
from caldera_jax.run import Run

Free = dict[str, Any]  # {"blocks": [{layer: {field of CompressedLinear: array}}], and "classifier": [c, d]}
OFFERED = {"goal": ("distill", "text", "labels"), "factor_dtype": ("bfloat16", "float32"),
           "schedule": ("linear", "cosine", "constant")}


@dataclass(frozen=True)
class TrainConfig:
    """All that decides a training but the model and the data.

    signs: train the rotations' signs, stored as float16 then.  ranks: train so many first columns of L and rows of R,
    stored as ``factor_dtype``; 0 for none.
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
    whatever ``ranks``; orthogonal factors and absent rotations have no signs.
    """
    free: dict[str, Any] = {}
    if signs:
        sides = layer.sides(jnp.float32)
        free = {name: side.astype(jnp.float32) for name, side in zip(("left_side", "right_side"), sides, strict=True)
                if not isinstance(side, tuple)}
    own = 0 if layer.trained is None else len(layer.trained[0])
    if count := max(own, min(ranks, layer.rank)):
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


def _from(part: Packed | None, row: int) -> Packed | None:
    """The rows from this one on."""
    if part is None or row == len(part.codes):
        return None
    return Packed(part.codes[row:], part.scale if len(part.scale) == 1 else part.scale[row:])


def join(block: Mapping[str, Any], free: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The block with what is trained in its place."""
    return {**block, **{name: dataclasses.replace(block[name], **fields) for name, fields in free.items()}}


def stored(free: Free, factor_dtype: str) -> Free:
    """What is trained as it is stored: signs in float16, factors in ``factor_dtype``, a classifier in float32."""
    to = {"left_side": jnp.float16, "right_side": jnp.float16, "trained": jnp.dtype(factor_dtype)}

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
def _fit(config, block, free, x, target, counted):
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
    p, q = (jax.nn.log_softmax(logits / temperature) for logits in (teacher, student))
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=-1))


def _head_loss(config, train, lanes, last, classifier, x, batch):
    """Mean loss over the windows, ``lanes`` of them at a time (one a device): logits of more never exist."""
    def of_window(x, batch):
        if train.goal == "labels":
            stream = llama.rms_norm(x[None], last["norm"], config.norm_eps)[0, batch.lengths - 1]
            return -jax.nn.log_softmax(classifier.astype(x.dtype) @ stream)[batch.labels]
        logits = llama.head(config, last, x[None])[0]
        if train.goal == "distill":
            return soft_loss(llama.head(config, last, batch.teacher[None])[0], logits, train.temperature)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits[:-1]), batch.tokens[1:, None], axis=-1))

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
        for block, own in zip(self.blocks, free["blocks"], strict=True):
            found.append(calibration.forward(self.config, join(block, own), found[-1]))
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
        for block, own in reversed(list(zip(self.blocks, free["blocks"], strict=True))):
            of_block, pulled = _pull(self.config, block, own, entering.pop(), pulled)
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
    names = {name for block in free for fields in block.values() for name in fields}
    if train.signs and not names & {"left_side", "right_side"}:
        raise ValueError("signs are to be trained, and no layer has any: the model was compressed without Hadamard "
                         "rotation: train ranks alone, without signs")
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


# ---- the optimizer


def schedule(train: TrainConfig, steps: int) -> optax.Schedule:
    """Share of the rate at each step: up to 1 over the warm-up, then to 0 (linear, cosine) or level."""
    warm = min(round(train.warmup * steps), max(steps - 1, 0))
    rest = max(steps - warm, 1)
    after = {"linear": optax.linear_schedule(1.0, 0.0, rest), "cosine": optax.cosine_decay_schedule(1.0, rest),
             "constant": optax.constant_schedule(1.0)}[train.schedule]
    return optax.join_schedules([optax.linear_schedule(1 / (warm + 1), 1.0, warm), after], [warm]) if warm else after


@cache  # jit knows it again
def optimizer(train: TrainConfig, steps: int) -> optax.GradientTransformation:
    """AdamW on clipped gradients, signs at ``sign_rate``, factors and classifier at ``factor_rate``; weight decay on
    the latter alone: a sign that decays to 0 would take its channel with it."""
    def is_sign(path):
        return any(getattr(key, "key", None) in ("left_side", "right_side") for key in path)

    by_path = lambda function: partial(jax.tree_util.tree_map_with_path, function)
    rate = by_path(lambda path, u: (train.sign_rate if is_sign(path) else train.factor_rate) * u)
    return optax.chain(
        optax.clip_by_global_norm(train.clip), optax.scale_by_adam(),
        optax.add_decayed_weights(train.weight_decay, mask=by_path(lambda path, _: not is_sign(path))),
        optax.scale_by_learning_rate(schedule(train, steps)), optax.stateless(lambda updates, _: rate(updates)))


# ---- training


class State(NamedTuple):
    """Where a training is; arrays alone, so that orbax keeps it.  NaN: not there yet."""

    step: int | Array
    free: Free
    moments: Any  # the optimizer's
    best: Free  # of least validation loss
    losses: Float[np.ndarray, " steps"]  # nats a token, or a window's class
    validation: Float[np.ndarray, " points"]  # at the start, after ``reconstruct`` if any, and after every ``validate``
    fits: Float[np.ndarray, "blocks 2"]  # relative squared error of each block before and after its reconstruction


class Keeper:
    """The last state of a training, on disk."""

    def __init__(self, folder: Path | None):
        self.manager = None if folder is None else ocp.CheckpointManager(
            folder.absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False))

    def save(self, number: int, state: State) -> None:
        """Keep it in place of the one before, which stays until this one is whole."""
        if self.manager is not None:
            try:
                self.manager.save(number, args=ocp.args.StandardSave(_leaves(state)))
            except ValueError as error:  # of tensorstore
                if "RESOURCE_EXHAUSTED" in str(error) or "No space left" in str(error):
                    raise OSError(errno.ENOSPC, "No space left on device for the state of the training") from None
                raise

    def restore(self, state: State) -> State:
        """The state that was kept, of the structure and on the devices of this one; this one where there is none."""
        if self.manager is None or self.manager.latest_step() is None:
            return state
        found = self.manager.restore(self.manager.latest_step(), args=ocp.args.StandardRestore(_leaves(state)))
        leaves, structure = jax.tree.flatten(state)
        placed = [leaf if leaf.size == 0 else jax.device_put(found[str(i)], leaf.sharding) if isinstance(leaf, Array)
                  else np.array(found[str(i)]) for i, leaf in enumerate(leaves)]
        return jax.tree.unflatten(structure, placed)


def _leaves(state: State) -> dict[str, np.ndarray]:
    """By number, as orbax takes them: none is empty."""
    return {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state)) if leaf.size}


@partial(jax.jit, static_argnums=0)
@jax.numpy_dtype_promotion("standard")  # optax divides integers by floats
def _update(chosen, free, moments, gradient):
    updates, moments = chosen.update(gradient, moments, free)
    return optax.apply_updates(free, updates), moments


def batches(train: TrainConfig, windows: int, epoch: int) -> list[Int[np.ndarray, " batch"]]:
    """The windows of each step of an epoch, in an order drawn anew; those that fill no batch are left out."""
    order = np.random.default_rng([train.seed, epoch]).permutation(windows)
    return list(order[:windows // train.batch * train.batch].reshape(-1, train.batch))


def fit(model: Student, free: Free, data: Batch, aside: Batch, folder: Path | None = None,
        dense: Sequence[Mapping[str, Any]] = ()) -> State:
    """Train on ``data``, and keep the parameters of least loss on ``aside``, as they are stored.

    folder: to keep the state in, and to go on from it: a training that was cut off ends with the same numbers.
    dense: the teacher's blocks, for ``reconstruct``.
    Memory: the packed model, the streams that enter every block for one part of a batch, what a block's gradient needs,
    one window's logits on each device; what is trained, its best, AdamW's two moments.
    Raises ValueError for fewer windows than a batch, or a loss that is not finite.
    """
    train, count = model.train, len(data.tokens)
    enough(train, count)
    per_epoch = count // train.batch
    steps, begun = train.epochs * per_epoch, 1 + bool(train.reconstruct)
    points = begun + -(-steps // train.validate)
    chosen = optimizer(train, steps)
    empty = lambda *shape: np.full(shape, np.nan)
    keeper = Keeper(folder)
    state = keeper.restore(State(np.asarray(-1), free, chosen.init(free), free, empty(steps), empty(points),
                                 empty(len(model.blocks), 2)))
    if np.isnan(state.validation[0]):
        state.validation[0] = _validate(model, state.free, aside)
    if int(state.step) < 0:
        if train.reconstruct:
            state = _validated(_reconstruct(model, state, data, dense, keeper), model, aside, 1)
        state = state._replace(step=np.asarray(0))
    with tqdm(total=steps, initial=int(state.step), unit="step", desc="train", disable=not steps) as progress:
        for step in range(int(state.step), steps):
            epoch, i = divmod(step, per_epoch)
            loss, gradient = _mean_gradient(model, state.free, data[batches(train, count, epoch)[i]])
            if not np.isfinite(loss):
                raise ValueError(f"step {step}: the loss is {loss}: lower the rates, or the model overflows")
            new, moments = _update(chosen, state.free, state.moments, gradient)
            state.losses[step] = loss
            state = state._replace(step=np.asarray(step + 1), free=new, moments=moments)
            progress.set_postfix_str(f"loss {loss:.4f}")
            progress.update()
            if (step + 1) % train.validate == 0 or step + 1 == steps:
                state = _validated(state, model, aside, begun - 1 - (-(step + 1) // train.validate))
                keeper.save(len(model.blocks) + step + 1, state)
    return state


def enough(train: TrainConfig, windows: int) -> None:
    """Raise ValueError where the windows to train on do not fill a batch."""
    if windows < train.batch:
        raise ValueError(f"{windows} windows to train on, and a batch takes {train.batch}: give more text or shorter "
                         "windows, or put fewer aside")


def _validated(state: State, model: Student, aside: Batch, point: int) -> State:
    """The state with this point of the validation, and with its parameters as the best if they are."""
    state.validation[point] = _validate(model, state.free, aside)
    return state._replace(best=state.free) if state.validation[point] < np.min(state.validation[:point]) else state


def _mean_gradient(model, free, batch) -> tuple[float, Free]:
    """Of a batch, a part at a time."""
    parts = np.split(np.arange(len(batch.tokens)), model.train.accumulate)
    loss, gradient = model.gradient(free, model.place(batch[parts[0]]))
    for rows in parts[1:]:
        loss, gradient = jax.tree.map(jnp.add, (loss, gradient), model.gradient(free, model.place(batch[rows])))
    return float(loss) / len(parts), jax.tree.map(lambda a: a / len(parts), gradient)


def _validate(model, free, aside) -> float:
    """Mean loss of the windows with what is trained as it is stored; one that is left over is on every device."""
    as_stored, share, count = stored(free, model.train.factor_dtype), model.mesh.size, len(aside.tokens)
    whole = count // share * share
    rows = [*(range(i, i + share) for i in range(0, whole, share)), *([i] * share for i in range(whole, count))]
    losses = [float(model.loss(as_stored, model.place(aside[np.array(row)]))) for row in rows]
    return float(np.average(losses, weights=[len(set(row)) for row in rows]))


def accuracy(model: Student, free: Free, batch: Batch) -> float:
    """The share of the windows whose class is the likeliest, with what is trained as it is stored."""
    as_stored, right = stored(free, model.train.factor_dtype), 0
    for i, (label, length) in enumerate(zip(batch.labels, batch.lengths, strict=True)):
        x = model.streams(as_stored, batch[np.array([i])])[-1][:, length - 1:length]
        logits = free["classifier"] @ llama.rms_norm(x, model.last["norm"], model.config.norm_eps)[0, 0]
        right += int(jnp.argmax(logits)) == label
    return right / len(batch.tokens)


def _reconstruct(model: Student, state: State, data: Batch, dense, keeper: Keeper) -> State:
    """Each block's output to that of the dense one behind the dense ones before it, for what enters it here."""
    share = model.train.batch // model.train.accumulate
    each = lambda function, x: np.concatenate([np.asarray(function(jnp.asarray(x[i:i + share])))
                                               for i in range(0, len(x), share)])
    entering = target = np.asarray(llama.embed(model.config, model.last, data.tokens))
    lengths = data.lengths if data.lengths is not None else np.full(len(data.tokens), data.tokens.shape[1])
    counted = np.arange(data.tokens.shape[1]) < lengths[:, None]  # not what fills up a labelled line
    done = int(np.isfinite(state.fits[:, 1]).sum())
    for index, block in enumerate(tqdm(model.blocks, "reconstruct", unit="block")):
        own = state.free["blocks"][index]
        target = each(partial(calibration.forward, model.config, jax.device_put(dict(dense[index]))), target)
        if index >= done:
            own, state.fits[index] = _fit_block(model, block, own, Entering(entering, target, counted))
            free = state.free["blocks"][:index] + [own] + state.free["blocks"][index + 1:]
            state = state._replace(free={**state.free, "blocks": free})
            keeper.save(index + 1, state)
        entering = each(partial(calibration.forward, model.config, join(block, own)), entering)
    return state


def _fit_block(model: Student, block, free, data: Entering) -> tuple[dict[str, Any], tuple[float, float]]:
    """What is trained of one block, and its relative squared error before and after; as it was if that is no less."""
    train, old = model.train, free
    epochs = [batches(train, len(data.x), epoch) for epoch in range(train.reconstruct)]
    chosen = optimizer(train, sum(map(len, epochs)))
    square = lambda rows: max(float(np.sum(data.target[rows][data.counted[rows]] ** 2)), np.finfo(np.float32).tiny)

    def fitted(free, rows):
        parts = [model.place(Entering(*(part[own] for part in data))) for own in np.split(rows, train.accumulate)]
        found = [_fit(model.config, block, free, *part) for part in parts]
        return jax.tree.map(lambda *a: sum(a) / square(rows), *found)

    error = lambda free: float(np.mean([fitted(free, rows)[0] for rows in epochs[0]]))
    before, moments = error(free), chosen.init(free)
    for rows in (rows for epoch in epochs for rows in epoch):
        _, gradient = fitted(free, rows)
        free, moments = _update(chosen, free, moments, gradient)
    after = error(free)
    return (free, (before, after)) if after < before else (old, (before, before))


# ---- a run


@dataclass(frozen=True)
class FinetuneConfig:
    """A training of a compressed model on a text.

    source: its directory.  text: windows of a built-in text, a file or a directory, of which the last ``aside`` are for
    validation; where it is the text that the model is evaluated on, from the part that is not.  With goal "labels" a
    file of JSON lines {"text": …, "label": …}, of which all are taken that fit the window.
    """

    source: str
    train: TrainConfig = TrainConfig()
    text: Tokens = Tokens(windows=256)
    aside: int = 64

    def __post_init__(self):
        if not 0 < self.aside or (self.train.goal != "labels" and self.aside >= self.text.windows):
            raise ValueError(f"{self.aside} of {self.text.windows} windows for validation: at least 1, and fewer than "
                             "all")


def finetune(config: FinetuneConfig, out: Path) -> dict[str, Any]:
    """Train a compressed model, write it to ``out`` as a compressed model of its own, evaluate it, write the report.

    Killed and started again with the same arguments it goes on from the last validation, to the same bytes.
    The report is the source's, with what has changed, and ``finetune``.
    Raises ValueError for bad input: a directory that holds no compressed model, a base model that is not its own, text
    that is too short, another run's ``out``.
    """
    source, train = Path(config.source), config.train
    if out.resolve() == source.resolve():
        raise ValueError(f"{out} is the model that is to be trained, and stays as it is: choose another --out")
    before, model = artifact.read_manifest(source)["run"], artifact.load(source)
    base = artifact.base(source) if train.goal == "distill" or train.reconstruct else None
    batch, classes = read(config, model, before["config"])
    learner, free = student(model.config, weights.whole(model.params), train, len(classes))
    own = {"config": report.plain(config), "source_sha256": files.sha256(source / artifact.MANIFEST),
           "data_sha256": [files.sha256(part) for part in batch if part is not None]}
    run = Run(out, before | {"finetune": [*before.get("finetune", []), own]})
    if (done := run.report()) is not None:
        return done
    origin, clock = report.provenance(config, train.seed), report.Clock(run.recall("clock"))
    if not run.complete():
        if train.goal == "distill":
            with clock.stage("teacher"):
                batch = batch._replace(teacher=_kept(run, "teacher", lambda: last_streams(base, batch.tokens)))
        with clock.stage("train"):
            edge = len(batch.tokens) - config.aside
            dense = base.params["blocks"] if train.reconstruct else ()
            state = fit(learner, free, batch[:edge], batch[edge:], run.work / "state", dense)
        run.remember("clock", clock.stages)
        run.remember("training", {
            "steps": len(state.losses), "trained": sum(leaf.size for leaf in jax.tree.leaves(state.free)),
            "losses": state.losses.tolist(), "validation": state.validation.tolist(),
            "fits": state.fits.tolist() if train.reconstruct else [], "classes": classes,
            **({"accuracy": accuracy(learner, state.best, batch[edge:])} if classes else {})})
        _write(run, model, learner, state)
    with clock.stage("evaluate"):
        trained, tokens = artifact.load(out), held_out(model, before["config"])
        value = evaluate.perplexity(trained.config, trained.params, tokens, title="perplexity")
    return run.finish(partial(_summary, config, origin, clock, run, source, value, trained))


def read(config: FinetuneConfig, model: Model, run: dict[str, Any]) -> tuple[Batch, list[str]]:
    """Windows to train on and, after them, to validate on; and the names of the classes."""
    text = config.text
    if text.window > model.config.context:
        raise ValueError(f"windows of {text.window} tokens exceed the model's context {model.config.context}: shorten "
                         "them")
    if config.train.goal == "labels":
        batch, classes = labelled(model, Path(text.text), text.window)
        if len(batch.tokens) <= config.aside:
            raise ValueError(f"{text.text}: {len(batch.tokens)} lines, and the last {config.aside} are for validation: "
                             "give more, or put fewer aside")
        enough(config.train, len(batch.tokens) - config.aside)
        return batch, classes
    enough(config.train, text.windows - config.aside)
    if text.window < 2:
        raise ValueError("windows of 1 token: the next one is to be learned: give 2 or more")
    theirs = run["evaluation"]["text"]
    if data.same_text(text.text, theirs) and not data.same_text(theirs, run["calibration"]["text"]):
        raise ValueError(f"the model is evaluated on all of {theirs}, as it was calibrated on another text: train on "
                         "another one")
    return Batch(data.windows_beside(model.tokenizer, text, run["evaluation"]["text"], "calibration")), []


def labelled(model: Model, path: Path, window: int) -> tuple[Batch, list[str]]:
    """The lines {"text": …, "label": …} of a file: their tokens, padded with zeros, and the number of their class.

    Raises ValueError for a line that is not of this kind, or longer than the window, and for fewer than two classes.
    """
    try:
        lines = path.read_text("utf-8").split("\n")  # not splitlines: JSON's strings may hold other ends of lines
        rows = {i + 1: json.loads(line) for i, line in enumerate(lines) if line.strip()}
        texts, labels = [str(row["text"]) for row in rows.values()], [str(row["label"]) for row in rows.values()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: not a file of JSON lines {{"text": …, "label": …}} ({error})') from error
    tokens, classes = [tokenizer.encode(model.tokenizer, text) for text in texts], sorted(set(labels))
    if len(classes) < 2:
        raise ValueError(f"{path}: {len(classes)} classes; two at least are needed")
    if bad := [(i, len(ids)) for i, ids in zip(rows, tokens, strict=True) if not 0 < len(ids) <= window]:
        raise ValueError(f"{path}: line {bad[0][0]} has {bad[0][1]} tokens, and a window holds 1 to {window}: widen "
                         "it, or shorten the line")
    padded = np.stack([np.pad(ids, (0, window - len(ids))) for ids in tokens])
    return Batch(padded, None, np.array([classes.index(label) for label in labels]), np.array(list(map(len, tokens)))
                 ), classes


def last_streams(model: Model, tokens: Int[np.ndarray, "w s"]) -> Float[np.ndarray, "w s d"]:
    """What leaves the last block, a block in memory at a time."""
    streams = calibration.embed(model.params, tokens)
    for block in tqdm(model.params["blocks"], "teacher", unit="block", leave=False):
        calibration.run_block(model.config, block, streams)
    return np.concatenate([shard for device in streams for shard in device])  # of one process: in order


def held_out(model: Model, run: dict[str, Any]) -> Int[np.ndarray, "w s"]:
    """The windows that the run was evaluated on."""
    theirs = Tokens(**{name: run["evaluation"][name] for name in ("text", "windows", "window")})
    return data.windows_beside(model.tokenizer, theirs, run["calibration"]["text"], "evaluation")


def _kept(run: Run, name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """An array of the run's unfinished work, made once."""
    path = run.work / f"{name}.safetensors"
    if not files.whole(path):
        files.write_arrays(path, {name: make()})
    return files.read_arrays(path)[name]


def _write(run: Run, model: Model, learner: Student, state: State) -> None:
    """The artifact, with the best parameters as they are stored."""
    best, paths = stored(state.best, learner.train.factor_dtype), []
    for index, (block, free) in enumerate(zip(learner.blocks, best["blocks"], strict=True)):
        for name, layer in join(block, free).items():
            if isinstance(layer, CompressedLinear):
                paths.append(f"blocks.{index}.{name}")
                run.keep_layer(paths[-1], layer, {"bits": layer.stored_bits,
                                                  "bits_per_weight": layer.stored_bits / math.prod(layer.shape)})
        if any(path.startswith(f"blocks.{index}.") for path in paths):
            model.params["blocks"][index] = run.block(index, model.params["blocks"][index])
    if "classifier" in best:
        model.params["classifier"] = np.asarray(best["classifier"])
    run.write(model, paths)


def _summary(config: FinetuneConfig, origin: dict[str, Any], clock: report.Clock, run: Run, source: Path, value: float,
             trained: Model) -> dict[str, Any]:
    """The source's report with what has changed."""
    old = files.read_json(source / "report.json")
    new = {path: run.recall(path) for path in artifact.read_manifest(run.out)["layers"]}
    rows = [row | {key: new[row["path"]][key] for key in ("bits", "bits_per_weight")} for row in old["layers"]]
    bits = sum(row["bits"] for row in rows)
    own = {**origin, **run.recall("training"), "perplexity_before": old["compressed_perplexity"], "perplexity": value,
           "bits_per_weight_before": old["bits_per_weight"], "seconds": report.seconds(clock.stages),
           "stages": clock.stages}
    return {**old, "compressed_perplexity": value, "bits_per_weight": bits / old["compressed_weights"],
            "stored_bytes": bits // 8, "model_bytes": artifact.model_bytes(trained.params),
            "disk_bytes": sum((run.out / f).stat().st_size for f in artifact.read_manifest(run.out)["files"]),
            "layers": rows, "finetune": [*old.get("finetune", []), own]}
