"""What one accelerator can tell, in one command of at most six minutes: is everything right there, and how fast is it?

    python experiments/accelerator.py                    # results/accelerator_DEVICE.json, and a table
    python experiments/accelerator.py --parts job --model DIRECTORY --text FILE     # accelerator_DEVICE_job.json
    python experiments/accelerator.py --preset smoke     # tiny sizes, about a minute on a CPU

    kernels   each kernel's public function as it runs here, against plain JAX in float64 on the CPU of the same host
    encode    the E8P search
    apply     packed layers against dense matrices, float32 and half precision; copies in turn, for no cache to help
    method    block LDLQ, and one outer iteration
    layer     a layer compressed here and on the host's CPU: errors within 0.5 %.  Where this is the CPU, the other
              side is float64, and with that another rotation is drawn
    job       `caldera compress MODEL --preset smoke`, then `caldera generate`

A row is recorded when it is measured, and the peak memory since the start after each part.  What fails is recorded, and
the rest goes on; what has no time left (--limit) is recorded as such.  Fractions are of the device's published peaks,
or of what was measured here where ``devices`` has none.  float32 products have precision "highest".  Calls are
dispatched ahead and waited for together; ``smallest_call_seconds`` is what that costs at least.

A bare machine needs this checkout, Python >= 3.11, JAX for its device, a model and a text.  JAX_PLATFORMS stays unset,
or names cpu as well.

    pip install "jax[cuda13]" && pip install -e .        # or jax[cuda12], jax[tpu]
    caldera fetch smollm2-135m enwiki && python experiments/accelerator.py

``XLA_FLAGS=--xla_gpu_enable_triton_gemm=false`` before it halves the time on a GPU, nearly all of it compiling.

Where it has no network, run this beside one, with the same Python and processor, and carry wheels/ and cache/ along:

    pip wheel -w wheels . "jax[cuda13]" && CALDERA_CACHE=cache caldera fetch smollm2-135m enwiki
    pip install --no-index --find-links wheels caldera-jax "jax[cuda13]"                      # there
    CALDERA_CACHE=$PWD/cache python experiments/accelerator.py                                # there

If it has JAX already, the wheels that it lacks (tyro and gguf, say) and PYTHONPATH=. are enough.  Without the built-in
model, ``--model random`` does the job on random weights.
"""

import dataclasses
import io
import math
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import devices
import drawing
import dry_run
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from devices import Peaks, Row, half_dtype, in_turn, rated, timed
from speed import E8P2, E8P4, INNER, counted, packed_layer, problem, search_operations

import caldera_jax as cj
from caldera_jax import hessian, kernels, lattice, linear
from caldera_jax.jobs import cli, report
from caldera_jax.kernels import e8p, hadamard, matmul
from caldera_jax.ldlq import ldlq
from caldera_jax.models import data, files

Rows = Iterator[tuple[str, Callable[[], Row]]]  # a part: names, and what measures each
SHARES = {"kernels": 80, "encode": 25, "apply": 70, "method": 60, "layer": 60, "job": 90}  # of the time that is left
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
TWO, FOUR = (1.0,), (1.0, 1 / E8P4.residual_scale)  # 2 and 4 bits, as ``kernels.matmul`` decodes them
EPS = float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run."""

    parts: tuple[Literal["kernels", "encode", "apply", "method", "layer", "job"], ...] = tuple(SHARES)
    preset: Literal["full", "smoke"] = "full"
    model: str | None = None  # of the job, as `caldera compress` takes it, or random; none: smollm2-135m, smoke: random
    text: str = "enwiki"  # of the job: a built-in text or a file
    limit: float = 330.0  # seconds
    seed: int = 0


class Sizes(NamedTuple):
    """Of what is measured.  ``cold``: bytes that calls in turn must touch; ``budget``: seconds of a measurement;
    ``apart``: how far two errors of a layer may differ, where few weights are few samples."""

    encoded: tuple[tuple[int, ...], ...] = ((1, 8), (3, 5, 16), (1001, 4096))
    transformed: tuple[tuple[int, ...], ...] = ((3, 1), (5, 9), (7, 576), (33, 4096), (16, 11008))
    products: tuple[tuple[int, int, int], ...] = ((1101, 2101, 20), (4096, 4096, 256))  # m, n, rank
    rows: tuple[int, ...] = (1, 16, 512)
    weights: tuple[int, ...] = (1 << 16, 1 << 20, 1 << 24, 1 << 26)
    layers: tuple[tuple[int, int, int], ...] = ((4096, 4096, 256), (11008, 4096, 256))
    cold: float = 256e6
    budget: float = 0.5
    apart: float = 0.005


SIZES = {"full": Sizes(), "smoke": Sizes(((3, 5, 16),), ((7, 12),), ((43, 21, 3),), (5,), (1 << 14,), ((96, 128, 8),),
                                         0, 0.02, 0.05)}


class Run(NamedTuple):
    """What a part is given; it should be done when the clock (``perf_counter``) says ``until``."""

    config: Config
    sizes: Sizes
    peaks: Peaks
    until: float


SEARCH, DECODE = jax.jit(e8p.reference), jax.jit(lattice.e8p_decode)
TURN = jax.jit(hadamard.reference, static_argnames="inverse")
PRODUCT = jax.jit(matmul.reference, static_argnames=("stages", "m"))


def on_cpu(f: Callable[..., Any], *args: Any) -> Any:
    """A jitted f on the host's CPU, in double precision where an argument has it; gives NumPy arrays."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        return jax.device_get(f(*jax.device_get(args)))


def gaussian(seed: int, shape: tuple[int, ...], dtype, size: float = 1.0) -> tuple[jax.Array, np.ndarray]:
    """Numbers of a dtype on the device, and the same in float64."""
    x = jnp.asarray(size * np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(dtype)
    return x, np.asarray(x.astype(jnp.float32), np.float64)


def check(f: Callable[..., Any], reference: Callable[..., Any], shape: tuple[int, ...], dtype, tolerance: float,
          seed: int, *more: Any) -> Row:
    """The largest relative error of a vector along the last axis."""
    x, exact = gaussian(seed, shape, dtype)
    with jax.default_matmul_precision("highest"):
        y = np.asarray(jax.jit(f)(x, *more).astype(jnp.float32), np.float64)
    wanted = on_cpu(reference, exact, *more)
    error = float(np.max(np.linalg.norm(y - wanted, axis=-1) / (np.linalg.norm(wanted, axis=-1) + 1e-30)))
    return {"relative_error": error, "tolerance": tolerance, "ok": error <= tolerance}


def check_encode(shape: tuple[int, ...], dtype, seed: int) -> Row:
    """Where two codewords are equally near, to rounding, the code may be another than the reference finds in float32.

    The error is how much farther a codeword is than the nearest, squared, over 1 + |x|²; if its code stands for
    another, infinite.
    """
    x, exact = gaussian(seed, shape, dtype, 1.5)
    values, codes = jax.device_get(jax.jit(lambda x: e8p.encode(x))(x))
    nearest, wanted = on_cpu(SEARCH, exact.astype(np.float32))
    apart = lambda a: np.asarray(a, np.float64).reshape(-1, 8)
    far = lambda a: np.sum((apart(a) - apart(exact)) ** 2, axis=1)
    error = float(np.max((far(values) - far(nearest)) / (1 + np.sum(apart(exact) ** 2, axis=1))))
    if not np.array_equal(apart(on_cpu(DECODE, codes)), apart(values)):
        error = math.inf
    return {"relative_error": max(error, 0.0), "tolerance": 32 * EPS, "ok": error <= 32 * EPS, "codes": codes.size,
            "codes_differ": int(np.sum(codes != wanted))}


def check_kernels(run: Run) -> Rows:
    """Tolerances: half an eps for each rounding.  A transform rounds for each of at most four Kronecker factors; a
    product in half precision rounds the weights, what L takes, and the result.  A float32 sum errs by about √n eps."""
    seed, sizes = run.config.seed, run.sizes
    for dtype in DTYPES:
        name, eps = jnp.dtype(dtype).name, float(jnp.finfo(dtype).eps)
        for shape in sizes.encoded:
            yield f"e8p.encode {list(shape)} {name}", partial(check_encode, shape, dtype, seed)
        for shape, inverse in ((shape, inverse) for shape in sizes.transformed for inverse in (False, True)):
            both = (partial(f, inverse=inverse) for f in (hadamard.transform, TURN))
            yield (f"hadamard.transform {list(shape)} {name}{' inverse' * inverse}",
                   partial(check, *both, shape, dtype, 2 * eps + 8 * EPS, seed))
        for m, n, k in sizes.products:
            layer, tolerance = packed_layer(m, n, k), (eps > EPS) * 1.5 * eps + math.sqrt(n) * EPS
            factors = (layer.q, layer.left_t, layer.right), (TWO, FOUR, FOUR), m
            alone = (layer.right, None, None), (FOUR, None, None), k
            for b, (parts, stages, out) in [*((b, factors) for b in sizes.rows), (sizes.rows[-1], alone)]:
                both = (partial(f, stages=stages, m=out) for f in (matmul.multiply, PRODUCT))
                yield (f"matmul.multiply {b} x {out} x {n}, {'rank ' + str(k) if out == m else '4 bits'}, {name}",
                       partial(check, *both, (b, n), dtype, tolerance, seed, parts))


def against(plain: Row, row: Row) -> Row:
    """Plain JAX beside the kernel that runs here, or beside itself."""
    return {"plain_seconds": plain["seconds"], "plain_compile_seconds": plain["compile_seconds"],
            "plain_over_kernel": plain["seconds"] / row["seconds"]}


def encode(run: Run) -> Rows:
    """float32 in; values and codes out.  Operations are elementwise: without multiply-adds half of the peak is all."""
    def measure(count: int) -> Row:
        x, _ = gaussian(0, (-(-count // 4096), min(count, 4096)), jnp.float32)
        row, plain = (timed(f, [(one,) for one in in_turn(x, run.sizes.cold)], run.sizes.budget)
                      for f in (lambda x: e8p.encode(x), e8p.reference))
        return {**rated(run.peaks, row, search_operations() * count, 8.25 * count),
                "weights_per_second": count / row["seconds"], **against(plain, row)}

    for count in run.sizes.weights:
        yield f"e8p.encode, {count} weights", partial(measure, count)


def apply(run: Run) -> Rows:
    """Bytes: what is stored, x and y, each once."""
    def measure(b: int, m: int, n: int, k: int, dtype, layers, matrices) -> Row:
        x, s = jnp.ones((b, n), dtype), jnp.dtype(dtype).itemsize
        packed, dense = (timed(cj.apply, [(one, x) for one in weights], run.sizes.budget, dtype)
                         for weights in (layers, matrices))
        dense = rated(run.peaks, dense, 2.0 * b * m * n, s * (m * n + b * (m + n)), dtype)
        return {**rated(run.peaks, packed, 2.0 * b * (m * n + k * (m + n)),
                        layers[0].stored_bits / 8 + s * b * (m + n), dtype),
                **{f"dense_{name}": value for name, value in dense.items()},
                "packed_over_dense": packed["seconds"] / dense["seconds"]}

    for m, n, k in run.sizes.layers:
        layers, (w, _) = in_turn(packed_layer(m, n, k), run.sizes.cold), problem(m, n)
        for dtype in (jnp.float32, half_dtype()):
            matrices = in_turn(w.astype(dtype), run.sizes.cold)
            for b in run.sizes.rows:
                yield (f"apply {b} x {m} x {n}, rank {k}, {jnp.dtype(dtype).name}",
                       partial(measure, b, m, n, k, dtype, layers, matrices))


def method(run: Run) -> Rows:
    """4-bit factors, subspace iteration, float32.  Bytes: W, Q and H once; for an iteration L R as well."""
    def measure(name: str, matrices: int, f, w, factors, k: int) -> Row:
        (m, n), row = w.shape, timed(f, [(w, factors)], 4 * run.sizes.budget)
        return rated(run.peaks, row, counted(m, n, k, search_operations())[name], 4.0 * n * (matrices * m + n))

    def beside_plain(*args: Any) -> Row:
        with kernels.use("jax"):
            plain = measure(*args)
        jax.clear_caches()  # of what was traced so
        row = measure(*args)
        return {**row, **against(plain, row)}

    for m, n, k in run.sizes.layers:
        w, h = problem(m, n)
        with jax.default_matmul_precision("highest"):
            factors = jax.jit(hessian.factor, static_argnums=(1, 2))(h, 0.01, 8)
        once = cj.CalderaConfig(rank=k, outer_iterations=1, inner_iterations=INNER, svd="randomized")
        whole = partial(lambda config, w, f: cj.caldera(jax.random.key(0), w, f, config), once)
        yield (f"block LDLQ {m} x {n}",
               partial(beside_plain, "ldlq", 2, lambda w, f: ldlq(w, E8P2, f), w, factors, k))
        yield f"outer iteration {m} x {n}, rank {k}", partial(measure, "outer", 3, whole, w, factors, k)


def layer(run: Run) -> Rows:
    """Two outer iterations on each side; the error is that of the packed layer."""
    (m, n, k), (device, cpu) = run.sizes.layers[0], (jax.devices()[0], jax.devices("cpu")[0])
    config = cj.CalderaConfig(rank=k, outer_iterations=2, inner_iterations=INNER, svd="randomized")
    clock, matrices, errors = report.Clock(), jax.device_get(problem(m, n)), []

    def compress(where: jax.Device, dtype) -> Row:
        with jax.enable_x64(dtype == np.float64), jax.default_device(where), clock.part() as spent:
            w, h = (jnp.asarray(a, dtype) for a in matrices)
            packed, _ = cj.compress_matrix(jax.random.key(run.config.seed), w, h, config)
            errors.append(float(cj.relative_error(w, linear.dense(packed), h)))
        return {**spent, "relative_error": errors[-1], "bits_per_weight": packed.stored_bits / (m * n)}

    def other(dtype) -> Row:
        row, apart = compress(cpu, dtype), abs(errors[1] / errors[0] - 1)
        return {**row, "difference": apart, "ok": apart <= run.sizes.apart}

    yield f"compress {m} x {n}, rank {k}, {device.device_kind}", partial(compress, device, np.float32)
    dtype = np.float64 if device == cpu else np.float32
    yield f"compress {m} x {n}, rank {k}, cpu, {np.dtype(dtype)}", partial(other, dtype)


def job(run: Run) -> Rows:
    """The commands themselves; FileNotFoundError where the model or the text is not at hand."""
    with TemporaryDirectory() as folder:
        model, text, out = *source(run.config, Path(folder)), str(Path(folder) / "out")
        names = ("base_perplexity", "compressed_perplexity", "bits_per_weight", "mean_layer_error", "stages")

        def compress() -> Row:
            says(run, "compress", model, "--out", out, "--preset", "smoke", "--processes", "0",
                 "--calibration-text", text, "--evaluation-text", text)
            found = files.read_json(Path(out) / "report.json")
            return {**{name: found[name] for name in names}, "seconds": found["seconds"]["total"],
                    "compile_seconds": found["seconds"]["compile"]}

        yield f"caldera compress {Path(model).name}", compress
        yield "caldera generate", lambda: {"said": says(run, "generate", out, "The capital is", "--tokens", "8")}


def source(config: Config, place: Path) -> tuple[str, str]:
    """The model and the text of the job."""
    model = config.model or ("random" if config.preset == "smoke" else "smollm2-135m")
    if model == "random":
        shapes = dry_run.MODELS["smoke"]
        return (str(dry_run.write_model(place / "random", shapes, config.seed)),
                str(dry_run.write_text(place / "text.txt", shapes, 4096, config.seed)))
    for name, known in ((model, data.MODELS), (config.text, data.TEXTS)):
        if name in known and not (data.cache_directory() / Path(known[name].member).name).is_file():
            raise FileNotFoundError(f"{name} is not in the cache: `caldera fetch {name}`, or give --model and --text")
    return model, config.text


def says(run: Run, *arguments: str) -> str:
    """What ``caldera`` prints, in a process of its own; in this one on a TPU, which admits no other."""
    if jax.default_backend() == "tpu":
        with patch.object(sys, "argv", ["caldera", *arguments]), redirect_stdout(io.StringIO()) as said:
            cli.main()
        return said.getvalue()
    done = subprocess.run([sys.executable, "-m", "caldera_jax.jobs.cli", *arguments], capture_output=True, text=True,
                          timeout=max(run.until - time.perf_counter(), 20))
    if done.returncode:
        raise RuntimeError(f"caldera {arguments[0]} ended with {done.returncode}: {done.stderr[-800:]}")
    return done.stdout


PARTS = {"kernels": check_kernels, "encode": encode, "apply": apply, "method": method, "layer": layer, "job": job}
NOTES = {"relative_error": "error {:.2g}", "tolerance": "at most {:.2g}", "codes_differ": "{} codes differ",
         "weights_per_second": "{:.3g} weights/s", "packed_over_dense": "{:.2f} times dense",
         "plain_over_kernel": "plain JAX {:.1f} times as long",
         "difference": "differs by {:.2%}", "error": "{}", "message": "{!r:.80}", "said": "{!r:.80}"}


def clean(value: Any) -> Any:
    """As JSON takes it: of absolute paths the last names, and for numbers that are not finite words."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return re.sub(r"(?<![\w/.])/(?:[\w.@+~=-]+/)*([\w.@+~=-]*)", r"\1", value) if isinstance(value, str) else value


def failure(error: Exception) -> Row:
    """An error as a row."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return {"ok": False, "error": type(error).__name__, "message": str(error)[:2000], "traceback": lines[-12:]}


def attempt(part: Callable[[Run], Rows], run: Run, keep: Callable[[Row], None]) -> str:
    """Measure the rows of a part and keep each; says how it ended."""
    bad, end = [], "ok"
    try:
        for count, (name, measure) in enumerate(part(run)):
            if time.perf_counter() > run.until:
                end = f"stopped: out of time after {count} rows"
                break
            try:
                row = {"name": name, **measure()}
            except Exception as error:  # whatever it is, the next row may tell more
                row = {"name": name, **failure(error)}
            bad += [name] * (not row.get("ok", True))
            keep(row)
    except FileNotFoundError as reason:
        end = f"skipped: {reason}"
    except Exception as error:
        bad.append("preparation")
        keep({"name": "preparation", **failure(error)})
    return f"not ok: {len(bad)} rows, the first {bad[0]}" if bad else end


def line(row: Row) -> str:
    """A row of the table."""
    times = f"{1e6 * row['seconds']:12.1f} {row['compile_seconds']:8.2f}" if "seconds" in row else " " * 21
    parts = " ".join(f"{row[name]:9.2%}" if name in row else " " * 9 for name in ("of_flops", "of_memory"))
    notes = "; ".join(form.format(row[name]) for name, form in NOTES.items() if name in row)
    return f"{'  ' if row.get('ok', True) else '! '}{row['name']:56s} {times} {parts}  {notes}"


def path_of(config: Config) -> Path:
    """results/accelerator_DEVICE.json; with the names of the parts where they are not all."""
    kind = re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")
    parts = "" if set(config.parts) == set(SHARES) else "_" + "-".join(config.parts)
    return drawing.RESULTS / f"accelerator_{kind}{parts}{'_smoke' * (config.preset == 'smoke')}.json"


def begin(config: Config) -> tuple[Row, Peaks]:
    """The head of the record, and the peaks to compare with."""
    device = jax.devices()[0]
    try:
        sizes = SIZES[config.preset]
        here, least = devices.measured(sizes.cold, sizes.budget)
    except Exception as error:
        here, least = Peaks(math.nan, math.nan, math.nan, f"not measured: {error}"), math.nan
    peaks = devices.DEVICES.get(device.device_kind, here)
    print(f"{device.device_kind}, JAX {jax.__version__}, peaks: {peaks.source}\n"
          f"  {'':56s} microseconds  compile  of flops of memory")
    return {**report.provenance(config, config.seed), "kernel_mode": kernels.mode(),
            "xla_flags": os.environ.get("XLA_FLAGS", ""), "platform": device.platform,
            "runtime": device.client.platform_version, "peaks": peaks._asdict(), "measured_peaks": here._asdict(),
            "smallest_call_seconds": least, "parts": {}}, peaks


def measure(config: Config) -> Row:
    """Run the parts, and write the record after each row."""
    start, target, (record, peaks) = time.perf_counter(), path_of(config), begin(config)
    target.parent.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(config.parts):
        begun, part = time.perf_counter(), record["parts"].setdefault(name, {"status": "not done", "rows": []})
        until = begun + SHARES[name] / sum(map(SHARES.get, config.parts[i:])) * (start + config.limit - begun)

        def keep(row: Row, part: Row = part) -> None:
            print(line(row), flush=True)
            part["rows"].append(row)
            files.write_json(target, clean(record))

        part["status"] = "skipped: out of time" if until <= begun else attempt(
            PARTS[name], Run(config, SIZES[config.preset], peaks, until), keep)
        part |= {"seconds": time.perf_counter() - begun, **memory()}
        files.write_json(target, clean(record))
        print(f"{name}: {part['status']}; {part['seconds']:.1f} s; peak memory: {part['peak_device_bytes']} on the "
              f"device, {part['peak_host_bytes']} on the host", flush=True)
    return record


def memory() -> Row:
    """Peak memory since the start; that of a device is not always told."""
    told = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", "not told")
    return {"peak_device_bytes": told, "peak_host_bytes": report.peak_memory()}


def main(config: Config) -> None:
    """Exit code 1 where something failed, or is farther off than it may be."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the job needs memory beside this process
    record = measure(config)
    print(f"written: {path_of(config).name}")
    sys.exit(any(part["status"].startswith("not ok") for part in record["parts"].values()))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
