"""Run experiments by name, or all of them; draw their figures and print their verdicts from what is on the disk.

    python experiments/run.py                     # everything that is missing, scripts of their own too; every figure
    python experiments/run.py outer --preset smoke
    python experiments/run.py --draw              # figures and verdicts only, nothing is measured
"""

import importlib
import subprocess
import sys
from typing import Annotated, Literal

import tyro
from drawing import HERE, RESULTS
from machinery import Experiment, collect, draw, run

SCRIPTS = {"train_tiny.py": "train_tiny_tiny_*.json", "original.py": "original_block14.json",
           "speed.py": "speed_summary.json", "roofline.py": "roofline.json",
           "dry_run.py": "dry_run.json", "generation.py": "generation.json"}  # and the record that each writes last
NAMES = ("spectra", "outer", "inner", "perplexity", "ablations", "frontier", "allocation", "level", "size",
         "output_factor", "distillation", "recovery", "trellis", "wide")


def experiment(name: str) -> Experiment:
    """The experiment of a file; ValueError listing the known ones."""
    if name not in NAMES:
        raise ValueError(f"no experiment {name!r}: choose from {', '.join(NAMES)}")
    return importlib.import_module(name).EXPERIMENT


def script(draw_only: bool) -> None:
    """Run each script whose record is missing; draw what those draw that have a figure."""
    if not draw_only:
        missing = [name for name, record in SCRIPTS.items() if not list(RESULTS.glob(record))]
        for name in [*missing, "whole_model.py"]:  # the last looks for what is missing itself
            subprocess.run([sys.executable, str(HERE / name)], check=True)
    subprocess.run([sys.executable, str(HERE / "train_tiny.py"), "--draw"], check=True)
    subprocess.run([sys.executable, str(HERE / "speed.py"), "--summary"], check=True)


def main(names: Annotated[tuple[str, ...], tyro.conf.Positional] = (), preset: Literal["full", "smoke"] = "full",
         draw_only: Annotated[bool, tyro.conf.arg(name="draw")] = False) -> None:
    """Run what is missing, draw, and say what holds.

    Args:
        names: of experiments; none: all.
        preset: full, or smoke (seconds, on a model that is trained in seconds).
        draw_only: measure nothing.
    """
    if not names and preset == "full":
        script(draw_only)
    for one in [experiment(name) for name in names or NAMES]:
        if not draw_only:
            run(one, preset)
        drawn, verdict = draw(one, preset), one.verdict(collect(one, preset))
        print(f"{one.name}: {drawn}\n  claim: {one.claim}\n  {verdict}", flush=True)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"run.py: {error}")
