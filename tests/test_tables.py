"""Embedding and head: their Fisher information, their rows, and runs that bring them to the level or round them."""

import dataclasses
import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_compress import interrupt_after, weight_files

import caldera_jax as cj
from caldera_jax import LevelConfig, linear
from caldera_jax.codebooks import Uniform
from caldera_jax.jobs import artifact, calibration, cli, compress, evaluate, export, generate
from caldera_jax.jobs.finetune import FinetuneConfig, finetune
from caldera_jax.jobs.settings import Importance, RunConfig
from caldera_jax.jobs.student import TrainConfig
from caldera_jax.models import convert, files, llama, weights
from caldera_jax.models.data import Tokens

RNG = np.random.default_rng(0)
W = RNG.standard_normal((300, 24)).astype(np.float32)
PLACES = np.array([[5, 0], [299, 5], [17, 256]])


@pytest.fixture(scope="module", params=["untied", "tied"])
def config(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    text = str(tiny.write_text(folder / "text.txt"))
    shape = dataclasses.replace(tiny.SQUARE, tied=request.param == "tied")
    return RunConfig(str(tiny.write_model(folder / "model", shape)), calibration=Tokens(text, 6, 32),
                     evaluation=Tokens(text, 3, 32), bits=4.0, level=LevelConfig(states=8), importance=Importance(4))


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A run with tables at the level of the layers, which alone are counted: its directory and its report."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, compress.compress(dataclasses.replace(config, tables="level"), out)


def names(config: RunConfig) -> list[str]:
    return list(llama.table_shapes(convert.load(config.model).config))


# ---- rows


@pytest.mark.parametrize("weight", [
    W, jnp.asarray(W), linear.rounded(W, Uniform(8, group=24)), linear.rounded(W, Uniform(4, group=24)),
    cj.level(W, np.eye(24, dtype=np.float32), np.ones(300, np.float32), 0.3)], ids=["numpy", "jax", "8", "4", "level"])
def test_rows_are_those_of_the_dense_matrix_and_a_place_without_one_is_nan(weight):
    found = np.asarray(linear.rows(weight, PLACES))
    np.testing.assert_allclose(found, np.asarray(linear.dense(weight))[PLACES], rtol=1e-6)
    outside = np.asarray(linear.rows(weight, np.array([300, -1, 2])))
    assert np.isnan(outside[:2]).all() and np.isfinite(outside[2]).all()


def test_rows_of_a_rotated_weight_are_refused():
    layer, _ = cj.compress_matrix(jax.random.key(0), W[:24], np.eye(24, dtype=np.float32), cj.CalderaConfig(rank=0))
    with pytest.raises(ValueError, match="without rotation"):
        linear.rows(layer, PLACES)


@pytest.mark.parametrize(("bits", "most"), [(8, 1 / 255), (4, 1 / 15)])
def test_a_row_is_rounded_to_half_a_step_of_its_own_range(bits, most):
    error = np.abs(np.asarray(linear.rounded(W, Uniform(bits, group=24)).dense()) - W).max(axis=1)
    assert (error <= most * np.abs(W).max(axis=1) * (1 + 1e-5)).all()


def test_a_grid_with_one_scale_for_all_rows_is_refused():
    with pytest.raises(ValueError, match="give it a group"):
        linear.rounded(W, Uniform(8))


# ---- Fisher information


@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.FAMILIES["gemma2"], tiny.FAMILIES["granite"]],
                         ids=["llama", "gemma2", "granite"])
def test_that_of_the_tables_is_the_mean_square_of_gradients(config):
    """Row by row: of the embedding with the labels that are drawn, of the head over all labels, y with probability
    p_y.  A table that is both is one and then the other."""
    params, key = llama.init(jax.random.key(1), config), jax.random.key(2)
    tokens = RNG.integers(0, config.vocab, (2, 8))
    found = calibration.output_fisher(config, params, tokens, key, range(2), tables=True)
    name = "embed" if config.tied else "head"

    @jax.jit
    @jax.default_matmul_precision("highest")
    def streams(embed, window):
        x = llama.embed(config, params | {"embed": embed}, window[None])
        for i, block in enumerate(params["blocks"]):
            x, _ = llama.block(config.at(i), block, x, jnp.arange(len(window)))
        return x

    @jax.jit
    @jax.default_matmul_precision("highest")
    def likelihoods(table, x):
        return jax.nn.log_softmax(llama.head(config, params | {name: table}, x))[0]

    @jax.jit
    def pulled(embed, window, labels):
        of = lambda embed: likelihoods(params[name], streams(embed, window))
        return jax.grad(lambda embed: jnp.sum(jnp.take_along_axis(of(embed), labels[:, None], -1)))(embed)

    @jax.jit
    def of_head(x):  # of one position
        p, of = jnp.exp(likelihoods(params[name], x))[0], jax.jacrev(likelihoods)(params[name], x)[0]
        return jnp.sum(p[:, None] * jnp.sum(of**2, axis=2), axis=0)

    rows, second, head = np.zeros(config.vocab), 0, 0
    for i, window in enumerate(tokens):
        x = streams(params["embed"], window)
        labels = jax.random.categorical(jax.random.fold_in(key, i), llama.head(config, params, x))[0]
        gradient = np.asarray(pulled(params["embed"], window, labels), np.float64)
        rows, second = rows + np.sum(gradient**2, axis=1), second + gradient.T @ gradient
        head = head + sum(np.asarray(of_head(x[:, t:t + 1])) for t in range(len(window)))
    close = partial(np.testing.assert_allclose, rtol=2e-3)
    close(found["embed"].rows, rows / tokens.size, atol=1e-6 * rows.max())
    close(found["embed"].second, second / tokens.size, atol=1e-5 * np.abs(second).max())
    close(found["head"].rows, head / tokens.size, atol=1e-6 * head.max())
    for of in found["embed"], found["head"]:
        close(np.trace(of.second), of.rows.sum())


def test_the_shares_of_windows_sum_to_the_whole(config):
    model = convert.load(config.model)
    tokens, key = RNG.integers(0, 256, (4, 16)), jax.random.key(0)
    of = lambda windows: calibration.output_fisher(model.config, model.params, tokens, key, windows, tables=True)
    whole, parts = of(range(4)), [of(range(1)), of(range(1, 4))]
    for path in ("embed", "head"):
        for field in ("second", "rows"):
            np.testing.assert_allclose(sum(getattr(part[path], field) for part in parts), getattr(whole[path], field),
                                       rtol=1e-3, atol=1e-3 * np.abs(getattr(whole[path], field)).max())


# ---- runs


def test_tables_that_are_not_counted_change_no_layer(finished, config, tmp_path):
    compress.compress(config, tmp_path / "dense")
    blocks = lambda out: {name: b for name, b in weight_files(out).items() if name.startswith("block")}
    assert blocks(tmp_path / "dense") == blocks(finished[0])


def test_they_are_at_the_last_blocks_level_and_what_they_take_is_told(finished, config):
    out, row = finished
    assert [table["path"] for table in row["tables"]] == names(config)
    assert {table["level"] for table in row["tables"]} == {row["layers"][-1]["level"]}
    params = artifact.load(out).params
    for table in row["tables"]:
        assert params[table["path"]].stored_bits == table["bits"]
    stored = sum(array.nbytes for path in out.glob("*.safetensors") for array in files.read_arrays(path).values())
    assert row["model_bits_per_weight"] == 8 * stored / llama.all_weights(convert.load(config.model).config)


def test_a_budget_of_the_whole_model_is_met_by_layers_and_tables_together(config, tmp_path):
    row = compress.compress(dataclasses.replace(config, tables="level", counted="model"), tmp_path / "out")
    rows = row["layers"] + row["tables"]
    bits = sum(r["bits"] for r in rows) / sum(r["shape"][0] * r["shape"][1] for r in rows)
    assert 0.995 * 4 <= bits <= 4
    assert len({r["level"] for r in rows}) <= 3  # of two blocks and the tables


@pytest.mark.parametrize(("bits", "budget"), [("8", 7.0), ("4", 5.0)])
def test_rounded_tables_are_left_out_of_what_the_layers_get(config, tmp_path, bits, budget):
    row = compress.compress(dataclasses.replace(config, tables=bits, counted="model", bits=budget), tmp_path / "out")
    rows = row["layers"] + row["tables"]
    assert all(table["bits_per_weight"] == int(bits) + 32 / 24 for table in row["tables"])
    found = sum(r["bits"] for r in rows) / sum(r["shape"][0] * r["shape"][1] for r in rows)
    assert 0.99 * budget <= found <= budget


def test_beside_a_fixed_rate_they_are_rounded_and_a_training_keeps_them(config, tmp_path):
    fixed = dataclasses.replace(config, level=None, bits=None, tables="8", caldera=cj.CalderaConfig(
        rank=2, outer_iterations=1, inner_iterations=1))
    row = compress.compress(fixed, tmp_path / "out")
    assert all(table["q_bits"] == 8 and table["error"] < 0.01 for table in row["tables"])
    assert (before := artifact.load(tmp_path / "out").params)["embed"].grids[0] == Uniform(8, group=24)
    trained = finetune(FinetuneConfig(str(tmp_path / "out"), TrainConfig(), Tokens(config.calibration.text, 6, 32), 2),
                       tmp_path / "trained")
    after = artifact.load(tmp_path / "trained").params
    for name in names(config):
        np.testing.assert_array_equal(linear.dense(before[name]), linear.dense(after[name]))
    stored = sum(array.nbytes for path in (tmp_path / "trained").glob("*.safetensors")
                 for array in files.read_arrays(path).values())
    assert trained["tables"] == row["tables"]
    assert trained["model_bits_per_weight"] == 8 * stored / llama.all_weights(convert.load(config.model).config)


def test_cut_off_at_the_last_table_it_ends_with_the_same_bytes(finished, config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 14 + len(names(config)) - 1)
        with pytest.raises(KeyboardInterrupt):
            compress.compress(dataclasses.replace(config, tables="level"), tmp_path / "out")
    compress.compress(dataclasses.replace(config, tables="level"), tmp_path / "out")
    assert weight_files(tmp_path / "out") == weight_files(finished[0])


def test_a_finer_level_loses_less_in_the_tables_and_what_it_costs_is_foretold(config, tmp_path):
    """Of the tables alone, the layers dense."""
    found = []
    for c in (0.002, 0.02):
        given = dataclasses.replace(config, bits=None, c=c, tables="level")
        row = compress.compress(given, tmp_path / str(c))
        dense, model = convert.load(config.model), artifact.load(tmp_path / str(c))
        tables = {name: model.params[name] for name in names(config)}
        _, held_out = compress.texts(config, dense)
        divergence = evaluate.compare(model.config, dense.params, dense.params | tables, held_out).divergence.mean()
        found.append((divergence, sum(table["predicted_damage"] for table in row["tables"])))
    (fine, foretold), (coarse, coarsely) = found
    assert fine < coarse / 4 and 0.2 < fine / foretold < 5 and 0.2 < coarse / coarsely < 5


def test_a_run_from_before_there_were_these_settings_goes_on(config, tmp_path):
    compress.compress(config, out := tmp_path / "out")
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["run"]["config"]["tables"], manifest["run"]["config"]["counted"], manifest["sha256"]
    files.write_json(out / "manifest.json", manifest)
    assert compress.compress(config, out)["model"] == config.model


# ---- what a model with such tables does


def test_inspect_shows_the_tables_behind_the_layers(finished, config, capsys):
    cli.inspect(finished[0])
    said = capsys.readouterr().out
    for name in names(config):
        assert re.search(rf"^{name} +256 +24 ", said, re.MULTILINE) and f"{name} 0.0 MB at " in said
    assert re.search(r"model \d+\.\d{4} bits a weight", said)


def test_it_evaluates_and_generates_and_exports_as_its_dense_twin(finished, tmp_path):
    out, row = finished
    model = artifact.load(out)
    dense = model._replace(params=export.dense(model.params, jnp.dtype(np.float32)))
    tokens = RNG.integers(0, 256, (2, 24))
    found = evaluate.compare(model.config, weights.whole(dense.params), model.params, tokens)
    assert found.divergence.max() < 1e-5 and found.agree.all()
    ours, theirs = (generate.complete(m.config, weights.whole(m.params), [[5, 6, 7]], generate.Sampling(8))
                    for m in (model, dense))
    np.testing.assert_array_equal(ours[0], theirs[0])
    export.export(model, "hf", tmp_path / "hf")
    back = convert.load(tmp_path / "hf")
    np.testing.assert_array_equal(np.asarray(back.params["embed"]), np.asarray(linear.dense(model.params["embed"])))


def test_a_damaged_table_is_named(finished, tmp_path):
    out, _ = finished
    arrays = files.read_arrays(out / artifact.REST)
    path = Path(tmp_path / artifact.REST)
    files.write_arrays(path, arrays | {"embed.q.integers.words": arrays["embed.q.integers.words"][:-1]})
    with pytest.raises(ValueError, match="embed: a stream of coded integers is damaged"):
        artifact._tables(path, convert.arrays(path), artifact.read_manifest(out)["layers"])


# ---- bad input


@pytest.mark.parametrize(("changes", "message"), [
    ({"level": None, "tables": "level"}, "need a level"),
    ({"counted": "model"}, "--tables level, 8 or 4"),
    ({"counted": "model", "tables": "level", "blocks": 1}, "for all blocks"),
])
def test_settings_that_do_not_go_together_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, **changes)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_table_with_a_number_that_is_none_is_named(config, tmp_path, value):
    model = convert.load(config.model)
    params = weights.whole(model.params)
    params["embed"] = np.array(params["embed"])
    params["embed"][3, 4] = value
    source = tiny.write_model(tmp_path / "model", model.config, params)
    with pytest.raises(ValueError, match="embed: the weights hold NaN or infinite values"):
        compress.compress(dataclasses.replace(config, model=str(source), tables="level"), tmp_path / "out")
