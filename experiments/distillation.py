"""Distillation after compression: the same steps on the same tokens, given to one method of each family.

Each student starts at about 3 bits a weight.  Trained are the numbers that a method stores as numbers, 8 bits each,
while codes and masks stay: the factors of low rank and of Q + L R, the values that pruning kept, the weights that
blocks share; afterwards they are rounded to 8 bits again.  Where there are none (quantization, k-means) a scale for
every output and every input is trained instead, and its 16 bits each are counted.  The dense model is the teacher.  How
many numbers are trained differs between students, and is in the verdict.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import baselines
import frontier
import grids
import jax
import jax.numpy as jnp
import machinery
import numpy as np
import optax
import sharing
from baselines import Layer
from drawing import axes
from jax import Array
from machinery import Experiment, Result, decide, with_interval

from caldera_jax import CalderaConfig, compress_matrix
from caldera_jax.jobs import evaluate
from caldera_jax.jobs.student import soft_loss
from caldera_jax.models import llama

# method, settings, what is trained
STUDENTS = {
    "quantization": ("e8p", (("bits", 3),), "scales"),
    "low rank": ("svd_data", (("bits", 3.0), ("factor_bits", 8)), "factors"),
    "both": ("caldera", (("rank", 12), ("factor_bits", 8)), "factors beside Q"),
    "pruning": ("sparsegpt", (("kept", 0.25), ("value_bits", 8)), "values"),
    "sharing": ("share_blocks", (("group", 3), ("value_bits", 8)), "shared values"),
    "sharing, k-means": ("kmeans_shared", (("bits", 3),), "scales"),
}


@dataclass(frozen=True)
class Config:
    """One student.  Of ``rates`` the one of least validation loss is kept by the verdict; each is a run."""

    model: str
    student: str
    rate: float
    steps: int
    batch: int
    window: int
    temperature: float
    windows: int  # of calibration
    seed: int


def runs(preset: str) -> list[Config]:
    """Every student at three learning rates; seeds innermost."""
    if preset == "smoke":
        return [Config("tiny-smoke", name, 1e-2, 4, 2, 32, 2.0, 4, 0) for name in ("low rank", "pruning")]
    return [Config("tiny", name, rate, 100, 4, 256, 2.0, 32, seed)
            for name in STUDENTS for rate in (3e-4, 1e-3, 3e-3) for seed in range(3)]


def parts(config: Config) -> tuple[list[dict[str, dict[str, Array]]], list[dict[str, dict[str, Array]]], float]:
    """What is trained and what is frozen of each linear layer, by block, and the bits a weight of both."""
    method, settings, trained = STUDENTS[config.student]
    model = machinery.model(config.model)
    data_of = (config.model, config.windows, config.window)
    free, frozen, bits = [], [], 0
    if method == "share_blocks":
        params, bits = sharing.share_blocks(model.config, model.params, **dict(settings))
        owners = params["blocks"][::dict(settings)["group"]]
        free = [{name: {"w": jnp.asarray(block[name], jnp.float32)} for name in llama.LINEARS} for block in owners]
        return free, [{name: {} for name in llama.LINEARS}] * model.config.layers, _per_weight(model, bits)
    folder = frontier.statistics(*data_of, config.seed, "calibration")
    for index in range(model.config.layers):
        hessians = frontier.hessians(folder, index)
        free.append({})
        frozen.append({})
        for i, name in enumerate(llama.LINEARS):
            key = jax.random.fold_in(jax.random.key(config.seed), index * len(llama.LINEARS) + i)
            w = np.asarray(model.params["blocks"][index][name], np.float32)
            free[-1][name], frozen[-1][name], stored = _layer(method, dict(settings), trained, key, w, hessians[name])
            bits += stored
    return free, frozen, _per_weight(model, bits)


def _per_weight(model, bits):
    return bits / (model.config.layers * llama.block_weights(model.config))


def _layer(method, settings, trained, key, w, h) -> tuple[dict[str, Array], dict[str, Array], int]:
    """(trained, frozen, stored bits) of one layer."""
    m, n = w.shape
    if trained == "factors beside Q":
        layer, _ = compress_matrix(key, w, h, CalderaConfig(svd="randomized", **settings))
        alone = layer.__class__(layer.q, None, None, layer.left_side, layer.right_side, layer.shape, layer.grids)
        left, right = _factors(layer.dense() - alone.dense(), layer.rank)
        return {"left": left, "right": right}, {"q": alone.dense()}, layer.stored_bits
    found = baselines.replace(method, key, Layer(w, h), methods=frontier.METHODS, **settings)
    if trained == "factors":
        left, right = _factors(found.weight, np.linalg.matrix_rank(np.asarray(found.weight, np.float64), tol=1e-6))
        return {"left": left, "right": right}, {}, found.bits
    if trained == "values":
        return {"w": found.weight}, {"mask": found.weight != 0}, found.bits
    scales = {"out": jnp.ones(m, jnp.float32), "in": jnp.ones(n, jnp.float32)}
    return scales, {"w": found.weight}, found.bits + 16 * (m + n)


def _factors(a: Array, rank: int) -> tuple[Array, Array]:
    """Balanced L [m, k], R [k, n] of a matrix of that rank."""
    u, s, v = np.linalg.svd(np.asarray(a, np.float64), full_matrices=False)
    root = np.sqrt(s[:rank])
    return jnp.asarray(u[:, :rank] * root, jnp.float32), jnp.asarray(v[:rank] * root[:, None], jnp.float32)


def dense(free: dict[str, Array], frozen: dict[str, Array]) -> Array:
    """The weight [m, n] of what is trained and what is not."""
    if "left" in free:
        return free["left"] @ free["right"] + frozen.get("q", 0.0)
    if "out" in free:
        return free["out"][:, None] * frozen["w"] * free["in"][None]
    return jnp.where(frozen["mask"], free["w"], 0.0) if frozen else free["w"]


def assembled(params: llama.Params, free, frozen) -> llama.Params:
    """The student: a block of ``free`` may serve several neighbours of ``frozen``."""
    group = -(-len(frozen) // len(free))
    blocks = [dict(block) | {name: dense(free[i // group][name], frozen[i][name]) for name in llama.LINEARS}
              for i, block in enumerate(params["blocks"])]
    return params | {"blocks": blocks}


@partial(jax.jit, static_argnums=(0, 1))
@jax.default_matmul_precision("highest")
def _step(config, optimizer, params, free, frozen, state, tokens, temperature):
    """One step of AdamW on the soft loss, and that loss."""
    teacher = llama.forward(config, params, tokens)

    def loss(free):
        return soft_loss(teacher, llama.forward(config, assembled(params, free, frozen), tokens), temperature)

    value, gradient = jax.value_and_grad(loss)(free)
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        updates, state = optimizer.update(gradient, state, free)
    return optax.apply_updates(free, updates), state, value


@partial(jax.jit, static_argnums=0)
@jax.default_matmul_precision("highest")
def _loss(config, params, student, tokens, temperature):
    return soft_loss(llama.forward(config, params, tokens), llama.forward(config, student, tokens), temperature)


@cache
def optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW on clipped gradients, a tenth of the steps of warm-up and then a cosine to zero."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))


@cache
def dense_params(name: str) -> llama.Params:
    """The teacher's weights on the device."""
    params = machinery.model(name).params
    return jax.tree.map(jnp.asarray, params | {"blocks": [dict(block) for block in params["blocks"]]})


def measure(config: Config) -> Result:
    """Perplexity on held-out text before and after, the losses of training, and that on 16 windows aside."""
    model, params = machinery.model(config.model), dense_params(config.model)
    free, frozen, bits = parts(config)
    count, seen = config.steps * config.batch, 3 * config.windows  # what calibrates any seed is not trained on
    tokens = frontier.tokens(config.model, seen + 16 + count, config.window, 0, "calibration")[seen:]
    aside, order = tokens[:16], np.random.default_rng(config.seed).permutation(count) + 16
    tested = frontier.tokens(config.model, config.windows, config.window, 0, "evaluation")[:32]
    perplexity: Callable[[Any], float] = lambda free: evaluate.perplexity(
        model.config, assembled(params, _stored(free), frozen), tested)
    before, chosen = perplexity(free), optimizer(config.rate, config.steps)
    state, losses = chosen.init(free), []
    for step in range(config.steps):
        batch = tokens[order[step * config.batch:(step + 1) * config.batch]]
        free, state, loss = _step(model.config, chosen, params, free, frozen, state, batch, config.temperature)
        losses.append(float(f"{float(loss):.5g}"))
    validation = _loss(model.config, params, assembled(params, _stored(free), frozen), aside, config.temperature)
    return {"family": config.student, "method": STUDENTS[config.student][0], "bits": bits,
            "base_perplexity": float(np.exp(frontier.dense_losses(config.model, config.windows, config.window).mean())),
            "before": before,
            "trained": sum(leaf.size for leaf in jax.tree.leaves(free)), "perplexity": perplexity(free),
            "validation": float(validation), "trace": losses}


def _stored(free):
    """As they are stored: scales as float16, anything else as 8 bits and a float16 scale for each row of W, Lᵀ or R."""
    def eight(a):
        step = grids.half(jnp.max(jnp.abs(a), axis=1, keepdims=True) / 127)
        return step * jnp.clip(jnp.round(a / jnp.where(step > 0, step, 1)), -127, 127)

    store = {"out": grids.half, "in": grids.half, "left": lambda a: eight(a.T).T, "right": eight, "w": eight}
    return [{name: {part: store[part](a) for part, a in of.items()} for name, of in block.items()} for block in free]


def chosen(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Of each student and seed the run of the rate with least validation loss."""
    best: dict[tuple[str, int], Result] = {}
    for r in results:
        key = r["family"], r["seed"]
        best[key] = min(best.get(key, r), r, key=lambda x: x["validation"])
    found: dict[str, list[Result]] = {}
    for (family, _), r in best.items():
        found.setdefault(family, []).append(r)
    return found


def recovered(r: Result) -> float:
    """The share of the lost log perplexity that training gave back."""
    lost, kept = (np.log(r[key] / r["base_perplexity"]) for key in ("before", "perplexity"))
    return float(1 - kept / lost)


def verdict(results: Sequence[Result]) -> str:
    """What each family's student gains, and how much of its loss that is."""
    lines = []
    for family, rows in chosen(results).items():
        ratio = [r["perplexity"] / r["before"] for r in rows]
        rates = sorted({r["config"]["rate"] for r in rows})
        lines.append(f"{family} ({rows[0]['method'].replace('_', ' ')}, {rows[0]['bits']:.2f} bits, "
                     f"{rows[0]['trained']} numbers trained): "
                     f"{np.mean([r['before'] for r in rows]):.2f} to {np.mean([r['perplexity'] for r in rows]):.2f}, "
                     f"{decide(ratio)} ({with_interval(ratio)}), {np.mean([recovered(r) for r in rows]):.0%} of the "
                     f"lost log perplexity; rate {', '.join(f'{rate:g}' for rate in rates)}")
    c = results[0]["config"]
    return (f"{c['steps']} steps of {c['batch']} windows of {c['window']} tokens, temperature {c['temperature']:g}, "
            f"dense {results[0]['base_perplexity']:.2f}: " + ";\n  ".join(lines) + ".")


def draw(results: Sequence[Result]):
    """Perplexity before and after against bits; and the losses of training."""
    figure, (first, second) = axes(2, height=3.2)
    for i, (family, rows) in enumerate(chosen(results).items()):
        bits = rows[0]["bits"]
        before, after = (np.mean([r[key] for r in rows]) for key in ("before", "perplexity"))
        first.annotate("", (bits, after), (bits, before), arrowprops={"arrowstyle": "->", "color": f"C{i}"})
        first.plot(bits, before, f"C{i}o", fillstyle="none")
        first.plot(bits, after, f"C{i}o", label=family)
        second.semilogy(np.arange(1, len(rows[0]["trace"]) + 1), np.mean([r["trace"] for r in rows], axis=0), f"C{i}")
    first.axhline(results[0]["base_perplexity"], color="0.5", linestyle="--", label="dense")
    first.set(xlabel="stored bits per weight", ylabel="perplexity on held-out text", yscale="log",
              title=f"{results[0]['config']['model']}, before (open) and after distillation")
    second.set(xlabel="step", ylabel="soft loss, nats a token", title="training, best rate")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


EXPERIMENT = Experiment("distillation", "the same training on soft targets gives back part of what each family lost",
                        runs, measure, draw, verdict)
