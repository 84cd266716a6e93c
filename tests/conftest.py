"""Tests run in float64 with strict dtype promotion; a rank promotion or a warning is an error.

Each worker of ``pytest -n`` keeps to one core: two XLA thread pools on the same cores wait for each other.
"""

import os

if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import jax  # noqa: E402, I001  (it counts the cores when it starts)
from programs import few_programs  # noqa: E402, F401

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
