"""Pallas kernels, one a file, and the one place where a backend is picked.

Each file has ``reference`` (plain JAX), ``pallas`` (the kernel, for a TPU or interpreted) and a public function
that goes through ``dispatch``.  Which one runs is said by the environment variable ``CALDERA_KERNELS`` or by ``use``:

    auto    kernels on TPU, the reference elsewhere (the default)
    jax     the reference everywhere
    pallas  as auto, and on the CPU the kernel in interpret mode (slow: for tests)

A program holds a branch for each platform and takes one when it is lowered, so that one trace runs on every platform
and ``jax.export`` lowers it for a machine that is not there.  The mode is read when a function is traced: what ``jit``
has traced already keeps its mode until ``jax.clear_caches()``.

**A GPU runs the reference**, kernel by kernel:

    e8p.encode           one elementwise search a vector, for XLA to fuse into one GPU kernel
    hadamard.transform   a few products with small matrices, for XLA to give to the matrix units
    matmul.multiply      Q is decoded into dense tiles of at most 2^26 weights, each multiplied at once: in half
                         precision 4.25 bytes a weight go through main memory where decoding on chip would read 0.25

Pallas has two ways to a GPU: Triton, which JAX 0.12 deprecates, and Mosaic GPU, for Hopper and later alone.  A GPU
kernel enters when ``experiments/accelerator.py`` has measured one ahead of the reference; no GPU was at hand so far.

Status: never run on an accelerator.  The tests compare the interpreted kernels with the references and lower them for
TPU.  Once, by hand, they were also compiled to machine code, at sizes from 1 x 1 to 11008 x 4096, for TPU v5e, v5p and
v6e (v4: not ``matmul`` for a single row, whose sums need a permutation it lacks).
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


def dispatch(reference: Callable, pallas: Callable, *args: Any) -> Any:
    """reference(*args), or pallas(*args, interpret=...) where the mode and the platform say so.

    Derivatives in both directions are those of the reference.  Cost: each branch is traced once for each shape.
    """
    if mode() == "jax":
        return reference(*args)
    branches = {"tpu": partial(pallas, interpret=False)}
    if mode() == "pallas":
        branches["cpu"] = partial(pallas, interpret=True)
    call = jax.custom_jvp(lambda *args: lax.platform_dependent(*args, default=reference, **branches))
    call.defjvp(lambda primals, tangents: (call(*primals), jax.jvp(reference, primals, tangents)[1]))
    return call(*args)


def compiler_params(megabytes: int = 32) -> Any:
    """For ``pallas_call``: ``megabytes`` of vector memory at most."""
    return pallas_tpu.CompilerParams(vmem_limit_bytes=megabytes << 20)


def precision(dtype) -> lax.PrecisionLike:
    """Of products inside a kernel: float32 to its last bits or nearly, half precision as it is; sums are float32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None
