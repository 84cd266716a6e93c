"""What one block of LLaMA-2 7B costs: the paper's preset on random weights of the true shapes, few iterations.

    python experiments/dry_run.py                      # LLaMA-2 7B, about ten minutes on two quiet cores
    python experiments/dry_run.py --shapes smoke       # seconds

Writes a random model of one block as a Hugging Face directory with a tokenizer of random words, and a text of them, to
a temporary directory, runs ``caldera compress DIRECTORY --preset paper`` with what ``Config`` cuts, and records seconds
by stage, by layer and by iteration, and peak memory in results/dry_run.json.  Errors and perplexities of random
weights say nothing and are not kept.  The hours of the whole preset on the whole model are computed from that.
"""

import dataclasses
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import drawing
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from published import SHAPES
from tokenizers import Tokenizer, models, pre_tokenizers

from caldera_jax.jobs import report
from caldera_jax.jobs.presets import PRESETS
from caldera_jax.models import convert, files, llama
from caldera_jax.models.llama import LlamaConfig

MODELS = {name.replace(" ", "-").lower(): config for name, config in SHAPES.items()}
MODELS["smoke"] = LlamaConfig(512, 64, 3, 2, 2, 32, 64, context=1024)  # layers of one shape: one compilation


@dataclasses.dataclass(frozen=True)
class Config:
    """The shapes, and what is cut of the preset and of the model; everything else is as in the preset."""

    shapes: Literal["llama-2-7b", "llama-3-8b", "smoke"] = "llama-2-7b"
    vocab: int = 8192  # words; more than inputs, so that no Hessian is singular for want of words
    outer_iterations: int = 1
    inner_iterations: int = 50
    refine_passes: int = 10
    svd: Literal["exact", "randomized"] = "exact"
    calibration_windows: int = 16
    evaluation_windows: int = 4
    processes: int = 0  # 0: one process on all cores, as memory holds no second layer of this width
    seed: int = 0

    @property
    def model(self) -> LlamaConfig:
        """One block of the model, its embedding cut to ``vocab`` words."""
        whole = MODELS[self.shapes]
        return dataclasses.replace(whole, layers=1, vocab=min(self.vocab, whole.vocab))


SMOKE = Config("smoke", inner_iterations=2, refine_passes=1, calibration_windows=2, evaluation_windows=1)


def write_model(directory: Path, config: LlamaConfig, seed: int) -> Path:
    """Random bfloat16 weights and a tokenizer of one token a word, as a Hugging Face directory."""
    convert.save_hf(directory, config, jax.device_get(llama.init(jax.random.key(seed), config, jnp.bfloat16)))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config.vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def write_text(path: Path, config: LlamaConfig, tokens: int, seed: int) -> Path:
    """Paragraphs of uniformly random words, for so many tokens of calibration and evaluation each on its side."""
    words = np.random.default_rng(seed).integers(0, config.vocab, (-(-5 * tokens // 256), 256))
    path.write_text("\n\n".join(" ".join(f"w{i}" for i in row) for row in words))
    return path


def arguments(config: Config, model: str, text: str, out: str) -> list[str]:
    """Those of ``caldera``."""
    window = min(PRESETS["paper"].calibration.window, config.model.context)
    given = {"preset": "paper", "outer_iterations": config.outer_iterations,
             "inner_iterations": config.inner_iterations, "refine_passes": config.refine_passes, "svd": config.svd,
             "calibration_text": text, "calibration_windows": config.calibration_windows,
             "calibration_window": window, "evaluation_text": text, "evaluation_windows": config.evaluation_windows,
             "processes": config.processes}
    options = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return ["compress", model, "--out", out, *options]


def measure(config: Config) -> dict[str, Any]:
    """Run it, in a process of its own; what it took, and what the whole would take."""
    cut, tokens = config.model, config.calibration_windows * 1024 + config.evaluation_windows * 512
    with TemporaryDirectory() as folder:
        place = Path(folder)
        model, text = write_model(place / "model", cut, config.seed), write_text(place / "text.txt", cut, tokens, 1)
        command = arguments(config, str(model), str(text), str(place / "out"))
        subprocess.run([sys.executable, "-m", "caldera_jax.jobs.cli", *command], check=True)
        found = files.read_json(place / "out" / "report.json")
    return record(config, found)


def record(config: Config, found: dict[str, Any]) -> dict[str, Any]:
    """What is kept of the report of the run: nothing that depends on where it ran."""
    layers = [{"layer": row["path"].rpartition(".")[2], "shape": row["shape"], "seconds": row["seconds"],
               "compile_seconds": row["compile_seconds"],
               "seconds_per_outer_iteration": steady(row) / config.outer_iterations} for row in found["layers"]]
    return {**report.provenance(config, config.seed),
            "command": " ".join(["caldera", *arguments(config, "DIRECTORY", "text.txt", "OUT")]),
            "caldera": found["config"]["caldera"], "seconds": found["seconds"], "stages": found["stages"],
            "peak_memory_bytes": found["peak_memory_bytes"], "layers": layers, "computed": computed(config, found)}


def steady(row: dict[str, Any]) -> float:
    """Seconds without compilation."""
    return row["seconds"] - row["compile_seconds"]


def computed(config: Config, found: dict[str, Any]) -> dict[str, Any]:
    """Hours of the whole preset on the whole model and this machine.

    Compression: blocks · outer iterations of the preset · seconds of an outer iteration here, in which what is done
    once for a layer (rotation, factors of H) counts in full.  Calibration: blocks · windows of the preset / windows.
    """
    whole, preset = MODELS[config.shapes], PRESETS["paper"]
    ratio = preset.caldera.outer_iterations / config.outer_iterations
    windows = preset.calibration.windows / config.calibration_windows
    compress = whole.layers * ratio * sum(map(steady, found["layers"])) / 3600
    calibrate = whole.layers * windows * steady(found["stages"]["calibrate"]) / 3600
    same = all(getattr(config, name) == getattr(preset.caldera, name)
               for name in ("inner_iterations", "refine_passes", "svd"))
    return {"status": "computed from one block, not measured", "model": config.shapes, "blocks": whole.layers,
            "outer_iterations": preset.caldera.outer_iterations, "an_iteration_is_the_presets": same,
            "compress_hours": compress, "calibrate_hours": calibrate, "hours": compress + calibrate}


def path_of(config: Config) -> Path:
    """Where the record lies: dry_run.json, with the name of the shapes where they are not the usual ones."""
    other = "" if config.shapes == Config().shapes else f"_{config.shapes}"
    return drawing.RESULTS / f"dry_run{other}.json"


def main(config: Config) -> None:
    """Run it and write its record; ``--shapes smoke`` alone cuts the rest, too."""
    config = SMOKE if config == Config("smoke") else config
    found = measure(config)
    files.write_json(path_of(config), found)
    rows = [f"  {row['layer']:5s} {' x '.join(map(str, row['shape'])):14s} {row['seconds_per_outer_iteration']:8.1f} s "
            "an outer iteration" for row in found["layers"]]
    print("\n".join([found["command"], *rows, f"  peak memory {found['peak_memory_bytes'] / 1e9:.1f} GB; whole preset, "
                     f"{found['computed']['status']}: {found['computed']['hours']:.1f} hours"]))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
