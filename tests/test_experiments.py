"""The experiments' machinery: every run is one file, made once, and what is not there or no longer meant is named."""

import importlib
import json
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from caldera_jax.models import files

BEING_RUN: tuple[str, ...] = ("size", "wide")
EXPERIMENTS = Path(__file__).parent.parent / "experiments"
sys.path.append(str(EXPERIMENTS))

import drawing  # noqa: E402
import machinery  # noqa: E402
import run as runner  # noqa: E402


@dataclass(frozen=True)
class Config:
    """A run of the experiment below."""

    x: int
    seed: int = 0


def made(calls: list[int], values=(1, 2, 3), fail_at: int | None = None) -> machinery.Experiment:
    """x ↦ x², which counts its calls, and breaks down at one value."""
    def measure(config):
        if config.x == fail_at:
            raise KeyboardInterrupt
        calls.append(config.x)
        return {"square": config.x**2}

    return machinery.Experiment("squares", "squares are squares", lambda _: [Config(x) for x in values], measure,
                                lambda results: None, lambda results: "holds")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Results and figures of a test go to its own folder."""
    monkeypatch.setattr(drawing, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(drawing, "FIGURES", tmp_path / "figures")
    return tmp_path / "results"


def test_an_interrupted_sweep_goes_on_where_it_was_and_repeats_nothing(results):
    calls: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        machinery.run(made(calls, fail_at=2), "full")
    assert calls == [1]
    machinery.run(made(calls), "full")
    machinery.run(made(calls), "full")
    assert calls == [1, 2, 3]
    found = machinery.collect(made(calls), "full")
    assert [r["square"] for r in found] == [1, 4, 9] and [r["config"]["x"] for r in found] == [1, 2, 3]


def test_a_record_holds_config_hash_seed_versions_machine_and_seconds(results):
    machinery.run(made([]), "full")
    path = machinery.path_of(made([]), "full", Config(2))
    found = json.loads(path.read_text())
    assert path.stem == f"full_{found['config_hash']}" and found["config"] == {"kind": "Config", "x": 2, "seed": 0}
    assert found["seconds"].keys() == {"compile", "steady"} and found["versions"]["jax"] and found["machine"]["cores"]


def test_results_that_are_missing_or_of_another_configuration_are_named_with_what_to_do(results):
    with pytest.raises(ValueError, match=r"squares: 3 of 3 results.*python experiments/run.py squares --preset full"):
        machinery.collect(made([]), "full")
    machinery.run(made([], values=(1, 2, 3, 4)), "full")
    with pytest.raises(ValueError, match="1 results are of configurations that are no longer run.*delete them"):
        machinery.collect(made([]), "full")
    machinery.run(replace(made([]), runs=lambda _: [Config(9)]), "smoke")  # another preset is no concern of this one
    with pytest.raises(ValueError, match="1 results are"):
        machinery.collect(made([]), "full")


def test_results_of_two_models_under_one_name_are_refused(results):
    experiment = made([])
    machinery.run(experiment, "full")
    for x, digest in ((1, "a"), (2, "b")):
        path = machinery.path_of(experiment, "full", Config(x))
        found = json.loads(path.read_text())
        path.write_text(json.dumps({**found, "config": {**found["config"], "model": "tiny"}, "model_sha256": digest}))
    with pytest.raises(ValueError, match="different weights under one model name: delete"):
        machinery.collect(experiment, "full")


def test_a_run_that_another_process_works_on_is_left_to_it_and_waited_for(results):
    calls: list[int] = []
    experiment = made(calls)
    other = machinery.path_of(experiment, "full", Config(2))
    begun, release = threading.Event(), threading.Event()

    def elsewhere():  # a lock of another open file is as foreign as that of another process
        with machinery.claimed(other, wait=True):
            begun.set()
            release.wait(30)
            files.write_json(other, {"square": 4})

    worker = threading.Thread(target=elsewhere)
    worker.start()
    begun.wait(30)
    with machinery.claimed(other, wait=False) as mine:
        assert not mine
    threading.Timer(0.2, release.set).start()
    machinery.run(experiment, "full")
    worker.join()
    assert calls == [1, 3] and json.loads(other.read_text()) == {"square": 4}
    assert not list(results.rglob("*.lock"))


@pytest.mark.parametrize(("ratios", "word"), [
    ([0.95, 0.96, 0.94], "lower"),
    ([1.2, 1.25, 1.3], "higher"),
    ([0.8, 1.0, 0.9], "undecided"),  # 0.9 ± 0.25
    ([0.995, 0.995, 0.995], "undecided"),  # certain, and less than 1 %
    ([0.5], "undecided"),  # one seed
])
def test_a_margin_is_one_that_the_seeds_agree_on_and_at_least_one_percent(ratios, word):
    assert machinery.decide(ratios) == word


def test_the_interval_covers_the_mean_19_times_in_20():
    rng = np.random.default_rng(0)
    inside = [abs(mean) < half for mean, half in (machinery.interval(x) for x in rng.standard_normal((2000, 3)))]
    assert abs(np.mean(inside) - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 2000)


def test_an_unknown_experiment_is_refused_and_the_known_ones_are_listed():
    with pytest.raises(ValueError, match="no experiment 'outre': choose from .*outer"):
        runner.experiment("outre")


QUICK = ("inner",)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
                                  for name in runner.NAMES])
def test_the_smoke_preset_runs_is_judged_and_drawn(name, results):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    experiment = runner.experiment(name)
    machinery.run(experiment, "smoke")
    target = machinery.draw(experiment, "smoke")
    assert target.stat().st_size > 10_000
    verdict = experiment.verdict(machinery.collect(experiment, "smoke"))
    assert len(verdict) > 40 and "nan" not in verdict.lower()
    pyplot.close("all")


@pytest.mark.parametrize("name", runner.NAMES)
def test_committed_results_are_those_of_the_full_preset_and_make_the_committed_figure(name):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    experiment = importlib.import_module(name).EXPERIMENT
    if name in BEING_RUN and not (drawing.FIGURES / f"{name}.png").is_file():
        pytest.skip("not all of its runs are made yet")
    found = machinery.collect(experiment, "full")
    assert all(r["config_hash"] and r["preset"] == "full" for r in found)
    assert (drawing.FIGURES / f"{name}.png").is_file() and experiment.verdict(found)
    assert all(panel.has_data() for panel in experiment.draw(found).axes)
    pyplot.close("all")


@pytest.mark.slow
def test_generation_is_measured_in_bytes_packed_and_dense_and_all_say_the_same(results, capsys, tmp_path, monkeypatch):
    import generation

    monkeypatch.setattr(generation, "WORK", tmp_path)
    generation.main(generation.Config(("tiny-smoke",), tokens=4, batches=(2,), repeats=1, rank=4, bits=4.0))
    record = json.loads((results / "generation_tiny-smoke.json").read_text())
    rows = {(row["kind"], row["held"]): row for row in record["rows"]}
    assert len(rows) == 5 and record["config_hash"] and all(row["token_rate"] > 0 for row in rows.values())
    for held in ("bytes", "packed", "dense"):
        row = rows["level", held]
        assert row["tokens"] == row["same_tokens"] == 8 and row["stored_bits_per_weight"] < 4.01
    assert rows["level", "dense"]["bits_in_memory"] == 32 > 4 * rows["E8P + L R", "packed"]["bits_in_memory"]
    assert 8 < rows["level", "bytes"]["bits_in_memory"] < 16 and rows["level", "dense"]["rate_over_dense"] == 1
    assert "8 of 8 tokens are those of dense weights" in capsys.readouterr().out
