"""What the experiments share: a run is a frozen config and one JSON; what is finished is skipped; figures are of JSON.

An experiment is a file with ``EXPERIMENT``: the paper's claim, the runs of each preset, what a run measures, and how
all runs of a preset are drawn and judged.  ``run.py`` runs and draws them by name.
"""

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import drawing
import encoder
import jax
import numpy as np
from scipy import stats
from tqdm import tqdm

from caldera_jax.jobs import artifact, calibration, report
from caldera_jax.models import convert, data, files

Result = dict[str, Any]


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    runs: preset ("full", "smoke") -> frozen configs, each with a ``seed``; a JSON each.  measure: config -> metrics.
    draw: results -> a matplotlib figure.  verdict: results -> what holds of the claim, by what margin, over how many
    seeds: a sentence for each part of the claim.
    """

    name: str
    claim: str
    runs: Callable[[str], Sequence[Any]]
    measure: Callable[[Any], Result]
    draw: Callable[[list[Result]], Any]
    verdict: Callable[[list[Result]], str]


def path_of(experiment: Experiment, preset: str, config: Any) -> Path:
    """Where a run's JSON lies: results/NAME/PRESET_HASH.json."""
    return drawing.RESULTS / experiment.name / f"{preset}_{report.config_hash(config)}.json"


@contextmanager
def claimed(target: Path, wait: bool) -> Iterator[bool]:
    """Whether no other process works on a result, after waiting for it if told so; a killed one holds no claim."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(lock := target.with_suffix(".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
        lock.unlink(missing_ok=True)


def run(experiment: Experiment, preset: str) -> None:
    """Make every run of the preset that has no JSON yet, each written when it is done: a killed sweep goes on, and
    several processes may share one."""
    clock = report.Clock()
    for wait in (False, True):  # first what nobody else works on
        missing = [config for config in experiment.runs(preset) if not path_of(experiment, preset, config).is_file()]
        for config in tqdm(missing, experiment.name, disable=not missing, unit="run"):
            target = path_of(experiment, preset, config)
            with claimed(target, wait) as mine:
                if mine and not target.is_file():
                    files.write_json(target, _measured(experiment, preset, config, clock))
                    drop_programs()


def drop_programs() -> None:
    """Forget what JAX compiled before this process has mapped all that Linux lets it: 65,530 regions, several a
    program; the next compilation would fail."""
    maps = Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


def _measured(experiment: Experiment, preset: str, config: Any, clock: report.Clock) -> Result:
    weights = {"model_sha256": fingerprint(config.model)} if hasattr(config, "model") else {}
    before = dict(clock.stages.get("run", {"seconds": 0.0, "compile_seconds": 0.0}))
    with clock.stage("run"):
        found = experiment.measure(config)
    total, compiling = (clock.stages["run"][key] - before[key] for key in ("seconds", "compile_seconds"))
    return {**report.provenance(config, config.seed), **weights, "preset": preset, **found,
            "seconds": {"compile": round(compiling, 3), "steady": round(total - compiling, 3)}}


def record(experiment: Experiment, config: Any, preset: str = "full") -> Result:
    """The result of one run.  ValueError where it is missing, with the command that makes it."""
    if not (path := path_of(experiment, preset, config)).is_file():
        raise ValueError(f"{experiment.name}: {path.name} of preset {preset!r} is missing: python experiments/run.py "
                         f"{experiment.name} --preset {preset}")
    return files.read_json(path)


def collect(experiment: Experiment, preset: str) -> list[Result]:
    """The results of a preset, in the order of its runs.

    Raises ValueError where runs are missing, or where the folder holds runs of configurations that are no more or of
    two models of one name (records from before ``model_sha256`` was kept do not say which).
    """
    paths = [path_of(experiment, preset, config) for config in experiment.runs(preset)]
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(f"{experiment.name}: {len(missing)} of {len(paths)} results of preset {preset!r} are missing "
                         f"(the first: {missing[0].name}): python experiments/run.py {experiment.name} "
                         f"--preset {preset}")
    if stale := sorted(set(paths[0].parent.glob(f"{preset}_*.json")) - set(paths)):
        raise ValueError(f"{experiment.name}: {len(stale)} results are of configurations that are no longer run (the "
                         f"first: {stale[0]}): delete them")
    found = [files.read_json(path) for path in paths]
    digests = {(r["config"]["model"], r["model_sha256"]) for r in found if "model_sha256" in r}
    if len(digests) > len({name for name, _ in digests}):
        raise ValueError(f"{experiment.name}: its results are of different weights under one model name: delete "
                         f"{paths[0].parent} and run it again")
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over the seeds, and half the width of its 95 % confidence interval (Student's t); infinite for one seed."""
    if len(values) < 2:
        return float(np.mean(values)), np.inf
    return float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def decide(ratios: Sequence[float], least: float = 0.01) -> str:
    """What ratios to a reference, paired by seed, say: "lower" or "higher" where their mean is at least 1 % from 1 and
    its 95 % confidence interval leaves out 1; else "undecided"."""
    mean, half = interval(ratios)
    if abs(mean - 1) < max(least, half):
        return "undecided"
    return "lower" if mean < 1 else "higher"


def with_interval(values: Sequence[float]) -> str:
    """1.234 ± 0.012."""
    mean, half = interval(values)
    return f"{mean:.3f} ± {half:.3f}" if np.isfinite(half) else f"{mean:.3f} (one seed)"


def draw(experiment: Experiment, preset: str) -> Path:
    """Draw the results of a preset; figures/NAME.png for the full one."""
    figure = experiment.draw(collect(experiment, preset))
    target = drawing.FIGURES / (f"{experiment.name}.png" if preset == "full" else f"{experiment.name}_{preset}.png")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(partial_file := target.with_suffix(".part.png"), dpi=min(220, 2600 / figure.get_figwidth()))
    os.replace(partial_file, target)
    return target


def source(name: str) -> str:
    """What ``convert.load`` and ``caldera compress`` take for smollm2-135m, tiny, or tiny-smoke, trained here and now.

    ValueError where the tiny model has not been trained: it takes half an hour.
    """
    if not name.startswith("tiny"):
        return name
    import train_tiny  # seconds

    if name == "tiny-smoke":
        train_tiny.train(train_tiny.preset("smoke"))
    return str(train_tiny.load_tiny(name.removeprefix("tiny-")))


@cache
def model(name: str) -> convert.Model:
    """The dense model of that name, loaded once."""
    return convert.load(source(name))


@cache
def fingerprint(name: str) -> str:
    """SHA-256 of the model's configuration and weights; of the encoder's file."""
    return encoder.SOURCE.sha256 if name == encoder.NAME else artifact.fingerprint(model(name))


@cache
def layers(name: str, block: int, text: str = "enwiki", windows: int = 24, window: int = 512,
           part: str = "calibration") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(W, H) of the linear layers of one block, by name; H of so many windows of one half of a text, undamped."""
    chosen = model(name)
    documents = data.split(data.load_text(text))[0 if part == "calibration" else 1]
    tokens = data.token_windows(chosen.tokenizer, documents, min(window, chosen.config.context), windows, part)
    return calibration.of_block(chosen.config, chosen.params, tokens, block)
