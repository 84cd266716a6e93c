"""What a device could do at most, and how long a call takes there; ``accelerator`` divides the one by the other."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Row = dict[str, Any]


class Peaks(NamedTuple):
    """Bytes of memory and operations of products, a second, and who says so."""

    memory: float
    float32: float
    half: float
    source: str


TPU = "Cloud TPU documentation; float32: the six passes in bfloat16 of precision highest"
DEVICES = {  # by JAX's device_kind; half precision without sparsity
    "NVIDIA A100-SXM4-80GB": Peaks(2.039e12, 19.5e12, 312e12, "NVIDIA A100 datasheet, 80GB SXM"),
    "NVIDIA H100 80GB HBM3": Peaks(3.35e12, 67e12, 989e12, "NVIDIA H100 datasheet, SXM"),
    "NVIDIA H200": Peaks(4.8e12, 67e12, 989e12, "NVIDIA H200 datasheet, SXM"),
    "NVIDIA L4": Peaks(300e9, 30.3e12, 121e12, "NVIDIA L4 datasheet"),
    "NVIDIA GeForce RTX 4090": Peaks(1.008e12, 82.6e12, 165.2e12, "NVIDIA Ada whitepaper; half with float32 sums"),
    "TPU v4": Peaks(1.2e12, 275e12 / 6, 275e12, TPU),
    "TPU v5 lite": Peaks(819e9, 197e12 / 6, 197e12, TPU),  # v5e
    "TPU v5": Peaks(2.765e12, 459e12 / 6, 459e12, TPU),  # v5p, and so is the next
    "TPU v5p": Peaks(2.765e12, 459e12 / 6, 459e12, TPU),
    "TPU v6 lite": Peaks(1.64e12, 918e12 / 6, 918e12, TPU)}  # v6e


def timed(f: Callable[..., Any], variants: list[tuple[Any, ...]], budget: float, dtype=jnp.float32) -> Row:
    """Median seconds of a call, its arguments taken in turn, and how much longer the first one takes."""
    f = jax.jit(f)

    def ahead(calls: int) -> float:
        start = time.perf_counter()
        for i in range(calls):
            result = f(*variants[i % len(variants)])
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
        first, once = ahead(1), max(ahead(len(variants)), 1e-7)
        calls = int(np.clip(0.005 / once, 1, 500))
        samples = int(np.clip(budget / (calls * once), 1, 15))
        seconds = float(np.median([ahead(calls) for _ in range(samples)]))
    return {"seconds": seconds, "compile_seconds": max(first - seconds, 0.0)}


def in_turn(tree: Any, cold: float) -> list[Any]:
    """Copies that take ``cold`` bytes together, at most 48."""
    copies = math.ceil(cold / sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
    return [tree, *(jax.tree.map(jnp.copy, tree) for _ in range(min(copies, 48) - 1))]


def rated(peaks: Peaks, row: Row, flops: float, moved: float, dtype=jnp.float32) -> Row:
    """The row with operations, bytes, and the fractions of the peaks that they make."""
    rate = peaks.float32 if dtype == jnp.float32 else peaks.half
    return {**row, "flops": flops, "bytes": moved, "of_flops": flops / row["seconds"] / rate,
            "of_memory": moved / row["seconds"] / peaks.memory}


def half_dtype() -> Any:
    """A TPU has bfloat16 only."""
    return jnp.bfloat16 if jax.default_backend() == "tpu" else jnp.float16


def measured(cold: float, budget: float) -> tuple[Peaks, float]:
    """What products, and reading a matrix once, reach here; and the seconds of the smallest call."""
    cpu = jax.default_backend() == "cpu"
    n, half, wide = (512, 256, 1024) if not cold else (2048, 512, 8192) if cpu else (8192, 8192, 16384)
    ones = lambda *shape, dtype=jnp.float32: jnp.ones(shape, dtype)
    seconds = lambda f, *args: timed(f, [args], budget, args[0].dtype)["seconds"]
    square = lambda n, dtype: 2.0 * n**3 / seconds(lambda a: a @ a, ones(n, n, dtype=dtype))
    read = 4.0 * wide**2 / seconds(lambda a, x: a @ x, ones(wide, wide), ones(wide))
    peaks = Peaks(read, square(n, jnp.float32), square(half, half_dtype()), "measured here")
    return peaks, seconds(lambda x: x + 1, ones(8))
