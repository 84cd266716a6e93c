"""compress, calibration, evaluate and artifact, end to end on a tiny model; then the real model's first blocks."""

import dataclasses
import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from caldera_jax import CalderaConfig, hessian, linear
from caldera_jax.jobs import artifact, calibration, cli, evaluate, explain, facts, finetune, generate, report
from caldera_jax.jobs import compress as compress_module
from caldera_jax.jobs.compress import compress, memory_need
from caldera_jax.jobs.run import Run
from caldera_jax.jobs.settings import RunConfig, recorded
from caldera_jax.models import convert, data, files, llama, weights
from caldera_jax.models.data import Tokens
from caldera_jax.objective import importance

CALDERA = CalderaConfig(rank=3, outer_iterations=2, inner_iterations=1, quantizer="uniform", q_bits=3,
                        factor_quantizer="uniform")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Directory of the tiny model with its text beside it."""
    directory = tmp_path_factory.mktemp("tiny")
    tiny.write_text(directory / "text.txt")
    return tiny.write_model(directory / "model")


@pytest.fixture
def config(source):
    text = str(source.parent / "text.txt")
    return RunConfig(str(source), CALDERA, Tokens(text, 4, 32), Tokens(text, 3, 32))


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """An uninterrupted run: its directory and its report."""
    text, out = str(source.parent / "text.txt"), tmp_path_factory.mktemp("run") / "out"
    row = compress(RunConfig(str(source), CALDERA, Tokens(text, 4, 32), Tokens(text, 3, 32)), out)
    return out, row


def weight_files(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))} | {
        name: (directory / name).read_bytes() for name in (artifact.MANIFEST, artifact.TOKENIZER)}


def interrupt_after(monkeypatch, count):
    """The run is cut off once ``count`` layers were kept."""
    keep, kept = Run.keep_layer, []

    def stop(self, path, *rest):
        if len(kept) == count:
            raise KeyboardInterrupt
        kept.append(path)
        keep(self, path, *rest)

    monkeypatch.setattr(Run, "keep_layer", stop)


# ---- one run


def test_the_report_says_what_it_promises(finished):
    out, row = finished
    assert {"model", "config", "seed", "versions", "machine", "base_perplexity", "compressed_perplexity",
            "bits_per_weight", "stored_bytes", "model_bytes", "layers", "seconds", "peak_memory_bytes"} <= row.keys()
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(row))
    assert len(row["layers"]) == 14 and row["layers"][0]["path"] == "blocks.0.q"
    assert row["peak_memory_bytes"] > 0 and row["seconds"]["total"] >= row["seconds"]["compress"] > 0


def test_stored_bits_are_the_bytes_of_the_codes_scales_and_signs_on_disk(finished):
    out, row = finished
    by_hand = 8 * sum(value.nbytes for file in sorted(out.glob("block_*"))
                      for name, value in files.read_arrays(file).items() if "." in name)
    assert sum(r["bits"] for r in row["layers"]) == by_hand == 8 * row["stored_bytes"]
    weights = sum(np.prod(r["shape"]) for r in row["layers"])
    assert row["bits_per_weight"] == pytest.approx(by_hand / weights)


def test_reported_errors_are_those_of_the_dense_replacement_against_the_undamped_hessian(finished, config):
    out, row = finished
    model, compressed = convert.load(config.model), artifact.load(out)
    tokens, _ = compress_module.texts(config, model)
    for index, moments in calibration.collect(model.config, model.params, tokens):
        for name in llama.LINEARS:
            w = np.asarray(model.params["blocks"][index][name], np.float64)
            e = np.asarray(compressed.params["blocks"][index][name].dense(), np.float64) - w
            h = np.asarray(moments[llama.INPUT_OF[name]].mean(), np.float64)
            expected = np.sqrt(np.trace(e @ h @ e.T) / np.trace(w @ h @ w.T))
            found = next(r["error"] for r in row["layers"] if r["path"] == f"blocks.{index}.{name}")
            assert found == pytest.approx(expected, rel=1e-4)


def test_outputs_by_importance_and_factors_with_feedback_make_a_run_like_any(finished, config, tmp_path):
    best = dataclasses.replace(CALDERA, factor_rounding="feedback", downdate=True)
    changed = dataclasses.replace(config, outputs="fisher", caldera=best)
    row = compress(changed, out := tmp_path / "out")
    assert recorded(artifact.read_manifest(out)["run"]["config"]) == changed
    by_hand = 8 * sum(value.nbytes for file in sorted(out.glob("block_*"))
                      for name, value in files.read_arrays(file).items() if "." in name)
    assert sum(r["bits"] for r in row["layers"]) == by_hand > sum(r["bits"] for r in finished[1]["layers"])
    model, loaded = convert.load(config.model), artifact.load(out)
    tokens, _ = compress_module.texts(config, model)
    key = jax.random.fold_in(jax.random.key(0), 14)
    fisher = calibration.output_fisher(model.config, model.params, tokens, key, range(len(tokens)))
    (_, moments), _ = calibration.collect(model.config, model.params, tokens)
    for i, name in enumerate(llama.LINEARS):  # as made by hand
        g = importance(fisher[f"blocks.0.{name}"].importance())
        layer, _ = linear.compress_matrix(jax.random.fold_in(jax.random.key(0), i), model.params["blocks"][0][name],
                                          moments[llama.INPUT_OF[name]].mean(), best, g=g)
        wanted, found = (np.asarray(linear.dense(one)) for one in (layer, loaded.params["blocks"][0][name]))
        assert np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted)
    assert "outputs" not in finished[1]["config"] and row["config"]["outputs"] == "fisher"


def test_a_trellis_makes_a_run_like_any(config, tmp_path, capsys, monkeypatch):
    chosen = dataclasses.replace(CALDERA, quantizer="trellis", draft="e8p")
    row = compress(changed := dataclasses.replace(config, caldera=chosen), out := tmp_path / "out")
    assert recorded(artifact.read_manifest(out)["run"]["config"]) == changed
    by_hand = 8 * sum(value.nbytes for file in sorted(out.glob("block_*"))
                      for name, value in files.read_arrays(file).items() if "." in name)
    assert sum(r["bits"] for r in row["layers"]) == by_hand
    monkeypatch.setattr("sys.argv", ["caldera", "eval", str(out), "--processes", "0"])
    cli.main()
    assert f"perplexity {row['compressed_perplexity']:.4f}" in capsys.readouterr().out
    told = [generate.run(out, ["to"], generate.Sampling(3), held).tokens for held in ("packed", "dense", "bytes")]
    assert told[0] == told[1] == told[2]


def test_eval_from_disk_repeats_the_reported_perplexity(finished, capsys, monkeypatch):
    out, row = finished
    monkeypatch.setattr("sys.argv", ["caldera", "eval", str(out), "--processes", "0"])
    cli.main()
    assert f"perplexity {row['compressed_perplexity']:.4f}" in capsys.readouterr().out


def test_windows_behind_bos_are_those_of_calibration_of_evaluation_and_of_eval(source, config, tmp_path, capsys,
                                                                               monkeypatch):
    with pytest.raises(ValueError, match="knows no token that begins a text: leave --bos out"):
        compress(dataclasses.replace(config, bos=True), tmp_path / "none")
    named = tmp_path / "named"
    shutil.copytree(source, named)
    (named / "tokenizer_config.json").write_text(json.dumps({"bos_token": "a"}))
    chosen, out = dataclasses.replace(config, model=str(named), bos=True), tmp_path / "out"
    model = convert.load(named)
    tokens, held_out = compress_module.texts(chosen, model)
    plain = compress_module.texts(dataclasses.replace(chosen, bos=False), model)
    bos = model.tokenizer.token_to_id("a")
    for ours, theirs in zip((tokens, held_out), plain, strict=True):
        assert ours.shape == theirs.shape and np.all(ours[:, 0] == bos)
        np.testing.assert_array_equal(ours[:, 1:].ravel(), theirs.ravel()[:ours[:, 1:].size])
    row, said = compress(chosen, out), []
    assert row["config"]["bos"] and row["evaluated_tokens"] == 3 * 31
    assert row["base_perplexity"] == pytest.approx(evaluate.perplexity(model.config, model.params, held_out), rel=1e-6)
    for more in ([], ["--stride", "31"], ["--bos", "False"], ["--context", "16", "--stride", "5"]):
        monkeypatch.setattr("sys.argv", ["caldera", "eval", str(out), "--processes", "0", *more])
        cli.main()
        said.append(capsys.readouterr().out)
    for text in said[:2]:
        assert f"perplexity {row['compressed_perplexity']:.4f} on 3 windows of 32 tokens" in text
        assert "BOS first: context 32, stride 31, 93 tokens scored" in text
    assert "BOS" not in said[2] and "context 32, stride 32, 93 tokens scored" in said[2]
    assert "BOS first: context 16, stride 5, 93 tokens scored" in said[3]
    assert ", behind BOS)" in cli.table(row)
    run = artifact.read_manifest(out)["run"]  # what comes after takes the run's windows, too
    np.testing.assert_array_equal(finetune.held_out(model, run["config"]), held_out)
    np.testing.assert_array_equal(explain._tokens(chosen, run, model), tokens)
    assert facts.read_text(out).pieces[0][0] == "a"
    train = finetune.FinetuneConfig(str(out), text=Tokens(chosen.calibration.text, 5, 16), aside=1)
    batch, _ = finetune.read(train, model, run["config"])
    assert batch.tokens.shape == (5, 16) and np.all(batch.tokens[:, 0] == bos)
    lines = source.parent / "lines.jsonl"
    lines.write_text('{"text": "to", "label": 0}\n{"text": "be", "label": 1}')
    batch, _ = finetune.labelled(model, lines, 4, [bos])
    assert batch.tokens[:, 0].tolist() == [bos] * 2 and batch.tokens.dtype == np.int32


def test_inspect_shows_where_the_bytes_are_and_they_add_up(finished, capsys, tmp_path):
    out = finished[0]
    found = artifact.sizes(out)
    assert sum(found.values()) == sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    params = artifact.load(out).params
    for name in llama.LINEARS:
        layers = [linear.size(block[name]) for block in params["blocks"]]
        assert 8 * found[name] == sum(layers)
    assert found["embed"] == found["head"] == np.asarray(params["embed"]).nbytes
    config = artifact.load(out).config
    assert found["gains and biases"] == 4 * config.dim * (2 * config.layers + 1)
    cli.inspect(out, sizes=True)
    *rows, last = capsys.readouterr().out.splitlines()
    assert [row.split("  ")[0] for row in rows] == list(found) and last.split()[-1] == "100.00%"
    shutil.copytree(out, tmp_path / "copy")
    (tmp_path / "copy" / "block_000.safetensors").write_bytes(b"12345678{")
    with pytest.raises(ValueError, match="block_000.safetensors: its header is damaged"):
        artifact.sizes(tmp_path / "copy")


def test_inspect_shows_every_layer(finished, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["caldera", "inspect", str(finished[0])])
    cli.main()
    printed = capsys.readouterr().out
    assert all(f"blocks.{i}.{name} " in printed for i in range(2) for name in llama.LINEARS)


def test_a_finished_run_is_not_run_again(finished, config):
    out, row = finished
    before = weight_files(out)
    assert compress(config, out) == json.loads(json.dumps(row))
    assert weight_files(out) == before


def test_a_finished_run_whose_report_was_changed_says_which_field(finished, config, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "out")
    changed = files.read_json(out / "report.json")
    del changed["stages"]["load"]["seconds"]
    files.write_json(out / "report.json", changed)
    with pytest.raises(ValueError, match="report.json: stages: load: there is no seconds"):
        compress(config, out)


def test_one_compilation_a_shape(source, config, tmp_path):
    linear._compress.clear_cache()
    compress(dataclasses.replace(config, seed=5), tmp_path / "out")
    assert linear._compress._cache_size() == len(set(llama.shapes(tiny.CONFIG).values())) == 4


# ---- resuming


@pytest.mark.parametrize("count", [0, 1, 7, 13])
def test_killed_after_any_layer_it_ends_with_the_same_bytes(finished, config, tmp_path, monkeypatch, count):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(patch, count)
        with pytest.raises(KeyboardInterrupt):
            compress(config, out)
    with pytest.raises(ValueError, match="unfinished run"):
        artifact.load(out)
    with monkeypatch.context() as patch:  # finished layers are not compressed again
        done, original = [], compress_module.compress_matrix
        patch.setattr(compress_module, "compress_matrix", lambda *a: done.append(a[-1]) or original(*a))
        resumed = compress(config, out)
    assert len(done) == 14 - count
    assert weight_files(out) == weight_files(finished[0])
    assert resumed["compressed_perplexity"] == finished[1]["compressed_perplexity"]
    assert not (out / "unfinished").exists()


def test_killed_before_the_report_it_only_evaluates(finished, config, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compress(config, out)
    monkeypatch.setattr(compress_module, "compress_matrix", None)
    assert compress(config, out)["layers"][3]["error"] == finished[1]["layers"][3]["error"]
    assert weight_files(out) == weight_files(finished[0])


def test_a_full_disk_keeps_finished_layers_and_says_so(finished, config, tmp_path, monkeypatch, capsys):
    out, write = tmp_path / "out", files.write

    def full(path, content):
        if path.name == "blocks.0.gate.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    text = config.calibration.text
    arguments = ["caldera", "compress", config.model, "--out", str(out), "--preset", "default", "--rank", "3",
                 "--outer-iterations", "2", "--inner-iterations", "1", "--quantizer", "uniform", "--q-bits", "3",
                 "--factor-quantizer", "uniform", "--svd", "exact", "--calibration-text", text, "--calibration-windows",
                 "4", "--calibration-window", "32", "--evaluation-text", text, "--evaluation-windows", "3",
                 "--evaluation-window", "32", "--processes", "0"]
    monkeypatch.setattr("sys.argv", arguments)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write", full)
        with pytest.raises(SystemExit) as stop:
            cli.main()
    assert stop.value.code == 2 and "disk is full" in capsys.readouterr().err
    assert len(list((out / "unfinished").glob("blocks.*.safetensors"))) == 4
    cli.main()
    assert weight_files(out) == weight_files(finished[0])


def test_a_damaged_layer_of_an_unfinished_run_is_made_again(finished, config, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            compress(config, out)
    (out / "unfinished" / "blocks.0.k.safetensors").write_bytes(b"")
    compress(config, out)
    assert "blocks.0.k: kept, but not readable" in capsys.readouterr().out
    assert weight_files(out) == weight_files(finished[0])


def test_killed_before_anything_was_written_it_starts(finished, config, tmp_path):
    out = tmp_path / "out"
    (out / "unfinished").mkdir(parents=True)
    (out / "unfinished" / "run.json.tmp").write_text("{")
    compress(config, out)
    assert weight_files(out) == weight_files(finished[0])


def test_the_same_path_with_another_text_is_another_run(config, tmp_path, monkeypatch):
    text = tiny.write_text(tmp_path / "text.txt")
    tokens = Tokens(str(text), 4, 32)
    config = dataclasses.replace(config, calibration=tokens, evaluation=dataclasses.replace(tokens, windows=3))
    compress(config, tmp_path / "out", tmp_path / "moments")
    text.write_text("Something else. " + text.read_text())
    with pytest.raises(ValueError, match="another run .its calibration_sha256"):
        compress(config, tmp_path / "out")
    monkeypatch.setattr(calibration, "calibrate_block", None)
    with pytest.raises(TypeError):  # the kept Moments are not those of this text
        compress(config, tmp_path / "new", tmp_path / "moments")


def test_another_run_or_a_foreign_directory_is_refused(finished, config, tmp_path):
    with pytest.raises(ValueError, match=r"another run \(its seed is 0, this run's 1\)"):
        compress(dataclasses.replace(config, seed=1), finished[0])
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="something else"):
        compress(config, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


# ---- calibration


def test_moments_are_the_second_moments_of_each_layers_input(source, config):
    model = convert.load(source)
    tokens, _ = compress_module.texts(config, model)
    hidden, positions = llama.embed(model.config, model.params, tokens), jnp.arange(tokens.shape[1])
    for index, moments in calibration.collect(model.config, model.params, tokens):
        block = jax.tree.map(jnp.asarray, dict(model.params["blocks"][index]))
        hidden, inputs = jax.jit(llama.block, static_argnums=0)(model.config, block, hidden, positions)
        for name, x in inputs.items():
            rows = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
            assert int(moments[name].count) == len(rows) == tokens.size
            np.testing.assert_allclose(moments[name].mean(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activations", ["dense", "compressed"])
def test_how_much_one_token_counts_is_the_runs_choice(config, activations, tmp_path):
    """With a cap of 1 half of each window's tokens are cut down; 0 is no cap, and so is one above the peak."""
    made = {}
    for cap in (0.0, 1.0, 1e4):
        chosen = dataclasses.replace(config, token_cap=cap, activations=activations)
        made[cap] = compress(chosen, tmp_path / f"{cap}", tmp_path / "moments")["layers"]
    assert all(1 < row["peak"] < hessian.MASSIVE for rows in made.values() for row in rows)
    errors = {cap: [row["error"] for row in rows] for cap, rows in made.items()}
    assert errors[0.0] == errors[1e4] and errors[1.0][0] != errors[0.0][0]


@pytest.mark.parametrize("activations", ["dense", "compressed"])
def test_moments_of_one_block_lie_on_the_disk_at_a_time(config, activations, tmp_path, monkeypatch):
    spill, seen = calibration.spill, []

    def counted(directory, index, moments):
        seen.append(len(list(directory.glob("moments_*"))))
        spill(directory, index, moments)

    monkeypatch.setattr(calibration, "spill", counted)
    compress(dataclasses.replace(config, activations=activations), tmp_path / "out")
    assert seen == [0, 0]


@pytest.mark.parametrize(("layers", "blocks"), [(3, [1]), (7, [1]), (10, [])])
def test_a_resumed_run_calibrates_only_blocks_without_moments(finished, config, tmp_path, monkeypatch, layers, blocks):
    """Those of a block are there until all its layers are; to reach the second, the streams go through the first."""
    moments, calibrated = calibration.Inputs.moments, []

    def of_the_first(self, index):
        if index:
            raise KeyboardInterrupt
        return moments(self, index)

    with monkeypatch.context() as patch:
        interrupt_after(patch, layers)
        if layers == 7:  # between the blocks
            patch.setattr(calibration.Inputs, "moments", of_the_first)
        with pytest.raises(KeyboardInterrupt):
            compress(config, tmp_path / "out")
    monkeypatch.setattr(calibration.Inputs, "moments", lambda self, i: calibrated.append(i) or moments(self, i))
    compress(config, tmp_path / "out")
    assert calibrated == blocks and weight_files(tmp_path / "out") == weight_files(finished[0])


def test_moments_and_runs_of_before_the_cap_are_of_whole_tokens(config, tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    moments = hessian.update(hessian.zero(3), jnp.asarray(x))
    fields = {f"up.{name}": np.asarray(getattr(moments, name)) for name in ("sum", "error", "count")}
    files.write_arrays(tmp_path / "m", fields)
    found = calibration.load_moments(tmp_path / "m")["up"]
    np.testing.assert_allclose(found.energy, np.sum(x * x), rtol=1e-5)
    assert float(found.left_out(0.01)) == 1 and float(found.peak) == 0
    plain = report.plain(config)
    assert recorded(plain) == config and config.token_cap == 1e4
    del plain["token_cap"]
    assert recorded(plain).token_cap == 0


def test_a_massive_token_is_named(finished):
    row = json.loads(json.dumps(finished[1]))
    assert "massive" not in cli.table(row)
    row["layers"][6]["peak"], row["layers"][9]["peak"] = 331042.2, 20815.0
    assert ("massive token     blocks.0.down: 3.31e+05 times the median squared norm, counted as 10000 times (2 "
            "layers have such tokens)") in cli.table(row)
    row["config"]["token_cap"] = 0.0
    assert "counted whole (2" in cli.table(row)


def test_spilled_moments_are_read_again_and_change_no_byte(finished, config, tmp_path, monkeypatch):
    compress(config, tmp_path / "a", tmp_path / "moments")
    monkeypatch.setattr(calibration, "calibrate_block", None)
    compress(config, tmp_path / "b", tmp_path / "moments")
    assert weight_files(tmp_path / "a") == weight_files(tmp_path / "b") == weight_files(finished[0])


def test_calibrating_on_the_compressed_model_changes_later_blocks_only(finished, config, tmp_path):
    compress(dataclasses.replace(config, activations="compressed"), tmp_path / "out")
    ours, theirs = weight_files(tmp_path / "out"), weight_files(finished[0])
    assert ours["block_000.safetensors"] == theirs["block_000.safetensors"]
    assert ours["block_001.safetensors"] != theirs["block_001.safetensors"]


@pytest.mark.extra
def test_released_hessians_are_read_with_their_mean(source, config, tmp_path):
    torch = pytest.importorskip("torch", reason="the authors' Hessians are torch files")
    shapes, expected = llama.shapes(tiny.CONFIG), {}
    for index in range(2):
        for layer, name in (("q", "qkv"), ("o", "o"), ("up", "up"), ("down", "down")):
            x = np.random.default_rng(index).standard_normal((100, shapes[layer][1])) + 0.5
            covariance, n = np.cov(x.T, bias=True), x.shape[1]
            flat = torch.tensor(covariance[np.tril_indices(n)], dtype=torch.float32)
            saved = {"flatH": flat, "mu": torch.tensor(x.mean(0), dtype=torch.float32), "n": n, "ct": 100}
            torch.save(saved, tmp_path / f"{index}_{name}.pt")
            expected[index, name] = x.T @ x / len(x)
    for (index, name), h in expected.items():
        np.testing.assert_allclose(calibration.released(tmp_path, tiny.CONFIG, index, name), h, atol=1e-5)
    row = compress(dataclasses.replace(config, hessians=str(tmp_path)), tmp_path / "out")
    assert row["max_layer_error"] < 1
    shutil.copy(tmp_path / "0_down.pt", tmp_path / "1_o.pt")
    with pytest.raises(ValueError, match="1_o.pt: the Hessian is of 40 inputs, and this model's layer has 24"):
        calibration.released(tmp_path, tiny.CONFIG, 1, "o")
    with pytest.raises(ValueError, match="0_qkv.pt: missing"):
        calibration.released(tmp_path / "none", tiny.CONFIG, 0, "qkv")


def test_fewer_tokens_than_inputs_work_and_raised_damping_is_reported_by_layer(config, tmp_path, capsys):
    few = dataclasses.replace(config.calibration, windows=1, window=8)
    undamped = dataclasses.replace(CALDERA, damping=0.0)
    row = compress(dataclasses.replace(config, calibration=few, caldera=undamped), tmp_path / "out")
    assert row["max_layer_error"] < 1
    raised = [r for r in row["layers"] if r["damping"] > 0]
    printed = capsys.readouterr().out
    assert raised and all(f"{r['path']}: the Hessian is not positive definite" in printed for r in raised)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_models_compress_and_keep_their_dense_arrays(source, config, tmp_path, dtype):
    params = llama.init(jax.random.key(0), tiny.CONFIG, dtype)
    convert.save_hf(tmp_path / "model", tiny.CONFIG, params)
    shutil.copy(source / "tokenizer.json", tmp_path / "model")
    row = compress(dataclasses.replace(config, model=str(tmp_path / "model")), tmp_path / "out")
    back = artifact.load(tmp_path / "out")
    assert np.isfinite(row["compressed_perplexity"]) and row["max_layer_error"] < 1
    np.testing.assert_array_equal(back.params["embed"], np.asarray(params["embed"]))
    assert back.params["embed"].dtype == dtype


def test_only_the_first_blocks_are_compressed_when_asked(config, tmp_path):
    row = compress(dataclasses.replace(config, blocks=1), tmp_path / "out")
    assert {r["path"].split(".")[1] for r in row["layers"]} == {"0"}
    kept = artifact.load(tmp_path / "out").params["blocks"][1]["gate"]
    np.testing.assert_array_equal(kept, convert.load(config.model).params["blocks"][1]["gate"])


# ---- perplexity


def test_perplexity_is_exp_of_the_mean_loss_of_the_whole_forward(source):
    model = convert.load(source)
    windows = np.random.default_rng(0).integers(0, 256, (3, 20)).astype(np.int32)
    params = jax.tree.map(jnp.asarray, weights.whole(model.params))
    logits = np.asarray(jax.jit(llama.forward, static_argnums=0)(model.config, params, windows), np.float64)[:, :-1]
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, windows[:, 1:, None], -1)[..., 0]
    assert evaluate.perplexity(model.config, model.params, windows, 2) == pytest.approx(np.exp(losses.mean()), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(source):
    model = convert.load(source)
    params = model.params | {"head": np.zeros_like(model.params["head"])}
    windows = np.arange(40, dtype=np.int32).reshape(2, 20)
    assert evaluate.perplexity(model.config, params, windows) == pytest.approx(256)


def test_perplexity_of_single_tokens_is_refused(source):
    model = convert.load(source)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        evaluate.perplexity(model.config, model.params, np.zeros((3, 1), np.int32))


# ---- the artifact


GRIDS = [CalderaConfig(rank=2, outer_iterations=1, inner_iterations=1, quantizer=name, q_bits=4, factor_quantizer=name,
                       factor_bits=8, rotation=rotation)
         for name, rotation in (("uniform", "orthogonal"), ("nf", "none"), ("dithered", "hadamard"))]
GRIDS += [dataclasses.replace(CALDERA, factor_quantizer="e8p", factor_bits=16), dataclasses.replace(CALDERA, rank=0),
          dataclasses.replace(CALDERA, q_bits=0)]


@pytest.mark.parametrize("caldera", GRIDS, ids=str)
def test_layers_come_back_from_disk_bit_for_bit(caldera, tmp_path):
    w = np.random.default_rng(0).standard_normal((10, 13)).astype(np.float32)
    layer, _ = linear.compress_matrix(jax.random.key(0), w, np.eye(13, dtype=np.float32), caldera)
    files.write_arrays(tmp_path / "layer", artifact.layer_arrays(layer))
    meta = json.loads(json.dumps(report.plain(artifact.layer_meta(layer))))
    back = artifact.layer_from(files.read_arrays(tmp_path / "layer"), meta)
    assert (back.shape, back.grids, back.stored_bits) == (layer.shape, layer.grids, layer.stored_bits)
    np.testing.assert_array_equal(back.dense(), layer.dense())


def test_a_flipped_bit_of_the_manifest_is_named_or_changes_nothing(finished, tmp_path):
    path = tmp_path / artifact.MANIFEST
    whole = (finished[0] / artifact.MANIFEST).read_bytes()
    rng, meant, named = np.random.default_rng(0), json.loads(whole), 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            read = artifact.read_manifest(tmp_path)
        except ValueError as error:
            named += str(path) in str(error)
        else:  # white space, or the name of the digest
            assert all(read[name] == value for name, value in meant.items() if name != "sha256")
            named += 1
    assert named == 300


def test_a_damaged_missing_or_foreign_file_is_named(finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "out")
    block = out / "block_001.safetensors"
    damaged = bytearray(block.read_bytes())
    damaged[-1] ^= 1
    block.write_bytes(damaged)
    with pytest.raises(ValueError, match="block_001.*SHA-256"):
        artifact.load(out)
    block.unlink()
    with pytest.raises(ValueError, match="block_001.*missing"):
        artifact.load(out)
    manifest = json.loads((out / artifact.MANIFEST).read_text())
    (out / artifact.MANIFEST).write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ValueError, match="format 99.*reads formats 1 to 5"):
        artifact.load(out)
    second = {name: value for name, value in manifest.items() if name != "sha256"} | {"format": 2}
    (out / artifact.MANIFEST).write_text(json.dumps(second))
    assert artifact.read_manifest(out)["layers"] == manifest["layers"]
    first = {name: value for name, value in manifest.items() if name not in ("special", "ends", "sha256")} | {
        "format": 1}
    (out / artifact.MANIFEST).write_text(json.dumps(first))
    (out / block.name).write_bytes((finished[0] / block.name).read_bytes())
    old, new = artifact.load(out), artifact.load(finished[0])  # the first format is read, too
    assert old.special == {} and old.ends == () and weights.rest(old.params).keys() == weights.rest(new.params).keys()
    np.testing.assert_array_equal(old.params["blocks"][1]["up"].dense(), new.params["blocks"][1]["up"].dense())
    (out / artifact.MANIFEST).write_text("[]")
    with pytest.raises(ValueError, match="not a manifest"):
        artifact.load(out)
    with pytest.raises(ValueError, match="no compressed model"):
        artifact.load(tmp_path)


def test_a_codebook_the_format_cannot_name_is_refused(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Mine:
        pass

    layer = linear.CompressedLinear(None, None, None, (), (), (1, 1), (Mine(), Mine(), Mine()))
    with pytest.raises(ValueError, match="Mine is not one of the package's codebooks"):
        artifact.layer_meta(layer)


# ---- bad input


@pytest.mark.parametrize(("change", "message"), [
    (dict(model="no-such-model"), "unknown model 'no-such-model'"),
    (dict(caldera=dataclasses.replace(CALDERA, rank=13)), r"rank 13 exceeds min\(m, n\) = 12 of layer k"),
    (dict(blocks=3), "blocks=3"),
    (dict(calibration=Tokens("no-such-text")), "unknown text"),
])
def test_bad_input_is_refused_before_any_work(config, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        compress(dataclasses.replace(config, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_too_short_or_shared_or_windows_too_long_are_refused(config, source, tmp_path):
    change = lambda **kw: dataclasses.replace(config, calibration=dataclasses.replace(config.calibration, **kw))
    with pytest.raises(ValueError, match="calibration text is too short: it has"):
        compress(change(windows=100_000), tmp_path / "out")
    with pytest.raises(ValueError, match="exceed the model's context 64"):
        compress(change(window=65), tmp_path / "out")
    copy = tmp_path / "copy.txt"
    shutil.copy(config.evaluation.text, copy)
    with pytest.raises(ValueError, match="1 documents are in both"):
        compress(change(text=str(copy)), tmp_path / "out")


def test_nan_weights_name_the_layer(source, config, tmp_path):
    model = convert.load(source)
    params = weights.whole(model.params)
    params["blocks"][1]["up"][3, 4] = np.nan
    convert.save_hf(tmp_path / "model", model.config, params)
    shutil.copy(source / "tokenizer.json", tmp_path / "model")
    with pytest.raises(ValueError, match="blocks.1.up: the weights hold NaN"):
        compress(dataclasses.replace(config, model=str(tmp_path / "model")), tmp_path / "out")


@pytest.mark.parametrize("arguments", [["compress", "x", "--out", "y", "--q-bits", "7"], ["eval", "nowhere"],
                                       ["compress", "x", "--out", "y", "--factor-bits", "4", "4", "4"]])
def test_the_command_line_turns_bad_input_into_one_line(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["caldera", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("caldera: ") and error.count("\n") == 1


# ---- the real model


@pytest.mark.slow
def test_the_first_two_blocks_of_smollm2(tmp_path, monkeypatch):
    whole = convert.load("smollm2-135m")
    cut = whole._replace(config=dataclasses.replace(whole.config, layers=2),
                         params=whole.params | {"blocks": whole.params["blocks"][:2]})
    fresh = lambda name: cut._replace(params=cut.params | {"blocks": list(cut.params["blocks"])})
    monkeypatch.setattr(convert, "load", fresh)
    caldera = CalderaConfig(rank=16, outer_iterations=2, inner_iterations=2, svd="randomized")
    config = RunConfig("smollm2-135m", caldera, Tokens(windows=4, window=256), Tokens(windows=2, window=256))
    row = compress(config, tmp_path / "out")
    nominal = sum(2 * m * n + 16 * 4 * (m + n) for m, n in (r["shape"] for r in row["layers"]))
    assert len(row["layers"]) == 14
    assert nominal < 8 * row["stored_bytes"] < 1.02 * nominal
    assert row["max_layer_error"] < 0.35
    loss, base = np.log(row["compressed_perplexity"]), np.log(row["base_perplexity"])  # two blocks alone know little
    assert abs(loss / base - 1) < 0.1
    model = artifact.load(tmp_path / "out")
    x = np.random.default_rng(0).standard_normal((5, 576)).astype(np.float32)
    gate = model.params["blocks"][1]["gate"]
    np.testing.assert_allclose(linear.apply(gate, x), x @ np.asarray(gate.dense()).T, rtol=1e-4, atol=1e-4)
    assert data.fetch_model("smollm2-135m").is_file()


@pytest.mark.extra
@pytest.mark.slow
def test_base_perplexity_of_smollm2_equals_that_of_transformers(tmp_path):
    torch = pytest.importorskip("torch", reason="transformers is the other side")
    transformers = pytest.importorskip("transformers", reason="transformers is the other side")
    model = convert.load("smollm2-135m")
    convert.save_hf(tmp_path, model.config, model.params)
    other = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    _, documents = data.split(data.load_text("enwiki"))
    windows = data.token_windows(model.tokenizer, documents, 512, 32, "evaluation")  # as in experiments/README.md
    losses = []
    with torch.no_grad():
        for tokens in torch.tensor(windows, dtype=torch.long)[:, None]:
            losses.append(float(other(input_ids=tokens, labels=tokens).loss))
    found = evaluate.perplexity(model.config, model.params, windows)
    assert found == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)


def test_the_memory_of_a_process_counts_the_streams_of_a_backward_pass():
    need = lambda config: memory_need(config, (64, 512), (32, 512)).each
    few, many = (dataclasses.replace(tiny.CONFIG, layers=layers) for layers in (1000, 3000))
    streams = 4 * 2000 * calibration.CHUNK * tiny.CONFIG.dim  # float32, of the further 2000 blocks
    assert need(many) - need(few) == streams
    wide = dataclasses.replace(tiny.CONFIG, ffn_dim=4000)  # a layer's 16 n² are more
    assert need(wide) == need(dataclasses.replace(wide, layers=3)) > 4 * 16 * 4000**2


def test_the_memory_of_a_run_counts_streams_of_calibration_those_of_a_group_of_views_and_scores_of_long_windows():
    config = dataclasses.replace(tiny.CONFIG, context=8192)
    streams = lambda *windows: memory_need(config, *windows).together
    assert streams((4096, 2048), (32, 512)) == 4 * 4096 * 2048 * config.dim
    many, more = (streams((0, 1), (views, 1024)) for views in (10**5, 10**6))
    assert many == more and 0.9 < many / (4 * evaluate.STREAMS) <= 1
    assert streams((0, 1), (8, 1024), 2) == 2 * streams((0, 1), (8, 1024), 1) == 8 * 1024 * 8 * config.dim
    short, long = (memory_need(config, (0, 1), (8, window)).each for window in (512, 8192))
    assert long - short > 8 * min(config.heads * 8192**2, llama.NUMBERS) - 10**8  # two numbers a score
    words = dataclasses.replace(config, vocab=10**5)
    assert memory_need(words, (0, 1), (8, 600)).each - memory_need(words, (0, 1), (8, 500)).each > 10**8  # logits
    table = 10**5 * config.dim  # brought to the level it takes 36 bytes a weight in all
    assert memory_need(words, (0, 1), (8, 2), tables=True).each >= 10**9 + (16 + 36) * table
