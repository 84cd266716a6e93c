"""Fine-tuning: gradients through packed codes, what is trained and what is not, resuming, and what comes out."""

import dataclasses
import errno
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from matrices import gaussian, hessian
from test_compress import weight_files

from caldera_jax import CalderaConfig, LevelConfig, apply, compress_matrix, linear, packing
from caldera_jax.jobs import artifact, cli, export, finetune, training
from caldera_jax.jobs import student as students
from caldera_jax.jobs.compress import compress
from caldera_jax.jobs.finetune import FinetuneConfig
from caldera_jax.jobs.settings import RunConfig
from caldera_jax.jobs.student import Batch, TrainConfig, loosen
from caldera_jax.linear import CompressedLinear
from caldera_jax.models import files, llama, weights
from caldera_jax.models.data import Tokens

CHEAP = CalderaConfig(rank=4, outer_iterations=2, inner_iterations=1, quantizer="uniform", factor_quantizer="uniform")
E8P = CalderaConfig(rank=5, outer_iterations=1, inner_iterations=1)
QUICK = TrainConfig(epochs=2, sign_rate=1e-2, factor_rate=1e-2, validate=3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a dense model, its text, and it compressed."""
    folder = tmp_path_factory.mktemp("finetune")
    text = str(tiny.write_text(folder / "text.txt", 400))
    model = tiny.write_model(folder / "model", tiny.SQUARE)
    compress(RunConfig(str(model), CHEAP, Tokens(text, 4, 32), Tokens(text, 6, 32)), folder / "compressed")
    return folder


def settings(place, train=QUICK, windows=22, aside=6):
    return FinetuneConfig(str(place / "compressed"), train, Tokens(str(place / "text.txt"), windows, 32), aside)


def test_of_several_texts_the_windows_take_turns_so_that_each_is_trained_on_and_validated_on(place):
    more = tiny.write_text(place / "more.txt", 200)
    config = settings(place)
    config = dataclasses.replace(config, text=Tokens(f"{config.text.text}+{more}", 6, 32), aside=2)
    model, run = artifact.load(config.source), artifact.read_manifest(place / "compressed")["run"]["config"]
    found = finetune.read(config, model, run)[0].tokens
    each = [finetune.read(dataclasses.replace(config, text=Tokens(text, 6, 32)), model, run)[0].tokens
            for text in config.text.text.split("+")]
    np.testing.assert_array_equal(found, np.stack(each, axis=1).reshape(12, 32))


# ---- what is trained


@pytest.mark.parametrize("config", [CHEAP, E8P, dataclasses.replace(E8P, rotation="orthogonal"),
                                    dataclasses.replace(CHEAP, rank=0), dataclasses.replace(CHEAP, q_bits=0)], ids=str)
@pytest.mark.parametrize("ranks", [0, 3, 99])
def test_a_loosened_layer_computes_what_the_packed_one_does(config, ranks):
    layer, _ = compress_matrix(jax.random.key(0), gaussian(18, 27), hessian("power", 27), config)
    x = gaussian(4, 27, 5)
    rest, free = loosen(layer, True, ranks)
    again = dataclasses.replace(rest, **free)
    assert ("left_side" in free) == (config.rotation == "hadamard") and again.rank == layer.rank
    # the same numbers, but for the order of the k sums and float32's rounding of the factors
    np.testing.assert_allclose(apply(again, x), apply(layer, x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(again.dense(), layer.dense(), rtol=1e-5, atol=1e-6)
    if ranks and layer.rank:
        count = min(ranks, layer.rank)
        assert free["trained"][0].shape == (count, 18) and free["trained"][1].shape == (count, 27)
        third, more = loosen(again, False, count + 1)  # those trained before are trained again
        assert len(more["trained"][0]) == min(count + 1, layer.rank)
        np.testing.assert_allclose(apply(dataclasses.replace(third, **more), x), apply(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("left", "right"), [(1e-3, 3.0), (3.0, 1e-3), (0.0, 1.0), (1e-15, 1e8)])
def test_trained_factors_are_of_one_size_and_of_the_same_product_to_the_bit(left, right):
    rng = np.random.default_rng(0)
    factors = [jnp.asarray(size * rng.normal(size=(3, n)), jnp.float32) for size, n in ((left, 24), (right, 40))]
    found = students._balanced(*factors)
    np.testing.assert_array_equal(found[0].T @ found[1], factors[0].T @ factors[1])
    sizes = [float(jnp.sqrt(jnp.mean(factor**2))) for factor in found]
    assert 0.5 <= sizes[0] / sizes[1] <= 2 if left else sizes == pytest.approx([0, 1], rel=0.3)


def test_what_is_stored_is_counted_in_the_type_that_it_is_stored_in(place):
    config = settings(place, dataclasses.replace(QUICK, ranks=3, factor_rate=1e-3))
    row = finetune.finetune(config, place / "bits")
    before, after = (artifact.load(place / name) for name in ("compressed", "bits"))
    total = 0
    for old, new in zip(before.params["blocks"], after.params["blocks"], strict=True):
        for name in llama.LINEARS:
            (m, n), was, now = old[name].shape, old[name], new[name]
            signs = 16 * (m + n) - 8 * (-(-m // 8) + -(-n // 8))
            packed = 8 * 3 * (was.left_t.codes.shape[1] + was.right.codes.shape[1])
            assert now.stored_bits == was.stored_bits + signs + 3 * 16 * (m + n) - packed
            assert now.left_side.dtype == jnp.float16 and now.trained[0].dtype == jnp.bfloat16
            np.testing.assert_array_equal(now.q.codes, was.q.codes)
            np.testing.assert_array_equal(now.right.codes, was.right.codes[3:])
            assert np.any(np.abs(np.asarray(now.left_side, np.float32)) != 1)
            total += now.stored_bits
    assert row["bits_per_weight"] == total / row["compressed_weights"]
    assert row["finetune"][-1]["trained"] == sum(m + n + 3 * (m + n) for m, n in llama.shapes(tiny.SQUARE).values()) * 2
    assert files.sha256(place / "bits" / artifact.REST) == files.sha256(place / "compressed" / artifact.REST)


# ---- gradients


def wide(tree):
    return jax.tree.map(lambda a: a.astype(np.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


@pytest.fixture(scope="module", params=[pytest.param({}, id="llama"), pytest.param(
    {"family": "gemma2", "sliding_window": 3, "local": (True, False)}, id="gemma2", marks=pytest.mark.slow)])
def small(request):
    """A float64 model of two blocks with layers of every kind of grid, and its tokens."""
    config = dataclasses.replace(tiny.CONFIG, vocab=31, layers=2, **request.param)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), llama.init(jax.random.key(3), config, jnp.float64))
    dense = {**params, "blocks": [dict(block) for block in params["blocks"]]}
    for block, caldera in zip(params["blocks"], (E8P, dataclasses.replace(CHEAP, rotation="orthogonal")), strict=True):
        for i, name in enumerate(llama.LINEARS):
            block[name], _ = compress_matrix(jax.random.key(i), block[name], np.eye(block[name].shape[1]), caldera)
    tokens = np.random.default_rng(0).integers(0, 31, (4, 9)).astype(np.int32)
    return config, params, dense, tokens


def goals(small):
    config, params, dense, tokens = small
    x = llama.embed(config, dense, tokens)
    for i, block in enumerate(dense["blocks"]):
        x, _ = llama.block(config.at(i), block, x, jnp.arange(9))
    labels, lengths = np.array([0, 1, 2, 1]), np.array([9, 4, 1, 6])
    return {"distill": Batch(tokens, np.asarray(x)), "text": Batch(tokens),
            "labels": Batch(tokens, None, labels, lengths)}


@pytest.mark.parametrize("goal", ["distill", "text", "labels"])
def test_gradients_are_slopes_of_the_loss(small, goal):
    config, params, _, _ = small
    train = TrainConfig(ranks=2, goal=goal, temperature=1.7, batch=4)
    model, free = students.student(config, params, train, 3)
    free = wide(free)
    if goal == "labels":
        free["classifier"] = jnp.asarray(gaussian(3, config.dim))
    batch = model.place(goals(small)[goal])
    loss, gradient = model.gradient(free, batch)
    assert float(loss) == pytest.approx(float(model.loss(free, batch)), rel=1e-12)
    step, rng = np.finfo(np.float64).eps ** (1 / 3), np.random.default_rng(1)
    leaves, structure = jax.tree.flatten(free)
    slopes = jax.tree.leaves(gradient)
    assert len(leaves) == len(slopes) > 30
    for number in rng.choice(len(leaves), 12, replace=False).tolist() + [len(leaves) - 1]:
        direction = jnp.asarray(rng.standard_normal(leaves[number].shape))
        moved = [jax.tree.unflatten(structure, leaves[:number] + [leaves[number] + sign * step * direction]
                                    + leaves[number + 1:]) for sign in (1, -1)]
        up, down = (float(model.loss(tree, batch)) for tree in moved)
        expected = float(jnp.sum(slopes[number] * direction))
        # a central difference errs by the square of the step times third derivatives, and by eps / step
        assert (up - down) / (2 * step) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_the_losses_are_those_of_the_definitions(small):
    config, params, dense, tokens = small
    model, free = students.student(config, params, TrainConfig(temperature=2.0, batch=4))
    logits = np.asarray(llama.forward(config, params, tokens))
    theirs = np.asarray(llama.forward(config, dense, tokens))

    def softmax(z):
        z = np.exp(z - z.max(-1, keepdims=True))
        return z / z.sum(-1, keepdims=True)

    p, q = softmax(theirs / 2), softmax(logits / 2)
    expected = 4 * np.mean(np.sum(p * np.log(p / q), -1))
    assert expected > 0.01
    assert float(model.loss(wide(free), model.place(goals(small)["distill"]))) == pytest.approx(expected, rel=1e-6)
    text = students.student(config, params, TrainConfig(goal="text", batch=4))[0]
    own = -np.log(np.take_along_axis(softmax(logits)[:, :-1], tokens[:, 1:, None], -1)).mean()
    assert float(text.loss(wide(free), text.place(Batch(tokens)))) == pytest.approx(own, rel=1e-6)
    assert float(students.soft_loss(jnp.asarray(logits[0]), jnp.asarray(logits[0]), 3.0)) == 0
    batch, classifier = goals(small)["labels"], np.asarray(gaussian(3, config.dim), np.float64)
    model, free = students.student(config, params | {"classifier": classifier}, TrainConfig(goal="labels", batch=4), 3)
    np.testing.assert_array_equal(free["classifier"], classifier.astype(np.float32))  # it goes on from there
    x = np.asarray(model.streams(wide(free), model.place(batch))[-1])[np.arange(4), batch.lengths - 1]
    x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_eps) * (params["norm"] + config.row.gain)
    q = softmax(x @ classifier.astype(np.float32).astype(np.float64).T)
    own = -np.log(q[np.arange(4), batch.labels]).mean()
    assert float(model.loss(wide(free), model.place(batch))) == pytest.approx(own, rel=1e-6)
    assert training.accuracy(model, wide(free), batch) == np.mean(q.argmax(-1) == batch.labels)


@pytest.mark.parametrize("goal", ["distill", "text"])
def test_the_loss_of_long_windows_is_taken_in_tiles_of_positions(small, goal, monkeypatch):
    config, params, _, tokens = small
    x, teacher = jax.random.normal(jax.random.key(0), (2, *tokens.shape, config.dim))
    batch, train = Batch(tokens, teacher if goal == "distill" else None), TrainConfig(goal=goal, temperature=2.0)
    outcome = lambda: jax.value_and_grad(lambda x: students._head_loss(config, train, 2, params, None, x, batch))(x)
    expected = outcome()
    monkeypatch.setattr(llama, "NUMBERS", 5 * config.vocab)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9), outcome(), expected)


@pytest.mark.slow
def test_parts_of_a_batch_have_the_gradient_of_the_whole(small):
    config, params, _, tokens = small
    found = []
    for accumulate in (1, 2, 4):
        train = TrainConfig(goal="text", ranks=1, batch=4, accumulate=accumulate)
        model, free = students.student(config, params, train)
        found.append(training._mean_gradient(model, wide(free), Batch(tokens)))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), gradient, found[0][1])


@pytest.mark.parametrize(("dim", "tokens", "most"), [(2048, 8, 0.5), (1024, 64, 3)])
@pytest.mark.parametrize(("quantizer", "bits"), [("e8p", 2), ("e8p", 3), ("nf", 4)])
def test_the_gradient_of_a_block_holds_no_dense_layer_but_the_one_at_hand(quantizer, bits, dim, tokens, most):
    """What XLA asks for beside arguments and results, in dense layers of the seven: a tile, and streams, of which 64
    tokens have some two in units of a layer of 1024, whose tile would be the layer were it not cut in two."""
    caldera = CalderaConfig(rank=16, quantizer=quantizer, q_bits=bits, factor_bits=4)
    grids = (caldera.q_grid, *caldera.factor_grids)
    number = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)

    def part(grid, rows, width):
        codes = jax.ShapeDtypeStruct((rows, packing.row_bytes(-(-width // grid.block), grid.code_bits)), np.uint8)
        return students.Packed(codes, number(1, 1) if grid.group is None else number(rows, -(-width // grid.group)))

    config = llama.LlamaConfig(8, dim, layers=1, heads=4, kv_heads=4, head_dim=dim // 4, ffn_dim=dim)
    block = {name: CompressedLinear(*(part(grid, rows, width) for grid, rows, width in
                                      zip(grids, (m, 16, 16), (n, m, n), strict=True)),
                                    number(m), number(n), (m, n), grids)
             for name, (m, n) in llama.shapes(config).items()}
    free = {name: {"left_side": layer.left_side, "right_side": layer.right_side} for name, layer in block.items()}
    vectors = {name: number(*shape) for name, shape in llama.vector_shapes(config).items()}
    x = number(1, tokens, dim)
    memory = students._pull.lower(config, {**block, **vectors}, free, x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < most * 4 * dim * dim


# ---- the optimizer


@jax.numpy_dtype_promotion("standard")  # as in _update
def test_rates_rise_over_the_warm_up_and_fall_as_told():
    of = lambda kind, step, warmup=0.1: float(training.schedule(TrainConfig(schedule=kind, warmup=warmup), 100)(step))
    for kind in ("linear", "cosine", "constant"):
        assert of(kind, 0) == pytest.approx(1 / 11) and of(kind, 5) == pytest.approx(6 / 11)
        assert of(kind, 10) == pytest.approx(1)
        assert of(kind, 0, 0.0) == 1
    assert of("linear", 55) == pytest.approx(0.5) and of("linear", 100) == pytest.approx(0, abs=1e-6)
    assert of("cosine", 55) == pytest.approx(0.5) and of("cosine", 33) == pytest.approx(
        (1 + np.cos(np.pi * 23 / 90)) / 2)
    assert of("constant", 99) == 1
    assert np.isfinite([float(training.schedule(TrainConfig(), steps)(0)) for steps in (0, 1, 2)]).all()


def test_a_step_is_adamw_with_a_rate_for_signs_and_one_for_factors_and_no_decay_of_signs():
    train = TrainConfig(sign_rate=1e-2, factor_rate=1e-3, weight_decay=0.5, clip=1e9, schedule="constant", warmup=0.0)
    free = {"blocks": [{"q": {"left_side": jnp.ones(3), "trained": (jnp.full((1, 3), 2.0), jnp.full((1, 2), -2.0))}}]}
    gradient = jax.tree.map(lambda a: jnp.full_like(a, 0.3), free)
    chosen = training.optimizer(train, 5)
    new, _ = training._update(chosen, free, chosen.init(free), gradient)
    of = new["blocks"][0]["q"]
    np.testing.assert_allclose(of["left_side"], 1 - 1e-2, rtol=1e-6)  # Adam's first step is of size 1
    np.testing.assert_allclose(of["trained"][0], 2 - 1e-3 * (1 + 0.5 * 2), rtol=1e-6)
    np.testing.assert_allclose(of["trained"][1], -2 - 1e-3 * (1 - 0.5 * 2), rtol=1e-6)


def test_reconstruction_starts_from_the_distance_of_each_block_from_the_dense_one(small):
    config, params, dense, tokens = small
    model, free = students.student(config, params, TrainConfig(goal="text", ranks=2, reconstruct=1, epochs=0, batch=4))
    free = wide(free)
    state = training.fit(model, free, Batch(tokens), Batch(tokens[:1]), dense=dense["blocks"])
    x = target = llama.embed(config, dense, tokens)
    for i, block in enumerate(model.blocks):
        out = lambda block, x, i=i: llama.block(config.at(i), block, x, jnp.arange(9))[0]
        target, y = out(dense["blocks"][i], target), out(students.join(block, free["blocks"][i]), x)
        expected = float(jnp.sum((y - target) ** 2) / jnp.sum(target**2))
        assert state.fits[i, 0] == pytest.approx(expected, rel=1e-9) and expected > 1e-3
        x = out(students.join(block, state.free["blocks"][i]), x)


def test_every_window_is_seen_once_an_epoch_in_an_order_of_its_own():
    train = TrainConfig(batch=4, seed=7)
    first, second = (np.concatenate(training.batches(train, 18, epoch)) for epoch in (0, 1))
    for order in (first, second):
        assert len(order) == 16 and len(set(order.tolist())) == 16 and set(order.tolist()) <= set(range(18))
    assert first.tolist() != second.tolist()
    np.testing.assert_array_equal(first, np.concatenate(training.batches(train, 18, 0)))


# ---- runs


@pytest.fixture(scope="module")
def finished(place):
    """An uninterrupted training."""
    return finetune.finetune(settings(place), place / "finished")


def test_training_lowers_the_loss_and_the_best_parameters_are_kept(place, finished):
    row = finished["finetune"][-1]
    assert row["steps"] == 8 == len(row["losses"]) and len(row["validation"]) == 4
    assert np.isfinite(row["losses"]).all() and min(row["validation"][1:]) < 0.9 * row["validation"][0]
    assert row["perplexity"] < row["perplexity_before"] == files.read_json(
        place / "compressed" / "report.json")["compressed_perplexity"]
    assert finished["compressed_perplexity"] == row["perplexity"]
    model = artifact.load(place / "finished")
    batch, _ = finetune.read(settings(place), model, artifact.read_manifest(place / "finished")["run"]["config"])
    base = artifact.base(place / "finished")
    kl = []
    for window in batch.tokens[-6:]:
        p, q = (jax.nn.log_softmax(llama.forward(m.config, weights.whole(m.params), window[None])[0])
                for m in (base, model))
        kl.append(float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))))
    # in float32 from float16 signs, as they are stored
    assert np.mean(kl) == pytest.approx(min(row["validation"]), rel=1e-3)


def test_a_training_that_only_harms_keeps_what_was_there(place):
    row = finetune.finetune(settings(place, dataclasses.replace(QUICK, sign_rate=30.0, epochs=1)), place / "harmed")
    assert min(row["finetune"][-1]["validation"][1:]) > row["finetune"][-1]["validation"][0]
    assert row["compressed_perplexity"] == pytest.approx(row["finetune"][-1]["perplexity_before"], rel=1e-6)
    harmful = dataclasses.replace(QUICK, sign_rate=30.0, epochs=0, reconstruct=1)
    row = finetune.finetune(settings(place, harmful), place / "harmed in every block")
    assert all(before == after for before, after in row["finetune"][-1]["fits"])
    assert row["compressed_perplexity"] == pytest.approx(row["finetune"][-1]["perplexity_before"], rel=1e-6)


def test_parts_of_a_batch_are_fitted_as_the_whole(place, tmp_path):
    train = dataclasses.replace(QUICK, reconstruct=1, epochs=0)
    whole, parts = (finetune.finetune(settings(place, one), tmp_path / str(one.accumulate))["finetune"][-1]["fits"]
                    for one in (train, dataclasses.replace(train, accumulate=4)))
    np.testing.assert_allclose(parts, whole, rtol=1e-3)


@pytest.mark.parametrize("train", [QUICK, dataclasses.replace(QUICK, reconstruct=1, epochs=1, ranks=1)],
                         ids=["", "reconstruction"])
def test_cut_off_and_started_again_it_ends_with_the_same_bytes(place, finished, tmp_path, monkeypatch, train):
    whole, expected = place / "finished", finished
    if train is not QUICK:
        expected = finetune.finetune(settings(place, train), tmp_path / "whole")
        whole = tmp_path / "whole"
    update, calls = training._update, []

    def cut(*arguments):
        calls.append(0)
        if len(calls) == (5 if train is QUICK else 6):
            raise KeyboardInterrupt
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(training, "_update", cut)
        with pytest.raises(KeyboardInterrupt):
            finetune.finetune(settings(place, train), tmp_path / "out")
    counted = []
    monkeypatch.setattr(training, "_update", lambda *a: counted.append(0) or update(*a))
    resumed = finetune.finetune(settings(place, train), tmp_path / "out")
    assert 0 < len(counted) < len(calls) + len(counted) - 1  # something was kept
    for name in ("losses", "validation", "fits"):
        np.testing.assert_array_equal(resumed["finetune"][-1][name], expected["finetune"][-1][name])
    assert weight_files(tmp_path / "out") == weight_files(whole)
    assert finetune.finetune(settings(place, train), tmp_path / "out") == resumed  # nothing is done again
    assert not (tmp_path / "out" / "unfinished").exists()


def test_a_full_disk_keeps_the_last_state_and_says_so(place, finished, tmp_path, monkeypatch):
    """Wherever it fills: at a checkpoint of orbax, at a layer, at the report."""
    out, write = tmp_path / "out", files.write
    full = lambda error: (_ for _ in ()).throw(error)
    manager = training.ocp.CheckpointManager
    save, counted = manager.save, []
    for target, name, at in ((manager, "save", 3), (files, "write", "blocks.1.up.safetensors"),
                             (files, "write", "report.json")):
        def fails(*arguments, name=name, at=at, **more):
            if name == "save":
                counted.append(0)  # tensorstore says it in its own words
                return full(ValueError("RESOURCE_EXHAUSTED")) if len(counted) == at else save(*arguments, **more)
            gone = OSError(errno.ENOSPC, "No space left on device")
            return full(gone) if arguments[0].name == at else write(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(target, name, fails)
            with pytest.raises(OSError, match="No space left"):
                finetune.finetune(settings(place), out)
    update, steps = training._update, []
    monkeypatch.setattr(training, "_update", lambda *a: steps.append(0) or update(*a))
    resumed = finetune.finetune(settings(place), out)
    assert not steps and weight_files(out) == weight_files(place / "finished")  # nothing was left to train
    assert resumed["compressed_perplexity"] == finished["compressed_perplexity"]


def test_reconstruction_brings_every_block_nearer_to_the_dense_one(place, tmp_path):
    row = finetune.finetune(settings(place, dataclasses.replace(QUICK, reconstruct=3, epochs=0, ranks=4)), tmp_path)
    before, after = np.array(row["finetune"][-1]["fits"]).T
    assert (after < 0.9 * before).all() and row["finetune"][-1]["losses"] == []
    assert row["compressed_perplexity"] != row["finetune"][-1]["perplexity_before"]


def test_inspect_shows_the_trained_bits_and_says_what_is_of_before(place, finished, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["caldera", "inspect", str(place / "finished")])
    cli.main()
    printed = capsys.readouterr().out
    assert "error, damping and seconds are those of the compression, before the fine-tuning" in printed
    assert all(f"{row['bits_per_weight']:7.4f}" in printed for row in finished["layers"])


def test_a_trained_model_is_trained_again_and_remembers_both(place, finished, tmp_path):
    config = dataclasses.replace(settings(place, TrainConfig(signs=False, ranks=2, goal="text", epochs=1)),
                                 source=str(place / "finished"))
    row = finetune.finetune(config, tmp_path / "out")
    assert [one["config"]["train"]["goal"] for one in row["finetune"]] == ["distill", "text"]
    model = artifact.load(tmp_path / "out")
    layer = model.params["blocks"][0]["q"]
    assert layer.left_side.dtype == jnp.float16 and len(layer.trained[0]) == 2
    assert len(artifact.read_manifest(tmp_path / "out")["run"]["finetune"]) == 2


def test_classes_of_lines_are_learned(place, tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "lines.jsonl"
    words = {"yes": "aaaa bb", "no": "zzz yy x"}
    rows = [{"text": words[label] + str(rng.integers(9)), "label": label} for label in ("yes", "no") * 20]
    rows[3]["text"] += "\u2028"  # no end of a line in JSON
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    train = TrainConfig(goal="labels", epochs=6, factor_rate=3e-2, validate=100)
    config = FinetuneConfig(str(place / "compressed"), train, Tokens(str(path), 40, 16), 8)
    row = finetune.finetune(config, tmp_path / "out")["finetune"][-1]
    assert row["classes"] == ["no", "yes"] and row["validation"][0] == pytest.approx(np.log(2), rel=1e-6)
    assert row["validation"][-1] < 0.3 and row["accuracy"] == 1 and row["fits"] == []
    assert artifact.load(tmp_path / "out").params["classifier"].shape == (2, tiny.SQUARE.dim)


@pytest.mark.parametrize(("lines", "message"), [
    ('\n{"text": "a"}', "line 2: no field 'label', but 'text'"), ("", "0 classes"),
    ("no json", 'line 1: not JSON .*; each line is {"text": …, "label": …}'),
    ('{"text": "a", "label": 1}', "1 classes"),
    ("\n".join(f'{{"text": "a", "label": {i}}}' for i in range(8)), "8 lines, and the last 8 are for validation"),
    ('{"text": "a", "label": 1}\n{"text": "' + 40 * "long" + '", "label": 2}', "line 2 has 160 tokens"),
])
def test_lines_that_are_none_are_refused(place, tmp_path, lines, message):
    (tmp_path / "lines.jsonl").write_text(lines)
    config = FinetuneConfig(str(place / "compressed"), TrainConfig(goal="labels"),
                            Tokens(str(tmp_path / "lines.jsonl"), 40, 16), 8)
    with pytest.raises(ValueError, match=message):
        finetune.finetune(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "message"), [
    (dict(goal="else"), "one of distill, text, labels"), (dict(schedule="step"), "linear, cosine, constant"),
    (dict(factor_dtype="int8"), "bfloat16, float32"), (dict(batch=0), "at least 1"), (dict(ranks=-1), "at least 0"),
    (dict(temperature=0.0), "positive"), (dict(sign_rate=-1.0), "not be negative"), (dict(warmup=1.5), "from 0 to 1"),
    (dict(batch=4, accumulate=3), "does not divide"), (dict(signs=False), "nothing is trained")])
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**change)


def test_bad_input_is_named(place, finished, tmp_path):
    with pytest.raises(ValueError, match="no compressed model"):
        finetune.finetune(dataclasses.replace(settings(place), source=str(tmp_path)), tmp_path / "out")
    with pytest.raises(ValueError, match="too short"):
        finetune.finetune(settings(place, windows=9000), tmp_path / "out")
    with pytest.raises(ValueError, match="2 windows to train on, and a batch takes 4"):
        finetune.finetune(settings(place, windows=8), tmp_path / "out")
    text = {"evaluation": {"text": str(place / "text.txt")}, "calibration": {"text": "enwiki"}}
    with pytest.raises(ValueError, match="is evaluated on all of .*text.txt, as it was calibrated on another"):
        finetune.read(settings(place), artifact.load(place / "compressed"), text)
    flat = compress_matrix(jax.random.key(0), gaussian(8, 8), hessian("power", 8),
                           dataclasses.replace(CHEAP, rank=0, rotation="orthogonal"))[0]
    bare = {"blocks": [{"q": flat}], "embed": np.zeros((4, 8)), "norm": np.ones(8)}
    for train, message in ((TrainConfig(), "signs are to be trained, and no layer has any"),
                           (TrainConfig(signs=False, ranks=1), "ranks are to be trained, and no layer has any")):
        with pytest.raises(ValueError, match=message):
            students.student(tiny.SQUARE, bare, train)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="exceed the model's context"):
        finetune.finetune(dataclasses.replace(settings(place), text=Tokens(windows=8, window=999), aside=1), tmp_path)
    with pytest.raises(ValueError, match="belongs to another run"):
        finetune.finetune(settings(place, dataclasses.replace(QUICK, epochs=9)), place / "finished")
    with pytest.raises(ValueError, match="a batch takes"):
        finetune.finetune(settings(place, windows=8), tmp_path / "few")
    with pytest.raises(ValueError, match="fewer than all"):
        settings(place, aside=22)
    whole = json.loads((place / "finished" / artifact.MANIFEST).read_text())
    whole["run"]["model_sha256"] = "0"
    (tmp_path / artifact.MANIFEST).write_text(json.dumps(whole | {"sha256": artifact.digest(whole)}))
    with pytest.raises(ValueError, match="is not the model that .* was compressed from"):
        artifact.base(tmp_path)


@pytest.mark.slow
def test_devices_that_share_a_batch_find_the_same_losses(place, finished, tmp_path):
    code = ("import sys, jax; from caldera_jax.jobs import finetune as f; from caldera_jax.models.data import Tokens\n"
            "assert jax.device_count() == 4\n"
            "t = f.TrainConfig(epochs=2, sign_rate=1e-2, factor_rate=1e-2, validate=3)\n"
            "f.finetune(f.FinetuneConfig(sys.argv[1], t, Tokens(sys.argv[2], 22, 32), 6), __import__('pathlib').Path("
            "sys.argv[3]))")
    done = subprocess.run([sys.executable, "-c", code, str(place / "compressed"), str(place / "text.txt"),
                           str(tmp_path / "out")], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"]
                                             + " --xla_force_host_platform_device_count=4"})
    assert done.returncode == 0, done.stderr
    found = files.read_json(tmp_path / "out" / "report.json")["finetune"][-1]
    # sums in another order, in float32, and Adam divides by what may be small; six windows on four devices
    for name in ("losses", "validation"):
        np.testing.assert_allclose(found[name], finished["finetune"][-1][name], rtol=1e-3)


# ---- one level: scales and gains


@pytest.fixture(scope="module")
def level_place(tmp_path_factory):
    """A folder with a dense model, its text, and it at one level."""
    folder = tmp_path_factory.mktemp("finetune_level")
    text = str(tiny.write_text(folder / "text.txt", 400))
    model = tiny.write_model(folder / "model", tiny.SQUARE)
    compress(RunConfig(str(model), calibration=Tokens(text, 4, 32), evaluation=Tokens(text, 6, 32), bits=3.0,
                       level=LevelConfig(8)), folder / "compressed")
    return folder


def test_a_loosened_level_has_a_scale_of_each_output_at_one(level_place):
    layer = artifact.load(level_place / "compressed").params["blocks"][0]["up"]
    rest, free = loosen(layer, True, 0)
    assert set(free) == {"left_side"} and not loosen(layer, False, 0)[1]
    [scale] = free["left_side"]
    np.testing.assert_array_equal(scale, np.ones(24, np.float32))
    x = jnp.asarray(gaussian(4, 24, 5), jnp.float32)
    np.testing.assert_array_equal(apply(dataclasses.replace(rest, **free), x), apply(layer, x))
    doubled = dataclasses.replace(rest, left_side=(2 * scale,))
    np.testing.assert_allclose(apply(doubled, x), 2 * apply(layer, x), rtol=1e-6)
    np.testing.assert_allclose(doubled.dense(), 2 * layer.dense(), rtol=1e-6)
    np.testing.assert_allclose(apply(linear.in_bytes(doubled), x), 2 * apply(layer, x), rtol=1e-4, atol=1e-5)


def test_scales_and_gains_are_trained_counted_stored_and_trained_on(level_place, monkeypatch):
    config = settings(level_place, dataclasses.replace(QUICK, reconstruct=1))
    row = finetune.finetune(config, level_place / "tuned")
    before, after = (artifact.load(level_place / name) for name in ("compressed", "tuned"))
    outputs = sum(m for m, _ in llama.shapes(tiny.SQUARE).values()) * 2
    assert row["finetune"][-1]["trained"] == outputs + 2 * 2 * tiny.SQUARE.dim  # and two norms a block
    old, new = (sum(block[name].stored_bits for block in model.params["blocks"] for name in llama.LINEARS)
                for model in (before, after))
    assert new == old + 16 * outputs == row["bits_per_weight"] * row["compressed_weights"]
    for was, now in zip(before.params["blocks"], after.params["blocks"], strict=True):
        for name in llama.LINEARS:
            np.testing.assert_array_equal(now[name].q.integers, was[name].q.integers)
            assert now[name].left_side[0].dtype == jnp.float16 and np.any(np.asarray(now[name].left_side[0]) != 1)
        assert all(np.any(now[name] != was[name]) for name in ("attn_norm", "ffn_norm"))
    validation = row["finetune"][-1]["validation"]
    assert np.nanmin(validation[1:]) < validation[0]  # what is kept is better than what was
    again = finetune.finetune(dataclasses.replace(config, source=str(level_place / "tuned")), level_place / "twice")
    assert again["bits_per_weight"] == row["bits_per_weight"]
    assert again["finetune"][-1]["validation"][0] == pytest.approx(np.nanmin(validation), rel=1e-3)


def test_a_tuned_level_is_exported_in_its_own_integers(level_place):
    model = artifact.load(level_place / "compressed")
    block = {name: dataclasses.replace(value, left_side=(jnp.linspace(-1.5, 2, value.shape[0]),))
             if isinstance(value, CompressedLinear) else value for name, value in model.params["blocks"][0].items()}
    assert export._foldable(block)
    parts, scales, _ = export._folded(model.config, block)
    x = gaussian(5, 24, 3) * np.asarray(block["ffn_norm"], np.float64)
    theirs = gaussian(5, 24, 3) * parts["ffn_norm"]
    wanted = np.asarray(block["gate"].dense(), np.float64) @ x.T
    np.testing.assert_allclose(np.asarray(parts["gate"], float) * scales["gate"][:, None] @ theirs.T, wanted, rtol=1e-4,
                               atol=1e-6)


def test_a_level_without_l_r_gets_one_that_begins_at_nothing(level_place):
    layer = artifact.load(level_place / "compressed").params["blocks"][0]["down"]
    rest, free = loosen(layer, False, 2)
    again = dataclasses.replace(rest, **free)
    assert free.keys() == {"trained"} and again.rank == 2
    np.testing.assert_array_equal(again.dense(), layer.dense())
    with pytest.raises(ValueError, match="25 ranks are to be trained, more than a layer of 24 x 24 has"):
        loosen(layer, False, 25)
    config = settings(level_place, dataclasses.replace(QUICK, ranks=2))
    row = finetune.finetune(config, level_place / "lora")
    shapes = llama.shapes(tiny.SQUARE).values()
    assert row["finetune"][-1]["trained"] == 2 * sum(m + 2 * (m + n) for m, n in shapes) + 4 * tiny.SQUARE.dim
    before, after = (artifact.load(level_place / name) for name in ("compressed", "lora"))
    old, new = (sum(block[name].stored_bits for block in model.params["blocks"] for name in llama.LINEARS)
                for model in (before, after))
    assert new == old + 2 * 16 * sum(m + 2 * (m + n) for m, n in shapes)
    found = [np.abs(np.asarray(block[name].trained[0], np.float32)).max() for block in after.params["blocks"]
             for name in llama.LINEARS]
    assert min(found) > 0  # each learned something
