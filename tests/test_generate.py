"""Generation against the whole forward pass, transformers and NumPy; packed against dense; text and its pieces."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_llama import CONFIGS, every_config, forward, make
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from caldera_jax import codebooks, kernels, linear, packing
from caldera_jax.jobs import artifact, generate, spread
from caldera_jax.jobs.generate import Sampling, Text
from caldera_jax.models import convert, files, llama, weights
from caldera_jax.models.convert import Model

GQA = CONFIGS["gqa"]
PROMPTS = [np.arange(5) * 7 % 61, np.arange(33) * 5 % 61, np.array([60])]  # 33: beyond one ROUND
DRAWN = Sampling(12, temperature=1.3, top_p=0.8, seed=5)
complete = functools.partial(generate.complete, GQA)


@pytest.fixture(scope="module")
def params():
    return make(GQA, dtype=np.float64)


def greedy(config, params, prompt, count):
    """The likeliest token after the whole sequence so far, ``count`` times, without a cache."""
    tokens, end = np.zeros((1, 48), np.int64), len(prompt)
    tokens[0, :end] = prompt
    for i in range(end, end + count):
        tokens[0, i] = np.argmax(forward(config, params, tokens)[0, i - 1])  # causal: the zeros behind are not seen
    return tokens[0, end : end + count]


def same(a, b):
    assert len(a) == len(b)
    for row, other in zip(a, b, strict=True):
        np.testing.assert_array_equal(row, other)


# ---- tokens


@every_config
def test_greedy_tokens_are_the_likeliest_after_the_whole_sequence(config):
    params = make(config, dtype=np.float64)
    found = generate.complete(config, params, PROMPTS[:2], Sampling(12))
    same(found, [greedy(config, params, prompt, 12) for prompt in PROMPTS[:2]])


@pytest.mark.extra
@pytest.mark.parametrize("name", ["gqa", "mistral", "qwen2", *tiny.FAMILIES])
def test_greedy_tokens_are_those_of_transformers(name, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is the other side of this test")
    transformers = pytest.importorskip("transformers", reason="transformers is the other side of this test")
    config = CONFIGS[name]
    params = make(config, dtype=np.float64)
    convert.save_hf(tmp_path, config, params)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", experts_implementation="eager").double()
    prompt = torch.tensor(PROMPTS[0])[None]
    with torch.no_grad():
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False,
                                  pad_token_id=0, eos_token_id=None)
    same(generate.complete(config, params, PROMPTS[:1], Sampling(12)), [expected[0, len(PROMPTS[0]):].numpy()])


def test_prompts_of_several_lengths_give_together_what_each_gives_alone(params):
    together = complete(params, PROMPTS, Sampling(12))
    same(together, [complete(params, [prompt], Sampling(12))[0] for prompt in PROMPTS])


@pytest.mark.parametrize("sampling", [Sampling(12), DRAWN], ids=["greedy", "drawn"])
def test_more_tokens_begin_with_the_same_ones(params, sampling):
    longer = complete(params, PROMPTS, dataclasses.replace(sampling, tokens=40))  # of caches one ROUND longer
    same(complete(params, PROMPTS, sampling), [row[:12] for row in longer])


def test_another_seed_draws_other_tokens_and_the_same_one_the_same(params):
    drawn = complete(params, PROMPTS, DRAWN)
    same(drawn, complete(params, PROMPTS, DRAWN))
    other = complete(params, PROMPTS, dataclasses.replace(DRAWN, seed=6))
    assert np.concatenate(drawn).tolist() != np.concatenate(other).tolist()


def test_a_sequence_ends_before_an_end_token_and_the_others_go_on(params):
    whole = complete(params, PROMPTS, DRAWN)
    end = whole[0][4]
    cut = lambda row: row[:np.flatnonzero(row == end)[0]] if end in row else row
    expected = [cut(row) for row in whole]
    assert len({len(row) for row in expected}) > 1
    same(complete(params, PROMPTS, DRAWN, ends={int(end)}), expected)
    steps = list(generate.stream(GQA, params, PROMPTS, DRAWN, ends={int(end)}))
    assert len(steps) == max(map(len, expected)) and all(step.shape == (3,) for step in steps)
    same(complete(params, PROMPTS, DRAWN, ends=range(GQA.vocab)), [[], [], []])


def test_a_sequence_ends_where_it_is_as_long_as_the_context(params):
    full = complete(params, PROMPTS, Sampling(12))
    config = dataclasses.replace(GQA, context=38)
    cut = generate.complete(config, params, PROMPTS, Sampling(12))
    same(cut, [full[0], full[1][:5], full[2]])
    short = generate.complete(dataclasses.replace(GQA, context=34), params, PROMPTS[1:2], Sampling(12))
    same(short, [full[1][:1]])


def test_blocks_that_are_read_from_a_file_do_as_those_in_memory(tmp_path):
    loaded = convert.load(tiny.write_model(tmp_path))
    prompts = [np.array([1, 2, 3])]
    expected = generate.complete(loaded.config, generate.place(loaded.params), prompts, Sampling(6))
    same(generate.complete(loaded.config, loaded.params, prompts, Sampling(6)), expected)


@pytest.mark.parametrize(("prompts", "message"), [
    ([], "at least one"), ([[1, 2], []], "an empty prompt"), ([[1] * 128], "128 tokens leaves no room.*context of 128"),
    ([[1, 61]], "outside the vocabulary of 61"), ([[-1]], "outside the vocabulary"),
])
def test_a_prompt_that_cannot_be_continued_is_refused_before_anything_runs(params, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate.stream(GQA, params, prompts)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"tokens": 0}, "must be positive"), ({"temperature": -0.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"), ({"temperature": float("inf")}, "temperature"),
    ({"top_p": 0.0}, "top_p"), ({"top_p": 1.1}, "top_p"), ({"top_p": float("nan")}, "top_p"),
])
def test_sampling_out_of_range_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


def test_weights_that_overflow_are_told(params):
    broken = params | {"norm": params["norm"] * np.nan}
    with pytest.raises(ValueError, match="not finite"):
        complete(broken, PROMPTS)


# ---- packed


def random_layer(rng, m, n, grid, rank=0, dtype=np.float32):
    """A packed layer of random codes, for any code is one of a weight, of about the size that ``init`` gives."""
    other = codebooks.ResidualE8P(4)

    def part(rows, width, own, unit):
        size = packing.row_bytes(-(-width // own.block), own.code_bits)
        return linear.Packed(rng.integers(0, 256, (rows, size), np.uint8), np.full((1, 1), unit, dtype))

    low_rank = (part(rank, m, other, 0.2 / np.sqrt(n)), part(rank, n, other, 0.2)) if rank else (None, None)
    sides = (rng.integers(0, 256, -(-size // 8), np.uint8) for size in (m, n))
    return linear.CompressedLinear(part(m, n, grid, 0.6 / np.sqrt(n)), *low_rank, *sides, (m, n), (grid, other, other))


@pytest.fixture(scope="module")
def packed():
    """Config, and params whose blocks differ in grid and rank, as a budget makes them."""
    config, rng = dataclasses.replace(tiny.SQUARE, layers=3), np.random.default_rng(0)
    params, shapes = make(config, dtype=np.float64), llama.shapes(config)
    kinds = ((codebooks.E8P(), 0), (codebooks.E8P(), 4), (codebooks.Uniform(3), 0))
    blocks = [block | {name: random_layer(rng, m, n, *kind, np.float64) for name, (m, n) in shapes.items()}
              for block, kind in zip(params["blocks"], kinds, strict=True)]
    return config, params | {"blocks": blocks}


def test_greedy_tokens_of_packed_weights_are_those_of_their_dense_matrices(packed):
    config, params = packed
    prompts = [np.arange(9), np.arange(40, 44)]
    dense = generate.place(params, "dense")
    assert all(isinstance(block[name], jax.Array) for block in dense["blocks"] for name in llama.LINEARS)
    same(generate.complete(config, params, prompts, Sampling(12)),
         [greedy(config, dense, prompt, 12) for prompt in prompts])


def test_greedy_tokens_of_weights_in_bytes_are_those_of_their_dense_matrices(packed):
    config, params = packed
    params = jax.tree.map(lambda leaf: np.float32(leaf) if leaf.dtype == np.float64 else leaf, weights.whole(params))
    prompts = [np.arange(9), np.arange(40, 44)]
    placed = generate.place(params, "bytes")
    kinds = [{type(block[name].q).__name__ for name in llama.LINEARS} for block in placed["blocks"]]
    assert kinds == [{"Bytes"}, {"Bytes"}, {"Packed"}]  # the last on a scalar grid
    same(generate.complete(config, placed, prompts, Sampling(12)),
         [greedy(config, generate.place(params, "dense"), prompt, 12) for prompt in prompts])


def test_weights_are_in_bytes_where_they_fit_in_half_of_what_is_free(on_disk, monkeypatch):
    config = artifact.load(on_disk).config
    most = 2 * config.layers * llama.block_weights(config)
    for free, held in ((most, "bytes"), (most - 1, "packed")):
        monkeypatch.setattr(spread, "available_memory", lambda free=free: free)
        assert generate.run(on_disk, ["to"], Sampling(1)).bytewise == (config.layers * 7 if held == "bytes" else 0)


@pytest.mark.parametrize(("backend", "kept", "dtype"), [
    ("cpu", None, "float32"), ("gpu", None, "bfloat16"), ("tpu", "float32", "float32"),
    ("cpu", "bfloat16", "bfloat16")])
def test_keys_and_values_take_16_bits_where_it_is_asked_for_and_on_accelerators(
        backend, kept, dtype, monkeypatch):
    made, empty_cache = [], generate.llama.empty_cache
    monkeypatch.setattr(generate.jax, "default_backend", lambda: backend)
    monkeypatch.setattr(generate.llama, "empty_cache", lambda *shape: made.append(empty_cache(*shape)) or made[-1])
    generate.complete(GQA, make(GQA), [[3, 1, 4]], Sampling(2), kept=kept)
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype(dtype)}


def test_other_types_of_keys_and_values_are_refused(params):
    with pytest.raises(ValueError, match="float32 or bfloat16, got 'int8'"):
        generate._type(params, "int8")


def test_the_threads_that_read_blocks_work_in_the_precision_and_with_the_kernels_of_their_caller(monkeypatch):
    modes, take = [], linear.in_bytes
    monkeypatch.setattr(generate.linear, "in_bytes", lambda weight: modes.append(kernels.mode()) or take(weight))
    for x64 in (True, False):
        with jax.enable_x64(x64), kernels.use("jax"):
            placed = generate.place({"embed": np.ones((4, 4)), "blocks": [{"q": np.ones((4, 4))}] * 3}, "bytes")
        assert {leaf.dtype for leaf in jax.tree.leaves(placed)} == {np.dtype(np.float64 if x64 else np.float32)}
    assert set(modes) == {"jax"}


def test_packed_weights_stay_packed_on_the_device(packed):
    _, params = packed
    placed = generate.place(params)
    for block, own in zip(placed["blocks"], params["blocks"], strict=True):
        for name in llama.LINEARS:
            assert 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(block[name])) == own[name].stored_bits
    assert artifact.model_bytes(placed) == artifact.model_bytes(params)


RUN = {"config": {}, "model_sha256": "", "calibration_sha256": "", "evaluation_sha256": ""}


def write_packed(out, config):
    """A finished directory of layers of random E8P codes."""
    rng, layers = np.random.default_rng(0), {}
    table, gain = (config.vocab, config.dim), np.ones(config.dim, np.float32)
    for i in range(config.layers):
        arrays = {"attn_norm": gain, "ffn_norm": gain}
        for name, (m, n) in llama.shapes(config).items():
            layer = random_layer(rng, m, n, codebooks.E8P())
            layers[f"blocks.{i}.{name}"] = artifact.layer_meta(layer)
            arrays |= {f"{name}.{field}": array for field, array in artifact.layer_arrays(layer).items()}
        files.write_arrays(out / artifact.block_file(i), arrays)
    rest = {name: rng.standard_normal(table).astype(np.float32) for name in ("embed", "head")} | {"norm": gain}
    artifact.finish(out, Model(config, rest, byte_tokenizer(), "random"), layers, RUN)
    return out


def test_a_packed_model_takes_less_memory_by_what_its_weights_are_smaller_and_says_the_same(tmp_path):
    """59 million weights are 235 MB in float32, and in codes of 2 bits a 16th, 1 % more with scales and sign bits."""
    config = dataclasses.replace(tiny.CONFIG, dim=1024, layers=8, heads=8, kv_heads=8, head_dim=128, ffn_dim=1024)
    write_packed(tmp_path, config)
    packed, dense, of_bytes = (generate.run_apart(tmp_path, ["to be", "or"], Sampling(4), held)
                               for held in ("packed", "dense", "bytes"))
    assert packed.tokens == dense.tokens == of_bytes.tokens and packed.texts == dense.texts == of_bytes.texts
    assert [one.bytewise for one in (packed, dense, of_bytes)] == [0, 0, packed.layers] and packed.layers == 56
    assert dense.layer_bytes / 4 < of_bytes.layer_bytes < 1.01 * dense.layer_bytes / 4
    assert dense.layer_bytes == 4 * sum(m * n for m, n in llama.shapes(config).values()) * config.layers
    assert dense.layer_bytes / 16 < packed.layer_bytes < 1.01 * dense.layer_bytes / 16
    saved = dense.weight_bytes - packed.weight_bytes
    assert saved == dense.layer_bytes - packed.layer_bytes
    spared = (dense.peak_bytes - dense.start_bytes) - (packed.peak_bytes - packed.start_bytes)
    assert abs(spared - saved) < 2 * dense.layer_bytes / config.layers  # temporaries of two blocks at most


# ---- choosing a token


def smallest_nucleus(logits, top_p):
    """In float64: the fewest tokens, likeliest first, that have at least ``top_p`` together."""
    weights = np.exp(logits - logits.max())
    probability, kept, total = weights / weights.sum(), np.zeros(len(logits), bool), 0.0
    for token in sorted(range(len(logits)), key=lambda i: -logits[i]):
        if total >= top_p:
            break
        kept[token], total = True, total + probability[token]
    return kept


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.9, 0.999])
def test_the_nucleus_is_the_fewest_likeliest_tokens_that_have_top_p_together(top_p):
    rng = np.random.default_rng(0)
    logits = rng.uniform(0, 20, (300, 1)) * rng.standard_normal((300, 30))
    kept = np.isfinite(generate.nucleus(jnp.asarray(logits), top_p))
    np.testing.assert_array_equal(kept, [smallest_nucleus(row, top_p) for row in logits])


def test_the_nucleus_of_all_probability_is_everything():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((3, 50_000)), jnp.float32)  # sums reach 1 too early
    np.testing.assert_array_equal(generate.nucleus(logits, 1.0), logits)


def test_of_equal_logits_the_first_tokens_are_the_nucleus():
    kept = np.isfinite(generate.nucleus(jnp.zeros((1, 8)), 0.5))
    np.testing.assert_array_equal(kept[0], np.arange(8) < 4)


def test_temperature_0_takes_the_likeliest_and_one_near_0_too():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((50, 30)), jnp.float32)
    for temperature, top_p in ((0.0, 1.0), (0.0, 0.3), (1e-30, 1.0), (1.0, 1e-6)):
        chosen = generate.sample(jax.random.key(1), logits, temperature, top_p)
        np.testing.assert_array_equal(chosen, np.argmax(logits, axis=1))
        assert chosen.dtype == jnp.int32


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.9), (1.0, 0.7)])
def test_tokens_are_drawn_as_often_as_their_probability_says(temperature, top_p):
    logits, draws = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0]), 20_000
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, 6))
    drawn = np.bincount(generate.sample(jax.random.key(2), rows, temperature, top_p), minlength=6) / draws
    weights = np.exp(logits / temperature) * smallest_nucleus(logits / temperature, top_p)
    expected = weights / weights.sum()
    assert np.all(drawn[expected == 0] == 0)
    assert np.all(np.abs(drawn - expected) <= 5 * np.sqrt(expected * (1 - expected) / draws))  # 5 standard deviations


# ---- text


def byte_tokenizer(*special):
    """A token a byte, and the special ones."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(alphabet))}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return made


def told(made, prompt, ids):
    text = Text(made, prompt)
    pieces = [text.add(token) for token in ids]
    return pieces, text.rest()


def test_text_comes_in_whole_characters():
    made, text = byte_tokenizer(), "naïve café — 東京 🎉"
    pieces, rest = told(made, made.encode("x").ids, made.encode(text).ids)
    assert len(pieces) == len(text.encode()) and not rest
    assert "".join(pieces) == text and [piece for piece in pieces if piece] == list(text)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 255), max_size=30))
def test_pieces_of_any_bytes_join_to_the_text_of_all(ids):
    made = byte_tokenizer()
    pieces, rest = told(made, [], ids)
    assert "".join(pieces) + rest == made.decode(ids)


def test_a_character_that_is_cut_off_is_shown_as_such_at_the_end():
    made = byte_tokenizer()
    pieces, rest = told(made, [], made.encode("a東").ids[:-1])
    assert pieces == ["a", "", ""] and set(rest) == {"\ufffd"}


def sentencepiece():
    """Words with their blank, and bytes; the decoder drops the first blank of what it is given."""
    vocab = {"<unk>": 0, "▁The": 1, "▁fox": 2, "▁was": 3, "es": 4} | {f"<0x{b:02X}>": 5 + b for b in range(256)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    return made


def test_a_word_after_the_prompt_keeps_its_blank():
    assert told(sentencepiece(), [1], [2, 4, 3]) == ([" fox", "es", " was"], "")
    assert told(sentencepiece(), [], [1, 2]) == (["The", " fox"], "")
    special = sentencepiece()
    special.add_special_tokens(["[X]"])  # decodes to nothing
    assert told(special, [1], [special.token_to_id("[X]"), 2, 3]) == (["", " fox", " was"], "")


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(1, 260), max_size=30))
def test_no_sequence_of_byte_tokens_stops_the_text(ids):
    pieces, rest = told(sentencepiece(), [1], ids)
    assert len(pieces) == len(ids)
    if "\ufffd" not in (text := sentencepiece().decode([1, *ids])):
        assert "The" + "".join(pieces) + rest == text


def test_the_end_tokens_are_the_special_ones_of_a_known_name_and_the_one_that_the_files_name():
    made = byte_tokenizer("<|im_start|>", "<|endoftext|>", "<|im_end|>", "<stop>")
    made.add_tokens(["</s>"])  # a word like any other
    model = Model(GQA, {}, made, "")
    assert generate.end_tokens(model) == {257, 258}
    assert generate.end_tokens(model._replace(special={"eos_token": "<stop>"})) == {257, 258, 259}
    assert generate.end_tokens(model._replace(special={"eos_token": "unknown"})) == {257, 258}
    kept = Tokenizer.from_str(made.to_str())  # as a compressed model keeps it
    assert generate.end_tokens(model._replace(tokenizer=kept)) == {257, 258}
    assert generate.end_tokens(model._replace(tokenizer=byte_tokenizer())) == set()
    assert generate.end_tokens(model._replace(special={"eos_token": "<stop>"}, ends=(7, 259))) == {7, 257, 258, 259}


# ---- from the disk


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    return write_packed(tmp_path_factory.mktemp("small"), tiny.SQUARE)


def test_a_run_tells_its_text_as_it_comes_its_tokens_and_what_they_took(on_disk):
    shown, prompts = [], ["the lattice", "of"]
    result = generate.run(on_disk, prompts, Sampling(9), show=lambda row, text: shown.append((row, text)))
    model = artifact.load(on_disk)
    ids = [model.tokenizer.encode(prompt).ids for prompt in prompts]
    same(result.tokens, generate.complete(model.config, model.params, ids, Sampling(9)))
    assert result.texts == ["".join(text for row, text in shown if row == i) for i in range(2)]
    assert result.texts == [model.tokenizer.decode(row) for row in result.tokens]
    placed = generate.place(model.params, "bytes")
    assert result.prompt_tokens == 13 and result.weight_bytes == artifact.model_bytes(placed)
    assert result.cache_bytes == 2 * 2 * 2 * 32 * 24 * 4  # layers, keys and values, prompts, slots, two heads of 12
    assert generate.run(on_disk, prompts, Sampling(1), kept="bfloat16").cache_bytes == result.cache_bytes / 2
    stages = result.stages
    assert stages.keys() == {"load", "prompt", "tokens"} and result.peak_bytes >= result.start_bytes > 0
    steady = {name: stage["seconds"] - stage["compile_seconds"] for name, stage in stages.items()}
    assert result.prompt_rate == pytest.approx(13 / steady["prompt"])
    assert 0 < result.steady_seconds < stages["tokens"]["seconds"]  # without the first step, and its compiling
    assert result.token_rate == 2 * 7 / result.steady_seconds
    assert np.isnan(generate.run(on_disk, prompts, Sampling(2)).token_rate)


def test_a_dense_model_runs_by_its_name_and_ends_at_its_end_token(tmp_path):
    directory, sampling = tiny.write_model(tmp_path), Sampling(5, temperature=1.0, top_p=0.9)
    whole = generate.run(directory, ["to"], sampling).tokens[0]
    end = convert.load(directory).tokenizer.id_to_token(whole[2])
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    assert generate.run(directory, ["to"], sampling).tokens[0] == whole[:whole.index(whole[2])]


def test_a_model_ends_at_every_token_that_its_configurations_name_and_keeps_them_when_it_is_compressed(tmp_path):
    directory, sampling = tiny.write_model(tmp_path / "model"), Sampling(9, temperature=1.0, top_p=0.9)
    whole = generate.run(directory, ["to"], sampling).tokens[0]
    first, second = whole[6], whole[3]
    assert whole.index(first) == 6 and whole.index(second) == 3
    for ids, rest in (([first], 6), ([first, second], 3), (second, 3)):
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert generate.run(directory, ["to"], sampling).tokens[0] == whole[:rest]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [first, second]}))
    model = convert.load(directory)
    (tmp_path / "kept").mkdir()
    for i, block in enumerate(model.params["blocks"]):
        files.write_arrays(tmp_path / "kept" / artifact.block_file(i), dict(block))
    artifact.finish(tmp_path / "kept", model, {}, RUN)
    assert artifact.load(tmp_path / "kept").ends == model.ends == (first, second)
    assert generate.run(tmp_path / "kept", ["to"], sampling).tokens[0] == whole[:3]


def test_a_prompt_that_has_bos_gets_no_second_one(tmp_path):
    made = byte_tokenizer("<|bos|>")
    made.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 256)])
    directory = tiny.write_model(tmp_path, dataclasses.replace(tiny.CONFIG, vocab=257))
    made.save(str(directory / "tokenizer.json"))
    with_it, without = (generate.run(directory, [text], Sampling(4)) for text in ("<|bos|>to", "to"))
    assert with_it.prompt_tokens == without.prompt_tokens == 3 and with_it.tokens == without.tokens


def test_a_token_without_an_embedding_loads_and_is_refused_in_a_prompt(tmp_path):
    directory, made = tiny.write_model(tmp_path), byte_tokenizer("<pad>")
    made.save(str(directory / "tokenizer.json"))
    assert generate.run(directory, ["to"], Sampling(1)).prompt_tokens == 2
    with pytest.raises(ValueError, match="the text holds '<pad>', token 256, .* tokens 0 to 255 alone: take it out"):
        generate.run(directory, ["to", "to <pad>"], Sampling(1))


@pytest.mark.parametrize(("prompts", "message"), [
    (["fine", ""], "an empty prompt"), (["x" * 64], "64 tokens leaves no room"), ([], "at least one"),
])
def test_text_that_cannot_be_continued_is_refused(on_disk, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate.run(on_disk, prompts)


def test_a_directory_without_a_model_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="no compressed model: there is no manifest.json"):
        generate.load(tmp_path)
    with pytest.raises(ValueError, match="unknown model"):
        generate.load(tmp_path / "nowhere")
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(ValueError, match="unfinished run"):
        generate.run_apart(tmp_path, ["a"])


@pytest.mark.slow
def test_the_end_tokens_of_smollm2_are_those_of_its_texts_and_of_its_turns():
    model = convert.load("smollm2-135m")
    ids = {model.tokenizer.token_to_id(token) for token in ("<|endoftext|>", "<|im_end|>")}
    assert generate.end_tokens(model) == ids and model.special["eos_token"] == "<|im_end|>"
