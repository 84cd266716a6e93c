"""The whole of a model of 1.5 billion weights at about 2.0, 2.2 and 2.4 bits: E8P, CALDERA, one level; and, for a
small file, embedding and head at the level, too, calibrated on both texts.

    python experiments/wide_model.py [NAME ...]      # all; finished ones are skipped, interrupted ones go on

Each run is what `caldera compress` does, the first calibrated on Wikipedia, in a process of its own; its report goes to
results/wide_model_NAME.json, with what is lost on held-out program text, the model's own domain.  The Moments of all
blocks are kept for the runs that share them: 36 GB of disk.  E8P at 2.2 and 2.4 bits is not asked for: CALDERA spends
these bits on L R.
"""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import drawing
from whole_model import checked

from caldera_jax.jobs import evaluate, explain
from caldera_jax.jobs.compress import compress
from caldera_jax.jobs.presets import PRESETS
from caldera_jax.jobs.settings import RunConfig
from caldera_jax.levels import LevelConfig
from caldera_jax.models import data, files
from caldera_jax.models.data import Tokens

WORK = Path("out/wide_model")
BASE = replace(PRESETS["default"], model="qwen2.5-coder-1.5b")


def of_rank(rank: int) -> RunConfig:
    return replace(BASE, caldera=replace(BASE.caldera, rank=rank, outer_iterations=5))


RUNS = {f"level_{bits}": replace(BASE, bits=bits, level=LevelConfig()) for bits in (2.0, 2.2, 2.4)} | {
    "e8p": of_rank(0), "k64": of_rank(64), "k128": of_rank(128),
    "small": replace(BASE, bits=2.0, level=LevelConfig(), tables="level", counted="model",
                     calibration=Tokens("enwiki+python", 32))}


def path_of(name: str) -> Path:
    """Where a run's report lies."""
    return drawing.RESULTS / f"wide_model_{name}.json"


def record(name: str) -> dict[str, Any]:
    """A run's report; raises as ``whole_model.checked``."""
    return checked(path_of(name), RUNS[name], f"python experiments/{Path(__file__).name} {name}")


def run(name: str) -> None:
    """Make a run's report if it is not there."""
    if path_of(name).exists():
        return
    same = RUNS[name].calibration == BASE.calibration
    report = compress(RUNS[name], out := WORK / name, WORK / "moments" if same else None)
    _, config, base, model = explain.opened(out)
    tokens = data.windows_beside(model, replace(config.evaluation, text="python"), config.calibration.text,
                                 "evaluation")
    found = evaluate.compare(model.config, base.params, model.params, tokens, title="program text")
    dense, loss, divergence = (evaluate.mean(x)[0] for x in (found.base_loss, found.loss, found.divergence))
    files.write_json(path_of(name), report | {"python": {
        "base_perplexity": math.exp(dense), "compressed_perplexity": math.exp(loss), "lost": loss - dense,
        "divergence": divergence, "evaluated_tokens": found.loss.size}})
    shutil.rmtree(out)  # most of it the dense embedding


def main(names: list[str]) -> None:
    if unknown := [name for name in names if name not in RUNS]:
        raise ValueError(f"no run is called {unknown[0]!r}: choose from {', '.join(RUNS)}")
    for name in names or RUNS:
        if len(names) == 1:
            run(name)
        else:  # in a process of its own, whose memory is this run's
            subprocess.run([sys.executable, __file__, name], check=True, stdout=subprocess.DEVNULL)
        row = record(name)
        print(json.dumps({"run": name, **{key: row[key] for key in (
            "base_perplexity", "compressed_perplexity", "bits_per_weight", "python")},
            "seconds": row["seconds"]["total"], "peak_memory_bytes": row["peak_memory_bytes"]}), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"wide_model.py: {error}")
