"""Pallas kernels, one a file, and the one place where a backend is picked.

Each file has ``reference`` (plain JAX), ``pallas`` (the kernel, for one platform or interpreted) and a public function
that goes through ``dispatch``.  Which one runs is said by the environment variable ``CALDERA_KERNELS`` or by ``use``:

    auto    kernels on TPU and on CUDA, the reference elsewhere (the default)
    jax     the reference everywhere
    pallas  as auto, and on the CPU the TPU kernel in interpret mode (slow: for tests)

A program holds a branch for each platform and takes one when it is lowered, so that one trace runs on every platform
and ``jax.export`` lowers it for a machine that is not there.  The mode is read when a function is traced: what ``jit``
has traced already keeps its mode until ``jax.clear_caches()``.

Status: never run on an accelerator.  The tests compare the interpreted kernels with the references and lower them for
TPU and for CUDA.  Once, by hand, they were also compiled to machine code, at sizes from 1 x 1 to 11008 x 4096: for TPU
v5e, v5p and v6e (v4: not ``matmul`` for a single row, whose sums need a permutation it lacks), and by the stand-alone
Triton 3.9 for compute capability 8.0 and 9.0, in at most 72 and 137 KiB of shared memory and with no register spilled.
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
from jax.experimental.pallas import triton as pallas_triton

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
    """reference(*args), or pallas(*args, platform=..., interpret=...) where the mode and the platform say so.

    Derivatives in both directions are those of the reference.  Cost: each branch is traced once for each shape.
    """
    if mode() == "jax":
        return reference(*args)
    branches = {platform: partial(pallas, platform=platform, interpret=False) for platform in ("tpu", "cuda")}
    if mode() == "pallas":
        branches["cpu"] = partial(pallas, platform="tpu", interpret=True)
    call = jax.custom_jvp(lambda *args: lax.platform_dependent(*args, default=reference, **branches))
    call.defjvp(lambda primals, tangents: (call(*primals), jax.jvp(reference, primals, tangents)[1]))
    return call(*args)


def compiler_params(platform: str, warps: int = 4, megabytes: int = 32) -> Any:
    """For ``pallas_call``: Triton on CUDA (Pallas would choose Mosaic GPU, Hopper and later), Mosaic on TPU.

    ``warps`` of 32 threads for a program on a GPU; ``megabytes`` of vector memory at most on a TPU.
    """
    if platform == "cuda":
        return pallas_triton.CompilerParams(num_warps=warps, num_stages=2)
    return pallas_tpu.CompilerParams(vmem_limit_bytes=megabytes << 20)


def precision(dtype, platform: str, interpret: bool) -> lax.PrecisionLike:
    """Of products inside a kernel: float32 to its last bits or nearly, half precision as it is; sums are float32.

    Tensor cores have no float32: three products of 19-bit numbers stand for one, to 21 bits or better.
    """
    if dtype != jnp.float32:
        return None
    return lax.Precision.HIGHEST if interpret or platform == "tpu" else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
