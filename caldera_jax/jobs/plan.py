"""A budget at fixed rates: rank and bits of every layer, planned before any is compressed (``allocate``).

Each process measures its own layers; process 0 solves the plan.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from caldera_jax import allocate
from caldera_jax.allocate import ErrorModel, Option
from caldera_jax.jobs import level, spread
from caldera_jax.jobs.settings import RunConfig, budget, count
from caldera_jax.jobs.work import Work
from caldera_jax.models import llama
from caldera_jax.models.convert import Model


def plan(job: Work, tokens: np.ndarray) -> dict[str, Any]:
    """{path: option, predicted_loss, fisher}; what each layer would lose, the Fisher information and the plan are kept.
    """
    config, model, run, clock, _ = job
    choices, blocks = offered(config, model), range(count(config, model.config))
    names = dict(zip(job.paths(blocks), llama.linears(model.config) * len(blocks), strict=True))
    with clock.stage("measure"):
        with job.bar("measure", blocks) as bar:
            job.each(blocks, bar, lambda index, i: _measure(job, choices, index, i))
        run.wait([f"{path}.options" for path in names])
    fisher = dict.fromkeys(names, 0.0)
    if config.allocation in ("gradient", "trace"):
        with clock.stage("gradients"):
            found = level.output_fisher(model, tokens, config.seed, run, run.work)
        fisher = {path: float(found[path].rows.sum()) for path in names}
    if spread.rank() == 0 and run.recall("plan") is None:
        models = {path: ErrorModel(**run.recall(f"{path}.options")) for path in names}
        of = llama.shapes(model.config)
        damages = [allocate.damage(config.allocation, of[name], models[path], fisher[path])
                   for path, name in names.items()]
        bits = [choices[name][1] for name in names.values()]
        solve = allocate.alike if config.allocation == "uniform" else allocate.plan
        found = zip(names.items(), solve(bits, damages, budget(config, model.config)), damages, strict=True)
        run.remember("plan", {path: {"option": choices[name][0][best], "predicted_loss": damage[best],
                                     "fisher": fisher[path]} for (path, name), best, damage in found})
    run.wait(["plan"])
    run.remember("clock", clock.stages)
    return run.recall("plan")


def _measure(job: Work, choices: dict[str, Any], index: int, i: int) -> None:
    """The error model of one layer, written unless it is there."""
    path = job.path(index, i)
    if job.run.recall(f"{path}.options") is None:
        options, _ = choices[path.rsplit(".", 1)[1]]
        found = allocate.error_model(*job.given(index, i)[:3], job.config.caldera, options, path)
        job.run.keep(f"{path}.options", found._asdict())


def offered(config: RunConfig, model: Model) -> dict[str, tuple[list[Option], list[int]]]:
    """The options of each of a block's layers under the budget, and the bits that each stores."""
    shapes, caldera, dtype = llama.shapes(model.config), config.caldera, _scales(model)
    choices = {name: allocate.options(shape, caldera, config.ranks) for name, shape in shapes.items()}
    if config.allocation == "uniform":
        alike = allocate.alike_options([*shapes.values()] * count(config, model.config), caldera,
                                       budget(config, model.config), dtype, config.ranks)
        choices = dict.fromkeys(shapes, alike)
    return {name: (of, [allocate.stored_bits(shapes[name], option.of(caldera), dtype) for option in of])
            for name, of in choices.items()}


def dearest(config: RunConfig, model: Model) -> int:
    """Bits beyond which a larger budget buys nothing."""
    shapes = [*llama.shapes(model.config).values()] * count(config, model.config)
    return allocate.dearest_bits(shapes, config.caldera, config.allocation, _scales(model), config.ranks)


def _scales(model: Model) -> Any:
    dtype = jnp.asarray(model.params["blocks"][0]["q"]).dtype
    return dtype if dtype == jnp.float64 else jnp.dtype(jnp.float32)
