"""What the claims share: instances to stress them, real layers, one record a claim, one look for the figures."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tests"))

from matrices import decaying, gaussian, heavy_tailed, hessian, orthogonal, with_spectrum  # noqa: E402, F401

from caldera_jax import calibration, files, report  # noqa: E402
from caldera_jax.models import convert, data, llama  # noqa: E402

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
