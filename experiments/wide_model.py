"""The whole of a model of 1.5 billion weights at about 2.0, 2.2 and 2.4 bits: E8P, CALDERA, one level.

    python experiments/wide_model.py [NAME ...]      # all; finished ones are skipped, interrupted ones go on

Each run is one `caldera compress`, calibrated on Wikipedia; its report goes to results/wide_model_NAME.json, with what
is lost on held-out program text, the model's own domain.  The Moments of all blocks are kept for the next run: 36 GB of
disk.  E8P at 2.2 and 2.4 bits is not asked for: CALDERA spends these bits on L R.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import drawing
import numpy as np

from caldera_jax.jobs import evaluate, explain
from caldera_jax.jobs.compress import compress
from caldera_jax.jobs.presets import PRESETS
from caldera_jax.jobs.settings import RunConfig, recorded
from caldera_jax.levels import LevelConfig
from caldera_jax.models import data, files

WORK = Path("out/wide_model")
BASE = replace(PRESETS["default"], model="qwen2.5-coder-1.5b")


def of_rank(rank: int) -> RunConfig:
    return replace(BASE, caldera=replace(BASE.caldera, rank=rank, outer_iterations=5))


RUNS = {f"level_{bits}": replace(BASE, bits=bits, level=LevelConfig()) for bits in (2.0, 2.2, 2.4)} | {
    "e8p": of_rank(0), "k64": of_rank(64), "k128": of_rank(128),
    "level_2.0_whole_tokens": replace(BASE, bits=2.0, level=LevelConfig(), token_cap=0.0)}


def path_of(name: str) -> Path:
    """Where a run's report lies."""
    return drawing.RESULTS / f"wide_model_{name}.json"


def record(name: str) -> dict[str, Any]:
    """A run's report; ValueError where it is missing or of another configuration."""
    command = f"python experiments/{Path(__file__).name} {name}"
    if not (path := path_of(name)).is_file():
        raise ValueError(f"{path.name} is missing: {command}")
    found = files.read_json(path)
    if recorded(found["config"]) != RUNS[name]:
        raise ValueError(f"{path.name} is of another configuration: delete it, then {command}")
    return found


def run(name: str) -> None:
    """Make a run's report if it is not there."""
    if path_of(name).exists():
        return
    report = compress(RUNS[name], out := WORK / name, WORK / "moments")
    _, config, base, model = explain.opened(out)
    tokens = data.windows_beside(model, replace(config.evaluation, text="python"), config.calibration.text,
                                 "evaluation")
    found = evaluate.compare(model.config, base.params, model.params, tokens, title="program text")
    files.write_json(path_of(name), report | {"python": {
        "base_perplexity": float(np.exp(np.mean(found.base_loss, dtype=np.float64))),
        "compressed_perplexity": float(np.exp(np.mean(found.loss, dtype=np.float64))),
        "divergence": float(np.mean(found.divergence, dtype=np.float64)), "tokens": found.loss.size}})
    shutil.rmtree(out)  # most of it the dense embedding


def main(names: list[str]) -> None:
    if unknown := [name for name in names if name not in RUNS]:
        raise ValueError(f"no run is called {unknown[0]!r}: choose from {', '.join(RUNS)}")
    for name in names or RUNS:
        run(name)
        row = record(name)
        print(json.dumps({"run": name, **{key: row[key] for key in (
            "base_perplexity", "compressed_perplexity", "bits_per_weight", "python")},
            "seconds": row["seconds"]["total"], "peak_memory_bytes": row["peak_memory_bytes"]}), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"wide_model.py: {error}")
