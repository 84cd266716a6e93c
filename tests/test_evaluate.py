"""Sliding windows and comparison against token-by-token forward passes in float64; perplexity's own are in
test_compress.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from caldera_jax import CalderaConfig, compress_matrix, linear
from caldera_jax.jobs import calibration, evaluate
from caldera_jax.models import llama

CONFIG = dataclasses.replace(tiny.SQUARE, vocab=50)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab, 29).astype(np.int32)
forward = jax.jit(llama.forward, static_argnums=0)


@pytest.fixture(scope="module")
def base():
    params = llama.init(jax.random.key(3), CONFIG, jnp.float64)
    return params | {"head": 4 * params["head"]}  # sharper, so that models differ by more than rounding


@pytest.fixture(scope="module")
def compressed(base):
    grids = CalderaConfig(rank=2, outer_iterations=1, inner_iterations=1, quantizer="uniform",
                          factor_quantizer="uniform")
    pack = lambda w: compress_matrix(jax.random.key(4), w, jnp.eye(CONFIG.dim), grids)[0]
    blocks = [{name: pack(w) if name in llama.LINEARS else w for name, w in block.items()} for block in base["blocks"]]
    return base | {"blocks": blocks}


def log_probabilities(params, tokens):
    """Of every token at every place, [s, v], in NumPy float64."""
    logits = np.array(forward(CONFIG, params, tokens[None])[0], np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


# ---- sliding windows


@given(n=st.integers(2, 60), data=st.data())
@settings(max_examples=200, deadline=None)
def test_every_token_but_the_first_is_scored_once_with_as_much_before_it_as_promised(n, data):
    context = data.draw(st.integers(2, n))
    stride = data.draw(st.integers(1, context))
    windows, scored = evaluate.sliding_windows(np.arange(n), context, stride)
    assert windows.shape[1] == context and scored.shape == (len(windows), context - 1)
    unscored = set(range(0, n - context, context)) | ({n - context} if n % context == 0 else set())
    assert sorted(windows[:, 1:][scored]) == sorted(set(range(n)) - (unscored if stride == context else {0}))
    before = np.broadcast_to(np.arange(1, context), scored.shape)[scored]
    assert np.all(before >= np.minimum(context - stride, windows[:, 1:][scored]))
    assert len(windows) == 1 + -(-(n - context) // stride)  # no more than are needed


def test_a_stride_of_the_context_is_the_protocol_without_overlap(base):
    windows = TOKENS[:28].reshape(4, 7)
    found, scored = evaluate.sliding_windows(TOKENS[:28], 7, 7)
    np.testing.assert_array_equal(found, windows)
    assert scored.all()
    plain = evaluate.perplexity(CONFIG, base, windows)
    assert evaluate.perplexity(CONFIG, base, found, scored=scored) == plain


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 40), data=st.data())
def test_behind_bos_every_token_of_the_text_is_scored_once(n, data):
    context = data.draw(st.integers(2, n + 1))
    stride = data.draw(st.integers(1, context - 1))
    windows, scored = evaluate.sliding_windows(np.arange(n), context, stride, bos=99)
    assert windows.shape[1] == context and scored.shape == (len(windows), context - 1)
    assert np.all(windows[:, 0] == 99) and sorted(windows[:, 1:][scored]) == [*range(n)]
    before = np.broadcast_to(np.arange(context - 1), scored.shape)[scored]  # of the text
    assert np.all(before >= np.minimum(context - 1 - stride, windows[:, 1:][scored]))


@pytest.mark.parametrize(("context", "stride"), [(8, 3), (8, 1), (10, 9)])
def test_sliding_perplexity_is_that_of_a_forward_pass_for_each_token(base, context, stride):
    windows, scored = evaluate.sliding_windows(TOKENS, context, stride)
    starts, losses = [0] + [0] * (context - 1), []  # token t is predicted from those since starts[t]
    while len(starts) < len(TOKENS):
        end = min(len(starts) + stride, len(TOKENS))
        starts += [end - context] * (end - len(starts))
    for t in range(1, len(TOKENS)):
        losses.append(-log_probabilities(base, TOKENS[starts[t]:t])[-1, TOKENS[t]])
    found = evaluate.perplexity(CONFIG, base, windows, scored=scored)
    assert found == pytest.approx(np.exp(np.mean(losses)), rel=1e-12)


@pytest.mark.parametrize(("context", "stride", "message"), [
    (1, 1, "a context of 1 tokens"), (30, 3, "at most the 29 of the text"), (8, 0, "a stride of 0 tokens"),
    (8, 9, "give 1 to the context, 8"),
])
def test_windows_that_leave_tokens_out_are_refused(context, stride, message):
    with pytest.raises(ValueError, match=message):
        evaluate.sliding_windows(TOKENS, context, stride)


def test_behind_bos_a_context_has_room_for_one_token_less():
    assert len(evaluate.sliding_windows(TOKENS, len(TOKENS) + 1, 1, bos=0)[0]) == 1
    for context, stride, message in ((31, 3, "at most the 29 of the text and BOS"), (8, 8, "the context, 7 beside BOS"),
                                     (1, 1, "a context of 1 tokens")):
        with pytest.raises(ValueError, match=message):
            evaluate.sliding_windows(TOKENS, context, stride, bos=0)


# ---- comparison


def test_a_comparison_is_that_of_the_whole_distributions_in_float64(base, compressed):
    windows = TOKENS[:28].reshape(4, 7)
    found = evaluate.compare(CONFIG, base, compressed, windows, batch=3)
    for i, window in enumerate(windows):
        p, q = (log_probabilities(params, window)[:-1] for params in (base, compressed))
        close = lambda x, expected: np.testing.assert_allclose(x, expected, rtol=1e-10, atol=1e-12)
        close(found.divergence[i], np.sum(np.exp(p) * (p - q), axis=-1))
        close(found.base_loss[i], -p[np.arange(6), window[1:]])
        close(found.loss[i], -q[np.arange(6), window[1:]])
        np.testing.assert_array_equal(found.agree[i], p.argmax(-1) == q.argmax(-1))
    assert found.divergence.min() > 1e-6 and 0 < found.agree.mean() < 1  # the case is not a trivial one
    np.testing.assert_array_equal(found.loss, evaluate.token_losses(CONFIG, compressed, windows))


def test_logits_in_tiles_and_views_in_groups_give_the_same_figures(base, compressed, monkeypatch):
    views, scored = evaluate.sliding_windows(TOKENS, 9, 1)

    def figures(context):  # another one compiles anew
        config = dataclasses.replace(CONFIG, context=context)
        return (evaluate.perplexity(config, compressed, views, scored=scored),
                *evaluate.compare(config, base, compressed, views))

    expected = figures(1000)
    sizes, embed = [], calibration.embed
    monkeypatch.setattr(calibration, "embed", lambda *given: sizes.append(len(given[-1])) or embed(*given))
    monkeypatch.setattr(evaluate, "STREAMS", 10 * views.shape[1] * CONFIG.dim)
    monkeypatch.setattr(llama, "NUMBERS", 3 * CONFIG.vocab)
    for found, other in zip(figures(1001), expected, strict=True):
        np.testing.assert_allclose(found, other, rtol=1e-10, atol=1e-12)
    assert sizes == [10, 10, 1, 8, 8, 8, 8, 5, 5]  # of one model 10 at a time; of two 5, but no fewer than shards


def test_logits_of_a_long_window_are_bounded():
    stream, tokens = jax.ShapeDtypeStruct((1, 8192, 24), jnp.float32), jax.ShapeDtypeStruct((1, 8192), jnp.int32)
    config, f32 = dataclasses.replace(CONFIG, vocab=2**16), jnp.float32
    last = {"head": jax.ShapeDtypeStruct((2**16, 24), f32), "norm": jax.ShapeDtypeStruct((24,), f32)}
    programs = [evaluate._losses.lower(config, [last], [stream], tokens),
                evaluate._compared.lower(config, [last, last], [stream, stream], tokens),
                calibration._pull_head.lower(config, last, stream, jax.random.key(0))]
    for program in programs:
        size = program.compile().memory_analysis().temp_size_in_bytes
        assert size < 6 * 4 * llama.NUMBERS < 2 * 4 * 8192 * 2**16  # of which two are a pair of all logits


def test_long_windows_go_through_a_block_fewer_at_a_time(base, monkeypatch):
    shapes, forward = [], calibration.forward
    monkeypatch.setattr(calibration, "forward", lambda c, b, x: shapes.append(x.shape[:2]) or forward(c, b, x))
    for batch, tokens, expected in ((4, 14, [(2, 7)] * 2), (4, 3, [(1, 7)] * 4), (3, 99, [(3, 7), (1, 7)])):
        monkeypatch.setattr(calibration, "BATCH", tokens)
        calibration.run_block(CONFIG, base["blocks"][0], [[np.ones((4, 7, CONFIG.dim))]], batch)
        assert shapes == expected
        shapes.clear()


def test_a_block_too_large_to_be_put_together_finds_the_same(compressed, monkeypatch):
    found, products = [], []
    multiply = linear.multiply
    monkeypatch.setattr(linear, "multiply", lambda *given: products.append(given) or multiply(*given))
    for most in (2**28, 0):
        monkeypatch.setattr(calibration, "UNPACKED", most)
        calibration.forward.clear_cache()
        found.append(evaluate.token_losses(CONFIG, compressed, TOKENS[:28].reshape(4, 7)))
        assert bool(products) == (most == 0)
    np.testing.assert_allclose(*found, rtol=1e-10)


def test_a_model_does_not_diverge_from_itself_and_no_divergence_is_negative(base, compressed):
    windows = TOKENS[:28].reshape(4, 7)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), base)
    same = evaluate.compare(CONFIG, single, single, windows)
    assert not same.divergence.any() and same.agree.all()
    np.testing.assert_array_equal(same.loss, same.base_loss)
    near = single | {"norm": single["norm"] * (1 + jnp.float32(2**-20))}  # rounding alone tells them apart
    assert evaluate.compare(CONFIG, single, near, windows).divergence.min() >= 0


def test_models_of_other_shapes_are_not_compared(base):
    windows = TOKENS[:28].reshape(4, 7)
    for other in (base | {"embed": base["embed"][:40]}, base | {"blocks": base["blocks"][:1]}):
        with pytest.raises(ValueError, match="one vocabulary, width and depth"):
            evaluate.compare(CONFIG, base, other, windows)
    with pytest.raises(ValueError, match="not finite"):
        evaluate.compare(CONFIG, base, base | {"head": base["head"] * jnp.inf}, windows)


def test_the_standard_error_is_that_of_the_mean_of_means_and_covers_the_truth_where_counts_differ():
    rng = np.random.default_rng(1)
    values = rng.standard_normal((40, 6))
    m, error = evaluate.mean(values)
    means = values.mean(1)
    assert m == pytest.approx(means.mean()) and error == pytest.approx(means.std(ddof=1) / np.sqrt(40))
    assert np.isnan(evaluate.mean(values[:1])[1])
    scored = np.arange(6)[None] < rng.integers(1, 7, 400)[:, None]
    trials = []
    for _ in range(400):  # windows with a level of their own
        values = rng.standard_normal((400, 1)) + rng.standard_normal((400, 6))
        m, error = evaluate.mean(values, scored)
        assert m == pytest.approx(values[scored].mean())
        trials.append(m / error)
    # z has unit variance: 400 draws estimate it to sqrt(2 / 400) = 0.07; four of those, and some for w = 400
    assert abs(np.var(trials) - 1) < 4 * np.sqrt(2 / 400) + 0.01


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_a_token_beyond_the_vocabulary_is_refused_not_taken_for_another(base, array):
    with pytest.raises(IndexError, match="50"):
        evaluate.perplexity(CONFIG, base | {"embed": array(base["embed"])}, np.array([[50, 1, 3, 4]], np.int32))
