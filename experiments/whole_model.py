"""Perplexity against stored bits on the whole of SmolLM2-135M: Q alone at 2, 3, 4 bits, and CALDERA at several ranks.

    python experiments/whole_model.py [NAME ...]      # all; finished ones are skipped, interrupted ones go on

Each run is one `caldera compress`, and its report goes to results/whole_model_NAME.json as it is.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from caldera_jax import files

RESULTS = Path(__file__).parent / "results"
WORK = Path("out/whole_model")

FIVE = "--outer-iterations 5"
RUNS = {
    "q2": f"--rank 0 {FIVE}",
    "q2_k16": f"--rank 16 {FIVE}",
    "q2_k32": f"--rank 32 {FIVE}",
    "q2_k64": f"--rank 64 {FIVE}",
    "q3": f"--rank 0 --q-bits 3 {FIVE}",
    "q4": f"--rank 0 --q-bits 4 {FIVE}",
    "q2_k32_downdate": f"--rank 32 {FIVE} --downdate",
    "q2_k32_downdate_10_passes": f"--rank 32 {FIVE} --downdate --refine-passes 10",
    "q2_k32_sequential": f"--rank 32 {FIVE} --activations compressed",
}


def run(name: str) -> dict:
    """One run's report, from its JSON if it is there."""
    path = RESULTS / f"whole_model_{name}.json"
    if not path.exists():
        out = WORK / name
        command = [sys.executable, "-m", "caldera_jax.cli", "compress", "smollm2-135m", "--out", str(out), "--moments",
                   str(WORK / "moments"), *RUNS[name].split()]
        subprocess.run(command, check=True)
        files.write_json(path, files.read_json(out / "report.json"))
        shutil.rmtree(out)  # most of it the dense embedding
    return files.read_json(path)


def main(names: list[str]) -> None:
    if unknown := [name for name in names if name not in RUNS]:
        sys.exit(f"no run is called {unknown[0]!r}: choose from {', '.join(RUNS)}")
    for name in names or RUNS:
        row = run(name)
        print(json.dumps({"run": name, **{key: row[key] for key in (
            "base_perplexity", "compressed_perplexity", "bits_per_weight", "mean_layer_error")},
            "seconds": row["seconds"]["total"]}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
