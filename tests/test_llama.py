"""The decoder against transformers, against a slow NumPy oracle, and against its own symmetries."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny

from caldera_jax import linear
from caldera_jax.decompose import CalderaConfig
from caldera_jax.models import convert, llama
from caldera_jax.models.llama import LinearRopeScaling, Llama3RopeScaling, LlamaConfig

SCALING = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=64)
GQA = LlamaConfig(vocab=61, dim=48, layers=2, heads=6, kv_heads=2, head_dim=12, ffn_dim=80, norm_eps=1e-5, context=128)
CONFIGS = {
    "gqa": GQA,
    "tied, one head per key, head_dim free": dataclasses.replace(GQA, kv_heads=6, head_dim=10, tied=True),
    "llama3 rope": dataclasses.replace(GQA, rope_theta=500.0, rope_scaling=SCALING),
    "linear rope": dataclasses.replace(GQA, rope_scaling=LinearRopeScaling(4.0)),
    "mistral": dataclasses.replace(GQA, sliding_window=7),
    "qwen2": dataclasses.replace(GQA, head_dim=8, qkv_bias=True, tied=True),
    **tiny.FAMILIES,
}
forward = jax.jit(llama.forward, static_argnums=0)
block = jax.jit(llama.block, static_argnums=0)
cached_block = jax.jit(llama.cached_block, static_argnums=0)
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def make(config, seed=0, dtype=np.float32):
    """Random parameters of the shapes of ``init``, with gains and biases that matter too."""
    rng = np.random.default_rng(seed)
    fill = lambda p: (
        rng.standard_normal(p.shape) / np.sqrt(p.shape[1]) if p.ndim == 2 else rng.uniform(0.5, 1.5, p.shape) - offset
    )
    offset = 1 if "gemma" in config.family else 0  # gains are stored less 1
    shapes = jax.eval_shape(partial(llama.init, config=config), jax.random.key(0))
    return jax.tree.map(lambda p: jnp.asarray(fill(p), dtype), shapes)


def sample(config, batch=2, length=40, seed=1):
    return np.random.default_rng(seed).integers(0, config.vocab, (batch, length))


def changed(config, tokens, place):
    """``tokens`` with other ones at ``place``."""
    other = tokens.copy()
    other[:, place] = (other[:, place] + 1) % config.vocab
    return other


def oracle(config, params, tokens):
    """Logits of one sequence in float64, one position, head and expert at a time; rotary pairs as complex numbers."""
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    gemma, half = "gemma" in config.family, config.head_dim // 2
    norm = lambda x, gain: x / np.sqrt((x * x).mean() + config.norm_eps) * (1 + gain if gemma else gain)
    normed = lambda x, gain: x if gain is None else np.apply_along_axis(norm, -1, x, gain)
    cap = lambda x, most: x if most is None else most * np.tanh(x / most)
    x = params["embed"][np.asarray(tokens)] * (np.sqrt(config.dim) if gemma else config.embed_scale)
    scale = 1 / np.sqrt(config.head_dim) if config.attention_scale is None else config.attention_scale

    def turn(row, position, frequency):
        z = (row[:half] + 1j * row[half:]) * np.exp(1j * position * frequency)
        return np.concatenate([z.real, z.imag])

    def mlp(p, z, of):
        gate = z @ p[f"gate{of}"].T
        gate = gate * ((1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) / 2 if gemma else
                       1 / (1 + np.exp(-gate)))
        return (gate * (z @ p[f"up{of}"].T)) @ p[f"down{of}"].T

    def routed(p, z):
        shares = np.exp(p["router"] @ z)
        chosen = np.argsort(-shares)[:config.experts_per_token]
        total = shares[chosen].sum() if config.renormalised else shares.sum()
        return sum(shares[e] / total * mlp(p, z, f"_{e}") for e in chosen)

    for p, local in zip(params["blocks"], config.local or [True] * config.layers, strict=True):
        rope = (config.local_theta, None) if local and config.local_theta else (config.rope_theta, config.rope_scaling)
        of = partial(turn, frequency=llama.rope_frequencies(config.head_dim, *rope))
        window = config.sliding_window if local else None
        h = normed(x, p.get("attn_norm"))
        q, k, v = (h @ p[n].T + p.get(f"{n}_bias", 0.0) for n in "qkv")
        if config.family in ("olmo2", "olmoe"):
            q, k = normed(q, p["q_norm"]), normed(k, p["k_norm"])
        q, k, v = (y.reshape(len(x), -1, config.head_dim) for y in (q, k, v))
        if config.family in ("qwen3", "gemma3", "qwen3_moe"):
            q, k = normed(q, p["q_norm"]), normed(k, p["k_norm"])
        mixed = np.zeros(q.shape)
        for i in range(len(x)):
            first = 0 if window is None else max(0, i - window + 1)
            for head in range(config.heads):
                group = head // (config.heads // config.kv_heads)
                scores = [of(q[i, head], i) @ of(k[j, group], j) for j in range(first, i + 1)]
                weights = np.exp(cap(np.array(scores) * scale, config.attention_cap))
                mixed[i, head] = weights @ v[first : i + 1, group] / weights.sum()
        x = x + normed(mixed.reshape(len(x), -1) @ p["o"].T, p.get("attn_post_norm")) * config.residual_scale
        z = normed(x, p.get("ffn_norm"))
        y = np.array([routed(p, row) for row in z]) if config.experts else mlp(p, z, "")
        x = x + normed(y, p.get("ffn_post_norm")) * config.residual_scale
    logits = normed(x, params["norm"]) @ params.get("head", params["embed"]).T
    return cap(logits / config.logit_divisor, config.logit_cap)


@every_config
def test_logits_agree_with_a_slow_float64_oracle(config):
    params, tokens = make(config, dtype=np.float64), sample(config)
    logits = forward(config, params, tokens)
    assert logits.dtype == jnp.float64
    for row, expected in zip(tokens, logits, strict=True):
        np.testing.assert_allclose(oracle(config, params, row), expected, atol=1e-11)


@pytest.mark.extra
@every_config
def test_logits_agree_with_transformers(config, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is the other side of this test")
    transformers = pytest.importorskip("transformers", reason="transformers is the other side of this test")
    params, tokens = make(config), sample(config)
    convert.save_hf(tmp_path, config, params)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        expected = model(torch.tensor(np.array(tokens))).logits.numpy()
    np.testing.assert_allclose(forward(config, params, tokens), expected, atol=1e-4)


@every_config
def test_forward_is_embed_then_blocks_then_head_also_compiled(config):
    params, tokens = make(config), sample(config)
    x = llama.embed(config, params, tokens)
    for i, p in enumerate(params["blocks"]):
        x, _ = block(config.at(i), p, x, jnp.arange(tokens.shape[1]))
    logits = llama.forward(config, params, tokens)
    np.testing.assert_allclose(llama.head(config, params, x), logits, atol=1e-5)
    np.testing.assert_allclose(forward(config, params, tokens), logits, atol=1e-5)


def test_a_block_reports_the_inputs_of_its_linear_layers():
    params, tokens = make(GQA, dtype=np.float64), sample(GQA)
    x, p = llama.embed(GQA, params, tokens), params["blocks"][0]
    y, inputs = block(GQA, p, x, jnp.arange(tokens.shape[1]))
    x, y, inputs, p = jax.tree.map(np.asarray, (x, y, inputs, p))
    for name, (_, n) in llama.shapes(GQA).items():
        assert inputs[llama.INPUT_OF[name]].shape == (*tokens.shape, n)
    np.testing.assert_allclose(y, x + inputs["o"] @ p["o"].T + inputs["down"] @ p["down"].T, atol=1e-12)
    gate = inputs["up"] @ p["gate"].T
    np.testing.assert_allclose(inputs["down"], gate / (1 + np.exp(-gate)) * (inputs["up"] @ p["up"].T), atol=1e-12)
    scale = np.sqrt((x * x).mean(-1, keepdims=True) + GQA.norm_eps)
    np.testing.assert_allclose(inputs["qkv"], x / scale * p["attn_norm"], atol=1e-12)


def cached(config, params, tokens, first, dtype=jnp.float64):
    """Logits of rows that go on one token at a time after ``first`` ones each, all padded to the longest; NaN there."""
    caches = [llama.empty_cache(config, len(tokens), tokens.shape[1], dtype) for _ in params["blocks"]]
    caches = jax.tree.map(lambda slots: slots + 1e3, caches)  # what was never written is not seen
    logits, first = np.full((*tokens.shape, config.vocab), np.nan), np.array(first)
    at = np.broadcast_to(np.arange(max(first)), (len(tokens), max(first)))
    padded = np.where(at < first[:, None], tokens[:, : max(first)], 0)
    rows = np.arange(len(tokens))[:, None]
    while True:
        x = llama.embed(config, params, padded)
        for i, p in enumerate(params["blocks"]):
            x, caches[i] = cached_block(config.at(i), p, x, caches[i], at)
        logits[rows, at] = np.where((at < first[:, None])[:, :, None], llama.head(config, params, x), np.nan)
        if max(first) == tokens.shape[1]:
            return logits
        at, first = first[:, None], first + 1
        padded = tokens[rows, at]


@every_config
def test_a_token_after_those_in_the_cache_has_the_logits_of_the_whole_sequence(config):
    params, tokens = make(config, dtype=np.float64), sample(config, batch=3)
    expected = np.array(forward(config, params, tokens))
    for first in ([13, 13, 13], [3, 13, 1]):
        logits = cached(config, params, tokens, first)
        for row, start in zip(range(3), first, strict=True):
            read = 40 - max(first) + start
            np.testing.assert_allclose(logits[row, :read], expected[row, :read], atol=1e-11)
            assert np.isnan(logits[row, read:]).all()


def test_keys_and_values_in_16_bits_change_logits_by_their_rounding(config=GQA):
    params, tokens = make(config, dtype=np.float64), sample(config, batch=3)
    exact = cached(config, params, tokens, [13, 13, 13])
    error = cached(config, params, tokens, [13, 13, 13], jnp.bfloat16) - exact
    assert 1e-5 < np.sqrt(np.mean(error**2) / np.var(exact)) < 2**-8


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("rows", [1, 3])  # all at the same positions, or each elsewhere
def test_attention_in_tiles_of_any_size_has_the_same_outcome_and_gradients(window, rows, monkeypatch):
    config, rng = dataclasses.replace(GQA, sliding_window=window), np.random.default_rng(0)
    given = [jnp.asarray(rng.standard_normal((3, length, heads, 12))) for length, heads in ((13, 6), (20, 2), (20, 2))]
    positions = jnp.asarray(np.arange(13) + [[7], [3], [0]])[:rows]
    attend = lambda *x: llama.attention(config, *x, positions if rows > 1 else positions[0], jnp.arange(20))
    outcome = lambda: (attend(*given), jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), argnums=(0, 1, 2))(*given))
    expected = outcome()
    for positions_at_once in (1, 5):
        monkeypatch.setattr(llama, "NUMBERS", 3 * 6 * 20 * positions_at_once)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13), outcome(), expected)


@pytest.mark.parametrize("change", [{}, {"sliding_window": 4096}, {"family": "gemma2", "attention_cap": 50.0}],
                         ids=["all", "window", "soft cap"])
def test_attention_of_long_sequences_holds_a_bounded_number_of_scores(change):
    config = dataclasses.replace(GQA, context=8192, **change)
    attend = lambda q, k, v: llama.attention(config, q, k, v, jnp.arange(8192), jnp.arange(8192))
    pull = jax.grad(lambda *x: jnp.sum(attend(*x)), argnums=(0, 1, 2))
    q, k = (jax.ShapeDtypeStruct((4, 8192, heads, config.head_dim), jnp.float32) for heads in (6, 2))
    sizes = [jax.jit(f).lower(q, k, k).compile().memory_analysis().temp_size_in_bytes for f in (attend, pull)]
    one = 4 * llama.NUMBERS  # bytes; all scores are 24 times as many
    assert sizes[0] < 4 * one and sizes[1] < 7 * one


@every_config
def test_changing_a_later_token_leaves_earlier_logits(config):
    params, tokens = make(config), sample(config)
    before, after = (np.array(forward(config, params, t)) for t in (tokens, changed(config, tokens, 25)))
    np.testing.assert_array_equal(before[:, :25], after[:, :25])
    assert np.abs(before[:, 25:] - after[:, 25:]).max() > 1e-3


def test_a_token_beyond_the_sliding_window_is_not_seen():
    config = dataclasses.replace(CONFIGS["mistral"], layers=1)
    params, tokens = make(config), sample(config)
    before, after = (np.array(forward(config, params, t)) for t in (tokens, changed(config, tokens, 10)))
    gap = np.abs(before - after).max((0, 2))
    assert np.all(gap[10:17] > 1e-6) and gap[17:].max() == 0


def test_a_sliding_window_as_long_as_the_sequence_changes_nothing():
    params, tokens = make(GQA), sample(GQA)
    windowed = forward(dataclasses.replace(GQA, sliding_window=40), params, tokens)
    np.testing.assert_array_equal(windowed, forward(GQA, params, tokens))


@pytest.mark.parametrize("config", [GQA, CONFIGS["llama3 rope"]], ids=["plain", "llama3"])
def test_rotary_attention_depends_on_distances_only(config):
    params, tokens = make(config, dtype=np.float64), sample(config)
    x = llama.embed(config, params, tokens)
    at = lambda start: np.array(block(config, params["blocks"][0], x, start + jnp.arange(40))[0])
    np.testing.assert_allclose(at(0), at(1000), atol=1e-10)
    spread = block(config, params["blocks"][0], x, 2 * jnp.arange(40))[0]
    assert np.abs(at(0) - spread).max() > 1e-3


def test_rope_keeps_norms_and_leaves_position_zero():
    x = np.random.default_rng(0).standard_normal((2, 5, 3, GQA.head_dim))
    y = np.array(jax.jit(llama.rope, static_argnums=0)(GQA, x, jnp.array([0, 1, 7, 100, 4000])))
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-12)
    np.testing.assert_array_equal(y[:, 0], x[:, 0])


def test_llama3_scaling_keeps_fast_pairs_and_slows_the_slowest_by_the_factor():
    plain, scaled = (llama.rope_frequencies(64, 5e5, s) for s in (None, SCALING))
    turns = SCALING.original_context * plain / (2 * np.pi)
    np.testing.assert_array_equal(scaled[turns > 4], plain[turns > 4])
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any() and np.all((scaled < plain) & (scaled > plain / 8) == between)


def test_linear_scaling_is_a_division_of_all_positions():
    scaled = dataclasses.replace(GQA, rope_scaling=LinearRopeScaling(4.0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 6, 12)))
    np.testing.assert_allclose(llama.rope(scaled, x, 4 * jnp.arange(5)), llama.rope(GQA, x, jnp.arange(5)), atol=1e-12)


def test_grouped_queries_are_repeated_keys_and_values():
    params, tokens = make(GQA, dtype=np.float64), sample(GQA)

    def repeat(p):
        split = lambda name: np.reshape(p[name], (GQA.kv_heads, GQA.head_dim, -1))
        whole = lambda name: np.repeat(split(name), 3, axis=0).reshape(-1, GQA.dim)
        return p | {"k": whole("k"), "v": whole("v")}

    full = params | {"blocks": [repeat(p) for p in params["blocks"]]}
    expected = forward(dataclasses.replace(GQA, kv_heads=6), full, tokens)
    np.testing.assert_allclose(forward(GQA, params, tokens), expected, atol=1e-12)


def test_sequences_of_a_batch_do_not_mix():
    params, tokens = make(GQA, dtype=np.float64), sample(GQA, batch=3)
    alone = np.concatenate([forward(GQA, params, tokens[i : i + 1]) for i in range(3)])
    np.testing.assert_allclose(forward(GQA, params, tokens), alone, atol=1e-12)


@pytest.mark.parametrize("narrow", [ml_dtypes.bfloat16, np.float16])
def test_narrow_weights_compute_in_float32(narrow):
    tokens = sample(GQA)
    stored = jax.tree.map(lambda p: np.asarray(p).astype(narrow), make(GQA))
    logits = forward(GQA, stored, tokens)
    assert logits.dtype == jnp.float32
    widened = jax.tree.map(lambda p: p.astype(np.float32), stored)
    np.testing.assert_allclose(logits, forward(GQA, widened, tokens), atol=1e-6)


def test_compressed_weights_act_as_their_dense_matrices():
    params, tokens = make(GQA), sample(GQA)
    config, p = CalderaConfig(rank=0, quantizer="uniform", outer_iterations=1), params["blocks"][1]
    shrink = lambda w: linear.compress_matrix(jax.random.key(3), w, jnp.eye(w.shape[1], dtype=w.dtype), config)[0]
    small = {name: shrink(p[name]) for name in ("gate", "up")}
    replaced = lambda new: params | {"blocks": [params["blocks"][0], p | new]}
    logits = forward(GQA, replaced(small), tokens)
    np.testing.assert_allclose(
        logits, forward(GQA, replaced({n: c.dense() for n, c in small.items()}), tokens), atol=1e-4
    )
    assert np.abs(logits - forward(GQA, params, tokens)).max() > 1e-2


def test_a_token_outside_the_vocabulary_gives_nan():
    params = make(GQA)
    assert bool(jnp.isnan(forward(GQA, params, np.array([[1, GQA.vocab]]))[0, 1]).all())


@every_config
def test_init_has_the_shapes_that_the_configuration_tells(config):
    params = jax.eval_shape(partial(llama.init, config=config), jax.random.key(0))
    assert ("head" in params) != config.tied and len(params["blocks"]) == config.layers
    for block_params in params["blocks"]:
        assert {n: block_params[n].shape for n in llama.linears(config)} == llama.shapes(config)
        assert {n: p.shape for n, p in block_params.items()} == llama.block_shapes(config)
        assert {n: p.shape for n, p in block_params.items() if p.ndim == 1} == llama.vector_shapes(config)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"kv_heads": 4}, "divide"),
        ({"head_dim": 11}, "even"),
        ({"layers": 0}, "layers"),
        ({"sliding_window": 0}, "sliding"),
    ],
)
def test_an_impossible_configuration_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GQA, **wrong)
