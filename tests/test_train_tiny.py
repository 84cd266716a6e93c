"""The small float32 model: the same bytes every time, whatever interrupts its training, and others read it, too."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny import WORDS

from caldera_jax.jobs import evaluate, report
from caldera_jax.models import convert, data, files, llama, tokenizer, weights

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
sys.path.append(str(EXPERIMENTS))

import train_tiny  # noqa: E402

DIES = """
import dataclasses, os, signal, sys
from pathlib import Path
sys.path.append(sys.argv[1])
import train_tiny
draws = train_tiny.batch

def batch(config, tokens, step):
    if step == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    return draws(config, tokens, step)

train_tiny.drawing.RESULTS, train_tiny.batch = Path(sys.argv[2]), batch
train_tiny.train(dataclasses.replace(train_tiny.preset("smoke"), text=sys.argv[3]))
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Sentences of random words, so that nothing is fetched; about 60 000 characters."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n\n".join(" ".join(rng.choice(WORDS, 100)) + "." for _ in range(100)))
    return path


@pytest.fixture(scope="module")
def config(text):
    return dataclasses.replace(train_tiny.preset("smoke"), text=str(text))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache and a folder of records of this test alone."""
    monkeypatch.setenv("CALDERA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(train_tiny.drawing, "RESULTS", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """(record, directory) of a training that nothing interrupted."""
    home = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALDERA_CACHE", str(home / "cache"))
        patch.setattr(train_tiny.drawing, "RESULTS", home)
        return train_tiny.train(config), train_tiny.directory(config)


def same(config, record, trained) -> None:
    """Model, tokenizer, optimizer and losses are, bit for bit, those of the training that nothing interrupted."""
    reference, directory = trained
    weights, others = ({path.name: path.read_bytes() for path in folder.iterdir() if path.name != train_tiny.DESCRIBED}
                       for folder in (train_tiny.directory(config), directory))
    assert weights == others
    for name in ("state_sha256", "weights_sha256", "training_loss", "held_out_loss", "perplexity"):
        assert record[name] == reference[name], name


def stop_at(monkeypatch, step: int) -> None:
    """An interruption when the batch of this step is drawn."""
    draws = train_tiny.batch

    def batch(config, tokens, now):
        if now == step:
            raise KeyboardInterrupt
        return draws(config, tokens, now)

    monkeypatch.setattr(train_tiny, "batch", batch)


def interrupted(config, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, step)
        train_tiny.train(config)


def test_two_trainings_are_bitwise_equal(config, trained, home):
    same(config, train_tiny.train(config), trained)


@pytest.mark.parametrize("step", [5, 16, 37], ids=["before-a-checkpoint", "after-one", "between-two"])
def test_interrupted_and_started_again_it_ends_with_the_same_bytes(config, trained, home, step):
    interrupted(config, step)
    assert not train_tiny.directory(config).exists()
    drawn, draws = [], train_tiny.batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tiny, "batch", lambda *args: drawn.append(args[2]) or draws(*args))
        same(config, train_tiny.train(config), trained)
    assert drawn == list(range(step - step % config.every, config.steps))  # it did go on, and did not start over


def test_killed_in_another_process_it_goes_on_here_with_the_same_bytes(config, trained, home):
    argv = [sys.executable, "-c", DIES, str(EXPERIMENTS), str(home), config.text, "20"]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == -signal.SIGKILL, done.stderr
    with train_tiny.checkpoints(config) as manager:
        assert manager.all_steps() == [16]
    same(config, train_tiny.train(config), trained)


def damage(folder: Path) -> None:
    """Flip the bits of the middle byte of every file of the arrays."""
    for path in (path for path in (folder / "state").rglob("*") if path.parent.name == "d"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)


def cut_short(folder: Path) -> None:
    """Leave nothing of the record."""
    for path in (path for path in (folder / "history").iterdir() if path.is_file()):
        path.write_bytes(b"")


def test_a_second_one_waits_for_the_one_that_trains(config, home, monkeypatch, capsys):
    """Threads stand for processes: each opens the lock for itself."""
    def instantly(config):
        train_tiny.directory(config).mkdir()
        files.write_json(train_tiny.directory(config) / train_tiny.DESCRIBED, {"of": "the second"})

    monkeypatch.setattr(train_tiny, "_train", instantly)
    with ThreadPoolExecutor() as pool:
        with train_tiny.alone(config):
            second = pool.submit(train_tiny.train, config)
            said, until = "", time.monotonic() + 60
            while "waiting for it" not in said:  # in pieces: it is being written
                assert not second.done() and time.monotonic() < until, said
                said += capsys.readouterr().err
                time.sleep(0.01)
            assert not train_tiny.record_path(config).exists()
        assert second.result(60) == {"of": "the second"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax ends with reads still open
@pytest.mark.parametrize("harm", [damage, cut_short])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(config, trained, home, harm, capsys):
    interrupted(config, 40)
    kept = train_tiny._beside(config, "training")
    assert sorted(path.name for path in kept.iterdir()) == ["16", "32"]
    harm(kept / "32")
    same(config, train_tiny.train(config), trained)
    assert "checkpoint 32 is damaged" in capsys.readouterr().err


def test_arrays_that_do_not_have_their_digest_are_not_restored(config, home):
    history = {"config_hash": "a", "text_sha256": "b"}
    with jax.enable_x64(False), train_tiny.checkpoints(config) as manager:
        state = ocp.args.StandardSave(train_tiny.init(config))
        for step, digest in ((3, "0"), (2, train_tiny.state_sha256(train_tiny.init(config)))):
            manager.save(step, force=True, args=ocp.args.Composite(
                state=state, history=ocp.args.JsonSave({**history, "state_sha256": digest})))
        assert train_tiny.restore(manager, config, history)[1] == history
        assert sorted(manager.all_steps()) == [2, 3]  # what could not be read today may be readable tomorrow
        manager.delete(2)
        assert train_tiny.restore(manager, config, history) is None


def test_what_a_kill_left_beside_the_finished_model_does_no_harm(config, trained, home):
    """A model without its record, with half a model and half a checkpoint from the time before."""
    interrupted(config, 40)
    kept = train_tiny._beside(config, "training")
    shutil.copytree(kept / "32", half := kept / "40.orbax-checkpoint-tmp")
    shutil.rmtree(half / "history")
    for folder in (train_tiny.directory(config), train_tiny._beside(config, "part")):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    same(config, train_tiny.train(config), trained)
    name = train_tiny.directory(config).name
    assert {path.name for path in (home / "cache").iterdir()} == {name, f"{name}_lock"}


def test_finished_is_skipped(config, trained, home, monkeypatch):
    record, directory = trained
    (home / "cache").mkdir()
    train_tiny.directory(config).symlink_to(directory)
    files.write_json(train_tiny.record_path(config), record)
    monkeypatch.setattr(train_tiny, "_train", None)
    assert train_tiny.train(config) == record


def test_a_finished_model_is_not_made_again_for_another_folder_of_records(config, trained, home, monkeypatch):
    """Another process may be reading it."""
    record, directory = trained
    (home / "cache").mkdir()
    train_tiny.directory(config).symlink_to(directory)
    monkeypatch.setattr(train_tiny, "_train", None)
    assert train_tiny.train(config) == record == files.read_json(train_tiny.record_path(config))


def test_a_checkpoint_of_another_configuration_is_refused(config, home):
    other = dataclasses.replace(config, seed=1)
    interrupted(config, 20)
    train_tiny._beside(config, "training").rename(train_tiny._beside(other, "training"))
    with pytest.raises(ValueError, match="16 is of another run .config_hash"):
        train_tiny.train(other)
    with train_tiny.checkpoints(other) as manager:
        assert manager.all_steps() == [16]  # nothing of it is lost


def test_a_checkpoint_on_a_text_that_has_changed_is_refused(config, home, monkeypatch):
    interrupted(config, 20)
    documents = [Path(config.text).read_text().replace("lattice", "trellis")]
    monkeypatch.setattr(data, "load_text", lambda name: documents)
    with pytest.raises(ValueError, match="16 is of another run .text_sha256"):
        train_tiny.train(config)


def test_it_learns_and_its_perplexity_is_the_packages_own(config, trained):
    """Fewer nats than a uniform guess; and what is stored for all held-out windows is what the stored model has."""
    record, directory = trained
    assert record["held_out_loss"][-1][1] < np.log(config.vocab) < record["held_out_loss"][0][1]
    model = convert.load(directory)
    assert model.config == config.model
    _, others = data.split(data.load_text(config.text))
    count = len(tokenizer.encode(model.tokenizer, data.SEPARATOR.join(others))) // config.window
    windows = data.token_windows(model.tokenizer, others, config.window, count)
    with jax.enable_x64(False):
        assert evaluate.perplexity(model.config, model.params, windows) == record["perplexity"]
        few = windows[:config.held_out_windows]
        ours, theirs = record["held_out_loss"][-1][1], np.log(evaluate.perplexity(model.config, model.params, few))
    # a loss near 6 rounds by 2⁻²² in float32; logits near 4, sums of 32 products, and log-sum-exp by a few times that
    assert ours == pytest.approx(theirs, abs=32 * 2.0**-22)


def test_the_record_tells_the_weights_the_losses_and_where_they_come_from(config, trained):
    record, directory = trained
    assert record["config_hash"] == report.config_hash(config) and record["seed"] == config.seed
    assert {"optax", "orbax-checkpoint", "jax"} <= set(record["versions"])
    assert record["weights_sha256"] == files.sha256(directory / "model.safetensors")
    arrays = files.read_arrays(directory / "model.safetensors")
    assert {str(a.dtype) for a in arrays.values()} == {"float32"}
    assert record["weights"] == sum(a.size for a in arrays.values())
    assert [step for step, _ in record["training_loss"]] == list(range(4, 49, 4))
    assert [step for step, _ in record["held_out_loss"]] == [0, 16, 32, 48]
    assert record["tokens"] == 48 * 4 * 64
    assert record["bits_per_byte"] * record["bytes_per_token"] == pytest.approx(np.log2(record["perplexity"]))
    assert set(record["seconds"]) == {"training", "held-out loss", "perplexity", "total", "compile"}


def test_the_last_mean_is_of_the_steps_that_are_left(config):
    assert train_tiny.averages(config, [1.0, 2.0, 3.0, 4.0, 7.0, 8.0]) == [(4, 2.5), (6, 7.5)]


def test_any_text_comes_back_from_the_tokenizer(trained):
    found = convert.load(trained[1]).tokenizer
    for sample in ("", "The code, naïve — 東京 🎉\r\n\n  \t!!", "\0\x7f"):
        assert found.decode(tokenizer.encode(found, sample).tolist()) == sample


def test_the_rate_rises_linearly_and_falls_as_a_cosine_and_gains_do_not_decay(config):
    """Without gradients AdamW changes a matrix of ones by −rate · decay, and a gain not at all."""
    rule, params = train_tiny.optimizer(config), {"matrix": jnp.ones((1, 1), jnp.float32), "gain": jnp.ones(1)}
    zero = jax.tree.map(jnp.zeros_like, params)

    def step(state, _):
        change, state = rule.update(zero, state, params)
        return state, (change["matrix"][0, 0] / -config.weight_decay, change["gain"][0])

    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        _, (rates, gains) = jax.lax.scan(step, rule.init(params), length=config.steps)
    t, rise, peak, last = np.arange(config.steps), config.warmup, config.learning_rate, config.final_rate
    cosine = last + (1 - last) * (1 + np.cos(np.pi * (t - rise) / (config.steps - rise))) / 2
    expected = peak * np.where(t < rise, t / rise, cosine)
    np.testing.assert_allclose(rates, expected, rtol=0, atol=8 * 2.0**-24 * peak)  # eight roundings of at most the peak
    assert not gains.any()


def test_a_batch_is_of_its_seed_and_step_alone(config):
    tokens = np.arange(1000, dtype=np.int32)
    one, again, later, other = (train_tiny.batch(dataclasses.replace(config, seed=seed), tokens, step)
                                for seed, step in ((0, 7), (0, 7), (0, 8), (1, 7)))
    assert one.shape == (config.batch, config.window) and one.dtype == np.int32
    np.testing.assert_array_equal(one, again)
    assert (np.diff(one) == 1).all()  # a window is consecutive tokens
    assert (one[:, 0] != later[:, 0]).any() and (one[:, 0] != other[:, 0]).any()


def test_the_text_of_one_window_is_the_whole_of_every_batch(config):
    tokens = np.arange(config.window, dtype=np.int32)
    np.testing.assert_array_equal(train_tiny.batch(config, tokens, 0), np.tile(tokens, (config.batch, 1)))


@pytest.mark.extra
def test_transformers_reads_the_model_and_finds_the_same_logits_and_tokens(trained):
    torch = pytest.importorskip("torch", reason="transformers is the other side")
    transformers = pytest.importorskip("transformers", reason="transformers is the other side")
    _, directory = trained
    model = convert.load(directory)
    tokens = np.arange(2 * 64).reshape(2, 64) * 7 % model.config.vocab
    with torch.no_grad():
        other = transformers.AutoModelForCausalLM.from_pretrained(directory)
        assert other.dtype == torch.float32
        theirs = other(input_ids=torch.tensor(tokens)).logits.numpy()
    ours = jax.jit(llama.forward, static_argnums=0)(model.config, weights.whole(model.params), tokens)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())
    sample = "the lattice code of each layer"
    assert transformers.AutoTokenizer.from_pretrained(directory)(sample)["input_ids"] == list(
        tokenizer.encode(model.tokenizer, sample))


def test_the_figure_is_of_the_record_and_labelled_from_its_configuration(config, trained):
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot

    figure = train_tiny.draw(json.loads(json.dumps(trained[0])))
    (panel,) = figure.axes
    assert [len(line.get_xdata()) for line in panel.lines] == [12, 4]
    assert [line.get_label() for line in panel.lines] == ["training, mean of 4 steps", "held out, 8 windows"]
    assert panel.get_xlabel() == "million tokens seen (48 steps of 4 x 64)"
    np.testing.assert_allclose(panel.lines[1].get_xdata(), np.array([0, 16, 32, 48]) * 4 * 64 / 1e6)
    pyplot.close(figure)


def test_drawing_trains_nothing(config, trained, home, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(train_tiny.PRESETS, "smoke", config)
    monkeypatch.setattr(train_tiny.drawing, "FIGURES", home)
    monkeypatch.setattr(train_tiny, "_train", None)
    with pytest.raises(ValueError, match="no record .* python experiments/train_tiny.py --preset smoke"):
        train_tiny.main("smoke", draw_only=True)
    files.write_json(train_tiny.record_path(config), trained[0])
    train_tiny.main("smoke", draw_only=True)
    assert (home / "train_tiny_smoke.png").is_file()


def test_a_model_that_is_not_trained_names_the_command(config, trained, home, monkeypatch):
    monkeypatch.setitem(train_tiny.PRESETS, "smoke", config)
    with pytest.raises(ValueError, match="python experiments/train_tiny.py --preset smoke"):
        train_tiny.load_tiny("smoke")
    monkeypatch.setenv("CALDERA_CACHE", str(trained[1].parent))
    assert train_tiny.load_tiny("smoke") == trained[1]


@pytest.mark.parametrize("change, said", [
    ({"window": 65}, "window must lie between 2 and the context 64, got 65"),
    ({"window": 1}, "window must lie"),
    ({"vocab": 255}, "vocab must be at least 256"),
    ({"heads": 3}, "dim 32 does not divide into 3 heads"),
    ({"warmup": 48}, "warmup must lie between 0 and the 48 steps"),
    ({"every": 0}, "every must be a positive integer"),
    ({"held_out_windows": 10}, "10 held_out_windows do not divide into batches of 4"),
])  # fmt: skip
def test_a_configuration_that_cannot_be_is_refused(config, change, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(config, **change)


def test_an_unknown_preset_and_a_short_text_are_refused(config, home):
    with pytest.raises(ValueError, match="no preset 'huge': choose from tiny, smoke"):
        train_tiny.load_tiny("huge")
    with pytest.raises(ValueError, match="too short: .* held-out windows of 64, but 4000 are needed"):
        train_tiny.read_text(dataclasses.replace(config, held_out_windows=4000))


def test_a_loss_that_is_not_finite_stops_the_training(config, home, monkeypatch):
    monkeypatch.setattr(train_tiny, "batch", lambda *_: np.full((4, 64), config.vocab, np.int32))  # no such token: NaN
    with pytest.raises(ValueError, match="the loss of step 0 is nan: choose a smaller learning_rate than 0.01"):
        train_tiny.train(config)


def test_the_real_one_has_the_size_it_claims():
    config = train_tiny.preset("tiny")
    state = jax.eval_shape(lambda: train_tiny.init(config))
    assert 2.2e6 < sum(leaf.size for leaf in jax.tree.leaves(state.params)) < 2.6e6
    assert config.window == config.context  # so that it has seen all positions it is evaluated at
