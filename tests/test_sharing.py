"""Weights that stand for several others: the best Kronecker sum, blocks that share, an embedding of low rank."""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matrices
import numpy as np
import pytest
import tiny

from caldera_jax.jobs import evaluate
from caldera_jax.models import llama

sys.path.append(str(Path(__file__).parent.parent / "experiments"))

import baselines  # noqa: E402
import pruning  # noqa: E402
import sharing  # noqa: E402
from baselines import Layer, Replacement  # noqa: E402

EPS16, EPS32 = np.finfo(np.float16).eps, np.finfo(np.float32).eps
CONFIG = dataclasses.replace(tiny.CONFIG, layers=5)
OUTPUTS = 24 + 12 + 12 + 24 + 40 + 40 + 24  # rows of them
LINEAR = 2 * 24 * 24 + 2 * 12 * 24 + 3 * 24 * 40  # weights of a block's linear layers
FORWARD = jax.jit(llama.forward, static_argnums=0)


def _kronecker(w, bits, **settings):
    return sharing.METHODS["kronecker"].run(None, Layer(w, None), bits=bits, **settings)


def _budget(w, terms, value_bits=16):
    """The bits a weight of so many terms; below 16 with two float16 numbers for each of the two factors.  And half a
    bit: what is left of a division may be less than it was."""
    (m1, n1), (m2, n2) = sharing.factor_shapes(*w.shape)
    return (terms * (value_bits * (m1 * n1 + m2 * n2) + 64 * (value_bits < 16)) + 0.5) / w.size


@pytest.fixture
def exact(monkeypatch):
    """Factors are not rounded."""
    monkeypatch.setattr(pruning, "row_grid", lambda w, mask, bits: lambda x: x)


# ---- Kronecker products


def test_the_rearranged_product_is_an_outer_product():
    a, b = matrices.gaussian(3, 4), matrices.gaussian(5, 2, 1)
    np.testing.assert_array_equal(sharing.rearrange(np.kron(a, b), 3, 4), np.outer(a, b))


@pytest.mark.parametrize(("m", "n"), [(12, 20), (9, 15), (36, 8)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_kronecker_product_is_found_at_one_term(m, n, dtype):
    (m1, n1), (m2, n2) = sharing.factor_shapes(m, n)
    w = np.kron(matrices.gaussian(m1, n1), matrices.gaussian(m2, n2, 1)).astype(dtype)
    found = _kronecker(w, _budget(w, 1))
    assert isinstance(found, Replacement) and found.weight.dtype == np.float32
    assert found.bits == 16 * (m1 * n1 + m2 * n2)
    # each entry of a factor is off by EPS16 / 2 of it, or 2^-25 if that is more, and w by its own rounding
    scale = np.linalg.norm(w)
    np.testing.assert_allclose(found.weight, w, rtol=1.01 * EPS16, atol=2.0**-24 * np.sqrt(scale) + 4 * EPS32 * scale)


@pytest.mark.parametrize("terms", [1, 3, 7])
def test_the_error_is_the_tail_of_the_rearranged_singular_values(exact, terms):
    w = matrices.gaussian(12, 20)
    (m1, n1), (m2, n2) = sharing.factor_shapes(12, 20)
    found = _kronecker(w, _budget(w, terms))
    assert found.bits == terms * 16 * (m1 * n1 + m2 * n2)
    blocks = [w[i * m2:(i + 1) * m2, j * n2:(j + 1) * n2].ravel() for i in range(m1) for j in range(n1)]
    u, s, v = np.linalg.svd(np.array(blocks))
    np.testing.assert_allclose(np.sum((found.weight - w) ** 2), np.sum(s[terms:] ** 2), rtol=1e-12)
    wanted = sum(np.kron((s[t] * u[:, t]).reshape(m1, n1), v[t].reshape(m2, n2)) for t in range(terms))
    np.testing.assert_allclose(found.weight, wanted, atol=1e-12)


def test_no_alternating_least_squares_finds_a_better_term(exact):
    w = matrices.heavy_tailed(6, 10)
    (m1, n1), (m2, n2) = sharing.factor_shapes(6, 10)
    best = np.sum((_kronecker(w, _budget(w, 1)).weight - w) ** 2)
    cut = w.reshape(m1, m2, n1, n2)
    for seed in range(5):
        b = matrices.gaussian(m2, n2, seed)
        for _ in range(100):
            a = np.einsum("acbd,cd->ab", cut, b) / np.sum(b**2)
            b = np.einsum("acbd,ab->cd", cut, a) / np.sum(a**2)
        assert np.sum((np.kron(a, b) - w) ** 2) >= best * (1 - 1e-12)


def test_as_many_terms_are_stored_as_the_bits_allow_and_all_of_them_are_the_matrix():
    w = matrices.gaussian(12, 20)
    term = 16 * sum(a * b for a, b in sharing.factor_shapes(12, 20))
    errors = []
    for bits in (2.5, 4, 6.5, 16, 1000):
        found = _kronecker(w, bits)
        assert found.bits % term == 0
        assert found.bits <= bits * w.size < found.bits + term or found.bits == term * 15
        errors.append(np.linalg.norm(found.weight - w))
    assert errors == sorted(errors, reverse=True)
    # all 15 terms: σ_t is ‖a_t‖ ‖b_t‖, and each of the two is off by EPS16 / 2 of it
    singular = np.linalg.svd(sharing.rearrange(w, *sharing.factor_shapes(12, 20)[0]))[1]
    assert errors[-1] <= 1.01 * EPS16 * singular.sum() < errors[-2]


def test_factors_are_stored_in_float16():
    """An exact product comes back to float16's precision, and not to float32's."""
    w = np.kron([[1.0, 0.5], [-2.0, 0.25]], [[1.0, 4.0], [0.125, -1.0]])
    found = _kronecker(w, _budget(w, 1)).weight
    np.testing.assert_allclose(found, w, rtol=1.01 * EPS16)
    w = w * np.pi
    assert np.abs(_kronecker(w, _budget(w, 1)).weight - w).max() > 100 * EPS32 * np.abs(w).max()


@pytest.mark.parametrize("terms", [1, 3, 7])
def test_factors_of_eight_bits_take_half_the_bits_and_two_numbers_each_and_lose_little(terms):
    w = matrices.gaussian(24, 40)
    (m1, n1), (m2, n2) = sharing.factor_shapes(24, 40)
    sixteen, eight = _kronecker(w, _budget(w, terms)), _kronecker(w, _budget(w, terms, 8), value_bits=8)
    assert eight.bits == terms * (8 * (m1 * n1 + m2 * n2) + 64) and sixteen.bits == terms * 16 * (m1 * n1 + m2 * n2)
    errors = [np.linalg.norm(found.weight - w) for found in (sixteen, eight)]
    assert 0 < abs(errors[1] / errors[0] - 1) < 0.01
    fewer = _kronecker(w, _budget(w, terms + 1, 8) - 1 / w.size, value_bits=8)
    assert fewer.bits == eight.bits and fewer.bits < _kronecker(w, _budget(w, terms + 1, 8), value_bits=8).bits


def test_a_term_of_equal_steps_comes_back_whole_at_eight_bits():
    rng = np.random.default_rng(0)
    a, b = (rng.permutation(np.linspace(-1, 1, 256)).reshape(16, 16) for _ in range(2))
    found = _kronecker(np.kron(a, b), _budget(np.kron(a, b), 1, 8), value_bits=8).weight
    # float16 takes EPS16 / 2 of the least value and of the step, which is added 255 times: 1.5 EPS16 of each factor
    np.testing.assert_allclose(found, np.kron(a, b), atol=3.01 * EPS16, rtol=0)
    assert np.abs(found - np.kron(a, b)).max() > 0


def test_each_factor_of_a_term_has_its_own_grid():
    """A term 10⁴ times smaller than the first, its factors 100 times, is stored as well as if it were alone."""
    a, b, c, d = (matrices.gaussian(16, 16, seed) for seed in range(4))
    c, d = c - a * np.sum(a * c) / np.sum(a**2), d - b * np.sum(b * d) / np.sum(b**2)
    large, small = np.kron(a, b), 1e-4 * np.kron(c, d)
    one, two = (_kronecker(large + small, _budget(large, terms, 8), value_bits=8).weight for terms in (1, 2))
    # half a step of the range, and what float16 takes from its ends, of one factor times the other, and the sum's
    half_step = lambda x: np.ptp(x) / 510 + EPS16 * (np.abs(x).max() + np.ptp(x))
    off = 1e-4 * (half_step(c) * np.abs(d).max() + half_step(d) * np.abs(c).max() + half_step(c) * half_step(d))
    np.testing.assert_allclose(two - one, small, rtol=0, atol=off + 2 * EPS32 * np.abs(large).max())
    assert off < 0.02 * np.abs(small).max()


@pytest.mark.parametrize("value_bits", [16, 8])
def test_the_error_falls_as_there_are_more_terms(value_bits):
    w = matrices.gaussian(24, 40)
    errors = [np.linalg.norm(_kronecker(w, bits, value_bits=value_bits).weight - w) for bits in (2, 3, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


@pytest.mark.parametrize("value_bits", [4, 3])
def test_other_bits_of_factors_are_refused(value_bits):
    with pytest.raises(ValueError, match=f"value_bits of factors is 16 or 8, got {value_bits}"):
        _kronecker(matrices.gaussian(12, 20), 8, value_bits=value_bits)
    with pytest.raises(ValueError, match=f"value_bits of factors is 16 or 8, got {value_bits}"):
        sharing.factorised_embedding(_params(), 4, value_bits)


def test_a_layer_is_replaced_as_by_the_other_methods(monkeypatch):
    monkeypatch.setattr(baselines, "METHODS", sharing.METHODS)
    w = matrices.gaussian(12, 20).astype(np.float32)
    found = baselines.replace("kronecker", jax.random.key(0), Layer(w, np.eye(20, dtype=np.float32)), bits=6)
    np.testing.assert_array_equal(found.weight, _kronecker(w, 6).weight, strict=True)
    with pytest.raises(ValueError, match="kronecker takes the settings bits: float"):
        baselines.replace("kronecker", jax.random.key(0), Layer(w, np.eye(20, dtype=np.float32)))


@pytest.mark.parametrize(("m", "n"), [(7, 5), (12, 20), (192, 512), (576, 1536), (96, 192), (13, 12), (1, 6)])
def test_factor_shapes_divide_the_matrix_and_none_are_smaller(m, n):
    (m1, n1), (m2, n2) = sharing.factor_shapes(m, n)
    assert (m1 * m2, n1 * n2) == (m, n)
    sizes = [a * b + (m // a) * (n // b) for a in range(1, m + 1) for b in range(1, n + 1) if not m % a and not n % b]
    assert m1 * n1 + m2 * n2 == min(sizes)


def test_square_matrices_of_square_size_have_square_factors():
    assert sharing.factor_shapes(576, 576) == ((24, 24), (24, 24))


def test_a_budget_too_small_for_one_term_is_refused():
    w = matrices.gaussian(7, 5)  # [1, 5] ⊗ [7, 1]
    with pytest.raises(ValueError, match=r"\[1, 5\] ⊗ \[7, 1\] takes 5.49 bits a weight, more than 5.4: raise bits"):
        _kronecker(w, 5.4)
    assert _kronecker(w, 5.5).bits == 16 * 12
    with pytest.raises(ValueError, match="raise bits"):
        _kronecker(w, 0)


def test_zero_is_zero():
    np.testing.assert_array_equal(_kronecker(np.zeros((6, 10)), 8).weight, np.zeros((6, 10)))


# ---- blocks that share their weights


def _params(dtype=np.float32):
    """Random, with gains that differ from block to block."""
    rng, shapes = np.random.default_rng(0), llama.shapes(CONFIG)
    normal = lambda m, n: (rng.normal(size=(m, n)) / np.sqrt(n)).astype(dtype)
    gain = lambda: rng.uniform(0.5, 1.5, CONFIG.dim).astype(dtype)
    blocks = [{name: normal(*shapes[name]) for name in llama.LINEARS} | {"attn_norm": gain(), "ffn_norm": gain()}
              for _ in range(CONFIG.layers)]
    return {"embed": normal(CONFIG.vocab, CONFIG.dim), "blocks": blocks, "norm": gain(),
            "head": normal(CONFIG.vocab, CONFIG.dim)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("how", ["first", "mean"])
def test_sharing_equal_blocks_is_lossless(how, dtype):
    params = _params(dtype)
    for i, block in enumerate(params["blocks"]):
        block |= {name: params["blocks"][i // 2 * 2][name].astype(np.float16).astype(dtype) for name in llama.LINEARS}
    found, bits = sharing.share_blocks(CONFIG, params, how=how)
    for block, old in zip(found["blocks"], params["blocks"], strict=True):
        jax.tree.map(np.testing.assert_array_equal, block, old)
    assert bits == 3 * 16 * LINEAR


@pytest.mark.parametrize(("group", "sets"), [(2, [(0, 1), (2, 3), (4,)]), (3, [(0, 1, 2), (3, 4)]), (5, [range(5)])])
def test_each_group_has_one_set_of_weights_and_every_block_its_own_gains(group, sets):
    params = _params()
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab, (2, 12))
    for how in ("first", "mean"):
        found, bits = sharing.share_blocks(CONFIG, params, group, how)
        assert bits == 16 * LINEAR * len(sets)
        for members in sets:
            for i in members:
                for name in llama.LINEARS:
                    old = np.array([params["blocks"][j][name] for j in members], np.float64)
                    wanted = (old[0] if how == "first" else old.mean(0)).astype(np.float16).astype(np.float32)
                    np.testing.assert_array_equal(found["blocks"][i][name], wanted, strict=True)
                for name in ("attn_norm", "ffn_norm"):
                    np.testing.assert_array_equal(found["blocks"][i][name], params["blocks"][i][name])
        assert np.isfinite(evaluate.perplexity(CONFIG, found, tokens))


@pytest.mark.parametrize(("value_bits", "grid"), [(16, 0), (8, 32), (4, 32)])
@pytest.mark.parametrize(("group", "sets"), [(2, 3), (3, 2), (5, 1)])
def test_shared_weights_are_stored_once_and_so_are_their_grids(group, sets, value_bits, grid):
    found, bits = sharing.share_blocks(CONFIG, _params(), group, "mean", value_bits)
    assert isinstance(bits, int) and bits == sets * (value_bits * LINEAR + grid * OUTPUTS)
    for name in llama.LINEARS:
        for row in found["blocks"][0][name]:
            assert len(np.unique(row)) <= 2**value_bits


def test_shared_weights_of_eight_bits_are_within_half_a_step_of_those_of_sixteen():
    (sixteen, _), (eight, _) = (sharing.share_blocks(CONFIG, _params(), value_bits=bits) for bits in (16, 8))
    for block, other in zip(sixteen["blocks"], eight["blocks"], strict=True):
        for name in llama.LINEARS:
            reach = np.ptp(block[name], axis=1, keepdims=True)
            most = np.abs(block[name]).max(1, keepdims=True)
            error = np.abs(block[name] - other[name])
            assert (error <= reach / 510 + EPS16 * (most + reach)).all() and error.max() > 0
        np.testing.assert_array_equal(block["attn_norm"], other["attn_norm"])


def test_the_given_model_is_not_changed():
    params, same = _params(), _params()
    sharing.share_blocks(CONFIG, params, how="mean")
    sharing.factorised_embedding(params, 3)
    jax.tree.map(np.testing.assert_array_equal, params, same)


@pytest.mark.parametrize(("settings", "text"), [
    ({"group": 1}, "2 to 5; got 1"), ({"group": 0}, "2 to 5; got 0"), ({"group": 6}, "2 to 5; got 6"),
    ({"how": "last"}, "first, mean; got 'last'"), ({"value_bits": 3}, "16, 8 or 4, got 3")])
def test_ways_to_share_that_are_none_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        sharing.share_blocks(CONFIG, _params(), **settings)


# ---- a factorised embedding


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_of_full_rank_gives_the_same_logits_and_a_tied_head_uses_it(tied, exact):
    """Up to the rounding of float32: factors are not rounded here."""
    config = dataclasses.replace(CONFIG, tied=tied)
    params = _params(np.float64)
    if tied:
        del params["head"]
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab, (2, 12)))
    found, bits = sharing.factorised_embedding(params, 24)
    assert bits == 16 * 24 * (256 + 24)
    before, after = FORWARD(config, params, tokens), FORWARD(config, found, tokens)
    np.testing.assert_allclose(after, before, atol=1e-9)
    low, _ = sharing.factorised_embedding(params, 4)
    if tied:  # the logits lie in the span of the table's columns
        assert np.linalg.matrix_rank(np.asarray(FORWARD(config, low, tokens)).reshape(-1, 256), tol=1e-9) == 4
    else:
        np.testing.assert_array_equal(low["head"], params["head"])


@pytest.mark.parametrize("rank", [1, 5, 24])
def test_the_error_of_an_embedding_is_the_tail_of_its_singular_values_and_the_rounding(rank):
    params = _params()
    table = params["embed"].astype(np.float64)
    found, bits = sharing.factorised_embedding(params, rank)
    s = np.linalg.svd(table)[1]
    assert np.linalg.matrix_rank(found["embed"].astype(np.float64), tol=100 * EPS32 * s[0]) == rank
    assert found["embed"].dtype == np.float32 and bits == 16 * rank * 280
    tail = np.sqrt(np.sum(s[rank:] ** 2))
    # a factor's entries are off by EPS16 / 2 of themselves: ‖δA B‖ <= EPS16 / 2 ‖A‖_F ‖B‖_2, and so for B
    rounding = EPS16 * np.sqrt(s[:rank].sum() * s[0]) * 1.01
    assert tail <= np.linalg.norm(found["embed"] - table) <= tail + rounding


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_an_embedding_of_eight_bits_a_value_has_a_grid_for_each_factor_of_a_term(rank):
    params = _params()
    errors = []
    for value_bits in (16, 8):
        found, bits = sharing.factorised_embedding(params, rank, value_bits)
        assert bits == rank * (value_bits * 280 + 64 * (value_bits < 16))
        errors.append(np.linalg.norm(found["embed"] - np.float64(params["embed"])))
    assert 0 < abs(errors[1] / errors[0] - 1) < 0.01


@pytest.mark.parametrize("rank", [0, -1, 25])
def test_a_rank_that_the_embedding_has_not_is_refused(rank):
    with pytest.raises(ValueError, match=r"\(256, 24\) takes ranks 1 to 24, got"):
        sharing.factorised_embedding(_params(), rank)
