"""One level for a whole model: its budget, what it says of itself, the same bytes however it is run, bad input."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from test_compress import interrupt_after, weight_files

from caldera_jax import LevelConfig, hessian, levels, objective
from caldera_jax.jobs import artifact, calibration, cli, evaluate, facts, level, page, student
from caldera_jax.jobs.compress import compress, texts
from caldera_jax.jobs.finetune import FinetuneConfig, finetune
from caldera_jax.jobs.run import Run
from caldera_jax.jobs.settings import Importance, RunConfig
from caldera_jax.jobs.student import TrainConfig
from caldera_jax.models import convert, files, llama
from caldera_jax.models.data import Tokens

BITS = 4.0


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Directory of the tiny model with its text beside it."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny.write_text(directory / "text.txt")
    return tiny.write_model(directory / "model", tiny.SQUARE)


@pytest.fixture(scope="module")
def config(source):
    text = str(source.parent / "text.txt")
    return RunConfig(str(source), calibration=Tokens(text, 6, 32), evaluation=Tokens(text, 3, 32), bits=BITS,
                     level=LevelConfig(), importance=Importance(4))


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """An uninterrupted run: its directory and its report."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, compress(config, out)


def test_the_budget_is_met_in_real_bytes_and_never_exceeded(finished):
    out, row = finished
    assert 0.995 * BITS <= row["bits_per_weight"] <= BITS
    layers = artifact.load(out).params["blocks"]
    assert sum(block[name].stored_bits for block in layers for name in llama.LINEARS) == 8 * row["stored_bytes"]
    on_disk = sum(array.nbytes for i in range(2) for name, array in files.read_arrays(
        out / artifact.block_file(i)).items() if name.split(".")[0] in llama.LINEARS)
    assert on_disk == row["stored_bytes"]
    found = [layer["level"] for layer in row["layers"]]
    assert max(found) < 1.1 * min(found)  # one level but for what fewer windows foretold wrongly


def test_the_report_predicts_the_divergence_and_measures_it(finished, config):
    out, row = finished
    model, base = artifact.load(out), convert.load(config.model)
    tokens, held_out = texts(config, base)
    found = evaluate.compare(model.config, base.params, model.params, held_out)
    assert row["divergence"] == pytest.approx(found.divergence.mean(), rel=1e-5)
    assert row["lost"] == pytest.approx(np.log(row["compressed_perplexity"] / row["base_perplexity"]), abs=1e-9)
    few = config.importance.of(tokens)
    key = jax.random.fold_in(jax.random.key(config.seed), 14)
    fisher = calibration.output_fisher(base.config, base.params, few, key, range(len(few)))
    damage, moments = 0.0, dict(calibration.collect(base.config, base.params, tokens))
    for layer in row["layers"]:
        _, index, name = layer["path"].split(".")
        w, h = base.params["blocks"][int(index)][name], moments[int(index)][llama.INPUT_OF[name]].mean()
        e = np.asarray(model.params["blocks"][int(index)][name].dense() - w, np.float64)
        g = objective.importance(fisher[layer["path"]].importance())
        own = float(g @ np.sum((e @ np.asarray(h, np.float64)) * e, axis=1)) / 2
        assert layer["predicted_damage"] == pytest.approx(own, rel=1e-3)
        damage += own
    assert row["predicted_damage"] == pytest.approx(damage, rel=1e-3)
    assert 0.3 < row["divergence"] / damage < 3


def test_a_given_level_is_used_as_it_is_and_a_finer_one_takes_more_bits_and_loses_less(config, tmp_path):
    rows = [compress(dataclasses.replace(config, bits=None, c=c), tmp_path / str(c)) for c in (0.002, 0.02)]
    assert [row["level"] for row in rows] == [0.002, 0.02] and rows[0]["budget_bits_per_weight"] is None
    assert rows[0]["bits_per_weight"] > rows[1]["bits_per_weight"] + 2
    assert rows[0]["divergence"] < rows[1]["divergence"] / 4


def test_calibrating_on_compressed_blocks_meets_the_budget_too_and_changes_later_blocks(finished, config, tmp_path):
    row = compress(dataclasses.replace(config, activations="compressed"), tmp_path / "out")
    assert 0.995 * BITS <= row["bits_per_weight"] <= BITS
    found = [layer["level"] for layer in row["layers"]]
    assert max(found) < 1.1 * min(found)


def test_a_layer_whose_tokens_are_capped_has_finer_steps(config, tmp_path, monkeypatch):
    """As if its outputs were so much more important."""
    given, original = [], level.at_level
    monkeypatch.setattr(level, "at_level", lambda *a: given.append(a[2]) or original(*a))
    for i, factor in enumerate((1.0, 2.0)):
        monkeypatch.setattr(hessian.Moments, "left_out", lambda moments, damping, factor=factor: factor)
        compress(dataclasses.replace(config, bits=None, c=0.02), tmp_path / str(i))
    plain, lifted = given[:len(given) // 2], given[len(given) // 2:]
    for before, after in zip(plain, lifted, strict=True):
        np.testing.assert_array_equal(after, 2 * before)


def test_low_rank_beside_the_integers_is_at_the_level_and_counted(config, tmp_path):
    row = compress(dataclasses.replace(config, bits=7.0, level=LevelConfig(rank=2)), tmp_path / "out")
    assert 0.995 * 7 <= row["bits_per_weight"] <= 7
    assert all(layer["rank"] == 2 and min(layer["factor_bits"]) > 0 for layer in row["layers"])
    layer = artifact.load(tmp_path / "out").params["blocks"][0]["q"]
    assert layer.rank == 2 and layer.stored_bits == row["layers"][0]["bits"]


# ---- the same bytes


def cut_off(patch, stop):
    """The run ends at some point of this stage."""
    keep, write, seen = Run.keep, files.write_arrays, []

    def keep_some(self, name, value):
        seen.extend([name] * ({"measure": ".curve", "again": ".at2"}.get(stop, "nothing") in name))
        if len(seen) > 3:
            raise KeyboardInterrupt
        keep(self, name, value)

    def write_some(path, arrays):
        if stop == "gradients" and path.name.startswith("fisher") and path.stem.endswith("_5"):
            raise KeyboardInterrupt
        write(path, arrays)

    patch.setattr(Run, "keep", keep_some)
    patch.setattr(files, "write_arrays", write_some)
    if stop == "compress":
        interrupt_after(patch, 5)


@pytest.mark.parametrize("stop", ["gradients", "measure", "compress"])
def test_cut_off_anywhere_it_ends_with_the_same_bytes(finished, config, tmp_path, monkeypatch, stop):
    with monkeypatch.context() as patch:
        cut_off(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            compress(config, tmp_path / "out")
    done, pulled, original, fisher = [], [], level.at_level, calibration.output_fisher
    monkeypatch.setattr(level, "at_level", lambda *a: done.append(a[5]) or original(*a))
    compress(config, tmp_path / "whole")
    whole = len(done)
    done.clear()
    monkeypatch.setattr(calibration, "output_fisher", lambda *a, **more: pulled.append(a[-1]) or fisher(*a, **more))
    resumed = compress(config, tmp_path / "out")
    assert whole - len(done) == {"gradients": 0, "measure": 14 + 3, "compress": 28 + 5}[stop]
    assert len(pulled) == (3 if stop == "gradients" else 0)
    assert weight_files(tmp_path / "out") == weight_files(finished[0])
    assert resumed["compressed_perplexity"] == finished[1]["compressed_perplexity"]


def test_a_level_that_misses_the_budget_is_corrected_and_that_too_can_be_cut_off(config, tmp_path, monkeypatch):
    measure, calls = levels.measure, itertools.count()
    error = lambda: 0.85 if next(calls) % 28 >= 21 else 1.0  # of the last block's seven layers
    wrong = lambda *a: (curve := measure(*a))._replace(counts=(error() * np.asarray(curve.counts)).tolist())
    monkeypatch.setattr(levels, "measure", wrong)
    row = compress(config, tmp_path / "whole")
    assert 0.995 * BITS <= row["bits_per_weight"] <= BITS
    with monkeypatch.context() as patch:
        cut_off(patch, "again")
        with pytest.raises(KeyboardInterrupt):
            compress(config, tmp_path / "out")
    assert len(json.loads((tmp_path / "out/unfinished/level.1.json").read_text())) == 2
    compress(config, tmp_path / "out")
    assert weight_files(tmp_path / "out") == weight_files(tmp_path / "whole")


@pytest.mark.parametrize("error", [0.97, 1.03])
def test_the_last_block_makes_up_for_what_the_others_missed(config, tmp_path, monkeypatch, error):
    measure = levels.measure
    wrong = lambda *a: (curve := measure(*a))._replace(counts=[error * count for count in curve.counts])
    monkeypatch.setattr(levels, "measure", wrong)
    row = compress(dataclasses.replace(config, activations="compressed"), tmp_path / "out")
    assert 0.995 * BITS <= row["bits_per_weight"] <= BITS
    assert len({layer["level"] for layer in row["layers"]}) == 2  # of two blocks


def test_kept_moments_and_gradients_are_read_again_and_change_no_byte(finished, config, tmp_path, monkeypatch):
    compress(config, tmp_path / "one", tmp_path / "moments")
    monkeypatch.setattr(calibration, "calibrate_block", None)
    monkeypatch.setattr(calibration, "output_fisher", None)
    compress(config, tmp_path / "two", tmp_path / "moments")
    assert weight_files(tmp_path / "one") == weight_files(tmp_path / "two") == weight_files(finished[0])


# ---- bad input


@pytest.mark.parametrize(("bits", "message"), [
    (0.2, r"a budget of 0\.2000 bits a weight .* is below what any level takes, \d\.\d+ to \d+\.\d+: raise it"),
    (40.0, r"is above what any level takes, .*: lower it")])
def test_budgets_that_no_level_meets_are_named(config, tmp_path, bits, message):
    with pytest.raises(ValueError, match=message):
        compress(dataclasses.replace(config, bits=bits), tmp_path / "out")


def test_gradients_that_overflow_are_named_with_the_layer(config, tmp_path, monkeypatch):
    real = calibration.output_fisher

    def overflown(*a, **more):
        found = real(*a, **more)
        return found | {"blocks.1.up": found["blocks.1.up"]._replace(rows=np.full(24, np.inf))} if found else found

    monkeypatch.setattr(calibration, "output_fisher", overflown)
    with pytest.raises(ValueError, match=r"blocks\.1\.up: its gradients hold NaN or infinite values"):
        compress(config, tmp_path / "out")


@pytest.mark.parametrize(("change", "message"), [
    (dict(bits=None), "either given as c or found for a budget"), (dict(c=0.1), "either given as c or found"),
    (dict(level=None, c=0.1, bits=None), "has a LevelConfig"), (dict(bits=None, c=-1.0), "must be positive"),
    (dict(level=LevelConfig(rank=25)), "rank 25 exceeds min"), (dict(bits=-2.0), "give a positive number")])
def test_contradictions_are_refused_before_any_work(config, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        compress(dataclasses.replace(config, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "message"), [
    (dict(states=3), "states must be one of 1, 4, 8"), (dict(bit_price=-1.0), "bit_price must be at least 0"),
    (dict(rank=-1), "rank must be at least 0"), (dict(damping=float("inf")), "damping must be at least 0 and finite")])
def test_choices_that_a_level_does_not_offer_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LevelConfig(**change)


def test_a_damaged_stream_is_named_with_its_file_and_layer(finished, tmp_path):
    path = shutil.copy(finished[0] / artifact.block_file(1), tmp_path)
    arrays = files.read_arrays(Path(path))
    arrays["up.q.integers.words"] = arrays["up.q.integers.words"] ^ np.uint16(4)
    files.write_arrays(Path(path), arrays)
    meta, model = artifact.read_manifest(finished[0])["layers"], artifact.load(finished[0])
    with pytest.raises(ValueError, match=r"block_001\.safetensors: up: a stream of coded integers is damaged"):
        artifact._block(Path(path), meta, 1, model.config)["up"]
    np.testing.assert_array_equal(artifact._block(Path(path), meta, 1, model.config)["down"].dense(),  # the others
                                  model.params["blocks"][1]["down"].dense())


# ---- what the commands make of it


def test_every_command_takes_it(finished, config, tmp_path, capsys, monkeypatch):
    out = str(finished[0])
    for arguments, says in (
            (["inspect", out], "nats a token"), (["inspect", out, "--theory"], "mean gap"),
            (["eval", out, "--base", "--processes", "0"], "D_KL"),
            (["generate", out, "the code", "--tokens", "4", "--compare"], "tokens are the same"),
            (["export", out, "--to", "hf", "--out", str(tmp_path / "hf")], "written")):
        monkeypatch.setattr("sys.argv", ["caldera", *arguments])
        cli.main()
        assert says in capsys.readouterr().out, arguments


def test_the_page_shows_where_its_bits_went(finished, tmp_path):
    pytest.importorskip("matplotlib")
    page.write(finished[0], tmp_path / "page.html")
    assert "codes of Q" in (tmp_path / "page.html").read_text()
    found = facts.bits_of(artifact.load(finished[0]).params["blocks"][0]["q"])
    assert found["codes of Q"] > found["scales"] > 0 and not found["rotation"]


def test_all_of_its_l_r_is_trained_or_none(config, tmp_path):
    compress(dataclasses.replace(config, bits=7.0, level=LevelConfig(rank=2)), tmp_path / "out")
    layer = artifact.load(tmp_path / "out").params["blocks"][0]["down"]
    rest, free = student.loosen(layer, False, 1)
    assert rest.rank == 0 and free.keys() == {"trained"} and len(free["trained"][1]) == 2
    again = dataclasses.replace(rest, **free)
    np.testing.assert_allclose(again.dense(), layer.dense(), atol=1e-6)
    assert again.rank == 2 and again.stored_bits > rest.stored_bits
    arrays, meta = artifact.layer_arrays(again), artifact.layer_meta(again)
    np.testing.assert_array_equal(artifact.layer_from(arrays, meta).dense(), again.dense())
    text, name = str(tmp_path / "text.txt"), str(tmp_path / "out")
    tiny.write_text(tmp_path / "text.txt", 60)
    train = TrainConfig(signs=False, ranks=2, epochs=1, batch=2, validate=2)
    row = finetune(FinetuneConfig(name, train, Tokens(text, 6, 16), aside=2), tmp_path / "tuned")
    assert row["finetune"][-1]["trained"] == 2 * 2 * sum(m + n for m, n in llama.shapes(tiny.SQUARE).values())
