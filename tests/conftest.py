"""Tests run in float64 with strict dtype promotion; a rank promotion or a warning is an error.

Each worker of ``pytest -n`` keeps to one core: two XLA thread pools on the same cores wait for each other.  Most of the
time would be XLA's optimizing of programs that run for milliseconds: here it optimizes little, unless XLA_FLAGS says
otherwise, and in the processes that a test starts.  Compiled programs are shared by all workers, their processes and
later runs, in .pytest_cache/xla.
"""

import gc
import os
from importlib.metadata import version
from pathlib import Path

if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

FLAGS = "--xla_backend_optimization_level=0"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # gone since: XLA ends at a flag that it does not know
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
gc.set_threshold(50_000, 20, 50)  # millions of objects stay, those of what JAX has traced: look through them rarely

import jax  # noqa: E402, I001  (it counts the cores when it starts)
import pytest  # noqa: E402
from programs import few_programs  # noqa: E402, F401

CONFIGURATION = {"jax_enable_x64": True, "jax_numpy_dtype_promotion": "strict", "jax_numpy_rank_promotion": "raise"}
for name, value in CONFIGURATION.items():
    jax.config.update(name, value)


@pytest.fixture(autouse=True)
def configuration():
    """A test that leaves JAX in another configuration fails itself, and none after it."""
    yield
    left = {name: getattr(jax.config, name) for name in CONFIGURATION}
    for name, value in CONFIGURATION.items():
        jax.config.update(name, value)
    assert left == CONFIGURATION
