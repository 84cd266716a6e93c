"""Tests run in float64 with strict dtype promotion; a rank promotion or a warning is an error.

Each worker of ``pytest -n`` keeps to one core: two XLA thread pools on the same cores wait for each other.  Most of the
time would be XLA's optimizing of programs that run for milliseconds: here it optimizes little, unless XLA_FLAGS says
otherwise.  Processes that a test starts with flags of their own compile as a user's do.
"""

import os
from importlib.metadata import version

if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

FLAGS = "--xla_backend_optimization_level=0"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # gone since: XLA ends at a flag that it does not know
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)

import jax  # noqa: E402, I001  (it counts the cores when it starts)
from programs import few_programs  # noqa: E402, F401

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
