"""Every family of compression on equal terms: perplexity and data-aware error against all stored bits.

One point is one method at one setting on the whole of a model: every linear layer of every block is replaced, nothing
is trained, and all that must be stored to rebuild those weights is counted (``baselines``, ``pruning``, ``sharing``).
The embedding stays dense.  A seed sets the calibration tokens, the same for all methods, and what is random.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import baselines
import jax
import low_rank
import machinery
import numpy as np
import pruning
import sharing
from baselines import Layer
from fronts import draw, verdict
from machinery import Experiment, Result

from caldera_jax import CalderaConfig, LevelConfig, allocate, rate_distortion_error, relative_error
from caldera_jax.allocate import Option
from caldera_jax.jobs import artifact, calibration, compress, evaluate
from caldera_jax.jobs.settings import RunConfig
from caldera_jax.models import data, files, llama

WORK = Path("out/frontier")
METHODS = baselines.METHODS | low_rank.METHODS | pruning.METHODS | sharing.METHODS
FISHER = ("gradient", "lqlora", "kmeans")  # methods that look at the gradients
WHOLE = {"drop_blocks": "pruning", "share_blocks": "sharing", "level": "one level"}  # methods of a whole model
PREDICTED = [Option(0, 2), Option(0, 3), Option(0, 4), *(Option(rank, 2) for rank in (8, 16, 32, 64))]
LIMIT_BITS = tuple(np.arange(1, 8.5, 0.5).tolist())


@dataclass(frozen=True)
class Config:
    """A point; ``method`` "limit" is the rate–distortion limit of the model's layers instead, "theory" what theory
    predicts of L R beside Q, "embedding" a factorised embedding, whose bits are of other weights."""

    model: str
    method: str
    settings: tuple[tuple[str, Any], ...]
    windows: int
    window: int
    seed: int


def point(method: str, **settings) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """A method and its settings, as a Config holds them."""
    return method, tuple(settings.items())


def points(preset: str) -> list[tuple[str, tuple[tuple[str, Any], ...]]]:
    """Every method and setting of a preset; "some" are those chosen along the front for the larger model."""
    each = lambda method, key, values, **fixed: [point(method, **{key: value}, **fixed) for value in values]
    if preset == "smoke":
        return [point("limit"), point("theory"), point("rtn", bits=4), point("svd_data", bits=8.0),
                point("qera", rank=2), point("wanda", kept=0.5), point("kmeans_shared", bits=2),
                point("drop_blocks", count=1), point("level", bits=4.0)]
    if preset == "some":  # the weights are a dequantized Q4_1: unrotated scalar grids of 4 bits would mean nothing
        return [point("limit"), *each("e8p", "bits", (2, 3, 4)), point("rtn", bits=8), point("rtn", bits=3, group=64),
                point("gptq", bits=3, group=64), point("gptq_rotated", bits=3), point("ternary"),
                point("svd_data", bits=6.0, factor_bits=4), point("lplr", bits=3.0),
                point("qera", rank=32, bits=3, factor_bits=4),
                *each("caldera", "rank", (16, 32, 64), outer_iterations=5),
                point("caldera", rank=16, q_bits=3, outer_iterations=5),
                point("sparsegpt", kept=0.6, value_bits=4), point("wanda", kept=0.5),
                point("sparsegpt", kept=0.5, pattern="2:4", value_bits=4), point("columns", kept=0.9, value_bits=4),
                point("drop_blocks", count=3, value_bits=4), point("share_blocks", group=2, value_bits=4),
                *each("level", "bits", (1.5, 2.0, 3.0, 4.0))]
    return [
        point("limit"), point("theory"), *each("rtn", "bits", (2, 3, 4, 8)), *each("rtn", "bits", (2, 3, 4), group=64),
        point("rtn", bits=3, clip=False), *each("nf", "bits", (2, 3, 4)), *each("gptq", "bits", (2, 3, 4)),
        *each("gptq", "bits", (2, 3, 4), group=64), *each("gptq_rotated", "bits", (2, 3, 4)),
        *each("e8p", "bits", (2, 3, 4)), *each("binary", "feedback", (False, True)),
        *each("ternary", "feedback", (False, True)), *each("kmeans", "bits", (2, 3, 4)),
        *(p for name in ("svd", "svd_data") for p in (
            *each(name, "bits", (2.0, 4.0, 6.0), factor_bits=4), point(name, bits=6.0))),
        *each("lplr", "bits", (1.0, 2.0, 4.0, 6.0)),
        *(p for name in ("loftq", "lqlora", "lqer", "qera") for p in (
            *each(name, "bits", (2, 3, 4), rank=16, factor_bits=4), point(name, bits=2, rank=32, factor_bits=4))),
        *(p for name in ("e8p_repair", "srr", "odlri") for p in each(name, "rank", (16, 32))),
        *each("caldera", "rank", (8, 16, 32, 64)), *each("caldera", "rank", (8, 32), factor_bits=16),
        point("caldera", rank=32, factor_bits=2), *each("caldera", "rank", (16, 32), q_bits=3),
        point("caldera", rank=32, downdate=True, refine_passes=10),
        point("caldera", rank=32, factor_bits=16, downdate=True),
        *(p for name in ("magnitude", "wanda", "sparsegpt", "gradient") for p in (
            point(name, kept=0.5), *each(name, "kept", (0.4, 0.6, 0.75), value_bits=4),
            point(name, kept=0.75, value_bits=8), *each(name, "value_bits", (4, 16), kept=0.5, pattern="2:4"))),
        *each("columns", "kept", (0.75, 0.9), value_bits=4), point("columns", kept=0.5, value_bits=8),
        point("columns", kept=0.75, refit=False, value_bits=4), point("rows", kept=0.9, value_bits=4),
        *each("drop_blocks", "count", (1, 2), value_bits=4), point("drop_blocks", count=1, value_bits=8),
        *each("kmeans_shared", "bits", (2, 3, 4)), point("kronecker", bits=6.0, value_bits=8),
        *each("share_blocks", "group", (2, 3, 5), value_bits=4), *each("embedding", "rank", (96, 144), value_bits=8),
        *each("level", "bits", (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)),
    ]


def runs(preset: str) -> list[Config]:
    """The points of the tiny model, three seeds where anything depends on them, and some of SmolLM2-135M, one seed."""
    if preset == "smoke":
        return [Config("tiny-smoke", *p, 4, 64, 0) for p in points("smoke")]
    tiny = [Config("tiny", *p, 32, 256, seed) for p in points("full") for seed in range(seeds(p[0]))]
    return tiny + [Config("smollm2-135m", *p, 64, 512, 0) for p in points("some")]


def seeds(method: str) -> int:
    """Three where the calibration tokens or a random number enter the result, else one."""
    found = METHODS.get(method)
    return 3 if method in ("drop_blocks", "level", "theory") or found and (found.data or found.random) else 1


def tokens(name: str, windows: int, window: int, seed: int, part: str) -> np.ndarray:
    """The seed's windows of a half of Wikipedia: for seed 1 those after the ones of seed 0, and so on."""
    documents = data.split(data.load_text("enwiki"))[0 if part == "calibration" else 1]
    return data.token_windows(machinery.model(name).tokenizer, documents, window, (seed + 1) * windows,
                              part)[seed * windows:]


@cache
def statistics(name: str, windows: int, window: int, seed: int, part: str) -> Path:
    """The folder of the Moments of every input; made once, by one process."""
    model = machinery.model(name)
    folder = WORK / machinery.fingerprint(name)[:12] / f"{part}_{windows}_{window}_{seed}"
    with machinery.claimed(folder / "moments", wait=True):
        if not compress.calibrated(folder, model.config, range(model.config.layers)):
            for found in calibration.collect(model.config, model.params, tokens(name, windows, window, seed, part)):
                calibration.spill(folder, *found)
    return folder


@cache
def fishers(name: str, windows: int, window: int, seed: int) -> Path:
    """The folder of the mean squared gradients of every weight; made once, by one process."""
    model = machinery.model(name)
    folder = WORK / machinery.fingerprint(name)[:12] / f"fisher_{windows}_{window}_{seed}"
    with machinery.claimed(folder / "fisher", wait=True):
        if not all(files.whole(folder / f"{index}.safetensors") for index in range(model.config.layers)):
            seen = tokens(name, windows, window, seed, "calibration")
            for index, arrays in calibration.gradients(model.config, model.params, seen, jax.random.key(seed)):
                files.write_arrays(folder / f"{index}.safetensors", {k: np.asarray(v) for k, v in arrays.items()})
    return folder


def hessians(folder: Path, index: int) -> dict[str, np.ndarray]:
    """H of each linear layer of a block, by its name."""
    of = {source: np.asarray(calibration.load_moments(calibration.spilled(folder, index, source))[source].mean())
          for source in set(llama.INPUT_OF.values())}
    return {name: of[llama.INPUT_OF[name]] for name in llama.LINEARS}


def measure(config: Config) -> Result:
    """Perplexity on held-out text, stored bits a weight of the linear layers, and the mean over the layers of the error
    relative to the H of held-out text."""
    data_of = (config.model, config.windows, config.window)
    held_out = statistics(*data_of, 0, "evaluation")
    if config.method == "limit":
        return {"family": "limit", "bits": list(LIMIT_BITS),
                **{sources: limit(config.model, held_out, sources) for sources in ("white", "own")}}
    model = machinery.model(config.model)
    calibrated_on = statistics(*data_of, config.seed, "calibration")
    if config.method == "theory":
        return {"family": "theory", "options": [list(option) for option in PREDICTED],
                "option_bits": option_bits(model.config), "errors": predicted(config, calibrated_on)}
    settings = dict(config.settings)
    if config.method == "embedding":
        params, bits = sharing.factorised_embedding(model.params, **settings)
        return {"family": "embedding", "bits": bits / params["embed"].size, **lost(config, params)}
    if config.method in WHOLE:
        family, errors = WHOLE[config.method], []
        if config.method == "drop_blocks":
            params, bits = pruning.drop_blocks(model.config, model.params, tokens(*data_of, config.seed, "calibration"),
                                               **settings)
        elif config.method == "level":
            params, bits, errors = levelled(config, held_out, **settings)
        else:
            params, bits = sharing.share_blocks(model.config, model.params, **settings)
    else:
        family = METHODS[config.method].family
        replaced = [replaced_block(config, index, calibrated_on, held_out) for index in range(model.config.layers)]
        params = model.params | {"blocks": [block for block, _, _ in replaced]}
        bits = sum(bits for _, bits, _ in replaced)
        errors = [error for _, _, errors in replaced for error in errors]
    weights = model.config.layers * llama.block_weights(model.config)
    return {"family": family, "method": config.method, "bits": bits / weights, **lost(config, params),
            "error": float(np.mean(errors)) if errors else None, "errors": [float(f"{e:.5g}") for e in errors]}


def lost(config: Config, params: llama.Params) -> Result:
    """Perplexity on 32 windows of held-out text and the mean loss of each, nats a token; of the dense model, too."""
    each = losses(config, params)
    dense = dense_losses(config.model, config.windows, config.window)
    return {"perplexity": float(np.exp(each.mean())), "base_perplexity": float(np.exp(dense.mean())),
            "losses": [float(f"{x:.6g}") for x in each], "base_losses": [float(f"{x:.6g}") for x in dense]}


def losses(config: Config, params: llama.Params) -> np.ndarray:
    """Mean loss of each of 32 windows of held-out text, nats a token."""
    tested = tokens(config.model, config.windows, config.window, 0, "evaluation")[:32]
    return evaluate.token_losses(machinery.model(config.model).config, params, tested).astype(np.float64).mean(1)


@cache
def dense_losses(name: str, windows: int, window: int) -> np.ndarray:
    """Those of the dense model."""
    return losses(Config(name, "", (), windows, window, 0), machinery.model(name).params)


def replaced_block(config: Config, index: int, calibrated_on: Path, held_out: Path) -> tuple[dict, int, list[float]]:
    """A block with its linear layers replaced, their bits, and their errors on held-out text."""
    block, bits, errors = dict(machinery.model(config.model).params["blocks"][index]), 0, []
    ours, theirs = hessians(calibrated_on, index), hessians(held_out, index)
    fisher = {}
    if config.method in FISHER:
        fisher = files.read_arrays(fishers(config.model, config.windows, config.window, config.seed)
                                   / f"{index}.safetensors")
    for i, name in enumerate(llama.LINEARS):
        key = jax.random.fold_in(jax.random.key(config.seed), index * len(llama.LINEARS) + i)
        w = np.asarray(block[name])
        layer = Layer(w, ours[name], fisher.get(name))
        found = baselines.replace(config.method, key, layer, methods=METHODS, **dict(config.settings))
        block[name], bits = np.asarray(found.weight), bits + found.bits
        errors.append(float(relative_error(np.float32(w), block[name], theirs[name])))
    return block, bits, errors


def levelled(config: Config, held_out: Path, bits: float) -> tuple[llama.Params, int, list[float]]:
    """All layers at one level, as ``caldera compress`` finds it on the seed's tokens: the model, its bits, and the
    layers' errors on held-out text."""
    model, data_of = machinery.model(config.model), (config.model, config.windows, config.window)
    own = tokens(*data_of, config.seed, "calibration"), tokens(*data_of, 0, "evaluation")[:1]
    asked = RunConfig(machinery.source(config.model), bits=bits, level=LevelConfig(), seed=config.seed)
    with TemporaryDirectory() as folder, patch.object(compress, "texts", lambda *_: own):
        found = compress.compress(asked, out := Path(folder) / "out", WORK / "level")
        blocks = [dict(block) | {name: np.asarray(block[name].dense()) for name in llama.LINEARS}
                  for block in artifact.load(out).params["blocks"]]
    errors = [float(relative_error(np.float32(model.params["blocks"][index][name]), block[name], h))
              for index, block in enumerate(blocks) for name, h in hessians(held_out, index).items()]
    return model.params | {"blocks": blocks}, sum(row["bits"] for row in found["layers"]), errors


def limit(name: str, held_out: Path, sources: str) -> list[float]:
    """Mean over the layers of the rate–distortion reference on the relative error, all at LIMIT_BITS alike."""
    params = machinery.model(name).params
    each = [rate_distortion_error(LIMIT_BITS, np.asarray(params["blocks"][index][layer]), h, sources)
            for index in range(len(params["blocks"])) for layer, h in hessians(held_out, index).items()]
    return np.mean(each, axis=0).tolist()


def predicted(config: Config, folder: Path) -> list[list[float]]:
    """The relative error of every layer with each of PREDICTED, as ``allocate.error_model`` has it."""
    found = []
    for index, block in enumerate(machinery.model(config.model).params["blocks"]):
        for i, (name, h) in enumerate(hessians(folder, index).items()):
            key = jax.random.fold_in(jax.random.key(config.seed), index * len(llama.LINEARS) + i)
            model = allocate.error_model(key, np.float32(block[name]), h, CalderaConfig(), PREDICTED)
            found.append([float(f"{np.sqrt(loss / model.energy):.5g}") for loss in model.loss])
    return found


def option_bits(config: llama.LlamaConfig) -> list[list[float]]:
    """Stored bits a weight of each of PREDICTED, for every kind of layer."""
    return [[allocate.stored_bits(shape, option.of(CalderaConfig())) / (shape[0] * shape[1]) for option in PREDICTED]
            for shape in llama.shapes(config).values()]


EXPERIMENT = Experiment("frontier", "at equal stored bits the families of compression differ, and Q + L R is at the "
                        "front", runs, measure, draw, verdict)
