"""The tutorials in a small size: what each sets out to show is so, and what it prints is what was found."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import caldera_jax as cj
from caldera_jax.jobs.settings import RunConfig
from caldera_jax.models import llama, weights
from caldera_jax.models.data import Tokens

TUTORIALS = sorted((Path(__file__).parents[1] / "experiments" / "tutorials").glob("*.py"))
DENSE, FORWARD = jax.jit(cj.CompressedLinear.dense), jax.jit(llama.forward, static_argnums=0)


def tutorial(name):
    """The tutorial as a module."""
    path = next(path for path in TUTORIALS if path.stem == name)
    spec = importlib.util.spec_from_file_location(f"tutorial_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_read_in_90_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 90


def test_one_matrix_keeps_the_least_error_of_the_trace_and_compares_at_equal_bits(capsys):
    w, h, compressed, trace, alone, its_trace = tutorial("one_matrix").main(32, "uniform", 8)
    said = capsys.readouterr().out.splitlines()
    for layer, errors in ((compressed, trace.error), (alone, its_trace.error)):
        np.testing.assert_allclose(cj.relative_error(w, DENSE(layer), h), errors.min(), rtol=1e-9)
    (kept,) = (line for line in said if "kept" in line)
    assert f"{trace.error.min():.4f}" in kept
    (sides,) = (line for line in said if line.startswith("apply"))
    assert float(sides.split()[-1]) < 1e-12
    assert abs(compressed.stored_bits - alone.stored_bits) < 0.05 * alone.stored_bits
    assert f"{its_trace.error.min():.4f}" in said[-1] and alone.rank == 0 < compressed.rank


def test_a_grid_of_the_readers_own_packs_to_its_levels_and_beats_equal_steps_but_not_the_lattice(capsys):
    module = tutorial("own_quantizer")
    w, h, errors, compressed, trace = module.main(32)
    assert errors["E8P()"] < errors["LloydMax(2)"] < errors["Uniform(2)"]
    q, left, right = jax.jit(cj.CompressedLinear.rotated)(compressed)
    for part, packed, bits in ((q, compressed.q, 2), (left.T, compressed.left_t, 4), (right, compressed.right, 4)):
        assert np.isin(np.asarray(part), module.lloyd_max(bits) * np.asarray(packed.scale)).all()
        assert 8 * packed.codes.nbytes == bits * part.size
    np.testing.assert_allclose(cj.relative_error(w, DENSE(compressed), h), trace.error[1:].min(), rtol=1e-9)
    said = capsys.readouterr().out
    assert all(f"{error:.4f}" in said for error in errors.values())


def test_lloyd_max_levels_are_those_of_max_1960():
    levels = tutorial("own_quantizer").lloyd_max
    np.testing.assert_allclose(levels(2), [-1.510, -0.4528, 0.4528, 1.510], atol=5e-4)
    np.testing.assert_allclose(levels(3)[4:], [0.2451, 0.7560, 1.344, 2.152], atol=5e-4)


def test_half_steps_that_look_at_h_end_lower_than_blind_ones_and_both_are_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "picture.png"
    found = tutorial("own_half_step").main(32, (16,), picture)[16]
    least = {name: float(trace[1:].min()) for name, trace in found.items()}
    paper = least.pop("as in the paper")
    assert len(least) == 2 and all(paper < other for other in least.values())
    first = {name: float(trace[0]) for name, trace in found.items()}
    assert first["as in the paper"] == pytest.approx(first["Q blind to H"], rel=1e-6) and paper < min(first.values())
    assert first["as in the paper"] < first["L R blind to H"]
    said = capsys.readouterr().out
    assert all(f"{value / paper:.3f} of the paper's" in said for value in least.values())
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_whole_model_is_compressed_and_exported_with_its_logits(tmp_path, capsys):
    text = str(tiny.write_text(tmp_path / "text.txt"))
    source = tiny.write_model(tmp_path / "model", dataclasses.replace(tiny.SQUARE, layers=1))
    caldera = cj.CalderaConfig(rank=3, outer_iterations=2, inner_iterations=1, quantizer="uniform", q_bits=3,
                               factor_quantizer="uniform", rotation="none")
    config = RunConfig(str(source), caldera, Tokens(text, 4, 32), Tokens(text, 3, 32))
    report, model, again = tutorial("whole_model").main(config, tmp_path / "out", "the lattice", 1)
    assert again.config == model.config and again.tokenizer.to_str() == model.tokenizer.to_str()
    params = [jax.tree.map(jnp.asarray, weights.whole(found.params)) for found in (model, again)]
    packed, exported = (FORWARD(model.config, p, np.arange(40, dtype=np.int32)[None]) for p in params)
    assert isinstance(params[0]["blocks"][0]["gate"], cj.CompressedLinear)
    np.testing.assert_allclose(exported, packed, atol=1e-5 * float(jnp.abs(packed).max()))
    said = capsys.readouterr().out
    assert said.count(f"{report['compressed_perplexity']:.3f}") >= 2
    assert all(f"{layer['path']:14} " in said and f"error {layer['error']:.3f}" in said for layer in report["layers"])
    assert f"{report['bits_per_weight']:.3f} bits a weight" in said
