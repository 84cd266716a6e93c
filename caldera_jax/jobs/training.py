"""AdamW on what ``student`` leaves free: steps, validation, and checkpoints to go on from."""

import errno
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import Array
from jaxtyping import Float, Int
from tqdm import tqdm

from caldera_jax.jobs import calibration
from caldera_jax.jobs.student import Batch, Entering, Free, Student, TrainConfig, fit_block_gradient, join, stored
from caldera_jax.models import llama


def schedule(train: TrainConfig, steps: int) -> optax.Schedule:
    """Share of the rate at each step: up to 1 over the warm-up, then to 0 (linear, cosine) or level."""
    warm = min(round(train.warmup * steps), max(steps - 1, 0))
    rest = max(steps - warm, 1)
    after = {"linear": optax.linear_schedule(1.0, 0.0, rest), "cosine": optax.cosine_decay_schedule(1.0, rest),
             "constant": optax.constant_schedule(1.0)}[train.schedule]
    return optax.join_schedules([optax.linear_schedule(1 / (warm + 1), 1.0, warm), after], [warm]) if warm else after


@cache  # jit knows it again
def optimizer(train: TrainConfig, steps: int) -> optax.GradientTransformation:
    """AdamW on clipped gradients, signs and scales at ``sign_rate``, factors and classifier at ``factor_rate``; weight
    decay on the latter alone: a sign that decays to 0 would take its channel with it."""
    def is_sign(path):
        return any(getattr(key, "key", None) in ("left_side", "right_side", "gain") for key in path)

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
        logits = free["classifier"] @ llama.rms_norm(model.config, model.last["norm"], x)[0, 0]
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
        own, config = state.free["blocks"][index], model.config.at(index)
        target = each(partial(calibration.forward, config, jax.device_put(dict(dense[index]))), target)
        if index >= done:
            one = model._replace(config=config)
            own, state.fits[index] = _fit_block(one, block, own, Entering(entering, target, counted))
            free = state.free["blocks"][:index] + [own] + state.free["blocks"][index + 1:]
            state = state._replace(free={**state.free, "blocks": free})
            keeper.save(index + 1, state)
        entering = each(partial(calibration.forward, config, join(block, own)), entering)
    return state


def _fit_block(model: Student, block, free, data: Entering) -> tuple[dict[str, Any], tuple[float, float]]:
    """What is trained of one block, and its relative squared error before and after; as it was if that is no less."""
    train, old = model.train, free
    epochs = [batches(train, len(data.x), epoch) for epoch in range(train.reconstruct)]
    chosen = optimizer(train, sum(map(len, epochs)))
    square = lambda rows: max(float(np.sum(data.target[rows][data.counted[rows]] ** 2)), np.finfo(np.float32).tiny)

    def fitted(free, rows):
        parts = [model.place(Entering(*(part[own] for part in data))) for own in np.split(rows, train.accumulate)]
        found = [fit_block_gradient(model.config, block, free, *part) for part in parts]
        return jax.tree.map(lambda *a: sum(a) / square(rows), *found)

    error = lambda free: float(np.mean([fitted(free, rows)[0] for rows in epochs[0]]))
    before, moments = error(free), chosen.init(free)
    for rows in (rows for epoch in epochs for rows in epoch):
        _, gradient = fitted(free, rows)
        free, moments = _update(chosen, free, moments, gradient)
    after = error(free)
    return (free, (before, after)) if after < before else (old, (before, before))
