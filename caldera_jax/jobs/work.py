"""The layers of a run: what is given of each, who works on it, and what is recorded of it."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from tqdm import tqdm

from caldera_jax.jobs import calibration, report, spread
from caldera_jax.jobs.run import Run
from caldera_jax.jobs.settings import RunConfig, count
from caldera_jax.levels import Levelled
from caldera_jax.linear import CompressedLinear
from caldera_jax.models import llama
from caldera_jax.models.convert import Model


class Given(NamedTuple):
    """A layer's key, weights and Hessian, its inputs' largest token (``hessian.Moments``; 0: not known), the factor of
    its outputs' importance that makes up for what the cap leaves out, and of an expert the number of its tokens."""

    key: Array
    w: Array
    h: Array
    peak: float
    lift: float
    tokens: int | None = None


class Work(NamedTuple):
    """A run on its way; ``folder``: of the Moments."""

    config: RunConfig
    model: Model
    run: Run
    clock: report.Clock
    folder: Path

    def given(self, index: int, i: int) -> Given:
        """What layer i of a block is compressed from."""
        names = llama.linears(self.model.config)
        name, source = names[i], llama.input_of(names[i])
        key = jax.random.fold_in(jax.random.key(self.config.seed), index * len(names) + i)
        w = jnp.asarray(self.model.params["blocks"][index][name])
        if self.config.hessians is None:
            moments = calibration.load_moments(calibration.spilled(self.folder, index, source))[source]
            lift = float(moments.left_out(self.config.level.damping)) if self.config.level else 1.0
            tokens = int(moments.seen) if name != llama.kind_of(name) else None
            return Given(key, w, moments.mean(), float(moments.peak), lift, tokens)
        hessians = Path(self.config.hessians)
        return Given(key, w, jnp.asarray(calibration.released(hessians, self.model.config, index, source)), 0.0, 1.0)

    @property
    def tables(self) -> int:
        """The index at which embedding and head stand, behind the last block."""
        return self.model.config.layers

    def shapes(self, index: int) -> dict[str, tuple[int, int]]:
        """Of the layers of a block, or of the tables."""
        return (llama.table_shapes if index == self.tables else llama.shapes)(self.model.config)

    def path(self, index: int, i: int) -> str:
        """Of layer i of a block, or of a table."""
        return self.paths([index])[i]

    def paths(self, group: Sequence[int]) -> list[str]:
        """Of the layers of these blocks, and of the tables."""
        return [name if index == self.tables else f"blocks.{index}.{name}"
                for index in group for name in self.shapes(index)]

    def bar(self, title: str, group: Sequence[int], leave: bool = True) -> tqdm:
        """Progress of this process through its layers of these blocks, for ``each``."""
        title = title if spread.count() == 1 else f"{title} (1 of {spread.count()} processes)"
        total = sum(self._weights(*item) for items in self._own(group) for item in items)
        return tqdm(total=total, unit="weight", unit_scale=True, desc=title, disable=spread.rank() > 0, leave=leave)

    def each(self, group: Sequence[int], bar: tqdm, work: Callable[[int, int], None]) -> None:
        """work(block, i) for each layer of these blocks that is this process's, on its device."""
        def of_device(items):
            for item in items:
                bar.set_postfix_str(self.path(*item))
                work(*item)
                bar.update(self._weights(*item))

        spread.on_devices(of_device, self._own(group))

    def _own(self, group: Sequence[int]) -> list[list[tuple[int, int]]]:
        """The layers of these blocks that are this process's, for each of its devices."""
        costs = lambda index: [(m + 0.4 * n) * n for m, n in self.shapes(index).values()]  # as the seconds on a CPU
        every, devices = [*range(count(self.config, self.model.config)), self.tables], jax.local_device_count()
        slots = dict(zip(every, spread.assign(list(map(costs, every)), spread.slots()), strict=True))
        return [[(index, i) for index in group for i, slot in enumerate(slots[index])
                 if slot == spread.rank() * devices + device] for device in range(devices)]

    def weights(self, index: int) -> int:
        """Of the layers of a block, or of the tables."""
        return sum(map(math.prod, self.shapes(index).values()))

    def _weights(self, index: int, i: int) -> int:
        return math.prod([*self.shapes(index).values()][i])


def record(path: str, layer: CompressedLinear, given: Given | None, error: float, damping: float,
           half_steps: list[float], part: dict[str, float]) -> dict[str, Any]:
    """What the report says of one layer.  ``bits``: all stored bits of the layer; ``error``: against the undamped H,
    all outputs alike; ``half_step_errors`` in the metric that was minimised, in which outputs may count differently."""
    (m, n), parts = layer.shape, layer.bits_of_parts()
    sizes, used = (m * n, m * layer.rank, n * layer.rank), (layer.q, layer.left_t, layer.right)
    q_bits, *factor_bits = (0 if part is None else bits / size if isinstance(part, Levelled) else
                            grid.code_bits / grid.block
                            for grid, part, bits, size in zip(layer.grids, used, parts[:3], sizes, strict=True))
    return {"path": path, "shape": [m, n], "error": error, "bits": sum(parts), "bits_per_weight": sum(parts) / (m * n),
            "rank": layer.rank, "q_bits": q_bits, "factor_bits": factor_bits, "damping": damping,
            "half_step_errors": half_steps, "seconds": round(part["seconds"], 3),
            "compile_seconds": round(part["compile_seconds"], 3), "process": spread.rank(),
            **({"peak": given.peak} if given and given.peak else {}),
            **({} if given is None or given.tokens is None else {"tokens": given.tokens})}
