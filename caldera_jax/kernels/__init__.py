"""Pallas kernels, one a file, and the one place where a backend is picked.

Each file has ``reference`` (plain JAX), ``pallas`` (the kernel, for a TPU or interpreted) and a public function
that goes through ``dispatch``; ``e8p`` has ``mosaic``, for a GPU, as well, and ``integers`` is plain JAX, for CPUs.
Which one runs is said by the environment variable ``CALDERA_KERNELS`` or by ``use``:

    auto    kernels where there are some, the reference elsewhere (the default)
    jax     the reference everywhere
    pallas  as auto, and on the CPU the kernel in interpret mode (slow: for tests)

A program holds a branch for each platform and takes one when it is lowered, so that one trace runs on every platform
and ``jax.export`` lowers it for a machine that is not there.  The mode is read when a function is traced: what ``jit``
has traced already keeps its mode until ``jax.clear_caches()``.

On a GPU, kernel by kernel (figures: one NVIDIA H200, JAX 0.11.2, ``experiments/results/accelerator_nvidia-h200.json``):

    e8p.encode           a kernel of Mosaic GPU, for compute capability 9 (Hopper) and later: 14 to 28 times as fast as
                         the reference; with it block LDLQ of 4096 x 4096 is 14 times as fast
    hadamard.transform   the reference: a few products with small matrices, for XLA to give to the matrix units
    matmul.multiply      the reference: Q is decoded into dense tiles of at most 2^26 weights, each multiplied at once;
                         1.2 to 9 times as long as the dense product

Of Pallas' two ways to a GPU the other, Triton, is deprecated in JAX 0.12; older GPUs run the reference.

Status: everything ran on that H200; every code was the CPU's, every value that of float64 within rounding.  The TPU
kernels were never run: the tests compare the interpreted ones with the references and lower them.  Once, by hand, they
were also compiled to machine code, at sizes from 1 x 1 to 11008 x 4096, for TPU v5e, v5p and v6e (v4: not ``matmul``
for a single row, whose sums need a permutation it lacks).
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pallas_tpu

MODES = ("auto", "jax", "pallas")
_chosen: ContextVar[str | None] = ContextVar("caldera_kernels", default=None)


def on_cpu() -> bool:
    """Whether this process computes on a CPU; asked when a function is traced, and right or wrong only for speed."""
    return jax.default_backend() == "cpu"


def mode() -> str:
    """The mode in force: that of the innermost ``use``, else CALDERA_KERNELS, else "auto"."""
    return _checked(_chosen.get() or os.environ.get("CALDERA_KERNELS") or "auto")


def _checked(name: str) -> str:
    if name not in MODES:
        raise ValueError(f"unknown kernel mode {name!r} (CALDERA_KERNELS or kernels.use): choose one of "
                         + ", ".join(MODES))
    return name


@contextmanager
def use(name: str) -> Iterator[None]:
    """``with kernels.use("jax"):`` — the mode of everything traced inside."""
    token = _chosen.set(_checked(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def dispatch(reference: Callable, pallas: Callable, *args: Any, gpu: Callable | None = None) -> Any:
    """reference(*args), or pallas(*args, interpret=...) or gpu(*args) where the mode and the platform say so.

    Derivatives in both directions are those of the reference.  Cost: each branch is traced once for each shape.
    """
    if mode() == "jax":
        return reference(*args)
    branches = {"tpu": partial(pallas, interpret=False)}
    if gpu is not None and _mosaic_runs():
        branches["cuda"] = gpu
    if mode() == "pallas":
        branches["cpu"] = partial(pallas, interpret=True)
    call = jax.custom_jvp(lambda *args: lax.platform_dependent(*args, default=reference, **branches))
    call.defjvp(lambda primals, tangents: (call(*primals), jax.jvp(reference, primals, tangents)[1]))
    return call(*args)


def _mosaic_runs() -> bool:
    """Whether the devices here are GPUs that Mosaic compiles for: Hopper, of compute capability 9, and later."""
    return all(float(getattr(device, "compute_capability", 0)) >= 9 for device in jax.devices())


def compiler_params(megabytes: int = 32) -> Any:
    """For ``pallas_call``: ``megabytes`` of vector memory at most."""
    return pallas_tpu.CompilerParams(vmem_limit_bytes=megabytes << 20)


def precision(dtype) -> lax.PrecisionLike:
    """Of products inside a kernel: float32 to its last bits or nearly, half precision as it is; sums are float32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None
