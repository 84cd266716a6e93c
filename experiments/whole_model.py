"""Perplexity against stored bits on the whole of SmolLM2-135M: Q alone at 2, 3, 4 bits, CALDERA at several ranks, and
with what the paper does not have: factors rounded with feedback, outputs that count by their importance, a trellis.

    python experiments/whole_model.py [NAME ...]      # all; finished ones are skipped, interrupted ones go on

Each run is one `caldera compress`, and its report goes to results/whole_model_NAME.json as it is.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import drawing

from caldera_jax.jobs.presets import PRESETS
from caldera_jax.jobs.settings import RunConfig, recorded
from caldera_jax.models import files

WORK = Path("out/whole_model")
RUNS: dict[str, dict[str, Any]] = {  # what each changes of the default preset
    "q2": {"rank": 0},
    "q2_k16": {"rank": 16},
    "q2_k32": {"rank": 32},
    "q2_k64": {"rank": 64},
    "q3": {"rank": 0, "q_bits": 3},
    "q4": {"rank": 0, "q_bits": 4},
    "q2_k32_10_passes": {"rank": 32, "refine_passes": 10},
    "q2_k32_downdate": {"rank": 32, "downdate": True},
    "q2_k32_downdate_10_passes": {"rank": 32, "downdate": True, "refine_passes": 10},
    "q2_k32_sequential": {"rank": 32, "activations": "compressed"},
}
BEYOND: dict[str, dict[str, Any]] = {  # the paper
    "q2_fisher": {"rank": 0, "importance": "fisher"},
    "q2_trellis": {"rank": 0, "quantizer": "trellis"},
    "q2_trellis_fisher": {"rank": 0, "quantizer": "trellis", "importance": "fisher"},
    "q3_trellis_fisher": {"rank": 0, "q_bits": 3, "quantizer": "trellis", "importance": "fisher"},
    "q2_k32_feedback_downdate": {"rank": 32, "factor_rounding": "feedback", "downdate": True},
    "q2_k32_feedback_downdate_fisher": {"rank": 32, "factor_rounding": "feedback", "downdate": True,
                                        "importance": "fisher"},
    "q2_k32_trellis": {"rank": 32, "quantizer": "trellis", "draft": "e8p"},
    "q2_k32_feedback_downdate_fisher_trellis": {"rank": 32, "factor_rounding": "feedback", "downdate": True,
                                                "importance": "fisher", "quantizer": "trellis", "draft": "e8p"},
}


def changes(name: str) -> dict[str, Any]:
    """What a run changes of the default preset, as ``caldera compress`` calls it; ValueError for an unknown run."""
    if name not in (every := RUNS | BEYOND):
        raise ValueError(f"no run is called {name!r}: choose from {', '.join(every)}")
    return {"outer_iterations": 5, **every[name]}


def config(name: str) -> RunConfig:
    """The whole configuration of a run: tokens are not capped, as in the paper."""
    own = changes(name)
    activations, importance = own.pop("activations", "dense"), own.pop("importance", "none")
    base = PRESETS["default"]
    return replace(base, model="smollm2-135m", caldera=replace(base.caldera, **own), activations=activations,
                   outputs="fisher" if importance == "fisher" else "alike", token_cap=0.0)


def path_of(name: str) -> Path:
    """Where a run's report lies."""
    return drawing.RESULTS / f"whole_model_{name}.json"


def record(name: str) -> dict[str, Any]:
    """A run's report; raises as ``checked``."""
    return checked(path_of(name), config(name), f"python experiments/{Path(__file__).name} {name}")


def checked(path: Path, of: RunConfig, command: str) -> dict[str, Any]:
    """A report; ValueError where it is missing or of another configuration, with the command that makes it."""
    if not path.is_file():
        raise ValueError(f"{path.name} is missing: {command}")
    found = files.read_json(path)
    if recorded(found["config"]) != of:
        raise ValueError(f"{path.name} is of another configuration: delete it, then {command}")
    return found


def run(name: str) -> None:
    """Make a run's report if it is not there."""
    if path_of(name).exists():
        return
    out = WORK / name
    flags = [word for field, value in changes(name).items() for word in (f"--{field.replace('_', '-')}", str(value))]
    subprocess.run([sys.executable, "-m", "caldera_jax.jobs.cli", "compress", "smollm2-135m", "--out", str(out),
                    "--moments", str(WORK / "moments"), "--token-cap", "0", *flags], check=True)
    files.write_json(path_of(name), files.read_json(out / "report.json"))
    shutil.rmtree(out)  # most of it the dense embedding


def main(names: list[str]) -> None:
    names = names or [*RUNS, *BEYOND]
    for name in names:
        config(name)  # an unknown name ends here, before any work
    for name in names:
        run(name)
        row = record(name)
        print(json.dumps({"run": name, **{key: row[key] for key in (
            "base_perplexity", "compressed_perplexity", "bits_per_weight", "mean_layer_error")},
            "seconds": row["seconds"]["total"]}), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"whole_model.py: {error}")
