"""What `caldera inspect --theory` says: identities on small instances, then end to end on a tiny model."""

import dataclasses
import json
import math
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matrices
import numpy as np
import oracles
import pytest
import tiny

from caldera_jax import (
    E8P,
    CalderaConfig,
    Decomposition,
    Dithered,
    NormalFloat,
    Uniform,
    codebooks,
    compress_matrix,
    hessian,
    incoherence,
    linear,
    objective,
)
from caldera_jax.jobs import artifact, calibration, cli, explain, report
from caldera_jax.jobs.compress import compress
from caldera_jax.jobs.settings import RunConfig, recorded
from caldera_jax.ldlq import ldlq
from caldera_jax.lplr import LowRank
from caldera_jax.models import convert, files, llama
from caldera_jax.models.data import Tokens

ldlq = jax.jit(ldlq, static_argnums=1)
SHAPES = ((16, 24), (24, 16), (10, 13))
EPS = np.finfo(np.float64).eps


def approximated(m, n, rank=3, seed=0):
    """W, a Q and an L R of that rank that are somewhere near it."""
    w, noise = matrices.gaussian(m, n, seed), matrices.gaussian(m, n, seed + 1)
    left, right = matrices.gaussian(m, rank, seed + 2), matrices.gaussian(rank, n, seed + 3)
    return w, w + 0.3 * noise, 0.05 * left @ right if rank else np.zeros((m, n))


def packed(m, n, config, kind="hadamard", dtype=np.float64, seed=0):
    """W, H and a stored layer of them: plain rounding, then the first columns of the rest."""
    w, h = matrices.gaussian(m, n, seed).astype(dtype), matrices.hessian("power", n, seed).astype(dtype)
    return w, h, _packed(jnp.asarray(w), jnp.asarray(h), config, kind, seed)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _packed(w, h, config, kind, seed):
    rest, _, rotation = incoherence.rotate(jax.random.key(seed), w, h, kind)
    q = low_rank = None
    if config.q_grid:
        q = codebooks.quantize(config.q_grid, rest)
        rest = rest - q.values
    if config.rank:
        factors = rest[:, :config.rank].T, jnp.eye(config.rank, w.shape[1], dtype=w.dtype)
        low_rank = LowRank(*(codebooks.quantize(grid, factor)
                             for grid, factor in zip(config.factor_grids, factors, strict=True)))
    return linear.pack(Decomposition(q, low_rank), rotation, config, jnp.ones((), w.dtype))


# ---- one layer


@pytest.mark.parametrize("kind", matrices.HESSIANS)
@pytest.mark.parametrize("m, n", SHAPES)
def test_error_and_limits_are_those_of_the_verifier(kind, m, n):
    w, q, low_rank = approximated(m, n)
    h = 7 * matrices.hessian(kind, n)
    found = explain.account(w, q, low_rank, h, 0.01, 3, E8P(), 2.5)
    assert found.error == pytest.approx(oracles.relative(w, q + low_rank, h), rel=1e-9)  # sums of mn² terms, none small
    limit = partial(objective.rate_distortion_limit, found.error, w, h)
    assert found.limit == pytest.approx(limit(), rel=1e-9, abs=1e-9)
    if kind in ("geometric", "power"):  # equal eigenvalues have no eigenvectors of their own
        assert found.limit_own == pytest.approx(limit("own"), rel=1e-9, abs=1e-9)
    assert found.gap == 2.5 - found.limit


@pytest.mark.parametrize("kind", ["flat", "geometric", "power", "deficient"])
@pytest.mark.parametrize("rank", [0, 1, 5])
@pytest.mark.parametrize("m, n", SHAPES)
def test_the_floor_is_the_least_error_of_any_low_rank_part_beside_this_q(kind, rank, m, n):
    w, q, low_rank = approximated(m, n, rank)
    h = matrices.hessian(kind, n)
    found = explain.account(w, q, low_rank, h, 0.01, rank, E8P(), 2.0)
    least = oracles.rank_constrained(w - q, h, rank)
    # as a loss it is off by rounding of the largest eigenvalue: sqrt(n eps) of the error of Q alone at the most
    atol = math.sqrt(10 * n * EPS) * oracles.relative(w, q, h)
    assert found.floor == pytest.approx(math.sqrt(least[1] / oracles.loss(w, h)), rel=1e-7, abs=atol)
    assert found.floor == found.error if rank == 0 else found.floor < found.error
    reached = explain.account(w, q, least[0], h, 0.01, rank, E8P(), 2.0)
    assert reached.error == pytest.approx(found.floor, rel=1e-6, abs=atol)


@pytest.mark.parametrize("kind", ["flat", "power", "geometric"])
@pytest.mark.parametrize("grid", [E8P(), Uniform(3, clip=2.5)])
def test_plain_ldlq_errs_by_the_identity_up_to_the_wider_targets_and_chance(kind, grid):
    m, n = 512, 96
    w, h = matrices.gaussian(m, n), matrices.hessian(kind, n)
    factors = hessian.factor(jnp.asarray(h), 0.1, grid.block)
    q = np.asarray(ldlq(jnp.asarray(w), grid, factors).values)
    h = h / np.diag(h).mean() + 0.1 * np.eye(n)  # what LDLQ works on; then nothing is left for damping to add
    found = explain.account(w, q, np.zeros((m, n)), h, 0.0, 0, grid, 2.0)
    # Targets carry fed back errors, and the grid was fitted to W without them: round Gaussians as wide as the widest
    c, lower = explain.rounding_error(grid), np.asarray(factors.lower)
    widest = 1 + c * float(np.sum(np.tril(lower, -1) ** 2, axis=0).max())
    x = jnp.asarray(matrices.gaussian(512, 512, 5))
    scale = codebooks.fit_scale(grid, x)
    wide = np.asarray(grid.round(math.sqrt(widest) * x / scale)[0] * scale - math.sqrt(widest) * x) ** 2
    # The loss is a sum over m n / g independent blocks, unequally weighted by D
    d = np.repeat([np.trace(part) for part in oracles.block_ldl(h, grid.block)[1]], m)
    blocks = wide.reshape(-1, grid.block).mean(1)
    chance = 5 * blocks.std() / c * np.linalg.norm(d) / d.sum()
    ratio = (found.error / found.ldlq) ** 2
    assert 1 - chance < ratio < wide.mean() / c + chance
    assert chance < 0.15 and wide.mean() / c < 1.6  # so the claim says something
    assert found.ldlq <= found.quip_sharp  # tr D <= g μ² tr(H^½)² / n always
    assert found.error <= found.quip_sharp and 2 * found.error < found.caldera


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("m, n", SHAPES)
def test_the_bounds_are_their_formulas_for_what_was_rounded(rank, m, n):
    w, _, low_rank = approximated(m, n, rank)
    h, grid, largest = matrices.hessian("geometric", n), Uniform(3, clip=2.5), []
    damped = h + 0.01 * np.diag(h).mean() * np.eye(n)
    levels = np.linspace(-2.5, 2.5, 8)

    def rounded(x):
        largest.append(np.abs(x).max())
        return oracles.nearest(levels)(x)

    q = oracles.ldlq(w - low_rank, damped, 1, rounded)[0]
    found = explain.account(w, q, low_rank, h, 0.01, rank, grid, 2.0)
    energy, variance = oracles.loss(w, h), explain.rounding_error(grid) * np.mean((w - low_rank) ** 2)
    d = sum(np.trace(part) for part in oracles.block_ldl(damped, 1)[1])
    excess = (found.error**2 - found.floor**2) * energy / m
    assert found.ldlq == pytest.approx(math.sqrt(variance * m * d / energy), rel=1e-9)
    assert found.quip_sharp**2 * energy == pytest.approx(objective.ldlq_bound(damped, m, variance, 1), rel=1e-9)
    bound = objective.caldera_bound(h, m, rank, 3, max(largest), excess)
    # the targets come back from Q as Q − E lower: condition 1e4 / (1e4 · 0.01) of H' in the way
    assert found.caldera == pytest.approx(math.sqrt(bound / energy), rel=1e-9)


@pytest.mark.parametrize("grid, expected, rel", [(E8P(), 0.0915, 0.01), (Uniform(1, clip=math.sqrt(2 / math.pi)),
                                                                        1 - 2 / math.pi, 0.02)])
def test_rounding_errors_of_the_grids_are_the_known_ones(grid, expected, rel):
    assert explain.rounding_error(grid) == pytest.approx(expected, rel=rel)  # 262144 numbers: chance below 0.5 %


@pytest.mark.parametrize("grid", [Dithered(4), NormalFloat(4)])
def test_any_grid_has_a_rounding_error(grid):
    assert 0 < explain.rounding_error(grid) < 0.1


@pytest.mark.parametrize("kind, m, n, dtype", [("hadamard", 16, 20, np.float64), ("hadamard", 12, 9, np.float32),
                                                ("orthogonal", 14, 10, np.float32), ("none", 10, 13, np.float32)])
def test_a_stored_layer_is_judged_alike_in_its_own_basis_and_in_the_callers(kind, m, n, dtype):
    config = CalderaConfig(rank=2, quantizer="uniform", q_bits=3, factor_quantizer="uniform", rotation=kind)
    w, h, layer = packed(m, n, config, kind, dtype)
    found = explain.of_layer(layer, w.astype(np.float64), h.astype(np.float64), 0.01)
    *caller, dense = (np.asarray(part, np.float64) for part in in_callers_basis(layer))
    other = explain.account(w.astype(np.float64), *caller, h.astype(np.float64), 0.01, 2, Uniform(3), found.gap)
    # decoded in the layer's dtype, in which orthogonal factors are orthogonal, too: a few sums of some 10 roundings;
    # the limit turns a relative change x of the error into at most x / ln 2 bits
    tolerance = 100 * float(np.finfo(dtype).eps)
    for name in ("error", "floor", "limit"):
        assert getattr(found, name) == pytest.approx(getattr(other, name), rel=tolerance, abs=10 * tolerance)
    assert found.gap + found.limit == pytest.approx(layer.stored_bits / (m * n), rel=1e-12)
    # dense() works in the layer's dtype: rounding of 100 eps of W beside an error of 0.1 of it or more
    assert found.error == pytest.approx(oracles.relative(w, dense, h), rel=1000 * float(np.finfo(dtype).eps))


def test_a_layer_whose_outputs_count_differently_is_judged_as_it_was_made():
    (w, h), g = (matrices.gaussian(12, 20), matrices.hessian("power", 20)), 4.0 ** np.linspace(-2, 2, 12)
    config = CalderaConfig(rank=2, quantizer="uniform", q_bits=3, factor_quantizer="uniform", outer_iterations=2,
                           inner_iterations=2)
    layer, trace = compress_matrix(jax.random.key(0), w, h, config, g=g)
    assert explain.of_layer(layer, w, h, 0.01).error == pytest.approx(float(trace.error[1:].min()), rel=1e-3)


@jax.jit
def in_callers_basis(layer):
    """Q, L R and the whole layer."""
    q, left, right = (part.astype(np.float64) for part in layer.rotated())
    sides = layer.sides(np.float64)
    return incoherence.undo(sides, q), incoherence.undo(sides, left @ right), layer.dense()


def test_without_q_only_the_bounds_of_q_are_missing():
    w, h, layer = packed(12, 20, CalderaConfig(rank=4, q_bits=0, factor_quantizer="uniform"))
    found = explain.of_layer(layer, w, h, 0.01, bits=3.0)
    assert math.isnan(found.ldlq) and math.isnan(found.quip_sharp) and math.isnan(found.caldera)
    least = oracles.rank_constrained(w, h, 4)[1]
    assert found.floor == pytest.approx(math.sqrt(least / oracles.loss(w, h)), rel=1e-7)
    assert found.floor < found.error < 1 and found.gap == 3.0 - found.limit


def test_a_layer_without_low_rank_has_its_error_for_a_floor():
    w, h, layer = packed(12, 20, CalderaConfig(rank=0, quantizer="uniform"))
    found = explain.of_layer(layer, w, h, 0.01)
    assert found.floor == found.error > 0 and found.gap < layer.stored_bits / 240


def test_a_dead_layer_has_no_error_and_needs_no_bits():
    w, q, low_rank = approximated(6, 8)
    found = explain.account(w, q, low_rank, np.zeros((8, 8)), 0.01, 3, E8P(), 2.0)
    assert found.error == found.floor == found.limit == 0 and found.ldlq == np.inf


def test_no_number_of_bits_is_enough_for_no_error_at_all():
    w = matrices.gaussian(6, 8)
    found = explain.account(w, w, 0 * w, np.eye(8), 0.01, 0, None, 2.0)
    assert found.error == found.floor == 0 and found.limit == found.limit_own == -found.gap == np.inf


# ---- a whole model


CALDERA = CalderaConfig(rank=3, outer_iterations=1, inner_iterations=1, quantizer="uniform", q_bits=3,
                        factor_quantizer="uniform")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """What a run of the tiny model is told; text and model lie in one directory."""
    directory = tmp_path_factory.mktemp("tiny")
    text = str(tiny.write_text(directory / "text.txt"))
    return RunConfig(str(tiny.write_model(directory / "model", tiny.SQUARE)), CALDERA, Tokens(text, 4, 32),
                     Tokens(text, 3, 32))


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """For each kind of activations a run with its Moments kept, and its report."""
    def run(activations):
        directory = tmp_path_factory.mktemp(activations)
        out, moments = directory / "out", directory / "moments"
        return out, moments, compress(dataclasses.replace(base, activations=activations), out, moments)

    return {activations: run(activations) for activations in ("dense", "compressed")}


@pytest.fixture
def plain_run(runs):
    return runs["dense"][0]


def theory_of(out, moments=None):
    return {path: explain.of_layer(layer, w, h, row["damping"])
            for path, layer, w, h, row in explain.layers(out, moments)}


def altered(source, target, **changes):
    """A copy of an artifact whose manifest tells of another configuration."""
    shutil.copytree(source, target)
    manifest = json.loads((target / artifact.MANIFEST).read_text())
    manifest["run"]["config"] |= changes
    files.write_json(target / artifact.MANIFEST, manifest | {"sha256": artifact.digest(manifest)})
    return target


@pytest.mark.parametrize("activations", ["dense", "compressed"])
def test_calibrating_again_finds_the_errors_of_the_report_and_so_do_kept_moments(runs, activations, monkeypatch):
    out, moments, row = runs[activations]
    before = sorted(out.rglob("*"))
    again = theory_of(out)
    assert list(again) == [r["path"] for r in row["layers"]] and len(again) == 14
    for r in row["layers"]:
        assert again[r["path"]].error == pytest.approx(r["error"], rel=1e-4)
        assert again[r["path"]].floor <= again[r["path"]].error * (1 + 1e-9)
        assert again[r["path"]].gap + again[r["path"]].limit == pytest.approx(r["bits_per_weight"], rel=1e-12)
    monkeypatch.setattr(calibration, "calibrate_block", None)
    kept = theory_of(out, moments)
    for path, found in again.items():  # the run's own Moments, of the same sums
        np.testing.assert_allclose(kept[path], found, rtol=1e-4)
    assert sorted(out.rglob("*")) == before
    with pytest.raises(TypeError):  # a directory without them is of no help
        theory_of(out, moments.parent)


def test_released_hessians_are_those_compared_with_and_must_be_the_same(base, tmp_path, monkeypatch):
    folder = tmp_path / "hessians"
    folder.mkdir()
    for index in range(2):
        for name in set(llama.INPUT_OF.values()):
            h = matrices.hessian("power", 24, index).astype(np.float32)
            files.write(folder / f"{index}_{name}.pt", h.tobytes())
    monkeypatch.setattr(calibration, "read_hessian",  # torch is of no concern here
                        lambda path: np.frombuffer(path.read_bytes(), np.float32).reshape(24, 24))
    row = compress(dataclasses.replace(base, hessians=str(folder)), tmp_path / "out")
    found = theory_of(tmp_path / "out")
    for r in row["layers"]:
        assert found[r["path"]].error == pytest.approx(r["error"], rel=1e-4)
    shutil.copy(folder / "0_o.pt", folder / "1_o.pt")
    with pytest.raises(ValueError, match="not the Hessians of this run"):
        theory_of(tmp_path / "out")


def test_the_command_prints_a_row_a_layer_and_the_mean_gap(plain_run, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["caldera", "inspect", str(plain_run), "--theory"])
    cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "rank", "bits", "error", "floor", "ldlq", "quip#", "thm", "4.1", "limit",
                                "own", "gap"]
    rows = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in lines[1:-1]}
    reported = files.read_json(plain_run / "report.json")["layers"]
    assert list(rows) == [r["path"] for r in reported]
    for r in reported:  # printed with four decimals
        rank, bits, error, *_, limit, _, gap = rows[r["path"]]
        assert (rank, bits) == (3, pytest.approx(r["bits_per_weight"], abs=5.1e-5))
        assert error == pytest.approx(r["error"], abs=5.1e-5 + 1e-4 * r["error"])
        assert gap == pytest.approx(bits - limit, abs=1.6e-4)
    mean = np.mean([row[-1] for row in rows.values()])  # all layers are of one size
    assert float(lines[-1].split()[2]) == pytest.approx(mean, abs=1.1e-4)


def refused(monkeypatch, capsys, *arguments):
    """What `caldera inspect` says when it refuses."""
    monkeypatch.setattr("sys.argv", ["caldera", "inspect", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_moments_without_theory_are_refused(plain_run, tmp_path, monkeypatch, capsys):
    assert "add --theory" in refused(monkeypatch, capsys, plain_run, "--moments", tmp_path)


def test_another_or_a_lost_base_model_is_refused(plain_run, base, tmp_path, monkeypatch, capsys):
    convert.save_hf(tmp_path / "model", tiny.SQUARE, llama.init(jax.random.key(1), tiny.SQUARE))
    shutil.copy(Path(base.model) / "tokenizer.json", tmp_path / "model")
    other = altered(plain_run, tmp_path / "out", model=str(tmp_path / "model"))
    said = refused(monkeypatch, capsys, other, "--theory")
    assert f"{tmp_path / 'model'} is not the model that {other} was compressed from" in said
    shutil.rmtree(tmp_path / "model")
    assert str(tmp_path / "model") in refused(monkeypatch, capsys, other, "--theory")


def test_a_changed_or_moved_text_is_refused_by_name_but_not_missed_where_moments_are_kept(
        runs, base, tmp_path, monkeypatch, capsys):
    out, moments, row = runs["dense"]
    text = tmp_path / "text.txt"
    tokens = [report.plain(dataclasses.replace(t, text=str(text))) for t in (base.calibration, base.evaluation)]
    moved = altered(out, tmp_path / "out", calibration=tokens[0], evaluation=tokens[1])
    assert f"unknown text '{text}'" in refused(monkeypatch, capsys, moved, "--theory")
    text.write_text("Another beginning. " + Path(base.calibration.text).read_text())
    assert f"calibration text '{text}' has changed" in refused(monkeypatch, capsys, moved, "--theory")
    text.unlink()
    assert theory_of(moved, moments)["blocks.1.o"].error == pytest.approx(row["layers"][10]["error"], rel=1e-4)


@pytest.mark.parametrize("caldera", [CALDERA, CalderaConfig(quantizer=E8P(gain=1.1), factor_bits=(4, 16)),
                                     CalderaConfig(quantizer=Dithered(3), factor_quantizer=NormalFloat(4, group=32))])
def test_a_manifest_gives_the_configuration_back(caldera):
    config = RunConfig("model", caldera, Tokens("a", 1, 2), blocks=3, activations="compressed", hessians="h")
    assert recorded(json.loads(json.dumps(report.plain(config)))) == config
