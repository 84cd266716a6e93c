"""The speed account: seconds of every part of the method, beside its arithmetic and what this machine can do.

    python experiments/speed.py                # the shapes that are missing -> results/speed_MxN.json, then the rest
    python experiments/speed.py 576x576 ...    # those shapes, again
    python experiments/speed.py --summary      # figures/speed.png, results/speed_summary.json, from the JSON

W is Gaussian and H has a power-law diagonal and 64 strong directions: time does not depend on them.  The rank is 32 at
576 and n / 16 elsewhere, at most 256; 4-bit factors, 10 inner iterations, subspace iteration.  Compiling is apart;
seconds are the median of several runs.  Operations are counted from the formulas below (a multiply-add is two), those
of the lattice search from its program.  Each shape is its own process, which first measures the rate of a 2048 x 2048
product and the bandwidth of reading 256 MB.  The summary holds the growth with n and a prediction for LLaMA-2.
"""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from drawing import FIGURES, RESULTS
from jax import Array

import caldera_jax as cj
from caldera_jax import hadamard, hessian, lattice, packing
from caldera_jax.codebooks import by_bits, fit_scale, quantize
from caldera_jax.decompose import CalderaConfig, caldera
from caldera_jax.jobs import report
from caldera_jax.ldlq import descent_feedback, ldlq, slab_width, sweep
from caldera_jax.linear import CompressedLinear, Packed
from caldera_jax.lplr import lplr_factorize
from caldera_jax.models import files
from caldera_jax.regression import rank_constrained, rank_constrained_iteratively

SHAPES = ((512, 512), (576, 576), (1024, 1024), (2048, 2048), (4096, 4096), (11008, 4096), (4096, 11008))
GROWTH = tuple((n, n) for n in (512, 1024, 2048, 4096))
E8P2, E8P4 = by_bits("e8p", 2), by_bits("e8p", 4)
LARGEST_EXACT = 2048  # a full SVD of 4096 x 4096 takes minutes here
INNER = 10


@dataclasses.dataclass(frozen=True)
class SpeedConfig:
    """One shape of the account; INNER iterations of LPLR, ``budget`` seconds for the repetitions of one operation."""

    m: int
    n: int
    budget: float = 10.0

    @property
    def rank(self) -> int:
        """k of L R."""
        return 32 if min(self.m, self.n) == 576 else min(min(self.m, self.n) // 16, 256)


@dataclasses.dataclass(frozen=True)
class Operation:
    """What is timed: a function of arrays, its arithmetic, and the bytes that must cross to memory once."""

    run: Callable[..., Any]
    args: tuple[Any, ...]
    flops: float
    bytes: float
    weights: int = 0  # for a rate in weights a second


def search_operations() -> float:
    """Elementwise operations of the E8P search and of its code, for each weight."""
    rows = [jax.ShapeDtypeStruct((), jnp.float32)] * 8
    program = jax.make_jaxpr(lambda *v: lattice.code_of(lattice.search(v)))(*rows)
    return sum(eqn.primitive.name not in ("jit", "pjit") for eqn in program.eqns) / 8


def problem(m: int, n: int) -> tuple[Array, Array]:
    """W [m, n] and H [n, n] in float32."""
    rng = np.random.default_rng(0)
    size = np.sqrt(np.arange(1, n + 1) ** -0.5).astype(np.float32)
    strong = (rng.standard_normal((n, 64), np.float32) * size[:, None]) / 8
    return jnp.asarray(rng.standard_normal((m, n), np.float32)), jnp.asarray(np.diag(size**2) + strong @ strong.T)


def packed_layer(m: int, n: int, k: int) -> CompressedLinear:
    """A compressed layer of random codes: what ``apply`` does depends on nothing else."""
    rng = np.random.default_rng(1)
    part = lambda rows, columns, grid: Packed(
        jnp.asarray(rng.integers(0, 256, (rows, packing.row_bytes(-(-columns // 8), grid.code_bits)), np.uint8)),
        jnp.full((1, 1), 0.1, jnp.float32))
    sides = (packing.pack_signs(jnp.asarray(rng.choice([-1.0, 1.0], size))) for size in (m, n))
    return CompressedLinear(part(m, n, E8P2), part(k, m, E8P4), part(k, n, E8P4), *sides, (m, n), (E8P2, E8P4, E8P4))


def counted(m: int, n: int, k: int, searched: float) -> dict[str, float]:
    """Operations of the parts, with ``searched`` a weight for the lattice search; exact SVD apart."""
    width = k + 16
    iterate = 5 * 4 * m * n * width + 4 * 4 * m * width**2  # four rounds, the last products, and QR
    once = 2 * k * (2 * m * n + n * n) + 8 * k * k * (m + n)  # L⁺A, R H, R H Aᵀ and the small systems
    lplr = iterate + (INNER + 1) * (once + 2 * searched * k * (m + n))
    ldlq = m * n * n + searched * m * n
    scores = 2 * m * n * n + 2 * (2 * k * n * n + 4 * k * m * n)  # Q H, and L R with its H twice
    return {"iterate": iterate, "lplr": lplr, "ldlq": ldlq, "outer": lplr + ldlq + scores,
            "pass": 2 * m * n * n + searched * m * n}


def operations(config: SpeedConfig) -> dict[str, Operation]:
    """Everything that is timed at one shape."""
    m, n, k = config.m, config.n, config.rank
    key, (w, h) = jax.random.key(0), problem(m, n)
    factors = jax.block_until_ready(jax.jit(hessian.factor, static_argnums=(1, 2))(h, 0.01, 8))
    searched, slab = search_operations(), slab_width(n, 8)
    feedback = jax.jit(descent_feedback, static_argnums=1)(factors.h + 0.01 * jnp.eye(n), 8)  # n is a multiple of slab
    method = CalderaConfig(rank=k, outer_iterations=1, inner_iterations=INNER, svd="randomized")
    flops = counted(m, n, k, searched)
    layer, batches = packed_layer(m, n, k), {b: jnp.ones((b, n), jnp.float32) for b in (1, 512)}
    matrix = 4.0 * m * n
    found = {
        "e8p encode": Operation(lambda w: quantize(E8P2, w), (w,), searched * m * n, 2.25 * matrix, m * n),
        "residual e8p encode": Operation(lambda w: quantize(E8P4, w), (w,), 2 * searched * m * n, 2.5 * matrix, m * n),
        "hadamard": Operation(hadamard.transform, (w,), 2 * m * n * _orders(n), 2 * matrix, m * n),
        "factor H": Operation(lambda h: hessian.factor(h, 0.01, 8), (h,), n**3 / 3 + 16 * n * n, 12.0 * n * n),
        "block ldlq": Operation(lambda w, f: ldlq(w, E8P2, f), (w, factors), flops["ldlq"], 2 * matrix + 4.0 * n * n,
                                m * n),
        "refinement pass": Operation(lambda w, f: _pass(w, f, slab), (w, feedback), flops["pass"],
                                     2 * matrix + 4.0 * n * n, m * n),
        "closed form, iterative": Operation(lambda w, w_h: rank_constrained_iteratively(key, w, w_h, k), (w, w @ h),
                                            flops["iterate"], 2 * matrix),
        "lplr": Operation(lambda w, f, w_h: lplr_factorize(key, w, f, k, E8P4, E8P4, INNER, "randomized", w_h),
                          (w, factors, w @ h), flops["lplr"], 2 * matrix + 4.0 * n * n),
        "outer iteration": Operation(lambda w, f: caldera(key, w, f, method), (w, factors), flops["outer"],
                                     3 * matrix + 4.0 * n * n, m * n),
    }
    if max(m, n) <= LARGEST_EXACT:
        s, long = min(m, n), max(m, n)
        found["closed form, exact"] = Operation(lambda w, f: rank_constrained(w, f.root, k), (w, factors),
                                                2 * m * n * n + 6 * long * s * s + 20 * s**3, 2 * matrix)
    if n == 576:
        refined = dataclasses.replace(method, refine_passes=10)
        found["outer iteration, 10 passes"] = Operation(
            lambda w, f: caldera(key, w, f, refined), (w, factors), flops["outer"] + 10 * flops["pass"], 3 * matrix,
            m * n)
    for b, x in batches.items():
        moved = layer.stored_bits / 8 + 4 * b * (m + n)
        products = 2 * b * (m * n + k * (m + n))
        found[f"apply compressed, batch {b}"] = Operation(cj.apply, (layer, x), products, moved)
        found[f"apply dense, batch {b}"] = Operation(cj.apply, (w, x), 2 * b * m * n, matrix + 4 * b * (m + n))
    return found


def _pass(w, feedback, slab):
    """A pass of coordinate descent as ``ldlq`` makes it."""
    scale = fit_scale(E8P2, w)

    def rounded(target, start):
        values, codes = E8P2.round(target / scale)
        return values * scale, codes

    return sweep(w, w, feedback, rounded, 8, slab)


def _orders(n: int) -> int:
    """The sum of the orders of the Kronecker factors that the transform multiplies by."""
    power, rest, kind = hadamard.factor(n)
    return sum(len(a) for a in hadamard._sylvesters(power)) + (rest if kind == "hadamard" else 0)


def time_it(operation: Operation, budget: float) -> dict[str, float]:
    """Compile and steady seconds (median), repetitions and the peak memory of the process during it."""
    clock = report.Clock()
    with clock.stage("operation"):
        start = time.perf_counter()
        run = jax.jit(operation.run).lower(*operation.args).compile()
        compiled = time.perf_counter() - start
        first = _once(run, operation.args)
        calls = max(1, min(100, int(0.005 / max(first, 1e-6))))  # a sample is at least 5 ms
        samples = int(np.clip(budget / (calls * max(first, 1e-6)), 1, 15))
        seconds = float(np.median([_once(run, operation.args, calls) for _ in range(samples)]))
    return {"compile_seconds": compiled, "seconds": seconds, "samples": samples, "calls": calls,
            "peak_memory_bytes": clock.stages["operation"]["peak_memory_bytes"]}


def _once(run, args, calls: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        result = run(*args)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def limits() -> dict[str, float]:
    """The rate of a float32 product, and the bandwidth of reading a matrix of 256 MB once, times a vector."""
    a, b = jnp.ones((2048, 2048), jnp.float32), jnp.ones((8192, 8192), jnp.float32)
    product = time_it(Operation(lambda a: a @ a, (a,), 0, 0), 3.0)["seconds"]
    read = time_it(Operation(lambda b, x: b @ x, (b, jnp.ones(8192)), 0, 0), 3.0)["seconds"]
    return {"product_flops": 2 * 2048.0**3 / product, "read_bytes": 4.0 * 8192**2 / read}


def encode_rates() -> dict[str, dict[str, float]]:
    """Weights a second of the E8P search alone (values and codes), by vectors a call."""
    rows = {}
    for vectors in (576, 4096, 65536, 1 << 19):
        x = jnp.asarray(np.random.default_rng(2).standard_normal((vectors, 8), np.float32))
        timed = time_it(Operation(lattice.e8p_round, (x,), 0, 0), 3.0)
        rows[str(vectors)] = {**timed, "weights_per_second": 8 * vectors / timed["seconds"]}
    return rows


def gap(config: SpeedConfig) -> float | None:
    """How far the subspace iteration's optimum is above that of the exact SVD, relative, where that is feasible."""
    if max(config.m, config.n) > LARGEST_EXACT:
        return None
    w, h = problem(config.m, config.n)
    f = hessian.factor(h, 0.01, 8)
    damped = f.h + f.damping * jnp.eye(config.n)
    losses = [float(cj.objective.proxy_loss(w - pair.left @ pair.right, damped)) for pair in (
        rank_constrained_iteratively(jax.random.key(0), w, w @ damped, config.rank),
        rank_constrained(w, f.root, config.rank))]
    return losses[0] / losses[1] - 1


@jax.default_matmul_precision("highest")
def measure(config: SpeedConfig) -> dict[str, Any]:
    """The record of one shape."""
    top = limits()
    record = {**report.provenance(config, 0), "rank": config.rank, "limits": top, "operations": {}}
    if config.n == config.m == 576:
        record["encode"] = encode_rates()
    for name, operation in operations(config).items():
        row = time_it(operation, config.budget)
        row |= {"flops": operation.flops, "bytes": operation.bytes,
                "of_product_rate": operation.flops / row["seconds"] / top["product_flops"],
                "of_bandwidth": operation.bytes / row["seconds"] / top["read_bytes"]}
        if operation.weights:
            row["weights_per_second"] = operation.weights / row["seconds"]
        record["operations"][name] = row
        print(f"{config.m}x{config.n} {name:28s} {row['seconds']:10.4f} s   compile {row['compile_seconds']:6.1f} s   "
              f"{100 * row['of_product_rate']:5.1f} % of products   {100 * row['of_bandwidth']:5.1f} % of bandwidth   "
              f"{row['peak_memory_bytes'] / 1e9:5.2f} GB", flush=True)
    record["closed_form_gap"] = gap(config)
    return record


def path_of(m: int, n: int) -> Path:
    """The JSON of a shape."""
    return RESULTS / f"speed_{m}x{n}.json"


def growth() -> dict[str, tuple[float, float]]:
    """Fitted and counted exponents of the seconds in n over the square shapes, by operation."""
    rows = {n: files.read_json(path_of(n, n))["operations"] for n, _ in GROWTH}
    sizes = np.log(list(rows))
    slope = lambda name, field: float(np.polyfit(sizes, [np.log(rows[n][name][field]) for n in rows], 1)[0])
    names = [name for name in rows[GROWTH[0][0]] if all(name in rows[n] for n in rows)]
    return {name: (slope(name, "seconds"), slope(name, "flops")) for name in names}


# Shapes of the linear layers of LLaMA-2 and how many of each; the width of the model, its blocks and its tokens
LLAMA = {"LLaMA-2 7B": {(4096, 4096): 4 * 32, (11008, 4096): 2 * 32, (4096, 11008): 32},
         "LLaMA-2 70B": {(8192, 8192): 2 * 80, (1024, 8192): 2 * 80, (28672, 8192): 2 * 80, (8192, 28672): 80}}


def predicted(iterations: int = 15) -> dict[str, Any]:
    """Hours and memory for LLaMA-2 at rank 256 from the account: PREDICTED, nothing of this size was run.

    A shape that was timed takes its seconds; another one the counted operations at the rate of 4096 x 11008, the
    slowest of the three.  Memory grows with n² and m n as fitted to the three 7B shapes.
    """
    timed = {shape: files.read_json(path_of(*shape)) for shape in LLAMA["LLaMA-2 7B"]}
    searched, slowest = search_operations(), timed[4096, 11008]["operations"]["outer iteration"]
    rate = slowest["flops"] / slowest["seconds"]
    peak = lambda row: max(op["peak_memory_bytes"] for op in row["operations"].values())
    system = [[1.0, n * n, m * n] for m, n in timed]
    base, square, area = np.linalg.solve(np.array(system), [peak(row) for row in timed.values()])
    found: dict[str, Any] = {"status": "predicted, not measured", "outer_iterations": iterations, "rank": 256}
    for name, shapes in LLAMA.items():
        seconds = {shape: timed[shape]["operations"]["outer iteration"]["seconds"] if shape in timed
                   else counted(*shape, 256, searched)["outer"] / rate for shape in shapes}
        work = sum(count * counted(*shape, 256, searched)["outer"] for shape, count in shapes.items())
        found[name] = {
            "core_pair_hours": iterations * sum(shapes[shape] * seconds[shape] for shape in shapes) / 3600,
            "operations": iterations * work,
            "largest_layer_bytes": max(base + square * n * n + area * m * n for m, n in shapes),
            "layers": sum(shapes.values())}
    return found


def plot() -> None:
    """Seconds against n beside the arithmetic, and the fraction of this machine's limits at 4096 x 4096."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    slopes = growth()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 6.5), layout="constrained")
    records = {n: files.read_json(path_of(n, n)) for n, _ in GROWTH}
    shown = [name for name in slopes if not name.startswith("apply dense")]
    for name, color in zip(shown, plt.get_cmap("tab20").colors, strict=False):
        seconds = [records[n]["operations"][name]["seconds"] for n in records]
        counted = np.array([records[n]["operations"][name]["flops"] for n in records])
        left.loglog(list(records), seconds, "o-", color=color,
                    label=f"{name}: n^{slopes[name][0]:.2f}, counted n^{slopes[name][1]:.2f}")
        left.loglog(list(records), counted * (seconds[-1] / counted[-1]), ":", color=color)
    left.set(xlabel="n (m = n, rank n / 16)", ylabel="seconds", title="Measured, and as the arithmetic grows (dotted)")
    left.set_xticks(list(records), [str(n) for n in records])
    left.minorticks_off()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    last = records[GROWTH[-1][0]]
    names = list(last["operations"])
    place = np.arange(len(names))
    for shift, field, label in ((-0.2, "of_product_rate", "of the matrix-product rate"),
                                (0.2, "of_bandwidth", "of the memory bandwidth")):
        right.barh(place + shift, [100 * last["operations"][name][field] for name in names], 0.4, label=label)
    right.set_yticks(place, names, fontsize=8)
    right.invert_yaxis()
    top, cores = last["limits"], last["machine"]["cores"]
    right.set(xlabel=f"% of {top['product_flops'] / 1e9:.0f} Gflop/s and of {top['read_bytes'] / 1e9:.0f} GB/s "
                     f"({cores} core{'s' * (cores > 1)})", title="4096 x 4096, rank 256")
    right.legend()
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / "speed.png", dpi=110)


def summarise() -> None:
    """The figure, and growth and prediction in results/speed_summary.json."""
    plot()
    slopes = {name: {"seconds": fitted, "counted": exact} for name, (fitted, exact) in growth().items()}
    files.write_json(RESULTS / "speed_summary.json", {"growth_exponents": slopes, "predicted": predicted()})
    for name, slope in slopes.items():
        print(f"{name:28s} seconds ~ n^{slope['seconds']:.2f}   counted n^{slope['counted']:.2f}")


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--one"]:  # a process of its own: its memory is its own
        config = SpeedConfig(*map(int, arguments[1].split("x")))
        files.write_json(path_of(config.m, config.n), measure(config))
        return
    if arguments != ["--summary"]:
        shapes = [tuple(map(int, name.split("x"))) for name in arguments] or SHAPES
        for m, n in shapes:
            if arguments or not path_of(m, n).exists():
                subprocess.run([sys.executable, __file__, "--one", f"{m}x{n}"], check=True)
    missing = [path_of(*shape).name for shape in SHAPES if not path_of(*shape).exists()]
    if missing:
        sys.exit(f"no summary yet, for want of {', '.join(missing)}: run python experiments/speed.py")
    summarise()


if __name__ == "__main__":
    main(sys.argv[1:])
