"""One level for the whole model: the importance of every output, and the level c that a budget pays for.

Each process takes the gradients of its own shards of the windows and measures its own layers; process 0 solves for c.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int
from tqdm import tqdm

from caldera_jax import levels
from caldera_jax.jobs import calibration, spread
from caldera_jax.jobs.calibration import OutputFisher
from caldera_jax.jobs.run import Run
from caldera_jax.levels import Curve, LevelConfig
from caldera_jax.linear import at_level
from caldera_jax.models import files, llama
from caldera_jax.models.convert import Model

AIM, LEAST = 0.9985, 0.995  # of a budget: what is solved for, and what is enough
BLOCKS, ROWS = 4, 64  # blocks that are measured first, and rows of a layer


@dataclass(frozen=True)
class Importance:
    """How g is estimated: from how many of the calibration windows (None: all), and ``objective.importance``."""

    windows: int | None = 16
    floor: float = 0.02
    shrinkage: float = 0.1

    def __post_init__(self):
        if self.windows is not None and self.windows < 1:
            raise ValueError(f"importance_windows must be at least 1, got {self.windows}")
        if not 0 <= self.floor < math.inf or not 0 <= self.shrinkage <= 1:
            raise ValueError("importance needs a floor of at least 0 and a shrinkage from 0 to 1, got "
                             f"{self.floor} and {self.shrinkage}")

    def of(self, tokens: Int[np.ndarray, "w s"]) -> Int[np.ndarray, "v s"]:
        """The windows that g is estimated from: as far apart as there are."""
        count = len(tokens) if self.windows is None else min(self.windows, len(tokens))
        return tokens[np.arange(count) * len(tokens) // count]


def output_fisher(model: Model, tokens: Int[np.ndarray, "w s"], seed: int, run: Run,
                  folder: Path) -> dict[str, OutputFisher]:
    """Of all layers, from all these windows; the shards of them are kept in the folder, and made unless they are there.

    Raises ValueError (naming the layer) where gradients overflow.
    """
    key = jax.random.fold_in(jax.random.key(seed), model.config.layers * len(llama.LINEARS))  # no layer's
    edges = [len(tokens) * i // spread.SHARDS for i in range(spread.SHARDS + 1)]
    paths = [folder / f"fisher_{seed}_{files.sha256(tokens)[:12]}_{i}.safetensors" for i in range(spread.SHARDS)]
    devices = jax.local_device_count()
    own = [[i for i in range(spread.SHARDS) if i * spread.slots() // spread.SHARDS == spread.rank() * devices + device]
           for device in range(devices)]

    def each(numbers):
        for i in tqdm(numbers, "gradients", disable=spread.rank() > 0, leave=False, unit="shard"):
            if not files.whole(paths[i]):
                windows = range(edges[i], edges[i + 1])
                found = calibration.output_fisher(model.config, model.params, tokens, key, windows)
                files.write_arrays(paths[i], {f"{path}.{name}": np.asarray(value) for path, of in found.items()
                                              for name, value in of._asdict().items()})

    folder.mkdir(parents=True, exist_ok=True)
    spread.on_devices(each, own)
    run.wait_for(paths)
    total: dict[str, np.ndarray] = {}
    for path in paths:
        for name, value in files.read_arrays(path).items():
            if not np.isfinite(value).all():
                raise ValueError(f"{name.rsplit('.', 1)[0]}: its gradients hold NaN or infinite values: the model "
                                 "overflows on the calibration text; give another text, or weights of a sane size")
            total[name] = total[name] + value if name in total else value
    layers = {name.rsplit(".", 1)[0] for name in total}
    return {path: OutputFisher(total[f"{path}.rows"], float(total[f"{path}.trace"])) for path in layers}


def measure(config: LevelConfig, run: Run, name: str, path: str, w: Array, h: Array, g: Float[np.ndarray, " m"],
            c: float | None, bits: float) -> None:
    """The Curve of one layer, at c or at about what gives so many bits a weight, kept as ``name`` unless it is there.

    64 rows of a layer stand for all: the classes of widths of all rows are counted, and only how many bits the integers
    of a class take is theirs.
    """
    if run.recall(name) is not None:
        return
    if c is None:
        size = float(jnp.mean(jnp.asarray(g, h.dtype) @ jnp.square(w.astype(h.dtype))) / len(w) * jnp.trace(h) / len(h))
        c = math.sqrt(max(size, 1e-30)) * 2.0**-bits
    some = min(len(w), ROWS)
    rows = np.arange(some) * len(w) // some
    *parts, _ = at_level(w, h, g, c, config, path, rows)
    run.keep(name, levels.measure(parts, c, config.states, rows)._asdict())


def curves(config: LevelConfig, run: Run, bits: float, shapes: Sequence[tuple[int, int]], blocks: int,
           given: Callable[[int, int], Any], importance: Mapping[str, Float[np.ndarray, " m"]],
           layers: Callable[[Sequence[int], Callable[[int, int], None]], None]) -> dict[str, Curve]:
    """Of every layer of the first blocks, measured near the level that gives so many bits a weight.

    Some blocks first, each layer where it would have so many bits alone; then at the level that these curves give; then
    all blocks there.  ``given(block, i)``: key, W and H; ``layers(blocks, work)``: work(block, i) for those that are
    this process's.
    """
    some = range(0, blocks, -(-blocks // BLOCKS))
    c, found = None, {}
    for turn, group in enumerate((some, some, range(blocks))):

        def work(index, i, c=c, turn=turn):
            path = f"blocks.{index}.{llama.LINEARS[i]}"
            _, w, h = given(index, i)
            measure(config, run, f"{path}.curve{turn}", path, w, h, importance[path], c, bits)

        layers(group, work)
        paths = [f"blocks.{index}.{name}" for index in group for name in llama.LINEARS]
        run.wait([f"{path}.curve{turn}" for path in paths])
        found = {path: Curve(**run.recall(f"{path}.curve{turn}")) for path in paths}
        weights = sum(math.prod(shape) for shape in shapes) * len(group)
        c = spread.first(levels.solve(list(found.values()), bits * weights, config.states, weights))
    return found


def next_level(config: LevelConfig, known: Mapping[str, Curve], done: Mapping[str, tuple[float, int]],
               budget: float) -> float:
    """c for the layers that are not done: what is left of the budget, by their curves, as far as those of the others,
    done at (c, with so many bits), have been right."""
    left = [curve for path, curve in known.items() if path not in done]
    spent = sum(bits for _, bits in done.values())
    predicted = sum(known[path].bits(c, config.states) for path, (c, _) in done.items())
    return levels.solve(left, (AIM * budget - spent) * (predicted / spent if spent else 1), config.states)


def corrected(config: LevelConfig, known: Mapping[str, Curve],
              done: Mapping[str, tuple[float, int]]) -> dict[str, Curve]:
    """The curves as they would have predicted what was found."""
    def right(curve, c, bits):
        ratio = (bits - curve.side) / max(curve.bits(c, config.states) - curve.side, 1)
        return curve._replace(counts=[ratio * count for count in curve.counts])

    return {path: right(curve, *done[path]) if path in done else curve for path, curve in known.items()}
