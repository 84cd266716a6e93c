"""Perplexity against stored bits on the whole of SmolLM2-135M: Q alone at 2, 3, 4 bits, and CALDERA at three ranks.

    python experiments/whole_model.py [NAME ...]      # all; finished ones are skipped, interrupted ones go on

Each run is one call of ``caldera_jax.compress`` and its report goes to results/whole_model_NAME.json as it is.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

from caldera_jax import CalderaConfig, files
from caldera_jax.cli import PRESETS
from caldera_jax.compress import compress

RESULTS = Path(__file__).parent / "results"
WORK = Path("out/whole_model")
DEFAULT = PRESETS["default"].caldera

RUNS: dict[str, CalderaConfig] = {
    "q2": dataclasses.replace(DEFAULT, rank=0),
    "q2_k32": DEFAULT,
    "q2_k64": dataclasses.replace(DEFAULT, rank=64),
    "q2_k16": dataclasses.replace(DEFAULT, rank=16),
    "q3": dataclasses.replace(DEFAULT, rank=0, q_bits=3),
    "q4": dataclasses.replace(DEFAULT, rank=0, q_bits=4),
    "q2_k32_downdate": dataclasses.replace(DEFAULT, downdate=True),
    "q2_k32_downdate_10_passes": dataclasses.replace(DEFAULT, downdate=True, refine_passes=10),
    "q2_k32_sequential": DEFAULT,  # calibrated on the compressed blocks
}


def run(name: str) -> dict:
    """One run's report, from its JSON if it is there."""
    path = RESULTS / f"whole_model_{name}.json"
    if path.exists():
        return files.read_json(path)
    activations = "compressed" if name.endswith("sequential") else "dense"
    config = dataclasses.replace(PRESETS["default"], model="smollm2-135m", caldera=RUNS[name], activations=activations)
    row = compress(config, WORK / name, moments=WORK / "moments")
    files.write_json(path, row)
    shutil.rmtree(WORK / name)  # half a gigabyte, most of it the dense embedding
    return row


def main(names: list[str]) -> None:
    for name in names or RUNS:
        row = run(name)
        print(json.dumps({"run": name, **{key: row[key] for key in (
            "base_perplexity", "compressed_perplexity", "bits_per_weight", "mean_layer_error")},
            "seconds": row["seconds"]["total"]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
