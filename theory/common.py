"""What the claims share: instances to stress them, real layers, one record a claim, one look for the figures."""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tests"))

from matrices import decaying, gaussian, heavy_tailed, hessian, orthogonal, with_spectrum  # noqa: E402, F401

from caldera_jax import CalderaConfig, HessianFactors, caldera  # noqa: E402
from caldera_jax import incoherence as rotations  # noqa: E402
from caldera_jax.codebooks import by_bits, quantize  # noqa: E402
from caldera_jax.decompose import Trace  # noqa: E402
from caldera_jax.hessian import factor  # noqa: E402
from caldera_jax.jobs import calibration, report  # noqa: E402
from caldera_jax.models import convert, data, files, llama  # noqa: E402
from caldera_jax.objective import proxy_loss  # noqa: E402

jax.config.update("jax_enable_x64", True)

SPECTRA = ("flat", "geometric", "power", "spiked", "deficient")
WEIGHTS = {"gaussian": gaussian, "heavy-tailed": heavy_tailed, "decaying": decaying}
WIDTH = 3.4  # inches of a column in print


def layers(block: int = 14) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(W, H) in float64 of the seven linear layers of one block of SmolLM2-135M: q, k, v, o, gate, up, down.

    H of 24 windows of 512 tokens of enwiki, undamped, divided by its mean diagonal.  Made once, then kept in the cache.
    """
    path = data.cache_directory() / f"layers_smollm2-135m_{block}_24x512.safetensors"
    if not path.is_file():
        model = convert.load("smollm2-135m")
        tokens = data.token_windows(model.tokenizer, data.load_text("enwiki"), 512, 24)
        pairs = calibration.of_block(model.config, model.params, tokens, block)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_arrays(path, {f"{name}.{part}": np.ascontiguousarray(a) for name, pair in pairs.items()
                                  for part, a in zip("wh", pair, strict=True)})
    arrays = {key: value.astype(np.float64) for key, value in files.read_arrays(path).items()}
    scaled = lambda h: (h + h.T) / (2 * np.mean(np.diag(h)))
    return {name: (arrays[f"{name}.w"], scaled(arrays[f"{name}.h"])) for name in llama.LINEARS}


def matrix(kind: str, m: int, n: int, seed: int = 0) -> np.ndarray:
    """A [m, n] with the spectrum that ``hessian`` gives to H, or Gaussian."""
    if kind == "gaussian":
        return gaussian(m, n, seed)
    return orthogonal(max(m, n), seed + 1)[:m, :n] @ hessian(kind, n, seed)


def loss(e: np.ndarray, h: np.ndarray) -> float:
    """tr(E H Eᵀ), as the package scores it."""
    return float(proxy_loss(jnp.asarray(e), jnp.asarray(h)))


class Parts(NamedTuple):
    """W ≈ Q + L R in the rotated basis with W of mean square 1, and what the bounds need besides."""

    w: np.ndarray
    q: np.ndarray
    lr: np.ndarray
    factors: HessianFactors
    trace: Trace

    @property
    def e(self) -> np.ndarray:
        """E = Q + L R − W."""
        return self.q + self.lr - self.w

    @property
    def energy(self) -> float:
        """tr(W H Wᵀ) for the undamped H."""
        return float(np.sum((self.w @ self.factors.h) * self.w))


def decompose(seed: int, w: np.ndarray, h: np.ndarray, config: CalderaConfig, dtype=np.float32) -> Parts:
    """The package's pipeline up to packing, its parts left open: scale, rotate, factor, ``caldera``."""
    w, q, lr, factors, trace = _decompose(jax.random.key(seed), w.astype(dtype), h.astype(dtype), config)
    wide = lambda a: np.asarray(a, np.float64)
    return Parts(wide(w), wide(q), wide(lr), HessianFactors(*map(wide, factors)), Trace(*map(wide, trace)))


@partial(jax.jit, static_argnums=3)
@jax.default_matmul_precision("highest")
def _decompose(key, w, h, config):
    rotate_key, key = jax.random.split(key)
    w, h, _ = rotations.rotate(rotate_key, w / jnp.sqrt(jnp.mean(w**2)), h, config.rotation)
    factors = factor(h, config.damping, config.block)
    found, trace = caldera(key, w, factors, config)
    zero = jnp.zeros_like(w)
    return (w, found.q.values if found.q else zero, found.low_rank.dense() if found.low_rank else zero, factors, trace)


def rounding_error(bits: int, seed: int = 0) -> float:
    """c_B: mean squared error of the package's B-bit grid (as ``by_bits("e8p", B)``) on unit Gaussian numbers."""
    x = jnp.asarray(gaussian(256, 1024, seed), jnp.float32)
    return float(jnp.mean((quantize(by_bits("e8p", bits), x).values - x) ** 2))


def run(file: str, config: Any, measure: Callable[[Any], dict[str, Any]], draw: Callable[[dict[str, Any]], Any]):
    """Measure a claim as ``config`` says, unless its record is there, and draw the record.

    Writes results/NAME.json and figures/NAME.png.  A record of another configuration is made again.
    """
    name = Path(file).stem
    path = HERE / "results" / f"{name}.json"
    if not path.is_file() or files.read_json(path)["config_hash"] != report.config_hash(config):
        files.write_json(path, {**report.provenance(config, config.seed), **measure(config)})
        print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    figure = draw(files.read_json(path))
    target = HERE / "figures" / f"{name}.png"
    figure.savefig(partial := target.with_suffix(".part.png"), dpi=220)
    os.replace(partial, target)
    print(f"drawn: {target.relative_to(Path.cwd()) if target.is_relative_to(Path.cwd()) else target}")


def axes(columns: int = 1, rows: int = 1, height: float = 2.3):
    """A figure of ``columns`` panels, each legible at the width of a column in print."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 7, "axes.titlesize": 7, "legend.fontsize": 6, "lines.linewidth": 1,
                            "lines.markersize": 3, "axes.grid": True, "grid.linewidth": 0.3, "legend.framealpha": 0.7})
    figure, panels = pyplot.subplots(rows, columns, figsize=(WIDTH * columns, height * rows), layout="constrained",
                                     squeeze=False)
    return figure, panels.ravel() if columns * rows > 1 else panels[0, 0]
